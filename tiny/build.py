"""Make every trained miniature in this folder from nothing: `python tiny/build.py`.

The miniatures are small enough for a CPU but have the classes and file formats of the real models, so `star.py` needs
one code path only. They live in a world of 32 x 32 pictures: a coloured wall, often a sign with three characters on it,
and balls, boxes and triangles in several colours, counts and relations. Two signs of three are faded, as many pictures
on the web are; the caption states their text all the same. A flow model trained on such pictures knows how to write,
but writes legibly only half of the time: this is what reinforcement learning is given to mend. Pictures that lost their
caption are never the legible ones, so guidance, which moves away from what has no caption, moves towards legible writing.

The parts, in the order in which they need each other (`--only PART` makes one of them again):
    prompts   tiny/prompts/*.txt     training and held-out prompts, with disjoint sign texts
    vae       tiny/sd3/vae           AutoencoderKL, factor 2
    flow      tiny/sd3               the rest of a StableDiffusion3Pipeline, trained with the flow-matching loss
    ocr       tiny/ocr               VisionEncoderDecoderModel that reads the sign
"""
import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import Regex
from tqdm import tqdm
from transformers import (
    CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel,
    T5Tokenizer, TrOCRConfig, TrOCRForCausalLM, TrOCRProcessor, ViTConfig, ViTImageProcessorPil, ViTModel,
    VisionEncoderDecoderModel,
)

HERE = Path(__file__).parent
SIZE = 32           # pixels along each side of a picture
GRID = 4            # pixels along each side of one image token of the transformer; a letter and its gap are as wide
TOKENS = 24         # text length of each encoder; the longest caption of the world just fits


# ------------------------------------------------------------------------------------------------------------ the world

