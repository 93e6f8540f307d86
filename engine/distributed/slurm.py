"""What srun says of a process that it has started as one of several, in the words of torchrun."""

import re
from collections.abc import Mapping

from engine.errors import UserError

FIRST_PORT, PORTS = 10_000, 20_000  # below those that systems give to whoever asks for any


def place(variables: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for this process; {} where srun has started no other beside it.

    Only srun sets what is said of a step: a batch script alone is no rank. Raises UserError.
    """

    def read(name: str, otherwise: str | None = None) -> str:
        value = variables.get(name, otherwise)
        if value is None:
            raise UserError(
                f"{name} (missing) must be set where SLURM_STEP_NUM_TASKS is; start by srun, or by torchrun"
            )
        return value

    def number(name: str, otherwise: str | None = None) -> int:
        value = read(name, otherwise)
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{name} ({value}) must be a number, as srun sets it; start by srun, or by torchrun")
        return int(value)

    if read("SLURM_STEP_NUM_TASKS", "1") == "1":
        return {}
    tasks, node = tasks_per_node(read("SLURM_STEP_TASKS_PER_NODE")), number("SLURM_NODEID", "0")
    if node >= len(tasks):
        raise UserError(f"SLURM_NODEID ({node}) must be below {len(tasks)}, the nodes of SLURM_STEP_TASKS_PER_NODE")
    start = 64 * number("SLURM_JOB_ID", "0") + number("SLURM_STEP_ID", "0")
    return {
        "RANK": read("SLURM_PROCID"),
        "LOCAL_RANK": read("SLURM_LOCALID"),
        "WORLD_SIZE": read("SLURM_STEP_NUM_TASKS"),
        "LOCAL_WORLD_SIZE": str(tasks[node]),
        "MASTER_ADDR": variables.get("MASTER_ADDR") or first_host(read("SLURM_STEP_NODELIST")),
        "MASTER_PORT": variables.get("MASTER_PORT") or str(FIRST_PORT + start % PORTS),
    }


def tasks_per_node(text: str) -> list[int]:
    """For each node its tasks: `8(x2),4` is [8, 8, 4]."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]


def first_host(nodes: str) -> str:
    """The first name of a list of nodes: `gpu[01-04,07],login` is gpu01."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)
