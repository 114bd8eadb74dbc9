"""Scores: equal to transformers' own CLIP; scales and intervals as published; the script's every refusal."""

import csv
import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import clipscore
from hanokdiff.scoring import clip as clip_module
from hanokdiff.scoring.clip import (
    LIKENESS,
    MEAN,
    SCALES,
    STD,
    Clip,
    clip_t,
    likeness,
    nearest,
    preprocess,
    presence,
    refclipscore,
    scores,
)
from hanokdiff.scoring.stats import mean_interval, paired_interval, share_interval, t_quantile
from hanokdiff.tiny import world
from hanokdiff.tiny.tokenizer import byte_letters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP of 32 px and 16 tokens, in the standard layout."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    merges = [("h", "o"), ("ho", "use</w>"), ("u", "s"), ("us", "e</w>")]
    letters = byte_letters()  # in CLIP's order
    words = [*letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]  # the end has the highest id
    (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), "utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", "utf-8")
    n = len(words)
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    text = {**common, **ids, "vocab_size": n, "max_position_embeddings": 16}
    vision = {**common, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for p in model.parameters():  # away from the near-zero start, or every picture looks the same
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def clip(folder):
    return Clip(folder)


def drawings(n: int = 3) -> list[Image.Image]:
    return [world.draw(world.scene(i)) for i in range(n)]


@pytest.fixture
def pictures(tmp_path):
    """A folder of 3 PNGs as the WebUI writes them, and a contact sheet."""
    path = tmp_path / "pictures"
    path.mkdir()
    for i, image in enumerate(drawings()):
        save(path / f"{i}.png", f"* in snow {i}\nNegative prompt: blurry\nSteps: 20, Seed: {i}", image)
    Image.new("RGB", (9, 9)).save(path / "grid-0.png")
    return path


def save(path, parameters, image=None):
    info = PngInfo()
    info.add_text("parameters", parameters)
    (image or drawings(1)[0]).save(path, pnginfo=info)


# ----------------------------------------------------------------------------- embeddings


def reference_pixels(image: Image.Image, size: int, mean, std) -> np.ndarray:
    """FORMATS section 6 in slow numpy: (3, size, size)."""
    w, h = image.size
    short = min(w, h)
    image = image.convert("RGB").resize((int(size * w / short), int(size * h / short)), Image.BICUBIC)
    a = np.array(image).astype(np.float64)
    top, left = (int(np.rint((n - size) / 2)) for n in a.shape[:2])
    a = a[top : top + size, left : left + size] / 255
    return np.stack([(a[..., c] - mean[c]) / std[c] for c in range(3)])


@pytest.mark.parametrize("shape", [(64, 64), (100, 64), (47, 91), (32, 35), (35, 32), (20, 20)])
def test_pixels_are_openais(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    ours = preprocess(image, 32).numpy()
    assert ours.dtype == np.float32 and ours.shape == (3, 32, 32)
    np.testing.assert_allclose(ours, reference_pixels(image, 32, MEAN, STD), atol=1e-5)


def test_equals_transformers_forward(clip, folder):
    from transformers import CLIPModel, CLIPTokenizer

    images, texts = drawings(3), ["a house", "a castle on fire"]
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    pixels = torch.tensor(np.stack([reference_pixels(i, 32, MEAN, STD) for i in images])).float()
    words = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **words)
    theirs = out.logits_per_image / model.logit_scale.exp()
    ours = clip.images(images) @ clip.texts(texts).T
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(clip.images(images), out.image_embeds, atol=1e-6, rtol=1e-5)
    assert theirs.std() > 0.01  # or the comparison says nothing


def test_unit_length_and_independent_of_the_batch(clip, monkeypatch):
    images, texts = drawings(5), [f"a house {'x' * i}" for i in range(5)]
    whole = clip.images(images), clip.texts(texts)
    monkeypatch.setattr(clip_module, "BATCH", 2)
    for a, b in zip(whole, (clip.images(iter(images)), clip.texts(texts)), strict=True):
        assert a.shape == (5, 24) and a.dtype == torch.float32
        torch.testing.assert_close(a.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert clip.images([]).shape == clip.texts([]).shape == (0, 24)


def test_colours_come_from_the_folder(clip, copy):
    colours = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.4, 0.5]}'
    (copy / "preprocessor_config.json").write_text(colours)
    other = Clip(str(copy))
    assert other.mean == (0.5, 0.5, 0.5) and other.std == (0.5, 0.4, 0.5)
    assert (other.images(drawings()) - clip.images(drawings())).abs().max() > 1e-3


