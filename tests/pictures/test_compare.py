"""Runs compared: what the numbers say, that odd runs are borne, and that the files are what they should be."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.compare import main
from engine.errors import UserError
from engine.pictures.curves import alone, by_recipe, check_metrics, read_run, read_runs, table
from engine.recipe.load import dump, load

RECIPE = Path(__file__).parents[2] / "recipes/quickstart.yaml"
BATCH = 128
STEPS_PER_EPOCH = 39


def make_run(
    folder: Path,
    *overrides: str,
    steps: int = 100,
    every: int = 10,
    knn: bool = True,
    add: float = 0,
    speed: float = 128,
) -> Path:
    """A run directory as the trainer leaves it: a loss row for every `every` steps, and kNN rows among them."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump(load(RECIPE, [f"run.dir={json.dumps(str(folder))}", *overrides])))
    rows = []
    for step in range(0, steps + 1, every):
        place = {"step": step, "epoch": step / STEPS_PER_EPOCH}
        if step:
            rows.append(place | {"loss": 4 - step / 100 + add, "rankme": 10.0 + add, "images_per_second": speed})
        if knn and step % 50 == 0:
            rows.append(place | {"knn_top1": 0.5 + step / 1000 + add, "knn_top5": 0.9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


# ---- the numbers -----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(1, 1e5)), min_size=1, max_size=20))
def test_time_is_what_the_steps_took(tmp_path_factory, pieces):
    """However the steps are logged, the time at each row is the sum of what the steps up to it took."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", steps=0)
    step, seconds, expected = 0, 0.0, {0: 0.0}
    with (folder / "metrics.jsonl").open("w") as file:
        for steps, speed in pieces:
            step, seconds = step + steps, seconds + steps * BATCH / speed
            expected[step] = seconds
            row = {"step": step, "epoch": step / STEPS_PER_EPOCH, "loss": 1.0, "images_per_second": speed}
            file.write(json.dumps(row) + "\n")
    run = read_run(folder)
    assert run.seconds == pytest.approx(expected)
    np.testing.assert_allclose(run.places(list(expected), "time"), list(expected.values()))
    np.testing.assert_allclose(run.places([0, step], "epoch")[1], step / STEPS_PER_EPOCH)


def test_a_knn_row_lies_between_the_loss_rows_in_time(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=100, every=50))
    assert run.places([25, 50, 75], "time").tolist() == [25.0, 50.0, 75.0]  # a batch of 128 at 128 images per second


def test_seeds_are_merged_and_other_recipes_are_not(tmp_path):
    runs = [
        make_run(tmp_path / "base-0", "run.seed=0"),
        make_run(tmp_path / "base-1", "run.seed=1", "data.workers=5", add=0.1),
        make_run(tmp_path / "base-2", "run.seed=2", steps=50, add=0.2),
        make_run(tmp_path / "cold", "moco.temperature=0.1"),
    ]
    former = runs[1] / "recipe.yaml"  # of a version whose recipes had no number
    former.write_text(former.read_text().replace("schema: 2\n", ""))
    seeds, cold = by_recipe(read_runs(runs))
    assert (seeds.name, len(seeds.runs)) == ("base (3 seeds)", 3)
    assert (cold.name, len(cold.runs)) == ("cold", 1)
    curve = seeds.curve("knn_top1", "epoch")
    # As far as the shortest of them goes.
    np.testing.assert_allclose(curve.place, [0, 50 / STEPS_PER_EPOCH])
    np.testing.assert_allclose(curve.low, [0.5, 0.55])
    np.testing.assert_allclose(curve.mean, [0.6, 0.65])
    np.testing.assert_allclose(curve.high, [0.7, 0.75])
    assert by_recipe([seeds.runs[0], read_run(make_run(tmp_path / "base-again"))])[0].name == "base (2 runs)"
    assert [group.name for group in alone(seeds.runs)] == ["base-0", "base-1", "base-2"]


def test_table(tmp_path):
    runs = read_runs([make_run(tmp_path / "a", "run.seed=0"), make_run(tmp_path / "b", "run.seed=1", add=0.02)])
    metrics = check_metrics(runs, None)
    assert metrics == ["loss", "knn_top1", "rankme", "images_per_second"]
    head, first, _ = table(alone(runs), metrics, timed=True)
    assert head == ["run", "epochs", "loss", "kNN top-1", "RankMe", "images/s", "training"]
    assert first == ["a", "2.564 of 30", "3.00", "60.0 %", "10.0", "128", "100 s"]
    (_, both) = table(by_recipe(runs), ["loss", "knn_top1"], timed=False)
    assert both == ["a (2 seeds)", "2.564 of 30", "3.01 ± 0.01", "61.0 ± 1.4 %"]


def test_runs_in_odd_states(tmp_path):
    """Without kNN, torn, not finite, just begun: each is shown as far as it goes."""
    whole, plain = make_run(tmp_path / "whole"), make_run(tmp_path / "plain", knn=False)
    torn, begun = make_run(tmp_path / "torn", steps=20), make_run(tmp_path / "begun", steps=0, knn=False)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "epoch": 0.5, "loss": None, "images_per_second": 128.0}) + "\n")
        file.write('{"step": 22, "epoch": 0.6, "lo')
    assert (begun / "metrics.jsonl").read_text() == ""
    runs = read_runs([whole, plain, torn, begun])
    rows = {name: cells for name, *cells in table(alone(runs), check_metrics(runs, None), timed=True)}
    assert rows["plain"][2] == "-"
    assert rows["plain"][1] == "3.00"
    assert rows["torn"][:2] == ["0.5128 of 30", "-"]
    assert rows["torn"][-1] == "21 s"
    assert rows["begun"] == ["0 of 30", "-", "-", "-", "-", "0 s"]
    loss = alone(runs)[2].curve("loss", "time")
    assert loss.place.tolist() == [10.0, 20.0, 21.0]
    assert np.isnan(loss.mean).tolist() == [False, False, True]
    for suffix in ("png", "html"):
        compare(whole, plain, torn, begun, tmp_path / f"odd.{suffix}")


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = read_runs([make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run"), make_run(tmp_path / "z")])
    assert [run.name for run in runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run"), "z"]


# ---- the files -------------------------------------------------------------------------------------------------------


def drawn_lines(svg: str) -> list[int]:
    """The number of points of every curve with dots or without, panel by panel."""
    panels = re.split(r'<g id="axes_\d+">', svg)[1:]
    paths = [re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: #', panel) for panel in panels]
    return [max(path.count("L") + path.count("M") for path in panel) for panel in paths]


def test_picture(tmp_path, capsys):
    runs = [make_run(tmp_path / "first one"), make_run(tmp_path / "second <&> $x$", steps=60)]
    compare(*runs, tmp_path / "c.svg")
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == {"file": str(tmp_path / "c.svg")}
    assert printed[0] == "| run | epochs | loss | kNN top-1 | RankMe | images/s | training |"
    assert printed[2].startswith("| first one | 2.564 of 30 | 3.00 | 60.0 % |")
    text = (tmp_path / "c.svg").read_text()
    for words in ("Comparison of 2 runs", "first one", "kNN top-1", "60.0 %", "training time (s)", "step"):
        assert f"<!-- {words} -->" in text, words
    # Four metrics against step and time: ten loss rows, three kNN rows.
    assert drawn_lines(text) == [10, 10, 3, 3, 10, 10, 10, 10]

    compare(*runs, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()
    compare(*runs, tmp_path / "c.png", "--metrics", "knn_top1", "--against", "epoch")
    assert Image.open(tmp_path / "c.png").size[0] == 1600


def test_time_is_drawn_in_a_unit_that_suits_the_longest_run(tmp_path):
    runs = [make_run(tmp_path / "slow", speed=12.8), make_run(tmp_path / "fast")]
    compare(*runs, tmp_path / "c.svg", "--metrics", "loss", "--against", "time")
    text = (tmp_path / "c.svg").read_text()
    numbers = [float(tick) for tick in re.findall(r"<!-- ([\d.]+) -->", text[text.index('id="matplotlib.axis_1"') :])]
    assert "<!-- training time (min) -->" in text
    assert 10 <= max(number for number in numbers if number > 5) <= 1000 / 60


class Page(HTMLParser):
    """Cells of the table, and what the page refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.cells, self.links, self.depth = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag in ("td", "th"):
            self.cells.append("")
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= tag in ("td", "th")

    def handle_data(self, data):
        if self.depth:
            self.cells[-1] += data


def test_page_needs_no_other_file(tmp_path):
    runs = [make_run(tmp_path / "a <b>bold & name"), make_run(tmp_path / "b")]
    compare(*runs, tmp_path / "c.html", "--merge-seeds", "--metrics", "loss,rankme", "--against", "step")
    text = (tmp_path / "c.html").read_text()
    page = Page(text)
    assert page.cells[:4] == ["run", "epochs", "loss", "RankMe"]
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert "url(http" not in text
    assert text.count("<svg") == 1
    assert drawn_lines(text) == [10, 10]
    compare(*runs, tmp_path / "c.html")
    assert Page((tmp_path / "c.html").read_text()).cells[7].strip().endswith("a <b>bold & name")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "out.png"
    begun, bad, strange = make_run(tmp_path / "begun", steps=0, knn=False), tmp_path / "bad", tmp_path / "strange"
    shutil.copytree(run, bad)
    (bad / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": \n{"step": 3, "loss": 2}\n')
    shutil.copytree(run, strange)
    (strange / "recipe.yaml").write_text("just text")
    (tmp_path / "empty").mkdir()
    cases = {
        r"RUN \(.*none\) must be a run directory; the folder cannot be read: No such file": (run, tmp_path / "none"),
        r"RUN \(.*empty\) must be a run directory; recipe.yaml cannot be read": (tmp_path / "empty",),
        r"RUN \(.*run\) must be given once": (run, begun, run),
        r"RUN \(.*begun\) must have logged something": (begun,),
        r"metrics.jsonl line 2 \(.*\) must be a JSON object with a step": (bad,),
        r"recipe \(.*strange.*\) must be a mapping": (strange,),
    }
    for message, runs in cases.items():
        with pytest.raises(UserError, match=message):
            compare(*runs, out)
    for message, arguments in {
        r"OUT \(.*out.gif\) must end in .png, .svg, .pdf, .html": (tmp_path / "out.gif",),
        r"OUT \(.*\) must lie in a folder that exists": (tmp_path / "no" / "out.png",),
        r"--metrics \(los\) must be logged by a run; these are: knn_top1": (out, "--metrics", "loss,los"),
        r"--against \(days\) must be of step, epoch, time": (out, "--against", "step,days"),
    }.items():
        with pytest.raises(UserError, match=message):
            compare(run, *arguments)
    assert not out.exists()


def test_comparing_loads_no_torch(tmp_path):
    """It is for looking at runs while they train: it starts in a moment."""
    import subprocess

    run = make_run(tmp_path / "run")
    code = f"import sys; from engine.compare import main; main([{str(run)!r}, {str(tmp_path / 'c.png')!r}]); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
