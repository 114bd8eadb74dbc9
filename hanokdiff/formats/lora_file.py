"""LoRA files: kohya's layout and diffusers', written and read."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hanokdiff.files import parse_json, read_json
from hanokdiff.formats import embedding_file, lora_names
from hanokdiff.formats.tensors import read_pt, read_safetensors, write_tensors
from hanokdiff.formats.validate import all_finite
from hanokdiff.methods import lora
from hanokdiff.methods.inject import base_layer

REFUSED = {  # what in a tensor's name gives another kind of file away, as a regular expression
    "hada_": "LoHa", "lokr_": "LoKr", "dora_scale|lora_magnitude_vector": "DoRA", "oft_": "OFT",
    r"^lora_te2_|^text_encoder_2\.|transformer_blocks[._]([2-9]|\d\d)[._]": "a LoRA for SDXL",
    "double_blocks|single_blocks|single_transformer_blocks": "a LoRA for Flux",
    r"joint_blocks|context_block|add_[kqv]_proj": "a LoRA for SD 3",
    "lora_mid": "a Tucker-decomposed LoCon", r"\.diff(_b)?$": "full weight differences",
    r"\.lora_B(\.default)?\.bias$": "a LoRA with biases",
    r"^(unet|text_encoder):\d+:": "a LoRA in cloneofsimo's layout, which counts its layers instead of "
    "naming them",
}  # fmt: skip
ONLY = "which hanokdiff does not apply; only plain LoRA for Stable Diffusion 1 and 2"
BUNDLED = "bundle_emb.{}.string_to_param.*"  # the WebUI's name for a word's vectors in a LoRA file
STALE_METADATA = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")  # of a rewritten file


def save_file(path: Path, loras: dict, metadata: dict[str, str], dtype=torch.float32, words=None) -> None:
    """kohya's layout: NAME.lora_down.weight, NAME.lora_up.weight, NAME.alpha (0-d), with ss_* metadata.
    `loras` maps kohya names to LoRAs, or is what `read_file` gives. `words`: the vectors (n, D) of words that
    were trained beside them, bundled as the WebUI does."""
    tensors = {BUNDLED.format(word): vectors for word, vectors in (words or {}).items()}
    tensors = {k: v.detach().cpu().to(dtype).contiguous() for k, v in tensors.items()}
    for name, layer in loras.items():
        down, up, alpha = _numbers(layer)
        tensors[f"{name}.lora_down.weight"] = down.cpu().to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = up.cpu().to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    metadata = {k: v for k, v in metadata.items() if k not in STALE_METADATA}
    write_tensors(tensors, path, {**metadata, **_hashes(tensors, metadata)})


def save_diffusers_file(path: Path, loras: dict, metadata: dict[str, str], dtype=torch.float32) -> None:
    """diffusers' and peft's layout: PATH.lora_A.weight (down) and PATH.lora_B.weight (up), with dotted paths.

    It has no place for alpha that every reader looks at; they all take alpha = rank, a scale of 1. So alpha /
    rank goes into the weights, half of it (a power of two, so no digit is lost) into each side: all of it in
    one side would drive a small one into fp16's coarse last digits."""
    tensors = {}
    for name, layer in loras.items():
        down, up, alpha = _numbers(layer)
        scale = alpha / down.shape[0]
        half = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
        module = lora_names.diffusers_name(name)
        tensors[f"{module}.lora_A.weight"] = (down.cpu().float() * half).to(dtype)
        tensors[f"{module}.lora_B.weight"] = (up.cpu().float() * (scale / half)).to(dtype)
    left_out = (*STALE_METADATA, "ss_network_dim", "ss_network_alpha")
    kept = {k: v for k, v in metadata.items() if k not in left_out}
    write_tensors(tensors, path, {"format": "pt", **kept})


def _numbers(layer: lora.LoRA | dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """(down, up, alpha) of a LoRA, or of an entry of `read_file`, where a missing alpha means the rank."""
    if isinstance(layer, lora.LoRA):
        down, up = layer.exact()
        return down.detach(), up.detach(), float(layer.alpha)
    return layer["down"], layer["up"], float(layer.get("alpha", layer["down"].shape[0]))


def _hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """kohya's two hashes, by which the WebUI knows a file: of the bytes after the header, ss_ metadata."""
    raw = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    legacy = hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(body).hexdigest(), "sshs_legacy_hash": legacy}


