"""tekken.json: Mistral's byte-level BPE, as a tokenizer of `tokenizers`.

The file has the bytes of each token in the order of their ranks, and the expression that cuts text.
Special tokens have the first ids. Two neighbours are joined where their bytes are a token, the
lowest rank first, so every cut of a token into two tokens is a merge.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from llm_jax import CheckpointError
from llm_jax.extras import need
from llm_jax.sentencepiece import template_of
from llm_jax.token_bytes import letters
from llm_jax.tokenizer import Tokenizer, named_errors, transformers, wrap
from llm_jax.untrusted import read_object
from llm_jax.values import ConfigError, Values, short

SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
"""The special tokens, by id, of files that name none (versions up to 7)."""
_TURNS = (
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}"
    "{{ raise_exception('there is no role ' + m.role) }}{% endif %}{% endfor %}"
)
FIRST_TEMPLATE = (
    "{{ bos_token }}{% set system = namespace(text='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set system.text = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST]{{ (system.text if loop.last else '') + m.content }}[/INST]"
) + _TURNS
"""Of version 3: what the system says stands in front of the last message."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
) + _TURNS
TEMPLATES = {"v3": FIRST_TEMPLATE, "v7": TEMPLATE, "v11": TEMPLATE, "v13": TEMPLATE}
"""How a conversation is written, by the file's version, where the folder has no template."""

_VOCABULARY, _SPECIALS, _LONGEST, _PATTERN = 2**22, 2**16, 1024, 4096
"""The most tokens and special tokens; bytes of a token and characters of the pattern."""


def from_tekken(path: Path) -> Tokenizer:
    """The tokenizer that a tekken.json describes."""
    found = read_object(path)
    try:
        config = Values(found).mapping("config")
        if config is None:
            raise ConfigError("config is missing")
        size = config.integer("default_vocab_size", 2, _VOCABULARY)
        count = config.integer("default_num_special_tokens", 3, min(_SPECIALS, size - 1))
        pattern, version = config.text("pattern"), config.text("version")
        if len(pattern) > _PATTERN:
            config.refuse("pattern", f"at most {_PATTERN} characters")
        special = _special(Values(found).list_of(dict, "special_tokens"), count, version)
        tokens = _tokens(Values(found).list_of(dict, "vocab"), size - count)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; download the file again") from error
    with named_errors(path):
        hf = _built(special, tokens, pattern)
    hf.chat_template = template_of(path.parent) or TEMPLATES.get(version)
    return wrap(hf, (), path)


def _special(named: list[dict[str, Any]], count: int, version: str) -> list[str]:
    """The special tokens by id; ids that have none get a name that nobody writes."""
    found = {i: f"<SPECIAL_{i}>" for i in range(count)}
    if not named:
        if version not in ("v3", "v7"):
            raise ConfigError(f"special_tokens is missing; version {short(version)} needs it")
        named = [dict(rank=i, token_str=token) for i, token in enumerate(SPECIAL)]
    for entry in map(Values, named):
        found[entry.integer("rank", 0, count - 1)] = entry.text("token_str")
    if len(set(found.values())) < count or "" in found.values():
        raise ConfigError("special_tokens has an empty one, or one twice")
    if missing := {"<s>", "</s>"} - set(found.values()):
        raise ConfigError(f"special_tokens lacks {min(missing)}")
    return list(found.values())


def _tokens(vocab: list[dict[str, Any]], count: int) -> dict[bytes, int]:
    """Bytes of a token -> its rank, of the first `count`."""
    if len(vocab) < count:
        raise ConfigError(f"vocab has {len(vocab)} tokens; expected {count} or more")
    found: dict[bytes, int] = {}
    for rank, entry in enumerate(map(Values, vocab[:count])):
        entry.integer("rank", rank, rank)
        try:
            token = base64.b64decode(entry.text("token_bytes"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ConfigError(f"token {rank} of vocab is not base64: {error}") from error
        if not 0 < len(token) <= _LONGEST or token in found:
            raise ConfigError(f"token {rank} of vocab is there twice, empty, or too long")
        found[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in found]:
        raise ConfigError(f"vocab lacks the byte {missing[0]}")
    return found


def _built(special: list[str], tokens: dict[bytes, int], pattern: str) -> Any:
    """The tokenizer of `transformers`."""
    library, t = transformers(), need("tokenizers", "models", "reading a tokenizer")
    moved = letters()
    spelled = {token: token.decode("latin-1").translate(moved) for token in tokens}
    vocab = {name: i for i, name in enumerate(special)}
    # What is spelled like a special token is always read as that one.
    own = {token: name for token, name in spelled.items() if name not in vocab}
    vocab |= {name: len(special) + tokens[token] for token, name in own.items()}
    merges = []
    for token in own:
        for at in range(1, len(token)):
            one, two = own.get(token[:at]), own.get(token[at:])
            if one is not None and two is not None:
                merges.append((one, two))
    tok = t.Tokenizer(t.models.BPE(vocab, merges, ignore_merges=True))
    cut = t.pre_tokenizers.Split(t.Regex(pattern), "isolated")
    level = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = t.pre_tokenizers.Sequence([cut, level])
    tok.decoder = t.decoders.ByteLevel()
    added = [t.AddedToken(name, special=True, normalized=False) for name in special]
    tok.add_special_tokens(added)
    tok.post_processor = t.processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", vocab["<s>"])]
    )
    named = {f"{name}_token": f"<{token}>" for name, token in dict(unk="unk", pad="pad").items()}
    named = {name: token for name, token in named.items() if token in vocab}
    return library.PreTrainedTokenizerFast(
        tokenizer_object=tok,
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token="</s>",
        **named,
    )
