//! An engine without a model, for tests and benchmarks of everything around one.
//!
//! It keeps token ids where an engine keeps K and V: a step stores its rows' ids into their pages,
//! through the page table, and then reads each row's whole sequence back. The next token is a
//! function of that sequence, so a wrong `cached_len`, a page given to two requests or reused too
//! early, or a page table entry that was not sent shows as a wrong token.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{Engine, EngineError, EngineLimits};
use crate::plan::{
    PlanRow, RowAdjustment, RowInput, RowOutput, StepPlan, StepResult, TokenLogprobs,
};
use crate::sampling::SamplingParams;

/// How a [`FakeEngine`] behaves.
#[derive(Clone, Debug)]
pub struct FakeOptions {
    /// What it can hold.
    pub limits: EngineLimits,
    /// How it chooses tokens.
    pub next_token: NextToken,
    /// How long a step takes, and how much longer for each of its tokens.
    pub step_time: (Duration, Duration),
    /// The step that fails, if one does, and with it all that follow.
    pub fail_at: Option<u64>,
    /// As [`Engine::prefix_rows_max`]. What plans then say is checked, not used.
    pub prefix_rows_max: usize,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            limits: EngineLimits {
                page_size: 16,
                pages: 4096,
                slots: 256,
                seq_len_max: 4096,
                step_tokens_max: 2048,
                vocab_size: 32_000,
            },
            next_token: NextToken::Hash,
            step_time: (Duration::ZERO, Duration::ZERO),
            fail_at: None,
            prefix_rows_max: 1,
        }
    }
}

/// How a [`FakeEngine`] chooses the token that follows a sequence.
#[derive(Clone)]
pub enum NextToken {
    /// By a hash of the whole sequence and, above temperature 0, of the seed.
    Hash,
    /// By a hash of the position and the seed alone: constant work a row, and nothing is checked.
    Position,
    /// By this function of the whole sequence.
    Call(Arc<NextTokenFn>),
}

/// From a sequence to the token that follows it.
pub type NextTokenFn = dyn Fn(&[u32]) -> u32 + Send + Sync;

impl NextToken {
    /// Answers every prompt with these tokens, then with `end` for ever.
    pub fn script(answer: Vec<u32>, end: u32) -> Self {
        NextToken::Call(Arc::new(move |tokens| {
            let said = (0..=answer.len()).rev().find(|len| tokens.ends_with(&answer[..*len]));
            said.and_then(|len| answer.get(len)).copied().unwrap_or(end)
        }))
    }
}

impl fmt::Debug for NextToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NextToken::Hash => "Hash",
            NextToken::Position => "Position",
            NextToken::Call(_) => "Call",
        })
    }
}

/// See the module. Steps are computed when they are waited for, in order.
#[derive(Debug)]
pub struct FakeEngine {
    options: FakeOptions,
    /// `[pages * page_size]`: the id whose K and V an engine would have there.
    stored: Vec<u32>,
    /// `[slots][pages of a sequence]`.
    page_table: Vec<Vec<u32>>,
    /// `[slots]`: each one's newest token.
    token_table: Vec<u32>,
    launched: VecDeque<Launched>,
    steps_launched: u64,
    /// When the last step launched ends.
    busy_until: Instant,
}

#[derive(Debug)]
struct Launched {
    plan: Arc<StepPlan>,
    done_at: Instant,
}

/// What no vocabulary has: the content of a page that nobody has written.
const UNWRITTEN: u32 = u32::MAX;

impl FakeEngine {
    /// An engine that has run nothing.
    pub fn new(options: FakeOptions) -> Self {
        let limits = options.limits;
        let pages_per_slot = limits.seq_len_max.div_ceil(limits.page_size);
        Self {
            options,
            stored: vec![UNWRITTEN; limits.pages * limits.page_size],
            page_table: vec![vec![UNWRITTEN; pages_per_slot]; limits.slots],
            token_table: vec![UNWRITTEN; limits.slots],
            launched: VecDeque::new(),
            steps_launched: 0,
            busy_until: Instant::now(),
        }
    }

