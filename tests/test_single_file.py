"""Single-file checkpoints: names at full size, diffusers as the other reader, round trips, refusals."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hanokdiff.formats import single_file
from hanokdiff.formats.folder import PARTS, plain_names, save_folder
from hanokdiff.formats.load import load_model
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.unet import UNet, UNetConfig
from hanokdiff.models.vae import VAE, VAEConfig

# Small, but of sizes that can be read off the shapes: 32 groups, and the heads that SD has.
TEXT = dict(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
SMALL = {
    False: (
        UNetConfig(block_out_channels=(32, 64), attention=(True, False), heads=(8, 8), layers_per_block=1,
                   cross_attention_dim=64),
        VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1),
        TextConfig(**TEXT),
    ),
    True: (
        UNetConfig(sample_size=96, block_out_channels=(64, 64), attention=(True, False), heads=(1, 1),
                   layers_per_block=3, cross_attention_dim=64, use_linear_projection=True,
                   upcast_attention=True),
        VAEConfig(block_out_channels=(32, 64), layers_per_block=2, sample_size=768),
        TextConfig(**TEXT, hidden_act="gelu"),
    ),
}  # fmt: skip
SD2_UNET = UNetConfig(
    96, heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True, upcast_attention=True
)
SD2_TEXT = TextConfig(49408, 1024, 4096, 23, 16, hidden_act="gelu")
FULL = {
    False: (UNetConfig(), VAEConfig(), TextConfig()),
    True: (SD2_UNET, VAEConfig(sample_size=768), SD2_TEXT),
}
UNET, VAE_, CLIP, OPEN = (getattr(single_file, n) for n in ("UNET", "FIRST_STAGE", "CLIP", "OPEN_CLIP"))
V_BIAS = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
NOISE = {  # what real files hold besides, and nobody asks for
    "model_ema.decay": (), "model_ema.diffusion_modelinput_blocks00weight": (3,), "betas": (10,),
    "alphas_cumprod_prev": (10,), "sqrt_one_minus_alphas_cumprod": (10,),
    "log_one_minus_alphas_cumprod": (10,),
    "posterior_mean_coef1": (10,), "lvlb_weights": (10,), VAE_ + "loss.logvar": (),
    CLIP + "embeddings.position_ids": (1, 77),
}  # fmt: skip


def networks(configs) -> tuple:
    return tuple(kind(c) for kind, c in zip((UNet, VAE, TextEncoder), configs, strict=True))


@pytest.fixture(scope="module")
def full():
    """Names and shapes of the real thing, {SD 2?: tensors on the meta device}."""
    with torch.device("meta"):
        return {sd2: single_file.to_ldm(*networks(FULL[sd2])) for sd2 in FULL}


@pytest.fixture(scope="module")
def small():
    """{SD 2?: (networks with random weights, their tensors under their names in a file)}."""
    out = {}
    for sd2, configs in SMALL.items():
        parts = tuple(randomise(m, i) for i, m in enumerate(networks(configs)))
        out[sd2] = parts, single_file.to_ldm(*parts)
    return out


@pytest.fixture
def file(tmp_path):
    """Write tensors, .safetensors or .ckpt, and say where."""

    def write(tensors, name="model.safetensors", metadata=None, **more):
        path = tmp_path / name
        if path.suffix == ".ckpt":
            torch.save({"state_dict": tensors, **more}, path)
        else:
            save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
        return path

    return write


def same(a, b) -> None:
    """Two networks, or tables of tensors, are equal to the bit and in their precision."""
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def refused(path, *words: str, read=single_file.read_file) -> None:
    """Reading must fail in one sentence that holds these words."""
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and str(path) in message, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# ------------------------------------------------------------------------------------------------ the names


SHAPES = {  # of SD 1.5's v1-5-pruned-emaonly and SD 2.1's v2-1_768-ema-pruned
    False: {
        UNET + "time_embed.2.weight": (1280, 1280),
        UNET + "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        CLIP + "embeddings.token_embedding.weight": (49408, 768),
        CLIP + "embeddings.position_embedding.weight": (77, 768),
        CLIP + "encoder.layers.11.mlp.fc1.weight": (3072, 768), CLIP + "final_layer_norm.bias": (768,),
    },
    True: {
        UNET + "input_blocks.1.1.proj_in.weight": (320, 320),
        UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        OPEN + "token_embedding.weight": (49408, 1024), OPEN + "positional_embedding": (77, 1024),
        OPEN + "ln_final.weight": (1024,), OPEN + "transformer.resblocks.0.ln_1.weight": (1024,),
        OPEN + "transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        OPEN + "transformer.resblocks.23.attn.in_proj_bias": (3072,),
        OPEN + "transformer.resblocks.23.attn.out_proj.weight": (1024, 1024),
        OPEN + "transformer.resblocks.22.mlp.c_fc.weight": (4096, 1024),
        OPEN + "transformer.resblocks.22.mlp.c_proj.weight": (1024, 4096),
        OPEN + "text_projection": (1024, 1024), OPEN + "logit_scale": (),
    },
}  # fmt: skip
BOTH = {
    UNET + "input_blocks.0.0.weight": (320, 4, 3, 3), UNET + "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    UNET + "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    UNET + "input_blocks.9.0.op.bias": (1280,), UNET + "input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
    UNET + "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    UNET + "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
    UNET + "output_blocks.0.0.in_layers.0.weight": (2560,),
    UNET + "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    UNET + "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    UNET + "output_blocks.8.2.conv.weight": (640, 640, 3, 3), V_BIAS: (320,), UNET + "out.0.weight": (320,),
    UNET + "out.2.weight": (4, 320, 3, 3),
    VAE_ + "encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
    VAE_ + "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    VAE_ + "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), VAE_ + "decoder.mid.attn_1.norm.weight": (512,),
    VAE_ + "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
    VAE_ + "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
    VAE_ + "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    VAE_ + "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3), VAE_ + "encoder.norm_out.weight": (512,),
    VAE_ + "encoder.conv_out.weight": (8, 512, 3, 3), VAE_ + "quant_conv.weight": (8, 8, 1, 1),
    VAE_ + "post_quant_conv.bias": (4,),
}  # fmt: skip


@pytest.mark.parametrize("sd2", [False, True])
def test_names_and_shapes_at_full_size(full, sd2):
    tensors = full[sd2]
    counts = [sum(k.startswith(p) for k in tensors) for p in (UNET, VAE_, CLIP, OPEN)]
    assert counts == [686, 248, *([0, 24 * 12 + 6] if sd2 else [196, 0])] and sum(counts) == len(tensors)
    for name, shape in {**BOTH, **SHAPES[sd2]}.items():
        assert tuple(tensors[name].shape) == shape, name
    for name in ("input_blocks.12.0.op", "output_blocks.11.2.conv", "input_blocks.10.1.norm"):
        assert f"{UNET}{name}.weight" not in tensors
    assert VAE_ + "decoder.up.0.upsample.conv.weight" not in tensors


@pytest.mark.parametrize("sd2", [False, True])
def test_diffusers_knows_every_name_at_full_size(full, sd2):
    """Its own converters make of our file exactly the names and shapes that our networks have."""
    from diffusers.loaders import single_file_utils as theirs

    configs, tensors = FULL[sd2], full[sd2]
    with torch.device("meta"):
        own = [m.state_dict() for m in networks(configs)]
    text = theirs.convert_ldm_clip_checkpoint(tensors)
    if sd2:
        config = type("Model", (), {"config": configs[2]})
        text = theirs.convert_open_clip_checkpoint(config, tensors)
        text.pop("text_projection.weight", None)
    parts = (
        theirs.convert_ldm_unet_checkpoint(tensors, configs[0].to_json()),
        theirs.convert_ldm_vae_checkpoint(tensors, configs[1].to_json()),
        {k.removeprefix("text_model."): t for k, t in text.items()},
    )
    for ours, converted in zip(own, parts, strict=True):
        assert {k: t.shape for k, t in converted.items()} == {k: t.shape for k, t in ours.items()}


@pytest.mark.parametrize("sd2", [False, True])
def test_sizes_are_read_off_the_shapes(full, sd2):
    unet, vae = single_file.infer_unet(full[sd2], sd2, v=sd2), single_file.infer_vae(full[sd2], v=sd2)
    assert (unet, vae, single_file.infer_text(full[sd2], sd2)) == FULL[sd2]
    if sd2:  # SD 2 base; and a file that holds no more than the 23 blocks that are used
        assert single_file.infer_unet(full[True], True, v=False).sample_size == 64
        assert single_file.infer_vae(full[True], v=False).sample_size == 512
        fewer = {k: t for k, t in full[True].items() if "resblocks.23." not in k}
        assert single_file.infer_text(fewer, True) == SD2_TEXT


# --------------------------------------------------------------------------------------------- round trips


@pytest.fixture(scope="module")
def write_once(load, tmp_path_factory):
    """Make the single file of a tiny model; each once."""
    made = {}

    def write(reference):
        sd = load(reference)
        if reference.flavour not in made:
            path = tmp_path_factory.mktemp("single") / f"{reference.flavour}.safetensors"
            single_file.save_file(path, sd.unet, sd.vae, sd.text.encoder, sd.schedule)
            made[reference.flavour] = path
        return sd, made[reference.flavour]

    return write


@pytest.fixture
def written(reference, write_once):
    """A tiny model, and the single file that we made of it."""
    return write_once(reference)


def test_folder_to_file_to_folder(reference, written, tmp_path):
    """Not a bit changes, nor a number in the configs, though these sizes cannot be read off the shapes."""
    sd, path = written
    *parts, schedule = single_file.read_file(path)
    save_folder(tmp_path / "again", *parts, sd.text.tokenizer, schedule)
    assert schedule == sd.schedule
    for part, stem in PARTS.items():
        a, b = (folder / part / f"{stem}.safetensors" for folder in (reference.folder, tmp_path / "again"))
        same(*(plain_names(load_file(file)) for file in (a, b)))
    for mine, theirs in zip(parts, (sd.unet, sd.vae, sd.text.encoder), strict=True):
        assert mine.config == theirs.config and not mine.training
        assert not any(p.requires_grad or p.is_meta for p in mine.parameters())


def test_what_the_file_holds(reference, written):
    sd, path = written
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        about = f.metadata()
    own = sd.text.encoder.state_dict()
    assert about["modelspec.prediction_type"] == ("epsilon" if reference.flavour == "sd1" else "v")
    if reference.flavour == "sd1":
        assert about["modelspec.architecture"] == "stable-diffusion-v1"
        assert {k for k in tensors if k.startswith("cond_stage_model.")} == {CLIP + k for k in own}
        return
    assert about["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert not any(k.startswith(CLIP) for k in tensors)
    assert torch.equal(tensors[OPEN + "positional_embedding"], own["embeddings.position_embedding.weight"])
    block = OPEN + "transformer.resblocks."
    qkv = [own[f"encoder.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(tensors[block + "1.attn.in_proj_weight"], torch.cat(qkv))
    assert {k.split(".")[4] for k in tensors if k.startswith(block)} == set("0123")  # 3 are used
    for name in [k for k in tensors if k.startswith(block + "3.")]:
        assert torch.equal(tensors[name], tensors[name.replace(".3.", ".2.", 1)])
    assert torch.equal(tensors[OPEN + "text_projection"], torch.ones(48, 48))
    assert tensors[OPEN + "logit_scale"].item() == pytest.approx(np.log(100), abs=1e-3)


def test_file_in_half_precision(sd1, load, tmp_path):
    sd, path = load(sd1), tmp_path / "new" / "half.safetensors"
    single_file.save_file(path, sd.unet, sd.vae, sd.text.encoder, sd.schedule, torch.float16)
    unet, *_ = single_file.read_file(path)
    same(unet, {k: t.half() for k, t in sd.unet.state_dict().items()})
    with pytest.raises(ValueError, match="ends in .safetensors"):
        single_file.save_file(tmp_path / "a.ckpt", sd.unet, sd.vae, sd.text.encoder, sd.schedule)
    assert not (tmp_path / "a.ckpt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_not_written(sd1, load, tmp_path, value):
    sd = load(sd1)
    unet = UNet(sd.unet.config)
    unet.load_state_dict(sd.unet.state_dict())
    unet.conv_out.bias.data[1] = value
    with pytest.raises(ValueError, match=r"model.diffusion_model.out.2.bias has a value that is not finite"):
        single_file.save_file(tmp_path / "a.safetensors", unet, sd.vae, sd.text.encoder, sd.schedule)
    assert list(tmp_path.iterdir()) == []


def test_diffusers_opens_what_we_wrote(reference, written):
    """An independent reader finds the very tensors, and the prediction, that its own folder gave us."""
    from diffusers import StableDiffusionPipeline

    sd, path = written
    how = dict(config=str(reference.folder), local_files_only=True)
    theirs = StableDiffusionPipeline.from_single_file(str(path), **how)
    same(theirs.unet, reference.pipeline.unet)
    same(theirs.vae, reference.pipeline.vae)
    same(theirs.text_encoder, reference.pipeline.text_encoder)
    assert theirs.scheduler.config.prediction_type == sd.schedule.prediction_type


@pytest.mark.parametrize("sd2", [False, True])
def test_other_numbers_of_levels_and_layers(small, file, sd2):
    """2 levels of 1 or 3 layers, no metadata; and all that is found in files besides the model."""
    parts, tensors = small[sd2]
    noise = {k: torch.zeros(shape) for k, shape in NOISE.items() if not (sd2 and k.startswith(CLIP))}
    lines, prediction = [], "v_prediction" if sd2 else None
    *found, schedule = single_file.read_file(file(tensors | noise), prediction, lines.append)
    for a, b, config in zip(found, parts, SMALL[sd2], strict=True):
        assert a.config == config
        same(a, b)
    assert schedule == Schedule(prediction_type="v_prediction" if sd2 else "epsilon") and len(lines) == 1


def test_names_without_text_model(small, file):
    parts, tensors = small[False]
    bare = {k.replace("transformer.text_model.", "transformer."): t for k, t in tensors.items()}
    assert bare.keys() != tensors.keys()
    same(single_file.read_file(file(bare))[2], parts[2])


def test_autoencoder_with_linear_attention(small, file):
    """Some tools write the 1x1 convolutions of the VAE as matrices."""
    parts, tensors = small[False]
    flat = {k: t[:, :, 0, 0].clone() if ".attn_1." in k and t.dim() == 4 else t for k, t in tensors.items()}
    assert flat[VAE_ + "encoder.mid.attn_1.q.weight"].dim() == 2
    same(single_file.read_file(file(flat))[1], parts[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux tells what is mapped")
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_weights_are_mapped_not_read(small, file, name):
    path = file(small[True][1], name)
    opened = single_file.read_file(path)
    with open("/proc/self/maps") as f:
        assert str(path) in f.read()
    same(opened[0], small[True][0][0])


# -------------------------------------------------------------------------------------------------- .ckpt


@pytest.mark.parametrize("form", ["state_dict", "flat", "legacy"])
def test_ckpt(small, tmp_path, form):
    parts, tensors = small[False]
    more = {"global_step": 470_000, "epoch": 3, "optimizer_states": [], "note": None}
    content = {**tensors, **more} if form == "flat" else {"state_dict": {**tensors, "step": 7}, **more}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=form != "legacy")
    for a, b in zip(single_file.read_file(tmp_path / "a.ckpt"), parts):  # the schedule is left out
        same(a, b)


class Callback:
    """Such as pytorch_lightning's ModelCheckpoint in many published files."""


