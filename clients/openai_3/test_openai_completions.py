"""The `openai` package: text completions with the real model."""

import openai
import pytest
from server import MODEL

PROMPT = "The sun rises in the east and sets in the"


@pytest.fixture(scope="module")
def client(minisgl):
    return openai.OpenAI(base_url=f"{minisgl.url}/v1", api_key="none", max_retries=0)


def complete(client, prompt=PROMPT, **fields):
    fields = {"max_tokens": 8, "temperature": 0, **fields}
    return client.completions.create(model=MODEL, prompt=prompt, **fields)


def token_ids(client, text):
    answer = client.with_options(base_url=str(client.base_url).removesuffix("v1/")).post(
        "/tokenize", cast_to=object, body={"prompt": text}
    )
    return answer["tokens"]


def test_completion(client):
    answer = complete(client)
    assert answer.object == "text_completion" and answer.choices[0].text.startswith(" west")
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 8
    text = "".join(chunk.choices[0].text for chunk in complete(client, stream=True))
    assert text == answer.choices[0].text
    default = client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert default.usage.completion_tokens == 16, "OpenAI's default"


def test_prompts_as_texts_and_ids(client):
    other = "Once upon a time, there was a little"
    texts = [complete(client, prompt).choices[0].text for prompt in [PROMPT, other]]
    ids = [token_ids(client, prompt) for prompt in [PROMPT, other]]
    assert complete(client, ids[0]).choices[0].text == texts[0]
    for prompts in [[PROMPT, other], ids]:
        answer = complete(client, prompts)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == texts
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 16
    four = complete(client, [PROMPT, other], n=2)
    assert [choice.text for choice in four.choices] == [texts[0]] * 2 + [texts[1]] * 2


def test_logprobs(client):
    [choice] = complete(client, logprobs=3).choices
    scores = choice.logprobs
    assert "".join(scores.tokens) == choice.text
    assert scores.text_offset[0] == 0 and scores.text_offset[1] == len(scores.tokens[0])
    for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs):
        # Greedy: the token is among the three, and the most likely of them.
        assert len(top) == 3 and top[token] == logprob == max(top.values())


def test_echo_scores_the_prompt(client):
    answer = complete(client, echo=True, logprobs=1, max_tokens=0)
    [choice] = answer.choices
    scores = choice.logprobs
    assert choice.text == PROMPT and answer.usage.completion_tokens == 0
    assert len(scores.tokens) == answer.usage.prompt_tokens == len(token_ids(client, PROMPT))
    assert "".join(scores.tokens) == PROMPT
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert all(logprob < 0 for logprob in scores.token_logprobs[1:])

    # A prompt's scores are those that the same tokens have where they are generated.
    [generated] = complete(client, logprobs=1).choices
    [both] = complete(client, PROMPT + generated.text, echo=True, logprobs=1, max_tokens=0).choices
    echoed = both.logprobs.token_logprobs[-8:]
    assert both.logprobs.tokens[-8:] == generated.logprobs.tokens
    assert echoed == pytest.approx(generated.logprobs.token_logprobs, abs=0.15)


def test_echo_repeats_the_prompt_once(client):
    text = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + text
    streamed = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + text
