"""Models, LoRAs, embeddings and hypernetworks from one layout to another.

    python -m hanokdiff.convert IN OUT

    IN                                       OUT
    model folder, hub id or "tiny"           NAME.safetensors   a single file, for the WebUI and ComfyUI
    single file (.safetensors, .ckpt)        NAME               a folder, for diffusers
    .ckpt                                    NAME.safetensors
    LoRA in any spelling                     NAME.safetensors   kohya's names to diffusers', others to kohya's
    embedding (.pt, .bin, .safetensors)      NAME.pt            for the WebUI
                                             NAME.safetensors   for diffusers
    hypernetwork (.pt), however old          NAME.pt            as the WebUI writes it today
    Custom Diffusion, SVDiff, with --model   NAME               the whole model that they change

What IN is, its content says. Nothing is written unless every tensor has found its place.
"""

import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hanokdiff.device import DTYPES
from hanokdiff.errors import make_folder, report_errors
from hanokdiff.files import read_json
from hanokdiff.formats import delta_file, embedding_file, hypernet_file, lora_file, lora_names, single_file
from hanokdiff.formats.folder import find_model, save_folder
from hanokdiff.formats.load import TINY_MODEL, load_model, open_file, open_folder
from hanokdiff.formats.tensors import read_pt, read_safetensors
from hanokdiff.options import Options

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
ENDINGS = {"LoRA": (".safetensors",), "embedding": (".safetensors", ".pt"), "hypernetwork": (".pt",)}
OPTIONS = {
    "model": {"dtype", "prediction", "tokenizer"}, "LoRA": {"dtype", "to"},
    "delta": {"dtype", "prediction", "tokenizer", "model"},
}  # fmt: skip


def names(path: Path) -> list:
    """The names in a file, without its tensors where the container allows that."""
    if path.suffix in PICKLES:
        content = read_pt(path, "model, LoRA, embedding or hypernetwork")
        return [k for k in content if isinstance(k, str | int)] if isinstance(content, dict) else []
    return list(read_safetensors(path, "model, LoRA or embedding")[0])


def recognise(path: Path, keys: list) -> str:
    """What a file is, by the names in it."""
    if any(isinstance(k, int) for k in keys):
        return "hypernetwork"
    if any(k.startswith(single_file.UNET) for k in keys):
        return "model"
    if delta_file.kind(keys):
        return "delta"
    if len(keys) == 1 or {"string_to_param", "emb_params", "clip_l", "clip_g"} & set(keys):
        return "embedding"
    if any("lora" in k for k in keys):
        return "LoRA"
    held = f"{keys[0]} ..." if keys else "nothing by name"
    unknown = f"{path} is no model, LoRA, embedding or hypernetwork that hanokdiff knows: it holds {held}"
    raise ValueError(f"{unknown}; of a model in several files, give the folder")


def precision(args, tensors: Iterable[Tensor]) -> torch.dtype:
    """--dtype, else the narrowest that keeps every weight as it is."""
    own = torch.float16
    for t in tensors:
        if t.is_floating_point() and t.itemsize > 1:
            own = torch.promote_types(own, t.dtype)
    return DTYPES.get(args.dtype, own)


def is_folder(out: Path) -> bool:
    """Whether a model goes into a folder of this name; "sd-v1.5" is one too."""
    return out.suffix not in (".safetensors", *PICKLES)


def same(args, what: str) -> ValueError:
    return ValueError(f"nothing to do: {args.input} is {what} already")


# Each of these reads IN, writes OUT and returns what it was and how many tensors found their place.


