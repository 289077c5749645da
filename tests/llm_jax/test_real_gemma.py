"""Gemma 3 270M as its GGUF file has it, against transformers and sentencepiece."""

import dataclasses
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.attention import causal_step
from llm_jax.cache import empty_caches
from llm_jax.files import cache_folder
from llm_jax.formats import open_checkpoint
from llm_jax.model import forward

NAME = "gemma-3-270m-q4_k_m.gguf"
LENGTH = 640
"""Tokens that are compared; sliding layers see 512."""
TOLERANCE = 1e-4
"""Of the largest logit, about 45. transformers in float32 is 4e-4 away from itself in float64, and
1.1e-3 away from this model."""
TEXTS = (
    "",
    "Hello world",
    "  two spaces",
    "   three  and   more    spaces    ",
    "tab\tand\nnewline\n\n\nlines\r\nend",
    "\n \n  \n   \n",
    " " * 40 + "x",
    "x = [i**2 for i in range(10)]\n    return x\n",
    "1234567890 3.14159 1,000,000",
    "naïve café Übergröße",
    "e\u0301 decomposed, ﬁ ligature, Ⅷ ①",
    "日本語のテキストと中文文本",
    "한국어 문장",
    "русский текст, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🤷🏽",
    "\x07\u200b\ufeffodd a\u00a0b\u2003c",
    "\U00013000\U0001f9ff\U000f1234 bytes",
    "<b>bold</b> </s> <s> <table><tr>",
    "don't won't I'LL http://example.com/a?b=c&d=%20#frag",
    "\\frac{a}{b} $\\alpha^2$",
    "a" * 40,
    "= Robert Boulter = \n Robert Boulter is an English film , television and theatre actor . @-@",
)


@pytest.fixture(scope="module")
def path():
    places = cache_folder(), Path("~/models").expanduser()
    found = [place / NAME for place in places if (place / NAME).exists()]
    if not found:
        pytest.skip(f"{NAME} is in neither {places[0]} nor ~/models; its terms forbid a copy here")
    return found[0]


@pytest.fixture(scope="module")
def tokenizer(path):
    return open_checkpoint(path).tokenizer()


@pytest.fixture
def tokens(tokenizer, shared_data):
    source = shared_data / "text" / "wikitext2" / "wiki.test.raw.gz"
    return tokenizer.encode(gzip.decompress(source.read_bytes()).decode("utf-8"))[:LENGTH]


def perplexity(logits, tokens):
    logits = np.asarray(logits[:-1], np.float64)
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return np.exp(np.mean(total - logits[np.arange(len(logits)), tokens[1:]]))


@pytest.mark.reference
@pytest.mark.slow
def test_logits_and_perplexity_are_those_of_transformers(path, tokens):
    """transformers dequantizes the file itself, with the package gguf."""
    pytest.importorskip("torch", reason="torch is the reference: pip install -e '.[reference]'")
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        want = model.eval()(torch.tensor([tokens])).logits[0].numpy()

    checkpoint = open_checkpoint(path)
    cfg = checkpoint.config("float32")
    params = checkpoint.load(cfg)
    step, run = causal_step(0, LENGTH, LENGTH), jax.jit(forward, static_argnames="cfg")

    def logits(cfg):
        caches = empty_caches(cfg, 1, LENGTH)
        return np.asarray(run(params, jnp.asarray([tokens]), caches, step, cfg=cfg)[0][0])

    got = logits(cfg)
    difference = np.abs(got - want).max()
    ours, theirs = perplexity(got, tokens), perplexity(want, tokens)
    print(
        f"largest difference of a logit {difference:.1e}, of logits up to {np.abs(want).max():.1f};"
        f" perplexity {ours:.5f}, of transformers {theirs:.5f}"
    )
    tolerance = TOLERANCE * np.abs(want).max()
    assert difference < tolerance
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert cfg.window == 512  # and it matters here
    wide = logits(dataclasses.replace(cfg, window=LENGTH))
    assert np.abs(wide[:512] - want[:512]).max() < tolerance
    assert np.abs(wide[512:] - want[512:]).max() > 10 * tolerance


@pytest.fixture(scope="module")
def library(path):
    """The library of sentencepiece on a model file made of the metadata, read by package gguf."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="it is the reference")
    reader = pytest.importorskip("gguf", reason="it reads the file").GGUFReader(path)
    from sentencepiece import sentencepiece_model_pb2

    stated = lambda key: reader.fields[f"tokenizer.ggml.{key}"].contents()
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(stated("tokens"), stated("scores"), stated("token_type")):
        # The converter of llama.cpp has written the spaces of user-defined tokens as spaces.
        piece = token.replace(" ", "▁") if kind == 4 else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    for name in ("unk", "bos", "eos", "pad"):
        i = stated({"unk": "unknown", "pad": "padding"}.get(name, name) + "_token_id")
        setattr(trainer, f"{name}_id", i)
        setattr(trainer, f"{name}_piece", stated("tokens")[i])
    normalizer.name, normalizer.add_dummy_prefix = "identity", False
    normalizer.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.reference
@pytest.mark.slow
def test_token_ids_are_those_of_sentencepiece(tokenizer, library, shared_data):
    bos = 2
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == [bos, *library.encode(text)], repr(text)
        assert tokenizer.decode(ids) == text
    source = shared_data / "text" / "wikitext2" / "wiki.test.raw.gz"
    lines = gzip.decompress(source.read_bytes()).decode("utf-8").splitlines(keepends=True)
    different = [x for x in lines if tokenizer.encode(x) != [bos, *library.encode(x)]]
    assert len(lines) == 4358 and not different


@pytest.mark.slow
def test_a_text_ends_with_its_own_token_and_not_with_a_tag_of_html(tokenizer):
    ends = [tokenizer.hf.convert_ids_to_tokens(i) for i in tokenizer.eos]
    assert ends == ["<eos>", "<end_of_turn>"]
