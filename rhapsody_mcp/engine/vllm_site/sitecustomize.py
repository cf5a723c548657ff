"""Python runs this module at its start if the vLLM launcher has put this folder on PYTHONPATH."""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


def hide() -> None:
    """Make the libraries look absent that the launcher could not import."""
    for name in filter(None, os.environ.get("RHAPSODY_HIDDEN_MODULES", "").split(",")):
        sys.modules[name] = None  # type: ignore[assignment]  # None makes an import of the name fail


def run_original_sitecustomize() -> None:
    """Run the environment's sitecustomize, which this module shadows, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if os.path.abspath(folder) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


hide()
run_original_sitecustomize()
