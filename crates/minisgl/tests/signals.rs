//! How a server ends: the binary itself, at signals.
#![cfg(unix)]

mod binary;

use std::io::Read;
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use binary::Server;

/// As `kill` does; `TERM` or `INT`.
fn signal(server: &Server, name: &str) {
    let id = server.child.id().to_string();
    assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
}

/// Shorter than any stream that a test interrupts would take, and long for a machine that is busy.
const SOON: Duration = Duration::from_secs(10);

/// The code that the process ends with, which it must soon.
fn exit_code(server: &mut Server) -> Option<i32> {
    let until = Instant::now() + SOON;
    loop {
        if let Some(status) = server.child.try_wait().unwrap() {
            return status.code();
        }
        assert!(Instant::now() < until, "it has not ended");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A stream of so many tokens, of which the first has come.
fn begun(server: &Server, max_tokens: u32) -> (TcpStream, String) {
    let body = format!(
        r#"{{"prompt": "One, two,", "max_tokens": {max_tokens}, "ignore_eos": true, "stream": true}}"#
    );
    let mut stream = server.send(&body);
    let mut said = String::new();
    while !said.contains("data: ") {
        let mut piece = [0; 4096];
        let read = stream.read(&mut piece).unwrap();
        assert!(read > 0, "{said}");
        said += std::str::from_utf8(&piece[..read]).unwrap();
    }
    (stream, said)
}

/// Asks until new requests are refused.
fn wait_until_refusing(server: &Server) {
    let until = Instant::now() + SOON;
    loop {
        let answer = server.ask(r#"{"prompt": "x", "max_tokens": 1}"#);
        if answer.starts_with("HTTP/1.1 503") {
            let lower = answer.to_ascii_lowercase();
            assert!(
                lower.contains("retry-after: 1") && lower.contains("shutting down"),
                "{answer}"
            );
            return;
        }
        assert!(answer.starts_with("HTTP/1.1 200") && Instant::now() < until, "{answer}");
    }
}

#[test]
fn an_idle_server_ends_at_once() {
    for name in ["TERM", "INT"] {
        let mut server = Server::start(&[]);
        signal(&server, name);
        assert_eq!(exit_code(&mut server), Some(0));
    }
}

#[test]
fn a_busy_server_finishes_what_runs_and_refuses_what_comes() {
    let mut server = Server::start(&["--drain-timeout", "300"]);
    let (mut stream, mut said) = begun(&server, 400);
    signal(&server, "TERM");
    wait_until_refusing(&server);
    stream.read_to_string(&mut said).unwrap();
    assert!(said.contains(r#""finish_reason":"length""#), "{said}");
    assert!(!said.contains(r#""error""#) && said.contains("data: [DONE]"), "{said}");
    assert_eq!(exit_code(&mut server), Some(0));
}

#[test]
fn a_second_signal_ends_what_runs() {
    let mut server = Server::start(&["--drain-timeout", "300"]);
    let (mut stream, mut said) = begun(&server, 4000);
    signal(&server, "TERM");
    wait_until_refusing(&server);
    assert!(server.child.try_wait().unwrap().is_none(), "it ended while a stream was running");
    signal(&server, "TERM");
    assert_eq!(exit_code(&mut server), Some(0));
    // The client is told, and not left with what looks like an end.
    stream.read_to_string(&mut said).unwrap();
    assert!(said.contains(r#""error""#) && !said.contains(r#""finish_reason":"length""#), "{said}");
}

#[test]
fn what_does_not_finish_in_time_is_ended() {
    let mut server = Server::start(&["--drain-timeout", "0.5"]);
    let (mut stream, mut said) = begun(&server, 4000);
    signal(&server, "TERM");
    assert_eq!(exit_code(&mut server), Some(0));
    stream.read_to_string(&mut said).unwrap();
    assert!(said.contains(r#""error""#), "{said}");
}
