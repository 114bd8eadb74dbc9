"""Whole models in one file, as Stable Diffusion was first published: read (.safetensors, .ckpt) and written.

    model.diffusion_model.*     the UNet
    first_stage_model.*         the VAE
    cond_stage_model.*          the text encoder: `transformer.text_model.` in SD 1.x, `model.` in SD 2.x

`unet_places`, `vae_places` and `open_clip_places` say once where each of our modules (named as in diffusers)
lies; reading and writing both go through `namer`.  A module that is not in the table has one name in both
worlds. Such a file has no config: sizes are read off the tensors' shapes, or off the metadata of `save_file`.

The names are those of CompVis/latent-diffusion and Stability-AI/stablediffusion.  L is layers_per_block.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hanokdiff.files import parse_json, reason
from hanokdiff.formats.folder import ERRORS, fill
from hanokdiff.formats.tensors import read_single_file, write_tensors
from hanokdiff.formats.validate import check_fit, check_names
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.unet import UNet, UNetConfig
from hanokdiff.models.vae import VAE, VAEConfig

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
# training leftovers, buffers that follow from the schedule, the half of CLIP that SD never asks
IGNORED = re.compile(
    r"model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_weights$|first_stage_model\.loss\.|"
    r"cond_stage_model\.(model\.|transformer\.)?(text_projection|logit_scale|attn_mask)|.*\.position_ids$"
)
# some merges
NO_PREFIX = re.compile(r"cond_stage_model\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)")
V_THRESHOLD = 0.09  # ComfyUI's test: above it, the last attention's norm1.bias belongs to a v model

# ------------------------------------------------------------------------------------------------ the names

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    # stacked in the file
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def inside(ours: str, theirs: str, table: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in table.items()}


def unet_places(c: UNetConfig) -> dict[str, str]:
    """Our module -> theirs. There blocks are numbered: level i fills L + 1 of them, the last downsamples."""
    places = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }  # fmt: skip
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    per = c.layers_per_block + 1
    for i, attends in enumerate(reversed(c.attention)):  # whether up_blocks.i attends
        for j in range(per):
            down, up = f"input_blocks.{1 + per * i + j}", f"output_blocks.{per * i + j}"
            for ours, theirs in ((f"down_blocks.{i}", down), (f"up_blocks.{i}", up)):
                resnets[f"{ours}.resnets.{j}"] = f"{theirs}.0"
                places[f"{ours}.attentions.{j}"] = f"{theirs}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"{down}.0.op"  # in the place of one resnet more
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"{up}.{2 if attends else 1}.conv"
    for ours, theirs in resnets.items():
        places |= inside(ours, theirs, UNET_RESNET)
    return places


def vae_places(c: VAEConfig) -> dict[str, str]:
    """Our module -> theirs. There the decoder's levels count from the finest, here from the coarsest."""
    last, places = len(c.block_out_channels) - 1, {}
    for i in range(last + 1):
        blocks = {"encoder.down_blocks": f"encoder.down.{i}", "decoder.up_blocks": f"decoder.up.{last - i}"}
        for ours, theirs in blocks.items():
            for j in range(c.layers_per_block + 1):
                places[f"{ours}.{i}.resnets.{j}"] = f"{theirs}.block.{j}"
                places |= inside(f"{ours}.{i}.resnets.{j}", f"{theirs}.block.{j}", VAE_RESNET)
        places[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        places[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{last - i}.upsample"
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.mid_block", f"{side}.mid"
        places |= {f"{ours}.resnets.0": f"{theirs}.block_1", f"{ours}.resnets.1": f"{theirs}.block_2"}
        places |= inside(f"{ours}.attentions.0", f"{theirs}.attn_1", VAE_ATTENTION)
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    return places


def open_clip_places(c: TextConfig) -> dict[str, str]:
    places = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    places["embeddings.position_embedding.weight"] = "positional_embedding"
    for n in range(c.num_hidden_layers):
        places |= inside(f"encoder.layers.{n}", f"transformer.resblocks.{n}", TEXT_LAYER)
    return places


def is_sd2(c: TextConfig) -> bool:
    """SD 2's text encoder is OpenCLIP's, which differs by its names and by its activation."""
    return c.hidden_act == "gelu"


def namer(c: UNetConfig | VAEConfig | TextConfig) -> Callable[[str], str]:
    """A function from the name of a tensor in the network of this config to its name in a single file."""
    if isinstance(c, UNetConfig):
        prefix, places = UNET, unet_places(c)
    elif isinstance(c, VAEConfig):
        prefix, places = FIRST_STAGE, vae_places(c)
    else:
        prefix, places = (OPEN_CLIP, open_clip_places(c)) if is_sd2(c) else (CLIP, {})

    def ldm_name(name: str) -> str:
        head, tail = name, ""
        while head and head not in places:  # the longest beginning that the table knows
            head, _, last = head.rpartition(".")
            tail = f".{last}{tail}"
        return prefix + (places[head] + tail if head else name)

    return ldm_name


def to_ldm(*networks: nn.Module) -> dict[str, Tensor]:
    """The tensors of UNet, VAE and text encoder under their names, and in their shapes, in a single file."""
    out = {}
    for network in networks:
        name = namer(network.config)
        tensors = {name(ours): tensor for ours, tensor in network.state_dict().items()}
        if isinstance(network, TextEncoder) and is_sd2(network.config):
            tensors = stack_qkv(tensors)
            tensors |= unused(tensors, network.config)
        out |= tensors
    # the VAE's attention is 1x1 convolutions there
    return {k: t[:, :, None, None] if ".attn_1." in k and t.dim() == 2 else t for k, t in out.items()}


def stack_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP keeps q, k and v in one tensor, one below the other."""
    out = {}
    for name, tensor in tensors.items():
        head, q, kind = name.partition(".attn.q.")
        if q:
            parts = [tensors[f"{head}.attn.{x}.{kind}"] for x in "qkv"]
            out[f"{head}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            out[name] = tensor
    return out


def split_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back; views, no copies."""
    out = {}
    for name, tensor in tensors.items():
        head, stacked, kind = name.partition(".in_proj_")
        if stacked and tensor.dim():
            out |= {f"{head}.{x}.{kind}": t for x, t in zip("qkv", tensor.chunk(3))}
        else:
            out[name] = tensor
    return out


def unused(tensors: dict[str, Tensor], c: TextConfig) -> dict[str, Tensor]:
    """What the original loaders ask for though SD 2 never uses it: the last block of OpenCLIP (it takes the
    output of the one before, which stands in for it here), text_projection and logit_scale (ln 100)."""
    n, block = c.num_hidden_layers, f"{OPEN_CLIP}transformer.resblocks"
    before, last = f"{block}.{n - 1}.", f"{block}.{n}."
    out = {last + k.removeprefix(before): t.clone() for k, t in tensors.items() if k.startswith(before)}
    like = tensors[f"{OPEN_CLIP}ln_final.weight"]
    out[f"{OPEN_CLIP}text_projection"] = like.new_ones(c.hidden_size, c.hidden_size)
    out[f"{OPEN_CLIP}logit_scale"] = like.new_full((), 4.6055)
    return out


# ------------------------------------------------------------------------------------------------- sizes


def numbers(tensors: dict[str, Tensor], pattern: str) -> list[int]:
    """All numbers that stand at the # of the pattern in the tensors' names."""
    before, after = pattern.split("#")
    matches = (re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), name) for name in tensors)
    return sorted(int(m[1]) for m in matches if m)


