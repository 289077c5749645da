"""Assignment against a brute-force search in float64, and what must hold of any assignment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qyolop_jax import assign
from qyolop_jax.boxes import Decoded, anchors, cells
from qyolop_jax.config import ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (64, 96)
CFG = ModelConfig(size=(256, 384))  # anchors large enough for 64 x 96 images
FIXED = cells(CFG, SIZE)
P = FIXED.starts[-1]
M = 6


def scene(seed, boxes=M, samples=2):
    """Random predictions, some near a box, and `boxes` true boxes a sample, padded to M."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform([2, 2], [94, 62], (samples, M, 2))
    half = rng.uniform(2, 24, (samples, M, 2))
    half[:, 1] = half[:, 0] + rng.uniform(0, 2, (samples, 2))  # two that compete
    centre[:, 1] = centre[:, 0] + rng.uniform(-3, 3, (samples, 2))
    low = np.maximum(centre - half, 0)
    true = np.concatenate([low, np.minimum(centre + half, [SIZE[1], SIZE[0]])], -1)
    middle = (FIXED.xy_P2 + rng.uniform(-0.5, 1.5, (samples, P, 2))) * FIXED.stride_P[:, None]
    wh = FIXED.anchor_P2 * rng.uniform(0.3, 3, (samples, P, 2))
    found = np.concatenate([middle - wh / 2, middle + wh / 2], -1)
    decoded = Decoded(
        jnp.float32(found),
        jnp.float32(rng.normal(-2, 2, (samples, P))),
        jnp.float32(rng.normal(0, 2, (samples, P, 4))),
    )
    batch = {
        "boxes": jnp.float32(true),
        "classes": jnp.int32(rng.integers(0, 4, (samples, M))),
        "valid": jnp.asarray(np.arange(M)[None] < np.full((samples, 1), boxes)),
        "crowd": jnp.zeros((samples, M), bool),
        "labelled": jnp.ones((samples, 3), bool),
    }
    return decoded, batch


@functools.partial(jax.jit)
def run(decoded, batch):
    return assign.assign(decoded, batch, CFG, SIZE)


def brute_force(decoded, batch, b):
    """Index of the box of each prediction of sample b: loops over everything, float64."""
    found, true = np.float64(decoded.boxes_BP4[b]), np.float64(batch["boxes"][b])
    sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))
    p = np.sqrt(sigmoid(decoded.obj_BP[b])[:, None] * sigmoid(decoded.cls_BPC[b]))
    claims = {}
    for m in range(M):
        if not batch["valid"][b, m] or batch["crowd"][b, m] or not batch["labelled"][b, 0]:
            continue
        wh = true[m, 2:] - true[m, :2]
        options = []
        for i in range(P):
            ratio = wh / FIXED.anchor_P2[i]
            if max(ratio.max(), (1 / ratio).max()) >= 4:
                continue
            middle = (true[m, :2] + true[m, 2:]) / 2 / FIXED.stride_P[i]
            dx, dy = np.abs(middle - FIXED.xy_P2[i] - 0.5)  # from the middle of the cell
            if not ((dy < 0.5 and dx < 1) or (dx < 0.5 and dy < 1)):
                continue
            low = np.maximum(found[i, :2], true[m, :2])
            high = np.minimum(found[i, 2:], true[m, 2:])
            shared = np.prod(np.maximum(high - low, 0))
            iou = shared / (np.prod(found[i, 2:] - found[i, :2]) + np.prod(wh) - shared)
            right = np.arange(4) == int(batch["classes"][b, m])
            cost = -np.log(np.where(right, p[i], 1 - p[i])).sum() - 3 * np.log(iou + 1e-8)
            options.append((cost, i, iou))
        k = max(int(sum(sorted((o[2] for o in options), reverse=True)[:10])), 1)
        for cost, i, _ in sorted(options)[:k]:
            claims.setdefault(i, []).append((cost, m))
    return np.array([min(claims[i])[1] if i in claims else -1 for i in range(P)]), claims


@given(st.integers(0, 10**6), st.integers(0, M))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_is_the_brute_force(seed, boxes):
    decoded, batch = scene(seed, boxes)
    got = run(decoded, batch)
    for b in range(2):
        np.testing.assert_array_equal(got.box_BP[b], brute_force(decoded, batch, b)[0])
    assert not got.ignore_BP.any()


