#!/usr/bin/env python3
"""Makes crates/minisgl/tests/data/smollm2_reference.json: what the Hugging Face implementation
generates, in float32, from the very weights that the GGUF file holds.

    python3 -m venv venv && venv/bin/pip install torch transformers gguf tokenizers jinja2
    venv/bin/python scripts/make_smollm2_reference.py SmolLM2-135M-Instruct.Q4_1.gguf

Only maintainers run this. The tests read the stored file, and need no Python.
"""

import hashlib
import json
import pathlib
import sys

import gguf
import jinja2
import torch
import transformers

from smollm2_tokenizer import field, load_tokenizer

OUT = pathlib.Path(__file__).parent.parent / "crates/minisgl/tests/data/smollm2_reference.json"
NEW_TOKENS = 48
# Positions of the prompt's end and of the answer whose most likely logits are stored.
LOGIT_POSITIONS = 8
LOGITS_STORED = 16
# Where the two most likely tokens are nearer than this, the order of sums decides, and neither
# token is wrong: such a case is left out.
MARGIN_MIN = 0.001

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List the numbers 7, 42, 1000 and 31337 in words.",
    "def fibonacci(n):\n    # finish this function\n",
    "Was ist der Unterschied zwischen einem Apfel und einer Birne?",
    "Schreibe drei Wörter, die mit Ü beginnen, bitte.",
    "¿Cuál es la montaña más alta de España?",
    "Écris une phrase à propos d'un café où l'on a déjà mangé.",
    "What do these mean: 🎉🚀👩‍👩‍👧 and ☕?",
    "你好！请介绍一下北京。",
    "请用中文写一首关于月亮的短诗。",
    "一年有几个月？",
    "  Spaces   and\ttabs\n\n\nand newlines, don't we'll I'm?!  ",
]


@torch.no_grad()
def greedy(model, ids, eos):
    """Greedy tokens, and the logits that each of them was taken from."""
    answer, logits = [], []
    cache = None
    step = torch.tensor([ids])
    while len(answer) < NEW_TOKENS:
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        row = out.logits[0, -1].float()
        token = int(row.argmax())
        logits.append(row)
        answer.append(token)
        if token in eos:
            break
        step = torch.tensor([[token]])
    return answer, logits


def main():
    torch.set_num_threads(2)
    path = pathlib.Path(sys.argv[1]).resolve()
    reader = gguf.GGUFReader(path)
    tokenizer = load_tokenizer(reader)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(field(reader, "tokenizer.chat_template"))
    eos = {field(reader, "tokenizer.ggml.eos_token_id")}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    cases = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = template.render(messages=messages, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        answer, logits = greedy(model, ids, eos)
        margin = min(float(row.topk(2).values.diff().abs()) for row in logits)
        if margin < MARGIN_MIN:
            print(f"left out, margin {margin:.5f}: {prompt!r}")
            continue
        stored = []
        for row in logits[:LOGIT_POSITIONS]:
            top = row.log_softmax(-1).topk(LOGITS_STORED)
            stored.append([[int(i), round(float(v), 5)] for i, v in zip(top.indices, top.values)])
        shown = answer[:-1] if answer[-1] in eos else answer
        cases.append(
            {
                "prompt": prompt,
                "prompt_ids": ids,
                "answer_ids": answer,
                "answer": tokenizer.decode(shown, skip_special_tokens=False),
                "smallest_margin": round(margin, 5),
                "logprobs": stored,
            }
        )
        print(f"{len(ids):4} + {len(answer):3}, margin {margin:.4f}: {cases[-1]['answer'][:60]!r}")

    reference = {
        "made_by": "scripts/make_smollm2_reference.py",
        "file": path.name,
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": cases,
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(reference, ensure_ascii=False, indent=None) + "\n")


if __name__ == "__main__":
    main()
