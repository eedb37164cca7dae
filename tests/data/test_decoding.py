"""Images of every kind are decoded as a person sees them, in bounded memory, or refused by name."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from opnp.data import colors, decoding, preprocessing
from opnp.data.decoding import check_header, decode
from opnp.data.preprocessing import Preprocessing
from opnp.errors import InputError

ROOT = Path(__file__).parents[2]
SIDE = 64
PREPARED = {
    mode: Preprocessing(SIDE, mode, (0.5,) * channels, (0.5,) * channels)
    for mode, channels in (("L", 1), ("RGB", 3))
}
Y, X = np.mgrid[:SIDE, :SIDE]
GREY = (np.sin(X / 7) + np.cos(Y / 5) + 2) / 4  # in [0, 1]
LEVELS = (GREY * 255).astype(np.uint8)
COLORS = np.stack([LEVELS, LEVELS[::-1], LEVELS.T], axis=2)


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def prepared(image: Image.Image, mode: str = "RGB") -> NDArray[np.int64]:
    return PREPARED[mode].pixels(image).astype(np.int64)


def difference(image: Image.Image, expected: Image.Image, mode: str = "RGB") -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(prepared(image, mode) - prepared(expected, mode)).mean())


# Modes


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("stored", "levels"),
    [("RGB", 0), ("RGBX", 0), ("RGBA", 0), ("CMYK", 0), ("YCbCr", 2), ("HSV", 3), ("LAB", 3)],
)
def test_colors_are_seen_as_colors(stored: str, levels: float, mode: str) -> None:
    picture = Image.fromarray(COLORS)
    if stored == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
        assert image is not None
    else:
        image = picture.convert(stored)
    assert image.mode == stored
    assert difference(image, picture, mode) <= levels


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("stored", ["1", "L", "P", "LA", "PA"])
def test_greys_are_seen_as_greys(stored: str, mode: str) -> None:
    picture = Image.fromarray(LEVELS)
    if stored == "1":
        picture = Image.fromarray(np.uint8(255 * (LEVELS > 127)))
    image = picture.convert("P").convert("PA") if stored == "PA" else picture.convert(stored)
    assert image.mode == stored
    assert difference(image, picture, mode) == 0


def half_clear(stored: str) -> Image.Image:
    """Black, its left half transparent, the right quarter half so."""
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:, : SIDE // 2], alpha[:, -SIDE // 4 :] = 0, 128
    black = Image.new("RGBA", (SIDE, SIDE))
    black.putalpha(Image.fromarray(alpha))
    match stored:
        case "RGBA":
            return black
        case "RGBa":
            return black.convert("RGBa")
        case "LA" | "La":
            grey = Image.new("LA", (SIDE, SIDE))
            grey.putalpha(Image.fromarray(alpha))
            return grey.convert(stored)
        case "PA":
            palette = Image.new("P", (SIDE, SIDE)).convert("PA")
            palette.putalpha(Image.fromarray(alpha))
            return palette
    table = Image.fromarray(np.uint8(np.searchsorted([0, 128, 255], alpha)), "P")
    table.putpalette([0, 0, 0] * 3)
    return Image.open(io.BytesIO(encoded(table, transparency=bytes([0, 128, 255]))))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("stored", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_what_is_transparent_shows_white(stored: str, mode: str) -> None:
    image = half_clear(stored)
    assert image.mode == stored
    found = prepared(image, mode)
    assert (found[:, : SIDE // 2] == 255).all()
    assert (found[:, SIDE // 2 : -SIDE // 4] == 0).all()
    assert np.abs(found[:, -SIDE // 4 :] - 127).max() <= 1


@pytest.mark.parametrize(
    ("picture", "clear"),
    [
        (Image.fromarray(LEVELS), int(LEVELS[3, 3])),
        (Image.fromarray(COLORS), tuple(map(int, COLORS[3, 3]))),
        (
            Image.fromarray((GREY * 65535).astype(np.uint16)),
            int((GREY * 65535).astype(np.uint16)[3, 3]),
        ),
    ],
    ids=["L", "RGB", "I;16"],
)
def test_a_transparent_color_shows_white(picture: Image.Image, clear: Any) -> None:
    image = decode(encoded(picture, transparency=clear), "it")
    found = prepared(image)
    here = np.asarray(picture) == clear
    here = here.all(axis=2) if here.ndim == 3 else here
    assert (found[here] == 255).all()
    assert np.abs(found - prepared(picture))[~here].max() == 0


DEEP: dict[str, tuple[str, Image.Image]] = {
    "16 bits, PNG": ("a.png", Image.fromarray((GREY * 65535).astype(np.uint16))),
    "16 bits, TIFF": ("a.tif", Image.fromarray((GREY * 65535).astype(np.uint16))),
    "16 bits, big-endian": (
        "b.tif",
        Image.fromarray((GREY * 65535).astype(np.uint16).astype(">u2")),
    ),
    "16 bits, PGM": ("a.pgm", Image.fromarray((GREY * 65535).astype(np.uint16))),
    "32 bits": ("c.tif", Image.fromarray(np.int32(GREY * 65535))),
    "floats": ("d.tif", Image.fromarray(np.float32(GREY))),
}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", DEEP)
def test_deep_greys_keep_their_picture(kind: str, mode: str) -> None:
    name, image = DEEP[kind]
    image.save(name)
    for found in (decode(Path(name), name), image):
        assert difference(found, Image.fromarray(LEVELS), mode) < 1
        assert len(np.unique(prepared(found, mode))) >= len(np.unique(LEVELS))


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_each_order_of_bytes_is_known(kind: str) -> None:
    image = Image.fromarray((GREY * 65535).astype(np.uint16))
    if kind != "I;16":
        image = Image.frombytes(kind, image.size, image.convert("I").convert(kind).tobytes())
    assert difference(image, Image.fromarray(LEVELS)) < 1


def tiff(numbers: NDArray[Any], bits: int, photometric: int) -> bytes:
    """A TIFF image of one strip, as instruments write it."""
    height, width = numbers.shape
    data = numbers.tobytes()
    if bits == 12:
        pairs = numbers.reshape(-1, 2).astype(int)
        three = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
        data = np.stack(three, axis=1).astype(np.uint8).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 134)]
    tags += [(277, 1), (278, height), (279, len(data)), (339, 1)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4) + data


def test_tiff_images_of_12_bits_and_of_inverted_greys() -> None:
    for data in (
        tiff((GREY * 4095).astype(np.uint16), 12, 1),
        tiff((GREY * 65535).astype(np.uint16), 16, 1),
        tiff(65535 - (GREY * 65535).astype(np.uint16), 16, 0),
    ):
        assert difference(decode(data, "it"), Image.fromarray(LEVELS)) < 1


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((GREY * 4095).astype(np.uint16), "room for numbers up to 65535 and uses none above 4094"),
        (np.int32(GREY * 255), "room for numbers up to 65535 and uses none above 25"),
        (np.int32(GREY * 70_000), r"whole numbers from \d to 69"),
        (np.int32(GREY * 1000) - 500, "whole numbers from -"),
        (np.float32(GREY * 255), r"floating-point numbers from \S+ to 25"),
        (np.float32(GREY) - 0.5, "floating-point numbers from -0"),
        (np.where(X == 5, np.float32(np.nan), np.float32(GREY)), "floating-point numbers from nan"),
        (np.where(X == 5, np.float32(np.inf), np.float32(GREY)), r"numbers from \S+ to inf"),
    ],
)
def test_numbers_of_unknown_meaning_are_refused_by_name(numbers: Any, said: str) -> None:
    Image.fromarray(numbers).save("deep.tif")
    with pytest.raises(InputError, match=rf"^deep\.tif (has|holds) .*{said}"):
        prepared(decode(Path("deep.tif"), "deep.tif"))
    with pytest.raises(InputError, match=rf"^The image (has|holds) .*{said}"):
        prepared(Image.fromarray(numbers))


def deep_colors(numbers: NDArray[Any], kind: str) -> bytes:
    """A PNG or TIFF file of 16 bits for each color, which Pillow does not write."""
    height, width, bands = numbers.shape
    if kind == "TIFF":
        data = numbers.astype("<u2").tobytes()
        depths = struct.pack("<HHH", 16, 16, 16)
        at = 8 + len(data)
        tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, at), (259, 3, 1, 1)]
        tags += [(262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, height)]
        tags += [(279, 4, 1, len(data))]
        table = b"".join(struct.pack("<HHII", *each) for each in tags)
        head = b"II*\0" + struct.pack("<I", at + len(depths))
        return head + data + depths + struct.pack("<H", len(tags)) + table + bytes(4)

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in numbers)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "PNG with alpha", "PNG of grey and alpha"])
def test_colors_of_16_bits_keep_their_picture_or_are_refused(kind: str) -> None:
    bands = {"PNG with alpha": 4, "PNG of grey and alpha": 2}.get(kind, 3)
    full = np.repeat((GREY * 65535).astype(np.uint16)[..., None], bands, axis=2)
    if bands != 3:
        full[..., -1] = 65535
    image = decode(deep_colors(full, kind), "it")
    assert difference(image, Image.fromarray(LEVELS)) < 1
    dark = full.copy()
    dark[..., : 3 if bands > 2 else 1] //= 16
    with pytest.raises(
        InputError, match=r"^it has room for numbers up to 65535 and uses none above"
    ):
        decode(deep_colors(dark, kind), "it")


def test_signed_numbers_of_8_bits_are_refused() -> None:
    Image.fromarray(LEVELS).save("signed.tif", tiffinfo={339: 2})
    with pytest.raises(InputError, match=r"^signed\.tif holds signed numbers of 8 bits"):
        prepared(decode(Path("signed.tif"), "signed.tif"))


def test_black_is_black_at_any_depth() -> None:
    for kind in (np.uint16, np.int32, np.float32):
        assert not prepared(Image.fromarray(np.zeros((9, 9), kind))).any()


def test_inverted_cmyk_of_a_jpeg() -> None:
    picture = Image.fromarray(COLORS)
    image = decode(encoded(picture.convert("CMYK"), "JPEG", quality=95), "it")
    assert image.mode == "CMYK"
    assert difference(image, picture) < 5


# Orientation, and images of several


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = orientation
    image = Image.fromarray(COLORS[:40])
    if kind == "PNG, last":
        data = encoded(image)
        body = exif.tobytes().removeprefix(b"Exif\0\0")
        check = struct.pack(">I", zlib.crc32(b"eXIf" + body))
        return data[:-12] + struct.pack(">I", len(body)) + b"eXIf" + body + check + data[-12:]
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "PNG, last"])
def test_images_are_turned_if_asked_for(kind: str, orientation: int) -> None:
    data = turned(orientation, kind)
    plain = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(decode(data, "it")), np.asarray(plain))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = decode(data, "it", turn=True)
    assert found.size == ((64, 40) if orientation < 5 else (40, 64))
    assert np.array_equal(np.asarray(found), np.asarray(upright))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_images_the_first_is_taken(kind: str) -> None:
    first, second = (Image.new("RGB", (20, 20), color) for color in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert difference(decode(data, "it"), first) == 0


# As torchvision does


@pytest.mark.parametrize("interpolation", preprocessing.INTERPOLATIONS)
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 36), (64, 64)])
def test_it_is_what_torchvision_makes(size: int, resize: int, interpolation: str) -> None:
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    theirs = transforms.Compose(
        [
            transforms.Resize(resize, InterpolationMode(interpolation)),
            transforms.CenterCrop(size),
        ]
    )
    rng = np.random.default_rng(0)
    ours = Preprocessing(size, "RGB", (0.5,) * 3, (0.5,) * 3, resize, interpolation)
    for width, height in ((500, 375), (375, 500), (301, 300), (40, 1200), (900, 37), (1500, 1001)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for stored in (image, image.convert("CMYK"), image.convert("L")):
            expected = np.asarray(theirs(stored.convert("RGB")))
            assert np.array_equal(ours.pixels(stored), expected), (width, height, stored.mode)


def test_images_in_bands_differ_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.tile(COLORS, (9, 7, 1)))
    for resize in (None, SIDE, 80):
        ways = Preprocessing(SIDE, "RGB", (0.5,) * 3, (0.5,) * 3, resize)
        expected = ways.pixels(picture).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, "MEMORY", 0)
            patch.setattr(colors, "BAND", 3000)
            assert np.abs(ways.pixels(picture) - expected).max() <= 1


def test_thin_images_differ_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((30, 900), (900, 30), (1, 400), (300, 2)):
        line = np.linspace(0, 255, max(shape)).astype(np.uint8)
        line = line[None] if shape[1] > shape[0] else line[:, None]
        picture = Image.fromarray(np.broadcast_to(line, shape).copy())
        for interpolation in preprocessing.INTERPOLATIONS:
            ways = Preprocessing(SIDE, "L", (0.5,), (0.5,), 80, interpolation)
            expected = ways.pixels(picture).astype(int)
            with monkeypatch.context() as patch:
                patch.setattr(preprocessing, "WHOLE", 1)
                assert np.abs(ways.pixels(picture) - expected).max() <= 1


# Memory


MEASURED = """
import sys
from pathlib import Path
from PIL import Image
from opnp.data.decoding import decode
from opnp.data.preprocessing import Preprocessing

