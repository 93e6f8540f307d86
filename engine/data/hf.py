"""Images in the columns of tables: a Hugging Face data set saved on disk, or Parquet files.

Shapes: N images of all tables, T tables.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engine.data.collect import Numbering
from engine.data.decode import decode
from engine.data.jpeg import Jpeg
from engine.data.labels import by_number, read_label
from engine.data.naming import called, is_system_folder, split_of_tar
from engine.data.source import Root, Source, Split, part_of
from engine.data.survey import printable
from engine.data.tables import ARROW, PARQUET, Table, open_table
from engine.errors import UserError, listed, reason

_SPLITS, _SAVED = "dataset_dict.json", "state.json"  # of data sets that Hugging Face's library saved
_IMAGES, _LABELS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls", "class", "fine_label")
_MOST_MIB, _SLOW_MIB = 256, 16  # of a row group, all of which is read for an image


def open_hf(root: Root, split: Split) -> Source | None:
    """The tables of a split; without `train` all are training data. `test` is validation where there is no other."""
    try:
        import pyarrow
    except ImportError:
        do = "`pip install -e '.[hf]'` or `pip install pyarrow`"
        raise UserError(f"data.source (hf) needs pyarrow, which is not installed; do {do}") from None
    files, notes = _files(root, split)
    if not files and split == "val":
        return None
    if not files:
        raise UserError(f"{root} must hold images; it is a data set without tables")
    try:
        tables = [open_table(path) for path in files]
        columns = _columns(root, tables[0])
        for table in tables[1:]:
            if not table.schema.equals(tables[0].schema):
                raise UserError(f"{root} must hold tables of the same columns; {table.path} has others than {files[0]}")
        source = HfSource(root, [table for table in tables if len(table)], columns)
    except (pyarrow.ArrowException, OSError) as error:
        if not root.path.exists():
            raise
        raise UserError(f"{root} must hold whole Arrow or Parquet files; {reason(error)}") from error
    source.notes = (*notes, *source.notes)
    return source


def is_hf(path: Path) -> bool:
    """Whether tables lie there."""
    if path.is_file():
        return path.suffix.lower() in (ARROW, PARQUET)
    saved = any((path / name).is_file() for name in (_SPLITS, _SAVED))
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    return saved or any(_is_parquet(file, folder) for folder in folders for file in folder.iterdir())


# ---- which files -----------------------------------------------------------------------------------------------------


def _files(root: Root, split: Split) -> tuple[list[Path], list[str]]:
    """The tables of a split, and lines about the others."""
    path = root.path
    with suppress(NotADirectoryError):
        next(path.iterdir(), None)  # raises OSError where there is nothing, or nothing that may be seen
    if path.is_file() or (path / _SAVED).is_file():
        return ([] if split == "val" else _saved(root, path)), []
    if (path / _SPLITS).is_file():
        with _as_saved(root, _SPLITS):
            of = {name: (name,) for name in map(str, _read(root, path / _SPLITS, "splits"))}
        chosen, notes = _choose(root, split, of)
        return [file for name in chosen for file in _saved(root, path / name)], notes
    found = sorted(file for file in path.rglob("*") if _is_parquet(file, path))
    if not found:
        raise UserError(
            f"{root} must hold a data set that was saved by save_to_disk, or *.parquet; it has neither; for images in "
            f"folders pass {root.of_source('folder')}"
        )
    names = {str(file.relative_to(path)): file for file in found}
    chosen, notes = _choose(root, split, {name: tuple(filter(None, [split_of_tar(name)])) for name in names})
    return [names[name] for name in chosen], notes


def _is_parquet(file: Path, root: Path) -> bool:
    """Whether it is a table, below a root, and neither hidden nor a system's own."""
    above = file.relative_to(root).parts
    is_hidden = any(part.startswith(".") or is_system_folder(part) for part in above)
    return file.suffix.lower() == PARQUET and not is_hidden and file.is_file()


