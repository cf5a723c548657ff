"""The demo's training task: this file is submitted as it is, as the source of a task."""

from __future__ import annotations

import json
import math
import random

FEATURES = ("f1", "f2", "f3", "f4")
LEAST = 10
EPOCHS, RATE = 300, 0.5

Sample = tuple[list[float], int]


def train(texts: list[str]) -> dict[str, object]:
    """Learn the label from the features by logistic regression; accuracy is measured on a fifth held out."""
    samples = [sample for text in texts if (sample := parse(text)) is not None]
    if len(samples) < LEAST:
        raise ValueError(f"of {len(texts)} answers only {len(samples)} are samples; {LEAST} are needed to train")
    random.Random(0).shuffle(samples)
    held_out, training = samples[: len(samples) // 5], samples[len(samples) // 5 :]
    weights = fit(training)
    ones = sum(label for _, label in held_out)
    return {
        "samples": len(samples),
        "unparsable": len(texts) - len(samples),
        "trained_on": len(training),
        "held_out": len(held_out),
        "accuracy": sum(predict(weights, features) == label for features, label in held_out) / len(held_out),
        "accuracy_of_the_commoner_label": max(ones, len(held_out) - ones) / len(held_out),
        "weights": dict(zip((*FEATURES, "bias"), (round(weight, 3) for weight in weights), strict=True)),
        "examples": texts[:3],
    }


def parse(text: str) -> Sample | None:
    """The sample that a model's answer holds, if it holds one."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        features = [float(found[name]) for name in FEATURES]
    except (ValueError, KeyError, TypeError):
        return None
    label = found.get("label")
    return (features, label) if label in (0, 1) and all(map(math.isfinite, features)) else None


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
