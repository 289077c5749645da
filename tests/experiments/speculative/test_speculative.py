"""The command itself, on tiny models: what it writes, and what it resumes."""

import dataclasses
import json

import jax
import matplotlib.image
import pytest
from command import BASE, CFG, call

from experiments.common import records
from experiments.speculative import benchmarks
from experiments.speculative.benchmarks import Conversation
from llm_jax import registry
from llm_jax.files import locked
from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_params, write_safetensors
from subspec_jax import engine, sources
from subspec_jax.methods import METHOD_NAMES


@pytest.fixture(scope="module")
def everything(run, models, tmp_path_factory):
    """All methods, checked against plain decoding."""
    others = " ".join(name for name in METHOD_NAMES if name != "subspec")
    return run(
        f"--compare {others} --draft-checkpoint {models['small']} --check-lossless",
        tmp_path_factory.mktemp("everything"),
    )


def test_texts_are_continued_without_a_template(run, models, tmp_path):
    found = run("--benchmark texts --method vanilla --compare --max-length 320", tmp_path)
    (record,) = found.records
    (sample,) = benchmarks.load_conversations("texts", samples=1)
    ids = open_checkpoint(models["target"]).tokenizer().encode(sample.turns[0])
    assert (record["sample"], record["prompt_tokens"]) == (sample.id, len(ids))


# --- Outputs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_outputs_exist_and_can_be_read(everything):
    assert sorted(p.name for p in everything.folder.iterdir()) == [
        "acceptance_by_depth.png",
        "accepted_length.png",
        "records.jsonl",
        "run.json",
        "time_per_round.png",
    ]
    for path in everything.folder.glob("*.png"):
        height, width, _ = matplotlib.image.imread(path).shape
        assert min(height, width) > 200
        assert str(path) in everything.out.replace("\n", "")


@pytest.mark.slow
def test_the_table_names_every_method_and_is_not_cut(everything):
    table = everything.out[everything.out.index("method ") :]
    rows = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert set(METHOD_NAMES) <= set(rows)
    assert "…" not in everything.out
    assert "Plan for subspec within 16.00 MB" in everything.out
    assert "1 of 3 layers resident, 2 streamed" in everything.out


@pytest.mark.slow
def test_records_are_in_order_and_complete(everything):
    assert [r["method"] for r in everything.records] == ["vanilla", "subspec", *METHOD_NAMES[2:]]
    for r in everything.records:
        assert (r["benchmark"], r["sample"], r["turn"]) == ("builtin", "writing-1", 0)
        assert len(r["token_ids"]) <= 8 and not r["replayed"]
        rounds = r["rounds"]
        assert len({len(column) for column in rounds.values()}) == 1
        assert sum(rounds["emitted"]) == len(r["token_ids"]) - 1  # the first is the prefill's
        paths, gains = rounds["path"], rounds["gains"]
        assert [len(path) for path in paths] == rounds["accepted"]
        assert all(path == sorted(path) and 0 not in path for path in paths)
        if r["method"] != "subspec-post":  # whose steps may hold parents and children
            assert all(gain < 1e-5 for steps in gains for gain in steps), r["method"]
        numbers = [c for name, c in rounds.items() if name not in ("path", "gains")]
        assert all(n >= 0 for column in numbers for n in column)
        assert max(rounds["depth"]) <= (11 if r["method"] == "subspec-post" else 3)
        assert r["peak_bytes"] > 0
    layer = CFG.layer_matrix_elements * 4
    streamed = everything.by_method["subspec"]["rounds"]["streamed_bytes"]
    assert set(streamed) == {2 * layer}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in METHOD_NAMES if n not in ("vanilla", "subspec-lossy")])
def test_every_lossless_method_decodes_the_plain_text(everything, name):
    found = everything.by_method[name]
    assert found["lossless"]["identical"] is True
    assert found["token_ids"] == everything.by_method["vanilla"]["token_ids"]
    assert found["text"] == everything.by_method["vanilla"]["text"]


@pytest.mark.slow
def test_the_run_file_says_what_was_run(everything):
    meta = json.loads((everything.folder / "run.json").read_text())
    assert meta["arguments"]["depth"] == 3 and meta["arguments"]["check_lossless"] is True
    assert set(meta["plans"]) == set(METHOD_NAMES) == {s["method"] for s in meta["summaries"]}
    assert meta["memory_limit"] == 2**24 and meta["pool"] is None
    assert meta["link_bytes_per_s"] > 0 and meta["memory_bytes_per_s"] > 0
    assert "draft model" in meta["plans"]["classic"]["device"]
    by_name = {s["method"]: s for s in meta["summaries"]}
    assert by_name["subspec"]["lossless"] == "1/1 identical"
    assert by_name["vanilla"]["tau"] == 1.0


@pytest.mark.slow
def test_the_answer_is_streamed_unless_told_otherwise(run, everything, tmp_path):
    text = everything.by_method["subspec"]["text"]
    shown = everything.out[everything.out.index("Keep it under 200 words.") :]
    assert text.strip()[:3] in shown
    silent = run("--no-show --method vanilla --compare", tmp_path)
    assert "Keep it under" not in silent.out and silent.records[0]["text"] == text


