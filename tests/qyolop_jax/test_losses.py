"""Losses against NumPy in float64, their gradients against finite differences of that."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qyolop_jax import losses
from qyolop_jax.assign import assign
from qyolop_jax.boxes import cells, decode_boxes
from qyolop_jax.config import IGNORE, UNKNOWN, ModelConfig
from qyolop_jax.losses import LossConfig
from qyolop_jax.postprocess import to_predictions

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (64, 96)
CFG = ModelConfig(size=(256, 384))  # anchors of a size that fits 64 x 96 images
LOSS = LossConfig()
sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))


def softmax(x):
    e = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def example(seed=0, samples=3, boxes=3):
    """Raw outputs and a batch: boxes, crowds, typed and UNKNOWN and IGNORE pixels, mixed labels."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    raw = {f"detect.{s}": normal(samples, 64 // s, 96 // s, 27) for s in CFG.strides}
    raw |= {"area": normal(samples, *SIZE, 3), "lane": normal(samples, *SIZE, 4)}
    low = rng.uniform([0, 0], [60, 40], (samples, 5, 2))
    true = np.concatenate([low, low + rng.uniform(6, 24, (samples, 5, 2))], -1)
    masks = lambda classes: rng.choice([*range(classes), UNKNOWN, IGNORE], (samples, *SIZE))
    batch = {
        "image": jnp.zeros((samples, *SIZE, 3), jnp.uint8),
        "boxes": jnp.float32(true),
        "classes": jnp.int32(rng.integers(0, 4, (samples, 5))),
        "valid": jnp.asarray(np.arange(5)[None].repeat(samples, 0) < boxes),
        "crowd": jnp.asarray(np.arange(5)[None].repeat(samples, 0) == 2),
        "area": jnp.uint8(masks(3)),
        "lane": jnp.uint8(masks(4)),
        "labelled": jnp.asarray(np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1]][:samples], bool)),
    }
    return raw, batch


@jax.jit
def total_loss(raw, batch):
    return losses.total_loss(raw, batch, CFG, LOSS)


@functools.partial(jax.jit, static_argnames="loss_cfg")
def value_and_gradient(raw, batch, loss_cfg):
    return jax.value_and_grad(lambda r: losses.total_loss(r, batch, CFG, loss_cfg)[0])(raw)


@jax.jit
def mask_losses(logits, mask, labelled):
    return losses.mask_losses(logits, mask, labelled, LOSS, LOSS.lane_tversky)


@jax.jit
def detection(raw, batch):
    return losses.detection_losses(raw, batch, CFG, LOSS)


@jax.jit
def assigned(raw, batch):
    return assign(decode_boxes(raw, CFG), batch, CFG, SIZE)


@functools.partial(jax.jit, static_argnames="name")
def detection_gradient(raw, batch, name):
    return jax.grad(lambda r: losses.detection_losses(r, batch, CFG, LOSS)[name])(raw)


def check_gradient(function, reference, x, rtol=2e-3):
    """grad(function) at x along random directions against central differences in float64."""
    check_directions(jax.grad(function)(jnp.float32(x)), reference, x, rtol)


def check_directions(gradient, reference, x, rtol=2e-3):
    gradient = np.float64(gradient)
    x, rng = np.float64(jnp.float32(x)), np.random.default_rng(9)
    for _ in range(5):
        way = rng.normal(size=x.shape)
        expected = (reference(x + 1e-5 * way) - reference(x - 1e-5 * way)) / 2e-5
        size = np.sqrt((gradient**2).sum())  # what a direction of this length may hold
        np.testing.assert_allclose((gradient * way).sum(), expected, rtol=rtol, atol=1e-3 * size)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_binary_focal(gamma):
    rng = np.random.default_rng(0)
    x, t = rng.normal(0, 3, 50), rng.uniform(0, 1, 50)
    t[:20] = t[:20] > 0.5

    def reference(x):
        p = sigmoid(x)
        entropy = -t * np.log(p) - (1 - t) * np.log(1 - p)
        return ((0.25 * t + 0.75 * (1 - t)) * np.abs(t - p) ** gamma * entropy).sum()

    ours = lambda x: losses.binary_focal(x, jnp.float32(t), 0.25, gamma).sum()
    np.testing.assert_allclose(ours(jnp.float32(x)), reference(x), rtol=1e-5)
    check_gradient(ours, reference, x)
    extreme = jax.vmap(jax.grad(lambda x, t: losses.binary_focal(x, t, 0.25, gamma)))(
        jnp.array([-200.0, 200, 200, -200, 0]), jnp.array([0.0, 1, 0, 1, 0.5])
    )
    assert np.isfinite(extreme).all()


