"""Textual inversion: teach Stable Diffusion a subject by a new word alone.

    v* = argmin_v  E || eps - eps_theta(x_t, t, words(v)) ||^2       Gal et al. 2022, arXiv:2208.01618, equation 2
    nothing in the model changes: only v, n vectors as wide as a word, learns

    python train_ti.py                                            the embedded hanok, half a minute on a laptop
    python train_ti.py --model MODEL --data PHOTOS --init house   your photos on a real checkpoint

Writes runs/ti/embedding.safetensors (for diffusers, which wants another word than "*": load_textual_inversion(FILE,
token="<hanok>"); python -m hanokdiff.convert makes the WebUI's .pt of it), log.jsonl, previews/.
Then:  python sample.py "*, fire" "* in the fire" --embedding runs/ti/embedding.safetensors
Read next: hanokdiff/methods/textual_inversion.py (the rows beyond the vocabulary), hanokdiff/models/tokens.py (how a
prompt finds them).
"""

import sys

from hanokdiff.errors import report_errors
from hanokdiff.formats import embedding_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import textual_inversion
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.tiny import world
from hanokdiff.training.args import (
    check_resolution,
    check_training,
    run_folder,
    trainer_options,
    training_parser,
)
from hanokdiff.training.dataset import LatentDataset, load_photos, prepare_captions
from hanokdiff.training.trainer import Trainer

DEFAULTS = {
    "tiny": dict(steps=300, batch_size=8, lr=1e-2, vectors=8, min_snr=5.0, save_every=100, preview_every=150,
                 init="a wide house with a grey curved roof and white walls"),
    "sd": dict(steps=3000, batch_size=4, lr=5e-3, vectors=1, init="building", min_snr=0.0, save_every=500,
               preview_every=500),
}  # fmt: skip
# A word seen in one sentence only does not learn to stand in others. (The tiny world has no word for "photo".)
TEMPLATES = {
    "tiny": ("{}", "a picture of {}"),
    "sd": (
        "{}",
        "a photo of {}",
        "a picture of {}",
        "a good photo of {}",
        "a rendering of {}",
        "a close-up of {}",
    ),
}


def options():
    parser, method = training_parser(__doc__, DEFAULTS)
    method("--vectors", "how many vectors the word is made of", type=int)
    method("--init", "words that name the kind of thing; the vectors start as theirs")
    method(
        "--hold-norm", "keep the vectors' length: one that grows drowns the other words", action="store_true"
    )
    return parser


@report_errors
def main(argv=None):
    args = options().parse(argv)
    check_training(args)
    out = run_folder(args, "ti", "embedding.safetensors")

    # 1. The base model, frozen
    sd = load_model(args.model, args.device, args.dtype, tokenizer=args.tokenizer, prediction=args.prediction)
    sd.text.literal_tokens = args.literal_tokens
    args.resolution = check_resolution(args.resolution, sd)

    # 2. What learns
    rows = textual_inversion.insert(
        sd, args.token, textual_inversion.initial_vectors(sd, args.init, args.vectors)
    )
    rows.hold_norm = args.hold_norm
    print(
        f'learns: {args.vectors} vector{"s" * (args.vectors > 1)} of "{args.init}", {rows.rows.numel():,} numbers'
    )

    # 3. The data
    photos, validation_photos = load_photos(
        args.data or world.photos, args.resolution, args.images, args.held_out
    )
    args.images = len(photos)
    captions = prepare_captions(photos, args.token, args.replace, args.caption)
    dataset = LatentDataset(sd.vae, [p.image for p in photos], captions, args.flip, sd.device)
    templates = TEMPLATES["tiny" if args.model == "tiny" else "sd"]

    # 4. The run
    def save(path):
        embedding_file.save_file(path, args.token, rows.vectors(), {"step": trainer.step, "model": sd.name})

    def preview():
        return sd.preview(args.token, args.resolution)

    usual = textual_inversion.token_embedding(sd).float().norm(dim=1).mean().item()
    trainer = Trainer(
        out,
        {"rows": rows.rows},
        artefact="embedding.safetensors",
        save=save,
        preview=preview,
        weight_decay=0.0,
        metrics=lambda: {"norm": rows.vectors().norm(dim=1).mean().item() / usual},
        **trainer_options(args, sd, dataset, validation_photos),
    )

    # 5. The method
    for batch in trainer:  # one micro-batch; goes on where a resumed run stopped
        x0, captions = dataset[batch]  # (B, 4, h, w), [B]
        choice = batch.integers(len(templates), "template")
        prompts = [templates[k].format(c) for k, c in zip(choice, captions, strict=True)]
        noise = batch.normal(x0.shape)  # (B, 4, h, w)
        t = batch.timesteps(sd.schedule.num_train_timesteps)  # (B,)
        x_t = sd.schedule.add_noise(x0, noise, t)
        pred = sd.unet(x_t, t, sd.text(prompts))  # (B, 4, h, w)
        loss = mse(pred, sd.schedule.target(x0, noise, t))  # (B,)
        trainer.backward(loss * min_snr_weight(sd.schedule, t, args.min_snr))


if __name__ == "__main__":
    sys.exit(main())
