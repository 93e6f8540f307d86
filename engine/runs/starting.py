"""`model.weights`: both encoders of a new run begin with a trunk that has learned elsewhere, and its heads anew."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.distributed.agreement import agreement, all_gather
from engine.distributed.world import World, in_turn
from engine.errors import UserError, one_line
from engine.logger import note, say
from engine.recipe.keys import show
from engine.recipe.load import locate
from engine.recipe.sections import Augment, Model, Pretrain
from engine.runs.directory import checkpoints_of
from engine.weights.adopt import POSITIONS, adopt, with_usual_norms
from engine.weights.opening import open_weights
from engine.weights.positions import side
from engine.weights.read import HEADS
from engine.weights.weights import Weights, declared, digest
from models.architecture import by_shape
from models.shapes import TIMM


@dataclass(frozen=True)
class Start:
    """weights: one trunk alone, of the recipe's network. digest: sha256 of its tensors."""

    weights: Weights
    digest: str

    @property
    def licence(self) -> str | None:
        return self.weights.about and self.weights.about.licence

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of both encoders' trunks, on the CPU: the momentum encoder starts as a copy of the base."""
        for name, tensor in self.weights.read(list(self.weights.shapes)):
            yield name, tensor
            yield name.replace("base.", "momentum.", 1), tensor


def open_first(recipe: Pretrain, recipe_file: Path, world: World, *, fetch: bool = True) -> Start | None:
    """`open_start` before anything expensive; None too where the run has checkpoints from which it may go on.

    fetch: else weights of timm are left alone.
    """
    named = recipe.model.weights
    if named is None or (named.startswith(TIMM) and not fetch):
        return None
    with agreement(world.host_group):
        begun = checkpoints_of(recipe)
    if any(all_gather(bool(begun), world.host_group)):
        return None
    return open_start(recipe, recipe_file, world)


def open_start(recipe: Pretrain, recipe_file: Path, world: World) -> Start | None:
    """What `model.weights` means, read once; None where it is null. All ranks call it together.

    Raises:
        UserError: on every rank, where there is no such thing, or it does not fit, or ranks find different weights.
    """
    named = recipe.model.weights
    if named is None:
        return None
    start = in_turn(world, lambda: _read(named, recipe, recipe_file))
    if len(set(all_gather(start.digest, world.host_group))) > 1:
        raise UserError(
            f"model.weights ({one_line(named)}) must be the same on every node, and differs; copy one to all of them"
        )
    licence = f", under {start.licence}" if start.licence else ""
    say(f"weights   both encoders begin with the trunk of {named}{licence}; heads begin anew")
    return start


def _read(named: str, recipe: Pretrain, recipe_file: Path) -> Start:
    path = locate(named, recipe_file, "model.weights")
    checkpoint = named if named.startswith(TIMM) and not path.exists() else str(path)
    try:
        weights = _trunk(checkpoint, recipe)
        return Start(weights, digest(finite(weights)))
    except UserError as error:
        raise UserError(f"model.weights ({one_line(named)}) must hold this recipe's network: {error}") from error


def _trunk(checkpoint: str, recipe: Pretrain) -> Weights:
    model = recipe.model
    original = opened(checkpoint, model).trunk("base")
    if original.about is None and model.heads is None and declared(model).kind == "vit":
        raise UserError(f"it does not say {HEADS.replace('--heads ', 'model.heads=')}")
    weights = fitted(original, model, interpolate=True)
    _note_differences(original, weights, recipe.augment)
    return weights


def _note_differences(original: Weights, weights: Weights, augment: Augment) -> None:
    """What the weights have otherwise than the run that takes them."""
    about, (position, *_) = original.about, POSITIONS
    if original.shapes.get(position) != weights.shapes.get(position):
        was, now = side(original.shapes[position]), side(weights.shapes[position])
        note(f"{original.origin} has positions of {was} x {was} patches, which become {now} x {now}")
    if about is not None and (about.mean, about.std) != (augment.mean, augment.std):
        theirs = f"augment.mean={show(about.mean)} augment.std={show(about.std)}"
        note(f"{original.origin} has seen images with {theirs}; the recipe has others")


def opened(checkpoint: str, model: Model) -> Weights:
    """The weights of a CHECKPOINT; where positions alone tell its heads, the recipe may say another number of them."""
    original, heads = open_weights(checkpoint), declared(model).arguments.get("heads")
    known = original.about and by_shape(original.about.architecture)
    if known is None or heads in (None, known.arguments.get("heads")):
        return original
    try:
        other = open_weights(checkpoint, heads)
    except UserError:  # the file itself says how many
        return original
    note(f"{checkpoint} has MoCo v3's positions, and with them 12 heads; the recipe's model.heads ({heads}) are taken")
    return other


def fitted(original: Weights, model: Model, *, interpolate: bool) -> Weights:
    """The weights for the recipe's network, after saying what is ignored and what is assumed."""
    architecture, original = declared(model), with_usual_norms(original)
    weights = adopt(original, architecture, (model.projector_hidden_dim, model.output_dim), interpolate=interpolate)
    for line in original.notes:
        note(line)
    if original.about is None and architecture.kind == "vit":
        count = architecture.arguments["heads"]
        note(
            f"{original.origin} does not say how many heads its attention has; {count} are assumed, from the recipe's "
            "model.heads"
        )
    return weights


def finite(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor; raises UserError at one with values that are not finite."""
    for name, value in weights.read(list(weights.shapes)):
        if not value.isfinite().all():
            raise UserError(f"weights ({weights.origin}) must be finite; {name} is not: use another file")
        yield name, value
