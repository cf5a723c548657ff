"""The metrics of the tasks of a process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from rhapsody_mcp.runtime.tasks import AITask, ForEach, Task, kind_of

__all__ = ["SessionMetrics", "task_metrics"]

_DURATIONS_S = (0.001, 0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216, 67_108_864)
"""The bounds that the semantic conventions give."""


class TaskMetrics:
    """The instruments, which all sessions share. Of a for_each, its tasks count.

    `rhapsody.tasks` is how many tasks are waiting, queued or running now, and how many have ended in each other state
    since this process started.
    """

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter("rhapsody_mcp.tasks")
        self.counts: Counter[str] = Counter()
        meter.create_observable_up_down_counter("rhapsody.tasks", [self._observe], "{task}", "Tasks in each state")
        self.queue_s = meter.create_histogram(
            "rhapsody.task.queue.duration",
            "s",
            "From the submission of a task to its start",
            explicit_bucket_boundaries_advisory=_DURATIONS_S,
        )
        self.execution_s = meter.create_histogram(
            "rhapsody.task.execution.duration",
            "s",
            "From the start of a task to its end",
            explicit_bucket_boundaries_advisory=_DURATIONS_S,
        )
        self.tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Tokens of prompts and of answers",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        """Called from the thread that exports."""
        return [Observation(count, {"rhapsody.task.state": state}) for state, count in list(self.counts.items())]


@lru_cache(maxsize=1)
def task_metrics(provider: MeterProvider) -> TaskMetrics:
    """The instruments of this provider."""
    return TaskMetrics(provider)


class SessionMetrics:
    """Counts and measures the tasks of one session."""

    def __init__(self, metrics: TaskMetrics) -> None:
        self._metrics, self._states = metrics, dict[str, str]()

    def note_change(self, task: Task) -> None:
        """The state of the task has changed."""
        if isinstance(task, ForEach):
            return
        counts, state = self._metrics.counts, task.counted_as.lower()
        if (before := self._states.pop(task.uid, None)) is not None:
            counts[before] -= 1
        counts[state] += 1
        if task.state.final:
            self._measure(task, state)
        else:
            self._states[task.uid] = state

    def _measure(self, task: Task, state: str) -> None:
        timing = task.timing
        if timing.started is not None and timing.queue_s is not None and timing.execution_s is not None:
            attributes = {
                "rhapsody.task.kind": kind_of(task),
                "rhapsody.backend.name": task.backend or "",
                "rhapsody.task.state": state,
            }
            self._metrics.queue_s.record(timing.queue_s, attributes)
            self._metrics.execution_s.record(timing.execution_s, attributes)
        if isinstance(task, AITask) and task.outcome is not None and (usage := task.outcome.usage) is not None:
            common = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": task.backend or ""}
            if task.what:
                common["gen_ai.request.model"] = task.what
            self._metrics.tokens.record(usage.prompt_tokens, {**common, "gen_ai.token.type": "input"})
            self._metrics.tokens.record(usage.completion_tokens, {**common, "gen_ai.token.type": "output"})
