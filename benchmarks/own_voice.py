"""Word error rates on new speech after training on so many minutes of it.

    python benchmarks/own_voice.py DATA FOLDER [--model RUN] [--minutes 0 3 6 12 24] [--lm RUN] [-- OPTIONS]

DATA is what `--dataset` takes. A part of its people, or of its texts where one person speaks, is the test set, and a
smaller one the validation set, by which the best step and the language model's weight are chosen. Of the rest as many
minutes are trained on as are asked for, from the weights of --model or, without it, from nothing, by the stage's own
script with the OPTIONS of train_audio_enc.py. Printed are the words and characters of the test set that are wrong,
with a language model also those that are wrong with it. 0 minutes: the model as it is, the weight chosen on its own
validation set. Each digit is written as a word, since it is said as one, and texts with longer numbers are left out.

Runs stay in FOLDER; an interrupted measurement is resumed.
"""

import argparse
import csv
import random
import re
import sys
from pathlib import Path

from recognizers import arguments, evaluated, trained  # noqa: I001  finds the packages of src/

from stoker.data.speech import audio, recordings
from stoker.data.speech.recordings import Utterance
from stoker.data.splits import SPLITS
from stoker.data.text.sentences import DIGITS

TEST, VALIDATION = 0.15, 0.05  # shares of the people, or of the texts
SEED = 19


def read(data: str) -> list[Utterance]:
    """All rows that can be read, with digits as words."""
    found = []
    for _, row in recordings.listed(data):
        text = re.sub(r"\b\d\b", lambda digit: DIGITS[int(digit[0])], recordings.normalised(row.text))
        if re.search(r"\d", text):
            continue
        try:
            found.append(Utterance(row.path, text, row.seconds or audio.seconds(row.path), row.speaker))
        except audio.AudioError as error:
            print(f"{row.path} {error}: left out", file=sys.stderr)
    return found


def parted(rows: list[Utterance]) -> dict[str, list[Utterance]]:
    """Splits without a person, or else a text, in two of them, each in random order. Ends the program where there are
    too few."""
    several = len({row.speaker for row in rows}) > 1
    groups = sorted({row.speaker if several else row.text for row in rows})
    random.Random(SEED).shuffle(groups)
    if len(groups) < len(SPLITS):
        sys.exit(f"{len(groups)} different {'speakers' if several else 'texts'} in recordings that can be used, "
                 f"{len(SPLITS)} are needed: one for each split")
    test = max(1, round(TEST * len(groups)))
    validation = max(test + 1, round((TEST + VALIDATION) * len(groups)))
    split_of = {group: "test" if place < test else "validation" if place < validation else "train"
                for place, group in enumerate(groups)}
    splits: dict[str, list[Utterance]] = {"train": [], "validation": [], "test": []}
    for row in random.Random(SEED).sample(rows, len(rows)):
        splits[split_of[row.speaker if several else row.text]].append(row)
    return splits


def first_minutes(rows: list[Utterance], minutes: float) -> list[Utterance]:
    found = list[Utterance]()
    for row in rows:
        if minutes_of(found) >= minutes:
            break
        found.append(row)
    return found


def write(path: Path, splits: dict[str, list[Utterance]]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio_path", "transcription", "speaker", "split"])
        for split, rows in splits.items():
            table.writerows([row.path, row.text, row.speaker, split] for row in rows)


def minutes_of(rows: list[Utterance]) -> float:
    return sum(row.seconds for row in rows) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--minutes", nargs="+", type=float, default=[0, 3, 6, 12, 24])
    parser.add_argument("--lm", default="")
    asked, options = arguments(parser)
    asked.folder.mkdir(parents=True, exist_ok=True)
    splits = parted(read(asked.data))
    print(f"Test set: {len(splits['test'])} recordings, {minutes_of(splits['test']):.1f} minutes")
    for minutes in asked.minutes:
        train = first_minutes(splits["train"], minutes)
        data, model = asked.folder / f"{minutes:g}_minutes.csv", asked.model
        write(data, splits | {"train": train or splits["train"]})  # a table without training rows is refused
        if minutes:
            run = asked.folder / f"{minutes:g}_minutes_{'from_model' if asked.model else 'from_nothing'}"
            trained(run, ["--dataset", str(data), *(["--init_from", model] if model else []), *options])
            model = str(run)
        elif not model:
            continue
        with_lm = ["--lm", asked.lm] if asked.lm else []
        found = evaluated(model, "--dataset", str(data), "--split", "test", *with_lm)
        more = f"; with the language model {found['lm_wer']:6.1%}, {found['lm_cer']:6.1%}" if asked.lm else ""
        print(f"{minutes_of(train):5.1f} minutes: words {found['wer']:6.1%}, characters {found['cer']:6.1%}{more}",
              flush=True)


if __name__ == "__main__":
    main()
