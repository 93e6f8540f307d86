"""What is installed: the command and its doors, the shipped recipes, `engine.load`, and a `models` that hides ours."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine
from engine import keys, recipes, show
from engine.__main__ import DOORS, main
from engine.cli import WORDS
from engine.data.decode import decode
from engine.errors import UserError
from engine.evaluation.subject import open_subject
from engine.recipe import shipped
from engine.recipe.describe import describe_keys
from engine.recipe.load import load, loads, located
from engine.recipe.sections import RECIPES
from engine.run import main as run
from tests.recipe.shipped import FILES, QUICK, TASK

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests/golden/I_vit_small_shape.pth.tar"
SMALL = ["model.dim=32", "model.projector_hidden_dim=64", "model.output_dim=32", "train.global_batch_size=32"]
ONE_STEP = [*SMALL, "train.max_steps=1", "data.workers=0", "evaluate.knn_every_epochs=0"]


def refusal(function, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_every_door_has_its_word(capsys):
    doors = {path.stem for path in (ROOT / "engine").glob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    words = {next((module for module, of in WORDS.items() if of == word), word) for word in DOORS}
    assert doors - {"__main__"} == words
    assert all(callable(importlib.import_module(f"engine.{name}").main) for name in words)
    main([])
    shown = capsys.readouterr().out
    assert all(f"\n  {word} " in shown for word in DOORS)
    main(["--version"])
    assert capsys.readouterr().out == f"mocov3 {engine.__version__}\n"
    assert refusal(main, ["rnu"]).endswith("did you mean run?")
    assert refusal(main, ["frobnicate"]).endswith("see `mocov3 --help`")


def test_a_door_calls_itself_as_it_was_called(monkeypatch, capsys):
    for script, call in (("/bin/mocov3", "mocov3 import"), ("engine/run.py", "python -m engine.import_weights")):
        monkeypatch.setattr(sys, "argv", [script])
        assert refusal(main, ["import"]).endswith(f"see `{call} --help`")
        with pytest.raises(SystemExit):
            main(["import", "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {call} ")


def test_keys_says_every_key(capsys):
    for task in RECIPES:
        keys.main(["--task", task])
        said = " ".join(capsys.readouterr().out.split())
        assert all(f" {key.name}" in f" {said}" and key.meaning in said for key in describe_keys(task))
    keys.main(["moco"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[::2]] == [
        "moco.temperature",
        "moco.momentum",
    ]
    keys.main(["epochs"])
    assert capsys.readouterr().out.startswith("train.epochs: an integer >= 1; required\n    passes over")
    keys.main(["checkpoint.keep"])
    assert capsys.readouterr().out.startswith("checkpoint.keep*: an integer >= 1; default 2\n    newest checkpoints")
    assert refusal(keys.main, ["moko"]) == "NAME (moko) must be a section or a key of task pretrain; did you mean moco?"


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_shipped_recipes_are_listed_and_found_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipes.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(FILES)
    assert all(len(line.split()) > 4 for line in lines)
    assert shipped.find("quickstart").samefile(QUICK)
    assert refusal(shipped.find, "quikstart").endswith("; did you mean quickstart?")
    assert refusal(shipped.find, "no/such/vit_l.yaml").endswith("; did you mean vit_l?")
    assert refusal(shipped.find, "VIT_S").endswith("; did you mean vit_s?")
    assert refusal(shipped.find, "zzz").endswith("; see `mocov3 recipes`")
    assert refusal(shipped.find, "x" * 5000).startswith("recipe (xxx")
    (tmp_path / "my_own.yaml").touch()
    assert refusal(shipped.find, "my_onw.yaml").endswith("; did you mean my_own.yaml?")


def test_what_is_there_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_s").mkdir()
    (tmp_path / "vit_s/recipe.yaml").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.yaml").touch()
    assert shipped.find("vit_s").samefile(FILES["vit_s"]), "a folder that is no run is no recipe"
    assert refusal(shipped.find, "mine").endswith("; did you mean mine/recipe.yaml?")
    (tmp_path / "vit_s/checkpoints").mkdir()
    assert shipped.find("vit_s") == Path("vit_s")
    (tmp_path / "vit_b").touch()
    assert shipped.find("vit_b") == Path("vit_b")


def test_a_copied_recipe_is_the_same_recipe_wherever_it_lies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, file in FILES.items():
        task = RECIPES[TASK[name]]
        recipes.main(["copy", name, "."])
        assert json.loads(capsys.readouterr().out) == {"file": f"{name}.yaml"}
        copied = load(tmp_path / f"{name}.yaml", kind=task)
        assert located(copied, tmp_path / f"{name}.yaml") == located(load(file, kind=task), file)
    before = (tmp_path / "vit_s.yaml").read_bytes()
    assert refusal(recipes.main, ["copy", "vit_s"]).startswith("vit_s.yaml must not exist yet; ")
    assert (tmp_path / "vit_s.yaml").read_bytes() == before
    assert refusal(recipes.main, ["copy", "vit_s", "none"]).startswith("FOLDER (none) must be a writable folder: ")


def test_print_says_what_would_run_and_writes_nothing(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.tar", "val.tar"):
        (data / name).symlink_to(QUICK.parent / "data/fashion_mnist" / name)
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    run(["quickstart", "--print", "data.root=data", "train.epochs=7"])
    out = capsys.readouterr().out
    assert files(tmp_path) == before
    written = load(QUICK, [f"data.root={data}", "train.epochs=7"])
    assert loads(out, "printed") == written
    assert "\n# schedule  7 epochs of 39 steps: 273 steps\n" in out
    assert "\n# networks  trunk 0.2 M parameters" in out
    run(["vit_s", "--print"])
    out = capsys.readouterr().out
    assert loads(out, "printed") == located(load(FILES["vit_s"]), FILES["vit_s"])
    assert "\n# data      data.root (data/imagenet) must exist; " in out
    assert refusal(run, ["quickstart", "--print", "train.global_batch_size=5001"]).startswith(
        "train.global_batch_size ("
    )
    assert files(tmp_path) == before


# ---- a run and what is made of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_one_step(tmp_path_factory) -> Path:
    """A run that was started with relative paths, and has moved since."""
    folder, here = tmp_path_factory.mktemp("run"), Path.cwd()
    try:
        os.chdir(folder)
        run(["quickstart", *ONE_STEP, "run.dir=begun"])
    finally:
        os.chdir(here)
    return (folder / "begun").rename(folder / "moved")


def test_a_run_keeps_absolute_paths_and_its_checkpoint_what_was_written(of_one_step):
    assert load(of_one_step / "recipe.yaml").data.root == str(QUICK.parent / "data/fashion_mnist")
    manifest = (of_one_step / "checkpoints/step_0000001/MANIFEST.json").read_text()
    assert "root: data/fashion_mnist" in json.loads(manifest)["state"]["recipe"]


def test_a_run_is_a_recipe_which_goes_on_where_it_lies(of_one_step, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load(of_one_step).run.dir == str(of_one_step)
    assert load(of_one_step, ["run.dir=other"]).run.dir == "other"
    run([str(of_one_step), "train.max_steps=2"])
    assert "step_0000001 at step 1 of 2" in capsys.readouterr().out
    show.main(["views", str(of_one_step), "views.png"])
    assert json.loads(capsys.readouterr().out) == {"file": "views.png"}
    assert files(tmp_path).keys() == {"views.png"}


@pytest.mark.parametrize("encoder", ["base", "momentum"])
@pytest.mark.parametrize("checkpoint", ["run", CHECKPOINT], ids=["run", "file"])
def test_load_gives_the_network_and_the_images_of_evaluation(checkpoint, encoder, of_one_step):
    path = of_one_step if checkpoint == "run" else checkpoint
    loaded, subject = engine.load(path, encoder=encoder), open_subject(str(path), "cpu", encoder=encoder)
    file = ROOT / "recipes/pictures/quickstart.png"
    with Image.open(file) as image:
        image_3SS = loaded.transform(image)
    assert torch.equal(image_3SS, subject.normalised(subject.crop(decode(file.read_bytes())), "cpu"))
    feature_BD = loaded(torch.stack([image_3SS, image_3SS.flip(2)]))
    assert feature_BD.shape == (2, loaded.width)
    assert not feature_BD.requires_grad
    assert not loaded.network.training
    assert torch.allclose(feature_BD[:1], subject.network(image_3SS[None]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"^images \(\[3, .*\]\) must be \[B, 3, "):
        loaded(image_3SS)


def test_load_refuses_in_one_line(tmp_path):
    assert refusal(engine.load, tmp_path / "none").startswith(f"CHECKPOINT ({tmp_path}/none) must exist; ")
    assert refusal(engine.load, CHECKPOINT, "both") == "encoder (both) must be one of base, momentum"


def test_importing_the_engine_loads_no_pytorch(tmp_path):
    doors = ", ".join(f"engine.{name}" for name in ("__main__", "run", "keys", "recipes"))
    code = f"import sys, engine, {doors}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})


# ---- another `models` ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoy", ["models.py", "models/__init__.py"])
def test_a_models_that_hides_ours_is_one_line(decoy, tmp_path):
    (tmp_path / decoy).parent.mkdir(exist_ok=True)
    (tmp_path / decoy).write_text("raise SystemExit('the decoy was imported')")
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def python(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)

    ended = python("-m", "engine.run", "quickstart", "--print")
    line = f"models ({tmp_path / decoy}) must not hide the engine's own; start from another folder, or with "
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {line}`mocov3 ...` or `python -P -m engine...`")
    assert len(ended.stderr.splitlines()) == 1
    ended = python("-c", "import engine; engine.load('x')")
    assert ended.stderr.splitlines()[-1].startswith(f"engine.errors.UserError: {line}")
    ended = python("-P", "-m", "engine.keys", "moco")
    assert ended.returncode == 0, ended.stderr


NOBODY = """
import getpass, os, pathlib, pwd, sys

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
from engine.door import enter
from engine.embed import main as embed

def main(arguments):
    embed(arguments)
    print(getpass.getuser(), pathlib.Path.home())

enter(main)
"""


def test_a_container_s_user_without_a_name_or_home_needs_neither(tmp_path):
    """As after `docker run --user 12345`: the tar's index and torch's caches find a place."""
    tar = shutil.copy(ROOT / "recipes/data/fashion_mnist/val.tar", tmp_path / "a.tar")
    command = [sys.executable, "-c", NOBODY, str(CHECKPOINT), str(tmp_path / "a.npy"), "--data", str(tar)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, named = done.stdout.splitlines()[-2:]
    assert json.loads(found)["images"] == 1000
    assert named == f"uid{os.getuid()} {tmp_path}/mocov3-uid{os.getuid()}"
