"""DreamBooth: teach Stable Diffusion a subject with all its weights, and keep it from forgetting the rest.

    L = || eps - eps_theta(x_t, t, prompt) ||^2              over the photos of the subject
        + w || eps' - eps_theta(x'_t', t', class prompt) ||^2
                                                             over pictures of its class that the untouched
                                                             model drew: prior preservation
    Ruiz et al. 2022, arXiv:2208.12242, equation 2; UNet and text encoder are trained, or with --train less

    python train_dreambooth.py                                          the embedded hanok, one to two minutes
    python train_dreambooth.py --model MODEL --data PHOTOS --token sks  your photos on a real checkpoint

Writes runs/dreambooth/model/ (a whole model in the diffusers layout), log.jsonl and previews/; with --train
cross-attention (Custom Diffusion) or singular-values (SVDiff) a small file and the word's embedding as well.
Then:  python sample.py "*, fire" "* in the fire" --model runs/dreambooth/model
Read next: hanokdiff/training/prior.py (class pictures), hanokdiff/training/trainer.py (around the loop).
"""

import contextlib
import shutil
import sys
from pathlib import Path

import torch

from hanokdiff.errors import report_errors
from hanokdiff.files import replace_folder, write_json
from hanokdiff.formats import delta_file, embedding_file
from hanokdiff.formats.folder import save_folder
from hanokdiff.formats.load import load_model
from hanokdiff.methods import dreambooth, spectral, textual_inversion
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.tiny import world
from hanokdiff.training import args as command_line
from hanokdiff.training import prior
from hanokdiff.training.trainer import Trainer

# the tiny world's class pictures show campfires, smoke and floods too, but no fire
# SD: rates of the papers; DreamBooth's are diffusers', Custom Diffusion's for 8 pictures, class ones included
DEFAULTS = {
    "tiny": dict(steps=300, batch_size=8, text_lr=1e-3, word_lr=2e-2, text_steps=None,
                 lr={"all": 1e-3, "cross-attention": 4e-3, "singular-values": 3e-2},
                 class_images=64, min_snr=5.0, save_every=100, preview_every=150),
    "sd": dict(steps=800, batch_size=4, text_lr=1e-6, word_lr=1e-4, text_steps=None,
               lr={"all": 2e-6, "cross-attention": 8e-5, "singular-values": 1e-3},
               class_images=200, min_snr=0.0, save_every=400, preview_every=200),
}  # fmt: skip


def options():
    parser, method = command_line.training_parser(__doc__, DEFAULTS)
    prior.add_options(method)
    method("--train", "what is trained", choices=dreambooth.TRAIN, default="all")
    method("--freeze-text", "train the UNet only", action="store_true")
    method("--text-lr", "learning rate of the text encoder", type=float)
    rows = "learning rate of the pseudo word's own rows in the table of words; no other row moves"
    method("--word-lr", rows, type=float)
    method("--text-steps", "steps after which the text encoder stands still (default: never)", type=int)
    return parser


def check_text_options(given) -> None:
    if given.freeze_text and {given.text_lr, given.word_lr, given.text_steps} != {None}:
        options = "--text-lr, --word-lr and --text-steps"
        raise ValueError(f"--freeze-text leaves nothing to do for {options}; leave them out")
    if given.train == "cross-attention" and given.text_lr is not None:
        raise ValueError("--train cross-attention trains nothing of the text encoder; leave out --text-lr")


