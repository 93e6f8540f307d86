"""What each task's recipe holds: sections and keys, each with its meaning, type and range, as frozen dataclasses.

A key has a default where one value is what most want, or leaves the part out. Values that must agree with each other
are checked in engine.recipe.load.

Schemas: 1, recipes that say none; 2, recipes that say it. A key that comes later has `since` and `before`, so that
older recipes, and the runs that they began, stay what they were.
"""

from typing import Literal

from engine.recipe.keys import Rule, key, section
from engine.recipe.method import Augment, Moco, Model, Optimizer
from engine.recipe.ranges import (
    ARGUMENTS,
    AT_LEAST_1,
    AT_LEAST_2,
    BELOW_1,
    CENTRE,
    CROP,
    FRACTION,
    MINUTES,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    RANDAUGMENT,
    REPEATS,
    TEXT,
    WARN,
    WORKERS,
)

TIMEOUT = "how long a rank, or the disk of the images, may be silent once steps run; then the run ends, to be resumed"
CONTINUE_FROM = "run or checkpoint whose encoders, heads and optimizer state a new run begins with; null: none"
MAX_STEPS = "ends the run early, while the schedules still span all epochs; null: no limit"
BATCH = "images of a step over all processes, whose number must divide it"
MICRO_BATCH = "images of a process that pass the trunk together, to save memory at a price in time; null: all"
ON_SPIKE = "gradients over 10 times the median norm of 100 logged steps: said and counted; null: not looked for"
KNN_BANK = "training images of each class that are kNN's neighbours, drawn by run.seed; null: all"
LABELLED = "labelled images beside the training data, as kNN's neighbours; null: kNN is measured on data.root's"
QUERIES = "labelled images that are classified by those of evaluate.train_root"
KEEP_EVERY = "checkpoints at whole multiples of so many epochs are made, and stay beside the newest; null: none"
ASYNCHRONOUS = "write checkpoints beside the training, from a copy in memory; false: training waits, without a copy"
MAX_FAILURES = "saves in a row that fail, as on a full disk, before the run ends; fewer are made up for by the next"
CLASSES = (
    "of images in folders: whether first folders are the classes; auto: where validation's are, or none lies deeper"
)
ACCEPT_CHANGES = "go on where images have changed since the run began; one that is gone is unreadable"
RANGE = "[black, white] of grey images of more than 8 bits or real numbers; null: 16 bits as they are, no others"
MAX_PIXELS = "pixels of an image, more of which are not read, as decoding takes memory; null: 178956970"
EXIF_ORIENTATION = "turn photographs upright, as their cameras were held (EXIF); false: as they lie in their files"
CROP_FRACTION = "side of the centre crop over the shorter side of the resized image; 1 sees the whole width"

SCHEMA = 2  # raise it with a key whose default is not what ran before it
SCHEMAS = Rule(f" from 1 to {SCHEMA}", lambda value: 1 <= value <= SCHEMA)


def schema_key() -> int:
    return key("version of the keys and defaults that the recipe was written for; left out: 1", SCHEMAS, default=1)


@section
class Run:
    dir: str = key("folder of checkpoints and metrics; a run that is found there is resumed", PATH)
    seed: int = key("what initial weights, order of images and augmentation follow from", NOT_NEGATIVE, default=0)
    timeout_minutes: float = key(TIMEOUT, MINUTES, since=2, before=30.0, default=5.0)


@section
class PretrainRun(Run):
    continue_from: str | None = key(CONTINUE_FROM, PATH, since=2, before=None, default=None)


@section
class Train:
    """A batch has two images or more: BatchNorm in training and a loss with negatives need them."""

    global_batch_size: int = key(BATCH, AT_LEAST_2)
    epochs: int = key("passes over the training images, which the schedules span", AT_LEAST_1)
    warmup_epochs: float = key("epochs of linear rise of the learning rate, before its half cosine to 0", NOT_NEGATIVE)
    max_steps: int | None = key(MAX_STEPS, AT_LEAST_1, default=None)
    micro_batch_size: int | None = key(MICRO_BATCH, AT_LEAST_1, since=2, before=None, default=None)
    on_spike: str | None = key(ON_SPIKE, WARN, since=2, before=None, default="warn")


