"""What is said of a picture by its first bytes, and how a large one is made small."""

from __future__ import annotations

import io
import struct
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rhapsody_mcp.engine.task.function_call import encode
from rhapsody_mcp.engine.views.inspection import about, plain_text, view
from rhapsody_mcp.engine.views.pictures import Bounds, draw, facts_of
from rhapsody_mcp.model.values import load

BOUNDS = Bounds(20_000, 200)


def written(kind: str, width: int, height: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("GIF", {}),
        ("WebP", {}),
        ("WebP", {"lossless": True}),
    ],
)
def test_the_beginning_of_a_picture_tells_its_kind_and_size(kind: str, options: dict[str, Any]) -> None:
    facts = facts_of(written(kind, 321, 45, **options))
    assert facts is not None
    assert (facts.kind, facts.mime_type, facts.width, facts.height) == (kind, f"image/{kind.lower()}", 321, 45)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ('<svg xmlns="http://www.w3.org/2000/svg" width="30" height="4px"/>', (30, 4)),
        (
            '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<!-- made > by -->\n<svg viewBox="0 0 12.5 7"></svg>',
            (12, 7),
        ),
        ('\ufeff<svg width="100%"></svg>', (0, 0)),
        (' \ufeff \n<?xml version="1.0"?> <!-- a --> <!-- b -->\n\n<svg height="3"/>', (0, 3)),
        ('<svg width="1.2.3" height="5" viewBox="0 0 7 8"/>', (7, 5)),
        (f'<svg width="{"9" * 400}" height="{"9" * 2000}"/>', (0, 0)),
        (f'<svg viewBox="0 0 . {"9" * 400}"/>', (0, 0)),
        ('<svg viewBox="0 0 . ."/>', (0, 0)),
    ],
)
def test_an_svg_is_known_by_its_first_tag(text: str, size: tuple[int, int]) -> None:
    facts = facts_of(text.encode())
    assert facts is not None and facts.mime_type == "image/svg+xml" and (facts.width, facts.height) == size


@pytest.mark.parametrize(
    "data",
    [
        b" " * 100_000,
        b"<!-- a -->" * 10_000,
        b"<!-- a -->\n" * 300 + b"<!-- unfinished",
        b"<!--" * 25_000,
        b"<?xml " * 20_000,
        b"<svg " * 20_000,
        b"<svg " + b"viewBox=" * 12_500,
    ],
)
def test_text_that_only_begins_as_an_svg_does_is_told_from_one_at_once(data: bytes) -> None:
    began = time.process_time()
    assert facts_of(data) is None
    assert time.process_time() - began < 1


@given(
    st.binary(max_size=60), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF8", b"\xff\xd8\xff", b"RIFF", b"<svg "])
)
def test_any_bytes_are_told_from_pictures(data: bytes, beginning: bytes) -> None:
    facts = facts_of(beginning + data)
    assert facts is None or facts.mime_type.startswith("image/")
    assert draw(beginning + data, BOUNDS) is None or facts is not None


def test_a_picture_within_the_bounds_is_shown_as_it_is() -> None:
    data = written("PNG", 100, 100)
    drawn = draw(data, BOUNDS)
    assert drawn is not None and drawn.data == data and drawn.original is None


@pytest.mark.parametrize(("width", "height"), [(1000, 500), (150, 190), (3, 4000)])
def test_a_larger_one_is_scaled_down_until_it_fits(width: int, height: int) -> None:
    data = written("PNG", width, height)
    drawn = draw(data, BOUNDS)
    assert drawn is not None and drawn.original is not None and not drawn.why
    assert len(drawn.data) <= BOUNDS.bytes and max(drawn.facts.width, drawn.facts.height) <= BOUNDS.pixels
    assert (drawn.original.width, drawn.original.height, drawn.size) == (width, height, len(data))


def test_without_pillow_a_larger_one_is_described_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written("PNG", 1000, 500)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    drawn = draw(data, BOUNDS)
    assert drawn is not None and not drawn.data and "Pillow" in drawn.why and drawn.facts.width == 1000


PNG_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
JPEG = written("JPEG", 100, 100)
BROKEN = {
    "a header alone": PNG_HEADER + struct.pack(">II", 0, 7) + b"junk",
    "junk after the header": PNG_HEADER + struct.pack(">II", 30, 7) + b"junk",
    "a GIF without its end": written("GIF", 100, 100)[:-200],
    "a WebP without its end": written("WebP", 100, 100)[:-200],
    "a larger PNG without its end": written("PNG", 1000, 500)[:5000],
    "a JPEG without its end": JPEG[:-200],
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("pillow", [True, False])
def test_a_broken_one_is_described_and_never_sent(data: bytes, pillow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pillow:
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
    drawn = draw(data, BOUNDS)
    assert drawn is not None and not drawn.data and ("Pillow could not read it" if pillow else "broken") in drawn.why


def test_a_jpeg_whose_size_comes_late_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = b"\xff\xe2\xff\xff" + bytes(65533)
    small, large = (data[:2] + metadata * 5 + data[2:] for data in (JPEG, written("JPEG", 1000, 500)))
    bounds = Bounds(10 * len(large), 200)
    drawn = draw(small, bounds)
    assert drawn is not None and drawn.data == small and (drawn.facts.width, drawn.facts.height) == (100, 100)
    drawn = draw(large, bounds)
    assert drawn is not None and drawn.facts.width == 200 and drawn.original is not None
    assert drawn.original.width == 1000
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    drawn = draw(small, bounds)
    assert drawn is not None and not drawn.data and "size" in drawn.why


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WebP"])
def test_without_pillow_a_whole_one_within_the_bounds_is_shown(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(kind, 100, 100)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    drawn = draw(data, BOUNDS)
    assert drawn is not None and drawn.data == data and not drawn.why


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "F", "HSV", "I;16"])
def test_an_image_of_any_mode_is_drawn(mode: str) -> None:
    image = Image.new(mode, (30, 20))
    assert about(image) == "PIL picture 30x20"
    drawn = draw(image, BOUNDS)
    assert drawn is not None and (drawn.facts.width, drawn.facts.height) == (30, 20)


def test_a_figure_is_drawn_also_from_its_axes(tmp_path: Path) -> None:
    figures: Any = import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(3, 2), dpi=50)
    left, _right = figure.subfigures(1, 2)
    for value in (figure, figure.subplots(), left.subplots()):
        kept = encode(value, str(tmp_path))
        assert kept.about == "matplotlib picture 150x100" and kept.is_picture
        drawn = draw(load(kept), BOUNDS)
        assert drawn is not None and (drawn.facts.width, drawn.facts.height) == (150, 100)


def test_in_a_dict_a_picture_is_named_and_its_path_shows_it(tmp_path: Path) -> None:
    made = {"loss": 0.1, "plot": written("PNG", 30, 20), "more": [Image.new("RGB", (5, 4))]}
    assert '"plot":"PNG picture 30x20, ' in plain_text(made, 2000) and "PIL picture 5x4" in plain_text(made, 2000)
    value = encode(made, str(tmp_path))
    shown = view(value, "/more/0", None, None, 1000, (20_000, 200))["picture"]
    assert shown["about"].startswith("PNG picture 5x4") and shown["mime_type"] == "image/png"
