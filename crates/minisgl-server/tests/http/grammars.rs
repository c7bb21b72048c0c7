//! Answers that are bound to a form: the engine likes other tokens, and the masks forbid them.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Server, Setup};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const NATIVE: &str = "/generate";

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"$ref": "#/$defs/small"}},
        "required": ["ok", "n"],
        "additionalProperties": false,
        "$defs": {"small": {"enum": [1, 2]}},
    })
}

fn response_format() -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema()}})
}

fn chat(server: &Server, field: &str, form: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100});
    body[field] = form;
    let answer = server.post(CHAT, &body.to_string());
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["choices"][0].clone()
}

fn content(choice: &Value) -> &str {
    choice["message"]["content"].as_str().unwrap()
}

#[test]
fn every_form_binds_the_answer() {
    for overlap in [true, false] {
        let mut setup = Setup::says("Sure!");
        setup.scheduler.overlap = overlap;
        let server = setup.start();
        let choice = chat(&server, "response_format", response_format());
        let answer: Value = serde_json::from_str(content(&choice)).unwrap();
        assert!(answer["ok"].is_boolean() && [1, 2].map(Value::from).contains(&answer["n"]));
        assert_eq!(answer.as_object().unwrap().len(), 2);
        assert_eq!(choice["finish_reason"], "stop");
        let choice = chat(&server, "response_format", json!({"type": "json_object"}));
        assert!(content(&choice).starts_with('{'), "{choice}");
        let choice = chat(&server, "regex", json!("(yes|no)[.]"));
        assert!(["yes.", "no."].contains(&content(&choice)), "{choice}");
        let choice = chat(&server, "grammar", json!("start: \"left \" STEPS\nSTEPS: /[1-3]/"));
        assert!(content(&choice).starts_with("left ") && content(&choice).len() == 6, "{choice}");
        // Nothing is left behind for those who ask for no form.
        assert_eq!(content(&chat(&server, "regex", Value::Null)), "Sure!");
        server.settle();
    }
}

