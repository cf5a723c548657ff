"""What each command does. A command imports what it needs when it runs, so that `--version` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rhapsody_mcp.model.errors import RhapsodyError

if TYPE_CHECKING:
    from rhapsody_mcp.serving.daemon.client import ServiceClient
    from rhapsody_mcp.serving.http.tokens import TokenFile
    from rhapsody_mcp.serving.paths import ServicePaths
    from rhapsody_mcp.settings import Settings

__all__ = [
    *(
        "bench",
        "clients",
        "dashboard",
        "demo",
        "doctor",
        "http",
        "init",
        "logs",
        "service_run",
        "service_start",
        "service_status",
        "service_stop",
    ),
    *("report", "service_stop", "stdio", "token_create", "token_list", "token_revoke"),
]

_say = partial(print, flush=True)


def stdio(options: argparse.Namespace) -> int:
    if options.in_process:
        return _stdio_in_process(options)
    from rhapsody_mcp.serving.stdio.bridge import run_bridge

    return run_bridge(_client(options, client_fd=0), _options_given(options, "read_only", "toolsets"))


def _stdio_in_process(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.engine.process.gc_tuning import collect_less
    from rhapsody_mcp.serving.stdio.server import serve_stdio
    from rhapsody_mcp.serving.telemetry import telemetry

    collect_less()
    with telemetry():
        anyio.run(serve_stdio, _settings(options))
    return 0


def http(options: argparse.Namespace) -> int:
    if options.in_process:
        return _http_in_process(options)
    from rhapsody_mcp.serving.daemon.control_client import listen

    settings = _options_given(options, "read_only", "toolsets", "http_token_file", "http_allowed_hosts")
    if options.http_token_file:
        settings["http_token_file"] = str(options.http_token_file.expanduser().absolute())
    socket = str(options.socket.absolute()) if options.socket else None
    address = {"host": options.host, "port": options.port, "socket": socket}
    return listen(_client(options), {**address, "settings": settings}, lambda said, address: _say(said))


def dashboard(options: argparse.Namespace) -> int:
    """Open the page, and serve it for as long as this command runs."""
    import webbrowser
    from urllib.parse import quote

    from rhapsody_mcp.serving.daemon.control_client import listen

    def begin(said: str, address: str) -> None:
        shown = f"#session={quote(options.session)}" if options.session else ""
        page = f"{address.removesuffix('/mcp')}/dashboard/{shown}"
        _say(f"The page is at {page}")
        if not options.no_browser and not webbrowser.open(page):
            _say(
                "No browser could be opened here. From your own machine: ssh -L PORT:127.0.0.1:PORT, then that address."
            )

    settings = _options_given(options, "http_allowed_hosts")
    address = {"host": "127.0.0.1", "port": options.port, "socket": None, "settings": settings}
    return listen(_client(options), {**address, "session": options.session}, begin)


def report(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import write

    given = {"report": options.output, "trace": options.trace, "picture": options.svg}
    files = {what: str(path.expanduser().absolute()) for what, path in given.items() if path is not None}
    if not files:
        files = {"report": os.path.abspath(f"{options.session}.html")}
    if len({*files.values()}) < len(files) or any(path.name == "-" for path in given.values() if path is not None):
        raise RhapsodyError("report writes files: give each of -o, --trace and --svg the name of a file of its own.")
    return write(_client(options), options.session, files, _say)


def _http_in_process(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.engine.process.gc_tuning import collect_less
    from rhapsody_mcp.serving.http.listeners import listen_on_host, listen_on_socket
    from rhapsody_mcp.serving.http.server import serve_http
    from rhapsody_mcp.serving.telemetry import telemetry

    settings = _settings(options)
    listening = listen_on_socket(options.socket) if options.socket else listen_on_host(options.host, options.port)
    with listening as listener, telemetry():
        collect_less()
        anyio.run(serve_http, settings, listener, _say)
    return 0


def _client(options: argparse.Namespace, client_fd: int | None = None) -> ServiceClient:
    from rhapsody_mcp.serving.daemon.client import ServiceClient

    return ServiceClient(_paths(options), vars(options).get("config"), client_fd)


def _paths(options: argparse.Namespace) -> ServicePaths:
    from rhapsody_mcp.serving.paths import ServicePaths

    return ServicePaths(options.folder and options.folder.absolute())


def _options_given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of these options that the command line gives."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def service_start(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import start

    return start(_client(options), _say)


def service_stop(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import stop

    return stop(_client(options), options.force, _say)


def service_status(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import status

    return status(_client(options), options.json, _say)


def logs(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import logs

    def write(stream: str, text: str) -> None:
        file = sys.stderr if stream == "stderr" else sys.stdout
        file.write(text)
        file.flush()

    return logs(_client(options), options.session, options.task, options.rank, options.follow, write)


def service_run(options: argparse.Namespace) -> int:
    """Run the service in the foreground. Takes the lock before the slow imports."""
    from rhapsody_mcp.serving.daemon.spawn import StartReport
    from rhapsody_mcp.serving.daemon.unix_listener import AlreadyRunning, UnixListener

    report = StartReport(options.detached)
    try:
        with UnixListener(_paths(options)) as listener:
            import anyio

            from rhapsody_mcp.engine.process.gc_tuning import collect_less
            from rhapsody_mcp.serving.daemon.service import run_service
            from rhapsody_mcp.serving.telemetry import telemetry

            logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
            logging.getLogger("rhapsody_mcp").setLevel(logging.INFO)
            collect_less()
            with telemetry():
                anyio.run(run_service, _settings(options), listener, report.ready, options.config)
    except AlreadyRunning:
        report.already_running()
    except Exception as error:
        report.failed(error)
        raise
    return 0


def _token_file(options: argparse.Namespace) -> TokenFile:
    from rhapsody_mcp.serving.http.tokens import TokenFile

    return TokenFile(_paths(options).tokens)


def _audit_token(options: argparse.Namespace, action: str) -> None:
    from rhapsody_mcp.protocol.audit import open_audit
    from rhapsody_mcp.settings import Settings

    no_rotation = Settings.model_construct(audit_bytes=0)  # the service rotates the file
    with open_audit(_paths(options).audit, no_rotation) as audit:
        audit.token(action, options.name)


def token_create(options: argparse.Namespace) -> int:
    token = _token_file(options).create(options.name, options.scopes, options.days)
    _audit_token(options, "create")
    print(token)
    print("It is shown only now. Clients send it as the header `Authorization: Bearer TOKEN`.", file=sys.stderr)
    return 0


def token_list(options: argparse.Namespace) -> int:
    print(_token_file(options).table())
    return 0


def token_revoke(options: argparse.Namespace) -> int:
    _token_file(options).revoke(options.name)
    _audit_token(options, "revoke")
    print(f"Revoked {options.name}.")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    from rhapsody_mcp.settings import Settings, read_settings

    overrides = {
        name: value for name, value in vars(options).items() if name in Settings.model_fields and value is not None
    }
    return Settings(**{**dict(read_settings(options.config)), **overrides})


def demo(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.demo.run import run_demo

    return anyio.run(run_demo, options.model, options.samples)


def bench(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.bench.runner import FULL, QUICK, run_bench

    return anyio.run(run_bench, QUICK if options.quick else FULL, options.json, options.chart)


def doctor(options: argparse.Namespace) -> int:
    from rhapsody_mcp.doctor import run_doctor
    from rhapsody_mcp.doctor_nodes import run_doctor_on_nodes
    from rhapsody_mcp.settings import read_settings

    if options.nodes is None:
        return run_doctor(_paths(options))
    names = ("minutes", "profile", "partition", "account", "qos", "constraint")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return run_doctor_on_nodes(_paths(options), read_settings(), options.nodes, given)


def clients(options: argparse.Namespace) -> int:
    from rhapsody_mcp.clients import entries, server_command, write_bundle

    command = server_command(options.ssh)
    if options.bundle is None:
        print("\n\n".join(f"{client}\n  {entry}" for client, entry in entries(command).items()))
        if options.ssh is not None:
            print(f"\nOn the machine of the client `ssh {options.ssh}` has to log in without asking for a password.")
        return 0
    with _writing(options.bundle):
        write_bundle(options.bundle, command)
    there = f"It starts {command[0]} there; where that is another machine than this one, write it with --ssh HOST."
    if options.ssh is not None:
        there = f"`ssh {options.ssh}` has to log in there without asking for a password."
    print(f"Wrote {options.bundle}. Open it with Claude Desktop. {there}")
    return 0


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RhapsodyError(f"{file} cannot be written: {error.strerror}.") from error


def init(options: argparse.Namespace) -> int:
    from rhapsody_mcp.backends.vllm.config import sample_config

    file = options.folder / "config.yaml"
    with _writing(file):
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as opened:
                opened.write(sample_config(options.shipped_model))
        except FileExistsError:
            raise RhapsodyError(f"{file} is there already; remove it, or choose another folder.") from None
    print(f"Wrote {file}. Use it with DragonVllmInferenceBackend(config_file={str(file)!r}).")
    return 0
