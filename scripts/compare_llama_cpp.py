#!/usr/bin/env python3
"""Compares minisgl's greedy text with llama.cpp's, of the same GGUF file on the same CPU.

Starts both servers on loopback, asks both to continue the same prompts, and prints as Markdown how
many of the tokens of each answer agree before the first that does not, and by how much llama.cpp
finds its own token likelier there (a difference of log-probabilities). Needs nothing but Python's
own library.

    python3 scripts/compare_llama_cpp.py --llama-server PATH --model FILE.gguf [--tokens 32]

What stands behind `--` is handed to llama.cpp's server.
"""

import argparse
import json
import subprocess
import time
import urllib.error
import urllib.request

# What follows these is hardly a choice, so that small differences in the numbers change nothing.
DETERMINED = [
    "Question: What is the capital of France?\nAnswer: Paris\n\n"
    "Question: What is the capital of Italy?\nAnswer:",
    "Question: What do bees make?\nAnswer:",
    "English: good morning\nFrench: bonjour\n\nEnglish: thank you\nFrench:",
    "The opposite of hot is cold. The opposite of big is",
    "Monday, Tuesday, Wednesday,",
    "Januar, Februar, März, April,",
    "2, 4, 6, 8, 10,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    '{"name": "Ada", "age": 36}\n{"name": "Alan", "age": 41}\n{"name":',
    "Twinkle, twinkle, little star, how I wonder",
]
# What follows these is open, and decided by differences near the rounding of activations.
OPEN = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colors are red,",
    "Die Hauptstadt von Deutschland ist",
    "La Tierra gira alrededor del",
    "Once upon a time, in a small village,",
    "My favourite animal is",
    "The most important invention of the 20th century was",
    "In the year 2050,",
    "To bake bread, you need",
]
PROMPTS = DETERMINED + OPEN


def post(url, path, body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


class Server:
    """A process that answers on loopback, ended with the block."""

    def __init__(self, command, port):
        self.command, self.url = command, f"http://127.0.0.1:{port}"

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.command[0]} has ended with {self.process.returncode}")
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=1) as response:
                    if response.status == 200:
                        return self
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        raise SystemExit(f"{self.command[0]} does not get ready")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def llama_cpp(server, prompt, count):
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False,
        "return_tokens": True, "n_probs": 20}
    answer = post(server.url, "/completion", body)
    tops = [{top["id"]: top["logprob"] for top in step["top_logprobs"]}
        for step in answer["completion_probabilities"]]
    return answer["tokens"], tops


def minisgl(server, prompt, count):
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": count}}
    return post(server.url, "/generate", body)["output_ids"]


def answers(command, port, ask, count):
    with Server(command, port) as server:
        return [ask(server, prompt, count) for prompt in PROMPTS]


def agreed(ours, theirs):
    """How many tokens agree, and by how much llama.cpp preferred its own where they part."""
    tokens, tops = theirs
    for at, (a, b) in enumerate(zip(ours, tokens)):
        if a != b:
            return at, f"{tops[at][b] - tops[at][a]:.2f}" if a in tops[at] else "?"
    return len(tokens), ""


def table(name, rows, count):
    print(f"| {name} | agree | parts by | agree, float32 | parts by |\n|---|---|---|---|---|")
    for prompt, columns in rows:
        cells = " | ".join(f"{at} | {margin}" for at, margin in columns)
        print(f"| {prompt.splitlines()[-1]} | {cells} |")
    whole = [sum(columns[i][0] >= count for _, columns in rows) for i in range(2)]
    print(f"| **to the end** | **{whole[0]} of {len(rows)}** | | **{whole[1]} of {len(rows)}** | |\n")


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--llama-server", required=True)
    args.add_argument("--minisgl", default="target/release/minisgl")
    args.add_argument("--model", required=True)
    args.add_argument("--tokens", type=int, default=32)
    args.add_argument("--port", type=int, default=18400)
    args.add_argument("llama_args", nargs="*")
    args = args.parse_args()
    theirs = answers([args.llama_server, "-m", args.model, "-c", "2048", "--device", "none",
        "--host", "127.0.0.1", "--port", str(args.port), *args.llama_args],
        args.port, llama_cpp, args.tokens)
    columns = []
    for dtype in ["auto", "float32"]:
        command = [args.minisgl, "serve", "--model", args.model, "--dtype", dtype, "--device", "cpu",
            "--max-seq-len-override", "2048", "--port", str(args.port + 1)]
        columns.append(answers(command, args.port + 1, minisgl, args.tokens))
    rows = [(prompt, [agreed(column[i], theirs[i]) for column in columns])
        for i, prompt in enumerate(PROMPTS)]
    ends = [len(tokens) for tokens, _ in theirs]
    assert min(ends) == max(ends) == args.tokens, f"an answer of llama.cpp ended early: {ends}"
    table("determined", rows[:len(DETERMINED)], args.tokens)
    table("open", rows[len(DETERMINED):], args.tokens)


if __name__ == "__main__":
    main()
