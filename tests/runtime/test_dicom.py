"""The DICOM display pipeline against its formulas, written again here one value at a time."""

import numpy as np
import pytest
from dicom_samples import SECRET, data_set, dicom, file_bytes, item, levels, lookup_table
from PIL import Image
from pydicom.dataset import Dataset

from healthgpt_edge.errors import ImageError
from healthgpt_edge.images import read_image

RAMP = np.array([[-1024, -160, 40, 240, 3071]], dtype=np.int16)


# ---- windows


def linear(values, centre, width):
    """PS3.3 C.11.2.1.2.1, one value at a time, written as the standard writes it."""
    result = []
    for x in np.ravel(values).tolist():
        if x <= centre - 0.5 - (width - 1) / 2:
            y = 0
        elif x > centre - 0.5 + (width - 1) / 2:
            y = 255
        else:
            y = ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
        result.append(round(y))
    return result


def test_the_first_window_of_the_file_is_shown():
    data = dicom(RAMP, WindowCenter=[40, 500], WindowWidth=[400, 2000])
    assert levels(data).ravel().tolist() == linear(RAMP, 40, 400)


def test_window_replaces_the_one_in_the_file():
    data = dicom(RAMP, WindowCenter=40, WindowWidth=400)
    assert levels(data, window=(500, 2000)).ravel().tolist() == linear(RAMP, 500, 2000)


def test_a_window_of_width_one_is_a_threshold():
    assert levels(dicom(RAMP), window=(40.5, 1)).ravel().tolist() == [0, 0, 0, 255, 255]
    assert levels(dicom(RAMP), window=(40.4, 1)).ravel().tolist() == [0, 0, 255, 255, 255]


def test_without_a_window_the_frame_goes_from_black_to_white():
    values = np.array([[3, 4, 5]], dtype=np.uint16)
    assert levels(dicom(values)).tolist() == [[0, 128, 255]]
    assert levels(dicom(values.astype(np.uint8))).tolist() == [[0, 128, 255]]


def test_each_frame_is_stretched_by_itself():
    values = np.array([[[0, 10]], [[100, 300]]], dtype=np.uint16)
    assert levels(dicom(values), frame=1).tolist() == [[0, 255]]


def test_a_constant_frame_is_black():
    assert levels(dicom(np.full((2, 2), 900, np.uint16))).tolist() == [[0, 0], [0, 0]]


def test_rescaling_comes_before_the_window():
    values = np.array([[0, 864, 1064, 1264, 4095]], dtype=np.uint16)
    data = dicom(values, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    assert levels(data).ravel().tolist() == linear(values * 2.0 - 1024, 40, 400)


def test_a_negative_slope_turns_black_into_white():
    values = np.array([[0, 1, 2]], dtype=np.uint16)
    assert levels(dicom(values, RescaleSlope=-1, RescaleIntercept=0)).tolist() == [[255, 128, 0]]


def test_monochrome1_is_inverted():
    values = np.array([[0, 100, 400]], dtype=np.uint16)
    plain = levels(dicom(values, WindowCenter=200, WindowWidth=400))
    inverted = levels(dicom(values, WindowCenter=200, WindowWidth=400, PhotometricInterpretation="MONOCHROME1"))
    assert (plain.astype(int) + inverted == 255).all() and plain[0, 0] == 0


def test_linear_exact_and_sigmoid():
    window = {"WindowCenter": 40, "WindowWidth": 400}
    exact = levels(dicom(RAMP, VOILUTFunction="LINEAR_EXACT", **window))
    assert exact.tolist() == [[0, 0, 128, 255, 255]]
    sigmoid = levels(dicom(RAMP, VOILUTFunction="SIGMOID", **window))
    expected = 255 / (1 + np.exp(-4 * (RAMP - 40.0) / 400))
    assert np.abs(sigmoid - expected).max() <= 0.5


def test_fractional_widths_are_fine_where_the_function_allows_them():
    data = dicom(RAMP, RescaleSlope="0.001", RescaleIntercept=0, WindowCenter="0.04", WindowWidth="0.4")
    with pytest.raises(
        ImageError, match=r"the file's window width must be at least 1; give --window CENTRE,WIDTH, or window in Python"
    ):
        read_image(data)
    exact = dicom(
        RAMP,
        RescaleSlope="0.001",
        RescaleIntercept=0,
        WindowCenter="0.04",
        WindowWidth="0.4",
        VOILUTFunction="LINEAR_EXACT",
    )
    assert levels(exact).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ("0     ", "the file's window width must be at least 1"),
        ("-400  ", "the file's window width must be at least 1"),
        ("nan   ", "expected WindowWidth to be finite, found NaN or infinity"),
        ("inf   ", "expected WindowWidth to be finite, found NaN or infinity"),
        ("400,5 ", "expected WindowWidth to be numbers, found something else"),
        (r"\400  ", "expected WindowWidth to be numbers, found something else"),
        (r"4\4   ", "expected a width for each window centre, found 2 for 1"),
    ],
)
def test_an_unusable_window_in_the_file_is_refused_unless_replaced(width, message):
    data = dicom(RAMP, WindowCenter=40, WindowWidth="123456").replace(b"123456", width.encode())
    with pytest.raises(ImageError, match=rf"^picture: {message}; give --window CENTRE,WIDTH, or window in Python"):
        read_image(data)
    assert levels(data, window=(40, 400)).ravel().tolist() == linear(RAMP, 40, 400)


