//! From logits to tokens: edits, masks, the draw, log-probabilities.

use minisgl_tensor::{Adjust, DType, Logprobs, Result, Sample, Tensor};

use crate::backend::CudaBackend;
use crate::device::{Launch, args};
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
        let chunks = vocab.div_ceil(CHUNK);
        let stats = self.scratch("sample", DType::F32, &[rows, chunks, 4])?;
        let survey = self.kernels.get(Module::Sample, &[], "survey")?;
        let choose = self.kernels.get(Module::Sample, &[], "choose")?;
        let shape =
            Launch { grid: [rows, chunks.div_ceil(4), 1], threads: 128, shared: 0, cluster: 1 };
        // SAFETY: the kernels' parameters in order; every tensor has an entry a row.
        unsafe {
            self.device.launch(
                survey,
                shape,
                args![logits, a.temperature, vocab, chunks, &stats],
            )?;
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
                    chunks,
                    a.token_table,
                    a.tokens
                ],
            )
        }
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
