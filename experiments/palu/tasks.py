"""Zero-shot tasks through lm-eval: its own code around a model of ours with its real cache.

Tasks that have a file below the data folder need no network; lm-eval downloads all others.
Importing this needs lm-eval, which the extra `eval` brings.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.common.cli import UserError
from experiments.palu.corpora import json_rows
from experiments.palu.evaluate import token_scores
from llm_jax.config import Config
from llm_jax.extras import need
from llm_jax.generation import generate
from llm_jax.params import Params

need("lm_eval.api", "eval", "a zero-shot task")  # a named error where it is missing

import datasets  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


class TaskError(UserError):
    """A task that cannot be run; the message says which tasks there are."""


_QUERY = "{{query.strip()}}"
_ANSWERED = _QUERY + "\nAnswer:"
TASK_FILES = {
    # name: (file in text/zeroshot, prompt)
    "arc_easy": ("arc_easy.jsonl.gz", _ANSWERED),
    "arc_challenge": ("arc_challenge.jsonl.gz", _ANSWERED),
    "piqa": ("piqa.jsonl.gz", _ANSWERED),
    "boolq": ("boolq.jsonl.gz", _ANSWERED),
    "hellaswag": ("hellaswag_val1000.jsonl.gz", _QUERY),
    "openbookqa": ("openbook_qa.jsonl", _QUERY),
    "copa": ("copa.jsonl", _QUERY),
    "social_iqa": ("siqa.jsonl.gz", _QUERY),
    "commonsense_qa": ("commonsense_qa.jsonl.gz", _QUERY),
    "winogrande": ("winogrande.jsonl.gz", None),
    "wsc273": ("winograd_wsc.jsonl", None),
    "lambada_openai": ("lambada_openai.jsonl.gz", None),
}


def config_of(name: str, data_dir: Path) -> dict[str, Any] | None:
    """The lm-eval configuration of a task with its local file; None where there is no file."""
    if name not in TASK_FILES:
        return None
    file, prompt = TASK_FILES[name]
    path = Path(data_dir).expanduser() / "text/zeroshot" / file
    if not path.is_file():
        return None
    _check_rows(name, path)
    mean = lambda metric: dict(metric=metric, aggregation="mean", higher_is_better=True)
    common = dict(
        task=name,
        dataset_path="json",
        dataset_kwargs=dict(data_files={"test": str(path)}),
        test_split="test",
        num_fewshot=0,
        metadata=dict(version=1.0),
    )
    if name == "lambada_openai":
        perplexity = dict(metric="perplexity", aggregation="perplexity", higher_is_better=False)
        return common | dict(
            output_type="loglikelihood",
            doc_to_text="{{context}}",
            doc_to_target=" {{continuation}}",
            metric_list=[perplexity, mean("acc")],
        )
    if prompt is None:  # two beginnings for one ending; the likelier beginning is the answer
        return common | dict(
            output_type="multiple_choice",
            doc_to_text=lambda doc: doc["gold"],
            doc_to_target=lambda doc: doc["continuation"],
            doc_to_choice=lambda doc: doc["context_options"],
            metric_list=[mean("acc")],
        )
    return common | dict(
        output_type="multiple_choice",
        doc_to_text=prompt,
        doc_to_target="gold",
        doc_to_choice="choices",
        metric_list=[mean("acc"), mean("acc_norm")],
    )


def _check_rows(name: str, path: Path) -> None:
    """Raises an error for the first line of a task's file that has not what the task needs."""
    options = "context_options" if TASK_FILES[name][1] is None else "choices"
    texts, chosen = ("query",), True
    if name == "lambada_openai":
        texts, chosen = ("context", "continuation"), False
    elif options == "context_options":
        texts = ("continuation",)
    count = 0
    for count, row in json_rows(path):
        wrong = [field for field in texts if not isinstance(row.get(field), str)]
        if chosen:
            found, gold = row.get(options), row.get("gold")
            listed = isinstance(found, list) and all(isinstance(text, str) for text in found)
            wrong += [] if listed and found else [options]
            inside = type(gold) is int and isinstance(found, list) and 0 <= gold < len(found)
            wrong += [] if inside else ["gold"]
        if wrong:
            raise TaskError(f"{path}, line {count}: {wrong[0]} is missing or of a wrong type")
    if not count:
        raise TaskError(f"{path} is empty; the task {name} needs its documents")


