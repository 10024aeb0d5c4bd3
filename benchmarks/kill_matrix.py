"""Kill a training at any instant, over and over, and compare it with one that was left alone: bit for bit.

    python benchmarks/kill_matrix.py [--stage lm] [--kills 200] [--seed 0] [--jobs 1] [--folder FOLDER]
                                     [--machine "--device cpu --threads 1 --no_compile"]

A small language model, a small thinker with experts (--stage text), or a small audio encoder with every augmentation
and two views of each recording (--stage audio_enc), by the real script, with all that has a state:
dropout, accumulation, loader workers, early stopping, the spike monitor, an average of the weights, samples. It is
trained undisturbed, then once more, killed by SIGKILL at moments that follow from the seed and resumed each time, until
it is finished; then with the next seed, until there were as many kills as asked. Where failpoints.py can be (see there)
a kill hits one instant: between two operations on files, in the middle of a write, between forward pass and update;
some come at any time, from outside.

Compared are, tensor by tensor on the bits and with == for the rest: what stands in the last snapshots, the models
handed out, metrics.jsonl, the samples, the options, and what a reader of TensorBoard sees; nothing hidden may be left.
Exit code 1 if anything differs. In a folder that is named, a measurement that was interrupted goes on.
"""

import argparse
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import rig  # noqa: I001,F401  finds the packages of src/
import safetensors.torch
import torch
from failpoints import PLACES
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # type: ignore  # untyped

from stoker.data.speech import spoken

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent / "src/training"
OF_TEXT = "--tokenizer bytes --max_seq_len 32"
OF_STAGE = {
    "lm": OF_TEXT.split(),
    "text": f"{OF_TEXT} --num_kv_heads 1 --use_moe --num_experts 4 --no_cross_document --shift_windows".split(),
    "audio_enc": "--augment strong --clip 0.5 --codec 0.5 --narrow 0.5 --consistency 0.2 --num_mels 40".split(),
}
SPOKEN = {"train": 72, "validation": 8}  # sentences that the audio encoder hears
STEPS, SNAPSHOTS = 60, 5  # of a training; steps between two snapshots
AHEAD = 12  # a kill comes within so many steps
VAIN = 3  # so many kills in a row may come before there is a later snapshot
OPTIONS = (
    "--d_model 32 --num_heads 2 --num_layers 2 --d_ff 64 --dropout 0.1 --lr 3e-3 "
    f"--batch_size 4 --grad_accum_steps 2 --num_workers 2 --max_steps {STEPS} --snapshot_interval {SNAPSHOTS} "
    "--snapshot_minutes 0 --keep_last_n_snapshots 2 --log_interval 2 --eval_interval 7 --ema_decay 0.9 "
    "--early_stopping --early_stop_patience 50 --early_stop_overfit_patience 50"
).split()
MACHINE = "--device cpu --threads 1 --no_compile"
ANY_TIME = "any time"
SELDOM = ("birth of the run", "token cache", "save at step 0", "hand-out of models", "end", "tidying")  # within reach
CLOCKS = ("speed/", "system/")  # what clocks and the machine gave: it is there, with whatever value


class Point(NamedTuple):
    phase: str
    place: str
    operation: str
    step: int


@dataclass
class Sitting:
    """From a start of the script to its end. `step` is where it ended, `began` where its training loop did."""

    place: str  # where it was killed; '' if it was not
    operation: str = ""
    step: int = -1
    began: int | None = None
    at_start: dict[str, int] = field(default_factory=dict)  # points passed before the training loop, by place


@dataclass
class Kills:
    """How many there are still to be done, in all courses together."""

    left: int

    def take(self) -> bool:
        if self.left > 0:
            self.left -= 1
            return True
        return False


