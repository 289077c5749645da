"""Prompts to decode: `load_conversations(name, data_dir, samples)` reads a public benchmark.

`builtin` and `texts` come with the project and need nothing. `texts` are beginnings of texts for a
base model to continue, which no template surrounds. Any other name is looked for in three places:
a local folder, the Hugging Face hub, and TensorFlow Datasets, which is read without TensorFlow.
The packages for the hub, for parquet files and for TensorFlow Datasets are the extra `eval`.
"""

import csv
import dataclasses
import difflib
import fnmatch
import gzip
import random
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, get_args

from experiments.speculative.benchmark_specs import (
    SPECS,
    BenchmarkError,
    BenchmarkName,
    Row,
    Spec,
    user_turns,
)
from llm_jax.extras import need
from llm_jax.files import parse_json

BENCHMARKS: tuple[str, ...] = get_args(BenchmarkName)
SHIPPED = {
    name: Path(__file__).with_name(file)
    for name, file in dict(builtin="prompts.jsonl", texts="texts.jsonl").items()
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The user's turns of one conversation; each later one follows the model's own answer."""

    id: str
    category: str
    turns: tuple[str, ...]
    plain: bool = False
    """Whether the model continues the text as it stands, without a chat template."""
    system: str | None = None
    """What the model is told before."""

    def prompt(self, tokenizer: Any, answers: Sequence[str] = ()) -> list[int]:
        """Ids of the conversation up to the turn behind these answers to the earlier turns."""
        if self.plain:
            return tokenizer.encode(self.turns[0])
        messages = [{"role": "user", "content": self.turns[0]}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        for answer, turn in zip(answers, self.turns[1:], strict=False):
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": turn})
        return tokenizer.chat(messages)


# --- Loading -----------------------------------------------------------------------------------


def load_conversations(
    name: str, data_dir: Path | None = None, samples: int | None = None, seed: int = 0
) -> list[Conversation]:
    """The first `samples` conversations of benchmark `name` after a shuffle with `seed`.

    The shuffle depends only on the seed and the number of rows, so two runs (and two machines)
    decode the same prompts. What is shipped is not shuffled: its order mixes the categories. A
    benchmark with fewer conversations returns all it has. TensorFlow Datasets stores rows in
    another order, so its ids begin with `tfds-`. Raises `BenchmarkError`.
    """
    if name not in BENCHMARKS:
        close = difflib.get_close_matches(name, BENCHMARKS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise BenchmarkError(f"no benchmark {name!r}.{hint} There are: {', '.join(BENCHMARKS)}.")
    if samples is not None and samples < 1:
        raise BenchmarkError(f"samples = {samples}; expected 1 or more, or None for all.")
    if name in SHIPPED:
        spec = Spec(user_turns, "turns", "", (), "id", "category")
        found = _samples(name, spec, _rows(SHIPPED[name]))[:samples]
        return [dataclasses.replace(s, plain=name == "texts") for s in found]
    found = _find(name, data_dir)
    random.Random(seed).shuffle(found)
    return found[:samples]


def _samples(name: str, spec: Spec, rows: Iterable[Row], prefix: str = "") -> list[Conversation]:
    samples: list[Conversation] = []
    first: dict[str, str] = {}
    for number, row in enumerate(rows):
        id = prefix + (row.optional(spec.id) or str(number))
        if id in first:
            raise BenchmarkError(
                f"{row.where}: id {id!r} was used before, at {first[id]}; ids name the results,"
                " so each must occur once. Remove the copy."
            )
        first[id] = row.where
        category = row.optional(spec.category) or name
        samples.append(Conversation(id, category, tuple(spec.turns(row))))
    return samples


def _find(name: str, data_dir: Path | None) -> list[Conversation]:
    """All conversations of a benchmark, in file order, from the first source that has it."""
    spec, tried = SPECS[name], []
    sources = (
        ("local", lambda: _local(name, spec, data_dir), ""),
        ("hub", lambda: _hub(spec), ""),
        ("tfds", lambda: _tfds(spec), "tfds-"),
    )
    for source, rows, prefix in sources:
        try:
            samples = _samples(name, spec, rows(), prefix)
        except (_Unavailable, ImportError) as reason:
            tried.append(f"  {source:5}  {reason}")
            continue
        if not samples:
            tried.append(f"  {source:5}  the file holds no records")
            continue
        return samples
    base = data_dir or "<data-dir>"
    raise BenchmarkError(
        f"no data for benchmark {name!r}. Tried:\n"
        + "\n".join(tried)
        + f"\nPut a file {spec.stems[0]}.jsonl (also .jsonl.gz, .parquet, .csv) into"
        f" {base}/{spec.folder}, or {name}.jsonl into {base}, with fields {spec.needs}, and pass"
        f" --data-dir {base}. `--benchmark builtin` needs no files and no network."
    )


class _Unavailable(Exception):
    """Why a source cannot be used. The next source is tried."""


def _local(name: str, spec: Spec, data_dir: Path | None) -> Iterator[Row]:
    if data_dir is None:
        raise _Unavailable("no data directory was given")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise BenchmarkError(
            f"the data directory {str(data_dir)!r} is not a directory. Expected the folder that"
            f" holds {spec.folder}/ or {name}.jsonl. Correct the path, or leave it out."
        )
    folders = [root / "text" / spec.folder, root / spec.folder]
    folders += [root] if root.name == spec.folder else []
    files = [folder / f"{stem}{s}" for folder in folders for stem in spec.stems for s in _SUFFIXES]
    files += [folder / "data.zip" for folder in folders if spec.member]
    files += [root / f"{name}{suffix}" for suffix in _SUFFIXES]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        places = [f"{folder}/{'|'.join(spec.stems)}.jsonl[.gz]" for folder in folders]
        raise _Unavailable(f"none of {', '.join((*places, f'{root}/{name}.jsonl[.gz]'))}")
    return _rows(path, spec.member)


def _hub(spec: Spec) -> Iterator[Row]:
    if not spec.hub:
        raise _Unavailable("it is not on the hub in a form this project reads")
    hub = need("huggingface_hub", "eval", f"fetching {spec.hub}")
    try:  # without a network this answers from the hub's cache, if the files are in it
        folder = hub.snapshot_download(spec.hub, repo_type="dataset", allow_patterns=spec.hub_files)
    except Exception as error:  # its own errors, the HTTP client's, the file system's
        gated = " The data set is gated: accept its terms on its page, then `hf auth login`."
        raise _Unavailable(
            f"{spec.hub}: {type(error).__name__}: {_first_line(error)}"
            + (gated if spec.gated else "")
        ) from None
    paths = sorted(Path(folder).glob(spec.hub_files))
    if not paths:
        raise _Unavailable(f"{spec.hub}: no file matches {spec.hub_files!r}")
    return (row for path in paths for row in _rows(path, spec.member))


def _tfds(spec: Spec) -> Iterator[Row]:
    if not spec.tfds:
        raise _Unavailable("TensorFlow Datasets does not have it")
    purpose = f"reading {spec.tfds} from TensorFlow Datasets"
    need("array_record", "eval", purpose)  # the only format that needs no TensorFlow
    tfds = need("tensorflow_datasets", "eval", purpose)
    try:
        # Without the format's name, preparing a data set for the first time imports TensorFlow.
        stored = {"file_format": "array_record"}
        source = tfds.data_source(spec.tfds, split="test", builder_kwargs=stored)
    except Exception as error:  # downloads, disk, builders that call TensorFlow
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise _Unavailable(f"{spec.tfds}: {reason}") from None

    def text(value: object) -> object:
        return value.decode() if isinstance(value, bytes) else value

    return (
        Row(f"{spec.tfds}, row {i}", {k: text(v) for k, v in record.items()})
        for i, record in enumerate(source)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


# --- Files -------------------------------------------------------------------------------------


def _rows(path: Path, member: str = "") -> Iterator[Row]:
    """The records of a .jsonl, .jsonl.gz, .csv, .parquet or .zip (its file `member`) file."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                name = next(iter(fnmatch.filter(archive.namelist(), member)), None)
                if name is None:
                    raise BenchmarkError(f"{path}: no file in it matches {member!r}.")
                with archive.open(name) as file:
                    yield from _jsonl(f"{path}/{name}", file)
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                for number, record in enumerate(csv.DictReader(file)):
                    yield Row(f"{path}, row {number + 1}", record)
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                yield from _jsonl(str(path), file)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error, UnicodeDecodeError) as e:
        raise BenchmarkError(
            f"{path} cannot be read: {_first_line(e)}. The file is damaged or not what its name"
            " says; fetch it again."
        ) from e


def _jsonl(name: str, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:  # also a line that is not UTF-8
            raise BenchmarkError(
                f"{where}: not JSON ({_first_line(error)}). Expected one JSON object a line; fix"
                " the line, or fetch the file again."
            ) from None
        if not isinstance(record, dict):
            raise BenchmarkError(f"{where}: expected a JSON object, got {line[:40]!r}. Fix it.")
        yield Row(where, record)


def _parquet(path: Path) -> Iterator[Row]:
    pyarrow = need("pyarrow", "eval", f"reading {path.name}")
    parquet = need("pyarrow.parquet", "eval", f"reading {path.name}")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(256):
            for record in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", record)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # also text that is not UTF-8
        raise BenchmarkError(
            f"{path} cannot be read: {_first_line(error)}. Fetch the file again."
        ) from error
