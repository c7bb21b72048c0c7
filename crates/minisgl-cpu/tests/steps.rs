//! Rotation, attention, sampling and the collective against f64 loops.

mod rig;

use std::time::{Duration, Instant};

use minisgl_cpu::shared_memory_group;
use minisgl_tensor::*;
use rig::{Rig, close, normed, rigs};

struct Case {
    heads: Heads,
    page_size: usize,
    /// `(cached, extend)`, decodes first.
    rows: &'static [(usize, usize)],
    window: Option<usize>,
    soft_cap: Option<f32>,
}

#[test]
fn rope_and_attention() {
    let h = |q, kv, dim| Heads { q, kv, dim };
    let mixed: &[(usize, usize)] = &[(0, 1), (37, 1), (700, 1), (0, 77), (250, 33), (3, 2)];
    for mut r in rigs("rope_and_attention") {
        for heads in [h(3, 1, 64), h(5, 1, 80), h(4, 2, 8), h(2, 2, 128)] {
            for (page_size, window, soft_cap) in
                [(1, None, None), (16, Some(40), None), (64, None, Some(2.0)), (3, Some(270), None)]
            {
                check(&mut r, &Case { heads, page_size, rows: mixed, window, soft_cap });
            }
        }
        let one: &[(usize, usize)] = &[(1500, 1)];
        check(
            &mut r,
            &Case { heads: h(9, 3, 64), page_size: 16, rows: one, window: None, soft_cap: None },
        );
    }
}

/// The step's tensors, and where a row's token lies in the pages.
struct Step {
    batch: Batch,
    positions: Vec<i32>,
    store_at: Vec<i32>,
    /// `[row][position]`.
    places: Vec<Vec<usize>>,
    pages: usize,
}

fn step(r: &Rig, case: &Case) -> Step {
    let rows = case.rows.len();
    let longest = case.rows.iter().map(|row| row.0 + row.1).max().unwrap();
    let per_row = longest.div_ceil(case.page_size);
    // Pages of a row lie in reverse order behind each other; slots are reversed, too.
    let slot = |row: usize| rows - 1 - row;
    let page = |row: usize, index: usize| slot(row) * per_row + per_row - index;
    let place =
        |row: usize, p: usize| page(row, p / case.page_size) * case.page_size + p % case.page_size;
    let mut table = vec![0; rows * per_row];
    let (mut starts, mut positions, mut store_at) = (vec![0], vec![], vec![]);
    for (row, &(cached, extend)) in case.rows.iter().enumerate() {
        (0..per_row).for_each(|i| table[slot(row) * per_row + i] = page(row, i) as i32);
        positions.extend((cached..cached + extend).map(|p| p as i32));
        store_at.extend((cached..cached + extend).map(|p| place(row, p) as i32));
        starts.push(positions.len() as i32);
    }
    let tokens = positions.len();
    let slots: Vec<i32> = (0..rows).map(|row| slot(row) as i32).collect();
    let lens: Vec<i32> = case.rows.iter().map(|row| (row.0 + row.1) as i32).collect();
    let batch = Batch {
        rows,
        tokens,
        decode_rows: case.rows.iter().take_while(|row| row.1 == 1).count(),
        slots: r.ints(&slots, &[rows]),
        query_start: r.ints(&starts, &[rows + 1]),
        kv_len: r.ints(&lens, &[rows]),
        positions: r.ints(&positions, &[tokens]),
        store_at: r.ints(&store_at, &[tokens]),
        page_table: r.ints(&table, &[rows, per_row]),
        page_size: case.page_size,
        host: None,
        kv_len_max: longest,
        extend_len_max: case.rows.iter().map(|row| row.1).max().unwrap(),
        shared: None,
    };
    let places = (0..rows).map(|row| (0..longest).map(|p| place(row, p)).collect()).collect();
    Step { batch, positions, store_at, places, pages: rows * per_row + 1 }
}

