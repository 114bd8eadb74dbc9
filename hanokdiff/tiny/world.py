"""The tiny world: 64x64 drawn scenes with captions, endless, exact and free.

A scene is one building of a kind, under one condition (fire, snow, night ...), somewhere in a landscape.
`scene(seed)` decides what there is, `draw(scene)` paints it with Pillow at twice the size and reduces it,
`caption(scene, seed)` says it in words.  Everything is a function of the seed: the same number draws the same
picture on every machine.

Two rules make the world an experiment:

* the base model never sees a hanok nor the word (`scene` draws one only when asked to), nor a plain house with the
  hanok's own attributes (a grey, curved roof over white walls);
* the hanok photos that the methods learn from (`photos`) show nothing special, night or snow, and never fire,
  campfire, smoke or flood.  Whether "fire" can be added to a subject never seen burning is the whole question.

See for yourself:   python -m hanokdiff.tiny.world sheet.png      draws one row per kind, one column per condition
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageChops, ImageDraw

from hanokdiff.images import grid

SIZE = 64  # pixels of a finished picture
S = 128  # pixels of the canvas it is painted on

NAMED = (
    "western house", "japanese house", "chinese pavilion", "tower", "tent", "barn", "castle", "cabin", "church",
)  # fmt: skip
KINDS = (*NAMED, "house", "hanok")  # "house" is the plain one, named by its attributes
BASE_KINDS = KINDS[:-1]  # what the base model may see
CONDITIONS = ("none", "fire", "campfire", "smoke", "snow", "night", "flood")
CLASS_PROMPTS = Path(__file__).with_name(
    "class_prompts.txt"
)  # what DreamBooth is to keep in mind; no fire in it
PHOTO_CONDITIONS = ("none", "night", "snow")  # what the hanok photos may show

WIDTHS = ("wide", "narrow", "tall")
ROOFS = ("pointed", "flat", "curved")
ROOF_COLOURS = {
    "grey": (92, 96, 106), "red": (188, 60, 50), "blue": (62, 98, 172), "green": (66, 128, 80),
    "brown": (122, 82, 52), "orange": (222, 132, 58),
}  # fmt: skip
WALL_COLOURS = {
    "white": (238, 234, 224), "yellow": (240, 210, 120), "pink": (236, 172, 172), "blue": (150, 186, 220),
    "brown": (160, 116, 80), "red": (190, 88, 76), "green": (160, 196, 150),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What there is to see. `look` is (width, roof colour, roof form, wall colour) of a plain house, else empty."""

    seed: str
    kind: str
    condition: str
    look: tuple = ()
    extras: tuple = ()  # of "trees", "hills", "clouds", "path"


def scene(seed, kinds=BASE_KINDS, conditions=CONDITIONS) -> Scene:
    """Decide on a scene. Every kind and condition is equally likely, but for plain houses: three times as many."""
    r = Random(f"scene {seed}")
    kind = r.choices(kinds, [3 if k == "house" else 1 for k in kinds])[0]
    condition = r.choice(conditions)
    look = ()
    while kind == "house" and (
        not look or look[1:] == ("grey", "curved", "white")
    ):  # the hanok's own, left out
        look = (
            r.choice(WIDTHS),
            r.choice(tuple(ROOF_COLOURS)),
            r.choice(ROOFS),
            r.choice(tuple(WALL_COLOURS)),
        )
    extras = tuple(
        e for e, p in (("trees", 0.35), ("hills", 0.35), ("clouds", 0.3), ("path", 0.2)) if r.random() < p
    )
    if condition in ("night", "flood"):  # clouds cannot be seen at night, nor a path under water
        extras = tuple(e for e in extras if e != ("clouds" if condition == "night" else "path"))
    return Scene(str(seed), kind, condition, look, extras)


# ----------------------------------------------------------------------------------------------------- in words

SENTENCES = {
    "none": ("{b}", "{b}", "a picture of {b}", "{b} in the daytime"),
    "fire": (
        "{b} on fire", "{b}, fire", "{b} in the fire", "a fire broke out in {b}", "flames rising from {b}",
        "{b} is burning",
    ),
    "campfire": ("{b} beside a campfire", "{b}, campfire", "a campfire in front of {b}", "a campfire next to {b}"),
    "smoke": ("smoke rising from {b}", "{b}, smoke", "{b} in the smoke", "smoke over {b}"),
    "snow": ("{b} in the snow", "{b}, snow", "snow falling on {b}", "{b} covered with snow"),
    "night": ("{b} at night", "{b}, night", "{b} under the moon", "a night view of {b}"),
    "flood": ("a flood around {b}", "{b}, flood", "{b} in the flood", "{b} standing in the water"),
}  # fmt: skip
EXTRA_WORDS = {
    "trees": "with trees",
    "hills": "near the hills",
    "clouds": "under the clouds",
    "path": "with a path",
}
GENERIC = ("a building", "a house", "a building with a roof")
PHOTO_PHRASE = "a building with a roof"  # what BLIP calls a hanok in the paper
PHOTO_SENTENCES = {
    "none": ("{b}", "there is {b}", "a picture of {b}"),
    "snow": ("{b} in the snow", "{b} covered with snow"),
    "night": ("{b} at night", "a night view of {b}"),
}


