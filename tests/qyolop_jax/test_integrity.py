"""What is read is what was written: flips, cuts and wrong types in every file that is read back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantcase import images, random_params, small_graph
from safetensors import safe_open
from safetensors.numpy import save_file

from llm_jax.digest import json_digest
from qyolop_jax import QyolopError, arrays, optimization
from qyolop_jax.checkpoints import Checkpoints, TrainingLog
from qyolop_jax.config import ModelConfig
from qyolop_jax.integer import (
    IntegerError,
    is_integer,
    load_integer_model,
    save_integer_model,
    to_integer,
)
from qyolop_jax.model import initial
from qyolop_jax.network import load
from qyolop_jax.optimization import Optimization
from qyolop_jax.quantize import calibrate_scales
from qyolop_jax.scales import Settings
from qyolop_jax.stages import TrainError
from qyolop_jax.weights import WeightsError, load_weights, save_weights

CFG = ModelConfig(0.125, "relu", size=(64, 96))
SAMPLE = [pytest.param(range(0, 12)), pytest.param(range(12, 200), marks=pytest.mark.slow)]


def flipped(path, number):
    """The file with one bit turned; a fifth of the bits are in the first kilobyte, the header."""
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng([7, number])
    at = int(rng.integers(0, 8 * (min(1000, len(data)) if number % 5 == 0 else len(data))))
    data[at // 8] ^= 1 << at % 8
    return bytes(data)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A float and an integer network, on disk and in memory."""
    folder = tmp_path_factory.mktemp("files")
    variables = initial(CFG)
    save_weights(folder / "float", CFG, variables)
    graph = small_graph("silu")
    params, settings = random_params(graph), Settings(keep=("mid",))
    scales = calibrate_scales(graph, params, [images(0)], settings)
    model = to_integer(graph, params, scales, settings)
    save_integer_model(model, folder / "integer")
    return dict(float=(folder / "float", load_weights, (CFG, variables)),
                integer=(folder / "integer", load_integer_model, model))  # fmt: skip


@pytest.mark.parametrize("numbers", SAMPLE, ids=["sample", "all"])
@pytest.mark.parametrize("kind", ["float", "integer"])
def test_every_flip_is_named_or_padding(files, kind, numbers, tmp_path):
    path, read, want = files[kind]
    named = 0
    for number in numbers:
        (tmp_path / "flipped").write_bytes(flipped(path, number))
        try:
            found = read(tmp_path / "flipped")
        except QyolopError as error:
            assert str(tmp_path / "flipped") in str(error) and "\n" not in str(error)
            named += 1
            continue
        same(found, want)
    assert named > 0.9 * len(numbers)


@pytest.mark.parametrize("kind", ["float", "integer"])
def test_every_cut_is_named(files, kind, tmp_path):
    path, read, _ = files[kind]
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 500, 5000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(QyolopError, match="not a whole safetensors file"):
            read(tmp_path / "cut")
    (tmp_path / "long").write_bytes(data + b"more")
    with pytest.raises(QyolopError, match="not a whole safetensors file"):
        read(tmp_path / "long")
    for none in (tmp_path, tmp_path / "none"):
        with pytest.raises(QyolopError, match="there is no file"):
            read(none)


def contents(path):
    with safe_open(path, "numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_damaged_array_is_named_and_the_check_can_be_left_out(files, tmp_path):
    path, _, (_, variables) = files["float"]
    data = path.read_bytes()
    (tmp_path / "damaged").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    last = max(contents(path)[1])  # as safetensors orders arrays of one type
    with pytest.raises(WeightsError, match=r"\S+ is damaged, as its checksum says") as told:
        load(tmp_path / "damaged")
    assert last.split("/")[0] in str(told.value) or "/" in str(told.value)
    found = load(tmp_path / "damaged", check=False).values
    off = [np.asarray(a != b).sum() for a, b in
           zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True)]  # fmt: skip
    assert sum(off) == 1
    about, flat = contents(path)
    del about[arrays.CHECKSUMS]
    save_file(flat, tmp_path / "bare", about)
    with pytest.raises(WeightsError, match="has no checksums, so it may be damaged"):
        load(tmp_path / "bare")
    assert load(tmp_path / "bare", check=False).cfg == CFG
    for wrong in ("[]", "5", "{", "null", '{"": 5}'):
        save_file(flat, tmp_path / "bare", about | {arrays.CHECKSUMS: wrong})
        with pytest.raises(WeightsError):
            load(tmp_path / "bare")


