"""Conversations with tools, rendered for the model as `transformers` renders them."""

import json
from pathlib import Path

import pytest
from tool_templates import CODER, LLAMA, MISTRAL_TEXT, TEMPLATES

from experiments.serve.asked import parse
from experiments.serve.body import Body
from experiments.serve.call_formats import format_of
from experiments.serve.tools import format_for, rendered, wants_text
from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_tokenizer
from llm_jax.tokenizer import wrap

CODER_GGUF = Path.home() / "models" / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Ö", "\"b'"]}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "It's\nhow → it is", "parameters": SCHEMA},
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object"}},
    },
]


def called(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CHAT = [
    {"role": "user", "content": "How is it in Ö?"},
    {"role": "assistant", "content": "I look.",
     "tool_calls": [called("abcdefgh1", "weather", '{"city": "Ö \\"\'\\u2192", "at": [1, null]}')]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": "sun <b> \"and\" 'rain'"},
    {"role": "assistant", "content": None, "tool_calls": [called("abcdefgh2", "now", "{}")]},
    {"role": "tool", "tool_call_id": "abcdefgh2", "content": "noon"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "Thanks"},
]  # fmt: skip


@pytest.fixture(params=[*TEMPLATES, "mistral, text", "qwen2.5-coder"])
def tokenizer(request):
    if request.param == "qwen2.5-coder":
        if not CODER_GGUF.exists():
            pytest.skip(f"{CODER_GGUF} is not there")
        return open_checkpoint(CODER_GGUF).tokenizer()
    hf = tiny_tokenizer(288)
    hf.chat_template = {**TEMPLATES, "mistral, text": MISTRAL_TEXT}[request.param]
    return wrap(hf)


def asked(messages, tools=TOOLS):
    body = {"model": "m", "messages": messages, "tools": tools}
    return parse("chat", Body(json.dumps(body).encode()), "m", 0.0)


def as_transformers(messages, objects):
    """The messages as its templates want them: arguments are objects, but for some templates."""
    out, names = [], {}
    for message in messages:
        message = {**message, "content": message["content"] or ""}
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if "tool_calls" in message and objects:
            calls = [called(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
                     for c in message["tool_calls"]]  # fmt: skip
            message["tool_calls"] = calls
        if message["role"] == "tool":
            message["name"] = names[message["tool_call_id"]]
        out.append(message)
    return out


@pytest.mark.parametrize("tools", (TOOLS, []), ids=("tools", "none"))
def test_a_conversation_is_that_of_transformers(tokenizer, tools):
    hf, objects = tokenizer.hf, "+ call.function.arguments" not in tokenizer.hf.chat_template
    for end in range(1, len(CHAT) + 1):
        if CHAT[end - 1]["role"] == "assistant":
            continue
        want = as_transformers(CHAT[:end], objects)
        how = dict(tools=tools or None, tokenize=False, add_generation_prompt=True)
        text = hf.apply_chat_template(want, **how)
        it = asked(CHAT[:end], tools)
        assert rendered(tokenizer, it.messages, it.tools) == hf.encode(
            text, add_special_tokens=False
        )
    for tool in tools:
        assert tool["function"]["name"] in text
    assert (
        "noon" in text
        and "Sunny." in text
        and ("{}" in text or tokenizer.hf.chat_template == CODER)
    )


def test_which_templates_want_text(tokenizer):
    wanted = tokenizer.hf.chat_template == MISTRAL_TEXT
    assert wants_text(tokenizer, None) == wants_text(tokenizer, TOOLS) == wanted


def test_the_format_is_the_templates(tokenizer):
    it = asked(CHAT)
    found = format_for(tokenizer, it.tools)
    assert found is format_of(tokenizer.hf.chat_template)
    if tokenizer.source == str(CODER_GGUF):
        assert found.name == "hermes"  # Qwen3-Coder's is another


def test_a_template_of_its_own_for_tools():
    """Of several named templates `transformers` takes tool_use where there are tools."""
    hf = tiny_tokenizer(288)
    hf.chat_template = {"default": TEMPLATES["hermes"], "tool_use": LLAMA}
    tokenizer = wrap(hf)
    for tools in (TOOLS, []):
        it = asked(CHAT[:1], tools)
        found = rendered(tokenizer, it.messages, it.tools)
        want = hf.apply_chat_template(CHAT[:1], tools=tools or None, tokenize=False,
                                      add_generation_prompt=True)  # fmt: skip
        assert found == hf.encode(want, add_special_tokens=False)
    assert format_for(tokenizer, asked(CHAT).tools).name == "llama"
