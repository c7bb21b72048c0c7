//! From logits to tokens: edits, masks, the draw, log-probabilities.

use minisgl_tensor::{Adjust, DType, Logprobs, Result, Sample, Tensor};

use crate::backend::CudaBackend;
use crate::device::{Launch, args};
use crate::head::TILE;
use crate::kernels::Module;

/// Logits that one warp of `survey` looks at; `CHUNK` in `sample.cu`.
const CHUNK: usize = 512;

impl CudaBackend {
    pub(crate) fn adjust_op(&self, a: &Adjust<'_>, logits: &Tensor) -> Result<()> {
        let vocab = logits.row_len();
        if !a.edits.is_empty() {
            let words: Vec<u32> = a
                .edits
                .iter()
                .flat_map(|&(row, token, scale, bias)| {
                    [row, token, scale.to_bits(), bias.to_bits()]
                })
                .collect();
            let edits = self.scratch("edits", DType::I32, &[words.len()])?;
            self.staging.upload(bytemuck::cast_slice(&words), &edits)?;
            self.simple(
                "edit_logits",
                Launch::new(a.edits.len().div_ceil(128), 128),
                args![logits, vocab, &edits, a.edits.len()],
            )?;
        }
        if !a.masks.is_empty() {
            let length = vocab.div_ceil(32);
            let mut words = Vec::with_capacity(a.masks.len() * (length + 1));
            for (row, bits) in a.masks {
                words.push(*row);
                words.extend(bits.iter().copied().chain(std::iter::repeat(0)).take(length));
            }
            let masks = self.scratch("masks", DType::I32, &[words.len()])?;
            self.staging.upload(bytemuck::cast_slice(&words), &masks)?;
            let shape = Launch {
                grid: [vocab.div_ceil(256), a.masks.len(), 1],
                threads: 256,
                shared: 0,
                cluster: 1,
            };
            self.simple("mask_logits", shape, args![logits, vocab, &masks, length])?;
        }
        Ok(())
    }

    pub(crate) fn sample_op(&self, a: &Sample<'_>, logits: &Tensor) -> Result<()> {
        self.fault.iter().try_for_each(|fault| fault.step(self))?;
        let (rows, vocab) = (logits.dim(0), logits.row_len());
        let (stats, chunk) = match a.survey {
            Some(survey) => (survey.clone(), TILE),
            None => (self.survey(a, logits)?, CHUNK),
        };
        // Without a survey of theirs, logits have just been read, and mostly are in memory already.
        let is_last_use = a.last_use && a.survey.is_some();
        let choose = self.kernels.get(Module::Sample, &[], "choose")?;
        // SAFETY: the kernel's parameters in order; every tensor has an entry a row, `stats` one for each chunk of
        // a row.
        unsafe {
            self.device.launch(
                choose,
                Launch::new(rows, 1024),
                args![
                    logits,
                    &stats,
                    a.temperature,
                    a.top_k,
                    a.top_p,
                    a.min_p,
                    a.seed,
                    a.position,
                    a.slots,
                    vocab,
                    vocab.div_ceil(chunk),
                    chunk,
                    is_last_use,
                    a.token_table,
                    a.tokens
                ],
            )
        }
    }

    /// What `choose` needs to know of each chunk of logits.
    fn survey(&self, a: &Sample<'_>, logits: &Tensor) -> Result<Tensor> {
        let (rows, vocab) = (logits.dim(0), logits.row_len());
        let chunks = vocab.div_ceil(CHUNK);
        let stats = self.scratch("sample", DType::F32, &[rows, chunks, 4])?;
        let kernel = self.kernels.get(Module::Sample, &[], "survey")?;
        let grid = [rows, chunks.div_ceil(4), 1];
        let shape = Launch { grid, threads: 128, shared: 0, cluster: 1 };
        // SAFETY: the kernel's parameters in order; `stats` has an entry for each chunk of a row.
        unsafe {
            self.device.launch(kernel, shape, args![logits, a.temperature, vocab, chunks, &stats])
        }?;
        Ok(stats)
    }

    pub(crate) fn logprobs_op(&self, a: &Logprobs<'_>, logits: &Tensor) -> Result<()> {
        let kernel = self.kernels.get(Module::Sample, &[], "logprobs")?;
        // SAFETY: the kernel's parameters in order.
        unsafe {
            self.device.launch(
                kernel,
                Launch::new(logits.dim(0), 1024),
                args![
                    logits,
                    a.targets,
                    logits.row_len(),
                    a.top_ids.row_len(),
                    a.logprob,
                    a.rank,
                    a.top_ids,
                    a.top_logprobs
                ],
            )
        }
    }
}
