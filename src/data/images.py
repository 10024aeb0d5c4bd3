"""Picture files -> pictures: any mode and any size, upright, transparent parts white."""

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import files
from config import UserError
from data import archives

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
# what PIL raises at files that are damaged; it has no common ancestor
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error)


class ImageError(Exception):
    """A file that cannot be read as a picture; the message says why, without the file's name."""


def read(path: str | Path) -> bytes:
    """The bytes of a file, or of an archive's member. Raises ImageError."""
    try:
        file, member = archives.parted(path)
        return archives.read(file, member) if member else Path(file).read_bytes()
    except UserError as error:
        raise ImageError(f"is in an archive that cannot be read ({error})") from error
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    except IsADirectoryError as error:
        raise ImageError("is a folder") from error
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error


def decode(source: bytes | str | Path) -> "Image":
    """A picture of mode RGB from a file's bytes, or from a path; of several pictures in a file, the first.

    Turned as its EXIF data say; transparent over white; grey of 16 bits by its upper eight. Colour profiles are
    passed over. Raises ImageError; what is cut short is one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    content = source if isinstance(source, bytes) else read(source)
    if not content:
        raise ImageError("is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's of odd metadata, and of half the size that it refuses
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return _opaque(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError as error:
            raise ImageError(f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels: make it "
                             "smaller") from error
        except UnidentifiedImageError as error:
            raise ImageError("cannot be read as a picture (format not recognised)") from error
        except DAMAGED as error:
            raise ImageError(f"cannot be read as a picture ({str(error).rstrip('.') or type(error).__name__})"
                             ) from error


def identity(path: str) -> list[str | int]:
    """What tells whether a picture is still the same; of an archive's member, whether the archive is."""
    return [path, *files.identity(archives.parted(path)[0])[1:]]


def _opaque(image: "Image") -> "Image":
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
