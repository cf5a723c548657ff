"""What agents and people see of sessions with nodes, through MCP, from the login node of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from mcp import Client, StdioServerParameters
from mcp.types import ElicitResult, TextContent

from tests.behaviour.test_asking import Person
from tests.cluster.cluster import Cluster
from tests.cluster.test_pilots import Login
from tests.services import own_service

pytestmark = pytest.mark.anyio

SETTINGS = """\
budget_node_hours: 1
allocation_profiles:
  site: {partition: urgent, nodes: 1, minutes: 5, max_nodes: 1}
  held: {nodes: 1, minutes: 5, lines: [--hold]}
  wrong_network: {nodes: 2, minutes: 5, network_prefix: ^hsn}
"""
ONE = {"name": "one", "source": "def one():\n    return 1"}


class Agent:
    """Calls tools, and keeps the text of the last reply. `questions` are those that the person was asked."""

    def __init__(self, client: Client, questions: list[str]) -> None:
        self.client, self.questions = client, questions
        self.text = ""

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        reply = await self.client.call_tool(tool, arguments)
        self.text = "\n".join(block.text for block in reply.content if isinstance(block, TextContent))
        assert not reply.is_error, self.text
        return reply.structured_content or {}

    async def refusal(self, tool: str, **arguments: Any) -> str:
        reply = await self.client.call_tool(tool, arguments)
        assert reply.is_error, reply.structured_content
        return "\n".join(block.text for block in reply.content if isinstance(block, TextContent))

    async def until(self, session: str, words: str, within_s: float = 180) -> str:
        """Wait until a reply of wait_tasks has these words; the reply."""
        with anyio.move_on_after(within_s):
            while words not in self.text:
                await self.call("wait_tasks", session=session, timeout_s=1)
        assert words in self.text, self.text
        return self.text


@pytest.fixture
def login(cluster: Cluster) -> Iterator[Login]:
    with own_service(cluster.shared) as service:
        service.environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
        (service.folder / "settings.yaml").write_text(SETTINGS)
        yield Login(cluster, service)


@pytest.fixture
async def agent(login: Login) -> Any:
    """An agent on the login node, whose person says no to everything."""
    person: Any = Person(ElicitResult(action="decline"))
    command = login.service.command("stdio", "--config", login.service.folder / "settings.yaml")
    environment = {**login.cluster.environment, **login.service.environment}
    server = StdioServerParameters(command=command[0], args=command[1:], env=environment)
    async with Client(server, elicitation_callback=person) as client:
        yield Agent(client, person.heard)


async def test_partitions_verdicts_refusals_and_the_budget(login: Login, agent: Agent) -> None:
    system = await agent.call("describe_system")
    assert "- partition batch (default): 2 of 2 nodes idle, each 2 cores, 7.81 GiB; a job at most: 60 min" in agent.text
    assert "- profile site: partition urgent, nodes 1, minutes 5, max_nodes 1" in agent.text
    assert [row["name"] for row in system["scheduler"]["partitions"]] == ["batch", "urgent"]

    planned = await agent.call("create_session", backends=["local"], nodes=2, minutes=10, dry_run=True)
    assert planned["allocation"]["node_hours_at_most"] == 0.333
    assert planned["allocation"]["estimated_start"] > 0
    assert "Its words: Job " in agent.text
    profile = {"scheduler": {"profile": "site"}, "dry_run": True}
    assert (await agent.call("create_session", **profile))["allocation"]["partition"] == "urgent"
    assert "max_nodes of profile site" in await agent.refusal("create_session", nodes=2, **profile)

    for arguments, words in (
        ({"nodes": 3}, "partition batch has 2 nodes, and 3 were asked for"),
        ({"nodes": 1, "minutes": 61}, "partition batch gives a job 60 minutes at most, not 61"),
        ({"nodes": 1, "scheduler": {"partition": "nope"}}, "invalid partition specified: nope"),
        ({"nodes": 1, "scheduler": {"constraint": "nope"}}, "Invalid feature specification"),
    ):
        refusal = await agent.refusal("create_session", **arguments)
        assert words in refusal and "Partitions: batch with 2 nodes" in refusal
    assert "said no" in await agent.refusal("create_session", nodes=2, minutes=60)
    (question,) = agent.questions
    assert question.startswith(
        "This session may use up to 2 node-hours (2 nodes for 60 min); the budget is 1 node-hour"
    )
    assert (await agent.call("list_sessions"))["sessions"] == []
    assert login.jobs() == []


async def test_jobs_that_wait_and_run_are_told_of(login: Login, agent: Agent) -> None:
    await agent.call("create_session", name="runs", backends=["local"], nodes=2, minutes=10)
    await agent.call("submit_tasks", session="runs", tasks=[ONE])
    text = await agent.until("runs", "1 DONE")
    assert f"RUNNING on {', '.join(login.cluster.nodes)} for " in text and " min left; " in text

    await agent.call("create_session", name="waits", backends=["local"], nodes=1, minutes=10)
    await agent.call("submit_tasks", session="waits", tasks=[ONE])
    text = await agent.until("waits", "Resources: waits until enough nodes are free; estimated start 20")
    assert "Engines: local job " in text and " PENDING for " in text
    assert 'Next: close_session(session="waits") to give up waiting for the job' in text
    assert f"Note: session runs has {', '.join(login.cluster.nodes)} for " in text
    assert 'min more; close_session(session="runs") frees them' in text

    (_, waiting) = sorted(login.jobs(), key=int)
    await agent.call("cancel_tasks", session="waits", all_open=True)
    await login.until_gone(waiting)
    await agent.call("submit_tasks", session="waits", tasks=[{**ONE, "name": "two"}])
    await agent.until("waits", "Resources: waits until enough nodes are free")

    await agent.call("create_session", name="held", backends=["local"], scheduler={"profile": "held"})
    await agent.call("submit_tasks", session="held", tasks=[ONE])
    await agent.until("held", "JobHeldUser: held by its user: `scontrol release` lets the job start")

    rows = {row["session"]: row["allocation"] for row in (await agent.call("list_sessions"))["sessions"]}
    assert [rows[name]["state"] for name in ("runs", "waits", "held")] == ["RUNNING", "PENDING", "PENDING"]
    assert rows["runs"]["on"] == login.cluster.nodes and 0 < rows["runs"]["left_s"] <= 600
    assert "runs (local): 1 DONE; job " in agent.text and "node-hours used" in agent.text

    used = (await agent.call("get_statistics", session="runs"))["allocation"]
    assert 0 <= used["utilization"] < 1 and "of 4 cores" in agent.text
    for name in rows:
        await agent.call("close_session", session=name, force=True)
    await login.until_no_job()


async def test_what_only_the_nodes_can_tell_is_told_with_what_to_do(login: Login, agent: Agent) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            "local",
            {"python": "/nowhere/python", "profile": "site"},
            "install the package in a virtual environment",
        ),
        ("dragon", {"profile": "wrong_network"}, "network_prefix is '^hsn', and no network interface of c"),
    ]
    for backend, options, words in cases:
        await agent.call("create_session", name="s", backends=[backend], scheduler=options)
        await agent.call("submit_tasks", session="s", tasks=[ONE])
        assert words in await agent.until("s", "1 FAILED")
        await login.until_no_job()  # although the session is open
        await agent.call("close_session", session="s")


async def test_nodes_with_a_full_tmp_work_in_another_temporary_folder(login: Login, agent: Agent) -> None:
    for node in login.cluster.nodes:
        login.cluster.run(*login.cluster.on(node, "sh", "-c", "cat /dev/zero >/tmp/filler 2>/dev/null || :"))
    try:
        await agent.call("create_session", name="s", backends=["local"], nodes=2, minutes=5)
        where = {"name": "where", "executable": "/bin/hostname", "ranks": 4, "ranks_per_node": 2}
        await agent.call("submit_tasks", session="s", tasks=[ONE, where])
        assert "2 DONE" in await agent.until("s", "All have ended")
        await agent.call("close_session", session="s")
        await login.until_no_job()
    finally:
        for node in login.cluster.nodes:
            login.cluster.run(*login.cluster.on(node, "rm", "/tmp/filler"))
    assert not any(map(login.left, login.cluster.nodes))


async def test_a_state_folder_that_the_nodes_do_not_see_is_named(cluster: Cluster) -> None:
    with own_service() as service:  # in /tmp, of which each node has its own
        service.environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
        async with service.client() as client:
            agent = Agent(client, [])
            await agent.call("create_session", name="s", backends=["local"], nodes=1, minutes=5)
            await agent.call("submit_tasks", session="s", tasks=[ONE])
            text = await agent.until("s", "1 FAILED")
            assert f"its log is empty, as where the nodes do not see {service.folder}" in text
            assert "start the service with a state folder that all nodes see" in text
            assert not cluster.run("squeue", "--noheader")
            await agent.call("close_session", session="s")


WATCHED = """\
import json, os, time
rank, end = os.environ["RHAPSODY_RANK"], time.time() + 300
for step in range(10_000):
    print(f"step {step}")
    with open(os.environ["RHAPSODY_PROGRESS"], "a") as told:
        told.write(json.dumps({"step": step, "loss": 1 / (step + 1)}) + chr(10))
    if os.path.exists("stop") or time.time() > end:
        break
    time.sleep(0.1)
