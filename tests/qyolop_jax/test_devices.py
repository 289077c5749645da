"""Training on several devices is training on one: losses, parameters, statistics, ranges."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
SEVERAL = ("2", "4", "2 then 4")


def on_four_devices(what):
    """What a function of `on_devices` found in a process with four host devices."""
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    command = [sys.executable, str(HERE / "on_devices.py"), what]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small():
    return on_four_devices("small")


@pytest.mark.parametrize("name", SEVERAL)
def test_a_run_is_that_of_one_device(small, name):
    """Also where it was stopped and continued on another number of devices."""
    (losses, variables), (alone, one) = small["found"][name], small["found"]["1"]
    assert len(alone) == 20 and alone[11] < alone[0] / 2
    np.testing.assert_allclose(losses, alone, rtol=2e-4)
    assert variables.keys() == one.keys()
    for path, values in variables.items():
        np.testing.assert_allclose(values, one[path], rtol=2e-4, atol=2e-5, err_msg=path)


def test_ranges_are_of_the_whole_batch(small):
    """The brightest pixel is on the last device alone; the moving average of the most follows."""
    brightest = [
        np.random.default_rng(n).normal(size=(4, 8, 8, 3)).astype(np.float32)[3].max() * 4 + 1
        for n in range(12)
    ]
    average = 0.0
    for steps in (12, 8):  # of two stages, each with the batches from the first one on
        most = average
        for n in range(steps):
            most = max(most, brightest[n])
            keep = (2 + n) / (11 + n)
            average = average * keep + most * (1 - keep)
    for name in ("1", *SEVERAL):
        assert small["found"][name][1]["['most']"] == pytest.approx([average], rel=1e-5)


def test_the_state_is_whole_and_the_batch_is_split(small):
    assert small["whole"] and small["images"] == [1, 1, 1, 1]


def test_as_many_devices_as_divide_the_batch(small):
    assert small["chosen"] == {"1": 1, "2": 2, "3": 3, "4": 4, "6": 3, "8": 4, "9": 3}


def test_numbers_of_devices_that_cannot_be_are_named(small):
    three, four, five, none = small["refused"]
    assert three.startswith("devices is 3, and a batch of 4 cannot be split evenly")
    assert four.startswith("devices is 4, and a batch of 6 cannot be split evenly")
    assert five == "devices is 5; expected 1 to the 4 visible ones"
    assert none == "devices is 0; expected 1 to the 4 visible ones"


@pytest.mark.slow
def test_the_network_differs_no_more_than_by_the_order_of_its_images():
    """A network that was not trained makes much of rounding, so the yardstick is one device that
    gets the same batch in another order."""
    found = on_four_devices("network")
    assert list(found) == ["pretrain", "qat"]
    for stage, results in found.items():
        noise = results.pop("turned")
        for name, (total, moved, rest) in results.items():
            assert total < 1e-4, (stage, name)
            assert moved < 4 * noise[1] + 1e-6, (stage, name)
            assert rest < 1e-3, (stage, name)