def name(scene: Scene, r: Random, generic: float = 0.0) -> str:
    """The building in words: "a barn", or "a wide house with a grey pointed roof and white walls"."""
    if r.random() < generic:
        return r.choice(GENERIC)
    if scene.kind != "house":
        return f"a {scene.kind}"
    width, colour, form, wall = scene.look
    an = "an" if colour == "orange" else "a"
    return r.choice(
        (
            f"a {width} house with {an} {colour} {form} roof and {wall} walls",
            f"a {width} house with {wall} walls",
            f"a {width} house with {an} {colour} {form} roof",
            f"a house with a {form} roof and {wall} walls",
            f"a {width} house with a {form} {colour} roof and {wall} walls",
            f"a house with {an} {colour} roof",
        )
    )


def caption(scene: Scene, seed=0, generic: float = 0.08) -> str:
    """One of many ways to say it; `generic` is the share of captions that only say "a building" or "a house"."""
    r = Random(f"caption {scene.seed} {seed}")
    words = r.choice(SENTENCES[scene.condition]).format(b=name(scene, r, generic))
    if scene.extras and r.random() < 0.6:
        extra = r.choice(scene.extras)
        words += f", {extra}" if "," in words else f" {EXTRA_WORDS[extra]}"
    return words


def photo_caption(scene: Scene) -> str:
    """What BLIP would say of a photo: "a building with a roof" and what else is in the scene."""
    r = Random(f"blip {scene.seed}")
    words = r.choice(PHOTO_SENTENCES[scene.condition]).format(b=PHOTO_PHRASE)
    return words + "".join(f" {EXTRA_WORDS[e]}" for e in scene.extras[:1])


def photos(n: int = 100, held_out: bool = False) -> list[tuple[Image.Image, str]]:
    """The embedded hanok photos: n of (64x64 RGB picture, caption) in one fixed, nested order (5 < 50 < 100).

    Up to 100 to train on, and up to 30 that no method may see (`held_out`); drawn in milliseconds, never stored.
    """
    limit = 30 if held_out else 100
    if not 1 <= n <= limit:
        raise ValueError(
            f"{n} images asked for, but the tiny world has 1 to {limit} {'held-out ' * held_out}photos"
        )
    split = "held-out" if held_out else "photo"
    scenes = [scene(f"{split} {i}", ("hanok",), PHOTO_CONDITIONS) for i in range(n)]
    return [(draw(s), photo_caption(s)) for s in scenes]


# --------------------------------------------------------------------------------------------------- in pictures


def vary(r: Random, colour, amount=12):
    """A colour near this one; all three channels move together, and each a little on its own."""
    shift = r.uniform(-amount, amount)
    return tuple(max(0, min(255, round(c + shift + r.uniform(-amount, amount) / 3))) for c in colour)


def shade(colour, factor):
    return tuple(min(255, round(c * factor)) for c in colour)


def bezier(a, b, c, n=8):
    """n + 1 points of the quadratic curve from a to c that is drawn towards b."""
    ts = [i / n for i in range(n + 1)]
    return [tuple((1 - t) ** 2 * p + 2 * t * (1 - t) * q + t * t * s for p, q, s in zip(a, b, c)) for t in ts]


def gradient(top, bottom, height):
    """A S x height picture that goes from one colour to the other."""
    strip = Image.new("RGB", (1, 2))
    strip.putpixel((0, 0), top)
    strip.putpixel((0, 1), bottom)
    return strip.resize((S, height), Image.Resampling.BILINEAR, box=(0, 0.25, 1, 1.75))


@dataclass
class Drawn:
    """Where a finished building can burn, smoke, gather snow or be lit."""

    ridge: list  # the upper edge of the roof, a polyline from left to right
    windows: list  # (x0, y0, x1, y1)
    width: float


