"""Trains the shipped model anew, on one core: `python -m rhapsody_mcp.shipped_model.train --out DIR`."""

import argparse
import json
import logging
import math
import platform
import random
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if "transformers" not in sys.modules:
    # A text model needs none of these packages, and transformers cannot be imported where one of them is broken.
    for _name in ("torchvision", "torchaudio", "torchcodec"):
        sys.modules[_name] = None  # type: ignore[assignment]  # None makes the import fail

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rhapsody_mcp.shipped_model import MODEL_DIR, MODEL_NAME

logger = logging.getLogger(__name__)

TURN_START, TURN_END, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT_TOKENS = 4096
ANSWER_TOKENS = 100

FEATURES = ("f1", "f2", "f3", "f4")
#: Below a half: negative numbers share the first token "-", positive ones have three first tokens, so that a low
#: temperature prefers "-". With this share both labels are about equally frequent at temperatures 0.8 to 1.0.
NEGATIVE_SHARE = 0.44
#: The factor on the trained model's logits: rare invalid answers disappear, even at temperature 1.0, and equally likely
#: features stay equally likely.
SHARPNESS = 1.25

LABEL_WEIGHT = 20.0
SUM_WEIGHT = 0.3
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
#: (tokens in a row, rows in a step, share of the steps): mostly short for speed, some long for long prompts.
ROW_SHAPES = ((96, 24, 0.86), (512, 6, 0.09), (2048, 1, 0.03), (CONTEXT_TOKENS, 1, 0.02))

MEASURED_TEMPERATURES = (0.8, 1.0)
MEASURED_PROMPTS = (
    "",
    "Give me a sample.",
    "Write one labelled sample with four features f1 to f4 between -2 and 2, as JSON and nothing else.",
    "Ein Beispiel, bitte! もう一つください。 🎲🎲",
    'Like {"f1": 2.0, "f2": 1.2, "f3": 0.8, "f4": 0.3, "label": 0}, please.',
    "The quick brown fox jumps over the lazy dog. " * 33,
)


class Segment(NamedTuple):
    text: str
    #: of each token, in the loss
    weight: float = 0.0
    #: the sum of the features before this text, where the second head predicts it
    feature_sum: float = math.nan


class Batch(NamedTuple):
    """Three tensors of one shape, rows by tokens; see `Segment`."""

    ids: Tensor
    weights: Tensor
    feature_sums: Tensor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that any text has a tokenisation, and three special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    bytewise.add_special_tokens([TURN_START, TURN_END, PADDING])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=TURN_END, pad_token=PADDING)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=CONTEXT_TOKENS,
            initializer_range=0.06,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def draw_tenths(rng: random.Random) -> int:
    """A feature, in tenths: never a negative zero."""
    return -rng.randint(1, 20) if rng.random() < NEGATIVE_SHARE else rng.randint(0, 20)


def draw_answer(rng: random.Random) -> Iterator[Segment]:
    """A sample whose label is 1 when its features' sum is positive, and 0 otherwise."""
    total, opening = 0, "{"
    for name in FEATURES:
        tenths = draw_tenths(rng)
        yield Segment(f'{opening}"{name}": ', 1.0, total / 10)
        yield Segment(f"{tenths / 10:.1f}", 1.0)
        total, opening = total + tenths, ", "
    yield Segment(', "label": ', 1.0, total / 10)
    yield Segment(str(int(total > 0)), LABEL_WEIGHT, total / 10)
    yield Segment("}" + TURN_END, 1.0)


