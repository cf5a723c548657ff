"""Parsl's HighThroughputExecutor."""

from __future__ import annotations

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider
from serving import leave, no_op, serve


def shell() -> str:
    return "true"


if __name__ == "__main__":
    executor = HighThroughputExecutor(
        label="htex",
        address="127.0.0.1",
        max_workers_per_node=2,
        cores_per_worker=1,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )
    with parsl.load(Config(executors=[executor], run_dir="runinfo", usage_tracking=0)):
        function, program = parsl.python_app(no_op), parsl.bash_app(shell)
        serve(
            {
                "functions": lambda count: [one.result() for one in [function(number) for number in range(count)]],
                "programs": lambda count: [one.result() for one in [program() for _ in range(count)]],
            }
        )
    leave()
