"""The numbers that describe a network come from files: they are checked before anything is built of them."""

from dataclasses import fields

MOST = {  # the largest that is believed, some ten times what any Stable Diffusion has
    "block_out_channels": 16_384, "heads": 1024, "num_attention_heads": 1024, "layers_per_block": 16,
    "num_hidden_layers": 128, "in_channels": 64, "out_channels": 64, "latent_channels": 64,
        "sample_size": 16_384,
    "hidden_size": 32_768, "intermediate_size": 131_072, "cross_attention_dim": 32_768,
        "norm_num_groups": 1024,
    "max_position_embeddings": 16_384, "vocab_size": 1_000_000, "num_train_timesteps": 100_000,
        "steps_offset": 1000,
    "beta_start": 0.999, "beta_end": 0.999, "scaling_factor": 1000, "norm_eps": 0.1, "layer_norm_eps": 0.1,
}  # fmt: skip
LEVELS = 8


def check(config) -> None:
    """Every field of a config must be of the type of its default, and of a size that a network can have."""
    for field in (f for f in fields(config) if f.init and f.default is not None):
        value, several = getattr(config, field.name), isinstance(field.default, tuple)
        if several and not (isinstance(value, tuple) and 0 < len(value) <= LEVELS):
            raise ValueError(f"{field.name} is {repr(value)[:60]}, but must be a list of 1 to {LEVELS}")
        for x in value if several else [value]:
            check_one(field.name, x, type(field.default[0] if several else field.default))


def check_one(name: str, x, kind: type) -> None:
    if type(x) is not kind and not (kind is float and type(x) is int):
        raise ValueError(f"{name} is {repr(x)[:60]}, but must be of the kind {kind.__name__}")
    if name in MOST and not (0 < x <= MOST[name] or (name == "steps_offset" and x == 0)):
        raise ValueError(f"{name} is {str(x)[:60]}, but must be more than 0 and at most {MOST[name]}")


def check_heads(widths, heads) -> None:
    """Attention splits a width into heads of one size."""
    for width, n in zip(widths, heads, strict=True):
        if width % n:
            raise ValueError(f"a width of {width} cannot be split into {n} attention heads of one size")
