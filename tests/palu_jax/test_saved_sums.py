"""An interrupted calibration: what is kept, and what is not taken for it."""

import dataclasses
import json
import os
import signal
import threading

import numpy as np
import pytest

from llm_jax.testing import tiny_config, tiny_params
from palu_jax import calibration as module
from palu_jax import saved_sums
from palu_jax.calibration import CalibrationError, calibrate
from palu_jax.signals import deferred

CFG = tiny_config("qwen2", d_model=16, head_dim=4, d_ff=8, vocab=32)
PARAMS = tiny_params(CFG)
D, K, H, F = 16, 2, 4, 8
SHAPES = [(D, D), (D,), (K, H, H), (F, F), (F, F), (D, F), (D, F)]
BATCHES = [np.random.default_rng(i).integers(0, CFG.vocab, (2, 6)) for i in range(6)]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The batches whose sums were computed; the sums are random numbers that a batch decides."""
    seen = []

    def fake(params, tokens_BT, cfg, gradients, stop):
        seen.append(tokens_BT)
        rng = np.random.default_rng(int(np.sum(tokens_BT)))
        count = 7 if gradients else 3
        return [tuple(rng.normal(size=s).astype(np.float32) for s in SHAPES[:count])] * CFG.layers

    monkeypatch.setattr(module, "_sums", fake)
    return seen


def arrays(statistics):
    return [a for layer in statistics.layers for a in vars(layer).values() if a is not None]


def stopped(path, how, at=4, batches=BATCHES):
    """A calibration that is stopped after `at` of its batches."""

    def progress(sequences):
        if sequences == 2 * at:
            how()

    return calibrate(PARAMS, batches, CFG, path=path, progress=progress)


def raises(error):
    def now():
        raise error

    return now


def sends(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        (raises(KeyboardInterrupt), KeyboardInterrupt),
        (raises(MemoryError()), MemoryError),
        (sends(signal.SIGINT), KeyboardInterrupt),
        (sends(signal.SIGTERM), SystemExit),
    ],
)
def test_an_interrupted_run_goes_on(tmp_path, calls, how, error):
    """Within the first seconds, before the time to save has come; no batch is done twice."""
    want = calibrate(PARAMS, BATCHES, CFG)
    calls.clear()
    with pytest.raises(error):
        stopped(tmp_path / "s.npz", how)
    assert len(calls) == 4
    again = calibrate(PARAMS, BATCHES, CFG, path=tmp_path / "s.npz")
    assert len(calls) == 6
    for a, b in zip(arrays(again), arrays(want), strict=True):
        np.testing.assert_array_equal(a, b)
    calibrate(PARAMS, BATCHES, CFG, path=tmp_path / "s.npz")
    assert len(calls) == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_text_that_cannot_be_used_loses_nothing(tmp_path, calls):
    with pytest.raises(CalibrationError, match="batch 4: the token id"):
        calibrate(PARAMS, [*BATCHES[:3], BATCHES[0] + 32], CFG, path=tmp_path / "s.npz")
    calls.clear()
    calibrate(PARAMS, BATCHES, CFG, path=tmp_path / "s.npz")
    assert len(calls) == 3


def test_saving_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    """Every 5 seconds, but less often where a save takes more than a quarter of a second."""
    clock, saves = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def run(seconds_a_save):
        saves.clear()

        def write(self, sums):
            saves.append(sums.batches)
            clock[0] += seconds_a_save

        monkeypatch.setattr(saved_sums.SavedSums, "write", write)

        def batches():
            for i in range(200):
                clock[0] += 1
                yield BATCHES[i % 6]

        began = clock[0]
        calibrate(PARAMS, batches(), CFG, path=tmp_path / "s.npz")
        return (clock[0] - began - 200) / 200

    assert run(0.1) < 0.05 and saves[:2] == [6, 12]
    assert (
        run(2.0) < 0.05 + 2 * 2.0 / 200 and len(saves) > 3
    )  # the first and the last save are extra


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(batches=BATCHES[::-1]), "other text"),
        (dict(batches=[b.reshape(1, 12) for b in BATCHES]), "other text"),
        (dict(batches=BATCHES[:2]), "holds 4 batches; .* only 2"),
        (dict(params=tiny_params(CFG, 4)), "another model.* embed_VD"),
        (dict(cfg=dataclasses.replace(CFG, rope_theta=5.0)), "another model.* config"),
        (dict(gradients=False), "with or without gradients"),
    ],
)
def test_what_is_not_the_same_run_is_refused(tmp_path, change, words):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "s.npz", raises(KeyboardInterrupt))
    before = (tmp_path / "s.npz").read_bytes()
    call = dict(params=PARAMS, batches=BATCHES, cfg=CFG) | change
    with pytest.raises(CalibrationError, match=words):
        calibrate(**call, path=tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == before


@pytest.mark.parametrize("name", ["gate", "down", "o", "mlp_norm", "k_bias"])
def test_a_model_that_differs_in_one_number_is_another(tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "s.npz", raises(KeyboardInterrupt))
    one = PARAMS.layers[1]
    part = next(p for p in ("attn", "mlp", None) if hasattr(getattr(one, p) if p else one, name))
    owner = getattr(one, part) if part else one
    array = getattr(owner, name)
    owner = dataclasses.replace(owner, **{name: array.at[(-1,) * array.ndim].add(1e-3)})
    one = dataclasses.replace(one, **{part: owner}) if part else owner
    other = dataclasses.replace(PARAMS, layers=(PARAMS.layers[0], one))
    with pytest.raises(CalibrationError, match=f"another model.* layer 1, {name}"):
        calibrate(other, BATCHES, CFG, path=tmp_path / "s.npz")


@pytest.fixture
def file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "s.npz", raises(KeyboardInterrupt))
    return tmp_path / "s.npz"


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_flipped_bits_are_named_or_change_nothing(file, count):
    want = arrays(calibrate(PARAMS, BATCHES, CFG))
    whole, rng, named = file.read_bytes(), np.random.default_rng(count), 0
    for at, bit in zip(rng.integers(0, len(whole), count), rng.integers(0, 8, count), strict=True):
        broken = bytearray(whole)
        broken[at] ^= 1 << bit
        file.write_bytes(broken)
        try:
            found = arrays(calibrate(PARAMS, BATCHES, CFG, path=file))
        except CalibrationError as error:
            assert "is damaged" in str(error) or "another model" in str(error)
            named += 1
        else:
            for a, b in zip(found, want, strict=True):
                np.testing.assert_array_equal(a, b)
    assert named > 0.9 * count  # the others are dates and the like in headers of the zip


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_named(file, share):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CalibrationError, match=r"is damaged .* remove it and run again"):
        calibrate(PARAMS, BATCHES, CFG, path=file)


@pytest.mark.parametrize(
    "change",
    [
        dict(version=1),
        dict(version="2"),
        dict(batches=4.0),
        dict(batches=-1),
        dict(batches="4"),
        dict(text=None),
        dict(digests=[]),
        dict(digests={}),
        dict(model=None),
        dict(cfg=3),
        dict(more=1),
        None,
    ],
    ids=str,
)
def test_headers_of_wrong_types_are_named(file, change):
    with np.load(file) as found:
        held = {name: found[name] for name in found.files}
    header = json.loads(held["header"].tobytes())
    header = [] if change is None else header | change
    held["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(file, **held)
    with pytest.raises(CalibrationError, match="is damaged"):
        calibrate(PARAMS, BATCHES, CFG, path=file)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.astype(np.float32),
        lambda a: a[:1],
        lambda a: a * np.nan,
        lambda a: a.astype(">f8"),
        lambda a: a.astype(object),
        lambda a: np.array("text"),
        None,
    ],
)
def test_arrays_of_wrong_types_are_named(file, change):
    with np.load(file) as found:
        held = {name: found[name] for name in found.files}
    sum_ = held.pop("1/3")
    if change:
        held["1/3"] = change(sum_)
    np.savez(file, **held)
    with pytest.raises(CalibrationError, match="is damaged"):
        calibrate(PARAMS, BATCHES, CFG, path=file)


def test_places_that_hold_no_file(tmp_path):
    with pytest.raises(CalibrationError, match=r"is damaged .* not a file"):
        calibrate(PARAMS, BATCHES, CFG, path=tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match=r"is damaged .* not a file"):
        calibrate(PARAMS, BATCHES, CFG, path=tmp_path / "pipe")
    (tmp_path / "x").write_text("")
    with pytest.raises(CalibrationError, match="cannot be written to"):
        calibrate(PARAMS, BATCHES, CFG, path=tmp_path / "x" / "s.npz")


def test_signals_wait_for_the_end_of_a_step():
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("whole")
        stop()
        steps.append("never")
    assert steps == ["whole"]
    with pytest.raises(KeyboardInterrupt), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the second one acts at once
        steps.append("never")
    with pytest.raises(SystemExit) as stopped, deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        steps.append("to the end")
    assert (stopped.value.code, steps) == (143, ["whole", "to the end"])


def test_signals_of_the_program_and_of_other_threads_are_left_alone():
    own = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: own.append(number))
    try:
        with deferred() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop()
        assert own == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with deferred() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop()
    finally:
        signal.signal(signal.SIGTERM, before)

    def elsewhere():
        with deferred() as stop:
            stop()
            own.append("other thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert own[1:] == ["other thread"]
