//! `minisgl bench serve` against the server with a fake engine, on loopback.

#[path = "../../minisgl-frontend/tests/tiny/mod.rs"]
mod tiny;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use minisgl::bench::load::{
    Arrivals, Client, Endpoint, LoadOptions, LoadProgress, LoadRequest, Record, Summary, Synthetic,
    html, read_trace, run_load,
};
use minisgl_frontend::{Frontend, FrontendOptions};
use minisgl_scheduler::fake::{FakeEngine, FakeOptions, NextToken};
use minisgl_server::{ServerOptions, bind, listen, serve};
use serde_json::Value;
use tokio::sync::mpsc;

/// Serves until the sender is dropped with the test's runtime.
async fn server() -> (String, mpsc::Sender<()>) {
    let mut options = FakeOptions::default();
    options.limits.vocab_size = tiny::VOCAB_SIZE;
    // Letters, so that each token is a character of text.
    let letter = |tokens: &[u32]| u32::from(b'a') + tokens.len() as u32 % 26;
    options.next_token = NextToken::Call(Arc::new(letter));
    options.step_time.0 = Duration::from_millis(1);
    let engine = FakeEngine::new(options);
    let frontend = Frontend::start(engine, tiny::text_model(), FrontendOptions::default()).unwrap();
    let listener = listen(bind("127.0.0.1:0".parse().unwrap()).unwrap()).unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let (signals, received) = mpsc::channel(1);
    let names = vec!["tiny".to_string()];
    let options = ServerOptions { model_names: names, ..ServerOptions::default() };
    tokio::spawn(serve(frontend, options, listener, received));
    (url, signals)
}

async fn load(url: &str, requests: Vec<LoadRequest>, arrivals: Arrivals) -> Vec<Record> {
    let client = Arc::new(Client::new(url, None).unwrap());
    let options = LoadOptions {
        model: client.first_model().await.unwrap(),
        endpoint: Endpoint::Completions { id_end: 128 },
        arrivals,
        temperature: 0.0,
        ignore_eos: true,
        seed: 3,
    };
    run_load(client, requests, options, Arc::new(LoadProgress::default())).await.unwrap()
}

fn synthetic() -> Synthetic {
    Synthetic {
        requests: 40,
        input_tokens: (5, 9),
        output_tokens: (20, 20),
        prefix_tokens: 64,
        prefixes: 2,
        seed: 0,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_loop_keeps_its_concurrency_and_counts_every_token() {
    let (url, _signals) = server().await;
    let requests = synthetic().draw();
    let input: usize = requests.iter().map(|r| r.prompt.ids(128).unwrap().len()).sum();
    let records = load(&url, requests, Arrivals::Closed(4)).await;
    let summary = Summary::of(&records);
    assert_eq!((summary.answered, summary.failed), (40, 0), "{:?}", summary.errors);
    assert_eq!((summary.input_tokens, summary.output_tokens), (input, 800));
    // All but the first few found their beginning in the cache.
    assert!(summary.cached_tokens >= 32 * 64, "{} cached", summary.cached_tokens);
    // Twenty steps of a millisecond each answer, four answers at a time.
    assert!(summary.ttft_ms.p50 >= 1.0 && summary.end_to_end_ms.p50 >= 19.0, "{summary:?}");
    assert!(summary.seconds >= 0.19, "{summary:?}");
    let ends = |record: &Record| record.sent + record.outcome.as_ref().unwrap().total;
    for (index, record) in records.iter().enumerate() {
        let before = records[..index].iter().filter(|other| ends(other) > record.sent).count();
        assert!(before < 4, "request {index} was sent while {before} others were open");
    }
    let page = html("A load & more", &summary, &records);
    assert_eq!(page.matches("<svg").count(), 5);
    assert!(page.contains("A load &amp; more") && !page.contains("NaN") && !page.contains("inf"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_loop_sends_at_its_own_times() {
    let (url, _signals) = server().await;
    let records = load(&url, synthetic().draw(), Arrivals::Poisson(200.0)).await;
    assert!(records.iter().all(|record| record.outcome.is_ok()));
    // Forty arrivals at 200 a second take 0.2 s, give or take its 0.03 s of deviation and a
    // machine that is late. Two that arrive together may overtake each other.
    let last = records.iter().map(|record| record.sent).max().unwrap();
    assert!((Duration::from_millis(80)..Duration::from_secs(2)).contains(&last), "{last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_is_replayed_in_its_time() {
    let (url, _signals) = server().await;
    let trace = concat!(
        r#"{"timestamp": 27000, "input_length": 600, "output_length": 4, "hash_ids": [0, 1]}"#,
        "\n",
        r#"{"timestamp": 27600, "input_length": 1000, "output_length": 7, "hash_ids": [0, 2]}"#,
    );
    let (_, requests) = read_trace(trace, 0.5).unwrap();
    let records = load(&url, requests, Arrivals::Trace).await;
    let summary = Summary::of(&records);
    assert_eq!((summary.input_tokens, summary.output_tokens), (1600, 11), "{summary:?}");
    // The block that both prompts begin with.
    assert_eq!(summary.cached_tokens, 512);
    assert!(records[1].sent - records[0].sent >= Duration::from_millis(290));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_refuses_is_a_failure_and_no_answer() {
    let (url, _signals) = server().await;
    let requests = Synthetic { input_tokens: (5000, 5000), ..synthetic() }.draw();
    let summary = Summary::of(&load(&url, requests, Arrivals::Closed(40)).await);
    assert_eq!((summary.answered, summary.failed), (0, 40));
    assert!(summary.errors[0].contains("400"), "{:?}", summary.errors);
    assert!(summary.table().contains("40 failed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_prints_json_and_writes_a_page() {
    let (url, _signals) = server().await;
    let page = std::env::temp_dir().join(format!("minisgl-{}-load.html", std::process::id()));
    let prompts = page.with_extension("txt");
    std::fs::write(&prompts, "one\ntwo\n").unwrap();
    let args = ["bench", "serve", "--json", "--num-requests", "6", "--output-len", "8"];
    let output = run(&args, &url, &page, &prompts).await;
    let summary: Value = serde_json::from_slice(&output).unwrap();
    assert_eq!(
        (summary["answered"].as_u64(), summary["output_tokens"].as_u64()),
        (Some(6), Some(48))
    );
    assert!(summary["ttft_ms"]["p99"].as_f64().unwrap() > 0.0);
    assert!(std::fs::read_to_string(&page).unwrap().contains("<svg"));
    for path in [page, prompts] {
        std::fs::remove_file(path).unwrap();
    }
}

/// What the command wrote; it must have gone well.
async fn run(args: &[&str], url: &str, page: &Path, prompts: &Path) -> Vec<u8> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_minisgl"));
    command.args(args).args(["--base-url", url]);
    command.arg("--html").arg(page).arg("--prompts").arg(prompts);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
