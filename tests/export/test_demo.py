"""What the demo says where it cannot run, or where a bundle leaves the original. (`make demo` runs the whole of it.)"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from healthgpt_edge.errors import HealthGPTError
from healthgpt_edge.export import demo


def test_without_the_phantom_beside_the_package(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "PHANTOM", tmp_path / "none")
    with pytest.raises(HealthGPTError, match=r"needs the phantom checkpoint of a source checkout, found none beside"):
        demo.run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_dicom_files_of_the_tests(monkeypatch) -> None:
    monkeypatch.setattr(demo, "get_testdata_file", lambda name, download: None)
    message = r"needs CT_small.dcm of pydicom and pydicom-data: pip install 'healthgpt-edge\[test\]'"
    with pytest.raises(HealthGPTError, match=message):
        demo.list_jobs()


def test_ids_that_leave_the_reference_in_float32_are_an_error(monkeypatch, tmp_path: Path) -> None:
    """In int4 they may; that is what the table shows."""
    jobs = [demo.Job(name, None, "?", False) for name in ("first", "second", "third")]
    wrong = {("first", "int4"), ("second", "fp32"), ("third", "fp32")}

    def row(session, job, precision, expected_ids, reference_ms):
        return SimpleNamespace(
            name=job.name, precision=precision, answer="", ids_equal_reference=(job.name, precision) not in wrong
        ), None

    monkeypatch.setattr(demo, "list_jobs", lambda: jobs)
    monkeypatch.setattr(demo, "_export", lambda checkpoint, out, precision: None)
    monkeypatch.setattr(demo.HealthGPT, "load", lambda checkpoint, task: None)
    monkeypatch.setattr(demo, "_reference", lambda references, session, job: ([], 0.0))
    monkeypatch.setattr(demo, "_run", row)
    monkeypatch.setattr(demo, "contact_sheet", lambda shown: np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(HealthGPTError, match=r"must equal the PyTorch reference, they differ for second, third$"):
        demo.run(tmp_path)
    assert (tmp_path / "contact-sheet.png").exists()