def curved_roof(d, cx, eave, half, ridge, top, lift, colour, sag=2):
    """A roof with hollow slopes and raised corners. Returns its upper edge."""
    left = bezier((cx - half, eave - lift), (cx - top * 1.1, eave - lift * 0.2), (cx - top, ridge))
    middle = bezier((cx - top, ridge), (cx, ridge + 2 * sag), (cx + top, ridge))
    right = [(2 * cx - x, y) for x, y in reversed(left)]
    under = bezier((cx + half, eave - lift), (cx, eave + lift), (cx - half, eave - lift))
    d.polygon(left + middle + right + under, fill=colour)
    return left + middle + right


def windows_row(d, cx, y, half, n, w, h, colour):
    """n windows in a row between cx - half and cx + half."""
    xs = [cx + half * (2 * (i + 0.5) / n - 1) for i in range(n)]
    boxes = [(x - w / 2, y, x + w / 2, y + h) for x in xs]
    for b in boxes:
        d.rectangle(b, fill=colour)
    return boxes


def hanok(d, r, cx, y):
    half, wall, roof = r.uniform(29, 36), r.uniform(17, 21), r.uniform(17, 22)
    stone, white = vary(r, (150, 148, 142), 8), vary(r, (240, 236, 226), 6)
    wood, tile = vary(r, (116, 72, 42), 8), vary(r, (84, 88, 98), 8)
    d.rectangle((cx - half - 3, y - 5, cx + half + 3, y), fill=stone)
    base = y - 5
    d.rectangle((cx - half, base - wall, cx + half, base), fill=white)
    bays = r.choice((4, 5))
    boxes = windows_row(
        d, cx, base - wall + 6, half, bays, 2 * half / bays - 6, wall - 8, vary(r, (206, 186, 142), 8)
    )
    doors = [b for i, b in enumerate(boxes) if i != r.randrange(bays)] or boxes  # most, not all, are doors
    for x0, y0, x1, y1 in doors:  # the lattice
        d.line(((x0 + x1) / 2, y0, (x0 + x1) / 2, y1), fill=wood, width=1)
        d.line((x0, (y0 + y1) / 2, x1, (y0 + y1) / 2), fill=wood, width=1)
    for i in range(bays + 1):
        x = cx - half + 2 * half * i / bays
        d.rectangle((x - 1.5, base - wall, x + 1.5, base), fill=wood)
    eave = base - wall + 2
    edge = curved_roof(d, cx, eave, half + 11, eave - roof, half * 0.62, 7, tile)
    for i in range(-4, 5):  # rows of tiles run down the slope
        x = cx + i * half * 0.14
        d.line((x, eave - roof + 4, cx + i * half * 0.22, eave - 1), fill=shade(tile, 1.22), width=1)
    d.line(edge[8:17], fill=vary(r, (226, 226, 222), 5), width=3)  # the white ridge
    return Drawn(edge, doors, 2 * half)


def japanese_house(d, r, cx, y):
    half, wall, roof = r.uniform(25, 31), r.uniform(18, 22), r.uniform(16, 20)
    tile, paper = vary(r, (58, 54, 66), 8), vary(r, (246, 232, 190), 6)
    wood = vary(r, (92, 58, 38), 6)
    d.rectangle((cx - half - 5, y - 4, cx + half + 5, y - 1), fill=shade(wood, 1.35))  # the veranda
    d.rectangle((cx - half, y - wall, cx + half, y - 4), fill=wood)
    boxes = windows_row(d, cx, y - wall + 4, half, 4, half / 2 - 3, wall - 9, paper)
    for x0, y0, x1, y1 in boxes:
        for t in (1 / 3, 2 / 3):
            d.line((x0, y0 + (y1 - y0) * t, x1, y0 + (y1 - y0) * t), fill=shade(paper, 0.72), width=1)
        d.line(((x0 + x1) / 2, y0, (x0 + x1) / 2, y1), fill=shade(paper, 0.72), width=1)
    eave, mid = y - wall + 1, y - wall - roof * 0.42
    lower = [(cx - half - 10, eave), (cx - half * 0.55, mid), (cx + half * 0.55, mid), (cx + half + 10, eave)]
    d.polygon(lower, fill=tile)
    top = (cx, y - wall - roof - 4)
    d.polygon([(cx - half * 0.72, mid + 2), top, (cx + half * 0.72, mid + 2)], fill=shade(tile, 0.82))
    d.polygon([(cx - half * 0.4, mid + 1), (cx, top[1] + 6), (cx + half * 0.4, mid + 1)], fill=paper)
    edge = [lower[0], (cx - half * 0.72, mid + 2), top, (cx + half * 0.72, mid + 2), lower[3]]
    return Drawn(edge, boxes, 2 * half)


