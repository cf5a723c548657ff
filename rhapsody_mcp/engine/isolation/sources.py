"""Source texts as modules. Each has a file: so its classes pickle, and processes that it spawns import it by name."""

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
_KEPT_BYTES = 8 * 1024 * 1024


class Sources:
    """The modules of source texts, made anew for each task; what is kept is their compiled code.

    Their files lie in `folder`. What they define travels by value: whoever reads a result has no such module.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        sys.path.append(folder)  # children that are spawned get it, too
        self._codes: OrderedDict[bytes, CodeType] = OrderedDict()
        self._bytes = 0
        self._loaded: list[str] = []

    def load(self, text: bytes) -> ModuleType:
        """Run the text as a new module, which is importable until `forget`. Raises whatever it raises."""
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
        return os.path.join(self.folder, f"{_name_of(text)}.py")

    def forget(self) -> None:
        """Have the next task make its own."""
        for name in self._loaded:
            sys.modules.pop(name, None)
        self._loaded.clear()

    def _code(self, text: bytes, path: str) -> CodeType:
        if text in self._codes:
            self._codes.move_to_end(text)
            return self._codes[text]
        self._write(text, path)
        code = self._codes[text] = compile(text.decode(), path, "exec", dont_inherit=True)
        self._bytes += len(text)
        while self._bytes > _KEPT_BYTES and len(self._codes) > 1:
            self._bytes -= len(self._codes.popitem(last=False)[0])
        return code

    def _write(self, text: bytes, path: str) -> None:
        if not os.path.exists(path):
            Path(self.folder).mkdir(mode=0o700, exist_ok=True)
            os.rename(write_file(text, self.folder), path)


def _name_of(text: bytes) -> str:
    return MODULE_PREFIX + hashlib.sha256(text).hexdigest()[:12]
