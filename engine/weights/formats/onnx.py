"""onnx: the trunk as a program, `images` [N, 3, S, S] -> `features` [N, D], for any N."""

from pathlib import Path

import torch
from torch import Tensor

from engine.weights.format import Format, metadata
from engine.weights.weights import Weights, fill_trunk
from models.architecture import Architecture

OPSET = 18
LIMIT = 1_500_000_000  # bytes of weights above which they get a file of their own; protobuf ends at 2 GiB


def write(weights: Weights, file: Path) -> None:
    trunk, size = fill_trunk(weights), weights.known().image_size
    program = torch.onnx.export(
        trunk,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    assert program is not None, "the exporter by dynamo returns its program"
    program.model.metadata_props.update(metadata(weights))
    large = sum(p.numel() * p.element_size() for p in trunk.parameters()) > LIMIT
    program.save(file, external_data=large)


def features(path: Path, architecture: Architecture, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(FORMAT.file_in(path), providers=["CPUExecutionProvider"])
    batches = [images[:1], images[1:]]  # of two sizes
    return torch.cat([torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in batches])


FORMAT = Format(
    file="model.onnx",
    endings=(".onnx",),
    write=write,
    features=features,
    libraries=("onnx", "onnxscript", "onnxruntime"),
    by_shape=False,
    norm_eps=True,
    use=(
        "import onnxruntime\n\nsession = onnxruntime.InferenceSession('PATH/model.onnx')\n\nTRANSFORM\n"
        "features = session.run(None, {'images': image.numpy()})[0]"
    ),
)
