//! Requests as text, on an engine without a model.

mod tiny;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use minisgl_frontend::{
    Event, Frontend, FrontendOptions, GenerateRequest, Generation, Outcome, Prompt, SubmitError,
    Usage,
};
use minisgl_scheduler::SchedulerOptions;
use minisgl_scheduler::engine::{Engine, EngineError, EngineLimits};
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_scheduler::message::{FinishReason, Refusal};
use minisgl_scheduler::plan::{StepPlan, StepResult};
use minisgl_scheduler::sampling::SamplingParams;

fn limits() -> EngineLimits {
    EngineLimits {
        page_size: 4,
        pages: 256,
        slots: 8,
        seq_len_max: 512,
        step_tokens_max: 64,
        vocab_size: tiny::VOCAB_SIZE,
    }
}

fn start(next_token: NextToken, edit: impl FnOnce(&mut FakeOptions)) -> Frontend {
    let mut options = FakeOptions { limits: limits(), next_token, ..FakeOptions::default() };
    edit(&mut options);
    let scheduler = SchedulerOptions { waiting_max: 4, ..SchedulerOptions::default() };
    let engine = FakeEngine::new(options);
    Frontend::start(engine, tiny::text_model(), FrontendOptions { scheduler }).unwrap()
}

/// An engine that answers every prompt with `answer`.
fn says(answer: &[u8]) -> Frontend {
    let script = answer.iter().map(|&byte| u32::from(byte)).collect();
    start(NextToken::script(script, tiny::EOS), |_| {})
}

fn request(prompt: &str, max_tokens: u32) -> GenerateRequest {
    let params = SamplingParams { max_tokens, ..SamplingParams::default() };
    GenerateRequest { params, ..GenerateRequest::new(Prompt::Text(prompt.to_string())) }
}

#[derive(Debug)]
struct Answer {
    text: String,
    ids: Vec<u32>,
    reason: FinishReason,
    stop: Option<String>,
    usage: Usage,
}

fn read(mut generation: Generation) -> Vec<Answer> {
    let mut texts = vec![(String::new(), Vec::new()); generation.choices()];
    let mut answers: Vec<Option<Answer>> = texts.iter().map(|_| None).collect();
    while let Some(event) = generation.blocking_recv() {
        match event {
            Event::Prompt { .. } => {}
            Event::Text { choice, text, tokens } => {
                assert!(answers[choice].is_none(), "text behind the end");
                texts[choice].0.push_str(&text);
                texts[choice].1.extend(tokens.iter().map(|token| token.id));
            }
            Event::Finished { choice, reason, stop, usage } => {
                let (text, ids) = std::mem::take(&mut texts[choice]);
                answers[choice] = Some(Answer { text, ids, reason, stop, usage });
            }
        }
    }
    answers.into_iter().map(|answer| answer.expect("every choice ends")).collect()
}

fn read_one(generation: Generation) -> Answer {
    read(generation).pop().expect("there is one choice")
}

