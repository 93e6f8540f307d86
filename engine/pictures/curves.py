"""Runs side by side: what their metrics.jsonl say, as curves and as a table.

Rows bear no time. Each loss row has the speed since the one before, so the time of training follows: images of its
steps over images per second, added up. Checkpoints and evaluations, during which that clock stands still, do not count.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import UserError, reason
from engine.files import read_rows
from engine.recipe.identity import fingerprint
from engine.recipe.load import loads, task_of
from engine.recipe.sections import RECIPES, Recipe

AXES = ("step", "epoch", "time")
# What a comparison shows unless told otherwise.
METRICS = ("loss", "knn_top1", "probe_top1", "rankme", "images_per_second")
NAMES = {
    "loss": "loss",
    "knn_top1": "kNN top-1",
    "knn_top5": "kNN top-5",
    "probe_top1": "probe top-1",
    "probe_top5": "probe top-5",
    "probe_loss": "probe loss",
    "rankme": "RankMe",
    "images_per_second": "images/s",
    "lr": "learning rate",
}
SHARES = ("knn_top1", "knn_top5", "probe_top1", "probe_top5")  # from 0 to 1, shown as percentages
_PLACE = ("step", "epoch")
_PLACING = ("epoch", "images_per_second")  # from which places on an axis follow


@dataclass(frozen=True)
class Run:
    """A run directory's recipe, and what is shown of its metrics.jsonl.

    metrics: numbers that were logged at least once. columns: of those that are shown, and of what places them, steps
    and values; NaN for a value that was not finite.
    """

    name: str
    recipe: Recipe
    metrics: list[str]
    columns: dict[str, tuple[array, array]]

    def series(self, metric: str) -> dict[int, float]:
        """{step: value} where the metric was logged; NaN where it was not finite."""
        return dict(zip(*self.columns.get(metric, ((), ())), strict=True))

    @cached_property
    def seconds(self) -> dict[int, float]:
        """{step: seconds of training until then}."""
        total, last, batch = 0.0, 0, self.recipe.train.global_batch_size
        seconds = {0: 0.0}
        for step, speed in self.series("images_per_second").items():
            if speed > 0:
                total += (step - last) * batch / speed
                seconds[step], last = total, step
        return seconds

    def places(self, steps: Sequence[int], axis: str) -> np.ndarray:
        """Where steps lie on an axis: their numbers, their epochs, or the seconds of training until them."""
        known = {"step": {s: s for s in steps}, "epoch": self.series("epoch"), "time": self.seconds}[axis]
        if not known:
            raise UserError(f"RUN ({self.name}) must log its epochs to be shown against them; pass --against step")
        return np.interp(steps, list(known), list(known.values()))

    @property
    def epochs(self) -> float:
        return max(self.series("epoch").values(), default=0.0)


class Curve(NamedTuple):
    """A metric of runs that differ in their seeds: mean, lowest and highest at each place of an axis."""

    place: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Group(NamedTuple):
    """Runs that are shown as one: a single run, or those of one recipe with several seeds."""

    name: str
    runs: list[Run]

    def curve(self, metric: str, axis: str) -> Curve:
        """Over the steps at which every run of the group has the metric."""
        each = [run.series(metric) for run in self.runs]
        steps = [step for step in each[0] if all(step in series for series in each)]
        value_RS = np.array([[series[step] for step in steps] for series in each], dtype=float)
        place_RS = np.array([run.places(steps, axis) if steps else [] for run in self.runs])
        return Curve(place_RS.mean(0), value_RS.mean(0), value_RS.min(0), value_RS.max(0))


def read_run(path: Path, shown: Sequence[str] = METRICS) -> Run:
    """A run directory, which may be one in progress: a last line that is not complete does not count.

    shown: metrics of which values are kept. Raises UserError where the folder is no run or another line is damaged.
    """
    recipe_file = path / "recipe.yaml"
    try:
        text = recipe_file.read_text("utf-8", "replace")
        recipe = loads(text, f"recipe ({recipe_file})", kind=RECIPES[task_of(text) or "pretrain"])
        return Run(path.resolve().name, recipe, *_columns(path / "metrics.jsonl", {*shown, *_PLACING}))
    except OSError as error:
        missing = Path(error.filename).name if path.is_dir() else "the folder"
        raise UserError(
            f"RUN ({path}) must be a run directory; {missing} cannot be read: {reason(error)}; name another"
        ) from error


def _columns(file: Path, kept: Collection[str]) -> tuple[list[str], dict[str, tuple[array, array]]]:
    """Names of all metrics; steps and values of those to be kept."""
    is_number: dict[str, bool] = {}
    columns: dict[str, tuple[array, array]] = {}
    for row in read_rows(file):
        for name, value in row.items():
            is_number[name] = isinstance(value, int | float | None)
            if name in kept:
                steps, values = columns.setdefault(name, (array("q"), array("d")))
                steps.append(row["step"])
                values.append(value if isinstance(value, int | float) else np.nan)
    return [name for name, holds in is_number.items() if holds and name not in _PLACE], columns


def read_runs(paths: Sequence[Path], shown: Sequence[str] = METRICS) -> list[Run]:
    """The runs, of which each has a name of its own: its folder's, or its path where several folders are called so.

    Raises UserError as `read_run`, where a run is given twice, and where none has logged anything.
    """
    twice = [path for i, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:i]]]
    if twice:
        raise UserError(f"RUN ({twice[0]}) must be given once; leave the second one out")
    runs = [read_run(path, shown) for path in paths]
    if not any(run.metrics for run in runs):
        raise UserError(f"RUN ({paths[0]}) must have logged something, and neither has any other; wait a little")
    names = Counter(run.name for run in runs)
    return [replace(run, name=str(path)) if names[run.name] > 1 else run for run, path in zip(runs, paths, strict=True)]


def alone(runs: Sequence[Run]) -> list[Group]:
    return [Group(run.name, [run]) for run in runs]


def by_recipe(runs: Sequence[Run]) -> list[Group]:
    """Runs together that differ only in the seed, or in what a resume may change; named by how their names begin."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        seedless = replace(run.recipe, run=replace(run.recipe.run, seed=0))
        groups.setdefault(fingerprint(seedless), []).append(run)
    return [Group(_group_name(group), group) for group in groups.values()]


