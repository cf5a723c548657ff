"""What the variables of OpenTelemetry set up in a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.trace import ProxyTracerProvider, get_tracer_provider

from rhapsody_mcp.serving import telemetry as module
from rhapsody_mcp.serving.telemetry import telemetry

PROGRAM = """
import logging, sys
from opentelemetry.trace import get_tracer
from rhapsody_mcp.serving.telemetry import telemetry

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
with telemetry():
    with get_tracer("test").start_as_current_span("work"):
        logging.warning("within%sthe span", chr(10))
    logging.warning("outside")
"""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def run_program(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )


def spans_in(text: str) -> Iterator[dict[str, object]]:
    """The spans that the console shows."""
    decoder = json.JSONDecoder()
    while text.strip():
        span, end = decoder.raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        yield span


def test_a_log_line_carries_the_ids_of_the_span_in_which_it_is_written() -> None:
    ended = run_program(OTEL_TRACES_EXPORTER="console")
    (span,) = spans_in(ended.stderr)
    context = span["context"]
    assert isinstance(context, dict)
    ids = f"trace_id={context['trace_id'][2:]} span_id={context['span_id'][2:]}"
    assert ended.stdout == f"WARNING within {ids}\nthe span\nWARNING outside\n"


def test_the_console_is_stderr_for_every_signal() -> None:
    ended = run_program(OTEL_TRACES_EXPORTER="console", OTEL_METRICS_EXPORTER="console", OTEL_LOGS_EXPORTER="console")
    assert ended.stdout.startswith("WARNING within trace_id=")
    assert [line for line in ended.stderr.splitlines() if '"body": "outside"' in line]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
)
def test_nothing_is_set_up_unless_the_variables_ask_for_it(variables: dict[str, str]) -> None:
    ended = run_program(**variables)
    assert (ended.stdout, ended.stderr) == ("WARNING within\nthe span\nWARNING outside\n", "")


def test_variables_without_the_extra_are_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    with telemetry():
        assert isinstance(get_tracer_provider(), ProxyTracerProvider)
    (record,) = caplog.records
    assert record.getMessage() == (
        "no telemetry goes through OpenTelemetry, as OTEL_EXPORTER_OTLP_ENDPOINT asks: its SDK is not installed; "
        "pip install 'rhapsody-mcp[otel]', or set OTEL_SDK_DISABLED=true."
    )


def test_an_exporter_that_is_not_there_is_one_warning_and_the_work_goes_on() -> None:
    ended = run_program(OTEL_TRACES_EXPORTER="zipkin")
    warning, *rest = ended.stdout.splitlines()
    assert re.match("WARNING no telemetry .* as OTEL_TRACES_EXPORTER asks: .*'zipkin'", warning)
    assert rest == ["WARNING within", "the span", "WARNING outside"]


def test_tasks_inherit_no_variable_that_the_user_has_not_set() -> None:
    shown = "print(sorted(name for name in os.environ if name.startswith('OTEL_')))"
    program = f"import os\nfrom rhapsody_mcp.serving.telemetry import telemetry\nwith telemetry(): {shown}"
    variables = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": ""}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    assert ended.stdout == f"{sorted(variables)}\n"
