"""Renders crates/minisgl-text/tests/data/conversations.json with Hugging Face `transformers`.

Each model's chat template gives one file of expected texts, in the order of the conversations; an
object with `error` stands where the template refuses the conversation.

    pip install transformers==5.23.0 jinja2==3.1.6
    python scripts/make_chat_references.py
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent.parent / "crates/minisgl-text/tests/data"

# The variables that a template may use beside the conversation: (bos_token, eos_token).
SPECIAL_TOKENS = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen3": (None, "<|im_end|>"),
    "mistral-nemo": ("<s>", "</s>"),
    "gemma-3": ("<bos>", "<eos>"),
}


def render(tokenizer, conversation):
    try:
        return tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools"),
            add_generation_prompt=conversation.get("add_generation_prompt", True),
            continue_final_message=conversation.get("continue_final_message", False),
            tokenize=False,
            **conversation.get("kwargs", {}),
        )
    except Exception as error:  # A template may fail in any way.
        return {"error": str(error)}


def main():
    conversations = json.loads((DATA / "conversations.json").read_text())
    for model, (bos, eos) in SPECIAL_TOKENS.items():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(BPE()), bos_token=bos, eos_token=eos
        )
        tokenizer.chat_template = (DATA / f"templates/{model}.jinja").read_text()
        lines = [json.dumps(render(tokenizer, c), ensure_ascii=False) for c in conversations]
        (DATA / f"rendered/{model}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
        errors = sum('{"error"' in line[:9] for line in lines)
        print(f"{model}: {len(lines) - errors} texts, {errors} errors")


if __name__ == "__main__":
    main()
