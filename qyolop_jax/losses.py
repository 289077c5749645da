"""The losses: focal for classes and objectness, boxes; Tversky, focal and Jaccard for masks.

All take logits. A sample without labels for a task gets no loss there; if no sample of the batch
has labels, the loss of the task is 0. Weights are those of Q-YOLOP (arXiv 2307.04537).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from qyolop_jax import QyolopError
from qyolop_jax.assign import assign
from qyolop_jax.boxes import cells, ciou, decode_boxes, image_size, iou
from qyolop_jax.config import UNKNOWN, ModelConfig


class LossError(QyolopError):
    """Impossible settings or targets; the message says what was expected."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and exponents; the defaults are the paper's (focal and Tversky: HybridNets')."""

    tasks: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of detection, area and lane in the total."""
    detection: tuple[float, float, float] = (0.5, 1.0, 0.05)
    """Weights of class, objectness and box."""
    area: tuple[float, float] = (0.2, 0.2)
    """Weights of Tversky and focal."""
    lane: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of Tversky, focal and Jaccard."""
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    area_tversky: tuple[float, float] = (0.7, 0.3)
    """Weights of false positives and of false negatives."""
    lane_tversky: tuple[float, float] = (0.7, 0.3)
    tversky_gamma: float = 4 / 3
    box: Literal["smooth_l1", "ciou"] = "smooth_l1"
    box_beta: float = 1 / 9
    """The error, in cells and anchors, at which smooth L1 turns from a square to a line."""
    balance: tuple[float, float, float] = (4.0, 1.0, 0.4)
    """Weights of the objectness of levels 8, 16 and 32, each a mean over its predictions."""

    def __post_init__(self):
        for name, value in vars(self).items():
            for one in value if isinstance(value, tuple) else (value,):
                if not isinstance(one, str) and not abs(one) < 1e9:
                    raise LossError(f"{name} is {value}; expected finite numbers below 1e9")
        for name, count in (("tasks", 3), ("detection", 3), ("area", 2), ("lane", 3),
                            ("balance", 3)):  # fmt: skip
            value = getattr(self, name)
            if len(value) != count or any(w < 0 for w in value):
                raise LossError(f"{name} is {value}; expected {count} weights of 0 or more")
        if self.box not in ("smooth_l1", "ciou"):
            raise LossError(f"box loss {self.box!r}; expected 'smooth_l1' or 'ciou'")
        if not 0 < self.focal_alpha < 1 or not (self.focal_gamma == 0 or self.focal_gamma >= 1):
            raise LossError(
                f"focal alpha {self.focal_alpha}, gamma {self.focal_gamma}; expected alpha "
                "between 0 and 1 and gamma 0 or at least 1 (between them its gradient is infinite)"
            )
        shares = (*self.area_tversky, *self.lane_tversky)
        if len(shares) != 4 or min(*shares, self.box_beta) <= 0 or self.tversky_gamma < 1:
            raise LossError(
                "expected two Tversky weights of each mask and box_beta above 0, and Tversky gamma "
                f"of 1 or more; got {self.area_tversky}, {self.lane_tversky}, {self.box_beta} and "
                f"{self.tversky_gamma}"
            )


def _power(x, gamma: float) -> jax.Array:
    """x^gamma, with gradient 0 at x = 0 also for gamma = 0 (where XLA's is NaN)."""
    return x**gamma if gamma else jnp.ones_like(x)


def binary_focal(logits: jax.Array, target: jax.Array, alpha: float, gamma: float) -> jax.Array:
    """Focal cross-entropy, elementwise, of logits with targets in [0, 1] of the same shape.

    The cross-entropy is weighted by |target - p|^gamma, and by alpha for the target's part and
    1 - alpha for the rest. With targets 0 and 1 it is the focal loss (arXiv 1708.02002); for
    targets between them the minimum is at p = target (quality focal loss, arXiv 2006.04388).
    """
    p = jax.nn.sigmoid(logits)
    entropy = jax.nn.softplus(logits) - logits * target
    balance = alpha * target + (1 - alpha) * (1 - target)
    return balance * _power(jnp.abs(target - p), gamma) * entropy


