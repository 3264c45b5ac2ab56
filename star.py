"""STAR: spatiotemporal reward allocation for text-to-image flow models, in one file.

    python star.py --task ocr

A flow model turns noise into an image in T denoising steps. We make a few of these steps random,
and use reinforcement learning to make the random choices that led to good images more likely:

1. Sample a group of images per prompt. A stochastic step samples from a Gaussian around the
   model's prediction: the Gaussian is the policy, the sample is its action (`Policy`, `rollout`).
2. Score them. An image's advantage is its reward minus the mean reward of its group, divided by
   the standard deviation (`group_advantages`).
3. Raise the probability of the actions behind the better images, lower the rest (`star_loss`).

Flow-GRPO (arXiv 2505.05470) does this with one advantage for the whole image. STAR (2606.17979)
asks the model which image positions attend to the *core words* of the prompt, the words that the
reward is about, and gives those positions a larger share of the advantage (`AttentionAllocator`,
`allocation_weights`). Only the abstract of STAR is public: the details are this project's own.

Read from top to bottom and skim the arguments. Shapes: B images, C channels, H x W latent
positions, h x w image tokens, T denoising steps of which S are stochastic and trained, L text
tokens, D features (d per attention head), K prompts with G images each. Symbols: x latents, v the
model's velocity, k a step, p a position, m a map, w weights, r a reward, A an advantage, and sigma
the noise level, which falls from 1 (noise) to 0 (image).
"""

import argparse
import json
import math
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from rewards import SAFE, UserError, make_task, naming, networks, parts_of, require, scores


# ---------------------------------------------------------------------------------------- Arguments
def arg(default, help, low=1, high=10**6):  # the bounds of numbers; most are counts
    return field(default=default, metadata=dict(help=help, low=low, high=high))


@dataclass
class Arguments:
    """TINY and FULL_SIZE in star.py change some of these defaults for a task or a model.

    The file config.json in the output folder has the values of a run.
    """

    # the run
    task: str = arg("ocr", "ocr, geneval, pickscore, FILE.py:CLASS or a mix: ocr:0.7,pickscore:0.3")
    model: str = arg("tiny/sd3", "folder or hub name of a Stable Diffusion 3 pipeline")
    reward_model: str = arg(None, "models for the reward: commas within a task, semicolons between")
    prompts: str = arg(None, "file with one training prompt per line; each task has its own")
    heldout_prompts: str = arg(None, "the same for evaluation")
    out: str = arg(None, "output folder; runs/TASK-ALLOCATION-SEED if not given")
    resume: bool = arg(False, "continue the run in the output folder")
    seed: int = arg(0, "seed of prompts and noise", 0, 2**32)
    iterations: int = arg(28, "iterations of sampling and updating")
    evaluate_every: int = arg(14, "iterations between evaluations")
    evaluation_prompts: int = arg(96, "held-out prompts per evaluation, one image each")
    monitor: str = arg("", "tasks whose rewards are logged but not trained: pickscore,signs")
    save_every: int = arg(10, "iterations between checkpoints")
    # allocation
    allocation: Literal["uniform", "spatial", "spatiotemporal"] = arg("spatial", "how to allocate")
    lam: float = arg(1.0, "strength of the allocation, from 0 (uniform) to 1", 0, 1)
    # sampling
    prompts_per_iteration: int = arg(3, "K, prompts per iteration")
    group_size: int = arg(8, "G, images per prompt", 2)
    batch_size: int = arg(24, "images per forward pass; must divide K * G")
    height: int = arg(None, "height and width in pixels; as the model was trained if not given")
    steps: int = arg(10, "T, denoising steps in training")
    evaluation_steps: int = arg(10, "denoising steps in evaluation")
    stochastic_steps: int = arg(3, "S, consecutive steps that are stochastic and trained")
    stochastic_range: str = arg("0-3", "first and last step that may be stochastic")
    noise_level: float = arg(0.7, "a, noise of a stochastic step", 1e-3, 10)
    guidance_scale: float = arg(1.0, "classifier-free guidance, in training too; 1 is none", 0)
    same_noise: bool = arg(True, "start all images of a group from the same noise")
    t5: bool = arg(True, "use the third and largest text encoder")
    max_sequence_length: int = arg(20, "T5 tokens per prompt")
    # update
    updates_per_iteration: int = arg(1, "optimizer steps; from the second on, ratios leave 1")
    optimizer: Literal["adamw", "adafactor"] = arg("adamw", "adafactor needs almost no memory")
    learning_rate: float = arg(2e-4, "learning rate", 1e-12)
    weight_decay: float = arg(1e-4, "weight decay", 0)
    max_gradient_norm: float = arg(1.0, "clip gradients to this norm", 1e-9, 1e9)
    clip_range: float = arg(2e-2, "eps, how far a ratio may leave 1", 1e-9)
    advantage_clip: float = arg(5.0, "clip advantages to plus and minus this", 1e-9)
    global_std: bool = arg(False, "divide advantages by the std of all rewards, not of the group")
    kl_weight: float = arg(0.0, "beta, KL penalty towards the starting weights; 0 is none", 0)
    ema_decay: float = arg(0.0, "decay of the weights' moving average; 0 is none", 0, 0.999999)
    # machine
    device: Literal["cpu", "cuda"] = arg("cuda" if torch.cuda.is_available() else "cpu", "device")
    bfloat16: bool = arg(torch.cuda.is_available(), "bfloat16; the trained weights stay float32")
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    compile: bool = arg(False, "compile the transformer's blocks: faster, but slow to start")
    offload: bool = arg(False, "move frozen models and averages to the GPU only for their use")
    low_memory: bool = arg(False, "other defaults for a small GPU (LOW_MEMORY)")


