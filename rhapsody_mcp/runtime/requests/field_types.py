"""Field types that several requests share."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints, WithJsonSchema

__all__ = ["NAME_PATTERN", "UNION_TAGS", "Name"]

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN), WithJsonSchema({"type": "string"})]
"""The name of a session, a task or a function. The JSON schema leaves the pattern out; the error message states it."""
UNION_TAGS = ("(value)", "(stand-in)")
"""The tags of a union of a value and its stand-in. Pydantic puts a tag into the location of an error; no field has such
a name."""
