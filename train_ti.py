"""Textual inversion: teach Stable Diffusion a subject by a new word alone.

    v* = argmin_v  E || eps - eps_theta(x_t, t, prompt(v)) ||^2
    Gal et al. 2022, arXiv:2208.01618, equation 2: v, n vectors of the token embedding, is all that is trained

    python train_ti.py                                            the embedded hanok, half a minute
    python train_ti.py --model MODEL --data PHOTOS --init house   your photos on a real checkpoint

Writes runs/ti/embedding.safetensors, log.jsonl and previews/. For diffusers, which wants another word than
"*": load_textual_inversion(FILE, token="<hanok>"); for the WebUI, python -m hanokdiff.convert makes a .pt.
Then:  python sample.py "*, fire" "* in the fire" --embedding runs/ti/embedding.safetensors
Read next: hanokdiff/methods/textual_inversion.py (vectors beyond the vocabulary), hanokdiff/models/tokens.py.
"""

import argparse
import sys
from pathlib import Path

from hanokdiff.errors import report_errors
from hanokdiff.formats import embedding_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import textual_inversion
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.tiny import world
from hanokdiff.training import args as command_line
from hanokdiff.training.prior import number_or_folder
from hanokdiff.training.trainer import Trainer

# SD: rate of the WebUI's training tab, steps and one vector of diffusers' textual_inversion example
DEFAULTS = {
    "tiny": dict(steps=300, batch_size=8, lr=1e-2, vectors=8, min_snr=5.0, save_every=100, preview_every=150,
                 init="a wide house with a grey curved roof and white walls"),
    "sd": dict(steps=3000, batch_size=4, lr=5e-3, vectors=1, init="building", min_snr=0.0, save_every=500,
               preview_every=500),
}  # fmt: skip
# A word seen in one sentence only does not learn to stand in others. (The tiny world has no word "photo".)
TEMPLATES = {
    "tiny": ("{}", "a picture of {}"),
    "sd": ("{}", "a photo of {}", "a picture of {}", "a good photo of {}", "a rendering of {}",
           "a close-up of {}"),
}  # fmt: skip


def options():
    parser, method = command_line.training_parser(__doc__, DEFAULTS)
    method("--vectors", "how many vectors the word is made of", type=int)
    method("--init", "words that name the kind of thing; the vectors start as theirs")
    method("--from", "go on from an embedding, of ours or of another tool", type=Path, metavar="FILE")
    hold = "keep the vectors' length: one that grows drowns the other words"
    method("--hold-norm", hold, action="store_true")
    method("--class-images", argparse.SUPPRESS, type=number_or_folder)
    return parser


@report_errors
def main(argv=None):
    parser = options()
    args, given = parser.parse(argv), parser.given(argv)
    command_line.check_training(args)
    if args.class_images:
        why = "textual inversion trains the pseudo word's vectors only"
        none = "no class prompt contains that word, so class pictures would change nothing"
        raise ValueError(f"--class-images: {why}, and {none}; leave it out")
    start = command_line.from_file(args, given, ("vectors", "init"))
    if start:
        word, vectors, _ = embedding_file.read_file(start)
        args.vectors, args.token = len(vectors), command_line.token_from(args, given, word)
    out = command_line.run_folder(args, "ti", "embedding.safetensors")
    if not args.vectors > 0:
        raise ValueError(f"--vectors is {args.vectors}, but must be greater than 0")

    # 1. The base model, frozen
    sd = load_model(args.model, args.device, args.dtype, **command_line.model_options(args))
    command_line.fit_to_model(args, sd)

    # 2. The photos, encoded once
    _, dataset, held_out = command_line.load_data(args, sd, world.photos)
    templates = TEMPLATES["tiny" if args.model == "tiny" else "sd"]

    # 3. What is trained: the pseudo word's own vectors
    if start:
        embedding = embedding_file.apply(sd, start, args.token, vectors)
    else:
        vectors = textual_inversion.initial_vectors(sd, args.init, args.vectors)  # (n, D)
        embedding = textual_inversion.insert(sd, args.token, vectors)
    embedding.hold_norm = args.hold_norm
    trainable = textual_inversion.trainable(embedding)
    begin, count = start or f'"{args.init}"', command_line.count(trainable)
    print(f"trains {args.vectors} vector{'s' * (args.vectors > 1)} of {begin}, {count}")

    # 4. The run
    def save(path):
        about = {"step": trainer.step, "model": sd.name}
        embedding_file.save_file(path, args.token, embedding.current(), about)

    def metrics():  # a vector much longer than a word's drowns the other words
        return {"norm": embedding.current().norm(dim=1).mean().item() / mean_norm}

    mean_norm = textual_inversion.token_embedding(sd).float().norm(dim=1).mean().item()
    how = command_line.trainer_options(args, sd, dataset, held_out)
    how |= {"weight_decay": 0.0, "metrics": metrics}
    trainer = Trainer(out, trainable, artefact="embedding.safetensors", save=save, **how)

    # 5. The method
    for batch in trainer:  # one micro-batch; goes on where a resumed run stopped
        x0, captions = dataset[batch]  # (B, 4, h, w), [B]
        choice = batch.integers(len(templates), "template")
        prompts = [templates[k].format(c) for k, c in zip(choice, captions, strict=True)]
        noise = batch.noise(x0.shape, args.noise_offset)  # (B, 4, h, w)
        t = batch.timesteps(sd.schedule.num_train_timesteps)  # (B,)
        x_t = sd.schedule.add_noise(x0, noise, t)
        pred = sd.unet(x_t, t, sd.text(prompts))  # (B, 4, h, w)
        loss = mse(pred, sd.schedule.target(x0, noise, t))  # (B,)
        trainer.backward(loss * min_snr_weight(sd.schedule, t, args.min_snr))


if __name__ == "__main__":
    sys.exit(main())
