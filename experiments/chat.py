'''A conversation in the shell with a model that does not fit.

    python -m experiments.chat
    python -m experiments.chat --model qwen2.5-7b --memory-limit 8GB --system "Be short."

A line is a message; one that ends with a backslash goes on in the next, and lines between """ and
""" are one message. Ctrl-C stops the answer, Ctrl-D ends. /help lists the commands.
'''

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.common import cli as command_line
from experiments.common.answer import Answer
from experiments.common.cli import UserError
from experiments.serve.model import ModelFlags, name_of, open_engine, warm_up
from llm_jax import LLMError
from llm_jax.files import atomic_file, cache_folder
from llm_jax.generation import checked_seed
from llm_jax.progress import ConsoleReporter
from llm_jax.sample import Sampler
from subspec_jax import SubspecError
from subspec_jax.decoder import LengthError
from subspec_jax.engine import Engine
from subspec_jax.requests import Request, Update
from subspec_jax.scheduler import Scheduler, Ticket

HELP = """\
/system TEXT  tells the model before all else, and begins again; without TEXT: what is told
/new          begins again
/stats        tokens, tokens a pass, speeds and what streams, of the last answer
/save FILE    writes the conversation as JSON
/help         this list
/quit         ends, as Ctrl-D does"""
BLOCK = '"""'


@dataclasses.dataclass(frozen=True)
class Chat(ModelFlags):
    """Talk to a model."""

    system: str | None = None
    """What the model is told before the conversation."""
    max_new_tokens: int | None = None
    """The most tokens of an answer; as many as fit if not given."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens of this probability; 1: all."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the likeliest; 0: all."""
    seed: int = 0
    """Of the first answer; each further one has the next."""


class Shell:
    """A conversation: `read` gives a line for a prompt, or raises EOFError; `write` shows text."""

    def __init__(
        self, engine: Engine, args: Chat, read: Callable[[str], str], write: Callable[[str], None]
    ):
        self.engine, self.args, self._read, self._write = engine, args, read, write
        self._scheduler = Scheduler(engine)
        self._sampler = Sampler(args.temperature, args.top_k, args.top_p, args.min_p)
        self._seed = args.seed
        self.system = args.system
        self.messages: list[dict[str, str]] = []
        self.last: Answer | None = None

    def run(self) -> None:
        """Returns when the input ends, or at /quit."""
        for text in self._texts():
            if text.startswith("/"):
                name, _, rest = text.partition(" ")
                if name == "/quit":
                    return
                self._command(name, rest.strip())
            else:
                self.answer(text)

    def _texts(self) -> Iterator[str]:
        """What is typed, message by message. Ctrl-C forgets the one that is being typed."""
        while True:
            try:
                text = self._text()
            except KeyboardInterrupt:
                self._write("\n")
                continue
            except EOFError:
                self._write("\n")
                return
            if text.strip():
                yield text.strip()

    def _text(self) -> str:
        line = self._read("> ")
        lines = []
        if line.strip().startswith(BLOCK):
            line = line.strip().removeprefix(BLOCK)
            while not line.rstrip().endswith(BLOCK):
                lines.append(line)
                line = self._read(". ")
            return "\n".join([*lines, line.rstrip().removesuffix(BLOCK)])
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._read(". ")
        return "\n".join([*lines, line])

    # ------------------------------------------------------------------ answers

    def answer(self, text: str) -> None:
        """Shows the answer to a message as it comes. What Ctrl-C stopped is kept as it is."""
        asked = [*self.messages, {"role": "user", "content": text}]
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            request = self._request(self.engine.tokenizer.chat([*told, *asked]))
            self.last = Answer(request)
            self._decode(self._scheduler.submit(request, self._show))
        except LengthError as error:
            self._write(f"{error}; or begin again with /new\n")
            return
        except (LLMError, SubspecError) as error:
            self._write(f"{error}\n")
            return
        if self.last.error:
            self._write(f"\nstopped: {self.last.error}\n")
            return
        self._write("\n" if self.last.finish != "cancelled" else " …\n")
        self.messages = [*asked, {"role": "assistant", "content": self.last.text}]
        self._seed = (self._seed + 1) % 2**32

    def _request(self, prompt: Sequence[int]) -> Request:
        room = max(1, self.engine.options.max_length - len(prompt))
        new = min(self.args.max_new_tokens or room, room)
        how = self._seed, self._sampler, self.engine.eos, self.args.stop
        return Request(tuple(prompt), new, *how)

    def _show(self, update: Update) -> None:
        self.last.add(update)
        self._write(update.text)

    def _decode(self, ticket: Ticket) -> None:
        """All rounds. The first Ctrl-C lets the round that runs end; the second one does not."""

        def stop(*_: Any) -> None:
            ticket.cancel()
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, stop)
        try:
            while self._scheduler.step():
                continue
        finally:
            signal.signal(signal.SIGINT, before)

    # ------------------------------------------------------------------ commands

    def _command(self, name: str, rest: str) -> None:
        if name == "/help":
            self._write(f"{HELP}\n")
        elif name == "/new":
            self.messages = []
        elif name == "/system" and rest:
            self.system, self.messages = rest, []
        elif name == "/system":
            self._write(f"{self.system or 'nothing is told'}\n")
        elif name == "/stats":
            self._write(f"{stats(self.last)}\n")
        elif name == "/save":
            self._save(rest)
        else:
            self._write(f"there is no {name}; /help lists the commands\n")

    def _save(self, path: str) -> None:
        if not path:
            self._write("where to? /save FILE\n")
            return
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        saved = {"model": name_of(self.args.model), "messages": [*told, *self.messages]}
        try:
            with atomic_file(Path(path).expanduser()) as file:
                file.write_text(json.dumps(saved, indent=2, ensure_ascii=False), encoding="utf-8")
        except (OSError, ValueError) as error:
            self._write(f"not saved: {error}\n")
        else:
            self._write(f"saved: {len(self.messages)} messages\n")


def stats(answer: Answer | None) -> str:
    """One line of numbers."""
    if answer is None or not answer.passes:
        return "nothing was decoded yet"
    speeds = answer.speeds()
    return (
        f"{answer.tokens} tokens after {len(answer.request.prompt)} of the prompt, "
        f"{answer.accepted} proposed by the draft; {speeds['tau']:.2f} tokens a pass, "
        f"{speeds['tokens_per_s']:.2f} tokens/s, {speeds['streamed_gb_s']:.2f} GB/s streamed"
    )


def main(args: Chat, console: Console) -> int:
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.min_p)
    checked_seed(args.seed)
    if not all(args.stop):
        raise UserError("--stop has an empty text, which would end every answer at once")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; expected at least 1")
    with open_engine(args, ConsoleReporter(console), sampler) as engine:
        console.print(str(engine.plan), highlight=False, style="dim")
        warm_up(engine)
        with _history():
            Shell(engine, args, _line, _write).run()
    return 0


def _line(prompt: str) -> str:
    """A line of the input, without a prompt where nobody sees it."""
    return input(prompt if sys.stdin.isatty() else "")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lines can be edited and called back, those of earlier conversations too."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    file = cache_folder() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def cli(words: Sequence[str] | None = None) -> int:
    return command_line.run(Chat, main, __doc__, words, again=None)


if __name__ == "__main__":
    sys.exit(cli())
