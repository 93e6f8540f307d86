"""Hostile content under a correct manifest runs nothing and leaves the folder at no point."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from engine.checkpoint.load import load, read_tensors
from engine.checkpoint.manifest import read_manifest, verify
from engine.checkpoint.save import save
from engine.errors import UserError
from tests.checkpoint.examples import SHA, blank, example_state, example_tensors, reseal


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def table(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def expect_refusal(folder: Path, mark: Path | None = None) -> str:
    verify(folder, read_manifest(folder))  # the manifest is right: the content alone must be refused
    tensors = blank(example_tensors())
    with pytest.raises(UserError) as caught:
        load(folder, tensors)
    with pytest.raises(UserError):
        list(read_tensors(folder))
    assert mark is None or not mark.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bomb_is_a_bomb(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: Metadata({"model.weight": b}), lambda b: Metadata({}, b)])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_metadata_that_runs_code(checkpoints, tmp_path, wrap, protocol):
    folder, mark = checkpoints / "step_0000500", tmp_path / "mark"
    (folder / ".metadata").write_bytes(pickle.dumps(wrap(Bomb(mark)), protocol))
    reseal(folder)
    assert "no place in a checkpoint" in expect_refusal(folder, mark)


@pytest.mark.parametrize(
    "called", [b"ctorch.serialization\nload\n", b"ctorch\nload\n", b"cbuiltins\ngetattr\n", b"ctorch\nSize.__class__\n"]
)
def test_metadata_that_names_other_functions(checkpoints, called):
    folder = checkpoints / "step_0000500"
    (folder / ".metadata").write_bytes(called + b"(V/tmp/x\ntR.")
    reseal(folder)
    assert "no place in a checkpoint" in expect_refusal(folder)


def test_metadata_that_changes_classes(checkpoints):
    folder = checkpoints / "step_0000500"
    content = table(folder)
    content.storage_meta = "MARK"
    # BUILD with (None, {...}) sets an attribute of whatever it is applied to, here of a class that may be named.
    attack = b"ctorch.distributed.checkpoint.metadata\nStorageMeta\n(N(dVspoiled\nI5\nstb"
    sound = pickle.dumps(content, 2)
    assert sound.count(b"X\x04\0\0\0MARK") == 1
    (folder / ".metadata").write_bytes(sound.replace(b"X\x04\0\0\0MARK", attack))
    reseal(folder)
    expect_refusal(folder)
    assert not hasattr(StorageMeta, "spoiled")
    table(folder)  # plain unpickling does what the attack wants
    assert StorageMeta.spoiled == 5
    del StorageMeta.spoiled


@pytest.mark.filterwarnings("ignore::UserWarning")  # stock DCP, alone and over an existing folder
def test_objects_that_are_no_tensors(checkpoints, tmp_path):
    """Stock DCP would unpickle them freely."""
    folder, mark = checkpoints / "step_0000500", tmp_path / "mark"
    tensors = example_tensors() | {"model.weight": Bomb(mark)}
    shutil.rmtree(folder)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    save(checkpoints, example_tensors(), example_state(500), recipe_sha256=SHA)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    content = table(folder)
    content.storage_meta = None
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    reseal(folder)
    assert "BytesStorageMetadata, which has no place" in expect_refusal(folder, mark)


def test_a_tensor_s_bytes_that_run_code(checkpoints, tmp_path):
    folder, mark = checkpoints / "step_0000500", tmp_path / "mark"
    torch.save(Bomb(mark), tmp_path / "bomb")
    content = table(folder)
    for index, info in content.storage_data.items():
        if index.fqn == "model.weight":
            info.offset, info.length = 0, (tmp_path / "bomb").stat().st_size
    shutil.copy(tmp_path / "bomb", folder / "__0_0.distcp")
    with (folder / "__0_0.distcp").open("ab") as file:
        file.write(bytes(100_000))
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    reseal(folder)
    text = expect_refusal(folder, mark)
    assert "spoiled" in text


def change_size(tensor, _):
    tensor.size = torch.Size([33, 8])


def change_chunk(tensor, _):
    tensor.chunks[0].sizes = torch.Size([32, 7])


def drop_chunks(tensor, _):
    tensor.chunks = []


def negative_offset(_, info):
    info.offset = -1


def behind_the_end(_, info):
    info.length = 10**9


def transformed(_, info):
    info.transform_descriptors = ["stream.zstd/1"]


@pytest.mark.parametrize(
    "change",
    [change_size, change_chunk, drop_chunks, negative_offset, behind_the_end, transformed],
    ids=lambda f: f.__name__,
)
def test_a_table_of_contents_that_lies(checkpoints, change):
    folder = checkpoints / "step_0000500"
    content = table(folder)
    info = next(info for index, info in content.storage_data.items() if index.fqn == "model.weight")
    change(content.state_dict_metadata["model.weight"], info)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    reseal(folder)
    assert ".metadata is refused" in expect_refusal(folder)


@pytest.mark.parametrize("escape", ["../secret.distcp", "/etc/passwd", "__9_9.distcp"])
def test_data_outside_of_the_folder(checkpoints, escape):
    folder = checkpoints / "step_0000500"
    shutil.copy(folder / "__0_0.distcp", checkpoints / "secret.distcp")
    content = table(folder)
    for info in content.storage_data.values():
        info.relative_path = escape
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    reseal(folder)
    assert "no file of the manifest" in expect_refusal(folder)
