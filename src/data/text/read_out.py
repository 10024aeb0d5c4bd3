"""Text as it is said: numbers, dates, times, amounts and usual abbreviations in words.

    On 2026-11-28 at 9:05 Dr. Li paid $12.50 for 3 books (20%).
    On november twenty eighth twenty twenty six at nine oh five doctor Li paid twelve dollars fifty cents for three
    books (twenty percent).
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inflect

MONTHS = ("january february march april may june july august september october november december").split()
ABBREVIATIONS = {
    "mr": "mister", "mrs": "missus", "ms": "miss", "dr": "doctor", "prof": "professor", "sr": "senior", "jr": "junior",
    "e.g": "for example", "i.e": "that is", "etc": "et cetera", "vs": "versus", "approx": "approximately",
    "dept": "department", "fig": "figure", "vol": "volume", "min": "minutes", "hr": "hours", "sec": "seconds",
    **{month[:3]: month for month in MONTHS if month != "may"}, "sept": "september"}
SIGNS = {"&": "and", "+": "plus", "=": "equals", "@": "at", "%": "percent", "°": "degrees", "€": "euros", "£": "pounds",
         "$": "dollars"}
CURRENCIES = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
NUMBER = r"\d{1,3}(?:,\d{3})+|\d+"
YEARS = range(1100, 2100)
LONGEST = 15  # digits of a number that is read as one; longer ones are read digit by digit


def read_out(text: str) -> str:
    """The text with these in words, lower case; other words, punctuation and signs stay."""
    for pattern, words in RULES:
        text = pattern.sub(words, text)
    return text


def _number(digits: str, ordinal: bool = False) -> str:
    """Digits, maybe with commas, in words."""
    digits = digits.replace(",", "")
    if len(digits) > LONGEST or (not ordinal and len(digits) > 1 and digits[0] == "0"):
        return " ".join(_number(digit) for digit in digits)
    said: Any = _engine()
    words = str(said.number_to_words(said.ordinal(int(digits)) if ordinal else int(digits)))
    return words.replace("-", " ").replace(",", "")


@lru_cache(maxsize=1)
def _engine() -> "inflect.engine":
    import inflect

    return inflect.engine()


def _year(digits: str) -> str:
    """1999: nineteen ninety nine; 1905: nineteen oh five; 1900: nineteen hundred; 2007: two thousand and seven."""
    century, rest = int(digits) // 100, int(digits) % 100
    if int(digits) not in YEARS or (century % 10 == 0 and rest < 10):
        return _number(digits)
    end = "hundred" if not rest else _number(str(rest))
    return f"{_number(str(century))} {'oh ' if 0 < rest < 10 else ''}{end}"


def _date(found: re.Match[str]) -> str:
    year, month, day = found.groups()
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return found[0]
    return f"{MONTHS[int(month) - 1]} {_number(str(int(day)), ordinal=True)} {_year(year)}"


def _day_of(found: re.Match[str]) -> str:
    """november 28, 2026; 28 november; nov. 28"""
    if found["month"] in ("may", "march") and not re.search(r"\d(st|nd|rd|th)|\d{4}", found[0]):
        return found[0]  # a verb
    day, year = found["day"] or found["later"], found["year"]
    month = ABBREVIATIONS.get(found["month"].lower().rstrip("."), found["month"].lower())
    return f"{month} {_number(day, ordinal=True)}" + (f" {_year(year)}" if year else "")


def _time(found: re.Match[str]) -> str:
    hour, minutes = found.groups()
    if int(hour) > 24 or int(minutes) > 59:
        return found[0]
    if minutes == "00":
        return f"{_number(str(int(hour)))} o'clock"
    return f"{_number(str(int(hour)))} {'oh ' if minutes[0] == '0' else ''}{_number(str(int(minutes)))}"


def _amount(found: re.Match[str]) -> str:
    sign, whole, cents = found.groups()
    units = [(whole.replace(",", ""), CURRENCIES[sign][0]), ((cents or "").ljust(2, "0") if cents else "0",
                                                             CURRENCIES[sign][1])]
    said = [f"{_number(str(int(count)))} {_several(unit, int(count))}" for count, unit in units if int(count)]
    return " ".join(said) or f"zero {_several(units[0][1], 0)}"


def _several(unit: str, count: int) -> str:
    if count == 1:
        return unit
    return "pence" if unit == "penny" else unit + "s"


def _decimal(found: re.Match[str]) -> str:
    whole, part = found.groups()
    return f"{_number(whole)} point {' '.join(_number(digit) for digit in part)}"


def _plain(found: re.Match[str]) -> str:
    digits = found[0]
    return _year(digits) if len(digits) == 4 and digits[0] != "0" else _number(digits)


def _abbreviation(found: re.Match[str]) -> str:
    return ABBREVIATIONS[found[1].lower()]


_names = "|".join([*MONTHS, *(rf"{month[:3]}\.?" for month in MONTHS), r"sept\.?"])
RULES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b"), _date),
    (re.compile(rf"\b(?:(?P<later>\d{{1,2}})(?:st|nd|rd|th)? )?(?P<month>{_names})(?(later)| "
                rf"(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b)(?:,? (?P<year>\d{{4}})\b)?", re.IGNORECASE), _day_of),
    (re.compile(r"\b(\d{1,2}):(\d{2})\b(?!:)"), _time),
    (re.compile(rf"([$€£])({NUMBER})(?:\.(\d{{1,2}}))?\b"), _amount),
    (re.compile(r"\b(" + "|".join(map(re.escape, ABBREVIATIONS)) + r")\.", re.IGNORECASE), _abbreviation),
    (re.compile(r"(?<![\w.])[-−](?=\d)"), "minus "),
    (re.compile(rf"\b({NUMBER})\.(\d+)\b"), _decimal),
    (re.compile(rf"\b({NUMBER})(?:st|nd|rd|th)\b"), lambda found: _number(found[1], ordinal=True)),
    (re.compile(rf"(?<![\d,])(?:{NUMBER})"), _plain),
    (re.compile(" ?([" + re.escape("".join(SIGNS)) + "]) ?"), lambda found: f" {SIGNS[found[1]]} "),
]
