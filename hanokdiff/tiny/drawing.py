"""Paints a scene: sky, landscape, building (buildings.py), then the condition on top.

The order of random draws is part of the world: moving one changes every picture after it.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageChops, ImageDraw

from hanokdiff.tiny.buildings import DRAW, Building, bezier, plain_house, shade, vary
from hanokdiff.tiny.scenes import Scene

SIZE = 64  # pixels of a finished picture
S = 128  # pixels of the canvas it is painted on

SKIES = (
    ((120, 176, 232), (206, 230, 246)), ((92, 156, 224), (190, 220, 240)), ((150, 190, 220), (246, 226, 206)),
)  # fmt: skip
LEAVES = ((66, 122, 70), (88, 140, 66), (176, 124, 56))
GROUNDS = ((126, 170, 88), (150, 176, 96), (178, 160, 104), (206, 188, 140), (110, 150, 92))


@dataclass
class Canvas:
    img: Image.Image
    d: ImageDraw.ImageDraw
    r: Random
    cx: float  # (cx, y) is the middle of the building's foot
    y: float
    horizon: int


def draw(scene: Scene) -> Image.Image:
    """A scene as a 64x64 RGB picture."""
    r, snow = Random(f"picture {scene.seed}"), scene.condition == "snow"
    top, bottom = ((186, 194, 206), (226, 230, 236)) if snow else r.choice(SKIES)
    if scene.condition == "flood":
        top, bottom = (128, 142, 160), (186, 196, 204)
    ground = (236, 240, 246) if snow else r.choice(GROUNDS)
    horizon = round(r.uniform(72, 86))
    cx, y = S / 2 + r.uniform(-13, 13), horizon + r.uniform(16, 26)

    img = Image.new("RGB", (S, S), vary(r, ground, 6))
    img.paste(gradient(vary(r, top, 8), vary(r, bottom, 6), horizon), (0, 0))
    canvas = Canvas(img, ImageDraw.Draw(img), r, cx, y, horizon)
    landscape(canvas, scene, ground)
    args = (canvas.d, r, cx, y)
    building = plain_house(*args, scene.attributes) if scene.kind == "house" else DRAW[scene.kind](*args)
    if scene.condition != "none":
        CONDITION[scene.condition](canvas, building)
    return img.reduce(2)


def gradient(top, bottom, height: int) -> Image.Image:
    """A S x height picture that goes from one colour to the other."""
    strip = Image.new("RGB", (1, 2))
    strip.putpixel((0, 0), top)
    strip.putpixel((0, 1), bottom)
    return strip.resize((S, height), Image.Resampling.BILINEAR, box=(0, 0.25, 1, 1.75))


def dot(d, x, y, radius, colour) -> None:
    d.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def landscape(c: Canvas, scene: Scene, ground) -> None:
    """Clouds or sun, hills, a path and trees, each only if the scene has them."""
    snow, r = scene.condition == "snow", c.r
    if "clouds" in scene.extras:
        clouds(c)
    elif scene.condition == "none" and r.random() < 0.5:
        dot(c.d, r.uniform(12, S - 12), 16, 7, (255, 236, 150))  # the sun
    if "hills" in scene.extras:
        hills(c, (214, 222, 232) if snow else (120, 158, 142), ground)
    if "path" in scene.extras:
        sand = (214, 218, 224) if snow else (222, 204, 164)
        c.d.polygon([(c.cx - 4, c.y), (c.cx + 4, c.y), (c.cx + 18, S), (c.cx - 14, S)], fill=sand)
    leaf = vary(r, (196, 212, 210) if snow else r.choice(LEAVES), 8)
    if "trees" in scene.extras:
        left, right = c.cx - r.uniform(42, 56), c.cx + r.uniform(42, 56)
        for x in (left, right, c.cx + r.choice((-1, 1)) * r.uniform(46, 60)):
            tree(c.d, r, x, c.y + r.uniform(-6, 2), leaf)


def clouds(c: Canvas) -> None:
    for _ in range(3):
        x, y, w = c.r.uniform(0, S), c.r.uniform(8, 34), c.r.uniform(10, 18)
        for k in (-1, 0, 1):
            left = x + k * w * 0.6 - w * 0.5
            c.d.ellipse((left, y - 5 + abs(k) * 2, left + w, y + 5), fill=(246, 248, 250))


def hills(c: Canvas, colour, ground) -> None:
    r, far = c.r, vary(c.r, colour, 10)
    for k in range(3):
        x, w, h = S * (k + r.uniform(0, 0.9)) / 2.7, r.uniform(30, 46), r.uniform(18, 34)
        peak = bezier((x - w, c.horizon), (x, c.horizon - 2 * h), (x + w, c.horizon))
        c.d.polygon(peak, fill=shade(far, r.uniform(0.9, 1.08)))
    c.d.rectangle((0, c.horizon, S, S), fill=vary(r, ground, 6))


def tree(d, r: Random, x, y, leaf) -> None:
    """A fir of two triangles, or a round crown."""
    h = r.uniform(20, 32)
    d.rectangle((x - 1.5, y - h * 0.4, x + 1.5, y), fill=(98, 70, 48))
    if r.random() < 0.5:
        for k in (0.25, 0.5):
            w = h * 0.36 * (1.2 - k)
            d.polygon([(x - w, y - h * k), (x, y - h * (k + 0.5)), (x + w, y - h * k)], fill=leaf)
    else:
        w = h * 0.32
        d.ellipse((x - w, y - h, x + w, y - h * 0.3), fill=leaf)


def fire(c: Canvas, building: Building) -> None:
    """Small flames: the building must remain recognisable."""
    r = c.r
    smoke_plume(c, *along(building.roof, r.uniform(0.3, 0.7)), 5, (96, 90, 88), 130)
    for t in (r.uniform(0.12, 0.34), r.uniform(0.42, 0.6), r.uniform(0.68, 0.9)):
        x, top = along(building.roof, t)
        flame(c.d, r, x, top + 6, r.uniform(17, 24))
    x0, _, x1, y1 = r.choice(building.windows)
    flame(c.d, r, (x0 + x1) / 2, y1, r.uniform(13, 17))


def campfire(c: Canvas, building: Building) -> None:
    """Two logs and a flame beside the building, on the side with more room."""
    side = 1 if c.cx < S / 2 else -1
    x, foot = c.cx + side * (building.width / 2 + c.r.uniform(8, 14)), c.y + c.r.uniform(8, 14)
    x = max(12, min(S - 12, x))
    for dx in (-1, 1):
        c.d.line((x - 9 * dx, foot + 2, x + 7 * dx, foot - 3), fill=(92, 60, 40), width=3)
    flame(c.d, c.r, x, foot - 1, c.r.uniform(17, 21))


def smoke(c: Canvas, building: Building) -> None:
    smoke_plume(c, *along(building.roof, c.r.uniform(0.35, 0.65)), 8, (132, 132, 136), 225)
    smoke_plume(c, *along(building.roof, c.r.uniform(0.2, 0.8)), 6, (160, 160, 162), 200)


def snow(c: Canvas, building: Building) -> None:
    """Snow along the roof, and falling."""
    c.d.line([(x, y + 1) for x, y in building.roof], fill=(250, 251, 254), width=5, joint="curve")
    for _ in range(34):
        x, y = c.r.uniform(0, S), c.r.uniform(0, S)
        dot(c.d, x, y, 1.6, (255, 255, 255))


def night(c: Canvas, building: Building) -> None:
    """All darkened; stars, a moon and lit windows."""
    r = c.r
    c.img.paste(ImageChops.multiply(c.img, Image.new("RGB", (S, S), vary(r, (66, 76, 128), 8))))
    for _ in range(14):
        x, y = r.uniform(0, S), r.uniform(0, c.horizon * 0.55)
        dot(c.d, x, y, 1, (226, 228, 240))
    dot(c.d, r.choice((r.uniform(10, 34), r.uniform(94, 118))), 16, 8, (248, 240, 200))
    for box in building.windows:
        c.d.rectangle(box, fill=vary(r, (250, 206, 96), 8))


def flood(c: Canvas, building: Building) -> None:
    """Translucent water over the foot of the building, with waves."""
    r, level = c.r, c.y - c.r.uniform(7, 11)
    mask = Image.new("L", (S, S))
    ImageDraw.Draw(mask).rectangle((0, level, S, S), fill=222)
    c.img.paste(vary(r, (104, 136, 158), 10), (0, 0), mask)
    for _ in range(11):
        x, y, w = r.uniform(0, S), r.uniform(level + 4, S), r.uniform(6, 13)
        wave = bezier((x - w, y), (x, y - 5), (x + w, y), 4)
        c.d.line(wave, fill=(184, 206, 218), width=2)


CONDITION = {
    "fire": fire, "campfire": campfire, "smoke": smoke, "snow": snow, "night": night, "flood": flood,
}  # fmt: skip


def along(line, t: float) -> tuple[float, float]:
    """The point at share t (0 to 1) of a polyline's horizontal extent."""
    x = line[0][0] + t * (line[-1][0] - line[0][0])
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x0 <= x <= x1 and x1 > x0:
            return x, y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return line[-1]


