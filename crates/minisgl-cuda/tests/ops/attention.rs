//! Attention, and the norm, rotation and store in front of it, over pages that lie in no order.

use std::ops::Range;
use std::sync::Arc;

use minisgl_cuda::{CudaBackend, CudaOptions, ModelShape};
use minisgl_tensor::*;
use rayon::prelude::*;

use crate::{Rig, Rng, bytes_of, cases, normed, numbers, options, race_checked, rigs};

#[derive(Clone, Copy)]
struct Case<'a> {
    heads: Heads,
    page_size: usize,
    /// `(cached, extend)`, decodes first.
    rows: &'a [(usize, usize)],
    window: Option<usize>,
    soft_cap: Option<f32>,
    /// Whether heads of q and k are normed.
    norm: bool,
    /// Decode rows that begin with the same pages, and how many.
    shared: &'a [(Vec<usize>, usize)],
}

impl Case<'_> {
    /// Whose page it is that a row has as its `i`th.
    fn owner(&self, row: usize, i: usize) -> usize {
        let shares = |(rows, pages): &&(Vec<usize>, usize)| rows.contains(&row) && i < *pages;
        self.shared.iter().find(shares).map_or(row, |(rows, _)| rows[0])
    }

    /// In lots of `size`, as an engine has them, with two lots more that are not there.
    fn lots(&self, r: &Rig, size: usize, decode_rows: usize) -> SharedPrefixes {
        let (mut rows, mut tokens, mut covered) = (vec![], vec![], vec![0; decode_rows]);
        for (together, pages) in self.shared {
            for lot in together.chunks(size).filter(|lot| lot.len() > 1) {
                tokens.push((pages * self.page_size) as i32);
                rows.extend((0..size).map(|i| lot.get(i).map_or(-1, |row| *row as i32)));
                lot.iter().for_each(|row| covered[*row] = (pages * self.page_size) as i32);
            }
        }
        rows.extend(vec![-1; 2 * size]);
        tokens.extend([0, 0]);
        SharedPrefixes {
            rows: r.ints(&rows, &[tokens.len(), size]),
            tokens: r.ints(&tokens, &[tokens.len()]),
            covered: r.ints(&covered, &[decode_rows]),
        }
    }
}

const fn h(q: usize, kv: usize, dim: usize) -> Heads {
    Heads { q, kv, dim }
}

/// Pages of 16, normed, and nothing else.
const PLAIN: Case<'_> = Case {
    heads: h(0, 0, 0),
    page_size: 16,
    rows: &[],
    window: None,
    soft_cap: None,
    norm: true,
    shared: &[],
};

#[test]
fn attention_of_mixed_rows() {
    let rows: &[(usize, usize)] = &[(0, 1), (37, 1), (700, 1), (0, 77), (50, 33), (3, 2)];
    let all = [
        h(4, 2, 64),
        h(5, 1, 80),
        h(6, 2, 96),
        h(16, 8, 128),
        h(40, 8, 128),
        h(2, 1, 256),
        h(8, 8, 64),
        h(32, 2, 64),
        h(32, 1, 64),
    ];
    for mut r in rigs("mixed rows") {
        for &heads in cases(&all, &[h(5, 1, 80), h(10, 2, 128), h(32, 2, 64)]) {
            for &(page_size, window, soft_cap, norm) in cases(
                &[
                    (1, None, None, true),
                    (16, None, None, true),
                    (16, None, None, false),
                    (16, Some(40), None, true),
                    (64, None, Some(2.0), true),
                    (8, Some(40), None, false),
                    (3, Some(7), None, true),
                ],
                &[(16, None, None, true), (3, Some(7), None, true)],
            ) {
                let case = Case { heads, page_size, rows, window, soft_cap, norm, ..PLAIN };
                attention_case(&mut r, &case);
            }
        }
    }
}