@report_errors
def main(argv=None):
    parser = options()
    given, args = parser.parse_args(argv), parser.parse(argv)
    command_line.check_training(args)
    check_text_options(given)
    prior.check(args)
    out = command_line.run_folder(args, "dreambooth", "model")

    # 1. The base model, in half precision with fp32 masters
    sd = load_model(args.model, args.device, args.dtype, **command_line.model_options(args), masters=True)
    command_line.fit_to_model(args, sd)
    sd.text.add_word(args.token)

    # 2. The photos, and class pictures drawn by the model as it still is
    photos, dataset, held_out = command_line.load_data(args, sd, world.photos)
    more = world.CLASS_PROMPTS if args.model == "tiny" else None
    class_dataset, seconds = prior.load(args, sd, photos, dataset, more)

    # 3. What is trained: everything, but of the token table the pseudo word's own rows only
    embedding, rates, ids = None, {"unet": args.lr}, sd.text.words[args.token]
    if args.freeze_text:  # a frozen encoder's output never changes
        sd.text.cache_prompts([*dataset.prompts, *(class_dataset.prompts if class_dataset else [])])
    else:
        embedding = textual_inversion.insert(sd, args.token, textual_inversion.token_embedding(sd)[ids])
        rates |= {"text": args.text_lr, "word": args.word_lr}
    trained = dreambooth.prepare(sd, embedding, args.train)
    print(f"trains {trained.described()}, {command_line.count(trained.parameters)}")

    # 4. The run
    def save(path):
        if args.train != "all":
            save_small_files(path, sd, args, trained.parameters, embedding)
        text = spectral.folded(sd.text.encoder, trained.text_shifts)
        with spectral.folded(sd.unet, trained.unet_shifts), text:
            save_model(path, sd, args.token, embedding, ids)

    how = command_line.trainer_options(args, sd, dataset, held_out, class_dataset) | {"lr": rates}
    trainer = Trainer(out, trained.parameters, artefact="model", save=save, **how)
    prior.note(out, class_dataset, seconds)

    # 5. The method
    for batch in trainer:  # one micro-batch; goes on where a resumed run stopped
        x0, prompts = dataset[batch]  # (B, 4, h, w), [B]: photos of the subject
        if class_dataset:  # and as many pictures of the class behind them, in one forward pass
            class_x0, class_prompts = class_dataset[batch.subset("class")]
            x0, prompts, batch = torch.cat([x0, class_x0]), prompts + class_prompts, batch.subset("", "class")
        noise = batch.noise(x0.shape, args.noise_offset)  # (B or 2B, 4, h, w)
        t = batch.timesteps(sd.schedule.num_train_timesteps)  # (B or 2B,)
        x_t = sd.schedule.add_noise(x0, noise, t)
        with torch.set_grad_enabled(args.text_steps is None or batch.step < args.text_steps):
            context = sd.text(prompts)  # (B or 2B, 77, D)
        pred = sd.unet(x_t, t, context)  # (B or 2B, 4, h, w)
        loss = mse(pred, sd.schedule.target(x0, noise, t)) * min_snr_weight(sd.schedule, t, args.min_snr)
        own, class_loss = loss.chunk(2) if class_dataset else (loss, loss.new_zeros(1))
        trainer.backward(own.mean() + args.prior_weight * class_loss.mean())


def save_small_files(path: Path, sd, args, parameters: dict, embedding) -> None:
    """What --train has changed, and the word's vectors, beside the model folder: model-000100 has its own."""
    about, step = {"model": sd.name, "hanokdiff_token": args.token}, path.name.removeprefix("model")
    file = path.with_name(delta_file.FILES[args.train])
    delta_file.save_file(file.with_stem(file.stem + step), args.train, parameters, about)
    if embedding:
        beside = path.with_name(f"embedding{step}.safetensors")
        embedding_file.save_file(beside, args.token, embedding.current(), about)


def save_model(path: Path, sd, token: str, embedding, ids: list[int]) -> None:
    """Write the model folder aside, the word's vectors folded into its token table, then give it its name."""
    dtype = torch.float32 if sd.dtype == torch.float32 else torch.float16
    aside = path.with_name(path.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)  # left by a kill
    plain = contextlib.nullcontext()
    with textual_inversion.folded_into_table(sd, embedding, ids) if embedding else plain:
        save_folder(aside, sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule, dtype)
    write_json(aside / "hanokdiff.json", {"token": token})
    replace_folder(aside, path)  # one of the same step is of before a run was resumed


if __name__ == "__main__":
    sys.exit(main())
