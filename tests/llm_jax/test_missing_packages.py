"""A package that is not installed is named with the pip line, and never taken for a broken file."""

import sys

import pytest

from llm_jax import CheckpointError
from llm_jax.extras import MissingPackage
from llm_jax.formats import open_checkpoint
from llm_jax.registry import find_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors

LINE = r"pip install 'thimble-jax\[models\]'"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    cfg, where = tiny_config("llama", layers=1), tmp_path_factory.mktemp("models")
    params = tiny_params(cfg)
    return write_safetensors(where / "folder", params, cfg), write_gguf(where / "x", params, cfg)


@pytest.fixture
def folder(paths):
    return open_checkpoint(paths[0])


@pytest.fixture
def gguf(paths, tmp_path):
    (tmp_path / "x.gguf").write_bytes(paths[1].read_bytes())
    return open_checkpoint(tmp_path / "x.gguf")


def without(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_safetensors(folder, monkeypatch):
    without(monkeypatch, "safetensors")
    with pytest.raises(MissingPackage, match=f"reading safetensors files needs .*{LINE}"):
        folder.check(folder.config())


def test_gguf(gguf, monkeypatch):
    without(monkeypatch, "gguf")
    with pytest.raises(MissingPackage, match=f"reading GGUF files needs gguf.*{LINE}"):
        gguf.config()


@pytest.mark.parametrize("missing, kind", [("transformers", "folder"), ("tokenizers", "gguf")])
def test_tokenizers(request, monkeypatch, missing, kind):
    checkpoint = request.getfixturevalue(kind)
    without(monkeypatch, missing)
    with pytest.raises(MissingPackage, match=f"reading a tokenizer needs {missing}.*{LINE}"):
        checkpoint.tokenizer()


def test_chat_templates(folder, monkeypatch):
    tokenizer = folder.tokenizer()
    without(monkeypatch, "jinja2")
    assert tokenizer.decode(tokenizer.encode("in the")) == "in the"
    with pytest.raises(MissingPackage, match=f"a chat template needs jinja2.*{LINE}"):
        tokenizer.chat([dict(role="user", content="Hi!")])


def test_the_hub(monkeypatch, tmp_path):
    """What else can be done is said, too: this is one way of several to get a checkpoint."""
    without(monkeypatch, "huggingface_hub")
    with pytest.raises(CheckpointError, match=LINE) as found:
        find_checkpoint("qwen2.5-0.5b", cache_dir=tmp_path, progress=print)
    assert "--checkpoint FILE.gguf" in str(found.value)
