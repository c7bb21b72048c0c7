//! A GGUF file's vocabulary, made into a tokenizer of the `tokenizers` library.
//!
//! GGUF stores tokens, scores, types and merges; how text is split before merging it only names
//! (`tokenizer.ggml.pre`). The expressions behind the names are those of the models' own
//! `tokenizer.json` files.

use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// What a GGUF file says about its tokenizer, under `tokenizer.ggml.*`.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `model`: `gpt2` is byte-level BPE, `llama` SentencePiece.
    pub model: String,
    /// `pre`: how text is split before it is merged.
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `scores`, by id; needed by `llama`.
    pub scores: Vec<f32>,
    /// `token_type`, by id.
    pub token_types: Vec<GgufTokenType>,
    /// `merges`, `"left right"`, first first; needed by `gpt2`.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`, `eot_token_id` and `eom_token_id`, those that are there.
    pub eos: Vec<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: bool,
    /// `add_space_prefix`; of `llama` only.
    pub add_space_prefix: bool,
}

/// What a token is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GgufTokenType {
    /// Text.
    #[default]
    Normal,
    /// What stands for text that the vocabulary cannot write.
    Unknown,
    /// A mark such as `<|im_end|>`.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// Not in use.
    Unused,
    /// One byte, `<0xAB>`.
    Byte,
}

impl From<u32> for GgufTokenType {
    fn from(number: u32) -> Self {
        match number {
            2 => GgufTokenType::Unknown,
            3 => GgufTokenType::Control,
            4 => GgufTokenType::UserDefined,
            5 => GgufTokenType::Unused,
            6 => GgufTokenType::Byte,
            _ => GgufTokenType::Normal,
        }
    }
}

/// The tokenizer that a vocabulary describes.
pub(crate) fn build(vocab: GgufVocab) -> Result<Tokenizer> {
    ensure!(!vocab.tokens.is_empty(), "tokenizer.ggml.tokens is empty");
    let mut tokenizer = match vocab.model.as_str() {
        "gpt2" => byte_level(&vocab)?,
        "llama" => sentencepiece(&vocab)?,
        other => bail!("tokenizer.ggml.model is {other:?}; gpt2 and llama are supported"),
    };
    // SentencePiece's tokens for several spaces may be written with U+2581 or with spaces; both are
    // found in the text in which one has become the other.
    let added = |kind: GgufTokenType, special: bool| -> Vec<AddedToken> {
        let tokens = vocab.tokens.iter().zip(&vocab.token_types);
        let tokens = tokens.filter(|(token, found)| **found == kind && !token.is_empty());
        let normalized = !special && vocab.model == "llama" && !vocab.add_space_prefix;
        tokens
            .map(|(token, _)| AddedToken::from(token.clone(), special).normalized(normalized))
            .collect()
    };
    tokenizer.add_special_tokens(&added(GgufTokenType::Control, true));
    tokenizer.add_tokens(&added(GgufTokenType::UserDefined, false));
    Ok(tokenizer)
}

fn byte_level(vocab: &GgufVocab) -> Result<Tokenizer> {
    let merges = vocab.merges.iter().map(|merge| {
        let (left, right) = merge.split_once(' ').with_context(|| format!("merge {merge:?}"))?;
        Ok((left.to_string(), right.to_string()))
    });
    let merges = merges.collect::<Result<Vec<_>>>().context("tokenizer.ggml.merges")?;
    let pre = vocab.pre.as_deref().unwrap_or("default");
    let split = PreTokenizer::named(pre)?;
    let model = BPE::builder()
        .vocab_and_merges(token_ids(vocab), merges)
        .ignore_merges(split.ignore_merges)
        .build()
        .map_err(|error| anyhow!("tokenizer.ggml.merges: {error}"))?;
    let mut tokenizer = Tokenizer::new(model);
    if split.nfc {
        tokenizer.with_normalizer(Some(part::<NormalizerWrapper>(json!({"type": "NFC"}))?));
    }
    tokenizer.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(split.pre_tokenizer)?));
    tokenizer.with_decoder(Some(part::<DecoderWrapper>(byte_level_step(false))?));
    Ok(tokenizer)
}

/// SentencePiece's BPE joins the neighbours whose union scores best. Ordering all possible unions
/// by that score gives the same as a list of merges.
fn sentencepiece(vocab: &GgufVocab) -> Result<Tokenizer> {
    let ids = token_ids(vocab);
    ensure!(vocab.scores.len() == vocab.tokens.len(), "tokenizer.ggml.scores are missing");
    let by_text: HashMap<&str, usize> =
        vocab.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (id, token) in vocab.tokens.iter().enumerate() {
        if vocab.token_types.get(id).is_some_and(|&kind| kind != GgufTokenType::Normal) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (by_text.get(left), by_text.get(right)) {
                merges.push((vocab.scores[id], left_id, right_id));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let text = |id: usize| vocab.tokens[id].clone();
    let merges = merges.into_iter().map(|(_, left, right)| (text(left), text(right))).collect();
    let mut builder =
        BPE::builder().vocab_and_merges(ids, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = vocab.unknown.and_then(|id| vocab.tokens.get(id as usize)) {
        builder = builder.unk_token(unknown.clone());
    }
    let model = builder.build().map_err(|error| anyhow!("tokenizer.ggml.tokens: {error}"))?;
    let mut tokenizer = Tokenizer::new(model);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prefix = json!({"type": "Prepend", "prepend": "▁"});
    let steps = if vocab.add_space_prefix { vec![prefix, spaces] } else { vec![spaces] };
    let normalizer = part::<NormalizerWrapper>(json!({"type": "Sequence", "normalizers": steps}))?;
    tokenizer.with_normalizer(Some(normalizer));
    tokenizer.with_decoder(Some(part::<DecoderWrapper>(json!({"type": "ByteFallback"}))?));
    Ok(tokenizer)
}

fn token_ids(vocab: &GgufVocab) -> tokenizers::models::bpe::Vocab {
    vocab.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect()
}

/// A part of a tokenizer, as `tokenizer.json` writes it.
fn part<T: serde::de::DeserializeOwned>(description: Value) -> Result<T> {
    Ok(serde_json::from_value(description)?)
}

/// How text is split before bytes are merged.
struct PreTokenizer {
    pre_tokenizer: Value,
    /// A split that is a token as it stands is not merged up to it.
    ignore_merges: bool,
    nfc: bool,
}

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    fn named(name: &str) -> Result<Self> {
        let plain = |pre_tokenizer| Self { pre_tokenizer, ignore_merges: false, nfc: false };
        Ok(match name {
            "default" | "gpt-2" => plain(byte_level_step(true)),
            "smollm" => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                plain(sequence(digits, true))
            }
            "llama-bpe" | "llama3" | "llama-v3" => {
                Self { ignore_merges: true, ..plain(sequence(split(LLAMA3_SPLIT), false)) }
            }
            "qwen2" | "deepseek-r1-qwen" => {
                Self { nfc: true, ..plain(sequence(split(QWEN2_SPLIT), false)) }
            }
            "tekken" => Self { ignore_merges: true, ..plain(sequence(split(TEKKEN_SPLIT), false)) },
            other => bail!(
                "tokenizer.ggml.pre is {other:?}; supported are default, gpt-2, smollm, llama-bpe, \
                 qwen2 and tekken"
            ),
        })
    }
}

fn split(expression: &str) -> Value {
    json!({
        "type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false,
    })
}

fn sequence(first: Value, use_regex: bool) -> Value {
    json!({"type": "Sequence", "pretokenizers": [first, byte_level_step(use_regex)]})
}

fn byte_level_step(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex,
    })
}
