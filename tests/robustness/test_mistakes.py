"""What a careless newcomer does, and the one line that answers it: a table of commands and messages.

Each ends with exit code 2, and afterwards the user's folder is what it was, to the byte, and holds nothing
new. COMMAND => the telling words of its message: the value, and the way out. "[full disk] ..." runs under a
simulation of that name; (REASON) is the library's word.
"""

import errno
import importlib
import json
import os
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_lora
from hanokdiff import caption, files
from hanokdiff.compare import run
from hanokdiff.formats import embedding_file, hypernet_file, lora_file, single_file
from hanokdiff.formats.load import TINY_MODEL, load_model
from hanokdiff.methods import hypernetwork, lora
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.unet import UNet
from hanokdiff.tiny import world
from hanokdiff.training.dataset import LatentDataset

CATALOGUE = r"""
# photos: wrong path, wrong kind, nothing in it
train_lora --data nowhere => --data nowhere: no such folder; name one that holds photos
train_ti --data notes.txt => --data notes.txt: not a folder; name one that holds photos
train_dreambooth --data empty => --data empty: no pictures in it ... a number and a name, are searched
train_hypernet --data albums => --data albums: no pictures in it ... a number and a name, are searched
train_lora --data captions => --data captions: no pictures in it ... a number and a name, are searched
train_lora --data broken => broken has 0 readable photos (and 1 unreadable); add ... save it as JPEG
train_lora --data utf16 => utf16 has 0 readable photos (and 1 unreadable); add ... save it as UTF-8
train_lora --data photos --images 9 => but photos has 4 readable photos ... ; lower --images or add photos
train_lora --data photos --images 0 => --images 0: at least 1 is needed; leave it out to take them all
train_ti --data photos --held-out 4 => but photos has 4 readable photos ... ; lower --held-out or add photos
train_lora --data photos --images 3 --held-out 2 => but photos has 4 readable ... lower --images
train_lora --images 101 => 101 images asked for, but the tiny world has 1 to 100 photos
# captions and the pseudo word
train_lora --data castles => no caption contains '*', for example 'a castle'; give the ... with --token
train_lora --data bare --caption "a photo" => contains '*', for example 'a photo'; ... {token} into --caption
train_ti --data photos --token sks --replace "a castle" => no caption contains 'sks', for ... with --token
train_lora --token "" => --token is empty; name the pseudo word, such as "*" or "sks"
train_hypernet --token " " => --token is empty; name the pseudo word, such as "*" or "sks"
train_dreambooth --data bare => no caption contains "a building with a roof" ... without: --class-images 0
train_dreambooth --class-phrase "a * house" => contains the pseudo word "*"; name the class: "a house"
train_dreambooth --class-phrase " " => --class-phrase is empty; name what the ... of, such as "a house"
train_dreambooth --class-prompts nowhere.txt => nowhere.txt: no such file; name a text file
train_dreambooth --class-prompts photos => --class-prompts photos: a folder; name a ... with a prompt a line
train_dreambooth --class-prompts empty.txt => --class-prompts empty.txt: there is no ... it; write one a line
train_dreambooth --class-prompts utf16.txt => 'utf16.txt' is neither UTF-8 nor cp949; save it as UTF-8
train_dreambooth --class-prompts starred.txt => "a * house" contains the pseudo word "*"; name the class
train_ti --init "" => --init "" has no token; give words that name the kind of thing, such as house
# models: wrong path, wrong kind, damaged, of another time
train_lora --model nowhere --data photos => no model folder at "nowhere"; give a folder ... or "tiny"
train_lora --model "" --data photos => the model is ""; give a folder with ... a hub id, or "tiny"
train_lora --model no-unet => --model no-unet needs --data FOLDER: the drawn hanok are ... for the tiny model
train_lora --model notes.txt --data photos => notes.txt is a file, but not a ... holds model_index.json
train_lora --model notes.safetensors --data photos => cannot be read (REASON) ... fetch it again
train_ti --model empty.safetensors --data photos => empty.safetensors cannot be read (it is empty)
train_ti --model empty --data photos => empty/model_index.json is missing ... name the folder that holds it
train_lora --model no-unet --data photos => no-unet/unet/config.json is missing: not ... the diffusers layout
train_lora --model no-tokenizer --data photos => tokenizer/vocab.json is missing: not a ... --tokenizer
train_lora --model inpainting --data photos => inpainting: the UNet takes 9 channels ... are not supported
train_dreambooth --model sdxl --data photos => sdxl is a StableDiffusionXLPipeline ... Diffusion 1.x and 2.x
train_dreambooth --model sdxl.safetensors --data photos => an SDXL or unCLIP ... Diffusion 1.x and 2.x
train_lora --model future --data photos => scheduler_config.json does not describe ... scaled_linear, linear)
train_lora --model lora.safetensors --data photos => not a Stable Diffusion checkpoint ... --lora FILE
train_hypernet --model word.safetensors --data photos => not a Stable Diffusion checkpoint: of ... (one is *)
train_lora --model hyper-sd1.pt --data photos => not a .safetensors or .ckpt ... holds model_index.json
train_lora --model nobody/nothing --data photos => nor from the hub (REASON); name a local folder
train_lora --model model.safetensors --tokenizer empty --data photos => no tokenizer in empty ... --tokenizer
# numbers
train_lora --lr nan => --lr is nan, but must be a finite number
train_lora --lr inf => --lr is inf, but must be a finite number
train_lora --lr 0 => --lr is 0.0, but must be greater than 0
train_ti --lr -1 => --lr is -1.0, but must be greater than 0
train_lora --steps 0 => --steps is 0, but must be greater than 0
train_lora --steps 1.5 => --steps is 1.5, but must be a whole number
train_lora --steps many => --steps is many, but must be a whole number
train_lora --batch-size -1 => --batch-size is -1, but must be greater than 0
train_lora --batch-size 1000000 => --batch-size is 1000000, but must be at most 4096
train_lora --micro-batch 9 => --micro-batch is 9, but --batch-size only 8; lower it, or ... the whole batch
train_lora --micro-batch -1 => --micro-batch is -1, but must be 0 or more
train_lora --rank 0 => --rank is 0, but must be greater than 0
train_lora --rank 100000 => --rank is 100000, but must be at most 1280
train_lora --alpha inf => --alpha is inf, but must be a finite number
train_lora --text-rank -1 => --text-rank is -1, but must be 0 or more
train_ti --vectors 0 => --vectors is 0, but must be greater than 0
train_ti --vectors 76 => --vectors is 76, but must be at most 75
train_hypernet --layers 1 => layers are 1, but must begin and end with 1
train_hypernet --layers 1 0 1 => layers are 1 0 1, but each must be from 1/64 to 64
train_hypernet --layers 1 nan 1 => layers are 1 nan 1
train_hypernet --dropout -0.1 => --dropout is -0.1, but must be a number from 0 to below 1
train_hypernet --layers 1 2 => layers are 1 2, but must begin and end with 1, such ... multiple of the width
train_hypernet --layers 1 100 1 => layers are 1 100 1, but each must be from 1/64 ... are at most 32 of them
train_hypernet --layers 1 0.001 1 => layers are 1 0.001 1, but each must be from ... are at most 32 of them
train_hypernet --dropout 1 => --dropout is 1, but must be a number from 0 to below 1
train_hypernet --dropout nan => --dropout is nan, but must be a finite number
train_dreambooth --class-images -1 => --class-images is -1, but must be 0 or more
train_dreambooth --class-images 1000000000 => --class-images is 1000000000, but must be at most 100000
train_dreambooth --prior-weight -1 => --prior-weight is -1.0, but must be 0 or more
train_dreambooth --text-steps -1 => --text-steps is -1, but must be 0 or more
train_dreambooth --word-lr 0 => --word-lr is 0.0, but must be greater than 0
train_lora --resolution 63 => width is 63, but must be divisible by 4; the nearest is 64
train_lora --resolution -64 => width is -64, but must be divisible by 4; the nearest is 4
train_lora --resolution 1000000 => --resolution is 1000000, but must be at most 8192
# names of options, and of choices
train_lora --stepz 3 => --stepz is not known here: did you mean --steps?
train_lora --step 3 => --step is not known here
sample "*" --lor x => --lor is not known here
train_lora --device abacus => device "abacus" cannot be used
train_lora photos => photos is not known here: see --help; what has spaces in it needs quotes
train_lora --rank => --rank: expected one argument; see --help
train_lora --targets all => --targets is all, but must be one of cross-attention, ... attention+ff+conv
train_lora --prediction v => --prediction is v, but must be one of epsilon, v_prediction
train_lora --dtype fp8 => dtype "fp8" is not known; choose one of auto, fp32, bf16, fp16
train_lora --dtype fp16 => take bf16
train_lora --device cuda:99 => device "cuda:99" cannot be used (REASON); try cpu, or leave it out
train_hypernet --activation rellu => activation "rellu" is not known; ... torch's by their lower-case names
train_hypernet --activation softmax => --activation softmax mixes the pictures of a ... another, such as relu
train_hypernet --dropout 0.5 --layers 1 1 => --dropout needs an inner layer to leave ... as --layers 1 2 1
train_dreambooth --freeze-text --text-steps 3 => --freeze-text leaves nothing ... and --text-steps; leave
train_dreambooth --freeze-text --text-lr 1e-4 => --freeze-text leaves nothing to do for ... leave them out
train_dreambooth --class-images 0 --class-prompts starred.txt => --class-images is 0; leave one of them out
# where it goes, and what was there
train_lora --vectors 2 --token a.b => --token "a.b": the WebUI reads the word in a LoRA file ... leave out
train_lora --photo-set -1 => --photo-set is -1, but must be 0 or more
train_dreambooth --train cross-attention --text-lr 1e-4 => trains nothing of the text ... leave out --text-lr
train_dreambooth --train half => --train is half, but must be one of all, cross-attention, singular-values
sample "*" --delta lora.safetensors => holds neither Custom Diffusion's weights ... a LoRA is --lora
train_lora --out notes.txt => --out notes.txt is a file; name a folder
train_lora --out notes.txt/run => --out notes.txt/run cannot be made: notes.txt is a file; name a folder
train_lora --data photos --out photos => --out photos is not empty (it holds 0.png); ... for the run alone
train_lora --out finished => finished holds a finished run (lora.safetensors); name another --out
train_lora --resume finished --device cpu => finished holds a finished run ... is nothing to resume
train_lora --resume nowhere => --resume nowhere: no run was started there (it has no config.json)
train_lora --resume notes.txt => --resume notes.txt: no run was started there (it has no config.json)
train_ti --resume photos => --resume photos: no run was started there (it has no config.json)
[read-only] train_lora --out new/run => --out new/run cannot be written: HOME is read-only for you
[full disk] train_lora --class-images 0 --out new/run => new/run/config.json cannot be written ... unchanged
[full disk] train_lora --class-images 0 --out empty => empty/config.json cannot be written ... unchanged
[full disk] train_dreambooth --class-images 1 => runs/class/ ... cannot be written (No space ... unchanged
[no GPU memory] train_lora --class-images 0 => out of memory (CUDA out of memory ... lower --batch-size
[no GPU memory] train_dreambooth --class-images 1 --out new => out of memory (CUDA ... lower --batch-size
[no CPU memory] train_ti --out new/run => out of memory ([enforce fail] DefaultCPU ... lower --batch-size
# pictures
sample => nothing to draw: give a prompt, or --alert TEXT
sample "*" --n 0 => --n is 0, but must be at least 1
sample "*" --n 100000 => --n is 100000, but must be at most 10000; draw more with another --seed
sample "*" --steps -1 => --steps is -1, but must be at least 1
sample "*" --steps 1001 => steps is 1001, but must be between 1 and 1000
sample "*" --seed -1 => --seed is -1, but must be between 0 and 4294967295
sample "*" --seed 4294967303 => --seed is 4294967303, but must be between 0 and 4294967295
sample "*" --seed 4294967295 --n 2 => --seed is 4294967295, but must be between 0 and 4294967294
train_lora --seed 4294967296 => --seed is 4294967296, but must be between 0 and 4294967295
sample "*" --cfg nan => --cfg is nan, but must be a finite number
sample "*" --batch-size 0 => --batch-size is 0, but must be at least 1
sample "*" --clip-skip 99 => clip skip is 99, but the text encoder has 2 layers: 1 to 2
sample "*" --size 64 => --size is "64", but must be WIDTHxHEIGHT, such as 512x512
sample "*" --size 63x64 => width is 63, but must be divisible by 4; the nearest is 64
sample "*" --size 1000000x1000000 => width is 1000000, but must be at most 8192
sample "*" --sampler dpm => sampler "dpm" is not known; choose one of ddim, euler, ... dpmpp_2m_karras
sample "*" --strength 0.5 => --strength says how far to go from --init-image, which is not given
sample "*" --init-image nowhere.png => --init-image nowhere.png: no such file; name a file that is there
sample "*" --init-image photos => --init-image photos: a folder; name a file that is there
sample "*" --init-image notes.txt => 'notes.txt' cannot be read: not a picture ... save it as JPEG
sample "*" --init-image large.png --strength 1.5 => strength is 1.5: ... give a number from 0.05 to 1
sample "*" --lora nowhere.safetensors => --lora nowhere.safetensors: no such file; name a file that is there
sample "*" --lora finished => --lora finished: a folder; name a file that is there
sample "*" --lora empty.safetensors => empty.safetensors cannot be read (it is empty); ... fetch it again
sample "*" --lora model.safetensors => model.safetensors: tensor ... or diffusers' (unet....lora_A.weight)
sample "*" --lora lora-sd2.safetensors => lora-sd2.safetensors: ... the LoRA was made for another architecture
sample "*" --lora lora-sdxl.safetensors => lora-sdxl.safetensors holds a LoRA for SDXL ... Diffusion 1 and 2
sample "*" --lora lora.safetensors:strong => the strength is 'strong' ... as in lora.safetensors:0.8
sample "*" --lora lora.safetensors:nan => --lora lora.safetensors is nan, but must be a finite number
sample "*" --embedding lora.safetensors => not a textual inversion embedding: one tensor is expected, 96 found
sample "*" --embedding word-sd1.safetensors => vectors of width 768 (SD 1.x), but tiny's words have 72
sample "*" --embedding word.safetensors --embedding word-too.safetensors => two ... word-too.safetensors:WORD
sample "*" --embedding "word.safetensors: " => " " has no token
sample "*" --hypernet lora.safetensors => lora.safetensors is not a hypernetwork: it ... numbers (such as 768)
sample "*" --hypernet hyper-sd1.pt => hyper-sd1.pt rewrites width 768 (SD 1.x), but ... to widths 72, 80, 96
sample "*" --hypernet empty.pt => empty.pt cannot be read (it is empty); it is damaged or ... fetch it again
sample "*" --model lora.safetensors => not a Stable Diffusion checkpoint: of ... to sample.py as --lora FILE
sample "*" --model finished => finished/model_index.json is missing: not a model folder ... name the folder
sample "*" --model dreambooth => dreambooth/model_index.json is missing: not a model ... name dreambooth/model
sample "a" "b" --out large.png => --out large.png is a file; name a folder
sample "*" --prompt a => --prompt is not known here: see --help; what has spaces in it needs quotes
sample "*" --alert "한옥 화재 발생" => --alert makes the prompt itself; leave out either the prompts
sample --alert "한옥 화재 진화 훈련" => no picture (drill): this is a drill or a test in "한옥 화재 진화 훈련"
sample --alert hello => no picture (unknown): no disaster found in "hello"
[read-only] sample "*" => --out runs/samples cannot be written: HOME is read-only for you; name another folder
[full disk] sample "*" --steps 1 --out new/pictures => new/pictures/00000-0.png cannot be ... unchanged
[no GPU memory] sample "*" => out of memory (CUDA out of memory ... a lower --batch-size or a smaller --size
# scores
clipscore => the following arguments are required: IMAGE_OR_FOLDER; see --help
clipscore nowhere => nowhere does not exist; give pictures, or folders of them
clipscore empty => empty holds no pictures ... searched, so give the one that holds them
clipscore albums --prompt a => albums holds no pictures ... searched, so give the one that holds them
clipscore notes.txt --prompt a => none of the 1 pictures can be read, notes.txt first; give some that can
clipscore photos => photos/0.png has no prompt to be scored with; give one: --prompt TEXT
clipscore large.png --prompt a => large.png is 600 px on ... another: --clip openai/clip-vit-base-patch32
clipscore photos --prompt a --clip photos => --clip photos: the folder cannot be opened ... merges.txt)
clipscore photos --prompt a --clip some/where/else => --clip some/where/else: no such folder ... hub id
clipscore photos --prompt a --presence "a hanok" => must name at least 2 different ... "a hanok|a barn"
clipscore photos --prompt a --replace-token "*" "a hanok" => none of the 4 prompts holds "*"
clipscore photos --prompt a --replace-token "*" => --replace-token: expected 2 arguments; see --help
clipscore photos bare --prompt a --reference nowhere => nowhere does not exist; give ... or folders of them
clipscore photos photos --prompt a --paired => of the 2 paths 1 are; give two: clipscore.py A B --paired
clipscore photos --prompt a --json nowhere/a.json => --json nowhere/a.json cannot be ... exists and is yours
clipscore photos --prompt a --json empty => --json empty is a folder; name a file in it
clipscore photos --prompt a --csv photos/0.png => is there and would be replaced; name one that ends in .json
clipscore photos --prompt a --json a.json --csv a.json => --json and --csv are both a.json; name two files
[full disk] clipscore photos --prompt a --csv a.csv => a.csv cannot be written (No space ... unchanged
# captions, alerts
caption => the following arguments are required: FOLDER; see --help
caption nowhere => nowhere: no such folder; name one that holds photos
caption photos/0.png => photos/0.png: not a folder; name one that holds photos
caption empty => empty: no pictures in it ... a number and a name, are searched
caption broken => none of the 1 photos in broken can be used, 'a.png' first; what is ... each is told above
caption utf16 => none of the 1 photos in utf16 can be used, '0.png' first; what is ... each is told above
caption photos --replace castle "*" => 'castle' or a variant of it, for ... phrase that means your subject
caption photos --replace "a building" "" => --replace needs a phrase and a word, such as ... one is empty
caption photos --replace castle => 'castle' or a variant of it, for ... phrase that means your subject
caption photos --replace => --replace needs a phrase, and may name the word after it; see --help
caption photos --replace castle sks --token "*1" => --replace names "sks", but --token ... one of them out
train_ti --token "*1" --replace castle sks => --replace names "sks", but --token "*1"; leave one of them out
caption photos --exact => --exact is about --replace, which is not there; leave it out
caption photos --batch-size 0 => --batch-size is 0, but must be 1 or more
caption photos --min-length 50 => --min-length 50 is more than --max-length 48; lower it
caption bare --blip empty => --blip empty: the folder cannot be opened ... name a folder with a whole BLIP
caption bare --blip notes.txt => --blip notes.txt: not a folder; give one that ... blip-image-captioning-base
[full disk] caption castles --replace "a castle" "*" => castles/0.txt cannot be written ... unchanged
alert => the following arguments are required: text; see --help
alert "" => the message is empty; give its text, in quotes
alert "한옥 화재 발생" --adapter photos => --adapter photos: no run's config.json ... give it as --token
alert "한옥 화재 발생" --adapter photos --token a => --token and --adapter both give ... leave one out
alert 한옥마을 화재 발생 => 화재 is not known here: see --help; what has spaces in it needs quotes
# comparisons
compare --sizes 0 => --sizes is 0, but must be at least 1
compare --sizes 5.5 => --sizes is 5.5, but must be a whole number
compare --sizes 5 5 => --sizes 5 5 names something twice; name each once
compare --sizes 1000 => 1000 images asked for, but the tiny world has 1 to 100 photos
compare --seeds -1 => --seeds is -1, but must be 0 or more
compare --n 100000 => --n is 100000, but must be at most 10000
compare --sampling-steps 2000 => steps is 2000, but must be between 1 and 1000
compare --preset best worst => --preset is worst, but must be one of best, paper, ... factorial, frontier
compare --at 0.5 => --at 0.5: shares of the steps, above 0 and up to 1, and 1 itself among them, such as 0.5 1
compare --strengths nan 1 => --strengths nan 1: numbers, and 1 among them, such as 0.5 1
compare --jobs 0 => --jobs is 0, but must be at least 1
compare --prompts "a house" => the prompt "a house" lacks the pseudo word "*"; write it, or {token}, into it
compare --token "" => --token is empty; say it in words, or leave it out
compare --subject "" => --subject is empty; say it in words, or leave it out
compare --conditions "" => "" must name 2 different things or more, the wanted one first: "a hanok|a barn"
compare --shard 5/4 => --shard is 5/4, but must be I/N with I from 1 to N, such as 1/4
compare --merge photos => --merge photos: no comparison was started there (it has no manifest.json)
compare --out notes.txt/x => --out notes.txt/x cannot be made: notes.txt is a file; name a folder
compare --model no-unet => --model no-unet needs --data FOLDER, the photos, and ... openai/clip-vit-base
compare --data empty => --data empty: no pictures in it ... a number and a name, are searched
compare --data photos => --sizes asks for 100 photos, and at least 2 more are held ... lower --sizes or add
compare --recipe "loha --rank 4" => "loha --rank 4" is none of those ... as in "small=lora --rank 4"
compare --recipe "a=loha" => "a=loha" must be NAME=METHOD OPTIONS ... hypernet, as in "small=lora --rank 4"
compare --recipe "a=lora --rank x" => --recipe "lora --rank x": --rank is x, but must be a whole number
compare --recipe "a=lora --rank 0" => --rank is 0, but must be greater than 0
compare --recipe "a=lora --seed=1" => --recipe "lora --seed=1" may not set --seed, ... sets for every cell
compare --recipe "a=lora 'unclosed" => --recipe "a=lora 'unclosed": No closing quotation
compare --recipe "a=ti --vectors 100" => --vectors is 100, but must be at most 75
# other layouts
convert tiny => the following arguments are required: OUT; see --help
convert nowhere.safetensors a.safetensors => no file at nowhere.safetensors
convert photos a.safetensors => photos/model_index.json is missing: not a model folder in ... name the folder
convert empty.pt a.pt => empty.pt cannot be read (it is empty); it is damaged or incomplete, fetch it again
convert sdxl.safetensors a => sdxl.safetensors is an SDXL or unCLIP ... Stable Diffusion 1.x and 2.x
convert model.safetensors model.safetensors --overwrite => model.safetensors is there ... name another OUT
convert no-unet a.safetensors => no-unet/unet/config.json is missing: not a complete ... diffusers layout
convert tiny lora.safetensors => lora.safetensors is there already; name another OUT, or add --overwrite
convert tiny a.ckpt => a.ckpt does not end in .safetensors, which is what a model is written as
convert tiny photos --overwrite --dtype fp16 => photos is there already and holds other ... name another OUT
convert tiny notes.txt/a.safetensors => OUT notes.txt/a.safetensors: notes.txt is a file; name a folder
convert tiny a.safetensors --dtype fp8 => --dtype is fp8, but must be one of fp32, bf16, fp16
convert tiny a.safetensors --to kohya => --to means nothing for tiny, a file of kind model; leave it out
convert lora.safetensors a.pt => a.pt does not end in .safetensors, which is what a LoRA is written as
convert lora.safetensors a.safetensors --to kohya => nothing to do: lora.safetensors is a ... layout already
convert lora-sdxl.safetensors new/a.safetensors => holds a LoRA for SDXL ... Stable Diffusion 1 and 2
convert word.safetensors a.bin => a.bin does not end in .safetensors or .pt, which is what ... is written as
convert word.safetensors word-too.safetensors => word-too.safetensors is there already; ... or add --overwrite
[full disk] convert tiny new/a.safetensors => new/a.safetensors cannot be written (No space ... unchanged
[read-only] convert tiny a.safetensors => OUT a.safetensors: . cannot be written: HOME ... name another folder
"""
TRAINING = "--steps 1 --preview-every 0 --device cpu"  # an unnoticed mistake does not take minutes
OTHERS = ("caption", "alert", "convert")  # python -m hanokdiff.NAME
LIBRARY = "Torch not|Found no NVIDIA|CUDA error|CUDA driver|We couldn't|Cannot find|Error while"
REASONS = rf"\((?:{LIBRARY}).*?\)(?=[;,:])"


