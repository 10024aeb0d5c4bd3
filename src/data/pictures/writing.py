"""What stands on lines to read: phrases, names and words of the documentation, and what receipts, forms and lists hold.

All of it is printable ASCII, a single line without blanks around it.
"""

import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence

PRINTABLE = string.printable[:95]
LONGEST = 48  # characters
UPPER, TITLE = 0.3, 0.1  # shares of the texts that are written so
IDENTIFIER = re.compile(r"\b\w+(?:[._]\w+)+(?:\(\))?")


class Words:
    """Documents, cut into what stands on lines."""

    def __init__(self, documents: Sequence[str]):
        plain = [text for document in documents for line in document.splitlines()
                 if (text := " ".join(line.split())) and text.isascii() and text.isprintable()]
        self.lines: list[str] = [line for line in plain if len(line) > 20]
        self.words = sorted({word for line in self.lines for word in line.split() if len(word) < 20})
        self.names: list[str] = sorted({name for line in self.lines for name in IDENTIFIER.findall(line)
                                        if len(name) < 40})

    def phrase(self, draw: random.Random) -> str:
        words = draw.choice(self.lines).split()
        first = draw.randrange(len(words))
        return " ".join(words[first:first + draw.randint(2, 7)])

    def some(self, draw: random.Random) -> str:
        """A word or two."""
        return " ".join(draw.choices(self.words, k=draw.choice((1, 1, 1, 2, 2, 3))))

    def name(self, draw: random.Random) -> str:
        return draw.choice(self.names)


# -- what receipts hold ---------------------------------------------------------------------------------------------

CURRENCIES = ("", "", "", "", "$", "$ ", "RM", "RM ", "EUR ", "USD ", "Rs.", "CHF ")
FIELDS = """Total|Sub Total|Subtotal|Grand Total|Net Total|Cash|Change|Change Due|Tax|Tax Invoice|VAT|GST|
    Service Charge|Discount|Rounding|Rounding Adj|Amount|Amount Due|Balance|Deposit|Tender|Qty|Quantity|Price|
    Unit Price|Item|Items|Item Count|No. of Items|Description|Date|Time|Receipt|Receipt No|Invoice|Invoice No|Bill No|
    Order|Order No|Doc No|Table|Table No|Room No|Guests|Pax|Server|Cashier|Counter|Terminal|Store|Branch|Member|
    Points|Customer|Address|Tel|Phone|Fax|Mobile|Email|Ref|Ref No|Reg No|Tax ID|Card|Card No|Visa|Debit|Approval Code|
    Trace No|Batch|Thank You|Thank you, come again|Please come again|No refund|No exchange without receipt|
    Goods sold are not returnable|Have a nice day|Customer copy|Duplicate|Welcome|Open daily|Summary|Including tax|
    Round Amt|Payment|Page 1 of 1|Keep this receipt|Signature|Exchange within 7 days|Take away|Dine in|Promo|Nett|
    Gross|Less|Paid|Due|Code|Type"""
LABELS = tuple(" ".join(label.split()) for label in FIELDS.split("|"))
GOODS = """Coffee|Black Tea|Milk|Bread|Butter|Rice|Noodle Soup|Fried Chicken|Fish Fillet|Orange Juice|Apple|Banana|
    Mineral Water|Ice Cream|Sugar|Salt|Eggs|Cheese|Sandwich|Burger|Salad|Cake|Chocolate|Cookies|Shampoo|Soap|
    Toothpaste|Battery|Light Bulb|Paint|Brush|Screw|Hammer|Cable|Plug|Glue|Tape|Paper|Pen|Marker|Folder|Envelope|Box|
    Bag|Towel|Cup|Plate|Bottle|Knife|Hook|Rope|Lock|Hinge|Nail|Pipe|Wire|Bucket|Broom|Mop|Candle|Toy|Card|Label"""
THINGS = tuple(" ".join(thing.split()) for thing in GOODS.split("|"))
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
DATES = ("{d:02}/{m:02}/{y}", "{d:02}-{m:02}-{y}", "{d}.{m}.{y}", "{y}-{m:02}-{d:02}", "{d:02}/{m:02}/{s:02}",
         "{m:02}/{d:02}/{y}", "{d:02} {n} {y}", "{d:02}-{n}-{s:02}", "{n} {d}, {y}", "{d:02}{m:02}{y}")
TIMES = ("{h:02}:{i:02}", "{h:02}:{i:02}:{k:02}", "{t}:{i:02} {p}", "{t}:{i:02}:{k:02} {p}", "{t:02}:{i:02}{p}")
AROUND = (*zip("([*#-=<{\"~|!/", ")]*#-=>}\"~|!/"),)


