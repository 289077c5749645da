"""The doors through which files come in: a valid file each, and how it is read."""

import base64
import contextlib
import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_experts
from mutations import mutated_bytes, mutated_json, mutated_lines
from PIL import Image
from safetensors.numpy import load_file, save_file

from experiments.common import records
from experiments.common.cli import USER_ERRORS
from experiments.common.unfinished import FIELDS, Unfinished, problem
from experiments.speculative import benchmarks, report
from experiments.speculative.replay import acceptance_trace
from llm_jax.digest import array_digest, json_digest
from llm_jax.formats import open_checkpoint
from llm_jax.registry import open_model
from llm_jax.testing import tiny_config, tiny_params, write_gguf, write_safetensors
from palu_jax import store
from palu_jax.calibration import calibrate
from palu_jax.convert import Recipe, to_palu
from palu_jax.format import LatentFormat
from palu_jax.rank import group_sizes, uniform_ranks
from qyolop_jax.config import ModelConfig
from qyolop_jax.formats import read_image
from qyolop_jax.model import initial
from qyolop_jax.readers import Bdd100k
from qyolop_jax.weights import load_weights, save_weights
from subspec_jax.methods import Method
from subspec_jax.residual.convert import convert
from subspec_jax.residual.files import Converted
from subspec_jax.tree import TreeSpec

CFG = tiny_config("qwen2", layers=1, d_model=32, d_ff=64)
SECONDS = 20
"""A reader that takes longer hangs; each valid file takes less than one."""

MUTATIONS = {"bytes": mutated_bytes, "json": mutated_json, "lines": mutated_lines}


