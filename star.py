"""STAR: spatiotemporal reward allocation for text-to-image flow models, in one file.

    python star.py --task ocr

A flow model turns noise into an image in T denoising steps. We make a few of them random, and
reinforcement learning makes those random choices more likely that led to good images:

1. Sample a group of images per prompt. A stochastic step samples from a Gaussian around the
   model's prediction. The Gaussian is the policy, the sample its action (`rollout`).
2. Score the images. The advantage of an image is its reward minus the mean reward of its group,
   divided by the standard deviation (`group_advantages`).
3. Raise the probability of the actions behind the better images, lower the rest (`star_loss`).

That is Flow-GRPO (arXiv 2505.05470): one advantage for the whole image. STAR (arXiv 2606.17979)
gives a larger share to positions that attend to the prompt's *core words*, which the reward is
about. This file is written from STAR's abstract alone, not checked against its full text:

                   Flow-GRPO                  STAR's abstract        here, with allocation
    action         a step of an image         "spatially resolved"   a step at one position
    ratio, clip    one per image and step     -                      one per position
    advantage A    group-relative             the same               the same
    weights w      none                       text-image attention   attention to the core words,
                                              on the core content    of mean 1, mixed with 1
    first update   ratio 1 up to rounding     -                      ratio 1 by definition
    KL penalty     divided by s^2             -                      divided by std^2, unweighted
    trained        LoRA                       -                      all parameters

With `--allocation uniform` the last column is Flow-GRPO's but for its last three rows.

Shapes: B images, C channels, H x W latent positions, L text tokens, T denoising steps, of which S
are stochastic and trained, N prompts with G images each. An image token covers 2 x 2 positions, so
attention maps are H/2 x W/2. Symbols: x latents and x' the next ones, v the model's velocity, k a
step, p a position, m an attention map, w weights, r a reward, A an advantage, and sigma the noise
level, which falls from 1 (noise) to 0 (image). Flow-GRPO writes t for our sigma, and sigma_t for
the s of `sde_step`.
"""

import argparse
import json
import math
import os
import shutil
import sys
import textwrap
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