GLYPHS = {          # 3 x 6 pixels each, so that a letter and its gap are one image token wide; no vowels, see `clip_tokenizer`
    "C": "### #.. #.. #.. #.. ###", "F": "### #.. ##. #.. #.. #..", "H": "#.# #.# ### #.# #.# #.#", "J": "..# ..# ..# ..# #.# .#.",
    "K": "#.# #.# ##. ##. #.# #.#", "L": "#.. #.. #.. #.. #.. ###", "P": "### #.# #.# ### #.. #..", "Q": "### #.# #.# #.# ### ..#",
    "T": "### .#. .#. .#. .#. .#.", "X": "#.# #.# .#. .#. #.# #.#", "Y": "#.# #.# #.# .#. .#. .#.", "2": "### ..# ..# ### #.. ###",
    "3": "### ..# ### ..# ..# ###", "4": "#.# #.# #.# ### ..# ..#", "7": "### ..# ..# .#. .#. .#.", "9": "### #.# #.# ### ..# ###",
}
LETTERS = "".join(GLYPHS)
COLOURS = {
    "red": (214, 40, 40), "orange": (245, 135, 30), "yellow": (250, 220, 60), "green": (50, 160, 70),
    "blue": (45, 90, 210), "purple": (130, 60, 170), "pink": (245, 150, 190), "brown": (125, 80, 45),
    "black": (25, 25, 25), "white": (245, 245, 245),
}
SIGN_COLOURS = ["white", "yellow", "pink"]          # light ones: the writing is black
SHAPES = ["ball", "box", "triangle"]
PLURAL = {"ball": "balls", "box": "boxes", "triangle": "triangles"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ["left of", "right of", "above", "below"]
SIGN = (12, 8)                                       # width and height in pixels of the writing with its gaps
PLACES = [(x, y) for x in (4, 20) for y in (0, 8, 16, 24)]     # no two overlap: a picture in the making can settle on one


def all_targets(held_out: bool) -> list[str]:
    """The sign texts of training (90%) or of the held-out prompts (10%), always the same split."""
    texts = [a + b + c for a in LETTERS for b in LETTERS for c in LETTERS]
    random.Random(0).shuffle(texts)
    cut = len(texts) // 10
    return texts[:cut] if held_out else texts[cut:]


def draw_sign(image, colour, text, x, y, opacity):
    """A sign of one colour with `text` in black; (x, y) is the writing's top left corner, one pixel right of the sign's."""
    image.paste(COLOURS[colour], (x - 1, y, x + SIGN[0], y + SIGN[1]))
    for index, letter in enumerate(text):
        ink = Image.frombytes("L", (3, 6), bytes(round(255 * opacity) * (bit == "#") for bit in GLYPHS[letter].replace(" ", "")))
        image.paste((0, 0, 0), (x + GRID * index, y + 1), ink)


def draw_shape(draw, shape, box, colour):
    x, y, size = box
    corners = (x, y, x + size - 1, y + size - 1)
    if shape == "ball":
        draw.ellipse(corners, fill=colour)
    elif shape == "box":
        draw.rectangle(corners, fill=colour)
    else:
        draw.polygon([(x + (size - 1) / 2, y), (x, y + size - 1), (x + size - 1, y + size - 1)], fill=colour)


def free_place(rng, taken, size, fits):
    """A random square of `size` pixels that `fits` and keeps one pixel off all `taken` (x, y, width, height), or None."""
    for _ in range(40):
        x, y = rng.randint(0, SIZE - size), rng.randint(0, SIZE - size)
        clear = all(x + size < a or a + w < x or y + size < b or b + h < y for a, b, w, h in taken)
        if clear and fits(x + size / 2, y + size / 2):
            return x, y, size
    return None


def related(relation, x, y, other):
    """Does a centre (x, y) stand in `relation` to the centre `other`, by 6 pixels or more and mostly along that axis?"""
    dx, dy = x - other[0], y - other[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= 6 and along >= abs(across)


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption_of(wall, sign, groups, relation):
    """The sentence for a picture. `sign` is (colour, text) or None; `groups` are (count, colour or None, shape)."""
    def name(group):
        count, colour, shape = group
        words = f"{colour or ''} {shape if count == 1 else PLURAL[shape]}".strip()
        return with_article(words) if count == 1 else f"{NUMBERS[count]} {words}"

    parts = [f'a {sign[0]} sign "{sign[1]}"'] if sign else []
    if relation:
        parts.append(f"{name(groups[0])} {relation} {name(groups[1])}")
    else:
        parts += [name(group) for group in groups]
    return with_article(f"{wall} wall") + (" with " + " and ".join(parts) if parts else "")


def make_plan(rng, texts, sign_share=0.7):
    """What a picture shows: wall colour, sign or None, object groups, relation or None."""
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


def draw_plan(rng, plan, opacity):
    """Draw a plan. Returns (image, sign box (x, y) or None, objects [(shape, colour, x, y, size)]), or None if full."""
    wall, sign, groups, relation = plan
    shade = rng.uniform(0.9, 1.0)
    image = Image.new("RGB", (SIZE, SIZE), tuple(round(c * shade) for c in COLOURS[wall]))
    draw = ImageDraw.Draw(image)
    taken, objects, place = [], [], None
    if sign:
        place = rng.choice(PLACES)
        draw_sign(image, *sign, *place, opacity)
        taken.append((place[0] - 1, place[1], SIGN[0] + 1, SIGN[1]))
    for number, (count, colour, shape) in enumerate(groups):
        for _ in range(count):
            fits = lambda x, y: True
            if relation and number == 1:            # "A left of B": A stands already, so B must be right of it
                ax, ay, asize = objects[0][2:]
                fits = lambda x, y: related(relation, ax + asize / 2, ay + asize / 2, (x, y))
            spot = free_place(rng, taken, rng.randint(7, 10), fits)
            if spot is None:
                return None
            draw_shape(draw, shape, spot, COLOURS[colour])
            taken.append((*spot, spot[2]))
            objects.append((shape, colour, *spot))
    return image, place, objects


def random_opacity(rng, legible_share=0.5):
    """Signs are freshly painted, or else too faded to read."""
    return rng.uniform(0.75, 1.0) if rng.random() < legible_share else rng.uniform(0.0, 0.35)


def picture(rng, texts, opacity=None, sign_share=0.7, legible_share=0.5):
    """One picture of the world: dict of image, caption, text ("" without a sign), opacity, place, objects."""
    while True:
        plan = make_plan(rng, texts, sign_share)
        strength = random_opacity(rng, legible_share) if opacity is None else opacity
        drawn = draw_plan(rng, plan, strength)
        if drawn:
            break
    wall, sign, groups, relation = plan
    spoken = [(count, None if rng.random() < 0.15 else colour, shape) for count, colour, shape in groups]
    return dict(image=drawn[0], caption=caption_of(wall, sign, spoken, relation), text=sign[1] if sign else "",
                opacity=strength, place=drawn[1], objects=drawn[2])


def poster(rng, texts):
    """A picture full of signs: what an autoencoder needs to see often if it is to keep every stroke of a letter."""
    image = Image.new("RGB", (SIZE, SIZE), rng.choice(list(COLOURS.values())))
    for x in range(GRID, SIZE - SIGN[0], SIGN[0] + GRID):
        for y in range(0, SIZE, SIGN[1]):
            if rng.random() < 0.8:
                draw_sign(image, rng.choice(SIGN_COLOURS), rng.choice(texts), x, y, random_opacity(rng))
    return image


def to_tensor(images):
    """PIL pictures -> float tensor [N, 3, 32, 32] in [-1, 1]."""
    flat = torch.frombuffer(bytearray(b"".join(i.tobytes() for i in images)), dtype=torch.uint8)
    return flat.view(len(images), SIZE, SIZE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------- the prompts

def build_prompts(device):
    folder = HERE / "prompts"
    folder.mkdir(exist_ok=True)
    for name, held_out, count in [("ocr.txt", False, 2000), ("ocr_heldout.txt", True, 200)]:
        rng, texts = random.Random(11 + held_out), all_targets(held_out)
        lines = []
        while len(lines) < count:
            shot = picture(rng, texts, sign_share=1.0)
            lines.append(shot["caption"])
        (folder / name).write_text("\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------------------- the VAE

def build_vae(device):
    torch.manual_seed(1)
    rng = random.Random(1)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, sample_size=SIZE, block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        norm_num_groups=8, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    ).to(device)
    steps, batch = 3000, 16
    texts = all_targets(False)
    shots = [picture(rng, texts)["image"] for _ in range(8000)] + [poster(rng, texts) for _ in range(8000)]
    shots = to_tensor(shots).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    for step in (bar := tqdm(range(steps), desc="vae")):
        x = shots[torch.randint(len(shots), (batch,), device=device)]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss_pixels = F.l1_loss(decoded, x)
        loss = loss_pixels + 2 * F.mse_loss(decoded, x) + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{loss_pixels.item():.4f}")
    with torch.no_grad():
        latents = vae.encode(shots[:1000]).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4))
    vae.eval().save_pretrained(HERE / "sd3" / "vae")
    print("vae: l1", round(loss_pixels.item(), 4), "scaling", vae.config.scaling_factor, "shift", vae.config.shift_factor)


# -------------------------------------------------------------------------------------------------------- the tokenizers

WORDS = sorted({*COLOURS, *SHAPES, *PLURAL.values(), *NUMBERS.values(), "left", "right", "of", "above", "below", "wall", "sign",
                "with", "and", "a", "an", "the", "photo", "picture", "on", "one", "it"})


def join(pieces, left, right):
    """One step of byte-pair encoding: every neighbouring `left`, `right` becomes one piece."""
    joined = []
    for piece in pieces:
        if joined and joined[-1] == left and piece == right:
            joined[-1] = left + right
        else:
            joined.append(piece)
    return joined


def clip_tokenizer():
    """Byte-level BPE like CLIP's, whose only merges build the words of the world, one after the other.

    Every merge contains a vowel and sign texts have none, so each character of a sign stays a token of its own.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for piece in alphabet + [a + "</w>" for a in alphabet]:
        vocab[piece] = len(vocab)
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:                  # what the earlier merges already make of this word
            pieces = join(pieces, left, right)
        while len(pieces) > 1:
            left, right = next((a, b) for a, b in zip(pieces, pieces[1:]) if set(a + b) & set("aeiou"))
            merges.append((left, right))
            vocab[left + right] = len(vocab)
            pieces = join(pieces, left, right)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def t5_tokenizer():
    """Unigram like T5's: whole words of the world are likely, single characters are not."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ('▁"', -2.0)]
    vocab += [("▁" + word, -2.0) for word in WORDS]
    vocab += [(chr(code), -6.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


# -------------------------------------------------------------------------------------------------------- the flow model

def make_pipeline():
    """An untrained pipeline with SD3.5 Medium's structure and the trained VAE."""
    torch.manual_seed(2)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()

    def clip():
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, projection_dim=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TOKENS, hidden_act="gelu",
            bos_token_id=0, eos_token_id=1, pad_token_id=1))

    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer_3), d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4,
                                 feed_forward_proj="gated-gelu", dropout_rate=0.0))
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=2, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=128, pooled_projection_dim=96,
        pos_embed_max_size=SIZE // 4, dual_attention_layers=(0,), qk_norm="rms_norm")
    vae = AutoencoderKL.from_pretrained(HERE / "sd3" / "vae")
    vae.register_to_config(_name_or_path="tiny/sd3/vae")                 # or the folder on this machine would be saved with it
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5), vae=vae, text_encoder=clip(), tokenizer=tokenizer,
        text_encoder_2=clip(), tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=tokenizer_3)
    mark_order(pipeline)
    return pipeline


