"""Weight files: placement, sharing, packing, and what does not fit its type."""

import hashlib

import numpy as np
import pytest
from onnx import TensorProto

from healthgpt_edge.errors import BundleError
from healthgpt_edge.export import weights
from healthgpt_edge.export.weights import ALIGNMENT_BYTES, WeightFile
from healthgpt_edge.manifest import FileEntry


def test_tensors_start_on_pages_and_the_hash_is_the_files(tmp_path):
    path = tmp_path / "w.bin"
    file = WeightFile(path, "weights/w.bin")
    first = file.put("a", TensorProto.FLOAT, lambda: np.arange(5, dtype=np.float32))
    second = file.put("b", TensorProto.FLOAT16, lambda: np.ones((3, 7), np.float32))
    files = file.close()
    data = path.read_bytes()
    assert (first.offset, first.length, second.offset, second.length) == (0, 20, ALIGNMENT_BYTES, 42)
    assert files == {"weights/w.bin": FileEntry(len(data), hashlib.sha256(data).hexdigest())}
    np.testing.assert_array_equal(np.frombuffer(data, np.float32, 5), np.arange(5))
    np.testing.assert_array_equal(np.frombuffer(data, np.float16, 21, ALIGNMENT_BYTES), np.ones(21))


def test_a_full_file_goes_on_in_the_next(tmp_path):
    (tmp_path / "weights").mkdir()
    with WeightFile(tmp_path / "weights/w.bin", "weights/w.bin", 6000) as file:
        places = [file.put(key, TensorProto.FLOAT, lambda: np.full(500, 7.0, np.float32)) for key in "abcd"]
        assert file.put("a", TensorProto.FLOAT, lambda: pytest.fail("it is stored")) == places[0]
        files = file.close()
    assert [(place.location, place.offset) for place in places] == [
        ("weights/w.bin", 0),
        ("weights/w.bin", ALIGNMENT_BYTES),
        ("weights/w-1.bin", 0),
        ("weights/w-1.bin", ALIGNMENT_BYTES),
    ]
    assert {name: entry.size for name, entry in files.items()} == dict.fromkeys(
        ("weights/w.bin", "weights/w-1.bin"), ALIGNMENT_BYTES + 2000
    )
    for name, entry in files.items():
        assert entry.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["w-1.bin", "w.bin"]


def test_a_key_is_produced_and_stored_once(tmp_path):
    file = WeightFile(tmp_path / "w.bin", "w.bin")
    calls = []
    for _ in range(2):
        stored = file.put("a", TensorProto.FLOAT, lambda: calls.append(1) or np.zeros(4, np.float32))
    assert (len(calls), stored.offset, file.size_bytes) == (1, 0, 16)


@pytest.mark.parametrize(
    ("data_type", "value", "message"),
    [
        (TensorProto.FLOAT16, 70000, r"float16 \(65504\), found 70000"),
        (TensorProto.BFLOAT16, 3.4e38, r"bfloat16 \(3\.38953e\+38\), found 3\.4e\+38"),
    ],
)
def test_a_value_beyond_its_type_is_refused(tmp_path, data_type, value, message):
    file = WeightFile(tmp_path / "w.bin", "w.bin")
    with pytest.raises(BundleError, match=f"tensor big must fit {message}: export another precision"):
        file.put("big", data_type, lambda: np.array([1, -value], np.float32))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("data_type", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_value_that_is_not_finite_is_refused(tmp_path, data_type, value):
    file = WeightFile(tmp_path / "w.bin", "w.bin")
    with pytest.raises(BundleError, match="tensor odd must be finite, found NaN or infinity"):
        file.put("odd", data_type, lambda: np.array([1, value], np.float32))


def test_bfloat16_holds_what_float16_does_not(tmp_path):
    """Bit for bit the upper half of a float32 that has zeros in its lower one."""
    values = np.array([480_000, -1e-30, 0.15625], np.float32).view(np.uint32) & 0xFFFF0000
    with WeightFile(tmp_path / "w.bin", "w.bin") as file:
        file.put("a", TensorProto.BFLOAT16, lambda: values.view(np.float32))
    np.testing.assert_array_equal(np.fromfile(tmp_path / "w.bin", np.uint16), values >> 16)


@pytest.mark.parametrize(
    "data_type", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT4]
)
def test_a_tensor_of_many_pieces_is_stored_as_one(tmp_path, monkeypatch, data_type):
    values = np.random.default_rng(0).integers(-8, 8, (7, 5)).astype(np.float32)
    if data_type in (TensorProto.INT8, TensorProto.INT4):
        values = values.astype(np.int8)
    stored = []
    for pieces, size in (("one", weights.VALUES_PER_PIECE), ("many", 4)):
        monkeypatch.setattr(weights, "VALUES_PER_PIECE", size)
        file = WeightFile(tmp_path / pieces, "w.bin")
        stored.append(file.put("a", data_type, lambda: values))
        file.close()
    assert stored[0] == stored[1]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
