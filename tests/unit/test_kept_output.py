"""What tasks had printed when their engine ended without its owner."""

from __future__ import annotations

from pathlib import Path

import msgspec

from rhapsody_mcp.backends.compute.crashes import kept_output
from rhapsody_mcp.engine.process.kept_output import keep_output, note_results_folder
from rhapsody_mcp.engine.task.start_log import log_start
from tests.unit.dispatching import job


def printed(folder: Path, *uids: str) -> list[list[str]]:
    runs = [msgspec.structs.replace(job(uid, 1), results_folder=str(folder), attempt=1) for uid in uids]
    return [[rank.stdout.text for rank in own] for own in kept_output(runs)]


def lose_engine(engine: Path, results: Path) -> None:
    """Two functions ran in one worker, the later one printed; a job of two ranks printed, too."""
    engine.mkdir()
    results.mkdir()
    note_results_folder(engine, str(results), None)
    (engine / "p1.out").write_text("of the later one")
    (engine / "p1.task").write_bytes(b"later\0\0")
    for uid in ("earlier", "later"):
        log_start(str(results), uid, 1, f"{engine.name}/p1")
    for rank in (0, 1):
        (engine / f"p{rank + 2}.out").write_text(f"of rank {rank}")
        log_start(str(results), "job", 1, f"{engine.name}/p{rank + 2}")


def test_the_output_of_a_worker_goes_to_the_function_that_it_ran_last(tmp_path: Path) -> None:
    results = tmp_path / "results"
    lose_engine(tmp_path / "engine", results)
    keep_output(tmp_path / "engine")
    assert printed(results, "earlier", "later", "job", "another") == [
        [],
        ["of the later one"],
        ["of rank 0", "of rank 1"],
        [],
    ]


def test_a_note_that_was_cut_short_does_not_keep_an_engine_from_being_swept(tmp_path: Path) -> None:
    results = tmp_path / "results"
    lose_engine(tmp_path / "engine", results)
    (tmp_path / "engine" / "results").write_text("")
    keep_output(tmp_path / "engine")
    assert printed(results, "later") == [[]]
