"""A notebook, run as people run it: what its cells show of a session and its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

OPEN = """
from pathlib import Path
from rhapsody_mcp.api import ComputeTask, ForEach, Session
from rhapsody_mcp.backends import LocalExecutionBackend

def fail(text):
    print("before the end")
    raise ValueError(text)

session = Session([LocalExecutionBackend(num_workers=1)])
"""
SUBMIT = """
good = ComputeTask(abs, args=(-7,), name="good")
bad = ComputeTask(fail, args=("</pre><script>alert(1)</script>",), name="bad")
until = ComputeTask(executable="sh", arguments=["-c", "while [ ! -e go ]; do sleep 0.05; done"], name="until")
sweep = ForEach([1, 2, 3], lambda item, _: ComputeTask(abs, args=(item,)), name="sweep")
await session.submit_tasks([until, good, bad, sweep])
"""
WAIT = """
import asyncio
await session.wait_tasks([good, bad, sweep])
while until.state == "QUEUED":
    await asyncio.sleep(0.01)
"""
GO = """
Path("go").touch()
with session.show_progress():
    await session.wait_tasks(session.tasks)
"""
END = "await session.close(); print(session.report('report.html'), session.trace('trace.json'), [session])"


def executed(folder: Path, *cells: str) -> list[list[nbformat.NotebookNode]]:
    """The outputs of each cell once all of them have run, as the file of the notebook keeps them."""
    form: Any = nbformat.v4
    notebook = form.new_notebook(cells=[form.new_code_cell(cell) for cell in cells])
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    nbformat.validate(notebook)
    return [cell.outputs for cell in notebook.cells]


def html_of(outputs: list[nbformat.NotebookNode]) -> str:
    (output,) = outputs
    html = str(output.data["text/html"])
    assert "<script" not in html
    return html


def test_a_session_and_its_tasks_show_themselves_and_what_became_of_them(tmp_path: Path) -> None:
    cells = [OPEN, "session", SUBMIT, WAIT, "session", "good", "bad", "sweep", "until", GO, END]
    _, first, _, _, again, good, bad, sweep, until, progress, end = executed(tmp_path, *cells)

    for picture in map(html_of, (first, again, progress)):
        assert "<svg" in picture and "session.0001</b> (closed)" in picture
        assert "DONE 5" in picture and "FAILED 1" in picture and "RUNNING" not in picture
        assert "<b>1 FAILED (error)</b>: ValueError: &lt;/pre&gt;&lt;script&gt;" in picture

    assert "<td" in html_of(good) and "7</pre>" in html_of(good)
    assert "in fail" in html_of(bad) and "before the end" in html_of(bad) and "&lt;script&gt;" in html_of(bad)
    assert "DONE 3" in html_of(sweep) and "RUNNING" in html_of(until)

    (said,) = end
    assert said.text == "report.html trace.json [<Session session.0001 (closed): 5 DONE, 1 FAILED>]\n"
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "sweep[2]" in report and "<script>alert" not in report
    assert "sweep[2]" in (tmp_path / "trace.json").read_text(encoding="utf-8")
