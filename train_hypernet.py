"""Hypernetwork: teach Stable Diffusion a subject by changing what goes into attention's keys and values.

    keys = to_k(x + f_K(x)),  values = to_v(x + f_V(x))      small residual networks f; the WebUI's layout
    L = || eps - eps_theta(x_t, t, prompt) ||^2              over the photos; only the f are trained
        + w || eps' - eps_theta(x'_t', t', class prompt) ||^2
                                                             with --class-images: prior preservation

    python train_hypernet.py                                          the embedded hanok, one minute
    python train_hypernet.py --model MODEL --data PHOTOS --token sks  your photos on a real checkpoint

Writes runs/hypernet/hypernet.pt (the WebUI reads it), log.jsonl (with |f(x)| / |x|) and previews/.
Then:  python sample.py "*, fire" "* in the fire" --hypernet runs/hypernet/hypernet.pt
Read next: hanokdiff/methods/hypernetwork.py (the networks), hanokdiff/training/trainer.py (around the loop).
"""

import sys
from pathlib import Path

import torch

from hanokdiff.errors import report_errors
from hanokdiff.formats import embedding_file, hypernet_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import hypernetwork, textual_inversion
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.seeding import seeded_generator
from hanokdiff.tiny import world
from hanokdiff.training import args as command_line
from hanokdiff.training import prior
from hanokdiff.training.trainer import Trainer

# the tiny UNet has cross-attention at one level only, so there self-attention is changed too
# SD: rate and layers of the WebUI's training tab; it names no steps: as many as textual inversion's
DEFAULTS = {
    "tiny": dict(steps=175, batch_size=8, lr=4e-3, widths="all", layers=[1, 2, 1], activation="relu",
                 vectors=4, word_lr=1e-2, class_images=64, min_snr=5.0, save_every=50, preview_every=88),
    "sd": dict(steps=3000, batch_size=4, lr=1e-5, widths="context", layers=[1, 2, 1], activation="relu",
               vectors=0, word_lr=5e-4, class_images=0, min_snr=0.0, save_every=500, preview_every=500),
}  # fmt: skip


def options():
    parser, method = command_line.training_parser(__doc__, DEFAULTS)
    changed = "what is changed: the prompt's context, or self-attention's input too, as in the WebUI"
    method("--widths", changed, choices=("context", "all"))
    method("--layers", "of each network, as multiples of the width", type=float, nargs="+")
    functions = "linear, relu, leakyrelu, elu, swish, tanh, sigmoid, mish, ..."
    method("--activation", f"between the layers: {functions}")
    method("--dropout", "share of the inner layers that is left out at random", type=float, default=0.0)
    method("--layer-norm", "a LayerNorm after every layer", action="store_true")
    method("--from", "go on from a hypernetwork, of ours or of another tool", type=Path, metavar="FILE")
    command_line.word_options(method)
    prior.add_options(method)
    return parser


def network_config(args) -> hypernetwork.HypernetConfig:
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout is {args.dropout:g}, but must be a number from 0 to below 1")
    if args.dropout and len(args.layers) == 2:
        raise ValueError("--dropout needs an inner layer to leave something out of, such as --layers 1 2 1")
    dropout = (0.0, *[args.dropout] * (len(args.layers) - 2), 0.0) if args.dropout else ()
    return hypernetwork.HypernetConfig(tuple(args.layers), args.activation, args.layer_norm, dropout)


