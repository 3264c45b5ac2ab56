"""What must be true of STAR, checked on closed forms and on the trained miniature.

Tests with a number hold nine facts:

1. Weights have mean 1.
2. Without allocation the gradient is that of Flow-GRPO.
3. The hook changes nothing.
4. The map is the attention's own softmax.
5. Log-probability and KL are those of the normal distribution.
6. The stochastic sampler keeps the distribution. Without noise it is the sampler of diffusers.
7. The first ratio is 1.
8. Advantages have mean 0.
9. A run that was killed and resumed is the same run.
"""

import copy
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network

import diffusers
import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import rewards
import star
from rewards import OCR, PickScore, make_task, quoted_span
from star import AttentionAllocator, allocation_weights, position_log_prob, sde_step, star_loss

sys.path.insert(0, str(Path(__file__).parent / "tiny"))
import build  # the world that the miniatures were trained on

os.chdir(Path(__file__).parent)  # names such as tiny/sd3 start here
PROMPTS = ['a blue wall with a white sign "K7Q" and a red ball', 'a green wall, a pink sign "2FX"']
SPANS = [quoted_span(prompt) for prompt in PROMPTS]
SIZE = (16, 16)  # of the miniature's latents


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pipe():
    return diffusers.StableDiffusion3Pipeline.from_pretrained("tiny/sd3")


def trainer_of(options):
    args = star.parse_arguments(options.split())
    return star.Trainer(args, make_task(args))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


def gradient(model):
    return flat(weight.grad for weight in model.parameters())


def difference(ours, theirs):
    """|ours - theirs| / |theirs|"""
    return ((ours - theirs).norm() / theirs.norm()).item()


class Scene:
    """Two prompts, noise for two images, and a policy of six steps."""

    steps = [1, 2, 4]  # the stochastic ones

    def __init__(self, pipe, guidance_scale=1.0):
        pipe.scheduler.set_timesteps(6)
        self.transformer = pipe.transformer
        self.noise = torch.randn(2, 8, 16, 16, generator=torch.manual_seed(0))
        self.prompt = star.encode(pipe, PROMPTS, build.TOKENS)
        spans = [SPANS[0], [(2, 7)]]  # K7Q, and green
        self.core = star.core_tokens_of(pipe, PROMPTS, spans, build.TOKENS)
        self.policy = star.Policy(
            transformer=pipe.transformer,
            sigmas=pipe.scheduler.sigmas.tolist(),
            noise_level=0.7,
            guidance_scale=guidance_scale,
            empty_prompt=star.encode(pipe, [""], build.TOKENS),
        )

    def velocity(self, k=2):
        return self.policy.velocity(self.noise, k, self.prompt)

    def rollout(self, recorded=(1, 2, 4)):
        generator = torch.manual_seed(1)
        return star.rollout(
            self.policy, self.noise, self.prompt, self.steps, generator, recorded, self.core
        )

    def log_prob(self, samples):
        return log_prob(self.policy, samples, self.steps)

    @torch.no_grad()
    def map(self, latents, k, core, blocks=None):
        allocator = AttentionAllocator(self.transformer, core, blocks)
        self.policy.velocity(latents, k, self.prompt, allocator)
        return allocator.map()


def log_prob(policy, samples, steps):
    """The log-probabilities of a rollout, computed anew: [B, S, H, W]."""
    log_probs = []
    for k in steps:
        mean, std = policy.distribution(samples.latents[k], k, samples.prompt)
        log_probs.append(position_log_prob(samples.latents[k + 1], mean, std))
    return torch.stack(log_probs, dim=1)


def code_block(file, language, holds):
    """The one code block of this language that holds this text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", Path(file).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if holds in block]
    return block


def change(file, **fields):
    """Other values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# --------------------------------------------------------------------------------- The nine points
@pytest.mark.parametrize("allocation, over", [("spatial", (2, 3)), ("spatiotemporal", (1, 2, 3))])
def test_1_weights_have_mean_one(allocation, over):
    maps = torch.rand(3, 4, 8, 8) ** 4
    maps *= torch.logspace(-6, 0, 3)[:, None, None, None]
    patches = maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    relative = patches / maps.mean(over, keepdim=True)
    for lam in [0.0, 0.3, 1.0]:
        weights = allocation_weights(maps, SIZE, allocation, lam)
        assert_close(weights, 1 - lam + lam * relative)
        assert weights.min() >= 0
        assert (weights.mean(over) - 1).abs().max() < 1e-5
        half = allocation_weights(maps.bfloat16(), SIZE, allocation, lam)
        assert (half.mean(over) - 1).abs().max() < 1e-5


def test_1_weights_without_core_words_are_one_and_nan_stays_visible():
    maps = torch.rand(2, 4, 8, 8)
    maps[0] = 0
    maps[1, 2, 3, 4] = math.nan
    without, broken = allocation_weights(maps, SIZE)
    assert (without == 1).all()
    assert broken[2].isnan().any()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_2_without_allocation_the_gradient_is_that_of_flow_grpo(pipe, guidance_scale):
    """With lam = 0 the first gradient is that of Flow-GRPO's objective, which has a ratio per image
    and step. With guidance no gradient flows through the unconditional half. With lam = 1 the
    gradient is another."""
    scene = Scene(pipe, guidance_scale)
    samples = scene.rollout()
    maps = torch.stack(samples.maps, dim=1)
    advantages = torch.tensor([0.8, -1.3])

    def gradient_of_star(lam):
        scene.transformer.zero_grad()
        new = scene.log_prob(samples)
        weights = allocation_weights(maps, SIZE, lam=lam)
        loss, _, _ = star_loss(new, new.detach(), advantages, weights, 1e-2)
        loss.backward()
        return gradient(scene.transformer)

    without_guidance = replace(scene.policy, guidance_scale=1)
    context, pooled = scene.policy.empty_prompt
    empty_prompt = (context.expand(2, -1, -1), pooled.expand(2, -1))
    sigmas = scene.policy.sigmas
    objective = 0.0
    for k in scene.steps:
        latents = samples.latents[k]
        conditional = without_guidance.velocity(latents, k, scene.prompt)
        unconditional = without_guidance.velocity(latents, k, empty_prompt).detach()
        velocity = unconditional + guidance_scale * (conditional - unconditional)
        mean, std = sde_step(latents, velocity, sigmas[k], sigmas[k + 1], sigmas[1], 0.7)
        new = Normal(mean, std).log_prob(samples.latents[k + 1]).mean((1, 2, 3))
        ratio = (new - new.detach()).exp()
        objective = objective + (ratio * advantages).mean() / 3
    scene.transformer.zero_grad()
    (-objective).backward()
    flow_grpo = gradient(scene.transformer)
    assert difference(gradient_of_star(lam=0.0), flow_grpo) < 1e-5
    assert F.cosine_similarity(gradient_of_star(lam=1.0), flow_grpo, dim=0) < 0.95


