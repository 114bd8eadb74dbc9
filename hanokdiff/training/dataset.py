"""Photos and captions: from a folder of whatever people have to latents and prompts.

One reader for all methods: upright, RGB, cropped, never squashed; nothing is skipped or altered in silence.

Shapes:  N photos of H x W pixels;  B pictures of a batch;  h x w the latent.
"""

import csv
import functools
import hashlib
import io
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from hanokdiff.device import to_device
from hanokdiff.files import parse_json, read_text
from hanokdiff.images import SUFFIXES, crop, listed, read_photo
from hanokdiff.models.pipeline import to_tensor
from hanokdiff.models.tokens import contains_word, word_pattern
from hanokdiff.training import buckets

Log = Callable[[str], None]
LOSSY = 0.1  # share of a photo that may be cropped away without a word


@dataclass
class Photo:
    """One training example before encoding."""

    name: str
    image: Image.Image  # RGB, upright, in one of the sizes that are trained at
    caption: str | None
    changed: str  # what the reader did, "" if nothing: "rotated by EXIF, enlarged"
    repeats: int = 1  # how often it comes in one pass, against the others: of a folder 10_NAME 10
    cut: float = 0.0  # the share that was cropped away
    path: Path | None = None  # names recur, in kohya's folders


# --------------------------------------------------------------------------------------------------- one file


def read_caption(path: str | Path) -> tuple[str, str]:
    """A caption file -> its text on one line, and a note if it was not UTF-8."""
    text, note = read_text(path)
    return " ".join(text.split()), note


def same_name(name: str) -> str:
    """Equal for names that people hold for equal: a Mac has another normal form, a camera capitals."""
    return unicodedata.normalize("NFC", name).casefold()


class Captions:
    """A folder's captions: NAME.txt or NAME.caption, or NAME.jpg.txt, beside the picture NAME.jpg, whatever
    the capitals or the normal form (kohya_ss#927, #1370); else metadata.jsonl, as datasets' imagefolder and
    kohya's scripts have it: {"file_name": "NAME.jpg", "text": "..."}, a line each; or the same as a table,
    metadata.csv or captions.csv."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.lines = folder, {}, {}
        names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
        for name in names:
            stem, _, ending = name.rpartition(".")
            if ending.lower() in ("txt", "caption") and not stem.startswith("."):
                self.files.setdefault(same_name(stem), name)
        if "metadata.jsonl" in names:
            text, _ = read_text(folder / "metadata.jsonl")
            for line in filter(str.strip, text.splitlines()):
                self.add_row(parse_json(line, folder / "metadata.jsonl"))
        for name in (n for n in ("metadata.csv", "captions.csv") if n in names):
            text, _ = read_text(folder / name)
            try:
                for row in csv.DictReader(io.StringIO(text), skipinitialspace=True):
                    self.add_row(row)
            except csv.Error as e:
                raise ValueError(f"{folder / name} is not a table ({e}); save it as CSV in UTF-8") from None

    def add_row(self, row: dict) -> None:
        """A picture's name and its caption, under any of the names that tools give them."""
        name, text = (
            next((row[k] for k in keys if isinstance(row.get(k), str)), None)
            for keys in (("file_name", "image", "image_file", "file"), ("text", "caption", "prompt"))
        )
        if name and text:
            self.lines[same_name(Path(name.replace("\\", "/")).name)] = text

    def file(self, name: str) -> Path | None:
        """The caption file of a picture."""
        keys = (same_name(Path(name).stem), same_name(name))
        return next((self.folder / self.files[key] for key in keys if key in self.files), None)

    def of(self, name: str) -> tuple[str, str]:
        """A picture's caption ("" without any) and a note on how it was read."""
        if file := self.file(name):
            return read_caption(file)
        return " ".join(self.lines.get(same_name(name), "").split()), ""

    def shared(self, names: list[str]) -> list[str]:
        """The first two pictures that have one caption file."""
        seen: dict[str, str] = {}
        for name in names:
            key = same_name(Path(name).stem)
            if key in self.files and key in seen:
                return [seen[key], name]
            seen[key] = name
        return []

    def without_photo(self, names: set[str]) -> list[str]:
        """The caption files and lines that belong to none of these pictures."""
        whole = {same_name(n) for n in names}
        stems = whole | {same_name(Path(n).stem) for n in names}
        lost = [file for key, file in self.files.items() if key not in stems]
        return lost + [name for name in self.lines if name not in whole]


