"""Whole pictures against diffusers' pipeline, loading, and one marked slow test at full SD 1.5 size."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import PAIRS, SCHEDULE, difference
from PIL import Image
from safetensors.torch import load_file, save_file

from hanokdiff import device
from hanokdiff.bench import setup
from hanokdiff.formats.folder import PARTS, save_folder
from hanokdiff.formats.load import load_model
from hanokdiff.formats.tokenizer import load_tokenizer
from hanokdiff.images import grid
from hanokdiff.models.text_encoder import TextEncoder
from hanokdiff.models.unet import UNet
from hanokdiff.models.vae import VAE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = ["a barn on fire", "a small barn in the snow"]
SEEDS = [5, 6]


def levels_apart(ours: list, theirs: list) -> int:
    """The largest difference in grey levels. Flat pictures prove nothing; other rounding is half a level."""
    a, b = (np.stack([np.asarray(p).astype(int) for p in pictures]) for pictures in (ours, theirs))
    assert a.shape == b.shape and b.std() > 5
    assert np.abs(a - b).mean() < 0.1
    return np.abs(a - b).max()


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m_karras"])
def test_picture_equals_diffusers(reference, load, sampler):
    import diffusers

    kind, own = PAIRS[sampler]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(reference.folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, kind).from_config({**pipeline.scheduler.config, **own})
    how = dict(guidance_scale=7.5, num_inference_steps=6, height=64, width=72)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    theirs = pipeline(PROMPTS, negative_prompt=["fire"] * 2, **how, generator=generators).images
    options = dict(negative="fire", sampler=sampler, steps=6, cfg=7.5, size=(72, 64))
    ours = load(reference).draw(PROMPTS, SEEDS, **options)
    assert ours[0].size == (72, 64)
    assert levels_apart(ours, theirs) <= 1


def picture(sd, prompt=PROMPTS[0], seed=5, **options):
    return np.asarray(sd.draw([prompt], [seed], **{"steps": 4, "cfg": 7.5, **options})[0]).astype(int)


def test_picture_depends_on_everything(sd1, load):
    """Prompt, seed, negative prompt, guidance, sampler, steps. Drawn again, it is the same."""
    sd = load(sd1)
    plain = picture(sd)
    assert plain.shape == (64, 64, 3)  # the model's own size
    assert np.array_equal(picture(sd), plain)
    changes = dict(prompt=PROMPTS[1], seed=6, negative="fire", cfg=3.0, sampler="euler", steps=5)
    for change in ({k: v} for k, v in changes.items()):
        assert np.abs(picture(sd, **change) - plain).max() > 3, change


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m_karras"])
def test_picture_does_not_depend_on_its_batch(sd1, load, sampler):
    sd = load(sd1)
    options = dict(steps=6, cfg=7.5, sampler=sampler)
    prompts, seeds = [*PROMPTS, "fire"], [5, 6, 7]
    together = sd.draw(prompts, seeds, **options)
    assert levels_apart(sd.draw(prompts, seeds, batch_size=1, **options), together) <= 1
    assert levels_apart(sd.draw(prompts, seeds, batch_size=2, **options), together) <= 1
    assert levels_apart(sd.draw(prompts[::-1], seeds[::-1], **options)[::-1], together) <= 1


def test_guidance_of_one_is_no_guidance(sd1, load, monkeypatch):
    """At cfg 1 the negative prompt is not even encoded, and the network sees each picture once."""
    sd = load(sd1)
    assert np.array_equal(picture(sd, cfg=1), picture(sd, cfg=1, negative="fire"))
    batches, forward = [], sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, t, c: (batches.append(len(c)), forward(x, t, c))[1])
    alone, guided = picture(sd, cfg=1), picture(sd, cfg=1.0001)
    assert batches == [1] * 4 + [2] * 4
    assert np.abs(alone - guided).max() <= 1  # the formula goes over into it


def test_sample_yields_every_step_outside_inference_mode(sd1, load):
    sd = load(sd1)
    for count, x in enumerate(sd.sample(PROMPTS, SEEDS, steps=3), 1):  # noqa: B007
        assert x.shape == (2, 4, 8, 8) and not torch.is_inference_mode_enabled()
    assert count == 3
    sizes = [x.shape for x in sd.sample(PROMPTS, SEEDS, steps=1, size=(40, 96))]
    assert sizes == [(2, 4, 12, 5)]


@torch.inference_mode()
def test_latents_of_a_picture_equal_diffusers(reference, load):
    from diffusers.image_processor import VaeImageProcessor

    colours = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    photo = Image.fromarray(colours).resize((72, 64), Image.Resampling.BICUBIC)
    x = VaeImageProcessor(vae_scale_factor=8).preprocess(photo)
    theirs = reference.pipeline.vae.encode(x).latent_dist.mode() * 0.18215
    ours = load(reference).latents(photo)
    assert ours.dtype == torch.float32 and difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_picture_from_a_picture_equals_diffusers(sd1, load, strength):
    """The whole pipeline, from the same latents: each picture with its own noise."""
    import diffusers

    parts = {k: v for k, v in sd1.pipeline.components.items() if k != "image_encoder"}
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    kind, own = PAIRS["euler_a"]
    spacing = load(sd1).schedule.timestep_spacing
    config = {**SCHEDULE, **own, "timestep_spacing": spacing}
    pipeline.scheduler = getattr(diffusers, kind).from_config(config)
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    how = dict(guidance_scale=3.0, output_type="latent", num_inference_steps=8, strength=strength)
    how |= dict(image=first.repeat(2, 1, 1, 1), negative_prompt=["fire"] * 2)
    theirs = pipeline(PROMPTS, **how, generator=[torch.Generator().manual_seed(s) for s in SEEDS]).images
    options = dict(negative="fire", sampler="euler_a", steps=8, cfg=3.0, size=(64, 64))
    *_, ours = load(sd1).sample(PROMPTS, SEEDS, **options, init_latents=first, strength=strength)
    *_, other = load(sd1).sample(PROMPTS, SEEDS, **options, init_latents=-first, strength=strength)
    assert difference(ours, theirs) <= 1e-4
    assert (other - ours).abs().max() > 1e-2


def test_grid():
    pictures = [Image.new("RGB", (4, 3), c) for c in ("red", "lime", "blue")]
    sheet = np.asarray(grid(pictures, 2, zoom=2, gap=2))
    assert sheet.shape == (14, 18, 3)
    assert sheet[0, 0].tolist() == [255, 0, 0] and sheet[0, 10].tolist() == [0, 255, 0]
    assert sheet[8, 0].tolist() == [0, 0, 255] and sheet[13, 17].tolist() == [255] * 3


def test_save_folder_opens_in_diffusers_and_here(sd1, load, tmp_path):
    """What we write, an independent library opens, and draws the same picture with it."""
    from diffusers import StableDiffusionPipeline

    sd = load(sd1)
    save_folder(tmp_path, sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule)
    ours = sd.draw(PROMPTS, SEEDS, steps=5, cfg=7.5, sampler="ddim")
    again = load_model(str(tmp_path), device="cpu", log=None)
    assert again.schedule == sd.schedule and again.unet.config == sd.unet.config
    assert levels_apart(again.draw(PROMPTS, SEEDS, steps=5, cfg=7.5, sampler="ddim"), ours) <= 1
    older = tmp_path / "older"  # transformers 5 writes tokenizer.json alone; older tools read only these two
    older.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).rename(older / name)
    for text in ("a barn, fire", "*, fire (*)", "asks sks *."):
        assert load_tokenizer(older)(text).input_ids == sd.text.tokenizer(text).input_ids
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    theirs = pipeline(PROMPTS, num_inference_steps=5, guidance_scale=7.5, generator=generators).images
    assert levels_apart(ours, theirs) <= 1


def test_every_norm_has_the_epsilon_of_the_libraries(reference, load):
    """1e-5 or 1e-6, by place: too small a thing to show in a picture's tolerance."""
    sd, p = load(reference), reference.pipeline
    for ours, theirs in ((sd.unet, p.unet), (sd.vae, p.vae), (sd.text.encoder, p.text_encoder)):
        norms = {name: m.eps for name, m in ours.named_modules() if hasattr(m, "eps")}
        modules = dict(theirs.named_modules())
        assert norms == {name: modules[name].eps for name in norms} and len(norms) > 5