def _group_name(runs: list[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs), strict=False))
    common = "".join(letters[0] for letters in alike).rstrip("-_. ")
    seeds = {run.recipe.run.seed for run in runs}
    return f"{common or runs[0].name} ({len(runs)} {'seeds' if len(seeds) == len(runs) else 'runs'})"


# ---- the table -------------------------------------------------------------------------------------------------------


def check_metrics(runs: Sequence[Run], metrics: Sequence[str] | None) -> list[str]:
    """The metrics to show: those asked for, else those of METRICS that some run has.

    Raises UserError for one that no run has.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    for name in metrics or ():
        if name not in known:
            raise UserError(f"--metrics ({name}) must be logged by a run; these are: {', '.join(known)}")
    return list(metrics or [name for name in METRICS if name in known])


def table(groups: Sequence[Group], metrics: Sequence[str], *, timed: bool) -> list[list[str]]:
    """Cells, the head first: each metric's last value (speed: the median), over seeds mean and standard deviation.

    timed: with the time of training, too.
    """
    rows = [["run", "epochs", *(NAMES.get(name, name) for name in metrics), *["training"] * timed]]
    for group in groups:
        epochs = max(run.epochs for run in group.runs)
        total = group.runs[0].recipe.train.epochs
        values = [_cell(name, [_summary(run, name) for run in group.runs]) for name in metrics]
        seconds = np.mean([max(run.seconds.values()) for run in group.runs])
        rows.append([group.name, f"{epochs:.4g} of {total}", *values, *[duration(seconds)] * timed])
    return rows


def _summary(run: Run, metric: str) -> float:
    values = list(run.series(metric).values()) or [np.nan]
    return float(np.median(values)) if metric == "images_per_second" else values[-1]


def _cell(metric: str, values: list[float]) -> str:
    if not np.isfinite(values).all():
        return "-"
    scale, unit = (100, " %") if metric in SHARES else (1, "")
    mean = scale * np.mean(values)
    digits = 1 if unit else max(0, 3 - int(np.floor(np.log10(abs(mean) or 1)) + 1))
    spread = f" ± {scale * np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{spread}{unit}"


def time_unit(seconds: float) -> tuple[int, str]:
    """The unit that suits a duration, in seconds, and its name."""
    return (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")


def duration(seconds: float) -> str:
    unit, name = time_unit(seconds)
    return f"{seconds / unit:.{int(name == 'h')}f} {name}"
