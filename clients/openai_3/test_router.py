"""`sglang-router` in front of two servers: requests with the same prefix stay together, and a
server that is killed is left out until it is back."""

import contextlib
import socket
import sys
import time

import openai
import pytest
import server as servers
from server import MODEL, Server

# How long the router may take to see that a server is gone or back; it looks every second.
NOTICE_TIMEOUT_S = 30


@contextlib.contextmanager
def router(*workers):
    options = {
        "host": "127.0.0.1",
        "port": free_port(),
        "prometheus-host": "127.0.0.1",
        "prometheus-port": free_port(),
        "policy": "cache_aware",
        "health-check-interval-secs": 1,
        "health-check-timeout-secs": 1,
        "health-failure-threshold": 1,
        "health-success-threshold": 1,
        "worker-startup-check-interval": 1,
        # One failure is enough for its retry to go elsewhere.
        "cb-failure-threshold": 1,
        "cb-success-threshold": 1,
        "cb-timeout-duration-secs": 1,
    }
    command = [sys.executable, "-m", "sglang_router.launch_router"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    server = Server(
        [*command, "--worker-urls", *[worker.url for worker in workers]], words="router on "
    )
    try:
        yield server
    finally:
        server.kill()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_workers(router, count):
    """Waits until the router counts on so many servers."""
    end = time.monotonic() + NOTICE_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            workers = router.get("/workers")["workers"]
            if sum(worker["is_healthy"] for worker in workers) == count:
                return
        assert time.monotonic() < end, "".join(router.said)
        time.sleep(0.1)


@pytest.fixture
def pair():
    with servers.minisgl() as first, servers.minisgl() as second:
        yield [first, second]


def messages(family, question):
    """A chat that begins as those of its family do, and as no other's."""
    text = f"{family} " + " ".join(f"{family}{place}" for place in range(40))
    return [{"role": "user", "content": f"{text} {question}"}]


class Asking:
    """Asks through the router, and tells which server answered."""

    def __init__(self, router, pair):
        self.client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)
        self.pair = pair

    def chat(self, family, question):
        """The server that answered a short chat, and how much of the prompt it had cached."""
        before = self._prompt_tokens()
        answer = self.client.chat.completions.create(
            model=MODEL, messages=messages(family, question), max_tokens=4
        )
        grown = [now - then for now, then in zip(self._prompt_tokens(), before)]
        assert sorted(grown) == [0, answer.usage.prompt_tokens]
        return grown.index(max(grown)), answer.usage.prompt_tokens_details.cached_tokens

    @contextlib.contextmanager
    def busy(self, family):
        """The server that is kept busy with a long answer meanwhile."""
        stream = self.client.chat.completions.create(
            model=MODEL,
            messages=messages(family, "?"),
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        [place] = [i for i, load in enumerate(self._loads()) if load == 1]
        yield place
        stream.close()
        self.pair[place].wait_until_idle()

    def _prompt_tokens(self):
        return [server.metric("minisgl_prompt_tokens_total") for server in self.pair]

    def _loads(self):
        return [server.get("/get_load")[0]["num_reqs"] for server in self.pair]


def test_same_prefixes_stay_together(pair):
    with router(*pair) as front:
        wait_for_workers(front, 2)
        asking = Asking(front, pair)
        with asking.busy("apple") as apples:
            pears, _ = asking.chat("pear", 0)
            assert pears != apples, "a new prefix goes where less is to do"
        for question in range(1, 5):
            for family, place in [("apple", apples), ("pear", pears)]:
                where, cached = asking.chat(family, question)
                assert where == place
                assert cached > 100, "its family's prompts are in that server's cache"


def test_a_killed_server_is_left_out_and_comes_back(pair):
    with router(*pair) as front:
        wait_for_workers(front, 2)
        asking = Asking(front, pair)
        with asking.busy("apple") as apples:
            pears, _ = asking.chat("pear", 0)
        killed, port = pair[apples], pair[apples].port
        killed.kill()
        # At once, before the router has looked: it asks the other one.
        text = {"model": MODEL, "max_tokens": 4, "extra_body": {"ignore_eos": True}}
        text["messages"] = messages("apple", 1)
        assert asking.client.chat.completions.create(**text).usage.completion_tokens == 4
        wait_for_workers(front, 1)
        for question in range(2, 6):
            text["messages"] = messages("apple", question)
            assert asking.client.chat.completions.create(**text).usage.completion_tokens == 4

        with servers.minisgl(port=port) as again:
            pair[apples] = again
            wait_for_workers(front, 2)
            with asking.busy("pear") as busy:
                assert busy == pears
                where, cached = asking.chat("plum", 0)
                assert where == apples and cached < 32
