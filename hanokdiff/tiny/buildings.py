"""The eleven kinds of building: a function each, with the foot's middle at (cx, y) on the 128-pixel canvas.

d is the ImageDraw, r the Random. The order of random draws is part of the world: do not move one.
"""

from dataclasses import dataclass
from random import Random

from hanokdiff.tiny.scenes import ROOF_COLOURS, WALL_COLOURS


def vary(r: Random, colour, amount=12):
    """A colour near this one: all three channels shifted together, and each a little on its own."""
    shift = r.uniform(-amount, amount)
    return tuple(max(0, min(255, round(c + shift + r.uniform(-amount, amount) / 3))) for c in colour)


def shade(colour, factor):
    """Darker (factor < 1) or lighter."""
    return tuple(min(255, round(c * factor)) for c in colour)


def bezier(a, b, c, n=8):
    """n + 1 points of the quadratic curve from a to c that is drawn towards b."""
    ts = [i / n for i in range(n + 1)]
    return [tuple((1 - t) ** 2 * p + 2 * t * (1 - t) * q + t * t * s for p, q, s in zip(a, b, c)) for t in ts]


@dataclass
class Building:
    """Where the conditions (fire, smoke, snow, lit windows) are to be painted."""

    roof: list  # its upper edge, a polyline from left to right
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


def cross(d, box, colour):
    """Glazing bars: a vertical and a horizontal line through the middle of a window."""
    x0, y0, x1, y1 = box
    d.line(((x0 + x1) / 2, y0, (x0 + x1) / 2, y1), fill=colour, width=1)
    d.line((x0, (y0 + y1) / 2, x1, (y0 + y1) / 2), fill=colour, width=1)


def hanok(d, r, cx, y):
    half, wall, roof = r.uniform(29, 36), r.uniform(17, 21), r.uniform(17, 22)
    stone, white = vary(r, (150, 148, 142), 8), vary(r, (240, 236, 226), 6)
    wood, tile = vary(r, (116, 72, 42), 8), vary(r, (84, 88, 98), 8)
    d.rectangle((cx - half - 3, y - 5, cx + half + 3, y), fill=stone)
    base = y - 5
    d.rectangle((cx - half, base - wall, cx + half, base), fill=white)
    bays = r.choice((4, 5))
    paper = vary(r, (206, 186, 142), 8)
    boxes = windows_row(d, cx, base - wall + 6, half, bays, 2 * half / bays - 6, wall - 8, paper)
    doors = [b for i, b in enumerate(boxes) if i != r.randrange(bays)] or boxes  # most, not all, are doors
    for box in doors:
        cross(d, box, wood)
    for i in range(bays + 1):
        x = cx - half + 2 * half * i / bays
        d.rectangle((x - 1.5, base - wall, x + 1.5, base), fill=wood)
    eave = base - wall + 2
    edge = curved_roof(d, cx, eave, half + 11, eave - roof, half * 0.62, 7, tile)
    for i in range(-4, 5):  # rows of tiles run down the slope
        x = cx + i * half * 0.14
        d.line((x, eave - roof + 4, cx + i * half * 0.22, eave - 1), fill=shade(tile, 1.22), width=1)
    d.line(edge[8:17], fill=vary(r, (226, 226, 222), 5), width=3)  # the white ridge
    return Building(edge, doors, 2 * half)


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
    return Building(edge, boxes, 2 * half)


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
    return Building([low[0]] + edge + [low[-1]], [gap], 2 * half)


def western_house(d, r, cx, y):
    half, wall, roof = r.uniform(19, 24), r.uniform(24, 29), r.uniform(19, 24)
    plaster = vary(r, r.choice(((238, 226, 190), (226, 206, 180), (214, 222, 226))), 6)
    tile = vary(r, r.choice(((178, 72, 52), (140, 78, 56))), 8)
    x = cx + half * r.choice((-0.55, 0.55))
    chimney = vary(r, (140, 84, 70), 6)
    d.rectangle((x - 4, y - wall - roof * 0.9, x + 4, y - wall), fill=chimney)
    d.rectangle((cx - half, y - wall, cx + half, y), fill=plaster)
    edge = [(cx - half - 5, y - wall + 2), (cx, y - wall - roof), (cx + half + 5, y - wall + 2)]
    d.polygon(edge, fill=tile)
    boxes = windows_row(d, cx, y - wall + 6, half * 0.95, 2, 10, 10, vary(r, (120, 164, 200), 8))
    for box in boxes:
        cross(d, box, (250, 250, 250))
    d.rectangle((cx - 4, y - 15, cx + 4, y), fill=vary(r, (112, 68, 44), 8))
    return Building(edge, boxes, 2 * half)


def tower(d, r, cx, y):
    half, wall, roof = r.uniform(9, 12), r.uniform(56, 66), r.uniform(16, 20)
    stone = vary(r, (172, 164, 152), 10)
    left, top = cx - half, y - wall
    d.polygon([(left - 2, y), (left + 1, top), (cx + half - 1, top), (cx + half + 2, y)], fill=stone)
    right = [(cx, top), (cx + half - 1, top), (cx + half + 2, y), (cx, y)]
    d.polygon(right, fill=shade(stone, 0.88))
    roof_colour = vary(r, r.choice(((60, 92, 152), (150, 60, 70), (70, 110, 96))), 8)
    edge = [(cx - half - 5, y - wall + 1), (cx, y - wall - roof), (cx + half + 5, y - wall + 1)]
    d.polygon(edge, fill=roof_colour)
    boxes = [(cx - 3, y - wall + k, cx + 3, y - wall + k + 9) for k in (8, 26, 44)]
    for b in boxes:
        d.rectangle(b, fill=(72, 66, 70))
    return Building(edge, boxes, 2 * half)


