"""The `openai` package: functions that the model calls, and answers that are bound to a form."""

import asyncio
import enum
import json

import openai
import pydantic
import pytest
import server as servers
from server import FAKE_MODEL, MODEL

# What a model of the Hermes and Qwen family writes, and a template that asks for it.
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n'
    '</tool_call>\n<tool_call>\n{"name": "season", "arguments": {}}\n</tool_call>'
)
TEMPLATE = (
    "{% if tools %}Answer within <tool_call></tool_call>.{% for t in tools %}{{ t | tojson }}"
    "{% endfor %}{% endif %}{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{% endfor %}<|turn|>assistant "
)
QUESTION = [{"role": "user", "content": "How is the weather in Köln?"}]


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: str
    days: int


class Ocean(enum.Enum):
    PACIFIC = "Pacific"
    ATLANTIC = "Atlantic"


class Answer(pydantic.BaseModel):
    largest_ocean: Ocean
    is_salty: bool


WEATHER = openai.pydantic_function_tool(Weather, name="weather")
SEASON = {"type": "function", "function": {"name": "season", "parameters": {"type": "object"}}}


def connect(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def caller():
    """The `openai` package on a server whose engine always calls two functions."""
    with servers.fake(answer=CALLS, template=TEMPLATE) as server:
        yield connect(server)


@pytest.fixture(scope="module")
def client(minisgl):
    return connect(minisgl)


def check_calls(message):
    assert message.content == "Let me see.\n"
    first, second = message.tool_calls
    assert (first.type, first.function.name, second.function.name) == ("function", "weather", "season")
    assert json.loads(first.function.arguments) == {"city": "Köln", "days": 2}
    assert json.loads(second.function.arguments) == {} and first.id != second.id


def test_calls_are_found_in_the_models_own_form(caller):
    ask = dict(model=FAKE_MODEL, messages=QUESTION, tools=[WEATHER, SEASON])
    [choice] = caller.chat.completions.create(**ask).choices
    assert choice.finish_reason == "tool_calls"
    check_calls(choice.message)
    [choice] = caller.chat.completions.create(**ask, tool_choice="none").choices
    assert choice.finish_reason == "stop" and choice.message.content == CALLS
    assert choice.message.tool_calls is None


def test_calls_are_streamed_as_the_package_expects(caller):
    ask = dict(model=FAKE_MODEL, messages=QUESTION, tools=[WEATHER, SEASON])
    with caller.chat.completions.stream(**ask) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [event.name for event in done] == ["weather", "season"]
    [choice] = final.choices
    assert choice.finish_reason == "tool_calls"
    check_calls(choice.message)
    # The package makes an object of the strict function's arguments.
    assert choice.message.tool_calls[0].function.parsed_arguments == Weather(city="Köln", days=2)


def test_arguments_come_while_they_are_generated():
    """Each token takes 2 ms: name and id first, then the arguments piece by piece."""
    with servers.fake(answer=CALLS, template=TEMPLATE, step_us=2000) as server:
        client = connect(server)
        ask = dict(model=FAKE_MODEL, messages=QUESTION, tools=[WEATHER, SEASON])
        with client.chat.completions.stream(**ask) as stream:
            events = [event for event in stream if event.type.startswith("tool_calls")]
        pieces = [event for event in events if event.type.endswith("delta") and event.index == 0]
        assert len(pieces) > 10 and pieces[3].parsed_arguments != pieces[-1].parsed_arguments
        deltas = [
            call
            for chunk in client.chat.completions.create(**ask, stream=True)
            for call in chunk.choices[0].delta.tool_calls or []
        ]
    begun = [(call.index, call.function.name, call.type) for call in deltas if call.id]
    assert begun == [(0, "weather", "function"), (1, "season", "function")]
    for index, arguments in enumerate(['{"city": "Köln", "days": 2}', "{}"]):
        first, *rest = [call for call in deltas if call.index == index]
        assert first.function.arguments == "" and rest
        assert all(call.function.name is None and call.type is None for call in rest)
        assert "".join(call.function.arguments for call in rest) == arguments


def test_results_go_back_to_the_model(caller):
    ask = dict(model=FAKE_MODEL, tools=[WEATHER, SEASON])
    [choice] = caller.chat.completions.create(**ask, messages=QUESTION).choices
    turns = [*QUESTION, choice.message.model_dump(exclude_none=True)]
    for call in choice.message.tool_calls:
        turns.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    assert caller.chat.completions.create(**ask, messages=turns).choices[0].message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_the_real_model_calls_what_it_must(client, choice, stream):
    ask = dict(
        model=MODEL,
        messages=QUESTION,
        tools=[WEATHER],
        tool_choice=choice,
        temperature=0,
        max_tokens=200,
    )
    if stream:
        with client.chat.completions.stream(**ask) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.parse(**ask)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert call.function.name == "weather"
    assert isinstance(call.function.parsed_arguments, Weather)


@pytest.mark.parametrize("stream", [False, True])
def test_the_real_model_answers_in_the_form_of_a_class(client, stream):
    messages = [{"role": "user", "content": "Which ocean is the largest, and is it salty?"}]
    ask = dict(model=MODEL, messages=messages, response_format=Answer, temperature=0)
    if stream:
        with client.chat.completions.stream(**ask) as events:
            [choice] = events.get_final_completion().choices
    else:
        [choice] = client.chat.completions.parse(**ask).choices
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Answer)


def test_the_real_model_follows_other_forms(client):
    def ask(**fields):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32, **fields
        )
        assert answer.choices[0].finish_reason == "stop", answer
        return answer.choices[0].message.content

    # The model's own objects are long: this one would close braces only, and may close one.
    [brace] = client.with_options(base_url=str(client.base_url).removesuffix("v1/")).post(
        "/tokenize", cast_to=object, body={"prompt": "}", "add_special_tokens": False}
    )["tokens"]
    form = {"type": "json_object"}
    assert ask(response_format=form, logit_bias={str(brace): 100}) == "{}"
    assert ask(extra_body={"regex": "(yes|no), [0-9]{3}"})[-5:-3] == ", "
    grammar = 'start: "sea: " NAME\nNAME: /[A-Z][a-z]{2,8}/'
    assert ask(extra_body={"grammar": grammar}).startswith("sea: ")


def test_bound_and_free_answers_come_at_once(client, minisgl):
    """What is free says the same beside bound answers as alone."""
    messages = [{"role": "user", "content": "Name the largest ocean on Earth."}]
    free = dict(model=MODEL, messages=messages, temperature=0, max_tokens=32)
    bound = {**free, "extra_body": {"regex": "[0-9]{20}"}}
    alone = client.chat.completions.create(**free).choices[0].message.content

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{minisgl.url}/v1", api_key="none") as client:
            asks = [free, bound] * 6
            answers = [client.chat.completions.create(**ask) for ask in asks]
            return await asyncio.gather(*answers)

    texts = [answer.choices[0].message.content for answer in asyncio.run(all_of_them())]
    assert all("Pacific" in text for text in texts[::2]) and "Pacific" in alone
    assert all(len(text) == 20 and text.isdigit() for text in texts[1::2])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "song"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"grammar": "start: missing"}}, "grammar"),
    ],
)
def test_forms_that_are_none_are_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=QUESTION, **fields)
    assert raised.value.param == param
