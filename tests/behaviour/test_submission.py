"""What an agent submits, and what is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import Agent, open_agent

pytestmark = pytest.mark.anyio

DOUBLE = "def double(number):\n    return 2 * number"


async def results(agent: Agent) -> dict[str, Any]:
    reply = await agent.call("wait_tasks", session="session-1", timeout_s=50)
    assert reply["ended"], reply
    return {row.get("name", row["task"]): row["result"] for row in reply["done"]}


async def test_a_pipeline_by_references_takes_three_calls_and_copies_nothing(agent: Agent) -> None:
    tasks = [
        {"name": "sum", "function": "builtins:sum", "args": [{"ref": "lengths"}]},
        {
            "name": "lengths",
            "source": "def lengths(texts):\n    return [len(t) for t in texts]",
            "args": [{"ref": "ai"}],
        },
        {"name": "ai", "prompt": ["one", "three"]},
    ]
    reply = await agent.call("submit_tasks", session="session-1", tasks=tasks)
    assert reply["counts"] == {"WAITING": 2, "QUEUED": 1}
    assert (reply["first"], reply["last"]) == ("task.000001", "task.000003")
    assert await results(agent) == {
        "ai": ["answer to one", "answer to three"],
        "lengths": [13, 15],
        "sum": 28,
    }
    assert agent.calls == 3


async def test_a_reference_reaches_into_a_result_and_back_to_earlier_calls(agent: Agent) -> None:
    make = {"name": "make", "source": "def make():\n    return {'rows': [{'label': 7}]}"}
    await agent.call("submit_tasks", session="session-1", tasks=[make])
    await agent.call("wait_tasks", session="session-1")
    label = {"ref": "make", "path": "/rows/0/label"}
    await agent.call(
        "submit_tasks",
        session="session-1",
        tasks=[
            {"name": "by-name", "source": DOUBLE, "kwargs": {"number": label}},
            {"name": "by-id", "source": DOUBLE, "args": [label | {"ref": "task.000001"}]},
            {"name": "in-text", "executable": "/bin/echo", "arguments": [label, 3, "x"]},
            {"name": "asked", "prompt": {"ref": "by-name"}},
        ],
    )
    done = await results(agent)
    assert (done["by-name"], done["by-id"], done["in-text"], done["asked"]) == (
        14,
        14,
        "/bin/echo 7 3 x",
        "answer to 14",
    )


async def test_a_literal_is_passed_as_it_is(agent: Agent) -> None:
    same = "def same(value):\n    return value"
    value = {"data": "nothing", "deep": [{"literal": {"ref": "main"}}, {"literal": {"literal": 1}}]}
    await agent.call("submit_tasks", session="session-1", tasks=[{"name": "same", "source": same, "args": [value]}])
    assert await results(agent) == {"same": {"data": "nothing", "deep": [{"ref": "main"}, {"literal": 1}]}}


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        pytest.param(
            [{"name": "fit", "source": "def fit(x):\n    return x +"}],
            ["invalid_task: tasks[0] ('fit'): the source does not compile: line 2: invalid syntax in 'return x +'"],
            id="source that does not compile",
        ),
        pytest.param(
            [{"source": "x = 1"}], ["tasks[0]: the source defines no function"], id="source without a function"
        ),
        pytest.param(
            [{"source": DOUBLE, "entry": "doubel", "args": [1]}],
            ["no function 'doubel' (did you mean 'double'?)"],
            id="an entry that is not there",
        ),
        pytest.param(
            [{"source": DOUBLE, "args": [1, 2]}],
            ["double(number) does not take these arguments"],
            id="arguments that the function does not take",
        ),
        pytest.param([{"function": "math.sqrt"}], ['"package.module:function"'], id="a function that is no path"),
        pytest.param(
            [{"name": "samples", "prompt": "go"}, {"name": "train", "source": DOUBLE, "args": [{"ref": "sampels"}]}],
            ["tasks[1] ('train')", "unknown task 'sampels' (did you mean 'samples'?)"],
            id="a reference to nothing",
        ),
        pytest.param(
            [{"name": "me", "source": DOUBLE, "args": [{"ref": "me"}]}],
            ["tasks[0] ('me'): it refers to its own result"],
            id="a reference to itself",
        ),
        pytest.param(
            [
                {"name": "a", "source": DOUBLE, "args": [{"ref": "b"}]},
                {"name": "b", "source": DOUBLE, "args": [{"ref": "a"}]},
            ],
            ["wait for each other in a circle", "('a')", "('b')"],
            id="references in a circle",
        ),
        pytest.param(
            [{"source": DOUBLE, "args": [{"ref": 5}]}], ["is no reference", "literal"], id="a reference that is no name"
        ),
        pytest.param(
            [{"name": "a", "prompt": "x"}, {"source": DOUBLE, "args": [{"ref": "a", "path": "0"}]}],
            ["starts with '/'"],
            id="a path that is no pointer",
        ),
        pytest.param(
            [{"name": "hot", "prompt": "go", "temperature": 3}],
            ["invalid_argument: tasks[0] ('hot').temperature must be at most 2, not 3"],
            id="a temperature of 3",
        ),
        pytest.param(
            [{"name": "a", "promt": "go"}],
            ["tasks[0] ('a') has no field 'promt' (did you mean 'prompt'?)"],
            id="an unknown field",
        ),
        pytest.param(
            [{"name": "a"}],
            ["exactly one of source, function, executable, prompt, messages; it has none"],
            id="no kind",
        ),
        pytest.param([{"source": DOUBLE, "prompt": "x"}], ["it has source and prompt"], id="two kinds"),
        pytest.param(
            [{"source": DOUBLE, "temperature": 1}], ["temperature has no effect on a task with source"], id="idle field"
        ),
        pytest.param(
            [{"prompt": "a", "backend": "scriptd"}], ["unknown backend 'scriptd' (did you mean"], id="backend"
        ),
        pytest.param(
            [{"name": "a", "prompt": "x"}, {"name": "a", "prompt": "y"}],
            ["tasks[1] ('a')", "this is the name of tasks[0]"],
            id="name",
        ),
        pytest.param(
            [{"prompt": "x", "name": "1 2"}], ["tasks[0] ('1 2').name must be letters, digits"], id="odd name"
        ),
        pytest.param([{"prompt": []}], ["prompt is an empty list"], id="no prompts"),
        pytest.param([{"executable": "/bin/echo", "mpi": True}], ["mpi needs ranks"], id="mpi without ranks"),
        pytest.param(
            [{"executable": "/bin/echo", "arguments": [{"a": 1}]}], ["takes texts and numbers"], id="argument"
        ),
        pytest.param(
            [{"executable": "x", "process_templates": [{"ranks": 1}], "ranks": 2}], ["contradict"], id="two layouts"
        ),
        pytest.param(
            [{"name": "a", "source": DOUBLE, "args": [{"ref": "a", "pth": "/x"}]}],
            ["tasks[0] ('a')", "unknown key 'pth' beside ref (did you mean 'path'?)", '{"literal": ...}'],
            id="a key beside ref",
        ),
        pytest.param(
            [{"name": "a", "source": DOUBLE, "args": [{"ref": "b"}]}],
            ["tasks[0] ('a'): unknown task 'b'. Valid: no other task yet."],
            id="a reference where there is no other task",
        ),
        pytest.param([], ["tasks must be a list of at least 1 item"], id="no tasks"),
    ],
)
async def test_a_call_is_refused_whole_with_what_is_wrong_and_what_is_valid(
    agent: Agent, tasks: list[dict[str, Any]], told: list[str]
) -> None:
    text = await agent.refusal("submit_tasks", session="session-1", tasks=tasks)
    assert all(part in text for part in told), text
    assert (await agent.call("list_tasks", session="session-1"))["total"] == 0
    await agent.call("submit_tasks", session="session-1", tasks=[{"prompt": "the session goes on"}])


async def test_unknown_arguments_tools_and_sessions_are_refused_with_the_nearest_name(agent: Agent) -> None:
    text = await agent.refusal("wait_tasks", session="session-1", timeout=5)
    assert text.startswith("unknown_argument: wait_tasks has no argument 'timeout' (did you mean 'timeout_s'?)")
    assert "did you mean 'submit_tasks'?" in await agent.refusal("submit_task", session="session-1")
    text = await agent.refusal("list_tasks", session="sesion-1")
    assert text.startswith("unknown_session: unknown session 'sesion-1' (did you mean 'session-1'?)")
    assert "list_sessions" in text
    assert await agent.refusal("submit_tasks", session="session-1") == (
        "invalid_request: give one of tasks=[...] to submit, retry=[names] to run again what failed, and "
        "reprioritize={name: priority}. Correct it "
        "and call submit_tasks again."
    )


async def test_a_path_is_checked_at_submission_where_the_result_is_there(agent: Agent) -> None:
    await agent.call("submit_tasks", session="session-1", tasks=[{"name": "ai", "prompt": ["a", "b"]}])
    await agent.call("wait_tasks", session="session-1")
    text = await agent.refusal(
        "submit_tasks", session="session-1", tasks=[{"source": DOUBLE, "args": [{"ref": "ai", "path": "/2"}]}]
    )
    assert "path '/2' leads nowhere" in text and "a list of length 2" in text


async def test_a_name_is_free_again_once_its_task_has_failed_and_means_the_new_one(agent: Agent) -> None:
    broken = {"name": "fit", "source": "def fit():\n    return 1 / 0"}
    await agent.call("submit_tasks", session="session-1", tasks=[broken])
    await agent.call("wait_tasks", session="session-1")
    text = await agent.refusal(
        "submit_tasks", session="session-1", tasks=[{"source": DOUBLE, "args": [{"ref": "fit"}]}]
    )
    assert "needs the result of fit, which ended FAILED" in text
    mended = {"name": "fit", "source": "def fit():\n    return 21"}
    after = {"name": "after", "source": DOUBLE, "args": [{"ref": "fit"}]}
    await agent.call("submit_tasks", session="session-1", tasks=[mended, after])
    assert await results(agent) == {"fit": 21, "after": 42}
    text = await agent.refusal("submit_tasks", session="session-1", tasks=[mended])
    assert "name is taken" in text


async def test_process_layouts_reach_the_backend() -> None:
    backend = ScriptedBackend(lambda spec, values: None)
    program = {"executable": "/bin/true"}
    async with open_agent(backend=backend) as agent:
        await agent.session()
        tasks = [
            {"source": DOUBLE, "args": [1]},
            {"source": DOUBLE, "args": [1], "process": True},
            {"source": DOUBLE, "args": [1], "cwd": "/tmp", "env": {"A": "1"}},
            program | {"ranks": 3, "env": {"A": "1"}},
            program | {"ranks": 2, "mpi": True},
            program | {"process_templates": [{"ranks": 1, "policy": {"gpu_affinity": [0]}}, {"ranks": 2}]},
            program | {"timeout_s": 5},
            program | {"ranks": 4, "ranks_per_node": 2},
            program | {"ranks": 4, "ranks_per_node": 2, "mpi": True},
            program | {"process_templates": [{"ranks": 2}], "ranks_per_node": 1},
        ]
        await agent.call("submit_tasks", session="session-1", tasks=tasks)
        await agent.call("wait_tasks", session="session-1")
    specs = [order.spec for order in backend.received]
    assert [spec.layout.mode for spec in specs] == [
        "native",
        "process",
        "process",
        "job",
        "job",
        "job",
        "process",
        *["job"] * 3,
    ]
    assert [spec.layout.ranks for spec in specs] == [0, 1, 1, 3, 2, 3, 1, 4, 4, 2]
    assert specs[2].layout.templates[0].cwd == "/tmp" and specs[3].layout.templates[2].env == {"A": "1"}
    assert specs[4].layout.pmi == "auto" and specs[5].layout.templates[0].gpu_affinity == (0,)
    assert specs[6].timeout_s == 5
    assert [spec.layout.ranks_per_node for spec in specs] == [*[None] * 7, 2, 2, 1]


async def test_a_number_of_ranks_on_a_node_without_ranks_is_refused(agent: Agent) -> None:
    tasks = [{"executable": "/bin/true", "ranks_per_node": 2}]
    text = await agent.refusal("submit_tasks", session="session-1", tasks=tasks)
    assert "ranks_per_node needs ranks, the number of processes, as in 4, or process_templates." in text


async def test_prompt_parameters_reach_the_backend() -> None:
    backend = ScriptedBackend(lambda spec, values: "")
    sampling = {
        **{"model": "m", "system_prompt": "s", "temperature": 0.5, "max_tokens": 7, "top_p": 0.9, "top_k": 4},
        "stop_sequences": ["."],
    }
    async with open_agent(backend=backend) as agent:
        await agent.session()
        await agent.call("submit_tasks", session="session-1", tasks=[{"prompt": "x", **sampling}])
    work: Any = backend.received[0].spec.work
    assert {name: getattr(work, name) for name in sampling} == sampling | {"stop_sequences": (".",)}
