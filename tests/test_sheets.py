"""Labelled sheets and X/Y plots: what is written on them, and that each place shows what its labels say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_lora import trained
from test_scripts import refused

import sample
from hanokdiff import axes
from hanokdiff.formats import lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.images import labelled_sheet, text_width, wrapped
from hanokdiff.methods import lora

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_axes():
    assert axes.parse(["seed=1-4", "strength=0.4, 1"]) == {"seed": [1, 2, 3, 4], "strength": [0.4, 1.0]}
    assert axes.parse(["prompt=a barn, red|a castle"]) == {"prompt": ["a barn, red", "a castle"]}
    assert axes.label("file", Path("runs/house/lora.safetensors")) == "house"
    assert axes.label("cfg", 3.0) == "cfg 3" and axes.label("sampler", "ddim") == "ddim"


def test_sheet_places_and_labels():
    """Each picture is where its row and column are, enlarged by a whole number; letters are beside them."""
    colours = [["red", "green"], ["blue", None]]
    tiles = [[c and Image.new("RGB", (64, 64), c) for c in row] for row in colours]
    sheet = np.asarray(labelled_sheet(tiles, ["one", "two"], ["a", "b"], "title"))
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (sheet == colour).all(-1).sum() == 192 * 192
    red, blue = (np.argwhere((sheet == c).all(-1)).min(0) for c in ((255, 0, 0), (0, 0, 255)))
    assert blue[0] == red[0] + 196 and blue[1] == red[1]
    ink = (sheet < 200).all(-1)
    assert ink[: red[0]].any() and ink[red[0] :, : red[1]].any() and ink[-24:].any()


def test_long_labels_stay_in_their_room():
    lines = wrapped("a very long prompt that goes on and on " * 9, 192)
    assert len(lines) == 4 and lines[-1].endswith("...") and all(text_width(line) <= 192 for line in lines)
    assert wrapped("x" * 300, 100)[0].endswith("...")


def picture(path: str) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_an_x_y_plot_shows_what_it_says():
    """Strength x seed and cfg x file: every picture is that of the plain command with these values."""
    sd = load_model("tiny", "cpu", log=None)
    for seed, name in enumerate("ab"):
        loras = lora.insert(sd, 2, 2, seed=seed)
        trained(loras, seed)
        Path(f"runs/{name}").mkdir(parents=True)
        lora_file.save_file(Path(f"runs/{name}/lora.safetensors"), loras, {"hanokdiff_token": "*"})
        lora.remove(sd, loras)
    files = [f"runs/{name}/lora.safetensors" for name in "ab"]
    plain = "--steps 2 --device cpu --out".split()
    argv = ["* in the snow", "--lora", files[0], "--vary", "strength=0.5,1", "seed=3,4", *plain, "v"]
    assert sample.main(argv) == 0
    for k, strength, seed in ((1, 0.5, 4), (2, 1, 3)):
        lone = ["* in the snow", "--lora", f"{files[0]}:{strength}", "--seed", seed, *plain, f"p{k}"]
        assert sample.main(list(map(str, lone))) == 0
        assert picture(f"v/{k:05d}-{seed}.png") == picture(f"p{k}/00000-{seed}.png")
    assert f"lora.safetensors:{0.5}" in Image.open("v/00000-3.png").info["parameters"]
    assert sample.main(["*", "--vary", "cfg=1,5", f"file={'|'.join(files)}", *plain, "w"]) == 0
    for k, cfg, file in ((1, 1, files[1]), (2, 5, files[0])):
        assert sample.main(["*", "--lora", file, "--cfg", str(cfg), *plain, f"q{k}"]) == 0
        assert picture(f"w/{k:05d}-0.png") == picture(f"q{k}/00000-0.png")
    assert Image.open("w/grid.png").width > 2 * 192


@pytest.mark.parametrize(("argv", "word"), [
    ("* --vary colour=1,2", "AXIS one of prompt, seed"),
    ("* --vary cfg=1", "1 values"),
    ("* --vary cfg=1,x", '"x" is not a number'),
    ("* --vary cfg=1,2 seed=1,2 steps=1,2", "3 axes"),
    ("* --vary cfg=1,2 cfg=3,4", "names cfg twice"),
    ("* --vary strength=0.5,1", "needs a --lora"),
    ("* --vary file=a.safetensors|b.safetensors", "no such file"),
    ("* --vary seed=1-3 --n 2", "leave out --n"),
    ("a b --vary seed=1-3 cfg=1,2", "give one prompt"),
    ("* --vary sampler=ddim,nonsense", "nonsense"),
    ("* --vary steps=0,2", "at least 1"),
])  # fmt: skip
def test_refused(argv, word, capsys):
    refused(sample, [*argv.split(), "--device", "cpu"], [word], capsys)
