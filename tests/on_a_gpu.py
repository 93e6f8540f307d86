"""What one GPU has to show: traces, equal bits, speed, memory. `python -m tests.on_a_gpu OUT [--rehearse]`

Every check is a front door in a process of its own, and prints one JSON line as it ends; OUT/results.jsonl has them all
and OUT/<check>.log what each said. Together they take eight minutes at most, and what there is no time for says so. The
first are what a release needs, the last are worth knowing. --rehearse: the same checks, made tiny, on any machine.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from tests.distributed.launch import ROOT, environment

SECONDS = 480.0
LEAST_SECONDS = 15.0  # with less a check would only be cut off
TRACES = "tests/golden/{}.safetensors"
SHOWN = 300  # characters of a failure; the log has all

Check = tuple[str, float, list[str]]  # name, seconds at most, module and arguments


def checks(out: Path, *, tiny: bool) -> list[Check]:
    """In order of weight."""
    step = ["engine.bench", "step", "--recipe"]
    small = ["quickstart", "--batch", "8"]
    wide = ["model.dim=384", "model.heads=6", "parallel.precision=bf16", "parallel.compile=true"]

    def speed(recipe: str, batch: int, *more: str) -> list[str]:
        return [*step, *(small if tiny else [recipe, "--batch", str(batch)]), *more]

    same_bits = ["tests.distributed.same_bits", str(out / "runs"), "recipes/quickstart.yaml"]
    traces = [
        (f"trace {name[0]}, float64", 60.0, ["tests.replay", TRACES.format(name)])
        for name in ("A_vit_adamw", "B_resnet_lars", "C_conv_stem_adamw")
    ]
    compiled = ["tests.replay", TRACES.format("A_vit_adamw"), "--precision", "float32"]
    loss = ["engine.bench", "loss", "--global-batch", "512" if tiny else "65536", "--local-batch", "64"]
    return [
        *traces,
        ("trace A, float32, compiled", 90.0, compiled if tiny else [*compiled, "--compile"]),
        ("same bits", 150.0, same_bits if tiny else [*same_bits, *wide]),
        ("ViT-B", 120.0, speed("vit_b", 512)),
        ("ViT-B against the published way", 120.0, speed("vit_b", 256, "--vs", "reference")),
        ("ViT-S", 90.0, speed("vit_s", 512)),
        ("ViT-L", 120.0, speed("vit_l", 256)),
        ("loss of 65,536 keys", 40.0, loss),
        ("checkpoint of ViT-B", 60.0, ["engine.bench", "checkpoint", "--recipe", "quickstart" if tiny else "vit_b"]),
        ("ViT-B, selective", 90.0, speed("vit_b", 512, "parallel.activation_checkpoint=selective")),
        ("ViT-B, not deterministic", 90.0, speed("vit_b", 512, "parallel.deterministic=false")),
        ("ViT-B against the best published way", 150.0, speed("vit_b", 256, "--vs", "reference+")),
        ("ResNet-50", 240.0, speed("resnet50_100ep", 256)),
    ]


def carry_out(check: Check, out: Path, left: float) -> dict:
    """What the check's last line of JSON says, or why there is none."""
    name, limit, (module, *arguments) = check
    if left < LEAST_SECONDS:
        return {"failed": "no time was left"}
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(limit, left),
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"cut off after {min(limit, left):.0f} s"}
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith("{")]
    if done.returncode or not found:
        return {"failed": " | ".join(lines[-3:])[:SHOWN], "exit": done.returncode}
    return json.loads(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + SECONDS
    with (options.out / "results.jsonl").open("w") as results:
        for check in checks(options.out, tiny=options.rehearse):
            start = time.monotonic()
            found = carry_out(check, options.out, end - start)
            row = {"check": check[0], "seconds": round(time.monotonic() - start, 1), **found}
            print(json.dumps(row), flush=True)
            results.write(json.dumps(row) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
