"""Text to speech by espeak-ng, through ctypes; library and voices come from the wheel `espeakng-loader`.

The functions and numbers are those of espeak-ng's `speak_lib.h`. The library keeps the state of its waves in static
variables, which nothing resets: the same text said again gives other samples. So it is loaded again for each text, in
5 ms, and the samples depend on the arguments alone. For processes, not for threads.
"""

import _ctypes
import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback, before the call returns
PHONEME_EVENTS, DONT_EXIT = 0x0001, 0x8000  # options of espeak_Initialize
LIST_TERMINATED, PHONEME = 0, 7  # espeak_EVENT_TYPE
CHARACTERS = 1  # espeak_POSITION_TYPE
UTF8, IPA = 1, 0x02  # espeakCHARS_UTF8; phonememode of espeak_TextToPhonemes
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4  # espeak_PARAMETER
SOFTER, SOFTEST = 40, 20  # percent: at 100 some of the voices are clipped, at 40 some of those with drawn variants
NEEDED = "en_dict", "intonations", "lang", "phondata", "phonindex", "phontab"  # of the data folder, to speak English


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    """espeak_EVENT"""

    _fields_ = [("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("id", _Id)]


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Voice(NamedTuple):
    """`name` is a language, or one with a timbre: en-us, en-gb-scotland+m3. Rate in words a minute; pitch and its range
    from 0 to 99. `variant`: the content of a file of espeak-ng that describes the timbre after the +, where it is none
    of its own."""

    name: str = "en-us"
    rate: int = 175
    pitch: int = 50
    range: int = 50
    variant: str = ""


class Phone(NamedTuple):
    """A sound of speech, or a pause (_, _:), as espeak-ng writes it, "'" before a vowel with stress; and the sample at
    which it begins."""

    name: str
    start: int


class Said(NamedTuple):
    """Samples (N,) int16, their rate, and the sounds in them."""

    samples: "np.ndarray"
    rate: int
    phones: list[Phone]


def ipa(texts: Sequence[str], voice: str = "en-us") -> list[str]:
    """The sounds of each text in the International Phonetic Alphabet, words with single spaces between them. Raises
    ValueError where there is no such voice."""
    library = _load()
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    try:
        _open(library, voice, _own_data())
        return [_sounds(library, text) for text in texts]
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)


def _sounds(library: ctypes.CDLL, text: str) -> str:
    content = ctypes.create_string_buffer(text.encode())
    rest, found = ctypes.c_void_p(ctypes.addressof(content)), list[str]()
    while rest.value:  # a clause at a time
        found.append((library.espeak_TextToPhonemes(ctypes.byref(rest), UTF8, IPA) or b"").decode())
    return " ".join(" ".join(found).replace("_", " ").split())


def say(text: str, voice: Voice = Voice()) -> Said:
    """A text as a voice says it. Raises ValueError where there is no such voice."""
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
    own = _own_data()
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


def _own_data() -> Path:
    import espeakng_loader  # type: ignore[import-untyped]

    return Path(espeakng_loader.get_data_path())


def _load() -> ctypes.CDLL:
    import espeakng_loader

    return ctypes.CDLL(espeakng_loader.get_library_path())


def _open(library: ctypes.CDLL, voice: str, folder: Path) -> int:
    """Begin with a voice; the samples a second."""
    rate: int = library.espeak_Initialize(SYNCHRONOUS, 0, bytes(folder), PHONEME_EVENTS | DONT_EXIT)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng cannot read its voices in {folder}")
    if library.espeak_SetVoiceByName(voice.encode()):
        raise ValueError(f"espeak-ng has no voice {voice!r}")
    return rate


def _said(library: ctypes.CDLL, text: str, voice: Voice, folder: Path) -> Said:
    import numpy as np

    parts, phones = list[np.ndarray](), list[Phone]()

    def take(samples: Any, count: int, events: Any) -> int:
        number = 0
        while (event := events[number]).type != LIST_TERMINATED:
            if event.type == PHONEME:
                phones.append(Phone(event.id.string.decode(), event.sample))
            number += 1
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0  # go on

    callback = CALLBACK(take)  # held here: the library keeps a bare pointer to it
    rate = _open(library, voice.name, folder)
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))
    ctypes.CDLL(None).srand(0)  # breathy voices draw their noise from the C library
    library.espeak_SetSynthCallback(callback)
    volume = SOFTEST if voice.variant else SOFTER
    for parameter, value in ((RATE, voice.rate), (VOLUME, volume), (PITCH, voice.pitch), (RANGE, voice.range)):
        library.espeak_SetParameter(parameter, value, 0)
    data = text.encode() + b"\0"
    if library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, CHARACTERS, 0, UTF8, None, None):
        raise RuntimeError(f"espeak-ng cannot say {text!r}")
    return Said(np.concatenate(parts) if parts else np.zeros(0, np.int16), rate, phones)
