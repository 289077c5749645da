"""The graph's sizes against the published ones, and that it holds together."""

import pytest

from qyolop_jax.config import ModelConfig, ModelConfigError
from qyolop_jax.graph import GraphError, build_graph, count

WIDTHS = {  # parameters M, multiply-adds G of all / backbone / area / lane at 384x640
    1.0: (37.4, 38.8, 19.8, 4.7, 3.1),
    0.75: (21.1, 22.0, 11.2, 2.7, 1.8),
    0.5: (9.4, 9.9, 5.0, 1.2, 0.85),
    0.375: (5.3, 5.7, 2.9, 0.7, 0.5),
    0.25: (2.4, 2.6, 1.3, 0.34, 0.25),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_counts(width):
    counts = count(build_graph(ModelConfig(width)), (384, 640))
    parameters, macs, backbone, area, lane = WIDTHS[width]
    near = lambda n, unit, want, rel=0.05: n / unit == pytest.approx(want, rel=rel)
    assert near(counts.total()[0], 1e6, parameters)
    assert near(counts.total()[1], 1e9, macs)
    assert near(counts.total("stem")[1] + counts.total("backbone")[1], 1e9, backbone)
    assert near(counts.total("area")[1], 1e9, area)
    assert near(counts.total("lane")[1], 1e9, lane, 0.12)  # its decoder is ours


def test_without_masks_it_is_yolov7():
    """104 GFLOP and 36.9 M parameters, as published, at 640x640 with 80 classes."""
    cfg = ModelConfig(detection=tuple(map(str, range(80))), size=(640, 640))
    counts = count(build_graph(cfg), (640, 640))
    parameters, macs = counts.total()
    for task in ("area", "lane"):
        parameters -= counts.total(task)[0]
        macs -= counts.total(task)[1]
    assert 2 * macs / 1e9 == pytest.approx(104, rel=0.01)
    assert parameters / 1e6 == pytest.approx(36.9, rel=0.01)


def test_nodes_come_after_their_inputs_and_are_used():
    graph = build_graph(ModelConfig(0.25))
    seen = set()
    for node in graph.nodes:
        assert set(node.inputs) <= seen and node.name not in seen
        seen.add(node.name)
        assert graph.consumers(node.name) or node.name in graph.outputs
    assert graph.node("detect.16").channels == 27
    with pytest.raises(GraphError, match="no node 'nonsense'"):
        graph.node("nonsense")


def test_decoders_tap_before_and_behind_the_fpn():
    graph = build_graph(ModelConfig(1.0))

    def before(name):
        found = {name}
        for node in reversed(graph.nodes):
            if node.name in found:
                found |= set(node.inputs)
        return found

    assert not any(n.startswith("neck.") for n in before("area"))
    assert "neck.8.out" in before("lane") and "neck.n16.out" not in before("lane")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(width=0), "width is 0"),
        (dict(activation="gelu"), "possible are silu, relu and hardswish"),
        (dict(size=(100, 640)), "multiples of 32"),
        (dict(detection=()), "at least one object class"),
        (dict(anchors=(((1, 2),),)), "three anchors"),
    ],
)
def test_what_cannot_be_is_said(changes, words):
    with pytest.raises(ModelConfigError, match=words):
        ModelConfig(**changes)
