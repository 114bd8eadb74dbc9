"""DreamBooth: teach Stable Diffusion a subject with all its weights, and keep it from forgetting the rest.

    L = || eps - eps_theta(x_t, t, words with *) ||^2  +  w || eps' - eps_theta(x'_t', t', words of the class) ||^2
        over the photos                                   over pictures that the untouched model drew of the class
    Ruiz et al. 2022, arXiv:2208.12242, equation 2: the second term is prior preservation; UNet and text encoder learn

    python train_dreambooth.py                                          the embedded hanok, a minute on a laptop
    python train_dreambooth.py --model MODEL --data PHOTOS --token sks  your photos on a real checkpoint

Writes runs/dreambooth/model/ (a whole model in the diffusers layout), log.jsonl, previews/.
Then:  python sample.py "*, fire" "* in the fire" --model runs/dreambooth/model
Read next: hanokdiff/training/prior.py (the class pictures), hanokdiff/methods/losses.py (the loss),
hanokdiff/training/trainer.py (the chores).
"""

import contextlib
import shutil
import sys
from pathlib import Path

import torch

from hanokdiff.errors import report_errors
from hanokdiff.files import write_json
from hanokdiff.formats.folder import save_folder
from hanokdiff.formats.load import load_model
from hanokdiff.methods import textual_inversion
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.tiny import world
from hanokdiff.training import distributed, prior
from hanokdiff.training.args import (
    check_resolution,
    check_training,
    run_folder,
    trainer_options,
    training_parser,
)
from hanokdiff.training.dataset import LatentDataset, load_photos, prepare_captions
from hanokdiff.training.trainer import Trainer

# What the class pictures show is not forgotten: the tiny world's show campfires, smoke and floods too, but no fire.
DEFAULTS = {
    "tiny": dict(steps=300, batch_size=8, lr=1e-3, text_lr=1e-3, word_lr=2e-2, text_steps=None, class_images=64,
                 min_snr=5.0, save_every=100, preview_every=150),
    "sd": dict(steps=800, batch_size=4, lr=2e-6, text_lr=1e-6, word_lr=1e-4, text_steps=None, class_images=200,
               min_snr=0.0, save_every=400, preview_every=200),
}  # fmt: skip


def options():
    parser, method = training_parser(__doc__, DEFAULTS)
    method("--class-phrase", "what the subject is one of, in the class prompts (default: --replace's)")
    method("--class-images", "pictures of the class, drawn by the untouched model; 0 for none", type=int)
    method(
        "--class-prompts",
        "more prompts for class pictures, one a line: what must not be forgotten "
        "(default: none, tiny hanokdiff/tiny/class_prompts.txt)",
        type=Path,
    )
    method("--prior-weight", "w, the weight of the class's loss", type=float, default=1.0)
    method("--freeze-text", "only the UNet learns", action="store_true")
    method("--text-lr", "learning rate of the text encoder", type=float)
    method(
        "--word-lr",
        "learning rate of the pseudo word's own rows in the table of words; no other row moves",
        type=float,
    )
    method("--text-steps", "steps after which the text encoder stands still (default: never)", type=int)
    return parser


