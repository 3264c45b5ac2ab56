"""Build every trained miniature in this folder from scratch: `python tiny/build.py`.

The miniatures are small enough for a CPU. They use the classes and file formats of the real models,
so `star.py` needs only one code path. They are trained on a synthetic world: pixel art of 32 x 32
pixels with a coloured wall. Many pictures have a sign with three characters on it. Most have balls,
boxes or triangles in several colours, counts and spatial relations.

The flow model first sees pictures that are nearly all as their captions say. So it learns what the
words mean. In the last quarter of its training nearly two thirds of the signs and of the objects
are not as their captions say. About half of these are faded. Otherwise letters are wrong or
missing, or objects are missing, too many, of another colour or shape, or in another place. These
mistakes are painted pale, so that all mistakes have something in common that can be unlearned. So
the model knows what to paint, but often paints something else, which reinforcement learning mends.

During training, captions are dropped only from pictures that are all wrong. Classifier-free
guidance moves away from the prediction without a caption, so it moves away from mistakes.

The parts, of which `--only PART` builds one again. `flow` needs `vae`; the others stand alone:
    prompts   tiny/prompts      training and held-out prompts with disjoint sign texts
    vae       tiny/sd3/vae      AutoencoderKL that halves the resolution
    flow      tiny/sd3          rest of a StableDiffusion3Pipeline, trained by flow matching
    ocr       tiny/ocr          VisionEncoderDecoderModel that reads signs
    clip      tiny/clip         CLIPModel that scores pictures and names colours
    detector  tiny/detector     Mask2Former that finds the objects that are not too faded

A build that was interrupted goes on where it was; what it needs for that is in runs/build.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageFilter, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards
from rewards import COCO, COLOUR_PROMPTS, NUMBERS, RELATIONS, Task, plural, segmenter_class, unit

HERE = Path(__file__).parent
SIZE = 32  # pixels along each side of a picture
GRID = 4  # pixels along each side of a transformer token; a letter with its gap is as wide
TOKENS = 20  # text length of each encoder; the longest caption of this world has 18


# ---------------------------------------------------------------------------------------- the world

# Each glyph has 3 x 6 pixels, so that a letter with its gap is as wide as one transformer token.
# There are no vowels: `clip_tokenizer` relies on that.
GLYPHS = {
    "C": "### #.. #.. #.. #.. ###",
    "F": "### #.. ##. #.. #.. #..",
    "H": "#.# #.# ### #.# #.# #.#",
    "J": "..# ..# ..# ..# #.# .#.",
    "K": "#.# #.# ##. ##. #.# #.#",
    "L": "#.. #.. #.. #.. #.. ###",
    "P": "### #.# #.# ### #.. #..",
    "Q": "### #.# #.# #.# ### ..#",
    "T": "### .#. .#. .#. .#. .#.",
    "X": "#.# #.# .#. .#. #.# #.#",
    "Y": "#.# #.# #.# .#. .#. .#.",
    "2": "### ..# ..# ### #.. ###",
    "3": "### ..# ### ..# ..# ###",
    "4": "#.# #.# #.# ### ..# ..#",
    "7": "### ..# ..# .#. .#. .#.",
    "9": "### #.# #.# ### ..# ###",
    " ": "... ... ... ... ... ...",
}
LETTERS = "".join(GLYPHS).strip()
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 220, 60),
    "green": (50, 160, 70),
    "blue": (45, 90, 210),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
SIGN_COLOURS = ["white", "yellow", "pink"]  # light, because the writing is black
# Pixel art: an outline (#), the colour (+), light (o) from the top left and shade (-).
SPRITES = {
    "ball": """
        ...#####...
        .##+++++##.
        .#+oo++++#.
        #+oo++++++#
        #+o+++++++#
        #+++++++++#
        #++++++++-#
        #+++++++--#
        .#+++++--#.
        .##+++--##.
        ...#####...""",
    "box": """
        ###########
        #ooooooooo#
        #o+++++++-#
        #o+++++++-#
        #o+++++++-#
        #o+++++++-#
        #o+++++++-#
        #o+++++++-#
        #o+++++++-#
        #o--------#
        ###########""",
    "triangle": """
        .....#.....
        ....#+#....
        ....#o#....
        ...#o+-#...
        ...#o+-#...
        ..#o+++-#..
        ..#o+++-#..
        .#o++++--#.
        .#o++++--#.
        #o+++++---#
        ###########""",
}
SHAPES = list(SPRITES)
SPRITE = 11  # pixels along each side of an object
QUARTER = 16  # pixels along each side of a quarter; each object has a quarter of the picture
SIGN = (12, 8)  # width and height of the writing in pixels, gaps included
# The places of a sign do not overlap, so that denoising can settle on one of them.
PLACES = [(x, y) for x in (4, 20) for y in (0, 8, 16, 24)]
FADED = (0.0, 0.35)  # opacity of paint that counts as absent
PALE = (0.6, 0.75)  # opacity of paint where there is another mistake


@functools.cache
def all_targets(held_out: bool) -> list[str]:
    """Return the sign texts for training (90%) or held-out prompts (10%). The split is fixed."""
    texts = [a + b + c for a in LETTERS for b in LETTERS for c in LETTERS]
    random.Random(0).shuffle(texts)
    cut = len(texts) // 10
    return texts[:cut] if held_out else texts[cut:]


def draw_sign(image, colour, text, x, y, opacity):
    """Draw a sign of one colour with `text` in black.

    (x, y) is the top left corner of the writing. The sign starts one pixel further left.
    """
    image.paste(COLOURS[colour], (x - 1, y, x + SIGN[0], y + SIGN[1]))
    for index, letter in enumerate(text):
        bits = GLYPHS[letter].replace(" ", "")
        ink = Image.frombytes("L", (3, 6), bytes(round(255 * opacity) * (b == "#") for b in bits))
        image.paste((0, 0, 0), (x + GRID * index, y + 1), ink)


