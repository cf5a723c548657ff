"""Loads source texts as modules. Each module has a file, so that its classes can be pickled and spawned processes can
import it by name."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import OrderedDict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

import cloudpickle

from rhapsody_mcp.engine.task.output import write_file

__all__ = ["MODULE_PREFIX", "Sources"]

MODULE_PREFIX = "rhapsody_source_"
_CACHE_BYTES = 8 * 1024 * 1024


class Sources:
    """The modules of source texts. Each task gets new modules; the compiled code is cached.

    The files of the modules are in `folder`. Pickles hold the definitions of these modules by value, because the reader
    of a result cannot import the modules.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        sys.path.append(folder)  # spawned processes inherit sys.path
        self._codes: OrderedDict[bytes, CodeType] = OrderedDict()
        self._cached_bytes = 0
        self._loaded: list[str] = []

    def load(self, text: bytes) -> ModuleType:
        """Run the text as a new module, which can be imported until `forget`. Raises every exception of the text."""
        name = _name_of(text)
        code = self._code(text, self.path_of(text))
        spec = spec_from_file_location(name, self.path_of(text))
        assert spec is not None
        module = sys.modules[name] = module_from_spec(spec)
        cloudpickle.register_pickle_by_value(module)
        self._loaded.append(name)
        exec(code, module.__dict__)
        return module

    def path_of(self, text: bytes) -> str:
        """Return the path of the module's file."""
        return os.path.join(self.folder, f"{_name_of(text)}.py")

    def forget(self) -> None:
        """Remove the loaded modules, so that the next task gets new ones."""
        for name in self._loaded:
            sys.modules.pop(name, None)
        self._loaded.clear()

    def _code(self, text: bytes, path: str) -> CodeType:
        if text in self._codes:
            self._codes.move_to_end(text)
            return self._codes[text]
        self._write(text, path)
        code = self._codes[text] = compile(text.decode(), path, "exec", dont_inherit=True)
        self._cached_bytes += len(text)
        while self._cached_bytes > _CACHE_BYTES and len(self._codes) > 1:
            self._cached_bytes -= len(self._codes.popitem(last=False)[0])
        return code

    def _write(self, text: bytes, path: str) -> None:
        if not os.path.exists(path):
            Path(self.folder).mkdir(mode=0o700, exist_ok=True)
            os.rename(write_file(text, self.folder), path)


def _name_of(text: bytes) -> str:
    return MODULE_PREFIX + hashlib.sha256(text).hexdigest()[:12]
