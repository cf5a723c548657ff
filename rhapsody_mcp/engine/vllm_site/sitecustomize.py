"""Python runs this at its start where the vLLM launcher has put this folder on PYTHONPATH."""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


def hide() -> None:
    """Make the libraries that the launcher found broken look absent."""
    for name in filter(None, os.environ.get("RHAPSODY_HIDDEN_MODULES", "").split(",")):
        sys.modules[name] = None  # type: ignore[assignment]  # None is how an import is refused


def run_the_environments_own() -> None:
    """Run the sitecustomize that this one stands before, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if os.path.abspath(folder) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


hide()
run_the_environments_own()
