"""Data sets by name, and the columns of tables by what people call them."""

SPOKEN = ("spoken", "spoken-digits", "spoken-pydocs", "spoken-voice", "spoken-voices")  # speech that is made here
LIBRISPEECH = ("librispeech-100", "librispeech-460", "librispeech-960")
DRAWN = ("scenes", "digits", "lines")  # pictures that are made here, or embedded
HUB_PICTURES = ("coco-captions", "mjsynth")

RECORDINGS = {
    "path": ("audio_path", "wav", "audio", "path", "file", "audio_filepath", "file_name", "filename"),
    "text": ("transcription", "text", "transcript", "sentence"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "split": ("split",),
    "seconds": ("seconds", "duration"),
}
PICTURES = {
    "path": ("image", "image_path", "file_name", "filename", "path", "file"),
    "text": ("text", "caption", "transcription", "sentence"),
    "label": ("label", "class", "category"),
    "group": ("group", "document"),
    "split": ("split",),
}
