"""Converts a checkpoint in a separate process, for `subspec_jax.sources.add_converted`.

For use by hand there is `python -m experiments.convert`, which has flags.
"""

import json
import sys

from llm_jax import LLMError
from llm_jax.progress import default_reporter
from llm_jax.registry import open_model
from subspec_jax import SubspecError
from subspec_jax.residual.convert import convert


def main(words: list[str]) -> int:
    """The exit status: 0, or 2 after an error.

    `words` has one item, JSON of [checkpoint, adapter, dtype, folder, bits, group, iterations].
    """
    path, adapter, dtype, folder, *how = json.loads(words[0])
    checkpoint = open_model(path, adapter)
    cfg = checkpoint.config(dtype)
    try:
        with default_reporter().bar("Converting layers", cfg.layers) as step:
            convert(checkpoint, cfg, folder, *how, progress=lambda done, total: step(done))
    except (LLMError, SubspecError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
