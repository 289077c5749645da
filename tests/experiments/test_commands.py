"""The list of commands: each exists, has help, and can be reached by its name."""

import importlib
import os
import subprocess
import sys

import pytest

from experiments.__main__ import COMMANDS, main
from llm_jax.families import FAMILIES
from llm_jax.registry import MODELS


def test_every_command_has_a_module_with_a_command_line():
    for name, (module, what) in COMMANDS.items():
        assert callable(importlib.import_module(module).cli), name
        assert what and not what.endswith(".")


def test_the_list_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in (*COMMANDS, "--version", "--list-models"):
        assert name in listed


def test_the_version_is_the_packages(capsys):
    import jax

    import subspec_jax

    assert main(["--version"]) == 0
    assert (
        capsys.readouterr().out
        == f"thimble-jax {subspec_jax.__version__} (jax {jax.__version__})\n"
    )


@pytest.mark.parametrize("words", [[], ["speculative"], ["palu", "--seed", "1"]])
def test_models_are_listed_by_family_with_their_sizes(words, capsys):
    assert main([*words, "--list-models"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["family", "model", "parameters"]
    assert max(map(len, lines)) <= 100
    rows, family, seen = lines[: lines.index("")], None, []
    for row in rows:
        first, *rest = row.split()
        if not row.startswith(" "):
            assert first not in seen  # a family's models stand together
            family, (name, *_) = first, rest
            seen.append(family)
        else:
            name = first
        assert MODELS[name].config.family == family
        assert MODELS[name].repo in row
    assert len(rows) == len(MODELS)
    named = {m.config.family for m in MODELS.values()}
    assert set(seen) == named and "qwen2_moe" in set(FAMILIES) - named
    assert all(name in lines[-1] for name in set(FAMILIES) - named)
    assert any("qwen2.5-7b " in row and " 7.62 B  Qwen/Qwen2.5-7B-Instruct" in row for row in rows)
    licence = next(
        line for line in lines if line.endswith("the licence must be accepted on the Hub first")
    )
    gated = next(row for row in rows if "google/gemma-3-1b-it" in row)
    assert gated.endswith(licence.split()[0])


def test_an_unknown_command_gets_a_guess(capsys):
    assert main(["specultive"]) == 2
    error = capsys.readouterr().err
    assert "there is no command 'specultive'; did you mean speculative?" in error


def test_words_reach_the_command(capsys):
    assert main(["speculative", "--samples", "0"]) == 2
    assert "--samples and --max-new-tokens must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["speculative", "chat", "serve", "palu", "qyolop", "convert"])
def test_help_is_for_people(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "type: ignore" not in text and "__main__.py" not in text
    assert f"python -m experiments.{name}" in text


def test_a_command_names_the_packages_that_only_it_needs():
    program = """
import sys
sys.modules["flax"] = None
from experiments.__main__ import main
sys.exit(main(["qyolop", "--help"]))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert "pip install 'thimble-jax[vision]'" in found.stderr


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m experiments --list-models | head -n 1"
    found = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert found.stdout.startswith("family ") and found.stderr == ""
