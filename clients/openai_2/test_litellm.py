"""`litellm` with the real model: as a library, through its OpenAI-compatible providers."""

import asyncio

import litellm
import pydantic
import pytest
from server import MODEL

MESSAGES = [{"role": "user", "content": "Name the largest ocean on Earth."}]


@pytest.fixture(scope="module", params=["openai", "hosted_vllm"])
def options(request, minisgl):
    """Where the model is, for the providers that people name for such a server."""
    return {
        "model": f"{request.param}/{MODEL}",
        "api_base": f"{minisgl.url}/v1",
        "api_key": "none",
        "num_retries": 0,
    }


def test_chat(options):
    answer = litellm.completion(**options, messages=MESSAGES, temperature=0, max_tokens=32)
    assert "Pacific" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 10


def test_stream(options):
    whole = litellm.completion(**options, messages=MESSAGES, temperature=0, max_tokens=32)
    stream = litellm.completion(
        **options,
        messages=MESSAGES,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    built = litellm.stream_chunk_builder(list(stream), messages=MESSAGES)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == "stop"
    # What the server counted, not what this package would count itself.
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def test_async(options):
    async def together():
        ask = dict(**options, messages=MESSAGES, temperature=0, max_tokens=32)
        return await asyncio.gather(*[litellm.acompletion(**ask) for _ in range(4)])

    answers = asyncio.run(together())
    assert all("Pacific" in answer.choices[0].message.content for answer in answers)


def test_sampling_fields(options):
    answer = litellm.completion(
        **options, messages=MESSAGES, n=3, seed=5, temperature=1.0, max_tokens=8, top_p=0.9
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = litellm.completion(
        **options, messages=MESSAGES, n=3, seed=5, temperature=1.0, max_tokens=8, top_p=0.9
    )
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [choice.message.content for choice in again.choices]
    stopped = litellm.completion(
        **options, messages=MESSAGES, temperature=0, max_tokens=32, stop=[" Pacific"]
    )
    assert stopped.choices[0].message.content.endswith("the")


def test_text_completion(options, minisgl):
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=options["api_base"],
        api_key="none",
        prompt="The sun rises in the east and sets in the",
        temperature=0,
        max_tokens=4,
    )
    assert answer.choices[0].text.startswith(" west")


class Sea(pydantic.BaseModel, extra="forbid"):
    is_salty: bool


def test_structured_output(options):
    answer = litellm.completion(
        **options, messages=MESSAGES, temperature=0, max_tokens=100, response_format=Sea
    )
    Sea.model_validate_json(answer.choices[0].message.content)


def test_errors_are_told_apart(options):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**options, messages=MESSAGES, temperature=3)
    with pytest.raises(litellm.NotFoundError, match="gpt-17"):
        litellm.completion(**{**options, "model": "openai/gpt-17"}, messages=MESSAGES)
    long = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**options, messages=long)