def rows() -> dict[str, str]:
    """Command -> the words of its message."""
    lines = [line for line in CATALOGUE.splitlines() if line and not line.startswith("#")]
    found = dict(line.split(" => ") for line in lines)
    assert len(found) == len(lines)
    return found


# ------------------------------------------------------------------------------------------ the user's folder


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def copy_tiny(folder: Path, *without: str) -> None:
    shutil.copytree(TINY_MODEL, folder, ignore=lambda *_: without)


def one_layer(path: Path, width: int, out: int, layer: str) -> None:
    down, up = torch.ones(2, width), torch.ones(out, 2)
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, path)


def write_photos(root: Path) -> None:
    for i, (image, text) in enumerate(world.photos(4)):
        (root / "photos").mkdir(exist_ok=True)
        image.save(root / "photos" / f"{i}.png")
        (root / "photos" / f"{i}.txt").write_text(text)
    for folder, text in (("bare", None), ("castles", b"a castle"), ("utf16", "집".encode("utf-16"))):
        (root / folder).mkdir()
        shutil.copy(root / "photos" / "0.png", root / folder)
        if text:
            (root / folder / "0.txt").write_bytes(text)
    for file, content in {
        "broken/a.png": b"hello",
        "captions/a.txt": b"*",
        "empty.txt": b"",
        "utf16.txt": b"\xff\xfea\0",
        "notes.txt": b"hello",
        "notes.safetensors": b"hello",
        "empty.safetensors": b"",
        "empty.pt": b"",
        "starred.txt": b"a * house",
    }.items():
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(content)
    (root / "empty").mkdir()
    shutil.copytree(root / "bare", root / "albums" / "2023")
    Image.new("RGB", (600, 600), "red").save(root / "large.png")


