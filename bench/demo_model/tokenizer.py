"""The demo model's tokenizer: byte-level BPE with 2048 entries, every digit on its own.

All 256 bytes are in the vocabulary, so any UTF-8 text can be encoded.

    python -m bench.demo_model.tokenizer --output DIR
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .tasks import train_tasks

VOCAB_SIZE = 2048
PAD, USER, ASSISTANT, SYSTEM, END, MASK = range(6)
SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|MASK|>",
)  # fmt: skip

# words with one leading space; single digits; punctuation with the newline that follows it;
# line breaks; other white space
SPLIT_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The vocabulary comes from the tasks; these sentences only keep everyday English from falling
# apart into single letters.
PLAIN_ENGLISH: tuple[str, ...] = (
    "You are a helpful assistant. Answer briefly and show your steps.",
    "Please explain what this does, why it matters, and how it could be done better.",
    "The quick answer is that we do not know yet, but there should be more information soon.",
    "Hello! Thank you for your question. Could you tell me something about yourself?",
    "Once upon a time there was a small model that could only do what it had been trained for.",
    "Write a function that takes a string and returns the number of vowels it contains.",
    "What would happen if they were to start again with other people in another country?",
    "I would like to know which of these things are true and which of them are false.",
)

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "Answer briefly and show your steps.",
    "You solve small tasks step by step.",
)

# One line: a template file is easier to keep equal to `render` below this way.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """What `CHAT_TEMPLATE` renders, without jinja."""
    text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
    return text + "<|assistant|>" if add_generation_prompt else text


def train_tokenizer(seed: int = 0, examples: int = 30_000) -> Tokenizer:
    """Trains the BPE on generated tasks. Returns a tokenizer with exactly `VOCAB_SIZE` entries
    (or fewer when the text has no more pairs to merge)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = [part for t in islice(train_tasks(seed), examples) for part in (t.prompt, t.answer)]
    tokenizer.train_from_iterator([*text, *(PLAIN_ENGLISH * 50)], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json in the layout of HF."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "mask_token": SPECIAL_TOKENS[MASK],
        "additional_special_tokens": list(SPECIAL_TOKENS[1:4]),
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.seed)
    save_tokenizer(tokenizer, args.output)
    print(f"{tokenizer.get_vocab_size()} entries -> {args.output}")


if __name__ == "__main__":
    main()
