//! Which of the attention kernels run, where not the fastest that the card and the heads allow.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use minisgl_tensor::{BackendError, Heads, Result};

use crate::attention::{
    decodes_as_prefill, prefill_variant, split_variant, takes_tiles, tiled_variant,
};
use crate::decode::stream_variant;
use crate::half_layer::half_layer_variants;
use crate::kernels::Key;
use crate::strip::strip_variants;
use crate::wide::wide_variants;

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
    /// `Stream` where it can run, and `Cascade` in steps where that spares much; else `Split`.
    #[default]
    Auto,
    /// Blocks that share a row's context, on any card (`kernels/attention.cu`).
    Split,
    /// Tiles of all rows in one stream from the bulk copy engine (`kernels/decode.cu`).
    Stream,
    /// As `Stream`, and what rows share of their contexts is read once for several of them.
    Cascade,
}

const PREFILL: [(&str, PrefillKernel); 3] =
    [("auto", PrefillKernel::Auto), ("mma", PrefillKernel::Mma), ("wgmma", PrefillKernel::Wgmma)];
const DECODE: [(&str, DecodeKernel); 4] = [
    ("auto", DecodeKernel::Auto),
    ("split", DecodeKernel::Split),
    ("stream", DecodeKernel::Stream),
    ("cascade", DecodeKernel::Cascade),
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
                .ok_or_else(|| format!("decode is auto, split, stream or cascade, not {decode}"))?,
        })
    }
}

impl fmt::Display for AttentionKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", name_of(&PREFILL, &self.prefill), name_of(&DECODE, &self.decode))
    }
}

/// What the model that a backend will run asks of it, as far as kernels are chosen and compiled for it.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape {
    /// Which kernels.
    pub kernels: AttentionKernels,
    /// The model's heads.
    pub heads: Heads,
    /// Width of the residual stream; 0 where it is not known.
    pub hidden: usize,
    /// Features inside of an MLP.
    pub inner: usize,
    /// Among how many heads and inner features are divided.
    pub ranks: usize,
    /// Tokens in a page.
    pub page_size: usize,
    /// Whether scores of attention are capped.
    pub soft_cap: bool,
}

/// What decides which kernels can run.
#[derive(Clone, Copy)]
pub(crate) struct Card {
    pub(crate) exact: bool,
    /// Compute capability: `(9, 0)`.
    pub(crate) capability: (i32, i32),
}

impl Card {
    /// Whether it has the products of four warps, which 9.0 has and 10.0 has no more.
    pub(crate) fn has_warpgroups(self) -> bool {
        !self.exact && self.capability == (9, 0)
    }

    /// Whether it has clusters, and blocks with the shared memory that half a layer takes.
    pub(crate) fn fuses_layers(self) -> bool {
        !self.exact && matches!(self.capability.0, 9 | 10)
    }

    /// Whether `kernels/prefill.cu` takes such heads and pages.
    pub(crate) fn prefills_by_warpgroups(self, heads: Heads, page_size: usize) -> bool {
        self.has_warpgroups() && takes_tiles(heads, page_size)
    }
}

/// # Errors
/// If no kernel takes such heads: they load 16 bytes of a head at once.
pub(crate) fn check_heads(heads: Heads) -> Result<()> {
    if heads.dim <= 256 && heads.dim.is_multiple_of(8) {
        return Ok(());
    }
    let message = format!("heads of {} on CUDA, which takes multiples of 8 up to 256", heads.dim);
    Err(BackendError::Unsupported(message.into()))
}

