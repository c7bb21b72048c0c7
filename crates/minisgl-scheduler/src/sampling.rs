//! How a request's tokens are chosen.

/// Sampling parameters, with the defaults and the meaning of OpenAI's and vLLM's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one's probability.
    pub min_p: f32,
    /// The request's random numbers. A token depends on the seed and its position only, never on
    /// the batch around it.
    pub seed: u64,
    /// Generate at most this many tokens.
    pub max_tokens: u32,
    /// No EOS and no stop token before this many tokens.
    pub min_tokens: u32,
    /// Generate past EOS.
    pub ignore_eos: bool,
    /// Further ids that end the request, beside the model's EOS ids.
    pub stop_token_ids: Vec<u32>,
    /// Subtracted once from every token generated before.
    pub presence_penalty: f32,
    /// Subtracted for each time that a token was generated before.
    pub frequency_penalty: f32,
    /// Divides the (positive) logits of tokens in the prompt or generated before; 1 is none.
    pub repetition_penalty: f32,
    /// `(token, bias)`, added to the logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report log-probabilities of generated tokens, with this many alternatives.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether the logits must be edited by what was generated before, or by a bias.
    pub fn edits_logits(&self) -> bool {
        self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || self.repetition_penalty != 1.0
            || !self.logit_bias.is_empty()
            || self.min_tokens > 0
    }
}
