"""Answer a question about a picture, or make a picture: the public calls of the runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from PIL import Image

from .bundle import Bundle
from .checks import is_whole
from .decoding import CodeGrid, Decoded, FreeText, Grammar, Sampling, Selector, decoding
from .drafting import Drafter, Drafts, PassKind
from .errors import BundleError, Cancelled, ExecutorError, GenerationError, PromptError
from .executors import Context, Executor, Group, RunAhead, open_executor
from .images import prepare, read_if_any
from .invariance import sequences_agree
from .kept import read_kept, write_kept
from .manifest import Codes
from .prefixes import Prefix, Prefixes
from .previews import Previews
from .prompt import IMAGE, TEMPLATES, Tokenizer, prompt_ids, with_patches
from .results import Answer, Clock, Picture
from .steps import Seat, Step, Steps, finish

if TYPE_CHECKING:
    from .together import Together

COMPREHENSION, GENERATION = "comprehension", "generation"
# The original's limits (HEALTHGPT.md); pictures of another size get the same slack over their codes.
DEFAULT_ANSWER_TOKENS = 1024
CODE_SLACK_TOKENS = 76
DEFAULT_TOGETHER = 4
# Each has a stack and queues: a number gone wrong would take the machine's memory before anything is computed.
MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of one task, by the names that Session.answer and Session.generate have for it.

    With `groups`, which gives that of a task if there is one, it goes on among others after the prefill, undrafted; but
    by itself for as long as `is_alone` says so.
    """

    task: str
    image: Any
    words: str
    max_new_tokens: int | None = None
    sampling: Sampling | None = None
    frame: int | None = None
    window: tuple[float, float] | None = None
    draft: str = "auto"
    certify: bool = False
    stop: Callable[[], bool] | None = None
    on_prompt: Callable[[int, int], None] | None = None
    faithful: bool = False
    groups: Callable[[str], Group | None] | None = None
    is_alone: Callable[[], bool] = lambda: False

    def is_unwanted(self) -> bool:
        """Whether who asked has given it up."""
        return bool(self.stop and self.stop())

    def check_wanted(self) -> None:
        """Raise Cancelled if who asked has given it up."""
        if self.is_unwanted():
            raise Cancelled


class _Rest(NamedTuple):
    """What is left to do after a prefill, whose logits [1, rows] are these."""

    logits: np.ndarray
    max_new_tokens: int
    grammar: Callable[[], Grammar]
    drafter: Drafter | None
    clock: Clock
    on_token: Callable[[int], None]
    run_ahead: RunAhead | None


class _Run(NamedTuple):
    """Prompt ids (the image as -200), new ids, and as in Made."""

    prompt_ids: list[int]
    ids: list[int]
    draft: str
    by_pass: list[int]
    certified: bool
    reused_tokens: int


