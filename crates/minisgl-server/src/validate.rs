//! Every range of every numeric field, and what the fields mean together.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;

use minisgl_frontend::{GenerateRequest, Grammar, GrammarSource, Prompt};
use minisgl_scheduler::sampling::SamplingParams;
use serde_json::Value;

use crate::app::App;
use crate::error::ApiError;
use crate::wire::native::NativeSampling;
use crate::wire::sampling::Common;

/// Choices for one prompt.
const N_MAX: i64 = 128;
/// Stop strings of a request, and the bytes of one.
const STOPS_MAX: usize = 64;
const STOP_BYTES_MAX: usize = 1024;
/// Stop token ids of a request.
const STOP_IDS_MAX: usize = 1024;
/// Entries of `logit_bias`.
const BIASES_MAX: usize = 1024;
/// Alternatives that are reported for a token.
const TOP_LOGPROBS_MAX: i64 = 20;

/// How a prompt is continued, with every value in its range.
#[derive(Clone, Debug)]
pub struct Controls {
    /// `max_tokens` is `u32::MAX` where the request leaves it open.
    pub params: SamplingParams,
    /// As in the request.
    pub seed: Option<u64>,
    /// Choices for each prompt.
    pub n: u32,
    /// None is empty.
    pub stop: Vec<String>,
    /// Whether what ended a choice is part of it.
    pub include_stop_str: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special_tokens: bool,
}

impl Controls {
    /// A request that continues `prompt` so.
    pub fn request(&self, prompt: Prompt) -> GenerateRequest {
        let Self { params, seed, n, stop, include_stop_str, skip_special_tokens } = self.clone();
        GenerateRequest {
            params,
            seed,
            n,
            stop,
            include_stop_str,
            skip_special_tokens,
            ..GenerateRequest::new(prompt)
        }
    }
}

/// Checks the fields that all ways of generating have in common; `max_tokens` is at least
/// `max_tokens_min`.
///
/// # Errors
/// Names the first field that is out of its range.
pub fn controls(
    fields: &Common,
    max_tokens_min: i64,
    vocab_size: usize,
) -> Result<Controls, ApiError> {
    refuse_other_forms(fields)?;
    let (name, max_tokens) = match fields.max_completion_tokens {
        Some(max_tokens) => ("max_completion_tokens", Some(max_tokens)),
        None => ("max_tokens", fields.max_tokens),
    };
    let max_tokens =
        within(name, max_tokens, i64::from(u32::MAX), max_tokens_min..=u32::MAX.into())? as u32;
    let min_tokens = within("min_tokens", fields.min_tokens, 0, 0..=max_tokens.into())? as u32;
    let params = SamplingParams {
        temperature: within("temperature", fields.temperature, 1.0, 0.0..=2.0)? as f32,
        // -1 and 0 both mean all.
        top_k: within("top_k", fields.top_k, 0, -1..=u32::MAX.into())?.max(0) as u32,
        // 0 leaves the most likely token.
        top_p: (within("top_p", fields.top_p, 1.0, 0.0..=1.0)? as f32).max(f32::MIN_POSITIVE),
        min_p: within("min_p", fields.min_p, 0.0, 0.0..=1.0)? as f32,
        presence_penalty: penalty("presence_penalty", fields.presence_penalty)?,
        frequency_penalty: penalty("frequency_penalty", fields.frequency_penalty)?,
        repetition_penalty: within(
            "repetition_penalty",
            fields.repetition_penalty,
            1.0,
            0.01..=100.0,
        )? as f32,
        seed: 0,
        max_tokens,
        min_tokens,
        ignore_eos: fields.ignore_eos,
        stop_token_ids: stop_token_ids(fields.stop_token_ids.as_deref(), vocab_size)?,
        logit_bias: logit_bias(fields.logit_bias.as_ref(), vocab_size)?,
        logprobs: None,
    };
    Ok(Controls {
        params,
        // The bits of a negative seed are as good as any.
        seed: fields.seed.map(i64::cast_unsigned),
        n: within("n", fields.n, 1, 1..=N_MAX)? as u32,
        stop: stop(fields.stop.as_ref().map(|stop| stop.0.as_slice()).unwrap_or_default())?,
        include_stop_str: fields.include_stop_str_in_output,
        skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
    })
}