# What suits the tasks on the small model; tiny/RESULTS.md has the runs that this rests on.
# fmt: off
TINY = dict(
    ocr=dict(
        monitor="pickscore,signs", learning_rate=4e-4,
        ema_decay=0.8,  # at this rate, the average ends at 0.97 or more on all seeds tried
    ),
    geneval=dict(
        prompts_per_iteration=6, batch_size=48, iterations=30, evaluate_every=15,
        evaluation_prompts=120, monitor="pickscore", learning_rate=3e-4,
        same_noise=False,  # with it the strict score stops rising earlier
    ),
    pickscore=dict(
        prompts_per_iteration=6, batch_size=48, iterations=16, evaluate_every=8,
        learning_rate=4e-4,
    ),
)
# Defaults for SD3 Medium, SD3.5 Medium and SD3.5 Large on one GPU. [F] marks Flow-GRPO's published
# settings, the others are ours and untuned. rewards.py names the models that score real images.
FULL_SIZE = dict(
    height=512, evaluation_steps=40, guidance_scale=4.5,     # [F]
    group_size=24, same_noise=False, global_std=True,        # [F]
    stochastic_range="0-4",     # [F] fast variant: a window of 3 steps in the first half
    clip_range=6e-3,            # [F] 1e-4 for one ratio per image and step; clips from update 2 on
    learning_rate=1e-5,         # [F] 3e-4 for LoRA; training all parameters needs far less
    ema_decay=0.99,             # [F] 0.9 after every eighth update, about the same
    kl_weight=0.04 * 0.058,     # [F] divides by s^2, we by std^2 = s^2 * -dt: mean -dt is 0.058
    max_sequence_length=128,    # [F]
    prompts_per_iteration=8, batch_size=8, gradient_checkpointing=True,
    iterations=500, evaluate_every=20, save_every=20,
)
FULL_SIZE_PICKSCORE = dict(kl_weight=0.01 * 0.058)           # [F]
LOW_MEMORY = dict(
    batch_size=1, gradient_checkpointing=True, optimizer="adafactor", offload=True,
)
# fmt: on


# ------------------------------------------------------------------------ Core words -> text tokens
def core_tokens_of(pipeline, prompts, spans, max_sequence_length):
    """Which text tokens belong to the core words of each prompt: bool [B, L].

    spans: per prompt, a list of (start, end) characters. SD3's context is the CLIP tokens (its two
    CLIP encoders share positions) followed by the T5 tokens. A token is core if its characters
    overlap a span; special and padding tokens have none. Without T5 that part of the context is
    zeros, and never core.
    """
    clip, t5 = pipeline.tokenizer, pipeline.tokenizer_3
    options = dict(padding="max_length", truncation=True, return_offsets_mapping=True)
    offsets = [clip(prompts, max_length=clip.model_max_length, **options)["offset_mapping"]]
    if t5 is not None:
        offsets.append(t5(prompts, max_length=max_sequence_length, **options)["offset_mapping"])
    starts, ends = torch.cat([torch.tensor(each) for each in offsets], dim=1).unbind(-1)  # [B, L]
    core = torch.zeros_like(starts, dtype=torch.bool)
    for row, prompt_spans in enumerate(spans):
        for start, end in prompt_spans:
            core[row] |= (starts[row] < end) & (start < ends[row])
    return core if t5 is not None else F.pad(core, (0, max_sequence_length))


