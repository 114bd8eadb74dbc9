"""The spellings of LoRA files: what every tool calls the same tensor, and the way back. No numbers.

    kohya (ours, the WebUI's)  lora_unet_down_blocks_0_attentions_1_..._attn1_to_q.lora_down.weight
    peft, diffusers            unet.down_blocks.0.attentions.1....attn1.to_q.lora_A.weight, `unet.` may lack
    diffusers 0.22             unet.down_blocks.0.attentions.1....attn1.to_q.lora.down.weight, also mixed
    diffusers of 2023          unet.down_blocks.0.attentions.1....attn1.processor.to_q_lora.down.weight
    its text encoder
        text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight

Everything is read into kohya's names.  They lose the dots of a module's path; a list of Stable Diffusion's
words brings them back: `to_out_0` is `to_out.0`, since `to_out` is a word and `to` is none.
"""

import functools
import re

from hanokdiff.formats.single_file import unet_places
from hanokdiff.models.unet import UNetConfig

UNET, TEXT = "lora_unet_", "lora_te_text_model_"
ENDS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    # peft's modules, saved with their adapter's name
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # diffusers of 2023
UNET_ROOTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding")
WORDS = (
    "resnets conv1 conv2 conv_shortcut time_emb_proj downsamplers upsamplers conv linear_1 linear_2 "
    "attentions proj_in proj_out transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj encoder "
    "layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2"
).split()
LONGEST_FIRST = sorted((*UNET_ROOTS, *WORDS), key=len, reverse=True)
WORD = re.compile("|".join(LONGEST_FIRST) + r"|\d+")


def parse(key: str) -> tuple[str, str, str] | None:
    """A tensor's name in any spelling -> (module in kohya's name, "down", "up" or "alpha", dotted path of the
    module, empty if the spelling was kohya's). None if it is in no spelling that we know."""
    end = next((e for e in ENDS if key.endswith(e)), None)
    if end is None:
        return None
    module = key.removesuffix(end)
    if module.startswith("lora_"):
        return (_canonical(module), ENDS[end], "") if "." not in module else None
    network, path = _split(module)
    if network is None:
        return None
    path = path.replace(".processor.", ".")
    if end.startswith("_lora"):
        parent, _, last = path.rpartition(".")
        last = OLD_TEXT.get(last, last) if network == TEXT else last.replace("to_out", "to_out.0")
        path = f"{parent}.{last}"
    return network + path.replace(".", "_"), ENDS[end], path


TEXT_PREFIXES = ("lora_te_0_transformer_text_model_", "lora_te1_text_model_", "lora_te1_", "lora_te_")


def _canonical(name: str) -> str:
    """kohya's name as kohya writes it: other tools spell the text encoder's beginning in other ways, and some
    number the UNet's blocks as the original code does."""
    for prefix in TEXT_PREFIXES:
        if name.startswith(prefix):
            return TEXT + name.removeprefix(prefix).removeprefix("text_model_")
    names, path = original_names(), name.removeprefix(UNET)
    head = path
    while head and head not in names:  # the longest beginning that is a module of the original layout
        head = head.rpartition("_")[0]
    return UNET + names[head] + path.removeprefix(head) if head else name


@functools.cache
def original_names() -> dict[str, str]:
    """The original layout's modules -> diffusers', of four levels with two layers, as in SD 1 and 2."""
    places = unet_places(UNetConfig())
    return {theirs.replace(".", "_"): ours.replace(".", "_") for ours, theirs in places.items()}


def _split(module: str) -> tuple[str | None, str]:
    """A dotted module -> (kohya's prefix of its network, path in it); None for other networks, such as SDXL's
    second text encoder. Without a prefix, the first word of the path tells."""
    prefix, _, rest = module.partition(".")
    path = rest if prefix in ("unet", "text_encoder") else module
    path = path.removeprefix("base_model.model.").removeprefix("text_model.")
    if prefix == "text_encoder" or (prefix != "unet" and path.startswith("encoder.layers.")):
        return TEXT, path
    return (UNET if prefix == "unet" or path.partition(".")[0] in UNET_ROOTS else None), path


def diffusers_name(name: str) -> str:
    """kohya's name of a module -> diffusers' path of it, such as `unet.mid_block.attentions.0.proj_in`. The
    text encoder's has `text_model.`: every version of diffusers knows that one."""
    for prefix, network in ((UNET, "unet."), (TEXT, "text_encoder.text_model.")):
        rest = name.removeprefix(prefix)
        words = WORD.findall(rest)
        if rest != name and words and "_".join(words) == rest:
            return network + ".".join(words)
    unknown = f"{name} is no layer of Stable Diffusion 1 or 2, so diffusers has no name for it"
    raise ValueError(f"{unknown}; leave the file in kohya's layout")


def is_written(key: str) -> bool:
    """Whether we would give a tensor in diffusers' names this very name."""
    parsed = parse(key)
    return parsed is not None and key in (f"{diffusers_name(parsed[0])}.lora_{x}.weight" for x in "AB")
