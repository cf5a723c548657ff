"""Pictures and tables that functions and programs return, as an agent sees them."""

from __future__ import annotations

import base64
import io

import pytest
from mcp import MCPError
from mcp.types import BlobResourceContents, ImageContent
from PIL import Image

from rhapsody_mcp.toolsets.replies.base import REPLY_BYTES, size_of
from tests.journeys.travellers import IN_ONE_ERA, Traveller, rows_by_name

pytestmark = [pytest.mark.anyio, IN_ONE_ERA]

FIGURE = """
def plot():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4, 3), dpi=100)
    axes.plot([1, 4, 9])
    plt.show()
    return figure
"""
PNG = """
def draw(width):
    import io
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, 20), "red").save(buffer, format="PNG")
    return {"width": width, "picture": buffer.getvalue()}
"""
BROKEN = "def broken():\n    return b'\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\rIHDR\\0\\0\\0\\x1e\\0\\0\\0\\x07junk'"
SVG = 'def svg():\n    return b\'<svg width="8" height="9"><text>hello</text></svg>\''
PROGRAM = "import matplotlib.image as i, sys; i.imsave(sys.stdout.buffer, [[0.0, 1.0]], format='png')"
FRAME = """
def frame():
    import pandas

    return pandas.DataFrame({"rate": [x / 10 for x in range(2000)], "kind": ["a", "b"] * 1000})
"""
COUNTS = "def counts():\n    import pandas\n\n    return pandas.Series(['x', 'y', 'x']).value_counts()"
ARRAY = "def array():\n    import numpy\n\n    return numpy.arange(4_000_000.0).reshape(2000, 2000)"


def picture(agent: Traveller) -> tuple[str, Image.Image]:
    """The picture in the last reply, and its MIME type."""
    (block,) = (block for block in agent.replies[-1].content if isinstance(block, ImageContent))
    assert size_of(agent.replies[-1]) <= REPLY_BYTES
    return block.mime_type, Image.open(io.BytesIO(base64.b64decode(block.data)))


async def test_a_picture_comes_as_an_image_beside_what_it_is(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit(
        {"name": "plot", "source": FIGURE},
        {"name": "drawn", "source": PNG, "args": [{"item": True}], "for_each": [30, 5000]},
        {"name": "svg", "source": SVG},
        {"name": "program", "executable": "python", "arguments": ["-c", PROGRAM]},
    )
    rows = rows_by_name(await agent.wait())
    assert rows["plot"]["preview"] == "matplotlib picture 400x300; get_result shows it"
    assert "PNG picture 2x1" in rows["program"]["preview"]
    assert rows["drawn"]["result"][0]["picture"].startswith("PNG picture 30x20, ")

    shown = await agent.result("plot")
    assert picture(agent)[0] == "image/png" and picture(agent)[1].size == (400, 300)
    assert shown["preview"].startswith("PNG picture 400x300") and "untrusted output" in agent.texts[-1]
    await agent.result("drawn", path="/0/picture")
    assert picture(agent)[1].size == (30, 20)
    assert "with the path of a picture" in (await agent.result("drawn[0]") and agent.texts[-1])
    await agent.result("drawn[1]", path="/picture")
    assert picture(agent)[1].width == 1568 and "scaled down to a PNG picture 1568x6" in agent.texts[-1]
    program = await agent.result("program")
    assert picture(agent)[1].size == (2, 1) and "stdout" not in program
    read = await agent.client.read_resource(f"rhapsody://sessions/{agent.session}/tasks/drawn/result/1/picture")
    (blob,) = read.contents
    assert isinstance(blob, BlobResourceContents) and blob.mime_type == "image/png"
    assert Image.open(io.BytesIO(base64.b64decode(blob.blob))).size == (5000, 20)
    (vector,) = (await agent.client.read_resource(f"rhapsody://sessions/{agent.session}/tasks/svg/result")).contents
    assert isinstance(vector, BlobResourceContents) and vector.mime_type == "image/svg+xml"
    assert base64.b64decode(vector.blob).startswith(b"<svg")
    svg = await agent.result("svg")
    assert "<text>hello" in svg["result"] and "SVG picture 8x9" in agent.texts[-1]


async def test_a_broken_picture_is_told_in_words(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit({"name": "broken", "source": BROKEN})
    await agent.wait()
    assert (await agent.result("broken"))["preview"] == "PNG picture 30x7, 28 bytes"
    assert all(block.type == "text" for block in agent.replies[-1].content)
    assert "which cannot be shown: Pillow could not read it" in agent.texts[-1]
    with pytest.raises(MCPError, match="cannot be shown: Pillow could not read it"):
        await agent.client.read_resource(f"rhapsody://sessions/{agent.session}/tasks/broken/result")


async def test_tables_and_arrays_come_by_rows_with_their_shape(agent: Traveller) -> None:
    await agent.create("local")
    await agent.submit({"name": "frame", "source": FRAME}, {"name": "counts", "source": COUNTS})
    await agent.submit({"name": "array", "source": ARRAY})
    rows = rows_by_name(await agent.wait())
    assert "pandas.DataFrame of 2000 rows x 2 columns" in rows["frame"]["preview"]
    assert rows["frame"]["preview"].startswith("rate float64, kind ") and '[[0.0,"a"],' in rows["frame"]["preview"]
    assert "numpy.ndarray of shape (2000, 2000), dtype float64" in rows["array"]["preview"]

    frame = await agent.result("frame")
    assert frame["result"][:2] == [[0.0, "a"], [0.1, "b"]] and frame["total"] == 2000
    assert frame["columns"][0] == "rate float64" and "\ncolumns: rate float64, kind " in agent.texts[-1]
    assert f"rows 0 to {frame['next_start'] - 1}" in agent.texts[-1]
    assert (await agent.result("frame", start=-1))["result"] == [[199.9, "b"]]
    counts = await agent.result("counts")
    assert counts["result"] == [["x", 2], ["y", 1]] and counts["columns"][1] == "count int64"
    array = await agent.result("array", start=1, limit=1)
    assert array["result"][0][:2] == [2000.0, 2001.0] and array["result"][0][-1] == "... and 1980 more"
    assert array["total"] == 2000 and "shape (2000, 2000)" in agent.texts[-1]