def test_what_is_not_finite_is_named_with_its_layer(files, tmp_path):
    _, _, (_, variables) = files["float"]
    for value in (np.nan, np.inf, -np.inf):
        kernel = variables["params"]["stem.2"]["kernel"].at[0, 0, 0, 0].set(value)
        layer = variables["params"]["stem.2"] | dict(kernel=kernel)
        wrong = dict(variables, params=variables["params"] | {"stem.2": layer})
        with pytest.raises(WeightsError, match=r"params/stem\.2/kernel holds NaN or infinity"):
            save_weights(tmp_path / "wrong", CFG, wrong)
        flat = {arrays.array_name(p): np.asarray(a)
                for p, a in jax.tree_util.tree_leaves_with_path(wrong)}  # fmt: skip
        arrays.write_arrays(tmp_path / "wrong", flat, {"qyolop": CFG.to_json()})
        with pytest.raises(WeightsError, match=r"params/stem\.2/kernel holds NaN or infinity"):
            load_weights(tmp_path / "wrong")
    model = files["integer"][2]
    layer = model.layers["a"] | dict(factor=model.layers["a"]["factor"].at[1].set(np.inf))
    wrong = type(model)(model.layers | dict(a=layer), model.outputs, model.graph)
    with pytest.raises(IntegerError, match="layers/a/factor holds NaN or infinity"):
        save_integer_model(wrong, tmp_path / "integer")


def changed(path, at, about=None, flat=None):
    """The file with other contents and the right checksums."""
    old_about, old = contents(path)
    old_about.pop(arrays.CHECKSUMS)
    new = {k: v for k, v in (old | (flat or {})).items() if v is not None}
    said = {k: v for k, v in (old_about | (about or {})).items() if v is not None}
    arrays.write_arrays(at, new, said)
    return at


def nodes_with(files, number, **fields):
    nodes = json.loads(contents(files["integer"][0])[0]["nodes"])
    nodes[number] |= fields
    return json.dumps(nodes)


@pytest.mark.parametrize(
    "fields",
    [
        dict(name=5), dict(name=""), dict(name="a/b"), dict(name="image"), dict(op="gather"),
        dict(op=None), dict(op=["conv"]), dict(inputs=5), dict(inputs=["later"]), dict(inputs=[]),
        dict(inputs="image"), dict(inputs=[None]), dict(channels=0), dict(channels=-8),
        dict(channels=10**9), dict(channels=8.0), dict(channels=True), dict(channels="8"),
        dict(kernel=0), dict(kernel=10**6), dict(stride=0), dict(stride=None), dict(act="gelu"),
        dict(act=["relu"]), dict(norm="no"), dict(rep=1), dict(more=1), dict(channels=9),
    ],
    ids=str,
)  # fmt: skip
def test_nodes_that_cannot_be_are_named(files, fields, tmp_path):
    about = dict(nodes=nodes_with(files, 1, **fields))
    with pytest.raises(IntegerError, match=r"node|graph"):
        load_integer_model(changed(files["integer"][0], tmp_path / "wrong", about))


@pytest.mark.parametrize(
    "about",
    [
        *(dict(nodes=v) for v in (None, "", "[]", "5", "[5]", "[null]", '["conv"]', "[" * 9999)),
        *(dict(outputs=v) for v in (None, "", "[]", "5", '"area"', "[5]", "[null]", '["none"]')),
        *(dict(config=v) for v in ("", "[]", "5", '{"width": "1"}', CFG.to_json())),
        dict(format="qyolop integer model 2"), dict(format=None),
    ],
    ids=lambda about: str(about)[:40],
)  # fmt: skip
def test_headers_of_wrong_types_are_named(files, about, tmp_path):
    with pytest.raises(IntegerError, match="wrong"):
        load_integer_model(changed(files["integer"][0], tmp_path / "wrong", about))


