"""Where an engine's weights come from: a checkpoint, its converted form, or random numbers.

Finding a source touches no device, so that a memory limit can still be set.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from llm_jax.adapted import Adapted, adapted
from llm_jax.cards import CardsError, per_card, why_not
from llm_jax.checkpoint import Checkpoint, table_shapes
from llm_jax.config import Config
from llm_jax.digest import json_digest
from llm_jax.disk import DiskArray
from llm_jax.files import cache_folder
from llm_jax.params import Attention, Layer, Params, abstract, init_layer
from llm_jax.progress import Progress, Reporter
from llm_jax.registry import MODELS, find_checkpoint, find_model, open_model
from llm_jax.tokenizer import ByteTokenizer
from subspec_jax import memory
from subspec_jax.draft_model import Draft
from subspec_jax.load import all_on_device, load_target
from subspec_jax.methods import MethodError
from subspec_jax.offload import separate_shapes
from subspec_jax.plan import Plan, make_plan
from subspec_jax.predict_experts import Routing
from subspec_jax.random_weights import random_splits, random_target
from subspec_jax.residual.convert import check_convertible, convert
from subspec_jax.residual.files import Converted
from subspec_jax.residual.parts import ConvertedParts, card_checkpoints, card_folders
from subspec_jax.residual.split import gaussian_room, split_head_shapes, split_shapes
from subspec_jax.residual.tensor_file import is_complete
from subspec_jax.stored import Stored, store
from subspec_jax.tree import TreeSpec
from subspec_jax.verify import Target

ITERATIONS = {"hqq": 20, "nearest": 0}
"""Iterations of each quantizer."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantizer = Literal["hqq", "nearest"]


def chosen_dtype(wanted: Dtype, residual: bool = False) -> str:
    """The dtype to load weights in. auto: float32 on a CPU (bfloat16 for residuals); on a GPU the
    16-bit type that it multiplies fast."""
    if wanted != "auto":
        return wanted
    on_cpu = "bfloat16" if residual else "float32"
    return on_cpu if memory.card_bytes() is None else memory.card_dtype()


