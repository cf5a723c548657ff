"""Dragon's native pool, processes and process groups, without anything of ours."""

from __future__ import annotations

from typing import Any

from dragon.native.pool import Pool
from dragon.native.process import Process, ProcessTemplate
from dragon.native.process_group import ProcessGroup
from serving import leave, no_op, serve

_TRUE: dict[str, Any] = {"target": "true", "args": [], "stdout": Process.DEVNULL, "stderr": Process.DEVNULL}


def programs(count: int) -> None:
    processes = [Process(**_TRUE) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def job(ranks: int) -> None:
    group = ProcessGroup(restart=False, ignore_error_on_exit=True, pmi=None)
    for _ in range(ranks):
        group.add_process(1, ProcessTemplate(**_TRUE))
    group.init()
    group.start()
    group.join()
    group.close()


if __name__ == "__main__":
    pool = Pool(2)
    serve(
        {
            "functions": lambda count: [
                one.get() for one in [pool.apply_async(no_op, (number,)) for number in range(count)]
            ],
            "programs": programs,
            "job": job,
        }
    )
    pool.close()
    pool.join()
    leave()
