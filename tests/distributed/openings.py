"""Which ranks look at the files of a data set, of four on two nodes; prints one JSON line for each kind of root, and at
last one of runs and the tables of contents of their checkpoints.

Arguments: a folder that holds roots. The nodes are made up: each rank calls itself one of its node's.
"""

import json
import os
import socket
import sys
from pathlib import Path

import engine.data.listing
import engine.data.unchanged
import engine.distributed.world
from engine.data.source import Root
from engine.data.splits import open_unlabelled
from engine.distributed.agreement import all_gather
from engine.distributed.world import World, process_group
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import KINDS, RECIPE, SMALL

RANKS, NODES = 4, 2
TABLES = ("MANIFEST.json", ".metadata")


def looks(root: Path, kind: str, world: World) -> dict:
    """What each rank found and how often it looked into folders and at files below the root; or what it raised."""
    seen = []
    sys.addaudithook(lambda event, given: seen.append(event) if _is_look(event, given, root) else None)
    try:
        source = open_unlabelled(Root(kind, root), world)
        found = [source.name(i) for i in range(min(3, len(source)))], source.labels is not None, source.fingerprint
    except UserError as error:
        found = str(error)
    return {"root": root.name, "found": all_gather(found, None), "looks": all_gather(len(seen), None)}


def _is_look(event: str, given: tuple, root: Path) -> bool:
    """Whether an event of Python's audit opens or lists something of the root's."""
    named = event in ("os.scandir", "os.listdir", "open") and given and isinstance(given[0], str | bytes | os.PathLike)
    return bool(named) and os.fsdecode(given[0]).startswith(str(root))


def look_at_all(folder: Path, roots: list[str], world: World) -> None:
    for name in roots:
        found = looks(folder / name, "shards" if any((folder / name).glob("*.tar")) else "folder", world)
        if world.is_first:
            print(json.dumps(found), flush=True)


def tables_read(folder: Path, world: World) -> dict:
    """How often each rank opens what says what is in a checkpoint: a run that goes on, and one that continues it."""
    values = [*SMALL, *KINDS["vit"], "data.workers=0", "evaluate.online_probe=false"]
    starts = {
        "begins": [f"run.dir={folder / 'run'}", "train.max_steps=1"],
        "goes on": [f"run.dir={folder / 'run'}", "train.max_steps=1"],
        "continues": [f"run.dir={folder / 'more'}", f"run.continue_from={folder / 'run'}", "train.max_steps=1"],
    }
    found, seen = {}, []
    sys.addaudithook(lambda event, given: seen.append(event) if _is_table(event, given, folder) else None)
    for name, overrides in starts.items():
        seen.clear()
        pretrain(load(RECIPE, [*values, *overrides]), RECIPE, world)
        found[name] = all_gather(len(seen), None)
    return found


def _is_table(event: str, given: tuple, folder: Path) -> bool:
    return event == "open" and str(given[0]).startswith(str(folder)) and str(given[0]).endswith(TABLES)


def main() -> None:
    with process_group() as world:
        node = world.rank * NODES // RANKS
        socket.gethostname = lambda: f"node-{node}"
        look_at_all(Path(sys.argv[1]), ["folder", "tars", "nothing"], world)
        engine.distributed.world._SMALL = 0  # nothing is small enough to be sent
        look_at_all(Path(sys.argv[1]), ["folder"], world)
        engine.data.listing._WORTH_A_FILE = 1
        engine.data.unchanged.TICK_NS = 0
        engine.distributed.world._SMALL = 3000  # images of a file alone are
        look_at_all(Path(sys.argv[1]), ["folder", "tars"], world)
        read = tables_read(Path(sys.argv[1]), world)
        if world.is_first:
            print(json.dumps(read), flush=True)


if __name__ == "__main__":
    main()
