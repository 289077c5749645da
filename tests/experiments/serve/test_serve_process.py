"""The command as a process, with OpenAI's own client: texts, signals, and coming back."""

import re
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pytest
from processes import process

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.model import forward
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

CFG = tiny_config("qwen2", layers=3)
FLAGS = "--memory-limit 16MB --depth 3 --width 2 --draft-group 16 --resident 1 --max-length 256"
FLAGS = [*FLAGS.split(), "--chunk", "64", "--port", "0"]
FAST = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="true")
README = Path(__file__).parents[3] / "README.md"
SMOLLM2 = Path.home() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("models") / "thumb", tiny_params(CFG), CFG)


@pytest.fixture(scope="module")
def server(folder):
    with process(["--model", folder, *FLAGS], **FAST) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(folder):
    """f(ids, new, **how) -> (text, end): what the model writes by the plain loop of `llm_jax`."""
    checkpoint = open_checkpoint(folder)
    params, tokenizer = checkpoint.load(CFG), checkpoint.tokenizer()

    def text(ids, new, sampler=Sampler(), seed=0):
        tokens = generate(params, ids, CFG, new, sampler, seed, tokenizer.eos)
        ended = tokens[-1] in tokenizer.eos
        shown = "".join(tokenizer.stream(tokens[:-1] if ended else tokens))
        return shown, "stop" if ended else "length"

    text.tokenizer = tokenizer
    return text


def said(text):
    return [{"role": "user", "content": text}]


def test_the_models_are_one(server, client):
    assert [model.id for model in client.models.list()] == ["thumb"] == [server.model]
    assert client.models.retrieve("thumb").owned_by == "thimble-jax"


def test_answers_are_those_of_plain_decoding(client, alone):
    for n, text in enumerate(("a thimble", "in the 1840s", "→ é")):
        prompt = alone.tokenizer.chat(said(text))
        for how in (dict(), dict(temperature=0.8, top_p=0.95, seed=n + 7)):
            sampler = Sampler(how.get("temperature", 0.0), top_p=how.get("top_p", 1.0))
            expected = alone(prompt, 30, sampler, how.get("seed", 0))
            asked = dict(model="thumb", messages=said(text), max_tokens=30, **how)
            whole = client.chat.completions.create(**asked)
            (choice,) = whole.choices
            assert (choice.message.content, choice.finish_reason) == expected
            assert whole.usage.prompt_tokens == len(prompt)
            pieces = list(client.chat.completions.create(**asked, stream=True))
            streamed = "".join(p.choices[0].delta.content for p in pieces)
            assert (streamed, pieces[-1].choices[0].finish_reason) == expected


def test_a_text_is_continued(client, alone):
    expected = alone(alone.tokenizer.encode("in the"), 12)
    found = client.completions.create(model="thumb", prompt="in the", max_tokens=12)
    assert (found.choices[0].text, found.choices[0].finish_reason) == expected
    ids = client.completions.create(
        model="thumb", prompt=alone.tokenizer.encode("in the"), max_tokens=12
    )
    assert ids.choices[0].text == expected[0]


def test_the_readmes_example_runs(server, alone, capsys):
    (snippet,) = re.findall(r"```py\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(list(filter(None, snippet.splitlines()))) == 3
    snippet = snippet.replace("http://127.0.0.1:8000", server.url).replace("smollm2-135m", "thumb")
    names = {}
    exec(snippet, names)
    names["client"].close()
    expected, _ = alone(alone.tokenizer.encode("A thimble is"), 16)
    assert capsys.readouterr().out == f"{expected}\n"


def test_stop_strings_cut_the_text(client, alone):
    text, _ = alone(alone.tokenizer.chat(said("a thimble")), 40)
    for at in range(0, len(text) - 2, 5):
        stop = text[at : at + 3]
        found = client.chat.completions.create(
            model="thumb", messages=said("a thimble"), max_tokens=40, stop=[stop]
        )
        assert found.choices[0].message.content == text[: text.index(stop)]
        assert found.choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_a_plain_pass(client, alone, folder):
    """The names and bytes of the tokens, and numbers in float64 behind logits of the whole text."""
    model, tokenizer = open_checkpoint(folder).load(CFG), alone.tokenizer
    for text, how in (("a thimble", dict()), ("→ é", dict(temperature=0.8, seed=3))):
        prompt, sampler = tokenizer.chat(said(text)), Sampler(how.get("temperature", 0.0))
        tokens = generate(model, prompt, CFG, 20, sampler, how.get("seed", 0), tokenizer.eos)
        behind = log_probabilities(model, [*prompt, *tokens])[len(prompt) - 1 :]
        found = client.chat.completions.create(
            model="thumb", messages=said(text), max_tokens=20, logprobs=True, top_logprobs=4, **how
        )
        content = found.choices[0].logprobs.content
        assert len(content) > 5
        for one, token, behind_V in zip(content, tokens, behind, strict=False):
            assert one.logprob == pytest.approx(behind_V[token], abs=1e-3)
            assert (one.token, one.bytes) == shown(tokenizer, token)
            for near, other in zip(one.top_logprobs, np.argsort(-behind_V), strict=False):
                assert near.logprob == pytest.approx(behind_V[other], abs=1e-3)
            assert len(one.top_logprobs) == 4


def log_probabilities(model, tokens):
    caches, step = empty_caches(CFG, 1, 128), causal_step(0, len(tokens), 128)
    z_TV = np.asarray(forward(model, np.array([tokens]), caches, step, CFG)[0][0], np.float64)
    return z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))


