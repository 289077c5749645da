"""The command itself, on tiny models: what it writes, what it resumes, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.image
import pytest

from experiments import convert
from experiments.common import records
from experiments.speculative import __main__ as speculative
from experiments.speculative import benchmarks, flags
from experiments.speculative import run as run_module
from llm_jax import registry
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors
from subspec_jax import engine, memory, sources
from subspec_jax.memory import parse_bytes
from subspec_jax.methods import METHOD_NAMES, VANILLA

CFG = tiny_config("qwen2", layers=3)
SMALL = tiny_config("llama", layers=1, d_model=32, d_ff=64)
BASE = (
    "--samples 1 --max-new-tokens 8 --depth 3 --width 2 --draft-group 16 --max-length 192"
    " --chunk 64 --resident 1 --memory-limit 16MB"
)


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu():
    """No card is asked for, no limit enforced, and XLA spends no time on speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "card_bytes", lambda: None)
        patch.setenv("COLUMNS", "80")  # of the terminal; what is piped is wider
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders and files by name: a target, drafts with its vocabulary and others, a broken one."""
    root = tmp_path_factory.mktemp("models")
    write = lambda name, cfg: write_safetensors(root / name, tiny_params(cfg), cfg)
    larger, cut = (dataclasses.replace(SMALL, vocab=n) for n in (320, 272))
    found = {
        "target": write("target", CFG),
        "small": write("small", SMALL),
        "larger": write("larger", larger),
        "cut": write("cut", cut),
        "gguf": write_gguf(root / "target.gguf", tiny_params(CFG), CFG),
        "truncated": write("truncated", CFG),
        "truncated-gguf": root / "truncated.gguf",
        "empty": root / "empty",
    }
    weights = found["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found["truncated-gguf"].write_bytes(found["gguf"].read_bytes()[:-1000])
    found["empty"].mkdir()
    return found


def call(flags: str, cli=speculative.cli) -> SimpleNamespace:
    """The command run in this process: its exit code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speculative", *shlex.split(flags)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli()
            except SystemExit as stopped:  # the flags themselves could not be read
                code = stopped.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def run(models):
    """f(flags, folder) -> the finished run, with records by method; the target is the tiny one."""

    def run(flags="", folder=None, checkpoint=models["target"]):
        source = f"--checkpoint {checkpoint}" if checkpoint else ""
        done = call(f"{BASE} {source} --output {folder} {flags}")
        assert (done.code, done.err) == (0, ""), done.err
        done.folder = folder
        done.records = records.read(folder / "records.jsonl")
        done.by_method = {r["method"]: r for r in done.records}
        return done

    return run


@pytest.fixture(scope="module")
def everything(run, models, tmp_path_factory):
    """All methods, checked against plain decoding."""
    others = " ".join(name for name in METHOD_NAMES if name != "subspec")
    return run(
        f"--compare {others} --draft-checkpoint {models['small']} --check-lossless",
        tmp_path_factory.mktemp("everything"),
    )


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

PAIR = "--compare chain vanilla"


@pytest.fixture(scope="module")
def pair(run, tmp_path_factory):
    """Three methods on two samples."""
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
    assert len(lines) == 6
    kept = [lines[0], lines[3], lines[4], lines[5][:50]]  # the last one was cut by a kill
    (tmp_path / "records.jsonl").write_text("".join(kept))
    again = run(f"{PAIR} --samples 2", tmp_path)
    missing = [r for i, r in enumerate(pair.records) if i not in (0, 3, 4)]
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
        if error is KeyboardInterrupt:
            killed = call(command)
            assert killed.code == 130 and "the same --output resumes" in killed.err
        else:
            with pytest.raises(RuntimeError, match="killed"):
                call(command)
    assert turns(records.read(tmp_path / "records.jsonl")) == turns(pair.records)[:3]
    resumed = run(flags, tmp_path)
    assert turns(resumed.records) == turns(pair.records)
    same = lambda records: [(r["token_ids"], r["text"]) for r in records]
    assert same(resumed.records) == same(pair.records)
    assert resumed.records[:3] == json.loads(json.dumps(seen))


