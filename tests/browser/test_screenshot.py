"""The picture of the README, from a real run: prompts on vLLM, functions and a job of ranks on Dragon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from playwright.async_api import Page

from tests.browser.sessions import call, local_session, served, shows

pytestmark = [pytest.mark.ci, pytest.mark.vllm, pytest.mark.anyio]
SIMULATE = """
import time

def simulate(number):
    end = time.time() + 0.15 + (number * 7 % 11) / 25
    while time.time() < end:
        sum(range(2000))
    if number in (17, 29):
        raise ValueError(f"no convergence after {number} steps")
    return number
"""
FIT = "def fit(number):\n    import time\n    time.sleep(0.3 + number / 10)\n    return number"
TASKS: list[dict[str, Any]] = [
    {"name": "draft", "prompt": "Write sample {item}.", "for_each": list(range(12)), "max_tokens": 400},
    {"name": "simulate", "source": SIMULATE, "args": [{"item": True}], "for_each": list(range(40))},
    {"name": "relax", "executable": "/bin/sleep", "arguments": ["2.5"], "ranks": 2, "after": ["draft"]},
    *({"name": f"fit-{number}", "source": FIT, "args": [number], "after": ["draft", "relax"]} for number in range(5)),
    {"name": "train", "source": "def train(a, b):\n    return a + b", "args": [{"ref": "fit-0"}, {"ref": "fit-4"}]},
]


async def wait(client: Client) -> None:
    while not (await call(client, "wait_tasks", session="pipeline", timeout_s=50))["ended"]:
        pass


async def test_the_page_shows_a_pipeline_of_inference_and_simulation(page: Page, pictures: Path) -> None:
    with served() as (address, dashboard):
        async with local_session(page, address) as client:
            await call(client, "create_session", name="pipeline", backends=["dragon", "vllm"], model="shipped")
            warm = [
                {"name": "warm", "prompt": "Begin.", "max_tokens": 1},
                {"name": "warm-up", "executable": "/bin/true"},
            ]
            await call(client, "submit_tasks", session="pipeline", tasks=warm)
            await wait(client)
            await call(client, "submit_tasks", session="pipeline", tasks=TASKS)
            await wait(client)
            await page.set_viewport_size({"width": 1180, "height": 1120})
            await page.goto(f"{dashboard}#session=pipeline")
            await shows(page, "#chips", "2 FAILED")
            await shows(page, "#legend", "simulate")
            await page.wait_for_selector("#charts .uplot")
            await page.get_by_role("button", name="Now", exact=True).click()
            for _ in range(2):
                await page.get_by_role("button", name="+", exact=True).click()
            await page.screenshot(path=pictures / "dashboard.png")
