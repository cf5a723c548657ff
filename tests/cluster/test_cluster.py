"""The simulated cluster itself: nodes of their own, and nothing left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing

OWNER = """
import sys
from tests.cluster.cluster import Cluster
with Cluster(1, number=int(sys.argv[1])):
    print("started", flush=True)
    sys.stdin.read()
"""


def test_each_node_has_a_name_and_a_tmp_of_its_own_and_sees_the_shared_folder(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.shared / "note").write_text("seen\n")
    for node in cluster.nodes:
        shown = cluster.run(
            *cluster.on(node, "sh", "-c", f"hostname; cat {cluster.shared}/note; ls {tmp_path} 2>&1 || :")
        )
        name, note, listing = shown.splitlines()
        assert (name, note) == (node, "seen")
        assert "No such file" in listing


def test_a_run_that_is_killed_leaves_no_cluster() -> None:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(1, number=int(os.environ.get("CLUSTER_ID", "0")) + 100)
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(cluster.number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "started\n"
        (holder,) = subprocess.run(
            ["pgrep", "-P", str(owner.pid)], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()
        watched = os.pidfd_open(int(holder))
        owner.send_signal(signal.SIGKILL)
    with os.fdopen(watched, "rb"):
        wait_for_end(watched)
    assert not cluster.folder.exists()
    assert f"brsim{cluster.number}" not in os.listdir("/sys/class/net")
    assert cluster.folder.name not in Path("/proc/mounts").read_text()
    commands = [read_command(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [
        command for command in commands if f"c{cluster.number}node" in command or str(cluster.folder) in command
    ]


def wait_for_end(pidfd: int) -> None:
    """Wait until the process ends, which need not be a child."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(60_000), "the cluster did not end within 60 s"


def read_command(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
