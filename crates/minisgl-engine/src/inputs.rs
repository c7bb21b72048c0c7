//! A step's small integers: packed on the host, one upload, views on the device.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use minisgl_scheduler::plan::{PageUpdate, RowInput, RowOutput, StepPlan};
use minisgl_tensor::{
    Backend, BackendError, Batch, DType, HostBatch, Sample, SharedPrefixes, Tensor,
};

use crate::workspace::{StepSizes, Workspace};

/// Page updates that travel in one upload.
const UPDATES_MAX: usize = 4096;
/// Values in the buffer begin at multiples of this, so that kernels may read them four at a time.
const ALIGN: usize = 4;

/// The buffers of all steps.
pub struct Inputs {
    host: Vec<i32>,
    device: Tensor,
    page_table: Tensor,
    /// The same on the host, to know where a token's K and V go.
    page_table_host: Vec<u32>,
    pages_per_slot: usize,
    page_size: usize,
    seq_len_max: usize,
    /// As `Backend::prefix_rows_max`, for this rank's heads.
    prefix_rows_max: usize,
}

/// A step as the device sees it.
pub struct StepInputs {
    pub batch: Batch,
    /// `[tokens] I32`.
    pub ids: Tensor,
    /// For each plan row that samples: which.
    pub sampled_rows: Vec<usize>,
    /// `[sampled] I32`: each one's last token in the step.
    pub last_tokens: Tensor,
    /// Token i is row i, and all rows sample: logits are taken of all tokens.
    pub dense: bool,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    slots: Tensor,
    all_greedy: bool,
}

impl StepInputs {
    /// `[rows] F32` of a bucket, where each of its steps has them; else of the rows that sample.
    pub fn temperature(&self) -> &Tensor {
        &self.temperature
    }

    /// The arguments of `Backend::sample`.
    pub fn sample<'a>(
        &'a self,
        workspace: &'a Workspace,
        survey: Option<&'a Tensor>,
        last_use: bool,
        tokens: &'a Tensor,
    ) -> Sample<'a> {
        Sample {
            temperature: &self.temperature,
            top_k: &self.top_k,
            top_p: &self.top_p,
            min_p: &self.min_p,
            seed: &self.seed,
            position: &self.position,
            slots: &self.slots,
            all_greedy: self.all_greedy,
            survey,
            last_use,
            token_table: &workspace.token_table,
            tokens,
        }
    }
}

/// Appends to the host buffer and remembers where each part begins.
struct Packer<'a>(&'a mut Vec<i32>);

impl Packer<'_> {
    fn push(&mut self, values: impl IntoIterator<Item = i32>) -> Range<usize> {
        self.push_padded(values, 0, 0)
    }

    /// At least `len` values, `filler` behind those given.
    fn push_padded(
        &mut self,
        values: impl IntoIterator<Item = i32>,
        len: usize,
        filler: i32,
    ) -> Range<usize> {
        let start = self.0.len().next_multiple_of(ALIGN);
        self.0.resize(start, 0);
        self.0.extend(values);
        if self.0.len() < start + len {
            self.0.resize(start + len, filler);
        }
        start..self.0.len()
    }
}

impl Inputs {
    pub fn new(
        backend: &dyn Backend,
        sizes: StepSizes,
        page_size: usize,
        seq_len_max: usize,
        prefix_rows_max: usize,
    ) -> Result<Self> {
        let pages_per_slot = seq_len_max.div_ceil(page_size);
        // Three values a token, three a row for the batch, nine for sampling, and the updates.
        let values = 3 * sizes.tokens + 12 * sizes.rows + 2 * UPDATES_MAX + 32 * ALIGN;
        // Where rows share prefixes: one value a row, and in lots of two rows one a lot and its places.
        let capacity = values + sizes.rows * (2 + prefix_rows_max.div_ceil(2));
        Ok(Self {
            host: Vec::new(),
            device: backend.alloc(DType::I32, &[capacity])?,
            page_table: backend.alloc(DType::I32, &[sizes.rows, pages_per_slot])?,
            page_table_host: vec![0; sizes.rows * pages_per_slot],
            pages_per_slot,
            page_size,
            seq_len_max,
            prefix_rows_max,
        })
    }

