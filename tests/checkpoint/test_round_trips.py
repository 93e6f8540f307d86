"""Checkpoints in one process: what goes in comes out, and what was there stays."""

import json
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import dcp, layout
from engine.checkpoint.load import load, newest_valid, read_tensors
from engine.checkpoint.manifest import NAME, checksum, read_manifest
from engine.checkpoint.retain import retain
from engine.checkpoint.save import SaveFailed, save
from engine.checkpoint.state import RunState
from engine.errors import UserError
from tests.checkpoint.examples import DTYPES, SHA, blank, example_state, example_tensors, same

shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=40)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=5), st.integers())
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, kinds, seed):
    generator = torch.Generator().manual_seed(seed % 2**63)

    def tensor(shape, dtype, transposed):
        size = [*shape, dtype.itemsize] if dtype != torch.bool else shape
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, size, generator=generator, dtype=torch.uint8)
        made = raw.bool() if dtype == torch.bool else raw.view(dtype).reshape(shape)
        return made.T if transposed and len(shape) == 2 else made

    tensors = {f"t{number}.with.dots": tensor(*kind) for number, kind in enumerate(kinds)}
    folder = tmp_path_factory.mktemp("round") / "checkpoints"
    state = replace(example_state(3), bad_images=seed)
    path = save(folder, tensors, state, recipe_sha256=SHA)
    into = blank(tensors)
    load(path, into)
    assert RunState.read(path, read_manifest(path)) == state
    assert all(same(into[name], tensors[name]) for name in tensors)
    assert dict.fromkeys(tensors, True) == {name: same(t, tensors[name]) for name, t in read_tensors(path)}
    shutil.rmtree(folder)


def test_loading_is_in_place_and_keeps_parameters_parameters(checkpoints):
    tensors = blank(example_tensors())
    parameter = tensors["model.weight"] = torch.nn.Parameter(tensors["model.weight"])
    storage = parameter.data_ptr()
    load(checkpoints / "step_0000500", tensors)
    assert same(parameter, example_tensors()["model.weight"])
    assert parameter.data_ptr() == storage
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_a_view_of_large_memory_is_saved_alone(tmp_path):
    path = save(tmp_path, {"row": torch.zeros(1000, 1000)[3]}, example_state(1), recipe_sha256=SHA)
    assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


def test_equal_states_give_equal_files(saved):
    one, other = (read_manifest(saved / name).files for name in ("step_0000250", "step_0000500"))
    assert one == other


def test_manifest_says_what_is_there(saved):
    manifest = read_manifest(saved / "step_0000500")
    assert (manifest.step, manifest.world_size, manifest.recipe_sha256) == (500, 1, SHA)
    assert manifest.tensors["model.bias"] == {"shape": [9], "dtype": "bfloat16"}
    assert RunState.read(saved / "step_0000500", manifest) == example_state(500)
    assert json.loads((saved / "step_0000500" / NAME).read_text())["format"] == 1
    assert {".metadata"} < set(manifest.files) == {p.name for p in (saved / "step_0000500").iterdir()} - {NAME}
    assert (saved / "latest").read_text() == "step_0000500\n"


def test_read_tensors_takes_a_part_and_refuses_unknown_names(saved):
    path = saved / "step_0000500"
    assert [name for name, _ in read_tensors(path, ["optimizer.step"])] == ["optimizer.step"]
    with pytest.raises(UserError, match="nothing is not in the checkpoint"):
        read_tensors(path, ["optimizer.step", "nothing"])


@pytest.mark.parametrize(("together", "reads"), [(2**20, 1), (33 * 7 * 4 + 9 * 2, 2), (0, 3)])
def test_small_tensors_are_read_together_and_come_in_order(saved, monkeypatch, together, reads):
    monkeypatch.setattr("engine.checkpoint.load.TOGETHER", together)
    calls, read = [], dcp.read
    monkeypatch.setattr(dcp, "read", lambda *given, **more: calls.append(given) or read(*given, **more))
    names = ["model.weight", "model.bias", "optimizer.step"]
    found = list(read_tensors(saved / "step_0000500", names))
    assert [name for name, _ in found] == names
    assert all(same(tensor, example_tensors()[name]) for name, tensor in found)
    assert len(calls) == reads