def test_3_the_hook_changes_nothing(pipe):
    """Outputs and gradients are equal to the last bit, in sampling and in training."""
    scene = Scene(pipe)

    def results():
        scene.transformer.zero_grad()
        with torch.no_grad():
            sampled = scene.velocity()
        trained = scene.velocity()
        trained.square().mean().backward()
        return sampled, trained, gradient(scene.transformer)

    plain = results()
    allocator = AttentionAllocator(scene.transformer, scene.core, range(4))
    for _ in range(2):  # a second use starts anew
        with allocator:
            for hooked, unhooked in zip(results(), plain):
                assert torch.equal(hooked, unhooked)
        assert len(allocator.recorded) == 8
        assert not allocator.map().requires_grad


def test_3_no_hook_is_left_behind(pipe):
    """Errors and a second entry leave none, either."""
    scene = Scene(pipe)
    allocator = AttentionAllocator(scene.transformer, scene.core)
    with pytest.raises(ZeroDivisionError), allocator, allocator:
        raise ZeroDivisionError
    too_many = scene.core[:1].repeat(3, 1)
    with pytest.raises(ValueError, match=r"\[3, 40\], but there are 2 images and 40 text tokens"):
        scene.map(scene.noise, 0, too_many)
    too_short = scene.core[:, :30]
    with pytest.raises(ValueError, match=r"\[2, 30\], but there are 2 images and 40 text tokens"):
        scene.map(scene.noise, 0, too_short)
    for module in scene.transformer.modules():
        assert not module._forward_pre_hooks


def record_softmax(monkeypatch):
    """A list that fills with the softmax of Q K^T over all keys, whenever attention is computed."""
    found = []
    fused = F.scaled_dot_product_attention

    def in_full(query, key, value, attn_mask=None, **options):
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        found.append(scores.softmax(-1))
        return fused(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", in_full)
    return found


def core_share(probabilities, core):
    """Of [B, heads, image tokens, L] for each block: the map [B, image tokens] of core tokens."""
    on_core = torch.stack(probabilities) * core[:, None, None]
    return on_core.sum(-1).mean((0, 2))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("blocks", [None, [0, 2], "SD3 Medium"])  # 0 has dual attention
def test_4_map_is_the_brute_force_map(pipe, blocks, guidance_scale, monkeypatch):
    """Against the full softmax of Q K^T over [image; text] of the blocks' own Q and K."""
    scene = Scene(pipe, guidance_scale)
    if blocks == "SD3 Medium":  # its attention has neither norms nor a second part
        config = dict(pipe.transformer.config)
        config["qk_norm"] = None
        config["dual_attention_layers"] = ()
        scene.transformer = diffusers.SD3Transformer2DModel.from_config(config)
        scene.transformer.transformer_blocks[1].attn.to_q.weight.data *= 50  # else maps are even
        scene.policy.transformer = scene.transformer
        blocks = [1]
    found = record_softmax(monkeypatch)
    scene.velocity()
    monkeypatch.undo()
    joint = []  # those of the conditional half come first; dual attention is 64 x 64
    for softmax in found:
        if softmax.shape[-1] == 64 + 40:
            joint.append(softmax[:, :, :64, 64:])  # 64 image, 20 CLIP and 20 T5 tokens
    expected = core_share([joint[block] for block in blocks or [3]], scene.core)
    found = scene.map(scene.noise, 2, scene.core, blocks)
    assert_close(found, expected)
    assert found.std() > 1e-3


def test_4_rollout_keeps_the_map_of_each_step(pipe):
    """The maps are those of the recorded steps."""
    scene = Scene(pipe, guidance_scale=3.0)
    for recorded in [[1, 2, 4], range(6)]:
        samples = scene.rollout(recorded)
        for k, maps in zip(recorded, samples.maps, strict=True):
            expected = scene.map(samples.latents[k], k, scene.core)
            assert torch.equal(maps.flatten(1), expected)


@pytest.mark.parametrize("std", [0.37, torch.tensor([0.2, 0.37, 1.5]).view(3, 1, 1, 1)])
def test_5_log_prob_and_kl_are_those_of_the_normal_distribution(std):
    """The mean over positions is Flow-GRPO's log_prob. std may be one value per image."""
    sample, mean = torch.randn(2, 3, 8, 4, 4)
    found = position_log_prob(sample, mean, std)
    expected = Normal(mean, std).log_prob(sample)
    assert_close(found, expected.mean(1))
    assert_close(found.mean((1, 2)), expected.mean((1, 2, 3)))
    other = torch.randn(3, 8, 4, 4)
    kl = kl_divergence(Normal(mean, std), Normal(other, std))
    assert_close(star.kl_to_reference(mean, other, std), kl.mean(1))


def test_6_sde_keeps_the_marginals():
    """Gaussian data N(m, d^2): the velocity is known, and both samplers must end in N(m, d^2)."""
    m, d = 0.6, 0.5
    sigmas = torch.linspace(1, 0, 401).tolist()
    start = torch.randn(20_000, 1, 1, 1)
    ends = []
    for noise_level in [0.0, 0.7]:
        x = start
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):
            variance = (1 - sigma) ** 2 * d**2 + sigma**2
            slope = (sigma - (1 - sigma) * d**2) / variance  # E[noise - data | x] is linear in x
            velocity = -m + slope * (x - (1 - sigma) * m)
            mean, std = sde_step(x, velocity, sigma, sigma_next, sigmas[1], noise_level)
            x = mean + std * torch.randn(x.shape)
        ends.append(x)
        # within four standard errors, and the error of steps that are not small enough
        assert x.mean().item() == pytest.approx(m, abs=0.014 + 0.002)
        assert x.var().item() == pytest.approx(d**2, abs=0.01 + 0.004)
    assert (ends[0] - ends[1]).abs().mean() > 0.1  # the stochastic sampler is one


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_6_without_noise_the_rollout_is_that_of_diffusers(pipe, guidance_scale):
    """The same Euler steps, the same guidance, and the same decoded images."""
    scene = Scene(pipe, guidance_scale)
    scene.steps = []
    samples = scene.rollout(recorded=[])
    theirs = pipe(
        PROMPTS,
        latents=scene.noise,
        guidance_scale=guidance_scale,
        num_inference_steps=6,
        max_sequence_length=build.TOKENS,
    )
    assert_same_images(star.decode(pipe, samples.latents[-1]), theirs.images)


def assert_same_images(ours, theirs):
    """Up to one shade of 256, by which rounding may differ."""
    for image, expected in zip(ours, theirs, strict=True):
        shades = numpy.int16(image) - numpy.int16(expected)
        assert abs(shades).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_7_first_ratio_is_one(pipe, guidance_scale):
    """Exactly in float32, within 1e-3 in bfloat16."""
    scene = Scene(pipe, guidance_scale)
    samples = scene.rollout()
    assert torch.equal(scene.log_prob(samples), torch.stack(samples.log_probs, dim=1))
    with torch.autocast("cpu", torch.bfloat16):
        half = scene.rollout()
        log_ratio = scene.log_prob(half) - torch.stack(half.log_probs, dim=1)
    assert (log_ratio.exp() - 1).abs().max() < 1e-3
    assert not torch.equal(half.latents[-1], samples.latents[-1])


