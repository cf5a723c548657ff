"""The program that runs a function in a process of its own, or becomes one whose arguments are pickled results.

    python -P -m rhapsody_mcp.engine.rank CONFIG

It runs where the task runs, with its variables, under a supervisor. What came of a function, or why there was nothing
to run, is in the file CONFIG.result afterwards.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from rhapsody_mcp.engine.arguments import arguments_of
from rhapsody_mcp.engine.call import Loop, perform
from rhapsody_mcp.engine.supervisor import Impossible, execute, find_program
from rhapsody_mcp.engine.wire import RankConfig, Result
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Call, Command, Order
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import load

__all__ = ["main"]


def main() -> NoReturn:
    path = Path(sys.argv[1])
    config = msgspec.msgpack.decode(path.read_bytes(), type=RankConfig)
    path.unlink()
    sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
    try:
        result = _result(config)
    except BaseException as error:  # as a worker tells of it: KeyboardInterrupt, GeneratorExit
        result = Result(None, Cause.ERROR, type(error).__name__)
    sys.stdout.flush()
    sys.stderr.flush()
    (part := path.with_suffix(".part")).write_bytes(msgspec.msgpack.encode(result))
    part.rename(path.with_suffix(".result"))
    os._exit(0 if result.cause is None else 1)


def _result(config: RankConfig) -> Result:
    order, work = config.order, config.order.spec.work
    if isinstance(work, Command):
        return Result(None, Cause.INVALID, _become(work, order))
    assert isinstance(work, Call)
    sys.path.insert(0, os.getcwd())
    return perform(work, order.bindings, order.folder, Loop(), config.caps.result_bytes)


def _become(work: Command, order: Order) -> str:
    """Returns why that could not be."""
    env = dict(os.environ)
    try:
        program = find_program(work.executable, env, os.getcwd())
        arguments = arguments_of(work, order.bindings, load)
    except (InvalidTask, Impossible) as error:
        return str(error)
    except Exception as error:  # unpickling runs the user's own code
        return f"its arguments cannot be made of the results: {type(error).__name__}: {error}"
    return execute(program, arguments, env)


if __name__ == "__main__":
    main()
