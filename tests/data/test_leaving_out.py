"""Images that cannot be read when a run begins, in every kind of root: found, and left out of the numbers."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageCms

from engine.data import leaving_out
from engine.data.decode import AS_IT_IS, Reading
from engine.data.leaving_out import LeftOut, leave_out, look
from engine.data.opening import open_source
from engine.data.source import Root
from engine.data.subset import Subset, take_labels
from engine.errors import UserError
from engine.recipe.sections import LabelledData
from tests.data.images import encoded, fill, pack, picture, shades

JPEG = encoded(picture(64, 48), "JPEG")
PNG = encoded(picture(64, 48), "PNG")
KINDS = ("PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
GOOD = {f"a/{kind}.{kind.lower()}": encoded(picture(40, 30), kind) for kind in KINDS}
GOOD |= {"a/jpeg.jpg": JPEG, "b/grey.jpg": encoded(picture(40, 30).convert("L"), "JPEG")}
GOOD |= {"b/cmyk.jpg": encoded(picture(40, 30).convert("CMYK"), "JPEG")}
# Its header is longer than what is read of a file at first.
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(300_000)
GOOD |= {"b/profile.jpg": encoded(picture(40, 30), "JPEG", icc_profile=PROFILE)}
BAD = {"a/cut.jpg": JPEG[:-400], "a/cut.png": PNG[:-400], "b/empty.jpg": b"", "b/text.png": b"words"}
LARGE = {"b/large.png": encoded(picture(80, 60), "PNG")}
READING = Reading(max_pixels=4000)
FILES = dict(sorted((GOOD | BAD | LARGE).items()))


@pytest.fixture
def roots(tmp_path) -> list[Root]:
    """The same images in every kind of root."""
    for name, content in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "images.tar").write_bytes(pack(FILES))
    (tmp_path / "list.txt").write_text("".join(f"folder/{name}\n" for name in FILES))
    (tmp_path / "tables").mkdir()
    images = pa.array([{"bytes": content, "path": None} for content in FILES.values()])
    rows = pa.table({"image": images, "label": [name[0] for name in FILES]})
    pq.write_table(rows, tmp_path / "tables/train.parquet")
    places = {"folder": "folder", "images.tar": "shards", "list.txt": "list", "tables": "hf"}
    found = [Root(kind, tmp_path / place) for place, kind in places.items()]
    return [*found, Root("folder", tmp_path / "folder/a", more=(tmp_path / "folder/b",))]


def test_what_cannot_be_read_is_found_in_every_kind_of_root(roots):
    wanted = [i for i, name in enumerate(FILES) if name in BAD | LARGE]
    for root in roots:
        source = open_source(root, "train")
        for threads in (1, 4):
            found = look(source, READING, threads)
            assert [*found.unreadable] == wanted, root
            assert (found.headers, found.whole) == (len(FILES), len(FILES) - 3)
        assert found.unreadable[wanted[0]].startswith(source.name(wanted[0]))
        assert len(look(source, AS_IT_IS, 1).unreadable) == len(BAD)
        if source.labels is not None:
            few = Subset(source, np.array(wanted[1:]))
            assert [*look(few, READING, 1).unreadable] == [*range(len(few))]


def test_what_no_file_holds_is_read_once():
    source = open_source(Root("torchvision", Path(), dataset="FakeData", dataset_options={"size": 5}), "train")
    reads = Counter()

    class Counted(type(source)):
        def read(self, i: int):
            reads[i] += 1
            if i == 3:
                raise OSError("damaged")
            return super().read(i)

    source.__class__ = Counted
    assert look(source, AS_IT_IS, 1) == ({3: "FakeData 3 (OSError: damaged)"}, 5, 5)
    assert reads == dict.fromkeys(range(5), 1)


def test_of_a_large_set_some_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(leaving_out, "_HEADERS", 40)
    monkeypatch.setattr(leaving_out, "_WHOLE", 5)
    source = open_source(Root("folder", fill(tmp_path, {f"{i:02}.png": i for i in range(41)})), "train")
    for i in (0, 1, 20):
        (tmp_path / f"{i:02}.png").write_bytes(PNG[:-400])
    assert look(source, AS_IT_IS, 1)[1:] == (5, 5)
    assert [*look(source, AS_IT_IS, 1).unreadable] == [0, 20]
    monkeypatch.setattr(leaving_out, "_HEADERS", 41)
    monkeypatch.setattr(leaving_out, "_PIXELS", 3 * 1300)  # of three images, as large as the mean of five
    assert look(source, AS_IT_IS, 1)[1:] == (41, 3)
    (tmp_path / "01.png").write_bytes(b"words")
    assert [*look(source, AS_IT_IS, 1).unreadable] == [0, 1, 20]


@given(st.integers(1, 40), st.sets(st.integers(0, 60)))
def test_the_numbers_of_the_others_close_up(count, left_out):
    """Also where there are fewer images than the run began with."""

    class Numbers(LeftOut):
        def __init__(self):
            self.labels, self.classes = np.arange(count), tuple(map(str, range(count)))
            self.fingerprint = "of numbers"

        def __len__(self) -> int:
            return count

        def name(self, i: int) -> str:
            return str(range(count)[i])

    rest = LeftOut(Numbers(), dict.fromkeys(left_out, ""))
    wanted = [i for i in range(count) if i not in left_out]
    assert len(rest) == len(wanted)
    assert [rest.name(i) for i in range(len(rest))] == [*map(str, wanted)]
    assert rest.labels.tolist() == wanted
    other = LeftOut(Numbers(), dict.fromkeys(left_out ^ {0}, ""))
    assert rest.fingerprint != other.fingerprint


def test_what_is_left_out_is_said_once_and_borne_up_to_a_share(world, tmp_path, capsys):
    root = fill(tmp_path, {"a/1.png": 1, "a/2.png": 2, "b/3.png": 3, "b/4.png": 4, "b/5.png": 5})
    source = open_source(Root("folder", root), "train")
    (root / "a/2.png").write_bytes(b"")
    data = LabelledData(source="folder", root=str(root), workers=0, max_bad_fraction=0.2, labels=1.0)
    rest = leave_out(source, data, world, batch=4)
    (named, counted) = capsys.readouterr().err.splitlines()
    assert "warning: a/2.png (ValueError: not an image of the kinds JPEG" in named
    assert named.endswith("cannot be read; it is left out")
    assert "5 headers and 4 whole images were looked at in" in counted
    assert counted.endswith("1 cannot be read and are left out")
    assert (shades(rest), rest.labels.tolist(), rest.classes) == ([1, 3, 4, 5], [0, 1, 1, 1], ("a", "b"))
    assert shades(pickle.loads(pickle.dumps(rest))) == [1, 3, 4, 5]
    assert rest.whole is source
    assert shades(take_labels(rest, 0.5, 0))
    assert take_labels(rest, 0.5, 0).whole is source

    known = leave_out(source, data, world, known=rest.left_out)
    assert known.fingerprint == rest.fingerprint != source.fingerprint
    assert leave_out(source, data, world, known={}) is source  # nothing is looked at
    assert not capsys.readouterr().err
    text = r"data.max_bad_fraction \(0.1\) must bear .*: 1 of 5 images looked at, such as a/2.png .* pass .*=0.2 or"
    with pytest.raises(UserError, match=text):
        leave_out(source, LabelledData(**{**vars(data), "max_bad_fraction": 0.1}), world)
    empty = fill(tmp_path / "none", {"1.png": 1})
    (empty / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^data.root must hold readable images; none of 1 in .* is, such as 1.png \("):
        leave_out(open_source(Root("folder", empty), "train"), data, world)
    with pytest.raises(UserError, match=r"train.global_batch_size \(5\) must be at most the number of images \(4 in"):
        leave_out(source, data, world, batch=5)
