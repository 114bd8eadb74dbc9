"""The report's words in Korean (`compare --lang ko`): korean.txt has a line ENGLISH => KOREAN for each.

In the English {} stands for any text and {n} for a number; {0}, {1}, ... in the Korean are the same in order,
each looked up itself. What is not found, such as a recipe's name, stays as it is.
"""

import re
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
PARTS = {r"\{\}": "(.*?)", r"\{n\}": r"(-?\d[\d.]*)"}


@cache
def pairs() -> list[tuple[re.Pattern, str]]:
    """(what an English text looks like, the Korean one), those with the most letters of their own first."""
    lines, out = [line.split(" => ") for line in FILE.read_text("utf-8").splitlines()], []
    for english, korean in sorted(lines, key=lambda line: -len(re.sub(r"\{n?\}", "", line[0]))):
        pattern = re.escape(english)
        for part, regex in PARTS.items():
            pattern = pattern.replace(part, regex)
        out.append((re.compile(pattern, re.DOTALL), korean))
    return out


@cache
def say(text: str) -> str:
    """A sentence, heading or word of the report in Korean; lists are looked up part by part."""
    for pattern, korean in pairs():
        if found := pattern.fullmatch(text):
            return korean.format(*map(say, found.groups()))
    for sign in ("; ", ", "):
        if sign in text:
            return sign.join(map(say, text.split(sign)))
    return text
