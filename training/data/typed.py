"""Text as people type it, for training beside printed prose: straight quotes, amounts, addresses, lists, code.

Books and news hold none of it, so a model that read only them never gives a straight quote back. Lines are made up
from a seed: nothing in one tells anything about another, so what a memory must hold cannot be guessed.
"""

import random
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence

DOCUMENT = 4000
"""Characters of a made-up document, about."""
FOLDED = str.maketrans({
    "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "‚": "'", "–": "-", "—": " - ", "−": "-",
    "…": "...", "⸺": "--", "⁠": "", "\u00a0": " ", "\u2009": " ", "\ufeff": "", "×": "x", "ß": "ss", "æ": "ae",
    "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "£": "GBP ", "€": "EUR ",
})  # fmt: skip
COMMON = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city name team minute idea body back parent face level office "
    "door health person art war history party result change morning reason research girl guy moment air teacher value "
    "file"
)
PARTS = "index value count items result data user name path key node self line text total size left right tmp"
WORDS, NAMES = COMMON.split(), PARTS.split()
SCRIPTS = (
    (0xC0, 0xFF), (0x100, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x904, 0x939),
    (0x3041, 0x3096), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x2190, 0x21FF),
)  # fmt: skip


def fold_to_ascii(text: str) -> str:
    r"""Write a text with the characters of a plain keyboard; those that it has no form of are left out.

    >>> fold_to_ascii("“Naïve,” he said… ‘£5—no!’")
    '"Naive," he said... \'GBP 5 - no!\''
    """
    return unicodedata.normalize("NFKD", text.translate(FOLDED)).encode("ascii", "ignore").decode()


def amount(draw: random.Random) -> str:
    """A number as it stands in text: a sum of money, a share, a date, a time, a telephone number."""
    whole = draw.randrange(10 ** draw.randint(1, 9))
    return draw.choice(
        (
            f"{draw.choice('$£€#')}{whole:,}",
            f"{whole:,}.{draw.randrange(100):02}",
            f"{draw.randrange(1000) / 10}%",
            f"{draw.randint(1, 31)}/{draw.randint(1, 12)}/{draw.randint(1900, 2030)}",
            f"{draw.randint(1900, 2030)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}",
            f"{draw.randrange(24)}:{draw.randrange(60):02}",
            f"+{draw.randrange(99)} ({draw.randrange(999)}) {draw.randrange(9999999)}",
            str(whole),
        )
    )


def name(draw: random.Random) -> str:
    """A name of code: some are written with underscores, some with capitals."""
    first, second = draw.choice(NAMES), draw.choice(WORDS)
    return draw.choice((first, f"{first}_{second}", f"{first}{second.title()}", f"{second}{draw.randrange(10)}"))


def code(draw: random.Random) -> str:
    """A line that looks like code or markup."""
    a, b, c, n = name(draw), name(draw), draw.choice(WORDS), draw.randrange(1000)
    return draw.choice(
        (
            f"    {a} = {b}[{n}] + {n} * ({a} - 1)",
            f'if {a} == "{c}" and not {b}: return {{"{a}": {n}, "{b}": [{n}, None]}}',
            f"def {a}(self, {b}={n}, *args, **kwargs):  # {c}",
            f"for (let {a} = 0; {a} < {b}.length; {a}++) {{ {c}({a} % {n}); }}",
            f"<{c} class='{a}'>{b} &amp; {n}</{c}>",
            f"<{draw.choice(('eos', 'bos', 'pad', 'memory', 'copy', '/s', 'br'))}> {c} |{a}|{b}| `{n}`",
            f"$ {c} --{a}={n} | grep -v '^{b}' > ~/{c}.txt && echo $?",
            f"SELECT {a}, {b} FROM {c} WHERE {a} >= {n} AND {b} != '{c}';",
            f"\\frac{{{a}}}{{{n}}}^{{2}} \\cdot x_{{{b}}} @ [{c}]",
        )
    )


def sentence(draw: random.Random) -> str:
    """Words in no order, with what people type between them."""
    words = draw.choices(WORDS, k=draw.randint(2, 12))
    for place in range(len(words)):
        words[place] += draw.choice(("",) * 12 + (",", ";", ":", "'s", "!", "?", " -", " &", "..."))
        if draw.random() < 0.15:
            words[place] = draw.choice((amount(draw), f'"{words[place]}"', f"({words[place]})", words[place].upper()))
    return draw.choice(("", "", "- ", "* ", "1. ", "> ", "# ", "[x] ", "@")) + " ".join(words).capitalize() + "."


def address(draw: random.Random) -> str:
    """An address of the web or of mail, or a path."""
    a, b, c = (draw.choice(WORDS) for _ in range(3))
    return draw.choice(
        (f"https://www.{a}.{b[:3]}/{c}?{a}={draw.randrange(999)}#{b}", f"{a}.{b}@{c}.com", f"/{a}/{b}/{c}.py")
    )


def scramble(draw: random.Random) -> str:
    """Characters in no order: of a keyboard, digits, or of another script."""
    kind, length = draw.random(), draw.randint(4, 60)
    if kind < 0.25:
        return "".join(draw.choices(string.digits, k=length))
    if kind < 0.6:
        return "".join(draw.choices(string.ascii_letters + string.digits + string.punctuation, k=length))
    first, last = draw.choice(SCRIPTS)
    return "".join(" " if draw.random() < 0.15 else chr(draw.randint(first, last)) for _ in range(length))


LINES: tuple[Callable[[random.Random], str], ...] = (
    sentence,
    sentence,
    sentence,
    code,
    code,
    address,
    amount,
    scramble,
)


def typed_documents(characters: int, seed: int) -> Iterator[str]:
    """Yield documents of about so many characters in all; equal seeds give equal ones.

    >>> documents = list(typed_documents(10_000, 0))
    >>> len(documents), documents == list(typed_documents(10_000, 0)), '"' in documents[0]
    (3, True, True)
    """
    draw, left = random.Random(f"typed {seed}"), characters
    while left > 0:
        lines: list[str] = []
        while sum(map(len, lines)) < min(left, DOCUMENT):
            lines.append(draw.choice(LINES)(draw))
        left -= DOCUMENT
        yield "\n".join(lines)


def with_typed_text(texts: Sequence[str], folded: float, typed: int, seed: int) -> list[str]:
    """Fold a share of documents to ASCII, and put made-up ones after them.

    Args:
        texts (`Sequence[str]`): Documents.
        folded (`float`): Share, 0 to 1.
        typed (`int`): Characters of made-up documents.
        seed (`int`): Of which are folded, and of what is made up.

    >>> with_typed_text(["“a”", "“b”"], 1.0, 0, 0)
    ['"a"', '"b"']
    """
    draw = random.Random(f"folded {seed}")
    kept = [fold_to_ascii(text) if draw.random() < folded else text for text in texts]
    return [text for text in kept if text.strip()] + list(typed_documents(typed, seed))
