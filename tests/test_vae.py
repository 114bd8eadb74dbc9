"""Our autoencoder against diffusers' AutoencoderKL, same weights, fp32: at most 1e-5 apart."""

import json
import shutil

import pytest
import torch
from conftest import difference
from safetensors.torch import load_file, save_file

from hanokdiff.formats.folder import load_part
from hanokdiff.models.vae import VAE, VAEConfig


def pictures(h: int, w: int) -> torch.Tensor:
    return torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h + w)) * 2 - 1


@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
@torch.inference_mode()
def test_encode_equals_diffusers(sd1, load, size):
    vae, x = load(sd1).vae, pictures(*size)
    theirs = sd1.pipeline.vae.encode(x).latent_dist
    mean, std = vae.encode(x)
    assert mean.shape == (2, 4, size[0] // 8, size[1] // 8)
    assert difference(mean / vae.config.scaling_factor, theirs.mean) <= 1e-5
    assert difference(std / vae.config.scaling_factor, theirs.std) <= 1e-5
    assert std.min() > 0 and std.std() > 1e-3
    assert (vae.encode(x.flip(0))[0] - mean).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
@torch.inference_mode()
def test_decode_equals_diffusers(sd1, load, size):
    vae = load(sd1).vae
    z = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(3))
    ours = vae.decode(z * vae.config.scaling_factor)
    assert difference(ours, sd1.pipeline.vae.decode(z).sample) <= 1e-5
    assert (ours[0] - ours[1]).abs().max() > 1e-2


def test_scaling_factor_is_the_files_or_the_published_one(sd1, load):
    c = json.loads((sd1.folder / "vae/config.json").read_text())
    assert VAEConfig.from_json({**c, "scaling_factor": 0.5}).scaling_factor == 0.5
    assert load(sd1).vae.config.scaling_factor == 0.18215
    del c["scaling_factor"]  # absent from the oldest configs
    assert VAEConfig.from_json(c).scaling_factor == 0.18215
    assert load(sd1).vae.config.factor == 8


@pytest.mark.parametrize("convolutions", [False, True])
@torch.inference_mode()
def test_old_attention_names(sd1, load, tmp_path, convolutions):
    """VAEs published in 2022 call them query, key, value, proj_attn; some as 1x1 convolutions."""
    shutil.copytree(sd1.folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors, renamed = {}, 0
    for name, tensor in load_file(file).items():
        for new, was in old.items():
            if f".{new}." in name:
                name, renamed = name.replace(new, was), renamed + 1
                tensor = tensor[:, :, None, None] if convolutions and tensor.dim() == 2 else tensor
        tensors[name] = tensor.contiguous()
    assert renamed == 16  # weight and bias of four, in encoder and decoder
    save_file(tensors, file)
    vae = load_part(tmp_path, "vae", VAE, VAEConfig)
    x = pictures(32, 32)
    assert torch.equal(vae.encode(x)[0], load(sd1).vae.encode(x)[0])


def test_config_round_trip(sd1, load):
    from diffusers import AutoencoderKL

    ours = load(sd1).vae
    assert VAEConfig.from_json(json.loads(json.dumps(ours.config.to_json()))) == ours.config
    theirs = AutoencoderKL.from_config(ours.config.to_json())
    theirs.load_state_dict(ours.state_dict())
    assert theirs.config.scaling_factor == ours.config.scaling_factor


def test_defaults_are_stable_diffusions():
    with torch.device("meta"):
        vae = VAE()
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


@torch.inference_mode()
def test_three_levels_one_layer():
    """The tiny world's shape: a factor of 4."""
    from conftest import randomise
    from diffusers import AutoencoderKL

    config = VAEConfig((16, 24, 32), layers_per_block=1, norm_num_groups=8, scaling_factor=0.7)
    ours = randomise(VAE(config), 6)
    theirs = AutoencoderKL.from_config(config.to_json()).eval()
    theirs.load_state_dict(ours.state_dict())
    x = pictures(32, 48)
    mean, std = ours.encode(x)
    assert config.factor == 4 and mean.shape == (2, 4, 8, 12)
    assert difference(mean / 0.7, theirs.encode(x).latent_dist.mean) <= 1e-5
    assert difference(ours.decode(mean), theirs.decode(mean / 0.7).sample) <= 1e-5
