//! Penalties, biases and banned tokens of one request.

use std::collections::HashMap;
use std::sync::Arc;

use crate::plan::LogitEdit;
use crate::sampling::SamplingParams;

/// Every token whose logit may have to be changed, and what for.
pub(crate) struct LogitEdits {
    params: Arc<SamplingParams>,
    tokens: HashMap<u32, Edited>,
}

#[derive(Default)]
struct Edited {
    bias: f32,
    in_prompt: bool,
    generated: u32,
    /// Ends the request, and so may not come before `min_tokens`.
    stops: bool,
}

impl LogitEdits {
    /// `None` where nothing will ever be changed.
    pub fn new(params: &Arc<SamplingParams>, prompt: &[u32], stop_ids: &[u32]) -> Option<Self> {
        if !params.edits_logits() {
            return None;
        }
        let mut tokens = HashMap::<u32, Edited>::new();
        for (token, bias) in &params.logit_bias {
            tokens.entry(*token).or_default().bias += bias;
        }
        if params.repetition_penalty != 1.0 {
            for token in prompt {
                tokens.entry(*token).or_default().in_prompt = true;
            }
        }
        if params.min_tokens > 0 {
            for token in stop_ids {
                tokens.entry(*token).or_default().stops = true;
            }
        }
        Some(Self { params: Arc::clone(params), tokens })
    }

    /// Counts a generated token.
    pub fn push(&mut self, token: u32) {
        self.tokens.entry(token).or_default().generated += 1;
    }

    /// The edits for the next token; `too_early` if none that ends the request may come.
    pub fn at(&self, too_early: bool) -> Vec<LogitEdit> {
        let params = &*self.params;
        let edit = |(token, edited): (&u32, &Edited)| {
            let seen = edited.in_prompt || edited.generated > 0;
            let mut bias = edited.bias - params.frequency_penalty * edited.generated as f32;
            if edited.generated > 0 {
                bias -= params.presence_penalty;
            }
            if edited.stops && too_early {
                bias = f32::NEG_INFINITY;
            }
            let scale = if seen { params.repetition_penalty } else { 1.0 };
            LogitEdit { token: *token, scale, bias }
        };
        let changes = |edit: &LogitEdit| edit.scale != 1.0 || edit.bias != 0.0;
        self.tokens.iter().map(edit).filter(changes).collect()
    }
}
