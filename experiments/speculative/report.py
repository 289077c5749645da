"""What a run showed: numbers per method, a table to read, plots to look at.

A record is one decoded turn, written by `append`, with these fields (seconds, bytes, tokens):

    method benchmark sample turn category settings   which turn, decoded how
    question                                         a digest of what the user said until then
    prompt_tokens prefill_s prefill_bytes            the prompt's pass
    token_ids text decode_s peak_bytes predicted_peak_bytes replayed tree (its depth and width)
    rounds    lists, an entry per target pass after the prompt's: emitted (tokens kept, the bonus
              token included) accepted drafted depth steps (the draft's forward passes) copied
              (looked-up tokens in the tree) draft_s verify_s other_s streamed_bytes pass_bytes
              (of the streamed bytes, those that moved during verify_s), and lists of their own for
              each pass: path (places of accepted nodes) gains (a drafted step each)
    lossless  null, or identical first_difference logit_gap tolerance, against plain decoding
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.common.records import Record
from experiments.speculative.plots import plots
from llm_jax.values import is_plain

__all__ = ["plots", "print_summary", "summarize", "summary_notes", "summary_table"]

BASELINE = "vanilla"
Summary = dict[str, Any]


_TEXTS = ("method", "benchmark", "sample", "text", "settings")
_NUMBERS = ("turn", "prompt_tokens", "prefill_s", "decode_s")
_ROUNDS = ("emitted", "accepted", "drafted", "depth", "draft_s", "verify_s", "other_s")
_ROUNDS += ("streamed_bytes", "pass_bytes")


def problem(record: Record) -> str | None:
    """What is wrong with the types of a record's fields, in words; None if nothing is."""
    for names, kind, words in ((_TEXTS, str, "a text"), (_NUMBERS, float, "a number")):
        for name in names:
            if not is_plain(kind, record.get(name)):
                return f"{name} is {record.get(name)!r}, expected {words}"
    if not _are(record.get("token_ids"), int):
        return "token_ids is not a list of whole numbers"
    rounds = record.get("rounds")
    if not isinstance(rounds, dict):
        return f"rounds is {rounds!r}, expected an object of lists"
    for name in _ROUNDS:
        if not _are(rounds.get(name), float):
            return f"rounds.{name} is not a list of numbers"
    if len({len(rounds[name]) for name in _ROUNDS}) > 1:
        return "the lists of rounds are not of one length"
    peak = record.get("peak_bytes")
    if peak is not None and not is_plain(float, peak):
        return f"peak_bytes is {peak!r}, expected a number or null"
    lossless = record.get("lossless")
    if lossless is not None and not (isinstance(lossless, dict) and "identical" in lossless):
        return f"lossless is {lossless!r}, expected null or an object with identical"
    return None


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(is_plain(kind, v) for v in values)


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One dict of totals and ratios per method, in order of first appearance.

    Ratios are total over total, so long answers weigh more than short ones; a ratio without a
    denominator is None. The prompt's pass counts in `prefill_tokens_per_s` alone. `speedup`
    compares decoding speeds on the turns that the method and `vanilla` both decoded.
    """
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    baseline = by_method.get(BASELINE, [])
    return [_summary(method, rows, baseline) for method, rows in by_method.items()]


def _summary(method: str, rows: list[Record], baseline: list[Record]) -> Summary:
    tokens, passes = _total(rows, "emitted"), len(_column(rows, "emitted"))
    seconds = {part: _total(rows, f"{part}_s") for part in ("draft", "verify", "other")}
    whole = sum(seconds.values())
    streamed = _total(rows, "streamed_bytes")
    shared = {_turn(r) for r in rows} & {_turn(r) for r in baseline}
    rate = _rate(r for r in rows if _turn(r) in shared)
    checked = [r for r in rows if r.get("lossless")]
    return {
        "method": method,
        "samples": len({_turn(r)[:2] for r in rows}),
        "turns": len(rows),
        "tokens": tokens,
        "passes": passes,
        "decode_s": sum(r["decode_s"] for r in rows),
        "tokens_per_s": _rate(rows),
        "tau": _ratio(tokens, passes),
        **{f"{part}_s": value for part, value in seconds.items()},
        **{f"{part}_share": _ratio(value, whole) for part, value in seconds.items()},
        "draft_ms_per_round": _ratio(1e3 * seconds["draft"], passes),
        "bytes_per_token": _ratio(streamed, tokens),
        "stream_gb_per_s": _ratio(_total(rows, "pass_bytes") / 1e9, seconds["verify"]),
        "peak_bytes": max((r["peak_bytes"] for r in rows if r.get("peak_bytes")), default=None),
        "prefill_tokens_per_s": _ratio(
            sum(r["prompt_tokens"] for r in rows), sum(r["prefill_s"] for r in rows)
        ),
        "disk_bytes": sum(r.get("disk_bytes", 0) for r in rows),
        "disk_s": sum(r.get("disk_s", 0) for r in rows),
        "same_text": _same_text(rows, baseline),
        "speedup": rate and _ratio(rate, _rate(r for r in baseline if _turn(r) in shared)),
        "speedup_turns": len(shared),
        "lossless": _lossless(checked),
        "checked": len(checked),
        "identical": sum(bool(r["lossless"]["identical"]) for r in checked),
        "replayed": any(r.get("replayed") for r in rows),
        "settings": sorted({str(r.get("settings")) for r in rows}),
        "cut_tokens": sum(
            max(0, sum(r["rounds"]["emitted"]) - len(r["token_ids"])) for r in rows
        ),
    }  # fmt: skip


def _same_text(rows: list[Record], baseline: list[Record]) -> tuple[int, int]:
    """(turns with the tokens of plain decoding, turns that both decoded); no replayed ones."""
    plain = {_turn(r): r["token_ids"] for r in baseline if not r.get("replayed")}
    pairs = [(r["token_ids"], plain[_turn(r)]) for r in rows if _turn(r) in plain]
    return sum(own == other for own, other in pairs), len(pairs)


def _column(rows: Iterable[Record], name: str) -> list:
    """The values of one list of `rounds`, all turns in a row."""
    return [value for r in rows for value in r["rounds"].get(name) or ()]


def _total(rows: Iterable[Record], name: str):
    return sum(_column(rows, name))


def _ratio(above: float, below: float | None) -> float | None:
    return above / below if below else None


def _rate(rows: Iterable[Record]) -> float | None:
    """Tokens per second of decoding."""
    rows = list(rows)
    return _ratio(_total(rows, "emitted"), sum(r["decode_s"] for r in rows))


def _turn(record: Record) -> tuple:
    return record.get("benchmark"), record["sample"], record["turn"]


def _lossless(checked: Sequence[Record]) -> str | None:
    """'12/12 identical', or how many and where the others part; None where nothing was checked."""
    if not checked:
        return None
    different = [r for r in checked if not r["lossless"]["identical"]]
    text = f"{len(checked) - len(different)}/{len(checked)} identical"
    if different:
        places = [_difference(r) for r in different[:3]]
        places += [f"{len(different) - 3} more"] if len(different) > 3 else []
        text += "; first differences: " + ", ".join(places)
    return text


def _difference(record: Record) -> str:
    found = record["lossless"]
    at, gap, tolerance = (found.get(k) for k in ("first_difference", "logit_gap", "tolerance"))
    text = f"sample {record['sample']} turn {record['turn']}"
    text += "" if at is None else f" at token {at}"
    if gap is None:
        return text
    if tolerance is None:
        return f"{text} (logit gap {gap:.3g})"
    verdict = "within" if abs(gap) <= tolerance else "BEYOND"
    return f"{text} (logit gap {gap:.3g}, {verdict} the tolerance {tolerance:.3g})"


# --- Table -------------------------------------------------------------------------------------

_COLUMNS = (  # header with the unit last, summary -> text
    ("turns", lambda s: f"{s['turns']}"),
    ("tokens", lambda s: f"{s['tokens']}"),
    ("decode\ntok/s", lambda s: _number(s["tokens_per_s"])),
    ("speed\nup", lambda s: _number(s["speedup"], "x")),
    ("tau\ntok/\npass", lambda s: _number(s["tau"])),
    ("draft\nms/\npass", lambda s: _number(s["draft_ms_per_round"])),
    ("draft/\nverify/\nother %", lambda s: _shares(s)),
    ("stream\nMB/\ntok", lambda s: _number(s["bytes_per_token"], scale=1e6)),
    ("stream\nGB/s", lambda s: _number(s["stream_gb_per_s"])),
    ("peak\nGiB", lambda s: _number(s["peak_bytes"], scale=2**30)),
    ("prefill\ntok/s", lambda s: _number(s["prefill_tokens_per_s"])),
    ("same\ntext", lambda s: _same(s)),
)


def summary_table(summaries: Sequence[Summary]) -> Table:
    """A row per method; 100 columns hold it."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    result.add_column("\n\nmethod", overflow="fold", min_width=12)
    for header, _ in _COLUMNS:
        lines = header.split("\n")
        header = "\n" * (3 - len(lines)) + header
        result.add_column(header, justify="right", min_width=max(map(len, lines)))
    for summary in summaries:
        cells = [Text(cell(summary), no_wrap=True) for _, cell in _COLUMNS]
        result.add_row(Text(summary["method"] + ("*" if summary["replayed"] else "")), *cells)
    return result