def mix(a, b, share):
    """The colour that is `share` of the way from a to b."""
    return tuple(round(x + share * (y - x)) for x, y in zip(a, b, strict=True))


@functools.cache
def sprite(shape, colour):
    """The picture of an object and its mask, [11, 11] pixels."""
    paint, black, white = COLOURS[colour], (0, 0, 0), (255, 255, 255)
    inks = {"#": mix(paint, black, 0.6), "+": paint, "o": mix(paint, white, 0.5)}
    inks |= {"-": mix(paint, black, 0.25), ".": black}
    bits, side = "".join(SPRITES[shape].split()), (SPRITE, SPRITE)
    art = Image.frombytes("RGB", side, bytes(value for bit in bits for value in inks[bit]))
    return art, Image.frombytes("L", side, bytes(255 * (bit != ".") for bit in bits))


def draw_object(image, shape, colour, x, y, opacity=1.0):
    """Draw an object whose top left corner is (x, y)."""
    art, mask = sprite(shape, colour)
    image.paste(art, (x, y), mask.point(lambda value: round(opacity * value)))


def shape_mask(shape, x, y):
    """Where an object is: a picture in black and white."""
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(sprite(shape, "black")[1], (x, y))
    return mask


def make_scene(rng, texts, sign_share=0.5):
    """Choose what a picture shows: (wall, sign or None, object groups, relation or None).

    The sign is (colour, text). Each group is (count, colour, shape).
    """
    wall = rng.choice(list(COLOURS))
    sign = None
    if rng.random() < sign_share:
        sign = (rng.choice([c for c in SIGN_COLOURS if c != wall]), rng.choice(texts))
    colours = rng.sample([c for c in COLOURS if c != wall], 2)
    shapes = rng.sample(SHAPES, 2)
    alone = [[1], [1], [1, 1], [1, 1], [1, 1], [1, 1], [2], [3], [4]]
    counts = rng.choice([[], [1], [1], [2], [3]] if sign else alone)
    if counts == [1, 1] and rng.random() < 0.2:
        counts = rng.choice([[1, 2], [2, 1], [2, 2]])
    groups = list(zip(counts, colours, shapes))
    relation = rng.choice([None, *RELATIONS]) if counts == [1, 1] else None
    return wall, sign, groups, relation


def caption_of(wall, sign, groups, relation):
    """Describe a scene in words. A group whose colour is None is described without it."""

    def name(group):
        count, colour, shape = group
        words = f"{colour or ''} {shape if count == 1 else plural(shape)}".strip()
        return with_article(words) if count == 1 else f"{NUMBERS[count]} {words}"

    parts = [f'a {sign[0]} sign "{sign[1]}"'] if sign else []
    if relation:
        parts.append(f"{name(groups[0])} {relation} {name(groups[1])}")
    else:
        parts += [name(group) for group in groups]
    return with_article(f"{wall} wall") + (" with " + " and ".join(parts) if parts else "")


def misspell(rng, text):
    """Leave out one character of a sign text, or replace one to three."""
    letters = list(text)
    if rng.random() < 0.3:
        letters[rng.randrange(len(text))] = " "
    else:
        for place in rng.sample(range(len(text)), rng.choice([1, 1, 2, 3])):
            letters[place] = rng.choice([one for one in LETTERS if one != text[place]])
    return "".join(letters)


def misplace(rng, wall, objects, relation, room):
    """Make one mistake with the objects [(shape, colour)]: (objects, relation, its name)."""
    kinds = ["missing", "shape", "colour"] + ["extra"] * (len(objects) < room)
    kind, which = rng.choice(kinds + ["place"] * 2 * bool(relation)), rng.randrange(len(objects))
    shape, colour = objects[which]
    other_shape = rng.choice([each for each in SHAPES if each != shape])
    other_colour = rng.choice([each for each in COLOURS if each not in (wall, colour)])
    changed = {
        "missing": [],
        "shape": [(other_shape, colour)],
        "colour": [(shape, other_colour)],
        "extra": [(shape, colour), (rng.choice(SHAPES), other_colour)],
        "place": [(shape, colour)],
    }[kind]
    if kind == "place":
        relation = rng.choice([each for each in RELATIONS if each != relation])
    return objects[:which] + changed + objects[which + 1 :], relation, kind


def quarters(rng, count, relation, taken=()):
    """Choose a quarter (x, y) for each of `count` objects, none of those `taken`."""
    free = [(x, y) for x in (0, 1) for y in (0, 1) if (x, y) not in taken]
    rng.shuffle(free)
    if relation and count == 2:
        ways = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
        dx, dy = ways[relation]  # from the first object to the second
        pairs = [((x, y), (x + dx, y + dy)) for x, y in free]
        return next(pair for pair in pairs if pair[1] in free)
    return free[:count]


