//! Thoughts and calls, told apart from what is said: whole and in streams.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Server, Setup};
use crate::tiny;

const CHAT: &str = "/v1/chat/completions";

/// What a template of each family contains, beside the turns.
const HERMES: &str = "{% if tools %}Call within <tool_call></tool_call>.{% endif %}";
const LLAMA: &str = "{% if tools %}<|python_tag|>{% endif %}";
const MISTRAL: &str = "{% if tools %}{{ '[TOOL_CALLS]' }} before calls.{% endif %}";
const MISTRAL_ARGS: &str = "{% if tools %}{{ '[TOOL_CALLS]name[ARGS]' }} before calls.{% endif %}";
const THINKS: &str = "{% if opened is defined %}<think>\n{% endif %}{# <think> #}";

/// The id of `[TOOL_CALLS]`, which is a special token.
const TOOL_CALLS: u32 = 258;

fn setup(template: &str, answer: &[u32]) -> Setup {
    let mut setup = Setup::says_tokens(answer.to_vec());
    setup.text = tiny::with_template(&format!("{{{{ messages[0].content }}}}\n{template}"));
    setup
}

fn server(template: &str, answer: &[u32]) -> Server {
    setup(template, answer).start()
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn request(more: Value) -> Value {
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": {}}});
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": [tool]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// A message and its `finish_reason`, from a whole answer and from a stream; both must agree.
fn ask(server: &Server, more: Value) -> (Value, Value) {
    let mut body = request(more);
    let whole = server.post(CHAT, &body.to_string()).json();
    let choice = &whole["choices"][0];
    body["stream"] = json!(true);
    let events = server.post(CHAT, &body.to_string()).events();
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for delta in events.iter().map(|event| &event["choices"][0]["delta"]) {
        content += delta["content"].as_str().unwrap_or_default();
        reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            gather(&mut calls, call);
        }
    }
    let message = &choice["message"];
    assert_eq!(message["content"].as_str().unwrap_or_default(), content);
    assert_eq!(message["reasoning_content"].as_str().unwrap_or_default(), reasoning);
    assert_eq!(as_written(&message["tool_calls"]), as_written(&Value::from(calls)));
    let last = events.last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], choice["finish_reason"]);
    server.settle();
    (message.clone(), choice["finish_reason"].clone())
}

/// Adds a streamed piece of a call as clients do.
fn gather(calls: &mut Vec<Value>, piece: &Value) {
    let index = piece["index"].as_u64().unwrap() as usize;
    if index == calls.len() {
        assert!(piece["id"].is_string() && piece["function"]["name"].is_string(), "{piece}");
        assert_eq!(
            (&piece["type"], &piece["function"]["arguments"]),
            (&json!("function"), &json!(""))
        );
        let mut call = piece.clone();
        call.as_object_mut().unwrap().remove("index");
        return calls.push(call);
    }
    assert!(piece.get("id").is_none() && piece["function"].get("name").is_none(), "{piece}");
    assert_ne!(piece["function"]["arguments"], "");
    let begun = calls[index]["function"]["arguments"].as_str().unwrap();
    let arguments = begun.to_string() + piece["function"]["arguments"].as_str().unwrap();
    calls[index]["function"]["arguments"] = Value::from(arguments);
}

/// Names and arguments, byte for byte. Ids are drawn anew for every answer.
fn as_written(calls: &Value) -> Vec<(String, String)> {
    let calls = calls.as_array().map(Vec::as_slice).unwrap_or_default();
    let parts = |call: &Value| {
        assert!(!call["id"].as_str().unwrap().is_empty());
        assert_eq!(call["type"], "function");
        let part = |name: &str| call["function"][name].as_str().unwrap().to_string();
        (part("name"), part("arguments"))
    };
    calls.iter().map(parts).collect()
}

/// Names, and arguments as a client reads them.
fn without_ids(calls: &Value) -> Vec<(String, Value)> {
    let read =
        |(name, arguments): (String, String)| (name, serde_json::from_str(&arguments).unwrap());
    as_written(calls).into_iter().map(read).collect()
}

fn call(name: &str, arguments: Value) -> (String, Value) {
    (name.to_string(), arguments)
}

