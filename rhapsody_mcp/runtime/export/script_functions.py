"""The functions that an exported script defines for its own use, as source text."""

from __future__ import annotations

__all__ = ["NEEDED_NAMES", "SCRIPT_FUNCTIONS"]

_REPORT = '''\
def report(task):
    """What came of a task, as plain data."""
    if task.state == "DONE":
        try:
            return {"state": "DONE", "result": as_json(task.return_value)}
        except Exception as error:  # a __repr__ may raise anything, and a list may hold itself
            kind = type(task.return_value).__name__
            return {"state": "DONE", "result": f"{kind}, which cannot be shown: {type(error).__name__}"}
    return {"state": str(task.state), "error": str(task.exception)}'''
_AS_JSON = '''\
def as_json(value):
    """What JSON can say of it: keys as text, NaN as "NaN", an array of up to 1000 elements as lists."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(part) for part in value]
    if isinstance(value, float):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(str(float(value)), float(value))
    if value is None or isinstance(value, int | str):
        return value
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not hasattr(value, "tolist"):
        return repr(value)
    if math.prod(shape) <= 1000:
        return as_json(value.tolist())
    return f"{type(value).__name__} of shape {tuple(shape)}, dtype {getattr(value, 'dtype', '?')}"'''
_TEXT = '''\
def text(item):
    """An item in a text: a text as it is, anything else as JSON."""
    return item if isinstance(item, str | Part) else msgspec.json.encode(item).decode()'''
_PART = '''\
def part(item, path):
    """What a path leads to in an item."""
    if isinstance(item, Part):
        return Part(item.task, item.path + path)
    for step in path.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        item = item[int(step)] if isinstance(item, list) else item[step]
    return item'''

SCRIPT_FUNCTIONS = {"report": _REPORT, "text": _TEXT, "part": _PART, "as_json": _AS_JSON}
"""By name, in the order in which a script defines them."""
NEEDED_NAMES = {"text": {"Part", "msgspec"}, "part": {"Part"}}
"""The imported names that a function uses, by the name of the function. Every script imports the others."""
