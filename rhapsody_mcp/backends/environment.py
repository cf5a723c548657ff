"""Builds the environment variables of engines: those of this process, less the withheld, plus those of a session."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import IO, Any

import msgspec

from rhapsody_mcp.engine.software.setup_lines import PATH_BEFORE, RESTORE_PATH, line_failure, run_lines
from rhapsody_mcp.model.errors import InvalidSettings

__all__ = ["Environment", "read_environment"]

_SETUP_LIMIT_S = 120.0
_NOT_PASSED_ON = ("_", "SHLVL", "PWD", "OLDPWD", "PYTHONHOME", PATH_BEFORE)
"""Variables of the setup shell that an engine does not get: most describe the shell itself, and PYTHONHOME would break
the engine's own Python."""
_DEFAULTS = {"MPLBACKEND": "Agg"}  # nodes have no display
_VALID = {"variables": "an object of texts by name", "setup": "a list of lines for bash"}


class Environment(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The settings of an engine's environment.

    `setup` holds lines for a login shell of bash, so that `module` works there. The lines see `variables`, which also
    replace what the lines set. `withheld` holds patterns: a variable of this process whose name matches is not passed
    on, unless `variables` sets it.
    """

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

    async def build(self, keeps: Collection[str] = (), within_s: float = _SETUP_LIMIT_S) -> dict[str, str]:
        """The whole environment of an engine. A name in `keeps` is withheld only where a pattern equals the name.

        Raises InvalidSettings, with the output of the line, where a line of `setup` fails, or where all lines together
        take longer than `within_s`.
        """
        own = {**_DEFAULTS, **self._without_secrets(os.environ, keeps), **self.variables}
        if not self.setup:
            return own
        after = self._without_secrets(await _variables_after(self.setup, own, within_s), keeps)
        path = after.get("PATH", os.defpath).split(os.pathsep)
        unchanged = {name: own[name] for name in _NOT_PASSED_ON if name in own and name != "PYTHONHOME"}
        kept = {name: value for name, value in after.items() if name not in _NOT_PASSED_ON}
        return {**kept, **unchanged, "PATH": os.pathsep.join(dict.fromkeys(path)), **self.variables}

    def _without_secrets(self, variables: Mapping[str, str], keeps: Collection[str]) -> dict[str, str]:
        return {name: value for name, value in variables.items() if not self.withholds(name, keeps)}

    def withholds(self, name: str, keeps: Collection[str] = ()) -> bool:
        if name in keeps:
            return name in self.withheld
        return any(fnmatchcase(name.upper(), pattern.upper()) for pattern in self.withheld)


def read_environment(environment: Mapping[str, Any] | Environment | None) -> Environment:
    """Read a user's settings, as in `{"variables": {"OMP_NUM_THREADS": "1"}, "setup": ["module load cray-mpich"]}`.

    Raises InvalidSettings where they are not valid.
    """
    try:
        return msgspec.convert(environment or {}, Environment)
    except msgspec.ValidationError as error:
        valid = " and ".join(f"{key}, {kind}" for key, kind in _VALID.items())
        raise InvalidSettings(f"environment is not valid: {error}. It may have {valid}.") from error


# --- setup lines


async def _variables_after(lines: Sequence[str], variables: Mapping[str, str], within_s: float) -> dict[str, str]:
    """The variables of a login shell that started with `variables`, after it has run the lines."""
    mark = f"setup-{secrets.token_hex(8)}-"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        own = {**variables, PATH_BEFORE: variables.get("PATH", "")}
        code = await _run_bash(_setup_script(lines, mark), own, out, err, within_s)
        if code == 0 and (after := _parse_variables(_read_text(out))):
            return after
        said = _read_text(err)
    how = {None: f"did not end within {within_s:g} s", 0: "ended the shell"}.get(code, f"ended with exit code {code}")
    raise InvalidSettings(
        f"setup in the session's environment: {line_failure(lines, mark, said, how)}. Try it in `bash -l`; then create "
        "a session with lines that work."
    )


def _setup_script(lines: Sequence[str], mark: str) -> str:
    """The bash script that runs the lines. What they say goes to stderr, and at the end all variables to stdout."""
    return "\n".join(["exec 3>&1 1>&2", RESTORE_PATH, *run_lines(lines, mark), "command -p env -0 >&3"])


async def _run_bash(
    script: str, variables: Mapping[str, str], out: IO[bytes], err: IO[bytes], within_s: float
) -> int | None:
    """Run the script; the exit code, None where it took too long. Ends the processes that the script left running."""
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


def _parse_variables(text: str) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in text.split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs}


def _read_text(file: IO[bytes]) -> str:
    file.seek(0)
    return os.fsdecode(file.read())