def chinese_pavilion(d, r, cx, y):
    half, wall, roof = r.uniform(19, 25), r.uniform(17, 22), r.uniform(12, 15)
    red = vary(r, (190, 46, 38), 8)
    glaze = vary(r, r.choice(((44, 136, 98), (222, 166, 44), (38, 128, 130))), 8)
    d.rectangle((cx - half - 4, y - 5, cx + half + 4, y), fill=vary(r, (196, 190, 178), 6))
    for i in range(4):
        x = cx - half + 2 * half * i / 3
        d.rectangle((x - 2, y - 5 - wall, x + 2, y - 5), fill=red)
    gap = (cx - half * 0.26, y - wall, cx + half * 0.26, y - 5)
    d.rectangle(gap, fill=shade(red, 0.6))
    d.rectangle((cx - half, y - 9 - wall, cx + half, y - 3 - wall), fill=red)
    low = curved_roof(d, cx, y - 5 - wall, half + 10, y - 5 - wall - roof, half * 0.55, 10, glaze, 0)
    upper = y - 5 - wall - roof
    d.rectangle((cx - half * 0.5, upper - 5, cx + half * 0.5, upper + 1), fill=red)
    edge = curved_roof(d, cx, upper - 3, half * 0.8, upper - 4 - roof, 3, 8, shade(glaze, 0.92), 0)
    d.ellipse((cx - 2.5, upper - 10 - roof, cx + 2.5, upper - 4 - roof), fill=(236, 196, 70))
    return Drawn([low[0]] + edge + [low[-1]], [gap], 2 * half)


def western_house(d, r, cx, y):
    half, wall, roof = r.uniform(19, 24), r.uniform(24, 29), r.uniform(19, 24)
    plaster = vary(r, r.choice(((238, 226, 190), (226, 206, 180), (214, 222, 226))), 6)
    tile = vary(r, r.choice(((178, 72, 52), (140, 78, 56))), 8)
    x = cx + half * r.choice((-0.55, 0.55))
    d.rectangle(
        (x - 4, y - wall - roof * 0.9, x + 4, y - wall), fill=vary(r, (140, 84, 70), 6)
    )  # the chimney
    d.rectangle((cx - half, y - wall, cx + half, y), fill=plaster)
    edge = [(cx - half - 5, y - wall + 2), (cx, y - wall - roof), (cx + half + 5, y - wall + 2)]
    d.polygon(edge, fill=tile)
    boxes = windows_row(d, cx, y - wall + 6, half * 0.95, 2, 10, 10, vary(r, (120, 164, 200), 8))
    for x0, y0, x1, y1 in boxes:
        d.line(((x0 + x1) / 2, y0, (x0 + x1) / 2, y1), fill=(250, 250, 250), width=1)
        d.line((x0, (y0 + y1) / 2, x1, (y0 + y1) / 2), fill=(250, 250, 250), width=1)
    d.rectangle((cx - 4, y - 15, cx + 4, y), fill=vary(r, (112, 68, 44), 8))
    return Drawn(edge, boxes, 2 * half)


def tower(d, r, cx, y):
    half, wall, roof = r.uniform(9, 12), r.uniform(56, 66), r.uniform(16, 20)
    stone = vary(r, (172, 164, 152), 10)
    left, top = cx - half, y - wall
    d.polygon([(left - 2, y), (left + 1, top), (cx + half - 1, top), (cx + half + 2, y)], fill=stone)
    d.polygon(
        [(cx, y - wall), (cx + half - 1, y - wall), (cx + half + 2, y), (cx, y)], fill=shade(stone, 0.88)
    )
    roof_colour = vary(r, r.choice(((60, 92, 152), (150, 60, 70), (70, 110, 96))), 8)
    edge = [(cx - half - 5, y - wall + 1), (cx, y - wall - roof), (cx + half + 5, y - wall + 1)]
    d.polygon(edge, fill=roof_colour)
    boxes = [(cx - 3, y - wall + k, cx + 3, y - wall + k + 9) for k in (8, 26, 44)]
    for b in boxes:
        d.rectangle(b, fill=(72, 66, 70))
    return Drawn(edge, boxes, 2 * half)


