import gc
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchdata.nodes import Prefetcher

from engine.data import workers
from engine.data.bad_images import Bad, BadImages, bears, least_fraction, report
from engine.data.decode import CenterCrop, Crops, crop_draws
from engine.data.loader import eval_batches, train_batches
from engine.data.opening import open_source
from engine.data.order import Order
from engine.data.parts import _Read, in_parts
from engine.data.source import Root, Source
from engine.data.workers import LoadingFailed, Workers
from engine.errors import RunFailed, UserError
from tests.data.images import encoded, picture

IMAGES, SIZE = 22, 16
CROPS = Crops(SIZE, 0.2)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """22 images of many sizes in two classes, so two steps of 8 make an epoch."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (rng.integers(1, 40), rng.integers(1, 40), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[i // 11]}/{i:02}.png")
    return folder


@pytest.fixture
def source(root) -> Source:
    return open_source(Root("folder", root), "train")


def cut_short() -> bytes:
    """A JPEG that is found to be broken only when its crops are cut."""
    whole = encoded(picture(40, 40), "JPEG")
    return whole[: len(whole) // 2]


@pytest.fixture
def broken(root, tmp_path) -> Source:
    """The same images, but numbers 3, 4 and 21 cannot be read."""
    copy = shutil.copytree(root, tmp_path / "broken")
    for name, data in (
        ("a/03.png", b""),
        ("a/04.png", cut_short()),
        ("b/21.png", (root / "b/21.png").read_bytes()[:50]),
    ):
        (copy / name).write_bytes(data)
    return open_source(Root("folder", copy), "train")


def batches(source, *, rank=0, world=1, first=0, last=5, workers=0, batch=8, seed=1, **more):
    order, steps = Order(seed, len(source), batch), range(first, last)
    with Workers([source], workers, **more) as readers:
        yield from train_batches(source, order, CROPS, steps, rank=rank, world_size=world, workers=readers)


def evaluated(source, ids, *, batch_size, workers=0, **more):
    with Workers([source], workers) as readers:
        yield from eval_batches(source, ids, CenterCrop(SIZE), batch_size=batch_size, workers=readers, **more)


def rows(iterator) -> list[tuple]:
    """Batches in a form that == compares bit for bit."""
    return [(b.step, b.epoch, b.crops.numpy().tobytes(), b.sample_B.tolist(), b.bad) for b in iterator]


def globally(source, world, **options) -> list[tuple]:
    """The batches of all ranks, joined."""
    joined = []
    for parts in zip(*[batches(source, rank=rank, world=world, **options) for rank in range(world)], strict=True):
        crops, sample_B = torch.cat([b.crops for b in parts], 1), torch.cat([b.sample_B for b in parts])
        joined.append(parts[0]._replace(crops=crops, sample_B=sample_B, bad=[bad for b in parts for bad in b.bad]))
        assert len({(b.step, b.epoch) for b in parts}) == 1
    return rows(joined)


def test_a_batch_is_what_sampler_and_decode_say(source):
    batch = list(batches(source))[3]
    samples = Order(1, IMAGES, 8).samples(1, np.arange(8, 16))
    assert (batch.step, batch.epoch) == (3, 1)
    assert batch.sample_B.tolist() == samples.tolist()
    assert batch.crops.shape == (2, 8, 3, SIZE, SIZE)
    assert batch.crops.dtype == torch.uint8
    assert batch.crops.permute(0, 1, 3, 4, 2).is_contiguous()  # as decoders have pixels
    assert batch.bad == []
    assert batch.sample_B.dtype == torch.int64
    for b, sample in enumerate(samples):
        expected = np.empty((2, 3, SIZE, SIZE), np.uint8)
        draw_2D = [crop_draws(1, 1, torch.tensor([sample]), view)[0] for view in (0, 1)]
        CROPS.cut(source.read(sample), draw_2D, 1, sample, expected)
        assert np.array_equal(batch.crops[:, b], expected)


@pytest.mark.parametrize("data", ["source", "broken"])
def test_batches_are_the_same_for_any_workers_ranks_and_start(data, request):
    source = request.getfixturevalue(data)
    expected = rows(batches(source))
    assert len(expected) == 5
    assert len({crops for _, _, crops, _, _ in expected}) == 5
    assert rows(batches(source, workers=1)) == expected
    assert rows(batches(source, workers=3)) == expected
    assert globally(source, 2) == expected
    assert globally(source, 4) == expected
    assert rows(batches(source, first=3)) == expected[3:]
    assert rows(batches(source, seed=2)) != expected


def test_an_unreadable_image_is_replaced_by_the_next_and_nothing_else_shifts(source, broken):
    instead = {3: 5, 4: 5, 21: 0}
    reported = []
    for step, (whole, other) in enumerate(zip(batches(source, last=4), batches(broken, last=4), strict=True)):
        assert torch.equal(whole.sample_B, other.sample_B)
        names = [broken.name(i) for i in other.sample_B.tolist() if i in instead]
        assert [bad.name for bad in other.bad] == names
        reported += other.bad
        for b, sample in enumerate(other.sample_B.tolist()):
            expected = whole.crops[:, b].numpy()
            if sample in instead:
                draw_2D = [crop_draws(1, step // 2, torch.tensor([sample]), view)[0] for view in (0, 1)]
                expected = np.empty((2, 3, SIZE, SIZE), np.uint8)
                CROPS.cut(source.read(instead[sample]), draw_2D, step // 2, sample, expected)
            assert np.array_equal(other.crops[:, b], expected)
    reasons = dict(reported)
    assert set(reasons) == {"a/03.png", "a/04.png", "b/21.png"}
    assert all(reasons.values())
    assert reasons["a/03.png"].startswith("ValueError: not an image of the kinds")
    assert reasons["a/04.png"].startswith("OSError: image file is truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_readable_images_ends_in_one_line(tmp_path, workers):
    for i in range(150):
        (tmp_path / f"{i:03}.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        list(batches(open_source(Root("folder", tmp_path), "train"), workers=workers))
    first = Order(1, 150, 8).samples(0, np.arange(1))[0]
    assert str(error.value).startswith(f"data.root must hold readable images; {first:03}.png (ValueError: not an image")
    assert str(error.value).endswith("and the 100 after it are not; repair them")


def test_a_batch_that_does_not_suit_is_refused_before_any_work(source):
    for options in ({"batch": 23}, {"batch": 9, "world": 2}):
        with pytest.raises(UserError, match=r"train.global_batch_size \(\d+\) must be at most the number of images"):
            next(batches(source, **options))


def test_loading_leaves_the_global_generator_alone(source):
    before = torch.get_rng_state()
    list(batches(source, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_fake_data():
    options = {"size": 10, "image_size": [3, 20, 20], "num_classes": 3}
    source = open_source(Root("torchvision", Path(), dataset="FakeData", dataset_options=options), "train")
    expected = rows(batches(source, last=3))
    assert rows(batches(source, last=3, workers=1)) == expected
    assert not any(bad for *_, bad in expected)


# ---- worker processes ------------------------------------------------------------------------------------------------


class Slow(Source):
    """Does in read() what the test says."""

    labels = classes = None
    fingerprint = ""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return IMAGES

    def name(self, i):
        return str(i)

    def read(self, i):
        self.act()
        return Image.new("RGB", (4, 4))


def workers_now() -> list[int]:
    """Of the loaders in use: what a failed test leaves to the garbage collector is cleared away."""
    gc.collect()
    return [child.pid for child in multiprocessing.active_children()]


def gone(pids: list[int]) -> bool:
    """Waits up to 20 s: killed processes end at their own, low priority. Zombies, which nobody may reap, are gone."""

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    for _ in range(200):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


def test_a_worker_that_is_killed_is_an_error_and_not_a_hang():
    iterator = batches(Slow(lambda: time.sleep(0.05)), workers=1)
    next(iterator)
    os.kill(workers_now()[0], signal.SIGKILL)
    with pytest.raises(RunFailed, match=r"^a loading process died"):
        list(iterator)


def lower(limit: int, most: int) -> None:
    resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))


def test_a_batch_takes_no_files_and_no_descriptors_to_hand_over():
    expected = rows(batches(Slow(lambda: None)))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        assert rows(batches(Slow(lambda limit=limit: lower(limit, 10)), workers=2)) == expected  # in the workers alone


def test_the_training_process_goes_before_its_workers(source):
    iterator = batches(source, workers=1, last=1000)
    next(iterator)
    (pid,) = workers_now()
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(os.nice(0) + workers._NICER, 19)
    iterator.close()


def test_processes_that_the_system_refuses_are_an_error_of_one_line(source):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower(resource.RLIMIT_NOFILE, max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()) + 8)
    try:
        with pytest.raises(
            UserError, match=r"^data.workers or --workers \(99\) must be as many as .* refused number \d+ "
        ):
            Workers([source], 99)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert gone(workers_now())


@pytest.mark.parametrize(("count", "what"), [(1, "came from the loading processes"), (0, "could be read")])
def test_silence_is_said_and_ends(monkeypatch, capsys, count, what):
    """Whoever reads: processes, or with none of them this one."""
    monkeypatch.setattr(workers, "SAY_SECONDS", 0.6)
    monkeypatch.setattr(workers, "_TICK", 0.1)
    source, expected = Slow(lambda: None), rows(batches(Slow(lambda: None)))
    reads, over = itertools.count(), threading.Event()
    source.act = lambda: time.sleep(1 if next(reads) == 8 else 0)
    assert rows(batches(source, workers=count, timeout=60)) == expected
    said = capsys.readouterr().err
    assert said.count(f"warning: no image {what} for 0.01 minutes; after 1 that ends the run") == 1
    stalled = itertools.count()
    source.act = lambda: over.wait(600 if next(stalled) >= 8 else 0)
    iterator = batches(source, workers=count, timeout=0.9)
    for whole in expected[:1]:
        assert rows([next(iterator)]) == [whole]
    with pytest.raises(RunFailed, match=rf"no image {what} for 0.0\d+ minutes: the disk that holds the images may not"):
        next(iterator)
    assert f"warning: no image {what}" in capsys.readouterr().err
    over.set()
    assert gone(workers_now())


def run_out_of_memory():
    raise MemoryError("no memory for this image")


@pytest.mark.parametrize(("act", "words"), [(run_out_of_memory, r"had no memory left \(no memory for this image\)")])
def test_a_worker_that_fails_says_why_and_none_is_left(act, words):
    with pytest.raises(RunFailed, match=words):
        list(batches(Slow(act), workers=2))
    assert gone(workers_now())


def test_signals_that_stop_the_run_do_not_stop_workers():
    iterator = batches(Slow(lambda: time.sleep(0.02)), workers=1)
    next(iterator)
    for name in ("TERM", "INT"):  # from a process that is not the parent, as torchrun is not
        subprocess.run(["kill", f"-{name}", str(workers_now()[0])], check=True)
    assert len(list(iterator)) == 4


def test_workers_end_when_their_parent_tells_them_to():
    iterator = batches(Slow(lambda: time.sleep(0.02)), workers=1, last=1000)
    next(iterator)
    pids = workers_now()
    os.kill(pids[0], signal.SIGTERM)
    assert gone(pids)
    iterator.close()


def leave_workers_at_work():
    leave_workers_at_work.iterator = batches(Slow(lambda: time.sleep(0.01)), workers=2, last=1000)
    next(leave_workers_at_work.iterator)


def test_a_process_that_ends_with_workers_at_work_does_end():
    process = multiprocessing.get_context("fork").Process(target=leave_workers_at_work)
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0


def test_an_iterator_that_is_given_up_leaves_no_worker(source):
    iterator = batches(source, workers=2, last=1000)
    next(iterator)
    pids = workers_now()
    assert len(pids) == 2
    iterator.close()
    assert gone(pids)


class Garbage:
    """Refers to itself, so that only the garbage collector frees it; that writes the process it happens in."""

    def __init__(self, path):
        self.path, self.itself = path, self

    def __del__(self):
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_workers_leave_the_garbage_that_they_inherit(tmp_path):
    # An iterator over other workers may be part of it: finalized in two processes, it blocks both for ever.
    gc.disable()
    try:
        Garbage(tmp_path / "freed")
        assert len(list(batches(Slow(gc.collect), workers=2))) == 5
        assert not (tmp_path / "freed").exists()
        gc.collect()
    finally:
        gc.enable()
    assert (tmp_path / "freed").read_text() == f"{os.getpid()}\n"


def hold_workers(pipe):
    reads = itertools.count()  # each worker counts for itself
    # Stuck in a read, a worker cannot look whether its parent lives.
    iterator = batches(Slow(lambda: time.sleep(120 if next(reads) >= 8 else 0)), workers=2, last=1000)
    next(iterator)
    pipe.send(workers_now())
    time.sleep(60)


def test_workers_die_with_their_parent():
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    parent = fork.Process(target=hold_workers, args=(theirs,))
    parent.start()
    assert ours.poll(60)
    pids = ours.recv()
    assert len(pids) == 2
    parent.kill()
    parent.join()
    assert gone(pids)


def count_reads(path):
    with path.open("ab") as file:
        file.write(b".")


def test_no_more_is_read_ahead_than_three_batches(tmp_path):
    reads = tmp_path / "reads"
    iterator = batches(Slow(lambda: count_reads(reads)), workers=2, last=1000)
    next(iterator)
    for _ in range(100):  # until nothing more comes
        before = reads.stat().st_size
        time.sleep(0.2)
        if reads.stat().st_size == before:
            break
    assert 8 * 2 <= reads.stat().st_size <= 8 * (1 + 3)  # one is given, one waits, two lie in parts of four images
    iterator.close()


def test_training_and_evaluation_share_workers(source, broken):
    """Turn by turn, out of two sources; each as if alone."""
    order, ids = Order(1, IMAGES, 8), range(IMAGES)
    with Workers([source, broken], 2) as readers:
        trained = train_batches(source, order, CROPS, range(6), rank=0, world_size=1, workers=readers)
        seen = eval_batches(broken, ids, CenterCrop(SIZE), batch_size=4, workers=readers)
        pairs = list(zip(trained, seen, strict=True))
    assert rows(ours for ours, _ in pairs) == rows(batches(source, last=6))
    for (_, ours), alone in zip(pairs, evaluated(broken, ids, batch_size=4), strict=True):
        assert ours.bad == alone.bad
        assert all(torch.equal(one, other) for one, other in zip(ours[:3], alone[:3], strict=True))


@pytest.mark.parametrize("count", [0, 2])
def test_the_state_of_the_node_is_where_the_order_goes_on(count):
    shares = [((0, 0), np.arange(k, k + 5)) for k in range(6)]
    with Workers((), count) as readers:

        def node():
            read = _Read(draw_nothing, shares, (2, SIZE), lambda draft, replies: draft.image_B.tolist(), readers)
            return Prefetcher(read, prefetch_factor=1) if count else read

        given = node()
        for number in range(1, 5):
            assert next(given) == shares[number - 1][1].tolist()
            other = node()
            other.reset(json.loads(json.dumps(given.state_dict())))
            assert list(other) == [row_B.tolist() for _, row_B in shares[number:]]


def draw_nothing(at, out):
    out[...] = 0


def read_sizes(source, at, out):
    return out.shape[1]


def test_parts_are_as_large_after_a_partial_batch_as_before_it(source):
    shares = [(0, np.zeros(size, np.int64)) for size in (1, 90, 0, 90)]
    with Workers([source], 2) as readers:
        found = list(in_parts(source, read_sizes, shares, (2, SIZE), lambda draft, replies: replies, readers))
    assert found == [[1], [32, 32, 26], [0], [32, 32, 26]]


def test_a_source_that_processes_do_not_have_is_an_error(source, broken):
    for count in (0, 1):
        with Workers([source], count) as readers, pytest.raises(KeyError, match="none of the sources that these"):
            list(eval_batches(broken, [1], CenterCrop(SIZE), batch_size=1, workers=readers))


def test_an_error_of_the_order_or_of_what_joins_parts_arrives_as_it_is(source):
    def fail(draft, replies):
        raise ZeroDivisionError("of mine")

    with Workers([source], 1) as readers:
        for batches, error in (([(0, np.arange(3))], ZeroDivisionError), ([(0, None)], TypeError)):
            with pytest.raises(error) as found:
                list(in_parts(source, read_sizes, batches, (2, SIZE), fail, readers))
            assert len(str(found.value).splitlines()) == 1
    assert [thread.name for thread in threading.enumerate() if "Prefetcher" in thread.name] == []


def test_a_process_whose_reply_nobody_took_is_asked_no_more(source, monkeypatch):
    """Else its reply would be taken for the next one's."""

    def fail(silence, poll):
        raise BrokenPipeError("no stderr to warn on")

    with Workers([source], 1) as readers:
        monkeypatch.setattr(workers._Silence, "wait_for", fail)
        for error in (BrokenPipeError, LoadingFailed):
            with pytest.raises(error, match="no stderr"):
                list(eval_batches(source, [1], CenterCrop(SIZE), batch_size=1, workers=readers))
            monkeypatch.undo()


