"""The command line. What a person reads of it goes to stdout; when it serves, stdout belongs to the protocol."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rhapsody_mcp
from rhapsody_mcp.model.errors import RhapsodyError, root_of

if TYPE_CHECKING:
    from rhapsody_mcp.serving.daemon.client import Caller
    from rhapsody_mcp.serving.http.tokens import TokenFile
    from rhapsody_mcp.serving.paths import Places
    from rhapsody_mcp.settings import Settings

__all__ = ["command_parser", "main"]

# Each command imports what it needs: `--version` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except* BrokenPipeError:
        if not _reader_has_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # there goes what is still to be flushed
        code = 128 + signal.SIGPIPE
    return code


def _reader_has_left() -> bool:
    """Whether it is stdout that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _run(arguments: Sequence[str] | None) -> int:
    options = command_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    code = 1
    try:
        return int(options.run(options))
    except* RhapsodyError as group:
        print(f"rhapsody-mcp: {root_of(group)}", file=sys.stderr)
    except* KeyboardInterrupt:
        code = 130
    return code


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rhapsody-mcp", description=rhapsody_mcp.__doc__)
    parser.add_argument("--version", action="version", version=rhapsody_mcp.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    stdio = commands.add_parser("stdio", help="serve one MCP client on stdin and stdout")
    _add_settings(stdio)
    _add_service(stdio)
    stdio.set_defaults(run=_stdio)

    http = commands.add_parser("http", help="serve many MCP clients over HTTP; they share their sessions")
    where = http.add_mutually_exclusive_group()
    where.add_argument("--host", default="127.0.0.1", help="a name or an address of this machine (default: 127.0.0.1)")
    where.add_argument("--socket", type=Path, metavar="PATH", help="a Unix socket for this user alone, not a host")
    http.add_argument("--port", type=_port, default=8765, help="0 for one that is free (default: 8765)")
    http.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        dest="http_token_file",
        help="demand the bearer token of yours in it (without it: one of those that `token create` made)",
    )
    http.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        dest="http_allowed_hosts",
        help="one more name by which clients may call this host; again for each",
    )
    _add_settings(http)
    _add_service(http)
    http.set_defaults(run=_http)

    service = commands.add_parser("service", help="start, stop or look at what holds your sessions when chats end")
    orders = service.add_subparsers(required=True, metavar="start|stop|status")
    start = orders.add_parser("start", help="start it, if it does not run; clients do so by themselves")
    stop = orders.add_parser("stop", help="end it; sessions and results are kept for its next start")
    stop.add_argument("--force", action="store_true", help="also while tasks have not ended")
    status = orders.add_parser("status", help="say whether it runs and what it holds")
    status.add_argument("--json", action="store_true", help="as JSON")
    run = orders.add_parser("run")
    run.add_argument("--detached", action="store_true", help=argparse.SUPPRESS)
    for order, act in ((start, _service_start), (stop, _service_stop), (status, _service_status), (run, _service_run)):
        _add_folder(order)
        if order in (start, run):
            _add_config(order)
        order.set_defaults(run=act)

    _add_token(commands)

    demo = commands.add_parser("demo", help="a language model writes samples, a classifier is trained on them")
    demo.add_argument("--model", default="shipped", help="a folder or a hub name (default: the shipped model)")
    demo.add_argument("--samples", type=_samples, default=200, help="how many samples to ask for (default: 200)")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure this machine, against the barest programs that do the same work")
    bench.add_argument("--quick", action="store_true", help="less of each, in under 2 minutes")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    bench.add_argument("--chart", type=Path, metavar="FILE", help="draw them into a PNG file (needs matplotlib)")
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="say what is there, what is missing, and how to get it")
    _add_folder(doctor)
    doctor.set_defaults(run=_doctor)

    init = commands.add_parser("init", help="write a commented config.yaml for the vllm backend")
    init.add_argument("folder", type=Path, help="where to write it; made if it is not there")
    init.add_argument(
        "--shipped-model", action="store_true", help="serve the shipped model, whatever name is asked for"
    )
    init.set_defaults(run=_init)
    return parser


