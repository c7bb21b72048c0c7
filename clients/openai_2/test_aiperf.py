"""`aiperf` with the real model: all its requests succeed, and what it measures at its end of the
wire is what the server's metrics say."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import server as servers
from server import MODEL

REQUESTS = 20
CONCURRENCY = 4
OUTPUT_TOKENS = 16


@pytest.fixture(scope="module", params=["chat", "completions"])
def measured(request, tokenizer, tmp_path_factory):
    """What aiperf wrote: its own measurements, and the metrics it read from the server."""
    folder = tmp_path_factory.mktemp("aiperf")
    with servers.minisgl() as server:
        run(server, request.param, tokenizer, folder)
    [own] = folder.rglob("profile_export_aiperf.json")
    [metrics] = folder.rglob("server_metrics_export.json")
    return json.loads(own.read_text()), json.loads(metrics.read_text())["metrics"]


def run(server, endpoint, tokenizer, folder):
    options = {
        "model": MODEL,
        "tokenizer": tokenizer,
        "url": server.url,
        "endpoint-type": endpoint,
        "concurrency": CONCURRENCY,
        "request-count": REQUESTS,
        "synthetic-input-tokens-mean": 40,
        "synthetic-input-tokens-stddev": 0,
        "output-tokens-mean": OUTPUT_TOKENS,
        "extra-inputs": "ignore_eos:true",
        "output-artifact-dir": folder,
        "ui-type": "none",
    }
    command = [pathlib.Path(sys.executable).parent / "aiperf", "profile", "--streaming"]
    command += ["--use-server-token-count", "--no-gpu-telemetry"]
    for name, value in options.items():
        command += [f"--{name}", value]
    # Offline mode would have it look for the tokenizer's folder among downloaded models.
    online = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ran = subprocess.run(
        [str(part) for part in command],
        env={**online, "HF_HOME": str(folder / "hf")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_request_is_answered(measured):
    own, _ = measured
    assert own["is_complete"] and own["error_summary"] == []
    assert own["request_count"]["avg"] == REQUESTS
    assert own["output_sequence_length"]["min"] == OUTPUT_TOKENS
    assert own["output_sequence_length"]["max"] == OUTPUT_TOKENS
    assert own["request_throughput"]["avg"] > 0


def test_times(measured):
    """Tokens come one after another, not all at the end."""
    own, _ = measured
    first, whole = own["time_to_first_token"]["avg"], own["request_latency"]["avg"]
    assert 0 < first < whole
    gaps = own["inter_token_latency"]["avg"] * (OUTPUT_TOKENS - 1)
    assert first + gaps == pytest.approx(whole, rel=0.01)


def test_the_server_counted_the_same(measured):
    own, metrics = measured

    def total(name):
        return sum(series["stats"]["total"] for series in metrics[name]["series"])

    for prefix in ["minisgl_", "vllm:", "sglang:"]:
        assert total(f"{prefix}generation_tokens") == own["total_osl"]["avg"]
        assert total(f"{prefix}prompt_tokens") == own["total_isl"]["avg"]
    assert total("minisgl_requests") == REQUESTS
    [first] = metrics["minisgl_time_to_first_token_seconds"]["series"]
    assert first["stats"]["count"] == REQUESTS
    # The way to the client and back comes on top.
    assert 0 < 1000 * first["stats"]["avg"] < own["time_to_first_token"]["avg"]
    [running] = metrics["vllm:num_requests_running"]["series"]
    assert 0 < running["stats"]["max"] <= CONCURRENCY
