"""What each task's recipe holds: its sections and keys, each with type and range, as frozen dataclasses.

What values mean together, and how a recipe is read and written, is engine.recipe.load's.
"""

import dataclasses
import re
from typing import Literal

from engine.recipe.keys import Rule, key

PLAIN_VITS = ("vit", "vit_small", "vit_base", "vit_large", "vit_huge")
CONV_VITS = ("vit_conv", "vit_conv_small", "vit_conv_base")
SHAPE_KEYS = ("patch_size", "dim", "depth", "heads")
# How timm's plain vision transformers begin; whoever builds a timm trunk looks at the network itself.
TIMM_VIT = re.compile(r"timm/(aimv2|beit3|deit|eva|flexivit|test_vit|vit)")

POSITIVE = Rule(" > 0", lambda value: value > 0)
NOT_NEGATIVE = Rule(" >= 0", lambda value: value >= 0)
AT_LEAST_1 = Rule(" >= 1", lambda value: value >= 1)
AT_LEAST_2 = Rule(" >= 2", lambda value: value >= 2)
FRACTION = Rule(" from 0 to 1", lambda value: 0 <= value <= 1)
HUE = Rule(" from 0 to 0.5", lambda value: 0 <= value <= 0.5)
CROP = Rule(" > 0 and <= 1", lambda value: 0 < value <= 1)
BELOW_1 = Rule(" >= 0 and < 1", lambda value: 0 <= value < 1)
REPEATS = Rule(" from 1 to 100", lambda value: 1 <= value <= 100)
TEXT = Rule(", in quotes if it looks like a number", lambda value: bool(value) and value.isprintable())
NETWORK = Rule(
    f": {', '.join((*PLAIN_VITS, *CONV_VITS))}, resnet50 or timm/<name>",
    lambda value: value in (*PLAIN_VITS, *CONV_VITS, "resnet50") or re.fullmatch(r"timm/[\w.-]+", value) is not None,
)
RANDAUGMENT = Rule(
    " in timm's words, as rand-m9-mstd0.5-inc1",
    lambda value: re.fullmatch(r"rand(-(m|n|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-inc[01]|-tweights)*", value) is not None,
)
ARGUMENTS = Rule(", each a keyword argument", lambda value: all(name.isidentifier() for name in value))

section = dataclasses.dataclass(frozen=True, kw_only=True)


@section
class Run:
    dir: str = key(TEXT)
    seed: int = key(NOT_NEGATIVE)


@section
class Model:
    """null for patch_size, dim, depth and heads means the named network's own; `shape` resolves them."""

    name: str = key(NETWORK)
    image_size: int = key(AT_LEAST_1)
    patch_size: int | None = key(AT_LEAST_1, default=None)
    dim: int | None = key(AT_LEAST_1, default=None)
    depth: int | None = key(AT_LEAST_1, default=None)
    heads: int | None = key(AT_LEAST_1, default=None)
    freeze_patch_projection: bool = key()
    projector_hidden_dim: int = key(AT_LEAST_1, default=4096)
    output_dim: int = key(AT_LEAST_1, default=256)


@section
class Moco:
    """momentum: m0, where the cosine schedule of the momentum encoder starts on its way to 1."""

    temperature: float = key(POSITIVE)
    momentum: float = key(FRACTION)


@section
class Optimizer:
    """base_lr: per 256 images; the peak lr is base_lr * global batch / 256."""

    name: Literal["adamw", "lars"] = key()
    base_lr: float = key(POSITIVE)
    weight_decay: float = key(NOT_NEGATIVE)


@section
class Train:
    """max_steps ends the run early and changes nothing else: schedules follow epochs.

    A batch has two images or more: BatchNorm in training and a loss with negatives need them.
    """

    global_batch_size: int = key(AT_LEAST_2)
    epochs: int = key(AT_LEAST_1)
    warmup_epochs: float = key(NOT_NEGATIVE)
    max_steps: int | None = key(AT_LEAST_1, default=None)


@section
class Data:
    """val_root null: look for `train` and `val` inside root. max_bad_fraction: unreadable images that a run bears."""

    source: Literal["folder", "shards", "torchvision"] = key()
    root: str = key(TEXT)
    val_root: str | None = key(TEXT, default=None)
    dataset: str | None = key(TEXT, default=None)
    dataset_options: dict = key(ARGUMENTS, default_factory=dict)
    workers: int = key(NOT_NEGATIVE)
    max_bad_fraction: float = key(FRACTION)


@section
class Augment:
    """Pairs of probabilities are [view 1, view 2]; sigma in pixels; mean and std per channel of images in 0..1."""

    crop_min: float = key(CROP)
    brightness: float = key(NOT_NEGATIVE)
    contrast: float = key(NOT_NEGATIVE)
    saturation: float = key(NOT_NEGATIVE)
    hue: float = key(HUE)
    jitter_probability: float = key(FRACTION)
    grayscale_probability: float = key(FRACTION)
    blur_sigma: tuple[float, float] = key(POSITIVE)
    blur_probability: tuple[float, float] = key(FRACTION)
    solarize_probability: tuple[float, float] = key(FRACTION)
    flip_probability: float = key(FRACTION)
    mean: tuple[float, float, float] = key()
    std: tuple[float, float, float] = key(POSITIVE)


