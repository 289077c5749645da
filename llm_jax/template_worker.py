"""Renders chat templates in a process of its own, which `llm_jax.chat_template` starts.

A template is a program by an unknown author. jinja's sandbox keeps it away from everything, but
not from time and memory: `'a' * 10**10` is one step, and it cannot be stopped from inside Python.
So the system does it: it ends this process when a template takes too long, and grants it no more
memory than the limit. A line of JSON is a request, another one is its reply.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

MEMORY = 1 << 30
"""Bytes of address space that this process may have."""


def main() -> None:
    granted = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY if granted == resource.RLIM_INFINITY else min(MEMORY, granted)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    for line in sys.stdin:
        request = json.loads(line)
        # The processor's time, so that a busy machine does not count; a template cannot sleep.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        print(json.dumps(answer(request)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The text, or what went wrong."""
    try:
        return {"text": render(**request["render"])}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20:,} MiB of memory"}
    except Exception as error:  # whatever a template makes jinja and Python raise
        where = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
        return {"error": f"{str(error)[:500] or type(error).__name__}{where}"}


def render(template: str, most: int, variables: dict[str, Any]) -> str:
    """The template's text for these variables; raises ValueError if it is longer than `most`."""
    pieces, length = [], 0
    for piece in compiled(template).generate(**variables):
        length += len(piece)
        if length > most:
            raise ValueError(f"its text is longer than {most:,} characters")
        pieces.append(piece)
    text = "".join(pieces)
    text.encode()  # half a surrogate pair is no text that can be tokenized
    return text


@functools.lru_cache(4)
def compiled(template: str) -> Any:
    """The template in the environment that transformers gives to chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks a reply, for training; here it only shows what is inside."""

        tags = {"generation"}  # noqa: RUF012 - jinja's interface

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(
                line
            )

        def _inside(self, caller):
            return caller()

    class Dictionary:
        """`dict` without the attributes of a type."""

        def __call__(self, /, *args, **entries):
            return dict(*args, **entries)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """A namespace that holds no names which Python gives a meaning."""

        def __init__(*args, **entries):
            self, *rest = args  # an entry may be called self
            found = dict(*rest, **entries)
            for name in found:
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(self, found)

        def __setitem__(self, name, value):
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name):
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        how = dict(indent=indent, separators=separators, sort_keys=sort_keys)
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return environment.from_string(template)


if __name__ == "__main__":
    main()
