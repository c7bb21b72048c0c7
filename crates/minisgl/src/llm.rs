//! Offline use: prompts in, completions out.

use minisgl_scheduler::sampling::SamplingParams;
use serde_json::Value;

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Text, continued as it stands.
    Text(String),
    /// A chat in OpenAI's form, answered by way of the model's chat template.
    Chat(Vec<Value>),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Prompt::Text(text.to_string())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Prompt::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Prompt::Tokens(ids)
    }
}

/// How one prompt is continued.
#[derive(Clone, Debug, Default)]
pub struct GenerateParams {
    /// How tokens are chosen, and how many. Its `seed` is overridden by the one below.
    pub sampling: SamplingParams,
    /// Makes sampling repeatable; drawn afresh for each prompt where it is absent.
    pub seed: Option<u64>,
    /// Text that ends the completion, and is not part of it.
    pub stop: Vec<String>,
}

impl GenerateParams {
    /// Whether every number is in its range.
    ///
    /// # Errors
    /// Names the parameter that is not.
    pub fn check(&self) -> Result<(), String> {
        let p = &self.sampling;
        let in_range = |name: &str, value: f32, low: f32, high: f32| {
            if value >= low && value <= high {
                Ok(())
            } else {
                Err(format!("{name}: {value} is not between {low} and {high}"))
            }
        };
        in_range("temperature", p.temperature, 0.0, 100.0)?;
        in_range("top_p", p.top_p, f32::MIN_POSITIVE, 1.0)?;
        in_range("min_p", p.min_p, 0.0, 1.0)?;
        in_range("presence_penalty", p.presence_penalty, -2.0, 2.0)?;
        in_range("frequency_penalty", p.frequency_penalty, -2.0, 2.0)?;
        in_range("repetition_penalty", p.repetition_penalty, 0.01, 100.0)?;
        if p.max_tokens == 0 {
            return Err("max_tokens: 0 is not a positive number".to_string());
        }
        if self.stop.iter().any(String::is_empty) {
            return Err("stop: an empty text would end every answer at once".to_string());
        }
        Ok(())
    }
}

/// What a prompt was continued with.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The text, without the token or the text that ended it.
    pub text: String,
    /// The tokens, with the one that ended it.
    pub token_ids: Vec<u32>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    /// Tokens in the prompt.
    pub prompt_tokens: usize,
    /// Of them, found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
}