def megabytes(name):
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) / 1e3

ways = [Preprocessing(224, "RGB", (0.5,) * 3, (0.5,) * 3, resize) for resize in (256, None)]
for way in ways:
    way.pixels(decode(Path("tiny.png"), "tiny.png"))
idle = megabytes("VmRSS")
for name in sys.argv[1:]:
    for way in ways:
        way.pixels(decode(Path(name), name, turn=True))
    print(name, round(megabytes("VmHWM") - idle))
"""


def test_no_image_within_the_limits_takes_more_than_300_megabytes() -> None:
    Image.new("RGB", (9, 9)).save("tiny.png")
    red = Image.new("RGB", (7000, 7000), "red")
    red.save("square.png", compress_level=1)
    red.convert("CMYK").save("four.jpg")
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = 6
    red.save("turned.jpg", exif=exif)
    Image.new("RGB", (5000, 5000)).save("progressive.jpg", progressive=True)
    Image.new("RGB", (3700, 3700)).save("a.webp", method=0)
    Image.new("RGB", (3200, 3200)).save("a.jp2")
    Image.new("L", (9400, 9500)).save("grey.png", compress_level=1)
    Image.new("F", (7000, 7000), 0.5).save("float.tif")
    Image.new("I;16", (8000, 8000), 30_000).save("deep.png", compress_level=1)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5000, 5000, 3), np.uint8))
    noise.save("noise.tif", compression="tiff_lzw")
    Image.new("RGB", (65_000, 1), "red").save("thin.png")
    Image.new("RGB", (1, 65_000), "red").save("tall.png")
    names = [path.name for path in sorted(Path().iterdir()) if path.name != "tiny.png"]
    # other tests of this process may have told the allocator to keep freed memory; images one after
    # another would then be counted together
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *names],
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = dict(line.split() for line in done.stdout.splitlines())
    assert list(peaks) == names
    assert max(map(int, peaks.values())) <= 300, peaks


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MEMORY", 1_000_000)


@pytest.mark.usefixtures("small_memory")
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size() -> None:
    picture = Image.fromarray(np.tile(COLORS, (10, 10, 1)))  # 640 × 640, 1.6 MB
    whole = decode(encoded(picture.resize((480, 480)), "JPEG"), "it")
    assert whole.size == (480, 480)
    half = decode(encoded(picture, "JPEG", quality=95), "it")
    assert half.size == (320, 320)
    assert difference(half, picture) < 3
    upright = decode(encoded(picture.crop((0, 0, 640, 300)), "JPEG"), "it", turn=True)
    assert upright.size == (640, 300)
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = 6  # turned, it is in memory twice
    data = encoded(picture.crop((0, 0, 640, 300)), "JPEG", exif=exif)
    assert decode(data, "it", turn=True).size == (150, 320)


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize(
    ("kind", "side", "options"),
    [
        ("PNG", 510, {}),
        ("WEBP", 250, {}),
        ("JPEG2000", 230, {}),
        ("TIFF", 360, {"compression": "tiff_lzw", "strip_size": 1 << 30}),
        ("JPEG", 410, {"progressive": True, "subsampling": 0}),
    ],
)
def test_what_would_take_too_much_memory_is_refused_by_its_header(
    kind: str, side: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.new("RGB", (side, side)), kind, **options)
    less = encoded(Image.new("RGB", (side * 9 // 10, side * 9 // 10)), kind, **options)
    decode(less, "it")
    check_header(less, "it")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    for refuse in (decode, check_header):
        with pytest.raises(InputError, match=rf"^it has {side} × {side} pixels, and decoding it"):
            refuse(data, "it")


def test_which_jpegs_are_decoded_row_by_row() -> None:
    picture = Image.fromarray(COLORS)
    for options, expected in (({}, True), ({"progressive": True}, False)):
        data = encoded(picture, "JPEG", **options)
        image = Image.open(io.BytesIO(data))
        assert decoding.in_one_scan(image, io.BytesIO(data)) is expected
    data = encoded(picture, "JPEG")
    scan = data.index(b"\xff\xda")
    one = data[: scan + 4] + b"\1" + data[scan + 5 :]  # a scan of one component of three
    assert not decoding.in_one_scan(Image.open(io.BytesIO(data)), io.BytesIO(one))
    padded = data[:scan] + b"\xff" + data[scan:]
    assert not decoding.in_one_scan(Image.open(io.BytesIO(data)), io.BytesIO(padded))


@pytest.mark.parametrize("size", [(65_536, 1), (1, 70_000)])
def test_a_side_that_is_absurd_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="pixels, more than 65535 on a side"):
        decode(encoded(Image.new("1", size)), "it")
    with pytest.raises(InputError, match="pixels, more than 65535 on a side"):
        prepared(Image.new("1", size))


def test_a_file_of_absurd_length_is_refused(small_memory: None) -> None:
    Path("long.png").write_bytes(encoded(Image.fromarray(COLORS)) + bytes(1_000_000))
    with pytest.raises(InputError, match=r"long\.png is not .*its file has 10\d{5} bytes"):
        decode(Path("long.png"), "long.png")


@pytest.mark.parametrize(("size", "resize"), [(2049, None), (32, 10_000), (10**9, 10**9)])
def test_a_preprocessing_of_absurd_size_is_refused(size: int, resize: int | None) -> None:
    with pytest.raises(InputError, match=r"preprocessing's (size|resize) must be .*2048"):
        Preprocessing(size, "L", (0.5,), (0.5,), resize)


# Faults


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        RecursionError("too deep"),
        OverflowError("too large"),
        SyntaxError("not a PNG file"),
        struct.error("unpack requires a buffer"),
        zlib.error("Error -3"),
        KeyError("tag"),
        IndexError("out of range"),
        AssertionError(),
        EOFError("no more images"),
        UserWarning("odd"),
        OSError(5, "Input/output error"),
    ],
    ids=lambda fault: type(fault).__name__,
)
@pytest.mark.parametrize("at", ["_open", "load", "getexif"])
def test_any_exception_of_a_decoder_is_the_images_fault(
    at: str, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.fromarray(COLORS))

    def fail(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(PngImageFile, at, fail)
    with pytest.raises(InputError, match=r"^a\.png is not a whole image") as error:
        decode(data, "a.png", turn=True)
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)


def test_any_exception_of_the_preprocessing_is_the_images_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("conversion not supported")

    image = decode(encoded(Image.fromarray(COLORS)), "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(InputError, match=r"^a\.png is not .*conversion not supported"):
        prepared(image, "L")


def test_formats_that_run_programs_or_take_any_bytes_are_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    for kind in ("EPS", "TGA", "PCX", "IM"):
        data = encoded(Image.fromarray(COLORS), kind)
        for refuse in (decode, check_header):
            with pytest.raises(InputError, match="is not a whole image of a known format"):
                refuse(data, "a.png")


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a", bytes(100)])
def test_bytes_that_are_no_image(data: bytes) -> None:
    Path("a.png").write_bytes(data)
    for given in (data, Path("a.png")):
        with pytest.raises(InputError, match=r"^a\.png is not a whole image"):
            decode(given, "a.png")


@pytest.mark.parametrize("kind", ["pipe", "folder", "itself", "nowhere", "device", "zero", "long"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str) -> None:
    path = Path("a.png")
    makers: dict[str, Callable[[], Any]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "itself": lambda: path.symlink_to(path),
        "nowhere": lambda: path.symlink_to("absent.png"),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    makers.get(kind, lambda: None)()
    given = {"zero": Path("a\0.png"), "long": Path("a" * 5000)}.get(kind, path)
    with pytest.raises(InputError, match=r"^it is (not a whole image|missing)"):
        decode(given, "it")