def test_other_settings_are_decoded_anew_and_fewer_methods_are_not(run, pair, appended):
    run("--method chain --compare --samples 2 --no-show", pair.folder)
    assert not appended
    run("--method vanilla --compare --seed 5", pair.folder)
    assert turns(appended) == [("vanilla", "writing-1")]


def test_the_data_folder_counts_however_it_is_written(tmp_path, monkeypatch):
    hashes = []
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "./data", tmp_path / "data", "other"):
        args = flags.Speculative(data_dir=Path(folder))
        hashes.append(run_module.settings_hash(args, CFG, VANILLA, None))
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


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


@pytest.fixture(scope="module")
def residual(run, tmp_path_factory):
    """A run that converts the model in another process, and streams its residuals."""
    root = tmp_path_factory.mktemp("residual")
    flags = f"--stream residual --converted {root / 'model'} --check-lossless"
    found = run(f"{flags} --compare chain subspec-post vanilla ngram", root / "run")
    return SimpleNamespace(root=root, flags=flags, **vars(found))


@pytest.mark.slow
def test_residuals_stream_and_the_text_is_that_of_plain_layers(residual):
    """vanilla and ngram have no substitutes: their layers stream as they are."""
    plain = residual.by_method["vanilla"]
    for name in ("subspec", "chain", "subspec-post"):
        record = residual.by_method[name]
        assert record["lossless"]["identical"] and record["token_ids"] == plain["token_ids"]
        moved = record["rounds"]["streamed_bytes"][0]
        assert 0 < moved < 0.75 * plain["rounds"]["streamed_bytes"][0]
    assert residual.by_method["ngram"]["token_ids"] == plain["token_ids"]
    assert "Converting to" in residual.out and "residuals resident, 2 streamed" in residual.out
    meta = json.loads((residual.folder / "run.json").read_text())
    assert {"substitutes", "streaming ring"} <= set(meta["plans"]["subspec"]["device"])
    assert "substitutes" not in meta["plans"]["vanilla"]["device"]


@pytest.mark.slow
def test_a_converted_model_is_used_again(run, residual, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "subprocess", None)  # which would convert
    again = run(f"{residual.flags} --verify-weights --compare", tmp_path)
    tokens = residual.by_method["subspec"]["token_ids"]
    assert again.by_method["subspec"]["token_ids"] == tokens
    assert "Converting" not in again.out


@pytest.mark.slow
def test_random_residuals_are_timed_with_the_published_acceptance(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "find_model", lambda name: SimpleNamespace(config=CFG))
    flags = "--weights random --stream residual --replay-acceptance published --compare vanilla"
    found = run(f"{flags} --draft-head-bits 4 --predict yes", tmp_path, None)
    predicted = json.loads((tmp_path / "run.json").read_text())["predicted_s"]
    assert set(predicted) == {"subspec", "vanilla"}
    for name, parts in predicted.items():
        assert parts["round"] > 3 * parts["block"] > 0
        assert (parts["draft"] > 0) != (name == "vanilla")
        assert f"{name}: {1e3 * parts['round']:.1f} ms a round were predicted" in found.out
    assert found.by_method["subspec"]["replayed"]
    bytes_of = lambda name: found.by_method[name]["rounds"]["streamed_bytes"][0]
    assert 0 < bytes_of("subspec") < bytes_of("vanilla")


@pytest.mark.slow
def test_without_a_limit_one_is_emulated_that_every_method_can_keep(run, tmp_path):
    flags = "--memory-limit auto --resident None --check-lossless"
    found = run(f"{flags} --compare subspec-unshared-layers", tmp_path)
    assert "The whole model fits here. A limit of" in found.out
    meta = json.loads((tmp_path / "run.json").read_text())
    assert all(p["total"] <= meta["memory_limit"] for p in meta["plans"].values())
    assert meta["plans"]["subspec-unshared-layers"]["streamed_bytes"] > 0


# --- Errors of the user ------------------------------------------------------------------------

