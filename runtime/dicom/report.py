"""Answers about a picture as a DICOM structured report in the picture's study."""

from __future__ import annotations

from collections.abc import Sequence

from highdicom.sr import (
    CodedConcept,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    ImageContentItem,
    ObserverContext,
    RelationshipTypeValues,
    TextContentItem,
)
from pydicom import uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes

from ..machine import version
from ..text import without_controls
from .study import SERIES_NUMBER, Study, to_file

_CONTAINS = RelationshipTypeValues.CONTAINS
# Concepts for which the standard has no code. A private scheme's name begins with 99 (PS3.16, section 8).
_TITLE = CodedConcept("answers", "99HGPT", "Answers of a vision-language model")
_EXCHANGE = CodedConcept("exchange", "99HGPT", "Question and answer")
_QUESTION = CodedConcept("question", "99HGPT", "Question")
_ANSWER = CodedConcept("answer", "99HGPT", "Answer of the model")
_SOURCE = CodedConcept("picture", "99HGPT", "Picture that the questions are about")
_NOTE = "Written by a generative model, for research. Nobody has reviewed it."
_NO_WORDS = "(no words)"
_ESCAPE_OF_IR_58 = "\x1b$)A"  # of a Chinese character set; pydicom 3.0 takes it for text
_ALLOWED_CONTROLS = "\t\n\f\r"  # PS3.5, 6.1.3


def structured_report(exchanges: Sequence[tuple[str, str]], study: Study) -> bytes:
    """Questions and their answers as the file of an Enhanced SR document (PS3.3 A.35.2), in a series of its own.

    It names a device as its author, is marked as preliminary and unverified, and refers to the picture. Text is UTF-8,
    whatever the source's character set.
    """
    document = EnhancedSR(
        evidence=[_evidence(study)],
        content=_content(exchanges, study),
        series_instance_uid=uid.generate_uid(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=uid.generate_uid(),
        instance_number=1,
        manufacturer="healthgpt-edge",
        is_complete=True,
        is_final=False,
        is_verified=False,
        transfer_syntax_uid=uid.ExplicitVRLittleEndian,
        manufacturer_model_name="HealthGPT",
        software_versions=version("healthgpt-edge"),
        series_description="HealthGPT (answers)",
    )
    study.identify(document)
    (same_study,) = document.CurrentRequestedProcedureEvidenceSequence
    (series,) = same_study.ReferencedSeriesSequence
    (reference,) = series.ReferencedSOPSequence
    reference.ReferencedSOPClassUID = study.dataset.SOPClassUID
    for element in document:  # which decodes what is copied, by the source's character set
        if element.VR in ("LO", "PN", "SH") and element.value:  # a name keeps its bytes all the same
            values = element.value if isinstance(element.value, MultiValue) else [element.value]
            text = "\\".join(map(str, values)).replace(_ESCAPE_OF_IR_58, "")
            document[element.tag] = DataElement(element.tag, element.VR, text, validation_mode=0)
    document.SpecificCharacterSet = "ISO_IR 192"
    return to_file(document)


def _evidence(study: Study) -> Dataset:
    """A stand-in for the source that highdicom accepts: it knows no retired or private class.

    highdicom would copy patient and study from it; `identify` does that better. The class is corrected in the document.
    """
    evidence = Dataset()
    evidence.SOPClassUID = uid.SecondaryCaptureImageStorage
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(evidence, keyword, study.dataset[keyword].value)
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(evidence, keyword, None)
    for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(evidence, keyword, None)
    return evidence


def _content(exchanges: Sequence[tuple[str, str]], study: Study) -> Dataset:
    """The content tree: observer, picture, a note on what this is, and each question with its answer."""
    writer = DeviceObserverIdentifyingAttributes(
        uid=uid.generate_uid(entropy_srcs=["healthgpt-edge", version("healthgpt-edge")]),
        name="HealthGPT",
        manufacturer_name="healthgpt-edge",
        model_name=version("healthgpt-edge"),
    )
    picture = ImageContentItem(
        _SOURCE,
        study.dataset.SOPClassUID,
        study.dataset.SOPInstanceUID,
        referenced_frame_numbers=study.frame_number,
        relationship_type=_CONTAINS,
    )
    root = ContainerContentItem(_TITLE, is_content_continuous=False)
    root.ContentSequence = ContentSequence(
        [
            *ObserverContext(codes.DCM.Device, writer),
            picture,
            TextContentItem(codes.DCM.Comment, _NOTE, relationship_type=_CONTAINS),
            *(_exchange(question, answer) for question, answer in exchanges),
        ]
    )
    return root


def _exchange(question: str, answer: str) -> ContentItem:
    item = ContainerContentItem(_EXCHANGE, is_content_continuous=False, relationship_type=_CONTAINS)
    item.ContentSequence = ContentSequence(
        [
            TextContentItem(name, _text(words), relationship_type=_CONTAINS)
            for name, words in ((_QUESTION, question), (_ANSWER, answer))
        ]
    )
    return item


def _text(words: str) -> str:
    return without_controls(words, _ALLOWED_CONTROLS) if words.strip() else _NO_WORDS
