"""Tiny files in the layouts of torchvision's datasets. Where a dataset checks md5 sums, those of the real files are
taken out of it."""

import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from engine.data.decode import Reading, to_rgb
from engine.data.opening import align_labels, open_source
from engine.data.orientation import TAG
from engine.data.source import Root
from engine.data.torchvision import TorchvisionSource
from engine.errors import UserError
from tests.data.images import encoded, fill, picture, shades


def opened(root, dataset, side="train", /, **options):
    return open_source(Root("torchvision", root, dataset=dataset, dataset_options=options), side)


def complaint(root, dataset, side="train", /, **options) -> str:
    with pytest.raises(UserError) as error:
        opened(root, dataset, side, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def write_fashion_mnist(root: Path) -> Path:
    folder = root / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 3)):
        images = np.arange(count * 28 * 28, dtype=np.uint8)
        header = b"\0\0\x08\x03" + np.array([count, 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(count, dtype=np.uint8)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + np.array([count], ">i4").tobytes() + labels.tobytes()
        )
    return root


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Writes CIFAR10 with these labels and classes; image i of a split has the shade i."""
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(cls, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})

    def write(train: list, test: list, classes=tuple("abcdefghij")) -> Path:
        folder = tmp_path / cls.base_folder
        folder.mkdir(exist_ok=True)
        for name, labels in (("data_batch_1", train), ("test_batch", test)):
            data = np.arange(len(labels), dtype=np.uint8)[:, None].repeat(3072, 1)
            (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(classes)}))
        return tmp_path

    return write


def write_pets(root: Path, trainval: list[str], test: list[str]) -> Path:
    """Lines of the annotations, as `Birman_7 3 1 1`. The number in an image's name is its shade."""
    (root / "oxford-iiit-pet/annotations").mkdir(parents=True)
    for split, lines in (("trainval", trainval), ("test", test)):
        (root / f"oxford-iiit-pet/annotations/{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        names = [line.split()[0] for line in lines]
        fill(root / "oxford-iiit-pet/images", {f"{name}.jpg": int(name.rpartition("_")[2]) for name in names})
    return root


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Flowers102 of which image i has the shade i."""
    cls = torchvision.datasets.Flowers102
    monkeypatch.setattr(cls, "_file_dict", {key: (name, None) for key, (name, _) in cls._file_dict.items()})
    folder = tmp_path / "flowers-102"
    fill(folder / "jpg", {f"image_{i:05}.jpg": i for i in range(1, 9)})
    savemat(folder / "imagelabels.mat", {"labels": [1, 2, 3, 102, 5, 1, 2, 3]})
    savemat(folder / "setid.mat", {"trnid": [1, 4, 3], "valid": [2, 5], "tstid": [6, 8, 7]})
    return tmp_path


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    cls = torchvision.datasets.SVHN
    monkeypatch.setattr(cls, "split_list", {k: [url, name, None] for k, (url, name, _) in cls.split_list.items()})

    def write(**labels: list[int]) -> Path:
        for split, found in labels.items():
            images = np.zeros((32, 32, 3, len(found)), np.uint8) + np.arange(len(found), dtype=np.uint8)
            savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.array(found)[:, None]})
        return tmp_path

    return write


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """STL10 of two training images, one without a label and one for test."""
    cls = torchvision.datasets.STL10
    for lists in ("train_list", "test_list"):
        monkeypatch.setattr(cls, lists, [[name, None] for name, _ in getattr(cls, lists)])
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    for name, values in (("train", [1, 2]), ("unlabeled", [3]), ("test", [4])):
        data = np.array(values, np.uint8)[:, None].repeat(3 * 96 * 96, 1)
        (folder / f"{name}_X.bin").write_bytes(data.tobytes())
    (folder / "train_y.bin").write_bytes(b"\x01\x0a")
    (folder / "test_y.bin").write_bytes(b"\x01")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    return tmp_path


# ---- one split -------------------------------------------------------------------------------------------------------


def fake(split, **options):
    return opened(Path(), "FakeData", split, **{"size": 6, "image_size": [3, 8, 8], "num_classes": 3, **options})


def test_fake_data():
    train, val = fake("train"), fake("val")
    assert len(train) == 6
    assert train.read(0).size == (8, 8)
    assert train.read(0).mode == "RGB"
    assert train.name(4) == "FakeData 4"
    assert set(train.classes) <= {"0", "1", "2"}
    assert train.labels.tolist() == [train._dataset[i][1] for i in range(6)]
    assert np.array_equal(np.asarray(train.read(3)), np.asarray(fake("train").read(3)))
    assert not any(
        np.array_equal(np.asarray(train.read(i)), np.asarray(val.read(j))) for i in range(6) for j in range(6)
    )
    assert train.fingerprint == fake("train").fingerprint != val.fingerprint
    assert train.fingerprint != fake("train", random_offset=1).fingerprint
    assert fake("train", image_size=(1, 8, 8)).read(0).mode == "RGB"


def test_files_are_read_as_the_recipe_says(tmp_path, monkeypatch):
    """Under max_pixels of the recipe, not of Pillow; turned, where it is wanted."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    exif = Image.Exif()
    exif[TAG] = 6
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(encoded(picture(8, 4), "JPEG", exif=exif.tobytes()))
    source = opened(tmp_path, "ImageFolder")
    assert to_rgb(source.read(0)).size == (8, 4)
    assert to_rgb(source.read(0), Reading(exif_orientation=True)).size == (4, 8)
    with pytest.raises(ValueError, match=r"pass data.max_pixels=32"):
        to_rgb(source.read(0), Reading(max_pixels=31))
    most = Reading().max_pixels
    large = TorchvisionSource(
        [(SimpleNamespace(width=most + 1, height=1, mode="RGB", load=lambda: None), 0)], None, None, "", ""
    )
    Reading(max_pixels=most + 1).check_size(large.read(0))
    with pytest.raises(ValueError, match=rf"more than data.max_pixels \({most}\)"):
        Reading().check_size(large.read(0))


def test_a_dataset_with_a_train_flag(tmp_path):
    write_fashion_mnist(tmp_path)
    train, val = (opened(tmp_path, "FashionMNIST", side) for side in ("train", "val"))
    assert (len(train), len(val)) == (5, 3)
    assert train.labels.tolist() == [0, 1, 2, 3, 4]
    assert train.classes[0] == "T-shirt/top"
    assert align_labels(train, val).labels.tolist() == [0, 1, 2]
    assert len(opened(tmp_path, "FashionMNIST", "val", train=True)) == 3


def test_training_on_what_is_not_flagged_train_leaves_no_validation_split(tmp_path):
    write_fashion_mnist(tmp_path)
    assert len(opened(tmp_path, "FashionMNIST", train=False)) == 3
    assert opened(tmp_path, "FashionMNIST", "val", train=False) is None


def test_a_dataset_with_named_splits(tmp_path):
    fill(tmp_path / "country211", {"train/AD/1.png": 1, "valid/AD/2.png": 2, "valid/AE/3.png": 3, "test/AD/4.png": 4})
    train, val = (opened(tmp_path, "Country211", side) for side in ("train", "val"))
    assert shades(train) == [1]
    assert shades(val) == [2, 3]
    assert val.classes == ("AD", "AE")
    assert val.labels.tolist() == [0, 1]
    assert shades(opened(tmp_path, "Country211", split="test")) == [4]


def test_a_dataset_without_splits_is_training_data(tmp_path):
    fill(tmp_path / "eurosat/2750", {"Forest/1.png": 1, "River/2.png": 2})
    train, val = (opened(tmp_path, "EuroSAT", side) for side in ("train", "val"))
    assert shades(train) == [1, 2]
    assert train.classes == ("Forest", "River")
    assert val is None


def test_classes_of_one_name_stay_apart(cifar10):
    root = cifar10([0, 1, 2, 1], [2, 0], ["crane", "dog", "crane"])
    train, val = opened(root, "CIFAR10"), opened(root, "CIFAR10", "val")
    assert train.labels.tolist() == [0, 1, 2, 1]
    assert shades(train) == [0, 1, 2, 3]
    assert align_labels(train, val).labels.tolist() == [2, 0]


def test_fingerprints_stay_as_they_are_so_that_runs_go_on(cifar10, flowers, tmp_path):
    """Name, arguments and labels: a change here would refuse to resume every run on torchvision's data."""

    def expected(identity: str, labels: list[int]) -> str:
        return hashlib.sha256(identity.encode() + np.array(labels, "<i8").tobytes()).hexdigest()

    root = cifar10([4, 5], [9])
    assert opened(root, "CIFAR10").fingerprint == expected("CIFAR10 [('train', True)] 2 ", [4, 5])
    assert opened(root, "CIFAR10", "val").fingerprint == expected("CIFAR10 [('train', False)] 1 ", [9])
    assert opened(flowers, "Flowers102").fingerprint == expected("Flowers102 [('split', 'train')] 3 ", [0, 101, 2])
    fill(tmp_path / "eurosat/2750", {"Forest/1.png": 1, "River/2.png": 2})
    assert opened(tmp_path, "EuroSAT").fingerprint == expected("EuroSAT [] 2 ", [0, 1])


# ---- splits that are joined, and validation on none of them ----------------------------------------------------------


def test_a_joined_split_holds_its_parts_one_after_the_other(flowers):
    train = opened(flowers, "Flowers102", split="train+val")
    assert shades(train) == [1, 4, 3, 2, 5]
    assert len(train) == 5
    assert train.labels.tolist() == [0, 101, 2, 1, 4]
    assert train.labels.dtype == np.int64
    assert train.classes == opened(flowers, "Flowers102").classes
    assert len(train.classes) == 102
    assert [train.name(i) for i in (0, 2, 3, 4)] == [
        f"Flowers102 {n}" for n in ("train 0", "train 2", "val 0", "val 1")
    ]
    assert opened(flowers, "Flowers102").name(2) == "Flowers102 2"


def test_the_fingerprint_of_a_joined_split_covers_its_parts(flowers):
    splits = ("train+val", "val+train", "train+test", "train+val+test", "train")
    assert len({opened(flowers, "Flowers102", split=split).fingerprint for split in splits}) == len(splits)
    spaced = opened(flowers, "Flowers102", split=" train + val ")
    assert spaced.fingerprint == opened(flowers, "Flowers102", split="train+val").fingerprint


@pytest.mark.parametrize(
    ("split", "validation"),
    [
        ("train", [2, 5]),
        ("val", [6, 8, 7]),
        ("test", [2, 5]),
        ("train+val", [6, 8, 7]),
        ("train+test", [2, 5]),
        ("val + test", None),
        ("test+val+train", None),
    ],
)
def test_validation_is_never_on_a_split_that_is_trained_on(flowers, split, validation):
    val = opened(flowers, "Flowers102", "val", split=split)
    assert (val and shades(val)) == validation


def test_pets_validate_on_test(tmp_path):
    write_pets(tmp_path, ["Abyssinian_7 1 1 1", "pug_8 2 2 1"], ["pug_9 2 2 1", "Abyssinian_1 1 1 1"])
    for options in ({}, {"split": "trainval"}):
        train, val = (opened(tmp_path, "OxfordIIITPet", side, **options) for side in ("train", "val"))
        assert shades(train) == [7, 8]
        assert train.labels.tolist() == [0, 1]
        assert train.classes == ("Abyssinian", "Pug")
        assert shades(val) == [9, 1]
        assert val.labels.tolist() == [1, 0]
    assert shades(opened(tmp_path, "OxfordIIITPet", split="trainval+test")) == [7, 8, 9, 1]
    assert opened(tmp_path, "OxfordIIITPet", "val", split="trainval+test") is None
    assert opened(tmp_path, "OxfordIIITPet", "val", split="test") is None


def test_trainval_holds_val(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b/data"
    fill(data / "images", {"1.jpg": 1, "2.jpg": 2, "3.jpg": 3})
    (data / "variants.txt").write_text("707\n")
    for split, names in (("train", "1"), ("val", "2"), ("trainval", "12"), ("test", "3")):
        (data / f"images_variant_{split}.txt").write_text("".join(f"{name} 707\n" for name in names))
    assert shades(opened(tmp_path, "FGVCAircraft", "val")) == [2]
    assert shades(opened(tmp_path, "FGVCAircraft", split="trainval")) == [1, 2]
    assert shades(opened(tmp_path, "FGVCAircraft", "val", split="trainval")) == [3]
    assert "must join splits that share no images" in complaint(tmp_path, "FGVCAircraft", split="val+trainval")


@pytest.mark.parametrize(("dataset", "split"), [("CelebA", "all"), ("CelebA", "All"), ("LFWPeople", "10fold")])
def test_a_split_that_holds_everything_leaves_no_validation_split(tmp_path, dataset, split):
    assert opened(tmp_path, dataset, "val", split=split) is None
    assert "must hold torchvision's" in complaint(tmp_path, dataset, "val", split="train")  # looked for, not there


def test_a_joined_split_that_torchvision_knows_is_torchvisions(stl10):
    train = opened(stl10, "STL10", split="train+unlabeled")
    assert shades(train) == [1, 2, 3]
    assert train.labels is None
    assert train.name(2) == "STL10 2"
    assert shades(opened(stl10, "STL10", "val", split="train+unlabeled")) == [4]
    joined = opened(stl10, "STL10", split="train+test")
    assert shades(joined) == [1, 2, 4]
    assert joined.labels.tolist() == [0, 9, 0]
    assert joined.name(2) == "STL10 test 0"
    half = opened(stl10, "STL10", split="unlabeled+test")
    assert shades(half) == [3, 4]
    assert half.labels is None
    assert half.classes is None


def test_parts_with_other_classes_are_joined_by_name(tmp_path):
    fill(tmp_path / "country211", {"train/B/1.png": 1, "valid/A/2.png": 2, "valid/B/3.png": 3, "test/B/4.png": 4})
    train = opened(tmp_path, "Country211", split="train+valid")
    assert shades(train) == [1, 2, 3]
    assert [train.classes[label] for label in train.labels] == ["B", "A", "B"]
    val = align_labels(train, opened(tmp_path, "Country211", "val", split="train+valid"))
    assert shades(val) == [4]
    assert [val.classes[label] for label in val.labels] == ["B"]


def test_parts_whose_classes_have_no_names_are_joined_by_number(svhn):
    root = svhn(train=[1, 2], extra=[10, 3, 1], test=[3, 1])  # SVHN's label of the digit 0 is 10
    train = opened(root, "SVHN", split="train+extra")
    assert train.labels.tolist() == [1, 2, 0, 3, 1]
    assert train.classes == ("0", "1", "2", "3")
    assert opened(root, "SVHN").classes == ("0", "1", "2")
    assert align_labels(train, opened(root, "SVHN", "val")).labels.tolist() == [3, 1]


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("Cifar10", {}, r"data.dataset \(Cifar10\) must be a class of torchvision.datasets; did you mean CIFAR10\?"),
        (None, {}, r"data.dataset \(None\) must be a class of torchvision.datasets"),
        ("CIFAR10", {}, r"data.root \(.*\) must hold torchvision's CIFAR10; torchvision: Dataset not found"),
        ("FakeData", {"sise": 3}, r"data.dataset_options \(.*\) must suit FakeData; .*'sise'"),
        ("FakeData", {"random_offset": "a"}, r"data.dataset_options \(.*\) must suit FakeData; "),
        ("FakeData", {"num_classes": 0}, r"data.dataset_options \(.*\) must suit FakeData; "),
        ("FakeData", {"image_size": [3]}, r"data.dataset_options \(.*\) must suit FakeData; "),
        ("FakeData", {"size": 0}, r"data.root \(.*\) must hold images of torchvision's FakeData; there are none"),
        (
            "FakeData",
            {"size": 2, "num_classes": 2**40},
            r"data.root \(.*\) must have labels 0 to 999999; FakeData 0 has",
        ),
        ("Flowers102", {"split": "trian"}, r"data.dataset \(Flowers102\) must have a training split; .*trian"),
        ("Flowers102", {"split": 3}, r"data.dataset \(Flowers102\) must have a training split; .*int"),
        ("Flowers102", {"split": "+"}, r"data.dataset_options \(.*\) must join splits that share no images; name each"),
        ("Flowers102", {"split": "val+val"}, r"data.dataset_options \(.*\) must join splits that share no images"),
    ],
)
def test_mistakes_are_one_line(tmp_path, name, options, text):
    with pytest.raises(UserError, match=text) as error:
        opened(tmp_path, name, **options)
    assert "\n" not in str(error.value)


def test_fake_data_names_its_mistake_for_validation_too(tmp_path):
    assert "must suit FakeData" in complaint(tmp_path, "FakeData", "val", random_offset="a")


@pytest.mark.parametrize("split", ["train+vla", "vla+train", "train+val+vla"])
def test_an_unknown_part_is_named(flowers, split):
    line = complaint(flowers, "Flowers102", split=split)
    assert line.startswith("data.dataset (Flowers102) must have a training split; Unknown value 'vla'"), line


@pytest.mark.parametrize("split", ["train+", "+train", "train++val"])
def test_a_part_without_a_name_is_unknown(flowers, split):
    assert "must have a training split; Unknown value ''" in complaint(flowers, "Flowers102", split=split)


def test_a_root_for_validation_without_a_validation_split_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"data.val_root \(.*\) must have a validation split; torchvision's CIFAR10 has"
    ):
        open_source(Root("torchvision", tmp_path, "data.val_root", "CIFAR10"), "all")


