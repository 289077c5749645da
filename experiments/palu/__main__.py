"""Low-rank, quantized KV caches: calibrate, search ranks, convert, and see what is lost.

    python -m experiments.palu
    python -m experiments.palu --evaluation wikitext2 --calibration wikitext2 --context 2048 \\
        --tokens 8192 --preset paper --data-dir DATA
    python -m experiments.palu --keep 0.7 --bits 4 --save FOLDER

Without flags: SmolLM2-135M on the documentation that CPython carries, a few configurations and
the rivals at the same bits. The last command stores a converted model, which
`experiments.speculative --palu FOLDER` decodes. `README.md` has the numbers.
"""

import contextlib
import dataclasses
import logging
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.common import records
from experiments.palu import corpora
from experiments.palu import evaluate as palu_evaluate
from experiments.palu import methods as palu_methods
from experiments.palu import report as palu_report
from experiments.palu.methods import RIVALS, Maker, Method
from llm_jax import CheckpointError, registry
from llm_jax.config import ConfigError
from llm_jax.formats import open_checkpoint
from palu_jax import rank, store
from palu_jax.calibration import CalibrationError, calibrate
from palu_jax.convert import ConvertError, Objective
from palu_jax.latent import FormatError
from subspec_jax import offload
from subspec_jax import precompile as ahead

USER_ERRORS = (
    CalibrationError,
    CheckpointError,
    ConfigError,
    ConvertError,
    FormatError,
    corpora.CorpusError,
    rank.RankError,
    records.RecordError,
    store.StoreError,
)


