"""YAML: what of it is refused, and that what is written reads back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.recipe.load import load
from engine.recipe.plain import parse, unparse
from tests.recipe.shipped import QUICK, complaint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a mapping of keys to values; found nothing"),
        ("# nothing\n", "found nothing"),
        ("just words", "must be a mapping of keys to values; found just words"),
        ("- a\n- b\n", "must be a mapping"),
        ("task: [unclosed", "must be plain YAML"),
        ("run: {dir: a}\nrun: {dir: b}\n", "on line 2: the key run twice, first on line 1"),
        ("task: pretrain\nrun:\n  seed: 1\n  dir: a\n  seed: 2\n", "on line 5: the key seed twice, first on line 3"),
        ("run: !!python/object/apply:os.getcwd []", "on line 1: a tag, anchor or alias"),
        ("run: !!timestamp x", "a tag, anchor or alias"),
        ("a: &a [1]\nb: *a\n", "on line 1: a tag, anchor or alias"),
        ("1: x", "a key that is not text"),
        ("? [a]\n: x", "a key that is not text"),
        ("a: 1\n---\nb: 2\n", "must be plain YAML"),
        ("a: " + "[" * 5000, "too many brackets"),
        ("a: " + "9" * 5000, "must be plain YAML"),
        ("a: \0", "must be plain YAML"),
        ("run: {dir: a}\n", "task (missing) must be one of pretrain"),
        ("task: sleep\n", "task (sleep) must be one of pretrain"),
        ("task: [pretrain]\n", "task (['pretrain']) must be one of pretrain"),
        ("task: pretrain\n", "run.dir (missing) must be printable text"),
        ("task: pretrain\nrun: 3\n", "run (3) must be a mapping"),
        ("task: pretrain\nrun:\n", "run (null) must be a mapping"),
    ],
)
def test_refused_file(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert words in complaint(path=path)


def test_unreadable_file(tmp_path):
    missing = tmp_path / "none.yaml"
    assert f"recipe ({missing}) must be a readable file: No such file or directory" in complaint(path=missing)
    assert "must be a readable file: Is a directory" in complaint(path=tmp_path)
    assert "must be a readable file" in complaint(path="a\0b")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa\x00\x01")
    assert "must be plain YAML" in complaint(path=tmp_path / "binary.yaml")


def test_numbers_and_words_read_as_they_look():
    lr = {text: load(QUICK, [f"optimizer.base_lr={text}"]).optimizer.base_lr for text in ("1e-3", "1E-3", "1.e-3", "1")}
    assert lr == {"1e-3": 0.001, "1E-3": 0.001, "1.e-3": 0.001, "1": 1.0}
    assert type(lr["1"]) is float
    assert load(QUICK, ["run.dir=no"]).run.dir == "no"
    assert load(QUICK, ["run.dir=2024-01-01"]).run.dir == "2024-01-01"
    for text in ("010", "1_0", "1:30", "0x10"):
        assert f"train.epochs ({text}) must be an integer >= 1" in complaint(f"train.epochs={text}")


def test_yaml_keeps_text_that_looks_like_something_else_or_holds_odd_characters():
    looks = [
        "1e-3",
        "1.5",
        "010",
        "12",
        "true",
        "null",
        "~",
        "",
        ".nan",
        "-.inf",
        "no",
        "1:30",
        "<<",
        "=",
        "*a",
        "&a",
        "!t",
    ]
    odd = ["\x85", "\u2028", "\ufeff", "\xe9", "a: b", "a #b", " a ", "a\nb", "\t", "'", '"', "\\", "-", "?", "x" * 300]
    data = {text: [text, {text: text}] for text in looks + odd}
    assert parse(unparse(data), "text") == data


@settings(max_examples=150)
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_no_text_ends_in_anything_but_a_user_error(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "open.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    complaint(path=path)
    if isinstance(text, str):
        assert "\n" not in complaint(f"run.seed=x{text}")
