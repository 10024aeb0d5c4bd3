#!/usr/bin/env bash
# Say what pictures show, with a vision encoder that was trained here.
#
#   ./run/see.sh PICTURE... [--labels A,B,C | --captions FILE] [OPTIONS]
#
#   PICTURE          PNG, JPEG, WebP, of any size; a folder: all in it; -: one on standard input
#
#   --labels A,B,C   classes to choose from; the model need not know their names from training (default: those that it
#                    was trained with)
#   --template TEXT  the caption of a class, whose name {} stands for (default: as in training)
#   --captions FILE  captions to choose from instead, one a line
#   --top_k N        answers to each picture, the likeliest first (default 1)
#   --tta            answer by the mean embedding of six views of each picture: as it is, moved up and moved down a
#                    little, and the mirror images of these; takes six times as long
#   --json           a line of JSON for each picture: answers with probabilities and cosines
#   --model RUN      a run (its name, the beginning of it, its PID or its folder, also while it trains), a snapshot or a
#                    model folder (default: the newest finished run of run_train_vision.sh)
#   --device NAME    auto, cpu, cuda, cuda:N or mps (default auto)
#
# Which model sees, and how well it did when it was evaluated, is printed on standard error. Standard output carries the
# answers and nothing else: a line each with the answer, a tab and its probability; of several pictures the file and a
# tab before it.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground inference.see "$@"
