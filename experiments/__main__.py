"""All commands: `python -m experiments`, or `thimble` where the package is installed."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    # name -> (module, what it does)
    "speculative": (
        "experiments.speculative.__main__",
        "decode a model that does not fit, speculatively and without loss, and compare methods",
    ),
    "chat": ("experiments.chat", "talk to a model that does not fit, in the shell"),
    "serve": (
        "experiments.serve.__main__",
        "serve a model that does not fit to OpenAI's clients, and a chat page",
    ),
    "palu": (
        "experiments.palu.__main__",
        "compress the KV cache of a model and measure what is lost",
    ),
    "qyolop": (
        "experiments.qyolop.__main__",
        "train, quantize, export, time and use the driving perception network",
    ),
    "convert": (
        "experiments.convert",
        "convert a checkpoint once for --stream residual",
    ),
    "measure.errors": ("experiments.measure.errors", "compare every kernel with float64 NumPy"),
    "measure.kernels": ("experiments.measure.kernels", "time the attention kernels"),
    "measure.matmul": ("experiments.measure.matmul", "time and tune the low-bit products"),
    "measure.draft_step": ("experiments.measure.draft_step", "take a draft step apart"),
    "measure.transfers": ("experiments.measure.transfers", "time the order of copies and blocks"),
    "measure.residual": ("experiments.measure.residual", "count the bits a weight of residuals"),
    "measure.offload": (
        "experiments.measure.offload",
        "time every way to decode a model that does not fit, each in a process of its own",
    ),
    "measure.batch": ("experiments.measure.batch", "time several texts that share every pass"),
    "measure.turns": (
        "experiments.measure.turns",
        "time a chat's turns, with a prefix cache or none",
    ),
    "measure.foreign": (
        "experiments.measure.foreign",
        "compare transforms of other projects' models with the same work over our own",
    ),
    "measure.disk": (
        "experiments.measure.disk",
        "time a model that fits neither on the device nor into host memory",
    ),
    "measure.experts": (
        "experiments.measure.experts",
        "time a model with experts that does not fit: plain passes and trees",
    ),
    "measure.offload_baselines": (
        "experiments.measure.offload_baselines",
        "time transformers with accelerate on the same model",
    ),
    "measure.checks": (
        "experiments.measure.checks",
        "time loading with and without checks of the files, and the identity of a file",
    ),
    "measure.qat": (
        "experiments.measure.qat",
        "round a small Flax network and train it on, on digits",
    ),
    "measure.trees": ("experiments.measure.trees", "find the draft tree that pays, from records"),
    "measure.tree_trace": ("experiments.measure.tree_trace", "record draft trees along real texts"),
}


def here() -> dict[str, tuple[str, str]]:
    """The commands that are installed: a wheel has no benchmarks of single parts."""
    measure = importlib.util.find_spec("experiments.measure") is not None
    return {name: c for name, c in COMMANDS.items() if measure or not name.startswith("measure.")}


def overview() -> str:
    commands = here()
    width = max(map(len, commands))
    rows = [f"  {name:{width}}  {what}" for name, (_, what) in commands.items()]
    return "\n".join(
        [
            "usage: thimble COMMAND [FLAGS], or python -m experiments.COMMAND [FLAGS]",
            "",
            *rows,
            "",
            "  --help         this list; COMMAND --help shows a command's flags",
            "  --list-models  the models that can be asked for by name",
            "  --version      the version",
        ]
    )


def main(words: Sequence[str] | None = None) -> int:
    """The exit status of the command that `words` (the command line's) name."""
    try:
        status = _main(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return status


def _main(words: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    first, rest = (words[0], words[1:]) if words else ("--help", [])
    if first in ("--help", "-h"):
        print(overview())
        return 0
    if first == "--version":
        import jax

        from subspec_jax import __version__

        print(f"thimble-jax {__version__} (jax {jax.__version__})")
        return 0
    if first == "--list-models":
        from experiments.common import models

        print(models.table())
        return 0
    if first not in here():
        import difflib

        close = difflib.get_close_matches(first, here(), n=2)
        guess = f"; did you mean {' or '.join(close)}?" if close else ""
        print(f"error: there is no command {first!r}{guess}\n\n{overview()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[first][0]).cli(rest)


if __name__ == "__main__":
    sys.exit(main())