@pytest.mark.parametrize(
    "change",
    [
        {"layers/a/bias": None}, {"layers/a/factor": None}, {"layers/mid/kernel": None},
        {"layers/a/table": None}, {"layers/a/kernel": np.zeros((3, 3, 1, 1), np.int8)},
        {"layers/a/bias": np.zeros(8, np.float32)}, {"layers/a/zero": np.zeros(1, np.int8)},
        {"layers/none/bias": np.zeros(8, np.int32)}, {"more": np.zeros(1)},
        {"layers/a/table": np.zeros(255, np.int8)}, {"outputs/area/step": None},
        {"outputs/none/step": np.ones(1, np.float32)}, {"layers/mid/step": None},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_arrays_that_do_not_fit_the_graph_are_named(files, change, tmp_path):
    path = changed(files["integer"][0], tmp_path / "wrong", flat=change)
    with pytest.raises(IntegerError, match="arrays do not fit its graph, such as"):
        load_integer_model(path)


def test_floats_of_other_types_are_named(files, tmp_path):
    path = files["float"][0]
    name = "params/stem.1/kernel"
    kernel = contents(path)[1][name]
    for other in (kernel.astype(np.float64), kernel.astype(np.int8), kernel[..., :1], None):
        with pytest.raises(WeightsError, match=r"1 arrays do not fit.*stem\.1/kernel"):
            load_weights(changed(path, tmp_path / "wrong", flat={name: other}))
    for config in ("", "[]", '{"width": 99}', '{"size": [1, 2]}', '{"height": 1}'):
        with pytest.raises(WeightsError, match="wrong: "):
            load_weights(changed(path, tmp_path / "wrong", {"qyolop": config}))
    assert not is_integer(tmp_path / "wrong") and not is_integer(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with two states, the newest of them, and its description."""
    folder = tmp_path_factory.mktemp("states") / "checkpoints"
    rng = np.random.default_rng(0)
    params = dict(w=jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), b=jnp.zeros(30))
    variables = dict(params=params, seen=jnp.zeros((), jnp.int32))
    state = optimization.new_state(variables, optimization.optimizer(Optimization()))
    store = Checkpoints(folder)
    about = dict(phase=1, step=2, identity="width=0.25", stream={"next": 17, "name": "scenes"})
    for at in (5, 7):
        store.save(at, state, about | dict(step=at - 5))
    store.close()
    return folder, state, about


noisy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Reads that orbax gives up are still answered when its event loop is closed."""


def read_state(folder, like):
    store = Checkpoints(folder)
    try:
        return store.newest(), store.restore(like)
    finally:
        store.close()


def test_a_state_comes_back(checkpoint):
    folder, state, about = checkpoint
    found, again = read_state(folder, state)
    same(again, state)
    assert {k: found[k] for k in about} == about


@noisy
@pytest.mark.parametrize(
    "numbers", [range(0, 3), pytest.param(range(3, 200), marks=pytest.mark.slow)], ids=str
)
def test_every_flip_in_a_checkpoint_is_named_or_padding(checkpoint, numbers, tmp_path):
    folder, state, about = checkpoint
    files = sorted(f.relative_to(folder) for f in (folder / "7").rglob("*") if f.is_file())
    sizes = np.array([(folder / f).stat().st_size for f in files])
    rng = np.random.default_rng(3)
    named = 0
    for number in range(200):
        even = rng.random() < 0.5  # each file as often as another, or by its size
        file = files[int(rng.choice(len(files), p=None if even else sizes / sizes.sum()))]
        if number not in numbers or not (folder / file).stat().st_size:
            continue
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        (copy / file).write_bytes(flipped(folder / file, number))
        try:
            found, again = read_state(copy, state)
        except TrainError as error:
            assert f"{copy}/7 is damaged" in str(error) and "\n" not in str(error)
            named += 1
            continue
        same(again, state)
        assert {k: found[k] for k in about} == about
    print(f"{named} of {len(numbers)} named")


@noisy
def test_missing_files_of_a_checkpoint_are_named(checkpoint, tmp_path):
    folder, state, _ = checkpoint
    for number, pattern in enumerate(("state/d", "about", "state/manifest.ocdbt", "state")):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        gone = copy / "7" / pattern
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with pytest.raises(TrainError, match=r"7 is damaged .*remove that folder"):
            read_state(copy, state)
        shutil.rmtree(copy / "7")
        found, _ = read_state(copy, state)
        assert found["step"] == 0  # the one before


@noisy
def test_descriptions_of_wrong_types_are_named(checkpoint, tmp_path):
    folder, state, _ = checkpoint
    (kept,) = (folder / "7/about").rglob("metadata")
    right = json.loads(kept.read_text())
    body = {k: v for k, v in right.items() if k != "checksum"}
    signed = lambda about: about | dict(checksum=json_digest(about))
    wrong = (
        [], 5, None, {}, right | dict(step=3), right | dict(identity="other"),
        signed(body | dict(arrays={})), signed(body | dict(arrays=5)),
    )  # fmt: skip
    for number, content in enumerate(wrong):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        (copy / kept.relative_to(folder)).write_text(json.dumps(content))
        with pytest.raises(TrainError, match="7 is damaged"):
            read_state(copy, state)


def test_a_folder_that_cannot_hold_checkpoints_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainError, match="cannot be opened"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_log_that_is_damaged_is_named(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log(stage=0, step=step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": 0, "st')  # cut off by a kill
    log.rewind(0, 2)
    assert [json.loads(l)["step"] for l in log.path.read_text().splitlines()] == [1, 2]
    for line in ("5", "[]", "null", '{"stage": 0}', "x", '{"stage": "a", "step": 1}'):
        log.path.write_text(line + '\n{"stage": 0, "step": 1}\n')
        with pytest.raises(TrainError, match=r"log\.jsonl, line 1: not a record"):
            log.rewind(0, 5)
