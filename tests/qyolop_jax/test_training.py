"""Steps against optax by hand, runs that are killed against runs that are not."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qyolop_jax import optimization
from qyolop_jax.checkpoints import Checkpoints
from qyolop_jax.flat import flatten
from qyolop_jax.optimization import Optimization
from qyolop_jax.stages import Phase, Stage, TrainError
from qyolop_jax.training import fit


class Numbers:
    """Batches of a regression; every batch follows from the seed and its place."""

    def __init__(self, seed, shift=0.0):
        self.seed, self.shift, self.at = seed, shift, 0

    def __next__(self):
        rng = np.random.default_rng([self.seed, self.at])
        self.at += 1
        x = rng.normal(size=(4, 3)).astype(np.float32)
        return dict(x=x, y=(x @ np.float32([1, -2, 3]) + self.shift).astype(np.float32))

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


def loss(variables, batch):
    found = batch["x"] @ variables["params"]["w"][:, 0] + variables["params"]["b"]
    total = jnp.mean((found - batch["y"]) ** 2)
    seen = variables["seen"] + 1
    return total, (dict(seen=seen), dict(parts=total))


def begin(variables):
    start = dict(params=dict(w=jnp.ones((3, 1)), b=jnp.zeros(())), seen=jnp.zeros((), jnp.int32))
    return start if variables is None else variables


def phases():
    """Two stages, the first with mosaic but for its last epoch."""
    one = Stage("one", 3, 4, 0.05, 0.01, warmup=1, mosaic=True, calm=1)
    two = Stage("two", 2, 4, 0.02, 0.0)
    data = lambda n: lambda mosaic: Numbers(10 * n + mosaic, 0.5 * mosaic)
    return [
        Phase(one, loss, begin, data(1), per_epoch=5),
        Phase(two, loss, begin, data(2), per_epoch=4),
    ]


def test_a_step_is_adam_on_a_clipped_gradient():
    config = Optimization(momentum=0.9, decay=0.0, clip=0.5, average=0.9)
    variables, batch = begin(None), next(Numbers(0))
    state = optimization.new_state(variables, optimization.optimizer(config))
    state, parts = optimization.make_step(loss, config)(state, batch, jnp.float32(0.1))
    grads = jax.grad(lambda p: loss(dict(variables, params=p), batch)[0])(variables["params"])
    now, averaged = (optimization.unpacked(state[k]) for k in ("variables", "average"))
    norm = float(optax.tree.norm(grads))
    assert norm > 0.5 and float(parts["gradient"]) == pytest.approx(norm, rel=1e-5)
    for name, g in grads.items():
        g = np.float64(g) * 0.5 / norm
        want = np.float64(variables["params"][name]) - 0.1 * g / (np.abs(g) + 1e-8)  # Adam's first
        np.testing.assert_allclose(now["params"][name], want, rtol=1e-4, atol=1e-6)
        keep = min(0.9, 2 / 11)
        mixed = keep * np.float64(variables["params"][name]) + (1 - keep) * want
        np.testing.assert_allclose(averaged["params"][name], mixed, rtol=1e-4, atol=1e-6)
    assert int(now["seen"]) == int(averaged["seen"]) == 1


def test_decay_is_for_kernels_and_rates_follow_the_stage():
    stage = Stage("one", 4, 4, 0.1, 0.01, warmup=1)
    rate, tx = (
        optimization.learning_rate(stage, 40, 10),
        optimization.optimizer(Optimization(decay=0.5)),
    )
    found = [float(rate(i)) for i in (0, 5, 10, 25, 40)]
    assert found[0] == 0 and found[1] == pytest.approx(0.05) and found[2] == pytest.approx(0.1)
    assert found[3] == pytest.approx(0.055) and found[4] == pytest.approx(0.01)
    params = flatten(begin(None)["params"])
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(12):
            updates, state = tx.update(zero, state, params)
    updates = updates.tree
    assert float(jnp.abs(updates["w"]).max()) > 0 and float(updates["b"]) == 0


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def lines(folder):
    """The log without what the clock says."""
    found = [json.loads(l) for l in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in found]


class Stopped(Exception):
    pass


OTHERS = [pytest.param(w, marks=pytest.mark.slow) for w in ((0, 3), (0, 12), (1, 1), (1, 7))]


@pytest.mark.parametrize("where", [(0, 10), *OTHERS])
def test_a_run_that_was_stopped_ends_the_same(where, tmp_path):
    whole = fit(tmp_path / "whole", phases(), save_every=3, log_every=2)

    def stop(phase, step, steps, parts):
        if (phase, step) == where:
            raise Stopped

    with pytest.raises(Stopped):
        fit(tmp_path / "part", phases(), save_every=3, log_every=2, progress=stop)
    again = fit(tmp_path / "part", phases(), save_every=3, log_every=2)
    same(whole, again)
    assert lines(tmp_path / "whole") == lines(tmp_path / "part")
    same(whole, fit(tmp_path / "part", phases(), save_every=3))  # finished: nothing left to do


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path):
    """kill -9 in the middle of a run, as often as it takes."""
    script = (
        "import sys, pathlib, time\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "import test_training as t\n"
        "slow = lambda *a: time.sleep(0.05)\n"
        "t.fit(pathlib.Path(sys.argv[1]), t.phases(), save_every=2, progress=slow)\n"
        "print('finished')\n"
    )
    here = pathlib.Path(__file__).parent
    command = [sys.executable, "-c", script, str(tmp_path / "run"), str(here), str(here.parents[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    saved = tmp_path / "run/checkpoints/4.safetensors"
    while process.poll() is None and not saved.exists():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and saved.exists()
    again = fit(tmp_path / "run", phases(), save_every=2)
    whole = fit(tmp_path / "whole", phases(), save_every=2)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)  # another process may add in another order


def test_validation_at_the_end_of_epochs(tmp_path):
    asked = []
    first, second = phases()
    validate = lambda variables, step, last: asked.append((step, last)) or dict(score=float(step))
    first = Phase(first.stage, loss, begin, first.batches, 5, validate)
    fit(tmp_path, [first, second])
    assert asked == [(5, False), (10, False), (15, True)]
    assert [r["validation"]["score"] for r in lines(tmp_path) if "validation" in r] == [5, 10, 15]


def test_it_learns(tmp_path):
    stage = Stage("one", 40, 4, 0.1, 0.001)
    found = fit(tmp_path, [Phase(stage, loss, begin, lambda m: Numbers(0), 10)])
    np.testing.assert_allclose(found["params"]["w"][:, 0], [1, -2, 3], atol=0.1)


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(TrainError, match="expected epochs above the warm-up"):
        Stage("x", 1, 4, 0.1, 0.0, warmup=2)
    with pytest.raises(TrainError, match="expected it to fall"):
        Stage("x", 1, 4, 0.1, 0.2)
    fit(tmp_path / "a", phases()[:1], identity="one")
    with pytest.raises(TrainError, match="other settings"):
        fit(tmp_path / "a", phases()[:1], identity="two")
    stage = Stage("far", 1, 4, 1e30, 1e30)
    with pytest.raises(TrainError, match="with a lower rate"):
        fit(tmp_path / "b", [Phase(stage, loss, begin, lambda m: Numbers(0), 60)])
    assert os.path.exists(tmp_path / "b/log.jsonl")
    for wrong in (dict(save_every=0), dict(log_every=-1)):
        with pytest.raises(TrainError, match="expected 1 step or more"):
            fit(tmp_path / "c", phases(), **wrong)


class Spoiled(Numbers):
    """Batches of which one is NaN."""

    def __init__(self, at):
        super().__init__(0)
        self.spoiled = at

    def __next__(self):
        batch = super().__next__()
        return batch if self.at != self.spoiled else dict(batch, x=batch["x"] * np.nan)


def newest(folder):
    """(step, state) of the newest checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints")
    about = checkpoints.newest()
    like = optimization.new_state(begin(None), optimization.optimizer(Optimization()))
    return about["step"], checkpoints.restore(like)


