"""STAR: spatiotemporal reward allocation for text-to-image flow models, in one file.

    python star.py --task ocr

A flow model paints by taking noise away in T steps. Reinforcement learning makes these steps random decisions and makes
those likelier that led to good pictures:

1. Paint a group of pictures per prompt with a sampler that adds noise (`sde_step`, `rollout`). Each step then is a draw from
   a Gaussian around what the model proposes. That Gaussian is the *policy*, one such draw a *transition*.
2. Judge the pictures. A reward minus the mean of its group, divided by the rewards' spread, is the *advantage*: how much
   better than its siblings a picture is (`group_advantages`).
3. Raise the probability of the transitions of the better pictures and lower that of the others' (`star_loss`). New
   probability over old is the *ratio*.

Flow-GRPO (arXiv 2505.05470) applies a picture's advantage with the same strength everywhere in it. STAR (arXiv 2606.17979)
asks the model itself where the words that matter went, the *core words*, and applies it there: the image positions whose
attention falls on those words get a large share of it and the others a small one. Only STAR's abstract is public; how
attention becomes a map (`AttentionAllocator`), a map becomes weights (`allocation_weights`) and the ratio one per position
(`star_loss`) are this project's own choices.

Read from top to bottom: arguments (to be skimmed at first), core words, AttentionAllocator, sde_step, rollout,
group_advantages, star_loss, one iteration. That is the method. Then come pictures, checkpoints, main, benchmark.

Symbols: x latents [B, C, H, W] of B pictures; sigma the noise level, from 1 (noise) to 0 (picture); v the velocity; k one
of the T denoising steps, S of which are trained; p one of the H x W positions, which share h x w image tokens; m the map,
w the weights, A the advantage; K prompts with G pictures each; b, c one picture, one channel; lam, a, eps, beta four
strengths (allocation, noise, clipping, KL). L is the loss and, in shapes, the number of text tokens; D a number of features.
"""
import argparse
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")     # before the import: it warns of packages that nothing here needs
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from rewards import content_word_spans, make_task, parts_of, quoted_span

HERE = Path(__file__).parent
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------------- arguments