# Less noise from the libraries.
os.environ.update(
    TRANSFORMERS_VERBOSITY="error",
    DIFFUSERS_VERBOSITY="critical",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from rewards import load_checked_model, make_task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------- Part 1: Flow-GRPO
def sde_step(latents, velocity, sigma, sigma_next, second_sigma, noise_level):
    """A step of the flow as a stochastic differential equation (Flow-GRPO, "From ODE to SDE").

        s    = a * sqrt(sigma / (1 - sigma))    (at sigma = 1 the denominator is 1 - second_sigma)
        mean = x * (1 + s^2 / (2 sigma) * dt) + v * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
             = x + v * dt + s^2 / 2 * score * -dt
        std  = s * sqrt(-dt),    dt = sigma_next - sigma < 0,    x' = mean + std * noise

    Why noise? A deterministic sampler has no action probabilities, so there is no likelihood to
    differentiate. Why is the mean not x + v * dt? With noise alone x would spread further than in
    the model's training. A drift along the score, the gradient of log p(x), contracts x by as much.
    The score follows from v. With Gaussian e, x is (1 - sigma) * image + sigma * e, and v estimates
    e - image. So

        e     = x + (1 - sigma) * v
        score = -e / sigma

    For small steps images are then distributed as before. With guidance this is not exact, since
    its v is no flow's velocity.

    latents, velocity [B, C, H, W]; the rest are floats. noise_level is a. second_sigma, the
    schedule's second one, keeps s finite at sigma = 1. Returns the Gaussian over the next x: mean
    [B, C, H, W] and std, a float.
    """
    latents = latents.float()
    velocity = velocity.float()
    dt = sigma_next - sigma
    s = noise_level * math.sqrt(sigma / (1 - min(sigma, second_sigma)))
    x_scale = 1 + s**2 / (2 * sigma) * dt
    v_scale = 1 + s**2 * (1 - sigma) / (2 * sigma)
    mean = latents * x_scale + velocity * v_scale * dt
    std = s * math.sqrt(-dt)
    return mean, std


def position_log_prob(sample, mean, std):
    """Log-probability of a stochastic step at each latent position: [B, C, H, W] -> [B, H, W].

        logp[b, p] = mean over channels c of  log N(x'[b, c, p]; mean[b, c, p], std^2)

    Flow-GRPO's log-probability, one per image, is the mean over positions. Why may we have one per
    position? The mean at p depends on x at all positions. But x is the state in which the action is
    taken: it is given, and with it the mean. What remains random is the noise, independent at each
    position. So the density of a step factorizes over positions, exactly.

    The true log-density sums over channels. We average, as Flow-GRPO does, so our log-ratio is the
    true one divided by C: a clip range of eps allows a true ratio of about 1 +- C * eps. The KL
    below has the same 1/C. std: float > 0 or [B, 1, 1, 1], not [B].
    """
    squared_error = (sample.float() - mean.float()) ** 2
    log_std = torch.as_tensor(std).log()
    log_density = -squared_error / (2 * std**2) - log_std - 0.5 * math.log(2 * math.pi)
    return log_density.mean(dim=1)


def kl_to_reference(mean, reference_mean, std):
    """KL divergence from the reference policy, mean over channels: [B, C, H, W] -> [B, H, W].

        KL[b, p] = mean over channels c of  (mean[b, c, p] - reference_mean[b, c, p])^2 / (2 std^2)

    for Gaussians of equal std > 0, a float or [B, 1, 1, 1]. It is not weighted: positions with a
    small w drift, too, because all share one network.
    """
    squared_distance = (mean - reference_mean) ** 2
    return (squared_distance / (2 * std**2)).mean(dim=1)


@dataclass
class Policy:
    """The transformer as a policy: from x at step k and a prompt to a Gaussian over the next x."""

    transformer: torch.nn.Module
    sigmas: list  # T + 1 noise levels from 1 to 0
    noise_level: float
    guidance_scale: float
    # A prompt is (context [B, L, features], a vector per token; pooled [B, features], one for all).
    empty_prompt: tuple

    def velocity(self, latents, k, prompt, recorder=None):
        """v [B, C, H, W], with classifier-free guidance. recorder: AttentionAllocator or None."""
        timestep = latents.new_full((len(latents),), 1000 * self.sigmas[k])  # SD3 counts to 1000

        def predict(context, pooled):
            output = self.transformer(latents, context, pooled, timestep, return_dict=False)
            return output[0].float()

        context, pooled = prompt
        with recorder or nullcontext():  # records if there is a recorder
            conditional = predict(context, pooled)
        if self.guidance_scale == 1:
            return conditional
        empty_context, empty_pooled = self.empty_prompt
        with torch.no_grad():  # as in Flow-GRPO: only the conditional pass is trained
            unconditional = predict(
                empty_context.expand_as(context), empty_pooled.expand_as(pooled)
            )
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def distribution(self, latents, k, prompt, recorder=None):
        """The Gaussian over x at step k + 1: (mean, std)."""
        velocity = self.velocity(latents, k, prompt, recorder)
        sigmas = self.sigmas
        return sde_step(latents, velocity, sigmas[k], sigmas[k + 1], sigmas[1], self.noise_level)


@dataclass
class Rollout:
    """A batch of sampled images, and all that the update needs of them."""

    prompt: tuple  # (context, pooled)
    steps: range  # the S stochastic ones
    latents: list  # T + 1 times [B, C, H, W], from pure noise to the finished image
    log_probs: list  # S times [B, H, W], under the policy that sampled
    maps: list  # of attention, [B, H/2, W/2] for each recorded step
    reference_means: list  # S times [B, C, H, W]; add_reference_means fills it for a KL penalty


@torch.no_grad()
def rollout(policy, latents, prompt, steps, generator, recorded_steps, core_tokens):
    """Sample images from noise [B, C, H, W]. Only `steps` are stochastic. The others are steps of
    the flow, without noise. At recorded_steps the attention to core_tokens [B, L] is recorded
    (part 2)."""
    rows = latents.shape[-2] // policy.transformer.config.patch_size  # of image tokens
    states = [latents]
    log_probs, maps = [], []
    for k in range(len(policy.sigmas) - 1):
        recorder = None
        if k in recorded_steps:
            recorder = AttentionAllocator(policy.transformer, core_tokens)
        if k in steps:
            mean, std = policy.distribution(latents, k, prompt, recorder)
            noise = torch.randn(latents.shape, generator=generator)  # on the CPU: always the same
            latents = mean + std * noise.to(mean.device)
            log_probs.append(position_log_prob(latents, mean, std))
        else:
            dt = policy.sigmas[k + 1] - policy.sigmas[k]
            latents = latents + policy.velocity(latents, k, prompt, recorder) * dt
        if recorder is not None:
            maps.append(recorder.map().unflatten(-1, (rows, -1)))
        states.append(latents)
    return Rollout(
        prompt=prompt,
        steps=steps,
        latents=states,
        log_probs=log_probs,
        maps=maps,
        reference_means=[],
    )


def group_advantages(rewards, global_std=False):
    """Rewards [N, G] -> advantages [N, G]: how much better is an image than the rest of its group?

        A[n, g] = (r[n, g] - mean over g of r[n]) / (std over g of r[n] + 1e-4)

    Comparing images of the same prompt cancels its difficulty, so no value network is needed
    (Flow-GRPO, "GRPO on Flow Matching"). A group of equal rewards teaches nothing: it gets exactly
    0, although its mean may be rounded. global_std divides by the std of all N * G rewards.
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=None if global_std else 1, keepdim=True, unbiased=False)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + 1e-4))


# --------------------------------------------------------------------------- Part 2: what STAR adds
def core_tokens_of(pipeline, prompts, spans, max_sequence_length):
    """Which text tokens belong to the core words of each prompt: bool [B, L].

    spans: per prompt, a list of (start, end) characters. A token is core if it overlaps one. SD3's
    context is the CLIP tokens (both CLIPs have the same), then max_sequence_length T5 tokens, or
    zeros without T5. The tokenizers must be fast ones (of the Rust library): only they know which
    characters belong to a token.
    """
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_3]  # CLIP, T5
    lengths = [pipeline.tokenizer.model_max_length, max_sequence_length]
    offsets = []
    for tokenizer, length in zip(tokenizers, lengths):
        if tokenizer is None:
            offsets.append(torch.zeros(len(prompts), length, 2))
        else:
            encoded = tokenizer(
                prompts,
                max_length=length,
                padding="max_length",
                truncation=True,
                return_offsets_mapping=True,
            )
            offsets.append(torch.tensor(encoded["offset_mapping"]))
    # Padding and special tokens are at (0, 0), which overlaps nothing.
    starts, ends = torch.cat(offsets, dim=1).unbind(-1)  # [B, L]
    core = torch.zeros_like(starts, dtype=torch.bool)
    for row, prompt_spans in enumerate(spans):
        for first, last in prompt_spans:
            core[row] |= (starts[row] < last) & (first < ends[row])
    return core


class AttentionAllocator:
    """Records an attention map: how much each image position attends to the core words.

    In SD3's joint blocks an image query has one softmax over [image; text] keys. The map is the
    attention that core tokens receive:

        attention[p, j] = softmax over all tokens j of  query[p] . key[j] / sqrt(head size)
        m[b, p]         = mean over heads and blocks of  sum over core tokens j of attention[p, j]

    The block itself computes the sum of attention[p, j] * value[j]. With 1 for core tokens and 0
    for others in place of the values that sum is the map. So F.scaled_dot_product_attention
    computes it, and no [tokens, tokens] matrix is ever stored. A hook before the block's attention
    does this, with queries and keys of its own. The block's output stays the same to the last bit.
    SD3.5's second attention, from image to image, is not recorded.

        with torch.no_grad(), AttentionAllocator(transformer, core_tokens) as allocator:
            transformer(...)
        allocator.map().unflatten(-1, (H // 2, W // 2))  # [B, H/2, W/2]

    core_tokens is bool [B, L], a row per image, else ValueError. For guidance, pipelines of
    diffusers make a batch [unconditional; conditional]: then the second half is recorded. `blocks`
    defaults to the last quarter. `map` averages all that was recorded: use one allocator per step.
    Compiled blocks ignore later hooks unless torch._dynamo.config.skip_nnmodule_hook_guards is
    False.
    """

    def __init__(self, transformer, core_tokens, blocks=None):
        if blocks is None:
            count = len(transformer.transformer_blocks)
            blocks = range(count - max(1, count // 4), count)
        self.attentions = [transformer.transformer_blocks[block].attn for block in blocks]
        self.core_tokens = core_tokens
        self.hooks = []

    def __enter__(self):
        self.recorded = []
        for attention in self.attentions:
            self.hooks.append(attention.register_forward_pre_hook(self.record, with_kwargs=True))
        return self

    def __exit__(self, *exception):
        while self.hooks:
            self.hooks.pop().remove()

    @torch.no_grad()  # maps are data: no gradient may flow through them
    def record(self, attention, args, kwargs):
        """The hook: `attention` is about to run with these arguments."""
        image = kwargs["hidden_states"]
        text = kwargs["encoder_hidden_states"]
        batch, length = self.core_tokens.shape
        if len(image) not in (batch, 2 * batch) or text.shape[1] != length:
            raise ValueError(
                f"core_tokens is {[batch, length]}, but there are {len(image)} images and "
                f"{text.shape[1]} text tokens"
            )
        image = image[-batch:]
        text = text[-batch:]

        def heads(x, norm):  # [B, tokens, heads * head size] -> [B, heads, tokens, head size]
            x = x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)  # SD3.5 has norms, SD3 has none

        query = heads(attention.to_q(image), attention.norm_q)
        image_key = heads(attention.to_k(image), attention.norm_k)
        text_key = heads(attention.add_k_proj(text), attention.norm_added_k)
        key = torch.cat([image_key, text_key], dim=2)
        # [B, image and text tokens] of 0 and 1; image tokens come first, and are not core
        core = F.pad(self.core_tokens, (image.shape[1], 0)).to(key)
        value = core[:, None, :, None].expand_as(key).contiguous()  # fused kernels want key's shape
        maps = F.scaled_dot_product_attention(query, key, value)[..., 0]  # all channels are equal
        self.recorded.append(maps.float().mean(dim=1))

    def map(self):
        """The mean of what was recorded: [B, image tokens]."""
        return torch.stack(self.recorded).mean(dim=0)


def allocation_weights(maps, size, allocation="spatiotemporal", lam=0.5):
    """Attention maps [B, S, H/2, W/2] of the trained steps -> weights [B, S, H, W] of mean 1.

        spatial:         w[b, k, p] = (1 - lam) + lam * m[b, k, p] / mean over p of m[b, k]
        spatiotemporal:  w[b, k, p] = (1 - lam) + lam * m[b, k, p] / mean over k and p of m[b]

    "Temporal" means that the trained steps, which are neighbours, share a mean: a step that attends
    more to the core words gets more. Mean 1 redistributes the advantage without increasing it.
    Where nothing attends to core words (a prompt may have none), w = 1. size: (H, W).

    Why can it help? Positions that do not affect the reward add noise to the gradient, but no
    signal. So an update can gain if they have small weights, which is seen at small learning rates.
    On the miniature it gains more than Flow-GRPO's where the reward is about a small part of the
    picture (writing), and less where it is about all of it. Unequal weights also bias the gradient:
    the unbiased one uses the same A everywhere.

    Which lam? 0.5 leaves half of the advantage everywhere. On the miniature an update from the
    starting weights gained as much as with lam = 1 for writing, and more for objects and
    preference. In training spatiotemporal with lam = 1 learned writing faster. lam = 0 has
    Flow-GRPO's gradient in the first update. `weight_peak` in the metrics, the mean of each map's
    largest weight, says how uneven the weights are: near 1 they change nothing.
    """
    # Each token's value goes to its 2 x 2 positions. `interpolate` takes S for channels.
    maps = F.interpolate(maps.float(), size=size, mode="nearest")
    positions = list(range(2, maps.dim()))  # [2, 3]; video has one more
    over = {"spatial": positions, "spatiotemporal": [1] + positions}[allocation]
    mean = maps.mean(dim=over, keepdim=True)
    relative = torch.where(mean == 0, 1.0, maps / mean)
    return (1 - lam) + lam * relative


def star_loss(log_prob, old_log_prob, advantages, weights, clip_range):
    """The clipped objective of PPO and Flow-GRPO, with a weight per action.

        ratio = exp(logp_new - logp_old)
        loss  = - mean over images (and positions) of  w * min(ratio * A, clip(ratio) * A)
        clip(ratio) lies in [1 - eps, 1 + eps], where eps is clip_range

    Flow-GRPO: log-probabilities [B], one per image, and w = 1. STAR: [B, H, W], one per position.
    With weights some positions move further than others, so each has its own ratio, which stops it
    when it has moved enough. The ratio of a position spreads about sqrt(H * W) times as far as that
    of an image, whose log is a mean over positions. So the caller must widen clip_range by that:
    1e-4 becomes 6.4e-3 for 64 x 64 positions.

    Why clip? The images were sampled by the old policy and are only informative near it. Once a
    ratio has moved by eps in the direction that A wants, the clipped term is the smaller one, and
    its gradient is zero. Where it moved the wrong way, the other term is smaller and pulls it back.
    In the first update after a rollout every ratio is 1. So clipping acts only from the second one
    on, and with one update this is REINFORCE, the plain policy gradient, with a group baseline.

    log_prob, old_log_prob and weights have one shape, [B, ...]. advantages are [B]. Otherwise
    ValueError. Returns the loss, the ratios, and where the clipped term is the smaller one.
    """
    equal = log_prob.shape == old_log_prob.shape == weights.shape
    if not equal or advantages.shape != log_prob.shape[:1]:
        raise ValueError("shapes must be equal, and advantages must be [B]")
    while advantages.dim() < log_prob.dim():
        advantages = advantages.unsqueeze(-1)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -(weights.detach() * torch.minimum(unclipped, clipped)).mean()
    return loss, ratio.detach(), clipped < unclipped


# ------------------------------------------------------------------------------- Part 3: training
PARTS = {  # the networks of a Stable Diffusion 3 pipeline
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}


def load_pipeline(args, transformer):
    """Stable Diffusion 3 around its transformer, with or without T5."""
    parts = {"transformer": transformer}
    if not args.t5:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}  # diffusers leaves out what is None
    for name in PARTS:
        if name not in parts:
            parts[name] = load_part(args, name, compact=name != "vae")
    return StableDiffusion3Pipeline.from_pretrained(args.model, **parts)


def load_part(args, name, compact):
    """One of PARTS. If it is compact, it may be in bfloat16. What is trained must not, for small
    changes of its weights would be lost."""
    dtype = torch.bfloat16 if compact and args.bfloat16 else torch.float32
    return load_checked_model(PARTS[name], args.model, name, dtype)


@torch.no_grad()
def encode(pipe, prompts, max_sequence_length):
    """Prompts -> (context [B, L, features], pooled [B, features])."""
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    with offload_models(*filter(None, encoders), device=DEVICE):  # then back to main memory
        context, _, pooled, _ = pipe.encode_prompt(  # _ is for a negative prompt
            prompts,
            None,  # the second and the third encoder get the same prompts
            None,
            device=DEVICE,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
    return context, pooled


@torch.no_grad()
def decode(pipe, latents):
    """Latents [B, C, H, W] -> B PIL images."""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    images = pipe.vae.decode(latents).sample.float()
    if not images.isfinite().all():
        sys.exit("images are not finite: use a lower --learning-rate, or check --model")
    return pipe.image_processor.postprocess(images)


class Trainer:
    """Holds the models. `iterate` is one round of training: sample, score, update.

    What is not trained waits in main memory, and visits the GPU for its use: `offload_models`.
    """

    def __init__(self, args, task):
        self.args = args
        self.task = task
        # First, so that a wrong --model ends the run before anything else is loaded.
        transformer = load_part(args, "transformer", compact=False)
        task.prepare()
        self.pipe = load_pipeline(args, transformer)
        self.pipe.vae.to(DEVICE)
        self.transformer = transformer.to(DEVICE)
        self.ema = None  # the exponential moving average of the weights
        if args.ema_decay > 0:
            self.ema = AveragedModel(self.transformer, "cpu", self.moving_average)
        self.reference = None  # the starting weights
        if args.kl_weight != 0:
            self.reference = load_part(args, "transformer", compact=True)
        if args.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
            self.pipe.vae.enable_slicing()  # decode one image at a time

        parameters = self.transformer.parameters()
        if args.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(
                parameters, args.learning_rate, weight_decay=1e-4, fused=DEVICE == "cuda"
            )
        else:  # adafactor
            # eps[0] is a floor for the size of gradients: 1e-7 by default, but ours may be 1e-8.
            # With 1.0 for eps[1] a step is as long as AdamW's.
            self.optimizer = torch.optim.Adafactor(
                parameters, args.learning_rate, weight_decay=1e-4, eps=(1e-18, 1.0)
            )

        # The cache would keep bfloat16 copies of the weights.
        self.autocast = torch.autocast(
            DEVICE, torch.bfloat16, enabled=args.bfloat16, cache_enabled=False
        )
        side = args.height // self.pipe.vae_scale_factor
        self.shape = (self.transformer.config.in_channels, side, side)
        self.empty_prompt = encode(self.pipe, [""], args.max_sequence_length)
        self.training_policy = self.policy(self.transformer, args.steps)

    def iterate(self, iteration):
        """One round of training. Returns its metrics."""
        args = self.args
        # 1. Sample G images for each of N prompts.
        prompts, batches = self.sample(iteration)

        # 2. Score them. An image's advantage is its reward relative to its group. As in Flow-GRPO,
        # one beyond 5 counts as 5.
        rewards = self.task.scores(self.images_of(batches), prompts, DEVICE)
        rewards = rewards.view(args.prompts_per_iteration, args.group_size)
        advantages = group_advantages(rewards, args.global_std).clamp(-5, 5)

        # 3. Make the actions behind the better images more likely.
        metrics = self.update(batches, advantages.flatten().to(DEVICE))

        without_spread = (advantages == 0).all(dim=1)
        return metrics | {
            "images": iteration * rewards.numel(),  # so far
            "reward_mean": rewards.mean().item(),
            "groups_without_spread": without_spread.float().mean().item(),
        }

    def sample(self, iteration):
        """Sample G images for each of N prompts. Returns the prompt of each image, and Rollouts."""
        args = self.args
        N, G, S = args.prompts_per_iteration, args.group_size, args.stochastic_steps
        # Seeded by the iteration, so that a resumed run draws the same numbers. The factor is
        # larger than any number of iterations, so that two seeds never share their numbers.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        order = torch.randperm(len(self.task.prompts), generator=generator)
        prompts = [self.task.prompts[i] for i in order[:N]]

        # S steps in a row are stochastic. They are few, since each costs a forward and a backward
        # pass in the update, and early, since these decide what the image will show. The first
        # one counts although its maps, of nearly pure noise, say little (README shows them). For a
        # fixed window set `first`; kl_weight in PRESETS is for early ones.
        choices = args.last_stochastic_step - S + 2  # for the first one: 0, 1, ..., last - S + 1
        first = torch.randint(choices, (), generator=generator).item()
        steps = range(first, first + S)
        recorded = [] if args.allocation == "uniform" else steps

        # A group that starts from the same noise differs only by its actions. So they alone explain
        # its rewards, and not the luck of a good start.
        images_per_noise = G if args.same_noise else 1
        noise = torch.randn(N * G // images_per_noise, *self.shape, generator=generator)
        noise = noise.repeat_interleave(images_per_noise, dim=0)

        batches = self.rollouts(self.training_policy, noise, prompts, steps, generator, recorded)
        if self.reference:
            self.add_reference_means(batches)
        return [prompt for prompt in prompts for _ in range(G)], batches

    def rollouts(self, policy, noise, prompts, steps=(), generator=None, recorded_steps=()):
        """Rollouts in batches, from noise [N * G, C, H, W] for N prompts: G images of each. Without
        `steps` they are deterministic."""
        copies = len(noise) // len(prompts)
        context, pooled = encode(self.pipe, prompts, self.args.max_sequence_length)
        context = context.repeat_interleave(copies, dim=0)
        pooled = pooled.repeat_interleave(copies, dim=0)
        core_tokens = self.core_tokens(prompts).repeat_interleave(copies, dim=0)
        size = self.args.batch_size
        batches = []
        # After `encode`, so that the text encoders and the EMA do not meet on the GPU.
        with offload_models(policy.transformer, device=DEVICE), self.autocast:
            for start in range(0, len(noise), size):
                part = slice(start, start + size)
                x = noise[part].to(DEVICE)
                prompt = (context[part], pooled[part])
                batch = rollout(
                    policy, x, prompt, steps, generator, recorded_steps, core_tokens[part]
                )
                batches.append(batch)
        return batches

    @torch.no_grad()
    def add_reference_means(self, batches):
        """The means of the reference policy's Gaussians, for the KL penalty."""
        reference = self.policy(self.reference, self.args.steps)
        with offload_models(self.reference, device=DEVICE), self.autocast:
            for batch in batches:
                for k in batch.steps:
                    mean, _ = reference.distribution(batch.latents[k], k, batch.prompt)
                    batch.reference_means.append(mean)

    def images_of(self, batches):
        return [image for batch in batches for image in decode(self.pipe, batch.latents[-1])]

    def update(self, batches, advantages):
        """Make the actions behind the better images more likely. Advantages [N * G] -> metrics."""
        args = self.args
        metrics = defaultdict(list)
        per_update = len(batches) // args.updates_per_iteration  # each image serves one update
        for i, A in enumerate(advantages.split(args.batch_size)):
            self.add_gradient(batches[i], A, per_update, i < per_update, metrics)
            if (i + 1) % per_update == 0:
                norm = torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), max_norm=1.0)
                if not norm.isfinite():
                    sys.exit("the gradient is not finite: use a lower --learning-rate")
                metrics["gradient_norm"].append(norm.cpu())
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.ema:
                    self.ema.update_parameters(self.transformer)
        return {name: torch.stack(values).mean().item() for name, values in metrics.items()}

    def add_gradient(self, batch, A, per_update, is_first_update, metrics):
        """Add the gradient of a batch with advantages A [B]. An update averages over `per_update`
        batches."""
        args = self.args
        H, W = self.shape[1:]
        if args.allocation != "uniform":
            maps = torch.stack(batch.maps, dim=1)
            allocated = allocation_weights(maps, (H, W), args.allocation, args.lam)
            metrics["weight_peak"].append(allocated.amax((-2, -1)).mean())
        if not A.any():
            return  # there is nothing to learn from these images: the gradient is zero
        for j, k in enumerate(batch.steps):
            # How likely is the action that was taken, now? The rollout kept no graph.
            with self.autocast:
                mean, std = self.training_policy.distribution(batch.latents[k], k, batch.prompt)
            log_prob = position_log_prob(batch.latents[k + 1], mean, std)
            old_log_prob = batch.log_probs[j]  # needed from the second update on

            # This is where Flow-GRPO and STAR differ.
            if args.allocation == "uniform":  # one action per image, [B]
                log_prob = log_prob.mean((1, 2))
                old_log_prob = old_log_prob.mean((1, 2))
                weights = torch.ones_like(log_prob)
                clip_range = args.clip_range
            else:  # one action per position, [B, H, W]
                weights = allocated[:, j]
                clip_range = args.clip_range * math.sqrt(H * W)

            if is_first_update:
                # The model is still the one that sampled: the ratio is 1, whatever the rounding.
                old_log_prob = log_prob.detach()
            loss, ratio, clipped = star_loss(log_prob, old_log_prob, A, weights, clip_range)
            metrics["ratio_mean"].append(ratio.mean())
            metrics["clip_fraction"].append(clipped.float().mean())
            if self.reference:
                kl = kl_to_reference(mean, batch.reference_means[j], std).mean((1, 2))  # [B]
                metrics["kl"].append(kl.detach().mean())
                # As in Flow-GRPO, images without an advantage are left out.
                loss = loss + args.kl_weight * (kl * (A != 0)).mean()
            # Step by step, since the graph of one step takes less memory than that of all. The sum
            # over batches and steps is the mean.
            (loss / (per_update * len(batch.steps))).backward()

    def policy(self, transformer, steps):
        """A transformer as the policy of so many denoising steps."""
        self.pipe.scheduler.set_timesteps(steps)
        return Policy(
            transformer=transformer,
            sigmas=self.pipe.scheduler.sigmas.tolist(),
            noise_level=self.args.noise_level,
            guidance_scale=self.args.guidance_scale,
            empty_prompt=self.empty_prompt,
        )

    def core_tokens(self, prompts):
        spans = [self.task.core_spans(prompt) for prompt in prompts]
        return core_tokens_of(self.pipe, prompts, spans, self.args.max_sequence_length)

    def moving_average(self, average, weight, n):
        """The average of a weight after n earlier updates. At first it moves more quickly. (The
        first update copies the weights, and does not call this.)"""
        decay = min(self.args.ema_decay, (1 + n) / (10 + n))
        return average.lerp(weight, 1 - decay)

    def generate(self, prompts):
        """One image per prompt, deterministic, from the same noise every time. If there is an
        average of the weights, it is used, since it is less noisy than the weights themselves."""
        model = self.ema.module if self.ema else self.transformer
        generator = torch.Generator().manual_seed(self.args.seed)
        noise = torch.randn(len(prompts), *self.shape, generator=generator)
        policy = self.policy(model, self.args.evaluation_steps)
        return self.images_of(self.rollouts(policy, noise, prompts))

    def save_pipeline(self, folder):
        """Write a pipeline for plain diffusers, with the average of the weights if there is one."""
        if self.ema:
            self.pipe.transformer = self.ema.module
        self.pipe.save_pretrained(folder, max_shard_size="2GB")
        self.pipe.transformer = self.transformer

    def save(self, folder, settings, history):
        """Write all that training changes, the settings and the metrics so far."""
        (folder / "run.json").write_text(json.dumps({"settings": settings, "history": history}))
        save_model(self.transformer, folder / "transformer.safetensors")
        if self.ema:
            save_model(self.ema, folder / "ema.safetensors")
        tensors = {}
        for i, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{i}.{key}"] = value
        save_file(tensors, folder / "optimizer.safetensors")

    def load(self, folder):
        """Continue with what was written."""
        load_model(self.transformer, folder / "transformer.safetensors")
        if self.ema:
            load_model(self.ema, folder / "ema.safetensors")
        state = defaultdict(dict)
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            i, key = name.split(".")
            state[int(i)][key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


# ------------------------------------------------------------------------------ Part 4: the program
HERE = Path(__file__).parent

# Options that the command line does not name have these values. They depend on task and model.
PRESETS = {
    # The miniature: study/RESULTS.md has the runs behind these.
    "ocr": {
        "monitor": f"pickscore,{HERE}/tiny/build.py:Signs",
        "learning_rate": 4e-4,
        "ema_decay": 0.8,
    },
    "geneval": {
        "prompts_per_iteration": 6,
        "batch_size": 48,
        "iterations": 30,
        "evaluate_every": 15,
        "learning_rate": 3e-4,
        "same_noise": False,
    },
    "pickscore": {
        "prompts_per_iteration": 6,
        "batch_size": 48,
        "iterations": 16,
        "evaluate_every": 8,
        "learning_rate": 4e-4,
    },
    # SD3 and SD3.5, Medium and Large, on one GPU. [F] marks the values of Flow-GRPO's SD3 recipes.
    # Those recipes train all steps but the last, and make two updates per rollout. Our short window
    # in the first half follows Flow-GRPO's fast recipe. The other values are untuned.
    "full size": {
        "height": 512,  # [F]
        "evaluation_steps": 40,  # [F]
        "guidance_scale": 4.5,  # [F]
        "max_sequence_length": 128,  # [F]
        "group_size": 24,  # [F]
        "same_noise": False,  # [F]
        "global_std": True,  # [F]
        "clip_range": 1e-4,  # [F] per image; per position it is 1e-4 * sqrt(64 * 64) = 6.4e-3
        "last_stochastic_step": 4,
        "learning_rate": 1e-5,  # 3e-4 there, for LoRA; training all parameters needs far less
        "ema_decay": 0.99,  # 0.9 after every eighth update there, which is about the same
        # Flow-GRPO has 0.04 (0.01 for PickScore), and divides the KL by s^2. We divide by std^2,
        # which is s^2 * -dt. Over the steps that may be trained, the mean of -dt is 0.058.
        "kl_weight": 0.04 * 0.058,
        "gradient_checkpointing": True,  # without it training is faster, but needs more memory
        "prompts_per_iteration": 8,
        "batch_size": 8,
        "iterations": 500,
    },
}


def positive(text):
    """A whole number of 1 or more, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError  # argparse makes a sentence of it
    return number


def make_parser():
    parser = argparse.ArgumentParser(
        usage="python star.py --task ocr [--option ...]",
        epilog="Other defaults, for some tasks and for full-size models, are in PRESETS.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    switch = argparse.BooleanOptionalAction
    option(
        "--task", default="ocr", help="ocr, geneval, pickscore, FILE.py:CLASS or a mixture of them"
    )
    option("--model", default=f"{HERE}/tiny/sd3", help="folder or hub name of an SD3 pipeline")
    option("--reward-model", nargs="+", help="models that score instead of the task's own")
    option("--prompts", help="file (.txt) with one training prompt per line; each task has its own")
    option("--heldout-prompts", help="the same for evaluation")
    option("--out", help="output folder; runs/TASK-ALLOCATION-SEED if not given")
    option("--resume", action="store_true", help="continue the run in the output folder")
    option("--seed", type=int, default=0, help="seed of prompts and noise")
    option("--iterations", type=positive, default=22, help="rounds of sampling and updating")
    option("--evaluate-every", type=positive, default=11, help="iterations between evaluations")
    option("--evaluation-prompts", type=positive, default=120, help="held-out prompts to evaluate")
    option("--monitor", default="", help="tasks that are logged, but not trained")
    option(
        "--allocation",
        choices=["uniform", "spatial", "spatiotemporal"],
        default="spatiotemporal",
        help="of an image's advantage; uniform is Flow-GRPO",
    )
    option("--lam", type=float, default=0.5, help="strength of the allocation, 0 to 1")
    option("--prompts-per-iteration", type=positive, default=3, help="N, prompts per iteration")
    option("--group-size", type=positive, default=8, help="G, images per prompt")
    option("--batch-size", type=positive, default=24, help="images per forward pass")
    option("--height", type=positive, default=32, help="and width of images, in pixels")
    option("--steps", type=positive, default=10, help="T, denoising steps in training")
    option("--evaluation-steps", type=positive, default=10, help="denoising steps in evaluation")
    option("--stochastic-steps", type=positive, default=3, help="S, trained steps, in a row")
    option("--last-stochastic-step", type=int, default=3, help="that may be trained, from 0")
    option("--noise-level", type=float, default=0.7, help="a, noise of a stochastic step")
    option("--guidance-scale", type=float, default=1.0, help="in training, too; 1 is none")
    option("--same-noise", action=switch, default=True, help="one noise for all images of a group")
    option("--t5", action=switch, default=True, help="use the third and largest text encoder")
    option("--max-sequence-length", type=positive, default=20, help="T5 tokens per prompt")
    option(
        "--updates-per-iteration", type=positive, default=1, help="each on its part of the images"
    )
    option(
        "--optimizer",
        choices=["adamw", "adafactor"],
        default="adamw",
        help="adafactor needs less memory",
    )
    option("--learning-rate", type=float, default=2e-4, help="of the optimizer")
    option(
        "--clip-range", type=float, default=1.25e-3, help="of the ratio of an image, see star_loss"
    )
    option("--global-std", action=switch, default=False, help="divide by the std of all rewards")
    option("--kl-weight", type=float, default=0.0, help="KL penalty towards the starting weights")
    option("--ema-decay", type=float, default=0.0, help="moving average of the weights; 0 is none")
    option(
        "--bfloat16",
        action=switch,
        default=DEVICE == "cuda",
        help="the trained weights stay float32",
    )
    option("--gradient-checkpointing", action=switch, default=False, help="less memory, more time")
    return parser


def parse_arguments(argv=None):
    """The options, whose defaults depend on the task and the model."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        index = StableDiffusion3Pipeline.load_config(args.model)
        has_t5 = index["text_encoder_3"][0] is not None
        config = SD3Transformer2DModel.load_config(args.model, subfolder="transformer")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(
            f"--model {args.model} must be a pipeline of Stable Diffusion 3, as a folder or a name "
            "on the hub. Make one with diffusers from a single file (from_single_file), or from a "
            f"model and its adapter (fuse_lora). A gated one needs `hf auth login`. ({error})"
        )
    full_size = config["sample_size"] >= 64  # latents; the miniature has 16 x 16
    # The first time was for --model and --task. The second time has their defaults.
    preset = PRESETS["full size"] if full_size else PRESETS.get(args.task, {})
    parser.set_defaults(full_size=full_size, t5=has_t5, **preset)
    args = parser.parse_args(argv)

    images = args.prompts_per_iteration * args.group_size
    divisor = args.batch_size * args.updates_per_iteration
    if images % divisor:
        sys.exit(
            f"{images} images (--prompts-per-iteration x --group-size) are no multiple of "
            f"{divisor} (--batch-size x --updates-per-iteration)"
        )
    if not args.stochastic_steps <= args.last_stochastic_step + 1 <= args.steps:
        sys.exit(
            f"--stochastic-steps {args.stochastic_steps} must fit before --last-stochastic-step "
            f"{args.last_stochastic_step}, and this within --steps {args.steps}"
        )
    if args.group_size < 2 or not 0 <= args.lam <= 1 or not args.noise_level > 0:
        sys.exit(
            f"out of bounds: --group-size {args.group_size} (2 or more), --lam {args.lam} "
            f"(0 to 1) or --noise-level {args.noise_level} (above 0)"
        )
    if args.height % 16:
        sys.exit(f"--height is {args.height}, but must be a multiple of 16")
    return args


def checkpoints(folder):
    """The checkpoints of a run, checkpoint/ITERATION, the newest last."""
    return sorted(folder.glob("checkpoint/[0-9]*"))


def read_history(folder, settings, resume):
    """With resume: the metrics so far. Without: [], and the folder must hold no run."""
    if not resume:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") > 1:  # more than iteration 0
            sys.exit(f"{folder} holds a run: use --resume or another --out")
        return []
    if not checkpoints(folder):
        sys.exit(f"{folder} holds no checkpoint: use another --out, or delete it")
    run = json.loads((checkpoints(folder)[-1] / "run.json").read_text())
    for name, value in settings.items():
        old = run["settings"].get(name)
        if old != value and name not in ["resume", "out", "iterations"]:
            sys.exit(f"{folder} was run with other settings: its {name} was {str(old)[:80]}")
    return run["history"]


def write_folder(folder, write, *content):
    """Fill a folder under another name, then rename it. So a kill leaves no half-written folder."""
    partial = folder.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial, *content)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{folder} cannot be written: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def draw_samples(images, rewards, prompts):
    """A row of eight images, each above its reward and its prompt."""
    picture = Image.new("RGB", (1248, 228), "white")
    draw = ImageDraw.Draw(picture)
    for left, image, reward, prompt in zip(range(6, 1248, 156), images, rewards, prompts):
        picture.paste(image.resize((144, 144), Image.BOX), (left, 6))
        caption = textwrap.fill(f"{reward:.2f}: {prompt}", width=24)
        draw.multiline_text((left, 152), caption, "black", font_size=12)
    return picture


def show_prompts(trainer):
    """Say what is trained, and how many prompts have no core words within the limit of tokens."""
    prompts = trainer.task.prompts
    first = prompts[0]
    words = [first[start:end] for start, end in trainer.task.core_spans(first)]
    without = (~trainer.core_tokens(prompts).any(dim=1)).sum()
    print(
        f"{len(prompts)} training prompts. The first: {first} (core words: {words})\n"
        f"{without} have no core words among their tokens: they train as with --lam 0"
    )


def main(argv=None):
    args = parse_arguments(argv)
    if args.full_size and DEVICE == "cpu":
        sys.exit(f"torch finds no GPU, which --model {args.model} needs")
    task = make_task(args)
    heldout = task.heldout_prompts
    settings = vars(args) | {"prompts": task.prompts, "heldout_prompts": heldout}
    folder = Path(args.out or f"runs/{args.task.replace('/', '_')}-{args.allocation}-{args.seed}")
    history = read_history(folder, settings, args.resume)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, task)
    show_prompts(trainer)
    if args.resume:
        trainer.load(checkpoints(folder)[-1])

    for iteration in tqdm(range(len(history), args.iterations + 1), args.task):
        line = {"iteration": iteration, "images": 0}
        if iteration > 0:
            line |= trainer.iterate(iteration)
        history.append(line)
        is_evaluated = iteration % args.evaluate_every == 0 or iteration == args.iterations
        if is_evaluated:
            images = trainer.generate(heldout)
            rewards = task.scores(images, heldout, DEVICE)
            line["heldout_reward"] = rewards.mean().item()
            line["report"] = task.full_report(images, heldout, DEVICE)
            draw_samples(images, rewards, heldout).save(folder / f"samples-{iteration}.png")
            tqdm.write(f"{line['images']} images: held-out reward {line['heldout_reward']:.3f}")
            best = max(old.get("heldout_reward", -math.inf) for old in history)
            if line["heldout_reward"] == best:
                write_folder(folder / "pipeline", trainer.save_pipeline)
        lines = [json.dumps(line) + "\n" for line in history]
        (folder / "metrics.jsonl").write_text("".join(lines))
        if is_evaluated and iteration:
            write_folder(folder / f"checkpoint/{iteration:06}", trainer.save, settings, history)
            for older in checkpoints(folder)[:-1]:
                shutil.rmtree(older)
    print(f"samples-*.png, metrics.jsonl and the pipeline of the best evaluation are in {folder}")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit(
            "out of GPU memory: try --batch-size 1 --gradient-checkpointing --optimizer adafactor "
            "--no-t5, or a smaller --height"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on from the last checkpoint, if there is one")
