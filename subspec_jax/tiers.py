"""Where layers that are not resident are kept: in host memory as far as it goes, the rest on disk.

On a machine without a GPU, device and host share one memory, which the limit is for: there all
layers that are not resident are on disk.
"""

import dataclasses
from collections.abc import Sequence

import jax

from llm_jax.disk import DiskArray, loaded, on_disk
from llm_jax.disk_ring import STAGES
from llm_jax.params import Attention, JoinedAttention, Layer
from llm_jax.stream import to_device
from subspec_jax import memory
from subspec_jax.offload import offload, place, streamed_bytes
from subspec_jax.plan import Plan, PlanError


def why_not_on_disk(plan: Plan) -> str | None:
    """Why the plan's layers cannot be on disk; None where they can."""
    if plan.cfg.experts is not None:
        return "layers with experts are kept in host memory"
    if plan.cfg.cards > 1:
        return "layers that several devices share are kept in host memory"
    kinds = Attention | JoinedAttention
    if not all(isinstance(layer.attn, kinds) for layer in plan.model.layers):
        return "layers with another kind of attention are kept in host memory"
    return None


def host_room(asked: int | None, random: bool) -> int | None:
    """Bytes of host memory for layers: as `asked`, or by itself what there is, and on a machine
    without a GPU none. None: all layers, as for `random` weights, which have no files."""
    if asked is not None or random:
        return asked
    return 0 if memory.card_bytes() is None else memory.host_bytes()


def with_disk(plan: Plan, host_limit: int, on_card: bool) -> Plan:
    """The plan with as few layers on disk as leave room for the others within `host_limit` bytes.

    They are spread evenly over those that are streamed. `on_card`: what is read waits in a ring in
    host memory, which is counted; otherwise it is read where it is used. Raises PlanError for
    layers that cannot be on disk, and if the ring alone is too large.
    """
    moved = [i for i in range(plan.cfg.layers) if i not in plan.stays]
    sizes = {i: streamed_bytes(plan.model.layers[i]) for i in moved}
    room = host_limit - plan.host.get("embedding", 0)
    if plan.hot is not None or not moved:
        need = sum(plan.host.values())
        if need > host_limit and (reason := why_not_on_disk(plan)):
            raise PlanError(_too_little(host_limit, need, reason))
        return plan
    if sum(sizes.values()) <= room:
        return plan
    if reason := why_not_on_disk(plan):
        raise PlanError(_too_little(host_limit, sum(plan.host.values()), reason))
    ring = (2 * STAGES + plan.ahead) * max(sizes.values()) if on_card else 0
    if ring > room and on_card:
        need = host_limit - room + ring
        raise PlanError(_too_little(host_limit, need, "layers from disk pass through a ring there"))
    for count in range(1, len(moved) + 1):
        lie = frozenset(moved[(j * len(moved) + len(moved) // 2) // count] for j in range(count))
        kept = sum(size for i, size in sizes.items() if i not in lie)
        if kept + ring <= room or count == len(moved):
            break
    host = plan.host | {"streamed layers": kept, "disk ring": ring}
    return dataclasses.replace(plan, disk=lie, host={k: n for k, n in host.items() if n})


def _too_little(limit: int, need: int, reason: str) -> str:
    at_least = -(-need // 2**20)
    return (
        f"{memory.show_bytes(limit)} of host memory is too little: {reason}; the least that works "
        f"is {at_least}MB. A higher --memory-limit needs less of it"
    )


def where(layer: Layer) -> Layer:
    """The layer with its `DiskArray`s and, in place of what is in memory, shapes: a `lying` layer
    says where arrays are, and does not keep the others."""
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    return jax.tree.map(lambda a: a if isinstance(a, DiskArray) else shape(a), layer)


def lay_down(layer: Layer, lying: Layer) -> Layer:
    """The layer with what moves on disk, as in `lying`, and all else on the device."""
    pick = lambda a, b: b if isinstance(b, DiskArray) else to_device(a)
    return jax.tree.map(pick, layer, lying)


def to_home(index: int, layer: Layer, lying: Sequence[Layer], plan: Plan) -> Layer:
    """The layer where the plan wants it. `lying` has all layers as they are on disk, if any is."""
    if index in plan.disk:
        return jax.block_until_ready(lay_down(layer, lying[index]))
    layer = loaded(layer) if on_disk(layer) else layer
    return jax.block_until_ready((to_device if index in plan.stays else offload)(layer))


def rearranged(layers: Sequence[Layer], lying: Sequence[Layer], plan: Plan) -> tuple[Layer, ...]:
    """Layers that are placed by another plan, where this one wants them.

    Like `offload.place`, which it is without layers on disk.
    """
    if not lying:
        return place(layers, plan.stays)
    placed, stay = list(layers), plan.stays
    for i in sorted(range(len(layers)), key=lambda i: (i in stay, i if i in stay else -i)):
        placed[i] = to_home(i, layers[i], lying, plan)
    return tuple(placed)
