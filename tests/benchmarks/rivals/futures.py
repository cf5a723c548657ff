"""concurrent.futures: one machine, no state of tasks, no output of theirs."""

from __future__ import annotations

import subprocess
from concurrent.futures import ProcessPoolExecutor

from serving import no_op, serve


def program(_: int) -> None:
    subprocess.run(["true"], check=True, capture_output=True)


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        serve(
            {
                "functions": lambda count: [one.result() for one in [pool.submit(no_op, n) for n in range(count)]],
                "programs": lambda count: [one.result() for one in [pool.submit(program, n) for n in range(count)]],
            }
        )
