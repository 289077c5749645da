"""The table of the models that can be asked for by name, by family."""

from llm_jax.families import FAMILIES
from llm_jax.registry import MODELS, RegisteredModel

HEAD = ("family", "model", "parameters", "on the Hub")


def table() -> str:
    """A line a model, at most 100 columns wide: its family where that changes, its name, its size
    and its repository; then what the marks mean, and the families without a named model."""
    order = list(FAMILIES)
    models = sorted(MODELS.values(), key=lambda m: order.index(m.config.family))
    notes = list(dict.fromkeys(m.note for m in models if m.note))
    rows = [_row(m, notes) for m in models]
    for i in range(len(rows) - 1, 0, -1):
        if rows[i][0] == rows[i - 1][0]:
            rows[i] = ("", *rows[i][1:])
    wide = [max(len(row[i]) for row in (HEAD, *rows)) for i in range(3)]
    lines = [f"{f:{wide[0]}}  {n:{wide[1]}}  {p:>{wide[2]}}  {r}" for f, n, p, r in (HEAD, *rows)]
    lines += [""] + [f"{_mark(note, notes)} {note}" for note in notes]
    unnamed = [name for name in order if name not in {m.config.family for m in models}]
    lines.append("Any other model of these families: --checkpoint, with a folder or a GGUF file.")
    if unnamed:
        lines.append(f"Families without a model in this list: {', '.join(unnamed)}.")
    return "\n".join(lines)


def _row(model: RegisteredModel, notes: list[str]) -> tuple[str, str, str, str]:
    mark = f" {_mark(model.note, notes)}" if model.note else ""
    size = f"{model.config.parameter_count / 1e9:.2f} B"
    return model.config.family, model.name, size, model.repo + mark


def _mark(note: str, notes: list[str]) -> str:
    return f"[{notes.index(note) + 1}]"
