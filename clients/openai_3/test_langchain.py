"""`langchain-openai` with the real model."""

import asyncio

import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from server import MODEL

QUESTION = "Name the largest ocean on Earth."


@pytest.fixture(scope="module")
def options(minisgl):
    return {
        "base_url": f"{minisgl.url}/v1",
        "api_key": "none",
        "model": MODEL,
        "temperature": 0,
        "max_retries": 0,
    }


@pytest.fixture(scope="module")
def chat(options):
    return ChatOpenAI(**options, max_tokens=32)


def test_invoke(chat):
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    assert isinstance(answer, AIMessage) and "Pacific" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == MODEL
    usage = answer.usage_metadata
    assert usage["input_tokens"] > 10 and 1 < usage["output_tokens"] < 32
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_stream_adds_up_to_the_answer(chat):
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    whole = chat.invoke(QUESTION)
    assert len(chunks) > 5 and total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert total.response_metadata["finish_reason"] == "stop"


def test_chain_and_batch(chat):
    prompt = ChatPromptTemplate.from_messages([("human", "Name the largest {thing} on Earth.")])
    chain = prompt | chat | StrOutputParser()
    answers = chain.batch([{"thing": thing} for thing in ["ocean", "desert", "ocean"]])
    assert "Pacific" in answers[0] and answers[2] == answers[0] != answers[1]


def test_async_stream(chat):
    async def text():
        return "".join([chunk.content async for chunk in chat.astream(QUESTION)])

    assert "Pacific" in asyncio.run(text())


def test_logprobs_and_stop(options):
    scored = ChatOpenAI(**options, max_tokens=4, logprobs=True, top_logprobs=2).invoke(QUESTION)
    scores = scored.response_metadata["logprobs"]["content"]
    assert "".join(score["token"] for score in scores) == scored.content
    assert all(len(score["top_logprobs"]) == 2 for score in scores)
    stopped = ChatOpenAI(**options, max_tokens=32).bind(stop=[" Pacific"]).invoke(QUESTION)
    assert stopped.content.endswith("the")


def test_completions(options):
    model = OpenAI(**options, max_tokens=4)
    prompt = "The sun rises in the east and sets in the"
    assert model.invoke(prompt).startswith(" west")
    # Two prompts in one request, which is how this class sends batches.
    result = model.generate([prompt, "Once upon a time, there was a little"])
    assert [len(choices) for choices in result.generations] == [1, 1]
    assert result.generations[0][0].text.startswith(" west")
    assert result.llm_output["token_usage"]["completion_tokens"] == 8


class Sea(pydantic.BaseModel, extra="forbid"):
    """A sea."""

    is_salty: bool


def test_tools_and_structured_output(options):
    chat = ChatOpenAI(**options, max_tokens=200)
    call = chat.bind_tools([Sea], tool_choice="any").invoke("Is the sea salty?").tool_calls[0]
    assert call["name"] == "Sea" and isinstance(call["args"]["is_salty"], bool)
    for method in ["json_schema", "function_calling"]:
        answer = chat.with_structured_output(Sea, method=method).invoke("Is the sea salty?")
        assert isinstance(answer, Sea), method
