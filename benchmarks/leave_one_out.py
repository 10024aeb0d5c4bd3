"""What each change of the training speech is worth: recognizers trained without it, one after another.

    python benchmarks/leave_one_out.py FOLDER DATA.csv [DATA.csv ...] [--without silence noise ...] [--jobs 1]
        [-- OPTIONS of train_audio_enc.py]

The first recognizer has all changes of `--augment strong`, the others lack one each (`masks`: SpecAugment), or several
that are joined by `+` (`--without pitch+warp clip+codec`). Printed are the words and characters that are wrong in the
test set of what they are trained on, and in each of the DATA. Runs stay in FOLDER; an interrupted measurement is
resumed.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recognizers import arguments, evaluated, trained  # noqa: I001  finds the packages of src/

from stoker.training.train_audio_enc import AUGMENTS

NOTHING, MASKS = "nothing", ("masks", "mask_bands", "mask_time")
CHANGES = [name for name in AUGMENTS["strong"] if name not in MASKS]


def row(folder: Path, without: str, data: list[str], options: list[str]) -> str:
    lacking = [] if without == NOTHING else [part for name in without.split("+") for part in (f"--{name}", "0")]
    trained(folder / f"without_{without}", ["--augment", "strong", *lacking, *options])
    sets = [["--split", "test"], *(["--dataset", each, "--split", "all"] for each in data)]
    found = [evaluated(folder / f"without_{without}", *which) for which in sets]
    return f"{without:16s}" + "".join(f"{figures['wer']:9.1%} {figures['cer']:6.1%}" for figures in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--without", nargs="+", default=[NOTHING, *CHANGES, "masks"])
    parser.add_argument("--jobs", type=int, default=1)
    asked, options = arguments(parser)
    asked.folder.mkdir(parents=True, exist_ok=True)
    names = ["test set", *(Path(each).stem for each in asked.data)]
    print(f"{'without':16s}" + "".join(f"{name:>16s}" for name in names))
    with ThreadPoolExecutor(asked.jobs) as pool:
        for line in pool.map(lambda without: row(asked.folder, without, asked.data, options), asked.without):
            print(line, flush=True)


if __name__ == "__main__":
    main()
