//! The binary itself, as a process, on the default model.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

/// Small, so that tests that run beside each other do not fill the machine.
const SMALL: [&str; 6] = ["--num-pages", "256", "--device", "cpu", "--threads", "2"];

pub fn start(args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_minisgl"))
        .args(args)
        .args(SMALL)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A server on a port of its own, killed where a test ends before it does.
pub struct Server {
    pub child: Child,
    pub address: String,
}

impl Server {
    /// Waits until it is ready; from there on, nobody reads its notes.
    pub fn start(args: &[&str]) -> Self {
        let mut child = start(&[&["--port", "0"], args].concat());
        let mut notes = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(notes.read_line(&mut line).unwrap() > 0, "it ended before it was ready");
            if let Some((_, rest)) = line.split_once("http://") {
                break rest.split(' ').next().unwrap().to_owned();
            }
        };
        Self { child, address }
    }

    /// Sends a request for a completion, and leaves the answer unread.
    pub fn send(&self, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    /// The whole answer to a request for a completion.
    pub fn ask(&self, body: &str) -> String {
        let mut answer = String::new();
        self.send(body).read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
