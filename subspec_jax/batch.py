"""Several sequences decoded together: each streamed pass is shared by all of them.

Texts join and leave between rounds. Each has its own row of the caches, tree, length, sampler and
seed. Programs are compiled for a small ladder of numbers of texts.

Letters: B texts of a round, M tokens of a pass, T tokens of a text.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.attention import caches_for, causal_steps
from llm_jax.cache import KV
from llm_jax.cards import empty
from llm_jax.generation import checked_prompt, checked_seed
from llm_jax.params import Params
from llm_jax.sample import Sampler, Samplers
from llm_jax.stream import to_device
from subspec_jax import batch_programs as programs
from subspec_jax.batch_draft import OwnCaches
from subspec_jax.batch_lookup import Lookup
from subspec_jax.batch_programs import Growing, Grown, Seats, Verifying
from subspec_jax.check import NotFiniteError, no_numbers
from subspec_jax.decoder import check_lengths
from subspec_jax.experts import of_all_layers, recorded
from subspec_jax.guided import Guided, checked, follow
from subspec_jax.logprobs import told
from subspec_jax.methods import VANILLA, Method, MethodError
from subspec_jax.prefix_cache import Rows, Text
from subspec_jax.propose import PromptLookup, Round
from subspec_jax.stop import StopRule
from subspec_jax.tree import (
    Tree,
    TreeSpec,
    cache_slots,
    ladder,
    path_to,
    shared_spec,
    step_gains,
)
from subspec_jax.verify import Target, run_pass


class BatchDecoder:
    """A target, a draft and caches of `rows` rows. Every text is the target's own, as if alone;
    with a gate it is what the gate makes of it, and smaller trees may accept otherwise.

    `sizes` are the numbers of texts that programs are made for; none: those of `tree.ladder`.
    `spec_of` gives the tree for each of these, no larger than `tree.shared_spec` (None) makes it.
    Raises MethodError for a method that cannot decode several texts.
    """

    def __init__(
        self,
        target: Target,
        method: Method,
        draft: Params | None = None,
        rows: int = 8,
        max_length: int = 2048,
        chunk: int = 512,
        sizes: Sequence[int] = (),
        spec_of: Callable[[int], TreeSpec] | None = None,
    ):
        if reason := why_not_together(method):
            raise MethodError(reason)
        self.target, self.method, self.draft = target, method, draft
        self.max_length, self.chunk = max_length, chunk
        self.proposer = method.proposer(target.cfg, draft)
        self.spec = self.proposer.spec
        self.spec_of = spec_of or functools.partial(shared_spec, self.spec)
        self.slots = cache_slots(max_length, self.spec)
        given = target.params, target.cfg, rows, self.slots, self.spec.places + 1
        self.caches = empty(functools.partial(caches_for, *given), target.cfg.cards)
        self.own: OwnCaches | None = None
        """Of a draft that does not share the target's."""
        if method.draft.own_cache:
            given = draft, self.proposer.cfg, rows, self.slots, self.spec.places
            self.own = OwnCaches(*given, cards=target.cfg.cards)
        rewinds = all(cache.rewinds for cache in self.caches)
        self.rows = Rows(rows, rewinds and (self.own is None or self.own.rewinds))
        self.ladder = tuple(sizes) or ladder(rows)
        plain = all(isinstance(cache, KV) for cache in self.caches)
        self.sizes = programs.slot_sizes(self.slots, plain)
        self.lookup = Lookup(method.longest, self.slots) if self.spec.lookup else None
        self.stop = StopRule(method.stop_gain, self.spec.steps)
        self.running: list[Text] = []
        self._prefilled = False
        self._samplers: tuple[Any, Samplers | None] = (), None

    # ------------------------------------------------------------------ joining and leaving

    def check(self, text: Text) -> None:
        """Raises LengthError or GenerationError for a text that cannot be decoded here."""
        prompt = checked_prompt(text.prompt, self.target.cfg.vocab).tolist()
        checked_seed(text.seed)
        checked(text, self.target.cfg.vocab)
        check_lengths(len(prompt), text.new_tokens, self.max_length)

    def join(self, text: Text) -> bool:
        """Gives the text a row; False where all are taken. It takes part from the next round on."""
        self.check(text)
        if (found := self.rows.take(text)) is None:
            return False
        text.row, source, text.cached = found
        text.prompt = [int(t) for t in text.prompt]
        text.tokens, text.at = list(text.prompt), text.cached
        text.replay = None if text.replay is None else iter(text.replay)
        text.walk = None if text.grammar is None else text.grammar.start()
        if source != text.row:
            numbers = self._sent((np.int32(source), np.int32(text.row)))
            self.caches = programs.copy_row(self.caches, *numbers)
            if self.own is not None:
                self.own.copy(*numbers)
        self.running.append(text)
        return True

    def leave(self, text: Text) -> None:
        """Frees the text's row, whether it is done or not."""
        if text not in self.running:
            return
        self.running.remove(text)
        if text.failed:
            text.at = 0
            row = self._sent(np.int32(text.row))
            self.caches = programs.clear_row(self.caches, row)
            if self.own is not None:
                self.own.clear(row)
        self.rows.leave(text)

    # ------------------------------------------------------------------ rounds

    def step(self) -> list[tuple[Text, Round]]:
        """One pass of the target: of prompts that are not read yet, or of all trees.

        Both in turn, so that neither waits for long. Texts that are done leave.
        """
        waiting = [t for t in self.running if t.at < len(t.prompt)]
        ready = [t for t in self.running if t.at >= len(t.prompt)]
        self._prefilled = bool(waiting) and not (ready and self._prefilled)
        results = self._prefill(waiting) if self._prefilled else self._round(ready)
        for text in [t for t in self.running if t.done or t.failed]:
            self.leave(text)
        return results

    def _seats(self, texts: list[Text], root: bool) -> Seats:
        """Their places in a program for the next larger number of sequences."""
        size, rows = self._size(texts), len(self.rows.users)
        empty = size - len(texts)
        column = lambda values, rest: np.array([*values, *rest], np.int32)
        roots = [t.tokens[t.at] if root else 0 for t in texts]
        nobody = range(rows, rows + empty)
        kind = tuple((t.sampler, t.seed) for t in texts), size
        if self._samplers[0] != kind:
            samplers = [t.sampler for t in texts] + [Sampler()] * empty
            of = Samplers.of(samplers, [t.seed for t in texts] + [0] * empty)
            self._samplers = kind, self._sent(of)
        numbers = (
            column(roots, [0] * empty),
            column((t.at for t in texts), [0] * empty),
            column((t.row for t in texts), nobody),
        )
        return Seats(*self._sent(numbers), self._samplers[1])

    def _sent(self, tree: Any) -> Any:
        return to_device(tree, self.target.cfg.cards)

    def _size(self, texts: list[Text]) -> int:
        return next(n for n in self.ladder if n >= len(texts))

    def _live(self, longest: int) -> int:
        return next(n for n in self.sizes if n >= min(longest, self.slots))

    def _prefill(self, texts: list[Text]) -> list[tuple[Text, Round]]:
        """A pass over the next tokens of prompts; those that are read get their first token."""
        began = time.perf_counter()
        size, target, most = self._size(texts), self.target, self.ladder[-1]
        longest = max(len(t.prompt) - t.at for t in texts)
        sizes = programs.prefill_sizes(self.chunk, self.spec, size, most)
        T = next((n for n in sizes if n >= longest), sizes[-1])
        pieces = [t.prompt[t.at : t.at + T] for t in texts]
        tokens_BT = np.zeros((size, T), np.int32)
        for row_T, piece in zip(tokens_BT, pieces, strict=False):
            row_T[: len(piece)] = piece
        real = np.array([*map(len, pieces), *[1] * (size - len(texts))], np.int32)
        seats = self._seats(texts, root=False)
        tokens_BT, real_B = self._sent((tokens_BT, real))
        live = self._live(max(t.at for t in texts) + T)
        step = causal_steps(seats.at_B, T, live, seats.row_B, real_B)
        stream = target.stream()
        if target.experts is not None:
            target.experts.begin()
        of_text_M = (np.arange(T) < real[:, None]) & (np.arange(size) < len(texts))[:, None]
        caches = list(self.caches)
        given = target, stream, tokens_BT, caches, step
        x = run_pass(*given, real=self._sent(of_text_M.reshape(-1)))
        self.caches = tuple(caches)
        if self.own is not None:
            self.own.read(tokens_BT, step)
        guided = Guided.of(texts, size, VANILLA.spec, target.cfg.cards)
        given = target.cfg, guided and guided.first()
        draw_B, finite_B = jax.device_get(
            programs.first_draws(target.top, x, seats, real_B, *given)
        )
        seconds = time.perf_counter() - began
        streamed = stream.bytes + (target.experts.bytes if target.experts else 0)
        results = []
        for b, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
            text.at += len(piece)
            emitted = []
            if text.at == len(text.prompt):
                text.failed = guided and guided.lost(b)
                if not finite_B[b]:
                    text.failed = self._not_finite(text)
                if not text.failed:
                    emitted = self._emit(text, [int(draw_B[b])])
            results.append((text, Round(emitted, other_s=seconds, streamed_bytes=streamed)))
        return told(results, x, [[n - 1] for n in map(len, pieces)], target.top, target.cfg)

    def _emit(self, text: Text, tokens: list[int]) -> list[int]:
        """Those of the tokens that belong to the text; it may end there."""
        kept = tokens[: text.new_tokens - len(text.new)]
        if hit := [i for i, t in enumerate(kept) if t in text.eos]:
            kept = kept[: hit[0] + 1]
        if text.walk is not None:
            kept = follow(text, kept)
        text.tokens.extend(kept)
        text.done = bool(hit) or len(text.new) == text.new_tokens or text.complete
        return kept

    def _round(self, texts: list[Text]) -> list[tuple[Text, Round]]:
        if not texts:
            return []
        t0 = time.perf_counter()
        target, cfg = self.target, self.target.cfg
        size, rows = self._size(texts), len(self.rows.users)
        spec = self.spec_of(size)
        slots = self._live(max(t.at for t in texts) + spec.places)
        accepted = [next(t.replay) if t.replay is not None else -1 for t in texts]
        replay = any(t.replay is not None for t in texts)
        seats = self._seats(texts, root=True)
        accepted_B = self._sent(np.array(accepted + [0] * (size - len(texts)), np.int32))
        least_L = self._sent(self.stop.least_gain_L()[: max(spec.steps, 1)])
        if self.draft is None:
            if spec.depth:
                trees = self._from_text(texts, size, spec)
            else:
                trees = programs.only_roots(seats, spec)
        guided, text_BS, counts_B3 = Guided.of(texts, size, spec, cfg.cards), None, None
        if self.lookup is not None and guided is None:
            text_BS = self._sent(self.lookup.texts(texts, size))
        stream, routed = target.stream(), None
        if self.draft is not None:
            given = Growing(
                params=self.draft,
                caches=self.caches if self.own is None else self.own.caches,
                seats=seats,
                least_L=least_L,
                cfg=self.proposer.cfg,
                spec=spec,
                slots=slots,
                rows=rows,
                experts=self._experts,
            )
            (trees, caches, routed), counts_B3 = self._grow(given, guided, text_BS)
            if self.own is None:
                self.caches = caches
            else:
                self.own.caches = caches
        trees, tokens_BE, step, real_M = programs.lay_out_each(trees, seats, spec, slots, rows)
        jax.block_until_ready(tokens_BE)
        if guided is not None:
            guided.look(trees)
        experts = target.experts
        if experts is not None:
            experts.begin(None if routed is None else of_all_layers(routed, cfg))
        t1 = time.perf_counter()
        arrived, caches = stream.arrived_bytes(), list(self.caches)
        x = run_pass(target, stream, tokens_BE, caches, step, real=real_M)
        jax.block_until_ready(x)
        t2 = time.perf_counter()
        end = programs.finish_each(
            Verifying(
                top=target.top,
                x_BED=x,
                trees=trees,
                caches=tuple(caches),
                seats=seats,
                accepted_B=accepted_B,
                allowed=guided and guided.verified(),
                gate=self.method.gate,
                cfg=cfg,
                spec=spec,
                replay=replay,
            )
        )
        self.caches = end.caches
        if self.own is not None:
            self.own.follow(end, seats, trees.forwarded, slots)
        of_trees = trees.parent_E, trees.depth_E, trees.score_E, trees.size
        given = end.emitted_BP, end.length_B, end.node_BP[:, -1], end.finite_B, *of_trees
        host, counts_B3 = jax.device_get((given, counts_B3))
        if counts_B3 is not None:
            self.lookup.learn(counts_B3[: len(texts)])
        t3 = time.perf_counter()
        streamed = stream.bytes + (experts.bytes if experts else 0)
        passed = streamed - arrived
        results = []
        for b, (text, emitted_P, length, last, finite, parent_E, depth_E, score_E, n) in enumerate(
            zip(texts, *host, strict=False)
        ):
            emitted, path = emitted_P[:length].tolist(), path_to(last, parent_E)
            text.at += int(length)
            text.failed = guided and guided.lost(b, path)
            if not finite:
                text.failed = self._not_finite(text)
            if text.failed:
                emitted = []
            drafted = int((parent_E >= 0).sum())
            # What is behind the last kept token stays in the row, but is not the text's.
            kept = self._emit(text, emitted)
            text.at = min(text.at, len(text.tokens) - 1) if kept else text.at
            steps, copied = 0 if self.draft is None else 1 + max(0, drafted - 1) // spec.width, 0
            if counts_B3 is not None:
                steps, copied, _ = counts_B3[b].tolist()
            drafts = self.draft is not None and not copied
            result = Round(
                tokens=kept,
                accepted=int(length) - 1,
                drafted=drafted,
                depth=int(np.max(np.where(parent_E >= 0, depth_E, 0))),
                steps=steps,
                copied=copied,
                path=path,
                gains=step_gains(score_E[:n], spec.width) if drafts else (),
                draft_s=t1 - t0,
                verify_s=t2 - t1,
                other_s=t3 - t2,
                streamed_bytes=streamed,
                pass_bytes=passed,
                experts=experts and experts.counts,
            )
            self._learn(result)
            results.append((text, result))
        return told(results, x, [(0, *r.path) for _, r in results], target.top, cfg)

    def _grow(
        self, given: Growing, guided: Guided | None, text_BS: jax.Array | None
    ) -> tuple[Grown, jax.Array | None]:
        """(the trees, what looking up did for each of them)."""
        if text_BS is not None:
            return self.lookup.grow(given, text_BS)
        return (programs.grow_each if guided is None else guided.grow)(given), None

    def _from_text(self, texts: list[Text], size: int, spec: TreeSpec) -> Tree:
        """Trees of what followed the last tokens earlier in each text."""
        proposer = PromptLookup(spec, self.method.longest)
        found = [proposer.tree(t.tokens) for t in texts]
        found += [proposer.tree([0])] * (size - len(texts))
        return self._sent(jax.tree.map(lambda *a: np.stack(a), *found))

    def _learn(self, result: Round) -> None:
        if self.stop.chance == 0 or not result.gains:
            return
        steps = [(place - 1) // self.spec.width for place in result.path]
        hits = np.isin(np.arange(len(result.gains)), steps)
        given = result.seconds, len(result.tokens), result.draft_s, result.steps
        self.stop.learn(result.gains, hits, *given)

    def _not_finite(self, text: Text) -> str:
        return no_numbers(f"after {text.at} tokens", self.target.cfg)

    @property
    def _experts(self) -> tuple[int, int] | None:
        """(layers with experts, experts) whose routing the draft records."""
        if self.target.experts is None or not self.proposer.routes:
            return None
        return recorded(self.target.cfg, self.proposer.cfg)

    # ------------------------------------------------------------------ all at once

    def warm_up(
        self,
        prompt: Sequence[int],
        new_tokens: int,
        replay: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        """Decodes a few tokens with every number of texts that there are programs for."""
        given = replay or (lambda: None)
        for n in self.ladder:
            self.generate([Text(prompt, min(4, new_tokens), replay=given()) for _ in range(n)])

    def generate(self, texts: Sequence[Text]) -> list[list[int]]:
        """The new tokens of each text; they join as rows are free. Raises NotFiniteError."""
        waiting = list(texts)
        for text in waiting:
            self.check(text)
        while waiting or self.running:
            while waiting and self.join(waiting[0]):
                waiting.pop(0)
            self.step()
        if failed := next((t for t in texts if t.failed), None):
            raise NotFiniteError(failed.failed)
        return [t.new for t in texts]


def why_not_together(method: Method) -> str | None:
    """Why a method cannot decode several sequences together; None where it can."""
    reasons = {
        "drafts during verification, below the tree of one sequence": method.spec.extra > 0,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return f"{method.name} cannot decode a batch: it {found[0]}" if found else None
