//! The types of requests and responses, field for field. The OpenAPI document is made from them.

pub mod chat;
pub mod completion;
pub mod info;
pub mod native;
pub mod sampling;

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Texts, or lists of token ids, that a list may have; no server holds more requests at once.
const LISTED_MAX: usize = 1 << 16;

/// A text or a list of texts.
#[derive(Clone, Debug, Default)]
pub struct OneOrMany(pub Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![text.to_string()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<OneOrMany, A::Error> {
                collect(seq, Vec::new(), LISTED_MAX).map(OneOrMany)
            }
        }

        deserializer.deserialize_any(Texts)
    }
}

impl JsonSchema for OneOrMany {
    fn schema_name() -> Cow<'static, str> {
        "OneOrMany".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        })
    }
}

/// One prompt or several: texts or token ids.
#[derive(Clone, Debug)]
pub enum Prompts {
    /// A text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A list of them.
    TokenLists(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of token ids, or a list of either")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts::Text(text.to_string()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
        // What the first one is, the others must be.
        match seq.next_element::<Element>()? {
            None => Ok(Prompts::Texts(Vec::new())),
            Some(Element::Text(first)) => collect(seq, vec![first], LISTED_MAX).map(Prompts::Texts),
            Some(Element::Tokens(first)) => {
                collect(seq, vec![first], LISTED_MAX).map(Prompts::TokenLists)
            }
            Some(Element::Token(first)) => {
                collect(seq, vec![first], usize::MAX).map(Prompts::Tokens)
            }
        }
    }
}

/// What a list of prompts may begin with.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct First;

        impl<'de> Visitor<'de> for First {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_string()))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Element, E> {
                let id = u32::try_from(id).map_err(|_| E::custom(no_token(id)))?;
                Ok(Element::Token(id))
            }

            fn visit_i64<E: de::Error>(self, id: i64) -> Result<Element, E> {
                Err(E::custom(no_token(id)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
                collect(seq, Vec::new(), usize::MAX).map(Element::Tokens)
            }
        }

        deserializer.deserialize_any(First)
    }
}

fn no_token(id: impl fmt::Display) -> String {
    format!("{id} is not a token id")
}

/// The elements of a list, behind those that were read already.
fn collect<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut seq: A,
    mut all: Vec<T>,
    len_max: usize,
) -> Result<Vec<T>, A::Error> {
    while let Some(next) = seq.next_element()? {
        if all.len() == len_max {
            return Err(de::Error::custom(format!("more than {len_max} are too many")));
        }
        all.push(next);
    }
    Ok(all)
}

impl JsonSchema for Prompts {
    fn schema_name() -> Cow<'static, str> {
        "Prompts".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let ids = schemars::json_schema!({
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX},
        });
        schemars::json_schema!({
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                ids,
                {"type": "array", "items": ids},
            ],
        })
    }
}

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Usage {
    /// In the prompts.
    pub prompt_tokens: u32,
    /// Generated.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// More about the prompts.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// More about the prompts' tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct PromptTokensDetails {
    /// Found in the prefix cache.
    pub cached_tokens: u32,
}

impl Usage {
    /// From its parts.
    pub fn new(prompt_tokens: u32, completion_tokens: u32, cached_tokens: u32) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        let prompt_tokens_details = PromptTokensDetails { cached_tokens };
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details }
    }
}

/// How a stream reports.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
pub struct StreamOptions {
    /// End the stream with a chunk that has `usage` and no choices.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub include_usage: bool,
    /// Let every chunk have `usage`.
    #[serde(deserialize_with = "or_null")]
    #[schemars(with = "Option<bool>")]
    pub continuous_usage_stats: bool,
}

/// A field that may be absent or null.
pub fn or_null<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
