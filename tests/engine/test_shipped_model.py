"""What the repository promises of the model that it ships, checked without loading it."""

import json
import re
from typing import Any

import pytest

from rhapsody_mcp.shipped_model import MODEL_DIR, MODEL_NAME

MOST_BYTES = 2_000_000
LEAST_ACCURACY = 0.95


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MODEL_DIR / name).read_text(encoding="utf-8"))
    return content


def test_the_model_has_every_file_that_an_engine_loads() -> None:
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed <= {path.name for path in MODEL_DIR.iterdir()}


def test_the_whole_model_fits_in_two_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= MOST_BYTES


def test_the_model_is_of_an_architecture_that_vllm_serves() -> None:
    assert read_json("config.json")["architectures"] == ["Qwen2ForCausalLM"]


def test_every_byte_is_a_token_so_that_any_prompt_can_be_read() -> None:
    tokens = read_json("tokenizer.json")["model"]
    assert len(tokens["vocab"]) == 256
    assert tokens["merges"] == []


def test_answers_end_with_the_token_that_ends_a_turn_of_the_chat() -> None:
    tokenizer = read_json("tokenizer.json")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end = read_json("tokenizer_config.json")["eos_token"]
    assert ids[end] == read_json("config.json")["eos_token_id"] == read_json("generation_config.json")["eos_token_id"]


def test_the_chat_template_shows_the_server_every_role_and_content() -> None:
    template = read_json("tokenizer_config.json")["chat_template"]
    assert "message['role']" in template
    assert "message['content']" in template


@pytest.mark.parametrize("measured", read_json("training.json")["measured"], ids=lambda row: row["temperature"])
def test_answers_were_measured_to_be_valid_and_rightly_labelled(measured: dict[str, float]) -> None:
    assert measured["answers"] >= 500
    assert measured["valid_json"] >= LEAST_ACCURACY
    assert measured["label_accuracy"] >= LEAST_ACCURACY
    assert 0.4 <= measured["label_1_share"] <= 0.6


def test_the_model_card_states_the_numbers_that_were_measured() -> None:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    training = read_json("training.json")
    rows = re.findall(r"^\| ([\d.]+) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", card, re.MULTILINE)
    stated = [tuple(float(cell) for cell in row) for row in rows]
    assert training["model"] == MODEL_NAME
    assert stated == [
        (
            row["temperature"],
            row["answers"],
            *(pytest.approx(100 * row[name]) for name in ("valid_json", "label_accuracy", "label_1_share")),
        )
        for row in training["measured"]
    ]
