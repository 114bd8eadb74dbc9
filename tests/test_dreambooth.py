"""DreamBooth: the two-term loss against diffusers, what moves and what stays, class pictures, the folder.

All runs share a home folder, so that its class pictures are drawn once, in two steps instead of twenty."""

import hashlib
import io
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import difference
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file
from test_lora import inputs
from test_scripts import listing, refused, shown_at

import train_dreambooth
from hanokdiff.formats import folder as layout
from hanokdiff.formats.load import load_model
from hanokdiff.formats.tokenizer import save_tokenizer
from hanokdiff.training import args, prior
from hanokdiff.training.dataset import LatentDataset
from hanokdiff.training.noise import Batch
from hanokdiff.training.trainer import Trainer

CAPTIONS = ["a building with a roof in the snow", "A building with a roof", "a building with a roof at night"]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory, quick):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("warnings.showwarning", warnings.showwarning)
        yield folder


@pytest.fixture(scope="module")
def photos(home):
    (home / "photos").mkdir()
    for i, caption in enumerate(CAPTIONS):
        picture = Image.effect_mandelbrot((40, 40), (-2 + i, -1, 1, 1), 99).convert("RGB")
        picture.save(home / f"photos/{i}.png")
        (home / f"photos/{i}.txt").write_text(caption)
    return home / "photos"


def arguments(made, photos, out, *more) -> list[str]:
    how = (
        "--resolution 32 --steps 3 --batch-size 2 --lr 1e-3 --text-lr 1e-3 --class-images 3 "
        "--preview-every 0 --save-every 0 --token sks --device cpu --out"
    )
    argv = ["--model", made.folder, "--data", photos, *how.split(), out, *more]
    return [str(a) for a in argv]


def train(made, photos, out, *more) -> dict[str, torch.Tensor]:
    assert train_dreambooth.main(arguments(made, photos, out, *more)) == 0
    return tensors(Path(out) / "model")


def tensors(folder) -> dict[str, torch.Tensor]:
    """All of a model folder, with names such as unet.conv_in.weight."""
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    found = {}
    for part, name in files.items():
        held = load_file(folder / part / f"{name}.safetensors")
        found |= {f"{part}.{k.removeprefix('text_model.')}": t for k, t in held.items()}
    return found


def moved(a: dict, b: dict) -> set[str]:
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k])}


def of(part: str, names) -> set[str]:
    return {n for n in names if n.startswith(part)}


@pytest.fixture(scope="module")
def base(sd1):
    return tensors(sd1.folder)


@pytest.fixture(scope="module")
def whole(sd1, photos):
    """A run with everything on."""
    return train(sd1, photos, "whole", "--save-every", 2, "--preview-every", 3)


# --------------------------------------------------------------------------------------------------- the loss


class EnoughError(Exception):
    pass


def first_step(script, argv) -> SimpleNamespace:
    """The loss of a run's first step, its gradients, its config.json, and the photos that it draws from. The
    run is in "never", and is deleted."""
    seen = SimpleNamespace(loss=0.0, dataset=[], gradients={})

    class Recorded(LatentDataset):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            seen.dataset.append(self)

    def update(run, loss):
        seen.loss += loss.mean().item() * run.share
        old_update(run, loss)

    def finish(run):
        seen.gradients = {k: p.grad.clone() for k, p in run.trainable.items() if p.grad is not None}
        raise EnoughError

    old_update = Trainer.backward
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EnoughError):
        for module in (args, prior):  # the photos, then the class pictures
            patch.setattr(module, "LatentDataset", Recorded)
        patch.setattr(Trainer, "backward", update)
        patch.setattr(Trainer, "_optimizer_step", finish)
        script.main(argv)
    seen.config = json.loads(Path("never/config.json").read_text())
    shutil.rmtree("never")
    return seen


