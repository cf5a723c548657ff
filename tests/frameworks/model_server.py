"""A model server whose model is scripted: OpenAI's chat completions and responses, and Gemini's generateContent.

Frameworks reach it through their own clients of these providers, so that the model is sent what a provider gets: the
schemas of the tools as the framework has bent them, and replies as the framework has cut them.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.frameworks.story import LAST_WORD, Call, Shown, Story

__all__ = ["ScriptedModel", "scripted_model"]


class ScriptedModel:
    """Tells a story, one call for each request, and keeps the tools that the first request had."""

    def __init__(self, story: Story) -> None:
        self.story, self.tools, self.problem = story, list[dict[str, Any]](), ""
        self._steps: Generator[Call, Shown, None] = story.tell()
        self._has_begun = False
        self._lock = threading.Lock()
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead the clients of the providers here."""
        address = f"http://127.0.0.1:{self.port}"
        openai = {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_BASE": f"{address}/v1", "OPENAI_API_KEY": "scripted"}
        return {**openai, "GOOGLE_GEMINI_BASE_URL": address, "GOOGLE_API_KEY": "scripted"}

    def answer(self, request: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """The body of the answer; a list is streamed."""
        with self._lock:
            self.tools = self.tools or _tools(request)
            call = self._next(_shown(request))
            name = self._full_name(call.tool) if call is not None else ""
        if "contents" in request:
            return _gemini_answer(call, name)
        if "input" in request:
            return _responses_answer(call, name)
        if request.get("stream"):
            return _openai_chunks(call, name)
        return _openai_answer(call, name)

    def _next(self, shown: Shown) -> Call | None:
        try:
            if self._has_begun:
                return self._steps.send(shown)
            self._has_begun = True
            return next(self._steps)
        except StopIteration:
            return None
        except AssertionError as error:
            self.problem = str(error)
            return None

    def _full_name(self, tool: str) -> str:
        """The name that the framework gave the tool: some put the server's name before it."""
        (name,) = [name for name in map(_tool_name, self.tools) if name == tool or name.endswith(f"_{tool}")]
        return name


def _tool_name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool)["name"])


def _tools(request: dict[str, Any]) -> list[dict[str, Any]]:
    tools = request.get("tools", [])
    if "contents" in request:
        return [tool for group in tools for tool in group.get("functionDeclarations", [])]
    return list(tools)


def _shown(request: dict[str, Any]) -> Shown:
    if "contents" in request:
        return _gemini_shown(request)
    return _responses_shown(request) if "input" in request else _openai_shown(request)


# --- OpenAI's chat completions


def _openai_shown(request: dict[str, Any]) -> Shown:
    """The replies after the last call. Some frameworks put pictures into a message of the user."""
    messages = request["messages"]
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    texts, pictures = list[str](), 0
    for message in messages[last + 1 :]:
        content = message.get("content") or ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            pictures += part["type"] == "image_url"
            texts.append(part.get("text", ""))
    return Shown("\n".join(texts), pictures)


def _openai_message(call: Call | None, name: str) -> dict[str, Any]:
    if call is None:
        return {"role": "assistant", "content": LAST_WORD}
    function = {"name": name, "arguments": json.dumps(call.arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"call_{next(_ids)}", "type": "function", "index": 0, "function": function}],
    }


_ids = itertools.count()
_HEAD: dict[str, Any] = {"id": "chat_1", "created": 1, "model": "scripted"}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def _openai_answer(call: Call | None, name: str) -> dict[str, Any]:
    reason = "stop" if call is None else "tool_calls"
    choice = {"index": 0, "message": _openai_message(call, name), "finish_reason": reason}
    return {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _USAGE}


def _openai_chunks(call: Call | None, name: str) -> list[dict[str, Any]]:
    head = {**_HEAD, "object": "chat.completion.chunk"}
    reason = "stop" if call is None else "tool_calls"
    return [
        {**head, "choices": [{"index": 0, "delta": _openai_message(call, name), "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
        {**head, "choices": [], "usage": _USAGE},
    ]


# --- OpenAI's responses


def _responses_shown(request: dict[str, Any]) -> Shown:
    output = request["input"][-1].get("output", "") if isinstance(request["input"], list) else ""
    parts = [{"type": "input_text", "text": output}] if isinstance(output, str) else output
    return Shown(
        "\n".join(part.get("text", "") for part in parts), sum(part["type"] == "input_image" for part in parts)
    )


def _responses_answer(call: Call | None, name: str) -> dict[str, Any]:
    number = next(_ids)
    if call is None:
        text = {"type": "output_text", "text": LAST_WORD, "annotations": []}
        item = {"type": "message", "id": f"m{number}", "role": "assistant", "status": "completed", "content": [text]}
    else:
        arguments = json.dumps(call.arguments)
        item = {
            "type": "function_call",
            "id": f"f{number}",
            "call_id": f"c{number}",
            "name": name,
            "arguments": arguments,
        }
    head = {"id": f"r{number}", "object": "response", "created_at": 1, "model": "scripted", "status": "completed"}
    return {**head, "output": [item], "parallel_tool_calls": False, "tool_choice": "auto", "tools": []}


# --- Gemini


def _gemini_shown(request: dict[str, Any]) -> Shown:
    parts = request["contents"][-1]["parts"]
    inner = [part for part in parts for part in (part, *part.get("functionResponse", {}).get("parts", []))]
    texts = [part.get("text") or json.dumps(part.get("functionResponse", {}).get("response", "")) for part in parts]
    return Shown("\n".join(texts), sum("inlineData" in part for part in inner))


def _gemini_answer(call: Call | None, name: str) -> dict[str, Any]:
    part = {"text": LAST_WORD} if call is None else {"functionCall": {"name": name, "args": call.arguments}}
    candidate = {"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}
    return {"candidates": [candidate], "modelVersion": "scripted"}


# --- over HTTP


@contextmanager
def scripted_model(story: Story) -> Iterator[ScriptedModel]:
    """Serve the model on a port of loopback."""
    model = ScriptedModel(story)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = model.answer(request)
            if isinstance(answer, list):
                lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in answer]
                self._send("text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode())
            else:
                self._send("application/json", json.dumps(answer).encode())

        def _send(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        model.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield model
        server.shutdown()
        thread.join()
