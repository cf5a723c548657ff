"""Pictures among the results of tasks: described, drawn as PNG, and made small enough to be shown.

This runs in a process for user code, of Python 3.10 too. A library for pictures is used where a value is one of its
objects; Pillow also, where it is installed, to read each picture that is to be shown.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import struct
import sys
from typing import Any, NamedTuple

from rhapsody_mcp.engine.task.error_text import error_message

__all__ = ["Bounds", "Drawn", "Facts", "about_bytes", "about_picture", "describe_file", "draw", "facts_of"]


class Facts(NamedTuple):
    """What the first bytes of a picture say. The width and height are in pixels; 0 where they are not known."""

    kind: str
    mime_type: str
    width: int
    height: int

    def text(self, size: int) -> str:
        """As in `PNG picture 640x480, 31 KB`."""
        pixels = f" {self.width}x{self.height}" if self.width else ""
        return f"{self.kind} picture{pixels}, {_size_text(size)}"


class Bounds(NamedTuple):
    """The most bytes of a picture to be shown, and the most pixels of its longer side."""

    bytes: int
    pixels: int


class Drawn(NamedTuple):
    """A picture as `data`, which is empty where the picture cannot be shown, for the reason `why`. `original` are the
    facts of a picture that was scaled down."""

    facts: Facts
    data: bytes
    size: int
    original: Facts | None = None
    why: str = ""


def facts_of(data: bytes | bytearray | memoryview) -> Facts | None:
    """Return what the beginning of a PNG, JPEG, GIF, WebP or SVG says; None for other data."""
    beginning = bytes(data[:_SVG_BEGINNING])
    for signature, (kind, mime_type, size) in _KINDS.items():
        if beginning.startswith(signature):
            try:
                return Facts(kind, mime_type, *size(bytes(data[:_BEGINNING])))
            except (struct.error, IndexError):  # the data ends too early
                return None
    return _svg_facts(beginning)


def _size_text(size: int) -> str:
    """As in `31 KB`."""
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1000:.0f} KB" if size < 1_000_000 else f"{size / 1_000_000:.1f} MB"


def about_bytes(beginning: bytes | bytearray, size: int) -> str:
    """Describe the picture of `size` bytes that begins so; empty for other data."""
    facts = facts_of(beginning)
    return facts.text(size) if facts else ""


def describe_file(path: str) -> str:
    """Describe a file, as in `PNG picture 640x480, 31 KB` or `file, 120 bytes`."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return about_bytes(file.read(_BEGINNING), size) or f"file, {size} bytes"
    except OSError as error:
        return f"file that cannot be read ({error.strerror})"


def about_picture(value: Any) -> str:
    """Describe the picture that a value is, as in `PNG picture 640x480, 31 KB`; empty for another value."""
    if isinstance(value, bytes | bytearray):
        return about_bytes(value, len(value))
    if _is_image(value):
        return f"PIL picture {value.width}x{value.height}"
    if (figure := _figure(value)) is not None:
        width, height = figure.get_size_inches() * figure.dpi
        return f"matplotlib picture {width:.0f}x{height:.0f}"
    return ""


def draw(value: Any, bounds: Bounds) -> Drawn | None:
    """Return the picture that a value is, scaled down to the bounds; None for another value. An SVG is not scaled."""
    data = _data_of(value)
    facts = facts_of(data) if data else None
    if data is None or facts is None:
        return None
    if facts.kind == "SVG":
        return Drawn(facts, data, len(data))
    try:
        return _decoded(data, facts, bounds)
    except ImportError:
        why = _why_not_unread(data, facts, bounds)
    except Exception as error:  # a broken picture, or one that Pillow refuses to read because of its size
        why = f"Pillow could not read it: {error_message(error)}"
    return Drawn(facts, b"" if why else data, len(data), why=why)


# --- objects


def _is_image(value: Any) -> bool:
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _figure(value: Any) -> Any:
    """Return a figure of matplotlib, also of its axes; None for another value."""
    figures, axes = sys.modules.get("matplotlib.figure"), sys.modules.get("matplotlib.axes")
    if axes is not None and isinstance(value, axes.Axes):
        value = value.figure.figure  # of a subfigure's axes too, the whole figure
    return value if figures is not None and isinstance(value, figures.Figure) else None


def _data_of(value: Any) -> bytes | None:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    buffer = io.BytesIO()
    if _is_image(value):
        writable = value if value.mode in _PNG_MODES else value.convert("RGB")
        writable.save(buffer, format="PNG")
    elif (figure := _figure(value)) is not None:
        figure.savefig(buffer, format="png")
    return buffer.getvalue() or None