ERRORS = {
    # name -> flags ({target} stands for a folder), what the message must say
    "unknown model": ("--model qwen2.5-7c", "no model is named 'qwen2.5-7c'; did you mean"),
    "no such path": ("--checkpoint /absent/model", "/absent/model does not exist"),
    "no checkpoint": ("--checkpoint {empty}", "it holds nothing; expected config.json"),
    "truncated": ("--checkpoint {truncated}", "model.safetensors is truncated or corrupt"),
    "truncated file": ("--checkpoint {truncated-gguf}", "truncated"),
    "random of a file": ("--checkpoint {target} --weights random", "drop one of them"),
    "too little memory": ("{} --memory-limit 100KB", "the least that works is"),
    "no memory": ("{} --memory-limit 8", "'8' is not an amount of memory"),
    "nonsense memory": ("{} --memory-limit lots", "write for example 8GB"),
    "resident": ("{} --resident 7", "7 resident layers were asked for; the model has 3"),
    "ahead": ("{} --ahead 0", "at least one layer must be on its way"),
    "chunk": ("{} --chunk 0", "must be at least 1"),
    "tree of a replay": ("{} --depth auto --replay-acceptance x", "whatever the tree"),
    "tree sharpen": ("{} --sharpen 0", "sharpen is 0.0"),
    "tree depth": ("{} --depth -1", "tree depth is -1"),
    "tree width": ("{} --width 0", "tree width is 0"),
    "tree budget": ("{} --budget 4", "a node budget is for best-first trees"),
    "tree step": ("{} --tree best-first --budget 1", "budget 1 is less than one step"),
    "no tree": ("{} --depth 0 --compare best-first", "budget 0 is less than one step"),
    "below the tree": ("{} --post-speculation -1", "tree extra is -1"),
    "lookup": ("{} --lookup -1", "tree lookup is -1"),
    "lookup ahead": ("{} --lookup 4 --post-speculation 2", "set lookup or extra to 0"),
    "stop gain": ("{} --stop-gain abc", "--stop-gain is 'abc'; expected auto or a number"),
    "negative gain": ("{} --stop-gain -0.5", "--stop-gain is '-0.5'"),
    "n-gram": ("{} --ngram 0", "--ngram is 0"),
    "top-p": ("{} --top-p 2", "top_p is 2.0"),
    "temperature": ("{} --temperature -1", "temperature is -1.0"),
    "gate threshold": ("{} --gate-threshold 1.5", "the gate's threshold is 1.5"),
    "gate window": ("{} --gate-window 0", "the gate's window is 0"),
    "seed": ("{} --seed -1", "--seed is -1"),
    "samples": ("{} --samples 0", "must be at least 1"),
    "no tokens": ("{} --max-new-tokens 0", "must be at least 1"),
    "tokens": ("{} --max-new-tokens 193", "leaves no room for a prompt in --max-length 192"),
    "group": ("{} --draft-group 40", "q has 64 inputs, not a multiple of group 40"),
    "group of 12": ("{} --draft-group 12", "must be a multiple of 8"),
    "larger vocabulary": (
        "{} --compare classic --draft-checkpoint {larger}",
        "a vocabulary of 320 and the model one of 288",
    ),
    "other tokens": ("{} --compare classic --draft-checkpoint {cut}", "different tokens"),
    "no draft model": ("{} --compare classic", "name it with --draft-model"),
    "no draft": ("{} --draft-checkpoint /absent/draft", "/absent/draft does not exist"),
    "random draft": (
        "--model qwen2.5-7b --weights random --draft-checkpoint {small}",
        "--weights random takes --draft-model",
    ),
    "replay checked": ("{} --replay-acceptance published --check-lossless", "cannot be checked"),
    "replay text": ("{} --replay-acceptance published --method ngram", "drafts from the text"),
    "replay lookup": ("{} --replay-acceptance published --lookup 4", "--lookup drafts from the"),
    "no trace": ("{} --replay-acceptance /absent.jsonl", "/absent.jsonl is no acceptance trace"),
    "no published": (
        "{} --replay-acceptance published --compare best-first",
        "no published acceptance trace for the method best-first",
    ),
    "no benchmark": ("{} --benchmark mt-bench --data-dir {empty}", "no data for benchmark"),
    "no data": ("{} --benchmark mt-bench --data-dir /absent", "is not a directory"),
    "output": ("{} --output {gguf}", "cannot be made"),
    "residuals where": ("{} --stream residual", "needs --converted FOLDER"),
    "converted for nothing": ("{} --converted {empty}", "need --stream residual"),
    "verified for nothing": ("{} --verify-weights", "need --stream residual"),
    "wide residuals": (
        "{} --stream residual --converted x --dtype float32",
        "residuals are of 16-bit weights",
    ),
    "low-rank residuals": (
        "{} --stream residual --converted x --palu {empty}",
        "residuals are of plain layers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_gets_one_line_and_status_2(models, monkeypatch, tmp_path, name):
    def nowhere(spec):
        raise benchmarks._Unavailable("no network in this test")

    monkeypatch.setattr(benchmarks, "_hub", nowhere)
    monkeypatch.setattr(benchmarks, "_tfds", nowhere)
    monkeypatch.chdir(tmp_path)
    flags, message = ERRORS[name]
    flags = flags.replace("{}", "--checkpoint {target}")
    for key, path in models.items():
        flags = flags.replace(f"{{{key}}}", str(path))
    found = call(f"{BASE} {flags}")
    assert found.code == 2
    assert message in found.err
    assert found.err.startswith("error: ") and found.err.count("error:") == 1
    assert "Traceback" not in found.out + found.err
    details = ("truncated", "truncated file", "no benchmark")
    assert len(found.err.splitlines()) == 1 or name in details
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    "flags", ["--draft-bits 5", "--method nosuch", "--samples x", "--gate length"]
)
def test_flags_that_cannot_be_read_are_explained(models, flags):
    found = call(f"--checkpoint {models['target']} {flags}")
    assert found.code == 2
    assert flags.split()[0] in found.err and "Traceback" not in found.err


def test_the_least_memory_that_is_named_is_enough(run, models, tmp_path):
    small = f"{BASE} --checkpoint {models['target']} --memory-limit 100KB"
    least = call(small).err.split("the least that works is ")[1].split()[0]
    assert parse_bytes(least) > 100 * 2**10
    found = run(f"--memory-limit {least} --compare --no-show", tmp_path)
    assert [r["method"] for r in found.records] == ["subspec"]


def test_a_prompt_that_does_not_fit_is_skipped_with_a_word(run, tmp_path):
    found = run("--max-new-tokens 90 --method vanilla --compare", tmp_path)
    assert "skipped writing-1 turn 0: 125 prompt tokens and 90 new ones exceed" in found.out
    assert found.records == []
    assert json.loads((tmp_path / "run.json").read_text())["summaries"] == []


# --- experiments.convert -----------------------------------------------------------------------


def converting(flags: str) -> SimpleNamespace:
    return call(flags, convert.cli)


@pytest.mark.slow
def test_what_was_begun_otherwise_is_not_touched(models, residual):
    folder = residual.root / "model"
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    flags = f"--checkpoint {models['target']} --to {folder}"
    found = converting(f"{flags} --draft-group 32")
    assert found.code == 2 and "was converted otherwise: group is 16" in found.err
    found = converting(f"{flags} --draft-group 16")
    assert found.code == 0 and "bits a weight to stream" in found.out
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before
    found = call(f"{BASE} --checkpoint {models['gguf']} {residual.flags} --output {folder}-run")
    assert found.code == 2 and "was converted otherwise: source is" in found.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoint {truncated} --to {to} --draft-group 16", "truncated"),
        ("--checkpoint {target} --to {to} --draft-group 40", "not a multiple of group 40"),
        ("--checkpoint {target} --to {gguf} --draft-group 16", "File exists"),
    ],
)
def test_what_cannot_be_converted_gets_one_line(models, tmp_path, flags, message):
    found = converting(flags.format(to=tmp_path / "out", **models))
    assert found.code == 2 and found.err.startswith("error: ") and message in found.err
    assert "Traceback" not in found.err
