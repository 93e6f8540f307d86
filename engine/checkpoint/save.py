"""Write a checkpoint so that it is there completely or not at all."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from engine.checkpoint import dcp, layout
from engine.checkpoint.manifest import Damaged, Manifest, checksum, read_manifest, verify, write_manifest
from engine.checkpoint.plan import Plan, make_plan
from engine.checkpoint.state import RunState
from engine.distributed.agreement import agreement, all_gather, broadcast, rank, size
from engine.errors import RunFailed, SystemRefused, UserError
from engine.files import aside, publish, remove_or_warn


class SaveFailed(RunFailed):
    """The system did not write the checkpoint, which may succeed later; what was there before is as it was."""


def save(
    checkpoints: Path,
    tensors: dict[str, torch.Tensor],
    state: RunState,
    *,
    recipe_sha256: str,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save `tensors` and `state` as checkpoints/step_<state.step>, which `latest` then names. All of `group` call it.

    tensors: the same names, whole shapes and dtypes on every rank. DTensors are written in shards, each once; a plain
    tensor must be equal on all ranks and is written by one of them. state: that of rank 0 counts. `group` must carry
    CPU messages (gloo).

    Returns the folder. Raises what `commit` raises, and ValueError for a mistake of the caller: ranks hand in different
    tensors.
    """
    plan = make_plan(tensors, group)
    shards = dcp.shards_of(tensors, plan)
    return commit(checkpoints, plan, shards, state, recipe_sha256=recipe_sha256, group=group)


def commit(
    checkpoints: Path,
    plan: Plan,
    shards: dcp.Shards,
    state: RunState,
    *,
    recipe_sha256: str,
    group: dist.ProcessGroup | None,
    before: Callable[[], None] | None = None,
) -> Path:
    """`save` of shards that lie ready.

    A valid checkpoint of this step and recipe that is already there is kept as it is. Returns the folder.
    before: rank 0 calls it first.

    Raises, on every rank: SaveFailed where any rank cannot write (what was there before is as it was); UserError where
    the folder is another run's; what `before` raises, an OSError as SaveFailed.
    """
    final = Path(checkpoints) / layout.step_name(state.step)
    content, draft = Manifest(state.step, size(group), recipe_sha256, {}, plan.entries, state.to_json()), None
    with ExitStack() as held:
        try:
            with agreement(group):
                if rank(group) == 0:
                    if before is not None:
                        before()
                    held.enter_context(layout.writing(final.parent))
                    draft = _begin(final, recipe_sha256)
            draft = broadcast(draft, group)
            if draft is not None:
                dcp.write(draft, plan, shards, group)
                _finish(draft, final, content, group)
        except UserError as error:
            if draft is not None and rank(group) == 0:
                remove_or_warn(draft, ", the next start tries again")
            raise (SaveFailed if isinstance(error, SystemRefused) else UserError)(_lost(final, error)) from error
        _name_latest(final, group)
    return final


def _begin(final: Path, recipe_sha256: str) -> Path | None:
    """A fresh folder to write to, or None where the checkpoint is there already. An invalid one makes way."""
    if final.exists():
        try:
            found = read_manifest(final)
            verify(final, found)
        except Damaged as error:
            layout.set_aside(final, error.why)
        else:
            if found.recipe_sha256 != recipe_sha256:
                raise UserError(f"{final.name} exists and is of another recipe; use another run.dir")
            return None
    draft = aside(final, "tmp")
    draft.mkdir()
    return draft


def _finish(draft: Path, final: Path, content: Manifest, group: dist.ProcessGroup | None) -> None:
    files = _checksums(draft, group)
    with agreement(group):
        if rank(group) == 0:
            write_manifest(draft, replace(content, files=files))
            publish(draft, final)


def _checksums(draft: Path, group: dist.ProcessGroup | None) -> dict[str, dict]:
    """Size and checksum of every file: each rank reads those that it wrote, rank 0 also what no rank claims."""
    with agreement(group):
        mine = {file.name: checksum(file) for file in sorted(draft.glob(f"__{rank(group)}_*"))}
    files = {name: value for part in all_gather(mine, group) for name, value in part.items()}
    with agreement(group):
        if rank(group) == 0:
            there = {file.name for file in draft.iterdir()}
            if set(files) - there:
                raise UserError(f"{draft.parent} must be on a file system that all nodes share")
            files |= {name: checksum(draft / name) for name in sorted(there - set(files))}
    return files


def _name_latest(final: Path, group: dist.ProcessGroup | None) -> None:
    try:
        with agreement(group):
            if rank(group) == 0:
                layout.point(final.parent, "latest", final)
    except SystemRefused as error:
        raise SaveFailed(f"checkpoint ({final}) is saved, but `latest` could not be written: {error}") from error


def _lost(final: Path, error: UserError) -> str:
    try:
        earlier = [folder.name for folder in layout.checkpoint_folders(final.parent) if folder != final]
        kept = f"the previous checkpoint, {earlier[0]}, is intact" if earlier else "there is no earlier checkpoint"
    except UserError:
        kept = "earlier ones cannot be looked at now"
    return f"checkpoint ({final}) was not saved, {kept}: {error}"
