"""What names say: which split a tar is of, whether tars are numbered, what is a system's own."""

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

# Folders that a NAS, an archiver or a file system keeps beside the user's; those that begin with a dot are hidden.
_SYSTEM_FOLDERS = {
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "lost+found"),
    *("$recycle.bin", "system volume information", "network trash folder", "temporary items", "ipynb_checkpoints"),
}
_TAR = re.compile(r"[^.].*?(\.(?:tar(?:\.(?:gz|bz2|xz|zst))?|tgz|tbz2?|txz))", re.IGNORECASE | re.DOTALL)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # of a name: cc3m-train-0001, ImageNetTrain
_CALLED = {
    "train": ("train", "training", "trainval", "trainset"),
    "val": ("val", "valid", "validation", "valset"),
    "test": ("test", "testing", "testset"),
}

Named = Literal["train", "val", "test"]


def called(split: Named) -> tuple[str, ...]:
    """What a split is called, the usual name first."""
    return _CALLED[split]


def is_system_folder(name: str) -> bool:
    return name.lower() in _SYSTEM_FOLDERS


def is_tar_name(name: str) -> bool:
    """Whether it is a visible tar's, compressed or not."""
    return _TAR.fullmatch(name) is not None


def is_part_of_tar(name: str) -> bool:
    """Whether it is a visible file that may become a tar, as `x.tar.part` of a download; an index is none."""
    return re.fullmatch(r"[^.].*\.tar\.(?!index$).+", name, re.IGNORECASE | re.DOTALL) is not None


def split_of_tar(name: str) -> Named | None:
    """The split that a word of a tar's name says; of `train-val-0.tar`, where both are trained on, train."""
    words = {word.lower() for word in _WORD.findall(_stem(name))}
    return next((split for split, names in _CALLED.items() if words.intersection(names)), None)


def class_of_tar(name: str, *, is_split: bool) -> str:
    """A tar's name without its suffix and, where that is no class's, the split: `train-cat.tar` holds cats."""
    stem, split = _stem(name), split_of_tar(name)
    if not is_split or split is None:
        return stem
    word = "|".join(sorted(_CALLED[split], key=len, reverse=True))
    rest = re.sub(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", "", stem, count=1, flags=re.IGNORECASE)
    return rest.strip("-_. ") or stem


def are_numbered(names: Iterable[str]) -> bool:
    """Whether two of the tars follow each other: part-0 and part-1 do, the classes n01440764 and n01443537 do not."""
    series = defaultdict(list)
    for name in names:
        stem = _stem(name)
        series[re.sub(r"\d+", "0", stem)].append(tuple(int(number) for number in re.findall(r"\d+", stem)))
    return any(
        sum(later - former for former, later in zip(one, other, strict=True)) == 1
        for numbers in series.values()
        for one, other in pairwise(sorted(numbers))
    )


def _stem(name: str) -> str:
    tar = _TAR.fullmatch(name)
    return name[: tar.start(1)] if tar else name
