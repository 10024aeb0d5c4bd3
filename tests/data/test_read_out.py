"""Numbers, dates, times, amounts and abbreviations as they are said."""

import pytest

from stoker.data.text.read_out import read_out


@pytest.mark.parametrize("written, said", [
    ("3 books", "three books"),
    ("1,234 and 12345", "one thousand two hundred and thirty four and twelve thousand three hundred and forty five"),
    ("3.14", "three point one four"), ("minus -5 or −5", "minus minus five or minus five"), ("x-5", "x-five"),
    ("the 21st of may", "the twenty first of may"), ("in 1999, 2007 and 2026", "in nineteen ninety nine, two thousand "
                                                                               "and seven and twenty twenty six"),
    ("007", "zero zero seven"), ("2" * 16, " ".join(["two"] * 16)),
    ("2026-11-28", "november twenty eighth twenty twenty six"), ("2026-13-01", "twenty twenty six-thirteen-zero one"),
    ("Nov. 3, 2021", "november third twenty twenty one"), ("4 July", "july fourth"), ("may 5th", "may fifth"),
    ("march on", "march on"), ("it may 3 times", "it may three times"), ("May 3", "may third"),
    ("9:05", "nine oh five"), ("14:00", "fourteen o'clock"), ("12:30", "twelve thirty"),
    ("$12.50", "twelve dollars fifty cents"), ("£1.01", "one pound one penny"), ("€2", "two euros"),
    ("$0", "zero dollars"),
    ("$1,000.5", "one thousand dollars fifty cents"), ("20%", "twenty percent"), ("a & b", "a and b"),
    ("Dr. Li, Mr. Ha etc.", "doctor Li, mister Ha et cetera"), ("e.g. this", "for example this"),
    ("no numbers here", "no numbers here"), ("", "")])
def test_what_is_written_is_read_out(written: str, said: str) -> None:
    assert " ".join(read_out(written).split()) == said