class Course:
    """A training left alone, and the same one killed and resumed; what has been done stands in its folder."""

    def __init__(self, folder: Path, data: Path, seed: int, stage: str, machine: str):
        self.folder, self.data, self.seed, self.stage, self.machine = folder, data, seed, stage, machine
        self.alone, self.killed, self.notes = folder / "alone", folder / "killed", folder / "sittings.json"
        noted = json.loads(self.notes.read_text()) if self.notes.exists() else []
        self.sittings = [Sitting(**sitting) for sitting in noted]
        self.failure = ""  # of the script, which ended otherwise than it should

    @property
    def kills(self) -> list[Sitting]:
        return [sitting for sitting in self.sittings if sitting.place]

    def train(self, kills: Kills) -> None:
        if not finished(self.alone):
            shutil.rmtree(self.alone, ignore_errors=True)  # one that was interrupted is not left alone
            self._sit(self.alone, [], None)
        while not finished(self.killed) and not self.failure:
            targets, seconds = self._targets(kills)
            sitting = self._sit(self.killed, targets, seconds)
            if (targets or seconds) and not sitting.place:
                kills.left += 1
            self.sittings.append(sitting)
            self.notes.write_text(json.dumps([asdict(sitting) for sitting in self.sittings]))
            print(f"seed {self.seed}, {len(self.kills)} kills: {sitting.place or 'finished'} {sitting.operation}, "
                  f"step {sitting.step}", file=sys.stderr, flush=True)

    def points(self) -> list[Point]:
        """Every point that the training left alone passed."""
        return passed(self.folder / "alone.trace")

    def redone(self) -> list[tuple[str, int]]:
        """Of each kill that training went on from: its place, and the steps that had to be done again."""
        found = []
        for i, kill in enumerate(self.sittings):
            later = [sitting.began for sitting in self.sittings[i + 1:] if sitting.began is not None]
            if kill.place and later:
                found.append((kill.place, kill.step - later[0] if kill.began is not None else 0))
        return found

    # -- one sitting --------------------------------------------------------------------------------------------

    def _sit(self, side: Path, targets: list[list[Any]], seconds: float | None) -> Sitting:
        """Start or resume the training of one side; it dies at a target, or from outside after some seconds."""
        side.mkdir(parents=True, exist_ok=True)
        trace, log = side.with_suffix(".trace"), side.with_suffix(".out")
        points = json.dumps({"folder": str(side), "trace": str(trace), "targets": targets})
        options = ["--resume", "run"] if (side / "run").exists() else [
            "--dataset", str(self.data), "--result_dir", ".", "--run_name", "run", "--seed", str(self.seed), *OPTIONS,
            *OF_STAGE[self.stage], *self.machine.split()]
        began, killed = time.monotonic(), False
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", str(HERE / "failpoints.py"), points,
                 str(SCRIPTS / f"train_{self.stage}.py"), *options, "--yes"],
                cwd=side, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=os.environ | {"PYTHONPATH": str(HERE.parent / "run/python"), "STOKER_HOME": str(side / "home")})
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                killed = True
        code, at_target = process.wait(), trace.exists() and trace.read_bytes().endswith(b"killed\n")
        if not (killed or at_target or finished(side)):
            self.failure = f"the script ended with {code}: " + " | ".join(log.read_text().splitlines()[-5:])
        if not code:
            (side / "seconds").write_text(f"{time.monotonic() - began}")
        return _sitting(passed(trace), ANY_TIME if killed and code else None if code else "")

    def _targets(self, kills: Kills) -> tuple[list[list[Any]], float | None]:
        """Where the next sitting is to be killed, or after how many seconds: drawn from the seed and how many there
        were. The places come in turn, so that those which are seldom within reach come too."""
        draw, last = random.Random(f"{self.seed} {len(self.sittings)}"), self._newest()
        vain = len(list(itertools.takewhile(lambda s: (s.began or 0) >= last, reversed(self.kills)))) >= VAIN
        first = last + 2 * SNAPSHOTS if vain else last
        later = [point for point in self.points()
                 if point.phase != "start" and first <= point.step <= first + AHEAD]
        if not later or (vain and first > STEPS) or not kills.take():
            return [], None
        done, start = Counter(kill.place for kill in self.kills), Counter() if vain else self.start()
        places = {point.place for point in later} | start.keys() | ({ANY_TIME} - {ANY_TIME if vain else ""})
        place = min(sorted(places), key=lambda place: (done[place], (*SELDOM, place).index(place), draw.random()))
        if place == ANY_TIME:
            return [], draw.uniform(0.1, 0.8 * float((self.alone / "seconds").read_text()))
        chosen = [point for point in later if point.place == place]
        number = draw.randrange(start[place] + len(chosen))
        if number >= start[place]:
            return [_target(draw, chosen)], None
        another = draw.choice(sorted({point.place for point in later}))  # there may be nothing to tidy this time
        return [[place, -1, number + 1], _target(draw, [point for point in later if point.place == another])], None

    def _newest(self) -> int:
        """The step of the newest snapshot."""
        manifests = (self.killed / "run/snapshots").glob("snapshot_*/manifest.json")
        return max((json.loads(manifest.read_text())["step"] for manifest in manifests), default=0)

    def start(self) -> Counter[str]:
        """How many points there are before the training loop, by place: of a new run, or of one that goes on."""
        if not (self.killed / "run").exists():
            return Counter(point.place for point in self.points() if point.phase == "start")
        most: Counter[str] = Counter()
        for sitting in self.sittings:
            if sitting.began is not None:
                most |= Counter(sitting.at_start)
        return most

    # -- what is compared ---------------------------------------------------------------------------------------

    def differences(self) -> list[str]:
        if self.failure:
            return [self.failure]
        ours, theirs = outcome(self.killed / "run"), outcome(self.alone / "run")
        left = [f"left behind: {path.relative_to(self.killed)}" for path in self.killed.glob("run/**/.*")]
        return [*left, *differences(theirs, ours, "")]


