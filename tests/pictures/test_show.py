"""What `engine.show` refuses, and that it replaces a picture that is there."""

import itertools
import sys

import pytest
from PIL import Image

from engine.errors import RunFailed, UserError
from engine.pictures.canvas import write
from tests.pictures.drawn import QUICKSTART, VIT, show


def test_refusals(images, tmp_path):
    broken, out = tmp_path / "broken.jpg", tmp_path / "out.png"
    broken.write_bytes(b"\xff\xd8\xff no image")
    (tmp_path / "folder.png").mkdir()
    own = ("data.source=folder", f"data.root={images}", "data.val_root=null", "train.global_batch_size=4")
    few = ("--data", images, out, "--workers", 0)
    cases = {
        r"OUT \(.*out.gif\) must end in .png": ("attention", VIT, broken, tmp_path / "out.gif"),
        r"OUT \(.*folder.png\) must be a file": ("attention", VIT, broken, tmp_path / "folder.png"),
        r"OUT \(.*\) must lie in a folder that exists": ("attention", VIT, broken, tmp_path / "no" / "out.png"),
        r"OUT \(/proc/a.png\) must lie in a folder that can be written": ("attention", "none", broken, "/proc/a.png"),
        r"IMAGE \(.*broken.jpg\) must be a readable image": ("attention", VIT, broken, out),
        r"IMAGE \(.*none.jpg\) must be a readable image: No such file": ("attention", VIT, tmp_path / "none.jpg", out),
        r"CHECKPOINT \(.*none\) must exist": ("neighbours", tmp_path / "none", *few),
        r"--data \(.*none\) must exist": ("embedding", VIT, "--data", tmp_path / "none", out),
        r"--queries \(13\) must be at most 12": ("neighbours", VIT, *few, "--queries", 13),
        r"--queries \(2\) must be left out with --query": ("neighbours", VIT, *few, "--queries", 2, "--query", broken),
        r"--k \(12\) must be at most 11": ("neighbours", VIT, *few, "--k", 12),
        r"--queries \(0\) must be >= 1; 8 is usual": ("neighbours", VIT, *few, "--queries", 0),
        r"--dataset \(missing\) must be a class": ("embedding", VIT, *few, "--source", "torchvision"),
        r"data.root \(.*none\) must exist": ("views", QUICKSTART, out, f"data.root={tmp_path}/none"),
        r"recipe \(.*none.yaml\) must be a readable file": ("views", tmp_path / "none.yaml", out),
        r"OUT \(.*new.png\) must not become an image": ("embedding", VIT, "--data", images, images / "new.png"),
        r"OUT \(.*view.png\) must not become an image": ("views", QUICKSTART, images / "odd ones/view.png", *own),
        r"did you mean augment.crop_min": ("views", QUICKSTART, out, "augment.crop_minn=1"),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message):
            show(*arguments)
        assert not out.exists()


def test_a_picture_that_is_there_is_replaced(images, tmp_path):
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    show("attention", VIT, images / "odd ones" / "1.png", out)
    assert Image.open(out).format == "PNG"


def test_a_full_disk_leaves_the_picture_that_is_there(images, tmp_path, monkeypatch):
    out, numbers = tmp_path / "out.png", itertools.count()
    out.write_bytes(b"old")
    monkeypatch.setattr("engine.files.secrets.token_hex", lambda _: str(next(numbers)))
    for number in range(4):  # whatever of this name is asked for lies on a full disk
        tmp_path.joinpath(f"out.png.tmp-{number}").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"OUT \(.*out.png\) could not be written: No space left on device"):
        show("attention", VIT, images / "odd ones" / "1.png", out)
    assert out.read_bytes() == b"old"
    assert not tmp_path.joinpath("out.png.tmp-0").is_symlink()


def test_what_a_link_names_is_written(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "out.png")
    write(tmp_path / "link.png", b"new")
    assert (tmp_path / "out.png").read_bytes() == b"new"
    assert (tmp_path / "link.png").is_symlink()


@pytest.mark.parametrize("kind", ["attention", "neighbours", "embedding"])
def test_either_encoder_is_shown(kind, images, tmp_path):
    own = (images / "odd ones" / "1.png",) if kind == "attention" else ("--data", images, "--workers", 0)
    for encoder in ("base", "momentum"):
        show(kind, VIT, *own, tmp_path / f"{encoder}.png", "--encoder", encoder)
    base, momentum = ((tmp_path / f"{encoder}.png").read_bytes() for encoder in ("base", "momentum"))
    assert base != momentum


def test_a_missing_library_is_named(images, tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"scikit-learn.*pip install -e '.\[pictures\]'"):
        show("embedding", VIT, "--data", images, out, "--method", "tsne")
    monkeypatch.delitem(sys.modules, "engine.pictures.canvas")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib.*pip install -e '.\[pictures\]'"):
        show("attention", VIT, images / "odd ones" / "1.png", out)
