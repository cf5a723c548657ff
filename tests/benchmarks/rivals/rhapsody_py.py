"""rhapsody-py, the original, on its Dragon backend."""

from __future__ import annotations

import asyncio

from rhapsody.api import ComputeTask, Session
from rhapsody.backends import DragonExecutionBackend
from serving import leave, no_op, serve


async def main() -> None:
    loop = asyncio.get_running_loop()
    backend = await DragonExecutionBackend()
    session = Session(backends=[backend])

    async def run(tasks: list[object]) -> None:
        futures = await session.submit_tasks(tasks)
        await asyncio.gather(*futures)

    def wait(tasks: list[object]) -> None:
        asyncio.run_coroutine_threadsafe(run(tasks), loop).result()

    def job(ranks: int) -> None:
        layout: dict[str, object] = {"process_templates": [(ranks, {})]}
        wait([ComputeTask(executable="/bin/true", task_backend_specific_kwargs=layout)])

    await asyncio.to_thread(
        serve,
        {
            "functions": lambda count: wait([ComputeTask(function=no_op, args=(number,)) for number in range(count)]),
            "programs": lambda count: wait([ComputeTask(executable="/bin/true") for _ in range(count)]),
            "job": job,
        },
    )
    await session.close()


if __name__ == "__main__":
    asyncio.run(main())
    leave()
