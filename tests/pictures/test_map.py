"""Maps are those of scikit-learn, and their colours are the classes'."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from engine.data.opening import open_source
from engine.data.source import Root
from engine.errors import UserError
from engine.pictures.map import OTHERS, Map, apart, draw_map, flat_map
from tests.pictures.drawn import VIT, show


def test_pca_is_that_of_scikit_learn():
    feature_ND = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.arange(1.0, 7))
    places = flat_map(feature_ND, "pca")
    theirs = PCA(2).fit(F.normalize(feature_ND.double(), dim=1).numpy())
    expected = theirs.transform(F.normalize(feature_ND.double(), dim=1).numpy())
    np.testing.assert_allclose(np.abs(places.place_N2.numpy()), np.abs(expected), atol=1e-9)
    share = [f"{value:.0%}" for value in theirs.explained_variance_ratio_]
    assert [share[i] in axis for i, axis in enumerate(places.axes)] == [True, True]


def test_tsne_keeps_clusters_together():
    centre_N = torch.arange(40) % 2
    feature_ND = F.one_hot(centre_N, 8) + 0.05 * torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    place_N2 = flat_map(feature_ND, "tsne").place_N2
    assert torch.equal(place_N2, flat_map(feature_ND, "tsne").place_N2)
    distance_NN = torch.cdist(place_N2, place_N2) + torch.eye(40) * 1e9
    assert torch.equal(centre_N[distance_NN.argmin(1)], centre_N)


def test_embedding_picture(images, tmp_path):
    show("embedding", VIT, "--data", images, tmp_path / "e.svg", "--workers", 0, "--images", 9)
    text = (tmp_path / "e.svg").read_text()
    for words in ("9 of 12 images of 2 classes by principal components", "even ones", "odd ones", "component 1: "):
        assert f"<!-- {words}" in text, words
    points = text[text.index('<g id="PathCollection_1">') :].split("</g>\n  </g>")[0]
    assert points.count("<use ") == 9
    labels = open_source(Root("folder", images), "all").labels[np.linspace(0, 11, 9).round().astype(int)]
    for label, colour in enumerate(("#1f77b4", "#ff7f0e")):
        assert points.count(f"fill: {colour}") == (labels == label).sum()


def test_images_without_classes_are_seen_where_there_is_room(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in images.glob("*/*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    show("embedding", VIT, "--data", flat, tmp_path / "e.svg", "--workers", 0)
    text = (tmp_path / "e.svg").read_text()
    assert "<!-- 12 images by principal components" in text
    assert 3 <= text.count("<image ") <= 12


def test_no_two_images_overlap_and_none_could_be_added():
    point_N2 = np.random.default_rng(3).normal(size=(300, 2)) * 200
    kept = apart(point_N2, 44)
    distance_NN = np.abs(point_N2[:, None] - point_N2[kept]).max(2)
    assert (distance_NN[kept] + 44 * np.eye(len(kept)) >= 44).all()
    assert (np.delete(distance_NN, kept, 0) < 44).any(1).all()


def test_many_classes_share_a_grey(tmp_path):
    label_N = np.repeat(np.arange(25), 2)
    label_N[:4] = 24  # classes 0 and 1 have no image, class 24 has the most
    places = Map(torch.randn(50, 2), ("", ""))
    with_names = [f"class {i}" for i in range(25)]
    draw_map(places, label_N, with_names, "title", "", tmp_path / "m.svg", pytest.fail)
    text = (tmp_path / "m.svg").read_text()
    shown = [name for name in with_names if f"<!-- {name} -->" in text]
    assert shown == [f"class {i}" for i in (*range(2, 19), 24)]
    assert "<!-- 5 more -->" in text
    points = text[text.index('<g id="PathCollection_1">') :].split("</g>\n  </g>")[0]
    assert points.count(f"fill: {OTHERS}") == 10


def test_images_of_which_none_can_be_read_are_one_line(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for kind in ("embedding", "neighbours"):
        with pytest.raises(UserError, match="images that can be read, and none of 1 can"):
            show(kind, VIT, "--data", tmp_path, tmp_path.parent / "e.svg", "--workers", 0)
