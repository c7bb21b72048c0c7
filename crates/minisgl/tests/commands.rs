//! The commands as a user runs them: the binary itself, on the default model.

mod binary;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Output;

use serde_json::Value;

#[cfg(unix)]
use binary::Server;
use binary::start;

fn run(args: &[&str], input: &str) -> Output {
    let mut child = start(args);
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// A folder of its own for one test, gone when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("minisgl-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_batch_that_was_interrupted_goes_on_where_it_stopped() {
    let folder = Folder::new("resumed");
    let (input, output) = (folder.file("in.jsonl"), folder.file("out.jsonl"));
    let line = |id: u32| match id {
        3 => "no JSON\n".to_owned(),
        id => format!("{{\"id\": {id}, \"prompt\": \"Item {id}:\", \"max_tokens\": 8}}\n"),
    };
    fs::write(&input, (0..9).map(line).collect::<String>()).unwrap();
    let args = ["generate", "--input", &input, "--output", &output];
    assert!(run(&args, "").status.success());
    let whole = fs::read_to_string(&output).unwrap();
    let records: Vec<Value> = whole.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(records.len(), 9);
    for (id, record) in records.iter().enumerate() {
        match id {
            3 => assert!(record["error"]["message"].is_string(), "{record}"),
            id => assert_eq!((&record["id"], record["text"].is_string()), (&Value::from(id), true)),
        }
    }
    // As if the process had been killed in the middle of its sixth result.
    let ends: Vec<usize> = whole.match_indices('\n').map(|(at, _)| at + 1).collect();
    fs::write(&output, &whole[..ends[4] + 7]).unwrap();
    assert!(run(&args, "").status.success());
    let resumed: Vec<Value> = fs::read_to_string(&output)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let said = |records: &[Value]| records.iter().map(|r| r["text"].clone()).collect::<Vec<_>>();
    assert_eq!(said(&resumed), said(&records));
    // Results of another input are not written over.
    fs::write(&input, "{\"id\": 77, \"prompt\": \"x\"}\n").unwrap();
    let refused = run(&args, "");
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(refused.stderr).contains("--output"));
}

#[test]
fn openais_batch_format_is_answered_as_by_the_server() {
    let requests = concat!(
        r#"{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "gpt", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "n": 2, "temperature": 0}}"#,
        "\n",
        r#"{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}"#,
        "\n",
        r#"{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "One, two,", "max_tokens": 2, "logprobs": 1}}"#,
        "\n",
    );
    let done = run(&["generate", "--input", "-"], requests);
    assert!(done.status.success(), "{}", text(done.stderr));
    let records: Vec<Value> =
        text(done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<&Value> = records.iter().map(|record| &record["custom_id"]).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    let body = |record: usize| &records[record]["response"]["body"];
    assert_eq!(body(0)["object"], "chat.completion");
    assert_eq!(body(0)["choices"].as_array().unwrap().len(), 2);
    assert_eq!(records[1]["response"]["status_code"], 400);
    assert_eq!(body(1)["error"]["param"], "messages");
    assert_eq!(body(2)["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 2);
}

#[test]
fn the_shell_reads_a_pipe_and_keeps_the_chat_in_its_cache() {
    let lines = "Say one word.\n/stats\nAnd another.\n/what\n/reset\nHello\n/exit\nnever read\n";
    let done = run(&["shell", "--max-tokens", "12", "--temperature", "0"], lines);
    let (said, notes) = (text(done.stdout), text(done.stderr));
    assert!(done.status.success(), "{notes}");
    for part in ["generated in", "/what is no command", "A new chat."] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // Three answers; the second found the first turn in the cache.
    let cached: Vec<usize> = notes
        .lines()
        .filter(|line| line.contains("from the cache"))
        .map(|line| line.split(", ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(cached.len(), 3, "{notes}");
    assert!(cached[0] == 0 && cached[1] >= 32, "{notes}");
}

#[cfg(unix)]
#[test]
fn a_server_answers_refuses_and_keeps_its_port() {
    // Flags without a command are those of `serve`.
    let server = Server::start(&[]);
    let good = r#"{"prompt": "One, two,", "max_tokens": 3}"#;
    for bad in [
        r#"{"prompt": "x", "max_tokens": 0}"#,
        r#"{"prompt": "x", "max_tokens": -1}"#,
        r#"{"prompt": "x", "model": "other"}"#,
        &format!(r#"{{"prompt": "{}"}}"#, "word ".repeat(9000)),
        "{\"prompt\": \"",
    ] {
        let answer = server.ask(bad);
        assert!(answer.starts_with("HTTP/1.1 4"), "{}", &answer[..80]);
        assert!(server.ask(good).starts_with("HTTP/1.1 200"));
    }
    let port = server.address.rsplit(':').next().unwrap();
    let second = run(&["serve", "--port", port], "");
    assert_eq!(second.status.code(), Some(1));
    assert!(text(second.stderr).contains("in use"));
    assert!(server.ask(good).starts_with("HTTP/1.1 200"));
}
