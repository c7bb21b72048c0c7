//! What a model says about its text: tokenizer, chat template, and the tokens that end an answer.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::gguf_vocab::GgufVocab;
use crate::json_values::{JSON_VALUES_MAX, json_values};
use crate::template::{ChatRequest, ChatTemplate};
use crate::tokenizer::{Special, Tokenizer};

/// Why a text or a chat cannot be made into tokens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// The model ships no chat template.
    #[error("the model has no chat template; only plain completions work")]
    NoTemplate,
    /// The template refuses the conversation, or fails over it.
    #[error("the chat template fails: {0}")]
    Template(String),
    /// It has more tokens than it may have, whatever they are.
    #[error(
        "this model's maximum context length is {tokens_max} tokens, and a text of {bytes} bytes has \
         more"
    )]
    TooLong {
        /// Of the text, or the rendered chat.
        bytes: usize,
        /// May be.
        tokens_max: usize,
    },
    /// The conversation itself is not as it should be.
    #[error("{0}")]
    Chat(String),
}

/// What a model says about its text.
pub struct TextModel {
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Chats to text, where the model has a template.
    pub template: Option<ChatTemplate>,
    /// Ids that end an answer.
    pub eos_ids: Vec<u32>,
}

impl TextModel {
    /// From a folder in Hugging Face layout: `tokenizer.json`, and where they are there
    /// `tokenizer_config.json`, `chat_template.jinja` or `.json`, `generation_config.json` and
    /// `config.json`.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing, or a file is not what its name says.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).with_context(|| format!("{}", path.display()))?;
        let tokenizer =
            Tokenizer::from_json(&bytes).with_context(|| format!("{}", path.display()))?;
        let config = read_json(folder, "tokenizer_config.json")?.unwrap_or_default();
        let specials = special_tokens(&config);
        let template = match folder_template(folder, &config)? {
            None => None,
            Some((main, tool_use)) => {
                let mut template = ChatTemplate::new(&main, specials.clone())?;
                if let Some(tool_use) = tool_use {
                    template = template.with_tool_use(&tool_use)?;
                }
                Some(template)
            }
        };
        let mut eos_ids = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            let config = read_json(folder, name)?.unwrap_or_default();
            let nested = config.get("text_config").and_then(|text| text.get("eos_token_id"));
            add_ids(&mut eos_ids, config.get("eos_token_id").or(nested));
        }
        if let Some(eos) = specials.get("eos_token").and_then(Value::as_str) {
            eos_ids.extend(tokenizer.token_id(eos));
        }
        Ok(Self::new(tokenizer, template, eos_ids))
    }

    /// From a GGUF file's metadata.
    ///
    /// # Errors
    /// If the vocabulary or the template is not one.
    pub fn from_gguf(vocab: GgufVocab, chat_template: Option<String>) -> Result<Self> {
        let eos_ids = vocab.eos.clone();
        let mut specials = Map::new();
        for (name, id) in [("bos_token", vocab.bos), ("eos_token", eos_ids.first().copied())] {
            if let Some(token) = id.and_then(|id| vocab.tokens.get(id as usize)) {
                specials.insert(name.into(), token.clone().into());
            }
        }
        let tokenizer = Tokenizer::from_gguf(vocab)?;
        let template = chat_template.map(|source| ChatTemplate::new(&source, specials));
        Ok(Self::new(tokenizer, template.transpose()?, eos_ids))
    }

    fn new(tokenizer: Tokenizer, template: Option<ChatTemplate>, mut eos_ids: Vec<u32>) -> Self {
        eos_ids.sort_unstable();
        eos_ids.dedup();
        Self { tokenizer: Arc::new(tokenizer), template, eos_ids }
    }

    /// A chat as text: what Hugging Face's `apply_chat_template(tokenize=False)` gives.
    ///
    /// # Errors
    /// If there is no template, or it fails.
    pub fn render_chat(&self, request: &ChatRequest) -> Result<String, TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoTemplate)?;
        template.render(&as_templates_expect(request, template.takes_parts())?)
    }

    /// A chat as ids. Special-token text is special where the template wrote it, and text like
    /// any other where the request has it. Where the model wants BOS, there is exactly one.
    ///
    /// # Errors
    /// If there is no template, or it fails, or the chat is sure to have more than `tokens_max`.
    pub fn encode_chat(
        &self,
        request: &ChatRequest,
        tokens_max: usize,
    ) -> Result<Vec<u32>, TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoTemplate)?;
        let mut request = as_templates_expect(request, template.takes_parts())?;
        for value in request.messages.iter_mut().chain(request.tools.iter_mut().flatten()) {
            self.mark_strings(value);
        }
        for value in request.kwargs.values_mut() {
            self.mark_strings(value);
        }
        let text = template.render(&request)?;
        self.check_length(&text, tokens_max)?;
        Ok(self.with_one_bos(self.tokenizer.encode_marked(&text)))
    }

    /// A prompt for plain completion as ids: special-token text is special, and BOS is in front
    /// where the model wants it.
    ///
    /// # Errors
    /// If the text is sure to have more than `tokens_max`.
    pub fn encode_prompt(&self, text: &str, tokens_max: usize) -> Result<Vec<u32>, TextError> {
        Ok(self.with_one_bos(self.encode_text(text, tokens_max)?))
    }

    /// As [`TextModel::encode_prompt`], without BOS.
    ///
    /// # Errors
    /// As there.
    pub fn encode_text(&self, text: &str, tokens_max: usize) -> Result<Vec<u32>, TextError> {
        self.check_length(text, tokens_max)?;
        Ok(self.tokenizer.encode(text, Special::Parse))
    }

    fn check_length(&self, text: &str, tokens_max: usize) -> Result<(), TextError> {
        match self.tokenizer.is_longer(text, tokens_max) {
            true => Err(TextError::TooLong { bytes: text.len(), tokens_max }),
            false => Ok(()),
        }
    }

    fn with_one_bos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.tokenizer.prompt_bos() {
            let found = ids.iter().take_while(|&&id| id == bos).count();
            match found {
                0 => ids.insert(0, bos),
                _ => drop(ids.drain(1..found)),
            }
        }
        ids
    }

    fn mark_strings(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.tokenizer.mark_specials(text).into_owned(),
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark_strings(item)),
            Value::Object(entries) => {
                for (key, mut item) in std::mem::take(entries) {
                    self.mark_strings(&mut item);
                    entries.insert(self.tokenizer.mark_specials(&key).into_owned(), item);
                }
            }
            _ => {}
        }
    }
}

