#!/usr/bin/env python3
"""The `openai` package against `upcycle serve`: chats and texts, whole and streamed, tools, schemas, errors.

usage: openai_suite.py URL MODEL [KEY]        (pip install openai)
"""
import json, sys

import openai
from pydantic import BaseModel

url, model, key = [*sys.argv[1:], "none"][:3]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
# What a tiny model writes ends before long: booleans, and not the likeliest token for ever.
drawn = {"temperature": 1, "seed": 1}
ask = [{"role": "user", "content": "Compute 12 + 30."}]
tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
                                                                        "required": ["a", "b"], "additionalProperties": False}}}


class Answer(BaseModel):
    x: bool


def models():
    assert model in [m.id for m in client.models.list()]
    assert client.models.retrieve(model).id == model


def chat():
    whole = client.chat.completions.create(model=model, messages=ask, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(model=model, messages=ask, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def text():
    whole = client.completions.create(model=model, prompt="Problem:", max_tokens=12, n=2, temperature=1, seed=1)
    assert len(whole.choices) == 2 and whole.usage.completion_tokens == 24
    stopped = client.completions.create(model=model, prompt="Problem:", max_tokens=12, stop=[" "])
    assert " " not in stopped.choices[0].text


def tools():
    called = client.chat.completions.create(model=model, messages=ask, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=200, **drawn)
    call = called.choices[0].message.tool_calls[0]
    assert call.function.name == "add" and set(json.loads(call.function.arguments)) == {"a", "b"}
    with client.chat.completions.stream(model=model, messages=ask, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=200, **drawn) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "add"


def schemas():
    parsed = client.chat.completions.parse(model=model, messages=ask, response_format=Answer, max_tokens=200, **drawn)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def errors():
    for wanted, arguments in [(openai.NotFoundError, dict(model="no-such-model")), (openai.BadRequestError, dict(model=model, temperature=-1))]:
        try:
            client.chat.completions.create(messages=ask, **arguments)
        except wanted as error:
            assert error.request_id and error.body["message"], error.body
        else:
            raise AssertionError(f"no {wanted}")


def leaving():
    stream = client.completions.create(model=model, prompt="Problem:", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()


for check in [models, chat, text, tools, schemas, errors, leaving]:
    check()
    print(f"openai {openai.__version__}: {check.__name__}")