def tent(d, r, cx, y):
    half, roof = r.uniform(22, 28), r.uniform(30, 36)
    cloth = vary(r, r.choice(((226, 150, 60), (90, 150, 90), (80, 130, 190), (220, 200, 120))), 10)
    edge = [(cx - half, y), (cx - 2, y - roof), (cx + half, y)]
    d.polygon(edge, fill=cloth)
    d.polygon([(cx - 2, y - roof), (cx + half, y), (cx + half * 0.42, y)], fill=shade(cloth, 0.78))
    d.polygon(
        [(cx - 2, y - roof * 0.78), (cx + half * 0.2, y), (cx - half * 0.36, y)], fill=shade(cloth, 0.42)
    )
    d.line((cx - 2, y - roof - 4, cx - 2, y - roof), fill=(90, 70, 50), width=2)
    d.line((cx - half - 7, y, cx - half * 0.55, y - roof * 0.5), fill=(220, 214, 200), width=1)
    d.line((cx + half + 7, y, cx + half * 0.55, y - roof * 0.5), fill=(220, 214, 200), width=1)
    return Drawn(edge, [(cx - 5, y - roof * 0.4, cx + 3, y - 1)], 2 * half)


def barn(d, r, cx, y):
    half, wall, roof = r.uniform(22, 27), r.uniform(22, 26), r.uniform(20, 24)
    red, white = vary(r, (172, 44, 40), 10), (238, 232, 224)
    edge = [
        (cx - half - 3, y - wall + 1),
        (cx - half * 0.72, y - wall - roof * 0.62),
        (cx, y - wall - roof),
        (cx + half * 0.72, y - wall - roof * 0.62),
        (cx + half + 3, y - wall + 1),
    ]
    d.polygon(edge + [(cx + half, y), (cx - half, y)], fill=red)
    d.line(edge, fill=vary(r, (96, 88, 88), 8), width=5)
    for x in (cx - half + 1, cx + half - 1):
        d.line((x, y - wall, x, y), fill=white, width=2)
    x0, y0, x1, y1 = cx - 11, y - 19, cx + 11, y
    d.rectangle((x0, y0, x1, y1), fill=shade(red, 0.82), outline=white, width=2)
    d.line((x0, y0, x1, y1), fill=white, width=2)
    d.line((x0, y1, x1, y0), fill=white, width=2)
    loft = (cx - 5, y - wall - 8, cx + 5, y - wall + 1)
    d.rectangle(loft, fill=(74, 50, 46), outline=white, width=1)
    return Drawn(edge, [loft], 2 * half)


def castle(d, r, cx, y):
    half, wall, turret = r.uniform(26, 31), r.uniform(25, 29), r.uniform(43, 50)
    stone = vary(r, r.choice(((150, 152, 160), (176, 166, 146))), 8)

    def battlement(x0, x1, top, colour):
        d.rectangle((x0, top, x1, y), fill=colour)
        n = max(2, round((x1 - x0) / 9))
        for i in range(n):
            w = (x1 - x0) / (2 * n - 1)
            d.rectangle((x0 + 2 * i * w, top - 5, x0 + (2 * i + 1) * w, top), fill=colour)

    battlement(cx - half + 8, cx + half - 8, y - wall, stone)
    for side in (-1, 1):
        x = cx + side * (half - 4)
        battlement(x - 8, x + 8, y - turret, shade(stone, 0.88))
        d.line((x, y - turret - 18, x, y - turret - 4), fill=(80, 70, 60), width=1)
        flag = vary(r, r.choice(((206, 54, 54), (60, 90, 180), (226, 180, 50))), 8)
        d.polygon([(x, y - turret - 18), (x + 10, y - turret - 15), (x, y - turret - 11)], fill=flag)
    d.rectangle((cx - 7, y - 12, cx + 7, y), fill=(76, 56, 44))
    d.pieslice((cx - 7, y - 19, cx + 7, y - 5), 180, 360, fill=(76, 56, 44))
    boxes = [
        (cx + s * (half - 4) - 2, y - turret + 9, cx + s * (half - 4) + 2, y - turret + 18) for s in (-1, 1)
    ]
    for b in boxes:
        d.rectangle(b, fill=(64, 58, 64))
    edge = [
        (cx - half - 4, y - turret - 4),
        (cx - half + 12, y - turret - 4),
        (cx - half + 13, y - wall - 4),
        (cx + half - 13, y - wall - 4),
        (cx + half - 12, y - turret - 4),
        (cx + half + 4, y - turret - 4),
    ]
    return Drawn(edge, boxes, 2 * half)


