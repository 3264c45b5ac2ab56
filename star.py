"""STAR: spatiotemporal reward allocation for text-to-image flow models, in one file.

    python star.py --task ocr

A flow model turns noise into an image in T denoising steps. We make a few of them random, and
reinforcement learning makes those random choices more likely that led to good images:

1. Sample a group of images per prompt. A stochastic step samples from a Gaussian around the
   model's prediction. The Gaussian is the policy, the sample its action (`rollout`).
2. Score the images. The advantage of an image is its reward minus the mean reward of its group,
   divided by the standard deviation (`group_advantages`).
3. Raise the probability of the actions behind the better images, lower the rest (`star_loss`).

Part 1 is Flow-GRPO (arXiv 2505.05470): one advantage for the whole image. In part 2 STAR (arXiv
2606.17979) gives a larger share to positions that attend to the prompt's *core words*, which the
reward is about. Only the abstract of STAR is public: the details are this project's own.

Shapes: B images, C channels, H x W latent positions, h x w image tokens, L text tokens, T denoising
steps of which S are stochastic and trained, N prompts with G images each. Symbols: x latents and x'
the next ones, v the model's velocity, k a step, p a position, m an attention map, w weights, r a
reward, A an advantage, and sigma the noise level, which falls from 1 (noise) to 0 (image).
"""

import argparse
import inspect
import json
import math
import re
import shutil
import signal
import sys
import textwrap
import zlib
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import diffusers
import torch
import torch.nn.functional as F
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rewards as tasks
from rewards import UserError, naming, on_device, replaced, require, write

if __name__ == "__main__":
    tasks.silence_libraries()  # they also warn where classes are imported


# ------------------------------------------------------------------------------- Part 1: Flow-GRPO
def sde_step(latents, velocity, sigma, sigma_next, sigma_max, noise_level):
    """A step of the flow as a stochastic differential equation (Flow-GRPO, "From ODE to SDE").

        s    = a * sqrt(sigma / (1 - sigma))    (at sigma = 1 the denominator is 1 - sigma_max)
        mean = x * (1 + s^2 / (2 sigma) * dt) + v * (1 + s^2 (1 - sigma) / (2 sigma)) * dt
             = x + v * dt + s^2 / 2 * score * -dt
        std  = s * sqrt(-dt),    dt = sigma_next - sigma < 0,    x' = mean + std * noise

    Why noise? A deterministic sampler has no action probabilities, so there is no likelihood to
    differentiate. Why is the mean not x + v * dt? Noise alone would spread x further than the model
    has seen in training. A drift along the score, the gradient of log p(x), contracts x by as much.
    (x is (1 - sigma) * image + sigma * e with Gaussian e, and v estimates e - image. So x plus
    (1 - sigma) * v estimates e, and the score is -e / sigma.) For small steps images are then
    distributed as before; not exactly with guidance, whose v is no flow's velocity.

    latents, velocity [B, C, H, W]; noise_level is a. sigma_max, the schedule's second sigma, keeps
    s finite at sigma = 1. Returns the Gaussian over the next x: mean [B, C, H, W] and std, a float.
    """
    latents, velocity = latents.float(), velocity.float()
    dt = sigma_next - sigma
    s = noise_level * math.sqrt(sigma / (1 - min(sigma, sigma_max)))
    x_scale = 1 + s**2 / (2 * sigma) * dt
    v_scale = 1 + s**2 * (1 - sigma) / (2 * sigma)
    return latents * x_scale + velocity * v_scale * dt, s * math.sqrt(-dt)


def position_log_prob(sample, mean, std):
    """Log-probability of a stochastic step at each latent position: [B, C, H, W] -> [B, H, W].

        logp[b, p] = mean over channels c of  log N(x'[b, c, p]; mean[b, c, p], std^2)

    The mean at p depends on x at all positions. But x is the state in which the action is taken: it
    is given, and with it the mean. What remains random is the noise, independent at each position.
    So the density of a step factorizes over positions, exactly: each is an action of its own.

    We average log-densities over channels, as Flow-GRPO does. So our ratio is the true one to the
    power 1/C: a clip range of eps allows a true ratio of about 1 +- C * eps. The KL has the same
    1/C. The mean over positions is Flow-GRPO's log-probability. std: float > 0 or [B, 1, 1, 1].
    """
    log_std = torch.as_tensor(std).log()
    squared = (sample.float() - mean.float()) ** 2
    return (-squared / (2 * std**2) - log_std - 0.5 * math.log(2 * math.pi)).mean(1)


def kl_to_reference(mean, reference_mean, std):
    """KL divergence from the reference policy, mean over channels: [B, C, H, W] -> [B, H, W].

        KL[b, p] = mean over channels of  (mean - reference_mean)^2 / (2 std^2)

    for Gaussians of equal std. It has no w: positions share the parameters, so all may drift.
    """
    return ((mean - reference_mean) ** 2 / (2 * std**2)).mean(1)


@dataclass
class Policy:
    """The transformer as a policy: from x at step k and a prompt to a Gaussian over the next x."""

    transformer: torch.nn.Module
    sigmas: list  # T + 1 noise levels from 1 to 0
    noise_level: float
    guidance_scale: float
    empty_prompt: tuple  # prompts are (context [B, L, features], pooled [B, features])

    def velocity(self, latents, k, prompt, recorder=None):
        """v [B, C, H, W], with classifier-free guidance. recorder: AttentionAllocator or None."""
        timestep = latents.new_full((len(latents),), 1000 * self.sigmas[k])  # SD3 counts to 1000

        def predict(context, pooled):
            output = self.transformer(latents, context, pooled, timestep, return_dict=False)
            return output[0].float()

        with recorder or nullcontext():
            conditional = predict(*prompt)
        if self.guidance_scale == 1:
            return conditional
        with torch.no_grad():  # as in Flow-GRPO
            empty = (each.expand_as(like) for each, like in zip(self.empty_prompt, prompt))
            unconditional = predict(*empty)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def distribution(self, latents, k, prompt, recorder=None):
        """The Gaussian over x at step k + 1: (mean, std)."""
        velocity = self.velocity(latents, k, prompt, recorder)
        sigma, sigma_next = self.sigmas[k : k + 2]
        return sde_step(latents, velocity, sigma, sigma_next, self.sigmas[1], self.noise_level)


