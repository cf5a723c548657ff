"""What agents give their tasks to run in: how requests keep it, what is refused, and what waits for packages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.model.specs import Software
from rhapsody_mcp.runtime.environments.package_cache import PackageCache
from rhapsody_mcp.settings import Settings
from tests.agents import ERAS, Agent, open_agent
from tests.pythons import make_wheel

pytestmark = pytest.mark.anyio

NOTHING = "def nothing():\n    pass"


@pytest.fixture(params=ERAS)
async def agent(request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    async with open_agent(request.param) as opened:
        await opened.session()
        yield opened


async def submit(agent: Agent, *tasks: dict[str, Any], **options: Any) -> dict[str, Any]:
    return await agent.call("submit_tasks", session="session-1", tasks=list(tasks), **options)


def is_there(file: str) -> bool:
    return os.path.exists(file)


def software(agent: Agent) -> list[Software]:
    return [run.spec.layout.software for run in agent.backend.received]


async def test_a_task_has_its_own_software_or_else_that_of_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apptainer").touch(0o700)  # nothing runs in it here
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    async with open_agent("auto") as agent:
        refusal = await agent.refusal("create_session", environment={"python": "/opt/env", "setup": ["true"]})
        assert "/opt/env does not exist" in refusal
        refusal = await agent.refusal("create_session", environment={"container": "base.sif"})
        assert "base.sif does not exist" in refusal
        await agent.call("create_session", environment={"container": "docker://base"})
        await run_each(agent)
        assert software(agent) == [
            Software(container="docker://base"),
            Software(container="docker://base", setup=("module load cuda",)),
            Software(python="/opt/env"),
            Software(),
            Software(container="a.sif", setup=("export SEED=a",)),
            Software(container="b.sif", setup=("export SEED=b",)),
        ]
        assert all(run.spec.layout.mode == "process" for run in agent.backend.received[:3])


async def run_each(agent: Agent) -> None:
    await submit(
        agent,
        {"source": NOTHING},
        {"source": NOTHING, "setup": ["module load cuda"]},
        {"executable": "true", "python": "/opt/env"},
        {"prompt": "hello"},
        {
            "source": "def f(x):\n    return x",
            "args": [{"item": True}],
            "setup": ["export SEED={item}"],
            "container": "{item}.sif",
            "for_each": ["a", "b"],
        },
    )
    await agent.call("wait_tasks", session="session-1")


async def test_packages_are_there_before_a_backend_gets_the_task_also_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(first))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(first))
    monkeypatch.setenv("UV_OFFLINE", "1")
    make_wheel(first, "greeting", "")
    may_build, build = asyncio.Event(), PackageCache._build

    async def build_when_it_may(*arguments: Any) -> None:
        await may_build.wait()
        await build(*arguments)

    monkeypatch.setattr(PackageCache, "_build", build_when_it_may)
    async with open_agent("auto", ledger=second) as agent:
        await agent.session()
        await submit(agent, {"name": "waits", "source": NOTHING, "packages": ["greeting==1.*"]})
        waited = await agent.call("wait_tasks", session="session-1", timeout_s=0)
        assert waited["open"] == ["waits QUEUED until its packages are installed"]
        assert agent.backend.received == []
    may_build.set()
    async with open_agent("auto", ledger=second) as agent:
        assert (await agent.call("wait_tasks", session="session-1", timeout_s=50))["counts"] == {"DONE": 1}
        (given,) = software(agent)
        assert given.packages == () and is_there(f"{given.python}/bin/python")
        assert given.python.startswith(str(second / "environments"))
        await submit(agent, {"source": NOTHING, "packages": ["greeting==1.*"]})
        await agent.call("wait_tasks", session="session-1", timeout_s=50)
        assert software(agent)[0] == software(agent)[1]
        await submit(agent, {"name": "wrong", "source": NOTHING, "packages": ["greeting==2.*"], "retries": 3})
        (failure,) = (await agent.call("wait_tasks", session="session-1", timeout_s=50))["failures"]
        assert (
            failure["cause"] == "invalid" and "its packages (greeting==2.*) could not be installed" in failure["error"]
        )


async def test_a_task_that_waits_for_its_packages_is_canceled_at_once(tmp_path: Path) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    build = '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(f'{build}[project]\nname = "slow"\nversion = "1"\n')
    (source / "slow.py").write_text("import time\ntime.sleep(600)\n")
    async with open_agent("auto") as agent:
        await agent.session()
        await submit(agent, *[{"name": name, "source": NOTHING, "packages": [str(source)]} for name in ("one", "two")])
        await agent.call("cancel_tasks", session="session-1", tasks=["one"])
        assert (await agent.call("wait_tasks", session="session-1", timeout_s=0))["counts"] == {
            "CANCELED": 1,
            "QUEUED": 1,
        }
        await agent.call("close_session", session="session-1", force=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("venv", "python"), ("requirements", "packages"), ("singularity", "container"), ("modules", "setup")],
)
async def test_words_of_other_systems_lead_to_ours(agent: Agent, theirs: str, ours: str) -> None:
    told = await agent.refusal("submit_tasks", session="session-1", tasks=[{"executable": "true", theirs: "x"}])
    assert f"(did you mean {ours!r}?)" in told
    assert "(did you mean 'environment'?)" in await agent.refusal("create_session", **{theirs: "x"})


async def test_a_setting_chooses_what_runs_containers() -> None:
    async with open_agent("auto", settings=Settings(container_runtime="podman")) as agent:
        await agent.session()
        await submit(agent, {"source": NOTHING, "container": "a"}, {"source": NOTHING})
        await agent.call("wait_tasks", session="session-1")
        assert software(agent) == [Software(container="a", runtime="podman"), Software()]


async def test_a_dry_run_says_what_a_task_runs_in(agent: Agent) -> None:
    plan = await submit(
        agent,
        {"name": "a", "source": "def f():\n    import no_such", "python": "/opt/env", "setup": ["x", "y"]},
        {"name": "b", "executable": "no-such", "container": "a.sif"},
        {"name": "c", "source": NOTHING, "packages": ["a", "b==2"]},
        dry_run=True,
    )
    assert [row["runs_as"] for row in plan["graph"]] == [
        "a function in a process of its own, after 2 setup lines, with /opt/env",
        "an executable in a process of its own, in a.sif",
        "a function in a process of its own, with a, b==2, installed before",
    ]
    assert plan["problems"] == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"packages": ["-r requirements.txt"]}, "is an option of pip"),
        ({"packages": ["x"], "container": "a.sif"}, "contradict each other"),
        ({"setup": [""]}, "valid is a list of lines for bash"),
        ({"python": " "}, "valid is the path of an interpreter"),
    ],
)
async def test_what_makes_no_sense_is_refused(agent: Agent, fields: dict[str, Any], told: str) -> None:
    refusal = await agent.refusal("submit_tasks", session="session-1", tasks=[{"executable": "true", **fields}])
    assert told in refusal
    refusal = await agent.refusal("submit_tasks", session="session-1", tasks=[{"prompt": "hello", "python": "/x"}])
    assert "python has no effect on a task with prompt" in refusal


@pytest.mark.parametrize("field", ["packages", "container", "setup"])
async def test_where_programs_are_restricted_so_is_what_could_run_others(field: str) -> None:
    async with open_agent("auto", settings=Settings(allowed_executables=("/usr/bin/*", "/bin/*"))) as agent:
        await agent.session()
        value = "a.sif" if field == "container" else ["x"]
        refusal = await agent.refusal("submit_tasks", session="session-1", tasks=[{"source": NOTHING, field: value}])
        assert f"{field} is not allowed here, because allowed_executables" in refusal
        refusal = await agent.refusal(
            "submit_tasks", session="session-1", tasks=[{"source": NOTHING, "python": "/opt/none"}]
        )
        assert "python is '/opt/none'" in refusal
