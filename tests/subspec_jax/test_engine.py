"""The front door on a tiny checkpoint: what it plans, what it says, and that it is exact."""

import contextlib
import dataclasses
import subprocess
import sys

import jax
import pytest

import subspec_jax
from llm_jax import CheckpointError
from llm_jax.checkpoint import Checkpoint
from llm_jax.formats import open_checkpoint
from llm_jax.generation import generate
from llm_jax.progress import Reporter
from llm_jax.sample import Sampler
from llm_jax.testing import tiny_config, tiny_params, write_safetensors
from subspec_jax import memory
from subspec_jax.decoder import LengthError
from subspec_jax.draft_model import INT8
from subspec_jax.methods import METHOD_NAMES, MethodError
from subspec_jax.plan import PlanError
from subspec_jax.prefix_cache import Text

CFG = tiny_config("qwen2", layers=3)
TREE = subspec_jax.TreeSpec("beam", depth=3, width=2)
SMALL = dict(
    tree=TREE, draft=subspec_jax.Draft(4, 16), max_length=96, chunk=32, resident=1, dtype="float32"
)
NEW = 12


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_safetensors(tmp_path_factory.mktemp("model"), tiny_params(CFG), CFG)


@pytest.fixture(scope="module")
def checkpoint(folder):
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def prompt(checkpoint):
    return checkpoint.tokenizer().chat([{"role": "user", "content": "Name a thimble."}])


@pytest.fixture(scope="module")
def plain(checkpoint, prompt):
    """What the model itself writes: a loop of `llm_jax` over weights that are all on the device."""
    params = checkpoint.load(CFG)
    sampled = Sampler(0.8, top_k=40)
    return {s: generate(params, prompt, CFG, NEW, s, seed=3) for s in (Sampler(), sampled)}


@pytest.fixture(scope="module")
def model(folder):
    with subspec_jax.open(folder, "16MB", also=("vanilla", "ngram"), **SMALL) as model:
        yield model


class Heard(Reporter):
    """Remembers what it was told."""

    def __init__(self):
        self.lines, self.bars, self.states = [], [], []

    def say(self, message, warning=False):
        self.lines.append(message)

    @contextlib.contextmanager
    def bar(self, title, total):
        yield lambda done: self.bars.append((title, done, total))

    @contextlib.contextmanager
    def status(self, title):
        self.states.append(title)
        yield


def test_the_plan_is_there_before_anything_is_loaded(folder):
    before = len(jax.live_arrays())
    model = subspec_jax.open(folder, "16MB", **SMALL)
    text = str(model.plan)
    assert model.target is None and len(jax.live_arrays()) == before
    assert "Plan within 16.00 MB" in text and "1 of 3 layers resident, 2 streamed" in text
    rows = [line.split() for line in text.splitlines()[2:-1]]
    assert {"substitutes", "embedding", "streamed"} <= {row[0] for row in rows}
    assert model.plan.total == sum(model.plan.device.values())


def test_a_limit_that_is_too_low_is_named_whatever_else_was_tried(folder):
    """4-bit substitutes take less room, and this model cannot have them in groups of 64."""
    with pytest.raises(PlanError, match=r"too little for this model.*the least that works is"):
        subspec_jax.open(folder, "100KB", dtype="float32")


def test_every_method_of_one_engine_writes_the_models_own_tokens(model, plain, prompt):
    for name in ("subspec", "vanilla", "ngram", "subspec"):
        model.use(name)
        assert model.method.name == name
        assert model.generate(prompt, NEW, eos=()) == plain[Sampler()]


@pytest.mark.slow
def test_sampling_depends_on_seed_and_position_alone(folder, plain, prompt):
    sampler = Sampler(0.8, top_k=40)
    with subspec_jax.open(folder, "16MB", sampler=sampler, **SMALL) as model:
        assert model.generate(prompt, NEW, seed=3, eos=()) == plain[sampler]


def test_chat_stream_and_generate_are_the_same_text(model, plain, prompt):
    model.use("subspec")
    ids = [t for t in plain[Sampler()] if t not in model.eos]
    want = model.tokenizer.decode(ids)
    message = "Name a thimble."
    assert "".join(model.chat(message, NEW, eos=())) == want
    turns = [{"role": "user", "content": message}]
    assert "".join(model.chat(turns, NEW, eos=())) == want
    assert "".join(model.stream(prompt, NEW, eos=())) == want
    rounds = list(model.rounds(prompt, NEW, eos=()))
    assert [t for r in rounds for t in r.tokens] == plain[Sampler()]
    assert sum(r.accepted for r in rounds) > 0  # it did speculate


def test_text_is_continued_as_it_stands(model):
    text = "A thimble"
    whole = model.generate(model.tokenizer.encode(text), 5, eos=())
    assert "".join(model.stream(text, 5, eos=())) == model.tokenizer.decode(whole)


