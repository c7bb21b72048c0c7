#!/usr/bin/env python3
"""Makes crates/minisgl-cpu/tests/data/blocks.txt: random blocks of every GGUF type, and what
llama.cpp's own Python package decodes them to. A line a type: its name, the blocks, the values as
little-endian floats, both in hexadecimal.

    pip install gguf numpy
    python scripts/make_block_reference.py
"""

import pathlib

import gguf
import numpy as np

OUT = pathlib.Path(__file__).parent.parent / "crates/minisgl-cpu/tests/data/blocks.txt"
# Type, and where in a block its f16 scales stand: random bytes there would be NaN or huge.
TYPES = [
    ("Q4_0", [0]), ("Q4_1", [0, 2]), ("Q5_0", [0]), ("Q5_1", [0, 2]), ("Q8_0", [0]),
    ("Q4_K", [0, 2]), ("Q5_K", [0, 2]), ("Q6_K", [208]),
]
BLOCKS = 2


def main():
    random = np.random.default_rng(7)
    lines = []
    for name, scales in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
        for at in scales:
            values = random.normal(0, 0.1, (BLOCKS, 1)).astype(np.float16)
            blocks[:, at:at + 2] = values.view(np.uint8)
        values = gguf.quants.dequantize(blocks, kind).astype("<f4")
        lines.append(f"{name} {blocks.tobytes().hex()} {values.tobytes().hex()}\n")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("".join(lines))


main()
