"""Photos that are not square: which sizes there are, whose turn it is, and that a run keeps to them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_scripts import refused

import train_lora
from hanokdiff.formats.load import load_model
from hanokdiff.training import buckets
from hanokdiff.training.dataset import LatentDataset, load_photos
from hanokdiff.training.noise import Batch


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sizes():
    """In steps, with at most the square's pixels, in both directions, none too long."""
    found = buckets.sizes(512, 64)
    assert (512, 512) in found and (768, 320) in found and (320, 768) in found and (640, 384) in found
    for w, h in found:
        assert w % 64 == h % 64 == 0 and 0.6 * 512**2 < w * h <= 512**2 and max(w, h) <= 2.5 * min(w, h)
        assert (h, w) in found
    assert buckets.sizes(64, 64) == [(64, 64)] == buckets.sizes(64, 48)  # no room for another, no multiple
    assert buckets.nearest((3000, 1000), found) == max(found, key=lambda s: s[0] / s[1])
    assert buckets.nearest((1000, 1010), found) == (512, 512)
    assert buckets.cut((3000, 1000), (512, 512)) == pytest.approx(2 / 3)


def test_turns():
    """Every group as often as its share, at any step within one; a function of the step alone."""
    turns = buckets.Turns([6, 3, 1])
    seen = [turns.at(k) for k in range(100)]
    assert Counter(g for g, _ in seen) == {0: 60, 1: 30, 2: 10}
    for k in range(1, 101):
        count = Counter(g for g, _ in seen[:k])
        assert all(abs(count[g] - k * n / 10) < 1.01 for g, n in enumerate((6, 3, 1)))
    for group in range(3):
        assert [before for g, before in seen if g == group] == list(range(Counter(g for g, _ in seen)[group]))
    assert buckets.Turns([6, 3, 1]).at(57) == seen[57]


def wide_photos(n: int = 4) -> None:
    """Square ones, and wide ones of 2:1."""
    Path("photos").mkdir()
    for i in range(n):
        size = (128, 64) if i % 2 else (64, 64)
        image = Image.effect_mandelbrot(size, (-2 + i / 9, -1, 1, 1), 99).convert("RGB")
        image.save(f"photos/{i}.png")
        Path(f"photos/{i}.txt").write_text(f"sks {i}")


def test_a_batch_is_of_one_size_and_every_photo_comes():
    wide_photos()
    sd, said = load_model("tiny", "cpu", log=None), []
    photos, _ = load_photos(Path("photos"), 64, log=said.append, step=16)
    assert Counter(p.image.size for p in photos) == {(64, 64): 2, (80, 48): 2}
    dataset = LatentDataset(sd.vae, [p.image for p in photos], [p.caption for p in photos])
    seen = []
    for step in range(8):
        x0, prompts = dataset[Batch(0, step, range(2), 2)]
        assert len(set(prompts)) == 2  # a batch of two: both photos of its size
        wide = {f"sks {i}" for i in (1, 3)}
        assert (set(prompts) == wide) == (x0.shape[-1] != x0.shape[-2])
        seen += prompts
    assert set(Counter(seen).values()) == {4}
    square, _ = load_photos(Path("photos"), 64, log=said.append)
    assert {p.image.size for p in square} == {(64, 64)} and any(
        "cropped by more than 10 %" in s for s in said
    )


def test_one_size_is_as_before():
    """With photos of one shape nothing changes: the same latents from the same batch, to the bit."""
    wide_photos()
    sd = load_model("tiny", "cpu", log=None)
    square, _ = load_photos(Path("photos"), 64, log=lambda _: None)
    dataset = LatentDataset(sd.vae, [p.image for p in square], ["a", "b", "c", "d"])
    batch = Batch(0, 5, range(3), 3)
    x0, _ = dataset[batch]
    places = batch.photos(4)
    expected = dataset.mean[0][0, places] + dataset.std[0][0, places] * batch.normal(x0.shape, "latent")
    assert torch.equal(x0, expected)


def test_a_run_with_class_pictures_of_the_same_sizes(capsys):
    """Own and class pictures of a step go through the network together, so they have one size; previews take
    the size that most photos have; --square crops; too few class pictures are refused."""
    wide_photos(5)
    more = "--data photos --token sks --steps 4 --batch-size 2 --preview-every 4 --save-every 0 --rank 2"
    argv = [*more.split(), *"--device cpu --resolution 64 --held-out 1 --class-phrase".split(), "a house"]
    assert train_lora.main([*argv, "--class-images", "6", "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert "sizes: " in said
    sizes = Counter(Image.open(f).size for f in Path("runs/class").rglob("*.png"))
    assert len(sizes) == 2 and sum(sizes.values()) == 6 and min(sizes.values()) >= 1
    assert json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])["step"] == 4
    refused(train_lora, [*argv, "--class-images", "1", "--out", "few"], ["2 sizes", "--square"], capsys)
    more = "--class-images 1 --square --steps 1 --preview-every 0 --out square"
    assert train_lora.main([*argv, *more.split()]) == 0
    assert "cropped by more than 10 %" in capsys.readouterr().out
