"""What users of rhapsody-py write first names what takes its place here."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, ComputeTask, InvalidTask, Session

PAGE = (Path(__file__).parents[2] / "docs" / "from_rhapsody_py.md").read_text()


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        ("backends", "get_backend", "await DragonExecutionBackendV3()"),
        ("backends", "ConcurrentExecutionBackend", "LocalExecutionBackend()"),
        ("backends", "RadicalExecutionBackend", "docs/allocations.md"),
        ("api", "TaskValidationError", "InvalidTask"),
        ("api", "enable_logging", "logging.getLogger"),
    ],
)
def test_an_import_names_what_takes_its_place(module: str, name: str, instead: str) -> None:
    with pytest.raises(ImportError, match=re.escape(instead)) as refused:
        exec(f"from rhapsody_mcp.{module} import {name}")
    assert "docs/from_rhapsody_py.md" in str(refused.value) and name in PAGE


@pytest.mark.parametrize("module", ["rhapsody_mcp.api", "rhapsody_mcp.backends"])
def test_the_page_names_all_that_an_import_names(module: str) -> None:
    others = vars(importlib.import_module(module))["_OF_RHAPSODY_PY"]
    assert [name for name in others if name.removesuffix("V1").removesuffix("V2") not in PAGE] == []


@pytest.mark.parametrize("module", ["rhapsody_mcp.api", "rhapsody_mcp.backends"])
def test_another_name_is_missing_as_ever(module: str) -> None:
    assert not hasattr(importlib.import_module(module), "nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {module} import nothing")


@pytest.mark.parametrize("name", ["add_backend", "start_telemetry", "get_telemetry"])
def test_a_method_of_a_session_names_what_takes_its_place(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"Session has no attribute '{name}': .*(backends=|get_statistics)"):
        getattr(Session(backends=[]), name)
    assert name in PAGE and not hasattr(Session(backends=[]), "nothing")


@pytest.mark.parametrize(
    ("field", "instead"),
    [("cpu_threads", '"cores"'), ("gpu", '"gpus"'), ("memory", '"memory_gb"'), ("output_files", "outputs=")],
)
def test_a_field_names_what_takes_its_place(field: str, instead: str) -> None:
    with pytest.raises(InvalidTask, match=instead):
        ComputeTask(None, **{field: 1})  # type: ignore[arg-type]


def test_an_address_of_a_model_belongs_to_the_session() -> None:
    with pytest.raises(InvalidTask, match="EndpointInferenceBackend"):
        AITask(prompt="hello", inference_endpoint="http://127.0.0.1:8000/v1")


@pytest.mark.anyio
async def test_a_dict_is_told_how_to_become_a_task() -> None:
    with pytest.raises(InvalidTask, match=r"ComputeTask\(\*\*fields\)"):
        await Session(backends=[]).submit_tasks([{"executable": "/bin/true"}])  # type: ignore[list-item]


@pytest.mark.parametrize(("key", "instead"), [("shell", 'executable="sh"'), ("cwd", '"cwd": ...'), ("env", '"env": {')])
def test_a_key_of_a_backend_names_what_takes_its_place(key: str, instead: str) -> None:
    with pytest.raises(InvalidTask, match=f"task_backend_specific_kwargs has no field '{key}'.*{re.escape(instead)}"):
        ComputeTask(executable="echo", task_backend_specific_kwargs={key: 1})
    assert f'"{key}"' in PAGE


@pytest.mark.parametrize("field", ["args", "arguments"])
def test_a_text_in_place_of_a_list_is_refused(field: str) -> None:
    what: dict[str, Any] = {"function": print} if field == "args" else {"executable": "echo"}
    what[field] = "-n 4"
    with pytest.raises(InvalidTask, match=rf"{field} is a text; valid is a list, as in {field}=\['-n 4'\]"):
        ComputeTask(**what)
