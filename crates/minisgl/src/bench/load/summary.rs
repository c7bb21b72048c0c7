//! The figures of a load.

use std::time::Duration;

use serde::Serialize;

use super::run::Record;

/// What a load found. Times in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Requests that were answered.
    pub answered: usize,
    /// Requests that were not.
    pub failed: usize,
    /// From the first request to the last answer's end.
    pub seconds: f64,
    /// Tokens in all prompts, as the server counts.
    pub input_tokens: usize,
    /// Of these, what it had cached.
    pub cached_tokens: usize,
    /// Tokens in all answers.
    pub output_tokens: usize,
    /// Requests a second.
    pub requests_per_s: f64,
    /// Generated tokens a second.
    pub output_tokens_per_s: f64,
    /// From sending to the first text.
    pub ttft_ms: Percentiles,
    /// Between a chunk with text and the next, over all answers.
    pub inter_token_ms: Percentiles,
    /// A request's time behind its first token, divided by its further tokens.
    pub per_token_ms: Percentiles,
    /// From sending to the end.
    pub end_to_end_ms: Percentiles,
    /// The first few things that went wrong.
    pub errors: Vec<String>,
}

/// Of a set of times.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Percentiles {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Errors that are shown.
const ERRORS_MAX: usize = 5;

impl Summary {
    /// Of these records. A server that reports no usage gets its chunks counted as tokens.
    pub fn of(records: &[Record]) -> Self {
        let ended = |record: &Record| {
            record.sent + record.outcome.as_ref().map_or(Duration::ZERO, |answer| answer.total)
        };
        let last = records.iter().map(ended).max().unwrap_or_default();
        let first = records.iter().map(|record| record.sent).min().unwrap_or_default();
        let answers = || records.iter().filter_map(|record| record.outcome.as_ref().ok());
        let usages = || answers().filter_map(|answer| answer.usage);
        let output = |answer: &super::Answer| match answer.usage {
            Some(usage) => usage.completion_tokens,
            None => answer.gaps.len() + usize::from(answer.first.is_some()),
        };
        let seconds = (last - first).as_secs_f64();
        let output_tokens = answers().map(output).sum();
        let answered = answers().count();
        let per_token = answers().filter_map(|answer| {
            let (first, further) = (answer.first?, output(answer).checked_sub(1)?);
            let behind: Duration = answer.gaps.iter().sum();
            debug_assert!(first + behind <= answer.total);
            (further > 0).then(|| behind.div_f64(further as f64))
        });
        let errors = records.iter().filter_map(|record| record.outcome.as_ref().err());
        Self {
            answered,
            failed: records.len() - answered,
            seconds,
            input_tokens: usages().map(|usage| usage.prompt_tokens).sum(),
            cached_tokens: usages().map(|usage| usage.cached_tokens()).sum(),
            output_tokens,
            requests_per_s: answered as f64 / seconds.max(1e-9),
            output_tokens_per_s: output_tokens as f64 / seconds.max(1e-9),
            ttft_ms: Percentiles::of(answers().filter_map(|answer| answer.first)),
            inter_token_ms: Percentiles::of(answers().flat_map(|a| a.gaps.iter().copied())),
            per_token_ms: Percentiles::of(per_token),
            end_to_end_ms: Percentiles::of(answers().map(|answer| answer.total)),
            errors: errors.take(ERRORS_MAX).cloned().collect(),
        }
    }

    /// For a terminal.
    pub fn table(&self) -> String {
        let mut text = format!(
            "requests   {:>10}    {} failed, {:.2} s, {:.2} a second\n\
             tokens in  {:>10}    {} from the cache\n\
             tokens out {:>10}    {:.0} a second\n\n\
             ms               mean       p50       p90       p99       max\n",
            self.answered,
            self.failed,
            self.seconds,
            self.requests_per_s,
            self.input_tokens,
            self.cached_tokens,
            self.output_tokens,
            self.output_tokens_per_s,
        );
        for (name, times) in self.times() {
            let Percentiles { mean, p50, p90, p99, max } = times;
            text += &format!(
                "{name:<12} {mean:>8.2}  {p50:>8.2}  {p90:>8.2}  {p99:>8.2}  {max:>8.2}\n"
            );
        }
        for error in &self.errors {
            text += &format!("failed: {error}\n");
        }
        text
    }

    /// Each kind of time with its name.
    pub fn times(&self) -> [(&'static str, Percentiles); 4] {
        [
            ("first token", self.ttft_ms),
            ("inter-token", self.inter_token_ms),
            ("per token", self.per_token_ms),
            ("end to end", self.end_to_end_ms),
        ]
    }
}

impl Percentiles {
    /// By nearest rank; zeros where there is nothing.
    pub fn of(times: impl Iterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
        ms.sort_unstable_by(f64::total_cmp);
        let (Some(&max), count) = (ms.last(), ms.len() as f64) else { return Self::default() };
        let at = |share: f64| ms[((count * share).ceil() as usize).clamp(1, ms.len()) - 1];
        Self {
            mean: ms.iter().sum::<f64>() / count,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let of = |count: u64| Percentiles::of((1..=count).rev().map(Duration::from_millis));
        let hundred = of(100);
        assert_eq!((hundred.p50, hundred.p90, hundred.p99, hundred.max), (50.0, 90.0, 99.0, 100.0));
        assert_eq!(hundred.mean, 50.5);
        assert_eq!((of(1).p50, of(1).p99), (1.0, 1.0));
        assert_eq!(of(0).max, 0.0);
    }
}