def test_long_texts_are_cut_and_counted(clip):
    wanted = r'2 of 3 texts are longer than the 16 tokens .*longest has 102: "x y x y .*"\); .*fewer words'
    with pytest.warns(UserWarning, match=wanted):
        long = clip.texts(["x y " * 40, "x y " * 50, "a"])
    torch.testing.assert_close(long[0], long[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(long[0], clip.texts(["x y " * 7])[0])  # 14 words, start and end: just fits
    assert (long[0] - clip.texts(["x y " * 6])[0]).abs().max() > 1e-3


def test_pools_at_the_end_token_whatever_the_config_says(clip, copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 49407  # the default, which a small vocabulary does not have
    (copy / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(Clip(copy).texts(["a house"]), clip.texts(["a house"]))


@pytest.mark.parametrize("spoil", ["config.json", "model.safetensors", "vocab.json"])
def test_broken_folder(copy, spoil):
    (copy / spoil).write_text("{")
    with pytest.raises(ValueError, match="--clip .* cannot be opened .*config.json, model"):
        Clip(copy)


@pytest.mark.parametrize("change", [lambda w: None, lambda w: w[:, :5].contiguous()], ids=["none", "narrow"])
def test_missing_tensors_are_not_left_random(copy, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["text_projection.weight"] = change(weights["text_projection.weight"])
    weights = {name: w for name, w in weights.items() if w is not None}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors missing or misshapen, such as text_projection.weight"):
        Clip(copy)


def test_hub_out_of_reach(monkeypatch):
    from transformers import CLIPModel

    def offline(*_, **__):
        raise OSError("We couldn't connect\nto anything")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"from the hub \(We couldn't connect\);.* go online once"):
        Clip("openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="--clip ./nowhere: no such folder"):
        Clip("./nowhere")


# ---------------------------------------------------------------------------------- scores


def test_scales_by_hand(clip):
    c = torch.tensor([0.3, -0.2])
    assert SCALES["cosine"].of(c).tolist() == c.tolist()
    assert SCALES["clipscore"].of(c).tolist() == pytest.approx([0.75, 0])
    assert SCALES["x100"].of(c).tolist() == pytest.approx([30, 0])
    images, texts = clip.images(drawings(3)), ["a", "house", "a"]
    got = scores(clip, images, texts)
    plain = (images * clip.texts(texts)).sum(-1)
    prefixed = (images * clip.texts(["A photo depicts " + t for t in texts])).sum(-1)
    torch.testing.assert_close(got["cosine"], plain)
    torch.testing.assert_close(got["clipscore"], 2.5 * prefixed.clamp(min=0))
    torch.testing.assert_close(got["x100"], 100 * plain.clamp(min=0))


def test_presence_and_nearest():
    images, choices = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]), torch.tensor([[0.8, 0.6], [0, 1.0]])
    assert presence(images, choices).tolist() == [0, 1, 0]
    assert nearest(images, choices).tolist() == pytest.approx([0.8, 1, 0.96])
    assert clip_t(images, choices[:1]).tolist() == pytest.approx([0.8, 0.6, 0.96])


def test_likeness_by_hand():
    images, real = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]]), torch.tensor([[0.8, 0.6], [0, 1.0]])
    got = likeness(images, real, torch.tensor([0.5, 0, 0.7]))
    assert got["clip_i"].tolist() == pytest.approx([0.4, 0.88, -0.4])
    assert got["nearest"].tolist() == pytest.approx([0.8, 0.96, 0]) and got["which"].tolist() == [0, 0, 1]
    assert got["nearest"].tolist() == nearest(images, real).tolist()
    assert got["refclipscore"].tolist() == pytest.approx([2 * 0.5 * 0.8 / 1.3, 0, 0])


def test_refclipscore_is_the_harmonic_mean():
    got = refclipscore(torch.tensor([0.75, 0.5, 0.75, 0]), torch.tensor([0.75, 1, -0.2, -0.2]))
    # equal; 2 / (1 / 0.5 + 1 / 1); nothing alike; neither
    assert got.tolist() == pytest.approx([0.75, 1 / 1.5, 0, 0])


