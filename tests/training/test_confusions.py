"""What --confusions reports: counts by hand and by plain loops, the evaluation's own totals, text and JSON alike."""

import csv
import io
import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import pytest
import torch

import made_lines
import made_speech
from in_process import trained
from stoker.config import Parsed, UserError
from stoker.training.assembly import confusions as shown
from stoker.training.assembly import eval_only, launch
from stoker.training.assembly.job import Job
from stoker.training.core import confusions, pretrained
from stoker.training.core.confusions import Row
from stoker.training.core.error_rates import error_rate
from stoker.training.core.evaluation import Evaluations, Rows, Scores
from stoker.training.core.stage import discover
from stoker.training.core.transcripts import Source, Terms, Transcribing
from stoker.training.stages.labelled import Labelled
from stoker.training.train_audio_enc import AudioEncoder
from stoker.training.train_ocr import OCR
from toys import Regression

TERMS = Terms("recordings", "speaker", "seconds", "said", "heard")
SMALL: dict[str, Any] = dict(d_model=16, num_heads=2, num_layers=1, d_ff=32, batch_size=4, precision="fp32",
                             num_workers=0, threads=1)


def row(said: str, heard: str, path: str = "a.wav", group: str = "", length: float = 1.0) -> Row:
    pair = said.split(), heard.split()
    return Row(Source(path, length), group, *error_rate(*([each] for each in pair)), pair)


# -- what was confused ----------------------------------------------------------------------------------------------


def test_counts_are_those_by_hand() -> None:
    found = confusions.report([row("the cat sat", "the hat sat"), row("the dog", "dog"), row("go", "go the"),
                               row("", "um"), row("a cat", ""), row("cat", "hat")])
    assert {name: found[name] for name in ("unit", "total", "right", "replaced", "left_out", "inserted", "errors")} == {
        "unit": "words", "total": 9, "right": 4, "replaced": 2, "left_out": 3, "inserted": 2, "errors": 7}
    assert found["rate"] == pytest.approx(7 / 9)
    assert [tuple(unit.values()) for unit in found["by_unit"]] == [
        ("cat", 3, 0, 2, 1, 0), ("the", 2, 1, 0, 1, 1), ("a", 1, 0, 0, 1, 0), ("um", 0, 0, 0, 0, 1),
        ("dog", 1, 1, 0, 0, 0), ("go", 1, 1, 0, 0, 0), ("sat", 1, 1, 0, 0, 0)]
    assert list(found["by_unit"][0]) == ["text", "total", "right", "replaced", "left_out", "inserted"]
    assert found["substitutions"] == [{"reference": "cat", "hypothesis": "hat", "count": 2}]


def test_characters_are_counted_where_texts_are_strings() -> None:
    pair = "No. 10", "N0. l0"
    found = confusions.report([Row(Source("a.png", 64), "", *error_rate([pair[0]], [pair[1]]), pair)])
    assert (found["unit"], found["total"], found["right"], found["errors"]) == ("characters", 6, 4, 2)
    assert found["substitutions"] == [{"reference": "1", "hypothesis": "l", "count": 1},
                                      {"reference": "o", "hypothesis": "0", "count": 1}]
    assert (found["worst"][0]["reference"], found["worst"][0]["hypothesis"]) == pair


def sentences(seed: int, count: int = 200) -> list[Row]:
    draw, words = random.Random(seed), "a ab abc abcd bcd cd d".split()
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 8))) for _ in range(2 * count)]
    return [row(said, heard if draw.random() < 0.7 else said, f"{number}.wav", draw.choice(["anna", "boris", ""]),
                draw.uniform(0.3, 9)) for number, (said, heard) in enumerate(zip(texts[::2], texts[1::2]))]


def test_sums_over_words_are_those_of_the_texts_and_of_jiwer() -> None:
    """What was said, and what was heard, word by word; and the errors are as few as can be."""
    rows = sentences(0)
    found = confusions.report(rows)
    heard_as = Counter[str]()
    for each in found["substitutions"]:
        heard_as[each["hypothesis"]] += each["count"]
    said, heard = (Counter(word for row in rows for word in row.pair[side]) for side in (0, 1))
    assert Counter({unit["text"]: unit["total"] for unit in found["by_unit"]}) == said
    assert heard == {unit["text"]: unit["right"] + heard_as[unit["text"]] + unit["inserted"]
                     for unit in found["by_unit"]}
    for unit in [*found["by_unit"], found]:
        assert unit["total"] == unit["right"] + unit["replaced"] + unit["left_out"]
    assert all(each["reference"] != each["hypothesis"] for each in found["substitutions"])
    spoken = [row for row in rows if row.total]
    known = jiwer.process_words(*([" ".join(row.pair[side]) for row in spoken] for side in (0, 1)))
    silence = sum(len(row.pair[1]) for row in rows if not row.total)
    assert found["replaced"] + found["left_out"] + found["inserted"] == found["errors"] == (
        known.substitutions + known.deletions + known.insertions + silence)
    assert confusions.report(spoken)["rate"] == pytest.approx(known.wer)


