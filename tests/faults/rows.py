"""The table: what is broken, on what ground, and what may be lost by it. Whatever a row does not name must be DONE."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults import faults
from tests.faults.faults import Fault, jump, kill, kill_all, kill_runner
from tests.faults.grounds import (
    a_clock,
    a_disk_that_fails,
    a_limit_of_processes,
    a_small_disk,
    a_small_temporary_folder,
    nothing_special,
)
from tests.faults.pipeline import RUNNING
from tests.faults.printing import fill_disk_with_output, kill_service_while_tasks_print, watch_a_gigabyte
from tests.faults.prompts import SIGNALS, asked_in, break_in_turn
from tests.faults.world import Ground, World

__all__ = ["ROWS", "Row"]

_KILL, _TERM = signal.SIGKILL, signal.SIGTERM


@dataclass(frozen=True)
class Row:
    """`fails` are the tasks that must not be DONE, with their cause, and `may_fail` those that need not be; `beyond` is
    what is checked of this row alone.

    Rows with the same `line` share one in the table. `in_ci` rows take nine minutes together.
    """

    name: str
    fault: Fault
    fails: Mapping[str, str]
    backends: tuple[str, ...] = ("local",)
    may_fail: Mapping[str, str] = field(default_factory=dict)
    beyond: str = ""
    line: str = ""
    on: Callable[[World], Ground] = nothing_special
    settings: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 180
    in_ci: bool = True


_DRAGON = ("dragon",)
_VLLM = ("local", "vllm")
_NOTHING: dict[str, str] = {}
_SMALL = {"min_free_bytes": 0}  # else nothing is submitted before the disk is full


def _killed(
    part: str,
    fault: Callable[[str, signal.Signals], Fault],
    of: str,
    fails: Mapping[str, str],
    term_in_ci: bool = True,
    **more: Any,
) -> list[Row]:
    line = f"SIGKILL, SIGTERM of the {part}"
    return [
        Row(f"{by.name} of the {part}", fault(of, by), fails, line=line, in_ci=by is _KILL or term_in_ci, **more)
        for by in (_KILL, _TERM)
    ]


def _broken_in_turn(name: str) -> Row:
    """One service for all signals: each needs the server that was started after the one before."""
    signals = ", ".join(by.name for by in SIGNALS)
    return Row(
        f"{signals} of the {name}, in turn",
        break_in_turn(name),
        asked_in(len(SIGNALS)),
        backends=_VLLM,
        settings={"vllm_health_s": 1},
        limit_s=400,
    )


def _killed_in_stream(part: str) -> Row:
    return Row(
        f"SIGKILL of the {part} in a stream of short tasks",
        faults.kill_in_stream(part),
        _NOTHING,
        beyond="of the stream, what did not run to its end says so",
        line="SIGKILL of the service, keeper, host in a stream of short tasks",
    )


_TOGETHER = [
    ("service", "keeper"),
    ("keeper", "service"),
    ("service", "keeper", "launcher"),
    ("keeper", "host", "service"),
    ("service", "host"),
]


def _killed_together(*parts: str) -> Row:
    """All that can end Dragon's processes is gone, in this order."""
    return Row(
        f"SIGKILL of {', '.join(parts)}",
        kill_all(*parts),
        RUNNING,
        backends=_DRAGON,
        line=f"SIGKILL of {', '.join(parts)}, in this order, with Dragon",
    )


_CRASHED = {"held-1": "crashed", "sum-1": "upstream"}