def option(default, help, choices=None, metavar=None):
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass
class Arguments:
    """Everything a run depends on. These defaults suit the miniature on two CPU cores; FULL_SIZE below has those for real models."""

    # The run
    task: str = option("ocr", "what is rewarded: ocr, geneval, pickscore, your FILE.py:CLASS, or a mixture such as ocr:0.7,pickscore:0.3")
    model: str = option("tiny/sd3", "folder or hub name of a Stable Diffusion 3 pipeline")
    prompts: str = option(None, "file with one training prompt per line; the task's own by default", metavar="FILE")
    heldout_prompts: str = option(None, "file with one prompt per line for evaluation; the task's own by default", metavar="FILE")
    reward_model: str = option(None, "folder or hub name of the model that judges; two with a comma where a task needs two, semicolons between tasks")
    out: str = option(None, "folder for everything the run writes; runs/<task>-<allocation>-<seed> by default", metavar="FOLDER")
    resume: bool = option(False, "continue the run in --out from its last checkpoint")
    seed: int = option(0, "seed of prompts and noise")
    iterations: int = option(20, "iterations of sampling and updating")
    evaluate_every: int = option(2, "iterations between evaluations on the held-out prompts")
    evaluation_prompts: int = option(96, "held-out prompts, one picture each")
    save_every: int = option(10, "iterations between checkpoints")
    keep: int = option(1, "checkpoints to keep, the newest ones")

    # Allocation
    allocation: str = option("spatial", "uniform: all positions alike, as in Flow-GRPO; spatial weighs positions, spatiotemporal steps as well",
                             ("uniform", "spatial", "spatiotemporal"))
    lam: float = option(1.0, "strength of the allocation, from 0 (as uniform) to 1")
    map_blocks: str = option(None, "transformer blocks whose attention makes the map, such as 2,3; the last quarter by default", metavar="LIST")

    # Sampling
    prompts_per_iteration: int = option(6, "K, prompts per iteration")
    group_size: int = option(16, "G, pictures per prompt")
    batch_size: int = option(48, "pictures in one forward pass; divides prompts_per_iteration * group_size")
    height: int = option(None, "height and width of the pictures in pixels; by default the miniature's 32, 512 for full-size models")
    steps: int = option(10, "T, denoising steps")
    evaluation_steps: int = option(10, "denoising steps of the pictures painted for evaluation")
    stochastic_steps: int = option(3, "S, how many of these steps are stochastic and trained in each iteration")
    stochastic_range: str = option("0-3", "first and last step that may be stochastic", metavar="FIRST-LAST")
    stochastic_choice: str = option("window", "consecutive steps (window) or any (random), drawn anew in each iteration", ("window", "random"))
    noise_level: float = option(0.7, "a, strength of the noise of a stochastic step")
    guidance_scale: float = option(1.0, "classifier-free guidance in sampling, training and evaluation; 1 is none")
    same_noise: bool = option(True, "start all pictures of a group from the same noise, so that only the stochastic steps tell them apart")
    t5: bool = option(True, "use the third text encoder, the largest; SD3 can do without")
    max_sequence_length: int = option(24, "T5 tokens of a prompt")

    # Update
    updates_per_iteration: int = option(1, "optimizer steps into which the pictures of an iteration are divided")
    optimizer: str = option("adamw", "adamw keeps 8 bytes per parameter, adafactor next to nothing", ("adamw", "adafactor"))
    learning_rate: float = option(2e-4, "the optimizer's step size")
    weight_decay: float = option(1e-4, "the optimizer's weight decay")
    max_gradient_norm: float = option(1.0, "gradients longer than this are shortened to it")
    clip_range: float = option(2e-2, "eps of the clipped objective, for per-position ratios; acts only from an iteration's second update on")
    advantage_clip: float = option(5.0, "advantages are kept within plus and minus this")
    global_std: bool = option(False, "divide advantages by the deviation of all rewards of the iteration instead of their group's")
    kl_weight: float = option(0.0, "beta, the weight of the pull towards the starting weights; 0 keeps no copy of them")
    ema_decay: float = option(0.0, "exponential moving average of the weights, with this decay, for evaluation and the checkpoint; 0 is none")

    # Machine
    device: str = option("auto", "auto: cuda where there is one", ("auto", "cpu", "cuda"))
    precision: str = option("auto", "of the forward passes, the weights stay float32; auto: bfloat16 on cuda", ("auto", "float32", "bfloat16"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")
    reward_device: str = option("auto", "where the model that judges runs; auto: on --device", ("auto", "cpu", "cuda"))
    compile: bool = option(False, "compile the transformer's blocks: minutes at the start, faster afterwards")
    low_memory: bool = option(False, "other defaults for a small GPU: see LOW_MEMORY in star.py")


# What replaces these defaults for a full-size model (a transformer for latents of 64 x 64 or more: SD3 Medium, SD3.5 Medium,
# SD3.5 Large). Marked F: Flow-GRPO's published settings for SD3.5 Medium. The others are ours, for one GPU; nobody has tuned them.
FULL_SIZE = dict(
    height=512, steps=10, evaluation_steps=40, guidance_scale=4.5, noise_level=0.7, group_size=24, same_noise=False, global_std=True,    # F
    stochastic_steps=3, stochastic_range="0-4",     # F (its fast variant): a window of 3 steps in the first half
    weight_decay=1e-4, max_gradient_norm=1.0, advantage_clip=5.0,                                                                        # F
    clip_range=6e-3,                # F has 1e-4 for one ratio per picture; one per position spreads sqrt(64 * 64) times as far (`star_loss`)
    learning_rate=1e-5,             # F has 3e-4, for low-rank adapters (LoRA); full-parameter training needs far less
    ema_decay=0.99,                 # F averages with 0.9 after every eighth update, which is about the same
    max_sequence_length=256,        # as diffusers' pipeline does by default
    prompts_per_iteration=8, batch_size=8, gradient_checkpointing=True, iterations=500, evaluate_every=20, save_every=20)
# The KL weights are F's numbers, but not its pull: F's code divides by 2 s^2, the density (and `kl_to_start`) by 2 std^2 =
# 2 s^2 |dt|, which at the trained steps makes ours 12 to 25 times as strong. In a mixture the first task's counts. geneval
# makes its prompts from the detector's labels.
FULL_SIZE_TASK = {
    "ocr": dict(kl_weight=0.04, reward_model="florence-community/Florence-2-large",
                prompts="tiny/prompts/real_ocr.txt", heldout_prompts="tiny/prompts/real_ocr_heldout.txt"),
    "geneval": dict(kl_weight=0.04, reward_model="facebook/mask2former-swin-small-coco-instance,openai/clip-vit-large-patch14"),
    "pickscore": dict(kl_weight=0.01, reward_model="yuvalkirstain/PickScore_v1,laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
                      prompts="tiny/prompts/real_ocr.txt", heldout_prompts="tiny/prompts/real_ocr_heldout.txt")}

# What --low-memory replaces. The text encoders, the starting weights and the average wait on the CPU in any case.
LOW_MEMORY = dict(batch_size=1, gradient_checkpointing=True, optimizer="adafactor", reward_device="cpu")


def stop(message: str):
    """End the program over a mistake of its user's: one sentence, exit code 2."""
    print(f"star.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------- core words to token positions

def core_token_mask(prompt, spans, clip_tokenizer, t5_tokenizer, max_sequence_length) -> torch.Tensor:
    """Which positions of SD3's text context belong to the core words of a prompt.

    Which words are core is for the task to say: `core_spans` in rewards.py gives them as characters of the prompt.
    SD3's context is the CLIP tokens (both CLIP encoders share their positions) followed by the T5 tokens. A token is
    core when its characters, by the tokenizer's own offset mapping, overlap one of the `spans`. A core word that is cut
    off by truncation simply has no tokens.

    Args: prompt; spans, list of (start, end) characters; the two fast tokenizers, T5's None where the model runs without
        T5 (the places of its tokens then hold zeros); max_sequence_length, T5's tokens.
    Returns: bool [clip_tokenizer.model_max_length + max_sequence_length].
    """
    masks = []
    for tokenizer, length in [(clip_tokenizer, clip_tokenizer.model_max_length), (t5_tokenizer, max_sequence_length)]:
        offsets = [(0, 0)] * length
        if tokenizer is not None:
            encoded = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True)
            offsets = encoded["offset_mapping"]
        masks += [any(start < b and a < end for a, b in spans) for start, end in offsets]
    return torch.tensor(masks)


def core_tokens_of(pipeline, prompts, spans, max_sequence_length) -> torch.Tensor:
    """`core_token_mask` of each prompt and its spans by the pipeline's tokenizers: bool [B, L]."""
    return torch.stack([core_token_mask(prompt, core, pipeline.tokenizer, pipeline.tokenizer_3, max_sequence_length)
                        for prompt, core in zip(prompts, spans)])


# ---------------------------------------------------------------------------------------------------- AttentionAllocator

class AttentionAllocator:
    """Records how much attention each image position pays to the core words while the transformer runs.

    In SD3's joint blocks image and text attend together: every image query has a softmax over [image; text] keys. The map
    is the part of that softmax which falls on the core tokens (STAR has maps from "text-image attention"; this form is ours):

        m[b, p] = mean over heads and blocks of  sum over core tokens j of  softmax(query[p] . key / sqrt(d))[j]

    with d the features of one head. Attention is just such a sum, of softmax[j] times value[j] over all tokens j. With the
    indicator of the core tokens in place of the values it is the sum wanted here; so the fused kernel computes the map, and
    no attention matrix is ever kept.

    The block's own processor still computes the block's output, so the transformer's result is the same to the bit. The map
    is data, as the reward is: no gradient flows through it, lest the model learn to look elsewhere instead of painting
    better. It is recorded in the rollout alone.

        with torch.no_grad(), AttentionAllocator(transformer, core_tokens, blocks) as allocator:
            transformer(...)
        attention = allocator.map()

    One allocator sees one denoising step: `map` averages all that was recorded. Around a whole pipeline call, `recorded`
    holds one [B, image tokens] for each step and block, in the order of the calls.

    Args:
        transformer: a diffusers SD3Transformer2DModel, unwrapped.
        core_tokens: bool [B, text tokens], a row per picture (see `core_tokens_of`). With guidance the batch is
            [unconditional; conditional], as diffusers has it, and only its last B rows are recorded: the map comes from
            the conditional half.
        blocks: indices of the joint blocks to look at (see `default_map_blocks`).
    Raises: ValueError where the transformer is called with other numbers of pictures or text tokens, and where a block has
        another attention processor than SD3's own (an IP-adapter's, or that of an allocator which is active already).
    """

    def __init__(self, transformer, core_tokens, blocks):
        self.attentions = [transformer.transformer_blocks[index].attn for index in blocks]
        self.core_tokens = core_tokens

    def __enter__(self):
        for processor in (attention.processor for attention in self.attentions):
            if type(processor) is not JointAttnProcessor2_0:
                name = getattr(processor, "__qualname__", type(processor).__name__)
                raise ValueError(f"AttentionAllocator records JointAttnProcessor2_0, not {name}.")
        self.recorded, self.originals = [], [attention.processor for attention in self.attentions]
        for attention, original in zip(self.attentions, self.originals):
            attention.processor = self.recording(original)
        return self

    def __exit__(self, *exception):
        for attention, original in zip(self.attentions, self.originals):
            attention.processor = original

    def recording(self, original):
        def processor(attention, hidden_states, encoder_hidden_states, *args, **kwargs):
            with torch.no_grad():                                        # data, also for a caller who wants gradients
                self.recorded.append(self.core_mass(attention, hidden_states, encoder_hidden_states))
            return original(attention, hidden_states, encoder_hidden_states, *args, **kwargs)
        return processor

    def core_mass(self, attention, image, text):
        """Attention mass on the core tokens [B, image tokens], from the block's normalised features [B or 2 B, tokens, D]."""
        batch, length = self.core_tokens.shape
        if len(image) not in (batch, 2 * batch) or text.shape[1] != length:
            raise ValueError(f"core_tokens is for {batch} pictures and {length} text tokens, but the transformer was given {len(image)} and"
                             f" {text.shape[1]}; it needs a row for each picture of the batch and the pipeline's own max_sequence_length.")
        image, text = image[-batch:], text[-batch:]

        def heads(projected, norm):                                      # [B, tokens, D] -> [B, heads, tokens, d]
            projected = projected.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            return projected if norm is None else norm(projected)

        query = heads(attention.to_q(image), attention.norm_q)
        key = torch.cat([heads(attention.to_k(image), attention.norm_k),
                         heads(attention.add_k_proj(text), attention.norm_added_k)], dim=2)
        indicator = F.pad(self.core_tokens, (image.shape[1], 0)).to(key)              # [B, keys]: image keys are not core
        indicator = indicator[:, None, :, None].expand_as(key).contiguous()           # fast kernels want values shaped like keys
        return F.scaled_dot_product_attention(query, key, indicator)[..., 0].float().mean(1)       # all d values are the same

    def map(self):
        """Mean over all recorded blocks: [B, image tokens], each in [0, 1]."""
        return torch.stack(self.recorded).mean(0)


def default_map_blocks(count):
    """The last quarter of `count` blocks: later ones find the words' place better (README, Results), and each costs time."""
    return list(range(count - max(1, count // 4), count))


def allocation_weights(maps, size, allocation="spatial", lam=1.0):
    """Attention maps to weights (STAR allocates; this form of it is ours):

        spatial:           w[b, k, p] = (1 - lam) + lam * m[b, k, p] / (mean of m[b, k] over p)
        spatiotemporal:    w[b, k, p] = (1 - lam) + lam * m[b, k, p] / (mean of m[b] over k and p)

    In the second, a step whose attention on the core words is strong gets more than others. Dividing by the mean gives
    weights of mean 1: the advantage is handed out differently, not increased. Where no attention at all falls on core words,
    in particular where a prompt has none, w = 1.

    Args: maps [B, S, h, w] >= 0, those of the trained steps alone; size, the (H, W) of the latents, multiples of (h, w);
        allocation, spatial or spatiotemporal (uniform is w = 1 without any map); lam in [0, 1]. For video, maps
        [B, S, f, h, w] and size (F, H, W).
    Returns: weights [B, S, H, W] (or [B, S, F, H, W]) in float32, mean 1, >= 0.
    """
    maps = F.interpolate(maps.float(), size=size, mode="nearest")        # a token speaks for all positions of its patch
    first = {"spatial": 2, "spatiotemporal": 1}[allocation]
    mean = maps.mean(dim=tuple(range(first, maps.dim())), keepdim=True)
    return (1 - lam) + lam * torch.where(mean == 0, 1.0, maps / mean)


# -------------------------------------------------------------------------------------------------------------- sde_step

def sde_step(latents, velocity, sigma, sigma_next, sigma_max, noise_level, noise):
    """One step of the flow as a stochastic differential equation, SDE (Flow-GRPO, section "From ODE to SDE").

        s    = a * sqrt(sigma / (1 - sigma))            at sigma = 1 with 1 - sigma_max as the denominator
        mean = x * (1 + s^2 / (2 sigma) * dt) + v * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
        std  = s * sqrt(-dt)
        x'   = mean + std * noise

    with dt = sigma_next - sigma < 0, and SD3's convention x = (1 - sigma) * picture + sigma * noise, v = dx / dsigma.

    Why noise at all? A deterministic sampler has no probabilities that depend on the model's weights, so there is nothing
    that a policy gradient could raise; the random start is not the model's decision.
    Why is the mean not the plain flow's, x + v * dt? Added noise alone would make x vary more than the model has seen in its
    training. The terms with s^2 are -dt * s^2 / 2 times the score, the direction in which x becomes more probable: minus
    the expected noise in x over sigma, and as v is noise minus picture, that noise is x + (1 - sigma) v. They pull x together
    by as much as the added noise spreads it. In the limit of small steps x is distributed at every sigma as under the plain
    flow, if v is that flow's own velocity; with guidance it is not quite. `noise_level` a = 0 is the flow's Euler step.
    Why sigma_max? To keep s finite at sigma = 1. It is the schedule's second sigma, the highest one below 1 (Flow-GRPO's
    choice).

    Args: latents x and velocity v [B, C, H, W]; sigma > sigma_next, floats in [0, 1]; sigma_max, see above; noise
        [B, C, H, W], standard normal, or 0.0 where only the mean is wanted.
    Returns: (next latents x', mean, std), the first two [B, C, H, W] in float32, std a float.
    """
    latents, velocity = latents.float(), velocity.float()
    dt = sigma_next - sigma
    s = noise_level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_max)))
    mean = latents * (1 + s**2 / (2 * sigma) * dt) + velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * math.sqrt(-dt)
    return mean + std * noise, mean, std


def position_log_prob(sample, mean, std):
    """The log-probability of a transition at each latent position.

        logp[b, p] = mean over channels of  log N(x'[b, :, p]; mean[b, :, p], std^2)

    Given x and v, the noise of one position is independent of the others', so the density of the whole step is exactly the
    product of the positions' densities. Each position is a decision of its own, with a probability and a ratio of its own.
    How much each counts is then a choice, the weights. Unequal ones change the direction of the gradient, which no longer is
    that of the expected reward: a bias, accepted for the sake of a clearer signal.

    The mean over positions is Flow-GRPO's log-probability of the step. Mean and not sum over channels is its convention,
    too. The ratio is then the C-th root of the true one, which keeps it near 1; where it is 1, the gradient is 1 / C as long.

    Args: sample, mean [B, C, H, W]; std > 0 with sqrt(-dt) included, a float or a tensor [B, 1, 1, 1]. For video, [B, C, F, H, W]
        and [B, 1, 1, 1, 1].
    Returns: [B, H, W].
    """
    sample, mean = sample.float(), mean.float()
    return (-((sample - mean) ** 2) / (2 * std**2) - torch.as_tensor(std).log() - 0.5 * math.log(2 * math.pi)).mean(1)


# --------------------------------------------------------------------------------------------------------------- rollout

@dataclass
class Rollout:
    """What a rollout leaves behind."""
    latents: torch.Tensor        # [B, T + 1, C, H, W]: pure noise first, the finished picture last
    log_prob: torch.Tensor       # [B, S, H, W] of the transitions of the stochastic steps; None if there are none
    maps: torch.Tensor           # [B, number of map steps, h, w] attention on the core words; None likewise


def predict_velocity(transformer, latents, sigma, prompt, guidance_scale, empty_prompt):
    """The model's velocity v(x, sigma, prompt) [B, C, H, W], with classifier-free guidance where guidance_scale is not 1.

    `prompt` and `empty_prompt` are (context [B, L, D], pooled [B, P]) pairs; the latter has B = 1 and is for guidance.
    """
    if guidance_scale == 1:
        timestep = latents.new_full((len(latents),), sigma * 1000)           # SD3 counts its time from 1000 to 0
        return transformer(latents, *prompt, timestep, return_dict=False)[0]
    context, pooled = (torch.cat([empty.expand_as(full), full]) for empty, full in zip(empty_prompt, prompt))
    timestep = latents.new_full((2 * len(latents),), sigma * 1000)
    without, given = transformer(torch.cat([latents, latents]), context, pooled, timestep, return_dict=False)[0].float().chunk(2)
    return without + guidance_scale * (given - without)


@torch.no_grad()
def rollout(transformer, latents, prompt, empty_prompt, sigmas, stochastic_steps, generator, noise_level=0.7,
            guidance_scale=1.0, core_tokens=None, map_steps=(), map_blocks=()):
    """Paint: from noise to picture through all sigmas; the `stochastic_steps` by the SDE, the others by the plain flow.

    Args: latents [B, C, H, W], standard normal; prompt, empty_prompt, guidance_scale: see `predict_velocity`; sigmas,
        T + 1 floats from 1 down to 0; stochastic_steps and map_steps, collections of step numbers; generator, the source
        of the noise; core_tokens bool [B, L] and map_blocks: see AttentionAllocator.
    Returns: a Rollout.
    """
    states, log_probs, maps = [latents], [], []
    noises = {step: torch.randn(latents.shape, generator=generator).to(latents.device)           # here, as a copy in the loop would
              for step in sorted(stochastic_steps)}                                              # wait for the GPU
    height, width = (side // transformer.config.patch_size for side in latents.shape[-2:])
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        allocator = AttentionAllocator(transformer, core_tokens, map_blocks) if step in map_steps else nullcontext()
        with allocator:
            velocity = predict_velocity(transformer, latents, sigma, prompt, guidance_scale, empty_prompt)
        if step in map_steps:
            maps.append(allocator.map().unflatten(-1, (height, width)))
        if step in stochastic_steps:
            latents, mean, std = sde_step(latents, velocity, sigma, sigma_next, sigmas[1], noise_level, noises[step])
            log_probs.append(position_log_prob(latents, mean, std))
        else:
            latents, _, _ = sde_step(latents, velocity, sigma, sigma_next, sigmas[1], 0.0, 0.0)
        states.append(latents)
    stack = lambda tensors: torch.stack(tensors, dim=1) if tensors else None
    return Rollout(stack(states), stack(log_probs), stack(maps))


def transition(transformer, painted, step, prompt, empty_prompt, sigmas, noise_level, guidance_scale):
    """The policy's Gaussian for step number `step` of a Rollout `painted`: (mean [B, C, H, W], std, a float).

    The rollout has computed it already, but without the graph that a gradient needs. And after an update the weights, and
    so the Gaussian, are others; the ratio says how much likelier the new one makes the sample that was drawn. With the
    rollout's weights, batches and dtypes this is the rollout's own Gaussian, so that the first ratio is 1, as it must be:
    nothing has been learned yet.
    """
    latents = painted.latents[:, step]
    velocity = predict_velocity(transformer, latents, sigmas[step], prompt, guidance_scale, empty_prompt)
    _, mean, std = sde_step(latents, velocity, sigmas[step], sigmas[step + 1], sigmas[1], noise_level, 0.0)
    return mean, std


# ------------------------------------------------------------------------------------------------------ group_advantages

def group_advantages(rewards, global_std=False, clip=None, eps=1e-4):
    """How much better than its siblings a picture is (Flow-GRPO, section "GRPO on Flow Matching").

        A[i, g] = (r[i, g] - mean over g of r[i]) / (std over g of r[i] + eps)          for prompt i and its picture g

    Each reward is compared only with those of its own prompt. So the prompt's difficulty cancels, without a second network
    that would have to predict it, and the worse pictures of an easy prompt are made less likely, too. Division by the
    spread makes prompts whose rewards differ much and little count alike.

    Args: rewards r [K, G]; global_std, divide by the deviation of all rewards instead of each group's; clip, keep
        advantages within plus and minus this. Returns: [K, G], before clipping with mean 0 in each group; a group of equal
        rewards, from which nothing can be learned, gets 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)     # the rounded mean may still differ from them
    std = rewards.std(unbiased=False) if global_std else rewards.std(dim=1, keepdim=True, unbiased=False)
    advantages = torch.where(equal, 0.0, centred / (std + eps))
    return advantages if clip is None else advantages.clamp(-clip, clip)


# ------------------------------------------------------------------------------------------------------------- star_loss

def star_loss(log_prob, old_log_prob, advantages, weights, clip_range):
    """The weighted clipped objective (Flow-GRPO, section "GRPO on Flow Matching", with a weight and a ratio per position).

        ratio[b, k, p] = exp(logp_new - logp_old)
        L = - mean over b, k, p of  w[b, k, p] * min(ratio * A,  clip(ratio, 1 - eps, 1 + eps) * A)

    Why the minimum? The pictures were drawn by the old policy and tell about its neighbourhood alone. Once a ratio is more
    than eps away from 1 in the direction that A wants, the clipped term is the smaller one, and constant: its gradient
    ends. Where it went the other way the first term is the smaller one and brings it back.

    What of this is Flow-GRPO? It has one ratio per picture and step, exp of the mean over p. At ratio = 1 nothing is clipped
    and the derivative of a ratio is that of its logarithm; so with w = 1 the first gradient after a rollout is Flow-GRPO's
    own (the KL aside, see FULL_SIZE_TASK). With one update per iteration, the default, every gradient is a first one.
    Later ones differ: positions are clipped one by one.

    Why another clip range? A position averages C terms where Flow-GRPO averages C * H * W, so its log-ratio spreads about
    sqrt(H * W) times as far, and eps should be as much wider.

    Args: log_prob, old_log_prob, weights [B, S, H, W], or any other shape that begins with B; advantages [B]; clip_range
        eps. The weights are data, like the advantages: with a gradient the model could move its attention instead of
        painting better.
    Returns: (loss, ratio of log_prob's shape, clipped: bool, where the minimum is the clipped term).
    Raises: ValueError for other shapes, which would broadcast to a loss that is wrong.
    """
    if not log_prob.shape == old_log_prob.shape == weights.shape or advantages.shape != log_prob.shape[:1]:
        raise ValueError(f"log_prob {tuple(log_prob.shape)}, old_log_prob {tuple(old_log_prob.shape)} and weights {tuple(weights.shape)} must"
                         f" have one shape, and advantages {tuple(advantages.shape)} be one number for each of the first dimension.")
    ratio = torch.exp(log_prob - old_log_prob)
    advantages = advantages.view(-1, *[1] * (ratio.dim() - 1))
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -(weights.detach() * torch.minimum(free, bounded)).mean()
    return loss, ratio.detach(), bounded.detach() < free.detach()


def kl_to_start(mean, start_mean, std):
    """How far the policy has gone from where it started (Flow-GRPO, section "GRPO on Flow Matching"), added to L with beta:

        KL[b, p] = mean over channels of  (mean_new - mean_start)^2 / (2 std^2)

    which is the Kullback-Leibler divergence of two Gaussians of the same std, per channel. It is not weighted: all positions
    share the model's parameters, so those with little weight change, too, and only this holds them.
    Args: mean, start_mean [B, C, H, W]; std, a float. Returns: [B, H, W].
    """
    return ((mean - start_mean) ** 2 / (2 * std**2)).mean(1)


# --------------------------------------------------------------------------------------------------------- one iteration

@contextmanager
def visiting(device, *modules):
    """Within, the modules are on `device`; afterwards they wait on the CPU, where they take no room from the training."""
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")


@torch.no_grad()
def encode(pipeline, prompts, max_sequence_length):
    """Prompts to (context [B, L, D], pooled [B, P]) on the transformer's device, by the pipeline's own text encoders."""
    device = pipeline.transformer.device
    encoders = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    with visiting(device, *(encoder for encoder in encoders if encoder is not None)):
        context, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, device=device, do_classifier_free_guidance=False,
                                                       max_sequence_length=max_sequence_length)
    return context, pooled


def schedule(pipeline, steps):
    """The scheduler's noise levels for this number of steps: steps + 1 floats from 1 down to 0."""
    pipeline.scheduler.set_timesteps(steps)
    return pipeline.scheduler.sigmas.tolist()


@torch.no_grad()
def decode(vae, latents):
    """Latents [B, C, H, W] to a list of B PIL pictures."""
    pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


@dataclass
class Run:
    """What is loaded once and used in every iteration."""
    args: Arguments
    task: object
    device: torch.device
    pipeline: StableDiffusion3Pipeline
    optimizer: torch.optim.Optimizer
    start_transformer: SD3Transformer2DModel     # frozen, bfloat16 on a GPU; None without a KL weight
    average: dict                                # name -> averaged weight; empty without EMA
    empty_prompt: tuple                          # the encoded empty prompt
    blocks: list                                 # whose attention makes the map
    shape: tuple                                 # (C, H, W) of the latents
    bfloat16: bool                               # of the forward passes

    def autocast(self, cached=True):
        """The precision of the forward passes. Rollouts keep the bfloat16 copies of the weights from step to step (cached)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=cached)


class Stopwatch:
    """Seconds and peak memory (GiB on a GPU) of one phase after the other."""

    def __init__(self, device):
        self.cuda, self.seconds, self.memory = device.type == "cuda", {}, {}
        self.start()

    def start(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.since = time.perf_counter()

    def lap(self, phase):
        if self.cuda:
            torch.cuda.synchronize()
            self.memory[phase] = torch.cuda.max_memory_allocated() / 2**30
        self.seconds[phase] = round(time.perf_counter() - self.since, 4)
        self.start()


def rewards_of(task, pictures, prompts):
    """The task's rewards, float32 [B]. Ends the program where they are not one finite number per picture: they would train nothing."""
    rewards = torch.as_tensor(task.reward(pictures, prompts), dtype=torch.float32, device="cpu")
    if rewards.shape != (len(pictures),) or not rewards.isfinite().all():
        stop(f"the reward of {type(task).__name__} must be a finite number for each of {len(pictures)} pictures, but it is of shape"
             f" {tuple(rewards.shape)} with {(~rewards.isfinite()).sum()} that are not finite; --resume continues from the last checkpoint.")
    return rewards


def iterate(run, iteration, allocation):
    """One iteration of a Run: sample, judge, update. `allocation` as in Arguments. Returns its line of metrics."""
    args, transformer = run.args, run.pipeline.transformer
    images = args.prompts_per_iteration * args.group_size
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)     # so that a resumed run is the same
    sigmas = schedule(run.pipeline, args.steps)
    settings = run.empty_prompt, sigmas, args.noise_level, args.guidance_scale       # what a transition depends on besides the prompt
    watch = Stopwatch(run.device)

    # 1. Choose K prompts, and which steps are stochastic this time: few, as each costs a forward and a backward pass in the update.
    prompts = [run.task.prompts[i] for i in torch.randperm(len(run.task.prompts), generator=generator)[:args.prompts_per_iteration]]
    first_step, last_step = stochastic_range(args)
    if args.stochastic_choice == "window":
        start = torch.randint(first_step, last_step - args.stochastic_steps + 2, (1,), generator=generator).item()
        trained = list(range(start, start + args.stochastic_steps))
    else:
        choice = torch.randperm(last_step - first_step + 1, generator=generator)[:args.stochastic_steps]
        trained = sorted((first_step + choice).tolist())
    context, pooled = encode(run.pipeline, prompts, args.max_sequence_length)
    core = core_tokens_of(run.pipeline, prompts, map(run.task.core_spans, prompts), args.max_sequence_length).to(run.device)
    watch.lap("encode")

    # 2. Paint a group of pictures for each; keep the trajectories.
    group = torch.arange(args.prompts_per_iteration).repeat_interleave(args.group_size)       # which prompt a picture is of
    noise = torch.randn(args.prompts_per_iteration if args.same_noise else images, *run.shape, generator=generator).to(run.device)
    noise = noise[group] if args.same_noise else noise
    batches = [slice(i, i + args.batch_size) for i in range(0, images, args.batch_size)]
    given = [(context[group[part]], pooled[group[part]]) for part in batches]
    with run.autocast():
        rollouts = [rollout(transformer, noise[part], prompt, run.empty_prompt, sigmas, trained, generator, args.noise_level,
                            args.guidance_scale, core[group[part]], () if allocation == "uniform" else trained, run.blocks)
                    for part, prompt in zip(batches, given)]
    watch.lap("rollout")

    # 3. Judge them, and compare each with its group.
    pictures = [picture for painted in rollouts for picture in decode(run.pipeline.vae, painted.latents[:, -1])]
    watch.lap("decode")
    rewards = rewards_of(run.task, pictures, [prompts[i] for i in group])
    grouped = rewards.view(args.prompts_per_iteration, args.group_size)
    advantages = group_advantages(grouped, args.global_std, args.advantage_clip).flatten().to(run.device)
    watch.lap("reward")

    # 4. Raise the probability of what was better than its siblings, most where the core words are.
    if run.start_transformer is not None:            # what the starting weights would have done, needed for the KL
        with visiting(run.device, run.start_transformer), torch.no_grad(), run.autocast():
            start_means = [[transition(run.start_transformer, painted, step, prompt, *settings)[0] for step in trained]
                           for painted, prompt in zip(rollouts, given)]
    ratios, clips, kls, norms, peaks, skipped = [], [], [], [], [], 0
    per_update = len(batches) // args.updates_per_iteration
    for update in range(args.updates_per_iteration):
        for index in range(update * per_update, (update + 1) * per_update):
            painted = rollouts[index]
            weights = torch.ones_like(painted.log_prob)
            if allocation != "uniform":
                weights = allocation_weights(painted.maps, run.shape[1:], allocation, args.lam)
            peaks.append(weights.amax((-2, -1)).mean())                            # how uneven they are: 1 is uniform
            for j, step in enumerate(trained):                                     # one by one: activations of one step at a time
                with run.autocast(cached=False):                                   # a cache would hold copies of all weights
                    mean, std = transition(transformer, painted, step, given[index], *settings)
                log_prob = position_log_prob(painted.latents[:, step + 1], mean, std)
                loss, ratio, clipped = star_loss(log_prob, painted.log_prob[:, j], advantages[batches[index]], weights[:, j], args.clip_range)
                if run.start_transformer is not None:
                    kl = kl_to_start(mean, start_means[index][j], std).mean()
                    loss = loss + args.kl_weight * kl
                    kls.append(kl.detach())
                (loss / (per_update * len(trained))).backward()                    # together star_loss's mean over all b and k
                ratios.append(ratio.mean())
                clips.append(clipped.float().mean())
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), args.max_gradient_norm)
        if torch.isfinite(norm):
            run.optimizer.step()
        else:
            skipped += 1
        run.optimizer.zero_grad()
        norms.append(norm)
        for name, parameter in transformer.named_parameters() if run.average else ():
            run.average[name].lerp_(parameter.detach().to("cpu"), 1 - args.ema_decay)
    watch.lap("update")

    return {
        "iteration": iteration, "images": iteration * images,
        "reward_mean": rewards.mean().item(), "reward_std": rewards.std().item(),
        "groups_without_spread": (grouped.amax(1) == grouped.amin(1)).float().mean().item(),
        "ratio_mean": torch.stack(ratios).mean().item(), "clip_fraction": torch.stack(clips).mean().item(),
        "kl": torch.stack(kls).mean().item() if kls else 0.0, "gradient_norm": torch.stack(norms).mean().item(),
        "weight_peak": torch.stack(peaks).mean().item(), "skipped_updates": skipped,
        "seconds": watch.seconds, **({"peak_gib": watch.memory} if watch.memory else {}),
    }


# -------------------------------------------------------------------------------------------------------------- pictures

def evaluate(run, prompts, encoded):
    """One picture per prompt by the plain flow, from noise that is the same each time. Returns (rewards [B], pictures)."""
    args, pipeline, pictures = run.args, run.pipeline, []
    generator = torch.Generator().manual_seed(args.seed)
    latents = torch.randn(len(prompts), *run.shape, generator=generator).to(run.device)
    sigmas = schedule(pipeline, args.evaluation_steps)
    for start in range(0, len(prompts), args.batch_size):
        part = slice(start, start + args.batch_size)
        with run.autocast():
            painted = rollout(pipeline.transformer, latents[part], tuple(each[part] for each in encoded), run.empty_prompt, sigmas, (), generator,
                              guidance_scale=args.guidance_scale)
        pictures += decode(pipeline.vae, painted.latents[:, -1])
    return rewards_of(run.task, pictures, prompts), pictures


def mean_and_error(name, values):
    """The mean of `values` [N] and its standard error (None for a single value), as two entries of a line of metrics."""
    return {name: values.mean().item(), name + "_standard_error": values.std().item() / len(values) ** 0.5 if len(values) > 1 else None}


def draw_table(rows, path, side=144):
    """A table of pictures with text under each. `rows` are lists of (PIL picture, text), the text broken by its writer."""
    gap, line, font = 12, 17, ImageFont.load_default(13)
    heights = [side + gap + line * max(text.count("\n") + 1 for _, text in row) for row in rows]
    canvas = Image.new("RGB", (gap + (side + gap) * len(rows[0]), gap + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, y in zip(rows, itertools.accumulate([gap, *heights])):
        for x, (picture, text) in zip(itertools.count(gap, side + gap), row):
            smooth = Image.LANCZOS if picture.width > side else Image.NEAREST        # the miniature's pixels stay visible
            canvas.paste(picture.resize((side, side), smooth), (x, y))
            draw.multiline_text((x, y + side + 2), text, fill="black", font=font)
    canvas.save(path)


def draw_samples(samples, prompts, path):
    """samples.png: a row of each prompt's picture for every (title, pictures, rewards), from the same noise."""
    rows = [[(picture, f"{title}: reward {reward:.2f}") for picture, reward in zip(pictures, rewards)] for title, pictures, rewards in samples]
    rows[-1] = [(picture, text + "\n\n" + textwrap.fill(prompt, 22)) for (picture, text), prompt in zip(rows[-1], prompts)]
    draw_table(rows, path)


def overlay(picture, strength, colour=(230, 30, 30)):
    """The picture in grey with `colour` laid over it, as strongly as `strength` [h, w] in [0, 1] says."""
    tile = picture.convert("L").convert("RGB")
    tile.paste(colour, (0, 0), Image.fromarray((strength * 200).byte().cpu().numpy()).resize(tile.size, Image.NEAREST))
    return tile


def draw_maps(predicted, maps, finals, prompts, sigmas, path):
    """maps.png: a row per rollout; a column per step shows the picture the model predicts there, the map laid over it in red.

    predicted: list over steps of lists of pictures; maps [B, T, h, w]; finals: list of pictures.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        rows.append([])
        for step, pictures in enumerate(predicted):
            tile = overlay(pictures[number], maps[number, step] / maps[number, step].max().clamp_min(1e-8))     # all zero where truncation cut the core words off
            rows[-1].append((tile, f"step {step}, sigma {sigmas[step]:.2f}" + ("\n" + prompt if step == 0 else "")))
        rows[-1].append((finals[number], "final picture"))
    draw_table(rows, path, side=128)


def draw_curve(runs, path):
    """curve.png: held-out reward against pictures seen. `runs` are (name, list of metrics).

    Runs that differ in their seed alone share a line, their mean, and a band from the least to the most of them. One or
    two single runs also show the reward of their training prompts, as a thin line.
    """
    kinds, with_training, lines = {}, len(runs) < 3, []
    for name, metrics in runs:
        kinds.setdefault(re.sub(r"-\d+$", "", name), []).append((name, metrics))
    for kind, same in kinds.items():
        name = same[0][0] if len(same) == 1 else f"{kind}, {len(same)} seeds"
        for key, thickness in [("heldout_reward", 3), ("reward_mean", 1)][:1 + with_training]:
            points = {}
            for line in (line for _, metrics in same for line in metrics if line.get(key) is not None):
                points.setdefault(line["images"], []).append(line[key])
            lines.append((name, points, thickness))
    note = "thick: held-out prompts\nthin: training prompts" if with_training else "held-out prompts: mean of the\nseeds, band from least to most"
    draw_lines(lines, path, "pictures seen in training", "reward", note)


def draw_lines(lines, path, across, up, note=""):
    """A chart of `lines`: (name, {x: values there}, thickness). A line joins the means, a band goes from the least to the most."""
    width, height, left, top, right, bottom, row = 1800, 960, 120, 48, 480, 100, 36           # twice the final size, which smooths the lines
    values = [value for _, points, _ in lines for there in points.values() for value in there]
    step = next(step for step in (digit * 10.0**power for power in range(-3, 9) for digit in (1, 2, 5)) if max(values) - min(values) <= 6 * step)
    first, last = math.floor(min(values) / step), max(math.ceil(max(values) / step), math.floor(min(values) / step) + 1)
    places = sorted({x for _, points, _ in lines for x in points})
    place = lambda x, y: (left + (x - places[0]) / (places[-1] - places[0] or 1) * (width - left - right),
                          height - bottom - (y / step - first) / (last - first) * (height - top - bottom))
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(26)
    for y in (number * step for number in range(first, last + 1)):
        draw.line([place(places[0], y), place(places[-1], y)], fill="#dddddd", width=2)
        draw.text((left - 20, place(0, y)[1]), f"{y:.{max(0, -math.floor(math.log10(step)))}f}", "black", font, anchor="rm")
    for x in places[::math.ceil(len(places) / 11)]:
        draw.text((place(x, 0)[0], height - bottom + 16), str(x), "black", font, anchor="mt")
    draw.text((left, 8), up, "black", font)
    draw.text(((left + width - right) / 2, height - 44), across, "black", font, anchor="mt")
    palette = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2"]
    colours = dict(zip(dict.fromkeys(name for name, _, _ in lines), itertools.cycle(palette)))
    for name, points, _ in lines:
        if any(len(there) > 1 for there in points.values()):
            draw.polygon([place(x, min(points[x])) for x in sorted(points)] + [place(x, max(points[x])) for x in sorted(points, reverse=True)], fill=colours[name] + "28")
    for name, points, thickness in lines:
        means = [place(x, statistics.mean(points[x])) for x in sorted(points)]
        draw.line(means, fill=colours[name], width=2 * thickness, joint="curve")
        if len(means) == 1:                                   # a run that has only begun
            draw.ellipse([x + move for move in (-8, 8) for x in means[0]], fill=colours[name])
    for number, (name, colour) in enumerate(colours.items()):
        draw.text((width - right + 28, top + row * number), name, colour, font)
    draw.text((width - right + 28, height - bottom), note, "#555555", font, anchor="ld")
    canvas.reduce(2).save(path)


# ----------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(folder, pipeline, optimizer, average, iteration, keep):
    """Write folder/checkpoint-<iteration>: the pipeline in diffusers' format, and `training.safetensors` to continue from.

    It is written to the side and moved into place when complete, and only then are old ones removed: a kill or a full disk
    at any moment leaves the previous checkpoint. Of the pipeline only the transformer changes; the other parts are hard
    links to those of the checkpoint before. With an average of the weights (name -> tensor) the pipeline holds that.
    """
    partial, before = folder / "checkpoint.partial", last_checkpoint(folder)
    shutil.rmtree(partial, ignore_errors=True)
    state = {}
    for name, parameter in pipeline.transformer.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"{key}/{name}"] = value
        if average:
            state[f"weight/{name}"] = parameter.detach().to("cpu", copy=True)
    with averaged(pipeline.transformer, average):
        if before is None:
            pipeline.save_pretrained(partial)
        else:
            shutil.copytree(before, partial, copy_function=link_or_copy, ignore=shutil.ignore_patterns("transformer", "training.safetensors", "iteration.json"))
            pipeline.transformer.save_pretrained(partial / "transformer")
    save_file(state, partial / "training.safetensors", metadata={"format": "pt"})
    (partial / "iteration.json").write_text(json.dumps({"iteration": iteration}))
    partial.rename(folder / f"checkpoint-{iteration}")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def link_or_copy(source, target):
    """A hard link, or a copy on a file system that has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def checkpoints(folder):
    """The complete checkpoints of a run, the newest last."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(folder):
    return next(reversed(checkpoints(folder)), None)


OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "row_var", "col_var", "variance")     # of AdamW and of Adafactor


def load_training_state(checkpoint, transformer, optimizer, average):
    """Put the optimizer back (and the weights themselves, where the pipeline holds their average)."""
    stored, state = load_file(checkpoint / "training.safetensors"), optimizer.state_dict()
    for index, (name, parameter) in enumerate(transformer.named_parameters()):
        state["state"][index] = {key: stored[f"{key}/{name}"] for key in OPTIMIZER_STATE if f"{key}/{name}" in stored}
        if average:
            parameter.data.copy_(stored[f"weight/{name}"])
    optimizer.load_state_dict(state)


@contextmanager
def averaged(transformer, average):
    """Within `with averaged(transformer, average)`, the transformer holds the averaged weights (if there are any)."""
    def swap():
        for name, parameter in transformer.named_parameters() if average else ():
            parameter.data, average[name] = average[name].to(parameter.device), parameter.data.to(average[name].device)
    swap()
    try:
        yield
    finally:             # also where a full disk ends the writing of a checkpoint
        swap()


def write_whole(path, text):
    """Replace a file's text in one move: whoever reads it, also after a kill, finds the old text or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def read_metrics(folder):
    """The lines of metrics.jsonl; one that a full disk cut short is no line."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


def metrics_line(values):
    """One line of metrics.jsonl; JSON knows no NaN, so what is not finite is null."""
    def finite(value):
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(finite(values)) + "\n"


# ------------------------------------------------------------------------------------------------------------------ main

SECTIONS = {"task": "the run", "allocation": "allocation", "prompts_per_iteration": "sampling", "updates_per_iteration": "update", "device": "machine"}


def parse_arguments(argv=None):
    """The run's Arguments, and what was asked for instead of a run: a namespace of plot, benchmark, maps and words."""
    parser = argparse.ArgumentParser(usage="python star.py --task ocr [--option value ...]",
                                     description=__doc__.split("\n\n")[0] + " The defaults below are the miniature's; a full-size model has others, see"
                                     " FULL_SIZE in star.py. For a letter such as G or a, see the symbols at the top of that file.",
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=140))
    for item in fields(Arguments):
        if item.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[item.name])
        flag, choices = "--" + item.name.replace("_", "-"), item.metadata["choices"]
        says = item.metadata["help"] + ("" if item.default is None else " (default: %(default)s)")
        if item.type is bool:
            group.add_argument(flag, default=item.default, action=argparse.BooleanOptionalAction, help=says)
        else:
            metavar = None if choices else item.metadata["metavar"] or {int: "N", float: "X", str: "NAME"}[item.type]
            group.add_argument(flag, default=item.default, type=item.type, choices=choices, metavar=metavar, help=says)
    others = parser.add_argument_group("instead of a run")
    others.add_argument("--plot", nargs="+", metavar="RUN", help="draw the curves of these runs' folders into one curve.png and end")
    others.add_argument("--benchmark", nargs="?", type=int, const=5, metavar="REPEATS", help="time iterations of uniform and of spatial in turn, REPEATS (default: 5) of each")
    others.add_argument("--maps", metavar="PROMPT", help="paint this prompt, draw where the model looks for its words into maps.png, and end")
    others.add_argument("--words", help="for --maps: the words to look for; by default what stands in quotation marks, or else the content words")
    given = parser.parse_args(argv)
    if not given.plot:
        if read_model(given.model)[0]["sample_size"] >= 64:
            tasks = [FULL_SIZE_TASK.get(name, {}) for name, _ in parts_of(given.task)]
            parser.set_defaults(**FULL_SIZE, **tasks[0] | {"reward_model": ";".join(task.get("reward_model", "") for task in tasks) or None})
        if given.low_memory:
            parser.set_defaults(**LOW_MEMORY)
    values = vars(parser.parse_args(argv))
    instead = argparse.Namespace(**{name: values.pop(name) for name in ("plot", "benchmark", "maps", "words")})
    return Arguments(**values), instead


def beside(name):
    """A file or folder, also one beside this file from anywhere else; or else the name of a hub model, or None."""
    return name if not name or Path(name).exists() or not (HERE / name).exists() else str(HERE / name)


def read_model(name):
    """The configurations of a pipeline's transformer and VAE; ends the program if it is not one of Stable Diffusion 3."""
    try:
        kind = StableDiffusion3Pipeline.load_config(beside(name)).get("_class_name")
        if kind == "StableDiffusion3Pipeline":
            return SD3Transformer2DModel.load_config(beside(name), subfolder="transformer"), AutoencoderKL.load_config(beside(name), subfolder="vae")
    except Exception as error:      # the hub's client raises many kinds
        stop(f"model {name} is neither a whole pipeline's folder nor a hub model that can be reached ({type(error).__name__}). A gated"
             " model needs `hf auth login` and its licence accepted on its page; the miniature, --model tiny/sd3, needs neither.")
    stop(f"model {name} is a {kind}; only pipelines of the Stable Diffusion 3 family (StableDiffusion3Pipeline) can be trained here.")


def check(args):
    """Everything that can be said of the settings and the model before anything heavy is loaded."""
    for name, value in asdict(args).items():
        if type(value) is int and value < 1 and name != "seed":
            stop(f"--{name.replace('_', '-')} is {value}; it is a count and must be 1 or more.")
    for name, good, needed in (
            ("lam", 0 <= args.lam <= 1, "between 0 (no allocation) and 1 (all of it)"),
            ("noise_level", args.noise_level > 0, "above 0, such as 0.7: without noise there are no probabilities to train"),
            ("guidance_scale", args.guidance_scale >= 0, "0 or more"), ("learning_rate", args.learning_rate > 0, "above 0"), ("weight_decay", args.weight_decay >= 0, "0 or more"),
            ("max_gradient_norm", args.max_gradient_norm > 0, "above 0"), ("clip_range", args.clip_range > 0, "above 0"),
            ("advantage_clip", args.advantage_clip > 0, "above 0"), ("kl_weight", args.kl_weight >= 0, "0 or more"),
            ("ema_decay", 0 <= args.ema_decay < 1, "0 (no average) or more, and less than 1")):
        if not good:
            stop(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {needed}.")
    for flag in ("device", "reward_device"):
        if getattr(args, flag) == "cuda" and not torch.cuda.is_available():
            stop(f"--{flag.replace('_', '-')} cuda was asked for, but PyTorch finds no CUDA device here; use cpu.")
    if args.map_blocks and not all(block.isdigit() for block in args.map_blocks.split(",")):
        stop(f"--map-blocks {args.map_blocks} is not a list of block numbers, such as 2,3.")
    config, vae_config = read_model(args.model)
    count, multiple = config["num_layers"], config["patch_size"] * vae_factor(vae_config)
    if args.map_blocks and max(map(int, args.map_blocks.split(","))) >= count:
        stop(f"--map-blocks {args.map_blocks} names a block that the model has not: its blocks are 0 to {count - 1}.")
    if args.height and args.height % multiple:
        stop(f"--height is {args.height}; pictures of this model have sides that are multiples of {multiple} pixels.")
    if args.height and args.height > config["pos_embed_max_size"] * multiple:
        stop(f"--height is {args.height}; pictures of this model have sides of at most {config['pos_embed_max_size'] * multiple} pixels.")


def check_training(args):
    """The task, not loaded yet, after everything that can be said of a training, its prompts and its reward model."""
    images = args.prompts_per_iteration * args.group_size
    if args.group_size < 2:
        stop(f"--group-size is {args.group_size}, but an advantage compares pictures of one prompt: use 2 or more.")
    if images % args.batch_size or (images // args.batch_size) % args.updates_per_iteration:
        stop(f"--prompts-per-iteration * --group-size = {images} pictures cannot be divided into --batch-size {args.batch_size}"
             f" and --updates-per-iteration {args.updates_per_iteration}; choose numbers that divide.")
    first, last = stochastic_range(args)
    if not 0 <= first <= last < args.steps or not 1 <= args.stochastic_steps <= last - first + 1:
        stop(f"--stochastic-range {args.stochastic_range} must lie within steps 0 to {args.steps - 1} and hold --stochastic-steps"
             f" {args.stochastic_steps}.")
    try:
        models = [",".join(map(beside, model.split(","))) for model in args.reward_model.split(";")] if args.reward_model else []
        task = make_task(args.task, beside(args.prompts), beside(args.heldout_prompts), [model or None for model in models])
    except ValueError as error:
        stop(str(error))
    for name in task.model_names:
        try:
            AutoConfig.from_pretrained(name)
        except Exception as error:      # as above
            stop(f"reward model {name} is neither a model's folder nor a hub model that can be reached ({type(error).__name__}).")
    if len(task.prompts) < args.prompts_per_iteration:
        stop(f"there are {len(task.prompts)} training prompts, fewer than --prompts-per-iteration {args.prompts_per_iteration}.")
    return task


def vae_factor(config):
    """Pixels per latent position along each side, as diffusers' pipelines reckon it."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def stochastic_range(args):
    try:
        first, last = (int(part) for part in args.stochastic_range.split("-"))
    except ValueError:
        stop(f"--stochastic-range {args.stochastic_range} is not of the form FIRST-LAST, such as 0-3.")
    return first, last


def settings_of(args):
    """What the parts of a run have in common, however often it is resumed; config.json in its folder."""
    return {key: value for key, value in asdict(args).items() if key not in ("resume", "out", "iterations", "device", "keep")}


def check_folder(args, folder):
    """May this run go there? Returns the checkpoint to resume from, or None."""
    config = folder / "config.json"
    if config.exists() and not args.resume:
        stop(f"{folder} holds a run already; add --resume to continue it, or choose another --out.")
    if config.exists():
        before = json.loads(config.read_text())
        for key, value in settings_of(args).items():
            if before.get(key) != value:
                stop(f"{folder} was run with {key} = {before.get(key)}, not {value}; use the same arguments to resume it.")
    check_writable(folder)
    return last_checkpoint(folder)


def check_writable(folder):
    """Ends the program if nothing can be written to the folder, which may not exist yet: said before minutes of loading."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        stop(f"--out {folder}: {nearest} is not a folder that can be written to; choose another one.")


def load(args, task, checkpoint):
    """The pipeline, of which only the transformer is trained (float32 weights) and stays on the device with the VAE, and what goes with it.

    `task` is None where nothing is judged, `checkpoint` where a run begins.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and device.type == "cuda")
    frozen = torch.bfloat16 if bfloat16 else torch.float32
    without = {} if args.t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        checkpoint or beside(args.model), dtype={"transformer": torch.float32, "vae": torch.float32, "default": frozen}, **without)
    transformer = pipeline.transformer.to(device, torch.float32)         # again: a checkpoint of mixed dtypes keeps them through loading
    pipeline.vae.to(device, torch.float32).requires_grad_(False)
    pipeline.vae.enable_slicing()                    # decode one picture at a time: at 512 pixels each takes gigabytes
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        torch._dynamo.config.recompile_limit = 64    # each kind of block, with and without gradient and map, at each batch size
        for block in transformer.transformer_blocks:
            block.compile()
    start_transformer = None
    if args.kl_weight > 0:
        start_transformer = SD3Transformer2DModel.from_pretrained(beside(args.model), subfolder="transformer", dtype=frozen).to(frozen).requires_grad_(False)
    if task is not None:
        task.load(device if args.reward_device == "auto" else torch.device(args.reward_device))
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=device.type == "cuda")
    else:       # eps[1] = 1: a step is as long as the learning rate says, and in proportion only to weights whose root mean square is above 1
        optimizer = torch.optim.Adafactor(transformer.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, eps=(None, 1.0))
    average = {name: p.detach().to("cpu", copy=True) for name, p in transformer.named_parameters()} if args.ema_decay else {}
    if checkpoint:
        load_training_state(checkpoint, transformer, optimizer, average)
    blocks = [int(block) for block in args.map_blocks.split(",")] if args.map_blocks else default_map_blocks(transformer.config.num_layers)
    side = args.height // vae_factor(pipeline.vae.config) if args.height else transformer.config.sample_size
    empty_prompt = encode(pipeline, [""], args.max_sequence_length)
    return Run(args, task, device, pipeline, optimizer, start_transformer, average, empty_prompt, blocks,
               (transformer.config.in_channels, side, side), bfloat16)


@contextmanager
def patient_interrupt():
    """Within, the first Ctrl-C only makes the yielded list true, so that an iteration can be finished and saved; a second one ends at once."""
    asked = []

    def handler(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nwill save and end after this iteration; Ctrl-C again to end at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv=None):
    args, instead = parse_arguments(argv)
    if instead.plot:
        return plot(instead.plot, Path(args.out or "."))
    check(args)
    if instead.maps is not None:
        return maps_of(args, instead.maps, instead.words)
    task = check_training(args)
    if instead.benchmark is not None:
        if instead.benchmark < 1:
            stop(f"--benchmark is {instead.benchmark}; it is a number of repeats and must be 1 or more.")
        check_writable(Path(args.out or "."))
        return benchmark(load(args, task, None), instead.benchmark)
    folder = Path(args.out or f"runs/{re.sub('[^A-Za-z0-9.]+', '-', args.task)}-{args.allocation}-{args.seed}")
    checkpoint = check_folder(args, folder)
    run = load(args, task, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", json.dumps(settings_of(args), indent=1))
    pipeline, transformer, average = run.pipeline, run.pipeline.transformer, run.average
    size = sum(parameter.numel() for parameter in transformer.parameters())
    images = args.prompts_per_iteration * args.group_size
    print(f"{args.model} ({size / 1e6:.1f}M parameters, {size * (16 if args.optimizer == 'adamw' else 8) / 2**30:.2f} GiB with gradients and the"
          f" optimizer's state), task {args.task}, {args.allocation}, on {run.device}: {args.iterations} iterations of"
          f" {args.prompts_per_iteration} prompts x {args.group_size} pictures = {args.iterations * images} pictures")

    # Before: how good is the model as it is? The first evaluation is line 0 of the metrics.
    heldout = task.heldout_prompts[:args.evaluation_prompts]
    encoded = encode(pipeline, heldout, args.max_sequence_length)
    shown = heldout[:8]
    metrics = folder / "metrics.jsonl"
    first = 0
    if checkpoint:
        first = json.loads((checkpoint / "iteration.json").read_text())["iteration"]
        write_whole(metrics, "".join(map(metrics_line, (line for line in read_metrics(folder) if line["iteration"] <= first))))     # later ones will come again
        print(f"resumed after iteration {first}")
    else:
        rewards, pictures = evaluate(run, heldout, encoded)
        before = Image.new("RGB", (pictures[0].width * len(shown), pictures[0].height))
        for column, picture in enumerate(pictures[:len(shown)]):
            before.paste(picture, (column * picture.width, 0))
        before.save(folder / "before.png")           # what samples.png will compare with, also after a resume
        draw_samples([("before", pictures[:len(shown)], rewards)], shown, folder / "samples.png")
        show_maps(run, shown[:4], [task.core_spans(prompt) for prompt in shown[:4]], folder / "maps.png")
        print(f"look at samples.png and maps.png in {folder}: the model before training")
        write_whole(metrics, metrics_line({"iteration": 0, "images": 0, **mean_and_error("heldout_reward", rewards), "report": task.report(pictures, heldout)}))

    non_finite = 0
    with patient_interrupt() as interrupted:
        for iteration in (bar := tqdm(range(first + 1, args.iterations + 1), initial=first, total=args.iterations, desc=args.task)):
            line = iterate(run, iteration, args.allocation)
            last = iteration == args.iterations
            if iteration % args.evaluate_every == 0 or last:
                with averaged(transformer, average):
                    rewards, pictures = evaluate(run, heldout, encoded)
                line |= mean_and_error("heldout_reward", rewards) | {"report": task.report(pictures, heldout)}
            with metrics.open("a") as file:
                file.write(metrics_line(line))
            bar.set_postfix(reward=f"{line['reward_mean']:.3f}", **({"heldout": f"{line['heldout_reward']:.3f}"} if "heldout_reward" in line else {}))
            non_finite = non_finite + 1 if line["skipped_updates"] == args.updates_per_iteration else 0
            if non_finite >= 5:
                stop(f"five iterations in a row had gradients that are not finite; the last good checkpoint is {last_checkpoint(folder)}."
                     " Lower --learning-rate, or use --precision float32.")
            if non_finite == 0 and (iteration % args.save_every == 0 or last or interrupted):
                try:
                    save_checkpoint(folder, pipeline, run.optimizer, average, iteration, args.keep)
                except (OSError, SafetensorError) as error:         # a full disk, most likely: the next time may go better
                    shutil.rmtree(folder / "checkpoint.partial", ignore_errors=True)
                    tqdm.write(f"star.py: the checkpoint of iteration {iteration} could not be written ({error}); the run goes on, and the"
                               f" last good checkpoint is {last_checkpoint(folder)}.", file=sys.stderr)
            if interrupted:
                print(f"interrupted after iteration {iteration}; the same command with --resume continues from {last_checkpoint(folder)}", file=sys.stderr)
                raise SystemExit(130)

    # After: the same prompts from the same noise, where the model looks, and the curve.
    with averaged(transformer, average):
        rewards, pictures = evaluate(run, shown, tuple(each[:len(shown)] for each in encoded))
        before = Image.open(folder / "before.png")
        size = pictures[0].width
        before = [before.crop((i * size, 0, (i + 1) * size, size)) for i in range(len(shown))]
        draw_samples([("before", before, rewards_of(task, before, shown)), ("after", pictures, rewards)], shown, folder / "samples.png")
        show_maps(run, shown[:4], [task.core_spans(prompt) for prompt in shown[:4]], folder / "maps.png")
    lines = read_metrics(folder)
    draw_curve([(folder.name, lines)], folder / "curve.png")
    measured = [line["heldout_reward"] for line in lines if "heldout_reward" in line]
    for name, value in lines[-1].get("report", {}).items():
        print(f"{name}: {lines[0]['report'][name]:.3f} -> {value:.3f}")
    print(f"held-out reward {measured[0]:.3f} -> {measured[-1]:.3f}; see samples.png, maps.png, curve.png, metrics.jsonl and"
          f" {last_checkpoint(folder).name}/ in {folder}")


def show_maps(run, prompts, spans, path):
    """Paint a few prompts by the plain flow while recording the map of every step for the words at `spans`, and draw maps.png."""
    args, pipeline = run.args, run.pipeline
    generator = torch.Generator().manual_seed(args.seed)
    core = core_tokens_of(pipeline, prompts, spans, args.max_sequence_length).to(run.device)
    latents = torch.randn(len(prompts), *run.shape, generator=generator).to(run.device)
    sigmas = schedule(pipeline, args.steps)
    encoded = encode(pipeline, prompts, args.max_sequence_length)
    with run.autocast():
        painted = rollout(pipeline.transformer, latents, encoded, run.empty_prompt, sigmas, (), generator, guidance_scale=args.guidance_scale,
                          core_tokens=core, map_steps=range(args.steps), map_blocks=run.blocks)
    predicted = []
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        velocity = (painted.latents[:, step + 1] - painted.latents[:, step]) / (sigma_next - sigma)
        predicted.append(decode(pipeline.vae, painted.latents[:, step] - sigma * velocity))
    draw_maps(predicted, painted.maps, decode(pipeline.vae, painted.latents[:, -1]), prompts, sigmas, path)


def maps_of(args, prompt, words):
    """--maps: the model as it is, one prompt, one maps.png."""
    words = words and words.strip()
    spans = [match.span() for match in re.finditer(re.escape(words), prompt)] if words else quoted_span(prompt) or content_word_spans(prompt)
    if not spans:
        stop(f"--maps {prompt}: " + (f"the words {words} do not occur in it." if words else "it has no words to look for."))
    path = Path(args.out or ".") / "maps.png"
    check_writable(path.parent)
    heavy = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", *(() if args.t5 else ("tokenizer_3",)))
    tokenizers = StableDiffusion3Pipeline.from_pretrained(beside(args.model), **dict.fromkeys(heavy))
    if not core_tokens_of(tokenizers, [prompt], [spans], args.max_sequence_length).any():
        stop(f"--maps {prompt}: the words to look for come after its first {args.max_sequence_length} tokens, where it is cut off; see --max-sequence-length.")
    path.parent.mkdir(parents=True, exist_ok=True)
    show_maps(load(replace(args, kl_weight=0.0, ema_decay=0.0), None, None), [prompt], [spans], path)       # no second copy of the weights
    print(f"wrote {path}: attention to", ", ".join(prompt[start:end] for start, end in spans))


def plot(folders, out):
    """--plot: the curves of several runs in one curve.png."""
    for name in folders:
        if not (Path(name) / "metrics.jsonl").is_file():
            stop(f"--plot {name}: there is no metrics.jsonl in that folder.")
    runs = [(Path(name).name, read_metrics(Path(name))) for name in folders]
    if not any(line.get("heldout_reward") is not None for _, lines in runs for line in lines):
        stop(f"--plot {' '.join(folders)}: nothing has been evaluated there yet.")
    out.mkdir(parents=True, exist_ok=True)
    draw_curve(runs, out / "curve.png")
    print("wrote", out / "curve.png")


# ------------------------------------------------------------------------------------------------------------- benchmark

def benchmark(run, repeats):
    """Time whole iterations of uniform and spatial in turn, after one of each to warm up; print a table, write benchmark.json.

    Model FLOP utilisation = floating-point operations that the method needs / (seconds * speed of one large matrix product
    in the same precision on this device). Needed are F for a forward pass of one picture (counted by torch on one pass;
    twice that with guidance), hence images * T * F for a rollout and images * S * 3 F for an update (the backward pass
    takes 2 F; the passes that gradient checkpointing repeats do not count), and images * S * F for the starting weights.
    """
    args, transformer = run.args, run.pipeline.transformer
    images = args.prompts_per_iteration * args.group_size
    lines = {"uniform": [], "spatial": []}
    for iteration in tqdm(range(2 * repeats + 2), desc="benchmark"):
        allocation = ("uniform", "spatial")[(iteration + iteration // 2) % 2]        # in turn, and each as often first as second
        lines[allocation].append(iterate(run, iteration, allocation))
    lines = {allocation: measured[1:] for allocation, measured in lines.items()}

    dtype = torch.bfloat16 if run.bfloat16 else torch.float32
    matrix = torch.randn(8192 if run.device.type == "cuda" else 2048, 8192 if run.device.type == "cuda" else 2048, device=run.device, dtype=dtype)
    times = []
    for _ in range(6):
        watch = Stopwatch(run.device)
        matrix @ matrix
        watch.lap("product")
        times.append(watch.seconds["product"])
    speed = 2 * len(matrix) ** 3 / min(times)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), run.autocast():
        context, pooled = run.empty_prompt
        predict_velocity(transformer, torch.zeros(1, *run.shape, device=run.device), 0.5, (context, pooled), 1.0, run.empty_prompt)
    forward = counter.get_total_flops() * (1 if args.guidance_scale == 1 else 2)
    needed = {"rollout": images * args.steps * forward, "update": images * args.stochastic_steps * (3 + (run.start_transformer is not None)) * forward}

    rows = {f"{phase}, seconds": {a: [line["seconds"][phase] for line in lines[a]] for a in lines} for phase in lines["uniform"][0]["seconds"]}
    rows["iteration, seconds"] = {a: [sum(line["seconds"].values()) for line in lines[a]] for a in lines}
    rows["images per second"] = {a: [images / seconds for seconds in rows["iteration, seconds"][a]] for a in lines}
    for phase in needed:
        rows[f"{phase}, FLOP utilisation"] = {a: [needed[phase] / seconds / speed for seconds in rows[f"{phase}, seconds"][a]] for a in lines}
    if run.device.type == "cuda":
        rows["peak memory, GiB"] = {a: [max(line["peak_gib"].values()) for line in lines[a]] for a in lines}
    print(f"{args.model}: {images} pictures of {run.shape[1] * vae_factor(run.pipeline.vae.config)} pixels an iteration, {args.steps} steps, {args.stochastic_steps} trained,"
          f" guidance {args.guidance_scale}, batch {args.batch_size}; {forward / 1e9:.1f} GFLOP a forward pass; one {dtype} product of {len(matrix)}:"
          f" {speed / 1e12:.2f} TFLOP/s; peak of the whole process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of main memory")
    print(f"{'median (least to most) of ' + str(repeats):<28}{'uniform':>28}{'spatial':>28}{'spatial / uniform':>28}")
    for name, values in rows.items():
        columns = [*values.values(), [b / a for a, b in zip(*values.values())]]
        print(f"{name:<28}" + "".join(f"{f'{statistics.median(c):.3f} ({min(c):.3f} to {max(c):.3f})':>28}" for c in columns))
    report = {"arguments": asdict(args), "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu", "torch": torch.__version__,
              "forward_flop": forward, "product_flop_per_second": speed, "rows": rows}
    folder = Path(args.out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(report, indent=1))
    print("wrote", folder / "benchmark.json")


if __name__ == "__main__":
    try:
        main()
    except torch.cuda.OutOfMemoryError:
        stop("CUDA ran out of memory; lower --batch-size, add --low-memory or --no-t5, or lower --height.")
    except KeyboardInterrupt:
        stop("interrupted; what the last checkpoint holds can be continued with --resume.")
    except OSError as error:
        stop(f"a file could not be written or read: {error}; what the last checkpoint holds can be continued with --resume.")
