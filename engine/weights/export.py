"""Export: check, write under a temporary name, prove, rename. OUT appears whole and proven or not at all."""

import concurrent.futures
import dataclasses
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.distributed.launcher import end_with_parent
from engine.errors import RunFailed, UserError, one_line, reason
from engine.files import publish, shared_draft, sweep, sync
from engine.logger import note
from engine.weights.card import model_card
from engine.weights.formats.table import NAMES, format_page
from engine.weights.prove import prove
from engine.weights.weights import About, EncoderName, Head, Weights
from models.architecture import Architecture, by_shape

KINDS = {"vit": "a plain ViT", "resnet": "a ResNet", "timm": "a timm model"}


def export(
    open_original: Callable[[], Weights],
    out: Path,
    name: str,
    *,
    encoder: EncoderName | None = None,
    force: bool = False,
    licence: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Write the weights that `open_original` opens to `out` in the format `name`.

    open_original: picklable, for the proof runs in a process of its own. licence: of the weights, where they
    state none. command: for the model card.
    Returns {"files", "max_feature_difference"}: paths, and the largest difference over the largest feature.
    Raises UserError before any work where the request cannot be met; RunFailed where the proof fails, and `out` is as
    it was.
    """
    check_out(out, name, force)
    original, trunk = open_original(), encoder or "base"
    for line in original.notes:
        note(line)
    architecture = fitting_architecture(original, name, encoder)
    about = dataclasses.replace(original.known(), architecture=architecture)
    about = dataclasses.replace(about, licence=_licence(about, licence))
    if about.norm_eps is not None and not format_page(name).norm_eps:
        note(
            f"--format {name} has no place for an eps of LayerNorms ({about.norm_eps:g}); the proof shows if it counts"
        )
    _say_crop(original, name)
    weights = dataclasses.replace(original if format_page(name).whole else original.trunk(trunk), about=about)
    card = None if is_file(out) else model_card(weights, name, trunk, out, command)
    with _folder_beside(out) as folder:
        target = folder / out.name
        _write(weights, target, name, card)
        proof = _in_own_process(prove, open_original, trunk, name, target, architecture)
        note(f"proof: the largest difference of features is {proof.difference:.1e} of the largest feature")
        if proof.cosine is not None:
            note(f"proof: an image file by the export's own transform has these features, cosine {proof.cosine:.6f}")
        files = _publish(folder, out, force)
    return {"files": files, "max_feature_difference": proof.difference}


def _say_crop(original: Weights, name: str) -> None:
    """Where the format's library cannot cut out of photographs what evaluation does."""
    ours, theirs = original.crop.resized_side, format_page(name).crop(original.crop).resized_side
    if ours != theirs:
        note(f"{name} resizes images to {theirs} pixels and evaluation to {ours}: it cuts no centre between two pixels")


def export_classifier(weights: Weights, head: Head, out: Path) -> None:
    """Write the folder OUT so that `timm.create_model('local-dir:OUT', pretrained=True)` gives the same logits.

    weights: of one trunk. The folder appears whole and proven; an old one goes.
    Raises UserError where timm has no such network; RunFailed where it has another one under its name, or where the
    folder could not be written.
    """
    architecture = weights.known().architecture
    if architecture.has_conv_stem:
        raise UserError("timm has no ViT with a conv stem")
    weights = dataclasses.replace(weights, head=head)
    with _folder_beside(out) as folder:
        target = folder / out.name
        _write(weights, target, "timm")
        prove(lambda: weights, "base", "timm", target, architecture)
        _publish(folder, out, force=True)


def _licence(about: About, asked: str | None) -> str | None:
    if asked is not None and not (asked.strip() and asked.isprintable()):
        raise UserError(f"--license ({one_line(asked)}) must be a name such as apache-2.0; pass one, or none")
    if asked is not None and about.licence not in (None, asked):
        raise UserError(
            f"--license ({asked}) must be left out: the weights are under {about.licence}, which binds them"
        )
    return asked or about.licence


# ---- what can be exported to what ------------------------------------------------------------------------------------


def check_out(out: Path, name: str, force: bool) -> None:
    """Raises UserError where OUT cannot be written in this format, a library is missing, or something is there."""
    page = format_page(name)
    if out.name in ("", ".."):
        raise UserError(f"OUT ({out}) must have a name of its own; pass one")
    if is_file(out) and not out.name.endswith(page.endings):
        kinds = ", ".join(page.endings) or "no single file"
        raise UserError(f"OUT ({out}) must end in {kinds} for --format {name}, or be a folder; change its name")
    if out.exists() and not force:
        raise UserError(f"OUT ({out}) must not exist; pass another name, or --force to replace it")
    if out.is_dir() and not is_file(out) and not _is_replaceable(out):
        raise UserError(f"OUT ({out}) must be an export or empty for --force, which replaces all of it; name another")
    if out.exists() and out.is_dir() == is_file(out):
        raise UserError(f"OUT ({out}) must not be a {'folder' if out.is_dir() else 'file'}; pass another name")
    if not out.resolve().parent.is_dir():
        raise UserError(f"OUT ({out}) must lie in a folder that exists; make {out.resolve().parent}")
    missing = [library for library in page.libraries if importlib.util.find_spec(library) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"--format ({name}) needs {', '.join(missing)}, which {verb} not installed; do `pip install -e '.[export]'`"
        )


def _is_replaceable(folder: Path) -> bool:
    """Whether it holds weights of a format or nothing, and so is no run and no folder of images."""
    return not any(folder.iterdir()) or any((folder / format_page(name).file).exists() for name in NAMES)


def is_file(out: Path) -> bool:
    return any(out.name.endswith(format_page(name).endings) for name in NAMES)


def fitting_architecture(weights: Weights, name: str, encoder: str | None) -> Architecture:
    """The trunk as the format takes it. Raises UserError where these weights have no place in it."""
    page = format_page(name)
    if page.whole and encoder == "momentum":
        raise UserError(f"--encoder (momentum) must be left out for --format {name}, which holds both encoders")
    if page.whole and not weights.is_whole:
        raise UserError(
            f"--format ({name}) takes only both encoders with their heads; {weights.origin} holds one trunk alone"
        )
    architecture = by_shape(weights.known().architecture) if page.by_shape else weights.known().architecture
    if architecture.kind not in page.kinds:
        fitting = " or ".join(KINDS[kind] for kind in page.kinds)
        raise UserError(f"--format ({name}) takes only {fitting}; the trunk is {architecture.name}")
    if architecture.has_conv_stem and not page.conv_stem:
        able = [other for other in NAMES if format_page(other).conv_stem]
        raise UserError(
            f"--format ({name}) takes only a ViT without conv stem; use {', '.join(able[:-1])} or {able[-1]}"
        )
    return architecture


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def _write(weights: Weights, target: Path, name: str, card: str | None = None) -> None:
    """The weights in one file; in a folder, what the format and the model card say beside it."""
    page, file = format_page(name), target
    try:
        if not is_file(target):
            target.mkdir()
            file = target / page.file
            page.config(weights, target)
            if card is not None:
                (target / "README.md").write_text(card, encoding="utf-8")
        page.write(weights, file)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' words for a full disk
        raise RunFailed(f"{target.name} could not be written ({one_line(error)[:300]}); nothing was left") from error


def _in_own_process(function: Callable, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    own = (os.getpid(),)
    with concurrent.futures.ProcessPoolExecutor(1, context, end_with_parent, own) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RunFailed("the proof was killed, most likely for want of memory; nothing was written") from None


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A folder for what becomes OUT (and OUT.data), gone at the end whatever happens."""
    sweep(out.absolute().parent, out.name, folders=True)  # of exports that were killed
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(shared_draft(out, is_folder=True))
        except OSError as error:
            raise UserError(
                f"OUT ({out}) must lie in a folder that can be written: {reason(error)}; pass another"
            ) from None
        yield folder


def _publish(folder: Path, out: Path, force: bool) -> list[str]:
    """Move what is in the folder to its place, the file that OUT names last."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
            sync(path)
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == out.name)
    for name in names:
        final = out.parent / name
        if final.exists():
            if not force:
                raise UserError(f"OUT ({final}) must not exist; pass another name, or --force to replace it")
            if final.is_dir():
                final.replace(folder / f"replaced-{name}")
        publish(folder / name, final)
    if out.is_dir():
        return sorted(str(path) for path in out.iterdir())
    return [str(out.parent / name) for name in names]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
