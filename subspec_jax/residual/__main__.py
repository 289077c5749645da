"""Converts a checkpoint in a separate process, for `subspec_jax.sources.add_converted`.

For use by hand there is `python -m experiments.convert`, which has flags.
"""

import json
import sys
from pathlib import Path

from llm_jax import LLMError
from llm_jax.cards import per_card
from llm_jax.progress import default_reporter
from llm_jax.registry import open_model
from subspec_jax import SubspecError
from subspec_jax.residual.convert import convert
from subspec_jax.residual.parts import card_checkpoints, card_folders


def main(words: list[str]) -> int:
    """The exit status: 0, or 2 after an error.

    `words` has one item, JSON of [checkpoint, adapter, dtype, cards, folder, bits, group,
    iterations].
    """
    path, adapter, dtype, cards, folder, *how = json.loads(words[0])
    checkpoint = open_model(path, adapter)
    cfg = per_card(checkpoint.config(dtype), cards)
    parts = zip(card_checkpoints(checkpoint, cards), card_folders(Path(folder), cards), strict=True)
    try:
        with default_reporter().bar("Converting layers", cards * cfg.layers) as step:
            for card, (part, where) in enumerate(parts):
                before = card * cfg.layers
                tell = lambda done, total: step(before + done)  # noqa: B023
                convert(part, cfg, where, *how, progress=tell)
    except (LLMError, SubspecError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
