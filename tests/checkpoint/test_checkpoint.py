"""Checkpoints in one process: what goes in comes out, and nothing damaged or hostile is ever loaded."""

import copy
import errno
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from engine.checkpoint import layout
from engine.checkpoint.load import load, newest_valid, read_tensors
from engine.checkpoint.manifest import NAME, checksum, own_checksum, read_manifest, verify
from engine.checkpoint.retain import clean, retain
from engine.checkpoint.save import SaveFailed, save
from engine.errors import UserError

SHA = "0" * 64
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
STATE = {"sample": 7, "lr": 0.1 + 0.2, "recipe": {"model": {"name": "vit"}}, "best": None}


def example_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.weight": torch.randn(33, 7, generator=generator),
        "model.bias": torch.randn(9, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(2**53 + 1),
        "empty": torch.empty(0, 4, dtype=torch.float64),
    }


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: NaN payloads and signed zeros count."""

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(raw(one), raw(other))


def reseal(folder: Path, **changes) -> None:
    """What an attacker does who knows the format: a manifest that is right for the changed files."""
    content = json.loads((folder / NAME).read_text()) | changes
    content["files"] = {name: checksum(folder / name) for name in content["files"] if (folder / name).is_file()}
    content["manifest_sha256"] = own_checksum(content)
    (folder / NAME).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the steps 250 and 500."""
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (250, 500):
        save(checkpoints, step, example_tensors(), STATE | {"step": step}, recipe_sha256=SHA)
    return checkpoints


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


# ---- Round trips -----------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=40, deadline=None)
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
    path = save(folder, 3, tensors, {"seed": seed}, recipe_sha256=SHA)
    into = blank(tensors)
    assert load(path, into) == {"seed": seed}
    assert all(same(into[name], tensors[name]) for name in tensors)
    assert {name: True for name in tensors} == {name: same(t, tensors[name]) for name, t in read_tensors(path)}
    shutil.rmtree(folder)


def test_loading_is_in_place_and_keeps_parameters_parameters(checkpoints):
    tensors = blank(example_tensors())
    parameter = tensors["model.weight"] = torch.nn.Parameter(tensors["model.weight"])
    storage = parameter.data_ptr()
    state = load(checkpoints / "step_0000500", tensors)
    assert state == STATE | {"step": 500}
    assert same(parameter, example_tensors()["model.weight"])
    assert parameter.data_ptr() == storage and parameter.requires_grad and parameter.is_leaf


def test_a_view_of_large_memory_is_saved_alone(tmp_path):
    path = save(tmp_path, 1, {"row": torch.zeros(1000, 1000)[3]}, {}, recipe_sha256=SHA)
    assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


def test_equal_states_give_equal_files(saved):
    one, other = (read_manifest(saved / name).files for name in ("step_0000250", "step_0000500"))
    assert one == other


def test_manifest_says_what_is_there(saved):
    manifest = read_manifest(saved / "step_0000500")
    assert (manifest.step, manifest.world_size, manifest.recipe_sha256) == (500, 1, SHA)
    assert manifest.tensors["model.bias"] == {"shape": [9], "dtype": "bfloat16"}
    assert manifest.state == STATE | {"step": 500}
    assert json.loads((saved / "step_0000500" / NAME).read_text())["format"] == 1
    assert {".metadata"} < set(manifest.files) == {p.name for p in (saved / "step_0000500").iterdir()} - {NAME}
    assert (saved / "latest").read_text() == "step_0000500\n"


def test_read_tensors_takes_a_part_and_refuses_unknown_names(saved):
    path = saved / "step_0000500"
    assert [name for name, _ in read_tensors(path, ["optimizer.step"])] == ["optimizer.step"]
    with pytest.raises(UserError, match="nothing is not in the checkpoint"):
        read_tensors(path, ["optimizer.step", "nothing"])