def shown(tokenizer, token):
    name, text = tokenizer.token(token)
    return name, None if text is None else list(text)


def test_the_clients_errors(client):
    ask = dict(model="thumb", messages=said("a"))
    for changes, kind in (
        (dict(max_tokens=5000), openai.BadRequestError),
        (dict(model="gpt-7"), openai.NotFoundError),
        (dict(response_format={"type": "xml"}), openai.BadRequestError),
        (dict(extra_body={"chat_template": "{{ 1 }}"}), openai.BadRequestError),
    ):
        with pytest.raises(kind) as found:
            client.chat.completions.create(**(ask | changes))
        assert found.value.body["message"]


def test_a_client_that_closes_its_stream(server, client):
    stream = client.chat.completions.create(
        model="thumb", messages=said("on and on"), n=16, max_tokens=200, stream=True
    )
    for _, _ in zip(range(20), stream):
        continue
    stream.close()
    began = time.monotonic()
    again = client.chat.completions.create(model="thumb", messages=said("b"), max_tokens=2)
    assert again.usage.completion_tokens <= 2 and time.monotonic() - began < 30
    metrics = client.get("/../metrics", cast_to=str)
    assert 'thimble_requests_total{end="cancelled"}' in metrics
    cancelled = metrics.split('end="cancelled"} ')[1].split()[0]
    assert float(cancelled) >= 10  # of 16, most had not begun


def test_the_port_is_tried_before_the_model_is_loaded(server, folder):
    flags = ["--model", folder, *FLAGS, "--port", server.port]
    refused = pytest.raises(AssertionError, match=f"cannot listen at .*, port {server.port}: ")
    with refused, process(flags, **FAST):
        raise RuntimeError("it started")


def test_ctrl_c_ends_it(server):
    """The last test of this server."""
    assert server.end(signal.SIGINT) == 0 and "Traceback" not in server.output


def test_a_key_from_the_environment_and_the_end_by_sigterm(folder):
    flags = ["--model", folder, *FLAGS, "--grace", "0.2"]
    with process(flags, THIMBLE_API_KEY="sesame", **FAST) as server:
        url = f"{server.url}/v1"
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
        with openai.OpenAI(base_url=url, api_key="sesame", max_retries=0) as client:
            ask = dict(model="thumb", messages=said("on and on"), n=16, max_tokens=200, stream=True)
            stream = client.chat.completions.create(**ask)
            for _, _ in zip(range(20), stream):
                continue
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="the server shut down"):
                for _ in stream:
                    continue
        assert server.end() == 0
        assert "Shutting down: 1 requests may end first" in server.output
        (dropped,) = [line for line in server.lines if line.startswith("Dropped chatcmpl-")]
        assert dropped.endswith("of at most 3200 tokens were written\n")
        assert "Traceback" not in server.output


@pytest.mark.slow
def test_killed_and_started_again_it_answers_as_before(folder, alone):
    """At the same port at once, while a client is in the middle of an answer."""
    expected, _ = alone(alone.tokenizer.chat(said("again")), 20)
    port = None
    for _ in range(2):
        flags = ["--model", folder, *FLAGS, *(["--port", port] if port else [])]
        with process(flags, **FAST) as server:
            port = server.port
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
                ask = dict(model="thumb", max_tokens=20, messages=said("again"))
                assert client.chat.completions.create(**ask).choices[0].message.content == expected
                stream = client.chat.completions.create(**(ask | dict(n=16, stream=True)))
                next(iter(stream))
                assert server.end(signal.SIGKILL) == -signal.SIGKILL
                with pytest.raises(openai.APIConnectionError):
                    list(stream)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="SmolLM2's file is not in ~/models")
def test_smollm2_answers_several_at_once():
    flags = ["--model", SMOLLM2, "--memory-limit", "450MB", "--port", "0", "--name", "smollm2"]
    with process(flags) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            found = {}

            def ask(question):
                how = dict(model="smollm2", messages=said(question), max_tokens=24)
                found[question] = client.chat.completions.create(**how)

            questions = ["What is the capital of France?", "Name a color of the rainbow."]
            threads = [threading.Thread(target=ask, args=[q]) for q in questions]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(300)
        assert "Paris" in found[questions[0]].choices[0].message.content
        assert found[questions[1]].usage.completion_tokens > 2
        assert found[questions[0]].choices[0].thimble["accepted"] > 0
        assert server.end() == 0
