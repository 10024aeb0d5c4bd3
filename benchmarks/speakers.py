"""Word error rates on speakers that were not trained on: each speaker, or each group of them, held out in turn.

    python benchmarks/speakers.py DATA [--folds N] [--jobs N] [--folder FOLDER] [-- OPTIONS of train_audio_enc.py]

DATA is a CSV file or a folder of recordings with speakers. Without --folds each speaker is a fold. A run is made for
each fold, by the stage's own script with the options given and `--held_out` of its speakers. The evaluation of the last
step counts: the best step was chosen on the same speakers. Runs stay in a folder that is named; an interrupted
measurement is resumed.
"""

import argparse
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recognizers import arguments, trained  # noqa: I001  finds the packages of src/

from stoker.data.speech import recordings


def balanced_folds(speakers: Counter[str], folds: int) -> list[list[str]]:
    """Groups of about as many recordings each."""
    groups: list[list[str]] = [[] for _ in range(folds)]
    for speaker, _ in speakers.most_common():
        min(groups, key=lambda group: sum(speakers[name] for name in group)).append(speaker)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    asked, options = arguments(parser)
    speakers = Counter(each.speaker for _, each in recordings.listed(asked.data))
    if "" in speakers:
        sys.exit(f"{asked.data} does not say who speaks in {speakers['']:,} recordings: add a column `speaker`")
    groups = balanced_folds(speakers, asked.folds or len(speakers))
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="speakers"))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(asked.jobs) as pool:
        found = list(pool.map(lambda i: trained(folder / f"fold_{i}", ["--dataset", asked.data, "--held_out",
                                                                       ",".join(groups[i]), *options]),
                              range(len(groups))))
    for group, row in zip(groups, found):
        named = ", ".join(group) if len(group) < 4 else f"{len(group)} speakers"
        print(f"{named:24s} WER {row['eval/wer']:6.1%}   CER {row['eval/cer']:6.1%}   step {row['step']}")
    mean = {name: sum(row[f"eval/{name}"] for row in found) / len(found) for name in ("wer", "cer")}
    print(f"{'mean':24s} WER {mean['wer']:6.1%}   CER {mean['cer']:6.1%}   runs in {folder}")


if __name__ == "__main__":
    main()
