import os
import pickle
import resource
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.index import TarReader, open_index
from engine.data.names import Names
from engine.errors import UserError
from tests.data.images import pack
from tests.distributed.commands import ON_LINUX

MEMBERS = {"a/1.png": b"one", "b/2.jpg": b"", "3.webp": bytes(range(256)) * 5}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(path: Path) -> dict[str, bytes]:
    names, offsets, sizes, *_ = open_index(path)
    reader = TarReader()
    rows = zip(names, offsets.tolist(), sizes.tolist(), strict=True)
    return {name.decode(): reader.read(str(path), offset, size) for name, offset, size in rows}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/moco-v3-engine"


@given(st.lists(st.binary(max_size=40)))
def test_names_are_kept_as_they_are(names):
    packed = Names.of(names)
    assert list(packed) == names == [packed[i] for i in range(len(packed))]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_image_is_found_in_the_order_it_lies(tmp_path, kind):
    tar = write(tmp_path / "x.tar", pack(MEMBERS, format=kind))
    assert list(contents(tar).items()) == list(MEMBERS.items())


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path, kind):
    members = {"ü" * 150 + f"/{'d' * 90}/" + "x" * 120 + ".png": b"long", "a/2.png": b"short"}
    assert contents(write(tmp_path / "x.tar", pack(members, format=kind))) == members