class CachedLM(LM):
    """A model as lm-eval wants it; every token is scored through the real cache of its layers."""

    def __init__(
        self,
        params: Params,
        cfg: Config,
        tokenizer: Any,
        batch: int = 8,
        progress: Callable[[float], None] | None = None,
    ):
        super().__init__()
        self.params, self.cfg, self.tokenizer = params, cfg, tokenizer
        self.batch, self.progress = batch, progress

    def loglikelihood(self, requests, **_) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            context, ending = request.args
            kept = context.rstrip()  # trailing blanks belong to the ending
            start = self.tokenizer.encode(kept) if kept else [min(self.tokenizer.eos)]
            whole = self.tokenizer.encode(kept + context[len(kept) :] + ending)
            pairs.append((start, whole[len(start) :] if kept else whole))
        return self._scored(pairs)

    def loglikelihood_rolling(self, requests, **_) -> list[float]:
        pairs, owner = [], []
        length = self.cfg.max_length - 1
        for i, request in enumerate(requests):
            tokens = [min(self.tokenizer.eos), *self.tokenizer.encode(request.args[0])]
            for at in range(1, len(tokens), length):  # each token once, with all context that fits
                part = tokens[at : at + length]
                before = tokens[max(0, at - (self.cfg.max_length - len(part))) : at]
                pairs.append((before, part))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (score, _) in zip(owner, self._scored(pairs), strict=True):
            totals[i] += score
        return totals

    def generate_until(self, requests, **_) -> list[str]:
        said = []
        for request in requests:
            prompt, settings = request.args
            stops = settings.get("until", [])
            stops = [stops] if isinstance(stops, str) else stops
            count = settings.get("max_gen_toks", 64)
            tokens = self.tokenizer.encode(prompt)[-(self.cfg.max_length - count) :]
            found = generate(self.params, tokens, self.cfg, count, eos=self.tokenizer.eos)
            text = self.tokenizer.decode([t for t in found if t not in self.tokenizer.eos])
            said.append(text[: min([text.find(s) for s in stops if s in text], default=None)])
        return said

    def _scored(self, pairs) -> list[tuple[float, bool]]:
        """(log p of the ending, whether it is the greedy one) for pairs of token lists.

        Rows are sorted by length and padded to multiples of 32, so there are few programs. Texts
        that are too long lose tokens at their beginning.
        """
        size = self.cfg.max_length
        rows = [(start + ending)[-size:] for start, ending in pairs]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: list = [None] * len(rows)
        for first in range(0, len(order), self.batch):
            part = order[first : first + self.batch]
            width = min(-(-len(rows[part[0]]) // 32) * 32, size)
            tokens = np.zeros((self.batch, width), np.int32)
            for b, i in enumerate(part):
                tokens[b, : len(rows[i])] = rows[i]
            loss, greedy = token_scores(self.params, jnp.asarray(tokens), self.cfg)
            loss, greedy = np.asarray(loss, np.float64), np.asarray(greedy)
            for b, i in enumerate(part):
                end = len(rows[i]) - 1
                ending = slice(max(end - len(pairs[i][1]), 0), end)
                found[i] = -float(loss[b, ending].sum()), bool(greedy[b, ending].all())
            if self.progress:
                self.progress(min(first + self.batch, len(order)) / len(order))
        return found


def run_tasks(
    params: Params,
    cfg: Config,
    tokenizer: Any,
    tasks: Sequence[str],
    data_dir: Path | None,
    limit: int | None = None,
    batch: int = 8,
    progress: Callable[[float], None] | None = None,
) -> dict[str, dict]:
    """{task: {metric: value}}, with standard errors of accuracies and the number of documents.

    `limit` is the most documents of each task. Raises TaskError.
    """
    built = load_tasks(tasks, data_dir)
    model = CachedLM(params, cfg, tokenizer, batch, progress)
    # Standard errors are computed here: lm-eval's bootstrap forks, and a process with JAX must not.
    results = evaluate(model, built, limit=limit, bootstrap_iters=0, log_samples=False)
    found = {}
    for name in tasks:
        n = results["n-samples"][name]["effective"]
        keep = {}
        for key, value in results["results"][name].items():
            if isinstance(value, float) and math.isfinite(value):
                metric = key.removesuffix(",none")
                keep[metric] = value
                if metric.startswith("acc") and n > 1:
                    keep[metric + "_stderr"] = math.sqrt(value * (1 - value) / (n - 1))
        found[name] = keep | dict(n=n)
    return found


def load_tasks(tasks: Sequence[str], data_dir: Path | None) -> Any:
    """The tasks as lm-eval's `TaskManager.load` gives them; local files are taken first.

    Raises TaskError.
    """
    datasets.disable_progress_bars()
    configs = {name: None if data_dir is None else config_of(name, data_dir) for name in tasks}
    manager = TaskManager()
    wanted = []
    for name, config in configs.items():
        if config is None and name not in manager.all_tasks:
            known = ", ".join(TASK_FILES)
            raise TaskError(f"no task {name!r}; local ones are {known}; others are lm-eval's own")
        wanted.append(name if config is None else ConfigurableTask(config=config))
    try:
        return manager.load(wanted)
    except Exception as error:  # no network, no such data set, damaged files
        first = (str(error).splitlines() or [""])[0]
        where = "no --data-dir was given" if data_dir is None else f"{data_dir}/text/zeroshot"
        raise TaskError(
            f"the tasks {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {first}); "
            f"local files: {where}, and lm-eval could not download them"
        ) from error