/// Waits until nothing is in flight and every page is free or cached.
fn settle(frontend: &Frontend) {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let stats = frontend.scheduler_stats();
        let kept = stats.pages_free.load(Relaxed) + stats.pages_cached.load(Relaxed);
        if frontend.in_flight() == 0 && kept == stats.pages.load(Relaxed) {
            return;
        }
        assert!(Instant::now() < until, "{} in flight, {stats:?}", frontend.in_flight());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_answer_ends_at_eos_which_is_a_token_but_no_text() {
    let frontend = says("Grüße, 世界 🚀".as_bytes());
    let answer = read_one(frontend.submit(request("hello", 100)).unwrap());
    assert_eq!(answer.text, "Grüße, 世界 🚀");
    assert_eq!(answer.reason, FinishReason::Stop { matched: Some(tiny::EOS) });
    assert_eq!(answer.ids.last(), Some(&tiny::EOS));
    assert_eq!(answer.usage.prompt_tokens, 5);
    assert_eq!(answer.usage.completion_tokens as usize, answer.ids.len());
    settle(&frontend);
}

#[test]
fn a_character_cut_by_the_length_limit_is_marked_and_not_lost() {
    let frontend = says("ab🚀".as_bytes());
    let answer = read_one(frontend.submit(request("x", 4)).unwrap());
    assert_eq!(answer.text, "ab\u{FFFD}");
    assert_eq!(answer.reason, FinishReason::Length);
}

#[test]
fn a_stop_string_ends_the_text_in_front_of_it_wherever_tokens_are_cut() {
    let frontend = says("one two ünd three".as_bytes());
    for (include, expected) in [(false, "one two "), (true, "one two ünd")] {
        let mut request = request("x", 100);
        request.stop = vec!["never".to_string(), "ünd".to_string()];
        request.include_stop_str = include;
        let answer = read_one(frontend.submit(request).unwrap());
        assert_eq!(answer.text, expected);
        assert_eq!(answer.stop.as_deref(), Some("ünd"));
        assert_eq!(answer.reason, FinishReason::Stop { matched: None });
        assert_eq!(answer.usage.completion_tokens, 12);
    }
    settle(&frontend);
}

#[test]
fn stop_strings_wait_for_min_tokens() {
    let frontend = says(b"aXbXc");
    let mut request = request("x", 100);
    request.stop = vec!["X".to_string()];
    request.params.min_tokens = 3;
    assert_eq!(read_one(frontend.submit(request).unwrap()).text, "aXb");
}

#[test]
fn choices_share_the_prompt_and_differ_by_their_seed() {
    let frontend = start(NextToken::Hash, |_| {});
    let mut request = request(&"p".repeat(100), 8);
    request.n = 3;
    request.seed = Some(7);
    request.params.ignore_eos = true;
    let answers = read(frontend.submit(request.clone()).unwrap());
    assert_eq!(answers.len(), 3);
    assert_ne!(answers[0].ids, answers[1].ids);
    assert!(answers[1..].iter().all(|answer| answer.usage.cached_tokens >= 60), "{answers:?}");
    // Choice `i` is what `seed + i` gives alone.
    request.n = 1;
    request.seed = Some(8);
    let alone = read_one(frontend.submit(request).unwrap());
    assert_eq!(alone.ids, answers[1].ids);
    assert_eq!(alone.usage.cached_tokens, 96, "all but what needs a logit is cached");
    settle(&frontend);
}

#[test]
fn several_prompts_come_as_one_stream() {
    let frontend = start(NextToken::Hash, |_| {});
    let requests: Vec<_> = ["one", "two", "three"].map(|prompt| request(prompt, 5)).into();
    let generation = frontend.submit_all(requests).unwrap();
    assert_eq!(generation.prompt_tokens(), 11);
    let answers = read(generation);
    assert_eq!(
        answers.iter().map(|answer| answer.usage.prompt_tokens).collect::<Vec<_>>(),
        [3, 3, 5]
    );
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let frontend = says(b"");
    let refused = |request: GenerateRequest| match frontend.submit(request) {
        Err(SubmitError::Refused(refusal)) => refusal,
        other => panic!("{:?}", other.map(|_| ())),
    };
    assert_eq!(refused(request("", 1)), Refusal::EmptyPrompt);
    let (prompt_len, prompt_len_max) = (512, 511);
    let too_long = Refusal::PromptTooLong { prompt_len, prompt_len_max };
    assert_eq!(refused(request(&"p".repeat(512), 1)), too_long);
    let unknown = GenerateRequest::new(Prompt::Tokens(vec![1, 259]));
    let out = Refusal::TokenOutOfVocabulary { token: 259, vocab_size: 259 };
    assert_eq!(refused(unknown), out);
    let mut many = request("x", 1);
    many.n = 1_000_000_000;
    assert!(matches!(frontend.submit(many), Err(SubmitError::TooManyChoices { .. })));
    assert_eq!(read_one(frontend.submit(request(&"p".repeat(511), 1)).unwrap()).text, "");
    settle(&frontend);
}

#[test]
fn the_queue_has_a_bound_and_dropping_makes_room() {
    let slow = |options: &mut FakeOptions| options.step_time.0 = Duration::from_millis(5);
    let frontend = start(NextToken::Hash, slow);
    let long = || {
        let mut request = request("x", 500);
        request.params.ignore_eos = true;
        frontend.submit(request)
    };
    let running: Vec<_> = (0..12).map(|_| long().expect("8 run and 4 wait")).collect();
    assert!(matches!(long(), Err(SubmitError::Refused(Refusal::QueueFull { .. }))));
    drop(running);
    settle(&frontend);
    assert_eq!(frontend.stats().ended(Outcome::Abort), 12);
    assert!(long().is_ok());
}

#[test]
fn a_failing_engine_answers_everybody_and_says_so() {
    let frontend = start(NextToken::Hash, |options| {
        // Late enough for all to be submitted before.
        options.fail_at = Some(10);
        options.step_time.0 = Duration::from_millis(20);
    });
    let mut long = request("x", 100);
    long.params.ignore_eos = true;
    let generations: Vec<_> = (0..4).map(|_| frontend.submit(long.clone()).unwrap()).collect();
    for generation in generations {
        assert!(matches!(read_one(generation).reason, FinishReason::Error(_)));
    }
    frontend.join();
    assert!(!frontend.is_healthy());
    assert!(matches!(frontend.submit(request("x", 1)), Err(SubmitError::Unhealthy(_))));
    assert_eq!(frontend.in_flight(), 0);
}

/// An engine that takes its time to end, as one on a GPU does, and says when it has.
struct EndsSlowly(FakeEngine, Arc<AtomicBool>);

impl Engine for EndsSlowly {
    type InFlight = <FakeEngine as Engine>::InFlight;

    fn launch(&mut self, plan: Arc<StepPlan>) -> Result<Self::InFlight, EngineError> {
        self.0.launch(plan)
    }

    fn wait(&mut self, in_flight: Self::InFlight) -> Result<StepResult, EngineError> {
        self.0.wait(in_flight)
    }

    fn limits(&self) -> EngineLimits {
        self.0.limits()
    }
}

impl Drop for EndsSlowly {
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_millis(300));
        self.1.store(true, Relaxed);
    }
}

