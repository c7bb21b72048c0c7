//! What the scheduler asks of an engine.

use std::sync::Arc;

use crate::plan::{StepPlan, StepResult};

/// Runs steps. `launch` never waits for the step it launches; steps run in launch order.
pub trait Engine {
    /// Owns everything that its step still reads. Dropping it without waiting is allowed and
    /// does not cancel the step.
    type InFlight;

    /// Starts a step behind the ones launched before.
    fn launch(&mut self, plan: Arc<StepPlan>) -> Result<Self::InFlight, EngineError>;

    /// Waits for a launched step's tokens.
    fn wait(&mut self, in_flight: Self::InFlight) -> Result<StepResult, EngineError>;

    /// What the engine can hold.
    fn limits(&self) -> EngineLimits;

    /// How many decodes it takes through a prefix at once that they share; 1 if plans need not say
    /// which do.
    fn prefix_rows_max(&self) -> usize {
        1
    }
}

/// What an engine can hold; fixed when it was built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Token slots in a page.
    pub page_size: usize,
    /// Pages in the KV pool.
    pub pages: usize,
    /// Rows of the page table: requests that can run at once.
    pub slots: usize,
    /// Tokens that a request may have in all.
    pub seq_len_max: usize,
    /// Tokens that one step may compute.
    pub step_tokens_max: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
}

/// The engine has failed and runs no further step: every request in it ends with this.
#[derive(Clone, Debug, thiserror::Error)]
#[error("engine failed: {0}")]
pub struct EngineError(pub Arc<str>);
