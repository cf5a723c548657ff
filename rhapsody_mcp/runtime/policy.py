"""The policy of a server: what agents may run and which paths they may name.

The policy prevents mistakes. It is no sandbox: an allowed program can do everything that its user can do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.engine.software.interpreter import python_path
from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.specs import Call, Command, Software, TaskSpec, Template
from rhapsody_mcp.settings import Settings

__all__ = ["Policy"]

_OWN_MODULES = "rhapsody_mcp.engine."


class Policy(msgspec.Struct, frozen=True):
    """None allows everything. Symbolic links are resolved before a path is compared with the allowed folders."""

    source: bool = True
    executables: tuple[str, ...] | None = None
    modules: tuple[str, ...] | None = None
    folders: tuple[Path, ...] | None = None

    @staticmethod
    def of(settings: Settings) -> Policy:
        return Policy(
            settings.allow_source, settings.allowed_executables, settings.allowed_modules, settings.allowed_folders
        )

    def check(self, spec: TaskSpec) -> TaskSpec:
        """The spec. Where programs are restricted, the full path of the program replaces its name, because the PATH of
        the process may differ.

        Raises InvalidRequest, which names the setting, for what is not allowed. The other checks raise the same.
        """
        templates = [group.template for group in spec.layout.groups]
        for template in templates:
            if template.cwd is not None:
                self.check_folder("cwd", template.cwd)
        self._check_software(spec.layout.software)
        if isinstance(spec.work, Call):
            self._check_function(spec.work)
        elif isinstance(spec.work, Command) and self.executables is not None:
            for template in templates:
                self.check_executable("executable", spec.work.executable, template)
            path = _find_program(spec.work.executable, templates[0])
            return replace(spec, work=replace(spec.work, executable=path or spec.work.executable))
        return spec

    def _check_software(self, software: Software) -> None:
        if software.python and self.executables is not None:
            self.check_executable("python", python_path(software.python, ""))
        for field in ("packages", "container", "setup"):
            if getattr(software, field):
                self.check_setup(field)

    def _check_function(self, call: Call) -> None:
        if call.form == "source":
            self.check_source("a task with inline source, or with a registered function")
        elif call.form == "module":
            self.check_module(call.code.decode())

    def check_source(self, what: str) -> None:
        if not self.source:
            may = f" that match allowed_modules ({_listed(self.modules)})" if self.modules is not None else ""
            raise InvalidRequest(
                f"{what} is not allowed here: allow_source is false in the settings of this server. Valid are "
                f'functions of installed modules{may}, as in "function": "package.module:function", and programs.'
            )

    def check_module(self, path: str) -> None:
        if self.modules is None or path.startswith(_OWN_MODULES):
            return
        if _matches(path, self.modules) or _matches(path.replace(":", "."), self.modules):
            return
        raise InvalidRequest(
            f"function {path!r} is not allowed here: allowed_modules in the settings of this server is "
            f"{_listed(self.modules)}. Use one of these, or ask the person who runs the server.",
            field="function",
        )

    def check_executable(self, field: str, name: str, template: Template | None = None) -> None:
        if self.executables is None:
            return
        template = template or Template()
        path = _find_program(name, template)
        file = Path(path).resolve() if path is not None and os.path.isfile(path) else None
        if file is None or not _matches(str(file), self.executables):
            resolved = f", which is {file}," if file is not None and str(file) != name else ""
            wrong = "is not allowed here" if file is not None else "is no program that is known here by this path"
            raise InvalidRequest(
                f"{field} {name!r}{resolved} {wrong}: allowed_executables in the settings of this server is "
                f"{_listed(self.executables)}. Use one of these, or ask the person who runs the server.",
                field=field,
            )

    def check_folder(self, field: str, path: str | os.PathLike[str]) -> None:
        if self.folders is None:
            return
        if not os.path.isabs(path):
            raise InvalidRequest(
                f"{field} {os.fspath(path)!r} is no full path, and folders are restricted here (allowed_folders in the "
                f"settings of this server is {_listed(map(str, self.folders))}): write it from / on.",
                field=field,
            )
        real = Path(path).resolve()
        if not any(real.is_relative_to(folder.expanduser().resolve()) for folder in self.folders):
            shown = f", which is {real}," if str(real) != os.fspath(path) else ""
            raise InvalidRequest(
                f"{field} {os.fspath(path)!r}{shown} is outside of the folders that are allowed here: allowed_folders "
                f"in the settings of this server is {_listed(map(str, self.folders))}. Use a path in one of these, or "
                "ask the person who runs the server.",
                field=field,
            )

    def check_setup(self, what: str = "setup in environment") -> None:
        """Refuse setup lines, which can run anything, where something is restricted."""
        for key, forbids in (("allow_source", not self.source), ("allowed_executables", self.executables is not None)):
            if forbids:
                raise InvalidRequest(
                    f"{what} is not allowed here, because {key} in the settings of this server forbids some of what "
                    f"it could run. Leave it out{', and give variables' if 'environment' in what else ''}."
                )


def _find_program(name: str, template: Template) -> str | None:
    """The path of a program, found in the way of the process that will run the program; None where there is none."""
    if os.sep in name:
        return path if os.path.isabs(path := os.path.join(template.cwd or "", name)) else None
    return shutil.which(name, path=template.env.get("PATH"))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(patterns: Iterable[str] | None) -> str:
    return ", ".join(patterns or ()) or "an empty list, so none is"
