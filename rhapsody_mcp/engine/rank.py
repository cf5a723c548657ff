"""The program for one rank of a task: it runs a function, or replaces itself by a program whose arguments are pickled
results.

    python -P -m rhapsody_mcp.engine.rank CONFIG

It runs under a supervisor, in the directory and with the variables of the task; in a Python of the user it is started
by `software/start.py`. Afterwards the file CONFIG.result holds the result of the function, or the reason why the
program could not start.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import msgspec

from rhapsody_mcp.engine.isolation import c_streams
from rhapsody_mcp.engine.isolation.edited_modules import skip_bytecode_of_recent_sources
from rhapsody_mcp.engine.isolation.sources import Sources
from rhapsody_mcp.engine.messages import FunctionResult, RankConfig
from rhapsody_mcp.engine.software.config import read_config
from rhapsody_mcp.engine.software.crossing import refuse_code
from rhapsody_mcp.engine.supervisor import CannotStart, exec_program, find_program
from rhapsody_mcp.engine.task.arguments import arguments_of
from rhapsody_mcp.engine.task.error_text import error_message
from rhapsody_mcp.engine.task.function_call import perform
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Call, Command, TaskRun
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import holds_code, load, version_here

__all__ = ["main", "read_config", "run"]


def main() -> NoReturn:
    run(sys.argv[1], read_config(sys.argv[1]))


def run(config_path: str, config: RankConfig) -> NoReturn:
    """Run the rank whose configuration was at this path."""
    path = Path(config_path)
    sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
    skip_bytecode_of_recent_sources()
    result = _result(config, Sources(str(path.parent / "sources")))
    _flush(sys.stdout)
    _flush(sys.stderr)
    c_streams.flush()
    (part := path.with_suffix(".part")).write_bytes(msgspec.json.encode(result))
    part.rename(path.with_suffix(".result"))
    os._exit(0 if result.cause is None else 1)


def _flush(stream: TextIO) -> None:
    with suppress(Exception):  # the function may have closed or replaced the stream
        stream.flush()


def _result(config: RankConfig, sources: Sources) -> FunctionResult:
    task_run, work = config.task_run, config.task_run.spec.work
    if isinstance(work, Command):
        return FunctionResult(None, Cause.INVALID, _exec_command(work, task_run))
    assert isinstance(work, Call)
    try:
        refuse_code(work, sys.executable, version_here(), config.python)
    except InvalidTask as error:
        return FunctionResult(None, Cause.INVALID, str(error))
    sys.path.insert(0, os.getcwd())
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a crash then loses no line
    c_streams.buffer_lines()
    result = perform(work, task_run.bindings, task_run.results_folder, sources, config.caps)
    is_mpi_alone = task_run.spec.layout.ranks > 1 and task_run.spec.layout.pmi is None and _ran_mpi_alone()
    atexit._run_exitfuncs()
    if result.cause is None:
        _finalize_mpi()
    exception = result.exception
    if config.python != version_here() and holds_code(exception):
        exception = b""  # its class is code that the Python of the session cannot read
    return msgspec.structs.replace(result, mpi_alone=is_mpi_alone, exception=exception)


def _ran_mpi_alone() -> bool:
    mpi = _initialized_mpi()
    return mpi is not None and mpi.COMM_WORLD.Get_size() == 1


def _finalize_mpi() -> None:
    """Do what mpi4py does at a normal exit of Python. A PMIx server kills the other ranks when one ends without it."""
    if (mpi := _initialized_mpi()) is not None and sys.modules["mpi4py"].rc.finalize is not False:
        mpi.Finalize()


def _initialized_mpi() -> Any:
    """The module mpi4py.MPI where the function has used it; else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _exec_command(work: Command, task_run: TaskRun) -> str:
    """Replace this process by the program. Returns only if that fails, with the reason."""
    env = dict(os.environ)
    try:
        program = find_program(work.executable, env, os.getcwd())
        arguments = arguments_of(work, task_run.bindings, load)
    except (InvalidTask, CannotStart) as error:
        return str(error)
    except BaseException as error:  # unpickling runs the user's own code
        return f"its arguments cannot be made of the results: {error_message(error)}"
    return exec_program(program, arguments, env)


if __name__ == "__main__":
    main()
