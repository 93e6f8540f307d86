"""Files that are damaged or mean harm: one line each, and nothing in them is run."""

import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import UserError
from engine.weights.opening import open_weights
from engine.weights.read import read_weights
from engine.weights.weights import MARK, About, fill_trunk
from models.architecture import trunk_shapes, vit
from tests.weights.files import trunk_of


class Hostile:
    def __reduce__(self):
        return print, ("this ran",)


def safetensors_header(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_hostile(kind: str, file: Path) -> None:
    if kind == "text":
        file.write_text("<html>404: not found</html>")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "folder":
        file.mkdir()
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"state_dict": Hostile()}, protocol=2))
    elif kind == "new pickle":
        file.write_bytes(pickle.dumps({"state_dict": Hostile()}))
    elif kind == "zipped pickle":
        torch.save({"state_dict": Hostile()}, file)
    elif kind == "compressed":
        torch.save({"model": {"a": torch.zeros(2**20)}}, file)
        with zipfile.ZipFile(file) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in parts.items():
                new.writestr(name, data)
    elif kind == "stride 0":
        shapes = trunk_shapes(vit(32, 16, 48_000, 1, 12, False))  # a whole network of 27 billion weights
        torch.save({"model": {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}}, file)
    elif kind == "sparse":
        torch.save({"model": {"a": torch.eye(3).to_sparse()}}, file)
    elif kind == "meta":
        torch.save({"model": {"a": torch.empty(10**12, device="meta")}}, file)
    elif kind == "numbers":
        torch.save({"model": {"a": 1}}, file)
    elif kind == "list":
        torch.save([torch.zeros(1)], file)
    elif kind == "itself":
        content = {}
        content["state_dict"] = content
        torch.save(content, file)
    elif kind == "large header":
        file.write_bytes(struct.pack("<Q", 2**40) + b"{")
    elif kind == "large tensor":
        file.write_bytes(
            safetensors_header({"a": {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}})
        )
    elif kind == "no data":
        large = {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}
        names = ("cls_token", "pos_embed", "layer1.0.conv3.weight", "layer1.0.conv1.weight")
        file.write_bytes(safetensors_header(dict.fromkeys(names, large)))
    elif kind == "metadata":
        metadata = {MARK: json.dumps({"architecture": {"kind": "vit", "arguments": {"depth": 10**9}}})}
        file.write_bytes(safetensors_header({"__metadata__": metadata}))


KINDS = """
text, empty, folder, pickle, new pickle, zipped pickle, compressed, stride 0, sparse, meta, numbers, list, itself,
large header, large tensor, no data, metadata"""


@pytest.mark.parametrize("kind", KINDS.replace("\n", " ").strip().split(", "))
def test_unsafe_files_are_one_line_errors(kind, tmp_path, capsys):
    file = tmp_path / "weights.pth"
    write_hostile(kind, file)
    with pytest.raises(UserError) as caught:
        trunk_of(file)
    assert "\n" not in str(caught.value)
    assert "weights.pth" in str(caught.value)
    assert "this ran" not in capsys.readouterr().out
    if "pickle" in kind:
        assert "pickle asks for " + ("more" if kind == "new pickle" else "print") in str(caught.value)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    architecture = vit(8, 4, 8, 1, 2, False)
    tensors = {n: torch.zeros(s) for n, s in trunk_shapes(architecture).items()}
    torch.save({"model": tensors, "model_args": architecture.model_args()}, folder / "zip.pth")
    torch.save({"model": tensors}, folder / "old.pth", _use_new_zipfile_serialization=False)
    about = About(architecture, 8, (0.5,) * 3, (0.5,) * 3)
    save_file(tensors, folder / "a.safetensors", metadata={MARK: about.to_json()})
    return folder


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_files_never_crash(small_files, data):
    name = data.draw(st.sampled_from(["zip.pth", "old.pth", "a.safetensors"]))
    content = bytearray((small_files / name).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = small_files / f"damaged-{name}"
    file.write_bytes(content)
    said = ""
    try:
        weights = open_weights(str(file))
        if weights.about is not None:
            fill_trunk(weights.trunk("base"))
    except UserError as error:
        said = str(error)
    assert "\n" not in said


def test_an_old_pickle_is_read_too(small_files):
    weights = read_weights(small_files / "old.pth")
    assert weights.about is None  # 12 heads do not divide 8 channels
    assert len(list(weights.read(list(weights.shapes)))) == len(weights.shapes)
