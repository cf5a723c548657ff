"""What engines find in their environment: this process's own variables, without some, and with a session's."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import IO, Any

import msgspec

from rhapsody_mcp.model.errors import InvalidSettings

__all__ = ["Environment", "read_environment"]

_SETUP_S = 120.0
_NOT_PASSED_ON = ("_", "SHLVL", "PWD", "OLDPWD", "PYTHONHOME", "RHAPSODY_PATH")
"""What belongs to the shell itself; PYTHONHOME would break the engine's own Python."""
_KINDS = {"variables": "an object of texts by name", "setup": "a list of lines for bash"}


class Environment(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """`setup` are lines for a login shell of bash, so that `module` works; the variables are there for them, and win
    over what they set. `withheld` are patterns of the variables that are not passed on unless `variables` has them."""

    variables: dict[str, str] = {}
    setup: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.variables.items():
            if name == "PYTHONHOME":
                raise InvalidSettings("PYTHONHOME would break the engine's own Python; give it to a task, as env")
            if not name or "=" in name or "\0" in name + value:
                raise InvalidSettings(f"variables has no valid name and text in {name!r}")
        if any("\0" in line for line in self.setup):
            raise InvalidSettings("a line of setup holds a NUL character")

    async def build(self, keeps: Collection[str] = (), within_s: float = _SETUP_S) -> dict[str, str]:
        """The whole environment of an engine; `keeps` are not withheld unless a pattern is their very name.

        Raises InvalidSettings where a line of `setup` fails, or they take longer than `within_s`, with what it wrote to
        stderr.
        """
        own = {**self._without_secrets(os.environ, keeps), **self.variables}
        if not self.setup:
            return own
        after = self._without_secrets(await _after(self.setup, own, within_s), keeps)
        path = after.get("PATH", os.defpath).split(os.pathsep)
        same = {name: own[name] for name in _NOT_PASSED_ON if name in own and name != "PYTHONHOME"}
        kept = {name: value for name, value in after.items() if name not in _NOT_PASSED_ON}
        return {**kept, **same, "PATH": os.pathsep.join(dict.fromkeys(path)), **self.variables}

    def _without_secrets(self, variables: Mapping[str, str], keeps: Collection[str]) -> dict[str, str]:
        return {name: value for name, value in variables.items() if not self.withholds(name, keeps)}

    def withholds(self, name: str, keeps: Collection[str] = ()) -> bool:
        if name in keeps:
            return name in self.withheld
        return any(fnmatchcase(name.upper(), pattern.upper()) for pattern in self.withheld)


def read_environment(environment: Mapping[str, Any] | Environment | None) -> Environment:
    """What a user gives, as `{"variables": {"OMP_NUM_THREADS": "1"}, "setup": ["module load cray-mpich"]}`.

    Raises InvalidSettings.
    """
    try:
        return msgspec.convert(environment or {}, Environment)
    except msgspec.ValidationError as error:
        valid = " and ".join(f"{key}, {kind}" for key, kind in _KINDS.items())
        raise InvalidSettings(f"environment is not valid: {error}. It may have {valid}.") from error


# --- setup lines


async def _after(lines: Collection[str], variables: Mapping[str, str], within_s: float) -> dict[str, str]:
    """The variables of a login shell that started with these and has run the lines."""
    mark = f"setup-{secrets.token_hex(8)}-"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        own = {**variables, "RHAPSODY_PATH": variables.get("PATH", "")}
        code = await _run(_script(lines, mark), own, out, err, within_s)
        if code == 0 and (after := _variables(_text(out))):
            return after
        number, _, output = _text(err).rpartition(mark)[2].partition("\n")
    line = list(lines)[int(number) - 1] if number.isdecimal() else "what the login shell does by itself"
    how = {None: f"did not end within {within_s:g} s", 0: "ended the shell"}.get(code, f"ended with exit code {code}")
    said = f": {' | '.join(output.strip().splitlines()[-5:])[-500:]}" if output.strip() else ""
    raise InvalidSettings(
        f"setup in the session's environment: {line!r} {how}{said}. Try it in `bash -l`; then create a session with "
        "lines that work."
    )


def _script(lines: Collection[str], mark: str) -> str:
    """Says on stderr which line it runs, and at the end all variables on what was stdout. The login shell may have
    replaced PATH: what was there comes first."""
    steps = [f"echo {mark}{number} >&2; eval {shlex.quote(line)} || exit" for number, line in enumerate(lines, 1)]
    start = ["exec 3>&1 1>&2", 'PATH="${RHAPSODY_PATH:+$RHAPSODY_PATH:}$PATH"']
    return "\n".join([*start, *steps, "command -p env -0 >&3"])


async def _run(
    script: str, variables: Mapping[str, str], out: IO[bytes], err: IO[bytes], within_s: float
) -> int | None:
    """The exit code; None where it took too long. What it leaves in the background is ended."""
    try:
        shell = await asyncio.create_subprocess_exec(
            *("bash", "-l", "-c", script),
            env=dict(variables),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    except OSError as error:
        raise InvalidSettings(f"setup in the session's environment needs bash, which is not here: {error}.") from error
    try:
        async with asyncio.timeout(within_s):
            return await shell.wait()
    except TimeoutError:
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(shell.pid, signal.SIGKILL)
        await shell.wait()


def _variables(text: str) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in text.split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs}


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return os.fsdecode(file.read())
