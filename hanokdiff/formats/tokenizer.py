"""CLIP tokenizers: found, opened and saved."""

import json
import tempfile
from pathlib import Path

from hanokdiff.files import check_file_size, read_json, reason, sync_rename, write_text
from hanokdiff.pretrained import could_be_hub_id

HUB_TOKENIZERS = {  # the same words in all three; a single file brings none
    "sd1": ["openai/clip-vit-large-patch14"],
    "sd2": ["stabilityai/stable-diffusion-2-1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "openai/clip-vit-large-patch14"],
}  # fmt: skip


def load_tokenizer(folder: Path, pad: str | None = None):
    """The library's CLIP tokenizer: vocab.json and merges.txt, or the tokenizer.json that transformers 5
    writes. `pad` is another token to pad prompts with than the folder says."""
    if not has_tokenizer(folder):
        name = "merges.txt" if (folder / "vocab.json").is_file() else "vocab.json"
        way = "fetch it again, or name another tokenizer with --tokenizer"
        missing = f"{folder / name} is missing: not a complete model folder in the diffusers layout"
        raise ValueError(f"{missing}; {way}")
    from transformers import CLIPTokenizer  # lazily: half a second that --help need not wait for

    for file in folder.glob("*.[jt]*"):
        check_file_size(file, 64 << 20)
    config = folder / "tokenizer_config.json"
    held = read_json(config) if config.is_file() else {}
    if away := [k for k in ("vocab_file", "merges_file", "tokenizer_file") if held.get(k)]:
        away = f"{config} names another file ({away[0]})"
        raise ValueError(f"{away}, but only the folder's own are read: delete that")
    try:
        more = {"pad_token": pad} if pad else {}
        t = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **more)
        ids = [t.bos_token_id, t.eos_token_id, t.pad_token_id, *t("a b").input_ids]
    except BaseException as e:  # the library raises what it comes upon, and its Rust half a BaseException
        if isinstance(e, KeyboardInterrupt):
            raise
        none = f"{folder} holds no CLIP tokenizer that can be read ({reason(e)})"
        raise ValueError(f"{none}; fetch it again") from None
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{folder}: the tokenizer has no begin, end or padding token; fetch it again")
    return t


def has_tokenizer(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def find_tokenizer(named: str | None, beside: Path, vocabulary: int, sd2: bool):
    """The tokenizer of a model that brings none: the named folder or hub id, else one beside the model, else
    the published one from the cache or the hub. SD 2 pads prompts with "!", SD 1 with the end token."""
    names = [named] if named else [str(beside), *HUB_TOKENIZERS["sd2" if sd2 else "sd1"]]
    tried = (tokenizer_folder(name, cached) for cached in (True, False) for name in names)
    folder = next((f for f in tried if f), None)
    if folder is None:
        none = f"no tokenizer in {', nor in '.join(names)}"
        form = "a folder with vocab.json and merges.txt, or a hub id"
        raise ValueError(f"{none} ({form}); name one with --tokenizer FOLDER_OR_HUB_ID")
    return check_tokenizer(load_tokenizer(folder, "!" if sd2 else "<|endoftext|>"), folder, vocabulary)


def check_tokenizer(tokenizer, folder: Path, vocabulary: int):
    count = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if count > vocabulary:
        more = f"the tokenizer in {folder} knows {count} tokens, the text encoder {vocabulary}"
        raise ValueError(f"{more}: it belongs to another model; name the right one with --tokenizer")
    return tokenizer


def tokenizer_folder(name: str, cached: bool) -> Path | None:
    """Where the tokenizer of a local folder, or of a hub id (from the cache, else from the network), lies."""
    folder = Path(name).expanduser()
    if not folder.exists():
        if not could_be_hub_id(name):
            return None
        from huggingface_hub import snapshot_download

        files = ["vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]
        patterns = [*files, *(f"tokenizer/{f}" for f in files)]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
        except Exception:  # not in the cache, offline, unknown id, no permission: each has its own class
            return None
    return next((place for place in (folder / "tokenizer", folder) if has_tokenizer(place)), None)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Today's tokenizer.json, and the vocab.json and merges.txt that older tools read."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part", dir=folder) as aside:
        try:
            tokenizer.save_pretrained(aside)
        except Exception as e:  # the library's Rust half has no OSError
            raise OSError(f"{folder} cannot be written ({reason(e)})") from None
        for file in Path(aside).iterdir():
            sync_rename(file, folder / file.name)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in merges), ""]
    write_text(folder / "merges.txt", "\n".join(lines))
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
