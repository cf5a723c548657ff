"""A model server whose model is scripted, with the APIs of OpenAI (chat completions, responses), Gemini and Anthropic.

Frameworks reach it through their own clients of these providers, so that the model is sent what a provider gets: the
schemas of the tools as the framework has bent them, and replies as the framework has cut them.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tests.frameworks.story import LAST_WORD, Call, Shown, Story

__all__ = ["ScriptedModel", "scripted_model", "tool_name"]


class ScriptedModel:
    """Tells a story, one call for each request, and keeps the tools that the first request had."""

    def __init__(self, story: Story) -> None:
        self.story, self.tools, self.problem = story, list[dict[str, Any]](), ""
        self._steps: Generator[Call, Shown, None] = story.tell()
        self._lock = threading.Lock()
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead the clients of the providers here."""
        address = f"http://127.0.0.1:{self.port}"
        openai = {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_BASE": f"{address}/v1", "OPENAI_API_KEY": "scripted"}
        google = {"GOOGLE_GEMINI_BASE_URL": address, "GOOGLE_API_KEY": "scripted", "GEMINI_API_KEY": "scripted"}
        return {**openai, **google, "ANTHROPIC_BASE_URL": address, "ANTHROPIC_API_KEY": "scripted"}

    def answer(self, request: dict[str, Any], streams: bool = False) -> dict[str, Any] | list[dict[str, Any]]:
        """The body of the answer; a list is streamed."""
        api = _api_of(request)
        with self._lock:
            tools = api.tools(request)
            call = self._next(api.shown(request)) if any(map(_is_ours, tools)) else None
            self.tools = self.tools or (tools if call is not None else [])
            tool = self._offered(call.tool) if call is not None else {}
        if streams or request.get("stream"):
            return api.streamed(call, tool)
        return api.answer(call, tool)

    def _next(self, shown: Shown) -> Call | None:
        try:
            return self._steps.send(shown) if self.story.calls else next(self._steps)
        except StopIteration:
            return None
        except AssertionError as error:
            self.problem = str(error)
            return None

    def _offered(self, name: str) -> dict[str, Any]:
        """The tool as the framework offers it: some put the server's name before its own."""
        (tool,) = [tool for tool in self.tools if re.fullmatch(rf"(.*_)?{name}", tool_name(tool))]
        return tool


def tool_name(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _is_ours(tool: dict[str, Any]) -> bool:
    """Assistants ask for other things too, as for the title of a chat."""
    return tool_name(tool).endswith("wait_tasks")


class _Api(NamedTuple):
    """How a provider is asked and answers; `streamed` gives the events of an answer."""

    tools: Callable[[dict[str, Any]], list[dict[str, Any]]]
    shown: Callable[[dict[str, Any]], Shown]
    answer: Callable[[Call | None, dict[str, Any]], dict[str, Any]]
    streamed: Callable[[Call | None, dict[str, Any]], list[dict[str, Any]]]


def _api_of(request: dict[str, Any]) -> _Api:
    if "contents" in request:
        return _Api(_gemini_tools, _gemini_shown, _gemini_answer, lambda call, tool: [_gemini_answer(call, tool)])
    if "input" in request:
        return _Api(_responses_tools, _responses_shown, _responses_answer, _responses_events)
    if "system" in request or any("input_schema" in tool for tool in _plain_tools(request)):
        return _Api(_plain_tools, _anthropic_shown, _anthropic_answer, _anthropic_events)
    return _Api(_plain_tools, _openai_shown, _openai_answer, _openai_chunks)


def _plain_tools(request: dict[str, Any]) -> list[dict[str, Any]]:
    return list(request.get("tools", []))


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


def _openai_message(call: Call | None, tool: dict[str, Any]) -> dict[str, Any]:
    if call is None:
        return {"role": "assistant", "content": LAST_WORD}
    function = {"name": tool_name(tool), "arguments": json.dumps(call.arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"call_{next(_ids)}", "type": "function", "index": 0, "function": function}],
    }


_ids = itertools.count()
_HEAD: dict[str, Any] = {"id": "chat_1", "created": 1, "model": "scripted"}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def _openai_answer(call: Call | None, tool: dict[str, Any]) -> dict[str, Any]:
    reason = "stop" if call is None else "tool_calls"
    choice = {"index": 0, "message": _openai_message(call, tool), "finish_reason": reason}
    return {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _USAGE}


def _openai_chunks(call: Call | None, tool: dict[str, Any]) -> list[dict[str, Any]]:
    head = {**_HEAD, "object": "chat.completion.chunk"}
    reason = "stop" if call is None else "tool_calls"
    return [
        {**head, "choices": [{"index": 0, "delta": _openai_message(call, tool), "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
        {**head, "choices": [], "usage": _USAGE},
    ]


# --- OpenAI's responses


def _responses_tools(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Codex has a namespace for each server."""
    groups = [(tool.get("tools", [tool]), tool) for tool in request.get("tools", [])]
    return [
        {**tool, **({"namespace": group["name"]} if tool is not group else {})}
        for tools, group in groups
        for tool in tools
    ]


def _responses_shown(request: dict[str, Any]) -> Shown:
    output = request["input"][-1].get("output", "") if isinstance(request["input"], list) else ""
    parts = [{"type": "input_text", "text": output}] if isinstance(output, str) else output
    return Shown(
        "\n".join(part.get("text", "") for part in parts), sum(part["type"] == "input_image" for part in parts)
    )


def _responses_answer(call: Call | None, tool: dict[str, Any]) -> dict[str, Any]:
    number = next(_ids)
    if call is None:
        text = {"type": "output_text", "text": LAST_WORD, "annotations": []}
        item = {"type": "message", "id": f"m{number}", "role": "assistant", "status": "completed", "content": [text]}
    else:
        item = {"type": "function_call", "id": f"f{number}", "call_id": f"c{number}", "name": tool_name(tool)}
        item |= {"arguments": json.dumps(call.arguments)} | {key: tool[key] for key in ("namespace",) if key in tool}
    head = {"id": f"r{number}", "object": "response", "created_at": 1, "model": "scripted", "status": "completed"}
    return {**head, "output": [item], "parallel_tool_calls": False, "tool_choice": "auto", "tools": []}


def _responses_events(call: Call | None, tool: dict[str, Any]) -> list[dict[str, Any]]:
    answer = {**_responses_answer(call, tool), "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}}
    done = {"type": "response.output_item.done", "output_index": 0, "item": answer["output"][0]}
    return [
        {"type": "response.created", "response": answer},
        done,
        {"type": "response.completed", "response": answer},
    ]


# --- Anthropic


def _anthropic_shown(request: dict[str, Any]) -> Shown:
    said = [message for message in request["messages"] if message["role"] == "user"][-1]["content"]
    results = [part for part in said if part["type"] == "tool_result"] if isinstance(said, list) else []
    parts = [part for result in results for part in _as_parts(result["content"])]
    return Shown("\n".join(part.get("text", "") for part in parts), sum(part["type"] == "image" for part in parts))


def _as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _anthropic_answer(call: Call | None, tool: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "text", "text": LAST_WORD}
    use = (
        {"type": "tool_use", "id": f"toolu_{next(_ids)}", "name": tool_name(tool), "input": call.arguments}
        if call
        else None
    )
    head = {**_HEAD, "type": "message", "role": "assistant", "usage": {"input_tokens": 1, "output_tokens": 1}}
    return {**head, "content": [use or text], "stop_reason": "tool_use" if use else "end_turn", "stop_sequence": None}


def _anthropic_events(call: Call | None, tool: dict[str, Any]) -> list[dict[str, Any]]:
    answer = _anthropic_answer(call, tool)
    (block,) = answer["content"]
    if call is None:
        begun, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
    else:
        begun, delta = {**block, "input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    return [
        {"type": "message_start", "message": {**answer, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": begun},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": answer["stop_reason"], "stop_sequence": None},
            "usage": {"output_tokens": 1},
        },
        {"type": "message_stop"},
    ]


# --- Gemini


def _gemini_tools(request: dict[str, Any]) -> list[dict[str, Any]]:
    return [tool for group in request.get("tools", []) for tool in group.get("functionDeclarations", [])]


def _gemini_shown(request: dict[str, Any]) -> Shown:
    parts = request["contents"][-1]["parts"]
    inner = [part for part in parts for part in (part, *part.get("functionResponse", {}).get("parts", []))]
    texts = [part.get("text") or json.dumps(part.get("functionResponse", {}).get("response", "")) for part in parts]
    return Shown("\n".join(texts), sum("inlineData" in part for part in inner))


def _gemini_answer(call: Call | None, tool: dict[str, Any]) -> dict[str, Any]:
    part = {"text": LAST_WORD} if call is None else {"functionCall": {"name": tool_name(tool), "args": call.arguments}}
    candidate = {"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}
    return {"candidates": [candidate], "modelVersion": "scripted"}


# --- over HTTP


def _event(data: dict[str, Any]) -> str:
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data)}\n\n"


@contextmanager
def scripted_model(story: Story) -> Iterator[ScriptedModel]:
    """Serve the model on a port of loopback."""
    model = ScriptedModel(story)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = model.answer(request, "stream" in self.path)
            if isinstance(answer, list):
                self._send("text/event-stream", "".join(map(_event, answer)).encode())
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
