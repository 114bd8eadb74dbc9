"""What a report is made of: charts as SVG, sheets of pictures, and a page that becomes HTML and Markdown.

Nothing but the standard library and Pillow. A chart takes its text colour from the page, so it is legible in
light and in dark; a sheet is transparent, with grey letters, for the same reason.
"""

import base64
import io
import math
import re
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hanokdiff.files import replacing
from hanokdiff.images import fitting

COLOURS = ["#4e79a7", "#e8833a", "#4c9f70", "#b0679b", "#9c8453"]
COLOURS += ["#7f8c8d", "#c0504d", "#5fa8b8", "#8a77c4", "#a3a847"]
GREY = (127, 127, 127, 255)
WIDE = 7  # columns of a sheet
BROAD = 1600  # a picture of more pixels scrolls on a phone, where its parts would be too small

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --line: #c9c9cf; --soft: #f2f2f5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ec; --paper: #16161a; --line: #46464e; --soft: #222228; }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
:lang(ko) { word-break: keep-all; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; margin: 1rem 0; padding-bottom: .2rem;
        background: linear-gradient(90deg, var(--paper) 1rem, transparent 2rem) local,
                    linear-gradient(270deg, var(--paper) 1rem, transparent 2rem) 100% 0 local,
                    linear-gradient(90deg, var(--line), transparent .5rem) scroll,
                    linear-gradient(270deg, var(--line), transparent .5rem) 100% 0 scroll;
        background-repeat: no-repeat; }
