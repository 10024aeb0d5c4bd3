"""Picture files: every mode comes out as what it shows, upright; what is damaged is told, whatever is wrong with it."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from made_pictures import encoded, pixels
from stoker.data.pictures import images
from stoker.data.pictures.images import ImageError, decode
from stoker.data.sources import archives

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


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, colour: int = 2, extra: bytes = b"") -> bytes:
    """One that claims a size and has no pixels: whoever decodes it before looking at the size says that it is cut."""
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b""))


def gif(width: int, height: int) -> bytes:
    content = bytearray(encoded(Image.new("P", (9, 9)), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def scans(count: int) -> bytes:
    """A progressive JPEG file whose last scan comes so often: each goes over all pixels again."""
    content = encoded(Image.fromarray(GRADIENT), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


ZEROS = zlib.compress(bytes(3_000_000))
LARGE = "has more than 50 million pixels: make it smaller"


@pytest.mark.parametrize("content, why", [
    (png(13_000, 13_000), LARGE), (png(50_000, 50_000), LARGE), (gif(65_535, 65_535), LARGE),
    (png(7_100, 7_100, 3, chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", b"\0")), LARGE),
    (png(50_000, 1), "has 1 x 50,000 pixels: the longer side may be 1,000 times the shorter at most"),
    (png(9, 9, extra=chunk(b"iCCP", b"a\0\0" + ZEROS)), "cannot be read as a picture (Decompressed data too large"),
    (png(9, 9, extra=chunk(b"zTXt", b"a\0\0" + ZEROS)), "cannot be read as a picture (Decompressed data too large"),
    (scans(300), "is a JPEG file of more than 200 scans, which would take too long: save it again")],
    ids="large larger gif palette thread iccp ztxt scans".split())
def test_a_hostile_file_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(content)
    assert str(caught.value).startswith(why)


def test_postscript_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho started >> {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # where it was found the last time
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="it is none of PNG, JPEG, WEBP, BMP, GIF, TIFF"):
        decode(tmp_path / "x.png")
    assert not (tmp_path / "started").exists()


def test_a_file_may_have_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.fromarray(GRADIENT))
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "a.tar").write_bytes(archives.entry("a.png", content) + archives.END)
    monkeypatch.setattr(images, "BYTES", len(content) - 1)
    for path in (tmp_path / "a.png", tmp_path / "a.tar!a.png"):
        with pytest.raises(ImageError, match=rf"cannot be read \(it has {len(content):,} bytes, more than"):
            decode(path)
    with pytest.raises(ImageError, match="has more than 0 million bytes: make it smaller"):
        decode(content)
    monkeypatch.setattr(images, "BYTES", len(content))
    assert decode(tmp_path / "a.png").size == decode(tmp_path / "a.tar!a.png").size == decode(content).size


def test_scans_are_those_of_the_picture_itself() -> None:
    """Not of the small one in its metadata, and not what stands behind its end, as in a photograph that moves."""
    plain, progressive = (encoded(Image.fromarray(GRADIENT), "JPEG", progressive=kind) for kind in (False, True))
    assert images._scans(plain) == 1 and images._scans(progressive) == 10  # libjpeg's own script
    assert images._scans(scans(7)) == 16 and shown(scans(2)).shape == GRADIENT.shape
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(progressive)) + progressive
    assert images._scans(plain[:2] + thumbnail + plain[2:] + bytes(2) + progressive) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_converted_in_parts_it_is_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(GRADIENT).convert("RGB" if mode in ("PA", "I;16") else mode)
    if mode == "I;16":
        image = Image.fromarray(GRADIENT[..., 0].astype(np.uint16) * 200)
    elif "A" in mode:
        image = image.convert("L").convert(mode) if mode == "PA" else image
        image.putalpha(Image.fromarray(GRADIENT[..., 1]))
    whole = np.asarray(images._opaque(image))
    content = encoded(Image.fromarray(GRADIENT))
    pixels = images.pixels(content)
    assert whole.shape == GRADIENT.shape and (pixels == np.asarray(decode(content)).transpose(2, 0, 1)).all()
    monkeypatch.setattr(images, "AT_ONCE", 5 * image.width + 3)
    assert (np.asarray(images._opaque(image)) == whole).all() and (images.pixels(content) == pixels).all()


def test_mistakes_say_why(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "real.tif")
    for name, why in {"none.png": "there is no such file", "empty.png": "is empty", ".": "is a folder",
                      "text.png": r"cannot be read as a picture \(it is none of PNG, JPEG, WEBP, BMP, GIF, TIFF\)",
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