def flame(d, r: Random, x, y, h) -> None:
    """A flame of height h with its foot at (x, y): three nested tongues, red outside and yellow within."""
    lean = r.uniform(-0.25, 0.25) * h
    for size, colour in ((1, (226, 62, 24)), (0.7, (250, 142, 32)), (0.4, (255, 226, 96))):
        w, tip = 0.34 * h * size, (x + lean * size, y - h * size)
        left = bezier((x - w * 0.5, y), (x - w * 1.7, y - 0.35 * h * size), tip, 6)
        right = bezier(tip, (x + w * 1.7, y - 0.35 * h * size), (x + w * 0.5, y), 6)
        d.polygon(left + right, fill=colour)


def smoke_plume(c: Canvas, x, y, puffs: int, grey, opacity: int) -> None:
    """Rises from (x, y), drifts and thins out."""
    mask = Image.new("L", (S, S))
    d, drift = ImageDraw.Draw(mask), c.r.choice((-1, 1)) * c.r.uniform(0.15, 0.5)
    for k in range(puffs):
        size, px, py = 5 + 2.1 * k, x + drift * 9 * k + c.r.uniform(-2, 2), y - 7.5 * k
        box = (px - size, py - size * 0.8, px + size, py + size * 0.8)
        d.ellipse(box, fill=round(opacity * (1 - 0.55 * k / puffs)))
    c.img.paste(vary(c.r, grey, 8), (0, 0), mask)