    /// Panics where a plan asks for what no engine has to be ready for.
    fn check(&self, plan: &StepPlan) {
        let limits = &self.options.limits;
        assert_eq!(plan.step, self.steps_launched, "steps are numbered in order");
        assert!(!plan.rows.is_empty(), "a step has rows");
        assert!(plan.tokens() <= limits.step_tokens_max, "{} tokens in a step", plan.tokens());
        let mut slots = HashSet::new();
        for row in &plan.rows {
            assert!((row.slot.0 as usize) < limits.slots && slots.insert(row.slot), "{row:?}");
            assert!(row.extend_len > 0 && row.device_len() as usize <= limits.seq_len_max);
            match &row.input {
                RowInput::Tokens(ids) => assert_eq!(ids.len(), row.extend_len as usize),
                RowInput::Sampled => assert_eq!(row.extend_len, 1),
            }
        }
        let mut entries = HashSet::new();
        for update in &plan.page_updates {
            assert!((update.page.0 as usize) < limits.pages, "{update:?}");
            assert!(entries.insert((update.slot, update.index)), "{update:?} comes twice");
        }
    }

    fn error(&self) -> EngineError {
        EngineError(format!("told to fail at step {:?}", self.options.fail_at).into())
    }

    fn failed(&self, step: u64) -> bool {
        self.options.fail_at.is_some_and(|fail_at| step >= fail_at)
    }
}

impl Engine for FakeEngine {
    type InFlight = u64;

    fn launch(&mut self, plan: Arc<StepPlan>) -> Result<u64, EngineError> {
        if cfg!(debug_assertions) || !matches!(self.options.next_token, NextToken::Position) {
            self.check(&plan);
        }
        let (step_time, token_time) = self.options.step_time;
        let start = self.busy_until.max(Instant::now());
        self.busy_until = start + step_time + token_time * plan.tokens() as u32;
        let step = self.steps_launched;
        self.steps_launched += 1;
        self.launched.push_back(Launched { plan, done_at: self.busy_until });
        Ok(step)
    }

    fn wait(&mut self, step: u64) -> Result<StepResult, EngineError> {
        loop {
            let launched = self.launched.pop_front().expect("a step is waited for once");
            if self.failed(launched.plan.step) {
                return Err(self.error());
            }
            let result = self.compute(&launched.plan);
            if launched.plan.step == step {
                std::thread::sleep(launched.done_at.saturating_duration_since(Instant::now()));
                return Ok(result);
            }
        }
    }

    fn limits(&self) -> EngineLimits {
        self.options.limits
    }

    fn prefix_rows_max(&self) -> usize {
        self.options.prefix_rows_max
    }
}

/// What a step computes.
impl FakeEngine {
    fn compute(&mut self, plan: &StepPlan) -> StepResult {
        for update in &plan.page_updates {
            self.page_table[update.slot.0 as usize][update.index as usize] = update.page.0;
        }
        if !matches!(self.options.next_token, NextToken::Position) {
            self.check_shared(plan);
        }
        // As in every layer of a model: all rows store before any row reads.
        for row in &plan.rows {
            self.store(row);
        }
        let adjustments = plan.adjustments.as_ref().map(|cell| cell.wait()).unwrap_or_default();
        let mut result = StepResult::default();
        for (index, row) in plan.rows.iter().enumerate() {
            let adjustment = adjustments.iter().find(|adjustment| adjustment.row == index);
            let sampling = row.output.sampling();
            let token = sampling.map(|params| self.sample(row, params, adjustment));
            if let Some(token) = token {
                self.token_table[row.slot.0 as usize] = token;
            }
            let logprobs = sampling.and_then(|params| params.logprobs).zip(token);
            result.tokens.push(token);
            result.logprobs.push(logprobs.map(|(top, token)| fake_logprobs(token as u64, top)));
            result.scores.push(self.scores(row));
        }
        result
    }

    /// Panics where rows do not share what the plan says they do, or where the step writes to it.
    fn check_shared(&self, plan: &StepPlan) {
        if plan.shared_prefixes.is_empty() {
            return;
        }
        assert!(self.options.prefix_rows_max > 1, "nobody asked for {:?}", plan.shared_prefixes);
        let page_size = self.options.limits.page_size;
        let writes = |row: &PlanRow| row.cached_len as usize / page_size;
        let written: HashSet<u32> = plan
            .rows
            .iter()
            .flat_map(|row| {
                let pages = writes(row)..(row.device_len() as usize).div_ceil(page_size);
                &self.page_table[row.slot.0 as usize][pages]
            })
            .copied()
            .collect();
        let mut rows_seen = HashSet::new();
        for prefix in &plan.shared_prefixes {
            let pages = prefix.pages as usize;
            assert!(prefix.rows.len() > 1 && prefix.rows.is_sorted() && pages > 0, "{prefix:?}");
            let row_of = |index: &u32| &plan.rows[*index as usize];
            let first = &self.page_table[row_of(&prefix.rows[0]).slot.0 as usize][..pages];
            assert!(!first.contains(&UNWRITTEN), "{prefix:?}");
            assert!(first.iter().all(|page| !written.contains(page)), "{prefix:?} is written");
            for index in &prefix.rows {
                let row = row_of(index);
                assert!(rows_seen.insert(*index), "row {index} has two prefixes");
                assert!(plan.rows[..*index as usize].iter().all(|row| row.extend_len == 1));
                assert!(row.extend_len == 1 && pages <= writes(row), "{prefix:?} of {row:?}");
                assert_eq!(&self.page_table[row.slot.0 as usize][..pages], first, "{prefix:?}");
            }
        }
    }