@pytest.mark.slow
def test_a_gguf_file_is_the_same_model(run, models, everything, tmp_path):
    found = run("--method vanilla --compare", tmp_path, models["gguf"])
    assert found.records[0]["token_ids"] == everything.by_method["vanilla"]["token_ids"]


# --- Resuming ----------------------------------------------------------------------------------

PAIR = "--compare vanilla"


@pytest.fixture(scope="module")
def pair(run, tmp_path_factory):
    """Two methods on two samples."""
    return run(f"{PAIR} --samples 2", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def appended(monkeypatch):
    """The records that are written from here on."""
    seen, append = [], records.append
    spy = lambda path, record: (append(path, record), seen.append(record))
    monkeypatch.setattr(records, "append", spy)
    return seen


def turns(records) -> list[tuple]:
    return [(r["method"], r["sample"]) for r in records]


def test_only_what_is_missing_is_decoded(run, pair, appended, tmp_path):
    lines = (pair.folder / "records.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4
    kept = [lines[0], lines[2], lines[3][:50]]  # the last one was cut by a kill
    (tmp_path / "records.jsonl").write_text("".join(kept))
    again = run(f"{PAIR} --samples 2", tmp_path)
    missing = [r for i, r in enumerate(pair.records) if i not in (0, 2)]
    assert turns(appended) == turns(missing)
    assert [r["token_ids"] for r in appended] == [r["token_ids"] for r in missing]
    assert sorted(turns(again.records)) == sorted(turns(pair.records))
    assert "subspec: 1 turns were done before" in again.out


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_was_killed_goes_on_where_it_was(run, pair, models, tmp_path, error):
    flags = f"{PAIR} --samples 2"
    append, seen = records.append, []

    def die(path, record):
        if len(seen) == 3:
            raise error("killed")
        seen.append(record)
        append(path, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "append", die)
        command = f"{BASE} --checkpoint {models['target']} --output {tmp_path} {flags}"
        killed = call(command)
        code, words = {
            KeyboardInterrupt: (130, "the same --output resumes"),
            RuntimeError: (1, "RuntimeError: killed. This is a fault of the program"),
        }[error]
        assert killed.code == code and words in killed.err
    assert turns(records.read(tmp_path / "records.jsonl")) == turns(pair.records)[:3]
    resumed = run(flags, tmp_path)
    assert turns(resumed.records) == turns(pair.records)
    same = lambda records: [(r["token_ids"], r["text"]) for r in records]
    assert same(resumed.records) == same(pair.records)
    assert resumed.records[:3] == json.loads(json.dumps(seen))


def test_other_settings_are_decoded_anew_and_fewer_methods_are_not(run, pair, appended):
    run("--method vanilla --compare --samples 2 --no-show", pair.folder)
    assert not appended
    run("--method vanilla --compare --seed 5", pair.folder)
    assert turns(appended) == [("vanilla", "writing-1")]


def test_another_model_at_the_same_path_is_decoded_anew(run, appended, tmp_path):
    """Only weights in the middle of the file differ: sizes, names and the path are the same."""
    model = write_safetensors(tmp_path / "model", tiny_params(CFG), CFG)
    first = run("--method vanilla --compare", tmp_path / "out", model)
    params = tiny_params(CFG)
    changed = dataclasses.replace(params.layers[1], mlp=tiny_params(CFG, 7).layers[1].mlp)
    layers = (params.layers[0], changed, *params.layers[2:])
    write_safetensors(model, dataclasses.replace(params, layers=layers), CFG)
    again = run("--method vanilla --compare", tmp_path / "out", model)
    assert len(appended) == 2 and "done before" not in again.out
    assert again.records[0]["settings"] != again.records[1]["settings"]
    assert again.records[0]["token_ids"] != again.records[1]["token_ids"]
    assert len(json.loads((tmp_path / "out" / "run.json").read_text())["summaries"]) == 1
    same = run("--method vanilla --compare", tmp_path / "out", model)
    assert len(appended) == 2 and "vanilla: 1 turns were done before" in same.out
    assert first.records[0] == again.records[0]


def test_another_question_of_the_same_name_is_decoded_anew(run, appended, monkeypatch, tmp_path):
    ask = lambda *turns: lambda *_: [Conversation("a", "writing", turns)]
    monkeypatch.setattr(benchmarks, "load_conversations", ask("One.", "Two."))
    run("--method vanilla --compare", tmp_path)
    monkeypatch.setattr(benchmarks, "load_conversations", ask("One.", "Three."))
    again = run("--method vanilla --compare", tmp_path)
    assert turns(appended) == [("vanilla", "a")] * 3 and appended[1]["turn"] == 1
    assert appended[2]["turn"] == 1 and appended[2]["question"] != appended[1]["question"]
    (summary,) = json.loads((again.folder / "run.json").read_text())["summaries"]
    assert summary["turns"] == 2  # the newest record of each


def test_two_runs_do_not_share_a_folder(models, tmp_path):
    with locked(tmp_path):
        found = call(f"{BASE} --checkpoint {models['target']} --output {tmp_path}")
    assert found.code == 2 and f"another process writes to {tmp_path}; wait" in found.err


# --- Ways to run -------------------------------------------------------------------------------


@pytest.mark.slow
def test_sampling_is_lossless_too(run, tmp_path):
    found = run("--temperature 0.8 --check-lossless --compare chain ngram vanilla", tmp_path)
    assert [r["method"] for r in found.records] == ["vanilla", "subspec", "chain", "ngram"]
    assert all(r["lossless"]["identical"] for r in found.records[1:])
    # Greedy decoding in the same folder is compared with its own plain text, not with that one.
    greedy = run("--method ngram --compare vanilla --check-lossless", tmp_path).records[4:]
    assert [r["method"] for r in greedy] == ["vanilla", "ngram"]
    assert greedy[0]["token_ids"] != found.records[0]["token_ids"]
    assert greedy[1]["lossless"]["identical"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--stop-gain auto", "--post-speculation 2", "--depth 0", "--lookup 4"]
)
def test_variants_are_lossless(run, everything, tmp_path, flags):
    found = run(f"{flags} --compare --no-show", tmp_path)
    assert [r["method"] for r in found.records] == ["subspec"]
    assert found.records[0]["token_ids"] == everything.by_method["vanilla"]["token_ids"]


@pytest.mark.slow
def test_where_memory_runs_out_a_layer_less_is_tried(
    run, models, everything, tmp_path, monkeypatch
):
    use, failures = engine.Engine.use, []

    def short(self, method):
        if len(failures) < 2:
            failures.append(self.plans[method.name].resident)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
        return use(self, method)

    monkeypatch.setattr(engine.Engine, "use", short)
    flags = BASE.replace("--resident 1", "").replace("16MB", "1GB") + " --predict yes --compare"
    flags += f" --checkpoint {models['target']}"
    found = call(f"{flags} --no-show --output {tmp_path / 'out'}")
    assert found.code == 0 and failures == [3, 2]
    assert "3 resident layers left too little memory" in found.out and "trying 1" in found.out
    meta = json.loads((tmp_path / "out" / "run.json").read_text())
    assert meta["plans"]["subspec"]["resident"] == 1
    assert [s["passes"] > 0 for s in meta["summaries"]] == [True]
    (record,) = records.read(tmp_path / "out" / "records.jsonl")
    assert record["token_ids"] == everything.by_method["vanilla"]["token_ids"]
    failures.clear()
    refused = call(f"{BASE} --compare --checkpoint {models['target']} --output {tmp_path / 'no'}")
    assert refused.code == 2 and "ran out of memory" in refused.err and failures == [1]


@pytest.mark.slow
def test_a_tree_is_chosen_from_the_first_rounds(run, everything, tmp_path):
    """Only the shape is chosen: the text is the same. Methods that draft from text have none."""
    found = run("--depth auto --width auto --compare ngram vanilla --no-show", tmp_path)
    for r in found.records:
        assert r["token_ids"] == everything.by_method["vanilla"]["token_ids"]
    tree = found.by_method["subspec"]["tree"]
    assert 1 <= tree["depth"] <= 8 and 1 <= tree["width"] <= 2  # the largest on a CPU
    assert f"subspec: depth {tree['depth']}, width {tree['width']}, " in found.out
    assert "tokens/s predicted" in found.out and "ngram: depth" not in found.out
    assert found.by_method["ngram"]["tree"] == {"depth": 8, "width": 2}
    fixed = run("--depth 3 --width auto --compare --no-show", tmp_path / "width")
    assert fixed.records[0]["tree"]["depth"] == 3


@pytest.mark.slow
def test_random_weights_are_timed_with_the_published_acceptance(run, monkeypatch, tmp_path):
    known = registry.RegisteredModel("tiny-random", "nobody/tiny", CFG)
    monkeypatch.setitem(registry.MODELS, "tiny-random", known)
    monkeypatch.setattr(sources, "find_checkpoint", lambda *_: pytest.fail("nothing is fetched"))
    flags = "--model tiny-random --weights random --samples 2"
    published = run(f"{flags} --replay-acceptance published", tmp_path / "one", None)
    assert {r["method"] for r in published.records} == {"subspec", "chain", "vanilla"}
    assert all(r["replayed"] for r in published.records)
    assert "subspec*" in published.out and "the text is meaningless" in published.out
    accepted = published.by_method["subspec"]["rounds"]["accepted"]
    assert max(accepted) == 3
    # And with what that run recorded.
    trace = tmp_path / "one" / "records.jsonl"
    again = run(f"{flags} --replay-acceptance {trace} --compare", tmp_path / "two", None)
    first = next(r for r in published.records if r["method"] == "subspec")
    assert again.records[0]["rounds"]["accepted"] == first["rounds"]["accepted"]
