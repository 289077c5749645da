"""What is read is what was written: flips, cuts and wrong types in every file that is read back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantcase import images, random_params, small_graph
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

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
        assert np.asarray(x).dtype == np.asarray(y).dtype


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
    Checkpoints(folder).save(7, LIKE, ABOUT)
    return dict(float=(folder / "float", load_weights, (CFG, variables)),
                integer=(folder / "integer", load_integer_model, model),
                state=(folder / "7.safetensors", read_state, (ABOUT, LIKE)))  # fmt: skip


@pytest.mark.parametrize("numbers", SAMPLE, ids=["sample", "all"])
@pytest.mark.parametrize("kind", ["float", "integer", "state"])
def test_every_flip_is_named_or_padding(files, kind, numbers, tmp_path):
    path, read, want = files[kind]
    named = 0
    for number in numbers:
        (tmp_path / "7.safetensors").write_bytes(flipped(path, number))
        try:
            found = read(tmp_path / "7.safetensors")
        except QyolopError as error:
            assert str(tmp_path / "7.safetensors") in str(error) and "\n" not in str(error)
            named += 1
            continue
        same(found, want)
    assert named > 0.9 * len(numbers)


@pytest.mark.parametrize("kind", ["float", "integer", "state"])
def test_every_cut_is_named(files, kind, tmp_path):
    path, read, _ = files[kind]
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 500, 5000, len(data) // 2, len(data) - 1):
        (tmp_path / "7.safetensors").write_bytes(data[:length])
        with pytest.raises(QyolopError, match="not a whole safetensors file"):
            read(tmp_path / "7.safetensors")
    (tmp_path / "7.safetensors").write_bytes(data + b"more")
    with pytest.raises(QyolopError, match="not a whole safetensors file"):
        read(tmp_path / "7.safetensors")
    (tmp_path / "7.safetensors").unlink()
    (tmp_path / "7.safetensors").mkdir()
    with pytest.raises(QyolopError, match="there is no file"):
        read(tmp_path / "7.safetensors")


def contents(path):
    with safe_open(path, "numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
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


@pytest.mark.slow
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


LIKE = optimization.new_state(
    dict(params=dict(w=jnp.ones((40, 30)), b=jnp.zeros(30)), seen=jnp.zeros((), jnp.int32)),
    optimization.optimizer(Optimization()),
)
ABOUT = dict(phase=1, step=2, identity="width=0.25", stream={"next": 17, "name": "scenes"})


def read_state(path):
    store = Checkpoints(path.parent)
    return store.newest(), store.restore(LIKE)


def test_the_two_newest_states_are_kept(files, tmp_path):
    store = Checkpoints(tmp_path / "new/folder")
    assert store.newest() is None
    for at in (0, 9, 10):
        store.save(at, LIKE, ABOUT | dict(step=at))
    names = sorted(f.name for f in (tmp_path / "new/folder").iterdir())
    assert names == ["10.safetensors", "9.safetensors"]
    assert store.newest() == ABOUT | dict(step=10)
    same(store.restore(LIKE), LIKE)
    (tmp_path / "new/folder/10.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainError, match=r"Remove .*10\.safetensors, and the same command goes on"):
        store.newest()
    (tmp_path / "new/folder/10.safetensors").unlink()
    assert store.newest() == ABOUT | dict(step=9)
    (tmp_path / "new/folder/12").mkdir()  # as orbax made them for version 0.1
    with pytest.raises(TrainError, match="folder/12 is a state of another version"):
        store.newest()


def test_states_of_other_networks_are_named(files, tmp_path):
    path = files["state"][0]
    store = Checkpoints(path.parent)
    other = optimization.new_state(
        dict(params=dict(w=jnp.ones((4, 3)))), optimization.optimizer(Optimization())
    )
    with pytest.raises(TrainError, match="arrays are not those of this network, such as"):
        store.restore(other)
    for wrong in ("", "[]", "5", "null", "{}", '{"phase": 1}', "[" * 9999):
        changed(path, tmp_path / "7.safetensors", dict(training=wrong))
        with pytest.raises(TrainError, match=r"Remove .*7\.safetensors"):
            read_state(tmp_path / "7.safetensors")


def test_a_state_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainError, match=r"cannot be written .*the same command resumes"):
        Checkpoints(tmp_path / "file").save(0, LIKE, ABOUT)

    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(arrays, "save_file", full)
    with pytest.raises(TrainError, match="No space left"):
        Checkpoints(tmp_path / "states").save(0, LIKE, ABOUT)
    assert not list((tmp_path / "states").iterdir())


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
