"""What one GPU has to show: traces, equal bits, speed, memory. `python -m tests.on_a_gpu OUT [--rehearse]`

Every check is a front door in a process of its own, and prints one JSON line as it ends; OUT/results.jsonl has them all
and OUT/<check>.log what each said. Those of results run side by side, those of speed after them, one by one. Together
they take eight minutes at most, and what there is no time for says so. The first are what a release needs, the last are
worth knowing. --rehearse: the same checks, made tiny, on any machine.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.distributed.launch import ROOT, environment

SECONDS = 480.0
LEAST_SECONDS = 15.0
TRACES = "tests/golden/{}.safetensors"
SHOWN = 300  # characters of a failure; the log has all

Check = tuple[str, float, list[str]]  # name, seconds at most, module and arguments


def of_results(out: Path, *, tiny: bool) -> list[Check]:
    same_bits = ["tests.distributed.same_bits", str(out / "runs"), "recipes/quickstart.yaml"]
    wide = ["model.dim=384", "model.heads=6", "parallel.precision=bf16", "parallel.compile=true"]
    compiled = ["tests.replay", TRACES.format("A_vit_adamw"), "--precision", "float32"]
    return [
        *(
            (f"trace {name[0]}, float64", 120.0, ["tests.replay", TRACES.format(name)])
            for name in ("A_vit_adamw", "B_resnet_lars", "C_conv_stem_adamw")
        ),
        ("trace A, float32, compiled", 120.0, compiled if tiny else [*compiled, "--compile"]),
        ("same bits", 150.0, same_bits if tiny else [*same_bits, *wide]),
        *([] if tiny else [("attention", 60.0, ["tests.models.short_attention"])]),
    ]


def of_speed(*, tiny: bool) -> list[Check]:
    """In order of weight."""
    step = ["engine.bench", "step", "--recipe"]
    small = ["quickstart", "--batch", "8"]

    def speed(recipe: str, batch: int, *more: str) -> list[str]:
        return [*step, *(small if tiny else [recipe, "--batch", str(batch)]), *more]

    loss = ["engine.bench", "loss", "--global-batch", "512" if tiny else "65536", "--local-batch", "64"]
    checkpoint = ["engine.bench", "checkpoint", "--recipe", *(small if tiny else ["vit_b", "--batch", "256"])]
    return [
        ("ViT-S", 90.0, speed("vit_s", 512)),
        ("ViT-B", 120.0, speed("vit_b", 512)),
        ("ViT-S, few images", 60.0, speed("vit_s", 64)),
        ("ViT-L", 120.0, speed("vit_l", 256)),
        ("ResNet-50", 240.0, speed("resnet50_100ep", 256)),
        ("ViT-S with a conv stem", 120.0, speed("vit_conv_s", 256)),
        ("ViT-B against the published way", 120.0, speed("vit_b", 256, "--vs", "reference")),
        ("loss of 65,536 keys", 40.0, loss),
        ("checkpoint of ViT-B", 60.0, checkpoint),
        ("ViT-B, selective", 90.0, speed("vit_b", 512, "parallel.activation_checkpoint=selective")),
        ("ViT-B, not deterministic", 90.0, speed("vit_b", 512, "parallel.deterministic=false")),
        ("ViT-B against the best published way", 150.0, speed("vit_b", 256, "--vs", "reference+")),
    ]


class Running:
    """A check that has begun."""

    def __init__(self, check: Check, out: Path, left: float):
        (self.name, limit, command), self.began = check, time.monotonic()
        self.limit, self.log = min(limit, left), out / f"{self.name}.log"
        with self.log.open("w") as file:
            words = [sys.executable, "-m", *command]
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def end(self) -> dict:
        """What the check's last line of JSON says, or why there is none."""
        try:
            status = self.process.wait(max(0.0, self.began + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self._row({"failed": f"cut off after {self.limit:.0f} s"})
        lines = self.log.read_text(errors="replace").splitlines()
        found = last_object(lines)
        if status or found is None:
            return self._row({"failed": " | ".join(lines[-3:])[:SHOWN], "exit": status})
        return self._row(found)

    def _row(self, found: dict) -> dict:
        return {"check": self.name, "seconds": round(time.monotonic() - self.began, 1), **found}


def last_object(lines: list[str]) -> dict | None:
    """The last line that is an object in JSON: a library may say something in braces, too."""
    for line in reversed(lines):
        with suppress(ValueError):
            if line.startswith("{"):
                return json.loads(line)
    return None


def rows(out: Path, *, tiny: bool) -> Iterator[dict]:
    end = time.monotonic() + SECONDS
    for running in [Running(check, out, SECONDS) for check in of_results(out, tiny=tiny)]:
        yield running.end()
    for check in of_speed(tiny=tiny):
        left = end - time.monotonic()
        # With less it would only be cut off.
        yield Running(check, out, left).end() if left > LEAST_SECONDS else {"check": check[0], "failed": "no time left"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.jsonl").open("w") as results:
        for row in rows(options.out, tiny=options.rehearse):
            print(json.dumps(row), flush=True)
            results.write(json.dumps(row) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
