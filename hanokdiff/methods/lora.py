"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, equation 3).

    y = W x + scale * up(down(x)),     scale = alpha / rank,     down: in -> rank,  up: rank -> out

W is frozen; `up` starts at zero, so step 0 is exactly the base model.  The file format is kohya's: every tool reads it.
Other tools' files are read too, whatever they call the tensors (lorafile.py), and diffusers' layout can be written.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from hanokdiff.formats import folder as checkpoint
from hanokdiff.formats import lora_names as lorafile
from hanokdiff.training.trainer import stream

# What each choice of --targets adds, by the end of the module's name in the UNet.
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "ff": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "conv": ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
REFUSED = {  # what in a tensor's name gives another kind of file away, as a regular expression
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale|lora_magnitude_vector": "DoRA", "oft_": "OFT",
    "lora_mid": "a Tucker-decomposed LoCon", r"\.diff(_b)?$": "full weight differences",
    r"\.lora_B(\.default)?\.bias$": "a LoRA with biases", "bundle_emb": "a LoRA with bundled embeddings",
    r"^(unet|text_encoder):\d+:": "a LoRA in cloneofsimo's layout, which counts its layers instead of naming them",
}  # fmt: skip
FALSIFIED = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")  # metadata that a rewritten file outdates


class LoRA(nn.Module):
    """A Linear or Conv2d (or a LoRA around one) with a low-rank side path. `strength` scales the side path."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, strength: float = 1.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.strength = base, rank, alpha, strength
        w = innermost(base).weight
        self.down = nn.Parameter(torch.empty(rank, *w.shape[1:], device=w.device))
        self.up = nn.Parameter(torch.zeros(w.shape[0], rank, *[1] * (w.dim() - 2), device=w.device))

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.base(x), self.strength * self.alpha / self.rank
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if down.dim() == 2:  # scaled and added inside the product: no operation more for it
            return torch.addmm(y.flatten(0, -2), F.linear(x, down).flatten(0, -2), up.t(), alpha=scale).view_as(y)
        conv = innermost(self.base)
        return y + F.conv2d(F.conv2d(x, down, None, conv.stride, conv.padding), up * scale)

    def delta(self) -> Tensor:
        """What this adds to the weight, in fp32 and in its shape."""
        w = innermost(self.base).weight
        up_down = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.strength * self.alpha / self.rank) * up_down.view(w.shape)


def innermost(module: nn.Module) -> nn.Module:
    while not isinstance(module, nn.Linear | nn.Conv2d):
        module = module.base
    return module


def holder(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Where the layer at a path (or the LoRA around it) hangs: a hypernetwork that stands before it stays outside."""
    parent, _, name = path.rpartition(".")
    parent = network.get_submodule(parent)
    while not isinstance(getattr(parent, name), LoRA | nn.Linear | nn.Conv2d):
        parent, name = getattr(parent, name), "base"
    return parent, name


def layers(sd) -> dict[str, tuple[nn.Module, str]]:
    """kohya name -> (network, path) of every Linear and Conv2d of UNet and text encoder, wrapped or not."""
    out = {}
    for prefix, network in (("lora_unet_", sd.unet), ("lora_te_text_model_", sd.text.encoder)):
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                path = path.split(".base")[0]  # inside LoRAs already there
                out[prefix + path.replace(".", "_")] = (network, path)
    return out


def _wrap(network: nn.Module, path: str, rank: int, alpha: float, strength: float = 1.0) -> LoRA:
    parent, name = holder(network, path)
    lora = LoRA(getattr(parent, name), rank, alpha, strength)
    setattr(parent, name, lora)
    return lora


