"""Chat templates: the text of transformers, and named errors for what raises, hangs or swells."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llm_jax import CheckpointError, chat_template
from llm_jax.chat_template import render
from llm_jax.formats import open_checkpoint
from llm_jax.testing import CHAT_TEMPLATE, tiny_config, tiny_params, write_gguf, write_safetensors

HELLO = [dict(role="user", content="Hi!")]
TALK = [
    dict(role="system", content="Be <brief>."),
    dict(role="user", content="naïve 🙂 café"),
    dict(role="assistant", content="\\n"),
    dict(role="user", content="x"),
]
TOKENS = dict(bos_token="<s>", eos_token="</s>")

REAL = {
    "chatml": CHAT_TEMPLATE,
    "llama": "{{ bos_token }}{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start|>' + message['role'] + '\n\n' + message['content'] | trim %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}",
    "qwen3": "{% set ns = namespace(last=messages|length - 1, many=true) %}"
    "{% for m in messages[::-1] %}{% if ns.many and m.role == 'user' %}{% set ns.many = false %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}{{ tools is none }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ dict(a=1).a }}",
    "blocks": "  {% if true %}\n  yes\n  {%- endif %}\n{# note #}\n  end\n",
    "controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}{{ documents is none }}{{ missing is defined }}",
    "generation": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "today": "{{ strftime_now('%Y') }}",
    "macro": "{% macro row(m) %}[{{ m.role }}]{{ caller() if caller }}{% endmacro %}"
    "{{ row(messages[1]) }}{% call row(messages[0]) %}in{% endcall %}",
}


@pytest.mark.parametrize("name", REAL)
def test_text_is_that_of_transformers(name):
    for messages in (HELLO, TALK) if name not in ("macro",) else (TALK,):
        (expected,), _ = render_jinja_template(
            [messages], chat_template=REAL[name], add_generation_prompt=True, **TOKENS
        )
        assert render(REAL[name], messages, TOKENS, "x") == expected


WRONG = {
    # template -> what the message says; the first line is case llm_10, the next two are rel_13
    "{{ raise_exception('System role not supported') }}": "System role not supported",
    "{% for m in messages %}{{ m.content }}": "Unexpected end of template.* in line 1",
    "{{ nothing() }}": "'nothing' is undefined",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "'__init__' .* is unsafe",
    "{{ messages.append(1) }}": "is unsafe|not safely callable",
    "{{ namespace(__class__=1) }}": "a namespace may not hold '__class__'",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}": "may not hold '__class__'",
    "{{ dict.mro() }}": "no attribute 'mro'",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0].content + 1 }}": "str",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth",
    "{{ " + "(" * 50_000 + ")" * 50_000 + " }}": "maximum recursion depth",
    "{% for i in range(10**12) %}a{% endfor %}": "Range too big|int too large",
    "{{ raise_exception('\x1b[2J' + messages[0].content) }}": r"\\x1b\[2JHi!",
}


@pytest.mark.parametrize("template", WRONG, ids=range(len(WRONG)))
def test_a_template_that_raises_is_named(template):
    with pytest.raises(CheckpointError, match=WRONG[template]) as caught:
        render(template, HELLO, TOKENS, "model/x")
    text = str(caught.value)
    assert text.startswith("the chat template of model/x cannot be used: ")
    assert text.endswith("correct it, or remove it to have messages joined as plain text")
    assert text.isprintable()


BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "text times a number": "{{ 'a' * 10**10 }}",
    "list times a number": "{{ [0] * 10**10 }}",
    "power": "{{ (10**(10**9)) % 7 }}",
    "doubled": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x | length }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ ('a\n' * 99999) | indent(10**6) }}",
    "format": "{{ '%09999999999d' % 1 }}",
    "str.format": "{{ '{:9999999999}'.format('a') }}",
    "replace": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "tojson": "{{ [[1]] | tojson(indent=10**10) }}",
    "slice": "{{ 'a' | slice(10**10) | list }}",
    "lipsum": "{{ lipsum(n=10**8) }}",
    "sort": "{{ (range(99999) | list * 10000) | sort }}",
    "pieces": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "long error": "{{ raise_exception('a' * 10**10) }}",
    "undefined": "{{ undefined_name[('a' * 10**10)] }}",
    "only for two messages": "{% if messages | length > 1 %}{{ 'a' * 10**10 }}{% endif %}",
}
BOUNDS = r"longer than 0\.2 s|more than 1,024 MiB|longer than 1,\d+,\d+ characters|int too large"


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.quick_cases("nested loops", "text times a number", "pieces", "doubled")
def test_a_bomb_is_stopped(name, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    with pytest.raises(CheckpointError, match=BOUNDS):
        render(BOMBS[name], TALK, TOKENS, "x")
    assert render("{{ messages[0].content }}", HELLO, TOKENS, "x") == "Hi!"


def test_what_the_user_wrote_does_not_count_as_the_templates_own():
    long = [dict(role="user", content="ab " * 1_000_000)]
    assert len(render(CHAT_TEMPLATE, long, TOKENS, "x")) > 3_000_000


def test_messages_without_a_value_are_as_if_left_out():
    message = dict(role="user", content="Hi!", name=None)
    assert render("{{ messages[0].name is defined }}", [message], TOKENS, "x") == "False"


def test_the_process_is_kept_and_started_again_after_its_death():
    render("a", HELLO, TOKENS, "x")
    first = chat_template._worker.process
    assert render("b", HELLO, TOKENS, "x") == "b"
    assert chat_template._worker.process is first
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert render("c", HELLO, TOKENS, "x") == "c"


def test_a_reply_after_an_interrupt_is_not_taken_for_the_next(monkeypatch):
    render("a", HELLO, TOKENS, "x")

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            pass

    process = chat_template._worker.process
    process.stdout.close()
    monkeypatch.setattr(process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        render("late", HELLO, TOKENS, "x")
    assert render("b", HELLO, TOKENS, "x") == "b"


def test_threads_get_their_own_texts():
    found = {}
    work = lambda i: found.update({i: render(f"{{{{ {i} * 2 }}}}", HELLO, TOKENS, "x")})
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: str(2 * i) for i in range(8)}


FORKED = """
import os, warnings
from llm_jax.chat_template import _worker, render
hello = [dict(role="user", content="Hi!")]
ask = lambda: render("{{ messages[0].content }}", hello, {}, "x")
assert ask() == "Hi!"
first = _worker.process.pid
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0 and ask() == "Hi!" and _worker.process.pid == first
else:
    assert ask() == "Hi!" and _worker.process.pid != first
