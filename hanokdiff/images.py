"""Pictures: read from files as RGB and upright, cropped, laid out in a grid. Imports no torch."""

import io
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from hanokdiff.files import replacing, what_else

SUFFIXES = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif",
    ".jpe", ".heic", ".heif", ".jxl", ".jp2", ".dng",  # most Pillow cannot read: named, not passed over
}  # fmt: skip
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF")  # not EPS: it runs Ghostscript
ORIENTATION = 0x0112  # EXIF tag: 1 is upright, 2 to 8 are the other ways to hold a camera


def read_photo(path: str | Path) -> tuple[Image.Image, str]:
    """The first frame of a picture file as RGB, upright, over white; and a note on what was changed."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is not a file")  # a pipe would be waited for
        with Image.open(path, formats=readable_formats()) as image:  # refuses 179 million pixels or more
            frames = (
                1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            )  # MPO: a phone's, with depth
            turned = image.getexif().get(ORIENTATION) in range(2, 9)
            image.load()  # after asking: a TIFF turns itself as it loads
            ImageOps.exif_transpose(image, in_place=True)
            image, colours = to_srgb(image)
            image, note = to_rgb(image)
    except UnidentifiedImageError:
        other = what_else(path)
        problem = (
            f"it is {other}"
            if other
            else ("not a picture, or broken at its beginning; if other programs show it, save it as JPEG")
        )
        raise ValueError(f"{path.name!r} cannot be read: {problem}") from None
    except Exception as e:  # by format, Pillow raises OSError, SyntaxError, struct.error, EOFError...
        raise ValueError(f"{path.name!r} cannot be read: {str(e) or type(e).__name__}") from e
    first = "first of its frames" if frames > 1 else ""
    return image, listed("rotated by EXIF" if turned else "", first, colours, note)


@cache
def readable_formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def listed(*notes: str) -> str:
    """The notes that are not empty, separated by commas."""
    return ", ".join(note for note in notes if note)


SPACES = {"L": "GRAY", "RGB": "RGB ", "RGBA": "RGB ", "CMYK": "CMYK"}  # mode -> what an ICC profile calls it


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """The colours that an embedded ICC profile means, as sRGB; and a note if they were converted. Without it
    an Adobe RGB photo looks pale and a ProPhoto one grey (sd-scripts#2179)."""
    if not (icc := image.info.get("icc_profile")):
        return image, ""
    image = image.convert("RGBA" if image.has_transparency_data else "RGB") if image.mode in "PA" else image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        name = " ".join(ImageCms.getProfileDescription(profile).split())
        if "srgb" in name.lower():
            return image, ""
        if SPACES.get(image.mode) != profile.profile.xcolor_space:
            return image, f"colour profile {name[:30]!r} not used: it is for other pictures"
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = image.convert("RGB") if alpha else image
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, "colour profile unreadable, so not used"
    if alpha:
        image.putalpha(alpha)
    return image, f"colours converted from {name[:30]!r}"


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Any mode -> RGB, and a note if something transparent had to be filled."""
    if image.mode.startswith(("I", "F")):
        image = to_8_bits(image)
    if image.has_transparency_data:  # an alpha channel, or one colour declared transparent
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            # editors leave any colour where alpha is 0; dropping the channel would show it
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB"), "transparency laid over white"
    return image.convert("RGB"), ""


def to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey. Pillow's own convert clips at 255, which leaves a white sheet."""
    grey = np.asarray(image)
    if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"values from {grey.min():.6g} to {grey.max():.6g}; save it with 8 or 16 bits")
    eight = np.round(grey / 257).astype(np.uint8)
    if (hole := image.info.get("transparency")) is not None:  # a PNG's one transparent grey
        eight[grey == hole] = 255
    return Image.fromarray(eight)


def crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of this shape, resized to it; the aspect is kept."""
    method = Image.Resampling.LANCZOS if min(image.size) > min(size) else Image.Resampling.BICUBIC
    return ImageOps.fit(image, size, method)


def webui_parameters(
    prompt: str,
    steps: int,
    sampler: str,
    cfg: float,
    seed: int,
    size: tuple[int, int],
    model: str,
    negative: str = "",
    more: Iterable[tuple[str, object]] = (),
) -> str:
    """How a picture was made, as the WebUI's "parameters" text, which any tool can read."""
    settings = [
        ("Steps", steps),
        ("Sampler", sampler),
        ("CFG scale", f"{cfg:g}"),
        ("Seed", seed),
        ("Size", f"{size[0]}x{size[1]}"),
        ("Model", model),
        *more,
    ]
    negative = f"\nNegative prompt: {negative}" if negative else ""
    return f"{prompt}{negative}\n" + ", ".join(f"{key}: {value}" for key, value in settings)