    /// Uploads a plan. With `bucket`, the step is padded to that many rows of one token each, and
    /// its parts lie where every step of that bucket has them.
    pub fn upload(
        &mut self,
        backend: &dyn Backend,
        plan: &StepPlan,
        bucket: Option<usize>,
    ) -> Result<StepInputs, BackendError> {
        let updates = self.apply_updates(backend, &plan.page_updates)?;
        let mut host = std::mem::take(&mut self.host);
        host.clear();
        let inputs = self.pack(backend, &mut host, plan, bucket);
        let mut packer = Packer(&mut host);
        let indices = packer.push(updates.iter().map(|update| self.flat(update) as i32));
        let pages = packer.push(updates.iter().map(|update| update.page.0 as i32));
        backend.upload(bytemuck::cast_slice(&host), &self.device)?;
        self.host = host;
        if !updates.is_empty() {
            let (indices, pages) = (self.view(indices), self.view(pages));
            backend.scatter(&indices, &pages, &self.page_table)?;
        }
        Ok(inputs)
    }

    /// A batch of nothing but padding, to warm up and to capture with.
    pub fn upload_padding(
        &mut self,
        backend: &dyn Backend,
        bucket: usize,
    ) -> Result<StepInputs, BackendError> {
        let plan = StepPlan {
            step: 0,
            rows: Vec::new(),
            page_updates: Vec::new(),
            adjustments: None,
            shared_prefixes: vec![],
        };
        self.upload(backend, &plan, Some(bucket))
    }