@pytest.mark.parametrize("what", [Callback, Callback(), np.float64(0.5), {Callback: [Callback()]}])
def test_objects_in_a_ckpt(small, file, what):
    """Inert beside the tensors; in their place they are none."""
    parts, tensors = small[False]
    for a, b in zip(single_file.read_file(file(tensors, "a.ckpt", extra=what)), parts):
        same(a, b)
    name = next(k for k in tensors if k.endswith("conv_in.weight") or k.endswith("0.0.weight"))
    refused(file({**tensors, name: what}, "a.ckpt"), "is not a complete checkpoint")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": [1]}, 7])
def test_ckpt_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "not a table of tensors")


def test_not_a_pickle(tmp_path):
    (tmp_path / "a.ckpt").write_text("no pickle")
    refused(tmp_path / "a.ckpt", "damaged or incomplete")


# ------------------------------------------------------------------------------------ what the UNet predicts


def bias(std: float) -> torch.Tensor:
    return torch.tensor([-std, std]).repeat(160)


@pytest.mark.parametrize("sd2, named, said, step, std, kind, reason", [
    (False, None, None, None, 0.5, "epsilon", "SD 1.x"),
    (False, None, "v", None, 0.0, "v_prediction", "metadata"),
    (False, "v_prediction", "epsilon", None, 0.0, "v_prediction", "named"),
    (True, "epsilon", "v", 1, 0.5, "epsilon", "named"),
    (True, None, "v", 875_000, 0.01, "v_prediction", "metadata"),
    (True, None, "epsilon", 1, 0.5, "epsilon", "metadata"),
    (True, None, None, 875_000, 0.5, "epsilon", "875000"),
    (True, None, None, 140_000, 0.095, "v_prediction", "0.095 > 0.09"),
    (True, None, None, None, 0.0899, "epsilon", "<= 0.09"),
    (True, None, None, None, None, "epsilon", "nothing"),
])  # fmt: skip
def test_order_of_what_tells_the_prediction(full, sd2, named, said, step, std, kind, reason):
    tensors = {k: t for k, t in full[sd2].items() if k != V_BIAS}
    tensors |= {V_BIAS: bias(std)} if std is not None else {}
    metadata = {"modelspec.prediction_type": said} if said else {}
    found, why = single_file.prediction_type(tensors, sd2, named, metadata, step)
    assert found == kind and reason in why


