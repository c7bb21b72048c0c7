//! Logits, and tokens from what was gathered on the way.

use minisgl_tensor::*;

use super::{cases, matmul, normed, rigs};

/// Rows, columns, elements of a row of weights.
type Product = (usize, usize, usize);

#[test]
fn logits_and_tokens_of_them() {
    let all: [Product; 7] = [
        (16, 1000, 264),
        (17, 1000, 264),
        (64, 17_096, 72),
        (65, 4096, 1024),
        // Tiles that are not whole, and blocks that walk several.
        (128, 35_336, 136),
        (203, 2104, 1096),
        (256, 17_408, 200),
    ];
    for mut r in rigs("logits") {
        for &(m, n, k) in cases(&all, &[(17, 392, 264), (70, 17_096, 72)]) {
            let (x, xt) = r.tensor(&[m, k]);
            let (w, wt) = r.weight(n, k);
            let (nw, nt) = r.vector(k);
            let norm = Norm { weight: nt, eps: 1e-6, plus_one: false, folded: false };
            let what = format!("{m}x{n}x{k} {:?}", r.b.activation_dtype());
            let logits = r.poison(DType::F32, &[m, n]);
            let temperature: Vec<f64> = (0..m).map(|row| (row % 3) as f64 * 0.4).collect();
            let args =
                Linear { x: &xt, norm: Some(&norm), weight: &wt, bias: None, store: Store::Set };
            // As in a bucket, of which there may be more.
            let temperatures = r.f32s(&[&temperature[..], &[f64::NAN; 3]].concat());
            let survey = r.b.logits(&args, &temperatures, &logits).unwrap();
            let got = r.get(&logits);
            r.close(&what, &got, &matmul(&normed(&x, &nw, k, 1e-6), &w, m, n, k));
            let Some(survey) = survey else {
                eprintln!("{what}: nothing is gathered");
                continue;
            };
            let draw = |survey: Option<&Tensor>| {
                let (tokens, table) = (r.poison(DType::I32, &[m]), r.ints(&vec![-1; m], &[m]));
                let rows: Vec<i32> = (0..m as i32).collect();
                let args = Sample {
                    temperature: &temperatures,
                    top_k: &r.ints(&vec![0; m], &[m]),
                    top_p: &r.f32s(&vec![1.0; m]),
                    min_p: &r.f32s(&vec![0.0; m]),
                    seed: &r.ints(&[77, 3].repeat(m), &[m, 2]),
                    position: &r.ints(&rows, &[m]),
                    slots: &r.ints(&rows, &[m]),
                    all_greedy: false,
                    survey,
                    last_use: survey.is_some(),
                    token_table: &table,
                    tokens: &tokens,
                };
                r.b.sample(&args, &logits).unwrap();
                r.get_ints(&tokens)
            };
            let (plain, surveyed) = (draw(None), draw(Some(&survey)));
            let mut others = 0;
            for row in 0..m {
                let token = surveyed[row] as usize;
                assert!(token < n, "{what}: row {row} has {token}");
                if temperature[row] == 0.0 {
                    let of = &got[row * n..][..n];
                    let best = (0..n).rev().max_by(|&a, &b| of[a].total_cmp(&of[b])).unwrap();
                    assert_eq!((token, plain[row] as usize), (best, best), "{what}: row {row}");
                }
                others += usize::from(surveyed[row] != plain[row]);
            }
            // Masses are added up in another order, and a number may lie between two tokens.
            assert!(others <= 1, "{what}: {others} tokens differ");
        }
    }
}
