"""The times of a task: submission, start and end."""

from __future__ import annotations

from typing import Self

import msgspec

__all__ = ["Timing"]


class Timing(msgspec.Struct, frozen=True, gc=False):
    """Seconds since the epoch, in this order; all None until the task has ended.

    `started` is None if user code never ran: then the total time is queue time. After retries `started` is the last
    start: the earlier attempts are queue time too.
    """

    submitted: float | None = None
    started: float | None = None
    ended: float | None = None

    @classmethod
    def of(cls, submitted: float | None, started: float | None, ended: float | None) -> Self:
        """A timing from clocks that may disagree: the start is moved between submission and end."""
        if submitted is None or ended is None:
            return cls()
        ended = max(ended, submitted)
        return cls(submitted, None if started is None else min(max(started, submitted), ended), ended)

    @property
    def queue_s(self) -> float | None:
        if self.submitted is None or self.ended is None:
            return None
        return (self.ended if self.started is None else self.started) - self.submitted

    @property
    def execution_s(self) -> float | None:
        if self.ended is None:
            return None
        return 0.0 if self.started is None else self.ended - self.started

    @property
    def total_s(self) -> float | None:
        """Exactly the sum of `queue_s` and `execution_s`."""
        queue_s, execution_s = self.queue_s, self.execution_s
        return None if queue_s is None or execution_s is None else queue_s + execution_s
