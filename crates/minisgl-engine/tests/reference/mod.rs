//! A backend of plain loops in f64, for tests: slow, safe, and too simple to be wrong in the same
//! way as a real one. Memory is a map from invented addresses to vectors.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use minisgl_tensor::*;

mod group;
mod numbers;

pub use group::group;
use numbers::{dequantize, gated, matmul, normed};

#[derive(Default)]
pub struct Reference {
    memory: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
    next: AtomicU64,
    /// This call of `embed` fails (counted from 1).
    pub fail_at: AtomicUsize,
    /// This call of `embed` panics.
    pub panic_at: AtomicUsize,
    embeds: AtomicUsize,
    /// Calls of `mark`.
    pub marks: AtomicUsize,
    /// As `Backend::prefix_rows_max`, where it is not 0.
    pub prefix_rows_max: AtomicUsize,
    /// Tokens a row that `Backend::prefixes_pay` asks for.
    pub spared_min: AtomicUsize,
    /// Rows that attention has taken through a prefix with others.
    pub shared_rows: AtomicUsize,
    /// What the columns of a matrix, by its numbers' address, would have been multiplied with by `fold_norm`: its input is.
    folded: Mutex<BTreeMap<usize, Matrix>>,
    /// Bytes of weights and tensors that there is room for; 0 for plenty.
    capacity: usize,
    /// Bytes that are taken, and those of them that matrices have.
    pub taken: AtomicUsize,
    pub matrix_bytes: AtomicUsize,
}

struct Piece {
    address: u64,
    bytes: usize,
}

impl Memory for Piece {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

struct Done(Vec<u8>);

impl Download for Done {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(self.0)
    }
}

/// A device that is done when a call comes back has come to its marks then.
struct Reached(Instant);

impl Mark for Reached {
    fn time(self: Box<Self>) -> Result<Instant> {
        Ok(self.0)
    }
}

type Matrix = Vec<f32>;

/// Which matrix it is.
fn address(weight: &Weight) -> usize {
    weight.get::<Matrix>().as_ptr().addr()
}

