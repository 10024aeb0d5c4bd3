"""Word error rates on speakers that were not trained on: each speaker, or each group of them, held out in turn.

    python benchmarks/speakers.py DATA [--folds N] [--jobs N] [--folder FOLDER] [-- OPTIONS of train_audio_enc.py]

DATA is a CSV file or a folder of recordings with speakers. Without --folds each speaker is a fold. A run is made for
each fold, by the stage's own script with the options given and `--held_out` of its speakers. What counts is the
evaluation of the last step: the best one was chosen by what it is judged by. In a folder that is named, runs stay, and
a measurement that was interrupted goes on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "src/training/train_audio_enc.py"
sys.path.insert(0, str(SCRIPT.parents[1]))

from stoker.daemon.rundir import RunDir  # noqa: E402
from stoker.data.speech import recordings  # noqa: E402


def dealt(speakers: Counter[str], folds: int) -> list[list[str]]:
    """Groups of about as many recordings each."""
    groups: list[list[str]] = [[] for _ in range(folds)]
    for speaker, _ in speakers.most_common():
        min(groups, key=lambda group: sum(speakers[name] for name in group)).append(speaker)
    return groups


def trained(folder: Path, data: str, held_out: list[str], options: list[str]) -> dict[str, float]:
    """The last evaluation of a run. Raises CalledProcessError."""
    run = RunDir(folder)
    going_on = ["--resume", str(folder)] if run.status_file.exists() else [
        "--dataset", data, "--held_out", ",".join(held_out), "--result_dir", str(folder.parent), "--run_name",
        folder.name, *options]
    if not run.status_file.exists() or run.status().state != "finished":
        with open(folder.with_suffix(".log"), "a") as log:
            subprocess.run([sys.executable, str(SCRIPT), *going_on, "--yes"], check=True, stdout=log, stderr=log)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return next(row for row in reversed(rows) if "eval/wer" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    own, options = (sys.argv[1:], []) if "--" not in sys.argv else (
        sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:])
    asked = parser.parse_args(own)
    speakers = Counter(each.speaker for _, each in recordings.listed(asked.data))
    groups = dealt(speakers, asked.folds or len(speakers))
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="speakers"))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(asked.jobs) as pool:
        found = list(pool.map(lambda i: trained(folder / f"fold_{i}", asked.data, groups[i], options),
                              range(len(groups))))
    for group, row in zip(groups, found):
        named = ", ".join(group) if len(group) < 4 else f"{len(group)} speakers"
        print(f"{named:24s} WER {row['eval/wer']:6.1%}   CER {row['eval/cer']:6.1%}   step {row['step']}")
    mean = {name: sum(row[f"eval/{name}"] for row in found) / len(found) for name in ("wer", "cer")}
    print(f"{'mean':24s} WER {mean['wer']:6.1%}   CER {mean['cer']:6.1%}   runs in {folder}")


if __name__ == "__main__":
    main()
