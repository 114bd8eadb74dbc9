"""Prompts to pictures: start from noise, remove a little of it 20 times, decode.

    eps = eps_uncond + cfg (eps_cond - eps_uncond)        classifier-free guidance
                                                          Ho & Salimans 2022, arXiv:2207.12598, equation 6

    python sample.py "a castle in the snow" "a barn, (fire:1.3)" --n 4
    python sample.py "*, fire" "* in the fire" --lora runs/lora/lora.safetensors --grid
    python sample.py "[a barn:a castle:0.3] in the snow" "a barn AND a fire :0.7" "* at night <lora:lora:0.8>"
    python sample.py "* on fire" --lora runs/lora/lora.safetensors --init-image house.png --strength 0.6
    python sample.py --alert "[행정안전부] 14:20 전주 한옥마을 화재 발생" --lora runs/lora/lora.safetensors

Writes runs/samples/00000-0.png ... (number, seed), each with the WebUI's "parameters" text, and grid.png with
--grid. --alert refuses a drill, an all-clear and whatever names no disaster: no picture, exit code 2.
Read next: hanokdiff/models/samplers.py (the steps), hanokdiff/models/unet.py (the network).
"""

import argparse
import contextlib
import functools
import math
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from hanokdiff import alert, axes
from hanokdiff.errors import check_file, check_folder, make_folder, report_errors
from hanokdiff.files import free_folder
from hanokdiff.formats import delta_file, embedding_file, hypernet_file, lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.formats.lookup import find_artefact
from hanokdiff.images import labelled_sheet, read_photo, webui_parameters, write_png
from hanokdiff.methods import hypernetwork, lora
from hanokdiff.models import memory, samplers
from hanokdiff.models.attend import SCALE, Attend
from hanokdiff.models.memory import given_kv, project_kv, shared_prefix
from hanokdiff.models.pipeline import latent_size
from hanokdiff.models.prompt_schedule import AND, not_understood, take_tags
from hanokdiff.models.tokens import contains_word, same_word
from hanokdiff.options import Options

MOST = 10_000  # pictures of a prompt in one go
MOST_SEED = 2**32 - 1  # torch's generator on the CPU takes 32 bits: from there on it repeats itself


@torch.inference_mode()
def sample(sd, prompts: list[str], seeds: list[int], args, size, init_latents, bar) -> list[Image.Image]:
    """One picture of this size per prompt and seed: the sampling loop, B pictures at once."""
    noise = sd.noise(seeds, size)  # noise(): (B, 4, h, w), a function of each picture's own seed
    step, steps, start = samplers.plan(args.sampler, sd.schedule, args.steps, args.strength)
    # of each step ((1 + K) B, 77, D): B times the negative prompt, then each of the prompts' K parts; K is 1
    contexts, weights = sd.contexts(prompts, args.negative, len(steps), args.cfg)
    attend = Attend(sd, prompts, args.attend, len(steps), args.attend_scale) if args.attend else None
    x, previous, last = noise() * start, None, None
    if init_latents is not None:
        x = init_latents + x

    for i, (sigma, after, t) in enumerate(steps):  # from much noise to none
        context = contexts[i]
        if attend:
            x = attend(x, sigma, t, context[-len(x) :], i)
        if context is not last:  # at the first step, and where a prompt changes
            kv, last = project_kv(sd.unet, context), context  # keys and values of cross-attention
        x_t = x * (sigma**2 + 1) ** -0.5  # scaled as the UNet was trained
        t, rows = torch.full((1,), t, device=x.device), len(context) // len(x)
        with given_kv(kv), shared_prefix(sd.unet, rows):  # what all steps, and all rows, have in common
            pred = sd.unet(x_t.repeat(rows, 1, 1, 1), t, context)
        if rows > 1:
            uncond, *conds = pred.chunk(rows)
            toward = sum(w * (cond - uncond) for w, cond in zip(weights, conds, strict=True))
            pred = uncond + args.cfg * toward  # classifier-free guidance; of AND's parts, their weighted sum
        x0 = sd.schedule.predict_x0(x, pred, sigma)  # the clean picture that this noise implies
        x = step(x, x0, sigma, after, previous, noise)
        previous = x0, sigma
        bar.update()
    return sd.pictures(x / math.sqrt(after**2 + 1))  # decoded


