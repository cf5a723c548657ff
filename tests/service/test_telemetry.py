"""The service sends spans, metrics and logs to a collector."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import anyio
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.agents import Caller
from tests.bare_client import COMMAND, call
from tests.services import OwnService, own_service
from tests.spans import kept_spans

pytestmark = pytest.mark.anyio

KINDS: dict[str, tuple[Any, str, str, str]] = {
    "/v1/traces": (ExportTraceServiceRequest, "resource_spans", "scope_spans", "spans"),
    "/v1/metrics": (ExportMetricsServiceRequest, "resource_metrics", "scope_metrics", "metrics"),
    "/v1/logs": (ExportLogsServiceRequest, "resource_logs", "scope_logs", "log_records"),
}


class Collector:
    """What has arrived, by path: the resource's attributes with each item."""

    def __init__(self) -> None:
        self.items: defaultdict[str, list[Any]] = defaultdict(list)
        self.services: set[str] = set()
        self._arrived = threading.Condition()

    def take(self, path: str, body: bytes) -> None:
        kind, resources, scopes, items = KINDS[path]
        with self._arrived:
            for resource in getattr(kind.FromString(body), resources):
                self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
                for scope in getattr(resource, scopes):
                    self.items[path] += getattr(scope, items)
            self._arrived.notify_all()

    def wait_for(self, holds: Callable[[], object]) -> None:
        with self._arrived:
            assert self._arrived.wait_for(holds, timeout=60), {path: len(items) for path, items in self.items.items()}

    def span(self, name: str) -> Any:
        return next((span for span in self.items["/v1/traces"] if span.name == name), None)


@contextmanager
def collector() -> Iterator[tuple[Collector, str]]:
    """One that listens on loopback, and its endpoint."""
    collected = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collected.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collected, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


async def run_program(service: OwnService) -> str:
    """What a program finds as its trace context."""
    async with service.client() as client:
        agent = Caller(client)
        await agent.call("create_session", backends=["local"])
        program = {"name": "shown", "executable": "sh", "arguments": ["-c", "echo $TRACEPARENT"]}
        await agent.call("submit_tasks", session="session-1", tasks=[program])
        await agent.call("wait_tasks", session="session-1")
        return str((await agent.call("get_result", session="session-1", task="shown"))["result"])


async def test_a_trace_leads_through_the_service_to_the_program_and_arrives_at_a_collector() -> None:
    with collector() as (collected, endpoint), own_service() as service, kept_spans() as spans:
        service.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_BLRP_SCHEDULE_DELAY": "50",
            "TRACEPARENT": "00-11111111111111111111111111111111-2222222222222222-01",
        }
        with spans.tracer.start_as_current_span("chat"):
            found = await run_program(service)
        await anyio.to_thread.run_sync(collected.wait_for, lambda: collected.span("task shown"))
        chat, sent = spans.named("chat"), spans.named("MCP send tools/call submit_tasks")
        made, task = collected.span("tools/call submit_tasks"), collected.span("task shown")
        execution = collected.span("execution")
        assert made.parent_span_id == spans.id_of(sent).to_bytes(8)
        assert task.parent_span_id == made.span_id and execution.parent_span_id == task.span_id
        assert chat.context is not None and task.trace_id == chat.context.trace_id.to_bytes(16)
        assert found.split("-")[1:3] == [task.trace_id.hex(), execution.span_id.hex()]
        entries = [json.loads(line) for line in service.paths.audit.read_text().splitlines()]
        (entry,) = [entry for entry in entries if entry.get("tool") == "submit_tasks"]
        assert (entry["trace_id"], entry["span_id"]) == (task.trace_id.hex(), made.span_id.hex())
        stopped = await anyio.to_thread.run_sync(service.run, "service", "stop", "--force")
        assert stopped.returncode == 0
        assert {"rhapsody.tasks", "rhapsody.task.execution.duration"} <= {
            m.name for m in collected.items["/v1/metrics"]
        }
        lines = [record.body.string_value for record in collected.items["/v1/logs"]]
        assert any(line.startswith("version ") for line in lines)
        assert collected.services == {"rhapsody-mcp"}


async def test_a_collector_that_is_not_there_stops_nothing() -> None:
    with own_service() as service:
        service.environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
        assert (await run_program(service)).startswith("00-")
        with anyio.fail_after(600):
            stopped = await anyio.to_thread.run_sync(service.run, "service", "stop", "--force")
        assert stopped.returncode == 0
        levels = [line.split()[2] for line in service.paths.log.read_text().splitlines() if " opentelemetry." in line]
        assert set(levels) <= {"ERROR"}


@pytest.mark.parametrize("end", ["end of stdin", signal.SIGTERM])
async def test_a_command_in_process_exports_to_its_console_and_keeps_stdout_for_the_protocol(
    end: str | signal.Signals,
) -> None:
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "console"}
    with anyio.fail_after(600), tempfile.TemporaryFile() as errors:
        async with await anyio.open_process(COMMAND, env=environment, stderr=errors) as server:
            await call(server, "create_session", backends=["local"])
            program = {"name": "shown", "executable": "sh", "arguments": ["-c", "echo $TRACEPARENT"]}
            await call(server, "submit_tasks", session="session-1", tasks=[program])
            await call(server, "wait_tasks", session="session-1")
            found = (await call(server, "get_result", session="session-1", task="shown"))["result"]
            assert server.stdin is not None
            await server.stdin.aclose() if end == "end of stdin" else server.send_signal(cast(signal.Signals, end))
            await server.wait()
        errors.seek(0)
        text = errors.read().decode()
    assert f'"span_id": "0x{found.split("-")[2]}"' in text
    assert '"service.name": "rhapsody-mcp"' in text
