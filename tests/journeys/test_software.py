"""An agent whose tasks need another Python, packages, or lines that run before them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.journeys.travellers import IN_ONE_ERA, Traveller, rows_by_name
from tests.pythons import OTHER_VERSIONS, make_wheel, other_python

pytestmark = [pytest.mark.anyio, IN_ONE_ERA]

VERSION = "def version():\n    import sys\n    return '{}.{}'.format(*sys.version_info)"
OBJECT = "class P:\n    def __init__(self):\n        self.x = 1\n\ndef make():\n    return {1: [P(), 2]}"


async def test_a_session_and_its_tasks_run_in_the_python_that_was_named(agent: Traveller, tmp_path: Path) -> None:
    version = OTHER_VERSIONS[0]
    python = other_python(version)
    await agent.create("local", environment={"python": python})
    await agent.call("register_function", session=agent.session, source=VERSION)
    await agent.submit(
        {"name": "of_session", "source": VERSION},
        {"name": "registered", "function": "version"},
        {"name": "own", "source": VERSION, "python": sys.executable},
        {
            "name": "each",
            "source": f"{VERSION}\ndef f(x):\n    return [x, version()]",
            "args": [{"item": True}],
            "for_each": 2,
        },
        {"name": "made", "source": OBJECT},
        {"name": "used", "source": "def f(made):\n    return made[1][0].x", "args": [{"ref": "made"}]},
    )
    rows = rows_by_name(await agent.wait())
    own = "{}.{}".format(*sys.version_info)
    assert [rows[name]["result"] for name in ("of_session", "registered", "own")] == [version, version, own]
    assert rows["each"]["result"] == [[0, version], [1, version]] and rows["used"]["result"] == 1
    assert "P object" in str((await agent.result("made"))["result"])
    assert (await agent.result("made", path="/1/1"))["result"] == 2
    exported = await agent.call("export_session", session=agent.session, folder=str(tmp_path))
    script, record = exported["script"], json.loads(read(exported["provenance"]))
    assert [task["software"]["python"] for task in record["tasks"][:3]] == [python, python, sys.executable]
    assert f"software={{'python': {python!r}}}" in read(script) and f"'python': {sys.executable!r}" in read(script)


async def test_a_missing_module_is_told_with_the_ways_to_get_it(agent: Traveller, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "greeting", "def hello():\n    return 'hello'\n")
    source = "def f():\n    import greeting\n    return greeting.hello()"
    await agent.create("local")
    planned = await agent.submit({"name": "without", "source": source}, dry_run=True)
    assert planned["problems"] == ["without: no module 'greeting' is installed here: give packages, python or setup"]
    assert not (await agent.submit({"name": "with", "source": source, "packages": [wheel]}, dry_run=True))["problems"]
    await agent.submit({"name": "without", "source": source})
    (failure,) = (await agent.wait())["failures"]
    assert sys.executable in failure["error"] and "packages" in failure["error"]
    await agent.submit({"name": "with", "source": source, "packages": [wheel]})
    waited = await agent.wait(timeout_s=0.1)
    while not waited["ended"]:
        (told,) = waited["open"]
        assert told in ("with QUEUED until its packages are installed", "with QUEUED") or "RUNNING" in told
        waited = await agent.wait(timeout_s=5)
    assert rows_by_name(waited)["with"]["result"] == "hello"


async def test_setup_that_fails_is_refused_by_create_session(agent: Traveller) -> None:
    refusal = await agent.refusal(
        "create_session", backends=["local"], environment={"setup": ["true", "module load x"]}
    )
    assert "'module load x' ended with exit code" in refusal and "bash -l" in refusal
    refusal = await agent.refusal("create_session", backends=["local"], environment={"python": "/no/such/python"})
    assert "does not exist on" in refusal and "Valid is an interpreter" in refusal
    await agent.create("local", environment={"setup": ["export A=1"]})
    await agent.submit(
        {"name": "shown", "executable": "sh", "arguments": ["-c", "echo $A $B"], "setup": ["B=2; export B"]},
        {"name": "failing", "executable": "true", "setup": ["cd /no/such/folder"]},
    )
    waited = await agent.wait()
    assert rows_by_name(waited)["shown"]["result"] == "1 2"
    assert "'cd /no/such/folder' ended with exit code 1" in waited["failures"][0]["error"]


async def test_a_python_that_is_none_is_refused_at_submission(agent: Traveller) -> None:
    await agent.create("local")
    refusal = await agent.refusal(
        "submit_tasks", session=agent.session, tasks=[{"executable": "true", "python": "/bin/ls"}]
    )
    assert "tasks[0]" in refusal and "/bin/ls is no Python" in refusal


def read(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")
