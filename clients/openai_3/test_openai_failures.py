"""The `openai` package when something goes wrong: refusals, retries, timeouts, clients that go."""

import asyncio
import threading
import time

import openai
import pytest
import server as servers
from server import FAKE_ANSWER, FAKE_MODEL, MODEL

MESSAGES = [{"role": "user", "content": "Name the largest ocean on Earth."}]
LONG = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}


def connect(server, **options):
    options = {"api_key": "none", "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


@pytest.fixture(scope="module")
def narrow():
    """A server on which one request runs and one waits, for those who have its key."""
    flags = ["--max-running-requests", 1, "--max-queued-requests", 1, "--api-key", "sesame"]
    with servers.minisgl(*flags) as server:
        yield server


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"900000": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
    ],
)
def test_bad_requests_name_the_field(minisgl, fields, param):
    with pytest.raises(openai.BadRequestError) as raised:
        connect(minisgl).chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})
    assert raised.value.param == param and param in raised.value.message
    assert raised.value.type == "invalid_request_error"


def test_unknown_model(minisgl):
    for ask in [
        lambda: connect(minisgl).models.retrieve("gpt-17"),
        lambda: connect(minisgl).chat.completions.create(model="gpt-17", messages=MESSAGES),
    ]:
        with pytest.raises(openai.NotFoundError) as raised:
            ask()
        assert raised.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_too_long(minisgl, stream):
    long = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(openai.BadRequestError) as raised:
        connect(minisgl).chat.completions.create(model=MODEL, messages=long, stream=stream)
    assert raised.value.code == "context_length_exceeded"


def test_key(narrow):
    with pytest.raises(openai.AuthenticationError) as raised:
        connect(narrow, api_key="open").models.list()
    assert raised.value.code == "invalid_api_key"
    assert connect(narrow, api_key="sesame").models.list().data


def test_overload_is_retried(narrow):
    client = connect(narrow, api_key="sesame")
    ask = dict(model=MODEL, messages=MESSAGES)
    running = client.chat.completions.create(**ask, stream=True, **LONG)
    next(iter(running))
    waiting = threading.Thread(target=client.chat.completions.create, kwargs={**ask, "max_tokens": 1})
    waiting.start()
    while narrow_load(narrow)["num_reqs"] < 2:
        time.sleep(0.01)
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(**ask, max_tokens=1)
    assert raised.value.status_code == 503 and raised.value.code == "overloaded"
    assert float(raised.value.response.headers["retry-after"]) > 0

    # The package's own retries wait as long as the server asks them to, and then succeed.
    threading.Timer(0.5, running.close).start()
    patient = client.with_options(max_retries=3).chat.completions.with_raw_response
    answer = patient.create(**ask, max_tokens=1)
    assert answer.retries_taken >= 1 and answer.parse().usage.completion_tokens == 1
    waiting.join()


def narrow_load(server):
    """The load of a server that asks for a key."""
    return connect(server, api_key="sesame").with_options(base_url=server.url).get(
        "/get_load", cast_to=object
    )[0]


def test_client_that_leaves_frees_its_place(minisgl):
    stream = connect(minisgl).chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, n=4, **LONG
    )
    next(iter(stream))
    assert minisgl.get("/get_load")[0]["num_reqs"] == 4
    stream.close()
    minisgl.wait_until_idle()


def test_timeout(minisgl):
    with pytest.raises(openai.APITimeoutError):
        connect(minisgl, timeout=0.5).chat.completions.create(model=MODEL, messages=MESSAGES, **LONG)
    minisgl.wait_until_idle()


def test_many_streams_at_once(fake):
    """200 streams of an answer whose tokens are single bytes: none mixed up, no character cut."""

    async def one(client, index):
        messages = [{"role": "user", "content": f"{index}: hello"}]
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model=FAKE_MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        ):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            usage = chunk.usage or usage
        return text, usage.completion_tokens

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key="none") as client:
            return await asyncio.gather(*[one(client, index) for index in range(200)])

    # The end-of-sequence token counts, and has no text.
    assert set(asyncio.run(all_of_them())) == {(FAKE_ANSWER, len(FAKE_ANSWER.encode()) + 1)}


def test_async_answers_of_a_batch_are_those_of_single_requests(minisgl):
    async def ask(client):
        return await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=16, temperature=0
        )

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{minisgl.url}/v1", api_key="none") as client:
            return await asyncio.gather(*[ask(client) for _ in range(16)])

    answers = asyncio.run(together())
    assert all("Pacific" in answer.choices[0].message.content for answer in answers)
    assert len({answer.id for answer in answers}) == 16