def test_smooth_l1():
    x = np.array([-3, -0.2, -0.1, 0.05, 0.11, 2.0])
    value = lambda x: np.where(np.abs(x) < 0.1, x * x / 0.2, np.abs(x) - 0.05).sum()
    ours = lambda x: losses.smooth_l1(x, 0.1).sum()
    np.testing.assert_allclose(ours(jnp.float32(x)), value(x), rtol=1e-6)
    check_gradient(ours, value, x + 0.003)


def reference_masks(mask, labelled, classes, fixed, name):
    """The loss `name` as a function of logits; UNKNOWN's soft target is that of `fixed`."""
    mask, fixed = np.asarray(mask).astype(int), np.float64(fixed)
    counts = ((mask < classes) | (mask == UNKNOWN)) & np.asarray(labelled)[:, None, None]
    target = np.zeros((*mask.shape, classes))
    for c in range(classes):
        target[..., c] = mask == c
    own = softmax(fixed) * (np.arange(classes) > 0)
    target[mask == UNKNOWN] = (own / own.sum(-1, keepdims=True))[mask == UNKNOWN]

    def value(logits):
        p = softmax(logits)
        if name == "focal":
            right = (p * target).sum(-1)
            right[mask == UNKNOWN] = p[mask == UNKNOWN][:, 1:].sum(-1)
            right = right[counts]
            each = np.where(mask[counts] > 0, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)
            return each.sum() / max((mask[counts] > 0).sum(), 0.01 * counts.sum(), 1)
        found = []
        for c in range(classes):
            a, b = p[..., c][counts], target[..., c][counts]
            if b.sum() < 0.5:
                continue
            tp = np.minimum(a, b).sum()
            fp, fn = a.sum() - tp, b.sum() - tp
            if name == "tversky":
                found.append((1 - tp / (tp + 0.7 * fp + 0.3 * fn)) ** (4 / 3))
            else:
                found.append(1 - tp / (tp + fp + fn))
        return np.mean(found) if found else 0.0

    return value


@pytest.mark.quick_cases("area-tversky", "lane-focal", "lane-jaccard")
@pytest.mark.parametrize("name", ["tversky", "focal", "jaccard"])
@pytest.mark.parametrize("head", ["area", "lane"])
def test_masks(name, head):
    raw, batch = example()
    logits, mask = raw[head], batch[head]
    mask = jnp.where(mask == 2, 1, mask) if head == "lane" else mask  # a class that nobody has
    labelled = batch["labelled"][:, 1 if head == "area" else 2]
    reference = reference_masks(mask, labelled, logits.shape[-1], logits, name)
    ours = lambda x: mask_losses(x, mask, labelled)[name]
    np.testing.assert_allclose(jax.jit(ours)(logits), reference(logits), rtol=1e-5)
    check_gradient(jax.jit(ours), reference, logits)


def test_products_and_minima_agree_where_targets_are_hard():
    raw, batch = example()
    mask = jnp.where(batch["lane"] > 3, 0, batch["lane"])
    p, t = softmax(raw["lane"]), np.eye(4)[np.asarray(mask)]
    tp, both = (p * t).sum((0, 1, 2)), p.sum((0, 1, 2)) + t.sum((0, 1, 2))
    ours = mask_losses(raw["lane"], mask, jnp.ones(3, bool))["jaccard"]
    np.testing.assert_allclose(ours, (1 - tp / (both - tp)).mean(), rtol=1e-5)


