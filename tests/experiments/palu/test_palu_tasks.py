"""lm-eval around a model of ours, against log-probabilities summed by hand."""

import gzip
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.palu import __main__ as palu
from llm_jax.attention import caches_for, causal_step
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.model import forward
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

pytest.importorskip("lm_eval", reason="zero-shot tasks need pip install -e '.[eval]'")
tasks = pytest.importorskip("experiments.palu.tasks", exc_type=ImportError)

CFG = tiny_config("qwen2", kv_heads=2)
PARAMS = tiny_params(CFG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_safetensors(path, PARAMS, CFG)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_checkpoint(folder).tokenizer()


def by_hand(tokens):
    """log p [n - 1, V] of one unpadded pass, in float64."""
    n = len(tokens)
    caches, step = caches_for(PARAMS, CFG, 1, n), causal_step(0, n, n)
    logits = forward(PARAMS, jnp.asarray(tokens, jnp.int32)[None], caches, step, CFG)[0]
    logits = np.asarray(logits, np.float64)[0, :-1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def asked(*args):
    return [types.SimpleNamespace(args=a) for a in args]


@pytest.mark.slow
def test_likelihoods(tokenizer):
    model = tasks.CachedLM(PARAMS, CFG, tokenizer, batch=2)
    pairs = [("one two", " three"), ("a much longer beginning of a text ", "b"), ("", "end")]
    found = model.loglikelihood(asked(*pairs))
    for (context, ending), (score, greedy) in zip(pairs, found, strict=True):
        kept = context.rstrip()
        start = tokenizer.encode(kept) if kept else [min(tokenizer.eos)]
        whole = tokenizer.encode(context + ending)
        tail = whole[len(start) :] if kept else whole
        logp = by_hand(start + tail)[len(start) - 1 :]
        np.testing.assert_allclose(score, logp[np.arange(len(tail)), tail].sum(), rtol=1e-4)
        assert greedy == (logp.argmax(-1) == tail).all()
    start = tokenizer.encode("one two")
    follow = generate(PARAMS, start, CFG, 3)
    assert model._scored([(start, follow), (start, follow[:2] + [follow[2] ^ 1])])[0][1]
    assert not model._scored([(start, follow[:2] + [follow[2] ^ 1])])[0][1]


@pytest.mark.slow
def test_rolling_scores_every_token_once(tokenizer):
    model = tasks.CachedLM(PARAMS, CFG, tokenizer)
    text = "some words to be scored"
    tokens = [min(tokenizer.eos), *tokenizer.encode(text)]
    want = by_hand(tokens)[np.arange(len(tokens) - 1), tokens[1:]].sum()
    np.testing.assert_allclose(model.loglikelihood_rolling(asked((text,)))[0], want, rtol=1e-4)


def test_generation_stops(tokenizer):
    model = tasks.CachedLM(PARAMS, CFG, tokenizer)
    whole = model.generate_until(asked(("one two", dict(until=[], max_gen_toks=12))))[0]
    tokens = generate(PARAMS, tokenizer.encode("one two"), CFG, 12, eos=tokenizer.eos)
    assert whole == tokenizer.decode([t for t in tokens if t not in tokenizer.eos])
    stop = whole[len(whole) // 2]
    cut = model.generate_until(asked(("one two", dict(until=stop, max_gen_toks=12))))[0]
    assert cut == whole[: whole.index(stop)]


ROWS = {
    "copa.jsonl": [
        dict(query="the sky is", choices=["blue", "a loud fish"], gold=1),
        dict(query="we went", choices=["home again", "yes"], gold=0),
        dict(query="it rained so", choices=["we left", "q"], gold=0),
    ],
    "winograd_wsc.jsonl": [
        dict(context_options=["the cat because", "a dog because"], continuation="ran", gold=1),
        dict(context_options=["he saw", "she saw the"], continuation="it", gold=0),
    ],
    "lambada_openai.jsonl.gz": [dict(context="one two", continuation="three")],
}


@pytest.fixture
def data(tmp_path):
    where = tmp_path / "data/text/zeroshot"
    where.mkdir(parents=True)
    for name, rows in ROWS.items():
        text = "\n".join(map(json.dumps, rows))
        (where / name).write_bytes(
            gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        )
    return tmp_path / "data"


def likelihood(tokenizer, context, ending):
    start, whole = tokenizer.encode(context), tokenizer.encode(context + ending)
    return by_hand(whole)[np.arange(len(start) - 1, len(whole) - 1), whole[len(start) :]].sum()


@pytest.mark.slow
def test_tasks_score_what_they_say(folder, tokenizer, data, tmp_path, capsys):
    args = palu.Palu(
        checkpoint=folder, output=tmp_path / "out", dtype="float32", tokens=64, context=32,
        preset="none", data_dir=data, tasks=("copa", "wsc273", "lambada_openai"),
    )  # fmt: skip
    assert palu.main(args, Console(width=150)) == 0
    shown = capsys.readouterr().out
    rows = [json.loads(l) for l in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    found = {r["sample"]: r["result"] for r in rows}
    score = lambda a, b: likelihood(tokenizer, a, b)
    copa = [
        int(np.argmax([score(r["query"], " " + c) for c in r["choices"]]) == r["gold"])
        for r in ROWS["copa.jsonl"]
    ]
    wsc = [
        int(
            np.argmax([score(c, " " + r["continuation"]) for c in r["context_options"]])
            == r["gold"]
        )
        for r in ROWS["winograd_wsc.jsonl"]
    ]
    assert found["task-copa-all"]["acc"] == pytest.approx(np.mean(copa))
    assert found["task-copa-all"]["n"] == 3
    assert found["task-wsc273-all"]["acc"] == pytest.approx(np.mean(wsc))
    nll = np.log(found["task-lambada_openai-all"]["perplexity"])  # from a bfloat16 cache
    assert nll == pytest.approx(-score("one two", " three"), rel=1e-3)
    assert "copa" in shown and "acc" in shown


@pytest.mark.slow
def test_an_unknown_task_is_named(data):
    with pytest.raises(tasks.TaskError, match="no task 'nonsense'; local ones are arc_easy"):
        tasks.load_tasks(["nonsense"], data)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("copa", dict(query=3, choices=["a"], gold=0)),
        ("copa", dict(query="q", choices=[], gold=0)),
        ("copa", dict(query="q", choices=["a", 2], gold=0)),
        ("copa", dict(query="q", choices=["a"], gold=1)),
        ("copa", dict(query="q", choices=["a"], gold="0")),
        ("copa", dict(query="q", choices=["a"], gold=-1)),
        ("wsc273", dict(context_options="ab", continuation="c", gold=0)),
        ("wsc273", dict(context_options=["a", "b"], gold=0)),
        ("lambada_openai", dict(context="a")),
        ("copa", [1]),
        ("copa", None),
    ],
)
def test_damaged_documents_are_named(data, name, row):
    path = data / "text/zeroshot" / tasks.TASK_FILES[name][0]
    path.write_text(json.dumps(ROWS[path.name][0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(tasks.UserError, match=r"line 2: "):
        tasks.load_tasks([name], data)
    path.write_text("")
    with pytest.raises(tasks.TaskError, match="is empty"):
        tasks.load_tasks([name], data)
