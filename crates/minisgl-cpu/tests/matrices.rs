//! Products of every weight type against f64 loops, and that rows do not know their neighbours.

mod rig;

use minisgl_tensor::*;
use rig::{TYPES, close, decode, normed, product, rigs, silu, wide};

#[test]
fn every_type_and_batch() {
    for mut r in rigs("every_type_and_batch") {
        for dtype in TYPES {
            let plain = !dtype.is_quantized();
            let sizes: &[(usize, usize)] =
                if plain { &[(1, 1), (19, 77), (48, 96)] } else { &[(1, 256), (37, 512)] };
            for &(n, k) in sizes {
                let part = r.part(dtype, n, k);
                let w = r.b.matrix(std::slice::from_ref(&part), r.precision).unwrap();
                assert_eq!(w.shape(), [n, k]);
                let weight = &w;
                for m in [1, 2, 3, 4, 5, 8, 31, 64, 65] {
                    let x = r.rounded(m * k);
                    let xt = r.put(&x, &[m, k]);
                    let out = r.poison(DType::F32, &[m, n]);
                    let args = Linear { x: &xt, norm: None, weight, bias: None, store: Store::Set };
                    r.b.linear(&args, &out).unwrap();
                    let what = format!("{} {dtype} {m}x{n}x{k}", r.b.name());
                    // Each element against what was added up for it: sums may cancel.
                    let w = decode(&part);
                    let abs = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<_>>();
                    let sizes = product(&abs(&x), &abs(&w), k);
                    let want = product(&x, &w, k);
                    for (i, got) in r.get(&out).into_iter().enumerate() {
                        let error = (f64::from(got) - want[i]).abs();
                        assert!(error <= 1e-6 * sizes[i], "{what}: {got} for {}", want[i]);
                    }
                }
            }
        }
    }
}

/// Activations that 8 bits do not hold: the stated distance, and none in the exact mode.
#[test]
fn rounding_of_activations() {
    for mut r in rigs("rounding_of_activations") {
        for dtype in TYPES {
            let part = r.part(dtype, 64, 512);
            let w = r.b.matrix(std::slice::from_ref(&part), r.precision).unwrap();
            let x = r.numbers(3 * 512);
            let xt = r.put(&x, &[3, 512]);
            let out = r.poison(DType::F32, &[3, 64]);
            let args = Linear { x: &xt, norm: None, weight: &w, bias: None, store: Store::Set };
            r.b.linear(&args, &out).unwrap();
            let want = product(&x, &decode(&part), 512);
            close(&format!("{dtype}"), &r.get(&out), &want, r.tolerance(&[dtype]).min(1.2e-2));
        }
    }
}

#[test]
fn parts_bias_norm_add_and_gate() {
    for mut r in rigs("parts_bias_norm_add_and_gate") {
        let k = 256;
        for types in
            [[DType::F32, DType::BF16], [DType::Q4K, DType::Q6K], [DType::F16, DType::Q8_0]]
        {
            let tolerance = r.tolerance(&types);
            for (m, inner) in [(1, 40), (6, 24), (70, 16)] {
                let parts = types.map(|dtype| r.part(dtype, inner, k));
                let values: Vec<f32> = parts.iter().flat_map(decode).collect();
                let w = r.b.matrix(&parts, r.precision).unwrap();
                let x = r.numbers(m * k);
                let xt = r.put(&x, &[m, k]);
                let (norm_values, norm) = r.norm(k, true);
                let (bias, bias_weight) = r.vector(2 * inner);
                let want = product(&normed(&x, &norm_values), &values, k);
                let before = r.numbers(m * 2 * inner);
                let out = r.put(&before, &[m, 2 * inner]);
                let args = Linear {
                    x: &xt,
                    norm: Some(&norm),
                    weight: &w,
                    bias: Some(&bias_weight),
                    store: Store::Add,
                };
                r.b.linear(&args, &out).unwrap();
                let sum: Vec<f64> = want
                    .iter()
                    .enumerate()
                    .map(|(i, y)| y + f64::from(bias[i % (2 * inner)]) + f64::from(before[i]))
                    .collect();
                close("norm, bias, add", &r.get(&out), &sum, tolerance);
                assert_eq!(r.get(&xt), x, "the input stays as it is");

                let out = r.poison(DType::F32, &[m, inner]);
                let args = Linear { bias: None, store: Store::Set, ..args };
                r.b.gated_linear(&args, Activation::Silu, &out).unwrap();
                let gated: Vec<f64> = want
                    .chunks(2 * inner)
                    .flat_map(|y| (0..inner).map(|i| silu(y[i]) * y[inner + i]).collect::<Vec<_>>())
                    .collect();
                close("gated", &r.get(&out), &gated, 3.0 * tolerance);
                // The same in one piece, where it has one type.
                if types[0] == DType::F32 {
                    let whole = HostTensor {
                        shape: vec![2 * inner, k],
                        data: values.iter().flat_map(|x| x.to_le_bytes()).collect(),
                        ..parts[0].clone()
                    };
                    let weight = &r.b.matrix(&[whole], r.precision).unwrap();
                    r.b.gated_linear(&Linear { weight, ..args }, Activation::Silu, &out).unwrap();
                    close("gated in one piece", &r.get(&out), &gated, 3.0 * tolerance);
                }
            }
        }
    }
}