@pytest.mark.parametrize("label", [10, 12, -1, -7])
def test_a_label_without_a_class_is_named(cifar10, label):
    root = cifar10([0, 9, label, 3], [1])
    assert complaint(root, "CIFAR10") == (
        f"data.root ({root}) must have labels 0 to 9; CIFAR10 2 has {label}; download it again"
    )
    assert opened(root, "CIFAR10", "val").labels.tolist() == [1]


def test_a_label_without_a_class_is_named_in_a_part(flowers):
    savemat(flowers / "flowers-102/imagelabels.mat", {"labels": [1, 2, 3, 102, 103, 1, 2, 3]})
    line = complaint(flowers, "Flowers102", split="train+val")
    assert line == f"data.root ({flowers}) must have labels 0 to 101; Flowers102 val 1 has 102; download it again"


@pytest.mark.parametrize("label", [-1, 10**6, 2**62])
def test_a_number_that_is_no_label_is_named_where_classes_have_no_names(svhn, label):
    root = svhn(train=[1, label])
    assert complaint(root, "SVHN") == (
        f"data.root ({root}) must have labels 0 to 999999; SVHN 1 has {label}; download it again"
    )


def test_a_dataset_without_images_is_named(tmp_path):
    write_pets(tmp_path, ["pug_8 1 2 1"], [])
    assert "must hold images of torchvision's OxfordIIITPet; there are" in complaint(tmp_path, "OxfordIIITPet", "val")


def test_damaged_validation_data_is_not_taken_for_none(tmp_path):
    write_pets(tmp_path, ["pug_8 1 2 1"], ["pug_9 one 2 1"])
    assert len(opened(tmp_path, "OxfordIIITPet")) == 1
    line = complaint(tmp_path, "OxfordIIITPet", "val")
    assert "must hold torchvision's OxfordIIITPet; torchvision: invalid literal for int() with base 10: 'one'" in line
