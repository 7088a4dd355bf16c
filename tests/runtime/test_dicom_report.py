"""Answers written as DICOM structured reports: in the patient's study, and never taken for a person's words."""

import logging
import warnings

import numpy as np
import pydicom
import pytest
from command import run
from dicom_samples import SECRET, dicom, identified, real_file
from dicom_samples import item as sequence
from PIL import Image
from pydicom.uid import CTImageStorage, EnhancedSRStorage

from healthgpt_edge import read_study, write_image, write_report
from healthgpt_edge.errors import ImageError
from healthgpt_edge.machine import version

GREY = np.zeros((4, 6), np.uint8)
EXCHANGES = [("Is there a fracture?", "Ja – größer als 3 mm. 骨折"), ("Where?", "")]


def written(folder, source, **options):
    path = folder / "report.dcm"
    write_report(path, EXCHANGES, read_study(source, **options))
    return pydicom.dcmread(path)


def items(dataset, value_type):
    """All items of a type below `dataset`, by the meaning of their names."""
    found = []
    for item in dataset.get("ContentSequence", []):
        if item.ValueType == value_type:
            found.append((item.ConceptNameCodeSequence[0].CodeMeaning, item))
        found += items(item, value_type)
    return found


def test_it_holds_each_question_with_its_answer(tmp_path):
    report = written(tmp_path, real_file("CT_small.dcm"))
    assert report.SOPClassUID == report.file_meta.MediaStorageSOPClassUID == EnhancedSRStorage
    said = [
        (name, item.TextValue) for name, item in items(report, "TEXT") if name in ("Question", "Answer of the model")
    ]
    assert said == [
        ("Question", "Is there a fracture?"),
        ("Answer of the model", "Ja – größer als 3 mm. 骨折"),
        ("Question", "Where?"),
        ("Answer of the model", "(no words)"),
    ]
    # Each item is read by itself, not as a part of running text (PS3.3 C.17.3).
    containers = [report, *(item for _, item in items(report, "CONTAINER"))]
    assert [item.ContinuityOfContent for item in containers] == ["SEPARATE"] * 3


def test_pairs_that_are_walked_only_once_are_all_written(tmp_path):
    questions, answers = zip(*EXCHANGES, strict=True)
    path = tmp_path / "report.dcm"
    write_report(path, zip(questions, answers, strict=True), read_study(real_file("CT_small.dcm")))
    assert [item.TextValue for name, item in items(pydicom.dcmread(path), "TEXT") if name == "Question"] == [*questions]


def test_control_characters_that_dicom_does_not_allow_are_replaced(tmp_path):
    write_report(tmp_path / "report.dcm", [("What?", "a\x1b[2Jb\0c\x85\td\n")], read_study(real_file("CT_small.dcm")))
    (answer,) = (
        item.TextValue
        for name, item in items(pydicom.dcmread(tmp_path / "report.dcm"), "TEXT")
        if name == "Answer of the model"
    )
    assert answer.rstrip() == "a\ufffd[2Jb\ufffdc\ufffd\td"


def test_it_says_who_wrote_it_and_that_nobody_reviewed_it(tmp_path):
    report = written(tmp_path, real_file("CT_small.dcm"))
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert report.CompletionFlag == "COMPLETE"
    ((_, observer),) = items(report, "CODE")
    assert observer.ConceptCodeSequence[0].CodeMeaning == "Device"
    texts = dict(items(report, "TEXT"))
    device = [texts[f"Device Observer {part}"].TextValue for part in ("Name", "Manufacturer", "Model Name")]
    assert device == ["HealthGPT", "healthgpt-edge", version("healthgpt-edge")]
    notes = [item.TextValue for name, item in items(report, "TEXT") if name == "Comment"]
    assert len(notes) == 1 and "generative model" in notes[0] and "Nobody has reviewed it" in notes[0]


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "US1_J2KR.dcm", "ExplVR_BigEnd.dcm"])
def test_it_belongs_to_the_study_of_its_source(tmp_path, name):
    source, report = pydicom.dcmread(real_file(name)), written(tmp_path, real_file(name))
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert str(report.get(keyword) or "") == str(source.get(keyword) or ""), keyword
    assert report.SeriesInstanceUID != source.SeriesInstanceUID
    ((_, picture),) = items(report, "IMAGE")
    assert picture.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    series = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == source.SeriesInstanceUID


