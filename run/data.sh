#!/usr/bin/env bash
# Fetch, check and measure data.
#
#   ./run/data.sh check DATA [OPTIONS]
#   ./run/data.sh mel_lengths [--csv] DATA [--talker]
#   ./run/data.sh download (--dataset NAME | --modality NAME | --repository NAME --out FOLDER) [OPTIONS]
#   ./run/data.sh strings DATA FOLDER [OPTIONS]
#
#   DATA   speech: a CSV file (audio_path,transcription or wav,text), a folder of sound files with their texts, or
#          spoken, spoken-digits, spoken-pydocs, librispeech-100, librispeech-460, librispeech-960
#          pictures: a CSV file (image,label or image,text), an annotations.json, a folder or TAR archive of pictures by
#          class or with a text file each, or scenes, digits, lines, coco-captions, mjsynth
#
# check decodes every file and names the rows that cannot be trained on: unreadable, silent or blank, without text, too
# long or too large, or too short for their text. It prints sizes, what training and validation share, and, for lines to
# read (--modality ocr), which characters of validation never occur in training. Exit code 1 where a row is refused.
#
#   --modality NAME        audio_asr, image or ocr, where the files do not show it (a picture with a text: image)
#   --held_out A,B         speakers, or groups of pictures, to validate on
#   --valid_share X        pictures: share to validate on where no split is named (default 0.05)
#   --group_by REGEX       pictures: what it, or its first group, matches in a path is a group, such as a document
#   --shared_texts         allow training texts that validation has too (default for pictures; --no_shared_texts)
#   --max_text_length N    longest text, in characters (default 256; of descriptions, any)
#   --max_mel_length N     longest recording, in frames of 10 ms (default 2048)
#   --downsample_time N    frames of 10 ms to one of the model: 2, 4 or 8 (default 4)
#   --head_frames N        frames of the model's head to one of the model (default 2; a model of BPE tokens has 1)
#   --min_side N           fewest pixels of a picture's shorter side (default 2)
#   --max_side N           most pixels of a picture's longer side (default: any)
#   --image_height N       lines: pixels that one is high to a reader (default 32)
#   --max_width N          lines: widest one, in pixels at that height (default 1024)
#
# mel_lengths prints percentiles of the lengths in frames, and which --max_mel_length they recommend.
#
#   --talker               in the talker's frames, 12.5 a second
#
# download fetches from the Hugging Face hub, once; after an interruption, the same command continues.
#
#   --dataset NAME         librispeech-100, librispeech-460, librispeech-960, coco-captions, mjsynth, wikitext,
#                          wikitext-103; for short: ./run/data.sh NAME
#   --modality NAME        text (wikitext), audio_asr (librispeech-100), image (coco-captions) or ocr (mjsynth)
#   --max_samples N        most rows of each of its parts; a larger number continues the download (default: all)
#   --repository NAME      any other data set with sounds or pictures: USER/NAME of the hub, or a folder in its form
#   --config_name NAME     which of its configurations
#   --out FOLDER           where to; its manifest.csv is what --dataset takes
#
# strings makes strings of words, such as numbers, out of recordings of single words, each by one speaker.
#
#   --count N              strings of each speaker (default 1000)
#   --longest N            most words in a string (default 7)
#   --pause X              longest silence between two words, in seconds (default 0.1)
#   --seed N               the same seed makes the same strings

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground data "$@"
