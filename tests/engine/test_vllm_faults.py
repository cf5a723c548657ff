"""What becomes of prompts when their server dies or hangs, with a stand-in for vLLM under the real keeper."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rhapsody_mcp.api import AITask, Session
from rhapsody_mcp.backends import DragonVllmInferenceBackend
from rhapsody_mcp.engine.process.tree import descendants
from rhapsody_mcp.model.states import Cause, TaskState
from tests.engine import vllm_stand_in
from tests.processes import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(vllm_stand_in.install(tmp_path / "stand-in")))


def server_processes(role: str) -> list[int]:
    """The processes with this role, in the order of their starts."""
    words = {"keeper": "engine.keeper", "server": "vllm_launcher.py", "engine core": "VLLM::EngineCore"}
    found = [pid for pid in sorted(descendants(os.getpid())) if words[role] in command_of(pid)]
    return [pid for pid in found if role == "keeper" or words["keeper"] not in command_of(pid)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


FAULTS = [
    ("server", signal.SIGKILL, "ended: signal 9 ended it"),
    ("server", signal.SIGTERM, "ended"),
    ("server", signal.SIGSTOP, r"counts as dead: its process \d+ was stopped .*, 3 times in a row"),
    ("engine core", signal.SIGKILL, "counts as dead: its engine died"),
    ("engine core", signal.SIGTERM, "counts as dead: its engine died"),
    ("engine core", signal.SIGSTOP, r"counts as dead: its process \d+ was stopped .*, 3 times in a row"),
    ("keeper", signal.SIGKILL, "ended"),
    ("keeper", signal.SIGTERM, "ended"),
    ("keeper", signal.SIGSTOP, r"counts as dead: its process \d+ was stopped"),
]


@pytest.mark.parametrize(("role", "number", "told"), FAULTS, ids=[f"{r} {n.name}" for r, n, _ in FAULTS])
async def test_a_prompt_that_was_sent_is_lost_with_its_server_and_one_that_waited_runs_on_the_next(
    role: str, number: signal.Signals, told: str
) -> None:
    backend = DragonVllmInferenceBackend(model="shipped", device="cpu", max_batch_size=1, health_s=1.0)
    async with Session([backend]) as session:
        sent, again = AITask("wait for ever"), AITask("wait for ever", retries=1)
        unsent = AITask("answer")
        await session.submit_tasks([sent])
        await wait_until(lambda: sent.state is TaskState.RUNNING)
        await session.submit_tasks([unsent])
        before = descendants(os.getpid())
        os.kill(server_processes(role)[0], number)
        await session.wait_tasks([sent, unsent], timeout=600)
        assert (sent.state, sent.cause) == (TaskState.FAILED, Cause.LOST)
        with pytest.raises(Exception, match=told):
            await sent
        assert (unsent.state, unsent.attempts) == (TaskState.DONE, 1)
        await wait_until(lambda: not set(before) & set(descendants(os.getpid())))

        await session.submit_tasks([again])
        await wait_until(lambda: again.state is TaskState.RUNNING)
        await session.cancel(again)
    assert not server_processes("server")


@pytest.mark.ci
async def test_one_server_of_two_is_started_again_while_the_other_serves() -> None:
    backend = DragonVllmInferenceBackend(model="shipped", device="cpu", num_gpus=2, health_s=1.0)
    async with Session([backend]) as session:
        await backend.start()
        first, second = server_processes("server")
        os.kill(first, signal.SIGKILL)
        await wait_until(lambda: "is started again (1 of 5) after: the vLLM server on port" in backend.progress)
        assert await answers(session) == {str(second)}
        await wait_until(lambda: backend.progress == "ready")
        third = next(pid for pid in server_processes("server") if pid != second)
        os.kill(second, signal.SIGKILL)
        await wait_until(lambda: "is started again" in backend.progress)
        assert await answers(session) == {str(third)}


async def answers(session: Session) -> set[object]:
    tasks = [AITask(f"answer {number}") for number in range(8)]
    await session.submit_tasks(tasks)
    await session.wait_tasks(tasks, timeout=60)
    return {task.return_value for task in tasks}


async def test_a_backend_at_rest_has_no_process_and_starts_again() -> None:
    backend = DragonVllmInferenceBackend(model="shipped", device="cpu")
    async with Session([backend]) as session:
        assert await answers(session)
        await backend.rest()
        assert not server_processes("keeper") and not server_processes("engine core")
        await backend.start()
        assert server_processes("server")
