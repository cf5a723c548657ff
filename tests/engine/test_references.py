"""A task stands for its result wherever a pickler meets it; where it cannot, the submission is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from rhapsody_mcp.api import ComputeTask, ForEach, Part, Session
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.model.errors import InvalidTask

pytestmark = pytest.mark.anyio
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as of a program's own functions, in __main__


@pytest.fixture(scope="module")
async def session() -> AsyncIterator[Session]:
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        yield session


@dataclass
class Box:
    content: Any


def open_box(box: Box) -> Any:
    return box.content + 1


def keys(table: dict[Any, Any]) -> list[Any]:
    return sorted(table)


def add(a: Any, b: Any) -> Any:
    return a + b


def closure(held: Any) -> Callable[[], int]:
    return lambda: int(held["deep"][0]) + 5


def make(kind: str, one: ComputeTask) -> ComputeTask | ForEach:
    return {
        "field": lambda: ComputeTask(open_box, args=(Box(one),)),
        "part in a field": lambda: ComputeTask(open_box, args=(Box(Part(one)),)),
        "key": lambda: ComputeTask(keys, args=({one: 1},)),
        "partial": lambda: ComputeTask(functools.partial(add, one), args=(3,)),
        "closure": lambda: ComputeTask(closure({"deep": (one,)})),
        "for_each": lambda: ForEach([1, 2], lambda item, _: ComputeTask(functools.partial(add, one), args=(item,))),
    }[kind]()  # type: ignore[no-untyped-call, return-value]


@pytest.mark.parametrize(
    ("kind", "right"),
    [("field", 2), ("part in a field", 2), ("key", [1]), ("partial", 4), ("closure", 6), ("for_each", [2, 3])],
)
async def test_it_stands_for_its_result_anywhere(session: Session, kind: str, right: Any) -> None:
    one = ComputeTask(abs, args=(-1,))
    task = make(kind, one)
    await session.submit_tasks([task, one])
    await session.wait_tasks([task], timeout=60)
    assert task.return_value == right, task.outcome


async def test_one_that_is_nowhere_is_refused_and_so_is_a_circle(session: Session) -> None:
    lost = ComputeTask(open_box, args=(Box(ComputeTask(abs, args=(1,))),))
    with pytest.raises(InvalidTask) as caught:
        await session.submit_tasks([lost])
    assert caught.value.uid == lost.uid
    first = ComputeTask(abs)
    second = ComputeTask(functools.partial(add, first), args=(1,))
    first.args = (second,)
    with pytest.raises(InvalidTask, match="wait for each other in a circle"):
        await session.submit_tasks([first, second])
    with pytest.raises(InvalidTask) as caught:
        ComputeTask(executable="echo", arguments=[["text", first]])
    assert caught.value.field == "arguments"


CACHED = """
import asyncio, functools
from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import LocalExecutionBackend

@functools.lru_cache(maxsize=40)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

async def main():
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        tasks = [ComputeTask(fib, args=(60,)), ComputeTask(fib.cache_parameters)]
        await session.submit_tasks(tasks)
        await session.wait_tasks(tasks, timeout=60)
        print(*(task.return_value or task.outcome.error for task in tasks))

asyncio.run(main())
"""


async def test_a_cached_function_of_a_program_runs(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(CACHED)
    import anyio

    found = await anyio.run_process([sys.executable, str(script)])
    assert found.stdout.decode().split(maxsplit=1)[0] == "1548008755920"


async def test_a_program_may_be_a_path(session: Session) -> None:
    task = ComputeTask(executable=Path("/bin/echo"), arguments=["found"])
    await session.submit_tasks([task])
    await session.wait_tasks([task], timeout=60)
    assert (task.executable, task.return_value) == ("/bin/echo", "found")