    fn place(&self, row: &PlanRow, position: u32) -> usize {
        let (page_size, position) = (self.options.limits.page_size, position as usize);
        let page = self.page_table[row.slot.0 as usize][position / page_size];
        page as usize * page_size + position % page_size
    }

    fn store(&mut self, row: &PlanRow) {
        for (index, position) in (row.cached_len..row.device_len()).enumerate() {
            let place = self.place(row, position);
            self.stored[place] = match &row.input {
                RowInput::Tokens(ids) => ids[index],
                RowInput::Sampled => self.token_table[row.slot.0 as usize],
            };
        }
    }

    /// The row's sequence up to `len`, as the pages have it.
    fn read(&self, row: &PlanRow, len: u32) -> Vec<u32> {
        (0..len).map(|position| self.stored[self.place(row, position)]).collect()
    }

    fn sample(
        &self,
        row: &PlanRow,
        params: &SamplingParams,
        adjustment: Option<&RowAdjustment>,
    ) -> u32 {
        let seed = if params.temperature > 0.0 { params.seed } else { 0 };
        let vocab_size = self.options.limits.vocab_size;
        let liked = match &self.options.next_token {
            NextToken::Position => (hash([row.device_len()], seed) % vocab_size as u64) as u32,
            NextToken::Hash => {
                let sequence = self.read(row, row.device_len());
                assert!(!sequence.contains(&UNWRITTEN), "{row:?} reads what nobody wrote");
                (hash(sequence, seed) % vocab_size as u64) as u32
            }
            NextToken::Call(next) => next(&self.read(row, row.device_len())),
        };
        match adjustment {
            None => liked,
            Some(adjustment) => best(liked, vocab_size as u32, adjustment),
        }
    }

    fn scores(&self, row: &PlanRow) -> Vec<Option<TokenLogprobs>> {
        let RowOutput::Score { targets, top, .. } = &row.output else { return Vec::new() };
        let score = |(index, target): (usize, &Option<u32>)| {
            let sequence = self.read(row, row.cached_len + index as u32 + 1);
            target.map(|target| fake_logprobs(hash(sequence, target.into()), *top))
        };
        targets.iter().enumerate().map(score).collect()
    }
}

/// The token of the highest logit, where the liked one has 10 and all others have 0.
fn best(liked: u32, vocab_size: u32, adjustment: &RowAdjustment) -> u32 {
    let is_allowed = |token: u32| match &adjustment.mask {
        Some(mask) => {
            mask.get(token as usize / 32).is_some_and(|bits| bits >> (token % 32) & 1 == 1)
        }
        None => true,
    };
    let logit = |token: u32| {
        let plain = if token == liked { 10.0 } else { 0.0 };
        match adjustment.edits.iter().find(|edit| edit.token == token) {
            Some(edit) if plain > 0.0 => plain / edit.scale + edit.bias,
            Some(edit) => plain * edit.scale + edit.bias,
            None => plain,
        }
    };
    // The liked one wins ties, then those behind it.
    let candidates = (0..vocab_size).map(|offset| (liked + offset) % vocab_size);
    let allowed = candidates.filter(|token| is_allowed(*token));
    let better = |best: u32, token| if logit(token) > logit(best) { token } else { best };
    let best = allowed.reduce(better).unwrap_or(liked);
    assert!(logit(best).is_finite(), "no token may come");
    best
}

/// Numbers that depend on `from` alone.
fn fake_logprobs(from: u64, top: u32) -> TokenLogprobs {
    let logprob = |rank: u32| -1.0 - rank as f32 - (from % 1000) as f32 / 1000.0;
    TokenLogprobs {
        logprob: logprob(0),
        rank: 0,
        top: (0..top).map(|rank| ((from as u32).wrapping_add(rank), logprob(rank))).collect(),
    }
}

/// FNV-1a over the words, with a last round of mixing.
fn hash(words: impl IntoIterator<Item = u32>, seed: u64) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = words
        .into_iter()
        .fold(start, |hash, word| (hash ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3));
    (mixed ^ (mixed >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
}
