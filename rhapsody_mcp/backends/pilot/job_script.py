"""The job script that becomes a pilot, and why it ended."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import msgspec

from rhapsody_mcp.backends.engine_process import last_lines
from rhapsody_mcp.backends.pilot.messages import PilotConfig
from rhapsody_mcp.schedulers.base import JobStatus

__all__ = ["job_script", "why_ended"]

_LOG_LINES, _LOG_CHARS = 5, 600


def job_script(config: PilotConfig, setup: Sequence[str], python: str) -> str:
    """A script of bash that runs the lines of `setup`, and then becomes the pilot, in the interpreter `python`."""
    return "\n".join(
        [
            "#!/bin/bash -l",
            *setup,
            "export SLURM_NO_KILL=set",
            f"export RHAPSODY_PILOT={shlex.quote(msgspec.json.encode(config).decode())}",
            *_check(python),
            f"exec {shlex.quote(python)} -P -m rhapsody_mcp.backends.pilot.pilot",
            "",
        ]
    )


def _check(python: str) -> list[str]:
    """Lines that end the job with a clear message where the node cannot run the pilot."""
    missing = (
        f"the interpreter {python} is not on this node, or has no rhapsody_mcp: install the package in a virtual "
        "environment that all nodes see, and start the service from there, or name its interpreter with python in "
        "scheduler (create_session)"
    )
    probe = f"{shlex.quote(python)} -P -c 'import rhapsody_mcp'"
    return [f"{probe} || {{ echo {shlex.quote(missing)}; exit 1; }}"]


def why_ended(job: str, status: JobStatus, log: Path, had_pilot: bool) -> str:
    """Why the job ended, with the end of its log. `had_pilot` is whether its pilot has reported."""
    told = last_lines(log, _LOG_LINES)[-_LOG_CHARS:]
    if not told and not had_pilot and status.nodes:
        told = (
            f"its log is empty, as where the nodes do not see {log.parent}: start the service with a state folder that "
            "all nodes see (rhapsody-mcp stdio --folder FOLDER)"
        )
    return f"job {job} of the allocation is {status.words}{f'; {told}' if told else ''}"
