"""A made picture as a DICOM file of the study that its source belongs to."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from highdicom.sc import SCImage
from numpy.typing import NDArray
from pydicom import dcmwrite, uid
from pydicom.dataset import Dataset

from ..errors import ImageError
from ..machine import version
from .file import open_dicom

# What all pictures of a study share (PS3.3 C.7.1.1, C.7.2.1), copied as it stands in the source.
_SHARED = (
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_IDENTITY = ("StudyInstanceUID", "SOPClassUID", "SOPInstanceUID")
_ORIENTATION = ("PatientOrientation", "ImageOrientationPatient")
# Where the axes of the patient's coordinates point, and their opposites (PS3.3 C.7.6.2.1.1).
_TOWARDS = (("L", "R"), ("P", "A"), ("H", "F"))
_OBLIQUE = 0.05  # a smaller part of a direction is not named
_SERIES_NUMBER = 9001  # far from those that a scanner counts


@dataclass(frozen=True, repr=False, slots=True)
class Study:
    """What a made picture takes from the DICOM file it was made from: patient, study, and which image that was.

    `frame` is that of the source, from 0. What it holds never reaches a message or a log.
    """

    dataset: Dataset
    frame: int


def parse_study(file: BinaryIO, frame: int | None) -> Study:
    """The study of the DICOM `file`. Raises ImageError where the file does not name one, or itself."""
    dataset = open_dicom(file, (*_SHARED, *_IDENTITY, *_ORIENTATION)).dataset
    for keyword in _IDENTITY:
        value = dataset.get(keyword)
        if not value or not isinstance(value, str):
            raise ImageError(f"expected one {keyword} in the data set, found {'several' if value else 'none'}")
    return Study(dataset, frame or 0)


def secondary_capture(pixels: NDArray[np.uint8], study: Study) -> bytes:
    """`pixels` (uint8 [H, W, 3]) as the file of a Secondary Capture Image (PS3.3 A.8.1), in a series of its own.

    It says of itself that it is derived, synthetic and for research, and refers to its source. Nothing is said of the
    size of a pixel, for the source was padded and scaled.
    """
    image = SCImage(
        pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=study.dataset.StudyInstanceUID,
        series_instance_uid=uid.generate_uid(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=uid.generate_uid(),
        instance_number=1,
        manufacturer="healthgpt-edge",
        manufacturer_model_name="HealthGPT",
        software_versions=version("healthgpt-edge"),
        series_description="HealthGPT (synthetic)",
        content_qualification="RESEARCH",
        patient_orientation=("L", "P"),  # wanted here; what is known follows
        transfer_syntax_uid=uid.ExplicitVRLittleEndian,
    )
    # Past highdicom's arguments, which refuse names and dates that a site lives with.
    for keyword in _SHARED:
        if keyword in study.dataset:
            image[keyword] = study.dataset[keyword]
    image.PatientOrientation = _orientation(study.dataset)
    image.DerivationDescription = "Made by a generative model from the source image, not acquired from the patient."
    source = Dataset()
    source.ReferencedSOPClassUID = study.dataset.SOPClassUID
    source.ReferencedSOPInstanceUID = study.dataset.SOPInstanceUID
    if int(study.dataset.get("NumberOfFrames") or 1) > 1:
        source.ReferencedFrameNumber = study.frame + 1
    image.SourceImageSequence = [source]
    buffer = io.BytesIO()
    dcmwrite(buffer, image, enforce_file_format=True)
    return buffer.getvalue()


def _orientation(dataset: Dataset) -> list[str]:
    """Where rows and columns of the source point, as letters; nothing if the source does not say."""
    if dataset.get("PatientOrientation"):
        return list(dataset.PatientOrientation)
    cosines = np.array(dataset.get("ImageOrientationPatient") or [], np.float64)
    if cosines.shape != (6,) or not np.isfinite(cosines).all():
        return []
    return [_letters(direction) for direction in cosines.reshape(2, 3)]


def _letters(direction: NDArray[np.float64]) -> str:
    axes = np.argsort(-np.abs(direction))
    return "".join(_TOWARDS[axis][int(direction[axis] < 0)] for axis in axes if abs(direction[axis]) > _OBLIQUE)
