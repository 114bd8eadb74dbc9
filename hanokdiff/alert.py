"""A Korean disaster alert to a prompt: what is happening, to what kind of place, at what time of day.

    python -m hanokdiff.alert "[행정안전부] 오늘 14:20 전주 한옥마을 화재 발생. 인근 주민은 대피 바랍니다"
    alert: fire; place: hanok; time: day
    prompt: * on fire, in the daytime

Tables of words (alert_words.py) and five rules; no model. A wrong picture is worse than none: no guesses.

1. A drill (DRILL) is never drawn, whatever it names, unless the message says that it is none (NO_DRILL).
2. NOT_MEANT is blanked first: senders, places and words that only look like a disaster (문화재, "연기" =
   put off).
3. Every disaster word gets a status from what follows it, up to the next one. Over or denied (OVER) beats
   all; else the first of advice (ADVICE), a danger (RISK) or happening (EVENT; forecasts and warnings are)
   counts; in a sentence with OTHER_NEWS it is advice. In a list ("산사태, 침수 우려") the last one's counts,
   but what was MEASURED happens ("시간당 72mm 강한 비, 침수에 유의").
4. All that happen are drawn (태풍 + 침수), the first named leads. A mere danger is drawn only where nothing
   happens and the message calls for action (ACTION). What comes with another is left out (ABSORBS): a
   tsunami's earthquake.
5. The place is the nearest one before the disaster, else the first one after it in its sentence or the next;
   not one that people should go to or keep away from (ELSEWHERE), nor a river that may yet overflow.

kind is alert, drill, all-clear or unknown; only an alert has a prompt.
Read next: sample.py (--alert draws it), hanokdiff/tiny/scenes.py (the words that the tiny world knows).
"""

import json
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from hanokdiff import alert_words as words
from hanokdiff.alert_words import DISASTERS, PLACES, either
from hanokdiff.errors import report_errors
from hanokdiff.files import read_json
from hanokdiff.options import Options
from hanokdiff.tiny import world


@dataclass(frozen=True)
class Reading:
    """What was understood. `why` names what was not found, or the reason why nothing is to be drawn."""

    text: str
    kind: str  # alert, drill, all-clear or unknown
    disaster: tuple[str, ...] = ()
    place: str | None = None
    time: str | None = None
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mention:
    """A word of a table in the text; a disaster also has a status: event, risk, advice, over or None."""

    start: int
    end: int
    name: str
    status: str | None = None


def read(text: str) -> Reading:
    """Understand one message."""
    text = unicodedata.normalize("NFC", text)  # macOS writes Korean in parts
    if re.search(words.DRILL, re.sub(words.NO_DRILL, " ", text)):
        return Reading(text, "drill", why=("this is a drill or a test",))
    plain = re.sub(f"{words.NO_DRILL}|{words.NOT_MEANT}", lambda m: " " * len(m[0]), text)
    disasters, all_over = find_disasters(plain), bool(re.search(words.ALL_OVER, text))
    events = [] if all_over else choose_events(plain, disasters)
    if events:
        place, time = find_place(plain, events, disasters), find_time(plain)
        missing = [what for what, value in (("kind of place", place), ("time of day", time)) if not value]
        why = tuple(f"no {what} found" for what in missing)
        return Reading(text, "alert", tuple(e.name for e in events), place, time, why)
    names = " and ".join(dict.fromkeys(d.name for d in disasters))
    if all_over or any(d.status == "over" for d in disasters):
        return Reading(text, "all-clear", why=(f"{names or 'it'} is said to be over, or not so",))
    why = f"{names} named, but nothing says that it is happening or coming" if names else "no disaster found"
    return Reading(text, "unknown", why=(why,))


def find_mentions(table: dict, text: str) -> list[Mention]:
    """Every word of the table, in the order of the text; where two overlap, the first counts."""
    matches = []
    for i, (name, (_, korean)) in enumerate(table.items()):
        matches += [(m.start(), i, m.end(), name) for m in re.finditer(either(korean), text)]
    mentions: list[Mention] = []
    for start, _, end, name in sorted(matches):
        if not mentions or start >= mentions[-1].end:
            mentions.append(Mention(start, end, name))
    return mentions


