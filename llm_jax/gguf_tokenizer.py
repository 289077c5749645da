"""The tokenizer that the metadata of a GGUF file describes."""

import collections
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_jax import CheckpointError, shown
from llm_jax.extras import need
from llm_jax.tokenizer import Tokenizer, named_errors, transformers, wrap

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    # tokenizer.ggml.pre -> how text is cut before byte-level BPE
    "default": "gpt2",
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "smollm": "digits",
    "qwen2": WORDS % "",
    "deepseek-r1-qwen": WORDS % "",
    "llama-bpe": WORDS % "{1,3}",
    "llama3": WORDS % "{1,3}",
}
"""Every digit alone in smollm and qwen2, up to three together in llama-bpe, all in gpt-2."""


LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id")
FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
LONGEST = 1024
"""Characters of the longest token; real ones have some hundred."""


def from_metadata(meta: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that GGUF metadata describes; `path` is for messages."""
    library, tokenizers = transformers(), _tokenizers()
    get = lambda key, default=None: meta.get(f"tokenizer.ggml.{key}", default)
    kind, tokens = get("model"), get("tokens")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if str(kind) not in builders or not tokens:
        known = ", ".join(builders)
        raise CheckpointError(f"{path}: tokenizer model is {kind!r}; supported are {known}")
    _check(get, path)
    with named_errors(path):
        tok = builders[kind](tokens, get, path)
        added: dict[int, list] = {3: [], 4: []}  # control, user-defined
        for token, token_type in zip(tokens, get("token_type", []), strict=False):
            if token_type in added:
                special = token_type == 3
                more = tokenizers.AddedToken(token, special=special, normalized=False)
                added[token_type].append(more)
        tok.add_special_tokens(added[3])  # at once: each call looks at all that there are
        tok.add_tokens(added[4])
        bos, eos = get("bos_token_id"), get("eos_token_id")
        add_bos = get("add_bos_token", kind == "llama" or get("pre") in ("llama-bpe", "llama3"))
        add_eos = get("add_eos_token", False)
        _add_ends(tok, tokens, bos if add_bos else None, eos if add_eos else None)
        named = {
            f"{name}_token": tokens[i]
            for name, i in dict(
                bos=bos, eos=eos, unk=get("unknown_token_id"), pad=get("padding_token_id")
            ).items()
            if type(i) is int and 0 <= i < len(tokens)  # some files have no valid padding token
        }
        hf = library.PreTrainedTokenizerFast(
            tokenizer_object=tok, clean_up_tokenization_spaces=False, **named
        )
    hf.chat_template = meta.get("tokenizer.chat_template")
    return wrap(hf, [get("eot_token_id")], path)


def _check(get: Callable, path: Path) -> None:
    """Raises `CheckpointError` for values of a wrong type or length, or outside the vocabulary."""

    def refuse(key, found, expected):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.{key} has {shown(repr(found), 80)}; expected {expected}: "
            "download the file again"
        )

    tokens = get("tokens")
    for key, kind in LISTS.items():
        values = get(key, [])
        if not isinstance(values, list):
            refuse(key, values, f"a list of {kind.__name__}")
        for value in values:
            if type(value) is not kind:
                refuse(key, value, f"{kind.__name__} alone")
        if key in ("scores", "token_type") and values and len(values) != len(tokens):
            refuse(key, len(values), f"as many entries as there are tokens, {len(tokens)}")
    if scores := [score for score in get("scores", []) if not math.isfinite(score)]:
        refuse("scores", scores[0], "finite numbers")
    if len(longest := max(tokens, key=len)) > LONGEST:
        refuse("tokens", longest, f"at most {LONGEST:,} characters a token")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in collections.Counter(tokens).items() if count > 1)
        refuse("tokens", twice, "every token once")
    for key in IDS:
        if (value := get(key)) is not None and not (
            type(value) is int and value in range(len(tokens))
        ):
            refuse(key, value, f"an id below {len(tokens)}, the number of tokens")
    for key in FLAGS:
        if type(value := get(key, False)) is not bool:
            refuse(key, value, "true or false")


def _byte_level(tokens: list[str], get, path: Path):
    """Byte-level BPE (GPT-2's): merges are given, and `pre` names the way text is cut first."""
    t = _tokenizers()
    pre = get("pre", "default")
    if str(pre) not in SPLITS:
        known = ", ".join(SPLITS)
        raise CheckpointError(f"{path}: pre-tokenizer {pre!r} is not supported; known are {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    tok = t.Tokenizer(t.models.BPE(vocab, merges, ignore_merges=pre in ("llama-bpe", "llama3")))
    split, level = SPLITS[pre], t.pre_tokenizers.ByteLevel
    if split == "gpt2":
        tok.pre_tokenizer = level(add_prefix_space=False)
    elif split == "digits":
        digits = t.pre_tokenizers.Digits(individual_digits=True)
        tok.pre_tokenizer = t.pre_tokenizers.Sequence([digits, level(add_prefix_space=False)])
    else:
        cut = t.pre_tokenizers.Split(t.Regex(split), "isolated")
        tok.pre_tokenizer = t.pre_tokenizers.Sequence(
            [cut, level(add_prefix_space=False, use_regex=False)]
        )
    if "qwen" in pre:
        tok.normalizer = t.normalizers.NFC()
    tok.decoder = t.decoders.ByteLevel()
    return tok


def _sentencepiece(tokens: list[str], get, path: Path):
    """SentencePiece's BPE: scores rank the merges, bytes stand in for unknown characters."""
    t = _tokenizers()
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = get("scores", [0.0] * len(tokens))
    merges = []
    for token, i in vocab.items():
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(scores[i], pair) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores keep the vocabulary's order
    unknown = get("unknown_token_id", 0)
    bpe = t.models.BPE(
        vocab,
        [pair for _, pair in merges],
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tok = t.Tokenizer(bpe)
    prefix = get("add_space_prefix", True)
    marks = [t.normalizers.Replace(" ", "▁")]
    tok.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("▁")] * prefix + marks)
    steps = [t.decoders.Replace("▁", " "), t.decoders.ByteFallback(), t.decoders.Fuse()]
    tok.decoder = t.decoders.Sequence(steps + [t.decoders.Strip(" ", 1, 0)] * prefix)
    return tok


def _add_ends(tok, tokens: list[str], bos: int | None, eos: int | None) -> None:
    """Makes `tok` put these ids around every text; None leaves one out."""
    processors = _tokenizers().processors
    ends = [(tokens[i], i) for i in (bos, eos) if i is not None]
    if ends:
        before = [tokens[bos]] if bos is not None else []
        after = [tokens[eos]] if eos is not None else []
        single = [*before, "$A", *after]
        tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)


def _tokenizers() -> ModuleType:
    return need("tokenizers", "models", "reading a tokenizer")
