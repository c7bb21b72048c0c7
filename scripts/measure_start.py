#!/usr/bin/env python3
"""Measures how fast `minisgl serve` is ready, and what memory it holds then. Linux only.

    python3 scripts/measure_start.py target/dist/minisgl [flags of serve]

Each run starts the server, polls /health every 2 ms until it answers, asks for 50 tokens, and reads
the process's memory from /proc before and after. The model file is read once before, so that it is
in the page cache. Prints Markdown. Needs nothing but Python's own library.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

RUNS = 5
PORT = 18555
URL = f"http://127.0.0.1:{PORT}"


def resident_mb(pid):
    """Resident memory: the process's own, and pages of files (its code, the mapped model)."""
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").open())
    return [int(fields[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile", "VmHWM")]


def run(command):
    begun = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} has ended with {process.returncode}")
            try:
                urllib.request.urlopen(URL + "/health", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.002)
        ready = time.monotonic() - begun
        memory = resident_mb(process.pid)
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 50, "ignore_eos": True})
        request = urllib.request.Request(
            URL + "/v1/completions", body.encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).close()
        return [ready, *memory[:2], *resident_mb(process.pid)]
    finally:
        process.terminate()
        process.wait()


def main(binary, *flags):
    inspected = json.loads(subprocess.check_output([binary, "inspect", "--json"]))
    model = pathlib.Path(inspected["path"])
    weights = sum(tensor["bytes"] for tensor in inspected["tensors"]) / 1e6
    model.read_bytes()
    rows = [run([binary, "serve", "--port", str(PORT), *flags]) for _ in range(RUNS)]
    median = [statistics.median(column) for column in zip(*rows)]
    worst = max(row[0] for row in rows)
    print(f"| {model.name} | |\n|---|---|")
    print(f"| weights in the file | {weights:.1f} MB |")
    print(f"| ready, median and longest of {RUNS} | {median[0]:.2f} s, {worst:.2f} s |")
    print(f"| own memory, ready | {median[1]:.1f} MB |")
    print(f"| pages of files, ready | {median[2]:.1f} MB |")
    print(f"| own memory, after 50 tokens | {median[3]:.1f} MB |")
    print(f"| pages of files, after 50 tokens | {median[4]:.1f} MB |")
    print(f"| most at any time, while loading | {median[5]:.1f} MB |")


main(*sys.argv[1:])
