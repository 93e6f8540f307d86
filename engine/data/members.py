"""What lies in a tar: every image, also behind a link or in a tar that follows another in one file, and its label.

An image whose name has another part before its suffix, as `7.mask.png`, belongs to the sample `7` where `7.png` or the
like lies beside it: WebDataset's form. A label is what `7.cls`, `7.cls.txt` or `7.json` says.
"""

import os
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.data.decode import is_image_name, is_new_suffix
from engine.data.labels import LABEL_SUFFIXES, MOST_BYTES, read_label
from engine.data.naming import is_system_folder
from engine.data.survey import NO_FILES, Survey, printable
from engine.errors import UserError, listed, one_line

_BLOCK = 512
_CHUNK = 1 << 20
_MOST_LINKS = 40  # that lead on to one another
_SUFFIXES_OF_SAMPLES = "give each sample one image with a plain suffix, such as 7.jpg"


class _At(NamedTuple):
    """Where a file is called: in which of the tars that one file holds, and its path there."""

    part: int
    name: bytes

    @property
    def key(self) -> "_At":
        """Its sample's: the path up to the name's first dot."""
        return _At(self.part, self.name[: -len(self.suffix) - 1])

    @property
    def suffix(self) -> bytes:
        """All that follows the name's first dot."""
        return self.name.rpartition(b"/")[2].partition(b".")[2]


class Image(NamedTuple):
    """label: empty where nothing says one."""

    at: _At
    offset: int
    size: int
    label: bytes = b""


class _Link(NamedTuple):
    """place: among images; None where it is called something else."""

    at: _At
    target: _At
    place: int | None


@dataclass(frozen=True)
class _Found:
    images: list[Image] = field(default_factory=list)
    links: list[_Link] = field(default_factory=list)
    labels: dict[_At, list[Image]] = field(default_factory=lambda: defaultdict(list))  # files, by key of the sample


def find_images(tar: Path, file: BinaryIO, survey: Survey) -> list[Image]:
    """Every image of an open tar, in the order they lie in; what else there is goes to the survey.

    Raises UserError unless the tar ends as a tar must, so that none is lost unseen; where an image's link leads out of
    it; and where a sample with a label has several images, none of which is the one, or several labels.
    """
    found = _Found()
    for part, member in _members(tar, file):
        name, is_hidden = _clean(os.fsencode(member.name))
        if name and not member.isdir():
            _sort(tar, _At(part, name), member, is_hidden, found, survey)
    images = _follow(tar, file, found, survey)
    return _label(tar, file, _of_samples(tar, images, found, survey), found, survey)


def _sort(tar: Path, at: _At, member: tarfile.TarInfo, is_hidden: bool, found: _Found, survey: Survey) -> None:
    system = [part for part in os.fsdecode(at.name).split("/")[:-1] if is_system_folder(part)]
    if is_hidden:
        survey.leave_out("hidden")
    elif system:
        survey.leave_out(f"in {system[0]}")
        survey.takes_otherwise(at.name, "a system's own folder holds no images of the set")
    elif member.isdev():
        survey.leave_out(NO_FILES)
    elif member.issym() or member.islnk():
        _sort_link(tar, at, member, found)
    elif member.isreg() and is_image_name(at.name):
        if member.issparse():
            raise _broken(tar, f"{printable(at.name)} is stored sparse")
        found.images.append(Image(at, member.offset_data, member.size))
    elif member.isreg() and _is_label(at):
        found.labels[at.key].append(Image(at, member.offset_data, member.size))
    else:
        survey.leave_out_file(at.name)
    if at.part and found.images and found.images[-1].at == at:
        survey.takes_otherwise(at.name, "it lies in a tar that follows another in one file")
    if is_new_suffix(at.name):
        survey.takes_otherwise(at.name, "its suffix counts as an image's")


def _is_label(at: _At) -> bool:
    return at.suffix.lower() in LABEL_SUFFIXES


# ---- tars ------------------------------------------------------------------------------------------------------------


