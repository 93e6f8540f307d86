"""`engine.run` as a user meets it: real commands, signals and mistakes, and what lies in the folder afterwards."""

import fcntl
import json
import signal
import socket
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from engine.checkpoint.manifest import read_manifest
from engine.files import lock
from tests.distributed.commands import (
    ON_LINUX,
    ONE_PROCESS,
    QUICKSTART,
    SMALL,
    TORCHRUN,
    TWO_RANKS,
    Command,
    Ended,
    forked,
    overrides,
    resumed_at,
    rows,
    run,
    stopped_at,
    timeless,
)
from tests.distributed.launch import environment

pytestmark = ON_LINUX

IMAGES, BROKEN = 40, ("image_05.png", "image_23.jpg")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """{path: (time, bytes)} of all that a run has written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "recipe.yaml")]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def assert_free(folder: Path) -> None:
    """No process holds the folder any more."""
    for path in (folder / ".lock", folder / "checkpoints/.lock"):
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- runs that are stopped in every way, and one that is not ---------------------------------------------------------


class Stories(NamedTuple):
    """Folders of runs with the same trajectory, and how their launches ended."""

    killed: Path  # two ranks; its launcher was killed while loading and while training, then Ctrl-C, then finished
    deaths: list[Ended]
    terminated: Path  # one process; SIGTERM, twice, then finished
    terminations: list[Ended]
    unbroken: Path  # two ranks, with kNN; then the same command, then more steps
    commands: list[Ended]
    before_more: tuple[dict, dict]  # `contents` after the first and the second command
    last: int  # step of the first command's end


def signalled(arguments: list[str], number: int, *, after: list[str], times: int = 1, launch: tuple) -> Ended:
    with Command(*launch, QUICKSTART, *arguments) as command:
        for text in after:
            command.wait_for(text)
        for _ in range(times):
            command.process.send_signal(number)
            time.sleep(0.02)  # else the system may make one of two
        return command.end()


def killed_and_interrupted(folder: Path) -> list[Ended]:
    def launch(number: int, *after: str) -> Ended:
        return signalled(overrides(folder), number, after=list(after), launch=TWO_RANKS)

    deaths = [launch(signal.SIGKILL, "loading PyTorch"), launch(signal.SIGKILL, "step 5/")]
    return [*deaths, launch(signal.SIGINT, "resumed ", "\nstep ")]


def terminated_twice(folder: Path) -> list[Ended]:
    return [signalled(overrides(folder), signal.SIGTERM, after=["step 3/"], times=2, launch=ONE_PROCESS)]


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Stories:
    killed, terminated, unbroken = (tmp_path_factory.mktemp(name) / "run" for name in ("killed", "term", "unbroken"))
    with ThreadPoolExecutor(2) as pool:
        deaths, terminations = pool.submit(killed_and_interrupted, killed), pool.submit(terminated_twice, terminated)
        deaths, terminations = deaths.result(), terminations.result()
    last = max(stopped_at(deaths[-1]), stopped_at(terminations[-1])) + 3
    for ranks, folder, story in ((2, killed, deaths), (0, terminated, terminations)):
        story.append(forked(ranks, QUICKSTART, *overrides(folder, train__max_steps=last)))
    commands, before_more = [], []
    for steps in (last, last, last + 2):
        monitored = {"evaluate__knn_every_epochs": 1, "evaluate__knn_bank": 20}
        arguments = overrides(unbroken, train__max_steps=steps, **monitored)
        before_more.append(contents(unbroken))
        commands.append(forked(2, QUICKSTART, *arguments))
    return Stories(killed, deaths, terminated, terminations, unbroken, commands, tuple(before_more[1:]), last)


def test_a_fresh_run_leaves_what_is_promised(stories):
    first, files = stories.commands[0], stories.before_more[0]
    assert first.code == 0, first
    assert "step 0: knn_top1 0." in first.out
    assert f"step {stories.last}: knn_top1 0." in first.out
    for word in ("ranks ", "data ", "schedule ", "rates ", "loss ", "result ", "time ", "files ", "next "):
        assert f"\n{word} " in first.out, (word, first.out)
    assert f"checkpoints/step_{stories.last:07d}/" in first.out
    found = [json.loads(line) for line in files["metrics.jsonl"][1].splitlines()]
    assert [row["step"] for row in found if "loss" in row] == list(range(1, stories.last + 1))
    assert [row["step"] for row in found if "knn_top1" in row] == [0, stories.last]
    kept = [f"step_{stories.last:07d}", f"step_{(stories.last - 1) // 2 * 2:07d}"]
    assert files["checkpoints/latest"][1].decode().strip() == kept[0]
    assert {f"checkpoints/{name}/MANIFEST.json" for name in kept} == {f for f in files if f.endswith("MANIFEST.json")}
    assert any(name.startswith("tensorboard/events") for name in files)
    assert yaml.safe_load((stories.unbroken / "recipe.yaml").read_text())["model"]["dim"] == SMALL["model.dim"]


def test_the_same_command_finds_the_run_at_its_end_and_changes_nothing(stories):
    after, again = stories.before_more[1], stories.commands[1]
    assert again.code == 0, again
    assert f"step_{stories.last:07d} at step {stories.last}: stopped by train.max_steps\n" in again.out
    assert after == stories.before_more[0]


def test_more_steps_go_on_from_the_end(stories):
    more, before = stories.commands[2], stories.before_more[1]["metrics.jsonl"][1]
    assert more.code == 0, more
    assert resumed_at(more) == stories.last
    now = (stories.unbroken / "metrics.jsonl").read_bytes()
    assert now.startswith(before)
    assert [(row["step"], "loss" in row) for row in map(json.loads, now[len(before) :].splitlines())] == [
        (stories.last + 1, True),
        (stories.last + 2, True),
        (stories.last + 2, False),
    ]


def test_a_killed_launcher_takes_its_ranks_along_and_the_run_goes_on(stories):
    loading, training, interrupted, finished = stories.deaths
    for death in (loading, training):
        assert death.code == -signal.SIGKILL
        assert "the launcher is gone: this rank exits; the newest checkpoint is kept" in death.err
    assert "resumed " not in training.out
    assert resumed_at(interrupted) >= 4, "the checkpoints of steps 2 and 4 were there when step 5 was logged"
    assert interrupted.code == 1
    assert finished.code == 0
    assert resumed_at(finished) == stopped_at(interrupted)
    assert_free(stories.killed)


def test_a_run_that_was_killed_and_interrupted_equals_one_that_was_not(stories):
    assert timeless(stories.killed) == timeless(stories.unbroken)[: stories.last]


def test_sigterm_saves_the_present_step_and_the_same_command_goes_on(stories):
    terminated, finished = stories.terminations
    assert terminated.code == 128 + signal.SIGTERM, terminated
    assert "Traceback" not in terminated.err
    assert finished.code == 0
    assert resumed_at(finished) == stopped_at(terminated) >= 3
    assert_free(stories.terminated)
    one, two = timeless(stories.terminated), timeless(stories.unbroken)[: stories.last]
    assert [row["step"] for row in one] == list(range(1, stories.last + 1))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-3)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of images without classes, some of them no images."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(IMAGES):
        name = f"image_{number:02d}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name)
    for name in BROKEN:
        (folder / name).write_text("no image")
    return folder


@pytest.fixture(scope="module")
def mistakes(stories, pictures, tmp_path_factory) -> dict[str, tuple[Ended, Path]]:
    """{mistake: how its command ended, its run.dir}."""
    folder = tmp_path_factory.mktemp("mistakes")
    tar = folder / "other.tar"
    with tarfile.open(tar, "w") as file:
        file.add(pictures, "")
    (folder / "a file").write_text("")
    (folder / "unreadable").mkdir()
    for number in range(IMAGES):
        (folder / f"unreadable/{number}.png").write_text("no image")
    (folder / "no compilers").mkdir()
    bare = {k: v for k, v in environment(PATH=str(folder / "no compilers")).items() if k != "CXX"}
    begun = stories.unbroken

    def mistake(name: str, env: dict | None = None, **values) -> tuple[Ended, Path]:
        at = Path(values.pop("at", folder / name))
        values = {"train__max_steps": 1} | values  # one that is overlooked ends soon
        if name == "batch":
            return run(*TWO_RANKS, QUICKSTART, *overrides(at, **values)), at
        return forked(0, QUICKSTART, *overrides(at, **values), env=env), at

    cases = [
        {"name": "in use", "at": folder / "held"},
        {"name": "key", "train__epoch": 3},
        {"name": "batch", "train__global_batch_size": 33},
        {"name": "root", "data__root": "no/such/place"},
        {"name": "nothing", "data__source": "folder", "data__root": folder / "unreadable"},
        {"name": "few", "train__global_batch_size": 5001},
        {"name": "timm", "model__name": "timm/vit_large_patch99", "model__freeze_patch_projection": "false"}
        | {f"model__{key}": "null" for key in ("dim", "depth", "heads", "patch_size")},
        {"name": "file", "at": folder / "a file"},
        {"name": "rate", "at": begun, "optimizer__base_lr": 0.5},
        {"name": "epochs", "at": begun, "train__epochs": 40},
        {"name": "images", "at": begun, "data__root": tar},
        {"name": "compiler", "parallel__compile": "true", "env": bare},
    ]
    (folder / "held").mkdir()
    with lock(folder / "held/.lock", "held by a test"):  # as another launch holds it
        return {case["name"]: mistake(**case) for case in cases}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("key", "train.epoch is no key of the recipe; did you mean train.epochs?"),
        ("root", "data.root (no/such/place) must exist; pass data.root=/path/to/images"),
        ("nothing", "data.root must hold readable images; "),
        ("few", "train.global_batch_size (5001) must be at most the number of images (5000 in data/fashion_mnist); "),
        ("timm", "model.name (timm/vit_large_patch99) must be a timm model; "),
        ("file", "run.dir ({at}) must be a writable folder: File exists; pass run.dir="),
        ("in use", "run.dir ({at}) must not be in use by another launch; stop it, or pass another run.dir"),
        ("rate", "run.dir ({at}) holds a run with other values: optimizer.base_lr (0.004 -> 0.5); "),
        ("epochs", "run.dir ({at}) holds a run with other values: train.epochs (30 -> 40); "),
        ("images", "data.root ({tar}) must hold the images that the run in {at} began with"),
        (
            "compiler",
            "parallel.compile (true) needs a C++ compiler on a CPU, and neither $CXX nor g++ is one; install g++",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(mistakes, name, line):
    ended, at = mistakes[name]
    assert ended.code == 2, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("error: " + line.format(at=at, tar=mistakes["key"][1].parent / "other.tar"))


def test_a_mistake_under_torchrun_is_said_once(mistakes):
    ended, _ = mistakes["batch"]
    assert ended.code == 1
    assert [line for line in ended.err.splitlines() if line.startswith("error: ")] == [
        "error: train.global_batch_size (33) must be divisible by the number of processes (2); "
        "start another number of processes or pass train.global_batch_size=34"
    ]
    assert "engine/" not in ended.err, "torchrun's own traceback, and none of ours"


@pytest.mark.parametrize("name", ["key", "batch", "timm", "compiler", "root", "few", "nothing"])
def test_a_wrong_recipe_leaves_no_folder(mistakes, name):
    assert not mistakes[name][1].exists()


def test_mistakes_about_a_run_leave_it_alone(stories, mistakes):
    assert mistakes["rate"][1] == stories.unbroken
    assert [row["step"] for row in rows(stories.unbroken) if "loss" in row] == list(range(1, stories.last + 3))
    assert yaml.safe_load((stories.unbroken / "recipe.yaml").read_text())["train"]["max_steps"] == stories.last + 2
    assert mistakes["file"][1].read_text() == ""


# ---- images without classes, unreadable images, a damaged checkpoint -------------------------------------------------


def test_unlabelled_and_unreadable_images_and_a_damaged_checkpoint(pictures, tmp_path):
    folder = tmp_path / "run"
    values = {"data__source": "folder", "data__root": pictures, "train__global_batch_size": 8, "train__max_steps": 5}
    values |= {"evaluate__knn_every_epochs": 1, "log__every_steps": 5, "checkpoint__every_steps": 4}
    values |= {"evaluate__online_probe": "true"}

    none_borne = forked(0, QUICKSTART, *overrides(tmp_path / "none borne", **values))
    assert none_borne.code == 2
    (refused,) = [line for line in none_borne.err.splitlines() if line.startswith("error: ")]
    assert refused.startswith(
        f"error: data.max_bad_fraction (0.0) must bear what cannot be read of data.root ({pictures})"
    )
    assert f": {len(BROKEN)} of {IMAGES + 1} images looked at" in refused
    assert all(f"{name} (" in refused for name in BROKEN)
    assert "Traceback" not in none_borne.err
    assert not (tmp_path / "none borne").exists()

    values |= {"data__max_bad_fraction": 0.5}
    arguments = overrides(folder, **values)
    borne = forked(0, QUICKSTART, *arguments)
    assert borne.code == 0, borne
    assert [line.split()[0] for line in borne.out.splitlines() if "kNN" in line] == ["monitor"]
    assert "kNN is off: it needs labelled validation images" in borne.out
    assert borne.out.count("online probe is off: it needs labelled validation images") == 1
    two_ranks = forked(2, QUICKSTART, *overrides(tmp_path / "two", **values))
    for name, ended in product(BROKEN, (borne, two_ranks)):
        assert ended.code == 0, ended
        assert sum(f"warning: {name} (" in line for line in ended.err.splitlines()) == 1
    states = [read_manifest(path / "checkpoints/step_0000004").state for path in (folder, tmp_path / "two")]
    assert [*states[0]["left_out"]["train"]] == ["5", "23"]
    assert [states[0][key] for key in ("left_out", "images")] == [states[1][key] for key in ("left_out", "images")]
    before = timeless(folder)
    assert [row["step"] for row in before] == [1, 5]
    assert before[-1]["bad_images"] == 0
    assert before[-1]["rankme"] > 1

    newest = folder / "checkpoints/step_0000005"
    with next(newest.glob("*.distcp")).open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    mended = forked(0, QUICKSTART, *arguments)
    assert mended.code == 0, mended
    assert f"warning: checkpoint {newest} is damaged: " in mended.err
    assert mended.err.count("it is set aside as step_0000005.damaged-1") == 1
    assert resumed_at(mended) == 4
    assert checkpoints(folder) == ["step_0000004", "step_0000005", "step_0000005.damaged-1"]
    assert timeless(folder) == before


# ---- two nodes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def on_two_nodes(arguments: list[str], places: tuple[Path, Path]) -> list[Ended]:
    """The same command on two nodes, which are two launchers on this machine, from their working directories."""
    rendezvous = {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_ID": "test"}
    env = environment(**rendezvous, PET_NPROC_PER_NODE="1")
    command = (*TORCHRUN, "--nnodes", "2", "-m", "engine.run", QUICKSTART, *arguments)
    with Command(*command, cwd=places[0], env=env) as one, Command(*command, cwd=places[1], env=env) as other:
        return [one.end(), other.end()]


@pytest.mark.slow
def test_two_nodes_train_and_resume(tmp_path):
    for steps in (2, 4):
        nodes = on_two_nodes(overrides(Path("run"), train__max_steps=steps), (tmp_path, tmp_path))
        assert [node.code for node in nodes] == [0, 0], nodes
        said = "".join(node.out for node in nodes)
        assert said.count("\nresult ") == 1
        assert ("resumed   run/checkpoints/step_0000002 at step 2 of 4" in said) == (steps == 4)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert_free(tmp_path / "run")


@pytest.mark.slow
def test_a_folder_that_one_node_does_not_see(tmp_path):
    places = tmp_path / "here", tmp_path / "there"
    for place in places:
        place.mkdir()
    nodes = on_two_nodes(overrides(Path("run")), places)
    said = [[line for line in node.err.splitlines() if line.startswith("error: ")] for node in nodes]
    assert [node.code for node in nodes] == [1, 1]
    assert max(map(len, said)) == 1, "once on a node, unless its launcher heard of the other's end first"
    assert {line for lines in said for line in lines} == {
        "error: rank 1: run.dir (run) must be visible to every node; pass a shared path"
    }
    assert not any("engine/" in node.err for node in nodes)
    assert not list(tmp_path.rglob(".visible-*"))
    assert not list(tmp_path.rglob("checkpoints"))
