"""Dragon's Batch, a call for each task."""

from __future__ import annotations

from dragon.workflows.batch import Batch
from serving import leave, no_op, serve


def run(tasks: list[object]) -> None:
    for task in tasks:
        task.get()  # type: ignore[attr-defined]


if __name__ == "__main__":
    batch = Batch()
    serve({"functions": lambda count: run([batch.function(no_op, number) for number in range(count)])})
    batch.close()
    batch.join()
    leave()