def test_prediction_reaches_schedule_and_sizes(small, file):
    _, tensors = small[True]
    last = UNET + "output_blocks.7.1.transformer_blocks.0.norm1.bias"
    for std, kind, size in ((0.2, "v_prediction", 96), (0.02, "epsilon", 64)):
        lines = []
        path = file(tensors | {last: bias(std)[:64].clone()}, "b.ckpt", global_step=5)
        unet, *_, schedule = single_file.read_file(path, log=lines.append)
        assert (schedule.prediction_type, unet.config.sample_size) == (kind, size)
        assert len(lines) == 1 and kind in lines[0] and "guessed" in lines[0]
    path = file(tensors | {last: bias(0.2)[:64].clone()}, "b.ckpt", global_step=875_000)
    assert single_file.read_file(path)[3].prediction_type == "epsilon"
    path = file(tensors, metadata={"modelspec.prediction_type": "v"})
    assert single_file.read_file(path)[3].prediction_type == "v_prediction"
    path = file(tensors, metadata={"modelspec.prediction_type": "rf"})
    with pytest.raises(ValueError, match='"rf" is not known; known: epsilon, v_prediction'):
        single_file.read_file(path)


# ------------------------------------------------------------------------------------------------- refusals


def test_parts_that_are_not_there(small, file):
    for sd2, clip in ((False, CLIP), (True, OPEN)):
        tensors = small[sd2][1]
        told = {VAE_: "holds no VAE", clip: "holds no text encoder", UNET: "none is named"}
        for prefix, words in told.items():
            path = file({k: t for k, t in tensors.items() if not k.startswith(prefix)})
            refused(path, words)
    refused(file({}), "of its 0 tensors none is named")


