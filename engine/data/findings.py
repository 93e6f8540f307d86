"""What engine.data.checking found in a set's images: in words, in numbers for programs, as rows of a table."""

import csv
import statistics
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.bad_images import least_fraction
from engine.data.checking import Same, Tally
from engine.data.hints import about_dark
from engine.errors import listed
from engine.files import draft, publish

_NAMED = 5  # images in a line
_KINDS = 8  # suffixes, folders or kinds in one
_CROPS = (224, 96)  # pixels, of the crops of own_photos and own_photos_small


# ---- words


def in_words(found: Mapping[str, Tally], same: Sequence[Same]) -> list[str]:
    """Lines of a table: of each split, and of images that are the same."""
    return [*(line for split, each in found.items() for line in _of_split(split, each)), *_same(found, same)]


def _of_split(split: str, found: Tally) -> Iterator[str]:
    size = f", {found.bytes / 1e6:,.1f} MB" if found.suffixes else ""
    yield f"{split}: {found.images:,} images{size}; {_labels(found)}"
    folders = Counter({name or "(no folder)": number for name, number in found.folders.items()})
    rows = {"suffixes": _most(found.suffixes), "folders": _most(folders), "kinds": _most(found.kinds)}
    rows |= {"sides": _sides(found), "lying": _lying(found), "dark": _dark(found), "unreadable": _unreadable(found)}
    yield from (f"  {what:11}{words}" for what, words in rows.items() if words)


def _most(counted: Counter[str]) -> str:
    return listed([f"{name} {number:,}" for name, number in counted.most_common()], most=_KINDS)


def _labels(found: Tally) -> str:
    source, numbers = found.source, _per_class(found)
    if not numbers:
        return "unlabelled"
    least, most = min(numbers), max(numbers)
    return f"{len(numbers)} classes of {least:,} to {most:,} images ({listed(source.classes or (), most=_NAMED)})"


def _per_class(found: Tally) -> list[int]:
    source = found.source
    return [] if source.labels is None else np.bincount(source.labels, minlength=len(source.classes)).tolist()


def _sides(found: Tally) -> str:
    if not found.shorter:
        return ""
    shorter, longer = ("{:,} / {:,} / {:,}".format(*_spread(sides)) for sides in (found.shorter, found.longer))
    small = ", ".join(f"{number:,} below {crop}" for crop, number in _small(found).items())
    return f"shorter {shorter} pixels, longer {longer} (least / median / most); shorter side {small}"


def _spread(sides: array) -> tuple[int, int, int]:
    return min(sides), int(statistics.median(sides)), max(sides)


def _small(found: Tally) -> dict[int, int]:
    return {crop: sum(side < crop for side in found.shorter) for crop in _CROPS}


def _lying(found: Tally) -> str:
    if not found.lying:
        return ""
    names = listed([found.source.name(i) for i in found.lying], most=_NAMED)
    return f"{len(found.lying):,} say how to turn them, and data.exif_orientation=true does ({names})"


def _dark(found: Tally) -> str:
    return about_dark(found.brightest) or ""


def _unreadable(found: Tally) -> str:
    if not found.unreadable:
        return "none"
    share = least_fraction(len(found.unreadable), found.images)
    shown = [f"\n    {found.source.name(i)} ({why})" for i, why in islice(found.unreadable.items(), _NAMED)]
    more = len(found.unreadable) - len(shown)
    shown += [f"\n    and {more:,} more"] if more else []
    large = f", {len(found.too_large):,} of them too large" if found.too_large else ""
    do = f"a run bears so many with data.max_bad_fraction={share:g} or more"
    return f"{len(found.unreadable):,}{large}; {do}{''.join(shown)}"


def _same(found: Mapping[str, Tally], same: Sequence[Same]) -> list[str]:
    """Groups of the same images: how many, and the first."""
    if not same:
        return ["same: no two images are the same, byte for byte"]
    totals = _totals(found, same)
    line = f"same: {totals['copies']:,} more than once, byte for byte; groups of the same: {len(same):,}"
    across, odd = totals["groups_across_splits"], totals["groups_with_other_labels"]
    line += f", in both train and val: {across:,}" if across else ""
    line += f", of different classes: {odd:,}" if odd else ""
    groups = (" = ".join(_shown(found, each)) for each in same[:_NAMED])
    more = [f"  and {len(same) - _NAMED:,} more groups"] if len(same) > _NAMED else []
    return [line, *(f"  {group}" for group in groups), *more]


def _shown(found: Mapping[str, Tally], same: Same) -> list[str]:
    lead = len(found) > 1
    names = [(f"{split}: " if lead else "") + found[split].source.name(i) for split, i in same.images[:_NAMED]]
    return [*names, f"{len(same.images) - _NAMED:,} more"] if len(same.images) > _NAMED else names


# ---- for programs


def in_numbers(found: Mapping[str, Tally], same: Sequence[Same], notes: list[str]) -> dict[str, Any]:
    """What JSON can hold of it; notes: what a run would say of the images."""
    return _totals(found, same) | {"notes": notes, "splits": {split: _numbers(each) for split, each in found.items()}}


def _numbers(found: Tally) -> dict[str, Any]:
    """Of a split."""
    per_class, source = _per_class(found), found.source
    numbers: dict[str, Any] = {"images": found.images, "bytes": found.bytes, "unreadable": len(found.unreadable)}
    numbers |= {"too_large": len(found.too_large), "lying": len(found.lying)}
    numbers |= {"suffixes": dict(found.suffixes), "folders": len(found.folders), "kinds": dict(found.kinds)}
    numbers["classes"] = len(source.classes) if source.classes else None
    numbers["images_per_class"] = [min(per_class), max(per_class)] if per_class else None
    if found.shorter:
        numbers |= {"shorter_side": [*_spread(found.shorter)], "longer_side": [*_spread(found.longer)]}
        numbers["below"] = {str(crop): number for crop, number in _small(found).items()}
    return numbers


def _totals(found: Mapping[str, Tally], same: Sequence[Same]) -> dict[str, Any]:
    return {
        "images": sum(each.images for each in found.values()),
        "unreadable": sum(len(each.unreadable) for each in found.values()),
        "copies": sum(len(each.images) - 1 for each in same),
        "groups_across_splits": sum(len({split for split, _ in each.images}) > 1 for each in same),
        "groups_with_other_labels": sum(each.labels_differ for each in same),
    }


def write_findings(path: Path, found: Mapping[str, Tally], same: Sequence[Same]) -> None:
    """A .csv file with a row for each. Raises OSError."""
    with draft(path) as place:
        with place.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["finding", "split", "name", "detail"])
            for split, each in found.items():
                name = each.source.name
                rows.writerows(["unreadable", split, name(i), why] for i, why in each.unreadable.items())
                rows.writerows(["lying", split, name(i), ""] for i in each.lying)
            for group in same:
                (split, i), *others = group.images
                first = f"{split}: {found[split].source.name(i)}"
                rows.writerows(["copy", of, found[of].source.name(i), first] for of, i in others)
        publish(place, path)
