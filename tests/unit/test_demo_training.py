"""What the demo's training task makes of a model's answers."""

from __future__ import annotations

import random

import pytest

from rhapsody_mcp.demo_training import parse, train


def answers(count: int) -> list[str]:
    rows = [[round(random.Random(f"{number}{axis}").uniform(-3, 3), 1) for axis in range(4)] for number in range(count)]
    return [f'{{"f1": {a}, "f2": {b}, "f3": {c}, "f4": {d}, "label": {int(a + b + c + d > 0)}}}' for a, b, c, d in rows]


def test_a_separable_label_is_learned_and_what_is_no_sample_is_counted() -> None:
    result = train([*answers(200), "no JSON", '{"f1": 1}', '{"f1": "x", "f2": 1, "f3": 1, "f4": 1, "label": 1}'])
    assert (result["samples"], result["unparsable"]) == (200, 3)
    assert (result["trained_on"], result["held_out"]) == (160, 40)
    accuracy = result["accuracy"]
    assert isinstance(accuracy, float) and accuracy >= 0.9


@pytest.mark.parametrize(
    ("text", "sample"),
    [
        ('{"f1": 1, "f2": 2, "f3": 3, "f4": -1.5, "label": 1}', ([1.0, 2.0, 3.0, -1.5], 1)),
        ('Sure!\n```json\n{"f1": 1, "f2": 2, "f3": 3, "f4": 4, "label": 0}\n```', ([1.0, 2.0, 3.0, 4.0], 0)),
        ('{"f1": 1, "f2": 2, "f3": 3, "f4": 4, "label": 2}', None),
        ('{"f1": NaN, "f2": 2, "f3": 3, "f4": 4, "label": 1}', None),
        ('{"f1": 1, "f2": 2, "f3": 3, "f4": 4}', None),
        ("} {", None),
        ("[1]", None),
    ],
)
def test_a_sample_is_found_in_an_answer_or_there_is_none(text: str, sample: object) -> None:
    assert parse(text) == sample


def test_too_few_samples_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="of 12 answers only 9 are samples; 10 are needed"):
        train([*answers(9), "", "", ""])