@pytest.mark.parametrize("global_std", [False, True])
def test_8_advantages(global_std):
    """Mean 0 in each group, and 0 where all rewards are equal, also if their mean is rounded."""
    rewards = torch.rand(5, 6)
    rewards[2] = 0.6
    advantages = star.group_advantages(rewards, global_std)
    assert advantages.mean(1).abs().max() < 1e-5
    assert (advantages[2] == 0).all()
    compared = rewards if global_std else rewards[0]
    std = compared.std(unbiased=False)
    assert_close(advantages[0], (rewards[0] - rewards[0].mean()) / (std + 1e-4))


# -------------------------------------------------------------------------------------------- Runs
SMALL = """--iterations 3 --prompts-per-iteration 2 --group-size 4 --batch-size 4 --steps 4
    --last-stochastic-step 2 --stochastic-steps 2 --evaluate-every 1 --evaluation-prompts 2
    --evaluation-steps 4 --ema-decay 0.5 --out""".split()


def run(folder, *options):
    star.main([*SMALL, str(folder), *options])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def heldout_rewards(folder):
    return [line.get("heldout_reward") for line in metrics(folder)]


def checkpoint(folder):
    """All tensors of the newest checkpoint."""
    tensors = {}
    for file in star.checkpoints(folder)[-1].glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            tensors[f"{file.stem}.{name}"] = tensor
    return tensors


def weights_of(folder):
    """The transformer of a pipeline that was written."""
    model = diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    return dict(model.named_parameters())


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def assert_resumes_as(whole, folder, *options):
    """The run continues, or starts again. It ends with the metrics, weights, EMA and optimizer
    state of `whole`."""
    if star.checkpoints(folder):
        run(folder, "--resume", *options)
    else:
        run(folder)
    assert metrics(folder) == metrics(whole)
    assert_close(checkpoint(folder), checkpoint(whole), atol=0, rtol=0)
    names = [path.name for path in folder.iterdir()]
    assert sorted(names) == sorted(path.name for path in whole.iterdir())
    assert len(list((folder / "checkpoint").iterdir())) == 1


def test_a_run_leaves_what_it_promises(finished):
    """It leaves metrics, images, and a pipeline for plain diffusers. The pipeline has the average
    of the weights at the best evaluation. Among equal ones the last one counts."""
    assert [line["images"] for line in metrics(finished)] == [0, 8, 16, 24]
    assert heldout_rewards(finished)[0] < heldout_rewards(finished)[-1] == 1
    for path in finished.glob("samples-*.png"):
        assert Image.open(path).width > 300
    suffixes = {path.suffix for path in finished.rglob("*.*")}
    assert suffixes == {".json", ".jsonl", ".png", ".safetensors"}
    tensors = checkpoint(finished)
    start = weights_of("tiny/sd3")
    average = weights_of(finished / "pipeline")
    for name, weight in average.items():
        assert torch.equal(weight, tensors[f"ema.module.{name}"])
    name = "proj_out.weight"
    assert not torch.equal(average[name], start[name])
    assert not torch.equal(average[name], tensors[f"transformer.{name}"])


def test_a_run_that_collapses_keeps_its_best_pipeline(tmp_path):
    run(tmp_path, "--learning-rate", "1e-2")
    assert heldout_rewards(tmp_path)[0] > heldout_rewards(tmp_path)[-1]
    assert_close(weights_of(tmp_path / "pipeline"), weights_of("tiny/sd3"))


def run_and_die(folder, owner, name, call):
    """Kill -9 the process at the n-th call of a function."""
    owner = {"star": star, "Path": Path}[owner]
    original = getattr(owner, name)
    calls = []

    def deadly(*args, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, deadly)
    run(folder)


