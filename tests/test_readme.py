"""What the READMEs tell users to type is what the doors accept: every command in a `bash` block."""

import re
import shlex
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from engine.__main__ import DOORS
from engine.cli import WORDS, Parser
from engine.recipe.describe import describe_keys
from engine.recipe.load import load
from engine.recipe.sections import RECIPES
from engine.recipes import copy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXTS = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *sorted(ROOT.glob("engine/*/README.md"))]
# Runs a block without running anything: commands say what they are, and there is no PATH to find others on.
SPOKEN = """
say() { printf '%q ' "$@"; printf '\\n'; }
mocov3() { say mocov3 "$@"; }
torchrun() { say torchrun "$@"; }
python() { say python "$@"; }
srun() { while [[ $1 == -* ]]; do shift; done; "$@"; }
scontrol() { :; }
command_not_found_handle() { :; }
"""


class Parsed(Exception):
    """Ends a door as soon as it has read its command line."""


def commands(text: Path, folder: Path) -> list[str]:
    """Every command that the shell would run, variables and loops expanded."""
    blocks = re.findall(r"```bash\n(.*?)```", text.read_text(), re.DOTALL)
    said = ""
    for block in blocks:
        shell = ["/bin/bash", "--norc", "-c", SPOKEN + block]
        environment = {"PATH": "", "SLURM_NNODES": "2"}
        said += subprocess.run(shell, env=environment, cwd=folder, capture_output=True, text=True).stdout
    return said.splitlines()


def door_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command starts and its arguments; None where that is no door."""
    if words[0] == "mocov3":
        modules = {word: module for module, word in WORDS.items()}
        return ("engine." + modules.get(words[1], words[1]), words[2:]) if words[1] in DOORS else None
    at = words.index("-m") + 1
    return words[at], words[at + 1 :]


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """Each command, and where it stands."""
    folder = tmp_path_factory.mktemp("empty")
    return {command: text for text in TEXTS for command in commands(text, folder)}


def test_there_are_commands_to_check(every):
    assert len(every) > 60
    assert sum("evaluate linear" in command for command in every) > 20  # loops are run
    assert not any("$" in command for command in every)


@pytest.fixture
def parsed(monkeypatch):
    """Doors stop once their command line is read; those with commands of their own go on to one."""

    def ending(read):
        def read_and_end(parser, arguments):
            options = read(parser, arguments)
            if parser.prog.split(".")[-1] in ("evaluate", "bench"):
                return options
            raise Parsed(options)

        return read_and_end

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Parser, name, ending(getattr(Parser, name)))


def test_every_command_is_one_that_its_door_accepts(every, parsed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    copy("own_photos_small", tmp_path)  # as the README does before it uses the file
    wrong = []
    for command, text in every.items():
        try:
            _check(shlex.split(command))
        except Exception as error:
            wrong.append(f"{text.relative_to(ROOT)}: {command}\n    {error}")
    assert not wrong, "\n".join(wrong)


def _check(words: list[str]) -> None:
    if words == ["mocov3", "--help"]:
        return
    module, arguments = door_of(words)
    if not module.startswith("engine."):
        assert find_spec(module) is not None, "there is no such module"
        return
    with pytest.raises(Parsed) as end:
        import_module(module).main(arguments)
    (options,) = end.value.args
    recipe = getattr(options, "recipe", None)
    if recipe is not None:
        task = yaml.safe_load(recipe.read_text())["task"]
        load(recipe, options.overrides, RECIPES[task])


def test_every_key_that_is_named_is_a_recipe_s():
    known = {key.name for task in RECIPES for key in describe_keys(task)}
    sections = "|".join(sorted({name.split(".")[0] for name in known if "." in name}))
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)[`=:,]", "".join(text.read_text() for text in TEXTS)))
    assert named
    assert not {name for name in named - known if not name.endswith(".py")}


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_conv"])
def test_a_recipe_says_the_results_that_the_readme_says(recipe):
    measured = {}
    for when, seeds, mean in re.findall(rf"^\| `{recipe}` (\w.*?) \| ([\d., ]+): ([\d.]+) \| ", README, re.MULTILINE):
        assert float(mean) == pytest.approx(fmean(map(float, seeds.split(", "))), abs=0.0501)
        measured[when] = mean
    head = re.search(r"kNN top-1 ([\d.]+) % \(mean\) from ([\d.]+) %", (ROOT / f"recipes/{recipe}.yaml").read_text())
    assert head.groups() == (measured["trained"], measured["at initialisation"])