def test_mismatches_are_listed_before_anything_changes(saved):
    tensors = blank(example_tensors())
    tensors["model.weight"] = torch.zeros(33, 8)
    tensors["model.bias"] = tensors["model.bias"].float()
    del tensors["empty"]
    tensors |= {f"new{number}": torch.zeros(1) for number in range(9)}
    with pytest.raises(UserError) as caught:
        load(saved / "step_0000500", tensors)
    text = str(caught.value)
    assert "new0 is not in the checkpoint" in text and "empty of the checkpoint has no place" in text
    assert text.endswith("and 2 more") and "\n" not in text
    assert not any(tensor.any() for tensor in tensors.values())
    with pytest.raises(UserError, match=r"float32 \[33, 7\] in the checkpoint, float32 \[33, 8\] here"):
        load(saved / "step_0000500", {"model.weight": torch.zeros(33, 8)}, ignore=("",))
    with pytest.raises(UserError, match="nothing is not in"):
        load(saved / "step_0000500", {"nothing": torch.zeros(1)}, ignore=("",))
    part = {"model.weight": torch.zeros(33, 7)}
    load(saved / "step_0000500", part, ignore=("",))
    assert same(part["model.weight"], example_tensors()["model.weight"])


@pytest.mark.parametrize(
    "state", [{"x": torch.ones(1)}, {1: "x"}, {"a": [{"b": {2: 3}}]}, {"x": float("nan")}, {"x": {1}}]
)
def test_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(TypeError, match="JSON"):
        save(tmp_path / "checkpoints", 1, {}, state, recipe_sha256=SHA)
    assert not (tmp_path / "checkpoints").exists()


# ---- Saving again ----------------------------------------------------------------------------------------------------


def test_a_valid_checkpoint_of_the_same_step_is_kept(checkpoints):
    before = (checkpoints / "step_0000250").stat().st_mtime_ns, checksum(checkpoints / "step_0000250" / NAME)
    (checkpoints / "latest").unlink()
    assert save(checkpoints, 250, example_tensors(), {}, recipe_sha256=SHA) == checkpoints / "step_0000250"
    assert before == ((checkpoints / "step_0000250").stat().st_mtime_ns, checksum(checkpoints / "step_0000250" / NAME))
    assert (checkpoints / "latest").read_text() == "step_0000250\n"
    with pytest.raises(SaveFailed, match="another recipe"):
        save(checkpoints, 250, example_tensors(), {}, recipe_sha256="1" * 64)
    assert len(list(checkpoints.glob("step_*"))) == 2


def test_a_damaged_checkpoint_makes_way_for_a_new_one(checkpoints, capsys):
    (checkpoints / "step_0000500" / "__0_0.distcp").write_bytes(b"")
    save(checkpoints, 500, example_tensors(), STATE, recipe_sha256=SHA)
    assert "step_0000500.damaged-1" in capsys.readouterr().err
    assert (checkpoints / "step_0000500.damaged-1" / "__0_0.distcp").read_bytes() == b""
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"


def test_a_folder_that_another_run_writes_to_is_refused(checkpoints):
    with layout.writing(checkpoints) as locked, pytest.raises(SaveFailed, match="one run"):
        assert locked
        save(checkpoints, 750, example_tensors(), STATE, recipe_sha256=SHA)
    save(checkpoints, 750, example_tensors(), STATE, recipe_sha256=SHA)


