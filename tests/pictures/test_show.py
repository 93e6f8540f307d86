"""The pictures show what they say: attention, neighbours, maps and views are computed anew here and found in them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA
from torch.nn import functional as F

from engine.data.decode import center_crop, crop_box, crop_draws, decode
from engine.data.loader import train_batches
from engine.data.sources import open_source
from engine.errors import UserError
from engine.pictures.attention import check_attention, class_attention
from engine.pictures.canvas import HEADER, MARGIN, RIGHT, WRONG
from engine.pictures.geometry import Map, flat_map, nearest, spread
from engine.pictures.pictures import OTHERS, VIEW_COLOURS, draw_map
from engine.recipe.load import load
from engine.runs.pretrain import make_augment
from engine.show import main
from engine.weights.opening import open_encoder
from models.resnet import build_resnet
from models.vit import build_vit

ROOT = Path(__file__).parents[2]
VIT = str(ROOT / "tests/golden/I_vit_small_shape.pth.tar")
CONV = str(ROOT / "tests/golden/I_vit_conv_small_shape.pth.tar")
QUICKSTART = ROOT / "recipes/quickstart.yaml"
FASHION = ROOT / "recipes/data/fashion_mnist"
DOTS = 2  # per pixel of a picture


def show(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twelve images, each brighter than the one before, of two classes in turn."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        folder = root / ("even ones", "odd ones")[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = random.integers(0, 120, (80, 100, 3)) + 12 * i
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_by_hand(trunk, image_B3SS: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(d)) of the class token's row, from the weights of the last block alone: [B, H, N]."""
    x_BND = trunk._pos_embed(trunk.patch_embed(image_B3SS))
    for block in trunk.blocks[:-1]:
        x_BND = block(x_BND)
    block = trunk.blocks[-1]
    x_BND = block.norm1(x_BND).double()
    weight_3HdD = block.attn.qkv.weight.double().unflatten(0, (3, block.attn.num_heads, -1))
    bias_3Hd = block.attn.qkv.bias.double().unflatten(0, (3, block.attn.num_heads, -1))
    q_BHd = torch.einsum("bd,hed->bhe", x_BND[:, 0], weight_3HdD[0]) + bias_3Hd[0]
    k_BHNd = torch.einsum("bnd,hed->bhne", x_BND, weight_3HdD[1]) + bias_3Hd[1][:, None]
    score_BHN = torch.einsum("bhe,bhne->bhn", q_BHd, k_BHNd) / q_BHd.shape[-1] ** 0.5
    return score_BHN.exp() / score_BHN.exp().sum(-1, keepdim=True)


def trunks():
    shape = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "heads": 3}
    yield "ours", build_vit(**shape)
    yield "conv stem", build_vit(**shape | {"depth": 1}, conv_stem=True)
    options = {"img_size": 64, "num_classes": 0, "depth": 2}
    yield "timm", timm.create_model("vit_tiny_patch16_224", **options)
    yield "registers", timm.create_model("vit_tiny_patch16_224", reg_tokens=3, **options)


@pytest.mark.parametrize("trunk", [pytest.param(trunk, id=name) for name, trunk in trunks()])
@torch.no_grad()
def test_attention_is_that_of_the_blocks_own_weights(trunk):
    trunk.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trunk.parameters():
        parameter.normal_(0, 4 / trunk.embed_dim**0.5, generator=generator)
    check_attention(trunk, "a trunk")
    image_B3SS = torch.randn(2, 3, *trunk.patch_embed.img_size, generator=generator)
    before = trunk(image_B3SS)

    found_BHRC = class_attention(trunk, image_B3SS)
    expected_BHN = attention_by_hand(trunk, image_B3SS)[:, :, trunk.num_prefix_tokens :]
    assert found_BHRC.shape[2:] == trunk.patch_embed.grid_size
    torch.testing.assert_close(found_BHRC.flatten(2).double(), expected_BHN, rtol=1e-4, atol=1e-7)
    assert expected_BHN.amax(2).min() > 2 * expected_BHN.mean()  # far from even, so the order of patches is tested
    assert torch.equal(trunk(image_B3SS), before)  # and the trunk is as it was


def test_attention_wants_a_class_token():
    with torch.device("meta"):
        without = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg")
        for trunk in (build_resnet(), timm.create_model("swin_tiny_patch4_window7_224"), without):
            with pytest.raises(UserError, match=r"CHECKPOINT \(runs/x\) must be of a ViT with a class token"):
                check_attention(trunk, "runs/x")


