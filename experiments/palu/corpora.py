"""Text to calibrate on and to score: `text(name, part)` for a corpus by name, or for any file.

`python` is the documentation of the language that CPython carries; it needs no download. All others
come from a local folder (`--data-dir`, with the files of `CORPUS_FILES`) or the Hugging Face hub.
"""

import gzip
import random
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.common.cli import UserError
from llm_jax.extras import need
from llm_jax.files import parse_json

Part = Literal["calibration", "evaluation"]
CORPORA = ("python", "wikitext2", "c4", "book")


class CorpusError(UserError):
    """Text that was not found; the message says where it should be and what to do."""


CORPUS_FILES: dict[tuple[str, str], tuple[str, ...]] = {
    # (corpus, part) -> files below the data directory; the first that exists is read
    ("wikitext2", "evaluation"): (
        "text/wikitext2/wiki.test.raw.gz",
        "text/wikitext2/wiki.test.raw",
    ),
    ("wikitext2", "calibration"): (
        "text/wikitext2/wiki.train.raw.gz",
        "text/wikitext2/wiki.train.raw",
        "text/wikitext2/valid.tokens.gz",
    ),
    ("c4", "calibration"): ("text/c4/mc4_en_snippets.jsonl.gz",),
    ("c4", "evaluation"): ("text/c4/c4_en_sample.jsonl",),
    ("book", "calibration"): ("text/gutenberg/war_and_peace_pg2600.txt.gz",),
    ("book", "evaluation"): ("text/gutenberg/war_and_peace_pg2600.txt.gz",),
}
_WIKITEXT = "b08601e04326c79dfdd32d625aee71d232d685c3"
_C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
HUB: dict[tuple[str, str], tuple[str, str, str]] = {
    # (corpus, part) -> (dataset repository, file, commit); parquet files need pyarrow
    ("wikitext2", "evaluation"): (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        _WIKITEXT,
    ),
    ("wikitext2", "calibration"): (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        _WIKITEXT,
    ),
    ("c4", "calibration"): ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", _C4),
    ("c4", "evaluation"): ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", _C4),
}
DOCUMENTS = 1100
"""The most documents of C4 that are read."""
LARGEST = 2**30
"""The most bytes of text that are read from a file; a small gzip file may hold any number."""


def text(name: str, part: Part, data_dir: Path | None = None) -> str:
    """The text of a corpus or a file. Calibration and evaluation parts do not overlap.

    The first four fifths of a file are for calibration and the rest for evaluation. WikiText-2 is
    the raw test split as it stands in its file, which equals the rows of the usual recipe joined by
    newlines. Raises `CorpusError`.
    """
    found = _text(name, part, data_dir)
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"the text {name!r} has characters that UTF-8 lacks: {error}") from error
    return found


def _text(name: str, part: Part, data_dir: Path | None) -> str:
    if name == "python":
        return _python(part)
    if name not in CORPORA:
        path = Path(name).expanduser()
        if not path.is_file():
            known = ", ".join(CORPORA)
            raise CorpusError(f"{name!r} is neither a corpus ({known}) nor a text file")
        return _share(_decode(path), part)
    found = _local(name, part, data_dir) or _hub(name, part, data_dir)
    return _share(_body(found), part) if name == "book" else found


def _python(part: Part) -> str:
    """The language documentation behind `help()`: every fifth topic is for evaluation.

    Topics repeat each other; paragraphs of the evaluation part are removed from the other part.
    """
    from pydoc_data.topics import topics

    paragraphs = lambda topic: [p.strip("\n") for p in topics[topic].split("\n\n")]
    wanted = {"calibration": [], "evaluation": []}
    for i, topic in enumerate(sorted(topics)):
        wanted["evaluation" if i % 5 == 4 else "calibration"] += paragraphs(topic)
    if part == "evaluation":
        return "\n\n".join(wanted[part])
    seen = {" ".join(p.split()) for p in wanted["evaluation"]}
    return "\n\n".join(p for p in wanted[part] if " ".join(p.split()) not in seen)


def _share(whole: str, part: Part) -> str:
    cut = len(whole) * 4 // 5
    return whole[:cut] if part == "calibration" else whole[cut:]


def _body(book: str) -> str:
    """A Project Gutenberg book without the text around it."""
    start, end = book.find("*** START OF"), book.find("*** END OF")
    if start >= 0:
        book = book[book.index("\n", start) : end if end > 0 else None]
    return book.replace("\r\n", "\n").strip()


def _local(name: str, part: Part, data_dir: Path | None) -> str | None:
    if data_dir is None:
        return None
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise CorpusError(f"the data directory {root} does not exist")
    for file in CORPUS_FILES.get((name, part), ()):
        if (root / file).is_file():
            return _documents(root / file)
    return None