class Session:
    """A loaded bundle, all its tasks resident. Made by `load`."""

    def __init__(
        self, bundle: Bundle, executor: Executor, tokenizer: Tokenizer, *, prefix_cache_bytes: int = 0
    ) -> None:
        self.bundle, self.executor, self.tokenizer = bundle, executor, tokenizer
        self.drafts = Drafts(executor, bundle.manifest)
        self._prefixes = Prefixes(prefix_cache_bytes)
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
            COMPREHENSION, image, question, max_new_tokens, sampling, frame, window, draft, certify, stop, on_prompt
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

        run = yield from self._running(request, request.max_new_tokens, FreeText, clock, on_token)
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
            GENERATION,
            image,
            instruction,
            max_new_tokens,
            sampling,
            frame,
            window,
            draft,
            certify,
            stop,
            on_prompt,
            faithful,
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
            raise GenerationError(f"max_new_tokens must be at least {total + 1} for {total} codes, got {most!r:.40}")
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

        run = yield from self._running(request, most, grammar, clock, on_token)
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

    def _running(
        self,
        request: Request,
        max_new_tokens: int | None,
        grammar: Callable[[], Grammar],
        clock: Clock,
        on_token: Callable[[int], None],
    ) -> Steps[_Run]:
        """Vision, prefill and decode of one request."""
        manifest, task = self.bundle.manifest, request.task
        if task not in manifest.tasks:
            raise BundleError(f"the bundle has no {task} plugin, only {', '.join(sorted(manifest.tasks))}")
        if not (is_whole(max_new_tokens) and max_new_tokens >= 1):
            raise GenerationError(f"max_new_tokens must be at least 1, got {max_new_tokens!r:.40}")
        if not isinstance(request.sampling, Sampling | None):
            raise GenerationError(f"sampling must be a Sampling or None, got {type(request.sampling).__name__}")
        group = request.groups(task) if request.groups else None
        if group and request.draft not in ("auto", "none"):
            raise GenerationError(
                f"draft must be auto or none for requests that are done together, got {request.draft!r:.40}"
            )
        has_image = request.image is not None
        ids = prompt_ids(self.tokenizer, manifest.template, request.words, has_image, task == GENERATION)
        spliced = with_patches(ids, manifest.language.vocab, manifest.vision.patches)
        if len(spliced) + max_new_tokens > manifest.language.max_positions:
            raise PromptError(
                f"prompt and new tokens must fit {manifest.language.max_positions} positions, "
                f"got {len(spliced)} + {max_new_tokens}"
            )
        picture = read_if_any(request.image, request.frame, request.window)
        with clock.stage("draft"):
            drafts = group is None or (request.is_alone() and not request.certify)
            drafter = self._drafter(request, ids, picture) if drafts else None
        pixels = prepare(picture, manifest.vision.image_size, manifest.vision.background) if picture else None
        prefix = self._prefix(task, spliced, pixels)
        request.check_wanted()
        context, logits, reused_tokens = yield from self._prefilled(request, spliced, pixels, prefix, clock)
        rest = _Rest(logits, max_new_tokens, grammar, drafter, clock, on_token, context.run_ahead)
        seat = Seat(context)
        del context  # the seat's alone, for in a group it is not needed

        def keep() -> None:
            """Keep what was read, once it is not needed here, so that the next question may begin with it."""
            if prefix and not seat.group:
                self._prefixes.keep(prefix, cast(Context, seat.sequence))

        with ExitStack() as groups:

            def before_pass() -> None:
                request.check_wanted()
                if group and not seat.group and not (drafter and request.is_alone()):
                    member = groups.enter_context(group.join(cast(Context, seat.sequence)))
                    keep()
                    seat.sequence, seat.group = member, group

            try:
                decoded = yield from self._decoded(request, seat, rest, before_pass)
            except Cancelled:
                keep()
                raise
            keep()
        drafted = drafter is not None and drafter.drafted
        compared = not drafted or request.certify
        certified = (compared and not prefix) or self.drafts.agree(task)
        draft = drafter.name if drafter and drafted else "none"
        return _Run(ids, decoded.ids, draft, decoded.by_pass, certified, reused_tokens)

    def _prefilled(
        self, request: Request, spliced: np.ndarray, pixels: np.ndarray | None, prefix: Prefix | None, clock: Clock
    ) -> Steps[tuple[Context, np.ndarray, int]]:
        """A sequence of the whole prompt, the logits [1, rows] of its last token, and how many tokens were kept."""
        context = self._prefixes.take(prefix) if prefix else None
        reused_tokens = context.length if context else 0
        if context is None:
            features = None
            if pixels is not None:
                with clock.stage("vision"):
                    features = self.executor.features(request.task, pixels)
            context = self.executor.context(request.task, features)
        with clock.stage("prefill"):
            # The first question is cut behind its picture, too: so no answer depends on what was asked before.
            cut = prefix.length if prefix else 0
            for piece in [*self._pieces(spliced[context.length : cut]), *self._pieces(spliced[cut:])]:
                if request.is_unwanted():
                    if prefix and context.length >= cut:  # the picture is read all the same
                        self._prefixes.keep(prefix, context)
                    raise Cancelled
                logits = yield Step(context, piece, 1, request.faithful, None)
                if request.on_prompt:
                    request.on_prompt(context.length, len(spliced))
        return context, logits, reused_tokens

    def _pieces(self, ids: np.ndarray) -> list[np.ndarray]:
        """The tokens of a prompt as passes take them, about as many each."""
        if not len(ids):
            return []
        most = self.executor.prompt_tokens or len(ids)
        return np.array_split(ids, -(-len(ids) // most))

    def _decoded(
        self,
        request: Request,
        seat: Seat,
        rest: _Rest,
        before_pass: Callable[[], None],
    ) -> Steps[Decoded]:
        """Decode after a prefill, and once more without drafts where that is to be certified."""
        manifest = self.bundle.manifest
        first_logit = 0 if request.faithful else manifest.tasks[request.task].first_logit
        prompt_tokens = seat.sequence.length

        def decoded(drafter: Drafter | None, on_token: Callable[[int], None]) -> Steps[Decoded]:
            return decoding(
                seat,
                rest.logits,
                rest.grammar(),
                Selector(request.sampling or Sampling(), manifest.decoding.repetition_penalty, first_logit),
                stop_ids=frozenset(manifest.decoding.stop_ids),
                max_new_tokens=rest.max_new_tokens,
                full_vocabulary=request.faithful,
                drafter=drafter,
                run_ahead=rest.run_ahead,
                on_token=on_token,
                on_pass=before_pass,
            )

        with rest.clock.stage("decode"):
            made = yield from decoded(rest.drafter, rest.on_token)
        if request.certify and rest.drafter is not None and rest.drafter.drafted:
            seat.sequence.length = prompt_tokens
            with rest.clock.stage("certify"):
                plain = yield from decoded(None, lambda token_id: None)
            _check_equal(made.ids, plain.ids)
        return made

    def together(self, limit: int = DEFAULT_TOGETHER) -> Together:
        """Up to `limit` requests at a time, one pass for all of them. Raises GenerationError.

            together = session.together()
            for path in paths:
                together.generate(path, path, "Reconstruct the image.")
            for path, picture, error in together:
                ...

        What comes of each is what it gives by itself. Only one that is alone is drafted for, and each takes memory for
        its caches.
        """
        from .together import Together

        return Together(self, limit)

    def group(self, task: str, sequences: int) -> Group | None:
        """One of the executor's, if sequences in it were found to get the bits that they get by themselves."""
        if task not in self._groups_agree:
            self._groups_agree[task] = sequences_agree(self.executor, task)
        return self.executor.group(task, sequences) if self._groups_agree[task] else None

    def forget_pictures(self) -> None:
        """Drop what was kept of pictures for the next question (`prefix_cache_bytes` of `load`)."""
        self._prefixes.clear()

    def save_pictures(self, path: str | os.PathLike[str]) -> None:
        """Write what is kept of pictures to a file, for another session of the same bundle and executor.

        It is a patient's data, readable by the file's owner alone. Raises KeptError.
        """
        pictures = [(prefix, context.caches(prefix.length)) for prefix, context in self._prefixes.kept()]
        write_kept(Path(path), self.bundle.manifest, self.executor.name, pictures)

    def restore_pictures(self, path: str | os.PathLike[str]) -> None:
        """Keep what `save_pictures` wrote, too, so that questions about its pictures start after them.

        Raises KeptError.
        """
        limit_bytes = self._prefixes.limit_bytes
        for prefix, caches in read_kept(Path(path), self.bundle.manifest, self.executor.name, limit_bytes):
            context = self.executor.context(prefix.task, None)
            context.restore(caches)
            # One by one: a context may take much more than what a short prefix left in it, and the limit counts that.
            self._prefixes.keep(prefix, context)
            del context

    def _prefix(self, task: str, spliced: np.ndarray, pixels: np.ndarray | None) -> Prefix | None:
        """What the prompt of every question about a picture begins with, if that is to be kept."""
        if pixels is None or not self._prefixes:
            return None
        length = int(np.flatnonzero(spliced >= self.bundle.manifest.language.vocab)[-1]) + 1
        return Prefix.of(task, pixels, spliced[:length])

    def _drafter(self, request: Request, ids: list[int], picture: Image.Image | None) -> Drafter | None:
        sampled = request.sampling is not None and request.sampling.temperature > 0
        kind = PassKind(request.task, sampled, request.faithful)
        if request.task == GENERATION:
            return self.drafts.for_picture(request.draft, kind, picture)
        return self.drafts.for_text(request.draft, kind, [token_id for token_id in ids if token_id != IMAGE])

    def _report(self, run: _Run, clock: Clock) -> dict[str, Any]:
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
        """The codes as the original reads them off a free run: every number in the text, less its last token.

        The original cuts the stop token off as text; at the token limit it cuts the last code instead, and so must
        we to agree with it.
        """
        numbers = re.findall(r"\d+", self.tokenizer.decode(new_ids[:-1]))
        try:
            return [int(number) for number in numbers]
        except ValueError as error:  # Python's limit, thousands of digits
            raise GenerationError(f"codes must be numbers, the model gave {max(map(len, numbers))} digits") from error


def _check_equal(drafted: list[int], plain: list[int]) -> None:
    """Raise GenerationError unless ids that were drafted are those of plain decoding."""
    if drafted != plain:
        pairs = enumerate(zip(drafted, plain, strict=False))
        place = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(drafted), len(plain)))
        raise GenerationError(
            f"drafted ids must be those of plain decoding, found another at token {place} of {len(plain)}; "
            "run again without drafts"
        )