def test_a_centre_without_a_width_is_refused():
    with pytest.raises(ImageError, match="expected a width for each window centre, found 0 for 1"):
        read_image(dicom(RAMP, WindowCenter=40))


def test_an_empty_window_is_no_window():
    data = dicom(RAMP, WindowCenter="", WindowWidth="")
    assert np.array_equal(levels(data), levels(dicom(RAMP)))


def test_an_unknown_voi_function_is_refused():
    data = dicom(RAMP, WindowCenter=40, WindowWidth=400, VOILUTFunction=SECRET)
    with pytest.raises(ImageError, match="expected the VOI function LINEAR, LINEAR_EXACT or SIGMOID") as caught:
        read_image(data)
    assert SECRET not in str(caught.value)
    assert levels(data, window=(40, 400)).ravel().tolist() == linear(RAMP, 40, 400)


@pytest.mark.parametrize(
    ("slope", "intercept", "message"),
    [
        ("0", "0", "expected one rescale slope, not 0, and one intercept"),
        ("nan", "0", "expected RescaleSlope to be finite"),
        ("1", "inf", "expected RescaleIntercept to be finite"),
        ("1e308", "0", "the rescaled values are not finite"),
        ("1\\2", "0", "expected one rescale slope, not 0, and one intercept"),
        ("", "5", "expected one rescale slope, not 0, and one intercept"),
    ],
)
def test_unusable_rescaling_is_refused(slope, intercept, message):
    data = dicom(RAMP, RescaleSlope="11111111", RescaleIntercept="22222222")
    data = data.replace(b"11111111", slope.ljust(8).encode()).replace(b"22222222", intercept.ljust(8).encode())
    with pytest.raises(ImageError, match=message):
        read_image(data)


# ---- tables


def test_a_modality_table_is_clipped_at_its_ends():
    table = lookup_table([10, 20, 60], first=2, bits=16)
    values = np.array([[0, 2, 3, 4, 9]], dtype=np.uint16)
    assert levels(dicom(values, ModalityLUTSequence=table)).tolist() == [[0, 0, 51, 255, 255]]


def test_a_modality_table_may_begin_below_zero():
    table = lookup_table([0, 100, 200], first=-1, bits=16, signed=True)
    values = np.array([[-5, -1, 0, 1]], dtype=np.int16)
    assert levels(dicom(values, ModalityLUTSequence=table)).tolist() == [[0, 0, 128, 255]]


def test_a_voi_table_for_signed_values_may_be_declared_unsigned():
    table = lookup_table([0, 100, 255], first=65535)
    values = np.array([[-5, -1, 0, 1, 5]], dtype=np.int16)
    assert levels(dicom(values, VOILUTSequence=table)).tolist() == [[0, 0, 100, 255, 255]]