def start_process(function, *args):
    """Start a process as a fork of one that has already imported this file. That is fast. (So no
    large tensor may be made on import: the threads that it starts do not survive a fork.)"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_star"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


@pytest.mark.parametrize(
    "owner, name, call",
    [
        pytest.param("star", "star_loss", 9, id="while the weights change, after one checkpoint"),
        pytest.param("star", "save_file", 2, id="while the second checkpoint is written"),
        pytest.param("Path", "rename", 4, id="before the second checkpoint moves to its place"),
        pytest.param("star", "checkpoints", 2, id="while there are two checkpoints"),
        pytest.param("Path", "rename", 1, id="before the first pipeline moves to its place"),
    ],
)
def test_9_killed_and_resumed_is_the_same(finished, owner, name, call, tmp_path):
    process = start_process(run_and_die, tmp_path, owner, name, call)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_resumes_as(finished, tmp_path)


def test_9_interrupted_and_resumed_is_the_same(tmp_path):
    """Ctrl-C ends a run with a sentence. star.py was started from another folder."""
    longer = ["--iterations", "8"]
    run(tmp_path / "whole", *longer)
    folder = tmp_path / "run"
    command = [sys.executable, os.path.abspath("star.py"), *SMALL, str(folder), *longer]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/")
    while process.poll() is None and not star.checkpoints(folder):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("interrupted: --resume goes on from the last check")
    assert_resumes_as(tmp_path / "whole", folder, *longer)


def test_9_full_disk(finished, tmp_path, monkeypatch):
    """The second checkpoint cannot be written: one sentence, and the run goes on from the first."""
    unlimited, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = star.Trainer.save

    def save_to_full_disk(trainer, folder, about, history):
        limit = 500_000 if star.checkpoints(tmp_path) else unlimited
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            save(trainer, folder, about, history)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, most))

    monkeypatch.setattr(star.Trainer, "save", save_to_full_disk)
    with pytest.raises(SystemExit, match="checkpoint/000002 cannot be written: .*File too large"):
        run(tmp_path)
    monkeypatch.undo()
    assert_resumes_as(finished, tmp_path)


# --------------------------------------------------------------------- Loss, iteration, allocation
def test_loss_of_flow_grpo_by_hand():
    """One ratio per image: inside of the clip range, and beyond it in both directions."""
    ratios = torch.tensor([1.1, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 2.0, -1.0, 2.0, -1.0])
    log_prob = ratios.log().requires_grad_()
    loss, found, clipped = star_loss(log_prob, torch.zeros(5), advantages, torch.ones(5), 0.2)
    assert_close(loss, -torch.tensor([2.2, 1.2 * 2, -1.5, 1.0, -0.8]).mean())
    assert_close(found, ratios)
    assert clipped.tolist() == [False, True, False, False, True]
    loss.backward()
    assert_close(log_prob.grad, -torch.tensor([2.2, 0, -1.5, 1.0, 0]) / 5)


def test_loss_of_star_by_hand():
    """A ratio and a weight per position. No gradient flows through the weights."""
    ratios = torch.tensor([[1.0, 1.5], [1.5, 0.5]])
    weights = torch.tensor([[0.5, 1.5], [2.0, 0.1]], requires_grad=True)
    log_prob = ratios.log().requires_grad_()
    loss, _, clipped = star_loss(log_prob, torch.zeros(2, 2), torch.tensor([2.0, -1]), weights, 0.2)
    least = torch.tensor([[2.0, 1.2 * 2], [-1.5, -0.8]])
    assert_close(loss, -(weights * least).mean())
    assert clipped.tolist() == [[False, True], [False, True]]
    loss.backward()
    assert weights.grad is None
    assert_close(log_prob.grad, -torch.tensor([[0.5 * 2, 0], [2 * -1.5, 0]]) / 4)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("advantages", (3, 1)),
        ("advantages", (1,)),
        ("weights", (3, 1, 8)),
        ("old_log_prob", (1, 8, 8)),
        ("log_prob", (3, 1, 8, 8)),
    ],
)
def test_star_loss_refuses_what_would_broadcast(name, shape):
    inputs = {"advantages": torch.zeros(3)}
    for other in ["log_prob", "old_log_prob", "weights"]:
        inputs[other] = torch.zeros(3, 8, 8)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match="shapes must be equal"):
        star_loss(clip_range=0.1, **inputs)


def frozen_iteration(trainer, values, monkeypatch):
    """Sample, then let `iterate` use these samples and rewards: the Rollouts."""
    prompts, batches = trainer.sample(3)
    monkeypatch.setattr(trainer, "sample", lambda iteration: (prompts, batches))
    monkeypatch.setattr(trainer.task, "reward", lambda images, prompts: values)
    trainer.optimizer = torch.optim.SGD(trainer.transformer.parameters(), 10)
    return batches


def loss_of(trainer, transformer, batches, advantages, is_first_update):
    """Flow-GRPO's or STAR's loss of batches, as one mean over images, steps and positions."""
    args = trainer.args
    policy = replace(trainer.training_policy, transformer=transformer)
    log_prob = torch.cat([log_prob_of(policy, batch) for batch in batches])  # [B, S, H, W]
    old = torch.cat([torch.stack(batch.log_probs, dim=1) for batch in batches])
    if is_first_update:
        old = log_prob.detach()
    if args.allocation == "uniform":
        ratio = (log_prob.mean((2, 3)) - old.mean((2, 3))).exp()
        clip_range, weights, A = args.clip_range, 1.0, advantages[:, None]
    else:
        ratio = (log_prob - old).exp()
        maps = torch.cat([torch.stack(batch.maps, dim=1) for batch in batches])
        weights = allocation_weights(maps, SIZE, args.allocation, args.lam)
        clip_range, A = 16 * args.clip_range, advantages[:, None, None, None]
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -(weights * torch.minimum(ratio * A, clipped * A)).mean()


def log_prob_of(policy, batch):
    return log_prob(policy, batch, batch.steps)


SIZES = """--prompts-per-iteration 2 --group-size 4 --batch-size 2 --steps 4 --stochastic-steps 2
    --last-stochastic-step 2 --ema-decay 0.9 --clip-range 1e-4 """
RISING = torch.arange(8.0) ** 2


@pytest.mark.parametrize(
    "options",
    [
        "--allocation spatial --lam 1",
        "--allocation spatiotemporal --no-same-noise --noise-level 0.5 --guidance-scale 2",
        "--allocation uniform --global-std",
        "--allocation uniform --updates-per-iteration 2",
        "--allocation spatial --updates-per-iteration 2",
    ],
)
def test_an_iteration_is_the_gradient_of_one_loss(options, monkeypatch):
    """`iterate` moves the weights as one loss over all images and trained steps does. From the
    second update on, ratios have moved. With uniform there is one per image and step."""
    trainer = trainer_of(SIZES + options)
    args = trainer.args
    batches = frozen_iteration(trainer, RISING, monkeypatch)
    twin = copy.deepcopy(trainer.transformer)
    start = flat(twin.parameters())
    line = trainer.iterate(3)

    advantages = star.group_advantages(RISING.view(2, 4), args.global_std).flatten()
    optimizer = torch.optim.SGD(twin.parameters(), 10)
    share = 4 // args.updates_per_iteration
    for first in range(0, 4, share):
        A = advantages[2 * first : 2 * (first + share)]
        loss = loss_of(trainer, twin, batches[first : first + share], A, first == 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = flat(twin.parameters()) - start
    assert difference(flat(trainer.transformer.parameters()) - start, expected) < 1e-4
    assert (line["ratio_mean"] == 1) == (args.updates_per_iteration == 1)
    assert (line["clip_fraction"] > 0) == (args.updates_per_iteration == 2)
    first_noise = batches[0].latents[0][0]
    assert torch.equal(first_noise, batches[1].latents[0][0]) == args.same_noise


def test_the_first_ratio_is_one_also_if_the_rollout_rounds_otherwise(monkeypatch):
    trainers = [trainer_of(SIZES), trainer_of(SIZES)]
    for trainer, rounding in zip(trainers, [0.0, 0.03]):
        for batch in frozen_iteration(trainer, RISING, monkeypatch):
            for old_log_prob in batch.log_probs:
                old_log_prob += rounding
        assert trainer.iterate(3)["ratio_mean"] == 1
    ours, theirs = [flat(trainer.transformer.parameters()) for trainer in trainers]
    assert torch.equal(ours, theirs)


def test_kl_pulls_back_to_the_reference_where_advantages_are(monkeypatch):
    """Six of eight images teach nothing, also not by their KL. A large gradient is clipped."""
    trainer = trainer_of(SIZES + "--kl-weight 1000 --allocation uniform")
    for weight in trainer.reference.parameters():  # so that there is a distance
        weight.data *= 1.1
    values = torch.tensor([3.0, 3, 3, 3, 1, 2, 2, 3])
    advantages = star.group_advantages(values.view(2, 4)).flatten()
    batches = frozen_iteration(trainer, values, monkeypatch)
    twin = copy.deepcopy(trainer.transformer)
    line = trainer.iterate(3)

    policy = replace(trainer.training_policy, transformer=twin)
    reference = replace(policy, transformer=trainer.reference)
    kls = []
    for batch in batches:
        for k in batch.steps:
            mean, std = policy.distribution(batch.latents[k], k, batch.prompt)
            other, _ = reference.distribution(batch.latents[k], k, batch.prompt)
            kls.append(
                kl_divergence(Normal(mean, std), Normal(other.detach(), std)).mean((1, 2, 3))
            )
    kl = torch.stack(kls).view(4, 2, 2).mean(1).flatten()  # of each image
    assert line["kl"] == pytest.approx(kl[4:].mean().item(), rel=1e-3)
    loss = loss_of(trainer, twin, batches, advantages, is_first_update=True)
    (loss + 1000 * (kl * (advantages != 0)).mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert norm > 1
    start = twin.proj_out.bias
    moved = trainer.transformer.proj_out.bias - start
    assert_close(moved, -10 * start.grad, atol=0, rtol=1e-2)


def test_advantages_are_clipped(monkeypatch):
    trainer = trainer_of(SIZES)
    frozen_iteration(trainer, RISING, monkeypatch)
    large = torch.tensor([[9.0, -7, 1, 2], [0, 0, -6, 5]])
    monkeypatch.setattr(star, "group_advantages", lambda rewards, global_std: large)
    seen = []
    monkeypatch.setattr(
        trainer, "update", lambda batches, advantages: seen.append(advantages) or {}
    )
    trainer.iterate(3)
    assert seen[0].tolist() == [5, -5, 1, 2, 0, 0, -5, 5]


def test_the_average_of_the_weights(monkeypatch):
    """The first update copies. Then the decay is 2/11, 3/12, ... until it is --ema-decay. Images
    for evaluation are from the average."""
    trainer = trainer_of(SIZES.replace("0.9", "0.22"))
    frozen_iteration(trainer, RISING, monkeypatch)
    average = None
    for decay in [0, 2 / 11, 0.22]:
        trainer.iterate(3)
        weights = flat(trainer.transformer.parameters())
        if average is None:
            average = weights
        average = decay * average + (1 - decay) * weights
        assert_close(flat(trainer.ema.module.parameters()), average)
    trainer.transformer.proj_out.bias.data += math.inf
    assert len(trainer.generate(PROMPTS)) == 2
    with pytest.raises(SystemExit, match="gradient is not finite: use a lower --learning-rate"):
        trainer.iterate(3)


def test_images_that_are_not_finite_end_the_run(pipe):
    with pytest.raises(SystemExit, match="images are not finite: use a lower --learning-rate"):
        star.decode(pipe, torch.full((1, 8, 16, 16), math.nan))


def test_equal_rewards_teach_nothing(tmp_path, monkeypatch):
    """No image is trained on its KL alone; the run goes on, also from its checkpoint."""
    monkeypatch.setattr(OCR, "reward", lambda self, images, prompts: [0.5] * len(images))
    options = ["--kl-weight", "1", "--monitor", "", "--iterations"]
    run(tmp_path, *options, "1")
    run(tmp_path, *options, "2", "--resume")
    tensors = checkpoint(tmp_path)
    for name, weight in weights_of("tiny/sd3").items():
        assert torch.equal(weight, tensors[f"transformer.{name}"])
        assert torch.equal(weight, tensors[f"ema.module.{name}"])
    assert [line.get("gradient_norm") for line in metrics(tmp_path)] == [None, 0, 0]


def test_what_changes_with_the_iteration():
    """Every window of steps comes up, and no other; noise and prompts are new."""
    options = """--prompts-per-iteration 1 --group-size 2 --batch-size 2 --steps 4
        --stochastic-steps 2 --seed """
    windows, noises, prompts = set(), set(), set()
    for seed in ["0", "1"]:
        trainer = trainer_of(options + seed)
        for iteration in range(12):
            texts, (batch,) = trainer.sample(iteration)
            windows.add(tuple(batch.steps))
            noises.add(batch.latents[0][0].sum().item())
            prompts.add(texts[0])
    assert windows == {(0, 1), (1, 2), (2, 3)}
    assert len(noises) == 24
    assert len(prompts) > 20


PARTS = """core_tokens_of AttentionAllocator allocation_weights sde_step position_log_prob
    kl_to_reference group_advantages star_loss""".split()


def test_parts_work_alone_in_another_file(pipe, monkeypatch):
    """The source of a part, pasted below three imports, does what it does in star.py."""

    def results():
        samples = Scene(pipe).rollout()
        advantages = star.group_advantages(torch.eye(2))[0]
        maps = torch.stack(samples.maps, dim=1)
        log_prob = torch.stack(samples.log_probs, dim=1)
        weights = star.allocation_weights(maps, SIZE)
        loss, _, _ = star.star_loss(0.9 * log_prob, log_prob, advantages, weights, 0.1)
        kl = star.kl_to_reference(samples.latents[1], samples.latents[2], 0.5)
        return samples.latents[-1], maps, log_prob, weights, loss, kl

    plain = results()
    for part in PARTS:
        alone = {"math": math, "torch": torch, "F": F}
        exec(inspect.getsource(getattr(star, part)), alone)
        monkeypatch.setattr(star, part, alone[part])
    for pasted, own in zip(results(), plain):
        assert torch.equal(pasted, own)


# -------------------------------------------------------------------------- Full size, small memory
def test_defaults_follow_the_model(tmp_path):
    shutil.copytree("tiny/sd3", tmp_path, dirs_exist_ok=True)
    change(tmp_path / "transformer/config.json", sample_size=128)
    args = star.parse_arguments(["--model", str(tmp_path), "--seed", "5"])
    assert args.full_size and args.seed == 5
    for name, value in star.PRESETS["full size"].items():
        assert getattr(args, name) == value
    for name in ["ocr", "pickscore", "geneval"]:
        task = make_task(star.parse_arguments(["--model", str(tmp_path), "--task", name]))
        assert task.models == task.real_models
        assert len(task.prompts) >= 500
        assert not set(task.prompts) & set(task.heldout_prompts)
    # Flow-GRPO divides by 2 s^2, we by 2 std^2. On average over trained steps the two agree.
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(args.steps)
    intervals = -scheduler.sigmas.diff()[: args.last_stochastic_step + 1]
    mean = intervals.unfold(0, args.stochastic_steps, 1).mean().item()
    assert args.kl_weight == pytest.approx(0.04 * mean, rel=0.01)


def test_without_t5_in_bfloat16(tmp_path, capsys):
    """The weights are float32 although the file's are not, since a learning rate of 1e-5 would be
    lost. T5's files are not needed, its part of the context is zeros without core tokens, and T5 is
    not saved."""
    folder = tmp_path / "half"
    shutil.copytree("tiny/sd3", folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    half["pos_embed.pos_embed"] = half["pos_embed.pos_embed"].float()  # as diffusers writes it
    save_file(half, file, {"format": "pt"})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, "a wall " * 30 + '"K7Q"']))
    options = f"""--no-t5 --bfloat16 --kl-weight 0.1 --guidance-scale 2 --optimizer adafactor
        --iterations 1 --batch-size 1 --gradient-checkpointing --max-sequence-length 60
        --prompts {prompts} --model""".split()
    out = tmp_path / "run"
    run(out, *options, str(folder))
    assert "1 have no core words among their tokens" in capsys.readouterr().out
    line = metrics(out)[1]
    assert 0 <= line["kl"] < 1e-3  # the reference is the start, up to the rounding of its copy
    assert {weight.dtype for weight in checkpoint(out).values()} == {torch.float32, torch.int64}
    saved = diffusers.StableDiffusion3Pipeline.from_pretrained(
        out / "pipeline", text_encoder_3=None, tokenizer_3=None
    )
    context, _ = star.encode(saved, PROMPTS, 20)
    assert context[:, :20].any() and not context[:, 20:].any()
    run(tmp_path / "again", *options, str(out / "pipeline"))


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_adafactor_steps_are_as_long_as_the_learning_rate(size):
    """With equal gradients of any size, a step moves each weight by the learning rate, as AdamW's
    does. Weight decay comes on top. A row of smaller gradients moves as far as the others."""
    trainer = trainer_of("--optimizer adafactor --learning-rate 1e-3")
    weights = list(trainer.transformer.parameters())
    starts = copy.deepcopy(weights)
    for weight in weights:
        weight.grad = torch.full_like(weight, size)
        if weight.dim() > 1:
            weight.grad[0] /= 4
    trainer.optimizer.step()
    for weight, start in zip(weights, starts):
        scale = start.square().mean().sqrt().clamp_min(1)  # of large weights, relative
        assert_close(start - weight, 1e-3 * scale + 1e-7 * start, atol=2e-6, rtol=1e-3)


# ---------------------------------------------------------------------------------------- Mistakes
MINE = """
from rewards import Task

