//! One rank: a plan in, tokens on their way to the host out. Nothing here waits for the device.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use minisgl_scheduler::plan::{PlanRow, RowInput, RowOutput, Slot, StepPlan};
use minisgl_tensor::{Backend, BackendError, Batch, Collective, DType, Mark, Tensor};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::footprint::{matrix_bytes, megabytes};
use crate::graphs::{Graphs, bucket_sizes};
use crate::inputs::{Inputs, StepInputs};
use crate::kv::{KvBudget, KvPool};
use crate::layers::{Attention, ForwardCtx, Logits};
use crate::models::{self, Model};
use crate::options::EngineOptions;
use crate::sampler::{self, Collected, Score};
use crate::shares::Shares;
use crate::weights::{DummyBlock, WeightScope};
use crate::workspace::{StepSizes, Workspace};

/// A rank's device and its way to the others.
#[derive(Clone)]
pub struct RankDevices {
    pub backend: Arc<dyn Backend>,
    pub collective: Arc<dyn Collective>,
}

/// A rank that has its weights and workspace, and can say how many pages it could hold.
pub struct LoadedRank {
    devices: RankDevices,
    config: ModelConfig,
    model: Box<dyn Model>,
    workspace: Workspace,
    inputs: Inputs,
    sizes: StepSizes,
    shares: Shares,
    page_size: usize,
    graph_batch_max: usize,
    seq_len_max: usize,
    note_device_times: bool,
    /// `[2, rows] I32`: tokens to score and their targets.
    score_inputs: Tensor,
}

/// A rank that is ready to run.
pub struct Rank {
    /// Dropped first: a collective may wait for the end of the graphs that it is recorded in.
    graphs: Graphs,
    kv: KvPool,
    loaded: LoadedRank,
}

impl LoadedRank {
    pub fn load(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        devices: RankDevices,
        shares: Shares,
        seq_len_max: usize,
    ) -> Result<Self> {
        let backend = devices.backend.as_ref();
        ensure!(
            options.dummy_weights || !checkpoint.is_empty(),
            "{} holds no weights",
            checkpoint.path().display()
        );
        let started = Instant::now();
        let dummy = options.dummy_weights.then(DummyBlock::new);
        let scope =
            WeightScope::new(checkpoint, dummy.as_ref(), backend, options.precision, &shares);
        let config = checkpoint.config().clone();
        let model = models::load(&scope, &config, seq_len_max).with_context(|| {
            let path = checkpoint.path().display();
            match backend.matrix_dtype().map(|dtype| matrix_bytes(&config, &shares, dtype)) {
                Some(bytes) => format!("loading {} MB of weights from {path}", megabytes(bytes)),
                None => format!("loading {path}"),
            }
        })?;
        backend.synchronize()?;
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "weights are there");
        let sizes = StepSizes {
            tokens: options.step_tokens_max.max(options.running_requests_max),
            rows: options.running_requests_max,
        };
        let sized_by = || {
            format!(
                "steps of {} tokens and {} requests, which a smaller --max-prefill-length or \
                 --max-running-requests would shrink",
                sizes.tokens, sizes.rows
            )
        };
        Ok(Self {
            workspace: Workspace::new(backend, &config, &shares, sizes).with_context(sized_by)?,
            inputs: Inputs::new(
                backend,
                sizes,
                options.page_size,
                seq_len_max,
                backend.prefix_rows_max(Attention::heads(&config, &shares)),
            )
            .with_context(sized_by)?,
            score_inputs: backend.alloc(DType::I32, &[2, sizes.rows])?,
            graph_batch_max: options.graph_batch_max.min(sizes.rows),
            seq_len_max,
            page_size: options.page_size,
            // Only the first rank reports.
            note_device_times: options.note_device_times && devices.collective.rank() == 0,
            devices,
            config,
            model,
            sizes,
            shares,
        })
    }

    pub fn kv_budget(&self) -> Result<KvBudget> {
        let heads = Attention::heads(&self.config, &self.shares);
        let backend = self.devices.backend.as_ref();
        KvBudget::measure(backend, self.config.num_layers, heads, self.page_size)
    }

    /// Allocates the pool and captures the graphs, largest first, in the same order on all ranks.
    pub fn finish(self, pages: usize) -> Result<Rank> {
        let heads = Attention::heads(&self.config, &self.shares);
        let backend = self.devices.backend.as_ref();
        let started = Instant::now();
        let kv = KvPool::new(backend, self.config.num_layers, heads, pages, self.page_size)?;
        backend.synchronize()?;
        tracing::info!(seconds = started.elapsed().as_secs_f64(), pages, "the KV pool is there");
        let started = Instant::now();
        let mut rank = Rank { graphs: Graphs::default(), kv, loaded: self };
        rank.rehearse().context("recording the largest steps")?;
        for size in bucket_sizes(rank.loaded.graph_batch_max).into_iter().rev() {
            if !rank.capture(size).context("capturing a decode graph")? {
                break;
            }
        }
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "decode graphs are captured");
        Ok(rank)
    }
}