def test_everything_is_frozen_and_what_was_chosen_is_said(sd1):
    lines = []
    sd = load_model(str(sd1.folder), device="cpu", log=lines.append)
    for part in (sd.unet, sd.vae, sd.text.encoder):
        assert not part.training
        for p in part.parameters():
            assert p.dtype == torch.float32 and not p.requires_grad and p.device.type == "cpu"
    assert sd.resolution == 64 and sd.cfg == 4.0  # by size: a tuned tiny model likes less guidance too
    assert "epsilon" in lines[0] and lines[1] == "device cpu (named), fp32 (fastest and exact there)"
    assert load_model(str(sd1.folder), dtype="bf16", log=None).unet.conv_in.weight.dtype == torch.bfloat16


def test_bf16_on_a_cpu_that_has_amx(monkeypatch):
    """Of large UNets alone; whatever is named stays; the reason is said."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    lines, large = [], device.LARGE
    assert load_model("tiny", "cpu", log=None).dtype == torch.float32
    monkeypatch.setattr(device, "LARGE", 1_000_000)
    assert load_model("tiny", "cpu", log=lines.append).dtype == torch.bfloat16
    assert lines[1].startswith("device cpu (named), bf16 (a UNet of ") and "AMX" in lines[1]
    assert load_model("tiny", "cpu", "fp32", log=None).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert load_model("tiny", "cpu", log=None).dtype == torch.float32
    assert setup.parameters("small") < large < setup.parameters("half") < setup.parameters("sd15")


def test_half_precision_draws_nearly_the_same(reference, load):
    """bf16 has 8 bits: not equal, but the same picture; and not all of it in fp32 by accident."""
    half = load_model(str(reference.folder), device="cpu", dtype="bf16", log=None)
    exact = picture(load(reference), cfg=1.5, sampler="ddim")
    error = np.abs(picture(half, cfg=1.5, sampler="ddim") - exact)
    assert 0 < error.mean() < 6


@pytest.fixture
def copy(sd1, tmp_path):
    """A copy of the folder, to be spoilt."""
    shutil.copytree(sd1.folder, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder, *words: str) -> str:
    """Loading must fail in one sentence that holds these words."""
    with pytest.raises(ValueError) as caught:
        load_model(str(folder), device="cpu", log=None)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"
    return message


@pytest.mark.parametrize("name", [
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
])  # fmt: skip
def test_missing_file(copy, name):
    (copy / name).unlink()
    refused(copy, copy / name.rpartition("/")[0], name.rpartition("/")[2])


def test_missing_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer")
    refused(copy, copy / "tokenizer", "vocab.json", "is missing")


@pytest.mark.parametrize("keep", [5, 100_000, -1])
def test_truncated_safetensors(copy, keep):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(copy, file, "damaged or incomplete")


@pytest.mark.parametrize("name, content", [
    ("model_index.json", b"{"), ("unet/config.json", b'{"block_out_channels": [32'),
    ("vae/config.json", b"\xff\xfe{}"),
])  # fmt: skip
def test_damaged_json(copy, name, content):
    (copy / name).write_bytes(content)
    refused(copy, copy / name, "not valid JSON")


@pytest.mark.parametrize("name, content", [
    ("unet/config.json", {}), ("unet/config.json", []), ("vae/config.json", {"block_out_channels": 7}),
    ("text_encoder/config.json", []), ("unet/config.json", {"heads": 3}),
    ("unet/config.json", {"block_out_channels": [33, 64], "down_block_types": ["CrossAttnDownBlock2D"] * 2}),
    ("unet/config.json", {"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D"] * 3}),
    ("text_encoder/config.json", {"hidden_act": "swish"}),
])  # fmt: skip
def test_json_of_something_else(copy, name, content):
    (copy / name).write_text(json.dumps(content))
    refused(copy, (copy / name).parent, "config.json")


def spoil(file, change, **config):
    """Change the tensors of a part's file, and its config.json."""
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file)
    beside = file.with_name("config.json")
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **config}))


