"""safetensors: all of base, momentum and heads under our names, in the types that they have."""

from pathlib import Path

from safetensors.torch import save_file

from engine.weights.format import BY_US, SAFETENSORS, Format, collect, metadata
from engine.weights.names import Naming
from engine.weights.weights import Weights

OURS = Naming(sign="base.trunk.", rows=(("", ("",)),))


def write(weights: Weights, file: Path) -> None:
    save_file(collect(weights, OURS, keep_dtype=True), file, metadata=metadata(weights))


FORMAT = Format(
    file="model.safetensors",
    endings=SAFETENSORS,
    write=write,
    namings=(OURS,),
    whole=True,
    by_shape=False,
    use=BY_US,
)
