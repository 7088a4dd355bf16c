"""Pictures in and out: equal to the original's pixels, refused by one clear line, and never a bomb."""

import io
import json
import logging
import os
import resource
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from healthgpt_edge.errors import ImageError
from healthgpt_edge.images import BACKGROUND, prepare, read_image, write_image
from healthgpt_edge.limits import MAX_FILE_BYTES, MAX_SIDE, guarded

GOLDEN = Path(__file__).parent.parent / "golden"
PIXEL_VALUES_TOLERANCE = 1e-5


def picture(mode="RGB", size=(23, 17)):
    """A picture with every level somewhere, made from a fixed seed."""
    pixels = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour, rows, *before):
    """A PNG file of the filtered `rows`, with further chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + body + chunk(b"IEND", b"")


def black_png(width, height, rows=None):
    """The file of a black picture of one bit a pixel; with `rows`, cut after those."""
    row = bytes(1 + (width + 7) // 8)
    return png(width, height, 1, 0, row * (height if rows is None else rows))


# ---- equal to the original


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("expected/*.json")))
def test_prepared_pictures_equal_the_original(case):
    values = np.load(GOLDEN / "expected" / f"{case}.npz")
    argv = json.loads((GOLDEN / "expected" / f"{case}.json").read_text())["argv"]
    names = [Path(word).name for word in argv if (GOLDEN / "images" / Path(word).name).is_file()]
    if not names:
        pytest.skip("this case has no image")
    folder = GOLDEN / "checkpoints" / case.split("_")[0] / "clip-vit-large-patch14-336"
    preprocessing = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = prepare(read_image(GOLDEN / "images" / names[0]), preprocessing["size"])
    mean, std = (np.array(preprocessing[key]) for key in ("image_mean", "image_std"))
    normalised = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]
    assert np.abs(normalised - values["pixel_values"]).max() < PIXEL_VALUES_TOLERANCE


@pytest.mark.parametrize("name", ["big", "gray", "square", "tall", "wide"])
def test_golden_pictures_are_padded_in_the_middle(name):
    path = GOLDEN / "images" / f"{name}.png"
    image = read_image(path)
    assert np.array_equal(image, Image.open(path).convert("RGB"))
    side = max(image.size)
    square = prepare(image, side)
    assert square.shape == (side, side, 3) and square.dtype == np.uint8
    left, top = (side - image.width) // 2, (side - image.height) // 2
    assert np.array_equal(square[top : top + image.height, left : left + image.width], image)
    border = np.ones((side, side), dtype=bool)
    border[top : top + image.height, left : left + image.width] = False
    assert (square[border] == BACKGROUND).all()


def test_an_odd_border_is_thinner_on_the_left_and_above():
    for size in ((2, 5), (5, 2)):
        prepared = prepare(Image.new("RGB", size, (255, 255, 255)), 5, background=(0, 0, 0))
        across = prepared[0, :, 0] if size == (2, 5) else prepared[:, 0, 0]
        assert across.tolist() == [0, 255, 255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_8_bit_png_equals_pillow(mode):
    data = encoded(picture(mode))
    assert np.array_equal(read_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(mode, progressive):
    data = encoded(picture(mode), "JPEG", progressive=progressive)
    assert np.array_equal(read_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("depth", "levels"), [(1, [0, 0, 0, 255, 255, 0, 255, 255]), (2, [0, 85, 170, 255] * 2), (4, [17, 187] * 4)]
)
def test_grey_of_few_bits_spans_black_to_white(depth, levels):
    data = png(8, 1, depth, 0, b"\0" + bytes([0b00011011]) * depth)
    assert np.asarray(read_image(data))[0, :, 0].tolist() == levels
    assert np.array_equal(read_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_transparent_palette_equals_pillow():
    data = encoded(picture("P"), transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(data)
    assert np.array_equal(image, np.asarray(picture("P").convert("RGB")))


def test_exif_orientation_is_ignored_as_in_the_original():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(encoded(picture(), "JPEG", exif=exif))
    assert image.size == (23, 17)


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 300, 4095, 32768, 60000, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(values))
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [0, 0, 1, 1, 1, 16, 128, 233, 255]
    assert np.array_equal(read_image(values), read_image(data))


def test_16_bit_grey_takes_a_window():
    values = np.array([[0, 1000, 1500, 2000, 65535]], dtype=np.uint16)
    levels = np.asarray(read_image(encoded(Image.fromarray(values)), window=(1500.5, 1001)))[0, :, 0]
    assert levels.tolist() == [0, 0, 128, 255, 255]


def test_16_bit_colour_equals_pillow():
    rows = b"\0" + np.random.default_rng(3).bytes(4 * 3 * 2)
    data = png(4, 1, 16, 2, rows)
    assert np.array_equal(read_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_every_source_gives_the_same_picture(tmp_path):
    image = picture()
    path = tmp_path / "no suffix needed"
    path.write_bytes(encoded(image))
    for source in (path, str(path), os.fsencode(path).decode(), path.read_bytes(), image, np.asarray(image)):
        result = read_image(source)
        assert result.mode == "RGB" and np.array_equal(result, image)
    assert np.array_equal(read_image(np.asarray(image)[:, ::-1]), np.asarray(image)[:, ::-1])
    assert np.array_equal(read_image(np.asarray(image.convert("L"))), image.convert("L").convert("RGB"))


def test_the_content_decides_and_not_the_name(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(), "JPEG"))
    assert read_image(tmp_path / "a.png").size == (23, 17)


# ---- refused


def animated_png():
    return encoded(picture(), save_all=True, append_images=[picture("L").convert("RGB")])


def multi_picture_jpeg():
    return encoded(picture(), "MPO", save_all=True, append_images=[picture()])


def text_bomb(kind):
    """8 MB of text in a chunk of 8 KB."""
    bomb = zlib.compress(bytes(8 << 20))
    data = {b"zTXt": b"k\0\0" + bomb, b"iTXt": b"k\0\1\0\0\0" + bomb, b"iCCP": b"k\0\0" + bomb}[kind]
    return png(1, 1, 8, 0, b"\0\0", chunk(kind, data))


PNG, JPEG = encoded(picture()), encoded(picture(), "JPEG")
REFUSED = {
    "empty": (b"", "picture: expected a picture, found an empty file"),
    "text": (b"hello, this is no picture", "picture: expected PNG, JPEG or DICOM, found another format"),
    "gif": (encoded(picture("P"), "GIF"), "picture: expected PNG, JPEG or DICOM, found another format"),
    "tiff": (encoded(picture(), "TIFF"), "picture: expected PNG, JPEG or DICOM, found another format"),
    "webp": (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(9), "picture: expected PNG, JPEG or DICOM, found another format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "picture: expected PNG, JPEG or DICOM, found another format"),
    "png signature only": (PNG[:8], "picture: cannot be read as PNG: damaged"),
    "png cut in its header": (PNG[:20], "picture: cannot be read as PNG: damaged"),
    "png cut in its pixels": (PNG[:-200], "picture: cannot be read as PNG: damaged or cut short"),
    "png with a wrong checksum": (PNG[:29] + b"\0\0\0\0" + PNG[33:], "picture: cannot be read as PNG: damaged"),
    "png of no width": (png(0, 5, 8, 0, bytes(5)), "picture: cannot be read as PNG: damaged"),
    "png of an unknown kind": (png(1, 1, 5, 7, b"\0\0"), "picture: cannot be read as PNG: damaged"),
    "jpeg signature only": (JPEG[:3], "picture: cannot be read as JPEG: damaged"),
    "jpeg cut in its header": (JPEG[:100], "picture: cannot be read as JPEG: damaged"),
    "jpeg cut in its pixels": (JPEG[: len(JPEG) // 2 + 200], "picture: cannot be read as JPEG: damaged or cut short"),
    "animated png": (animated_png(), "picture: expected one picture in the file, found 2"),
    "multi-picture jpeg": (multi_picture_jpeg(), "picture: expected one picture in the file, found 2"),
    "zTXt bomb": (text_bomb(b"zTXt"), "picture: cannot be read as PNG: damaged or not supported"),
    "iTXt bomb": (text_bomb(b"iTXt"), "picture: cannot be read as PNG: damaged or not supported"),
    "iCCP bomb": (text_bomb(b"iCCP"), "picture: cannot be read as PNG: damaged or not supported"),
    "too wide": (black_png(MAX_SIDE + 1, 1), f"expected at most {MAX_SIDE} pixels a side and"),
    "too many pixels": (black_png(9000, 9000), "found 9000 x 9000"),
    "beyond pillow's limit": (black_png(60000, 60000, rows=1), "picture: expected at most 67108864 pixels, found more"),
    "type": (3, "expected a path, bytes, a PIL image or an array as the picture, found int"),
    "nothing": (None, "expected a path, bytes, a PIL image or an array as the picture, found NoneType"),
    "float array": (np.zeros((4, 4, 3)), "array: expected uint8 [H, W] or [H, W, 3], or uint16 [H, W], found float64"),
    "array of four channels": (np.zeros((4, 4, 4), np.uint8), "array: expected uint8 [H, W] or [H, W, 3]"),
    "array of no row": (np.zeros((0, 4, 3), np.uint8), "array: expected at least one pixel, found 4 x 0"),
    "array of one axis": (np.zeros(4, np.uint8), "array: expected uint8 [H, W] or [H, W, 3]"),
    "float picture": (Image.new("F", (2, 2)), "picture: expected 8 bits a channel or 16-bit grey, found mode F"),
    "lab picture": (Image.new("LAB", (2, 2)), "picture: expected 8 bits a channel or 16-bit grey, found mode LAB"),
    "picture of 17 bits": (Image.new("I", (2, 2), 1 << 16), "picture: expected grey values of 16 bits"),
    "picture below black": (Image.new("I", (2, 2), -1), "picture: expected grey values of 16 bits"),
    "picture of no width": (Image.new("RGB", (0, 3)), "picture: expected at least one pixel, found 0 x 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    source, message = REFUSED[name]
    with pytest.raises(ImageError) as caught:
        read_image(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_lazy_picture_that_is_damaged_is_refused():
    with pytest.raises(ImageError, match=r"^picture: cannot be read as a picture: damaged or cut short$"):
        read_image(Image.open(io.BytesIO(PNG[:-200])))


@pytest.mark.parametrize("data", [PNG[:-200], JPEG[: len(JPEG) // 2 + 200]])
def test_truncated_pictures_are_refused_whatever_the_host_told_pillow(data, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="damaged or cut short"):
        read_image(data)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_paths_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in {
        tmp_path / "missing.png": "missing.png: cannot be opened: No such file or directory",
        tmp_path: f"{tmp_path.name}: expected a file, found a directory",
        tmp_path / "pipe": "pipe: expected a file, found a device or pipe",
        "/dev/zero": "zero: expected a file, found a device or pipe",
        "a\0b": r"'a\x00b': cannot be opened: not a usable path",
        tmp_path / "two\nlines": r"'two\nlines': cannot be opened: No such file or directory",
        "x" * 5000: "cannot be opened: File name too long",
    }.items():
        with pytest.raises(ImageError) as caught:
            read_image(path)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.write(PNG)
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no space
    message = f"large.png: expected at most {MAX_FILE_BYTES} bytes, found {MAX_FILE_BYTES + 1}"
    with pytest.raises(ImageError, match=message):
        read_image(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": 0}, "picture: frame applies to DICOM files only"),
        ({"window": (40, 400)}, "picture: window applies to DICOM and 16-bit grey pictures only"),
    ],
)
def test_options_of_dicom_are_refused_for_other_files(options, message):
    with pytest.raises(ImageError, match=message):
        read_image(PNG, **options)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((40,), "window must be two numbers"),
        (40, "window must be two numbers"),
        (("a", 1), "window must be two numbers"),
        ((float("nan"), 400), "window must be a finite centre and a width of at least 1"),
        ((40, float("nan")), "window must be a finite centre and a width of at least 1"),
        ((40, 0), "window must be a finite centre and a width of at least 1"),
        ((40, -5), "window must be a finite centre and a width of at least 1"),
        ((float("inf"), 5), "window must be a finite centre and a width of at least 1"),
    ],
)
def test_unusable_windows_are_refused(window, message):
    with pytest.raises(ImageError, match=message):
        read_image(np.zeros((2, 2), np.uint16), window=window)


def test_prepare_refuses_what_read_image_never_gives():
    with pytest.raises(ImageError, match="expected an RGB picture, found mode L"):
        prepare(Image.new("L", (2, 2)), 4)


# ---- bombs: refused before they are allocated

LIMITED = """
import resource, sys, time
import numpy, PIL.Image, pydicom.pixels
from healthgpt_edge.errors import ImageError
from healthgpt_edge.images import read_image
import healthgpt_edge.dicom.read
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
# The time of this process, and not of the others that share the machine.
begin = time.process_time()
try:
    read_image(sys.argv[1])