def test_the_end_of_a_turn_ends_the_text(model, plain, prompt):
    third = plain[Sampler()][2]
    found = model.generate(prompt, NEW, eos=(third,))
    assert found == plain[Sampler()][: plain[Sampler()].index(third) + 1]


def test_stats_count_what_was_decoded(folder, prompt):
    with subspec_jax.open(folder, "16MB", **SMALL) as model:
        assert model.stats["tokens"] == 0 and model.stats["tau"] is None
        tokens = model.generate(prompt, 8, eos=())
        stats = model.stats
        assert stats["tokens"] == len(tokens) == 8 and stats["memory_limit"] == 16 * 2**20
        assert stats["tau"] == 8 / stats["passes"] and stats["tokens_per_s"] > 0
        assert stats["device"]["platform"] == "cpu" and stats["link_bytes_per_s"] > 0


@pytest.mark.slow
def test_a_round_is_predicted_from_one_layer_of_each_kind(folder, prompt):
    with subspec_jax.open(folder, "16MB", **SMALL) as model:
        model.generate(prompt, 2)
        parts = model.predict()
        assert model.target is None  # put away while layers were timed
        assert parts["round"] > 3 * parts["block"] > 0 and parts["draft"] > 0
        assert model.predict() == parts  # measured once
        assert len(model.generate(prompt, 4, eos=())) == 4


def test_a_second_engine_of_the_process_works(model, folder, plain, prompt):
    with subspec_jax.open(folder, "16MB", **SMALL) as second:
        assert second.generate(prompt, NEW, eos=()) == plain[Sampler()]
    model.use("subspec")
    assert model.generate(prompt, NEW, eos=()) == plain[Sampler()]


def test_a_closed_engine_holds_nothing_and_says_so(folder, prompt):
    with subspec_jax.open(folder, "16MB", **SMALL) as model:
        model.generate(prompt, 2)
    assert model.target is None and model.decoder is None
    with pytest.raises(subspec_jax.SubspecError, match="this engine is closed"):
        model.generate(prompt, 2)


def test_an_open_checkpoint_is_a_model_too(checkpoint, prompt, plain):
    assert isinstance(checkpoint, Checkpoint)
    with subspec_jax.open(checkpoint, 16 * 2**20, **SMALL) as model:
        assert model.generate(prompt, NEW, eos=()) == plain[Sampler()]


def test_long_work_is_reported(folder, prompt):
    heard = Heard()
    with subspec_jax.open(folder, "auto", reporter=heard, **SMALL | {"resident": None}) as model:
        assert any("The whole model fits here. A limit of" in line for line in heard.lines)
        assert model.plan.total <= model.limit < 2**30
        model.warm_up(prompt, 4)
    assert [(d, t) for title, d, t in heard.bars if title == "Loading layers"] == [
        (i + 1, 3) for i in range(3)
    ]
    assert any(title == "Quantizing for subspec" for title, *_ in heard.bars)
    assert "Compiling for subspec" in heard.states