def _add_token(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    token = commands.add_parser("token", help="make, list and revoke the bearer tokens of HTTP clients")
    actions = token.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a token and print it, once: only its hash is kept")
    create.add_argument("name", metavar="NAME", help="who or what it is for: the audit log names it")
    create.add_argument(
        "--scopes", type=_names, default=("read", "run"), help="read: what changes nothing; run: all (default: both)"
    )
    create.add_argument("--days", type=_days, metavar="N", help="how long it is valid (default: until it is revoked)")
    listed = actions.add_parser("list", help="name each token, what it may do and how long; never the token itself")
    revoke = actions.add_parser("revoke", help="take it no longer, from the next request on")
    revoke.add_argument("name", metavar="NAME", help="as list shows it")
    for action, run in ((create, _token_create), (listed, _token_list), (revoke, _token_revoke)):
        _add_folder(action)
        action.set_defaults(run=run)


def _add_settings(command: argparse.ArgumentParser) -> None:
    """What is given here goes before what the settings file says."""
    _add_config(command)
    command.add_argument("--read-only", action="store_true", default=None, help="offer only tools that change nothing")
    command.add_argument(
        "--toolsets", type=_names, metavar="NAMES", help="offer only these toolsets, as in sessions,tasks"
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, metavar="FILE", help="settings to read in place of the user's own")


def _add_folder(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--folder", type=Path, metavar="PATH", help="of a service apart from the user's own, with its socket and state"
    )


def _add_service(command: argparse.ArgumentParser) -> None:
    whose = command.add_mutually_exclusive_group()
    whose.add_argument("--in-process", action="store_true", help="hold the sessions in this process; they end with it")
    _add_folder(whose)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a whole number from 0 to 65535")
    return int(text)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days < 100_000:
        raise argparse.ArgumentTypeError("a number of days, as in 30 or 0.5")
    return days


def _samples(text: str) -> int:
    if not text.isdecimal() or int(text) < 10:
        raise argparse.ArgumentTypeError("a whole number of at least 10")
    return int(text)


def _stdio(options: argparse.Namespace) -> int:
    if options.in_process:
        return _stdio_alone(options)
    from rhapsody_mcp.serving.stdio.bridge import run_bridge

    return run_bridge(_caller(options, client=0), _given(options, "read_only", "toolsets"))


def _stdio_alone(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.serving.gc_tuning import collect_less
    from rhapsody_mcp.serving.stdio.server import serve_stdio

    collect_less()
    anyio.run(serve_stdio, _settings(options))
    return 0


def _http(options: argparse.Namespace) -> int:
    if options.in_process:
        return _http_alone(options)
    from rhapsody_mcp.serving.daemon.control_client import listen

    settings = _given(options, "read_only", "toolsets", "http_token_file", "http_allowed_hosts")
    if options.http_token_file:
        settings["http_token_file"] = str(options.http_token_file.expanduser().absolute())
    socket = str(options.socket.absolute()) if options.socket else None
    order = {"host": options.host, "port": options.port, "socket": socket, "settings": settings}
    return listen(_caller(options), order, _say)


def _http_alone(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.serving.gc_tuning import collect_less
    from rhapsody_mcp.serving.http.listeners import listen_on_host, listen_on_socket
    from rhapsody_mcp.serving.http.server import serve_http

    settings = _settings(options)
    listening = listen_on_socket(options.socket) if options.socket else listen_on_host(options.host, options.port)
    with listening as listener:
        collect_less()
        anyio.run(serve_http, settings, listener, _say)
    return 0


_say = partial(print, flush=True)


def _caller(options: argparse.Namespace, client: int | None = None) -> Caller:
    from rhapsody_mcp.serving.daemon.client import Caller

    return Caller(_places(options), vars(options).get("config"), client)


def _places(options: argparse.Namespace) -> Places:
    from rhapsody_mcp.serving.paths import Places

    return Places(options.folder and options.folder.absolute())


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Of these settings, those that the command line names."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _service_start(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import start

    return start(_caller(options), _say)


def _service_stop(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import stop

    return stop(_caller(options), options.force, _say)


def _service_status(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.daemon.control_client import status

    return status(_caller(options), options.json, _say)


def _service_run(options: argparse.Namespace) -> int:
    """In the foreground. The lock comes first, and what takes long to load after it."""
    from rhapsody_mcp.serving.daemon.spawn import Report
    from rhapsody_mcp.serving.daemon.unix_listener import Door, Taken

    report = Report(options.detached)
    try:
        with Door(_caller(options).places) as door:
            import anyio

            from rhapsody_mcp.serving.daemon.service import run_service
            from rhapsody_mcp.serving.gc_tuning import collect_less

            logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
            logging.getLogger("rhapsody_mcp").setLevel(logging.INFO)
            collect_less()
            anyio.run(run_service, _settings(options), door, report.ready, options.config)
    except Taken:
        report.taken()
    except Exception as error:
        report.failed(error)
        raise
    return 0


def _token_file(options: argparse.Namespace) -> TokenFile:
    from rhapsody_mcp.serving.http.tokens import TokenFile

    return TokenFile(_places(options).tokens)


def _record_token(options: argparse.Namespace, done: str) -> None:
    from rhapsody_mcp.protocol.audit import open_audit
    from rhapsody_mcp.settings import Settings

    never = Settings.model_construct(audit_bytes=0)  # it is the service that begins new files
    with open_audit(_places(options).audit, never) as audit:
        audit.token(done, options.name)


def _token_create(options: argparse.Namespace) -> int:
    token = _token_file(options).create(options.name, options.scopes, options.days)
    _record_token(options, "create")
    print(token)
    print("It is shown only now. Clients send it as the header `Authorization: Bearer TOKEN`.", file=sys.stderr)
    return 0


def _token_list(options: argparse.Namespace) -> int:
    print(_token_file(options).table())
    return 0


def _token_revoke(options: argparse.Namespace) -> int:
    _token_file(options).revoke(options.name)
    _record_token(options, "revoke")
    print(f"Revoked {options.name}.")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    from rhapsody_mcp.settings import Settings, read_settings

    given = {
        name: value for name, value in vars(options).items() if name in Settings.model_fields and value is not None
    }
    settings = read_settings(options.config)
    return Settings(**{**dict(settings), **given})


def _demo(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.demo.run import run_demo

    return anyio.run(run_demo, options.model, options.samples)


def _bench(options: argparse.Namespace) -> int:
    import anyio

    from rhapsody_mcp.bench.running import FULL, QUICK, run_bench

    return anyio.run(run_bench, QUICK if options.quick else FULL, options.json, options.chart)


def _doctor(options: argparse.Namespace) -> int:
    from rhapsody_mcp.doctor import run_doctor

    return run_doctor(_places(options))


def _init(options: argparse.Namespace) -> int:
    from rhapsody_mcp.backends.vllm.config import sample_config

    file = options.folder / "config.yaml"
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as opened:
            opened.write(sample_config(options.shipped_model))
    except FileExistsError:
        raise RhapsodyError(f"{file} is there already; remove it, or choose another folder.") from None
    except OSError as error:
        raise RhapsodyError(f"{file} cannot be written: {error.strerror}.") from error
    print(f"Wrote {file}. Use it with DragonVllmInferenceBackend(config_file={str(file)!r}).")
    return 0
