"""The patient's study that a made file takes its place in."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO

from pydicom import dcmwrite
from pydicom.dataset import Dataset

from ..errors import ImageError
from .file import frame_count, frame_index, open_dicom

# What all objects of a study share (PS3.3 C.7.1.1, C.7.2.1), copied as it stands in the source.
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
_IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_ORIENTATION = ("PatientOrientation", "ImageOrientationPatient")
SERIES_NUMBER = 9001  # far from those that a scanner counts


@dataclass(frozen=True, repr=False, slots=True)
class Study:
    """What a made file takes from the DICOM file it was made from: patient, study, and which image that was.

    `frame` is that of the source, from 0. What it holds never reaches a message or a log.
    """

    dataset: Dataset
    frame: int

    @property
    def frame_number(self) -> int | None:
        """The frame as DICOM counts, from 1; None where the source has but one."""
        return self.frame + 1 if frame_count(self.dataset) > 1 else None

    def identify(self, document: Dataset) -> None:
        """Give `document` the patient and the study.

        Past highdicom's arguments, which refuse names and dates that a site lives with.
        """
        for keyword in _SHARED:
            if keyword in self.dataset:
                document[keyword] = self.dataset[keyword]


def parse_study(file: BinaryIO, frame: int | None) -> Study:
    """The study of the DICOM `file`. Raises ImageError where the file does not name one, or itself, or lacks the frame."""
    dataset = open_dicom(file, (*_SHARED, *_IDENTITY, *_ORIENTATION)).dataset
    for keyword in _IDENTITY:
        value = dataset.get(keyword)
        if not value or not isinstance(value, str):
            raise ImageError(f"expected one {keyword} in the data set, found {'several' if value else 'none'}")
    return Study(dataset, frame_index(frame, frame_count(dataset)))


def to_file(document: Dataset) -> bytes:
    """The DICOM file of `document`."""
    buffer = io.BytesIO()
    dcmwrite(buffer, document, enforce_file_format=True)
    return buffer.getvalue()
