//! Rotary position embedding (Su et al., 2021) and the ways to stretch it, as a table.

use std::f64::consts::PI;

use anyhow::{Result, ensure};

/// A rotation's frequencies.
#[derive(Clone, Debug)]
pub struct RopeConfig {
    /// Pair i turns by `position · base^(−2i / head_dim)`.
    pub base: f64,
    /// Elements of a head; all of them rotate.
    pub head_dim: usize,
    /// How frequencies change for long contexts.
    pub scaling: RopeScaling,
    /// Divide each pair's frequency, where a GGUF carries them; else empty.
    pub frequency_divisors: Vec<f32>,
}

/// Ways to stretch a rotation, by the names in `config.json`.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "fields carry config.json's own names")]
pub enum RopeScaling {
    None,
    /// All frequencies divided.
    Linear {
        factor: f64,
    },
    /// NTK-aware: the base grows with the sequence. A position's rotation is the one for a
    /// sequence that ends there, so that it never changes once its key is cached.
    Dynamic {
        factor: f64,
        original_max_positions: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
    /// YaRN (Peng et al., 2023).
    Yarn {
        factor: f64,
        original_max_positions: f64,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: Option<f64>,
        /// `mscale` and `mscale_all_dim`.
        mscale: Option<(f64, f64)>,
        truncate: bool,
    },
}

impl RopeConfig {
    /// `[positions, head_dim]`: for each position `head_dim/2` cosines, then as many sines.
    pub fn table(&self, positions: usize) -> Vec<f32> {
        let pairs = self.head_dim / 2;
        let attention_factor = self.attention_factor();
        let fixed = self.frequencies(self.base);
        let mut table = Vec::with_capacity(positions * self.head_dim);
        for position in 0..positions {
            let grown = self.dynamic_base(position + 1).map(|base| self.frequencies(base));
            let frequencies = grown.as_ref().unwrap_or(&fixed);
            // The angle is rounded to f32 first, as the models were trained.
            let angle = |pair: usize| f64::from(position as f32 * frequencies[pair]);
            let turn = |value: f64| (value * attention_factor) as f32;
            table.extend((0..pairs).map(|pair| turn(angle(pair).cos())));
            table.extend((0..pairs).map(|pair| turn(angle(pair).sin())));
        }
        table
    }

    pub(crate) fn check(&self) -> Result<()> {
        let positive = |name: &str, value: f64| {
            ensure!(value.is_finite() && value > 0.0, "rope: {name} is {value}");
            Ok(())
        };
        positive("rope_theta", self.base)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Dynamic { factor, original_max_positions }
            | RopeScaling::Llama3 { factor, original_max_positions, .. }
            | RopeScaling::Yarn { factor, original_max_positions, .. } => {
                positive("factor", *factor)?;
                positive("original_max_position_embeddings", *original_max_positions)
            }
        }
    }

    fn frequencies(&self, base: f64) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f64 / self.head_dim as f64;
                let plain = base.powf(-exponent);
                let divisor = self.frequency_divisors.get(pair).map_or(1.0, |d| f64::from(*d));
                (self.scaled(plain, pair) / divisor) as f32
            })
            .collect()
    }

    fn scaled(&self, plain: f64, pair: usize) -> f64 {
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => plain,
            RopeScaling::Linear { factor } => plain / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions,
            } => {
                let turns = original_max_positions * plain / (2.0 * PI);
                let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                keep * plain + (1.0 - keep) * plain / factor
            }
            RopeScaling::Yarn { factor, .. } => {
                let (low, high) = self.yarn_ramp();
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                divided * plain / factor + (1.0 - divided) * plain
            }
        }
    }

    /// Pairs below the first number keep their frequency, those above the second are divided.
    fn yarn_ramp(&self) -> (f64, f64) {
        let RopeScaling::Yarn { original_max_positions, beta_fast, beta_slow, truncate, .. } =
            &self.scaling
        else {
            unreachable!("only YaRN has a ramp");
        };
        let dim = self.head_dim as f64;
        let pair_of = |turns: f64| {
            dim * (original_max_positions / (turns * 2.0 * PI)).ln() / (2.0 * self.base.ln())
        };
        let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
        if *truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }

    fn dynamic_base(&self, len: usize) -> Option<f64> {
        let RopeScaling::Dynamic { factor, original_max_positions } = &self.scaling else {
            return None;
        };
        let len = len as f64;
        if len <= *original_max_positions {
            return None;
        }
        let dim = self.head_dim as f64;
        let growth = factor * len / original_max_positions - (factor - 1.0);
        Some(self.base * growth.powf(dim / (dim - 2.0)))
    }

    fn attention_factor(&self) -> f64 {
        let RopeScaling::Yarn { factor, attention_factor, mscale, .. } = &self.scaling else {
            return 1.0;
        };
        let scale = |mscale: f64| match *factor > 1.0 {
            true => 0.1 * mscale * factor.ln() + 1.0,
            false => 1.0,
        };
        match (attention_factor, mscale) {
            (Some(given), _) => *given,
            (None, Some((mscale, all_dim))) => scale(*mscale) / scale(*all_dim),
            (None, None) => scale(1.0),
        }
    }
}