#[test]
fn an_engine_that_ends_slowly_is_unhealthy_at_once_and_waited_for() {
    let options = FakeOptions { limits: limits(), fail_at: Some(3), ..FakeOptions::default() };
    let ended = Arc::new(AtomicBool::new(false));
    let engine = EndsSlowly(FakeEngine::new(options), Arc::clone(&ended));
    let options = FrontendOptions { scheduler: SchedulerOptions::default() };
    let frontend = Frontend::start(engine, tiny::text_model(), options).unwrap();
    let mut long = request("x", 100);
    long.params.ignore_eos = true;
    let answer = read_one(frontend.submit(long).unwrap());
    assert!(matches!(answer.reason, FinishReason::Error(_)), "{answer:?}");
    assert!(!frontend.is_healthy(), "whoever has been told knows");
    assert!(!ended.load(Relaxed), "the engine is still ending");
    drop(frontend);
    assert!(ended.load(Relaxed), "its end is waited for");
}

#[test]
fn a_panicking_engine_answers_everybody_and_says_so() {
    let panics = NextToken::Call(Arc::new(|tokens| match tokens.len() {
        0..10 => 65,
        _ => panic!("the fourth wall"),
    }));
    let frontend = start(panics, |_| {});
    let answer = read_one(frontend.submit(request("x", 100)).unwrap());
    let FinishReason::Error(message) = answer.reason else { panic!("{answer:?}") };
    assert!(message.contains("the fourth wall"), "{message}");
    assert!(!frontend.is_healthy());
}

#[test]
fn draining_finishes_what_runs_and_refuses_what_comes() {
    let slow = |options: &mut FakeOptions| options.step_time.0 = Duration::from_millis(2);
    let frontend = start(NextToken::Hash, slow);
    let mut running = request("x", 20);
    running.params.ignore_eos = true;
    let running = frontend.submit(running).unwrap();
    frontend.drain();
    let late = frontend.submit(request("y", 20)).unwrap();
    assert_eq!(read_one(late).reason, FinishReason::Refused(Refusal::ShuttingDown));
    assert_eq!(read_one(running).reason, FinishReason::Length);
    frontend.join();
    let behind = frontend.submit(request("y", 20)).unwrap();
    assert_eq!(read_one(behind).reason, FinishReason::Refused(Refusal::ShuttingDown));
    assert!(frontend.is_healthy());
    assert_eq!(frontend.flush_cache(), None);
}

#[test]
fn a_reader_who_comes_late_gets_everything_in_one_event() {
    let frontend = says(&[b'a'; 300]);
    let mut generation = frontend.submit(request("x", 400)).unwrap();
    settle(&frontend);
    let Some(Event::Text { text, tokens, .. }) = generation.blocking_recv() else {
        panic!("text comes first")
    };
    assert_eq!((text.len(), tokens.len()), (300, 301));
    assert!(matches!(generation.blocking_recv(), Some(Event::Finished { .. })));
    assert!(generation.blocking_recv().is_none());
}

#[test]
fn prompt_logprobs_come_first() {
    let frontend = start(NextToken::Hash, |_| {});
    let mut request = request("prompt", 0);
    request.prompt_logprobs = Some(2);
    let mut generation = frontend.submit(request).unwrap();
    let Some(Event::Prompt { choice: 0, logprobs }) = generation.blocking_recv() else {
        panic!("the prompt's scores come first")
    };
    assert_eq!(logprobs.len(), 6);
    assert!(logprobs[0].is_none());
    assert!(logprobs[1..].iter().flatten().all(|score| score.top.len() == 2));
    let answer = read_one(generation);
    assert_eq!((answer.reason, answer.ids), (FinishReason::Length, Vec::new()));
}