@torch.no_grad()
def by_hand(pipeline, dataset, batch: Batch, gamma: float) -> float:
    """One term: diffusers' noise, text encoder and UNet, at the draws of this half alone."""
    x_0, prompts = dataset[batch]
    t, eps = batch.integers(1000, "timestep"), batch.normal(x_0.shape)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    out = pipeline.unet(schedule.add_noise(x_0, eps, t), t, pipeline.text_encoder(ids)[0]).sample
    v = schedule.config.prediction_type == "v_prediction"
    losses = (out - (schedule.get_velocity(x_0, eps, t) if v else eps)).square().mean((1, 2, 3))
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    return (losses * (snr.clamp(max=gamma) / (snr + v) if gamma else 1)).mean().item()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("gamma", [0, 5])
def test_the_loss_has_two_terms(sd1, sd2, photos, size, gamma):
    """Each the mean of its own half, at its own timesteps and noise; epsilon and v, min-SNR or not."""
    made = sd2 if size == 4 and not gamma else sd1
    more = f"--batch-size {size} --min-snr {gamma} --prior-weight 0.5 --seed 6".split()
    seen = first_step(train_dreambooth, arguments(made, photos, "never", *more))
    own, cls = seen.dataset
    assert sorted(own.prompts) == ["sks", "sks at night", "sks in the snow"]
    assert cls.prompts == [p.replace("sks", "a building with a roof") for p in own.prompts]
    batch = Batch(6, 0, range(size), size)  # as any other method's
    one = by_hand(made.pipeline, own, batch, gamma)
    two = by_hand(made.pipeline, cls, batch.subset("class"), gamma)
    assert min(one, two) > 1e-3 and abs(one - two) > 1e-3
    assert seen.loss == pytest.approx(one + 0.5 * two, rel=1e-5)
    if size == 4 and gamma:
        more = [*more, "--micro-batch", 3]
        split = first_step(train_dreambooth, arguments(made, photos, "never", *more))
        assert split.loss == pytest.approx(seen.loss, rel=1e-6)
        assert split.gradients.keys() == seen.gradients.keys() and len(seen.gradients) > 700
        scale = max(g.abs().max() for g in seen.gradients.values())
        assert max((split.gradients[k] - g).abs().max() for k, g in seen.gradients.items()) <= 1e-5 * scale


def test_without_class_pictures(sd1, photos, monkeypatch):
    """One term, and nothing is drawn; it is the first of the two."""
    monkeypatch.setattr(prior, "pictures", None)
    more = "--class-images 0 --seed 6 --prior-weight 0.5".split()
    seen = first_step(train_dreambooth, arguments(sd1, photos, "never", *more))
    (own,) = seen.dataset
    assert seen.loss == pytest.approx(by_hand(sd1.pipeline, own, Batch(6, 0, range(2), 2), 0), rel=1e-5)


# ------------------------------------------------------------------------------------- what moves, what stays


def test_what_learns(sd1, base, whole, home):
    """All of UNet and text encoder, the autoencoder never; of the table of words the pseudo word's row."""
    assert moved(base, whole) == of("unet", base) | of("text_encoder", base)
    table, now = (t["text_encoder.embeddings.token_embedding.weight"] for t in (base, whole))
    changed = (now != table).any(1).nonzero().flatten().tolist()
    assert changed == sd1.pipeline.tokenizer("sks", add_special_tokens=False).input_ids
    assert now.shape == table.shape and (now - table).abs().max() > 1e-4
    names = "class.json config.json index.html log.csv log.jsonl model model-000002 previews state"
    assert sorted(p.name for p in (home / "whole").iterdir()) == names.split()
    assert moved(tensors(home / "whole" / "model-000002"), whole) >= of("unet", base)
    told = json.loads((home / "whole" / "class.json").read_text())
    assert told["pictures"] == 3 and told["seconds"] > 0
    assert shown_at(home / "whole" / "previews" / "000003.png") == 32  # the side that it trains at
    assert not moved(base, tensors(sd1.folder))


def test_the_text_encoder_may_stop_and_a_run_go_on(sd1, photos, base):
    """--text-steps 1 of 3: its weights are those after the first step; stopped and resumed, the same."""
    options = ["--text-steps", 1, "--save-every", 1]
    stopped = train(sd1, photos, "stopped", *options)
    first = tensors(Path("stopped/model-000001"))
    assert of("text_encoder", moved(base, first)) and not of("text_encoder", moved(first, stopped))
    assert of("unet", moved(first, stopped)) == of("unet", base)
    update = Trainer.backward

    def crash(run, loss):
        if run.step == 2:
            raise RuntimeError("the power went")
        update(run, loss)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Trainer, "backward", crash)
        train(sd1, photos, "again", *options)
    told, pictures = '{"pictures": 3, "seconds": 99.0}', listing(Path("runs/class"))
    assert Path("again/class.json").exists() and Path("again/class.json").write_text(told)
    assert not Path("again/model").exists()
    assert train_dreambooth.main(["--resume", "again", "--device", "cpu"]) == 0
    assert not moved(tensors(Path("again/model")), stopped)
    assert Path("again/class.json").read_text() == told and listing(Path("runs/class")) == pictures