def convert_model(args, keys: list) -> tuple[str, int]:
    source, out = TINY_MODEL if args.input == "tiny" else find_model(args.input), args.output
    to_folder, token = is_folder(out), source / "hanokdiff.json"
    changed = source.is_file() if to_folder else source.suffix != out.suffix
    if not (changed or args.dtype or args.prediction):
        raise same(args, "a model folder" if to_folder else "a single file")
    if source.is_file() and not to_folder:
        unet, vae, encoder, schedule = single_file.read_file(source, args.prediction, print)
    else:
        opened = open_file if source.is_file() else open_folder
        unet, vae, encoder, words, schedule = opened(source, args.tokenizer, args.prediction, print)
    tensors = [t for network in (unet, vae, encoder) for t in network.state_dict().values()]
    dtype = precision(args, tensors)
    if to_folder:
        save_folder(out, unet, vae, encoder, words, schedule, dtype)
        if token.is_file():
            shutil.copy(token, out)
    else:
        single_file.save_file(out, unet, vae, encoder, schedule, dtype)
        if token.is_file():
            word = read_json(token).get("token")
            lost = f'a single file has no place for the pseudo word "{word}"'
            print(f"note: {lost}: keep it in mind", file=sys.stderr)
    return f"model {'folder' if source.is_dir() else 'file'}, {schedule.prediction_type}", len(tensors)


def convert_delta(args, keys: list) -> tuple[str, int]:
    if args.model is None:
        raise ValueError(f"{args.input} holds what changed in a model; name the model: --model BASE")
    how = dict(tokenizer=args.tokenizer, prediction=args.prediction, masters=True, log=None)
    sd = load_model(args.model, "cpu", "fp32", **how)
    delta_file.apply_file(sd, args.input, log=None)
    dtype = DTYPES.get(args.dtype, torch.float16)
    if is_folder(args.output):
        parts = (sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule)
        save_folder(args.output, *parts, dtype)
    else:
        single_file.save_file(args.output, sd.unet, sd.vae, sd.text.encoder, sd.schedule, dtype)
    print("note: the word's own vectors are in the embedding file beside it: --embedding", file=sys.stderr)
    return f"what changed in {args.model}", len(keys)


def convert_lora(args, keys: list) -> tuple[str, int]:
    loras, metadata = lora_file.read_file(args.input)
    keys = [k for k in keys if not k.startswith("bundle_emb.")]
    kohya = keys[0].startswith("lora_")
    to = args.to or ("diffusers" if kohya else "kohya")
    if kohya:
        unchanged = all(k.startswith((lora_names.UNET, lora_names.TEXT)) for k in keys)
    else:
        unchanged = "lora_adapter_metadata" not in metadata and all(map(lora_names.is_written, keys))
    if args.dtype is None and (to == "kohya") == kohya and unchanged:
        raise same(args, f"a LoRA in the {to} layout")
    dtype = precision(args, (t[side] for t in loras.values() for side in ("down", "up")))
    words = lora_file.read_words(args.input)
    if to == "kohya":
        lora_file.save_file(args.output, loras, {**kohya_metadata(loras), **metadata}, dtype, words)
    else:
        for word, vectors in words.items():  # diffusers reads it with load_textual_inversion
            beside = args.output.with_name(f"{args.output.stem}-embedding.safetensors")
            if beside.exists() and not args.overwrite:
                raise ValueError(f"{beside} is there already; name another OUT, or add --overwrite")
            embedding_file.save_file(beside, word, vectors)
            print(f'note: the word "{word}" that was in {args.input} is now in {beside}', file=sys.stderr)
        lora_file.save_diffusers_file(args.output, loras, metadata, dtype)
    text = sum(name.startswith(lora_names.TEXT) for name in loras)
    layout = "kohya" if kohya else "diffusers"
    return f"LoRA in the {layout} layout, {len(loras)} modules, {text} of them text", len(keys)