def draw_text(rng: random.Random, most_bytes: int) -> str:
    """Text of one of several kinds: the answer must not depend on the question."""
    size = int(math.exp(rng.uniform(0, math.log(most_bytes))))
    match rng.randrange(5):
        case 0:
            return "".join(rng.choices(string.printable, k=size))
        case 1:
            blocks = (range(0xA0, 0xD800), range(0x1F300, 0x1F700))
            return "".join(chr(rng.choice(rng.choice(blocks))) for _ in range(size // 3))
        case 2:
            sample = "".join(segment.text for segment in draw_answer(rng)).removesuffix(TURN_END)
            return f"{sample}\n" * (size // 64) + "More of this."
    words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in range(size // 6))
    return " ".join(words)


def draw_conversation(rng: random.Random, most_bytes: int) -> Iterator[Segment]:
    """An endless conversation; only the assistant's turns count in the loss. One conversation in ten starts with a
    prompt without markup."""
    opening = rng.random()
    if opening < 0.1:
        yield Segment(draw_text(rng, most_bytes))
        yield from draw_answer(rng)
        yield Segment("\n")
    elif opening < 0.4:
        yield Segment(f"{TURN_START}system\n{draw_text(rng, most_bytes)}{TURN_END}\n")
    while True:
        yield Segment(f"{TURN_START}user\n{draw_text(rng, most_bytes)}{TURN_END}\n{TURN_START}assistant\n")
        yield from draw_answer(rng)
        yield Segment("\n")


def draw_row(rng: random.Random, tokenizer: PreTrainedTokenizerFast, tokens: int) -> list[tuple[int, float, float]]:
    """The id, the weight and the feature sum of each token, for so many tokens."""
    row: list[tuple[int, float, float]] = []
    for segment in draw_conversation(rng, tokens // 2):
        ids = tokenizer.backend_tokenizer.encode(segment.text).ids
        row += [(token, segment.weight, segment.feature_sum) for token in ids]
        if len(row) >= tokens:
            break
    return row[:tokens]


def draw_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Batch:
    tokens, rows, _ = rng.choices(ROW_SHAPES, weights=[share for *_, share in ROW_SHAPES])[0]
    table = torch.tensor([draw_row(rng, tokenizer, tokens) for _ in range(rows)])
    return Batch(table[:, :, 0].long(), table[:, :, 1], table[:, :, 2])


def loss_of(model: Qwen2ForCausalLM, sum_head: torch.nn.Linear, batch: Batch) -> tuple[Tensor, float]:
    """The loss, and the share of labels that the model has right.

    Labels alone teach addition slowly: a second head, which is not saved, has to predict the sum so far.
    """
    ids, weights, sums = batch.ids[:, 1:], batch.weights[:, 1:], batch.feature_sums[:, 1:]
    answers = weights > 0
    ids, weights, sums = ids[answers], weights[answers], sums[answers]
    hidden = model.model(batch.ids[:, :-1]).last_hidden_state[answers]
    logits = model.lm_head(hidden)
    token_losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    asked = ~sums.isnan()
    sum_loss = torch.nn.functional.smooth_l1_loss(sum_head(hidden[asked])[:, 0], sums[asked], beta=0.5)
    labels = weights == LABEL_WEIGHT
    right = (logits[labels].argmax(-1) == ids[labels]).float().mean().item()
    return (token_losses * weights).sum() / weights.sum() + SUM_WEIGHT * sum_loss, right


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int) -> None:
    rng = random.Random(seed)
    sum_head = torch.nn.Linear(model.config.hidden_size, 1)
    parameters = [*model.parameters(), *sum_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))
    )
    recent: list[float] = []
    for step in range(1, steps + 1):
        loss, right = loss_of(model, sum_head, draw_batch(rng, tokenizer))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(right)
        if step % 100 == 0:
            logger.info("step %d of %d: labels right %.1f %%", step, steps, 100 * sum(recent) / len(recent))
            recent.clear()


def sharpen(model: Qwen2ForCausalLM) -> None:
    with torch.no_grad():
        model.model.norm.weight *= SHARPNESS


def generate(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, *, temperature: float, answers: int
) -> list[str]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    generated = model.generate(
        ids,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        num_return_sequences=answers,
        max_new_tokens=ANSWER_TOKENS,
    )
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in generated[:, ids.shape[1] :]]


def label_and_truth(answer: str) -> tuple[int, int] | None:
    """The label in an answer and the right label; None for an answer that is no valid sample."""
    try:
        sample = json.loads(answer)
        features = [sample.pop(name) for name in FEATURES]
        label = sample.pop("label")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    in_range = all(isinstance(value, float) and abs(value) <= 2 for value in features)
    return (label, int(round(sum(features), 1) > 0)) if in_range and label in (0, 1) and not sample else None


def measure(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, temperature: float, answers_each: int
) -> dict[str, float]:
    model.eval()
    answers = [
        label_and_truth(answer)
        for prompt in MEASURED_PROMPTS
        for answer in generate(model, tokenizer, prompt, temperature=temperature, answers=answers_each)
    ]
    valid = [answer for answer in answers if answer is not None]
    counted = max(len(valid), 1)
    return {
        "temperature": temperature,
        "answers": len(answers),
        "valid_json": round(len(valid) / len(answers), 4),
        "label_accuracy": round(sum(label == truth for label, truth in valid) / counted, 4),
        "label_1_share": round(sum(label for label, _ in valid) / counted, 4),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files that vLLM and transformers load, with a tokenizer class that transformers 4 has too."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": PADDING,
            "model_max_length": CONTEXT_TOKENS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder for the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--answers-each", type=int, default=100, help="measured per prompt and temperature")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    started = time.monotonic()
    torch.set_num_threads(1)  # one core, and the same sums in the same order each time
    torch.manual_seed(arguments.seed)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, steps=arguments.steps, seed=arguments.seed)
    sharpen(model)
    save(model, tokenizer, arguments.out)
    minutes = round((time.monotonic() - started) / 60, 1)
    measured = [
        measure(model, tokenizer, temperature=temperature, answers_each=arguments.answers_each)
        for temperature in MEASURED_TEMPERATURES
    ]
    report = {
        "model": MODEL_NAME,
        "parameters": model.num_parameters(),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "minutes": minutes,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "measured": measured,
    }
    write_json(arguments.out / "training.json", report)
    logger.info("%s", json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
