"""Class pictures: what the untouched model draws when asked for the class, so that DreamBooth does not forget
it.

Drawn once and kept in runs/class/MODEL, one PNG per prompt and seed: a run that is stopped loses none, and
the next run finds them.  A few hundred cost minutes on a GPU; their time is reported apart from the
training's.
"""

import hashlib
import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from hanokdiff.errors import make_folder
from hanokdiff.files import read_text
from hanokdiff.images import read_photo, write_png
from hanokdiff.models.prompt import escape_prompt
from hanokdiff.models.tokens import word_pattern
from hanokdiff.training import distributed


def prompts(captions: list[str], token: str, phrase: str, more: Path | None = None) -> list[str]:
    """The captions with the class in place of the pseudo word, so that the class pictures have the same
    weather and light; in between, the lines of a file. Refuses a phrase with the pseudo word in it."""
    if word_pattern(token).search(phrase):
        raise ValueError(
            f'--class-phrase "{phrase}" contains the pseudo word "{token}"; name the class: "a house"'
        )
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
        raise ValueError(
            f'--class-prompts {file}: "{wrong[0]}" contains the pseudo word "{token}"; name the class'
        )
    return lines


def fingerprint(sd) -> str:
    """Tells models apart by their name and a few of their weights."""
    seen = hashlib.sha256(Path(sd.name).name.encode())
    for w in (
        sd.unet.conv_in.weight,
        sd.text.encoder.final_layer_norm.weight,
        sd.vae.decoder.conv_out.weight,
    ):
        seen.update(w.detach().float().cpu().numpy().tobytes())
    return seen.hexdigest()[:12]


@distributed.main_process_first()
def pictures(sd, texts: list[str], n: int, resolution: int, seed: int, root: Path = Path("runs") / "class"):
    """n class pictures: ([PIL pictures], [prompts], seconds spent on drawing). Picture i has text i, texts
    repeat."""
    start, texts = time.perf_counter(), [texts[i % len(texts)] for i in range(n)]
    folder = root / fingerprint(sd)
    make_folder(folder, "the class pictures' folder")
    key = [
        hashlib.sha256(f"{t} {seed + i} {resolution}".encode()).hexdigest()[:16] for i, t in enumerate(texts)
    ]
    files = [folder / f"{k}.png" for k in key]
    words, at_once = [escape_prompt(t) for t in texts], 32 if resolution <= 64 else 4
    # always in the same batches, whose company moves a picture by a grey level: stopped or not, it is the
    # same picture
    todo = {i for i, file in enumerate(files) if not file.exists()}
    parts = [part for part in sd.batches(words, at_once) if todo & set(part)]
    for part in tqdm(parts, "class pictures", unit="batch", leave=False, disable=None):
        drawn = sd.draw(
            [words[i] for i in part], [seed + i for i in part], at_once, size=(resolution, resolution)
        )
        for i, picture in zip(part, drawn, strict=True):
            if i in todo:
                write_png(files[i], picture)
    seconds = time.perf_counter() - start
    print(
        f'class: {n} pictures such as "{texts[0]}", {len(todo)} drawn in {seconds:.1f} s, the others from '
        f"{folder}"
    )
    return [read(file) for file in files], texts, seconds


def read(file: Path) -> Image.Image:
    try:
        return read_photo(file)[0]
    except ValueError as e:
        raise ValueError(f"{e}; delete {file}, it will be drawn again") from None