impl Reference {
    pub fn with_capacity(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    fn take(&self, bytes: usize) -> Result<()> {
        let free = self.memory()?.free;
        if self.capacity > 0 && bytes > free {
            return Err(BackendError::OutOfMemory { bytes, free });
        }
        self.taken.fetch_add(bytes, Ordering::SeqCst);
        Ok(())
    }

    fn keep_matrix(&self, shape: &[usize], values: Matrix) -> Result<Weight> {
        self.take(size_of_val(&values[..]))?;
        self.matrix_bytes.fetch_add(size_of_val(&values[..]), Ordering::SeqCst);
        Ok(Weight::new(shape, values))
    }

    /// A product's input, normed. Nothing but its own norm may be in front of a matrix that one was folded into.
    fn input(&self, a: &Linear<'_>) -> Matrix {
        let folded = self.folded.lock().unwrap();
        let weights = folded.get(&address(a.weight));
        assert_eq!(a.norm.is_some_and(|norm| norm.folded), weights.is_some(), "another norm");
        let x = self.f(a.x);
        let mut x = a.norm.map_or_else(|| x.clone(), |norm| normed(&x, norm));
        if let Some(weights) = weights {
            x.chunks_mut(weights.len())
                .for_each(|row| row.iter_mut().zip(weights).for_each(|(x, w)| *x *= w));
        }
        x
    }

    fn bytes(&self, t: &Tensor) -> Vec<u8> {
        let memory = self.memory.lock().unwrap();
        let (start, data) = memory.range(..=t.address()).next_back().expect("mapped");
        let at = (t.address() - start) as usize;
        data[at..at + t.bytes()].to_vec()
    }

    fn put(&self, t: &Tensor, bytes: &[u8]) {
        assert!(bytes.len() <= t.bytes());
        let mut memory = self.memory.lock().unwrap();
        let (start, data) = memory.range_mut(..=t.address()).next_back().expect("mapped");
        let at = (t.address() - start) as usize;
        data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn f(&self, t: &Tensor) -> Vec<f32> {
        assert_eq!(t.dtype(), DType::F32);
        bytemuck::allocation::pod_collect_to_vec(&self.bytes(t))
    }

    fn i(&self, t: &Tensor) -> Vec<i32> {
        assert_eq!(t.dtype(), DType::I32);
        bytemuck::allocation::pod_collect_to_vec(&self.bytes(t))
    }

    /// For each row the tokens that it has in common with its lot, and the lot's first row.
    fn lots(&self, b: &Batch) -> Vec<(usize, usize)> {
        let mut lots: Vec<_> = (0..b.rows).map(|row| (0, row)).collect();
        let Some(shared) = &b.shared else { return lots };
        let (rows, tokens) = (self.i(&shared.rows), self.i(&shared.tokens));
        for (members, &tokens) in rows.chunks(shared.rows.row_len()).zip(&tokens) {
            let members: Vec<usize> =
                members.iter().take_while(|row| **row >= 0).map(|row| *row as usize).collect();
            assert_eq!(members.len() > 1, tokens > 0);
            for &row in &members {
                assert_eq!(lots[row].0, 0, "row {row} is in two lots");
                lots[row] = (tokens as usize, members[0]);
            }
            self.shared_rows.fetch_add(members.len(), Ordering::SeqCst);
        }
        let covered: Vec<i32> = lots[..b.decode_rows].iter().map(|lot| lot.0 as i32).collect();
        assert_eq!(self.i(&shared.covered), covered);
        lots
    }

    fn put_f(&self, t: &Tensor, values: &[f32]) {
        assert_eq!(t.elements(), values.len());
        self.put(t, bytemuck::cast_slice(values));
    }

    fn put_i(&self, t: &Tensor, values: &[i32]) {
        assert_eq!(t.elements(), values.len());
        self.put(t, bytemuck::cast_slice(values));
    }
}

impl Backend for Reference {
    fn name(&self) -> String {
        "reference".into()
    }

    fn bind_thread(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let total = if self.capacity == 0 { 1 << 30 } else { self.capacity };
        Ok(MemoryInfo { total, free: total.saturating_sub(self.taken.load(Ordering::SeqCst)) })
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn kv_dtype(&self) -> DType {
        DType::F32
    }

    fn alloc(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let bytes = dtype.bytes_of(shape.iter().product()).unwrap().max(1);
        self.take(bytes)?;
        let step = (bytes as u64).next_multiple_of(64) + 64;
        let address = 4096 + self.next.fetch_add(step, Ordering::SeqCst);
        self.memory.lock().unwrap().insert(address, vec![0; bytes]);
        Ok(Tensor::new(Arc::new(Piece { address, bytes }), dtype, shape))
    }

    fn upload(&self, src: &[u8], dst: &Tensor) -> Result<()> {
        self.put(dst, src);
        Ok(())
    }

    fn scatter(&self, indices: &Tensor, values: &Tensor, out: &Tensor) -> Result<()> {
        let mut flat = self.i(out);
        for (i, v) in self.i(indices).into_iter().zip(self.i(values)) {
            if i >= 0 {
                flat[i as usize] = v;
            }
        }
        self.put_i(out, &flat);
        Ok(())
    }

    fn download(&self, src: &Tensor) -> Result<Box<dyn Download>> {
        Ok(Box::new(Done(self.bytes(src))))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn capture(&self, _: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Graph>>> {
        Ok(None)
    }

    fn mark(&self) -> Result<Option<Box<dyn Mark>>> {
        self.marks.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Box::new(Reached(Instant::now()))))
    }

    fn matrix_dtype(&self) -> Option<DType> {
        Some(DType::F32)
    }

    fn matrix(&self, parts: &[HostTensor<'_>], _: Precision) -> Result<Weight> {
        let rows = parts.iter().map(|p| p.shape[0]).sum();
        let values: Matrix = parts.iter().flat_map(dequantize).collect();
        self.keep_matrix(&[rows, parts[0].shape[1]], values)
    }

    fn expert_matrices(&self, experts: &[Vec<HostTensor<'_>>], _: Precision) -> Result<Weight> {
        let rows = experts[0].iter().map(|p| p.shape[0]).sum();
        let values: Matrix = experts.iter().flatten().flat_map(dequantize).collect();
        self.keep_matrix(&[experts.len(), rows, experts[0][0].shape[1]], values)
    }

    fn random(&self, _: &[usize], _: u32) -> Result<Option<Weight>> {
        Ok(None)
    }

    fn vector(&self, parts: &[HostTensor<'_>]) -> Result<Weight> {
        let values: Matrix = parts.iter().flat_map(dequantize).collect();
        self.take(size_of_val(&values[..]))?;
        Ok(Weight::new(&[values.len()], values))
    }

    fn fold_norm(&self, norm: Norm, matrix: &Weight) -> Result<Norm> {
        let plus = if norm.plus_one { 1.0 } else { 0.0 };
        let weights: Matrix = norm.weight.get::<Matrix>().iter().map(|w| w + plus).collect();
        let ones = Weight::new(&[weights.len()], vec![1.0_f32; weights.len()]);
        let before = self.folded.lock().unwrap().insert(address(matrix), weights);
        assert!(before.is_none(), "a second norm in one matrix");
        Ok(Norm { weight: ones, plus_one: false, folded: true, ..norm })
    }

    fn embed(&self, a: &Embed<'_>, out: &Tensor) -> Result<()> {
        let call = 1 + self.embeds.fetch_add(1, Ordering::SeqCst);
        if call == self.fail_at.load(Ordering::SeqCst) {
            return Err(BackendError::Device("the test pulled the plug".into()));
        }
        assert_ne!(call, self.panic_at.load(Ordering::SeqCst), "the test made this panic");
        let (table, width) = (a.table.get::<Matrix>(), a.table.cols());
        let newest = self.i(a.token_table);
        let mut rows = Vec::new();
        for id in self.i(a.input_ids) {
            let id = if id >= 0 { id } else { newest[(-1 - id) as usize] } as usize;
            match id.checked_sub(a.first_id).filter(|i| *i < a.table.rows()) {
                Some(i) => rows.extend(table[i * width..][..width].iter().map(|v| v * a.scale)),
                None => rows.extend(vec![0.0; width]),
            }
        }
        self.put_f(out, &rows);
        Ok(())
    }

    fn rms_norm(&self, x: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        self.put_f(out, &normed(&self.f(x), norm));
        Ok(())
    }

    fn linear(&self, a: &Linear<'_>, out: &Tensor) -> Result<()> {
        let mut y = matmul(&self.input(a), a.weight.get::<Matrix>(), a.weight.cols());
        if let Some(bias) = a.bias {
            let bias = bias.get::<Matrix>();
            y.iter_mut().enumerate().for_each(|(i, y)| *y += bias[i % bias.len()]);
        }
        if a.store == Store::Add {
            y.iter_mut().zip(self.f(out)).for_each(|(y, o)| *y += o);
        }
        self.put_f(out, &y);
        Ok(())
    }

    fn gated_linear(&self, a: &Linear<'_>, activation: Activation, out: &Tensor) -> Result<()> {
        let y = matmul(&self.input(a), a.weight.get::<Matrix>(), a.weight.cols());
        let y: Vec<f32> = y.chunks(a.weight.rows()).flat_map(|y| gated(y, activation)).collect();
        self.put_f(out, &y);
        Ok(())
    }

    fn add(&self, x: &Tensor, delta: &Tensor) -> Result<()> {
        let sum: Vec<f32> = self.f(x).iter().zip(self.f(delta)).map(|(a, b)| a + b).collect();
        self.put_f(x, &sum);
        Ok(())
    }

    fn rope_store(&self, a: &RopeStore<'_>, qkv: &Tensor) -> Result<()> {
        let (h, d) = (a.heads, a.heads.dim);
        let (mut x, rope) = (self.f(qkv), self.f(a.rope));
        let (mut k_pool, mut v_pool) = (self.f(&a.kv.k), self.f(&a.kv.v));
        let (positions, store) = (self.i(&a.batch.positions), self.i(&a.batch.store_at));
        let size = a.batch.page_size;
        for (t, token) in x.chunks_mut(h.qkv_width()).enumerate() {
            let table = &rope[positions[t] as usize * d..][..d];
            for (head, v) in token[..(h.q + h.kv) * d].chunks_mut(d).enumerate() {
                if let Some(norm) = if head < h.q { a.q_norm } else { a.k_norm } {
                    v.copy_from_slice(&normed(v, norm));
                }
                for i in 0..d / 2 {
                    let (c, s, x, y) = (table[i], table[d / 2 + i], v[i], v[d / 2 + i]);
                    (v[i], v[d / 2 + i]) = (x * c - y * s, y * c + x * s);
                }
            }
            if store[t] < 0 {
                continue;
            }
            let (page, slot) = (store[t] as usize / size, store[t] as usize % size);
            for head in 0..h.kv {
                let to = ((page * h.kv + head) * size + slot) * d;
                k_pool[to..to + d].copy_from_slice(&token[(h.q + head) * d..][..d]);
                v_pool[to..to + d].copy_from_slice(&token[(h.q + h.kv + head) * d..][..d]);
            }
        }
        self.put_f(qkv, &x);
        self.put_f(&a.kv.k, &k_pool);
        self.put_f(&a.kv.v, &v_pool);
        Ok(())
    }

    fn prefix_rows_max(&self, _: Heads) -> usize {
        self.prefix_rows_max.load(Ordering::SeqCst).max(1)
    }

    fn prefixes_pay(&self, rows: usize, spared: usize) -> bool {
        spared >= self.spared_min.load(Ordering::SeqCst) * rows
    }

    fn attention(&self, a: &Attention<'_>, qkv: &Tensor, out: &Tensor) -> Result<()> {
        let (h, d, b) = (a.heads, a.heads.dim, a.batch);
        let (x, k, v) = (self.f(qkv), self.f(&a.kv.k), self.f(&a.kv.v));
        let (starts, lens) = (self.i(&b.query_start), self.i(&b.kv_len));
        let (slots, table) = (self.i(&b.slots), self.i(&b.page_table));
        let lots = self.lots(b);
        let mut y = self.f(out);
        for row in 0..b.rows {
            let (covered, first_of_lot) = lots[row];
            let tokens = starts[row] as usize..starts[row + 1] as usize;
            let base = (lens[row] as usize).saturating_sub(tokens.len());
            for t in tokens.clone().filter(|_| lens[row] > 0) {
                let last = base + t - tokens.start;
                let first = a.window.map_or(0, |w| (last + 1).saturating_sub(w));
                for head in 0..h.q {
                    let q = &x[t * h.qkv_width() + head * d..][..d];
                    let at = |pos: usize| {
                        // What rows share is read where the first of them has it.
                        let row = if pos < covered { first_of_lot } else { row };
                        let page =
                            table[slots[row] as usize * b.page_table.dim(1) + pos / b.page_size];
                        let head = head / (h.q / h.kv);
                        ((page as usize * h.kv + head) * b.page_size + pos % b.page_size) * d
                    };
                    let scores: Vec<f64> = (first..=last)
                        .map(|pos| {
                            let k = &k[at(pos)..][..d];
                            let dot: f64 =
                                q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                            dot * f64::from(a.scale)
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    for i in 0..d {
                        let value: f64 = (first..=last)
                            .zip(&scores)
                            .map(|(pos, s)| (s - max).exp() / sum * f64::from(v[at(pos) + i]))
                            .sum();
                        y[(t * h.q + head) * d + i] = value as f32;
                    }
                }
            }
        }
        self.put_f(out, &y);
        Ok(())
    }

    fn moe(&self, a: &Moe<'_>, out: &Tensor) -> Result<()> {
        let hidden = a.router.cols();
        let x = normed(&self.f(a.x), a.norm);
        let (gate_up, down) = (a.gate_up.get::<Matrix>(), a.down.get::<Matrix>());
        let (gu, dn) = (a.gate_up.rows() * hidden, a.down.rows() * a.down.cols());
        let mut y = Vec::new();
        for x in x.chunks(hidden) {
            let logits = matmul(x, a.router.get::<Matrix>(), hidden);
            let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
            let mut p: Vec<(usize, f64)> =
                logits.iter().map(|l| f64::from(*l).exp() / sum).enumerate().collect();
            p.sort_by(|a, b| b.1.total_cmp(&a.1));
            p.truncate(a.top_k);
            let total: f64 = if a.renormalize { p.iter().map(|p| p.1).sum() } else { 1.0 };
            let mut row = vec![0.0; hidden];
            for (e, weight) in p {
                let inner = gated(&matmul(x, &gate_up[e * gu..][..gu], hidden), Activation::Silu);
                let part = matmul(&inner, &down[e * dn..][..dn], inner.len());
                row.iter_mut().zip(part).for_each(|(r, v)| *r += (weight / total) as f32 * v);
            }
            y.extend(row);
        }
        assert_eq!(a.store, Store::Set);
        self.put_f(out, &y);
        Ok(())
    }

    fn gather(&self, x: &Tensor, indices: &Tensor, out: &Tensor) -> Result<()> {
        let (values, width) = (self.f(x), x.row_len());
        let rows: Vec<f32> = self
            .i(indices)
            .iter()
            .flat_map(|i| values[*i as usize * width..][..width].to_vec())
            .collect();
        self.put_f(out, &rows);
        Ok(())
    }

    fn soft_cap(&self, logits: &Tensor, cap: f32) -> Result<()> {
        let capped: Vec<f32> = self.f(logits).iter().map(|l| cap * (l / cap).tanh()).collect();
        self.put_f(logits, &capped);
        Ok(())
    }

    fn adjust(&self, a: &Adjust<'_>, logits: &Tensor) -> Result<()> {
        let (mut l, width) = (self.f(logits), logits.row_len());
        for (row, token, scale, bias) in a.edits {
            let l = &mut l[*row as usize * width + *token as usize];
            *l = if *l > 0.0 { *l / scale } else { *l * scale } + bias;
        }
        for (row, mask) in a.masks {
            for (i, l) in l[*row as usize * width..][..width].iter_mut().enumerate() {
                if mask.get(i / 32).is_none_or(|word| word >> (i % 32) & 1 == 0) {
                    *l = f32::NEG_INFINITY;
                }
            }
        }
        self.put_f(logits, &l);
        Ok(())
    }

    /// Greedy only.
    fn sample(&self, a: &Sample<'_>, logits: &Tensor) -> Result<()> {
        assert!(a.all_greedy && self.f(a.temperature).iter().all(|t| *t == 0.0));
        let (l, mut newest) = (self.f(logits), self.i(a.token_table));
        let mut tokens = Vec::new();
        for (row, slot) in l.chunks(logits.row_len()).zip(self.i(a.slots)) {
            let best = (0..row.len()).rev().max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            tokens.push(best as i32);
            newest[slot as usize] = best as i32;
        }
        self.put_i(a.tokens, &tokens);
        self.put_i(a.token_table, &newest);
        Ok(())
    }

    fn logprobs(&self, a: &Logprobs<'_>, logits: &Tensor) -> Result<()> {
        let (l, top) = (self.f(logits), a.top_ids.dim(1));
        let (mut lp, mut ranks, mut ids, mut tops) = (vec![], vec![], vec![], vec![]);
        for (row, target) in l.chunks(logits.row_len()).zip(self.i(a.targets)) {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|l| f64::from(l - max).exp()).sum();
            let of = |i: usize| (f64::from(row[i] - max) - sum.ln()) as f32;
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            lp.push(of(target as usize));
            ranks.push(order.iter().position(|i| *i == target as usize).unwrap() as i32);
            ids.extend(order[..top].iter().map(|i| *i as i32));
            tops.extend(order[..top].iter().map(|i| of(*i)));
        }
        self.put_f(a.logprob, &lp);
        self.put_i(a.rank, &ranks);
        if top > 0 {
            self.put_i(a.top_ids, &ids);
            self.put_f(a.top_logprobs, &tops);
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
