"""What a pipeline asks a language model, and the faults that the model's server has in the middle of that."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from tests.faults.faults import Fault
from tests.faults.pipeline import Pipeline
from tests.faults.processes import ended
from tests.faults.steps import Step

__all__ = ["SIGNALS", "ask", "asked_in", "break_in_turn"]

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
_MANY = 3000
_ENDED_S = 60


async def ask(pipeline: Pipeline) -> None:
    """Have some answers, with which all later ones to the same prompts are compared."""
    asked = [_prompt(name) for name in ("one", "other")]
    await pipeline.record.submit(*asked)
    await pipeline.record.wait()
    await pipeline.record.look()
    pipeline.answers = [await pipeline.record.value(step.name) for step in asked]


def asked_in(rounds: int) -> dict[str, str]:
    """What is lost in so many rounds, with its cause."""
    names = range(1, rounds + 1)
    return {f"asked-{name}": "lost" for name in names} | {f"sum-asked-{name}": "upstream" for name in names}


def break_in_turn(name: str) -> Fault:
    """Each signal in a round of its own, in which the server is needed again; one that is stopped nobody but the
    service ends."""

    async def fault(pipeline: Pipeline) -> None:
        for number, by in enumerate(SIGNALS, 1):
            await _ask_for_more(pipeline, number)
            broken, victim = time.monotonic(), pipeline.world.one(name)
            os.kill(victim, by)
            await pipeline.record.ended(f"asked-{number}")
            pipeline.noticed_s.append(time.monotonic() - broken)
            async with asyncio.timeout(_ENDED_S):
                await ended(victim)
            await pipeline.record.ended(f"kept-{number}", f"behind-{number}")

    return fault


async def _ask_for_more(pipeline: Pipeline, number: int) -> None:
    """Returns when the server works on what takes it long; the rest is behind that, or needs its answer."""
    one, other = pipeline.answers
    asked, kept = f"asked-{number}", f"kept-{number}"
    await pipeline.record.submit(
        _prompt(asked, [f"Sample {sample}." for sample in range(_MANY)]),
        _prompt(kept, "one", retries=3, retry_delay_s=0, value=one),
        _prompt(f"behind-{number}", "other", retries=3, retry_delay_s=0, value=other),
        pipeline.steps.digest(f"sum-{asked}", Step({"name": asked}, None, ())),
        pipeline.steps.digest(f"sum-{kept}", Step({"name": kept}, one, ())),
    )
    await pipeline.record.running(asked)


def _prompt(name: str, prompt: Any = None, value: Any = None, **fields: Any) -> Step:
    """At a temperature of 0: the same prompt has the same answer."""
    request = {"name": name, "prompt": prompt or name, "temperature": 0, "max_tokens": 40, **fields}
    return Step(request, value, (), read=value is not None)
