"""The shell: what is typed and what is shown, without a model; and the command as a process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from experiments import chat
from experiments.chat import Chat, Shell
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

ROOT = Path(__file__).parents[3]


def typed(*lines, engine=None, **flags):
    """(the shell, what it showed, its prompts) after these lines; an exception is raised."""
    shown, prompts, rest = [], [], list(lines)

    def read(prompt):
        prompts.append(prompt)
        line = rest.pop(0) if rest else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    args = Chat(**(dict(max_new_tokens=12) | flags))
    shell = Shell(engine or FakeEngine(), args, read, shown.append)
    shell.run()
    return shell, "".join(shown), prompts


def test_a_conversation_holds_all_that_was_said():
    shell, shown, prompts = typed("one bye", "", "  two bye ")
    assert shown == "ONE BYE \nTWO BYE \n\n" and prompts == ["> "] * 4
    assert shell.messages == [
        {"role": "user", "content": "one bye"},
        {"role": "assistant", "content": "ONE BYE "},
        {"role": "user", "content": "two bye"},
        {"role": "assistant", "content": "TWO BYE "},
    ]
    prompt = "user: one bye\nassistant: ONE BYE \nuser: two bye\nassistant:"
    assert shell.engine.tokenizer.decode(shell.last.request.prompt) == prompt
    assert [seed for _, seed in shell.engine.samplers] == [0, 1]


def test_messages_of_several_lines():
    block = ['"""a', "", 'b bye"""']
    shell, _, prompts = typed("x\\", "y bye", *block, '"""one bye"""')
    said = [m["content"] for m in shell.messages if m["role"] == "user"]
    assert said == ["x\ny bye", "a\n\nb bye", "one bye"]
    assert prompts == ["> ", ". ", "> ", ". ", ". ", "> ", "> "]


def test_commands(tmp_path):
    file = tmp_path / "talk.json"
    lines = ["/stats", "/system", "a bye", "/stats", "/system be kind", "/system", "b bye"]
    lines += [f"/save {file}", "/save", f"/save {tmp_path}", "/what", "/help"]
    shell, shown, _ = typed(*lines, "/new", "/quit", "never read", model="tiny")
    assert shell.messages == [] and shell.system == "be kind"
    assert json.loads(file.read_text()) == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "b bye"},
            {"role": "assistant", "content": "B BYE "},
        ],
    }
    first, second, rest = shown.split("\n", 2)
    assert (first, second) == ("nothing was decoded yet", "nothing is told")
    # Seven tokens: one with the prompt, then rounds of four and two.
    prompt = len("user: a bye\nassistant:")
    assert f"7 tokens after {prompt} of the prompt, 5 proposed by the draft; 3.00 tokens a" in rest
    assert "12.00 tokens/s, 4.00 GB/s streamed" in rest
    assert "saved: 2 messages" in rest and "where to?" in rest and "not saved: " in rest
    assert "there is no /what" in rest and all(f"\n/{n}" in rest for n in ("new", "save", "quit"))


def test_limits_and_faults_keep_the_conversation():
    shell, shown, _ = typed("a bye", "broken", "x" * 3000, "\ud800", "b bye")
    assert "stopped: the model computes NaN" in shown
    assert "or begin again with /new" in shown and "half a surrogate pair" in shown
    said = [m["content"] for m in shell.messages]
    assert said == ["a bye", "A BYE ", "b bye", "B BYE "]


def test_stop_strings_and_samplers():
    shell, shown, _ = typed("hello", stop=("O H",), temperature=0.5, top_k=3, seed=2**32 - 1)
    assert shown == "HELL\n\n" and shell.last.finish == "stop"
    typed_again, _, _ = typed("a bye", "b bye", engine=shell.engine, seed=2**32 - 1)
    assert [seed for _, seed in shell.engine.samplers] == [2**32 - 1, 2**32 - 1, 0]
    sampler = shell.engine.samplers[0][0]
    assert (sampler.temperature, sampler.top_k) == (0.5, 3) and typed_again.messages


def test_ctrl_c_stops_the_answer_alone():
    engine = FakeEngine()

    def interrupt():
        for _ in range(3):
            engine.gate.release()
        while not engine.samplers:  # it answers
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        engine.gate.release()

    thread = threading.Thread(target=interrupt)
    thread.start()
    shell, shown, _ = typed("slow", KeyboardInterrupt(), "b bye", engine=engine, max_new_tokens=400)
    thread.join()
    assert shell.messages[1]["content"].startswith("SLOW SLOW") and " …\n" in shown
    assert len(shell.messages[1]["content"]) <= 1 + 3 * 4
    assert shell.messages[3]["content"] == "B BYE "
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--temperature -1", "temperature is -1"),
        ("--seed -1", "the seed is -1"),
        ("--max-new-tokens 0", "--max-new-tokens is 0"),
        ("--stop=", "--stop has an empty text"),
        ("--model /no/such/model", "/no/such/model does not exist"),
    ],
)
def test_wrong_flags(flags, words, capsys):
    assert chat.cli(flags.split()) == 2 and words in capsys.readouterr().err


def test_the_command_answers_what_is_piped_into_it(tmp_path):
    cfg = tiny_config("qwen2", layers=2)
    folder = write_safetensors(tmp_path / "thumb", tiny_params(cfg), cfg)
    flags = "--memory-limit 16MB --depth 3 --width 2 --draft-group 16 --max-length 192 --chunk 64"
    command = [sys.executable, "-m", "experiments.chat", "--model", folder, *flags.split()]
    own = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "PYTHONUTF8": "1"}
    ran = subprocess.run(
        [*map(str, command), "--max-new-tokens", "20"], input=b"in the\n/stats\n",
        capture_output=True, env=os.environ | own, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    checkpoint = open_checkpoint(folder)
    tokenizer = checkpoint.tokenizer()
    prompt = tokenizer.chat([{"role": "user", "content": "in the"}])
    tokens = generate(checkpoint.load(cfg), prompt, cfg, 20, eos=tokenizer.eos)
    expected = "".join(tokenizer.stream(t for t in tokens if t not in tokenizer.eos))
    assert (
        f"{expected}\n{len(tokens)} tokens after {len(prompt)} of the prompt" in ran.stdout.decode()
    )
