"""From the stored values of one DICOM frame to 8-bit levels (PS3.3 C.11 and C.7.9).

A frame holds 8- or 16-bit values, so the whole pipeline is a table of at most 65,536 entries: computed in float64, then
looked up once per pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError
from ..limits import check_window

if TYPE_CHECKING:  # 16-bit PNG files come here too, and need no pydicom
    from pydicom.dataset import Dataset

Levels = NDArray[np.uint8]
Values = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]

_GIVE_WINDOW = "give --window CENTRE,WIDTH, or window in Python and serve"


def grayscale(
    stored: NDArray[Any], dataset: Dataset, frame: int, inverted: bool, window: tuple[float, float] | None
) -> Levels:
    """Display levels [H, W] of the `stored` 8- or 16-bit values [H, W] of frame `frame`.

    1. Modality table, or rescale slope and intercept.
    2. `window`; else the file's first window; else its first VOI table (either may be shown where a file has both:
       PS3.3 C.11.2.1); else from the smallest to the largest value of the frame, padding left out.
    3. Inversion for MONOCHROME1. Padding is black.

    Raises ImageError.
    """
    codes, meaning = _codes(stored)
    padding = _padding(dataset, meaning)
    values = _modality(functional_group(dataset, frame, "PixelValueTransformationSequence"), meaning)
    if not np.isfinite(values).all():
        raise ImageError("the rescaled values are not finite")

    display = functional_group(dataset, frame, "FrameVOILUTSequence")
    if window is not None:
        levels = linear_window(values, *check_window(window))
    elif (first := _first_window(display)) is not None:
        levels = _window(values, *first, display.get("VOILUTFunction") or "LINEAR")
    elif tables := display.get("VOILUTSequence"):
        first_value, entries, bits = _table(tables[0].get("LUTDescriptor"), tables[0].get("LUTData"), dataset)
        if bits == 16:
            # Agfa and others declare the 16 bits that an entry is stored in, but use only 12: that would be dark. Like
            # Cornerstone, go by the largest entry.
            bits = max(8, int(entries.max()).bit_length())
        levels = _look_up(values, first_value, entries) * (255 / ((1 << bits) - 1))
    else:
        present = np.zeros(meaning.size, dtype=bool)
        present[codes.reshape(-1)] = True
        levels = _stretch(values, values[present & ~padding])

    if inverted:
        levels = 255 - levels
    levels[padding] = 0
    picture: Levels = to_levels(levels)[codes]
    return picture


def palette(stored: NDArray[Any], dataset: Dataset) -> Levels:
    """Colours [H, W, 3] of a PALETTE COLOR frame. Of 16-bit entries, which are widened 8-bit ones, the upper byte."""
    codes, meaning = _codes(stored)
    tables = []
    for colour in ("Red", "Green", "Blue"):
        descriptor = dataset.get(f"{colour}PaletteColorLookupTableDescriptor")
        data = dataset.get(f"{colour}PaletteColorLookupTableData")
        segments = dataset.get(f"Segmented{colour}PaletteColorLookupTableData")
        if data is None and isinstance(segments, bytes):
            data = _expand_segments(descriptor, segments, dataset)
        tables.append(_table(descriptor, data, dataset))
    # Some declare 16 bits and were not widened: every upper byte is 0.
    is_narrow = all(entries.max() <= 0xFF for _, entries, _ in tables)
    channels = [
        to_levels(_look_up(meaning, first_value, entries if is_narrow else entries >> (bits - 8)))[codes]
        for first_value, entries, bits in tables
    ]
    picture: Levels = np.stack(channels, axis=-1)
    return picture


def linear_window(values: Values, centre: float, width: float) -> Values:
    """The LINEAR function of PS3.3 C.11.2.1.2.1, onto 0..255; `width` at least 1."""
    if width == 1:
        return np.asarray(np.where(values > centre - 0.5, 255.0, 0.0))
    return np.asarray(np.clip(((values - (centre - 0.5)) / (width - 1) + 0.5) * 255, 0, 255))


def to_levels(values: NDArray[Any]) -> Levels:
    return np.asarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _codes(stored: NDArray[Any]) -> tuple[NDArray[Any], Indices]:
    """The pixels as unsigned indices [H, W], and the stored value that each possible index stands for."""
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    codes = np.ascontiguousarray(stored, stored.dtype.newbyteorder("=")).view(unsigned)
    every = np.arange(1 << 8 * unsigned.itemsize).astype(unsigned)
    return codes, every.view(np.dtype(f"{stored.dtype.kind}{unsigned.itemsize}")).astype(np.int64)


def _window(values: Values, centre: float, width: float, function: str) -> Values:
    # Do what the file asks for, or refuse: in another window a picture may show another finding.
    least = 1 if function == "LINEAR" else np.finfo(np.float64).tiny
    if not width >= least:
        wanted = "at least 1" if function == "LINEAR" else "positive"
        raise ImageError(f"the file's window width must be {wanted}; {_GIVE_WINDOW}")
    if function == "LINEAR":
        return linear_window(values, centre, width)
    if function == "LINEAR_EXACT":
        return np.asarray(np.clip(((values - centre) / width + 0.5) * 255, 0, 255))
    if function == "SIGMOID":
        return np.asarray(255 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))))
    raise ImageError(f"expected the VOI function LINEAR, LINEAR_EXACT or SIGMOID; {_GIVE_WINDOW}")


def _stretch(values: Values, shown: Values) -> Values:
    """From the smallest to the largest of `shown` onto 0..255. A frame of one value has no contrast: it is black."""
    if shown.size == 0:
        raise ImageError("expected at least one pixel that is not padding, found none")
    low, high = shown.min(), shown.max()
    if low == high:
        return np.zeros_like(values)
    return np.asarray(np.clip((values - low) / (high - low) * 255, 0, 255))


def functional_group(dataset: Dataset, frame: int, keyword: str) -> Dataset:
    """The item that holds a functional group: this frame's, the shared one, or else the top level."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if frames and frame >= len(frames):
        raise ImageError(f"expected functional groups for frame {frame}, found them for {len(frames)} frames")
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for holder in [*frames[frame : frame + 1], *shared[:1]]:
        if found := holder.get(keyword):
            group: Dataset = found[0]
            return group
    return dataset


