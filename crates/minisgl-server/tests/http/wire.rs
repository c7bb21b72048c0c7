//! Shapes and meanings of requests and answers, field by field.

use crate::harness::Setup;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(more: Value) -> String {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

#[test]
fn a_chat_is_answered_whole() {
    let server = Setup::says("Grüße 🚀").start();
    let answer = server.post(CHAT, &chat(json!({"unknown": {"field": 1}, "user": "me"})));
    assert_eq!(answer.status, 200, "{answer:?}");
    let answer = answer.json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "tiny");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &answer["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], "Grüße 🚀");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["logprobs"], Value::Null);
    // The turn mark is a token, and so is each byte: the template writes 15 more.
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 13);
    let total = usage["prompt_tokens"].as_u64().unwrap() + 13;
    assert_eq!(usage["total_tokens"], total);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    let again = server.post(CHAT, &chat(json!({}))).json();
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
}

#[test]
fn a_chat_is_streamed() {
    let server = Setup::says("Grüße 🚀").start();
    let answer = server.post(CHAT, &chat(json!({"stream": true})));
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("content-type: text/event-stream"), "{}", answer.head);
    let events = answer.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, "Grüße 🚀");
    for event in &events {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["id"], events[0]["id"]);
        assert!(event.get("usage").is_none());
        assert_eq!(event["choices"].as_array().unwrap().len(), 1);
    }
    let (last, others) = events.split_last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert!(others.iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
}

#[test]
fn usage_is_streamed_to_who_asks_for_it() {
    let server = Setup::says("abc").start();
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = server.post(CHAT, &chat(options)).events();
    let last = events.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 4);
    let options = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}});
    let events = server.post(CHAT, &chat(options)).events();
    assert!(events.iter().all(|event| event["usage"]["prompt_tokens"].as_u64().unwrap() > 0));
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 4);
}

#[test]
fn choices_are_told_apart() {
    let server = Setup::default().start();
    let body = chat(json!({"n": 3, "seed": 5, "max_tokens": 6, "ignore_eos": true}));
    let whole = server.post(CHAT, &body).json();
    let text = |index: usize| whole["choices"][index]["message"]["content"].clone();
    assert_eq!(whole["choices"].as_array().unwrap().len(), 3);
    assert_ne!(text(0), text(1));
    assert_eq!(whole["usage"]["completion_tokens"], 18);
    assert_eq!(whole["choices"][2]["finish_reason"], "length");
    let alone = chat(json!({"seed": 6, "max_tokens": 6, "ignore_eos": true}));
    let alone = server.post(CHAT, &alone).json();
    assert_eq!(alone["choices"][0]["message"]["content"], text(1));
    assert_eq!(alone["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
}

#[test]
fn stop_strings_end_an_answer_across_tokens() {
    let server = Setup::says("one ünd two").start();
    for stop in [json!("ünd"), json!(["zzz", "ünd"])] {
        let answer = server.post(CHAT, &chat(json!({"stop": stop}))).json();
        assert_eq!(answer["choices"][0]["message"]["content"], "one ");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert_eq!(answer["choices"][0]["stop_reason"], "ünd");
    }
    let ids = json!({"stop_token_ids": [u32::from(b't')]});
    let answer = server.post(CHAT, &chat(ids)).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "one ünd ");
    assert_eq!(answer["choices"][0]["stop_reason"], u32::from(b't'));
    let kept = json!({"stop": "ünd", "include_stop_str_in_output": true});
    let answer = server.post(CHAT, &chat(kept)).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "one ünd");
    server.settle();
}

#[test]
fn chat_logprobs_come_a_token_each() {
    let server = Setup::says("hé").start();
    let asked = json!({"logprobs": true, "top_logprobs": 2});
    let answer = server.post(CHAT, &chat(asked.clone())).json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 4, "three bytes and the end");
    assert_eq!(content[0]["token"], "h");
    assert_eq!(content[1]["bytes"], json!([0xc3]));
    assert!(content[0]["logprob"].as_f64().unwrap() < 0.0);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let mut streamed = asked;
    streamed["stream"] = json!(true);
    let events = server.post(CHAT, &chat(streamed)).events();
    let tokens: usize = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(tokens, 4);
}

#[test]
fn messages_come_in_every_form() {
    let server = Setup::says("ok").start();
    let messages = json!([
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": "<|turn|> is text here"},
    ]);
    let answer = server.post(CHAT, &chat(json!({"messages": messages})));
    assert_eq!(answer.status, 200, "{answer:?}");
    let prefill = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]);
    let body = json!({"messages": prefill, "continue_final_message": true});
    let answer = server.post(CHAT, &chat(body));
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[test]
fn text_is_completed_from_every_form_of_prompt() {
    let server = Setup::says("!").start();
    let forms = [
        (json!("hi"), 1),
        (json!(["hi", "ho"]), 2),
        (json!([104, 105]), 1),
        (json!([[104, 105], [104, 111]]), 2),
    ];
    for (prompt, count) in forms {
        let answer = server.post(TEXT, &json!({"prompt": prompt, "n": 2}).to_string()).json();
        assert_eq!(answer["object"], "text_completion");
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * count);
        assert!(choices.iter().all(|choice| choice["text"] == "!"));
        assert_eq!(answer["usage"]["prompt_tokens"], 2 * count);
    }
    let body = json!({"prompt": ["a", "b"], "stream": true, "echo": true});
    let events = server.post(TEXT, &body.to_string()).events();
    let text = |index: usize| -> String {
        let choices = events.iter().map(|event| &event["choices"][0]);
        let mine = choices.filter(|choice| choice["index"] == index);
        mine.filter_map(|choice| choice["text"].as_str()).collect()
    };
    assert_eq!((text(0), text(1)), ("a!".to_string(), "b!".to_string()));
}

