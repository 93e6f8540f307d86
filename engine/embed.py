"""Features of images: `mocov3 embed CHECKPOINT OUT.npy --data ROOT`, or by torchrun on several ranks.

OUT.npy is float32 [images, width]; OUT.csv beside it says row, name (where the image lies below ROOT; of several roots
with the root before it) and label (the class, where there is one).
OUT.parquet holds all of it, where pyarrow is installed. Every image of ROOT has a row, of `train` and `val` alike.
"""

from pathlib import Path

from engine import cli, door


def main(arguments: list[str]) -> None:
    parser = cli.Parser("engine.embed", __doc__)
    cli.add_subject(parser, "--data")
    cli.add_out(parser, ".npy or .parquet")
    options = parser.parse_args(arguments)
    choice, workers = cli.read_choice(options), cli.decoding_workers(options)

    with door.joined(options.checkpoint) as world:
        from engine.evaluation.embedding import check_embedding_out, embed

        files = check_embedding_out(Path(options.out), options.force)
        (root,) = cli.image_roots(options, "--data")
        found = embed(options.checkpoint, root, files, world, workers, **choice)
    door.result(found)


if __name__ == "__main__":
    door.enter(main)