def find_disasters(text: str) -> list[Mention]:
    """Every disaster word with its status: rule 3. From the last to the first, because of lists."""
    disasters, status, following = [], None, len(text)
    for m in reversed(find_mentions(DISASTERS, text)):
        tail = text[m.end : following]
        if following == len(text) or not re.search(words.LIST, tail):
            status = status_from(tail)
        elif status != "over" and (
            re.search(words.WARNING, tail) or re.search(words.MEASURED, text[: m.start])
        ):
            status = "event"  # in a list; else the next one's status
        disasters.insert(0, Mention(m.start, m.end, m.name, status))
        following = m.start
    return disasters


def status_from(tail: str) -> str | None:
    """The status of a disaster by the words that follow it."""
    over = re.search(words.OVER, tail)
    if over:
        return "event" if re.search(words.AGAIN, tail[over.end() :]) else "over"
    sentence = re.split(words.SENTENCE, tail.rstrip())[0] or tail[:1]
    if re.search(words.OTHER_NEWS, sentence):
        return "advice"
    patterns = {"advice": words.ADVICE, "risk": words.RISK, "event": words.EVENT}
    matches = {status: m.start() for status, p in patterns.items() if (m := re.search(p, sentence))}
    return min(matches, key=matches.get, default=None)


def choose_events(text: str, disasters: list[Mention]) -> list[Mention]:
    """What is to be drawn: rule 4."""
    over = {d.name for d in disasters if d.status == "over"}

    def first_of_each(status: str) -> dict[str, Mention]:
        return {d.name: d for d in reversed(disasters) if d.status == status and d.name not in over}

    chosen = first_of_each("event")
    if not chosen and re.search(words.ACTION, text):
        chosen = first_of_each("risk")
    absorbed = set().union(*(words.ABSORBS.get(name, ()) for name in chosen))
    return sorted((d for name, d in chosen.items() if name not in absorbed), key=lambda d: d.start)


def find_place(text: str, events: list[Mention], disasters: list[Mention]) -> str | None:
    """Where it happens: rule 5."""
    ends = [d.start for d in disasters] + [len(text)]
    dangers = [d.start for d in disasters if d.status != "event" and d not in events]
    places = []
    for p in find_mentions(PLACES, text):
        end = min(end for end in ends if end >= p.end)
        tail = text[p.end : end]
        may_overflow = p.name == "river" and end in dangers and not tail.strip()  # "하천 범람에 유의"
        if not may_overflow and not re.search(words.ELSEWHERE, tail):
            places.append(p)
    for event in events:
        before = [p for p in places if p.start <= event.start]
        while len(before) > 1 and before[-1].name in words.GENERIC:
            if re.search(words.NEAR, text[before[-2].end :]):
                break
            before.pop()
        if before:
            return before[-1].name
    if any(event.name in words.AT_SEA for event in events):
        return "coast"
    start = events[0].start
    sentence_ends = [m.start() for m in re.finditer(words.SENTENCE, text[start:])]
    limit = start + sentence_ends[1] if len(sentence_ends) > 1 else len(text)
    return next((p.name for p in places if start < p.start < limit), None)


def find_time(text: str) -> str | None:
    """The time of day: that of "현재" (now), else the first that is not an end or a time of sending."""
    times = []
    for m in re.finditer(rf"(?P<part>{words.PART})? ?(?P<hour>{words.CLOCK})|(?P<alone>{words.PART})", text):
        tail, part, hour = text[m.end() :], m["part"] or m["alone"], m["hour"]
        if re.search(r"^[\d:시분 ]*(?:까지|발표|발송)", tail):
            continue
        now = re.search(r"^[\d:시분 ]*(?:현재|기준)", tail) or text[: m.start()].rstrip().endswith("현재")
        time = words.HOURS[hour_of_24(part, int(hour))] if hour else words.PARTS[part]
        times.append((not now, m.start(), time))
    return min(times)[2] if times else None


def hour_of_24(part: str | None, hour: int) -> int:
    """오후 3시 is 15 o'clock, 밤 12시 midnight, 새벽 3시 three; else it is the 24-hour clock."""
    if hour == 12:
        return 0 if part in ("밤", "오전", "새벽") else 12
    later = part in ("오후", "저녁") or (part == "낮" and hour < 7) or (part == "밤" and hour > 5)
    return hour + 12 if later and hour < 12 else hour


def drawable(text: str) -> Reading:
    """Read a message that is to be drawn; refuses what is no alert."""
    reading = read(text)
    if reading.kind != "alert":
        raise ValueError(f'no picture ({reading.kind}): {reading.why[0]} in "{text}"')
    return reading


