"""How others name our tensors: tables of namings, and the one rule that reads them. Nothing else renames keys.

Ours: base.trunk.*, base.projector.*, momentum.trunk.*, momentum.projector.*, predictor.*. A file of one trunk alone
holds base.trunk.*. Inside a trunk our names are timm's (ViT) and torchvision's (ResNet).

A row is (our beginning, their beginnings); {n} stands for a number. Several of theirs are slices of one of ours, in
order, along its first dimension. Of several rows that fit, the first counts.
"""

import re
from functools import cache
from typing import NamedTuple


class Naming(NamedTuple):
    """The names of our tensors in one kind of file.

    sign: how a name begins that tells a file in this naming. dropped: regular expressions of names that belong to no
    encoder of ours (a classifier, a decoder).
    """

    sign: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    dropped: tuple[str, ...] = ()

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their names for one of ours. Raises KeyError for a name that the naming has no place for."""
        for ours, theirs in self.rows:
            if found := _pattern(ours).match(name):
                return tuple(_replaced(other, found, name) for other in theirs)
        raise KeyError(name)

    def ours(self, name: str) -> str | None:
        """Our name for one of theirs; None for a name that the naming does not know."""
        for ours, theirs in self.rows:
            for other in theirs:
                if found := _pattern(other).match(name):
                    return _replaced(ours, found, name)
        return None

    def drops(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.dropped)


@cache
def _pattern(beginning: str) -> re.Pattern:
    return re.compile(re.escape(beginning).replace(r"\{n\}", r"(\d+)"))


def _replaced(beginning: str, found: re.Match, name: str) -> str:
    number = found[1] if found.lastindex else ""
    return beginning.replace("{n}", number) + name[found.end() :]


# timm, torchvision and all families whose trunk is one of theirs. A classifier, a projector, DINO's head, SwAV's
# prototypes, MAE's decoder and what iBOT shows in the place of patches are no part of a trunk.
TRUNK = Naming(
    sign="",
    rows=(("base.trunk.", ("",)),),
    dropped=(
        r"(head|fc|classifier|head\.fc)\.(weight|bias)",
        r"head\.(mlp\.\d+|last_layer)\..*",
        r"(head|fc)\.\d+\..*",
        r"projection_head\..*",
        r"prototypes\d*\..*",
        r"mask_token|masked_embed",
        r"decoder_.*",
    ),
)