def write_models(root: Path) -> None:
    sd = load_model("tiny", "cpu", log=None)
    lora_file.save_file(root / "lora.safetensors", own := lora.insert(sd, 2, 2), {"hanokdiff_token": "*"})
    lora.remove(sd, own)
    attention = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    one_layer(root / "lora-sd2.safetensors", 1024, 1280, attention)
    one_layer(root / "lora-sdxl.safetensors", 2048, 640, attention.replace("mid_block", "input_blocks_4_1"))
    for name, width in (("word", 72), ("word-too", 72), ("word-sd1", 768)):
        embedding_file.save_file(root / f"{name}.safetensors", "*", torch.ones(1, width))
    spec = hypernetwork.HypernetConfig()
    pair = [hypernetwork.ResidualMLP(768, spec).state_dict()] * 2
    hypernet_file.save_file(root / "hyper-sd1.pt", spec, {768: pair})
    parts = sd.unet, sd.vae, sd.text.encoder, sd.schedule
    single_file.save_file(root / "model.safetensors", *parts, torch.float16)
    names = "conditioner.embedders.0.x", "model.diffusion_model.x"
    save_file({name: torch.ones(1) for name in names}, root / "sdxl.safetensors")
    copy_tiny(root / "no-unet", "unet")
    copy_tiny(root / "no-tokenizer", "tokenizer")
    copy_tiny(root / "inpainting")
    edit(root / "inpainting" / "unet" / "config.json", in_channels=9)
    weights = root / "inpainting" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "conv_in.weight": torch.ones(len(tensors["conv_in.weight"]), 9, 3, 3)}, weights)
    (root / "sdxl").mkdir()
    shutil.copy(TINY_MODEL / "model_index.json", root / "sdxl")
    (root / "dreambooth" / "model").mkdir(parents=True)
    shutil.copy(TINY_MODEL / "model_index.json", root / "dreambooth" / "model")
    second = ["transformers", "CLIPTextModelWithProjection"]
    edit(root / "sdxl" / "model_index.json", _class_name="StableDiffusionXLPipeline", text_encoder_2=second)
    copy_tiny(root / "future")
    edit(root / "future" / "scheduler" / "scheduler_config.json", beta_schedule="quantum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All that the user has; after the last row, once more, every byte of it is looked at."""
    root = tmp_path_factory.mktemp("user") / "home"
    root.mkdir()
    write_photos(root)
    write_models(root)
    argv = f"{TRAINING} --data {root / 'photos'} --out {root / 'finished'} --rank 1 --class-images 0"
    assert train_lora.main(argv.split()) == 0
    before = {f: f.read_bytes() for f in root.rglob("*") if f.is_file()}
    yield root
    assert before == {f: f.read_bytes() for f in root.rglob("*") if f.is_file()}


def listing(root: Path) -> dict:
    """Every file and folder; of small files what is in them, of large ones their size, time and place."""

    def told(f: Path):
        s = f.stat()
        return s.st_size, s.st_mtime_ns, s.st_ino, s.st_size < 100_000 and f.read_bytes()

    return {str(f): None if f.is_dir() else told(f) for f in root.rglob("*")}


# ------------------------------------------------------------------------------------------------ simulations


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_gpu_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")


def no_cpu_memory(*_, **__):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.")


SIMULATIONS = {
    "full disk": lambda patch: patch.setattr(files, "sync_rename", full),
    "read-only": lambda patch: patch.setattr(os, "access", lambda *_: False),
    "no GPU memory": lambda patch: (patch.setattr(UNet, "forward", no_gpu_memory),
                                    patch.setattr(StableDiffusion, "sample", no_gpu_memory)),
    "no CPU memory": lambda patch: patch.setattr(UNet, "forward", no_cpu_memory),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- the rows


def start(command: str):
    """(main, arguments) of a command as it would be typed."""
    name, *argv = shlex.split(command)
    modules = {"compare": "hanokdiff.compare.__main__", **{n: f"hanokdiff.{n}" for n in OTHERS}}
    extra = TRAINING.split() if name.startswith("train_") and "--resume" not in argv else []
    return importlib.import_module(modules.get(name, name)).main, extra + argv


@pytest.mark.parametrize("command", rows())
def test_mistake(folder, monkeypatch, capfd, command):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("the work has begun"))
    before, (simulation, plain) = listing(folder), re.fullmatch(r"(?:\[(.*?)\] )?(.*)", command).groups()
    if simulation:
        SIMULATIONS[simulation](monkeypatch)
    main, argv = start(plain)
    assert main(argv) == 2
    lines = re.split("[\r\n]", capfd.readouterr().err)
    (line,) = [line for line in lines if not re.search(r"^note: |/\d+ \[|^$", line)]  # one sentence
    line = re.sub(REASONS, "(REASON)", line).replace(str(folder), "HOME")
    words = ".*".join(map(re.escape, rows()[command].split(" ... ")))
    assert line.startswith("error: ") and re.search(words, line), line
    assert listing(folder) == before


def test_the_catalogue():
    """Every command is in it, and no message is without its command."""
    names = {re.sub(r"^\[.*?\] ", "", command).split()[0] for command in rows()}
    scripts = "train_ti train_dreambooth train_lora train_hypernet sample clipscore compare"
    assert names == {*scripts.split(), *OTHERS}
    assert len(rows()) > 190 and all(rows().values())


# ----------------------------------------------------------------------------------------- what is no mistake


def test_names_and_captions_as_koreans_have_them(tmp_path, monkeypatch, capsys):
    """Folders with spaces, names in Korean and emoji; captions of old and new Windows: a training understands
    them as they are, and caption.py puts the pseudo word into them, in UTF-8."""
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "내 사진 2023 \U0001f3e0"
    photos.mkdir()
    captions = {
        "한옥 1.png": "눈 내린 기와집".encode("cp949"),
        "\U0001f3e0.png": "밤의 기와집".encode("utf-8-sig"),
        "my house.png": "기와집,\r\n비 오는 날\r\n".encode(),
        "낮\U0001f31e (2).png": "기와집\n".encode(),
    }
    for (name, text), (image, _) in zip(captions.items(), world.photos(4), strict=True):
        image.save(photos / name)
        (photos / name).with_suffix(".txt").write_bytes(text)
    seen, init = [], LatentDataset.__init__
    spy = lambda *args, **how: (seen.extend(args[3]), init(*args, **how))[1]  # noqa: E731
    monkeypatch.setattr(LatentDataset, "__init__", spy)
    how = "--steps 2 --batch-size 2 --rank 1 --class-images 0 --preview-every 0 --device cpu".split()
    out = tmp_path / "내 결과 \U0001f525" / "첫 번째"
    assert train_lora.main(["--data", str(photos), "--replace", "기와집", "--out", str(out), *how]) == 0
    assert "1 captioned in cp949 instead of UTF-8 ('한옥 1.png')" in capsys.readouterr().out
    wanted = {"눈 내린 *", "밤의 *", "*, 비 오는 날", "*"}
    assert set(seen) == wanted and (out / "lora.safetensors").is_file()

    assert caption.main([str(photos), "--replace", "기와집", "*"]) == 0
    assert "4 captions replaced" in capsys.readouterr().out
    assert {f.read_bytes() for f in photos.glob("*.txt")} == {f"{text}\n".encode() for text in wanted}
    assert len(list(photos.iterdir())) == 8
