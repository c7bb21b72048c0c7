"""`lm-eval` with the real model in float32: what it scores and what it generates are what the
Hugging Face implementation does with the same weights (scripts/make_likelihood_reference.py)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import server as servers
from server import MODEL

TASKS = pathlib.Path(__file__).parent / "tasks"
# Of a continuation's log-likelihood, a sum over its tokens in float32.
TOLERANCE = 0.002


@pytest.fixture(scope="module")
def exact():
    with servers.minisgl("--dtype", "float32") as server:
        yield server


def evaluate(server, tokenizer, task, tmp_path):
    """Runs lm-eval's own command line, without a network. Its results, and its samples."""
    model = {
        "model": MODEL,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": tokenizer,
        "num_concurrent": 4,
        "max_length": 512,
    }
    arguments = ",".join(f"{name}={value}" for name, value in model.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", arguments, "--tasks", task, "--include_path", TASKS]
    command += ["--output_path", tmp_path, "--log_samples"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=TASKS,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [results] = tmp_path.rglob("results_*.json")
    [samples] = tmp_path.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][task], samples


def test_likelihoods(exact, tokenizer, tmp_path):
    results, samples = evaluate(exact, tokenizer, "minisgl_choices", tmp_path)
    assert results["acc,none"] == 1.0, "every question's likeliest choice is the reference's"
    assert len(samples) == 12
    for sample in samples:
        for (score, is_greedy), expected in zip(
            sample["filtered_resps"], sample["doc"]["likelihoods"], strict=True
        ):
            where = f"{sample['doc']['text']!r}: {score}, not {expected}"
            assert float(score) == pytest.approx(expected[0], abs=TOLERANCE), where
            assert json.loads(str(is_greedy).lower()) == expected[1], where


def test_generation(exact, tokenizer, tmp_path):
    results, samples = evaluate(exact, tokenizer, "minisgl_continuations", tmp_path)
    said = [(sample["filtered_resps"][0], sample["doc"]["continuation"]) for sample in samples]
    assert len(said) >= 8 and results["exact_match,none"] == 1.0, said
