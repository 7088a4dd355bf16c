"""The long run of the drafting benchmark: it goes on where it stopped and counts what differs."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.drafting import ids as drafting_ids
from benchmarks.drafting.ids import compare, differing_ids, read
from healthgpt_edge.manifest import GENERATION

IDS = [7, 8, 9, 6, 99]


class Session:
    """Makes pictures of four codes in two passes with drafts; `wrong` of them, and stops after `most`."""

    def __init__(self, wrong: int = 0, most: int = 1000) -> None:
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(codes=SimpleNamespace(grid=2)))
        self.executor, self.drafts = SimpleNamespace(), SimpleNamespace(costs={GENERATION: None})
        self.calls, self._wrong, self._most = [], wrong, most

    def generate(self, image, words, *, sampling, draft):
        if len(self.calls) == 2 * self._most:
            raise KeyboardInterrupt
        self.calls.append((words, sampling, draft))
        if draft == "none":
            return SimpleNamespace(token_ids=IDS, forward_passes=4, tokens_by_pass=[1, 1, 1, 2])
        ids = IDS if len(self.calls) > 2 * self._wrong else [7, 8, 5, 6, 99]
        return SimpleNamespace(token_ids=ids, forward_passes=2, tokens_by_pass=[1, 4])


@pytest.fixture(autouse=True)
def written_each_time(monkeypatch):
    monkeypatch.setattr(drafting_ids, "_WRITE_EVERY", 1)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    session = Session()
    assert compare(session, 2, whole, 60) is True
    first, second = Session(most=5), Session()
    with pytest.raises(KeyboardInterrupt):
        compare(first, 2, cut, 60)
    assert compare(second, 2, cut, 60) is True
    assert first.calls + second.calls == session.calls  # none made twice, none left out
    assert json.loads(cut.read_text()) == json.loads(whole.read_text())
    assert [one.pictures for one in read(whole).values()] == [2] * 6
    one = read(whole)["ct-to-mr"].to_json()
    assert (one["differing_ids"], one["fewer_passes"], one["accepted_per_pass"]) == (0, 2.0, 2.5)
    assert one["drafted_by_place"] == [[0, 1], [1, 1]]  # the first is the prefill's, the end is the last pass's own


def test_no_time_makes_no_picture(tmp_path):
    assert compare(Session(), 2, tmp_path / "ids.json", 0) is False
    assert read(tmp_path / "ids.json") == {} and read(tmp_path / "absent.json") == {}


def test_ids_that_differ_are_counted(tmp_path):
    compare(Session(wrong=3), 1, tmp_path / "ids.json", 60)
    assert sum(one.differing_ids for one in read(tmp_path / "ids.json").values()) == 3
    made, plain = SimpleNamespace(token_ids=[1, 2, 3]), SimpleNamespace(token_ids=[1, 5])
    assert differing_ids(made, plain) == 2


def test_a_state_of_another_count_is_refused(tmp_path):
    compare(Session(), 1, tmp_path / "ids.json", 60)
    with pytest.raises(SystemExit, match="compares 1 pictures of each task, got --pictures 2"):
        compare(Session(), 2, tmp_path / "ids.json", 60)
