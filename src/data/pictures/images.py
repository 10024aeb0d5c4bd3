"""Picture files -> pictures: any mode and any size, upright, transparent parts white."""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import files
from stoker.config import UserError
from stoker.data.sources import archives

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pillow tries no others: some of the seventy that it knows start other programs, such as Ghostscript for PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# What is above these bounds is refused before it is decoded, so that one hostile file cannot take the machine's memory:
PIXELS = 50_000_000  # an A4 page at 600 dots per inch has 35 million, a telephone's camera up to 50; 3 to 4 bytes each
BYTES = 250_000_000  # of a file: so many pixels, not compressed, with all that may stand beside them
ASPECT = 1000  # the longer side by the shorter: resized to a line's height, a picture 1 pixel high would become endless
SCANS = 200  # of a JPEG file: each goes over all pixels; a progressive one has about ten
AT_ONCE = 2**20  # pixels that are converted at a time
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # JPEG markers: those followed by a length, and the end
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
# what PIL raises at files that are damaged; it has no common ancestor
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error)


class ImageError(Exception):
    """A file that cannot be read as a picture; the message says why, without the file's name."""


def read(path: str | Path) -> bytes:
    """The bytes of a regular file, or of an archive's member. Raises ImageError."""
    try:
        file, member = archives.parted(path)
        return archives.read(file, member, most=BYTES) if member else files.read(file, most=BYTES)
    except UserError as error:
        raise ImageError(f"is in an archive that cannot be read ({error})") from error
    except OSError as error:
        raise ImageError(files.reason(error)) from error


def decode(source: bytes | str | Path) -> "Image":
    """A picture of mode RGB from a file's bytes, or from a path; of several pictures in a file, the first.

    Turned as its EXIF data say; transparent over white; grey of 16 bits by its upper eight. Colour profiles are
    passed over. Raises ImageError, also for a file that is cut short or above the bounds PIXELS, BYTES, ASPECT
    and SCANS.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    content = source if isinstance(source, bytes) else read(source)
    _refuse_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's of odd metadata, and of half the size that it refuses
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _refuse_size(*image.size)
                ImageOps.exif_transpose(image, in_place=True)
                return _opaque(image)
        except Image.DecompressionBombError as error:
            raise _too_large() from error
        except UnidentifiedImageError as error:
            raise ImageError(f"cannot be read as a picture (it is none of {', '.join(FORMATS)})") from error
        except DAMAGED as error:
            raise ImageError(f"cannot be read as a picture ({str(error).rstrip('.') or type(error).__name__})"
                             ) from error


def pixels(source: bytes | str | Path) -> "np.ndarray":
    """(3, H, W) uint8 of what `decode` gives, with little more than both of them in memory. Raises ImageError."""
    import numpy as np

    image = decode(source)
    found = np.empty((3, image.height, image.width), np.uint8)
    for part, box in _parts(image):
        found[:, box[1]:box[3]] = np.asarray(part).transpose(2, 0, 1)
    return found


def identity(path: str) -> list[str | int]:
    """What tells whether a picture is still the same; of an archive's member, whether the archive is."""
    return [path, *files.identity(archives.parted(path)[0])[1:]]


def _refuse_bytes(content: bytes) -> None:
    if not content:
        raise ImageError("is empty")
    if len(content) > BYTES:
        raise ImageError(f"has more than {BYTES / 1e6:,.0f} million bytes: make it smaller")
    if content.startswith(b"\xff\xd8") and _scans(content) > SCANS:
        raise ImageError(f"is a JPEG file of more than {SCANS} scans, which would take too long: save it again")


def _scans(content: bytes) -> int:
    """Of the first picture in a JPEG file (ITU-T T.81, B.1.1)."""
    place, scans = 2, 0
    while (marker := MARKER.search(content, place)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(content[marker.end():marker.end() + 2])
    return scans


def _refuse_size(width: int, height: int) -> None:
    if width * height > PIXELS:
        raise _too_large()
    if max(width, height) > ASPECT * min(width, height):
        raise ImageError(f"has {height:,} x {width:,} pixels: the longer side may be {ASPECT:,} times the shorter "
                         "at most")


def _too_large() -> ImageError:
    return ImageError(f"has more than {PIXELS / 1e6:.0f} million pixels: make it smaller")


def _opaque(image: "Image") -> "Image":
    """Any mode -> RGB, a few rows at a time, so that only the two pictures take much memory."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    opaque = Image.new("RGB", image.size)
    for part, box in _parts(image):
        opaque.paste(_converted(part), box)
    return opaque


def _parts(image: "Image") -> "Iterator[tuple[Image, tuple[int, int, int, int]]]":
    """A few rows of a picture at a time, and their box in it."""
    rows = max(1, AT_ONCE // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield image.crop(box), box


def _converted(image: "Image") -> "Image":
    """Any mode -> RGB."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its values have no known range")
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
