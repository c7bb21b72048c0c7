//! Gemma 3 270M (Q4_K_M) against what the Hugging Face implementation makes of the same weights,
//! as `scripts/make_gemma3_reference.py` stored it; that script says where the file comes from.
//!
//! The environment variable MINISGL_GEMMA3 names the file; without it, the test says so and passes.

use minisgl::llm::{GenerateParams, Llm, Prompt};
use minisgl::options::{Device, Dtype, RuntimeOptions};
use minisgl_scheduler::sampling::SamplingParams;
use serde::Deserialize;

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    tokens: Vec<u32>,
}

#[test]
fn prompts_are_encoded_and_continued_as_the_reference_does() {
    let Ok(model) = std::env::var("MINISGL_GEMMA3") else {
        eprintln!("skipped: MINISGL_GEMMA3 names no gemma-3-270m-q4_k_m.gguf");
        return;
    };
    let stored = include_str!("data/gemma3_reference.json");
    let Reference { cases } = serde_json::from_str(stored).unwrap();
    let llm = Llm::builder().options(RuntimeOptions {
        model: Some(model),
        device: Device::Cpu,
        dtype: Dtype::Float32,
        max_seq_len_override: Some(512),
        ..RuntimeOptions::default()
    });
    let llm = llm.build().unwrap();
    let sampling = SamplingParams {
        temperature: 0.0,
        ignore_eos: true,
        max_tokens: cases[0].tokens.len() as u32,
        ..SamplingParams::default()
    };
    let params = GenerateParams { sampling, ..GenerateParams::default() };
    let prompts = cases.iter().map(|case| Prompt::Text(case.prompt.clone()));
    let done = llm.generate(prompts, &params).unwrap();
    assert!(cases.len() >= 20);
    for (case, done) in cases.iter().zip(done) {
        let prompt = minisgl_frontend::Prompt::Text(case.prompt.clone());
        assert_eq!(llm.frontend().encode(&prompt).unwrap(), case.prompt_ids, "{}", case.prompt);
        assert_eq!(done.token_ids, case.tokens, "{}", case.prompt);
    }
}
