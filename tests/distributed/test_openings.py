"""Files that all ranks need are looked at by few of them (tests/distributed/openings.py)."""

import pytest

from tests.data.images import fill, pack, png
from tests.distributed.launch import results
from tests.distributed.openings import RANKS


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict]:
    tmp_path = tmp_path_factory.mktemp("roots")
    fill(tmp_path / "folder", {f"{name}/{'long' * 9}-{k}.png": k for name in "abc" for k in range(9)})
    (tmp_path / "tars").mkdir()
    for name in "ab":
        (tmp_path / f"tars/{name}.tar").write_bytes(pack({f"{name}/{'long' * 9}-{k}.png": png(k) for k in range(30)}))
    (tmp_path / "nothing").mkdir()
    return results(RANKS, "tests.distributed.openings", tmp_path)


def test_one_rank_of_each_node_looks_at_the_files(launched):
    """It sends the others what is small; what is long lies in a file, which they open, and nothing else."""
    folder, tars, nothing, unsent, long_folder, long_tars, _ = launched
    for each in (folder, tars, long_folder, long_tars):
        assert len({str(found) for found in each["found"]}) == 1
        assert each["found"][3][1]
    for each in (folder, tars):
        first, second, *others = (each["looks"][rank] for rank in (0, 2, 1, 3))
        assert first >= second > 0
        assert others == [0, 0]
    for each in (long_folder, long_tars):
        first, second, *others = (each["looks"][rank] for rank in (0, 2, 1, 3))
        assert first > second > 0
        assert others == [1, 1]
    assert all("nothing has none" in found for found in nothing["found"])
    assert nothing["looks"][1:] == [0, 0, 0]
    assert len(set(unsent["looks"])) == 1 < unsent["looks"][0]
    assert unsent["found"] == folder["found"] == long_folder["found"]


def test_one_rank_reads_what_is_in_a_checkpoint(launched):
    *_, read = launched
    for name in ("goes on", "continues"):
        first, *others = read[name]
        assert (first > 0, others) == (True, [0] * (RANKS - 1)), name