#[test]
fn text_and_native_forms_bind_too() {
    let server = Setup::says("Sure!").start();
    let body = json!({"prompt": "hi", "max_tokens": 100, "response_format": response_format()});
    let text = server.post(TEXT, &body.to_string()).json()["choices"][0]["text"].clone();
    let bound: Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
    assert!(bound["ok"].is_boolean());
    for params in [
        json!({"regex": "a{3}"}),
        json!({"json_schema": r#"{"const": "aaa"}"#}),
        json!({"grammar": "start: \"aaa\""}),
    ] {
        let body = json!({"text": "hi", "sampling_params": params});
        let answer = server.post(NATIVE, &body.to_string()).json();
        assert!(["aaa", "\"aaa\""].contains(&answer["text"].as_str().unwrap()), "{answer}");
    }
}

#[test]
fn the_end_of_a_form_ends_what_asks_for_more_tokens() {
    let server = Setup::says("Sure!").start();
    let body = json!({"prompt": "hi", "max_tokens": 100, "min_tokens": 50, "regex": "yes"});
    let choice = server.post(TEXT, &body.to_string()).json()["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("yes"), &json!("stop")));
    // Where the form may go on, it does.
    let body = json!({"prompt": "hi", "max_tokens": 100, "min_tokens": 50, "regex": "(Sure!)+"});
    let choice = server.post(TEXT, &body.to_string()).json()["choices"][0].clone();
    assert_eq!(choice["text"], "Sure!".repeat(10), "{choice}");
    server.settle();
}

#[test]
fn forms_in_other_notations_are_refused_and_not_ignored() {
    let server = Setup::says("ok").start();
    for name in ["ebnf", "structural_tag", "structured_outputs", "guided_json", "guided_choice"] {
        let mut body = json!({"prompt": "hi", "max_tokens": 2});
        body[name] = json!("root ::= \"a\"");
        let answer = server.post(TEXT, &body.to_string());
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(name)));
        body[name] = Value::Null;
        assert_eq!(server.post(TEXT, &body.to_string()).status, 200, "{name}: null");
    }
    let body = json!({"text": "hi", "sampling_params": {"ebnf": "root ::= \"a\""}});
    let answer = server.post(NATIVE, &body.to_string());
    assert_eq!(answer.status, 400, "{answer:?}");
    let error = answer.json()["error"].clone();
    assert_eq!(error["param"], "sampling_params.ebnf");
    assert!(error["message"].as_str().unwrap().contains("Lark"), "{error}");
}

#[test]
fn bound_and_free_answers_share_steps() {
    let mut setup = Setup::says("Sure!");
    setup.engine.step_time.0 = Duration::from_millis(1);
    let server = setup.start();
    thread::scope(|scope| {
        let bound = |_| scope.spawn(|| chat(&server, "response_format", response_format()));
        let free = |_| scope.spawn(|| chat(&server, "n", json!(2)));
        let bound: Vec<_> = (0..4).map(bound).collect();
        let free: Vec<_> = (0..2).map(free).collect();
        for thread in bound {
            let choice = thread.join().unwrap();
            assert!(serde_json::from_str::<Value>(content(&choice)).is_ok(), "{choice}");
        }
        for thread in free {
            assert_eq!(content(&thread.join().unwrap()), "Sure!");
        }
    });
    server.settle();
}

#[test]
fn every_choice_has_a_state_of_its_own() {
    let server = Setup::default().start();
    let body = json!({"prompt": "hi", "max_tokens": 50, "n": 3, "regex": "[a-z]{4}[0-9]{2}"});
    let answer = server.post(TEXT, &body.to_string()).json();
    for choice in answer["choices"].as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        let (letters, digits) = text.split_at(4);
        assert!(letters.bytes().all(|byte| byte.is_ascii_lowercase()), "{text}");
        assert!(digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
    }
}

#[test]
fn forms_that_cannot_be_used_are_refused_in_time() {
    let server = Setup::says("ok").start();
    let format = |schema: Value| json!({"type": "json_schema", "json_schema": {"schema": schema}});
    let many: Vec<Value> = (0..100_000).map(Value::from).collect();
    let rows = [
        ("response_format", json!({"type": "json_schema"})),
        ("response_format", format(json!({"type": "nonsense"}))),
        ("response_format", format(json!({"$ref": "#/$defs/missing"}))),
        ("response_format", format(json!({"enum": many}))),
        ("response_format", format(json!(7))),
        // Cheap to write, and without a bound dear to prepare.
        ("response_format", format(json!({"type": "integer", "multipleOf": 99_999_999}))),
        // Nothing satisfies these.
        ("response_format", format(json!({"$ref": "#"}))),
        (
            "response_format",
            format(json!({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}},
                                          "$ref": "#/$defs/a"})),
        ),
        ("regex", json!("[^\\s\\S]")),
        ("regex", json!("(")),
        ("regex", json!("a".repeat(100_000))),
        ("grammar", json!("")),
        ("grammar", json!("start: missing")),
    ];
    for (field, form) in rows {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body[field] = form;
        let shown: String = body.to_string().chars().take(120).collect();
        let sent_at = Instant::now();
        let answer = server.post(CHAT, &body.to_string());
        assert_eq!(answer.status, 400, "{shown}: {answer:?}");
        let error = &answer.json()["error"];
        assert_eq!(error["param"], field, "{shown}");
        assert!(error["message"].as_str().unwrap().len() < 400, "{shown}: {error}");
        assert!(sent_at.elapsed() < Duration::from_secs(5), "{shown}: {:?}", sent_at.elapsed());
    }
    let body = json!({"prompt": "hi", "regex": "a", "grammar": "start: \"a\""});
    let answer = server.post(TEXT, &body.to_string());
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("grammar")));
    let body = json!({"text": "hi", "sampling_params": {"json_schema": "{"}});
    let answer = server.post(NATIVE, &body.to_string());
    assert_eq!(answer.json()["error"]["param"], "sampling_params.json_schema");
    // References that follow one another for long take a deep stack, and nobody down with them.
    let linked: serde_json::Map<String, Value> = (0..1000)
        .map(|index| {
            let next = json!({"$ref": format!("#/$defs/{}", (index + 1) % 1000)});
            (index.to_string(), json!({"anyOf": [next, {"type": "null"}]}))
        })
        .collect();
    let form = format(json!({"$defs": linked, "$ref": "#/$defs/0"}));
    let body = json!({"prompt": "hi", "response_format": form});
    let answer = server.post(TEXT, &body.to_string());
    assert!([200, 400].contains(&answer.status), "{answer:?}");
    // Large when written out, and yet cheap.
    let sent_at = Instant::now();
    chat(&server, "regex", json!("((a{1000}){1000}){1000}"));
    assert!(sent_at.elapsed() < Duration::from_secs(5), "{:?}", sent_at.elapsed());
    assert_eq!(content(&chat(&server, "regex", Value::Null)), "ok");
}