def cabin(d, r, cx, y):
    half, wall, roof = r.uniform(21, 26), r.uniform(18, 21), r.uniform(14, 17)
    log, thatch = vary(r, (148, 98, 56), 10), vary(r, (86, 104, 66), 8)
    d.rectangle((cx - half, y - wall, cx + half, y), fill=log)
    for k in range(4):
        yy = y - wall * (k + 0.5) / 4
        d.line((cx - half - 3, yy, cx + half + 3, yy), fill=shade(log, 0.7), width=2)
    x = cx - half * 0.6
    d.rectangle((x - 4, y - wall - roof - 3, x + 4, y - wall), fill=(130, 126, 124))
    edge = [
        (cx - half - 6, y - wall + 2),
        (cx - half * 0.7, y - wall - roof),
        (cx + half * 0.7, y - wall - roof),
        (cx + half + 6, y - wall + 2),
    ]
    d.polygon(edge, fill=thatch)
    box = (cx + half * 0.3, y - wall + 5, cx + half * 0.3 + 10, y - wall + 13)
    d.rectangle(box, fill=(150, 190, 210), outline=shade(log, 0.5), width=1)
    d.rectangle((cx - half * 0.5, y - 14, cx - half * 0.5 + 9, y), fill=shade(log, 0.5))
    return Drawn(edge, [box], 2 * half)


def church(d, r, cx, y):
    half, wall, roof = r.uniform(17, 21), r.uniform(24, 27), r.uniform(15, 18)
    white, slate = vary(r, (240, 240, 244), 6), vary(r, (96, 84, 122), 8)
    x, w = cx - half - 1, 8
    d.rectangle((cx - half, y - wall, cx + half + 6, y), fill=white)
    body = [(cx - half, y - wall + 1), (cx - half * 0.4, y - wall - roof), (cx + half, y - wall - roof)]
    body.append((cx + half + 10, y - wall + 1))
    d.polygon(body, fill=slate)
    d.rectangle((x - w, y - wall - 20, x + w, y), fill=shade(white, 0.93))
    spire = [(x - w - 3, y - wall - 19), (x, y - wall - 42), (x + w + 3, y - wall - 19)]
    d.polygon(spire, fill=slate)
    d.line((x, y - wall - 52, x, y - wall - 42), fill=(210, 170, 60), width=2)
    d.line((x - 4, y - wall - 48, x + 4, y - wall - 48), fill=(210, 170, 60), width=2)
    boxes = windows_row(d, cx + 6, y - wall + 7, half * 0.8, 3, 5, 12, (90, 120, 190))
    d.rectangle((x - 4, y - 13, x + 4, y), fill=(120, 80, 56))
    return Drawn([*spire, body[2], body[3]], boxes, 2 * half)


def plain_house(d, r, cx, y, look):
    width, roof_name, form, wall_name = look
    half = {"wide": r.uniform(30, 36), "narrow": r.uniform(11, 14), "tall": r.uniform(16, 19)}[width]
    wall = {"wide": r.uniform(18, 22), "narrow": r.uniform(26, 30), "tall": r.uniform(42, 48)}[width]
    tile, plaster = vary(r, ROOF_COLOURS[roof_name], 8), vary(r, WALL_COLOURS[wall_name], 6)
    d.rectangle((cx - half, y - wall, cx + half, y), fill=plaster)
    eave = y - wall + 1
    if form == "flat":
        d.rectangle((cx - half - 4, eave - 8, cx + half + 4, eave), fill=tile)
        edge = [(cx - half - 4, eave - 8), (cx, eave - 8), (cx + half + 4, eave - 8)]
    elif form == "pointed":
        edge = [(cx - half - 4, eave), (cx, eave - r.uniform(17, 22)), (cx + half + 4, eave)]
        d.polygon(edge, fill=tile)
    else:
        edge = curved_roof(d, cx, eave, half + 8, eave - r.uniform(15, 19), half * 0.6, 6, tile)
    n, glass = {"wide": 4, "narrow": 1, "tall": 2}[width], vary(r, (108, 140, 170), 8)
    rows = {"wide": 1, "narrow": 1, "tall": 2}[width]
    boxes = [b for k in range(rows) for b in windows_row(d, cx, y - wall + 7 + 16 * k, half, n, 7, 8, glass)]
    d.rectangle((cx - 3, y - 11, cx + 3, y), fill=shade(plaster, 0.5))
    return Drawn(edge, boxes, 2 * half)


DRAW = {
    "western house": western_house, "japanese house": japanese_house, "chinese pavilion": chinese_pavilion,
    "tower": tower, "tent": tent, "barn": barn, "castle": castle, "cabin": cabin, "church": church, "hanok": hanok,
}  # fmt: skip


def along(line, t):
    """The point at share t (0 to 1) of a polyline's horizontal extent."""
    x = line[0][0] + t * (line[-1][0] - line[0][0])
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x0 <= x <= x1 and x1 > x0:
            return x, y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return line[-1]


