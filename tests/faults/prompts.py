"""What a pipeline asks a language model, where the fault is one of the server's."""

from __future__ import annotations

from typing import Any

from tests.faults.pipeline import Pipeline
from tests.faults.steps import Step

__all__ = ["ask", "ask_for_more"]

_MANY = 3000


async def ask(pipeline: Pipeline) -> None:
    """Have some answers, with which all later ones to the same prompts are compared."""
    asked = [_prompt(name) for name in ("one", "other")]
    await pipeline.record.submit(*asked)
    await pipeline.record.wait()
    await pipeline.record.look()
    pipeline.answers = [await pipeline.record.value(step.name) for step in asked]


async def ask_for_more(pipeline: Pipeline) -> None:
    """Returns when the server works on `asked`, which takes it long; the rest is behind that, or needs its answer."""
    one, other = pipeline.answers
    await pipeline.record.submit(
        _prompt("asked", [f"Sample {number}." for number in range(_MANY)]),
        _prompt("kept", "one", retries=3, retry_delay_s=0, value=one),
        _prompt("behind", "other", retries=3, retry_delay_s=0, value=other),
        pipeline.steps.digest("sum-asked", Step({"name": "asked"}, None, ())),
        pipeline.steps.digest("sum-kept", Step({"name": "kept"}, one, ())),
    )
    await pipeline.record.running("asked")


def _prompt(name: str, prompt: Any = None, value: Any = None, **fields: Any) -> Step:
    """At a temperature of 0: the same prompt has the same answer."""
    request = {"name": name, "prompt": prompt or name, "temperature": 0, "max_tokens": 40, **fields}
    return Step(request, value, (), read=value is not None)
