"""Checkpoints: a Hugging Face folder of safetensors, or one GGUF file, checked before it is read.

`open_checkpoint(path)` tells which. Headers are compared with the model first, and everything that
is wrong is said at once. Tensors are then read layer by layer, so that peak memory is what `place`
keeps plus one layer.
"""

import abc
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from llm_jax import LLMError
from llm_jax.config import Config, ConfigError, from_hf
from llm_jax.params import MLP, Attention, Layer, Params

ROWS = 512
"""Rows read, cast and transposed at a time: small enough to stay in the CPU's caches."""


LISTED = 10
"""Problems of a checkpoint that are listed one by one: a truncated file has one a tensor."""


class CheckpointError(LLMError):
    """A checkpoint that cannot be used; the message is for the user and needs no traceback."""


def open_checkpoint(path: str | Path) -> "Checkpoint":
    """The checkpoint at `path`: a folder with safetensors, a GGUF file or a folder with one."""
    from llm_jax.gguf import GGUF

    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; expected a folder with safetensors or a .gguf file"
        )
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUF(path)
        hint = f"; pass its folder, {path.parent}" if path.suffix == ".safetensors" else ""
        raise CheckpointError(f"{path} is neither a folder with safetensors nor a .gguf file{hint}")
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        return Folder(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GGUF(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{path} holds several GGUF files; pass one of them: {names}")
    inside = sorted(file.name for file in path.iterdir())
    shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    raise CheckpointError(
        f"{path} is not a checkpoint: it holds {shown or 'nothing'}; "
        f"expected config.json and *.safetensors (with {INDEX} if there are several), "
        "or a .gguf file"
    )


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as the header of its file describes it; matrices are [out, in]."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the headers of a checkpoint say, and what is wrong with the files themselves."""

    tensors: dict[str, Stored]
    problems: tuple[str, ...] = ()
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    """The file each tensor should be in, where an index says so."""
    unreadable: frozenset[str] = frozenset()


def shapes(cfg: Config) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Shapes in the file ([out, in]) by field: of the model's own tensors, and of one layer's."""
    heads, kv_heads, d = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, (cfg.d_model,)
    model = dict(embed_VD=(cfg.vocab, cfg.d_model), norm=d)
    if not cfg.tied:
        model["head_DV"] = (cfg.vocab, cfg.d_model)
    layer = {"attn_norm": d, "mlp_norm": d}
    layer |= {name: shape[::-1] for name, shape in cfg.layer_matrices.items()}
    if cfg.qkv_bias:
        layer |= dict(q_bias=(heads,), k_bias=(kv_heads,), v_bias=(kv_heads,))
    if cfg.qk_norm:
        layer |= dict(q_norm=(cfg.head_dim,), k_norm=(cfg.head_dim,))
    return model, layer


class Checkpoint(abc.ABC):
    """A model on disk. A format says what it holds (`contents`) and how rows of it are read."""

    path: Path
    names: ClassVar[dict[str, str]]
    """Field -> name in the file, `{}` standing for the layer."""
    dtypes: ClassVar[frozenset[str]]
    harmless: ClassVar[re.Pattern]
    """Names that may be there and are not needed."""

    @abc.abstractmethod
    def config(self, dtype: str | None = None) -> Config:
        """The model's description, in `dtype` or else the dtype the checkpoint was made in."""

    @abc.abstractmethod
    def tokenizer(self) -> Any:
        """The model's `llm_jax.tokenizer.Tokenizer`."""

    @property
    @abc.abstractmethod
    def contents(self) -> Contents:
        """What the headers say; read once."""

    @abc.abstractmethod
    def reader(self, tensor: Stored, field: str, cfg: Config) -> Callable[[int, int], np.ndarray]:
        """A function (start, stop) -> those rows of a tensor, in any float dtype."""

    def check(self, cfg: Config) -> None:
        """Raises one `CheckpointError` listing all that keeps this from filling the model."""
        found, problems = self.contents, list(self.contents.problems)
        model, layer = shapes(cfg)
        needed = {self.names[field]: shape for field, shape in model.items()}
        for index in range(cfg.layers):
            needed |= {self.names[field].format(index): shape for field, shape in layer.items()}
        for name, shape in needed.items():
            tensor = found.tensors.get(name)
            if tensor is None:
                place = found.places.get(name)
                if not found.unreadable or (place and place not in found.unreadable):
                    problems.append(f"{place or self.path.name}: {name} is missing")
                continue
            where = f"{tensor.file.name}: {name}"
            if tensor.shape != shape:
                problems.append(f"{where} has shape {list(tensor.shape)}; expected {list(shape)}")
            if tensor.dtype not in self.dtypes:
                known = ", ".join(sorted(self.dtypes))
                problems.append(f"{where} is stored as {tensor.dtype}; supported are {known}")
        for name, tensor in found.tensors.items():
            tied_head = cfg.tied and name == self.names["head_DV"]
            if not (name in needed or tied_head or self.harmless.search(name)):
                problems.append(f"{tensor.file.name}: {name} is not part of this model")
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            more = len(problems) - LISTED
            shown = problems[:LISTED] + ([f"and {more} more"] if more > 0 else [])
            lines = "".join(f"\n  {line}" for line in shown)
            raise CheckpointError(f"{self.path} cannot be loaded, {count}:{lines}")

    def load(
        self,
        cfg: Config,
        place_layer: Callable[[int, Layer], Layer] | None = None,
        place: Callable[[str, np.ndarray], Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Params:
        """The parameters in `cfg.dtype`, after `check`; arrays go to the default device.

        `place_layer(index, layer)` and `place(name, array)` may put them elsewhere: they get fresh
        C-contiguous NumPy arrays, matrices [in, out], first embed_VD, norm and head_DV, then each
        layer. `progress(done, total)` counts layers.
        """
        self.check(cfg)
        place_layer = place_layer or (lambda index, layer: jax.device_put(layer))
        place = place or (lambda name, array: jax.device_put(array))
        tables = {name: place(name, self.read(name, cfg)) for name in shapes(cfg)[0]}
        layers = []
        for index in range(cfg.layers):
            layers.append(place_layer(index, self.layer(index, cfg)))
            if progress:
                progress(index + 1, cfg.layers)
        return Params(layers=tuple(layers), **tables)

    def read(self, field: str, cfg: Config, index: int | None = None) -> np.ndarray:
        """One tensor in `cfg.dtype`, of a layer where `index` is given; matrices are [in, out]."""
        tensor = self.contents.tensors[self.names[field].format(index)]
        return _array(tensor, self.reader(tensor, field, cfg), field != "embed_VD", cfg.dtype)

    def layer(self, index: int, cfg: Config) -> Layer:
        """One layer as NumPy arrays in `cfg.dtype`."""
        w = {field: self.read(field, cfg, index) for field in shapes(cfg)[1]}
        attn = {field.name: w.get(field.name) for field in dataclasses.fields(Attention)}
        mlp = MLP(w["gate"], w["up"], w["down"])
        return Layer(w["attn_norm"], Attention(**attn), w["mlp_norm"], mlp)


def _array(tensor: Stored, rows: Callable, transpose: bool, dtype: str) -> np.ndarray:
    """The whole tensor as a fresh array, matrices turned to [in, out] block by block."""
    transpose = transpose and len(tensor.shape) > 1
    out = np.empty(tensor.shape[::-1] if transpose else tensor.shape, np.dtype(dtype))
    view = out.T if transpose else out
    for start in range(0, tensor.shape[0], ROWS):
        stop = min(start + ROWS, tensor.shape[0])
        view[start:stop] = rows(start, stop)
    return out


INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Folder(Checkpoint):
    """config.json and one or more safetensors files, named as `transformers` names them."""

    path: Path

    names: ClassVar = dict(
        embed_VD="model.embed_tokens.weight",
        norm="model.norm.weight",
        head_DV="lm_head.weight",
        attn_norm="model.layers.{}.input_layernorm.weight",
        mlp_norm="model.layers.{}.post_attention_layernorm.weight",
        gate="model.layers.{}.mlp.gate_proj.weight",
        up="model.layers.{}.mlp.up_proj.weight",
        down="model.layers.{}.mlp.down_proj.weight",
        **{name: f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
        **{f"{name}_bias": f"model.layers.{{}}.self_attn.{name}_proj.bias" for name in "qkv"},
        **{f"{name}_norm": f"model.layers.{{}}.self_attn.{name}_norm.weight" for name in "qk"},
    )
    dtypes: ClassVar = frozenset(("BF16", "F16", "F32"))
    harmless: ClassVar = re.compile(r"rotary_emb\.inv_freq$")

    def config(self, dtype: str | None = None) -> Config:
        if not (self.path / "config.json").exists():
            raise CheckpointError(
                f"{self.path} has no config.json; download it from the model's repository too"
            )
        hf = self._json("config.json")
        if quantization := hf.get("quantization_config"):
            raise CheckpointError(
                f"{self.path}: the weights are quantized ({quantization.get('quant_method')}); "
                "use the unquantized repository or a GGUF file"
            )
        try:
            return from_hf(hf, dtype)
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error

    def tokenizer(self):
        from llm_jax.tokenizer import from_folder

        return from_folder(self.path)

    @functools.cached_property
    def contents(self) -> Contents:
        problems, tensors, unreadable = [], {}, set()
        places = self._json(INDEX).get("weight_map", {}) if (self.path / INDEX).exists() else {}
        # Without an index: model.safetensors alone, because some repositories add a second copy.
        whole = [f for f in ("model.safetensors",) if (self.path / f).exists()]
        files = sorted(set(places.values())) or whole
        for name in files or sorted(file.name for file in self.path.glob("*.safetensors")):
            if not (self.path / name).exists():
                problems.append(f"{name} is missing, though {INDEX} names it; download it")
                unreadable.add(name)
                continue
            try:
                shard = self._handle(name)
            except Exception as error:  # SafetensorError, OSError: one cause, one advice
                problems.append(f"{name} is truncated or corrupt ({error}); download it again")
                unreadable.add(name)
                continue
            for key in shard.keys():  # noqa: SIM118 - a safe_open handle is not iterable
                if key in tensors:
                    problems.append(f"{name}: {key} is also in {tensors[key].file.name}")
                    continue
                header = shard.get_slice(key)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                tensors[key] = Stored(self.path / name, key, shape, dtype)
        return Contents(tensors, tuple(problems), places, frozenset(unreadable))

    def reader(self, tensor: Stored, field: str, cfg: Config):
        rows = self._handle(tensor.file.name).get_slice(tensor.name)
        return lambda start, stop: rows[start:stop]

    @functools.cached_property
    def _handles(self) -> dict[str, Any]:
        return {}

    def _handle(self, name: str):
        """The file's open (memory-mapped) safetensors handle."""
        from safetensors import safe_open

        if name not in self._handles:
            self._handles[name] = safe_open(str(self.path / name), framework="numpy")
        return self._handles[name]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{self.path / name} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name} holds {type(value).__name__}, not an object")
        return value
