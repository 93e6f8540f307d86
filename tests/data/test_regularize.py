"""RandAugment, random erasing, Mixup and CutMix: timm's, but a pure function of who asks."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy
from torch.nn import functional as F

from engine.data.decode import Crops
from engine.data.loader import train_batches
from engine.data.opening import open_source
from engine.data.order import Order
from engine.data.philox import MIX
from engine.data.regularize import Mix, RandAugment, erase, generators_at
from engine.data.source import Root
from engine.data.workers import Workers

VAL = Path(__file__).parents[2] / "recipes/data/fashion_mnist/val.tar"
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


def randaugment(seed: int = 0) -> RandAugment:
    return RandAugment("rand-m9-mstd0.5-inc1", seed, 32, (0.5, 0.4, 0.3), "bicubic")


def test_global_generators_start_where_told_and_go_on_as_if_nothing_had_been():
    def numbers():
        return random.random(), random.gauss(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [numbers() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found = [numbers()]
    inside = []

    def fail_at(place):
        with generators_at(*place):
            inside.append(numbers())
            raise KeyError

    for place in ((3, 1, 5, 0), (3, 1, 5, 0), (3, 2, 5, 0), (3, 1, 6, 0), (4, 1, 5, 0), (3, 1, 5, 1)):
        with pytest.raises(KeyError):
            fail_at(place)
    assert [*found, numbers(), numbers()] == expected
    assert inside[0] == inside[1]
    assert len(set(inside)) == 5


def test_randaugment_depends_on_epoch_and_sample_alone():
    seen = {(e, s): np.asarray(randaugment()(NOISE, e, s)).tobytes() for e in range(3) for s in range(12)}
    again = randaugment()
    for (epoch, sample), pixels in reversed(seen.items()):
        assert np.asarray(again(NOISE, epoch, sample)).tobytes() == pixels
    assert len(set(seen.values())) > 20  # each of two operations happens with probability 1/2
    assert any(np.asarray(randaugment(1)(NOISE, 0, s)).tobytes() != seen[0, s] for s in range(12))


def test_the_strongest_randaugment_runs_on_every_draw():
    strongest = RandAugment("rand-m10-n4-p1.0-inc1", 0, 32, (0.5,) * 3, "bilinear")
    sizes = {strongest(NOISE, 0, sample).size for sample in range(100)}  # each of 15 operations about 27 times
    assert sizes == {(32, 32)}


def test_the_loader_changes_each_repetition_in_its_own_way_on_any_ranks():
    def batches(rank: int, ranks: int) -> list:
        source, crops = open_source(Root("shards", VAL), "all"), Crops(32, 1.0, views=1, after_crop=randaugment())
        order = Order(0, len(source), 12, repeats=3)
        return list(train_batches(source, order, crops, range(2), rank=rank, world_size=ranks, workers=Workers(())))

    whole, halves = batches(0, 1), [batches(0, 2), batches(1, 2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.crops, torch.cat([half[step].crops for half in halves], 1))
        assert torch.equal(batch.shown_B, batch.shown_B[::3].repeat_interleave(3))
        assert len(batch.sample_B.unique()) == 12
        assert len({crop.numpy().tobytes() for crop in batch.crops[0]}) > 8


def test_erasing_takes_its_share_and_minds_only_the_sample():
    sample_B, images = torch.arange(400), torch.zeros(400, 3, 16, 16)
    erase(images, sample_B, 0, 0.25, seed=0)
    erased_B = images.flatten(1).any(1)
    assert 0.17 < erased_B.float().mean() < 0.33
    area_B = (images[erased_B] != 0).float().mean((1, 2, 3))
    assert area_B.min() > 0.01
    assert area_B.max() < 0.45
    assert images[images != 0].std().item() == pytest.approx(1, abs=0.05)
    some = torch.tensor([390, 7, 8, 200])
    few = torch.zeros(4, 3, 16, 16)
    erase(few, some, 0, 0.25, seed=0)
    assert torch.equal(few, images[some])
    later = torch.zeros(400, 3, 16, 16)
    erase(later, sample_B, 1, 0.25, seed=0)
    assert not torch.equal(later.flatten(1).any(1), erased_B)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_two_ranks_mix_as_timm_mixes_their_joint_batch(mixup, cutmix):
    images, labels = torch.rand(12, 3, 16, 16), torch.randint(5, (12,))
    mix, kinds = Mix(mixup, cutmix, 0.1, 5, seed=3), set()
    for step in range(6):
        with generators_at(3, 0, step, MIX):
            theirs = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=5)
            expected, target = theirs(images.clone(), labels)
        halves = [(images[:6], labels[:6]), (images[6:], labels[6:])]
        for rank, (mine, my_labels) in enumerate(halves):
            found, found_target = mix(mine, my_labels, *halves[1 - rank], step)
            assert torch.equal(found, expected[6 * rank : 6 * rank + 6])
            assert torch.equal(found_target, target[6 * rank : 6 * rank + 6])
        inside = ((expected - images).abs() < 1e-6).float().mean().item()
        kinds.add(0.02 < inside < 0.98)
    assert kinds == ({True, False} if mixup and cutmix else {bool(cutmix)})


def test_smoothed_targets_give_timms_smoothed_loss():
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    ours = F.cross_entropy(logits, Mix(0, 0, 0.1, 5, seed=0).plain_target(labels))
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropy(0.1)(logits, labels))
