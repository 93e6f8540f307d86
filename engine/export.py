"""Export weights: `python -m engine.export CHECKPOINT OUT --format FORMAT`.

CHECKPOINT is a run directory, a checkpoint directory, an exported file or folder, a published .pth.tar or timm/<name>.
OUT is one file where it ends in .safetensors, .pt, .pth, .pth.tar or .onnx, else a folder with a model card.
"""

import json
import shlex
from functools import partial
from pathlib import Path

from engine.cli import Parser, enter

FORMATS = ("timm", "torchvision", "moco_v3", "deit", "safetensors", "transformers", "onnx")


def main(arguments: list[str]) -> None:
    parser = Parser("engine.export", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--encoder", choices=("base", "momentum"), help="whose trunk is exported (default: base)")
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")
    options = parser.parse_args(arguments)

    from engine.weights.exporting import export
    from engine.weights.opening import open_weights  # takes seconds, and a mistake in the arguments should show before

    result = export(
        partial(open_weights, options.checkpoint),
        options.out,
        options.format,
        encoder=options.encoder,
        force=options.force,
        command=shlex.join(["python", "-m", "engine.export", *arguments]),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    enter(main)