fn check(r: &mut Rig, case: &Case) {
    let Heads { q: q_heads, kv: kv_heads, dim } = case.heads;
    let (width, size) = (case.heads.qkv_width(), case.page_size);
    let what = format!("{} {:?} page {size} window {:?}", r.b.name(), case.heads, case.window);
    let step = step(r, case);
    let (batch, tokens) = (&step.batch, step.batch.tokens);
    let qkv = r.numbers(tokens * width);
    let qkv_tensor = r.put(&qkv, &[tokens, width]);
    let ((q_values, q_norm), (k_values, k_norm)) = (r.norm(dim, false), r.norm(dim, false));
    let rope_values = r.numbers(batch.kv_len_max * dim);
    let rope = r.put(&rope_values, &[batch.kv_len_max, dim]);
    let kv_shape = [step.pages, kv_heads, size, dim];
    let dtype = r.b.kv_dtype();
    let kv = KvLayer { k: r.poison(dtype, &kv_shape), v: r.poison(dtype, &kv_shape) };
    // The cached part, through the operation itself: values are whatever it stores.
    let elements = kv_shape.iter().product();
    fill(r, &kv.k, elements);
    fill(r, &kv.v, elements);
    let (mut k, mut v) = (r.get(&kv.k), r.get(&kv.v));
    let args = RopeStore {
        batch,
        heads: case.heads,
        q_norm: Some(&q_norm),
        k_norm: Some(&k_norm),
        rope: &rope,
        kv: &kv,
    };
    r.b.rope_store(&args, &qkv_tensor).unwrap();

    let mut want = qkv;
    for t in 0..tokens {
        let table = &rope_values[step.positions[t] as usize * dim..][..dim];
        for head in 0..q_heads + 2 * kv_heads {
            let x = &mut want[t * width + head * dim..][..dim];
            if head < q_heads + kv_heads {
                let n = normed(x, if head < q_heads { &q_values } else { &k_values });
                for i in 0..dim / 2 {
                    let (cos, sin, j) = (table[i], table[i + dim / 2], i + dim / 2);
                    (x[i], x[j]) = (n[i] * cos - n[j] * sin, n[j] * cos + n[i] * sin);
                }
            }
            if head >= q_heads {
                let at = step.store_at[t] as usize;
                let to =
                    ((at / size * kv_heads + (head - q_heads) % kv_heads) * size + at % size) * dim;
                let pages = if head < q_heads + kv_heads { &mut k } else { &mut v };
                pages[to..to + dim].copy_from_slice(x);
            }
        }
    }
    let stored = if dtype == DType::F16 { 5e-4 } else { 1e-6 };
    close(&format!("qkv {what}"), &r.get(&qkv_tensor), &rig::wide(&want), 1e-6);
    close(&format!("k {what}"), &r.get(&kv.k), &rig::wide(&k), stored);
    close(&format!("v {what}"), &r.get(&kv.v), &rig::wide(&v), stored);
    // Attention is held to what is stored, not to what was to be stored.
    let (q, k, v) = (r.get(&qkv_tensor), r.get(&kv.k), r.get(&kv.v));
    let want = attend(case, &step, (&q, &k, &v));
    let run = |batch: &Batch| {
        let out = r.poison(DType::F32, &[tokens, q_heads * dim]);
        let scale = (dim as f32).sqrt().recip();
        let (heads, window, soft_cap) = (case.heads, case.window, case.soft_cap);
        let args = Attention { batch, heads, kv: &kv, scale, window, soft_cap };
        r.b.attention(&args, &qkv_tensor, &out).unwrap();
        r.get(&out)
    };
    let all = run(batch);
    close(&format!("attention {what}"), &all, &want, 3e-6);
    // The same bits for a row alone. Others are padding, whose output stays as it was.
    for row in 0..batch.rows {
        let mut lens = vec![0; batch.rows];
        lens[row] = (case.rows[row].0 + case.rows[row].1) as i32;
        let kv_len = r.ints(&lens, &[batch.rows]);
        let alone = run(&Batch { kv_len, ..batch.clone() });
        let first: usize = case.rows[..row].iter().map(|row| row.1).sum();
        let range = first * q_heads * dim..(first + case.rows[row].1) * q_heads * dim;
        assert_eq!(alone[range.clone()], all[range.clone()], "row {row} alone, {what}");
        assert!(alone[..range.start].iter().chain(&alone[range.end..]).all(|x| x.is_nan()));
    }
}

