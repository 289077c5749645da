"""Draws docs/images/speculation.svg: draft, verify, accept, from one round of a real run.

    python docs/make_picture.py                          draw from docs/images/speculation.json
    python docs/make_picture.py --record smollm2-135m    decode first, and write the JSON

The JSON holds every round of a short run: the token tree that the draft made, the nodes that the
target accepted, and the target's own token behind them. The picture shows one of these rounds.
"""

import argparse
import json
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
RECORDED, DRAWN = IMAGES / "speculation.json", IMAGES / "speculation.svg"
PROMPT = "What can a small memory hold?"
SHOWN = 2  # the round in the picture: most guesses are right, one is not

WIDTH, HEIGHT = 1000, 640
BOX, ROW, COLUMN, LEFT = (112, 28), 36, 136, 36
INK, MUTED, LINE = "#1f2933", "#8a94a0", "#c3cad3"
PLAIN, GREEN, ORANGE = ("#eef2f7", "#9fb0c3"), ("#2e9e5b", "#23804a"), ("#f0a030", "#c97f14")


def record(model: str) -> dict:
    """The rounds of a short answer, decoded by the engine with a tree of 6 levels of 3 nodes."""
    import jax

    import subspec_jax
    from subspec_jax.tree import TreeSpec

    spec = TreeSpec("beam", depth=6, width=3)
    with subspec_jax.open(model, "450MB", tree=spec, dtype="float32", max_length=512) as engine:
        proposer = engine.use("subspec").proposer
        grow, proposed = proposer.propose, []

        def propose(state):
            grow(state)
            proposed.append(jax.device_get(state.tree))

        proposer.propose = propose
        decode = engine.tokenizer.decode
        prompt = engine.tokenizer.chat([{"role": "user", "content": PROMPT}])
        rounds, text = [], []
        for result in engine.rounds(prompt, 64):
            before = decode(text)
            text += result.tokens
            if not result.drafted:
                continue  # the prompt's own pass
            tree = proposed[-1]
            nodes = range(int(tree.size))
            rounds.append(
                {
                    "text": before,
                    "tokens": [decode([int(tree.token_E[i])]) for i in nodes],
                    "parents": [int(tree.parent_E[i]) for i in nodes],
                    "accepted": list(result.path),
                    "emitted": [decode([t]) for t in result.tokens],
                }
            )
        return {
            "model": "SmolLM2-135M-Instruct, float32, CPU",
            "resident": engine.plan.resident,
            "layers": engine.cfg.layers,
            "tree": {"kind": "beam", "depth": spec.depth, "width": spec.width},
            "prompt": PROMPT,
            "rounds": rounds,
        }


def rows_of_levels(parents: list[int]) -> tuple[list[int], list[int]]:
    """(level, row) of every node: rows of a level follow the rows of its parents."""
    level, row = [0] * len(parents), [1] * len(parents)
    for i, parent in enumerate(parents[1:], 1):
        level[i] = level[parent] + 1
    for depth in range(1, max(level) + 1):
        nodes = [i for i in range(len(parents)) if level[i] == depth]
        for place, i in enumerate(sorted(nodes, key=lambda i: (row[parents[i]], i))):
            row[i] = place
    return level, row


def text(x, y, words, size=15, colour=INK, weight="normal", anchor="start") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
        f'text-anchor="{anchor}" xml:space="preserve">{escape(words)}</text>'
    )


def box(x, y, token, fill, edge, colour) -> str:
    """A token, its box's left edge at x and its middle at y."""
    word = token.strip() or "\u21b5"
    return (
        f'<rect x="{x}" y="{y - BOX[1] / 2}" width="{BOX[0]}" height="{BOX[1]}" rx="7" '
        f'fill="{fill}" stroke="{edge}" stroke-width="1.3"/>'
        + text(x + BOX[0] / 2, y + 5, word, 14, colour, anchor="middle")
    )


def edge(start, end, colour, width=1.5, dash="") -> str:
    """A curve from the right of the box at `start` to the left of the one at `end`."""
    (x0, y0), (x1, y1) = (start[0] + BOX[0], start[1]), end
    bend = (x0 + x1) / 2
    return (
        f'<path d="M{x0} {y0}C{bend} {y0} {bend} {y1} {x1} {y1}" fill="none" '
        f'stroke="{colour}" stroke-width="{width}"{dash and f" stroke-dasharray={dash!r}"}/>'
    )