def metadata(sd, *, name: str, reg_images: int, **run) -> dict[str, str]:
    """The metadata in kohya's names, for other tools, and the pseudo word; `run`: the training's options."""
    side, tokens = run["resolution"], run.get("max_tokens", 75)
    v2, v = sd.text.encoder.config.hidden_size == 1024, sd.schedule.prediction_type == "v_prediction"
    meta = {
        "hanokdiff_token": run["token"], "ss_network_module": "networks.lora", "ss_network_dim": run["rank"],
        "ss_network_alpha": float(run["alpha"]), "ss_network_args": json.dumps({}), "ss_v2": v2,
        "ss_base_model_version": ("sd_v2" if v2 else "sd_v1") + ("_v" if v else ""),
        "ss_sd_model_name": sd.name, "ss_output_name": name,
        "ss_learning_rate": run["lr"], "ss_unet_lr": run["lr"],
        "ss_text_encoder_lr": run["text_lr"] if run["text_rank"] else None,
        "ss_num_train_images": run["images"], "ss_num_reg_images": reg_images, "ss_steps": run["steps"],
        "ss_batch_size_per_device": run["batch_size"], "ss_resolution": f"({side}, {side})",
        "ss_seed": run["seed"], "ss_clip_skip": sd.text.clip_skip if sd.text.clip_skip > 1 else None,
        "ss_max_token_length": tokens if tokens > 75 else None,
        "ss_optimizer": "torch.optim.adamw.AdamW",
    }  # fmt: skip
    return {k: str(v) for k, v in meta.items()}