def test_where_memory_is_tight_the_conversation_is_shorter(tmp_path):
    long = dataclasses.replace(CFG, max_length=4096)
    folder = write_safetensors(tmp_path, tiny_params(long), long)
    options = SMALL | {"max_length": None, "resident": 0}
    needed = {}
    for length in (2048, 1024, 512):
        plan = subspec_jax.open(folder, "1GB", **options | {"max_length": length}).plan
        needed[length] = plan.total
    assert subspec_jax.open(folder, "1GB", **options).options.max_length == 2048
    assert needed[2048] > needed[1024] > needed[512]
    between = (needed[1024] + needed[2048]) // 2
    assert subspec_jax.open(folder, between, **options).options.max_length == 1024
    with pytest.raises(PlanError, match="the least that works is"):
        subspec_jax.open(folder, needed[512] // 2, **options)


@pytest.mark.parametrize("name", [n for n in METHOD_NAMES if n != "classic"])
def test_every_method_has_a_plan(folder, name):
    model = subspec_jax.open(folder, "16MB", method=name, **SMALL)
    assert model.plan.total <= 16 * 2**20 and model.method.lossless == (name != "subspec-lossy")


@pytest.mark.slow
def test_the_classic_method_loads_its_small_model(folder, tmp_path, prompt, plain):
    small = tiny_config("llama", layers=1, d_model=32, d_ff=64, vocab=CFG.vocab)
    draft = write_safetensors(tmp_path / "draft", tiny_params(small), small)
    with subspec_jax.open(folder, "16MB", method="classic", draft_model=draft, **SMALL) as model:
        assert model.generate(prompt, NEW, eos=()) == plain[Sampler()]


@pytest.mark.slow
def test_random_weights_need_no_checkpoint(monkeypatch):
    from types import SimpleNamespace

    from subspec_jax import sources

    monkeypatch.setattr(sources, "find_model", lambda name: SimpleNamespace(config=CFG))
    with subspec_jax.open("any", "16MB", weights="random", **SMALL) as model:
        assert len(model.generate([1, 2, 3], 4)) == 4


@pytest.mark.parametrize(
    "what, error, words",
    [
        (dict(model="smollm2-135n"), CheckpointError, "did you mean smollm2-135m"),
        (dict(model="/absent/model"), CheckpointError, "/absent/model does not exist"),
        (dict(memory="plenty"), memory.AmountError, "write for example 8GB"),
        (dict(memory="1KB"), PlanError, "the least that works is"),
        (dict(max_length=10**6), LengthError, "positions this model was made for"),
        (dict(method="fastest"), subspec_jax.SubspecError, "'fastest' is not one of subspec"),
        (dict(method="classic"), subspec_jax.SubspecError, "drafts with a small model"),
        (dict(resident=7), PlanError, "the model has 3"),
        (dict(lenght=5), TypeError, "lenght"),
    ],
)
def test_what_is_wrong_has_a_name(folder, what, error, words):
    given = {"model": folder, "memory": "16MB"} | SMALL | what
    with pytest.raises(error, match=words):
        subspec_jax.open(**given)


def test_importing_the_package_needs_jax_and_numpy_and_loads_nothing_else():
    program = """
import sys
import subspec_jax
loaded = [m for m in sys.modules if m.startswith(("subspec_jax.", "llm_jax.", "pallas_kernels"))]
assert not loaded, loaded
assert not {"transformers", "rich", "tyro", "gguf"} & set(sys.modules)
for name in subspec_jax.__all__:
    value = getattr(subspec_jax, name)
    assert type(value).__name__ != "module", name
assert set(subspec_jax.__all__) <= set(dir(subspec_jax))
print(subspec_jax.__version__)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = subspec_jax.opne


@pytest.mark.slow
def test_several_texts_together_are_what_they_are_alone(folder, prompt, plain, checkpoint):
    """Through the front door: one text, and several with the caches of all of them planned for."""
    prompts = [prompt, prompt[:5], prompt[3:]]
    params = checkpoint.load(CFG)
    want = [generate(params, p, CFG, NEW) for p in prompts]
    with subspec_jax.open(folder, "full", **SMALL) as one:
        caches = one.plan.device["KV cache"]
    with subspec_jax.open(folder, "full", texts=3, **SMALL) as engine:
        assert engine.plan.device["KV cache"] == 3 * caches
        assert engine.generate(prompt, NEW, eos=()) == want[0] == plain[Sampler()]
        assert engine.batch().generate([Text(p, NEW) for p in prompts]) == want
        assert engine.generate(prompt, NEW, eos=()) == want[0]
        assert engine.stats["tokens"] == 2 * NEW
    with (
        subspec_jax.open(folder, "full", method="subspec-post", texts=2, **SMALL) as engine,
        pytest.raises(MethodError, match="drafts during verification"),
    ):
        engine.batch()
    own = dict(method="subspec-own-cache", also=("classic",), draft_model=folder)
    with (
        subspec_jax.open(folder, "full", **own, **SMALL) as one,
        subspec_jax.open(folder, "full", texts=3, **own, **SMALL) as three,
    ):
        for name in ("subspec-own-cache", "classic"):
            few, many = (e.plans[name].device["draft KV cache"] for e in (one, three))
            assert many == 3 * few
        assert three.batch().generate([Text(p, NEW) for p in prompts]) == want
    for ladder in ((1, 2), (3, 1, 2), (0, 3)):
        with pytest.raises(PlanError, match="ladder"):
            subspec_jax.open(folder, "full", texts=3, ladder=ladder, **SMALL)


def test_a_cpu_drafts_with_int8_and_with_4_bits_where_that_does_not_fit(tmp_path):
    cfg = tiny_config("qwen2", layers=3, d_ff=128)  # groups of 64 fit
    params, prompt = tiny_params(cfg), [3, 1, 4]
    folder = write_safetensors(tmp_path, params, cfg)
    options = {k: v for k, v in SMALL.items() if k != "draft"} | dict(table_on_host=False)
    least = {}
    for draft in (None, subspec_jax.Draft()):
        with subspec_jax.open(folder, "full", draft=draft, **options) as engine:
            least[engine.method.draft] = engine.plan.total
            if draft is None:
                assert engine.generate(prompt, NEW) == generate(params, prompt, cfg, NEW)
    assert least[subspec_jax.Draft()] < least[INT8]
    with subspec_jax.open(folder, int(sum(least.values()) / 2 / 0.98), **options) as engine:
        assert engine.method.draft == subspec_jax.Draft()
    with pytest.raises(PlanError, match="residuals need substitutes in groups"):
        subspec_jax.open(folder, "full", stream="residual", draft=INT8, **options)