def test_only_visible_regular_image_files_count(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in [("d.png", tarfile.DIRTYPE), ("s.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "nothing"
            tar.addfile(info)
        for name in ("./a/1.png", "a/._1.png", ".git/2.png", "a/notes.txt", "/abs/3.png", "../up/4.png"):
            tar.addfile(tarfile.TarInfo(name))
    assert list(contents(tmp_path / "x.tar")) == ["a/1.png", "abs/3.png", "up/4.png"]


def test_the_index_is_kept_beside_the_tar_and_used_again(tmp_path):
    tar = write(tmp_path / "x.tar", pack(MEMBERS))
    contents(tar)
    saved = tmp_path / "x.tar.index"
    before = saved.stat()
    assert contents(tar) == MEMBERS
    assert (saved.stat().st_ino, saved.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert names_in(tmp_path) == ["x.tar", "x.tar.index"]
    with np.load(saved, allow_pickle=False) as arrays:
        assert {arrays[key].dtype.kind for key in arrays} <= set("iu")


def test_a_saved_index_is_what_is_read(tmp_path, monkeypatch):
    tar = write(tmp_path / "x.tar", pack(MEMBERS))
    contents(tar)
    monkeypatch.setattr("engine.data.index._scan", None)
    assert contents(tar) == MEMBERS


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_another_tar_of_equal_size_and_time_is_indexed_anew(tmp_path, kind, count):
    """Its members have other names, or the same names and other sizes."""
    one = {f"a/{number}{'0' * 90}.png": b"one" for number in range(10, 10 + count)}
    for other in ({name.replace("a/", "b/"): b"one" for name in one}, dict.fromkeys(one, b"other")):
        tar = write(tmp_path / "x.tar", pack(one, format=kind))
        status = tar.stat()
        assert contents(tar) == one
        write(tar, pack(other, format=kind))
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert tar.stat().st_size == status.st_size
        assert contents(tar) == other


def test_a_changed_tar_is_indexed_anew(tmp_path):
    tar = write(tmp_path / "x.tar", pack({"a/1.png": b"one"}))
    contents(tar)
    status = tar.stat()
    write(tar, pack({"a/9.png": b"two"}))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert contents(tar) == {"a/9.png": b"two"}
    write(tar, pack({"a/9.png": b"two"}) + bytes(512))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert contents(tar) == {"a/9.png": b"two"}


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_index_does_not_matter(tmp_path_factory, data):
    tar = write(tmp_path_factory.mktemp("d") / "x.tar", pack(MEMBERS))
    contents(tar)
    saved = tar.with_name("x.tar.index")
    whole = saved.read_bytes()
    if data.draw(st.booleans()):
        saved.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        saved.write_bytes(whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :])
    assert contents(tar) == MEMBERS


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_no_pickle_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar = write(tmp_path / "x.tar", pack(MEMBERS))
    contents(tar)
    with np.load(tmp_path / "x.tar.index") as arrays:
        arrays = dict(arrays)
    np.savez(tmp_path / "x.npz", **arrays | {"text": np.array([Trap()], object)})
    Path("x.npz").replace("x.tar.index")
    assert contents(tar) == MEMBERS
    write(tmp_path / "x.tar.index", pickle.dumps(Trap()))
    assert contents(tar) == MEMBERS
    assert not Path("sprung").exists()


def test_where_the_folder_cannot_be_written_the_cache_serves(tmp_path, cache):
    tar = write(tmp_path / "x.tar", pack(MEMBERS))
    (tmp_path / "x.tar.index").mkdir()  # stands in the way of any user, even the one who may write everywhere
    assert contents(tar) == MEMBERS
    assert len(names_in(cache)) == 1
    assert names_in(tmp_path) == ["cache", "x.tar", "x.tar.index"]
    before = next(cache.iterdir()).stat().st_ino
    assert contents(tar) == MEMBERS
    assert next(cache.iterdir()).stat().st_ino == before


def test_a_file_of_the_users_is_not_written_over(tmp_path, cache):
    tar = write(tmp_path / "x.tar", pack(MEMBERS))
    (tmp_path / "x.tar.index").write_bytes(b"an index of mine")
    assert contents(tar) == MEMBERS
    assert (tmp_path / "x.tar.index").read_bytes() == b"an index of mine"
    assert len(list(tmp_path.glob("cache/*/*"))) == 1


def test_where_nothing_can_be_written_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", b"")))
    tar = write(tmp_path / "x.tar", pack(MEMBERS))
    (tmp_path / "x.tar.index").mkdir()
    assert contents(tar) == MEMBERS
    assert f"warning: the index of {tar} could not be saved" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match=r"must not be compressed .*; unpack it to a plain .tar"):
        open_index(tmp_path / "x.tar")


def test_a_tar_stored_sparse_is_refused(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": "9", "GNU.sparse.map": "0,1"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match=r"a.png is stored sparse"):
        open_index(tmp_path / "x.tar")


@settings(max_examples=80)
@given(data=st.data())
def test_a_tar_cut_short_is_refused_wherever_it_breaks_off(tmp_path_factory, data):
    whole = pack(MEMBERS)
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # the last member's data; blocks of zeros follow
    cut = data.draw(st.integers(0, len(whole)))
    tar = write(tmp_path_factory.mktemp("d") / "x.tar", whole[:cut])
    if cut >= end + 512:
        assert contents(tar) == MEMBERS
    else:
        with pytest.raises(UserError, match=r"must be a whole, plain tar; .*byte \d+.*; fetch or pack it again"):
            open_index(tar)
        assert names_in(tar.parent) == ["x.tar"]


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_tar_never_loses_an_image_unseen(tmp_path_factory, data):
    whole = pack(MEMBERS, format=data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])))
    header = data.draw(
        st.sampled_from([at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"])
    )
    at = header + data.draw(st.integers(0, 511))
    damaged = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    tar = write(tmp_path_factory.mktemp("d") / "x.tar", damaged)
    line = ""
    try:
        assert contents(tar) == MEMBERS
    except UserError as error:
        line = str(error)
    assert "\n" not in line


@settings(max_examples=150)
@given(st.binary(max_size=2000))
def test_any_bytes_end_in_an_error_of_one_line(tmp_path_factory, noise):
    with pytest.raises(UserError) as error:
        open_index(write(tmp_path_factory.mktemp("d") / "x.tar", noise))
    assert "\n" not in str(error.value)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def few_descriptors():
    """This process may open 40 more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 40, hard))
    yield descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@ON_LINUX
def test_threads_read_more_tars_than_may_be_open(tmp_path, few_descriptors):
    """Each finds its own tar's bytes, though descriptors are closed and numbers given again under its hands."""
    tars = [write(tmp_path / f"{k}.tar", bytes([k]) * 9) for k in range(120)]
    readers = [TarReader(), TarReader()]
    at = [(reader, k) for reader in readers for _ in range(3) for k in range(120)]
    Random(0).shuffle(at)
    with ThreadPoolExecutor(6) as threads:
        found = threads.map(lambda each: (each[0].read(str(tars[each[1]]), 4, 5), each[1]), at)
        assert all(data == bytes([k]) * 5 for data, k in found)
    assert few_descriptors + 20 < descriptors() <= few_descriptors + 40
    del readers, at, found
    assert descriptors() <= few_descriptors


@ON_LINUX
def test_where_others_have_opened_all_the_rest_a_reader_gives_its_own_back(tmp_path, few_descriptors):
    tars = [write(tmp_path / f"{k}.tar", bytes([k])) for k in range(30)]
    reader = TarReader()
    assert reader.read(str(tars[0]), 0, 1) == b"\0"
    others = []
    with suppress(OSError):
        while True:
            others.append(tars[0].open("rb"))
    assert [reader.read(str(tar), 0, 1) for tar in tars] == [bytes([k]) for k in range(30)]
    for file in others:
        file.close()


@ON_LINUX
def test_the_tar_that_is_least_recently_used_is_closed(tmp_path, few_descriptors):
    tars = [str(write(tmp_path / f"{k}.tar", bytes([k]))) for k in range(200)]
    reader = TarReader()
    for k in range(200):
        assert reader.read(tars[k], 0, 1) + reader.read(tars[0], 0, 1) == bytes([k, 0])
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert [k for k in (0, 1, 199) if tars[k] in opened] == [0, 199]


def test_a_reader_can_be_sent_to_another_process(tmp_path):
    path = write(tmp_path / "x.tar", b"0123456789")
    reader = TarReader()
    assert reader.read(str(path), 2, 3) == b"234"
    assert pickle.loads(pickle.dumps(reader)).read(str(path), 0, 1) == b"0"
    with pytest.raises(OSError, match="5 bytes expected at byte 8, found 2"):
        reader.read(str(path), 8, 5)
