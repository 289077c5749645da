"""A target for atheris: headers of GGUF and safetensors files, guided by coverage.

    pip install atheris && python tests/faults/fuzz.py [CORPUS] -max_total_time=1800

Any exception but a named one stops it and writes the input that did it. So do 10 s without an end,
and 2 GB of memory.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import atheris

with atheris.instrument_imports(include=["llm_jax"]):
    from llm_jax import LLMError
    from llm_jax.formats import open_checkpoint
    from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors

CFG = tiny_config("qwen2", layers=1, d_model=32, d_ff=64)
FOLDER = Path(tempfile.mkdtemp())
MODEL = write_safetensors(FOLDER / "model", tiny_params(CFG), CFG, tokenizer=False)


def read(data: bytes) -> None:
    """The first byte chooses the format; the rest is the file."""
    if data[:1] < b"\x80":
        path = FOLDER / "model.gguf"
        path.write_bytes(data[1:])
    else:
        path = MODEL
        (MODEL / "model.safetensors").write_bytes(data[1:])
    try:
        checkpoint = open_checkpoint(path)
        cfg = checkpoint.config("float32")
        checkpoint.check(cfg)
        checkpoint.load(cfg)
    except LLMError:
        pass


def seeds(corpus: Path) -> None:
    """Writes a valid file of each format, from which the fuzzer starts."""
    corpus.mkdir(parents=True, exist_ok=True)
    valid = write_gguf(FOLDER / "seed.gguf", tiny_params(CFG), CFG).read_bytes()
    (corpus / "gguf").write_bytes(b"\x00" + valid)
    (corpus / "safetensors").write_bytes(b"\xff" + (MODEL / "model.safetensors").read_bytes())


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if not word.startswith("-")]
    corpus = Path(given[0] if given else FOLDER / "corpus")
    seeds(corpus)
    words = [word for word in sys.argv if word not in given]
    atheris.Setup([*words, str(corpus), "-timeout=10", "-rss_limit_mb=2048"], read)
    atheris.Fuzz()
