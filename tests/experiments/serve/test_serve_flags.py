"""What the commands refuse before a model is loaded: one line that says why, and status 2."""

import contextlib
import dataclasses
import io
import socket
import subprocess
import sys
import typing

import pytest

from experiments import chat
from experiments.common.cli import UserError
from experiments.serve import __main__ as serve
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

CFG = tiny_config("qwen2", layers=2)
FLAGS = "--memory-limit 16MB --depth 3 --width 2 --draft-group 16 --resident 1 --max-length 192"
EXTREME = ("-1", "0", "1e-38", str(10**9), str(10**20), "1e300", "nan", "inf", "-inf", "")
COMMANDS = {"serve": (serve, serve.Serve), "chat": (chat, chat.Chat)}


def numbers(flags):
    wanted = {int, float}
    of = lambda f: wanted & ({f.type} | set(typing.get_args(f.type)))
    named = ("memory_limit", "body_limit")
    return [f.name.replace("_", "-") for f in dataclasses.fields(flags) if of(f) or f.name in named]


NUMBERS = [(command, name) for command, (_, flags) in COMMANDS.items() for name in numbers(flags)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("models") / "thumb", tiny_params(CFG), CFG)


def call(module, words):
    """(status, what was written to standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return module.cli(words), err.getvalue()
        except SystemExit as stopped:
            return stopped.code, err.getvalue()


@pytest.mark.parametrize("command, name", NUMBERS)
def test_no_number_is_too_odd_for_a_flag(folder, monkeypatch, command, name):
    module, _ = COMMANDS[command]
    opened = module.open_engine

    def planned(*how):
        opened(*how)
        raise UserError("planned")

    monkeypatch.setattr(module, "open_engine", planned)
    for value in EXTREME:
        port = ["--port", "0"] if command == "serve" else []
        words = ["--model", str(folder), *FLAGS.split(), *port, f"--{name}={value}"]
        status, error = call(module, words)
        assert status == 2 and "Traceback" not in error, (value, error)
        assert len(error.splitlines()) == 1 or f"--{name}" in error, (value, error)


@pytest.mark.parametrize("command", COMMANDS)
def test_bitwise_answers_are_decoded_one_at_a_time(folder, monkeypatch, command):
    module, _ = COMMANDS[command]
    opened, engines = module.open_engine, []

    def planned(*how):
        engines.append(opened(*how))
        raise UserError("planned")

    monkeypatch.setattr(module, "open_engine", planned)
    port = ["--port", "0"] if command == "serve" else []
    words = ["--model", str(folder), *FLAGS.split(), *port, "--exact", "bitwise"]
    status, error = call(module, [*words, "--parallel", "2"])
    assert status == 2 and "--exact bitwise decodes one answer at a time" in error
    assert call(module, words)[0] == 2
    [engine] = engines
    assert engine.options.texts == 1 and not engine.plan.ladder
    assert engine.plan.shape == engine.options.shape is not None


def test_a_port_in_use_and_a_host_that_is_none():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error = call(serve, ["--port", str(port)])
        assert status == 2 and f"cannot listen at 127.0.0.1, port {port}: " in error
    status, error = call(serve, ["--host", "no.such.host.invalid", "--port", "0"])
    assert status == 2 and "cannot listen at no.such.host.invalid" in error


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named_with_its_extra(package):
    program = f"""
import sys
sys.modules["{package}"] = None
from experiments.__main__ import main
sys.exit(main(["serve"]))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert f"{package}, which is not installed: pip install 'thimble-jax[serve]'" in found.stderr


def test_the_shell_needs_no_package_of_the_server():
    program = """
import sys
for name in ("starlette", "uvicorn", "prometheus_client", "openai"):
    sys.modules[name] = None
import experiments.chat
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
