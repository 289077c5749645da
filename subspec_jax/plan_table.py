"""A plan as text: a table of all bytes by tier."""

from typing import Any

from subspec_jax.layout import expert_count
from subspec_jax.memory import show_bytes


def table(plan: Any) -> str:
    """A line a part with its bytes on the device, on the host and, if any, on disk; then a line
    about what streams. `plan` is a `Plan`."""
    places = {"device": plan.device, "host": plan.host}
    if plan.disk:
        places["disk"] = {"streamed layers": plan.disk_bytes}
    names = dict.fromkeys(name for kept in places.values() for name in kept)
    show = lambda count: show_bytes(count) if count else ""
    rows = [("", *places)]
    rows += [(name, *(show(kept.get(name)) for kept in places.values())) for name in names]
    rows.append(("predicted peak", show_bytes(plan.total), *[""] * (len(places) - 1)))
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = f"Plan within {show_bytes(plan.limit)}"
    if plan.cfg.cards > 1:
        title += f" on each of {plan.cfg.cards} devices, which share every layer"
    lines = [title]
    for name, *cells in rows:
        right = "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{name:{first}}{right}".rstrip())
    return "\n".join([*lines, _streams(plan)])


def _streams(plan: Any) -> str:
    moved = show_bytes(plan.streamed_bytes)
    if plan.hot is not None:
        total = expert_count(plan.cfg)
        return f"{plan.hot} of {total} experts kept; {moved} a pass if all experts were as likely"
    what = "residuals" if plan.streams_residuals else "layers"
    text = f"{plan.resident} of {plan.cfg.layers} {what} resident, {plan.streamed} streamed: "
    lie = f", {len(plan.disk)} of them from disk" if plan.disk else ""
    return f"{text}{moved} a pass{lie}"
