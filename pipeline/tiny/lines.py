"""The strings that banners say, and which of them training never sees.

Invariant: a line that is held out is never drawn for training, and the other way round, by a rule that needs no list.
"""

import hashlib
import string
from random import Random

LINE_MAX_CHARACTERS = 10
PUNCTUATION = "!?.,:-+%&$#/'"
CHARACTERS = string.ascii_letters + string.digits + PUNCTUATION + " "


def held_out(line: str) -> bool:
    """Whether ``line`` is kept from training: one string in 16, however it is capitalised."""
    return hashlib.sha256(line.casefold().encode()).digest()[0] % 16 == 0


def draw_line(random: Random, of_held_out: bool) -> str:
    """One line. Beside words and prices training gets random characters: letters must be learnt apart from words."""
    kinds = (_words, _words, _invented, _price, _words_and_number)
    while True:
        kind = random.choice(kinds if of_held_out else (*kinds, _characters))
        line = kind(random)
        if len(line) <= LINE_MAX_CHARACTERS and held_out(line) is of_held_out:
            return line


def _words(random: Random) -> str:
    words = random.choices(WORDS, k=random.choice((1, 1, 2)))
    return _capitalised(random, " ".join(words)) + random.choice(("", "", "", "", "!", "?", "."))


def _invented(random: Random) -> str:
    """A word that nobody has read before, and anybody can pronounce."""
    syllables = (random.choice(ONSETS) + random.choice(VOWELS) for _ in range(random.randint(2, 4)))
    return _capitalised(random, "".join(syllables) + random.choice(ENDS))


def _price(random: Random) -> str:
    number = random.choice((random.randint(1, 99), random.randint(1, 999), 5 * random.randint(1, 19)))
    form = random.choice(("{}%", "-{}%", "+{}%", "${}", "${}.99", "{}", "#{}", "No. {}", "{}/7", "{}:30", "20{:02}"))
    return form.format(number)


def _words_and_number(random: Random) -> str:
    word, number = _capitalised(random, random.choice(SHORT_WORDS)), random.randint(1, 99)
    return random.choice(("{0} {1}", "{0} {1}%", "{0} ${1}", "{1} {0}", "{1}% {0}", "{0} & {0}", "{0}-{1}")).format(
        word, number
    )


def _characters(random: Random) -> str:
    length = random.randint(1, LINE_MAX_CHARACTERS)
    alphabet = random.choice((string.ascii_uppercase, string.ascii_letters, CHARACTERS))
    return " ".join("".join(random.choices(alphabet, k=length)).split()) or "X"


def _capitalised(random: Random, text: str) -> str:
    return random.choice((str.upper, str.upper, str.title, str.lower))(text)


ONSETS = (
    "b",
    "br",
    "c",
    "d",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "v",
    "z",
    "w",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
ENDS = ("", "", "n", "r", "x", "s", "t", "l", "ck", "y")
_LIST = """
sale open closed new now free today only shop store summer winter spring autumn deal deals best price hot cool
fresh food coffee tea bread cake pizza fish fruit juice milk water wine beer lunch dinner menu bar cafe hotel
room rooms home house garden flowers plants books music dance party live show film art gift gifts toys games play
kids baby shoes shirts jeans dress style fashion beauty hair nails spa gym run ride bike bikes cars drive travel
trip flight beach sun sea snow ski lake park camp hiking green eco bio city town street market farm club team win
winner prize bonus extra super mega big small mini max half double final last first week weekend day days night
hours hour early late soon here there this way next stop start go join call click save buy order book pay cash
card gold silver star king queen happy love you your our the and for all more less up down in out of to hello
welcome thanks sorry please wow yes no enjoy smile dream think learn school class study exam job jobs work hiring
office desk lamp chair sofa bed kitchen tools paint wood steel glass phone laptop camera tablet sound hear
headphones watch ring jewels bags outlet brand quality premium classic modern vintage original limited special
offer offers discount coupon code tickets event lost found
"""
WORDS = tuple(_LIST.split())
SHORT_WORDS = tuple(word for word in WORDS if len(word) <= 6)