def insert(
    sd, rank: int, alpha: float, targets: str = "attention", text_rank: int = 0, seed: int = 0
) -> dict[str, LoRA]:
    """Put fresh LoRAs into the model: kohya name -> LoRA. `targets` is "attention", "attention+ff" or with "+conv"."""
    ends = sum((TARGETS[t] for t in targets.split("+")), ())
    out = {}
    for name, (network, path) in layers(sd).items():
        text = network is sd.text.encoder
        r = text_rank if text else rank
        if not r or not path.endswith(tuple("." + e for e in (TEXT_TARGETS if text else ends))):
            continue
        lora = out[name] = _wrap(network, path, r, alpha * r / rank)
        bound = 1 / math.sqrt(lora.down[0].numel())  # kaiming_uniform(a=sqrt 5), as nn.Linear and kohya
        with torch.no_grad():
            lora.down.copy_((torch.rand(lora.down.shape, generator=stream(seed, "lora", name)) * 2 - 1) * bound)
    return out


def remove(sd, loras: dict[str, LoRA]) -> None:
    """Take these LoRAs out; the model is what it was, to the bit."""
    places = layers(sd)
    for name, lora in loras.items():
        parent, child = holder(*places[name])
        current = getattr(parent, child)
        if current is lora:
            setattr(parent, child, lora.base)
            continue
        while current.base is not lora:
            current = current.base
        current.base = lora.base


@torch.no_grad()
def merge(sd, loras: dict[str, LoRA]) -> dict[str, Tensor]:
    """Add these LoRAs to the weights themselves, in fp32, and take them out: sampling costs what it did without them.
    Returns the weights as they were, for `unmerge`: subtracting would not give them back to the bit."""
    before = {}
    for name, lora in loras.items():
        layer = innermost(lora)
        before[name] = layer.weight
        layer.weight = nn.Parameter((layer.weight.float() + lora.delta()).to(layer.weight.dtype), requires_grad=False)
    remove(sd, loras)
    return before


def unmerge(sd, before: dict[str, Tensor]) -> None:
    """Put the weights back that `merge` gave; the model is what it was, to the bit."""
    places = layers(sd)
    for name, weight in before.items():
        network, path = places[name]
        innermost(network.get_submodule(path)).weight = weight


# ------------------------------------------------------------------------------------------------------- the file


