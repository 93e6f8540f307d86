"""Tables of images: as Hugging Face's library saves them, and Parquet files."""

import json
import multiprocessing
import os
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.opening import guess_kind, open_source
from engine.data.source import Root
from engine.data.splits import open_labelled
from engine.errors import UserError
from engine.recipe.load import load
from tests.data.images import png, shades
from tests.recipe.shipped import QUICK

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CAT_DOG = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def table(shades_and_labels: dict[int, object], features: dict | None = None, **columns) -> pa.Table:
    images = [{"bytes": png(shade), "path": f"{shade}.png"} for shade in shades_and_labels]
    found = {"image": pa.array(images, STRUCT), "label": pa.array(list(shades_and_labels.values())), **columns}
    about = {} if features is None else {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.table(found).replace_schema_metadata(about)


def save(folder, *tables: pa.Table, batch: int = 2):
    """As `save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05}-of-{len(tables):05}.arrow" for k in range(len(tables))]
    for name, each in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, each.schema) as stream:
            stream.write_table(each, max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def save_splits(folder, **splits: pa.Table):
    for name, each in splits.items():
        save(folder / name, each)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def opened(path, split="train", **options):
    return open_source(Root("hf", path, dataset_options=options), split)


FIVE = {1: 0, 2: 1, 3: 0, 4: 1, 5: 1}


def test_a_saved_data_set(tmp_path):
    root = save(tmp_path / "set", table(FIVE, CAT_DOG), table({6: 0}, CAT_DOG))
    source = pickle.loads(pickle.dumps(opened(root)))
    assert shades(source) == [1, 2, 3, 4, 5, 6]
    assert (source.labels.tolist(), source.classes) == ([0, 1, 0, 1, 1, 0], ("cat", "dog"))
    assert [source.name(i) for i in (4, 5)] == ["data-00000-of-00002.arrow:4", "data-00001-of-00002.arrow:0"]
    assert source.content(2) == png(3)
    assert (opened(root, "val"), len(opened(root, "all")), source.notes) == (None, 6, ())
    assert guess_kind(root) == "hf"


def test_splits_of_a_saved_data_set(tmp_path, world):
    parts = {name: table({shade: 0, shade + 1: 1}, CAT_DOG) for name, shade in (("train", 1), ("test", 3))}
    root = save_splits(tmp_path / "a", **parts)
    assert (shades(opened(root)), shades(opened(root, "val"))) == ([1, 2], [3, 4])
    more = save_splits(tmp_path / "b", **parts, validation=table({5: 1}, CAT_DOG))
    assert shades(opened(more, "val")) == [5]
    assert opened(more).notes == (f"data.root ({more}): left out beside train, validation: test",)
    found = open_labelled(Root("hf", root), Root("hf", more), world)
    assert (found.val.labels.tolist(), found.val.classes) == ([1], ("cat", "dog"))
    assert guess_kind(more) == "hf"


@pytest.mark.parametrize("image", ["struct", "bytes", "large"])
def test_parquet_files_by_their_names(tmp_path, image):
    (tmp_path / "data").mkdir()
    for name, shown in {"train-00000-of-00002": FIVE, "train-00001-of-00002": {6: 1}, "test-00000": {7: 0}}.items():
        whole = table(shown, CAT_DOG)
        if image != "struct":
            kind = pa.binary() if image == "bytes" else pa.large_binary()
            raw = pa.array([png(shade) for shade in shown], kind)
            whole = pa.table({"image": raw, "label": whole["label"]}).replace_schema_metadata(whole.schema.metadata)
        pq.write_table(whole, tmp_path / f"data/{name}.parquet", row_group_size=2)
    source = pickle.loads(pickle.dumps(opened(tmp_path)))
    assert shades(source) == [1, 2, 3, 4, 5, 6]
    assert [source.read(i).getpixel((0, 0))[0] for i in (5, 0, 4, 1)] == [6, 1, 5, 2]
    assert (source.labels.tolist(), source.classes) == ([0, 1, 0, 1, 1, 1], ("cat", "dog"))
    assert shades(opened(tmp_path, "val")) == [7]
    assert shades(opened(tmp_path / "data/test-00000.parquet")) == [7]
    assert guess_kind(tmp_path) == guess_kind(tmp_path / "data/test-00000.parquet") == "hf"


def in_another_process(source) -> None:
    sys.exit(shades(source) != [1, 2, 3, 4, 5])


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_loading_processes_read_what_their_parent_has_read(tmp_path, kind):
    root = save(tmp_path / "set", table(FIVE)) if kind == "arrow" else tmp_path / "x.parquet"
    if kind == "parquet":
        pq.write_table(table(FIVE), root, row_group_size=2)
    source = opened(root)
    assert shades(source) == [1, 2, 3, 4, 5]
    process = multiprocessing.get_context("fork").Process(target=in_another_process, args=(source,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_columns_are_found_or_named(tmp_path):
    two = {1: "x", 2: "y"}
    fine, coarse = ({"names": [f"{kind}{k}" for k in range(3)], "_type": "ClassLabel"} for kind in ("f", "c"))
    about = {"fine": fine, "coarse": coarse}
    both = table(two, about, fine=pa.array([2, 1]), coarse=pa.array([0, 0]), mask=pa.array([b"", b""])).drop(["label"])
    root = save(tmp_path / "both", both)
    source = opened(root)
    assert source.labels is None
    assert "any of fine, coarse may say classes; name it in data.dataset_options={label: NAME}" in source.notes[0]
    named = opened(root, label="fine")
    assert (named.labels.tolist(), named.classes, named.notes) == ([2, 1], ("f0", "f1", "f2"), ())
    assert opened(root, label=None).notes == ()
    for options, text in {
        ("image", "coarse"): "must have a column of images, .* it has image, fine, coarse, mask; name one",
        ("image", ("mask",)): r"data.dataset_options \(image: .*mask.*\) must name a column: image, fine, coarse, mask",
        ("image", "none"): r"data.dataset_options \(image: none\) must name a column: image, fine, coarse, mask",
        ("label", "mask"): r"\(label: mask\) must name a column of integers or texts",
    }.items():
        with pytest.raises(UserError, match=text):
            opened(root, **{options[0]: [*options[1]] if isinstance(options[1], tuple) else options[1]})
    texts = opened(save(tmp_path / "texts", table({1: "10", 2: "9", 3: "dog"})))
    assert (texts.labels.tolist(), texts.classes) == ([1, 0, 2], ("9", "10", "dog"))
    categories = table({1: "x", 2: "y"}, label=pa.array(["y", "x"]).dictionary_encode())
    assert opened(save(tmp_path / "categories", categories)).classes == ("x", "y")
    pq.write_table(table({1: "x", 2: "y"}, label=pa.array(["y", "x"], pa.string_view())), tmp_path / "views.parquet")
    assert opened(tmp_path / "views.parquet").labels.tolist() == [1, 0]
    odd = opened(save(tmp_path / "odd", table({1: "x", 2: "y"}, label=pa.array([0.5, 1.5]))))
    assert odd.labels is None
    assert "unlabelled: label holds neither integers nor texts" in odd.notes[0]
    for name, label in (("null", {1: 0, 2: None}), ("minus", {1: -1, 2: 1})):
        bare = opened(save(tmp_path / name, table(label)))
        assert bare.labels is None
        assert "1 of 2 images have no label, so none of them is read" in bare.notes[0]


@pytest.mark.parametrize(
    ("features", "labels", "classes"),
    [
        ([1], [0, 1], ("0", "1")),
        ({"label": 3}, [0, 1], ("0", "1")),
        ({"label": {"_type": "ClassLabel"}}, [0, 1], ("0", "1")),
        ({"label": {"_type": "ClassLabel", "names": 3}}, [0, 1], ("0", "1")),
        ({"label": {"_type": "ClassLabel", "names": []}}, [0, 1], ("0", "1")),
        ({"label": {"_type": "ClassLabel", "names": ["\ud800", 7]}}, [0, 1], (r"\ud800", "7")),
        (CAT_DOG, ["dog", "cat"], ("cat", "dog")),
        (CAT_DOG, [0.0, 1.0], None),
    ],
)
def test_what_is_noted_of_columns_may_be_anything(tmp_path, features, labels, classes):
    source = opened(save(tmp_path / "set", table(dict(enumerate(labels)), features)))
    assert source.classes == classes


def test_hidden_tables_are_none_and_a_suffix_may_be_upper_case(tmp_path):
    for folder in (".cache", "__MACOSX", "data"):
        (tmp_path / folder).mkdir()
    pq.write_table(table({1: 0}), tmp_path / "data/TRAIN.PARQUET")
    for name in (".cache/train.parquet", "__MACOSX/train.parquet", "data/._train.parquet"):
        (tmp_path / name).write_bytes(b"no table")
    os.mkfifo(tmp_path / "data/pipe.parquet")
    assert shades(opened(tmp_path)) == [1]
    assert guess_kind(tmp_path) == "hf"


def test_an_image_may_be_a_path_or_missing(tmp_path):
    (tmp_path / "own.png").write_bytes(png(9))
    rows = [{"bytes": None, "path": str(tmp_path / "own.png")}, {"bytes": None, "path": None}, None]
    root = save(tmp_path / "set", pa.table({"image": pa.array(rows, STRUCT)}))
    source = opened(root)
    assert source.read(0).getpixel((0, 0)) == (9, 0, 0)
    for i in (1, 2):
        with pytest.raises(ValueError, match="not an image"):
            source.read(i)


def test_tables_that_cannot_be_used_are_one_line(tmp_path, monkeypatch):
    good = save(tmp_path / "good", table(FIVE))
    torn = save(tmp_path / "torn", table(FIVE))
    content = (torn / "data-00000-of-00001.arrow").read_bytes()
    (torn / "data-00000-of-00001.arrow").write_bytes(content[: len(content) // 2])
    lost, odd, texts, empty, other, only_test, high = (
        tmp_path / name for name in ("lost", "odd", "text", "empty", "x", "t", "h")
    )
    save(lost, table(FIVE))
    (lost / "data-00000-of-00001.arrow").unlink()
    save(odd, table(FIVE))
    (odd / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}')
    save(texts, pa.table({"text": ["a"]}))
    save(empty, table({}).slice(0, 0).cast(table({1: 0}).schema))
    save(other, table(FIVE), table({1: "text"}))
    save_splits(only_test, validation=table(FIVE))
    save(high, table({1: 2}, CAT_DOG))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    cases = {
        torn: "must hold whole Arrow or Parquet files",
        lost: "must hold whole Arrow or Parquet files",
        odd: r"must hold its rows in order; call flatten_indices\(\)",
        texts: r"images, each a struct of bytes and path, or bytes; it has text; .* pass data.source=folder$",
        empty: "must hold images; its tables have no rows",
        other: "must hold tables of the same columns",
        only_test: "must hold train beside val",
        high: "must have labels 0 to 1 in label; it has 2",
        tmp_path / "bad.parquet": "must hold whole Arrow or Parquet files",
        tmp_path / "good/dataset_info.json": "must hold whole Arrow or Parquet files",
        tmp_path / "none": r"must exist; pass data.root=",
    }
    (odd.parent / "json").mkdir()
    (odd.parent / "json/state.json").write_text("[]")
    (odd.parent / "files").mkdir()
    (odd.parent / "files/state.json").write_text('{"_data_files": [{"name": "a.arrow"}]}')
    cases[odd.parent / "files"] = "must be as save_to_disk left it; state.json is not"
    cases[odd.parent / "json"] = "must be as save_to_disk left it; state.json is not"
    image, label = (table(FIVE).column(name) for name in ("image", "label"))
    save(tmp_path / "same", pa.table([image, label, label], names=["image", "label", "label"]))
    cases[tmp_path / "same"] = "must have columns of different names; it has image, label, label: rename one"
    for name, text in {"none": '{"splits": []}', "three": '{"splits": 3}'}.items():
        (tmp_path / f"splits-{name}").mkdir()
        (tmp_path / f"splits-{name}/dataset_dict.json").write_text(text)
    cases[tmp_path / "splits-none"] = "must hold images; it is a data set without tables"
    cases[tmp_path / "splits-three"] = "must be as save_to_disk left it; dataset_dict.json is not"
    save(tmp_path / "no-tables")
    cases[tmp_path / "no-tables"] = "must hold images; it is a data set without tables"
    (tmp_path / "bare").mkdir()
    cases[tmp_path / "bare"] = "must hold a data set that was saved by save_to_disk, or"
    for path, text in cases.items():
        with pytest.raises(UserError, match=text) as error:
            opened(path)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("engine.data.hf._MOST_MIB", -1)
    pq.write_table(table(FIVE), tmp_path / "wide.parquet")
    with pytest.raises(
        UserError, match=r"must have row groups of at most -1 MiB, .* row_group_size=100, or save_to_disk"
    ):
        opened(tmp_path / "wide.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow, which is not installed; do `pip install -e '.\[hf\]'`"):
        opened(good)


def test_a_fingerprint_is_of_sizes_and_labels_wherever_the_tables_are(tmp_path):
    def fingerprint(name, *shown):
        return opened(save(tmp_path / name, *(table(each) for each in shown))).fingerprint

    here = fingerprint("here", {1: 0, 200: 1})
    assert here == fingerprint("there", {1: 0, 200: 1})
    assert len({here, fingerprint("labels", {1: 1, 200: 0}), fingerprint("fewer", {1: 0})}) == 3


def test_only_columns_may_be_options(tmp_path):
    root = [f"data.root={tmp_path}", "data.source=hf"]
    assert load(QUICK, [*root, "data.dataset_options={image: img, label: null}"]).data.source == "hf"
    with pytest.raises(UserError, match="must be names of columns under image and label"):
        load(QUICK, [*root, "data.dataset_options={split: train}"])


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), batch=st.integers(1, 4), kind=st.sampled_from("ap"))
def test_every_row_is_found_whatever_the_groups(tmp_path_factory, sizes, batch, kind):
    root, shade, expected = tmp_path_factory.mktemp("set"), 0, []
    tables = []
    for size in sizes:
        expected += range(shade, shade + size)
        whole = dict.fromkeys(range(shade, shade + size), 0) or {0: 0}
        tables.append(table(whole).slice(0, size))
        shade += size
    if not expected:
        return
    if kind == "a":
        root = save(root / "saved", *tables, batch=batch)
    else:
        for k, each in enumerate(tables):
            pq.write_table(each, root / f"{k}.parquet", row_group_size=batch)
    assert shades(opened(root)) == expected
