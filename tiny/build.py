"""Build every trained miniature in this folder from scratch: `python tiny/build.py`.

The miniatures are small enough for a CPU. They use the classes and file formats of the real models,
so `star.py` needs only one code path. They are trained on a synthetic world of 32 x 32 pictures.
Each picture has a coloured wall. Many have a sign with three characters on it. Most have balls,
boxes or triangles in several colours, counts and spatial relations.

About half of the signs and half of the objects are faded. The caption describes them as if they
were fresh. A flow model trained on these pictures learns what to write and what to paint. However,
it often paints too faintly for the result to be read or recognised. This leaves reinforcement
learning room for improvement.

During training, captions are dropped only from pictures without fresh paint. Classifier-free
guidance moves away from the prediction without a caption, so it moves towards fresh paint.

The parts, in the order in which they depend on each other (`--only PART` rebuilds one of them):
    prompts   tiny/prompts      training and held-out prompts with disjoint sign texts
    vae       tiny/sd3/vae      AutoencoderKL that halves the resolution
    flow      tiny/sd3          rest of a StableDiffusion3Pipeline, trained by flow matching
    ocr       tiny/ocr          VisionEncoderDecoderModel that reads the sign
    clip      tiny/clip         CLIPModel that scores pictures and names colours
    detector  tiny/detector     Mask2Former that finds the objects that are not too faded
"""

import argparse
import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerImageProcessorPil,
    PreTrainedTokenizerFast,
    SwinConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    TrOCRConfig,
    TrOCRForCausalLM,
    TrOCRProcessor,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
from rewards import (
    COLOUR_PROMPTS,
    NUMBERS,
    RELATIONS,
    Segmenter,
    geneval_prompts,
    plural,
    unit,
    with_article,
)

HERE = Path(__file__).parent
SIZE = 32  # pixels along each side of a picture
GRID = 4  # pixels along each side of a transformer token; a letter with its gap is as wide
TOKENS = 24  # text length of each encoder; the longest caption of this world just fits


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
}
LETTERS = "".join(GLYPHS)
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
SHAPES = ["ball", "box", "triangle"]
SIGN = (12, 8)  # width and height of the writing in pixels, gaps included
CELL = 8  # pixels along each side of a cell; each object stands in its own cell of a 4 x 4 grid
# The places of a sign do not overlap, so that denoising can settle on one of them.
PLACES = [(x, y) for x in (4, 20) for y in (0, 8, 16, 24)]


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


def draw_shape(draw, shape, box, colour):
    x, y, size = box
    right, bottom = x + size - 1, y + size - 1
    if shape == "ball":
        draw.ellipse((x, y, right, bottom), fill=colour)
    elif shape == "box":
        draw.rectangle((x, y, right, bottom), fill=colour)
    else:
        draw.polygon([(x + (size - 1) / 2, y), (x, bottom), (right, bottom)], fill=colour)


def free_cell(rng, taken, relation=None):
    """Pick a random cell that holds neither a sign nor an object.

    With a `relation`, what was placed last must stand in that relation to the cell. Returns (x, y,
    size) for a new object, or None if no cell is left. Cells do not overlap, and an object is
    smaller than its cell, so objects never touch.
    """
    free = [
        (x, y)
        for x in range(0, SIZE, CELL)
        for y in range(0, SIZE, CELL)
        if (not relation or related(relation, *taken[-1][:2], (x, y)))
        and all(x + CELL <= a or a + w <= x or y + CELL <= b or b + h <= y for a, b, w, h in taken)
    ]
    if not free:
        return None
    x, y = rng.choice(free)
    return (x, y, 7) if rng.random() < 0.5 else (x + 1, y + 1, 6)


def related(relation, x, y, other):
    """Tell whether cell (x, y) stands in `relation` to cell `other`, mainly along that axis."""
    dx, dy = x - other[0], y - other[1]
    along, across = {
        "left of": (-dx, dy),
        "right of": (dx, dy),
        "above": (-dy, dx),
        "below": (dy, dx),
    }[relation]
    return along > abs(across)