def options():
    p = Options(description=__doc__)
    text = "(word:1.2) (word) [word] weigh, \\( is a bracket, BREAK starts a chunk; [from:to:when], [a|b], "
    p.add_argument("prompt", nargs="*", help=text + "a AND b :0.7, <lora:NAME:0.8>")
    alerted = "instead: a Korean disaster alert, which becomes the prompt"
    p.add_argument("--alert", metavar="TEXT", help=alerted)
    what, how, out = (p.add_argument_group(g).add_argument for g in ("model", "sampling", "output"))
    what("--model", default="tiny", help='"tiny", a folder, a .safetensors or .ckpt file or a hub id')
    what("--embedding", action="append", default=[], metavar="FILE[:WORD]", help="repeatable")
    what("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="repeatable")
    what("--hypernet", action="append", default=[], metavar="FILE[:SCALE]", help="repeatable")
    what("--delta", action="append", default=[], type=Path, metavar="FILE", help="Custom Diffusion or SVDiff")
    where = "where <lora:NAME> is (default: runs)"
    what("--lora-dir", type=Path, default=Path("runs"), metavar="FOLDER", help=where)
    what("--token", help="the pseudo word (default: the one stored with the artefact)")
    what("--literal-tokens", action="store_true", help="leave the pseudo word to the tokenizer")
    what("--tokenizer", help="of a single-file model: a folder or hub id")
    what("--prediction", choices=("epsilon", "v_prediction"), help="if the model is wrong about it")
    what("--vae", metavar="PATH", help="another autoencoder: a folder or a file")
    trained = "a model trained on a schedule that ends in noise alone"
    what("--zero-terminal-snr", action="store_true", help=trained)
    what("--device", help="default: the first GPU, else the CPU")
    what("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    how("--negative", default="", help="what to move away from")
    names = ", ".join(samplers.SAMPLERS)
    how("--sampler", default=samplers.DEFAULT, help=f"{names} (default: %(default)s)")
    how("--steps", type=int, default=20, help="default: 20")
    how("--cfg", type=float, help="guidance; 1 is none (default: 7.5, tiny 4)")
    how("--size", help="WIDTHxHEIGHT in pixels (default: the model's own, in the initial picture's shape)")
    how("--seed", type=int, default=0, help="picture i of each prompt starts from seed + i (default: 0)")
    how("--n", type=int, default=1, help="pictures per prompt (default: 1)")
    how("--batch-size", type=int, help="pictures at once (default: 4, tiny 32)")
    how("--clip-skip", type=int, default=1, help="2 leaves the text encoder's last layer out (default: 1)")
    attended = "Attend-and-Excite: see to it that these words are attended to"
    how("--attend", nargs="+", metavar="WORD", help=attended)
    how("--attend-scale", type=float, default=SCALE, help="how strongly (default: %(default)g)")
    how("--init-image", type=Path, metavar="FILE", help="a picture to begin with")
    how("--strength", type=float, help="how far from it to go, up to 1 (default: 0.75)")
    how("--compile", action="store_true", help="torch.compile: minutes at first, for many pictures")
    out("--grid", action="store_true", help="also grid.png, a row per prompt, labelled")
    plot = f"an X/Y plot: rows, then columns; AXIS {', '.join(axes.NAMES)}: strength=0.4,0.7,1 seed=1-4"
    out("--vary", nargs="+", default=[], metavar="AXIS=VALUES", help=plot)
    out("--out", type=Path, help="folder (default: runs/samples, numbered if taken)")
    return p


def parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    w, _, h = text.lower().partition("x")
    if not (w.isdecimal() and h.isdecimal() and len(text) < 20):
        raise ValueError(f'--size is "{text}", but must be WIDTHxHEIGHT, such as 512x512')
    return int(w), int(h)


def parse_scale(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE (a colon may also be part of the path)."""
    path, _, scale = text.rpartition(":")
    try:
        return (Path(path), float(scale)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def parse_word(text: str) -> tuple[Path, str | None]:
    """FILE or FILE:WORD."""
    path, _, word = text.rpartition(":")
    return (Path(path), word) if path and word and not Path(text).exists() else (Path(text), None)


def check(args) -> None:
    """Refuse what can be refused before a model is opened, or even fetched."""
    if not args.prompt and args.alert is None:
        raise ValueError("nothing to draw: give a prompt, or --alert TEXT")
    if args.prompt and args.alert is not None:
        raise ValueError("--alert makes the prompt itself; leave out either the prompts or --alert")
    for name in ("n", "steps", "batch_size", "clip_skip"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if args.n > MOST:
        raise ValueError(f"--n is {args.n}, but must be at most {MOST}; draw more with another --seed")
    for sampler in [args.sampler, *args.axes.get("sampler", [])]:
        if sampler not in samplers.SAMPLERS:
            samplers.sigmas_and_timesteps(sampler, None, args.steps)  # which refuses it
    if not 0 <= args.seed <= MOST_SEED - args.n + 1:
        raise ValueError(f"--seed is {args.seed}, but must be between 0 and {MOST_SEED - args.n + 1}")
    scales = [(f"--{kind} {path}", scale) for kind, path, scale in given_files(args)]
    for name, value in [("--cfg", args.cfg or 0.0), ("--attend-scale", args.attend_scale), *scales]:
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be a finite number")
    for kind, parse in (("lora", parse_scale), ("hypernet", parse_scale), ("embedding", parse_word)):
        for given in getattr(args, kind):
            check_artefact(parse(given)[0], f"--{kind} {given}")
    others = [("--delta", file) for file in args.delta]
    others += [("--init-image", args.init_image)] if args.init_image else []
    others += [("--vary file", file) for file in args.axes.get("file", [])]
    for option, file in others:
        check_artefact(file, f"{option} {file}")
    if args.strength is not None and not args.init_image:
        raise ValueError("--strength says how far to go from --init-image, which is not given")
    if args.init_image:
        args.strength = 0.75 if args.strength is None else args.strength
        samplers.img2img_steps(args.steps, args.strength)
    if args.out is not None:
        check_folder(args.out)
    if args.axes:
        check_vary(args)


def check_artefact(path: Path, option: str) -> None:
    before, _, strength = str(path).rpartition(":")
    if before and not path.exists() and Path(before).is_file():
        raise ValueError(f"{option}: the strength is {strength!r}, but must be a number, as in {before}:0.8")
    check_file(path, option)


def given_files(args) -> tuple:
    """The LoRAs and hypernetworks as a prompt's tags would name them."""
    return tuple((kind, *parse_scale(f)) for kind in ("lora", "hypernet") for f in getattr(args, kind))


def apply_file(sd, kind: str, file: Path, scale: float, log=print) -> tuple:
    """Apply a LoRA or hypernetwork to the model: its pseudo word, and a function that takes it out again."""
    if kind == "lora":
        loras, metadata = lora_file.apply_file(sd, file, scale, log)
        before = lora.merge(sd, loras)  # into the weights: no step costs more than without it
        return metadata.get("hanokdiff_token"), functools.partial(lora.unmerge, sd, before)
    net, metadata = hypernet_file.apply_file(sd, file, scale, log)
    return hypernet_file.pseudo_word(metadata), functools.partial(hypernetwork.remove, sd, net)


def apply_files(sd, args, but_scaled: bool = False) -> None:
    """Every artefact into the model, and the pseudo words that came with them; but for LoRAs and
    hypernetworks where a sheet's axis applies them."""
    words = list(sd.text.words)
    for path in args.delta:
        delta_file.apply_file(sd, path)
    for given in () if but_scaled else given_files(args):
        words.append(apply_file(sd, *given)[0])
    for word in [args.token] if args.token else sorted(filter(None, set(words))):
        if word not in sd.text.words:  # a LoRA file may have brought its own vectors for it
            sd.text.add_word(word)
    embedded = set()
    for path, word in map(parse_word, args.embedding):
        word = embedding_file.apply_file(sd, path, word)[0]
        if same_word(word) in embedded:
            raise ValueError(f'two embeddings for "{word}"; give one another word: --embedding {path}:WORD')
        embedded.add(same_word(word))


def check_attend(prompts: list[str], words: list[str] | None) -> None:
    for word in words or ():
        if not any(contains_word(prompt, word) for prompt in prompts):
            raise ValueError(f'--attend "{word}": no prompt has it; name words as the prompts write them')
    if words and any(AND.search(prompt) for prompt in prompts):
        raise ValueError("--attend and AND do not go together: each part is guided already; leave one out")


def read_tags(args) -> dict[str, tuple[str, tuple]]:
    """Each prompt as it is drawn, and its artefacts (kind, file, scale); notes what becomes plain text."""
    out = {}
    for prompt in args.prompt:
        text, tags = take_tags(prompt)
        files = {kind: [parse_scale(f)[0] for f in getattr(args, kind)] for kind in ("lora", "hypernet")}
        found = tuple((k, find_artefact(k, name, args.lora_dir, files[k]), scale) for k, name, scale in tags)
        out[prompt] = text, found
    if strange := [x for prompt in (*out, args.negative) for x in not_understood(prompt)]:
        warnings.warn(f"drawn as plain text: {', '.join(dict.fromkeys(strange))}; see --help", stacklevel=2)
    return out


@contextlib.contextmanager
def with_tags(sd, tags: tuple, log=print):
    """The model with the artefacts that a prompt names, and afterwards without them."""
    undo, words, table = [], sd.text.words, sd.text.encoder.embeddings.token_embedding
    for tag in tags:
        word, take_out = apply_file(sd, *tag, log)
        undo.append(take_out)
        if word and word not in sd.text.words:
            sd.text.add_word(word)
    yield
    for take_out in reversed(undo):
        take_out()
    # without the words that came along
    sd.text.words, sd.text.encoder.embeddings.token_embedding = words, table


def from_alert(args, sd, reading: alert.Reading) -> str:
    """The alert becomes the prompt; prints how it was understood and returns it as one line of JSON."""
    if len(sd.text.words) > 1 and not args.token:
        raise ValueError(f"the pseudo words are {', '.join(sd.text.words)}; name the hanok's: --token WORD")
    word = args.token or next(iter(sd.text.words), None)
    prompt, notes = alert.prompt(reading, word, alert.tiny_words() if sd.resolution <= 64 else None)
    args.prompt = [prompt]
    print(alert.two_lines(reading, prompt, notes))
    return alert.as_json(reading, prompt, notes)


def initial_picture(args, sd, size):
    """The initial picture at the size to draw, cropped where its shape differs, and that size."""
    if not args.init_image:
        return None, size or (sd.resolution, sd.resolution)
    picture, _ = read_photo(args.init_image)
    if size is None:  # the shorter side as the model knows it, the shape kept
        zoom, step = sd.resolution / min(picture.size), 8
        size = tuple(max(step, round(side * zoom / step) * step) for side in picture.size)
    latent_size(size, sd.vae.config.factor)
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS), size


def warn_of_size(size: tuple[int, int], trained: int) -> None:
    """A UNet draws its subject twice where it has more room than it has seen, and half of it where less."""
    if not 0.7 <= min(size) / trained <= max(size) / trained <= 1.6:
        far = f"{size[0]}x{size[1]} is far from the {trained}x{trained} that the model was trained at"
        way = "draw near that size, then enlarge: --init-image FILE --size ..."
        warnings.warn(f"{far}: subjects may be doubled or cut; {way}", stacklevel=2)


def parameters(prompt: str, seed: int, size: tuple[int, int], args) -> str:
    more = [("Clip skip", args.clip_skip)] if args.clip_skip > 1 else []
    if args.init_image:
        more += [("Denoising strength", f"{args.strength:g}"), ("Init image", args.init_image.name)]
    for path, word in map(parse_word, args.embedding):
        more.append(("Embedding", path.name + (f":{word}" if word else "")))
    for kind, files in (("LoRA", args.lora), ("Hypernet", args.hypernet)):
        more += [(kind, f"{path.name}:{scale:g}") for path, scale in map(parse_scale, files)]
    more += [("Delta", path.name) for path in args.delta]
    more += [("Attend", f"{' '.join(args.attend)}:{args.attend_scale:g}")] if args.attend else []
    how = (args.steps, args.sampler, args.cfg, seed, size, args.model)
    return webui_parameters(prompt, *how, negative=args.negative, more=more)


@report_errors
def main(argv=None):
    args = options().parse_args(argv)
    args.axes = axes.parse(args.vary)
    check(args)
    reading = None if args.alert is None else alert.drawable(args.alert)
    tagged = read_tags(args)
    if reading is None:
        check_attend(args.prompt, args.attend)
    size = parse_size(args.size)
    more = {k: getattr(args, k) for k in ("tokenizer", "prediction", "vae", "zero_terminal_snr")}
    sd = load_model(args.model, args.device, args.dtype, **more)
    init, size = initial_picture(args, sd, size)
    latent_size(size, sd.vae.config.factor)  # this and the next line refuse before anything is written
    warn_of_size(size, sd.resolution)
    samplers.plan(args.sampler, sd.schedule, args.steps, args.strength)
    args.cfg = sd.cfg if args.cfg is None else args.cfg
    sd.text.literal_tokens = args.literal_tokens
    sd.text.skip(args.clip_skip)
    apply_files(sd, args, but_scaled=bool({"strength", "file"} & args.axes.keys()))
    if args.compile:
        print("--compile: each block is compiled at its first step, which takes a minute or more")
        memory.compile(sd.unet)
    understood = reading and from_alert(args, sd, reading)
    if understood:
        tagged = {prompt: (prompt, ()) for prompt in args.prompt}
        check_attend(args.prompt, args.attend)
    init_latents = None if init is None else sd.latents(init)

    out = make_folder(args.out or free_folder(Path("runs") / "samples"))
    number = 1 + max((int(p.name[:5]) for p in out.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")), default=-1)
    what = functools.partial(draw, sd, size=size, init_latents=init_latents, out=out, understood=understood)
    if args.axes:
        tiles, rows, columns, count = draw_varied(what, sd, args, tagged, number)
    else:
        pictures = what(args, tagged, number)
        tiles = [pictures[k : k + args.n] for k in range(0, len(pictures), args.n)]
        rows, columns = args.prompt, [f"seed {args.seed + i}" for i in range(args.n)]
        count = len(pictures)
    print(f"wrote {count} pictures to {out}")
    if args.grid or args.axes:
        alone = [args.prompt[0]] if args.axes and len(args.prompt) == 1 else []
        about = [*alone, args.model, f"{args.steps} steps of {args.sampler}", f"cfg {args.cfg:g}"]
        about += [str(f) for f in (*args.lora, *args.hypernet, *args.embedding, *args.delta)]
        write_png(out / "grid.png", labelled_sheet(tiles, rows, columns, ", ".join(about)))
        print(f"one sheet of all: {out / 'grid.png'}")


def draw(sd, args, tagged: dict, number: int, *, size, init_latents, out: Path, understood) -> list:
    """Every prompt `args.n` times, each picture into its file, numbered from `number` on; the pictures."""
    steps = len(samplers.plan(args.sampler, sd.schedule, args.steps, args.strength).steps)
    jobs = [(prompt, args.seed + i) for prompt in args.prompt for i in range(args.n)]
    at_once = args.batch_size or (32 if sd.resolution <= 64 else 4)
    pictures = {}
    for tags in dict.fromkeys(tags for _, tags in tagged.values()):
        places = [i for i, (prompt, _) in enumerate(jobs) if tagged[prompt][1] == tags]
        texts, seeds = [tagged[jobs[i][0]][0] for i in places], [jobs[i][1] for i in places]
        with with_tags(sd, tags):
            sd.text.warn_without_word(list(dict.fromkeys(texts)), args.negative)
            for part in sd.batches(texts, at_once, steps):
                some = [texts[k] for k in part], [seeds[k] for k in part]
                count = f"{len(pictures) + len(part)} of {len(jobs)}"
                with tqdm(total=steps, desc=count, unit="step") as bar:
                    drawn = sample(sd, *some, args, size, init_latents, bar)
                for i, picture in zip([places[k] for k in part], drawn, strict=True):
                    pictures[i], (prompt, seed) = picture, jobs[i]
                    info = {"parameters": parameters(prompt, seed, size, args)}
                    info |= {"alert": understood} if understood else {}
                    write_png(out / f"{number + i:05d}-{seed}.png", picture, info)
    return [pictures[i] for i in range(len(jobs))]


def draw_varied(draw, sd, args, tagged: dict, number: int) -> tuple[list, list[str], list[str], int]:
    """--vary: a picture for every pair of values, the same noise along a row but where the seed varies; with
    one axis a row is a prompt. Returns tiles, names of rows and of columns, and the number of pictures."""
    (down, rows), (across, columns) = [("prompt", args.prompt), *args.axes.items()][-2:]
    moved, tiles = {"strength", "file"} & {down, across}, []
    for r in rows:
        tiles.append([])
        for c in columns:
            now = with_values(args, {down: r, across: c})
            named = {prompt: tagged.get(prompt, (prompt, ())) for prompt in now.prompt}
            with with_tags(sd, given_files(now) if moved else (), log=None):  # the sheet's labels say it
                tiles[-1] += draw(now, named, number)
            number += 1
    names = [[axes.label(axis, v) for v in values] for axis, values in ((down, rows), (across, columns))]
    return tiles, *names, len(rows) * len(columns)


def with_values(args, values: dict) -> argparse.Namespace:
    """The arguments of one picture of a sheet."""
    now = argparse.Namespace(**{**vars(args), "n": 1})
    for axis, value in values.items():
        if axis == "prompt":
            now.prompt = [value]
        elif axis == "strength":
            for kind in ("lora", "hypernet"):
                setattr(now, kind, [f"{parse_scale(f)[0]}:{value}" for f in getattr(now, kind)])
        elif axis == "file":
            kind = "hypernet" if value.suffix == ".pt" else "lora"
            scale = parse_scale((getattr(now, kind) or [""])[0])[1]
            setattr(now, kind, [f"{value}:{scale:g}"])
        else:
            setattr(now, axis, value)
    return now


def check_vary(args) -> None:
    """Refuse before a model is opened what no sheet can be made of."""
    found = args.axes
    if args.n > 1:
        raise ValueError("--vary draws one picture for each pair of values; leave out --n, or vary the seed")
    if len(args.prompt) > 1 and ("prompt" in found or len(found) == 2):
        raise ValueError(f"{len(args.prompt)} prompts and --vary of {' and '.join(found)}: give one prompt")
    if "prompt" in found:
        args.prompt = found["prompt"]
    if "strength" in found and not (args.lora or args.hypernet or "file" in found):
        raise ValueError("--vary strength needs a --lora or --hypernet, whose strength it is")
    if bad := [v for v in found.get("steps", []) if v < 1]:
        raise ValueError(f"--vary steps: {bad[0]}, but must be at least 1")


if __name__ == "__main__":
    sys.exit(main())
