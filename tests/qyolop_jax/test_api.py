"""The names that `import qyolop_jax` gives: lazy, complete, and not hidden by submodules."""

import importlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import qyolop_jax
from qyolop_jax import network, recipe, scenes
from qyolop_jax.config import ModelConfig
from qyolop_jax.graph import build_graph
from qyolop_jax.model import initial
from qyolop_jax.optimization import Optimization
from qyolop_jax.postprocess import PostprocessError
from qyolop_jax.samples import SampleError
from qyolop_jax.scenes import Scenes, scene
from qyolop_jax.scenes.generate import Scenes as GeneratedScenes
from qyolop_jax.stages import Stage, TrainError

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parents[2]
TINY = ModelConfig(0.125, "relu", size=(64, 96))


def in_a_new_process(script):
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


def test_importing_the_package_loads_nothing_heavy():
    script = (
        "import sys, qyolop_jax, qyolop_jax.scenes\n"
        "print([n for n in ('jax', 'flax', 'optax', 'cv2', 'numpy') if n in sys.modules])\n"
        "print(issubclass(qyolop_jax.QyolopError, ValueError), 'train' in dir(qyolop_jax))\n"
    )
    ran = in_a_new_process(script)
    assert ran.stdout.splitlines() == ["[]", "True True"], ran.stderr


def test_no_module_hides_a_name():
    """Importing a submodule sets an attribute of the package, so no name may be a module's."""
    modules = {f.stem for f in (ROOT / "qyolop_jax").glob("*.py")}
    assert not modules & set(qyolop_jax.__all__)
    for module in sorted(modules - {"__init__", "tfds_builder"}):
        importlib.import_module(f"qyolop_jax.{module}")
    for name in qyolop_jax.__all__:
        value = getattr(qyolop_jax, name)
        assert callable(value) and value.__name__ == name
        assert value.__module__.split(".")[0] == "qyolop_jax"
    assert sorted(qyolop_jax.__all__) == qyolop_jax.__all__
    assert set(qyolop_jax.__all__) <= set(dir(qyolop_jax))
    assert qyolop_jax.train is recipe.train and qyolop_jax.predict is network.predict
    assert qyolop_jax.load is network.load and qyolop_jax.Optimization is Optimization
    assert Scenes is GeneratedScenes and scenes.scene is scene
    for package in (qyolop_jax, scenes):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            package.nothing  # noqa: B018


def test_a_missing_package_is_named():
    script = "import sys\nsys.modules['flax'] = None\nimport qyolop_jax\nqyolop_jax.load('x')\n"
    ran = in_a_new_process(script)
    assert "MissingPackage: the Q-YOLOP network needs flax" in ran.stderr
    assert "pip install 'thimble-jax[vision]'" in ran.stderr


@pytest.fixture(scope="module")
def floats():
    return network.Network(TINY, network.float_forward(TINY), initial(TINY))


@pytest.mark.slow
def test_what_is_found_is_in_the_images_own_pixels(floats, tmp_path):
    images = [scene(i, size).image for i, size in enumerate([(90, 170), (64, 96), (128, 96)])]
    found = floats.predict(images, conf=0.0, batch=2)
    assert len(found) == 3
    for image, f in zip(images, found, strict=True):
        height, width = image.shape[:2]
        assert f.area.shape == f.lane.shape == f.merged.shape == (height, width)
        assert len(f.boxes) == len(f.scores) == len(f.classes) > 0
        assert (f.boxes >= 0).all() and (f.boxes <= [width, height, width, height]).all()
    (alone,) = floats.predict(images[1], conf=0.0, batch=2)  # one image is a list of one
    # Products of one image and of two may round their last bits differently.
    np.testing.assert_allclose(alone.boxes, found[1].boxes, atol=1e-3)
    assert np.mean(alone.merged == found[1].merged) > 0.999

    floats.save(tmp_path / "model.safetensors")
    loaded = qyolop_jax.load(tmp_path)
    assert loaded.cfg == TINY
    for place in (loaded, tmp_path, str(tmp_path / "model.safetensors")):
        again = qyolop_jax.predict(place, np.stack([images[1]] * 2), conf=0.0)
        assert len(again) == 2
        np.testing.assert_allclose(again[1].boxes, found[1].boxes, atol=1e-3)
    assert floats.predict([]) == []
    with pytest.raises(SampleError, match=r"float32\[64, 96, 3\]; expected uint8"):
        floats.predict(images[1].astype(np.float32))


def test_numbers_that_would_find_nothing_are_named(floats):
    image = np.zeros((64, 96, 3), np.uint8)
    for conf in (float("nan"), -0.1, 1.5):
        with pytest.raises(PostprocessError, match="expected a score from 0 to 1"):
            floats.predict(image, conf)
    with pytest.raises(PostprocessError, match="batch is 0; expected 1 image or more"):
        next(floats.stream([image], batch=0))


def test_stages_and_data_that_do_not_fit(tmp_path):
    with pytest.raises(TrainError, match="expected four numbers"):
        recipe.four_stages((1, 2))
    with pytest.raises(TrainError, match="no stage"):
        recipe.Training(tmp_path, dict(a=Scenes(2, TINY.size)), TINY, [])
    stage = Stage("one", 1, 2, 0.1, 0.0, data=("b",))
    with pytest.raises(TrainError, match="stage one uses b; there are a"):
        recipe.Training(tmp_path, dict(a=Scenes(2, TINY.size)), TINY, [stage])


def test_training_is_the_four_stages_of_the_paper():
    training = recipe.Training("unused", dict(a=Scenes(8, TINY.size)), TINY)
    assert [s.name for s in training.stages] == ["pretrain", "mosaic", "finetune", "qat"]
    assert [p.steps for p in training.phases] == [14, 6, 14, 2]
    assert [p.calm_from for p in training.phases] == [0, 6, 7, 0]
    assert training.graph.outputs == build_graph(TINY).outputs
    other = recipe.Training("unused", dict(a=Scenes(8, TINY.size)), TINY, seed=1)
    assert training.identity != other.identity


@pytest.mark.slow
def test_train_gives_a_network_in_integers(tmp_path):
    stages = recipe.four_stages((0.5, 0.5, 0.5, 0.5))
    seen = []
    look = lambda stage, made: seen.append((stage.name, made.cfg)) or {}
    trained = qyolop_jax.train(Scenes(8, TINY.size), TINY, stages, folder=tmp_path, validate=look)
    assert seen == [(s.name, TINY) for s in stages]
    loaded = qyolop_jax.load(tmp_path / "model-int8.safetensors")
    image = scene(0, (90, 170)).image
    for a, b in zip(trained.predict(image, 0.0), loaded.predict(image, 0.0), strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.merged, b.merged)
    assert qyolop_jax.load(tmp_path).cfg == TINY  # the float network