def test_other_architectures(small, file):
    tensors = small[False][1]
    for name in ("conditioner.embedders.1.model.ln_final.weight", UNET + "label_emb.0.0.weight"):
        refused(file(tensors | {name: torch.zeros(2)}), "SDXL", "1.x and 2.x")
    name = UNET + "input_blocks.0.0.weight"
    for channels, what in ((9, "inpainting"), (8, "pix2pix")):
        refused(file(tensors | {name: torch.zeros(32, channels, 3, 3)}), f"{channels} channels", what)
    other = {k: t for k, t in small[True][1].items() if k.startswith(OPEN)}
    other[OPEN + "token_embedding.weight"] = torch.zeros(50, 80)
    rest = {k: t for k, t in tensors.items() if not k.startswith(CLIP)}
    refused(file(rest | other), "80 wide", "takes 64")
    refused(file({"lora_unet_mid_block.lora_down.weight": torch.zeros(2)}), "one is lora_unet_mid_block")


@pytest.mark.parametrize("sd2, name", [
    (False, UNET + "output_blocks.0.0.in_layers.0.bias"), (False, VAE_ + "decoder.up.2.block.1.norm1.weight"),
    (False, CLIP + "encoder.layers.1.mlp.fc2.bias"), (True, OPEN + "transformer.resblocks.1.ln_1.bias"),
])  # fmt: skip
def test_missing_and_left_over_tensors(small, file, sd2, name):
    tensors = dict(small[sd2][1])
    count = sum(len(m.state_dict()) for m in small[sd2][0])
    extra = file(tensors | {"extra.weight": torch.zeros(1), "extra.a": torch.zeros(1)})
    refused(extra, f"{count} of {count} tensors matched", "2 left over (such as extra.a)")
    del tensors[name]
    refused(file(tensors), f"{count - 1} of {count} tensors matched", f"1 missing (such as {name})")


