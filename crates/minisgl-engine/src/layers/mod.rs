//! What models are built from. Each layer splits itself over the ranks where it is built.

mod attention;
mod linear;
mod mlp;
mod vocabulary;

pub use attention::{Attention, AttentionSpec};
pub use linear::{ColumnPart, Linear};
pub use mlp::{Experts, Mlp};
pub use vocabulary::{Embedding, Head, Logits};

use minisgl_tensor::{Backend, Batch, Collective, Tensor};

use crate::kv::KvPool;
use crate::workspace::Workspace;

/// All that a forward pass reads and writes beside the weights.
pub struct ForwardCtx<'a> {
    pub backend: &'a dyn Backend,
    pub collective: &'a dyn Collective,
    pub batch: &'a Batch,
    /// `[tokens] I32`.
    pub input_ids: &'a Tensor,
    pub kv: &'a KvPool,
    pub workspace: &'a Workspace,
}

impl ForwardCtx<'_> {
    /// The residual stream, `[tokens, hidden]`.
    pub fn hidden(&self) -> Tensor {
        self.workspace.hidden.first(self.batch.tokens)
    }

    /// What a layer adds to it, `[tokens, hidden]`.
    pub fn delta(&self) -> Tensor {
        self.workspace.delta.first(self.batch.tokens)
    }
}