# -- in which rows --------------------------------------------------------------------------------------------------


def test_the_worst_rows_come_first_and_right_ones_are_not_among_them() -> None:
    rows = [row("a b", "a b", "right.wav"), row("a b c d", "a b c", "quarter.wav"), row("a", "b", "one.wav"),
            row("a b", "", "nothing.wav"), row("", "um", "silence.wav"), row("", "", "empty.wav")]
    worst = confusions.report(rows)["worst"]
    assert [each["path"] for each in worst] == ["silence.wav", "nothing.wav", "one.wav", "quarter.wav"]
    assert worst[0] == {"path": "silence.wav", "group": None, "length": 1.0, "total": 0, "errors": 1, "rate": None,
                        "reference": "", "hypothesis": "um"}
    many = confusions.report([row("a " * 20, "a " * right, f"{right}") for right in range(20)])
    assert [each["path"] for each in many["worst"]] == [str(right) for right in range(10)]


def test_groups_and_lengths_are_those_of_a_plain_loop() -> None:
    rows = sentences(1)
    found = confusions.report(rows)
    by_group: dict[Any, list[Row]] = defaultdict(list)
    for each in rows:
        by_group[each.group or None].append(each)
    assert {each["group"]: (each["rows"], each["total"], each["errors"]) for each in found["by_group"]} == {
        group: (len(own), sum(each.total for each in own), sum(each.errors for each in own))
        for group, own in by_group.items()}
    rates = [each["errors"] / each["total"] for each in found["by_group"]]
    assert rates == sorted(rates, reverse=True) == [each["rate"] for each in found["by_group"]]
    ranges = [(0.25, 0.5), (0.5, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
    inside = [[each for each in rows if low <= each.source.length < high] for low, high in ranges]
    assert [tuple(each.values())[:5] for each in found["by_length"]] == [
        (*bounds, len(own), sum(each.total for each in own), sum(each.errors for each in own))
        for bounds, own in zip(ranges, inside)]


def test_a_power_of_two_begins_a_range() -> None:
    [low, high] = confusions.report([row("a", "a", length=1.999), row("a", "b", length=2.0)])["by_length"]
    assert (low["from"], low["below"], low["errors"]) == (1, 2, 0)
    assert (high["from"], high["below"], high["errors"]) == (2, 4, 1)


@pytest.mark.parametrize("speakers, names", [("", []), ("a", ["a"]), (("a", ""), ["a", "(not known)"])])
def test_speakers_are_reported_where_they_are_known(speakers: Any, names: list[str]) -> None:
    rows = [row("x", "y", group=speaker) for speaker in speakers or [""]]
    lines = list(shown.text([{"metric": "eval/wer", **confusions.report(rows)}], TERMS))
    title = "Word error rates by speaker"
    assert (title in lines) == bool(names)
    table = lines[lines.index(title) + 2:][:len(names)] if names else []
    assert [re.split("  +", line.strip())[0] for line in table] == names


def test_the_text_as_a_whole() -> None:
    rows = [row("the cat sat", "a hat sat", "1.wav", "anna", 1.25), row("the dog", "dog", "2.wav", "boris", 2.5),
            row("the", "the um", "3.wav", "", 2.5)]
    assert "\n".join(shown.text([confusions.report(rows)], TERMS)) == """
Words: 6 said, 3 heard right, 2 replaced, 1 left out; 1 inserted

Words most often wrong
  word  said  heard right  replaced  left out
  the      3            1         1         1
  cat      1            0         1         0

Words most often replaced
  said  -> heard  times  said in all  heard right
  cat   hat           1            1            0
  the   a             1            3            1

Words most often left out
  word  times  said in all  heard right
  the       1            3            1

Words most often inserted
  word  times  said in all  heard right
  um        1            0            0

Recordings with the highest error rates
  3.wav: 100.0% (errors 1, words 1), 2.5 seconds
    said   the
    heard  the um
  1.wav: 66.7% (errors 2, words 3), 1.25 seconds, speaker anna
    said   the cat sat
    heard  a hat sat
  2.wav: 50.0% (errors 1, words 2), 2.5 seconds, speaker boris
    said   the dog
    heard  dog

Word error rates by speaker
  speaker      recordings  words  errors  error rate
  (not known)           1      1       1      100.0%
  anna                  1      3       2       66.7%
  boris                 1      2       1       50.0%

Word error rates by length
  seconds  recordings  words  errors  error rate
  1 to 2            1      3       2       66.7%
  2 to 4            2      3       2       66.7%"""


def test_of_many_groups_the_text_has_the_worst_and_says_so() -> None:
    rows = [row("a " * 20, "a " * right, group=f"s{right}") for right in range(20)]
    report = confusions.report(rows)
    lines = list(shown.text([report], TERMS))
    at = lines.index("Word error rates by speaker, the 10 highest of 20")
    assert [line.split()[0] for line in lines[at + 2:at + 12]] == [f"s{right}" for right in range(10)]
    assert lines[at + 12] == "" and len(report["by_group"]) == 20


def test_where_nothing_was_said_there_is_no_rate() -> None:
    report = confusions.report([row("", "um", "silence.wav", "anna")])
    parts = report["worst"] + report["by_group"] + report["by_length"]
    assert [each["rate"] for each in (report, *parts)] == 4 * [None]
    assert "  silence.wav: - (errors 1, words 0), 1 seconds, speaker anna" in shown.text([report], TERMS)


def test_without_an_error_there_is_nothing_to_list() -> None:
    lines = list(shown.text([confusions.report([row("a b", "a b")])], TERMS))
    assert lines[1] == "Words: 2 said, 2 heard right, 0 replaced, 0 left out; 0 inserted"
    assert not any("most often" in line or "highest" in line for line in lines)


def test_texts_from_elsewhere_cannot_command_the_terminal() -> None:
    lines = list(shown.text([confusions.report([row("\x1b[2J", "\x1b[3J", "\x1b]0;a.wav", group="\x07")])], TERMS))
    assert not any("\x1b" in line or "\x07" in line for line in lines) and any("\\x1b[2J" in line for line in lines)
    pair = "a \xa0", "b"
    lines = list(shown.text([confusions.report([Row(Source("a", 1), "", 3, 3, pair)])], TERMS))
    assert any(line.startswith("  \u2423 ") for line in lines) and any(line.startswith("  \\xa0 ") for line in lines)


# -- in an evaluation -----------------------------------------------------------------------------------------------


def misheard(text: str) -> str:
    """Some words of it are others, some are left out, some are added; the same each time."""
    draw = random.Random(text)
    words = [draw.choice([word, word, word[::-1], word + "x", "", f"um {word}"]) for word in text.split()]
    return " ".join(" ".join(words).split())


@pytest.fixture(params=["audio_enc", "ocr"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path]:
    """A stage, a model folder of it, and a CSV of its data. Whatever the weights, the model writes `misheard`."""
    monkeypatch.chdir(tmp_path)
    kind = discover()[request.param]
    data = {"audio_enc": made_speech.write, "ocr": made_lines.write}[request.param](tmp_path / "data")
    sizes = {"audio_enc": {"num_mels": 40}, "ocr": {"stem_width": 4, "decoder_layers": 1}}[request.param]
    made: Any = kind(replace(kind.Config(), dataset=str(data), **SMALL, **sizes), tmp_path)
    made.prepare()
    folder = tmp_path / "model"
    folder.mkdir()
    made.export(made.model(), folder)
    pretrained.note(folder, made.name, 3, vars(made.cfg), {})
    batches, score = list[Any](), kind.score

    def scored(stage: Any, network: Any, batch: Any) -> Any:
        batches.append(batch)
        return score(stage, network, batch)

    monkeypatch.setattr(kind, "score", scored)
    written = (Labelled, "ctc_texts") if request.param == "audio_enc" else (OCR, "texts")
    monkeypatch.setattr(*written, lambda *given: [misheard(text) for text in batches[-1]["texts"]])
    return request.param, folder, data


def known_rows(data: Path) -> dict[str, tuple[str, str]]:
    """path -> text, group, as the CSV has them."""
    with open(data, newline="", encoding="utf-8") as file:
        return {str(data.parent / path): (text, *more, "")[:2]
                for path, text, *more in list(csv.reader(file))[1:]}


def decided(model: tuple[str, Path, Path], *argv: str) -> Job:
    stage, folder, data = model
    typed = ["--eval_only", "--init_from", str(folder), "--dataset", str(data), "--batch_size", "4", "--threads", "1",
             "--precision", "fp32", "--num_workers", "0", *argv]
    return launch.decide(discover()[stage], typed)


@pytest.mark.parametrize("argv", [[], ["--split", "all"], ["--split", "all", "--eval_max_rows", "7"]])
def test_each_row_has_its_own_path_speaker_and_texts(model: tuple[str, Path, Path], argv: list[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusions, "WORST", 1000)
    known = known_rows(model[2])
    found = json.loads(eval_only.report(decided(model, "--confusions", "--json", *argv)))
    [evaluation] = found["evaluations"]
    assert evaluation["rows"] == (7 if "7" in argv else sum(evaluation["splits"].values()))
    assert ("train" in evaluation["splits"]) == ("all" in argv)
    for report in found["confusions"]:
        assert report["rate"] == pytest.approx(evaluation["metrics"][report["metric"].removeprefix("eval/")]["value"])
        assert sum(each["rows"] for each in report["by_length"]) == evaluation["rows"]
        worst = {each["path"]: each for each in report["worst"]}
        assert len(worst) == len(report["worst"]) > (3 if "7" in argv else 0)
        for path, each in worst.items():
            text, group = known[path]
            assert (each["reference"], each["hypothesis"], each["group"]) == (text, misheard(text), group or None)
            pair = [each["reference"], each["hypothesis"]]
            if report["unit"] == "words":
                pair = [text.split() for text in pair]
            assert (each["errors"], each["total"]) == error_rate([pair[0]], [pair[1]])
        assert report["errors"] == sum(each["errors"] for each in worst.values())
        right = known.keys() - worst.keys()
        assert "all" not in argv or "7" in argv or all(misheard(known[path][0]) == known[path][0] for path in right)


def test_lengths_are_those_of_the_files(model: tuple[str, Path, Path]) -> None:
    """Seconds, and columns of pixels at --image_height: a line of 17 rows is as many times as wide at 32."""
    from PIL import Image

    [first, *_] = json.loads(eval_only.report(decided(model, "--confusions", "--json", "--split", "all")))["confusions"]
    for each in first["worst"]:
        if model[0] == "audio_enc":
            assert each["length"] == pytest.approx(0.12 * len(each["reference"]))
        else:
            with Image.open(each["path"]) as image:
                assert each["length"] == pytest.approx(image.width * 32 / image.height, abs=1)


def test_the_rates_are_those_of_each_stage(model: tuple[str, Path, Path]) -> None:
    found = json.loads(eval_only.report(decided(model, "--confusions", "--json")))
    assert [(report["metric"], report["unit"]) for report in found["confusions"]] == (
        [("eval/wer", "words")] if model[0] == "audio_enc" else [("eval/cer", "characters"), ("eval/wer", "words")])
    assert found["confusions"][0]["metric"] == discover()[model[0]].best[0]


def test_the_command_prints_text_or_json_and_both_have_the_same_figures(
        model: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    stage, folder, data = model
    argv = ["--eval_only", "--init_from", str(folder), "--dataset", str(data), "--split", "all", "--threads", "1"]
    printed = []
    for more in ([], ["--confusions"], ["--json"], ["--confusions", "--json"]):
        ran = trained(stage, *argv, *more)
        assert ran.returncode == 0, ran.stderr
        printed.append(capsys.readouterr().out)
    line, lines, plain, document = printed[0], printed[1].splitlines(), json.loads(printed[2]), json.loads(printed[3])
    assert lines[0] + "\n" == line and line.startswith("All: loss=")
    assert {name: value for name, value in document.items() if name != "confusions"} == plain
    assert (plain["weights"], plain["step"], plain["stage"], plain["split"]) == (str(folder), 3, stage, "all")
    in_line = re.findall(r"(\w+)=([\d.]+)(%?)(?: \(95%: ([\d.]+)-([\d.]+)\))?", line)
    assert [name for name, *_ in in_line] == list(plain["evaluations"][0]["metrics"])
    for name, value, percent, low, high in in_line:
        figures = plain["evaluations"][0]["metrics"][name]
        scale = 100 if percent else 1
        assert [float(each) / scale for each in (value, low, high) if each] == pytest.approx(
            [figures["value"], *(figures["interval"] or [])], abs=6e-4)
    for report in document["confusions"]:
        unit = report["unit"].capitalize()
        [counts] = [line for line in lines if line.startswith(f"{unit}: ")]
        assert [int(count) for count in re.findall(r"\d+", counts)] == [
            report[name] for name in ("total", "right", "replaced", "left_out", "inserted")]
        at = lines.index(f"{unit} most often replaced")
        for printed_row, each in zip(lines[at + 2:at + 12], report["substitutions"]):
            assert printed_row.split()[:3] == [each["reference"].replace(" ", "\u2423"),
                                               each["hypothesis"].replace(" ", "\u2423"), str(each["count"])]
    first = document["confusions"][0]
    for title, name in (("by speaker", "by_group"), ("by length", "by_length")):
        at = next((at for at, line in enumerate(lines) if line.endswith(f"error rates {title}")), None)
        if at is None:
            assert name == "by_group" and not first["by_group"] and stage == "ocr"
            continue
        assert [line.split()[-4:] for line in lines[at + 2:at + 2 + len(first[name])]] == [
            [str(each["rows"]), str(each["total"]), str(each["errors"]), f"{100 * each['rate']:.1f}%"]
            for each in first[name]]
    assert [line.split(":")[0].strip() for line in lines if line.startswith("  /")] == [
        each["path"] for each in first["worst"]]


def test_a_terminal_without_a_character_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_only, "report", lambda job: "\u2423 \u00e9 \udcff")
    for encoding, expected in (("ascii", "\\u2423 \\xe9 \\udcff\n"), ("utf-8", "\u2423 \u00e9 \\udcff\n")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        eval_only.show(Job(Regression, Parsed(None, frozenset(), "")))
        assert stream.buffer.getvalue().decode() == expected  # type: ignore[attr-defined]


def test_a_figure_that_is_not_finite_is_null() -> None:
    rows = Rows(range(2), 2, {"validation": 2}, range(2), None, False)
    found = eval_only._values(Scores("eval", {"eval/loss": math.inf, "eval/wer": math.nan, "eval/cer": 0.5},
                                     {"samples": 2}, rows=rows), 0)
    assert {name: each["value"] for name, each in found["metrics"].items()} == {"loss": None, "wer": None, "cer": 0.5}


def test_texts_are_kept_only_if_asked_for_and_once_after_memory_ran_out(model: tuple[str, Path, Path]) -> None:
    job = decided(model)
    assert [scores.pairs for scores in eval_only.evaluated(job)] == [{}]
    kind, score = discover()[model[0]], discover()[model[0]].score
    sizes = []

    def short(stage: Any, network: Any, batch: Any) -> Any:
        sizes.append(len(batch["texts"]))
        found = score(stage, network, batch)
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "score", short)
        [scores] = eval_only.evaluated(decided(model, "--confusions", "--split", "all"))
    assert sizes[:4] == [4, 4, 4, 2] and scores.rows
    assert {len(pairs) for pairs in scores.pairs.values()} == {len(scores.rows.dataset)} == {sum(sizes[3:])}


@pytest.mark.parametrize("argv", [["--confusions"], ["--json"], ["--confusions", "--json"]])
def test_without_an_evaluation_the_options_are_refused(argv: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        launch.decide(AudioEncoder, argv)
    assert refused.value.problems == tuple(f"{option} is for --eval_only: leave it out" for option in argv)


@pytest.mark.parametrize("name", discover())
def test_a_stage_that_writes_no_texts_says_so_in_a_line(name: str, tmp_path: Path) -> None:
    kind = discover()[name]
    assert issubclass(kind, Transcribing) == (name in ("audio_enc", "ocr"))
    ran = trained(name, "--eval_only", "--init_from", str(tmp_path / "nowhere"), "--confusions")
    assert ran.returncode == 2
    assert ("writes down no texts" in ran.stderr) == (not issubclass(kind, Transcribing))
    assert len(ran.stderr.splitlines()) == 1 or issubclass(kind, Transcribing)


class Forgetful(Transcribing, Regression):
    text_rates = ("eval/wer",)


def test_a_stage_whose_score_lacks_the_texts_is_named(tmp_path: Path) -> None:
    stage = Forgetful(replace(Forgetful.Config(), batch_size=4, precision="fp32", num_workers=0), tmp_path)
    done = Evaluations(stage, replace(stage.cfg, confusions=True)).run(
        "validation", stage.model(), stage.cfg, torch.device("cpu"), lambda: False)
    with pytest.raises(UserError, match=r"names eval/wer in text_rates, but score\(\) does not return it as error_r"):
        shown.found(stage, done or [])