/// The same bits whatever stands beside a row: batches of 1 to 65 against the rows one by one.
#[test]
fn a_row_does_not_know_its_neighbours() {
    for mut r in rigs("a_row_does_not_know_its_neighbours") {
        for dtype in TYPES {
            let (n, k) = (33, 512);
            let part = r.part(dtype, n, k);
            let w = r.b.matrix(&[part], r.precision).unwrap();
            let x = r.numbers(65 * k);
            let xt = r.put(&x, &[65, k]);
            let (_, norm) = r.norm(k, false);
            let run = |x: &Tensor| {
                let out = r.poison(DType::F32, &[x.dim(0), n]);
                let (norm, store) = (Some(&norm), Store::Set);
                r.b.linear(&Linear { x, norm, weight: &w, bias: None, store }, &out).unwrap();
                r.get(&out)
            };
            let alone: Vec<f32> = (0..65).flat_map(|row| run(&xt.rows(row..row + 1))).collect();
            for m in 1..=65 {
                assert_eq!(run(&xt.first(m)), alone[..m * n], "{dtype}, {m} rows");
            }
        }
    }
}

#[test]
fn embedding_reads_every_type() {
    for mut r in rigs("embedding_reads_every_type") {
        for dtype in TYPES {
            let part = r.part(dtype, 50, 256);
            let table = r.b.matrix(std::slice::from_ref(&part), r.precision).unwrap();
            let ids = r.ints(&[3, -1, 60, -2, 10], &[5]);
            let newest = r.ints(&[59, 12], &[2]);
            let out = r.poison(DType::F32, &[5, 256]);
            let args = Embed {
                input_ids: &ids,
                token_table: &newest,
                table: &table,
                first_id: 10,
                scale: 2.0,
            };
            r.b.embed(&args, &out).unwrap();
            let values = decode(&part);
            let want: Vec<f32> = [None, Some(49), None, Some(2), Some(0)]
                .iter()
                .flat_map(|row| match row {
                    Some(row) => values[row * 256..][..256].iter().map(|x| 2.0 * x).collect(),
                    None => vec![0.0; 256],
                })
                .collect();
            assert_eq!(r.get(&out), want, "{dtype}");
        }
    }
}