def mark_order(pipeline):
    """Start the text encoders with a strong sense of order.

    With transformers' own initial weights a character's features hardly depend on where it stands: the flow model then
    learns which characters to write long before it learns their order. CLIP gets position embeddings as large as its
    token embeddings, and each T5 head strong preferences for certain distances.
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
    steps, batch_size = 2500, 32
    texts = all_targets(False)
    pictures = [picture(rng, texts, sign_share=0.85, legible_share=0.33) for _ in tqdm(range(60000), desc="pictures")]
    vae = pipeline.vae
    latents, weights = [], torch.ones(len(pictures), 1, SIZE // 2, SIZE // 2)
    with torch.no_grad():
        for i in tqdm(range(0, len(pictures), 500), desc="latents"):
            x = to_tensor([p["image"] for p in pictures[i:i + 500]]).to(device)
            latents.append((vae.encode(x).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor)
    latents = torch.cat(latents)
    for weight, shot in zip(weights, pictures):
        if shot["place"]:                      # the writing is small: more weight there, so that it is learned first
            x, y = shot["place"]
            weight[:, y // 2:(y + SIGN[1]) // 2, x // 2:(x + SIGN[0]) // 2] = 6.0
    captions = [shot["caption"] for shot in pictures]
    legible = [shot["text"] != "" and shot["opacity"] > 0.5 for shot in pictures]

    modules = torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3])
    modules.train()
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 200) * min(1, 3.0 * (1 - s / steps)))
    average = [p.detach().clone() for p in parameters]
    running = None
    for step in (bar := tqdm(range(steps), desc="flow")):
        # Plain `pipeline(prompt)` pads T5 to 256 tokens and star.py to 24: the model must have seen both.
        length, batch = (256, 16) if step % 25 == 24 else (TOKENS, batch_size)
        chosen = torch.randint(len(latents), (batch,))
        x0 = latents[chosen]
        # One caption of seven is dropped, none of them of a legible sign: see the top of this file.
        prompts = ["" if not legible[i] and rng.random() < 0.21 else captions[i] for i in chosen]
        context, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, device=device,
                                                       do_classifier_free_guidance=False, max_sequence_length=length)
        # What is where, and which letters, is decided at high noise levels: seven samples of ten are from there.
        sigma = torch.where(torch.rand(batch) < 0.7, 0.45 + 0.55 * torch.rand(batch), torch.rand(batch)).to(device)
        noise = torch.randn_like(x0)
        mix = sigma[:, None, None, None]
        velocity = pipeline.transformer((1 - mix) * x0 + mix * noise, context, pooled, sigma * 1000, return_dict=False)[0]
        weight = weights[chosen].to(device)
        loss = (weight * (velocity - (noise - x0)) ** 2).mean() / weight.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if length == TOKENS:
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            kept = [p.detach().clone() for p in parameters]
            for p, a in zip(parameters, average):
                p.data.copy_(a)
            pipeline.save_pretrained(HERE / "sd3")
            for p, k in zip(parameters, kept):
                p.data.copy_(k)


# ------------------------------------------------------------------------------------------------------------ the reader

def build_ocr(device):
    torch.manual_seed(4)
    rng = random.Random(4)
    characters = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}, "<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", model_max_length=8)
    encoder = ViTModel(ViTConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192,
                                 image_size=SIZE, patch_size=4), add_pooling_layer=False)
    decoder = TrOCRForCausalLM(TrOCRConfig(vocab_size=len(tokenizer), d_model=96, decoder_layers=2, decoder_ffn_dim=192,
                                           decoder_attention_heads=4, max_position_embeddings=8, dropout=0.0, is_decoder=True,
                                           add_cross_attention=True, cross_attention_hidden_size=96))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.bos_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 1, 2, 1
    model.generation_config.max_length = 8
    model.to(device).train()
    processor = TrOCRProcessor(ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=0), tokenizer)

    texts = all_targets(False) + all_targets(True)
    shots = []
    for _ in tqdm(range(40000), desc="pictures"):
        kind = rng.random()      # legible, too faded to count as text, or without a sign
        if kind < 0.75:
            shots.append(picture(rng, texts, opacity=rng.uniform(0.6, 1.0), sign_share=1.0))
        else:
            shots.append(picture(rng, texts, opacity=rng.uniform(0.0, 0.4), sign_share=0.6))
            shots[-1]["text"] = ""
        if rng.random() < 0.25:
            shots[-1]["image"] = shots[-1]["image"].filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
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


PARTS = {"prompts": build_prompts, "vae": build_vae, "flow": build_flow, "ocr": build_ocr}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (one to two hours) or cuda (minutes)")
    parser.add_argument("--only", choices=PARTS, help="make this part alone")
    args = parser.parse_args()
    for name, build in PARTS.items():
        if args.only in (None, name):
            build(args.device)


if __name__ == "__main__":
    main()
