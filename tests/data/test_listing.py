"""Listings of many images, which lie in a file."""

import hashlib
import itertools
import os
import pickle
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from engine.data import collect, folder, listing, lists, shards, unchanged
from engine.data.labels import by_number
from engine.data.opening import align_labels, open_source
from engine.data.source import Root
from tests.data.images import fill, pack, png, shades

AN_HOUR = 3600
FILES = {"b/2.png": 2, "a/x/3.png": 3, "a/1.png": 1, "b-/4.png": 4, "b.png/5.png": 5}


@pytest.fixture(autouse=True)
def many(tmp_path, monkeypatch):
    """One image is many."""
    monkeypatch.setattr(listing, "_WORTH_A_FILE", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def long_ago(monkeypatch):
    """All that happens in a test was an hour ago, so that no tick of a clock has to be waited for."""
    monkeypatch.setattr(unchanged, "TICK_NS", -AN_HOUR * 10**9)


@pytest.fixture
def root(tmp_path, long_ago) -> Path:
    filled = fill(tmp_path / "root", FILES)
    time.sleep(0.02)  # so that what a test changes has another time on any clock
    return filled


def opened(root: Path, kind: str = "folder", **options):
    return open_source(Root(kind, root, **options), "train")


def facts(source) -> tuple:
    names = [source.name(i) for i in range(len(source))]
    labels = None if source.labels is None else source.labels.tolist()
    return names, labels, source.classes, source.fingerprint, source.notes, source.otherwise, source.survey.left_out


def tars(root: Path, *members: dict[str, bytes]) -> Path:
    root.mkdir()
    for k, each in enumerate(members):
        (root / f"{k:03}.tar").write_bytes(pack(each))
    return root


def from_the_file(monkeypatch, root: Path, kind: str = "folder"):
    """The source, where nothing but its index can be asked."""
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_walk", None)
        patch.setattr(shards, "open_index", None)
        return opened(root, kind)


# ---- the fingerprint of former versions ------------------------------------------------------------------------------


def former_fingerprint(names: list[bytes], sizes: list[int], classes: list[bytes] | None = None) -> str:
    """Of names and sizes, and of classes that are no folders, as runs of all versions keep it."""
    sha256 = hashlib.sha256()
    for texts, numbers in ((names, sizes), (classes, None)):
        if texts is not None:
            sha256.update(b"".join(texts))
            sha256.update(np.cumsum([len(text) for text in texts]).astype("<i8"))
        if numbers is not None:
            sha256.update(np.array(numbers, "<i8"))
    return sha256.hexdigest()


PART = st.sampled_from([b"a", b"b", b"a-", b"a.b", b"\xff", b"\n", "ü".encode(), b"A", b"7"])


@settings(max_examples=30)
@given(
    paths=st.sets(st.lists(PART, min_size=1, max_size=3).map(tuple), min_size=1, max_size=12),
    is_long=st.booleans(),
    chunk=st.integers(1, 20),
)
def test_a_folder_has_the_order_the_labels_and_the_fingerprint_that_it_always_had(
    tmp_path_factory, paths, is_long, chunk
):
    root = tmp_path_factory.mktemp("d") / "root"
    sizes = {b"/".join(path) + b".png": k for k, path in enumerate(sorted(paths))}
    for name, size in sizes.items():
        at = root / os.fsdecode(name)
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(bytes(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unchanged, "TICK_NS", -AN_HOUR * 10**9)
        patch.setattr(folder, "_parts", lambda root, split: folder._Parts(None, None))
        patch.setattr(folder, "_BATCH", chunk)
        patch.setattr(collect, "_CHUNK", chunk)
        patch.setattr(collect, "_IN_MEMORY", 3 * chunk)
        patch.setattr(listing, "_WORTH_A_FILE", 1 if is_long else 10**9)
        for _ in range(2):
            source = opened(root)
            names = [source.path(i) for i in range(len(source))]
            assert names == sorted(sizes)
            assert source.fingerprint == former_fingerprint(names, [sizes[name] for name in names])
            folders = [name.partition(b"/")[0] for name in names]
            if all(b"/" in name for name in names):
                assert source.labels.tolist() == [sorted(set(folders)).index(each) for each in folders]
            else:
                assert source.labels is None
    assert root.with_name("root.index").exists() is is_long


def test_tars_have_the_fingerprints_that_they_always_had(tmp_path, monkeypatch):
    random = Random(0)
    chosen = [random.sample(range(100), random.randrange(3, 20)) for _ in range(6)]
    by_folder = tars(
        tmp_path / "f", *({f"{i % 7}/{i}-{k}.png": b"." * i for i in each} for k, each in enumerate(chosen))
    )
    beside = {}
    for k, each in enumerate(chosen):
        beside[k] = {f"{i}.png": b"." * i for i in each} | {f"{i}.cls": str(i * i % 13).encode() for i in each}
    by_file = tars(tmp_path / "l", *beside.values())
    by_tar = tmp_path / "t"
    by_tar.mkdir()
    for name, each in zip("qdzaek", chosen, strict=True):
        (by_tar / f"{name}.tar").write_bytes(pack({f"{i}.png": b"." * i for i in each}))
    (by_tar / "empty.tar").write_bytes(pack({"notes.txt": b""}))
    sizes = [i for each in chosen for i in each]
    names = [b"%d.png" % i for i in sizes]
    for chunk, worth in itertools.product((1, 8, 1 << 20), (1, 10**9)):
        monkeypatch.setattr(collect, "_CHUNK", chunk)
        monkeypatch.setattr(listing, "_WORTH_A_FILE", worth)
        for _ in range(2):
            source = opened(by_folder, "shards")
            inner = [b"%d/%d-%d.png" % (i % 7, i, k) for k, each in enumerate(chosen) for i in each]
            assert source.fingerprint == former_fingerprint(inner, sizes)
            assert source.labels.tolist() == [sorted({i % 7 for i in sizes}).index(i % 7) for i in sizes]
            source, said = opened(by_file, "shards"), [b"%d" % (i * i % 13) for i in sizes]
            assert source.fingerprint == former_fingerprint(names, sizes, said)
            assert source.labels.tolist() == [by_number(set(said)).index(each) for each in said]
            source = opened(by_tar, "shards")
            order = sorted(zip("qdzaek", chosen, strict=True))
            named = [(name.encode(), i) for name, each in order for i in each]
            inner, inner_sizes = [b"%d.png" % i for _, i in named], [i for _, i in named]
            assert source.fingerprint == former_fingerprint(inner, inner_sizes, [name for name, _ in named])
            assert source.classes == ("a", "d", "e", "k", "q", "z")
            assert [source.classes[label].encode() for label in source.labels] == [name for name, _ in named]


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_what_is_read_from_the_file_is_what_was_found(tmp_path, root, monkeypatch, kind):
    (root / "a/notes.txt").touch()
    if kind == "shards":
        members = [{name: png(shade)} for name, shade in FILES.items()]
        root = tars(tmp_path / "tars", *members[:3], {}, members[3] | members[4] | {"x.txt": b""})
    found = opened(root, kind)
    again = from_the_file(monkeypatch, root, kind)
    assert facts(again) == facts(found)
    assert any("left out" in note and "1 .txt" in note for note in found.notes)
    assert shades(again) == shades(found)
    assert len(set(shades(found))) == 5


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_copy_for_another_process_maps_the_same_file(tmp_path, monkeypatch, long_ago, kind):
    members = {f"{name}/{k:0100}.png": bytes(k) for name in "ab" for k in range(100)}
    if kind == "shards":
        root = tars(tmp_path / "tars", members)
    else:
        root = tmp_path / "root"
        for name, data in members.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    source = opened(root, kind)
    assert source.labels.base is not None
    with pytest.raises(ValueError, match="read-only"):
        source.labels[0] = 1
    packed = pickle.dumps(source)
    assert len(packed) < 3000
    assert facts(pickle.loads(packed)) == facts(source)
    aligned = align_labels(source, source)
    assert pickle.loads(pickle.dumps(aligned)).labels.tolist() == source.labels.tolist()
    aligned.labels = source.labels + 1
    assert pickle.loads(pickle.dumps(aligned)).labels.tolist() == (source.labels + 1).tolist()
    place = next(each for each in tmp_path.rglob("*.index") if "000" not in each.name)
    place.unlink()
    with pytest.raises(FileNotFoundError, match="was replaced while it was in use"):
        pickle.loads(packed)
    assert facts(source) == facts(opened(root, kind))  # the old one still lies in the file that has lost its name
    with pytest.raises(FileNotFoundError, match="was replaced while it was in use"):
        pickle.loads(packed)


def test_the_file_is_one_of_safetensors(root, tmp_path):
    source = opened(root)
    arrays = load_file(tmp_path / "root.index")
    assert arrays["labels"].tolist() == source.labels.tolist()
    assert bytes(arrays["name_text"]) == b"".join(source.path(i) for i in range(len(source)))
    assert arrays["sizes"].tolist() == [(root / source.name(i)).stat().st_size for i in range(len(source))]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_damaged_file_does_not_matter(root, tmp_path, kind):
    random = Random(0)
    if kind == "shards":
        root = tars(tmp_path / "tars", {name: png(shade) for name, shade in FILES.items()}, {"a/9.png": png(9)})
    found = facts(opened(root, kind))
    place = tmp_path / ("root.index" if kind == "folder" else "tars/train.tars.index")
    whole = place.read_bytes()
    for _ in range(150):
        at, value = random.randrange(len(whole)), random.randrange(256)
        damaged = random.choice([whole[:at], whole + bytes(at % 9), whole[:at] + bytes([value]) + whole[at + 1 :]])
        place.write_bytes(damaged)
        assert facts(opened(root, kind)) == found
    assert not [each.name for each in tmp_path.iterdir() if "tmp-" in each.name]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_what_a_killed_process_left_of_an_index_is_swept(root, tmp_path, monkeypatch, kind):
    if kind == "shards":
        root = tars(tmp_path / "tars", {"a/1.png": png(1)})
        monkeypatch.setattr(listing, "_WORTH_A_FILE", 9)  # the tar's index alone
    left = {"folder": tmp_path / "root.index.tmp-0123abcd", "shards": root / "000.tar.index.tmp-0123abcd"}[kind]
    left.touch()
    opened(root, kind, read_only=True)
    assert left.exists()
    opened(root, kind)
    assert not left.exists()


def test_a_file_that_is_too_long_to_be_compared_has_its_header_compared(root, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_CHECKED", 0)
    found = facts(opened(root))
    assert facts(from_the_file(monkeypatch, root)) == found
    place = tmp_path / "root.index"
    whole = place.read_bytes()
    place.write_bytes(whole.replace(b'"fingerprint": "', b'"fingerprint": "0', 1)[:-1])
    assert facts(opened(root)) == found
    assert place.stat().st_size == len(whole)


def test_where_the_place_beside_it_cannot_be_written_the_cache_serves(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "root.index").mkdir()
    found = facts(opened(root))
    assert facts(from_the_file(monkeypatch, root)) == found
    assert len(list((tmp_path / "cache/moco-v3-engine").iterdir())) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert facts(opened(root)) == found
    assert "could not be saved: every rank makes its own, at each start" in capsys.readouterr().err


def test_a_file_of_the_users_is_not_written_over(root, tmp_path, monkeypatch):
    for mine in (b"", b"an index of mine", bytes(100)):
        (tmp_path / "root.index").write_bytes(mine)
        found = facts(opened(root))
        assert (tmp_path / "root.index").read_bytes() == mine
        assert facts(from_the_file(monkeypatch, root)) == found
    assert len(list((tmp_path / "cache/moco-v3-engine").iterdir())) == 1


def test_a_folder_and_tars_of_one_name_have_an_index_each(root, tmp_path, monkeypatch):
    """As where a tar was unpacked beside itself."""
    (tmp_path / "root.tar").write_bytes(pack({"x/1.png": png(1)}))
    both = {"folder": root, "shards": tmp_path / "root.tar"}
    found = {kind: facts(opened(at, kind)) for kind, at in both.items()}
    (tmp_path / "train").mkdir()
    fill(tmp_path / "train", {"a/6.png": 6})
    assert len(opened(tmp_path / "train")) == len(opened(tmp_path, "shards")) == 1
    assert {kind: facts(from_the_file(monkeypatch, at, kind)) for kind, at in both.items()} == found
    (tmp_path / "root.index").replace(tmp_path / "root.tars.index")  # of another kind, whatever the names
    assert facts(opened(tmp_path / "root.tar", "shards")) == found["shards"]


def test_the_index_of_a_list_among_its_images_does_not_change_their_folder(root, monkeypatch):
    (root / "all.txt").write_text("a/1.png\n../root/all.png\n")
    (root / "all.png").write_bytes(png(9))
    time.sleep(0.02)
    found = facts(opened(root / "all.txt", "list"))
    monkeypatch.setattr(lists, "_lines", None)
    assert facts(opened(root / "all.txt", "list")) == found
    assert not (root / "all.txt.index").exists()


def test_nothing_is_saved_where_nothing_may_be(root, tmp_path):
    tars(tmp_path / "tars", {"a/1.png": png(1)})
    before = sorted(tmp_path.rglob("*"))
    opened(root, read_only=True)
    opened(tmp_path / "tars", "shards", read_only=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_index_is_no_file_that_was_left_out(root):
    opened(root / "a")
    assert (root / "a.index").exists()
    assert opened(root).notes == ()


# ---- changes ---------------------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


CHANGES = {
    "a file more": lambda root: write(root / "a/x/0.png", b"new"),
    "a file less": lambda root: (root / "b/2.png").unlink(),
    "a file of another name": lambda root: (root / "b/2.png").rename(root / "b/3.png"),
    "a file written over": lambda root: write(root / "a/x/3.png", b"another length"),
    "another file in its place": lambda root: (write(root / "b/.x", b"."), (root / "b/.x").replace(root / "b/2.png")),
    "a folder more": lambda root: write(root / "c/7.png", b"new"),
    "a folder in a folder": lambda root: write(root / "a/x/y/7.png", b"new"),
    "a file beside images": lambda root: (root / "a/notes.txt").touch(),
    "what a link leads to": lambda root: write(root.parent / "away.png", b"back"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_listed_anew(root, monkeypatch, change):
    (root / "a/lost.png").symlink_to(root.parent / "away.png")
    before = facts(opened(root))
    change(root)
    now = facts(opened(root))
    assert now != before
    monkeypatch.setattr(listing, "_WORTH_A_FILE", 10**9)
    monkeypatch.setattr(listing, "places", lambda path, **_: [])
    assert now == facts(opened(root))


LIST = "a/1.png\tx\nb/2.png\ty\na/lost.png\tx\nb/2.png\ty\ngone/3.png\tx\n"
CHANGED_LISTS = {
    "another label": lambda root: (root / "all.txt").write_text(LIST.replace("x", "z")),
    "a file less": lambda root: (root / "b/2.png").unlink(),
    "a file written over": lambda root: write(root / "a/1.png", b"another length"),
    "a file that was lost": lambda root: write(root / "a/lost.png", b"back"),
    "what a link leads to": lambda root: write(root.parent / "away.png", b"back"),
    "a folder that was lost": lambda root: write(root / "gone/3.png", b"back"),
}


@pytest.mark.parametrize("change", CHANGED_LISTS.values(), ids=CHANGED_LISTS)
def test_a_list_and_the_folders_of_its_images_are_watched(root, monkeypatch, change):
    (root / "a/lost.png").symlink_to(root.parent / "away.png")
    (root / "all.txt").write_text(LIST)
    time.sleep(0.02)
    found = opened(root / "all.txt", "list")
    before = facts(found)
    assert before[1] == [0, 1, 0, 1, 0]
    assert len(before[4]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(lists, "_lines", None)
        assert facts(opened(root / "all.txt", "list")) == before
        assert len(pickle.dumps(found)) < 3000
        assert facts(pickle.loads(pickle.dumps(found))) == before
    change(root)
    now = facts(opened(root / "all.txt", "list"))
    assert now != before
    monkeypatch.setattr(listing, "places", lambda path, **_: [])
    assert now == facts(opened(root / "all.txt", "list"))


def test_a_copy_of_several_roots_maps_their_files(tmp_path, long_ago):
    roots = [
        fill(tmp_path / name, {f"{c}/{'long' * 20}-{k}.png": k for c in cs for k in range(50)})
        for name, cs in (("one", "ab"), ("two", "bc"))
    ]
    source = opened(roots[0], more=(roots[1],))
    packed = pickle.dumps(source)
    assert len(packed) < 4000
    copy = pickle.loads(packed)
    assert (copy.labels.tolist(), copy.classes) == (source.labels.tolist(), ("a", "b", "c"))
    assert [copy.name(i) for i in range(200)] == [source.name(i) for i in range(200)]
    other = align_labels(source, source)
    other.labels = source.labels[::-1]
    assert pickle.loads(pickle.dumps(other)).labels.tolist() == source.labels.tolist()[::-1]


def test_a_copy_that_sets_times_back_is_noticed(root):
    before = facts(opened(root))
    times = (root / "b").stat()
    write(root / "b/9.png", b"new")
    os.utime(root / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert facts(opened(root)) != before


def test_a_folder_that_was_changed_just_now_is_listed_twice(tmp_path, monkeypatch, capsys):
    """What comes in the same tick of the clock as the first list changes no time; only a list of later can be kept."""
    root = fill(tmp_path / "root", FILES)
    monkeypatch.setattr(unchanged, "TICK_NS", 3 * 10**8)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        write(root / "a/0.png", png(6))
        os.utime(root / "a", ns=(0, 10**9))

    monkeypatch.setattr(unchanged.time, "sleep", sleep)
    source = opened(root)
    assert len(source) == len(FILES) + 1
    assert len(slept) == 1
    assert 0 < slept[0] <= 0.3
    assert not (tmp_path / "root.index").exists()  # this one too was changed just now, by its second time
    assert "is being changed, so no index is kept" in capsys.readouterr().err


@pytest.mark.parametrize("year", [1969, 1970, 2100])
@pytest.mark.parametrize("kind", ["folder", "list"])
def test_times_that_an_archive_brought_along_do_not_matter(root, monkeypatch, kind, year):
    """A change of a folder changes its other time."""
    at = {"folder": root, "list": root / "b/all.txt"}[kind]
    (root / "b/all.txt").write_text("../a/1.png\n2.png\n")
    monkeypatch.setattr(unchanged, "TICK_NS", 10**8)
    for place in (root, *root.rglob("*")):
        os.utime(place, ns=(0, (year - 1970) * 365 * 86400 * 10**9))
    time.sleep(0.15)
    found = facts(opened(at, kind))
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_walk", None)
        patch.setattr(lists, "_lines", None)
        assert facts(opened(at, kind)) == found
    times = (root / "b").stat()
    (root / "b/2.png").unlink()
    os.utime(root / "b", ns=(0, times.st_mtime_ns))
    assert facts(opened(at, kind)) != found


@pytest.mark.parametrize(("change", "said"), [(0, "2 folders that do not say when"), (AN_HOUR, "")])
def test_a_mount_whose_clock_is_wrong(tmp_path, monkeypatch, capsys, change, said):
    """Times of change that stay 1970 tell nothing; those of a clock that is ahead are waited for, once."""
    root = fill(tmp_path / "root", {"a/1.png": 1, "2.png": 2})
    monkeypatch.setattr(unchanged, "TICK_NS", 10**8)
    shown = change and time.time_ns() + change * 10**9
    monkeypatch.setattr(folder, "times_of", lambda path: (unchanged.times_of(path)[0], shown))
    opened(root)
    line = capsys.readouterr().err
    assert said in line
    assert bool(said) == bool(line)
    assert (tmp_path / "root.index").exists() is not bool(said)


@pytest.mark.parametrize("count", [1, 3])
def test_changed_tars_are_listed_anew(tmp_path, monkeypatch, count):
    root = tars(tmp_path / "tars", *({f"a/{k}.png": b"one"} for k in range(count)))
    last = root / f"{count - 1:03}.tar"
    before = opened(root, "shards")
    times = last.stat()
    last.write_bytes(pack({"a/9.png": b"one"}))
    os.utime(last, ns=(0, times.st_mtime_ns))
    assert facts(opened(root, "shards")) != facts(before)
    (root / "more.tar").write_bytes(pack({"b/1.png": b"one"}))
    more = opened(root, "shards")
    assert len(more) == count + 1
    assert facts(from_the_file(monkeypatch, root, "shards")) == facts(more)
    (root / "more.tar").unlink()
    last.write_bytes(pack({f"a/{count - 1}.png": b"one"}))
    assert facts(opened(root, "shards")) == facts(before)
