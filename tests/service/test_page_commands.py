"""`rhapsody-mcp dashboard` and `rhapsody-mcp report`."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from rhapsody_mcp.settings import Settings
from tests.services import OwnService

pytestmark = pytest.mark.anyio
TASKS: list[dict[str, Any]] = [
    {"name": "four", "source": "def f():\n    return 4"},
    {"name": "bad", "source": "def f():\n    raise ValueError('no convergence')"},
]


async def run_session(service: OwnService, name: str, *, close: bool = False) -> str:
    async with service.client() as client:
        await client.call_tool("create_session", {"name": name, "backends": ["local"]})
        await client.call_tool("submit_tasks", {"session": name, "tasks": TASKS})
        await client.call_tool("wait_tasks", {"session": name})
        if not close:
            return ""
        result = await client.call_tool("close_session", {"session": name})
        return str(result.content[0].text)  # type: ignore[union-attr]


@contextmanager
def dashboard(service: OwnService, session: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = service.command("dashboard", session, "--no-browser")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        try:
            yield running, running.stdout.readline().strip().removeprefix("The page is at ")
        finally:
            running.kill()


async def test_the_dashboard_is_served_for_as_long_as_its_command_runs(shared: OwnService) -> None:
    await run_session(shared, "looked-at")
    with dashboard(shared, "looked-at") as (running, address):
        page, _, fragment = address.partition("#")
        assert page.startswith("http://127.0.0.1:") and fragment == "session=looked-at"
        assert "<title>Rhapsody</title>" in httpx2.get(page, timeout=60).text
        sessions = httpx2.get(f"{page}sessions", timeout=60).json()["sessions"]
        assert {"session": "looked-at", "counts": {"DONE": 1, "FAILED": 1}} in sessions
        running.send_signal(signal.SIGTERM)
        assert await anyio.to_thread.run_sync(running.wait) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(page)


async def test_report_trace_and_picture_are_written(shared: OwnService, tmp_path: Path) -> None:
    await run_session(shared, "written")
    files = {name: tmp_path / f"written.{name}" for name in ("html", "json", "svg")}
    ran = shared.run("report", "written", "-o", files["html"], "--trace", files["json"], "--svg", files["svg"])
    assert (ran.returncode, ran.stderr) == (0, "") and str(files["html"]) in ran.stdout
    assert "no convergence" in files["html"].read_text(encoding="utf-8")
    events = json.loads(files["json"].read_bytes())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} == {"four", "bad"}
    assert files["svg"].read_text(encoding="utf-8").startswith("<svg")
    assert {stat.S_IMODE(file.stat().st_mode) for file in files.values()} == {0o600}


async def test_the_report_of_a_closed_session_is_kept(own: OwnService, tmp_path: Path) -> None:
    said = await run_session(own, "closed", close=True)
    assert "A report of it is kept: rhapsody-mcp report closed" in said
    ran = own.run("report", "closed", "-o", tmp_path / "closed.html")
    assert ran.returncode == 0, ran.stderr
    assert "no convergence" in (tmp_path / "closed.html").read_text(encoding="utf-8")
    ran = own.run("report", "closed", "--trace", tmp_path / "closed.json")
    assert ran.returncode == 1 and "closed" in ran.stderr and not (tmp_path / "closed.json").exists()


async def test_no_report_is_kept_where_the_settings_say_so(own: OwnService, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("keep_reports_days: 0\n", encoding="utf-8")
    assert Settings().keep_reports_days == 30
    assert own.run("service", "start", "--config", config).returncode == 0
    said = await run_session(own, "closed", close=True)
    assert "report" not in said
    ran = own.run("report", "closed", "-o", tmp_path / "closed.html")
    assert ran.returncode == 1 and "closed" in ran.stderr


async def test_a_report_that_cannot_be_written_is_said(shared: OwnService, tmp_path: Path) -> None:
    await run_session(shared, "unwritten")
    ran = shared.run("report", "unwritten", "-o", tmp_path / "nowhere" / "report.html")
    assert ran.returncode == 1 and "cannot be written: No such file or directory" in ran.stderr
    ran = shared.run("report", "unwriten")
    assert ran.returncode == 1 and "unwritten" in ran.stderr
