//! The mixture of experts.

use minisgl_tensor::{Activation, Moe, Result, Store, Tensor};

use crate::activations::{Input, Prepared};
use crate::backend::{Machine, Target};
use crate::kernels::PANEL;
use crate::matrix::{Experts, Matrix, Needs};
use crate::memory::{Shared, view};

/// Buffers that outlive an operation. A place is where a token stands for one of its experts:
/// places are in order of the experts, and each expert's begin a panel.
#[derive(Default)]
pub struct Scratch {
    inner: Prepared,
    logits: Vec<f32>,
    /// `[places, inner]`: the activated halves.
    gated: Vec<f32>,
    /// `[places, hidden]`: what each chosen expert adds.
    added: Vec<f32>,
    /// A token's choices, `[tokens · top_k]`: expert, weight, place.
    choices: Vec<Choice>,
    /// By expert: its first place, and how many it has.
    experts: Vec<(usize, usize)>,
    /// The token at each place; `EMPTY` where there is none.
    order: Vec<u32>,
}

const EMPTY: u32 = u32::MAX;

struct Choice {
    expert: usize,
    weight: f32,
    place: usize,
}

/// See `Backend::moe`. A token adds its experts in order of their weight, whoever else is in the
/// step.
pub fn moe(
    on: &Machine,
    scratch: &mut Scratch,
    prepared: &mut Prepared,
    args: &Moe<'_>,
    out: &Tensor,
) -> Result<()> {
    let (hidden, inner, top_k) = (args.x.row_len(), args.down.cols(), args.top_k);
    let (gate_up, down) = (args.gate_up.get::<Experts>(), args.down.get::<Experts>());
    let input = Input { x: view(args.x), cols: hidden, norm: Some(args.norm), order: None };
    choose(on, args, scratch, prepared, input);
    let Scratch { inner: prepared_inner, gated, added, choices, experts, order, .. } = scratch;
    let places = order.len();
    gated.resize(gated.len().max(places * inner), 0.0);
    added.resize(added.len().max(places * hidden), 0.0);

    let needs = needs(on, gate_up);
    let x = prepared.prepare(on, Input { order: Some(order), ..input }, needs);
    let used = || experts.iter().enumerate().filter(|(_, (_, count))| *count > 0);
    for (expert, &(start, count)) in used() {
        let (x, target) = (x.from(start), target(gated, inner, start));
        gate_up.0[expert].multiply_gated(on, x, count, Activation::Silu, target)?;
    }
    let input = Input { x: &gated[..places * inner], cols: inner, norm: None, order: None };
    let halves = prepared_inner.prepare(on, input, self::needs(on, down));
    for (expert, &(start, count)) in used() {
        down.0[expert].multiply(on, halves.from(start), count, target(added, hidden, start));
    }
    let out = Shared::<f32>::of(out);
    on.pool.run(choices.len() / top_k, &|_, token| {
        // SAFETY: each token is its own item.
        let out = unsafe { out.part(token * hidden, hidden) };
        if args.store == Store::Set {
            out.fill(0.0);
        }
        for choice in &choices[token * top_k..][..top_k] {
            for (out, added) in out.iter_mut().zip(&added[choice.place * hidden..]) {
                *out += choice.weight * added;
            }
        }
    });
    Ok(())
}

fn needs(on: &Machine, experts: &Experts) -> Needs {
    let none = Needs { blocks: false, halves: false };
    experts.0.first().map_or(none, |matrix| matrix.needs(on))
}

fn target(out: &mut [f32], width: usize, row: usize) -> Target<'_> {
    Target { out: Shared::of_slice(out), row, width, bias: None, store: Store::Set }
}

/// Routes every token, and gives each choice its place.
fn choose(
    on: &Machine,
    args: &Moe<'_>,
    scratch: &mut Scratch,
    prepared: &mut Prepared,
    input: Input<'_>,
) {
    let Scratch { logits, choices, experts, order, .. } = scratch;
    let router = args.router.get::<Matrix>();
    let (count, tokens) = (router.rows, input.x.len() / input.cols);
    logits.resize(tokens * count, 0.0);
    let x = prepared.prepare(on, input, router.needs(on));
    router.multiply(on, x, tokens, target(logits, count, 0));
    choices.clear();
    experts.clear();
    experts.resize(count, (0, 0));
    for logits in logits.chunks_exact(count) {
        for (expert, weight) in route(logits, args.top_k, args.renormalize) {
            choices.push(Choice { expert, weight, place: experts[expert].1 });
            experts[expert].1 += 1;
        }
    }
    let mut places = 0usize;
    for (start, count) in experts.iter_mut() {
        *start = places;
        places += count.next_multiple_of(PANEL);
    }
    order.clear();
    order.resize(places, EMPTY);
    for (i, choice) in choices.iter_mut().enumerate() {
        choice.place += experts[choice.expert].0;
        order[choice.place] = (i / args.top_k) as u32;
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