@dataclasses.dataclass(frozen=True)
class Door:
    """One kind of file."""

    make: Callable[[Path], Path]
    """Writes a valid one below a folder, and what belongs to it; the path of the file."""
    read: Callable[[Path], Any]
    """Reads the file at that path as the program does; its result in a form that is comparable."""
    kind: str
    checked: bool = False
    """It has checksums: what is accepted must be what was written."""

    def outcome(self, file: Path, damaged: bytes, valid: Any) -> str:
        """What reading a damaged file does: named, accepted or silent; raises what is not named."""
        before = file.read_bytes()
        file.write_bytes(damaged)
        try:
            return self.read_outcome(file, valid)
        finally:
            file.write_bytes(before)

    def read_outcome(self, file: Path, valid: Any = None) -> str:
        """The same, of what is at the path now."""
        try:
            with at_most(SECONDS):
                found = self.read(file)
        except (*USER_ERRORS, OSError):
            return "named"
        return "silent" if self.checked and found != valid else "accepted"


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in this thread when the block takes longer."""

    def late(*_):
        raise RuntimeError(f"no end in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def digest(tree: Any) -> str:
    return json_digest([array_digest(a) for a in jax.tree.leaves(tree)])


def checkpoint(name: str, shards: int = 1, tokenizer: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write_safetensors(folder, tiny_params(CFG), CFG, shards, tokenizer) / name

    return make


def quantized(name: str) -> Callable[[Path], Path]:
    """A GPTQ checkpoint: random codes, zero points and scales in the place of each matrix."""

    def make(folder: Path) -> Path:
        file = checkpoint("model.safetensors")(folder)
        named, rng = load_file(file), np.random.default_rng(0)
        codes = lambda *shape: rng.integers(-(2**31), 2**31, shape).astype(np.int32)
        for weight in [name for name in named if name.endswith("_proj.weight")]:
            (out, inputs), stem = named.pop(weight).shape, weight.removesuffix("weight")
            named[f"{stem}qweight"] = codes(inputs // 8, out)
            named[f"{stem}qzeros"] = codes(inputs // 16, out // 8)
            named[f"{stem}scales"] = rng.random((inputs // 16, out)).astype(np.float16)
            named[f"{stem}g_idx"] = (np.arange(inputs) // 16).astype(np.int32)
        save_file(named, file)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = dict(quant_method="gptq", bits=4, group_size=16)
        (folder / "config.json").write_text(json.dumps(config))
        return folder / name

    return make


def adapter(name: str) -> Callable[[Path], Path]:
    """A LoRA adapter of a checkpoint in a folder beside it."""

    def make(folder: Path) -> Path:
        checkpoint("model.safetensors")(folder / "base")
        rng, stem = np.random.default_rng(0), "base_model.model.model.layers.0.mlp.up_proj.lora_"
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        (folder / "adapter").mkdir(parents=True)
        named = {f"{stem}A.weight": draw(4, 32), f"{stem}B.weight": draw(64, 4)}
        save_file(named, folder / "adapter" / "adapter_model.safetensors")
        settings = dict(peft_type="LORA", r=4, lora_alpha=8, use_dora=False, bias="none")
        settings |= dict(alpha_pattern={"up_proj": 3}, rank_pattern={"q_proj": 2})
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        return folder / "adapter" / name

    return make


def adapted(path: Path) -> str:
    found = open_model(path.parents[1] / "base", path.parent)
    cfg = found.config("float32")
    return digest(found.load(cfg)) + repr(cfg)


def gguf(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_gguf(folder / "m.gguf", tiny_params(CFG), CFG)


def gguf_part(folder: Path) -> Path:
    """The second of the parts of a split file."""
    first = write_gguf(folder / "m.gguf", tiny_params(CFG), CFG, split=5)
    return min(first.parent.glob("m-00002-of-*.gguf"))


def weights(path: Path) -> str:
    found = open_checkpoint(path if path.suffix == ".gguf" else path.parent)
    cfg = found.config("float32")
    found.check(cfg)
    return digest(found.load(cfg)) + repr(cfg)


PARTS = [dict(start=n, boxes=[[0.1, 2.5]], edges=dict(any=[[None]])) for n in range(3)]


def unfinished(folder: Path) -> Path:
    """What an interrupted evaluation leaves."""
    with contextlib.suppress(KeyboardInterrupt), Unfinished(folder / "scores.jsonl", 1) as work:
        for part in PARTS:
            work.add("part", part)
        raise KeyboardInterrupt
    return folder / "scores.jsonl.unfinished" / "records.jsonl"


def parts(path: Path) -> list[Any]:
    """The parts that an evaluation would take: those that were written, and perhaps not all."""
    found = [r["value"] for r in records.read(path, FIELDS, problem)]
    assert all(part in PARTS for part in found)
    return found


def text(path: Path) -> Any:
    found = open_checkpoint(path if path.suffix == ".gguf" else path.parent)
    tokenizer = found.tokenizer()
    return tokenizer.encode("A thimble."), tokenizer.chat([{"role": "user", "content": "Hi."}])


def converted(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        cfg = dataclasses.replace(CFG, dtype="bfloat16")
        source = write_safetensors(folder / "model", tiny_params(cfg), cfg, tokenizer=False)
        return convert(open_checkpoint(source), cfg, folder / "out", group=16).path / name

    return make


def converted_experts(folder: Path) -> Path:
    checkpoint = open_checkpoint(tiny_experts.write(folder / "model", layers=2)[0])
    cfg = checkpoint.config("bfloat16")
    return convert(checkpoint, cfg, folder / "out", group=16).path / "layer-00000.safetensors"


def converted_weights(path: Path) -> str:
    model = Converted(path.parent)
    for index in (None, *range(model.cfg.layers)):
        model.check(index)
    layers = [model.layer(i) for i in range(model.cfg.layers)]
    return digest([layers, model.tables, model.head]) + json.dumps(model.manifest)


def jsonl(*rows: dict) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for row in rows:
            records.append(folder / "records.jsonl", row)
        return folder / "records.jsonl"

    return make


COLUMNS = ("emitted", "accepted", "drafted", "depth", "draft_s", "verify_s", "other_s")
COLUMNS += ("streamed_bytes", "pass_bytes")
TURN = dict(method="chain", benchmark="b", sample="1", turn=0, category="c", text="t", settings="s")
TURN |= dict(prompt_tokens=3, token_ids=[1, 2, 3], prefill_s=0.5, decode_s=1.0, peak_bytes=9)
TURN |= dict(rounds={name: [2, 1] for name in COLUMNS} | {"accepted": [1, 0]}, lossless=None)
CHAIN = Method("chain", TreeSpec("chain", 4))


def summary(path: Path) -> str:
    return repr(report.summarize(records.read(path, problem=report.problem)))


def trace(path: Path) -> list[int]:
    lengths = acceptance_trace(str(path), CHAIN)()
    return [next(lengths) for _ in range(5)]


def questions(path: Path) -> Any:
    return benchmarks.load_conversations("mt-bench", path.parent)


def benchmark(suffix: str) -> Callable[[Path], Path]:
    rows = [
        {"question_id": i, "category": "writing", "turns": [f"Write {i}.", "Shorter."]}
        for i in range(3)
    ]

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"mt-bench{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return make


TEXT = [np.random.default_rng(0).integers(0, CFG.vocab, (2, 12)) for _ in range(2)]


@functools.cache
def low_rank():
    """(parameters, statistics, recipe) of the tiny model."""
    params, sizes = tiny_params(CFG), group_sizes(CFG.kv_heads, 2)
    ranks = uniform_ranks(CFG.layers, sizes, CFG.head_dim, 0.5)
    recipe = Recipe(sizes, ranks, "gradient", LatentFormat(4, 4))
    return params, calibrate(params, TEXT, CFG), recipe


def palu_store(name: str) -> Callable[[Path], Path]:
    """One of the files of a store: the description, or the largest one of the factors."""

    def make(folder: Path) -> Path:
        params, found, recipe = low_rank()
        store.save(folder / "palu", to_palu(params, CFG, recipe, found), CFG, recipe, "tiny")
        files = (folder / "palu").rglob(name)
        return max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)

    return make


def restored(path: Path) -> str:
    folder = next(above for above in path.parents if above.name == "palu")
    return digest(store.restore(folder, low_rank()[0], CFG))


def statistics(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    calibrate(low_rank()[0], TEXT, CFG, path=folder / "statistics.npz")
    return folder / "statistics.npz"


def continued(path: Path) -> str:
    found = calibrate(low_rank()[0], TEXT, CFG, path=path)
    return digest([list(vars(layer).values()) for layer in found.layers])


NETWORK = ModelConfig(0.125, "relu", size=(64, 96))


def network(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "network.safetensors", NETWORK, initial(NETWORK))
    return folder / "network.safetensors"


def picture(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"a{suffix}")
        return folder / f"a{suffix}"

    return make


OBJECT = {"category": "car", "box2d": {"x1": 1.0, "y1": 2.0, "x2": 9.0, "y2": 8.0}}
FRAMES = [{"name": "a.jpg", "labels": [OBJECT]}, {"name": "b.jpg", "labels": [OBJECT, OBJECT]}]


def labels(folder: Path) -> Path:
    """Images, masks and labels as BDD100K has them."""
    root = folder / "bdd100k"
    for name in ("a", "b"):
        for place, suffix, mode in LAYOUT:
            path = root / place / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (32, 20)).save(path)
    file = root / "labels" / "det_20" / "det_val.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(FRAMES))
    return file


LAYOUT = (
    ("images/100k/val", ".jpg", "RGB"),
    ("labels/drivable/masks/val", ".png", "L"),
    ("labels/lane/masks/val", ".png", "L"),
)


def samples(path: Path) -> str:
    data = Bdd100k(path.parents[2], "val")
    return digest([dataclasses.asdict(data[i]) for i in range(len(data))])


def tokenizer_model(name: str) -> Callable[[Path], Path]:
    """One of the tokenizer's files of a folder without tokenizer.json."""

    def make(folder: Path) -> Path:
        checkpoint("config.json")(folder)
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁A"]
        if name == "tokenizer.model":
            sized = lambda tag, data: bytes((tag, len(data))) + data
            piece = lambda text: sized(10, text.encode()) + b"\x15" + np.float32(-1).tobytes()
            data = b"".join(sized(10, piece(token)) for token in [*tokens, "A"])
            (folder / name).write_bytes(data + sized(18, b"\x18\x02") + sized(26, b"\x20\x00"))
        else:
            entry = lambda i: dict(rank=i, token_bytes=base64.b64encode(bytes([i])).decode())
            config = dict(pattern="\\s+|\\S+", version="v3")
            config |= dict(default_vocab_size=276, default_num_special_tokens=20)
            vocab = [entry(i) for i in range(256)]
            (folder / name).write_text(json.dumps(dict(config=config, vocab=vocab)))
        return folder / name

    return make


