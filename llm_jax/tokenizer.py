"""Tokenizers: from a Hugging Face folder, from the metadata of a GGUF file, and bytes for tests.

All have the methods encode, decode, chat, stream, `eos` (every id that ends a turn) and `vocab`.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_jax import CheckpointError
from llm_jax.extras import need

TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "</s>",
)
"""Added tokens that end a turn in some model family, besides the eos that a checkpoint names."""


class _Interface:
    """What all tokenizers share: all of it follows from `encode` and `decode`."""

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation (dictionaries with role and content) up to the reply's start."""
        return self.encode(plain_chat(messages))

    @property
    def chat_fallback(self) -> str | None:
        """Why `chat` joins messages as plain text, or None where the model's template is used."""
        return "the tokenizer has no chat template"

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, in pieces that never end inside a character."""
        decoder = StreamDecoder(self)
        for token in ids:
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.flush():
            yield piece


@dataclasses.dataclass(frozen=True)
class Tokenizer(_Interface):
    """A `transformers` fast tokenizer behind five plain functions."""

    hf: Any
    eos: tuple[int, ...]

    @property
    def vocab(self) -> int:
        """Ids in use; a model's embedding may have more rows."""
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the model's bos comes first where the model uses one."""
        return list(self.hf.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=True)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        if self.chat_fallback:
            return super().chat(messages)
        need("jinja2", "models", "a chat template")
        text = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.hf.encode(text, add_special_tokens=False))

    @property
    def chat_fallback(self) -> str | None:
        return None if self.hf.chat_template else super().chat_fallback


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(_Interface):
    """UTF-8 bytes as ids 0 … 255 and one end-of-text id, 256. Needs no files."""

    eos: tuple[int, ...] = (256,)
    vocab: int = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class StreamDecoder:
    """Turns ids into text; keeps ids back until their bytes are whole characters."""

    def __init__(self, tokenizer):
        self._decode = tokenizer.decode
        self._shown: list[int] = []  # the last ids shown: decoding may depend on what is in front
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._held.append(int(token))
        # A character has at most four bytes; 64 ids without a whole one are not UTF-8.
        return (
            self._release() if not self._text().endswith("\ufffd") or len(self._held) > 64 else ""
        )

    def flush(self) -> str:
        """The text of the ids that are still kept back; U+FFFD stands for incomplete characters."""
        return self._release()

    def _text(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]

    def _release(self) -> str:
        text = self._text()
        if text:
            self._shown = self._held
        self._held = []
        return text


def plain_chat(messages: list[dict[str, str]]) -> str:
    """A conversation as "role: content" lines, for models without a chat template."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"


def wrap(hf: Any, extra_eos: Iterable[int] = ()) -> Tokenizer:
    """A `Tokenizer` whose eos holds the tokenizer's own, the extra ids and known turn ends."""
    added = {token.content: i for i, token in hf.added_tokens_decoder.items()}
    ends = [hf.eos_token_id, *extra_eos, *(added.get(name) for name in TURN_ENDS)]
    return Tokenizer(hf, tuple(dict.fromkeys(int(i) for i in ends if i is not None)))


def from_folder(path: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder: tokenizer.json and tokenizer_config.json."""
    transformers = _transformers()
    path = Path(path)
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            f"{path} has no tokenizer.json; download it from the model's repository"
        )
    fast = (path / "tokenizer.json").exists()
    try:
        kind = transformers.PreTrainedTokenizerFast if fast else transformers.AutoTokenizer
        hf = kind.from_pretrained(str(path))
        generation = path / "generation_config.json"
        ends = (
            json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
        )
    except Exception as error:  # whatever the parsers raise, the file is what the user can mend
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {error}") from error
    return wrap(hf, ends if isinstance(ends, list) else [ends])


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


def from_metadata(meta: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that GGUF metadata describes; `path` is for messages."""
    transformers, tokenizers = _transformers(), _tokenizers()
    get = lambda key, default=None: meta.get(f"tokenizer.ggml.{key}", default)
    kind, tokens = get("model"), get("tokens")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders or not tokens:
        known = ", ".join(builders)
        raise CheckpointError(f"{path}: tokenizer model is {kind!r}; supported are {known}")
    tok = builders[kind](tokens, get, path)
    for i, token_type in enumerate(get("token_type", [])):
        if token_type in (3, 4):  # control, user-defined
            added = tokenizers.AddedToken(tokens[i], special=token_type == 3, normalized=False)
            (tok.add_special_tokens if added.special else tok.add_tokens)([added])
    bos, eos = get("bos_token_id"), get("eos_token_id")
    add_bos = get("add_bos_token", kind == "llama" or get("pre") in ("llama-bpe", "llama3"))
    _add_ends(tok, tokens, bos if add_bos else None, eos if get("add_eos_token", False) else None)
    named = {
        f"{name}_token": tokens[i]
        for name, i in dict(
            bos=bos, eos=eos, unk=get("unknown_token_id"), pad=get("padding_token_id")
        ).items()
        if i is not None and i < len(tokens)
    }
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, clean_up_tokenization_spaces=False, **named
    )
    hf.chat_template = meta.get("tokenizer.chat_template")
    return wrap(hf, [get("eot_token_id")])


def _byte_level(tokens: list[str], get, path: Path):
    """Byte-level BPE (GPT-2's): merges are given, and `pre` names the way text is cut first."""
    t = _tokenizers()
    pre = get("pre", "default")
    if pre not in SPLITS:
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


def _transformers() -> ModuleType:
    return need("transformers", "models", "reading a tokenizer")


def _tokenizers() -> ModuleType:
    return need("tokenizers", "models", "reading a tokenizer")