impl ModelShape {
    /// # Errors
    /// If no kernel takes its heads, or kernels were asked for by name that the card, the heads or the pages
    /// do not allow.
    pub(crate) fn check(&self, card: Card) -> Result<()> {
        let Self { kernels, heads, page_size, .. } = *self;
        check_heads(heads)?;
        let refuse = |name: &str, needs: &str| {
            let (major, minor) = card.capability;
            let precision = if card.exact { "float32, " } else { "" };
            let message = format!(
                "--attn {name} needs {needs}; here: {precision}compute capability \
                 {major}.{minor}, {} query heads a KV head, heads of {}, pages of {page_size}",
                heads.q / heads.kv.max(1),
                heads.dim,
            );
            Err(BackendError::Unsupported(message.into()))
        };
        if kernels.prefill == PrefillKernel::Wgmma && !card.prefills_by_warpgroups(heads, page_size)
        {
            let needs = "bfloat16, compute capability 9.0, heads of 64 or 128, and pages of a power \
                         of two, at least 8";
            return refuse("wgmma", needs);
        }
        if kernels.decode == DecodeKernel::Stream && !card.streams_decode(heads, page_size) {
            let needs = "bfloat16, compute capability 9.0 or 10.0, up to 16 query heads a KV head of \
                         64, 128 or 256, and pages of a power of two, at least 16";
            return refuse("stream", needs);
        }
        if kernels.decode == DecodeKernel::Cascade && !card.cascades(heads, page_size) {
            let needs = "bfloat16, compute capability 9.0 or 10.0, up to 8 query heads a KV head of \
                         64, 128 or 256, and pages of a power of two, at least 16";
            return refuse("cascade", needs);
        }
        Ok(())
    }

    /// What was asked for, by what the card, the heads and the pages allow.
    pub(crate) fn allowed_kernels(&self, card: Card) -> AttentionKernels {
        let decode = match self.kernels.decode {
            DecodeKernel::Auto if !card.cascades(self.heads, self.page_size) => {
                DecodeKernel::Stream
            }
            decode => decode,
        };
        AttentionKernels { decode, ..self.kernels }
    }

