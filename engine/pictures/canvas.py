"""What all pictures share: paper, ink, colours, and how a file is written.

Lengths are pixels of the picture as a README shows it, 800 wide; files hold two dots per pixel, for sharp screens.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.errors import RunFailed, UserError, reason
from engine.files import draft, replace_file

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as error:
    do = "`pip install -e '.[pictures]'` or `pip install matplotlib`"
    raise UserError(f"pictures need matplotlib, which is not installed; do {do}") from error

WIDTH = 800
MARGIN = 16
HEADER = 62  # from the top edge to what is below title and subtitle
SUFFIXES = (".png", ".svg", ".pdf")
DOTS = 2  # per pixel
_PER_INCH = 100
_POINTS_PER_PIXEL = 72 / _PER_INCH

INK, FAINT, LINE = "#1f2328", "#656d76", "#d0d7de"
# Okabe and Ito's colours, told apart by the colour-blind too; the black and the yellow, pale on white, are left out.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
RIGHT, WRONG = COLOURS[2], COLOURS[1]

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 12 * _POINTS_PER_PIXEL,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#eaeef2",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "image.interpolation": "auto",
    "text.parse_math": False,  # names are shown as they are, dollar signs too
    "svg.hashsalt": "engine",  # else every file would have other names inside
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults are this project's inside, and the caller's own again afterwards."""
    with matplotlib.rc_context(_STYLE):
        yield


def check_out(out: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raises UserError where no picture can be written to `out`; a file that is there will be replaced."""
    if out.suffix.lower() not in suffixes:
        raise UserError(f"OUT ({out}) must end in {', '.join(suffixes)}; name it so")
    if out.is_dir():
        raise UserError(f"OUT ({out}) must be a file, and is a folder; name another")
    if not out.parent.is_dir():
        raise UserError(f"OUT ({out}) must lie in a folder that exists; make {out.parent}")
    try:
        with draft(out.resolve()) as place:
            place.touch()
    except OSError as error:
        must = f"must lie in a folder that can be written: {reason(error)}"
        raise UserError(f"OUT ({out}) {must}; name another") from error


def write(out: Path, content: bytes) -> None:
    """Raises RunFailed where the file cannot be written; one that is there stays as it was."""
    try:
        replace_file(out.resolve(), content)
    except OSError as error:
        kept = "what was there is kept" if out.exists() else "nothing was left of it"
        raise RunFailed(f"OUT ({out}) could not be written: {reason(error)}; {kept}") from error


class Sheet:
    """A page of `height` that is filled at (x, y) from its top left corner, below a title and a smaller line.

    To be made and saved inside of `style()`.
    """

    def __init__(self, height: float, title: str = "", subtitle: str = ""):
        self.height = height
        self.figure = Figure(figsize=(WIDTH / _PER_INCH, height / _PER_INCH), dpi=DOTS * _PER_INCH, facecolor="white")
        FigureCanvasAgg(self.figure)  # it keeps what measures a text, which else is made anew for each
        self.text(MARGIN, 25, title, size=17, weight="bold")
        self.text(MARGIN, 46, subtitle, size=12, color=FAINT)

    def text(
        self, x: float, y: float, text: str, *, size: float = 12, width: float = np.inf, upright: bool = False, **style
    ) -> None:
        """One line, its baseline at y, or reading upwards from y; what is longer than `width` ends in an ellipsis."""
        style = {"color": INK, "va": "bottom" if upright else "baseline", "rotation": 90 if upright else 0} | style
        line = self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=size * _POINTS_PER_PIXEL, **style)
        while len(text) > 1 and line.get_window_extent().size[int(upright)] > width * DOTS:
            text = text[:-1]
            line.set_text(text.rstrip() + "…")

    def line(self, left: float, right: float, y: float, **style) -> None:
        places = [left / WIDTH, right / WIDTH], [1 - y / self.height] * 2
        self.figure.add_artist(Line2D(*places, transform=self.figure.transFigure, **style))

    def axes(self, x: float, y: float, width: float, height: float, **options):
        """Axes that fill a box whose top left corner is (x, y)."""
        box = (x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(box, **options)

    def image(self, x: float, y: float, side: float, pixels: np.ndarray, *, frame: str | None = None, **show):
        """An image [H, W] or [H, W, 3] inside a square, whole and in its own proportions. Returns its axes."""
        axes = self.axes(x, y, side, side)
        axes.set_axis_off()
        axes.imshow(pixels, aspect="equal", **show)
        if frame is not None:
            corners = {"transform": axes.transAxes, "fill": False, "clip_on": False}
            axes.add_patch(Rectangle((0, 0), 1, 1, edgecolor=frame, linewidth=3 * _POINTS_PER_PIXEL, **corners))
        return axes

    def save(self, out: Path) -> None:
        """Raises RunFailed where the file cannot be written."""
        write(out, self.encoded(out.suffix.lower().removeprefix(".")))

    def encoded(self, kind: str) -> bytes:
        """The file's content; it bears no date, so that equal pictures are equal files."""
        buffer = io.BytesIO()
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        self.figure.savefig(buffer, format=kind, metadata=undated.get(kind))
        return buffer.getvalue()