/// The request with what templates expect: contents that are text unless the template takes parts,
/// a content even where there are only tool calls, and their arguments as objects.
fn as_templates_expect(request: &ChatRequest, takes_parts: bool) -> Result<ChatRequest, TextError> {
    let mut request = request.clone();
    let mut values = 0;
    for (index, message) in request.messages.iter_mut().enumerate() {
        let Some(message) = message.as_object_mut() else {
            return Err(TextError::Chat(format!("messages[{index}] is no object")));
        };
        if let Some(content) = message.get_mut("content").filter(|content| content.is_array()) {
            let joined = joined_parts(content).ok_or_else(|| {
                TextError::Chat(format!("messages[{index}].content: only text parts are supported"))
            })?;
            if !takes_parts {
                *content = joined;
            }
        }
        let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) else {
            continue;
        };
        for call in calls {
            let arguments = call.pointer_mut("/function/arguments");
            let Some(arguments) = arguments else { continue };
            let Some(text) = arguments.as_str() else { continue };
            values += json_values(text.as_bytes());
            if values > JSON_VALUES_MAX {
                return Err(TextError::Chat(format!(
                    "messages[{index}].tool_calls: more than {JSON_VALUES_MAX} JSON values are too many"
                )));
            }
            if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                *arguments = object;
            }
        }
        if message.get("content").is_none_or(Value::is_null) {
            message.insert("content".into(), "".into());
        }
    }
    Ok(request)
}

fn joined_parts(content: &Value) -> Option<Value> {
    let parts = content.as_array()?.iter().map(|part| match part {
        Value::String(text) => Some(text.as_str()),
        part => part.get("text").and_then(Value::as_str),
    });
    let parts: Option<Vec<&str>> = parts.collect();
    Some(parts?.join("\n").into())
}

fn read_json(folder: &Path, name: &str) -> Result<Option<Value>> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => {
            Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{}", path.display()))?))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

/// `bos_token` and the like, each a string or an object with `content`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let entries = config.as_object().into_iter().flatten();
    let tokens =
        entries.filter(|(name, _)| name.ends_with("_token")).filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name.clone(), Value::from(text)))
        });
    tokens.collect()
}

/// The chat template, and the one for requests with tools where there are several.
fn folder_template(folder: &Path, config: &Value) -> Result<Option<(String, Option<String>)>> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        return Ok(Some((text, None)));
    }
    let file = read_json(folder, "chat_template.json")?;
    let template = file.as_ref().and_then(|file| file.get("chat_template"));
    Ok(match template.or_else(|| config.get("chat_template")) {
        Some(Value::String(text)) => Some((text.clone(), None)),
        Some(Value::Array(named)) => {
            let find = |name: &str| {
                let entry = named.iter().find(|entry| entry["name"] == name)?;
                entry["template"].as_str().map(str::to_string)
            };
            find("default").map(|main| (main, find("tool_use")))
        }
        _ => None,
    })
}

fn add_ids(ids: &mut Vec<u32>, value: Option<&Value>) {
    let found = value.map_or(&[][..], |value| match value {
        Value::Array(ids) => ids,
        id => std::slice::from_ref(id),
    });
    ids.extend(found.iter().filter_map(Value::as_u64).map(|id| id as u32));
}
