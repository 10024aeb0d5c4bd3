#!/usr/bin/env bash
# Say a text, with a talker that was trained here.
#
#   ./run/speak.sh TEXT... --out FILE [OPTIONS]
#
#   TEXT                what to say; -: each line that comes from standard input
#
#   --out FILE, -o      WAV, FLAC, MP3 or OGG, by the name (default: raw sound on standard output while it is spoken:
#                       16 bits, little endian, mono, 16,000 samples a second)
#   --lines FILE        say each line of a text file, with a short silence between
#   --model RUN         a run (its name, the beginning of it, its PID or its folder, also while it trains), a snapshot or
#                       a model folder (default: the newest finished run of run_train_talker.sh)
#   --vocoder RUN       the same of run_train_vocoder.sh; griffin-lim: no trained vocoder (default: the newest finished
#                       run, or griffin-lim where there is none)
#   --voice NAME        a speaker of the training data (default: the first)
#   --rate R            1.2 speaks a fifth faster (default 1)
#   --temperature T     0: the likeliest codes; 1: codes drawn by their probabilities (default 0)
#   --seed N            seed of what is drawn (default 0)
#   --device NAME       auto, cpu, cuda, cuda:N or mps (default auto)
#
# Which model speaks, and which vocoder, is printed on standard error. Numbers, dates, times, amounts and usual
# abbreviations are read out.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground inference.speak "$@"
