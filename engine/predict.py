"""Classes of any images: `mocov3 predict RUN OUT.csv --data ROOT`, on several ranks by torchrun.

RUN is a run of `mocov3 evaluate linear` (not --fast) or `finetune`; its newest checkpoint is used, with the images
cropped as in its own evaluation. OUT.csv has a row for each image of ROOT: name, class, probability.
"""

from pathlib import Path

from engine import cli, door


def main(arguments: list[str]) -> None:
    parser = cli.Parser("engine.predict", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory or one of its checkpoints")
    cli.add_images(parser, "--data")
    cli.add_out(parser, ".csv")
    parser.add_argument("--checkpoint", help="where the network of a linear run lies now (default: where it was)")
    options = parser.parse_args(arguments)
    workers = cli.decoding_workers(options)

    with door.joined(str(options.run)) as world:
        from engine.evaluation.rows import check_new
        from engine.runs.predicting import predict

        check_new([out := Path(options.out)], options.force)
        (root,) = cli.image_roots(options, "--data")
        found = predict(options.run, out, root, world, workers, options.checkpoint)
    door.result(found)


if __name__ == "__main__":
    door.enter(main)
