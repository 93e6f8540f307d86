"""Images that are nearly the same: `mocov3 duplicates CHECKPOINT OUT.csv --data ROOT`, on several ranks by torchrun.

Two images are alike where the cosine of their features is at least --least, and a group is all that are alike, directly
or through others. OUT.csv has a row for each image of a group: group (its first image's name), name, and cosine with
the most similar one of the group. How near is near depends on the network: look at some groups, then choose --least.
"""

from pathlib import Path

from engine import cli, door
from engine.errors import UserError


def main(arguments: list[str]) -> None:
    parser = cli.Parser("engine.duplicates", __doc__)
    cli.add_subject(parser, "--data")
    cli.add_out(parser, ".csv")
    parser.add_argument("--least", type=cosine, default=0.999, help="cosine of images that are alike (0.999)")
    options = parser.parse_args(arguments)
    choice, workers = cli.read_choice(options), cli.decoding_workers(options)

    with door.joined(options.checkpoint) as world:
        from engine.evaluation.duplicates import find_duplicates
        from engine.evaluation.rows import check_new

        check_new([out := Path(options.out)], options.force)
        (root,) = cli.image_roots(options, "--data")
        found = find_duplicates(options.checkpoint, root, out, options.least, world, workers, **choice)
    door.result(found)


def cosine(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise UserError(f"--least ({text}) must be > 0 and <= 1; 0.999 is a start")
    return float(text)


if __name__ == "__main__":
    door.enter(main)
