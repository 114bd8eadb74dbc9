"""DreamBooth trains the model itself (Ruiz et al. 2022, arXiv:2208.12242), all of it or some.

all                 every weight of UNet and text encoder
cross-attention     keys and values of cross-attention, and the word: Custom Diffusion, Kumari et al. 2023,
                    arXiv:2212.04488, section 3.2
singular-values     the singular values of every weight: SVDiff, Han et al. 2023, arXiv:2303.11305
"""

from dataclasses import dataclass, field

from torch import nn

from hanokdiff.methods import spectral
from hanokdiff.methods.textual_inversion import ExtendedEmbedding

TRAIN = ("all", "cross-attention", "singular-values")


@dataclass
class Trained:
    """What is trained: parameters by name ("unet.", "text.", "word"), and the shifts among them."""

    parameters: dict[str, nn.Parameter]
    unet_shifts: dict[str, spectral.SpectralShift] = field(default_factory=dict)
    text_shifts: dict[str, spectral.SpectralShift] = field(default_factory=dict)

    def described(self) -> str:
        """Such as "UNet and text encoder"."""
        names = {"unet": "UNet", "text": "text encoder", "word": "the word"}
        parts = [v for k, v in names.items() if any(name.partition(".")[0] == k for name in self.parameters)]
        what = "the singular values of " if self.unet_shifts else ""
        return what + (" and ".join(parts) if len(parts) < 3 else f"{parts[0]}, {parts[1]} and {parts[2]}")


def prepare(sd, embedding: ExtendedEmbedding | None, train: str) -> Trained:
    """The parameters that are trained, by name: the UNet's ("unet."), and with `embedding`, which holds the
    pseudo word's own rows ("word"), the text encoder's ("text."). The token table is not trained: no other
    word moves. Where singular values are trained, the layers that hold them as well."""
    out = Trained({})
    if train == "singular-values":
        out.unet_shifts = spectral.insert(sd.unet)
        out.parameters |= {f"unet.{path}.weight": s.delta for path, s in out.unet_shifts.items()}
        if embedding is not None:
            out.text_shifts = spectral.insert(sd.text.encoder)
            out.parameters |= {f"text.{path}.weight": s.delta for path, s in out.text_shifts.items()}
    else:
        unet = sd.unet.named_parameters()
        ends = ("attn2.to_k.weight", "attn2.to_v.weight") if train == "cross-attention" else ("",)
        out.parameters |= {f"unet.{name}": p for name, p in unet if name.endswith(ends)}
        if embedding is not None and train == "all":
            text = sd.text.encoder.named_parameters()
            out.parameters |= {f"text.{name}": p for name, p in text if "token_embedding" not in name}
    if embedding is not None:
        out.parameters["word"] = embedding.vectors
    for p in out.parameters.values():
        p.requires_grad_(True)
    return out