def test_a_picture_is_no_reference_of_itself():
    rows = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
    got = likeness(rows, rows, torch.ones(3), torch.eye(3, dtype=torch.bool))
    assert got["clip_i"].tolist() == pytest.approx([0.3, 0.7, 0.4]) and got["which"].tolist() == [1, 2, 1]
    assert got["nearest"].tolist() == pytest.approx([0.6, 0.8, 0.8])
    with pytest.raises(ValueError, match=r"the only reference \(1 given\) is the picture itself"):
        likeness(rows, rows[:1], torch.ones(3), torch.eye(3, dtype=torch.bool)[:, :1])


def test_prompts_cover_the_world():
    assert tuple(world.kind_prompts()) == world.KINDS and world.kind_prompts()["hanok"] == "a hanok"
    assert tuple(world.condition_prompts()) == world.CONDITIONS
    assert world.condition_prompts()["fire"] == "a building on fire"


def test_mean_interval():
    for n, t in {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 29: 2.045, 10_000: 1.960}.items():
        assert t_quantile(n) == pytest.approx(t, abs=6e-4)
    assert t_quantile(9, 0.99) == pytest.approx(3.250, abs=6e-4)
    mean, low, high = mean_interval([1, 2, 3, 4, 5])
    assert (mean, low, high) == pytest.approx((3, 3 - 2.776445 * math.sqrt(2.5 / 5), 3 + 1.963243), abs=1e-4)
    mean, low, high = mean_interval(torch.tensor([0.5]))
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    assert mean_interval([2, 2, 2]) == (2, 2, 2)
    with pytest.raises(ValueError, match="0 values"):
        mean_interval([])


def test_paired_interval_is_students_t_of_the_differences():
    a, b = [5, 7, 6, 9, 8], torch.tensor([4, 5, 3, 5, 3])  # differences 1, 2, 3, 4, 5
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert paired_interval(a, b) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)
    assert paired_interval(b, a) == pytest.approx((-3, -3 - half, half - 3), abs=1e-4)  # antisymmetric
    assert math.isnan(paired_interval([2], [1])[1])
    with pytest.raises(ValueError, match="3 values cannot be paired with 1"):
        paired_interval([1, 2, 3], [1])
    with pytest.raises(ValueError, match="0 values"):
        paired_interval([], [])


def test_planted_difference_is_found_and_planted_equality_is_not():
    """What a pair shares is ten times the difference: two separate intervals would overlap."""
    random = np.random.default_rng(0)
    shared, noise = random.normal(0, 1, 20), random.normal(0, 0.05, (2, 20))
    a, b = shared + noise[0] + 0.1, shared + noise[1]
    value, low, high = paired_interval(a, b)
    assert 0 < low < 0.1 < high and value == pytest.approx(0.1, abs=0.05)
    assert mean_interval(a)[1] < mean_interval(b)[0] < mean_interval(b)[2]
    _, low, high = paired_interval(a - 0.1, b)
    assert low < 0 < high


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_paired_intervals_cover_as_often_as_they_say(confidence):
    random, trials, n = np.random.default_rng(1), 1500, 6
    shared, noise = random.normal(0, 3, (trials, n)), random.normal(0, 1, (2, trials, n))
    found = [paired_interval(*pair, confidence) for pair in zip(shared + noise[0] + 0.5, shared + noise[1])]
    covered = np.mean([low < 0.5 < high for _, low, high in found])
    assert covered == pytest.approx(confidence, abs=4 * math.sqrt(confidence * (1 - confidence) / trials))