def caption_of(wall, sign, groups, relation):
    """Describe a picture in words.

    `sign` is (colour, text) or None. Each group is (count, colour or None, shape).
    """

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


def make_plan(rng, texts, sign_share=0.7):
    """Choose what a picture shows: (wall, sign or None, object groups, relation or None)."""
    wall = rng.choice(list(COLOURS))
    sign = None
    if rng.random() < sign_share:
        sign = (rng.choice([c for c in SIGN_COLOURS if c != wall]), rng.choice(texts))
    groups = []
    for shape in rng.sample(SHAPES, rng.choice([0, 1, 1, 2] if sign else [1, 1, 2, 2])):
        count = rng.choice([1, 1, 1, 2, 3, 4]) if not groups else rng.choice([1, 1, 2])
        groups.append((count, rng.choice([c for c in COLOURS if c != wall]), shape))
    relation = None
    if len(groups) == 2 and rng.random() < 0.5:
        groups = [(1, colour, shape) for _, colour, shape in groups]
        relation = rng.choice(RELATIONS)
    return wall, sign, groups, relation


def draw_plan(rng, plan, opacity, strength=1.0):
    """Draw a plan. `opacity` applies to the writing, `strength` to the colour of the objects.

    Returns (image, place of the writing (x, y) or None, objects [(shape, colour, x, y, size)]), or
    None if the objects do not fit.
    """
    wall, sign, groups, relation = plan
    shade = rng.uniform(0.9, 1.0)
    paint = tuple(round(c * shade) for c in COLOURS[wall])
    image = Image.new("RGB", (SIZE, SIZE), paint)
    draw = ImageDraw.Draw(image)
    taken, objects, place = [], [], None
    if sign:
        place = rng.choice(PLACES)
        draw_sign(image, *sign, *place, opacity)
        taken.append((place[0] - 1, place[1], SIGN[0] + 1, SIGN[1]))
    for number, (count, colour, shape) in enumerate(groups):
        for _ in range(count):
            # In "A left of B", A is drawn first, so B must go to the right of A.
            spot = free_cell(rng, taken, relation if number == 1 else None)
            if spot is None:
                return None
            mixed = (a + strength * (b - a) for a, b in zip(paint, COLOURS[colour], strict=True))
            draw_shape(draw, shape, spot, tuple(map(round, mixed)))
            taken.append((spot[0] // CELL * CELL, spot[1] // CELL * CELL, CELL, CELL))
            objects.append((shape, colour, *spot))
    return image, place, objects


def random_opacity(rng, fresh_share=0.5):
    """Return the opacity of fresh paint, or of paint too faded to read or recognise."""
    return rng.uniform(0.75, 1.0) if rng.random() < fresh_share else rng.uniform(0.0, 0.35)


def picture(rng, texts, opacity=None, sign_share=0.7, fresh_signs=0.5, fresh_objects=None):
    """Draw one picture of the world.

    Returns a dict of image, caption, text ("" if there is no sign), opacity, strength, place and
    objects.
    """
    while True:
        plan = make_plan(rng, texts, sign_share)
        ink = random_opacity(rng, fresh_signs) if opacity is None else opacity
        strength = 1.0 if fresh_objects is None else random_opacity(rng, fresh_objects)
        drawn = draw_plan(rng, plan, ink, strength)
        if drawn:
            break
    wall, sign, groups, relation = plan
    spoken = [
        (count, None if rng.random() < 0.15 else colour, shape) for count, colour, shape in groups
    ]
    return dict(
        image=drawn[0],
        caption=caption_of(wall, sign, spoken, relation),
        text=sign[1] if sign else "",
        opacity=ink,
        strength=strength,
        place=drawn[1],
        objects=drawn[2],
    )


def poster(rng, texts):
    """Draw a picture full of signs.

    The autoencoder must see many letters before it preserves every stroke.
    """
    image = Image.new("RGB", (SIZE, SIZE), rng.choice(list(COLOURS.values())))
    for x in range(GRID, SIZE - SIGN[0], SIGN[0] + GRID):
        for y in range(0, SIZE, SIGN[1]):
            if rng.random() < 0.8:
                colour, text = rng.choice(SIGN_COLOURS), rng.choice(texts)
                draw_sign(image, colour, text, x, y, random_opacity(rng))
    return image


def to_tensor(images):
    """Convert PIL pictures to a float tensor [N, 3, 32, 32] in [-1, 1]."""
    flat = torch.frombuffer(bytearray(b"".join(i.tobytes() for i in images)), dtype=torch.uint8)
    return flat.view(len(images), SIZE, SIZE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def build_prompts(device):
    folder = HERE / "prompts"
    folder.mkdir(exist_ok=True)

    def write(name, lines):
        (folder / name).write_text("".join(line + "\n" for line in lines))

    for name, seed, held_out, count, sign_share in [
        ("ocr.txt", 11, False, 2000, 1.0),
        ("ocr_heldout.txt", 12, True, 200, 1.0),
        ("pickscore.txt", 15, False, 2000, 0.5),
        ("pickscore_heldout.txt", 16, True, 200, 0.5),
    ]:
        rng, texts = random.Random(seed), all_targets(held_out)
        write(name, (picture(rng, texts, sign_share=sign_share)["caption"] for _ in range(count)))
    settings = [with_article(f"{wall} wall with {{}}") for wall in COLOURS]
    # An object in the colour of its wall would be invisible.
    records = [
        record
        for record in geneval_prompts(SHAPES, 760, settings=settings)
        if all(clause.get("color") != record["prompt"].split()[1] for clause in record["include"])
    ]
    write("geneval.jsonl", map(json.dumps, records[:-100]))
    write("geneval_heldout.jsonl", map(json.dumps, records[-100:]))
    texts = [f"{first} {last}" for first in FIRST_WORDS for last in LAST_WORDS]
    rng = random.Random(13)
    rng.shuffle(texts)
    for name, own, count in [
        ("real_ocr.txt", texts[40:], 1000),
        ("real_ocr_heldout.txt", texts[:40], 100),
    ]:
        write(name, (rng.choice(SCENES).format(rng.choice(own)) for _ in range(count)))


# ------------------------------------------------------------------------------------------ the VAE


def build_vae(device):
    torch.manual_seed(1)
    rng = random.Random(1)
    vae = AutoencoderKL(
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
    steps, batch = 3000, 16
    texts = all_targets(False)
    shots = [picture(rng, texts)["image"] for _ in range(8000)]
    shots += [poster(rng, texts) for _ in range(8000)]
    shots = to_tensor(shots).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    for step in (bar := tqdm(range(steps), desc="vae")):
        x = shots[torch.randint(len(shots), (batch,), device=device)]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss_pixels = F.l1_loss(decoded, x)
        loss = loss_pixels + 2 * F.mse_loss(decoded, x)
        loss = loss + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{loss_pixels.item():.4f}")
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


def join(pieces, left, right):
    """Apply one byte-pair merge: each `left` followed by `right` becomes one piece."""
    joined = []
    for piece in pieces:
        if joined and joined[-1] == left and piece == right:
            joined[-1] = left + right
        else:
            joined.append(piece)
    return joined


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
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:  # earlier merges also apply to this word
            pieces = join(pieces, left, right)
        while len(pieces) > 1:
            left, right = next(p for p in pairwise(pieces) if set("".join(p)) & set("aeiou"))
            merges.append((left, right))
            vocab[left + right] = len(vocab)
            pieces = join(pieces, left, right)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def t5_tokenizer():
    """Build a unigram tokenizer like T5's that prefers whole words to single characters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ('▁"', -2.0)]
    vocab += [("▁" + word, -2.0) for word in WORDS]
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


# ----------------------------------------------------------------------------------- the flow model


def make_pipeline():
    """Return an untrained pipeline with the structure of SD3.5 Medium and the trained VAE."""
    torch.manual_seed(2)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()

    def clip():
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=96,
                projection_dim=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                hidden_act="gelu",
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )

    t5 = T5EncoderModel(
        T5Config(
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
    transformer = SD3Transformer2DModel(
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
    vae = AutoencoderKL.from_pretrained(HERE / "sd3" / "vae")
    # Otherwise the saved configuration would contain a path on this machine.
    vae.register_to_config(_name_or_path="tiny/sd3/vae")
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
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


def build_flow(device):
    torch.manual_seed(3)
    rng = random.Random(3)
    pipeline = make_pipeline().to(device)
    steps, batch_size = 4000, 32
    texts = all_targets(False)
    pictures = [
        picture(rng, texts, sign_share=0.65, fresh_signs=0.4, fresh_objects=0.55)
        for _ in tqdm(range(60000), desc="pictures")
    ]
    vae = pipeline.vae
    latents, weights = [], torch.ones(len(pictures), 1, SIZE // 2, SIZE // 2)
    with torch.no_grad():
        for i in tqdm(range(0, len(pictures), 500), desc="latents"):
            x = to_tensor([p["image"] for p in pictures[i : i + 500]]).to(device)
            means = vae.encode(x).latent_dist.mean
            latents.append((means - vae.config.shift_factor) * vae.config.scaling_factor)
    latents = torch.cat(latents)
    # Writing and objects cover few pixels. The model learns them only with extra weight at first.
    for weight, shot in zip(weights, pictures, strict=True):
        for _, _, x, y, size in shot["objects"]:
            weight[:, y // 2 : (y + size + 1) // 2, x // 2 : (x + size + 1) // 2] = 3.0
        if shot["place"]:
            x, y = shot["place"]
            weight[:, y // 2 : (y + SIGN[1]) // 2, x // 2 : (x + SIGN[0]) // 2] = 6.0
    captions = [shot["caption"] for shot in pictures]
    fresh = [
        (shot["text"] != "" and shot["opacity"] > 0.5)
        or (shot["objects"] != [] and shot["strength"] > 0.5)
        for shot in pictures
    ]

    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    modules = torch.nn.ModuleList([pipeline.transformer, *encoders])
    modules.train()
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, s / 200) * min(1, 3.0 * (1 - s / steps))
    )
    values = [p.detach() for p in parameters]  # these share memory with the parameters
    average = [value.clone() for value in values]
    running = None
    for step in (bar := tqdm(range(steps), desc="flow")):
        # By default the pipeline pads T5 to 256 tokens, star.py to 24. The model must see both.
        length, batch = (256, 16) if step % 25 == 24 else (TOKENS, batch_size)
        chosen = torch.randint(len(latents), (batch,))
        x0 = latents[chosen]
        # About 10% of the captions are dropped, none with fresh paint: see the module docstring.
        prompts = ["" if not fresh[i] and rng.random() < 0.25 else captions[i] for i in chosen]
        context, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        # High noise levels decide layout and letters, so 70% of the draws are restricted to them.
        sigma = torch.where(
            torch.rand(batch) < 0.7, 0.45 + 0.55 * torch.rand(batch), torch.rand(batch)
        ).to(device)
        noise = torch.randn_like(x0)
        mix = sigma[:, None, None, None]
        velocity = pipeline.transformer(
            (1 - mix) * x0 + mix * noise, context, pooled, sigma * 1000, return_dict=False
        )[0]
        # Weights that follow the content teach the model to paint things twice where it is unsure.
        # So all weights are equal in the last third, while the learning rate falls.
        weight = weights[chosen].to(device) if step < steps * 2 // 3 else torch.ones_like(mix)
        loss = (weight * (velocity - (noise - x0)) ** 2).mean() / weight.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, values, 1 - decay)
        if length == TOKENS:
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            # Save the averaged weights, then continue training with the current ones.
            kept = [value.clone() for value in values]
            torch._foreach_copy_(values, average)
            pipeline.save_pretrained(HERE / "sd3")
            torch._foreach_copy_(values, kept)


# --------------------------------------------------------------------------------------- the reader


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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
    )
    encoder = ViTModel(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=SIZE,
            patch_size=4,
        ),
        add_pooling_layer=False,
    )
    decoder = TrOCRForCausalLM(
        TrOCRConfig(
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
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.bos_token_id = 0, 1
        config.eos_token_id, config.decoder_start_token_id = 2, 1
    model.generation_config.max_length = 8
    model.to(device).train()
    pictures = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=0)
    processor = TrOCRProcessor(pictures, tokenizer)

    texts = all_targets(False) + all_targets(True)
    shots = []
    for _ in tqdm(range(40000), desc="pictures"):
        if rng.random() < 0.75:
            shot = picture(rng, texts, opacity=rng.uniform(0.6, 1.0), sign_share=1.0)
        else:  # no sign, or writing too faded to count as text
            shot = picture(rng, texts, opacity=rng.uniform(0.0, 0.4), sign_share=0.6)
            shot["text"] = ""
        if rng.random() < 0.25:
            shot["image"] = shot["image"].filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
        shots.append(shot)
    images = to_tensor([s["image"] for s in shots])
    labels = tokenizer([s["text"] for s in shots], padding=True, return_tensors="pt").input_ids
    labels[labels == 0] = -100
    steps, batch = 4500, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc="ocr")):
        chosen = torch.randint(len(images), (batch,))
        x = images[chosen]
        x = x + torch.rand(batch, 1, 1, 1) * 0.25 * torch.randn_like(x)
        loss = model(pixel_values=x.clamp(-1, 1).to(device), labels=labels[chosen].to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
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

    The mask is as coarse as the detector's. Returns (image, (colour, shape)), or None if there is
    no object.
    """
    if not shot["objects"]:
        return None
    shape, colour, x, y, size = rng.choice(shot["objects"])
    mask = shape_mask(shape, (x, y, size)).resize((SIZE // 2, SIZE // 2), Image.BOX)
    mask = mask.resize((SIZE, SIZE), Image.BILINEAR)
    # `point` calls the function once for each of 256 grey values, so each draws its own threshold.
    mask = mask.point(lambda value: 255 * (value > rng.choice([60, 127, 150])))
    cut = Image.composite(shot["image"], Image.new("RGB", (SIZE, SIZE), "#999"), mask)
    return cut.crop(mask.getbbox()), (colour, shape)


def build_clip(device):
    """Train a CLIPModel on three tasks.

    It learns to match pictures with captions, to name the colour of an object, and to prefer clean
    pictures to degraded ones.
    """
    torch.manual_seed(5)
    rng, texts = random.Random(5), all_targets(False)
    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        ),
        vision_config=dict(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=4,
        ),
        projection_dim=64,
    )
    model = CLIPModel(config).to(device).train()
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = CLIPProcessor(pictures, tokenizer)
    shots = [picture(rng, texts, fresh_signs=1.0) for _ in tqdm(range(20000), desc="pictures")]
    clean = to_tensor([shot["image"] for shot in shots])
    spoiled = to_tensor([degraded(rng, shot["image"]) for shot in shots])
    cuts = [cut for cut in (cut_out(rng, shot) for shot in shots[:8000]) if cut]
    cut_pixels = pictures([image for image, _ in cuts], return_tensors="pt").pixel_values
    names = list(COLOURS)
    cut_colours = torch.tensor([names.index(colour) for _, (colour, _) in cuts])

    def tokenize(sentences):
        return tokenizer(sentences, padding="max_length", return_tensors="pt").input_ids

    captions = tokenize([shot["caption"] for shot in shots])
    colour_prompts = [
        [tokenize([p.format(colour=colour, name=shape) for colour in names]) for shape in SHAPES]
        for p in COLOUR_PROMPTS
    ]
    steps, batch = 2000, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc="clip")):
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
        optimizer.zero_grad()
        (loss_match + loss_clean + 0.5 * loss_colour).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 20 == 0:
            bar.set_postfix(
                match=f"{loss_match.item():.3f}",
                clean=f"{loss_clean.item():.3f}",
                colour=f"{loss_colour.item():.3f}",
                scale=f"{scale.item():.1f}",
            )
    model.eval().save_pretrained(HERE / "clip")
    processor.save_pretrained(HERE / "clip")


# ------------------------------------------------------------------------------------- the detector


def shape_mask(shape, box):
    mask = Image.new("L", (SIZE, SIZE))
    draw_shape(ImageDraw.Draw(mask), shape, box, 255)
    return mask


def build_detector(device):
    """Train a Mask2Former to find the objects of a picture.

    Set prediction is slow to learn, because the model must first settle which query is responsible
    for which object. In this world each object stands in one of 16 cells. Each query is therefore
    assigned to one cell from the start, and training needs no matching.
    """
    torch.manual_seed(6)
    rng, texts = random.Random(6), all_targets(False)
    backbone = SwinConfig(
        image_size=SIZE,
        patch_size=2,
        embed_dim=32,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
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
    model = Segmenter(config).to(device).train()
    nothing = len(SHAPES)

    classes, masks, images = [], [], []
    for _ in tqdm(range(20000), desc="pictures"):
        shot = picture(rng, texts, sign_share=0.5, fresh_objects=0.75)
        kinds = torch.full((config.num_queries,), nothing)
        found = torch.zeros(config.num_queries, SIZE // 2, SIZE // 2, dtype=torch.bool)
        # Objects too faded to be recognised count as absent.
        for shape, _, x, y, size in shot["objects"] if shot["strength"] > 0.5 else ():
            cell = y // CELL * (SIZE // CELL) + x // CELL
            kinds[cell] = SHAPES.index(shape)
            small = shape_mask(shape, (x, y, size)).resize((SIZE // 2, SIZE // 2), Image.BOX)
            cover = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
            # The target has sharp edges. With soft edges the confidence would stay below 0.9.
            found[cell] = cover.view(SIZE // 2, SIZE // 2) > 127
        classes.append(kinds)
        masks.append(found)
        image = shot["image"]
        if rng.random() < 0.25:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
        images.append(image)
    classes, masks, images = torch.stack(classes), torch.stack(masks), to_tensor(images)
    rarity = torch.tensor([1.0] * nothing + [0.3], device=device)
    steps, batch = 1500, 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc="detector")):
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
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            agree = (scores.argmax(-1) == kinds).all(1).float().mean()
            bar.set_postfix(
                loss_class=f"{loss_class.item():.4f}",
                dice=f"{loss_dice.item():.3f}",
                exact=f"{agree.item():.2f}",
            )
    model.config.architectures = ["Mask2FormerForUniversalSegmentation"]
    model.eval().save_pretrained(HERE / "detector")
    processor = Mask2FormerImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        size_divisor=SIZE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(HERE / "detector")


PARTS = {
    "prompts": build_prompts,
    "vae": build_vae,
    "flow": build_flow,
    "ocr": build_ocr,
    "clip": build_clip,
    "detector": build_detector,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (one to two hours) or cuda (minutes)")
    parser.add_argument("--only", choices=PARTS, help="build this part alone")
    args = parser.parse_args()
    for name, build in PARTS.items():
        if args.only in (None, name):
            build(args.device)


if __name__ == "__main__":
    main()
