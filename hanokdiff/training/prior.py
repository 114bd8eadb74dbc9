"""Class pictures: what the untouched model draws when asked for the class, so that it is not forgotten.

    L = own loss + w * class loss      prior preservation, Ruiz et al. 2022, arXiv:2208.12242, equation 2

Drawn once and kept in runs/class/MODEL, one PNG per prompt and seed: a run that is stopped loses none, and
the next run finds them.  A few hundred cost minutes on a GPU; each PNG says how long it took, so that their
time can be told apart from training's, whoever drew them.
"""

import argparse
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from hanokdiff.errors import make_folder
from hanokdiff.files import read_text, write_json
from hanokdiff.images import crop, read_photo, write_png
from hanokdiff.models import samplers
from hanokdiff.models.prompt import escape_prompt
from hanokdiff.models.tokens import word_pattern
from hanokdiff.training import distributed
from hanokdiff.training.buckets import Turns
from hanokdiff.training.dataset import LatentDataset, Photo, load_photos


def number_or_folder(text: str) -> int | Path:
    """What --class-images takes."""
    return int(text) if text.removeprefix("-").isdigit() else Path(text)


def add_options(method: Callable) -> None:
    """The options for class pictures, the same for all methods that have them."""
    method("--class-phrase", "what the subject is one of, in the class prompts (default: --replace's)")
    drawn = "how many pictures of the class the untouched model draws, 0 for none"
    method("--class-images", f"{drawn}; or a folder of your own, with captions", type=number_or_folder)
    more = "more prompts for class pictures, a file with one a line: what must not be forgotten"
    none = "none: the captions only (default: none, tiny hanokdiff/tiny/class_prompts.txt)"
    method("--class-prompts", f"{more}; {none}", type=Path)
    method("--prior-weight", "w, the weight of the class's loss; 0 is without", type=float, default=1.0)


def check(args: argparse.Namespace) -> None:
    """Refuse what does not fit together, before any work. A resumed run's folder is a text in its options."""
    if isinstance(args.class_images, str):
        args.class_images = Path(args.class_images)
    own_folder = isinstance(args.class_images, Path)
    if args.class_prompts and (own_folder or not args.class_images):
        what = "a folder, which has its own captions" if own_folder else "0"
        drawn = "--class-prompts are for class pictures that are drawn"
        raise ValueError(f"{drawn}, but --class-images is {what}; leave one of them out")
    if args.class_prompts and str(args.class_prompts) != "none":
        read_prompts(Path(args.class_prompts), args.token)
    if args.class_images and not (args.class_phrase or args.replace).strip():
        raise ValueError('--class-phrase is empty; name what the subject is one of, such as "a house"')


def load(args, sd, photos: list[Photo], dataset: LatentDataset, more: Path | None = None) -> tuple:
    """The class pictures, encoded, or None; and the seconds that drawing them took, (all of them whenever
    drawn, those of this run). To be called while the model is untouched. `more`: prompts besides the photos'
    own, if --class-prompts names none. They take the photos' sizes, in the photos' shares and turns."""
    if not (args.class_images and args.prior_weight):
        return None, (0.0, 0.0)
    phrase = args.class_phrase or args.replace
    if isinstance(args.class_images, Path):
        own, _ = load_photos(args.class_images, args.resolution, option="--class-images")
        images = [crop(p.image, size) for p, size in zip(own, sizes_for(dataset, len(own)), strict=True)]
        seconds = 0.0, 0.0
        texts = prompts([p.caption or phrase for p in own], args.token, phrase)
    else:
        if not (args.class_phrase or args.resume or any(phrase in (p.caption or "") for p in photos)):
            way = 'name it: --class-phrase "a house", or do without: --class-images 0'
            unknown = f'no caption contains "{phrase}", so what the subject is one of is not known'
            raise ValueError(f"{unknown}; {way}")
        more = None if str(args.class_prompts) == "none" else args.class_prompts or more
        texts = prompts(dataset.prompts, args.token, phrase, more and Path(more))
        sizes = sizes_for(dataset, args.class_images)
        images, texts, seconds = pictures(sd, texts, args.class_images, sizes, args.seed)
    found = LatentDataset(sd.vae, images, texts, args.flip, sd.device)
    found.follows = dataset if len(dataset.sizes) > 1 else None
    return found, seconds


def sizes_for(dataset: LatentDataset, n: int) -> list[tuple[int, int]]:
    """Of n class pictures each one's size."""
    if n < len(dataset.sizes):
        many = f"the photos have {len(dataset.sizes)} sizes, and each needs class pictures"
        raise ValueError(f"--class-images is {n}, but {many}; take more, or crop all photos: --square")
    turns = Turns([len(group) for group in dataset.groups])
    found = [dataset.sizes[turns.at(i)[0]] for i in range(n)]
    missing = [size for size in dataset.sizes if size not in found]
    return found[: n - len(missing)] + missing


