"""Every byte of a run before it starts: what is resident, what streams, what the draft shares.

Pure arithmetic on a `Config`; no device is touched, so the allocator can be limited to the plan.
"""

import dataclasses
import functools
import math

import jax

from llm_jax.attention import caches_for
from llm_jax.config import DTYPES, Config
from llm_jax.params import Attention, JoinedAttention, Params, abstract
from llm_jax.quantize import check_grouping, quantized_bytes
from pallas_kernels.quantized_matmul.api import LARGEST
from pallas_kernels.quantized_matmul.packing import fields_of, packed_bytes
from pallas_kernels.quantized_matmul.reference import PART
from pallas_kernels.residual_decode.triton import why_not
from pallas_kernels.tree_attention.api import HEADS
from subspec_jax import SubspecError
from subspec_jax.offload import streamed_bytes
from subspec_jax.residual.split import SLAB, Split, has_split, is_split, parts_of
from subspec_jax.substitute import substitute_shapes
from subspec_jax.tree import TreeSpec, cache_slots
from subspec_jax.verify import QUEUED, rows_at_a_time

UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


class PlanError(SubspecError):
    """A limit no plan can meet; the message names the least that would work."""


def parse_bytes(text: str) -> int:
    """Bytes meant by "8GB", "7.5 GiB" or "500MB". As on graphics cards, 1 GB is 2**30 bytes."""
    compact = text.replace(" ", "").upper().replace("I", "")
    for unit, size in UNITS.items():
        if compact.endswith(unit):
            try:
                value = float(compact.removesuffix(unit))
            except ValueError:
                break
            if 0 < value < math.inf:
                return round(value * size)
    raise PlanError(f"{text!r} is not an amount of memory; write for example 8GB, 7.5GB or 500MB")


def show_bytes(count: float) -> str:
    """ "7.93 GB", in the same units as `parse_bytes`."""
    for unit in ("GB", "MB", "KB"):
        if abs(count) >= UNITS[unit]:
            return f"{count / UNITS[unit]:.2f} {unit}"
    return f"{count:.0f} B"


@dataclasses.dataclass(frozen=True)
class Draft:
    """How tokens are drafted, as far as memory goes.

    `bits` and `group` describe substitutes (bits None: there are none); `model` is a model apart.
    """

    bits: int | None = 4
    group: int = 64
    head_bits: int | None = None
    """Bits of an output head of the draft's own; None shares the target's."""
    share_resident: bool = True
    """Resident layers serve the draft as they are; otherwise it has substitutes of them too."""
    own_cache: bool = False
    model: Config | None = None


