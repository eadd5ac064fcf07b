"""A process's place in a Slurm job, the job's configuration, and when a missing server is asked for."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from expertmesh.cli import slurm_commands
from expertmesh.cli.next_ports import with_free_ports, with_next_ports
from expertmesh.cli.slurm_job import JobOptions, job_config
from expertmesh.cli.slurm_joins import Gap
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.slurm import CONTROL, Job, Task, address_towards, job_from, joined_id, servers_of, task_from

TASK = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "n4"}
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURMD_NODENAME": "n1",
    "SLURM_HET_SIZE": "3",
    "SLURM_NTASKS_HET_GROUP_0": "2",
    "SLURM_NTASKS_HET_GROUP_1": "4",
    "SLURM_NTASKS_HET_GROUP_2": "8",
    "SLURM_CPUS_PER_TASK_HET_GROUP_2": "12",
}
HOST, PORT = "10.0.0.1", 50050


def options(tmp_path: Path, *roles: str) -> JobOptions:
    return JobOptions(roles=roles, run_dir=tmp_path, join_script=None, replace_after_s=1.0)


def test_a_task_knows_its_place() -> None:
    task = task_from(TASK)
    assert task == Task(job_id=7, index=2, local_index=1, node="n4")
    assert task.role("expert") == "expert"
    assert task.server_id("expert", joins=False) == "expert-2"
    assert task.server_id("expert", joins=True) == joined_id("expert", 7, 2) == "expert-j7-2"


def test_control_is_a_balancer_and_routers() -> None:
    tasks = [task_from({**TASK, "SLURM_PROCID": str(index)}) for index in range(3)]
    assert [task.role(CONTROL) for task in tasks] == ["balancer", "router", "router"]
    assert [task.server_id(CONTROL, joins=False) for task in tasks] == ["balancer", "router-0", "router-1"]


def test_the_tasks_of_a_component_take_its_roles_in_turn() -> None:
    asked = "attention+expert+expert"
    tasks = [task_from({**TASK, "SLURM_PROCID": str(index)}) for index in range(7)]
    ids = [task.server_id(asked, joins=False) for task in tasks]
    assert ids == ["attention-0", "expert-0", "expert-1", "attention-1", "expert-2", "expert-3", "attention-2"]
    assert [task.role(asked) for task in tasks] == [server.rpartition("-")[0] for server in ids]
    assert (servers_of("attention", asked, 7), servers_of("expert", asked, 7), servers_of("both", asked, 7)) == (
        3,
        4,
        0,
    )


def test_a_role_that_is_none() -> None:
    with pytest.raises(UserError, match=r"ROLE: 'router' in 'expert\+router' is none; give attention"):
        task_from(TASK).server_id("expert+router", joins=False)


@pytest.mark.parametrize("name", list(TASK))
def test_a_task_outside_of_srun_is_told_what_is_missing(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: is not set; start this with srun"):
        task_from({key: value for key, value in TASK.items() if key != name})


def test_a_number_that_is_none() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID: is 'two', not a number"):
        task_from({**TASK, "SLURM_PROCID": "two"})


def test_a_job_knows_its_components() -> None:
    assert job_from(JOB) == Job(job_id=7, node="n1", num_tasks=(2, 4, 8), cpus_per_task=(None, None, 12))
    with pytest.raises(UserError, match="SLURM_HET_SIZE"):
        job_from(TASK)


@pytest.mark.parametrize(
    ("roles", "attention", "expert"),
    [(("attention", "expert"), 4, 8), (("expert", "attention"), 8, 4), (("attention+expert", "both"), 2, 2)],
)
def test_the_configuration_follows_the_tasks(
    tmp_path: Path, roles: tuple[str, ...], attention: int, expert: int
) -> None:
    asked = parse_config({"attention": {"servers": 1}, "both_servers": 3, "balancer": {"port": 1}})
    config = job_config(asked, job_from(JOB), options(tmp_path, *roles), HOST, PORT)
    both = 8 if "both" in roles else 0
    assert (config.attention.servers, config.expert.servers, config.both_servers) == (attention, expert, both)
    assert (config.balancer.port, config.balancer.address) == (PORT, f"{HOST}:{PORT}")
    assert config.balancer.state_dir == tmp_path / "balancer"


@pytest.mark.parametrize(
    ("changes", "roles", "key"),
    [
        ({}, ("attention",), "ROLE"),
        ({}, ("expert", "expert"), "ROLE"),
        ({}, ("attention+expert", "expert"), "ROLE"),
        ({}, ("attention", "router"), "ROLE"),
        ({"expert": {"min_replicas": 9}}, ("attention", "expert"), "the command line"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object], roles: tuple[str, ...], key: str
) -> None:
    # More replicas than servers is refused by the configuration itself: the counts of the job are what it is held to.
    config = parse_config({**changes, "both_servers": 9})
    with pytest.raises(UserError) as caught:
        job_config(config, job_from(JOB), options(tmp_path, *roles), HOST, PORT)
    assert caught.value.key == key


def test_a_job_of_one_control_task_has_no_router(tmp_path: Path) -> None:
    job = job_from({**JOB, "SLURM_NTASKS_HET_GROUP_0": "1"})
    with pytest.raises(UserError, match="2 or more"):
        job_config(MeshConfig(), job, options(tmp_path, "attention", "expert"), HOST, PORT)


def test_servers_of_a_node_have_ports_of_their_own() -> None:
    asked = {
        "router": {"port": 50051, "http": {"port": 8000}},
        "expert": {"port": 50052},
        "telemetry": {"metrics_port": 9464},
    }
    config = with_next_ports(parse_config(asked), 3)
    assert (config.router.port, config.router.http.port, config.expert.port) == (50054, 8003, 50055)
    assert (config.telemetry.metrics_port, config.attention.port) == (9467, 0)
    # Nobody knows what runs where a server comes with a job of its own.
    config = with_free_ports(parse_config(asked))
    assert (config.router.port, config.router.http.port, config.expert.port) == (0, 0, 0)
    assert config.telemetry.metrics_port == 0


def test_own_address_is_that_of_the_way() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(UserError, match=r"no way leads to nowhere\.invalid"):
        address_towards("nowhere.invalid")


def test_a_gap_is_waited_for_then_asked_for_ever_more_slowly() -> None:
    gap = Gap(hold_s=10.0, start_s=100.0)
    assert gap.is_closed() is False
    assert [gap.to_ask_for(2, now_s) for now_s in (0.0, 9.9, 10.0)] == [0, 0, 2]
    # The two that came did not stay: twice as long, then four times.
    assert [gap.to_ask_for(1, now_s) for now_s in (11.0, 30.9, 31.0)] == [0, 0, 1]
    assert [gap.to_ask_for(1, now_s) for now_s in (40.0, 79.9, 80.0)] == [0, 0, 1]
    assert gap.is_closed() is True
    assert [gap.to_ask_for(1, now_s) for now_s in (90.0, 99.9, 100.0)] == [0, 0, 1]


def test_a_gap_that_closes_in_between_begins_anew() -> None:
    gap = Gap(hold_s=10.0, start_s=100.0)
    gap.is_closed()
    assert [gap.to_ask_for(missing, now_s) for missing, now_s in ((1, 0.0), (0, 9.0), (1, 10.0), (1, 19.0))] == [0] * 4
    assert gap.to_ask_for(1, 20.0) == 1


def test_servers_that_never_were_there_have_the_time_of_a_start() -> None:
    gap = Gap(hold_s=10.0, start_s=100.0)
    assert [gap.to_ask_for(1, now_s) for now_s in (0.0, 99.0, 100.0)] == [0, 0, 1]


def test_a_node_that_dies_as_soon_as_the_mesh_began_is_not_a_start() -> None:
    """Nobody may have looked while all servers were there."""
    gap = Gap(hold_s=10.0, start_s=100.0)
    assert gap.to_ask_for(4, 0.0) == 0
    gap.mesh_began()
    assert [gap.to_ask_for(2, now_s) for now_s in (9.9, 10.0)] == [0, 2]


def fake_command(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!{sys.executable}\n{body}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


async def test_a_new_job_does_not_see_the_variables_of_this_one(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_HET_SIZE", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    seen = commands / "seen"
    body = (
        f"import os, sys\nopen({str(seen)!r}, 'w').write(' '.join(sorted(k for k in os.environ if k[:5] == 'SLURM')))"
    )
    fake_command(commands, "sbatch", f"{body}\nprint('41;cluster')")
    job = await slurm_commands.submit(Path("join.sbatch"), ["expert"], name="x", log=Path("x.out"))
    assert job == 41
    assert seen.read_text(encoding="utf-8") == "SLURM_CONF"


async def test_what_slurm_refuses_is_said(commands: Path) -> None:
    fake_command(commands, "squeue", "import sys\nsys.exit('slurmctld is away')")
    with pytest.raises(slurm_commands.SlurmError, match=r"squeue --me .* ended with 1: slurmctld is away"):
        await slurm_commands.jobs_named("x")


@pytest.mark.parametrize(
    ("body", "is_over"),
    [
        ("print('RUNNING')", False),
        ("print('PENDING')", False),
        ("pass", True),
        ("import sys\nsys.exit('slurm_load_jobs error: Invalid job id specified')", True),
    ],
)
async def test_whether_a_job_is_over(commands: Path, body: str, is_over: bool) -> None:
    fake_command(commands, "squeue", body)
    assert await slurm_commands.is_over(7) is is_over


@pytest.mark.parametrize(("state", "is_down"), [("down*", True), ("down", True), ("mixed", False), ("idle*", False)])
async def test_whether_a_node_is_down(commands: Path, state: str, is_down: bool) -> None:
    fake_command(commands, "sinfo", f"print({state!r})")
    assert await slurm_commands.is_down("n1") is is_down


async def test_a_controller_that_is_away_says_nothing_about_a_job(commands: Path) -> None:
    fake_command(commands, "squeue", "import sys\nsys.exit('Unable to contact slurm controller')")
    with pytest.raises(slurm_commands.SlurmError, match="Unable to contact"):
        await slurm_commands.is_over(7)


async def test_a_slurm_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm_commands.SlurmError, match="scancel cannot be run"):
        await slurm_commands.cancel_named("x")


async def test_a_node_has_the_address_that_slurm_reaches_it_by(commands: Path) -> None:
    fake_command(commands, "scontrol", "print('NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=h')")
    assert await slurm_commands.node_address("n1") == "127.0.0.1"
