"""Steps as deterministic as a recipe asks, after a trial of what strict mode refuses; ranks have the same answer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from engine.distributed.agreement import agreement, all_gather
from engine.distributed.world import World
from engine.recipe.sections import Parallel
from engine.training.determinism import deterministic, refused_in_trial


@contextmanager
def deterministic_as_asked(
    parallel: Parallel, build: Callable[[], nn.Module], image_size: int, world: World
) -> Iterator[str | None]:
    """Yields the operation that strict mode refuses on any rank; None where it refuses none, or was not asked for.

    build: makes a trunk, as `refused_in_trial` wants it. Raises what that raises, on all ranks.
    """
    refused = None
    if parallel.deterministic:
        with agreement(world.host_group):
            refused = refused_in_trial(build, image_size, parallel, world.device)
        refused = next(filter(None, all_gather(refused, world.host_group)), None)
    with deterministic(parallel.deterministic, refused):
        yield refused
