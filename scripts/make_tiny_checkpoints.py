#!/usr/bin/env python3
"""Makes the stored references of tiny random models: crates/minisgl-engine/tests/tiny/NAME.

Weights are not stored. Both sides compute them: element i of tensor `name` is

    u = (splitmix64(fnv1a64(name) + i) >> 40) / 2**24 - 0.5          (exact in float32)

times a scale by the tensor's kind (see `weights`). What is stored per model: `config.json` as
transformers writes it, and `expected.json` with the tensors' names and shapes, a prompt, the
tokens that greedy decoding adds to it, log-softmax of every position's logits (float32, base64)
as transformers computes them in float32, and how far transformers itself is from them in bfloat16:
the largest difference over the largest magnitude.

Run with: pip install torch transformers safetensors numpy; python scripts/make_tiny_checkpoints.py
"""

import base64
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.numpy import save_file

VOCAB = 120
OUT = pathlib.Path(__file__).parent.parent / "crates/minisgl-engine/tests/tiny"


# Where the head is the embedding, or embeddings are scaled up, large ones drown what layers add, and
# greedy decoding repeats itself.
EMBEDDING_SCALES = {"gemma3": 0.1, "qwen2": 1.0}


def weights(name, shape, embedding_scale):
    hash_ = 0xCBF29CE484222325
    for byte in name.encode():
        hash_ = ((hash_ ^ byte) * 0x100000001B3) % 2**64
    with np.errstate(over="ignore"):
        z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(hash_)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    if "norm" in name and name.endswith("weight"):
        u = np.float32(1) + u
    elif "embed_tokens" in name:
        u = u * np.float32(embedding_scale)
    else:
        u = u * np.float32(0.5)
    return u.reshape(shape)


COMMON = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False, attn_implementation="eager",
)


def models():
    def llama(**extra):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, **extra}))

    heads = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    yield "llama", llama(**heads, rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=32))
    yield "llama-yarn", llama(**heads, tie_word_embeddings=True, rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64))
    yield "llama-linear", llama(num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))
    yield "llama-dynamic", llama(num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=24,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))
    mistral = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=80, sliding_window=8)
    yield "mistral", hf.MistralForCausalLM(hf.MistralConfig(**{**COMMON, **mistral}))
    text = hf.MistralConfig(**{**COMMON, **mistral, "sliding_window": None})
    vision = hf.PixtralVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, image_size=16, patch_size=8)
    yield "mistral3", hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=False))
    yield "qwen2", hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**COMMON,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}))
    # Sizes that are no multiples of what vectors hold; windows from the second layer on.
    yield "qwen2-window", hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**COMMON,
        "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3, "use_sliding_window": True,
        "max_window_layers": 1, "sliding_window": 8}))
    yield "qwen3", hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**COMMON,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128}))
    yield "qwen3-moe", hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**COMMON,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 96,
        "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]}))
    # Of four layers only the second has experts: the step leaves out 0 and 2, the list 3.
    yield "qwen3-moe-sparse", hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**COMMON,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 48,
        "num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 40, "norm_topk_prob": False, "decoder_sparse_step": 2,
        "mlp_only_layers": [3]}))
    yield "gemma3", hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**{**COMMON,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 144,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True}))


@torch.no_grad()
def forward(model, ids, prompt_len):
    """Logits of all positions. A dynamic rotation depends on how far the sequence had come when a
    key was cached, so that such a model is run as in serving: the prompt, then token by token."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "dynamic":
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    cache, rows = hf.DynamicCache(), []
    for part in [ids[:prompt_len]] + [[token] for token in ids[prompt_len:]]:
        step = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
        rows.append(step.logits[0])
    return torch.cat(rows)


def log_softmax(logits):
    return torch.log_softmax(logits.double(), -1).float().numpy()


def reference(model, prompt):
    ids = list(prompt)
    for _ in range(32):
        ids.append(int(forward(model, ids, len(prompt))[-1].argmax()))
    logits = forward(model, ids, len(prompt))
    margins = logits.topk(2).values
    print("  smallest margin", float((margins[:, 0] - margins[:, 1])[len(prompt) - 1:].min()))
    return ids[len(prompt):], log_softmax(logits)


def main():
    torch.manual_seed(0)
    prompt = [1] + [(7 * i * i + 3 * i + 5) % VOCAB for i in range(19)]
    for name, model in models():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        print(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            path = pathlib.Path(folder, "model.safetensors")
            with safe_open(path, "np") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            scale = EMBEDDING_SCALES.get(name, 2.0)
            save_file({key: weights(key, shape, scale) for key, shape in shapes.items()}, path,
                metadata={"format": "pt"})
            def load(dtype):
                return type(model).from_pretrained(
                    folder, dtype=dtype, attn_implementation="eager").eval()
            tokens, logprobs = reference(load(torch.float32), prompt)
            rounded = log_softmax(forward(load(torch.bfloat16), prompt + tokens, len(prompt)))
            noise = float(np.abs(rounded - logprobs).max() / np.abs(logprobs).max())
            print("  bfloat16 is off by", noise)
            out = OUT / name
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_bytes(pathlib.Path(folder, "config.json").read_bytes())
        tensors = [[key, list(shape)] for key, shape in sorted(shapes.items())]
        expected = dict(transformers=hf.__version__, embedding_scale=scale, tensors=tensors,
            prompt=prompt,
            tokens=tokens, bf16_noise=round(noise, 6), logprobs=base64.b64encode(logprobs.tobytes()).decode())
        (out / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


main()
