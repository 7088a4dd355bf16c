"""Pictures written as DICOM: in the patient's study, and never taken for what was acquired."""

import logging
import warnings

import numpy as np
import pydicom
import pytest
from command import run
from dicom_samples import SECRET, dicom, identified, item, real_file
from pydicom.uid import (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from test_dicom_files import JPEG, encapsulated

from healthgpt_edge import read_study, write_image, write_report
from healthgpt_edge.errors import ImageError
from healthgpt_edge.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
GREY = np.zeros((4, 6), np.uint8)


def written(folder, source, **options):
    path = folder / "out.dcm"
    write_image(path, PIXELS, read_study(source, **options))
    return pydicom.dcmread(path)


def test_the_pixels_are_what_was_made(tmp_path):
    made = written(tmp_path, real_file("CT_small.dcm"))
    np.testing.assert_array_equal(made.pixel_array, PIXELS)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "out.dcm")), PIXELS)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "US1_J2KR.dcm", "ExplVR_BigEnd.dcm"])
def test_it_belongs_to_the_study_of_its_source(tmp_path, name):
    source, made = pydicom.dcmread(real_file(name)), written(tmp_path, real_file(name))
    for keyword in (
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "StudyInstanceUID",
        "StudyDate",
        "StudyDescription",
    ):
        assert str(made.get(keyword) or "") == str(source.get(keyword) or ""), keyword
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert made.SourceImageSequence[0].ReferencedSOPClassUID == source.SOPClassUID


NAMED = {
    "PatientName": "Doe^Jane",
    "PatientID": "17",
    "IssuerOfPatientID": "a hospital",
    "PatientBirthDate": "19700102",
    "PatientSex": "F",
    "StudyDate": "20240119",
    "StudyTime": "112233",
    "StudyID": "18",
    "StudyDescription": "a study",
    "AccessionNumber": "19",
    "ReferringPhysicianName": "Roe^Richard",
}


def test_all_that_names_patient_and_study_is_in_pictures_and_reports(tmp_path):
    """Whatever is lost of it, an archive files them with somebody else."""
    study = read_study(dicom(GREY, **identified(**NAMED)))
    write_image(tmp_path / "picture.dcm", PIXELS, study)
    write_report(tmp_path / "report.dcm", [("What?", "That.")], study)
    for name in ("picture.dcm", "report.dcm"):
        made = pydicom.dcmread(tmp_path / name)
        assert {keyword: made[keyword].value for keyword in NAMED} == NAMED
        # By their series, too, they are not the scanner's.
        assert (made.Manufacturer, made.SeriesNumber) == ("healthgpt-edge", 9001)


def test_it_says_that_it_was_not_acquired(tmp_path):
    made = written(tmp_path, real_file("CT_small.dcm"))
    assert made.SOPClassUID == made.file_meta.MediaStorageSOPClassUID == SecondaryCaptureImageStorage
    assert made.ImageType[0] == "DERIVED" and made.ContentQualification == "RESEARCH"
    assert "not acquired" in made.DerivationDescription and "synthetic" in made.SeriesDescription
    assert "PixelSpacing" not in made


DESCRIPTION = {
    "LossyImageCompression": "01",
    "BurnedInAnnotation": "YES",
    "BodyPartExamined": "BREAST",
    "ImageLaterality": "L",
    "PatientIdentityRemoved": "YES",
    "DeidentificationMethod": "by hand",
}


def test_it_says_of_the_source_what_is_true_of_it_too(tmp_path):
    """That numbers were lost before, that a name may be burned in, which side it is, and that names were taken out."""
    made = written(tmp_path, dicom(GREY, **identified(**DESCRIPTION)))
    assert {keyword: made[keyword].value for keyword in DESCRIPTION} == DESCRIPTION
    made = written(tmp_path, dicom(GREY, **identified()))
    assert not DESCRIPTION.keys() & set(made.dir())


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, ""),
        ({"BodyPartExamined": "CHEST"}, None),
        ({"BodyPartExamined": "HAND", "Laterality": "R"}, "R"),
        ({"ImageLaterality": "R"}, None),
    ],
)
def test_the_side_is_empty_only_where_nothing_is_known_of_the_part(tmp_path, attributes, expected):
    assert written(tmp_path, dicom(GREY, **identified(**attributes))).get("Laterality") == expected