#[test]
fn hermes_calls_follow_what_is_said() {
    let text = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \
                \"Köln\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"weather\", \"arguments\": \
                {}}\n</tool_call>";
    let server = server(HERMES, &bytes(text));
    let (message, reason) = ask(&server, json!({}));
    assert_eq!(reason, "tool_calls");
    assert_eq!(message["content"], "Let me see.\n");
    let expected = [call("weather", json!({"city": "Köln"})), call("weather", json!({}))];
    assert_eq!(without_ids(&message["tool_calls"]), expected);
    let ids = [0, 1].map(|index| message["tool_calls"][index]["id"].as_str().unwrap());
    assert!(ids[0].starts_with("call_") && ids[0] != ids[1], "{ids:?}");

    // Without tools, or where none may be called, the same text is content.
    for more in [json!({"tools": null}), json!({"tools": []}), json!({"tool_choice": "none"})] {
        let (message, reason) = ask(&server, more);
        assert_eq!(reason, "stop");
        assert_eq!(message["content"], text);
        assert!(message.get("tool_calls").is_none());
    }
    // Cut before its arguments begin, it is no call; cut behind that, it is one as far as it goes.
    let begin = text.find("{\"city").unwrap();
    let (message, reason) = ask(&server, json!({"max_tokens": begin}));
    assert_eq!(reason, "length");
    assert_eq!(message["content"], text[..begin]);
    for len in [begin + 1, begin + 9] {
        let (message, reason) = ask(&server, json!({"max_tokens": len}));
        assert_eq!(reason, "length");
        assert_eq!(message["content"], "Let me see.\n");
        let arguments = text[begin..len].to_string();
        assert_eq!(as_written(&message["tool_calls"]), [("weather".to_string(), arguments)]);
    }
}

