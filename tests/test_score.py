"""Scores: equal to transformers' own CLIP; scales and intervals as published; the script's every refusal."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import clipscore
from hanokdiff import score
from hanokdiff.tiny import world


def alphabet() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, in CLIP's order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP of 32 px and 16 tokens, in the standard layout."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    merges = [("h", "o"), ("ho", "use</w>"), ("u", "s"), ("us", "e</w>")]
    words = [*alphabet(), *(c + "</w>" for c in alphabet()), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]  # the end has the highest id
    (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), "utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", "utf-8")
    n, common = (
        len(words),
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(
        text_config={**common, "vocab_size": n, "max_position_embeddings": 16, "bos_token_id": n - 2,
                     "eos_token_id": n - 1, "pad_token_id": n - 1},
        vision_config={**common, "image_size": 32, "patch_size": 8}, projection_dim=24,
    ))  # fmt: skip
    for p in model.parameters():  # away from the near-zero start, or every picture looks the same
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return score.Clip(folder)


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
    ours = score.preprocess(image, 32).numpy()
    assert ours.dtype == np.float32 and ours.shape == (3, 32, 32)
    np.testing.assert_allclose(ours, reference_pixels(image, 32, score.MEAN, score.STD), atol=1e-5)


def test_equals_transformers_forward(clip, folder):
    from transformers import CLIPModel, CLIPTokenizer

    images, texts = drawings(3), ["a house", "a castle on fire"]
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    pixels = torch.tensor(np.stack([reference_pixels(i, 32, score.MEAN, score.STD) for i in images])).float()
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
    monkeypatch.setattr(score, "BATCH", 2)
    for a, b in zip(whole, (clip.images(iter(images)), clip.texts(texts)), strict=True):
        assert a.shape == (5, 24) and a.dtype == torch.float32
        torch.testing.assert_close(a.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert clip.images([]).shape == clip.texts([]).shape == (0, 24)


def test_colours_come_from_the_folder(folder, tmp_path):
    (tmp_path / "c").symlink_to(folder, target_is_directory=True)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.4, 0.5]}'
    )
    try:
        other = score.Clip(str(tmp_path / "c"))
    finally:
        (folder / "preprocessor_config.json").unlink()
    assert other.mean == (0.5, 0.5, 0.5) and other.std == (0.5, 0.4, 0.5)
    assert (other.images(drawings()) - score.Clip(folder).images(drawings())).abs().max() > 1e-3


def test_long_texts_are_cut_and_counted(clip, capsys):
    long = clip.texts(["x y " * 40, "x y " * 50, "a"])
    assert "2 of 3 texts cut to 16 tokens" in capsys.readouterr().err
    torch.testing.assert_close(long[0], long[1])
    torch.testing.assert_close(long[0], clip.texts(["x y " * 7])[0])  # 14 words, start and end
    assert capsys.readouterr().err == ""
    assert (long[0] - clip.texts(["x y " * 6])[0]).abs().max() > 1e-3


def test_pools_at_the_end_token_whatever_the_config_says(clip, folder, tmp_path):
    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 49407  # the default, which a small vocabulary does not have
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(score.Clip(tmp_path).texts(["a house"]), clip.texts(["a house"]))


@pytest.mark.parametrize("spoil", ["config.json", "model.safetensors", "vocab.json"])
def test_broken_folder(folder, tmp_path, spoil):
    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    (tmp_path / spoil).write_text("{")
    with pytest.raises(ValueError, match="cannot be opened .*it needs config.json"):
        score.Clip(tmp_path)


def test_missing_tensors_are_not_left_random(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for f in folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors missing or misshapen, as text_projection.weight"):
        score.Clip(tmp_path)


def test_hub_out_of_reach(monkeypatch):
    from transformers import CLIPModel

    def offline(*_, **__):
        raise OSError("We couldn't connect\nto anything")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(
        ValueError, match=r"neither a folder here nor .*\(We couldn't connect\); go online once"
    ):
        score.Clip("openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="there is no CLIP folder ./nowhere"):
        score.Clip("./nowhere")


# ---------------------------------------------------------------------------------- scores


def test_scales_by_hand(clip):
    c = torch.tensor([0.3, -0.2])
    assert score.SCALES["cosine"].of(c).tolist() == c.tolist()
    assert score.SCALES["clipscore"].of(c).tolist() == pytest.approx([0.75, 0])
    assert score.SCALES["x100"].of(c).tolist() == pytest.approx([30, 0])
    images, texts = clip.images(drawings(3)), ["a", "house", "a"]
    got = score.scores(clip, images, texts)
    plain = (images * clip.texts(texts)).sum(-1)
    prefixed = (images * clip.texts(["A photo depicts " + t for t in texts])).sum(-1)
    torch.testing.assert_close(got["cosine"], plain)
    torch.testing.assert_close(got["clipscore"], 2.5 * prefixed.clamp(min=0))
    torch.testing.assert_close(got["x100"], 100 * plain.clamp(min=0))


def test_presence_and_nearest():
    images, choices = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]), torch.tensor([[0.8, 0.6], [0, 1.0]])
    assert score.presence(images, choices).tolist() == [0, 1, 0]
    assert score.nearest(images, choices).tolist() == pytest.approx([0.8, 1, 0.96])
    assert score.clip_t(images, choices[:1]).tolist() == pytest.approx([0.8, 0.6, 0.96])


def test_prompts_cover_the_world():
    assert tuple(score.kinds()) == world.KINDS and score.kinds()["hanok"] == "a hanok"
    assert (
        tuple(score.conditions()) == world.CONDITIONS and score.conditions()["fire"] == "a building on fire"
    )


@pytest.mark.parametrize(
    ("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045), (10_001, 1.960)]
)
def test_t_quantile_is_the_tables(n, t):
    assert score.t_quantile(n - 1) == pytest.approx(t, abs=6e-4)


def test_mean_interval():
    assert score.t_quantile(9, 0.99) == pytest.approx(3.250, abs=6e-4)
    mean, low, high = score.mean_interval([1, 2, 3, 4, 5])
    assert (mean, low, high) == pytest.approx((3, 3 - 2.776445 * math.sqrt(2.5 / 5), 3 + 1.963243), abs=1e-4)
    mean, low, high = score.mean_interval(torch.tensor([0.5]))
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    assert score.mean_interval([2, 2, 2]) == (2, 2, 2)
    with pytest.raises(ValueError, match="0 values"):
        score.mean_interval([])


def test_share_interval():
    assert score.share_interval(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert score.share_interval(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert score.share_interval(10, 10) == pytest.approx((1, 0.7225, 1), abs=1e-4)
    with pytest.raises(ValueError, match="11 of 10"):
        score.share_interval(11, 10)


# ----------------------------------------------------------------------------------- script


@pytest.mark.parametrize(("text", "prompt"), [
    ("a castle", "a castle"), ("two\nlines\nNegative prompt: x\nSteps: 1", "two\nlines"),
    ("a\nSteps: 20, a", "a"),
    ("Steps: 20", ""), ("Negative prompt: x\nSteps: 20", ""),
    ("a, Steps: not a line", "a, Steps: not a line"),
])  # fmt: skip
def test_prompt_of(text, prompt):
    assert clipscore.prompt_of(text) == prompt


def test_one_folder_everything(clip, folder, pictures, tmp_path, capsys):
    files = ["--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "s.csv")]
    ask = ["--replace-token", "*", "a hanok", "--presence", "a hanok | a barn", "--per-image"]
    assert clipscore.main([str(pictures), "--clip", str(folder), *ask, *files]) == 0
    out, err = capsys.readouterr()
    assert "in 3 of 3 prompts" in out and '"a hanok in snow 0"' in out and "pictures only" in out
    assert "2.5 * max(cos, 0)" in out and str(folder) in out and "recognised as" in out
    assert "1 contact sheets skipped (grid-0.png)" in err
    report, lines = (
        json.loads((tmp_path / "s.json").read_text("utf-8")),
        list(csv.DictReader((tmp_path / "s.csv").open())),
    )
    texts = [f"a hanok in snow {i}" for i in range(3)]
    expected = score.scores(clip, clip.images(drawings()), texts)
    choices = score.presence(clip.images(drawings()), clip.texts(["a hanok", "a barn"]))
    for rows in (report["images"], lines):
        assert [r["text"] for r in rows] == texts and [r["prompt"] for r in rows] == [
            f"* in snow {i}" for i in range(3)
        ]
        assert [r["file"] for r in rows] == [str(pictures / f"{i}.png") for i in range(3)]
        assert [r["presence"] for r in rows] == [["a hanok", "a barn"][i] for i in choices]
        for name, values in expected.items():
            assert [float(r[name]) for r in rows] == pytest.approx(values.tolist(), abs=1e-6)
    assert report["scorer"]["model"] == str(folder) and "prefixed" in report["formulas"]["clipscore"]
    (summary,) = report["summary"]
    assert summary["n"] == 3
    assert summary["clipscore"] == pytest.approx(score.mean_interval(expected["clipscore"]), abs=1e-6)
    share = score.share_interval(int((choices == 0).sum()), 3)
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
    assert f"{pictures / '1.png'} cannot be read and is left out" in err
    assert '"* in snow 0"' in out and '"* in snow 1"' not in out


def test_replace_token_is_a_whole_word():
    rows = [{"prompt": "sks asks, sks."}, {"prompt": "*, fire"}]
    clipscore.replace_token(rows, "sks", r"a\1 hanok")
    assert rows[0]["text"] == r"a\1 hanok asks, a\1 hanok." and rows[1]["text"] == "*, fire"
    clipscore.replace_token(rows, "*", "a hanok")
    assert rows[1]["text"] == "a hanok, fire"


def refused(capsys, *argv) -> str:
    assert clipscore.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err and "recognised" not in out
    return last


def test_refusals_of_input(capsys, folder, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sheets").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "sheets" / "sheet.png")
    (tmp_path / "bad.png").write_text("no")
    drawings(1)[0].save(tmp_path / "mute.png")
    ask = ("--clip", folder)
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere", *ask)
    assert "empty holds no pictures" in refused(capsys, tmp_path / "empty", *ask)
    assert "sheets holds no pictures" in refused(capsys, tmp_path / "sheets", *ask)
    assert "none of the 1 pictures can be read" in refused(capsys, tmp_path / "bad.png", *ask)
    assert "mute.png has no prompt" in refused(capsys, pictures, tmp_path / "mute.png", *ask)
    assert "has no prompt" in refused(capsys, pictures, *ask, "--prompt", " ")
    assert 'none of the 3 prompts holds "sks"' in refused(
        capsys, pictures, *ask, "--replace-token", "sks", "a"
    )
    assert "empty TOKEN" in refused(capsys, pictures, *ask, "--replace-token", "", "a")


@pytest.mark.parametrize("presence", ["a hanok", "", "|", "a hanok|", "a|b|a"])
def test_refused_presence(capsys, folder, pictures, presence):
    assert "at least 2 different" in refused(capsys, pictures, "--clip", folder, "--presence", presence)


def test_refusals_of_scorer(capsys, folder, pictures, tmp_path):
    save(tmp_path / "big.png", "a", Image.new("RGB", (80, 65)))
    message = refused(capsys, pictures, tmp_path / "big.png")
    assert "big.png is 65 px" in message and "--clip openai/clip-vit-base-patch32" in message
    assert "there is no CLIP folder" in refused(capsys, pictures, "--clip", tmp_path / "nowhere")
    assert "cannot be opened" in refused(capsys, pictures, "--clip", pictures)
    assert "device foo cannot be used" in refused(capsys, pictures, "--clip", folder, "--device", "foo")


def test_default_is_tiny_up_to_64_pixels(monkeypatch, folder, pictures, capsys):
    monkeypatch.setattr(score, "TINY", folder)
    save(pictures / "wide.png", "wide", Image.new("RGB", (200, 64)))
    assert clipscore.main([str(pictures)]) == 0
    assert f"CLIP {folder}, 32 px" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_unwritable_is_refused_before_the_work(capsys, monkeypatch, pictures, tmp_path, option):
    monkeypatch.setattr(score, "Clip", None)  # would raise TypeError if it were reached
    assert "cannot be written" in refused(capsys, pictures, option, tmp_path / "nowhere" / "s")
    assert "is a folder" in refused(capsys, pictures, option, tmp_path)


def test_help_imports_nothing_heavy():
    code = "import clipscore, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    root = clipscore.Path(clipscore.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
