"""One call of a provider of Parsl, in a thread, with the commands that the provider runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import anyio

from rhapsody_mcp.model.errors import SchedulerUnavailable
from rhapsody_mcp.schedulers.commands import CommandResult, run_command
from rhapsody_mcp.schedulers.parsl_kinds import ParslKind

__all__ = ["ParslCall", "make_known", "option_key"]

_Answer = TypeVar("_Answer")


class ParslCall:
    """Runs the provider's commands on the event loop: within the time limit, and with these variables.

    `options` stand in the job script, in the place of the same options from the provider. `last` is the result of the
    last command, which a provider may hide.
    """

    def __init__(
        self,
        kind: ParslKind,
        environment: Mapping[str, str],
        timeout_s: float,
        options: Sequence[str] = (),
    ) -> None:
        self.last: CommandResult | None = None
        self._kind, self._environment, self._timeout_s, self._options = kind, environment, timeout_s, options
        self._loop = asyncio.get_running_loop()
        self._command: asyncio.Task[Any] | None = None
        self._is_over = False

    async def run(self, work: Callable[[Any], _Answer], **arguments: Any) -> _Answer | None:
        """What `work` returns for a provider with these arguments; None where the last command failed.

        Raises SchedulerUnavailable. Commands that run end with this call, also where the call is canceled.
        """
        try:
            return await asyncio.to_thread(self._work, work, arguments)
        finally:
            self._is_over = True
            if self._command is not None:
                self._command.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({self._command})

    def _work(self, work: Callable[[Any], _Answer], arguments: Mapping[str, Any]) -> _Answer | None:
        from parsl.errors import ParslError

        try:
            return work(self._provider(arguments))
        except (ParslError, LookupError, ValueError, AttributeError) as error:
            if self.last is not None and self.last.exit_code != 0:
                return None
            raise SchedulerUnavailable(f"Parsl could not read the answer of {self._kind.title}: {error!r}.") from error

    def _provider(self, arguments: Mapping[str, Any]) -> Any:
        """A provider whose commands and job script go through this call."""
        from parsl.jobs.states import JobState

        module_name, _, class_name = self._kind.provider.partition(":")
        module = import_module(module_name)
        if self._kind.states:
            module.translate_table.update({word: JobState[state] for word, state in self._kind.states.items()})
        # our methods stand behind the provider's own, because LSF's provider calls those of its base class
        provider = type(class_name, (getattr(module, class_name), self._base()), {})
        return provider(launcher=_once_on_the_first_node(), **{**self._kind.arguments, **arguments})

    def _base(self) -> type:
        """A base class for a provider."""
        from parsl.providers.cluster_provider import ClusterProvider

        def execute_wait(provider: Any, command: str, timeout: int | None = None) -> tuple[int, str, str]:
            return self._execute(command)

        return type("Base", (ClusterProvider,), {"execute_wait": execute_wait})

    def _execute(self, command: str) -> tuple[int, str, str]:
        words = command.split()
        if self._options and (script := Path(words[-1])).is_file():
            self._use_own_options(script)
        self.last = asyncio.run_coroutine_threadsafe(self._run_command(command, words[0]), self._loop).result()
        return self.last.exit_code, self.last.stdout, self.last.stderr

    async def _run_command(self, command: str, name: str) -> CommandResult:
        if self._is_over:
            raise SchedulerUnavailable(f"the call of {self._kind.title} was given up.")
        self._command = asyncio.current_task()
        return await run_command(["/bin/sh", "-c", command], self._environment, within_s=self._timeout_s, name=name)

    def _use_own_options(self, script: Path) -> None:
        keys = {option_key(option, self._kind.same) for option in self._options}
        first, *lines = script.read_text().splitlines()
        own = [self._kind.prefix + option for option in self._options]
        script.write_text("\n".join([first, *own, *(line for line in lines if not self._is_in(line, keys)), ""]))

    def _is_in(self, line: str, keys: Collection[str]) -> bool:
        """Whether a line of a job script is one of these options."""
        option = line.removeprefix(self._kind.prefix)
        return option != line and option_key(option, self._kind.same) in keys


def _once_on_the_first_node() -> Any:
    """A launcher that runs the command of a job as it is."""
    from parsl.launchers.base import Launcher

    def unchanged(launcher: Any, command: str, *_: Any) -> str:
        return command

    return type("Unchanged", (Launcher,), {"__call__": unchanged})()


def make_known(provider: Any, job: str) -> Any:
    """Make a job known to a new provider; returns the status that the job keeps where the scheduler has no answer."""
    from parsl.jobs.states import JobState, JobStatus

    pending = JobStatus(JobState.PENDING)
    provider.resources[job] = {"job_id": job, "job_stdout_path": None, "job_stderr_path": None, "status": pending}
    return pending


def option_key(option: str, same: Mapping[str, str] = {}) -> str:
    """The name of an option, as in "-q" or "-l walltime": of two options with one name, a scheduler takes one."""
    flag, _, value = option.replace("=", " ", 1).partition(" ") if option.startswith("--") else option.partition(" ")
    resource = re.match(r" *(\w+)(=|$)", value) if flag in ("-l", "-W") else None
    return f"{flag} {resource[1]}" if resource and not resource[1].isdigit() else same.get(flag, flag)