def write(path: Path, loras: dict, metadata: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
    """kohya's layout: NAME.lora_down.weight, NAME.lora_up.weight, NAME.alpha (0-d), with ss_* metadata. `loras` maps
    kohya names to LoRAs, or is what `read` gives."""
    tensors = {}
    for name, lora in loras.items():
        down, up, alpha = _numbers(lora)
        tensors[f"{name}.lora_down.weight"] = down.cpu().to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = up.cpu().to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    metadata = {k: v for k, v in metadata.items() if k not in FALSIFIED}
    checkpoint.write_tensors(tensors, path, {**metadata, **_hashes(tensors, metadata)})


def write_native(path: Path, loras: dict, metadata: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
    """diffusers' and peft's layout: PATH.lora_A.weight (down) and PATH.lora_B.weight (up), with dotted paths.

    It has no place for alpha that every reader looks at; they all take alpha = rank, a scale of 1. So alpha / rank goes
    into the weights, half of it (a power of two, so no digit is lost) into each side: all of it in one side would drive
    a small one into fp16's coarse last digits."""
    tensors = {}
    for name, lora in loras.items():
        down, up, alpha = _numbers(lora)
        scale = alpha / down.shape[0]
        half = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
        module = lorafile.native(name)
        tensors[f"{module}.lora_A.weight"] = (down.cpu().float() * half).to(dtype)
        tensors[f"{module}.lora_B.weight"] = (up.cpu().float() * (scale / half)).to(dtype)
    kept = {k: v for k, v in metadata.items() if k not in (*FALSIFIED, "ss_network_dim", "ss_network_alpha")}
    checkpoint.write_tensors(tensors, path, {"format": "pt", **kept})


def _numbers(lora: LoRA | dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """(down, up, alpha) of a LoRA, or of an entry of what `read` gives; there, a missing alpha means alpha = rank."""
    if isinstance(lora, LoRA):
        return lora.down.detach(), lora.up.detach(), float(lora.alpha)
    return lora["down"], lora["up"], float(lora.get("alpha", lora["down"].shape[0]))


def _hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """kohya's two hashes, by which the WebUI knows a file: of the bytes after the header, ss_ metadata only."""
    raw = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    legacy = hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(body).hexdigest(), "sshs_legacy_hash": legacy}


def metadata(sd, *, name: str, images: int, token: str, rank: int, alpha: float, text_rank: int, lr: float, steps: int,
             batch_size: int, resolution: int, seed: int, **_) -> dict[str, str]:  # fmt: skip
    """The file's metadata in kohya's names, so that other tools show them, and the pseudo word under ours."""
    v2, v = sd.text.encoder.config.hidden_size == 1024, sd.schedule.prediction_type == "v_prediction"
    meta = {
        "hanokdiff_token": token, "ss_network_module": "networks.lora", "ss_network_dim": rank,
        "ss_network_alpha": float(alpha), "ss_network_args": json.dumps({}), "ss_v2": v2,
        "ss_base_model_version": ("sd_v2" if v2 else "sd_v1") + ("_v" if v else ""), "ss_sd_model_name": sd.name,
        "ss_output_name": name, "ss_learning_rate": lr, "ss_unet_lr": lr,
        "ss_text_encoder_lr": lr if text_rank else None, "ss_num_train_images": images, "ss_num_reg_images": 0,
        "ss_steps": steps, "ss_batch_size_per_device": batch_size, "ss_resolution": f"({resolution}, {resolution})",
        "ss_seed": seed, "ss_optimizer": "torch.optim.adamw.AdamW",
    }  # fmt: skip
    return {k: str(v) for k, v in meta.items()}


def read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """A file in any spelling that lorafile.py knows: {kohya name: {"down", "up", "alpha"}} and the file's metadata.
    A module without "alpha" has alpha = rank. Other kinds of file are named and refused."""
    path = Path(path)
    tensors, metadata = _open(path)
    first, settings = next(iter(tensors), ""), _peft_settings(path, tensors, metadata)
    out: dict[str, dict[str, Tensor]] = {}
    dotted: dict[str, str] = {}
    for key, tensor in tensors.items():
        for mark, kind in REFUSED.items():
            if re.search(mark, key):
                raise ValueError(f"{path} holds {kind} (tensor {key}), which hanokdiff does not apply; only plain LoRA")
        if (parsed := lorafile.parse(key)) is None:
            raise ValueError(f"{path}: tensor {key} is of no LoRA for Stable Diffusion 1 or 2; expected kohya's names "
                             "(lora_unet_...lora_down.weight) or diffusers' (unet....lora_A.weight)")  # fmt: skip
        name, kind, where = parsed
        dotted[name] = where
        if kind in out.setdefault(name, {}) or bool(dotted[name]) == first.startswith("lora_"):
            raise ValueError(f"{path} mixes two spellings ({first} and {key}); load the files it was put together from")
        out[name][kind] = tensor
    half = [n for n, t in out.items() if not {"down", "up"} <= t.keys()]
    if not out or half:
        what = f"{half[0]} has no lora_down or lora_up" if half else "there are no tensors in it"
        raise ValueError(f"{path} is not a complete LoRA: {what}")
    for name, t in out.items():
        down, up = t["down"], t["up"]
        if min(down.dim(), up.dim()) < 2 or not 0 < down.shape[0] == up.shape[1]:
            raise ValueError(f"{path}: {name} has lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)}, which "
                             "share no rank; the file is damaged or of another kind")  # fmt: skip
        single = t["alpha"].numel() == 1 and not t["alpha"].is_complex() if "alpha" in t else True
        if not (down.numel() and up.numel() == up.shape[0] * len(down) and single
                and down.is_floating_point() and up.is_floating_point()):  # fmt: skip
            raise ValueError(f"{path}: {name} has lora_down {down.dtype} {tuple(down.shape)}, lora_up {up.dtype} "
                             f"{tuple(up.shape)} or an alpha that is not one number; the file is damaged")  # fmt: skip
        if not all(checkpoint.finite(x) for x in t.values()):
            raise ValueError(f"{path}: {name} has a value that is not finite; take an earlier file of that training")
        if settings != {} and dotted[name] and "alpha" not in t:
            t["alpha"] = _peft_alpha(path, settings, name, dotted[name], len(down))
    return out, metadata


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of the .bin that diffusers wrote at first."""
    if not path.is_file():
        raise ValueError(f"no LoRA file at {path}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        tensors = checkpoint.read_pt(path, "LoRA")
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise ValueError(f"{path} holds no tensors by name, so no LoRA that hanokdiff knows; convert it to "
                             ".safetensors with the tool that made it")  # fmt: skip
        return tensors, {}
    return checkpoint.read_safetensors(path, "LoRA")


def _peft_settings(path: Path, keys: Iterable[str], metadata: dict[str, str]) -> dict:
    """What peft keeps beside the tensors: diffusers puts it into the header, peft itself into adapter_config.json."""
    beside = path.with_name("adapter_config.json")
    if any(k.startswith("base_model.model.") for k in keys):
        if beside.is_file():
            return checkpoint.read_json(beside)
        warnings.warn(f"{beside}, where peft keeps alpha, is missing: {path} is taken with alpha = rank", stacklevel=2)
    return checkpoint.parse_json(metadata.get("lora_adapter_metadata", "{}"), f"{path}: lora_adapter_metadata")


def _peft_alpha(path: Path, settings: dict, name: str, dotted: str, rank: int) -> Tensor:
    """peft's alpha of one module: its own if a pattern fits the module's path, else that of the network, else the rank.
    With rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) the scale is alpha / sqrt(rank)."""
    text = name.startswith(lorafile.TEXT)
    network, dotted = ("text_encoder.", "text_model." + dotted) if text else ("unet.", dotted)
    try:
        own = {k.removeprefix(network): v for k, v in settings.items() if k.startswith(network)} or settings
        patterns = (own.get("alpha_pattern") or {}).items()
        if hard := [p for p, _ in patterns if re.search(r"\)[*+?{]", p) or len(re.findall("[*+{]", p)) > 2]:
            raise ValueError(f"the pattern {hard[0][:40]!r} might take for ever")  # as a regular expression can
        fits = (a for p, a in patterns if re.match(rf"(.*\.)?({p})$", dotted))
        alpha = float(next(fits, own.get("lora_alpha", rank)))
        return torch.tensor(alpha * math.sqrt(rank) if own.get("use_rslora") else alpha)
    except (TypeError, ValueError, AttributeError, re.error) as e:
        raise ValueError(f"{path}: peft's settings beside {name} cannot be read ({e}); save the file again") from None


def load(sd, path: Path, strength: float = 1.0, say=print) -> tuple[dict[str, LoRA], dict[str, str]]:
    """Apply a file to the model: all of it, or none with an error. Returns the LoRAs, for `remove`, and metadata."""
    wanted, metadata = read(path)
    places = layers(sd)
    lost = [n for n in wanted if n not in places]
    if lost:
        raise ValueError(f"{path}: {len(wanted) - len(lost)} of {len(wanted)} modules matched {sd.name}, {len(lost)} "
                         f"left over (such as {lost[0]}); it was made for another architecture")  # fmt: skip
    for name, t in wanted.items():  # look at everything before anything is touched
        network, p = places[name]
        w = innermost(network.get_submodule(p)).weight
        if t["down"].shape[1:].numel() != w[0].numel() or t["up"].shape[0] != w.shape[0]:
            made = f"{t['down'][0].numel()} -> {t['up'].shape[0]}"
            raise ValueError(f"{path}: {name} goes {made}, but in {sd.name} that layer goes {w[0].numel()} -> "
                             f"{w.shape[0]}; the LoRA was made for another architecture")  # fmt: skip
    out = {}
    for name, t in wanted.items():
        rank = t["down"].shape[0]  # a missing alpha means alpha = rank, in every reader
        lora = out[name] = _wrap(*places[name], rank, float(t.get("alpha", torch.tensor(float(rank)))), strength)
        with torch.no_grad():
            lora.down.copy_(t["down"].reshape(lora.down.shape))
            lora.up.copy_(t["up"].reshape(lora.up.shape))
        lora.requires_grad_(False)
    if say:
        say(f"LoRA {path}: all {len(out)} modules matched, strength {strength:g}")
    return out, metadata