@pytest.mark.parametrize("checkpoint", [VIT, CONV])
def test_attention_picture(checkpoint, images, tmp_path, capsys):
    file = images / "odd ones" / "1.png"
    show("attention", checkpoint, file, tmp_path / "a.png")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"file": str(tmp_path / "a.png")}
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape[1] == 800 * DOTS
    # 12 heads stand in 3 rows of 4: the two large squares are as high as 3 small ones with their names.
    small = (800 - 2 * MARGIN - 4 * 6 - 3 * 6 - 2 * 2 * 26) / 10
    large = 3 * small + 2 * 26
    square = picture[HEADER * DOTS : int((HEADER + large) * DOTS), MARGIN * DOTS : int((MARGIN + large) * DOTS)]
    encoder = open_encoder(checkpoint)
    image_3SS = center_crop(decode(file.read_bytes()), encoder.about.image_size)
    assert np.abs(square.mean((0, 1)) - image_3SS.float().mean((1, 2)).numpy()).max() < 2
    # The brightest patch of head 1 is where its attention is largest.
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.about.mean, encoder.about.std))
    weight_RC = attention_by_hand(encoder.trunk, ((image_3SS / 255 - mean) / std)[None])[0, 0, 1:].unflatten(0, (4, 4))
    x, y, patch = MARGIN + 2 * large + 24, HEADER, small / 4
    centres = [[(x + (c + 0.5) * patch, y + (r + 0.5) * patch) for c in range(4)] for r in range(4)]
    light = [[int(picture[int(v * DOTS), int(u * DOTS)].sum()) for u, v in row] for row in centres]
    assert np.argmax(light) == weight_RC.argmax()


# ---- neighbours ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.data())
def test_nearest_are_those_of_largest_cosine(seed, count, data):
    feature_ND = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.integers(1, count - 1))
    query_Q = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4)))
    for query, found in zip(query_Q.tolist(), nearest(feature_ND, query_Q, k).tolist(), strict=True):
        others = [i for i in range(count) if i != query]
        cosine = {i: F.cosine_similarity(feature_ND[query].double(), feature_ND[i].double(), dim=0) for i in others}
        assert found == sorted(others, key=lambda i: -cosine[i])[:k]


def test_diverged_features_are_refused():
    feature_ND = torch.ones(6, 3)
    feature_ND[4, 1] = torch.nan
    for look in (lambda: nearest(feature_ND, torch.tensor([0]), 2), lambda: flat_map(feature_ND, "pca")):
        with pytest.raises(UserError, match="CHECKPOINT must give finite features"):
            look()


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

    source, encoder = open_source("folder", images, "all"), open_encoder(VIT)
    view_N3SS = torch.stack([center_crop(source.read(i), encoder.about.image_size) for i in range(len(source))])
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.about.mean, encoder.about.std))
    feature_ND = encoder.trunk((view_N3SS / 255 - mean) / std)
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