    /// The kernel files that such a model's steps take, as long as no step has more rows than the
    /// fastest of them can.
    pub(crate) fn modules(&self, card: Card, multiprocessors: usize) -> Vec<Key> {
        let Self { kernels, heads, hidden, inner, ranks, page_size, soft_cap } = *self;
        let by_warpgroups =
            kernels.prefill != PrefillKernel::Mma && card.prefills_by_warpgroups(heads, page_size);
        let prefill =
            if by_warpgroups { prefill_variant(heads, soft_cap) } else { tiled_variant(heads) };
        let decode = match kernels.decode {
            _ if decodes_as_prefill(card, heads) => None,
            DecodeKernel::Split => Some(split_variant(heads)),
            _ if !card.streams_decode(heads, page_size) => Some(split_variant(heads)),
            _ => Some(stream_variant(heads, soft_cap, false)),
        };
        let cascade = match kernels.decode {
            DecodeKernel::Auto => card.cascades(heads, page_size),
            decode => decode == DecodeKernel::Cascade,
        };
        let cascade = cascade.then(|| stream_variant(heads, soft_cap, true));
        let mut all: Vec<Key> = [Some(prefill), decode, cascade].into_iter().flatten().collect();
        if card.fuses_layers() && hidden > 0 {
            if ranks == 1 {
                all.extend(half_layer_variants(heads, hidden, inner, multiprocessors));
            }
            let (attended, inner) = (heads.q * heads.dim / ranks, inner / ranks);
            all.extend(wide_variants(hidden, attended, inner));
            if card.has_warpgroups() {
                let qkv = attended + 2 * heads.kv.div_ceil(ranks) * heads.dim;
                let products = [
                    (qkv, hidden, false, true),
                    (hidden, attended, false, false),
                    (2 * inner, hidden, true, true),
                    (hidden, inner, false, false),
                ];
                all.extend(strip_variants(&products, multiprocessors));
            }
        }
        // Several products ask for the same.
        let mut seen = HashSet::new();
        all.retain(|key| seen.insert(key.clone()));
        all
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
        let cascade = AttentionKernels { decode: DecodeKernel::Cascade, ..Default::default() };
        assert_eq!("auto,cascade".parse(), Ok(cascade));
        for (text, says) in [("fa", "PREFILL,DECODE"), ("mma,fi", "not fi"), ("fa,split", "not fa")]
        {
            let error = text.parse::<AttentionKernels>().unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    fn model(kernels: &str, q: usize, kv: usize, dim: usize, page_size: usize) -> ModelShape {
        let heads = Heads { q, kv, dim };
        let kernels = kernels.parse().unwrap();
        ModelShape { kernels, heads, hidden: 0, inner: 0, ranks: 1, page_size, soft_cap: false }
    }

    const H200: Card = Card { exact: false, capability: (9, 0) };

    #[test]
    fn the_kernels_of_a_model_are_known_before_it_runs() {
        let names = |model: ModelShape, card: Card| -> Vec<String> {
            let modules = model.modules(card, 132);
            modules.iter().map(|(module, defines)| format!("{module:?} {defines:?}")).collect()
        };
        let qwen = |kernels| model(kernels, 16, 8, 128, 16);
        let (prefill, stream) = (
            "Prefill [(\"DIM\", 128), (\"GROUP\", 2), (\"SOFT_CAP\", 0)]",
            "Decode [(\"DIM\", 128), (\"HALVES\", 1), (\"SOFT_CAP\", 0)]",
        );
        let cascade =
            "Decode [(\"DIM\", 128), (\"HALVES\", 2), (\"SOFT_CAP\", 0), (\"CASCADE\", 1)]";
        assert_eq!(names(qwen("auto"), H200), [prefill, stream, cascade]);
        assert_eq!(names(qwen("auto,cascade"), H200), [prefill, stream, cascade]);
        assert_eq!(names(qwen("auto,stream"), H200), [prefill, stream]);
        let whole = ModelShape { hidden: 1024, inner: 3072, ..qwen("auto") };
        let layers = |ranks: usize| names(ModelShape { ranks, ..whole }, H200)[3..].to_vec();
        assert!(layers(1)[0].starts_with("Attend") && layers(1)[1].starts_with("Mlp"));
        // Over two ranks whole operations are left: of their products, qkv is one that strips take, of one lot and of two.
        let products = layers(2);
        assert!(products.len() == 2 && products.iter().all(|name| name.starts_with("StripTall")));
        // Qwen3-14B's rows are long: no layer in halves, but products of their own, also over two ranks, where
        // qkv and o are too small for strips.
        let large = ModelShape { hidden: 5120, inner: 17408, ..model("auto", 40, 8, 128, 16) };
        for (ranks, strips) in [(1, 6), (2, 4)] {
            let products = names(ModelShape { ranks, ..large }, H200)[3..].to_vec();
            let of = |kind: &str| products.iter().filter(|name| name.starts_with(kind)).count();
            assert!(of("Wide") > 0 && of("Strip") == strips, "{products:?}");
            assert_eq!(of("Wide") + of("Strip"), products.len());
        }
        let tiled = "Attention [(\"DIM\", 128), (\"DECODE\", 0)]";
        let split = "Attention [(\"DIM\", 128), (\"DECODE\", 1), (\"HALVES\", 1)]";
        let old = Card { capability: (8, 0), ..H200 };
        assert_eq!(names(qwen("auto"), old), [tiled, split]);
        assert_eq!(names(qwen("mma,split"), H200), [tiled, split]);
        assert_eq!(names(qwen("auto"), Card { exact: true, ..H200 }), [tiled]);
        let large_group = "Prefill [(\"DIM\", 128), (\"GROUP\", 32), (\"SOFT_CAP\", 0)]";
        assert_eq!(names(model("auto", 32, 1, 128, 16), H200), [large_group]);
    }

    #[test]
    fn prefixes_are_not_asked_for_where_nothing_can_read_them_together() {
        let decode =
            |q, page_size| model("auto", q, 8, 128, page_size).allowed_kernels(H200).decode;
        assert_eq!(decode(16, 16), DecodeKernel::Auto);
        assert_eq!(decode(16, 8), DecodeKernel::Stream);
        // 9 heads a KV head: no second row fits a product of 16.
        assert_eq!(decode(72, 16), DecodeKernel::Stream);
    }

    #[test]
    fn kernels_that_cannot_run_are_refused_with_what_they_need() {
        for (kernels, q, card) in [
            ("auto,cascade", 72, H200),
            ("auto,cascade", 16, Card { capability: (8, 6), ..H200 }),
            ("auto,stream", 16, Card { exact: true, ..H200 }),
            ("wgmma,auto", 16, Card { capability: (10, 0), ..H200 }),
        ] {
            let error = model(kernels, q, 8, 128, 16).check(card).unwrap_err().to_string();
            let name = kernels.split(',').find(|name| *name != "auto").unwrap();
            assert!(error.contains(&format!("--attn {name} needs")), "{error}");
        }
        assert!(model("wgmma,cascade", 16, 8, 128, 16).check(H200).is_ok());
        for dim in [12, 264] {
            let error = model("auto", 16, 8, dim, 16).check(H200).unwrap_err().to_string();
            assert!(error.contains(&format!("heads of {dim} on CUDA")), "{error}");
        }
    }
}
