"""Names of tensors in people's checkpoints: what is the model's, and what may be left out."""

import re
from collections.abc import Iterable

from llm_jax import shown

_WRAPPERS = re.compile(r"^(?:base_model\.model\.|module\.)+")
"""What training code puts in front of a model's names."""
_TEXT = re.compile(r"^(?:language_model\.(?:model\.|(?=lm_head\.))?|model\.language_model\.)")
"""What a model that also sees or hears calls its language model."""

LEFTOVERS = {
    # what they are -> their names
    "a value or classification head": r"(?:v_head|value_head|reward_head|critic_head|score"
    r"|classifier|qa_outputs)\..*",
    "scales of 8-bit caches and activations": r".*[._](?:k_scale|v_scale|q_scale|kv_scale"
    r"|prob_scale|input_scale|input_zero_point|activation_scale|output_scale)",
    "layers that predict several tokens": r"(?:model\.)?mtp(?:_\w+)?\..*",
    "parts for pictures and sound": r"(?:model\.)?(?:visual|vision_tower|vision_model"
    r"|vision_encoder|vision_embed_tokens|image_newline|audio_tower|embed_vision|embed_audio"
    r"|multi_modal_projector)(?:\..*)?",
}
_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d{1,9})\..*")
_LAYERS_BEHIND = 4
"""Layers behind the last that may be left out, as those that predict further tokens. If there are
more, the number of layers in the description is wrong."""
_SHOWN = 3
"""Names that a message has of each kind."""


def plain_name(name: str) -> str:
    """A tensor's name without the prefixes of wrappers: model.layers. and so on, lm_head."""
    bare = _WRAPPERS.sub("", name.replace("_orig_mod.", ""))
    text = _TEXT.sub("", bare)
    return text if text == bare or text.startswith("lm_head.") else f"model.{text}"


def leftover(name: str, layers: int) -> str | None:
    """What a tensor is that no model of so many layers needs; None for one that it may need."""
    for kind, pattern in LEFTOVERS.items():
        if re.fullmatch(pattern, name):
            return kind
    found = _LAYER.fullmatch(name)
    behind = found is not None and layers <= int(found[1]) < layers + _LAYERS_BEHIND
    return f"layers behind the {layers} of this model" if behind else None


def told(left_out: dict[str, str]) -> str:
    """One line on tensors that are left out: how many of each kind, and the first names."""
    kinds: dict[str, list[str]] = {}
    for name, kind in left_out.items():
        kinds.setdefault(kind, []).append(name)
    parts = (f"{kind} ({_names(names)})" for kind, names in kinds.items())
    return f"left out, because no text comes from them: {'; '.join(parts)}"


def _names(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown(name, 100) for name in names[:_SHOWN]) + more
