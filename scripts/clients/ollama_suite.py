#!/usr/bin/env python3
"""The `ollama` package against `upcycle serve`.

usage: ollama_suite.py URL MODEL [KEY]        (pip install ollama)
"""
import json, sys

import ollama

url, model, key = [*sys.argv[1:], ""][:3]
client = ollama.Client(host=url, headers={"Authorization": f"Bearer {key}"} if key else {})
ask = [{"role": "user", "content": "Compute 12 + 30."}]
short = {"num_predict": 12, "temperature": 0}


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def models():
    assert model in [m.model for m in client.list().models]
    assert model in [m.model for m in client.ps().models]
    assert "completion" in client.show(model).capabilities


def chat():
    whole = client.chat(model, ask, options=short)
    assert whole.done and whole.eval_count == 12 and whole.total_duration > whole.eval_duration >= 0
    streamed = list(client.chat(model, ask, options=short, stream=True))
    assert "".join(part.message.content for part in streamed) == whole.message.content and streamed[-1].done


def generate():
    whole = client.generate(model, "Compute 12 + 30.", system="Be short.", options=short)
    streamed = list(client.generate(model, "Compute 12 + 30.", system="Be short.", options=short, stream=True))
    assert "".join(part.response for part in streamed) == whole.response
    assert client.generate(model, "Problem:", raw=True, options=short).response


def schemas():
    schema = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False}
    answer = client.chat(model, ask, format=schema, options={"num_predict": 200, "temperature": 1, "seed": 1})
    assert isinstance(json.loads(answer.message.content)["x"], bool)


def tools():
    answer = client.chat(model, ask, tools=[add], options=short)
    for call in answer.message.tool_calls or []:
        assert isinstance(call.function.arguments, dict)


def errors():
    for arguments in [dict(model="no-such-model"), dict(model=model, template="{{ .Prompt }}")]:
        try:
            client.generate(prompt="a", **arguments)
        except ollama.ResponseError as error:
            assert error.status_code in (400, 404) and error.error, error
        else:
            raise AssertionError(arguments)


def memory():
    assert client.generate(model, keep_alive=0).done_reason == "unload"
    assert model not in [m.model for m in client.ps().models]
    assert client.generate(model, keep_alive="5m").done_reason == "load"
    assert client.generate(model, "a", options=short, keep_alive=-1).response is not None


for check in [models, chat, generate, schemas, tools, errors, memory]:
    check()
    print(f"ollama: {check.__name__}")
