"""Which ranks look at the files of a data set, of four on two nodes; prints one JSON line for each kind of root.

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

RANKS, NODES = 4, 2


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


if __name__ == "__main__":
    main()