impl Rank {
    /// Runs one step behind those before it.
    pub fn run(&mut self, plan: &StepPlan) -> Result<Collected, BackendError> {
        let begin = self.mark()?;
        let mut collected = self.enqueue(plan)?;
        if let Some(begin) = begin {
            collected.add_marks(self.mark()?.map(|end| [begin, end]));
        }
        Ok(collected)
    }

    fn mark(&self) -> Result<Option<Box<dyn Mark>>, BackendError> {
        match self.loaded.note_device_times {
            true => self.loaded.devices.backend.mark(),
            false => Ok(None),
        }
    }

    fn enqueue(&mut self, plan: &StepPlan) -> Result<Collected, BackendError> {
        let plain = |row: &PlanRow| matches!(row.output, RowOutput::Sample(_));
        let may_replay = plan.is_decode() && plan.rows.iter().all(plain);
        let bucket = may_replay.then(|| self.graphs.bucket_for(plan.rows.len())).flatten();
        let backend = Arc::clone(&self.loaded.devices.backend);
        let inputs = self.loaded.inputs.upload(backend.as_ref(), plan, bucket)?;
        let sampled = inputs.sampled_rows.len();
        if let Some(bucket) = bucket {
            let shares = inputs.batch.shared.is_some();
            let logits = self.graphs.launch(bucket, shares)?.first(sampled);
            return sampler::sample(&*backend, &self.loaded.workspace, plan, &inputs, &logits);
        }
        let ctx = self.ctx(&inputs.batch, &inputs.ids);
        self.loaded.model.forward(&ctx)?;
        // Scores come first: they and the sampled rows' logits share a buffer.
        let scores = self.score(&ctx, plan)?;
        let mut collected = match sampled {
            0 => Collected::default(),
            _ => {
                let logits = self.logits(&ctx, &inputs)?;
                sampler::sample(&*backend, ctx.workspace, plan, &inputs, &logits)?
            }
        };
        collected.add_scores(scores);
        Ok(collected)
    }

    fn logits(&self, ctx: &ForwardCtx<'_>, inputs: &StepInputs) -> Result<Logits, BackendError> {
        let head = self.loaded.model.head();
        let temperature = Some(inputs.temperature());
        if inputs.dense {
            return head.forward(ctx, &ctx.hidden(), temperature);
        }
        let rows = ctx.workspace.gathered.first(inputs.sampled_rows.len());
        ctx.backend.gather(&ctx.hidden(), &inputs.last_tokens, &rows)?;
        head.forward(ctx, &rows, temperature)
    }

    /// The log-probabilities of input tokens, as many at once as the logits' buffer holds.
    fn score(&self, ctx: &ForwardCtx<'_>, plan: &StepPlan) -> Result<Vec<Score>, BackendError> {
        let mut scores = Vec::new();
        let mut first_token = 0;
        for (row, plan_row) in plan.rows.iter().enumerate() {
            let start = first_token;
            first_token += plan_row.extend_len as usize;
            let Some((targets, top)) = sampler::score_of(&plan_row.output) else { continue };
            for (lot, targets) in targets.chunks(self.loaded.sizes.rows).enumerate() {
                let first = start + lot * self.loaded.sizes.rows;
                let tokens = (first..first + targets.len()).map(|token| token as i32);
                let ids = targets.iter().map(|target| target.unwrap_or(0) as i32);
                let host: Vec<i32> = tokens.chain(ids).collect();
                let device = self.loaded.score_inputs.reshape(&[2, targets.len()]);
                ctx.backend.upload(bytemuck::cast_slice(&host), &device)?;
                let part = |index: usize| device.rows(index..index + 1).reshape(&[targets.len()]);
                let rows = ctx.workspace.gathered.first(targets.len());
                ctx.backend.gather(&ctx.hidden(), &part(0), &rows)?;
                let logits = self.loaded.model.head().forward(ctx, &rows, None)?.values;
                let downloads =
                    sampler::logprobs(ctx.backend, ctx.workspace, &part(1), top, &logits)?;
                let wanted = targets.iter().map(Option::is_some).collect();
                scores.push(Score { row, wanted, downloads });
            }
        }
        Ok(scores)
    }

