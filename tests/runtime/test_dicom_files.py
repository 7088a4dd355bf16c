"""Real DICOM files against pydicom's own pipeline, files that lie about themselves, and what must not leak."""

import io
import logging
import struct
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from dicom_samples import SECRET, data_set, dicom, file_bytes, levels, real_file
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing, get_decoder, pixel_array
from test_images import read_under_limits

from healthgpt_edge.errors import ImageError
from healthgpt_edge.images import read_image
from healthgpt_edge.limits import MAX_HEADER_BYTES, MAX_INFLATED_BYTES, MAX_ITEMS

GREY = np.arange(12, dtype=np.uint16).reshape(3, 4)


# ---- real files

GREY_FILES = """
    693_J2KI 693_J2KR 693_UNCI 693_UNCR CT_small J2K_pixelrep_mismatch JPEG-LL JPEG2000 JPEG2000_UNC JPGExtended
    JPEGLSNearLossless_08 JPEGLSNearLossless_16 JPGLosslessP14SV1_1s_1f_8b MR-SIEMENS-DICOM-WithOverlays MR_small
    MR_small_RLE MR_small_bigendian MR_small_expb MR_small_implicit MR_small_jp2klossless MR_small_jpeg_ls_lossless
    RG1_UNCR RG3_J2KI bad_sequence emri_small emri_small_RLE emri_small_big_endian emri_small_jpeg_2k_lossless
    emri_small_jpeg_ls_lossless examples_overlay explicit_VR-UN image_dfl mlut_18 vlut_04
"""
COLOUR_FILES = """
    ExplVR_BigEnd SC_jpeg_no_color_transform SC_jpeg_no_color_transform_2 SC_rgb SC_rgb_16bit SC_rgb_16bit_2frame
    SC_rgb_2frame SC_rgb_dcmtk_+eb+cr SC_rgb_dcmtk_+eb+cy+n1 SC_rgb_dcmtk_+eb+cy+n2 SC_rgb_dcmtk_+eb+cy+np
    SC_rgb_dcmtk_+eb+cy+s2 SC_rgb_dcmtk_+eb+cy+s4 SC_rgb_expb SC_rgb_expb_16bit SC_rgb_gdcm_KY SC_rgb_jls_lossy_line
    SC_rgb_jls_lossy_sample SC_rgb_jpeg SC_rgb_jpeg_app14_dcmd SC_rgb_jpeg_dcmd SC_rgb_jpeg_dcmtk SC_rgb_jpeg_gdcm
    SC_rgb_jpeg_lossy_gdcm SC_rgb_rle SC_rgb_rle_16bit SC_rgb_rle_16bit_2frame SC_rgb_rle_2frame SC_rgb_small_odd
    SC_rgb_small_odd_big_endian SC_rgb_small_odd_jpeg SC_ybr_full_422_uncompressed SC_ybr_full_uncompressed US1_J2KI
    US1_J2KR US1_UNCI color-pl color-px color3d_jpeg_baseline examples_jpeg2k examples_rgb_color examples_ybr_color
"""
PALETTE_FILES = "OBXXXX1A OBXXXX1A_2frame OBXXXX1A_rle OBXXXX1A_rle_2frame gdcm-US-ALOKA-16 examples_palette"