/// [`controls`] of SGLang's own form, which has other names for some fields.
///
/// # Errors
/// Names the first field that is out of its range.
pub fn native_controls(fields: &NativeSampling, vocab_size: usize) -> Result<Controls, ApiError> {
    let fields = fields.clone();
    let common = Common {
        max_tokens: Some(fields.max_new_tokens.unwrap_or(128)),
        min_tokens: fields.min_new_tokens,
        stop: fields.stop,
        stop_token_ids: fields.stop_token_ids,
        include_stop_str_in_output: fields.no_stop_trim,
        ignore_eos: fields.ignore_eos,
        skip_special_tokens: fields.skip_special_tokens,
        n: fields.n,
        seed: fields.sampling_seed,
        temperature: fields.temperature,
        top_p: fields.top_p,
        top_k: fields.top_k,
        min_p: fields.min_p,
        presence_penalty: fields.presence_penalty,
        frequency_penalty: fields.frequency_penalty,
        repetition_penalty: fields.repetition_penalty,
        ebnf: fields.ebnf,
        structural_tag: fields.structural_tag,
        ..Common::default()
    };
    controls(&common, 0, vocab_size).map_err(|error| {
        error.rename(|param| match param {
            "max_tokens" => "sampling_params.max_new_tokens".to_string(),
            "min_tokens" => "sampling_params.min_new_tokens".to_string(),
            "seed" => "sampling_params.sampling_seed".to_string(),
            param => format!("sampling_params.{param}"),
        })
    })
}

/// Alternatives to report, from the field of this name.
///
/// # Errors
/// If it is out of its range.
pub fn top_logprobs(name: &'static str, value: Option<i64>) -> Result<u32, ApiError> {
    Ok(within(name, value, 0, 0..=TOP_LOGPROBS_MAX)? as u32)
}

/// Compiles the form that the answer is bound to, if it is bound to one.
///
/// # Errors
/// Names the field whose form is wrong, too large or too complex, or the second of two.
pub fn form(
    app: &App,
    response_format: Option<&Value>,
    regex: Option<&str>,
    grammar: Option<&str>,
) -> Result<Option<Grammar>, ApiError> {
    let format = response_format.map(response_format_source).transpose()?.flatten();
    let forms = [
        ("response_format", format),
        ("regex", regex.map(|regex| GrammarSource::Regex(regex.to_string()))),
        ("grammar", grammar.map(|grammar| GrammarSource::Lark(grammar.to_string()))),
    ];
    let mut given = forms.into_iter().filter_map(|(name, form)| Some((name, form?)));
    let Some((name, form)) = given.next() else { return Ok(None) };
    if let Some((second, _)) = given.next() {
        return Err(ApiError::invalid(second, format!("and {name} exclude each other")));
    }
    compile(app, name, &form).map(Some)
}

/// Compiles a form that came in the field of this name.
///
/// # Errors
/// If it is wrong, too large or too complex.
pub fn compile(app: &App, name: &'static str, form: &GrammarSource) -> Result<Grammar, ApiError> {
    app.frontend.compile(form).map_err(|error| ApiError::invalid(name, error.to_string()))
}

/// Forms in notations of other servers.
fn refuse_other_forms(fields: &Common) -> Result<(), ApiError> {
    let others = [
        ("ebnf", fields.ebnf, "grammar, in Lark's notation"),
        ("structural_tag", fields.structural_tag, "response_format, regex or grammar"),
        ("structured_outputs", fields.structured_outputs, "response_format, regex or grammar"),
        ("guided_json", fields.guided_json, "response_format"),
        ("guided_regex", fields.guided_regex, "regex"),
        ("guided_choice", fields.guided_choice, "regex"),
        ("guided_grammar", fields.guided_grammar, "grammar, in Lark's notation"),
    ];
    match others.into_iter().find(|(_, given, _)| given.is_some()) {
        Some((name, _, instead)) => {
            Err(ApiError::invalid(name, format!("is not supported; use {instead}")))
        }
        None => Ok(()),
    }
}

