"""Blows at random moments: `python -m tests.distributed.kills OUT [--count 100] [--ranks 2] [--seed 0]`

One small run is left alone. Victims with the same recipe are hit at moments uniform over a run's life, from the start
of its processes to its last line, by what kills, stops or delays a run (BLOWS), and started again by the same command
until they finish: with the engine's own ranks or under torchrun, told to restart by themselves or not. What a victim
leaves, every tensor of its last checkpoint and every row of its log without the clock's, must be what the other run has
left.

Ends with one JSON line: blows, how many of each kind, runs, starts, steps done twice, seconds from a blow to the next
step (median and most), and `different`: victims that ended otherwise, were refused a start or left a process behind.
They stay in OUT, with their words and blows, and the exit status is 1. One seed and count draw the same blows.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

from engine.checkpoint.manifest import read_manifest, verify
from engine.errors import UserError
from tests.distributed.commands import ONE_PROCESS, QUICKSTART, TORCHRUN, Command, children_of, ranks_of, torchrun_ranks
from tests.distributed.launch import TIMEOUT, environment
from tests.machine import trajectory

LAST = 40
LOOK_SECONDS = 0.02
STARTS_AT_MOST = 60  # of one victim; one that needs more does not come forward
OVERRIDES = {
    # Random images, 20 steps an epoch; kNN before step 1 and after every epoch.
    "data.source": "torchvision",
    "data.dataset": "FakeData",
    "data.dataset_options": "{size: 320, image_size: [3, 36, 40], num_classes: 4}",
    "data.workers": 1,
    "model.dim": 32,
    "model.heads": 2,
    "model.projector_hidden_dim": 64,
    "model.output_dim": 32,
    "train.global_batch_size": 16,
    "train.epochs": 3,
    "train.warmup_epochs": 1,
    "train.max_steps": LAST,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 2,
    "log.every_steps": 1,
    "evaluate.knn_every_epochs": 1,
    "evaluate.knn_bank": 6,
}
SIGNALS = {"TERM": signal.SIGTERM, "INT": signal.SIGINT, "HUP": signal.SIGHUP, "USR1": signal.SIGUSR1}
BLOWS = ("kill rank", "kill launcher", "kill loading process", "kill everything", *SIGNALS, "delay", "STOP")
DELAY_SECONDS = 3.0  # at most
# torchrun would die of USR1, which the README says and mends.
TORCHRUN_MENDED = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}


@dataclass
class Victim:
    """A run, and what befell it."""

    folder: Path
    ranks: int
    draw: random.Random
    blows: list[str] = field(default_factory=list)
    starts: int = 0
    steps: int = 0  # that were said, those done twice too
    seconds: list[float] = field(default_factory=list)  # from a blow to the next step
    hit: float | None = None  # when the blow came after which no step was made yet
    words: list[str] = field(default_factory=list)


def launchers(ranks: int) -> list[tuple[object, ...]]:
    if ranks == 1:
        return [ONE_PROCESS]
    own = (*ONE_PROCESS, "--ranks", ranks)
    other, door = (*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}"), ("-m", "engine.run")
    return [own, (*own, "--max-restarts", 2), (*other, *door), (*other, "--max-restarts=2", *door)]


def start(launcher: tuple[object, ...], folder: Path) -> Command:
    values = [f"{name}={value}" for name, value in (OVERRIDES | {"run.dir": folder}).items()]
    return Command(*launcher, QUICKSTART, *values, env=environment(**TORCHRUN_MENDED))


# ---- one blow --------------------------------------------------------------------------------------------------------


def strike(command: Command, victim: Victim, kind: str) -> bool:
    """Whether there was something to hit."""
    draw, launcher = victim.draw, command.process.pid
    rank = draw.choice(sorted(torchrun_ranks(command).values()) or ranks_of(command) or [launcher])
    if kind == "STOP":
        (victim.folder / "STOP").touch()
        return True
    if kind == "delay":
        stopped = send([rank], signal.SIGSTOP)
        time.sleep(draw.uniform(0, DELAY_SECONDS))
        return send([rank], signal.SIGCONT) and stopped
    if kind in SIGNALS:
        return send([draw.choice([launcher, rank])], SIGNALS[kind])
    hit = {"kill rank": [rank], "kill launcher": [launcher], "kill loading process": children_of(rank)[-1:]}
    return send(hit.get(kind) or command.processes(), signal.SIGKILL)


def send(pids: Iterable[int], signum: int) -> bool:
    hit = False
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
            hit = True
    return hit


# ---- one victim ------------------------------------------------------------------------------------------------------


def suffer(victim: Victim, life: float, most: int) -> None:
    """Start a run until it has finished, and hit it at random moments, `most` times.

    life: seconds that the undisturbed run takes. Raises AssertionError where it does not finish, a start is refused, or
    a process is left behind.
    """
    with ExitStack() as stack:
        commands = []
        while not (commands and is_finished(commands[-1])):
            assert victim.starts < STARTS_AT_MOST, "it does not come forward"
            launcher = victim.draw.choice(launchers(victim.ranks))
            commands.append(stack.enter_context(start(launcher, victim.folder)))
            one_start(commands[-1], victim, life, most)
        for command in commands:
            command.end()


def one_start(command: Command, victim: Victim, life: float, most: int) -> None:
    """Hit it until it has ended. The next start does not wait for what is left of this one, as nobody does."""
    victim.starts += 1
    begun = time.monotonic()
    while watch(command, victim, victim.draw.uniform(0, life)):
        assert time.monotonic() < begun + TIMEOUT, f"it hangs; {command.said()}"
        if len(victim.blows) >= most:
            continue
        kind = victim.draw.choice(BLOWS)
        with suppress(OSError):  # what should be hit has just ended, or is not there yet
            if strike(command, victim, kind):
                victim.hit = time.monotonic()
                victim.blows.append(kind)
                victim.words.append(f"{victim.hit - begun:.1f} s after the start: {kind}")
    out, err = command.said()
    victim.steps += steps_said(command)
    victim.words.append(f"{' '.join(map(str, command.process.args))}\n{out}{err}exit {command.process.returncode}\n")
    assert "error: " not in err, f"refused: {err}"


def watch(command: Command, victim: Victim, seconds: float) -> bool:
    """Whether the command still runs after so many seconds; notes when it makes its first step since the last blow."""
    end, before = time.monotonic() + seconds, steps_said(command)
    while command.process.poll() is None and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        if victim.hit is not None and steps_said(command) > before:
            victim.seconds.append(time.monotonic() - victim.hit)
            victim.hit = None
    return command.process.poll() is None


def steps_said(command: Command) -> int:
    return f"\n{command.said()[0]}".count("\nstep ")


def is_finished(command: Command) -> bool:
    return command.process.returncode == 0 and "\nfiles     " in command.said()[0]


# ---- what is left ----------------------------------------------------------------------------------------------------


def left(folder: Path) -> tuple[dict, list[dict]]:
    """Checksums of the last checkpoint's files, which are as they say, and all rows but for the clock."""
    newest = folder / "checkpoints" / (folder / "checkpoints/latest").read_text().strip()
    manifest = read_manifest(newest)
    verify(newest, manifest)
    return manifest.files, trajectory(folder)