/// More tiles of queries than the card has multiprocessors, some behind a prefix.
#[test]
fn attention_of_long_prompts() {
    let rows: &[(usize, usize)] = &[(3, 1), (0, 700), (300, 600), (0, 5), (1000, 450)];
    for mut r in rigs("long prompts") {
        for &heads in cases(&[h(16, 8, 128), h(14, 2, 64)], &[h(14, 2, 64)]) {
            attention_case(&mut r, &Case { heads, rows, ..PLAIN });
        }
    }
}

#[test]
fn attention_of_decodes() {
    let many: &[(usize, usize)] = &[(1500, 1); 20];
    let one: &[(usize, usize)] = &[(1000, 1)];
    let short = |rows| (0..rows).map(|i| (i % 41, 1)).collect::<Vec<_>>();
    let (short, few_short) = (short(300), short(60));
    for mut r in rigs("decodes") {
        for rows in cases(&[many, &short, one], &[&few_short, one]) {
            for &heads in cases(&[h(4, 2, 128), h(10, 2, 128), h(24, 2, 64)], &[h(24, 2, 64)]) {
                attention_case(&mut r, &Case { heads, rows, ..PLAIN });
            }
        }
    }
}

/// What layers of a pass have in common is worked out once, and lengths and pages of the next pass, in the same
/// memory, are others.
#[test]
fn decodes_of_layer_after_layer() {
    let mixed: &[(usize, usize)] = &[(0, 1), (37, 1), (700, 1), (15, 1), (16, 1)];
    // More tiles than a block has places of in its plan.
    let long: &[(usize, usize)] = &(0..20).map(|i| (1400 + 13 * i, 1)).collect::<Vec<_>>();
    for mut r in rigs("layer after layer") {
        let all = [(h(4, 2, 128), mixed), (h(16, 8, 64), long)];
        for &(heads, rows) in cases(&all, &[(h(4, 2, 128), mixed)]) {
            passes_case(&mut r, heads, rows);
        }
    }
}

