"""Export weights: `mocov3 export CHECKPOINT OUT --format FORMAT`.

OUT is one file where it ends in .safetensors, .pt, .pth, .pth.tar or .onnx, else a folder with a model card.
"""

import shlex
from functools import partial
from pathlib import Path

from engine.cli import Parser, add_checkpoint, add_encoder
from engine.door import enter, result
from engine.weights.formats.table import NAMES


def main(arguments: list[str]) -> None:
    parser = Parser("engine.export", __doc__)
    add_checkpoint(parser)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--format", required=True, choices=NAMES)
    add_encoder(parser, default=None)
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")
    parser.add_argument("--license", metavar="NAME", help="of the weights, for the model card (default: not stated)")
    options = parser.parse_args(arguments)

    from engine.weights.export import export  # takes seconds, and a mistake in the arguments should show before
    from engine.weights.opening import open_weights

    command = shlex.join(["python", "-m", "engine.export", *arguments])
    original = partial(open_weights, options.checkpoint, options.heads)
    chosen = {"encoder": options.encoder, "force": options.force, "licence": options.license}
    result(export(original, options.out, options.format, command=command, **chosen))


if __name__ == "__main__":
    enter(main)
