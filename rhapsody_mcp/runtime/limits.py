"""Checks tasks and sessions against the limits in the settings of a server."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import platformdirs
from msgspec.structs import replace

from rhapsody_mcp.model.errors import InvalidRequest, InvalidTask, LimitExceeded
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.specs import Call, Command, Completion, Content, TaskSpec, parts_of
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Ref
from rhapsody_mcp.runtime.policy import Policy
from rhapsody_mcp.settings import Settings

__all__ = ["Limits", "SessionUsage"]

_TASK_OVERHEAD_BYTES = 2048
"""The memory that this process needs for a task, without arguments, output and result."""


class SessionUsage:
    """What the tasks of a session use of its limits; each task of a for_each counts.

    `open` counts the tasks that have not ended. `held_bytes` estimates the memory of all tasks in this process.
    """

    def __init__(self) -> None:
        self.tasks = self.open = self.prompts = self.tokens = self.held_bytes = 0
        self._code = b""

    def add(self, spec: TaskSpec) -> None:
        self.tasks += 1
        self.open += 1
        self.held_bytes += _spec_bytes(spec)
        if isinstance(spec.work, Completion):
            self.prompts += _answer_count(spec.work)
            self.tokens += _token_limit(spec.work)
        elif isinstance(spec.work, Call) and spec.work.code is not self._code:  # a for_each shares its code
            self._code = spec.work.code
            self.held_bytes += len(self._code)

    def forget(self, spec: TaskSpec, outcome: Outcome) -> None:
        """The task runs again: what it held of memory is counted anew with `add`."""
        self.held_bytes -= _spec_bytes(spec) + _outcome_bytes(outcome)

    def end(self, outcome: Outcome) -> None:
        self.open -= 1
        self.held_bytes += _outcome_bytes(outcome)


class Limits:
    """The limits of a server. `sessions` returns the usage of each open session; `folder` holds long results."""

    def __init__(
        self,
        settings: Settings,
        sessions: Callable[[], Sequence[SessionUsage]] = lambda: (),
        folder: Path | None = None,
    ) -> None:
        self.settings, self.policy = settings, Policy.of(settings)
        self._sessions = sessions
        self._folders = [folder or platformdirs.user_state_path("rhapsody-mcp"), Path(tempfile.gettempdir())]

    def admit(self, spec: TaskSpec) -> TaskSpec:
        """The spec with the server's limits in it. Raises InvalidTask for a task that may not run."""
        try:
            spec = self.policy.check(spec)
        except InvalidRequest as error:
            raise InvalidTask(str(error), field=error.field) from error
        if isinstance(spec.work, Completion):
            spec = replace(spec, work=self._bounded_completion(spec.work))
        if spec.layout.software.container and (runtime := self.settings.container_runtime):
            software = replace(spec.layout.software, runtime=runtime)
            spec = replace(spec, layout=replace(spec.layout, software=software))
        return replace(spec, timeout_s=self._timeout(spec.timeout_s))

    def _bounded_completion(self, work: Completion) -> Completion:
        max_tokens, max_session_tokens = self.settings.max_answer_tokens, self.settings.max_session_tokens
        for field in ("max_tokens", "n"):
            if max_session_tokens is not None and isinstance(getattr(work, field), Ref):
                raise InvalidTask(
                    f"{field} must be a number here, because the tokens of a session are limited "
                    f"({_setting('max_session_tokens')}).",
                    field=field,
                )
        if max_tokens is not None and _number(work.max_tokens) > max_tokens:
            raise InvalidTask(
                f"max_tokens is {work.max_tokens}; the most here is {max_tokens} ({_setting('max_answer_tokens')}).",
                field="max_tokens",
            )
        if work.max_tokens is None and max_session_tokens is not None:
            raise InvalidTask(
                "max_tokens must be given here, because the tokens of a session are limited "
                f"({_setting('max_session_tokens')}).",
                field="max_tokens",
            )
        return replace(work, most_tokens=max_tokens) if isinstance(work.max_tokens, Ref) else work

    def _timeout(self, requested_s: float | None) -> float | None:
        longest = self.settings.max_task_s
        if requested_s is not None and longest is not None and requested_s > longest:
            raise InvalidTask(
                f"timeout_s is {requested_s:g}; the most here is {longest:g} ({_setting('max_task_s')}).",
                field="timeout_s",
            )
        return requested_s or self._default_timeout()[0]

    def _default_timeout(self) -> tuple[float | None, _TimeSetting]:
        """The timeout in seconds of a task that names none, and the setting that gives this timeout."""
        default, longest = self.settings.default_task_s, self.settings.max_task_s
        if default is None or (longest is not None and longest < default):
            return longest, "max_task_s"
        return default, "default_task_s"

    def explain_timeout(self, outcome: Outcome, requested_s: float | None) -> Outcome:
        """The outcome; where the task ended by a timeout that it did not request, the error names the setting."""
        if outcome.cause is not Cause.TIMEOUT or requested_s is not None:
            return outcome
        return replace(outcome, error=f"{outcome.error} ({_setting(self._default_timeout()[1])}; it had no timeout_s)")

    # --- how much

    def refuse_session(self) -> None:
        """Raise LimitExceeded where no further session may be opened."""
        count, most = len(self._sessions()), self.settings.max_sessions
        if most is not None and count >= most:
            raise LimitExceeded(
                f"as many sessions are open as may be, {count} of {most} ({_setting('max_sessions')}): use one of "
                "them, or close one that is no longer needed (list_sessions, close_session).",
                "max_sessions",
            )

    def refuse_tasks(self, usage: SessionUsage, specs: Sequence[TaskSpec]) -> None:
        """Raise LimitExceeded where these tasks are too many for a session with this usage, or the disk is full."""
        self._refuse_full_disk()
        self.refuse_count(usage, len(specs))
        completions = [spec.work for spec in specs if isinstance(spec.work, Completion)]
        prompts, tokens = sum(map(_answer_count, completions)), sum(map(_token_limit, completions))
        self._refuse("max_session_prompts", _THIS_SESSION, usage.prompts, prompts, "prompts")
        self._refuse("max_session_tokens", _THIS_SESSION, usage.tokens, tokens, "tokens of answers")
        held = sum(session.held_bytes for session in self._sessions())
        codes = {id(spec.work.code): len(spec.work.code) for spec in specs if isinstance(spec.work, Call)}
        added = sum(codes.values()) + sum(map(_spec_bytes, specs))
        self._refuse("max_held_bytes", _ALL_SESSIONS, held, added, "bytes in memory")

    def refuse_count(self, usage: SessionUsage, count: int) -> None:
        """Raise LimitExceeded where `count` further tasks are too many for a session with this usage."""
        self._refuse("max_session_tasks", _THIS_SESSION, usage.tasks, count, "tasks")
        self._refuse(
            "max_open_tasks",
            _ALL_SESSIONS,
            sum(session.open for session in self._sessions()),
            count,
            "tasks that have not ended",
        )

    def _refuse(self, key: _CountSetting, scope: str, current: int, added: int, unit: str) -> None:
        most = getattr(self.settings, key)
        if most is not None and added and current + added > most:
            raise LimitExceeded(
                f"{scope} would have {current + added:,} {unit}, of which there are {current:,}; the most is {most:,} "
                f"({_setting(key)}). {_ALTERNATIVES[key]}.",
                key,
            )

    def _refuse_full_disk(self) -> None:
        for folder in self._folders:
            existing = next(place for place in (folder, *folder.parents) if place.exists())
            disk = os.statvfs(existing)
            free = disk.f_bavail * disk.f_frsize
            if free < self.settings.min_free_bytes:
                raise LimitExceeded(
                    f"{free:,} bytes are free on the disk of {folder}, and less than {self.settings.min_free_bytes:,} "
                    f"({_setting('min_free_bytes')}): nothing is submitted before there is more. Close sessions that "
                    "are no longer needed (their results are deleted), or have the person make room.",
                    "min_free_bytes",
                )