def passed(trace: Path) -> list[Point]:
    rows = [line.split("\t") for line in trace.read_text().splitlines() if "\t" in line] if trace.exists() else []
    return [Point(phase, place, operation, int(step)) for phase, place, operation, step in rows]


def _target(draw: random.Random, points: list[Point]) -> list[Any]:
    """One of the points of a place, as failpoints.py counts them; each kind of operation is as likely as the others."""
    kind = draw.choice(sorted({point.operation for point in points}))
    number = draw.choice([i for i, point in enumerate(points) if point.operation == kind])
    chosen = points[number]
    return [chosen.place, chosen.step, 1 + sum(point.step == chosen.step for point in points[:number])]


def _sitting(points: list[Point], place: str | None) -> Sitting:
    """What a trace tells; `place` None: where it ends is where the sitting was killed."""
    last = points[-1] if points else Point("start", "", "", -1)
    place = last.place if place is None else place
    trained = [point.step for point in points if point.phase != "start"]
    return Sitting(place, last.operation if place not in ("", ANY_TIME) else "", last.step,
                   min(trained) if trained else None,
                   dict(Counter(point.place for point in points if point.phase == "start")))


def finished(side: Path) -> bool:
    status = side / "run/status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "finished"


def outcome(run: Path) -> dict[str, Any]:
    """All that the mathematics gave."""
    return {
        "snapshots": {path.name: {"weights": safetensors.torch.load_file(path / "model.safetensors"),
                                  "state": torch.load(path / "state.pt", map_location="cpu", weights_only=True)}
                      for path in sorted((run / "snapshots").iterdir()) if not path.name.startswith(".")},
        "models": {str(path.relative_to(run)): _content(path, run)
                   for path in sorted((run / "models").rglob("*")) if path.is_file()},
        "samples": {str(path.relative_to(run)): path.read_text() for path in sorted((run / "samples").glob("*/*.txt"))},
        "options": _content(run / "run_config.json", run),
        "metrics": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "timings": [json.loads(line)["step"] for line in (run / "timings.jsonl").read_text().splitlines()],
        "tensorboard": board(run / "tensorboard"),
    }


def _content(path: Path, run: Path) -> Any:
    """Of a file of weights, or of JSON that may name the folder of the run."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    content = json.loads(path.read_text().replace(str(run.parent), ""))
    if path.name == "stoker.json":
        content.pop("sha256")  # it covers the content before the folder's name was removed
    return content


def board(folder: Path) -> dict[str, Any]:
    """What a reader of TensorBoard sees: of each tag the steps, and the values unless a clock gave them."""
    reader = EventAccumulator(str(folder), tensor_size_guidance=dict.fromkeys(("scalars", "histograms", "text"), 0))
    return {tag: [event.step if tag.startswith(CLOCKS) else (event.step, event.tensor_proto.SerializeToString())
                  for event in reader.Tensors(tag)] for tag in reader.Reload().Tags()["tensors"]}


def differences(a: Any, b: Any, where: str) -> Iterator[str]:
    """Where two outcomes differ: tensors on the bits, NaN equal to NaN, everything else by ==."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape) or a.numpy().tobytes() != b.numpy().tobytes():
            yield where
    elif isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{where}/{key}: {'missing' if key in a else 'too much'}" for key in a.keys() ^ b.keys())
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            first = next((i for i, (x, y) in enumerate(zip(a, b)) if list(differences(x, y, ""))), min(len(a), len(b)))
            yield f"{where}: {len(a)} alone, {len(b)} killed, the first that differs is [{first}]"
        else:
            for i, (x, y) in enumerate(zip(a, b)):
                yield from differences(x, y, f"{where}[{i}]")
    elif a != b and (a == a or b == b):
        yield f"{where}: {str(a)[:60]} alone, {str(b)[:60]} killed"


