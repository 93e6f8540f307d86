"""Export: check, write under a temporary name, prove, rename. OUT appears whole and proven or not at all."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.errors import RunFailed, UserError, one_line
from engine.logger import say_once
from engine.weights.card import model_card
from engine.weights.formats import FORMATS, check_out, fitting_architecture, is_file
from engine.weights.memory import peak_bytes, reset_peak, resident_bytes
from engine.weights.proving import prove
from engine.weights.weights import EncoderName, Weights
from engine.weights.writing import CONFIGS, WRITERS

GIGA = 1e9


def export(
    open_source: Callable[[], Weights],
    out: Path,
    name: str,
    *,
    encoder: EncoderName | None = None,
    force: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Write the weights that `open_source` opens to `out` in the format `name`.

    open_source: picklable, for the proof runs in a process of its own. command: for the model card.
    Returns {"files", "max_feature_difference"}: paths, and the largest difference over the largest feature.
    Raises UserError before any work where the request cannot be met; RunFailed where the proof fails, and `out` is as
    it was.
    """
    check_out(out, name, force)
    source = open_source()
    for note in source.notes:
        say_once(note)
    architecture = fitting_architecture(source, name, encoder)
    weights = source if FORMATS[name].whole else source.trunk(encoder or "base")
    weights = dataclasses.replace(weights, about=dataclasses.replace(source.known(), architecture=architecture))
    with _draft(out) as draft:
        target = draft / out.name
        _write(weights, target, name, encoder or "base", command)
        proof = _in_own_process(prove, open_source, encoder or "base", name, target, architecture)
        difference = proof["max_feature_difference"]
        say_once(
            f"proof: the largest difference of features is {difference:.1e} of the largest feature; "
            f"its process held {proof['peak_bytes'] / GIGA:.2f} GB at most"
        )
        files = _publish(draft, out, force)
    return {"files": files, "max_feature_difference": difference}


def _write(weights: Weights, target: Path, name: str, encoder: str, command: str) -> None:
    file = target
    if not is_file(target):
        target.mkdir()
        file = target / FORMATS[name].file
        if name in CONFIGS:
            CONFIGS[name](weights, target)
        (target / "README.md").write_text(model_card(weights.about, name, encoder, command), encoding="utf-8")
    start = resident_bytes()
    reset_peak()
    try:
        WRITERS[name](weights, file)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' words for a full disk
        raise RunFailed(f"{target.name} could not be written ({one_line(error)[:300]}); nothing was left") from error
    size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*"))
    peak = peak_bytes() - start
    say_once(f"reading and writing: {peak / GIGA:.2f} GB of memory at most, {peak / size:.2f} x the file")


def _in_own_process(function: Callable, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RunFailed("the proof was killed, most likely for want of memory; nothing was written") from None


@contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """A folder beside OUT, gone at the end whatever happens."""
    draft = out.resolve().parent / f".{out.name}.tmp-{secrets.token_hex(4)}"
    try:
        draft.mkdir()
    except OSError as error:
        raise UserError(
            f"OUT ({out}) must lie in a folder that can be written: {error.strerror}; pass another"
        ) from None
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, out: Path, force: bool) -> list[str]:
    """Rename what is in the draft to its place, the file that OUT names last."""
    names = sorted((path.name for path in draft.iterdir()), key=lambda name: name == out.name)
    for path in draft.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
    for name in names:
        final = out.parent / name
        if final.exists():
            if not force:
                raise UserError(f"OUT ({final}) must not exist; pass another name, or --force to replace it")
            if final.is_dir():
                os.replace(final, draft / f"replaced-{name}")
        os.replace(draft / name, final)
    if out.is_dir():
        return sorted(str(path) for path in out.iterdir())
    return [str(out.parent / name) for name in names]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
