"""Two processes that run the same command write the same bits, and so do a first half and a second one."""

import pytest

from tests.distributed.commands import QUICKSTART, SMALL
from tests.distributed.same_bits import digest, digests

STRICT = SMALL | {"checkpoint.every_steps": 10, "parallel.precision": "bf16", "parallel.deterministic": "true"}


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits(tmp_path):
    found = digests(tmp_path, QUICKSTART, *(f"{key}={value}" for key, value in STRICT.items()))
    assert found == dict.fromkeys(("once", "again", "halves"), found["once"])
    assert digest(tmp_path / "once/checkpoints/step_0000010") == digest(tmp_path / "halves/checkpoints/step_0000010")
    assert digest(tmp_path / "once/checkpoints/step_0000010") != found["once"]
