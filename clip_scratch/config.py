"""CFG: every setting of a run in one flat class.

All four of these work, and a misspelt setting is refused with a suggestion:

    CFG.batch_size = 64                          # class attribute, as in the tutorial
    class Mine(CFG): model_name = "convnext_tiny"
    CFG(model_name="resnet18", size=160)
    python -m clip_scratch.train flickr8k --batch-size 64 --no-pretrained
"""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from typing import Literal

from .errors import UserError, suggest


def _check(names: typing.Iterable[str], owner: type) -> None:
    known = {field.name for field in dataclasses.fields(owner)}
    for name in names:
        if name not in known:
            raise UserError(f"CFG has no setting {name!r}.{suggest(name, known)}")


class _Settings(type):
    """Metaclass that refuses `CFG.batchsize = 64`."""

    def __setattr__(cls, name: str, value: object) -> None:
        if not name.startswith("_") and dataclasses.is_dataclass(cls):
            _check([name], cls)
        super().__setattr__(name, value)


@dataclass(init=False)
class CFG(metaclass=_Settings):
    """Any captions file: ResNet50 + DistilBERT by default, every setting open."""

    # Data
    captions_path: str = ""  # captions file, or a folder with a published data set; empty: the built-in scenes
    image_path: str = ""  # folder of the images; empty: found beside the captions file
    captions_format: Literal["auto", "table", "flickr8k", "flickr30k", "karpathy", "json", "huggingface"] = "auto"  # how to read captions_path; auto: recognised from the file
    image_column: str = ""  # column or JSON field with the image name; empty: recognised by its name
    caption_column: str = ""  # column or JSON field with the caption; empty: recognised by its name
    label_column: str = ""  # column or JSON field with a class label; empty: recognised by its name, if there is one
    valid_captions_path: str = ""  # a second captions file, for validation
    test_captions_path: str = ""  # a third captions file, for testing
    valid_fraction: float = 0.1  # fraction of the images used for validation, where no split is published
    test_fraction: float = 0.0  # fraction of the images set aside for testing, where no split is published
    on_bad_image: Literal["error", "skip"] = "error"  # missing or undecodable images: stop, or leave them out
    n_scenes: int = 6000  # number of images in the built-in data set
    seed: int = 42  # seed of the split, the weights, the batches and the augmentation

    # Images
    size: int = 224  # side of the model's square input, in pixels; 0: the size that the pretrained image tower was trained with
    train_size: int = 0  # the same in training, where it is less: random crops show things larger (FixRes); 0: size
    resize: str = "stretch"  # evaluation images: stretch to the square; crop: resize the shorter side to size, keep the center; crop:256: resize it to 256
    interpolation: Literal["area", "bilinear", "bicubic"] = "area"  # resize filter; a pretrained CLIP brings its own geometry
    crop_scale: float = 0.6  # random resized crops of training images cover at least this fraction of the area; 1: no random crop
    horizontal_flip: float = 0.5  # probability that a training image is flipped
    color_jitter: float = 0.2  # strength of brightness, contrast and saturation jitter; 0: none
    hue_jitter: float = 0.0  # strength of hue jitter; 0: none
    image_cache: bool = True  # cache decoded, resized images on disk, for later epochs and runs
    cache_path: str = ""  # folder of the on-disk caches; empty: clip_scratch in the user's cache folder

    # Model
    backend: Literal["from_scratch", "hf_clip"] = "from_scratch"  # two encoders with new heads, or a pretrained CLIP from transformers
    model_name: str = "resnet50"  # any timm image model, several side by side as in resnet18+resnet50, or module:function that builds your own; with backend hf_clip a CLIP from the hub or a local folder
    image_weights: str = ""  # local .safetensors or .pth file, or package:NAME/FILE; as many, with + between them, as there are models; empty: timm's own
    image_freeze: str = "none"  # what stays fixed in the image tower: none, first:N blocks, all-but-last:N blocks, backbone (the head trains), all, or lora
    image_dropout: float = 0.0  # dropout on the image features, before the head
    freeze_batch_norm: bool = False  # keep the batch-norm statistics of the image tower fixed, better for small batches
    freeze_depthwise: bool = False  # keep the depthwise convolutions of the image tower, and the batch norms after them, fixed: their gradients take half of a step on a CPU
    text_encoder_model: str = "distilbert-base-uncased"  # any transformers text encoder, a local folder, package:NAME/FOLDER, or module:function
    text_tokenizer: str = ""  # tokenizer name or folder; train: learn one from the captions; empty: the text encoder's own
    text_pooling: Literal["cls", "mean"] = "cls"  # how token features become one vector
    text_freeze: str = "none"  # what stays fixed in the text tower, as in image_freeze
    text_dropout: float = 0.0  # dropout on the text features, before the head
    max_length: int = 200  # longest caption, in tokens; the rest is cut off
    pretrained: bool = True  # --no-pretrained: start from random weights, no network needed
    trainable: bool = True  # --no-trainable: freeze both backbones, train the heads only
    head: Literal["mlp", "linear"] = "mlp"  # projection heads: mlp as in the tutorial; linear overfits small data sets less
    projection_dim: int = 256  # dimensions of the shared embedding space
    dropout: float = 0.1  # dropout in the mlp heads
    lora_rank: int = 8  # rank of the LoRA updates

    # Loss
    loss: Literal["auto", "infonce", "sigmoid", "soft_target"] = "infonce"  # infonce: CLIP's; sigmoid: SigLIP's; soft_target: the tutorial's; auto: the loss that the pretrained CLIP was trained with
    temperature: float = 0.07  # initial temperature; learned, except by soft_target
    max_captions: int = 0  # captions of a training image that are used, the first ones; 0: all of them
    captions_per_image: int = 1  # captions of each image in a step; 0: all of those used

    # Optimization
    epochs: int = 20  # passes over the training images
    minutes: float = 0.0  # wall-clock budget of the run: the number of steps that fits is measured and fixed at the start; 0: no limit
    max_steps: int = 0  # stop after this many optimizer steps; 0: no limit
    batch_size: int = 32  # images per batch
    micro_batch_size: int = 0  # images computed at once; the gradients are those of the whole batch all the same (GradCache); 0: the whole batch
    accumulation: int = 1  # batches whose gradients are averaged for one optimizer step; each has its own negatives
    head_lr: float = 1e-3  # peak learning rate of the heads and the temperature
    image_encoder_lr: float = 1e-4  # peak learning rate of the image tower
    text_encoder_lr: float = 1e-5  # peak learning rate of the text tower
    lora_lr: float = 1e-3  # peak learning rate of the LoRA updates
    layer_decay: float = 1.0  # learning rate of a block relative to the block above it
    weight_decay: float = 1e-3  # AdamW weight decay; norms, biases and the temperature have none
    scheduler: Literal["plateau", "cosine"] = "plateau"  # plateau: ReduceLROnPlateau on the validation rsum; cosine: warm-up, then cosine to zero
    warmup_steps: int = 0  # steps of linear warm-up, at most a fifth of the run (cosine only)
    patience: int = 1  # epochs without a better rsum before the plateau scheduler lowers the rates
    factor: float = 0.8  # factor by which the plateau scheduler lowers the rates
    early_stopping: int = 5  # epochs without a better rsum before the run stops; 0: never
    stop_at: float = 0.0  # stop once the text-to-image R@10 on the validation images reaches this percentage; 0: never
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema: float = 0.0  # decay of an exponential moving average of the weights, which is validated and saved; 0: none
    wise_ft: str = ""  # weight of the fine-tuned model when it is averaged with the zero-shot one (WiSE-FT): 0 to 1, or auto: the best on validation; empty: no averaging

    # Hardware
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best available
    precision: str = "auto"  # fp32, bf16, fp16, or one for each tower as in fp32/bf16 (image/text); auto: each tower's fastest, measured in runs of 200 steps or more
    channels_last: bool = True  # memory format of the image tower; precision auto measures it too
    sync_batch_norm: bool = False  # batch norm takes its statistics from the images of all processes (GPUs, torchrun)
    fully_shard: bool = False  # shard weights, gradients and optimizer state of the towers over the processes (FSDP2; GPUs, torchrun)
    compile: bool = False  # torch.compile both towers
    deterministic: bool = False  # algorithms that give a GPU's runs the same weights each time, as a CPU's have anyway
    cached_views: int = 0  # augmented views to cache per image where a tower is frozen; its features are then computed once; 0: no feature cache
    num_workers: int = 0  # processes that decode images where there is no image cache; 0: decode in the training process
    checkpoint_steps: int = 200  # optimizer steps between checkpoints within an epoch

    # Run
    run_dir: str = ""  # folder of this run; empty: runs/PRESET-DATE-TIME
    resume: str = ""  # folder of an interrupted run to resume

    def __init__(self, **settings: object) -> None:
        _check(settings, type(self))
        for field in dataclasses.fields(self):
            value = settings.get(field.name, getattr(type(self), field.name))
            setattr(self, field.name, _validated(field.name, value))

    def __init_subclass__(cls) -> None:
        _check([n for n, v in vars(cls).items() if not n.startswith("_") and not hasattr(v, "__get__")], cls)

    def __setattr__(self, name: str, value: object) -> None:
        _check([name], type(self))
        object.__setattr__(self, name, _validated(name, value))