def _choose(root: Root, split: Split, of: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Of names with the splits that they are of, those of a split; and a line about what is of none."""
    train, val, test = (
        [name for name, words in of.items() if words and words[0].lower() in called(which)]
        for which in ("train", "val", "test")
    )
    val = val or (test if train else [])
    chosen = part_of(root, split, train, val, list(of))
    others = [name for name in of if name not in (*train, *val)]
    line = f"{root}: left out beside {listed([*train, *val], most=3)}: {listed(others, most=3)}"
    return chosen, [line] if train and others and split == "train" else []


def _saved(root: Root, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if _read(root, path / _SAVED, "_indices_data_files", []):
        raise UserError(f"{root} must hold its rows in order; call flatten_indices() on the data set and save it again")
    with _as_saved(root, _SAVED):
        return [path / file["filename"] for file in _read(root, path / _SAVED, "_data_files")]


def _read(root: Root, path: Path, key: str, default: Any = None) -> Any:
    with _as_saved(root, path.name):
        found = json.loads(path.read_bytes())
        return found[key] if default is None else found.get(key) or default


@contextmanager
def _as_saved(root: Root, name: str) -> Iterator[None]:
    """Raises UserError where the body finds the file `name` to be another."""
    try:
        yield
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{root} must be as save_to_disk left it; {name} is not ({reason(error)})") from None


# ---- which columns ---------------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """The column of images, that of labels and its class names where there are any; lines about them."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def _columns(root: Root, table: Table) -> _Columns:
    kinds = {field.name: field.type for field in table.schema}
    features = table.features()
    if len(kinds) < len(table.schema):
        raise UserError(f"{root} must have columns of different names; it has {listed(table.schema.names)}: rename one")
    for key, name in root.dataset_options.items():
        if name is not None and name not in [*kinds]:  # which may be a list, too
            raise UserError(f"data.dataset_options ({key}: {name}) must name a column: {listed(list(kinds))}")
    images = [n for n, kind in kinds.items() if features.get(n, {}).get("_type") == "Image" or _may_hold_images(kind)]
    image = root.dataset_options.get("image") or _one_of(images, _IMAGES)
    if image is None or not _may_hold_images(kinds[image]):
        do = "name one in data.dataset_options={image: NAME}"
        do = do if images else f"for images in folders pass {root.of_source('folder')}"
        raise UserError(
            f"{root} must have a column of images, each a struct of bytes and path, or bytes; it has "
            f"{listed(list(kinds)) or 'none'}; {do}"
        )
    names_of = {name: _class_names(features.get(name, {}), kind) for name, kind in kinds.items()}
    classes = [name for name, names in names_of.items() if names]
    if "label" in root.dataset_options:
        label, notes = root.dataset_options["label"], ()
    else:
        others = classes or [name for name in kinds if name in _LABELS and _may_be_labels(kinds[name])]
        label = _one_of(others, _LABELS)
        do = "name it in data.dataset_options={label: NAME}"
        line = f"{root}: unlabelled: any of {listed(others)} may say classes; {do}"
        notes = (line,) if others and label is None else ()
        if odd := [name for name in kinds if name in _LABELS and not others]:
            notes = (f"{root}: unlabelled: {listed(odd)} holds neither integers nor texts",)
    if label is not None and not _may_be_labels(kinds[label]):
        raise UserError(f"data.dataset_options (label: {label}) must name a column of integers or texts")
    return _Columns(image, label, names_of.get(label) or None, notes)


def _class_names(about: Mapping[str, Any], kind: Any) -> tuple[str, ...] | None:
    """What a ClassLabel calls its classes; None of what is none, whatever it says."""
    import pyarrow.types as is_of

    names = about.get("names") if about.get("_type") == "ClassLabel" and is_of.is_integer(kind) else None
    if not isinstance(names, list):
        return None
    return tuple(printable(str(name).encode(errors="backslashreplace")) for name in names)


def _one_of(names: list[str], preferred: Sequence[str]) -> str | None:
    return names[0] if len(names) == 1 else next((name for name in preferred if name in names), None)


def _may_hold_images(kind: Any) -> bool:
    import pyarrow.types as is_of

    if is_of.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _may_hold_images(kind.field(at).type)
    return is_of.is_binary(kind) or is_of.is_large_binary(kind)


def _may_be_labels(kind: Any) -> bool:
    import pyarrow.types as is_of

    kind = kind.value_type if is_of.is_dictionary(kind) else kind
    return is_of.is_integer(kind) or str(kind) in ("string", "large_string", "string_view")


# ---- the images ------------------------------------------------------------------------------------------------------


class HfSource(Source):
    """The rows of some tables, one table after the other; each process opens those that it reads."""

    def __init__(self, root: Root, tables: Sequence[Table], columns: _Columns):
        if not tables:
            raise UserError(f"{root} must hold images; its tables have no rows")
        self._tables, self._image = tables, columns.image
        self._end_T = np.cumsum([len(table) for table in tables])
        self.labels, self.classes, self.notes = None, None, columns.notes
        if columns.label is not None:
            self._label(root, columns.label, columns.classes)
        sizes = [table.sizes(columns.image) for table in tables]
        self.notes += _check_groups(root, tables, sizes)
        sha256 = hashlib.sha256()
        for of_table in sizes:
            sha256.update(of_table.astype("<i8"))
        if self.labels is not None:
            sha256.update(json.dumps(self.classes).encode() + self.labels.astype("<i8").tobytes())
        self.fingerprint = sha256.hexdigest()

    def _label(self, root: Root, column: str, classes: tuple[str, ...] | None) -> None:
        values = (value for table in self._tables for value in table.column(column).to_pylist())
        label_N, found = _numbered(values) if classes is None else (_as_numbers(values), classes)
        lacking = int((label_N < 0).sum())
        if lacking:
            self.notes += (f"{root}: {lacking} of {len(label_N)} images have no {column}, so none of them is read",)
        elif label_N.max() >= len(found):
            raise UserError(f"{root} must have labels 0 to {len(found) - 1} in {column}; it has {label_N.max()}")
        else:
            self.labels, self.classes = label_N, found

    def __len__(self) -> int:
        return int(self._end_T[-1])

    def _find(self, i: int) -> tuple[Table, int]:
        t = int(np.searchsorted(self._end_T, i, side="right"))
        return self._tables[t], i - (int(self._end_T[t - 1]) if t else 0)

    def name(self, i: int) -> str:
        table, row = self._find(i)
        return f"{printable(table.path.name.encode())}:{row}"

    def place(self, i: int) -> str:
        table, row = self._find(i)
        return f"{table.path}:{row}"

    def content(self, i: int) -> bytes:
        table, row = self._find(i)
        value = table.value(self._image, row)
        if isinstance(value, dict):
            data, path = value["bytes"], value.get("path")
            return (table.path.parent / path).read_bytes() if data is None and path else data or b""
        return value or b""

    def file(self, i: int) -> bytes:
        return self.content(i)

    def read(self, i: int) -> Image.Image | Jpeg:
        return decode(self.content(i))


def _as_numbers(values: Iterable[int | None]) -> np.ndarray:
    """Labels as they are; -1 for none."""
    return np.fromiter((-1 if value is None else value for value in values), np.int64)


def _numbered(values: Iterable[int | str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels by the classes that integers or texts name, and these; -1 for none (engine.data.labels)."""
    met = Numbering()
    met_N = met.of(read_label(b"cls", str("" if value is None else value).encode()) for value in values)
    classes = by_number(name for name in met.number if name)
    label = {name: i for i, name in enumerate(classes)}
    return np.array([label.get(name, -1) for name in met.number], np.int64)[met_N], tuple(map(printable, classes))


def _check_groups(root: Root, tables: Sequence[Table], sizes: Sequence[np.ndarray]) -> tuple[str, ...]:
    """A line where an image costs the reading of many others. sizes: of each table's images (`Table.sizes`).

    Raises:
        UserError: of too many.
    """
    parquet = [each for table, each in zip(tables, sizes, strict=True) if table.path.suffix.lower() == PARQUET]
    largest = max((int(each[1::2].max()) for each in parquet), default=0) >> 20
    do = "write the files anew with row_group_size=100, or save_to_disk what they hold"
    if largest > _MOST_MIB:
        must = f"must have row groups of at most {_MOST_MIB} MiB, as all of one is read for an image"
        raise UserError(f"{root} {must}; the largest has {largest}: {do}")
    if largest > _SLOW_MIB:
        return (f"{root}: each image is read with its row group, of up to {largest} MiB; if that is slow, {do}",)
    return ()
