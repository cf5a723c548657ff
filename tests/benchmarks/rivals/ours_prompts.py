"""rhapsody-mcp, on vLLM, from Python."""

from __future__ import annotations

import asyncio

from prompting import TOKENS, prompt
from serving import serve

from rhapsody_mcp.api import AITask, Session
from rhapsody_mcp.backends import DragonVllmInferenceBackend


async def main() -> None:
    loop = asyncio.get_running_loop()
    backend = await DragonVllmInferenceBackend(model="shipped", device="cpu")
    async with Session([backend]) as session:

        async def run(count: int) -> None:
            numbers = range(count)
            tasks = [AITask(prompt(number), max_tokens=TOKENS, temperature=1.0, seed=number) for number in numbers]
            await session.submit_tasks(tasks)
            await session.wait_tasks(tasks)
            assert all(task.state == "DONE" for task in tasks)

        def prompts(count: int) -> None:
            asyncio.run_coroutine_threadsafe(run(count), loop).result()

        await asyncio.to_thread(serve, {"prompts": prompts})


if __name__ == "__main__":
    asyncio.run(main())
