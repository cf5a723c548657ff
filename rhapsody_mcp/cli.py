"""The command line. Text for people goes to stdout, except from `stdio`, where stdout belongs to the protocol."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import rhapsody_mcp
from rhapsody_mcp import commands
from rhapsody_mcp.model.errors import RhapsodyError, root_of

__all__ = ["command_parser", "main"]

if TYPE_CHECKING:
    _Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        code = _run(arguments)
        if sys.stdout is not None:  # closed by who started this process
            sys.stdout.flush()
    except* BrokenPipeError:
        if not _reader_has_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what is still to be flushed
        code = 128 + signal.SIGPIPE
    return code


def _reader_has_left() -> bool:
    """Whether the reader of stdout has closed it."""
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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serving(subparsers)
    _add_service_control(subparsers)
    _add_token(subparsers)
    _add_page(subparsers)
    _add_other_commands(subparsers)
    return parser


def _add_serving(subparsers: _Subparsers) -> None:
    stdio = subparsers.add_parser("stdio", help="serve one MCP client on stdin and stdout")
    _add_settings(stdio)
    _add_service(stdio)
    stdio.set_defaults(run=commands.stdio)

    http = subparsers.add_parser("http", help="serve many MCP clients over HTTP; they share their sessions")
    address = http.add_mutually_exclusive_group()
    address.add_argument(
        "--host", default="127.0.0.1", help="a name or an address of this machine (default: 127.0.0.1)"
    )
    address.add_argument("--socket", type=Path, metavar="PATH", help="a Unix socket for this user alone, not a host")
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
    http.set_defaults(run=commands.http)


def _add_service_control(subparsers: _Subparsers) -> None:
    service = subparsers.add_parser("service", help="start, stop or look at what holds your sessions when chats end")
    actions = service.add_subparsers(required=True, metavar="start|stop|status")
    start = actions.add_parser("start", help="start it, if it does not run; clients do so by themselves")
    stop = actions.add_parser("stop", help="end it; sessions and results are kept for its next start")
    stop.add_argument("--force", action="store_true", help="also while tasks have not ended")
    status = actions.add_parser("status", help="say whether it runs and what it holds")
    status.add_argument("--json", action="store_true", help="as JSON")
    run = actions.add_parser("run")
    run.add_argument("--detached", action="store_true", help=argparse.SUPPRESS)
    logs = subparsers.add_parser("logs", help="print what a task prints, also while it runs")
    logs.add_argument("session", metavar="SESSION", help="as in session-1")
    logs.add_argument("task", metavar="TASK", help="its name or id; a for_each or a job shows who printed each line")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the task has ended")
    logs.add_argument("--rank", type=int, metavar="N", help="only this rank of a job")
    logs.set_defaults(run=commands.logs)
    start.set_defaults(run=commands.service_start)
    stop.set_defaults(run=commands.service_stop)
    status.set_defaults(run=commands.service_status)
    run.set_defaults(run=commands.service_run)
    for action in (start, stop, status, run, logs):
        _add_folder(action)
    for action in (start, run):
        _add_config(action)


def _add_page(subparsers: _Subparsers) -> None:
    page = subparsers.add_parser("dashboard", help="open a live page of what runs, for as long as this command runs")
    page.add_argument("session", nargs="?", metavar="SESSION", help="as in session-1 (default: the newest)")
    page.add_argument("--port", type=_port, default=0, help="of 127.0.0.1 (default: one that is free)")
    page.add_argument("--no-browser", action="store_true", help="only say where the page is")
    page.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        dest="http_allowed_hosts",
        help="the name of a host whose proxy calls it, as of JupyterHub; again for each",
    )
    page.set_defaults(run=commands.dashboard)
    report = subparsers.add_parser("report", help="write a page of a session into a file, which needs no server")
    report.add_argument("session", metavar="SESSION", help="as in session-1; also one that was closed")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="HTML (default: SESSION.html)")
    report.add_argument("--trace", type=Path, metavar="FILE", help="JSON for Perfetto and chrome://tracing")
    report.add_argument("--svg", type=Path, metavar="FILE", help="the task stream as a picture")
    report.set_defaults(run=commands.report)
    for command in (page, report):
        _add_folder(command)


def _add_other_commands(subparsers: _Subparsers) -> None:
    """The commands that need no service."""
    demo = subparsers.add_parser("demo", help="a language model writes samples, a classifier is trained on them")
    demo.add_argument("--model", default="shipped", help="a folder or a hub name (default: the shipped model)")
    demo.add_argument("--samples", type=_samples, default=200, help="how many samples to ask for (default: 200)")
    demo.set_defaults(run=commands.demo)

    bench = subparsers.add_parser(
        "bench", help="measure this machine, against the barest programs that do the same work"
    )
    bench.add_argument("--quick", action="store_true", help="less of each, in under 2 minutes")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    bench.add_argument("--chart", type=Path, metavar="FILE", help="draw them into a PNG file (needs matplotlib)")
    bench.set_defaults(run=commands.bench)

    doctor = subparsers.add_parser("doctor", help="say what is there, what is missing, and how to get it")
    _add_folder(doctor)
    doctor.add_argument("--nodes", type=int, metavar="N", help="ask the scheduler for N nodes, and look at them")
    doctor.add_argument("--minutes", type=int, help="the time limit of that job; default 10")
    doctor.add_argument("--profile", help="a profile of the settings")
    for name in ("partition", "account", "qos", "constraint"):
        doctor.add_argument(f"--{name}", help=f"the {name} of that job")
    doctor.set_defaults(run=commands.doctor)

    clients = subparsers.add_parser("clients", help="say what MCP clients have to be told to use this server")
    clients.add_argument("--ssh", metavar="HOST", help="for a client on another machine, which calls this one so")
    clients.add_argument("--bundle", type=Path, metavar="FILE", help="write a bundle (.mcpb) for Claude Desktop")
    clients.set_defaults(run=commands.clients)

    init = subparsers.add_parser("init", help="write a commented config.yaml for the vllm backend")
    init.add_argument("folder", type=Path, help="where to write it; made if it is not there")
    init.add_argument(
        "--shipped-model", action="store_true", help="serve the shipped model, whatever name is asked for"
    )
    init.set_defaults(run=commands.init)


def _add_token(subparsers: _Subparsers) -> None:
    token = subparsers.add_parser("token", help="make, list and revoke the bearer tokens of HTTP clients")
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
    for action, run in (
        (create, commands.token_create),
        (listed, commands.token_list),
        (revoke, commands.token_revoke),
    ):
        _add_folder(action)
        action.set_defaults(run=run)


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Options that override the settings file."""
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
    group = command.add_mutually_exclusive_group()
    group.add_argument("--in-process", action="store_true", help="hold the sessions in this process; they end with it")
    _add_folder(group)


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
