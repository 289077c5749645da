"""Layers in pinned host memory, and the stream that brings them to the device one after another.

Only matrices move; norms and biases of an offloaded layer stay on the device, where the draft uses
them too. Of a matrix in two parts (`Split`) only the residual moves. The same code
runs on CPU and GPU; mixing host and device arrays in a computation is an error when it is traced.
"""

import collections
import dataclasses
from collections.abc import Collection, Sequence

import jax
import numpy as np

from llm_jax.params import Layer
from subspec_jax.residual.split import Split, is_split

Host = jax.memory.Space.Host


def home(memory_kind: str = "device") -> jax.sharding.Sharding:
    """The first device's memory of that kind. Transfers to such a concrete place are copies; to a
    bare `jax.memory.Space` they are programs, which wait for all compute before them."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=memory_kind)


def to_device(tree):
    """The tree on the device and committed to it, without copying what is there already.

    Programs are compiled apart for committed arguments and for others; what comes from the host is
    committed, so everything is.
    """
    return jax.device_put(tree, home())


def moving(layer: Layer) -> Layer:
    """The layer with True in place of every array that moves when it is streamed, else False."""
    every = lambda value, tree: jax.tree.map(lambda _: value, tree)
    split = lambda w: Split(every(False, w.substitute), every(True, w.residual))
    return jax.tree.map(lambda w: split(w) if is_split(w) else w.ndim > 1, layer, is_leaf=is_split)


def streamed_bytes(layer: Layer) -> int:
    """Bytes that move when the layer is streamed, wherever it lies; arrays or their shapes."""
    pairs = zip(*map(jax.tree.leaves, (layer, moving(layer))), strict=True)
    return sum(a.size * a.dtype.itemsize for a, moves in pairs if moves)


def offload(layer: Layer) -> Layer:
    """The layer with all that is streamed in pinned host memory and the rest on the device."""
    device, host = home(), home("pinned_host")
    return jax.device_put(layer, jax.tree.map(lambda m: host if m else device, moving(layer)))


def on_host(array) -> bool:
    """Whether it is a JAX array in host memory."""
    return isinstance(array, jax.Array) and jax.typeof(array).memory_space == Host


def place(layers: Sequence[Layer], resident: int | Collection[int]) -> tuple[Layer, ...]:
    """The layers with the first `resident`, or those of these numbers, on the device and the others
    offloaded.

    A layer that is already in its place is returned as it is. One layer moves at a time, and moves
    to the host come first, so the device never holds more than before and after.
    """
    placed = list(layers)
    stay = range(resident) if isinstance(resident, int) else resident
    order = sorted(range(len(layers)), key=lambda i: (i in stay, i if i in stay else -i))
    for i in order:
        placed[i] = jax.block_until_ready((to_device if i in stay else offload)(layers[i]))
    return tuple(placed)


@dataclasses.dataclass(frozen=True)
class StreamedLayer:
    """A layer taken apart ahead of time: a pass waits for the host while it starts a copy."""

    leaves: tuple
    structure: jax.tree_util.PyTreeDef
    moves: tuple[int, ...]
    """Numbers of the leaves in host memory."""
    bytes: int
    """Bytes of these leaves."""

    @classmethod
    def of(cls, layer: Layer) -> "StreamedLayer":
        leaves, structure = jax.tree.flatten(layer)
        moves = tuple(i for i, a in enumerate(leaves) if on_host(a))
        return cls(tuple(leaves), structure, moves, sum(leaves[i].nbytes for i in moves))

    def send(self) -> list[jax.Array]:
        """Starts the copies of what is in host memory."""
        return jax.device_put([self.leaves[i] for i in self.moves], home())

    def layer(self, arriving: Sequence[jax.Array] = ()) -> Layer:
        """The layer with the arrived copies in place of the leaves in host memory."""
        leaves = list(self.leaves)
        for i, a in zip(self.moves, arriving, strict=True):
            leaves[i] = a
        return jax.tree.unflatten(self.structure, leaves)


def route(layers: Sequence[Layer]) -> tuple[StreamedLayer, ...]:
    """The layers in the order in which a `Stream` brings them."""
    return tuple(map(StreamedLayer.of, layers))


class Stream:
    """All layers on the device, in order, with the next offloaded ones on their way.

    ahead + 1 copies start when it is made: make it before drafting and the idle link fills all
    buffers meanwhile. Take a layer with `next`, drop it when its block is dispatched, and tell
    `used` an output of that block: the host waits for it, and a copy starts in the layer's place.
    So at most ahead + 1 streamed layers exist at any time.

    It has to be that block, and nothing may be queued behind it: XLA's clients start a copy into
    new memory only behind all compute that was queued before. With the next block queued, copies
    and blocks take turns: 97 instead of 74 ms for a pass of 28 layers of residuals on an H200.
    """

    def __init__(self, layers: Sequence[StreamedLayer], ahead: int = 1):
        # No generator: one that refers to its owner keeps its layers until a collection.
        self._layers, self._taken = layers, 0
        self._coming = collections.deque(layer for layer in layers if layer.moves)
        self._ready, self.bytes = collections.deque(), 0
        self._held: list[jax.Array] = []  # what was copied of the layer handed out last
        for _ in range(ahead + 1):
            self._send()

    def _send(self) -> None:
        """Starts the copy of the next offloaded layer, if there is one."""
        if self._coming:
            layer = self._coming.popleft()
            self._ready.append((layer.bytes, layer.send()))
            self.bytes += layer.bytes

    def __next__(self) -> Layer:
        if self._taken == len(self._layers):
            raise StopIteration
        layer = self._layers[self._taken]
        self._taken += 1
        self._held = []
        if layer.moves:
            if not self._ready:  # nobody said that the layer before was used
                self._send()
            self._held = self._ready.popleft()[1]
        return layer.layer(self._held)

    def used(self, output) -> None:
        """Takes an array that is ready when the block of the last layer has run."""
        if self._held:
            jax.block_until_ready(output)
            for a in self._held:  # now, and not when the runtime has found out: its place is needed
                a.delete()
            self._send()
        self._held = []

    def arrived_bytes(self) -> int:
        """Bytes of the copies that are complete and not yet handed out."""
        return sum(size for size, copies in self._ready if all(a.is_ready() for a in copies))


def rows_of(table, tokens) -> np.ndarray:
    """Rows of an embedding table kept in host memory as a NumPy array: tokens[...] -> [..., D]."""
    return table[np.asarray(tokens)]
