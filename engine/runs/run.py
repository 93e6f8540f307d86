"""The life of a run: a task in its run directory, from its newest checkpoint to the end of its plan."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.layout import read_pointer
from engine.checkpoint.load import newest_valid, read_state
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.retain import clean
from engine.checkpoint.state import RunState
from engine.data.hints import hints
from engine.data.jpeg import DECODERS, PILLOW, with_version, without_version
from engine.data.order import LAWS
from engine.data.outputs import check_run_directory
from engine.distributed.agreement import agreement, broadcast
from engine.distributed.signals import StopSignal
from engine.errors import RunFailed, SystemRefused, UserError, one_line
from engine.logger import say
from engine.recipe.identity import resume_differences
from engine.recipe.keys import show
from engine.recipe.load import loads, located
from engine.recipe.paths import expand
from engine.recipe.sections import Linear, Pretrain, Recipe
from engine.runs.auto import on_this_machine
from engine.runs.back import find_earlier, go_back
from engine.runs.changes import accept, check_images, find_changes, list_images
from engine.runs.directory import STOP, RunDirectory, check_same_task
from engine.runs.failures import failures_in_words, lost_ranks_in_words
from engine.runs.log import MetricsLog, Row
from engine.runs.saves import Saves
from engine.runs.task import Task
from engine.runs.trainer import Trainer
from engine.runs.trial import deterministic_as_asked


def run(task: Task, started: float, earlier: Path | None = None) -> Row:
    """Carry a task out to the end of its plan; a run that is found in its directory goes on.

    All ranks call it together. `started`: on the performance counter. `earlier`: the checkpoint of its own from which
    it goes on; None: the newest. Returns the monitor's row that counts, on every rank; {} where there is none.

    Raises:
        UserError, RunFailed, Interrupted: engine.door turns them into words and exit codes.
    """
    recipe, world = task.recipe, task.world
    path = expand(recipe.run.dir)
    with (
        task.reading(),  # first: before this run starts threads
        StopSignal(world, path / STOP) as stop,
        RunDirectory(path, world) as directory,
        failures_in_words(task, directory.checkpoints),
        as_deterministic_as_asked(task),
    ):
        stop.end_at_once()  # until there is a step that could be lost
        _say_opening(task)
        task.look_at_images()
        found = _found(directory, task, earlier)
        source = None if found else task.find_source()
        task.start(resumes=(found or source) is not None)
        if found is not None:
            task.resume(*found)
            accept(task, found[2])
            _say_resumed(found[0], task)
        elif source is not None:
            task.begin_with(*source)
        _say_decoder(task, found[2] if found else None)
        if found is None and world.is_first:
            for line in hints(task.splits.train, task.crops.reading):
                say(f"images    {line}")
        directory.write_recipe(located(task.written, task.recipe_file), task.made_by())
        list_images(task, directory.path)
        with agreement(world.host_group):
            resume_step = task.step if found else -1
            log = MetricsLog(directory.path, resume_step, monitor=task.monitor, enabled=world.is_first)
        # Inside of `saves`, whose end would else wait for a save that needs a lost rank.
        with Saves(task, log, directory) as saves, lost_ranks_in_words(task, directory.checkpoints):
            trainer = Trainer(task, log, saves, stop)
            trainer.seconds["start-up"] = time.perf_counter() - started
            trainer.run()
        _close(log, task)
        left = task.finish(directory.path)
        return _closing(task, directory, trainer, log, left)


def _close(log: MetricsLog, task: Task) -> None:
    try:
        with agreement(task.world.host_group):
            log.close()
    except SystemRefused as error:
        raise RunFailed(
            f"the log's last rows could not be written: {error}; the run is saved at step {task.step:,}: the same "
            "command makes them again"
        ) from error


@contextmanager
def as_deterministic_as_asked(task: Task) -> Iterator[None]:
    """For the whole run; a recipe that does not say `parallel.deterministic` leaves it as every door has it."""
    if task.parallel is None:
        yield
        return
    with deterministic_as_asked(task.parallel, task.fresh_trunk, task.crops.size, task.world) as task.refused:
        yield


def _found(directory: RunDirectory, task: Task, earlier: Path | None) -> tuple[Path, Manifest, RunState] | None:
    """The checkpoint that the run goes on from; None where it begins.

    Raises:
        UserError: on every rank, where the run was begun with other values, images or weights, or would be buried.
    """
    group, checkpoint = task.world.host_group, None
    clean(directory.checkpoints)
    with agreement(group):
        if task.world.is_first:
            checkpoint = find_earlier(directory, earlier)
    checkpoint = broadcast(checkpoint, group)
    goes_back_to = earlier if checkpoint is not None else None
    checkpoint = checkpoint or newest_valid(directory.checkpoints, group)
    with agreement(group):
        if checkpoint is None:
            directory.check_fresh(task.recipe)
            check_run_directory(directory.path, task.sources())
            return None
    manifest, state = read_state(checkpoint, group)
    with agreement(group):
        check_same_recipe(state, manifest, task.recipe)
    task.changes = find_changes(task, state, directory.path)
    with agreement(group):
        check_images(task, state)
        task.check_resume(state)
    with agreement(group):
        if goes_back_to is not None and task.world.is_first:
            go_back(directory, checkpoint, goes_back_to)
    return checkpoint, manifest, state


def check_same_recipe(state: RunState, manifest: Manifest, recipe: Recipe) -> None:
    """Raises UserError where a checkpoint was begun with values that a resume may not change, or in unknown ways."""
    check_same_task(state.recipe, recipe)
    decoder = without_version(state.decoder)
    for what, found, known in (("order of images", state.order, LAWS), ("decoder", decoder, DECODERS)):
        if found not in known:
            raise UserError(
                f"run.dir ({recipe.run.dir}) must hold a run of this version or an earlier one: its {what} is "
                f"{one_line(found)}; go on with the version that wrote it, or pass another run.dir"
            )
    begun = loads(state.recipe, f"recipe of the run in {recipe.run.dir}", kind=type(recipe))
    _say_archives(begun, recipe)
    differences = resume_differences(begun, recipe)
    if differences:
        other = f", where run.continue_from={recipe.run.dir} begins with its weights" if _continues(differences) else ""
        raise UserError(
            f"run.dir ({recipe.run.dir}) holds a run with other values: {', '.join(differences)}; "
            f"go on with its own, or pass another run.dir{other if isinstance(recipe, Pretrain) else ''}"
        )
    precision = "float32" if isinstance(recipe, Linear) else recipe.parallel.precision
    if manifest.is_float64 != (precision == "float64"):
        kept = "float64" if manifest.is_float64 else "bf16 or float32"
        raise UserError(
            f"parallel.precision ({precision}) must be {kept}, in which the run in {recipe.run.dir} keeps its weights; "
            "pass it, or another run.dir"
        )


def _say_archives(begun: Recipe, recipe: Recipe) -> None:
    """Checkpoints that were to stay for good do so only as long as the recipe says it."""
    was, now = begun.checkpoint.keep_every_epochs, recipe.checkpoint.keep_every_epochs
    if was and (not now or was % now):
        say(
            f"archive   checkpoint.keep_every_epochs was {was:g} and is {show(now)}: of checkpoints that were to stay "
            f"for good, the next save removes those that are not among the newest {recipe.checkpoint.keep}"
        )


def _continues(differences: list[str]) -> bool:
    """Whether a new run with these values could begin with the weights of the old one."""
    return not any(each.startswith(("task", "model.", "optimizer.name", "run.continue_from")) for each in differences)


# ---- words -----------------------------------------------------------------------------------------------------------


def _say_opening(task: Task) -> None:
    world, parallel = task.world, task.parallel
    how = f", {parallel.precision}, shard {parallel.shard}, compile {parallel.compile}" if parallel else ""
    lines = [f"ranks     {world.size} on {world.device_name}{how}", *on_this_machine(task.written, task.recipe, world)]
    say("\n".join([*lines, *_lost_bits(task), *task.opening(), *task.memory()]))


def _lost_bits(task: Task) -> list[str]:
    """A line where the run is not deterministic."""
    if task.refused:
        how = f"{task.refused} has no deterministic form on {task.world.device_name}; attention keeps its own, slowly"
    elif task.parallel is not None and not task.parallel.deterministic:
        how = "parallel.deterministic is false"
    else:
        return []
    return [f"bits      two runs of this command may differ in rounding, and a resumed run from an unbroken one: {how}"]


def _say_resumed(checkpoint: Path, task: Task) -> None:
    step, last = task.step, task.plan().last_step
    done = ": the run is finished" if step >= task.total_steps else ": stopped by train.max_steps"
    say(f"resumed   {checkpoint} at step {step:,}{done if step >= last else f' of {last:,}'}")


def _say_decoder(task: Task, state: RunState | None) -> None:
    """state: that from which the run goes on; None where it begins."""
    now = with_version(task.crops.decoder)
    differs = state is not None and state.decoder not in (now, PILLOW)  # former versions did not say which Pillow
    say(f"decoder   {now}{f'; {state.decoder} until here, so that pixels may differ' if differs else ''}")


def _closing(task: Task, directory: RunDirectory, trainer: Trainer, log: MetricsLog, left: list[str]) -> Row:
    """Say result, where the time went, and where the files are; the row that counts, from rank 0, on every rank."""
    row: Row = {}
    with agreement(task.world.host_group):
        if task.world.is_first:
            monitor_rows = log.monitor_rows
            row = task.reported(monitor_rows) if monitor_rows else {}
            say(f"result    {task.result(monitor_rows, log.recent[-1] if log.recent else None)}")
            say(f"time      {', '.join(f'{what} {spent:.0f} s' for what, spent in trainer.seconds.items())}")
            if trainer.saves.failures or trainer.log.failures:
                counts = f"{trainer.saves.failures} saves and {trainer.log.failures} other writes"
                say(f"disk      {counts} failed; later ones made up for them")
            say(f"files     {directory.path}: {', '.join(_files(directory))}")
            if task.step < task.total_steps:
                most = (
                    f"train.max_steps ({task.recipe.train.max_steps}) after step {task.step:,} of {task.total_steps:,}"
                )
                left = [f"          stopped by {most}; the same command with train.max_steps=null goes on", *left]
            say("\n".join([f"next      tensorboard --logdir {directory.path}", *left]))
    return broadcast(row, task.world.host_group)


def _files(directory: RunDirectory) -> list[str]:
    newest = read_pointer(directory.checkpoints, "latest")
    names = sorted(f"{p.name}/" if p.is_dir() else p.name for p in directory.path.iterdir() if p.name[0] != ".")
    return [f"{name}{newest}/" if name == "checkpoints/" else name for name in names]