@pytest.mark.quick_cases("3-0", "20-15")
@pytest.mark.parametrize(("spoiled", "good"), [(3, 0), (8, 5), (20, 15), (10, 5)])
def test_what_is_not_finite_is_never_saved_or_judged(spoiled, good, tmp_path):
    """A NaN between two lines of the log, before a checkpoint, and in the last step of a stage."""
    judged = []
    validate = lambda variables, step, last: judged.append(step) or {}
    stage = Stage("one", 2, 4, 1e-3, 1e-4)
    run = lambda: fit(
        tmp_path, [Phase(stage, loss, begin, lambda m: Spoiled(spoiled), 10, validate)],
        save_every=5, log_every=20,
    )  # fmt: skip
    for _ in range(2):
        with pytest.raises(TrainError, match="the newest checkpoint is from before"):
            run()
        step, state = newest(tmp_path)
        assert step == good
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(state))
    assert all(step < spoiled for step in judged)


def test_a_finite_loss_with_weights_that_are_not_is_named(tmp_path):
    """The gradient of a root is infinite where the loss is zero."""

    def root(variables, batch):
        total = jnp.sqrt(jnp.sum((variables["params"]["w"] - 1) ** 2)) + jnp.mean(batch["x"]) * 0
        return total, (dict(seen=variables["seen"]), dict(parts=total))

    stage = Stage("one", 1, 4, 1e-3, 1e-4)
    with pytest.raises(TrainError, match=r"step 1 of one .*: params/\w holds NaN"):
        fit(tmp_path, [Phase(stage, root, begin, lambda m: Numbers(0), 1)])
    assert newest(tmp_path)[0] == 0
    wrong = lambda variables: dict(begin(None), params=dict(w=jnp.ones((3, 1)), b=jnp.inf))
    with pytest.raises(TrainError, match="before step 1 of one: params/b holds"):
        fit(tmp_path / "b", [Phase(stage, loss, wrong, lambda m: Numbers(0), 1)])


@pytest.mark.parametrize("where", [(0, 7), pytest.param((1, 8), marks=pytest.mark.slow)])
def test_an_interrupt_loses_no_step(where, tmp_path):
    def interrupt(phase, step, steps, parts):
        if (phase, step) == where:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "part", phases(), save_every=100, log_every=2, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert newest(tmp_path / "part")[0] in (where[1], where[1] + 1)
    again = fit(tmp_path / "part", phases(), save_every=100, log_every=2)
    same(fit(tmp_path / "whole", phases(), save_every=100, log_every=2), again)
    assert lines(tmp_path / "whole") == lines(tmp_path / "part")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    tried = []

    def again(phase, step, steps, parts):
        with pytest.raises(TrainError, match="another process writes to"):
            fit(tmp_path / "run", phases())
        tried.append(step)
        raise Stopped

    with pytest.raises(Stopped):
        fit(tmp_path / "run", phases(), progress=again)
    assert tried == [1]
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainError, match="cannot be trained in"):
        fit(tmp_path / "file", phases())


def test_a_second_interrupt_comes_at_once(tmp_path):
    def interrupt(phase, step, steps, parts):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, phases(), progress=interrupt)
    assert newest(tmp_path)[0] == 0
