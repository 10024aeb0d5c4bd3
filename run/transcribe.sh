#!/usr/bin/env bash
# Write down what is said in sound files, with an audio encoder that was trained here.
#
#   ./run/transcribe.sh FILE... [OPTIONS]
#
#   FILE                   WAV, FLAC, OGG, MP3, up to 24 hours; a folder: all in it; -: one on standard input
#
#   --model RUN            a run (its name, the beginning of it, its PID or its folder, also while it trains), a snapshot or
#                          a model folder (default: the newest finished run of run_train_audio_enc.sh)
#   --json                 a line of JSON for each file: text, confidence, words with their times in seconds, notes
#   --srt, --vtt           subtitles (SubRip, WebVTT); of several files, each beside its recording as NAME.srt
#   --lm RUN               search with a language model, too: a run of run_train_lm.sh or run_train_text.sh, a snapshot or a
#                          model folder
#   --lm_weight W          log p of the recognizer + W * log p of the language model + B * words is the score of a text
#   --lm_bonus B           (default 0.5 and 1; evaluate.sh RUN --lm finds better ones)
#   --beam N               search for the likeliest text with N at a time (default 1: the likeliest label of each frame;
#                          with --lm 16)
#   --cut HOW              how a recording longer than a window is heard: pauses (default): cut where it is quiet; silero:
#                          cut where the package silero-vad hears no speech; windows: in windows that overlap
#   --window_seconds S     length of a window (default 10)
#   --overlap_seconds S    by which windows overlap (default 2)
#   --device NAME          auto, cpu, cuda, cuda:N or mps (default auto)
#
# Which model hears, how well it did when it was evaluated, and what is odd about a recording (silent, clipped, nothing
# recognized, ...) is printed on standard error. Standard output carries the
# transcripts and nothing else: of one file its text, of several a line each, the file and a tab before it.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground inference.transcribe "$@"