def test_some_of_those_scenes_have_conflicts_and_several_predictions_a_box():
    contested, most = 0, 0
    for seed in range(8):
        decoded, batch = scene(seed)
        found, claims = brute_force(decoded, batch, 0)
        contested += sum(len(c) > 1 for c in claims.values())
        most = max(most, np.bincount(found[found >= 0]).max())
    assert contested >= 3 and most >= 3


@given(st.integers(0, 10**6), st.permutations(range(M)))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_order_of_boxes_does_not_matter(seed, order):
    decoded, batch = scene(seed)
    turned = {k: v if k == "labelled" else v[:, np.array(order)] for k, v in batch.items()}
    before, after = run(decoded, batch).box_BP, np.asarray(run(decoded, turned).box_BP)
    np.testing.assert_array_equal(np.where(after >= 0, np.array(order)[after], -1), before)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_positives_are_near_their_box_and_of_a_fitting_anchor(seed):
    decoded, batch = scene(seed)
    found = np.asarray(run(decoded, batch).box_BP)
    for b, i in np.argwhere(found >= 0):
        box = np.float64(batch["boxes"][b, found[b, i]])
        ratio = (box[2:] - box[:2]) / FIXED.anchor_P2[i]
        assert max(ratio.max(), (1 / ratio).max()) < 4
        cell = (box[:2] + box[2:]) / 2 / FIXED.stride_P[i] - FIXED.xy_P2[i]
        assert (cell > -0.5).all() and (cell < 1.5).all()  # what decoding can reach


def test_two_equal_boxes_share_no_prediction():
    decoded, batch = scene(3, 2, 1)
    same = batch["boxes"][:, :1].repeat(M, 1)
    batch |= {"boxes": same, "classes": jnp.zeros_like(batch["classes"])}
    found = np.asarray(run(decoded, batch).box_BP[0])
    assert (found == 0).any() and not (found == 1).any()  # the earlier one keeps what both want


@pytest.mark.parametrize("what", ["padding", "crowd", "unlabelled", "flat", "huge"])
def test_boxes_that_get_nothing(what):
    decoded, batch = scene(4)
    if what == "padding":
        batch["valid"] = jnp.zeros_like(batch["valid"])
    elif what == "crowd":
        batch["crowd"] = jnp.ones_like(batch["crowd"])
    elif what == "unlabelled":
        batch["labelled"] = jnp.array([[False, True, True]] * 2)
    elif what == "flat":
        batch["boxes"] = batch["boxes"].at[..., 2].set(batch["boxes"][..., 0])
    else:  # beyond four times the largest anchor
        batch["boxes"] = jnp.tile(jnp.array([[[0.0, 0, 4 * anchors(CFG).max() + 1, 8]]]), (2, M, 1))
    got = run(decoded, batch)
    assert (got.box_BP == -1).all()
    assert got.ignore_BP.any() == (what == "crowd")


def test_predictions_inside_a_crowd_are_left_alone():
    decoded, batch = scene(5, samples=1)
    crowd = np.array([20.0, 10, 70, 50])
    batch["boxes"] = batch["boxes"].at[0, 0].set(jnp.float32(crowd))
    batch["crowd"] = batch["crowd"].at[0, 0].set(True)
    got = run(decoded, batch)
    for i, box in enumerate(np.float64(decoded.boxes_BP4[0])):
        shared = np.maximum(np.minimum(box[2:], crowd[2:]) - np.maximum(box[:2], crowd[:2]), 0)
        inside = np.prod(shared) > 0.5 * np.prod(box[2:] - box[:2])
        assert got.ignore_BP[0, i] == (inside and got.box_BP[0, i] < 0)
    assert got.ignore_BP.any() and not got.ignore_BP.all()
    assert (got.box_BP != 0).all() and (got.box_BP > 0).any()


@pytest.mark.slow
def test_carries_no_gradient():
    decoded, batch = scene(6)

    def loss(obj):
        found = assign.assign(
            Decoded(decoded.boxes_BP4, obj, decoded.cls_BPC), batch, CFG, SIZE
        ).box_BP
        return jnp.where(found >= 0, obj, 0).sum()

    gradient = np.asarray(jax.grad(loss)(decoded.obj_BP))
    np.testing.assert_array_equal(gradient, run(decoded, batch).box_BP >= 0)
