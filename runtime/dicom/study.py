"""The study of a source file, to which generated files belong."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import BinaryIO

from pydicom import dcmwrite, uid
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr

from ..errors import ImageError
from .display import functional_group
from .file import frame_count, frame_index, open_dicom

# What all objects of a study share (PS3.3 C.7.1.1, C.7.2.1), copied unchanged.
_SHARED = (
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
)
# What holds for a picture made from the source, too: that text may be burned in, and which body part it shows.
_PART = ("BodyPartExamined", "Laterality", "ImageLaterality")
_INHERITED = ("BurnedInAnnotation", *_PART)
# What was compressed with loss stays so in all that is derived from it (C.7.6.1.1.5). These encodings are lossy even if
# the source does not say so.
_COMPRESSION, _WITH_LOSS = "LossyImageCompression", "01"
_LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless)
_IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_ORIENTATION = ("PatientOrientation", "ImageOrientationPatient")
SERIES_NUMBER = 9001  # far from a scanner's own


@dataclass(frozen=True, repr=False, slots=True)
class Study:
    """What a generated file takes from its source: patient, study, and a reference to the image.

    `frame` is the source's, from 0. Nothing in here may reach a message or a log.
    """

    dataset: Dataset
    frame: int

    @property
    def frame_number(self) -> int | None:
        """The frame as DICOM counts, from 1; None if the source has only one."""
        return self.frame + 1 if frame_count(self.dataset) > 1 else None

    def frames_group(self, keyword: str) -> Dataset:
        """The item that holds a functional group of the frame; the source itself where there is none."""
        return functional_group(self.dataset, self.frame, keyword)

    def identify(self, document: Dataset) -> None:
        """Give `document` the patient and the study.

        Not by highdicom's arguments: they refuse non-standard names and dates that occur in practice.
        """
        # What is copied is written as it stands: read and written again, letters that its character set lacks would
        # become question marks.
        document.set_original_encoding(False, True, self.dataset.original_character_set)
        self._copy(_SHARED, document)

    def describe(self, picture: Dataset) -> None:
        """Give `picture` what also holds for it: lossy compression, burned-in text, part of the body."""
        self._copy(_INHERITED, picture)
        if side := self.frames_group("FrameAnatomySequence").get("FrameLaterality"):
            picture.ImageLaterality = side
        elif not any(keyword in self.dataset for keyword in _PART):
            picture.Laterality = ""  # present but empty: unknown (C.7.3.1)
        if self.dataset.get(_COMPRESSION) == _WITH_LOSS:
            picture.LossyImageCompression = _WITH_LOSS

    def _copy(self, keywords: tuple[str, ...], document: Dataset) -> None:
        for keyword in keywords:
            if keyword in self.dataset:
                document[keyword] = self._copied(keyword)

    def _copied(self, keyword: str) -> DataElement | RawDataElement:
        element, vr = self.dataset.get_item(keyword), dictionary_VR(keyword)
        if isinstance(element, RawDataElement) and vr != "SQ":
            value = element.value or b""
            return element._replace(VR=vr, value=value + b" " * (len(value) % 2))
        # Of its own: what a document changes of it, others would find changed.
        copied = copy.deepcopy(self.dataset[keyword])
        for item in copied.value if vr == "SQ" else ():
            item.decode()  # else its bytes would go into a document of another character set
        return copied


def parse_study(file: BinaryIO, frame: int | None) -> Study:
    """The study of the DICOM `file`. Raises ImageError if the file lacks an identifier or the frame."""
    source = open_dicom(file, (*_SHARED, *_INHERITED, _COMPRESSION, *_IDENTITY, *_ORIENTATION))
    dataset = source.dataset
    if source.syntax in _LOSSY:
        dataset.LossyImageCompression = _WITH_LOSS
    for keyword in _IDENTITY:
        value = dataset.get(keyword)
        if not value or not isinstance(value, str):
            raise ImageError(f"expected one {keyword} in the data set, found {'several' if value else 'none'}")
    return Study(dataset, frame_index(frame, frame_count(dataset)))


def to_file(document: Dataset) -> bytes:
    """The DICOM file of `document`."""
    buffer = io.BytesIO()
    correct_ambiguous_vr(document, True)  # which pydicom leaves out for what is written as it was encoded
    dcmwrite(buffer, document, enforce_file_format=True)
    return buffer.getvalue()
