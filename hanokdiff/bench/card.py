"""What card.sh needs beside the bench: do two devices agree, and the table at the end.

python -m hanokdiff.bench.card agree cuda sd15 a.json    bf16 and fp32 on the device against fp32 on the CPU
python -m hanokdiff.bench.card table FOLDER              the JSON files of FOLDER as a table in markdown
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from hanokdiff.bench import measure, setup
from hanokdiff.device import DTYPES, choose_device
from hanokdiff.errors import report_errors
from hanokdiff.files import read_json, write_json
from hanokdiff.training.noise import Batch

SIDE = 256  # pixels at most, because the CPU computes them too
STEPS = 5  # of sampling


def computed(size: str, device: str, dtype: str, weights: list | None) -> tuple[float, list, Tensor, list]:
    """The loss of DreamBooth's first batch of two photos, its gradients, the latents of two pictures, and the
    weights, for a second device."""
    sd, side = setup.build(size, device, DTYPES[dtype]), min(SIDE, setup.side(size))
    parts = (sd.unet, sd.vae, sd.text.encoder)
    for part, values in zip(parts, weights or (), strict=bool(weights)):
        part.load_state_dict(values)
    weights = weights or [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    prompts = ["a barn on fire", "a house in the snow"]
    for latents in sd.sample(prompts, [0, 1], steps=STEPS, size=(side, side)):
        pass
    trainable, losses = setup.prepare(sd, "dreambooth", side)
    loss = losses(Batch(0, 0, range(2), 2, device=sd.device)).mean()
    loss.backward()
    gradients = [p.grad.float().cpu().flatten() for p in trainable.values() if p.grad is not None]
    return loss.item(), gradients, latents.float().cpu(), weights


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """The cosine of two lists of gradients, each taken as one vector."""
    dots = [[torch.dot(*pair) for pair in ((p, q), (p, p), (q, q))] for p, q in zip(a, b, strict=True)]
    ab, aa, bb = torch.tensor(dots, dtype=torch.float64).sum(0)
    return (ab / (aa * bb).sqrt()).item()


def agree(device: str, size: str) -> dict:
    """By size ("tiny" has trained weights): loss, cosine of the gradients and distance of the latents, as a
    share of their own size, against the CPU in fp32."""
    rows = []
    for name in dict.fromkeys(("tiny", size)):
        loss, gradients, latents, weights = computed(name, "cpu", "fp32", None)
        rows.append({"size": name, "device": "cpu", "dtype": "fp32", "loss": loss})
        for dtype in ("fp32", "bf16"):
            its_loss, its_gradients, its_latents, _ = computed(name, device, dtype, weights)
            distance = (its_latents - latents).square().mean().sqrt() / latents.square().mean().sqrt()
            row = {"size": name, "device": device, "dtype": dtype, "loss": its_loss}
            row |= {"gradient_cosine": cosine(gradients, its_gradients), "latents_distance": distance.item()}
            rows.append(row)
            print(rows[-1], flush=True)
    return {**measure.machine(device), "agreement": rows}


def table(folder: Path) -> str:
    """The figures of all JSON files of a folder, in the order of their names."""
    contents = [read_json(file) for file in sorted(folder.glob("*.json"))]
    lines = []
    for content in contents[:1]:
        versions = ("torch", "cuda", "driver_version", "clocks.max.sm", "power.limit")
        told = ", ".join(f"{name} {content[name]}" for name in versions if content.get(name))
        lines += [f"## {content['device']}", "", told, ""]
    if agreement := [row for content in contents for row in content.get("agreement", ())]:
        lines += ["| size | device | loss | cosine of gradients | distance of latents |", "|---" * 5 + "|"]
        lines += [f"| {agreement_line(row)} |" for row in agreement] + [""]
    columns = ("side", "options", "ms a step", "images/s", "theirs / ours", "MFU", "limit", "peak GiB", "MHz")
    lines += [f"| work | {' | '.join(columns)} |", "|---" * 10 + "|"]
    for content in contents:
        lines += [f"| {' | '.join(cells(content, row))} |" for row in content.get("rows", ())]
    return "\n".join(lines)


def agreement_line(row: dict) -> str:
    """A row of `agree`; the CPU's own has nothing to be compared with."""
    compared = [f"{row[name]:.5f}" if name in row else "" for name in ("gradient_cosine", "latents_distance")]
    return " | ".join([row["size"], f"{row['device']} {row['dtype']}", f"{row['loss']:.5f}", *compared])


def cells(content: dict, row: dict) -> list[str]:
    """A row of the bench: what has not been measured is empty."""
    flags = [name for name in ("compile", "checkpointing", "channels_last") if content[name]]
    task = f"{content['size']}, {content['batch']} pictures, {content['dtype'].removeprefix('torch.')}"
    formats = dict(images_per_second="{:.2f}", ratio_min="{:.2f}", mfu="{:.0%}", share_of_limit="{:.0%}")
    time = f"{1e3 * row['seconds_min']:.1f}" if "seconds_min" in row else "does not fit"
    numbers = [text.format(row[name]) if name in row else "" for name, text in formats.items()]
    peak = f"{row['peak_bytes'] / 2**30:.1f}" if row.get("peak_bytes") else ""
    work = [row["work"], row["side"], ", ".join([task, *flags])]
    return [*work, time, *numbers, peak, row.get("clock_mhz") or ""]


@report_errors
def main(argv=None):
    match sys.argv[1:] if argv is None else argv:
        case ["agree", device, size, file]:
            device, _, reason = choose_device(device)
            print(reason)
            write_json(Path(file), agree(str(device), size))
        case ["table", folder]:
            print(table(Path(folder)))
        case _:
            raise ValueError(f"what to do is not clear\n{__doc__}")


if __name__ == "__main__":
    sys.exit(main())
