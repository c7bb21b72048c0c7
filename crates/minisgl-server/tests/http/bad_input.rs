//! What no client should send. Every row gets a 4xx that names the field, or a correct 200, and
//! the next request is served.

use std::io::{BufReader, Write};
use std::time::{Duration, Instant};

use crate::harness::{Answer, Server, Setup, http_post};
use crate::tiny;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const NATIVE: &str = "/generate";

/// `(path, body, status, param)`; `param` is what the error must name, if anything.
type Row = (&'static str, String, u16, &'static str);

fn chat(fields: &str) -> String {
    format!(r#"{{"messages": [{{"role": "user", "content": "hi"}}], "max_tokens": 2, {fields}}}"#)
}

fn text(fields: &str) -> String {
    format!(r#"{{"prompt": "hi", {fields}}}"#)
}

fn check(server: &Server, rows: Vec<Row>) {
    for (path, body, status, param) in rows {
        let shown: String = body.chars().take(120).collect();
        let answer = server.post(path, &body);
        assert_eq!(answer.status, status, "{path} {shown}: {answer:?}");
        if status != 200 {
            let error = &answer.json()["error"];
            let message = error["message"].as_str().unwrap();
            assert!(!message.is_empty() && error["type"].is_string(), "{shown}: {error}");
            if !param.is_empty() {
                assert!(message.contains(param), "{shown}: {error}");
                let named = error["param"].as_str().unwrap_or_default();
                assert!(named.contains(param), "{shown}: {error}");
            }
        }
        serves(server);
    }
    server.settle();
}

fn serves(server: &Server) {
    let answer = server.post(TEXT, &text(r#""max_tokens": 2"#));
    assert_eq!(answer.status, 200, "the next request: {answer:?}");
}

#[test]
fn malformed_json() {
    let server = Setup::says("ok").start();
    let deep = |open: &str, close: &str| open.repeat(10_000) + &close.repeat(10_000);
    check(
        &server,
        vec![
            (CHAT, String::new(), 400, ""),
            (CHAT, "{".to_string(), 400, ""),
            (CHAT, r#"{"messages": [{"role": "user", "con"#.to_string(), 400, ""),
            (CHAT, "[]".to_string(), 400, ""),
            (CHAT, "null".to_string(), 400, ""),
            (CHAT, r#""text""#.to_string(), 400, ""),
            (CHAT, chat(r#""n": 1} trailing"#), 400, ""),
            (CHAT, deep("[", "]"), 400, ""),
            (CHAT, chat(&format!(r#""unknown": {}"#, deep("[", "]"))), 200, ""),
            (CHAT, chat(&format!(r#""tools": [{}]"#, deep(r#"{"a":"#, "}"))), 400, ""),
            (TEXT, text(&format!(r#""prompt": {}"#, deep("[", "]"))), 400, ""),
            (CHAT, chat(r#""temperature": NaN"#), 400, ""),
            (CHAT, chat(r#""temperature": 1e400"#), 400, "temperature"),
            (CHAT, chat(r#""temperature": 1, "temperature": 1"#), 400, "temperature"),
            (TEXT, r#"{"prompt": "\ud800"}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": "a\u0000b"}"#.to_string(), 200, ""),
            (CHAT, r#"{"messages": [{"role": "user", "content": "\udfff"}]}"#.to_string(), 400, ""),
        ],
    );
    let invalid = [b"{\"prompt\": \"".as_slice(), &[0xff, 0xfe], b"\"}"].concat();
    assert_eq!(server.raw(&http_post(TEXT, &invalid)).status, 400);
    serves(&server);
}

/// What takes much memory for each of its bytes once it is parsed or encoded, in a body of 16 MiB.
#[test]
fn large_bodies_of_small_parts() {
    let server = Setup::says("ok").start();
    let fill = |part: &str| part.repeat((15 << 20) / part.len());
    let objects = fill(r#"{"":1},"#);
    let tool = |parameters: &str| {
        chat(&format!(r#""tools": [{{"function": {{"name": "f", "parameters": {parameters}}}}}]"#))
    };
    let schema = |format: &str| format!(r#"{{"type": "json_schema", "json_schema": {format}}}"#);
    let form = schema(&format!(r#"{{"schema": {{"x": [{objects}1]}}}}"#));
    let sent_at = Instant::now();
    check(
        &server,
        vec![
            (CHAT, tool(&format!("[{objects}1]")), 400, ""),
            (
                CHAT,
                chat(&format!(r#""chat_template_kwargs": {{"x": [{}1]}}"#, fill("1,"))),
                400,
                "",
            ),
            (CHAT, chat(&format!(r#""response_format": {form}"#)), 400, ""),
            (CHAT, format!(r#"{{"messages": [{}1]}}"#, fill(r#"{"role":"user"},"#)), 400, ""),
            (
                CHAT,
                format!(r#"{{"messages": [{{"role": "user", "content": "{}"}}]}}"#, fill("a b ")),
                400,
                "messages",
            ),
            (
                CHAT,
                format!(
                    r#"{{"messages": [{{"role": "assistant", "tool_calls": [{{"function": {{
                        "name": "f", "arguments": "{{\"a\": [{}1]}}"}}}}]}}]}}"#,
                    fill("[],")
                ),
                400,
                "messages",
            ),
            (CHAT, chat(&format!(r#""unknown": [{objects}1]"#)), 400, ""),
            (CHAT, chat(&format!(r#""user": "{}""#, fill("[{,"))), 200, ""),
            (TEXT, text(&format!(r#""response_format": {form}"#)), 400, ""),
            (TEXT, format!(r#"{{"prompt": "{}"}}"#, fill("a b ")), 400, "prompt"),
            (TEXT, format!(r#"{{"prompt": [{}""]}}"#, fill(r#""","#)), 400, "prompt"),
            (TEXT, format!(r#"{{"prompt": [{}[]]}}"#, fill("[],")), 400, "prompt"),
            (TEXT, format!(r#"{{"prompt": [{}1]}}"#, fill("1,")), 400, "prompt"),
            (TEXT, text(&format!(r#""stop": [{}""]"#, fill(r#""","#))), 400, "stop"),
            (TEXT, text(&format!(r#""unknown": [{objects}1]"#)), 200, ""),
            (NATIVE, format!(r#"{{"text": "{}"}}"#, fill("a b ")), 400, "text"),
            (
                NATIVE,
                format!(
                    r#"{{"text": "a", "sampling_params": {{"json_schema": "[{}1]"}}}}"#,
                    fill("[],")
                ),
                400,
                "sampling_params.json_schema",
            ),
            ("/tokenize", format!(r#"{{"prompt": "{}"}}"#, fill("a b ")), 400, "prompt"),
            (
                "/tokenize",
                format!(r#"{{"prompt": "{}", "add_special_tokens": false}}"#, fill("a b ")),
                400,
                "prompt",
            ),
        ],
    );
    assert!(sent_at.elapsed() < Duration::from_secs(20), "{:?}", sent_at.elapsed());
}

#[test]
fn wrong_types_and_missing_fields() {
    let server = Setup::says("ok").start();
    check(
        &server,
        vec![
            (CHAT, r#"{"model": "tiny"}"#.to_string(), 400, "messages"),
            (CHAT, r#"{"messages": "hi"}"#.to_string(), 400, "messages"),
            (CHAT, r#"{"messages": []}"#.to_string(), 400, "messages"),
            (CHAT, r#"{"messages": [1]}"#.to_string(), 400, "messages[0]"),
            (CHAT, r#"{"messages": [{"content": "x"}]}"#.to_string(), 400, "messages[0].role"),
            (CHAT, r#"{"messages": [{"role": "king", "content": "x"}]}"#.to_string(), 400, "role"),
            (CHAT, r#"{"messages": [{"role": 1, "content": "x"}]}"#.to_string(), 400, "role"),
            (CHAT, r#"{"messages": [{"role": "user", "content": 1}]}"#.to_string(), 400, "content"),
            (
                CHAT,
                r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#
                    .to_string(),
                400,
                "messages",
            ),
            (CHAT, chat(r#""model": "other""#), 404, "model"),
            (CHAT, chat(r#""model": 1"#), 400, "model"),
            (CHAT, chat(r#""stream": "yes""#), 400, "stream"),
            (CHAT, chat(r#""temperature": "hot""#), 400, "temperature"),
            (CHAT, chat(r#""max_completion_tokens": 1.5"#), 400, "max_completion_tokens"),
            (CHAT, chat(r#""stop": 1"#), 400, "stop"),
            (CHAT, chat(r#""stop": [1]"#), 400, "stop"),
            (CHAT, chat(r#""logit_bias": []"#), 400, "logit_bias"),
            (CHAT, chat(r#""logprobs": 1"#), 400, "logprobs"),
            (CHAT, chat(r#""top_logprobs": 1"#), 400, "top_logprobs"),
            (CHAT, chat(r#""stream_options": 1"#), 400, "stream_options"),
            (
                CHAT,
                chat(r#""temperature": null, "stop": null, "stream": null, "n": null"#),
                200,
                "",
            ),
            (TEXT, "{}".to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": null}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": {}}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": ["a", 1]}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": [1, "a"]}"#.to_string(), 400, "prompt"),
            (TEXT, text(r#""suffix": "end""#), 400, "suffix"),
            (NATIVE, "{}".to_string(), 400, "text"),
            (NATIVE, r#"{"text": "a", "input_ids": [1]}"#.to_string(), 400, "input_ids"),
            (
                NATIVE,
                r#"{"text": "a", "sampling_params": {"temperature": -1}}"#.to_string(),
                400,
                "sampling_params.temperature",
            ),
            (
                NATIVE,
                r#"{"text": "a", "sampling_params": {"max_new_tokens": -1}}"#.to_string(),
                400,
                "sampling_params.max_new_tokens",
            ),
            ("/tokenize", "{}".to_string(), 400, "prompt"),
            ("/detokenize", r#"{"tokens": [259]}"#.to_string(), 400, "tokens"),
            ("/detokenize", r#"{"tokens": [-1]}"#.to_string(), 400, "tokens"),
            ("/nowhere", "{}".to_string(), 404, ""),
        ],
    );
}

#[test]
fn prompts_that_cannot_run() {
    let server = Setup::says("ok").start();
    let long = |len: usize, max_tokens: usize| {
        format!(r#"{{"prompt": "{}", "max_tokens": {max_tokens}}}"#, "p".repeat(len))
    };
    check(
        &server,
        vec![
            (TEXT, r#"{"prompt": ""}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": []}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": [[]]}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": ["a", ""]}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": [-1]}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": [257]}"#.to_string(), 200, ""),
            (TEXT, r#"{"prompt": [259]}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": [2147483648]}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": [4294967296]}"#.to_string(), 400, "prompt"),
            (TEXT, r#"{"prompt": [1.5]}"#.to_string(), 400, "prompt"),
            (TEXT, long(1022, 1), 200, ""),
            (TEXT, long(1023, 1), 200, ""),
            (TEXT, long(1023, 2), 400, "max_tokens"),
            (TEXT, long(1024, 1), 400, "prompt"),
            (TEXT, long(1_000_000, 1), 400, "prompt"),
            (TEXT, format!(r#"{{"prompt": [{}"a"]}}"#, r#""a","#.repeat(20)), 400, "prompt"),
            (NATIVE, r#"{"text": ""}"#.to_string(), 400, "text"),
            (NATIVE, r#"{"input_ids": [300]}"#.to_string(), 400, "input_ids"),
        ],
    );
    // A KV pool that is smaller than the model's own length decides.
    let mut small = Setup::says("ok");
    small.engine.limits.pages = 16;
    let server = small.start();
    check(
        &server,
        vec![
            (TEXT, long(63, 2), 200, ""),
            (TEXT, long(64, 1), 200, ""),
            (TEXT, long(64, 2), 400, "max_tokens"),
            (TEXT, long(65, 1), 400, "prompt"),
        ],
    );
}

#[test]
fn what_is_wrong_is_said_even_while_the_queue_is_full() {
    let server = Setup::slow().start();
    let body = text(r#""max_tokens": 1000"#);
    let _busy: Vec<_> = (0..16).map(|_| server.send(TEXT, &body)).collect();
    server.wait_for_in_flight(16);
    assert_eq!(server.post(TEXT, &body).status, 503);
    let ids = |ids: &str| format!(r#"{{"prompt": {ids}}}"#);
    let rows: [Row; 13] = [
        (CHAT, "{".to_string(), 400, ""),
        (CHAT, r#"{"messages": []}"#.to_string(), 400, "messages"),
        (CHAT, chat(r#""temperature": 9"#), 400, "temperature"),
        (CHAT, chat(r#""regex": "(""#), 400, "regex"),
        (CHAT, chat(r#""logit_bias": {"259": 1}"#), 400, "logit_bias"),
        (CHAT, chat(r#""model": "other""#), 404, "model"),
        (TEXT, ids("\"\""), 400, "prompt"),
        (TEXT, ids("[259]"), 400, "prompt"),
        (TEXT, ids(&format!("\"{}\"", "p".repeat(1024))), 400, "prompt"),
        (TEXT, ids(&format!("[{}\"a\"]", "\"a\",".repeat(20))), 400, "prompt"),
        (TEXT, text(r#""n": 1000000000"#), 400, "n"),
        (TEXT, text(r#""max_tokens": 1024"#), 400, "max_tokens"),
        (NATIVE, r#"{"input_ids": [300]}"#.to_string(), 400, "input_ids"),
    ];
    for (path, body, status, param) in rows {
        let answer = server.post(path, &body);
        let error = &answer.json()["error"];
        assert_eq!(answer.status, status, "{body}: {error}");
        assert!(error["param"].as_str().unwrap_or_default().contains(param), "{body}: {error}");
    }
    assert_eq!(server.post(TEXT, &body).status, 503);
}

#[test]
fn numbers_at_under_and_over_their_limits() {
    let server = Setup::says("ok").start();
    let mut rows: Vec<Row> = Vec::new();
    let floats = [
        ("temperature", ["0", "2"], ["-0.1", "2.1"]),
        ("top_p", ["0", "1"], ["-0.1", "1.1"]),
        ("min_p", ["0", "1"], ["-0.1", "1.1"]),
        ("presence_penalty", ["-2", "2"], ["-2.1", "2.1"]),
        ("frequency_penalty", ["-2", "2"], ["-2.1", "2.1"]),
        ("repetition_penalty", ["0.01", "100"], ["0", "101"]),
        ("top_k", ["-1", "4294967295"], ["-2", "4294967296"]),
        ("n", ["1", "2"], ["0", "129"]),
        ("max_tokens", ["1", "1000"], ["0", "1025"]),
        ("min_tokens", ["0", "2"], ["-1", "3"]),
        ("seed", ["-9223372036854775808", "9223372036854775807"], ["\"a\"", "1e30"]),
    ];
    for (name, inside, outside) in floats {
        // A later `max_tokens` would be a second one.
        let body = |value: &str| match name {
            "max_tokens" => text(&format!(r#""max_tokens": {value}"#)),
            _ => text(&format!(r#""max_tokens": 2, "{name}": {value}"#)),
        };
        rows.extend(inside.map(|value| (TEXT, body(value), 200, "")));
        rows.extend(outside.map(|value| (TEXT, body(value), 400, name)));
    }
    let stops = |count: usize| {
        let stops: Vec<String> = (0..count).map(|stop| format!("\"s{stop}\"")).collect();
        chat(&format!(r#""stop": [{}]"#, stops.join(",")))
    };
    rows.extend([
        (CHAT, chat(r#""n": 1000000000"#), 400, "n"),
        (CHAT, chat(r#""n": 128"#), 400, "n"),
        (CHAT, stops(64), 200, ""),
        (CHAT, stops(65), 400, "stop"),
        (CHAT, stops(10_000), 400, "stop"),
        (CHAT, chat(&format!(r#""stop": "{}""#, "s".repeat(2000))), 400, "stop"),
        (CHAT, chat(r#""stop": """#), 200, ""),
        (CHAT, chat(r#""stop_token_ids": [257]"#), 200, ""),
        (CHAT, chat(r#""stop_token_ids": [259]"#), 400, "stop_token_ids"),
        (CHAT, chat(r#""stop_token_ids": [-1]"#), 400, "stop_token_ids"),
        (CHAT, chat(r#""logit_bias": {"257": 100}"#), 200, ""),
        (CHAT, chat(r#""logit_bias": {"259": 1}"#), 400, "logit_bias"),
        (CHAT, chat(r#""logit_bias": {"x": 1}"#), 400, "logit_bias"),
        (CHAT, chat(r#""logit_bias": {"1": 101}"#), 400, "logit_bias"),
        (CHAT, chat(r#""logprobs": true, "top_logprobs": 20"#), 200, ""),
        (CHAT, chat(r#""logprobs": true, "top_logprobs": 21"#), 400, "top_logprobs"),
        (TEXT, text(r#""logprobs": 21"#), 400, "logprobs"),
        (TEXT, text(r#""best_of": 5"#), 400, "best_of"),
        (CHAT, chat(r#""response_format": {"type": "text"}"#), 200, ""),
        (CHAT, chat(r#""response_format": {"type": "song"}"#), 400, "response_format"),
        (CHAT, chat(r#""response_format": 1"#), 400, "response_format"),
        (CHAT, chat(r#""tool_choice": "none", "tools": []"#), 200, ""),
        (CHAT, chat(r#""tool_choice": 1"#), 400, "tool_choice"),
    ]);
    check(&server, rows);
}

#[test]
fn templates_that_refuse() {
    let server = Setup::says("ok").start();
    check(
        &server,
        vec![
            (CHAT, chat(r#""chat_template_kwargs": []"#), 400, "chat_template_kwargs"),
            (CHAT, chat(r#""chat_template_kwargs": {"messages": 1}"#), 200, ""),
            (
                CHAT,
                chat(r#""continue_final_message": true, "add_generation_prompt": true"#),
                400,
                "continue_final_message",
            ),
        ],
    );
}

/// A model's own template may refuse, loop for ever or build a huge text: the chat is refused, in
/// time, and the server goes on.
#[test]
fn templates_without_end() {
    let nested = |body: &str| {
        let mut template = body.to_string();
        for level in 0..4 {
            template = format!("{{% for i{level} in range(100000) %}}{template}{{% endfor %}}");
        }
        template
    };
    for (template, says) in [
        ("{{ raise_exception('Only users, please') }}".to_string(), "Only users, please"),
        (nested(""), "runs too long"),
        (nested("{{ messages|tojson }}"), "runs too long"),
        ("{{ 'x' * 100000000000 }}".to_string(), "chat template"),
    ] {
        let mut setup = Setup::says("ok");
        setup.text = tiny::with_template(&template);
        let server = setup.start();
        let begun = Instant::now();
        let answer = server.post(CHAT, &chat(r#""seed": 1"#));
        assert_eq!(answer.status, 400, "{template}: {answer:?}");
        let message = answer.json()["error"]["message"].to_string();
        assert!(message.contains(says), "{template}: {message}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{template}: {:?}", begun.elapsed());
        assert_eq!(server.post(TEXT, &text(r#""max_tokens": 1"#)).status, 200, "{template}");
    }
}

#[test]
fn templates_that_fail_or_loop() {
    for (template, says) in [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.further }}", "undefined"),
        ("{{ 1 / 0 }}", "unable to calculate 1 / 0"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "long"),
        ("{% for a in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}", "too much"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ] {
        let mut setup = Setup::says("ok");
        setup.text = tiny::with_template(template);
        let server = setup.start();
        let sent_at = Instant::now();
        let answer = server.post(CHAT, &chat(r#""seed": 1"#));
        assert_eq!(answer.status, 400, "{template}: {answer:?}");
        let error = &answer.json()["error"];
        assert_eq!(error["param"], "messages", "{template}: {error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{template}: {error}");
        assert!(sent_at.elapsed() < Duration::from_secs(5), "{template}: {:?}", sent_at.elapsed());
        serves(&server);
    }
}

#[test]
fn requests_that_are_no_requests() {
    let mut setup = Setup::says("ok");
    setup.server.body_bytes_max = 1 << 20;
    setup.server.header_timeout = Duration::from_millis(300);
    setup.server.body_timeout = Duration::from_millis(300);
    let server = setup.start();

    let large = http_post(TEXT, &vec![b'x'; 100 << 20]);
    let answer = server.raw(&large);
    assert!(answer.status == 413 || answer.status == 0, "{}", answer.status);
    serves(&server);

    let announced = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 104857600\r\n\r\n";
    assert_eq!(server.raw(announced.as_bytes()).status, 413);
    let mut chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
        transfer-encoding: chunked\r\n\r\n"
        .to_vec();
    chunked.extend_from_slice(b"200000\r\n");
    chunked.extend(vec![b'x'; 0x20_0000]);
    let answer = server.raw(&chunked);
    assert!(answer.status == 413 || answer.status == 0, "{}", answer.status);
    serves(&server);

    let body = text(r#""max_tokens": 1"#);
    let typed = |content_type: &str| {
        let length = body.len();
        format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: {content_type}\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    };
    assert_eq!(server.raw(typed("text/plain").as_bytes()).status, 415);
    assert_eq!(server.raw(typed("application/json; charset=utf-8").as_bytes()).status, 200);

    let huge = format!("GET /health HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "h".repeat(1 << 20));
    let answer = server.raw(huge.as_bytes());
    assert!(answer.status == 431 || answer.status == 0, "{}", answer.status);
    assert_eq!(server.raw(b"\x16\x03\x01\x02\x00garbage\r\n\r\n").status, 400);
    serves(&server);

    // Slow-loris: a byte now and then, in the head and in the body.
    for start in ["GET /health HTTP/1.1\r\n", announced_small()] {
        let begun = Instant::now();
        let mut stream = server.connect();
        stream.write_all(start.as_bytes()).unwrap();
        let mut drip = stream.try_clone().unwrap();
        let dripping = std::thread::spawn(move || {
            while drip.write_all(b"x").is_ok() && begun.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let answer = Answer::read(&mut BufReader::new(stream));
        assert!([0, 408].contains(&answer.status), "{answer:?}");
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        dripping.join().unwrap();
        serves(&server);
    }
}

fn announced_small() -> &'static str {
    "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
     content-length: 1000\r\n\r\n"
}

/// A large body that stops half-way.
fn half_a_body(server: &Server) -> std::net::TcpStream {
    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&[b' '; 100_000]).unwrap();
    stream
}

#[test]
fn large_bodies_take_turns_and_small_ones_do_not_wait() {
    let mut setup = Setup::says("ok");
    setup.server.bodies_bytes_max = 256 << 10;
    setup.server.body_timeout = Duration::from_millis(600);
    let server = setup.start();
    let large = text(&format!(r#""unknown": "{}", "max_tokens": 2"#, "x".repeat(200_000)));
    // Many heads and little else take nobody's room.
    let announced: Vec<_> = (0..50)
        .map(|_| {
            let mut stream = server.connect();
            stream.write_all(announced_small().replace("1000", "200000").as_bytes()).unwrap();
            stream
        })
        .collect();
    assert_eq!(server.post(TEXT, &large).status, 200);
    drop(announced);
    // A length that is too small for the chunks behind it is no length.
    let both = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 10\r\n\
         transfer-encoding: chunked\r\n\r\n{:x}\r\n{large}\r\n0\r\n\r\n",
        large.len()
    );
    let answer = server.raw(both.as_bytes());
    assert!([200, 400].contains(&answer.status), "{answer:?}");
    serves(&server);

    let first = half_a_body(&server);
    std::thread::sleep(Duration::from_millis(100));
    serves(&server);
    let second = half_a_body(&server);
    std::thread::sleep(Duration::from_millis(100));
    // The room is the first one's until it is late, then the second's.
    let answer = server.post(TEXT, &large);
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.head.contains("retry-after"), "{answer:?}");
    assert_eq!(answer.json()["error"]["code"], "overloaded");
    for stream in [first, second] {
        assert_eq!(Answer::read(&mut BufReader::new(stream)).status, 408);
    }
    assert_eq!(server.post(TEXT, &large).status, 200);
}