Paths = str | tuple[str, ...]
Auto = Literal["auto"]  # what suits the machine (engine.runs.auto)
Classes = Literal["auto", "folders", "none"]
Source = Literal["folder", "shards", "torchvision", "list", "hf"]


@section
class Data:
    source: Source = key("image files, tar files, a dataset of torchvision, a text file of paths, or tables")
    root: Paths = key("where the images are; may hold `train` and `val`; several roots are one set", PATH)
    val_root: Paths | None = key("where the validation images are; null: `val` inside root", PATH, default=None)
    dataset: str | None = key("class in torchvision.datasets, under source torchvision", TEXT, default=None)
    dataset_options: dict = key(
        "what that class is called with; under source hf the columns {image, label}", ARGUMENTS, default_factory=dict
    )
    workers: int | Auto = key("loading processes beside each training process; 0: none; auto: by cores", WORKERS)
    max_bad_fraction: float = key("share of images that may be unreadable before the run ends", FRACTION, default=0.001)
    accept_changes: bool = key(ACCEPT_CHANGES, since=2, before=False, default=False)
    exif_orientation: bool = key(EXIF_ORIENTATION, since=2, before=False, default=False)
    range: tuple[float, float] | None = key(RANGE, since=2, before=None, default=None)
    max_pixels: int | None = key(MAX_PIXELS, AT_LEAST_1, since=2, before=None, default=None)


@section
class PretrainData(Data):
    classes: Classes = key(CLASSES, since=2, before="folders", default="auto")


@section
class Checkpoint:
    every_steps: int = key("steps between checkpoints", AT_LEAST_1, default=500)
    keep: int = key("newest checkpoints that stay; the best stays too", AT_LEAST_1, default=2)
    keep_every_epochs: float | None = key(KEEP_EVERY, POSITIVE, since=2, before=None, default=None)
    asynchronous: bool = key(ASYNCHRONOUS, since=2, before=False, default=True)
    max_failures: int = key(MAX_FAILURES, AT_LEAST_1, since=2, before=1, default=3)


@section
class Log:
    every_steps: int = key("steps between logged ones; the first and the last are logged too", AT_LEAST_1, default=10)


@section
class Evaluate:
    train_root: Paths | None = key(LABELLED, PATH, since=2, before=None, default=None)
    val_root: Paths | None = key(QUERIES, PATH, since=2, before=None, default=None)
    knn_every_epochs: int = key("epochs between kNN rows; 0: never", NOT_NEGATIVE, default=10)
    knn_bank: int | None = key(KNN_BANK, AT_LEAST_1, since=2, before=None, default=None)
    crop_fraction: float = key(CROP_FRACTION, CENTRE, default=0.875)
    online_probe: bool = key("train a linear classifier beside the network, which it leaves alone", default=False)


Interpolation = Literal["bilinear", "bicubic"]
Precision = Literal["bf16", "float32", "float64", "auto"]
Shard = Literal["full", "grad_op", "hybrid", "replicate"]
ActivationCheckpoint = Literal["none", "selective", "full"]
PRECISION = "arithmetic of the trunk; under bf16 heads, BatchNorm, loss stay in float32; auto: bf16 where a GPU has it"
SHARDED = "what is split over processes: all state; gradients and optimizer state; all within each replica; nothing"

DETERMINISTIC = "the same bits from every run of one command on the same machines; false: faster, and to rounding alone"
RECOMPUTED = "what the backward pass computes again of a trunk's blocks, to save memory: nothing; what is cheap; all"


@section
class Parallel:
    compile: bool | Auto = key("run the network through torch.compile; auto: on GPUs, with a C compiler")
    precision: Precision = key(PRECISION)
    shard: Shard = key(SHARDED, default="full")
    replicate: int = key("number of replicas under shard hybrid; 1 in the other modes", AT_LEAST_1, default=1)
    deterministic: bool = key(DETERMINISTIC, since=2, before=True, default=True)
    activation_checkpoint: ActivationCheckpoint = key(RECOMPUTED, since=2, before="none", default="none")


