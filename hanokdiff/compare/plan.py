"""What a comparison will do, before it does it: the photos, the questions, and a cell for each training.

    manifest = plan(args, prepare(args))

A cell's folder, its pictures and its scores carry a hash of all that they depend on (photos, weights, every
option): what is there is right, and what has changed gets a new name. Two recipes that amount to the same
training share it. Read next: hanokdiff/compare/recipes.py (what is compared), run.py (how a cell is done).

Shapes:  P photos to learn from, H held out, d the width of CLIP's common space.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import shlex
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path

from torch import Tensor

from hanokdiff.compare import recipes
from hanokdiff.compare.questions import CONDITIONS, KINDS, choices, questions
from hanokdiff.formats.load import load_model
from hanokdiff.models import samplers
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.tokens import word_pattern
from hanokdiff.scoring.clip import TINY_CLIP, Clip, nearest, presence
from hanokdiff.scoring.stats import mean_interval
from hanokdiff.tiny import world
from hanokdiff.training.args import check_resolution, check_training
from hanokdiff.training.dataset import Photo, load_photos, photo_files, prepare_captions

METHODS = {  # and the file or folder that each leaves
    "ti": "embedding.safetensors",
    "dreambooth": "model",
    "lora": "lora.safetensors",
    "hypernet": "hypernet.pt",
}
SCRIPTS = Path(__file__).resolve().parents[2]  # where train_ti.py and its three siblings are
DESCRIPTIONS = {
    "literal": None,
    "hanok": "hanok",
    "described": "a Korean traditional house",
}  # None: the token
RESERVED = (
    "--model --data --images --held-out --photo-set --resolution --token --seed --device --out --resume"
)
STRENGTHS = ("lora", "hypernet")  # methods whose file can be applied by halves
HELD_OUT, LEAST_HELD_OUT = 30, 2  # photos that no method sees
QUICK = 0.75  # of a recipe's steps under --quick
EPOCHS_AT = 50  # photos: there, --budget epochs gives each method its own number of steps


@dataclass
class Context:
    """What all cells share: the base model, CLIP, the photos, the texts that a picture may be recognised
    as."""

    token: str
    sd: StableDiffusion
    resolution: int  # of photos and pictures
    clip: Clip
    source: object  # of the photos: a folder, or the function that draws them
    most: int  # photos to learn from
    held_out: list[Photo]  # that no method sees, the same for all sets
    held_out_embeddings: Tensor  # (H, d)
    kinds: dict[str, str]  # label -> text; the first is what is wanted
    conditions: dict[str, str]
    sets: dict[int, tuple[list[Photo], Tensor]] = field(default_factory=dict)

    def photos(self, number: int) -> tuple[list[Photo], Tensor]:
        """The photos of a set in their nested order, and their embeddings (P, d)."""
        if number not in self.sets:
            how = dict(log=lambda _: None, photo_set=number)
            photos, _ = load_photos(self.source, self.resolution, self.most, len(self.held_out), **how)
            self.sets[number] = photos, self.clip.images(p.image for p in photos)
        return self.sets[number]

    @cache  # noqa: B019 - there is one context a process
    def copy_level(self, number: int, photos: int) -> float:
        """The cosine with the nearest of these photos that 95 % of the held-out ones stay below: above it, a
        copy is suspected."""
        near = nearest(self.held_out_embeddings, self.photos(number)[1][:photos]).double()
        return round(near.quantile(0.95).item(), 6)

    def __hash__(self):
        return id(self)


def prepare(args) -> Context:
    """Open the model, CLIP and the photos."""
    tiny_clip, most = args.clip in (None, "tiny"), max(args.sizes)
    kinds = choices(args.kinds, KINDS, {"hanok": "", **world.kind_prompts()} if tiny_clip else None)
    tiny_conditions = {"fire": "", **world.condition_prompts()} if tiny_clip else None
    conditions = choices(args.conditions, CONDITIONS, tiny_conditions)
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
    source = args.data or world.photos
    _, aside = load_photos(source, resolution, most, held_out, log=lambda _: None)
    clip = Clip(TINY_CLIP if tiny_clip else args.clip, args.device or "cpu")
    embeddings = clip.images(p.image for p in aside)
    how = (source, most, aside, embeddings, kinds, conditions)
    return Context(args.token, sd, resolution, clip, *how)


# -------------------------------------------------------------------------------------------- one training


@cache
def script(method: str):
    """train_METHOD.py as a module, for its options and defaults."""
    path = SCRIPTS / f"train_{method}.py"
    if not path.is_file():
        raise ValueError(f"{path} is missing; run hanokdiff.compare from a whole copy of the repository")
    spec = importlib.util.spec_from_file_location(f"compare_train_{method}", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def training(args, words: str, photos: int, held_out: int, seed: int) -> tuple[list[str], dict]:
    """The command line of one training, and every option that it amounts to, defaults included. words: a
    recipe's METHOD OPTIONS."""
    tiny, (method, *options) = args.model == "tiny", shlex.split(words)
    own = parsed_options(method, options, words)
    steps = own["steps"] or script(method).DEFAULTS["tiny" if tiny else "sd"]["steps"]
    steps = args.steps or max(1, round(QUICK * steps) if args.quick else steps)
    steps = max(1, round(steps * photos / EPOCHS_AT)) if args.budget == "epochs" else steps
    saves = [step_at(at, steps) for at in args.at if at < 1]
    model = str(Path(args.model).resolve()) if Path(args.model).exists() and not tiny else args.model
    argv = ["--model", model, "--images", photos, "--held-out", held_out, "--token", args.token]
    argv += ["--photo-set", 0 if args.same_photos else seed, "--seed", seed]
    argv += ["--data", args.data.resolve()] if args.data else []
    argv += ["--device", args.device] if args.device else []
    argv += ["--resolution", args.resolution] if args.resolution else []
    argv += ["--preview-every", 0, *options, "--steps", steps]
    argv += ["--save-every", reduce(math.gcd, saves)] if saves else []
    argv = [str(a) for a in argv]
    parsed = vars(script(method).options().parse(argv))
    known = {k: v for k, v in parsed.items() if v is not None}  # without --alpha, which follows the rank
    check_training(argparse.Namespace(**{"data": None, **known}))
    elsewhere = ("model", "data", "device", "out", "resume")  # no part of the result, or hashed by content
    return argv, {k: v for k, v in parsed.items() if k not in elsewhere}