def _padding(dataset: Dataset, meaning: Indices) -> NDArray[np.bool_]:
    """Which stored values are padding (PS3.3 C.7.5.1.1.2)."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(meaning.size, dtype=bool)
    bounds = sorted(_as_stored(int(one), meaning) for one in (value, value if limit is None else limit))
    return (bounds[0] <= meaning) & (meaning <= bounds[1])


def _as_stored(value: int, meaning: Indices) -> int:
    """The stored value of the same bits: some scanners declare -2000 as the unsigned 63536, or the reverse."""
    if value > meaning.max():
        return value - meaning.size
    return value + meaning.size if value < meaning.min() else value


def _modality(holder: Dataset, meaning: Indices) -> Values:
    if tables := holder.get("ModalityLUTSequence"):
        first_value, entries, _ = _table(tables[0].get("LUTDescriptor"), tables[0].get("LUTData"), holder)
        return _look_up(meaning, first_value, entries).astype(np.float64)
    slope, intercept = _numbers(holder, "RescaleSlope"), _numbers(holder, "RescaleIntercept")
    if not slope and not intercept:
        return meaning.astype(np.float64)
    if len(slope) != 1 or len(intercept) != 1 or slope[0] == 0:
        raise ImageError("expected one rescale slope, not 0, and one intercept, found something else")
    with np.errstate(over="ignore"):
        return meaning * slope[0] + intercept[0]


def _first_window(holder: Dataset) -> tuple[float, float] | None:
    try:
        centres, widths = _numbers(holder, "WindowCenter"), _numbers(holder, "WindowWidth")
        if len(centres) != len(widths):
            raise ImageError(f"expected a width for each window centre, found {len(widths)} for {len(centres)}")
    except ImageError as error:
        raise ImageError(f"{error}; {_GIVE_WINDOW}") from None
    return (centres[0], widths[0]) if centres else None


def _numbers(holder: Dataset, keyword: str) -> list[float]:
    value = holder.get(keyword)
    if value is None or value == "":
        return []
    several = hasattr(value, "__iter__") and not isinstance(value, str)
    try:
        numbers = [float(number) for number in (value if several else [value])]
    except ValueError:  # pydicom gives text where it cannot read a number
        raise ImageError(f"expected {keyword} to be numbers, found something else") from None
    if not np.isfinite(numbers).all():
        raise ImageError(f"expected {keyword} to be finite, found NaN or infinity")
    return numbers


def _descriptor(descriptor: Any) -> tuple[int, int, int]:
    """Number of entries, first value mapped, bits per entry (PS3.3 C.11.1.1)."""
    if descriptor is None or len(descriptor) != 3:
        raise ImageError("expected a lookup table descriptor of three numbers, found something else")
    # Where pixels are signed, the count is read as signed, too: 40,000 entries look like -25,536.
    count, first_value, bits = int(descriptor[0]) & 0xFFFF or 1 << 16, int(descriptor[1]), int(descriptor[2])
    if not 8 <= bits <= 16:
        raise ImageError(f"expected lookup table entries of 8 to 16 bits, found {bits}")
    return count, first_value, bits


def _table(descriptor: Any, data: Any, dataset: Dataset) -> tuple[int, Indices, int]:
    """First value mapped, entries, and bits per entry of a lookup table. `dataset` tells the byte order."""
    count, first_value, bits = _descriptor(descriptor)
    if isinstance(data, bytes):
        words = len(data) >= 2 * count
        entries = np.frombuffer(data[: len(data) // 2 * 2 if words else None], _word(dataset) if words else "u1")
    else:
        entries = np.asarray([] if data is None else data)
    if not count <= entries.size <= count + 1 or entries.dtype.kind not in "iu":
        raise ImageError(f"expected a lookup table of {count} entries, found {entries.size}")
    return first_value, entries[:count].astype(np.int64) & ((1 << bits) - 1), bits


def _word(dataset: Dataset) -> str:
    return "<u2" if dataset.original_encoding[1] is not False else ">u2"


def _look_up(values: NDArray[Any], first_value: int, entries: Indices) -> Indices:
    """Values below the table take its first entry, values above its last (PS3.3 C.11.1.1)."""
    if first_value > 0x7FFF and values.min() < 0:
        first_value -= 1 << 16  # a signed number, declared as an unsigned one
    index = np.clip(np.rint(values), first_value, first_value + entries.size - 1).astype(np.int64)
    found: Indices = entries[index - first_value]
    return found


def _expand_segments(descriptor: Any, data: bytes, dataset: Dataset) -> list[int]:
    """The entries of a segmented palette (PS3.3 C.7.9.2): discrete segments as they are, linear ones interpolated."""
    count, _, bits = _descriptor(descriptor)
    words = np.frombuffer(data[: len(data) // 2 * 2], _word(dataset)) if bits > 8 else np.frombuffer(data, "u1")
    numbers, entries, position = words.tolist(), list[int](), 0
    while position + 2 < len(numbers) and len(entries) < count:
        kind, length = numbers[position : position + 2]
        if len(entries) + length > count:
            raise ImageError(f"expected a segmented palette of {count} entries, found more")
        if kind == 0:
            entries += numbers[position + 2 : position + 2 + length]
            position += 2 + length
        elif kind == 1 and entries and length:
            line = np.linspace(entries[-1], numbers[position + 2], length + 1)[1:]
            entries += np.rint(line).astype(int).tolist()
            position += 3
        else:
            raise ImageError("expected discrete and linear palette segments, found another kind")
    return entries