@section
class Pretrain:
    """The recipe of `task: pretrain`. `load` checks it; one that is put together by hand is not checked."""

    schema: int = schema_key()
    task: Literal["pretrain"] = key("MoCo v3 pre-training, without labels")
    run: PretrainRun
    model: Model
    moco: Moco
    optimizer: Optimizer
    train: Train
    data: PretrainData
    augment: Augment
    checkpoint: Checkpoint
    log: Log
    evaluate: Evaluate
    parallel: Parallel

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return self.optimizer.base_lr * self.train.global_batch_size / 256


@section
class LinearOptimizer:
    """SGD with momentum 0.9 and without weight decay."""

    base_lr: float = key("learning rate per 256 images", POSITIVE)


@section
class LinearTrain:
    """The last, partial batch of an epoch is used, and may have one image."""

    global_batch_size: int = key(BATCH, AT_LEAST_1)
    epochs: int = key("passes over the training images, which the schedule spans", AT_LEAST_1)
    max_steps: int | None = key(MAX_STEPS, AT_LEAST_1, default=None)


@section
class LabelledData(Data):
    labels: float = key("share of the training images that is used, as many of every class", CROP, default=1.0)


@section
class LinearAugment:
    crop_min: float = key("smallest share of the image's area that a crop keeps", CROP)
    flip_probability: float = key("probability of a flip from left to right", FRACTION, default=0.5)


@section
class LinearEvaluate:
    crop_fraction: float = key(CROP_FRACTION, CENTRE, default=0.875)


@section
class Linear:
    """The recipe of `task: linear`: a classifier on the features of a frozen CHECKPOINT."""

    schema: int = schema_key()
    task: Literal["linear"] = key("a linear classifier on frozen features")
    run: Run
    optimizer: LinearOptimizer
    train: LinearTrain
    data: LabelledData
    augment: LinearAugment
    checkpoint: Checkpoint
    log: Log
    evaluate: LinearEvaluate

    @property
    def peak_lr(self) -> float:
        """The highest learning rate."""
        return self.optimizer.base_lr * self.train.global_batch_size / 256


@section
class FinetuneModel:
    drop_path: float = key("share of samples that skip the last block, growing with depth from 0", BELOW_1, default=0.0)


@section
class FinetuneOptimizer:
    """AdamW."""

    base_lr: float = key("learning rate per 512 images; the peak is base_lr * global_batch_size / 512", POSITIVE)
    min_lr: float = key("learning rate where the cosine ends", NOT_NEGATIVE, default=1e-5)
    weight_decay: float = key("decay of all but biases, norms, positions and CLS", NOT_NEGATIVE)
    layer_decay: float = key("a layer's learning rate over that of the next deeper one", CROP, default=1.0)


@section
class FinetuneTrain(LinearTrain):
    warmup_epochs: float = key("epochs of linear rise of the learning rate, before its half cosine", NOT_NEGATIVE)
    label_smoothing: float = key("share of the target that is spread over all classes", BELOW_1, default=0.0)
    ema_decay: float | None = key("share that the weights' moving average keeps; null: none", BELOW_1, default=None)


@section
class FinetuneAugment(LinearAugment):
    interpolation: Interpolation = key("how crops are resized, in training and evaluation", default="bicubic")
    randaugment: str | None = key("policy of RandAugment; null: none", RANDAUGMENT, default=None)
    erase_probability: float = key("probability that a random rectangle is erased", FRACTION, default=0.0)
    mixup: float = key("alpha of the Beta distribution of MixUp; 0: none", NOT_NEGATIVE, default=0.0)
    cutmix: float = key("alpha of the Beta distribution of CutMix; 0: none", NOT_NEGATIVE, default=0.0)
    repeats: int = key("how often an image comes in its batch; the epoch stays as long", REPEATS, default=1)


@section
class FinetuneEvaluate(LinearEvaluate):
    every_epochs: int = key("epochs between evaluations", AT_LEAST_1, default=1)


@section
class Finetune:
    """The recipe of `task: finetune`: the whole network of a CHECKPOINT and a classifier, trained on labels."""

    schema: int = schema_key()
    task: Literal["finetune"] = key("a whole network and a classifier, on labels")
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
