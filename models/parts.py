"""What a network consists of, for whoever lays it over ranks."""

from typing import NamedTuple

from torch import nn


class Part(NamedTuple):
    """A module of a network that runs by itself: a trunk or a head, trained by gradients or followed by an average."""

    module: nn.Module
    is_trunk: bool
    is_trained: bool


class Network(nn.Module):
    """A whole network, that says what its parts are."""

    def parts(self) -> list[Part]:
        """In the order in which they are laid over ranks; together they hold every parameter and buffer."""
        raise NotImplementedError
