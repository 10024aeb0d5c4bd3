"""Sentences to be said: from a small grammar, strings of digits, and sentences of the documentation.

The grammar has some 300 words, no two of which sound alike: what is missed was not heard, rather than misspelt.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator

DIGITS = "zero one two three four five six seven eight nine".split()

WORDS = {
    "name": """anna carla david emma felix grace henry iris julia karen leo maria nina oscar paula robert susan thomas
        victor walter""",
    "adjective": """big small old young happy sad quiet loud clean dirty heavy broken wooden golden silver green
        yellow purple orange black brown pink round square empty famous lazy clever gentle brave hungry tired busy
        careful simple strange modern friendly nervous""",
    "someone": """dog cat rabbit fox lion tiger monkey elephant chicken snake farmer doctor teacher sailor painter
        driver singer baker nurse pilot student uncle sister brother mother father neighbor king queen captain soldier
        judge dancer lawyer""",
    "thing": """book table chair window bottle basket hammer ladder bicycle guitar piano camera picture letter box
        candle blanket pillow mirror clock lamp knife spoon fork cup jacket hat shirt ring coin ticket map bag rope
        apple banana lemon carrot potato sandwich umbrella trumpet helmet pencil magazine suitcase""",
    "things": """books tables chairs bottles baskets ladders guitars cameras pictures letters candles blankets mirrors
        lamps spoons jackets hats coins tickets apples lemons carrots rabbits tigers monkeys pencils""",
    "did": """found lost carried painted cleaned washed watched moved opened broke fixed dropped pushed pulled kicked
        lifted wanted needed liked followed remembered forgot borrowed returned examined discovered""",
    "do": """bring take carry paint clean wash move hide fix drop push pull lift follow remember borrow return examine
        open watch""",
    "place": """garden house river bridge roof station market kitchen street forest school hill lake mountain beach
        village church hospital library museum office factory castle island airport theater bakery cellar valley
        harbor""",
    "near": "in behind near under beside inside across outside above below",
    "when": """yesterday today tomorrow recently monday tuesday wednesday thursday friday saturday noon midnight
        winter summer autumn breakfast dinner""",
    "number": "three five seven nine ten eleven twelve fifteen twenty thirty forty fifty sixty eighty",
    "how": "slowly quickly carefully quietly suddenly happily often never always again",
}
WHEN = {**dict.fromkeys("yesterday today tomorrow recently".split(), ""),
        **dict.fromkeys("monday tuesday wednesday thursday friday saturday".split(), "on "),
        **dict.fromkeys("noon midnight".split(), "at "), **dict.fromkeys("winter summer autumn".split(), "in "),
        **dict.fromkeys("breakfast dinner".split(), "after ")}
PATTERNS = (
    "the {adjective} {someone} {did} the {thing}",
    "the {someone} {how} {did} the {adjective} {thing} {near} the {place}",
    "{name} {did} {number} {adjective} {things} {when}",
    "{name} and {name} {did} the {thing} {near} the {place}",
    "please {do} the {adjective} {thing} {near} the {place}",
    "{when} the {someone} {did} a {thing}",
    "can you {do} the {things} {when}",
    "there are {number} {adjective} {things} {near} the {place}",
    "my {someone} {how} {did} your {adjective} {thing}",
    "did {name} {do} the {adjective} {thing} {when}",
)
CATEGORIES = {category: words.split() for category, words in WORDS.items()}
SLOT = re.compile(r"\{(\w+)\}")


def vocabulary() -> set[str]:
    """Every word that a sentence of the grammar may have."""
    fixed = [SLOT.sub("", pattern) for pattern in PATTERNS]
    return {word for text in (*fixed, *WORDS.values(), *WHEN.values()) for word in text.split()}


def of_grammar(draw: random.Random) -> str:
    return SLOT.sub(lambda slot: _drawn(slot[1], draw), draw.choice(PATTERNS))


def _drawn(category: str, draw: random.Random) -> str:
    word = draw.choice(CATEGORIES[category])
    return WHEN[word] + word if category == "when" else word


def of_digits(draw: random.Random) -> str:
    return " ".join(draw.choices(DIGITS, k=draw.randint(1, 7)))


def distinct(make: Callable[[random.Random], str], count: int, seed: int) -> list[str]:
    """The first `count` different sentences that come from a seed."""
    draw, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        found.setdefault(make(draw))
    return list(found)


SENTENCE = re.compile(r"(?:(?<=^)|(?<=[.:] ))([A-Z][a-z]*(?:,? [a-z]+(?:'[a-z]+)?){3,13})\.(?= |$)")


def of_documentation(texts: Iterable[str]) -> Iterator[str]:
    """The sentences of 4 to 14 words, all of them plain: no names of code, no numbers, no signs; each once."""
    seen = set()
    for text in texts:
        for paragraph in text.split("\n\n"):
            for match in SENTENCE.finditer(" ".join(paragraph.split())):
                if match[1] not in seen and max(map(len, match[1].split())) < 16:
                    seen.add(match[1])
                    yield match[1]
