"""A new kind of backend is one entry in the table of backends."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, Session
from rhapsody_mcp.backends import BACKENDS, Registration
from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.specs import TaskSpec
from rhapsody_mcp.runtime.backend_factory import SessionConfig, open_backends
from rhapsody_mcp.settings import Settings
from rhapsody_mcp.testing import ScriptedBackend

pytestmark = pytest.mark.anyio


class Extra(ScriptedBackend):
    """Answers with the model that the session names, and with the setting that the server gives."""

    def __init__(self, *, endpoint_model: str, health_s: float) -> None:
        def answer(spec: TaskSpec, values: list[Any]) -> object:
            return f"{endpoint_model} {health_s:g}"

        super().__init__(answer, name="extra", kinds=["prompt"])


async def test_a_registered_backend_runs_tasks_with_what_session_and_server_give_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extra = Registration(__name__, "Extra", "prompts", options=("endpoint_model",), server_arguments=("health_s",))
    monkeypatch.setitem(BACKENDS, "extra", extra)
    wanted = SessionConfig(backends=("extra",), endpoint_model="tiny")
    async with Session(open_backends(wanted, Settings(vllm_health_s=3))) as session:
        task = AITask("hi")
        await session.submit_tasks([task])
        await session.wait_tasks([task])
    assert task.return_value == "tiny 3"
    with pytest.raises(InvalidRequest, match="device has no effect without the backend vllm"):
        open_backends(SessionConfig(backends=("extra",), device="cpu"), Settings())


@pytest.mark.parametrize("name", BACKENDS)
def test_each_registered_class_is_a_backend_of_that_name(name: str) -> None:
    arguments = {"url": "http://127.0.0.1:1/v1"} if name == "endpoint" else {}
    backend: Backend = BACKENDS[name].load_class()(**arguments)
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert BACKENDS[name].module in sys.modules