def summary_notes(summaries: Sequence[Summary]) -> list[str]:
    """What a reader of the table has to know, a sentence each."""
    lines = []
    if any(s["replayed"] for s in summaries):
        lines.append("* replayed acceptance: the engine was timed, the text is meaningless")
    if summaries and not any(s["method"] == BASELINE for s in summaries):
        lines.append(f"no {BASELINE} run among the records, so there is no speedup to state")
    part = [s for s in summaries if 0 < s["speedup_turns"] < s["turns"] and s["speedup"]]
    if part:
        counts = [f"{s['method']} {s['speedup_turns']} of {s['turns']}" for s in part]
        lines.append(f"speedup over the turns that {BASELINE} decoded too: " + ", ".join(counts))
    if read := [s for s in summaries if s["disk_bytes"]]:
        size, seconds = (sum(s[name] for s in read) for name in ("disk_bytes", "disk_s"))
        each = ", ".join(f"{s['method']} {s['disk_bytes'] / 1e9:.1f}" for s in read)
        lines.append(f"GB read from disk: {each}; at {size / seconds / 1e9:.2f} GB/s")
    for s in summaries:
        name, speedup = s["method"], s["speedup"]
        if name != BASELINE and speedup is not None and speedup < 1:
            lines.append(
                f"warning: {name} is slower than {BASELINE} on this device ({speedup:.2f}x);"
                f" use {BASELINE} here"
            )
        if s["checked"] > s["identical"]:
            lines.append(f"{name}: {s['lossless']}")
        if s["checked"] < s["turns"] and s["checked"]:
            lines.append(f"{name}: {s['turns'] - s['checked']} turns were not compared")
        if len(s["settings"]) > 1:
            lines.append(f"{name}: the row mixes runs with {len(s['settings'])} different settings")
        if s["cut_tokens"]:
            lines.append(
                f"{name}: {s['cut_tokens']} tokens were counted but cut from the text, so speed"
                " and tau are overstated"
            )
    return lines


def print_summary(console: Console, summaries: Sequence[Summary]) -> None:
    """Prints the table and its notes."""
    console.print(summary_table(summaries))
    for line in summary_notes(summaries):
        console.print(Text(line, style="yellow" if line.startswith("warning") else "dim"))


def _number(value: float | None, unit: str = "", scale: float = 1) -> str:
    """Three digits or more: 0.123, 1.23, 12.3, 123, 1234."""
    if value is None:
        return "-"
    value /= scale
    size = abs(value)
    digits = 0 if size >= 99.95 or size == 0 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{digits}f}{unit}"


def _same(summary: Summary) -> str:
    if summary["checked"]:
        return f"{summary['identical']}/{summary['checked']}"
    same, compared = summary["same_text"]
    return f"{same}/{compared}" if compared and summary["method"] != BASELINE else "-"


def _shares(summary: Summary) -> str:
    shares = [summary[f"{part}_share"] for part in ("draft", "verify", "other")]
    return "-" if None in shares else "/".join(f"{100 * share:.0f}" for share in shares)