def kohya_metadata(loras: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    """What the WebUI wants to see of a LoRA that has no metadata yet; it lists one for SD 2 only if told."""
    ranks = {len(t["down"]) for t in loras.values()}
    alphas = {float(t.get("alpha", len(t["down"]))) for t in loras.values()}
    # these take in the words' width
    context_layers = ("attn2_to_k", "attn2_to_v", "q_proj", "k_proj", "v_proj", "fc1")
    v2 = any(t["down"].shape[1] == 1024 for n, t in loras.items() if n.endswith(context_layers))
    one = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    one = {k: str(*v) if len(v) == 1 else "Dynamic" for k, v in one.items()}
    return {"ss_network_module": "networks.lora", "ss_v2": str(v2), **one}


def convert_embedding(args, keys: list) -> tuple[str, int]:
    word, vectors, metadata = embedding_file.read_file(args.input)
    to_webui = args.output.suffix == ".pt"
    old = "name" not in keys or zipfile.is_zipfile(args.input)
    unchanged = not old if to_webui else "emb_params" not in keys
    if unchanged and Path(args.input).suffix == args.output.suffix:
        raise same(args, f"an embedding in the {'WebUI' if to_webui else 'diffusers'} layout")
    embedding_file.save_file(args.output, word, vectors, metadata)
    return f'embedding "{word}", {len(vectors)} x {vectors.shape[1]}', 1


def convert_hypernetwork(args, keys: list) -> tuple[str, int]:
    spec, nets, held = hypernet_file.read_file(args.input)
    if {"activate_output", "dropout_structure"} <= set(keys) and not zipfile.is_zipfile(args.input):
        raise same(args, "a hypernetwork in the current WebUI layout")
    ours = {"step": "step", "name": "name", "info": "optional_info", "model": "sd_checkpoint_name"}
    about = {k: held[v] for k, v in ours.items() if held.get(v) is not None}
    hypernet_file.save_file(args.output, spec, nets, about)
    count = sum(len(tensors) for pair in nets.values() for tensors in pair)
    return f"hypernetwork for widths {', '.join(str(d) for d in sorted(nets))}", count


CONVERT = {
    "model": convert_model, "LoRA": convert_lora, "embedding": convert_embedding,
    "hypernetwork": convert_hypernetwork, "delta": convert_delta,
}  # fmt: skip


def options() -> Options:
    p = Options("hanokdiff.convert", description=__doc__)
    p.add_argument("input", metavar="IN", help="a file, a model folder, a hub id or tiny")
    p.add_argument("output", metavar="OUT", type=Path, help="the file or folder to write")
    p.add_argument("--dtype", choices=list(DTYPES), help="precision of a model or LoRA (default: as it is)")
    p.add_argument("--to", choices=["kohya", "diffusers"], help="names in a LoRA (default: the other ones)")
    p.add_argument("--prediction", choices=["epsilon", "v_prediction"], help="what a model's UNet predicts")
    p.add_argument("--tokenizer", help="folder or hub id, for a single file that has none beside it")
    p.add_argument("--model", help="the base model of a Custom Diffusion or SVDiff file")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    return p


@report_errors
def main(argv=None) -> None:
    args = options().parse_args(argv)
    source, out, kind, keys = Path(args.input), args.output, "model", []
    if source.is_file() and source.suffix != ".ckpt":  # a .ckpt is a model, and too large to look into twice
        keys = names(source)
        kind = recognise(source, keys)
    elif source.suffix in (".safetensors", *PICKLES) and not source.exists():
        raise ValueError(f"no file at {source}")
    for name in ("dtype", "to", "prediction", "tokenizer", "model"):
        if getattr(args, name) is not None and name not in OPTIONS.get(kind, ()):
            raise ValueError(f"--{name} means nothing for {source}, a file of kind {kind}; leave it out")
    folder = kind in ("model", "delta") and is_folder(out)
    endings = ENDINGS.get(kind, (".safetensors",))
    if not folder and out.suffix not in endings:
        article = "an" if kind == "embedding" else "a"
        wanted = f"{' or '.join(endings)}, which is what {article} {kind} is written as"
        raise ValueError(f"{out} does not end in {wanted}")
    if out.exists() and (source.resolve() == out.resolve() or not args.overwrite or out.is_dir() != folder):
        more = "" if args.overwrite else ", or add --overwrite"
        raise ValueError(f"{out} is there already; name another OUT{more}")
    if folder and out.is_dir() and not (out / "model_index.json").is_file() and any(out.iterdir()):
        raise ValueError(f"{out} is there already and holds other things than a model; name another OUT")
    make_folder(out.parent, f"OUT {out}:")
    what, count = CONVERT[kind](args, keys)
    print(f"{args.input}: {what}; all {count} tensors matched; wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