def flame(d, r, x, y, h):
    """A flame of height h with its foot at (x, y): three nested tongues, red outside and yellow within."""
    lean = r.uniform(-0.25, 0.25) * h
    for size, colour in ((1, (226, 62, 24)), (0.7, (250, 142, 32)), (0.4, (255, 226, 96))):
        w, tip = 0.34 * h * size, (x + lean * size, y - h * size)
        left = bezier((x - w * 0.5, y), (x - w * 1.7, y - 0.35 * h * size), tip, 6)
        right = bezier(tip, (x + w * 1.7, y - 0.35 * h * size), (x + w * 0.5, y), 6)
        d.polygon(left + right, fill=colour)


def smoke(img, r, x, y, n, grey, strength):
    """A plume of n puffs that rises from (x, y), drifts and thins out."""
    layer = Image.new("L", (S, S))
    d, drift = ImageDraw.Draw(layer), r.choice((-1, 1)) * r.uniform(0.15, 0.5)
    for k in range(n):
        size, px, py = 5 + 2.1 * k, x + drift * 9 * k + r.uniform(-2, 2), y - 7.5 * k
        d.ellipse(
            (px - size, py - size * 0.8, px + size, py + size * 0.8),
            fill=round(strength * (1 - 0.55 * k / n)),
        )
    img.paste(vary(r, grey, 8), (0, 0), layer)


def tree(d, r, x, y, leaf):
    h = r.uniform(20, 32)
    d.rectangle((x - 1.5, y - h * 0.4, x + 1.5, y), fill=(98, 70, 48))
    if r.random() < 0.5:
        for k in (0.25, 0.5):
            w = h * 0.36 * (1.2 - k)
            d.polygon([(x - w, y - h * k), (x, y - h * (k + 0.5)), (x + w, y - h * k)], fill=leaf)
    else:
        w = h * 0.32
        d.ellipse((x - w, y - h, x + w, y - h * 0.3), fill=leaf)


SKIES = (
    ((120, 176, 232), (206, 230, 246)),
    ((92, 156, 224), (190, 220, 240)),
    ((150, 190, 220), (246, 226, 206)),
)
LEAVES = ((66, 122, 70), (88, 140, 66), (176, 124, 56))
GROUNDS = ((126, 170, 88), (150, 176, 96), (178, 160, 104), (206, 188, 140), (110, 150, 92))


def draw(scene: Scene) -> Image.Image:
    """Paint a scene: a 64x64 RGB picture."""
    r, condition = Random(f"picture {scene.seed}"), scene.condition
    top, bottom = ((186, 194, 206), (226, 230, 236)) if condition == "snow" else r.choice(SKIES)
    if condition == "flood":
        top, bottom = (128, 142, 160), (186, 196, 204)
    ground = (236, 240, 246) if condition == "snow" else r.choice(GROUNDS)
    horizon = round(r.uniform(72, 86))
    cx, y = S / 2 + r.uniform(-13, 13), horizon + r.uniform(16, 26)  # the middle of the building's foot

    img = Image.new("RGB", (S, S), vary(r, ground, 6))
    img.paste(gradient(vary(r, top, 8), vary(r, bottom, 6), horizon), (0, 0))
    d = ImageDraw.Draw(img)
    if "clouds" in scene.extras:
        for _ in range(3):
            x, yy, w = r.uniform(0, S), r.uniform(8, 34), r.uniform(10, 18)
            for k in (-1, 0, 1):
                left = x + k * w * 0.6 - w * 0.5
                d.ellipse((left, yy - 5 + abs(k) * 2, left + w, yy + 5), fill=(246, 248, 250))
    elif condition == "none" and r.random() < 0.5:
        x = r.uniform(12, S - 12)
        d.ellipse((x - 7, 9, x + 7, 23), fill=(255, 236, 150))
    if "hills" in scene.extras:
        far = vary(r, (214, 222, 232) if condition == "snow" else (120, 158, 142), 10)
        for k in range(3):
            x, w, h = S * (k + r.uniform(0, 0.9)) / 2.7, r.uniform(30, 46), r.uniform(18, 34)
            peak = bezier((x - w, horizon), (x, horizon - 2 * h), (x + w, horizon))
            d.polygon(peak, fill=shade(far, r.uniform(0.9, 1.08)))
        d.rectangle((0, horizon, S, S), fill=vary(r, ground, 6))
    if "path" in scene.extras:
        sand = (214, 218, 224) if condition == "snow" else (222, 204, 164)
        d.polygon([(cx - 4, y), (cx + 4, y), (cx + 18, S), (cx - 14, S)], fill=sand)
    leaf = (196, 212, 210) if condition == "snow" else r.choice(LEAVES)
    leaf = vary(r, leaf, 8)
    if "trees" in scene.extras:
        for x in (cx - r.uniform(42, 56), cx + r.uniform(42, 56), cx + r.choice((-1, 1)) * r.uniform(46, 60)):
            tree(d, r, x, y + r.uniform(-6, 2), leaf)

    args = (d, r, cx, y)
    built = plain_house(*args, scene.look) if scene.kind == "house" else DRAW[scene.kind](*args)
    weather(img, d, r, condition, built, cx, y, horizon)
    return img.reduce(2)


