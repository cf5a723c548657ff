"""What a client has been told of the tasks that were accepted from it, and what must hold of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.faults.steps import Step, digest
from tests.faults.world import Client, World

__all__ = ["Record"]

_FINAL = ("DONE", "FAILED", "CANCELED")
_PAGE = 50
_BY_A_KILL = ("lost", "crashed", "upstream")


class Record:
    """Of one session. `problems` are sentences; there must be none."""

    def __init__(self, world: World, session: str, client: Client | None = None) -> None:
        self.world, self.session, self.client = world, session, client or world.client
        self.accepted: dict[str, Step] = {}
        self.ends: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self._digests: dict[str, str] = {}
        self._shown: set[str] = set()

    # --- what is done with a session

    async def submit(self, *steps: Step, key: str | None = None) -> None:
        """They are taken to be accepted once the reply says so; it is asked for until it comes."""
        requests = [step.request for step in steps]
        key = key or "-".join((steps[0].name, steps[-1].name))
        reply = await self.client.call("submit_tasks", session=self.session, tasks=requests, idempotency_key=key)
        self.accept(reply, *steps)

    def accept(self, reply: Mapping[str, Any], *steps: Step) -> None:
        first = int(reply["first"].removeprefix("task."))
        self.accepted |= {f"task.{number:06d}": step for number, step in enumerate(steps, first)}

    async def wait(self) -> None:
        """Until everything has ended."""
        while not (await self.client.call("wait_tasks", session=self.session))["ended"]:
            await self.look()

    async def ended(self, *names: str) -> None:
        """Until these have."""
        while names and not (await self.client.call("wait_tasks", session=self.session, tasks=list(names)))["ended"]:
            await self.look()

    async def running(self, name: str) -> None:
        """Until it is."""
        while name not in {row["name"] for row in await self._rows(state="RUNNING")}:
            await self.client.call("wait_tasks", session=self.session, tasks=[name], timeout_s=0.1)

    # --- what it is told

    async def look(self) -> Counter[str]:
        """Read the state of every task, and keep each end that is told. Gives how many are in which state."""
        self.world.meet()
        rows = await self._rows()
        self._shown |= {row["task"] for row in rows}
        parents = [row["name"] for row in rows if row["kind"] == "for_each" and "counts" in row]
        rows += [row for parent in parents for row in await self._rows(for_each=parent)]
        for row in rows:
            self._note(row)
        found = {row["task"] for row in rows}
        gone = {*self.accepted, *self.ends} - found
        self.problems += [f"{uid} was accepted and is not there any more" for uid in gone]
        return Counter(row["state"] for row in rows)

    async def _rows(self, **chosen: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        page: dict[str, Any] = {}
        while not page or page["has_more"]:
            after = {"cursor": page["next_cursor"]} if page else {}
            page = await self.client.call("list_tasks", session=self.session, limit=_PAGE, **chosen, **after)
            rows += page["tasks"]
        return rows

    def _note(self, row: dict[str, Any]) -> None:
        before = self.ends.get(row["task"])
        if before is not None and (before["state"], before.get("cause")) != (row["state"], row.get("cause")):
            self.problems.append(f"{row['task']} {row['name']} had ended as {_told(before)} and is {_told(row)}")
        if row["state"] in _FINAL:
            self.ends.setdefault(row["task"], row)

    async def read(self) -> None:
        """Read every result that there is, whole; one that was read before must be the same still."""
        for uid, step in self.accepted.items():
            if step.read and self.ends.get(uid, {}).get("state") == "DONE":
                self._compare(step, digest(await self.value(uid)))

    async def value(self, task: str) -> Any:
        """The whole result, read in pages."""
        page = await self.client.call("get_result", session=self.session, task=task)
        value = page.get("result")
        while "next_start" in page:
            page = await self.client.call("get_result", session=self.session, task=task, start=page["next_start"])
            value += page["result"]
        return value.removesuffix("\n") if isinstance(value, str) else value

    def _compare(self, step: Step, found: str) -> None:
        if found != digest(step.value):
            self.problems.append(f"{step.name} has a result that is not what it returned")
        if self._digests.setdefault(step.name, found) != found:
            self.problems.append(f"{step.name} has another result than before")

    # --- what must hold

    async def check(self, fails: Mapping[str, str], may_fail: Mapping[str, str]) -> list[str]:
        """The sentences that say what does not hold, when everything has ended.

        `fails` are those that must not be DONE, with the cause that they must have, and `may_fail` those that need
        not be.
        """
        await self.look()
        await self.read()
        for uid, step in self.accepted.items():
            end = self.ends.get(uid)
            if end is None:
                self.problems.append(f"{uid} {step.name} was accepted and has not ended")
                continue
            allowed = [fails.get(step.name), *([may_fail[step.name]] if step.name in may_fail else [])]
            self._check_end(step, end, allowed)
            self._check_runs(step, end)
        self.problems += [f"{uid} is there and was never accepted" for uid in self._shown - {*self.accepted}]
        return list(dict.fromkeys(self.problems))

    def _check_end(self, step: Step, end: Mapping[str, Any], allowed: Sequence[str | None]) -> None:
        """`allowed` are the causes that it may have; without one it is DONE."""
        cause = end.get("cause")
        if cause not in allowed and not (step.may_be_lost and cause in _BY_A_KILL):
            expected = " or ".join(other or "DONE" for other in allowed)
            self.problems.append(f"{step.name} is {_told(end)}, and should be {expected}")

    def _check_runs(self, step: Step, end: Mapping[str, Any]) -> None:
        for file in step.files:
            ran = self.world.runs_of(file)
            if ran > 1 + step.retries:
                told = f"{self.world.told_by(file)}, and is {_told(end)}"
                self.problems.append(f"{file} ran {ran} times, with {step.retries} retries: {told}")
            if end["state"] == "DONE" and not ran:
                self.problems.append(f"{file} is DONE and never ran")


def _told(row: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (row["state"], row.get("cause"), row.get("error"))))