CONV, NARROW = "mid_block.resnets.0.conv1.weight", (slice(None), slice(40))
SPOILT = {  # part, what is done to its tensors, to its config; what is said
    "wrong shape": ("unet", lambda t: t.update({CONV: torch.zeros(64, 32, 3, 3)}), {},
                    (CONV, "(64, 32, 3, 3)", "(64, 64, 3, 3)")),
    "missing": ("vae", lambda t: t.pop("quant_conv.bias"), {},
                (" tensors matched", "1 missing (such as quant_conv.bias)")),
    "left over": ("vae", lambda t: t.update(extra=torch.zeros(1)), {}, ("1 left over (such as extra)",)),
    "inpainting": ("unet", lambda t: t.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}),
                   {"in_channels": 9}, ("9 channels", "inpainting")),
    "width": ("unet", lambda t: t.update({k: v[NARROW] for k, v in t.items() if v.shape[1:] == (48,)}),
              {"cross_attention_dim": 40}, ("48", "40")),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_tensors_that_do_not_fit(copy, what):
    part, change, config, words = SPOILT[what]
    spoil(copy / part / "diffusion_pytorch_model.safetensors", change, **config)
    refused(copy, copy, *words)


@pytest.mark.parametrize("option, value", [
    ("beta_schedule", "squaredcos_cap_v2"), ("prediction_type", "sample"),
    ("trained_betas", [0.1, 0.2]), ("_class_name", "FlowMatchEulerDiscreteScheduler"),
])  # fmt: skip
def test_schedule_that_we_do_not_know(copy, option, value):
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    refused(copy, value if option == "_class_name" else option)


def test_blocks_that_we_do_not_know(copy):
    file = copy / "unet" / "config.json"
    content = json.loads(file.read_text())
    kinds = ["KDownBlock2D", *content["down_block_types"][1:]]
    file.write_text(json.dumps({**content, "down_block_types": kinds}))
    refused(copy, "down_block_types has KDownBlock2D")


