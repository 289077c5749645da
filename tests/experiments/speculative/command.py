"""The tiny models' settings, and the command run in this process."""

import contextlib
import io
import shlex
import sys
from types import SimpleNamespace

import pytest

from experiments.speculative import __main__ as speculative
from llm_jax.testing import tiny_config

CFG = tiny_config("qwen2", layers=3)
SMALL = tiny_config("llama", layers=1, d_model=32, d_ff=64)
BASE = (
    "--samples 1 --max-new-tokens 8 --depth 3 --width 2 --draft-group 16 --max-length 192"
    " --chunk 64 --resident 1 --memory-limit 16MB"
)


def call(flags: str, cli=speculative.cli) -> SimpleNamespace:
    """The command run in this process: its exit code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speculative", *shlex.split(flags)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli()
            except SystemExit as stopped:  # the flags themselves could not be read
                code = stopped.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
