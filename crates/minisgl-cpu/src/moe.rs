//! The mixture of experts.

use minisgl_tensor::{Activation, Moe, Result, Store};

use crate::activations::Prepared;
use crate::backend::{Machine, gate};
use crate::kernels::Rows;
use crate::matrix::{Experts, Matrix, Needs};
use crate::memory::Shared;

/// Buffers that outlive an operation.
#[derive(Default)]
pub struct Scratch {
    inner: Prepared,
    logits: Vec<f32>,
    /// `[tokens · top_k, inner]`: the activated halves, by a token's place and choice.
    gated: Vec<f32>,
    /// `[tokens · top_k, hidden]`: what each chosen expert adds.
    added: Vec<f32>,
    /// `[tokens · top_k]`.
    weights: Vec<f32>,
    /// By expert: places in `gated` of the tokens that chose it.
    places: Vec<Vec<u32>>,
    tokens: Vec<u32>,
}

/// See `Backend::moe`; `x` is normed. A token adds its experts in order of their weight, whoever
/// else is in the step. `all` counts up from 0, for as many tokens at least.
pub fn moe(
    on: &Machine,
    scratch: &mut Scratch,
    args: &Moe<'_>,
    x: Rows<'_>,
    all: &[u32],
    out: Shared<'_, f32>,
) -> Result<()> {
    let (hidden, inner, top_k) = (args.router.cols(), args.down.cols(), args.top_k);
    let (gate_up, down) = (args.gate_up.get::<Experts>(), args.down.get::<Experts>());
    let tokens = all.len();
    let places = tokens * top_k;
    let Scratch { inner: prepared, logits, gated, added, weights, places: of_expert, tokens: own } =
        scratch;
    gated.resize(gated.len().max(places * inner), 0.0);
    added.resize(added.len().max(places * hidden), 0.0);
    choose(on, args, x, all, (logits, weights, of_expert));
    for (expert, places) in of_expert.iter().enumerate().filter(|(_, places)| !places.is_empty()) {
        own.clear();
        own.extend(places.iter().map(|place| place / top_k as u32));
        let target = Shared::of_slice(gated);
        let combine = |g: &mut [_], u: &[_]| gate(on.isa, Activation::Silu, g, u);
        gate_up.0[expert].multiply_gated(on, x, own, &combine, &|m, first, lanes, products| {
            for (place, product) in places[m..].iter().zip(products) {
                // SAFETY: each product is put once.
                let out = unsafe { target.part(*place as usize * inner + first, lanes) };
                out.copy_from_slice(&product[..lanes]);
            }
        })?;
    }
    let needs = down.0.first().map_or(Needs { blocks: false, floats: true }, Matrix::needs);
    let halves = prepared.prepare(on, &gated[..places * inner], inner, None, needs);
    for (expert, places) in of_expert.iter().enumerate().filter(|(_, places)| !places.is_empty()) {
        let target = Shared::of_slice(added);
        down.0[expert].multiply(on, halves, places, &|m, first, lanes, products| {
            for (place, product) in places[m..].iter().zip(products) {
                // SAFETY: each product is put once.
                let out = unsafe { target.part(*place as usize * hidden + first, lanes) };
                out.copy_from_slice(&product[..lanes]);
            }
        });
    }
    on.pool.run(tokens, &|_, token| {
        // SAFETY: each token is its own item.
        let out = unsafe { out.part(token * hidden, hidden) };
        if args.store == Store::Set {
            out.fill(0.0);
        }
        for place in token * top_k..(token + 1) * top_k {
            for (out, added) in out.iter_mut().zip(&added[place * hidden..]) {
                *out += weights[place] * added;
            }
        }
    });
    Ok(())
}

/// Routes every token.
fn choose(
    on: &Machine,
    args: &Moe<'_>,
    x: Rows<'_>,
    all: &[u32],
    (logits, weights, of_expert): (&mut Vec<f32>, &mut Vec<f32>, &mut Vec<Vec<u32>>),
) {
    let experts = args.router.rows();
    logits.resize(all.len() * experts, 0.0);
    let target = Shared::of_slice(logits);
    args.router.get::<Matrix>().multiply(on, x, all, &|m, first, lanes, products| {
        for (row, product) in products.iter().enumerate() {
            // SAFETY: each product is put once.
            let out = unsafe { target.part((m + row) * experts + first, lanes) };
            out.copy_from_slice(&product[..lanes]);
        }
    });
    weights.clear();
    of_expert.iter_mut().for_each(Vec::clear);
    of_expert.resize_with(experts, Vec::new);
    for logits in logits.chunks_exact(experts) {
        for (expert, weight) in route(logits, args.top_k, args.renormalize) {
            of_expert[expert].push(weights.len() as u32);
            weights.push(weight);
        }
    }
}

/// The `top_k` most likely experts and their weights; the lower index among equals.
fn route(logits: &[f32], top_k: usize, renormalize: bool) -> Vec<(usize, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f32 = logits.iter().map(|l| (l - max).exp()).sum();
    let mut chosen: Vec<_> = logits.iter().map(|l| (l - max).exp() / total).enumerate().collect();
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    chosen.truncate(top_k);
    if renormalize {
        let sum: f32 = chosen.iter().map(|c| c.1).sum();
        chosen.iter_mut().for_each(|c| c.1 /= sum);
    }
    chosen
}
