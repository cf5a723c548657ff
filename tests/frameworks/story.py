"""What the scripted model does: a pipeline, a wait, a failure and its repair, a picture.

Each step is a tool call, and gets back what the framework showed the model of the reply.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LAST_WORD", "Call", "Shown", "Story"]

LAST_WORD = "arrived"

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
_PICTURE = f"""
def draw(numbers):
    import base64
    return base64.b64decode("{_PIXEL}")
"""
_SLOW = """
def simulate(count):
    import time
    time.sleep(6.5)
    return list(range(count))
"""
_PIPELINE = [
    {"name": "numbers", "source": _SLOW, "args": [10]},
    {"name": "total", "function": "builtins:sum", "args": [{"ref": "numbers"}]},
    {"name": "said", "executable": "/bin/echo", "arguments": ["the sum is", {"ref": "total"}]},
    {"name": "plot", "source": _PICTURE, "args": [{"ref": "numbers"}]},
]


@dataclass(frozen=True)
class Call:
    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """What the model reads of a reply: its text, and how many pictures."""

    text: str
    pictures: int = 0


@dataclass
class Story:
    """`seen` are the facts that the model could see; `calls` the names of the tools that it called."""

    seen: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def tell(self) -> Generator[Call, Shown, None]:
        session = "recipe"
        opened = yield self._call("create_session", name=session, backends=["local"])
        self._note_form(opened)
        submitted = yield self._call("submit_tasks", session=session, tasks=_PIPELINE)
        _expect(submitted, "4")
        yield from self._wait(session, r"the sum is 45")
        wrong = {"name": "share", "function": "operator:truediv", "args": [1, 0]}
        _expect((yield self._call("submit_tasks", session=session, tasks=[wrong])), "share")
        yield from self._wait(session, "ZeroDivisionError")
        yield self._call("submit_tasks", session=session, tasks=[{**wrong, "args": [1, 2]}])
        yield from self._wait(session, r"share.*0\.5")
        picture = yield self._call("get_result", session=session, task="plot")
        self.seen["pictures"] = "yes" if picture.pictures else "as text" if _PIXEL in picture.text else "no"
        refused = yield self._call("get_result", session=session, task="plott")
        _expect(refused, "plot")
        yield self._call("close_session", session=session, force=True)

    def _wait(self, session: str, expected: str) -> Generator[Call, Shown, None]:
        """Wait as a model does that has read the card: without a time, again until all have ended."""
        for _ in range(20):
            shown = yield self._call("wait_tasks", session=session)
            if re.search(r"All have ended|\"ended\": ?true|'ended': True", _unquoted(shown.text)):
                _expect(shown, expected)
                return
            _expect(shown, r"Not all have ended|ended\W+false|'ended': False")
        raise AssertionError(f"20 waits were not enough: {shown.text}")

    def _call(self, tool: str, **arguments: Any) -> Call:
        self.calls.append(tool)
        return Call(tool, arguments)

    def _note_form(self, opened: Shown) -> None:
        text = _unquoted(opened.text)
        forms = {
            "text": "recipe is open" in text,
            "structured": bool(re.search(r"[\"']session[\"']: ?[\"']recipe", text)),
        }
        self.seen["reply"] = " and ".join(form for form, is_there in forms.items() if is_there)
        assert self.seen["reply"], opened.text


def _unquoted(text: str) -> str:
    """The text without the quotes of JSON inside JSON."""
    return text.replace('\\"', '"')


def _expect(shown: Shown, pattern: str) -> None:
    assert re.search(pattern, _unquoted(shown.text), re.S), f"no {pattern!r} in {shown.text[:2000]}"
