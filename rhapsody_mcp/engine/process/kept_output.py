"""Keeps what tasks had printed when their engine ends without its owner, who would have collected it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rhapsody_mcp.engine.task.output_files import CURRENT_TASK, STREAMS
from rhapsody_mcp.engine.task.start_log import read_places

__all__ = ["KeptOutput", "keep_output", "kept_outputs", "note_results_folder"]

_NOTE = "results"
"""A file in the folder of an engine: the limit of each output in bytes, and the folder with the results of its session.
"""
_KEPT = "kept-output"
"""A folder in that folder, with a folder for each engine that ended so."""


class KeptOutput(NamedTuple):
    """The outputs of a task: the path of each rank without its suffix, and the limit that they were under, in bytes."""

    paths: list[str]
    limit: int | None


def note_results_folder(engine_folder: Path, results_folder: str, limit: int | None) -> None:
    """Note where output is kept if the engine ends without its owner."""
    new = engine_folder / f"{_NOTE}.new"
    new.write_text(f"{limit or 0}\n{results_folder}")
    new.replace(engine_folder / _NOTE)


def keep_output(engine_folder: Path) -> None:
    """Move the output in the folder of an engine that has ended to the results of its session, if they are there."""
    with suppress(OSError, ValueError):  # no note, or one that was cut short
        _, results = _read_note(engine_folder)
        printed = [file for suffix in STREAMS for file in engine_folder.glob(f"p*.{suffix}") if file.stat().st_size]
        if not printed or not os.path.isdir(results):
            return
        kept = Path(results, _KEPT, engine_folder.name)
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in (engine_folder / _NOTE, *engine_folder.glob(f"p*.{CURRENT_TASK}"), *printed):
            shutil.move(file, kept / file.name)


def _read_note(folder: str | Path) -> tuple[int | None, str]:
    limit, _, results = Path(folder, _NOTE).read_text().partition("\n")
    return int(limit) or None, results


def kept_outputs(results_folder: str) -> dict[tuple[str, int], KeptOutput]:
    """Return the outputs that were kept, by uid and attempt."""
    root = Path(results_folder, _KEPT)
    there = {str(file.relative_to(root).with_suffix("")) for suffix in STREAMS for file in root.glob(f"*/p*.{suffix}")}
    kept: dict[tuple[str, int], KeptOutput] = {}
    for start, places in read_places(results_folder).items() if there else ():
        if (place := next(filter(there.__contains__, places), None)) is not None:
            paths = [str(root / place) for place in places]
            kept[start] = KeptOutput(paths, _limit_of((root / place).parent))
    return kept


def _limit_of(kept: Path) -> int | None:
    try:
        return _read_note(kept)[0]
    except (OSError, ValueError):  # it was cut short: the output itself was never over the limit by much
        return None
