"""The tiny world: 64x64 drawn scenes with captions, any number of them, exact and free.

A scene is one building of a kind, under one condition (fire, snow, night ...), somewhere in a landscape.
`scene(seed)` decides what there is (scenes.py), `draw(scene)` paints it with Pillow at twice the size and
reduces it (drawing.py, buildings.py), `caption(scene, seed)` describes it. Everything is a function of the
seed: the same number draws the same picture on every machine.

Two rules make the world an experiment:

* the base model never sees a hanok nor the word (`scene` draws one only when asked to), nor a plain house
  with the hanok's own attributes (a grey, curved roof over white walls);
* the hanok photos for training (`photos`) show nothing special, night or snow, and never fire, campfire,
  smoke or flood. Whether "fire" can be added to a subject never seen burning is the whole question.

    python -m hanokdiff.tiny.world sheet.png      draws one row per kind, one column per condition
"""

import sys
from pathlib import Path
from random import Random

from PIL import Image

from hanokdiff.errors import report_errors
from hanokdiff.images import grid
from hanokdiff.options import Options
from hanokdiff.tiny.drawing import SIZE as SIZE
from hanokdiff.tiny.drawing import draw
from hanokdiff.tiny.scenes import *  # noqa: F403  all of it is also here
from hanokdiff.tiny.scenes import CONDITIONS, KINDS, PHOTO_CONDITIONS, photo_caption, scene

CLASS_PROMPTS = Path(__file__).with_name("class_prompts.txt")  # for DreamBooth; no fire in it
PHOTOS, HELD_OUT_PHOTOS = 100, 30  # how many there are


def photos(n: int = 100, held_out: bool = False, photo_set: int = 0) -> list[tuple[Image.Image, str]]:
    """The embedded hanok photos: n of (64x64 RGB picture, caption) in one fixed, nested order (5 < 50 < 100).

    Up to 100 to train on, and up to 30 that no method may see (`held_out`, the same for all sets); drawn in
    milliseconds, not stored. `photo_set` 1, 2, ... are other photos, by day, at night and in the snow in
    equal shares, however few are taken: a result that holds for one set only is no result."""
    limit = HELD_OUT_PHOTOS if held_out else PHOTOS
    if not 1 <= n <= limit:
        which = "held-out photos" if held_out else "photos"
        raise ValueError(f"{n} images asked for, but the tiny world has 1 to {limit} {which}")
    if held_out or not photo_set:
        split = "held-out" if held_out else "photo"
        scenes = [scene(f"{split} {i}", ("hanok",), PHOTO_CONDITIONS) for i in range(n)]
    else:
        r, conditions = Random(f"photo set {photo_set}"), []
        while len(conditions) < n:
            conditions += r.sample(PHOTO_CONDITIONS, len(PHOTO_CONDITIONS))
        names = [f"photo set {photo_set} {i}" for i in range(n)]
        scenes = [scene(name, ("hanok",), (c,)) for name, c in zip(names, conditions, strict=False)]
    return [(draw(s), photo_caption(s)) for s in scenes]


@report_errors
def main(argv=None) -> None:
    p = Options(prog="python -m hanokdiff.tiny.world", description=__doc__)
    p.add_argument("sheet", nargs="?", type=Path, default=Path("sheet.png"), help="default: sheet.png")
    path = p.parse_args(argv).sheet
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: the sheet is a PNG; name it so, such as sheet.png")
    scenes = [scene(f"sheet {k} {c}", (k,), (c,)) for k in KINDS for c in CONDITIONS]
    grid([draw(s) for s in scenes], len(CONDITIONS), 2).save(path)
    print(f"{path}: rows {', '.join(KINDS)}; columns {', '.join(CONDITIONS)}")


if __name__ == "__main__":
    sys.exit(main())
