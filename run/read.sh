#!/usr/bin/env bash
# Read lines of text in pictures, with a reader that was trained here.
#
#   ./run/read.sh PICTURE... [OPTIONS]
#
#   PICTURE          PNG, JPEG, WebP, of any size, one line of text each; a folder: all in it; -: one on standard input
#
#   --beam N         search for the likeliest text with N at a time (default 1: the likeliest label at each place)
#   --json           a line of JSON for each picture: text, confidence, and words with theirs
#   --model RUN      a run (its name, the beginning of it, its PID or its folder, also while it trains), a snapshot or a
#                    model folder (default: the newest finished run of run_train_ocr.sh)
#   --device NAME    auto, cpu, cuda, cuda:N or mps (default auto)
#
# Which model reads, and how well it did when it was evaluated, is on standard error, and so is a picture that seems
# to have more than one line. Standard output carries the texts and nothing else: a line each with the text, a tab and
# its confidence; of several pictures the file and a tab before it.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground inference.read "$@"