def read_file(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """A file in any spelling that lora_names.py knows: {kohya name: {"down", "up", "alpha"}} and the file's
    metadata. A module without "alpha" has alpha = rank. Other kinds of file are named and refused."""
    path = Path(path)
    tensors, metadata = _open(path)
    # those that read_words reads are left out
    tensors = {key: t for key, t in tensors.items() if not key.startswith("bundle_emb.")}
    first, settings = next(iter(tensors), ""), _peft_settings(path, tensors, metadata)
    out: dict[str, dict[str, Tensor]] = {}
    dotted: dict[str, str] = {}
    for key, tensor in tensors.items():
        for mark, kind in REFUSED.items():
            if re.search(mark, key):
                raise ValueError(f"{path} holds {kind} (tensor {key}), {ONLY}")
        if (parsed := lora_names.parse(key)) is None:
            expected = "kohya's names (lora_unet_...lora_down.weight) or diffusers' (unet....lora_A.weight)"
            unknown = f"{path}: tensor {key} is of no LoRA for Stable Diffusion 1 or 2"
            raise ValueError(f"{unknown}; expected {expected}")
        name, kind, dotted[name] = parsed
        if kind in out.setdefault(name, {}) or bool(dotted[name]) == first.startswith("lora_"):
            mixed = f"{path} mixes two spellings ({first} and {key})"
            raise ValueError(f"{mixed}; load the files it was put together from")
        out[name][kind] = tensor
    wide = [n for n, t in out.items() if "down" in t and t["down"].shape[-1:] == (2048,)]
    if sdxl := [n for n in wide if n.endswith(("attn2_to_k", "attn2_to_v"))]:
        raise ValueError(f"{path} holds a LoRA for SDXL ({sdxl[0]} reads a context of width 2048), {ONLY}")
    half = [n for n, t in out.items() if not {"down", "up"} <= t.keys()]
    if not out or half:
        what = f"{half[0]} has no lora_down or lora_up" if half else "there are no tensors in it"
        raise ValueError(f"{path} is not a complete LoRA: {what}")
    for name, t in out.items():
        down, up, where = t["down"], t["up"], f"{path}: {name}"
        if min(down.dim(), up.dim()) < 2 or not 0 < down.shape[0] == up.shape[1]:
            sides = f"has lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)}"
            raise ValueError(f"{where} {sides}, which share no rank; the file is damaged or of another kind")
        alpha = t.get("alpha", torch.ones(()))
        real = down.is_floating_point() and up.is_floating_point() and not alpha.is_complex()
        if not (real and down.numel() and up.numel() == up.shape[0] * len(down) and alpha.numel() == 1):
            sides = f"lora_down {down.dtype} {tuple(down.shape)}, lora_up {up.dtype} {tuple(up.shape)}"
            raise ValueError(f"{where} has {sides} or an alpha that is not one number; the file is damaged")
        if not all(all_finite(x) for x in t.values()):
            raise ValueError(f"{where} has a value that is not finite; take an earlier file of that training")
        if settings != {} and dotted[name] and "alpha" not in t:
            t["alpha"] = _peft_alpha(path, settings, name, dotted[name], len(down))
    return out, metadata


def read_words(path: Path) -> dict[str, Tensor]:
    """The words bundled in a LoRA file and their vectors (n, D), as the WebUI and OneTrainer write them:
    bundle_emb.WORD.KEY, with the keys of an embedding's own file."""
    content: dict[str, dict] = {}
    for key, tensor in _open(Path(path))[0].items():
        if key.startswith("bundle_emb."):
            word, _, inner = key.removeprefix("bundle_emb.").partition(".")
            content.setdefault(word, {})[inner.removeprefix("string_to_param.")] = tensor
    return {word: embedding_file.check_vectors(tensors, word, path) for word, tensors in content.items()}


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of the .bin that diffusers wrote at first."""
    if not path.is_file():
        raise ValueError(f"no LoRA file at {path}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        tensors = read_pt(path, "LoRA")
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            way = "convert it to .safetensors with the tool that made it"
            raise ValueError(f"{path} holds no tensors by name, so no LoRA that hanokdiff knows; {way}")
        return tensors, {}
    return read_safetensors(path, "LoRA")


def _peft_settings(path: Path, keys: Iterable[str], metadata: dict[str, str]) -> dict:
    """What peft keeps beside the tensors: diffusers in the header, peft itself in adapter_config.json."""
    beside = path.with_name("adapter_config.json")
    if any(k.startswith("base_model.model.") for k in keys):
        if beside.is_file():
            return read_json(beside)
        missing = f"{beside}, where peft keeps alpha, is missing"
        warnings.warn(f"{missing}: {path} is taken with alpha = rank", stacklevel=2)
    return parse_json(metadata.get("lora_adapter_metadata", "{}"), f"{path}: lora_adapter_metadata")


def _peft_alpha(path: Path, settings: dict, name: str, dotted: str, rank: int) -> Tensor:
    """peft's alpha of one module: its own if a pattern fits the module's path, else the network's, else the
    rank. With rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) the scale is alpha / sqrt(rank)."""
    text = name.startswith(lora_names.TEXT)
    network, dotted = ("text_encoder.", "text_model." + dotted) if text else ("unet.", dotted)
    try:
        own = {k.removeprefix(network): v for k, v in settings.items() if k.startswith(network)} or settings
        patterns = (own.get("alpha_pattern") or {}).items()
        hard = [p for p, _ in patterns if re.search(r"\)[*+?{]", p) or len(re.findall("[*+{]", p)) > 2]
        if hard:  # as a regular expression can
            raise ValueError(f"the pattern {hard[0][:40]!r} might take for ever")
        fits = (a for p, a in patterns if re.match(rf"(.*\.)?({p})$", dotted))
        alpha = float(next(fits, own.get("lora_alpha", rank)))
        return torch.tensor(alpha * math.sqrt(rank) if own.get("use_rslora") else alpha)
    except (TypeError, ValueError, AttributeError, re.error) as e:
        unread = f"{path}: peft's settings beside {name} cannot be read ({e})"
        raise ValueError(f"{unread}; save the file again") from None


def apply_file(sd, path: Path, strength: float = 1.0, log=print) -> tuple[dict[str, lora.LoRA], dict]:
    """Apply a file to the model: all of it, or none with an error. Returns the LoRAs, for `remove`, and
    metadata. Words that are bundled in it become the model's."""
    wanted, metadata = read_file(path)
    words, places = read_words(path), lora.layers(sd)
    if lost := [n for n in wanted if n not in places]:
        matched = f"{len(wanted) - len(lost)} of {len(wanted)} modules matched {sd.name}"
        left_over = f"{len(lost)} left over (such as {lost[0]})"
        raise ValueError(f"{path}: {matched}, {left_over}; it was made for another architecture")
    for name, t in wanted.items():  # look at everything before anything is touched
        network, p = places[name]
        w = base_layer(network.get_submodule(p)).weight
        if t["down"].shape[1:].numel() != w[0].numel() or t["up"].shape[0] != w.shape[0]:
            made = f"{name} goes {t['down'][0].numel()} -> {t['up'].shape[0]}"
            own = f"in {sd.name} that layer goes {w[0].numel()} -> {w.shape[0]}"
            raise ValueError(f"{path}: {made}, but {own}; the LoRA was made for another architecture")
    for word, vectors in words.items():
        embedding_file.apply(sd, path, word, vectors)
    out = {}
    for name, t in wanted.items():
        rank = t["down"].shape[0]  # a missing alpha means alpha = rank, in every reader
        alpha = float(t.get("alpha", rank))
        layer = out[name] = lora.wrap(*places[name], rank, alpha, strength)
        with torch.no_grad():
            layer.down.copy_(t["down"].reshape(layer.down.shape))
            layer.up.copy_(t["up"].reshape(layer.up.shape))
        layer.requires_grad_(False)
    if log:
        bundled = f', and "{", ".join(words)}"' if words else ""
        log(f"LoRA {path}: all {len(out)} modules matched{bundled}, strength {strength:g}")
    skip = metadata.get("ss_clip_skip", "")
    if skip.isdigit() and int(skip) not in (0, sd.text.clip_skip):
        trained = f"{path} was trained with --clip-skip {skip}"
        warnings.warn(f"{trained}, and is used with {sd.text.clip_skip}", stacklevel=2)
    return out, metadata