def test_a_right_mask_costs_nothing():
    """A second sigmoid before the loss, as in YOLOP, would leave some 0.5 here."""
    mask = jnp.uint8(np.random.default_rng(0).integers(0, 4, (2, *SIZE)))
    logits = 20.0 * jax.nn.one_hot(mask, 4)
    for value in mask_losses(logits, mask, jnp.ones(2, bool)).values():
        assert 0 <= value < 1e-4


@pytest.mark.slow
def test_unknown_pixels_take_any_foreground_class():
    mask = jnp.full((1, *SIZE), UNKNOWN, jnp.uint8).at[:, :20].set(0)
    for shares in ([0.0, 9, 9, 9], [0.0, 20, 0, 0], [0.0, 8, 9, 10]):
        logits = jnp.broadcast_to(jnp.array(shares), (1, *SIZE, 4)) + 0.0
        logits = logits.at[:, :20].set(jnp.array([25.0, 0, 0, 0]))
        for value in mask_losses(logits, mask, jnp.ones(1, bool)).values():
            assert value < 2e-3
    background = jnp.zeros((1, *SIZE, 4)).at[..., 0].set(9)
    found = mask_losses(background, mask, jnp.ones(1, bool))
    assert found["tversky"] > 0.5 and found["focal"] > 1
    gradient = jax.grad(lambda x: mask_losses(x, mask, jnp.ones(1, bool))["jaccard"])
    kinds = np.asarray(gradient(background))[:, 20:, :, 1:]
    assert (kinds < 0).all()  # all go up, and none before the others
    np.testing.assert_allclose(kinds, kinds[..., :1].repeat(3, -1), rtol=1e-4)


def test_ignored_pixels_do_not_count():
    raw, batch = example()
    other = jnp.where((batch["lane"] == IGNORE)[..., None], 7 - 3 * raw["lane"], raw["lane"])
    labelled = jnp.ones(3, bool)
    before = mask_losses(raw["lane"], batch["lane"], labelled)
    assert before == mask_losses(other, batch["lane"], labelled)


def reference_detection(raw, batch, box_loss):
    """Class, objectness and box as functions of raw detection outputs, assignment held fixed."""
    fixed = cells(CFG, SIZE)
    found = assigned(raw, batch)
    own, ignore = np.asarray(found.box_BP), np.asarray(found.ignore_BP)
    positive, labelled = own >= 0, np.asarray(batch["labelled"])[:, 0]
    total = max(positive.sum(), labelled.sum(), 1)

    def boxes_of(flat):
        centre = (2 * sigmoid(flat[..., :2]) - 0.5 + fixed.xy_P2) * fixed.stride_P[:, None]
        wh = (2 * sigmoid(flat[..., 2:4])) ** 2 * fixed.anchor_P2
        return centre, wh

    def overlap(centre, wh, box):
        low = np.maximum(centre - wh / 2, box[:2])
        high = np.minimum(centre + wh / 2, box[2:])
        shared = np.prod(np.maximum(high - low, 0))
        return shared / (np.prod(wh) + np.prod(box[2:] - box[:2]) - shared)

    flat_of = lambda raw: np.concatenate(
        [np.float64(raw[f"detect.{s}"]).reshape(3, -1, 9) for s in CFG.strides], 1
    )
    true, kinds = np.float64(batch["boxes"]), np.asarray(batch["classes"])
    centre, wh = boxes_of(flat_of(raw))
    iou = np.zeros(own.shape)
    for b, i in np.argwhere(positive):
        iou[b, i] = overlap(centre[b, i], wh[b, i], true[b, own[b, i]])
    level = np.searchsorted(fixed.starts, np.arange(own.shape[1]), "right") - 1
    weight = np.array(LOSS.balance)[level] / np.diff(fixed.starts)[level]
    weight /= weight.mean()

    def focal(x, t):
        p = sigmoid(x)
        entropy = -t * np.log(p) - (1 - t) * np.log(1 - p)
        return (0.25 * t + 0.75 * (1 - t)) * (t - p) ** 2 * entropy

    def value(raw):
        flat = flat_of(raw)
        centre, wh = boxes_of(flat)
        seen = labelled[:, None] & ~ignore
        sums = {"objectness": (focal(flat[..., 4], iou) * weight)[seen].sum(), "class": 0, "box": 0}
        for b, i in np.argwhere(positive):
            box, kind = true[b, own[b, i]], kinds[b, own[b, i]]
            sums["class"] += focal(flat[b, i, 5:], (np.arange(4) == kind) * 1.0).sum()
            middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            off = np.concatenate([(centre[b, i] - middle) / fixed.stride_P[i],
                                  (wh[b, i] - size) / fixed.anchor_P2[i]])  # fmt: skip
            off = np.abs(off)
            sums["box"] += np.where(off < 1 / 9, off**2 * 4.5, off - 1 / 18).sum()
        return {name: v / total for name, v in sums.items()}

    return value, positive.sum()