class NoTask:
    pass

class NoReturn(Task):
    def reward(self, images, prompts):
        [0.5 for image in images]

class OneNumber(Task):
    def reward(self, images, prompts):
        return 0.5
"""


@pytest.fixture(scope="session")
def inputs(finished, tmp_path_factory):
    """A folder of files with mistakes in them."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = {
        "mine.py": MINE,
        "empty.txt": "\n \n",
        "unquoted.txt": 'a "B"\n\na ball\na box\n',
        "few.txt": 'a "B"\n',
        "header.csv": "Prompts,Category\na red ball,colours\n",
        "tabs.txt": 'Prompt\tCategory\na sign "B"\tsigns\n',
        "doubled.txt": '"a white sign ""K7Q"" and a ball",K7Q\n',
        "escaped.txt": 'a sign \\"K7Q\\"\n',
        "list.json": '[\n"a ball"\n]',
        "broken.jsonl": '{"prompt": "a sign',
        "adapter/adapter_config.json": "{}",
        "started/metrics.jsonl": '{"iteration": 0}\n{"iteration": 1}\n',
    }
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    shutil.copytree(finished, folder / "run")
    for name in ["flux", "fp16", "full"]:
        shutil.copytree("tiny/sd3", folder / name)
    (folder / "flux/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    weights = folder / "fp16/transformer/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    change(folder / "full/transformer/config.json", sample_size=128)
    return folder


MISTAKES = [
    ("--tusk ocr", "unrecognized arguments: --tusk"),
    ("--task chess", "task chess is not known; choose ocr, geneval, pickscore"),
    ("--task nowhere.py:Mine", "task nowhere.py:Mine: there is no file nowhere.py"),
    ("--task IN/mine.py:NoTask", "NoTask must be a subclass of rewards.Task"),
    ("--task IN/mine.py:Gone", "Gone must be a subclass of rewards.Task"),
    ("--task IN/mine.py:NoReturn", "one finite number for each of 2 images, not None"),
    ("--task IN/mine.py:OneNumber", "one finite number for each of 2 images, not 0.5"),
    ("--task pickscore,ocr", "OCR cannot use"),
    ("--task pickscore,ocr", "pickscore.txt, line 2: it has no text between straight double quo"),
    ("--task geneval --prompts IN/few.txt", "line 1: it lacks the fields tag and include"),
    ("--model no/folder", "--model no/folder must be a pipeline of Stable Diffusion 3"),
    ("--model tiny/sd3/vae/diffusion_pytorch_model.safetensors", "single file (from_single_file)"),
    ("--model IN/adapter", "from a model and its adapter (fuse_lora)"),
    ("--model tiny/sd3/vae", "--model tiny/sd3/vae must be a pipeline"),
    ("--model IN/flux", "must be a pipeline of Stable Diffusion 3"),
    ("--model IN/fp16", "transformer cannot be loaded; it needs safetensors without a variant"),
    ("--model IN/full", "torch finds no GPU, which --model IN/full needs"),
    ("--prompts nowhere.txt", "prompt file nowhere.txt cannot be read: [Errno 2] No such file"),
    ("--prompts IN/empty.txt", "empty.txt is empty; it needs one prompt per line"),
    ("--prompts IN/unquoted.txt", "line 3: it has no text between straight double quotes: a ball"),
    ("--prompts IN/few.txt", "there are 1 training prompts, fewer than --prompts-per-iteration"),
    ("--prompts IN/header.csv", "line 1 is no plain prompt of a .txt file: Prompts,Category"),
    ("--prompts IN/tabs.txt", "line 1 is no plain prompt of a .txt file: Prompt\tCategory"),
    ("--heldout-prompts IN/doubled.txt", "line 1 is no plain prompt of a .txt file"),
    ("--prompts IN/escaped.txt", "line 1 is no plain prompt of a .txt file"),
    ("--prompts IN/list.json", "line 1 must be a JSON object with a prompt, not ["),
    ("--prompts IN/broken.jsonl", "line 1 must be a JSON object with a prompt"),
    ("--batch-size 7", "8 images (--prompts-per-iteration x --group-size) are no multiple of 7"),
    ("--updates-per-iteration 5", "are no multiple of 20 (--batch-size x --updates-per-iter"),
    ("--batch-size 0", "argument --batch-size: invalid positive value: '0'"),
    ("--group-size 1 --batch-size 2", "out of bounds: --group-size 1 (2 or more)"),
    ("--lam 2", "--lam 2.0 (0 to 1)"),
    ("--noise-level nan", "--noise-level nan (above 0)"),
    ("--last-stochastic-step 4", "--last-stochastic-step 4, and this within --steps 4"),
    ("--last-stochastic-step 0", "--stochastic-steps 2 must fit before --last-stochastic-step 0"),
    ("--height 50", "--height is 50, but must be a multiple of 16"),
    ("--reward-model tiny/ocr tiny/clip", "--reward-model: OCR takes 1"),
    ("--reward-model tiny/clip", "AutoModelForImageTextToText tiny/clip"),
    ("--task pickscore --reward-model tiny/ocr tiny/clip", "CLIPModel tiny/ocr"),
    ("--out IN/run", "IN/run holds a run: use --resume or another --out"),
    ("--out IN/started", "IN/started holds a run: use --resume or another --out"),
    ("--out IN/started --resume", "holds no checkpoint: use another --out, or delete it"),
    ("--out IN/run --resume --lam 1", "was run with other settings: its lam was 0.5"),
    ("--out IN/run --resume --prompts tiny/prompts/ocr_heldout.txt", "its prompts was ['a brown"),
]


@pytest.mark.parametrize("arguments, said", MISTAKES)
def test_a_mistake_is_one_sentence(arguments, said, inputs, tmp_path, capsys):
    """The run ends with a sentence, and no sample is written."""
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", *arguments.replace("IN", str(inputs)).split())
    sentence = f"{end.value} {capsys.readouterr().err}"
    assert said.replace("IN", str(inputs)) in sentence
    assert not list(tmp_path.rglob("*.png"))


def test_a_mended_reward_may_use_its_folder_again(tmp_path):
    """No more than iteration 0 would be overwritten."""
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("return 0.5", "return [0.5, 1] if len(images) == 2 else None"))
    options = ["--task", f"{file}:OneNumber"]
    with pytest.raises(SystemExit, match="one finite number for each of 8 images, not None"):
        run(tmp_path / "run", *options)
    assert len(metrics(tmp_path / "run")) == 1
    file.write_text(MINE.replace("return 0.5", "return range(len(images))"))
    run(tmp_path / "run", *options)
    assert len(metrics(tmp_path / "run")) == 4


