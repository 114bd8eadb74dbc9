"""What the four training scripts' command lines share: common options, two columns of defaults, checks."""

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hanokdiff import lock
from hanokdiff.errors import check_file, check_folder
from hanokdiff.files import free_folder, read_json
from hanokdiff.models import memory
from hanokdiff.models.pipeline import LARGEST_SIDE, latent_size
from hanokdiff.models.tokens import MAX_TOKENS, MOST_VECTORS
from hanokdiff.options import Options, Replace
from hanokdiff.training import distributed, page, state
from hanokdiff.training.dataset import LatentDataset, Photo, load_photos, photo_files, prepare_captions
from hanokdiff.training.prior import number_or_folder
from hanokdiff.training.validation import validation_loss


class Parser(Options):
    """Options whose defaults come in two columns: for the embedded tiny world, and for Stable Diffusion."""

    def __init__(self, doc: str, defaults: dict[str, dict]):
        super().__init__(description=doc)
        self.columns = defaults

    def option(self, group, name: str, help: str, **kwargs) -> None:
        key = name.lstrip("-").replace("-", "_")
        if "(default" in help:  # in the text already
            pass
        elif key in self.columns["tiny"]:
            tiny, sd = (default_text(self.columns[column][key]) for column in ("tiny", "sd"))
            help += f" (default: {tiny})" if tiny == sd else f" (default: tiny {tiny}, SD {sd})"
        elif kwargs.get("default") is not None and kwargs["default"] is not False:
            help += f" (default: {kwargs['default']})"
        group.add_argument(name, help=help, **kwargs)

    def parse(self, argv=None) -> argparse.Namespace:
        """The options, with the model's column filled in; with --resume, those of the run's start."""
        args = self.parse_args(argv)
        if args.force and args.resume is None:
            raise ValueError("--force is for other options on --resume; a new run takes any: leave it out")
        if args.resume is not None:
            file = args.resume / "config.json"
            if not file.is_file():
                raise ValueError(f"--resume {args.resume}: no run was started there (it has no config.json)")
            config = read_json(file)
            known = {k: v for k, v in config.items() if hasattr(args, k) and k not in ("resume", "device")}
            self.check_types(known, file)
            given = self.given(argv)
            if "out" in given:
                raise ValueError(f"--resume goes on in its own folder, {args.resume}; leave out --out")
            changed = state.differences(config, plain(given))
            if changed and not args.force:
                parts = [text.partition(" ") for text in changed]
                options = ", ".join(f"--{name.replace('_', '-')} ({how})" for name, _, how in parts)
                own = "--resume goes on with the run's own options"
                raise ValueError(f"{own}; leave out {options}, or accept that with --force")
            args = argparse.Namespace(**{**vars(args), **known, **given, "out": args.resume})
        for key, value in self.columns["tiny" if args.model == "tiny" else "sd"].items():
            if getattr(args, key) is None:
                setattr(args, key, value[args.train] if isinstance(value, dict) else value)
        return args

    def given(self, argv) -> dict:
        """The options that are on the command line, whatever their defaults."""
        unset = object()
        args = self.parse_args(argv, argparse.Namespace(**{a.dest: unset for a in self._actions}))
        given = {k: v for k, v in vars(args).items() if v is not unset}
        return {k: v for k, v in given.items() if k not in ("resume", "force", "device")}

    def check_types(self, known: dict, file: Path) -> None:
        """Refuse options from a file that are not of the types that the command line would have given."""
        kinds = {float: (int, float), Path: str, None: str, number_or_folder: (int, str)}
        for a in (a for a in self._actions if a.dest in known and (known[a.dest], a.default) != (None, None)):
            kind = bool if a.nargs == 0 else kinds.get(a.type, a.type)
            values = known[a.dest] if isinstance(a.nargs, str) else [known[a.dest]]
            good = isinstance(values, list) and all(
                isinstance(v, kind) and isinstance(v, bool) == (kind is bool) for v in values
            )
            if not good or (a.choices and not set(values) <= set(a.choices)):
                option, value = a.dest.replace("_", "-"), str(known[a.dest])[:60]
                raise ValueError(f"{file}: --{option} is {value}, which cannot be; start a new run")


