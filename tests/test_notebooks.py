"""The notebooks run from top to bottom on a small setting, and are committed as they ran."""

import base64
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

from llm_jax.testing import tiny_config, tiny_params, write_safetensors

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "docs" / "make_notebooks.py")
make_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebooks)
NAMES = tuple(make_notebooks.EXTRAS)
SMALL = {  # name -> (parameters, least pictures); TINY is a checkpoint made here
    "quickstart": (dict(MODEL="TINY", MEMORY="24MB", TOKENS=24), 4),
    "palu": (dict(CHECKPOINT="TINY", CALIBRATION=128, EVALUATION=128, WINDOW=64), 3),
    "roads": (dict(SCENES=16, SIZE=(64, 96), EPOCHS=1), 5),
}

every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(make_notebooks.NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_every_notebook_has_an_entry():
    assert {path.stem for path in make_notebooks.NOTEBOOKS.glob("*.ipynb")} == set(NAMES)


@every_notebook
def test_it_is_committed_as_it_ran(name):
    """In order, with pictures, small, without warnings and without paths of the machine."""
    book = read(name)
    nbformat.validate(book)
    assert make_notebooks.problems(book) == []
    drawn = [base64.b64decode(picture) for picture in make_notebooks.pictures(book)]
    assert len(drawn) >= SMALL[name][1] and all(p.startswith(b"\x89PNG\r\n") for p in drawn)


@every_notebook
def test_its_badge_and_its_installation_are_of_this_repository(name):
    book = read(name)
    assert nbformat.writes(make_notebooks.with_head(read(name), name)) == nbformat.writes(book)
    (path,) = re.findall(r"colab\.research\.google\.com/github/.+?/blob/main/(\S+?)\)",
                         book.cells[0].source)  # fmt: skip
    assert (ROOT / path).is_file() and Path(path).stem == name
    code = next(cell for cell in book.cells if cell.cell_type == "code")
    assert "install" in code.metadata.tags


def test_pages_have_the_badges():
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        text = page.read_text()
        for name in NAMES:
            assert make_notebooks.badge(name) in text, f"{page.name}, {name}"


def test_parameters_that_are_not_there_are_named():
    with pytest.raises(KeyError, match="TOKEN is not set"):
        make_notebooks.with_parameters(read("quickstart"), TOKEN=1)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (dict(output_type="stream", name="stderr", text="Warning"), "a warning"),
        (dict(output_type="stream", name="stdout", text=f"{Path.home()}/x"), "of this machine"),
        (dict(output_type="stream", name="stdout", text="x" * 400_000), "at most 400000"),
    ],
    ids=["warning", "path", "large"],
)
def test_what_must_not_be_committed_is_named(output, said):
    book = read("quickstart")
    book.cells[-2].outputs.append(nbformat.from_dict(output))
    (problem,) = make_notebooks.problems(book)
    assert said in problem
    for cell in book.cells[::-1]:
        cell.outputs = []
    book.cells[-2].execution_count = None
    assert [p.split(":")[0] for p in make_notebooks.problems(book)] == [
        "no picture",
        "cells did not run in order",
    ]


@pytest.mark.parametrize(
    "name", ["quickstart", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])]
)
def test_it_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    """In a process of its own, far from the checkout, as a reader would run it."""
    cfg = tiny_config(layers=4, vocab=300, d_ff=128)
    folder = write_safetensors(tmp_path / "tiny", tiny_params(cfg), cfg)
    parameters, least = SMALL[name]
    given = {k: str(folder) if v == "TINY" else v for k, v in parameters.items()}
    for variable, value in make_notebooks.ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    book = make_notebooks.with_parameters(read(name), **given)
    make_notebooks.executed(book, tmp_path)
    wrong = [p for p in make_notebooks.problems(book) if "of this machine" not in p]
    assert wrong == []
    assert len(make_notebooks.pictures(book)) >= least
