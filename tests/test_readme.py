"""The README is short, and its Python runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)


def test_a_newcomer_reads_130_lines():
    assert len(TEXT.splitlines()) <= 130


def test_every_snippet_is_python():
    assert len(SNIPPETS) == 3
    for number, snippet in enumerate(SNIPPETS):
        compile(snippet, f"README.md, snippet {number}", "exec")


@pytest.mark.slow
def test_the_snippets_run_one_after_the_other():
    """In a process of its own, as a reader would type them. Downloads SmolLM2-135M, 93 MB, once."""
    program = "\nprint('== next')\n".join(SNIPPETS)
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert found.returncode == 0, found.stderr[-3000:]
    first, second, third = found.stdout.split("== next\n")
    assert "Plan within 450.00 MB" in first and "thimble" in first.split("a pass\n")[1]
    assert len(second.strip()) > 20
    assert third.strip().startswith("[")
