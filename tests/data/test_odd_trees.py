"""Random trees of what disks hold: odd names, links, pipes, empty files. Nothing is lost unsaid, nothing hangs, and
every way to the same images finds the same ones."""

import os
import stat
import tarfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import listing
from engine.data.decode import is_image_name, to_rgb
from engine.data.naming import is_system_folder
from engine.data.opening import open_source
from engine.data.packing import Form, Packing
from engine.data.source import Root, Source
from engine.errors import UserError
from tests.data.images import png

ODD = [b"a", b"B", b" ", b"#x", b"50%", b"line\nbreak", b"\xff\xfe", "é\U0001f600".encode(), b"-rf", b"n" * 120, b"a.b"]
ODD += [b"'\"`$(x)", b"\\", b"\x1b[1m", b"tab\tx", b"\xe2\x80\xae", b".hidden", b"@eaDir", b"~"]
SUFFIXES = [b"", b".jpg", b".PNG", b".png", b".Jpeg", b".txt", b".tar", b".png ", b".gif\n"]
KINDS = ["image"] * 6 + ["folder"] * 4 + ["empty", "broken", "link", "link", "lost link", "pipe", "socket"]

names = st.builds(lambda stem, suffix: stem + suffix, st.sampled_from(ODD), st.sampled_from(SUFFIXES))
entries = st.lists(st.tuples(st.integers(0, 9), names, st.sampled_from(KINDS), st.integers(0, 9)), max_size=20)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def grow(root: Path, tree: list) -> Path:
    """Each entry lies in one of the folders so far; a link leads to one of all places so far."""
    root.mkdir()
    folders, places = [root], [root]
    for number, (at, name, kind, to) in enumerate(tree):
        place = folders[at % len(folders)] / os.fsdecode(name)
        if os.path.lexists(place):
            continue
        if kind == "folder":
            place.mkdir()
            folders.append(place)
        elif kind == "link":
            place.symlink_to(os.path.relpath(places[to % len(places)], place.parent))
        elif kind == "lost link":
            place.symlink_to("nowhere")
        elif kind in ("pipe", "socket"):
            os.mknod(place, {"pipe": stat.S_IFIFO, "socket": stat.S_IFSOCK}[kind] | 0o600)
        else:
            place.write_bytes({"image": png(number), "empty": b"", "broken": png(number)[:50]}[kind])
        places.append(place)
    return root


def count(folder: Path, above: tuple[Path, ...] = ()) -> int:
    """What lies there, but for folders, and links to those that they lie in."""
    if folder.resolve() in above:
        return 0
    found = 0
    for place in folder.iterdir():
        is_left_out = place.name.startswith(".") or is_system_folder(place.name)
        is_folder = place.is_dir() and not is_left_out
        found += count(place, (*above, folder.resolve())) if is_folder else 1
    return found


def opened(kind: str, root: Path) -> Source | None:
    """None where there is no image, which one line says."""
    try:
        source = open_source(Root(kind, root), "train")
    except UserError as error:
        return check_line(str(error))
    for text in (*source.notes, *(source.classes or ()), *(source.name(i) for i in range(len(source)))):
        check_line(text)
    return source


def check_line(text: str) -> None:
    assert text.isprintable(), ascii(text)


def held(source: Source) -> list[bytes | None]:
    """The bytes of each image; None of one that cannot be read."""

    def of(i: int) -> bytes | None:
        try:
            return source.file(i)
        except OSError:
            return None

    return [of(i) for i in range(len(source))]


def decoded(source: Source) -> int:
    """How many images have pixels; whatever is wrong with the others is an exception, as the loader expects it."""
    good = 0
    for i in range(len(source)):
        with suppress(Exception):
            good += to_rgb(source.read(i)).size == (4, 3)
    return good


def class_of_each(source: Source) -> list[str] | None:
    return None if source.labels is None else [source.classes[label] for label in source.labels]


@settings(max_examples=50)
@given(tree=entries, called=st.sampled_from(ODD), worth=st.sampled_from([1, 10**9]))
def test_a_folder_its_pack_its_list_and_its_tar(tmp_path_factory, tree, called, worth):
    work = tmp_path_factory.mktemp("odd") / os.fsdecode(called)
    work.mkdir()
    root = grow(work / os.fsdecode(called), tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "_WORTH_A_FILE", worth)
        patch.setattr("engine.data.unchanged.TICK_NS", 0)
        source = opened("folder", root)
        again = opened("folder", root)
    if source is None:
        assert again is None
        assert not any(is_image_name(os.fsencode(path)) and path.is_file() for path in visible(root))
        return
    assert held(again) == held(source)
    assert len(source) + sum(source.survey.left_out.values()) == count(root)
    good = decoded(source)
    check_pack(work, source, good)
    check_list(root, source)
    check_tar(work, root)


def visible(root: Path) -> list[Path]:
    inner = list(root.rglob("*"))
    own = [path.relative_to(root).parts for path in inner]
    hidden = [any(part[0] == "." or is_system_folder(part) for part in parts) for parts in own]
    return [path for path, is_hidden in zip(inner, hidden, strict=True) if not is_hidden]


def check_pack(work: Path, source: Source, good: int) -> None:
    said = []
    packing = Packing({"images": source}, work / "out", Form(4000, None), 2, lambda items, *_: items, said.append)
    there = [data for data in held(source) if data is not None]
    if not there:
        return
    packing.pack()
    found = opened("shards", work / "out")
    assert held(found) == there
    assert decoded(found) == good
    assert len(said) == len(source) - len(there)
    if source.labels is None and len(there) < len(source):  # of what is left all may lie in folders
        return
    kept = [name for name, data in zip(class_of_each(source) or [], held(source), strict=False) if data is not None]
    assert (class_of_each(found) or []) == kept


def check_list(root: Path, source: Source) -> None:
    """As far as a path may stand on a line."""
    paths = [source.path(i) for i in range(len(source))]
    fit = [i for i, path in enumerate(paths) if path == path.strip() and not set(path) & set(b"\n\t\r\x0b\x0c\x1c\x1d")]
    (root / "all.lst").write_bytes(b"".join(b"./" + paths[i] + b"\n" for i in fit))
    found = opened("list", root / "all.lst")
    data = held(source)
    if found is None:
        assert not any(data[i] is not None for i in fit)
    else:
        assert held(found) == [data[i] for i in fit]
    (root / "all.lst").unlink()


def check_tar(work: Path, root: Path) -> None:
    """As tar packs the folder, links as links: what leads out of it, or to nothing, is told."""
    with tarfile.open(work / "x.tar", "w") as tar:
        tar.add(root, ".")
    with tarfile.open(work / "x.tar") as tar:
        members = [member for member in tar.getmembers() if not member.isdir()]
    found = opened("shards", work / "x.tar")
    if found is not None:
        assert len(found) + sum(found.survey.left_out.values()) == len(members)
        names = Counter(found.path(i) for i in range(len(found)))
        assert set(names.values()) == {1}