#[test]
fn fp8_with_scales_and_what_is_refused() {
    for mut r in rigs("fp8") {
        let (n, k) = (20, 40);
        let data: Vec<u8> = (0..n * k).map(|_| r.bits() as u8 & 0xbf).collect();
        let scale = BlockScale { block: [16, 32], values: vec![0.5, 2.0, 1.0, 4.0] };
        let part = HostTensor {
            name: "fp8".into(),
            dtype: DType::F8E4M3,
            shape: vec![n, k],
            data: data.into(),
            scale: Some(scale.clone()),
        };
        let mut values = decode(&part);
        for (i, value) in values.iter_mut().enumerate() {
            *value *= scale.values[i / k / 16 * 2 + i % k / 32];
        }
        let w = r.b.matrix(std::slice::from_ref(&part), r.precision).unwrap();
        let x = r.numbers(k);
        let (xt, out) = (r.put(&x, &[1, k]), r.poison(DType::F32, &[1, n]));
        let args = Linear { x: &xt, norm: None, weight: &w, bias: None, store: Store::Set };
        r.b.linear(&args, &out).unwrap();
        close("fp8", &r.get(&out), &product(&x, &values, k), r.tolerance(&[DType::BF16]));

        let refused = |part: HostTensor<'_>| {
            let error = r.b.matrix(&[part], r.precision).unwrap_err().to_string();
            assert!(error.contains("fp8"), "{error}");
        };
        refused(HostTensor { shape: vec![n, k + 1], ..part.clone() });
        refused(HostTensor { dtype: DType::I32, ..part.clone() });
        refused(HostTensor { dtype: DType::Q4_0, ..part.clone() });
        let values = vec![1.0];
        refused(HostTensor { scale: Some(BlockScale { block: [16, 32], values }), ..part });
    }
}

#[test]
fn mixture_of_experts() {
    for mut r in rigs("mixture_of_experts") {
        let (tokens, hidden, experts, inner, top_k) = (9, 64, 7, 40, 3);
        let x = r.numbers(tokens * hidden);
        let xt = r.put(&x, &[tokens, hidden]);
        let (norm_values, norm) = r.norm(hidden, false);
        let router_part = r.part(DType::F32, experts, hidden);
        let halves: Vec<Vec<HostTensor<'_>>> = (0..experts)
            .map(|_| (0..2).map(|_| r.part(DType::BF16, inner, hidden)).collect())
            .collect();
        let downs: Vec<Vec<HostTensor<'_>>> =
            (0..experts).map(|_| vec![r.part(DType::F16, hidden, inner)]).collect();
        let router = r.b.matrix(std::slice::from_ref(&router_part), r.precision).unwrap();
        let gate_up = r.b.expert_matrices(&halves, r.precision).unwrap();
        let down = r.b.expert_matrices(&downs, r.precision).unwrap();
        assert_eq!(gate_up.shape(), [experts, 2 * inner, hidden]);
        assert_eq!(down.shape(), [experts, hidden, inner]);
        let xn = normed(&x, &norm_values);
        for (renormalize, store) in [(false, Store::Set), (true, Store::Add)] {
            let before = r.numbers(tokens * hidden);
            let out = r.put(&before, &[tokens, hidden]);
            let (gate_up, down, router, norm) = (&gate_up, &down, &router, &norm);
            let args = Moe { x: &xt, norm, router, gate_up, down, top_k, renormalize, store };
            r.b.moe(&args, &out).unwrap();
            let mut want =
                if store == Store::Add { wide(&before) } else { vec![0.0; tokens * hidden] };
            for t in 0..tokens {
                let row = &xn[t * hidden..][..hidden];
                let logits = product(row, &decode(&router_part), hidden);
                let all: f64 = logits.iter().map(|l| l.exp()).sum();
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                let kept: f64 = order[..top_k].iter().map(|&e| logits[e].exp() / all).sum();
                for &e in &order[..top_k] {
                    let values: Vec<f32> = halves[e].iter().flat_map(decode).collect();
                    let both = product(row, &values, hidden);
                    let mid: Vec<f32> =
                        (0..inner).map(|i| (silu(both[i]) * both[inner + i]) as f32).collect();
                    let weight = logits[e].exp() / all / if renormalize { kept } else { 1.0 };
                    let added = product(&mid, &decode(&downs[e][0]), inner);
                    for (want, added) in want[t * hidden..].iter_mut().zip(added) {
                        *want += weight * added;
                    }
                }
            }
            close("moe", &r.get(&out), &want, 1.5 * r.tolerance(&[DType::BF16, DType::F16]));
        }
    }
}
