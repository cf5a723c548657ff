"""The demo's training task: this file is submitted as it is, as the source of a task."""

from __future__ import annotations

import math
import random
from typing import Any

FEATURES = ("f1", "f2", "f3", "f4")
SCHEMA = {
    "type": "object",
    "properties": {
        **{name: {"type": "number", "minimum": -3, "maximum": 3} for name in FEATURES},
        "label": {"enum": [0, 1]},
    },
    "required": [*FEATURES, "label"],
    "additionalProperties": False,
}
"""What the model writes, and `train` reads."""
LEAST = 10
EPOCHS, RATE = 300, 0.5

Sample = tuple[list[float], int]


def train(objects: list[dict[str, Any]]) -> dict[str, object]:
    """Learn the label from the features by logistic regression; accuracy is measured on a fifth held out."""
    if len(objects) < LEAST:
        raise ValueError(f"there are {len(objects)} samples; {LEAST} are needed to train")
    samples: list[Sample] = [([found[name] for name in FEATURES], found["label"]) for found in objects]
    random.Random(0).shuffle(samples)
    held_out, training = samples[: len(samples) // 5], samples[len(samples) // 5 :]
    weights = fit(training)
    ones = sum(label for _, label in held_out)
    return {
        "samples": len(samples),
        "trained_on": len(training),
        "held_out": len(held_out),
        "accuracy": sum(predict(weights, features) == label for features, label in held_out) / len(held_out),
        "accuracy_of_the_commoner_label": max(ones, len(held_out) - ones) / len(held_out),
        "weights": dict(zip((*FEATURES, "bias"), (round(weight, 3) for weight in weights), strict=True)),
        "examples": objects[:3],
    }


def fit(samples: list[Sample]) -> list[float]:
    """Weights of the features, and the bias, by gradient descent on the logistic loss."""
    weights = [0.0] * (len(FEATURES) + 1)
    for _ in range(EPOCHS):
        slope = [0.0] * len(weights)
        for features, label in samples:
            error = 1 / (1 + math.exp(-max(-30.0, min(30.0, score(weights, features))))) - label
            for index, value in enumerate((*features, 1.0)):
                slope[index] += error * value / len(samples)
        weights = [weight - RATE * step for weight, step in zip(weights, slope, strict=True)]
    return weights


def predict(weights: list[float], features: list[float]) -> int:
    return int(score(weights, features) > 0)


def score(weights: list[float], features: list[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, (*features, 1.0), strict=True))
