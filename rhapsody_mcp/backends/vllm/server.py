"""Starts one vLLM server under a keeper, watches it, and ends it with all its processes."""

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
from rhapsody_mcp.backends.inference.openai_client import Answer, ChatServer, Conversation, RequestRefused, ServerLost
from rhapsody_mcp.backends.vllm.health import ENGINE_DIED, GONE, HealthWatch
from rhapsody_mcp.engine.process.liveness import is_stopped
from rhapsody_mcp.engine.process.tree import descendants, end
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.model.install_commands import vllm_install_command

__all__ = ["Launch", "VllmServer"]

_LAUNCHER = Path(__file__).parents[2] / "engine" / "vllm_launcher.py"
_POLL_S = 0.25
_STOP_GRACE_S = 6.0  # a ready server exits about 1 s after SIGTERM; during its start it may ignore SIGTERM
_KEEPER_EXTRA_S = 15.0  # how long the keeper may take beyond the grace
_EXIT_CODE_S = 1.5  # how long the keeper may take to return the exit code
_DEATH_WAIT_S = 2.0  # how long to wait, after a failed request, whether the server dies


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How to start a server: `python` runs vLLM's server with `arguments`, and its output goes to `log`."""

    python: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    port: int
    api_key: str
    log: Path


class VllmServer(ChatServer):
    """A vLLM server that this object starts and ends: its processes run from `start` to `stop`."""

    def __init__(self, launch: Launch, *, book: EngineBook | None = None, health_s: float = 5.0) -> None:
        super().__init__(f"http://127.0.0.1:{launch.port}/v1", launch.api_key)
        self.launch = launch
        self._mark, self._book, self._health_s = secrets.token_hex(8), book, health_s
        self._keeper: KeeperHandle | None = None
        self._exit: asyncio.Task[int] | None = None
        self._health_watch: HealthWatch | None = None
        self._health: asyncio.Task[str] | None = None
        self.has_answered = False

    async def start(self, timeout_s: float) -> None:
        """Start the server; return when it answers. The caller must call `stop`, also where this raises.

        Raises BackendUnavailable where the server ends or takes longer than `timeout_s`, and InvalidSettings where its
        log shows that another start would fail again.
        """
        began = time.monotonic()
        keeper = await self._start_keeper()
        self._exit = asyncio.create_task(keeper.wait())
        healthy = asyncio.create_task(self._until_healthy())
        try:
            await asyncio.wait({healthy, self._exit}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._exit.done():
                error = InvalidSettings if self._fails_again() else BackendUnavailable
                raise error(f"the vLLM server did not start: {self.last_words()}")
            if not healthy.done():
                waited = f"{time.monotonic() - began:.0f} s (server.start_timeout_s)"
                raise BackendUnavailable(f"the vLLM server was not ready after {waited}: {self.last_words()}")
            await healthy
        finally:
            healthy.cancel()
        await self.ask_models()
        self._health_watch = HealthWatch(self._address, keeper.pid, self._health_s)
        self._health = asyncio.create_task(self._health_watch.until_dead())

    @property
    def has_ended(self) -> bool:
        return self._exit is not None and self._exit.done()

    @property
    def is_dead(self) -> bool:
        """Whether the server has ended or counts as dead."""
        return self.has_ended or (self._health is not None and self._health.done())

    async def until_dead(self) -> str:
        """Wait until the server has ended or counts as dead, and return the reason in words.

        `stop` then ends the processes that are left.
        """
        assert self._exit is not None and self._health is not None, "it is watched after its start"
        await asyncio.wait({self._exit, self._health}, return_when=asyncio.FIRST_COMPLETED)
        server, why = f"the vLLM server on port {self.launch.port}", self._death_reason()
        if why == GONE:
            await asyncio.wait({self._exit}, timeout=_EXIT_CODE_S)
        if self._exit.done() or why is None or why == GONE:
            return f"{server} ended: {self.last_words()}"
        return (
            f"{server} counts as dead: {why}. {self.last_words() if why.startswith(ENGINE_DIED) else self._log_text()}"
        )

    def _death_reason(self) -> str | None:
        """The reason that the health watch has found; None where it has found none."""
        done = self._health is not None and self._health.done() and not self._health.cancelled()
        return self._health.result() if done and self._health is not None else None

    async def stop(self) -> None:
        """End the server and all its processes; a dead server without grace. A second call waits for the same end."""
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
            await asyncio.wait({exit_}, timeout=_STOP_GRACE_S + _KEEPER_EXTRA_S)
        keeper.kill()
        await exit_

    async def complete(self, parameters: dict[str, Any], conversations: Sequence[Conversation]) -> list[Answer]:
        try:
            answers = await super().complete(parameters, conversations)
        except (ServerLost, RequestRefused) as error:
            if isinstance(error, ServerLost) or error.status >= 500:
                await self._wait_for_death()
            raise
        self.has_answered = True
        return answers

    async def _wait_for_death(self) -> None:
        """Wait for the server's death for a while: its watcher then ends this request with a better reason."""
        if self._exit is not None and self._health is not None and self._health_watch is not None:
            self._health_watch.check_soon()
            ends = {self._exit, self._health}
            await asyncio.wait(ends, timeout=_DEATH_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            if self.is_dead:
                await asyncio.sleep(_DEATH_WAIT_S)  # the cancellation ends this sleep

    async def _start_keeper(self) -> KeeperHandle:
        launch = self.launch
        launch.log.unlink(missing_ok=True)  # the log of an earlier start
        keeper = KeeperHandle(self._mark, "vllm", launch.log.parent, self._book)
        name = ["--name", f"vllm-{launch.port}", "--log", str(launch.log)]
        await keeper.start(
            [*name, "--stop", "term", "--grace", str(_STOP_GRACE_S)],
            [launch.python, "-P", str(_LAUNCHER), *launch.arguments],
            {**launch.environment, **self._temporary_folders(), "VLLM_API_KEY": launch.api_key},
        )
        self._keeper = keeper
        return keeper

    def _temporary_folders(self) -> dict[str, str]:
        """The variables that put vLLM's temporary files into the log's folder, which is deleted: vLLM leaves some."""
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
                    pass  # the server does not listen yet
                await asyncio.sleep(_POLL_S)

    # --- what its log says

    @property
    def stage(self) -> str:
        """The stage of the start, in words."""
        log = self._read_log()
        return next((words for mark, words in _STAGES if mark in log), "starting Python and vLLM")

    def last_words(self) -> str:
        """The exit code (if the server has ended), the errors in the log, advice, and the end of the log, as a text."""
        log = self._read_log()
        code = self._exit.result() if self._exit is not None and self._exit.done() else None
        parts = [] if code is None else [_exit_text(code)]
        parts.append(_error_lines(log))
        parts += [advice for pattern, advice, _ in _ADVICE if re.search(pattern, log)][:1]
        end = " | ".join(line[:200] for line in _informative_lines(log)[-3:])
        return ". ".join(part.rstrip(". ") for part in parts if part) + f". Its log, {self.launch.log}, ends: {end}"

    def _log_text(self) -> str:
        return f"Its log is {self.launch.log}."

    def _fails_again(self) -> bool:
        log = self._read_log()
        return next((again for pattern, _, again in _ADVICE if re.search(pattern, log)), False)

    def _read_log(self) -> str:
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
        f"Install vLLM: {vllm_install_command(gpu=True)}, or without a GPU {vllm_install_command(gpu=False)}",
        True,
    ),
    (r"[Aa]ddress already in use", "Another program took the port meanwhile: choose another one", False),
)
"""Patterns of a log, each with advice, and with whether the same start would fail again."""


def _exit_text(code: int) -> str:
    return f"signal {code - 128} ended it" if code > 128 else f"it ended with exit code {code}"


def _error_lines(log: str) -> str:
    """The first and the last error in the log; without errors, its last five lines."""
    lines = _informative_lines(log)
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit): \S|.*: error: ", line)]
    shown = list(dict.fromkeys([errors[0], errors[-1]])) if errors else lines[-5:]
    return " | ".join(line[:500] for line in shown)


def _informative_lines(log: str) -> list[str]:
    """The informative lines of the log, without vLLM's prefix of process, level and time."""
    bare = (re.sub(r"^\(.*?\)\s+(\w+ [\d-]+ [\d:]+ \[.*?\] )?", "", line).strip() for line in log.splitlines())
    return [line for line in bare if line and not line.startswith("Route: ")]