def test_mismatches_are_listed_before_anything_changes(saved):
    tensors = blank(example_tensors())
    tensors["model.weight"] = torch.zeros(33, 8)
    tensors["model.bias"] = tensors["model.bias"].float()
    del tensors["empty"]
    tensors |= {f"new{number}": torch.zeros(1) for number in range(9)}
    with pytest.raises(UserError) as caught:
        load(saved / "step_0000500", tensors)
    text = str(caught.value)
    assert "new0 is not in the checkpoint" in text
    assert "empty of the checkpoint has no place" in text
    assert text.endswith("and 2 more")
    assert "\n" not in text
    assert not any(tensor.any() for tensor in tensors.values())
    with pytest.raises(UserError, match=r"float32 \[33, 7\] in the checkpoint, float32 \[33, 8\] here"):
        load(saved / "step_0000500", {"model.weight": torch.zeros(33, 8)}, ignore=("",))
    with pytest.raises(UserError, match="nothing is not in"):
        load(saved / "step_0000500", {"nothing": torch.zeros(1)}, ignore=("",))
    part = {"model.weight": torch.zeros(33, 7)}
    load(saved / "step_0000500", part, ignore=("",))
    assert same(part["model.weight"], example_tensors()["model.weight"])


def test_a_valid_checkpoint_of_the_same_step_is_kept(checkpoints):
    before = (checkpoints / "step_0000250").stat().st_mtime_ns, checksum(checkpoints / "step_0000250" / NAME)
    (checkpoints / "latest").unlink()
    assert save(checkpoints, example_tensors(), example_state(250), recipe_sha256=SHA) == checkpoints / "step_0000250"
    assert before == ((checkpoints / "step_0000250").stat().st_mtime_ns, checksum(checkpoints / "step_0000250" / NAME))
    assert (checkpoints / "latest").read_text() == "step_0000250\n"
    with pytest.raises(UserError, match="another recipe"):
        save(checkpoints, example_tensors(), example_state(250), recipe_sha256="1" * 64)
    assert len(list(checkpoints.glob("step_*"))) == 2


def test_a_damaged_checkpoint_makes_way_for_a_new_one(checkpoints, capsys):
    (checkpoints / "step_0000500" / "__0_0.distcp").write_bytes(b"")
    save(checkpoints, example_tensors(), example_state(500), recipe_sha256=SHA)
    assert "step_0000500.damaged-1" in capsys.readouterr().err
    assert (checkpoints / "step_0000500.damaged-1" / "__0_0.distcp").read_bytes() == b""
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"


def test_a_folder_that_another_run_writes_to_is_refused(checkpoints):
    with layout.writing(checkpoints) as locked:
        assert locked
        with pytest.raises(UserError, match="one run"):
            save(checkpoints, example_tensors(), example_state(750), recipe_sha256=SHA)
    save(checkpoints, example_tensors(), example_state(750), recipe_sha256=SHA)


@pytest.mark.parametrize("limit", [0, 300, 20_000, 400_000, 2_000_000])
def test_a_full_disk(checkpoints, limit):
    """Wherever the space ends (data, table of contents, manifest), what was there stays and nothing half-made does."""
    before = {path: checksum(path) for path in checkpoints.rglob("*") if path.is_file()}
    tensors = example_tensors() | {"large": torch.ones(100_000)}
    state = example_state(750)
    if limit == 2_000_000:
        state = replace(state, recipe=3_000_000 * "#")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(SaveFailed) as caught:
            save(checkpoints, tensors, state, recipe_sha256=SHA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(caught.value)
    assert f"[Errno 27] File too large: '{checkpoints}/step_0000750" in text
    assert "\n" not in text
    assert "step_0000750) was not saved, the previous checkpoint, step_0000500, is intact" in text
    assert {path: checksum(path) for path in checkpoints.rglob("*") if path.is_file()} == before | {
        checkpoints / ".lock": checksum(checkpoints / ".lock")
    }
    save(checkpoints, tensors, state, recipe_sha256=SHA)


def test_a_pointer_that_cannot_be_written(checkpoints):
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    with pytest.raises(SaveFailed, match="is saved, but `latest` could not be written"):
        save(checkpoints, example_tensors(), example_state(750), recipe_sha256=SHA)
    read_manifest(checkpoints / "step_0000750")
    assert retain(checkpoints, 1) == []  # what it names is not known
    with pytest.raises(UserError, match="Is a directory"):
        newest_valid(checkpoints)