def lose(tensors, name):
    tensors.pop(name)


def rename(tensors, name):
    tensors["module"] = tensors.pop(name)


def reshape(tensors, name):
    tensors[name] = torch.zeros(3, 3, 3)


def spoil(tensors, name):
    tensors[name].view(-1)[-1:].fill_(math.nan)


def overflow(tensors, name):
    tensors[name].view(-1)[:1].fill_(math.inf)


@pytest.mark.parametrize(
    "task, model, part, weight, fault",
    [
        ("ocr", "sd3", "transformer/diffusion_pytorch_model", "proj_out.bias", lose),
        ("ocr", "sd3", "transformer/diffusion_pytorch_model", "proj_out.bias", reshape),
        ("ocr", "sd3", "transformer/diffusion_pytorch_model", "proj_out.bias", spoil),
        ("ocr", "sd3", "vae/diffusion_pytorch_model", "decoder.conv_in.weight", overflow),
        ("ocr", "sd3", "text_encoder/model", "text_projection.weight", rename),
        ("ocr", "ocr", "model", "decoder.model.decoder.layers.0.fc1.bias", lose),
        ("pickscore", "clip", "model", "logit_scale", overflow),
        ("geneval", "detector", "model", "class_predictor.weight", rename),
    ],
)
def test_weights_that_do_not_fit(task, model, part, weight, fault, tmp_path):
    """The libraries would replace missing ones by random numbers, with no more than a warning."""
    folder = tmp_path / model
    shutil.copytree(f"tiny/{model}", folder)
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    fault(tensors, weight)
    save_file(tensors, file, {"format": "pt"})
    options = {
        "sd3": ["--model", str(folder)],
        "ocr": ["--reward-model", str(folder)],
        "clip": ["--reward-model", str(folder), "tiny/clip"],
        "detector": ["--reward-model", str(folder), "tiny/clip"],
    }
    sentence = rf"missing, unknown, of another shape or not finite: {re.escape(weight)}"
    with pytest.raises(SystemExit, match=sentence):
        run(tmp_path / "run", "--task", task, *options[model])


