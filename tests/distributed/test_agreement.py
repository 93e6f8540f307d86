"""What ranks say together, and what a process that is alone gets of it."""

import pytest

from engine.distributed.agreement import agreement, all_gather, broadcast, by_rank, describe, rank, size
from engine.errors import RunFailed, UserError


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        ({0: "full"}, "full"),
        ({0: "full", 1: "full", 2: "full"}, "full"),
        ({2: "full"}, "rank 2: full"),
        ({0: "full", 2: "full"}, "rank 0, 2: full"),
        ({0: "full", 1: "gone", 2: "full"}, "rank 0, 2: full; rank 1: gone"),
    ],
)
def test_each_thing_is_said_once(failures, line):
    assert by_rank(failures, ranks=3) == line


def test_an_error_is_one_line():
    assert describe(RunFailed("a\n  b")) == "a b"
    assert describe(UserError("a\nb.jpg")) == r"a\nb.jpg", "of a name"
    assert describe(OSError(28, "No space left on device", "x")) == "[Errno 28] No space left on device: 'x'"
    assert describe(KeyError("loss")) == "KeyError: 'loss'"
    assert describe(OSError()) == "OSError: "


def test_a_process_alone_is_the_only_rank():
    assert (rank(None), size(None)) == (0, 1)
    assert (all_gather("x", None), broadcast("x", None)) == (["x"], "x")


def test_errors_of_the_user_become_one_and_faults_stay():
    with pytest.raises(UserError, match="No space left") as caught, agreement(None):
        raise OSError(28, "No space left on device")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ZeroDivisionError), agreement(None):
        raise ZeroDivisionError
