//! Single steps, planned by hand and run on the engine without a scheduler: what the device does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use minisgl_scheduler::engine::Engine;
use minisgl_scheduler::plan::{
    PageId, PageUpdate, PlanRow, RowInput, RowOutput, SharedPrefix, Slot, StepPlan,
};
use minisgl_scheduler::sampling::SamplingParams;

use super::PythonRandom;

/// Steps in flight: one runs while the next is launched, as overlap scheduling has it.
const IN_FLIGHT: usize = 2;
const ID_MAX: u32 = 10_000;

/// Runs plans that it makes up. Requests lie side by side: slot `i` owns pages
/// `i · pages_a_row ..`, so that nothing is allocated; and nothing is shared but, where that is wanted,
/// the first pages of a decode's contexts, which are slot 0's.
pub struct StepBench<E: Engine> {
    engine: E,
    step: u64,
    in_flight: VecDeque<E::InFlight>,
    random: PythonRandom,
    id_max: u32,
    sampling: Arc<SamplingParams>,
    /// Pages that a decode's requests begin with in common.
    shared_pages: usize,
}

impl<E: Engine> StepBench<E> {
    /// Measures on this engine.
    pub fn new(engine: E) -> Self {
        let id_max = ID_MAX.min(engine.limits().vocab_size as u32 - 1);
        Self {
            engine,
            step: 0,
            in_flight: VecDeque::new(),
            random: PythonRandom::new(0),
            id_max,
            sampling: Arc::new(SamplingParams { temperature: 0.6, ..SamplingParams::default() }),
            shared_pages: 0,
        }
    }

    /// Has the requests of decode steps share the whole pages of their first `tokens` tokens.
    pub fn share(&mut self, tokens: usize) {
        self.shared_pages = tokens / self.engine.limits().page_size;
    }

    /// The mean time of a decode step of `batch` requests whose contexts grow from `context` by
    /// `steps` tokens; before, they have taken some to come there.
    ///
    /// # Errors
    /// If the engine is too small for that, or fails.
    pub fn decode(&mut self, batch: usize, context: usize, steps: usize) -> Result<Duration> {
        ensure!(context > 0, "there is no decode without a context");
        let warm_up = 4.min(context - 1);
        let (prompt, len) = (context - warm_up, context + steps);
        self.check_room(batch, len)?;
        let shared_pages = self.shared_pages.min((prompt - 1) / self.engine.limits().page_size);
        self.fill(batch, prompt, len, shared_pages)?;
        let prefix = SharedPrefix { rows: (0..batch as u32).collect(), pages: shared_pages as u32 };
        let tells = self.engine.prefix_rows_max() > 1 && batch > 1 && shared_pages > 0;
        let shared_prefixes: Vec<_> = tells.then_some(prefix).into_iter().collect();
        let mut started = Instant::now();
        for i in 0..warm_up + steps {
            if i == warm_up {
                self.finish()?;
                started = Instant::now();
            }
            let rows = (0..batch)
                .map(|row| PlanRow {
                    slot: Slot(row as u32),
                    cached_len: (prompt + i) as u32,
                    extend_len: 1,
                    input: RowInput::Sampled,
                    output: RowOutput::Sample(Arc::clone(&self.sampling)),
                })
                .collect();
            self.launch(rows, Vec::new(), shared_prefixes.clone())?;
        }
        self.finish()?;
        Ok(started.elapsed() / steps as u32)
    }

    /// The time to compute `prompts` fresh prompts of `len` tokens, and a token for each.
    ///
    /// # Errors
    /// If the engine is too small for that, or fails.
    pub fn prefill(&mut self, prompts: usize, len: usize) -> Result<Duration> {
        self.check_room(prompts, len + 1)?;
        // The first run warms up.
        self.fill(prompts, len, len + 1, 0)?;
        let started = Instant::now();
        self.fill(prompts, len, len + 1, 0)?;
        Ok(started.elapsed())
    }

    /// Computes fresh prompts in steps as large as the engine takes, each row with pages for
    /// `pages_for` tokens, of which the first `shared_pages` are row 0's.
    fn fill(
        &mut self,
        rows: usize,
        len: usize,
        pages_for: usize,
        shared_pages: usize,
    ) -> Result<()> {
        let limits = self.engine.limits();
        let pages = pages_for.div_ceil(limits.page_size) as u32;
        let mut plan = Vec::new();
        let mut page_updates = Vec::new();
        let mut room = limits.step_tokens_max;
        for row in 0..rows as u32 {
            page_updates.extend((0..pages).map(|index| PageUpdate {
                slot: Slot(row),
                index,
                page: PageId(if (index as usize) < shared_pages { 0 } else { row * pages } + index),
            }));
            let mut cached_len = if row == 0 { 0 } else { shared_pages * limits.page_size };
            while cached_len < len {
                let extend_len = room.min(len - cached_len);
                let last = cached_len + extend_len == len;
                let tokens = (0..extend_len).map(|_| self.random.randint(0, self.id_max)).collect();
                plan.push(PlanRow {
                    slot: Slot(row),
                    cached_len: cached_len as u32,
                    extend_len: extend_len as u32,
                    input: RowInput::Tokens(tokens),
                    output: if last {
                        RowOutput::Sample(Arc::clone(&self.sampling))
                    } else {
                        RowOutput::None
                    },
                });
                cached_len += extend_len;
                room -= extend_len;
                if room == 0 {
                    let page_updates = std::mem::take(&mut page_updates);
                    self.launch(std::mem::take(&mut plan), page_updates, Vec::new())?;
                    room = limits.step_tokens_max;
                }
            }
        }
        if !plan.is_empty() {
            self.launch(plan, page_updates, Vec::new())?;
        }
        self.finish()
    }