def test_not_enough_to_tell_the_sizes(small, file):
    names = UNET + "input_blocks.0.0", UNET + "middle_block.1.proj_in", VAE_ + "post_quant_conv"
    for name in (f"{n}.weight" for n in (*names, CLIP + "embeddings.position_embedding")):
        refused(file({k: t for k, t in small[False][1].items() if k != name}), "is not a complete checkpoint")


def test_wrong_shape(small, file):
    path = file(small[False][1] | {UNET + "middle_block.0.out_layers.3.weight": torch.zeros(64, 32, 3, 3)})
    refused(path, "mid_block.resnets.0.conv2.weight", "(64, 32, 3, 3)", "(64, 64, 3, 3)")


@pytest.mark.parametrize("config", ["{", "[1]", "{}7", '{"unet": {}}', '{"scheduler": {}, "unet": 3}'])
def test_spoilt_config_in_the_metadata(small, file, config):
    refused(file(small[False][1], metadata={"hanokdiff_config": config}), "is not a complete checkpoint")


# ------------------------------------------------------------------------------------------------ model.load


def picture(sd) -> np.ndarray:
    return np.asarray(sd.draw(["a barn on fire!"], [5], steps=3, cfg=7.5, sampler="ddim")[0]).astype(int)


def opened(path, **options) -> StableDiffusion:
    return load_model(str(path), device="cpu", **{"log": None, **options})


