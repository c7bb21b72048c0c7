//! Sampling parameters on the command line.

use clap::Args;
use minisgl::llm::GenerateParams;
use minisgl_scheduler::sampling::SamplingParams;

/// Tokens of an answer, where nothing is said.
const MAX_TOKENS: u32 = 512;

/// How tokens are chosen, and how many.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Generate at most this many tokens
    #[arg(long, default_value_t = MAX_TOKENS, value_name = "TOKENS")]
    max_tokens: u32,

    /// 0 always takes the most likely token [default: 0; in the shell 0.6]
    #[arg(long)]
    temperature: Option<f32>,

    /// Keep the k most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: u32,

    /// Keep the most likely tokens whose probabilities reach this sum
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f32,

    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f32,

    /// Divides the logits of tokens that are there already; 1 does nothing
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    repetition_penalty: f32,

    /// Makes sampling repeatable
    #[arg(long)]
    seed: Option<u64>,

    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on past the end of the answer
    #[arg(long)]
    ignore_eos: bool,
}

impl Default for SamplingArgs {
    /// What clap makes of no flags.
    fn default() -> Self {
        Self {
            max_tokens: MAX_TOKENS,
            temperature: None,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: None,
            stop: Vec::new(),
            ignore_eos: false,
        }
    }
}

impl SamplingArgs {
    /// The parameters, with this temperature where none was given.
    pub fn params(&self, temperature: f32) -> GenerateParams {
        GenerateParams {
            sampling: SamplingParams {
                temperature: self.temperature.unwrap_or(temperature),
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                max_tokens: self.max_tokens,
                ignore_eos: self.ignore_eos,
                ..SamplingParams::default()
            },
            seed: self.seed,
            stop: self.stop.clone(),
        }
    }
}
