"""kNN and RankMe give the same on 1, 2 and 4 ranks: real processes, gloo, a sharded trunk."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine.errors import UserError
from engine.evaluation.features import Features, extract, rank_slice
from engine.evaluation.knn import accuracy, classify, gather_rows
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.evaluation.subject import Subject
from tests.evaluation.batches import padded_batch

WORLDS = (1, 2, 4)
BATCH = 8
TRAIN, VAL = 130, 37  # neither divides into full batches, nor batches into ranks
CLASSES = 6
BANK = TRAIN - 8  # readable ones


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy classes, and every fifth image a copy of the one before, so that similarities are equal."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES - 1, (count,), generator=generator)
    labels[BATCH] = CLASSES - 1  # the last class is on one rank only
    noise = torch.randint(160, (count, 3, 8, 8), generator=generator)
    images = (noise + labels[:, None, None, None] * 12).to(torch.uint8)
    images[4::5] = images[3::5][: len(images[4::5])]
    return images, labels


def batches_of(count: int, seed: int):
    """What the loader yields for this rank. Every 17th image is unreadable, so batches in the middle are not full."""
    images, labels = pictures(count, seed)
    ids, passes = rank_slice(count, dist.get_rank(), dist.get_world_size(), BATCH)
    for start in range(0, passes * BATCH, BATCH):
        yield padded_batch(images, labels, readable(ids[start : start + BATCH]), BATCH)


def readable(ids: torch.Tensor) -> torch.Tensor:
    return ids[ids % 17 != 3]


def sharded_trunk() -> nn.Module:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.BatchNorm1d(40), nn.GELU(), nn.Linear(40, 24)).train()
    fully_shard(trunk, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return trunk


def refusals(bank: Features, query_QD: torch.Tensor) -> list[str]:
    """A bad row on one rank only, or a k above the whole bank: all ranks raise, and none waits for another."""
    last = dist.get_rank() == dist.get_world_size() - 1
    messages = []
    for change, error in (("nan", FloatingPointError), ("label", ValueError), ("k", UserError)):
        broken = Features(*(rows.clone() for rows in bank))
        if change == "nan" and last:
            broken.feature_ND[0, 0] = float("nan")
        if change == "label" and last:
            broken.label_N[0] = CLASSES
        k = BANK + 1 if change == "k" else BANK
        with pytest.raises(error) as caught:
            classify(broken, query_QD, classes=CLASSES, ks=(k,))
        messages.append(str(caught.value))
    return messages


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store_{world}", rank=rank, world_size=world)
    trunk = sharded_trunk()
    subject = Subject(trunk, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_fraction=1)
    bank = extract(subject, batches_of(TRAIN, 1), "cpu")
    query = gather_rows(extract(subject, batches_of(VAL, 2), "cpu"), None)
    assert torch.equal(query.id_N, readable(torch.arange(VAL)))
    assert torch.equal(query.label_N, pictures(VAL, 2)[1][query.id_N])
    options = {"classes": CLASSES, "ks": (1, 5, 20, BANK)}
    whole = gather_rows(bank, None)
    held = slice(None) if rank == world - 1 else slice(0)  # all on the last rank, nothing on the others
    predictions = classify(bank, query.feature_ND, **options)
    result = {
        "query": query.feature_ND,
        "bank": whole.feature_ND,
        "some": list(gather_rows(bank, None, [0, world // 2])),
        "predictions": predictions,
        "other_tiles": classify(bank, query.feature_ND, **options, tile=3, chunk=5),
        "one_holder": classify(Features(*(rows[held] for rows in whole)), query.feature_ND, **options),
        "accuracy": accuracy(predictions[20], query.label_N),
        "refusals": refusals(bank, query.feature_ND),
        "rankme": rankme_from_gram(feature_gram(bank.feature_ND, None)).item(),
        "training": trunk.training,
    }
    torch.save(result, f"{folder}/{world}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """{world: result of each rank}; one launch per world size."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in WORLDS:
        mp.start_processes(worker, (world, str(folder)), nprocs=world, start_method="forkserver")
    return {world: [load(folder, world, rank) for rank in range(world)] for world in WORLDS}


def load(folder: Path, world: int, rank: int) -> dict:
    return torch.load(folder / f"{world}_{rank}.pt", weights_only=True)


def test_features_and_predictions_are_the_same_bits_on_any_ranks(results):
    one = results[1][0]
    for result in (result for world in WORLDS for result in results[world]):
        assert torch.equal(result["query"], one["query"])
        assert torch.equal(result["bank"], one["bank"])
        for way in ("predictions", "other_tiles", "one_holder"):
            assert result[way].keys() == one["predictions"].keys()
            assert all(torch.equal(result[way][k], one["predictions"][k]) for k in one["predictions"])


def test_rows_are_gathered_on_some_ranks_alone(results):
    wanted, none = results[1][0]["some"], [rows[:0] for rows in results[1][0]["some"]]
    assert torch.equal(wanted[0], results[1][0]["bank"])
    for world in WORLDS:
        for rank, result in enumerate(results[world]):
            held = wanted if rank in (0, world // 2) else none
            assert all(torch.equal(*pair) for pair in zip(result["some"], held, strict=True))


def test_accuracy_is_the_same_on_all_ranks_and_tells_something(results):
    assert len({str(result["accuracy"]) for world in WORLDS for result in results[world]}) == 1
    found = results[1][0]["accuracy"]
    assert 1 / CLASSES < found["top1"] < found["top5"] <= 1
    assert all(result["training"] for world in WORLDS for result in results[world])


def test_all_ranks_refuse_what_one_rank_holds(results):
    for result in (result for world in WORLDS for result in results[world]):
        assert result["refusals"] == results[1][0]["refusals"]
    not_finite, strange, k = results[1][0]["refusals"]
    assert f"1 of {BANK}" in not_finite
    assert f"of {BANK} for training, 1 have" in strange
    assert k.startswith(f"k ({BANK + 1}) must be at most {BANK}, ")


def test_rankme_is_of_the_features_of_all_ranks(results):
    expected = results[1][0]["rankme"]
    assert expected > 2
    for result in (result for world in WORLDS for result in results[world]):
        assert result["rankme"] == pytest.approx(expected, rel=1e-9)
