"""Typefaces that lines are drawn in: of installed packages, never the machine's own, so that they are alike everywhere.

DejaVu, STIX and Computer Modern come with matplotlib, Aileron and a bitmap of Courier with Pillow, the others with
pymupdf-fonts; all of them are free. A family is kept together: who learnt to read its one face has seen its others.
"""

import importlib
import importlib.metadata
import importlib.util
import io
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

PACKAGES = {"pillow": "PIL", "matplotlib": "matplotlib", "pymupdf-fonts": "pymupdf_fonts"}  # as installed, as imported
STYLES = ("", "-Bold", "-Oblique", "-BoldOblique")
FAMILIES = {
    "DejaVu Sans": tuple(f"matplotlib/DejaVuSans{style}" for style in STYLES),
    "DejaVu Sans Mono": tuple(f"matplotlib/DejaVuSansMono{style}" for style in STYLES),
    "DejaVu Serif": tuple(f"matplotlib/DejaVuSerif{style.replace('Oblique', 'Italic')}" for style in STYLES),
    "STIX": tuple(f"matplotlib/STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    "Computer Modern": tuple(f"matplotlib/{face}" for face in ("cmr10", "cmb10", "cmss10", "cmtt10")),
    "Aileron": ("PIL/Aileron",),
    "Courier": ("PIL/Courier",),
    **{name: tuple(f"pymupdf_fonts/{stem}_{style}" for stem in stems for style in styles)
       for name, stems, styles in (
           ("Noto Sans", ("NotoSans",), ("Regular", "Bold", "Italic", "BoldItalic")),
           ("Space Mono", ("SpaceMono",), ("Regular", "Bold", "Italic", "BoldItalic")),
           ("Cascadia Mono", ("CascadiaMono",), ("Regular", "Bold", "Italic", "BoldItalic")),
           ("Ubuntu", ("Ubuntu", "UbuntuMono"), ("Regular", "Bold", "Italic", "BoldItalic")),
           ("Fira", ("FiraGO", "FiraMono"), ("Regular", "Bold")))},
}
BITMAP = "PIL/Courier"  # the one face that has a size of its own
TEX = ("matplotlib/cmr10", "matplotlib/cmb10", "matplotlib/cmss10")
NOT_IN_TEX = frozenset('"<>\\^_`{|}~')  # these faces have other signs in their places


def missing() -> list[str]:
    """Packages that typefaces are taken from and that are not installed, one line each."""
    return [f"--dataset lines is drawn with {name}, which is not installed; install it: pip install {name}"
            for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]


def versions() -> list[str]:
    return [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]


def has(face: str, text: str) -> bool:
    """Whether a face has the signs of a text, which is ASCII."""
    return face not in TEX or not NOT_IN_TEX & set(text)


@lru_cache(maxsize=512)
def opened(face: str, size: int) -> "FreeTypeFont | ImageFont":
    """A face in a size, in pixels to the em; the bitmap as it is."""
    from PIL import ImageFont

    if face == BITMAP:
        return ImageFont.load_default_imagefont()
    if face == "PIL/Aileron":
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.truetype(_source(face), size, layout_engine=ImageFont.Layout.BASIC)  # Raqm is not everywhere


def _source(face: str) -> str | io.BytesIO:
    package, name = face.split("/")
    if package == "matplotlib":
        return str(_folder() / f"{name}.ttf")
    return io.BytesIO(importlib.import_module(f"{package}.{name}").fontbuffer)


@cache
def _folder() -> Path:
    """Without importing matplotlib, which takes a second."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf"