@dataclasses.dataclass
class Source:
    """A model that is known and not yet loaded."""

    name: str
    cfg: Config
    checkpoint: Checkpoint | None = None
    """None: weights are random, for timing."""
    converted: Converted | ConvertedParts | None = None
    """The checkpoint as substitutes and residuals."""
    residual: bool = False
    """Methods that have substitutes stream residuals."""
    substitutes: Draft | None = None
    """With `residual`: methods without substitutes stream residuals of these, too, so that all
    methods run the same programs; None: they stream plain layers."""
    seed: int = 0
    """The seed of random weights."""
    zipf: float = 0.0
    """How unevenly random routers choose experts."""
    experts: str = "routed"
    """`Options.experts`."""
    disk_folder: Path | None = None
    """`Options.disk_folder`."""

    def __post_init__(self):
        self._random: dict[bool, Layer] | None = None

    def share(self, cards: int) -> None:
        """Divides the model among so many cards. Raises CardsError if it cannot be."""
        if cards > 1 and (reason := self.why_not_shared()) is not None:
            raise CardsError(f"{cards} devices: {reason}")
        self.cfg = per_card(self.cfg, cards)

    def why_not_shared(self) -> str | None:
        """Why several cards cannot share the model; None where they can."""
        if (reason := why_not(self.cfg)) is not None:
            return reason
        layers = () if self.checkpoint is None else self.checkpoint.model_shapes(self.cfg).layers
        if not all(isinstance(layer.attn, Attention) for layer in layers):
            return "models with another kind of attention (Palu) are decoded on one device"
        return None

    def tokenizer(self) -> Any:
        return ByteTokenizer() if self.checkpoint is None else self.checkpoint.tokenizer()

    def identity(self) -> str | None:
        """What identifies weights and tokenizer by their content; None for random weights."""
        return None if self.checkpoint is None else self.checkpoint.identity()

    def shapes(self, draft: Draft) -> Params:
        """The target as shapes and dtypes: plain layers, a checkpoint's own kind, or residuals."""
        draft = (self.substitutes or draft) if draft.bits is None else draft
        if self.residual and draft.bits is not None:
            # As many bits as the layers: then the substitute of a split head is the low-bit head.
            split = draft.head_bits == draft.bits
            if self.converted is None:
                return _random_residual_shapes(self.cfg, draft.bits, draft.group, split)
            if isinstance(self.converted, ConvertedParts):
                return self.converted.model(split)
            return self.converted.model_with_split_head if split else self.converted.model
        if self.mxfp4:
            return _mxfp4_shapes(self.cfg)
        if self.checkpoint is not None:
            return self.checkpoint.model_shapes(self.cfg)
        return _plain_shapes(self.cfg)

    @property
    def mxfp4(self) -> bool:
        """Whether the experts are published in MXFP4, and are kept and brought in that form."""
        if self.cfg.experts is None or self.experts == "all" or self.cfg.dtype == "float16":
            return False
        if self.checkpoint is None:
            return self.cfg.family == "gpt_oss"
        return self.checkpoint.experts_in_mxfp4(self.cfg)

    def load(
        self,
        plan: Plan,
        progress: Progress | None = None,
        verify: bool = False,
        check: bool = True,
    ) -> Target:
        """The target where the plan wants it; see `load_target` for `verify` and `check`."""
        if self._stores(plan):
            stored = self.stored(plan)
            if self.checkpoint is not None:
                return load_target(stored, plan, progress)
            return random_target(plan, self.seed, progress, stored=stored)
        source = self.converted if plan.streams_residuals else self.checkpoint
        if source is None:
            split = self._random_splits(plan) if plan.streams_residuals else None
            return random_target(plan, self.seed, progress, split, self.zipf)
        return load_target(source, plan, progress, plan.streams_residuals and verify, check)

    def _stores(self, plan: Plan) -> bool:
        """Whether the plan's layers are on disk, and not in the converted model's own files."""
        return bool(plan.disk) and (self.converted is None or not plan.streams_residuals)

    def stored(self, plan: Plan, reporter: Reporter = Reporter()) -> Stored:
        """The layers of a plan that has some on disk, in a folder, which is written if needed."""
        cfg, checkpoint, residual = self.cfg, self.checkpoint, plan.streams_residuals
        weights = [self.name, self.seed] if checkpoint is None else checkpoint.digest()
        identity = [weights, dataclasses.asdict(cfg), residual]
        if residual:
            identity += [plan.draft.bits, plan.draft.group]
        kind = f"{self.name}-{'residual' if residual else cfg.dtype}"
        parent = self.disk_folder or cache_folder() / "layers"
        folder = Path(parent).expanduser() / f"{kind}-{json_digest(identity)[:8]}"

        def layer(i):
            if checkpoint is not None:
                return checkpoint.layer(i, cfg)
            if residual:
                return self._random_splits(plan)[False].of_kind(cfg.kind(i))
            return init_layer(jax.random.fold_in(jax.random.key(self.seed), i), cfg, i)

        def tables():
            fields = () if checkpoint is None else table_shapes(cfg)
            return {field: checkpoint.read(field, cfg) for field in fields}

        given = folder, identity, plan.model, tables, layer
        if is_complete(folder, cfg.layers):
            return store(*given)
        reporter.say(f"Writing the layers to {folder}, once …")
        with reporter.bar("Writing layers", cfg.layers) as step:
            return store(*given, progress=step)

    def prepare(self, plan: Plan, reporter: Reporter) -> None:
        """Writes the layers that the plan has on disk, if they are not there."""
        if self._stores(plan):
            self.stored(plan, reporter)

    def lying(self, plan: Plan) -> list[DiskArray]:
        """The arrays of a plan's layers that are on disk, where they lie."""
        of = self.stored(plan).layer if self._stores(plan) else self.converted.lying
        leaves = jax.tree.leaves([of(i) for i in sorted(plan.disk)])
        return [a for a in leaves if isinstance(a, DiskArray)]

    def one_layer(self, plan: Plan) -> Layer:
        """A layer of the kind that the plan's target has, to be timed."""
        if not plan.streams_residuals:
            return init_layer(jax.random.key(0), self.cfg)
        if self.converted is None:
            return self._random_splits(plan)[self.cfg.has_experts(0)]
        if isinstance(self.converted, ConvertedParts):
            return self.converted.layer(0)[0]
        return self.converted.layer(0)

    def routing(self) -> Routing | None:
        """How tokens are routed, before any was counted: as random weights do, or all experts are
        as likely. None for models without experts."""
        if (e := self.cfg.experts) is None:
            return None
        zipf = self.zipf if self.checkpoint is None else 0.0
        return Routing.random(self.cfg.layers, e.count, e.chosen, zipf)

    def _random_splits(self, plan: Plan) -> dict[bool, Layer]:
        """`random_splits`, encoded once and kept on the host."""
        if self._random is None:
            self._random = jax.tree.map(np.asarray, random_splits(plan, self.seed))
        return self._random


@functools.cache
def _mxfp4_shapes(cfg: Config) -> Params:
    """The model with experts of arrays of their own, in MXFP4."""
    model = abstract(cfg)
    layers = tuple(separate_shapes(layer, mxfp4=True) for layer in model.layers)
    return dataclasses.replace(model, layers=layers)


@functools.cache
def _plain_shapes(cfg: Config) -> Params:
    return abstract(cfg)


@functools.cache
def _random_residual_shapes(cfg: Config, bits: int, group: int, split_head: bool) -> Params:
    """Shapes of random layers, whose residuals take a known number of bytes."""
    kind = cfg, bits, group
    room = gaussian_room(*kind)
    first = {cfg.has_experts(i): i for i in reversed(range(cfg.layers))}
    made = {has: split_shapes(*kind, room, index=i) for has, i in first.items()}
    layers = tuple(made[cfg.has_experts(i)].of_kind(cfg.kind(i)) for i in range(cfg.layers))
    model = dataclasses.replace(abstract(cfg), layers=layers)
    if not split_head or "head" not in room:
        return model
    return dataclasses.replace(model, head_DV=split_head_shapes(*kind, room["head"]))