@pytest.mark.parametrize("limit", [0, 300, 20_000, 400_000, 2_000_000])
def test_a_full_disk(checkpoints, limit):
    """Wherever the space ends (data, table of contents, manifest), what was there stays and nothing half-made does."""
    before = {path: checksum(path) for path in checkpoints.rglob("*") if path.is_file()}
    tensors = example_tensors() | {"large": torch.ones(100_000)}
    many = {"list": list(range(500_000))} if limit == 2_000_000 else {}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(SaveFailed) as caught:
            save(checkpoints, 750, tensors, many, recipe_sha256=SHA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(caught.value)
    assert "[Errno 27] File too large" in text and "\n" not in text
    assert "step_0000750) was not saved, the previous checkpoint, step_0000500, is intact" in text
    assert {path: checksum(path) for path in checkpoints.rglob("*") if path.is_file()} == before | {
        checkpoints / ".lock": checksum(checkpoints / ".lock")
    }
    save(checkpoints, 750, tensors, many, recipe_sha256=SHA)


def test_a_pointer_that_cannot_be_written(checkpoints):
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    with pytest.raises(SaveFailed, match="is saved, but `latest` could not be written"):
        save(checkpoints, 750, example_tensors(), STATE, recipe_sha256=SHA)
    read_manifest(checkpoints / "step_0000750")
    assert retain(checkpoints, 1) == []  # what it names is not known
    with pytest.raises(UserError, match="Is a directory"):
        newest_valid(checkpoints)


# ---- Damage ----------------------------------------------------------------------------------------------------------


def expect_fallback(checkpoints: Path, capsys, reason: str) -> None:
    damaged = checkpoints / "step_0000500"
    with pytest.raises(UserError) as caught:
        load(damaged, blank(example_tensors()))
    assert "\n" not in str(caught.value) and str(damaged) in str(caught.value)
    assert newest_valid(checkpoints) == checkpoints / "step_0000250"
    said = capsys.readouterr().err
    assert reason in said and "step_0000500.damaged-1" in said
    assert not damaged.exists() and (checkpoints / "step_0000500.damaged-1").exists()
    assert load(checkpoints / "step_0000250", blank(example_tensors()))["step"] == 250


FILES = ["MANIFEST.json", ".metadata", "__0_0.distcp"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_truncated_file(checkpoints, capsys, name, kept):
    file = checkpoints / "step_0000500" / name
    content = file.read_bytes().rstrip()
    file.write_bytes(content[: min(int(kept * len(content)), len(content) - 1)])
    expect_fallback(checkpoints, capsys, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(checkpoints, capsys, name):
    (checkpoints / "step_0000500" / name).unlink()
    expect_fallback(checkpoints, capsys, name)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(saved, tmp_path_factory, name, where, bit):
    folder = shutil.copytree(saved / "step_0000500", tmp_path_factory.mktemp("flip") / "step_0000500")
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest)
    except UserError:
        return
    finally:
        shutil.rmtree(folder.parent)
    # White space of the manifest may change, what it says may not.
    assert name == NAME and manifest == read_manifest(saved / "step_0000500")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}', b"null", b'{"step": true, "files": []}'],
)
def test_a_manifest_that_is_none(checkpoints, capsys, content):
    (checkpoints / "step_0000500" / NAME).write_bytes(content)
    expect_fallback(checkpoints, capsys, NAME)


def test_a_newer_format(checkpoints, capsys):
    reseal(checkpoints / "step_0000500", format=2)
    expect_fallback(checkpoints, capsys, "format is 2")


def test_an_extra_data_file(checkpoints, capsys):
    (checkpoints / "step_0000500" / "__7_0.distcp").write_bytes(b"x")
    expect_fallback(checkpoints, capsys, "__7_0.distcp is not in MANIFEST.json")


def test_a_step_under_another_name(checkpoints, capsys):
    shutil.copytree(checkpoints / "step_0000500", checkpoints / "step_0000900")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    assert "manifest is of step 500" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("x"), lambda p: p.symlink_to("nowhere")])
def test_things_with_a_checkpoint_s_name(checkpoints, capsys, make):
    make(checkpoints / "step_0000900")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    assert os.path.lexists(checkpoints / "step_0000900.damaged-1")
    make(checkpoints / "step_0000900")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    assert os.path.lexists(checkpoints / "step_0000900.damaged-1")
    assert os.path.lexists(checkpoints / "step_0000900.damaged-2")


def test_folders_without_checkpoints(tmp_path, capsys):
    assert newest_valid(tmp_path / "nothing") is None
    assert newest_valid(tmp_path) is None
    (tmp_path / "latest").write_bytes(b"\xffstep_0000006\n")
    assert newest_valid(tmp_path) is None
    assert "names '\ufffdstep_0000006', which is not there" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="must be a readable folder"):
        newest_valid(tmp_path / "file")
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(UserError, match="must be a readable folder"):
        save(tmp_path / "file", 1, {}, {}, recipe_sha256=SHA)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9_999_999, 10_000_000):
        save(tmp_path, step, {}, {}, recipe_sha256=SHA)
    assert newest_valid(tmp_path) == tmp_path / "step_10000000"