# -------------------------------------------------------------------------------------- Core words
def test_core_tokens_are_the_words_in_both_tokenizers(pipe):
    """Where CLIP's start and end tokens leave no room for K7Q, T5 still sees the K."""
    prompts = [PROMPTS[0], "a wall " * 7 + 'with a sign "K7Q"', "a wall " * 20 + '"K7Q"']
    spans = [quoted_span(prompt) for prompt in prompts]
    core = star.core_tokens_of(pipe, prompts, spans, 20).view(3, 2, 20)
    assert core[1:].sum(-1).tolist() == [[0, 1], [0, 0]]
    for tokenizer, words in zip([pipe.tokenizer, pipe.tokenizer_3], core[0]):
        ids = tokenizer(prompts[0], padding="max_length", max_length=20)["input_ids"]
        text = tokenizer.decode(torch.tensor(ids)[words])
        assert text.replace(" ", "").upper() == "K7Q"


def core_words(task, prompt):
    return [prompt[start:end] for start, end in task.core_spans(prompt)]


@pytest.mark.parametrize(
    "prompt, words",
    [
        ('a sign "Hello World" and a sign "two"', ["Hello World"]),
        ('a label "" next to a sign "HELLO"', ["HELLO"]),
        ('a sign " " and "A"', ["A"]),
        ('no quotes, empty "" quotes, one "', []),
        ('a 12" x 8" board with "TEN 12" on it', ["TEN 12"]),
    ],
)
def test_core_words_of_ocr(prompt, words):
    assert core_words(OCR(), prompt) == words


def test_core_words_of_pickscore_are_all_but_function_words():
    prompt = "A sign “K7Q” and two well-known balls"
    assert core_words(PickScore(), prompt) == ["sign", "K7Q", "two", "well-known", "balls"]


# ----------------------------------------------------------------------------------------- Rewards
@pytest.mark.parametrize(
    "read, target, reward",
    [
        ("K7Q", "K7Q", 1),
        ("k 7 q", "K7Q", 1),
        ("xxK7Qxx", "K7Q", 1),
        ("", "K7Q", 0),
        ("K7", "K7Q", 2 / 3),
        ("K77", "K7Q", 2 / 3),
        ("7KQ", "K7Q", 1 / 3),
        ("completely different", "K7Q", 0),
        ("sitting", "kitten", 1 / 2),
        ("Hello Wrld", "hello world", 9 / 10),
        ("DON’T WALK", "DON'T WALK", 1),
        ("Alex's Library", "Alex’s Library", 1),
        ("“OPEN”", '"OPEN"', 1),
        ("cafe\u0301", "caf\u00e9", 1),
        ("wait...", "wait…", 1),
        ("ＯＰＥＮ", "OPEN", 1),
        ("STRASSE", "Straße", 1),
    ],
)
def test_text_reward(read, target, reward):
    assert rewards.text_reward(read, target) == pytest.approx(reward)


def test_prompt_files(tmp_path):
    """As Flow-GRPO's are: a byte order mark and blank lines do not count."""
    lines = ['A stamp, with "Alex’s Library" in bold letters', 'A bus that reads "Line 7", \u2028']
    plain = tmp_path / "prompts.txt"
    plain.write_text("\n\n".join(lines) + "\n", encoding="utf-8-sig")
    records = rewards.read_records(plain)
    assert [record["prompt"] for record in records] == [line.strip() for line in lines]
    assert records[1]["where"].endswith("prompts.txt, line 3")
    as_json = tmp_path / "prompts.jsonl"
    as_json.write_text('{"prompt": "a sign \\"K7Q\\"", "tag": "mine"}\n')
    (record,) = rewards.read_records(as_json)
    assert (record["prompt"], record["tag"]) == ('a sign "K7Q"', "mine")


