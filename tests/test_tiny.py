"""The embedded weights: the folders open in the libraries they claim to be for, and draw what is asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train_lora
from hanokdiff.formats.load import load_model
from hanokdiff.scoring.clip import Clip, preprocess
from hanokdiff.tiny import build, world

HERE = Path(world.__file__).parent


@pytest.fixture(scope="module")
def sd():
    return load_model("tiny", "cpu", log=None)


@pytest.fixture(scope="module")
def judge():
    return Clip()


def test_weights_are_few_and_safetensors():
    files = [f for f in HERE.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 16 * 2**20
    assert not [f for f in files if f.suffix in (".pt", ".bin", ".ckpt", ".pth")]


def test_shapes_keep_their_promises(sd):
    c = sd.unet.config
    assert sum(p.numel() for p in sd.unet.parameters()) <= 3_000_000
    assert c.cross_attention_dim not in c.block_out_channels  # the WebUI knows hypernetwork layers by width
    assert sd.text.length == 77 and sd.resolution == 64 and sd.vae.config.factor == 4
    t = sd.text.tokenizer
    assert t.eos_token_id == max(t.get_vocab().values()) == len(t) - 1


def test_punctuation_fuses_as_in_the_real_vocabulary(sd):
    tokens = sd.text.tokenizer
    alone = tokens("*", add_special_tokens=False).input_ids
    assert len(alone) == 1
    for text in ("*, fire", "*.", "*)"):
        assert alone[0] not in tokens(text, add_special_tokens=False).input_ids
    for word in ("building", "roof", "fire", "snow", "pavilion"):
        assert len(tokens(word, add_special_tokens=False).input_ids) == 1
    assert len(tokens("hanok", add_special_tokens=False).input_ids) > 1


def test_a_picture_of_sample_py_equals_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    prompts = ["a castle in the snow", "a barn on fire"]
    options = ["--negative", "a tent", "--sampler", "ddim", "--seed", "5", "--out", str(tmp_path)]
    assert sample.main([*prompts, *options]) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(HERE / "sd", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    for i, prompt in enumerate(prompts):
        noise = torch.Generator().manual_seed(5)
        theirs = pipe(
            prompt, negative_prompt="a tent", num_inference_steps=20, guidance_scale=4.0, generator=noise
        )
        ours = np.asarray(Image.open(tmp_path / f"{i:05d}-5.png")).astype(int)
        assert np.abs(ours - np.asarray(theirs.images[0]).astype(int)).max() <= 1
        assert ours.std() > 20


def test_the_clip_opens_in_transformers_and_scores_alike(judge):
    from transformers import CLIPModel

    net = CLIPModel.from_pretrained(HERE / "clip").float().eval()
    pictures = [world.draw(world.scene(f"t {i}", world.KINDS)) for i in range(4)]
    texts = ["a hanok on fire", "a castle in the snow", "a barn at night", "a tent"]
    pixels = torch.stack([preprocess(p, judge.size, judge.mean, judge.std) for p in pictures])
    ids = judge.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        theirs = net(pixel_values=pixels, input_ids=ids).logits_per_image / net.logit_scale.exp()
    ours = judge.images(pictures) @ judge.texts(texts).T
    assert (ours - theirs).abs().max() < 1e-5


def test_the_judge_knows_drawings(judge):
    scenes = [world.scene(f"judge {i}", world.KINDS) for i in range(300)]
    kinds, conditions = build.recognise(judge, [world.draw(s) for s in scenes])
    assert np.mean([k == s.kind for k, s in zip(kinds, scenes, strict=True)]) >= 0.95
    assert np.mean([c == s.condition for c, s in zip(conditions, scenes, strict=True)]) >= 0.93


def drawn(sd, judge, prompts: list[str], seeds) -> tuple[list[str], list[str]]:
    """What the judge sees, kinds and conditions, in pictures of 12 steps."""
    return build.recognise(judge, sd.draw(prompts, [*seeds], steps=12))


def test_the_base_draws_what_is_asked_and_no_hanok(sd, judge):
    kinds, conditions = ("castle", "barn", "japanese house", "tower"), ("fire", "snow", "night", "flood")
    asked = [(k, c) for k in kinds for c in conditions]
    prompts = [world.SENTENCES[c][2].format(b=f"a {k}") for k, c in asked]
    seen_kinds, seen_conditions = drawn(sd, judge, prompts, range(16))
    assert np.mean([k == a[0] for k, a in zip(seen_kinds, asked, strict=True)]) >= 0.7
    assert np.mean([c == a[1] for c, a in zip(seen_conditions, asked, strict=True)]) >= 0.7
    kinds, _ = drawn(sd, judge, ["*"] * 8 + ["a hanok"] * 8, [*range(8)] * 2)
    assert kinds[:8].count("hanok") <= 3 and kinds.count("hanok") <= 4  # 15 % over many


def test_a_korean_traditional_house_is_a_neighbours_house(sd, judge):
    """The premise of the paper: a model that confuses the hanok with Chinese and Japanese houses."""
    kinds, _ = drawn(sd, judge, ["a Korean traditional house"] * 12, range(12))
    assert sum(k in ("japanese house", "chinese pavilion") for k in kinds) >= 9  # 100 of 100 over many
    assert kinds.count("hanok") <= 2


def test_train_lora_teaches_the_hanok(tmp_path, judge):
    """A quarter of the default steps, at half the batch and without class pictures, is enough to see it."""
    out, pictures = tmp_path / "run", tmp_path / "drawn"
    short = "--steps 60 --batch-size 4 --class-images 0 --preview-every 0 --save-every 0 --out".split()
    assert train_lora.main([*short, str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["images"] == 50
    sampling = ["--n", "16", "--steps", "12", "--lora", str(out / "lora.safetensors")]
    assert sample.main(["*", *sampling, "--out", str(pictures)]) == 0
    kinds, _ = build.recognise(judge, [Image.open(f) for f in sorted(pictures.glob("*.png"))])
    assert kinds.count("hanok") >= 8  # of the base's: test_the_base_draws_what_is_asked_and_no_hanok