    /// Records forward passes of prompts of all sizes and throws them away: what a device allocates,
    /// loads or measures at an operation's first use is had before ranks can wait for one another, and before
    /// anybody waits for a prompt.
    fn rehearse(&mut self) -> Result<(), BackendError> {
        let StepSizes { tokens: tokens_max, rows: rows_max } = self.loaded.sizes;
        let tokens_max = tokens_max.min(rows_max * self.loaded.seq_len_max);
        let halves = std::iter::successors(Some(tokens_max), |tokens| Some(tokens / 2));
        let sizes = halves.take_while(|tokens| *tokens >= 64);
        for tokens in sizes.flat_map(|tokens| [tokens, tokens / 4 * 3]) {
            // Several tokens a row, and as even as they go.
            let rows = rows_max.min(tokens / 2);
            let row = |index: usize| {
                let range = tokens * index / rows..tokens * (index + 1) / rows;
                PlanRow {
                    slot: Slot(index as u32),
                    cached_len: 0,
                    extend_len: range.len() as u32,
                    input: RowInput::Tokens(vec![0; range.len()]),
                    output: RowOutput::Sample(Arc::default()),
                }
            };
            let plan = StepPlan {
                step: 0,
                rows: (0..rows).map(row).collect(),
                page_updates: Vec::new(),
                adjustments: None,
                shared_prefixes: Vec::new(),
            };
            let backend = Arc::clone(&self.loaded.devices.backend);
            let inputs = self.loaded.inputs.upload(backend.as_ref(), &plan, None)?;
            let batch = Batch { host: None, ..inputs.batch.clone() };
            let ctx = self.ctx(&batch, &inputs.ids);
            let graph = backend.capture(&mut || {
                self.loaded.model.forward(&ctx)?;
                self.logits(&ctx, &inputs).map(drop)
            })?;
            if graph.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Records the forward pass of a decode batch, in all ways in which such batches come; false on a
    /// device without graphs.
    fn capture(&mut self, size: usize) -> Result<bool, BackendError> {
        let backend = Arc::clone(&self.loaded.devices.backend);
        let inputs = self.loaded.inputs.upload_padding(backend.as_ref(), size)?;
        // A single row has nobody to share with; where sharing nothing pays, all steps come that way.
        let can_share = inputs.batch.shared.is_some();
        let may_not = !can_share || !backend.prefixes_pay(size, 0);
        let ways = [(false, may_not), (true, can_share)];
        for (shares, _) in ways.into_iter().filter(|(_, comes)| *comes) {
            let shared = inputs.batch.shared.clone().filter(|_| shares);
            let batch = Batch { host: None, shared, ..inputs.batch.clone() };
            let ctx = self.ctx(&batch, &inputs.ids);
            let mut logits = None;
            let mut forward = || {
                self.loaded.model.forward(&ctx)?;
                let temperature = Some(inputs.temperature());
                logits =
                    Some(self.loaded.model.head().forward(&ctx, &ctx.hidden(), temperature)?);
                Ok(())
            };
            let graph = backend.capture(&mut forward)?;
            let (Some(graph), Some(logits)) = (graph, logits) else { return Ok(false) };
            self.graphs.push(size, shares, graph, logits);
        }
        Ok(true)
    }

    fn ctx<'a>(&'a self, batch: &'a Batch, input_ids: &'a Tensor) -> ForwardCtx<'a> {
        ForwardCtx {
            backend: self.loaded.devices.backend.as_ref(),
            collective: self.loaded.devices.collective.as_ref(),
            workspace: &self.loaded.workspace,
            kv: &self.kv,
            batch,
            input_ids,
        }
    }
}
