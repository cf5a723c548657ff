"""Sets OpenTelemetry up in a server, where the standard variables ask for it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from opentelemetry.trace import get_tracer_provider

from rhapsody_mcp import __version__
from rhapsody_mcp.runtime.telemetry.current import current_ids

__all__ = ["end_telemetry", "telemetry"]

_log = logging.getLogger(__name__)
_SIGNALS = ("traces", "metrics", "logs")
_MAX_SPANS = "16384"
"""How many spans may wait for the exporter: a call with many short tasks makes 4,000 within a second."""
_EXPORT_S = 3.0
"""How long the end of a server may wait until what is left is exported."""


@contextmanager
def telemetry() -> Iterator[None]:
    """Export spans, metrics and logs within the block, as the variables say. Only a warning is logged where that cannot
    be: telemetry never stops the work."""
    if not (exporters := _exporters(os.environ)):
        yield
        return
    handlers = list(logging.getLogger().handlers)
    if _set_up(exporters):
        _add_ids(handlers)
        _keep_exporters_quiet(handlers)
    try:
        yield
    finally:
        end_telemetry()


def _exporters(variables: Mapping[str, str]) -> dict[str, str]:
    """The names of the exporters of each signal that is asked for, by the variable that may name them."""
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return {}
    exporters = {f"OTEL_{signal.upper()}_EXPORTER": _exporter(signal.upper(), variables) for signal in _SIGNALS}
    return {variable: names for variable, names in exporters.items() if names.lower() not in ("", "none")}


def _exporter(signal: str, variables: Mapping[str, str]) -> str:
    default = "otlp" if any(map(variables.get, _endpoints(signal))) else ""
    return variables.get(f"OTEL_{signal}_EXPORTER", "").strip() or default


def _endpoints(signal: str) -> tuple[str, str]:
    return "OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"


def _set_up(exporters: Mapping[str, str]) -> bool:
    problem = ""
    if find_spec("opentelemetry.sdk") is None:
        problem = "its SDK is not installed; pip install 'rhapsody-mcp[otel]', or set OTEL_SDK_DISABLED=true."
    else:
        try:
            _configure(exporters)
        except Exception as error:  # whatever an exporter raises
            problem = f"{error}; pip install 'rhapsody-mcp[otel]' brings otlp over HTTP."
    if problem:
        names = (*exporters, *(endpoint for signal in _SIGNALS for endpoint in _endpoints(signal.upper())))
        asking = next(filter(os.environ.get, names))
        _log.warning("no telemetry goes through OpenTelemetry, as %s asks: %s", asking, problem)
    return not problem


def _configure(exporters: Mapping[str, str]) -> None:
    from opentelemetry.sdk._configuration import _OTelSDKConfigurator

    class Configurator(_OTelSDKConfigurator):
        """As each distribution of OpenTelemetry has one."""

    configurator: Any = Configurator
    with _defaults(exporters), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the SDK's own handler for logs
        configurator().configure(
            resource_attributes={"service.version": __version__},
            setup_logging_handler="OTEL_LOGS_EXPORTER" in exporters,
            exporter_args_map=_console_arguments(),
        )


@contextmanager
def _defaults(exporters: Mapping[str, str]) -> Iterator[None]:
    """Have the variables say within the block what they leave open; tasks inherit what the user has set alone."""
    defaults = {**exporters, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_BSP_MAX_QUEUE_SIZE": _MAX_SPANS}
    if "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        defaults["OTEL_SERVICE_NAME"] = "rhapsody-mcp"
    added = {name: value for name, value in defaults.items() if not os.environ.get(name)}
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def _console_arguments() -> dict[type[Any], dict[str, Any]]:
    """The console is stderr: stdout may belong to a client."""
    found = [entry for signal in _SIGNALS for entry in entry_points(group=f"opentelemetry_{signal}_exporter")]
    return {entry.load(): {"out": sys.stderr} for entry in found if entry.name == "console"}


def end_telemetry() -> None:
    """Export what is left, for some seconds at most. Without telemetry nothing happens."""
    from opentelemetry._logs import get_logger_provider
    from opentelemetry.metrics import get_meter_provider

    providers = (get_tracer_provider(), get_meter_provider(), get_logger_provider())
    deadline = time.monotonic() + _EXPORT_S
    ends = [end for provider in providers if (end := getattr(provider, "shutdown", None)) is not None]
    threads = [threading.Thread(target=end, daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):  # else the SDK complains at the exit of Python
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)


# --- log lines


def _add_ids(handlers: Iterable[logging.Handler]) -> None:
    """Add the ids of the current span to the lines of the log."""
    for handler in handlers:
        if handler.formatter is not None:
            handler.setFormatter(_WithIds(handler.formatter))


def _keep_exporters_quiet(others: Iterable[logging.Handler]) -> None:
    """What they say of a collector that is not there would be exported too; the log gets their failures alone."""
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    for handler in {*logging.getLogger().handlers}.difference(others):
        handler.addFilter(lambda record: not record.name.startswith("opentelemetry."))


class _WithIds(logging.Formatter):
    """Adds the ids to the first line of what another formatter makes."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        line, end, more = self._formatter.format(record).partition("\n")
        ids = "".join(f" {name}={id}" for name, id in current_ids().items())
        return f"{line}{ids}{end}{more}"
