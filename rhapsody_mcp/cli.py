"""The command line. What a person reads of it goes to stdout; when it serves, stdout belongs to the protocol."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

import rhapsody_mcp
from rhapsody_mcp.model.errors import RhapsodyError

if TYPE_CHECKING:
    from rhapsody_mcp.settings import Settings

__all__ = ["main"]

# Each command imports what it needs: `--version` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(options.run(options))
    except RhapsodyError as error:
        print(f"rhapsody-mcp: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rhapsody-mcp", description=rhapsody_mcp.__doc__)
    parser.add_argument("--version", action="version", version=rhapsody_mcp.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    stdio = commands.add_parser("stdio", help="serve one MCP client on stdin and stdout")
    stdio.add_argument(
        "--in-process", action="store_true", help="end everything with the client (in this version, always so)"
    )
    _add_settings(stdio)
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
        help="demand the bearer token in it, made if not there (always demanded where other machines can connect)",
    )
    http.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        dest="http_allowed_hosts",
        help="one more name by which clients may call this host; again for each",
    )
    _add_settings(http)
    http.set_defaults(run=_http)

    demo = commands.add_parser("demo", help="a language model writes samples, a classifier is trained on them")
    demo.add_argument("--model", default="shipped", help="a folder or a hub name (default: the shipped model)")
    demo.add_argument("--samples", type=_samples, default=200, help="how many samples to ask for (default: 200)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="say what is there, what is missing, and how to get it")
    doctor.set_defaults(run=_doctor)

    init = commands.add_parser("init", help="write a commented config.yaml for the vllm backend")
    init.add_argument("folder", type=Path, help="where to write it; made if it is not there")
    init.add_argument(
        "--shipped-model", action="store_true", help="serve the shipped model, whatever name is asked for"
    )
    init.set_defaults(run=_init)
    return parser


def _add_settings(command: argparse.ArgumentParser) -> None:
    """What is given here goes before what the settings file says."""
    command.add_argument("--config", type=Path, metavar="FILE", help="settings to read in place of the user's own")
    command.add_argument("--read-only", action="store_true", default=None, help="offer only tools that change nothing")
    command.add_argument(
        "--toolsets", type=_names, metavar="NAMES", help="offer only these toolsets, as in sessions,tasks"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a whole number from 0 to 65535")
    return int(text)


def _samples(text: str) -> int:
    if not text.isdecimal() or int(text) < 10:
        raise argparse.ArgumentTypeError("a whole number of at least 10")
    return int(text)


def _stdio(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.stdio import serve_stdio

    anyio.run(serve_stdio, _settings(options))
    return 0


def _http(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving.http import serve_http
    from rhapsody_mcp.serving.listening import listen_on_host, listen_on_socket

    settings = _settings(options)
    listening = listen_on_socket(options.socket) if options.socket else listen_on_host(options.host, options.port)
    with listening as listener:
        anyio.run(serve_http, settings, listener, partial(print, flush=True))
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    from rhapsody_mcp.settings import Settings, read_settings

    given = {
        name: value for name, value in vars(options).items() if name in Settings.model_fields and value is not None
    }
    settings = read_settings(options.config)
    return Settings(**{**dict(settings), **given})


def _demo(options: argparse.Namespace) -> int:
    from rhapsody_mcp.demo import run_demo

    return anyio.run(run_demo, options.model, options.samples)


def _doctor(options: argparse.Namespace) -> int:
    from rhapsody_mcp.doctor import run_doctor

    return run_doctor()


def _init(options: argparse.Namespace) -> int:
    from rhapsody_mcp.backends.vllm_config import sample_config

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
