"""Saves beside the training: what was there when they began, to the byte, whatever comes later."""

import errno
import io
import multiprocessing
import os
import random
import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from engine.checkpoint.background import THREAD, Saver
from engine.checkpoint.layout import read_pointer
from engine.checkpoint.load import load, newest_valid
from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.retain import clean, retain
from engine.checkpoint.save import SaveFailed, save
from tests.checkpoint.examples import SHA, blank, example_state, example_tensors, same


def many_kinds() -> dict[str, torch.Tensor]:
    large = torch.arange(3000.0).reshape(50, 60)
    return example_tensors() | {
        "transposed": large.T,
        "view": large[7],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.full((2, 2), torch.nan)),
    }


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name != "expanded":
                tensor.fill_(1)


def test_the_bytes_are_those_of_a_save_that_is_waited_for(tmp_path):
    plain, beside, before = tmp_path / "plain", tmp_path / "beside", tmp_path / "before"
    for step in (1, 2):
        save(plain, many_kinds(), example_state(step), recipe_sha256=SHA)
    for folder in (beside, before):
        with Saver(folder, SHA, beside=folder == beside) as saver:
            saver.prepare(many_kinds())
            for step in (1, 2):
                tensors = many_kinds()
                saver.start(tensors, example_state(step))
                spoil(tensors)
                saver.wait()
        for step in ("step_0000001", "step_0000002"):
            assert read_manifest(folder / step) == read_manifest(plain / step)
        assert read_pointer(folder, "latest") == "step_0000002"


def test_nothing_is_named_before_it_is_committed_and_one_is_made_at_a_time(tmp_path):
    go, order = threading.Event(), []
    with Saver(tmp_path, SHA, before=go.wait, after=lambda: order.append(read_pointer(tmp_path, "latest"))) as saver:
        saver.start(many_kinds(), example_state(1))
        assert saver.under_way
        with pytest.raises(RuntimeError, match="wait for it first"):
            saver.start(many_kinds(), example_state(2))
        assert not list(tmp_path.iterdir())
        assert not order
        threading.Timer(0.2, go.set).start()
    assert order == ["step_0000001"]  # the end of the body waited
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD]


def test_a_thread_waits_for_copies_on_the_gpu_that_they_come_from(tmp_path, monkeypatch):
    """On its own it would be on the first GPU, where each rank's would take memory."""
    current, waited = [], []

    class Arrival:
        device = torch.device("cuda", 1)

        def synchronize(self) -> None:
            waited.append((threading.current_thread().name, *current))

    @contextmanager
    def within(device):
        current.append(device)
        yield
        current.pop()

    copy = Saver._copy
    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(Saver, "_copy", lambda saver, shards: copy(saver, shards) or Arrival())
    with Saver(tmp_path, SHA) as saver:
        saver.start(many_kinds(), example_state(1))
        saver.wait()
    assert waited == [(THREAD, torch.device("cuda", 1))]


def test_a_failure_waits_for_who_asks_and_the_next_save_is_whole(tmp_path):
    def fail() -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with Saver(tmp_path, SHA, before=fail) as saver:
        saver.start(many_kinds(), example_state(1))
        with pytest.raises(SaveFailed, match="No space left on device: 'somewhere'"):
            saver.wait()
        assert not list(tmp_path.iterdir())
        saver.before = None
        copies = {index: copy.data_ptr() for index, copy in saver._copies.items()}
        saver.start(many_kinds(), example_state(2))
        saver.wait()
        assert copies == {index: copy.data_ptr() for index, copy in saver._copies.items()}
    into = blank(many_kinds())
    load(tmp_path / "step_0000002", into)
    assert all(same(into[name], tensor) for name, tensor in many_kinds().items())


def test_a_failure_that_nobody_asks_for_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with Saver(tmp_path / "file", SHA) as saver:
        saver.start(many_kinds(), example_state(1))
    assert "warning: the save under way failed: checkpoint (" in capsys.readouterr().err


class RefusedOnce:
    """A call of the system, which fails at one of its uses by a save."""

    def __init__(self, call, number: int):
        self.call, self.number, self.uses = call, number, 0

    def __call__(self, *arguments, **more):
        if threading.current_thread().name == THREAD:
            self.uses += 1
            if self.uses == self.number:
                raise OSError(errno.EIO, "Input/output error", "somewhere")
        return self.call(*arguments, **more)


RARE = [(io, "open"), (os, "open"), (os, "mkdir"), (os, "stat"), (os, "scandir")]
CALLS = [(os, "fsync"), (os, "replace"), *(pytest.param(*call, marks=pytest.mark.faults) for call in RARE)]


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_whichever_call_of_the_system_fails_what_was_there_stays(checkpoints, module, name):
    """Each of its uses in turn; then the next save is whole, and what half a one left is cleaned up."""

    def make(saver: Saver, step: int) -> None:
        saver.start(example_tensors(), example_state(step))
        saver.wait()

    for number in range(1, 100):
        first, step, last = (500 + 3 * number + more for more in range(3))
        refused = RefusedOnce(getattr(module, name), number)
        with Saver(checkpoints, SHA) as saver:
            make(saver, first)
            with pytest.MonkeyPatch.context() as patched, suppress(SaveFailed):
                patched.setattr(module, name, refused)
                make(saver, step)
            assert read_manifest(newest_valid(checkpoints)).step in (first, step)
            make(saver, last)
        clean(checkpoints)
        retain(checkpoints, 1)
        assert {path.name for path in checkpoints.iterdir()} == {f"step_{last:07d}", "latest", ".lock"}
        if refused.uses < number:
            return
    raise AssertionError("it never came to an end")


def value(step: int) -> dict[str, torch.Tensor]:
    return {f"weights.{number}": torch.full((500, 500), float(step)) for number in range(10)}


def save_until_killed(folder: Path, seconds: float, first: int) -> None:
    torch.set_num_threads(1)
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    with Saver(folder, SHA) as saver:
        for step in range(first, first + 1000):
            tensors = value(step)
            saver.start(tensors, example_state(step))
            spoil(tensors)
            saver.wait()


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.faults)])
def test_a_kill_at_any_moment_leaves_what_was_committed(tmp_path, kills):
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    newest, cut_off = 0, 0
    for kill in range(9 * kills):
        if kill >= kills and newest > 0:
            break
        # On a machine that is busy with other things the first save may take longer: then later kills come later.
        seconds = draw.uniform(0.1, 0.6) * (1 + kill // kills)
        process = context.Process(target=save_until_killed, args=(tmp_path, seconds, newest + 1))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        latest = read_pointer(tmp_path, "latest")
        found = newest_valid(tmp_path)
        step = 0 if found is None else read_manifest(found).step
        assert step >= newest
        assert latest in (None, f"step_{step:07d}", f"step_{step - 1:07d}")
        if found is not None:
            into = blank(value(step))
            load(found, into)
            assert all(same(into[name], tensor) for name, tensor in value(step).items())
        assert not list(tmp_path.glob("*.damaged-*"))
        newest, cut_off = step, cut_off + len(clean(tmp_path))
    assert newest > 0
    assert kills < 20 or cut_off > 0, "some kills came while a save was written"
