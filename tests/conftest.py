"""Tiny models with random weights in the real topology, written to disk by diffusers and transformers.

So the loader is tested on files that an independent library wrote, and every parity test starts from them.
Norms, biases and whatever those libraries initialise with zeros or ones get random values too.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import that reads it: tests never touch the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# pytest -n 2: a core for each, also for the processes that tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hanokdiff.formats.load import load_model
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.tiny.tokenizer import byte_letters

START, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
    steps_offset=1, set_alpha_to_one=False, clip_sample=False,
)  # fmt: skip
COMMON = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, cross_attention_dim=48,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)  # fmt: skip
UNETS = {
    "sd1": dict(COMMON, block_out_channels=(32, 64, 64, 64), attention_head_dim=8, norm_num_groups=16),
    "sd2": dict(COMMON, block_out_channels=(64, 64, 128, 128), attention_head_dim=[1, 1, 2, 2],
                norm_num_groups=32, use_linear_projection=True, upcast_attention=True),
}  # fmt: skip
VAE = dict(
    block_out_channels=(16, 32, 32, 32), layers_per_block=2, latent_channels=4, norm_num_groups=8,
    sample_size=64, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
PAIRS = {  # ours -> diffusers' class and what it is told beyond the published scheduler_config.json
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
MERGES = [  # of the tokenizer
    ("f", "i"), ("r", "e</w>"), ("fi", "re</w>"), ("r", "n</w>"), ("b", "a"), ("ba", "rn</w>"),
    ("k", "s</w>"), ("s", "ks</w>"), ("*", ",</w>"), ("*", ".</w>"), ("*", ")</w>"),
]  # fmt: skip


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Normal noise in every tensor, at a scale that keeps activations about 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.dim() > 1:
            value = noise * (0.5 if "embedding.weight" in name else (p.numel() / p.shape[0]) ** -0.5)
        else:
            value = 0.1 * noise + (name.endswith("weight"))
        p.data.copy_(value)
    return module.eval().requires_grad_(False)


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's format: bytes, bytes that end a word, merges, the two specials last."""
    letters = byte_letters()
    symbols = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in MERGES), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]))
    special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=pad)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    extra = dict(tokenizer_class="CLIPTokenizer", model_max_length=77, do_lower_case=True, errors="replace")
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **extra}))


def make(folder: Path, flavour: str) -> SimpleNamespace:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    write_tokenizer(folder.parent / f"{flavour}-tokenizer", pad=END if flavour == "sd1" else "!")
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / f"{flavour}-tokenizer")
    n, prediction = len(tokenizer), "epsilon" if flavour == "sd1" else "v_prediction"
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    ids = dict(bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=tokenizer.pad_token_id)
    activation = "quick_gelu" if flavour == "sd1" else "gelu"
    text = CLIPTextConfig(vocab_size=n, hidden_act=activation, **sizes, **ids)
    pipeline = StableDiffusionPipeline(
        vae=randomise(AutoencoderKL(**VAE), 1),
        text_encoder=randomise(CLIPTextModel(text), 2),
        tokenizer=tokenizer,
        unet=randomise(UNet2DConditionModel(**UNETS[flavour]), 3),
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return SimpleNamespace(folder=folder, pipeline=pipeline, flavour=flavour)


def pytest_configure(config):
    """-n 2: files in their order. xdist would begin with those of many tests; the long ones here have few."""
    config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """A folder with a tiny SD 1.x (epsilon, quick_gelu), and the pipeline that wrote it."""
    return make(tmp_path_factory.mktemp("models") / "sd1", "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """A tiny SD 2.1: v prediction, gelu, linear projections, 64-channel heads, padding with "!"."""
    return make(tmp_path_factory.mktemp("models") / "sd2", "sd2")


@pytest.fixture(params=["sd1", "sd2"])
def reference(request):
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def load():
    """Open a folder as hanokdiff does; every folder once."""

    opened = {}

    def open_(made):
        if made.folder not in opened:
            with torch.inference_mode(False):  # whoever asks first: later ones want gradients
                opened[made.folder] = load_model(str(made.folder), device="cpu", log=None)
        return opened[made.folder]

    return open_


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Default folders such as runs/lora land in the test's own; the notes on stderr are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)


@pytest.fixture(scope="module")
def quick():
    """Previews in two steps instead of twenty."""
    draw = StableDiffusion.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "draw", lambda *args, **more: draw(*args, **{"steps": 2, **more}))
        yield


def difference(a, b) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all() and b.abs().max() > 1e-2, "a vacuous comparison"
    return (a - b).abs().max().item()
