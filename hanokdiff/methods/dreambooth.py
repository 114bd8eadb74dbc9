"""DreamBooth trains the model itself (Ruiz et al. 2022, arXiv:2208.12242): nothing is inserted, all of it is
named here."""

from torch import nn

from hanokdiff.methods.textual_inversion import ExtendedEmbedding


def trainable(sd, embedding: ExtendedEmbedding | None) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: the UNet's ("unet."), and with `embedding`, which holds the
    pseudo word's own rows ("word"), the text encoder's ("text."). The token table is not trained: no other
    word moves."""
    params = {f"unet.{name}": p for name, p in sd.unet.named_parameters()}
    if embedding is not None:
        text = sd.text.encoder.named_parameters()
        params |= {f"text.{name}": p for name, p in text if "token_embedding" not in name}
        params["word"] = embedding.vectors
    for p in params.values():
        p.requires_grad_(True)
    return params