def test_share_interval():
    assert share_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share_interval(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((1, 0.7225, 1), abs=1e-4)
    with pytest.raises(ValueError, match="11 of 10"):
        share_interval(11, 10)


# ----------------------------------------------------------------------------------- script


@pytest.mark.parametrize(("text", "prompt", "seed"), [
    ("a castle", "a castle", None), ("two\nlines\nNegative prompt: x\nSteps: 1, Seed: 0", "two\nlines", 0),
    ("a\nSteps: 20, a, Seed: 12, Size: 64x64, Variation seed: 3", "a", 12),
    ("Steps: 20", "", None), ("Negative prompt: x, Seed: 3\nSteps: 20, Seed: 4", "", 4),
    ("a, Steps: not a line, Seed: 3", "a, Steps: not a line, Seed: 3", None),
])  # fmt: skip
def test_origin(text, prompt, seed):
    assert clipscore.origin(text) == {"prompt": prompt, "seed": seed}


def test_one_folder_everything(clip, folder, pictures, tmp_path, capsys):
    files = ["--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "s.csv")]
    ask = ["--replace-token", "*", "a hanok", "--presence", "a hanok | a barn", "--per-image"]
    assert clipscore.main([str(pictures), "--clip", str(folder), *ask, *files]) == 0
    out, err = capsys.readouterr()
    assert "in 3 of 3 prompts" in out and '"a hanok in snow 0"' in out and "pictures only" in out
    assert "2.5 * max(cos, 0)" in out and str(folder) in out and "recognised as" in out
    assert "1 contact sheets skipped (grid-0.png)" in err
    report = json.loads((tmp_path / "s.json").read_text("utf-8"))
    lines = list(csv.DictReader((tmp_path / "s.csv").open()))
    texts = [f"a hanok in snow {i}" for i in range(3)]
    expected = scores(clip, clip.images(drawings()), texts)
    choices = presence(clip.images(drawings()), clip.texts(["a hanok", "a barn"]))
    for rows in (report["images"], lines):
        assert [r["text"] for r in rows] == texts
        assert [r["prompt"] for r in rows] == [f"* in snow {i}" for i in range(3)]
        assert [int(r["seed"]) for r in rows] == [0, 1, 2]
        assert [r["file"] for r in rows] == [str(pictures / f"{i}.png") for i in range(3)]
        assert [r["presence"] for r in rows] == [["a hanok", "a barn"][i] for i in choices]
        for name, values in expected.items():
            assert [float(r[name]) for r in rows] == pytest.approx(values.tolist(), abs=1e-6)
    assert report["scorer"]["model"] == str(folder) and "prefixed" in report["formulas"]["clipscore"]
    assert report["paired"] is None and "clip_i" not in report["formulas"] and "clip_i" not in out
    (summary,) = report["summary"]
    assert summary["n"] == 3
    assert summary["clipscore"] == pytest.approx(mean_interval(expected["clipscore"]), abs=1e-6)
    share = share_interval(int((choices == 0).sum()), 3)
    assert summary["presence"]["a hanok"] == pytest.approx(share)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "s.csv", "s.json"]  # no temporary left


def test_several_inputs_are_apart_and_together(folder, pictures, tmp_path):
    (tmp_path / "b").mkdir()
    drawings(1)[0].save(tmp_path / "b" / "one.jpg")
    (pictures / "1.png").write_bytes(b"no picture")
    report = tmp_path / "s.json"
    paths = [str(pictures), str(tmp_path / "b"), str(pictures / "0.png"), str(tmp_path / "b" / ".." / "b")]
    assert clipscore.main([*paths, "--clip", str(folder), "--prompt", "a barn", "--json", str(report)]) == 0
    report = json.loads(report.read_text("utf-8"))
    assert [(r["folder"], r["n"]) for r in report["summary"]] == [(paths[0], 2), (paths[1], 1), ("all", 3)]
    assert report["summary"][1]["cosine"][1:] == [None, None]  # one picture has no interval
    assert report["unreadable"] == [str(pictures / "1.png")]
    assert {r["text"] for r in report["images"]} == {"a barn"}


def test_unreadable_is_named_and_left_out(folder, pictures, capsys):
    png = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(png[: len(png) // 2])  # half a picture
    assert clipscore.main([str(pictures), "--clip", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert f"note: {pictures / '1.png'} is left out: '1.png' cannot be read: " in err
    assert '"* in snow 0"' in out and '"* in snow 1"' not in out


def test_replace_token_is_a_whole_word(capsys):
    rows = [{"prompt": "sks asks, sks.", "file": "a"}, {"prompt": "*, fire", "file": "b"}]
    clipscore.set_texts(rows, None, [("sks", r"a\1 hanok"), ("*", "a hanok")])
    assert [row["text"] for row in rows] == [r"a\1 hanok asks, a\1 hanok.", "a hanok, fire"]
    assert capsys.readouterr().out.count("in 1 of 2 prompts") == 2
    clipscore.set_texts(rows, " a * ", [("*", "barn")])
    assert [row["text"] for row in rows] == ["a barn", "a barn"] and rows[0]["prompt"] == "sks asks, sks."


# ------------------------------------------------------------------------------- references


def test_reference_everything(folder, pictures, tmp_path, capsys):
    """Against transformers' own embeddings."""
    from transformers import CLIPModel

    (tmp_path / "real").mkdir()
    for i, image in enumerate(drawings(5)[2:]):  # the first is a copy of the third picture
        image.save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "real" / "broken.png").write_bytes(b"no")
    files = ["--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "s.csv")]
    argv = [str(pictures), "--clip", str(folder), "--reference", str(tmp_path / "real"), *files]
    assert clipscore.main(argv) == 0
    out, err = capsys.readouterr()
    assert "broken.png is left out" in err and "whose references are captions" in out
    assert f"like {tmp_path / 'real'}" in out and f"2.png to {tmp_path / 'real' / '0.png'}, 1.0000" in out

    pixels = [reference_pixels(i, 32, MEAN, STD) for i in drawings(5)]
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model.vision_model(pixel_values=torch.tensor(np.stack(pixels)).float()).pooler_output
        rows = model.visual_projection(states).double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows[:3] @ rows[2:].T
    assert cosines.std() > 0.01  # or the comparison says nothing
    report = json.loads((tmp_path / "s.json").read_text("utf-8"))
    for found in (report["images"], list(csv.DictReader((tmp_path / "s.csv").open()))):
        assert [float(r["clip_i"]) for r in found] == pytest.approx(cosines.mean(1), abs=1e-5)
        assert [float(r["nearest"]) for r in found] == pytest.approx(cosines.max(1), abs=1e-5)
        files = [str(tmp_path / "real" / f"{i}.png") for i in cosines.argmax(1)]
        assert [r["nearest_file"] for r in found] == files
        for r, near in zip(found, cosines.max(1)):
            a = float(r["clipscore"])
            assert float(r["refclipscore"]) == pytest.approx(2 * a * near / (a + near) if a else 0, abs=1e-5)
    (summary,) = report["summary"]
    assert summary["clip_i"] == pytest.approx(mean_interval(cosines.mean(1)), abs=1e-5)
    assert [Path(f).name for f in report["references"]] == ["0.png", "1.png", "2.png"]
    assert report["references"][0] != report["unreadable"] == []


def test_pictures_as_their_own_references(clip, folder, pictures, tmp_path, capsys):
    ask = ("--clip", str(folder), "--reference", str(pictures), "--json", str(tmp_path / "s.json"))
    assert clipscore.main([str(pictures), *ask]) == 0
    rows = clip.images(drawings())
    mean = ((rows @ rows.T).sum(1) - 1) / 2
    images = json.loads((tmp_path / "s.json").read_text("utf-8"))["images"]
    assert [r["clip_i"] for r in images] == pytest.approx(mean.tolist(), abs=1e-5)
    assert all(r["nearest_file"] != r["file"] for r in images)
    ask = ("--clip", folder, "--reference", pictures / "0.png")
    assert "the picture itself; give at least one other" in refused(capsys, pictures / "0.png", *ask)


# ------------------------------------------------------------------------------------ pairs


def two_folders(tmp_path, a: list[tuple], b: list[tuple]) -> list[str]:
    """PNGs 00000.png ... of (prompt, seed), drawn from another scene each, so that scores differ."""
    for name, drawn in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        for i, (prompt, seed) in enumerate(drawn):
            image = world.draw(world.scene(10 * i + (name == "b")))
            save(tmp_path / name / f"{i:05d}.png", f"{prompt}\nSteps: 20, Sampler: ddim, Seed: {seed}", image)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def paired(tmp_path, folder, paths, *ask) -> dict:
    argv = [*paths, "--clip", folder, "--paired", "--json", tmp_path / "s.json", *ask]
    assert clipscore.main([str(a) for a in argv]) == 0
    return json.loads((tmp_path / "s.json").read_text("utf-8"))


def test_pairs_are_of_the_same_prompt_and_seed(folder, tmp_path, capsys):
    a = [("*", 0), ("*", 1), ("*, fire", 0), ("* in snow", 3)]
    b = [("a hanok, fire", 0), ("a hanok", 1), ("a hanok", 0), ("a hanok", 7)]
    paths = two_folders(tmp_path, a, b)
    ask = ["--replace-token", "*", "a hanok", "--presence", "a hanok|a barn|a tent", "--reference", paths[1]]
    report = paired(tmp_path, folder, [paths[0] + "/", paths[1]], *ask)
    found, rows = report["paired"], {r["file"]: r for r in report["images"]}
    assert (found["by"], found["pairs"]) == ("prompt and seed", 3)
    assert found["unmatched"] == [f"{paths[0]}/00003.png", f"{paths[1]}/00003.png"]
    a, b = (lambda i: rows[f"{paths[0]}/0000{i}.png"]), (lambda i: rows[f"{paths[1]}/0000{i}.png"])
    pairs = [(a(0), b(2)), (a(1), b(1)), (a(2), b(0))]
    assert list(found["scores"]) == [*SCALES, *LIKENESS, "is a hanok", "is a barn", "is a tent"]
    for name in ("cosine", "clipscore", "clip_i"):
        gaps = [x[name] - y[name] for x, y in pairs]
        assert found["scores"][name]["difference"] == pytest.approx(mean_interval(gaps))
        assert found["scores"][name]["a"] == pytest.approx(sum(x[name] for x, _ in pairs) / 3)
    for label in ("a hanok", "a barn", "a tent"):
        got = found["scores"][f"is {label}"]
        gaps = [(x["presence"] == label) - (y["presence"] == label) for x, y in pairs]
        assert got["difference"][0] == pytest.approx(sum(gaps) / 3) == pytest.approx(got["a"] - got["b"])
        assert (got["difference"][1] is None) == (len(set(gaps)) == 1)  # all alike: no interval
    out = capsys.readouterr().out
    assert "3 pairs" in out and "first - second" in out
    assert f"matched by prompt and seed; 2 unmatched ({paths[0]}/00003.png, {paths[1]}/00003.png)" in out


def test_a_planted_difference_of_pictures_is_found(folder, tmp_path):
    """The second folder holds the references themselves, the first the same on their heads; and twins."""
    drawn = [("a", i) for i in range(8)]
    paths = two_folders(tmp_path, drawn, drawn)
    (tmp_path / "real").mkdir()
    for i in range(8):
        image = Image.open(tmp_path / "b" / f"0000{i}.png")
        image.save(tmp_path / "real" / f"{i}.png")
        save(tmp_path / "a" / f"0000{i}.png", f"a\nSteps: 1, Seed: {i}", image.rotate(180))

    def difference():
        report = paired(tmp_path, folder, paths, "--reference", tmp_path / "real")
        return report["paired"]["scores"]["nearest"]["difference"]

    value, low, high = difference()
    assert value < high < 0 and low < value
    for i in range(8):
        image = Image.open(tmp_path / "b" / f"0000{i}.png").copy()
        save(tmp_path / "a" / f"0000{i}.png", f"a\nSteps: 1, Seed: {i}", image)
    assert difference() == [0, None, None]


def test_with_one_prompt_pairs_go_by_the_pictures_own(folder, tmp_path):
    paths = two_folders(tmp_path, [("*", 0), ("*, fire", 0)], [("*, fire", 0), ("*", 0)])
    report = paired(tmp_path, folder, paths, "--prompt", "a hanok")
    assert report["paired"]["pairs"] == 2 and {r["text"] for r in report["images"]} == {"a hanok"}


def test_pairs_by_file_name(folder, tmp_path, capsys):
    paths = two_folders(tmp_path, [("*", 0), ("*", 1)], [("*", 5), ("*", 6), ("*", 7)])
    Image.open(tmp_path / "b" / "00001.png").convert("RGB").save(tmp_path / "b" / "00001.jpg")
    (tmp_path / "b" / "00001.png").unlink()  # a JPEG tells no seed
    found = paired(tmp_path, folder, paths, "--prompt", "a barn")["paired"]
    assert (found["by"], found["pairs"], found["unmatched"]) == ("file name", 2, [f"{paths[1]}/00002.png"])
    drawings(1)[0].save(tmp_path / "b" / "00000.jpg")
    message = refused(capsys, *paths, "--paired", "--clip", folder, "--prompt", "a barn")
    assert "00000.png are both 00000" in message and "take one of them out" in message


def test_refusals_of_pairs(folder, tmp_path, capsys, monkeypatch):
    paths = two_folders(tmp_path, [("*", 0), ("*, fire", 0)], [("*", 5), ("sks", 6)])
    monkeypatch.setattr(clipscore, "Clip", None)  # would raise TypeError if it were reached
    ask = ("--paired", "--clip", folder)
    assert "but of the 1 paths 1 are; give two: clipscore.py A B" in refused(capsys, paths[0], *ask)
    assert "but of the 3 paths 2 are" in refused(capsys, *paths, paths[0], *ask)
    assert "but of the 2 paths 1 are" in refused(capsys, paths[0], f"{paths[1]}/../a", *ask)
    assert "but of the 2 paths 1 are" in refused(capsys, paths[0], f"{paths[1]}/00000.png", *ask)
    message = refused(capsys, *paths, *ask)
    assert f"no picture of {paths[0]} matches one of {paths[1]} by prompt and seed" in message
    assert '(the first ones: "*" with seed 0; "*"' in message and "draw both from the same" in message
    save(tmp_path / "b" / "00002.png", "*\nSteps: 9, Seed: 5")
    message = refused(capsys, *paths, *ask)
    assert "00000.png and " in message and '"*" with seed 5, so it is unc' in message
    for f in (tmp_path / "b").iterdir():
        f.write_bytes(b"no")
    assert "nothing readable" in refused(capsys, *paths, *ask)


# --------------------------------------------------------------------------------- refusals


def refused(capsys, *argv) -> str:
    assert clipscore.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err and "recognised" not in out
    return last


def test_refusals_of_input(capsys, folder, pictures, tmp_path):
    """More: robustness/test_mistakes.py."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "sheets").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "sheets" / "sheet.png")
    (tmp_path / "bad.png").write_text("no")
    drawings(1)[0].save(tmp_path / "mute.png")
    ask = ("--clip", folder)
    assert "sheets holds no pictures" in refused(capsys, tmp_path / "sheets", *ask)
    assert "mute.png has no prompt" in refused(capsys, pictures, tmp_path / "mute.png", *ask)
    assert "has no prompt" in refused(capsys, pictures, *ask, "--prompt", " ")
    token = (pictures, *ask, "--replace-token")
    assert 'none of the 3 prompts holds "sks"' in refused(capsys, *token, "sks", "a")
    assert "empty TOKEN" in refused(capsys, *token, "", "a")
    wrongs = {"nowhere": "does not exist", "empty": "holds no pictures", "bad.png": "can be read"}
    for wrong, words in wrongs.items():
        message = refused(capsys, pictures, *ask, "--reference", tmp_path / wrong)
        assert wrong in message and words in message


@pytest.mark.parametrize("presence", ["a hanok", "", "|", "a hanok|", "a|b|a"])
def test_refused_presence(capsys, folder, pictures, presence):
    assert "at least 2 different" in refused(capsys, pictures, "--clip", folder, "--presence", presence)


def test_refusals_of_scorer(capsys, folder, pictures, tmp_path):
    save(tmp_path / "big.png", "a", Image.new("RGB", (80, 65)))
    assert "big.png is 65 px" in refused(capsys, pictures, tmp_path / "big.png")
    assert "big.png is 65 px" in refused(capsys, pictures, "--reference", tmp_path / "big.png")
    assert "device foo cannot be used" in refused(capsys, pictures, "--clip", folder, "--device", "foo")


def test_default_is_tiny_up_to_64_pixels(monkeypatch, folder, pictures, capsys):
    monkeypatch.setattr(clipscore, "TINY_CLIP", folder)
    save(pictures / "wide.png", "wide", Image.new("RGB", (200, 64)))
    assert clipscore.main([str(pictures)]) == 0
    assert "CLIP tiny, 32 px" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    heavy = ("transformers", "diffusers", "tokenizers")
    code = f"import clipscore, sys; print([m for m in {heavy} if m in sys.modules])"
    root = Path(clipscore.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
