//! Clients that leave, storm or never read, keys, and the ways in which a server ends. After each,
//! free and cached pages are all pages.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Answer, Server, Setup, read_chunk};
use minisgl_frontend::Outcome;
use minisgl_scheduler::fake::NextToken;

const TEXT: &str = "/v1/completions";

fn endless(stream: bool) -> String {
    format!(r#"{{"prompt": "hello", "max_tokens": 1000, "stream": {stream}}}"#)
}

/// The body of a streamed answer, with its head read.
fn body_of(stream: TcpStream) -> BufReader<TcpStream> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line).unwrap() > 2 {
        line.clear();
    }
    reader
}

#[test]
fn a_client_that_leaves_ends_its_request_in_every_state() {
    let server = Setup::slow().start();
    for stream in [true, false] {
        // Decoding, with eight that run and eight that wait.
        let clients: Vec<TcpStream> =
            (0..16).map(|_| server.send(TEXT, &endless(stream))).collect();
        server.wait_for_in_flight(16);
        let left = Instant::now();
        drop(clients);
        server.settle();
        assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
        // Prefilling: a prompt of many chunks.
        let prompt = "p".repeat(1000);
        let body = format!(r#"{{"prompt": "{prompt}", "max_tokens": 9, "stream": {stream}}}"#);
        for pause_ms in 0..8 {
            let client = server.send(TEXT, &body);
            thread::sleep(Duration::from_millis(pause_ms));
            drop(client);
        }
        server.settle();
        // Around the finishing step.
        for max_tokens in 1..8 {
            let body =
                format!(r#"{{"prompt": "x", "max_tokens": {max_tokens}, "stream": {stream}}}"#);
            let client = server.send(TEXT, &body);
            thread::sleep(Duration::from_millis(4));
            drop(client);
        }
        server.settle();
    }
    assert!(server.frontend.stats().ended(Outcome::Abort) >= 32);
    assert_eq!(server.post(TEXT, r#"{"prompt": "x", "max_tokens": 3}"#).status, 200);
}

#[test]
fn a_storm_of_aborts_on_a_shared_prefix_leaves_all_pages() {
    let server = Arc::new(Setup::slow().start());
    let prompt = "shared ".repeat(60);
    let storms: Vec<_> = (0..8)
        .map(|storm| {
            let server = Arc::clone(&server);
            let body = format!(r#"{{"prompt": "{prompt}", "max_tokens": 500, "stream": true}}"#);
            thread::spawn(move || {
                for round in 0..20 {
                    let client = server.send(TEXT, &body);
                    thread::sleep(Duration::from_millis((storm * 7 + round * 3) % 20));
                    drop(client);
                }
            })
        })
        .collect();
    for storm in storms {
        storm.join().unwrap();
    }
    server.settle();
    assert_eq!(server.post(TEXT, r#"{"prompt": "x", "max_tokens": 3}"#).status, 200);
}

#[test]
fn a_thousand_connections_past_the_bound_are_told_to_retry() {
    let mut setup = Setup::slow();
    setup.engine.step_time.0 = Duration::from_millis(50);
    let server = setup.start();
    let running: Vec<_> = (0..8).map(|_| server.send(TEXT, &endless(true))).collect();
    server.wait_for_in_flight(8);
    let crowd: Vec<TcpStream> = (0..1000).map(|_| server.send(TEXT, &endless(false))).collect();
    let mut refused = 0;
    let mut waiting = Vec::new();
    for client in crowd {
        // The few that found room wait for their turn, the others have an answer.
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut byte = [0];
        match client.peek(&mut byte) {
            Ok(_) => {
                let answer = Answer::read(&mut BufReader::new(client));
                assert_eq!(answer.status, 503, "{answer:?}");
                assert!(answer.head.contains("retry-after: 1"), "{answer:?}");
                assert_eq!(answer.json()["error"]["code"], "overloaded");
                refused += 1;
            }
            Err(_) => waiting.push(client),
        }
    }
    assert_eq!((refused, waiting.len()), (992, 8));
    drop((running, waiting));
    server.settle();
    assert_eq!(server.post(TEXT, r#"{"prompt": "x", "max_tokens": 3}"#).status, 200);
}

#[test]
fn readers_that_never_read_hold_nobody_up_and_are_let_go() {
    let mut setup = Setup::default();
    setup.engine.next_token = NextToken::script(Vec::new(), u32::from(b'a'));
    setup.server.write_timeout = Duration::from_millis(300);
    setup.engine.limits.seq_len_max = 200_000;
    setup.engine.limits.pages = 100_000;
    let server = setup.start();
    // SGLang's form repeats all text in each event, so that these fill every buffer there is.
    let body = r#"{"text": "x", "stream": true, "sampling_params": {"max_new_tokens": 100000}}"#;
    let clients: Vec<_> = (0..4).map(|_| server.send("/generate", body)).collect();
    server.wait_for_in_flight(4);
    let begun = Instant::now();
    let others = server.post(TEXT, r#"{"prompt": "x", "max_tokens": 3}"#);
    assert_eq!(others.status, 200);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    server.settle();
    thread::sleep(Duration::from_millis(600));
    for mut client in clients {
        // What the kernel holds can still be read, and then the connection is gone.
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        assert!(!rest.ends_with(b"0\r\n\r\n"), "a reader who never read got everything");
    }
}

#[test]
fn the_key_is_asked_for_by_everything_but_health() {
    let mut setup = Setup::says("ok");
    setup.server.api_key = Some("secret".to_string());
    let server = setup.start();
    let with = |header: &str| {
        let request =
            format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n");
        server.raw(request.as_bytes())
    };
    assert_eq!(server.get("/health").status, 200);
    let refused = server.get("/v1/models");
    assert_eq!(refused.status, 401);
    assert_eq!(refused.json()["error"]["type"], "authentication_error");
    assert_eq!(server.get("/metrics").status, 401);
    assert_eq!(server.post(TEXT, "{}").status, 401);
    assert_eq!(with("authorization: Bearer secret\r\n").status, 200);
    for wrong in ["secre", "secrets", "Secret", ""] {
        assert_eq!(with(&format!("authorization: Bearer {wrong}\r\n")).status, 401, "{wrong}");
    }
    assert_eq!(with("authorization: secret\r\n").status, 401);
}

#[test]
fn other_origins_are_let_in_only_where_they_are_named() {
    let preflight = "OPTIONS /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                     origin: http://page\r\n\r\n";
    let server = Setup::says("ok").start();
    assert!(!server.raw(preflight.as_bytes()).head.contains("access-control"));
    let mut setup = Setup::says("ok");
    setup.server.cors_origins = vec!["http://page".to_string()];
    let server = setup.start();
    let answer = server.raw(preflight.as_bytes());
    assert_eq!(answer.status, 204);
    assert!(answer.head.contains("access-control-allow-origin: http://page"));
    let other = preflight.replace("http://page", "http://other");
    assert!(!server.raw(other.as_bytes()).head.contains("access-control"));
}

#[test]
fn a_request_may_take_so_long_and_no_longer() {
    let mut setup = Setup::slow();
    setup.server.request_timeout = Some(Duration::from_millis(100));
    let server = setup.start();
    let answer = server.post(TEXT, &endless(false));
    assert_eq!(answer.status, 504, "{answer:?}");
    let answer = server.post(TEXT, &endless(true));
    assert_eq!(answer.status, 200);
    let events = answer.events();
    assert_eq!(events.last().unwrap()["error"]["type"], "timeout_error");
    server.settle();
}

#[test]
fn a_failing_engine_answers_everybody_and_turns_health_off() {
    let mut setup = Setup::slow();
    setup.engine.fail_at = Some(400);
    setup.server.failure_shown = Duration::from_secs(2);
    let mut server = setup.start();
    let streams: Vec<_> = (0..4).map(|_| server.send(TEXT, &endless(true))).collect();
    server.wait_for_in_flight(4);
    let whole: Vec<_> = (0..8).map(|_| server.send(TEXT, &endless(false))).collect();
    for stream in streams {
        let events = Answer::read(&mut BufReader::new(stream)).events();
        assert_eq!(events.last().unwrap()["error"]["type"], "server_error");
    }
    for whole in whole {
        let answer = Answer::read(&mut BufReader::new(whole));
        assert_eq!(answer.status, 500, "{answer:?}");
    }
    assert_eq!(server.get("/health").status, 503);
    assert_eq!(server.post(TEXT, &endless(false)).status, 503);
    assert_eq!(server.get("/v1/models").status, 200);
    // Nobody has to tell it to end.
    wait_for_end(&server, Duration::from_secs(5));
    let error = server.outcome().unwrap_err().to_string();
    assert!(error.contains("the engine has failed"), "{error}");
}

fn wait_for_end(server: &Server, limit: Duration) {
    let until = Instant::now() + limit;
    while !server.has_ended() {
        assert!(Instant::now() < until, "the server does not end");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_ends_an_idle_server() {
    let server = Setup::slow().start();
    server.signal();
    wait_for_end(&server, Duration::from_secs(2));
}

#[test]
fn a_signal_lets_running_requests_finish_and_refuses_new_ones() {
    let server = Setup::slow().start();
    let body = r#"{"prompt": "x", "max_tokens": 300, "stream": true}"#;
    let running = server.send(TEXT, body);
    server.wait_for_in_flight(1);
    server.signal();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(server.get("/health").status, 503);
    assert_eq!(server.post(TEXT, body).status, 503);
    let events = Answer::read(&mut BufReader::new(running)).events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    wait_for_end(&server, Duration::from_secs(4));
}

#[test]
fn a_second_signal_and_the_drain_timeout_end_what_runs() {
    for twice in [true, false] {
        let mut setup = Setup::slow();
        let wait = if twice { Duration::from_secs(60) } else { Duration::from_millis(100) };
        setup.server.drain_timeout = wait;
        let server = setup.start();
        let running = server.send(TEXT, &endless(true));
        let mut running = body_of(running);
        read_chunk(&mut running).unwrap();
        server.signal();
        if twice {
            server.signal();
        }
        wait_for_end(&server, Duration::from_secs(4));
        let mut rest = Vec::new();
        while let Some(chunk) = read_chunk(&mut running) {
            rest.extend(chunk);
        }
        let rest = String::from_utf8(rest).unwrap();
        assert!(rest.contains(r#""error""#) && rest.ends_with("data: [DONE]\n\n"), "{rest}");
    }
}

#[test]
fn a_connection_is_kept_for_the_next_request() {
    let server = Setup::says("ok").start();
    let mut stream = BufReader::new(server.connect());
    for _ in 0..3 {
        let request = "GET /version HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        let mut head = String::new();
        while stream.read_line(&mut head).unwrap() > 2 {}
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).unwrap();
    }
}
