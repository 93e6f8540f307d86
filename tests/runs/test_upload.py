"""Batches go to a GPU beside the steps; stand-ins for streams say in what order."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine.data.loader import Batch
from engine.runs import upload
from engine.runs.task import Task

GPU = torch.device("cuda", 1)


class Stream:
    def __init__(self, name: str, said: list[str]):
        self.name, self.said = name, said

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} wait for {other.name}")


class Pixels:
    """Of a batch, on the host or on the GPU."""

    def __init__(self, name: str, streams: SimpleNamespace):
        self.name, self.streams = name, streams

    def to(self, device: torch.device, *, non_blocking: bool) -> "Pixels":
        assert device == GPU
        assert non_blocking
        self.streams.said.append(f"{self.streams.current.name} copy {self.name}")
        return Pixels(f"{self.name}'s copy", self.streams)

    def record_stream(self, stream: Stream) -> None:
        self.streams.said.append(f"{stream.name} hold {self.name}")


@pytest.fixture
def streams(monkeypatch):
    """What streams are asked to do, in order; the current one is that of the steps."""
    said: list[str] = []
    steps = Stream("steps", said)
    streams = SimpleNamespace(said=said, current=steps, made=0)

    def make(device: torch.device) -> Stream:
        assert device == GPU
        streams.made += 1
        return Stream(f"side {streams.made}", said)

    @contextmanager
    def within(stream: Stream):
        streams.current = stream
        yield
        streams.current = steps

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams.current)
    upload._side_stream.cache_clear()
    yield streams
    upload._side_stream.cache_clear()


def on_device(crops, sample_B, device):
    batch = Batch(step=0, epoch=0, crops=crops, sample_B=sample_B, shown_B=sample_B, bad=[])
    return Task.on_device(SimpleNamespace(world=SimpleNamespace(device=device)), batch)


def test_crops_are_copied_beside_the_steps_which_wait_for_them_and_hold_their_memory(streams):
    crops, sample_B = on_device(Pixels("crops", streams), Pixels("samples", streams), GPU)
    assert [crops.name, sample_B.name] == ["crops's copy", "samples's copy"]
    assert streams.said[:3] == ["side 1 copy crops", "steps wait for side 1", "steps hold crops's copy"]
    assert streams.said[3:] == ["steps copy samples"]


def test_all_batches_share_a_stream(streams):
    for name in ("first", "second"):
        upload.uploaded(Pixels(name, streams), GPU)
    assert [words for words in streams.said if "copy " in words] == ["side 1 copy first", "side 1 copy second"]


def test_on_a_cpu_a_batch_stays_what_it_is(streams):
    crops, sample_B = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8), torch.arange(3)
    found = on_device(crops, sample_B, torch.device("cpu"))
    assert found[0] is crops
    assert found[1] is sample_B
    assert streams.said == []
    assert streams.made == 0