def step(y, number, name, words) -> list[str]:
    """The heading of a step."""
    return [
        f'<circle cx="{LEFT + 13}" cy="{y - 6}" r="14" fill="{INK}"/>',
        text(LEFT + 13, y, str(number), 16, "#ffffff", "bold", "middle"),
        text(LEFT + 38, y, name, 19, INK, "bold"),
        text(LEFT + 128, y, words, 15, "#52606d"),
    ]


def tree(top, shown, verified) -> list[str]:
    """The token tree with its first row at `top`; `verified`: what the target said of it, too."""
    tokens, parents, accepted = shown["tokens"], shown["parents"], shown["accepted"]
    level, row = rows_of_levels(parents)
    at = [(LEFT + COLUMN * level[i], top + ROW * row[i]) for i in range(len(tokens))]
    lines, boxes = [], [box(*at[0], tokens[0], INK, INK, "#ffffff")]
    for i in range(1, len(tokens)):
        right = verified and i in accepted
        colour = GREEN[1] if right else LINE
        lines.append((right, edge(at[parents[i]], at[i], colour, 3 if right else 1.5)))
        if right:
            boxes.append(box(*at[i], tokens[i], *GREEN, "#ffffff"))
        elif verified:
            boxes.append(box(*at[i], tokens[i], "#f7f8fa", "#dde2e8", MUTED))
        else:
            boxes.append(box(*at[i], tokens[i], *PLAIN, INK))
    if verified:
        last = accepted[-1] if accepted else 0
        there = (LEFT + COLUMN * (level[last] + 1), top + ROW * 3)
        lines.append((True, edge(at[last], there, ORANGE[1], 3, "6 4")))
        boxes.append(box(*there, shown["emitted"][-1], *ORANGE, INK))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])] + boxes


def draw(run: dict) -> str:
    """The picture as SVG text."""
    shown = run["rounds"][SHOWN]
    nodes, right = len(shown["tokens"]) - 1, len(shown["accepted"])
    deep, wide = run["tree"]["depth"], run["tree"]["width"]
    text_so_far = shown["text"].replace("\n", " ")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" '
        'aria-label="One round of speculative decoding: draft, verify, accept">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#ffffff" stroke="#e3e7ec"/>',
        text(LEFT, 42, f"\u201c{run['prompt']}\u201d", 16, MUTED),
        text(LEFT, 70, f"{text_so_far} \u2026", 16),
        *step(122, 1, "Draft", f"A 4-bit copy of the model, on the device, guesses {deep} tokens "
              f"ahead, {wide} at each level: a tree."),
        *tree(158, shown, verified=False),
        *step(304, 2, "Verify", f"One pass of the exact model checks all {nodes} guesses. "
              "Its layers come over the link once."),
        *tree(340, shown, verified=True),
        *step(522, 3, "Accept", f"{right} right guesses, and the exact model\u2019s own next token "
              f"for free: {right + 1} tokens from one pass."),
    ]  # fmt: skip
    green, orange = "".join(shown["emitted"][:-1]), shown["emitted"][-1]
    parts += [
        f'<text x="{LEFT}" y="562" font-size="16" fill="{INK}" xml:space="preserve">'
        f"\u2026 {escape(' '.join(text_so_far.split()[-6:]))}"
        f'<tspan fill="{GREEN[1]}" font-weight="bold">{escape(green)}</tspan>'
        f'<tspan fill="{ORANGE[1]}" font-weight="bold">{escape(orange)}</tspan> \u2026</text>',
        text(LEFT, 606, "Exactly the text that the exact model would write alone. "
             f"A real round of {run['model']}.", 14, MUTED),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", metavar="MODEL", help="a name, a folder or a GGUF file")
    arguments = parser.parse_args()
    if arguments.record:
        RECORDED.write_text(json.dumps(record(arguments.record), indent=1) + "\n")
    DRAWN.write_text(draw(json.loads(RECORDED.read_text())))