@pytest.mark.parametrize(
    "kind", [CTImageStorage, "1.2.840.10008.5.1.4.1.1.6", "1.2.3.4"], ids=["CT", "retired", "private"]
)
def test_a_source_of_any_class_is_referred_to(tmp_path, kind):
    report = written(tmp_path, dicom(GREY, **identified(SOPClassUID=kind)))
    ((_, picture),) = items(report, "IMAGE")
    series = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    for reference in (picture.ReferencedSOPSequence[0], series.ReferencedSOPSequence[0]):
        assert reference.ReferencedSOPClassUID == kind


def test_a_frame_is_referred_to(tmp_path):
    report = written(tmp_path, dicom(np.zeros((3, 4, 6), np.uint8), **identified()), frame=2)
    ((_, picture),) = items(report, "IMAGE")
    assert picture.ReferencedSOPSequence[0].ReferencedFrameNumber == 3


@pytest.mark.parametrize(
    ("name", "charset"),
    [("Müller^Jörg", "ISO_IR 100"), ("Yamada^Tarou=山田^太郎", ["", "ISO 2022 IR 87"]), ("Müller", "ISO_IR 192")],
)
def test_names_of_other_character_sets_are_written_as_utf8(tmp_path, name, charset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about what the test makes
        source = dicom(GREY, **identified(PatientName=name, SpecificCharacterSet=charset, StudyDate="2004.01.19"))
        report = written(tmp_path, source)
        assert (report.PatientName, report.StudyDate) == (name, "2004.01.19")
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert name.encode() in (tmp_path / "report.dcm").read_bytes()


def test_a_name_with_escape_sequences_is_written_without_them(tmp_path):
    """The example of PS3.5, K.2: pydicom leaves these in what it decodes."""
    name = b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab="
    placeholder = "x" * len(name)
    both = {"PatientName": placeholder, "StudyDescription": placeholder}
    source = dicom(GREY, **identified(SpecificCharacterSet=["", "ISO 2022 IR 58"], **both))
    report = written(tmp_path, source.replace(placeholder.encode(), name))
    assert {str(report[keyword].value) for keyword in both} == {"Zhang^XiaoDong=张^小东", "Zhang^XiaoDong=张^小东="}


def test_a_name_with_a_backslash_stays_two(tmp_path):
    source = dicom(GREY, **identified(PatientName="Doe^JanexRoe")).replace(b"JanexRoe", b"Jane\\Roe")
    assert list(written(tmp_path, source).PatientName) == ["Doe^Jane", "Roe"]


def test_how_it_was_deidentified_is_said_in_utf8(tmp_path):
    code = sequence(CodeValue="113100", CodingSchemeDesignator="DCM", CodeMeaning="Größe")
    removed = {"PatientIdentityRemoved": "YES", "DeidentificationMethodCodeSequence": code}
    report = written(tmp_path, dicom(GREY, **identified(SpecificCharacterSet="ISO_IR 100", **removed)))
    assert report.PatientIdentityRemoved == "YES"
    assert [one.CodeMeaning for one in report.DeidentificationMethodCodeSequence] == ["Größe"]


def test_names_that_the_source_lacks_are_empty(tmp_path):
    report = written(tmp_path, dicom(GREY, **identified(PatientName=None)))
    assert (report.PatientName, report.ReferringPhysicianName) == ("", "")


def test_what_cannot_be_written_is_refused(tmp_path):
    study = read_study(real_file("CT_small.dcm"))
    with pytest.raises(ImageError, match=r"report.txt: reports are written as DICOM, .* that ends in \.dcm"):
        write_report(tmp_path / "report.txt", EXCHANGES, study)
    with pytest.raises(ImageError, match=r"report\.dcm: expected at least one question with its answer, found none"):
        write_report(tmp_path / "report.dcm", [], study)
    for wrong in (EXCHANGES[0], [("Where?",)], [("Where?", 3)], ["ab"]):
        with pytest.raises(ImageError, match=r"report\.dcm: expected pairs of texts, a question and its answer, found"):
            write_report(tmp_path / "report.dcm", wrong, study)
    with pytest.raises(ImageError, match=r"report\.dcm: expected a study, as `read_study` gives it, got str"):
        write_report(tmp_path / "report.dcm", EXCHANGES, "CT_small.dcm")
    with pytest.raises(ImageError, match=r"made\.dcm: expected a study, as `read_study` gives it, got str"):
        write_image(tmp_path / "made.dcm", np.zeros((2, 2, 3), np.uint8), "CT_small.dcm")
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_patient_is_told(tmp_path, caplog, recwarn, monkeypatch):
    caplog.set_level(logging.DEBUG)
    study = read_study(dicom(GREY, **identified(PatientName=SECRET)))
    write_report(tmp_path / "report.dcm", [(SECRET, SECRET)], study)

    def fails(buffer, document, **options):
        raise ValueError(f"cannot encode {document.PatientName}")

    monkeypatch.setattr("healthgpt_edge.dicom.study.dcmwrite", fails)
    with pytest.raises(ImageError, match=r"bad\.dcm: cannot be written as DICOM: .* \(ValueError\)") as caught:
        write_report(tmp_path / "bad.dcm", [(SECRET, SECRET)], study)
    assert SECRET not in str(caught.value) + caplog.text and not any(SECRET in str(w.message) for w in recwarn)
    assert [path.name for path in tmp_path.iterdir()] == ["report.dcm"]


def test_the_command_line_writes_what_it_answers(golden_bundle, tmp_path):
    words = ["answer", golden_bundle("m3"), "--question", "What is this?", "--question", "Where?", "--threads", 1]
    words += ["--image", real_file("CT_small.dcm"), "--max-new-tokens", 4, "--json"]
    done = run(*words, "--out", tmp_path / "report.dcm")
    assert (done.code, done.errors, done.json["report"]) == (0, "", str(tmp_path / "report.dcm"))
    report = pydicom.dcmread(tmp_path / "report.dcm")
    answers = [item.TextValue for name, item in items(report, "TEXT") if name == "Answer of the model"]
    assert answers == [one["text"] or "(no words)" for one in done.json["answers"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "report.png"], "--out must be a .dcm file, got 'report.png'"),
        (["--out", "report.dcm"], "--out as .dcm takes patient and study from --image, which is missing"),
        (
            ["--out", "report.dcm", "--image", "PNG"],
            "expected DICOM, to write DICOM of its study, found another format",
        ),
    ],
)
def test_what_cannot_be_written_is_said_before_the_bundle_is_loaded(tmp_path, options, message):
    Image.fromarray(GREY).save(tmp_path / "image.png")
    options = [str(tmp_path / "image.png") if word == "PNG" else word for word in options]
    done = run("answer", tmp_path / "no bundle", "--question", "What?", *options)
    assert done.code == 2 and message in done.errors and done.errors.count("\n") == 1


def test_a_report_does_not_take_the_place_of_its_picture(tmp_path):
    scan = tmp_path / "scan.dcm"
    scan.write_bytes(dicom(GREY, **identified()))
    before = scan.read_bytes()
    done = run("answer", tmp_path / "no bundle", "--question", "What?", "--image", scan, "--out", scan)
    assert done.code == 2 and "--out must not be the file of --image, got 'scan.dcm' for both" in done.errors
    assert scan.read_bytes() == before
