//! From logits to tokens and log-probabilities, and from their bytes to a `StepResult`.

use minisgl_scheduler::plan::{DeviceSpan, RowOutput, StepPlan, StepResult, TokenLogprobs};
use minisgl_tensor::{Adjust, Backend, BackendError, Download, Logprobs, Mark, Tensor};

use crate::inputs::StepInputs;
use crate::layers::Logits;
use crate::workspace::{TOP_LOGPROBS_MAX, Workspace};

/// A step's results on their way to the host.
#[derive(Default)]
pub struct Collected {
    tokens: Option<Box<dyn Download>>,
    sampled_rows: Vec<usize>,
    logprobs: Option<LogprobDownloads>,
    scores: Vec<Score>,
    /// The step's begin and end on the device.
    marks: Option<[Box<dyn Mark>; 2]>,
}

/// The log-probabilities of some of one row's input tokens.
pub struct Score {
    pub row: usize,
    /// For each, whether it was asked for.
    pub wanted: Vec<bool>,
    pub downloads: LogprobDownloads,
}

/// One lot of log-probabilities.
pub struct LogprobDownloads {
    logprob: Box<dyn Download>,
    rank: Box<dyn Download>,
    top: Option<TopDownloads>,
}

/// The most likely ids and their log-probabilities, `count` a row.
struct TopDownloads {
    ids: Box<dyn Download>,
    logprobs: Box<dyn Download>,
    count: usize,
}

/// Edits logits by the plan's adjustments, for which it waits, then samples.
pub fn sample(
    backend: &dyn Backend,
    workspace: &Workspace,
    plan: &StepPlan,
    inputs: &StepInputs,
    logits: &Logits,
) -> Result<Collected, BackendError> {
    let Logits { values: logits, survey } = logits;
    let mut survey = survey.as_ref();
    let sampled = inputs.sampled_rows.len();
    if let Some(cell) = &plan.adjustments {
        let adjustments = cell.wait();
        let row_of = |row: usize| inputs.sampled_rows.iter().position(|r| *r == row);
        let mut edits = Vec::new();
        let mut masks: Vec<(u32, &[u32])> = Vec::new();
        for adjustment in adjustments.iter() {
            let Some(row) = row_of(adjustment.row) else { continue };
            let row = row as u32;
            edits.extend(adjustment.edits.iter().map(|e| (row, e.token, e.scale, e.bias)));
            masks.extend(adjustment.mask.as_ref().map(|mask| (row, mask.as_slice())));
        }
        if !edits.is_empty() || !masks.is_empty() {
            backend.adjust(&Adjust { edits: &edits, masks: &masks }, logits)?;
            survey = None;
        }
    }
    let tokens = workspace.tokens.first(sampled);
    let asked = inputs.sampled_rows.iter().filter_map(|row| logprobs_of(plan, *row)).max();
    let args = inputs.sample(workspace, survey, asked.is_none(), &tokens);
    backend.sample(&args, logits)?;
    Ok(Collected {
        logprobs: match asked {
            Some(top) => Some(logprobs(backend, workspace, &tokens, top as usize, logits)?),
            None => None,
        },
        tokens: Some(backend.download(&tokens)?),
        sampled_rows: inputs.sampled_rows.clone(),
        scores: Vec::new(),
        marks: None,
    })
}

/// The log-probabilities of `targets [rows]` under `logits [rows, vocabulary]`.
pub fn logprobs(
    backend: &dyn Backend,
    workspace: &Workspace,
    targets: &Tensor,
    top: usize,
    logits: &Tensor,
) -> Result<LogprobDownloads, BackendError> {
    let rows = targets.dim(0);
    let top = top.min(TOP_LOGPROBS_MAX).min(logits.row_len());
    let buffers = &workspace.logprobs;
    let args = Logprobs {
        targets,
        logprob: &buffers.logprob.first(rows),
        rank: &buffers.rank.first(rows),
        top_ids: &buffers.top_ids.reshape(&[rows, top]),
        top_logprobs: &buffers.top_logprobs.reshape(&[rows, top]),
    };
    backend.logprobs(&args, logits)?;
    Ok(LogprobDownloads {
        logprob: backend.download(args.logprob)?,
        rank: backend.download(args.rank)?,
        top: match top {
            0 => None,
            count => Some(TopDownloads {
                ids: backend.download(args.top_ids)?,
                logprobs: backend.download(args.top_logprobs)?,
                count,
            }),
        },
    })
}

fn logprobs_of(plan: &StepPlan, row: usize) -> Option<u32> {
    plan.rows[row].output.sampling()?.logprobs
}

impl Collected {
    pub fn add_scores(&mut self, scores: Vec<Score>) {
        self.scores = scores;
    }

    pub fn add_marks(&mut self, marks: Option<[Box<dyn Mark>; 2]>) {
        self.marks = marks;
    }

    /// Waits for everything.
    pub fn wait(self, plan: &StepPlan) -> Result<StepResult, BackendError> {
        let rows = plan.rows.len();
        let mut result = StepResult {
            tokens: vec![None; rows],
            logprobs: vec![None; rows],
            scores: vec![Vec::new(); rows],
            on_device: None,
        };
        if let Some(tokens) = self.tokens {
            let tokens = integers(&tokens.wait()?);
            for (row, token) in self.sampled_rows.iter().zip(tokens) {
                result.tokens[*row] = Some(token);
            }
        }
        if let Some(downloads) = self.logprobs {
            for (row, mut logprobs) in self.sampled_rows.iter().zip(downloads.wait()?) {
                if let Some(top) = logprobs_of(plan, *row) {
                    logprobs.top.truncate(top as usize);
                    result.logprobs[*row] = Some(logprobs);
                }
            }
        }
        for score in self.scores {
            let logprobs = score.downloads.wait()?.into_iter();
            let wanted = score.wanted.iter().zip(logprobs);
            result.scores[score.row].extend(wanted.map(|(wanted, l)| wanted.then_some(l)));
        }
        if let Some([begin, end]) = self.marks {
            let (began, ended) = (begin.time()?, end.time()?);
            let took = ended.saturating_duration_since(began);
            result.on_device = Some(DeviceSpan { began, took });
        }
        Ok(result)
    }
}

impl LogprobDownloads {
    fn wait(self) -> Result<Vec<TokenLogprobs>, BackendError> {
        let logprob = floats(&self.logprob.wait()?);
        let rank = integers(&self.rank.wait()?);
        let (ids, values, top) = match self.top {
            Some(top) => (integers(&top.ids.wait()?), floats(&top.logprobs.wait()?), top.count),
            None => (Vec::new(), Vec::new(), 0),
        };
        let tops = |row: usize| {
            let part = row * top..(row + 1) * top;
            ids[part.clone()].iter().copied().zip(values[part].iter().copied()).collect()
        };
        let both = logprob.into_iter().zip(rank).enumerate();
        Ok(both
            .map(|(row, (logprob, rank))| TokenLogprobs { logprob, rank, top: tops(row) })
            .collect())
    }
}

/// What a row scores: targets and alternatives.
pub fn score_of(output: &RowOutput) -> Option<(&[Option<u32>], usize)> {
    match output {
        RowOutput::Score { targets, top, .. } => Some((targets, *top as usize)),
        RowOutput::None | RowOutput::Sample(_) => None,
    }
}

fn integers(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