def test_unlabelled_images_have_neighbours_without_frames(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in images.glob("*/*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    (flat / "broken.png").write_bytes(b"no image")
    show("neighbours", VIT, "--data", flat, tmp_path / "n.svg", "--queries", 2, "--k", 3, "--workers", 0)
    text = (tmp_path / "n.svg").read_text()
    assert "<!-- By cosine, among 12 of 13 images -->" in text
    assert RIGHT not in text and WRONG not in text


# ---- maps ------------------------------------------------------------------------------------------------------------


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
    labels = open_source("folder", images, "all").labels[np.linspace(0, 11, 9).round().astype(int)]
    for label, colour in enumerate(("#1f77b4", "#ff7f0e")):
        assert points.count(f"fill: {colour}") == (labels == label).sum()


def test_many_classes_share_a_grey(tmp_path):
    label_N = np.repeat(np.arange(25), 2)
    label_N[:4] = 24  # classes 0 and 1 have no image, class 24 has the most
    places = Map(torch.randn(50, 2), ("", ""))
    with_names = [f"class {i}" for i in range(25)]
    draw_map(places, label_N, with_names, "title", "", tmp_path / "m.svg")
    text = (tmp_path / "m.svg").read_text()
    shown = [name for name in with_names if f"<!-- {name} -->" in text]
    assert shown == [f"class {i}" for i in (*range(2, 19), 24)] and "<!-- 5 more -->" in text
    points = text[text.index('<g id="PathCollection_1">') :].split("</g>\n  </g>")[0]
    assert points.count(f"fill: {OTHERS}") == 10


# ---- views -----------------------------------------------------------------------------------------------------------


def test_views_picture_holds_the_first_batch_of_a_run(tmp_path):
    """The squares of the picture are, pixel by pixel, the views that training makes of its first batch."""
    overrides = [f"data.root={json.dumps(str(FASHION))}", "run.seed=3"]
    show("views", QUICKSTART, tmp_path / "v.png", *overrides)
    picture = np.asarray(Image.open(tmp_path / "v.png").convert("RGB")).astype(int)

    recipe = load(QUICKSTART, overrides)
    source = open_source("shards", FASHION, "train")
    run = {"global_batch_size": 128, "rank": 0, "world_size": 1, "first_step": 0, "last_step": 1, "workers": 0}
    form = {"image_size": 28, "crop_min": recipe.augment.crop_min, "pin_memory": False}
    batch = next(iter(train_batches(source, seed=3, **run, **form)))
    augment = make_augment(recipe, torch.float32)
    view_2B3SS = augment(batch.crops, batch.sample_B, 0).unflatten(0, (2, -1)) * 0.5  # the recipe's std; its mean is 0
    side, scale = 112, 112 * DOTS // 28
    for column in range(6):
        x = (MARGIN + 62 + column * (side + 6)) * DOTS
        for row in range(3):
            y = (HEADER + row * (side + 6)) * DOTS
            tile_SS3 = picture[y : y + side * DOTS, x : x + side * DOTS][scale // 2 :: scale, scale // 2 :: scale]
            if row:
                expected_SS3 = view_2B3SS[row - 1, column].clamp(0, 1).permute(1, 2, 0).numpy() * 255
                assert np.abs(tile_SS3 - expected_SS3).max() <= 1
                continue
            image = source.read(int(batch.sample_B[column]))
            clear_SS = np.abs(tile_SS3 - np.asarray(image).astype(int)).max(2) <= 1  # where no outline lies
            assert clear_SS.mean() > 0.7
            for view, colour in enumerate(VIEW_COLOURS):
                draw_D = crop_draws(3, 0, batch.sample_B[column : column + 1], view)[0]
                top, left, height, width = crop_box(draw_D, 28, 28, recipe.augment.crop_min)
                cut = image.crop((left, top, left + width, top + height)).resize((28, 28), Image.Resampling.BILINEAR)
                assert np.array_equal(np.asarray(cut).transpose(2, 0, 1), batch.crops[view, column])
                if view:  # the later outline lies on top: its lower edge, at a third of it
                    edge = picture[y + (top + height) * scale - 1, x + round((left + width / 3) * scale)]
                    assert np.abs(edge - rgb(colour)).max() < 60


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(images, tmp_path):
    broken, out = tmp_path / "broken.jpg", tmp_path / "out.png"
    broken.write_bytes(b"\xff\xd8\xff no image")
    (tmp_path / "folder.png").mkdir()
    few = ("--data", images, out, "--workers", 0)
    cases = {
        r"OUT \(.*out.gif\) must end in .png": ("attention", VIT, broken, tmp_path / "out.gif"),
        r"OUT \(.*folder.png\) must be a file": ("attention", VIT, broken, tmp_path / "folder.png"),
        r"OUT \(.*\) must lie in a folder that exists": ("attention", VIT, broken, tmp_path / "no" / "out.png"),
        r"IMAGE \(.*broken.jpg\) must be a readable image": ("attention", VIT, broken, out),
        r"IMAGE \(.*none.jpg\) must be a readable image: No such file": ("attention", VIT, tmp_path / "none.jpg", out),
        r"CHECKPOINT \(.*none\) must exist": ("neighbours", tmp_path / "none", *few),
        r"--data \(.*none\) must exist": ("embedding", VIT, "--data", tmp_path / "none", out),
        r"--queries \(13\) must be at most 12": ("neighbours", VIT, *few, "--queries", 13),
        r"--k \(12\) must be at most 11": ("neighbours", VIT, *few, "--k", 12),
        r"--dataset \(CIFAR10\) must go with --source torchvision": ("embedding", VIT, *few, "--dataset", "CIFAR10"),
        r"--dataset \(None\) must go with --source torchvision": ("embedding", VIT, *few, "--source", "torchvision"),
        r"data.root \(.*none\) must exist": ("views", QUICKSTART, out, f"data.root={tmp_path}/none"),
        r"recipe \(.*none.yaml\) must be a readable file": ("views", tmp_path / "none.yaml", out),
        r"did you mean augment.crop_min": ("views", QUICKSTART, out, "augment.crop_minn=1"),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message):
            show(*arguments)
        assert not out.exists()


def test_a_picture_that_is_there_is_replaced(images, tmp_path):
    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    show("attention", VIT, images / "odd ones" / "1.png", out)
    assert Image.open(out).format == "PNG"


def test_a_missing_library_is_named(images, tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"scikit-learn.*pip install -e '.\[pictures\]'"):
        show("embedding", VIT, "--data", images, out, "--method", "tsne")
    for name in ("canvas", "pictures"):
        monkeypatch.delitem(sys.modules, f"engine.evaluation.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib.*pip install -e '.\[pictures\]'"):
        show("attention", VIT, images / "odd ones" / "1.png", out)
