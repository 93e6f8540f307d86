"""Neighbours are those of largest cosine, and their frames tell the truth."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from engine.data.decode import CenterCrop
from engine.data.opening import open_source
from engine.data.source import Root
from engine.errors import UserError
from engine.evaluation.subject import open_subject
from engine.pictures.canvas import DOTS, HEADER, MARGIN, RIGHT, WRONG
from engine.pictures.neighbours import nearest, spread
from tests.pictures.drawn import VIT, rgb, show


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 30), st.data())
def test_nearest_are_those_of_largest_cosine(seed, count, data):
    feature_ND = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, count - 1))
    query_Q = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4)))
    for query, found in zip(query_Q.tolist(), nearest(feature_ND, query_Q, k).tolist(), strict=True):
        others = [i for i in range(count) if i != query]
        cosine = {i: F.cosine_similarity(feature_ND[query].double(), feature_ND[i].double(), dim=0) for i in others}
        assert found == sorted(others, key=lambda i: -cosine[i])[:k]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_queries_are_spread_over_the_classes(labels, data):
    count = data.draw(st.integers(1, len(labels)))
    rows = spread(torch.tensor(labels), count).tolist()
    assert len(set(rows)) == count
    for label in set(labels):
        share = labels.count(label) / len(labels) * count
        assert abs([labels[row] for row in rows].count(label) - share) < 1 + 1e-9


def test_neighbours_picture(images, tmp_path):
    """Every neighbour has a frame in the colour that its class deserves, and the query is the image that it should."""
    out, queries, k = tmp_path / "n.png", 4, 5
    show("neighbours", VIT, "--data", images, out, "--queries", queries, "--k", k, "--workers", 0)
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)

    source, subject = open_source(Root("folder", images), "all"), open_subject(VIT, "cpu")
    crop = CenterCrop(subject.image_size)
    view_N3SS = torch.stack([crop(source.read(i)) for i in range(len(source))])
    mean, std = (torch.tensor(values)[:, None, None] for values in (subject.mean, subject.std))
    feature_ND = subject.network((view_N3SS / 255 - mean) / std)
    side = (800 - 2 * MARGIN - 20 - k * 6) / (k + 1)
    colours = set()
    for row in range(queries):
        query = [1, 4, 7, 10][row]  # the middles of four parts of the 12 images, which are in the order of classes
        y = HEADER + 20 + row * (side + 18 + 10)
        tile = picture[int(y * DOTS) : int((y + side) * DOTS), MARGIN * DOTS : int((MARGIN + side) * DOTS)]
        assert np.abs(tile.mean((0, 1)) - view_N3SS[query].float().mean((1, 2)).numpy()).max() < 3
        for column, neighbour in enumerate(nearest(feature_ND, torch.tensor([query]), k)[0].tolist(), start=1):
            left = MARGIN + 20 + column * (side + 6)
            frame = picture[int((y + side / 2) * DOTS), round(left * DOTS)]
            colour = RIGHT if source.labels[neighbour] == source.labels[query] else WRONG
            assert np.abs(frame - rgb(colour)).max() < 12
            colours.add(colour)
    assert colours == {RIGHT, WRONG}


def test_neighbours_of_the_class_are_counted_against_how_many_there_are(images, tmp_path):
    """Five others of its class, of eight neighbours."""
    show("neighbours", VIT, "--data", images, tmp_path / "n.svg", "--queries", 4, "--k", 8, "--workers", 0)
    assert " of the same class, 20 at most -->" in (tmp_path / "n.svg").read_text()


def test_unlabelled_images_have_neighbours_without_frames(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in images.glob("*/*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    (flat / "broken.png").write_bytes(b"no image")
    show("neighbours", VIT, "--data", flat, tmp_path / "n.svg", "--queries", 2, "--k", 3, "--workers", 0)
    text = (tmp_path / "n.svg").read_text()
    assert "<!-- By cosine, among 12 of 13 images -->" in text
    assert text.count(".png -->") == 2 * (1 + 3)
    assert RIGHT not in text
    assert WRONG not in text


def test_the_neighbours_of_a_file(images, tmp_path):
    """The image itself is among the images, and so the nearest; no class is known of the file, so none is right."""
    source = open_source(Root("folder", images), "all")
    source.read(3).save(tmp_path / "photo.png")
    out = tmp_path / "n.png"
    show("neighbours", VIT, "--data", images, out, "--query", tmp_path / "photo.png", "--k", 3, "--workers", 0)
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    side = min(160, (800 - 2 * MARGIN - 20 - 3 * 6) / 4)
    y, left = HEADER + 20, [MARGIN, MARGIN + 20 + side + 6]
    tiles = [picture[int(y * DOTS) : int((y + side) * DOTS), int(x * DOTS) : int((x + side) * DOTS)] for x in left]
    assert np.abs(tiles[0].mean((0, 1)) - tiles[1].mean((0, 1))).max() < 3
    assert not any((picture == np.array(rgb(colour))).all(2).any() for colour in (RIGHT, WRONG))
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(UserError, match="--query"):
        show("neighbours", VIT, "--data", images, out, "--query", tmp_path / "broken.png", "--workers", 0)
