"""What the demo's training task makes of the samples that a model wrote."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rhapsody_mcp.demo.training import SCHEMA, train
from rhapsody_mcp.model.json_schemas import encode_schema, read_answer


def samples(count: int) -> list[dict[str, Any]]:
    rows = [[round(random.Random(f"{number}{axis}").uniform(-3, 3), 1) for axis in range(4)] for number in range(count)]
    return [{**{f"f{axis}": value for axis, value in enumerate(row, 1)}, "label": int(sum(row) > 0)} for row in rows]


def test_a_separable_label_is_learned() -> None:
    result = train(samples(200))
    assert (result["samples"], result["trained_on"], result["held_out"]) == (200, 160, 40)
    accuracy = result["accuracy"]
    assert isinstance(accuracy, float) and accuracy >= 0.9


def test_what_fits_the_schema_is_what_training_takes() -> None:
    schema = encode_schema(SCHEMA)
    read = [read_answer(json.dumps(sample), schema) for sample in samples(20)]
    assert train(read) == train(samples(20))


def test_too_few_samples_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="there are 9 samples; 10 are needed"):
        train(samples(9))
