//! Matrix products, each by every kernel that can take it, with norms, biases, sums and activations.

use minisgl_cuda::Products;
use minisgl_tensor::*;

use crate::{Rig, cases, matmul, normed, race_checked, rigs, silu};

/// `silu(g) · u` of rows `[g, u]` of `n`.
fn gated(product: &[f64], n: usize) -> Vec<f64> {
    product
        .chunks(n)
        .flat_map(|row| {
            let (g, u) = row.split_at(n / 2);
            g.iter().zip(u).map(|(g, u)| silu(*g) * u).collect::<Vec<_>>()
        })
        .collect()
}

/// Rows of x, rows of w, and their length.
type Product = (usize, usize, usize);

#[test]
fn linear_of_few_rows() {
    let all = [
        (1, 1024, 2048),
        (3, 136, 576),
        (8, 72, 1032),
        (9, 520, 64),
        (13, 136, 6152),
        (16, 96, 5120),
        (16, 72, 17408),
    ];
    linear_cases("few rows", &all, &[(3, 136, 576), (11, 200, 2056)]);
}

#[test]
fn linear_of_some_dozens_of_rows() {
    let all = [
        (17, 1024, 2048),
        (33, 200, 328),
        (64, 512, 1096),
        // Where few rows meet many columns, blocks walk several tiles.
        (24, 9008, 72),
        (31, 35344, 40),
        (49, 4112, 200),
        (57, 17936, 136),
        (64, 1024, 3072),
    ];
    linear_cases(
        "dozens of rows",
        &all,
        &[(24, 144, 328), (31, 200, 328), (24, 9008, 72), (24, 6800, 1096)],
    );
}

#[test]
fn linear_of_many_rows() {
    linear_cases("many rows", &[(100, 144, 3072), (128, 72, 40), (130, 64, 256)], &[]);
}

/// x in one block, in two and in four; ends of k of all kinds.
#[test]
fn linear_of_long_rows() {
    let all = [
        (1, 1000, 4104),
        (1, 264, 17408),
        (2, 1104, 8200),
        (3, 520, 5120),
        (4, 72, 17408),
        (8, 264, 17408),
        (8, 2160, 5120),
    ];
    linear_cases("long rows", &all, &[(2, 1072, 4104), (8, 72, 17408)]);
}

/// Strips of one block, of two and of four, the last one cut.
#[test]
fn linear_of_large_matrices() {
    let all = [
        (17, 5136, 5128),
        (32, 8368, 5128),
        (48, 7184, 5128),
        (64, 5168, 5160),
        (64, 25456, 5128),
        // A strip's last unit that is cut.
        (64, 4104, 4104),
        // So little of x that a block reads all of it.
        (24, 4104, 1024),
        (40, 4104, 1024),
        (64, 6144, 1024),
        (100, 5136, 1024),
        // Small matrices, of which clusters of two and of four divide the rows.
        (65, 4096, 1024),
        (100, 1032, 2056),
        (77, 1536, 2048),
        (128, 1024, 3072),
        // Two lots of rows of x.
        (129, 1032, 2056),
        (203, 4096, 1024),
        (256, 1024, 3072),
    ];
    let race_checked_ones = [
        (17, 5136, 5128),
        (64, 4104, 1024),
        (65, 1032, 2056),
        (100, 4096, 1024),
        (203, 2056, 1024),
    ];
    linear_cases("large matrices", &all, &race_checked_ones);
}

fn linear_cases(test: &str, all: &[Product], race_checked_ones: &[Product]) {
    for mut r in rigs(test) {
        for &(m, n, k) in cases(all, race_checked_ones) {
            // Products that two kernels can take are taken by both; the library's are not ours to check.
            let ways: &[_] = match m {
                _ if race_checked() => &[Products::Own],
                ..=256 => &[Products::Library, Products::Own],
                _ => &[Products::Library],
            };
            for products in ways {
                r.b.set_products(*products);
                linear_case(&mut r, m, n, k);
            }
        }
    }
}

