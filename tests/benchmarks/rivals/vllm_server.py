"""vLLM's own server, asked over HTTP, all prompts at once."""

from __future__ import annotations

import asyncio
import socket
import sys

import httpx
from prompting import MODEL, TOKENS, prompt, settle
from serving import leave, serve


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _wait_for(client: httpx.AsyncClient) -> None:
    while True:
        try:
            (await client.get("/health")).raise_for_status()
            return
        except httpx.HTTPError:
            await asyncio.sleep(0.2)  # nothing tells when it listens


async def _ask(client: httpx.AsyncClient, count: int) -> None:
    def body(number: int) -> dict[str, object]:
        messages = [{"role": "user", "content": prompt(number)}]
        return {"messages": messages, "max_tokens": TOKENS, "temperature": 1.0, "seed": number}

    answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body(number)) for number in range(count)))
    assert all(answer.json()["choices"] for answer in answers)


async def main() -> None:
    settle()
    port = _free_port()
    flags = ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill", "--disable-uvicorn-access-log"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL]
    server = await asyncio.create_subprocess_exec(*command, "--host", "127.0.0.1", "--port", str(port), *flags)
    loop = asyncio.get_running_loop()
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as client:
        await _wait_for(client)

        def prompts(count: int) -> None:
            asyncio.run_coroutine_threadsafe(_ask(client, count), loop).result()

        await asyncio.to_thread(serve, {"prompts": prompts})
    server.terminate()
    await server.wait()


if __name__ == "__main__":
    asyncio.run(main())
    leave()
