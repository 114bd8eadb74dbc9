"""The small files of DreamBooth's smaller sisters: what they have changed in a model, and nothing else.

    Custom Diffusion    PATH.attn2.processor.to_k_custom_diffusion.weight (C, D), to_v_...: the new weights;
                        PATH.attn1.processor (0,), without which diffusers' load_attn_procs refuses the file.
                        Its own .bin is read too
    SVDiff              unet.PATH.weight, text_encoder.PATH.weight: the shifts (r,) of the singular values

The word's vectors lie beside as an embedding file.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from hanokdiff.formats.tensors import read_pt, read_safetensors, write_tensors
from hanokdiff.formats.validate import all_finite
from hanokdiff.methods import spectral
from hanokdiff.methods.inject import base_layer

FILES = {
    "cross-attention": "pytorch_custom_diffusion_weights.safetensors",  # diffusers' own name
    "singular-values": "spectral_shifts.safetensors",
}
NETWORKS = {"unet": "unet", "text": "text_encoder"}  # in a run, in the file


def save_file(path: Path, train: str, parameters: dict[str, nn.Parameter], about: dict[str, str]) -> None:
    """Write what `--train` has trained, by its name in the run ("unet.", "text."), in fp32."""
    tensors = {}
    for name, p in parameters.items():
        network, _, layer = name.partition(".")
        if network not in NETWORKS:
            continue  # the word's vectors
        exact = getattr(p, "master", p).detach().float().cpu().contiguous()
        if train == "cross-attention":
            stem, _, key = layer.removesuffix(".weight").rpartition(".")
            tensors[f"{stem}.processor.{key}_custom_diffusion.weight"] = exact
            tensors[f"{stem.replace('.attn2', '.attn1')}.processor"] = torch.empty(0)
        else:
            tensors[f"{NETWORKS[network]}.{layer}"] = exact
    write_tensors(tensors, path, {"format": "pt", "method": train, **about})


def kind(keys) -> str | None:
    """ "cross-attention" or "singular-values" by the names in a file; None of another one."""
    keys = [k for k in keys if isinstance(k, str)]
    if any("_custom_diffusion." in k for k in keys):
        return "cross-attention"
    if keys and all(k.startswith(("unet.", "text_encoder.")) and k.endswith(".weight") for k in keys):
        return None if any("lora" in k for k in keys) else "singular-values"
    return None


def read_file(path: Path) -> tuple[str, dict[str, Tensor]]:
    """What kind of file it is, and its tensors by "NETWORK.LAYER", NETWORK being unet or text_encoder."""
    path = Path(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        content = read_pt(path, "Custom Diffusion")
        content = content if isinstance(content, dict) else {}
    else:
        content = read_safetensors(path, "Custom Diffusion or SVDiff")[0]
    found, held = kind(content), {k: t for k, t in content.items() if isinstance(t, Tensor)}
    tensors = {k: t for k, t in held.items() if not str(k).endswith(".processor")}
    if found is None:
        way = "a LoRA is --lora, an embedding --embedding"
        raise ValueError(f"{path} holds neither Custom Diffusion's weights nor SVDiff's shifts; {way}")
    if bad := [k for k, t in tensors.items() if not (t.is_floating_point() and t.numel() and all_finite(t))]:
        raise ValueError(f"{path}: {bad[0]} is no tensor of finite numbers; take an earlier file")
    if found == "singular-values":
        return found, {k.removesuffix(".weight"): t for k, t in tensors.items()}
    names = {k: k.replace(".processor.", ".").replace("_custom_diffusion", "") for k in tensors}
    return found, {f"unet.{names[k]}": tensor for k, tensor in tensors.items()}


@torch.no_grad()
def apply_file(sd, path: Path, log=print) -> None:
    """Change the model by a file: all of it, or nothing with an error."""
    found, tensors = read_file(path)
    networks = {"unet": sd.unet, "text_encoder": sd.text.encoder}
    modules = {name: dict(network.named_modules()) for name, network in networks.items()}
    places = {}
    for name, tensor in tensors.items():
        network, _, layer = name.partition(".")
        layer, _, part = layer.rpartition(".") if found == "cross-attention" else (layer, "", "weight")
        own = modules[network].get(layer)
        weight = getattr(base_layer(own), part, None) if own is not None else None
        if weight is None:
            raise ValueError(f"{path}: {sd.name} has no layer {layer}; it was made for another architecture")
        wanted = weight.shape if found == "cross-attention" else (min(weight.flatten(1).shape),)
        if tuple(tensor.shape) != tuple(wanted):
            shapes = f"shape {tuple(tensor.shape)}, but {sd.name} needs {tuple(wanted)} there"
            raise ValueError(f"{path}: {name} has {shapes}; it was made for another architecture")
        places[name] = (networks[network], layer, part)
    for name, (network, layer, part) in places.items():
        if found == "singular-values":
            spectral.merge(network, {layer: tensors[name]})
        else:
            own = base_layer(network.get_submodule(layer))
            changed = tensors[name].to(getattr(own, part))
            setattr(own, part, nn.Parameter(changed, requires_grad=False))
    if log:
        what = {"cross-attention": "Custom Diffusion", "singular-values": "SVDiff"}[found]
        log(f"{what} {path}: all {len(tensors)} tensors matched")
