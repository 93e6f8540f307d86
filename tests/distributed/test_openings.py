"""The files of a data set are looked at once on each node (tests/distributed/openings.py)."""

from tests.data.images import fill, pack, png
from tests.distributed.launch import results
from tests.distributed.openings import RANKS


def test_one_rank_of_each_node_looks_at_the_files(tmp_path):
    fill(tmp_path / "folder", {f"{name}/{k}.png": k for name in "abc" for k in range(3)})
    (tmp_path / "tars").mkdir()
    for name in "ab":
        (tmp_path / f"tars/{name}.tar").write_bytes(pack({f"{name}/{k}.png": png(k) for k in range(3)}))
    (tmp_path / "nothing").mkdir()
    *roots, unsent = results(RANKS, "tests.distributed.openings", tmp_path)
    by_name = {root["root"]: root for root in roots}
    for name in ("folder", "tars"):
        first, idle, second, other = by_name[name]["looks"]
        assert first >= second > 0 == idle == other
        assert len({str(found) for found in by_name[name]["found"]}) == 1
        assert by_name[name]["found"][3][1]
    assert all("nothing has none" in found for found in by_name["nothing"]["found"])
    assert by_name["nothing"]["looks"][1:] == [0, 0, 0]
    assert len(set(unsent["looks"])) == 1 < unsent["looks"][0]
    assert unsent["found"] == by_name["folder"]["found"]
