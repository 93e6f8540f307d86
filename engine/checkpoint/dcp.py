"""How torch.distributed.checkpoint is called here."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def dcp_arguments(group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """Arguments of torch.distributed.checkpoint's save and load; one process without a group is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield {"process_group": group, "no_dist": not dist.is_initialized()}