NO_DRAFT = Draft(bits=None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where everything goes. Bytes; `device` and `host` list all that is kept there, by name."""

    cfg: Config
    limit: int
    resident: int
    """So many layers stay on the device (`stays`)."""
    table_on_host: bool
    """The embedding table is a NumPy array in host memory; the draft has a low-bit copy."""
    max_length: int
    spec: TreeSpec
    draft: Draft
    chunk: int
    ahead: int
    device: dict[str, int]
    host: dict[str, int]
    streamed_bytes: int
    """What one pass of the target streams."""
    model: Params = dataclasses.field(repr=False)
    """The target as shapes and dtypes."""

    @property
    def streamed(self) -> int:
        return self.cfg.layers - self.resident

    @property
    def stays(self) -> frozenset[int]:
        """The numbers of the layers that stay on the device."""
        return _stay(self.cfg.layers, self.resident, self.streams_residuals)

    @property
    def total(self) -> int:
        """Predicted peak of device memory."""
        return sum(self.device.values())

    @property
    def streams_residuals(self) -> bool:
        """Layers stream as residuals of their substitutes and not as they are."""
        return has_split(self.model.layers)

    @property
    def split_head(self) -> bool:
        """The output head is a substitute, with which the draft computes, and its residual."""
        return is_split(self.model.head_DV)

    @property
    def draft_step_bytes(self) -> int:
        """Bytes of weights that a draft step reads."""
        cfg, d = self.cfg, self.draft
        if d.model is not None:
            return d.model.parameter_count * DTYPES[d.model.dtype]
        if d.bits is None:
            return 0
        drafted = _drafted(self.model, d, self.resident)
        own = sum(_substitute_bytes(layer, d) for layer in drafted)
        shared = self.model.layers[: self.cfg.layers - len(drafted)]
        head = self.device.get("draft head", cfg.vocab * cfg.d_model * DTYPES[cfg.dtype])
        if self.split_head:
            head = sum(map(_bytes, jax.tree.leaves(self.model.head_DV.substitute)))
        return sum(map(streamed_bytes, shared)) + own + head

    def pass_seconds(self, link: float) -> float:
        """A streamed pass at `link` bytes a second, with nothing else in the way."""
        return self.streamed_bytes / link

    def tokens_per_second(
        self, tau: float, link: float, memory: float, overhead: float = 0.005
    ) -> float:
        """At most tau / (pass + draft steps + overhead): every byte at the measured bandwidths,
        arithmetic free. Bytes a second; seconds."""
        draft = self.spec.steps * self.draft_step_bytes / memory
        return tau / (self.pass_seconds(link) + draft + overhead)


def published_tau(depth: int, hazard: float = 0.9749) -> float:
    """Emitted tokens a pass at constant acceptance per level: 28.4 at depth 48.

    The hazard is fitted to SubSpec's README (Qwen2.5-7B, MT-Bench, width 6, tau 28.35 at depth 48).
    """
    return (1 - hazard ** (depth + 1)) / (1 - hazard)


def _stay(layers: int, resident: int, residual: bool) -> frozenset[int]:
    """The first ones. Residuals evenly spread between the first and the last layer: one that stays
    has to be put together as well, and the link is busy meanwhile only if others are still to come.
    """
    if not residual:
        return frozenset(range(resident))
    gaps = max(1, layers - resident - 1)
    moved = {(i * (layers - 1) + gaps // 2) // gaps for i in range(layers - resident)}
    return frozenset(range(layers)) - moved


def _splits(model: Params) -> list[Split]:
    return [w for w in jax.tree.leaves(model.layers, is_leaf=is_split) if is_split(w)]


def _bytes(leaf) -> int:
    return leaf.size * leaf.dtype.itemsize


def _drafted(model: Params, draft: Draft, resident: int) -> tuple:
    """The layers of which the draft has substitutes."""
    shares = draft.share_resident and not has_split(model.layers)
    return model.layers[resident if shares else 0 :]


def _substitute_bytes(layer, draft: Draft) -> int:
    """Bytes of the matrices that `subspec_jax.substitute` makes of the layer."""
    leaves, structure = jax.tree.flatten(layer)
    alike = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves)
    return _low_bytes(structure, tuple(alike), draft.bits, draft.group)


@functools.cache
def _low_bytes(structure, leaves, bits: int, group: int) -> int:
    low = substitute_shapes(jax.tree.unflatten(structure, leaves), bits, group)
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(low) if leaf.ndim > 1)


def cache_bytes(model: Params, cfg: Config, slots: int, scratch: int) -> int:
    """Bytes of the caches that a model of these shapes fills."""
    empty = functools.partial(caches_for, model, cfg, 1, slots, scratch)
    return sum(map(_bytes, jax.tree.leaves(jax.eval_shape(empty))))


def work_bytes(
    cfg: Config,
    spec: TreeSpec,
    draft: Draft,
    slots: int,
    chunk: int,
    plain: bool = True,
    residual: bool = False,
    kernels: bool = False,
    split_head: bool = False,
) -> int:
    """Scratch of what runs at a time: blocks of prefill or verification, the head, a draft step.

    Where the cache does not hold keys and values as they are (`plain` is False), one layer's are
    rebuilt. Where layers are residuals, one matrix is put together at a time, or with `kernels` a
    part of it; they decode residuals and attend to plain caches without work space, and multiply
    low-bit matrices so up to 64 rows, beyond which a part of one is made dense.
    """
    size = DTYPES[cfg.dtype]
    rebuilt = 0 if plain else 4 * slots * cfg.kv_heads * cfg.head_dim * (4 + size)

    def block(tokens):
        scores = cfg.heads * tokens * slots * (4 + size)  # logits in float32, weights in the dtype
        if kernels and plain and cfg.head_dim in HEADS:
            scores = 2 * tokens * cfg.heads * cfg.head_dim * 4  # averages of parts of the slots
        wide = tokens * (3 * cfg.d_ff + 6 * cfg.d_model) * size
        slab = 0 if kernels else DECODE_BYTES * min(SLAB, largest)
        decoded = (part if kernels else largest) * size + slab if residual else 0
        return max(scores, decoded) + wide + tokens * slots + rebuilt

    logits = rows_at_a_time(spec.nodes, split_head) * cfg.vocab * 4
    head = 2 * logits
    largest = max(map(math.prod, cfg.joined_matrices.values()))
    fields = fields_of(draft.bits or 4)
    part = max(math.prod(s) // parts_of(s, fields) for s in cfg.joined_matrices.values())
    if split_head:
        weights = cfg.d_model * cfg.vocab
        parts = parts_of((cfg.d_model, cfg.vocab), fields) if kernels else 1
        decoded = weights // parts * (size + (0 if kernels else 4))
        head = logits + max(logits, decoded + 2 * logits // parts)
        head = max(head, decoded + 2 * spec.nodes * cfg.vocab * 4 // parts)  # a greedy draw
    rows = spec.width + spec.lookup
    step = rows * cfg.vocab * 4 * 3 + block(rows)
    if draft.bits is not None:
        low = max(largest, cfg.d_model * cfg.vocab) if draft.head_bits is not None else largest
        if not kernels:
            step += low * size  # a matrix is made dense
        elif max(rows, draft.own_cache * chunk) > LARGEST:
            step = max(step, block(chunk)) + min(low, PART) * size  # a part of it is
    return max(QUEUED * block(max(chunk, spec.nodes)), head, step)


DECODE_BYTES = 20
"""Work space a weight of a slab that is put together (`residual_device.SLAB`)."""


def _lay_out(
    model, cfg, spec, draft, max_length, chunk, ahead, resident, table_on_host, cache, kernels
):
    """(device items, host items) of one way to place things."""
    size = DTYPES[cfg.dtype]
    matrices = [streamed_bytes(layer) for layer in model.layers]
    table = cfg.vocab * cfg.d_model * size
    slots = cache_slots(max_length, spec)
    kept = sum(_bytes(leaf) for w in _splits(model) for leaf in jax.tree.leaves(w.substitute))
    vectors = sum(map(_bytes, jax.tree.leaves(model.layers))) - sum(matrices) - kept
    plain = all(isinstance(layer.attn, Attention | JoinedAttention) for layer in model.layers)
    stays = _stay(cfg.layers, resident, kept > 0)
    moved = [size for i, size in enumerate(matrices) if i not in stays]
    device = {
        "embedding": 0 if table_on_host else table,
        "output head": sum(map(_bytes, jax.tree.leaves(model.head_DV))),
        "norms and biases": vectors + cfg.d_model * size,
        "resident layers": sum(matrices) - sum(moved),
        "streaming ring": min(ahead + 1, len(moved)) * max(moved, default=0),
        "KV cache": cache,
        "substitutes": kept,
    }
    if draft.bits is not None:
        if not kept:
            drafted = _drafted(model, draft, resident)
            device["substitutes"] = sum(_substitute_bytes(layer, draft) for layer in drafted)
        if draft.head_bits is not None and not is_split(model.head_DV):
            low = packed_bytes(cfg.d_model, cfg.vocab, draft.head_bits, draft.group)
            device["draft head"] = low
        if table_on_host:
            table_copy = quantized_bytes(cfg.d_model, cfg.vocab, draft.bits, draft.group)
            device["substitute embedding"] = table_copy
    if draft.model is not None:
        device["draft model"] = draft.model.parameter_count * DTYPES[draft.model.dtype]
        small = abstract(draft.model)
        device["draft KV cache"] = cache_bytes(small, draft.model, slots, spec.places)
    elif draft.own_cache:
        device["draft KV cache"] = cache
    how = plain, kept > 0, kernels, is_split(model.head_DV)
    device["work space"] = work_bytes(cfg, spec, draft, slots, chunk, *how)
    host = {"streamed layers": sum(moved), "embedding": table if table_on_host else 0}
    return device, host


def make_plan(
    cfg: Config,
    limit: int,
    spec: TreeSpec,
    draft: Draft = NO_DRAFT,
    max_length: int = 2048,
    chunk: int = 512,
    ahead: int = 1,
    resident: int | None = None,
    table_on_host: bool | None = None,
    spare: float = 0.02,
    model: Params | None = None,
    kernels: bool = False,
) -> Plan:
    """The plan that streams least: as many resident layers as the limit holds.

    `model` is a tree of shapes and dtypes, where the layers are not the plain ones of `cfg`.
    `kernels`: the device runs the package's Triton kernels (see `offload.card_has_kernels`).
    `resident` and `table_on_host` fix a choice that is otherwise made here; a tied table is the
    head and stays on the device. `spare` of the limit is left to the allocator's rounding. Raises
    PlanError, with the least limit that would work, if even streaming everything does not fit.
    """
    if ahead < 1:
        raise PlanError(f"ahead is {ahead}; at least one layer must be on its way")
    if max_length < 1 or chunk < 1:
        raise PlanError(f"max_length {max_length} and chunk {chunk} must be at least 1")
    if resident is not None and not 0 <= resident <= cfg.layers:
        raise PlanError(f"{resident} resident layers were asked for; the model has {cfg.layers}")
    if table_on_host and cfg.tied:
        raise PlanError("this model's head is its embedding table, which must be on the device")
    if draft.bits is not None and not has_split(model):
        try:
            for path, leaf in jax.tree.leaves_with_path((model or abstract(cfg)).layers):
                if leaf.ndim == 2:
                    check_grouping(path[-1].name, leaf.shape[0], draft.bits, draft.group)
        except ValueError as e:
            raise PlanError(
                f"substitutes of {draft.bits} bits in groups of {draft.group}: {e}"
            ) from e

    usable = int(limit * (1 - spare))
    model = model or abstract(cfg)
    kernels = kernels and not any(why_not(w.residual, w.substitute) for w in _splits(model))
    cache = cache_bytes(model, cfg, cache_slots(max_length, spec), spec.places + 1)
    tables = [False] if cfg.tied else [False, True] if table_on_host is None else [table_on_host]
    found, least = None, None
    for on_host in tables:
        for r in range(cfg.layers + 1) if resident is None else [resident]:
            fixed = model, cfg, spec, draft, max_length, chunk, ahead
            items = _lay_out(*fixed, r, on_host, cache, kernels)
            total = sum(items[0].values())
            least = total if least is None else min(least, total)
            # Ties go to the table on the device, which is the simpler arrangement.
            if total <= usable and (found is None or r > found[0]):
                found = (r, on_host, *items)
    if found is None:
        needed = -(-(int(least / (1 - spare)) + 1) // 2**20)
        raise PlanError(
            f"{show_bytes(limit)} of device memory are too little for this model, tree and length; "
            f"the least that works is {needed}MB ({show_bytes(needed * 2**20)}). Shorter "
            "--max-length, a smaller tree or --chunk, or fewer --draft-bits lower it"
        )
    r, on_host, device, host = found
    return Plan(
        cfg=cfg,
        limit=limit,
        resident=r,
        table_on_host=on_host,
        max_length=max_length,
        spec=spec,
        draft=draft,
        chunk=chunk,
        ahead=ahead,
        device={name: count for name, count in device.items() if count},
        host={name: count for name, count in host.items() if count},
        streamed_bytes=host["streamed layers"],
        model=model,
    )
