"""A torchvision dataset as a source: which of its splits, several joined, and labels that fit its classes.

Shapes: N images.
"""

import difflib
import hashlib
import inspect
import sys

import numpy as np
import torchvision.datasets
from PIL import Image

from engine.data.decode import Reading, to_rgb
from engine.data.joined import JoinedSource
from engine.data.pillow import silence
from engine.data.source import Root, Source, Split
from engine.errors import UserError, one_line

# What torchvision's datasets call a split, in order of preference.
_CALLED = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}
_EVERYTHING = {"train", "val", "valid", "test"}
_HOLDS = {"trainval": {"train", "val"}, "all": _EVERYTHING, "10fold": _EVERYTHING}  # the images of other splits
_LABELS = ("targets", "labels", "_labels", "_samples")
_FAKE_VAL_OFFSET = 10**9
_OF_ANY_SIZE = Reading(max_pixels=sys.maxsize)  # whoever uses an image knows how large it may be
_MOST_CLASSES = 10**6  # where classes have no names: a label beyond is no label but damage


def open_torchvision(root: Root, split: Split) -> Source | None:
    """The training or validation images of the root's dataset, as it lies on disk; None without a validation split.

    A `split` (or `train`) in its options is the training split; several are joined by "+". The validation split is the
    first usual one that is not trained on. Raises UserError.
    """
    if split == "all":
        raise UserError(f"{root} must have a validation split; torchvision's {root.dataset} has none")
    name, cls, refusal = root.dataset, _class_named(root.dataset), None
    options = {key: value for key, value in root.dataset_options.items() if not (root.read_only and key == "download")}
    for each in _tries(cls, split, options):
        joined = len(each) > 1
        try:
            parts = [_open_part(cls, root, args, f"{name} {args['split']}" if joined else name) for args in each]
        except _NoSuchSplit as error:  # the next name may do
            refusal = error
        else:
            return JoinedSource(parts) if joined else parts[0]
    if split == "val":
        return None
    raise UserError(f"data.dataset ({name}) must have a training split; {one_line(refusal)}")


class TorchvisionSource(Source):
    """One dataset of torchvision. `identity` says which for the fingerprint, `title` for the reader."""

    def __init__(
        self,
        dataset: torchvision.datasets.VisionDataset,
        labels_N: np.ndarray | None,
        classes: tuple[str, ...] | None,
        identity: str,
        title: str,
    ):
        self._dataset, self._title = dataset, title
        self.labels, self.classes = labels_N, classes
        labels = b"" if labels_N is None else labels_N.astype("<i8").tobytes()
        self.fingerprint = hashlib.sha256(f"{identity} {len(dataset)} ".encode() + labels).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, i: int) -> Image.Image:
        silence()  # torchvision opens files itself; `engine.data.decode` knows data.max_pixels
        return to_rgb(self._dataset[i][0], _OF_ANY_SIZE)

    def name(self, i: int) -> str:
        return f"{self._title} {i}"


# ---- which splits ----------------------------------------------------------------------------------------------------


def _class_named(name: str | None) -> type:
    known = {
        each: cls
        for each, cls in vars(torchvision.datasets).items()
        if isinstance(cls, type) and issubclass(cls, torchvision.datasets.VisionDataset)
    }
    if name in known:
        return known[name]
    lower = {each.lower(): each for each in known}
    nearest = lower[difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0)[0]]
    raise UserError(f"data.dataset ({name}) must be a class of torchvision.datasets; did you mean {nearest}?")


def _accepted(cls: type) -> set[str]:
    return {option for base in cls.__mro__ for option in inspect.signature(base.__init__).parameters}