fn fill(r: &mut Rig, tensor: &Tensor, elements: usize) {
    let values = r.numbers(elements);
    let bytes: Vec<u8> = match tensor.dtype() {
        DType::F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    r.b.upload(&bytes, tensor).unwrap();
}

fn attend(case: &Case, step: &Step, (q, k, v): (&[f32], &[f32], &[f32])) -> Vec<f64> {
    let Heads { q: q_heads, kv: kv_heads, dim } = case.heads;
    let (width, size) = (case.heads.qkv_width(), case.page_size);
    let mut want = vec![0.0; step.batch.tokens * q_heads * dim];
    let owners = case.rows.iter().enumerate().flat_map(|(row, extent)| vec![row; extent.1]);
    for (t, row) in owners.enumerate() {
        let position = step.positions[t] as usize;
        let first = case.window.map_or(0, |w| (position + 1).saturating_sub(w));
        for head in 0..q_heads {
            let q = &q[t * width + head * dim..][..dim];
            let at = |p: usize| {
                let place = step.places[row][p];
                ((place / size * kv_heads + head / (q_heads / kv_heads)) * size + place % size)
                    * dim
            };
            let scores: Vec<f64> = (first..=position)
                .map(|p| {
                    let dot: f64 =
                        q.iter().zip(&k[at(p)..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let score = dot / (dim as f64).sqrt();
                    case.soft_cap.map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for (p, score) in (first..=position).zip(&scores) {
                for i in 0..dim {
                    want[(t * q_heads + head) * dim + i] +=
                        (score - max).exp() / sum * f64::from(v[at(p) + i]);
                }
            }
        }
    }
    want
}

/// A token's attention has the same bits in one piece, in chunks and decoded.
#[test]
fn chunks_and_decodes_give_the_same_bits() {
    for mut r in rigs("chunks_and_decodes") {
        let heads = Heads { q: 3, kv: 1, dim: 64 };
        let whole: &[(usize, usize)] = &[(0, 600)];
        let case = Case { heads, page_size: 16, rows: whole, window: None, soft_cap: None };
        let step = step(&r, &case);
        let shape = [step.pages, 1, 16, 64];
        let dtype = r.b.kv_dtype();
        let kv = KvLayer { k: r.poison(dtype, &shape), v: r.poison(dtype, &shape) };
        fill(&mut r, &kv.k, shape.iter().product());
        fill(&mut r, &kv.v, shape.iter().product());
        let qkv = r.numbers(600 * heads.qkv_width());
        let qkv = r.put(&qkv, &[600, heads.qkv_width()]);
        let run = |first: usize, tokens: usize| {
            let batch = Batch {
                tokens,
                query_start: r.ints(&[0, tokens as i32], &[2]),
                kv_len: r.ints(&[(first + tokens) as i32], &[1]),
                ..step.batch.clone()
            };
            let out = r.poison(DType::F32, &[tokens, 192]);
            let (window, soft_cap) = (None, None);
            let args = Attention { batch: &batch, heads, kv: &kv, scale: 0.125, window, soft_cap };
            r.b.attention(&args, &qkv.rows(first..first + tokens), &out).unwrap();
            r.get(&out)
        };
        let all = run(0, 600);
        // In (10, 40), tokens are reduced with both halves of a tile that in one piece have the first.
        for (first, tokens) in
            [(0, 32), (10, 40), (32, 500), (255, 2), (256, 1), (300, 1), (599, 1)]
        {
            let range = first * 192..(first + tokens) * 192;
            assert_eq!(run(first, tokens), all[range], "{tokens} from {first}");
        }
    }
}

#[test]
fn sampling_keeps_what_it_may_and_draws_fairly() {
    for mut r in rigs("sampling") {
        let (rows, vocab) = (600, 5003);
        // Two decimals, so that there are equals.
        let row: Vec<f32> = (0..vocab).map(|_| (r.number() * 600.0).round() / 100.0).collect();
        let logits = r.put(&row.repeat(rows), &[rows, vocab]);
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let no_numbers = r.put(&vec![f32::NAN; rows * vocab], &[rows, vocab]);
        let table = r.ints(&vec![-1; rows], &[rows]);
        for (t, k, p, m) in [
            (0.0, 0, 1.0, 0.0),
            (0.7, 0, 1.0, 0.0),
            (1.0, 5, 1.0, 0.0),
            (0.8, 0, 0.3, 0.0),
            (1.0, 20, 0.6, 0.0),
            (1.0, 0, 1.0, 0.4),
            (1.5, 0, 0.999, 0.01),
            (1.0, 1, 1.0, 0.0),
            (1.0, 0, 0.0, 0.0),
        ] {
            let temperature = f64::from(if t > 0.0 { t } else { 1e-9 });
            let weights: Vec<f64> = order
                .iter()
                .map(|&i| (f64::from(row[i] - row[order[0]]) / temperature).exp())
                .collect();
            let mut keep = if k > 0 { k as usize } else { vocab };
            let (sum, mut run): (f64, f64) = (weights[..keep].iter().sum(), 0.0);
            let needed = |w: &&f64| {
                let take = run < f64::from(p) * sum || run == 0.0;
                run += **w;
                take
            };
            keep = weights[..keep].iter().take_while(needed).count();
            keep = weights[..keep].iter().take_while(|w| **w >= f64::from(m) - 1e-7).count();
            let tokens = r.poison(DType::I32, &[rows]);
            let positions: Vec<i32> = (0..rows as i32).collect();
            let args = Sample {
                temperature: &r.put(&vec![t; rows], &[rows]),
                top_k: &r.ints(&vec![k; rows], &[rows]),
                top_p: &r.put(&vec![p; rows], &[rows]),
                min_p: &r.put(&vec![m; rows], &[rows]),
                seed: &r.ints(&[77, 3].repeat(rows), &[rows, 2]),
                position: &r.ints(&positions, &[rows]),
                slots: &r.ints(&positions, &[rows]),
                all_greedy: t == 0.0,
                survey: None,
                last_use: false,
                token_table: &table,
                tokens: &tokens,
            };
            r.b.sample(&args, &logits).unwrap();
            let got = r.get_ints(&tokens);
            assert_eq!(got, r.get_ints(&table));
            let allowed = &order[..if t == 0.0 { 1 } else { keep }];
            let place = |token: i32| allowed.iter().position(|&i| i == token as usize);
            // The mean probability of what was drawn, against its expectation.
            let total: f64 = weights[..allowed.len()].iter().sum();
            let chance = |i: usize| weights[i] / total;
            let drawn = got.iter().map(|&token| {
                chance(place(token).unwrap_or_else(|| panic!("t {t} k {k} p {p} m {m}: {token}")))
            });
            let mean = drawn.sum::<f64>() / rows as f64;
            let expected: f64 = (0..allowed.len()).map(|i| chance(i).powi(2)).sum();
            let square: f64 = (0..allowed.len()).map(|i| chance(i).powi(3)).sum();
            let spread = ((square - expected * expected).max(0.0) / rows as f64).sqrt();
            assert!((mean - expected).abs() <= 5.0 * spread + 1e-6, "{mean} for {expected}");
            // Some token, where there is none to be drawn.
            r.b.sample(&args, &no_numbers).unwrap();
            let got = r.get_ints(&tokens);
            assert!(got.iter().all(|i| (0..vocab as i32).contains(i)), "t {t} k {k} p {p} m {m}");
        }
        logprobs_and_edits(&r, &row, &order, &logits);
    }
}

fn logprobs_and_edits(r: &Rig, row: &[f32], order: &[usize], logits: &Tensor) {
    let top = 4;
    let args = Logprobs {
        targets: &r.ints(&[order[0] as i32, order[99] as i32], &[2]),
        logprob: &r.poison(DType::F32, &[2]),
        rank: &r.poison(DType::I32, &[2]),
        top_ids: &r.poison(DType::I32, &[2, top]),
        top_logprobs: &r.poison(DType::F32, &[2, top]),
    };
    r.b.logprobs(&args, &logits.first(2)).unwrap();
    let max = f64::from(row[order[0]]);
    let norm = max + row.iter().map(|x| (f64::from(*x) - max).exp()).sum::<f64>().ln();
    assert_eq!(r.get_ints(args.rank), [0, 99]);
    let likeliest: Vec<i32> = order[..top].iter().map(|&i| i as i32).collect();
    assert_eq!(r.get_ints(args.top_ids), likeliest.repeat(2));
    let of = |places: &[usize]| -> Vec<f64> {
        places.iter().map(|&p| f64::from(row[order[p]]) - norm).collect()
    };
    close("logprob", &r.get(args.logprob), &of(&[0, 99]), 1e-6);
    close("top", &r.get(args.top_logprobs), &of(&[0, 1, 2, 3, 0, 1, 2, 3]), 1e-6);

    let small = r.put(&[1.0, -2.0, 3.0, 4.0], &[1, 4]);
    let edits = &[(0, 0, 2.0, 1.0), (0, 1, 2.0, 0.5)];
    r.b.adjust(&Adjust { edits, masks: &[(0, &[0b0111])] }, &small).unwrap();
    assert_eq!(r.get(&small), [1.5, -3.5, 3.0, f32::NEG_INFINITY]);
    r.b.soft_cap(&small, 2.0).unwrap();
    assert!((r.get(&small)[2] - 2.0 * 1.5f32.tanh()).abs() < 1e-6);
}

#[test]
fn small_operations() {
    for mut r in rigs("small_operations") {
        let x = r.numbers(7 * 33);
        let xt = r.put(&x, &[7, 33]);
        let out = r.poison(DType::F32, &[2, 33]);
        r.b.gather(&xt, &r.ints(&[6, 0], &[2]), &out).unwrap();
        assert_eq!(r.get(&out), [&x[6 * 33..], &x[..33]].concat());
        let flat = r.ints(&[1, 2, 3, 4], &[2, 2]);
        r.b.scatter(&r.ints(&[3, -1, 0], &[3]), &r.ints(&[9, 8, 7], &[3]), &flat).unwrap();
        assert_eq!(r.get_ints(&flat), [7, 2, 3, 9]);
        let delta = r.numbers(7 * 33);
        r.b.add(&xt, &r.put(&delta, &[7, 33])).unwrap();
        let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        assert_eq!(r.get(&xt), sum);
        let (values, norm) = r.norm(33, false);
        r.b.rms_norm(&xt, &norm, &xt).unwrap();
        close("norm in place", &r.get(&xt), &rig::wide(&normed(&sum, &values)), 1e-6);
    }
}

#[test]
fn ranks_sum_and_gather_the_same_bits() {
    let ends = shared_memory_group(3, Duration::from_secs(10));
    let results: Vec<_> = std::thread::scope(|scope| {
        let run = |rank: usize, end: std::sync::Arc<dyn Collective>| {
            let r = rigs("collective").remove(0);
            for round in 0..50 {
                let part = r.put(&[rank as f32, 0.1, round as f32], &[3, 1]);
                let out = r.poison(DType::F32, &[3, 3]);
                end.all_gather_cols(&part, &out).unwrap();
                let n = round as f32;
                assert_eq!(r.get(&out), [0.0, 1.0, 2.0, 0.1, 0.1, 0.1, n, n, n]);
                end.all_reduce(&part).unwrap();
                assert_eq!(r.get(&part)[0], 3.0);
            }
        };
        let threads: Vec<_> = ends
            .into_iter()
            .enumerate()
            .map(|(rank, end)| scope.spawn(move || run(rank, end)))
            .collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    assert!(results.iter().all(Result::is_ok));
}

#[test]
fn a_late_or_lost_rank_is_an_error_within_the_limit() {
    let r = rigs("late rank").remove(0);
    let ends = shared_memory_group(2, Duration::from_millis(200));
    let started = Instant::now();
    assert!(ends[0].all_reduce(&r.put(&[1.0], &[1])).is_err());
    assert!(started.elapsed() >= Duration::from_millis(200));
    assert!(started.elapsed() < Duration::from_secs(5));
    // The late one learns it at once.
    assert!(ends[1].all_reduce(&r.put(&[1.0], &[1])).is_err());

    let mut ends = shared_memory_group(2, Duration::from_secs(60));
    let started = Instant::now();
    drop(ends.pop());
    assert!(ends[0].all_reduce(&r.put(&[1.0], &[1])).is_err());
    assert!(started.elapsed() < Duration::from_secs(5), "a lost rank is noticed at once");
}