def tiny_words() -> set[str]:
    """All words that the tiny world's captions may have, but for a plain house's attributes."""
    sentences = [sentence for group in world.SENTENCES.values() for sentence in group]
    return set(" ".join([*sentences, *world.EXTRA_WORDS.values(), *world.GENERIC, *world.NAMED]).split())


def unknown(phrase: str, known: set[str] | None) -> list[str]:
    """The words that the model has never seen; `known` is None for a model that has seen them all."""
    parts = [part.strip(",") for part in phrase.replace("{place}", "").split()]
    return [] if known is None else [part for part in parts if part not in known]


def place_words(reading: Reading, word: str | None, known: set[str] | None) -> tuple[str, list[str]]:
    """The place in English and notes on it; a hanok is the pseudo word, if the model has one."""
    if reading.place == "hanok" and word:
        return word, []
    place, notes = PLACES[reading.place][0] if reading.place else words.ANYWHERE, []
    if reading.place == "hanok":
        notes.append("no word for the hanok was learnt, and the untouched model mistakes it for other houses")
    if unknown(place, known):
        notes.append(f'the tiny world does not know "{place}", so it is "{words.ANYWHERE}"')
        place = words.ANYWHERE
    return place, notes


def prompt(reading: Reading, word: str | None = "*", known: set[str] | None = None) -> tuple[str, list[str]]:
    """An alert in English, and notes on what it leaves out. `word` is the pseudo word of the hanok, if there
    is one; `known` are the only words that the model knows (tiny_words())."""
    place, notes = place_words(reading, word, known)
    lead = next((name for name in reading.disaster if not unknown(DISASTERS[name][0], known)), None)
    if lead is None:
        raise ValueError(f"the tiny world cannot draw {' and '.join(reading.disaster)}; use another --model")
    rest = [name for name in reading.disaster if name != lead]
    if reading.time:
        rest.append(words.TIMES[reading.time])
    notes += [f'the tiny world does not know "{x}", which is left out' for x in rest if unknown(x, known)]
    parts = [DISASTERS[lead][0].format(place=place), *(x for x in rest if not unknown(x, known))]
    return ", ".join(parts), notes


def two_lines(reading: Reading, prompt: str | None, notes: list[str]) -> str:
    """The reading for a person: what was understood, and what is to be drawn."""
    if prompt is None:
        return f"{reading.kind}: {'; '.join(reading.why)}\nno prompt: nothing is to be drawn"
    understood = f"place: {reading.place or 'not named'}; time: {reading.time or 'not named'}"
    remarks = f" ({'; '.join(notes)})" if notes else ""
    return f"alert: {' + '.join(reading.disaster)}; {understood}\nprompt: {prompt}{remarks}"


def as_json(reading: Reading, prompt: str | None, notes: list[str]) -> str:
    """The reading as one line of JSON."""
    row = dict(kind=reading.kind, disaster=list(reading.disaster), place=reading.place, time=reading.time)
    row |= dict(prompt=prompt, notes=[*reading.why, *notes], alert=reading.text)
    return json.dumps(row, ensure_ascii=False)


def word_of(file: Path) -> str:
    """The pseudo word of a trained file, which stands in the config.json of its run."""
    for folder in (file, *file.parents[:2]):
        config = folder / "config.json"
        word = read_json(config).get("token") if config.is_file() else None
        if word and isinstance(word, str):
            return word
    raise ValueError(f"--adapter {file}: no run's config.json beside it names its word; give it as --token")


@report_errors
def main(argv=None) -> None:
    p = Options(prog="python -m hanokdiff.alert", description=__doc__)
    p.add_argument("text", help="the message")
    p.add_argument("--token", help='the pseudo word of the hanok; "" if none was learnt (default: *)')
    p.add_argument("--adapter", type=Path, metavar="FILE", help="a run or its file, whose word it is instead")
    p.add_argument("--json", action="store_true", help="one line of JSON, the message in it")
    args = p.parse_args(argv)
    if not args.text.strip():
        raise ValueError("the message is empty; give its text, in quotes")
    if args.token is not None and args.adapter:
        raise ValueError("--token and --adapter both give the pseudo word; leave one out")
    word = word_of(args.adapter) if args.adapter else "*" if args.token is None else args.token
    reading = read(args.text)
    english, notes = prompt(reading, word) if reading.kind == "alert" else (None, [])
    if not args.json:
        print(two_lines(reading, english, notes))
        return
    line = as_json(reading, english, notes)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal without Korean: JSON has escapes of its own
        line = json.dumps(json.loads(line))
    print(line)


if __name__ == "__main__":
    sys.exit(main())
