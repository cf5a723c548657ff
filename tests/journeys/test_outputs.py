"""What programs print as JSON, and the files that tasks leave, as parts of their results."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio import run_process
from mcp.types import BlobResourceContents, ImageContent, TextResourceContents
from PIL import Image

from tests.journeys.travellers import IN_ONE_ERA, Traveller, rows_by_name

pytestmark = [pytest.mark.anyio, IN_ONE_ERA]

SIMULATE = """
mkdir -p plots
echo '{"loss": 0.25, "steps": [1, 2]}' > result.json
python -c "from PIL import Image; Image.new('RGB', (30, 20)).save('plots/a.png')"
seq 20000 > long.log
echo done
"""
OUTPUTS = ["result.json", "plots/*.png", "*.log"]


async def test_what_a_program_prints_as_json_is_its_result(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit(
        {"name": "prog", "executable": "echo", "arguments": ['{"loss": 0.5,\n "of": [1]}'], "stdout": "json"},
        {"name": "twice", "source": "def f(x):\n    return 2 * x", "args": [{"ref": "prog", "path": "/loss"}]},
        {"name": "said", "executable": "echo", "arguments": ["loss {ref:prog/loss}"]},
        {"name": "long", "executable": "python", "arguments": ["-c", "print(list(range(100_000)))"], "stdout": "json"},
        {"name": "sum", "function": "builtins:sum", "args": [{"ref": "long"}]},
        {"name": "job", "executable": "sh", "arguments": ["-c", "echo $RHAPSODY_RANK"], "ranks": 2, "stdout": "json"},
    )
    rows = rows_by_name(await agent.wait())
    assert rows["prog"]["result"] == {"loss": 0.5, "of": [1]} and rows["twice"]["result"] == 1.0
    assert rows["said"]["result"] == "loss 0.5" and rows["sum"]["result"] == sum(range(100_000))
    assert rows["job"]["result"] == 0
    assert (await agent.result("prog", output="head"))["stdout"] == '{"loss": 0.5,\n "of": [1]}\n'
    assert (await agent.result("long", path="/99999"))["result"] == 99_999


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("step 1\n{}", "Expecting value at line 1, column 1. It begins: 'step 1"),
        ('{"a": 1,\n}', "at line 2, column 1"),
        ('{"a": NaN}', "NaN is no JSON; print null in its place"),
        ("", "is empty"),
        ("{}\n{}", "Extra data at line 2, column 1"),
        ("[" + "1, " * 500 + "x]", "There: '"),
    ],
)
async def test_output_that_is_no_json_fails_the_task_and_shows_where(agent: Traveller, printed: str, told: str) -> None:
    await agent.create("local")
    await agent.submit({"name": "prog", "executable": "printf", "arguments": ["%s", printed], "stdout": "json"})
    (failure,) = (await agent.wait())["failures"]
    assert failure["cause"] == "error" and told in (await agent.result("prog"))["error"]
    assert (await agent.result("prog", output="head")).get("stdout", "") == printed


async def test_the_files_that_a_task_leaves_are_parts_of_its_result(agent: Traveller, tmp_path: Path) -> None:
    await agent.create("local")
    read = "def read(path):\n    return path[-5:], open(path).read()"
    await agent.submit(
        {"name": "sim", "executable": "sh", "arguments": ["-c", SIMULATE], "cwd": str(tmp_path), "outputs": OUTPUTS},
        {
            "name": "twice",
            "source": "def f(x):\n    return 2 * x",
            "args": [{"ref": "sim", "path": "/files/result.json/loss"}],
        },
        {"name": "read", "source": read, "args": [{"ref": "sim", "path": "/files/result.json"}]},
        {"name": "head", "executable": "head", "arguments": ["-n1", {"ref": "sim", "path": "/files/long.log"}]},
        {"name": "whole", "source": "def f(sim):\n    return sorted(sim['files']['plots'])", "args": [{"ref": "sim"}]},
    )
    rows = rows_by_name(await agent.wait())
    assert rows["twice"]["result"] == 0.5 and rows["head"]["result"] == "1" and rows["whole"]["result"] == ["a.png"]
    assert '[".json","{' in rows["read"]["preview"]
    assert (
        '{"result":"done","files":{"result.json":"file, 32 bytes","plots":{"a.png":"PNG picture'
        in rows["sim"]["preview"]
    )
    await run_process(["rm", "-r", str(tmp_path)])  # what is kept are copies

    shown = await agent.result("sim")
    assert shown["result"]["result"] == "done" and "PNG picture 30x20" in shown["result"]["files"]["plots"]["a.png"]
    assert (await agent.result("sim", path="/files/result.json"))["result"].startswith('{"loss": 0.25')
    assert (await agent.result("sim", path="/files/result.json/steps"))["result"] == [1, 2]
    log = await agent.result("sim", path="/files/long.log", start=-6)
    assert log["result"] == "20000\n" and log["total"] == 108_894
    await agent.result("sim", path="/files/plots/a.png")
    (image,) = (block for block in agent.replies[-1].content if isinstance(block, ImageContent))
    assert Image.open(io.BytesIO(base64.b64decode(image.data))).size == (30, 20)
    assert "keys ['a.png']" in await agent.refusal(
        "get_result", session=agent.session, task="sim", path="/files/plots/b.png"
    )
    uri = f"rhapsody://sessions/{agent.session}/tasks/sim/result/files"
    (blob,) = (await agent.client.read_resource(f"{uri}/plots/a.png")).contents
    assert isinstance(blob, BlobResourceContents) and blob.mime_type == "image/png"
    (text,) = (await agent.client.read_resource(f"{uri}/result.json")).contents
    assert isinstance(text, TextResourceContents) and "0.25" in text.text


@pytest.fixture
def written_here() -> Iterator[None]:
    """For functions in workers, whose working directory is that of the server."""
    yield
    for path in Path().glob("out-?.txt"):
        path.unlink()


@pytest.mark.usefixtures("written_here")
async def test_each_task_of_a_sweep_and_each_kind_of_function_gives_out_its_files(
    agent: Traveller, tmp_path: Path
) -> None:
    await agent.create("local")
    write = "def write(n):\n    open(f'out-{n}.txt', 'w').write('x' * n)\n    return {n}"
    common = {"source": write, "args": [{"item": True}], "for_each": [1, 2], "outputs": ["out-{item}.txt"]}
    await agent.submit(
        {"name": "worker", **common},
        {"name": "process", **common, "cwd": str(tmp_path)},
        {
            "name": "sizes",
            "source": "def f(runs):\n    return [list(r['files']) for r in runs]",
            "args": [{"ref": "worker"}],
        },
        {
            "name": "each",
            "source": "def f(run):\n    return [open(path).read() for path in run['files'].values()]",
            "args": [{"item": True}],
            "for_each": {"ref": "worker"},
        },
        {"name": "third", "executable": "cat", "arguments": [{"ref": "worker", "path": "/1/files/out-2.txt"}]},
    )
    rows = rows_by_name(await agent.wait())
    assert rows["sizes"]["result"] == [["out-1.txt"], ["out-2.txt"]] and rows["each"]["result"] == [["x"], ["xx"]]
    assert rows["third"]["result"] == "xx"
    assert "result and 1 file" in rows["worker"]["result"][0] or "out-1.txt" in str(rows["worker"]["result"][0])
    assert (await agent.result("process", path="/1/files/out-2.txt"))["result"] == "xx"
    assert (await agent.result("worker[0]", path="/result"))["result"] == [1]


async def test_a_file_that_is_not_there_fails_the_task_and_names_those_that_are(
    agent: Traveller, tmp_path: Path
) -> None:
    await agent.create("local")
    run = {"executable": "sh", "arguments": ["-c", SIMULATE], "cwd": str(tmp_path)}
    await agent.submit({"name": "sim", **run, "outputs": ["plots/*.svg"]}, {"name": "dir", **run, "outputs": ["plots"]})
    await agent.wait()
    failed = await agent.result("sim")
    assert failed["cause"] == "error" and "matches 'plots/*.svg' of its outputs" in failed["error"]
    assert "plots/a.png" in failed["error"] and "result.json" in failed["error"]
    assert "plots is a folder: write plots/*" in (await agent.result("dir"))["error"]
    for pattern in ("/etc/passwd", "../x", ""):
        text = await agent.refusal("submit_tasks", session=agent.session, tasks=[{**run, "outputs": [pattern]}])
        assert "no pattern of files below the working directory" in text