def smooth_l1(error: jax.Array, beta: float) -> jax.Array:
    """error^2 / (2 beta) up to beta, |error| - beta/2 beyond, elementwise."""
    size = jnp.abs(error)
    return jnp.where(size < beta, error**2 / (2 * beta), size - beta / 2)


def detection_losses(
    raw: dict[str, jax.Array], batch: dict[str, jax.Array], cfg: ModelConfig, loss_cfg: LossConfig
) -> dict[str, jax.Array]:
    """Class, objectness and box losses before their weights, and positives per labelled sample.

    Class and objectness are focal. All are sums over the batch, divided by the number of positives
    (or of labelled samples if that is larger, so that an empty road does not divide by 0). The
    objectness target of a positive is the IoU that its box has now; it is 0 for all others, and
    predictions inside crowds have none. `balance` becomes a weight for each prediction, 1 on
    average. Smooth L1 takes centre errors in cells and size errors in anchors: all four are about
    1 at every level, and bounded, because decoding is.
    """
    size = image_size(raw, cfg)
    fixed = cells(cfg, size)
    decoded = decode_boxes(raw, cfg)
    found = assign(decoded, batch, cfg, size)
    positive = found.box_BP >= 0
    own = jnp.maximum(found.box_BP, 0)
    labelled = batch["labelled"][:, :1]
    count = jnp.sum(positive, dtype=jnp.float32)
    samples = jnp.sum(labelled, dtype=jnp.float32)
    total = jnp.maximum(jnp.maximum(count, samples), 1)
    over_positives = lambda x: jnp.sum(jnp.where(positive, x, 0)) / total

    target = jnp.take_along_axis(batch["boxes"], own[..., None], axis=1)
    overlap = jax.lax.stop_gradient(jnp.where(positive, iou(decoded.boxes_BP4, target), 0))
    counts = [b - a for a, b in zip(fixed.starts, fixed.starts[1:])]
    shares = [b / n for b, n in zip(loss_cfg.balance, counts)]
    scale = fixed.starts[-1] / max(sum(loss_cfg.balance), 1e-9)
    weight = jnp.concatenate([jnp.full((1, n), s * scale) for n, s in zip(counts, shares)], 1)
    focal = lambda x, t: binary_focal(x, t, loss_cfg.focal_alpha, loss_cfg.focal_gamma)
    seen = labelled & ~found.ignore_BP
    objectness = jnp.where(seen, focal(decoded.obj_BP, overlap) * weight, 0)

    classes = jnp.take_along_axis(batch["classes"], own, axis=1)[..., None]
    is_class = classes == jnp.arange(len(cfg.detection), dtype=classes.dtype)[None, None]
    per_class = focal(decoded.cls_BPC, is_class.astype(jnp.float32))

    if loss_cfg.box == "ciou":
        box = 1 - ciou(decoded.boxes_BP4, target)
    else:
        off = decoded.boxes_BP4 - target
        centre = (off[..., :2] + off[..., 2:]) / (2 * fixed.stride_P[None, :, None])
        wh = (off[..., 2:] - off[..., :2]) / fixed.anchor_P2[None]
        box = smooth_l1(jnp.concatenate([centre, wh], -1), loss_cfg.box_beta).sum(-1)
    return {
        "class": over_positives(per_class.sum(-1)),
        "objectness": jnp.sum(objectness) / total,
        "box": over_positives(box),
        "positives": count / jnp.maximum(samples, 1),
    }


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask head and its labels, one plane [B, H, W] per class: fast, unlike rows of 3 values.

    `log_any` are log probabilities of background and of all foreground classes together,
    `log_kind` those of each foreground class, given that a pixel is foreground.
    """

    log_any: tuple[jax.Array, jax.Array]
    log_kind: list[jax.Array]
    p: list[jax.Array]
    target: list[jax.Array]
    truth: jax.Array
    unknown: jax.Array
    counts: jax.Array
    """1 where a pixel counts, 0 elsewhere."""

    def pooled(self, plane: jax.Array) -> jax.Array:
        """Sum over the pixels that count; first over each sample, where float32 is still exact."""
        return jnp.sum(plane * self.counts, (1, 2)).sum()


@jax.custom_vjp
def planes(x_BHWC: jax.Array) -> tuple[jax.Array, ...]:
    """The C planes [B, H, W]. JAX's own gradient of slices would take half the time of the loss."""
    return tuple(x_BHWC[..., c] for c in range(x_BHWC.shape[-1]))