# -- all of it ------------------------------------------------------------------------------------------------------


def write_data(folder: Path, stage: str) -> None:
    """text.txt; for the audio encoder the folder speech."""
    if stage == "audio_enc":
        if not (folder / "speech").exists():
            shutil.copytree(spoken.build("spoken", sizes=SPOKEN).parent, folder / "speech")
    else:
        write_text(folder / "text.txt")


def write_text(path: Path) -> None:
    draw, words = random.Random(0), "stoker keeps the fire burning all night long while you sleep".split()
    path.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(300)))


def measure(folder: Path, seed: int, kills: int, jobs: int, stage: str, machine: str = MACHINE) -> list[Course]:
    """Courses one after the other, `jobs` at a time, until there were so many kills; the one that stands in the folder
    already go on first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, stage)
    known = [int(path.name.removeprefix("course_")) for path in folder.glob("course_*")]
    left = Kills(kills - sum(len(_course(folder, seed, number, stage, machine).kills) for number in known))
    numbers, courses = itertools.count(), list[Course]()

    def work() -> None:
        for number in numbers:
            course = _course(folder, seed, number, stage, machine)
            if not course.folder.exists() and left.left <= 0:
                return
            courses.append(course)
            course.train(left)
            if course.failure:
                return

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work) for _ in range(jobs)]:
            done.result()
    return sorted(courses, key=lambda course: course.seed)


def _course(folder: Path, seed: int, number: int, stage: str, machine: str) -> Course:
    data = "speech/manifest.csv" if stage == "audio_enc" else "text.txt"
    return Course(folder / f"course_{number:02d}", folder / data, 1000 * seed + number, stage, machine)


def table(courses: list[Course]) -> Iterator[str]:
    kills = [kill for course in courses for kill in course.kills]
    redone = [steps for course in courses for steps in course.redone()]
    points = Counter[str]()
    for course in courses:
        points |= Counter(point.place for point in course.points()) | course.start()
    yield f"{'place':24s} {'points':>7s} {'kills':>6s}   {'steps redone':>12s}   before"
    for place in [*PLACES, ANY_TIME]:
        at = [kill for kill in kills if kill.place == place]
        steps = [number for name, number in redone if name == place]
        shown = f"{sum(steps) / len(steps):4.1f}, max {max(steps):2d}" if steps else "-"
        kinds = Counter(kill.operation for kill in at if kill.operation)
        yield (f"{place:24s} {points[place] or '':>7} {len(at):6d}   {shown:>12s}   "
               + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    steps = [number for _, number in redone]
    yield (f"{'all':24s} {sum(points.values()):7d} {len(kills):6d}   "
           f"{sum(steps) / max(1, len(steps)):4.1f}, max {max(steps, default=0):2d}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=OF_STAGE, default="lm")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--folder", type=Path, help="keep everything here; a measurement that was interrupted goes on")
    parser.add_argument("--machine", default=MACHINE, help="how the trainings run (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each start after a kill
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / f"{args.stage}_seed_{args.seed}"
        courses = measure(folder.resolve(), args.seed, args.kills, args.jobs, args.stage, args.machine)
        print("\n".join(table(courses)))
        different = 0
        for course in courses:
            found = course.differences()
            verdict = f"{len(found)} DIFFERENCES" if found else "same"
            print(f"seed {course.seed}: {len(course.kills)} kills, {verdict}")
            print("".join(f"    {line}\n" for line in found[:20]), end="")
            different += bool(found)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
