"""Answer a question about a picture, or make a picture: the public calls of the runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle import Bundle
from .checks import is_whole
from .decoding import CodeGrid, FreeText, Grammar, Sampling
from .drafting import Drafts
from .errors import BundleError, ExecutorError, GenerationError, KeptError, OptionError
from .executors import Executor, Group, open_executor
from .inference import Inference, Request, Run
from .invariance import sequences_agree
from .kept import read_kept, write_kept
from .manifest import COMPREHENSION, GENERATION, Codes
from .prefixes import Prefixes
from .previews import Previews
from .prompt import TEMPLATES, Tokenizer, prompt_ids, with_patches
from .results import Answer, Clock, Picture
from .steps import Steps, finish

if TYPE_CHECKING:
    from .together import Together

# The original's limits: 1024 new tokens, 1100 for a picture of 1024 codes. Other sizes get the same slack.
DEFAULT_ANSWER_TOKENS = 1024
CODE_SLACK_TOKENS = 76
# What the original cuts off for a stop token, whatever it is: len(" <|end|>").
STOP_CHARACTERS = 8
DEFAULT_TOGETHER = 4
# Each has a stack and queues: a number gone wrong would take the machine's memory before anything is computed.
MAX_THREADS = 1024


class Session:
    """A loaded bundle, all its tasks resident. Made by `load`.

    Several threads may use it at once: each request gets what it gets alone, and their passes share the device.
    """

    def __init__(
        self, bundle: Bundle, executor: Executor, tokenizer: Tokenizer, *, keep_pictures_bytes: int = 0
    ) -> None:
        self.bundle, self.executor, self.tokenizer = bundle, executor, tokenizer
        self.drafts = Drafts(executor, bundle.manifest)
        self.prefixes = Prefixes(keep_pictures_bytes)
        self._groups_agree: dict[str, bool] = {}

    def answer(
        self,
        image: Any,
        question: str,
        *,
        max_new_tokens: int = DEFAULT_ANSWER_TOKENS,
        sampling: Sampling | None = None,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
        draft: str = "auto",
        certify: bool = False,
        on_prompt: Callable[[int, int], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer `question` about `image` (path, bytes, PIL image, array, or None for no image).

        `on_text` gets the answer in pieces as it is written. Greedy unless `sampling` says otherwise. `frame` and
        `window` (centre, width) choose what of a DICOM file is looked at. `draft` is auto, lookup or none: where
        guesses at the next tokens come from, which change the time that the answer takes, not the answer. `certify`
        decodes again without them and raises GenerationError where the ids differ; `on_text` waits for it. `on_prompt`
        gets how many tokens of the prompt have been read, of how many. `stop` is asked before each forward pass, and
        before other stages, whether to give the answer up, which raises Cancelled. Raises HealthGPTError.
        """
        request = Request(
            task=COMPREHENSION,
            image=image,
            words=question,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            frame=frame,
            window=window,
            draft=draft,
            certify=certify,
            stop=stop,
            on_prompt=on_prompt,
        )
        return finish(self.answering(request, on_text))

    def answering(self, request: Request, on_text: Callable[[str], None] | None = None) -> Steps[Answer]:
        """What `answer` does, pass by pass."""
        clock = Clock()
        streamer = self.tokenizer.streamer(skip_special=True)  # as the original prints answers
        stop_ids = frozenset(self.bundle.manifest.decoding.stop_ids)
        held_back: list[str] = []
        write = held_back.append if request.certify else on_text

        def on_token(token_id: int) -> None:
            if write and token_id not in stop_ids and (piece := streamer.push(token_id)):
                write(piece)

        run = yield from Inference(self, request, request.max_new_tokens, FreeText, clock, on_token).steps()
        if on_text:
            for piece in filter(None, [*held_back, streamer.end()]):
                on_text(piece)
        kept = run.ids[:-1] if run.ids and run.ids[-1] in stop_ids else run.ids
        return Answer(**self._report(run, clock), text=self.tokenizer.decode(kept, skip_special=True))

    def generate(
        self,
        image: Any,
        instruction: str,
        *,
        faithful: bool = False,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        frame: int | None = None,
        window: tuple[float, float] | None = None,
        draft: str = "auto",
        certify: bool = False,
        on_prompt: Callable[[int, int], None] | None = None,
        on_code: Callable[[int], None] | None = None,
        on_preview: Callable[[np.ndarray, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Picture:
        """Make a picture from `image` (or None) by `instruction`.

        The codes are locked to a full grid; with `faithful` the model runs free as in the original, and the result
        is an error unless it is exactly one grid of codes. `draft` is auto, input, jacobi or none; `certify`,
        `on_prompt` and `stop` are as for `answer`. `on_code` gets the number of tokens so far, `on_preview` now and
        then the picture so far, uint8 [H, W, 3], and how many rows of its codes are final. Raises HealthGPTError.
        """
        request = Request(
            task=GENERATION,
            image=image,
            words=instruction,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            frame=frame,
            window=window,
            draft=draft,
            certify=certify,
            stop=stop,
            on_prompt=on_prompt,
            faithful=faithful,
        )
        return finish(self.generating(request, on_code, on_preview))

    def generating(
        self,
        request: Request,
        on_code: Callable[[int], None] | None = None,
        on_preview: Callable[[np.ndarray, int], None] | None = None,
    ) -> Steps[Picture]:
        """What `generate` does, pass by pass."""
        clock = Clock()
        codes = self._codes()
        total = codes.grid * codes.grid
        most = total + CODE_SLACK_TOKENS if request.max_new_tokens is None else request.max_new_tokens
        if not request.faithful and not (is_whole(most) and most > total):
            raise OptionError(f"max_new_tokens must be at least {total + 1} for {total} codes, got {most!r:.40}")
        previews = Previews(codes.grid, self.executor.picture, on_preview) if on_preview else None
        values: list[int] = []
        count = 0

        def on_token(token_id: int) -> None:
            nonlocal count
            count += 1
            if on_code:
                on_code(count)
            if 0 <= (code := token_id - codes.first) < codes.count:
                values.append(code)
                if previews:
                    previews.add(code)

        def grammar() -> Grammar:
            if request.faithful:
                return FreeText()
            return CodeGrid(codes.first, codes.count, codes.end, codes.newline, total)

        run = yield from Inference(self, request, most, grammar, clock, on_token).steps()
        if request.faithful:
            values = self._free_codes(run.ids)
        if len(values) != total:
            raise GenerationError(f"a picture needs exactly {total} codes, the model gave {len(values)}")
        if values and max(values) >= codes.count:
            raise GenerationError(f"codes must be below {codes.count}, the model gave {max(values)}")
        request.check_wanted()
        with clock.stage("codes"):
            pixels = self.executor.picture(np.array(values, np.int64).reshape(codes.grid, codes.grid))
        return Picture(**self._report(run, clock), pixels=pixels, codes=values)

    def prompt(self, task: str, words: str, has_image: bool) -> tuple[list[int], np.ndarray]:
        """The ids of a prompt, its picture as -200, and as the language graph takes them, int64 [S]: with its patches.

        Raises PromptError, BundleError.
        """
        manifest = self.bundle.manifest
        ids = prompt_ids(self.tokenizer, manifest.template, words, has_image, task == GENERATION)
        return ids, with_patches(ids, manifest.language.vocab, manifest.vision.patches)

    def together(self, limit: int = DEFAULT_TOGETHER) -> Together:
        """Up to `limit` requests at a time, one pass for all of them. Raises OptionError.

            together = session.together()
            for path in paths:
                together.generate(path, path, "Reconstruct the image.")
            for path, picture, error in together:
                ...

        What comes of each is what it gives by itself. Each takes memory for its caches.
        """
        from .together import Together

        return Together(self, limit)

    def group(self, task: str, sequences: int) -> Group | None:
        """One of the executor's, if sequences in it were found to get the bits that they get by themselves."""
        if task not in self._groups_agree:
            self._groups_agree[task] = sequences_agree(self.executor, task)
        return self.executor.group(task, sequences) if self._groups_agree[task] else None

    def forget_pictures(self) -> None:
        """Drop what was kept of pictures for the next question (`keep_pictures_bytes` of `load`)."""
        self.prefixes.clear()

    def save_pictures(self, path: str | os.PathLike[str]) -> None:
        """Write what is kept of pictures to a file, for another session of the same bundle and executor.

        It is a patient's data, readable by the file's owner alone. Raises KeptError, also where nothing is kept.
        """
        pictures = [(prefix, context.caches(prefix.length)) for prefix, context in self.prefixes.kept()]
        if not pictures:
            raise KeptError(f"no picture is kept, within keep_pictures_bytes={self.prefixes.limit_bytes}")
        write_kept(Path(path), self.bundle.manifest, self.executor.name, pictures)

    def restore_pictures(self, path: str | os.PathLike[str]) -> None:
        """Keep what `save_pictures` wrote, too, so that questions about its pictures start after them.

        Raises KeptError.
        """
        limit_bytes = self.prefixes.limit_bytes
        for prefix, caches in read_kept(Path(path), self.bundle.manifest, self.executor.name, limit_bytes):
            context = self.executor.context(prefix.task, None)
            context.restore(caches)
            # One by one: a context may take much more than what a short prefix left in it, and the limit counts that.
            self.prefixes.keep(prefix, context)
            del context

    def _report(self, run: Run, clock: Clock) -> dict[str, Any]:
        """What Answer and Picture share."""
        return {
            "prompt_ids": run.prompt_ids,
            "token_ids": run.ids,
            "timings_ms": clock.report(),
            "executor": self.executor.name,
            "draft": run.draft,
            "forward_passes": len(run.by_pass),
            "accepted_per_pass": round(len(run.ids) / len(run.by_pass), 3),
            "tokens_by_pass": run.by_pass,
            "certified": run.certified,
            "reused_tokens": run.reused_tokens,
        }

    def _codes(self) -> Codes:
        if self.bundle.manifest.codes is None or GENERATION not in self.bundle.manifest.tasks:
            raise BundleError("the bundle has no generation plugin")
        return self.bundle.manifest.codes

    def _free_codes(self, new_ids: list[int]) -> list[int]:
        """The codes as the original reads them off a free run: every number in the text less the stop token.

        At the token limit this cuts the last code instead, and so must we to agree with it.
        """
        numbers = re.findall(r"\d+", self.tokenizer.decode(new_ids)[:-STOP_CHARACTERS])
        try:
            return [int(number) for number in numbers]
        except ValueError as error:  # Python's limit, thousands of digits
            raise GenerationError(f"codes must be numbers, the model gave {max(map(len, numbers))} digits") from error


def load(
    path: str | os.PathLike[str],
    *,
    tasks: tuple[str, ...] | None = None,
    executor: str = "onnx",
    device: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    kernels: bool = True,
    keep_pictures_bytes: int = 0,
    on_verified: Callable[[int, int], None] = lambda read, total: None,
) -> Session:
    """Open the bundle at `path` for `tasks` (all of them by default).

    `verify=False` skips the hashes of the weight files, which take most of the time of a cold start; `on_verified` gets
    how many bytes have been hashed, of how many.
    `executor` is onnx, on the `device` cpu or cuda, or tensorrt, on the engines that `healthgpt-edge build` made.
    `kernels=False` computes everything by ONNX Runtime's own nodes. With `keep_pictures_bytes` the session keeps the
    caches of pictures it was asked about, the last ones in so many bytes, and a request with the very same picture
    starts after it; by default nothing outlives its request. Raises BundleError, ExecutorError, OptionError.
    """
    if threads is not None and not (is_whole(threads) and 1 <= threads <= MAX_THREADS):
        raise ExecutorError(f"threads must be from 1 to {MAX_THREADS}, got {threads!r:.40}")
    bundle = Bundle.open(Path(path), verify=False)
    manifest = bundle.manifest
    if manifest.template not in TEMPLATES:
        raise BundleError(f"template must be one of {', '.join(TEMPLATES)}, found {manifest.template!r:.40}")
    wanted = tuple(sorted(manifest.tasks)) if tasks is None else tasks if isinstance(tasks, str) else tuple(tasks)
    if not wanted or isinstance(wanted, str):
        raise BundleError(f"tasks must be some of {', '.join(sorted(manifest.tasks))}, got {wanted!r:.40}")
    for task in wanted:
        if task not in manifest.tasks:
            raise BundleError(f"the bundle has no {task} plugin, only {', '.join(sorted(manifest.tasks))}")
    tokenizer = Tokenizer.load(bundle.file(manifest.tokenizer.file), manifest.tokenizer.options)
    if verify:  # after all that takes no time, for this reads gigabytes
        bundle.verify(on_bytes=on_verified)
    engine = open_executor(bundle, wanted, executor, device, threads, kernels)
    return Session(bundle, engine, tokenizer, keep_pictures_bytes=keep_pictures_bytes)
