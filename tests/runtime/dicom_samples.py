"""DICOM files for the tests: made here, or those that come with pydicom and pydicom-data."""

import io

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset

from healthgpt_edge.images import read_image

SECRET = "TOPSECRET"


def real_file(name):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not in the installed pydicom and pydicom-data")
    return path


def data_set(pixels, **attributes):
    """A grey data set of `pixels` [H, W] or [N, H, W], or a colour one of [H, W, 3]."""
    pixels = np.asarray(pixels)
    made = Dataset()
    made.PatientName = f"{SECRET}^NAME"
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.ndim == 3 and not colour:
        made.NumberOfFrames = len(pixels)
    made.Rows, made.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    made.SamplesPerPixel = 3 if colour else 1
    made.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        made.PlanarConfiguration = 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.dtype.itemsize
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for keyword, value in attributes.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    made.setdefault("HighBit", made.BitsStored - 1)
    if "PixelData" in made:
        made["PixelData"].VR = "OW"
    return made


def identified(**attributes):
    """Attributes by which a DICOM file says who and what it is, and others."""
    uids = {keyword: uid.generate_uid() for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    return uids | {"SOPClassUID": uid.SecondaryCaptureImageStorage} | attributes


def file_bytes(made, syntax=uid.ExplicitVRLittleEndian):
    """The DICOM file of a data set; compressed pixel data must be encapsulated already."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.UID(syntax)
    meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    made.file_meta, made.preamble = meta, bytes(128)
    if meta.TransferSyntaxUID.is_encapsulated:
        made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made, enforce_file_format=True)
    return buffer.getvalue()


def dicom(pixels, **attributes):
    return file_bytes(data_set(pixels, **attributes))


def levels(source, **options):
    """The grey levels [H, W], after a check that the picture is grey."""
    picture = np.asarray(read_image(source, **options))
    assert (picture == picture[..., :1]).all()
    return picture[..., 0]


def item(**attributes):
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return [made]


def lookup_table(entries, first=0, bits=8, signed=False):
    made = Dataset()
    made.add_new("LUTDescriptor", "SS" if signed else "US", [len(entries), first, bits])
    made.add_new("LUTData", "US", list(entries))
    return [made]
