"""The picture and the page of `engine.compare`: a table, which is the legend too, and a panel per metric and axis."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from engine.pictures.canvas import COLOURS, FAINT, HEADER, INK, LINE, MARGIN, WIDTH, Sheet, style, write
from engine.pictures.curves import NAMES, SHARES, Group, table, time_unit

DASHES = ("-", "--", ":")  # after a round of all colours
TABLE_ROW = 24
NAME = 22  # above a panel
GAP = 16  # below it
BETWEEN = 22  # two panels side by side
SCALE = 46  # room for the numbers beside a panel
FEW = 40  # values that get a dot each


class Comparison(NamedTuple):
    """What is shown: groups of runs, the keys of their metrics, and the axes that these are drawn against."""

    groups: Sequence[Group]
    metrics: Sequence[str]
    axes: Sequence[str]

    @property
    def title(self) -> str:
        what = NAMES.get(self.metrics[0], self.metrics[0]) if len(self.metrics) == 1 else "Comparison"
        runs = sum(len(group.runs) for group in self.groups)
        return f"{what} of {runs} run{'s' if runs > 1 else ''}"

    @property
    def subtitle(self) -> str:
        note = "Table: last values, and the median speed."
        if any(len(group.runs) > 1 for group in self.groups):
            note = "Lines: mean over seeds; shades: lowest to highest; ±: standard deviation."
        return note + (" Time: that of training steps alone." if "time" in self.axes else "")

    @property
    def cells(self) -> list[list[str]]:
        return table(self.groups, self.metrics, timed="time" in self.axes)

    @property
    def unit(self) -> tuple[int, str]:
        """Seconds in the unit that suits the longest run, and its name."""
        return time_unit(max(max(run.seconds.values()) for group in self.groups for run in group.runs))

    @property
    def markdown(self) -> str:
        head, *rows = self.cells
        lines = (head, ["---"] * len(head), *rows)
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw_comparison(shown: Comparison, out: Path) -> None:
    """Raises RunFailed where the file cannot be written."""
    cells = shown.cells
    with style():
        if out.suffix.lower() == ".html":
            drawing = Sheet(MARGIN + _panels_height(shown))
            _draw_panels(drawing, shown, MARGIN)
            write(out, _page(shown, cells, drawing.encoded("svg").decode()).encode())
            return
        top = HEADER + TABLE_ROW * len(cells) + 8
        sheet = Sheet(top + _panels_height(shown), shown.title, shown.subtitle)
        _draw_table(sheet, cells)
        _draw_panels(sheet, shown, top)
        sheet.save(out)


def _style_of(group: int) -> dict[str, str]:
    return {"color": COLOURS[group % len(COLOURS)], "linestyle": DASHES[group // len(COLOURS) % len(DASHES)]}


def _draw_table(sheet: Sheet, cells: Sequence[Sequence[str]]) -> None:
    columns = len(cells[0]) - 1
    pitch = min(118, (WIDTH - 2 * MARGIN - 220) / columns)
    name_width = WIDTH - 2 * MARGIN - pitch * columns - 32
    for row, (name, *values) in enumerate(cells):
        y = HEADER + 12 + row * TABLE_ROW
        if row:
            sheet.line(MARGIN, MARGIN + 20, y - 4, linewidth=2, solid_capstyle="butt", **_style_of(row - 1))
        ink = INK if row else FAINT
        look = {"weight": "bold"} if row else {}
        sheet.text(MARGIN + (28 if row else 0), y, name, width=name_width, color=ink, **look)
        for column, value in enumerate(values):
            sheet.text(WIDTH - MARGIN - (columns - 1 - column) * pitch, y, value, size=11.5, ha="right", color=ink)
        sheet.line(MARGIN, WIDTH - MARGIN, y + 8, color=LINE, linewidth=0.6)


def _pitch(shown: Comparison) -> tuple[float, float]:
    """The height of a panel, and what is above it for its name."""
    return (280, 0) if len(shown.metrics) == 1 else (150, NAME)


def _panels_height(shown: Comparison) -> float:
    return len(shown.metrics) * (sum(_pitch(shown)) + GAP) + 36


def _draw_panels(sheet: Sheet, shown: Comparison, top: float) -> None:
    height, name = _pitch(shown)
    width = (WIDTH - 2 * MARGIN - SCALE - (len(shown.axes) - 1) * BETWEEN) / len(shown.axes)
    above = {}
    for row, metric in enumerate(shown.metrics):
        y, is_last = top + row * (name + height + GAP) + name, row == len(shown.metrics) - 1
        if name:
            sheet.text(MARGIN, y - 10, NAMES.get(metric, metric), weight="bold")
        left = None
        for column, axis in enumerate(shown.axes):
            shared = {"sharex": above.get(axis), "sharey": left}
            panel = sheet.axes(MARGIN + SCALE + column * (width + BETWEEN), y, width, height, **shared)
            left, above[axis] = left or panel, panel
            _draw_panel(panel, shown, metric, axis)
            panel.tick_params(labelleft=column == 0, labelbottom=is_last)
            if is_last:
                panel.set_xlabel(f"training time ({shown.unit[1]})" if axis == "time" else axis)


def _draw_panel(panel: Axes, shown: Comparison, metric: str, axis: str) -> None:
    for number, group in enumerate(shown.groups):
        curve, look = group.curve(metric, axis), _style_of(number)
        place = curve.place / (shown.unit[0] if axis == "time" else 1)
        marker = {"marker": "o", "markersize": 2.6} if len(place) <= FEW else {}
        panel.plot(place, curve.mean, linewidth=1.4, label=group.name, **look, **marker)
        if len(group.runs) > 1:
            panel.fill_between(place, curve.low, curve.high, color=look["color"], alpha=0.18, linewidth=0)
    if metric in SHARES:
        panel.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    if metric == "images_per_second":
        panel.set_ylim(bottom=0)


def _page(shown: Comparison, cells: Sequence[Sequence[str]], drawing: str) -> str:
    """HTML that needs no other file."""
    head, *rows = [[html.escape(cell) for cell in row] for row in cells]
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    for number, (name, *values) in enumerate(rows):
        mark = f'<b style="color: {_style_of(number)["color"]}">&#9632;</b>'
        lines.append(f"<td>{mark} {name}</td>" + "".join(f"<td>{value}</td>" for value in values))
    return _PAGE.format(
        title=html.escape(shown.title),
        subtitle=html.escape(shown.subtitle),
        table="\n".join(f"<tr>{line}</tr>" for line in lines),
        drawing=drawing[drawing.index("<svg") :],
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: white; max-width: 900px; margin: 2em auto; }}
p {{ color: #656d76; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: 4px 10px; border-bottom: 1px solid #d0d7de; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
th {{ color: #656d76; font-weight: normal; }}
svg {{ width: 100%; height: auto; margin-top: 1em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
<table>
{table}
</table>
{drawing}
</body>
</html>
"""
