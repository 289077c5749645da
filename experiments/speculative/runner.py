"""One invocation of `experiments.speculative`: load, decode with every method, record, report."""

import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.speculative import methods, report, settings, shaping
from llm_jax import registry
from llm_jax.checkpoint import open_checkpoint
from llm_jax.params import init_layer
from llm_jax.tokenizer import ByteTokenizer, StreamDecoder
from subspec_jax import offload, plan, probe
from subspec_jax import precompile as ahead
from subspec_jax.check import compare_with_plain
from subspec_jax.decoder import Decoder, Round
from subspec_jax.load import (
    arrange,
    fetched,
    load_target,
    make_draft,
    random_target,
    split_layer,
)
from subspec_jax.predict import RoundCosts, measure, round_seconds
from subspec_jax.tree import TreeSpec, cache_slots


class Run:
    """One invocation: a target that moves from plan to plan, and the records it leaves behind."""

    def __init__(self, args, console, cfg, setups, plans, folder: Path):
        self.args, self.console, self.cfg = args, console, cfg
        self.setups, self.plans, self.folder = setups, plans, folder
        self.path = folder / "records.jsonl"
        self.records = report.read(self.path)
        self.answers: dict[tuple, str] = {}
        self.traces: dict[str, Iterator[int]] = {}
        self.hashes: dict[str, str] = {}
        self.draft = self.draft_key = self.random = None

    # ------------------------------------------------------------------ model

    def open(self, checkpoint, converted, limit, pool):
        device, args = jax.devices()[0], self.args
        self.checkpoint, self.converted = checkpoint, converted
        self.tokenizer = ByteTokenizer() if checkpoint is None else checkpoint.tokenizer()
        if checkpoint is not None and self.tokenizer.chat_fallback:
            self.console.print(self.tokenizer.chat_fallback, style="yellow", highlight=False)
        if device.platform == "gpu" and pool is None:
            self.console.print(
                "This GPU did not tell its memory: the limit is planned for, not enforced.",
                style="yellow",
            )
        if device.platform == "gpu":
            ahead.use_cache(registry.cache_folder() / "compiled")
        self.device = {"platform": device.platform, "kind": device.device_kind}
        least = min(p.total for p in self.plans.values())
        size = min(2**30 if pool else 2**28, least // 4)  # the probes must not be the peak
        self.link, self.memory = probe.link_bandwidth(size), probe.memory_bandwidth(size)
        self.limit, self.pool, self.quantize_s = limit, pool, {}
        self.show_plan()
        self.sampler = settings.sampler(args)
        began, self.work = time.perf_counter(), {}
        if device.platform == "gpu":
            for method in self.setups:
                with self.console.status(f"Compiling for {method.name} …"):
                    replays = args.replay_acceptance is not None
                    chosen = (self.sampler, method.gate, replays, method.longest)
                    p = self.plans[method.name]
                    self.work[method.name] = ahead.compile_ahead(p, *chosen)
        self.compile_s = time.perf_counter() - began
        wanted = args.predict == "yes" or (args.predict == "auto" and device.platform == "gpu")
        began = time.perf_counter()
        self.predicted = self.predict() if wanted else {}
        self.predict_s = time.perf_counter() - began
        first = self.plans[self.setups[0].name]
        began = time.perf_counter()
        self.target = self.load(first)
        self.load_s = time.perf_counter() - began
        self.eos = () if checkpoint is None or args.replay_acceptance else self.tokenizer.eos

    def predict(self) -> dict[str, dict[str, float]]:
        """What a round of each method takes, in seconds, from one layer of each kind."""
        found = {}
        for method in self.setups:
            p = self.plans[method.name]
            if p.draft.model is not None or self.args.palu is not None:
                continue
            with self.console.status(f"Timing a layer for {method.name} …"):
                costs = measure(p, self.one_layer(p), self.sampler)
            seconds = round_seconds(p, costs, self.link)
            found[method.name] = dataclasses.asdict(costs) | {"round": seconds}
            self.console.print(
                f"{method.name}: predicted {1e3 * seconds:.1f} ms a round, "
                f"{1e3 * costs.draft:.1f} of them drafting",
                style="dim", highlight=False,
            )  # fmt: skip
        return found

    def one_layer(self, p):
        """A layer of the kind that the plan's target has."""
        if p.streams_residuals and self.converted is not None:
            return self.converted.layer(0)
        return self.split(p) if p.streams_residuals else init_layer(jax.random.key(0), self.cfg)

    def split(self, p):
        """A random layer in two parts, encoded once and kept on the host."""
        if self.random is None:
            whole = init_layer(jax.random.key(self.args.seed), self.cfg)
            self.random = jax.tree.map(np.asarray, split_layer(whole, p.model.layers[0]))
        return self.random

    def load(self, p):
        """The target where the plan wants it."""
        source = self.converted if p.streams_residuals else self.checkpoint
        self.kind = p.streams_residuals, p.split_head
        with self.bar("Loading layers", p.cfg.layers) as step:
            if source is None:
                return random_target(
                    p, self.args.seed, step, self.split(p) if p.streams_residuals else None
                )
            return load_target(source, p, step, p.streams_residuals and self.args.verify_weights)

    def show_plan(self):
        p = self.plans[self.args.method]
        table = Table(
            title=f"Plan for {self.args.method} in {plan.show_bytes(self.limit)}",
            title_justify="left",
        )
        for column, justify in (("", "left"), ("device", "right"), ("host", "right")):
            table.add_column(column, justify=justify)
        host = dict(p.host)
        for name, count in p.device.items():
            kept = host.pop(name, 0)
            table.add_row(name, plan.show_bytes(count), plan.show_bytes(kept) if kept else "")
        for name, count in host.items():
            table.add_row(name, "", plan.show_bytes(count))
        table.add_row("predicted peak", plan.show_bytes(p.total), "", style="bold")
        self.console.print(table)
        tau = plan.published_tau(p.spec.depth)
        plain = settings.make_plan(self.args, self.cfg, methods.VANILLA, self.limit)
        what = "residuals" if p.streams_residuals else "layers"
        lines = [
            f"{p.resident} of {self.cfg.layers} {what} resident, {p.streamed} streamed: "
            f"{plan.show_bytes(p.streamed_bytes)} a pass over a link measured at "
            f"{self.link / 1e9:.1f} GB/s (device memory {self.memory / 1e9:.0f} GB/s)",
            "predicted, if bytes were all that counts: at most "
            f"{plain.tokens_per_second(1.0, self.link, self.memory):.1f} tokens/s plain, "
            f"{p.tokens_per_second(tau, self.link, self.memory):.1f} with {self.args.method} at "
            f"the published acceptance (tau {tau:.1f} at depth {p.spec.depth})",
        ]
        if self.args.palu is not None:
            own, plain = p.device["KV cache"], self.plain_cache_bytes(p)
            lines.append(
                f"KV cache of low-rank latents: {plan.show_bytes(own)} instead of "
                f"{plan.show_bytes(plain)} with 16-bit keys and values, {1 - own / plain:.1%} less"
            )
        if p.streamed == 0:
            lines.append("nothing streams: speculation cannot save a pass's copies here")
        if self.device["platform"] == "cpu":
            lines.append("on a CPU the limit is planned for, not enforced, and arithmetic is slow:"
                         " look at tau and at the tokens, not at the seconds")  # fmt: skip
        for line in lines:
            self.console.print(line, style="dim", highlight=False)

    def plain_cache_bytes(self, p) -> int:
        """Bytes of the plan's cache with ordinary keys and values of 16 bits."""
        cfg, slots = self.cfg, cache_slots(p.max_length, p.spec)
        return 2 * 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * slots

    def settle_on(self, method: methods.Method):
        """Moves the target to the method's plan and returns its Decoder."""
        p, args = self.plans[method.name], self.args
        key = (p.resident, p.draft, p.table_on_host)
        if key != self.draft_key:
            self.draft = None  # frees it before layers move in
            if (p.streams_residuals, p.split_head) != self.kind:
                self.target = None
                self.target = self.load(p)
            self.target = arrange(self.target, p)
            if method.draft.model is not None:
                self.draft = self.draft_model(method.draft.model)
            elif method.draft.bits is not None:
                iterations = 20 if args.quantizer == "hqq" else 0
                began = time.perf_counter()
                with self.bar(f"Quantizing for {method.name}", self.cfg.layers) as step:
                    self.draft = make_draft(self.target, p, iterations, step)
                self.quantize_s[method.name] = time.perf_counter() - began
            self.draft_key = key
        proposer = method.proposer(self.cfg, self.draft)
        return Decoder(
            self.target, proposer, self.sampler, method.gate, args.max_length, args.chunk
        )

    def draft_model(self, cfg):
        whole = plan.make_plan(cfg, 2**60, TreeSpec("chain", depth=0), resident=cfg.layers)
        if self.args.weights == "random":
            return fetched(random_target(whole, self.args.seed + 1).params)
        path = registry.find_checkpoint(self.args.draft_model, self.args.draft_checkpoint)
        return fetched(load_target(open_checkpoint(path), whole).params)

    # ------------------------------------------------------------------ decoding

    def decode(self, samples):
        for method in self.setups:
            settings_hash = self.settings(method)
            finished = report.done(self.records)
            turns = [(s, i) for s in samples for i in range(len(s.turns))]
            missing = [
                (s, i) for s, i in turns if (method.name, s.id, i, settings_hash) not in finished
            ]
            for r in self.records:
                if (r["method"], r.get("settings")) == (method.name, settings_hash):
                    self.answers.setdefault((r["sample"], r["turn"]), r["text"])
            if len(missing) < len(turns):
                self.console.print(
                    f"{method.name}: {len(turns) - len(missing)} turns were done before"
                )
            if not missing:
                continue
            decoder = self.ready(method, missing[0][0])
            if shaping.is_free(self.args, method):
                del decoder
                method = self.shaped(method, missing[0][0])
                decoder = self.ready(method, missing[0][0])
            aloud = self.args.show and method.name == self.args.method
            total = len(missing) * self.args.max_new_tokens
            with contextlib.ExitStack() as stack:
                step = (
                    None
                    if aloud
                    else stack.enter_context(self.bar(f"Decoding: {method.name}", total))
                )
                for n, (sample, turn) in enumerate(missing):
                    record = self.decode_turn(decoder, method, sample, turn, aloud, step)
                    if record is not None:
                        record["settings"] = settings_hash
                        report.append(self.path, record)
                        self.records.append(record)
                    if step:
                        step((n + 1) * self.args.max_new_tokens)
            del decoder

    def prompt(self, sample, turn) -> list[int]:
        """The conversation up to this turn, with the answers of the first method that ran."""
        messages = []
        for i in range(turn + 1):
            messages.append({"role": "user", "content": sample.turns[i]})
            if i < turn:
                messages.append({"role": "assistant", "content": self.answers[sample.id, i]})
        return self.tokenizer.chat(messages)

    def ready(self, method, sample, tries: int = 3):
        """A warm decoder. Where memory runs out, allocators having ways of their own, with a layer
        less on the device, unless --resident says how many."""
        for n in range(tries + 1):
            try:
                decoder = self.settle_on(method)
                self.warm_up(decoder, method, sample)
                return decoder
            except jax.errors.JaxRuntimeError as error:
                resident = self.plans[method.name].resident
                last = n == tries or self.args.resident is not None or resident == 0
                if last or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
            decoder, self.draft, self.draft_key = None, None, None
            self.console.print(
                f"{method.name}: {resident} resident layers left too little memory to work with; "
                f"trying {resident - 1}",
                style="yellow",
            )
            self.plan_with(method, resident - 1)

    def plan_with(self, method, resident: int):
        """Changes the method's plan, and what is predicted of it, to so many resident layers."""
        old = self.plans[method.name]
        new = settings.make_plan(
            self.args, self.cfg, method, self.limit, resident, old.table_on_host, self.converted
        )
        self.plans[method.name] = new
        if known := self.predicted.get(method.name):
            costs = RoundCosts(**{f.name: known[f.name] for f in dataclasses.fields(RoundCosts)})
            known["round"] = round_seconds(new, costs, self.link)

    def warm_up(self, decoder, method, sample):
        """Compiles what the method needs, outside the clock."""
        with self.console.status(f"Compiling for {method.name} …"):
            prompt = self.prompt(sample, 0)[: self.args.max_length // 2]
            replays = self.args.replay_acceptance and (lambda: self.trace(method))
            decoder.warm_up(prompt, self.args.max_new_tokens, replays)

    def shaped(self, method, sample):
        """The method with the tree that its first rounds, on this sample, promise most of."""
        with self.console.status(f"Choosing a tree for {method.name} …"):
            prompt = self.prompt(sample, 0)[: self.args.max_length // 2]
            method, rate = shaping.choose(self, method, prompt)
        promise = "nothing to choose from" if rate is None else f"{rate:.1f} tokens/s predicted"
        shape = f"depth {method.spec.depth}, width {method.spec.width}"
        self.console.print(f"{method.name}: {shape}, {promise}", highlight=False)
        return method

    def trace(self, method):
        """A new iterator over accepted lengths, or None where nothing is replayed."""
        source = self.args.replay_acceptance
        return source and methods.acceptance_trace(source, method, self.args.seed)()

    def replay(self, method):
        """The method's trace, which goes on from turn to turn."""
        if method.name not in self.traces:
            self.traces[method.name] = self.trace(method)
        return self.traces[method.name]

    def decode_turn(self, decoder, method, sample, turn, aloud, step):
        args, prompt = self.args, self.prompt(sample, turn)
        if len(prompt) + args.max_new_tokens > args.max_length:
            self.console.print(
                f"skipped {sample.id} turn {turn}: {len(prompt)} prompt tokens and "
                f"{args.max_new_tokens} new ones exceed --max-length {args.max_length}",
                style="yellow",
            )
            self.answers.setdefault((sample.id, turn), "")
            return None
        if aloud:
            self.console.rule(
                f"{sample.category} {sample.id}" + (f", turn {turn + 1}" if turn else "")
            )
            self.console.print(sample.turns[turn], style="bold", markup=False, highlight=False)
        peak = Peak(decoder, self.device["platform"])
        text, tokens, rounds = StreamDecoder(self.tokenizer), [], []
        replay = self.replay(method)
        for result in decoder.rounds(prompt, args.max_new_tokens, args.seed, self.eos, replay):
            rounds.append(result)
            tokens.extend(result.tokens)
            if aloud:
                for token in result.tokens:
                    self.say(text.push(token))
            elif step:
                step.add(len(result.tokens))
        if aloud:
            self.say(text.flush() + "\n")
        answer = self.tokenizer.decode([t for t in tokens if t not in self.eos])
        self.answers.setdefault((sample.id, turn), answer)
        lossless = None
        if args.check_lossless and method.name != "vanilla":
            lossless = self.check(decoder, sample, turn, prompt, tokens)
        return {
            "method": method.name,
            "benchmark": args.benchmark,
            "sample": sample.id,
            "turn": turn,
            "category": sample.category,
            "prompt_tokens": len(prompt),
            "token_ids": tokens,
            "text": answer,
            "prefill_s": rounds[0].seconds,
            "prefill_bytes": rounds[0].streamed_bytes,
            "decode_s": sum(r.seconds for r in rounds[1:]),
            "peak_bytes": peak.bytes(),
            "predicted_peak_bytes": self.plans[method.name].total,
            "replayed": replay is not None,
            "tree": {"depth": method.spec.depth, "width": method.spec.width},
            "rounds": round_columns(rounds[1:]),
            "lossless": lossless,
        }

    def check(self, decoder, sample, turn, prompt, tokens):
        """How these tokens compare with those of plain decoding on the same prompt."""
        vanilla = next(m for m in self.setups if m.name == "vanilla")
        wanted = ("vanilla", sample.id, turn, self.settings(vanilla))
        for r in self.records:
            if (r["method"], r["sample"], r["turn"], r.get("settings")) == wanted:
                return compare_with_plain(
                    self.target, prompt, tokens, r["token_ids"], decoder.caches, self.args.chunk
                )
        return None

    def settings(self, method) -> str:
        """A hash of all that decides what a method decodes and how fast, as it was planned first:
        where memory runs out the plan changes, and the records stay those of this run."""
        if method.name not in self.hashes:
            args = dataclasses.asdict(self.args)
            aside = "output", "show", "compare", "method", "samples", "verify_weights", "predict"
            for name in aside:
                args.pop(name)
            for name in ("checkpoint", "draft_checkpoint", "data_dir", "palu", "converted"):
                args[name] = args[name] and args[name].expanduser().resolve()
            described = repr([args, self.cfg, method, self.plans[method.name]])
            self.hashes[method.name] = hashlib.sha256(described.encode()).hexdigest()[:16]
        return self.hashes[method.name]

    # ------------------------------------------------------------------ showing

    def say(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()

    @contextlib.contextmanager
    def bar(self, title, total):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            yield Bar(progress, progress.add_task(title, total=total))

    def report(self):
        wanted = {self.settings(m) for m in self.setups}
        records = [r for r in self.records if r.get("settings") in wanted]
        summaries = report.summarize(records)
        report.print_table(self.console, summaries)
        for s in summaries:
            if (predicted := self.predicted.get(s["method"])) and s["passes"]:
                parts = (s["draft_s"], s["verify_s"], s["other_s"])
                s["predicted_over_measured"] = predicted["round"] * s["passes"] / sum(parts)
                self.console.print(
                    f"{s['method']}: {1e3 * predicted['round']:.1f} ms a round were predicted, "
                    f"{1e3 * sum(parts) / s['passes']:.1f} measured", style="dim", highlight=False,
                )  # fmt: skip
        meta = {
            "arguments": dataclasses.asdict(self.args),
            "device": self.device,
            "memory_limit": self.limit,
            "pool": self.pool,
            "link_bytes_per_s": self.link,
            "memory_bytes_per_s": self.memory,
            "compile_s": self.compile_s,
            "compiled_work_space": self.work,
            "predict_s": self.predict_s,
            "load_s": self.load_s,
            "quantize_s": self.quantize_s,
            "predicted_s": self.predicted,
            "environment": report.environment(),
            "plans": {
                name: {"resident": p.resident, "layers": p.cfg.layers,
                       "table_on_host": p.table_on_host, "device": p.device, "host": p.host,
                       "streamed_bytes": p.streamed_bytes, "total": p.total,
                       "draft_bytes": p.spec.steps * p.draft_step_bytes}
                for name, p in self.plans.items()
            },
            "summaries": summaries,
        }  # fmt: skip
        report.write_json(self.folder / "run.json", meta)
        drawn = report.plots(records, self.folder)
        files = [self.path, self.folder / "run.json", *drawn]
        self.console.print("Written: " + ", ".join(map(str, files)), style="dim", highlight=False)


def round_columns(rounds: list[Round]) -> dict[str, list]:
    names = (
        "accepted",
        "drafted",
        "depth",
        "steps",
        "copied",
        "draft_s",
        "verify_s",
        "other_s",
        "streamed_bytes",
        "pass_bytes",
        "path",
        "gains",
    )
    columns = {name: [getattr(r, name) for r in rounds] for name in names}
    return columns | {"emitted": [len(r.tokens) for r in rounds]}


class Bar:
    """A progress bar as a callable: `bar(done)`."""

    def __init__(self, progress, task):
        self.progress, self.task = progress, task

    def __call__(self, done: int):
        self.progress.update(self.task, completed=done)

    def add(self, count: int):
        self.progress.advance(self.task, count)


class Peak:
    """Peak device memory: the allocator's on a GPU, else live arrays in a turn's first passes."""

    def __init__(self, decoder, platform: str):
        self.on_gpu, self.seen, self.looks = platform == "gpu", 0, 0
        decoder.watch = None if self.on_gpu else self.look
        self.most_looks = max(5, 2 * decoder.target.cfg.layers)

    def look(self):
        self.looks += 1
        if self.looks <= self.most_looks and self.looks % 5 == 0:
            self.seen = max(self.seen, offload.device_bytes())

    def bytes(self) -> int:
        stats = jax.devices()[0].memory_stats() if self.on_gpu else None
        return stats["peak_bytes_in_use"] if stats else self.seen
