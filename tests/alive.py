"""What is in memory while real operations run."""

import weakref
from collections.abc import Callable, Container

from torch import Tensor

from engine.torch_internals import watching


def most_alive(run: Callable[[], None], beside: Container[int]) -> int:
    """Bytes of the tensors that `run` makes, where most of them are alive; beside: addresses that do not count."""
    alive, sums = {}, [0]

    def see(_: object, results: object) -> None:
        for tensor in results if isinstance(results, list | tuple) else [results]:
            place = tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0
            if place and place not in alive and place not in beside:
                alive[place] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), alive.pop, place)
        sums.append(sum(alive.values()))

    with watching(see):
        run()
    return max(sums)