#[test]
fn arguments_are_streamed_while_they_are_generated() {
    let arguments = r#"{"city": "Rome", "days": [1, 2]}"#;
    let object = |key: &str| format!(r#"{{"name": "weather", "{key}": {arguments}}}"#);
    let open = || vec![TOOL_CALLS];
    let texts = [
        (HERMES, bytes(&format!("<tool_call>{}</tool_call>", object("arguments")))),
        (LLAMA, bytes(&object("parameters"))),
        (MISTRAL, [open(), bytes(&format!("[{}]", object("arguments")))].concat()),
        (MISTRAL_ARGS, [open(), bytes(&format!("weather[ARGS]{arguments}"))].concat()),
    ];
    for (template, answer) in texts {
        let mut setup = setup(template, &answer);
        setup.engine.step_time.0 = Duration::from_millis(2);
        let server = setup.start();
        let (message, reason) = ask(&server, json!({}));
        assert_eq!(reason, "tool_calls");
        let expected = [("weather".to_string(), arguments.to_string())];
        assert_eq!(as_written(&message["tool_calls"]), expected);
        let body = request(json!({"stream": true})).to_string();
        let events = server.post(CHAT, &body).events();
        let pieces =
            events.iter().filter(|event| !event["choices"][0]["delta"]["tool_calls"].is_null());
        // A token each, but for those that a slow reader finds together.
        assert!(pieces.count() > arguments.len() / 2, "{events:?}");
    }
}

#[test]
fn llama_calls_are_the_whole_answer() {
    let text = r#"{"name": "weather", "parameters": {"city": "Rome"}}"#;
    let server = server(LLAMA, &bytes(text));
    let (message, reason) = ask(&server, json!({"tool_choice": "auto"}));
    assert_eq!(reason, "tool_calls");
    assert_eq!(message["content"], Value::Null);
    let expected = [call("weather", json!({"city": "Rome"}))];
    assert_eq!(without_ids(&message["tool_calls"]), expected);
}

#[test]
fn mistral_calls_begin_with_a_special_token() {
    let mut answer = vec![TOOL_CALLS];
    answer.extend(bytes(r#"[{"name": "weather", "arguments": {"city": "Oslo"}}]"#));
    let server = server(MISTRAL, &answer);
    let (message, reason) = ask(&server, json!({}));
    assert_eq!(reason, "tool_calls");
    let expected = [call("weather", json!({"city": "Oslo"}))];
    assert_eq!(without_ids(&message["tool_calls"]), expected);
    let id = message["tool_calls"][0]["id"].as_str().unwrap();
    assert!(id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{id}");
}

#[test]
fn newer_mistral_calls_have_their_arguments_behind_the_name() {
    let mut answer = vec![TOOL_CALLS];
    answer.extend(bytes("weather[ARGS]{\"city\": \"Oslo\"}"));
    answer.push(TOOL_CALLS);
    answer.extend(bytes("season[ARGS]{}"));
    let server = server(MISTRAL_ARGS, &answer);
    let (message, reason) = ask(&server, json!({}));
    assert_eq!(reason, "tool_calls");
    let expected = [call("weather", json!({"city": "Oslo"})), call("season", json!({}))];
    assert_eq!(without_ids(&message["tool_calls"]), expected);
    assert_eq!(message["tool_calls"][0]["id"].as_str().unwrap().len(), 9);
}

#[test]
fn a_call_can_be_required_of_every_family() {
    let parameters = json!({
        "type": "object",
        "properties": {"hot": {"$ref": "#/$defs/truth"}},
        "required": ["hot"],
        "additionalProperties": false,
        "$defs": {"truth": {"type": "boolean"}},
    });
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let tools = json!([tool("weather"), tool("season")]);
    let named = json!({"type": "function", "function": {"name": "season"}});
    for template in [HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, THINKS, ""] {
        let server = server(template, &bytes("I would rather talk."));
        for (choice, names) in
            [(json!("required"), ["weather", "season"]), (named.clone(), ["season"; 2])]
        {
            let more = json!({"tools": tools, "tool_choice": choice, "max_tokens": 200});
            let (message, reason) = ask(&server, more);
            assert_eq!(reason, "tool_calls", "{template}: {message}");
            let calls = without_ids(&message["tool_calls"]);
            assert!(calls.len() == 1 && names.contains(&calls[0].0.as_str()), "{calls:?}");
            assert!(calls[0].1["hot"].is_boolean(), "{calls:?}");
        }
        let choices = [
            json!({"tools": [], "tool_choice": "required"}),
            json!({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}),
            json!({"tool_choice": "required", "regex": "a"}),
        ];
        for more in choices {
            let answer = server.post(CHAT, &request(more).to_string());
            assert_eq!(answer.status, 400, "{answer:?}");
            assert_eq!(answer.json()["error"]["param"], "tool_choice");
        }
    }
}

#[test]
fn thoughts_are_told_apart() {
    let thinks = server(THINKS, &bytes("<think>\nHm, 1 < 2.\n</think>\n\nYes."));
    let (message, reason) = ask(&thinks, json!({}));
    assert_eq!(message["reasoning_content"], "Hm, 1 < 2.");
    assert_eq!(message["content"], "Yes.");
    assert_eq!(reason, "stop");

    // Where the template has opened the thinking, the answer begins inside.
    let inside = server(THINKS, &bytes("Hm.\n</think>\n\nYes."));
    let (message, _) = ask(&inside, json!({"chat_template_kwargs": {"opened": true}}));
    assert_eq!(message["reasoning_content"], "Hm.");
    assert_eq!(message["content"], "Yes.");

    // A model whose template knows no thoughts has none.
    let plain = server("", &bytes("<think>a</think>b"));
    let (message, _) = ask(&plain, json!({}));
    assert_eq!(message["content"], "<think>a</think>b");
}

#[test]
fn calls_follow_thoughts() {
    let text = "<think>call <tool_call>?</think>\n<tool_call>\n{\"name\": \"weather\", \
                \"arguments\": {}}\n</tool_call>";
    let server = server(&format!("{HERMES}{THINKS}"), &bytes(text));
    let (message, reason) = ask(&server, json!({}));
    assert_eq!(reason, "tool_calls");
    assert_eq!(message["reasoning_content"], "call <tool_call>?");
    assert_eq!(without_ids(&message["tool_calls"]), [call("weather", json!({}))]);
}

#[test]
fn log_probabilities_lose_no_token_to_what_is_held_back() {
    let text = "<tool_call>{\"name\": \"weather\", \"arguments\": {}}</tool_call>";
    let server = server(HERMES, &bytes(text));
    let body = request(json!({"stream": true, "logprobs": true}));
    let events = server.post(CHAT, &body.to_string()).events();
    let tokens = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len);
    assert_eq!(tokens.sum::<usize>(), text.len() + 1);
}
