"""A model that does not fit: planned, loaded when needed, and decoded; `opening.open` makes one."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from llm_jax.disk import Reads
from llm_jax.files import cache_folder
from llm_jax.generation import checked_tokens
from llm_jax.grammar import Guide
from llm_jax.progress import Reporter
from llm_jax.token_stream import StreamDecoder
from subspec_jax import SubspecError, memory, precompile, predict_batch, probe
from subspec_jax.batch import BatchDecoder, why_not_together
from subspec_jax.check import NotFiniteError
from subspec_jax.decoder import Decoder
from subspec_jax.draft_model import make_draft
from subspec_jax.limits import plan_for
from subspec_jax.load import arrange
from subspec_jax.methods import Method, MethodError
from subspec_jax.options import Options
from subspec_jax.plan import Plan
from subspec_jax.predict import RoundCosts, measure, round_seconds, verify_seconds, why_not
from subspec_jax.predict_experts import Routing
from subspec_jax.prefix_cache import Text
from subspec_jax.propose import Round
from subspec_jax.sources import (
    ITERATIONS,
    Source,
    load_whole,
)


class Engine:
    """A model, its plan and its decoder. Made by `open`; a context manager.

    It decodes one text at a time, or with `Options.texts` several together (`batch`). The output is
    the target's own (`Method.lossless`).
    """

    def __init__(
        self,
        source: Source,
        methods: dict[str, Method],
        options: Options,
        limit: int,
        pool: int | None,
        reporter: Reporter = Reporter(),
        small: Source | None = None,
    ):
        self.source, self.cfg, self.options = source, source.cfg, options
        self.methods, self.method = methods, next(iter(methods.values()))
        self.limit, self.pool, self.reporter, self._small = limit, pool, reporter, small
        self.plans = {name: plan_for(source, m, options, limit) for name, m in methods.items()}
        self.tokenizer = source.tokenizer()
        if source.checkpoint is not None and self.tokenizer.chat_fallback:
            reporter.say(self.tokenizer.chat_fallback, warning=True)
        self.eos = () if source.checkpoint is None or options.replay else self.tokenizer.eos
        self.device: dict[str, str] = {}
        self.link_bytes_per_s = self.memory_bytes_per_s = 0.0
        """Measured bandwidths of the link and of device memory."""
        self.disk_bytes_per_s: float | None = None
        """The disk's; None where no layers are on it."""
        self.disk_direct = True
        """Whether the disk is read past the page cache."""
        self.timings: dict[str, Any] = {"load_s": 0.0, "quantize_s": {}}
        self.costs: dict[tuple[str, int], RoundCosts] = {}
        """What `predict` measured, by method and number of texts."""
        self.target = self.decoder = self.together = None
        self._draft = self._draft_key = self._layers = None
        self._totals = {"tokens": 0, "passes": 0, "seconds": 0.0}
        self._closed = False

    @property
    def plan(self) -> Plan:
        """Every byte of the current method, as text too: `print(model.plan)`."""
        return self.plans[self.method.name]

    def identity(self) -> list[str | None]:
        """What identifies the model and the draft model, if any, by their content."""
        return [source.identity() for source in (self.source, self._small) if source is not None]

    @functools.cached_property
    def guide(self) -> Guide:
        """Makes grammars for `Text.grammar` and `Request.grammar`; takes up to some seconds."""
        return Guide(self.tokenizer, self.cfg.vocab)

    # ------------------------------------------------------------------ loading

    def start(self) -> None:
        """Touches the device for the first time, and measures its bandwidths. Layers that are to be
        on disk are written, if they are not there."""
        self._check_open()
        if self.device:
            return
        device = jax.devices()[0]
        on_gpu = device.platform == "gpu"
        if on_gpu and self.pool is None:
            warning = "The memory of this GPU is unknown: the limit is planned for, not enforced."
            self.reporter.say(warning, warning=True)
        if on_gpu:
            precompile.use_cache(cache_folder() / "compiled")
        self.device = {"platform": device.platform, "kind": device.device_kind}
        least = min(p.total for p in self.plans.values())
        size = min(2**30 if self.pool else 2**28, least // 4)  # the probes must not be the peak
        self.link_bytes_per_s = probe.link_bandwidth(size, cards=self.cfg.cards)
        self.memory_bytes_per_s = probe.memory_bandwidth(size)
        if plans := [p for p in self.plans.values() if p.disk]:
            self.source.prepare(plans[0], self.reporter)
            self.disk_bytes_per_s, self.disk_direct = probe.disk_bandwidth(
                self.source.lying(plans[0])
            )
        memory.return_free_memory()

    def disk_reads(self) -> Reads:
        """What was read from disk since the target was placed."""
        ring = None if self.target is None else self.target.ring
        return Reads() if ring is None else dataclasses.replace(ring.reader.reads)

    def compile(self) -> None:
        """On a GPU: compiles every method's large programs while the device is empty."""
        self.start()
        began, work = time.perf_counter(), {}
        if self.device["platform"] == "gpu":
            sampler, replay = self.options.sampler, self.options.replay
            work = precompile.compile_ahead(
                {
                    name: precompile.Ahead(self.plans[name], sampler, m.gate, replay, m.longest)
                    for name, m in self.methods.items()
                },
                self.reporter,
            )
        self.timings |= {"compile_s": time.perf_counter() - began, "compiled_work_space": work}

    def predict(
        self, name: str | None = None, routing: Routing | None = None, texts: int = 1
    ) -> dict | None:
        """Seconds of a round and of its parts, of the current method or the named one.

        One layer of each kind is timed on a device without weights, so a loaded model is unloaded
        first. Of a model with experts, `routing` says which a pass needs; None: what random routers
        do, or all experts are as likely. `texts`: of a round that so many texts share, a number of
        `Plan.ladder`. None: the plan is not predicted (`predict.why_not`, and for several texts
        `predict_batch.why_not_together`).
        """
        self.start()
        name = name or self.method.name
        p = self.plans[name]
        if texts > 1 and texts not in p.ladder:
            raise SubspecError(f"{texts} texts; this engine decodes {p.ladder or 1} together")
        if why_not(p) is not None or (texts > 1 and predict_batch.why_not_together(p)):
            return None
        if (name, texts) not in self.costs:
            self._unload()
            with self.reporter.status(f"Timing a layer for {name}"):
                layer = self.source.one_layer(p)
                if texts == 1:
                    costs = measure(p, layer, self.options.sampler)
                else:
                    costs = predict_batch.measure_together(p, layer, texts, p.spec_of(texts))
                self.costs[name, texts] = costs
        costs, link = self.costs[name, texts], self.link_bytes_per_s
        given = p, costs, link, routing or self.source.routing(), self.disk_bytes_per_s
        seconds = verify_seconds(*given), round_seconds(*given)
        return dataclasses.asdict(costs) | dict(zip(("verify", "round"), seconds, strict=True))

    def choose_levels(self, name: str | None = None) -> dict[int, tuple[int, float]] | None:
        """Sets how deep the trees of the method are for each number of texts together.

        One layer is timed with the fewest and the most texts, on a device without weights, and the
        fastest depth at published acceptance is chosen. Returns (levels, predicted tokens/s of all
        texts) by number of texts; None and no change where this is not predicted.
        """
        self.start()
        name = name or self.method.name
        p = self.plans[name]
        if not p.ladder or why_not(p) or predict_batch.why_not_together(p):
            return None
        if "compile_s" in self.timings:
            raise SubspecError("the depth of trees is chosen before the model is loaded")
        shapes, timed, layer = predict_batch.timed_shapes(p), {}, self.source.one_layer(p)
        with self.reporter.bar(f"Timing trees for {name}", len(shapes)) as step:
            for done, (texts, levels) in enumerate(shapes, 1):
                spec = dataclasses.replace(p.spec_of(texts), depth=levels)
                timed[texts, levels] = predict_batch.measure_together(p, layer, texts, spec)
                step(done)
        found = predict_batch.best_levels(p, timed, self.link_bytes_per_s)
        self.plans[name] = dataclasses.replace(p, levels=tuple(d for d, _ in found.values()))
        return found

    def load(self) -> None:
        """Loads the target where the first method's plan wants it, if it is not loaded."""
        if self.target is not None:
            return
        if "compile_s" not in self.timings:
            self.compile()
        self._load(self.plan)

    def _load(self, p: Plan) -> None:
        began = time.perf_counter()
        self._layers = p.streams_residuals, p.split_head
        self.source.prepare(p, self.reporter)
        with self.reporter.bar("Loading layers", p.cfg.layers) as step:
            how = self.options.verify_weights, self.options.check_files
            self.target = self.source.load(p, step, *how)
        memory.return_free_memory()
        self.timings["load_s"] += time.perf_counter() - began

    def _unload(self) -> None:
        if self.target is not None and self.target.ring is not None:
            self.target.ring.close()
        self.target = self.decoder = self.together = self._draft = self._draft_key = None

    def use(self, method: str | Method) -> Decoder:
        """Moves the target to the method's plan, makes its draft, and returns its decoder.

        A `Method` may vary the engine's one of that name as long as its tree is not larger.
        """
        m = self.methods[method] if isinstance(method, str) else method
        self._arrange(m)
        proposer, options = m.proposer(self.cfg, self._draft), self.options
        how = m.gate, options.max_length, options.chunk, options.shape
        self.decoder = Decoder(self.target, proposer, options.sampler, *how)
        return self.decoder

    def batch(self, method: str | Method | None = None) -> BatchDecoder:
        """A decoder of up to `Options.texts` texts together, which join and leave as they like.

        It takes the place of the decoder of one text. Raises MethodError for a method that cannot
        decode several.
        """
        method = method or self.method
        m = self.methods[method] if isinstance(method, str) else method
        if reason := why_not_together(m):
            raise MethodError(reason)
        self._arrange(m)
        options = self.options
        p = self.plans[m.name]
        sizes = options.texts, options.max_length, options.chunk, p.ladder
        spec_of = p.spec_of if m.spec == p.spec else None
        self.together = BatchDecoder(self.target, m, self._draft, *sizes, spec_of)
        return self.together

    def _arrange(self, m: Method) -> None:
        """Loads and moves the target as the method's plan says, and makes the draft."""
        self._check_open()
        p = self.plans[m.name]
        self.decoder = self.together = None  # frees caches before the next one makes its own
        self.method = self.methods[m.name]
        self.load()
        key = (p.resident, p.draft, p.table_on_host, p.hot, p.disk)
        if key != self._draft_key:
            self._draft = None  # frees it before layers move in
            missing = p.disk and not self.target.stored
            if missing or (p.streams_residuals, p.split_head) != self._layers:
                self.target = None
                self._load(p)
            self.target = arrange(self.target, p)
            self._draft = self._make_draft(m, p)
            self._draft_key = key

    def _make_draft(self, m: Method, p: Plan):
        if m.draft.model is not None:
            return load_whole(self._small, self.cfg.cards)
        if m.draft.bits is None:
            return None
        began, iterations = time.perf_counter(), ITERATIONS[self.options.quantizer]
        with self.reporter.bar(f"Quantizing for {m.name}", self.cfg.layers) as step:
            given = self.target.params, p.draft, p.resident, iterations, step
            found = make_draft(*given, cards=self.cfg.cards)
        memory.return_free_memory()
        self.timings["quantize_s"][m.name] = time.perf_counter() - began
        return found

    def warm_up(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        method: str | Method | None = None,
        replay: Callable[[], Iterable[int]] | None = None,
        tries: int = 3,
    ) -> Decoder | BatchDecoder:
        """A decoder that has compiled what a text like this needs.

        If memory runs out, because the allocator needs more than the plan expects, the plan gets
        one resident layer less, unless `Options.resident` fixes their number.
        """
        method = method or self.method
        m = self.methods[method] if isinstance(method, str) else method
        for n in range(tries + 1):
            try:
                decoder = self.batch(m) if self.plans[m.name].ladder else self.use(m)
                with self.reporter.status(f"Compiling for {m.name}"):
                    decoder.warm_up(prompt, new_tokens, replay)
                return decoder
            except jax.errors.JaxRuntimeError as error:
                old = self.plans[m.name]
                less = old.resident if old.hot is None else old.hot
                last = n == tries or self.options.resident is not None or less == 0
                if last or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
            decoder = self.decoder = self.together = self._draft = self._draft_key = None
            what, fewer = "resident layers", less - 1
            if old.hot is not None:
                what, fewer = "experts kept", less - max(1, less // 10)
            self.reporter.say(
                f"{m.name}: {less} {what} left too little memory to work with; trying {fewer}",
                warning=True,
            )
            if old.hot is None:
                how = self.source, m, self.options, self.limit, fewer, old.table_on_host
                self.plans[m.name] = dataclasses.replace(plan_for(*how), levels=old.levels)
            else:
                self.plans[m.name] = dataclasses.replace(old, hot=fewer)
        raise AssertionError("the loop returns or raises")

    # ------------------------------------------------------------------ decoding

    def rounds(
        self,
        prompt: Sequence[int],
        new_tokens: int | None = None,
        seed: int | None = None,
        eos: Sequence[int] | None = None,
        replay: Iterable[int] | None = None,
    ) -> Iterator[Round]:
        """Rounds of decoding after a prompt of token ids; the first one is the prefill.

        Ends after `new_tokens` (None: as many as fit, at most 256) or after a token of `eos` (None:
        the tokenizer's). `seed` None: the options' seed. `replay` gives the numbers of draft tokens
        to accept, and needs `Options.replay`.
        """
        room = self.options.max_length - len(prompt)
        new_tokens = max(1, min(256, room)) if new_tokens is None else new_tokens
        self.start()
        if self.plan.ladder:
            yield from self._alone(Text(prompt, new_tokens, replay=replay), seed, eos)
            return
        decoder = self.decoder
        if decoder is None:  # on a GPU with a trial, because the plan may be a little too tight
            decoder = self.warm_up(prompt, new_tokens) if self._on_gpu() else self.use(self.method)
        seed = self.options.seed if seed is None else seed
        ends = self.eos if eos is None else checked_tokens(eos, self.cfg.vocab).tolist()
        for result in decoder.rounds(prompt, new_tokens, seed, ends, replay):
            self._count(result)
            yield result

    def _count(self, result: Round) -> None:
        self._totals["tokens"] += len(result.tokens)
        self._totals["passes"] += 1
        self._totals["seconds"] += result.seconds

    def _alone(self, text: Text, seed: int | None, eos: Sequence[int] | None) -> Iterator[Round]:
        """The rounds of one text in an engine that is made for several."""
        decoder = self.together
        if decoder is None:
            on_gpu, given = self._on_gpu(), (text.prompt, text.new_tokens)
            decoder = self.warm_up(*given) if on_gpu else self.batch()
        text.sampler = self.options.sampler
        text.seed = self.options.seed if seed is None else seed
        text.eos = self.eos if eos is None else checked_tokens(eos, self.cfg.vocab).tolist()
        if not decoder.join(text):
            raise SubspecError("all texts that this engine can decode together are running")
        try:
            while not text.done:
                for other, result in decoder.step():
                    if other is text:
                        self._count(result)
                        yield result
                if text.failed:
                    raise NotFiniteError(text.failed)
        finally:
            decoder.leave(text)

    def generate(self, prompt: Sequence[int], new_tokens: int | None = None, **how) -> list[int]:
        """The new token ids of `rounds`, all at once."""
        return [token for r in self.rounds(prompt, new_tokens, **how) for token in r.tokens]

    def stream(
        self, prompt: str | Sequence[int], new_tokens: int | None = None, **how
    ) -> Iterator[str]:
        """The text that continues a text or token ids, in pieces, as it is decoded."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        text = StreamDecoder(self.tokenizer)
        for result in self.rounds(ids, new_tokens, **how):
            for token in result.tokens:
                if token not in self.eos and (piece := text.push(token)):
                    yield piece
        if piece := text.flush():
            yield piece

    def chat(
        self, messages: str | list[dict[str, str]], new_tokens: int | None = None, **how
    ) -> Iterator[str]:
        """The reply to a message, or to a conversation of {"role", "content"}, in pieces."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.stream(self.tokenizer.chat(messages), new_tokens, **how)

    # ------------------------------------------------------------------ the rest

    @property
    def stats(self) -> dict[str, Any]:
        """What was measured since the engine was opened: the device, bandwidths, seconds of
        loading, tokens, passes (prefills included), tokens a pass (tau) and tokens a second."""
        total = self._totals
        used = jax.devices()[: self.cfg.cards] if self._on_gpu() else []
        peaks = [d.memory_stats()["peak_bytes_in_use"] for d in used if d.memory_stats()]
        return {
            "device": self.device,
            "memory_limit": self.limit,
            "pool": self.pool,
            "link_bytes_per_s": self.link_bytes_per_s,
            "memory_bytes_per_s": self.memory_bytes_per_s,
            "disk_bytes_per_s": self.disk_bytes_per_s,
            **self.timings,
            **total,
            "tau": total["tokens"] / total["passes"] if total["passes"] else None,
            "tokens_per_s": total["tokens"] / total["seconds"] if total["seconds"] else None,
            "peak_bytes": max(peaks, default=None),
        }

    def _on_gpu(self) -> bool:
        return self.device.get("platform") == "gpu"

    def _check_open(self) -> None:
        if self._closed:
            raise SubspecError("this engine is closed; open another one")

    def close(self) -> None:
        """Frees the memory of the model, on the device and on the host."""
        self._unload()
        self._closed = True

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()