_TimeSetting = Literal["default_task_s", "max_task_s"]
_CountSetting = Literal[
    "max_session_tasks", "max_session_prompts", "max_session_tokens", "max_open_tasks", "max_held_bytes"
]
_THIS_SESSION, _ALL_SESSIONS = "this session", "all sessions together"
_NEW_SESSION = "Open another session for more (create_session)"
_ALTERNATIVES: dict[_CountSetting, str] = {
    "max_session_tasks": _NEW_SESSION,
    "max_session_prompts": _NEW_SESSION,
    "max_session_tokens": f"Lower max_tokens, or ask the person. {_NEW_SESSION}",
    "max_open_tasks": "Wait until some have ended (wait_tasks), or submit fewer at once",
    "max_held_bytes": "Pass large data as paths of files, or close a session that is no longer needed (close_session)",
}


def _setting(key: str) -> str:
    return f"{key} in the settings of this server"


# --- memory of tasks


def _answer_count(work: Completion) -> int:
    return max(1, len(work.prompts)) * (_number(work.n) or 1)


def _token_limit(work: Completion) -> int:
    return _answer_count(work) * _number(work.max_tokens)


def _number(value: int | Ref | None) -> int:
    return value if isinstance(value, int) else 0


def _spec_bytes(spec: TaskSpec) -> int:
    """The memory of a task, without its code."""
    work = spec.work
    if isinstance(work, Call):
        return _TASK_OVERHEAD_BYTES + 2 * len(work.arguments)  # as objects, and as messages
    if isinstance(work, Command):
        return _TASK_OVERHEAD_BYTES + 2 * sum(map(_content_chars, work.arguments))
    contents = [message.content for message in work.messages if not isinstance(message, Ref)]
    return _TASK_OVERHEAD_BYTES + 2 * sum(map(_content_chars, [*work.prompts, *contents, work.system_prompt or ""]))


def _content_chars(content: Content) -> int:
    return sum(len(part) for part in parts_of(content) if isinstance(part, str))


def _outcome_bytes(outcome: Outcome) -> int:
    return _held_bytes(outcome) + sum(map(_held_bytes, outcome.ranks))


def _held_bytes(ended: Outcome | RankOutcome) -> int:
    printed, value = len(ended.stdout.text) + len(ended.stderr.text), ended.value
    return printed if value is None else printed + len(value.data or b"") + len(value.preview)