# --------------------------------------------------------------------------------------------------- a folder


def load_photos(
    source: str | Path | Callable,  # or a function that draws them, such as tiny.world.photos
    resolution: int,
    images: int | None = None,
    held_out: int = 0,
    log: Log = print,
    option: str = "--data",  # what named the folder, for messages
    photo_set: int = 0,  # 1, 2, ... take the photos in other orders; those held out stay the same
    step: int | None = None,  # pixels by which sizes that are not square differ; None: all become squares
) -> tuple[list[Photo], list[Photo]]:
    """The first `images` readable ones of a folder (None: all) in its fixed order, and its last `held_out`,
    which are not among them."""
    if images is not None and images < 1:
        raise ValueError(f"--images {images}: at least 1 is needed; leave it out to take them all")
    if callable(source):
        source = functools.partial(source, photo_set=photo_set) if photo_set else source
        photos = drawn_photos(source, images or 50, resolution, False)
        aside = drawn_photos(source, held_out, resolution, True)
        log(summary(photos, "drawn photos of a hanok") + held_out_note(aside))
        return photos, aside
    files = photo_files(Path(source), option)
    captions = functools.cache(Captions)  # of each folder
    shapes = buckets.sizes(resolution, step) if step else [(resolution, resolution)]
    aside, _ = read_until(held_out, files[::-1], shapes, lambda _: None, captions)  # unreadable: see below
    taken = {photo.path for photo in aside}
    rest = [f for f in files if f not in taken]
    if photo_set:
        rest.sort(key=lambda f: name_hash(f"{photo_set} {f.name}"))
    photos, unreadable = read_until(images, rest, shapes, log, captions)
    if len(photos) < (images or 1) or len(aside) < held_out:
        wanted = {"--images": images, "--held-out": held_out}
        asked = " and ".join(f"{name} {n}" for name, n in wanted.items() if n)
        less = f"lower {asked.split()[0]} or " if asked and (photos or aside) else ""
        has = f"{source} has {len(photos) + len(aside)} readable photos (and {len(unreadable)} unreadable)"
        mend = f", or mend these: {unreadable[0]}" if unreadable else ""
        raise ValueError(f"{asked + ', but ' if asked else ''}{has}; {less}add photos{mend}")
    bad = f"; {len(unreadable)} unreadable" if unreadable else ""
    folders = sorted({f.parent for f in files})
    lost = [x for d in folders for x in captions(d).without_photo({f.name for f in files if f.parent == d})]
    if lost:
        log(f"{len(lost)} captions fit no picture, such as {lost[0]!r}: give them their pictures' names")
    several = [captions(d).shared([f.name for f in files if f.parent == d]) for d in folders]
    if several := next(filter(None, several), None):
        log(f"two pictures share one caption: {' and '.join(several)}; is that meant?")
    if lossy := [f"{p.name} {100 * p.cut:.0f} %" for p in photos if p.cut > LOSSY]:
        more = f" and {len(lossy) - 9} more" if len(lossy) > 9 else ""
        log(f"cropped by more than {100 * LOSSY:.0f} %: {', '.join(lossy[:9])}{more}")
    shown = Counter(p.image.size for p in photos)
    if len(shown) > 1:
        log("sizes: " + ", ".join(f"{w}x{h} {n} times" for (w, h), n in shown.most_common()))
    # each as often as its folder's number says, against the others'
    common = math.gcd(*(p.repeats for p in photos)) or 1
    times = [p.repeats // common for p in photos]
    out = [p for k in range(max(times)) for p, n in zip(photos, times) if n > k]
    often = f"; {len(out)} with their folders' repeats" if len(out) > len(photos) else ""
    log(summary(photos, f"photos from {source}") + bad + often + held_out_note(aside))
    return out, aside


def held_out_note(photos: list[Photo]) -> str:
    return f"; {len(photos)} held out: {', '.join(p.name for p in photos)}" if photos else ""


def drawn_photos(draw: Callable, n: int, resolution: int, held_out: bool) -> list[Photo]:
    """The embedded photos, or those that no method sees."""
    size, pictures = (resolution, resolution), draw(n, held_out) if n else []
    return [Photo(f"hanok {i}", crop(image, size), text, "") for i, (image, text) in enumerate(pictures)]


def read_until(images: int | None, files: list[Path], shapes, log: Log, captions: Callable) -> tuple:
    """The first `images` that can be read, and what is wrong with those that could not be."""
    photos, unreadable = [], []
    for path in files:
        if len(photos) == images:
            break
        try:
            photos.append(load_photo(path, shapes, captions(path.parent)))
        except ValueError as e:
            log(f"Skipped, going on with the others: {e}")
            unreadable.append(str(e))
    return photos, unreadable


def photo_files(folder: Path, option: str = "--data") -> list[Path]:
    """The picture files in a folder, in a fixed, nested order: the first 5 are among the first 50.

    Sorted by a hash of the name: shuffled, yet the same however the folder is listed, and adding or removing
    one leaves the others in order. NFC, because a Mac writes Korean names in another normal form. A folder
    without pictures may hold kohya's: 10_NAME, 5_OTHER, the number is the repeats (kohya_ss#1725)."""
    if not os.path.isdir(folder):  # pathlib's own raises at a name that is too long
        what = "not a folder" if os.path.exists(folder) else "no such folder"
        raise ValueError(f"{option} {folder}: {what}; name one that holds photos")
    inside = sorted(folder.iterdir())
    numbered = [d for d in inside if NUMBERED.match(d.name) and d.is_dir()]
    files = pictures_of(inside) or [f for d in numbered for f in pictures_of(d.iterdir())]
    if not files:
        kinds = " ".join(sorted(SUFFIXES))
        only = "of its subfolders only those called 10_NAME, a number and a name, are searched"
        raise ValueError(f"{option} {folder}: no pictures in it ({kinds}); {only}")
    return sorted(files, key=lambda f: name_hash(f.name))


NUMBERED = re.compile(r"(\d{1,4})_(.+)")  # kohya's folder: how often its pictures come, what they show


def pictures_of(files: Iterable[Path]) -> list[Path]:
    return [f for f in files if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]


def name_hash(name: str) -> bytes:
    return hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")).digest()


def load_photo(path: Path, shapes: list[buckets.Size], captions: Captions | None = None) -> Photo:
    """A picture file, cropped to the most similar of these sizes, and its caption."""
    image, note = read_photo(path)
    size = buckets.nearest(image.size, shapes)
    lost, small = buckets.cut(image.size, size), "enlarged" if min(image.size) < min(size) else ""
    caption, how = (captions or Captions(path.parent)).of(path.name)
    number = NUMBERED.match(path.parent.name)
    if number and not caption:  # kohya's: the folder's name is the caption
        caption = number[2]
    repeats = max(1, int(number[1])) if number else 1
    image = crop(image, size)
    return Photo(path.name, image, caption or None, listed(note, small, how), repeats, lost, path)


def summary(photos: list[Photo], what: str) -> str:
    """One line: how many, how many with captions, and for each thing done how often and first to which."""
    done: dict[str, list[str]] = {}
    for photo in photos:
        for note in filter(None, photo.changed.split(", ")):
            done.setdefault(note, []).append(photo.name)
    captioned = sum(photo.caption is not None for photo in photos)
    line = f"{len(photos)} {what}, {captioned} with captions"
    for note, names in done.items():
        line += f"; {len(names)} {note} ({names[0]!r}{', ...' if names[1:] else ''})"
    return line


# --------------------------------------------------------------------------------------------------- captions


def prepare_captions(photos: list[Photo], token: str, replace: str, caption: str, log=print) -> list[str]:
    """A prompt per photo: its caption with the phrase `replace` become the pseudo word; else `caption`, in
    which {token} is the pseudo word and {name} the file's name. Refuses a word that no caption contains."""
    pattern = word_pattern(replace) if replace.strip() else re.compile("(?!)")  # no phrase: match nothing
    swapped = [p.caption and pattern.subn(lambda _: token, p.caption) for p in photos]  # (text, count), None
    own = [s for s in swapped if s]
    stems = [Path(p.name).stem.replace("_", " ") for p in photos]
    default = [caption.replace("{token}", token).replace("{name}", stem) for stem in stems]
    default = [pattern.sub(lambda _: token, text) for text in default]
    if own and replace:
        counts = [count for _, count in own if count]
        had = sum(contains_word(p.caption, token) for p in photos if p.caption)
        more = f"; {had} had {token!r} already" if had else ""
        became = f"{replace!r} became {token!r} {sum(counts)} times"
        log(f"{became}, in {len(counts)} of {len(own)} captions{more}")
    if len(own) < len(photos):
        used = next(text for text, s in zip(default, swapped, strict=True) if not s)
        such = ", such as" if "{name}" in caption else ":"
        log(f"{len(photos) - len(own)} of {len(photos)} photos have no caption{such} {used!r} is used")
    captions = [text for text, _ in own] or default
    without = [text for text in captions if not contains_word(text, token)]
    if len(without) == len(captions):
        example = f"no caption contains {token!r}, for example {captions[0]!r}"
        way = "give the phrase that means your subject with --replace, or the word that is in them with"
        raise ValueError(f"{example}; {way} --token, or put {{token}} into --caption")
    if without:
        log(f"{len(without)} of {len(captions)} captions lack {token!r}, for example {without[0]!r}")
    return [s[0] if s else text for s, text in zip(swapped, default, strict=True)]


# ---------------------------------------------------------------------------------------------------- latents


SHOWN = 24


class LatentDataset:
    """Photos encoded once. `dataset[batch]` -> latents (B, 4, h, w) float32, prompts [B]."""

    def __init__(self, vae, images: list[Image.Image], prompts: list[str], flip: bool = False, device="cpu"):
        assert len(images) == len(prompts) > 0, f"{len(images)} images, {len(prompts)} prompts"
        self.prompts, self.flip, self.device = list(prompts), flip, device
        self.shown = [image.copy() for image in images[:SHOWN]]  # on the run's page
        for image in self.shown:
            image.thumbnail((128, 128))
        seen = hashlib.sha256(repr(self.prompts).encode())
        for image in images:
            seen.update(image.tobytes())
        self.hash = seen.hexdigest()[:16]  # to notice, on resume, that photos or captions have changed
        self.sizes = sorted({image.size for image in images})  # each batch is of one
        self.groups = [[i for i, image in enumerate(images) if image.size == size] for size in self.sizes]
        self.turns = buckets.Turns([len(group) for group in self.groups])
        self.follows: LatentDataset | None = None  # whose sizes these pictures take, turn by turn
        self.mean, self.std = [], []  # of each size (1 or 2, N, 4, h, w)
        for group in self.groups:
            own = [images[i] for i in group]
            ways = [own, [ImageOps.mirror(image) for image in own]] if flip else [own]
            encoded = [encode(vae, way) for way in ways]
            mean, std = (torch.stack(t).to(device) for t in zip(*encoded))
            self.mean.append(mean)
            self.std.append(std)
            bad = (~torch.isfinite(mean + std)).flatten(2).any(-1).any(0)  # (N,)
            wrong = [] if bad.is_meta else [prompts[i] for i, b in zip(group, bad.tolist(), strict=True) if b]
            if wrong:  # fp16 ends at 65504
                few = f"of {len(wrong)} of {len(group)} pictures (such as {wrong[0]!r})"
                raise ValueError(f"{few} the autoencoder makes numbers that are not finite; try --dtype fp32")

    def __len__(self) -> int:
        return len(self.prompts)

    def turn(self, step: int) -> tuple[int, int]:
        """Which size a step has, and how often it has had it before."""
        if self.follows is None:
            return self.turns.at(step)
        group, before = self.follows.turn(step)
        return self.sizes.index(self.follows.sizes[group]), before

    def __getitem__(self, batch) -> tuple[Tensor, list[str]]:
        which, order = 0, batch
        if len(self.sizes) > 1:
            which, turn = self.turn(batch.step)
            order = replace(batch, step=turn)
        group = self.groups[which]
        photos = order.photos(len(group))
        mirrored = batch.uniform("flip") < 0.5 if self.flip else torch.zeros(len(photos))
        index = to_device(mirrored.long(), self.device), to_device(torch.tensor(photos), self.device)
        mean, std = self.mean[which][index], self.std[which][index]  # (B, 4, h, w)
        return mean + std * batch.normal(mean.shape, "latent"), [self.prompts[group[i]] for i in photos]


@torch.no_grad()
def encode(vae, images: list[Image.Image], chunk: int = 4) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, each (N, 4, h, w) float32, computed in the VAE's dtype."""
    weight = next(vae.parameters())
    parts = []
    for i in tqdm(range(0, len(images), chunk), "encoding photos", leave=False, disable=None):
        pictures = torch.stack([to_tensor(image) for image in images[i : i + chunk]])
        parts.append([t.float() for t in vae.encode(to_device(pictures, weight.device).to(weight.dtype))])
    mean, std = (torch.cat(t) for t in zip(*parts))
    return mean, std