_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


# --- decoded, as a client refuses a broken picture


def _decoded(data: bytes, facts: Facts, bounds: Bounds) -> Drawn:
    """Return the picture, scaled down where that is needed. Raises what Pillow raises for a broken one."""
    pillow: Any = importlib.import_module("PIL.Image")  # the user's own, where there is one
    with pillow.open(io.BytesIO(data)) as opened:
        opened.load()
        facts = facts._replace(width=opened.width, height=opened.height)
        if _fits(data, facts, bounds):
            return Drawn(facts, data, len(data))
        return _scaled(opened.convert("RGBA" if opened.has_transparency_data else "RGB"), len(data), facts, bounds)


def _fits(data: bytes, facts: Facts, bounds: Bounds) -> bool:
    return len(data) <= bounds.bytes and max(facts.width, facts.height) <= bounds.pixels


def _scaled(picture: Any, size: int, original: Facts, bounds: Bounds) -> Drawn:
    side = min(bounds.pixels, max(picture.size))
    while True:
        picture.thumbnail((side, side))
        for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 85})):
            buffer = io.BytesIO()
            (picture if kind == "PNG" else picture.convert("RGB")).save(buffer, format=kind, **options)
            if len(scaled := buffer.getvalue()) <= bounds.bytes or side <= _SMALLEST:
                facts = facts_of(scaled)
                assert facts is not None, "it was just written"
                return Drawn(facts, scaled, size, original)
        side = side * 3 // 4


def _why_not_unread(data: bytes, facts: Facts, bounds: Bounds) -> str:
    """Return why a picture cannot be shown that was not decoded; empty if it can be."""
    if not (facts.width and facts.height and _has_end(data, facts.kind)):
        return "it is broken, or its size is not known"
    if not _fits(data, facts, bounds):
        return "it is too large, and Pillow, which could scale it down, is not installed where its task ran"
    return ""


def _has_end(data: bytes, kind: str) -> bool:
    if kind == "WebP":
        return 8 + int.from_bytes(data[4:8], "little") <= len(data)
    return data.rstrip(b"\0\r\n ").endswith(_ENDS[kind])


_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b";"}
_SMALLEST = 64


# --- the beginning of a picture


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while at + 9 <= len(data):
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0


def _webp_size(data: bytes) -> tuple[int, int]:
    if data[8:12] != b"WEBP":
        raise IndexError("another RIFF file")
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


_KINDS = {
    b"\x89PNG\r\n\x1a\n": ("PNG", "image/png", _png_size),
    b"GIF8": ("GIF", "image/gif", _gif_size),
    b"\xff\xd8\xff": ("JPEG", "image/jpeg", _jpeg_size),
    b"RIFF": ("WebP", "image/webp", _webp_size),
}
_BEGINNING = 256 * 1024
"""Bytes; the size of a JPEG comes after its embedded data, such as a preview."""


def _svg_facts(beginning: bytes) -> Facts | None:
    at = 0
    while match := _BEFORE_SVG.match(beginning, at):
        at = match.end()
    if not (match := _SVG.match(beginning, at)):
        return None
    tag = match[0]
    box = _VIEW_BOX.search(tag)
    width, height = (_side(tag, name) or _box_side(box, number) for number, name in ((1, b"width"), (2, b"height")))
    return Facts("SVG", "image/svg+xml", width, height)


def _box_side(box: re.Match[bytes] | None, number: int) -> int:
    return round(float(box[number])) if box else 0


def _side(tag: bytes, name: bytes) -> int:
    match = re.search(rb'\s%s\s*=\s*["\']\s*%s(?:px|pt)?\s*["\']' % (name, _NUMBER), tag)
    return round(float(match[1])) if match else 0


_BEFORE_SVG = re.compile(rb"\s+|\xef\xbb\xbf|<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE[^>]*>", re.DOTALL)
"""One part at a time: one pattern for all would backtrack for ever in white space that no SVG follows."""
_SVG = re.compile(rb"<svg\b[^>]*>")
_NUMBER = rb"([0-9]{1,6}(?:\.[0-9]*)?)"
_VIEW_BOX = re.compile(rb'viewBox\s*=\s*["\']\s*[-0-9.]+[\s,]+[-0-9.]+[\s,]+%s[\s,]+%s\s*["\']' % (_NUMBER, _NUMBER))
_SVG_BEGINNING = 4096
