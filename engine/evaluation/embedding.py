"""Features of any images, written to a file with a list of the images beside it."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.source import Root, Source
from engine.data.splits import open_all
from engine.data.workers import Workers
from engine.distributed.world import World
from engine.errors import UserError
from engine.evaluation.features import Features
from engine.evaluation.rows import Array, FileNames, Sink, Table, check_new, write_rows, written
from engine.evaluation.subject import open_subject_together

if TYPE_CHECKING:
    import pyarrow

HEADER = ("row", "name", "label")


def check_embedding_out(out: Path, force: bool) -> list[Path]:
    """The files that an embedding at OUT has. Raises UserError where they cannot be written."""
    files = [out]
    if out.suffix == ".parquet":
        _load_pyarrow()
    else:
        files.append(out.with_suffix(".csv"))
    check_new(files, force)
    return files


def embed(
    checkpoint: str, data: Root, files: list[Path], world: World, workers: int, **choice: Any
) -> dict[str, int | str]:
    """Write the features of every image of `data` to the files (`check_embedding_out`); all ranks call it together.

    choice: the keywords of `open_subject`. Returns {"images", "width", "file"}: rows, D, and the first file.
    Raises UserError and RunFailed; then no file is there that was not before.
    """
    source = open_all(data, world)
    with Workers([source], workers, device=world.device) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        width = subject.width(world.device)
        with written(world, *files) as places:
            sinks = partial(_sinks, places, files[0].suffix, source, FileNames(source, data), width)
            count = write_rows(subject, source, "features of data", world, readers, sinks)
    return {"images": count, "width": width, "file": str(files[0])}


def _sinks(places: list[Path], suffix: str, source: Source, names: FileNames, width: int) -> list[Sink]:
    if suffix == ".parquet":
        return [Parquet(places[0], source, names, width)]
    return [Array(places[0], width), Table(places[1], source, names, HEADER)]


class Parquet:
    """A .parquet file with the columns name, label and feature (a list of D float32)."""

    def __init__(self, place: Path, source: Source, names: FileNames, width: int):
        self._pa, self._source, self._names = _load_pyarrow(), source, names
        feature = self._pa.list_(self._pa.float32(), width)
        fields = [("name", self._pa.string()), ("label", self._pa.string()), ("feature", feature)]
        self._schema = self._pa.schema(fields)
        self._writer = self._pa.parquet.ParquetWriter(place, self._schema)

    def write(self, rows: Features) -> None:
        classes = self._source.classes or ()
        names = [self._names[i] for i in rows.id_N.tolist()]
        labels = [classes[label] if classes and label >= 0 else None for label in rows.label_N.tolist()]
        columns = [names, labels, list(rows.feature_ND.numpy())]
        self._writer.write_table(self._pa.table(dict(zip(self._schema.names, columns, strict=True)), self._schema))

    def close(self) -> None:
        self._writer.close()


def _load_pyarrow() -> "pyarrow":
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("OUT in .parquet needs pyarrow, which is not installed; do `pip install pyarrow`") from None
    return pyarrow