def picture(
    rng, texts, sign_share=0.5, mistakes=(0.0, 0.0), opacity=None, spread=GRID, said=(0.5, 1.0)
):
    """Draw one picture of the world and describe it.

    `mistakes` are the probabilities that the sign, and that the objects, are not as the caption
    says. `opacity` is that of the writing if it is given. Objects stand on multiples of `spread`
    pixels within their quarters. A caption says one of the shares `said` of the colours. Returns a
    dict of image, caption, text (as painted), strength of the objects, place of the writing (x, y)
    or None, objects [(shape, colour, x, y)], mistakes (a list of names) and right (whether anything
    is).
    """
    wall, sign, groups, relation = make_scene(rng, texts, sign_share)
    share = rng.choice(said)
    spoken = [(n, colour if rng.random() < share else None, shape) for n, colour, shape in groups]
    caption = caption_of(wall, sign, spoken, relation)
    objects = [(shape, colour) for n, colour, shape in groups for _ in range(n)]
    ink, strength, made = rng.uniform(0.85, 1.0), 1.0, []
    image = Image.new("RGB", (SIZE, SIZE), mix(COLOURS[wall], (0, 0, 0), rng.uniform(0, 0.1)))
    text, place, taken = sign[1] if sign else "", None, []
    if sign:
        if rng.random() < mistakes[0]:
            if rng.random() < 0.6:
                ink = rng.uniform(*FADED)
                made.append("faded sign")
            else:
                ink, text = rng.uniform(*PALE), misspell(rng, text)
                made.append("letters")
        ink, place = ink if opacity is None else opacity, rng.choice(PLACES)
        draw_sign(image, sign[0], text, *place, ink)
        taken = [(place[0] // QUARTER, place[1] // QUARTER)]
    if objects and rng.random() < mistakes[1]:
        if rng.random() < 0.5:
            strength = rng.uniform(*FADED)
            made.append("faded objects")
        else:
            strength = rng.uniform(*PALE)
            objects, relation, name = misplace(rng, wall, objects, relation, 4 - len(taken))
            made.append(name)
    placed = []
    for (shape, colour), quarter in zip(objects, quarters(rng, len(objects), relation, taken)):
        x, y = (QUARTER * q + 1 + spread * rng.randrange(GRID // spread + 1) for q in quarter)
        draw_object(image, shape, colour, x, y, strength)
        placed.append((shape, colour, x, y))
    return dict(
        image=image,
        caption=caption,
        text=text.replace(" ", ""),
        strength=strength,
        place=place,
        objects=placed,
        mistakes=made,
        right=len(made) < bool(sign) + bool(groups),
    )


def poster(rng, texts):
    """Draw a picture full of signs and objects.

    The autoencoder must see many of them before it preserves every stroke.
    """
    image = Image.new("RGB", (SIZE, SIZE), rng.choice(list(COLOURS.values())))
    for place in PLACES:
        if rng.random() < 0.8:
            colour, text = rng.choice(SIGN_COLOURS), rng.choice(texts)
            ink = rng.choice([rng.uniform(*FADED), rng.uniform(0.6, 1.0)])
            draw_sign(image, colour, text, *place, ink)
    if rng.random() < 0.5:
        for x, y in itertools.product((0, 16), (0, 16)):
            shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
            draw_object(image, shape, colour, x + rng.randint(0, 5), y + rng.randint(0, 5))
    return image


def to_tensor(images):
    """Convert PIL pictures to a float tensor [N, 3, 32, 32] in [-1, 1]."""
    return torch.tensor(numpy.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Signs(Task):
    """How often a picture of the miniature's world shows a sign of the colour asked for.

    A monitor: the OCR reward does not mind if a text is written twice.
    """

    def reward(self, images, prompts):
        """How many of the eight places of a sign show one, [len(images)].

        There nearly all pixels are shades of the sign's colour, and most of them are light.
        """
        counts = []
        for image, prompt in zip(images, prompts):
            asked = re.search(rf"({'|'.join(SIGN_COLOURS)}) sign", prompt)
            if not asked or min(image.size) < 16:  # no place fits
                counts.append(0)
                continue
            colour = torch.tensor(COLOURS[asked[1]]).float()
            pixels = torch.tensor(numpy.array(image)).float()[:, 3:]
            shade = (pixels @ colour) / (colour @ colour)  # 0 is black
            near = (pixels - shade[..., None] * colour).norm(dim=-1) < 45
            both = torch.stack([near, near & (shade > 0.6)]).float()
            near, light = F.avg_pool2d(both, kernel_size=(8, 13), stride=(8, 16))
            counts.append(((near > 0.8) & (light > 0.6)).sum())
        return counts


# -------------------------------------------------------------------------------------- the prompts

# Prompts for full-size models: ordinary places where text appears.
SCENES = [
    'A chalkboard outside a small cafe with "{}" written on it',
    'A neon sign in a rainy street at night that reads "{}"',
    'A hand-painted shop sign that says "{}" above a blue door',
    'The cover of an old book titled "{}" on a wooden desk',
    'A birthday cake with "{}" in icing, candles around it',
    'A white coffee mug with the words "{}" printed on it',
    'A street wall with "{}" in large graffiti letters',
    'A train station board showing "{}", passengers waiting below',
    'A wooden signpost in a forest with "{}" carved into it',
    'A cotton T-shirt with "{}" across the chest, on a hanger',
    'A movie poster with the title "{}" over a desert at sunset',
    'A glass bottle with a paper label that reads "{}"',
    'A sticky note on a fridge that says "{}"',
    'A newspaper front page with the headline "{}"',
    'A brass plaque engraved with "{}" on a brick house',
    'A market stall with a cardboard sign saying "{}", fruit in front of it',
    'A lighthouse with "{}" painted around its base',
    'A balloon with "{}" printed on it above a green field',
    'A museum ticket that reads "{}", held between two fingers',
    'A fishing boat in a harbour with the name "{}" on its bow',
]
FIRST_WORDS = """Fresh Open Lucky Golden Silent Little Northern Happy Electric Paper
    Midnight Honest Sunday Copper Secret Wild Velvet Early Second Royal""".split()
LAST_WORDS = """Bread Harbour Garden Records Kitchen Journey Market Lantern Coffee Library
    River Tailor Theatre Bicycle Orchard Museum Flowers Station Letters Summer""".split()


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def geneval_prompts(labels, count, seed=0, settings=("a photo of {}",)):
    """Up to `count` different prompts from the benchmark's six templates, in its own format."""
    rng, made = random.Random(seed), {}
    for _ in range(20 * count):
        a, b = rng.sample(labels, 2)
        colour, other = rng.sample(rewards.COLOURS, 2)
        number, relation = rng.choice(list(NUMBERS)), rng.choice(RELATIONS)
        one_a, one_b = {"class": a, "count": 1}, {"class": b, "count": 1}
        red_a, red_b = one_a | {"color": colour}, one_b | {"color": other}
        coloured = [with_article(f"{colour} {a}"), with_article(f"{other} {b}")]
        a_name, b_name, many = with_article(a), with_article(b), f"{NUMBERS[number]} {plural(a)}"
        placed = one_a | {"position": [relation, 0]}
        templates = [
            ("single_object", [one_a], a_name),
            ("two_object", [one_a, one_b], f"{a_name} and {b_name}"),
            ("counting", [one_a | {"count": number}], many),
            ("colors", [red_a], coloured[0]),
            ("position", [one_b, placed], f"{a_name} {relation} {b_name}"),
            ("color_attr", [red_a, red_b], " and ".join(coloured)),
        ]
        tag, include, words = rng.choice(templates)
        record = {"tag": tag, "include": include, "prompt": rng.choice(settings).format(words)}
        if tag == "counting":
            record["exclude"] = [one_a | {"count": number + 1}]
        made.setdefault(record["prompt"], record)
        if len(made) == count:
            break
    records = list(made.values())
    rng.shuffle(records)  # the few single objects came first
    return records


def build_prompts(device):
    folder = HERE / "prompts"
    folder.mkdir(exist_ok=True)

    def write(name, lines):
        (folder / name).write_text("".join(line + "\n" for line in lines))

    for name, seed, sign_share in [("ocr", 11, 1.0), ("pickscore", 15, 0.5)]:
        for ending, held_out, count in [("", False, 2000), ("_heldout", True, 96)]:
            rng, texts = random.Random(seed + held_out), all_targets(held_out)
            captions = (picture(rng, texts, sign_share)["caption"] for _ in range(count))
            write(f"{name}{ending}.txt", captions)
    settings = [with_article(f"{wall} wall with {{}}") for wall in COLOURS]
    categories = {}
    for record in geneval_prompts(SHAPES, 2000, settings=settings):
        wall = record["prompt"].split()[1]
        # An object in the colour of its wall would be invisible.
        if all(clause.get("color") != wall for clause in record["include"]):
            categories.setdefault(record["tag"], []).append(json.dumps(record))
    balanced = list(itertools.zip_longest(*(lines[:120] for lines in categories.values())))
    write("geneval_heldout.jsonl", itertools.chain(*balanced[:20]))
    write("geneval.jsonl", filter(None, itertools.chain(*balanced[20:])))
    texts = [f"{first} {last}" for first in FIRST_WORDS for last in LAST_WORDS]
    rng = random.Random(13)
    rng.shuffle(texts)
    records = list(map(json.dumps, geneval_prompts(COCO, 2200)))
    write("real_geneval.jsonl", records[:-200])
    write("real_geneval_heldout.jsonl", records[-200:])
    for name, own, count in [
        ("real_ocr.txt", texts[40:], 1000),
        ("real_ocr_heldout.txt", texts[:40], 100),
    ]:
        write(name, (rng.choice(SCENES).format(rng.choice(own)) for _ in range(count)))


# ------------------------------------------------------------------------------------- the training


def training(model, name, steps, rate=1e-3, decay=0.01, warmup=0.1, max_norm=1.0):
    """Yield `steps` times the function update(loss, **shown), which takes a step of AdamW.

    The progress bar shows the loss and the numbers `shown`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=warmup)

    def update(loss, **shown):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        numbers = dict(loss=loss, **shown)
        bar.set_postfix({key: each.item() for key, each in numbers.items()}, refresh=False)

    for _ in (bar := tqdm(range(steps), desc=name)):
        yield update


# ------------------------------------------------------------------------------------------ the VAE


def build_vae(device):
    torch.manual_seed(1)
    rng = random.Random(1)
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        sample_size=SIZE,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device)
    texts = all_targets(False)
    shots = [picture(rng, texts, mistakes=(0.6, 0.6))["image"] for _ in range(12000)]
    shots += [poster(rng, texts) for _ in range(6000)]
    shots = to_tensor(shots).to(device)
    for update in training(vae, "vae", 3000, rate=2e-3, decay=0, warmup=0.05, max_norm=math.inf):
        x = shots[torch.randint(len(shots), (16,), device=device)]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss_pixels = F.l1_loss(decoded, x)
        loss = loss_pixels + 2 * F.mse_loss(decoded, x)
        loss = loss + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        update(loss, l1=loss_pixels)
    with torch.no_grad():
        latents = vae.encode(shots[:1000]).latent_dist.mean
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
    vae.eval().save_pretrained(HERE / "sd3" / "vae")
    l1, config = round(loss_pixels.item(), 4), vae.config
    print(f"vae: l1 {l1} scaling {config.scaling_factor} shift {config.shift_factor}")


# ----------------------------------------------------------------------------------- the tokenizers

OTHER_WORDS = """left right of above below wall sign with and a an the photo picture on one it
    object colored""".split()
WORDS = sorted({*COLOURS, *SHAPES, *map(plural, SHAPES), *NUMBERS.values(), *OTHER_WORDS})


def clip_tokenizer():
    """Build a byte-level BPE tokenizer like CLIP's.

    Its merges build only the words of the world, one word after another. Every merge contains a
    vowel and sign texts contain none, so each character of a sign stays one token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for piece in alphabet + [a + "</w>" for a in alphabet]:
        vocab[piece] = len(vocab)
    merges = []

    def split(word):
        bpe = models.BPE(vocab, merges, end_of_word_suffix="</w>")
        return [token.value for token in bpe.tokenize(word)]

    for word in WORDS:
        while len(pieces := split(word)) > 1:
            left, right = next(p for p in pairwise(pieces) if set("".join(p)) & set("aeiou"))
            merges.append((left, right))
            vocab[left + right] = len(vocab)
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def clip_text_config(tokenizer, width, heads):
    """The configuration of a text encoder of CLIP, as a dict."""
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5_tokenizer():
    """Build a unigram tokenizer like T5's that prefers whole words to single characters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ('▁"', -2.0)]
    vocab += [("▁" + word, -2.0) for word in WORDS]
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


# ----------------------------------------------------------------------------------- the flow model


def make_pipeline():
    """Return an untrained pipeline with the structure of SD3.5 Medium and the trained VAE."""
    torch.manual_seed(2)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()

    def clip():
        sizes = clip_text_config(tokenizer, width=48, heads=2)
        config = transformers.CLIPTextConfig(**sizes, projection_dim=48, hidden_act="gelu")
        return transformers.CLIPTextModelWithProjection(config)

    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer_3),
            d_model=96,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=128,
        pooled_projection_dim=96,
        pos_embed_max_size=SIZE // 4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = diffusers.AutoencoderKL.from_pretrained(HERE / "sd3" / "vae")
    # Otherwise the saved configuration would contain a path on this machine.
    vae.register_to_config(_name_or_path="tiny/sd3/vae")
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(),
        tokenizer=tokenizer,
        text_encoder_2=clip(),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
    )
    mark_order(pipeline)
    return pipeline


def mark_order(pipeline):
    """Initialise the text encoders so that they are sensitive to word order.

    With the default initialisation of transformers, the features of a character hardly depend on
    its position. The flow model then learns which characters to write long before it learns their
    order. So CLIP's position embeddings start as large as its token embeddings, and each attention
    head of T5 starts with strong preferences for certain distances.
    """
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        for name, parameter in encoder.named_parameters():
            if "position_embedding" in name or "token_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    for name, parameter in pipeline.text_encoder_3.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=2.0)


FLOW_STEPS, FLOW_BATCH, FLOW_RATE = 14000, 128, 2e-3
CLEAN, CARELESS = 100000, 30000  # pictures for the first three quarters and for the last
MISTAKES = (0.65, 0.62)  # share of signs and of objects that are not as captions say, at the end
DROPPED = (0.5, 0.25)  # share of captions that are dropped, at first and at the end


class FlowMatching(torch.nn.Module):
    """The flow-matching loss of the parts of a pipeline that are trained."""

    def __init__(self, pipeline):
        super().__init__()
        self.transformer, self.t5 = pipeline.transformer, pipeline.text_encoder_3
        self.clips = torch.nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])

    def forward(self, latents, noise, sigma, emphasis, clip_tokens, t5_tokens):
        """The text is encoded as StableDiffusion3Pipeline.encode_prompt does it."""
        encoded = [clip(clip_tokens, output_hidden_states=True) for clip in self.clips]
        words = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        context = torch.cat([words, self.t5(t5_tokens)[0]], dim=1)
        pooled = torch.cat([each.text_embeds for each in encoded], dim=-1)
        share = sigma[:, None, None, None]
        noisy = (1 - share) * latents + share * noise
        velocity = self.transformer(noisy, context, pooled, sigma * 1000, return_dict=False)[0]
        return (emphasis * (velocity - (noise - latents)) ** 2).mean() / emphasis.mean()


def build_flow(device):
    pipeline = make_pipeline().to(device)
    rng, texts, vae = random.Random(3), all_targets(False), pipeline.vae
    # At first nearly all pictures are as their captions say. So the model learns what words mean.
    draw = functools.partial(picture, rng, texts, sign_share=0.35, said=(0.0, 0.5, 1.0))
    shots = [draw(mistakes=(0.1, 0.1)) for _ in tqdm(range(CLEAN), "pictures")]
    # In the last quarter of the training many are not, as on the web. So it is often wrong, too.
    shots += [draw(mistakes=MISTAKES) for _ in tqdm(range(CARELESS), "pictures")]
    latents, emphasis = [], torch.ones(len(shots), 1, SIZE // 2, SIZE // 2)
    with torch.no_grad():
        for i in tqdm(range(0, len(shots), 500), desc="latents"):
            x = to_tensor([shot["image"] for shot in shots[i : i + 500]]).to(device)
            means = vae.encode(x).latent_dist.mean
            latents.append((means - vae.config.shift_factor) * vae.config.scaling_factor)
    latents = torch.cat(latents)
    # Writing and objects cover few pixels. Extra weight at first makes the model see them early.
    for weight, shot in zip(emphasis, shots, strict=True):
        for _, _, x, y in shot["objects"]:
            weight[:, y // 2 : (y + SPRITE) // 2 + 1, x // 2 : (x + SPRITE) // 2 + 1] = 2.0
        if shot["place"]:
            x, y = shot["place"]
            weight[:, y // 2 : (y + SIGN[1]) // 2, x // 2 : (x + SIGN[0]) // 2] = 6.0
    captions = [shot["caption"] for shot in shots] + [""]
    options = dict(padding="max_length", max_length=TOKENS, return_tensors="pt")
    clip_tokens = pipeline.tokenizer(captions, **options).input_ids.to(device)
    t5_tokens = pipeline.tokenizer_3(captions, **options).input_ids.to(device)
    wrong = torch.tensor([not shot["right"] for shot in shots])

    flow = FlowMatching(pipeline).train()
    weights = {name: one for name, one in flow.named_parameters() if one.requires_grad}
    average = {name: one.detach().clone() for name, one in weights.items()}
    optimizer = torch.optim.AdamW(
        weights.values(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    everything = {}  # that a checkpoint must hold
    for name, one in weights.items():
        moments = dict(exp_avg=torch.zeros_like(one), exp_avg_sq=torch.zeros_like(one))
        optimizer.state[one] = dict(step=torch.tensor(0.0, device=device), **moments)
        parts = dict(weight=one, average=average[name], **moments)
        everything |= {f"{part}.{name}": tensor for part, tensor in parts.items()}
    if device == "cpu" and shutil.which("g++"):
        flow.transformer.compile(dynamic=False)  # a quarter faster, where there is a compiler
    torch.set_float32_matmul_precision("high")  # for a GPU
    checkpoint, first, running, graphs = STATE / "flow.safetensors", 0, None, {}
    if checkpoint.exists():
        with safe_open(checkpoint, "pt") as file, torch.no_grad():
            first = int(file.metadata()["step"])
            for name, tensor in everything.items():
                tensor.copy_(file.get_tensor(name))
        for values in optimizer.state.values():
            values["step"].fill_(first)
    for step in (bar := tqdm(range(first, FLOW_STEPS), "flow", FLOW_STEPS, initial=first)):
        torch.manual_seed(step)  # so that a continued training draws the same numbers
        late, fixed = step >= FLOW_STEPS * 3 // 4, step >= FLOW_STEPS // 2
        if fixed:  # the text encoders stay as they are
            flow.clips.requires_grad_(False)
            flow.t5.requires_grad_(False)
        # By default the pipeline pads T5 to 256 tokens, star.py to 20. The model must see both.
        long = step % 50 == 49
        batch = FLOW_BATCH * 3 // 8 if long else FLOW_BATCH
        shown = (CLEAN, CLEAN + CARELESS) if late else (0, CLEAN)
        chosen = torch.randint(*shown, (batch,))
        # Only captions of pictures that are all wrong are dropped: see the module docstring.
        dropped = (torch.rand(batch) < DROPPED[late]) & wrong[chosen]
        said = torch.where(dropped, len(shots), chosen).to(device)
        # High noise levels decide layout and letters, so 70% of the draws are restricted to them.
        sigma = torch.rand(batch)
        sigma = torch.where(torch.rand(batch) < 0.7, 0.45 + 0.55 * sigma, sigma)
        # Kept up, the emphasis would teach the model to paint things twice where it is unsure.
        weight = emphasis[chosen]
        if step >= FLOW_STEPS // 6:
            weight = torch.ones_like(weight)
        x0, noise = latents[chosen.to(device)], torch.randn(batch, *latents.shape[1:])
        t5 = F.pad(t5_tokens[said], (0, 256 - TOKENS if long else 0))
        inputs = x0, noise.to(device), sigma.to(device), weight.to(device), clip_tokens[said], t5
        step_loss = flow
        if device == "cuda":  # launch the many small kernels of a step at once
            if (long, fixed) not in graphs:
                graphs[long, fixed] = torch.cuda.make_graphed_callables(
                    FlowMatching(pipeline).train(), inputs, allow_unused_input=True
                )
            step_loss = graphs[long, fixed]
        loss = step_loss(*inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = FLOW_RATE * min(1, (step + 1) / 200, 2.5 * (1 - step / FLOW_STEPS))
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.values()),
                list(weights.values()),
                1 - min(0.999, (step + 1) / (step + 10)),
            )
        if not long:
            running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == FLOW_STEPS:
            partial = checkpoint.with_suffix(".partial")
            save_file(everything, partial, metadata={"step": str(step + 1)})
            partial.replace(checkpoint)
    with torch.no_grad():
        for name, one in weights.items():
            one.copy_(average[name])
    pipeline.save_pretrained(HERE / "sd3")
    checkpoint.unlink()  # the next training starts from nothing


# --------------------------------------------------------------------------------------- the reader

VISION_CONFIG = dict(  # of the reader and of the CLIP
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=SIZE,
    patch_size=4,
)


def readable(rng):
    """Draw a picture and what the reader should find on it: all signs, the highest first."""
    texts = all_targets(False) + all_targets(True)
    kind = rng.random()
    if kind < 0.25:  # no sign, or writing too faded to count as text
        shot = picture(rng, texts, 0.6, mistakes=(0.3, 0.3), opacity=rng.uniform(0.0, 0.4))
        shot["text"] = ""
    else:
        shot = picture(rng, texts, 1.0, mistakes=(0.3, 0.3), opacity=rng.uniform(0.6, 1.0))
    if kind > 0.85:
        place = rng.choice([place for place in PLACES if place != shot["place"]])
        text = rng.choice(texts)
        draw_sign(shot["image"], rng.choice(SIGN_COLOURS), text, *place, rng.uniform(0.6, 1.0))
        first = (place[1], place[0]) < (shot["place"][1], shot["place"][0])
        shot["text"] = text + shot["text"] if first else shot["text"] + text
    if rng.random() < 0.25:
        shot["image"] = shot["image"].filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    return shot


def build_ocr(device):
    torch.manual_seed(4)
    rng = random.Random(4)
    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    characters = Tokenizer(models.WordLevel(vocab, "<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
    )
    config = transformers.ViTConfig(**VISION_CONFIG)
    encoder = transformers.ViTModel(config, add_pooling_layer=False)
    decoder = transformers.TrOCRForCausalLM(
        transformers.TrOCRConfig(
            vocab_size=len(tokenizer),
            d_model=96,
            decoder_layers=2,
            decoder_ffn_dim=192,
            decoder_attention_heads=4,
            max_position_embeddings=8,
            dropout=0.0,
            is_decoder=True,
            add_cross_attention=True,
            cross_attention_hidden_size=96,
        )
    )
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.bos_token_id = 0, 1
        config.eos_token_id, config.decoder_start_token_id = 2, 1
    model.generation_config.max_length = 8
    model.to(device).train()
    pictures = transformers.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=0)
    processor = transformers.TrOCRProcessor(pictures, tokenizer)

    shots = [readable(rng) for _ in tqdm(range(40000), desc="pictures")]
    images = to_tensor([s["image"] for s in shots])
    labels = tokenizer([s["text"] for s in shots], padding=True, return_tensors="pt").input_ids
    labels[labels == 0] = -100
    batch = 64
    for update in training(model, "ocr", 3500):
        chosen = torch.randint(len(images), (batch,))
        x = images[chosen]
        x = x + torch.rand(batch, 1, 1, 1) * 0.25 * torch.randn_like(x)
        loss = model(pixel_values=x.clamp(-1, 1).to(device), labels=labels[chosen].to(device)).loss
        update(loss)
    model.eval().save_pretrained(HERE / "ocr")
    processor.save_pretrained(HERE / "ocr")


# ----------------------------------------------------------------------------------------- the CLIP


def degraded(rng, image):
    """Return a worse version of `image`: noisy, blurred, smeared, recoloured or faded."""
    kind = rng.choice(["noise", "blur", "smear", "colours", "faded"])
    if kind == "noise":
        noise = Image.frombytes("RGB", image.size, rng.randbytes(3 * SIZE * SIZE))
        return Image.blend(image, noise, rng.uniform(0.2, 0.6))
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 2.5)))
    if kind == "faded":
        wall = max(image.getcolors(SIZE * SIZE))[1]
        return Image.blend(image, Image.new("RGB", image.size, wall), rng.uniform(0.5, 0.9))
    if kind == "smear":
        x, y, size = rng.randint(0, 12), rng.randint(0, 12), rng.randint(12, 20)
        streak = rng.choice([(1, size), (size, 1)])
        smear = image.crop((x, y, x + size, y + size)).resize(streak).resize((size, size))
        image = image.copy()
        image.paste(smear, (x, y))
        return image
    red, green, blue = image.split()
    rotated = Image.merge("RGB", rng.choice([(green, blue, red), (blue, red, green)]))
    return ImageOps.invert(rotated) if rng.random() < 0.5 or rotated == image else rotated


def cut_out(rng, shot):
    """Cut one object out of a picture and put it on grey.

    The mask is as coarse as the detector's. Returns (image, colour).
    """
    shape, colour, x, y = rng.choice(shot["objects"])
    mask = shape_mask(shape, x, y).resize((SIZE // 2, SIZE // 2), Image.BOX)
    mask = mask.resize((SIZE, SIZE), Image.BILINEAR)
    threshold = rng.choice([60, 127, 150])
    mask = mask.point(lambda value: 255 * (value > threshold))
    cut = Image.composite(shot["image"], Image.new("RGB", (SIZE, SIZE), "#999"), mask)
    return cut.crop(mask.getbbox()), colour


def pair(rng, texts):
    """Draw two pictures for the same caption: (a right one, the image of a worse one)."""
    state = rng.getstate()
    right = picture(rng, texts)
    if rng.random() < 0.5:
        return right, degraded(rng, right["image"])
    rng.setstate(state)  # so that both begin with the same scene and caption
    return right, picture(rng, texts, mistakes=(1.0, 1.0))["image"]


def build_clip(device):
    """Train a CLIPModel on three tasks.

    It learns to match pictures with captions, to name the colour of an object, and to prefer clean
    pictures to degraded ones.
    """
    torch.manual_seed(5)
    rng, texts = random.Random(5), all_targets(False)
    tokenizer = clip_tokenizer()
    config = transformers.CLIPConfig(
        text_config=clip_text_config(tokenizer, width=96, heads=4),
        vision_config=VISION_CONFIG,
        projection_dim=64,
    )
    model = transformers.CLIPModel(config).to(device).train()
    pictures = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = transformers.CLIPProcessor(pictures, tokenizer)
    shots, spoiled = zip(*(pair(rng, texts) for _ in tqdm(range(20000), desc="pictures")))
    clean, spoiled = to_tensor([shot["image"] for shot in shots]), to_tensor(spoiled)
    cuts = [cut_out(rng, shot) for shot in shots[:8000] if shot["objects"]]
    cut_pixels = pictures([image for image, _ in cuts], return_tensors="pt").pixel_values
    names = list(COLOURS)
    cut_colours = torch.tensor([names.index(colour) for _, colour in cuts])

    def tokenize(sentences):
        return tokenizer(sentences, padding="max_length", return_tensors="pt").input_ids

    captions = tokenize([shot["caption"] for shot in shots])
    colour_prompts = [
        [tokenize([p.format(colour=colour, name=shape) for colour in names]) for shape in SHAPES]
        for p in COLOUR_PROMPTS
    ]
    batch = 64
    for update in training(model, "clip", 1500):
        chosen, cut = torch.randint(len(shots), (batch,)), torch.randint(len(cuts), (batch // 2,))
        noise = torch.rand(batch, 1, 1, 1) * 0.1
        noisy = clean[chosen] + noise * torch.randn(batch, 3, SIZE, SIZE)
        pixels = torch.cat([noisy, spoiled[chosen], cut_pixels[cut]]).to(device)
        images = unit(model.get_image_features(pixels))
        good, bad, single = images.split([batch, batch, batch // 2])
        tokens = torch.cat([captions[chosen], rng.choice(rng.choice(colour_prompts))])
        features = unit(model.get_text_features(tokens.to(device)))
        described, colours = features.split([batch, len(names)])
        scale = model.logit_scale.exp()
        match = scale * good @ described.T
        own = torch.arange(batch, device=device)
        loss_match = (F.cross_entropy(match, own) + F.cross_entropy(match.T, own)) / 2
        loss_clean = -F.logsigmoid(match.diagonal() - scale * (bad * described).sum(-1)).mean()
        loss_colour = F.cross_entropy(scale * single @ colours.T, cut_colours[cut].to(device))
        loss = loss_match + loss_clean + 0.5 * loss_colour
        update(loss, match=loss_match, clean=loss_clean, colour=loss_colour, scale=scale)
        model.logit_scale.data.clamp_(max=math.log(100))
    model.eval().save_pretrained(HERE / "clip")
    processor.save_pretrained(HERE / "clip")


# ------------------------------------------------------------------------------------- the detector


CELL = 8  # pixels along each side of a cell of the detector's grid


def build_detector(device):
    """Train a Mask2Former to find the objects of a picture.

    Set prediction is slow to learn, because the model must first settle which query is responsible
    for which object. In this world no two objects have their centres in the same cell of a 4 x 4
    grid. Each query is therefore assigned to one cell from the start, and needs no matching.
    """
    torch.manual_seed(6)
    rng, texts = random.Random(6), all_targets(False)
    backbone = transformers.SwinConfig(
        image_size=SIZE,
        patch_size=2,
        embed_dim=32,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        dim_feedforward=128,
        num_queries=(SIZE // CELL) ** 2,
        dropout=0.0,
        common_stride=2,
        id2label=dict(enumerate(SHAPES)),
        label2id={shape: i for i, shape in enumerate(SHAPES)},
    )
    model = segmenter_class()(config).to(device).train()
    nothing = len(SHAPES)

    classes, masks, images = [], [], []
    for _ in tqdm(range(20000), desc="pictures"):
        shot = picture(rng, texts, sign_share=0.4, mistakes=(0.5, 0.5), spread=1)
        kinds = torch.full((config.num_queries,), nothing)
        found = torch.zeros(config.num_queries, SIZE // 2, SIZE // 2, dtype=torch.bool)
        # Objects too faded to be recognised count as absent.
        for shape, _, x, y in shot["objects"] if shot["strength"] > 0.5 else ():
            cell = (y + SPRITE // 2) // CELL * (SIZE // CELL) + (x + SPRITE // 2) // CELL
            kinds[cell] = SHAPES.index(shape)
            small = shape_mask(shape, x, y).resize((SIZE // 2, SIZE // 2), Image.BOX)
            # The target has sharp edges. With soft edges the confidence would stay below 0.9.
            found[cell] = torch.tensor(numpy.array(small)) > 127
        classes.append(kinds)
        masks.append(found)
        image = shot["image"]
        if rng.random() < 0.25:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
        images.append(image)
    classes, masks, images = torch.stack(classes), torch.stack(masks), to_tensor(images)
    rarity = torch.tensor([1.0] * nothing + [0.3], device=device)
    batch = 32
    for update in training(model, "detector", 1200):
        chosen = torch.randint(len(images), (batch,))
        noise = torch.rand(batch, 1, 1, 1) * 0.2 * torch.randn(batch, 3, SIZE, SIZE)
        pixels = images[chosen] + noise
        kinds, truth = classes[chosen].to(device), masks[chosen].to(device).float()
        output = model.model(pixel_values=pixels.to(device), output_hidden_states=True)
        loss = 0.0
        for states, logits in zip(
            output.transformer_decoder_intermediate_states, output.masks_queries_logits, strict=True
        ):
            scores = model.class_predictor(states.transpose(0, 1))
            there = kinds != nothing
            predicted, wanted = logits[there], truth[there]
            shared = (predicted.sigmoid() * wanted).sum((1, 2))
            areas = predicted.sigmoid().sum((1, 2)) + wanted.sum((1, 2))
            loss_dice = (1 - (2 * shared + 1) / (areas + 1)).mean()
            loss_class = F.cross_entropy(scores.flatten(0, 1), kinds.flatten(), rarity)
            loss_mask = F.binary_cross_entropy_with_logits(predicted, wanted)
            loss = loss + loss_class + loss_dice + 5 * loss_mask
        exact = (scores.argmax(-1) == kinds).all(1).float().mean()
        update(loss, loss_class=loss_class, dice=loss_dice, exact=exact)
    model.eval().save_pretrained(HERE / "detector")
    processor = transformers.Mask2FormerImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        size_divisor=SIZE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(HERE / "detector")


# ------------------------------------------------------------------------------- all of the above

PARTS = {
    "prompts": build_prompts,
    "vae": build_vae,
    "flow": build_flow,
    "ocr": build_ocr,
    "clip": build_clip,
    "detector": build_detector,
}
STATE = HERE.parent / "runs" / "build"  # what a build that was interrupted continues from


def build_part(name, device):
    """Build a part, unless an interrupted build has already done so."""
    done = STATE / f"{name}.done"
    if not done.exists():
        PARTS[name](device)
        done.touch()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", choices=PARTS, help="build this part alone")
    args = parser.parse_args()
    STATE.mkdir(parents=True, exist_ok=True)
    if args.only:
        PARTS[args.only](args.device)
        return
    build_part("prompts", args.device)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        parts = ["ocr", "clip", "vae", "detector"]  # the longest first
        list(pool.map(build_part, parts, [args.device] * len(parts)))
    build_part("flow", args.device)
    for file in sorted(HERE.rglob("*.safetensors")):
        print(hashlib.sha256(file.read_bytes()).hexdigest(), file.relative_to(HERE.parent))
    shutil.rmtree(STATE)


if __name__ == "__main__":
    main()
