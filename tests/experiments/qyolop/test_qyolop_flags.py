"""Every number among the flags has a range; what lies outside is named before any work."""

import pytest

from experiments.qyolop import __main__ as qyolop
from experiments.qyolop import train as qyolop_train
from qyolop_jax.augment import AugmentConfig, AugmentError
from qyolop_jax.config import ModelConfig, ModelConfigError
from qyolop_jax.losses import LossConfig, LossError
from qyolop_jax.optimization import Optimization
from qyolop_jax.stages import Stage, TrainError

MORE = dict(
    evaluate=("--run", "nowhere"), quantize=("--run", "nowhere"),
    export=("--run", "nowhere", "--format", "onnx"),
)  # fmt: skip
HUGE = str(10**20)
WRONG = {  # command -> flags, and values that cannot be
    "train": {
        "--scenes": ("0", "-1", HUGE), "--held-out": ("0", "-5", HUGE), "--batch": ("0", HUGE),
        "--devices": ("0", "-1", HUGE),
        "--save-every": ("0", "-1", HUGE), "--seed": ("-1", HUGE), "--width": ("0", "nan", "9"),
        "--rate": ("0", "-1", "nan", "inf", "1e9"), "--mix": ("-1", "nan", "inf"),
        "--size": ("0 0", "-32 32", "50 64", f"{HUGE} 64", "64 1048576"),
        "--epochs": ("0 1 1 1", "1 1 1 -1", "1 nan 1 1", "inf 1 1 1", "1 1 1 1e9"),
        "--data": ("scenes scenes",),
        "--loss.box-beta": ("0", "nan", "inf"), "--loss.tasks": ("1 1 nan", "1 inf 1", "-1 1 1"),
        "--loss.focal-gamma": ("nan", "inf", "0.5"), "--loss.tversky-gamma": ("nan", "inf"),
        "--augment.scale": ("1", "nan", "-1"), "--augment.least-side": ("-1", "nan", "inf"),
        "--augment.least-share": ("1", "nan", "-1"), "--augment.most-aspect": ("nan", "0"),
        "--augment.rotate": ("nan", "90"), "--augment.mosaic": ("2", "nan"),
        "--optimization.clip": ("0", "nan", "-1"), "--optimization.momentum": ("1", "nan", "-1"),
        "--optimization.decay": ("-1", "nan", "inf"), "--optimization.average": ("1", "nan"),
    },
    "evaluate": {
        "--scenes": ("0", "-1", HUGE), "--batch": ("0", "-1", HUGE), "--data": ("scenes scenes",),
    },
    "quantize": {
        "--images": ("0", "-1", HUGE), "--scenes": ("0", "-1", HUGE), "--held-out": ("0", HUGE),
        "--seed": ("-1", HUGE), "--percentile": ("nan", "50", "101", "inf"),
        "--data": ("scenes scenes",),
    },
    "export": {
        "--size": ("0 0", "50 64", f"{HUGE} 64", "-32 64"), "--opset": ("12", "99"),
        "--batch": ("0", "-1", HUGE),
    },
    "benchmark": {
        "--width": ("nan", "0", "9"), "--size": ("50 64", f"{HUGE} 64", "0 0"),
        "--batch": ("0", "1 -1", HUGE), "--repeats": ("0", "-1", HUGE),
        "--train-batch": ("0", HUGE), "--threads": ("0", HUGE), "--images": ("0", HUGE),
        "--data": ("scenes scenes",),
    },
}  # fmt: skip
CASES = [(c, f, v) for c, flags in WRONG.items() for f, values in flags.items() for v in values]
IDS = [" ".join(case) for case in CASES]


@pytest.mark.quick_cases(*IDS[::9])
@pytest.mark.parametrize(("command", "name", "value"), CASES, ids=IDS)
def test_flags_out_of_range_are_named(command, name, value, tmp_path, monkeypatch, capsys):
    """By the command, or by tyro where a group of flags refuses its values; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qyolop_train, "dataset", lambda *a: pytest.fail("data was read"))
    words = [command, *MORE.get(command, ()), name, *value.split()]
    try:
        status = qyolop.cli(words)
    except SystemExit as left:
        status = left.code
    told = capsys.readouterr().err
    assert status == 2 and "Traceback" not in told and "expected" in told
    word = name.split(".")[-1].strip("-").split("-")[-1]
    assert word in told
    assert not list(tmp_path.iterdir())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        *((lambda v=v: Stage("x", v, 4, 0.1, 0.0), TrainError) for v in (NAN, INF, 1e9, 0, -1)),
        *((lambda v=v: Stage("x", 1, 4, v, 0.0), TrainError) for v in (NAN, INF, -1)),
        *((lambda v=v: Stage("x", 1, 4, 0.1, 0.0, calm=v), TrainError) for v in (NAN, -1)),
        *((lambda v=v: Optimization(momentum=v), TrainError) for v in (NAN, 1, -1)),
        *((lambda v=v: LossConfig(balance=(1.0, v, 1.0)), LossError) for v in (NAN, INF, -1)),
        *((lambda v=v: AugmentConfig(most_aspect=v), AugmentError) for v in (NAN, 1)),
        *((lambda v=v: ModelConfig(**v), ModelConfigError) for v in (
            dict(width=NAN), dict(width=True), dict(width="1"), dict(size=(64,)), dict(size=64),
            dict(size=(64.0, 64)), dict(size=(32, 2**20)), dict(detection=("a", "a")),
            dict(detection=(1,)), dict(lane="abc"), dict(anchors=()), dict(anchors=(((1, 2),),)),
            dict(anchors=(((1, 2), (NAN, 1), (1, 1)),) * 3), dict(activation="gelu"),
            dict(detection=tuple(map(str, range(999)))),
        )),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(make, error):
    with pytest.raises(error, match=r"expected|possible"):
        make()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}x", "3", "null", '{"width": {}}', '{"breadth": 1}', "[" * 99999, "NaN"]
)
def test_descriptions_that_are_none_are_named(text):
    with pytest.raises(ModelConfigError):
        ModelConfig.from_json(text)