def test_a_lossy_encoding_is_lossy_whatever_the_source_says(tmp_path):
    """And that nothing was lost is no word about a picture that a model made."""
    for syntax in (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless):  # read_study looks at no pixel
        for attributes in ({}, {"LossyImageCompression": "00"}):
            source = encapsulated(JPEG, syntax=syntax, **identified(**attributes))
            assert written(tmp_path, source).LossyImageCompression == "01"
    assert pydicom.dcmread(real_file("US1_J2KR.dcm")).LossyImageCompression == "00"
    assert "LossyImageCompression" not in written(tmp_path, real_file("US1_J2KR.dcm"))


def test_each_picture_is_a_series_of_its_own(tmp_path):
    source = real_file("CT_small.dcm")
    first, second = written(tmp_path, source), written(tmp_path, source)
    for keyword in ("SeriesInstanceUID", "SOPInstanceUID"):
        assert len({first[keyword].value, second[keyword].value, pydicom.dcmread(source)[keyword].value}) == 3


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, ["L", "P"]),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, ["P", "F"]),
        ({"ImageOrientationPatient": [-0.8, 0.6, 0, 0, 0, -1]}, ["RP", "F"]),
        ({"PatientOrientation": ["A", "F"], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, ["A", "F"]),
        ({"PatientOrientation": "AF"}, []),
        ({}, []),
    ],
)
def test_the_orientation_is_that_of_the_source(tmp_path, attributes, expected):
    made = written(tmp_path, dicom(GREY, **identified(**attributes)))
    assert list(made.PatientOrientation or []) == expected


def test_of_several_frames_it_is_that_of_the_frame(tmp_path):
    """Enhanced CT and MR say so, and which side it is, for each frame."""
    frames = [
        item(
            PlaneOrientationSequence=item(ImageOrientationPatient=cosines),
            FrameAnatomySequence=item(FrameLaterality=side),
        )[0]
        for cosines, side in (([1, 0, 0, 0, 1, 0], "L"), ([0, 1, 0, 0, 0, -1], "R"))
    ]
    several = dicom(np.zeros((2, 4, 6), np.uint8), **identified(PerFrameFunctionalGroupsSequence=frames))
    for frame, expected in enumerate(((["L", "P"], "L", None), (["P", "F"], "R", None))):
        made = written(tmp_path, several, frame=frame)
        assert (list(made.PatientOrientation), made.ImageLaterality, made.get("Laterality")) == expected


def test_an_orientation_that_is_no_numbers_is_none(tmp_path):
    source = dicom(GREY, **identified(ImageOrientationPatient=[1, 0, 0, 0, 1, 0.25]))
    made = written(tmp_path, source.replace(b"0.25", b"0!25"))
    assert list(made.PatientOrientation or []) == []


def test_a_report_leaves_the_study_as_it_was(tmp_path):
    """In UTF-8 itself, it must not make the next picture's character set UTF-8."""
    study = read_study(dicom(GREY, **identified(PatientName="Müller^Jo", SpecificCharacterSet="ISO_IR 100")))
    write_report(tmp_path / "report.dcm", [("Q?", "A.")], study)
    write_image(tmp_path / "picture.dcm", PIXELS, study)
    made = pydicom.dcmread(tmp_path / "picture.dcm")
    assert (made.SpecificCharacterSet, made.PatientName) == ("ISO_IR 100", "Müller^Jo")


def test_what_could_not_be_written_is_refused_before_there_is_a_picture(monkeypatch):
    def fails(buffer, image, **options):
        raise ValueError(f"cannot encode {image.PatientName}")

    monkeypatch.setattr("healthgpt_edge.dicom.study.dcmwrite", fails)
    message = r"picture: cannot be written as DICOM of its study: damaged or not supported \(ValueError\)"
    with pytest.raises(ImageError, match=message):
        read_study(dicom(GREY, **identified()))


def test_a_frame_is_referred_to(tmp_path):
    several, one = dicom(np.zeros((3, 4, 6), np.uint8), **identified()), dicom(GREY, **identified())
    assert written(tmp_path, several, frame=2).SourceImageSequence[0].ReferencedFrameNumber == 3
    assert written(tmp_path, several).SourceImageSequence[0].ReferencedFrameNumber == 1
    assert "ReferencedFrameNumber" not in written(tmp_path, one).SourceImageSequence[0]