def test_processes_that_cannot_be_killed_are_not_waited_for(monkeypatch):
    """As those are that wait for a network disk."""
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    readers = Workers([Slow(lambda: None)], 2)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "kill", lambda process: None)
        readers.close()
        assert len(workers_now()) == 2
    readers.close()
    assert workers_now() == []
    with pytest.raises(LoadingFailed, match=r"^the loading processes have ended$"):
        list(eval_batches(readers.sources[0], [1], CenterCrop(SIZE), batch_size=1, workers=readers))


def test_a_signal_without_a_name_is_said_by_its_number():
    iterator = batches(Slow(lambda: time.sleep(0.05)), workers=1)
    next(iterator)
    os.kill(workers_now()[0], signal.SIGRTMIN + 1)
    with pytest.raises(RunFailed, match=rf"^a loading process died \(.*{signal.SIGRTMIN + 1}\)$|Real-time signal"):
        list(iterator)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_evaluation_pads_to_one_shape(source, workers):
    ids = np.arange(5, 15)
    found = list(evaluated(source, ids, batch_size=4, workers=workers, batches=5))
    assert [batch.valid for batch in found] == [4, 4, 2, 0, 0]
    assert all(batch.images.shape == (4, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8 for batch in found)
    rest = ids.tolist()
    for images, ids_B, labels_B, valid, bad in found:
        here, rest = rest[:valid], rest[valid:]
        assert ids_B.tolist() == here + [-1] * (4 - valid)
        assert bad == []
        assert labels_B.tolist() == source.labels[here].tolist() + [-1] * (4 - valid)
        assert all(torch.equal(images[b], CenterCrop(SIZE)(source.read(i))) for b, i in enumerate(here))
        assert not images[valid:].any()
    assert rest == []
    assert len(list(evaluated(source, ids, batch_size=4, workers=workers))) == 3


def test_evaluation_leaves_out_what_it_cannot_read_and_says_so(broken):
    (batch,) = evaluated(broken, [2, 3, 5], batch_size=4)
    assert batch.valid == 2
    assert batch.ids_B.tolist() == [2, 5, -1, -1]
    assert batch.bad == [Bad("a/03.png", batch.bad[0].reason)]


def test_a_bad_image_is_said_once_however_often_it_is_met(broken, capsys):
    run, other = (BadImages(1.0, None) for _ in range(2))
    for met in (run.meet, run.meet, other.meet, partial(report, consequence="it is left out", of=broken.fingerprint)):
        met([bad for batch in batches(broken, last=8) for bad in batch.bad])
    said = [line for line in capsys.readouterr().err.splitlines() if "a/03.png could not be read" in line]
    assert [line.rpartition("; ")[2] for line in said] == ["its neighbour took its place"] * 2 + ["it is left out"]
    assert run.met > 2 * 3


def test_the_share_that_is_named_bears_what_was_found():
    """Though 0.29 * 100 is less than 29."""
    for images in range(1, 301):
        for bad in range(1, images + 1):
            share = least_fraction(bad, images)
            assert bears(share, bad, images)
            assert not bears(share - 0.001001, bad, images)
    assert BadImages(0.29, None).excess(29, 100) is None
    assert BadImages(0.28, None).excess(29, 100).endswith("pass data.max_bad_fraction=0.29 or more to go on")
    assert BadImages(0.0, None).excess(0, 0) is None


def test_evaluation_of_unlabelled_images_and_of_too_few_batches(tmp_path):
    Image.new("L", (5, 5)).save(tmp_path / "1.png")
    source = open_source(Root("folder", tmp_path), "train")
    (batch,) = evaluated(source, [0], batch_size=2)
    assert batch.valid == 1
    assert batch.labels_B.tolist() == [-1, -1]
    with pytest.raises(ValueError, match="3 images do not fit into 1 batches of 2"):
        next(evaluated(source, [0, 0, 0], batch_size=2, batches=1))