@report_errors
def main(argv=None):
    parser = options()
    given, args = parser.parse_args(argv), parser.parse(argv)
    args.class_phrase = args.class_phrase or args.replace
    asked = args.class_prompts or (world.CLASS_PROMPTS if args.model == "tiny" else None)
    check_training(args)
    if given.freeze_text and {given.text_lr, given.word_lr, given.text_steps} != {None}:
        raise ValueError(
            "--freeze-text leaves nothing to do for --text-lr, --word-lr and --text-steps; leave them out"
        )
    if args.class_prompts and not args.class_images:
        raise ValueError(
            "--class-prompts are for class pictures, but --class-images is 0; leave one of them out"
        )
    if args.class_prompts:
        prior.read_prompts(Path(args.class_prompts), args.token)  # refuses before the model is opened
    if args.class_images and not args.class_phrase.strip():
        raise ValueError('--class-phrase is empty; name what the subject is one of, such as "a house"')
    out = run_folder(args, "dreambooth", "model")

    # 1. The base model
    sd = load_model(
        args.model,
        args.device,
        args.dtype,
        tokenizer=args.tokenizer,
        prediction=args.prediction,
        masters=True,
    )
    sd.text.literal_tokens = args.literal_tokens
    sd.text.add_word(args.token)
    args.resolution = check_resolution(args.resolution, sd)

    # 2. What learns: everything, and of the table of words the pseudo word's own rows
    trainable, rates = {f"unet.{name}": p for name, p in sd.unet.named_parameters()}, {"unet": args.lr}
    if not args.freeze_text:
        trainable |= {
            f"text.{n}": p for n, p in sd.text.encoder.named_parameters() if "token_embedding" not in n
        }
        ids = sd.text.words[args.token]
        rows = textual_inversion.insert(sd, args.token, textual_inversion.token_embedding(sd)[ids])
        trainable, rates = (
            trainable | {"word": rows.rows},
            rates | {"text": args.text_lr, "word": args.word_lr},
        )
    for p in trainable.values():
        p.requires_grad_(True)
    print(
        f"learns: {'UNet' if args.freeze_text else 'UNet and text encoder'}, "
        f"{sum(p.numel() for p in trainable.values()):,} numbers"
    )

    # 3. The data, the class's half drawn by the model that has not learnt yet
    photos, validation_photos = load_photos(
        args.data or world.photos, args.resolution, args.images, args.held_out
    )
    args.images = len(photos)
    captions = prepare_captions(photos, args.token, args.replace, args.caption)
    dataset = LatentDataset(sd.vae, [p.image for p in photos], captions, args.flip, sd.device)
    if args.class_images:
        if not (
            given.class_phrase or any(args.class_phrase in (p.caption or "") for p in photos) or args.resume
        ):
            raise ValueError(
                f'no caption contains "{args.class_phrase}", so what the subject is one of is not known; '
                'name it: --class-phrase "a house"'
            )
        words = prior.prompts(captions, args.token, args.class_phrase, asked)
        drawn, words, seconds = prior.pictures(sd, words, args.class_images, args.resolution, args.seed)
        class_dataset = LatentDataset(sd.vae, drawn, words, args.flip, sd.device)
    else:
        class_dataset, words, seconds = None, [], 0.0
    if args.freeze_text:
        sd.text.cache_prompts([*captions, *words])  # a frozen encoder says the same every time

    # 4. The run
    def save(path):
        dtype = torch.float32 if sd.dtype == torch.float32 else torch.float16
        aside = path.with_name(path.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)  # what a kill has left of it
        with (
            contextlib.nullcontext()
            if args.freeze_text
            else textual_inversion.folded_into_table(sd, rows, ids)
        ):
            save_folder(aside, sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule, dtype)
        write_json(aside / "hanokdiff.json", {"token": args.token})
        shutil.rmtree(path, ignore_errors=True)  # of the same step, before a run was resumed
        aside.rename(path)

    def preview():
        return sd.preview(args.token, args.resolution)

    chores = trainer_options(args, sd, dataset, validation_photos) | {"lr": rates}
    chores["config"]["class_pictures"] = (
        class_dataset and class_dataset.hash
    )  # to notice, on resume, that one was edited
    trainer = Trainer(out, trainable, artefact="model", save=save, preview=preview, **chores)
    if distributed.RANK == 0 and not (out / "class.json").exists():  # a resumed run has drawn nothing itself
        write_json(out / "class.json", {"pictures": args.class_images, "seconds": round(seconds, 3)})

    # 5. The method
    for batch in trainer:  # one micro-batch; goes on where a resumed run stopped
        x0, prompts = dataset[batch]  # (B, 4, h, w), [B]: photos of the subject
        if class_dataset:  # and as many pictures of the class behind them, in one forward pass
            class_x0, class_prompts = class_dataset[batch.subset("class")]
            x0, prompts, batch = torch.cat([x0, class_x0]), prompts + class_prompts, batch.subset("", "class")
        noise = batch.normal(x0.shape)  # (2B, 4, h, w)
        t = batch.timesteps(sd.schedule.num_train_timesteps)  # (2B,)
        x_t = sd.schedule.add_noise(x0, noise, t)
        with torch.set_grad_enabled(args.text_steps is None or batch.step < args.text_steps):
            context = sd.text(prompts)  # (2B, 77, D)
        pred = sd.unet(x_t, t, context)  # (2B, 4, h, w)
        loss = mse(pred, sd.schedule.target(x0, noise, t)) * min_snr_weight(
            sd.schedule, t, args.min_snr
        )  # (2B,)
        own, class_loss = loss.chunk(2) if class_dataset else (loss, loss.new_zeros(1))
        trainer.backward(own.mean() + args.prior_weight * class_loss.mean())


if __name__ == "__main__":
    sys.exit(main())