def plain(options: dict) -> dict:
    """Options as they go into config.json: paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def default_text(value) -> str:
    """A default in --help: of a list its items, of a table by --train all its lines."""
    if isinstance(value, dict):
        return ", ".join(f"{v} for {k}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def training_parser(doc: str, defaults: dict[str, dict]) -> tuple[Parser, Callable]:
    """A parser with the options that all four methods have; returns it and a function that adds one more."""
    p = Parser(doc, defaults)

    def group(title: str) -> Callable:
        return functools.partial(p.option, p.add_argument_group(title))

    data, train, out = group("model and data"), group("training"), group("output")
    flag = dict(action="store_true")
    data("--model", '"tiny", a folder, a .safetensors or .ckpt file or a hub id', default="tiny")
    data("--tokenizer", "of a single-file model: a folder or hub id")
    data("--vae", "another autoencoder than the model's: a folder or file", metavar="PATH")
    data("--prediction", "if the model is silent or wrong about it", choices=("epsilon", "v_prediction"))
    data("--data", "photos, captions beside as NAME.txt (default with tiny: the drawn hanok)", type=Path)
    data("--images", "the first N photos of one fixed, nested order", type=int)
    sets = "0, 1, 2, ...: other drawn hanok, or --data's photos in another order"
    data("--photo-set", sets, type=int, default=0)
    data("--token", "the pseudo word", default="*")
    phrase = dict(default="a building with a roof", nargs=2, metavar=("PHRASE", "[WORD]"))
    becomes = "becomes the pseudo word, --token or WORD, in captions, any case"
    data("--replace", becomes, action=Replace, **phrase)
    data("--caption", "of photos without one; {name} is the file's name", default="a photo of {token}")
    data("--held-out", "do not train on the last N photos, but log their loss", type=int, default=0)
    data("--literal-tokens", "leave the pseudo word to the tokenizer, which fuses *,", **flag)
    data("--resolution", "side in pixels (default: the model's own)", type=int)
    data("--square", "crop all photos to squares, instead of sizes near their shapes", **flag)
    data("--flip", "mirror every other photo", **flag, default=False)
    train("--steps", "optimiser steps", type=int)
    train("--batch-size", "photos a step", type=int)
    train("--micro-batch", "photos at once; gradients add up (default: all)", type=int, default=0)
    train("--lr", "learning rate", type=float)
    chunks = "of a caption; beyond 75 in chunks, as in sampling"
    train("--max-tokens", chunks, type=int, default=75, choices=MAX_TOKENS)
    train("--clip-skip", "2 leaves the text encoder's last layer out", type=int, default=1)
    offset = "adds so much noise of one value per channel, such as 0.05"
    train("--noise-offset", offset, type=float, default=0.0)
    train("--zero-terminal-snr", "a schedule that ends in noise alone (v prediction)", **flag)
    train("--min-snr", "gamma of the min-SNR weight, 0 for none", type=float)
    train("--seed", "seed of everything random", type=int, default=0)
    train("--device", "cuda, cpu, ... (default: the first GPU, else the CPU)")
    train("--dtype", "precision of what is frozen: auto, fp32, bf16 or fp16", default="auto")
    train("--checkpointing", "run blocks again in the backward pass: slower, less memory", **flag)
    train("--deterministic", "on a GPU the same bits each time, slower; a CPU gives them anyway", **flag)
    train("--compile", "torch.compile of each block: minutes at the start", **flag)
    out("--out", "folder of the run (default: runs/METHOD, numbered if taken)", type=Path)
    out("--save-every", "steps between saved states and files, 0 for none", type=int)
    out("--preview-every", "steps between preview pictures, 0 for none", type=int)
    out("--resume", "go on with the run in this folder", type=Path, metavar="FOLDER")
    out("--force", "with --resume: accept other options and changed photos, and print which", **flag)
    return p, group("the method")


POSITIVE = ("steps", "batch_size", "lr", "rank", "alpha", "text_lr", "word_lr")
NOT_NEGATIVE = (
    "held_out", "save_every", "preview_every", "micro_batch", "min_snr", "text_rank", "class_images",
    "prior_weight", "text_steps", "vectors", "photo_set",
)  # fmt: skip
MOST = {  # a slip of the finger; ranks: the widest layer's width
    "steps": 10_000_000, "batch_size": 4096, "rank": 1280, "text_rank": 1280, "vectors": MOST_VECTORS,
    "class_images": 100_000, "resolution": LARGEST_SIDE,
}  # fmt: skip


def check_training(args) -> None:
    """Refuse what makes no sense, before anything is loaded or written."""
    numbers = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
    for key, value in numbers.items():
        limits = {
            "a finite number": math.isfinite(value),
            "greater than 0": value > 0 or key not in POSITIVE,
            "0 or more": value >= 0 or key not in NOT_NEGATIVE,
            f"at most {MOST.get(key)}": value <= MOST.get(key, value),
        }
        if broken := [limit for limit, kept in limits.items() if not kept]:
            raise ValueError(f"--{key.replace('_', '-')} is {value}, but must be {broken[0]}")
    if args.micro_batch > args.batch_size:
        less = f"--micro-batch is {args.micro_batch}, but --batch-size only {args.batch_size}"
        raise ValueError(f"{less}; lower it, or leave it out to take the whole batch at once")
    if getattr(args, "init", None) and Path(args.init).is_file():
        file = f"--init {args.init} is a file"
        raise ValueError(f"{file}, but must be words; to go on from a file: --from {args.init}")
    if not 0 <= getattr(args, "seed", 0) < 2**32:  # class pictures: torch's generator takes 32 bits
        raise ValueError(f"--seed is {args.seed}, but must be between 0 and {2**32 - 1}")
    if getattr(args, "dtype", None) == "fp16":  # measured: 43 % of LoRA's gradients are zero
        why = "in training many gradients are too small for it and become 0"
        raise ValueError(f"--dtype fp16 is for drawing: {why}; take bf16, which has fp32's range, or fp32")
    if getattr(args, "deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first asked
        torch.use_deterministic_algorithms(True)
    distributed.shard(args.batch_size)  # refuses fewer photos than processes
    if not args.token.strip():
        raise ValueError('--token is empty; name the pseudo word, such as "*" or "sks"')
    if args.model != "tiny" and args.data is None:
        drawn = "the drawn hanok are 64x64, for the tiny model"
        raise ValueError(f"--model {args.model} needs --data FOLDER: {drawn}")
    if args.data is not None:
        photo_files(Path(args.data))  # no folder of photos is refused before a model is opened


def model_options(args: argparse.Namespace) -> dict:
    """What load_model takes of a training's options besides model, device and dtype."""
    names = ("tokenizer", "prediction", "vae", "zero_terminal_snr")
    return {name: getattr(args, name) for name in names} | {"training": True}