@pytest.mark.quick_cases("class")
@pytest.mark.parametrize("name", ["class", "objectness", "box"])
def test_detection(name):
    raw, batch = example(1)
    detect = {k: v for k, v in raw.items() if k.startswith("detect")}
    reference, positives = reference_detection(detect, batch, "smooth_l1")
    assert positives >= 4
    np.testing.assert_allclose(detection(detect, batch)[name], reference(detect)[name], rtol=2e-5)
    gradient = detection_gradient(detect, batch, name)
    for key in detect:
        along = lambda x, k=key: reference({**detect, k: x})[name]
        check_directions(gradient[key], along, detect[key])


@pytest.mark.slow
def test_total_is_the_weighted_sum():
    raw, batch = example()
    total, parts = total_loss(raw, batch)
    expected = 0.5 * parts["detection/class"] + parts["detection/objectness"]
    expected += 0.05 * parts["detection/box"] + 0.2 * (parts["area/tversky"] + parts["area/focal"])
    expected += parts["lane/tversky"] + parts["lane/focal"] + parts["lane/jaccard"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert total.dtype == jnp.float32 and total.shape == ()
    other = dataclasses.replace(LOSS, tasks=(2.0, 0.0, 1.0), detection=(0.0, 3.0, 0.0))
    total, parts = jax.jit(lambda r, b: losses.total_loss(r, b, CFG, other))(raw, batch)
    assert not any(name.startswith("area") for name in parts) and "detection/box" not in parts
    expected = 6 * parts["detection/objectness"]
    expected += sum(v for k, v in parts.items() if k.startswith("lane"))
    np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.slow
def test_unlabelled_samples_change_nothing():
    raw, batch = example()
    for at, task in enumerate(("detection", "area", "lane")):
        some = batch | {"labelled": jnp.zeros((3, 3), bool).at[:2, at].set(True)}
        first_two = jax.tree.map(lambda x: x[:2], (raw, some))
        whole, parts = total_loss(raw, some)
        alone, _ = total_loss(*first_two)
        np.testing.assert_allclose(whole, alone, rtol=1e-6)
        assert all(v == 0 for k, v in parts.items() if not k.startswith(task))
        assert whole > 0


@pytest.mark.slow
@pytest.mark.parametrize("box", ["smooth_l1", "ciou"])
@pytest.mark.parametrize("what", ["unlabelled", "no boxes", "labelled"])
def test_gradients_are_finite_and_zero_where_nothing_is_labelled(box, what):
    raw, batch = example()
    if what == "unlabelled":
        batch["labelled"] = jnp.zeros((3, 3), bool)
    elif what == "no boxes":
        batch |= {"valid": jnp.zeros((3, 5), bool), "boxes": jnp.zeros((3, 5, 4))}
        batch |= {"area": jnp.zeros_like(batch["area"]), "lane": jnp.full_like(batch["lane"], 255)}
    value, gradient = value_and_gradient(raw, batch, LossConfig(box=box))
    assert all(np.isfinite(g).all() for g in gradient.values())
    size = {k: float(jnp.abs(g).max()) for k, g in gradient.items()}
    if what == "unlabelled":
        assert value == 0 and max(size.values()) == 0
    elif what == "no boxes":
        assert size["lane"] == 0 and min(size["detect.8"], size["area"]) > 0
    else:
        assert min(size.values()) > 0


def test_crowds_get_no_objectness_loss():
    raw, batch = example()
    found = assigned(raw, batch)
    detect = {k: v for k, v in raw.items() if k.startswith("detect")}
    gradient = detection_gradient(detect, batch, "objectness")
    flat = jnp.concatenate([gradient[f"detect.{s}"].reshape(3, -1, 9) for s in CFG.strides], 1)
    quiet = np.asarray(flat[..., 4] == 0)
    expected = np.asarray(found.ignore_BP) | ~np.asarray(batch["labelled"])[:, :1]
    np.testing.assert_array_equal(quiet, expected)
    assert found.ignore_BP[:2].any()


@pytest.mark.slow
@pytest.mark.parametrize("box", ["smooth_l1", "ciou"])
def test_descending_on_the_outputs_themselves_finds_every_box_and_mask(box):
    raw, batch = example(2, 2)
    raw = {k: v - 3.0 * (jnp.arange(v.shape[-1]) % 9 == 4)[None, None, None].astype(v.dtype)
           if k.startswith("detect") else v for k, v in raw.items()}  # fmt: skip
    batch["labelled"] = jnp.ones((2, 3), bool)
    loss_cfg = LossConfig(box=box)
    zero = jax.tree.map(jnp.zeros_like, raw)

    def step(carry, _):  # Adam without bias correction
        raw, m, v = carry
        value, g = jax.value_and_grad(lambda r: losses.total_loss(r, batch, CFG, loss_cfg)[0])(raw)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, v, g)
        raw = jax.tree.map(lambda x, m, v: x - 0.1 * m / (jnp.sqrt(v) + 1e-8), raw, m, v)
        return (raw, m, v), value

    (raw, _, _), values = jax.lax.scan(step, (raw, zero, zero), length=250)
    assert values[-1] < 0.05 * values[0]
    found = jax.jit(lambda raw: to_predictions(raw, CFG, conf=0.3))(raw)
    for b in range(2):
        for m in range(2):  # the third box is a crowd
            box_m, kind = np.asarray(batch["boxes"][b, m]), int(batch["classes"][b, m])
            fits = np.abs(np.asarray(found.boxes[b]) - np.clip(box_m, 0, [96, 64, 96, 64])) < 1.5
            assert (fits.all(1) & (found.classes[b] == kind) & found.valid[b]).any()
    for name in ("area", "lane"):
        hard = np.asarray(batch[name]) < 200
        np.testing.assert_array_equal(
            np.asarray(getattr(found, name))[hard], np.asarray(batch[name])[hard]
        )
        unknown = np.asarray(batch[name]) == UNKNOWN
        assert (np.asarray(getattr(found, name))[unknown] > 0).mean() > 0.999


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"box": "giou"}, "expected 'smooth_l1' or 'ciou'"),
        ({"area": (1.0,)}, "2 weights"),
        ({"balance": (1.0, -1.0, 1.0)}, "0 or more"),
        ({"focal_gamma": 0.5}, "gamma 0 or at least 1"),
        ({"lane_tversky": (0.3, 0.0)}, "above 0"),
    ],
)
def test_impossible_settings(change, words):
    with pytest.raises(losses.LossError, match=words):
        LossConfig(**change)


def test_a_mask_of_another_size():
    raw, batch = example()
    batch["lane"] = batch["lane"][:, :32]
    with pytest.raises(losses.LossError, match=r"expected \(3, 64, 96\)"):
        jax.eval_shape(total_loss, raw, batch)