def test_a_voi_table_is_used_where_there_is_no_window():
    table = lookup_table([0, 1023, 512], first=100, bits=10)
    values = np.array([[99, 100, 101, 102, 103]], dtype=np.uint16)
    assert levels(dicom(values, VOILUTSequence=table)).tolist() == [[0, 0, 255, 128, 128]]
    both = dicom(values, VOILUTSequence=table, WindowCenter=101, WindowWidth=4)
    assert levels(both).ravel().tolist() == linear(values, 101, 4)


def test_a_voi_table_of_12_bits_in_16_goes_up_to_white():
    values = np.array([[0, 1, 2]], dtype=np.uint16)
    for entries in ([0, 2048, 4095], [0, 128, 255], [0, 32768, 65535]):
        table = lookup_table(entries, bits=16)
        assert levels(dicom(values, VOILUTSequence=table)).tolist() == [[0, 128, 255]]
    # Fewer bits than 8 are of no display, and the numbers that are not 16 say what they mean.
    assert levels(dicom(values, VOILUTSequence=lookup_table([0, 1, 2], bits=16))).tolist() == [[0, 1, 2]]
    assert levels(dicom(values, VOILUTSequence=lookup_table([0, 512, 1023], bits=12))).tolist() == [[0, 32, 64]]


@pytest.mark.parametrize(
    ("descriptor", "data", "message"),
    [
        ([3, 0, 16], [1, 2], "expected a lookup table of 3 entries, found 2"),
        ([2, 0, 16], [1, 2, 3, 4], "expected a lookup table of 2 entries, found 4"),
        ([0, 0, 16], [1, 2], "expected a lookup table of 65536 entries, found 2"),
        ([2, 0, 4], [1, 2], "expected lookup table entries of 8 to 16 bits, found 4"),
        ([2, 0], [1, 2], "expected a lookup table descriptor of three numbers"),
    ],
)
def test_unusable_tables_are_refused(descriptor, data, message):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", descriptor)
    table.add_new("LUTData", "US", data)
    with pytest.raises(ImageError, match=message):
        read_image(dicom(RAMP, VOILUTSequence=[table]))


# ---- stored values


def test_bits_that_are_not_stored_are_ignored():
    values = np.array([[0x5000, 0x5800, 0x5FFF]], dtype=np.uint16)  # an old overlay in the upper bits
    assert levels(dicom(values, BitsStored=12)).tolist() == [[0, 128, 255]]


def test_signed_values_of_12_bits_are_extended():
    values = np.array([[0x0800, 0x0000, 0x07FF]], dtype=np.int16)  # -2048, 0, 2047
    assert levels(dicom(values, BitsStored=12)).tolist() == [[0, 128, 255]]


def test_padding_is_black_and_does_not_count():
    values = np.array([[-2000, 100, 150, 200]], dtype=np.int16)
    assert levels(dicom(values, PixelPaddingValue=-2000)).tolist() == [[0, 0, 128, 255]]
    inverted = dicom(values, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1")
    assert levels(inverted).tolist() == [[0, 255, 128, 0]]


def test_padding_may_be_declared_with_the_other_sign():
    signed = data_set(np.array([[-2000, 100, 150, 200]], dtype=np.int16))
    signed.add_new("PixelPaddingValue", "US", 63536)
    assert levels(file_bytes(signed)).tolist() == [[0, 0, 128, 255]]
    unsigned = data_set(np.array([[63536, 100, 150, 200]], dtype=np.uint16))
    unsigned.add_new("PixelPaddingValue", "SS", -2000)
    unsigned.add_new("PixelPaddingRangeLimit", "SS", -2010)
    assert levels(file_bytes(unsigned)).tolist() == [[0, 0, 128, 255]]


def test_a_range_of_padding_is_left_out():
    values = np.array([[0, 3, 5, 100, 200]], dtype=np.uint16)
    data = dicom(values, PixelPaddingValue=5, PixelPaddingRangeLimit=0)
    assert levels(data).tolist() == [[0, 0, 0, 0, 255]]


def test_nothing_but_padding_is_refused():
    data = dicom(np.full((2, 2), 7, np.uint16), PixelPaddingValue=7)
    with pytest.raises(ImageError, match="expected at least one pixel that is not padding, found none"):
        read_image(data)


# ---- frames


FRAMES = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)