ROWS = [
    *_killed("service", kill, "service", RUNNING),
    *_killed("bridge", kill, "bridge", _NOTHING),
    *_killed("keeper of Dragon", kill, "keeper", RUNNING, backends=_DRAGON),
    *_killed("launcher of Dragon", kill, "launcher", RUNNING, backends=_DRAGON, term_in_ci=False),
    *_killed("host in Dragon, its node's agent", kill, "host", RUNNING, backends=_DRAGON, term_in_ci=False),
    *_killed("fork server in Dragon", kill, "fork server", RUNNING, backends=_DRAGON, term_in_ci=False),
    *_killed("keeper without Dragon", kill, "keeper", RUNNING),
    *_killed("host without Dragon", kill, "host", RUNNING),
    *_killed("fork server without Dragon", kill, "fork server", RUNNING, term_in_ci=False),
    *_killed("worker", kill_runner, "held-1", _CRASHED),
    *_killed("worker in Dragon", kill_runner, "held-1", _CRASHED, backends=_DRAGON, term_in_ci=False),
    *_killed("rank", kill_runner, "ranks.0", {"ranks": "crashed"}),
    *_killed("rank in Dragon", kill_runner, "ranks.0", {"ranks": "crashed"}, backends=_DRAGON, term_in_ci=False),
    *_killed("program", kill_runner, "program", {"program": "crashed"}),
    *(_killed_together(*parts) for parts in _TOGETHER),
    *(_killed_in_stream(part) for part in ("service", "keeper", "host")),
    Row(
        "SIGKILL of the service while tasks print",
        kill_service_while_tasks_print,
        {**RUNNING, "talk": "lost", "talk-program": "lost"},
        beyond="what they had printed is there after the restart",
    ),
    _broken_in_turn("vLLM server"),
    _broken_in_turn("vLLM engine core"),
    Row("SIGSTOP of a worker", faults.stop_worker, _CRASHED, settings={"stall_s": 3}),
    Row(
        "Disk full",
        faults.fill_disk,
        _NOTHING,
        may_fail={"later-2": "error", "sum-2": "upstream", "sum-all": "upstream"},  # a result longer than fits
        on=a_small_disk,
        settings=_SMALL,
        beyond="a submission is refused in words meanwhile",
    ),
    Row(
        "Disk full, then SIGKILL of the service",
        faults.fill_disk_and_kill_service,
        RUNNING,
        on=a_small_disk,
        settings=_SMALL,
        beyond="a submission is refused in words meanwhile",
    ),
    Row(
        "Disk full of what a task prints, which is watched",
        fill_disk_with_output,
        _NOTHING,
        on=a_small_temporary_folder,
        settings=_SMALL,
        beyond="what there was room for can be read, and a line says that the rest is lost",
    ),
    Row(
        "Read-only state folder at the start",
        faults.read_only_at_start,
        RUNNING,
        on=a_small_disk,
        settings=_SMALL,
        beyond="the start is refused in words",
    ),
    Row(
        "State folder turns read-only",
        faults.read_only_below_service,
        RUNNING,
        on=a_disk_that_fails,
        settings=_SMALL,
        beyond="a submission is refused in words meanwhile",
    ),
    Row(
        "Corrupt pages of the ledger",
        faults.damage_page,
        RUNNING,
        beyond="refused in words, not changed; all is there once a copy is put back",
    ),
    Row(
        "Ledger from the future",
        faults.ledger_from_the_future,
        RUNNING,
        beyond="refused in words, not changed",
    ),
    Row("Clock a day ahead", jump(1), _NOTHING, on=a_clock),
    Row("Clock a day back", jump(-1), _NOTHING, on=a_clock),
    Row("Socket file removed", faults.remove_socket, _NOTHING, beyond="a new client reaches the same service"),
    Row("Port taken", faults.take_port, _NOTHING, beyond="`http` refuses, naming the port"),
    Row("Two services racing", faults.race, RUNNING, beyond="eight clients at once reach one service"),
    Row("Reply lost, call repeated", faults.lose_reply, _NOTHING),
    Row("Reply lost with the service, call repeated", faults.lose_reply_with_service, RUNNING),
    Row(
        "Result of 1 GB",
        faults.return_a_gigabyte,
        {"huge": "error", "weighed": "upstream"},
        beyond="refused by its limit; the service's memory stays",
    ),
    Row(
        "Result of 1 GB, allowed",
        faults.return_a_gigabyte,
        _NOTHING,
        settings={"max_result_bytes": None},
        beyond="another task hashes it; the service's memory stays",
    ),
    Row("1 GB on stdout, 1 GB on stderr", faults.print_a_gigabyte, _NOTHING, beyond="the service's memory stays"),
    Row(
        "1 GB on stderr, which `logs --follow` and an agent watch",
        watch_a_gigabyte,
        _NOTHING,
        beyond="they see the beginning, the end and what was left out; the memory of service and command stays",
    ),
    Row(
        "300 forks under a pids limit",
        faults.fork_300,
        _NOTHING,
        on=a_limit_of_processes,
        beyond="the limit was reached; that session's tasks fail alone",
    ),
    Row(
        "Unpicklable and huge values",
        faults.return_what_cannot_be_pickled,
        {"lock": "error", "trapped": "invalid"},
        beyond="an argument of 3 MB arrives whole, one longer than request_bytes is refused in words",
    ),
]
