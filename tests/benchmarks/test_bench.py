"""The benchmark runs and says what it measured; nothing here looks at a time. Its prompts are with vLLM's tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rhapsody_mcp.bench.runner import Size, run_bench

pytestmark = pytest.mark.anyio

TINY = Size(runs=1, functions=20, programs=2, same_prompts=0, other_prompts=0, tasks=2500, workers=20, idle_s=0.1)


@pytest.mark.ci
async def test_every_row_has_its_figures_in_the_table_the_json_and_the_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, chart = tmp_path / "figures.json", tmp_path / "chart.png"
    assert await run_bench(TINY, file, chart) == 0
    report = json.loads(file.read_text())
    shown = capsys.readouterr().out
    for figure in report["figures"]:
        assert figure["name"].split(" ")[0] in shown
        assert (
            figure["runs"] == 1 and 0 <= figure["ours"]["least"] <= figure["ours"]["median"] <= figure["ours"]["most"]
        )
        assert (figure["times"] is None) == (figure["limit"] is None)
    assert len(report["figures"]) == 20 and report["command"].startswith("rhapsody-mcp")
    assert "load" in report["before"] and "load" in report["after"]
    assert chart.read_bytes().startswith(b"\x89PNG")