    /// Notes all updates on the host, and sends all but the last lot, which rides with the step.
    fn apply_updates<'a>(
        &mut self,
        backend: &dyn Backend,
        updates: &'a [PageUpdate],
    ) -> Result<&'a [PageUpdate], BackendError> {
        for update in updates {
            let index = self.flat(update);
            self.page_table_host[index] = update.page.0;
        }
        let early = updates.len().saturating_sub(UPDATES_MAX).next_multiple_of(UPDATES_MAX);
        let (early, last) = updates.split_at(early.min(updates.len()));
        for lot in early.chunks(UPDATES_MAX) {
            let mut host = Vec::new();
            let mut packer = Packer(&mut host);
            let indices = packer.push(lot.iter().map(|update| self.flat(update) as i32));
            let pages = packer.push(lot.iter().map(|update| update.page.0 as i32));
            backend.upload(bytemuck::cast_slice(&host), &self.device)?;
            backend.scatter(&self.view(indices), &self.view(pages), &self.page_table)?;
        }
        Ok(last)
    }

    fn flat(&self, update: &PageUpdate) -> usize {
        update.slot.0 as usize * self.pages_per_slot + update.index as usize
    }

    fn pack(
        &self,
        backend: &dyn Backend,
        host: &mut Vec<i32>,
        plan: &StepPlan,
        bucket: Option<usize>,
    ) -> StepInputs {
        let pad = bucket.unwrap_or(0);
        let rows = &plan.rows;
        let mut packer = Packer(host);
        let ids = packer.push_padded(rows.iter().flat_map(input_ids), pad, 0);
        let each = |row: &minisgl_scheduler::plan::PlanRow| row.cached_len..row.device_len();
        let positions = rows.iter().flat_map(each).map(|position| position as i32);
        let positions = packer.push_padded(positions, pad, 0);
        let store_at = rows.iter().flat_map(|row| {
            each(row).map(|position| self.store_at(row.slot.0 as usize, position as usize))
        });
        let store_at = packer.push_padded(store_at, pad, -1);
        let slots = packer.push_padded(rows.iter().map(|row| row.slot.0 as i32), pad, 0);
        let mut starts = vec![0];
        for row in rows {
            starts.push(starts[starts.len() - 1] + row.extend_len as i32);
        }
        starts.extend(rows.len() as i32 + 1..=pad as i32);
        let query_start = packer.push(starts.iter().copied());
        let kv_lens = rows.iter().map(|row| row.device_len() as i32);
        let kv_len = packer.push_padded(kv_lens, pad, 0);
        let decode_rows = match bucket {
            Some(bucket) => bucket,
            None => rows.iter().take_while(|row| row.extend_len == 1).count(),
        };
        let shared = self.pack_shared(backend, &mut packer, plan, decode_rows);
        let host_batch =
            HostBatch { query_start: starts, kv_len: packer.0[kv_len.clone()].to_vec() };
        let batch = Batch {
            rows: rows.len().max(pad),
            tokens: plan.tokens().max(pad),
            decode_rows,
            slots: self.view(slots),
            query_start: self.view(query_start),
            kv_len: self.view(kv_len),
            positions: self.view(positions),
            store_at: self.view(store_at),
            page_table: self.page_table.clone(),
            page_size: self.page_size,
            kv_len_max: match bucket {
                Some(_) => self.seq_len_max,
                None => host_batch.kv_len.iter().copied().max().unwrap_or(0) as usize,
            },
            extend_len_max: rows.iter().map(|row| row.extend_len as usize).max().unwrap_or(1),
            host: Some(Arc::new(host_batch)),
            shared,
        };
        self.pack_sampling(packer, plan, batch, self.view(ids), pad)
    }

    /// Deals rows that share a prefix into lots. There is room for the most lots that so many rows can
    /// be, so that a graph finds every step's in the same place. `None` where it would not pay; a batch of
    /// padding, to record with, always has them.
    fn pack_shared(
        &self,
        backend: &dyn Backend,
        packer: &mut Packer<'_>,
        plan: &StepPlan,
        decode_rows: usize,
    ) -> Option<SharedPrefixes> {
        let (lots_max, lot_size) = (decode_rows / 2, self.prefix_rows_max);
        if lot_size < 2 || lots_max == 0 {
            return None;
        }
        let (mut lot_rows, mut lot_tokens) = (Vec::new(), Vec::new());
        let (mut covered, mut spared) = (vec![0; decode_rows], 0);
        for prefix in &plan.shared_prefixes {
            let tokens = prefix.pages as i32 * self.page_size as i32;
            for lot in prefix.rows.chunks(lot_size).filter(|lot| lot.len() > 1) {
                lot_tokens.push(tokens);
                spared += (lot.len() - 1) * tokens as usize;
                let end = lot_rows.len() + lot_size;
                lot_rows.extend(lot.iter().map(|row| *row as i32));
                lot_rows.resize(end, -1);
                lot.iter().for_each(|row| covered[*row as usize] = tokens);
            }
        }
        let rows = packer.push_padded(lot_rows, lots_max * lot_size, -1);
        let tokens = packer.push_padded(lot_tokens, lots_max, 0);
        let covered = packer.push(covered);
        // Without the padding of a bucket.
        let own_rows = decode_rows.min(plan.rows.len());
        let pays = own_rows == 0 || backend.prefixes_pay(own_rows, spared);
        pays.then(|| SharedPrefixes {
            rows: self.view(rows).reshape(&[lots_max, lot_size]),
            tokens: self.view(tokens),
            covered: self.view(covered),
        })
    }

    fn pack_sampling(
        &self,
        mut packer: Packer<'_>,
        plan: &StepPlan,
        batch: Batch,
        ids: Tensor,
        pad: usize,
    ) -> StepInputs {
        let sampling: Vec<_> = plan
            .rows
            .iter()
            .enumerate()
            .filter_map(|(index, row)| Some((index, row, row.output.sampling()?)))
            .collect();
        let mut ends = Vec::with_capacity(plan.rows.len());
        let mut tokens = 0;
        for row in &plan.rows {
            tokens += row.extend_len as i32;
            ends.push(tokens - 1);
        }
        let bits = |value: f32| value.to_bits() as i32;
        let params = || sampling.iter().map(|(_, _, params)| *params);
        // First, as a graph reads them where they were when it was recorded.
        let temperature = packer.push_padded(params().map(|p| bits(p.temperature)), pad, 0);
        let last_tokens = packer.push(sampling.iter().map(|(index, ..)| ends[*index]));
        let top_k = packer.push(params().map(|p| i32::try_from(p.top_k).unwrap_or(i32::MAX)));
        let top_p = packer.push(params().map(|p| bits(p.top_p)));
        let min_p = packer.push(params().map(|p| bits(p.min_p)));
        let seed = packer.push(params().flat_map(|p| [p.seed as i32, (p.seed >> 32) as i32]));
        let position = packer.push(sampling.iter().map(|(_, row, _)| row.device_len() as i32));
        let slots = packer.push(sampling.iter().map(|(_, row, _)| row.slot.0 as i32));
        let float = |range: Range<usize>| {
            let view = self.view(range);
            view.view_as(DType::F32, &[view.elements()])
        };
        let is_plain = |output: &RowOutput| matches!(output, RowOutput::Sample(_));
        StepInputs {
            ids,
            dense: plan.is_decode() && plan.rows.iter().all(|row| is_plain(&row.output)),
            all_greedy: params().all(|p| p.temperature == 0.0),
            last_tokens: self.view(last_tokens),
            temperature: float(temperature),
            top_k: self.view(top_k),
            top_p: float(top_p),
            min_p: float(min_p),
            seed: self.view(seed).reshape(&[sampling.len(), 2]),
            position: self.view(position),
            slots: self.view(slots),
            sampled_rows: sampling.iter().map(|(index, ..)| *index).collect(),
            batch,
        }
    }

    fn store_at(&self, slot: usize, position: usize) -> i32 {
        let page =
            self.page_table_host[slot * self.pages_per_slot + position / self.page_size] as usize;
        (page * self.page_size + position % self.page_size) as i32
    }

    fn view(&self, range: Range<usize>) -> Tensor {
        self.device.rows(range)
    }
}