figure { margin: 1rem 0; } nav ul { columns: 14rem; padding-left: 1.2rem; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem; font-size: .9rem; }
figcaption { font-size: .9rem; opacity: .85; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { background: var(--soft); } svg { display: block; min-width: 34rem; width: 100%; height: auto; }
.wide img { display: block; max-width: 100%; height: auto; cursor: zoom-in; }
.wide img.broad { max-width: max(100%, 60rem); }
.wide img.large { max-width: none; min-width: 60rem; cursor: zoom-out; }
code { background: var(--soft); padding: 0 .2rem; }
@media (max-width: 40rem) {
  tr :first-child:not(:only-child) { position: sticky; left: 0; min-width: 6rem; max-width: 9rem;
                                     white-space: normal; }
  td:first-child { background: var(--paper); }
}
"""


# a picture becomes large at a click, and small at the next
SCRIPT = """document.addEventListener("click", function (e) {
  if (e.target.tagName === "IMG") { e.target.classList.toggle("large"); }
});"""


def embedded(image: Image.Image, caption: str) -> tuple[str, bytes]:
    """An <img> with the picture in it, and the picture as a PNG."""
    png = io.BytesIO()
    image.save(png, "png")
    source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"' + ' class="broad"' * (image.width > BROAD)
    return f'<img src="{source}" {size} alt="{escape(caption)}"/>', png.getvalue()


def framed(html: str, caption: str) -> str:
    return f'<figure><div class="wide">{html}</div><figcaption>{escape(caption)}</figcaption></figure>'


# -------------------------------------------------------------------------------------------------- a page


class Page:
    """A title and blocks, added from top to bottom; the same ones in HTML and in Markdown. Every text goes
    through `say`, which may translate it."""

    def __init__(self, title: str, refresh: int = 0, language: str = "en", say: Callable[[str], str] = str):
        self.title, self.refresh = say(title), refresh  # the browser reloads after so many seconds
        self.language, self.say = language, say
        self.html_blocks, self.markdown_blocks = [f"<h1>{escape(self.title)}</h1>"], [f"# {self.title}"]
        self.headings: list[str] = []

    def add(self, html: str, markdown: str) -> None:
        self.html_blocks.append(html)
        self.markdown_blocks.append(markdown)

    def heading(self, text: str) -> None:
        text = self.say(text)
        self.headings.append(text)
        self.add(f'<h2 id="part{len(self.headings)}">{escape(text)}</h2>', f"## {text}")

    def text(self, text: str) -> None:
        """A paragraph, wherever its lines break. What stands between backticks is code."""
        parts = self.say(" ".join(text.split())).split("`")
        html = [
            f"<code>{escape(p, False)}</code>" if i % 2 else escape(p, False) for i, p in enumerate(parts)
        ]
        markdown = [p if i % 2 else p.replace("*", "\\*") for i, p in enumerate(parts)]
        self.add(f"<p>{''.join(html)}</p>", "`".join(markdown))

    def table(self, head: list, rows: list[list]) -> None:
        head, *rows = [[self.say(str(cell)) for cell in row] for row in (head, *rows)]

        def line(cells, tag):
            return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

        inner = f"<thead>{line(head, 'th')}</thead><tbody>{''.join(line(r, 'td') for r in rows)}</tbody>"
        lines = [" | ".join(r).replace("*", "\\*") for r in (head, ["---"] * len(head), *rows)]
        markdown = "\n".join(f"| {r} |" for r in lines)
        self.add(f'<div class="wide"><table>{inner}</table></div>', markdown)

    def chart(self, svg: str, file: Path, caption: str) -> None:
        """Drawn in the HTML, where its letters have the page's colour; a file with grey ones beside the
        Markdown."""
        svg = re.sub(r"(?<=>)[^<>]+(?=</text>)", lambda m: escape(self.say(unescape(m[0]))), svg)
        svg = re.sub(r'(?<=aria-label=")[^"]+', escape(self.say(caption)), svg)
        alone = (
            f'<svg xmlns="http://www.w3.org/2000/svg" color="#808080" width="{W}" font-family="sans-serif" '
        )
        self.figure(svg, file, svg.replace("<svg ", alone, 1).encode(), caption)

    def picture(self, image: Image.Image, file: Path, caption: str) -> None:
        """Embedded in the HTML, and a file beside the Markdown."""
        html, png = embedded(image, self.say(caption))
        self.figure(html, file, png, caption)

    def embed(self, image: Image.Image, caption: str) -> None:
        """A picture in the HTML alone."""
        self.add(framed(embedded(image, caption)[0], caption), caption)

    def svg(self, svg: str, caption: str) -> None:
        """A chart in the HTML alone."""
        self.add(framed(svg, caption), caption)

    def links(self, words: str, targets: dict[str, str]) -> None:
        """A line of links: name -> address, from this page's folder."""
        words = self.say(words)
        html = ", ".join(f'<a href="{escape(to)}">{escape(name)}</a>' for name, to in targets.items())
        markdown = ", ".join(f"[{name}](<{to}>)" for name, to in targets.items())
        self.add(f"<p>{escape(words)} {html}</p>", f"{words} {markdown}")

    def code(self, text: str) -> None:
        self.add(f"<pre><code>{escape(text, False)}</code></pre>", f"    {text}")

    def figure(self, html: str, file: Path, content: bytes, caption: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as aside:
            aside.write_bytes(content)
        caption = self.say(caption)
        html = framed(html, caption)
        caption = caption.replace("*", "\\*")
        self.add(html, f"![{caption}]({file.parent.name}/{file.name})\n\n{caption}")

    def html(self) -> str:
        again = f'<meta http-equiv="refresh" content="{self.refresh}"/>' if self.refresh else ""
        return (
            f'<!DOCTYPE html>\n<html lang="{self.language}"><head><meta charset="utf-8"/>{again}'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f"<title>{escape(self.title)}</title>"
            f"<style>{STYLE}</style></head><body>\n{self.html_blocks[0]}\n{self.contents()}\n"
            + "\n".join(self.html_blocks[1:])
            + f"\n<script>{SCRIPT}</script></body></html>\n"
        )

    def contents(self) -> str:
        """Links to the sections."""
        links = [f'<li><a href="#part{i}">{escape(t)}</a></li>' for i, t in enumerate(self.headings, 1)]
        return f"<nav><ul>{''.join(links)}</ul></nav>" if len(links) > 3 else ""

    def markdown(self) -> str:
        return "\n\n".join(self.markdown_blocks) + "\n"


# ------------------------------------------------------------------------------------------------ pictures


def sheet(tiles: list[list[list[Path]]], rows: list[str], columns: list[str]) -> Image.Image:
    """Up to four pictures per place, in 2 x 2; rows and columns labelled. A place without pictures stays
    empty. More than WIDE columns go on below."""
    first = next(path for row in tiles for tile in row for path in tile)
    with Image.open(first) as image:
        side = min(128, 2 * max(image.size))  # tiny ones doubled, photographs reduced
    gap, line, high = 12, 28, side * (2 if any(len(tile) > 2 for row in tiles for tile in row) else 1)
    across, down = 2 * side + gap, high + gap
    block, lines = line + len(rows) * down, -(-len(columns) // WIDE)
    font = ImageFont.load_default(20)
    left = max(int(font.getlength(r)) for r in rows) + 16

    def place(r: int, c: int) -> tuple[int, int]:
        return left + c % WIDE * across, c // WIDE * block + line + r * down

    out = Image.new("RGBA", (left + min(len(columns), WIDE) * across, lines * block))
    pen = ImageDraw.Draw(out)
    for c, text in enumerate(columns):
        x, y = place(0, c)
        pen.text((x, y - line), fitting(text, 2 * side, font.getlength), GREY, font)
    for r, text in enumerate(rows):
        for c in range(0, len(columns), WIDE):
            pen.text((0, place(r, c)[1] + high // 2 - 12), text, GREY, font)
        for c, tile in enumerate(tiles[r]):
            for i, path in enumerate(tile[:4]):
                with Image.open(path) as image:
                    small = max(image.size) <= 64
                    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
                    image = image.convert("RGB").resize((side, side), method)
                x, y = place(r, c)
                out.paste(image, (x + i % 2 * side, y + i // 2 * side))
    return out


# -------------------------------------------------------------------------------------------------- charts

W, H, LEFT, BOTTOM, TOP = 720, 300, 84, 44, 34  # of the drawing, and its margins


def dots(groups: list[str], series: list[str], values: list[list], y: str) -> str:
    """values[series][group] is ((mean, low, high), [each]) or None, shares: a dot for each training, a bar
    for their mean and a whisker for its interval."""
    step = (W - LEFT) / max(1, len(groups))
    width = 0.8 * step / max(1, len(series))
    top = legend_places(series)[-1][1] + TOP - 8
    high, height = H - TOP - BOTTOM, H - TOP + top

    def at(v: float) -> float:
        return top + high * (1 - v / 100)

    out = [axis(100, at), *legend(series)]
    for g, name in enumerate(groups):
        out.append(text(LEFT + (g + 0.5) * step, height - BOTTOM + 16, name))
        for s in range(len(series)):
            if not (v := values[s][g]):
                continue
            (mean, low, up), each = v
            left, colour = LEFT + g * step + 0.1 * step + s * width, COLOURS[s % len(COLOURS)]
            middle, half = left + width / 2, max(2.0, 0.35 * width)
            out.append(
                f'<path d="M{middle - half:.1f} {at(100 * mean):.1f}H{middle + half:.1f}" stroke="{colour}" '
                f'stroke-width="3"/><path d="M{middle:.1f} {at(100 * low):.1f}V{at(100 * up):.1f}" '
                f'stroke="{colour}" opacity=".6"/>'
            )
            for i, value in enumerate(each):  # beside each other, so that equal ones are seen
                x = middle + half * ((i + 0.5) / len(each) * 2 - 1) * 0.9
                out.append(
                    f'<circle cx="{x:.1f}" cy="{at(100 * value):.1f}" r="3" fill="{colour}" opacity=".75"/>'
                )
    return frame(out, "", y, height)


def frontier(series: list[str], lines: list[list[tuple[float, float]]], x: str, y: str) -> str:
    """lines[series] is [(share of x, share of y), ...], joined in their order; the last point is the
    largest."""
    top = legend_places(series)[-1][1] + TOP - 8
    height = H - TOP + top

    def across(v: float) -> float:
        return LEFT + (W - LEFT - 20) * v

    def at(v: float) -> float:
        return top + (H - TOP - BOTTOM) * (1 - v / 100)

    out = [axis(100, at), *legend(series)]
    out += [text(across(k / 4), height - BOTTOM + 16, f"{25 * k}") for k in range(5)]
    for s, line in enumerate(lines):
        colour, places = COLOURS[s % len(COLOURS)], [(across(a), at(100 * b)) for a, b in line]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for k, (a, b) in enumerate(places):
            out.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{5 if k == len(places) - 1 else 3}" fill="{colour}"/>'
            )
    return frame(out, f"{x}, %", f"{y}, %", height)


def stacked(rows: list[str], parts: list[str], values: list[list[float]], x: str, y: str) -> str:
    """values[row][part]: one horizontal bar a row, its parts side by side."""
    most, line, left = max([sum(v) for v in values] + [1e-9]), 24, 170
    bottom = TOP + line * len(rows)
    out = legend(parts)
    for k in range(5):
        place = left + (W - left - 30) * k / 4
        out.append(f'<path d="M{place:.1f} {TOP}V{bottom}" stroke="currentColor" opacity=".2"/>')
        out.append(text(place, bottom + 16, f"{most * k / 4:.3g}"))
    for r, name in enumerate(rows):
        start, top = left, TOP + line * r + 4
        out.append(text(left - 6, top + 12, name, "end"))
        for p, value in enumerate(values[r]):
            width = (W - left - 30) * value / most
            out.append(
                f'<rect x="{start:.1f}" y="{top}" width="{width:.1f}" height="{line - 8}" '
                f'fill="{COLOURS[p % len(COLOURS)]}"/>'
            )
            start += width
    return frame(out, x, y, bottom + BOTTOM)


def lines(series: list[str], points: list[list], x: str, y: str, ring: bool = True) -> str:
    """points[series] is [(x, y), ...]: a line for each, with a ring at its lowest point. The y axis need not
    begin at 0."""
    xs, ys = ([p[i] for line in points for p in line] for i in (0, 1))
    low, most, far = min(ys), max(ys), max(xs) or 1
    floor = 0.0 if low >= 0 else -math.inf  # what is never negative has no such axis
    low, most = max(floor, low - 0.05 * (most - low + 1e-9)), most + 0.05 * (most - low + 1e-9)

    def across(v: float) -> float:
        return LEFT + (W - LEFT - 20) * v / far

    def at(v: float) -> float:
        return TOP + (H - TOP - BOTTOM) * (most - v) / (most - low)

    out = [axis(most, at, low), *legend(series)]
    out += [text(across(far * k / 4), H - BOTTOM + 16, f"{far * k / 4:.0f}") for k in range(5)]
    for s, line in enumerate(points):
        path = " ".join(f"{across(a):.1f},{at(b):.1f}" for a, b in line)
        a, b = min(line, key=lambda p: p[1])
        colour = COLOURS[s % len(COLOURS)]
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            + f'<circle cx="{across(a):.1f}" cy="{at(b):.1f}" r="4" fill="none" stroke="{colour}"/>' * ring
        )
    return frame(out, x, y, H)


def axis(most: float, at, least: float = 0.0) -> str:
    lines = []
    for k in range(5):
        v = least + (most - least) * k / 4
        lines.append(
            f'<path d="M{LEFT} {at(v):.1f}H{W}" stroke="currentColor" opacity=".2"/>'
            + text(LEFT - 6, at(v) + 4, f"{v:.3g}", "end")
        )
    return "".join(lines)


def legend_places(names: list[str]) -> list[tuple[int, int]]:
    """Where each name stands, in as many lines as they need."""
    places, x, y = [], LEFT, 8
    for name in names:
        wide = 32 + round(6.6 * len(name))
        if places and x + wide > W:
            x, y = LEFT, y + 18
        places.append((x, y))
        x += wide
    return places


def legend(names: list[str]) -> list[str]:
    out = []
    for i, (name, (x, y)) in enumerate(zip(names, legend_places(names), strict=True)):
        out.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{COLOURS[i % len(COLOURS)]}"/>')
        out.append(text(x + 17, y + 10, name, "start"))
    return out


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="currentColor"{more}>'
        f"{escape(words)}</text>"
    )


def frame(parts: list[str], x: str, y: str, height: int) -> str:
    middle = f' transform="rotate(-90 14 {height / 2:.0f})"'
    labels = [text(W / 2, height - 8, x), text(14, height / 2, y, more=middle)]
    return (
        f'<svg viewBox="0 0 {W} {height}" role="img" '
        f'aria-label="{escape(f"{y} by {x}")}">{"".join(parts + labels)}</svg>'
    )
