"""The `openai` package: chats with the real model."""

import math

import openai
import pytest
from server import MODEL

QUESTION = [{"role": "user", "content": "Name the largest ocean on Earth."}]


@pytest.fixture(scope="module")
def client(minisgl):
    return openai.OpenAI(base_url=f"{minisgl.url}/v1", api_key="none", max_retries=0)


def ask(client, messages=QUESTION, **fields):
    fields = {"max_tokens": 32, "temperature": 0, **fields}
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def test_models(client):
    [model] = client.models.list().data
    assert model.id == MODEL and model.max_model_len >= 2048
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client):
    answer = ask(client)
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert choice.message.role == "assistant" and "Pacific" in choice.message.content
    assert choice.finish_reason == "stop" and choice.logprobs is None
    usage = answer.usage
    assert 1 < usage.completion_tokens < 32
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_stream_says_the_same_as_one_piece(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends[-1] == "stop" and not any(ends[:-1])
    # Some clients read choices[0] of every chunk: the one without is only for who asks.
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_usage(client):
    whole = ask(client)
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and all(chunk.usage is None for chunk in chunks)
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_stream_helper_accumulates(client):
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, max_tokens=32, temperature=0, logprobs=True
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    [choice] = final.choices
    assert "".join(deltas) == choice.message.content and "Pacific" in choice.message.content
    assert len(choice.logprobs.content) > len(deltas) // 2


def test_chat_logprobs(client):
    choice = ask(client, logprobs=True, top_logprobs=5).choices[0]
    scores = choice.logprobs.content
    said = b"".join(bytes(score.bytes) for score in scores[:-1])
    assert said.decode() == choice.message.content and scores[-1].token == "<|im_end|>"
    for score in scores:
        # The answer is greedy: each token is the most likely one.
        assert (score.token, score.logprob) == (
            score.top_logprobs[0].token,
            score.top_logprobs[0].logprob,
        )
        values = [top.logprob for top in score.top_logprobs]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) < 1.0001


def test_n_and_seed(client):
    def sample(seed):
        answer = ask(client, n=4, seed=seed, temperature=1.0)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return answer, [choice.message.content for choice in answer.choices]

    answer, texts = sample(7)
    assert len(set(texts)) > 1, "choices sample independently"
    assert answer.usage.completion_tokens > 4
    assert answer.usage.prompt_tokens == ask(client).usage.prompt_tokens, "counted once"
    assert sample(7)[1] == texts and sample(8)[1] != texts

    streamed = [""] * 4
    for chunk in ask(client, n=4, seed=7, temperature=1.0, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_stop_and_length(client):
    whole = ask(client).choices[0].message.content
    assert " the Pacific" in whole
    for stop in ["the Pacific", ["nothing like it", "the Pacific"]]:
        choice = ask(client, stop=stop).choices[0]
        assert choice.finish_reason == "stop" and choice.stop_reason == "the Pacific"
        assert choice.message.content == whole.split("the Pacific")[0]
    streamed = ask(client, stop="the Pacific", stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.split("the Pacific")[0]
    for name in ["max_tokens", "max_completion_tokens"]:
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, **{name: 3}
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_biases_and_bounds(client, minisgl):
    first = ask(client, max_tokens=1, logprobs=True).choices[0].message.content
    [token] = tokens(client, " moon")
    forced = ask(client, max_tokens=3, logit_bias={str(token): 100}).choices[0]
    assert forced.message.content == " moon moon moon"
    [token] = tokens(client, first)
    banned = ask(client, max_tokens=1, logit_bias={str(token): -100}).choices[0]
    assert banned.message.content != first

    forever = ask(client, max_tokens=40, extra_body={"ignore_eos": True})
    assert forever.usage.completion_tokens == 40
    longer = ask(client, max_tokens=40, extra_body={"min_tokens": 30})
    assert longer.usage.completion_tokens >= 30
    [is_token] = tokens(client, " is")
    stopped = ask(client, extra_body={"stop_token_ids": [is_token]}).choices[0]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == is_token
    assert not stopped.message.content.rstrip().endswith("is")


def tokens(client, text):
    """The ids of a text."""
    answer = client.with_options(base_url=str(client.base_url).removesuffix("v1/")).post(
        "/tokenize", cast_to=object, body={"prompt": text, "add_special_tokens": False}
    )
    return answer["tokens"]


def test_roles_and_parts(client):
    system = {"role": "system", "content": "Be brief."}
    plain = ask(client, [system, {"role": "user", "content": "Name the largest\nocean on Earth."}])
    parts = [{"type": "text", "text": text} for text in ["Name the largest", "ocean on Earth."]]
    same = ask(client, [{**system, "role": "developer"}, {"role": "user", "content": parts}])
    assert same.usage.prompt_tokens == plain.usage.prompt_tokens
    assert same.choices[0].message.content == plain.choices[0].message.content


def test_continued_message(client):
    begun = [*QUESTION, {"role": "assistant", "content": "The largest ocean is the"}]
    continued = ask(client, begun, max_tokens=2, extra_body={"continue_final_message": True})
    assert continued.choices[0].message.content.startswith(" Pacific")


def test_second_turn_finds_the_first_in_the_cache(client):
    long = "Tell me about the sea. " * 20
    first = ask(client, [{"role": "user", "content": long}], max_tokens=8)
    said = first.choices[0].message.content
    turns = [{"role": "user", "content": long}, {"role": "assistant", "content": said}, *QUESTION]
    second = ask(client, turns, max_tokens=8)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 16 <= cached < second.usage.prompt_tokens
