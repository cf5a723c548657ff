"""A trial of a PMI that takes too long says nothing of the PMI: it is tried again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rhapsody_mcp.engine.node import pmi
from rhapsody_mcp.engine.node.pmi import PmiProber


def test_a_trial_that_took_too_long_does_not_condemn_later_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def late_at_first(_: PmiProber, __: str, ___: str, within_s: float) -> str:
        tried.append(within_s)
        if len(tried) < 3:
            raise subprocess.TimeoutExpired("trial", within_s)
        return ""

    monkeypatch.setattr(pmi, "_inspect_in_subprocess", lambda: pmi._InstalledPmis({"pmix": "", "cray": "none here"}))
    monkeypatch.setattr(PmiProber, "_try", late_at_first)
    prober = PmiProber(str(tmp_path), [])
    first = prober.find("auto").result(60)
    assert first.pmi is None and "Submit the job again" in first.problem
    assert prober.find("auto").result(60).pmi == "pmix"
    assert tried == [60, 120, 60]
