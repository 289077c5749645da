"""One invocation of `experiments.speculative`: decode with every method, record, report."""

import contextlib
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from experiments.common import records
from experiments.common.plots import drawn_or_said
from experiments.common.records import RecordError
from experiments.speculative import replay, report
from experiments.speculative.benchmarks import Conversation
from experiments.speculative.flags import Speculative
from llm_jax.digest import file_digest, json_digest
from llm_jax.progress import bar
from subspec_jax import memory
from subspec_jax.check import compare_with_plain
from subspec_jax.decoder import Decoder
from subspec_jax.engine import Engine
from subspec_jax.limits import plan_for
from subspec_jax.methods import VANILLA, Method
from subspec_jax.plan import published_tau
from subspec_jax.propose import Round
from subspec_jax.requests import TextUntil
from subspec_jax.shape import can_choose, choose_tree

ASIDE = ("output", "show", "compare", "method", "samples", "predict")
ASIDE += ("check_files", "verify_weights", "prompt")
"""Flags that do not change what a method decodes. The prompt is the question, which is compared."""
PATHS = (
    "checkpoint",
    "adapter",
    "draft_checkpoint",
    "data_dir",
    "palu",
    "converted",
    "disk_folder",
)
"""Where something is. The model counts by its content, and so does each question."""