def write_png(path: Path, picture: Image.Image, info: dict[str, str] | None = None) -> None:
    """Write a picture aside and rename it; `info` becomes its text chunks, "parameters" the WebUI's."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in (info or {}).items():
        chunks.add_text(key, text)
    with replacing(path) as aside:
        picture.save(aside, "png", pnginfo=chunks)


def grid(pictures: list[Image.Image], columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Pictures of one size, each enlarged `zoom` times, in rows of `columns` on white, `gap` pixels apart."""
    w, h = (zoom * n for n in pictures[0].size)
    rows = -(-len(pictures) // columns)  # rounded up
    out = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, p in enumerate(pictures):
        p = p.resize((w, h), Image.Resampling.NEAREST) if zoom > 1 else p
        out.paste(p, (i % columns * (w + gap), i // columns * (h + gap)))
    return out


TILE = (192, 320)  # a picture on a sheet is shown at a side between these
KOREAN_FONTS = (
    "NanumGothic.ttf", "NotoSansCJK-Regular.ttc", "NotoSansKR-Regular.otf", "malgun.ttf", "AppleGothic.ttf",
)  # fmt: skip
INK, LETTERS = (90, 90, 90), 16


def labelled_sheet(
    tiles: list[list[Image.Image | None]], rows: list[str], columns: list[str], title: str = ""
) -> Image.Image:
    """Pictures in rows and columns with their names, and a title below; small ones enlarged so that they can
    be seen, large ones reduced. None leaves its place empty."""
    side = next(p.size for row in tiles for p in row if p)
    zoom = max(1, TILE[0] // min(side)) if min(side) < TILE[0] else min(1, TILE[1] / max(side))
    w, h = (round(n * zoom) for n in side)
    line = LETTERS + 3
    texts, heads = [wrapped(name, 200) for name in rows], [wrapped(name, w) for name in columns]
    left = max([text_width(t) for lines in texts for t in lines], default=0) + 12
    top = max(map(len, heads), default=0) * line + 8
    width, bottom = left + len(columns) * (w + 4), top + len(rows) * (h + 4)
    foot = wrapped(title, width - 8) if title else []
    out = Image.new("RGB", (width, bottom + len(foot) * line + 8 * bool(foot)), "white")
    for c, lines in enumerate(heads):
        write(out, (left + c * (w + 4), top - 4 - len(lines) * line), lines)
    method = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.LANCZOS
    for r, lines in enumerate(texts):
        y = top + r * (h + 4)
        write(out, (4, y + max(0, h - len(lines) * line) // 2), lines)
        for c, p in enumerate(tiles[r]):
            if p:
                out.paste(p.resize((w, h), method), (left + c * (w + 4), y))
    write(out, (4, bottom + 4), foot)
    return out


@cache
def font(korean: bool = False):
    """Pillow's own font; for Korean, which it lacks, one of the system's, if there is any."""
    for name in KOREAN_FONTS if korean else ():
        try:
            return ImageFont.truetype(name, LETTERS)
        except OSError:
            continue
    return ImageFont.load_default(LETTERS)


def text_width(line: str) -> int:
    return round(font(not line.isascii()).getlength(line))


def wrapped(text: str, width: int, most: int = 4) -> list[str]:
    """The text in lines of this width in pixels; what is beyond the last one is cut, with dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = [lines[most - 1] + " ..."] if len(lines) > most else lines[most - 1 : most]
    return [fitting(line, width) for line in lines[: most - 1] + cut if line]


def fitting(line: str, width: float, measure: Callable[[str], float] = text_width) -> str:
    """The line, or its beginning, as far as there is room."""
    while line and measure(line) > width:
        line = line.removesuffix("...")[:-1].rstrip() + "..." if len(line) > 4 else ""
    return line


def write(image: Image.Image, place: tuple[int, int], lines: list[str]) -> None:
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((place[0], place[1] + i * (LETTERS + 3)), line, INK, font(not line.isascii()))