def decoded_by_pydicom(name):
    """The data set, and the first frame as pydicom decodes it."""
    path = real_file(f"{name}.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(path), pixel_array(pydicom.dcmread(path), index=0)


@pytest.mark.parametrize("name", GREY_FILES.split())
def test_real_grey_files(name):
    made, stored = decoded_by_pydicom(name)
    padding = stored == made.get("PixelPaddingValue", 1 << 20)
    values = apply_modality_lut(stored, made).astype(float)
    if "WindowWidth" in made:
        first = Dataset()
        for keyword in ("WindowCenter", "WindowWidth"):
            value = made[keyword].value
            setattr(first, keyword, value[0] if made[keyword].VM > 1 else value)
        first.PhotometricInterpretation, first.BitsStored, first.PixelRepresentation = "MONOCHROME2", 16, 0
        expected = apply_windowing(values, first) / 65535
    elif "VOILUTSequence" in made:
        expected = apply_voi(values.astype(int), made) / (2.0 ** made.VOILUTSequence[0].LUTDescriptor[2] - 1)
    else:
        low, high = values[~padding].min(), values[~padding].max()
        expected = (values - low) / (high - low)
    if made.PhotometricInterpretation == "MONOCHROME1":
        expected = 1 - expected
    expected[padding] = 0
    assert np.abs(levels(real_file(f"{name}.dcm")) - 255 * expected.clip(0, 1)).max() <= 0.501


@pytest.mark.parametrize("name", COLOUR_FILES.split())
def test_real_colour_files(name):
    _, expected = decoded_by_pydicom(name)
    scale = 255 / np.iinfo(expected.dtype).max
    shown = np.asarray(read_image(real_file(f"{name}.dcm")))
    assert np.abs(shown - expected * scale).max() <= 0.501


@pytest.mark.parametrize("name", PALETTE_FILES.split())
def test_real_palette_files(name):
    made, stored = decoded_by_pydicom(name)
    assert np.array_equal(read_image(real_file(f"{name}.dcm")), apply_color_lut(stored, made) >> 8)


@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        # pydicom reads big endian palettes as if they were little endian: compared with the other file instead.
        ("OBXXXX1A_expb", "OBXXXX1A", 0),
        ("OBXXXX1A_expb_2frame", "OBXXXX1A_2frame", 0),
        ("gdcm-US-ALOKA-16_big", "gdcm-US-ALOKA-16", 0),
        ("693_J2KR", "693_UNCR", 0),
        ("MR_small_RLE", "MR_small", 0),
        ("MR_small_expb", "MR_small", 0),
        ("emri_small_RLE", "emri_small", 0),
        ("SC_rgb_16bit", "SC_rgb", 0),
        # The other file is what DCMTK decoded.
        ("SC_rgb_dcmtk_+eb+cr", "SC_rgb_dcmtk_ebcr_dcmd", 1),
        ("SC_rgb_dcmtk_+eb+cy+n1", "SC_rgb_dcmtk_ebcyn1_dcmd", 2),
        ("SC_rgb_dcmtk_+eb+cy+n2", "SC_rgb_dcmtk_ebcyn2_dcmd", 1),
        ("SC_rgb_dcmtk_+eb+cy+np", "SC_rgb_dcmtk_ebcynp_dcmd", 2),
        ("SC_rgb_dcmtk_+eb+cy+s2", "SC_rgb_dcmtk_ebcys2_dcmd", 1),
        ("SC_rgb_dcmtk_+eb+cy+s4", "SC_rgb_dcmtk_ebcys4_dcmd", 1),
        ("SC_ybr_full_uncompressed", "SC_rgb_dcmtk_ebcys4_dcmd", 1),
        ("SC_ybr_full_422_uncompressed", "SC_rgb_dcmtk_ebcys4_dcmd", 1),
        ("SC_rgb_jpeg_gdcm", "SC_rgb", 0),
        ("US1_J2KR", "US1_UNCR", 0),
    ],
)
def test_one_picture_in_two_encodings(name, other, tolerance):
    one, two = (np.asarray(read_image(real_file(f"{each}.dcm"))).astype(int) for each in (name, other))
    assert np.abs(one - two).max() <= tolerance


def test_every_frame_of_a_compressed_series_is_itself():
    plain, packed = real_file("emri_small.dcm"), real_file("emri_small_jpeg_2k_lossless.dcm")
    frames = [levels(packed, frame=frame) for frame in range(10)]
    assert all(np.array_equal(frames[frame], levels(plain, frame=frame)) for frame in range(10))
    assert len({frame.tobytes() for frame in frames}) == 10


def test_files_without_preamble_or_meta_group():
    made = data_set(GREY)
    with_preamble = file_bytes(made)
    assert with_preamble[128:132] == b"DICM"
    expected = levels(with_preamble)
    assert np.array_equal(levels(with_preamble[132:]), expected)
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        made = data_set(GREY, SOPClassUID=uid.SecondaryCaptureImageStorage)
        whole = file_bytes(made, syntax)
        bare = whole[meta_end(whole) :]
        assert bare[:4] == b"\x08\x00\x16\x00"
        assert np.array_equal(levels(bare), expected)


# ---- files that lie