# --------------------------------------------------------------------- Attention -> maps -> weights
class AttentionAllocator:
    """Records how much each image position attends to the core words, by a hook on attention.

    In SD3's joint blocks an image query has one softmax over [image; text] keys. The map is the
    part of it that falls on core tokens:

        share[p, j] = softmax over all tokens j of  query[p] . key[j] / sqrt(d)
        m[b, p]     = mean over heads and blocks of  the sum of share[p, j] over core tokens j

    Attention computes the sum of share[p, j] * value[j]. With an indicator of the core tokens in
    place of the values that sum is the map, so the fused kernel computes it and no [tokens, tokens]
    matrix is ever stored. The block is untouched: its output stays the same to the last bit.

        with torch.no_grad(), AttentionAllocator(transformer, core_tokens) as allocator:
            transformer(...)
        allocator.map()  # [B, image tokens]

    transformer is diffusers' SD3Transformer2DModel, core_tokens is bool [B, L], see
    `core_tokens_of`. With guidance the batch is [unconditional; conditional], and only the
    conditional half is recorded. `blocks` defaults to the last quarter, which locates words well.
    `map` averages all that was recorded: use one allocator per step. Compiled blocks see the hook
    only if torch._dynamo.config.skip_nnmodule_hook_guards is False when they are first called.
    """

    def __init__(self, transformer, core_tokens, blocks=None):
        count = len(transformer.transformer_blocks)
        blocks = blocks or range(count - max(1, count // 4), count)
        self.attentions = [transformer.transformer_blocks[block].attn for block in blocks]
        self.core_tokens, self.hooks = core_tokens, []

    def __enter__(self):
        self.recorded = []
        for attention in self.attentions:
            hook = attention.register_forward_pre_hook(self.record, with_kwargs=True)
            self.hooks.append(hook)
        return self

    def __exit__(self, *exception):
        while self.hooks:
            self.hooks.pop().remove()

    @torch.no_grad()  # the map is data, like the reward
    def record(self, attention, args, kwargs):
        image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        batch, length = self.core_tokens.shape
        if len(image) not in (batch, 2 * batch) or text.shape[1] != length:
            raise ValueError(
                f"core_tokens is for {batch} images and {length} text tokens, but the transformer"
                f" was given {len(image)} and {text.shape[1]}"
            )
        image, text = image[-batch:], text[-batch:]

        def heads(x, norm):  # [B, tokens, D] -> [B, heads, tokens, d]
            x = x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        query = heads(attention.to_q(image), attention.norm_q)
        image_key = heads(attention.to_k(image), attention.norm_k)
        text_key = heads(attention.add_k_proj(text), attention.norm_added_k)
        key = torch.cat([image_key, text_key], dim=2)
        core = F.pad(self.core_tokens, (image.shape[1], 0)).to(key)  # image keys are not core
        value = core[:, None, :, None].expand_as(key).contiguous()  # fused kernels want key's shape
        mass = F.scaled_dot_product_attention(query, key, value)[..., 0]  # all d values are equal
        self.recorded.append(mass.float().mean(1))

    def map(self):
        return torch.stack(self.recorded).mean(0)


def allocation_weights(maps, size, allocation="spatial", lam=1.0):
    """Attention maps [B, S, h, w] of the trained steps -> weights [B, S, H, W] of mean 1.

        spatial:         w[b, k, p] = (1 - lam) + lam * m[b, k, p] / mean over p of m[b, k]
        spatiotemporal:  w[b, k, p] = (1 - lam) + lam * m[b, k, p] / mean over k and p of m[b]

    Mean 1 redistributes the advantage without increasing it. Unequal weights bias the gradient: it
    no longer follows the expected reward exactly. We trade that for a larger share of signal in it:
    where core words decide the reward, the other positions only add noise. Where the reward is
    about more than the core words, use uniform. Where nothing attends to core words (a prompt may
    have none), w = 1. For video: maps [B, S, f, h, w] and size (frames, H, W).
    """
    maps = F.interpolate(maps.float(), size=size, mode="nearest")  # the patch of a token shares m
    first = {"spatial": 2, "spatiotemporal": 1}[allocation]
    mean = maps.mean(dim=tuple(range(first, maps.dim())), keepdim=True)
    return (1 - lam) + lam * torch.where(mean == 0, 1.0, maps / mean)


# ------------------------------------------------------------------------------- Stochastic sampler
def sde_step(latents, velocity, sigma, sigma_next, sigma_max, noise_level, noise):
    """One step of the flow as a stochastic differential equation (Flow-GRPO, "From ODE to SDE").

        s    = a * sqrt(sigma / (1 - sigma))          (at sigma = 1 divided by 1 - sigma_max)
        mean = x * (1 + s^2 / (2 sigma) * dt) + v * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
             = x + v * dt + s^2 / 2 * score * -dt
        std  = s * sqrt(-dt)
        x'   = mean + std * noise,    dt = sigma_next - sigma < 0

    Why noise? A deterministic sampler has no probabilities for a policy gradient to raise. Why is
    the mean not x + v * dt? Noise alone would spread x further than the model has seen in training.
    A drift along the score, the gradient of log p(x), contracts x by as much. A flow has
    x = (1 - sigma) * image + sigma * e with Gaussian e, and v estimates e - image. So
    x + (1 - sigma) v estimates e, and the score is minus that over sigma. For small steps images
    are then distributed as before (not exactly with guidance, whose v is no flow's velocity).
    sigma_max, the schedule's second sigma, keeps s finite at sigma = 1. a = 0 is the Euler step.
    Returns x', mean [B, C, H, W] and std, a float.
    """
    latents, velocity = latents.float(), velocity.float()
    dt = sigma_next - sigma
    below_one = sigma if sigma < 1 else sigma_max
    s = noise_level * math.sqrt(sigma / (1 - below_one))
    x_scale = 1 + s**2 / (2 * sigma) * dt
    v_scale = 1 + s**2 * (1 - sigma) / (2 * sigma)
    mean = latents * x_scale + velocity * v_scale * dt
    std = s * math.sqrt(-dt)
    return mean + std * noise, mean, std


def position_log_prob(sample, mean, std):
    """Log-probability of a stochastic step at each latent position: [B, C, H, W] -> [B, H, W].

        logp[b, p] = mean over channels of  log N(x'[b, :, p]; mean[b, :, p], std^2)

    The noise is independent across positions, so the density of the step factorizes exactly: every
    position is an action of its own. Averaging over positions gives Flow-GRPO's log-probability.
    The mean over channels (not the sum) is its convention too. So the ratio is the true ratio to
    the power 1/C, and at ratio 1 the gradient is 1/C of the true one. std is a float > 0, or a
    tensor [B, 1, 1, 1].
    """
    log_std = torch.as_tensor(std).log()
    squared = (sample.float() - mean.float()) ** 2
    return (-squared / (2 * std**2) - log_std - 0.5 * math.log(2 * math.pi)).mean(1)


@dataclass
class Policy:
    """The transformer as a policy: from x at step k and a prompt to a Gaussian over the next x."""

    transformer: torch.nn.Module
    sigmas: list  # T + 1 noise levels from 1 to 0
    noise_level: float
    guidance_scale: float
    empty_prompt: tuple  # for guidance. Prompts are (context [B, L, D], pooled [B, P])

    def velocity(self, latents, k, prompt, recording=None):
        """The model's v [B, C, H, W], with classifier-free guidance.

        As in Flow-GRPO, no gradient flows through the unconditional half. `recording` is a context
        for the conditional half, an AttentionAllocator.
        """
        timestep = latents.new_full((len(latents),), 1000 * self.sigmas[k])  # SD3 counts to 1000

        def predict(context, pooled):
            output = self.transformer(latents, context, pooled, timestep, return_dict=False)
            return output[0].float()

        with recording or nullcontext():
            conditional = predict(*prompt)
        if self.guidance_scale == 1:
            return conditional
        with torch.no_grad():
            empty = (each.expand_as(like) for each, like in zip(self.empty_prompt, prompt))
            unconditional = predict(*empty)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def step(self, latents, k, prompt, noise=0.0, stochastic=True, recording=None):
        """From step k to k + 1: (next x, mean, std)."""
        level = self.noise_level if stochastic else 0.0
        sigma, sigma_next, sigma_max = self.sigmas[k], self.sigmas[k + 1], self.sigmas[1]
        velocity = self.velocity(latents, k, prompt, recording)
        return sde_step(latents, velocity, sigma, sigma_next, sigma_max, level, noise)


@dataclass
class Rollout:
    latents: torch.Tensor  # [B, T + 1, C, H, W], from pure noise to the finished image
    log_prob: torch.Tensor  # [B, S, H, W] of the stochastic steps, None if there are none
    maps: torch.Tensor  # [B, S, h, w] of the recorded steps, None if there are none


@torch.no_grad()
def rollout(
    policy, latents, prompt, stochastic=(), generator=None, core_tokens=None, recorded=None
):
    """Sample images from noise [B, C, H, W]; only the `stochastic` steps add noise.

    With core_tokens, maps are recorded at the `recorded` steps, by default the stochastic ones.
    """
    states, log_probs, maps = [latents], [], []
    if recorded is None:
        recorded = () if core_tokens is None else stochastic
    h, w = (side // policy.transformer.config.patch_size for side in latents.shape[-2:])
    for k in range(len(policy.sigmas) - 1):
        noise, allocator = 0.0, None
        if k in stochastic:  # drawn on the CPU: the same numbers on every device
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        if k in recorded:
            allocator = AttentionAllocator(policy.transformer, core_tokens)
        latents, mean, std = policy.step(latents, k, prompt, noise, k in stochastic, allocator)
        states.append(latents)
        if k in stochastic:
            log_probs.append(position_log_prob(latents, mean, std))
        if k in recorded:
            maps.append(allocator.map().unflatten(-1, (h, w)))
    return Rollout(*(torch.stack(x, dim=1) if x else None for x in (states, log_probs, maps)))


# ---------------------------------------------------------------------------------------- Objective
def group_advantages(rewards, global_std=False, clip=None):
    """Rewards [K, G] -> advantages [K, G]: how much better is an image than the rest of its group?

        A[i, g] = (r[i, g] - mean over g of r[i]) / (std over g of r[i] + 1e-4)

    Comparing images of the same prompt cancels its difficulty, so no value network is needed
    (Flow-GRPO, "GRPO on Flow Matching"). A group of equal rewards teaches nothing. Its advantages
    are exactly 0; otherwise the rounding error of the mean, divided by 1e-4, would remain.
    global_std divides by the std of all rewards instead.
    """
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    std = rewards.std(dim=None if global_std else 1, keepdim=True, unbiased=False)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = torch.where(equal, 0.0, centred / (std + 1e-4))
    return advantages if clip is None else advantages.clamp(-clip, clip)


def star_loss(log_prob, old_log_prob, advantages, weights, clip_range):
    """The clipped objective of PPO and Flow-GRPO, with a weight and a ratio per position.

        ratio[b, k, p] = exp(logp_new - logp_old)
        L = - mean over b, k, p of  w[b, k, p] * min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)

    The images were sampled by the old policy and are only informative near it. Once a ratio has
    moved by eps in the direction that A wants, the clipped term is the smaller one, and its
    gradient is zero. Where it moved the wrong way, the other term is smaller and pulls it back.

    How does this differ from Flow-GRPO? With w = 1 the first gradient after a rollout, where every
    ratio is 1, is the same. Later ones differ: Flow-GRPO clips one ratio per image and step, exp of
    the mean over p. Log-ratios averaged over H * W positions vary about sqrt(H * W) times less than
    single ones, so eps must be larger here. With one update per iteration, the default, every ratio
    is 1 and nothing is clipped.

    log_prob, old_log_prob, weights [B, S, H, W] or any shape that begins with B; advantages [B].
    Returns the loss, the ratios, and where the minimum is the clipped term. Raises ValueError for
    shapes that would broadcast to a wrong loss.
    """
    shapes = [tuple(each.shape) for each in (log_prob, old_log_prob, weights, advantages)]
    if shapes != [shapes[0]] * 3 + [shapes[0][:1]]:
        raise ValueError(f"need three equal shapes [B, ...] and advantages [B], not {shapes}")
    ratio = torch.exp(log_prob - old_log_prob)
    advantages = advantages.view(-1, *[1] * (ratio.dim() - 1))
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -(weights.detach() * torch.minimum(free, bounded)).mean()
    return loss, ratio.detach(), bounded.detach() < free.detach()


def kl_to_reference(mean, reference_mean, std):
    """KL divergence from the reference policy, mean over channels: [B, C, H, W] -> [B, H, W].

        KL[b, p] = (mean - reference_mean)^2 / (2 std^2)          for Gaussians of equal std

    Not weighted: all positions share the parameters, so those with a small w may drift, too.
    """
    return ((mean - reference_mean) ** 2 / (2 * std**2)).mean(1)


# ----------------------------------------------------------------------------------------- Training
@contextmanager
def replaced(weights, values):
    """Other values in place of these weights within the block."""
    own = [weight.data for weight in weights]
    for weight, value in zip(weights, values):
        weight.data = value
    try:
        yield
    finally:
        for weight, value in zip(weights, own):
            weight.data = value


def on_device(device, *modules):
    """Frozen modules on the device within the block. Nothing has to be copied back."""
    weights = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    return replaced(weights, [weight.data.to(device) for weight in weights])


def load_pipeline(name, **parts):
    return diffusers.StableDiffusion3Pipeline.from_pretrained(name, use_safetensors=True, **parts)


def load_transformer(name, **options):
    options |= dict(subfolder="transformer", use_safetensors=True)
    return diffusers.SD3Transformer2DModel.from_pretrained(name, **options).requires_grad_(False)


def text_encoders(pipe):
    return list(filter(None, [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]))


@torch.no_grad()
def encode(pipe, prompts, length):
    """Prompts -> (context [B, L, D], pooled [B, P])."""
    device, options = pipe.transformer.device, dict(max_sequence_length=length)
    with on_device(device, *text_encoders(pipe)):
        context, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device, do_classifier_free_guidance=False, **options
        )
    return context, pooled


@torch.no_grad()
def decode(pipe, latents):
    """Latents [B, C, H, W] -> B PIL images."""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample.float())


@torch.no_grad()
def update_average(average, weights, decay, n):
    """The exponential moving average of the weights, after update n = 0, 1, ...

        average = d * average + (1 - d) * weights,      d = min(decay, (1 + n) / (10 + n))

    d is smaller at first, as in Flow-GRPO: otherwise the average would stay near the start.
    """
    d = min(decay, (1 + n) / (10 + n))
    for mean, weight in zip(average, weights):
        mean.lerp_(weight.to(mean.device), 1 - d)


def can_compile(device):
    """Whether torch.compile finds what it needs, such as a C++ compiler. If not, says so."""
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(8, device=device))
    except Exception as error:  # PyTorch raises many kinds
        print(f"--compile is left out: {str(error).strip().splitlines()[0]}")
        return False
    return True