@report_errors
def main(argv=None):
    parser = options()
    args, given = parser.parse(argv), parser.given(argv)
    command_line.check_training(args)
    prior.check(args)
    start = command_line.from_file(args, given, ("widths", "layers", "activation", "layer_norm", "dropout"))
    if start:
        config, _, metadata = hypernet_file.read_file(start)
        words, word = hypernet_file.read_words(start, metadata), hypernet_file.pseudo_word(metadata)
        args.token = command_line.token_from(args, given, word, words)
    else:
        config = network_config(args)
    if "softm" in config.activation:
        mixes = f"--activation {config.activation} mixes the pictures of a batch"
        raise ValueError(f"{mixes}; take another, such as relu")
    out = command_line.run_folder(args, "hypernet", "hypernet.pt")

    # 1. The base model, frozen
    sd = load_model(args.model, args.device, args.dtype, **command_line.model_options(args))
    command_line.fit_to_model(args, sd)
    sd.text.add_word(args.token)

    # 2. The photos, encoded once, and class pictures drawn by the model as it still is
    photos, dataset, held_out = command_line.load_data(args, sd, world.photos)
    more = world.CLASS_PROMPTS if args.model == "tiny" else None
    class_dataset, seconds = prior.load(args, sd, photos, dataset, more)

    # 3. What is trained: a pair of networks per width before to_k and to_v, and with --vectors the word's
    if start:
        hypernet, _ = hypernet_file.apply_file(sd, start)
        hypernet.requires_grad_(True)
    else:
        widths = hypernetwork.dims(sd)[args.widths]
        hypernet = hypernetwork.insert(sd, hypernetwork.Hypernetwork(config, widths).init_weights(args.seed))
    hypernet.eval()  # dropout in the loop only, not in previews
    if args.vectors:
        vectors = textual_inversion.initial_vectors(sd, args.init or args.replace, args.vectors)
        textual_inversion.insert(sd, args.token, vectors)
    embedding = textual_inversion.find(sd, args.token)  # a file may have brought one
    trainable = hypernetwork.trainable(hypernet) | ({"word": embedding.vectors} if embedding else {})
    if not embedding:  # a frozen encoder's output never changes
        sd.text.cache_prompts([*dataset.prompts, *(class_dataset.prompts if class_dataset else [])])
    print(f"trains networks for widths {', '.join(hypernet.pairs)}, {command_line.count(trainable)}")

    # 4. The run
    def save(path):
        about = {"step": trainer.step, "name": path.stem, "model": sd.name}
        about["info"] = hypernet_file.TOKEN + args.token
        words = {args.token: embedding.vectors} if embedding else {}
        for word, vectors in words.items():  # on its own, for other tools; first, as the artefact ends a run
            beside = path.with_name(path.stem.replace("hypernet", "embedding", 1) + ".safetensors")
            embedding_file.save_file(beside, word, vectors, about)
        hypernet_file.save_file(path, config, hypernet_file.state(hypernet), about, words)

    how = command_line.trainer_options(args, sd, dataset, held_out, class_dataset)
    how["lr"] = {"pairs": args.lr, "word": args.word_lr}
    how["metrics"] = lambda: {"ratio": hypernet.ratio(sd.text(dataset.prompts[:8]))}
    trainer = Trainer(out, trainable, artefact="hypernet.pt", save=save, **how)
    prior.note(out, class_dataset, seconds)

    # 5. The method
    for batch in trainer:  # one micro-batch; goes on where a resumed run stopped
        x0, prompts = dataset[batch]  # (B, 4, h, w), [B]: photos of the subject
        if class_dataset:  # and as many pictures of the class behind them, in one forward pass
            class_x0, class_prompts = class_dataset[batch.subset("class")]
            x0, prompts, batch = torch.cat([x0, class_x0]), prompts + class_prompts, batch.subset("", "class")
        dropout = seeded_generator(args.seed, batch.step, batch.indices.start, "dropout")
        torch.manual_seed(dropout.initial_seed())  # the networks' dropout draws from torch's own generator
        hypernet.train()
        noise = batch.noise(x0.shape, args.noise_offset)  # (B or 2B, 4, h, w)
        t = batch.timesteps(sd.schedule.num_train_timesteps)  # (B or 2B,)
        x_t = sd.schedule.add_noise(x0, noise, t)
        pred = sd.unet(x_t, t, sd.text(prompts))  # (B or 2B, 4, h, w)
        loss = mse(pred, sd.schedule.target(x0, noise, t)) * min_snr_weight(sd.schedule, t, args.min_snr)
        own, class_loss = loss.chunk(2) if class_dataset else (loss, loss.new_zeros(1))
        trainer.backward(own.mean() + args.prior_weight * class_loss.mean())
        hypernet.eval()


if __name__ == "__main__":
    sys.exit(main())
