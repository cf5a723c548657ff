"""Sessions with nodes, before their jobs: what is refused, asked, and told of the scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mcp.types import ElicitResult

from rhapsody_mcp.settings import Settings
from tests.agents import ERAS, Agent, open_agent
from tests.behaviour.test_asking import Person
from tests.slurm_stand_in import SlurmStandIn
from tests.ssh_stand_in import SshStandIn

pytestmark = pytest.mark.anyio

PROFILES: dict[str, Any] = {
    "site": {"partition": "gpu", "account": "m1", "gpus_per_node": 4, "nodes": 2, "minutes": 30, "max_nodes": 3},
    "short": {"partition": "cpu", "max_minutes": 20},
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmStandIn:
    return SlurmStandIn(tmp_path, monkeypatch)


async def sessions(agent: Agent) -> list[str]:
    return [row["session"] for row in (await agent.call("list_sessions"))["sessions"]]


async def test_a_dry_run_tells_the_verdict_and_opens_nothing(slurm: SlurmStandIn) -> None:
    async with open_agent() as agent:
        options = {"scheduler": {"partition": "gpu", "allocations": 3}, "backends": ["local"]}
        reply = await agent.call("create_session", nodes=2, minutes=90, dry_run=True, **options)
        assert await sessions(agent) == []
        text = agent.texts[0]
        told = reply["allocation"]
        assert (told["nodes"], told["minutes"], told["node_hours_at_most"]) == (2, 90, 9)
        assert told["estimated_start"] == round(slurm.starts_at)
        assert "Nothing was opened. The scheduler would take the job: 2 nodes for 90 min (partition gpu), up" in text
        assert ", in 12 min; 9 node-hours at most. Its words: Job 7 to start at " in text
        assert "local would run executable, function tasks" in text


async def test_a_dry_run_without_nodes_says_that_no_scheduler_is_asked() -> None:
    async with open_agent() as agent:
        await agent.call("create_session", backends=["local"], dry_run=True)
        assert "No scheduler is asked for anything" in agent.texts[0]
        assert await sessions(agent) == []


async def test_an_open_session_tells_what_it_will_ask_for(slurm: SlurmStandIn) -> None:
    async with open_agent() as agent:
        reply = await agent.call("create_session", nodes=2, minutes=30, scheduler={"account": "m1"})
        assert reply["session"] == "session-1"
        assert reply["allocation"]["node_hours_at_most"] == 1
        asked = "its tasks run on 2 nodes for 30 min (account m1), which the scheduler is asked for with the first task"
        assert f"{asked}: 1 node-hour at most" in agent.texts[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nodes": 9}, "partition gpu has 6 nodes, and 9 were asked for. Partitions: gpu with 6 nodes (4 a job), 4 GPUs"),
    ({"nodes": 5}, "partition gpu gives a job 4 nodes at most, not 5"),
    ({"nodes": 1, "minutes": 500}, "partition gpu gives a job 120 minutes at most, not 500"),
    ({"nodes": 1, "scheduler": {"gpus_per_node": 8}}, "has nodes with 4 GPUs at most, not 8"),
    ({"minutes": 5}, "minutes has no effect without nodes: give nodes too"),
    ({"scheduler": {"partition": "cpu"}}, "scheduler has no effect without nodes: give nodes too"),
    ({"nodes": 1, "scheduler": {"queue": "gpu"}}, "no option 'queue' (did you mean 'partition'?). Valid: partition, "),
    ({"nodes": 1, "scheduler": {"partitions": "x"}}, "no option 'partitions' (did you mean 'partition'?)"),
    ({"nodes": 1, "scheduler": {"walltime": 5}}, "walltime does not belong into scheduler: give minutes beside"),
    ({"nodes": 1, "scheduler": {"partition": 3}}, "partition in scheduler is 3; valid is a text, such as 'gpu'"),
    ({"nodes": 1, "scheduler": {"gpus_per_node": "all"}}, "is 'all'; valid is a whole number, 0 or more, such as 4"),
    ({"nodes": 1, "scheduler": {"gpus_per_node": -1}}, "gpus_per_node in scheduler is -1; valid is a whole number"),
    (
        {"nodes": 1, "scheduler": {"allocations": 0}},
        "allocations in scheduler is 0; valid is a whole number, 1",
    ),
    ({"nodes": 1, "scheduler": {"lines": [1]}}, "lines in scheduler is [1]; valid is a list of texts"),
    ({"nodes": 1, "scheduler": {"lines": "exclusive"}}, "valid is one option of the submit command with its value"),
    ({"nodes": 1, "scheduler": {"lines": "--array=1-3"}}, "cannot be given to the scheduler: it is --array of sbatch"),
    ({"nodes": 1, "scheduler": {"python": "python3"}}, "valid is the full path of an interpreter that the nodes can"),
    ({"nodes": 1, "scheduler": {"profile": "x"}}, "unknown profile 'x'. Valid: none: the settings have no profiles"),
    ({"nodes": 0}, "nodes"),
    ({"nodes": "many"}, "nodes"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
async def test_what_cannot_be_is_refused_before_the_session_opens(
    slurm: SlurmStandIn, arguments: dict[str, Any], words: str
) -> None:
    async with open_agent() as agent:
        for more in ({}, {"dry_run": True}):
            assert words in await agent.refusal("create_session", **arguments, **more)
        assert await sessions(agent) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("invalid partition specified: x", "Partitions: gpu with 6 nodes"),
        ("Invalid account or account/partition combination specified", "`sacctmgr show assoc user=$USER"),
        ("Invalid qos specification", "`sacctmgr show assoc user=$USER"),
        ("Invalid feature specification", "`sinfo -o '%P %f'`"),
        ("Requested reservation is invalid", "`scontrol show reservation`"),
    ],
)
async def test_a_refusal_of_the_scheduler_has_its_words_and_what_is_valid(
    slurm: SlurmStandIn, words: str, told: str
) -> None:
    slurm.refuse(words)
    async with open_agent() as agent:
        refusal = await agent.refusal("create_session", nodes=1)
        assert refusal.startswith(f"scheduler_refused: the scheduler would refuse the job: {words}")
        assert told in refusal
        assert await sessions(agent) == []


async def test_a_scheduler_that_is_down_is_told_and_nothing_is_opened(slurm: SlurmStandIn) -> None:
    words = "Unable to contact slurm controller (connect failure)"
    slurm.answer("sinfo", stderr=f"slurm_load_partitions: {words}", exit_code=1)
    async with open_agent() as agent:
        refusal = await agent.refusal("create_session", nodes=1)
        assert refusal.startswith("scheduler_unavailable: Slurm does not answer: Unable to contact slurm controller")
        await agent.call("describe_system")
        assert "The scheduler cannot be used now: Slurm does not answer: Unable to contact" in agent.texts[-1]
        assert await sessions(agent) == []


async def test_nodes_without_a_scheduler_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    async with open_agent() as agent:
        refusal = await agent.refusal("create_session", nodes=2)
        assert "nodes needs a scheduler: no scheduler was found: none of sbatch (Slurm)" in refusal
        reply = await agent.call("describe_system")
        assert "scheduler" not in reply
        assert "No scheduler here: create_session takes nodes only with hosts that ssh reaches" in agent.texts[-1]


async def test_a_scheduler_that_cannot_be_asked_is_told_and_claims_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for command, says in (("qsub", ""), ("qstat", "pbs_version = 19.0.0")):
        (tmp_path / command).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / command).chmod(0o755)
    async with open_agent() as agent:
        reply = await agent.call("describe_system")
        assert reply["scheduler"] == {"name": "pbs", "version": "PBS Pro 19.0.0"}
        assert "Scheduler, for create_session with nodes: PBS Pro 19.0.0." in agent.texts[-1]
        await agent.call("create_session", nodes=2, minutes=30, scheduler={"partition": "gpu"}, dry_run=True)
        assert (
            "The job would be 2 nodes for 30 min (partition gpu); 1 node-hour at most. PBS Pro can" in agent.texts[-1]
        )
        refusal = await agent.refusal("create_session", nodes=1, scheduler={"qos": "high"})
        assert "PBS Pro has no qos here: use lines in its place, as in lines=['-q QUEUE']" in refusal
        assert await sessions(agent) == []


# --- inside a job


async def test_inside_a_job_its_nodes_are_told_and_used(slurm: SlurmStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "29")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    async with open_agent() as agent:
        reply = await agent.call("describe_system")
        assert "This service runs inside job 29 of slurm, with 2 nodes: n1, n2." in agent.texts[-1]
        assert reply["scheduler"]["allocation"]["nodes"] == ["n1", "n2"]
        assert "Valid is 1 to 2" in await agent.refusal("create_session", nodes=3)
        for name, value in (("minutes", 5), ("scheduler", {"partition": "gpu"})):
            assert f"{name} has no effect" in await agent.refusal("create_session", nodes=2, **{name: value})
        assert "allocation" not in await agent.call("create_session", nodes=2)


async def test_inside_a_job_of_pbs_its_nodes_are_used(
    slurm: SlurmStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nodes").write_text("n1\nn2\n")
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    async with open_agent() as agent:
        await agent.call("create_session", nodes=2, backends=["local"])
        assert "Valid is 1 to 2" in await agent.refusal("create_session", nodes=3, backends=["local"])


# --- profiles


@pytest.fixture
def settings() -> Settings:
    return Settings(allocation_profiles=PROFILES, default_profile="site")


async def test_a_profile_presets_options_and_single_ones_override(slurm: SlurmStandIn, settings: Settings) -> None:
    async with open_agent(settings=settings) as agent:
        chosen = {"profile": "site", "partition": "cpu", "gpus_per_node": 0}
        told = (await agent.call("create_session", scheduler=chosen, dry_run=True))["allocation"]
        assert told["partition"] == "cpu" and told["account"] == "m1" and "gpus_per_node" not in told
        assert (told["nodes"], told["minutes"]) == (2, 30)
        told = (await agent.call("create_session", nodes=1, dry_run=True))["allocation"]
        assert (told["profile"], told["partition"], told["nodes"]) == ("site", "gpu", 1)
        assert "1 node for 30 min (profile site, partition gpu, account m1, GPUs a node 4)" in agent.texts[-1]


async def test_the_limits_of_a_profile_hold(slurm: SlurmStandIn, settings: Settings) -> None:
    async with open_agent(settings=settings) as agent:
        refusal = await agent.refusal("create_session", nodes=4)
        assert "nodes is 4, and max_nodes of profile site in the settings of this server is 3. Give 3" in refusal
        short = {"nodes": 1, "scheduler": {"profile": "short"}}
        assert "max_minutes of profile short" in await agent.refusal("create_session", minutes=30, **short)
        assert (await agent.call("create_session", dry_run=True, **short))["allocation"]["minutes"] == 20
        refusal = await agent.refusal("create_session", nodes=4, scheduler={"max_nodes": 9})
        assert "scheduler has no option 'max_nodes'" in refusal
        assert "Valid: short, site" in await agent.refusal("create_session", nodes=1, scheduler={"profile": "sit"})


async def test_lines_and_interpreters_are_held_to_the_policy(slurm: SlurmStandIn) -> None:
    profiles: dict[str, Any] = {"site": {"setup": ["module load python"]}}
    settings = Settings(allow_source=False, allowed_executables=("/usr/bin/*",), allocation_profiles=profiles)
    async with open_agent(settings=settings) as agent:
        for options in ({"setup": "rm x"}, {"lines": "--prefer=x"}):
            (name,) = options
            refusal = await agent.refusal("create_session", nodes=1, scheduler=options)
            assert f"{name} in scheduler is not allowed here, because allow_source" in refusal
        refusal = await agent.refusal("create_session", nodes=1, scheduler={"python": "/opt/python"})
        assert "python in scheduler '/opt/python' is no program that is known here" in refusal
        await agent.call("create_session", nodes=1, scheduler={"profile": "site"})


async def test_the_system_shows_partitions_profiles_and_the_budget(slurm: SlurmStandIn) -> None:
    profiles = {**PROFILES, "secret": {"setup": ["export TOKEN=hush"]}}
    settings = Settings(allocation_profiles=profiles, default_profile="site", budget_node_hours=8)
    async with open_agent(settings=settings) as agent:
        reply = await agent.call("describe_system")
        text = agent.texts[-1]
        assert "Scheduler, for create_session with nodes: slurm 23.11.4." in text
        gpu = "partition gpu (default): 4 of 6 nodes idle, each 64 cores, 250 GiB, 4 GPUs; a job at most: 120 minutes"
        assert f"- {gpu}, 4 nodes" in text
        assert "- partition cpu: 10 of 10 nodes idle, each 128 cores, 500 GiB; a job at most: no time limit" in text
        assert (
            "- profile site (default): partition gpu, account m1, gpus_per_node 4, nodes 2, minutes 30, max_nodes 3"
            in text
        )
        assert "create_session asks the person above 8 node-hours of the open sessions." in text
        assert [row["name"] for row in reply["scheduler"]["partitions"]] == ["gpu", "cpu"]
        assert "hush" not in text + json.dumps(reply)


async def test_a_dry_run_of_tasks_knows_that_the_nodes_are_others_than_this_machine(slurm: SlurmStandIn) -> None:
    async with open_agent() as agent:
        await agent.call("create_session", backends=["local"], nodes=2, minutes=30, scheduler={"gpus_per_node": 4})
        job = {"name": "job", "executable": "/bin/true", "ranks": 200}
        there = {**job, "process_templates": [{"ranks": 2, "policy": {"host_name": "n2", "gpu_affinity": [3]}}]}
        too_much = {**job, "name": "gpus", "process_templates": [{"ranks": 2, "policy": {"gpu_affinity": [4]}}]}
        del there["ranks"], too_much["ranks"]
        reply = await agent.call(
            "submit_tasks", session="session-1", tasks=[job, {**there, "name": "there"}], dry_run=True
        )
        assert reply["problems"] == []
        assert [row["runs_as"] for row in reply["graph"]] == ["a job of 200 processes", "a job of 2 processes"]
        assert "what the nodes have is seen when the job runs" in agent.texts[-1]
        reply = await agent.call("submit_tasks", session="session-1", tasks=[too_much], dry_run=True)
        assert reply["problems"] == ["gpus: GPU 4 was asked for, and each node has 4"]


# --- the budget


@pytest.mark.parametrize("era", ERAS)
async def test_the_person_is_asked_before_sessions_use_more_node_hours_than_the_budget(
    slurm: SlurmStandIn, era: str
) -> None:
    person = Person(ElicitResult(action="accept", content={}))
    settings = Settings(budget_node_hours=1)
    async with open_agent(era, settings=settings, elicitation_callback=person) as agent:
        await agent.call("create_session", nodes=1, minutes=60)
        assert person.heard == []
        await agent.call("create_session", nodes=2, minutes=30, dry_run=True)
        assert "gives a job 4 nodes" in await agent.refusal("create_session", nodes=5, minutes=30)
        assert person.heard == [], "not about a job that is refused"
        await agent.call("create_session", nodes=2, minutes=30, scheduler={"allocations": 2})
        (question,) = person.heard
        asked = "This session may use up to 2 node-hours (2 nodes for 30 min, up to 2 times), and the open sessions 1"
        assert question.startswith(f"{asked} node-hour more; the budget is 1 node-hour (budget_node_hours")
        person.answer = ElicitResult(action="decline")
        assert "the person was asked and said no" in await agent.refusal("create_session", nodes=1)
        assert await sessions(agent) == ["session-1", "session-2"]


async def test_without_a_person_force_is_needed(slurm: SlurmStandIn) -> None:
    async with open_agent(settings=Settings(budget_node_hours=0.5)) as agent:
        refusal = await agent.refusal("create_session", nodes=1)
        assert refusal.startswith("needs_force: This session may use up to 1 node-hour (1 node for 60 min)")
        assert refusal.endswith("call again with force=true.")
        await agent.call("create_session", nodes=1, force=True)


# --- hosts without a scheduler


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshStandIn:
    return SshStandIn(tmp_path, monkeypatch, "n1", "n2")


HOSTS: dict[str, Any] = {"backends": ["local"], "scheduler": {"hosts": ["n1", "n2"]}}


async def test_hosts_need_no_scheduler(ssh: SshStandIn) -> None:
    async with open_agent() as agent:
        reply = await agent.call("create_session", **HOSTS, minutes=30)
        assert (reply["allocation"]["nodes"], reply["allocation"]["node_hours_at_most"]) == (2, 1)
        assert "its tasks run on 2 nodes for 30 min (hosts n1, n2)" in agent.texts[0]
        await agent.call("create_session", **HOSTS, nodes=1, dry_run=True)
        assert "1 node for 60 min (hosts n1, n2)" in agent.texts[1] and "Its words: free: n1" in agent.texts[1]


async def test_hosts_that_cannot_be_used_are_refused(ssh: SshStandIn) -> None:
    ssh.switch_off("n2")
    async with open_agent() as agent:
        refusal = await agent.refusal("create_session", **HOSTS)
        assert refusal.startswith("scheduler_refused: the scheduler would refuse the job: 2 nodes were asked for, and")
        assert "(n1): host n2 does not answer: connect to host n2 port 22: No route to host" in refusal
        refusal = await agent.refusal("create_session", backends=["local"], scheduler={"hosts": ["n9"]})
        assert "host n9 does not answer: Could not resolve hostname n9: Name or service not known" in refusal
        assert await sessions(agent) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nodes": 3}, "nodes is 3, and hosts in scheduler are 2: n1, n2. Give nodes as many as hosts at most"),
        ({"scheduler": {"hosts": ["n1"], "partition": "gpu"}}, "partition in scheduler has no effect with hosts"),
        ({"scheduler": {"hosts": ["n1"], "gpus_per_node": 1}}, "gpus_per_node in scheduler has no effect with hosts"),
        ({"scheduler": {"hosts": ["-oProxyCommand=x"]}}, "valid is a list of names that ssh takes, such as ['n1', 'm"),
        ({"scheduler": {"hosts": ["n1", "n2;x"]}}, "valid is a list of names that ssh takes"),
        ({"scheduler": {"nodelist": ["n1"]}}, "did you mean 'hosts'?"),
    ],
)
async def test_what_hosts_cannot_do_is_refused(ssh: SshStandIn, arguments: dict[str, Any], words: str) -> None:
    async with open_agent() as agent:
        assert words in await agent.refusal("create_session", **{**HOSTS, **arguments})
        assert await sessions(agent) == []


async def test_hosts_of_a_profile_are_allowed_and_those_of_an_agent_held_to_the_policy(ssh: SshStandIn) -> None:
    settings = Settings(allow_source=False, allocation_profiles={"lab": {"hosts": ["n1", "n2"], "max_nodes": 1}})  # type: ignore[dict-item]
    async with open_agent(settings=settings) as agent:
        lab = {"backends": ["local"], "scheduler": {"profile": "lab"}}
        assert "hosts in scheduler is not allowed here" in await agent.refusal("create_session", **HOSTS)
        assert "partition in scheduler has no effect with hosts" in await agent.refusal(
            "create_session", scheduler={"profile": "lab", "partition": "gpu"}
        )
        assert "nodes is 2, and max_nodes of profile lab" in await agent.refusal("create_session", **lab)
        await agent.call("create_session", **lab, nodes=1)


async def test_hosts_take_the_place_of_the_scheduler_of_a_profile(ssh: SshStandIn) -> None:
    settings = Settings(allocation_profiles=PROFILES, default_profile="site")
    async with open_agent(settings=settings) as agent:
        told = (await agent.call("create_session", **HOSTS))["allocation"]
        assert (told["hosts"], told["minutes"], "partition" in told) == (["n1", "n2"], 30, False)