"""


def test_a_forked_process_starts_its_own():
    """In a process of its own, because JAX warns of forks."""
    ran = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_process_ends_with_ours():
    """Even while it renders: the system's bound on its time needs nobody."""
    program = f"""
import os, signal, threading, time
from llm_jax import chat_template
chat_template.SECONDS = 0.1
hello = [dict(role="user", content="Hi!")]
chat_template.render("a", hello, {{}}, "x")
print(chat_template._worker.process.pid, flush=True)
work = lambda: chat_template.render({BOMBS["nested loops"]!r}, hello, {{}}, "x")
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    worker = int(ran.stdout)
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(worker)


def is_running(process):
    """A process that has ended and that nobody has asked for is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_old_jinja_is_refused(monkeypatch):
    chat_template._worker.stop()
    monkeypatch.setattr(chat_template.importlib.metadata, "version", lambda name: "3.1.5")
    with pytest.raises(chat_template.MissingPackage, match=r"3\.1\.6 or newer, and 3\.1\.5 is"):
        render("a", HELLO, TOKENS, "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cfg = tiny_config("llama", layers=1)
    return write_safetensors(tmp_path_factory.mktemp("chat"), tiny_params(cfg), cfg)


@pytest.mark.parametrize(
    "template", [*list(WRONG)[:5], BOMBS["nested loops"], BOMBS["text times a number"]],
    ids=["raises", "cut", "undefined", "unsafe", "changes", "hangs", "swells"],
)  # fmt: skip
def test_a_template_is_tried_when_the_tokenizer_is_opened(folder, template, monkeypatch):
    """Cases llm_10, rel_13 and rel_14: before, the error came after the model was loaded."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    kept = (folder / "chat_template.jinja").read_text()
    try:
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(CheckpointError, match=f"the chat template of {folder} cannot be used"):
            open_checkpoint(folder).tokenizer()
    finally:
        (folder / "chat_template.jinja").write_text(kept)


def test_a_gguf_files_template_is_tried_when_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_jax.testing.CHAT_TEMPLATE", "{{ nothing() }}")
    cfg = tiny_config("llama", layers=1)
    path = write_gguf(tmp_path / "x.gguf", tiny_params(cfg), cfg)
    with pytest.raises(CheckpointError, match=f"the chat template of {path} cannot be used"):
        open_checkpoint(path).tokenizer()


@pytest.mark.parametrize(
    ("stated", "said"),
    (
        ([dict(name="tool_use", template="a")], "several and none is 'default'"),
        (7, "no text but 7"),
        ({"default": 7}, "no text but 7"),
    ),
)
def test_a_template_that_is_no_text(folder, stated, said):
    """Case llm_10: a named list without 'default'."""
    tokenizer = open_checkpoint(folder).tokenizer()
    tokenizer.hf.chat_template = (
        {t["name"]: t["template"] for t in stated} if isinstance(stated, list) else stated
    )
    with pytest.raises(CheckpointError, match=said):
        tokenizer.chat(HELLO)
