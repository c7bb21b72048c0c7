#!/usr/bin/env python3
"""Runs tests and benchmarks on a machine with NVIDIA GPUs, without Rust and without network.

`scripts/gpu_build.sh` makes what this runs. Each PART can be run by itself:

  tests        operations, collectives, and every tiny checkpoint on one card, two ranks included
  smollm2      a real model's tokens against those of Hugging Face, in float32 and bf16; the model is
               where the program keeps it, or comes from --smollm2
  memcheck     operations and half layers under compute-sanitizer
  racecheck    likewise: fewer and smaller cases, a process a family of kernels
  faults       a kernel that traps, a refused launch, no memory in flight and at start
  start        process start to ready, with an empty and with a filled kernel cache
  steps        decode steps and prefill
  operations   the parts of a step
  offline      the reference's offline benchmark, also without overlap, and where prompts ride along
  online       four loads on the server
  tp-tests     collectives and tiny checkpoints over all cards
  tp-exchange  sums over ranks by size, peer memory against NCCL
  tp-steps     steps of 14B over 1 and --tp ranks, and of a model of Llama 3.1 70B's shape
  tp-offline   the offline benchmark of the same
  tp-kill      a server whose rank 1 is stopped while clients read

`test`, `model`, `bench` and `tp` stand for the parts of each kind. Weights are made up, but smollm2's. A table goes to
standard output; OUT/gpu.json has the figures, added to those of earlier runs, OUT/gpu.log all that
the commands wrote. Ends with 1 if a part failed.
"""

import argparse
import ctypes
import glob
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "scripts" / "gpu_models"
GROUPS = {
    "test": ["tests", "memcheck", "racecheck", "faults"],
    "model": ["smollm2"],
    "bench": ["start", "steps", "operations", "offline", "online"],
    "tp": ["tp-tests", "tp-exchange", "tp-steps", "tp-offline", "tp-kill"],
}
# name, requests at once, requests, shared tokens, tokens in, tokens out
LOADS = [
    ("1 at a time", 1, 8, 0, 200, 128),
    ("64 at once", 64, 64, 0, 200, 64),
    ("512, 64 at a time", 64, 512, 0, 200, 128),
    ("1024, 256 at a time, shared prefix", 256, 1024, 800, 100, 128),
]

# A kernel's name in its source.
KERNEL = re.compile(
    r'extern "C" __global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\('
)

# Binaries, and tests of theirs: whose kernels have something in shared memory.
RACECHECKED = [
    ("ops", "linear_of_few_rows"),
    ("ops", "linear_of_some_dozens_of_rows"),
    ("ops", "linear_of_long_rows"),
    ("ops", "linear_of_large_matrices"),
    ("ops", "attention_of_mixed_rows"),
    ("ops", "attention_of_long_prompts"),
    ("ops", "attention_of_decodes"),
    ("ops", "decodes_over_shared_prefixes"),
    ("ops", "mixture_of_experts"),
    ("ops", "sampling"),
    ("ops", "logits_and_tokens_of_them"),
    ("ops", "decodes_of_layer_after_layer"),
    ("half_layers", "half_layers_are_the_sum_of_their_parts"),
]

