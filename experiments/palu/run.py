"""One call of `experiments.palu`: open the model, calibrate, convert, measure and report."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import palu_jax
from experiments.common import records
from experiments.common.plots import drawn_or_said
from experiments.palu import corpora, evaluate, report
from experiments.palu.flags import Palu, dense_bytes, methods_of
from experiments.palu.methods import CacheMethod, fingerprint
from llm_jax import registry
from llm_jax.config import ConfigError
from llm_jax.extras import need
from llm_jax.generation import generate
from llm_jax.params import Params
from llm_jax.progress import Bar, Reporter, bar
from palu_jax import CachePlan, Recipe, Statistics, rank
from palu_jax.identity import identity
from subspec_jax import memory, precompile

Measurement = Callable[[Params, str], dict[str, Any]]
"""A function of the parameters and the title of a progress bar; it gives the results."""


def output_folder(args: Palu) -> Path:
    """Where results go: --output, or a new folder below `runs`."""
    if args.output is not None:
        return args.output.expanduser()
    parts = args.model, Path(args.evaluation).name, time.strftime("%Y%m%d-%H%M%S")
    name = "-".join(("palu", *parts))
    return Path("runs") / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[-200:]


class PaluRun(Reporter):
    """One call of the command: a model, its statistics, and a record of everything measured."""

    def __init__(self, args: Palu, console: Console, folder: Path):
        self.args, self.console, self.folder = args, console, folder
        self.path = folder / "records.jsonl"
        self.records = records.read(self.path, problem=report.problem)

    def bar(self, title: str, total: float) -> AbstractContextManager[Bar]:
        """A progress bar; where output is not a terminal, a line."""
        return bar(self.console, title, total)

    def open(self) -> None:
        """Reads the model and the evaluation text, after a check of all flags."""
        args = self.args
        card = memory.card_bytes()
        wanted = args.dtype
        if wanted == "auto":
            wanted = "float32" if card is None else memory.card_dtype()
        say = lambda message: self.console.print(message, style="dim", highlight=False)
        path = registry.find_checkpoint(args.model, args.checkpoint, progress=say)
        checkpoint = registry.open_model(path, progress=say)
        self.cfg = cfg = checkpoint.config(wanted)
        checkpoint.check(cfg)
        for line in checkpoint.notices(cfg):
            say(line)
        if not 2 <= args.context <= cfg.max_length:
            raise ConfigError(
                f"--context is {args.context}; this model was made for 2 to {cfg.max_length}"
            )
        self.methods = methods_of(args, cfg)  # impossible flags are refused before anything is read
        self.asked = self.measurements()
        self.tokenizer = checkpoint.tokenizer()
        evaluation = corpora.text(args.evaluation, "evaluation", args.data_dir)
        count = -(-args.tokens // args.context)
        tokens = self.tokenizer.encode(evaluation)
        self.windows = corpora.windows(tokens, args.context, count)
        if len(self.windows) < count:
            say(f"{args.evaluation} has only {len(self.windows)} windows of {args.context} tokens")
        self.sequences = self._calibration_text()
        with self.bar("Loading layers", cfg.layers) as step:
            self.params = checkpoint.load(cfg, progress=lambda done, _: step(done))
        self.weights = identity(self.params, cfg.dtype, ()).digests
        device = jax.devices()[0]
        if device.platform == "gpu":
            precompile.use_cache(registry.cache_folder() / "compiled")
        self.device = {"platform": device.platform, "kind": device.device_kind}

    def _calibration_text(self) -> np.ndarray | None:
        """Token ids [sequences, tokens] to calibrate on, where a method needs statistics."""
        args = self.args
        if not any(m.needs_statistics for m in self.methods):
            return None
        text = corpora.text(args.calibration, "calibration", args.data_dir)
        length = min(args.calibration_length, self.cfg.max_length)
        count = max(1, args.calibration_tokens // length)
        return corpora.windows(self.tokenizer.encode(text), length, count, args.seed)

    def calibrate(self) -> Statistics | None:
        """The statistics that the methods need, from the folder if they are there."""
        sequences = self.sequences
        if sequences is None:
            return None
        gradients, count = any(m.needs_gradients for m in self.methods), len(sequences)
        self.calibrated_on = fingerprint(sequences.tobytes(), gradients)
        path = self.folder / f"statistics-{self.calibrated_on}.npz"
        batches = [sequences[i : i + 2] for i in range(0, count, 2)]
        title = f"Calibrating on {sequences.size} tokens of {self.args.calibration}"
        with self.bar(title, count) as step:
            return palu_jax.calibrate(
                self.params, batches, self.cfg, gradients=gradients, path=path, progress=step
            )

    def compressor(self) -> palu_jax.Compressor | None:
        """A `Compressor` of the model; None where no method converts it."""
        if not any(m.kind == "palu" for m in self.methods):
            return None
        return palu_jax.Compressor(self.params, self.cfg, self.calibrate(), self)

    def measure(self) -> None:
        """Makes every method, takes its missing measurements, and stores the first conversion."""
        stored = False
        compressor = self.compressor()
        for n, method in enumerate(self.methods):
            saving = self.args.save is not None and method.kind == "palu" and not stored
            missing = [(what, run) for what, run in self.asked if self.found(method, what) is None]
            if not missing and not saving:
                continue
            params, recipe = method.applied(self.params, self.cfg, compressor)
            if saving:
                palu_jax.save(self.args.save, params, self.cfg, recipe, self.args.model)
                self.console.print(f"Stored {method.name} in {self.args.save}", highlight=False)
                stored = True
            plan = method.plan(self.cfg, compressor)
            for what, run in missing:
                began = time.perf_counter()
                title = f"{n + 1}/{len(self.methods)} {method.name}: {what}"
                result = run(params, title)
                self.note(method, recipe, plan, what, result, time.perf_counter() - began)
            del params

    def measurements(self) -> list[tuple[str, Measurement]]:
        """(name, function) of all measurements that the flags ask for."""
        args = self.args

        def perplexity(params, title):
            with self.bar(title, len(self.windows)) as step:
                return evaluate.perplexity(params, self.windows, self.cfg, args.batch, step)

        found = [("perplexity", perplexity)]
        if args.retrieval:
            rows = corpora.kv_retrieval(
                args.data_dir, args.retrieval, args.retrieval_pairs, args.seed
            )

            def retrieval(params, title):
                with self.bar(title, len(rows)) as step:
                    return evaluate.retrieval(params, self.cfg, self.tokenizer, rows, step)

            found.append((f"retrieval-{args.retrieval}x{args.retrieval_pairs}", retrieval))
        for name in args.tasks:
            found.append((f"task-{name}-{args.task_limit or 'all'}", self.task(name)))
        return found

    def task(self, name: str) -> Measurement:
        """The measurement of a zero-shot task; raises TaskError where it cannot be loaded."""
        need("lm_eval", "eval", "--tasks")
        from experiments.palu import tasks

        args = self.args
        tasks.load_tasks([name], args.data_dir)  # a task that is missing is refused at once

        def run(params, title):
            with self.bar(title, 100) as step:
                return tasks.run_tasks(
                    params, self.cfg, self.tokenizer, [name], args.data_dir,
                    args.task_limit or None, args.task_batch, lambda share: step(int(100 * share)),
                )[name]  # fmt: skip

        return run

    def settings(self, method: CacheMethod) -> str:
        """A hash of the model with all its weights, the texts and the method."""
        calibrated = self.calibrated_on if method.needs_statistics else None
        return fingerprint(
            self.cfg, self.weights, self.windows.tobytes(), calibrated, dataclasses.asdict(method)
        )

    def found(self, method: CacheMethod, what: str) -> records.Record | None:
        """The record of this measurement, where there is one."""
        key = method.name, what, self.settings(method)
        same = (r for r in self.records if (r["method"], r["sample"], r["settings"]) == key)
        return next(same, None)

    def note(
        self,
        method: CacheMethod,
        recipe: Recipe | None,
        plan: CachePlan | None,
        what: str,
        result: dict,
        seconds: float,
    ) -> None:
        """Writes a record of a measurement."""
        cfg = self.cfg
        kept = recipe and rank.share_kept(recipe.ranks, recipe.groups, cfg.head_dim)
        record = dict(
            method=method.name,
            sample=what,
            turn=0,
            settings=self.settings(method),
            model=self.args.model,
            dtype=cfg.dtype,
            calibration=self.args.calibration if recipe else None,
            evaluation=self.args.evaluation,
            **dataclasses.asdict(method) | _planned(plan),
            rank_kept=kept,
            key_rank_share=_key_share(recipe),
            result=result,
            bf16_bytes_per_token=dense_bytes(cfg),
            seconds=seconds,
            device=self.device,
            environment=records.environment(),
        )
        records.append(self.path, record)
        self.records.append(record)

    def report(self) -> None:
        """Prints the table of this call's methods and draws the plot."""
        wanted = {self.settings(m) for m in self.methods}
        rows = [r for r in self.records if r["settings"] in wanted]
        report.print_results(self.console, rows)
        files = [self.path, *drawn_or_said(self.console, report.plot_quality, rows, self.folder)]
        self.console.print("Written: " + ", ".join(map(str, files)), style="dim", highlight=False)

    def continue_text(self) -> None:
        """Prints what the dense model and the first configuration answer to --generate."""
        prompt = self.tokenizer.chat([{"role": "user", "content": self.args.generate}])
        compressor = self.compressor()
        for method in self.methods[:2]:
            params, _ = method.applied(self.params, self.cfg, compressor)
            tokens = generate(params, prompt, self.cfg, 64, eos=self.tokenizer.eos)
            self.console.rule(method.name)
            text = self.tokenizer.decode([t for t in tokens if t not in self.tokenizer.eos])
            self.console.print(text, markup=False, highlight=False)


def _planned(plan) -> dict:
    """The planner's choices, for a record; the forecast is in nats a token."""
    if plan is None:
        return {}
    found = dict(key_bits=plan.key_bits, value_bits=plan.value_bits, group=plan.groups[0])
    found["forecast"] = plan.error
    if plan.classes is not None:
        found |= dict(planned_classes=plan.classes, mean_bits=plan.mean_bits())
    return found


def _key_share(recipe) -> float | None:
    """The share of all ranks that keys have."""
    if recipe is None:
        return None
    keys, values = (sum(sum(layer[i]) for layer in recipe.ranks) for i in (0, 1))
    return keys / (keys + values)
