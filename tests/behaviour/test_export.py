"""The script and the record that a session leaves behind; tests/engine/test_export.py runs such scripts."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from rhapsody_mcp.settings import Settings
from tests.agents import ERAS, Agent, open_agent
from tests.slurm_stand_in import SlurmStandIn

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}
DOUBLE = "def double(number):\n    # twice\n    return 2 * number\n"


@pytest.fixture(params=ERAS)
async def agent(request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    async with open_agent(request.param) as opened:
        await opened.call("create_session", backends=["local"], num_workers=3)
        yield opened


async def submit(agent: Agent, *tasks: dict[str, Any], wait: bool = True) -> None:
    await agent.call("submit_tasks", session="session-1", tasks=list(tasks))
    if wait:
        assert (await agent.call("wait_tasks", session="session-1", timeout_s=50))["ended"]


async def export(agent: Agent, folder: Path) -> tuple[str, dict[str, Any]]:
    """Script and record. The script must be valid Python."""
    reply = await agent.call("export_session", session="session-1", folder=str(folder))
    script = read(reply["script"])
    compile(script, "script", "exec")
    return script, json.loads(read(reply["provenance"]))


def read(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


def mode(file: str | Path) -> int:
    return stat.S_IMODE(Path(file).stat().st_mode)


async def test_it_is_run_where_the_tasks_of_the_session_were(agent: Agent, tmp_path: Path) -> None:
    await submit(agent, {"executable": "/bin/cat", "arguments": ["data.txt"]})
    script, _ = await export(agent, tmp_path)
    assert f"    os.chdir({os.getcwd()!r})" in script and "\nimport os\n" in script


async def test_a_session_with_nodes_is_repeated_on_this_machine_or_on_the_nodes_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlurmStandIn(tmp_path, monkeypatch)
    async with open_agent() as agent:
        await agent.call("create_session", backends=["local"], nodes=2, minutes=5, scheduler={"partition": "gpu"})
        await submit(agent, {"name": "two", "source": DOUBLE, "args": [1]})
        script, _ = await export(agent, tmp_path)
    assert "- The tasks ran on 2 nodes; here they run on this machine or, inside a job of Slurm, on" in script
    assert 'LocalExecutionBackend(num_nodes=min(2, int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))))' in script
    file = tmp_path / "script.py"
    file.write_text(script)
    ended = await anyio.run_process([sys.executable, str(file)])
    assert json.loads(ended.stdout) == {"two": {"state": "DONE", "result": 2}}


async def test_a_person_reads_functions_and_tasks_in_their_order(agent: Agent, tmp_path: Path) -> None:
    await agent.call("register_function", session="session-1", source=DOUBLE)
    await submit(
        agent,
        {"name": "four", "function": "double", "args": [{"ref": "two", "path": "/0"}], "retries": 2, "timeout_s": 5},
        {"name": "two", "source": "def two():\n    return [2]", "process": True},
        {"executable": "/bin/echo", "arguments": ["x", 1, {"ref": "two"}], "ranks": 2, "env": {"A": "1"}},
        {"name": "root", "function": "math:sqrt", "args": [4], "after": ["four"], "on_upstream_failure": "run"},
    )
    script, _ = await export(agent, tmp_path)
    assert DOUBLE in script and "def two():\n    return [2]\n" in script and script.count("def double") == 1
    assert "Session([LocalExecutionBackend(num_workers=3)])" in script
    assert script.index("two_ = ComputeTask(two,") < script.index("four = ComputeTask(")
    assert "double,\n            args=[Part(two_, '/0')],\n" in script and "retries=2," in script
    assert "task_backend_specific_kwargs={'timeout': 5.0}" in script
    assert "arguments=['x', '1', two_]" in script and "'process_templates': [(2, {'env': {'A': '1'}})]" in script
    assert "Module('math:sqrt'), args=[4], name='root', after=[four], on_upstream_failure='run'" in script
    assert "await session.submit_tasks([four, two_, task_000003, root])" in script


async def test_prompts_keep_every_parameter(agent: Agent, tmp_path: Path) -> None:
    sampling = {"temperature": 0.7, "max_tokens": 9, "top_p": 0.5, "top_k": 3, "stop_sequences": ["END"]}
    await submit(
        agent,
        {"name": "drawn", "prompt": ['say "hi"', "two\nlines"], "system_prompt": "be short", "model": "m", **sampling},
        {"name": "fixed", "prompt": {"ref": "drawn", "path": "/1"}, "temperature": 0, "json_schema": SCHEMA},
    )
    script, record = await export(agent, tmp_path)
    written = script[script.index("drawn = AITask(") :]
    for field, value in {"system_prompt": "be short", "model": "m", **sampling}.items():
        assert f"{field}={value!r}," in written
    assert (
        """['say "hi"', 'two\\nlines'],""" in written
        and f"            Part(drawn, '/1'),\n            temperature=0.0,\n            json_schema={SCHEMA!r},"
        in written
    )
    assert "1 task drew answers by chance and without a seed" in script
    drawn, fixed = record["tasks"]
    assert drawn["sampling"] == {"model": "m", **sampling, "seeded": False}
    assert fixed["sampling"] == {"model": "the backend's own", "temperature": 0.0, "seeded": True}


async def test_chats_and_texts_with_results_are_written(agent: Agent, tmp_path: Path) -> None:
    message = {"role": "user", "content": "{item/who}: {ref:numbers/0}"}
    drawn = {"messages": [message], "temperature": {"item": True, "path": "/t"}, "n": 2, "model": "{item/who}"}
    await submit(
        agent,
        {"name": "numbers", "source": "def numbers():\n    return [1, 2]"},
        {"name": "told", "prompt": "{{item}} {ref:numbers}", "seed": {"ref": "numbers", "path": "/1"}, "for_each": 2},
        {"name": "drawn", **drawn, "for_each": [{"who": "m", "t": 0.5}]},
    )
    script, record = await export(agent, tmp_path)
    assert "AITask(Text('{item} ', numbers_), seed=Part(numbers_, '/1'))" in script
    chat = "{'role': 'user', 'content': Text(text(part(item, '/who')) + ': ', Part(numbers_, '/0'))}"
    assert f"messages=[{chat}],\n" in script and "temperature=part(item, '/t'),\n" in script
    assert "model=text(part(item, '/who')),\n" in script and "n=2,\n" in script
    rows = {row["name"]: row.get("sampling") for row in record["tasks"]}
    assert rows["drawn[0]"] == {"model": "m", "temperature": 0.5, "n": 2, "seeded": False}
    assert rows["told[0]"]["seed"] == {"result_of": "task.000001", "path": "/1"}


async def test_a_for_each_is_written_with_its_items_and_the_task_for_one(agent: Agent, tmp_path: Path) -> None:
    await submit(
        agent,
        {"name": "numbers", "source": "def numbers():\n    return [1, 2]"},
        {"name": "each", "for_each": {"ref": "numbers"}, "source": DOUBLE, "args": [{"item": True}], "retries": 1},
        {
            "name": "files",
            "for_each": [{"id": "a"}, {"id": "b"}],
            "executable": "/bin/echo",
            "arguments": [{"item": True, "path": "/id"}, "{item}-{{item}}.txt", {"ref": "numbers"}],
        },
    )
    script, record = await export(agent, tmp_path)
    assert "ForEach(numbers_, lambda item, _: ComputeTask(double, args=[item]), name='each', retries=1)" in script
    assert "[{'id': 'a'}, {'id': 'b'}],\n" in script
    assert "arguments=[text(part(item, '/id')), text(item) + '-{item}.txt', numbers_]" in script
    names = [task["name"] for task in record["tasks"]]
    assert names == ["numbers", "each", "each[0]", "each[1]", "files", "files[0]", "files[1]"]


async def test_what_was_submitted_after_others_had_ended_is_so_in_the_script(agent: Agent, tmp_path: Path) -> None:
    await submit(agent, {"name": "write", "executable": "/bin/true"}, {"name": "more", "executable": "/bin/true"})
    await submit(agent, {"name": "read", "executable": "/bin/cat"})
    script, _ = await export(agent, tmp_path)
    first = script.index("submit_tasks([write, more])")
    assert first < script.index("wait_tasks(session.tasks)") < script.index("submit_tasks([read])")


async def test_sources_that_mean_something_else_as_functions_stay_texts(agent: Agent, tmp_path: Path) -> None:
    texts = {
        "double": "def double(number):\n    return 'another of this name'",
        "counts": "CALLS = []\n\n\ndef counts(number):\n    CALLS.append(number)\n    return len(CALLS)",
        "report": "def report(number):\n    return number",
        "cached": "import functools\n\n\n@functools.cache\ndef cached(number):\n    return number",
        "quotes": "def quotes(number):\n    '''\\\\d'''\n    global seen\n    return \"\"\"'''\"\"\"",
        "lost": "def lost(number):\n    return nowhere",
    }
    await submit(agent, {"source": DOUBLE, "args": [1]})
    await submit(agent, *({"name": name, "source": text, "args": [1]} for name, text in texts.items()))
    script, _ = await export(agent, tmp_path)
    space: dict[str, Any] = {"__name__": "exported"}
    exec(script, space)
    assert space["double"](4) == 8
    assert [space[f"SOURCE_{number}"] for number in range(1, 7)] == list(texts.values())
    assert "report_ = ComputeTask(Source(SOURCE_3), args=[1], name='report')" in script


async def test_what_failed_and_what_that_canceled_is_in_it_and_what_was_canceled_on_request_is_not(
    agent: Agent, tmp_path: Path
) -> None:
    fail = "def fail():\n    raise ValueError('seven')"
    await submit(
        agent, {"name": "fail", "source": fail}, {"name": "after-fail", "source": DOUBLE, "args": [{"ref": "fail"}]}
    )
    agent.backend.may_finish.clear()
    await submit(
        agent,
        {"name": "endless", "executable": "/bin/sleep"},
        {"name": "needs-it", "source": DOUBLE, "args": [{"ref": "endless"}]},
        {"name": "runs-anyhow", "source": DOUBLE, "args": [{"ref": "endless"}], "on_upstream_failure": "run"},
        wait=False,
    )
    await agent.call("cancel_tasks", session="session-1", tasks=["endless"], force=True)
    script, record = await export(agent, tmp_path)
    assert "fail_ = ComputeTask(fail, name='fail')" in script
    assert "after_fail = ComputeTask(double, args=[fail_], name='after-fail')" in script
    assert "/bin/sleep" not in script and "needs_it" not in script and record["tasks_left_out"] == 2
    assert "ComputeTask(double, args=[None], name='runs-anyhow', on_upstream_failure='run')" in script
    assert "Left out: 2 that had been canceled on request, or needed such a task" in script
    ends = {task["name"]: (task["state"], task.get("cause")) for task in record["tasks"]}
    assert ends["fail"] == ("FAILED", "error") and ends["endless"] == ("CANCELED", "canceled")


async def test_order_is_kept_where_a_canceled_task_stood_in_between(agent: Agent, tmp_path: Path) -> None:
    agent.backend.may_finish.clear()
    last = {"name": "last", "executable": "/bin/cat", "after": ["between", "own"], "on_upstream_failure": "run"}
    await submit(
        agent,
        last,
        {"name": "own", "executable": "/bin/true"},
        {"name": "between", "executable": "/bin/sleep", "after": ["before"]},
        {"name": "before", "executable": "/bin/date", "after": ["first"]},
        {"name": "first", "executable": "/bin/true"},
        wait=False,
    )
    await agent.call("cancel_tasks", session="session-1", tasks=["between"], force=True)
    agent.backend.may_finish.set()
    script, _ = await export(agent, tmp_path)
    made = "last = ComputeTask(executable='/bin/cat', name='last', after=[own, before], on_upstream_failure='run')"
    assert "/bin/sleep" not in script and made in script
    assert script.index("before = ComputeTask") < script.index(made)


async def test_what_a_failure_canceled_some_steps_before_is_in_it_with_its_items(agent: Agent, tmp_path: Path) -> None:
    await submit(
        agent,
        {"name": "fail", "source": "def fail():\n    raise ValueError('seven')"},
        {"name": "each", "for_each": {"ref": "fail"}, "source": DOUBLE, "args": [{"item": True}]},
        {"name": "sum", "function": "builtins:sum", "args": [{"ref": "each"}]},
    )
    script, record = await export(agent, tmp_path)
    assert "each = ForEach(fail_, lambda item, _: ComputeTask(double, args=[item]), name='each')" in script
    assert "sum = ComputeTask(Module('builtins:sum'), args=[each], name='sum')" in script
    assert record["tasks_left_out"] == 0 and "Left out" not in script


async def test_what_failed_where_it_is_imported_does_not_stop_the_script(agent: Agent, tmp_path: Path) -> None:
    broken = [
        "import module_of_nobody\n\n\ndef a():\n    pass",
        "def b(x=1 / 0):\n    pass",
        "def c():\n    raise OSError",
    ]
    await submit(agent, *({"source": source} for source in broken))
    script, record = await export(agent, tmp_path)
    assert [task["state"] for task in record["tasks"]] == ["FAILED"] * 3
    space: dict[str, Any] = {"__name__": "exported"}
    exec(script, space)
    assert (space["SOURCE_1"], space["SOURCE_2"]) == tuple(broken[:2]) and callable(space["c"])


async def test_a_for_each_of_which_some_were_canceled_is_in_it_whole(agent: Agent, tmp_path: Path) -> None:
    await submit(agent, {"name": "done", "source": DOUBLE, "args": [1]})
    agent.backend.may_finish.clear()
    each = {"name": "each", "for_each": [1, 2], "source": DOUBLE, "args": [{"item": True}]}
    await submit(agent, each, each | {"name": "all"}, wait=False)
    await agent.call("cancel_tasks", session="session-1", tasks=["each[0]", "all[0]", "all[1]"], force=True)
    agent.backend.may_finish.set()
    assert (await agent.call("wait_tasks", session="session-1", timeout_s=50))["ended"]
    script, _ = await export(agent, tmp_path)
    assert "name='each'" in script and "name='all'" not in script
    assert "1 task of a for_each had been canceled on request" in script


async def test_it_can_be_written_while_tasks_run(agent: Agent, tmp_path: Path) -> None:
    agent.backend.may_finish.clear()
    await submit(agent, {"name": "slow", "source": DOUBLE, "args": [1]}, wait=False)
    script, record = await export(agent, tmp_path)
    assert "1 task had not ended when this was written" in script and "name='slow'" in script
    assert record["tasks"][0]["state"] in ("QUEUED", "RUNNING") and "ended" not in record["tasks"][0]
    agent.backend.may_finish.set()


async def test_secrets_are_looked_up_where_the_script_runs(tmp_path: Path) -> None:
    url = "http://user:hunter1@127.0.0.1:8000/v1"
    settings = Settings(endpoint_url=url, endpoint_api_key="hunter2")
    env = {"HF_TOKEN": "hunter3", "DB_PASSWORD": "hunter4", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    async with open_agent(settings=settings) as agent:
        await agent.call("create_session", backends=["local", "endpoint"])
        templates = [{"ranks": 1, "env": {"MY_SECRET": "hunter5"}}]
        await submit(
            agent, {"executable": "/bin/a", "env": env}, {"executable": "/bin/b", "process_templates": templates}
        )
        script, record = await export(agent, tmp_path)
    assert "hunter" not in script and "hunter" not in json.dumps(record)
    assert (
        "EndpointInferenceBackend(url='http://127.0.0.1:8000/v1', api_key=os.environ[\"ENDPOINT_API_KEY\"])" in script
    )
    assert "'HF_TOKEN': os.environ[\"HF_TOKEN\"]" in script
    assert "'OMP_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false'" in script
    needed = "set in the environment: ENDPOINT_API_KEY, HF_TOKEN, DB_PASSWORD, MY_SECRET"
    assert needed in script


async def test_the_record_says_where_results_come_from(agent: Agent, tmp_path: Path) -> None:
    await submit(agent, {"name": "four", "source": DOUBLE, "args": [2]})
    _, record = await export(agent, tmp_path)
    assert {"python", "rhapsody-mcp"} <= record["versions"].keys()
    assert record["machine"]["cores"] >= 1 and record["backends"][0]["backend"] == "scripted"
    (task,) = record["tasks"]
    assert task["submitted"] <= task["started"] <= task["ended"] and task["ended"].endswith("+00:00")
    digest = "4b227777d4dd1fc61c6f884f48641d02b4d121d3fd328cb08b5531fcacdabf8a"  # of the text 4
    assert task["result"] == {"type": "int", "encoding": "json", "bytes": 1, "sha256": digest}


async def test_the_reply_is_short_and_the_files_are_their_owners_alone(agent: Agent, tmp_path: Path) -> None:
    await submit(agent, *({"name": f"t{number}", "source": DOUBLE, "args": [number]} for number in range(200)))
    reply = await agent.call("export_session", session="session-1", folder=str(tmp_path / "new" / "runs"))
    text = read(reply["script"])
    head = agent.texts[-1].partition("--- the script begins ---\n")[2]
    assert 1000 < len(head) <= 2048 and text.startswith(head) and head.endswith("\n")
    assert f"({len(text)} bytes) repeats 200 tasks" in agent.texts[-1]
    assert len(agent.texts[-1]) < 3000
    assert {mode(reply[field]) for field in ("script", "provenance", "report")} == {0o600}
    assert mode(tmp_path / "new" / "runs") == 0o700


async def test_an_export_overwrites_nothing(agent: Agent, tmp_path: Path) -> None:
    replies = [await agent.call("export_session", session="session-1", folder=str(tmp_path)) for _ in range(3)]
    files = {reply[field] for reply in replies for field in ("script", "provenance", "report")}
    assert len(files) == 9 and {str(tmp_path / name) for name in os.listdir(tmp_path)} == files


async def test_without_a_folder_it_goes_to_the_users_state(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    reply = await agent.call("export_session", session="session-1")
    assert Path(reply["script"]).parent.name == "exports"
    assert sys.platform != "linux" or Path(reply["script"]).is_relative_to(tmp_path)


async def test_an_empty_session_gives_a_script_that_runs(agent: Agent, tmp_path: Path) -> None:
    reply = await agent.call("export_session", session="session-1", folder=str(tmp_path))
    ran = await anyio.run_process([sys.executable, reply["script"]])
    assert (ran.stdout, ran.stderr) == (b"{}\n", b"")


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("runs", "folder is 'runs'; valid is an absolute path"),
        ("/dev/null/runs", "folder /dev/null/runs cannot be written: Not a directory. Give another folder."),
    ],
)
async def test_a_folder_that_cannot_be_written_is_refused(agent: Agent, folder: str, told: str) -> None:
    text = await agent.refusal("export_session", session="session-1", folder=folder)
    assert text.startswith("invalid_request: ") and told in text


async def test_an_item_or_a_result_that_is_the_object_of_keyword_arguments_is_written_so(
    agent: Agent, tmp_path: Path
) -> None:
    source = "def add(a, b):\n    return a + b"
    await submit(
        agent,
        {"name": "made", "source": "def made():\n    return {'all': [{'a': 1, 'b': 2}], 'one': {'a': 3, 'b': 4}}"},
        {"name": "whole", "source": source, "kwargs": {"item": True}, "for_each": [{"a": 1, "b": 2}]},
        {
            "name": "part",
            "source": source,
            "kwargs": {"item": True, "path": "/x"},
            "for_each": [{"x": {"a": 1, "b": 2}}],
        },
        {"name": "listed", "source": source, "kwargs": {"item": True}, "for_each": {"ref": "made", "path": "/all"}},
        {"name": "given", "source": source, "kwargs": {"ref": "made", "path": "/one"}},
    )
    script, _ = await export(agent, tmp_path)
    assert "lambda item, _: ComputeTask(add, kwargs=item), name='whole'" in script
    assert "lambda item, _: ComputeTask(add, kwargs=part(item, '/x'))," in script
    assert "ForEach(Part(made_, '/all'), lambda item, _: ComputeTask(add, kwargs=item), name='listed')" in script
    assert "ComputeTask(add, kwargs=Part(made_, '/one'), name='given')" in script


async def test_a_task_that_no_code_can_say_is_left_out_with_what_needs_it(agent: Agent, tmp_path: Path) -> None:
    await submit(
        agent,
        {"name": "odd", "source": DOUBLE, "args": [1]},
        {"name": "needs-odd", "source": DOUBLE, "args": [{"ref": "odd"}]},
        {"name": "plain", "source": DOUBLE, "args": [2]},
    )
    odd = agent.sessions.get("session-1").task("odd")
    odd.args = (object(),)  # type: ignore[attr-defined]
    script, _ = await export(agent, tmp_path)
    assert "# odd is left out, it cannot be written as code: a object cannot be written as code" in script
    assert "# needs-odd is left out: it needs odd" in script and "submit_tasks([plain])" in script
    assert "repeats 1 task; not in it: 2 that no code can say." in agent.texts[-1]


async def test_a_replaced_task_is_not_repeated_and_the_reply_says_how_to_run(agent: Agent, tmp_path: Path) -> None:
    await submit(agent, {"name": "run", "source": "def run():\n    raise ValueError('first')"})
    await submit(agent, {"name": "run", "source": "def run():\n    return 'second'"})
    script, record = await export(agent, tmp_path)
    assert "first" not in script and "second" in script
    assert [task.get("replaced_by") for task in record["tasks"]] == ["task.000002", None]
    assert f"Run it with: {sys.executable} {tmp_path}" in agent.texts[-1]
    assert "not in it: 1 that others replaced" in agent.texts[-1]


async def test_a_replaced_task_is_in_it_where_a_task_that_ran_uses_it(agent: Agent, tmp_path: Path) -> None:
    source = "def run(number):\n    if number == 2:\n        raise ValueError(number)\n    return number"
    sweep = {"name": "sweep", "for_each": [1, 2, 3], "source": source, "args": [{"item": True}]}
    function = "def kept(values):\n    return values"
    await submit(
        agent,
        {"name": "unused", "source": source, "args": [2]},
        sweep,
        {"name": "best", "source": function, "args": [{"ref": "sweep"}], "on_upstream_failure": "run"},
        {"name": "nb", "source": function, "args": [{"ref": "sweep"}]},
        {"name": "after-nb", "source": function, "args": [{"ref": "nb"}]},
    )
    await submit(agent, sweep | {"for_each": [1, 3]}, {"name": "unused", "source": source, "args": [1]})
    await submit(agent, {"name": "next", "source": function, "args": [{"ref": "sweep"}]})
    script, record = await export(agent, tmp_path)
    assert "sweep_1 = ForEach([1, 2, 3]," in script and "sweep = ForEach([1, 3]," in script
    assert "best = ComputeTask(kept, args=[sweep_1]," in script and "next = ComputeTask(kept, args=[sweep]," in script
    assert "'task.000002': sweep_1," in script and "'sweep': sweep," in script and "args=[None]" not in script
    assert "name='nb'" not in script and "after-nb" not in script and record["tasks_left_out"] == 2
    assert "not in it: 2 that were canceled, 1 that others replaced." in agent.texts[-1]


async def test_a_reference_to_one_task_of_a_for_each_is_a_part_of_its_list(agent: Agent, tmp_path: Path) -> None:
    await submit(agent, {"name": "each", "for_each": [1, 2], "source": DOUBLE, "args": [{"item": True}]})
    await submit(agent, {"name": "one", "source": DOUBLE, "args": [{"ref": "each[1]"}], "after": ["each[0]"]})
    script, _ = await export(agent, tmp_path)
    assert "one = ComputeTask(double, args=[Part(each, '/1')], name='one', after=[each])" in script
