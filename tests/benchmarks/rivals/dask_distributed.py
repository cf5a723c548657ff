"""Dask distributed, a cluster on this machine."""

from __future__ import annotations

import subprocess

from dask.distributed import Client, LocalCluster
from serving import leave, no_op, serve


def program(_: int) -> None:
    subprocess.run(["true"], check=True, capture_output=True)


if __name__ == "__main__":
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1")
    with cluster, Client(cluster) as client:
        serve(
            {
                "functions": lambda count: client.gather(client.map(no_op, range(count), pure=False)),
                "programs": lambda count: client.gather(client.map(program, range(count), pure=False)),
            }
        )
    leave()