#[test]
fn likelihoods_come_as_lm_eval_reads_them() {
    let server = Setup::says("!").start();
    for max_tokens in [0, 1] {
        let body = json!({"prompt": [[104, 105, 33]], "max_tokens": max_tokens, "logprobs": 1,
                          "echo": true, "temperature": 0});
        let answer = server.post(TEXT, &body.to_string()).json();
        let choice = &answer["choices"][0];
        let logprobs = &choice["logprobs"];
        let length = 3 + max_tokens;
        assert_eq!(logprobs["tokens"].as_array().unwrap().len(), length);
        assert_eq!(logprobs["token_logprobs"][0], Value::Null);
        assert_eq!(logprobs["top_logprobs"][0], Value::Null);
        assert!(logprobs["token_logprobs"][2].as_f64().unwrap() < 0.0);
        assert!(logprobs["top_logprobs"][2]["!"].is_number());
        assert_eq!(logprobs["text_offset"][2], 2);
        assert!(choice["text"].as_str().unwrap().starts_with("hi!"));
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
    }
}

#[test]
fn the_native_form_repeats_all_text_in_each_event() {
    let server = Setup::says("abc").start();
    let params = json!({"max_new_tokens": 10, "temperature": 0});
    let body = json!({"text": "hi", "sampling_params": params});
    let answer = server.post("/generate", &body.to_string()).json();
    assert_eq!(answer["text"], "abc");
    assert_eq!(answer["meta_info"]["completion_tokens"], 4);
    assert_eq!(answer["meta_info"]["finish_reason"], json!({"type": "stop", "matched": 257}));
    let body = json!({"input_ids": [104, 105], "sampling_params": params, "stream": true,
                      "return_logprob": true, "logprob_start_len": 0, "rid": "mine"});
    let events = server.post("/generate", &body.to_string()).events();
    let last = events.last().unwrap();
    assert_eq!(last["text"], "abc");
    assert_eq!(last["meta_info"]["id"], "mine");
    assert_eq!(last["meta_info"]["output_token_logprobs"].as_array().unwrap().len(), 4);
    assert_eq!(last["meta_info"]["input_token_logprobs"].as_array().unwrap().len(), 2);
    let lengths = events.iter().map(|event| event["text"].as_str().unwrap().len());
    assert!(lengths.collect::<Vec<_>>().is_sorted());
    let body = json!({"text": ["hi"], "sampling_params": params});
    let answer = server.post("/generate", &body.to_string()).json();
    assert_eq!(answer[0]["text"], "abc");
}

#[test]
fn the_server_tells_about_itself() {
    let server = Setup::says("a").start();
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["max_model_len"], 1024);
    assert_eq!(server.get("/v1/models/tiny").status, 200);
    assert_eq!(server.get("/v1/models/org/other").status, 404);
    for path in ["/health", "/health_generate", "/docs"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    for path in ["/server_info", "/get_server_info", "/model_info", "/get_model_info"] {
        assert_eq!(server.get(path).json()["served_model_name"], "tiny", "{path}");
    }
    assert_eq!(server.get("/get_load").json()[0]["num_reqs"], 0);
    assert_eq!(server.get("/v1/loads").json()["loads"][0]["max_total_num_tokens"], 2048);
    assert!(server.get("/version").json()["version"].is_string());
    assert_eq!(server.post("/flush_cache", "").json()["success"], true);
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get(CHAT).status, 405);
}

