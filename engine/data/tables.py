"""Rows of Arrow and Parquet files by number, read by whichever process and thread asks.

pyarrow is imported by who opens a file, and its own threads are never used: loading processes are forked.

Shapes: G groups of rows, as they lie in a file; N rows.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

ARROW, PARQUET = ".arrow", ".parquet"


class Table(ABC):
    """A file's rows. schema: pyarrow's; end_G: the number of the row after each group.

    Raises pyarrow's errors, and OSError, where the file is damaged.
    """

    schema: Any
    end_G: np.ndarray

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return int(self.end_G[-1]) if len(self.end_G) else 0

    @abstractmethod
    def column(self, name: str) -> Any:
        """All of a column, as pyarrow's chunks."""

    @abstractmethod
    def sizes(self, name: str) -> np.ndarray:
        """What tells a column of images from others, int64: the length of each, or of each group."""

    @abstractmethod
    def group(self, name: str, k: int) -> Any:
        """Group k of a column, as an array of pyarrow's."""

    def value(self, name: str, i: int) -> Any:
        """What a column has in row i."""
        k = int(np.searchsorted(self.end_G, i, side="right"))
        return self.group(name, k)[i - (int(self.end_G[k - 1]) if k else 0)].as_py()

    def features(self) -> dict[str, dict]:
        """What Hugging Face's library has noted of the columns, by name."""
        try:
            noted = json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"]
            return {name: about for name, about in noted.items() if isinstance(about, dict)}
        except (KeyError, ValueError, TypeError, AttributeError):  # others may write there what they like
            return {}


class ArrowTable(Table):
    """An Arrow stream or file, mapped: all processes share its pages, and none is read before it is asked for."""

    def __init__(self, path: Path):
        super().__init__(path)
        mapped = self._mapped()
        self.schema = mapped.schema
        self.end_G = np.cumsum([len(batch) for batch in mapped.to_batches()], dtype=np.int64)
        self._table: Any = None  # of the process that reads

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def _mapped(self) -> Any:
        import pyarrow as pa

        source = pa.memory_map(str(self.path))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()

    def column(self, name: str) -> Any:
        return self._mapped().column(name)

    def sizes(self, name: str) -> np.ndarray:
        import pyarrow.compute as pc

        parts = [chunk.field("bytes") if _is_struct(chunk.type) else chunk for chunk in self.column(name).chunks]
        lengths = [pc.fill_null(pc.binary_length(part), 0).to_numpy(zero_copy_only=False) for part in parts]
        return np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)

    def group(self, name: str, k: int) -> Any:
        if self._table is None:
            self._table = self._mapped()
        return self._table.column(name).chunk(k)


class ParquetTable(Table):
    """A Parquet file: to read one image is to read those of its row group. A process keeps the newest, of all files."""

    _newest: ClassVar[tuple[Path, str, int, Any] | None] = None

    def __init__(self, path: Path):
        import pyarrow.parquet as pq

        super().__init__(path)
        with pq.ParquetFile(path, memory_map=True) as file:
            self._metadata, self.schema = file.metadata, file.schema_arrow
        groups = range(self._metadata.num_row_groups)
        self.end_G = np.cumsum([self._metadata.row_group(k).num_rows for k in groups], dtype=np.int64)

    def _read(self, name: str, groups: list[int]) -> Any:
        import pyarrow.parquet as pq

        # Opened for each group: what is shared by threads and across a fork is then only read.
        with pq.ParquetFile(self.path, metadata=self._metadata, memory_map=True) as file:
            return file.read_row_groups(groups, columns=[name], use_threads=False).column(0)

    def column(self, name: str) -> Any:
        return self._read(name, list(range(len(self.end_G))))

    def sizes(self, name: str) -> np.ndarray:
        rows = (self._metadata.row_group(k) for k in range(len(self.end_G)))
        return np.array([[row.num_rows, _bytes_of(row, name)] for row in rows], np.int64).reshape(-1)

    def group(self, name: str, k: int) -> Any:
        newest, wanted = ParquetTable._newest, (self.path, name, k)  # one look: threads may share it
        if newest is None or newest[:3] != wanted:
            newest = ParquetTable._newest = (*wanted, self._read(name, [k]))
        return newest[3]


def open_table(path: Path) -> Table:
    """The rows of a file whose name ends in .arrow or .parquet."""
    return ParquetTable(path) if path.suffix.lower() == PARQUET else ArrowTable(path)


def _is_struct(kind: Any) -> bool:
    return kind.num_fields > 0


def _bytes_of(row_group: Any, name: str) -> int:
    columns = (row_group.column(k) for k in range(row_group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] == name)