def test_evaluation_prompts_come_from_all_parts_of_a_file(tmp_path):
    file = tmp_path / "sorted.txt"
    file.write_text("\n".join(f'a "{letter}"' for letter in "abcdefg"))
    options = ["--heldout-prompts", str(file), "--evaluation-prompts", "4", "--monitor", ""]
    task = make_task(star.parse_arguments(options))
    assert task.heldout_prompts == ['a "a"', 'a "b"', 'a "d"', 'a "f"']


def test_generated_images_are_those_of_diffusers():
    trainer = trainer_of("--task pickscore --evaluation-steps 4 --seed 5")
    prompts = trainer.task.heldout_prompts[:4]
    theirs = trainer.pipe(
        prompts,
        latents=torch.randn(4, 8, 16, 16, generator=torch.manual_seed(5)),
        num_inference_steps=4,
        guidance_scale=1,
        max_sequence_length=20,
    )
    assert_same_images(trainer.generate(prompts), theirs.images)


class Fixed(rewards.Task):
    """A task whose rewards are given."""

    def __init__(self, values):
        self.values = values

    def reward(self, images, prompts):
        assert not torch.is_grad_enabled()
        return self.values


TWO = [Image.new("RGB", (4, 4))] * 2


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1],
        numpy.array([0.5, 1]),
        torch.tensor([0.5, 1.0], requires_grad=True),
    ],
)
def test_rewards_may_be_lists_arrays_and_tensors(values):
    for task in [Fixed(values), rewards.Mixture([Fixed(values), Fixed(values)], [1, 2])]:
        assert torch.equal(task.checked_reward(TWO, PROMPTS), torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize(
    "values",
    [
        [0.5, math.nan],
        [math.inf, 1],
        [0.5],
        torch.zeros(2, 1),
        0.5,
        None,
        {"a": 1},
        "ab",
        ["0", "1"],
        ([0.5, 1], {}),
        torch.eye(100),
    ],
)
def test_rewards_are_one_finite_number_per_image(values):
    for task in [Fixed(values), rewards.Mixture([Fixed([0.5, 1]), Fixed(values)], [1, 2])]:
        with pytest.raises(SystemExit, match="reward of Fixed must be one finite number") as end:
            task.checked_reward(TWO, PROMPTS)
        assert len(end.value.code) < 500


class Careless(rewards.Task):
    def reward(self, images, prompts):
        images[0].thumbnail((8, 8))
        return [0.0]


def test_a_reward_may_change_its_images():
    """It gets copies: what comes after it sees the images as they were."""
    image = Image.new("RGB", (32, 32), "white")
    Careless().checked_reward([image], PROMPTS[:1])
    assert image.size == (32, 32)


def world(count, **settings):
    """Pictures of the world that the miniatures know, and their captions."""
    rng = random.Random(123)
    texts = build.all_targets(True)
    shots = [build.picture(rng, texts, **settings) for _ in range(count)]
    return [shot["image"] for shot in shots], [shot["caption"] for shot in shots]


def task_of(name):
    """A task of the miniature with its models."""
    task = make_task(star.parse_arguments(["--task", name]))
    task.prepare()
    return task


def test_a_mixture_is_the_weighted_mean():
    """Rewards are divided by their scales first. The core words are those of all tasks."""
    task = task_of("ocr:0.7,pickscore:0.1")
    assert task.networks() == [task.tasks[0].reader, task.tasks[1].clip]
    images, prompts = world(6, sign_share=1.0)
    ocr = task_of("ocr").checked_reward(images, prompts)
    pickscore = task_of("pickscore").checked_reward(images, prompts)
    found = task.scores(images, prompts, "cpu")
    assert_close(found, (0.7 * ocr + 0.1 * pickscore / 26) / 0.8)
    assert task.report(images, prompts) == {
        "OCR": pytest.approx(ocr.mean().item()),
        "PickScore": pytest.approx(pickscore.mean().item()),
    }
    spans = quoted_span(prompts[0]) + rewards.content_word_spans(prompts[0])
    assert task.core_spans(prompts[0]) == spans


def test_monitors_are_only_logged():
    options = "--task pickscore --monitor ocr --prompts tiny/prompts/ocr.txt --heldout-prompts"
    task = make_task(star.parse_arguments([*options.split(), "tiny/prompts/ocr_heldout.txt"]))
    task.prepare()
    images, prompts = world(6, sign_share=1.0)
    (ocr,) = task.monitors
    expected = ocr.checked_reward(images, prompts).mean().item()
    assert task.full_report(images, prompts, "cpu") == {"OCR": expected}


# ------------------------------------------------------------------------------------------ README
OWN = """
import dataclasses
import helper_of_mine

@dataclasses.dataclass
class Settings:
    factor: float = helper_of_mine.FACTOR

class OwnPrompts(LogoReward):
    prompts = ["a yellow sign", "a white sign", "a red sign"]
    heldout_prompts = ["a yellow wall with a sign"]

    def __init__(self):
        self.factor = Settings().factor

class Typo(LogoReward):
    def reward(self, images, prompts):
        return {}["mine"]
"""


@pytest.fixture
def mine(tmp_path):
    """The class in the README as it stands; beside it a dataclass, with a helper module."""
    readme = code_block("README.md", "python", "class LogoReward")
    file = tmp_path / "mine.py"
    file.write_text("from __future__ import annotations\n" + readme + OWN)
    (tmp_path / "helper_of_mine.py").write_text("FACTOR = 0.25")
    return file


def test_the_task_in_the_readme(mine, tmp_path):
    run(tmp_path / "run", "--iterations", "1", "--task", f"{mine}:LogoReward")
    before, after = metrics(tmp_path / "run")
    assert 0 < before["heldout_reward"] < 1
    assert after["weight_peak"] > 1


def test_a_class_of_ones_own(mine, tmp_path, capsys):
    """Its prompts count, its constructor takes nothing, and its exceptions stay what they are."""
    run(tmp_path / "run", "--iterations", "1", "--task", f"{mine}:OwnPrompts")
    said = capsys.readouterr().out
    assert "3 training prompts. The first: a yellow sign (core words: ['yellow', 'sign'])" in said
    assert "yellow wall" in (tmp_path / "run/checkpoint/000001/run.json").read_text()
    with pytest.raises(KeyError, match="mine"):
        run(tmp_path / "typo", "--task", f"{mine}:Typo")
    task = make_task(star.parse_arguments(["--task", f"ocr:0.5,{mine}:OwnPrompts:0.5"]))
    assert task.weights == [0.5, 0.5]
    with pytest.raises(SystemExit, match="OCR cannot use the prompts of the first task: it has no"):
        make_task(star.parse_arguments(["--task", f"{mine}:OwnPrompts:0.5,ocr:0.5"]))
