"""The reply of `get_statistics`: rounded numbers for programs, and a few lines with a table for models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic.json_schema import SkipJsonSchema

from rhapsody_mcp.model.critical_path import CriticalPath, Step
from rhapsody_mcp.model.statistics import Measures, Spread, Statistics, Times, Tokens, Used
from rhapsody_mcp.runtime.tasks import tasks_text
from rhapsody_mcp.toolsets.replies.base import Reply
from rhapsody_mcp.toolsets.replies.formatting import counts_text, duration, limited_list, one_line
from rhapsody_mcp.toolsets.tooling.schemas import TYPE_ONLY

__all__ = ["SessionStatistics", "statistics_report", "statistics_text"]

_GROUPS_IN_DATA = 10
_GROUPS_IN_TEXT = 8
_NODES_IN_DATA = 64
_NODES_IN_TEXT = 8
_STEPS_IN_DATA = 20
_STEPS_IN_TEXT = 6
_COLUMNS = ["p50/p95/p99, seconds", "tasks", "failed", "queue", "execution", "total", "tasks/s"]


class SessionStatistics(Reply):
    # a docstring would go into the tool's schema; `ran` counts the tasks that started and ended, whose times these are
    session: Annotated[str, TYPE_ONLY]
    group: Annotated[str | None, TYPE_ONLY] = None
    total_tasks: Annotated[int, TYPE_ONLY]
    counts: Annotated[dict[str, int], TYPE_ONLY]
    ran: Annotated[int, TYPE_ONLY]
    times_s: SkipJsonSchema[dict[str, dict[str, float]] | None] = None
    makespan_s: SkipJsonSchema[float | None] = None
    idle_s: SkipJsonSchema[float | None] = None
    tasks_per_s: SkipJsonSchema[float | None] = None
    tokens: SkipJsonSchema[dict[str, float | None] | None] = None
    used: SkipJsonSchema[dict[str, Any] | None] = None
    busy: SkipJsonSchema[list[dict[str, Any]] | None] = None
    critical_path: SkipJsonSchema[dict[str, Any] | None] = None
    nodes: SkipJsonSchema[dict[str, int] | None] = None
    nodes_left_out: SkipJsonSchema[int | None] = None
    groups: Annotated[dict[str, dict[str, Any]], TYPE_ONLY]
    groups_left_out: SkipJsonSchema[int | None] = None
    replaced: SkipJsonSchema[int | None] = None
    allocation: SkipJsonSchema[dict[str, Any] | None] = None


def statistics_report(session: str, group: str | None, statistics: Statistics, replaced: int) -> SessionStatistics:
    """The data of the reply, with the slowest groups and the longest steps of the critical path."""
    groups = statistics["groups"]
    return SessionStatistics(
        session=session,
        group=group,
        total_tasks=statistics["summary"]["total_tasks"],
        counts=statistics["counts"],
        ran=statistics["ran"],
        groups={name: _group(groups[name]) for name in list(groups)[:_GROUPS_IN_DATA]},
        groups_left_out=max(0, len(groups) - _GROUPS_IN_DATA) or None,
        replaced=replaced or None,
        **(_ran(statistics) if statistics["ran"] else {}),
    )


def _ran(statistics: Statistics) -> dict[str, Any]:
    return {
        **_measures(statistics),
        "makespan_s": round(statistics["makespan"], 6),
        "idle_s": round(statistics["idle"], 6) or None,
        "busy": [
            {**busy, "share": round(busy["share"], 4), "seconds": round(busy["seconds"], 6)}
            for busy in statistics["busy"]
        ],
        "critical_path": _path(statistics["critical_path"]),
        "nodes": dict(list(statistics["nodes"].items())[:_NODES_IN_DATA]) or None,
        "nodes_left_out": max(0, len(statistics["nodes"]) - _NODES_IN_DATA) or None,
    }


def _measures(measures: Measures | Statistics) -> dict[str, Any]:
    return {
        "times_s": _times(measures["times"]),
        "tasks_per_s": _rate(measures["throughput"]),
        "tokens": _tokens(measures["tokens"]),
        "used": _used(measures["used"]),
    }


def _used(used: Used | None) -> dict[str, Any] | None:
    if used is None:
        return None
    peak = {"peak_memory_gb": round(used["peak_memory_bytes"] / 1e9, 3), "largest": used["largest"]}
    return {"cpu_seconds": round(used["cpu_s"], 3), **(peak if used["largest"] else {})}


def _group(measures: Measures) -> dict[str, Any]:
    counts = {"tasks": sum(measures["counts"].values()), "counts": measures["counts"], "ran": measures["ran"]}
    more = _measures(measures) if measures["ran"] else {}
    return {**counts, **{name: value for name, value in more.items() if value is not None}}


def _times(times: Times) -> dict[str, dict[str, float]]:
    """Times rounded to microseconds; the mean total stays the exact sum of the two other means."""
    rounded_times = {name: _spread(spread) for name, spread in _by_name(times).items()}
    rounded_times["total"]["mean"] = rounded_times["queue"]["mean"] + rounded_times["execution"]["mean"]
    return rounded_times


def _by_name(times: Times) -> dict[str, Spread]:
    return {"queue": times["queue"], "execution": times["execution"], "total": times["total"]}


def _spread(spread: Spread) -> dict[str, float]:
    numbers = ("mean", spread["mean"]), ("p50", spread["p50"]), ("p95", spread["p95"]), ("p99", spread["p99"])
    return {name: round(number, 6) for name, number in (*numbers, ("max", spread["max"]))}


def _rate(rate: float | None) -> float | None:
    return None if rate is None else float(f"{rate:.6g}")


def _tokens(tokens: Tokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {**tokens, "in_per_s": _rate(tokens["in_per_s"]), "out_per_s": _rate(tokens["out_per_s"])}


def _path(path: CriticalPath) -> dict[str, Any]:
    longest = _longest(path["steps"], _STEPS_IN_DATA)
    steps = [
        {
            "task": step["task"],
            "unsubmitted_s": round(step["unsubmitted"], 6),
            "queue_s": round(step["queue"], 6),
            "execution_s": round(step["execution"], 6),
        }
        for step in longest
    ]
    return {
        "seconds": round(path["seconds"], 6),
        "steps": steps,
        "steps_left_out": len(path["steps"]) - len(longest),
    }


def _longest(steps: Sequence[Step], count: int) -> list[Step]:
    """The longest steps, in the order of the path."""
    indices = sorted(range(len(steps)), key=lambda index: _seconds(steps[index]), reverse=True)[:count]
    return [steps[index] for index in sorted(indices)]


def _seconds(step: Step) -> float:
    return step["unsubmitted"] + step["queue"] + step["execution"]


# --- the text


def statistics_text(session: str, group: str | None, statistics: Statistics, replaced: int) -> str:
    """At most 15 lines that stand alone."""
    what = f"{one_line(group)} of {session}" if group else session
    what += f", without {tasks_text(replaced)} that others of the same name replaced" if replaced else ""
    head = f"{what}: {tasks_text(statistics['summary']['total_tasks'])} ({counts_text(statistics['counts'])})"
    if not statistics["ran"]:
        return f"{head}. None has run and ended yet."
    span = f"{duration(statistics['makespan'])} from the first submission to the last end"
    lines = [
        f"{head}, {span}{_idle_text(statistics)}.",
        _means(statistics),
        _rates(statistics),
        *_nodes_lines(statistics["nodes"]),
        f"Critical path: {_path_text(statistics['critical_path'], statistics['makespan'])}",
        *_table(_table_rows(statistics)),
    ]
    if (more := len(statistics["groups"]) - _GROUPS_IN_TEXT) > 0:
        lines.append(f"and {more} quicker groups; get_statistics with group=NAME shows one.")
    return "\n".join(lines)


def _idle_text(statistics: Statistics) -> str:
    """Empty where the session was idle for less than a hundredth of the time."""
    idle = statistics["idle"]
    text = f", {duration(idle)} of it between submissions, with nothing to do: busy shares leave that out"
    return text if idle > 0.01 * statistics["makespan"] else ""


def _means(statistics: Statistics) -> str:
    summary = statistics["summary"]
    return (
        f"Mean of the {statistics['ran']} that ran and ended: total {duration(summary['avg_total'])} = queue "
        f"{duration(summary['avg_queue'])} + execution {duration(summary['avg_execution'])}."
    )


def _rates(statistics: Statistics) -> str:
    throughput = statistics["throughput"]
    parts = [] if throughput is None else [f"{_plain(throughput)} tasks a second while they ran."]
    if (tokens := statistics["tokens"]) is not None:
        rates = f", a second {_plain(tokens['in_per_s'])} in and {_plain(tokens['out_per_s'])} out"
        timed = tokens["in_per_s"] is not None
        parts.append(f"Tokens: {tokens['prompt_tokens']} in, {tokens['completion_tokens']} out{rates * timed}.")
    if (used := _used(statistics["used"])) is not None:
        peak = ""
        if "largest" in used:
            memory, task = f"{used['peak_memory_gb']:g} GB of memory", one_line(used["largest"])
            peak = f", at most {memory} in one process tree ({task})"
        parts.append(f"Used: {_plain(used['cpu_seconds'])} CPU seconds{peak}.")
    parts += [
        f"{busy['backend']}: {busy['share']:.0%} of {busy['places']} {busy['of']} {_taken(busy['of'])}."
        for busy in statistics["busy"]
    ]
    return " ".join(parts)


def _taken(places: str) -> str:
    return "reserved" if places == "cores" else "busy"


def _nodes_lines(nodes: Mapping[str, int]) -> list[str]:
    counts = [f"{one_line(node)} {count}" for node, count in nodes.items()]
    return [f"Tasks by node: {limited_list(counts, _NODES_IN_TEXT)}."] if counts else []


def _path_text(path: CriticalPath, makespan: float) -> str:
    """As in `4.50 s of 5.00 s: gen 1.50 s > train 3.00 s (queue 1.00 s).`"""
    shown = _longest(path["steps"], _STEPS_IN_TEXT)
    left_out = len(path["steps"]) - len(shown)
    unsubmitted = sum(step["unsubmitted"] for step in path["steps"])
    apart = f", {duration(unsubmitted)} of it not submitted" if unsubmitted > 0.01 * path["seconds"] else ""
    longest = f", the {len(shown)} longest of its {len(path['steps'])} tasks" if left_out else ""
    return f"{duration(path['seconds'])} of {duration(makespan)}{apart}{longest}: {' > '.join(map(_step_text, shown))}."


def _step_text(step: Step) -> str:
    """The name and time of a step; a wait of at least a tenth of that time is named."""
    waits = {"not submitted": step["unsubmitted"], "queue": step["queue"]}
    long = [f"{name} {duration(seconds)}" for name, seconds in waits.items() if seconds >= 0.1 * _seconds(step) > 0]
    waited = f" ({', '.join(long)})" if long else ""
    return f"{one_line(step['task'])} {duration(_seconds(step))}{waited}"


def _table_rows(statistics: Statistics) -> list[list[str]]:
    groups = list(statistics["groups"].items())[:_GROUPS_IN_TEXT]
    total = [_row("all", statistics)] if len(groups) > 1 else []
    return [_COLUMNS, *total, *(_row(one_line(name), measures) for name, measures in groups)]


def _row(name: str, measures: Measures | Statistics) -> list[str]:
    counts = measures["counts"]
    spreads = [_percentiles(spread) if measures["ran"] else "-" for spread in _by_name(measures["times"]).values()]
    return [
        name,
        str(sum(counts.values())),
        str(counts.get("FAILED", 0)),
        *spreads,
        _plain(measures["throughput"]),
    ]


def _percentiles(spread: Spread) -> str:
    return "/".join(_plain(number) for number in (spread["p50"], spread["p95"], spread["p99"]))


def _plain(number: float | None) -> str:
    """About three significant digits."""
    if not number:
        return "-" if number is None else "0"
    digits = 5 if number < 0.01 else 3 if number < 10 else 1 if number < 1000 else 0
    return f"{number:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
