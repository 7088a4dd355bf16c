"""One request of a session: vision, prefill and decoding, pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from PIL import Image

from .checks import is_whole
from .decoding import Decoded, Grammar, Sampling, Selector, decoding
from .drafting import Drafter, PassKind
from .errors import BundleError, Cancelled, GenerationError, OptionError, PromptError
from .executors import Context, Executor, Group
from .images import prepare, read_if_any
from .manifest import GENERATION
from .prefixes import Prefix
from .prompt import IMAGE
from .results import Clock
from .steps import Seat, Step, Steps

if TYPE_CHECKING:
    from .session import Session


# Tokens behind a picture with which its caches are kept as they are; with more they are copied without these.
_KEPT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of one task, by the names that Session.answer and Session.generate have for it.

    With `groups`, which gives that of a task if there is one, it goes on among others after the prefill; with drafts
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

    def check_wanted(self) -> None:
        """Raise Cancelled if who asked has given it up."""
        if self.stop and self.stop():
            raise Cancelled


class Run(NamedTuple):
    """Prompt ids (the image as -200), new ids, and as in Made."""

    prompt_ids: list[int]
    ids: list[int]
    draft: str
    by_pass: list[int]
    certified: bool
    reused_tokens: int


class Inference:
    """A request on a session. `steps` gives its passes, once."""

    def __init__(
        self,
        session: Session,
        request: Request,
        max_new_tokens: int | None,
        grammar: Callable[[], Grammar],
        clock: Clock,
        on_token: Callable[[int], None],
    ) -> None:
        """Raises BundleError and OptionError for what is asked amiss."""
        manifest = session.bundle.manifest
        if request.task not in manifest.tasks:
            raise BundleError(f"the bundle has no {request.task} plugin, only {', '.join(sorted(manifest.tasks))}")
        if not (is_whole(max_new_tokens) and max_new_tokens >= 1):
            raise OptionError(f"max_new_tokens must be at least 1, got {max_new_tokens!r:.40}")
        if request.faithful and request.task != GENERATION:
            raise OptionError("faithful is for pictures, got it with a question")
        if not isinstance(request.sampling, Sampling | None):
            raise OptionError(f"sampling must be a Sampling or None, got {type(request.sampling).__name__}")
        self._group = request.groups(request.task) if request.groups else None
        self._session, self._manifest, self._request = session, manifest, request
        self._max_new_tokens, self._grammar, self._clock, self._on_token = max_new_tokens, grammar, clock, on_token
        self._prefix: Prefix | None = None
        self._drafter: Drafter | None = None
        self._seat: Seat | None = None

    def steps(self) -> Steps[Run]:
        """Vision, prefill and decoding. Raises HealthGPTError."""
        request, manifest = self._request, self._manifest
        ids, spliced = self._prompt()
        picture = read_if_any(request.image, request.frame, request.window)
        with self._clock.stage("draft"):
            self._drafter = self._drafter_for(ids, picture)
        pixels = prepare(picture, manifest.vision.image_size, manifest.vision.background) if picture else None
        self._prefix = self._prefix_of(spliced, pixels)
        request.check_wanted()
        try:
            logits, reused_tokens = yield from self._prefill(spliced, pixels)
            decoded = yield from self._decode(logits)
        except Cancelled:
            self._keep()
            raise
        self._keep()
        drafted = self._drafter is not None and self._drafter.drafted
        compared = not drafted or request.certify
        certified = (compared and not self._prefix) or self._session.drafts.agree(request.task)
        draft = self._drafter.name if self._drafter and drafted else "none"
        return Run(ids, decoded.ids, draft, decoded.by_pass, certified, reused_tokens)

    def _prompt(self) -> tuple[list[int], np.ndarray]:
        """The prompt's ids, and what the language graph gets for them: with the picture's patches."""
        request, most = self._request, self._manifest.language.max_positions
        ids, spliced = self._session.prompt(request.task, request.words, request.image is not None)
        if len(spliced) + self._max_new_tokens > most:
            raise PromptError(
                f"prompt and new tokens must fit {most} positions, got {len(spliced)} + {self._max_new_tokens}"
            )
        return ids, spliced

    def _drafter_for(self, ids: list[int], picture: Image.Image | None) -> Drafter | None:
        request, drafts = self._request, self._session.drafts
        sampled = request.sampling is not None and request.sampling.temperature > 0
        kind = PassKind(request.task, sampled, request.faithful)
        if request.task == GENERATION:
            return drafts.for_picture(request.draft, kind, picture)
        return drafts.for_text(request.draft, kind, [token_id for token_id in ids if token_id != IMAGE])

    def _prefix_of(self, spliced: np.ndarray, pixels: np.ndarray | None) -> Prefix | None:
        """What the prompt of every question about a picture begins with, if that is to be kept."""
        if pixels is None or not self._session.prefixes:
            return None
        length = int(np.flatnonzero(spliced >= self._manifest.language.vocab)[-1]) + 1
        return Prefix.of(self._request.task, pixels, spliced[:length])

    def _keep(self) -> None:
        """Keep what was read of a picture, once it is not needed here: the next question may begin with it."""
        if not self._prefix or not self._seat or self._seat.group or self._seat.sequence.length < self._prefix.length:
            return
        context = cast(Context, self._seat.sequence)
        if context.room is None and context.length > self._prefix.length + _KEPT_TOKENS:
            # Caches that have grown with a long answer would leave less room for other pictures, or none for this one.
            grown, context = context, self._session.executor.context(self._request.task, None)
            context.restore(grown.caches(self._prefix.length))
        self._session.prefixes.keep(self._prefix, context)

    def _prefill(self, spliced: np.ndarray, pixels: np.ndarray | None) -> Steps[tuple[np.ndarray, int]]:
        """Take a seat with the whole prompt; the logits [1, rows] of its last token, and how many tokens were kept."""
        request, executor, prefix = self._request, self._session.executor, self._prefix
        context = self._session.prefixes.take(prefix) if prefix else None
        reused_tokens = context.length if context else 0
        if context is None:
            features = None
            if pixels is not None:
                with self._clock.stage("vision"):
                    features = executor.features(request.task, pixels)
            context = executor.context(request.task, features)
        self._seat = Seat(context)
        with self._clock.stage("prefill"):
            # The first question is cut behind its picture, too: so no answer depends on what was asked before.
            cut = prefix.length if prefix else 0
            context.expect(len(spliced) - reused_tokens)
            for piece in [*pieces(executor, spliced[reused_tokens:cut]), *pieces(executor, spliced[cut:])]:
                request.check_wanted()
                logits = (yield Step(context, piece, 1, request.faithful, None)).logits
                if request.on_prompt:
                    request.on_prompt(context.length, len(spliced))
        return logits, reused_tokens

    def _decode(self, logits: np.ndarray) -> Steps[Decoded]:
        """Decode after the prefill, and once more without drafts where that is to be certified."""
        assert self._seat
        request, manifest, seat = self._request, self._manifest, self._seat
        first_logit = 0 if request.faithful else manifest.tasks[request.task].first_logit
        prompt_tokens, run_ahead = seat.sequence.length, cast(Context, seat.sequence).run_ahead

        def decoded(drafter: Drafter | None, on_token: Callable[[int], None]) -> Steps[Decoded]:
            return decoding(
                seat,
                logits,
                self._grammar(),
                Selector(request.sampling or Sampling(), manifest.decoding.repetition_penalty, first_logit),
                stop_ids=frozenset(manifest.decoding.stop_ids),
                max_new_tokens=self._max_new_tokens,
                full_vocabulary=request.faithful,
                drafter=drafter,
                run_ahead=run_ahead,
                on_token=on_token,
                on_pass=before_pass,
            )

        def before_pass() -> None:
            request.check_wanted()
            if self._group and not seat.group and not (self._drafter and request.is_alone()):
                member = groups.enter_context(self._group.join(cast(Context, seat.sequence)))
                self._keep()
                seat.sequence, seat.group = member, self._group

        with ExitStack() as groups:
            with self._clock.stage("decode"):
                made = yield from decoded(self._drafter, self._on_token)
            if request.certify and self._drafter is not None and self._drafter.drafted:
                seat.sequence.length = prompt_tokens
                with self._clock.stage("certify"):
                    plain = yield from decoded(None, lambda token_id: None)
                _check_equal(made.ids, plain.ids)
        return made


def pieces(executor: Executor, ids: np.ndarray) -> list[np.ndarray]:
    """The tokens int64 [S] of a prompt as passes take them, about as many each."""
    if not len(ids):
        return []
    most = executor.prompt_tokens or len(ids)
    return np.array_split(ids, -(-len(ids) // most))


def read_prompt(executor: Executor, context: Context, ids: np.ndarray) -> np.ndarray:
    """Read the tokens int64 [S] of a prompt, at least one, as users' are read; the logits [1, rows] of the last."""
    context.expect(len(ids))
    *_, logits = (context.forward(piece) for piece in pieces(executor, ids))
    return logits


def _check_equal(drafted: list[int], plain: list[int]) -> None:
    """Raise GenerationError unless ids that were drafted are those of plain decoding."""
    if drafted != plain:
        pairs = enumerate(zip(drafted, plain, strict=False))
        place = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(drafted), len(plain)))
        raise GenerationError(
            f"drafted ids must be those of plain decoding, found another at token {place} of {len(plain)}; "
            "run again without drafts"
        )