def _hub(name: str, part: Part, data_dir: Path | None) -> str:
    looked = [str(Path(data_dir) / f) for f in CORPUS_FILES[name, part]] if data_dir else []
    if (name, part) not in HUB:
        raise CorpusError(
            f"no text for {name}: {' and '.join(looked) or 'no --data-dir was given'}; put "
            f"{CORPUS_FILES[name, part][0]} below a folder and pass it as --data-dir"
        )
    repo, file, revision = HUB[name, part]
    hub = need("huggingface_hub", "eval", f"the corpus {name} without a local file")
    try:
        path = hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    except Exception as error:  # no network, no repository, no access: one advice for all
        raise CorpusError(
            f"{name} was not found: looked for {', '.join(looked) or 'no local folder'}, and "
            f"{repo}/{file} on the hub failed ({str(error).splitlines()[0]}). Pass --data-dir with "
            f"{CORPUS_FILES[name, part][0]} in it, or use the corpus python, which needs no files"
        ) from error
    return _documents(Path(path))


def _documents(path: Path) -> str:
    """The text of a file: the texts of JSON lines or of the rows of parquet, or all of the file."""
    if path.suffix == ".parquet":
        return _parquet(path)
    if ".json" not in path.name:
        return _decode(path)
    found = []
    for number, row in json_rows(path, DOCUMENTS):
        try:
            body = row.get("text") or row.get("prompt", "") + row.get("response", "")
        except TypeError:
            body = None
        if not isinstance(body, str):
            raise CorpusError(f"{path}, line {number}: not a JSON object with a text")
        found.append(body)
    return " ".join(found)


def _parquet(path: Path) -> str:
    parquet = need("pyarrow.parquet", "eval", f"reading {path.name}")
    try:
        rows = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except Exception as error:  # damaged files and missing columns fail in many ways
        first = (str(error).splitlines() or [""])[0]
        raise CorpusError(
            f"{path} cannot be read as parquet with a column text "
            f"({type(error).__name__}: {first}); fetch it again"
        ) from error
    odd = next((n for n, row in enumerate(rows) if not isinstance(row, str)), None)
    if odd is not None:
        raise CorpusError(f"{path}, row {odd}: {type(rows[odd]).__name__} in place of a text")
    return "".join(rows)


def json_rows(path: Path, most: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of a line, its JSON object) for the first `most` lines; raises CorpusError."""
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if most is not None and number > most:
            return
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise CorpusError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, line {number}: not a JSON object with a text")
        yield number, row


def _decode(path: Path) -> str:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read as (gzipped) UTF-8 text: {error}") from error
    if len(data) > LARGEST:
        raise CorpusError(f"{path} holds more than {LARGEST} bytes of text; give a part of it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} cannot be read as (gzipped) UTF-8 text: {error}") from error


def windows(
    tokens: Sequence[int] | np.ndarray, length: int, count: int, seed: int | None = None
) -> np.ndarray:
    """int32 [n, length], n <= count: consecutive windows, or with a seed windows at random places.

    `count` 0 takes all consecutive windows. Raises CorpusError where the text is too short.
    """
    tokens = np.asarray(tokens, np.int32)
    if length < 2 or len(tokens) < length:
        raise CorpusError(
            f"the text has {len(tokens)} tokens; {length} are needed for one window of 2 or more"
        )
    whole = len(tokens) // length
    if seed is None:
        count = min(count, whole) if count else whole
        return tokens[: count * length].reshape(count, length)
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, count or whole)
    return np.stack([tokens[s : s + length] for s in starts])


def kv_retrieval(
    data_dir: Path | None, count: int, pairs: int = 75, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` records of key-value retrieval (Lost in the Middle), each with the `pairs`, one `key`
    of them and its `value`. They come from the data directory if it has them, else from the
    seed."""
    path = None if data_dir is None else Path(data_dir).expanduser() / "text/kv_retrieval"
    found: list[tuple[list[list[str]], str]] = []
    if path is not None and path.is_dir():
        for file in sorted(path.glob("*.jsonl.gz")):
            found += [_retrieval_row(file, *row) for row in json_rows(file)]
    rng = random.Random(seed)
    identifier = lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    records = []
    for i in range(count):
        if i < len(found):
            rows, key = found[i]
            gold = next(row for row in rows if row[0] == key)
            rest = [row for row in rows if row[0] != key][: pairs - 1]
        else:
            gold, *rest = ([identifier(), identifier()] for _ in range(pairs))
        rest.insert(rng.randrange(len(rest) + 1), gold)
        records.append(dict(pairs=[tuple(row) for row in rest], key=gold[0], value=gold[1]))
    return records


def _retrieval_row(path: Path, number: int, row: dict[str, Any]) -> tuple[list[list[str]], str]:
    """(the pairs, the key of one of them); raises CorpusError."""
    pairs, key = row.get("ordered_kv_records"), row.get("key")
    words = lambda pair: isinstance(pair, list) and [type(w) for w in pair] == [str, str]
    if not (isinstance(pairs, list) and all(map(words, pairs)) and key in [k for k, _ in pairs]):
        raise CorpusError(
            f"{path}, line {number}: expected ordered_kv_records, a list of pairs of texts, and "
            "the key of one of them"
        )
    return pairs, key