@dataclasses.dataclass(frozen=True)
class Palu:
    """Convert a model in several ways and measure each on text."""

    model: str = "smollm2-135m"
    """A registered name, such as smollm2-135m, qwen2.5-0.5b, llama-2-7b."""
    checkpoint: Path | None = None
    """A local folder with safetensors, or a GGUF file, in place of the registered source."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU, float16 on GPUs without bfloat16. Caches of 16
    bits take 2 bytes a number in any case."""
    data_dir: Path | None = None
    """Folder with corpora; without it they come from the hub."""
    calibration: str = "python"
    """Text to calibrate on: python, wikitext2, c4, book, or a file."""
    calibration_tokens: int = 8192
    calibration_length: int = 512
    """Tokens of a calibration sequence."""
    evaluation: str = "python"
    """Text to be scored: as for calibration, other parts of it."""
    tokens: int = 4096
    """Tokens to score; 0 for all."""
    context: int = 1024
    """Tokens of a window."""
    batch: int = 1
    """Windows at a time."""
    preset: Literal["few", "none", "paper"] = "few"
    """few: what runs without flags, unless --keep or --rivals choose. paper: the grid of the paper,
    the comparisons of objectives, rotation and searches, and the rivals."""
    keep: tuple[float, ...] = ()
    """Shares of the ranks to keep; 0.7 is Palu-30%."""
    bits: tuple[Literal[16, 8, 4, 3, 2], ...] = (4,)
    key_bits: Literal[16, 8, 4, 3, 2] | None = None
    """Of keys alone; value_bits likewise."""
    value_bits: Literal[16, 8, 4, 3, 2] | None = None
    granularity: tuple[Literal["M", "G", "J"], ...] = ("J",)
    """kv heads that share latents: each its own, groups of --group-size, or all."""
    group_size: int = 2
    objective: tuple[Objective, ...] = ("gradient",)
    """What the factors minimize: plain (the weights' error), whitened (the outputs'; Palu), aware
    (of scores and behind the output projection), gradient (the change of the loss)."""
    search: tuple[palu_methods.Search, ...] = ("error",)
    """Ranks: uniform, fisher (Palu; one share a projection), fisher-group, error (water-filling
    over the predicted error of all layers)."""
    split: tuple[float, float] = (1, 1)
    """R_k : R_v of the uniform search."""
    budget: tuple[float, ...] = ()
    """Cache bytes a token, of all layers (below 1: as a share of bfloat16's): group size, R_k : R_v
    and bits are chosen by predicted error."""
    slowest: float | None = None
    """With --budget: microseconds that the attention of one decode step may take, all layers, over
    --slowest-at tokens, by the cost model of the kernels (an H200)."""
    slowest_at: int = 65536
    rank_multiple: int = 4
    """Ranks are multiples of it; kernels on a GPU want 16 or more."""
    rotate: bool = True
    """Turn latents by a Hadamard matrix before they are quantized."""
    mean_split: bool = False
    """Keep the coefficient of the mean direction in 16 bits."""
    fuse_values: bool = False
    """Multiply the value factors into the output projection."""
    sinks: int = 0
    """First tokens kept in 16 bits."""
    window: int = 0
    """Newest tokens kept in 16 bits."""
    rivals: tuple[Literal[RIVALS], ...] = ()  # type: ignore[valid-type]
    """Quantized caches of ordinary keys and values, for comparison."""
    retrieval: int = 0
    """Key-value retrieval prompts to answer, of --retrieval-pairs pairs each."""
    retrieval_pairs: int = 12
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks through lm-eval (pip install -e '.[eval]'): arc_easy, arc_challenge, piqa,
    winogrande, hellaswag, lambada_openai, … from --data-dir, or any that lm-eval knows."""
    task_limit: int = 0
    """Documents of each task; 0 for all."""
    task_batch: int = 8
    generate: str | None = None
    """A prompt to continue with the first configuration, and with the dense model."""
    save: Path | None = None
    """Store the first configuration here."""
    seed: int = 0
    output: Path | None = None
    """Folder for statistics, records, table and plot; the same folder resumes."""


def methods_of(args: Palu, cfg) -> list[Method]:
    """The dense model first, then what the settings ask for."""
    group = lambda g: palu_methods.group_of(g, cfg, args.group_size)
    named = lambda **k: Method(
        "palu", group=group(k["granularity"]), multiple=args.rank_multiple, **k
    )
    chosen = [Method("dense")]
    if args.slowest is not None and not args.budget:
        raise rank.RankError("--slowest limits what --budget chooses; give a budget")
    planned = lambda budget: Method(
        "palu", objective=args.objective[0], search=palu_methods.PLANNED, rotate=args.rotate,
        budget=budget * dense_bytes(cfg) if budget < 1 else budget, multiple=args.rank_multiple,
        slowest=None if args.slowest is None else args.slowest * 1e-6, context=args.slowest_at,
    )  # fmt: skip
    if bad := [budget for budget in args.budget if budget <= 0]:
        raise rank.RankError(f"--budget is {bad[0]:g}; expected bytes a token, or a share below 1")
    chosen += [planned(budget) for budget in args.budget]
    if args.keep:
        common = dict(rotate=args.rotate, mean_split=args.mean_split, fuse_values=args.fuse_values,
                      sinks=args.sinks, window=args.window)  # fmt: skip
        for objective in args.objective:
            for granularity in args.granularity:
                for keep in args.keep:
                    for search in args.search:
                        for bits in args.bits:
                            chosen.append(named(
                                keep=keep, key_bits=args.key_bits or bits,
                                value_bits=args.value_bits or bits, granularity=granularity,
                                objective=objective, search=search,
                                split=args.split if search == "uniform" else (1, 1), **common,
                            ))  # fmt: skip
        return chosen + [Method(kind) for kind in args.rivals]
    if args.preset == "few" and not args.rivals and not args.budget:
        both = lambda keep, bits, **k: named(keep=keep, key_bits=bits, value_bits=bits, **k)
        paper = dict(granularity="J", objective="whitened")
        best = dict(granularity="J", objective="gradient", search="error")
        chosen += [both(0.7, bits, **paper) for bits in (16, 4)]
        chosen += [both(*c, **best) for c in ((0.7, 16), (0.5, 16), (0.7, 4), (0.7, 2))]
        return chosen + [planned(0.27)] + [Method(kind) for kind in ("int4", "int2")]
    if args.preset == "paper":
        chosen += paper_grid(args, cfg, named)
    rivals = args.rivals or (RIVALS if args.preset == "paper" else ())
    return chosen + [Method(kind) for kind in rivals]


def paper_grid(args, cfg, named) -> list[Method]:
    """The paper's grid, then one change at a time; those that share spectra are together."""
    sizes = ["J", "M"] + (["G"] if cfg.kv_heads > 2 else [])
    both = lambda keep, bits, **k: named(keep=keep, key_bits=bits, value_bits=bits, **k)
    found = []
    for g in sizes:
        paper = dict(granularity=g, objective="whitened")
        found += [both(keep, bits, **paper) for keep in (0.7, 0.5) for bits in (16, 4, 3, 2)]
        if g == "J":
            found += [both(0.7, bits, rotate=False, **paper) for bits in (4, 3, 2)]
            found += [both(0.7, 8, **paper), both(0.3, 16, **paper)]
    for objective in ("plain", "aware", "gradient"):
        for g in sizes[: 1 if objective == "plain" else None]:
            one = dict(granularity=g, objective=objective)
            found += [both(keep, 16, **one) for keep in (0.7, 0.5)]
            if g == "J" and objective != "plain":
                found += [both(0.7, bits, **one) for bits in (4, 2)]
            if g == "J" and objective == "gradient":
                found.append(both(0.5, 16, split=(1, 3), **one))
                found += [both(0.5, 16, search=s, **one) for s in ("fisher", "fisher-group")]
                for keep in (0.7, 0.5, 0.3):
                    found += [both(keep, bits, search="error", **one) for bits in (16, 4, 3, 2)]
                rest = dict(keep=0.7, search="error", **one)
                found.append(named(key_bits=4, value_bits=2, **rest))
                found += [named(key_bits=b, value_bits=b, sinks=4, **rest) for b in (4, 2)]
                found += [both(1.0, bits, **one) for bits in (4, 3, 2)]
    for objective in ("whitened", "gradient"):
        mean = dict(granularity="J", objective=objective, mean_split=True)
        found += [both(0.7, bits, **mean) for bits in (4, 2)]
    return found