def test_the_first_frame_is_the_default():
    data = dicom(FRAMES, WindowCenter=6, WindowWidth=12)
    assert np.array_equal(levels(data), levels(data, frame=0))
    for frame in range(3):
        assert levels(data, frame=frame).ravel().tolist() == linear(FRAMES[frame], 6, 12)


@pytest.mark.parametrize("frame", [3, -1, 1.0, True, "1"])
def test_frames_out_of_range_are_refused(frame):
    with pytest.raises(ImageError, match="picture: frame must be from 0 to 2, got "):
        read_image(dicom(FRAMES), frame=frame)


def test_a_single_frame_is_frame_0():
    assert np.array_equal(levels(dicom(RAMP), frame=0), levels(dicom(RAMP)))
    with pytest.raises(ImageError, match="frame must be from 0 to 0, got 1"):
        read_image(dicom(RAMP), frame=1)


def test_functional_groups_hold_rescaling_and_window():
    frames = [item(FrameVOILUTSequence=item(WindowCenter=centre, WindowWidth=8))[0] for centre in (1000, 1006)]
    shared = item(PixelValueTransformationSequence=item(RescaleSlope=1, RescaleIntercept=1000))
    data = dicom(
        FRAMES[:2], PerFrameFunctionalGroupsSequence=frames, SharedFunctionalGroupsSequence=shared, WindowCenter=1,
        WindowWidth=2,
    )  # fmt: skip
    for frame, centre in enumerate((1000, 1006)):
        assert levels(data, frame=frame).ravel().tolist() == linear(FRAMES[frame] + 1000.0, centre, 8)


def test_what_a_frame_says_goes_before_what_all_of_them_say():
    frames = item(FrameVOILUTSequence=item(WindowCenter=4, WindowWidth=8))
    shared = item(FrameVOILUTSequence=item(WindowCenter=100, WindowWidth=8))
    data = dicom(FRAMES, PerFrameFunctionalGroupsSequence=frames, SharedFunctionalGroupsSequence=shared)
    assert levels(data).ravel().tolist() == linear(FRAMES[0], 4, 8)


def test_missing_functional_groups_are_refused():
    groups = item(FrameVOILUTSequence=item(WindowCenter=1, WindowWidth=8))
    data = dicom(FRAMES, PerFrameFunctionalGroupsSequence=groups)
    assert levels(data, frame=0).shape == (2, 2)
    with pytest.raises(ImageError, match="expected functional groups for frame 2, found them for 1 frames"):
        read_image(data, frame=2)


# ---- colour


COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], dtype=np.uint8)


def test_rgb_by_pixel_and_by_plane():
    planar = data_set(COLOURS, PlanarConfiguration=1)
    planar.PixelData = COLOURS.transpose(2, 0, 1).tobytes()
    for data in (dicom(COLOURS), file_bytes(planar)):
        assert np.array_equal(read_image(data), COLOURS)


def test_ybr_full_equals_pillow_and_422_doubles_its_chroma():
    ybr = np.asarray(Image.fromarray(COLOURS).convert("YCbCr"))
    shown = np.asarray(read_image(dicom(ybr, PhotometricInterpretation="YBR_FULL"))).astype(int)
    assert np.abs(shown - COLOURS).max() <= 2
    subsampled = data_set(COLOURS[:, :, :3], PhotometricInterpretation="YBR_FULL_422")
    # Y1 Y2 Cb Cr: two pixels of one colour each row
    subsampled.PixelData = bytes([*ybr[0, 0, [0, 0, 1, 2]], *ybr[1, 0, [0, 0, 1, 2]]])
    shown = np.asarray(read_image(file_bytes(subsampled))).astype(int)
    assert np.abs(shown - COLOURS[:, :1]).max() <= 2