    fn launch(
        &mut self,
        rows: Vec<PlanRow>,
        page_updates: Vec<PageUpdate>,
        shared_prefixes: Vec<SharedPrefix>,
    ) -> Result<()> {
        let plan =
            StepPlan { step: self.step, rows, page_updates, adjustments: None, shared_prefixes };
        self.step += 1;
        self.in_flight.push_back(self.engine.launch(Arc::new(plan))?);
        while self.in_flight.len() >= IN_FLIGHT {
            self.wait_oldest()?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            self.wait_oldest()?;
        }
        Ok(())
    }

    fn wait_oldest(&mut self) -> Result<()> {
        if let Some(step) = self.in_flight.pop_front() {
            self.engine.wait(step)?;
        }
        Ok(())
    }

    fn check_room(&self, rows: usize, len: usize) -> Result<()> {
        let limits = self.engine.limits();
        let pages = rows * len.div_ceil(limits.page_size);
        ensure!(rows > 0 && len > 1, "nothing to measure");
        ensure!(rows <= limits.slots, "{rows} requests, and at most {} can run", limits.slots);
        ensure!(len <= limits.seq_len_max, "{len} tokens, and at most {} fit", limits.seq_len_max);
        ensure!(
            pages <= limits.pages,
            "{rows} requests of {len} tokens take {pages} pages, and the pool has {}",
            limits.pages
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minisgl_scheduler::engine::{EngineError, EngineLimits};
    use minisgl_scheduler::plan::StepResult;

    /// Checks what every engine may take for granted of a plan.
    #[derive(Default)]
    struct CheckingEngine {
        cached: Vec<u32>,
        tokens: usize,
        steps: u64,
        /// Tokens that rows may begin behind.
        shared_tokens: u32,
        /// Steps that say which rows share.
        told: usize,
    }

    impl Engine for CheckingEngine {
        type InFlight = usize;

        fn launch(&mut self, plan: Arc<StepPlan>) -> Result<usize, EngineError> {
            assert_eq!(plan.step, self.steps);
            assert!(plan.tokens() <= self.limits().step_tokens_max);
            self.cached.resize(4, 0);
            for row in &plan.rows {
                let cached = &mut self.cached[row.slot.0 as usize];
                let begins = [0, self.shared_tokens].contains(&row.cached_len);
                assert!(row.cached_len == *cached || begins);
                *cached = row.device_len();
                if let RowInput::Tokens(tokens) = &row.input {
                    assert_eq!(tokens.len(), row.extend_len as usize);
                }
            }
            for update in &plan.page_updates {
                assert!((update.page.0 as usize) < self.limits().pages);
            }
            for prefix in &plan.shared_prefixes {
                assert_eq!((&prefix.rows[..], prefix.pages), (&[0, 1, 2][..], 3));
                self.told += 1;
            }
            self.tokens += plan.tokens();
            self.steps += 1;
            Ok(plan.rows.len())
        }

        fn wait(&mut self, rows: usize) -> Result<StepResult, EngineError> {
            Ok(StepResult { tokens: vec![Some(0); rows], ..StepResult::default() })
        }

        fn limits(&self) -> EngineLimits {
            EngineLimits {
                page_size: 4,
                pages: 100,
                slots: 4,
                seq_len_max: 64,
                step_tokens_max: 10,
                vocab_size: 50,
            }
        }

        fn prefix_rows_max(&self) -> usize {
            2
        }
    }

    #[test]
    fn plans_are_what_an_engine_may_expect() {
        let mut bench = StepBench::new(CheckingEngine::default());
        bench.decode(3, 17, 5).unwrap();
        assert_eq!(bench.engine.cached, [22, 22, 22, 0]);
        assert_eq!(bench.engine.tokens, 3 * (17 + 5));
        bench.prefill(2, 31).unwrap();
        assert_eq!(bench.engine.tokens, 3 * 22 + 2 * 2 * 31);
        // Contexts with hardly a way to them.
        for context in [1, 2] {
            bench.decode(1, context, 1).unwrap();
            assert_eq!(bench.engine.cached[0] as usize, context + 1);
        }
    }

    #[test]
    fn requests_share_their_first_pages_if_wanted() {
        let engine = CheckingEngine { shared_tokens: 12, ..CheckingEngine::default() };
        let mut bench = StepBench::new(engine);
        bench.share(15);
        bench.decode(3, 17, 5).unwrap();
        // Two of three begin behind three pages of four.
        assert_eq!(bench.engine.tokens, 3 * (17 + 5) - 2 * 12);
        assert_eq!(bench.engine.told, 4 + 5);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut bench = StepBench::new(CheckingEngine::default());
        for (rows, len) in [(5, 8), (1, 64), (0, 8), (1, 0)] {
            assert!(bench.decode(rows, len, 8).is_err(), "{rows} x {len}");
        }
    }
}