fn linear_case(r: &mut Rig, m: usize, n: usize, k: usize) {
    let (x, xt) = r.tensor(&[m, k]);
    let (w, wt) = r.weight(n, k);
    let (bias, bt) = r.vector(n);
    let (nw, nt) = r.vector(k);
    let norm = Norm { weight: nt, eps: 1e-6, plus_one: false, folded: false };
    let what = format!("{m}x{n}x{k} {:?}", r.b.activation_dtype());
    let plain = matmul(&x, &w, m, n, k);
    let out = r.out(&[m, n]);
    let args = Linear { x: &xt, norm: None, weight: &wt, bias: Some(&bt), store: Store::Set };
    r.b.linear(&args, &out).unwrap();
    let with_bias: Vec<f64> = plain.iter().enumerate().map(|(i, v)| v + bias[i % n]).collect();
    r.close(&format!("bias {what}"), &r.get(&out), &with_bias);
    // Adding, with a norm, into f32 and into the activations' type.
    let (before, out) = r.tensor(&[m, n]);
    let xn = normed(&x, &nw, k, 1e-6);
    let product = matmul(&xn, &w, m, n, k);
    let sum: Vec<f64> = product.iter().zip(&before).map(|(a, b)| a + b).collect();
    r.b.linear(&Linear { norm: Some(&norm), bias: None, store: Store::Add, ..args }, &out).unwrap();
    r.close(&format!("norm add {what}"), &r.get(&out), &sum);
    // Of many rows, logits are the library's.
    if m <= 16 || !race_checked() {
        let out = r.poison(DType::F32, &[m, n]);
        r.b.linear(&Linear { norm: Some(&norm), bias: None, ..args }, &out).unwrap();
        r.close(&format!("logits {what}"), &r.get(&out), &product);
    }
    let out = r.out(&[m, k]);
    r.b.rms_norm(&xt, &norm, &out).unwrap();
    r.close(&format!("norm {what}"), &r.get(&out), &xn);
    if gates(m, n, k) {
        let out = r.out(&[m, n / 2]);
        let args = Linear { norm: Some(&norm), bias: None, ..args };
        r.b.gated_linear(&args, Activation::Silu, &out).unwrap();
        r.close(&format!("gated {what}"), &r.get(&out), &gated(&product, n));
    }
    folded_case(r, [m, n, k], (&x, &xt), (&w, &wt), (&nw, norm), (&bias, &bt));
}

/// The same where the norm's weights have been multiplied into the matrix.
fn folded_case(
    r: &mut Rig,
    [m, n, k]: [usize; 3],
    (x, xt): (&[f64], &Tensor),
    (w, wt): (&[f64], &Weight),
    (nw, norm): (&[f64], Norm),
    (bias, bt): (&[f64], &Weight),
) {
    let what = format!("folded {m}x{n}x{k} {:?}", r.b.activation_dtype());
    let norm = r.b.fold_norm(norm, wt).unwrap();
    let native = r.b.activation_dtype() == DType::BF16;
    assert_eq!(norm.folded, native, "{what}");
    let weighted: Vec<f64> = match native {
        true => w.iter().enumerate().map(|(i, w)| r.round(w * nw[i % k])).collect(),
        false => w.to_vec(),
    };
    let ones = vec![1.0; k];
    let xn = normed(x, if native { &ones } else { nw }, k, 1e-6);
    let mut product = matmul(&xn, &weighted, m, n, k);
    product.iter_mut().enumerate().for_each(|(i, sum)| *sum += bias[i % n]);
    let args = Linear { x: xt, norm: Some(&norm), weight: wt, bias: Some(bt), store: Store::Set };
    let out = r.out(&[m, n]);
    r.b.linear(&args, &out).unwrap();
    r.close(&what, &r.get(&out), &product);
    if gates(m, n, k) {
        let out = r.out(&[m, n / 2]);
        r.b.gated_linear(&args, Activation::Silu, &out).unwrap();
        r.close(&format!("gated {what}"), &r.get(&out), &gated(&product, n));
    }
}

/// Whether a product is to be gated. Of more than a few rows, some are the library's, whose kernels do not run under
/// racecheck.
fn gates(m: usize, n: usize, k: usize) -> bool {
    let strips = m <= 64 || (m <= 128 && k == 1024 && (4096..=6144).contains(&n));
    !race_checked() || m <= 16 || (strips && (n / 2).is_multiple_of(8))
}