except ImageError as error:
    assert time.process_time() - begin < 1, time.process_time() - begin
    print(error)
"""


def read_under_limits(path):
    """What read_image says in a process of 512 MB, within a second."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


def test_a_png_bomb_is_refused_at_once(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(black_png(9000, 9000))
    assert path.stat().st_size < 20_000
    expected = f"bomb.png: expected at most {MAX_SIDE} pixels a side and 67108864 in all, found 9000 x 9000"
    assert read_under_limits(path) == expected


# ---- silence


def test_libraries_are_silent_only_while_they_read_and_on_that_thread(caplog):
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("PIL.PngImagePlugin")
    seen = []

    def elsewhere():
        logger.warning("from another thread")

    with warnings.catch_warnings(record=True) as caught, guarded("a", "PNG"):
        logger.warning("hidden")
        logging.getLogger("healthgpt_edge").warning("own")
        warnings.warn("hidden", stacklevel=1)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    logger.warning("afterwards")
    seen = [record.getMessage() for record in caplog.records]
    assert seen == ["own", "from another thread", "afterwards"] and not caught


def test_failures_become_one_line_without_the_text_of_the_library():
    with pytest.raises(ImageError) as caught, guarded("a.dcm", "DICOM"):
        raise KeyError("SECRET\nvalue")
    assert str(caught.value) == "a.dcm: cannot be read as DICOM: damaged or not supported (KeyError)"
    assert caught.value.__suppress_context__


def test_an_interrupt_is_not_a_failure():
    with pytest.raises(KeyboardInterrupt), guarded("a", "PNG"):
        raise KeyboardInterrupt


# ---- out


def test_a_picture_survives_writing(tmp_path):
    path = tmp_path / "out.png"
    pixels = np.asarray(picture())
    path.write_text("an older file")
    write_image(path, pixels[:, ::-1])
    assert np.array_equal(read_image(path), pixels[:, ::-1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_who_reads_the_old_picture_still_can(tmp_path):
    path = tmp_path / "out.png"
    write_image(path, np.zeros((2, 2, 3), np.uint8))
    before = path.read_bytes()
    with path.open("rb") as file:
        write_image(path, np.asarray(picture()))
        assert file.read() == before != path.read_bytes()


def test_a_written_picture_has_the_rights_of_any_new_file(tmp_path):
    write_image(tmp_path / "out.png", np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "other").touch()
    assert (tmp_path / "out.png").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["out.jpg", "out", "out.png.gz", "png"])
def test_only_png_and_dicom_are_written(tmp_path, name):
    message = f"{name}: pictures are written as PNG or DICOM, expected a name that ends in .png or .dcm"
    with pytest.raises(ImageError, match=message):
        write_image(tmp_path / name, np.zeros((2, 2, 3), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 2, 3)),
        np.zeros((2, 2), np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        Image.new("RGB", (2, 2)),
        [[[0, 0, 0]]],
    ],
)
def test_only_rgb_pixels_are_written(tmp_path, pixels):
    with pytest.raises(ImageError, match=r"out\.png: expected pixels uint8 \[H, W, 3\], got"):
        write_image(tmp_path / "out.png", pixels)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_wrong_folder_is_an_error(tmp_path):
    pixels = np.zeros((2, 2, 3), np.uint8)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, message in {
        tmp_path / "missing" / "out.png": "out.png: cannot be written: No such file or directory",
        tmp_path / "file" / "out.png": "out.png: cannot be written: Not a directory",
        tmp_path / "folder.png": "folder.png: cannot be written: Is a directory",
        tmp_path / "a\0.png": "cannot be written: not a usable path",
    }.items():
        with pytest.raises(ImageError) as caught:
            write_image(path, pixels)
        assert message in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ImageError, match=r"out\.png: cannot be written: Permission denied"):
        write_image(tmp_path / "out.png", np.zeros((2, 2, 3), np.uint8))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.png"
    write_image(path, np.zeros((2, 2, 3), np.uint8))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ImageError, match=r"out\.png: cannot be written: File too large"):
            write_image(path, np.asarray(picture(size=(200, 200))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(descriptor):
        assert len(list(tmp_path.iterdir())) == 1  # the temporary file
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "out.png", np.zeros((2, 2, 3), np.uint8))
    assert not list(tmp_path.iterdir())