# Numbers outside these bounds would fail late and obscurely; all others are at least 0
_BOUNDS: dict[str, tuple[float, float]] = {
    "n_scenes": (30, math.inf), "seed": (0, 2**32 - 1), "max_length": (3, math.inf), "projection_dim": (1, math.inf),
    "valid_fraction": (0, 0.9), "test_fraction": (0, 0.9), "crop_scale": (1e-3, 1), "horizontal_flip": (0, 1),
    "color_jitter": (0, 1), "hue_jitter": (0, 0.5), "dropout": (0, 0.99), "image_dropout": (0, 0.99),
    "text_dropout": (0, 0.99), "lora_rank": (1, math.inf), "temperature": (1e-6, math.inf), "batch_size": (1, math.inf),
    "accumulation": (1, math.inf), "layer_decay": (1e-3, 1), "factor": (1e-6, 1), "ema": (0, 0.99999),
    "stop_at": (0, 100), "checkpoint_steps": (1, math.inf),
}
_FREEZE = (r"none|first:[1-9]\d*|all-but-last:[1-9]\d*|backbone|all|lora", "none, first:N, all-but-last:N, backbone, all or lora")
_FORMS = {
    "image_freeze": _FREEZE, "text_freeze": _FREEZE,
    "precision": (r"auto|fp16|(fp32|bf16)(/(fp32|bf16))?", "auto, fp32, bf16, fp16, or one for each tower such as fp32/bf16"),
    "resize": (r"stretch|crop(:[1-9]\d*)?", "stretch, crop or crop:PIXELS"),
    "wise_ft": (r"|auto|0?\.\d+|0|1(\.0+)?", "empty, auto, or a number from 0 to 1"),
}
_TYPES = typing.get_type_hints(CFG)


def _validated(name: str, value: object) -> object:
    """`value` in the setting's type, or a UserError that says what the setting takes."""
    kind = _TYPES[name]
    if typing.get_origin(kind) is Literal:
        options = typing.get_args(kind)
        if value not in options:
            raise UserError(f"{name} is one of {', '.join(options)}, not {value!r}.{suggest(str(value), options)}")
        return value
    if kind is str and (hasattr(value, "__fspath__") or (name == "wise_ft" and isinstance(value, int | float))):
        value = str(value)
    if kind in (int, float) and hasattr(value, "__index__") and not isinstance(value, bool):
        value = kind(value)  # an int, numpy's as well
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name} takes {kind.__name__}, not {value!r}")
    if name == "size" and 0 < value < 8:
        raise UserError(f"size is 0 (the pretrained image tower's own) or at least 8, not {value!r}")
    pattern, description = _FORMS.get(name, (".*", ""))
    if kind is str and not re.fullmatch(pattern, value, re.DOTALL):
        raise UserError(f"{name} is {description}, not {value!r}")
    low, high = _BOUNDS.get(name, (0, math.inf))
    if isinstance(value, int | float) and not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"{name} is {bounds}, not {value!r}")
    return value
