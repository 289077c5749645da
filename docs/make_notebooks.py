"""Runs notebooks/*.ipynb from top to bottom, and keeps their outputs and pictures.

    python docs/make_notebooks.py                   all of them, some minutes each on two cores
    python docs/make_notebooks.py quickstart palu   these
    python docs/make_notebooks.py --heads           only badges and the cells that install

The badge and the installation follow `repository` in pyproject.toml, under [tool.thimble].
pip install -e '.[notebooks]' has what this needs.
"""

import argparse
import os
import re
import tempfile
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
EXTRAS = {"quickstart": "plots", "palu": "plots", "roads": "plots,vision"}
"""The notebooks, and the extras of the package that each needs."""
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["thimble"]["repository"]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, where there are no widgets
}
MOST_BYTES = 400_000
SECONDS = 900
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\n+")
PRIVATE = re.compile(rf"{re.escape(str(Path.home()))}\b|/tmp/|/home/|/work/|{re.escape(str(ROOT))}")
INSTALL = """\
import importlib.util

if importlib.util.find_spec("subspec_jax") is None:  # on Colab, for example
    !git clone --quiet --depth 1 {repository} thimble-jax
    %cd -q thimble-jax
    %pip install --quiet '.[{extras}]'"""


def badge(name: str) -> str:
    """The button that opens a notebook of the main branch in Colab, as Markdown."""
    where = REPOSITORY.removeprefix("https://")
    place = where.replace("github.com", "github", 1)
    button = "https://colab.research.google.com/assets/colab-badge.svg"
    link = f"https://colab.research.google.com/{place}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({button})]({link})"


def with_head(book: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook with its badge, and with its first code cell that installs the package."""
    title = book.cells[0]
    title.source = f"{badge(name)}\n\n{BADGE.sub('', title.source)}"
    (cell,) = (c for c in book.cells if "install" in c.metadata.get("tags", ()))
    cell.source = INSTALL.format(repository=REPOSITORY, extras=EXTRAS[name])
    return book


def with_parameters(book: nbformat.NotebookNode, **values: object) -> nbformat.NotebookNode:
    """The notebook with other values in its cell of parameters; KeyError for an unknown name."""
    (cell,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in values.items():
        line = re.compile(rf"^{name} = .*$", re.MULTILINE)
        if not line.search(cell.source):
            raise KeyError(f"{name} is not set in the parameters")
        cell.source = line.sub(lambda _, n=name, v=value: f"{n} = {v!r}", cell.source)
    return book


def executed(book: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook after all cells ran in a fresh process with this working directory.

    Raises nbclient's CellExecutionError where a cell fails.
    """
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=SECONDS, resources=where, coalesce_streams=True).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of day
    book.metadata = {k: book.metadata[k] for k in ("kernelspec", "language_info")}
    book.metadata["language_info"] = {"name": "python"}
    return book


def pictures(book: nbformat.NotebookNode) -> list[str]:
    """The PNG pictures among the outputs, in base64."""
    outputs = (o for c in book.cells for o in c.get("outputs", ()))
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


def problems(book: nbformat.NotebookNode) -> list[str]:
    """What keeps a notebook that ran from being committed, in words."""
    found, text = [], nbformat.writes(book)
    if len(text) > MOST_BYTES:
        found.append(f"{len(text)} bytes; at most {MOST_BYTES}")
    if not pictures(book):
        found.append("no picture")
    counts = [c.execution_count for c in book.cells if c.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"cells did not run in order: {counts}")
    for output in (o for c in book.cells for o in c.get("outputs", ())):
        if output.get("name") == "stderr" or output.output_type == "error":
            found.append(f"a warning or an error: {output.get('text', output)!r:.300}")
        if secret := PRIVATE.search(str(output.get("text", "")) + str(output.get("data", ""))):
            found.append(f"a path of this machine: {secret.group()}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXTRAS))
    parser.add_argument("--heads", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    for name in arguments.names or EXTRAS:
        path = NOTEBOOKS / f"{name}.ipynb"
        book = with_head(nbformat.read(path, as_version=4), name)
        if not arguments.heads:
            with tempfile.TemporaryDirectory() as folder:
                executed(book, Path(folder))
            if wrong := problems(book):
                raise SystemExit(f"{path} is not written: " + "; ".join(wrong))
        nbformat.write(book, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