def load(
    path: str | os.PathLike[str],
    *,
    tasks: tuple[str, ...] | None = None,
    executor: str = "onnx",
    device: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    kernels: bool = True,
    prefix_cache_bytes: int = 0,
    on_verified: Callable[[int, int], None] = lambda read, total: None,
) -> Session:
    """Open the bundle at `path` for `tasks` (all of them by default).

    `verify=False` skips the hashes of the weight files, which take most of the time of a cold start; `on_verified` gets
    how many bytes have been hashed, of how many.
    `executor` is onnx, on the `device` cpu or cuda, or tensorrt, on the engines that `healthgpt-edge build` made.
    `kernels=False` computes everything by ONNX Runtime's own nodes. With `prefix_cache_bytes` the session keeps the
    caches of pictures it was asked about, the last ones in so many bytes, and a request with the very same picture
    starts after it; by default nothing outlives its request. Raises BundleError, ExecutorError, GenerationError.
    """
    if threads is not None and not (is_whole(threads) and 1 <= threads <= MAX_THREADS):
        raise ExecutorError(f"threads must be from 1 to {MAX_THREADS}, got {threads!r:.40}")
    bundle = Bundle.open(Path(path), verify=False)
    manifest = bundle.manifest
    if manifest.template not in TEMPLATES:
        raise BundleError(f"template must be one of {', '.join(TEMPLATES)}, found {manifest.template!r:.40}")
    wanted = tuple(sorted(manifest.tasks)) if tasks is None else tasks
    if not wanted or isinstance(wanted, str):
        raise BundleError(f"tasks must be some of {', '.join(sorted(manifest.tasks))}, got {wanted!r:.40}")
    for task in wanted:
        if task not in manifest.tasks:
            raise BundleError(f"the bundle has no {task} plugin, only {', '.join(sorted(manifest.tasks))}")
    tokenizer = Tokenizer.load(bundle.file(manifest.tokenizer.file), manifest.tokenizer.options)
    if verify:  # after all that takes no time, for this reads gigabytes
        bundle.verify(on_bytes=on_verified)
    engine = open_executor(bundle, wanted, executor, device, threads, kernels)
    return Session(bundle, engine, tokenizer, prefix_cache_bytes=prefix_cache_bytes)