def tent(d, r, cx, y):
    half, roof = r.uniform(22, 28), r.uniform(30, 36)
    cloth = vary(r, r.choice(((226, 150, 60), (90, 150, 90), (80, 130, 190), (220, 200, 120))), 10)
    edge = [(cx - half, y), (cx - 2, y - roof), (cx + half, y)]
    d.polygon(edge, fill=cloth)
    d.polygon([(cx - 2, y - roof), (cx + half, y), (cx + half * 0.42, y)], fill=shade(cloth, 0.78))
    opening = [(cx - 2, y - roof * 0.78), (cx + half * 0.2, y), (cx - half * 0.36, y)]
    d.polygon(opening, fill=shade(cloth, 0.42))
    d.line((cx - 2, y - roof - 4, cx - 2, y - roof), fill=(90, 70, 50), width=2)
    d.line((cx - half - 7, y, cx - half * 0.55, y - roof * 0.5), fill=(220, 214, 200), width=1)
    d.line((cx + half + 7, y, cx + half * 0.55, y - roof * 0.5), fill=(220, 214, 200), width=1)
    return Building(edge, [(cx - 5, y - roof * 0.4, cx + 3, y - 1)], 2 * half)


def barn(d, r, cx, y):
    half, wall, roof = r.uniform(22, 27), r.uniform(22, 26), r.uniform(20, 24)
    red, white = vary(r, (172, 44, 40), 10), (238, 232, 224)
    eave, bend = y - wall + 1, y - wall - roof * 0.62
    left = [(cx - half - 3, eave), (cx - half * 0.72, bend)]
    edge = [*left, (cx, y - wall - roof), (cx + half * 0.72, bend), (cx + half + 3, eave)]
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
    return Building(edge, [loft], 2 * half)


def battlement(d, x0, x1, top, bottom, colour):
    """A wall with merlons."""
    d.rectangle((x0, top, x1, bottom), fill=colour)
    n = max(2, round((x1 - x0) / 9))
    for i in range(n):
        w = (x1 - x0) / (2 * n - 1)
        d.rectangle((x0 + 2 * i * w, top - 5, x0 + (2 * i + 1) * w, top), fill=colour)


def castle(d, r, cx, y):
    half, wall, turret = r.uniform(26, 31), r.uniform(25, 29), r.uniform(43, 50)
    stone = vary(r, r.choice(((150, 152, 160), (176, 166, 146))), 8)

    battlement(d, cx - half + 8, cx + half - 8, y - wall, y, stone)
    for side in (-1, 1):
        x = cx + side * (half - 4)
        battlement(d, x - 8, x + 8, y - turret, y, shade(stone, 0.88))
        d.line((x, y - turret - 18, x, y - turret - 4), fill=(80, 70, 60), width=1)
        flag = vary(r, r.choice(((206, 54, 54), (60, 90, 180), (226, 180, 50))), 8)
        d.polygon([(x, y - turret - 18), (x + 10, y - turret - 15), (x, y - turret - 11)], fill=flag)
    d.rectangle((cx - 7, y - 12, cx + 7, y), fill=(76, 56, 44))
    d.pieslice((cx - 7, y - 19, cx + 7, y - 5), 180, 360, fill=(76, 56, 44))
    towers = (cx - (half - 4), cx + (half - 4))
    boxes = [(x - 2, y - turret + 9, x + 2, y - turret + 18) for x in towers]
    for b in boxes:
        d.rectangle(b, fill=(64, 58, 64))
    high, low = y - turret - 4, y - wall - 4
    left = [(cx - half - 4, high), (cx - half + 12, high), (cx - half + 13, low)]
    edge = [*left, (cx + half - 13, low), (cx + half - 12, high), (cx + half + 4, high)]
    return Building(edge, boxes, 2 * half)


def cabin(d, r, cx, y):
    half, wall, roof = r.uniform(21, 26), r.uniform(18, 21), r.uniform(14, 17)
    log, thatch = vary(r, (148, 98, 56), 10), vary(r, (86, 104, 66), 8)
    d.rectangle((cx - half, y - wall, cx + half, y), fill=log)
    for k in range(4):
        yy = y - wall * (k + 0.5) / 4
        d.line((cx - half - 3, yy, cx + half + 3, yy), fill=shade(log, 0.7), width=2)
    x = cx - half * 0.6
    d.rectangle((x - 4, y - wall - roof - 3, x + 4, y - wall), fill=(130, 126, 124))
    eave, top = y - wall + 2, y - wall - roof
    edge = [(cx - half - 6, eave), (cx - half * 0.7, top), (cx + half * 0.7, top), (cx + half + 6, eave)]
    d.polygon(edge, fill=thatch)
    box = (cx + half * 0.3, y - wall + 5, cx + half * 0.3 + 10, y - wall + 13)
    d.rectangle(box, fill=(150, 190, 210), outline=shade(log, 0.5), width=1)
    d.rectangle((cx - half * 0.5, y - 14, cx - half * 0.5 + 9, y), fill=shade(log, 0.5))
    return Building(edge, [box], 2 * half)


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
    return Building([*spire, body[2], body[3]], boxes, 2 * half)


def plain_house(d, r, cx, y, attributes):
    width, roof_name, form, wall_name = attributes
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
    return Building(edge, boxes, 2 * half)


DRAW = {
    "western house": western_house, "japanese house": japanese_house, "chinese pavilion": chinese_pavilion,
    "tower": tower, "tent": tent, "barn": barn, "castle": castle, "cabin": cabin, "church": church,
    "hanok": hanok,
}  # fmt: skip
