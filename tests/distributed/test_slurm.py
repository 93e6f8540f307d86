"""What srun says of a process, in torchrun's words."""

import os
from contextlib import ExitStack

import pytest

from engine.distributed import launcher
from engine.distributed.slurm import first_host, place, tasks_per_node
from engine.errors import UserError
from tests.distributed.commands import ON_LINUX, ONE_PROCESS, QUICKSTART, TWO_RANKS, Command, overrides, run, timeless
from tests.distributed.launch import environment

STEP = {
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[01-03]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
}


def test_a_step_of_several_tasks_is_a_launch():
    assert place(STEP) == {
        "RANK": "17",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "20",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu01",
        "MASTER_PORT": str(10_000 + 64 * 1234567 % 20_000),
    }
    ports = {place(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})["MASTER_PORT"] for job in "78" for step in "01"}
    assert len(ports) == 4, "of jobs and steps that share a node"
    chosen = place(STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.7", "29500")


def test_a_batch_script_and_one_task_are_none():
    assert (
        place({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[1-2]"}) == {}
    )
    assert place(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_what_is_missing_is_named():
    for name in ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
        with pytest.raises(
            UserError, match=rf"^{name} \(missing\) must be set where SLURM_STEP_NUM_TASKS is; start by"
        ):
            place({key: value for key, value in STEP.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLURM_JOB_ID", "x"), ("SLURM_STEP_ID", "-1"), ("SLURM_NODEID", "3"), ("SLURM_NODEID", "")],
)
def test_what_is_no_number_of_srun_s_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name} \({value}\) must be"):
        place(STEP | {name: value})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[01-04,07]", "gpu01"),
        ("gpu7", "gpu7"),
        ("login,gpu[1-2]", "login"),
        ("rack[2-3]-gpu[008,010-012]", "rack2-gpu008"),
        ("gpu[07,09].cluster.local,gpu11", "gpu07.cluster.local"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_tasks_of_each_node():
    assert tasks_per_node("2") == [2]
    assert tasks_per_node("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]


@pytest.mark.slow
@ON_LINUX
def test_srun_makes_the_run_that_torchrun_makes(tmp_path):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    step["SLURM_JOB_ID"] = str(os.getpid())
    with ExitStack() as stack:
        arguments = [QUICKSTART, *overrides(tmp_path / "srun", train__max_steps=3)]
        tasks = [
            stack.enter_context(Command(*ONE_PROCESS, *arguments, env=environment(**step, **own)))
            for own in ({"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01")
        ]
        ended = [task.end() for task in tasks]
    assert [(end.code, "ranks     2 on CPU" in end.out) for end in ended] == [(0, True), (0, False)], ended
    assert run(*TWO_RANKS, QUICKSTART, *overrides(tmp_path / "torchrun", train__max_steps=3)).code == 0
    assert timeless(tmp_path / "srun") == timeless(tmp_path / "torchrun")


@pytest.fixture
def variables(monkeypatch) -> pytest.MonkeyPatch:
    """The environment, given back as it was, without what a launcher says."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *STEP):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "-1"), ("RANK", "4"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "½"), ("MASTER_PORT", "99999")],
)
def test_what_is_no_place_is_named(variables, name, value):
    for each, number in {"RANK": "0", "WORLD_SIZE": "4", name: value}.items():
        variables.setenv(each, number)
    with pytest.raises(UserError, match=rf"({name}|RANK) \({value if name != 'WORLD_SIZE' else 0}\) must be"):
        launcher.take_place([])


def test_torchrun_counts_before_srun(variables):
    for name, value in STEP.items():
        variables.setenv(name, value)
    variables.setenv("RANK", "3")
    launcher.take_place([])
    assert (launcher.ranks(), os.environ["RANK"]) == (1, "3")
    variables.delenv("RANK")
    launcher.take_place([])
    assert (launcher.ranks(), launcher.local_ranks(), launcher.local_rank()) == (20, 4, 1)


@pytest.mark.parametrize("mpi", ["OMPI_COMM_WORLD", "PMI"])
def test_mpirun_is_refused_once(variables, mpi):
    variables.setenv(f"{mpi}_SIZE", "1")
    assert launcher.take_place(["quickstart"]) == ["quickstart"]
    variables.setenv(f"{mpi}_SIZE", "4")
    variables.setenv(f"{mpi}_RANK", "0")
    with pytest.raises(UserError, match=r"^ranks \(4, started by mpirun\) must be started by torchrun; on each node: "):
        launcher.take_place([])
    variables.setenv(f"{mpi}_RANK", "3")
    variables.setattr(launcher, "FIRST_WORD_SECONDS", 0.0)
    with pytest.raises(SystemExit, match="2"):
        launcher.take_place([])
    variables.setenv("RANK", "3")
    launcher.take_place([])


def test_the_old_launcher_says_the_rank_in_an_argument_too(variables):
    arguments = ["--local-rank=1", "--local_rank=0", "quickstart", "train.epochs=1"]
    assert launcher.take_place(arguments) == arguments, "nobody has started it"
    variables.setenv("RANK", "1")
    assert launcher.take_place(arguments) == ["quickstart", "train.epochs=1"]


def test_cores_are_shared_by_torchruns_ranks_and_dealt_out_by_srun(variables):
    variables.setattr(launcher, "cores", lambda: 96)
    variables.setenv("LOCAL_WORLD_SIZE", "8")
    variables.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher.own_cores() == 12
    variables.setenv("SLURM_CPUS_PER_TASK", "24")
    assert launcher.own_cores() == 24
    variables.setenv("TORCHELASTIC_RUN_ID", "srun torchrun")
    assert launcher.own_cores() == 12
