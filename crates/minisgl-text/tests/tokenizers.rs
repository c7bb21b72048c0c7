//! Tokenizers: the same ids and texts as Hugging Face's on every stored string, from
//! `tokenizer.json` and from the same vocabulary as GGUF files hold it.
//!
//! The files are too large to be stored here: the environment variable MINISGL_TOKENIZERS names a
//! folder that holds them (`scripts/make_token_references.py` says which); without it, the tests
//! of the large vocabularies say so and pass.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use minisgl_text::{Detokenizer, GgufTokenType, GgufVocab, Special, Tokenizer};
use serde_json::Value;

fn values(name: &str) -> Vec<Value> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn tokenizer_json(model: &str) -> Option<Vec<u8>> {
    let Some(folder) = std::env::var_os("MINISGL_TOKENIZERS") else {
        eprintln!("skipped: MINISGL_TOKENIZERS names no folder with {model}/tokenizer.json");
        return None;
    };
    let path = Path::new(&folder).join(model).join("tokenizer.json");
    Some(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

fn agrees(what: &str, model: &str, tokenizer: &Tokenizer) {
    let mut wrong = Vec::new();
    for (text, expected) in
        values("strings.json").iter().zip(values(&format!("encoded/{model}.json")))
    {
        let text = text.as_str().expect("strings");
        let ids: Vec<u32> = serde_json::from_value(expected[0].clone()).expect("ids");
        let found = tokenizer.encode(text, Special::Parse);
        if found != ids {
            wrong.push(format!("{text:?} is {found:?}, not {ids:?}"));
        }
        // Hugging Face's Llama 2 leaves out the space that it put in front; here it is text.
        let decoded = tokenizer.decode(&ids, false);
        let expected = expected[1].as_str().unwrap_or(text);
        if decoded != expected && decoded.strip_prefix(' ') != Some(expected) {
            wrong.push(format!("{ids:?} decodes to {decoded:?}, not {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{what}: {} differences:\n{}", wrong.len(), wrong.join("\n"));
}

/// What a converter would write into a GGUF file for a `tokenizer.json`.
fn as_gguf(tokenizer_json: &[u8], pre: Option<&str>) -> GgufVocab {
    let json: Value = serde_json::from_slice(tokenizer_json).expect("it is JSON");
    let vocab = json["model"]["vocab"].as_object().expect("a vocabulary");
    let added = json["added_tokens"].as_array().expect("added tokens");
    let ids = vocab.values().chain(added.iter().map(|token| &token["id"]));
    let size = ids.filter_map(Value::as_u64).max().expect("ids") as usize + 1;
    let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
    let mut token_types = vec![GgufTokenType::Unused; size];
    for (token, id) in vocab {
        let id = id.as_u64().expect("an id") as usize;
        tokens[id] = token.clone();
        let is_byte = pre.is_none() && token.starts_with("<0x") && token.len() == 6;
        token_types[id] = if is_byte { GgufTokenType::Byte } else { GgufTokenType::Normal };
    }
    for token in added {
        let id = token["id"].as_u64().expect("an id") as usize;
        tokens[id] = token["content"].as_str().expect("a text").to_string();
        let special = token["special"] == true;
        token_types[id] = if special { GgufTokenType::Control } else { GgufTokenType::UserDefined };
    }
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .expect("merges")
        .iter()
        .map(|merge| match merge {
            Value::String(merge) => merge.clone(),
            pair => {
                format!("{} {}", pair[0].as_str().expect("left"), pair[1].as_str().expect("right"))
            }
        })
        .collect();
    let mut vocab = GgufVocab { tokens, token_types, ..GgufVocab::default() };
    match pre {
        Some(pre) => {
            vocab.model = "gpt2".into();
            vocab.pre = Some(pre.into());
            vocab.merges = merges;
        }
        None => {
            vocab.model = "llama".into();
            vocab.unknown =
                vocab.tokens.iter().position(|token| token == "<unk>").map(|id| id as u32);
            vocab.scores = scores(&vocab.tokens, &json["model"]["merges"]);
            vocab.add_space_prefix = json["normalizer"]["type"] == "Sequence";
        }
    }
    vocab
}

/// SentencePiece scores a token by when it was merged.
fn scores(tokens: &[String], merges: &Value) -> Vec<f32> {
    let mut rank = std::collections::HashMap::new();
    for (index, merge) in merges.as_array().expect("merges").iter().enumerate() {
        let joined = match merge {
            Value::String(merge) => merge.replacen(' ', "", 1),
            pair => {
                format!("{}{}", pair[0].as_str().expect("left"), pair[1].as_str().expect("right"))
            }
        };
        rank.entry(joined).or_insert(index);
    }
    let score = |token: &String| rank.get(token).map_or(-1e9, |&rank| -(rank as f32));
    tokens.iter().map(score).collect()
}

fn check(model: &str, pre: Option<&str>) {
    let Some(json) = tokenizer_json(model) else { return };
    let tokenizer = Arc::new(Tokenizer::from_json(&json).expect("it is a tokenizer"));
    agrees("tokenizer.json", model, &tokenizer);
    detokenizes(&tokenizer);
    if let Some(pre) = pre {
        let pre = Some(pre).filter(|pre| *pre != "spm");
        let tokenizer = Tokenizer::from_gguf(as_gguf(&json, pre)).expect("it is a vocabulary");
        agrees("GGUF", model, &tokenizer);
    }
}

/// Random ids, one at a time, come to the same text as all of them at once.
fn detokenizes(tokenizer: &Arc<Tokenizer>) {
    let mut state = 88_172_645_463_325_252_u64;
    let mut below = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound as u64) as u32
    };
    let bytes = (0..tokenizer.vocab_size() as u32)
        .filter(|&id| tokenizer.token_bytes(id).is_some_and(|bytes| bytes.len() == 1));
    let bytes: Vec<u32> = bytes.collect();
    for case in 0..500 {
        // Bytes by themselves make the characters that come in parts.
        let ids: Vec<u32> = (0..50)
            .map(|_| match below(2) {
                0 => bytes[below(bytes.len()) as usize],
                _ => below(tokenizer.vocab_size()),
            })
            .collect();
        let skip_special = case % 2 == 0;
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip_special);
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text += &detokenizer.finish();
        assert_eq!(text, tokenizer.decode(&ids, skip_special), "{ids:?}");
    }
}

#[test]
fn qwen3() {
    check("qwen3", Some("qwen2"));
}

#[test]
fn llama_3_1() {
    check("llama3_1", Some("llama-bpe"));
}

#[test]
fn gemma_3() {
    check("gemma3", Some("spm"));
}

#[test]
fn llama_2() {
    check("llama2", Some("spm"));
}

#[test]
fn deepseek_v3() {
    check("deepseek_v3", None);
}
