"""Types of fields that several requests share."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints, WithJsonSchema

__all__ = ["NAME_PATTERN", "UNION_TAGS", "Name"]

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN), WithJsonSchema({"type": "string"})]
"""The name of a session, a task or a function. The JSON schema leaves the pattern out; the error message states it."""
UNION_TAGS = ("(value)", "(stand-in)")
"""The tags that pydantic puts into the location of a problem where a field takes a value or an object in its place. No
field has such a name."""