def encapsulated(*fragments, syntax=uid.JPEGBaseline8Bit, rows=100, columns=100, samples=3, table=True, **attributes):
    """A file of 8-bit pixels whose fragments are given as they are, one a frame."""
    shape = (rows, columns, 3) if samples == 3 else (rows, columns)
    made = data_set(np.zeros(shape, np.uint8), **attributes)
    packed = [fragment + b"\0" * (len(fragment) % 2) for fragment in fragments]
    starts = [sum(8 + len(before) for before in packed[:index]) for index in range(len(packed))]
    offsets = struct.pack(f"<{len(packed)}I", *starts) if table else b""
    made.PixelData = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(each)) + each for each in (offsets, *packed))
    return file_bytes(made, syntax)


def first_fragment(name):
    made = pydicom.dcmread(real_file(f"{name}.dcm"))
    return get_frame(made.PixelData, 0, number_of_frames=int(made.get("NumberOfFrames", 1)))


JPEG = first_fragment("SC_rgb_dcmtk_+eb+cr")
JPEG_LS = first_fragment("SC_rgb_jls_lossy_line")
JPEG_2000 = first_fragment("SC_rgb_gdcm_KY")
RLE = first_fragment("SC_rgb_rle")


def with_length(data, tag, change):
    """The explicit little endian file `data` with another length in the element `tag`, the value left as it is."""
    position = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF)) + 8
    (length,) = struct.unpack_from("<I", data, position)
    return data[:position] + struct.pack("<I", change(length)) + data[position + 4 :]


def frame_header(codestream, marker, **changes):
    """A JPEG codestream with other numbers in its frame header."""
    start = codestream.index(marker)
    names = ("precision", "rows", "columns", "samples")
    numbers = dict(zip(names, struct.unpack_from(">BHHB", codestream, start + 4), strict=True))
    header = struct.pack(">BHHB", *(numbers | changes).values())
    return codestream[: start + 4] + header + codestream[start + 10 :]


def siz(codestream, **changes):
    """A JPEG 2000 codestream with other numbers in its SIZ segment."""
    names = ("right", "bottom", "left", "top", "tile_right", "tile_bottom", "tile_left", "tile_top", "samples")
    numbers = dict(zip(names, struct.unpack_from(">8IH", codestream, 8), strict=True))
    return codestream[:8] + struct.pack(">8IH", *(numbers | changes).values()) + codestream[42:]


def meta_end(data):
    """Where the data set begins."""
    return 132 + 12 + struct.unpack_from("<I", data, 140)[0]


def deflated(body):
    """A file of the deflated transfer syntax with `body` as its compressed data set."""
    whole = file_bytes(data_set(GREY), uid.DeflatedExplicitVRLittleEndian)
    return whole[: meta_end(whole)] + body


def nested(depth):
    """A sequence in a sequence in a sequence, without lengths and without an end."""
    begin = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return PLAIN[: meta_end(PLAIN)] + begin * depth


def meta_of(syntax):
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI" + struct.pack("<H", len(value)) + value


