"""Prompts to pictures: start from noise, remove a little of it 20 times, decode.

    eps = eps_un + cfg (eps_words - eps_un)          classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598

    python sample.py "a castle in the snow" "a barn on fire" --n 4
    python sample.py "*, fire" "* in the fire" "A fire broke out in *" --lora runs/lora/lora.safetensors --grid

Writes runs/samples/00000-0.png ... (number, seed), each with the WebUI's "parameters" text, and grid.png with --grid.
Read next: hanokdiff/samplers.py (the step), hanokdiff/model.py (guidance), hanokdiff/unet.py (the network).
"""

import argparse
import math
import sys
from pathlib import Path

from PIL import PngImagePlugin
from tqdm import tqdm

from hanokdiff import cli, lora, model, samplers


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)  # fmt: skip
    p.add_argument("prompt", nargs="+")
    what, how, out = (p.add_argument_group(g) for g in ("model", "sampling", "output"))
    what.add_argument("--model", default="tiny", help='"tiny", a diffusers folder or a hub id (default: tiny)')
    what.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="repeatable")
    what.add_argument("--token", help="the pseudo word (default: the LoRA's own)")
    what.add_argument("--literal-tokens", action="store_true", help="leave the pseudo word to the tokenizer")
    what.add_argument("--device", help="default: the first GPU, else the CPU")
    what.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    how.add_argument("--negative", default="", help="what to move away from")
    names = ", ".join(samplers.SAMPLERS)
    how.add_argument("--sampler", default=samplers.DEFAULT, help=f"{names} (default: %(default)s)")
    how.add_argument("--steps", type=int, default=20, help="default: 20")
    how.add_argument("--cfg", type=float, help="guidance; 1 is none (default: 7.5, tiny 4)")
    how.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: the model's own)")
    how.add_argument("--seed", type=int, default=0, help="picture i of each prompt starts from seed + i (default: 0)")
    how.add_argument("--n", type=int, default=1, help="pictures per prompt (default: 1)")
    how.add_argument("--batch-size", type=int, help="pictures at once (default: 4, tiny 32)")
    out.add_argument("--grid", action="store_true", help="also grid.png, a row per prompt")
    out.add_argument("--out", type=Path, help="folder (default: runs/samples, numbered if taken)")
    return p


def parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    w, _, h = text.lower().partition("x")
    if not (w.isdigit() and h.isdigit()):
        raise ValueError(f'--size is "{text}", but must be WIDTHxHEIGHT, such as 512x512')
    return int(w), int(h)


def parse_scale(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE (a colon may also be part of the path)."""
    path, _, scale = text.rpartition(":")
    try:
        return (Path(path), float(scale)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def check(args) -> None:
    for name in ("n", "steps", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {args.seed}, but must be between 0 and {2**63 - 1}")
    for name, value in [("--cfg", args.cfg or 0.0), *((f"--lora {p}", s) for p, s in map(parse_scale, args.lora))]:
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be a finite number")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")


def parameters(prompt: str, seed: int, size: tuple[int, int], args, cfg: float) -> str:
    """How the picture was made, in the WebUI's words, so that any tool can read it."""
    negative = f"\nNegative prompt: {args.negative}" if args.negative else ""
    used = "".join(f", LoRA: {path.name}:{scale:g}" for path, scale in map(parse_scale, args.lora))
    return (f"{prompt}{negative}\nSteps: {args.steps}, Sampler: {args.sampler}, CFG scale: {cfg:g}, Seed: {seed}, "
            f"Size: {size[0]}x{size[1]}, Model: {args.model}{used}")  # fmt: skip


@cli.polite
def main(argv=None):
    args = options().parse_args(argv)
    check(args)
    size = parse_size(args.size)
    sd = model.load(args.model, args.device, args.dtype)
    size = size or (sd.resolution, sd.resolution)
    model.check_size(size, sd.vae.config.factor)
    samplers.levels(args.sampler, sd.schedule, args.steps)  # refuses what cannot be, before anything is written
    cfg = sd.cfg if args.cfg is None else args.cfg

    tokens = []
    for path, scale in map(parse_scale, args.lora):
        tokens.append(lora.load(sd, path, scale)[1].get("hanokdiff_token"))
    sd.text.word = args.token or next(filter(None, tokens), None)
    sd.text.literal_tokens = args.literal_tokens
    sd.text.warn_without_word(args.prompt)

    out = args.out or cli.free_folder(Path("runs") / "samples")
    out.mkdir(parents=True, exist_ok=True)
    first = 1 + max((int(p.name[:5]) for p in out.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")), default=-1)
    jobs = [(prompt, args.seed + i) for prompt in args.prompt for i in range(args.n)]
    at_once, drawn = args.batch_size or (32 if sd.name == "tiny" else 4), []
    for k in range(0, len(jobs), at_once):
        prompts, seeds = zip(*jobs[k : k + at_once], strict=True)
        steps = sd.sample(list(prompts), list(seeds), args.negative, args.sampler, args.steps, cfg, size)
        for latents in tqdm(steps, f"{len(drawn) + len(seeds)} of {len(jobs)}", args.steps, unit="step"):
            pass
        for (prompt, seed), picture in zip(jobs[k : k + at_once], sd.pictures(latents), strict=True):
            info = PngImagePlugin.PngInfo()
            info.add_text("parameters", parameters(prompt, seed, size, args, cfg))
            picture.save(out / f"{first + len(drawn):05d}-{seed}.png", pnginfo=info)
            drawn.append(picture)
    print(f"wrote {len(drawn)} pictures to {out}")
    if args.grid:
        model.grid(drawn, args.n, zoom=max(1, 128 // size[0])).save(out / "grid.png")
        print(f"one row per prompt: {out / 'grid.png'}")


if __name__ == "__main__":
    sys.exit(main())
