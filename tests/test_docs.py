"""What the pages say exists: links, anchors, results files, commands, names, flags, the picture."""

import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "experiments" / "checkpoints" / "README.md"]
)
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it names what is gone
RESULTS = ROOT / "experiments" / "results"

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
RESULT = re.compile(r"experiments/results/([\w.-]+\.jsonl)")
FILE = re.compile(r"\b((?:tests|docs|experiments|\w+_jax|pallas_kernels)/[\w./-]+\.\w+)")
MODULE = re.compile(r"python -m (experiments(?:\.[a-z_]+)*)")  # not .NAME
NAME = re.compile(
    r"`((?:llm_jax|subspec_jax|palu_jax|qyolop_jax|pallas_kernels|experiments)(?:\.\w+)+)`"
)
NO_SOURCE = ("no command", "development run")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
every_current_page = pytest.mark.parametrize(
    "page", CURRENT, ids=lambda p: str(p.relative_to(ROOT))
)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)", FENCE.sub("", page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@every_page
def test_links_lead_somewhere(page):
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    for link in (a or b for a, b in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue  # another site; no test asks the network
        assert not link.startswith("/"), f"{link} is absolute"
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link} has no such heading"
        if DOCS in page.parents:  # the site holds docs/ alone
            assert DOCS in target.parents, f"{link} leads out of the site"


@every_page
def test_named_results_exist(page):
    assert not [name for name in RESULT.findall(page.read_text()) if not (RESULTS / name).exists()]


@every_current_page
def test_named_files_exist(page):
    names = set(FILE.findall(page.read_text()))
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_results_file_is_explained():
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert {path.name for path in RESULTS.glob("*.jsonl")} <= set(RESULT.findall(text))


@pytest.mark.parametrize("name", ["speculative", "palu", "qyolop", "performance"])
def test_every_table_of_results_names_its_file_and_command(name):
    sections = re.split(r"^## ", (DOCS / f"{name}.md").read_text(), flags=re.MULTILINE)[1:]
    tables = [s for s in sections if re.search(r"^\| ?-+", s, re.MULTILINE)]
    assert tables
    for section in tables:
        title, words = section.split("\n")[0], section.replace("*", "")
        assert RESULT.search(words), f"{title}: no results file"
        assert "python -m experiments" in words or any(why in words for why in NO_SOURCE), title


@every_current_page
def test_named_commands_run(page):
    for module in MODULE.findall(page.read_text()):
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"python -m {module}: no such module"
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__"), f"{module} has no __main__"


@every_current_page
def test_names_in_code_marks_exist(page):
    for name in set(NAME.findall(page.read_text())):
        parts = name.split(".")
        found, rest = importlib.import_module(parts[0]), parts[1:]
        for i, part in enumerate(rest):
            if not hasattr(found, part):
                found = importlib.import_module(".".join(parts[: i + 2]))
            else:
                found = getattr(found, part)


def test_the_site_reaches_every_page():
    named = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text())
    tomllib.loads((ROOT / "zensical.toml").read_text())
    index = (DOCS / "design" / "README.md").read_text()
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert name in named or f"({page.name})" in index, f"no way leads to {name}"


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_recorded_round_gives():
    picture = script("make_picture")
    run = json.loads(picture.RECORDED.read_text())
    assert picture.draw(run) == picture.DRAWN.read_text()
    shown = run["rounds"][picture.SHOWN]
    path = [shown["tokens"][i] for i in shown["accepted"]]
    assert shown["emitted"][:-1] == path
    assert [shown["parents"][i] for i in shown["accepted"]] == [0, *shown["accepted"][:-1]]


@pytest.mark.parametrize("name", ["flags", "families"])
def test_made_pages_are_what_is_made_now(name):
    made = subprocess.run(
        [sys.executable, DOCS / f"make_{name}.py", "--print"],
        check=True, capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"},
    ).stdout  # fmt: skip
    words = lambda text: re.sub(r"[\s\-─│╭╮╰╯]+", " ", text).split()
    page = (DOCS / f"{name}.md").read_text()
    assert words(made) == words(page), f"run python docs/make_{name}.py"