def undisturbed(folder: Path, ranks: int) -> float:
    """Make the run that nothing befalls, unless it is there; the seconds that it takes."""
    took = folder.with_suffix(".seconds")
    if not took.exists():
        rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        with start(launchers(ranks)[0], folder) as command:
            ended = command.end()
            assert is_finished(command), ended
        took.write_text(f"{time.monotonic() - begun:.1f}")
    return float(took.read_text())


def different(victim: Victim, whole: Path, life: float, most: int) -> bool:
    """Whether it ended otherwise than the run that nothing befell; its words stay beside it then."""
    try:
        suffer(victim, life, most)
        assert left(victim.folder) == left(whole), "it ends otherwise"
    except (AssertionError, UserError) as error:
        text = "\n".join([*victim.words, f"{type(error).__name__}: {error}"])
        victim.folder.with_suffix(".txt").write_text(text)
        return True
    rmtree(victim.folder)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, value in (("count", 100), ("ranks", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole = options.out.resolve() / f"undisturbed_{options.ranks}"
    life = undisturbed(whole, options.ranks)
    victims: list[Victim] = []
    wrong, blows = 0, 0
    while blows < options.count:
        name = f"victim_{options.seed}_{len(victims)}"
        victim = Victim(whole.with_name(name), options.ranks, random.Random(name))
        rmtree(victim.folder, ignore_errors=True)
        wrong += different(victim, whole, life, options.count - blows)
        victims.append(victim)
        blows += len(victim.blows)
        print(f"{name}: {', '.join(victim.blows) or 'nothing'}", file=sys.stderr, flush=True)
    seconds = [each for victim in victims for each in victim.seconds]
    found = {
        "blows": blows,
        "of": dict(Counter(kind for victim in victims for kind in victim.blows)),
        "runs": len(victims),
        "starts": sum(victim.starts for victim in victims),
        "steps_twice": sum(max(0, victim.steps - LAST) for victim in victims),
        "seconds_median": round(statistics.median(seconds), 1) if seconds else None,
        "seconds_most": round(max(seconds), 1) if seconds else None,
        "different": wrong,
        "seed": options.seed,
    }
    print(json.dumps(found))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