def _members(tar: Path, file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Every member, with the number of the tar that it is in: `cat` joins several to one file."""
    part, start = 0, 0
    while start is not None:
        end = yield from _members_of_one(tar, file, part, start)
        part, start = part + 1, _next(file, end)


def _members_of_one(
    tar: Path, file: BinaryIO, part: int, start: int
) -> Generator[tuple[int, tarfile.TarInfo], None, int]:
    """The members of the tar that begins at byte `start`; returns where it ends."""
    opened, end = None, start
    file.seek(start)
    try:
        opened = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
        while (member := opened.next()) is not None:
            opened.members.clear()  # tarfile would keep an object per member
            if opened.offset <= end:
                raise ValueError("a member ends before it begins")
            end = opened.offset
            yield part, member
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise _broken(tar, f"at byte {opened.offset if opened else start}: {one_line(error)}") from error
    # tarfile takes a damaged header for the end of the archive. The true end is a block of zeros.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise _broken(tar, f"breaks off at byte {end}")
    return end


def _next(file: BinaryIO, end: int) -> int | None:
    """The first block after `end` that is not all zeros, where another tar may begin; None at the end of the file."""
    file.seek(end)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            start = end + len(chunk) - len(rest)
            return start - start % _BLOCK
        end += len(chunk)
    return None


def _broken(tar: Path, where: str) -> UserError:
    return UserError(f"tar ({tar}) must be a whole, plain tar; {where}; fetch or pack it again")


def _clean(name: bytes) -> tuple[bytes, bool]:
    """The path without `.` and `..`, which is a name here and never a place on disk; and whether it is hidden."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    return b"/".join(parts), any(part.startswith(b".") for part in parts)


# ---- links -----------------------------------------------------------------------------------------------------------


def _sort_link(tar: Path, at: _At, member: tarfile.TarInfo, found: _Found) -> None:
    """A hard link names a member, a symbolic one a path from its own folder."""
    target = os.fsencode(member.linkname)
    path = posixpath.join(posixpath.dirname(at.name), target) if member.issym() else target.lstrip(b"/")
    path = posixpath.normpath(path)
    is_image = is_image_name(at.name)
    if is_image and (path.startswith((b"/", b"../")) or path == b".."):
        raise UserError(
            f"tar ({tar}) must hold what its links name; {printable(at.name)} leads out of it, to {printable(target)}; "
            "pack it again with the files that links lead to (tar --dereference)"
        )
    found.links.append(_Link(at, _At(at.part, path), len(found.images) if is_image else None))
    if is_image:
        found.images.append(Image(at, -1, -1))


def _follow(tar: Path, file: BinaryIO, found: _Found, survey: Survey) -> list[Image]:
    """The images, links among them with the place of what they lead to; those that lead to nothing left out. Labels
    that are links go to the others."""
    if not found.links:
        return found.images
    files = _files(tar, file)
    folders = {_At(at.part, at.name.rpartition(b"/")[0]) for at in files}
    onward = {link.at: link.target for link in found.links}
    images: list[Image | None] = list(found.images)
    for at, target, place in found.links:
        for _ in range(_MOST_LINKS):
            target = onward.get(target, target) if target not in files else target
        leads_to = Image(at, *files[target]) if target in files else None
        if place is not None:
            images[place] = leads_to
            if leads_to:
                survey.takes_otherwise(at.name, "a link is the image that it leads to")
            else:
                survey.leave_out("links to nothing")
        elif target in folders:
            survey.leave_out("links to folders")
        elif leads_to and _is_label(at):
            found.labels[at.key].append(leads_to)
        else:
            survey.leave_out_file(at.name)
    return [image for image in images if image is not None]


def _files(tar: Path, file: BinaryIO) -> dict[_At, tuple[int, int]]:
    """Where each file lies, and its size; found once more, as a link may lead to any, before it or after."""
    return {
        _At(part, _clean(os.fsencode(member.name))[0]): (member.offset_data, member.size)
        for part, member in _members(tar, file)
        if member.isreg() and not member.issparse()
    }


# ---- samples ---------------------------------------------------------------------------------------------------------


def _of_samples(tar: Path, images: list[Image], found: _Found, survey: Survey) -> list[Image]:
    """One image for each sample: that with the plain suffix."""
    plain = {image.at.key for image in images if b"." not in image.at.suffix}
    kept, names = [], defaultdict(set)
    for image in images:
        at = image.at
        if b"." in at.suffix and at.key in plain:
            survey.leave_out(f".{printable(at.suffix)}")
            survey.takes_otherwise(at.name, "a sample's image is that with the plain suffix")
            continue
        kept.append(image)
        if at.key in found.labels:
            names[at.key].add(at.name)
    for several in names.values():
        if len(several) > 1:
            shown = listed([printable(name) for name in sorted(several)], most=3)
            raise UserError(f"tar ({tar}) must have one image in a sample, and one has {shown}; {_SUFFIXES_OF_SAMPLES}")
    return kept


def _label(tar: Path, file: BinaryIO, images: list[Image], found: _Found, survey: Survey) -> list[Image]:
    """The images with the labels of their samples; files that say none, or are no image's, are left out."""
    said: dict[_At, bytes] = {}
    keys = {image.at.key for image in images}
    for key, files in found.labels.items():
        labels = defaultdict(set)
        for each in files:
            suffix, size = each.at.suffix.lower(), min(each.size, MOST_BYTES)
            if label := read_label(suffix, os.pread(file.fileno(), size, each.offset)) if key in keys else b"":
                labels[suffix].add(label)
            else:
                survey.leave_out_file(each.at.name)
        if first := next((labels[suffix] for suffix in LABEL_SUFFIXES if suffix in labels), None):
            said[key] = _only(tar, key, first)
    for image in images if said else []:
        if image.at.key in said:
            survey.takes_otherwise(image.at.name, "its label is read")
    return [image._replace(label=said.get(image.at.key, b"")) for image in images] if said else images


def _only(tar: Path, key: _At, labels: set[bytes]) -> bytes:
    if len(labels) > 1:
        shown = " and ".join(map(printable, sorted(labels)))
        raise UserError(f"tar ({tar}) must have one label in a sample; {printable(key.name)} has {shown}; keep one")
    (label,) = labels
    return label