def test_not_a_model(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "nothing")
    refused(tmp_path, tmp_path / "model_index.json")
    (tmp_path / "a.safetensors").write_bytes(b"")
    refused(tmp_path / "a.safetensors", "damaged or incomplete")
    refused("nobody/no-such-model", "nobody/no-such-model")  # offline: HF_HUB_OFFLINE in conftest.py


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_bin_files(copy, sd1, load, part):
    """.bin is read too, without running what it may hold; a damaged one is refused."""
    stem = PARTS[part]
    file = copy / part / f"{stem}.safetensors"
    tensors = load_file(file)
    file.unlink()
    binary = copy / part / ("pytorch_model.bin" if part == "text_encoder" else f"{stem}.bin")
    torch.save(tensors, binary)
    opened = load_model(str(copy), device="cpu", log=None)
    assert np.abs(picture(opened, steps=1) - picture(load(sd1), steps=1)).max() <= 1
    for content in (b"", b"not a pickle", binary.read_bytes()[:5000]):
        binary.write_bytes(content)
        refused(copy, binary)


def test_bad_requests(sd1, load):
    sd = load(sd1)
    for options, words in [
        (dict(sampler="plms"), '"plms" is not known; choose one of ddim'), (dict(size=(0, 64)), "width is 0"),
        (dict(steps=-5), "steps is -5"),
        (dict(size=(64, 67)), "height is 67, but must be divisible by 8; the nearest is 64"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            sd.draw(PROMPTS, SEEDS, **options)
    for prompts, seeds in ((PROMPTS[:1], SEEDS), (PROMPTS, SEEDS[:1])):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts for {len(seeds)} seeds"):
            next(sd.sample(prompts, seeds, steps=1))
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts for {len(seeds)} seeds"):
            sd.draw(prompts, seeds, steps=1)
    with pytest.raises(ValueError, match='"fp8" is not known'):
        load_model(str(sd1.folder), dtype="fp8", log=None)
    with pytest.raises(ValueError, match='"toaster" cannot be used'):
        load_model(str(sd1.folder), device="toaster", log=None)


def pair(ours: type, theirs):
    """Both on the meta device, then given the very same random tensors: 3.4 GB for the UNet, not 6.9."""
    with torch.device("meta"):
        a, b = ours(), theirs()
    tensors = {}
    g = torch.Generator().manual_seed(0)
    for name, p in a.state_dict().items():
        value = torch.empty(p.shape).normal_(generator=g)
        if p.dim() > 1:
            value *= 0.02 if "embedding.weight" in name else (p.numel() / p.shape[0]) ** -0.5
        else:
            value = value.mul_(0.1).add_(float(name.endswith("weight")))
        tensors[name] = value
    a.load_state_dict(tensors, assign=True)
    b.load_state_dict(tensors, assign=True)
    for m in (a, b):
        m.eval().requires_grad_(False)
    theirs = dict(b.named_parameters())
    assert all(p.data_ptr() == theirs[name].data_ptr() for name, p in a.named_parameters())
    return a, b


@pytest.mark.slow
@torch.inference_mode()
def test_full_size(capsys):
    """SD 1.5's own sizes, random weights, 860 + 84 + 123 M parameters: at most 1e-4 apart."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from hanokdiff.models.unet import UNetConfig
    from hanokdiff.models.vae import VAEConfig

    start, g, out = time.perf_counter(), torch.Generator().manual_seed(1), {}
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    clip_l = CLIPTextConfig(**sizes)
    a, b = pair(TextEncoder, lambda: CLIPTextModel(clip_l))
    b.embeddings.position_ids = torch.arange(77)[None]  # a buffer of theirs that no file holds
    ids = torch.randint(0, 49408, (1, 77), generator=g)
    context = a(ids)
    out["text encoder"] = difference(context, b(ids).last_hidden_state)

    a, b = pair(VAE, lambda: AutoencoderKL.from_config(VAEConfig().to_json()))
    x = torch.rand(1, 3, 64, 64, generator=g) * 2 - 1
    theirs = b.encode(x).latent_dist
    mean, std = a.encode(x)
    out["encode mean"] = difference(mean / 0.18215, theirs.mean)
    out["encode std"] = difference(std / 0.18215, theirs.std)
    out["decode"] = difference(a.decode(mean), b.decode(mean / 0.18215).sample)

    del a, b
    a, b = pair(UNet, lambda: UNet2DConditionModel.from_config(UNetConfig().to_json()))
    x, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([481.0])
    ours = a(x, t, context)
    out["unet"] = difference(ours, b(x, t, context).sample)
    assert (a(x, t, -context) - ours).abs().max() > 1e-2
    with capsys.disabled():
        figures = ", ".join(f"{k} {v:.1e}" for k, v in out.items())
        print(f"\nfull size, largest differences: {figures}; {time.perf_counter() - start:.0f} s")
    assert max(out.values()) <= 1e-4