planes.defvjp(lambda x: (planes(x), None), lambda _, gradients: (jnp.stack(gradients, -1),))


def prepare_mask(logits_BHWC: jax.Array, mask_BHW: jax.Array, labelled_B: jax.Array) -> Mask:
    """Probabilities and targets of a head. The target of a class is 1 on its pixels.

    The target of UNKNOWN pixels is the model's own distribution over the foreground classes,
    without gradient, so that no kind is preferred. A value that is not a class, such as IGNORE,
    does not count.
    """
    back, *kinds = planes(logits_BHWC)
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, kinds))
    power = [jnp.exp(v - top) for v in kinds]
    total = sum(power)
    whole = top + jnp.log(total)
    given = [e / total for e in power]
    foreground = jax.nn.sigmoid(whole - back)
    unknown = mask_BHW == UNKNOWN
    target = [(mask_BHW == 0).astype(back.dtype)]
    for c, own in enumerate(given, 1):
        soft = jnp.where(unknown, jax.lax.stop_gradient(own), 0)
        target.append(jnp.where(mask_BHW == c, 1, soft))
    counts = ((mask_BHW <= len(kinds)) | unknown) & labelled_B[:, None, None]
    return Mask(
        (jax.nn.log_sigmoid(back - whole), jax.nn.log_sigmoid(whole - back)),
        [v - whole for v in kinds],
        [jax.nn.sigmoid(back - whole), *(foreground * g for g in given)],
        target,
        mask_BHW,
        unknown,
        counts.astype(back.dtype),
    )


def mask_focal(mask: Mask, alpha: float, gamma: float) -> jax.Array:
    """Focal loss of softmax, summed over pixels and divided by the number of foreground pixels.

    -(1 - p)^gamma log p, where p is the probability of the pixel's class, or of all foreground
    where it is UNKNOWN; weighted by alpha for foreground and 1 - alpha for background. The divisor
    is at least 1 % of the pixels that count, so that a batch without lanes does not dominate.
    """
    back, log_p = mask.log_any
    for c, kind in enumerate(mask.log_kind, 1):
        log_p = log_p + jnp.where(mask.truth == c, kind, 0)
    is_back = mask.truth == 0
    log_p = jnp.minimum(jnp.where(is_back, back, log_p), 0)
    loss = -jnp.where(is_back, 1 - alpha, alpha) * _power(-jnp.expm1(log_p), gamma) * log_p
    foreground = mask.pooled((~is_back).astype(loss.dtype))
    floor = jnp.maximum(0.01 * mask.pooled(jnp.ones_like(loss)), 1)
    return mask.pooled(loss) / jnp.maximum(foreground, floor)


