#!/usr/bin/env python3
"""Mixed traffic on one server for a long time: well-formed and not, patient and not.

    just soak [minutes]

Each minute it waits until all is answered and looks at the server: every page must be free or
cached, and memory must not grow. At the end it prints a table, and fails if anything was answered
as it should not be. Needs Linux, whose /proc tells a process's memory, and nothing else.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import random
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import server as servers  # noqa: E402
from wire import ask  # noqa: E402

WORKERS = 12
# Small, so that requests are preempted, prefixes evicted and the queue fills.
FLAGS = ["--num-pages=64", "--max-running-requests=8", "--max-queued-requests=24"]
REQUEST_TIMEOUT_S = 300
REQUESTS_MAX = 200_000
# How much higher memory may be at any later look than it was at this minute's.
GROWTH_MAX_MIB, STEADY_MINUTE = 16, 3

WORDS = "sea sky tree stone river cloud bird rain light night road hill wind fire snow".split()
SCHEMA = {
    "type": "object",
    "properties": {"salty": {"type": "boolean"}, "depth": {"enum": [1, 2, 3]}},
    "required": ["salty", "depth"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
# The same question again and again, whose answer must not change.
PROBE = {
    "messages": [{"role": "user", "content": "Name the largest ocean on Earth."}],
    "temperature": 0,
    "max_tokens": 8,
}


class Soak:
    def __init__(self, server, seed):
        self.server = server
        self.random = random.Random(seed)
        self.counts = collections.Counter()
        self.wrong = []
        self.probed = None
        self.running = asyncio.Event()
        self.busy = 0
        self.until = 0.0

    def ask(self, path, body=None, raw=None):
        return ask(self.server.port, path, body, raw)

    def words(self, count):
        return " ".join(self.random.choices(WORDS, k=count))

    def chat(self, **fields):
        content = self.words(self.random.choice([3, 10, 40, 150]))
        return {"messages": [{"role": "user", "content": content}], **self.sampling(), **fields}

    def text(self, **fields):
        return {"prompt": self.words(self.random.choice([3, 10, 60])), **self.sampling(), **fields}

    def sampling(self):
        return {
            "max_tokens": self.random.choice([1, 8, 32, 96]),
            "temperature": self.random.choice([0, 0.7, 1.5]),
            "seed": self.random.randrange(1 << 40),
        }

    # Each of these is one thing that a client does.

    async def answered(self, path, body, check=None):
        """An answer that must come, unless the queue is full."""
        answer = await self.ask(path, body)
        await answer.head()
        said = await answer.body()
        answer.writer.close()
        if answer.status == 503:
            assert answer.headers.get("retry-after"), answer.headers
            return "503, queue full"
        assert answer.status == 200, f"{answer.status}: {said[:300]!r}"
        if body.get("stream"):
            assert said.endswith(b"data: [DONE]\n\n"), said[-300:]
            # Not the word alone, which a model may say.
            assert b'data: {"error"' not in said, said[-300:]
        elif check:
            check(json.loads(said))
        return "200"

    async def whole_chat(self):
        return await self.answered(CHAT, self.chat(top_p=0.9, presence_penalty=0.5))

    async def streamed_chat(self):
        options = {"include_usage": True}
        return await self.answered(CHAT, self.chat(stream=True, stream_options=options))

    async def shared_prefix(self):
        family = " ".join([self.random.choice(WORDS)] * 200)
        messages = [{"role": "user", "content": f"{family} {self.words(5)}"}]
        return await self.answered(CHAT, self.chat(messages=messages, stream=True))

    async def several_choices(self):
        def check(answer):
            assert len(answer["choices"]) == 3, answer

        body = self.text(n=3, stop=["sea", "\n\n"], logprobs=2, logit_bias={"5": -100})
        return await self.answered(TEXT, body, check)

    async def scored_prompt(self):
        def check(answer):
            scores = answer["choices"][0]["logprobs"]["token_logprobs"]
            assert scores[0] is None and all(score < 0 for score in scores[1:]), scores

        return await self.answered(TEXT, self.text(echo=True, logprobs=1, max_tokens=0), check)

    async def bound_answer(self):
        def check(answer):
            choice = answer["choices"][0]
            if choice["finish_reason"] == "stop":
                assert json.loads(choice["message"]["content"])["depth"] in [1, 2, 3], choice

        form = {"type": "json_schema", "json_schema": {"name": "sea", "schema": SCHEMA}}
        return await self.answered(CHAT, self.chat(response_format=form, max_tokens=60), check)

    async def required_call(self):
        def check(answer):
            choice = answer["choices"][0]
            assert choice["finish_reason"] in ["tool_calls", "length"], choice

        body = self.chat(tools=[TOOL], tool_choice="required", max_tokens=80)
        return await self.answered(CHAT, body, check)

    async def native(self):
        params = {"max_new_tokens": 24, "temperature": 0.5, "regex": "[a-z ]+"}
        return await self.answered(
            NATIVE, {"text": self.words(8), "sampling_params": params, "stream": True}
        )

    async def tokens_and_back(self):
        def check(answer):
            assert answer["count"] == len(answer["tokens"]) > 0, answer

        return await self.answered("/tokenize", {"prompt": self.words(50)}, check)

    async def same_question(self):
        def check(answer):
            said = answer["choices"][0]["message"]["content"]
            self.probed = self.probed or said
            assert said == self.probed, f"{said!r}, and before {self.probed!r}"

        return await self.answered(CHAT, PROBE, check)

    async def refused(self):
        """What is wrong must be refused, with a message, and before anything else is said."""
        path, body, raw = self.random.choice(
            [
                (CHAT, None, b'{"messages": ['),
                (CHAT, None, b"[" * 10_000),
                (CHAT, self.chat(temperature=9), None),
                (CHAT, self.chat(messages=[]), None),
                (CHAT, self.chat(messages=[{"role": "king"}]), None),
                (CHAT, self.chat(regex="("), None),
                (CHAT, self.chat(max_tokens=10**9), None),
                (TEXT, self.text(prompt=[10**6]), None),
                (TEXT, self.text(prompt="sea " * 20_000), None),
                (TEXT, self.text(n=10**9), None),
                (NATIVE, {"text": 7}, None),
            ]
        )
        answer = await self.ask(path, body, raw)
        await answer.head()
        said = json.loads(await answer.body())
        answer.writer.close()
        assert answer.status == 400 and said["error"]["message"], f"{answer.status}: {said}"
        return "400, as it should be"

    async def leaves(self):
        """A client that goes away: at once, or after some pieces of its answer."""
        body = self.chat(stream=self.random.random() < 0.7, max_tokens=400, ignore_eos=True)
        answer = await self.ask(CHAT, body)
        patience = self.random.choice([0, 0.01, 0.1, 0.5, 2])
        try:
            async with asyncio.timeout(patience):
                await answer.head()
                await answer.body()
        except TimeoutError:
            pass
        answer.writer.transport.abort()
        return "left"

    async def reads_slowly(self):
        answer = await self.ask(CHAT, self.chat(stream=True, n=2))
        await answer.head()
        if answer.status == 503:
            return "503, queue full"
        async for _ in answer.pieces():
            await asyncio.sleep(0.05)
        answer.writer.close()
        return "200"

    async def storm(self):
        """Many at once on one prefix, all of whom leave."""
        body = self.chat(stream=True, max_tokens=400, ignore_eos=True)
        answers = [await self.ask(CHAT, body) for _ in range(40)]
        await asyncio.sleep(self.random.random())
        for answer in answers:
            answer.writer.transport.abort()
        return "left, 40 at once"

    async def looks(self):
        for path in ["/health", "/metrics", "/get_load", "/v1/models", "/openapi.json"]:
            answer = await self.ask(path)
            await answer.head()
            assert answer.status == 200 and await answer.body() is not None, path
            answer.writer.close()
        return "200"

    async def flushes(self):
        return await self.answered("/flush_cache", {})

    KINDS = {
        whole_chat: 10,
        streamed_chat: 20,
        shared_prefix: 15,
        several_choices: 8,
        scored_prompt: 6,
        bound_answer: 8,
        required_call: 6,
        native: 6,
        tokens_and_back: 4,
        same_question: 8,
        refused: 12,
        leaves: 15,
        reads_slowly: 3,
        storm: 1,
        looks: 3,
        flushes: 1,
    }

    async def work(self):
        kinds, weights = list(self.KINDS), list(self.KINDS.values())
        while time.monotonic() < self.until and self.counts.total() < REQUESTS_MAX:
            await self.running.wait()
            [kind] = self.random.choices(kinds, weights)
            self.busy += 1
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    ended = await kind(self)
            except Exception as error:
                ended = "WRONG"
                self.wrong.append(f"{kind.__name__}: {type(error).__name__} {error}")
            self.busy -= 1
            self.counts[kind.__name__, ended] += 1

    async def rest(self):
        """Waits until all is answered; what the server holds then."""
        self.running.clear()
        while self.busy:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.server.wait_until_idle, 30)
        metric = self.server.metric
        free, cached, pages = self.server.pages()
        if free + cached != pages:
            self.wrong.append(f"{free} pages free and {cached} cached are not {pages}")
        status = pathlib.Path(f"/proc/{self.server.process.pid}/status").read_text()
        threads = int(re.search(r"Threads:\s+(\d+)", status)[1])
        files = len(list(pathlib.Path(f"/proc/{self.server.process.pid}/fd").iterdir()))
        return {
            "resident_mib": self.server.resident_mib(),
            "threads": threads,
            "files": files,
            "free": free,
            "cached": cached,
            "requests": self.counts.total(),
            "tokens": int(metric("minisgl_generation_tokens_total")),
            "preemptions": int(metric("minisgl_preemptions_total")),
        }

    async def run(self, minutes):
        begun = time.monotonic()
        self.until = begun + minutes * 60
        workers = [asyncio.create_task(self.work()) for _ in range(WORKERS)]
        rests = []
        for minute in range(1, minutes + 1):
            self.running.set()
            await asyncio.sleep(max(0, begun + minute * 60 - time.monotonic()))
            rests.append(await self.rest())
            show(minute, rests[-1])
            if self.counts.total() >= REQUESTS_MAX:
                break
        self.running.set()
        await asyncio.gather(*workers)
        await self.answered("/flush_cache", {})
        last = await self.rest()
        if last["free"] != self.server.pages()[2]:
            self.wrong.append(f"an empty cache leaves {last['free']} pages free")
        resident = [rest["resident_mib"] for rest in rests]
        steady = min(STEADY_MINUTE, len(resident)) - 1
        grown = max(resident[steady:]) - resident[steady]
        if grown > GROWTH_MAX_MIB:
            self.wrong.append(f"memory grew by {grown:.1f} MiB behind minute {STEADY_MINUTE}")
        print(f"\nMemory grew by {grown:.1f} MiB behind minute {STEADY_MINUTE}.\n")


def show(minute, rest):
    if minute == 1:
        columns = ["minute", "resident, MiB", "threads", "files", "pages free", "cached"]
        columns += ["clients so far", "tokens", "preemptions"]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    values = [minute, f"{rest['resident_mib']:.1f}", *list(rest.values())[1:]]
    print("| " + " | ".join(map(str, values)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with servers.minisgl(*FLAGS) as server:
        soak = Soak(server, args.seed)
        asyncio.run(soak.run(args.minutes))
    print("| what clients did | how it ended | how often |\n|---|---|---|")
    for (kind, ended), count in sorted(soak.counts.items()):
        print(f"| {kind.replace('_', ' ')} | {ended} | {count} |")
    print(f"\n{soak.counts.total()} in all; the server ended by itself on SIGTERM, without an error.")
    print("\n".join(soak.wrong[:50]))
    sys.exit(1 if soak.wrong else 0)


if __name__ == "__main__":
    main()
