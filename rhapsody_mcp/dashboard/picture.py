"""The task stream as an SVG picture."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from rhapsody_mcp.dashboard.spans import Spans
from rhapsody_mcp.dashboard.view import SessionView

__all__ = ["group_colors", "stream_svg"]

_COLORS = (
    *("#4e79a7", "#f28e2b", "#76b7b2", "#59a14f", "#b07aa1", "#edc948", "#9c755f", "#ff9da7", "#3d9bb3", "#a7b34e"),
    *("#7a6bc2", "#c96f9c", "#6b9e78", "#d2a35b", "#5b8fd0", "#8c8c3f", "#8a5fb0", "#4aa38f", "#937bb0", "#7f8fa6"),
)
"""As in the page, so that a group has one colour everywhere."""
_FAILED, _DIM, _LINE = "#d03b3b", "#5b6675", "#d9dde3"
_GUTTER, _AXIS, _LEGEND = 116, 20, 18
_BIN = 0.6
"""Spans that are narrower than so many pixels are put together."""
_MAX_LANES = 256
_GROUPS_SHOWN, _LABEL_CHARS = 8, 20
_TICKS = 6


class _Bar(NamedTuple):
    x: float
    width: float
    color: str


def group_colors(names: Sequence[str]) -> list[str]:
    """The colours of groups, as in the page: each by its name (FNV-1a of its UTF-16 code units), and no two alike while
    there are others."""
    taken: set[int] = set()
    colors = []
    for name in names:
        place = _hash(name) % len(_COLORS)
        while place in taken and len(taken) < len(_COLORS):
            place = (place + 7) % len(_COLORS)
        taken.add(place)
        colors.append(_COLORS[place])
    return colors


def _hash(name: str) -> int:
    units = name.encode("utf-16-le", "surrogatepass")
    digest = 2166136261
    for at in range(0, len(units), 2):
        digest = (digest ^ int.from_bytes(units[at : at + 2], "little")) * 16777619 & 0xFFFFFFFF
    return digest


def stream_svg(view: SessionView, width: int = 900, most_bars: int = 100_000) -> str:
    """The whole task stream of a session until now; `view` has caught up. Failed tasks are red.

    With more than about `most_bars` spans, near ones of a lane are put together; a bar takes some 25 bytes.
    """
    spans, now = view.spans, time.time()
    running = [task for task in view.running() if task.started is not None]
    running_lanes = spans.running_lanes(running, now)
    running_groups = [view.group_of(task) for task in running]
    colors = group_colors(spans.groups)
    lanes = spans.order()[:_MAX_LANES]
    known = [task.submitted or now for task in running] + ([] if spans.first is None else [spans.first])
    first = min(known, default=now)
    last = max([*(spans.ended[-1:]), *([now] if running else []), first + 1e-3])
    lane_height = max(2.0, min(18.0, 320 / max(1, len(lanes))))
    chart_height = lane_height * max(1, len(lanes))
    scale = (width - _GUTTER - 4) / (last - first)
    narrow = max(_BIN, len(lanes) * (width - _GUTTER) / most_bars)
    rows = {lane: number * lane_height for number, lane in enumerate(lanes)}
    height = chart_height + _AXIS + _LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" viewBox="0 0 {width} '
        f'{height:.0f}" style="font:11px system-ui,\'DejaVu Sans\',sans-serif;background:#fff" role="img">',
        f"<title>{escape(view.name)}: {len(spans)} runs of tasks in {len(lanes)} lanes, {len(running)} running</title>",
    ]
    bars = _bars(spans, colors, first, scale, narrow)
    placed = ((bar, row) for lane, row in rows.items() for bar in bars.get(lane, ()))
    parts += _paths(placed, lane_height)
    open_bars = list[tuple[_Bar, float]]()
    for task, lane, group in zip(running, running_lanes, running_groups, strict=True):
        if lane in rows:
            x = _GUTTER + ((task.started or now) - first) * scale
            open_bars.append((_Bar(x, max(1.0, _GUTTER + (last - first) * scale - x), colors[group]), rows[lane]))
    parts += _paths(open_bars, lane_height, ' fill-opacity="0.55"')
    parts += [*_labels(spans, lanes, lane_height), *_axis(width, chart_height, last - first, scale)]
    parts += [*_legend(spans, colors, chart_height + _AXIS + 12), "</svg>"]
    return "\n".join(parts)


def _bars(spans: Spans, colors: Sequence[str], first: float, scale: float, least: float) -> dict[int, list[_Bar]]:
    """The bars of each lane; of the narrow spans in a place, the longest gives the colour, or a failed one."""
    bars: dict[int, list[_Bar]] = {}
    narrow: dict[tuple[int, int], tuple[bool, float, int]] = {}
    for span in spans:
        x, wide = (span.started - first) * scale, (span.ended - span.started) * scale
        failed = span.state == "FAILED"
        if wide >= least:
            color = _FAILED if failed else colors[span.group]
            bars.setdefault(span.lane, []).append(_Bar(_GUTTER + x, wide, color))
            continue
        place = span.lane, int(x / least)
        narrow[place] = max(narrow.get(place, (False, -1.0, 0)), (failed, wide, span.group))
    for (lane, number), (failed, _, group) in sorted(narrow.items()):
        color = _FAILED if failed else colors[group]
        own = bars.setdefault(lane, [])
        x = _GUTTER + number * least
        if own and own[-1].color == color and abs(own[-1].x + own[-1].width - x) < 1e-6:
            own[-1] = _Bar(own[-1].x, own[-1].width + least, color)
        else:
            own.append(_Bar(x, least, color))
    return bars


def _paths(bars: Iterable[tuple[_Bar, float]], height: float, more: str = "") -> Iterator[str]:
    """The bars, each with the top of its lane, as one path for each colour."""
    tall = height - 1 if height > 3 else height
    paths = defaultdict[str, list[str]](list)
    for bar, y in bars:
        paths[bar.color].append(f"M{bar.x:.2f} {y:.1f}h{bar.width:.2f}v{tall:.1f}h-{bar.width:.2f}z")
    for color, path in paths.items():
        yield f'<path fill="{color}"{more} d="{"".join(path)}"/>'


def _labels(spans: Spans, lanes: Iterable[int], lane_height: float) -> Iterator[str]:
    every = max(1, round(12 / lane_height))
    for number, lane in enumerate(lanes):
        if number % every == 0:
            backend, node, kind, place = spans.lanes[lane]
            text = " ".join(filter(None, [node or backend, kind, str(place)]))[-_LABEL_CHARS:]
            y = number * lane_height + min(lane_height / 2 + 4, 12)
            yield f'<text x="2" y="{y:.1f}" fill="{_DIM}">{escape(text)}</text>'


def _axis(width: int, top: float, seconds: float, scale: float) -> Iterator[str]:
    yield f'<path d="M{_GUTTER} {top:.1f}H{width}" stroke="{_LINE}"/>'
    for number in range(_TICKS + 1):
        at = seconds * number / _TICKS
        anchor = "end" if number == _TICKS else "start"
        x = _GUTTER + at * scale
        yield f'<text x="{x:.1f}" y="{top + 14:.1f}" fill="{_DIM}" text-anchor="{anchor}">{at:.3g} s</text>'


def _legend(spans: Spans, colors: Sequence[str], y: float) -> Iterator[str]:
    for number, name in enumerate(spans.groups[:_GROUPS_SHOWN]):
        x = 2 + number * 110
        yield f'<rect x="{x}" y="{y - 9:.1f}" width="10" height="10" fill="{colors[number]}"/>'
        shown = name if len(name) <= 14 else f"{name[:13]}…"
        yield f'<text x="{x + 14}" y="{y:.1f}" fill="{_DIM}">{escape(shown)}</text>'
