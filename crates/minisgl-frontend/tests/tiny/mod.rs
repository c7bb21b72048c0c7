//! A text model small enough to write down: a token for each byte, and three special ones.

use std::sync::Arc;

use minisgl_text::{GgufTokenType, GgufVocab, TextModel};

/// Ends an answer.
pub const EOS: u32 = 257;
/// Ids are below this.
pub const VOCAB_SIZE: usize = 259;

const TEMPLATE: &str = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|turn|>\n\
    {% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}";

/// The byte `b` is the token `b`.
pub fn text_model() -> Arc<TextModel> {
    with_template(TEMPLATE)
}

/// The same with another chat template.
pub fn with_template(template: &str) -> Arc<TextModel> {
    let mut tokens: Vec<String> = (0..=255).map(|byte| byte_character(byte).to_string()).collect();
    tokens.extend(["<|turn|>", "<|end|>", "[TOOL_CALLS]"].map(str::to_string));
    let mut token_types = vec![GgufTokenType::Normal; 256];
    token_types.extend([GgufTokenType::Control; 3]);
    let vocab = GgufVocab {
        model: "gpt2".to_string(),
        tokens,
        token_types,
        eos: vec![EOS],
        ..GgufVocab::default()
    };
    Arc::new(TextModel::from_gguf(vocab, Some(template.to_string())).expect("it is a vocabulary"))
}

/// How byte-level vocabularies write a byte: printable Latin-1 as itself, the rest from U+0100 on.
fn byte_character(byte: u8) -> char {
    let is_plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if is_plain(byte) {
        return char::from(byte);
    }
    let earlier = (0..byte).filter(|&earlier| !is_plain(earlier)).count() as u32;
    char::from_u32(0x100 + earlier).expect("a character of Latin Extended-A")
}
