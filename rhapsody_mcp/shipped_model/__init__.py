"""The small language model of this package, which answers every chat with a labelled JSON sample."""

from pathlib import Path

MODEL_NAME = "rhapsody-tiny"
MODEL_DIR = Path(__file__).parent / "weights"
