"""Our UNet against diffusers', same weights, fp32: at most 1e-5 apart."""

import json

import pytest
import torch
from conftest import difference

from hanokdiff.models import memory
from hanokdiff.models.unet import Attention, UNet, UNetConfig, timestep_embedding


def inputs(h: int, w: int, batch: int = 2):
    g = torch.Generator().manual_seed(h * 100 + w)
    t = torch.tensor([999.0, 17.0][:batch])
    return torch.randn(batch, 4, h, w, generator=g), t, torch.randn(batch, 77, 48, generator=g)


# 9 x 13 halves to 5 x 7, 3 x 4, 2 x 2: going up, no level is twice the one below it
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 13), (15, 10)])
@torch.inference_mode()
def test_equals_diffusers(reference, load, size):
    x, t, context = inputs(*size)
    ours, theirs = load(reference).unet, reference.pipeline.unet
    assert difference(ours(x, t, context), theirs(x, t, context).sample) <= 1e-5


@torch.inference_mode()
def test_fractional_timesteps(reference, load):
    x, _, context = inputs(8, 8)
    t = torch.tensor([801.3719, 0.25])
    ours, theirs = load(reference).unet, reference.pipeline.unet
    assert difference(ours(x, t, context), theirs(x, t, context).sample) <= 1e-5
    assert (ours(x, t, context) - ours(x, t.long().float(), context)).abs().max() > 1e-3


@torch.inference_mode()
def test_output_depends_on_everything(reference, load):
    unet = load(reference).unet
    x, t, context = inputs(8, 8)
    out = unet(x, t, context)
    swapped = context.flip(0)
    assert (unet(x + 0.1, t, context) - out).abs().max() > 1e-2
    assert (unet(x, t + 100, context) - out).abs().max() > 1e-2
    assert (unet(x, t, swapped) - out).abs().max() > 1e-2
    one_word = context.clone()
    one_word[:, 5] += 3
    assert (unet(x, t, one_word) - out).abs().max() > 1e-3
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(2)])
    assert difference(out, alone) <= 1e-5  # pictures of a batch do not see each other


def test_config_round_trip(reference, load):
    from diffusers import UNet2DConditionModel

    ours = load(reference).unet
    written = ours.config.to_json()
    assert UNetConfig.from_json(json.loads(json.dumps(written))) == ours.config
    theirs = UNet2DConditionModel.from_config(written)
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    x, t, context = inputs(8, 8)
    with torch.inference_mode():
        assert difference(ours(x, t, context), theirs.eval()(x, t, context).sample) <= 1e-5


def test_the_heads_of_sd1_and_sd2(sd1, sd2):
    """attention_head_dim is the number of heads, whatever its name; the newer field wins."""
    read = [UNetConfig.from_json(json.loads((m.folder / "unet/config.json").read_text())) for m in (sd1, sd2)]
    assert [c.heads for c in read] == [(8, 8, 8, 8), (1, 1, 2, 2)]
    assert [c.use_linear_projection for c in read] == [False, True]
    newer = {**read[0].to_json(), "attention_head_dim": 5, "num_attention_heads": [2, 4, 8, 8]}
    assert UNetConfig.from_json(newer).heads == (2, 4, 8, 8)


def test_defaults_are_sd1():
    """859.52 M parameters, 686 tensors, in the published UNet."""
    with torch.device("meta"):
        unet = UNet()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert len(unet.state_dict()) == 686


def test_timestep_embedding_is_cosines_then_sines():
    """An exact cosine and sine at the lowest and highest frequency."""
    e = timestep_embedding(torch.tensor([0.0, 3.0]), 320)
    assert e.shape == (2, 320)
    assert e[0].tolist() == [1.0] * 160 + [0.0] * 160
    t = torch.tensor(3.0)
    torch.testing.assert_close(e[1, 0], t.cos())
    torch.testing.assert_close(e[1, 160], t.sin())


@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.inference_mode()
def test_any_number_of_levels_and_layers(levels):
    """The tiny world's shapes: fewer levels, one layer a block, attention where one likes."""
    from conftest import randomise
    from diffusers import UNet2DConditionModel

    attention = (False, True, False)[3 - levels :]
    widths = dict(block_out_channels=(16, 24, 32)[:levels], attention=attention, heads=(4,) * levels)
    config = UNetConfig(**widths, layers_per_block=levels, cross_attention_dim=12, norm_num_groups=8)
    ours = randomise(UNet(config), 5)
    theirs = UNet2DConditionModel.from_config(config.to_json()).eval()
    theirs.load_state_dict(ours.state_dict())
    x, t, _ = inputs(11, 6)
    context = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
    assert difference(ours(x, t, context), theirs(x, t, context).sample) <= 1e-5


SAME = ("bfloat16", "bfloat16"), ("float32", "float32")


@pytest.mark.parametrize("dtype, inside", [("float16", "float32"), *SAME])
def test_attention_is_computed_in_fp32_where_fp16_would_overflow(monkeypatch, dtype, inside):
    """SD 2.1's. In bf16, which has fp32's range, the flash kernel stays."""
    seen, plain = [], memory.attention
    monkeypatch.setattr(memory, "attention", lambda q, *kv: seen.append(q.dtype) or plain(q, *kv))
    dtype = getattr(torch, dtype)
    x = torch.randn(1, 6, 16, dtype=dtype)
    assert Attention(16, 16, 2, upcast=True).to(dtype)(x, x).dtype == dtype
    assert seen == [getattr(torch, inside)]