def test_edited_class_pictures_are_noticed(sd1, photos, base, capsys):
    """Deleted ones are drawn again, the very same; with an edited one the run goes on only if told to."""
    resume = ["--resume", "edited", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(sd1, photos, "edited", "--save-every", 1)
        before = listing(Path("runs/class"))
        for file in Path("runs/class").rglob("*.png"):
            file.unlink()
        with pytest.raises(ZeroDivisionError):
            train_dreambooth.main(resume)
    after = listing(Path("runs/class"))
    assert len(after) == 3
    for name, now in after.items():  # the pixels: the file also says how long it took
        then = before[name]
        assert same([Image.open(io.BytesIO(now))], [Image.open(io.BytesIO(then))])
        Image.new("RGB", (32, 32), "red").save(Path("runs/class") / name)
    refused(train_dreambooth, resume, ("edited: class_pictures was", "is now", "--force"), capsys)
    assert train_dreambooth.main([*resume, "--force"]) == 0
    assert "--force: class_pictures was" in capsys.readouterr().out
    for name, whole in before.items():  # the other tests' too
        (Path("runs/class") / name).write_bytes(whole)


def test_frozen_text_and_a_crash_while_the_model_is_written(sd1, photos, base, monkeypatch):
    """What is not whole does not stand under the model's name; the run goes on from its last state."""
    save, count = save_tokenizer, []

    def crash(*args):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("the disk went")
        save(*args)

    options = ["--freeze-text", "--class-images", 0, "--steps", 2, "--save-every", 1]
    argv = arguments(sd1, photos, "broken", *options)
    del argv[argv.index("--text-lr") : argv.index("--text-lr") + 2]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(layout, "save_tokenizer", crash)
        train_dreambooth.main(argv)
    assert sorted(p.name for p in Path("broken").glob("model*")) == ["model-000001", "model.part"]
    Path("broken/model.part/unet/.tmpAb3dE6").write_bytes(b"half a file, as a kill leaves it")
    assert train_dreambooth.main(["--resume", "broken", "--device", "cpu"]) == 0
    assert sorted(p.name for p in Path("broken").glob("model*")) == ["model", "model-000001"]
    assert not list(Path("broken").rglob(".tmp*"))
    frozen = tensors(Path("broken/model"))
    assert moved(base, frozen) == of("unet", base)
    argv[argv.index("broken")] = "peace"
    assert train_dreambooth.main(argv) == 0 and not moved(tensors(Path("peace/model")), frozen)


def test_half_precision(sd1, photos, base):
    """bf16 weights with fp32 masters; the folder is fp16, as others publish. At 64 px: at 32, where a
    convolution of stride 2 has 1x1 to go on, torch's CPU gradient of its bf16 weight is unwritten memory."""
    how = "--dtype bf16 --class-images 0 --steps 2 --resolution 64"
    half = train(sd1, photos, "half", *how.split())
    assert {t.dtype for t in half.values()} == {torch.float16}
    assert all(torch.isfinite(t).all() for t in half.values())
    whole = {k: t.half() for k, t in base.items()}
    assert not of("vae", moved(whole, half)) and len(moved(whole, half)) > 500


def test_half_precision_loses_no_digit(sd1, photos, base):
    """What is learnt begins at the file's own numbers and is saved with all its digits: after a step too
    small to matter the folder is the model it was, to fp16's last digit."""
    how = "--dtype bf16 --class-images 0 --steps 1 --resolution 64 --lr 1e-9 --text-lr 1e-9 --word-lr 1e-9"
    half = train(sd1, photos, "still", *how.split())
    for name, t in base.items():
        t = t.half()
        assert ((half[name].float() - t.float()).abs() <= 2.0**-10 * t.float().abs() + 1e-6).all(), name
    assert any(not torch.equal(t.half(), t.bfloat16().half()) for t in base.values())


def test_the_folder_in_diffusers(whole, sd1, home):
    """The whole pipeline; and here, with its word."""
    folder = home / "whole" / "model"
    pipeline, sd = StableDiffusionPipeline.from_pretrained(folder), load_model(str(folder), "cpu", log=None)
    pixels, ids = inputs()
    with torch.no_grad():
        out, text = pipeline.unet(*pixels).sample, pipeline.text_encoder(ids)[0]
        assert difference(sd.unet(*pixels), out) <= 1e-5 and difference(sd.text.encoder(ids), text) <= 1e-5
        assert difference(out, sd1.pipeline.unet(*pixels).sample) > 1e-2
        assert difference(text, sd1.pipeline.text_encoder(ids)[0]) > 1e-2
    assert pipeline.tokenizer("sks fire").input_ids == sd1.pipeline.tokenizer("sks fire").input_ids
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert json.loads((folder / "hanokdiff.json").read_text()) == {"token": "sks"}
    assert list(sd.text.words) == ["sks"]


# --------------------------------------------------------------------------------------------- class pictures


def test_class_prompts():
    """The captions with the class in place of the word, wherever and however it is written."""
    captions = ["sks in the snow", "Sks, asks; (SKS)", "a barn"]
    expected = [r"a \1 house in the snow", r"a \1 house, asks; (a \1 house)", "a barn"]
    assert prior.prompts(captions, "sks", r"a \1 house") == expected
    assert prior.prompts(["*, night", "**"], "*", "a house") == ["a house, night", "a housea house"]
    for token, phrase in (("sks", "an SKS house"), ("*", "a (*) house"), ("a house", "near A  house")):
        with pytest.raises(ValueError, match="contains the pseudo word"):
            prior.prompts(captions, token, phrase)


def test_more_class_prompts(tmp_path):
    """In turn with the captions; whichever are fewer come again, and none is left out."""
    file = tmp_path / "more.txt"
    file.write_text("\ufefffire\n\n  the sea at night \r\nsnow", encoding="utf-8")
    lines = ["fire", "the sea at night", "snow"]
    few, many = (prior.prompts(own, "sks", "x", file) for own in (["sks"], ["sks", "a", "b", "c"]))
    assert few == ["x", lines[0], "x", lines[1], "x", lines[2]]
    assert many == ["x", lines[0], "a", lines[1], "b", lines[2], "c", lines[0]]
    file.write_text("fire\nan SKS")
    with pytest.raises(ValueError, match='"an SKS" contains the pseudo word'):
        prior.prompts(["sks"], "sks", "x", file)


@pytest.fixture
def painter(sd1, load):
    """A model that draws at once: a colour by the prompt and the seed. `drawn` is what it was asked."""
    sd, drawn = load(sd1), []

    def draw(prompts, seeds, batch_size=32, size=None, **_):
        drawn.extend(asked := list(zip(prompts, seeds, strict=True)))
        assert len(prompts) <= batch_size <= 32
        colours = [hashlib.sha256(f"{p} {s}".encode()).hexdigest()[:6] for p, s in asked]
        return [Image.new("RGB", size, f"#{colour}") for colour in colours]

    text = SimpleNamespace(encoder=sd.text.encoder, chunks=sd.text.chunks, clip_skip=1)
    kept = {k: getattr(sd, k) for k in ("unet", "vae", "batches", "digest", "dtype", "schedule", "cfg")}
    return SimpleNamespace(text=text, name="a/model", draw=draw, drawn=drawn, **kept)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(ImageChops.difference(x, y).getbbox() is None for x, y in zip(a, b))


def test_class_pictures_are_drawn_once(painter, tmp_path):
    texts, root = ["a house", "a house (big)", "a house BREAK"], tmp_path / "class"
    three, prompts, seconds = prior.pictures(painter, texts, 3, 32, 7, root)
    assert painter.drawn == [("a house", 7), (r"a house \(big\)", 8), (r"a house B\REAK", 9)]
    assert prompts == texts and all(p.size == (32, 32) for p in three)
    seven, prompts, _ = prior.pictures(painter, texts, 7, 32, 7, root)  # more: what is there stays
    assert same(seven[:3], three) and prompts == [*texts, *texts, "a house"] and len(painter.drawn) == 3 + 7
    assert not same(seven[:1], seven[3:4]) and painter.drawn[-1] == ("a house", 13)
    again, _, found = prior.pictures(painter, texts, 7, 32, 7, root)
    assert same(again, seven) and found[0] >= seconds[0] > 0  # what they cost is known, whoever drew them
    assert same(prior.pictures(painter, texts, 2, 32, 7, root)[0], seven[:2]) and len(painter.drawn) == 10
    file = sorted(root.rglob("*.png"))[3]
    file.unlink()
    before = listing(root)
    assert same(prior.pictures(painter, texts, 7, 32, 7, root)[0], seven) and len(painter.drawn) == 17
    assert file.exists() and before.items() < listing(root).items()
    # seed 8: its first two are there
    for change in (dict(seed=8), dict(sizes=40), dict(texts=["a barn"])):
        count = len(painter.drawn)
        options = {**dict(texts=texts[:1], n=1, sizes=32, seed=7, root=root), **change}
        prior.pictures(painter, **options)
        assert len(painter.drawn) == count + 1, change
    assert not list(root.rglob("*.part"))


def test_every_model_has_its_own(painter, tmp_path):
    prior.pictures(painter, ["a house"], 1, 32, 0, tmp_path)
    painter.name = "elsewhere/model"  # a move changes nothing
    prior.pictures(painter, ["a house"], 1, 32, 0, tmp_path)
    assert len(painter.drawn) == 1
    # tests/test_reported.py: of which weights the digest knows
    for name, other in (("digest", "another"), ("dtype", torch.bfloat16), ("cfg", 1.5)):
        setattr(painter, name, other)
        prior.pictures(painter, ["a house"], 1, 32, 0, tmp_path)
    assert len(painter.drawn) == 4 and len(list(tmp_path.iterdir())) == 4


def test_a_damaged_class_picture_is_named(painter, tmp_path):
    prior.pictures(painter, ["a house"], 2, 32, 0, tmp_path)
    file = sorted(tmp_path.rglob("*.png"))[0]
    whole = file.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        file.write_bytes(content)
        words = rf"cannot be read.*delete .*{file.name}, it will be drawn again"
        with pytest.raises(ValueError, match=words) as e:
            prior.pictures(painter, ["a house"], 2, 32, 0, tmp_path)
        assert "\n" not in str(e.value)
    file.unlink()
    prior.pictures(painter, ["a house"], 2, 32, 0, tmp_path)
    assert same([Image.open(file)], [Image.open(io.BytesIO(whole))])


def test_stopped_while_drawing(painter, tmp_path):
    """What is done stays: batches of 32 here."""
    draw, count = painter.draw, []

    def stop(*args, **more):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return draw(*args, **more)

    painter.draw = stop
    with pytest.raises(KeyboardInterrupt):
        prior.pictures(painter, ["a house"], 40, 32, 0, tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == 32
    prior.pictures(painter, ["a house"], 40, 32, 0, tmp_path)
    assert len(painter.drawn) == 40 and painter.drawn[32:] == [("a house", s) for s in range(32, 40)]


def test_a_class_picture_is_its_prompts_and_seeds_alone(sd1, load, tmp_path):
    """Within one grey level, however many are asked for, and beside a prompt of more than 75 tokens."""
    sd, texts = load(sd1), ["a house", "a barn " * 40, "fire"]
    few, many = (prior.pictures(sd, texts, n, 32, 0, tmp_path / str(n))[0] for n in (1, 6))
    assert all(high <= 1 for _, high in ImageChops.difference(few[0], many[0]).getextrema())
    assert max(high for _, high in ImageChops.difference(many[0], many[3]).getextrema()) > 5
    other = prior.pictures(sd, ["fire"], 1, 32, 5, tmp_path / "other")[0]
    assert all(high <= 1 for _, high in ImageChops.difference(other[0], many[5]).getextrema())


# --------------------------------------------------------------------------------------------------- mistakes


def test_mistakes(sd1, photos, whole, home, capsys):
    """More: robustness/test_mistakes.py."""
    before = sorted(home.rglob("*"))
    empty = arguments(sd1, photos, "out", "--replace", "", "--caption", "{token}")
    refused(train_dreambooth, empty, ("--class-phrase is empty",), capsys)
    words = ("whole holds a finished run (model)", "another --out")
    refused(train_dreambooth, arguments(sd1, photos, "whole"), words, capsys)
    resume = ["--resume", "whole", "--device", "cpu"]
    refused(train_dreambooth, resume, ("finished run (model)", "nothing to resume"), capsys)
    refused(train_dreambooth, [*resume, "--freeze-text"], ("--resume", "leave out --"), capsys)
    assert sorted(home.rglob("*")) == before
