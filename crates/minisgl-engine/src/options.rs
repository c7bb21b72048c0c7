//! How an engine is set up.

use minisgl_tensor::Precision;

/// Sizes and switches of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// How weights are kept; the backends must have been made with the same.
    pub precision: Precision,
    /// Token slots in a page, 1 to 256.
    pub page_size: usize,
    /// How large the KV pool is.
    pub kv_size: KvSize,
    /// Requests that can run at once.
    pub running_requests_max: usize,
    /// Tokens that a request may have in all; the model's own limit if absent.
    pub seq_len_max: Option<usize>,
    /// Tokens that one step may compute.
    pub step_tokens_max: usize,
    /// The largest decode batch that runs as a captured graph, on devices that have them; 0 for
    /// none.
    pub graph_batch_max: usize,
    /// Random weights in place of the checkpoint's.
    pub dummy_weights: bool,
    /// Whether results say when the device ran a step, where it can: for timelines.
    pub note_device_times: bool,
}

/// How large the KV pool is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvSize {
    /// This many pages.
    Pages(usize),
    /// This share of the memory that is free once weights and workspace are there.
    FreeShare(f64),
    /// Room for four of the longest sequences, in no more than an eighth of the free memory: for
    /// a machine that also does other things.
    Modest,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Native,
            page_size: 16,
            kv_size: KvSize::Modest,
            running_requests_max: 64,
            seq_len_max: None,
            step_tokens_max: 2048,
            graph_batch_max: 256,
            dummy_weights: false,
            note_device_times: false,
        }
    }
}