# ---- Hostile content under a correct manifest ------------------------------------------------------------------------


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
    save(checkpoints, 500, example_tensors(), {}, recipe_sha256=SHA)
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


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b", "MANIFEST.json", "nul\0"])
def test_a_manifest_that_leaves_the_folder(checkpoints, capsys, name):
    folder = checkpoints / "step_0000500"
    (checkpoints / "secret").write_text("x")
    content = json.loads((folder / NAME).read_text())
    content["files"][name] = {"bytes": 1, "sha256": checksum(checkpoints / "secret")["sha256"]}
    content["manifest_sha256"] = own_checksum(content)
    (folder / NAME).write_text(json.dumps(content))
    expect_fallback(checkpoints, capsys, "no file of this folder")


@pytest.mark.parametrize("name", FILES)
def test_links_and_pipes_in_the_place_of_files(checkpoints, capsys, name):
    folder = checkpoints / "step_0000500"
    (folder / name).rename(checkpoints / "elsewhere")
    (folder / name).symlink_to(checkpoints / "elsewhere")
    twin = shutil.copytree(checkpoints / "step_0000250", checkpoints / "step_0000900")
    (twin / name).unlink()
    os.mkfifo(twin / name)
    with pytest.raises(UserError, match="not a plain file"):
        read_manifest(twin)
    expect_fallback(checkpoints, capsys, "not a plain file")


# ---- Retention and leftovers -----------------------------------------------------------------------------------------


def test_retain_spares_what_is_new_or_named(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, {"x": torch.ones(1)}, {}, recipe_sha256=SHA)
    layout.point(tmp_path, "best", tmp_path / "step_0000002")
    layout.point(tmp_path, "latest", tmp_path / "step_0000003")
    (tmp_path / "step_0000001.damaged-1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    removed = retain(tmp_path, 2)
    assert [path.name for path in removed] == ["step_0000004", "step_0000001"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "step_0000002", "step_0000003", "step_0000005", "step_0000006",
        "step_0000001.damaged-1", "notes.txt", "latest", "best", ".lock",
    }  # fmt: skip
    assert retain(tmp_path, 2) == []
    with pytest.raises(ValueError, match="keep"):
        retain(tmp_path, 0)


def test_clean_removes_leftovers_and_nothing_else(checkpoints, capsys):
    kept = {path.name for path in checkpoints.iterdir()} | {
        "step_0000001.damaged-1",
        "step_0000001.tmp-mine",
        "a.tmp-00000000",
    }
    (checkpoints / "step_0000001.damaged-1").mkdir()
    (checkpoints / "step_0000001.tmp-mine").mkdir()
    (checkpoints / "a.tmp-00000000").mkdir()
    shutil.copytree(checkpoints / "step_0000500", checkpoints / "step_0000750.tmp-0123abcd")
    shutil.copytree(checkpoints / "step_0000500", checkpoints / "step_0000100.removed-0123abcd")
    (checkpoints / "latest.tmp-0123abcd").write_text("x")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    with layout.writing(checkpoints):
        assert clean(checkpoints) == []
    assert "another process is writing" in capsys.readouterr().err
    assert len(clean(checkpoints)) == 3
    assert {path.name for path in checkpoints.iterdir()} == kept
    assert clean(checkpoints / "nothing") == []
    assert not (checkpoints / "nothing").exists()
    assert clean(checkpoints / "latest") == []
    assert "must be a readable folder" in capsys.readouterr().err


def test_state_is_not_changed_by_saving(tmp_path):
    state = copy.deepcopy(STATE) | {"pair": (1, 2)}
    path = save(tmp_path, 1, {}, state, recipe_sha256=SHA)
    assert state["pair"] == (1, 2)
    assert load(path, {}) == STATE | {"pair": [1, 2]}


def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    """A network file system that stumbles costs no checkpoint."""
    folder = save(tmp_path, 3, {"x": torch.ones(2)}, {}, recipe_sha256="r")

    def stumble(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr("engine.checkpoint.manifest.checksum", stumble)
        with pytest.raises(UserError, match="must be readable: Stale file handle; run the same command again"):
            newest_valid(tmp_path)
    assert newest_valid(tmp_path) == folder