PLAIN = dicom(GREY)
WRONG_SIZE = "expected 100 rows, 100 columns and 3 samples in the codestream, found "
LIES = {
    "no rows": (dicom(GREY, Rows=None), "expected Rows to be one whole number, found none"),
    "zero rows": (dicom(GREY, Rows=0), "expected at least one pixel, found 4 x 0"),
    "zero columns": (dicom(GREY, Columns=0), "expected at least one pixel, found 0 x 3"),
    "fewer rows": (
        dicom(GREY, Rows=2),
        "expected 16 bytes of pixel data for 1 frames of 2 rows and 4 columns, found 24",
    ),
    "more rows": (
        dicom(GREY, Rows=4),
        "expected 32 bytes of pixel data for 1 frames of 4 rows and 4 columns, found 24",
    ),
    "more frames": (dicom(GREY, NumberOfFrames=5), "expected 120 bytes of pixel data for 5 frames of 3 rows"),
    "no frame": (dicom(GREY, NumberOfFrames=0), "expected at least one frame, found 0"),
    "too many rows": (
        dicom(GREY, Rows=60000),
        "expected at most 10000 pixels a side and 67108864 in all, found 4 x 60000",
    ),
    "too many pixels": (dicom(GREY, Rows=9000, Columns=9000), "67108864 in all, found 9000 x 9000"),
    "too many bytes": (
        dicom(GREY, Rows=9000, Columns=7000, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0),
        "expected at most 268435456 bytes a frame, found 9000 x 7000",
    ),
    "one bit": (dicom(GREY, BitsAllocated=1, BitsStored=1, HighBit=0), "expected 8 or 16 bits allocated, found 1"),
    "32 bits": (dicom(GREY, BitsAllocated=32), "expected 8 or 16 bits allocated, found 32"),
    "more bits stored": (dicom(GREY, BitsStored=17), "expected the lowest of 16 bits to be stored"),
    "high bit": (dicom(GREY, BitsStored=12, HighBit=15), "expected the lowest of 16 bits to be stored"),
    "representation": (dicom(GREY, PixelRepresentation=2), "expected unsigned values, or signed ones in greyscale"),
    "two samples": (dicom(GREY, SamplesPerPixel=2), "expected 1 samples per pixel for MONOCHROME2, found 2"),
    "colour of one sample": (dicom(GREY, PhotometricInterpretation="RGB"), "expected 3 samples per pixel for RGB"),
    "unknown colours": (dicom(GREY, PhotometricInterpretation=SECRET), "PALETTE COLOR; found another"),
    "planar": (dicom(np.zeros((2, 2, 3), np.uint8), PlanarConfiguration=2), "expected planar configuration 0 or 1"),
    "ybr of 16 bits": (
        dicom(np.zeros((2, 2, 3), np.uint16), PhotometricInterpretation="YBR_FULL"),
        "expected 8 bits stored of 8 for YBR_FULL, found 16 of 16",
    ),
    "ybr_rct": (
        dicom(np.zeros((2, 2, 3), np.uint8), PhotometricInterpretation="YBR_RCT"),
        "YBR_RCT belongs to JPEG 2000, found another transfer syntax",
    ),
    "odd 422": (
        dicom(np.zeros((2, 3, 3), np.uint8), PhotometricInterpretation="YBR_FULL_422"),
        "expected an even number of columns for YBR_FULL_422, found 3",
    ),
    "no pixel data": (dicom(GREY, PixelData=None), "holds no pixel data"),
    "float pixel data": (
        PLAIN.replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x08\x00OF"),
        "expected whole numbers as pixel data, found floating point",
    ),
    "cut in its pixels": (PLAIN[:-2], "the pixel data are cut short: expected 24 bytes, found 22"),
    "cut in its header": (PLAIN[:300], "holds no pixel data"),
    "cut in its meta group": (PLAIN[:140], "expected a transfer syntax in the file meta group, found none"),
    "only a preamble": (PLAIN[:132], "expected a transfer syntax in the file meta group, found none"),
    "preamble cut": (PLAIN[:130], "expected PNG, JPEG or DICOM, found another format"),
    "pixels of no length": (
        with_length(PLAIN, 0x7FE00010, lambda length: 0xFFFFFFFF),
        "expected uncompressed pixel data, found encapsulated data",
    ),
    "pixels too long": (with_length(PLAIN, 0x7FE00010, lambda length: length + 8), "found 32"),
    "mpeg": (meta_of(uid.MPEG2MPML), "transfer syntax, found MPEG2 Main Profile / Main Level"),
    "unknown syntax": (meta_of(f"1.2.3.{SECRET}"), "transfer syntax, found an unknown one"),
    "no jpeg": (
        encapsulated(b"not a codestream"),
        "expected a JPEG codestream in the pixel data, found something else",
    ),
    "jpeg of more rows": (encapsulated(frame_header(JPEG, b"\xff\xc0", rows=9999)), WRONG_SIZE + "9999, 100 and 3"),
    "jpeg of no rows": (encapsulated(frame_header(JPEG, b"\xff\xc0", rows=0)), WRONG_SIZE + "0, 100 and 3"),
    "jpeg of one sample": (encapsulated(frame_header(JPEG, b"\xff\xc0", samples=1)), WRONG_SIZE + "100, 100 and 1"),
    "jpeg of 16 bits": (
        encapsulated(frame_header(JPEG, b"\xff\xc0", precision=16)),
        "expected at most 8 bits in the codestream, found 16",
    ),
    "jpeg of two frames": (
        encapsulated(JPEG[:2] + b"\xff\xc0\x00\x0b\x08\x27\x0f\x27\x0f\x01\x01\x11\x00" + JPEG[2:]),
        "expected one frame header in the JPEG codestream",
    ),
    "jpeg with a frame after its scan": (
        encapsulated(JPEG[:-2] + b"\xff\xc0\x00\x0b\x08\x27\x0f\x27\x0f\x01\x01\x11\x00" + b"\xff\xd9"),
        "expected one frame header in the JPEG codestream",
    ),
    "jpeg cut": (encapsulated(JPEG[: len(JPEG) // 2]), "the JPEG codestream is cut short: expected its end mark"),
    "jpeg cut after its thumbnail": (
        encapsulated(JPEG[:2] + b"\xff\xe1\x00\x06\xff\xd8\xff\xd9" + JPEG[2 : len(JPEG) // 2]),
        "the JPEG codestream is cut short: expected its end mark",
    ),
    "jpeg cut in its header": (encapsulated(JPEG[:100]), "damaged or cut short before its first scan"),
    "jpeg without a frame": (encapsulated(b"\xff\xd8\xff\xd9"), "damaged or cut short before its first scan"),
    "jpeg that ends before its scan": (
        encapsulated(JPEG[:2] + b"\xff\xd9\x00\x02" + JPEG[2:]),
        "damaged or cut short before its first scan",
    ),
    "jpeg with a scan header of no length": (
        encapsulated(JPEG.replace(b"\xff\xda\x00\x0c", b"\xff\xda\x00\x01")),
        "damaged or cut short before its first scan",
    ),
    "jpeg-ls of more rows": (
        encapsulated(frame_header(JPEG_LS, b"\xff\xf7", rows=9999), syntax=uid.JPEGLSNearLossless),
        WRONG_SIZE + "9999, 100 and 3",
    ),
    "jpeg 2000 of more rows": (
        encapsulated(siz(JPEG_2000, bottom=9999), syntax=uid.JPEG2000Lossless),
        WRONG_SIZE + "9999, 100 and 3",
    ),
    "jpeg 2000 in jp2": (
        encapsulated(b"\0\0\0\x0cjP  \r\n\x87\n" + JPEG_2000, syntax=uid.JPEG2000Lossless),
        "expected a bare JPEG 2000 codestream in the pixel data, found a JP2 file",
    ),
    "jpeg 2000 cut": (
        encapsulated(JPEG_2000[: len(JPEG_2000) // 2], syntax=uid.JPEG2000Lossless),
        "cannot be read as DICOM: damaged or not supported (RuntimeError)",
    ),
    "subsampled": (
        encapsulated(JPEG_2000[:43] + b"\2" + JPEG_2000[44:], syntax=uid.JPEG2000Lossless),
        "JPEG 2000 with subsampled components is not supported",
    ),
    "a film": (
        encapsulated(JPEG, syntax=uid.MPEG2MPML),
        "JPEG-LS, JPEG 2000 or RLE transfer syntax, found MPEG2 Main Profile / Main Level",
    ),
    "of another maker": (
        encapsulated(JPEG).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.19998.1.2.4.50"),
        "JPEG-LS, JPEG 2000 or RLE transfer syntax, found an unknown one",
    ),
    "jpeg 2000 cut in its header": (
        encapsulated(JPEG_2000[:44], syntax=uid.JPEG2000Lossless),
        "the JPEG 2000 codestream is cut short",
    ),
    "jpeg 2000 cut before its components": (
        encapsulated(JPEG_2000[:40], syntax=uid.JPEG2000Lossless),
        "the JPEG 2000 codestream is cut short",
    ),
    "rle of two segments": (
        encapsulated(b"\x02" + RLE[1:], syntax=uid.RLELossless),
        "expected 3 RLE segments, found 2",
    ),
    "rle cut": (encapsulated(RLE[:-200], syntax=uid.RLELossless), "expected 10000 bytes in an RLE segment, found"),
    "rle cut in its header": (encapsulated(RLE[:20], syntax=uid.RLELossless), "the RLE frame is cut short"),
    "rle segments out of order": (
        encapsulated(RLE[:4] + b"\xff" + RLE[5:], syntax=uid.RLELossless),
        "the RLE segments are damaged or cut short",
    ),
    "rle that goes on": (
        encapsulated(struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 9, syntax=uid.RLELossless, rows=8, samples=1),
        "expected 800 bytes in an RLE segment, found more",
    ),
    "empty frame": (encapsulated(b"", table=False), "expected a compressed frame of 30000 bytes, found 0 compressed"),
    "frame too large": (
        encapsulated(JPEG + bytes(200_000)),
        "expected a compressed frame of 30000 bytes, found 201934 compressed bytes",
    ),
    "fragments cut": (encapsulated(JPEG)[:-100], "the encapsulated pixel data are damaged or cut short"),
    "fragments without an end": (encapsulated(JPEG)[:-8], "the encapsulated pixel data are damaged or cut short"),
    "fewer fragments": (
        encapsulated(JPEG, NumberOfFrames=2, table=False),
        "expected 2 frames, found 1 fragments and 0 frame offsets",
    ),
    "more offsets": (encapsulated(JPEG, JPEG), "expected 1 frames, found 2 fragments and 2 frame offsets"),
    "compressed data of a length": (
        with_length(encapsulated(JPEG), 0x7FE00010, lambda length: len(JPEG)),
        "expected encapsulated pixel data, found uncompressed data",
    ),
    "deflated and cut": (deflated(zlib.compress(b"\0" * 999)[2:-9]), "the deflated data set is cut short"),
    "deflated garbage": (deflated(b"\xff" * 99), "cannot be read as DICOM: damaged or not supported (error)"),
    "deep sequences": (nested(5000), "cannot be read as DICOM: damaged or not supported (RecursionError)"),
    "many items": (nested(1) + b"\xfe\xff\x00\xe0\0\0\0\0" * (MAX_ITEMS + 1), f"at most {MAX_ITEMS} sequence items"),
    "endless header": (
        nested(0) + b"\x09\x00\x10\x10UN\0\0" + struct.pack("<I", MAX_HEADER_BYTES) + bytes(MAX_HEADER_BYTES),
        f"holds no pixel data in its first {MAX_HEADER_BYTES} bytes",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(name):
    data, message = LIES[name]
    with pytest.raises(ImageError) as caught:
        read_image(data)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_the_samples_themselves_are_sound():
    """Otherwise the lies above could be refused for another reason."""
    assert levels(PLAIN).shape == (3, 4)
    for codestream, syntax in {
        JPEG: uid.JPEGBaseline8Bit,
        JPEG_LS: uid.JPEGLSNearLossless,
        JPEG_2000: uid.JPEG2000Lossless,
        RLE: uid.RLELossless,
    }.items():
        assert read_image(encapsulated(codestream, syntax=syntax)).size == (100, 100)
    assert levels(file_bytes(data_set(GREY), uid.DeflatedExplicitVRLittleEndian)).shape == (3, 4)


def test_a_jpeg_may_have_fill_bytes_before_its_markers():
    """ISO 10918-1 B.1.1.2."""
    filled = JPEG[:2] + b"\xff\xff" + JPEG[2:]
    assert np.array_equal(read_image(encapsulated(filled)), read_image(encapsulated(JPEG)))


def test_an_rle_segment_may_hold_bytes_that_mean_nothing_and_chroma_is_whole():
    """The control byte 128 (PS3.5 G.3.2); and RLE under YBR_FULL_422 has three samples for each pixel (A.4.2)."""
    # One row of two pixels, by segment: 76 and 76 by a run, 84 and 84 as they are, 255 and 255 in two parts: red.
    segments = [b"\x80\xff\x4c", b"\x80\x80\x01\x54\x54", b"\x00\xff\x80\x00\xff"]
    padded = [segment + b"\0" * (len(segment) % 2) for segment in segments]
    starts = [64 + sum(map(len, padded[:index])) for index in range(3)]
    frame = struct.pack("<16I", 3, *starts, *[0] * 12) + b"".join(padded)
    for photometric in ("YBR_FULL", "YBR_FULL_422"):
        options = {"rows": 1, "columns": 2, "PhotometricInterpretation": photometric}
        shown = np.asarray(read_image(encapsulated(frame, syntax=uid.RLELossless, **options))).astype(int)
        assert np.abs(shown - [[[255, 0, 0], [255, 0, 0]]]).max() <= 2


@pytest.mark.parametrize(
    ("codestream", "syntax", "package"),
    [
        (JPEG, uid.JPEGBaseline8Bit, "pylibjpeg-libjpeg"),
        (JPEG_LS, uid.JPEGLSNearLossless, "pylibjpeg-libjpeg"),
        (JPEG_2000, uid.JPEG2000Lossless, "pylibjpeg-openjpeg"),
    ],
)
def test_a_missing_decoder_is_named(codestream, syntax, package, monkeypatch):
    monkeypatch.delitem(get_decoder(syntax)._available, "pylibjpeg")
    with pytest.raises(ImageError, match=f"{syntax.name[:9]}.* needs {package}: pip install {package}$"):
        read_image(encapsulated(codestream, syntax=syntax))


@pytest.mark.parametrize(
    "representation", ["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"]
)
def test_a_file_meta_group_may_hold_elements_of_any_length(representation):
    """As (0002,0026), the address of a DICOMweb source, which is a UR."""
    begin = meta_end(PLAIN)
    value = b"http://source.example "
    element = b"\x02\x00\x26\x00" + representation.encode() + b"\0\0" + struct.pack("<I", len(value)) + value
    size = struct.pack("<I", begin - 144 + len(element))
    assert np.array_equal(levels(PLAIN[:140] + size + PLAIN[144:begin] + element + PLAIN[begin:]), levels(PLAIN))


def test_a_deflated_bomb_is_refused_at_once(tmp_path):
    """800 MB of zeros as pixel data, in 800 KB."""
    body = PLAIN[meta_end(PLAIN) : -36]
    body += b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", 800 << 20)
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = squeezer.compress(body) + squeezer.flush(zlib.Z_FULL_FLUSH)
    zeros = squeezer.compress(bytes(1 << 20)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    path = tmp_path / "bomb.dcm"
    path.write_bytes(deflated(head + zeros * 800 + squeezer.flush()))
    assert path.stat().st_size < 1_000_000
    expected = f"bomb.dcm: expected at most {MAX_INFLATED_BYTES} bytes in the deflated data set, found more"
    assert read_under_limits(path) == expected


def test_fragments_beyond_the_header_are_counted_too():
    whole = encapsulated(bytes(MAX_HEADER_BYTES), table=False)
    data = whole[:-8] + b"\xfe\xff\x00\xe0\0\0\0\0" * MAX_ITEMS + whole[-8:]
    with pytest.raises(ImageError, match=f"expected at most {MAX_ITEMS} fragments of pixel data, found more"):
        read_image(data)


def test_damaged_files_give_errors_and_nothing_else():
    """A few hundred random damages of real files: a picture or an ImageError, never another exception."""
    random = np.random.default_rng(20240607)
    names = ["CT_small", "MR_small_RLE", "SC_rgb_gdcm_KY", "SC_rgb_jpeg_dcmtk", "emri_small_jpeg_ls_lossless"]
    files = [np.fromfile(real_file(f"{name}.dcm"), np.uint8) for name in [*names, "image_dfl"]]
    refused = 0
    for turn in range(300):
        data = files[turn % len(files)].copy()
        data[random.integers(0, data.size, 3)] = random.integers(0, 256, 3)
        data[random.integers(0, min(data.size, 2500))] = random.choice([0, 1, 127, 255])
        try:
            read_image(data.tobytes())
        except ImageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 30 < refused < 290


# ---- nothing leaks


def leaky(**attributes):
    """A file with a character set that pydicom complains about, quoting it, and a window that is no number."""
    data = dicom(GREY, SpecificCharacterSet="ISO_IR 192", WindowCenter="1234567890", WindowWidth="9", **attributes)
    return data.replace(b"ISO_IR 192", SECRET.encode() + b" ").replace(b"1234567890", SECRET.encode() + b" ")


def test_what_pydicom_says_without_us_would_leak(caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.warns(UserWarning, match=SECRET):
        pydicom.dcmread(io.BytesIO(leaky()))
    assert SECRET in caplog.text


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("source", [leaky(), leaky(Rows=9), PLAIN, encapsulated(JPEG_2000[:150], syntax=uid.JPEG2000)])
def test_dicom_values_reach_no_log_warning_or_stream(source, debug, caplog, capfd, recwarn):
    caplog.set_level(logging.DEBUG)
    pydicom.config.debug(debug, default_handler=False)
    try:
        message = ""
        try:
            read_image(source)
        except ImageError as error:
            message = str(error)
    finally:
        pydicom.config.debug(False)
    captured = capfd.readouterr()
    assert not captured.out and not captured.err and not recwarn.list and not caplog.records
    assert "SECRET" not in message
    if source == leaky():
        assert message.startswith("picture: expected WindowCenter to be numbers, found something else; give")


def test_only_what_a_picture_needs_is_parsed():
    from healthgpt_edge.dicom.file import open_dicom

    parsed = open_dicom(io.BytesIO(PLAIN)).dataset
    assert "Rows" in parsed and "PatientName" not in parsed and "PixelData" not in parsed
