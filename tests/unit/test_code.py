"""Code that gives values back, and the functions that a script may hold."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhapsody_mcp.runtime.export.function_source import SourceWriter
from rhapsody_mcp.runtime.export.literals import write_call, write_text, write_value
from rhapsody_mcp.runtime.serialization import Source

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
)


@given(plain)
def test_plain_data_comes_back_from_its_code(value: Any) -> None:
    back = eval(write_value(value))
    assert back == value and repr(back) == repr(value)


@given(st.text(alphabet="ab\\n\"'{}\n\r\t\0é") | st.text())
def test_a_text_comes_back_from_its_code(text: str) -> None:
    assert ast.literal_eval(write_text(text)) == text


def test_a_text_of_many_lines_is_written_as_such() -> None:
    assert write_text("one\n'two'\n") == '"""\\\none\n\'two\'\n"""'


def test_what_is_no_plain_data_is_refused() -> None:
    with pytest.raises(TypeError, match="a object cannot be written as code"):
        write_value([object()])


def test_a_call_that_is_too_long_for_a_line_has_a_line_for_each_argument() -> None:
    assert write_call("call", ["x", "y=1"]) == "call(x, y=1)"
    assert write_call("call", ["x" * 60, "y" * 60], 1) == f"call(\n        {'x' * 60},\n        {'y' * 60},\n    )"


def is_function_of_the_script(text: str, beginning: str = "import json") -> bool:
    sources = SourceWriter(beginning)
    return sources.write(Source(text)) == Source(text).function_name


@pytest.mark.parametrize(
    "text",
    [
        "def f(x, *y, z=1, **k):\n    return [a for a in x if (b := a)], y, z, k, b",
        "import json\nfrom math import pi as p\n\nLIMIT = -1\nPAIR = (1, 'a')\n\n\n"
        "async def f():\n    return g(p, LIMIT, PAIR)\n\n\ndef g(*a):\n    return json.dumps(a)",
        '"""About."""\n\n\ndef f(e):\n    import os.path as o\n\n    class C:\n        pass\n\n    return o, C, len(e)',
        "def f(v):\n    match v:\n        case [a, *b]:\n            return a, b\n"
        "        case {'k': c, **d}:\n            return c, d",
    ],
)
def test_plain_functions_become_functions_of_the_script(text: str) -> None:
    assert is_function_of_the_script(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("from __future__ import annotations\n\n\ndef f():\n    pass", id="a future"),
        pytest.param("from os import *\n\n\ndef f():\n    pass", id="a star"),
        pytest.param("@staticmethod\ndef f():\n    pass", id="a decorator"),
        pytest.param("CACHE = {}\n\n\ndef f():\n    return CACHE", id="what can change"),
        pytest.param("class C:\n    pass\n\n\ndef f():\n    return C()", id="a class"),
        pytest.param("def f():\n    global n\n    n = 1", id="a global"),
        pytest.param("def f():\n    return helper()", id="a name that it does not have"),
        pytest.param("def f():\n    return globals()", id="a look at its module"),
        pytest.param("def f():\n    return __name__", id="its module's name"),
        pytest.param("def len(x):\n    return 1", id="a builtin's name"),
        pytest.param("import time as json\n\n\ndef f():\n    return json", id="a name that means something else there"),
        pytest.param("def f():\n    pass\n\n\nif __name__ == '__main__':\n    f()", id="work at the top level"),
    ],
)
def test_what_would_mean_something_else_in_the_script_stays_a_text(text: str) -> None:
    assert not is_function_of_the_script(text)


@pytest.mark.parametrize("fenced", ["```python\n{}\n```", "\n```\n{}```\n", "``` py \r\n{}\n  ```"])
def test_a_fence_around_a_source_is_no_part_of_it(fenced: str) -> None:
    text = 'def f():\n    """Writes ```."""\n    return 1'
    assert Source(fenced.format(text)) == Source(text)
    assert Source(text).text == text