@dataclass
class Rollout:
    """A batch of sampled images, and all that the update needs of them."""

    prompt: list  # [context, pooled]
    steps: range  # the S stochastic ones
    latents: torch.Tensor  # [B, T + 1, C, H, W], from pure noise to the finished image
    log_prob: torch.Tensor  # [B, S, H, W] under the policy that sampled; None if S is 0
    maps: torch.Tensor  # [B, recorded steps, h, w] of attention; None if there are none
    reference_means: list = None  # S times [B, C, H, W]


@torch.no_grad()
def rollout(policy, latents, prompt, steps, generator, recorded_steps, core_tokens):
    """Sample images from noise [B, C, H, W]. Only `steps` are stochastic, the others are Euler's.
    At recorded_steps the attention to core_tokens [B, L] is recorded (part 2)."""
    states, log_probs, maps, transformer = [latents], [], [], policy.transformer
    h, w = (side // transformer.config.patch_size for side in latents.shape[-2:])
    for k in range(len(policy.sigmas) - 1):
        recorder = AttentionAllocator(transformer, core_tokens) if k in recorded_steps else None
        if k in steps:
            mean, std = policy.distribution(latents, k, prompt, recorder)
            noise = torch.randn(latents.shape, generator=generator)  # the same on every device
            latents = mean + std * noise.to(mean.device)
            log_probs.append(position_log_prob(latents, mean, std))
        else:
            dt = policy.sigmas[k + 1] - policy.sigmas[k]
            latents = latents + policy.velocity(latents, k, prompt, recorder) * dt
        if recorder:
            maps.append(recorder.map().unflatten(-1, (h, w)))
        states.append(latents)
    stacked = (torch.stack(each, dim=1) if each else None for each in (states, log_probs, maps))
    return Rollout(prompt, steps, *stacked)


def group_advantages(rewards, global_std=False, limit=None):
    """Rewards [N, G] -> advantages [N, G]: how much better is an image than the rest of its group?

        A[n, g] = (r[n, g] - mean over g of r[n]) / (std over g of r[n] + 1e-4)

    Comparing images of the same prompt cancels its difficulty, so no value network is needed
    (Flow-GRPO, "GRPO on Flow Matching"). A group of equal rewards teaches nothing: it gets 0, even
    if the mean is rounded. global_std divides by the std of all rewards. limit cuts off large ones.
    """
    rewards = rewards.float()
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    std = rewards.std(dim=None if global_std else 1, keepdim=True, unbiased=False)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = torch.where(equal, 0.0, centred / (std + 1e-4))
    return advantages if limit is None else advantages.clamp(-limit, limit)


def star_loss(log_prob, old_log_prob, advantages, weights, clip_range):
    """The clipped objective of PPO and Flow-GRPO, with a ratio and a weight per position.

        ratio[b, k, p] = exp(logp_new - logp_old)
        loss = - mean over b, k, p of  w * min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)

    The images were sampled by the old policy and are only informative near it. Once a ratio has
    moved by eps in the direction that A wants, the clipped term is the smaller one, and its
    gradient is zero. Where it moved the wrong way, the other term is smaller and pulls it back. By
    default a rollout serves one update. Then every ratio is 1, clipping never acts, and this is
    REINFORCE, the plain policy gradient, with a group baseline. With w = 1 it is Flow-GRPO's.

    Flow-GRPO has one ratio per image and step. With weights some positions move further than
    others, so each has its own ratio, which stops it when it has moved enough. Flow-GRPO's is a
    mean over H * W positions, so its log spreads sqrt(H * W) times less than ours. So our clip
    range is wider by that: 1e-4 * sqrt(64 * 64) is about 6e-3.

    log_prob, old_log_prob, weights [B, S, H, W] or any [B, ...]; advantages [B]; else ValueError.
    Returns the loss, the ratios, and where the clipped term is the smaller one.
    """
    if not log_prob.shape == old_log_prob.shape == weights.shape:
        raise ValueError("log_prob, old_log_prob and weights must have equal shapes")
    if advantages.shape != log_prob.shape[:1]:
        raise ValueError(f"advantages must be [{len(log_prob)}], not {list(advantages.shape)}")
    ratio = torch.exp(log_prob - old_log_prob)
    advantages = advantages.view(-1, *[1] * (ratio.dim() - 1))
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -(weights.detach() * torch.minimum(free, clipped)).mean()
    return loss, ratio.detach(), clipped.detach() < free.detach()


# --------------------------------------------------------------------------- Part 2: what STAR adds
def core_tokens_of(pipeline, prompts, spans, max_sequence_length):
    """Which text tokens belong to the core words of each prompt: bool [B, L].

    spans: per prompt, a list of (start, end) characters, which a core token's characters overlap.
    SD3's context is the CLIP tokens, then max_sequence_length T5 tokens, or zeros without T5.
    """
    offsets, options = [], dict(padding="max_length", truncation=True, return_offsets_mapping=True)
    lengths = pipeline.tokenizer.model_max_length, max_sequence_length
    for tokenizer, length in zip((pipeline.tokenizer, pipeline.tokenizer_3), lengths):  # CLIP, T5
        offsets.append(torch.zeros(len(prompts), length, 2))
        if tokenizer:
            encoded = tokenizer(prompts, max_length=length, **options)
            offsets[-1] = torch.tensor(encoded["offset_mapping"])
    starts, ends = torch.cat(offsets, dim=1).unbind(-1)  # [B, L]
    core = torch.zeros_like(starts, dtype=torch.bool)
    for row, prompt_spans in enumerate(spans):
        for start, end in prompt_spans:
            core[row] |= (starts[row] < end) & (start < ends[row])
    return core


class AttentionAllocator:
    """Records an attention map: how much each image position attends to the core words.

    In SD3's joint blocks an image query has one softmax over [image; text] keys. The map is the
    attention that core tokens receive:

        attention[p, j] = softmax over all tokens j of  query[p] . key[j] / sqrt(head size)
        m[b, p]         = mean over heads and blocks of attention[p, j], summed over core tokens j

    The block itself computes the sum of attention[p, j] * value[j]. With 1 for core tokens and 0
    for others in place of the values that sum is the map. So the fused kernel computes it, and no
    [tokens, tokens] matrix is ever stored. A hook does this beside the block, whose output stays
    the same to the last bit. SD3.5's second attention, from image to image, is not recorded.

        with torch.no_grad(), AttentionAllocator(transformer, core_tokens) as allocator:
            transformer(...)
        allocator.map().unflatten(-1, (h, w))  # [B, h, w]

    core_tokens is bool [B, L], a row per image, else ValueError. Of a batch [unconditional;
    conditional], as pipelines make for guidance, the second half is recorded. `blocks` defaults to
    the last quarter. `map` averages all that was recorded: use one allocator per step. Compiled
    blocks ignore later hooks unless torch._dynamo.config.skip_nnmodule_hook_guards is False.
    """

    def __init__(self, transformer, core_tokens, blocks=None):
        count = len(transformer.transformer_blocks)
        blocks = blocks or range(count - max(1, count // 4), count)
        self.attentions = [transformer.transformer_blocks[block].attn for block in blocks]
        self.core_tokens, self.hooks = core_tokens, []

    def __enter__(self):
        self.recorded = []
        for attention in self.attentions:
            self.hooks.append(attention.register_forward_pre_hook(self.record, with_kwargs=True))
        return self

    def __exit__(self, *exception):
        while self.hooks:
            self.hooks.pop().remove()

    @torch.no_grad()  # else the model could lower the loss by moving its attention
    def record(self, attention, args, kwargs):
        image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        batch, length = self.core_tokens.shape
        if len(image) not in (batch, 2 * batch) or text.shape[1] != length:
            found = f"{len(image)} images and {text.shape[1]} text tokens"
            raise ValueError(f"core_tokens is {[batch, length]}, but there are {found}")
        image, text = image[-batch:], text[-batch:]

        def heads(x, norm):  # [B, tokens, features] -> [B, heads, tokens, head size]
            x = x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        query = heads(attention.to_q(image), attention.norm_q)
        image_key = heads(attention.to_k(image), attention.norm_k)
        text_key = heads(attention.add_k_proj(text), attention.norm_added_k)
        key = torch.cat([image_key, text_key], dim=2)
        core = F.pad(self.core_tokens, (image.shape[1], 0)).to(key)  # image keys are not core
        value = core[:, None, :, None].expand_as(key).contiguous()  # fused kernels want key's shape
        maps = F.scaled_dot_product_attention(query, key, value)[..., 0]  # all channels are equal
        self.recorded.append(maps.float().mean(1))

    def map(self):
        return torch.stack(self.recorded).mean(0)


def allocation_weights(maps, size, allocation="spatiotemporal", lam=0.5):
    """Attention maps [B, S, h, w] of the trained steps -> weights [B, S, H, W] of mean 1.

        spatial:         w[b, k, p] = (1 - lam) + lam * m[b, k, p] / mean over p of m[b, k]
        spatiotemporal:  w[b, k, p] = (1 - lam) + lam * m[b, k, p] / mean over k and p of m[b]

    "Temporal" means that the trained steps, which are neighbours, share a mean: a step that attends
    more to the core words gets more. Mean 1 redistributes the advantage without increasing it.
    Where nothing attends to core words (a prompt may have none), w = 1.

    Unequal weights bias the gradient: the unbiased one uses the same A everywhere. The bet is that
    positions which barely affect the reward add more noise than signal. Which lam? 0.5 leaves half
    of the advantage everywhere. On the miniature 1 learned writing no faster than 0.5, and
    preference more slowly. 0 is Flow-GRPO: as fast as 0.5 over three rewards, and the choice for
    one about the whole image, where 1 was slower. `weight_peak` in the metrics, the mean of each
    map's largest weight, says how uneven weights are: near 1 they change nothing.
    """
    maps = F.interpolate(maps.float(), size=size, mode="nearest")  # to each token's 2 x 2 latents
    first = {"spatial": 2, "spatiotemporal": 1}[allocation]
    mean = maps.mean(dim=tuple(range(first, maps.dim())), keepdim=True)
    return (1 - lam) + lam * torch.where(mean == 0, 1.0, maps / mean)


# ------------------------------------------------------------------------------- Part 3: training
Pipeline = diffusers.StableDiffusion3Pipeline
KINDS = Pipeline.__init__.__annotations__  # the class of each part
WEIGHTS = "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"
WITHOUT_T5, GPU = dict(text_encoder_3=None, tokenizer_3=None), torch.cuda.is_available()


def load_part(name, part, device, dtype):
    # .to, for without the package accelerate the loader may keep the file's dtype
    return tasks.load_model(KINDS[part], name, part, dtype=dtype).to(device, dtype)


def load_pipeline(name, t5=True, device="cpu", frozen=torch.float32):
    """The pipeline, with or without T5. Its text encoders have the dtype `frozen`."""
    dtypes = dict.fromkeys(WEIGHTS, frozen) | dict.fromkeys(WEIGHTS[:2], torch.float32)
    parts = {part: load_part(name, part, device, dtypes[part]) for part in WEIGHTS[: 4 + t5]}
    with naming(f"--model {name}"):
        return Pipeline.from_pretrained(name, **({} if t5 else WITHOUT_T5) | parts)


@torch.no_grad()
def encode(pipe, prompts, length):
    """Prompts -> (context [B, L, features], pooled [B, features])."""
    device, encoders = pipe.transformer.device, (getattr(pipe, part) for part in WEIGHTS[2:])
    options = dict(do_classifier_free_guidance=False, max_sequence_length=length)
    with on_device(device, *filter(None, encoders)):
        context, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device, **options)
    return context, pooled


@torch.no_grad()
def decode(pipe, latents):
    """Latents [B, C, H, W] -> B PIL images."""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    images = pipe.vae.decode(latents).sample.float()
    require(images.isfinite().all(), "images are not finite: lower --learning-rate or mend --model")
    return pipe.image_processor.postprocess(images)


@torch.no_grad()
def update_ema(ema, weights, decay, n):
    """The exponential moving average of weights after update n = 0, 1, ...; quicker at first."""
    d = min(decay, (1 + n) / (10 + n))
    for average, weight in zip(ema, weights):
        average.lerp_(weight.to(average.device), 1 - d)


class Trainer:
    """`iterate` is one round of sample, score and update. Below it are the models it needs."""

    def iterate(self, iteration):
        """Sample, score, update. Returns the metrics of the iteration."""
        args = self.args
        prompts, batches = self.sample(iteration)  # N prompts, N * G images in batches
        rewards = self.score(prompts, batches)  # [N, G]
        advantages = group_advantages(rewards, args.global_std, args.advantage_clip)
        metrics = self.update(iteration, batches, advantages.flatten().to(args.device))
        equal = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
        line = dict(iteration=iteration, images=iteration * rewards.numel())
        line |= dict(reward_mean=rewards.mean().item(), reward_std=rewards.std().item())
        return line | dict(groups_without_spread=equal) | metrics

    def sample(self, iteration):
        """Sample G images for each of N prompts: (prompts, Rollouts). Prompts vary the slowest."""
        args, policy = self.args, self.policy(self.args.steps)
        N, G, S = args.prompts_per_iteration, args.group_size, args.stochastic_steps
        # seeded by the iteration, so that a resumed run draws the same numbers
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
        chosen = torch.randperm(len(self.task.prompts), generator=generator)[:N]
        prompts = [self.task.prompts[i] for i in chosen]
        # S is small, since each trained step costs a forward and a backward pass in the update
        low, high = map(int, args.stochastic_range.split("-"))
        first = torch.randint(low, high - S + 2, (1,), generator=generator).item()
        steps = range(first, first + S)
        recorded_steps = () if args.allocation == "uniform" else steps
        noise = torch.randn(N if args.same_noise else N * G, *self.shape, generator=generator)
        noise = noise.repeat_interleave(N * G // len(noise), 0).to(args.device)
        batches = [*self.rollouts(policy, noise, prompts, steps, generator, recorded_steps)]
        if self.reference:  # after the rollouts, so that its weights move to the device once
            with self.with_weights(self.reference), torch.no_grad(), self.autocast:
                for batch in batches:
                    batch.reference_means = [
                        policy.distribution(batch.latents[:, k], k, batch.prompt)[0] for k in steps
                    ]
        return prompts, batches

    def rollouts(self, policy, noise, prompts, steps=(), generator=None, recorded_steps=()):
        """Rollouts in batches; each prompt has as many images as there is noise for."""
        each_has, inputs = len(noise) // len(prompts), self.encode_prompts(prompts)
        inputs = (noise, *(each.repeat_interleave(each_has, 0) for each in inputs))
        for x, *prompt, core in zip(*(each.split(self.args.batch_size) for each in inputs)):
            with self.autocast:
                batch = rollout(policy, x, prompt, steps, generator, recorded_steps, core)
            yield batch

    def score(self, prompts, batches):
        """The reward of each image: [N, G]."""
        images = [image for batch in batches for image in decode(self.pipe, batch.latents[:, -1])]
        G = self.args.group_size
        prompts = [prompt for prompt in prompts for _ in range(G)]
        return tasks.scores(self.task, images, prompts, self.args.device).view(-1, G)

    def allocation(self, batch):
        """How the advantage of each image is allocated: weights [B, S, H, W]."""
        if self.args.allocation == "uniform":
            return torch.ones_like(batch.log_prob)
        return allocation_weights(batch.maps, self.shape[1:], self.args.allocation, self.args.lam)

    def update(self, iteration, batches, advantages):
        """Make the actions behind the better images more likely. Advantages [N * G] -> metrics."""
        args, policy, metrics = self.args, self.policy(self.args.steps), defaultdict(list)
        pairs = list(zip(batches, advantages.split(args.batch_size)))
        size = len(pairs) // args.updates_per_iteration
        for number in range(args.updates_per_iteration):
            for batch, A in pairs[number * size : (number + 1) * size]:
                weights = self.allocation(batch)
                metrics["weight_peak"].append(weights.amax((-2, -1)).mean())
                for j, k in enumerate(batch.steps if A.any() else ()):  # else there is no gradient
                    with self.autocast:
                        mean, std = policy.distribution(batch.latents[:, k], k, batch.prompt)
                    # the rollout kept no graph: how likely is the action that was taken, now?
                    new = position_log_prob(batch.latents[:, k + 1], mean, std)
                    old = batch.log_prob[:, j]
                    metrics["ratio_mean"].append((new.detach() - old).exp().mean())
                    if number == 0:  # The model is still that of the rollout. So the ratio is 1,
                        old = new.detach()  # but compiled code rounds differently there.
                    loss, _, clipped = star_loss(new, old, A, weights[:, j], args.clip_range)
                    metrics["clip_fraction"].append(clipped.float().mean())
                    if self.reference:
                        kl = kl_to_reference(mean, batch.reference_means[j], std).mean((-2, -1))
                        metrics["kl"].append(kl.detach().mean())
                        loss = loss + args.kl_weight * (kl * (A != 0)).mean()  # no KL if A is 0
                    (loss / (size * len(batch.steps))).backward()  # per step: needs less memory
            norm = torch.nn.utils.clip_grad_norm_(self.weights, args.max_gradient_norm)
            require(norm.isfinite(), "the gradient is not finite; use a lower --learning-rate")
            metrics["gradient_norm"].append(norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema:
                done = (iteration - 1) * args.updates_per_iteration + number
                update_ema(self.ema, self.weights, args.ema_decay, done)
        return {name: torch.stack(values).mean().item() for name, values in metrics.items()}

    def __init__(self, args, task):
        self.args, self.task = args, task
        home = "cpu" if args.offload else args.device  # of what is not trained
        for each in task, *task.monitors:
            tasks.load(each, args.device, home)
        frozen = torch.bfloat16 if args.bfloat16 else torch.float32
        self.pipe = pipe = load_pipeline(args.model, args.t5, home, frozen)
        pipe.vae.to(args.device).requires_grad_(False)
        pipe.vae.enable_slicing()  # decode one image at a time
        self.transformer = pipe.transformer.to(args.device)
        self.weights = list(self.transformer.parameters())
        self.reference = self.ema = None  # the starting weights, and the EMA: lists like `weights`
        if args.kl_weight > 0:  # a file of this dtype is mapped: it takes no main memory
            start = load_part(args.model, "transformer", home, frozen)
            self.reference = [weight.data for weight in start.parameters()]
        if args.ema_decay > 0:
            self.ema = [weight.data.to(home, copy=True) for weight in self.weights]
        if args.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        side = (args.height or 0) // pipe.vae_scale_factor or pipe.default_sample_size
        self.shape = self.transformer.config.in_channels, side, side
        # without its cache (False), which would keep bfloat16 copies of the weights
        self.autocast = torch.autocast(args.device, torch.bfloat16, args.bfloat16, False)
        with naming(f"--model {args.model}: its parts do not fit together"):
            self.empty_prompt = encode(pipe, [""], args.max_sequence_length)
            self.generate(task.prompts[:1])
        if args.compile and any(map(shutil.which, ("gcc", "clang"))):
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # see AttentionAllocator
            torch._dynamo.config.cache_size_limit = 64  # with and without hooks, gradients, ...
            for block in self.transformer.transformer_blocks:
                block.compile()
        kind, options = torch.optim.AdamW, dict(fused=args.device == "cuda")
        if args.optimizer == "adafactor":  # 1e-18: small gradients count; 1: steps like AdamW's
            kind, options = torch.optim.Adafactor, dict(eps=(1e-18, 1.0))
        options |= dict(lr=args.learning_rate, weight_decay=args.weight_decay)
        self.optimizer = kind(self.weights, **options)

    def policy(self, steps):
        self.pipe.scheduler.set_timesteps(steps)
        sigmas, guidance = self.pipe.scheduler.sigmas.tolist(), self.args.guidance_scale
        return Policy(self.transformer, sigmas, self.args.noise_level, guidance, self.empty_prompt)

    def with_weights(self, values):
        """The transformer with the reference or the EMA for weights, within the block."""
        return replaced(self.weights, [value.to(self.args.device) for value in values])

    def encode_prompts(self, prompts):
        """Prompts -> (context [B, L, features], pooled [B, features], core tokens [B, L])."""
        spans, length = tasks.core_spans(self.task, prompts), self.args.max_sequence_length
        core = core_tokens_of(self.pipe, prompts, spans, length).to(self.args.device)
        return *encode(self.pipe, prompts, length), core

    def generate(self, prompts):
        """One image per prompt, deterministic, from the same noise every time."""
        policy, device = self.policy(self.args.evaluation_steps), self.args.device
        generator, images = torch.Generator().manual_seed(self.args.seed), []
        noise = torch.randn(len(prompts), *self.shape, generator=generator).to(device)
        with self.with_weights(self.ema) if self.ema else nullcontext():
            for batch in self.rollouts(policy, noise, prompts):
                images += decode(self.pipe, batch.latents[:, -1])
        return images

    def evaluate(self, prompts):
        """One image per prompt: (metrics, images, rewards)."""
        images = self.generate(prompts)
        rewards, report = tasks.evaluate(self.task, images, prompts, self.args.device)
        return {"heldout_reward": rewards.mean().item(), "report": report}, images, rewards

    def tensors(self):
        """All that training changes, by name: weights, the EMA, the optimizer's state."""
        tensors = dict(self.transformer.named_parameters())
        tensors |= {f"ema.{i}": average for i, average in enumerate(self.ema or [])}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        return tensors

    def save(self, folder, settings, history, size=100):
        """Write a checkpoint, `size` tensors per file, which are copied to main memory first."""
        tensors = list(self.tensors().items())
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(dict(settings=settings, history=history)))
        for i in range(0, len(tensors), size):
            save_file(dict(tensors[i : i + size]), folder / f"{i}.safetensors")
        checksums = {file.name: zlib.crc32(file.read_bytes()) for file in folder.iterdir()}
        (folder / "checksums.json").write_text(json.dumps(checksums))

    @torch.no_grad()
    def load(self, folder):
        """Continue from a checkpoint; returns the metrics so far."""
        stored, state = {}, defaultdict(dict)
        with naming(f"checkpoint {folder}"):
            for name, crc in json.loads((folder / "checksums.json").read_text()).items():
                same = zlib.crc32((folder / name).read_bytes()) == crc
                require(same, f"{folder}/{name} is damaged: its checksum is another")
                stored |= {} if name == "run.json" else load_file(folder / name)
            for name, tensor in self.tensors().items():
                tensor.copy_(stored.pop(name))
            for name, tensor in stored.items():
                _, i, key = name.split(".")
                state[int(i)][key] = tensor
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(dict(state=state, param_groups=groups))
            return json.loads((folder / "run.json").read_text())["history"]

    def save_pipeline(self, path):
        """Write the pipeline that training used: without T5 if it did without."""
        with replaced(self.weights, self.ema) if self.ema else nullcontext():
            self.pipe.save_pretrained(path, max_shard_size="2GB")  # each is copied to main memory


# ----------------------------------------------------------- Part 4: the program (skim this one)
@dataclass
class Arguments:  # comments are the text of --help; (LOW to HIGH) in them is checked
    task: str = "ocr"  # ocr, geneval, pickscore, FILE.py:CLASS or a mix: ocr:0.7,pickscore:0.3
    model: str = tasks.MODEL  # folder or hub name of an SD3; may change defaults (FULL_SIZE)
    reward_model: str = None  # models for the reward: commas within a task, semicolons between
    prompts: str = None  # file with one training prompt per line; each task has its own
    heldout_prompts: str = None  # the same for evaluation
    out: str = None  # output folder; runs/TASK-ALLOCATION-SEED if not given
    resume: bool = False  # continue the run in the output folder
    seed: int = 0  # seed of prompts and noise (0 to 4294967296)
    iterations: int = 28  # iterations of sampling and updating
    evaluate_every: int = 14  # iterations between evaluations
    evaluation_prompts: int = 96  # held-out prompts per evaluation, one image each
    monitor: str = "pickscore,signs"  # tasks whose rewards are logged, but not trained
    save_every: int = 10  # iterations between checkpoints
    allocation: Literal["uniform", "spatial", "spatiotemporal"] = "spatiotemporal"  # of advantages
    lam: float = 0.5  # strength of the allocation; 0 is uniform (0 to 1)
    prompts_per_iteration: int = 3  # N, prompts per iteration
    group_size: int = 8  # G, images per prompt (2 to 1000000)
    batch_size: int = 24  # images per forward pass; times updates it must divide N * G
    height: int = None  # height and width in pixels; as the model was trained if not given
    steps: int = 10  # T, denoising steps in training
    evaluation_steps: int = 10  # denoising steps in evaluation
    stochastic_steps: int = 3  # S, consecutive steps that are stochastic and trained
    stochastic_range: str = "0-3"  # first and last step that may be stochastic
    noise_level: float = 0.7  # a, noise of a stochastic step (0.001 to 10)
    guidance_scale: float = 1.0  # classifier-free guidance, in training too; 1 is none
    same_noise: bool = True  # start all images of a group from the same noise
    t5: bool = True  # use the third and largest text encoder
    max_sequence_length: int = 20  # T5 tokens per prompt
    updates_per_iteration: int = 1  # optimizer steps; from the second on, ratios leave 1
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor needs almost no memory
    learning_rate: float = 4e-4  # of the optimizer (1e-12 to 1)
    weight_decay: float = 1e-4  # of the optimizer
    max_gradient_norm: float = 1.0  # clip gradients to this norm (1e-9 to 1e9)
    clip_range: float = 2e-2  # eps, how far a ratio may leave 1 (1e-9 to 1)
    advantage_clip: float = 5.0  # limit of advantages, to both sides (1e-9 to 1000000)
    global_std: bool = False  # divide advantages by the std of all rewards, not of the group
    kl_weight: float = 0.0  # beta, KL penalty towards the starting weights; 0 is none
    ema_decay: float = 0.8  # decay of the weights' moving average; 0 is none (0 to 0.999999)
    device: Literal["cpu", "cuda"] = "cuda" if GPU else "cpu"  # device
    bfloat16: bool = GPU  # bfloat16; the trained weights stay float32
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    compile: bool = False  # compile the blocks, if there is a C compiler: faster, slow to start
    offload: bool = False  # move frozen models and the EMA to the GPU only for their use
    low_memory: bool = False  # other defaults for a small GPU (LOW_MEMORY)


HELP = dict(re.findall(r"    (\w+): .* = .*  # (.*)", inspect.getsource(Arguments)))
# fmt: off
# For the miniature; study/RESULTS.md has the runs behind them.
OTHER = dict(monitor="", learning_rate=2e-4, ema_decay=0.0)  # also for a task of your own
MINIATURE = dict(
    ocr={},
    geneval=OTHER | dict(prompts_per_iteration=6, batch_size=48, iterations=30, evaluate_every=15,
        evaluation_prompts=120, monitor="pickscore", learning_rate=3e-4, same_noise=False),
    pickscore=OTHER | dict(prompts_per_iteration=6, batch_size=48, iterations=16, evaluate_every=8,
        learning_rate=4e-4),
)
# For SD3 and SD3.5, Medium and Large, on one GPU. [F]: as in Flow-GRPO. The others are untuned.
FULL_SIZE = OTHER | dict(
    height=512, evaluation_steps=40, guidance_scale=4.5, max_sequence_length=128,     # [F]
    group_size=24, same_noise=False, global_std=True,                                 # [F]
    stochastic_range="0-4",     # [F] fast variant: a window of 3 steps in the first half
    clip_range=6e-3,            # [F] 1e-4 for one ratio per image and step: see star_loss
    learning_rate=1e-5,         # [F] 3e-4 for LoRA; training all parameters needs far less
    ema_decay=0.99,             # [F] 0.9 after every eighth update, about the same
    kl_weight=0.04 * 0.058,     # [F] divides by s^2, we by std^2 = s^2 * -dt: mean -dt is 0.058
    gradient_checkpointing=True, prompts_per_iteration=8, batch_size=8,
    iterations=500, evaluate_every=20, save_every=20,
)
FULL_SIZE_PICKSCORE = FULL_SIZE | dict(kl_weight=0.01 * 0.058)                        # [F]
LOW_MEMORY = dict(batch_size=1, gradient_checkpointing=True, optimizer="adafactor", offload=True)
# fmt: on


def parse_arguments(argv=None):
    """The arguments and the task, checked before anything heavy is loaded."""
    style = argparse.ArgumentDefaultsHelpFormatter
    usage = "python star.py --task ocr [--option ...]"
    parser = argparse.ArgumentParser(usage=usage, formatter_class=style)
    for each in fields(Arguments):
        options = dict(type=each.type)
        if each.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif hasattr(each.type, "__args__"):  # a Literal
            options = dict(choices=each.type.__args__)
        options |= dict(default=each.default, help=HELP[each.name])
        parser.add_argument(f"--{each.name.replace('_', '-')}", **options)
    args = parser.parse_args(argv)
    pipe, full_size, heights, configs = open_pipeline(args.model)
    name = re.split("[:,]", args.task)[0]
    defaults = MINIATURE.get(name, OTHER)
    if full_size:
        defaults = FULL_SIZE_PICKSCORE if name == "pickscore" else FULL_SIZE
    if full_size and args.device == "cuda" and GPU:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30  # for SD3.5 Medium:
        fast = dict(compile=True, offload=memory < 70, gradient_checkpointing=memory < 110)
        defaults = defaults | fast
    parser.set_defaults(**defaults | (LOW_MEMORY if args.low_memory else {}))
    args = Arguments(**vars(parser.parse_args(argv)))
    for name, value in asdict(args).items():
        if type(value) in (int, float):  # a bool is neither
            bounds = HELP[name] + f"({int(type(value) is int)} to 1000000)"
            low, high = re.findall(r"\((\S+) to (\S+)\)", bounds)[0]
            wanted = f"--{name.replace('_', '-')} is {value}; use a number from {low} to {high}"
            require(float(low) <= value <= float(high), wanted)
    images = args.prompts_per_iteration * args.group_size
    update = args.batch_size * args.updates_per_iteration
    bad = f"{images} images (--prompts-per-iteration x --group-size), not a multiple of {update}"
    require(images % update == 0, f"{bad} (--batch-size x --updates-per-iteration)")
    with naming(f"--stochastic-range {args.stochastic_range} must be FIRST-LAST"):
        first, last = map(int, args.stochastic_range.split("-"))
    inside = 0 <= first <= last - args.stochastic_steps + 1 and last < args.steps
    window = f"--stochastic-range {args.stochastic_range} must lie within --steps {args.steps}"
    require(inside, f"{window} and hold --stochastic-steps {args.stochastic_steps}")
    sizes = f"this model takes multiples of {heights.step} up to {heights[-1]}"
    require(args.height in (None, *heights), f"--height is {args.height}; {sizes}")
    files = args.prompts, args.heldout_prompts
    task = tasks.make_task(args.task, *files, args.reward_model, full_size, args.monitor)
    few = f"{len(task.prompts)} training and {len(task.heldout_prompts)} held-out prompts: too few"
    enough = len(task.prompts) >= args.prompts_per_iteration and task.heldout_prompts
    require(enough, f"{few} for --prompts-per-iteration {args.prompts_per_iteration}")
    require(pipe.tokenizer_3 or not args.t5, f"--model {args.model} has no T5; use --no-t5")
    spans = tasks.core_spans(task, task.prompts)
    if args.allocation != "uniform":
        with naming(f"--model {args.model}: a tokenizer fails"):
            core = core_tokens_of(pipe, task.prompts, spans, args.max_sequence_length)
        core = core.any(1).tolist()
        lost = f"{core.count(0)} of {len(core)} prompts have no core words within the token limit"
        require(2 * sum(core) >= len(core), f"{lost}; change them or use --allocation uniform")
        if not all(core):
            print(f"{lost}: these train as with --allocation uniform")
    contents = task.prompts, task.heldout_prompts, configs, inspect.getsource(type(task))
    task.checksum = zlib.crc32(json.dumps(contents).encode())
    return args, task


def open_pipeline(name):
    """(pipeline without weights, is it full-size?, heights in pixels, configurations)."""
    model = f"--model {name}"
    with naming(f"{model} (a gated model needs `hf auth login`)"):
        index, absent = Pipeline.load_config(name), []
        for part in *WEIGHTS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3":
            found, wanted = (index.get(part) or [None])[-1], KINDS[part].__name__
            absent += [part] * (part in WITHOUT_T5 and not found)
            same = f"{found}".startswith(wanted) or part in absent  # tokenizers may end with Fast
            require(same, f"{model}: its {part} is {found}, but must be {wanted}")
        pipe = Pipeline.from_pretrained(name, **dict.fromkeys([*WEIGHTS, *absent]))
        tasks.check_tokenizers(model, 10**6, pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)
        pipe.scheduler.set_timesteps(10)
        sigmas, wrong = pipe.scheduler.sigmas, f"{model}: its scheduler's sigmas do not fall from 1"
        require(sigmas[0] > 0.999 and (sigmas.diff() < 0).all(), f"{wrong}: {sigmas.tolist()}")
        config, vae = (KINDS[part].load_config(name, subfolder=part) for part in WEIGHTS[:2])
        unit = config["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)  # pixels per token
        heights = range(unit, config["pos_embed_max_size"] * unit + 1, unit)
        return pipe, config["sample_size"] >= 64, heights, (config, vae, pipe.scheduler.config)


MAY_CHANGE = """resume out iterations device compile offload gradient_checkpointing
    model prompts heldout_prompts""".split()  # a checksum stands for the last three


def open_folder(args, settings):
    """The output folder of a new run or one with the same settings; [its newest checkpoint]."""
    name = re.sub(r"[^\w.]+", "-", f"{args.task}-{args.allocation}-{args.seed}")
    folder = Path(args.out or f"runs/{name}")
    with naming(f"--out {folder}"):  # fails now rather than after minutes of loading
        newest = checkpoints(folder)[-1:]
        held = newest or [*folder.glob("metrics.jsonl"), *folder.glob("pipeline")]
        require(args.resume or not held, f"{folder} holds a run: use --resume or another --out")
        require(newest or not args.resume, f"{folder} holds no checkpoint: use another --out")
        for path in newest:
            with naming(path):
                old = json.loads((path / "run.json").read_text())["settings"]
            kept = settings.keys() - MAY_CHANGE
            changed = {name: old.get(name) for name in kept if old.get(name) != settings[name]}
            require(not changed, f"{folder} was run with other settings: {changed}")
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        partial = [*folder.glob(tasks.PARTIALS), *folder.glob(f"checkpoint/{tasks.PARTIALS}")]
        for left in partial + checkpoints(folder)[:-1]:  # by a run that was killed
            shutil.rmtree(left)
        return folder, newest


def checkpoints(folder):
    """The checkpoints of a run, checkpoint/ITERATION, the newest last."""
    paths = [path for path in folder.glob("checkpoint/*") if path.name.isdigit()]
    return sorted(paths, key=lambda path: int(path.name))


def draw_samples(images, rewards, prompts, side=144):
    tiles = []
    for image, reward, prompt in zip(images[:8], rewards, prompts):
        tiles.append(ImageOps.expand(image.resize((side, side), Image.BOX), (6, 6, 6, 78), "white"))
        caption = textwrap.fill(f"{reward:.2f}: {prompt}", side // 6)
        ImageDraw.Draw(tiles[-1]).multiline_text((6, side + 8), caption, "black", font_size=12)
    return make_image_grid(tiles, 1, len(tiles))


def train(trainer, settings, history, folder):
    """Iterate, evaluate and save until the last iteration."""
    args = trainer.args
    heldout = tasks.evenly_spaced(trainer.task.heldout_prompts, args.evaluation_prompts)
    if not args.resume:  # also claims the folder, if another process has just begun there
        write(folder / "checkpoint/0", trainer.save, settings, history, new=True)
    for iteration in tqdm(range(len(history), args.iterations + 1), args.task):
        last = iteration == args.iterations
        history.append(trainer.iterate(iteration) if iteration else {"iteration": 0, "images": 0})
        if iteration % args.evaluate_every == 0 or last:
            metrics, images, rewards = trainer.evaluate(heldout)
            history[-1] |= metrics
            write(folder / f"samples-{iteration}.png", draw_samples(images, rewards, heldout).save)
            best = max(history[::-1], key=lambda line: line.get("heldout_reward", -1e9))
            if best is history[-1]:
                write(folder / "pipeline", trainer.save_pipeline)
            report = {"held-out reward": metrics["heldout_reward"]} | metrics["report"]
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in report.items())
            tqdm.write(f"{history[-1]['images']} images: {numbers} (best: {best['images']} images)")
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write(folder / "metrics.jsonl", Path.write_text, lines)
        if iteration and (iteration % args.save_every == 0 or last):
            write(folder / f"checkpoint/{iteration}", trainer.save, settings, history, new=True)
            for older in checkpoints(folder)[:-1]:
                shutil.rmtree(older)
    print(f"samples-*.png, metrics.jsonl and the pipeline of the best evaluation are in {folder}")


def main(argv=None):
    """Train, and end with one sentence where the user, the disk or the memory is at fault."""
    folder = None
    try:
        args, task = parse_arguments(argv)
        settings = asdict(args) | {"checksum of prompts, model and task": task.checksum}
        out, newest = open_folder(args, settings)
        trainer = Trainer(args, task)
        history = trainer.load(*newest) if newest else []
        folder = out  # from here on it can be resumed
        train(trainer, settings, history, folder)
    except (torch.OutOfMemoryError, KeyboardInterrupt, UserError) as error:
        memory = "out of GPU memory; try --low-memory, --no-t5 or a smaller --batch-size"
        said = memory if isinstance(error, torch.OutOfMemoryError) else error
        if folder and checkpoints(folder):
            said = f"{said}; --resume goes on from {folder}/checkpoint, other options need --out"
        sys.exit(f"star.py: {said}")


def stop(*signal_and_frame):
    """End as Ctrl-C does, but only once: a second signal must not interrupt the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt("interrupted")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    main()
