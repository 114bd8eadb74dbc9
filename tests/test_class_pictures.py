"""Prior preservation in the three methods that have it: one equation, one set of options."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_dreambooth import by_hand, first_step
from test_scripts import refused

import train_dreambooth
import train_hypernet
import train_lora
import train_ti
from hanokdiff.training import prior
from hanokdiff.training.noise import Batch

SCRIPTS = {
    train_lora: "--rank 2 --text-rank 2 --text-lr 1e-3".split(),
    train_hypernet: "--widths all".split(),
    train_dreambooth: "--text-lr 1e-3".split(),
}
ALL = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory, quick):
    """Photos of the subject and, with captions but for one, pictures of its class."""
    folder = tmp_path_factory.mktemp("home")
    own = ["a building with a roof in the snow", "a building with a roof", "A building with a roof"]
    for name, captions in (("photos", own), ("class", ["a barn", "a castle at night", None])):
        (folder / name).mkdir()
        for i, caption in enumerate(captions):
            corner = (-2 + i + 0.1 * len(name), -1, 1, 1)
            picture = Image.effect_mandelbrot((40, 40), corner, 99).convert("RGB")
            picture.save(folder / name / f"{i}.png")
            if caption:
                (folder / name / f"{i}.txt").write_text(caption)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("warnings.showwarning", warnings.showwarning)
        yield folder


def arguments(script, made, out, *more) -> list[str]:
    common = "--data photos --resolution 32 --steps 3 --batch-size 2 --lr 1e-3 --preview-every 0"
    argv = ["--model", made.folder, *common.split(), "--token", "sks", "--device", "cpu", "--out", out]
    return [str(a) for a in [*argv, *SCRIPTS[script], *more]]


@pytest.mark.parametrize("script", [train_lora, train_hypernet], ids=lambda s: s.__name__)
def test_own_loss_and_class_loss(sd1, script):
    """own + w * class: each the mean of its half, at its own timesteps and noise, by diffusers' networks."""
    more = "--class-images 3 --prior-weight 0.5 --seed 6 --min-snr 5".split()
    seen = first_step(script, arguments(script, sd1, "never", *more))
    photos, pictures = seen.dataset
    batch = Batch(6, 0, range(2), 2)
    one = by_hand(sd1.pipeline, photos, batch, 5)
    two = by_hand(sd1.pipeline, pictures, batch.subset("class"), 5)
    assert abs(one - two) > 1e-3
    assert seen.loss == pytest.approx(one + 0.5 * two, rel=1e-5)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All tensors that a run has left."""
    found = {}
    for file in sorted(out.rglob("*")):
        if file.suffix == ".safetensors":
            found |= {f"{file.name} {k}": t for k, t in load_file(file).items()}
        elif file.name == "hypernet.pt":
            for d, pair in torch.load(file, weights_only=True).items():
                for side, f in enumerate(pair if isinstance(d, int) else ()):
                    found |= {f"{d} {side} {k}": t for k, t in f.items()}
    return found


@ALL
def test_weight_0_is_without_class_pictures(sd1, script, monkeypatch):
    """To the bit, and none is drawn."""
    monkeypatch.setattr(prior, "pictures", None)
    for out, more in (("zero", ("--class-images", 3, "--prior-weight", 0)), ("none", ("--class-images", 0))):
        assert script.main(arguments(script, sd1, out, "--steps", 2, *more)) == 0
    zero, none = (weights(Path(out)) for out in ("zero", "none"))
    assert len(none) > 20 and none.keys() == zero.keys()
    assert all(torch.equal(zero[k], t) for k, t in none.items())
    for out in ("zero", "none"):
        shutil.rmtree(out)


@ALL
def test_pictures_of_ones_own(sd1, script, monkeypatch):
    """--class-images FOLDER: with their captions, else the class's phrase. config.json keeps the folder."""
    monkeypatch.setattr(prior, "pictures", None)
    seen = first_step(script, arguments(script, sd1, "never", "--class-images", "class"))
    assert sorted(seen.dataset[1].prompts) == ["a barn", "a building with a roof", "a castle at night"]
    assert seen.config["class_images"] == "class"


@pytest.mark.parametrize(("script", "more", "words"), [
    (train_lora, "--class-images nowhere", "--class-images nowhere: no such folder"),
    (train_hypernet, "--class-images class --class-prompts photos/0.txt", "which has its own captions"),
    (train_lora, "--class-images 3 --class-phrase sks", "contains the pseudo word"),
])  # fmt: skip
def test_mistakes(sd1, script, more, words, capsys):
    refused(script, arguments(script, sd1, "never", *more.split()), (words,), capsys)
    assert not Path("never").exists()


def test_textual_inversion_has_none(sd1, capsys):
    """Its class term would have no gradient."""
    argv = ["--model", sd1.folder, "--data", "photos", "--class-images", "3", "--out", "never"]
    refused(train_ti, argv, ("no class prompt contains that word", "leave it out"), capsys)


def test_the_loras_of_the_text_encoder_have_a_rate_and_an_end(sd1):
    """They go as far as --text-lr lets them, and after --text-steps no further."""

    def change(out, *more) -> float:
        assert train_lora.main(arguments(train_lora, sd1, out, *more)) == 0
        ups = [t for k, t in load_file(Path(out, "lora.safetensors")).items() if "te_" in k and "up" in k]
        return sum(t.square().sum().item() for t in ups) ** 0.5

    one, tenth = change("one", "--text-lr", 1e-3), change("tenth", "--text-lr", 1e-4)
    first = change("first", "--text-steps", 1)
    assert tenth == pytest.approx(one / 10, rel=0.2) and 0 < first < one
    for out in ("one", "tenth", "first"):
        shutil.rmtree(out)
