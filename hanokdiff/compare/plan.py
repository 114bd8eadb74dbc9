"""What a comparison will do, before it does it: the photos, the questions, and a cell for each training.

    manifest = plan(args, prepare(args))

A cell's folder, its pictures and its scores carry a hash of all that they depend on (photos, weights, every option):
what is there is right, and what has changed gets a new name. Read next: hanokdiff/compare/run.py (how a cell is done).

Shapes:  P photos to learn from, H held out, d the width of CLIP's common space.
"""

import argparse
import hashlib
import importlib.util
import json
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from hanokdiff.formats.load import load_model
from hanokdiff.models import samplers
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.tokens import word_pattern
from hanokdiff.scoring.clip import SCALES, TINY_CLIP, Clip, nearest, presence
from hanokdiff.scoring.stats import mean_interval
from hanokdiff.tiny import world
from hanokdiff.training import prior
from hanokdiff.training.args import check_resolution, check_training
from hanokdiff.training.dataset import Photo, load_photos, photo_files, prepare_captions

METHODS = {
    "ti": "embedding.safetensors",
    "dreambooth": "model",
    "lora": "lora.safetensors",
    "hypernet": "hypernet.pt",
}
SCRIPTS = Path(__file__).resolve().parents[2]  # where train_ti.py and its three siblings are
ASKED = {
    "untouched-hanok": "hanok",
    "untouched-described": "a Korean traditional house",
}  # beside the pseudo word
KINDS = "a hanok, a Korean traditional house|a Japanese house|a Chinese pavilion|a western house"
CONDITIONS = "a building on fire|a building beside a campfire|a building"
OWN = (
    "--model",
    "--data",
    "--images",
    "--held-out",
    "--resolution",
    "--token",
    "--seed",
    "--device",
    "--out",
    "--resume",
)  # not for --with
HELD_OUT, LEAST_HELD_OUT = 30, 2  # photos that no method sees
EPOCHS_AT = 50  # photos: there, --budget epochs gives each method its own number of steps
EXTRA = 32  # pictures at most of what is asked beside the prompts: it is no part of the result


@dataclass
class Context:
    """What all cells share: the base model, the judge, the photos, the questions."""

    token: str
    sd: StableDiffusion
    resolution: int  # of photos and pictures
    clip: Clip
    photos: list[Photo]  # to learn from, in their nested order
    held_out: list[Photo]  # that no method sees
    seen: torch.Tensor  # the judge's embeddings of the former (P, d)
    held: torch.Tensor  # and of the latter (H, d)
    kinds: dict[str, str]  # label -> text that the judge compares; the first is what is wanted
    conditions: dict[str, str]


def prepare(args) -> Context:
    """Open the model, the judge and the photos."""
    tiny_judge, most = args.clip in (None, "tiny"), max(args.sizes)
    kinds = choices(args.kinds, KINDS, {"hanok": "", **world.kind_prompts()} if tiny_judge else None)
    conditions = choices(
        args.conditions, CONDITIONS, {"fire": "", **world.condition_prompts()} if tiny_judge else None
    )
    held_out = HELD_OUT
    if args.data:  # before a model is opened, or even fetched
        spare = len(photo_files(args.data)) - most
        held_out = min(HELD_OUT, spare)
        if spare < LEAST_HELD_OUT:
            raise ValueError(
                f"--sizes asks for {most} photos, and at least {LEAST_HELD_OUT} more are held out to "
                f"compare with, but {args.data} has {most + spare}; lower --sizes or add photos"
            )
    sd = load_model(args.model, args.device)
    resolution = check_resolution(args.resolution, sd)
    samplers.sigmas_and_timesteps(samplers.DEFAULT, sd.schedule, args.sampling_steps)  # refuses too many
    photos, validation_photos = load_photos(args.data or world.photos, resolution, most, held_out)
    clip = Clip(TINY_CLIP if tiny_judge else args.clip, args.device or "cpu")
    seen, held = (clip.images(p.image for p in some) for some in (photos, validation_photos))
    return Context(args.token, sd, resolution, clip, photos, validation_photos, seen, held, kinds, conditions)


def choices(given: str | None, usual: str, tiny: dict | None) -> dict[str, str]:
    """Label -> text: those given, else the tiny world's, else the usual ones."""
    if given is None and tiny:
        return tiny
    labels = [c.strip() for c in (usual if given is None else given).split("|")]
    if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(
            f'"{given}" must name 2 different things or more, the wanted one first: "a hanok|a barn"'
        )
    return {label: label for label in labels}


# ------------------------------------------------------------------------------------------------- one training