@pytest.mark.parametrize("where", ["tokenizer", "."])
def test_same_picture_from_file_as_from_folder(reference, written, tmp_path, where):
    """The tokenizer lies beside the file, in a folder or bare; SD 2 pads with "!" even unsaid."""
    sd, path = written[0], shutil.copy(written[1], tmp_path / "a.safetensors")
    place, lines = tmp_path / where, []
    place.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(reference.folder.parent / f"{reference.flavour}-tokenizer" / name, place)
    file = opened(path, log=lines.append)
    assert file.text.ids("fire! *,") == sd.text.ids("fire! *,")
    ours, theirs = picture(file), picture(sd)
    assert np.abs(ours - theirs).max() <= 1 and ours.std() > 5  # other addresses: the sums round otherwise
    assert file.schedule == sd.schedule and file.resolution == sd.resolution
    assert len(lines) == 3 and "metadata" in lines[0] and sd.schedule.prediction_type in lines[1]


def test_tokenizer_that_is_named(sd2, write_once, tmp_path):
    sd, path = write_once(sd2)
    with pytest.raises(ValueError) as caught:  # nothing beside it, nothing in the cache, and offline
        opened(path)
    words = "openai/clip-vit-large-patch14", "--tokenizer FOLDER_OR_HUB_ID", "vocab.json"
    for word in (str(path.parent), *words):
        assert word in str(caught.value)
    with pytest.raises(ValueError, match=r"no tokenizer in nobody/nothing \("):
        opened(path, tokenizer="nobody/nothing")
    for named in (sd2.folder, sd2.folder / "tokenizer"):
        assert opened(path, tokenizer=str(named)).text.ids("a barn!") == sd.text.ids("a barn!")
    shutil.copytree(sd2.folder.parent / "sd2-tokenizer", tmp_path / "more")
    vocab = json.loads((tmp_path / "more" / "vocab.json").read_text())
    (tmp_path / "more" / "vocab.json").write_text(json.dumps({**vocab, "many": len(vocab)}))
    with pytest.raises(ValueError, match=f"knows {len(vocab) + 1} tokens, the text encoder {len(vocab)}"):
        opened(path, tokenizer=str(tmp_path / "more"))


def test_tokenizer_of_the_other_kind(sd1, sd2, load):
    """A folder may be given another tokenizer; the padding stays that of its own text encoder."""
    ids = opened(sd2.folder, tokenizer=str(sd1.folder)).text.ids("a barn")
    assert ids == load(sd2).text.ids("a barn") and ids[-1] == 0
    other = load(sd1).text.ids("a barn")
    assert ids[:4] == other[:4] and other[-1] == 524


def test_named_prediction(reference, written):
    sd, path = written
    other = "epsilon" if sd.schedule.prediction_type == "v_prediction" else "v_prediction"
    for place in (reference.folder, path):
        named = opened(place, prediction=other, tokenizer=str(reference.folder))
        assert named.schedule == dataclasses.replace(sd.schedule, prediction_type=other)
        with pytest.raises(ValueError, match='"x0" is not known; known: epsilon, v_prediction'):
            opened(place, prediction="x0", tokenizer=str(reference.folder))
    assert np.abs(picture(named) - picture(sd)).max() > 3


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    refused(tmp_path / "a.pt", "is a file, but not a .safetensors or .ckpt", read=opened)
    (tmp_path / "a.safetensors").write_bytes(b"")
    refused(tmp_path / "a.safetensors", "damaged or incomplete", read=opened)
    refused(tmp_path / "b.ckpt", "no model folder at", read=opened)