#[test]
fn text_goes_to_tokens_and_back() {
    let server = Setup::says("a").start();
    let answer = server.post("/tokenize", r#"{"prompt": "hé", "return_token_strs": true}"#).json();
    assert_eq!(answer["tokens"], json!([104, 195, 169]));
    assert_eq!(answer["count"], 3);
    assert_eq!(answer["token_strs"][0], "h");
    let messages = json!({"messages": [{"role": "user", "content": "hi"}]}).to_string();
    assert_eq!(server.post("/tokenize", &messages).json()["tokens"][0], 256);
    let answer = server.post("/detokenize", r#"{"tokens": [104, 195, 169]}"#).json();
    assert_eq!(answer["prompt"], "hé");
}

#[test]
fn metrics_carry_every_name_that_gateways_read() {
    let mut setup = Setup::says("abc");
    // With it, a step more is launched than has tokens.
    setup.scheduler.overlap = false;
    let server = setup.start();
    server.post(CHAT, &chat(json!({})));
    server.settle();
    let metrics = server.get("/metrics");
    assert!(metrics.head.contains("text/plain; version=0.0.4"));
    // Four tokens are four steps: the first has the prompt, and each has one request.
    for line in [
        "vllm:num_requests_waiting 0",
        "vllm:num_requests_running 0",
        "vllm:kv_cache_usage_perc 0",
        "sglang:num_queue_reqs 0",
        "sglang:num_running_reqs 0",
        "sglang:token_usage 0",
        "sglang:cache_hit_rate 0",
        "minisgl_requests_running 0",
        "minisgl_requests_waiting 0",
        "minisgl_kv_usage_ratio 0",
        "minisgl_cache_hit_ratio 0",
        "minisgl_preemptions_total 0",
        "minisgl_healthy 1",
        "minisgl_requests_total{outcome=\"stop\"} 1",
        "minisgl_requests_total{outcome=\"abort\"} 0",
        "minisgl_generation_tokens_total 4",
        "minisgl_time_to_first_token_seconds_count 1",
        "minisgl_inter_token_latency_seconds_bucket{le=\"+Inf\"} 3",
        "minisgl_request_duration_seconds_count 1",
        "minisgl_steps_total 4",
        "minisgl_step_duration_seconds_count 4",
        "minisgl_batch_requests_bucket{le=\"1\"} 4",
        "minisgl_batch_requests_sum 4",
        "minisgl_batch_tokens_bucket{le=\"1\"} 3",
        "minisgl_batch_tokens_count 4",
        "vllm:iteration_tokens_total_count 4",
    ] {
        let has = metrics.body.lines().any(|is| is == line);
        assert!(has, "{line} is not in\n{}", metrics.body);
    }
    let prompt = server.frontend.stats().prompt_tokens.load(Relaxed);
    for line in ["minisgl_prompt_tokens_total", "vllm:prompt_tokens_total"] {
        assert!(prompt > 1 && metrics.body.contains(&format!("\n{line} {prompt}\n")));
    }
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let dashboard = include_str!("../../../../dashboards/minisgl.json");
    let page = Setup::default().start().get("/metrics").body;
    let is_name = |letter: char| letter.is_ascii_lowercase() || letter == '_';
    let mut shown = 0;
    for (at, _) in dashboard.match_indices("minisgl_") {
        let name = dashboard[at..].split(|letter| !is_name(letter)).next().unwrap();
        let has = |line: &str| line.split(['{', ' ']).next() == Some(name);
        assert!(page.lines().any(has), "{name} is not in\n{page}");
        shown += 1;
    }
    assert!(shown > 20, "{shown}");
}

#[test]
fn the_document_names_every_field_and_refers_to_types_that_it_has() {
    let server = Setup::says("a").start();
    let document = server.get("/openapi.json").json();
    assert_eq!(document["openapi"], "3.1.0");
    let schemas = document["components"]["schemas"].as_object().unwrap();
    assert!(schemas["Common"]["properties"]["top_k"].is_object());
    assert!(schemas["ChatFields"]["properties"]["messages"].is_object());
    let mut references = Vec::new();
    collect_references(&document, &mut references);
    assert!(references.len() > 20);
    for reference in references {
        let name = reference.strip_prefix("#/components/schemas/").expect("a local reference");
        assert!(schemas.contains_key(name), "{name}");
    }
}

#[test]
fn the_document_has_every_endpoint_and_says_what_streams_are_made_of() {
    let server = Setup::says("a").start();
    let document = server.get("/openapi.json").json();
    let paths = document["paths"].as_object().unwrap();
    let asks = ["/v1/chat/completions", "/v1/completions", "/generate"];
    let posts = ["/tokenize", "/detokenize", "/flush_cache"];
    for path in asks.into_iter().chain(posts) {
        let operation = &paths[path]["post"];
        assert!(operation["responses"]["400"].is_object(), "{path}: {operation}");
        let content = operation["responses"]["200"]["content"].as_object().unwrap();
        assert_eq!(content.contains_key("text/event-stream"), asks.contains(&path), "{path}");
        assert_ne!(server.post(path, "{}").status, 404, "{path}");
    }
    for path in [
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/health_generate",
        "/metrics",
        "/server_info",
        "/get_server_info",
        "/model_info",
        "/get_model_info",
        "/get_load",
        "/v1/loads",
        "/flush_cache",
        "/version",
    ] {
        assert!(paths[path]["get"]["responses"]["200"].is_object(), "{path}");
        assert_eq!(server.get(&path.replace("{name}", "tiny")).status, 200, "{path}");
    }
}

fn collect_references(value: &Value, references: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            references.extend(object.get("$ref").and_then(Value::as_str).map(str::to_string));
            object.values().for_each(|value| collect_references(value, references));
        }
        Value::Array(array) => array.iter().for_each(|value| collect_references(value, references)),
        _ => {}
    }
}
