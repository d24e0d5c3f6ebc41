#!/usr/bin/env python3
"""`litellm` against `upcycle serve`, through OpenAI's API and through Ollama's.

usage: litellm_suite.py URL MODEL [KEY]        (pip install litellm)
"""
import sys

import litellm

url, model, key = [*sys.argv[1:], "none"][:3]
ask = [{"role": "user", "content": "Compute 12 + 30."}]


def check(name, **arguments):
    whole = litellm.completion(messages=ask, max_tokens=12, temperature=0, **arguments)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens == 12, whole
    streamed = litellm.completion(messages=ask, max_tokens=12, temperature=0, stream=True, **arguments)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert told == text, (told, text)
    print(f"litellm: {name}")


check("openai", model=f"openai/{model}", api_base=f"{url}/v1", api_key=key)
check("ollama_chat", model=f"ollama_chat/{model}", api_base=url)