DOORS = {
    "safetensors": Door(checkpoint("model.safetensors"), weights, "bytes"),
    "config": Door(checkpoint("config.json"), weights, "json"),
    "index": Door(checkpoint("model.safetensors.index.json", shards=2), weights, "json"),
    "generation_config": Door(checkpoint("generation_config.json", tokenizer=True), text, "json"),
    "tokenizer": Door(checkpoint("tokenizer.json", tokenizer=True), text, "json"),
    "tokenizer_config": Door(checkpoint("tokenizer_config.json", tokenizer=True), text, "json"),
    "template": Door(checkpoint("chat_template.jinja", tokenizer=True), text, "bytes"),
    "quantized": Door(quantized("model.safetensors"), weights, "bytes"),
    "quantized config": Door(quantized("config.json"), weights, "json"),
    "adapter": Door(adapter("adapter_model.safetensors"), adapted, "bytes"),
    "adapter config": Door(adapter("adapter_config.json"), adapted, "json"),
    "tokenizer.model": Door(tokenizer_model("tokenizer.model"), text, "bytes"),
    "tekken": Door(tokenizer_model("tekken.json"), text, "json"),
    "GGUF weights": Door(gguf, weights, "bytes"),
    "GGUF part": Door(gguf_part, weights, "bytes"),
    "GGUF text": Door(gguf, text, "bytes"),
    "converted layer": Door(
        converted("layer-00000.safetensors"), converted_weights, "bytes", checked=True
    ),
    "converted experts": Door(converted_experts, converted_weights, "bytes", checked=True),
    "converted tables": Door(
        converted("model.safetensors"), converted_weights, "bytes", checked=True
    ),
    "converted manifest": Door(converted("manifest.json"), converted_weights, "json", checked=True),
    "records": Door(jsonl(TURN, TURN | {"turn": 1}), summary, "lines"),
    "unfinished work": Door(unfinished, parts, "lines"),
    "trace": Door(jsonl(TURN), trace, "lines"),
    "benchmark": Door(benchmark(".jsonl"), questions, "lines"),
    "benchmark parquet": Door(benchmark(".parquet"), questions, "bytes"),
    "Palu store": Door(palu_store(store.NAME), restored, "json", checked=True),
    "Palu factors": Door(palu_store("*"), restored, "bytes", checked=True),
    "Palu statistics": Door(statistics, continued, "bytes", checked=True),
    "Q-YOLOP network": Door(network, lambda path: digest(load_weights(path)[1]), "bytes", True),
    "image PNG": Door(picture(".png"), lambda path: array_digest(read_image(path)), "bytes"),
    "image JPEG": Door(picture(".jpg"), lambda path: array_digest(read_image(path)), "bytes"),
    "labels": Door(labels, samples, "json"),
}
