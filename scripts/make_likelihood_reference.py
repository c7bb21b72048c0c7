#!/usr/bin/env python3
"""Makes clients/openai_2/tasks/*.jsonl: tasks for lm-eval, with the answers that the Hugging Face
implementation gives in float32 to the very weights that the GGUF file holds.

    python3 -m venv venv && venv/bin/pip install torch transformers gguf tokenizers
    venv/bin/python scripts/make_likelihood_reference.py SmolLM2-135M-Instruct.Q4_1.gguf

Only maintainers run this. The tests read the stored files, and need no torch.
"""

import json
import pathlib
import sys

import gguf
import torch
import transformers

from smollm2_tokenizer import load_tokenizer

TASKS = pathlib.Path(__file__).parent.parent / "clients/openai_2/tasks"
# Tokens of a continuation, which ends at a line's end, too.
NEW_TOKENS = 16
# Where two choices or two tokens are nearer than this, the order of sums decides between them.
MARGIN_MIN = 0.01

CHOICES = [
    ("The largest ocean on Earth is the", ["Pacific", "Atlantic", "Arctic"]),
    ("The sun rises in the", ["east", "west", "kitchen"]),
    ("Water freezes at", ["zero degrees Celsius", "one hundred degrees Celsius"]),
    ("A week has", ["seven days", "five days", "nine days", "a hundred days"]),
    ("Die Hauptstadt von Österreich ist", ["Wien", "Zürich", "Köln"]),
    ("Romeo and Juliet was written by", ["William Shakespeare", "Charles Dickens"]),
    ("2 + 2 =", ["4", "5", "22"]),
    ("Cats like to chase", ["mice", "aeroplanes 🛩", "the 17th of May"]),
    ("def add(a, b):\n    return", ["a + b", "a - b", "b"]),
    ("The opposite of hot is", ["cold", "warm", "hot"]),
    ("北京是", ["中国的首都", "日本的首都"]),
    ("Once upon a time, there was a little", ["girl", "boy", "tax"]),
]
TEXTS = [
    "The sun rises in the east and sets in the",
    "One, two, three, four, five,",
    "The first president of the United States was",
    "def fibonacci(n):\n    if n <= 1:\n        return",
    "The colours of the rainbow are red, orange,",
    "Water is made of hydrogen and",
    "In the year 1969, the first man walked on",
    "The quick brown fox jumps over",
    "Monday, Tuesday, Wednesday,",
    "import numpy as",
]


@torch.no_grad()
def logprobs(model, ids):
    """[tokens, vocabulary]: what the model expects behind each token."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def likelihood(model, tokenizer, context, continuation):
    """The continuation's log-likelihood, and whether it is greedy, as lm-eval asks for it: all is
    encoded together, and what the context alone does not have is the continuation."""
    ids = tokenizer.encode(context + continuation, add_special_tokens=False).ids
    start = len(tokenizer.encode(context, add_special_tokens=False).ids)
    rows = logprobs(model, ids)
    places = range(start, len(ids))
    total = sum(float(rows[at - 1, ids[at]]) for at in places)
    return round(total, 4), all(int(rows[at - 1].argmax()) == ids[at] for at in places)


def continuation(model, tokenizer, text):
    """The greedy continuation of a text to the line's end, and how nearly it was another."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    start, margin = len(ids), float("inf")
    while len(ids) < start + NEW_TOKENS:
        row = logprobs(model, ids)[-1]
        margin = min(margin, float(row.topk(2).values.diff().abs()))
        ids.append(int(row.argmax()))
        said = tokenizer.decode(ids[start:], skip_special_tokens=True)
        if "\n" in said:
            break
    return said.split("\n")[0], margin


def main():
    torch.set_num_threads(2)
    path = pathlib.Path(sys.argv[1]).resolve()
    tokenizer = load_tokenizer(gguf.GGUFReader(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    lines = []
    for text, choices in CHOICES:
        scores = [likelihood(model, tokenizer, text, f" {choice}") for choice in choices]
        best, second = sorted((score for score, _ in scores), reverse=True)[:2]
        assert best - second > MARGIN_MIN, text
        answer = [score for score, _ in scores].index(best)
        lines.append({"text": text, "choices": choices, "answer": answer, "likelihoods": scores})
    write("choices.jsonl", lines)

    lines = []
    for text in TEXTS:
        said, margin = continuation(model, tokenizer, text)
        if margin > MARGIN_MIN:
            lines.append({"text": text, "continuation": said})
    write("continuations.jsonl", lines)


def write(name, lines):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (TASKS / name).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