def _tries(cls: type, split: str, options: dict) -> list[list[dict]]:
    """What to try in turn: each is the arguments of a dataset, or of several to be joined."""
    accepted, training = _accepted(cls), split == "train"
    if cls is torchvision.datasets.FakeData:  # has no splits: val takes its random images from far away
        offset = options.get("random_offset", 0)
        if not training and isinstance(offset, int):
            offset += _FAKE_VAL_OFFSET
        return [[{**options, "random_offset": offset}]]
    if "train" in accepted:
        wanted = [{"train": True, **options}] if training else [{**options, "train": False}]
        return [wanted] if training or options.get("train", True) else []
    if "split" not in accepted:
        return [[options]] if training else []
    if training and "split" in options:
        return [[options], *_joined(options)]
    return [[{**options, "split": name}] for name in _CALLED[split] if name not in _held(options.get("split", ""))]


def _joined(options: dict) -> list[list[dict]]:
    """One try, the parts of a split joined by "+"; no try where it is not."""
    parts = [part.strip() for part in str(options["split"]).split("+")]
    if len(parts) < 2:
        return []
    if len(_held(options["split"])) < sum(len(_held(part)) for part in parts):
        raise UserError(f"data.dataset_options ({options}) must join splits that share no images; name each once")
    return [[{**options, "split": part} for part in parts]]


def _held(split: object) -> set[str]:
    """The splits whose images are in this one, which may be several joined by "+"."""
    parts = [part.strip().lower() for part in str(split).split("+")]  # some datasets take capitals too
    return set().union(*(_HOLDS.get(part, {part}) for part in parts))


# ---- one dataset -----------------------------------------------------------------------------------------------------


class _NoSuchSplit(Exception):
    """The dataset knows no split of that name."""


def _open_part(cls: type, root: Root, arguments: dict, title: str) -> TorchvisionSource:
    name = cls.__name__
    fixed = {"root": str(root.path)} if "root" in inspect.signature(cls).parameters else {}
    if "download" in _accepted(cls):
        fixed["download"] = False
    try:
        dataset = cls(**fixed, **arguments)
        found = _found_labels(dataset)
    except Exception as error:
        if isinstance(error, ValueError) and "split" in arguments and "split" in str(error):
            raise _NoSuchSplit(error) from error
        if isinstance(error, TypeError) or "root" not in fixed:  # nothing on disk can be wrong
            raise UserError(f"data.dataset_options ({arguments}) must suit {name}; {one_line(error)}") from error
        raise UserError(f"{root} must hold torchvision's {name}; torchvision: {one_line(error)}") from error
    if not len(dataset):
        raise UserError(f"{root} must hold images of torchvision's {name}; there are none")
    labels_N = None if found is None else np.array(found, np.int64)
    classes = None if found is None else _classes(dataset, labels_N, root, title)
    return TorchvisionSource(dataset, labels_N, classes, f"{name} {sorted(arguments.items())}", title)


def _found_labels(dataset: torchvision.datasets.VisionDataset) -> list[int] | None:
    """The label of every image; None where they have none, or something else."""
    if isinstance(dataset, torchvision.datasets.FakeData):  # it makes them up as it is read
        return [dataset[i][1] for i in range(len(dataset))]
    found = next((getattr(dataset, each) for each in _LABELS if hasattr(dataset, each)), ())
    found = found.tolist() if hasattr(found, "tolist") else [x[1] if isinstance(x, tuple) else x for x in found]
    if len(found) != len(dataset) or not all(isinstance(label, int) for label in found):
        return None
    return None if isinstance(dataset, torchvision.datasets.STL10) and -1 in found else found  # -1: without a label


def _classes(dataset: torchvision.datasets.VisionDataset, labels_N: np.ndarray, root: Root, title: str) -> tuple:
    """The names of the classes, or their numbers where the dataset has no names."""
    names = tuple(map(str, getattr(dataset, "classes", ())))
    count = len(names) or _MOST_CLASSES
    wrong = np.flatnonzero((labels_N < 0) | (labels_N >= count))
    if len(wrong):
        i = int(wrong[0])
        raise UserError(f"{root} must have labels 0 to {count - 1}; {title} {i} has {labels_N[i]}; download it again")
    return names or tuple(map(str, range(int(labels_N.max()) + 1)))