/// Rows that share a prefix, read once for several of them (`--attn auto,cascade`).
#[test]
fn decodes_over_shared_prefixes() {
    if rigs("shared prefixes").is_empty() {
        return;
    }
    let all = [h(16, 8, 128), h(10, 2, 128), h(8, 1, 64), h(3, 3, 64), h(8, 2, 256)];
    for &heads in cases(&all, &[h(8, 1, 64)]) {
        for &page_size in cases(&[16, 64], &[16]) {
            let kernels = "auto,cascade".parse().unwrap();
            let native = options(Precision::Native);
            let model = Some(ModelShape {
                kernels,
                heads,
                hidden: 0,
                inner: 0,
                ranks: 1,
                page_size,
                soft_cap: false,
            });
            let backend = match CudaBackend::new(CudaOptions { model, ..native }) {
                Ok(backend) => backend,
                // Cards that do not have the kernel.
                Err(BackendError::Unsupported(why)) => {
                    eprintln!("shared prefixes: skipped: {why}");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            let seed = 1 + page_size as u64 + heads.q as u64;
            let mut r = Rig { b: backend, rng: Rng(seed) };
            let size = r.b.prefix_rows_max(heads);
            assert_eq!(size, 16 / (heads.q / heads.kv));
            shared_cases(&mut r, heads, page_size);
        }
    }
}

fn shared_cases(r: &mut Rig, heads: Heads, page_size: usize) {
    // Two prefixes, one of many rows and one of two; rows of which one has no token of its own but the
    // new one, rows that share nothing; and behind the decodes prompts.
    let mut rows: Vec<(usize, usize)> = (0..19).map(|i| (128 + i * 13, 1)).collect();
    rows.extend([(0, 1), (640 + 3, 1), (700, 1), (640, 1), (0, 77), (50, 33)]);
    let many = (0..19).filter(|row| *row != 7).collect();
    let mixed = [(many, 128 / page_size), (vec![20, 22], 640 / page_size)];
    // A batch that fills the card, and one prefix for all of it.
    let full: Vec<(usize, usize)> = (0..130).map(|i| (192 + i % 50, 1)).collect();
    let whole = [((0..130).collect(), 192 / page_size)];
    // Few rows, so that units are spread over many blocks.
    let few = [(960 + 100, 1), (960 + 1, 1), (960 + 333, 1)];
    let three = [(vec![0, 1, 2], 960 / page_size)];
    let mut run = |rows, window, soft_cap, shared| {
        attention_case(r, &Case { heads, page_size, rows, window, soft_cap, norm: true, shared });
    };
    if race_checked() {
        run(&rows, None, None, &mixed);
        return run(&few, None, None, &three);
    }
    for soft_cap in [None, Some(2.0)] {
        // A window is another kernel's, whatever is shared.
        for window in [None, Some(40)] {
            run(&rows, window, soft_cap, &mixed);
        }
    }
    run(&full, None, None, &whole);
    run(&few, None, None, &three);
}

/// Where a case's tokens are.
struct Layout<'a> {
    case: &'a Case<'a>,
    dtype: DType,
    /// `[slots, pages a row]`; slots are the rows in reverse order.
    table: Vec<i32>,
    pages_a_row: usize,
    /// Page 0 is nobody's.
    pages: usize,
    /// Each row's first token, and at the end how many there are.
    start: Vec<i32>,
    /// Of each token.
    owner: Vec<usize>,
    positions: Vec<i32>,
    store_at: Vec<i32>,
}

impl<'a> Layout<'a> {
    fn new(case: &'a Case<'a>, dtype: DType) -> Self {
        let rows = case.rows.len();
        let len = |row: usize| case.rows[row].0 + case.rows[row].1;
        let pages_a_row = (0..rows).map(len).max().unwrap().div_ceil(case.page_size);
        let mut layout = Self {
            case,
            dtype,
            table: vec![0; rows * pages_a_row],
            pages_a_row,
            pages: 1,
            start: vec![0],
            owner: vec![],
            positions: vec![],
            store_at: vec![],
        };
        for row in 0..rows {
            // A row's last page comes first; behind its pages the table names page 0.
            for i in (0..len(row).div_ceil(case.page_size)).rev() {
                let place = layout.entry(row, i);
                layout.table[place] = match case.owner(row, i) {
                    owner if owner != row => layout.table[layout.entry(owner, i)],
                    _ => layout.pages as i32,
                };
                layout.pages = layout.pages.max(layout.table[place] as usize + 1);
            }
            for position in case.rows[row].0..len(row) {
                layout.store_at.push(layout.at(row, position));
                layout.positions.push(position as i32);
                layout.owner.push(row);
            }
            layout.start.push(layout.owner.len() as i32);
        }
        layout
    }

    fn tokens(&self) -> usize {
        self.owner.len()
    }

    fn entry(&self, row: usize, i: usize) -> usize {
        (self.case.rows.len() - 1 - row) * self.pages_a_row + i
    }

    /// `page · page size + offset`.
    fn at(&self, row: usize, position: usize) -> i32 {
        let size = self.case.page_size;
        self.table[self.entry(row, position / size)] * size as i32 + (position % size) as i32
    }

    fn kv_shape(&self) -> [usize; 4] {
        [self.pages, self.case.heads.kv, self.case.page_size, self.case.heads.dim]
    }

    /// The bytes that a KV head has in K or V for the token at `at`.
    fn bytes(&self, at: i32, kv_head: usize) -> Range<usize> {
        let (Case { heads: Heads { kv, dim, .. }, page_size, .. }, at) = (*self.case, at as usize);
        let index = (at / page_size * kv + kv_head) * page_size + at % page_size;
        let size = self.dtype.bytes_of(dim).unwrap();
        index * size..(index + 1) * size
    }

    fn batch(&self, r: &Rig) -> Batch {
        let Case { rows, page_size, heads, .. } = *self.case;
        let (count, tokens) = (rows.len(), self.tokens());
        let kv_len: Vec<i32> = rows.iter().map(|x| (x.0 + x.1) as i32).collect();
        let decode_rows = rows.iter().take_while(|x| x.1 == 1).count();
        // Rows that share so little come without lots where these are not asked for.
        let asked_for = r.b.prefixes_pay(decode_rows, 0);
        let lot_size = if asked_for { r.b.prefix_rows_max(heads) } else { 1 };
        Batch {
            rows: count,
            tokens,
            decode_rows,
            slots: r.ints(&(0..count as i32).rev().collect::<Vec<_>>(), &[count]),
            query_start: r.ints(&self.start, &[count + 1]),
            kv_len: r.ints(&kv_len, &[count]),
            positions: r.ints(&self.positions, &[tokens]),
            store_at: r.ints(&self.store_at, &[tokens]),
            page_table: r.ints(&self.table, &[count, self.pages_a_row]),
            page_size,
            kv_len_max: kv_len.iter().copied().max().unwrap() as usize,
            extend_len_max: rows.iter().map(|x| x.1).max().unwrap(),
            host: Some(Arc::new(HostBatch { query_start: self.start.clone(), kv_len })),
            shared: (lot_size > 1).then(|| self.case.lots(r, lot_size, decode_rows)),
        }
    }

    /// Norm, if there is one, and rotation of all heads of q and k in `qkv`, `[tokens, width]`.
    fn rotate(&self, qkv: &mut [f64], [q_norm, k_norm]: [&[f64]; 2], angles: &[f64], r: &Rig) {
        let Case { heads: Heads { q, kv, dim }, norm, .. } = *self.case;
        for (token, &position) in qkv.chunks_mut(self.case.heads.qkv_width()).zip(&self.positions) {
            let (cosines, sines) = angles[position as usize * dim..][..dim].split_at(dim / 2);
            for (head, x) in token.chunks_mut(dim).take(q + kv).enumerate() {
                let weight = if head < q { q_norm } else { k_norm };
                let n = if norm { normed(x, weight, dim, 1e-6) } else { x.to_vec() };
                for i in 0..dim / 2 {
                    let (low, high) = (n[i], n[i + dim / 2]);
                    x[i] = r.round(low * cosines[i] - high * sines[i]);
                    x[i + dim / 2] = r.round(high * cosines[i] + low * sines[i]);
                }
            }
        }
    }

    /// Each token's K or V, whose heads begin at `first_head` in `qkv`, to its place in `pages`.
    fn store(&self, qkv: &[f64], first_head: usize, pages: &mut [u8]) {
        let Heads { kv, dim, .. } = self.case.heads;
        for (token, &at) in qkv.chunks(self.case.heads.qkv_width()).zip(&self.store_at) {
            for (kv_head, x) in token.chunks(dim).skip(first_head).take(kv).enumerate() {
                pages[self.bytes(at, kv_head)].copy_from_slice(&bytes_of(self.dtype, x));
            }
        }
    }

    /// `[tokens, q heads, dim]`, from `qkv` and pages that are as the operations before leave them.
    fn attend(&self, qkv: &[f64], pages: [&[u8]; 2]) -> Vec<f64> {
        let Heads { q, kv, .. } = self.case.heads;
        // Of each row and KV head: [its tokens, q heads of the group, dim].
        let parts: Vec<Vec<f64>> = (0..self.case.rows.len() * kv)
            .into_par_iter()
            .map(|i| self.attend_group(i / kv, i % kv, qkv, pages))
            .collect();
        let width = q / kv * self.case.heads.dim;
        let groups = (0..self.tokens()).flat_map(|token| {
            let row = self.owner[token];
            let from = (token - self.start[row] as usize) * width;
            parts[row * kv..][..kv].iter().map(move |part| &part[from..from + width])
        });
        groups.flatten().copied().collect()
    }

    fn attend_group(&self, row: usize, kv_head: usize, qkv: &[f64], pages: [&[u8]; 2]) -> Vec<f64> {
        let Case { heads: Heads { q, kv, dim }, window, soft_cap, .. } = *self.case;
        let (cached, extend) = self.case.rows[row];
        let [keys, values] = pages.map(|pages| {
            let of_position =
                |position| numbers(self.dtype, &pages[self.bytes(self.at(row, position), kv_head)]);
            (0..cached + extend).flat_map(of_position).collect::<Vec<_>>()
        });
        let score = |q: &[f64], k: &[f64]| {
            let s = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt();
            soft_cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
        };
        let mut out = vec![];
        for token in 0..extend {
            let seen = cached + token + 1;
            let seen = window.map_or(0, |window| seen.saturating_sub(window)) * dim..seen * dim;
            let all_heads = &qkv[(self.start[row] as usize + token) * (q + 2 * kv) * dim..];
            for q in all_heads.chunks(dim).skip(kv_head * q / kv).take(q / kv) {
                let scores = keys[seen.clone()].chunks(dim).map(|k| score(q, k)).collect();
                out.extend(softmax_product(scores, &values[seen.clone()]));
            }
        }
        out
    }

    /// The card's pages hold `want`: nearly, where tokens were stored, and elsewhere what they held
    /// before, to the bit.
    fn check_pages(&self, r: &Rig, what: &str, pages: &Tensor, want: &[u8]) {
        let mut bytes = r.b.download(pages).unwrap().wait().unwrap();
        let (mut stored, mut expected) = (vec![], vec![]);
        for &at in &self.store_at {
            for kv_head in 0..self.case.heads.kv {
                let range = self.bytes(at, kv_head);
                stored.extend(numbers(self.dtype, &bytes[range.clone()]));
                expected.extend(numbers(self.dtype, &want[range.clone()]));
                bytes[range.clone()].copy_from_slice(&want[range]);
            }
        }
        r.close(what, &stored, &expected);
        assert!(bytes == want, "{what}: changed where nothing was stored");
    }
}

/// `softmax(scores) · values`, where `values` is `[scores, dim]`.
fn softmax_product(mut scores: Vec<f64>, values: &[f64]) -> Vec<f64> {
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    scores.iter_mut().for_each(|s| *s = (*s - top).exp());
    let sum: f64 = scores.iter().sum();
    let mut out = vec![0.0; values.len() / scores.len()];
    for (s, v) in scores.iter().zip(values.chunks(out.len())) {
        out.iter_mut().zip(v).for_each(|(out, v)| *out += s / sum * v);
    }
    out
}

/// Random K or V, as the card has it: a hundred thousand numbers again and again, which are no whole number
/// of heads, so that no two tokens are alike.
fn random_pages(rng: &mut Rng, dtype: DType, shape: &[usize]) -> Vec<u8> {
    const SOME: usize = 100_003;
    let count = shape.iter().product::<usize>();
    let mut bytes = bytes_of(dtype, &rng.many(SOME)).repeat(count.div_ceil(SOME));
    bytes.truncate(dtype.bytes_of(count).unwrap());
    bytes
}

/// `[positions, dim]`: cosines, then sines.
fn rope_table(positions: usize, dim: usize) -> Vec<f64> {
    let angle =
        |position: usize, i: usize| position as f64 * 10000f64.powf(-2.0 * i as f64 / dim as f64);
    (0..positions * 2)
        .flat_map(|i| {
            let function = if i % 2 == 0 { f64::cos } else { f64::sin };
            (0..dim / 2).map(move |column| function(angle(i / 2, column)))
        })
        .collect()
}

fn attention_case(r: &mut Rig, case: &Case<'_>) {
    let Case { heads, page_size, window, soft_cap, .. } = *case;
    let Heads { q, kv, dim } = heads;
    let layout = Layout::new(case, r.b.activation_dtype());
    let (tokens, width) = (layout.tokens(), heads.qkv_width());
    let shape = layout.kv_shape();
    let fresh = [(); 2].map(|()| random_pages(&mut r.rng, layout.dtype, &shape));
    let pages = KvLayer { k: r.put_bytes(&fresh[0], &shape), v: r.put_bytes(&fresh[1], &shape) };
    let (fresh_qkv, in_place) = r.tensor(&[tokens, width]);
    let [(q_norm, qn), (k_norm, kn)] = [r.vector(dim), r.vector(dim)];
    let [qn, kn] =
        [qn, kn].map(|weight| Norm { weight, eps: 1e-6, plus_one: false, folded: false });
    let batch = layout.batch(r);
    let angles = rope_table(batch.kv_len_max, dim);
    let rope = r.f32s(&angles).reshape(&[batch.kv_len_max, dim]);
    let (batch, scale) = (&batch, (1.0 / (dim as f64).sqrt()) as f32);
    let [qn, kn] = [&qn, &kn].map(|weight| case.norm.then_some(weight));
    let store = RopeStore { batch, heads, q_norm: qn, k_norm: kn, rope: &rope, kv: &pages };
    let attention = Attention { batch, heads, kv: &pages, scale, window, soft_cap };

    // The same on the host.
    let (mut qkv, [mut k, mut v]) = (fresh_qkv.clone(), fresh.clone());
    layout.rotate(&mut qkv, [&q_norm, &k_norm], &angles, r);
    layout.store(&qkv, q, &mut k);
    layout.store(&qkv, q + kv, &mut v);
    let want = layout.attend(&qkv, [&k, &v]);

    let norm = case.norm;
    let what = format!("{heads:?} page {page_size} window {window:?} cap {soft_cap:?} norm {norm}");
    r.b.rope_store(&store, &in_place).unwrap();
    layout.check_pages(r, &format!("k {what}"), &pages.k, &k);
    layout.check_pages(r, &format!("v {what}"), &pages.v, &v);
    for _ in 0..2 {
        let out = r.out(&[tokens, q * dim]);
        r.b.attention(&attention, &in_place, &out).unwrap();
        r.close(&format!("attention {what}"), &r.get(&out), &want);
    }
    // The decode rows as prefill rows must say the same.
    let out = r.out(&[tokens, q * dim]);
    let prefill = Batch { decode_rows: 0, ..batch.clone() };
    r.b.attention(&Attention { batch: &prefill, ..attention }, &in_place, &out).unwrap();
    r.close(&format!("attention as prefill {what}"), &r.get(&out), &want);

    // Both operations at once, also from a graph.
    r.b.upload(&fresh[0], &pages.k).unwrap();
    r.b.upload(&fresh[1], &pages.v).unwrap();
    let (input, out) = (r.put(&fresh_qkv, &[tokens, width]), r.out(&[tokens, q * dim]));
    r.b.rope_attention(&store, &attention, &input, &out).unwrap();
    r.close(&format!("rope and attention {what}"), &r.get(&out), &want);
    layout.check_pages(r, &format!("k of both {what}"), &pages.k, &k);
    layout.check_pages(r, &format!("v of both {what}"), &pages.v, &v);
    let (input, out) = (r.put(&fresh_qkv, &[tokens, width]), r.out(&[tokens, q * dim]));
    let graph = r.b.capture(&mut || r.b.rope_attention(&store, &attention, &input, &out)).unwrap();
    graph.unwrap().launch().unwrap();
    r.close(&format!("rope and attention in a graph {what}"), &r.get(&out), &want);
}

/// Passes of three layers, each with a cache of its own and the second with a window; in every other pass, the
/// rows are in the reverse order.
fn passes_case(r: &mut Rig, heads: Heads, rows: &[(usize, usize)]) {
    let Heads { q, dim, .. } = heads;
    let backwards: Vec<_> = rows.iter().rev().copied().collect();
    let layers = |rows| {
        [None, Some(40), None].map(|window| Case { heads, rows, window, norm: false, ..PLAIN })
    };
    let (forth, back) = (layers(rows), layers(&backwards));
    let [forth, back] = [&forth, &back]
        .map(|layers| layers.each_ref().map(|case| Layout::new(case, r.b.activation_dtype())));
    let shape = forth[0].kv_shape();
    assert_eq!((shape, forth[0].pages_a_row), (back[0].kv_shape(), back[0].pages_a_row));

    // All at fixed addresses.
    let batch = Batch { host: None, ..forth[0].batch(r) };
    let angles = rope_table(batch.kv_len_max, dim);
    let rope = r.f32s(&angles).reshape(&[batch.kv_len_max, dim]);
    let scale = (1.0 / (dim as f64).sqrt()) as f32;
    let memory: Vec<_> = (0..3)
        .map(|_| {
            let kv = KvLayer { k: r.out(&shape), v: r.out(&shape) };
            (kv, r.out(&[rows.len(), heads.qkv_width()]), r.out(&[rows.len(), q * dim]))
        })
        .collect();
    let (table, ids) = (r.weight(1, 64).1, r.ints(&[0], &[1]));
    let residual = r.out(&[1, 64]);
    let begin = || {
        let (input_ids, token_table) = (&ids, &ids);
        let args = Embed { input_ids, token_table, table: &table, first_id: 0, scale: 1.0 };
        r.b.embed(&args, &residual)
    };
    let attend = || {
        memory.iter().zip(&forth).try_for_each(|((kv, qkv, out), layer)| {
            let (batch, window, soft_cap) = (&batch, layer.case.window, None);
            let store = RopeStore { batch, heads, q_norm: None, k_norm: None, rope: &rope, kv };
            let attention = Attention { batch, heads, kv, scale, window, soft_cap };
            r.b.rope_attention(&store, &attention, qkv, out)
        })
    };
    let pass = || begin().and_then(|()| attend());
    // What it plans is nothing that the graph may rely on.
    pass().unwrap();
    let graph = r.b.capture(&mut || pass()).unwrap().unwrap();

    let passes: [(&str, &dyn Fn() -> Result<()>); 3] = [
        ("a pass", &pass),
        // Then nothing is known of what comes between two calls.
        ("calls", &attend),
        ("a graph", &|| graph.launch()),
    ];
    let mut rng = Rng(r.rng.0);
    for (i, (what, run)) in passes.iter().cycle().take(2 * passes.len()).enumerate() {
        let layouts = if i % 2 == 0 { &forth } else { &back };
        let ints = |to: &Tensor, values: &[i32]| {
            let bytes: Vec<_> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            r.b.upload(&bytes, to).unwrap();
        };
        let layout = &layouts[0];
        ints(&batch.kv_len, &layout.case.rows.iter().map(|x| x.0 as i32 + 1).collect::<Vec<_>>());
        ints(&batch.positions, &layout.positions);
        ints(&batch.store_at, &layout.store_at);
        ints(&batch.page_table, &layout.table);
        let mut want = vec![];
        for (layout, (pages, input, out)) in layouts.iter().zip(&memory) {
            let mut qkv: Vec<f64> =
                rng.many(input.elements()).into_iter().map(|x| r.round(x)).collect();
            r.b.upload(&bytes_of(layout.dtype, &qkv), input).unwrap();
            let [mut k, mut v] = [&pages.k, &pages.v].map(|pages| {
                let bytes = random_pages(&mut rng, layout.dtype, &shape);
                r.b.upload(&bytes, pages).unwrap();
                bytes
            });
            r.b.upload(&vec![0xff; out.bytes()], out).unwrap();
            layout.rotate(&mut qkv, [&[], &[]], &angles, r);
            layout.store(&qkv, q, &mut k);
            layout.store(&qkv, q + heads.kv, &mut v);
            want.push((layout.attend(&qkv, [&k, &v]), k, v));
        }
        run().unwrap();
        for (layer, (want, k, v)) in want.iter().enumerate() {
            let what = format!("{heads:?}, layer {layer} of {what}, {i}");
            let (pages, _, out) = &memory[layer];
            r.close(&what, &r.get(out), want);
            layouts[layer].check_pages(r, &format!("k {what}"), &pages.k, k);
            layouts[layer].check_pages(r, &format!("v {what}"), &pages.v, v);
        }
    }
}
