"""Saves beside the training: a step waits until what is saved has been copied, and a thread does the rest."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpoint import dcp
from engine.checkpoint.plan import Plan, entries_of, make_plan
from engine.checkpoint.save import commit
from engine.checkpoint.state import RunState
from engine.distributed.agreement import rank
from engine.logger import warn

THREAD = "save"
LEAVE_SECONDS = 60.0  # at most, for a save under way when its run fails


class Saver:
    """Makes one checkpoint of a run at a time. All ranks call every method together; each rank copies what it writes.

    A context manager: the end of its body waits LEAVE_SECONDS at most for a save under way.

    Args:
        checkpoints: the folder.
        group: gloo, and used by nothing else, since collectives of two threads must not meet in one.
        beside: false: a save is made where it is started, without a copy. The bytes of a checkpoint are the same.
        before: called on rank 0 before anything is written (engine.checkpoint.save.commit).
        after: called on rank 0 after the commit.
    """

    def __init__(
        self,
        checkpoints: Path,
        recipe_sha256: str,
        group: dist.ProcessGroup | None = None,
        *,
        beside: bool = True,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ):
        self.checkpoints, self.recipe_sha256, self.group = checkpoints, recipe_sha256, group
        self.beside, self.before, self.after = beside, before, after
        self._plan: Plan | None = None
        self._copies: dcp.Shards = {}  # kept from save to save: on a GPU's host, memory that is pinned
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.under_way = False  # started and not waited for

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:  # it ends by itself as long as all ranks live, and else with this process
            self._thread.join(LEAVE_SECONDS)
        if self._error is not None and rank(self.group) == 0:
            warn(f"the save under way failed: {self._error}")

    def prepare(self, tensors: dict[str, torch.Tensor]) -> None:
        """Where saves are beside the training, plan them so too: with many ranks that takes a while."""
        if self.beside:
            self._begin(self._make_plan, tensors)

    def start(self, tensors: dict[str, torch.Tensor], state: RunState) -> None:
        """Begin to save, with the arguments of engine.checkpoint.save.save; returns when the tensors may change."""
        if self.under_way:
            raise RuntimeError("a save is under way: wait for it first")
        self.wait()  # for the plan
        if self._plan is None or self._plan.entries != entries_of(tensors):
            self._make_plan(tensors)
        self.under_way = True
        shards = dcp.shards_of(tensors, self._plan)
        if self.beside:
            self._begin(self._save, self._copies, state, self._copy(shards))
        else:
            self._keep_error(self._save, shards, state, None)

    def wait(self) -> None:
        """Returns when no save is under way. Raises what the last one raised, which is the same on all ranks."""
        if self._thread is not None:
            self._thread.join()
        self.under_way, self._thread = False, None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _begin(self, work: Callable[..., None], *arguments: Any) -> None:
        self._thread = threading.Thread(target=self._keep_error, args=(work, *arguments), name=THREAD, daemon=True)
        self._thread.start()

    def _keep_error(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._error = error

    def _make_plan(self, tensors: dict[str, torch.Tensor]) -> None:
        self._plan, self._copies = make_plan(tensors, self.group), {}

    def _copy(self, shards: dcp.Shards) -> torch.cuda.Event | None:
        """Copy to the host; what a GPU changes later waits for that there, and nothing here does."""
        for index, shard in shards.items():
            if index not in self._copies:
                self._copies[index] = torch.empty_like(shard, device="cpu", pin_memory=shard.is_cuda)
            self._copies[index].copy_(shard, non_blocking=True)
        if not any(shard.is_cuda for shard in shards.values()):
            return None
        arrival = torch.cuda.Event()
        arrival.record()
        return arrival

    def _save(self, shards: dcp.Shards, state: RunState, arrival: torch.cuda.Event | None) -> None:
        if arrival is not None:
            with torch.cuda.device(arrival.device):  # a new thread is on the first GPU, and would take memory there
                arrival.synchronize()
        sha, group = self.recipe_sha256, self.group
        commit(self.checkpoints, self._plan, shards, state, recipe_sha256=sha, group=group, before=self.before)
        if self.after is not None and rank(group) == 0:
            self.after()