def word_options(method) -> None:
    """Options of a pseudo word whose own vectors are trained beside the rest (pivotal tuning)."""
    method("--vectors", "also train the word's own vectors, this many (pivotal tuning); 0: none", type=int)
    method("--init", "words that the vectors start as (default: --replace's)")
    method("--word-lr", "learning rate of the vectors", type=float)


def from_file(args: argparse.Namespace, given: dict, decided: tuple[str, ...]) -> Path | None:
    """--from FILE: the file to go on from. What it decides itself may not be given as well."""
    if vars(args)["from"] is None:
        return None
    file = Path(vars(args)["from"])
    if wrong := [f"--{key.replace('_', '-')}" for key in decided if key in given and not args.resume]:
        raise ValueError(f"--from {file} brings its own; leave out {', '.join(wrong)}")
    check_file(file, f"--from {file}")
    return file


def token_from(args: argparse.Namespace, given: dict, word: str | None, words: Iterable[str] = ()) -> str:
    """The pseudo word of a run with --from: --token, else the file's; a resumed run keeps its own. `words`
    have their vectors in the file."""
    if args.resume:
        return args.token
    token = args.token if "token" in given else next(iter(words), None) or word or args.token
    if token in words and "vectors" in given:
        raise ValueError(f'--from {vars(args)["from"]} brings vectors for "{token}"; leave out --vectors')
    return token