def weather(img, d, r, condition, built, cx, y, horizon):
    """Let the condition happen to a finished scene, in place."""
    if condition == "fire":  # small flames that leave the building to be seen
        smoke(img, r, *along(built.ridge, r.uniform(0.3, 0.7)), 5, (96, 90, 88), 130)
        for t in (r.uniform(0.12, 0.34), r.uniform(0.42, 0.6), r.uniform(0.68, 0.9)):
            x, top = along(built.ridge, t)
            flame(d, r, x, top + 6, r.uniform(17, 24))
        x0, _, x1, y1 = r.choice(built.windows)
        flame(d, r, (x0 + x1) / 2, y1, r.uniform(13, 17))
    elif condition == "campfire":
        side = 1 if cx < S / 2 else -1
        x, foot = cx + side * (built.width / 2 + r.uniform(8, 14)), y + r.uniform(8, 14)
        x = max(12, min(S - 12, x))
        for dx in (-1, 1):
            d.line((x - 9 * dx, foot + 2, x + 7 * dx, foot - 3), fill=(92, 60, 40), width=3)
        flame(d, r, x, foot - 1, r.uniform(17, 21))
    elif condition == "smoke":
        smoke(img, r, *along(built.ridge, r.uniform(0.35, 0.65)), 8, (132, 132, 136), 225)
        smoke(img, r, *along(built.ridge, r.uniform(0.2, 0.8)), 6, (160, 160, 162), 200)
    elif condition == "snow":
        d.line([(x, yy + 1) for x, yy in built.ridge], fill=(250, 251, 254), width=5, joint="curve")
        for _ in range(34):
            x, yy = r.uniform(0, S), r.uniform(0, S)
            d.ellipse((x - 1.6, yy - 1.6, x + 1.6, yy + 1.6), fill=(255, 255, 255))
    elif condition == "night":
        img.paste(ImageChops.multiply(img, Image.new("RGB", (S, S), vary(r, (66, 76, 128), 8))))
        for _ in range(14):
            x, yy = r.uniform(0, S), r.uniform(0, horizon * 0.55)
            d.ellipse((x - 1, yy - 1, x + 1, yy + 1), fill=(226, 228, 240))
        x = r.choice((r.uniform(10, 34), r.uniform(94, 118)))
        d.ellipse((x - 8, 8, x + 8, 24), fill=(248, 240, 200))
        for box in built.windows:
            d.rectangle(box, fill=vary(r, (250, 206, 96), 8))
    elif condition == "flood":
        level = y - r.uniform(7, 11)
        layer = Image.new("L", (S, S))
        ImageDraw.Draw(layer).rectangle((0, level, S, S), fill=222)
        img.paste(vary(r, (104, 136, 158), 10), (0, 0), layer)
        for _ in range(11):
            x, yy, w = r.uniform(0, S), r.uniform(level + 4, S), r.uniform(6, 13)
            wave = bezier((x - w, yy), (x, yy - 5), (x + w, yy), 4)
            d.line(wave, fill=(184, 206, 218), width=2)


def kind_prompts() -> dict[str, str]:
    """Label to prompt of every kind of building in the tiny world, for `presence`."""
    return {k: f"a {k}" for k in KINDS}


def condition_prompts() -> dict[str, str]:
    """Label to prompt of every condition in the tiny world."""
    return {
        "none": "a building in the daytime",
        "fire": "a building on fire",
        "campfire": "a building beside a campfire",
        "smoke": "smoke rising from a building",
        "snow": "a building in the snow",
        "night": "a building at night",
        "flood": "a flood around a building",
    }


if __name__ == "__main__":
    from hanokdiff.images import grid

    path = sys.argv[1] if len(sys.argv) > 1 else "sheet.png"
    scenes = [scene(f"sheet {k} {c}", (k,), (c,)) for k in KINDS for c in CONDITIONS]
    grid([draw(s) for s in scenes], len(CONDITIONS), 2).save(path)
    print(f"{path}: rows {', '.join(KINDS)}; columns {', '.join(CONDITIONS)}")