fn input_ids(row: &minisgl_scheduler::plan::PlanRow) -> Vec<i32> {
    match &row.input {
        RowInput::Tokens(ids) => ids.iter().map(|id| *id as i32).collect(),
        RowInput::Sampled => vec![-1 - row.slot.0 as i32],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minisgl_cpu::{CpuBackend, CpuOptions};
    use minisgl_scheduler::plan::{PlanRow, SharedPrefix, Slot};
    use minisgl_scheduler::sampling::SamplingParams;

    fn integers(backend: &CpuBackend, tensor: &Tensor) -> Vec<i32> {
        let bytes = backend.download(tensor).unwrap().wait().unwrap();
        bytemuck::allocation::pod_collect_to_vec(&bytes)
    }

    fn inputs() -> (CpuBackend, Inputs) {
        let cpu = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        let backend = CpuBackend::new(cpu).unwrap();
        let sizes = StepSizes { tokens: 16, rows: 8 };
        let inputs = Inputs::new(&backend, sizes, 4, 64, 3).unwrap();
        (backend, inputs)
    }

    fn decodes(rows: u32, output: &RowOutput) -> StepPlan {
        let row = |slot| PlanRow {
            slot: Slot(slot),
            cached_len: 30,
            extend_len: 1,
            input: RowInput::Sampled,
            output: output.clone(),
        };
        StepPlan {
            step: 0,
            rows: (0..rows).map(row).collect(),
            page_updates: Vec::new(),
            adjustments: None,
            shared_prefixes: Vec::new(),
        }
    }

    #[test]
    fn temperatures_of_a_bucket_always_lie_in_the_same_place() {
        let (backend, mut inputs) = inputs();
        let recorded = inputs.upload_padding(&backend, 8).unwrap().temperature;
        let sampling = Arc::new(SamplingParams { temperature: 0.5, ..SamplingParams::default() });
        let plan = decodes(5, &RowOutput::Sample(sampling));
        let now = inputs.upload(&backend, &plan, Some(8)).unwrap().temperature;
        assert_eq!((now.address(), now.shape()), (recorded.address(), recorded.shape()));
        let bits = 0.5_f32.to_bits() as i32;
        assert_eq!(integers(&backend, &now), [bits, bits, bits, bits, bits, 0, 0, 0]);
    }

    /// A graph is recorded over padding, and must find every later step's lots where it found that.
    #[test]
    fn lots_of_a_bucket_always_lie_in_the_same_place() {
        let (backend, mut inputs) = inputs();
        let recorded = inputs.upload_padding(&backend, 8).unwrap().batch.shared.unwrap();
        assert_eq!(integers(&backend, &recorded.rows), [-1; 12]);
        assert_eq!(integers(&backend, &recorded.tokens), [0; 4]);
        assert_eq!(integers(&backend, &recorded.covered), [0; 8]);

        let plan = StepPlan {
            // Four rows in lots of three leave one that has nobody to share with.
            shared_prefixes: vec![
                SharedPrefix { rows: vec![0, 2, 3, 6], pages: 5 },
                SharedPrefix { rows: vec![1, 4], pages: 7 },
            ],
            ..decodes(7, &RowOutput::None)
        };
        let shared = inputs.upload(&backend, &plan, Some(8)).unwrap().batch.shared.unwrap();
        for (now, then) in [
            (&shared.rows, &recorded.rows),
            (&shared.tokens, &recorded.tokens),
            (&shared.covered, &recorded.covered),
        ] {
            assert_eq!((now.address(), now.shape()), (then.address(), then.shape()));
        }
        assert_eq!(integers(&backend, &shared.rows)[..6], [0, 2, 3, 1, 4, -1]);
        assert_eq!(integers(&backend, &shared.rows)[6..], [-1; 6]);
        assert_eq!(integers(&backend, &shared.tokens), [20, 28, 0, 0]);
        assert_eq!(integers(&backend, &shared.covered), [20, 28, 20, 20, 28, 0, 0, 0]);
        // One row shares with nobody, and takes the way of a backend that does not ask.
        assert!(inputs.upload_padding(&backend, 1).unwrap().batch.shared.is_none());
    }
}
