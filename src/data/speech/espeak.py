"""Text to speech by espeak-ng, through ctypes; library and voices come from the wheel `espeakng-loader`.

The functions and numbers are those of espeak-ng's `speak_lib.h`. The library keeps the state of its waves in static
variables, which nothing resets: the same text said again gives other samples. So it is loaded again for each text, in
5 ms, and the samples depend on the arguments alone. For processes, not for threads.
"""

import _ctypes
import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback, before the call returns
DONT_EXIT = 0x8000
CHARACTERS = 1  # espeak_POSITION_TYPE
UTF8 = 1
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4  # espeak_PARAMETER
SOFTER, SOFTEST = 40, 20  # percent: at 100 some of the voices are clipped, at 40 some of those with drawn variants
NEEDED = "en_dict", "intonations", "lang", "phondata", "phonindex", "phontab"  # of the data folder, to speak English
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Voice(NamedTuple):
    """`name` is a language, or one with a timbre: en-us, en-gb-scotland+m3. Rate in words a minute; pitch and its range
    from 0 to 99. `variant`: the content of a file of espeak-ng that describes the timbre after the +, where it is none
    of its own."""

    name: str = "en-us"
    rate: int = 175
    pitch: int = 50
    range: int = 50
    variant: str = ""


def say(text: str, voice: Voice = Voice()) -> tuple["np.ndarray", int]:
    """A text's samples, (N,) int16, and their rate. Raises ValueError where there is no such voice."""
    library = _load()
    try:
        with _data(voice) as folder:
            return _said(library, text, voice, folder)
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)


@contextmanager
def _data(voice: Voice) -> Iterator[Path]:
    """espeak-ng's data folder; for a voice with a variant, a temporary one that has it too."""
    import espeakng_loader  # type: ignore[import-untyped]

    own = Path(espeakng_loader.get_data_path())
    if not voice.variant:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix="voice.") as folder:
        for name in NEEDED:
            (Path(folder) / name).symlink_to(own / name)
        variants = Path(folder) / "voices" / "!v"
        variants.mkdir(parents=True)
        (variants / voice.name.partition("+")[2]).write_text(voice.variant)
        yield Path(folder)


def _load() -> ctypes.CDLL:
    import espeakng_loader

    return ctypes.CDLL(espeakng_loader.get_library_path())


def _said(library: ctypes.CDLL, text: str, voice: Voice, folder: Path) -> tuple["np.ndarray", int]:
    import numpy as np

    parts: list[np.ndarray] = []

    def take(samples: Any, count: int, events: object) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0  # go on

    callback = CALLBACK(take)  # held here: the library keeps a bare pointer to it
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, bytes(folder), DONT_EXIT)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng cannot read its voices in {folder}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))
    ctypes.CDLL(None).srand(0)  # breathy voices draw their noise from the C library
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.name.encode()):
        raise ValueError(f"espeak-ng has no voice {voice.name!r}")
    volume = SOFTEST if voice.variant else SOFTER
    for parameter, value in ((RATE, voice.rate), (VOLUME, volume), (PITCH, voice.pitch), (RANGE, voice.range)):
        library.espeak_SetParameter(parameter, value, 0)
    data = text.encode() + b"\0"
    if library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, CHARACTERS, 0, UTF8, None, None):
        raise RuntimeError(f"espeak-ng cannot say {text!r}")
    return (np.concatenate(parts) if parts else np.zeros(0, np.int16)), rate
