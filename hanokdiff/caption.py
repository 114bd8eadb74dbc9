"""Captions for photos: BLIP writes NAME.txt beside each, and the subject's phrase becomes the pseudo word.

    python -m hanokdiff.caption PHOTOS                                          captions what has none
    python -m hanokdiff.caption PHOTOS --replace "a building with a roof" "*"   and puts in the pseudo word,
                                                                                which --token may name too

Both parts go on where they stopped: a caption that exists is kept, one that has the pseudo word is left as
it is. If every photo has a caption, BLIP is not opened. Training can do the second part on the fly (its own
--replace, the exact phrase only) and leaves the files alone; here they are changed, variants included:

    a, an and the are one word; so are building, house, home and structure
    up to two more words may follow an article: "a large house with a tiled roof" is "a building with a roof"
    but none that the caption must keep: small words (of, with ...), anything in -ing ("a burning building"),
    weather and state ("a snow covered roof"): such captions are listed as not matched; --exact: no variants

BLIP is asked as the WebUI asks it: "a picture of", 24 to 48 tokens, one beam, the photo squashed to a square.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hanokdiff.device import choose_device, to_device
from hanokdiff.errors import report_errors
from hanokdiff.files import write_text
from hanokdiff.images import read_photo
from hanokdiff.models.tokens import contains_word, word_pattern
from hanokdiff.options import Options, Replace
from hanokdiff.pretrained import open_pretrained
from hanokdiff.scoring.clip import MEAN, STD
from hanokdiff.training.dataset import Captions, photo_files, read_caption

BLIP = "Salesforce/blip-image-captioning-base"
PROMPT = "a picture of"
LOOP = re.compile(  # three words or more twice, at most one between; one or two words three times
    r"\b(\w+(?:\W+\w+){2,}?)\W+(?:\w+\W+)?\1\b" r"|\b(\w+(?:\W+\w+)?)(\W+)\2\3\2\b", re.IGNORECASE
)
ARTICLES = ("a", "an", "the")
BUILDINGS = ("building", "house", "home", "structure")
KEEP = (  # alternatives of a pattern
    "a|an|the|and|or|of|in|on|at|by|to|from|with|for|near|under|over|is|are"
    r"|covered|snowy|burnt|burned|flooded|wet|lit|dark|\w+ing"
)
OUTCOMES = (
    "captioned", "looped and captioned again", "to be captioned", "captioned before", "unreadable",
    "with an unreadable caption", "about which BLIP said nothing", "sharing the caption of one before",
    "not reached yet",
)  # fmt: skip
Outcomes = dict[str, list[Path]]  # outcome -> photos; every photo has one


class Blip:
    """Pictures in, captions out. A folder (config.json, weights, tokenizer) or a hub id."""

    def __init__(self, name: str, device, dtype: str, min_length: int, max_length: int, beams: int):
        self.device, self.dtype, reason = choose_device(device, dtype)
        self.min_length = min_length
        self.options = dict(max_length=max_length, num_beams=beams, do_sample=False)
        network, self.tokenizer = open_blip(name)
        self.model = network.to(self.device, self.dtype).eval().requires_grad_(False)
        self.size = network.config.vision_config.image_size
        ids = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        self.prompt = ids  # (1, T): start, a picture of, end
        text, tokens = network.config.text_config, len(self.tokenizer)
        if self.tokenizer.unk_token_id in self.prompt or tokens > text.vocab_size:
            has = f'it has {tokens} tokens and reads "{PROMPT}" as {self.prompt[0].tolist()}'
            raise ValueError(f"the tokenizer of {name} does not fit it: {has}; give a complete BLIP model")
        if max_length > (most := text.max_position_embeddings):
            problem = f"is more than the {most} tokens that {name} knows"
            raise ValueError(f"--max-length {max_length} {problem}; lower it")
        tqdm.write(f"BLIP {name} on {reason}")

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, s, s), squashed, not cropped: equal to transformers' processor, which requires torchvision."""
        x = np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return torch.from_numpy((x - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)

    def captions(self, pixels: dict[Path, Tensor]) -> Iterator[tuple[Path, str, bool]]:
        """(photo, caption, whether it looped at first). The minimum length is what makes captions loop, so
        those are generated again with a lower one and no pair of words twice."""
        texts = dict(zip(pixels, self.generate(list(pixels.values()), min_length=self.min_length)))
        looped = [photo for photo, text in texts.items() if LOOP.search(text)]
        if looped:
            short = dict(min_length=min(8, self.min_length), no_repeat_ngram_size=2)
            texts |= zip(looped, self.generate([pixels[photo] for photo in looped], **short))
        return ((photo, text, photo in looped) for photo, text in texts.items())

    @torch.inference_mode()
    def generate(self, pixels: list[Tensor], **how) -> list[str]:
        """Captions without the prompt; `how` are options of transformers' generate, whose lengths count the
        prompt. The model puts its own start token in front of the prompt and drops the end token."""
        prompt = to_device(self.prompt.repeat(len(pixels), 1), self.device)  # (B, T)
        images = to_device(torch.stack(pixels), self.device).to(self.dtype)
        ids = self.model.generate(images, prompt, torch.ones_like(prompt), **self.options, **how)
        texts = self.tokenizer.batch_decode(ids[:, prompt.shape[1] - 1 :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def open_blip(name: str):
    """(BlipForConditionalGeneration, tokenizer). A folder that exists comes first, then the hub."""
    kinds = "BlipForConditionalGeneration", "AutoTokenizer"
    return open_pretrained(name, *kinds, option="--blip", whole="a whole BLIP model", example=BLIP)


def find_uncaptioned(folder: Path, overwrite: bool, outcomes: Outcomes) -> tuple[list[Path], dict[Path, str]]:
    """The photos that need a caption, and the captions that exist, by their file."""
    try:
        photos = sorted(photo_files(folder))
    except ValueError as e:
        raise ValueError(str(e).removeprefix("--data ")) from None
    todo, texts, in_cp949, captions = [], {}, [], Captions(folder)
    for photo in photos:
        path = captions.file(photo.name) or photo.with_suffix(".txt")
        if path in texts:  # a.jpg and a.png
            outcomes["sharing the caption of one before"].append(photo)
            continue
        texts[path], note = ("", "") if overwrite or not path.is_file() else existing_caption(path)
        if note:
            in_cp949.append(path)
        if texts[path]:
            outcomes["captioned before"].append(photo)
        elif texts[path] is None:
            outcomes["with an unreadable caption"].append(photo)
        else:
            todo.append(photo)
    if in_cp949:
        print(f"note: {counted(in_cp949, 'captions in cp949 instead of UTF-8')}; read all the same")
    return todo, {path: text for path, text in texts.items() if text}


def existing_caption(path: Path) -> tuple[str | None, str]:
    """The caption in a file, "" if it is empty, None if it cannot be read; and a note if not in UTF-8."""
    try:
        return read_caption(path)
    except ValueError as e:
        print(f"left alone: {e}")
        return None, ""


def write(path: Path, text: str) -> None:
    """Whole or not at all, and with the same line end on every system."""
    write_text(path, text + "\n", newline="\n")


def caption(todo: list[Path], blip: Callable[[], Blip], batch_size: int, outcomes: Outcomes) -> dict:
    """Caption the photos, write the files, return {file: text}; `blip()` opens it at the first one."""
    texts = {}
    with tqdm(total=len(todo), desc="captions", unit="photo", disable=None) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            pixels = {photo: blip().pixels(image) for photo, image in readable(batch, outcomes)}
            for photo, text, looped in blip().captions(pixels) if pixels else ():
                if text:
                    texts[photo.with_suffix(".txt")] = text
                    write(photo.with_suffix(".txt"), text)
                outcome = "looped and captioned again" if looped else "captioned"
                outcomes[outcome if text else "about which BLIP said nothing"].append(photo)
            bar.update(len(batch))
    return texts


def readable(photos: list[Path], outcomes: Outcomes) -> Iterator[tuple[Path, Image.Image]]:
    """(file, picture) of the photos that can be read."""
    for photo in photos:
        try:
            image, _ = read_photo(photo)
        except ValueError as e:
            tqdm.write(f"skipped: {e}")
            outcomes["unreadable"].append(photo)
            continue
        yield photo, image


def variants(phrase: str) -> re.Pattern:
    """Matches a phrase, in any case and white space, and its variants (see the module's docstring)."""
    article = rf"(?:{'|'.join(ARTICLES)})(?:\s+(?!(?:{KEEP})\b)[\w'-]+){{0,2}}"
    same = dict.fromkeys(ARTICLES, article) | dict.fromkeys(BUILDINGS, f"(?:{'|'.join(BUILDINGS)})")
    words = phrase.lower().split()
    before = r"\b" if re.match(r"\w", words[0]) else ""
    after = r"\b" if re.search(r"\w$", words[-1]) else ""
    return re.compile(before + r"\s+".join(same.get(w, re.escape(w)) for w in words) + after, re.IGNORECASE)


def replace(texts: dict[Path, str], phrase: str, word: str, exact: bool, dry: bool) -> None:
    """Put the pseudo word in the phrase's place, in the files; report what was found, and where nothing."""
    pattern, found, missed = word_pattern(phrase) if exact else variants(phrase), Counter(), []
    todo = {path: text for path, text in texts.items() if not contains_word(text, word)}
    for path, text in todo.items():
        hits = pattern.findall(text)
        found.update(" ".join(hit.lower().split()) for hit in hits)
        if not hits:
            missed.append(path)
        elif not dry:
            write(path, pattern.sub(lambda _: word, text))
    for hit, count in found.most_common():
        print(f"{count:5} x {hit!r} {'is to become' if dry else 'became'} {word!r}")
    for path in missed:
        print(f"not matched: {path.name!r}, {texts[path]!r}")
    changed = f"{len(todo) - len(missed)} captions {'to be ' if dry else ''}replaced"
    print(f"{phrase!r}: {changed}; {len(texts) - len(todo)} had {word!r} already; {len(missed)} not matched")
    if texts and len(missed) == len(texts):
        what, example = repr(phrase) + ("" if exact else " or a variant of it"), repr(texts[missed[0]])
        none = f"no caption contains {what}, for example {example}"
        raise ValueError(f"{none}; give the phrase that means your subject")


def options() -> Options:
    p = Options("hanokdiff.caption", description=__doc__)
    add = p.add_argument
    add("folder", metavar="FOLDER", type=Path, help="photos; their captions are NAME.txt beside them")
    replace_help = "put the pseudo word, --token or WORD, in PHRASE's place in all captions"
    add("--replace", nargs=2, action=Replace, metavar=("PHRASE", "[WORD]"), help=replace_help)
    add("--token", default="*", help="the pseudo word (default: *)")
    add("--exact", action="store_true", help="with --replace: the phrase itself, no variants")
    add("--overwrite", action="store_true", help="caption all photos anew; stopped, it starts over")
    add("--dry-run", action="store_true", help="say what is to be done; write nothing, open no BLIP")
    add("--blip", metavar="MODEL", default=BLIP, help=f"a folder or a hub id (default: {BLIP})")
    add("--min-length", type=int, default=24, help="tokens, those of the prompt included (default: 24)")
    add("--max-length", type=int, default=48, help="tokens at most (default: 48)")
    add("--beams", type=int, default=1, help="captions followed up at once (default: 1)")
    add("--batch-size", type=int, default=16, help="photos at once (default: 16)")
    add("--device", help="cuda, cpu, ... (default: the first GPU, else the CPU)")
    add("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto, bf16 on GPUs)")
    return p


def check(args) -> None:
    """Refuse what makes no sense, before anything is read."""
    for name, least in (("batch_size", 1), ("beams", 1), ("min_length", 0), ("max_length", 8)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be {least} or more")
    if args.min_length > args.max_length:
        more = f"--min-length {args.min_length} is more than --max-length {args.max_length}"
        raise ValueError(f"{more}; lower it")
    if args.replace is not None and not (args.replace.strip() and args.token.strip()):
        example = '"a building with a roof" "*"'
        raise ValueError(f"--replace needs a phrase and a word, such as {example}; one is empty")
    if args.exact and not args.replace:
        raise ValueError("--exact is about --replace, which is not there; leave it out")


def counted(paths: list[Path], what: str) -> str:
    return f"{len(paths)} {what} ({paths[0].name!r}{', ...' if paths[1:] else ''})"


@report_errors
def main(argv=None) -> None:
    args = options().parse_args(argv)
    check(args)
    outcomes: Outcomes = {what: [] for what in OUTCOMES}
    todo, texts = find_uncaptioned(args.folder, args.overwrite, outcomes)
    model = (args.blip, args.device, args.dtype, args.min_length, args.max_length, args.beams)
    try:
        if args.dry_run:
            outcomes["to be captioned"] = [photo for photo, _ in readable(todo, outcomes)]
        else:
            texts |= caption(todo, cache(lambda: Blip(*model)), args.batch_size, outcomes)
        if args.replace:
            replace(texts, args.replace, args.token, args.exact, args.dry_run)
    finally:  # interrupted or not: what is done is done, and the same command goes on from here
        done = set().union(*outcomes.values())
        outcomes["not reached yet"] = [photo for photo in todo if photo not in done]
        total = sum(map(len, outcomes.values()))
        parts = "; ".join(counted(photos, what) for what, photos in outcomes.items() if photos)
        dry = "dry run, nothing written: " if args.dry_run else ""
        print(f"{dry}{total} photos in {args.folder}: {parts}")
    bad = outcomes["unreadable"] + outcomes["with an unreadable caption"]
    if len(bad) == total:
        problem = f"none of the {total} photos in {args.folder} can be used, {bad[0].name!r} first"
        raise ValueError(f"{problem}; what is wrong with each is told above")


if __name__ == "__main__":
    sys.exit(main())