def test_16_bit_colour_is_scaled_by_the_bits_stored():
    values = COLOURS.astype(np.uint16) * 16 + 15
    values[COLOURS == 0] = 0
    shown = np.asarray(read_image(dicom(values, BitsStored=12))).astype(int)
    assert np.abs(shown - COLOURS).max() <= 1
    # The bits above may hold anything (an overlay once stood there).
    assert np.array_equal(read_image(dicom(values | 0xF000, BitsStored=12)), shown)


def palette_file(indices, entries, bits=16, first=0):
    made = data_set(indices, PhotometricInterpretation="PALETTE COLOR")
    for channel, colour in enumerate(("Red", "Green", "Blue")):
        setattr(made, f"{colour}PaletteColorLookupTableDescriptor", [len(entries), first, bits])
        data = np.asarray(entries)[:, channel].astype("<u2" if bits == 16 else "u1").tobytes()
        setattr(made, f"{colour}PaletteColorLookupTableData", data + b"\0" * (len(data) % 2))
    return made


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_of_8_and_16_bits(bits):
    entries = COLOURS.reshape(-1, 3).astype(int) << (bits - 8)
    made = palette_file(np.array([[5, 6, 7, 8, 0, 99]], dtype=np.uint8), entries, bits, first=5)
    expected = COLOURS.reshape(-1, 3)[[0, 1, 2, 3, 0, 3]]
    assert np.array_equal(np.asarray(read_image(file_bytes(made)))[0], expected)


def test_a_palette_that_was_not_widened_is_not_black():
    """It declares 16 bits; the entries have 8."""
    made = palette_file(np.arange(4, dtype=np.uint8)[None], COLOURS.reshape(-1, 3).astype(int))
    assert np.array_equal(np.asarray(read_image(file_bytes(made)))[0], COLOURS.reshape(-1, 3))


def test_a_palette_without_its_table_is_refused():
    made = palette_file(np.zeros((2, 2), np.uint8), COLOURS.reshape(-1, 3))
    del made.GreenPaletteColorLookupTableData
    with pytest.raises(ImageError, match="expected a lookup table of 4 entries, found 0"):
        read_image(file_bytes(made))


def segmented_file(words, entries):
    """A palette of `entries` entries, all three channels segmented as `words`."""
    made = data_set(np.arange(entries, dtype=np.uint8)[None], PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        setattr(made, f"{colour}PaletteColorLookupTableDescriptor", [entries, 0, 16])
        data = np.asarray(words, "<u2").tobytes()
        setattr(made, f"Segmented{colour}PaletteColorLookupTableData", data)
    return file_bytes(made)


def test_a_segmented_palette_is_runs_and_lines():
    data = segmented_file([0, 2, 0x1000, 0x2000, 1, 4, 0x6000], 6)
    assert levels(data).tolist() == [[0x10, 0x20, 0x30, 0x40, 0x50, 0x60]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([0, 1, 0, 1, 65535, 9], "expected a segmented palette of 6 entries, found more"),
        ([1, 4, 0x6000], "expected discrete and linear palette segments, found another kind"),
        ([0, 2, 1, 2, 2, 1, 0, 0], "expected discrete and linear palette segments, found another kind"),
        ([0, 2, 1, 2], "expected a lookup table of 6 entries, found 2"),
    ],
)
def test_unusable_segmented_palettes_are_refused(words, message):
    with pytest.raises(ImageError, match=message):
        read_image(segmented_file(words, 6))


def test_windows_are_for_grey():
    with pytest.raises(ImageError, match="window applies to greyscale, found a colour picture"):
        read_image(dicom(COLOURS), window=(40, 400))
    with pytest.raises(ImageError, match="window must be a finite centre and a width of at least 1"):
        read_image(dicom(RAMP), window=(40, 0))


def test_grey_with_a_colour_overlay_table_is_refused():
    with pytest.raises(ImageError, match="greyscale with a supplemental colour palette is not supported"):
        read_image(dicom(RAMP, PixelPresentation="COLOR"))
