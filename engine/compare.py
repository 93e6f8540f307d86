"""Compare runs: `mocov3 compare RUN RUN ... OUT`.

A table and curves (loss, kNN, RankMe, images per second) against steps and time, from the metrics.jsonl of run
directories; runs may be in progress. OUT ends in .png, .svg, .pdf or .html (one file that needs no other) and is
replaced if it is there. The table is printed too, as Markdown.
"""

from pathlib import Path

from engine.cli import Parser
from engine.door import enter, result
from engine.errors import UserError
from engine.pictures.curves import AXES, METRICS, alone, by_recipe, check_metrics, read_runs


def main(arguments: list[str]) -> None:
    parser = Parser("engine.compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--metrics", help=f"keys of metrics.jsonl, comma between (default: {','.join(METRICS)})")
    parser.add_argument("--against", default="step,time", help=f"of {','.join(AXES)} (default: step,time)")
    parser.add_argument("--merge-seeds", action="store_true", help="runs that differ only in run.seed as one line")
    options = parser.parse_args(arguments)

    from engine.pictures.canvas import SUFFIXES, check_out
    from engine.pictures.comparison import Comparison, draw_comparison

    check_out(options.out, (*SUFFIXES, ".html"))
    axes = options.against.split(",")
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--against ({axis}) must be of {', '.join(AXES)}; with a comma between several")
    asked = options.metrics and options.metrics.split(",")
    runs = read_runs(options.runs, asked or METRICS)
    metrics = check_metrics(runs, asked)
    groups = by_recipe(runs) if options.merge_seeds else alone(runs)
    shown = Comparison(groups, metrics, axes)
    draw_comparison(shown, options.out)
    result({"file": str(options.out)}, shown.markdown)


if __name__ == "__main__":
    enter(main)
