//! The tokenizer: `tokenizers` does the encoding, and a table of each token's bytes the decoding.

use std::borrow::Cow;
use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, ensure};
use tokenizers::Tokenizer as HfTokenizer;
use tokenizers::decoders::DecoderWrapper;

use crate::gguf_vocab::{GgufVocab, build};

/// What becomes of special-token text such as `<|im_end|>` in a text that is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// It becomes the special token.
    Parse,
    /// It is text like any other, and becomes several ordinary tokens.
    AsText,
}

/// Few texts have more bytes to a token; English has between four and five.
const TOKEN_BYTES_USUAL: usize = 8;
/// As much of a text as is encoded at once to see whether it is too long.
const PIECE_BYTES: usize = 64 << 10;

/// Text to ids and ids to bytes.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// Each id's bytes, and whether it is special; `None` where an id is not used.
    tokens: Vec<Option<Token>>,
    specials: HashMap<String, u32>,
    /// BOS, where encoding a prompt puts one in front.
    prompt_bos: Option<u32>,
}

struct Token {
    bytes: Box<[u8]>,
    special: bool,
}

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// If it is not one that the `tokenizers` library reads.
    pub fn from_json(tokenizer_json: &[u8]) -> Result<Self> {
        let inner = HfTokenizer::from_bytes(tokenizer_json)
            .map_err(|error| anyhow!("tokenizer.json: {error}"))?;
        // Whatever the post-processor puts in front of a text is BOS.
        let ids = |specials: bool| {
            let encoding = inner.encode_fast("a", specials);
            encoding.map_err(|error| anyhow!("tokenizer.json: {error}"))
        };
        let (with, without) = (ids(true)?, ids(false)?);
        let first = with.get_ids().first().copied();
        let prompt_bos = first.filter(|_| !with.get_ids().starts_with(without.get_ids()));
        Self::new(inner, prompt_bos)
    }

    /// From a GGUF file's vocabulary.
    ///
    /// # Errors
    /// If its kind is not known or its parts do not fit together.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self> {
        let prompt_bos = vocab.add_bos.then_some(vocab.bos).flatten();
        let inner = build(vocab).context("the GGUF file's tokenizer")?;
        Self::new(inner, prompt_bos)
    }

    fn new(inner: HfTokenizer, prompt_bos: Option<u32>) -> Result<Self> {
        let byte_level = is_byte_level(inner.get_decoder());
        let characters = byte_level_characters();
        let added = inner.get_added_tokens_decoder();
        let vocab = inner.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        ensure!(size > 0, "the vocabulary is empty");
        ensure!(size <= 1 << 24, "the vocabulary has an id of {}", size - 1);
        let mut tokens: Vec<Option<Token>> = Vec::new();
        tokens.resize_with(size, || None);
        for (text, id) in vocab {
            let added = added.get(&id);
            let special = added.is_some_and(|added| added.special);
            let bytes = match added {
                // SentencePiece writes the spaces of added text as those of any other.
                Some(added) if special || byte_level => added.content.clone().into_bytes(),
                _ if byte_level => byte_level_bytes(&text, &characters),
                _ => sentencepiece_bytes(&text),
            };
            tokens[id as usize] = Some(Token { bytes: bytes.into(), special });
        }
        let specials = added
            .iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(&id, token)| (token.content.clone(), id))
            .collect();
        Ok(Self { inner, tokens, specials, prompt_bos })
    }

    /// Whether a text is sure to have more tokens than this. Encoding takes hundreds of bytes for each
    /// byte of text: one that is longer than texts of so many tokens are is encoded in pieces, until
    /// there are more.
    pub fn is_longer(&self, text: &str, tokens_max: usize) -> bool {
        let usual = tokens_max.saturating_mul(TOKEN_BYTES_USUAL).max(PIECE_BYTES);
        let (mut rest, mut tokens) = (text, 0);
        while text.len() > usual && !rest.is_empty() && tokens <= tokens_max {
            let (piece, behind) = rest.split_at(rest.floor_char_boundary(PIECE_BYTES));
            let found = self.encode_marked(piece).len();
            // Where it was cut, there may be more than the text has.
            tokens += found - found / 8;
            rest = behind;
        }
        tokens > tokens_max
    }

    /// The ids of a text, without BOS or EOS.
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        match special {
            Special::Parse => self.encode_pieces(std::iter::once(text)),
            Special::AsText => {
                let marked = self.mark_specials(text);
                self.encode_pieces(marked.split(TEXT_MARK))
            }
        }
    }

    /// As `encode` with `Special::Parse`, for a text in which `mark_specials` has marked what is
    /// not to be parsed.
    pub(crate) fn encode_marked(&self, text: &str) -> Vec<u32> {
        self.encode_pieces(text.split(TEXT_MARK))
    }

    fn encode_pieces<'a>(&self, pieces: impl Iterator<Item = &'a str>) -> Vec<u32> {
        let mut ids = Vec::new();
        for piece in pieces.filter(|piece| !piece.is_empty()) {
            // Encoding fails only in pre-tokenizers that are run by regular expressions without
            // end; then the bytes' own tokens still say the same text.
            match self.inner.encode_fast(piece, false) {
                Ok(encoding) => ids.extend_from_slice(encoding.get_ids()),
                Err(_) => ids.extend(piece.bytes().filter_map(|byte| self.byte_token(byte))),
            }
        }
        ids
    }

    fn byte_token(&self, byte: u8) -> Option<u32> {
        let found = self.tokens.iter().position(|token| {
            token.as_ref().is_some_and(|token| !token.special && *token.bytes == [byte])
        });
        found.map(|id| id as u32)
    }

    /// Breaks special-token text apart with `TEXT_MARK`, so that it is no longer found in it.
    pub(crate) fn mark_specials<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut marked = Cow::Borrowed(text);
        if text.contains(TEXT_MARK) {
            marked = Cow::Owned(text.replace(TEXT_MARK, "\u{FFFD}"));
        }
        for special in self.specials.keys() {
            if marked.contains(special.as_str()) {
                let first = special.chars().next().map_or(0, char::len_utf8);
                let broken = format!("{}{TEXT_MARK}{}", &special[..first], &special[first..]);
                marked = Cow::Owned(marked.replace(special.as_str(), &broken));
            }
        }
        marked
    }

    /// The text of some ids; what is not UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id).unwrap_or_default());
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// A token's bytes, which need not be UTF-8 by themselves.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.get(id as usize)?.as_ref().map(|token| &*token.bytes)
    }

    /// Whether a token is a mark (`<|im_end|>`) and no text.
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.tokens.get(id as usize), Some(Some(Token { special: true, .. })))
    }

    /// The id of a token by its name in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// BOS, where the model wants one in front of every prompt.
    pub fn prompt_bos(&self) -> Option<u32> {
        self.prompt_bos
    }
}

/// A noncharacter, which no text has a right to contain (Unicode 16, section 23.7).
const TEXT_MARK: char = '\u{FDD0}';

fn is_byte_level(decoder: Option<&DecoderWrapper>) -> bool {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(sequence)) => sequence
            .get_decoders()
            .iter()
            .any(|decoder| matches!(decoder, DecoderWrapper::ByteLevel(_))),
        _ => false,
    }
}

/// GPT-2's alphabet: bytes that print stand for themselves, the others for characters from U+0100.
fn byte_level_characters() -> HashMap<char, u8> {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let shifted = (0..=255u8).filter(|&byte| !prints(byte));
    let shifted = (0x100..).filter_map(char::from_u32).zip(shifted);
    (0..=255u8)
        .filter(|&byte| prints(byte))
        .map(|byte| (byte as char, byte))
        .chain(shifted)
        .collect()
}

fn byte_level_bytes(token: &str, characters: &HashMap<char, u8>) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|c| characters.get(&c).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// SentencePiece writes a space as U+2581 and a byte that is no character as `<0xAB>`.
fn sentencepiece_bytes(token: &str) -> Vec<u8> {
    let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace('\u{2581}', " ").into_bytes(),
    }
}
