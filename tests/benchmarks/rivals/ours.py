"""rhapsody-mcp, on Dragon, from Python."""

from __future__ import annotations

import asyncio
from functools import partial

from serving import no_op, serve

from rhapsody_mcp.api import ComputeTask, Session
from rhapsody_mcp.backends import DragonExecutionBackendV3


async def main() -> None:
    loop = asyncio.get_running_loop()
    async with Session([await DragonExecutionBackendV3(num_workers=2)]) as session:

        async def run(tasks: list[ComputeTask]) -> None:
            await session.submit_tasks(tasks)
            await session.wait_tasks(tasks)
            assert all(task.state == "DONE" for task in tasks)

        def wait(make: object, count: int) -> None:
            asyncio.run_coroutine_threadsafe(run(make(count)), loop).result()  # type: ignore[operator]

        def functions(count: int) -> list[ComputeTask]:
            return [ComputeTask(no_op, args=(number,)) for number in range(count)]

        def programs(count: int) -> list[ComputeTask]:
            return [ComputeTask(executable="true") for _ in range(count)]

        def job(ranks: int) -> list[ComputeTask]:
            layout: dict[str, object] = {"process_templates": [(ranks, {})]}
            return [ComputeTask(executable="true", task_backend_specific_kwargs=layout)]

        works = {"functions": functions, "programs": programs, "job": job}
        await asyncio.to_thread(serve, {name: partial(wait, make) for name, make in works.items()})


if __name__ == "__main__":
    asyncio.run(main())
