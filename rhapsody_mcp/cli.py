"""The command line. What a person reads of it goes to stdout; when it serves, stdout belongs to the protocol."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio

import rhapsody_mcp
from rhapsody_mcp.model.errors import RhapsodyError

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
    stdio.add_argument("--config", type=Path, metavar="FILE", help="settings to read in place of the user's own")
    stdio.set_defaults(run=_stdio)

    demo = commands.add_parser("demo", help="a language model writes samples, a classifier is trained on them")
    demo.add_argument("--model", default="shipped", help="a folder or a hub name (default: the shipped model)")
    demo.add_argument("--samples", type=_samples, default=60, help="how many samples to ask for (default: 60)")
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


def _samples(text: str) -> int:
    if not text.isdecimal() or int(text) < 10:
        raise argparse.ArgumentTypeError("a whole number of at least 10")
    return int(text)


def _stdio(options: argparse.Namespace) -> int:
    from rhapsody_mcp.serving import serve_stdio
    from rhapsody_mcp.settings import read_settings

    anyio.run(serve_stdio, read_settings(options.config))
    return 0


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
