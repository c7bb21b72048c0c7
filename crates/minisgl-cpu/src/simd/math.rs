//! Elementary functions without branches or calls, so that loops over them become vector code
//! inside a `Kernel`.

use minisgl_tensor::Activation;

/// ln 2 in two parts, the upper with few bits.
pub const LN2_HIGH: f32 = 0.693_359_4;
/// The lower.
pub const LN2_LOW: f32 = -2.121_944_4e-4;
/// The minimax polynomial of Cephes' expf.
pub const EXP: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// `eˣ` to about one unit in the last place; exactly 1 at 0; 0 below −87.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let inside = x.clamp(-87.0, 88.0);
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (inside - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = EXP[0];
    for c in &EXP[1..] {
        p = p * r + c;
    }
    let y = (p * r * r + r) + 1.0;
    let two_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { y * two_n }
}

/// `activation(x)`.
#[inline(always)]
pub fn activate(activation: Activation, x: f32) -> f32 {
    let z = match activation {
        Activation::Silu => x,
        // 0.5 · (1 + tanh u) is the logistic function of 2u.
        Activation::GeluTanh => {
            2.0 * (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)
        }
    };
    x / (1.0 + exp(-z))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_against_f64() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        for i in -86_000..88_000 {
            let x = i as f32 / 1000.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 2.5e-7, "{x}");
        }
    }
}