# A process that takes a card's memory, all but so many bytes, until its input ends.
HOLD_MEMORY = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
context, address = ctypes.c_void_p(), ctypes.c_uint64()
free, total = ctypes.c_size_t(), ctypes.c_size_t()
ok = cuda.cuInit(0) == 0
ok = ok and cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
ok = ok and cuda.cuCtxSetCurrent(context) == 0
ok = ok and cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
size = ctypes.c_size_t(max(free.value - int(sys.argv[1]), 1))
ok = ok and cuda.cuMemAlloc_v2(ctypes.byref(address), size) == 0
print("held" if ok else "failed", flush=True)
sys.stdin.read()
"""


class Failed(Exception):
    """A part did not do what it should."""


def library_folders():
    """Where CUDA's libraries may lie: a toolkit's folders, and those of Python packages."""
    folders = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"]
    try:
        import nvidia

        for base in nvidia.__path__:
            folders += sorted(glob.glob(f"{base}/*/lib"))
    except ImportError:
        pass
    return [folder for folder in folders if os.path.isdir(folder)]


class Bench:
    def __init__(self, args):
        self.args = args
        self.out = pathlib.Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = open(self.out / "gpu.log", "a", buffering=1)
        self.results = {}
        if (self.out / "gpu.json").exists():
            self.results = json.loads((self.out / "gpu.json").read_text())
        self.temporary = tempfile.TemporaryDirectory()
        paths = [os.environ.get("LD_LIBRARY_PATH"), *library_folders()]
        self.env = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
            # Tests find their files by this.
            "CARGO_MANIFEST_DIR": str(ROOT / "crates" / "minisgl-engine"),
            "NCCL_NVLS_ENABLE": "0",
            "NCCL_RUNTIME_CONNECT": "0",
        }
        self.describe()

    def describe(self):
        commit = pathlib.Path(self.args.bin) / "commit"
        query = "--query-gpu=name,driver_version,memory.total"
        try:
            cards = subprocess.run(
                ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
            ).stdout.splitlines()
        except FileNotFoundError:
            cards = []
        self.memory_gib = int(re.search(r"(\d+) MiB", cards[0])[1]) / 1024 if cards else 0
        machine = {
            "commit": commit.read_text().strip() if commit.exists() else "unknown",
            "cards": cards,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        self.results["machine"] = machine
        self.row(f"{machine['date']}  {machine['commit']}  {', '.join(cards) or 'no GPU'}")

    def row(self, text):
        print(text, flush=True)
        self.log.write(text + "\n")

    def keep(self, part, value):
        self.results[part] = value
        (self.out / "gpu.json").write_text(json.dumps(self.results, indent=1))

    def kept(self, part):
        """What an earlier run found of a part, without a failure of it."""
        return {name: value for name, value in self.results.get(part, {}).items() if name != "failed"}

    def run(self, name, *arguments, env=None, timeout=None, prefix=()):
        """Runs a binary and returns its standard output; both streams go to the log."""
        command = [*prefix, str(pathlib.Path(self.args.bin) / name), *map(str, arguments)]
        self.log.write("$ " + " ".join(command) + "\n")
        timeout = timeout or self.args.timeout
        process = subprocess.Popen(
            command,
            env={**self.env, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            self.log.write(stacks(process.pid))
            # With all that it has started: a sanitizer runs the program.
            os.killpg(process.pid, signal.SIGKILL)
            self.written = "".join(process.communicate())
            self.log.write(self.written)
            raise Failed(f"{name} was not done in {timeout} s") from late
        self.written = out + errors
        self.log.write(self.written)
        if process.returncode != 0:
            lines = (errors or out).strip().splitlines()
            raise Failed(f"{name}: {lines[-1] if lines else f'ended with {process.returncode}'}")
        return out

    def bench(self, kind, model, *arguments, tp=1):
        ranks = ["--tp", tp] if tp > 1 else []
        command = ["bench", kind, "--json", "--dummy-weight", "--device", self.args.device]
        out = self.run("minisgl", *command, "--model", self.model(model), *ranks, *arguments)
        return json.loads(out)

    def model(self, name):
        """A folder with the model's configuration, and the tokenizer if there is one."""
        folder = pathlib.Path(self.temporary.name) / name
        if not folder.exists():
            folder.mkdir()
            shutil.copy(MODELS / name / "config.json", folder)
            if self.args.tokenizer:
                for file in pathlib.Path(self.args.tokenizer).glob("*token*"):
                    shutil.copy(file, folder)
        return folder

    # Tests.

    def cargo_tests(self, part, names, *only, env=None):
        counts = {}
        for name in names:
            started = time.time()
            out = self.run(name, "--nocapture", "--test-threads=1", *only, env=env)
            found = re.search(r"(\d+) passed; (\d+) failed", out)
            # A test that finds no card, or too few, says so and passes.
            skipped = re.findall(r"^.*skipped.*$", self.written, re.MULTILINE)
            counts[name] = {
                "passed": int(found[1]) - len(skipped),
                "skipped": skipped,
                "seconds": round(time.time() - started, 1),
            }
            self.row(
                f"  {name:<12} {counts[name]['passed']:>3} passed  {len(skipped):>2} skipped  "
                f"{counts[name]['seconds']:>6.1f} s"
            )
        self.keep(part, counts)

    def tests(self):
        self.cargo_tests("tests", ["ops", "half_layers", "collective", "cards"])
        self.cargo_tests("tests of models", ["models"], "a_card")

    def tp_tests(self):
        self.cargo_tests("tp-tests", ["collective", "cards"], "cards_of_their_own")

    def smollm2(self):
        """The tests of a real model, with the model in the program's own cache."""
        env = {"MINISGL_TEST_DEVICE": self.args.device}
        if self.args.smollm2:
            models = pathlib.Path(self.temporary.name) / "models"
            models.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.args.smollm2, models / "SmolLM2-135M-Instruct.Q4_1.gguf")
            env["MINISGL_CACHE"] = self.temporary.name
        self.cargo_tests("smollm2", ["real_model"], env=env)

    def memcheck(self):
        self.sanitize("memcheck", [("ops", ""), ("half_layers", "")], 590)

    def racecheck(self):
        # Our kernels, not the library's. The tool may count a kernel's barriers too low, of which none has
        # more than 64.
        files = (ROOT / "crates" / "minisgl-cuda" / "kernels").glob("*.cu")
        names = sorted({name for file in files for name in KERNEL.findall(file.read_text())})
        flags = ["--kernel-name", f"regex=^({'|'.join(names)})$", "--num-cuda-barriers", "64"]
        wanted = self.args.cases
        tests = [test for test in RACECHECKED if not wanted or test[1] in wanted]
        if not tests:
            raise Failed(f"no such test: {', '.join(wanted)}")
        self.sanitize("racecheck", tests, 100, *flags, env={"MINISGL_TEST_RACECHECK": "1"})

    def sanitize(self, tool, tests, limit, *flags, env=None):
        """Operations and half layers, but not collectives: kernels that wait for each other do not run
        one after the other, as the sanitizer has it."""
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not os.path.exists(found):
            raise Failed("compute-sanitizer is not there")
        prefix = [found, "--tool", tool, "--error-exitcode", "9", *flags]
        figures = {}
        for name, test in tests:
            started, why, what = time.time(), None, test or name
            try:
                self.run(name, "--test-threads=1", test, env=env, prefix=prefix, timeout=limit)
            except Failed as failed:
                why = str(failed)
            summary = re.search(r"SUMMARY: (.+)", self.written)
            if why or not summary:
                why = f"{why or 'nothing was checked'} ({summary[1] if summary else 'no summary'})"
            seconds = round(time.time() - started, 1)
            races = re.findall(r"[Rr]ace reported between \w+ access at (\w+)", self.written)
            found_in = {kernel: races.count(kernel) for kernel in races}
            if not why and not re.search(r"[1-9]\d* passed", self.written):
                why = "no test ran"
            elif not why and found_in:
                why = "races"
            figures[what] = {"failed": why, "races": found_in, "seconds": seconds}
            self.row(f"  {what:<40} {why or 'clean'}  {found_in or ''}  {seconds:>6.1f} s")
        self.keep(tool, figures)
        failed = [what for what, figure in figures.items() if figure["failed"]]
        if failed:
            raise Failed(f"not clean, or not done: {', '.join(failed)}")

    def faults(self):
        """Every fault ends the engine in order: clients are told, and the server ends with an error."""
        figures = {}
        for fault in ["trap", "launch", "memory"]:
            server = Server(self, self.args.models[0], env={"MINISGL_CUDA_FAULT": f"{fault}:300"})
            clients = [Client(server) for _ in range(4)]
            for client in clients:
                client.thread.join(60)
            told = time.time()
            health, code = server.health(), None
            while code is None and time.time() - told < 30:
                code = server.process.poll()
                time.sleep(0.05)
            figures[fault] = {
                "clients_with_an_error": sum(client.error is not None for client in clients),
                "text_before": min(client.chunks for client in clients) > 2,
                "an_error": clients[0].error,
                "health": health,
                "exit_code": code,
                "ended_after_s": round(time.time() - told, 2),
            }
            server.stop()
            self.row(f"  {fault:<8} " + json.dumps(figures[fault]))
        figures["start"] = self.start_without_memory()
        self.keep("faults", figures)
        for fault in ["trap", "launch", "memory"]:
            found = figures[fault]
            told = found["clients_with_an_error"] == 4 and found["text_before"]
            # The server may have ended by the time that its health is asked for.
            if not (told and found["health"] in (503, None) and found["exit_code"] == 1):
                raise Failed(f"{fault}: not every client was told, or the server did not end")

    def start_without_memory(self):
        """What a start says when another process has all memory but so many MiB."""
        said = {}
        for left, expected in [(4096, "KV pages"), (1024, "the weights do not fit")]:
            holder = subprocess.Popen(
                [sys.executable, "-c", HOLD_MEMORY, str(left << 20)],
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                if holder.stdout.readline().strip() != "held":
                    raise Failed("the card's memory could not be taken")
                pages = ["--num-pages", 1_000_000] if left == 4096 else []
                try:
                    self.bench("steps", self.args.models[0], "--batch", 1, *pages)
                except Failed as why:
                    said[f"{left} MiB left"] = str(why)
                else:
                    raise Failed(f"a start with {left} MiB left did not fail")
            finally:
                holder.stdin.close()
                holder.wait(30)
            self.row(f"  start    {said[f'{left} MiB left']}")
            if expected not in said[f"{left} MiB left"]:
                raise Failed(f"the message does not say '{expected}'")
        return said

    # Benchmarks on one card.

    def start(self):
        figures = {}
        for model in self.args.models:
            cache = tempfile.mkdtemp(dir=self.temporary.name)
            for state in ["empty", "filled"]:
                server = Server(self, model, env={"XDG_CACHE_HOME": cache})
                figures[f"{model}, {state} cache"] = {"wall_s": server.wall, "own_s": server.own}
                server.stop()
                self.row(f"  {model:<12} {state:<7} cache  ready after {server.wall:>6.2f} s")
        self.keep("start", figures)

    def print_steps(self, name, figures):
        for step in figures["decode"]:
            self.row(f"  {name:<24} decode batch {step['batch']:>4}  {step['step_ms']:>9.3f} ms")
        if figures["prefill"]:
            rate = figures["prefill"]["tokens_per_s"]
            self.row(f"  {name:<24} prefill            {rate:>9.0f} tokens/s")

    def steps(self):
        figures = {}
        for model in self.args.models:
            figures[model] = self.bench("steps", model)
            self.print_steps(model, figures[model])
        self.keep("steps", figures)

    def operations(self):
        shapes = [model.removeprefix("qwen3-") for model in self.args.models]
        out = self.run("decode_step", *shapes)
        self.row(out.rstrip())
        self.keep("operations", out.splitlines())

    def print_offline(self, name, figures):
        self.row(
            f"  {name:<24} {figures['tokens_per_s']:>9.0f} tokens/s  {figures['seconds']:>7.2f} s"
        )

    def offline(self):
        figures = {}
        ways = {
            "": [],
            ", no overlap": ["--disable-overlap"],
            ", mixed": ["--schedule-policy", "lof", "--max-mixed-tokens", "256"],
        }
        for model in self.args.models:
            for way, flags in ways.items():
                figures[model + way] = self.bench("offline", model, *flags)
                self.print_offline(model + way, figures[model + way])
        self.keep("offline", figures)

    def online(self):
        if not self.args.tokenizer:
            raise Failed("the server needs --tokenizer")
        figures = {}
        for model in self.args.models:
            server = Server(self, model)
            self.load(server, 8, 8, 0, 50, 16, seed=99)
            for seed, (name, *sizes) in enumerate(LOADS):
                found = figures[f"{model}, {name}"] = self.load(server, *sizes, seed=seed)
                first, between = found["ttft_ms"], found["inter_token_ms"]
                self.row(
                    f"  {model:<12} {name:<36} {found['output_tokens_per_s']:>8.0f} tokens/s  "
                    f"TTFT {first['p50']:.1f} / {first['p99']:.1f} ms  "
                    f"between {between['p50']:.2f} / {between['p99']:.2f} ms"
                )
            server.stop()
        self.keep("online", figures)

    def load(self, server, at_once, requests, shared, tokens_in, tokens_out, seed):
        flags = {
            "--base-url": server.url,
            "--concurrency": at_once,
            "--num-requests": requests,
            "--shared-prefix-len": shared,
            "--input-len": tokens_in,
            "--output-len": tokens_out,
            "--seed": seed,
        }
        flat = [word for pair in flags.items() for word in pair]
        found = json.loads(self.run("minisgl", "bench", "serve", "--json", *flat))
        if found["failed"]:
            raise Failed(f"{found['failed']} requests failed: {found['errors']}")
        return found

    # Several cards.

    def tp_models(self):
        """What is run over several ranks, with what fits beside 70B's weights."""
        tp = self.args.tp
        small = self.memory_gib * tp < 200
        short = ["--steps", 64, "--prefill-prompts", 8]
        large = ["--max-seq-len-override", 4096]
        large += ["--batch", "1,16,32" if small else "1,64,256"]
        fourteen = ["--batch", "1,64,256"]
        cases = [
            ("qwen3-14b", 1, fourteen + short),
            ("qwen3-14b", tp, fourteen + short),
            ("llama-3.1-70b", tp, large + short),
        ]
        wanted = self.args.cases
        return [case for case in cases if not wanted or f"{case[0]}/{case[1]}" in wanted]

    def tp_exchange(self):
        out = self.run("exchange", self.args.tp, "--json")
        found = json.loads(out)
        self.row(f"  {'bytes':>9}  {'peers':>9}  {'NCCL':>9}   µs a sum over {found['ranks']} ranks")
        for index, size in enumerate(found["bytes"]):
            times = [found[way] for way in ("peers_us", "nccl_us")]
            cells = [f"{time[index]:.2f}" if isinstance(time, list) else "-" for time in times]
            self.row(f"  {size:>9}  {cells[0]:>9}  {cells[1]:>9}")
        for way in ("peers_us", "nccl_us"):
            if isinstance(found[way], str):
                self.row(f"  {way}: {found[way]}")
        self.keep("tp-exchange", found)

    def tp_steps(self):
        figures = self.kept("tp-steps")
        for model, tp, flags in self.tp_models():
            name = f"{model} over {tp}"
            figures[name] = self.bench("steps", model, *flags, tp=tp)
            self.print_steps(name, figures[name])
            self.keep("tp-steps", figures)

    def tp_offline(self):
        figures = self.kept("tp-offline")
        for model, tp, flags in self.tp_models():
            name = f"{model} over {tp}"
            length = flags[:2] if "--max-seq-len-override" in flags else []
            length += ["--output-len", "100..300"]
            figures[name] = self.bench("offline", model, *length, tp=tp)
            self.print_offline(name, figures[name])
            self.keep("tp-offline", figures)

    def tp_kill(self):
        """Stops rank 1's thread in a server that answers, as if it hung: the others find out."""
        if not self.args.tokenizer:
            raise Failed("the server needs --tokenizer")
        limit = 10
        flags = ["--tp", self.args.tp, "--rank-timeout", limit]
        server = Server(self, self.args.models[0], *flags)
        clients = [Client(server) for _ in range(8)]
        deadline = time.time() + 60
        while not all(client.chunks > 2 for client in clients):
            if time.time() > deadline:
                raise Failed("the clients had no text before rank 1 was stopped")
            time.sleep(0.05)
        started = time.time()
        rank = stop_thread(server.process.pid, "rank-1")
        health = None
        while time.time() - started < 60 and server.process.poll() is None and health != 503:
            health = server.health()
            time.sleep(0.05)
        noticed = time.time() - started
        for client in clients:
            client.thread.join(60)
        code = None
        while code is None and time.time() - started < 120:
            reap(rank)
            code = server.process.poll()
            time.sleep(0.05)
        figures = {
            "limit_s": limit,
            "clients": len(clients),
            "clients_with_an_error": sum(client.error is not None for client in clients),
            "an_error": clients[0].error,
            "health": health,
            "health_after_s": round(noticed, 2),
            "exit_code": code,
            "ended_after_s": round(time.time() - started, 2),
            "left_running": code is None,
        }
        server.stop()
        self.row("  " + json.dumps(figures))
        self.keep("tp-kill", figures)
        told = figures["clients_with_an_error"] == len(clients)
        if not (told and health == 503 and code not in (None, 0)):
            raise Failed("not every client was told, or the server did not end as it should")


class Server:
    """`minisgl serve` on a free port, ready."""

    def __init__(self, bench, model, *flags, env=None):
        if not bench.args.tokenizer:
            raise Failed("the server needs --tokenizer")
        command = [str(pathlib.Path(bench.args.bin) / "minisgl"), "serve", "--port", "0"]
        command += ["--dummy-weight", "--device", bench.args.device]
        command += ["--model", str(bench.model(model)), *map(str, flags)]
        bench.log.write("$ " + " ".join(command) + "\n")
        started = time.time()
        self.process = subprocess.Popen(
            command,
            env={**bench.env, **(env or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ready = None
        while ready is None:
            line = self.process.stderr.readline()
            bench.log.write(line)
            if not line:
                raise Failed(f"the server ended with {self.process.wait()}")
            ready = re.search(r"Ready after ([\d.]+) s: (\S+)", line)
        self.wall = round(time.time() - started, 2)
        self.own, self.url = float(ready[1]), ready[2]
        self.address = self.url.removeprefix("http://")
        self.reader = threading.Thread(target=self.drain, args=(bench.log,), daemon=True)
        self.reader.start()

    def drain(self, log):
        for line in self.process.stderr:
            log.write(line)

    def health(self):
        connection = http.client.HTTPConnection(self.address, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.reader.join(5)


class Client:
    """Reads a long answer as a stream."""

    def __init__(self, server):
        self.server, self.chunks, self.error = server, 0, None
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        body = {"prompt": "one two three", "max_tokens": 30000, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection(self.server.address, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            for line in connection.getresponse():
                text = line.decode().strip().removeprefix("data: ")
                if '"error"' in text:
                    self.error = text
                elif text:
                    self.chunks += 1
        except (OSError, http.client.HTTPException):
            # A connection that is cut has told the client nothing.
            pass


def stacks(process):
    """Where a process's threads are, if there is a program that tells."""
    if not shutil.which("eu-stack"):
        return "no eu-stack (elfutils) to tell where it hangs\n"
    asked = ["timeout", "60", "eu-stack", "-p", str(process)]
    return subprocess.run(asked, capture_output=True, text=True).stdout


def stop_thread(process, name):
    """Stops one thread of a child, by its name; its id."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    seize, interrupt = 0x4206, 0x4207
    for task in os.listdir(f"/proc/{process}/task"):
        if pathlib.Path(f"/proc/{process}/task/{task}/comm").read_text().strip() == name:
            break
    else:
        raise Failed(f"the server has no thread {name}")
    for request in (seize, interrupt):
        if libc.ptrace(request, int(task), None, None) != 0:
            raise Failed(f"ptrace is not allowed here: {os.strerror(ctypes.get_errno())}")
    return int(task)


def reap(task):
    """A stopped thread that has died keeps its process from ending until this has seen it."""
    wait_for_threads = 0x40000000
    try:
        os.waitpid(task, os.WNOHANG | wait_for_threads)
    except ChildProcessError:
        pass


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="+", metavar="PART")
    parser.add_argument("--bin", default=ROOT / "target" / "gpu", help="what gpu_build.sh made")
    parser.add_argument("--out", default=ROOT / "target" / "gpu-results", help="for the results")
    parser.add_argument("--tokenizer", help="a folder with tokenizer.json, for parts with a server")
    parser.add_argument("--smollm2", help="SmolLM2-135M-Instruct.Q4_1.gguf, for the part of that name")
    parser.add_argument("--models", type=lambda text: text.split(","), help="of those in gpu_models")
    parser.add_argument("--tp", type=int, default=2, help="ranks of the parts with several cards")
    parser.add_argument(
        "--cases",
        type=lambda text: text.split(","),
        help="of tp-steps and tp-offline, as qwen3-14b/1,llama-3.1-70b/2; of racecheck, tests",
    )
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each command")
    parser.add_argument("--device", default="cuda", help="as minisgl's; cpu tries the script out")
    args = parser.parse_args()
    args.models = args.models or ["qwen3-0.6b", "qwen3-14b"]
    parts = [part for name in args.part for part in GROUPS.get(name, [name])]
    unknown = [part for part in parts if part not in sum(GROUPS.values(), [])]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    bench = Bench(args)
    failed = False
    for part in parts:
        started = time.time()
        bench.row(f"{part}")
        try:
            getattr(bench, part.replace("-", "_"))()
        except Failed as why:
            failed = True
            bench.row(f"  FAILED: {why}")
            bench.keep(part, {**bench.results.get(part, {}), "failed": str(why)})
        bench.row(f"  {time.time() - started:.0f} s")
    sys.exit(1 if failed else 0)


main()
