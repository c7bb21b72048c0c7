//! Offline use: prompts in, completions out.

use std::collections::VecDeque;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use minisgl_frontend::{Event, Frontend, GenerateRequest, Generation, Usage};
use minisgl_scheduler::message::FinishReason;
use minisgl_scheduler::sampling::SamplingParams;
use minisgl_text::ChatRequest;
use serde_json::Value;

use crate::options::{Device, Dtype, RuntimeOptions};
use crate::runtime::Runtime;

/// A model that answers prompts, many at once.
///
/// ```no_run
/// use minisgl::llm::{GenerateParams, Llm};
///
/// # fn main() -> anyhow::Result<()> {
/// let llm = Llm::builder().model("Qwen/Qwen3-0.6B").build()?;
/// let prompts = ["The capital of France is", "Two and two are"];
/// for completion in llm.generate(prompts, &GenerateParams::default())? {
///     println!("{}", completion.text);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Llm {
    runtime: Runtime,
}

/// How an [`Llm`] is made; whatever is left out is chosen as on the command line.
#[derive(Clone, Debug, Default)]
pub struct LlmBuilder {
    options: RuntimeOptions,
}

impl LlmBuilder {
    /// A `.gguf` file, a folder in Hugging Face layout, or a hub id.
    #[must_use]
    pub fn model(mut self, model: impl AsRef<Path>) -> Self {
        self.options.model = Some(model.as_ref().to_string_lossy().into_owned());
        self
    }

    /// Where it runs.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.options.device = device;
        self
    }

    /// How it computes.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.options.dtype = dtype;
        self
    }

    /// All that the command line can say.
    #[must_use]
    pub fn options(mut self, options: RuntimeOptions) -> Self {
        self.options = options;
        self
    }

    /// Loads the model and starts the engine.
    ///
    /// # Errors
    /// If the model cannot be had, is not what it says, or does not fit.
    pub fn build(self) -> Result<Llm> {
        Ok(Llm { runtime: Runtime::start(&self.options)? })
    }
}

impl Llm {
    /// Begins to make one.
    pub fn builder() -> LlmBuilder {
        LlmBuilder::default()
    }

    /// Continues all prompts, together, and returns the completions in the prompts' order.
    ///
    /// # Errors
    /// If a parameter is out of range, a prompt cannot be run, or the engine fails.
    pub fn generate<P: Into<Prompt>>(
        &self,
        prompts: impl IntoIterator<Item = P>,
        params: &GenerateParams,
    ) -> Result<Vec<Completion>> {
        params.check().map_err(|message| anyhow!(message))?;
        let mut prompts = prompts.into_iter().map(Into::into).enumerate();
        let mut in_flight = VecDeque::new();
        let mut completions = Vec::new();
        // As many as can run, and as many again to take their places.
        let in_flight_max = 2 * self.frontend().limits().slots;
        loop {
            while in_flight.len() < in_flight_max
                && let Some((index, prompt)) = prompts.next()
            {
                let generation = self.submit(prompt, params);
                in_flight.push_back(generation.with_context(|| format!("prompt {index}"))?);
            }
            let Some(generation) = in_flight.pop_front() else { return Ok(completions) };
            let index = completions.len();
            let completion = Completion::collect(generation, |_| {});
            completions.push(completion.with_context(|| format!("prompt {index}"))?);
        }
    }

    /// Submits one prompt; its events come as they are generated.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn submit(&self, prompt: Prompt, params: &GenerateParams) -> Result<Generation> {
        Ok(self.frontend().submit(request(prompt, params))?)
    }

    /// What takes requests, with all that it can tell about itself.
    pub fn frontend(&self) -> &Frontend {
        &self.runtime.frontend
    }

    /// What the model runs on, as the backend calls itself.
    pub fn device(&self) -> &str {
        &self.runtime.device
    }
}

/// A prompt and its parameters as the frontend takes them.
pub fn request(prompt: Prompt, params: &GenerateParams) -> GenerateRequest {
    let prompt = match prompt {
        Prompt::Text(text) => minisgl_frontend::Prompt::Text(text),
        Prompt::Tokens(ids) => minisgl_frontend::Prompt::Tokens(ids),
        Prompt::Chat(messages) => {
            minisgl_frontend::Prompt::Chat(Box::new(ChatRequest::new(messages)))
        }
    };
    GenerateRequest {
        params: params.sampling.clone(),
        seed: params.seed,
        stop: params.stop.clone(),
        ..GenerateRequest::new(prompt)
    }
}

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
#[derive(Clone, Debug, Default, PartialEq)]
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

impl Completion {
    /// Waits for a submission of one choice to end, and hands out its text on the way.
    ///
    /// # Errors
    /// If it was refused, aborted, or ended with the engine.
    pub fn collect(mut generation: Generation, mut on_text: impl FnMut(&str)) -> Result<Self> {
        let mut collected = Collected::default();
        while let Some(event) = generation.blocking_recv() {
            if let Event::Text { text, .. } = &event {
                on_text(text);
            }
            if let Some(reason) = collected.push(event) {
                return collected.into_completion(reason);
            }
        }
        Err(anyhow!("the engine ended"))
    }

    /// As `collect`, for async callers.
    ///
    /// # Errors
    /// As `collect`.
    pub async fn read(mut generation: Generation) -> Result<Self> {
        let mut collected = Collected::default();
        while let Some(event) = generation.recv().await {
            if let Some(reason) = collected.push(event) {
                return collected.into_completion(reason);
            }
        }
        Err(anyhow!("the engine ended"))
    }
}

/// What has come of one choice so far.
#[derive(Default)]
struct Collected {
    text: String,
    token_ids: Vec<u32>,
    usage: Usage,
}

impl Collected {
    /// Adds an event; the last one gives the reason why the choice ended.
    fn push(&mut self, event: Event) -> Option<FinishReason> {
        match event {
            Event::Prompt { .. } => None,
            Event::Text { text, tokens, .. } => {
                self.text.push_str(&text);
                self.token_ids.extend(tokens.iter().map(|token| token.id));
                None
            }
            Event::Finished { reason, usage, .. } => {
                self.usage = usage;
                Some(reason)
            }
        }
    }

    fn into_completion(self, reason: FinishReason) -> Result<Completion> {
        let finish_reason = match reason {
            FinishReason::Stop { .. } => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => return Err(anyhow!("aborted")),
            FinishReason::Refused(refusal) => return Err(refusal.into()),
            FinishReason::ConstraintFailed(message) | FinishReason::Error(message) => {
                return Err(anyhow!(message));
            }
        };
        let Usage { prompt_tokens, cached_tokens, completion_tokens } = self.usage;
        Ok(Completion {
            text: self.text,
            token_ids: self.token_ids,
            finish_reason,
            prompt_tokens: prompt_tokens as usize,
            cached_tokens: cached_tokens as usize,
            completion_tokens: completion_tokens as usize,
        })
    }
}
