r"""The WebUI's prompts that change while a picture is drawn, and prompts of several parts.

    [from:to:when]  [to:when]  [from::when]    `from` up to step `when`, then `to`; an empty field is nothing
    [a|b|c]                                    one after the other, a step each
    a barn AND a fire :0.7                     parts that are guided on their own, with weights
    <lora:NAME:0.8>  <hypernet:NAME:0.8>       an artefact for this prompt alone

`when` with a point is a share of the steps (0.5: half of them; 1.0: all), without one a number of steps.
Fields may hold brackets of their own. A backslash makes [ ] : | and < plain characters; what fits no rule is
text, and `not_understood` names it. AND is composable diffusion (Liu et al. 2022, arXiv:2206.01714, eq. 11).
"""

import re

from hanokdiff.models.prompt import parse_emphasis

AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r"\s*(.*?)\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)
NUMBER = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*")
TAG = re.compile(r"(?<!\\)<(lora|hypernet):([^:<>]+)(?::([^<>]*))?>")
FOREIGN = {  # what a prompt of another tool has in it, as a regular expression -> whose it is
    r"(?<!\\)\{[^{}]*\|[^{}]*\}": "Dynamic Prompts",
    r"__[\w/-]+__": "a wildcard",
    r"(?<!\\)<\w+:[^<>]*>": "a tag",
    r"\bembedding:\S+": "ComfyUI's embedding",
    r"\w(\+{2,}|-{2,})(?!\w)|\)[+-]+(?!\w)": "InvokeAI's weight: (word:1.2) here",
    r"\bAND NOT\b": "what must not be there goes to --negative",
}


def at_steps(prompt: str, steps: int) -> list[list[tuple[str, float]]]:
    """For each step its parts (text, weight): one part without AND. The number of parts and the weights are
    the same at all steps; the texts still have their emphasis in them."""
    texts = [weighted(part) for part in AND.split(prompt)] if AND.search(prompt) else [(prompt, 1.0)]
    return [[(resolve(text, i, steps), w) for text, w in texts] for i in range(1, steps + 1)]


def weighted(part: str) -> tuple[str, float]:
    """ "a fire :0.7" -> ("a fire", 0.7); without a number the weight is 1."""
    found = WEIGHT.fullmatch(part)
    return (found[1], float(found[2])) if found else (part.strip(), 1.0)


def resolve(text: str, step: int, steps: int) -> str:
    """The text as it is read at a step (1 is the first): every [...] that edits or alternates is decided."""
    out, i = [], 0
    while i < len(text):
        end = closing(text, i) if text[i] == "[" else None
        if end is not None:
            out.append(decide(text[i + 1 : end], step, steps))
            i = end + 1
        else:
            length = 2 if text[i] == "\\" else 1
            out.append(text[i : i + length])
            i += length
    return "".join(out)


def fields_of(inside: str) -> tuple[str, list[str]]:
    """What two square brackets are: ("alternate", options), ("edit", fields) or ("emphasis", [text])."""
    options, fields = split(inside, "|"), split(inside, ":")
    if len(options) > 1 and len(fields) == 1:
        return "alternate", options
    if len(options) == 1 and len(fields) in (2, 3) and NUMBER.fullmatch(fields[-1]):
        return "edit", fields if len(fields) == 3 else ["", *fields]
    return "emphasis", [inside]


def decide(inside: str, step: int, steps: int) -> str:
    """What stands between two square brackets, as it is read at a step."""
    kind, fields = fields_of(inside)
    if kind == "alternate":
        return resolve(fields[(step - 1) % len(fields)], step, steps)
    if kind == "edit":
        before, after, when = fields
        last = int(float(when) * steps) if "." in when else int(when)  # step that still reads `before`
        return resolve(before if step <= last else after, step, steps)
    return f"[{resolve(inside, step, steps)}]"


def closing(text: str, start: int) -> int | None:
    """The place of the ] that closes the [ at `start`; None if there is none."""
    depth, i = 0, start
    while i < len(text):
        depth += {"[": 1, "]": -1}.get(text[i], 0)
        if depth == 0:
            return i
        i += 2 if text[i] == "\\" else 1
    return None


def split(text: str, mark: str) -> list[str]:
    """Split at a character that stands outside of all brackets and is not escaped."""
    out, depth, i, last = [], 0, 0, 0
    while i < len(text):
        if text[i] == mark and depth == 0:
            out.append(text[last:i])
            last = i + 1
        depth = max(0, depth + {"[": 1, "(": 1, "]": -1, ")": -1}.get(text[i], 0))
        i += 2 if text[i] == "\\" else 1
    return [*out, text[last:]]


def take_tags(prompt: str) -> tuple[str, list[tuple[str, str, float]]]:
    """A prompt without its <lora:NAME:SCALE> and <hypernet:NAME:SCALE>, and these as (kind, name, scale)."""
    tags = []
    for kind, name, scale in TAG.findall(prompt):
        if scale and not NUMBER.fullmatch(scale):
            bad = f"the scale is {scale!r}, but must be a number such as 0.8"
            raise ValueError(f"<{kind}:{name}:{scale}>: {bad}")
        tags.append((kind, name.strip(), float(scale) if scale else 1.0))
    return re.sub(r"  +", " ", TAG.sub("", prompt)).strip() if tags else prompt, tags


def plain_text(prompt: str) -> str:
    """What a prompt asks for at the end, in words alone: without weights, BREAK, tags and editing, the parts
    of AND one after the other. For CLIP, which would read the marks as words."""
    text, _ = take_tags(prompt)
    parts = [parse_emphasis(part) for part, _ in at_steps(text, 20)[-1]]
    return " ".join(", ".join("".join(p[0] if p else " " for p in part) for part in parts).split())


def not_understood(prompt: str) -> list[str]:
    """What in a prompt looks like a command of this language or another tool's, and is drawn as text."""
    text, _ = take_tags(prompt)
    found = [f"{m[0]} ({whose})" for mark, whose in FOREIGN.items() for m in re.finditer(mark, text)]
    for i, letter in enumerate(text):
        if letter == "[" and (i == 0 or text[i - 1] != "\\"):
            end = closing(text, i)
            inside = "" if end is None else text[i + 1 : end]
            if end is None:
                found.append(f"{text[i : i + 20]} (a [ that nothing closes)")
            elif fields_of(inside)[0] == "emphasis" and len(split(inside, "|")) + len(split(inside, ":")) > 2:
                found.append(f"[{inside}] (neither [from:to:when] nor [a|b])")
    return list(dict.fromkeys(found))
