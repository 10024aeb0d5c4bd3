"""Picture files: every mode comes out as what it shows, upright; what is damaged is told, whatever is wrong with it."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import archives, images
from data.images import ImageError, decode
from made_pictures import encoded, pixels

GRADIENT = pixels(1)


def shown(content: bytes) -> np.ndarray:
    found = decode(content)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


@pytest.mark.parametrize("kind, options, error", [
    ("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("JPEG", {"quality": 95}, 4),
    ("JPEG", {"quality": 95, "progressive": True}, 4), ("WEBP", {"quality": 95}, 4),
])
def test_each_format(kind: str, options: dict[str, object], error: int) -> None:
    found = shown(encoded(Image.fromarray(GRADIENT), kind, **options))
    assert found.shape == GRADIENT.shape and np.abs(found - GRADIENT).mean() <= error


def test_grey_of_any_depth() -> None:
    grey = GRADIENT[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    assert (shown(encoded(Image.fromarray(grey))) == as_rgb).all()
    sixteen = encoded(Image.fromarray(grey.astype(np.uint16) * 256 + 255))
    assert struct.unpack(">B", sixteen[24:25]) == (16,), "the file has 16 bits a pixel"
    assert (shown(sixteen) == as_rgb).all(), "the upper eight, not those that are left when the rest is cut off"
    assert (shown(encoded(Image.fromarray(grey > 127))) == np.where(as_rgb > 127, 255, 0)).all()


def test_a_palette() -> None:
    indexed = Image.fromarray(GRADIENT).quantize(256)
    assert indexed.mode == "P" and (shown(encoded(indexed)) == np.asarray(indexed.convert("RGB"))).all()


@pytest.mark.parametrize("mode, kind", [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_what_is_transparent_is_white(mode: str, kind: str) -> None:
    colour = GRADIENT if mode == "RGBA" else np.repeat(GRADIENT[..., :1], 3, axis=2)
    alpha = np.linspace(0, 255, GRADIENT.shape[0] * GRADIENT.shape[1]).astype(np.uint8).reshape(GRADIENT.shape[:2])
    image = Image.fromarray(colour).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    found = shown(encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    share = alpha[..., None] / 255
    assert np.abs(found - (share * colour + (1 - share) * 255)).max() <= 1


def test_a_transparent_colour_of_a_palette() -> None:
    indexed = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "L").convert("P")
    indexed.putpalette([200, 10, 10, 10, 10, 200])
    found = shown(encoded(indexed, transparency=0))
    assert (found == [[[255] * 3, [10, 10, 200]], [[10, 10, 200], [255] * 3]]).all()


def test_cmyk() -> None:
    """As printers have it: how much ink, so that none is white."""
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[:, 4:, 0] = 255  # cyan
    found = shown(encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=95))
    assert (found[:, :3] > 245).all() and (found[:, 5:, 0] < 10).all() and (found[:, 5:, 1:] > 245).all()


@pytest.mark.parametrize("orientation, turned", [
    (1, lambda p: p), (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (4, lambda p: p[::-1]),
    (5, lambda p: p.transpose(1, 0, 2)), (6, lambda p: np.rot90(p, -1)), (8, lambda p: np.rot90(p)),
    (7, lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
])
def test_exif_says_how_it_was_held(orientation: int, turned: object) -> None:
    """The table of the EXIF standard, 4.6.4 A: where the first row and the first column are."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = shown(encoded(Image.fromarray(GRADIENT), exif=exif))
    assert (found == turned(GRADIENT)).all()  # type: ignore[operator]


@pytest.mark.parametrize("exif", [
    b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\xff\xff\xff\xff"])
def test_broken_metadata_are_no_reason(exif: bytes) -> None:
    assert shown(encoded(Image.fromarray(GRADIENT), "JPEG", exif=exif)).shape == GRADIENT.shape


def test_of_several_the_first() -> None:
    frames = [Image.fromarray(pixels(seed)) for seed in (0, 1)]
    found = shown(encoded(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]))
    assert (found == pixels(0)).all()


KINDS = {"png": ("PNG", {}), "jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "webp": ("WEBP", {}),
         "lossless": ("WEBP", {"lossless": True}), "gif": ("GIF", {}), "bmp": ("BMP", {})}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short_it_is_refused_or_whole(kind: str) -> None:
    """Wherever it is cut: no picture comes out of which a part is missing."""
    name, options = KINDS[kind]
    content = encoded(Image.fromarray(GRADIENT), name, **options)  # type: ignore[arg-type]
    whole = shown(content)
    refused = 0
    for size in range(len(content)):
        try:
            assert (shown(content[:size]) == whole).all(), size
        except ImageError:
            refused += 1
    assert refused >= len(content) - 25, "the end of a PNG file holds no pixels"


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_damaged_there_is_a_line(kind: str) -> None:
    name, options = KINDS[kind]
    content, draw = encoded(Image.fromarray(GRADIENT), name, **options), random.Random(kind)  # type: ignore[arg-type]
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 3, 20])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            decode(bytes(damaged))
        except ImageError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_an_attack_is_not_opened() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    bomb = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match="has more than 179 million pixels: make it smaller"):
        decode(bomb)


def test_mistakes_say_why(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "real.tif")
    for name, why in {"none.png": "there is no such file", "empty.png": "is empty", ".": "is a folder",
                      "text.png": r"cannot be read as a picture \(format not recognised\)",
                      "real.tif": r"cannot be read as a picture \(its values have no known range\)",
                      "text.png/below.png": r"cannot be read \(Not a directory\)"}.items():
        with pytest.raises(ImageError, match=f"^{why}$"):
            decode(tmp_path / name)


def test_members_of_archives_are_files_too(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(GRADIENT))
    with open(tmp_path / "a.tar", "wb") as file:
        archives.write(file, [("in/a.png", content), ("last.png", content)])
    assert images.read(tmp_path / "a.tar!in/a.png") == images.read(f"{tmp_path}/a.tar!./in/a.png") == content
    assert (np.asarray(decode(f"{tmp_path}/a.tar!in/a.png")) == GRADIENT).all()
    before = images.identity(f"{tmp_path}/a.tar!in/a.png")
    assert before[0] == f"{tmp_path}/a.tar!in/a.png" and before[1] == (tmp_path / "a.tar").stat().st_size
    with pytest.raises(ImageError, match="there is no such file"):
        images.read(tmp_path / "a.tar!b.png")
    with pytest.raises(ImageError, match="there is no such file"):
        images.read(tmp_path / "b.tar!a.png")
    with open(tmp_path / "a.tar", "r+b") as file:
        file.truncate(file.seek(0, io.SEEK_END) - 1024 - len(content) // 2)
    with pytest.raises(ImageError, match=r"is in an archive that cannot be read \(.*a\.tar: cannot be read as a TAR"):
        images.read(tmp_path / "a.tar!last.png")