class Run:
    """The records of a folder, and the engine that adds to them."""

    def __init__(self, args: Speculative, console: Console, engine: Engine, folder: Path):
        self.args, self.console, self.engine, self.folder = args, console, engine, folder
        self.path = folder / "records.jsonl"
        self.records = records.read(self.path, problem=report.problem)
        self.answers: dict[tuple, str] = {}
        self.traces: dict[str, Iterator[int]] = {}
        with console.status("Identifying the model …"):
            self.identity = engine.identity()
        # Of the plans as they are first: where memory runs out a plan changes, and the records
        # stay those of this run.
        self.hashes = {
            name: settings_hash(args, engine.cfg, m, engine.plans[name], self.identity)
            for name, m in engine.methods.items()
        }
        self.predicted: dict[str, dict[str, float]] = {}

    # ------------------------------------------------------------------ before decoding

    def prepare(self) -> None:
        """Shows the plan, compiles, predicts and loads."""
        engine = self.engine
        engine.start()
        self.show_plan()
        engine.compile()
        began = time.perf_counter()
        on_gpu = engine.device["platform"] == "gpu"
        if self.args.predict == "yes" or (self.args.predict == "auto" and on_gpu):
            self.predict()
        self.predict_s = time.perf_counter() - began
        engine.load()

    def predict(self) -> None:
        for name in self.engine.methods:
            if parts := self.engine.predict(name):
                self.predicted[name] = parts
                self.say(
                    f"{name}: predicted {1e3 * parts['round']:.1f} ms a round, "
                    f"{1e3 * parts['draft']:.1f} of them drafting"
                )

    def show_plan(self) -> None:
        engine, name = self.engine, self.args.method
        p = engine.plans[name]
        title, *table, streams = str(p).splitlines()
        self.console.print(f"{title.replace('Plan', f'Plan for {name}')}", style="bold")
        self.console.print("\n".join(table), highlight=False)
        tau = published_tau(p.spec.depth)
        at = engine.link_bytes_per_s, engine.memory_bytes_per_s
        disk = engine.disk_bytes_per_s or math.inf
        plain = plan_for(engine.source, VANILLA, engine.options, engine.limit)
        self.say(
            f"{streams} over a link measured at {at[0] / 1e9:.1f} GB/s "
            f"(device memory {at[1] / 1e9:.0f} GB/s)"
        )
        most = (
            plain.tokens_per_second(1.0, *at, disk=disk),
            p.tokens_per_second(tau, *at, disk=disk),
        )
        self.say(
            "predicted, if bytes were all that counts: at most "
            f"{most[0]:.1f} tokens/s plain, {most[1]:.1f} with {name} at the published acceptance "
            f"(tau {tau:.1f} at depth {p.spec.depth})"
        )
        if self.args.palu is not None:
            own, dense = p.device["KV cache"], self.dense_cache_bytes(p)
            self.say(
                f"KV cache of low-rank latents: {memory.show_bytes(own)} instead of "
                f"{memory.show_bytes(dense)} with 16-bit keys and values, {1 - own / dense:.1%} "
                "less"
            )
        if self.engine.tokenizer.chat_fallback and self.args.benchmark != "texts":
            self.say(
                "questions are put as plain text, for want of a template; a base model is better "
                "shown by --benchmark texts, which it continues"
            )
        if p.streamed == 0:
            self.say("nothing streams: speculation cannot save a pass's copies here")
        if p.disk:
            how = "past the page cache" if engine.disk_direct else "through the page cache, alas"
            self.say(
                f"layers on disk are read {how} in every pass: {memory.show_bytes(p.disk_bytes)} "
                f"at {engine.disk_bytes_per_s / 1e9:.2f} GB/s"
            )

    def dense_cache_bytes(self, p) -> int:
        """Bytes of the plan's cache with ordinary keys and values of 16 bits."""
        cfg = p.cfg
        return 2 * 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * p.slots

    # ------------------------------------------------------------------ decoding

    def decode(self, samples: list[Conversation]) -> None:
        for method in self.engine.methods.values():
            own = (method.name, self.hashes[method.name])
            done = [r for r in self.records if (r["method"], r.get("settings")) == own]
            finished = {(r["sample"], r["turn"], r.get("question")) for r in done}
            turns = [(s, i) for s in samples for i in range(len(s.turns))]
            missing = [(s, i) for s, i in turns if (s.id, i, question(s, i)) not in finished]
            for r in done:
                self.answers.setdefault((r["sample"], r["turn"]), r["text"])
            if before := len(turns) - len(missing):
                self.console.print(f"{method.name}: {before} turns were done before")
            if missing:
                self.decode_turns(method, missing)

    def decode_turns(self, method: Method, missing: list[tuple[Conversation, int]]) -> None:
        prompt = self.prompt(missing[0][0], 0)[: self.args.max_length // 2]
        decoder = self.warm_up(prompt, method)
        if "auto" in (self.args.depth, self.args.width) and can_choose(method):
            method = self.shaped(method, prompt)
            decoder = self.warm_up(prompt, method)
        aloud = self.args.show and method.name == self.args.method
        total = len(missing) * self.args.max_new_tokens
        with contextlib.ExitStack() as stack:
            step = None
            if not aloud and self.console.is_terminal:
                step = stack.enter_context(bar(self.console, f"Decoding: {method.name}", total))
            for n, (sample, turn) in enumerate(missing):
                record = self.decode_turn(decoder, method, sample, turn, aloud, step)
                if record is not None:
                    record["settings"] = self.hashes[method.name]
                    records.append(self.path, record)
                    self.records.append(record)
                if step:
                    step((n + 1) * self.args.max_new_tokens)

    def warm_up(self, prompt: list[int], method: Method) -> Decoder:
        replays = self.args.replay_acceptance and (lambda: self.trace(method))
        return self.engine.warm_up(prompt, self.args.max_new_tokens, method, replays or None)

    def shaped(self, method: Method, prompt: list[int]) -> Method:
        """The method with the tree that its first rounds, on this prompt, promise most of."""
        fixed = {
            name: None if getattr(self.args, name) == "auto" else getattr(method.spec, name)
            for name in ("depth", "width")
        }
        with self.console.status(f"Choosing a tree for {method.name} …"):
            method, rate = choose_tree(self.engine, method, prompt, **fixed)
        promise = "nothing to choose from" if rate is None else f"{rate:.1f} tokens/s predicted"
        shape = f"depth {method.spec.depth}, width {method.spec.width}"
        self.console.print(f"{method.name}: {shape}, {promise}", highlight=False)
        return method

    def prompt(self, sample: Conversation, turn: int) -> list[int]:
        """The conversation up to this turn, with the answers of the first method that ran."""
        answers = [self.answers[sample.id, i] for i in range(turn)]
        return sample.prompt(self.engine.tokenizer, answers)

    def trace(self, method: Method) -> Iterator[int] | None:
        """A new iterator over accepted lengths, or None where nothing is replayed."""
        source = self.args.replay_acceptance
        return replay.acceptance_trace(source, method, self.args.seed)() if source else None

    def decode_turn(self, decoder, method, sample, turn, aloud, step):
        args, prompt, engine = self.args, self.prompt(sample, turn), self.engine
        if len(prompt) + args.max_new_tokens > args.max_length:
            self.console.print(
                f"skipped {sample.id} turn {turn}: {len(prompt)} prompt tokens and "
                f"{args.max_new_tokens} new ones exceed --max-length {args.max_length}",
                style="yellow",
            )
            self.answers.setdefault((sample.id, turn), "")
            return None
        if aloud:
            title = f"{sample.category} {sample.id}" + (f", turn {turn + 1}" if turn else "")
            self.console.rule(title)
            self.console.print(sample.turns[turn], style="bold", markup=False, highlight=False)
        peak = Peak(decoder, engine.device["platform"])
        text, shown, tokens, rounds = TextUntil(engine.tokenizer, args.stop), "", [], []
        if method.name not in self.traces:  # a trace continues from turn to turn
            self.traces[method.name] = self.trace(method)
        trace = self.traces[method.name]
        reads = engine.disk_reads()
        for result in engine.rounds(prompt, args.max_new_tokens, replay=trace):
            kept = _until_stop(result.tokens, text)
            rounds.append(dataclasses.replace(result, tokens=kept))
            tokens.extend(kept)
            shown += (piece := _shown(text))
            if aloud:
                _write(piece)
            elif step:
                step.add(len(kept))
            if text.stopped:
                break
        text.flush()
        shown += (piece := _shown(text, last=True))
        if aloud:
            _write(piece + "\n")
        answer = engine.tokenizer.decode([t for t in tokens if t not in engine.eos])
        answer = shown if text.stopped else answer
        self.answers.setdefault((sample.id, turn), answer)
        lossless = None
        if args.check_lossless and method.name != "vanilla":
            lossless = self.check(decoder, sample, turn, prompt, tokens)
        return {
            "method": method.name,
            "benchmark": args.benchmark if args.prompt is None else "prompt",
            "sample": sample.id,
            "turn": turn,
            "question": question(sample, turn),
            "category": sample.category,
            "prompt_tokens": len(prompt),
            "token_ids": tokens,
            "text": answer,
            "prefill_s": rounds[0].seconds,
            "prefill_bytes": rounds[0].streamed_bytes,
            "decode_s": sum(r.seconds for r in rounds[1:]),
            "disk_bytes": (read := engine.disk_reads()).bytes - reads.bytes,
            "disk_s": read.seconds - reads.seconds,
            "peak_bytes": peak.bytes(),
            "predicted_peak_bytes": engine.plans[method.name].total,
            "replayed": trace is not None,
            "tree": {"depth": method.spec.depth, "width": method.spec.width},
            "rounds": round_columns(rounds[1:]),
            "lossless": lossless,
        }

    def check(self, decoder, sample, turn, prompt, tokens):
        """How these tokens compare with those of plain decoding on the same prompt."""
        wanted = ("vanilla", sample.id, turn, self.hashes["vanilla"])
        for r in self.records:
            if (r["method"], r["sample"], r["turn"], r.get("settings")) == wanted:
                plain, chunk = r["token_ids"], self.args.chunk
                given = self.engine.target, prompt, tokens, plain, decoder.caches, chunk
                return compare_with_plain(*given)
        return None

    # ------------------------------------------------------------------ afterwards

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", highlight=False)

    def report(self) -> None:
        """Prints the table, and writes run.json and the plots."""
        wanted = set(self.hashes.values())
        # The newest record of a turn: an older one had another question.
        key = lambda r: (r["settings"], r["sample"], r["turn"])
        found = list({key(r): r for r in self.records if r.get("settings") in wanted}.values())
        summaries = report.summarize(found)
        report.print_summary(self.console, summaries)
        for s in summaries:
            if s["method"] in self.predicted and s["passes"]:
                round_s = self.engine.predict(s["method"])["round"]  # of the plan as it is now
                parts = (s["draft_s"], s["verify_s"], s["other_s"])
                s["predicted_over_measured"] = round_s * s["passes"] / sum(parts)
                self.predicted[s["method"]]["round"] = round_s
                self.say(
                    f"{s['method']}: {1e3 * round_s:.1f} ms a round were predicted, "
                    f"{1e3 * sum(parts) / s['passes']:.1f} measured"
                )
        records.write_json(self.folder / "run.json", self.about() | {"summaries": summaries})
        drawn = drawn_or_said(self.console, report.plots, found, self.folder)
        files = [self.path, self.folder / "run.json", *drawn]
        self.say("Written: " + ", ".join(map(str, files)))

    def about(self) -> dict:
        """Flags, machine, plans and times of this invocation."""
        stats = self.engine.stats
        names = ("device", "memory_limit", "pool", "link_bytes_per_s", "memory_bytes_per_s")
        names += ("disk_bytes_per_s",)
        times = ("compile_s", "compiled_work_space", "load_s", "quantize_s")
        return {
            "arguments": dataclasses.asdict(self.args),
            "identity": self.identity,
            **{name: stats[name] for name in (*names, *times)},
            "predict_s": self.predict_s,
            "predicted_s": self.predicted,
            "environment": records.environment(),
            "plans": {name: plan_columns(p) for name, p in self.engine.plans.items()},
        }


def settings_hash(args: Speculative, cfg, method: Method, plan, identity) -> str:
    """A hash of all that decides what a method decodes and how fast. Files count by content."""
    flags = {k: v for k, v in dataclasses.asdict(args).items() if k not in (*ASIDE, *PATHS)}
    trace = args.replay_acceptance
    if trace and trace != "published":
        flags["replay_acceptance"] = file_digest(Path(trace))
    described = repr([flags, cfg, method, plan, identity])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def question(sample: Conversation, turn: int) -> str:
    """What identifies a turn by its content: a digest of all that the user said until then."""
    return json_digest(sample.turns[: turn + 1])


def plan_columns(p) -> dict:
    names = ("resident", "table_on_host", "device", "host", "streamed_bytes", "total")
    names += ("disk_bytes",)
    more = {"layers": p.cfg.layers, "draft_bytes": p.spec.steps * p.draft_step_bytes}
    return {name: getattr(p, name) for name in names} | more


def round_columns(rounds: list[Round]) -> dict[str, list]:
    names = ("accepted", "drafted", "depth", "steps", "copied", "draft_s", "verify_s", "other_s")
    names += ("streamed_bytes", "pass_bytes", "path", "gains")
    experts = {}
    if rounds and rounds[0].experts is not None:
        kinds = ("needed", "held", "foreseen", "fetched")
        experts = {
            f"experts_{kind}": [getattr(r.experts, kind).tolist() for r in rounds] for kind in kinds
        }
    columns = experts | {name: [getattr(r, name) for r in rounds] for name in names}
    return columns | {"emitted": [len(r.tokens) for r in rounds]}


def output_folder(args: Speculative) -> Path:
    """The folder of the run, made. Raises RecordError where it cannot be."""
    stamp, what = time.strftime("%Y%m%d-%H%M%S"), "prompt" if args.prompt else args.benchmark
    folder = args.output or Path("runs") / f"speculative-{args.model}-{what}-{stamp}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"the folder {folder} cannot be made: {error.strerror}") from error
    return folder


def _until_stop(tokens: list[int], text: TextUntil) -> list[int]:
    """The tokens up to the one that completes a stop string, while their text is added."""
    last = next((i for i, token in enumerate(tokens) if text.push(token)), len(tokens))
    return tokens[: last + 1]


def _shown(text: TextUntil, last: bool = False) -> str:
    return "".join(piece for piece, _ in text.take(last))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Peak:
    """Peak device memory: the allocator's on a GPU, else live arrays in a turn's first passes."""

    def __init__(self, decoder: Decoder, platform: str):
        self.on_gpu, self.seen, self.looks = platform == "gpu", 0, 0
        self.devices = jax.devices()[: decoder.target.cfg.cards]
        decoder.watch = None if self.on_gpu else self.look
        self.most_looks = max(5, 2 * decoder.target.cfg.layers)

    def look(self) -> None:
        self.looks += 1
        if self.looks <= self.most_looks and self.looks % 5 == 0:
            self.seen = max(self.seen, memory.device_bytes())

    def bytes(self) -> int:
        found = [d.memory_stats() for d in self.devices] if self.on_gpu else []
        return max((s["peak_bytes_in_use"] for s in found if s), default=self.seen)