PART = 100  # tensors per file of a checkpoint: what is written is copied to main memory first


class Trainer:
    """The models and the optimizer; `iterate` is one round of sample, score and update."""

    def __init__(self, args, task):
        self.args, self.task = args, task
        home = "cpu" if args.offload else args.device  # of what is not trained
        for each in (task, *task.monitors):
            each.load(args.device)
            for network in networks(each):
                network.to(home)
        frozen = torch.bfloat16 if args.bfloat16 else torch.float32
        parts = dict(dtype={"transformer": torch.float32, "vae": torch.float32, "default": frozen})
        parts |= {} if args.t5 else dict(text_encoder_3=None, tokenizer_3=None)
        with naming(f"--model {args.model} ({SAFE})"):
            self.pipe = load_pipeline(args.model, **parts)
            tokenizers = [self.pipe.tokenizer, self.pipe.tokenizer_2, self.pipe.tokenizer_3]
            bad = f"--model {args.model} has no tokenizer, or one without a token limit"
            for each in tokenizers[: 2 + args.t5]:  # one whose files are missing knows 2 tokens
                good = each is not None and len(each) > 2 and each.model_max_length < 10**6
                require(good, bad)
        # explicit dtypes, for without the package accelerate the loader may keep those of the file
        self.pipe.vae.to(args.device, torch.float32).requires_grad_(False)
        self.pipe.vae.enable_slicing()  # decode one image at a time
        for encoder in text_encoders(self.pipe):
            encoder.to(home, frozen)
        self.transformer = transformer = self.pipe.transformer.to(args.device, torch.float32)
        self.weights = list(transformer.parameters())
        # the starting weights, and a moving average: lists of tensors like `weights`
        self.reference = self.average = None
        if args.kl_weight > 0:  # of the same dtype as in the file, they take no main memory
            start = load_transformer(args.model, dtype=frozen).to(home, frozen)
            self.reference = [weight.data for weight in start.parameters()]
        if args.ema_decay > 0:
            self.average = [weight.data.to(home, copy=True) for weight in self.weights]
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if args.compile and can_compile(args.device):
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # see AttentionAllocator
            torch._dynamo.config.cache_size_limit = 64  # with and without hooks, gradients, ...
            for block in transformer.transformer_blocks:
                block.compile()
        options = dict(weight_decay=args.weight_decay)
        if args.optimizer == "adamw":  # fused needs no temporary copy of the weights
            options["fused"] = args.device == "cuda"
            self.optimizer = torch.optim.AdamW(self.weights, args.learning_rate, **options)
        else:  # 1e-18: gradients of any size; 1: the learning rate means what it means for AdamW
            options["eps"] = (1e-18, 1.0)
            self.optimizer = torch.optim.Adafactor(self.weights, args.learning_rate, **options)
        scale = self.pipe.vae_scale_factor
        side = args.height // scale if args.height else transformer.config.sample_size
        self.shape = (transformer.config.in_channels, side, side)
        options = dict(enabled=args.bfloat16, cache_enabled=False)  # no bfloat16 copies
        self.autocast = torch.autocast(args.device, torch.bfloat16, **options)
        self.empty_prompt = encode(self.pipe, [""], args.max_sequence_length)

    def policy(self, steps):
        self.pipe.scheduler.set_timesteps(steps)
        sigmas, guidance = self.pipe.scheduler.sigmas.tolist(), self.args.guidance_scale
        return Policy(self.transformer, sigmas, self.args.noise_level, guidance, self.empty_prompt)

    def with_weights(self, values):
        """The transformer with the reference or the average for weights, within the block."""
        return replaced(self.weights, [value.to(self.args.device) for value in values])

    def scores(self, task, images, prompts):
        with on_device(self.args.device, *networks(task)):
            return scores(task, images, prompts)

    def encode(self, prompts):
        """What the model is conditioned on, and its core tokens: (context, pooled, core [B, L])."""
        spans, length = map(self.task.core_spans, prompts), self.args.max_sequence_length
        core = core_tokens_of(self.pipe, prompts, spans, length).to(self.args.device)
        return *encode(self.pipe, prompts, length), core

    def allocation(self, samples):
        """How the advantage of each image is allocated: [B, S, H, W]."""
        if self.args.allocation == "uniform":
            return torch.ones_like(samples.log_prob)
        return allocation_weights(samples.maps, self.shape[1:], self.args.allocation, self.args.lam)

    def iterate(self, iteration):
        """Sample, score, update. Returns the metrics of the iteration."""
        args, metrics = self.args, defaultdict(list)
        K, G, S = args.prompts_per_iteration, args.group_size, args.stochastic_steps
        begin, seconds = time.perf_counter(), {}

        def lap(phase):
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[phase] = time.perf_counter() - begin - sum(seconds.values())

        # seeded by the iteration, so that a resumed run draws the same numbers
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        policy = self.policy(args.steps)

        # 1. Choose K prompts and S consecutive steps that are stochastic. Each step costs a forward
        # and a backward pass in the update, so S is small. Other iterations choose other steps.
        chosen = torch.randperm(len(self.task.prompts), generator=generator)[:K]
        prompts = [self.task.prompts[i] for i in chosen]
        first, last = step_range(args)
        first = torch.randint(first, last - S + 2, (1,), generator=generator).item()
        trained = range(first, first + S)
        context, pooled, core = self.encode(prompts)
        lap("encode")

        # 2. Sample a group of images for each prompt, batch by batch.
        group = torch.arange(K).repeat_interleave(G)  # the prompt of each image
        noise = torch.randn(K if args.same_noise else K * G, *self.shape, generator=generator)
        noise = (noise[group] if args.same_noise else noise).to(args.device)
        batches = []
        for index in torch.arange(K * G).split(args.batch_size):
            prompt = (context[group[index]], pooled[group[index]])
            core_tokens = None if args.allocation == "uniform" else core[group[index]]
            with self.autocast:
                samples = rollout(policy, noise[index], prompt, trained, generator, core_tokens)
            batches.append((samples, prompt, index))
        lap("rollout")

        # 3. Score them, and compare each with its group.
        finished = [samples.latents[:, -1] for samples, _, _ in batches]
        images = [image for latents in finished for image in decode(self.pipe, latents)]
        lap("decode")
        rewards = self.scores(self.task, images, [prompts[i] for i in group]).view(K, G)
        advantages = group_advantages(rewards, args.global_std, args.advantage_clip)
        advantages = advantages.flatten().to(args.device)
        lap("reward")

        # 4. Make the actions behind the better images more likely, most of all at the core words.
        # The rollout kept no graph, so we compute each step again: how likely does the current
        # policy make the action that was taken?
        if self.reference:  # all means at once: only now are its weights on the device
            with self.with_weights(self.reference), torch.no_grad(), self.autocast:
                reference_means = [
                    [policy.step(samples.latents[:, k], k, prompt)[1] for k in trained]
                    for samples, prompt, _ in batches
                ]
        per_update = len(batches) // args.updates_per_iteration
        for number, (samples, prompt, index) in enumerate(batches):
            weights = self.allocation(samples)
            metrics["weight_peak"].append(weights.amax((-2, -1)).mean())
            teaches = advantages[index] != 0  # no image is trained on its KL alone
            for j, k in enumerate(trained if teaches.any() else ()):
                with self.autocast:
                    _, mean, std = policy.step(samples.latents[:, k], k, prompt)
                old = samples.log_prob[:, j]
                new = position_log_prob(samples.latents[:, k + 1], mean, std)
                metrics["ratio_mean"].append((new.detach() - old).exp().mean())
                if number < per_update:  # The weights are still those of the rollout. So the ratio
                    old = new.detach()  # is 1, but compiled code rounds differently there.
                loss, _, clipped = star_loss(
                    new, old, advantages[index], weights[:, j], args.clip_range
                )
                if self.reference:
                    kl = kl_to_reference(mean, reference_means[number][j], std).mean((-2, -1))
                    loss = loss + args.kl_weight * (kl * teaches).mean()
                    metrics["kl"].append(kl.detach().mean())
                (loss / (per_update * S)).backward()  # per step: less memory than for all at once
                metrics["clip_fraction"].append(clipped.float().mean())
            if (number + 1) % per_update == 0:
                norm = torch.nn.utils.clip_grad_norm_(self.weights, args.max_gradient_norm)
                require(norm.isfinite(), "the gradient is not finite; lower --learning-rate")
                metrics["gradient_norm"].append(norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.average:
                    done = (iteration - 1) * args.updates_per_iteration + number // per_update
                    update_average(self.average, self.weights, args.ema_decay, done)
        lap("update")

        return {
            "iteration": iteration,
            "images": iteration * K * G,
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "groups_without_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
            **{name: torch.stack(values).mean().item() for name, values in metrics.items()},
            "seconds": seconds,
        }

    def generate(self, prompts, steps, recorded=()):
        """Sample one image per prompt, deterministically, from the same noise in every call.

        Yields one Rollout per batch.
        """
        args = self.args
        generator = torch.Generator().manual_seed(args.seed)
        start = torch.randn(len(prompts), *self.shape, generator=generator).to(args.device)
        context, pooled, core = self.encode(prompts)
        policy = self.policy(steps)
        with self.with_weights(self.average) if self.average else nullcontext():
            for i in torch.arange(len(prompts)).split(args.batch_size):
                prompt = (context[i], pooled[i])
                with self.autocast:  # closed before yield: the caller must not run under it
                    samples = rollout(policy, start[i], prompt, (), None, core[i], recorded)
                yield samples

    def evaluate(self, prompts):
        """One image per prompt: (metrics, images, rewards)."""
        batches = self.generate(prompts, self.args.evaluation_steps)
        images = [image for b in batches for image in decode(self.pipe, b.latents[:, -1])]
        rewards = self.scores(self.task, images, prompts)
        error = rewards.std().item() / len(rewards) ** 0.5 if len(rewards) > 1 else None
        with on_device(self.args.device, *networks(self.task)), torch.no_grad():
            report = self.task.report(images, prompts)
        for monitor in self.task.monitors:
            report |= {type(monitor).__name__: self.scores(monitor, images, prompts).mean()}
        metrics = {
            "heldout_reward": rewards.mean().item(),
            "heldout_reward_standard_error": error,
            "report": {name: float(value) for name, value in report.items()},
        }
        return metrics, images, rewards

    def tensors(self):
        """All that training changes, by name: weights, the optimizer's state, the average."""
        tensors = {}
        for i, (name, weight) in enumerate(self.transformer.named_parameters()):
            tensors[name] = weight
            state = self.optimizer.state[weight]
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
            if self.average:
                tensors[f"average.{name}"] = self.average[i]
        return tensors

    def save(self, folder, history):
        """Write a checkpoint. It needs no generator: seed and iteration give all random numbers."""
        folder.mkdir()
        (folder / "history.json").write_text(json.dumps(history))
        tensors = list(self.tensors().items())
        for i in range(0, len(tensors), PART):
            save_file(dict(tensors[i : i + PART]), folder / f"{i}.safetensors")

    @torch.no_grad()
    def load(self, folder):
        """Continue from a checkpoint; returns the metrics so far."""
        with naming(f"checkpoint {folder}"):
            history, stored = json.loads((folder / "history.json").read_text()), {}
            for file in folder.glob("*.safetensors"):
                part = safe_open(file, "pt")
                stored |= dict.fromkeys(part.keys(), part)
            if any(name.startswith("optimizer.") for name in stored):
                for weight in self.weights:
                    weight.grad = torch.zeros_like(weight)
                self.optimizer.step()  # creates the optimizer's state, whose values follow
                self.optimizer.zero_grad()
            for name, tensor in self.tensors().items():
                require(name in stored, f"checkpoint {folder} has no {name}; part of it is missing")
                tensor.copy_(stored[name].get_tensor(name))
            return history

    def save_pipeline(self, path):
        """Write a complete pipeline; what was not loaded (T5 with --no-t5) comes from --model."""
        parts = {name: part for name, part in self.pipe.components.items() if part}
        pipe = load_pipeline(self.args.model, dtype=self.pipe.text_encoder.dtype, **parts)
        with replaced(self.weights, self.average) if self.average else nullcontext():
            pipe.save_pretrained(path, max_shard_size="2GB")  # each is copied to main memory


# ------------------------------------------------------------------------------------------ Figures
def tile(image, caption, side=144):
    """An image with a caption below it."""
    canvas = Image.new("RGB", (side + 12, side + 84), "white")
    smooth = Image.LANCZOS if image.width > side else Image.NEAREST
    canvas.paste(image.resize((side, side), smooth), (6, 6))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    draw.multiline_text((6, side + 8), textwrap.fill(caption, side // 6), "black", font)
    return canvas


def draw_samples(title, images, rewards, prompts):
    """One row of samples.png."""
    shown = list(zip(images, rewards, prompts))[:8]
    tiles = [tile(image, f"{title} {reward:.2f}: {prompt}") for image, reward, prompt in shown]
    return make_image_grid(tiles, rows=1, cols=len(tiles))


def draw_maps(trainer, prompts):
    """maps.png: per prompt and step, the map in red over the image that the model predicts."""
    steps, tiles = trainer.args.steps, []
    batches = trainer.generate(prompts, steps, recorded=range(steps))
    rows = [row for samples in batches for row in zip(samples.latents, samples.maps)]
    sigmas = trainer.policy(steps).sigmas
    for prompt, (latents, maps) in zip(prompts, rows):
        for k in range(steps):
            velocity = (latents[k + 1] - latents[k]) / (sigmas[k + 1] - sigmas[k])  # no noise here
            (image,) = decode(trainer.pipe, (latents[k] - sigmas[k] * velocity)[None])
            red = (200 * maps[k] / maps[k].max().clamp_min(1e-8)).byte().cpu().numpy()
            image = image.convert("L").convert("RGB")
            image.paste((230, 30, 30), mask=Image.fromarray(red).resize(image.size, Image.NEAREST))
            tiles.append(tile(image, f"sigma {sigmas[k]:.2f} {'' if k else prompt}"))
        tiles.append(tile(*decode(trainer.pipe, latents[-1:]), "finished"))
    return make_image_grid(tiles, rows=len(prompts), cols=steps + 1)


def draw_curve(history, width=900, height=400, margin=50):
    """curve.png: reward in training (grey) and on held-out prompts against images seen."""
    curves = {"reward_mean": ("gray", 2), "heldout_reward": ("#1f77b4", 4)}
    values = [line[name] for line in history for name in curves if name in line]
    low, high, most = min(values), max(values), max(1, history[-1]["images"])
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for name, (colour, thickness) in curves.items():
        points = []
        for line in (line for line in history if name in line):
            x = margin + (width - 2 * margin) * line["images"] / most
            y = margin + (height - 2 * margin) * (high - line[name]) / (high - low or 1)
            points.append((x, y))
            if name == "heldout_reward":
                draw.text((x - 6, y - 4), f"{line[name]:.2f}", "black", font, anchor="rb")
                draw.text((x, height - margin + 16), f"{line['images']}", "gray", font, anchor="mt")
        draw.line(points, colour, thickness)
    title = "reward against images seen: in training (grey), on held-out prompts (blue)"
    draw.text((margin, 8), title, "black", font)
    return image


# --------------------------------------------------------------------------------------------- Main
PARTIAL = ".partial-"  # names of folders in which something is being written


def make_parser():
    """One option per field of Arguments."""
    usage, about = "python star.py --task ocr [--option value ...]", __doc__.split("\n")[0]
    options = dict(epilog=Arguments.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser = argparse.ArgumentParser(usage=usage, description=about, **options)
    for each in fields(Arguments):
        options = dict(type=each.type, metavar={int: "N", float: "X"}.get(each.type, "NAME"))
        if each.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif get_origin(each.type) is Literal:
            options = dict(choices=get_args(each.type))
        name = "--" + each.name.replace("_", "-")
        parser.add_argument(name, default=each.default, help=each.metadata["help"], **options)
    return parser


def parse_arguments(argv=None):
    """The arguments and the task, with other defaults if the model is of full size."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with naming(f"--model {args.model} (a gated model needs `hf auth login`)"):
        config = diffusers.SD3Transformer2DModel.load_config(args.model, subfolder="transformer")
        vae = diffusers.AutoencoderKL.load_config(args.model, subfolder="vae")
        kind, wanted = config.get("_class_name", "different model"), "SD3Transformer2DModel"
        require(kind == wanted, f"--model {args.model} is a {kind}; only {wanted} can be trained")
        full_size = config["sample_size"] >= 64
        unit = config["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)  # pixels per token
        heights = range(unit, config["pos_embed_max_size"] * unit + 1, unit)
    name = parts_of(args.task)[0][0]
    if full_size:
        parser.set_defaults(**FULL_SIZE | (FULL_SIZE_PICKSCORE if name == "pickscore" else {}))
        if args.device == "cuda" and torch.cuda.is_available():  # else `check` says that
            parser.set_defaults(**for_gpu(torch.cuda.get_device_properties(0).total_memory / 2**30))
    else:
        parser.set_defaults(**TINY.get(name, {}))
    if args.low_memory:
        parser.set_defaults(**LOW_MEMORY)
    args = Arguments(**vars(parser.parse_args(argv)))
    check(args, heights)
    files = (args.prompts, args.heldout_prompts)
    task = make_task(args.task, *files, args.reward_model, full_size, args.monitor)
    enough = len(task.prompts) >= args.prompts_per_iteration
    require(enough, f"{len(task.prompts)} training prompts: fewer than --prompts-per-iteration")
    return args, task


def for_gpu(memory):
    """What is fastest on a GPU with this many GiB; enough for SD3.5 Medium's defaults."""
    return dict(compile=True, offload=memory < 76, gradient_checkpointing=memory < 120)


def step_range(args):
    """--stochastic-range 0-3 as two numbers."""
    with naming(f"--stochastic-range {args.stochastic_range} must be FIRST-LAST"):
        first, last = map(int, args.stochastic_range.split("-"))
    return first, last


def check(args, heights):
    """Find mistakes in the arguments before anything heavy is loaded."""
    for each in fields(args):
        value, low, high = getattr(args, each.name), each.metadata["low"], each.metadata["high"]
        good = type(value) not in (int, float) or low <= value <= high  # a bool is neither
        option = "--" + each.name.replace("_", "-")
        require(good, f"{option} is {value}; use a number from {low} to {high}")
    cuda = args.device == "cpu" or torch.cuda.is_available()
    require(cuda, "--device is cuda, but PyTorch finds no CUDA device; use cpu")
    images = args.prompts_per_iteration * args.group_size
    update = args.batch_size * args.updates_per_iteration
    bad = f"{images} images (--prompts-per-iteration x --group-size), not a multiple of {update}"
    require(images % update == 0, f"{bad} (--batch-size x --updates-per-iteration)")
    first, last = step_range(args)
    inside = 0 <= first <= last - args.stochastic_steps + 1 and last < args.steps
    window = f"--stochastic-range {args.stochastic_range} must lie within --steps {args.steps}"
    require(inside, f"{window} and hold --stochastic-steps {args.stochastic_steps}")
    sizes = f"this model takes multiples of {heights.step} up to {heights[-1]}"
    require(args.height in (None, *heights), f"--height is {args.height}; {sizes}")


def open_folder(args):
    """The output folder, and the settings that all parts of a run share."""
    task = re.sub(r"[^\w.]+", "-", args.task)
    folder = Path(args.out or f"runs/{task}-{args.allocation}-{args.seed}")
    may_change = "resume out iterations device compile offload gradient_checkpointing".split()
    settings = {name: value for name, value in asdict(args).items() if name not in may_change}
    config = folder / "config.json"
    if config.exists() or checkpoints(folder):
        require(args.resume, f"{folder} holds a run; --resume continues it, --out names another")
        with naming(config):
            before = json.loads(config.read_text())
            changed = {name: before[name] for name in settings if before[name] != settings[name]}
        require(not changed, f"{folder} was run with other settings: {changed}")
    else:
        require(not args.resume, f"{folder} holds no run that --resume could continue")
    with naming(f"--out {folder}"):  # fails now rather than after minutes of loading
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.rglob(PARTIAL + "*"):  # of a run that was killed while writing
            shutil.rmtree(partial)
        tempfile.TemporaryFile(dir=folder).close()
    return folder, settings


def checkpoints(folder):
    """The checkpoints of a run, checkpoint/ITERATION, the newest last."""
    paths = (folder / "checkpoint").glob("*")
    return sorted((path for path in paths if path.name.isdigit()), key=lambda path: int(path.name))


def write(path, save, *content):
    """save(path, *content) to a temporary place, then move it: a kill leaves the old or the new."""
    with naming(f"{path} cannot be written"):
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as side:
            partial = Path(side, path.name)
            save(partial, *content)
            if path.is_dir():
                path.rename(Path(side, "old"))
            partial.replace(path)


def check_core_words(trainer):
    """Count the prompts whose core words lie beyond the token limit: the model never sees them."""
    prompts = trainer.task.prompts
    spans = [trainer.task.core_spans(prompt) for prompt in prompts]
    core = core_tokens_of(trainer.pipe, prompts, spans, trainer.args.max_sequence_length)
    lost = sum(bool(words) and not row.any() for words, row in zip(spans, core))
    sentence = f"the core words of {lost} of {len(prompts)} prompts lie beyond the token limit"
    require(lost <= len(prompts) / 2, f"{sentence}; shorten them or use --allocation uniform")
    if lost:
        print(f"{sentence}: these train as with --allocation uniform")


def evenly_spaced(prompts, count):
    """At most `count` prompts from all parts of a file, which may be sorted by kind."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def train(trainer, history, folder):
    """Iterate, evaluate, draw and save until the last iteration."""
    args, task = trainer.args, trainer.task
    heldout = evenly_spaced(task.heldout_prompts, args.evaluation_prompts)
    if not history:
        metrics, images, rewards = trainer.evaluate(heldout)
        history.append({"iteration": 0, "images": 0} | metrics)
        write(folder / "samples.png", draw_samples("before:", images, rewards, heldout).save)
        write(folder / "maps.png", draw_maps(trainer, heldout[:4]).save)
        print(f"samples.png and maps.png in {folder} show the model before training")
    done = history[-1]["iteration"]
    bar = tqdm(range(done + 1, args.iterations + 1), args.task, args.iterations, initial=done)
    for iteration in bar:
        line, last = trainer.iterate(iteration), iteration == args.iterations
        history.append(line)
        if iteration % args.evaluate_every == 0 or last:
            metrics, images, rewards = trainer.evaluate(heldout)
            line |= metrics
            after = draw_samples(f"after {iteration}:", images, rewards, heldout)
            before = Image.open(folder / "samples.png").crop((0, 0, *after.size))  # its first row
            write(folder / "samples.png", make_image_grid([before, after], rows=2, cols=1).save)
            write(folder / "curve.png", draw_curve(history).save)
        evaluated = [line for line in history if "heldout_reward" in line]
        bar.set_postfix(reward=line["reward_mean"], heldout=evaluated[-1]["heldout_reward"])
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write(folder / "metrics.jsonl", Path.write_text, lines)
        if iteration % args.save_every == 0 or last:
            write(folder / f"checkpoint/{iteration}", trainer.save, history)
            for older in checkpoints(folder)[:-1]:
                shutil.rmtree(older)
    write(folder / "maps.png", draw_maps(trainer, heldout[:4]).save)
    write(folder / "pipeline", trainer.save_pipeline)

    evaluated = [line for line in history if "heldout_reward" in line]
    before, after = evaluated[0], evaluated[-1]
    for name, value in after["report"].items():
        print(f"{name}: {before['report'][name]:.3f} -> {value:.3f}")
    rewards = " -> ".join(
        f"{line['heldout_reward']:.3f} +- {line['heldout_reward_standard_error'] or 0:.3f}"
        for line in (before, after)
    )
    print(f"held-out reward: {rewards}; see samples.png, maps.png and curve.png in {folder}")


def main(argv=None):
    """Train, and end with one sentence where the user, the disk or the memory is at fault."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    resumable = None
    try:
        args, task = parse_arguments(argv)
        folder, settings = open_folder(args)
        trainer, history = Trainer(args, task), []
        size = sum(weight.numel() for weight in trainer.transformer.parameters()) / 1e6
        ways = [
            way for way in ("compile", "offload", "gradient_checkpointing") if getattr(args, way)
        ]
        device = " with ".join([args.device, ", ".join(ways)][: 1 + bool(ways)])
        print(f"{args.model} ({size:.1f}M parameters), task {args.task}, {device} -> {folder}")
        if args.allocation != "uniform":
            check_core_words(trainer)
        for newest in checkpoints(folder)[-1:]:
            history = trainer.load(newest)
        write(folder / "config.json", Path.write_text, json.dumps(settings, indent=1))
        resumable = folder
        train(trainer, history, folder)
    except torch.OutOfMemoryError:
        sentence = "out of GPU memory; try --low-memory, --no-t5 or a smaller --batch-size"
    except KeyboardInterrupt:
        sentence = "interrupted"
    except UserError as error:
        sentence = str(error)
    else:
        return
    saved = checkpoints(resumable)[-1:] if resumable else []
    more = f"; --resume continues from {saved[0]}" if saved else ""
    sys.exit(f"star.py: {sentence}{more}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as Ctrl-C does
    main()