def run_folder(args: argparse.Namespace, method: str, artefact: str) -> Path:
    """The folder to resume in; else the named one if nothing ran there, else a new one, runs/METHOD-N."""
    out, args.method = args.resume or args.out, method
    if args.resume:
        before = read_json(out / "config.json").get("method", method)
        if before != method:
            raise ValueError(f"{out} is a run of train_{before}.py; go on with that")
        if (out / artefact).exists():  # it is written last, and takes its name when it is whole
            if distributed.RANK == 0:  # a kill right after that has left these
                lock.take(out)
                state.delete_states(out)
                lock.release(out)
            raise ValueError(f"{out} holds a finished run ({artefact}): there is nothing to resume")
        if distributed.RANK == 0:
            lock.take(out)
        return out
    if out is None:
        out = free_folder(Path("runs") / method)
    if (out / artefact).exists():
        raise ValueError(f"{out} holds a finished run ({artefact}); name another --out")
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds an unfinished run; go on with --resume {out}, or name another --out")
    check_folder(out)
    if out.exists() and (held := sorted(p.name for p in out.iterdir())):
        full = f"--out {out} is not empty (it holds {held[0]})"
        raise ValueError(f"{full}; name a new folder, for the run alone")
    distributed.barrier()  # all have looked before one makes it
    return out


def load_data(args, sd, draw: Callable) -> tuple[list[Photo], LatentDataset, list[Photo]]:
    """The photos to train on (without --data, `draw` draws them), the same encoded with their prompts, and
    the held-out photos."""
    step = None if args.square else sd.vae.config.factor * 2 ** (len(sd.unet.config.block_out_channels) - 1)
    how = dict(photo_set=args.photo_set, step=step)
    photos, held_out = load_photos(args.data or draw, args.resolution, args.images, args.held_out, **how)
    args.images = len(photos)
    prompts = prepare_captions(photos, args.token, args.replace, args.caption)
    return photos, LatentDataset(sd.vae, [p.image for p in photos], prompts, args.flip, sd.device), held_out


def count(trainable: dict) -> str:
    return f"{sum(p.numel() for p in trainable.values()):,} parameters"


def trainer_options(args, sd, dataset: LatentDataset, held_out: list[Photo], class_dataset=None) -> dict:
    """The Trainer's arguments that are the same for every method. Called last before it: --compile and
    --checkpointing take the model as it is then."""
    if args.compile:
        print("--compile: each block is compiled at its first step, which takes minutes")
        memory.compile(sd.unet)
    if args.checkpointing:
        memory.checkpoint(sd.unet)
    validate = None
    if held_out:
        how = (args.token, args.replace, args.caption, lambda _: None)
        validate = by_size(sd, [p.image for p in held_out], prepare_captions(held_out, *how))
    # what a resumed run is compared with
    config = {k: v for k, v in plain(vars(args)).items() if k not in ("resume", "force", "out")}
    config |= {"photos": dataset.hash, "held_out_photos": [p.name for p in held_out]}
    config |= {"class_pictures": class_dataset and class_dataset.hash, "base": sd.digest}
    photos = page.sheet(dataset.shown) if dataset.shown else None
    size = dataset.sizes[dataset.groups.index(max(dataset.groups, key=len))]  # of most photos
    names = ("steps", "batch_size", "micro_batch", "lr", "seed", "save_every", "preview_every", "force")
    return {
        **{name: getattr(args, name) for name in names},
        "config": config,
        "resume": args.resume is not None,
        "validate": validate,
        "page": lambda out, artefact: page.write(out, artefact, photos, dataset.prompts),
        "preview": lambda: sd.preview(args.token, size),
    }


def by_size(sd, images: list, captions: list[str]) -> Callable[[], float]:
    """The loss of held-out photos, those of each size by themselves."""
    parts = []
    for size in sorted({image.size for image in images}):
        chosen = [i for i, image in enumerate(images) if image.size == size]
        own = [images[i] for i in chosen], [captions[i] for i in chosen]
        parts.append(LatentDataset(sd.vae, *own, device=sd.device))
    return lambda: sum(validation_loss(sd, part) * len(part) for part in parts) / len(images)


def fit_to_model(args: argparse.Namespace, sd) -> None:
    """The options that concern the model as it was opened: how it reads texts, and --resolution."""
    sd.text.skip(args.clip_skip)
    sd.text.literal_tokens, sd.text.max_tokens = args.literal_tokens, args.max_tokens
    args.resolution = check_resolution(args.resolution, sd)


def check_resolution(resolution: int | None, sd) -> int:
    """The side in pixels to train at: the named one if the model can take it, else the model's own."""
    if resolution is not None:
        latent_size((resolution, resolution), sd.vae.config.factor)
    return resolution or sd.resolution