"""


async def test_a_job_over_two_nodes_is_watched_from_the_login_node(login: Login, agent: Agent) -> None:
    (login.service.folder / "watched.py").write_text(WATCHED)
    await agent.call("create_session", name="watched", backends=["local"], nodes=2, minutes=10)
    cwd = str(login.service.folder)
    job = {
        "name": "job",
        "executable": "python3",
        "arguments": ["watched.py"],
        "ranks": 2,
        "ranks_per_node": 1,
        "cwd": cwd,
    }
    lost = {"name": "lost", "executable": "sh", "arguments": ["-c", "echo before; sleep 300"], "cores": 0.01}
    await agent.call("submit_tasks", session="watched", tasks=[job, lost])
    waited = {"until": {"met": False}}
    with anyio.fail_after(120):
        while not waited["until"]["met"]:
            until = {"task": "job", "field": "loss", "below": 0.2}
            waited = await agent.call("wait_tasks", session="watched", until=until, timeout_s=20)
    shown: dict[str, Any] = {"progress": {"step": 0}}
    with anyio.fail_after(120):
        while not (
            all(f"[{rank}] step 4\n" in shown.get("stdout", "") for rank in (0, 1)) and shown["progress"]["step"] >= 4
        ):
            shown = await agent.call("get_result", session="watched", task="job", output="head")
    printed = ""
    with anyio.fail_after(120):
        while not printed:
            printed = (await agent.call("get_result", session="watched", task="lost")).get("stdout", "")
    assert printed == "before\n"
    (login.service.folder / "stop").touch()
    await agent.until("watched", "1 DONE")
    ended = await agent.call("get_result", session="watched", task="job", output="head")
    assert ended["state"] == "DONE" and ended["stdout"].startswith("step 0\n")