@section
class Checkpoint:
    every_steps: int = key(AT_LEAST_1)
    keep: int = key(AT_LEAST_1)


@section
class Log:
    every_steps: int = key(AT_LEAST_1)


@section
class Evaluate:
    """crop_fraction: side of the centre crop over the shorter side of the resized image; 1 sees the whole width.

    online_probe: a linear classifier learns on the features of the training steps; kNN's rows have its accuracy too.
    """

    knn_every_epochs: int = key(NOT_NEGATIVE)
    crop_fraction: float = key(CROP, default=0.875)
    online_probe: bool = key(default=False)


Interpolation = Literal["bilinear", "bicubic"]
Precision = Literal["bf16", "float32", "float64"]
Shard = Literal["full", "grad_op", "hybrid", "replicate"]


@section
class Parallel:
    """replicate: number of replicas under hybrid; 1 in the other modes."""

    compile: bool = key()
    precision: Precision = key()
    shard: Shard = key()
    replicate: int = key(AT_LEAST_1)


@section
class Pretrain:
    """The recipe of `task: pretrain`. `load` checks it; one that is put together by hand is not checked."""

    task: Literal["pretrain"] = "pretrain"
    run: Run
    model: Model
    moco: Moco
    optimizer: Optimizer
    train: Train
    data: Data
    augment: Augment
    checkpoint: Checkpoint
    log: Log
    evaluate: Evaluate
    parallel: Parallel


@section
class LinearOptimizer:
    """SGD with momentum 0.9 and without weight decay. base_lr: per 256 images."""

    base_lr: float = key(POSITIVE)


@section
class LinearTrain:
    """max_steps ends the run early and changes nothing else. The last, partial batch of an epoch is used."""

    global_batch_size: int = key(AT_LEAST_1)
    epochs: int = key(AT_LEAST_1)
    max_steps: int | None = key(AT_LEAST_1, default=None)


@section
class LabelledData(Data):
    """labels: the share of the training images that is used, as many of every class; run.seed chooses them."""

    labels: float = key(CROP, default=1.0)


@section
class LinearAugment:
    crop_min: float = key(CROP)
    flip_probability: float = key(FRACTION)


@section
class LinearEvaluate:
    """crop_fraction: side of the centre crop over the shorter side of the resized image."""

    crop_fraction: float = key(CROP)


@section
class Linear:
    """The recipe of `task: linear`: a classifier on the features of a frozen CHECKPOINT."""

    task: Literal["linear"] = "linear"
    run: Run
    optimizer: LinearOptimizer
    train: LinearTrain
    data: LabelledData
    augment: LinearAugment
    checkpoint: Checkpoint
    log: Log
    evaluate: LinearEvaluate


@section
class FinetuneModel:
    """drop_path: share of samples for which the last block is left out; it grows with the depth from 0."""

    drop_path: float = key(BELOW_1)


@section
class FinetuneOptimizer:
    """AdamW. base_lr: per 512 images; layer_decay: a layer's rate over that of the next deeper one."""

    base_lr: float = key(POSITIVE)
    min_lr: float = key(NOT_NEGATIVE)
    weight_decay: float = key(NOT_NEGATIVE)
    layer_decay: float = key(CROP)


@section
class FinetuneTrain:
    """max_steps ends the run early and changes nothing else. ema_decay: what the average keeps; null: no average."""

    global_batch_size: int = key(AT_LEAST_1)
    epochs: int = key(AT_LEAST_1)
    warmup_epochs: float = key(NOT_NEGATIVE)
    max_steps: int | None = key(AT_LEAST_1, default=None)
    label_smoothing: float = key(BELOW_1)
    ema_decay: float | None = key(BELOW_1, default=None)


@section
class FinetuneAugment:
    """mixup, cutmix: alpha of the Beta distribution, 0 for none. repeats: how often an image comes in its batch."""

    crop_min: float = key(CROP)
    flip_probability: float = key(FRACTION)
    interpolation: Interpolation = key()
    randaugment: str | None = key(RANDAUGMENT, default=None)
    erase_probability: float = key(FRACTION)
    mixup: float = key(NOT_NEGATIVE)
    cutmix: float = key(NOT_NEGATIVE)
    repeats: int = key(REPEATS)


@section
class FinetuneEvaluate:
    """crop_fraction: side of the centre crop over the shorter side of the resized image."""

    every_epochs: int = key(AT_LEAST_1)
    crop_fraction: float = key(CROP)


@section
class Finetune:
    """The recipe of `task: finetune`: the whole network of a CHECKPOINT and a classifier, trained on labels."""

    task: Literal["finetune"] = "finetune"
    run: Run
    model: FinetuneModel
    optimizer: FinetuneOptimizer
    train: FinetuneTrain
    data: LabelledData
    augment: FinetuneAugment
    checkpoint: Checkpoint
    log: Log
    evaluate: FinetuneEvaluate
    parallel: Parallel

    @property
    def peak_lr(self) -> float:
        """The highest learning rate, by DeiT's rule."""
        return self.optimizer.base_lr * self.train.global_batch_size / 512


Recipe = Pretrain | Linear | Finetune
RECIPES: dict[str, type[Recipe]] = {"pretrain": Pretrain, "linear": Linear, "finetune": Finetune}
