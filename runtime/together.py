"""Requests that are done together: one pass of the language model appends tokens to each of them.

A pass reads all the weights, however many sequences it is over. Where that takes most of its time, sequences beside the
first cost little, and the ids are those of each request by itself.
"""

from __future__ import annotations

import time
import traceback
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .checks import is_whole
from .errors import Cancelled, OptionError
from .executors import Group
from .inference import Request
from .manifest import COMPREHENSION, GENERATION
from .results import Answer, Picture
from .session import DEFAULT_ANSWER_TOKENS, Session
from .steps import Passed, Step, Steps

# As many rows as a pass of drafts has at most; and each sequence has caches.
MAX_TOGETHER = 64


class Done(NamedTuple):
    """What became of a request: its result, or the error that ended it."""

    name: Hashable
    result: Any = None
    error: Exception | None = None


class _Begun(NamedTuple):
    """A request, and the pass that it waits for."""

    steps: Steps[Any]
    step: Step


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what an error's frames hold: it is in a variable of theirs, so they would wait for the collector."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class Together:
    """Does requests of a session, up to `limit` of them at a time. Made by Session.together; for one thread.

    A prompt is read by itself, in pieces between which the others go on. What no group of the executor takes is done by
    itself, too, and so is a request while it is the only one.

    Where an interrupt breaks a pass off, those that were in it end with Cancelled, and the others can be gone on with.
    """

    def __init__(self, session: Session, limit: int) -> None:
        if not (is_whole(limit) and 1 <= limit <= MAX_TOGETHER):
            raise OptionError(f"limit must be from 1 to {MAX_TOGETHER} requests, got {limit!r:.40}")
        self.limit = limit
        self._session = session
        self._groups: dict[str, Group | None] = {}  # by task
        self._names: dict[Steps[Any], Hashable] = {}  # of all that are not done
        self._waiting: deque[Steps[Any]] = deque()
        self._alone: _Begun | None = None  # one whose prompt is read, or that no group takes
        self._grouped: dict[Group, list[_Begun]] = defaultdict(list)
        self._done: deque[Done] = deque()  # which nobody has been told yet

    def __len__(self) -> int:
        """How many requests are not done, or done and not told yet."""
        return len(self._names) + len(self._done)

    @property
    def _begun(self) -> int:
        return sum(map(len, self._grouped.values())) + (self._alone is not None)

    def __iter__(self) -> Iterator[Done]:
        """Do all that was added; each as soon as it is done."""
        while self:
            self._make_passes()
            if self._done:
                yield self._done.popleft()

    def answer(self, name: Hashable, image: Any, question: str, **options: Any) -> None:
        """Add a question; `options` are those of Session.answer."""
        self.add(name, self.answering(image, question, **options))

    def generate(self, name: Hashable, image: Any, instruction: str, **options: Any) -> None:
        """Add a picture to make; `options` are those of Session.generate."""
        self.add(name, self.generating(image, instruction, **options))

    def answering(
        self,
        image: Any,
        question: str,
        *,
        max_new_tokens: int = DEFAULT_ANSWER_TOKENS,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Steps[Answer]:
        """A question, for something to `add` that does more than answer it."""
        request = self._request(COMPREHENSION, image, question, max_new_tokens=max_new_tokens, **options)
        return self._session.answering(request, on_text)

    def generating(
        self,
        image: Any,
        instruction: str,
        *,
        on_code: Callable[[int], None] | None = None,
        on_preview: Callable[[np.ndarray, int], None] | None = None,
        **options: Any,
    ) -> Steps[Picture]:
        """A picture to make, likewise."""
        request = self._request(GENERATION, image, instruction, **options)
        return self._session.generating(request, on_code, on_preview)

    def _request(self, task: str, image: Any, words: str, **options: Any) -> Request:
        # Weak, for this holds the request: broken off, neither is to wait for the collector with the caches.
        this = weakref.proxy(self)
        return Request(
            task, image, words, groups=lambda name: this._group(name), is_alone=lambda: this._is_alone(), **options
        )

    def add(self, name: Hashable, steps: Steps[Any]) -> None:
        """Add a request, which begins when there is a place for it."""
        self._names[steps] = name
        self._waiting.append(steps)

    def step(self) -> list[Done]:
        """Begin a request if there is a place for one; if nothing is done by that, make the next passes.

        These are one of the request that is alone, and one of each group. What is done now.
        """
        self._make_passes()
        done = list(self._done)
        self._done.clear()
        return done

    def _make_passes(self) -> None:
        """As `step` says, unless something is done already."""
        try:
            self._begin()
            if not self._done:
                self._pass_alone()
                for group in list(self._grouped):
                    self._pass_group(group)
        except BaseException as error:  # caches may hold half a pass, so none that was in it can go on
            broken_off = Cancelled(f"the request was broken off by {type(error).__name__}")
            wait = self._that_wait()
            for steps in [steps for steps in self._names if steps not in wait]:
                steps.close()
                self._end(steps, error=broken_off)
            raise

    def _that_wait(self) -> set[Steps[Any]]:
        """The requests that wait to begin or for a pass."""
        begun = [*([self._alone] if self._alone else []), *chain.from_iterable(self._grouped.values())]
        return {*self._waiting, *(one.steps for one in begun)}

    def _begin(self) -> None:
        while self._waiting and not self._done and self._alone is None and self._begun < self.limit:
            steps = self._waiting.popleft()
            self._go_on(steps, partial(next, steps))

    def _pass_alone(self) -> None:
        if self._alone is None:
            return
        (steps, step), self._alone = self._alone, None
        self._go_on(steps, lambda: steps.send(step.alone()))

    def _pass_group(self, group: Group) -> None:
        some = self._grouped.pop(group)
        tokens = {one.step.sequence: one.step.token_ids for one in some}
        whole = {one.step.sequence for one in some if one.step.full_vocabulary}
        begin = time.perf_counter()
        try:
            logits = group.forward(tokens, whole)
        except Exception as error:  # whatever it is, it is what became of each of them
            for one in some:
                one.steps.close()
                self._end(one.steps, error=error)
            return
        seconds = time.perf_counter() - begin
        for one in some:
            going_on = self._grouped.get(group)
            lead = len(going_on[0].step.token_ids) if going_on else None
            passed = Passed(logits[one.step.sequence], seconds, len(some), lead)
            self._go_on(one.steps, partial(one.steps.send, passed))

    def _go_on(self, steps: Steps[Any], go_on: Callable[[], Step]) -> None:
        """Take a request, by `go_on`, to the next pass that it waits for."""
        try:
            step = go_on()
        except StopIteration as end:
            self._end(steps, end.value)
        except Exception as error:
            steps.close()
            _clear_frames(error)
            self._end(steps, error=error)
        else:
            begun = _Begun(steps, step)
            if step.group:
                self._grouped[step.group].append(begun)
            else:
                self._alone = begun

    def _end(self, steps: Steps[Any], result: Any = None, error: Exception | None = None) -> None:
        self._done.append(Done(self._names.pop(steps), result, error))

    def _is_alone(self) -> bool:
        """Whether there is no other request. For one that is being taken on, which is nowhere then."""
        return not self._waiting and self._begun == 0

    def _group(self, task: str) -> Group | None:
        if task not in self._groups:
            self._groups[task] = self._session.group(task, self.limit) if self.limit > 1 else None
        return self._groups[task]
