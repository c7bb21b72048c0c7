"""The tokenizer of SmolLM2 as Hugging Face has it, from what its GGUF file holds."""

import json
import pathlib

import gguf
import tokenizers


def field(reader, name):
    return reader.fields[name].contents()


def load_tokenizer(reader):
    """The tokenizer of SmolLM2: digits alone, then byte-level BPE."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    types = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer


def write_folder(model_path, folder):
    """Writes a folder that `AutoTokenizer.from_pretrained` reads."""
    reader = gguf.GGUFReader(model_path)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    load_tokenizer(reader).save(str(folder / "tokenizer.json"))
    tokens = field(reader, "tokenizer.ggml.tokens")
    end = tokens[field(reader, "tokenizer.ggml.eos_token_id")]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "chat_template": field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
