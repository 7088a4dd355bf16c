"""Cases: what is asked of a bundle, and what it is expected to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, HealthGPTError, RequestError, in_one_line
from ..images import read_if_any, read_image
from ..manifest import COMPREHENSION, GENERATION, Manifest
from ..phantoms import MAX_ANSWER_TOKENS, Question, Task, held_out, questions, tasks
from ..serving.fields import INTEGER, PAIR, STRING, TASKS, Tasks, take_id, take_task
from ..serving.lines import parse, path_of
from ..session import Session

MAX_CASES = 100_000
MAX_LINE_BYTES = 1 << 20
# The phantom's vision tower takes pictures of another size than that of every released system.
_PHANTOM_INPUT = 224

_BOTH = {
    "expected": STRING,
    "kind": STRING,
    "image": STRING,
    "frame": INTEGER,
    "window": PAIR,
    "max_new_tokens": INTEGER,
}
_FIELDS: Tasks = {"answer": {"question": STRING, **_BOTH}, "generate": {"instruction": STRING, **_BOTH}}


@dataclass(frozen=True, slots=True)
class Case:
    """One question or instruction about `image` (as for Session.answer), and what should come of it.

    `expected` is the answer, or a picture like `image`; None where it is not known. Scores are given by `kind`.
    `baseline` is a picture that is no work to make, to be compared with.
    """

    name: str | float
    kind: str
    task: str
    words: str
    image: Any = None
    expected: Any = None
    frame: int | None = None
    window: tuple[float, float] | None = None
    max_new_tokens: int | None = None
    baseline: Any = None


def read_cases(path: Path) -> list[Case]:
    """The cases of a file: lines of JSON, paths of pictures relative to its folder.

    A line has the fields of a request of `serve`: `task` ("answer" or "generate"), `question` or `instruction`,
    `image`, `frame`, `window`, `max_new_tokens` and `id`; and `expected`, an answer or the path of a picture, and
    `kind`. Raises RequestError.
    """
    cases: list[Case] = []
    file_name = path.name or str(path)  # "." has none
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                try:
                    if len(line) > MAX_LINE_BYTES:
                        raise RequestError(f"a line must have at most {MAX_LINE_BYTES} bytes, found more")
                    if line.strip():
                        cases.append(_case(bytearray(line), number, path.parent))
                    if len(cases) > MAX_CASES:
                        raise RequestError(f"a file must have at most {MAX_CASES} cases, found more")
                except RequestError as error:
                    raise RequestError(f"{file_name} line {number}: {error}") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{file_name}: cannot be read: {getattr(error, 'strerror', None) or 'unusable'}") from None
    if not cases:
        raise RequestError(f"{file_name} must have at least one case, a line of JSON, found none")
    return cases


def _case(line: bytearray, number: int, folder: Path) -> Case:
    fields = parse(line)
    name = take_id(fields)
    task = take_task(fields, _FIELDS)
    words = fields.pop("question" if task == "answer" else "instruction")
    if "image" in fields:
        fields["image"] = folder / path_of(fields["image"])
    if task == "generate" and "expected" in fields:
        fields["expected"] = folder / path_of(fields["expected"])
    if "window" in fields:
        fields["window"] = tuple(fields["window"])
    kind = fields.pop("kind", task)
    if not kind.isprintable():
        raise RequestError("kind must be printable, found control characters")
    return Case(name=number if name is None else name, kind=kind, task=TASKS[task], words=words, **fields)


def check_cases(
    cases: Sequence[Case],
    sessions: Sequence[Session],
    *,
    scored: bool = True,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Find before hours are spent what would be found wrong in the midst of them.

    Every picture is read, every prompt made; with `scored` there must be an expected result. Raises RequestError.
    """
    for done, case in enumerate(cases):
        on_step(done, len(cases))
        try:
            if scored and case.expected is None:
                raise RequestError("expected is needed where nothing else is compared with, found none")
            read_if_any(case.image, case.frame, case.window)
            if case.task == GENERATION and case.expected is not None:
                read_image(case.expected)
            for session in sessions:
                plugins = sorted(session.bundle.manifest.tasks)
                if case.task not in plugins:
                    bundle = session.bundle.path.name
                    raise RequestError(f"the bundle {bundle!r} has no {case.task} plugin, only {', '.join(plugins)}")
                session.prompt(case.task, case.words, has_image=case.image is not None)
        except HealthGPTError as error:
            raise RequestError(f"case {case.name}: {in_one_line(error)}") from None
    on_step(len(cases), len(cases))


def phantom_cases(manifest: Manifest, answer_phantoms: int, picture_phantoms: int) -> list[Case]:
    """Every question about the first `answer_phantoms` held-out phantoms, every task of the first `picture_phantoms`.

    Those that the bundle has the plugin for. Raises BundleError where it is no bundle of the phantom.
    """
    if manifest.vision.image_size != _PHANTOM_INPUT:
        raise BundleError("only a bundle of the phantom model has cases of its own: give --cases")
    cases: list[Case] = []
    if COMPREHENSION in manifest.tasks and answer_phantoms:
        cases += [question_case(one) for subject in held_out(answer_phantoms) for one in questions(subject)]
    if GENERATION in manifest.tasks and picture_phantoms:
        cases += [task_case(one) for subject in held_out(picture_phantoms) for one in tasks(subject)]
    return cases


def question_case(asked: Question) -> Case:
    """A question about a phantom."""
    return Case(
        asked.kind, asked.kind, COMPREHENSION, asked.text, asked.picture, asked.answer, max_new_tokens=MAX_ANSWER_TOKENS
    )


def task_case(task: Task) -> Case:
    """A picture to make of a phantom."""
    return Case(task.kind, task.kind, GENERATION, task.instruction, task.picture, task.target, baseline=task.baseline)
