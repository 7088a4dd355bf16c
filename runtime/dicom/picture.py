"""A generated picture as a DICOM file in the study of its source."""

from __future__ import annotations

import numpy as np
from highdicom.sc import SCImage
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from ..machine import version
from .study import SERIES_NUMBER, Study, to_file

# Where the axes of the patient's coordinates point, and their opposites (PS3.3 C.7.6.2.1.1).
_TOWARDS = (("L", "R"), ("P", "A"), ("H", "F"))
_OBLIQUE = 0.05  # a direction's part along an axis below this is not named


def secondary_capture(pixels: NDArray[np.uint8], study: Study) -> bytes:
    """`pixels` (uint8 [H, W, 3]) as the file of a Secondary Capture Image (PS3.3 A.8.1), in a series of its own.

    It is marked as derived, synthetic and for research, and refers to its source. It gives no pixel size, because the
    source was padded and scaled.
    """
    image = SCImage(
        pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        study_instance_uid=study.dataset.StudyInstanceUID,
        series_instance_uid=uid.generate_uid(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=uid.generate_uid(),
        instance_number=1,
        manufacturer="healthgpt-edge",
        manufacturer_model_name="HealthGPT",
        software_versions=version("healthgpt-edge"),
        series_description="HealthGPT (synthetic)",
        content_qualification="RESEARCH",
        patient_orientation=("L", "P"),  # required here; replaced below by what is known
        transfer_syntax_uid=uid.ExplicitVRLittleEndian,
    )
    study.identify(image)
    study.describe(image)
    image.PatientOrientation = _orientation(study)
    image.DerivationDescription = "Made by a generative model from the source image, not acquired from the patient."
    source = Dataset()
    source.ReferencedSOPClassUID = study.dataset.SOPClassUID
    source.ReferencedSOPInstanceUID = study.dataset.SOPInstanceUID
    if study.frame_number is not None:
        source.ReferencedFrameNumber = study.frame_number
    image.SourceImageSequence = [source]
    return to_file(image)


def _orientation(study: Study) -> list[str]:
    """The directions of the source's rows and columns, as letters; empty if the source does not say."""
    named = study.dataset.get("PatientOrientation")
    if isinstance(named, MultiValue) and len(named) == 2:
        return list(named)
    try:
        plane = study.frames_group("PlaneOrientationSequence")
        cosines = np.array(plane.get("ImageOrientationPatient") or [], np.float64)
    except ValueError:  # it says something else than numbers
        return []
    if cosines.shape != (6,) or not np.isfinite(cosines).all():
        return []
    return [_letters(direction) for direction in cosines.reshape(2, 3)]


def _letters(direction: NDArray[np.float64]) -> str:
    axes = np.argsort(-np.abs(direction))
    return "".join(_TOWARDS[axis][int(direction[axis] < 0)] for axis in axes if abs(direction[axis]) > _OBLIQUE)