def infer_unet(tensors: dict[str, Tensor], sd2: bool, v: bool) -> UNetConfig:
    shape = {name.removeprefix(UNET): t.shape for name, t in tensors.items()}
    downs = numbers(shape, "input_blocks.#.0.op.weight")
    per = min(downs, default=3)  # blocks per level
    first = [f"input_blocks.{1 + per * i}" for i in range(len(downs) + 1)]
    channels = tuple(shape[f"{block}.0.out_layers.3.weight"][0] for block in first)
    return UNetConfig(
        sample_size=96 if v else 64,
        in_channels=shape["input_blocks.0.0.weight"][1],
        out_channels=shape["out.2.weight"][0],
        block_out_channels=channels,
        attention=tuple(f"{block}.1.proj_in.weight" in shape for block in first),
        heads=tuple(max(ch // 64, 1) for ch in channels) if sd2 else (8,) * len(channels),
        layers_per_block=per - 1,
        cross_attention_dim=shape["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        use_linear_projection=len(shape["middle_block.1.proj_in.weight"]) == 2,
        upcast_attention=sd2,  # 2.1 needs it in fp16, 2.0 does not mind
    )


def infer_vae(tensors: dict[str, Tensor], v: bool) -> VAEConfig:
    first = FIRST_STAGE + "encoder.down.{}.block.{}.conv1.weight"
    levels = numbers(tensors, first.format("#", 0))
    return VAEConfig(
        block_out_channels=tuple(len(tensors[first.format(i, 0)]) for i in levels),
        layers_per_block=len(numbers(tensors, first.format(0, "#"))),
        latent_channels=len(tensors[FIRST_STAGE + "post_quant_conv.weight"]),
        sample_size=768 if v else 512,
    )


def infer_text(tensors: dict[str, Tensor], sd2: bool) -> TextConfig:
    """OpenCLIP ViT-H has 24 blocks and SD 2 uses 23 of them; a few tools write no more than those."""
    act = "gelu" if sd2 else "quick_gelu"
    name = namer(TextConfig(num_hidden_layers=1, hidden_act=act))
    fc1 = name("encoder.layers.0.mlp.fc1.weight")
    blocks = len(numbers(tensors, fc1.replace(".0.", ".#.")))
    if sd2 and blocks != 23:
        blocks -= 1
    vocabulary, width = tensors[name("embeddings.token_embedding.weight")].shape
    positions = len(tensors[name("embeddings.position_embedding.weight")])
    return TextConfig(vocabulary, width, len(tensors[fc1]), blocks, max(width // 64, 1), positions, act)


def prediction_type(tensors: dict, sd2: bool, named: str | None, metadata: dict, step) -> tuple[str, str]:
    """What the UNet predicts, and why we think so: nothing in an old file says it."""
    if named:
        return named, "named"
    stated = metadata.get("modelspec.prediction_type")
    if stated:
        return {"v": "v_prediction"}.get(stated, stated), "the file's metadata say so"
    if not sd2:
        return "epsilon", "as all of SD 1.x"
    if step == 875_000:
        return "epsilon", "step 875000 is that of SD 2.0 base"
    outs = numbers(tensors, UNET + "output_blocks.#.0.in_layers.0.weight")
    name = f"output_blocks.{max(outs, default=0)}.1.transformer_blocks.0.norm1.bias"
    if UNET + name not in tensors:
        return "epsilon", "nothing in the file speaks for v_prediction"
    std = tensors[UNET + name].float().std(correction=0).item()
    kind, sign = ("v_prediction", ">") if std > V_THRESHOLD else ("epsilon", "<=")
    return kind, f"guessed: {name} has the standard deviation {std:.3f} {sign} {V_THRESHOLD}"


# ------------------------------------------------------------------------------------------------- files


def recognise(tensors: dict[str, Tensor], path: Path) -> bool:
    """False for SD 1.x, True for SD 2.x; all else is refused by name."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in tensors)

    if has("conditioner.embedders.", UNET + "label_emb."):
        only = "only Stable Diffusion 1.x and 2.x are supported"
        raise ValueError(f"{path} is an SDXL or unCLIP checkpoint; {only}")
    if not has(UNET):
        example = next(iter(tensors), "none at all")
        way = "; a LoRA goes to sample.py as --lora FILE" if any("lora" in name for name in tensors) else ""
        none = f"of its {len(tensors)} tensors none is named {UNET}* (one is {example}){way}"
        raise ValueError(f"{path} is not a Stable Diffusion checkpoint: {none}")
    parts = (("VAE", "vae", (FIRST_STAGE,)), ("text encoder", "text_encoder", (CLIP, OPEN_CLIP)))
    for part, folder, prefixes in parts:
        if not has(*prefixes):
            lacks = f"{path} holds no {part} (no tensor is named {'* or '.join(prefixes)}*)"
            way = f"give a complete checkpoint, or a model folder with a {folder}/ of its own"
            raise ValueError(f"{lacks}; {way}")
    return not has(CLIP)


def read_file(path, prediction: str | None = None, log=None) -> tuple[UNet, VAE, TextEncoder, Schedule]:
    """Open a single file; the networks are frozen, in the file's precision, their weights mapped from it.

    `prediction` ("epsilon" or "v_prediction") overrides what the file says or what is guessed, which `log`
    tells. Raises ValueError: damaged, code inside, another architecture, a tensor missing or left over."""
    path = Path(path)
    tensors, metadata, step = read_single_file(path)
    tensors = {NO_PREFIX.sub(CLIP, k): t for k, t in tensors.items() if not IGNORED.match(k)}
    sd2 = recognise(tensors, path)
    try:
        kind, because = prediction_type(tensors, sd2, prediction, metadata, step)
        schedule = Schedule(prediction_type=kind)
        if own := parse_json(metadata.get("hanokdiff_config", "{}"), "hanokdiff_config"):
            schedule = Schedule.from_json({**own["scheduler"], "prediction_type": kind})
            unet_c, vae_c = UNetConfig.from_json(own["unet"]), VAEConfig.from_json(own["vae"])
            text_c = TextConfig.from_json(own["text_encoder"])
        else:
            v2 = sd2 and kind == "v_prediction"
            unet_c, vae_c = infer_unet(tensors, sd2, v2), infer_vae(tensors, v2)
            text_c = infer_text(tensors, sd2)
        with torch.device("meta"):
            networks = UNet(unet_c), VAE(vae_c), TextEncoder(text_c)
    except ERRORS as e:
        incomplete = f"{path} is not a complete checkpoint of Stable Diffusion 1.x or 2.x"
        raise ValueError(f"{incomplete} ({reason(e)})") from None
    check_fit(unet_c, text_c, path)
    fill_networks(networks, tensors, path)
    if log:
        log(f"{path.name}: SD {2 if sd2 else 1}.x, {kind} ({because})")
    return *networks, schedule


def read_vae(path: Path) -> VAE:
    """An autoencoder in a file by itself (such as vae-ft-mse-840000-ema-pruned), with or without a prefix."""
    if not path.is_file():
        raise ValueError(f"--vae {path}: no such file or folder")
    tensors, _, _ = read_single_file(path)
    tensors = {k if k.startswith(FIRST_STAGE) else FIRST_STAGE + k: t for k, t in tensors.items()}
    tensors = {k: t for k, t in tensors.items() if not IGNORED.match(k)}
    try:
        with torch.device("meta"):
            vae = VAE(infer_vae(tensors, False))
    except ERRORS as e:
        raise ValueError(f"{path} is no autoencoder of Stable Diffusion 1.x or 2.x ({reason(e)})") from None
    fill_networks((vae,), tensors, path)
    return vae


def fill_networks(networks: tuple[nn.Module, ...], tensors: dict[str, Tensor], path: Path) -> None:
    """Give the networks (on the meta device) their tensors; every one must be there, and no other."""
    c = networks[-1].config
    if isinstance(c, TextConfig) and is_sd2(c):
        last = f"{OPEN_CLIP}transformer.resblocks.{c.num_hidden_layers}."  # its output is never used
        tensors = split_qkv({k: t for k, t in tensors.items() if not k.startswith(last)})
    wanted = []
    for network in networks:
        name = namer(network.config)
        wanted.append({ours: name(ours) for ours in network.state_dict()})
    asked = {theirs for names in wanted for theirs in names.values()}
    check_names(asked, tensors.keys(), path, "it is not a plain checkpoint of Stable Diffusion 1.x or 2.x")
    for network, names in zip(networks, wanted, strict=True):
        own, found = network.state_dict(), {ours: tensors[theirs] for ours, theirs in names.items()}
        found |= {k: t[:, :, 0, 0] for k, t in found.items() if t.shape[2:] == (1, 1) and own[k].dim() == 2}
        fill(network, found, path, "the rest of the file")


def save_file(path, unet: UNet, vae: VAE, encoder: TextEncoder, schedule: Schedule, dtype=torch.float32):
    """Write a .safetensors file that the other tools read; the metadata tell them what the UNet predicts, and
    tell `read_file` the sizes, so that a model of any shape comes back."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f'{path} ends in "{path.suffix}"; give a name that ends in .safetensors')
    v = schedule.prediction_type == "v_prediction"
    v2 = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    configs = {"unet": unet.config, "vae": vae.config, "text_encoder": encoder.config, "scheduler": schedule}
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": v2 if is_sd2(encoder.config) else "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.prediction_type": "v" if v else "epsilon",
        "hanokdiff_config": json.dumps({k: c.to_json() for k, c in configs.items()}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors({k: t.to(dtype) for k, t in to_ldm(unet, vae, encoder).items()}, path, metadata)