def dense_bytes(cfg) -> int:
    """Bytes a token of an ordinary bfloat16 cache, all layers."""
    return 2 * 2 * cfg.layers * cfg.kv_heads * cfg.head_dim


class Run:
    """One invocation: a model, its statistics, and a record for everything measured."""

    def __init__(self, args: Palu, console: Console, folder: Path):
        self.args, self.console, self.folder = args, console, folder
        self.path = folder / "records.jsonl"
        self.records = records.read(self.path)

    @contextlib.contextmanager
    def bar(self, title, total):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        hidden = not self.console.is_terminal
        if hidden:
            self.console.print(f"{title} …", style="dim", highlight=False)
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.update(task, completed=done)

    def open(self):
        args = self.args
        card = offload.card_bytes()
        wanted = args.dtype
        if wanted == "auto":
            wanted = "float32" if card is None else offload.card_dtype()
        say = lambda message: self.console.print(message, style="dim", highlight=False)
        path = registry.find_checkpoint(args.model, args.checkpoint, progress=say)
        checkpoint = open_checkpoint(path)
        self.cfg = cfg = checkpoint.config(wanted)
        checkpoint.check(cfg)
        if not 2 <= args.context <= cfg.max_length:
            raise ConfigError(
                f"--context is {args.context}; this model was made for 2 to {cfg.max_length}"
            )
        self.methods = methods_of(args, cfg)  # whatever cannot be is said before anything is read
        self.tokenizer = checkpoint.tokenizer()
        evaluation = corpora.text(args.evaluation, "evaluation", args.data_dir)
        count = -(-args.tokens // args.context)
        tokens = self.tokenizer.encode(evaluation)
        self.windows = corpora.windows(tokens, args.context, count)
        if len(self.windows) < count:
            say(f"{args.evaluation} has only {len(self.windows)} windows of {args.context} tokens")
        with self.bar("Loading layers", cfg.layers) as step:
            self.params = checkpoint.load(cfg, progress=lambda done, _: step(done))
        device = jax.devices()[0]
        if device.platform == "gpu":
            ahead.use_cache(registry.cache_folder() / "compiled")
        self.device = {"platform": device.platform, "kind": device.device_kind}

    def calibrate(self):
        """`Statistics`, from the folder if they are there."""
        args = self.args
        needed = [m for m in self.methods if m.needs_statistics]
        if not needed:
            return None
        gradients = any(m.needs_gradients for m in needed)
        text = corpora.text(args.calibration, "calibration", args.data_dir)
        length = min(args.calibration_length, self.cfg.max_length)
        count = max(1, args.calibration_tokens // length)
        sequences = corpora.windows(self.tokenizer.encode(text), length, count, args.seed)
        self.calibrated_on = palu_methods.fingerprint(sequences.tobytes(), gradients)
        path = self.folder / f"statistics-{self.calibrated_on}.npz"
        began = time.perf_counter()
        with self.bar(
            f"Calibrating on {sequences.size} tokens of {args.calibration}", count
        ) as step:
            batches = [sequences[i : i + 2] for i in range(0, count, 2)]
            found = calibrate(
                self.params, batches, self.cfg, gradients=gradients, path=path, progress=step
            )
        self.calibrate_s = time.perf_counter() - began
        return found

    def measure(self):
        asked = self.measurements()
        statistics = self.calibrate()
        maker = Maker(self.params, self.cfg, statistics, self.bar)
        stored = False
        for n, method in enumerate(self.methods):
            saving = self.args.save is not None and method.kind == "palu" and not stored
            missing = [(what, run) for what, run in asked if self.found(method, what) is None]
            if not missing and not saving:
                continue
            params, recipe = maker.make(method)
            if saving:
                store.save(self.args.save, params, self.cfg, recipe, self.args.model)
                self.console.print(f"Stored {method.name} in {self.args.save}", highlight=False)
                stored = True
            for what, run in missing:
                began = time.perf_counter()
                title = f"{n + 1}/{len(self.methods)} {method.name}: {what}"
                result = run(params, title)
                self.note(method, recipe, what, result, time.perf_counter() - began)
            del params

    def measurements(self):
        """(name, function of parameters and title to results), as the settings ask."""
        args = self.args

        def perplexity(params, title):
            with self.bar(title, len(self.windows)) as step:
                return palu_evaluate.perplexity(params, self.windows, self.cfg, args.batch, step)

        found = [("perplexity", perplexity)]
        if args.retrieval:
            rows = corpora.kv_retrieval(
                args.data_dir, args.retrieval, args.retrieval_pairs, args.seed
            )

            def retrieval(params, title):
                with self.bar(title, len(rows)) as step:
                    return palu_evaluate.retrieval(params, self.cfg, self.tokenizer, rows, step)

            found.append((f"retrieval-{args.retrieval}x{args.retrieval_pairs}", retrieval))
        for name in args.tasks:
            found.append((f"task-{name}-{args.task_limit or 'all'}", self.task(name)))
        return found

    def task(self, name: str):
        from experiments.palu import tasks as palu_tasks

        args = self.args
        palu_tasks.load([name], args.data_dir)  # what cannot be loaded is said at once

        def run(params, title):
            with self.bar(title, 100) as step:
                return palu_tasks.run(
                    params, self.cfg, self.tokenizer, [name], args.data_dir,
                    args.task_limit or None, args.task_batch, lambda share: step(int(100 * share)),
                )[name]  # fmt: skip

        return run

    def settings(self, method: Method) -> str:
        """A hash of the model, the texts and the method."""
        calibrated = self.calibrated_on if method.needs_statistics else None
        weights = np.asarray(self.params.layers[0].attn.q[:1, :8], np.float32).tolist()
        return palu_methods.fingerprint(
            self.cfg, weights, self.windows.tobytes(), calibrated, dataclasses.asdict(method)
        )

    def found(self, method: Method, what: str):
        key = method.name, what, self.settings(method)
        same = (r for r in self.records if (r["method"], r["sample"], r["settings"]) == key)
        return next(same, None)

    def note(self, method, recipe, what, result, seconds):
        cfg = self.cfg
        record = dict(
            method=method.name,
            sample=what,
            turn=0,
            settings=self.settings(method),
            model=self.args.model,
            dtype=cfg.dtype,
            calibration=self.args.calibration if recipe else None,
            evaluation=self.args.evaluation,
            **dataclasses.asdict(method) | _planned(method, recipe),
            rank_kept=rank.share_kept(recipe.ranks, recipe.groups, cfg.head_dim) if recipe else None,
            key_rank_share=_key_share(recipe),
            result=result,
            bf16_bytes_per_token=dense_bytes(cfg),
            seconds=seconds,
            device=self.device,
            environment=records.environment(),
        )
        records.append(self.path, record)
        self.records.append(record)

    def report(self):
        wanted = {self.settings(m) for m in self.methods}
        rows = [r for r in self.records if r["settings"] in wanted]
        palu_report.print_table(self.console, rows)
        files = [self.path, *palu_report.plot(rows, self.folder)]
        self.console.print("Written: " + ", ".join(map(str, files)), style="dim", highlight=False)

    def continue_text(self):
        from llm_jax.generation import generate

        maker = Maker(self.params, self.cfg, self.calibrate(), self.bar)
        prompt = self.tokenizer.chat([{"role": "user", "content": self.args.generate}])
        for method in self.methods[:2]:
            params, _ = maker.make(method)
            tokens = generate(params, prompt, self.cfg, 64, eos=self.tokenizer.eos)
            self.console.rule(method.name)
            text = self.tokenizer.decode([t for t in tokens if t not in self.tokenizer.eos])
            self.console.print(text, markup=False, highlight=False)


def _planned(method, recipe) -> dict:
    """What the planner chose, as a record has it."""
    if method.search != palu_methods.PLANNED:
        return {}
    form = recipe.format
    return dict(key_bits=form.key_bits, value_bits=form.value_bits, group=recipe.groups[0])


def _key_share(recipe) -> float | None:
    if recipe is None:
        return None
    keys, values = (sum(sum(layer[i]) for layer in recipe.ranks) for i in (0, 1))
    return keys / (keys + values)


def main(args: Palu, console: Console) -> int:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = args.output or Path("runs") / f"palu-{args.model}-{args.evaluation}-{stamp}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise records.RecordError(
            f"the folder {folder} cannot be made: {error.strerror}"
        ) from error
    if args.save is not None and args.save.expanduser().exists():
        raise store.StoreError(f"{args.save} exists; choose another folder or remove it")
    if args.tokens < 0 or args.calibration_tokens < 2 or args.batch < 1:
        raise records.RecordError("--tokens, --calibration-tokens and --batch cannot be negative")
    run = Run(args, console, folder)
    console.print(f"Results go to {folder}", style="dim", highlight=False)
    run.open()
    run.measure()
    run.report()
    if args.generate is not None:
        run.continue_text()
    return 0


def cli() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = tyro.cli(Palu, description=__doc__)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(110, console.width))
    try:
        return main(args, console)
    except USER_ERRORS as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("\ninterrupted; the same command with the same --output resumes")
        return 130


if __name__ == "__main__":
    sys.exit(cli())
