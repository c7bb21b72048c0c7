#!/usr/bin/env python3
"""Serves chats on the CPU beside llama.cpp's server: start to first token, then eight at once.

    python3 scripts/bench_cpu_serve.py LLAMA_CPP/build/bin/llama-server MODEL.gguf [--rounds 3]

A round starts each server in turn, with two threads, and measures

- the time from its start to the end of an answer of one token, asked for every 5 ms until there is one,
- a closed loop of 8 streaming chats at once, 32 in all: about 200 tokens in, of which 150 are the same in
  all, 128 tokens out, greedy (`minisgl bench serve`).

Says so where others took more than 4 % of the processors during a load (Linux): its rates are then too low.
The file is read once before, so that it is in the page cache. Prints medians, and the medians of the
rounds' ratios with the lowest and the highest. Needs nothing but Python's own library.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import time
import urllib.error
import urllib.request

PORT = 18557
URL = f"http://127.0.0.1:{PORT}"
LOAD = ["--concurrency", "8", "--num-requests", "32", "--shared-prefix-len", "150", "--input-len", "50",
    "--output-len", "128"]
FIGURES = ["start to first token, ms", "tokens/s", "TTFT p50, ms", "between tokens p50, ms"]


def has_first_token():
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        URL + "/v1/completions", body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=60).close()
        return True
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
    except (urllib.error.URLError, OSError):
        pass
    return False


def seconds_of_others(server):
    """Of all processors, those that neither the server nor a child that has ended used; 0 if unknown."""
    try:
        times = list(map(int, pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]))
        own = pathlib.Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    except OSError:
        return 0.0
    idle = times[3] + times[4]
    ticks = sum(times) - idle - sum(map(int, own))
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ticks / os.sysconf("SC_CLK_TCK") - ended.ru_utime - ended.ru_stime


def measure(minisgl, command):
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not has_first_token():
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} has ended with {process.returncode}")
            time.sleep(0.005)
        started = time.monotonic() - begun
        used, begun = seconds_of_others(process.pid), time.monotonic()
        answer = subprocess.check_output(
            [minisgl, "bench", "serve", "--base-url", URL, "--json", *LOAD],
            stderr=subprocess.DEVNULL)
        used, took = seconds_of_others(process.pid) - used, time.monotonic() - begun
        if used > 0.04 * took * os.cpu_count():
            share = used / took / os.cpu_count()
            print(f"{pathlib.Path(command[0]).name}: others took {share:.0%} of the processors")
        load = json.loads(answer)
        assert load["output_tokens"] == load["answered"] * 128, load
        if load["failed"]:
            print(f"{pathlib.Path(command[0]).name}: {load['failed']} of 32 failed: {load['errors'][:1]}")
        return [started * 1e3, load["output_tokens_per_s"], load["ttft_ms"]["p50"],
            load["inter_token_ms"]["p50"]]
    finally:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("llama_server")
    args.add_argument("model")
    args.add_argument("--minisgl", default="target/dist/minisgl")
    args.add_argument("--rounds", type=int, default=3)
    args = args.parse_args()
    pathlib.Path(args.model).read_bytes()
    ours = [args.minisgl, "serve", "--device", "cpu", "--threads", "2", "--model", args.model,
        "--port", str(PORT)]
    theirs = [args.llama_server, "-m", args.model, "-t", "2", "-np", "8", "-c", "8192", "--host",
        "127.0.0.1", "--port", str(PORT)]
    rounds = [[measure(args.minisgl, command) for command in (ours, theirs)]
        for _ in range(args.rounds)]
    print("| | minisgl | llama.cpp | ratio |\n|---|---|---|---|")
    for i, name in enumerate(FIGURES):
        a, b = ([result[side][i] for result in rounds] for side in (0, 1))
        ratios = sorted(x / y for x, y in zip(a, b))
        print(f"| {name} | {statistics.median(a):.1f} | {statistics.median(b):.1f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main()
