"""The sections of a recipe that say what the method is: network, loss, optimizer and augmentation."""

from typing import Literal

from engine.recipe.keys import key, section
from engine.recipe.ranges import AT_LEAST_1, CROP, FRACTION, HUE, NETWORK, NOT_NEGATIVE, PATH, POSITIVE

WEIGHTS = "FILE, run or timm/<name> with whose trunk both encoders of a new run begin; null: drawn by run.seed"
NAMED = "null: as the named network has it"


@section
class Model:
    name: str = key("the trunk: a ViT or a ResNet of this project, or a network of timm", NETWORK)
    weights: str | None = key(WEIGHTS, PATH, since=2, before=None, default=None)
    image_size: int = key("side of a view in pixels", AT_LEAST_1, default=224)
    patch_size: int | None = key(f"side of a patch in pixels; {NAMED}", AT_LEAST_1, default=None)
    dim: int | None = key(f"width of a ViT's tokens; {NAMED}", AT_LEAST_1, default=None)
    depth: int | None = key(f"number of a ViT's blocks; {NAMED}", AT_LEAST_1, default=None)
    heads: int | None = key(f"attention heads of a ViT's block; {NAMED}", AT_LEAST_1, default=None)
    freeze_patch_projection: bool = key("leave a plain ViT's patch projection as it was drawn, for stable training")
    projector_hidden_dim: int = key("hidden width of projector and predictor", AT_LEAST_1, default=4096)
    output_dim: int = key("width of the vectors that the loss compares", AT_LEAST_1, default=256)


@section
class Moco:
    temperature: float = key("T of the contrastive loss, which divides the similarities", POSITIVE)
    momentum: float = key("where the momentum encoder's coefficient starts on its half cosine to 1", FRACTION)


@section
class Optimizer:
    name: Literal["adamw", "lars"] = key("which optimizer trains: AdamW, as for ViTs, or LARS, as for ResNets")
    base_lr: float = key("learning rate per 256 images; the peak is base_lr * global_batch_size / 256", POSITIVE)
    weight_decay: float = key("decay of all that is trained; LARS spares biases and norms", NOT_NEGATIVE)


@section
class Augment:
    """Of MoCo's two views, in this order; pairs are [view 1, view 2]. The defaults are the paper's, on ImageNet."""

    crop_min: float = key("smallest share of the image's area that a crop keeps", CROP)
    brightness: float = key("largest change of brightness, as a share", NOT_NEGATIVE, default=0.4)
    contrast: float = key("largest change of contrast, as a share", NOT_NEGATIVE, default=0.4)
    saturation: float = key("largest change of saturation, as a share", NOT_NEGATIVE, default=0.2)
    hue: float = key("largest turn of the hue, as a share of the circle", HUE, default=0.1)
    jitter_probability: float = key("probability of the four changes above, together", FRACTION, default=0.8)
    grayscale_probability: float = key("probability of a grey view", FRACTION, default=0.2)
    blur_sigma: tuple[float, float] = key(
        "least and largest sigma of the blur, in pixels", POSITIVE, default=(0.1, 2.0)
    )
    blur_probability: tuple[float, float] = key("probability of the blur", FRACTION, default=(1.0, 0.1))
    solarize_probability: tuple[float, float] = key("probability of solarisation", FRACTION, default=(0.0, 0.2))
    flip_probability: float = key("probability of a flip from left to right", FRACTION, default=0.5)
    mean: tuple[float, float, float] = key("subtracted from channels of images in 0..1", default=(0.485, 0.456, 0.406))
    std: tuple[float, float, float] = key("by which channels are divided then", POSITIVE, default=(0.229, 0.224, 0.225))
