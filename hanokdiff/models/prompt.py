"""The WebUI's prompt language: a text becomes pieces with weights, token ids become chunks of 75.

    a (castle) in the [snow]          castle times 1.1, snow divided by 1.1; nested ones multiply
    a barn, (fire:1.4)                times 1.4; round brackets only
    \\( \\) \\[ \\] \\\\                  the characters themselves; before anything else a backslash goes
    a castle BREAK a dragon           the rest goes to the next chunk

The encoder reads 75 tokens at a time; longer prompts are cut into chunks, each read alone, laid end to end.
"""

import re

ROUND, SQUARE = 1.1, 1 / 1.1
COMMA_BACK = 20  # tokens: a chunk may end early at a comma this near, so that no phrase is torn
# an escaped character | an opening bracket | ":1.2)" | a closing bracket | plain text | a lone \ or :
MARKS = re.compile(r"\\[()\[\]\\]|[(\[]|:\s*[+-]?[.\d]+\s*\)|[)\]]|[^\\()\[\]:]+|[\\:]")
BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse_emphasis(text: str) -> list[tuple[str, float] | None]:
    """Pieces (text, weight) in order; None is a BREAK. Neighbours of one weight are joined; a bracket that is
    never closed reaches to the end, one that was never opened is a plain character."""
    pieces: list = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket still open began

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [p and (p[0], p[1] * factor) for p in pieces[start:]]

    for mark in MARKS.findall(text):
        number = number_in(mark) if mark[0] == ":" and mark[-1] == ")" and opened["("] else None
        if mark[0] == "\\":
            pieces.append((mark[1:], 1.0))
        elif mark in opened:
            opened[mark].append(len(pieces))
        elif number is not None:
            weigh(opened["("].pop(), number)
        elif mark == ")" and opened["("]:
            weigh(opened["("].pop(), ROUND)
        elif mark == "]" and opened["["]:
            weigh(opened["["].pop(), SQUARE)
        else:
            for i, part in enumerate(BREAK.split(mark)):
                pieces += [None] * (i > 0) + [(part, 1.0)]
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[kind]:
            weigh(start, factor)
    return join(pieces)


def number_in(mark: str) -> float | None:
    try:
        return float(mark[1:-1])
    except ValueError:  # such as "1.2.3": then it is text
        return None


def join(pieces: list) -> list:
    out: list = []
    for piece in pieces:
        if piece and out and out[-1] and out[-1][1] == piece[1]:
            out[-1] = (out[-1][0] + piece[0], piece[1])
        else:
            out.append(piece)
    return out or [("", 1.0)]


def escape_prompt(text: str) -> str:
    """The same text as a prompt in which brackets are only brackets, BREAK and AND are words."""
    text = re.sub(r"([()\[\]\\])", r"\\\1", text)
    return re.sub(r"\bAND\b", r"A\\ND", re.sub(r"\bBREAK\b", r"B\\REAK", text))


def split_chunks(units: list, room: int, comma: int) -> list[tuple[list[int], list[float]]]:
    """Ids in chunks of at most `room`. A unit is what must stay together: one token, or all vectors of a
    pseudo word, with its weight; None ends a chunk."""
    done, ids, weights, last_comma = [], [], [], -1

    def close(at: int) -> None:
        nonlocal ids, weights, last_comma
        done.append((ids[:at], weights[:at]))
        ids, weights, last_comma = ids[at:], weights[at:], -1

    for unit in units:
        if unit is None:
            close(len(ids))
            continue
        own, weight = unit
        if own == [comma]:
            last_comma = len(ids)
        elif len(ids) == room and last_comma >= 0 and room - last_comma <= COMMA_BACK:
            close(last_comma + 1)
        if len(ids) + len(own) > room:
            close(len(ids))
        ids, weights = ids + own, weights + [weight] * len(own)
    if ids or not done:
        close(len(ids))
    return done
