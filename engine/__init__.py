"""A scale-out engine for MoCo v3."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from engine.evaluation.encoder import Encoder

__version__ = "0.1.0"


def load(checkpoint: str | Path, encoder: Literal["base", "momentum"] = "base", heads: int | None = None) -> "Encoder":
    """The frozen encoder of any CHECKPOINT, ready for images.

    checkpoint: a run directory, a checkpoint directory, an exported file or folder, weights of others or `timm/<name>`.
    heads: of a ViT whose file does not tell how many its attention has.

    Raises:
        engine.errors.UserError: there is no such checkpoint or encoder.
    """
    # Here, so that `import engine` loads no PyTorch.
    from engine.own_models import check_models

    check_models()
    from engine.evaluation.encoder import open_encoder

    return open_encoder(checkpoint, encoder, heads)
