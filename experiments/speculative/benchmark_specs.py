"""What each benchmark is: where its records are, and how a record becomes the user's turns.

The instructions around the questions are this project's own. So accuracies cannot be compared with
leaderboards, but speed and acceptance can. `experiments.speculative.benchmarks` reads the records.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal

from experiments.common.cli import UserError


class BenchmarkError(UserError):
    """What is wrong with the requested prompts, what was expected, and what to do."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A record of a data file and its place there, so that messages can name it."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """The non-empty string in field `name`."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if name not in self.fields else f"is {str(value)[:40]!r}"
            raise BenchmarkError(
                f"{self.where}: field {name!r} {found}, expected a non-empty string; the record"
                f" has {', '.join(map(repr, self.fields)) or 'no fields'}. Fix or remove it."
            )
        return value

    def optional(self, name: str) -> str:
        """The string in field `name`, or "" where it is absent or null."""
        value = self.fields.get(name)
        return "" if value is None else str(value).strip()

    def texts(self, *names: str) -> list[str]:
        """The non-empty list of non-empty strings in the first of the fields `names` present."""
        name = next((n for n in names if n in self.fields), names[0])
        value = self.fields.get(name)
        if not (isinstance(value, list) and value and all(isinstance(t, str) for t in value)):
            found = "is missing" if name not in self.fields else f"is {str(value)[:40]!r}"
            raise BenchmarkError(
                f"{self.where}: field {name!r} {found}, expected a list of strings, the user's"
                " turns. Fix or remove the record."
            )
        numbered = Row(self.where, {f"{name}[{i}]": turn for i, turn in enumerate(value)})
        return [numbered.text(key) for key in numbered.fields]


# --- Record -> user turns ----------------------------------------------------------------------


def user_turns(row: Row) -> list[str]:
    """The turns as they stand in the record."""
    return row.texts("turns", "prompt")


def _ask(field: str, instruction: str) -> Callable[[Row], list[str]]:
    """A converter that puts `instruction` and a blank line in front of one text field."""
    return lambda row: [f"{instruction}\n\n{row.text(field).strip()}"]


def _alpaca(row: Row) -> list[str]:
    return ["\n\n".join(filter(None, (row.text("instruction").strip(), row.optional("input"))))]


def _gpqa(row: Row) -> list[str]:
    question = row.text("Question").strip()
    names = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    choices = [row.text(name).strip() for name in names]
    random.Random(question).shuffle(choices)  # the same order in every run and from every source
    lines = [f"{letter}) {choice}" for letter, choice in zip("ABCD", choices)]
    return [
        "Think through this multiple-choice question. Finish with a line that reads 'Answer: X',"
        f" X being one of A, B, C and D.\n\n{question}\n\n" + "\n".join(lines)
    ]


def _livecodebench(row: Row) -> list[str]:
    problem, starter = row.text("question_content").strip(), row.optional("starter_code")
    if starter:
        task = f"Fill in this Python stub so that it solves the problem:\n\n{starter}"
    else:
        task = "Write a whole Python program: it reads standard input and prints the result."
    return [f"{problem}\n\n{task}"]


def _longbench(instruction: str) -> Callable[[Row], list[str]]:
    def convert(row: Row) -> list[str]:
        parts = (instruction, row.text("context").strip(), row.optional("input"))
        return ["\n\n".join(filter(None, parts))]

    return convert


# --- The table ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spec:
    """Where a benchmark's records are, and how a record becomes the user's turns."""

    turns: Callable[[Row], list[str]]
    needs: str  # the fields read, for messages
    folder: str  # local folder, under <data_dir>/text or <data_dir>
    stems: tuple[str, ...]  # local file names without suffix, best first
    id: str = ""  # field; without one the row number (from 0)
    category: str = ""  # field; without one the benchmark's name
    hub: str = ""  # data set on the hub
    hub_files: str = ""  # glob in it
    gated: bool = False
    member: str = ""  # glob inside a zip file
    tfds: str = ""  # name in TensorFlow Datasets; split test


_MATH = "Work this problem out step by step. Give the final result on a last line after 'Answer:'."

SPECS: dict[str, Spec] = {
    "mt-bench": Spec(
        user_turns, "turns", "mt_bench", ("question",), "question_id", "category",
        "HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl",
    ),
    "spec-bench": Spec(
        user_turns, "turns", "spec_bench", ("question",), "question_id", "category",
    ),
    "gsm8k": Spec(
        _ask("question", "Solve the problem below. Show your reasoning, then write the result as a"
             " single integer on a last line that begins with 'Answer:'."),
        "question", "gsm8k", ("test",), hub="openai/gsm8k", hub_files="main/test-*.parquet",
        tfds="gsm8k",
    ),
    "humaneval": Spec(
        _ask("prompt", "Complete this Python function. Answer with the code alone: the signature"
             " and the body, no explanation."),
        "prompt", "humaneval", ("HumanEval",), "task_id", hub="openai/openai_humaneval",
        hub_files="openai_humaneval/test-*.parquet",
    ),
    "alpaca": Spec(
        _alpaca, "instruction, input (may be empty)", "alpaca", ("train",),
        hub="tatsu-lab/alpaca", hub_files="data/train-*.parquet",
    ),
    "cnn-dm": Spec(
        _ask("article", "Summarize this news article in three or four sentences."),
        "article", "cnn_dm", ("test", "test200"), "id", hub="abisee/cnn_dailymail",
        hub_files="3.0.0/test-*.parquet", tfds="cnn_dailymail",
    ),
    "math-500": Spec(
        _ask("problem", _MATH), "problem", "math500", ("test",), "unique_id", "subject",
        "HuggingFaceH4/MATH-500", "test.jsonl",
    ),
    "aime": Spec(  # the 30 problems of 2024
        _ask("problem", _MATH), "problem", "aime", ("train", "test"), "id",
        hub="HuggingFaceH4/aime_2024", hub_files="data/train-*.parquet",
    ),
    "gpqa": Spec(
        _gpqa, "Question, Correct Answer, Incorrect Answer 1 to 3", "gpqa", ("gpqa_diamond",),
        "Record ID", "High-level domain", "Idavidrein/gpqa", "gpqa_diamond.csv", gated=True,
    ),
    "livecodebench": Spec(  # problems of releases 4 and 5; the files are large
        _livecodebench, "question_content, starter_code (may be empty)", "livecodebench",
        ("test",), "question_id", "difficulty", "livecodebench/code_generation_lite",
        "test[45].jsonl",
    ),
}  # fmt: skip

_FROM_TEXT = "Read the text and answer the question that follows it in a few words."
LONGBENCH: dict[str, str] = {
    "hotpotqa": "Answer the question after these passages in a few words.",
    "2wikimqa": "Answer the question after these passages in a few words.",
    "musique": "Answer the question after these passages in a few words.",
    "narrativeqa": "Read the story and answer the question that follows it briefly.",
    "qasper": "Read the paper and answer the question after it; say so if it cannot be answered.",
    "multifieldqa_en": _FROM_TEXT,
    "gov_report": "Write a one-page summary of this report.",
    "qmsum": "Read the meeting's transcript and answer the request after it in a paragraph or two.",
    "multi_news": "Write one summary that covers all of these news articles.",
    "trec": "Study the labelled questions, then give the label of the last one.",
    "triviaqa": "Study the examples, then answer the last question in the same form.",
    "samsum": "Study the dialogues and their summaries, then summarize the last dialogue.",
    "passage_count": "Some paragraphs below repeat. How many different ones are there? Give a"
    " number.",
    "passage_retrieval_en": "Name the paragraph that the abstract at the end describes.",
    "lcc": "Write the next line of this code.",
    "repobench-p": "Write the next line of the last file; the files before it may help.",
}
SPECS |= {
    f"longbench-{task}": Spec(
        _longbench(instruction), "context, input (may be empty)", "longbench", (task,), "_id",
        hub="THUDM/LongBench", hub_files="data.zip", member=f"*/{task}.jsonl",
    )
    for task, instruction in LONGBENCH.items()
}  # fmt: skip

BenchmarkName = Literal[
    "builtin",
    "texts",
    "mt-bench",
    "spec-bench",
    "gsm8k",
    "humaneval",
    "alpaca",
    "cnn-dm",
    "math-500",
    "aime",
    "gpqa",
    "livecodebench",
    "longbench-hotpotqa",
    "longbench-2wikimqa",
    "longbench-musique",
    "longbench-narrativeqa",
    "longbench-qasper",
    "longbench-multifieldqa_en",
    "longbench-gov_report",
    "longbench-qmsum",
    "longbench-multi_news",
    "longbench-trec",
    "longbench-triviaqa",
    "longbench-samsum",
    "longbench-passage_count",
    "longbench-passage_retrieval_en",
    "longbench-lcc",
    "longbench-repobench-p",
]
"""builtin, texts and the keys of SPECS, written out for type checkers and for the command line."""
