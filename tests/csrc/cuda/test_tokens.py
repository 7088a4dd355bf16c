"""Choosing a token and gathering rows on the GPU, against runtime/decoding.py's rules in NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from formats import exact, store


class Selection:
    """Logits [B, N] chosen from step by step, as a graph's replays do."""

    def __init__(self, device, batch, steps, **settings):
        self.device, self.settings = device, settings
        self.step, self.past = (device.put(np.full(batch, value, np.int64)) for value in (0, 7))
        self.ids = device.poisoned(steps, batch, dtype=np.int64)
        self.token = device.poisoned(batch, dtype=np.int64)

    def choose(self, logits):
        self.device.kernels.token_selection(
            self.device.put(logits), self.step, self.ids, self.token, past_length=self.past, **self.settings
        )
        return self.device.get(self.token).copy()


class Lying:
    """A device as the runtime's executors know it, which hands the kernels addresses and no arrays."""

    stream = 0

    def __init__(self, device):
        self.device, self.kernels = device, device.kernels

    def allocate(self, size_bytes):
        values = self.device.put(np.zeros(size_bytes, np.uint8))
        address = values.ctypes.data if self.device.is_host else values.data_ptr()
        return SimpleNamespace(values=values, address=address, size_bytes=size_bytes)

    def upload(self, values, memory):
        memory.values[: values.nbytes] = self.device.put(values.view(np.uint8))

    def download(self, memory, shape, dtype):
        values = self.device.get(memory.values).view(dtype)
        return values[: np.prod(shape)].reshape(shape)

    def array(self, address, shape, dtype):
        protocol = "__array_interface__" if self.device.is_host else "__cuda_array_interface__"
        return SimpleNamespace(
            **{protocol: {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}}
        )


def test_the_runtimes_chooser_chooses_what_its_selector_does(device):
    """By addresses, with a grammar, a penalty, and a NaN at last."""
    pytest.importorskip("healthgpt_edge.session")
    from healthgpt_edge.decoding import CodeGrid, Sampling, Selector
    from healthgpt_edge.executors.chooser import Chooser

    random, rows, first_id, count = np.random.default_rng(4), 77, 100, 6
    scores = random.standard_normal((count, rows)).astype(np.float32)
    grammar = CodeGrid(first_id + 5, 40, first_id + 76, first_id + 60, total=100)
    selector = Selector(Sampling(), 1.3, first_id)
    lying = Lying(device)
    chooser = Chooser(lying, first_id, rows)
    logits, token, length = lying.allocate(scores[0].nbytes), lying.allocate(8), lying.allocate(8)
    for _ in range(2):  # the second time the first's ids count as seen
        chooser.begin(selector.choice(grammar, rows), count)
        for row in scores:
            lying.upload(row, logits)
            chooser.order(logits.address, token.address, length.address)
        found = chooser.ids().tolist()
        assert found == [selector.choose(row, grammar) for row in scores] and len(set(found)) > 1
    assert lying.download(length, (1,), np.int64) == 2 * count
    chooser.begin(selector.choice(grammar, rows), 1)
    lying.upload(np.full(rows, np.nan, np.float32), logits)
    chooser.order(logits.address, token.address, length.address)
    assert chooser.ids().tolist() == [-1]


def drawn(scores, temperature, top_p, times):
    """The sampling rule of runtime/decoding.py with its times given."""
    weights = np.exp((scores.astype(np.float64) - float(scores.max())) / temperature)
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= top_p * weights.sum()]] = 0
    return (weights / times).argmax()


@pytest.mark.parametrize("rows", [1, 33, 1023, 5000])
def test_the_largest_and_the_first_of_equal_ones(device, rows):
    random = np.random.default_rng(rows)
    selection = Selection(device, 2, 4, first_id=100)
    for step in range(4):
        logits = random.integers(-5, 5, (2, rows)).astype(np.float32)  # many are equal
        np.testing.assert_array_equal(selection.choose(logits), logits.argmax(-1) + 100)
        np.testing.assert_array_equal(device.get(selection.ids)[step], logits.argmax(-1) + 100)
    np.testing.assert_array_equal(device.get(selection.step), [4, 4])
    np.testing.assert_array_equal(device.get(selection.past), [11, 11])
    selection.choose(-logits)  # there are no more steps: nothing happens
    np.testing.assert_array_equal(device.get(selection.token), logits.argmax(-1) + 100)
    np.testing.assert_array_equal(device.get(selection.past), [11, 11])


def test_the_grammar_and_the_penalty(device):
    rows, random = 77, np.random.default_rng(0)
    may = random.random(rows) < 0.5
    bits = np.packbits(np.pad(may, (0, 96 - rows)), bitorder="little").view(np.int32)
    seen = device.put(np.zeros((1, rows), np.uint8))
    selection = Selection(device, 1, 12, allowed=device.put(bits), penalty=1.5, seen=seen)
    logits = random.standard_normal((1, rows)).astype(np.float32) * 3
    chosen = set()
    for _ in range(12):
        scores = logits[0].copy()
        for row in chosen:
            scores[row] = scores[row] * 1.5 if scores[row] < 0 else scores[row] / 1.5
        scores[~may] = -np.inf
        (found,) = selection.choose(logits)
        assert found == scores.argmax()
        chosen.add(int(found))
    assert len(chosen) > 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.3), (1e-3, 0.5)])
def test_sampling(device, temperature, top_p):
    steps, rows, random = 12, 700, np.random.default_rng(3)
    times = random.standard_exponential((steps, 1, rows)).astype(np.float32)
    settings = {"temperature": temperature, "top_p": top_p, "times": device.put(times)}
    selection = Selection(device, 1, steps, **settings)
    for step in range(steps):
        logits = random.standard_normal((1, rows)).astype(np.float32) * 2
        logits[0, 5:9] = logits[0].max()  # equal ones come in the order of their rows
        assert selection.choose(logits) == drawn(logits[0], temperature, top_p, times[step, 0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_token(device, value):
    logits = np.zeros((2, 40), np.float32)
    logits[1, 39] = value
    assert Selection(device, 2, 1, first_id=9).choose(logits).tolist() == [9, -1]


def test_wrong_settings_are_named(device):
    logits = np.zeros((1, 4), np.float32)
    for settings, message in (
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": 1.0}, "sampling needs random times"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"penalty": 2.0}, "a penalty needs the ids seen before"),
        ({"penalty": 0.0}, "the penalty must be above 0"),
        ({"allowed": device.put(np.zeros(2, np.int32))}, r"allowed must be \[1\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Selection(device, 1, 1, **settings).choose(logits)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("widen", [False, True])
def test_gather_rows(device, storage, widen):
    table = store(np.random.default_rng(0).standard_normal((9, 301)), storage)
    ids = np.array([8, 0, 3, 3, -1, 9], np.int64)
    output = device.poisoned(6, 301, dtype=np.float32 if widen else table.dtype)
    device.kernels.gather_rows(device.put(ids), device.put(table), output, storage, widen)
    found = device.get(output) if widen else exact(device.get(output), storage)
    np.testing.assert_array_equal(found[:4], exact(table, storage)[ids[:4]])
    assert np.isnan(found[4:]).all()
