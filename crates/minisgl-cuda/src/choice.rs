//! Which of the attention kernels run, where not the fastest that the card and the heads allow.

use std::fmt;
use std::str::FromStr;

use minisgl_tensor::{BackendError, Heads, Result};

use crate::attention::takes_tiles;
use crate::backend::CudaBackend;

/// The kernels of rows that extend by many tokens, and of those that extend by one. Written
/// `PREFILL,DECODE`, or `auto` for both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionKernels {
    /// For many tokens a row.
    pub prefill: PrefillKernel,
    /// For one token a row.
    pub decode: DecodeKernel,
}

/// Attention of rows with many new tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefillKernel {
    /// `Wgmma` where it can run, else `Mma`.
    #[default]
    Auto,
    /// Products of one warp, on any card (`kernels/attention.cu`).
    Mma,
    /// Products of four warps, with tiles from the bulk copy engine (`kernels/prefill.cu`).
    Wgmma,
}

/// Attention of rows with one new token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DecodeKernel {
    /// `Stream` where it can run, else `Split`.
    #[default]
    Auto,
    /// Blocks that share a row's context, on any card (`kernels/attention.cu`).
    Split,
    /// Tiles of all rows in one stream from the bulk copy engine (`kernels/decode.cu`).
    Stream,
}

const PREFILL: [(&str, PrefillKernel); 3] =
    [("auto", PrefillKernel::Auto), ("mma", PrefillKernel::Mma), ("wgmma", PrefillKernel::Wgmma)];
const DECODE: [(&str, DecodeKernel); 3] = [
    ("auto", DecodeKernel::Auto),
    ("split", DecodeKernel::Split),
    ("stream", DecodeKernel::Stream),
];

fn named<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    names.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

fn name_of<T: PartialEq>(names: &[(&'static str, T)], value: &T) -> &'static str {
    names.iter().find(|(_, known)| known == value).map_or("auto", |(name, _)| name)
}

impl FromStr for AttentionKernels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (prefill, decode) = match text.split_once(',') {
            Some(pair) => pair,
            None if text == "auto" => (text, text),
            None => return Err("expected PREFILL,DECODE, or auto for both".to_owned()),
        };
        Ok(Self {
            prefill: named(&PREFILL, prefill)
                .ok_or_else(|| format!("prefill is auto, mma or wgmma, not {prefill}"))?,
            decode: named(&DECODE, decode)
                .ok_or_else(|| format!("decode is auto, split or stream, not {decode}"))?,
        })
    }
}

impl fmt::Display for AttentionKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", name_of(&PREFILL, &self.prefill), name_of(&DECODE, &self.decode))
    }
}

impl CudaBackend {
    /// Takes these attention kernels, for a model with such heads and pages of so many tokens.
    ///
    /// # Errors
    /// If one was asked for by name that the card, the heads or the pages do not allow.
    pub fn with_attention(
        mut self,
        kernels: AttentionKernels,
        heads: Heads,
        page_size: usize,
    ) -> Result<Self> {
        let refuse = |name: &str, needs: &str| {
            let (major, minor) = self.device.capability;
            let precision = if self.exact { "float32, " } else { "" };
            let message = format!(
                "--attn {name} needs {needs}; here: {precision}compute capability \
                 {major}.{minor}, {} query heads a KV head, heads of {}, pages of {page_size}",
                heads.q / heads.kv.max(1),
                heads.dim,
            );
            Err(BackendError::Unsupported(message.into()))
        };
        if kernels.prefill == PrefillKernel::Wgmma
            && !(self.has_warpgroups() && takes_tiles(heads, page_size))
        {
            let needs = "bfloat16, compute capability 9.0, heads of 64 or 128, and pages of a power \
                         of two, at least 8";
            return refuse("wgmma", needs);
        }
        if kernels.decode == DecodeKernel::Stream && !self.can_stream_decode(heads, page_size) {
            let needs = "bfloat16, compute capability 9.0 or 10.0, up to 16 query heads a KV head of \
                         64, 128 or 256, and pages of a power of two, at least 16";
            return refuse("stream", needs);
        }
        self.attention = kernels;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        let both = AttentionKernels { prefill: PrefillKernel::Wgmma, decode: DecodeKernel::Split };
        assert_eq!("wgmma,split".parse(), Ok(both));
        assert_eq!(both.to_string(), "wgmma,split");
        assert_eq!("auto".parse(), Ok(AttentionKernels::default()));
        for (text, says) in [("fa", "PREFILL,DECODE"), ("mma,fi", "not fi"), ("fa,split", "not fa")]
        {
            let error = text.parse::<AttentionKernels>().unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
