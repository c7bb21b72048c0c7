//! What a benchmark asks for: prompts of random ids, and how many tokens to answer with.

use std::ops::RangeInclusive;

use super::python_random::PythonRandom;

/// The requests of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Token ids of each prompt.
    pub prompts: Vec<Vec<u32>>,
    /// Tokens to generate for each.
    pub output_lens: Vec<u32>,
}

/// How a workload is drawn.
#[derive(Clone, Debug)]
pub struct WorkloadSpec {
    /// Requests.
    pub num_seqs: usize,
    /// Prompt lengths, uniform.
    pub input_len: RangeInclusive<u32>,
    /// Answer lengths, uniform.
    pub output_len: RangeInclusive<u32>,
    /// Ids are drawn from `0..=id_max`.
    pub id_max: u32,
    /// Python's `random.seed`.
    pub seed: u64,
}

impl Workload {
    /// Draws in the order of the reference's `benchmark/offline/bench.py`: for each prompt its
    /// length and then its ids; after all prompts, the answers' lengths.
    pub fn draw(spec: &WorkloadSpec) -> Self {
        let mut random = PythonRandom::new(spec.seed);
        let prompts = (0..spec.num_seqs)
            .map(|_| {
                let len = random.randint(*spec.input_len.start(), *spec.input_len.end());
                (0..len).map(|_| random.randint(0, spec.id_max)).collect()
            })
            .collect();
        let output_lens = (0..spec.num_seqs)
            .map(|_| random.randint(*spec.output_len.start(), *spec.output_len.end()))
            .collect();
        Self { prompts, output_lens }
    }

    /// Tokens in all prompts.
    pub fn input_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// Tokens in all answers.
    pub fn output_tokens(&self) -> usize {
        self.output_lens.iter().map(|&len| len as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_workload_has_the_reference_totals() {
        let spec = WorkloadSpec {
            num_seqs: 256,
            input_len: 100..=1024,
            output_len: 100..=1024,
            id_max: 10_000,
            seed: 0,
        };
        let workload = Workload::draw(&spec);
        assert_eq!(workload.input_tokens(), 142_827);
        assert_eq!(workload.output_tokens(), 133_966);
        assert_eq!(workload.output_lens[..4], [845, 312, 607, 843]);
        assert_eq!(workload.prompts[255][workload.prompts[255].len() - 3..], [6642, 9046, 1958]);
    }
}
