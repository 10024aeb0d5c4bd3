#!/usr/bin/env bash
# Train a talker to say texts, with its codec of speech, in the background; you may close the terminal.
#
#   ./run/run_train_talker.sh [OPTIONS] [-- any option of src/training/train_talker.py]
#
#   --preset NAME               nano, tiny, small or medium (default: none, see train_talker.py --help)
#   --dataset NAME              spoken-voice (one voice), spoken-voices (eight), said here by espeak-ng; a CSV file of
#                               audio_path,transcription, or a folder of sound files (default spoken-voice)
#   --voices N                  voices to learn, one for each speaker of the data (default 1)
#   --spelling HOW              letters or phones (default letters)
#   --codec_ckpt RUN            take the codec of another talker, and do not train it
#   --judge RUN                 the audio encoder that transcribes what is said, newest, or none (default newest)
#   --epochs N                  passes through the data (default 20)
#   --batch_size N              recordings in a batch (default 32)
#   --lr RATE                   peak learning rate (default 3e-4)
#   --warmup STEPS              steps of warm-up (default 1000, at most a tenth of the run)
#   --snapshot N                steps between snapshots, 0: each epoch and every 10 minutes only (default 10000)
#   --monitor_interval N        steps between measurements of gradients and weights (default 100)
#   --sanity_check_interval N   steps between checks for NaN and Inf, 0: off (default 10000)
#   --resume [RUN]              resume a run; without RUN the newest unfinished one
#   --yes                       do not ask for confirmation
#   --foreground                train in this terminal
#   --explain, --info           print a short guide; the whole guide, with size, memory and time of this model
#   --print_config              print all options as JSON, with presets and defaults filled in
#   --help                      print this page
#
# In a short run, intervals that you do not set are reduced so that each fires at least 20 times.
# Prints the name, the PID and the log of the run, and the commands to follow, list, stop and view it; returns when
# training has begun or has failed.
# All options:  .venv/bin/python src/training/train_talker.py --help

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

train train_talker.py "$@"