fn response_format_source(format: &Value) -> Result<Option<GrammarSource>, ApiError> {
    match format["type"].as_str() {
        _ if format.is_null() => Ok(None),
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(GrammarSource::JsonObject)),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            Value::Null => {
                Err(ApiError::invalid("response_format", "json_schema.schema is missing"))
            }
            schema => Ok(Some(GrammarSource::JsonSchema(schema.clone()))),
        },
        _ => {
            let message = "type is none of text, json_object and json_schema";
            Err(ApiError::invalid("response_format", message))
        }
    }
}

/// Refuses a request that cannot end within `len_max` tokens, prompt included.
///
/// # Errors
/// 400 with OpenAI's code.
pub fn length(
    prompt_len: usize,
    params: &SamplingParams,
    len_max: usize,
    prompt: &'static str,
) -> Result<(), ApiError> {
    let max_tokens = match params.max_tokens {
        u32::MAX => 1,
        max_tokens => max_tokens.max(1) as usize,
    };
    if prompt_len + max_tokens <= len_max {
        return Ok(());
    }
    let param = if prompt_len >= len_max { prompt } else { "max_tokens" };
    // OpenAI's words: clients look for them where they do not look at the code.
    let message = format!(
        "this model's maximum context length is {len_max} tokens, and the prompt has {prompt_len} \
         and the answer may have {max_tokens}"
    );
    Err(ApiError::invalid(param, message).with_code("context_length_exceeded"))
}

fn within<T: PartialOrd + Display>(
    name: &'static str,
    value: Option<T>,
    default: T,
    range: RangeInclusive<T>,
) -> Result<T, ApiError> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    let message = format!("{value} is not between {} and {}", range.start(), range.end());
    Err(ApiError::invalid(name, message))
}

fn penalty(name: &'static str, value: Option<f64>) -> Result<f32, ApiError> {
    Ok(within(name, value, 0.0, -2.0..=2.0)? as f32)
}

fn stop(stop: &[String]) -> Result<Vec<String>, ApiError> {
    if stop.len() > STOPS_MAX {
        let message = format!("{} strings are too many; {STOPS_MAX} may be", stop.len());
        return Err(ApiError::invalid("stop", message));
    }
    if stop.iter().any(|stop| stop.len() > STOP_BYTES_MAX) {
        let message = format!("a string has more than {STOP_BYTES_MAX} bytes");
        return Err(ApiError::invalid("stop", message));
    }
    // Some clients send an empty string and mean none.
    Ok(stop.iter().filter(|stop| !stop.is_empty()).cloned().collect())
}

fn stop_token_ids(ids: Option<&[i64]>, vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    let ids = ids.unwrap_or_default();
    if ids.len() > STOP_IDS_MAX {
        let message = format!("{} ids are too many; {STOP_IDS_MAX} may be", ids.len());
        return Err(ApiError::invalid("stop_token_ids", message));
    }
    ids.iter().map(|&id| token("stop_token_ids", id, vocab_size)).collect()
}

fn logit_bias(
    biases: Option<&BTreeMap<String, f64>>,
    vocab_size: usize,
) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = biases else { return Ok(Vec::new()) };
    if biases.len() > BIASES_MAX {
        let message = format!("{} entries are too many; {BIASES_MAX} may be", biases.len());
        return Err(ApiError::invalid("logit_bias", message));
    }
    let parse = |(id, &bias): (&String, &f64)| {
        let not_an_id = || ApiError::invalid("logit_bias", format!("{id:?} is not a token id"));
        let id = token("logit_bias", id.parse().map_err(|_| not_an_id())?, vocab_size)?;
        Ok((id, within("logit_bias", Some(bias), 0.0, -100.0..=100.0)? as f32))
    };
    biases.iter().map(parse).collect()
}

/// An id of the vocabulary.
fn token(name: &'static str, id: i64, vocab_size: usize) -> Result<u32, ApiError> {
    match u32::try_from(id) {
        Ok(token) if (token as usize) < vocab_size => Ok(token),
        _ => {
            let message = format!("{id} is not in the vocabulary of {vocab_size}");
            Err(ApiError::invalid(name, message))
        }
    }
}
