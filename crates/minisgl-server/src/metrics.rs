//! `/metrics`, in Prometheus' text format: own names, and those that gateways read already.

use std::fmt::{Display, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use minisgl_frontend::Outcome;
use minisgl_scheduler::histogram::Histogram;

use crate::app::App;
use crate::info::load;

const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All counters, gauges and histograms.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let mut page = Page::default();
    gauges(&app, &mut page);
    counters(&app, &mut page);
    let stats = app.frontend.stats();
    page.histogram(
        &["minisgl_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"],
        "From submission to the first token",
        &stats.time_to_first_token,
    );
    page.histogram(
        &["minisgl_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"],
        "Between a choice's tokens",
        &stats.inter_token_latency,
    );
    page.histogram(
        &["minisgl_request_duration_seconds", "vllm:e2e_request_latency_seconds"],
        "From submission to the end",
        &stats.end_to_end_latency,
    );
    let steps = &app.frontend.scheduler_stats().step_histograms;
    page.histogram(
        &["minisgl_step_duration_seconds"],
        "From a step's launch, or the end of the one before, to its tokens",
        &steps.time,
    );
    page.histogram(&["minisgl_batch_requests"], "Requests in a step", &steps.rows);
    page.histogram(
        &["minisgl_batch_tokens", "vllm:iteration_tokens_total"],
        "Tokens computed by a step",
        &steps.tokens,
    );
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], page.0).into_response()
}

fn gauges(app: &App, page: &mut Page) {
    let load = load(app);
    let stats = app.frontend.scheduler_stats();
    page.gauge(
        &["minisgl_requests_running", "vllm:num_requests_running", "sglang:num_running_reqs"],
        "Requests that run",
        load.num_running_reqs,
    );
    page.gauge(
        &["minisgl_requests_waiting", "vllm:num_requests_waiting", "sglang:num_queue_reqs"],
        "Requests that wait",
        load.num_waiting_reqs,
    );
    page.gauge(
        &["minisgl_kv_usage_ratio", "vllm:kv_cache_usage_perc", "sglang:token_usage"],
        "Share of the KV cache that requests hold",
        load.token_usage,
    );
    page.gauge(
        &["minisgl_kv_tokens_used", "sglang:num_used_tokens"],
        "Tokens in the KV cache that requests hold",
        load.num_used_tokens,
    );
    page.gauge(
        &["minisgl_cache_hit_ratio", "sglang:cache_hit_rate"],
        "Share of prompt tokens that were found in the prefix cache",
        load.cache_hit_rate,
    );
    let pages = [
        ("minisgl_kv_pages", "Pages in the KV cache", &stats.pages),
        ("minisgl_kv_pages_free", "Pages that hold nothing", &stats.pages_free),
        ("minisgl_kv_pages_cached", "Pages that only the prefix cache holds", &stats.pages_cached),
        ("minisgl_step_requests", "Requests in the last step", &stats.batch_rows),
        ("minisgl_step_tokens", "Tokens computed by the last step", &stats.batch_tokens),
    ];
    for (name, help, value) in pages {
        page.gauge(&[name], help, value.load(Relaxed));
    }
    page.gauge(
        &["minisgl_healthy"],
        "1 while the engine runs",
        u8::from(app.frontend.is_healthy()),
    );
}

fn counters(app: &App, page: &mut Page) {
    let (frontend, scheduler) = (app.frontend.stats(), app.frontend.scheduler_stats());
    let name = "minisgl_requests_total";
    page.head(name, "counter", "Choices that ended, by outcome");
    for outcome in Outcome::ALL {
        let labels = format!("{{outcome=\"{}\"}}", outcome.name());
        page.sample(&format!("{name}{labels}"), frontend.ended(outcome));
    }
    let name = "vllm:request_success_total";
    page.head(name, "counter", "Choices that ended by themselves, by reason");
    for outcome in [Outcome::Stop, Outcome::Length] {
        let labels = format!("{{finished_reason=\"{}\"}}", outcome.name());
        page.sample(&format!("{name}{labels}"), frontend.ended(outcome));
    }
    page.counter(
        &["minisgl_prompt_tokens_total", "vllm:prompt_tokens_total", "sglang:prompt_tokens_total"],
        "Tokens in the prompts of admitted requests",
        frontend.prompt_tokens.load(Relaxed),
    );
    page.counter(
        &["minisgl_cached_tokens_total", "vllm:prefix_cache_hits_total"],
        "Prompt tokens that were found in the prefix cache",
        frontend.cached_tokens.load(Relaxed),
    );
    page.counter(
        &[
            "minisgl_generation_tokens_total",
            "vllm:generation_tokens_total",
            "sglang:generation_tokens_total",
        ],
        "Tokens generated",
        frontend.generated_tokens.load(Relaxed),
    );
    page.counter(
        &["minisgl_preemptions_total", "vllm:num_preemptions_total"],
        "Times that a running request had to give its pages up",
        scheduler.preemptions.load(Relaxed),
    );
    page.counter(&["minisgl_steps_total"], "Steps finished", scheduler.steps.load(Relaxed));
}

/// A page of metrics being written.
#[derive(Default)]
struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}.\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, value: impl Display) {
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn gauge(&mut self, names: &[&str], help: &str, value: impl Display) {
        for name in names {
            self.head(name, "gauge", help);
            self.sample(name, &value);
        }
    }

    fn counter(&mut self, names: &[&str], help: &str, value: u64) {
        for name in names {
            self.head(name, "counter", help);
            self.sample(name, value);
        }
    }

    fn histogram(&mut self, names: &[&str], help: &str, histogram: &Histogram) {
        let buckets: Vec<(f64, u64)> = histogram.cumulative().collect();
        let count = buckets.last().map_or(0, |&(_, count)| count);
        for name in names {
            self.head(name, "histogram", help);
            for (bound, count) in &buckets {
                let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_string() };
                self.sample(&format!("{name}_bucket{{le=\"{bound}\"}}"), count);
            }
            self.sample(&format!("{name}_sum"), histogram.sum());
            self.sample(&format!("{name}_count"), count);
        }
    }
}
