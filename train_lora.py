"""LoRA: teach Stable Diffusion a subject by a low-rank change of its attention layers.

    W' = W + (alpha / rank) up down                          Hu et al. 2021, arXiv:2106.09685, equation 3
    L  = || eps - eps_theta(x_t, t, prompt) ||^2             over the photos; only `down` and `up` are trained
        + w || eps' - eps_theta(x'_t', t', class prompt) ||^2
                                                             with --class-images: prior preservation

    python train_lora.py                                          the embedded hanok, one minute
    python train_lora.py --model MODEL --data PHOTOS --token sks  your photos on a real checkpoint

Writes runs/lora/lora.safetensors (kohya's format: the WebUI, ComfyUI and diffusers read it), log.jsonl and
previews/.
Then:  python sample.py "*, fire" "* in the fire" --lora runs/lora/lora.safetensors
Read next: hanokdiff/methods/lora.py (the layer), hanokdiff/training/trainer.py (everything around the loop).
"""

import sys
from pathlib import Path

import torch

from hanokdiff.errors import report_errors
from hanokdiff.formats import embedding_file, lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import lora, textual_inversion
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.tiny import world
from hanokdiff.training import args as command_line
from hanokdiff.training import prior
from hanokdiff.training.trainer import Trainer

# The tiny UNet has cross-attention at one level only, so there the convolutions are trained too.
# SD: rates, text encoder and no class pictures as in kohya's docs/train_network.md, rank between its 16 and
# diffusers' 4; the word's rate as in diffusers' textual inversion
DEFAULTS = {
    "tiny": dict(steps=175, batch_size=8, lr=2e-3, rank=16, alpha=None, targets="attention+ff+conv",
                 text_lr=2e-3, text_steps=None, vectors=4, word_lr=1e-2,
                 class_images=64, min_snr=5.0, save_every=50, preview_every=88),
    "sd": dict(steps=1500, batch_size=4, lr=1e-4, rank=8, alpha=None, targets="attention",
               text_lr=1e-5, text_steps=None, vectors=0, word_lr=5e-4,
               class_images=0, min_snr=0.0, save_every=500, preview_every=500),
}  # fmt: skip


def options():
    parser, method = command_line.training_parser(__doc__, DEFAULTS)
    method("--rank", "rank of the change", type=int)
    method("--alpha", "strength: the change is scaled by alpha / rank (default: the rank)", type=float)
    choices = ("cross-attention", "attention", "attention+ff", "attention+ff+conv")
    method("--targets", "what is changed in the UNet", choices=choices)
    method("--text-rank", "rank of the change of the text encoder, 0 for none (default: the rank)", type=int)
    method("--text-lr", "learning rate of the text encoder", type=float)
    method("--text-steps", "steps after which the text encoder stands still (default: never)", type=int)
    command_line.word_options(method)
    method("--from", "go on from a LoRA, of ours or of another tool", type=Path, metavar="FILE")
    prior.add_options(method)
    return parser


def take_from(args, given: dict, start: Path) -> None:
    """The ranks of a file, and its word unless another one is named."""
    loras, metadata = lora_file.read_file(start)
    words, word = lora_file.read_words(start), metadata.get("hanokdiff_token")
    args.token = command_line.token_from(args, given, word, words)
    unet = [t for name, t in loras.items() if "lora_unet" in name] or list(loras.values())
    args.rank = max(len(t["down"]) for t in unet)
    args.alpha = max(float(t.get("alpha", len(t["down"]))) for t in unet)
    args.text_rank = max((len(t["down"]) for name, t in loras.items() if "lora_te" in name), default=0)


@report_errors
def main(argv=None):
    parser = options()
    args, given = parser.parse(argv), parser.given(argv)
    args.alpha = args.rank if args.alpha is None else args.alpha
    args.text_rank = args.rank if args.text_rank is None else args.text_rank
    command_line.check_training(args)
    prior.check(args)
    start = command_line.from_file(args, given, ("rank", "alpha", "targets", "text_rank"))
    if start:
        take_from(args, given, start)
    if args.vectors and "." in args.token:
        dot = f'--token "{args.token}": the WebUI reads the word in a LoRA file up to its first dot'
        raise ValueError(f"{dot}; choose a word without one, or leave out --vectors")
    out = command_line.run_folder(args, "lora", "lora.safetensors")

    # 1. The base model, frozen
    sd = load_model(args.model, args.device, args.dtype, **command_line.model_options(args))
    command_line.fit_to_model(args, sd)
    sd.text.add_word(args.token)

    # 2. The photos, encoded once, and class pictures drawn by the model as it still is
    photos, dataset, held_out = command_line.load_data(args, sd, world.photos)
    more = world.CLASS_PROMPTS if args.model == "tiny" else None
    class_dataset, seconds = prior.load(args, sd, photos, dataset, more)

    # 3. What is trained: a low-rank change beside each layer, and with --vectors the word's own vectors
    if start:
        loras, _ = lora_file.apply_file(sd, start)
    else:
        loras = lora.insert(sd, args.rank, args.alpha, args.targets, args.text_rank, args.seed)
    if args.vectors:
        vectors = textual_inversion.initial_vectors(sd, args.init or args.replace, args.vectors)
        textual_inversion.insert(sd, args.token, vectors)
    embedding = textual_inversion.find(sd, args.token)  # a file may have brought one
    trainable = lora.trainable(loras) | ({"word": embedding.vectors} if embedding else {})
    rates = {"lora_unet": args.lr, "lora_te": args.text_lr, "word": args.word_lr}
    if not (args.text_rank or embedding):  # a frozen encoder's output never changes
        sd.text.cache_prompts([*dataset.prompts, *(class_dataset.prompts if class_dataset else [])])
    print(f"trains {len(loras)} LoRAs of rank {args.rank}, {command_line.count(trainable)}")

    # 4. The run
    def save(path):
        words = {args.token: embedding.vectors} if embedding else {}
        for word, vectors in words.items():  # for tools that do not look into a LoRA; the artefact ends a run
            beside = path.with_name(path.name.replace("lora", "embedding", 1))
            embedding_file.save_file(beside, word, vectors, {"step": trainer.step, "model": sd.name})
        metadata = lora_file.metadata(sd, name=path.stem, reg_images=len(class_dataset or ()), **vars(args))
        lora_file.save_file(path, loras, metadata, words=words)

    how = command_line.trainer_options(args, sd, dataset, held_out, class_dataset) | {"lr": rates}
    trainer = Trainer(out, trainable, artefact="lora.safetensors", save=save, **how)
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


if __name__ == "__main__":
    sys.exit(main())