def overlaps(mask: Mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shared, predicted and true mass [C] of every class over the batch.

    Shared is the smaller of probability and target. For targets 0 and 1 that is their product; for
    soft targets it is the form that is largest where the prediction equals the target.
    """
    pairs = list(zip(mask.p, mask.target, strict=True))
    over = lambda planes: jnp.stack([mask.pooled(x) for x in planes])
    return over(jnp.minimum(p, t) for p, t in pairs), over(mask.p), over(mask.target)


def _over_present(loss_C, true_C) -> jax.Array:
    """Mean over the classes that have a pixel in the batch; 0 if none has."""
    present = true_C > 0.5
    count = jnp.maximum(jnp.sum(present, dtype=jnp.float32), 1)
    return jnp.where(present, loss_C, 0).sum() / count


def tversky(
    shared: jax.Array,
    predicted: jax.Array,
    true: jax.Array,
    alpha: float,
    beta: float,
    gamma: float,
) -> jax.Array:
    """(1 - TP / (TP + alpha FP + beta FN))^gamma, a mean over the classes present in the batch."""
    whole = shared + alpha * (predicted - shared) + beta * (true - shared)
    index = shared / jnp.where(whole > 0, whole, 1)
    return _over_present(jnp.maximum(1 - index, 0) ** gamma, true)


def jaccard(shared: jax.Array, predicted: jax.Array, true: jax.Array) -> jax.Array:
    """1 - TP / (TP + FP + FN), soft, a mean over the classes present in the batch."""
    union = predicted + true - shared
    return _over_present(1 - shared / jnp.where(union > 0, union, 1), true)


def mask_losses(
    logits: jax.Array,
    mask: jax.Array,
    labelled: jax.Array,
    loss_cfg: LossConfig,
    shares: tuple[float, float],
) -> dict[str, jax.Array]:
    """Tversky, focal and Jaccard losses of one mask head, before their weights.

    `logits` [B, H, W, C], `mask` [B, H, W] uint8 class indices, `labelled` [B]; `shares` are
    Tversky's weights of false positives and false negatives. LossError where shapes differ.
    """
    if logits.ndim != 4 or mask.shape != logits.shape[:3]:
        raise LossError(
            f"a mask of shape {mask.shape} for logits of shape {logits.shape}; expected "
            f"{logits.shape[:3]}"
        )
    read = prepare_mask(logits.astype(jnp.float32), mask, labelled)
    masses = overlaps(read)
    l = loss_cfg
    return {
        "tversky": tversky(*masses, *shares, l.tversky_gamma),
        "focal": mask_focal(read, l.focal_alpha, l.focal_gamma),
        "jaccard": jaccard(*masses),
    }


def total_loss(
    raw: dict[str, jax.Array], batch: dict[str, jax.Array], cfg: ModelConfig, loss_cfg: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted loss of a batch, a float32 scalar, and its parts before their weights.

    `raw` are the raw outputs of the network, `batch` is a dict of `samples.collate`. Parts are
    named "detection/class", "lane/focal" …; "detection/positives" is not a loss but the mean number
    of predictions with a box. A part with weight 0 is left out.
    """
    weights = {
        "detection": dict(zip(("class", "objectness", "box"), loss_cfg.detection, strict=True)),
        "area": dict(zip(("tversky", "focal"), loss_cfg.area, strict=True)),
        "lane": dict(zip(("tversky", "focal", "jaccard"), loss_cfg.lane, strict=True)),
    }
    with jax.named_scope("losses"):
        found = {"detection": detection_losses(raw, batch, cfg, loss_cfg)}
        for task, at, shares in (
            ("area", 1, loss_cfg.area_tversky), ("lane", 2, loss_cfg.lane_tversky)
        ):  # fmt: skip
            labelled = batch["labelled"][:, at]
            found[task] = mask_losses(raw[task], batch[task], labelled, loss_cfg, shares)
    total, parts = jnp.float32(0), {"detection/positives": found["detection"]["positives"]}
    for task, outer in zip(weights, loss_cfg.tasks, strict=True):
        for name, weight in weights[task].items():
            if outer * weight > 0:
                parts[f"{task}/{name}"] = found[task][name]
                total += outer * weight * found[task][name]
    return total, parts