def price(draw: random.Random) -> str:
    whole = draw.choice((draw.randint(0, 9), draw.randint(0, 99), draw.randint(0, 999), draw.randint(0, 99_999)))
    amount = f"{whole:,}.{draw.randint(0, 99):02}" if draw.random() < 0.5 else f"{whole}.{draw.randint(0, 19) * 5:02}"
    sign = draw.choice(("", "", "", "", "", "", "-", "+"))
    after = draw.choice(("", "", "", "", "", "", "", "%", " %", "*", "-", " T", " Z", " A"))
    return sign + draw.choice(CURRENCIES) + amount + after


def number(draw: random.Random) -> str:
    return draw.choice((str(draw.randint(0, 9)), str(draw.randint(0, 99)), digits(draw, 3, 8), digits(draw, 8, 16)))


def digits(draw: random.Random, least: int, most: int) -> str:
    return "".join(draw.choices(string.digits, k=draw.randint(least, most)))


def date(draw: random.Random) -> str:
    year = draw.randint(1990, 2039)
    return draw.choice(DATES).format(d=draw.randint(1, 28), m=draw.randint(1, 12), y=year, s=year % 100,
                                     n=draw.choice(MONTHS))


def time(draw: random.Random) -> str:
    return draw.choice(TIMES).format(h=draw.randrange(24), t=draw.randint(1, 12), i=draw.randrange(60),
                                     k=draw.randrange(60), p=draw.choice(("AM", "PM", "am", "pm")))


def moment(draw: random.Random) -> str:
    return draw.choice((date, time, lambda draw: f"{date(draw)} {time(draw)}"))(draw)


def phone(draw: random.Random) -> str:
    form = draw.choice(("##-#### ####", "##-########", "(###) ###-####", "+## ## #######", "###-#######", "#########",
                        "+#-###-###-####", "## ### ## ##", "#### ######", "+###-### ####"))
    return re.sub("#", lambda _: draw.choice(string.digits), form)


def code(draw: random.Random) -> str:
    """Of letters and digits, as invoices and goods have them."""
    parts = [draw.choice((lambda: "".join(draw.choices(string.ascii_uppercase, k=draw.randint(1, 4))),
                          lambda: digits(draw, 1, 6)))() for _ in range(draw.randint(1, 4))]
    return draw.choice(("#", "No. ", "", "", "", "")) + draw.choice(("", "", "-", "/", " ")).join(parts)


def field(draw: random.Random) -> str:
    """A label, most often with something behind it."""
    label = draw.choice(LABELS)
    if draw.random() < 0.35:
        return label
    between = draw.choice((": ", ":", " : ", " ", " ", "# ", " = ", "...... ", " - ", " @ ", "; "))
    return label + between + draw.choice((price, number, moment, phone, code))(draw)


def goods(draw: random.Random) -> str:
    thing, count = draw.choice(THINGS), draw.randint(1, 24)
    size = draw.choice((f"{draw.randint(1, 900)}{draw.choice(('G', 'ML', 'MM', 'PCS', 'KG', 'W', 'X2', 'CM'))}",
                        f"{draw.randint(1, 60)}'S", f"{draw.randint(1, 9)}\"", f"({draw.choice(THINGS)})",
                        f"& {draw.choice(THINGS)}", f"W/{draw.choice(THINGS)}"))
    return draw.choice((f"{thing} {size}", f"{count} x {thing}", f"{count} {thing} {price(draw)}", f"{thing} x{count}",
                        f"{count} @ {price(draw)}", f"{count} X {price(draw)}", f"{number(draw)} {thing}",
                        f"- {thing} {size}", f"* {thing}", f"{thing} ({size})", thing))


def signs(draw: random.Random) -> str:
    """Any characters, each as often as the others."""
    return "".join(draw.choices(PRINTABLE[:94], k=draw.randint(1, 10)))


def enclosed(draw: random.Random) -> str:
    before, after = draw.choice(AROUND)
    inner = draw.choice((code, number, field, goods))(draw)
    return f"{before * draw.choice((1, 1, 3))}{inner}{after * draw.choice((1, 1, 3))}"


# -- all of it ------------------------------------------------------------------------------------------------------

Kind = Callable[[random.Random], str]


def kinds(words: Words) -> Mapping[Kind, float]:
    """What there is, and how often."""
    return {words.phrase: 5, words.some: 4, words.name: 1.5, price: 3, number: 1, moment: 1.5, phone: 0.7, code: 1,
            field: 3, goods: 2, signs: 1.3, enclosed: 0.8}


def texts(words: Words, seed: str) -> Iterator[str]:
    """Without end; the same may come again."""
    draw, of = random.Random(seed), kinds(words)
    while True:
        text = draw.choices(list(of), list(of.values()))[0](draw)
        case = draw.random()
        text = text.upper() if case < UPPER else text.title() if case < UPPER + TITLE else text
        if found := text[:LONGEST].strip():
            yield found