def find_source(
    model: str | Path | Checkpoint,
    dtype: Dtype = "auto",
    residual: bool = False,
    random: bool = False,
    seed: int = 0,
    reporter: Reporter = Reporter(),
    zipf: float = 0.0,
    experts: str = "routed",
    adapter: str | Path | None = None,
) -> Source:
    """The source of a registered name, a folder, a GGUF file, or a checkpoint that is open already.

    `random`: weights of the registered model's shapes in place of its checkpoint. `adapter`: the
    folder of a LoRA adapter, which is merged into the checkpoint. Raises
    CheckpointError for what cannot be found or does not fit the model it claims to be.
    """
    wanted = chosen_dtype(dtype, residual)
    if random and adapter is not None:
        raise MethodError("an adapter changes a checkpoint's weights; random ones have none")
    if random:
        cfg = dataclasses.replace(find_model(str(model)).config, dtype=wanted)
        return Source(str(model), cfg, residual=residual, seed=seed, zipf=zipf, experts=experts)
    checkpoint = model
    if isinstance(model, str | Path):
        if isinstance(model, str) and (model in MODELS or not _is_path(model)):
            model_path = find_checkpoint(model, progress=reporter.say)
        else:
            model_path = model
        checkpoint = open_model(model_path, adapter, reporter.say)
    elif adapter is not None:
        checkpoint = adapted(model, adapter)
    cfg = checkpoint.config(wanted)
    checkpoint.check(cfg)
    for line in checkpoint.notices(cfg):
        reporter.say(line)
    name = str(model) if isinstance(model, str) else Path(checkpoint.path).name
    if isinstance(checkpoint, Adapted):
        name = f"{name}+{checkpoint.adapter.path.name}"
    return Source(name, cfg, checkpoint, residual=residual, seed=seed, experts=experts)


def _is_path(text: str) -> bool:
    """Whether text means a file or a folder rather than a model's name."""
    return os.sep in text or text.endswith(".gguf") or Path(text).expanduser().exists()


def add_converted(
    source: Source,
    draft: Draft,
    quantizer: Quantizer = "hqq",
    folder: Path | None = None,
    reporter: Reporter = Reporter(),
) -> None:
    """Gives the source its converted form, which is made first if `folder` does not hold it.

    The default folder is in the cache and named after the model. The conversion runs in another
    process, because this one must not touch the device before its limit is set.
    """
    if source.checkpoint is None:
        return
    cfg, checkpoint = source.cfg, source.checkpoint
    check_convertible(checkpoint, cfg, draft.bits, draft.group)
    if folder is None:
        kind = f"{draft.bits}x{draft.group}-{quantizer}-{cfg.dtype}"
        folder = cache_folder() / "converted" / f"{source.name}-{kind}"
    folder = Path(folder).expanduser()
    how = draft.bits, draft.group, ITERATIONS[quantizer]
    folders = card_folders(folder, cfg.cards)
    if not all(is_complete(part, cfg.layers) for part in folders):
        reporter.say(f"Converting to {folder}, once …")
        if not memory.backends_started():
            _convert_apart(checkpoint, cfg, folder, how)
    pairs = zip(card_checkpoints(checkpoint, cfg.cards), folders, strict=True)
    parts = tuple(convert(part, cfg, where, *how) for part, where in pairs)
    source.converted = parts[0] if cfg.cards == 1 else ConvertedParts(parts)


def _convert_apart(checkpoint: Checkpoint, cfg: Config, folder: Path, how: tuple) -> None:
    adapter = str(checkpoint.adapter.path) if isinstance(checkpoint, Adapted) else None
    given = [str(checkpoint.path), adapter, cfg.dtype, cfg.cards, str(folder), *how]
    command = [sys.executable, "-m", "subspec_jax.residual", json.dumps(given)]
    if subprocess.run(command).returncode:
        raise MethodError("the conversion failed; its message is above")


def find_draft_model(model: str | Path, target: Source, reporter: Reporter = Reporter()) -> Source:
    """A small model that drafts for the target. Raises MethodError for another vocabulary."""
    random = target.checkpoint is None
    small = find_source(model, target.cfg.dtype, random=random, seed=target.seed + 1)
    same = random
    if not random:
        text = "Speculation: 2 tokenizers, één vocabulary?\n"
        same = small.tokenizer().encode(text) == target.tokenizer().encode(text)
    if small.cfg.vocab > target.cfg.vocab or not same:
        raise MethodError(
            f"the draft model has a vocabulary of {small.cfg.vocab} and the model one of "
            f"{target.cfg.vocab}"
            + ("" if same else ", and they cut text into different tokens")
            + "; speculation needs the same tokens, so take a smaller model of the same family"
        )
    return small


def load_whole(source: Source, cards: int = 1) -> Params:
    """All parameters on the device; on each of several `cards`."""
    cfg = source.cfg
    whole = make_plan(cfg, 2**60, TreeSpec("chain", depth=0), resident=cfg.layers)
    return all_on_device(source.load(whole).params, cards)