def step_at(at: float, steps: int) -> int:
    """The step that --at means, to a twentieth of them: a training saves at all multiples of what these steps
    have in common, which for 88 and 175 of 350 would be every step."""
    unit = max(1, steps // 20)
    return max(unit, round(at * steps / unit) * unit)


def parsed_options(method: str, options: list[str], words: str) -> dict:
    """A recipe's own options, refused where the comparison sets them itself."""
    try:
        parsed = vars(script(method).options().parse_args(options))
    except ValueError as e:
        raise ValueError(f'--recipe "{words}": {e}') from None
    names = {word.split("=")[0] for word in options}
    if wrong := [option for option in RESERVED.split() if option in names]:
        raise ValueError(
            f'--recipe "{words}" may not set {wrong[0]}, which the comparison sets for every cell'
        )
    return parsed


# ------------------------------------------------------------------------------------------------ the plan


def key(*parts) -> str:
    """A short name for everything that a result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def fingerprint(photos: list[Photo]) -> str:
    digest = hashlib.sha256()
    for p in photos:
        digest.update(p.image.tobytes() + (p.caption or "").encode())
    return digest.hexdigest()[:16]


def plan(args, context: Context) -> dict:
    """The manifest: every cell with the names of its folders, which tell whether it is done."""
    sd, clip = context.sd, context.clip
    sd.text.add_word(args.token)
    names = ("model", "sizes", "seeds", "same_photos", "token", "budget", "n", "quick", "subject", "context")
    settings = {k: getattr(args, k) for k in names} | {
        "recipes": args.recipes,
        "trained_at": args.trained_at,
        "at": args.at,
        "strengths": args.strengths,
        "families": {
            name: [vars(test) for test in tests]
            for name, tests in recipes.families(args.trained_at, args.sizes).items()
        },
        "data": str(args.data or "the drawn hanok of the tiny world"),
        "drawing": {
            "sampler": samplers.DEFAULT,
            "steps": args.sampling_steps,
            "cfg": sd.cfg,
            "size": context.resolution,
            "dtype": str(sd.dtype).removeprefix("torch."),
        },
        "scorer": clip.name if args.clip not in (None, "tiny") else "tiny (hanokdiff/tiny/clip)",
        "kinds": context.kinds,
        "conditions": context.conditions,
        "questions": questions(args, sd, clip, context.conditions),
        "epochs_at": EPOCHS_AT,
        "held_out": fingerprint(context.held_out),
        "base": sd.digest,
    }
    first = args.seeds[0]
    cells = [
        cell(args, context, settings, f"untouched, {name}", "", 0, first, words or args.token)
        for name, words in DESCRIPTIONS.items()
    ]
    cells += [
        cell(args, context, settings, name, words, photos, seed, args.token, at, strength)
        for seed in args.seeds
        for name, words in args.recipes.items()
        for photos in args.trained_at[name]
        for at in args.at
        for strength in (args.strengths if shlex.split(words)[0] in STRENGTHS else [1.0])
    ]
    _, trained = training(
        args, next(iter(args.recipes.values())), min(args.sizes), len(context.held_out), first
    )
    checks = references(args, context, trained["replace"], trained["caption"])
    return {"format": 2, "settings": settings, "references": checks, "cells": cells}


def cell(
    args, context: Context, settings: dict, recipe, words, photos, seed, ask, at=1.0, strength=1.0
) -> dict:
    """One point of a training (a step of it, drawn at a strength), or the untouched model (no words) asked in
    `ask` in place of the pseudo word."""
    argv, about, method = [], {}, words.split()[0] if words else "untouched"
    if words:
        argv, about = training(args, words, photos, len(context.held_out), seed)
    prompts = [
        {**q, "prompt": word_pattern(args.token).sub(lambda _: ask, q["prompt"])}
        for q in settings["questions"]
        if words or not (q["literal_tokens"] or q["development"])
    ]
    held_out, inputs = settings["held_out"], ("key", "prompt", "literal_tokens", "noise")
    seen = context.photos(0 if args.same_photos else seed)[0][:photos] if words else []
    trained = key(about, settings["base"], fingerprint(seen), held_out)
    point = [at, strength] if (at, strength) != (1, 1) else []
    drawn = key(trained, settings["drawing"], seed, [[q[k] for k in inputs] for q in prompts], *point)
    scored = key(drawn, [q["n"] for q in prompts], scorer(context), held_out, settings["questions"])
    name = f"{recipe}, {photos} photos, set {seed}" if words else recipe
    return {
        "name": name
        + (f", at {at:g}" if at < 1 else "")
        + (f", strength {strength:g}" if strength != 1 else ""),
        "recipe": recipe,
        "method": method,
        "photos": photos,
        "seed": seed,
        "photo_set": 0 if args.same_photos else seed,
        "at": at,
        "strength": strength,
        "ask": ask,
        "steps": about.get("steps", 0),
        "batch_size": about.get("batch_size", 0),
        "class_images": about.get("class_images", 0),
        "prompts": prompts,
        "folder": f"cells/{method}-{photos}-{seed}-{trained}",
        "pictures": f"pictures-{drawn}",
        "scores": f"scores-{scored}.json",
        "options": argv,
    }


def scorer(context: Context) -> list:
    weights = context.clip.model.visual_projection.weight.cpu().numpy().tobytes()
    digest = hashlib.sha256(weights).hexdigest()[:16]
    return [Path(context.clip.name).name, digest, context.kinds, context.conditions]


def references(args, context: Context, replace: str, caption: str) -> dict:
    """Scores of real, unseen photos of the subject: the ceiling of likeness, which is no copy. And how far
    CLIP can be trusted: whether it recognises what they show, and prefers their own captions to each
    other's."""
    clip, embeddings = context.clip, context.held_out_embeddings
    cosines = embeddings @ embeddings.T  # (H, H)
    to_others = cosines.sum(1).sub(cosines.diagonal()) / (len(embeddings) - 1)
    first = 0 if args.same_photos else args.seeds[0]
    near = nearest(embeddings, context.photos(first)[1])
    kinds = presence(embeddings, clip.texts(list(context.kinds.values())))
    conditions = presence(embeddings, clip.texts(list(context.conditions.values())))
    captions = prepare_captions(context.held_out, args.token, replace, caption, log=lambda _: None)
    captions = [word_pattern(args.token).sub(lambda _: args.subject, text) for text in captions]
    fits = embeddings @ clip.texts(captions).T  # (H, H): photo i with caption j
    return {
        "held_out": len(embeddings),
        "ceiling": [round(v, 6) for v in mean_interval(to_others)],
        "recognised": int((kinds == 0).sum()),
        "called_wanted": int((conditions == 0).sum()),
        "own_caption": preferred(fits, captions, 0),
        "shuffled_caption": preferred(fits, captions, 1),
        "copy_levels": {str(n): context.copy_level(first, n) for n in sorted(args.sizes)},
        "closest_pair": round(near.max().item(), 6),
    }


def preferred(fits: Tensor, captions: list[str], shift: int) -> float | None:
    """How often the caption of photo i + shift fits photo i better than another caption does: 0.5 is
    chance."""
    n, wins = len(captions), []
    for i in range(n):
        chosen = (i + shift) % n
        others = [j for j in range(n) if captions[j] != captions[chosen] and j not in (i, chosen)]
        wins += [float(fits[i, chosen] > fits[i, j]) for j in others]
    return round(sum(wins) / len(wins), 6) if wins else None