@cache
def script(method: str):
    """train_METHOD.py as a module, for its options and defaults."""
    path = SCRIPTS / f"train_{method}.py"
    if not path.is_file():
        raise ValueError(f"{path} is missing; run hanokdiff.compare from a whole copy of the repository")
    spec = importlib.util.spec_from_file_location(f"compare_train_{method}", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def training(args, method: str, photos: int, held_out: int, seed: int) -> tuple[list[str], dict]:
    """The command line of one cell, and every option that it amounts to, defaults included."""
    tiny = args.model == "tiny"
    steps = args.steps or script(method).DEFAULTS["tiny" if tiny else "sd"]["steps"]
    steps = max(1, round(steps * photos / EPOCHS_AT)) if args.budget == "epochs" else steps
    home = str(Path(args.model).resolve()) if Path(args.model).exists() and not tiny else args.model
    argv = [
        "--model",
        home,
        "--images",
        photos,
        "--held-out",
        held_out,
        "--token",
        args.token,
        "--steps",
        steps,
        "--seed",
        seed,
        "--preview-every",
        0,
    ]
    argv += ["--data", args.data.resolve()] if args.data else []
    argv += ["--device", args.device] if args.device else []
    argv += ["--resolution", args.resolution] if args.resolution else []
    mine = [more for more in args.more if more.split()[0] in (method, "all")]
    try:
        more = sum((shlex.split(words)[1:] for words in mine), [])
        script(method).options().parse(more)
    except ValueError as e:
        raise ValueError(f'--with "{" ".join(mine)}": {e}') from None
    if own := [o for o in OWN if o in {word.split("=")[0] for word in more}]:
        raise ValueError(f"--with may not set {own[0]} of {method}, which the comparison sets for every cell")
    argv = [str(a) for a in argv] + more
    parsed = script(method).options().parse(argv)
    known = {
        k: v for k, v in vars(parsed).items() if v is not None
    }  # such as --alpha, which follows the rank
    check_training(argparse.Namespace(**{"data": None, **known}))
    about = {k: v for k, v in vars(parsed).items() if k not in ("model", "data", "device", "out", "resume")}
    return argv, about


# ------------------------------------------------------------------------------------------------ the questions


def questions(args, sd, clip: Clip) -> list[dict]:
    """What every cell is asked, and the texts that the pictures are scored with. Besides the prompts: the pseudo word
    alone, and where the tokenizer fuses the word with what follows, the prompt as other tools would read it."""
    out = []
    for place, (name, prompt) in enumerate(
        [*zip("ABCDEFGHIJKLMNOPQRSTUVXY", args.prompts), ("word", args.token)]
    ):
        subject = word_pattern(args.token).sub(lambda _: args.subject, prompt)
        row = {
            "key": name,
            "prompt": prompt,
            "literal_tokens": False,
            "noise": 10_000 * place,
            "n": args.n if name != "word" else min(args.n, EXTRA),
            "texts": {"literal": prompt, "words": subject, "context": args.context},
        }
        check_length(clip, subject)
        for literal in (False, True) if name != "word" else (False,):
            sd.text.literal_tokens = literal
            ids = sd.text.ids(prompt)
            end = ids.index(sd.text.tokenizer.eos_token_id)
            tokens = [sd.text.tokenizer.decode([i]).strip() for i in ids[1:end]]
            if not literal:
                out.append({**row, "tokens": tokens})
            elif tokens != out[-1]["tokens"]:
                more = {"key": f"{name} literal", "literal_tokens": True, "n": min(args.n, EXTRA)}
                out.append({**row, **more, "tokens": tokens})
    sd.text.literal_tokens = False
    return out


def check_length(clip: Clip, text: str) -> None:
    """A judge that reads only the beginning of a text would score something else."""
    longest = max((s.prefix + text for s in SCALES.values()), key=len)
    used = len(clip.tokenizer(longest, verbose=False).input_ids)
    if used > clip.length:
        raise ValueError(
            f'"{longest}" is {used} tokens long, but the judge {clip.name} reads {clip.length}; shorten '
            "--prompts or --subject, or name another --clip"
        )


# ----------------------------------------------------------------------------------------------------- the plan


def key(*parts) -> str:
    """A short name for everything that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def fingerprint(photos: list[Photo]) -> str:
    seen = hashlib.sha256()
    for p in photos:
        seen.update(p.image.tobytes() + (p.caption or "").encode())
    return seen.hexdigest()[:16]


def plan(args, study: Context) -> dict:
    """The manifest: every cell with the names of its folders, which tell whether it is done."""
    sd = study.sd
    sd.text.add_word(args.token)
    asked = questions(args, sd, study.clip)
    base, held_out = prior.fingerprint(sd), fingerprint(study.held_out)
    weights = study.clip.model.visual_projection.weight.cpu().numpy().tobytes()
    judge = [
        Path(study.clip.name).name,
        hashlib.sha256(weights).hexdigest()[:16],
        study.kinds,
        study.conditions,
    ]
    drawing = {
        "sampler": samplers.DEFAULT,
        "steps": args.sampling_steps,
        "cfg": sd.cfg,
        "size": study.resolution,
        "dtype": str(sd.dtype).removeprefix("torch."),
    }
    heads = [
        (name, "untouched", 0, 0, ask) for name, ask in {"untouched-literal": args.token, **ASKED}.items()
    ]
    heads += [
        (f"{method}-{photos}-{seed}", method, photos, seed, args.token)
        for seed in args.seeds
        for photos in sorted(args.sizes)
        for method in args.methods
    ]
    cells, captions = [], None
    for name, method, photos, seed, ask in heads:
        argv, about = (
            ([], {}) if method == "untouched" else training(args, method, photos, len(study.held_out), seed)
        )
        trained = key(about, base, fingerprint(study.photos[:photos]), held_out)
        prompts = [q for q in asked if method != "untouched" or not q["literal_tokens"]]
        prompts = [
            {**q, "prompt": word_pattern(args.token).sub(lambda _, a=ask: a, q["prompt"])} for q in prompts
        ]
        names = ("key", "prompt", "literal_tokens", "noise")
        drawn = key(trained, drawing, seed, [[q[k] for k in names] for q in prompts])
        scored = key(drawn, [q["n"] for q in prompts], judge, held_out, asked)
        captions = captions or (about and (about["replace"], about["caption"]))
        cells.append(
            {
                "name": name,
                "method": method,
                "photos": photos,
                "seed": seed,
                "ask": ask,
                "steps": about.get("steps", 0),
                "batch_size": about.get("batch_size", 0),
                "prompts": prompts,
                "folder": f"cells/{name}-{trained}",
                "pictures": f"pictures-{drawn}",
                "scores": f"scores-{scored}.json",
                "options": argv,
            }
        )
    names = ("model", "methods", "sizes", "seeds", "token", "budget", "n", "quick", "subject", "context")
    settings = {k: getattr(args, k) for k in names} | {
        "data": str(args.data or "the drawn hanok of the tiny world"),
        "drawing": drawing,
        "scorer": study.clip.name if args.clip not in (None, "tiny") else "tiny (hanokdiff/tiny/clip)",
        "kinds": study.kinds,
        "conditions": study.conditions,
        "questions": asked,
        "epochs_at": EPOCHS_AT,
        "photos": fingerprint(study.photos),
        "held_out": held_out,
        "base": base,
    }
    return {
        "format": 1,
        "settings": settings,
        "references": references(args, study, *captions),
        "cells": cells,
    }


def references(args, study: Context, replace: str, caption: str) -> dict:
    """What the scores of real, unseen photos of the subject are: the ceiling of likeness, and no copy. And how much
    the judge can be trusted: whether it names what they show, and prefers their own captions to each other's."""
    held = study.held
    same = held @ held.T  # (H, H)
    apart = same.sum(1).sub(same.diagonal()) / (len(held) - 1)
    near = {n: nearest(held, study.seen[:n]).double() for n in sorted(args.sizes)}
    kinds = presence(held, study.clip.texts(list(study.kinds.values())))
    conditions = presence(held, study.clip.texts(list(study.conditions.values())))
    captions = prepare_captions(study.held_out, args.token, replace, caption, say=lambda _: None)
    captions = [word_pattern(args.token).sub(lambda _: args.subject, text) for text in captions]
    fits = held @ study.clip.texts(captions).T  # (H, H): photo i with caption j
    return {
        "held_out": len(held),
        "ceiling": [round(v, 6) for v in mean_interval(apart)],
        "recognised": int((kinds == 0).sum()),
        "called_wanted": int((conditions == 0).sum()),
        "own_caption": preferred(fits, captions, 0),
        "shuffled_caption": preferred(fits, captions, 1),
        "nearest_95": {str(n): round(v.quantile(0.95).item(), 6) for n, v in near.items()},
        "closest_pair": round(max(v.max().item() for v in near.values()), 6),
    }


def preferred(fits: torch.Tensor, captions: list[str], shift: int) -> float | None:
    """How often the caption of photo i + shift fits photo i better than another caption does: 0.5 is chance."""
    n = len(captions)
    wins = [
        float(fits[i, (i + shift) % n] > fits[i, j])
        for i in range(n)
        for j in range(n)
        if captions[j] != captions[(i + shift) % n] and j not in (i, (i + shift) % n)
    ]
    return round(sum(wins) / len(wins), 6) if wins else None
