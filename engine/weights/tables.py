"""How others name our tensors: tables, and the one rule that reads them. Nothing else renames keys.

Ours: base.trunk.*, base.projector.*, momentum.trunk.*, momentum.projector.*, predictor.*. A file of one trunk alone
holds base.trunk.*. Inside a trunk our names are timm's (ViT) and torchvision's (ResNet).

A row is (our beginning, their beginnings); {n} stands for a number. Several of theirs are slices of one of ours, in
order, along its first dimension. Of several rows that fit, the first counts.
"""

import re
from functools import cache
from typing import NamedTuple


class Form(NamedTuple):
    """A naming. `dropped`: regular expressions of names that belong to no encoder of ours (a classifier, a decoder)."""

    rows: tuple[tuple[str, tuple[str, ...]], ...]
    dropped: tuple[str, ...] = ()

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their names for one of ours. Raises KeyError for a name that the form has no place for."""
        for ours, theirs in self.rows:
            if found := _pattern(ours).match(name):
                return tuple(_replaced(other, found, name) for other in theirs)
        raise KeyError(name)

    def ours(self, name: str) -> str | None:
        """Our name for one of theirs; None for a name that the form does not know."""
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


OURS = Form((("", ("",)),))

# The reference hangs the projector into the encoder in its classifier's place: `head` of a ViT, `fc` of a ResNet.
REFERENCE_VIT, REFERENCE_RESNET = (
    Form(
        (
            ("base.projector.", (f"module.base_encoder.{head}.",)),
            ("base.trunk.", ("module.base_encoder.",)),
            ("momentum.projector.", (f"module.momentum_encoder.{head}.",)),
            ("momentum.trunk.", ("module.momentum_encoder.",)),
            ("predictor.", ("module.predictor.",)),
        )
    )
    for head in ("head", "fc")
)

# timm, torchvision and DeiT; DINO and MAE too. A classifier, DINO's head and MAE's decoder are no part of a trunk.
TRUNK = Form(
    (("base.trunk.", ("",)),),
    dropped=(
        r"(head|fc|classifier|head\.fc)\.(weight|bias)",
        r"head\.(mlp\.\d+|last_layer)\..*",
        r"mask_token",
        r"decoder_.*",
    ),
)

TRANSFORMERS = Form(
    (
        ("base.trunk.cls_token", ("embeddings.cls_token",)),
        ("base.trunk.pos_embed", ("embeddings.position_embeddings",)),
        ("base.trunk.patch_embed.proj.", ("embeddings.patch_embeddings.projection.",)),
        ("base.trunk.blocks.{n}.norm1.", ("encoder.layer.{n}.layernorm_before.",)),
        (
            "base.trunk.blocks.{n}.attn.qkv.",
            tuple(f"encoder.layer.{{n}}.attention.attention.{part}." for part in ("query", "key", "value")),
        ),
        ("base.trunk.blocks.{n}.attn.proj.", ("encoder.layer.{n}.attention.output.dense.",)),
        ("base.trunk.blocks.{n}.norm2.", ("encoder.layer.{n}.layernorm_after.",)),
        ("base.trunk.blocks.{n}.mlp.fc1.", ("encoder.layer.{n}.intermediate.dense.",)),
        ("base.trunk.blocks.{n}.mlp.fc2.", ("encoder.layer.{n}.output.dense.",)),
        ("base.trunk.norm.", ("layernorm.",)),
    ),
    dropped=(r"(pooler\.dense|classifier)\.(weight|bias)",),
)

# Where a pickle keeps its tensors, and what stands before their names there; the first that fits counts.
WRAPPERS = ("state_dict", "model", "teacher", "student")
PREFIXES = ("module.backbone.", "backbone.", "module.", "vit.")