@pytest.mark.parametrize("frame", [3, -1, 1.0, True, "1"])
def test_a_frame_that_the_source_lacks_is_refused(frame):
    several = dicom(np.zeros((3, 4, 6), np.uint8), **identified())
    with pytest.raises(ImageError, match="picture: frame must be from 0 to 2, got "):
        read_study(several, frame=frame)


@pytest.mark.parametrize(
    "attributes",
    [
        # No caret in the name, a sex and a date that the standard does not know.
        {"PatientName": "Müller", "PatientSex": "X", "StudyDate": "2004.01.19", "SpecificCharacterSet": "ISO_IR 100"},
        {"PatientName": "Yamada^Tarou=山田^太郎", "SpecificCharacterSet": ["", "ISO 2022 IR 87"]},
    ],
)
def test_names_and_dates_that_a_site_lives_with_stay(tmp_path, attributes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about what the test makes
        made = written(tmp_path, dicom(GREY, **identified(**attributes)))
        assert {keyword: made[keyword].value for keyword in attributes} == attributes


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 13", "山田^表ソ".encode("shift_jis")),  # as many write in Japan; the set has no kanji
        ("ISO_IR 192", b"M\xfcller^J "),  # not UTF-8
        ("ISO_IR 192", b"  Doe^Jane="),
    ],
)
def test_a_name_stays_to_the_byte_whatever_its_character_set_lacks(tmp_path, charset, name):
    placeholder = "x" * len(name)
    for_both = {"PatientName": placeholder, "StudyDescription": placeholder, "SpecificCharacterSet": charset}
    source = dicom(GREY, **identified(**for_both)).replace(placeholder.encode(), name)
    written(tmp_path, source)
    assert (tmp_path / "out.dcm").read_bytes().count(name) == 2


@pytest.mark.parametrize("missing", ["StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID"])
def test_a_source_that_names_no_study_is_refused(missing):
    several = [generate_uid(), generate_uid()]
    for attributes, found in (({}, "none"), ({missing: several}, "several")):
        made = {keyword: value for keyword, value in identified().items() if keyword != missing} | attributes
        with pytest.raises(ImageError, match=f"picture: expected one {missing} in the data set, found {found}"):
            read_study(dicom(GREY, **made))


def test_what_does_not_fit_together_is_refused(tmp_path):
    study = read_study(real_file("CT_small.dcm"))
    for name, given in {"out.dcm": None, "out.png": study}.items():
        with pytest.raises(ImageError, match=f"{name}: a DICOM file needs the study it belongs to, and a PNG has none"):
            write_image(tmp_path / name, PIXELS, given)
    with pytest.raises(ImageError, match="picture: expected DICOM, to write DICOM of its study, found another format"):
        read_study(b"no DICOM")
    with pytest.raises(ImageError, match="expected a path or bytes as the picture, found ndarray"):
        read_study(GREY)
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_patient_is_told(tmp_path, caplog, recwarn, monkeypatch):
    caplog.set_level(logging.DEBUG)
    study = read_study(dicom(GREY, **identified(PatientName=SECRET)))  # highdicom warns of names without a caret
    assert SECRET not in repr(study)
    write_image(tmp_path / "out.dcm", PIXELS, study)

    def fails(buffer, image, **options):
        raise ValueError(f"cannot encode {image.PatientName}")

    monkeypatch.setattr("healthgpt_edge.dicom.study.dcmwrite", fails)
    with pytest.raises(ImageError, match=r"bad\.dcm: cannot be written as DICOM: .* \(ValueError\)") as caught:
        write_image(tmp_path / "bad.dcm", PIXELS, study)
    assert SECRET not in str(caught.value) + caplog.text and not any(SECRET in str(w.message) for w in recwarn)
    assert [path.name for path in tmp_path.iterdir()] == ["out.dcm"]


def test_the_command_line_writes_what_it_shows(golden_bundle, tmp_path):
    """The same picture as a PNG and as DICOM, of a DICOM source."""
    words = ["generate", golden_bundle("m3"), "--instruction", "Reconstruct the image.", "--threads", 1]
    for name in ("out.png", "out.dcm"):
        done = run(*words, "--image", real_file("CT_small.dcm"), "--out", tmp_path / name, "--json")
        assert (done.code, done.errors) == (0, "") and done.json["image"] == str(tmp_path / name)
    np.testing.assert_array_equal(*(np.asarray(read_image(tmp_path / name)) for name in ("out.png", "out.dcm")))