def note(out: Path, dataset: LatentDataset | None, seconds: tuple[float, float]) -> None:
    """class.json: how many class pictures there are and what drawing them took, in all and in this run."""
    if dataset and distributed.RANK == 0 and not (out / "class.json").exists():
        took = {"seconds": round(seconds[0], 3), "of_this_run": round(seconds[1], 3)}
        write_json(out / "class.json", {"pictures": len(dataset), **took})


def prompts(captions: list[str], token: str, phrase: str, more: Path | None = None) -> list[str]:
    """The captions with the class in place of the pseudo word, so that the class pictures have the same
    weather and light; in between, the lines of a file. Refuses a phrase with the pseudo word in it."""
    holds = f'contains the pseudo word "{token}"; name the class'
    if word_pattern(token).search(phrase):
        raise ValueError(f'--class-phrase "{phrase}" {holds}: "a house"')
    own = [word_pattern(token).sub(lambda _: phrase, c) for c in captions]
    if more is None:
        return own
    lines = read_prompts(Path(more), token)
    rounds = range(max(len(own), len(lines)))
    return [p for i in rounds for p in (own[i % len(own)], lines[i % len(lines)])]


def read_prompts(file: Path, token: str) -> list[str]:
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"--class-prompts {file}: {what}; name a text file with a prompt a line")
    lines = [line for line in map(str.strip, read_text(file)[0].splitlines()) if line]
    if not lines:
        raise ValueError(f"--class-prompts {file}: there is no prompt in it; write one a line")
    if wrong := [line for line in lines if word_pattern(token).search(line)]:
        holds = f'contains the pseudo word "{token}"; name the class'
        raise ValueError(f'--class-prompts {file}: "{wrong[0]}" {holds}')
    return lines


@distributed.main_process_first()
def pictures(sd, texts: list[str], n: int, sizes: list, seed: int, root: Path = Path("runs") / "class"):
    """n class pictures: ([PIL pictures], [prompts], seconds as of `load`). Picture i has text i, texts
    repeat. Their folder's name holds all of the model that they depend on."""
    sizes = [(sizes, sizes)] * n if isinstance(sizes, int) else sizes
    start, texts = time.perf_counter(), [texts[i % len(texts)] for i in range(n)]
    how = f"{sd.digest} {sd.dtype} {sd.schedule.prediction_type} {samplers.DEFAULT} {sd.cfg:g}"
    how += f" clip skip {sd.text.clip_skip}"
    folder = root / hashlib.sha256(how.encode()).hexdigest()[:12]
    make_folder(folder, "the class pictures' folder")
    keys = [f"{text} {seed + i} {sizes[i]}" for i, text in enumerate(texts)]
    files = [folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.png" for key in keys]
    words, at_once = [escape_prompt(t) for t in texts], 32 if max(map(max, sizes)) <= 96 else 4
    # always in the same batches, whose company moves a picture by a grey level: so a stop changes none
    todo, parts = {i for i, file in enumerate(files) if not file.exists()}, []
    for size in dict.fromkeys(sizes):
        places = [i for i, own in enumerate(sizes) if own == size]
        for part in sd.batches([words[i] for i in places], at_once):
            parts.append([places[k] for k in part])
    parts = [part for part in parts if todo & set(part)]
    for part in tqdm(parts, "class pictures", unit="batch", leave=False, disable=None):
        begun = time.perf_counter()
        drawn = sd.draw([words[i] for i in part], [seed + i for i in part], at_once, size=sizes[part[0]])
        each = (time.perf_counter() - begun) / len(part)
        for i, picture in zip(part, drawn, strict=True):
            if i in todo:
                write_png(files[i], picture, {"seconds": f"{each:.6f}"})
    seconds = time.perf_counter() - start
    drawn = f"{len(todo)} drawn in {seconds:.1f} s, the others from {folder}"
    print(f'class: {n} pictures such as "{texts[0]}", {drawn}')
    images, each = zip(*map(read, files), strict=True)
    return list(images), texts, (sum(each), seconds)


def read(file: Path) -> tuple[Image.Image, float]:
    """A class picture and the seconds that drawing it took, 0 where it does not say."""
    try:
        picture, _ = read_photo(file)
    except ValueError as e:
        raise ValueError(f"{e}; delete {file}, it will be drawn again") from None
    with Image.open(file) as opened:
        return picture, float(opened.info.get("seconds", 0))
