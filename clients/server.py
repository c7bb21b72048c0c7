"""Starts the servers that are tested, and ends them."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Where cargo puts its binaries, and where those who run the tests look for process ids.
BINARIES = pathlib.Path(os.environ["CLIENTS_BINARIES"])
RUN = pathlib.Path(os.environ["CLIENTS_RUN"])

MODEL = "SmolLM2-135M"
FAKE_MODEL = "tiny"
FAKE_ANSWER = "Hello, wörld! 🎉"
START_TIMEOUT_S = 120


class Server:
    """A process that serves HTTP on a loopback port, and says on which, behind the words given."""

    def __init__(self, command, words="http://"):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # Should these tests be killed, the script that runs them ends whoever has a file here.
        self.pid_file = RUN / f"{self.process.pid}.pid"
        self.pid_file.touch()
        self.said = []
        self.words = re.compile(words + r"([\d.]+:\d+)")
        self.address = None
        self.has_address = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        if not self.has_address.wait(START_TIMEOUT_S) or self.address is None:
            self.kill()
            raise RuntimeError(f"{command[0]} did not start:\n" + "".join(self.said))

    def _listen(self):
        for line in self.process.stdout:
            self.said.append(line)
            if self.address is None and (found := self.words.search(line)):
                self.address = found[1]
                self.has_address.set()
        self.has_address.set()

    @property
    def url(self):
        return f"http://{self.address}"

    @property
    def port(self):
        return int(self.address.rsplit(":", 1)[1])

    def get(self, path):
        """The JSON at a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def metric(self, name):
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        values = [line.rsplit(" ", 1) for line in lines if re.match(name + r"[{ ]", line)]
        assert values, f"no metric {name}"
        return sum(float(value) for _, value in values)

    def pages(self):
        """Pages of the KV cache that are free, that only the cache holds, and that there are."""
        names = ["_free", "_cached", ""]
        return tuple(int(self.metric(f"minisgl_kv_pages{name}")) for name in names)

    def resident_mib(self):
        """The process's memory; Linux."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def wait_until_idle(self, timeout_s=10):
        """Waits until no request runs or waits: what a client has left must not stay."""
        end = time.monotonic() + timeout_s
        while (load := self.get("/get_load")[0])["num_reqs"] > 0:
            assert time.monotonic() < end, f"requests that nobody waits for still run: {load}"
            time.sleep(0.02)

    def kill(self):
        """Ends the process at once, as a crash would."""
        self.process.kill()
        self._ended()

    def stop(self):
        """Ends the process as an operator would. It must go by itself, and without an error."""
        self.process.terminate()
        try:
            code = self.process.wait(45)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._ended()
        said = "".join(self.said)
        assert code == 0, f"the server ended with {code}:\n{said}"
        assert "panicked" not in said, said

    def _ended(self):
        self.process.wait()
        self.pid_file.unlink(missing_ok=True)


@contextlib.contextmanager
def minisgl(*flags, port=0):
    """`minisgl serve` with the default model on the CPU."""
    command = [BINARIES / "minisgl", "serve", "--device", "cpu", "--port", port]
    server = Server([*command, "--served-model-name", MODEL, *flags])
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@contextlib.contextmanager
def fake(answer=FAKE_ANSWER, **flags):
    """The server on an engine that gives every prompt the same answer, a token for each byte."""
    command = [BINARIES / "examples/fake_server", "--port=0", f"--answer={answer}"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    server = Server(command)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
