"""What must be true of STAR, checked on closed forms and on the trained miniature: `python -m pytest`.

The numbered tests are the nine points that README.md lists in section 2, "What must hold".
"""
import argparse
import copy
import inspect
import json
import math
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageStat
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import star                      # before transformers: it quiets remarks about packages that nothing here needs
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPImageProcessorPil, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor, PreTrainedTokenizerFast

from rewards import OCR, Detection, GenEval, PickScore, edit_distance, geneval_prompts, judge, make_task, quoted_span, relations, text_reward

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tiny"))
import build                     # the world that the miniatures were trained on
import study                     # the measurements that README.md reports
PROMPTS = ['a blue wall with a white sign "K7Q" and a red ball', 'a green wall with a pink sign "2FX"']


@pytest.fixture(scope="session")
def pipeline():
    return StableDiffusion3Pipeline.from_pretrained(HERE / "tiny/sd3")


@pytest.fixture(scope="session")
def task():
    task = OCR()
    task.load("cpu")
    return task


def scene(pipeline, prompts=PROMPTS, length=24):
    """Starting noise, encoded prompts, the encoded empty prompt, core tokens and sigmas for two pictures."""
    torch.manual_seed(0)
    latents = torch.randn(len(prompts), 8, 16, 16)
    core = star.core_tokens_of(pipeline, prompts, map(quoted_span, prompts), length)
    pipeline.scheduler.set_timesteps(6)
    with torch.no_grad():
        given, empty = star.encode(pipeline, prompts, length), star.encode(pipeline, [""], length)
    return latents, given, empty, core, pipeline.scheduler.sigmas.tolist()


def painted(pipeline, guidance_scale=1.0, steps=(1, 2, 4)):
    latents, given, empty, core, sigmas = scene(pipeline)
    result = star.rollout(pipeline.transformer, latents, given, empty, sigmas, steps, torch.Generator().manual_seed(1), 0.7,
                          guidance_scale, core, map_steps=steps, map_blocks=[2, 3])
    return result, given, empty, sigmas, steps


def recomputed_log_prob(pipeline, result, given, empty, sigmas, steps, guidance_scale=1.0):
    log_probs = []
    for step in steps:
        here, there = result.latents[:, step], result.latents[:, step + 1]
        velocity = star.predict_velocity(pipeline.transformer, here, sigmas[step], given, guidance_scale, empty)
        _, mean, std = star.sde_step(here, velocity, sigmas[step], sigmas[step + 1], sigmas[1], 0.7, 0.0)
        log_probs.append(star.position_log_prob(there, mean, std))
    return torch.stack(log_probs, dim=1)


# ---------------------------------------------------------------------------------------------------- the nine points

@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_1_weights_have_mean_one(lam):
    maps = torch.rand(3, 4, 8, 8) ** 4 * torch.logspace(-6, 0, 3)[:, None, None, None]
    spatial = star.allocation_weights(maps, (16, 16), "spatial", lam)
    both = star.allocation_weights(maps, (16, 16), "spatiotemporal", lam)
    assert spatial.shape == both.shape == (3, 4, 16, 16)
    torch.testing.assert_close(spatial.mean((2, 3)), torch.ones(3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(both.mean((1, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    for weights in (spatial, both):
        assert weights.isfinite().all() and (weights >= 0).all()
        assert (weights.amin() >= 1 - lam - 1e-6)
    if lam == 1:       # the allocation is proportional to the attention, and spatiotemporal keeps the steps' ratio
        expected = maps.sum((2, 3)) / maps.sum((1, 2, 3))[:, None]
        torch.testing.assert_close(both.sum((2, 3)) / both.sum((1, 2, 3))[:, None], expected)


def test_1_prompt_without_core_words_gets_weight_one():
    maps = torch.stack([torch.zeros(2, 4, 4), torch.rand(2, 4, 4)])
    for allocation in ("spatial", "spatiotemporal"):
        weights = star.allocation_weights(maps, (8, 8), allocation, 1.0)
        assert (weights[0] == 1).all() and weights[1].std() > 0.1


def test_2_uniform_is_flow_grpo(pipeline):
    """lam = 0: the first gradient is that of Flow-GRPO's objective with one scalar ratio per picture and step."""
    result, given, empty, sigmas, steps = painted(pipeline)
    advantages = torch.tensor([0.8, -1.3])
    weights = star.allocation_weights(result.maps, (16, 16), "spatial", lam=0.0)
    transformer = pipeline.transformer
    log_prob = recomputed_log_prob(pipeline, result, given, empty, sigmas, steps)

    loss = star.star_loss(log_prob, result.log_prob, advantages, weights, clip_range=1e-2)[0]
    ours = torch.autograd.grad(loss, list(transformer.parameters()), retain_graph=True, allow_unused=True)
    ratio = torch.exp(log_prob.mean((2, 3)) - result.log_prob.mean((2, 3)))
    scalar = -torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - 1e-4, 1 + 1e-4) * advantages[:, None]).mean()
    theirs = torch.autograd.grad(scalar, list(transformer.parameters()), allow_unused=True)

    a, b = (torch.cat([g.flatten() for g in gradient if g is not None]) for gradient in (ours, theirs))
    assert b.norm() > 0 and (a - b).norm() / b.norm() < 1e-5


def test_3_hook_changes_nothing(pipeline):
    latents, (context, pooled), _, core, _ = scene(pipeline)
    transformer, timestep = pipeline.transformer, torch.full((2,), 700.0)
    processors = dict(transformer.attn_processors)
    outputs, gradients = [], []
    for hooked in (False, True):
        allocator = star.AttentionAllocator(transformer, core, [0, 1, 2, 3])
        if hooked:
            allocator.__enter__()
        with torch.no_grad():
            outputs.append(transformer(latents, context, pooled, timestep).sample)
        output = transformer(latents, context, pooled, timestep).sample
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output.square().mean(), transformer.proj_out.weight)[0])
        gradients.append(torch.autograd.grad(transformer(latents, context, pooled, timestep).sample.square().mean(),
                                             transformer.transformer_blocks[0].attn.to_q.weight)[0])
        if hooked:
            allocator.__exit__(None, None, None)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])
    assert dict(transformer.attn_processors) == processors, "on exit, what was there must be there again"


def test_3_processors_are_restored_after_an_error(pipeline):
    processors = dict(pipeline.transformer.attn_processors)
    with pytest.raises(RuntimeError), star.AttentionAllocator(pipeline.transformer, torch.ones(1, 48, dtype=bool), [0]):
        raise RuntimeError
    assert dict(pipeline.transformer.attn_processors) == processors


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_4_map_is_the_brute_force_map(pipeline, guidance_scale):
    """Against the whole softmax matrix of Q K^T over [image; text], with the queries and keys caught inside the block."""
    latents, given, empty, core, _ = scene(pipeline)
    transformer, blocks = pipeline.transformer, [1, 3]
    caught, hooks = {}, []
    for block in blocks:
        attention = transformer.transformer_blocks[block].attn
        for name in ("norm_q", "norm_k", "norm_added_k"):
            hooks.append(getattr(attention, name).register_forward_hook(
                lambda module, inputs, output, key=(block, name): caught.__setitem__(key, output)))
    with torch.no_grad():
        star.predict_velocity(transformer, latents, 0.7, given, guidance_scale, empty)
    for hook in hooks:
        hook.remove()
    expected = []
    for block in blocks:
        query, image_key, text_key = (caught[block, name][-2:] for name in ("norm_q", "norm_k", "norm_added_k"))
        scores = query @ torch.cat([image_key, text_key], dim=2).transpose(2, 3) / math.sqrt(query.shape[-1])
        text = scores.softmax(-1)[..., image_key.shape[2]:]
        expected.append((text * core[:, None, None, :]).sum(-1).mean(1))
    with torch.no_grad(), star.AttentionAllocator(transformer, core, blocks) as allocator:
        star.predict_velocity(transformer, latents, 0.7, given, guidance_scale, empty)
    torch.testing.assert_close(allocator.map(), torch.stack(expected).mean(0), atol=1e-5, rtol=0)
    assert allocator.map().std() > 1e-3


def test_4_map_of_a_transformer_like_sd3_medium_s(pipeline):
    """Stable Diffusion 3 Medium has no norm on queries and keys, and no second attention in any block."""
    latents, given, empty, core, _ = scene(pipeline)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=3, attention_head_dim=32,
                                        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=128, pooled_projection_dim=96,
                                        pos_embed_max_size=8)
    attention, caught = transformer.transformer_blocks[1].attn, {}
    for name in ("to_q", "to_k", "add_k_proj"):
        getattr(attention, name).weight.data *= 8                     # so that the attention is not the same everywhere
        getattr(attention, name).register_forward_hook(lambda module, inputs, output, name=name: caught.__setitem__(name, output))
    with torch.no_grad(), star.AttentionAllocator(transformer, core, [1]) as allocator:
        star.predict_velocity(transformer, latents, 0.7, given, 1.0, empty)
    query, key, text = (caught[name].unflatten(-1, (4, 32)).transpose(1, 2) for name in ("to_q", "to_k", "add_k_proj"))
    weights = (query @ torch.cat([key, text], dim=2).transpose(2, 3) / math.sqrt(32)).softmax(-1)[..., 64:]
    expected = (weights * core[:, None, None, :]).sum(-1).mean(1)
    torch.testing.assert_close(allocator.map(), expected, atol=1e-5, rtol=0)
    assert allocator.map().std() > 1e-3


def test_4_rollout_keeps_each_step_s_own_map(pipeline):
    result, given, empty, sigmas, steps = painted(pipeline, 3.0)
    core = scene(pipeline)[3]
    for index, step in enumerate(steps):
        with torch.no_grad(), star.AttentionAllocator(pipeline.transformer, core, [2, 3]) as allocator:
            star.predict_velocity(pipeline.transformer, result.latents[:, step], sigmas[step], given, 3.0, empty)
        assert torch.equal(result.maps[:, index].flatten(1), allocator.map())
    assert not torch.equal(result.maps[:, 0], result.maps[:, 1])


def test_5_log_prob_is_the_normal_distribution():
    torch.manual_seed(0)
    sample, mean, std = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4), 0.37
    reference = torch.distributions.Normal(mean, std).log_prob(sample)
    ours = star.position_log_prob(sample, mean, std)
    torch.testing.assert_close(ours, reference.mean(1))
    flow_grpo = -((sample - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    torch.testing.assert_close(ours.mean((1, 2)), flow_grpo.mean((1, 2, 3)))
    stds = torch.tensor([0.2, 0.37, 1.5]).view(3, 1, 1, 1)                       # as trainers have it that mix steps in a batch
    torch.testing.assert_close(star.position_log_prob(sample, mean, stds), torch.distributions.Normal(mean, stds).log_prob(sample).mean(1))


def test_6_sde_keeps_the_marginals():
    """Gaussian data N(m, d^2): the exact velocity is known, and both samplers must end in N(m, d^2)."""
    generator = torch.Generator().manual_seed(0)
    centre, deviation, count, steps = 0.6, 0.5, 20_000, 400
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    start = torch.randn(count, 1, 1, 1, generator=generator)
    ends = {}
    for level in (0.0, 0.7):
        x = start
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):
            variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
            slope = (sigma - (1 - sigma) * deviation**2) / variance          # E[noise - data | x] is linear in x
            velocity = -centre + slope * (x - (1 - sigma) * centre)
            noise = torch.randn(x.shape, generator=generator)
            x = star.sde_step(x, velocity, sigma, sigma_next, sigmas[1], level, noise)[0]
        ends[level] = x
    assert (ends[0.7] - ends[0.0]).abs().mean() > 0.1, "the stochastic sampler must be one"
    for x in ends.values():
        assert abs(x.mean().item() - centre) < 4 * deviation / math.sqrt(count) + 2e-3
        assert abs(x.var().item() - deviation**2) < 4 * deviation**2 * math.sqrt(2 / count) + 4e-3


def test_6_noise_level_zero_is_the_scheduler_s_euler_step(pipeline):
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(7)
    x, velocity = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    for index, timestep in enumerate(scheduler.timesteps):
        sigmas = scheduler.sigmas.tolist()
        ours = star.sde_step(x, velocity, sigmas[index], sigmas[index + 1], sigmas[1], 0.0, torch.randn_like(x))[0]
        x = scheduler.step(velocity, timestep, x).prev_sample
        torch.testing.assert_close(ours, x)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_7_first_ratio_is_one(pipeline, guidance_scale):
    result, given, empty, sigmas, steps = painted(pipeline, guidance_scale)
    log_prob = recomputed_log_prob(pipeline, result, given, empty, sigmas, steps, guidance_scale)
    assert torch.equal(log_prob, result.log_prob)
    assert torch.equal(star.star_loss(log_prob, result.log_prob, torch.ones(2), torch.ones_like(log_prob), 1e-3)[1], torch.ones_like(log_prob))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_7_first_ratio_is_one_in_bfloat16(pipeline, guidance_scale):
    with torch.autocast("cpu", torch.bfloat16):
        result, given, empty, sigmas, steps = painted(pipeline, guidance_scale)
        log_prob = recomputed_log_prob(pipeline, result, given, empty, sigmas, steps, guidance_scale)
    ratio = torch.exp(log_prob - result.log_prob)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-3, rtol=0)


@pytest.mark.parametrize("global_std", [False, True])
def test_8_advantages(global_std):
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    rewards[2] = 0.6                                     # the mean of six times 0.6 is not 0.6 in float32
    advantages = star.group_advantages(rewards, global_std)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    assert (advantages[2] == 0).all() and advantages.isfinite().all()
    by_hand = (rewards[0] - rewards[0].mean()) / ((rewards if global_std else rewards[0]).std(unbiased=False) + 1e-4)
    torch.testing.assert_close(advantages[0], by_hand)
    assert star.group_advantages(rewards, clip=0.5).abs().max() == 0.5


SMALL = ["--task", "ocr", "--iterations", "4", "--prompts-per-iteration", "2", "--group-size", "4", "--batch-size", "4", "--steps", "4",
         "--stochastic-range", "0-2", "--stochastic-steps", "2", "--evaluate-every", "2", "--evaluation-prompts", "10", "--save-every", "1"]


def without_seconds(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in star.read_metrics(folder)]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    star.main([*SMALL, "--ema-decay", "0.5", "--out", str(folder)])
    return folder


MOMENTS = {"sampling": ("star.rollout", 12), "rewards": ("rewards.OCR.reward", 4), "update": ("star.star_loss", 9), "checkpoint's first file": ("star.averaged", 3),
           "checkpoint's last file": ("star.save_file", 2), "checkpoint's move": ("pathlib.Path.rename", 2), "pruning": ("shutil.rmtree", 3)}
KILL = """
import os, pathlib, shutil, signal, sys, torch
import rewards, star
calls, function = 0, {name}
def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
{name} = deadly
star.main(sys.argv[1:])
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_9_killed_and_resumed_is_the_same(finished_run, moment, tmp_path):
    """kill -9 of a real process when it calls a certain function for the n-th time; the weights end the same, too."""
    name, call = MOMENTS[moment]
    command = [*SMALL, "--ema-decay", "0.5", "--out", str(tmp_path / "run")]
    killed = subprocess.run([sys.executable, "-c", KILL.format(name=name, call=call), *command], cwd=HERE, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 1 <= len(star.read_metrics(tmp_path / "run")) < 5
    star.main([*command, "--resume"])
    assert without_seconds(tmp_path / "run") == without_seconds(finished_run)
    assert [path.name for path in star.checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    for file in ("training.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        ours, theirs = (load_file(folder / "checkpoint-4" / file) for folder in (tmp_path / "run", finished_run))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_9_adafactor_resumes_the_same(tmp_path):
    whole, halves = ([*SMALL, "--optimizer", "adafactor", "--out", str(tmp_path / name)] for name in ("whole", "halves"))
    star.main(whole)
    star.main([*halves, "--iterations", "2"])
    star.main([*halves, "--resume"])
    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "halves")


def test_interrupted_run_saves_and_says_how_to_go_on(finished_run, tmp_path):
    folder = tmp_path / "run"
    command = [*SMALL, "--ema-decay", "0.5", "--save-every", "9", "--out", str(folder)]
    process = subprocess.Popen([sys.executable, "star.py", *command], cwd=HERE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and len(star.read_metrics(folder)) >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    done = star.read_metrics(folder)[-1]["iteration"]
    assert 1 <= done < 4 and star.last_checkpoint(folder).name == f"checkpoint-{done}"
    star.main([*command, "--resume"])
    assert without_seconds(folder) == without_seconds(finished_run)


def test_full_disk_keeps_the_old_checkpoint(finished_run, tmp_path, capsys, monkeypatch):
    """No file may grow beyond half a megabyte while the second of four checkpoints is written; the training goes on as if it could."""
    save, calls = star.save_checkpoint, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(folder, *args):
        calls.append(star.last_checkpoint(folder))
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000 if len(calls) == 2 else limits[0], limits[1]))
        try:
            save(folder, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(star, "save_checkpoint", save_on_a_full_disk)
    star.main([*SMALL, "--ema-decay", "0.5", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "checkpoint of iteration 2 could not be written" in said and "last good checkpoint is" in said and "checkpoint-1" in said
    assert [path and path.name for path in calls] == [None, "checkpoint-1", "checkpoint-1", "checkpoint-3"]
    assert star.last_checkpoint(tmp_path / "run").name == "checkpoint-4" and not (tmp_path / "run/checkpoint.partial").exists()
    assert without_seconds(tmp_path / "run") == without_seconds(finished_run)
    for file in ("training.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        ours, theirs = (load_file(folder / "checkpoint-4" / file) for folder in (tmp_path / "run", finished_run))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_keep_and_hard_links(tmp_path):
    star.main([*SMALL, "--keep", "2", "--out", str(tmp_path)])
    assert [path.name for path in star.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    files = ["text_encoder_3/model.safetensors", "transformer/diffusion_pytorch_model.safetensors", "training.safetensors"]
    same = [(tmp_path / "checkpoint-3" / file).samefile(tmp_path / "checkpoint-4" / file) for file in files]
    assert same == [True, False, False]


def test_metrics_are_json_and_a_line_cut_short_is_none(tmp_path):
    line = star.metrics_line({"a": float("nan"), "b": float("inf"), "c": 0.5, "d": [1], "e": None, "f": {"g": float("nan")}})
    assert "NaN" not in line and json.loads(line) == {"a": None, "b": None, "c": 0.5, "d": [1], "e": None, "f": {"g": None}}
    (tmp_path / "metrics.jsonl").write_text(line + line[:9])
    assert len(star.read_metrics(tmp_path)) == 1


# ------------------------------------------------------------------------------------------------ full-size models, memory

FULL_SIZE_CONFIGS = {
    "model_index.json": {"_class_name": "StableDiffusion3Pipeline"},
    "transformer/config.json": {"_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "num_layers": 24},
    "vae/config.json": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]}}


def test_defaults_follow_the_model(tmp_path):
    for name, content in FULL_SIZE_CONFIGS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    miniature, full = (star.parse_arguments(["--model", model])[0] for model in ("tiny/sd3", str(tmp_path)))
    assert miniature == star.Arguments()
    assert (full.height, full.steps, full.evaluation_steps, full.guidance_scale, full.noise_level) == (512, 10, 40, 4.5, 0.7)
    assert (full.learning_rate, full.kl_weight, full.clip_range, full.optimizer) == (1e-5, 0.04, 6e-3, "adamw")
    small = star.parse_arguments(["--model", str(tmp_path), "--low-memory", "--batch-size", "2"])[0]
    assert (small.batch_size, small.optimizer, small.reward_device, small.learning_rate) == (2, "adafactor", "cpu", 1e-5)
    for defaults in (star.FULL_SIZE, star.LOW_MEMORY, *star.FULL_SIZE_TASK.values()):
        star.Arguments(**defaults)
    prompts = OCR(star.beside(full.prompts), star.beside(full.heldout_prompts))
    assert len(prompts.prompts) >= 500 and not set(prompts.prompts) & set(prompts.heldout_prompts)


def test_without_t5(pipeline, tmp_path):
    """The T5 part of the context is zeros, has no core tokens, and is not in the checkpoint."""
    star.main([*SMALL, "--iterations", "1", "--no-t5", "--out", str(tmp_path)])
    trained = StableDiffusion3Pipeline.from_pretrained(tmp_path / "checkpoint-1", text_encoder_3=None, tokenizer_3=None)
    assert trained.text_encoder_3 is None and star.read_metrics(tmp_path)[1]["ratio_mean"] == 1
    context = star.encode(trained, PROMPTS, 24)[0]
    assert context.shape == (2, 48, 96) and (context[:, 24:] == 0).all() and (context[:, :24] != 0).any()
    mask = star.core_tokens_of(trained, PROMPTS, map(quoted_span, PROMPTS), 24)
    assert torch.equal(mask[:, :24], star.core_tokens_of(pipeline, PROMPTS, map(quoted_span, PROMPTS), 24)[:, :24]) and not mask[:, 24:].any()


def test_the_trained_weights_are_float32_whatever_the_file_holds(tmp_path):
    """Checkpoints come in bfloat16, some with a buffer in float32; a learning rate of 1e-5 would be lost in bfloat16 weights."""
    shutil.copytree(HERE / "tiny/sd3", tmp_path / "model")
    file = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    save_file({key: value if key == "pos_embed.pos_embed" else value.bfloat16() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    args = star.parse_arguments(["--model", str(tmp_path / "model"), "--precision", "bfloat16", "--kl-weight", "0.1"])[0]
    run = star.load(args, None, None)
    dtypes = {name: {parameter.dtype for parameter in part.parameters()} for name, part in (
        ("transformer", run.pipeline.transformer), ("vae", run.pipeline.vae), ("text_encoder", run.pipeline.text_encoder), ("start", run.start_transformer))}
    assert dtypes == {"transformer": {torch.float32}, "vae": {torch.float32}, "text_encoder": {torch.bfloat16}, "start": {torch.bfloat16}}


def test_low_memory_in_bfloat16(tmp_path):
    star.main([*SMALL, "--low-memory", "--precision", "bfloat16", "--kl-weight", "0.1", "--guidance-scale", "2", "--iterations", "1", "--out", str(tmp_path)])
    line = star.read_metrics(tmp_path)[1]
    assert abs(line["ratio_mean"] - 1) < 1e-3 and line["gradient_norm"] > 0 and line["skipped_updates"] == 0
    assert 0 <= line["kl"] < 1e-3, "the start is the start, up to the rounding of the frozen copy"


def test_adafactor_steps_are_as_long_as_the_learning_rate():
    """In the first step, where both optimizers normalise by the gradient itself, they move a vector alike."""
    moved = []
    for name in ("adamw", "adafactor"):
        run = star.load(star.Arguments(optimizer=name, learning_rate=1e-3, weight_decay=0.0), None, None)
        parameters = list(run.pipeline.transformer.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.arange(len(parameter)) % 5 - 2.5 if parameter.dim() == 1 else torch.ones_like(parameter)
        run.optimizer.step()
        moved.append([now.detach() - then for now, then in zip(parameters, before)])
    for adamw, adafactor, then in zip(*moved, before):
        torch.testing.assert_close(adafactor, adamw * then.square().mean().sqrt().clamp_min(1), atol=2e-6, rtol=1e-3)


def test_map_and_ratio_survive_compilation(pipeline):
    """The allocator swaps processors in compiled blocks: maps, pictures and the first ratio stay what they were."""
    plain, compiled = painted(pipeline)[0], copy.deepcopy(pipeline)
    torch._dynamo.config.recompile_limit = 64
    for block in compiled.transformer.transformer_blocks:
        block.compile(backend="aot_eager")
    for _ in range(2):          # the second time, the compiled code of the first is used with a new allocator
        result, given, empty, sigmas, steps = painted(compiled)
    torch.testing.assert_close(result.maps, plain.maps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.latents, plain.latents, atol=1e-3, rtol=1e-3)
    log_prob = recomputed_log_prob(compiled, result, given, empty, sigmas, steps)
    torch.testing.assert_close(log_prob, result.log_prob, atol=1e-4, rtol=0)


def test_benchmark(tmp_path, capsys):
    star.main([*SMALL, "--benchmark", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert {"encode, seconds", "rollout, seconds", "decode, seconds", "reward, seconds", "update, seconds", "images per second"} <= report["rows"].keys()
    assert all(0 < row["uniform"][0] and 0 < row["spatial"][0] for row in report["rows"].values())
    config = StableDiffusion3Pipeline.from_pretrained(HERE / "tiny/sd3").transformer.config
    width, tokens = config.num_attention_heads * config.attention_head_dim, 64 + 48        # image and text tokens of the joint blocks
    least = 2 * 12 * width**2 * tokens * (config.num_layers - 1)                           # 4 projections and 8 width^2 of the feed-forward
    assert least < report["forward_flop"] < 3 * least
    assert "spatial / uniform" in capsys.readouterr().out and not (tmp_path / "metrics.jsonl").exists()


# -------------------------------------------------------------------------------------------------------- star_loss

def test_loss_by_hand():
    """One position inside the clip range and one outside, for either sign of the advantage, with weights."""
    log_ratio = torch.tensor([[[[0.0, math.log(1.5)]]], [[[0.0, math.log(0.5)]]]])
    weights = torch.tensor([[[[0.5, 1.5]]], [[[2.0, 0.0]]]])
    loss, ratio, clipped = star.star_loss(log_ratio, torch.zeros_like(log_ratio), torch.tensor([2.0, -1.0]), weights, 0.2)
    assert math.isclose(loss.item(), -(0.5 * 2 + 1.5 * 1.2 * 2 + 2.0 * -1 + 0.0) / 4, rel_tol=1e-6)
    torch.testing.assert_close(ratio.flatten(), torch.tensor([1.0, 1.5, 1.0, 0.5]))
    assert clipped.flatten().tolist() == [False, True, False, True]


def test_no_gradient_flows_through_the_weights():
    log_prob, maps = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.rand(1, 1, 2, 2, requires_grad=True)
    loss = star.star_loss(log_prob, torch.zeros(1, 1, 2, 2), torch.ones(1), star.allocation_weights(maps, (2, 2)), 0.1)[0]
    loss.backward()
    assert maps.grad is None and log_prob.grad is not None


def test_kl_is_the_kl_of_two_normals():
    a, b = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    reference = torch.distributions.kl_divergence(torch.distributions.Normal(a, 0.3), torch.distributions.Normal(b, 0.3))
    torch.testing.assert_close(star.kl_to_start(a, b, 0.3), reference.mean(1))


# ---------------------------------------------------------------------------------------------------- GenEval, PickScore

@pytest.mark.parametrize("box, other, expected", [
    ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),                     # (30 - 2) / 30
    ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),
    ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),
    ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
    ((30, 30, 40, 40), (0, 0, 10, 10), {"right of", "below"}),          # 28 / 42.4 = 0.66 along both
    ((20, 12, 30, 22), (0, 0, 10, 10), {"right of"}),                   # 18 / 23.3 = 0.77 and 10 / 23.3 = 0.43
    ((1, 0, 11, 10), (0, 0, 10, 10), set()),                            # nearer than the margin of 2
    ((0, 0, 40, 40), (10, 0, 50, 40), set()),                           # 10 apart, the margin is 8: (10 - 8) / 10 = 0.2
    ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ((0.5, 4, 5.5, 4), (0, 0, 0, 0), {"below"})])                       # (3 - 0.5) / 5 = 0.5 is not more than 0.5
def test_relations_by_hand(box, other, expected):
    assert relations(box, other) == expected


def things(*objects):
    """Detections from (class, confidence, left edge, colour); the colour rides along in place of a mask."""
    found = {}
    for name, confidence, left, colour in objects:
        found.setdefault(name, []).append(Detection(confidence, (left, 0, left + 10, 10), colour))
    return found


DOG, CAT, OTHER_DOG = ("dog", 0.9, 0, "red"), ("cat", 0.8, 50, "blue"), ("dog", 0.6, 100, "green")
ONE_DOG, ONE_CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
RED_DOG, BLUE_CAT, GREEN_DOG = ONE_DOG | {"color": "red"}, ONE_CAT | {"color": "blue"}, ONE_DOG | {"color": "green"}
LEFT_DOG, RIGHT_DOG = ONE_DOG | {"position": ["left of", 0]}, ONE_DOG | {"position": ["right of", 0]}


@pytest.mark.parametrize("objects, include, exclude, correct, credit", [
    ([DOG], [ONE_DOG], [], True, 1),                                                    # single object
    ([CAT], [ONE_DOG], [], False, 0),
    ([DOG, OTHER_DOG], [ONE_DOG], [], True, 0),                                         # more than asked is no fault unless excluded
    ([DOG, CAT], [ONE_DOG, ONE_CAT], [], True, 1),                                      # two objects
    ([DOG], [ONE_DOG, ONE_CAT], [], False, 1 / 2),
    ([DOG] * 3, [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}], True, 1),       # counting
    ([DOG] * 4, [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}], False, 2 / 3),
    ([DOG] * 2, [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}], False, 2 / 3),
    ([DOG] * 7, [{"class": "dog", "count": 3}], [], True, 0),                           # a credit is never negative
    ([DOG, CAT], [ONE_DOG], [ONE_CAT], False, 1),                                       # exclude another class
    ([DOG], [RED_DOG], [], True, 1),                                                    # colour
    ([DOG], [GREEN_DOG], [], False, 1 / 2),
    ([CAT], [RED_DOG], [], False, 0),
    ([DOG, OTHER_DOG], [RED_DOG], [], True, 1 / 2),                                     # the most confident one is judged
    ([DOG, OTHER_DOG], [GREEN_DOG], [], False, 0),
    ([DOG, OTHER_DOG], [{"class": "dog", "count": 2, "color": "red"}], [], False, 3 / 4),
    ([DOG, CAT], [RED_DOG, BLUE_CAT], [], True, 1),                                     # colour attribution
    ([DOG, CAT], [GREEN_DOG, BLUE_CAT], [], False, 3 / 4),
    ([DOG], [RED_DOG, BLUE_CAT], [], False, 1 / 2),
    ([DOG, CAT], [ONE_CAT, LEFT_DOG], [], True, 1),                                     # position, to the clause of that index
    ([DOG, CAT], [ONE_CAT, RIGHT_DOG], [], False, 2 / 3),
    ([DOG], [ONE_CAT, LEFT_DOG], [], False, 1 / 3),                                     # nothing to stand beside
    ([CAT], [ONE_CAT, LEFT_DOG], [], False, 1 / 3),
    ([DOG, CAT], [ONE_CAT | {"color": "red"}, LEFT_DOG], [], False, 2 / 4),             # beside what is not as asked
    ([DOG, CAT, ("cat", 0.7, -50, "blue")], [{"class": "cat", "count": 2}, LEFT_DOG], [], False, 2 / 3),     # to all of them
    ([DOG, CAT, ("cat", 0.7, 90, "blue")], [{"class": "cat", "count": 2}, LEFT_DOG], [], True, 1),
    ([OTHER_DOG, CAT], [ONE_CAT, RIGHT_DOG], [], True, 1)])
def test_geneval_by_hand(objects, include, exclude, correct, credit):
    """Verdicts worked out from the benchmark's published rules."""
    verdict = judge(things(*objects), {"include": include, "exclude": exclude}, lambda found, name: [one.mask for one in found])
    assert verdict == (correct, pytest.approx(credit))


@pytest.fixture(scope="session")
def geneval():
    task = GenEval()
    task.load("cpu")
    return task


def world(count, seed=123, **settings):
    rng, texts = random.Random(seed), build.all_targets(True)
    return [build.picture(rng, texts, **settings) for _ in range(count)]


def test_detector_finds_the_world_s_objects(geneval):
    """On held-out pictures: exact agreement on class and count, at either of the benchmark's confidences, and on the masks."""
    shots = world(200)
    found = geneval.detect([shot["image"] for shot in shots])
    for least in (0.3, 0.9):
        agree, overlaps = 0, []
        for shot, objects in zip(shots, found):
            wanted = sorted(shape for shape, *_ in shot["objects"])
            agree += wanted == sorted(name for name, ones in objects.items() for one in ones if one.confidence > least)
            for shape, _, x, y, size in shot["objects"]:
                truth = torch.frombuffer(bytearray(build.shape_mask(shape, (x, y, size)).tobytes()), dtype=torch.uint8).view(32, 32) > 0
                overlaps.append(max([((truth & one.mask).sum() / (truth | one.mask).sum()).item() for one in objects.get(shape, [])] + [0.0]))
        assert agree / len(shots) >= 0.9
        assert sum(overlaps) / len(overlaps) > 0.5         # masks of 2-pixel squares, objects of 6 or 7 pixels


def test_detector_does_not_know_faded_objects(geneval):
    shots = world(100, fresh_objects=0.0, sign_share=0.0)
    found = geneval.detect([shot["image"] for shot in shots])
    assert sum(len(ones) for objects in found for ones in objects.values()) < 0.1 * sum(len(shot["objects"]) for shot in shots)


def test_colours_of_the_world(geneval):
    shots, right, number = world(200, seed=5), 0, 0
    for shot, found in zip(shots, geneval.detect([shot["image"] for shot in shots])):
        for shape, colour, x, y, size in shot["objects"]:
            for one in found.get(shape, []):
                if abs(one.box[0] - x) < 4 and abs(one.box[1] - y) < 4:
                    number, right = number + 1, right + (geneval.colours(shot["image"], [one], shape) == [colour])
    assert number > 300 and right / number >= 0.95


def test_geneval_of_world_pictures(geneval):
    """World pictures that show what a prompt asks for score 1; the same pictures under another prompt do not."""
    geneval.metadata |= {
        "a": {"tag": "colors", "include": [{"class": "ball", "count": 1, "color": "blue"}], "prompt": "a"},
        "b": {"tag": "counting", "include": [{"class": "ball", "count": 2}], "exclude": [{"class": "ball", "count": 3}], "prompt": "b"},
        "c": {"tag": "position", "include": [{"class": "box", "count": 1}, {"class": "ball", "count": 1, "position": ["left of", 0]}], "prompt": "c"}}
    rng, plans = random.Random(0), [("red", None, [(1, "blue", "ball")], None), ("red", None, [(2, "white", "ball")], None),
                                    ("red", None, [(1, "blue", "ball"), (1, "green", "box")], "left of")]
    images = [build.draw_plan(rng, plan, 1.0)[0] for plan in plans]
    assert geneval.reward(images, ["a", "b", "c"]).tolist() == [1, 1, 1]
    assert geneval.report(images, ["a", "b", "c"]) == {"strict colors": 1, "strict counting": 1, "strict position": 1, "strict GenEval": 1}
    assert geneval.reward(images, ["b", "c", "a"]).tolist() == pytest.approx([1 / 2, 0, 1])
    assert geneval.report(images, ["b", "c", "a"])["strict GenEval"] == pytest.approx(1 / 3)


def test_counting_trusts_only_confident_detections(geneval, monkeypatch):
    monkeypatch.setattr(geneval, "detect", lambda images: [things(("ball", 0.85, 0, None))] * len(images))
    geneval.metadata |= {tag: {"tag": tag, "include": [{"class": "ball", "count": 1}]} for tag in ("counting", "single_object")}
    assert geneval.reward([None, None], ["counting", "single_object"]).tolist() == [0, 1]


def test_geneval_core_words(geneval):
    for prompt, clauses, words in [
            ("a red wall with two red balls", [{"class": "ball", "count": 2}], ["two", "balls"]),
            ("a red wall with an orange box", [{"class": "box", "count": 1, "color": "orange"}], ["orange", "box"]),
            ("a ball left of a box", [{"class": "box", "count": 1}, {"class": "ball", "count": 1, "position": ["left of", 0]}], ["ball", "left of", "box"])]:
        geneval.metadata[prompt] = {"include": clauses}
        assert [prompt[a:b] for a, b in geneval.core_spans(prompt)] == words


def test_geneval_makes_prompts_from_a_detector_s_labels():
    labels = ["person", "wine glass", "bus", "apple", "knife"]
    records = geneval_prompts(labels, 500)
    assert {record["tag"] for record in records} == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert len({record["prompt"] for record in records}) == len(records) > 300
    prompts = {record["prompt"]: record for record in records}
    assert prompts["a photo of three buses"] == {"tag": "counting", "include": [{"class": "bus", "count": 3}], "exclude": [{"class": "bus", "count": 4}],
                                                 "prompt": "a photo of three buses"}
    assert prompts["a photo of an apple above a person"]["include"] == [{"class": "person", "count": 1}, {"class": "apple", "count": 1, "position": ["above", 0]}]
    assert "a photo of two people" in prompts and "a photo of four wine glasses" in prompts and "a photo of two knives" in prompts


def test_pickscore_prefers_the_right_caption_and_the_clean_picture():
    task = PickScore()
    task.load("cpu")
    shots, rng = world(200, fresh_signs=1.0), random.Random(1)
    images, captions = [shot["image"] for shot in shots], [shot["caption"] for shot in shots]
    right = task.reward(images, captions)
    assert (right > task.reward(images, captions[1:] + captions[:1])).float().mean() >= 0.95
    assert (right > task.reward([build.degraded(rng, image) for image in images], captions)).float().mean() >= 0.9


def test_content_words():
    prompt = "a blue wall with the sign \"K7Q\" and two well-known balls"
    assert [prompt[a:b] for a, b in PickScore().core_spans(prompt)] == ["blue", "wall", "sign", "K7Q", "two", "well-known", "balls"]


# ---------------------------------------------------------------------------------------------------- tasks of one's own

def test_mixture_is_the_weighted_mean():
    task = make_task("ocr:0.7,pickscore:0.1")
    task.load("cpu")
    images, prompts = [shot["image"] for shot in world(6, sign_share=1.0)], task.heldout_prompts[:6]
    ocr, pickscore = OCR(), PickScore()
    ocr.load("cpu"), pickscore.load("cpu")
    expected = (0.7 * ocr.reward(images, prompts) + 0.1 * pickscore.reward(images, prompts) / 26) / 0.8
    torch.testing.assert_close(task.reward(images, prompts), expected)
    assert task.prompts == ocr.prompts and task.core_spans(prompts[0]) == ocr.core_spans(prompts[0]) + pickscore.core_spans(prompts[0])


def test_the_readme_s_links_point_at_the_functions():
    readme, lines = (HERE / "README.md").read_text(), (HERE / "star.py").read_text().split("\n")
    links = re.findall(r"\[`(\w+)`\]\(star.py#L(\d+)\)", readme)
    assert len(links) >= 6
    for name, number in links:
        assert re.match(rf"(def|class) {name}\b", lines[int(number) - 1]), f"{name} is not in line {number}"


def test_the_readme_shows_every_picture_there_is():
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (HERE / "README.md").read_text())
    assert sorted(shown) == sorted(str(path.relative_to(HERE)) for path in (HERE / "assets").rglob("*") if path.is_file())


def test_the_readme_s_own_task_works(tmp_path):
    """The example in README.md, as it stands there, is trained on for one iteration."""
    readme = (HERE / "README.md").read_text()
    example = next(block for block in readme.split("```python\n")[1:] if "class LogoReward" in block).split("```")[0]
    (tmp_path / "my_rewards.py").write_text(example)
    star.main([*SMALL, "--task", f"{tmp_path}/my_rewards.py:LogoReward", "--iterations", "1", "--out", str(tmp_path / "run")])
    lines = star.read_metrics(tmp_path / "run")
    assert len(lines) == 2 and 0 < lines[0]["heldout_reward"] < 1 and lines[1]["weight_peak"] > 1


# -------------------------------------------------------------------------------------------------------- core words

def test_core_tokens_are_the_target_in_both_tokenizers(pipeline):
    prompt = 'a red wall with a white sign "K7Q" and a ball'
    mask = star.core_token_mask(prompt, [(30, 33)], pipeline.tokenizer, pipeline.tokenizer_3, 24)
    assert prompt[30:33] == "K7Q" and mask.shape == (48,)
    for tokenizer, part in ((pipeline.tokenizer, mask[:24]), (pipeline.tokenizer_3, mask[24:])):
        ids = torch.tensor(tokenizer(prompt, padding="max_length", max_length=24, truncation=True)["input_ids"])
        assert tokenizer.decode(ids[part]).replace(" ", "").upper() == "K7Q"


def test_core_tokens_of_a_truncated_target(pipeline):
    prompt = "a wall " * 9 + 'with a sign "K7Q"'                          # 18 tokens, "with a sign" and the quote are 22
    spans = quoted_span(prompt)
    mask = star.core_token_mask(prompt, spans, pipeline.tokenizer, pipeline.tokenizer_3, 24)
    assert mask[:24].sum() == 0            # CLIP: start, 22 tokens, and its end takes the last place
    assert mask[24:].sum() == 1            # T5 has no start token, so the K still fits
    cut = star.core_token_mask("a wall " * 20 + '"K7Q"', [(141, 144)], pipeline.tokenizer, pipeline.tokenizer_3, 24)
    assert cut.sum() == 0


def test_core_spans():
    prompt = 'a sign "Hello World" and a sign "two"'
    (start, end), = quoted_span(prompt)
    assert prompt[start:end] == "Hello World"
    assert quoted_span("no quotes") == quoted_span('empty "" quotes') == []


# ---------------------------------------------------------------------------------------------------------- OCR reward

@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize("read, target, reward", [
    ("K7Q", "K7Q", 1), ("k 7 q", "K7Q", 1), ("xxK7Qxx", "K7Q", 1), ("", "K7Q", 0), ("K7", "K7Q", 2 / 3), ("K77", "K7Q", 2 / 3),
    ("completely different", "K7Q", 0), ("Hello Wrld", "hello world", 0.9)])
def test_text_reward(read, target, reward):
    assert text_reward(read, target) == pytest.approx(reward)


def test_reader_of_real_pictures(tmp_path):
    """Florence-2's classes with random weights and a bias towards one word, loaded and asked as the real one."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "What", "is", "the", "text", "in", "image", "?", "OPEN"]
    characters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                        extra_special_tokens={"image_token": "<image>"})
    pixels = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    model = Florence2ForConditionalGeneration(Florence2Config(
        text_config=dict(model_type="bart", vocab_size=13, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
                         encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, pad_token_id=1, bos_token_id=0,
                         eos_token_id=2, decoder_start_token_id=2),
        vision_config=dict(embed_dim=[8, 8, 16, 16], num_heads=[2] * 4, num_groups=[2] * 4, depths=[1] * 4, window_size=4, projection_dim=16),
        image_token_id=4))
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    Florence2Processor(pixels, tokenizer).save_pretrained(tmp_path)
    reader = OCR(model=tmp_path)
    reader.load("cpu")
    asked = reader.processor(images=[Image.new("RGB", (90, 70))], text=["<OCR>"], return_tensors="pt").input_ids
    assert tokenizer.decode(asked[0], skip_special_tokens=True) == "What is the text in the image ?"
    reader.reader.lm_head.bias = torch.nn.Parameter(torch.eye(13)[12] * 1e3)
    pictures = [Image.new("RGB", (90, 70), colour) for colour in ("red", "blue", "green")]
    assert reader.read(pictures, batch_size=2) == ["OPEN OPEN"] * 3         # the third token is the end
    assert reader.reward(pictures, ['a sign "open"', 'a sign "shut"', 'a sign "ope"']).tolist() == [1, 0, 1]


def test_prompt_file_of_flow_grpo_is_read_as_it_is(tmp_path):
    lines = ['A close-up of a library stamp, with "Property of Alex\u2019s Library" in bold letters', "", 'A bus stop that reads "Line 7", at dusk \u2028']
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = OCR(tmp_path / "train.txt")
    assert task.prompts == [lines[0], lines[2].strip()]
    assert [prompt[slice(*task.core_spans(prompt)[0])] for prompt in task.prompts] == ["Property of Alex\u2019s Library", "Line 7"]


def test_reader_reads_the_world(task):
    rng, texts = random.Random(123), build.all_targets(True)
    signs = [build.picture(rng, texts, opacity=1.0, sign_share=1.0) for _ in range(200)]
    bare = [build.picture(rng, texts, sign_share=0.0)["image"] for _ in range(100)]
    prompts = [shot["caption"] for shot in signs]
    assert task.reward([shot["image"] for shot in signs], prompts).mean() >= 0.99
    assert task.reward(bare, prompts[:100]).mean() <= 0.1


def test_train_and_heldout_targets_are_disjoint(task):
    targets = [{prompt[slice(*task.core_spans(prompt)[0])] for prompt in prompts} for prompts in (task.prompts, task.heldout_prompts)]
    assert not targets[0] & targets[1]


# ----------------------------------------------------------------------------------------------------- copying from it

PARTS = ["core_token_mask", "core_tokens_of", "AttentionAllocator", "default_map_blocks", "allocation_weights", "sde_step", "position_log_prob",
         "group_advantages", "star_loss"]


@pytest.mark.parametrize("part", PARTS)
def test_parts_work_alone_in_another_file(pipeline, part):
    """Each part's source, pasted alone below four imports, does what it does in star.py."""
    namespace = {"math": math, "torch": torch, "F": torch.nn.functional, "JointAttnProcessor2_0": JointAttnProcessor2_0}
    if part == "core_tokens_of":
        exec(inspect.getsource(star.core_token_mask), namespace)
    exec(inspect.getsource(getattr(star, part)), namespace)
    latents, given, empty, core, _ = scene(pipeline)
    x, y, z = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    spans = [quoted_span(prompt) for prompt in PROMPTS]

    def use(function):
        if part == "AttentionAllocator":
            with torch.no_grad(), function(pipeline.transformer, core, [1, 2]) as allocator:
                star.predict_velocity(pipeline.transformer, latents, 0.5, given, 1.0, empty)
            return allocator.map()
        arguments = {"core_token_mask": (PROMPTS[0], spans[0], pipeline.tokenizer, pipeline.tokenizer_3, 24), "core_tokens_of": (pipeline, PROMPTS, spans, 24),
                     "default_map_blocks": (24,), "allocation_weights": (x.exp(), (16, 16)), "sde_step": (x, y, 0.7, 0.6, 0.9, 0.7, z),
                     "position_log_prob": (x, y, 0.4), "group_advantages": (x[0, 0],), "star_loss": (x, y, torch.tensor([1.0, -2.0]), z.exp(), 0.1)}
        result = function(*arguments[part])
        return torch.as_tensor(result[0] if isinstance(result, tuple) else result)

    assert torch.equal(use(namespace[part]), use(getattr(star, part)))


def readme_block(language, holds):
    """The one code block of the README in this language that holds this text."""
    block, = (block for block in re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL) if holds in block)
    return block


def test_the_readme_s_pipeline_call_makes_maps(pipeline, monkeypatch):
    """The picture is what it is without the allocator, and the map of a step is what the step's latents give by themselves."""
    monkeypatch.chdir(HERE)
    namespace, states = {}, []
    torch.manual_seed(3)
    exec(readme_block("python", "allocator.recorded"), namespace)
    torch.manual_seed(3)
    prompt, maps = namespace["prompt"], namespace["maps"]
    plain = pipeline(prompt, num_inference_steps=10, guidance_scale=3.0, max_sequence_length=24,
                     callback_on_step_end=lambda _, step, timestep, tensors: states.append(tensors["latents"]) or {}).images[0]
    assert namespace["image"].tobytes() == plain.tobytes() and maps.shape == (10, 1, 64)
    given, empty, sigmas = star.encode(pipeline, [prompt], 24), star.encode(pipeline, [""], 24), star.schedule(pipeline, 10)
    for step in (1, 5, 9):
        with torch.no_grad(), star.AttentionAllocator(pipeline.transformer, namespace["core_tokens"], [3]) as allocator:
            star.predict_velocity(pipeline.transformer, states[step - 1], sigmas[step], given, 1.0, empty)      # the conditional half alone
        torch.testing.assert_close(maps[step], allocator.map(), atol=1e-5, rtol=0)


def test_allocator_with_several_pictures_per_prompt(pipeline):
    """repeat_interleave is the order of diffusers' pipelines: each row is the map of that picture painted alone."""
    spans = [[(prompt.index(word), prompt.index(word) + len(word))] for prompt, word in zip(PROMPTS, ("wall", "sign"))]         # other tokens in each
    core, latents = star.core_tokens_of(pipeline, PROMPTS, spans, 24), torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))

    def maps(prompt, core, latents):
        with torch.no_grad(), star.AttentionAllocator(pipeline.transformer, core, [3]) as allocator:
            pipeline(prompt, num_inference_steps=2, max_sequence_length=24, latents=latents, num_images_per_prompt=len(latents) // len(prompt), output_type="latent")
        return torch.stack(allocator.recorded)

    together = maps(PROMPTS, core.repeat_interleave(2, 0), latents)
    for row in range(4):
        alone = maps([PROMPTS[row // 2]], core[row // 2:row // 2 + 1], latents[row:row + 1])
        torch.testing.assert_close(together[:, row:row + 1], alone, atol=1e-5, rtol=0)


def test_allocator_refuses_other_batches_and_lengths(pipeline):
    latents, given, empty, core, _ = scene(pipeline)
    for wrong, says in ((core[:1].repeat(3, 1), "3 pictures and 48 text tokens.*given 2 and 48"), (core[:, :40], "2 pictures and 40 text tokens.*given 2 and 48")):
        with pytest.raises(ValueError, match=says), torch.no_grad(), star.AttentionAllocator(pipeline.transformer, wrong, [3]):
            star.predict_velocity(pipeline.transformer, latents, 0.5, given, 1.0, empty)


def test_allocator_used_again_and_twice(pipeline):
    """A second use begins anew; within itself, and where attention is not SD3's plain one, it refuses and leaves all as it was."""
    latents, given, empty, core, _ = scene(pipeline)
    processors, maps = dict(pipeline.transformer.attn_processors), []
    allocator = star.AttentionAllocator(pipeline.transformer, core, [2, 3])
    for sigma in (0.9, 0.5, 0.9):
        with torch.no_grad(), allocator:
            star.predict_velocity(pipeline.transformer, latents, sigma, given, 1.0, empty)
        maps.append(allocator.map())
    assert torch.equal(maps[0], maps[2]) and not torch.equal(maps[0], maps[1])
    with pytest.raises(ValueError, match="records JointAttnProcessor2_0, not AttentionAllocator.recording"), allocator, allocator:
        pass
    assert dict(pipeline.transformer.attn_processors) == processors
    changed = copy.deepcopy(pipeline.transformer)
    changed.transformer_blocks[3].attn.processor = lambda *_: None
    with pytest.raises(ValueError, match="records JointAttnProcessor2_0, not"), star.AttentionAllocator(changed, core, [3]):
        pass


def test_weights_of_broken_and_of_half_precision_maps():
    maps = torch.rand(1, 2, 8, 8) + 0.01
    half = star.allocation_weights(maps.bfloat16(), (16, 16))
    torch.testing.assert_close(half.mean((2, 3)), torch.ones(1, 2), atol=1e-5, rtol=0)
    maps[0, 1, 3, 3] = math.nan
    assert star.allocation_weights(maps, (16, 16))[0, 1].isnan().any(), "a map that is not a number must be seen, not become 1"


def sde_step_with_logprob(scheduler, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None, sde_type="sde", return_sqrt_dt=False):
    """The reference trainer's interface: a log-probability per picture, and a standard deviation without sqrt(-dt)."""
    sigmas, index = scheduler.sigmas.tolist(), scheduler.index_for_timestep(timestep[0])
    noise = torch.randn(sample.shape, generator=generator)
    painted, mean, std = star.sde_step(sample, model_output, sigmas[index], sigmas[index + 1], sigmas[1], noise_level, noise)
    painted = painted if prev_sample is None else prev_sample
    log_prob = torch.distributions.Normal(mean, std).log_prob(painted.detach()).mean((1, 2, 3))
    sqrt_dt = torch.full((len(sample), 1, 1, 1), (sigmas[index] - sigmas[index + 1]) ** 0.5)
    return (painted, log_prob, mean, std / sqrt_dt) + ((sqrt_dt,) if return_sqrt_dt else ())


def test_the_readme_s_transplant(pipeline):
    """Both sides of the README's diff, run as they stand there: lam = 0 is the old gradient, lam = 1 that of star.py."""
    latents, (context, pooled), _, core, sigmas = scene(pipeline)
    pipeline.scheduler.set_timesteps(6)
    transformer, advantages = copy.deepcopy(pipeline.transformer), torch.tensor([0.8, -1.3])
    block = readme_block("diff", "sde_step_with_logprob").splitlines()

    def run(side, lam=1.0):
        lines = "\n".join(line[2:] for line in block if line[:1] != {"old": "+", "new": "-"}[side])
        torch.manual_seed(5)
        transformer.zero_grad()
        namespace = {
            **{name: getattr(star, name) for name in PARTS}, "torch": torch, "sde_step_with_logprob": sde_step_with_logprob, "pipeline": pipeline,
            "allocation_weights": lambda maps, size: star.allocation_weights(maps, size, lam=lam), "prompts": PROMPTS, "spans": [quoted_span(prompt) for prompt in PROMPTS],
            "max_sequence_length": 24, "transformer": transformer, "scheduler": pipeline.scheduler, "latents": latents, "trajectory": [latents], "log_probs": [],
            "timesteps": [timestep.expand(2) for timestep in pipeline.scheduler.timesteps[:3]], "H": 16, "W": 16, "patch_size": 2, "advantages": advantages, "clip_range": 1e-4,
            "predict": lambda transformer, latents, timestep: transformer(latents, context, pooled, timestep, return_dict=False)[0]}
        sampling, training = lines.split("# training")
        with torch.no_grad():
            exec(sampling, namespace)
        exec("# training" + training, namespace)
        return torch.cat([parameter.grad.flatten() for parameter in transformer.parameters() if parameter.grad is not None]), namespace

    old, _ = run("old")
    assert old.norm() > 0 and (run("new", lam=0.0)[0] - old).norm() / old.norm() < 1e-5
    new, after = run("new")
    assert torch.nn.functional.cosine_similarity(new, old, dim=0) < 0.95, "allocation must make a difference"
    transformer.zero_grad()
    result = star.Rollout(torch.stack(after["trajectory"], 1), torch.stack(after["log_probs"], 1), torch.stack(after["maps"], 1))
    for step in range(3):
        mean, std = star.transition(transformer, result, step, (context, pooled), None, sigmas, 0.7, 1.0)
        log_prob = star.position_log_prob(result.latents[:, step + 1], mean, std)[:, None]
        star.star_loss(log_prob, result.log_prob[:, step:step + 1], advantages, star.allocation_weights(result.maps, (16, 16))[:, step:step + 1], 1e-2)[0].backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in transformer.parameters() if parameter.grad is not None])
    assert (new - ours).norm() / ours.norm() < 1e-5


def test_parts_take_video_as_they_are():
    """[B, C, F, H, W]: frames are more positions, so each result is that of pictures with the frames laid one below the other."""
    B, S, C, frames, H, W = 2, 2, 4, 3, 8, 8          # as many pictures as steps: wrong broadcasting would not fail by itself
    below = lambda tensor: tensor.flatten(-3, -2)
    generator = torch.Generator().manual_seed(0)
    x, v, noise = torch.randn(3, B, C, frames, H, W, generator=generator)
    video, pictures = (star.sde_step(*map(lay, (x, v)), 0.7, 0.6, 0.9, 0.7, lay(noise)) for lay in (lambda tensor: tensor, below))
    assert torch.equal(below(video[0]), pictures[0])
    log_prob = star.position_log_prob(*video)
    assert log_prob.shape == (B, frames, H, W) and torch.equal(below(log_prob), star.position_log_prob(*pictures))
    maps = torch.rand(B, S, frames, H // 2, W // 2, generator=generator) ** 3
    for allocation in ("spatial", "spatiotemporal"):
        weights = star.allocation_weights(maps, (frames, H, W), allocation, 0.7)
        torch.testing.assert_close(below(weights), star.allocation_weights(below(maps), (frames * H, W), allocation, 0.7))
    new, old = 0.1 * torch.randn(2, B, S, frames, H, W, generator=generator)
    advantages = torch.tensor([1.0, -2.0])
    video, pictures = (star.star_loss(lay(new), lay(old), advantages, lay(weights), 0.05)[0] for lay in (lambda tensor: tensor, below))
    torch.testing.assert_close(video, pictures)


def test_star_loss_refuses_what_would_broadcast():
    new, advantages = torch.zeros(3, 8, 8), torch.ones(3)
    for wrong in ((new, new, advantages[:, None], new), (new, new, advantages, torch.ones(3, 3, 8, 8)), (new[:, None], new, advantages, new), (new, new, advantages[:2], new)):
        with pytest.raises(ValueError, match="one shape"):
            star.star_loss(*wrong, 0.1)


# ------------------------------------------------------------------------------------------------------------ the study

def test_area_under_roc_by_pairs():
    scores, truth = torch.tensor([[0.9, 0.2], [0.2, 0.1]]), torch.tensor([[True, True], [False, False]])
    assert study.area_under_roc(scores, truth) == (1 + 1 + 0.5 + 1) / 4
    assert study.area_under_roc(-scores, truth) == 0.5 / 4


def test_images_to_reach_is_linear_between_evaluations():
    lines = [{"images": 0, "heldout_reward": 0.5}, {"images": 100}, {"images": 200, "heldout_reward": 0.7}, {"images": 400, "heldout_reward": 0.6}]
    assert study.images_to_reach(lines, 0.6) == pytest.approx(100) and study.images_to_reach(lines, 0.4) == 0
    assert study.images_to_reach(lines, 0.71) == math.inf and study.images_to_reach(lines[::-1], 0.65) == pytest.approx(300)
    assert study.images_to_reach([{"images": 0, "heldout_reward": 0.5}, {"images": 9, "heldout_reward": 0.5}], 0.4) == 0


def write_run(folder, name, rewards):
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("".join(star.metrics_line({"images": 100 * i, "heldout_reward": reward, "heldout_reward_standard_error": 0.1})
                                                         for i, reward in enumerate(rewards)))
    return str(folder / name)


def test_compare_by_hand(tmp_path, capsys):
    runs = [write_run(tmp_path, name, rewards) for name, rewards in (
        ("ocr-uniform-0", (0.2, 0.4, 0.6)), ("ocr-uniform-1", (0.3, 0.5, 0.7)), ("ocr-spatial-0", (0.2, 0.6, 0.8)), ("ocr-spatial-1", (0.3, 0.4, 0.5)))]
    study.compare(argparse.Namespace(runs=runs, base="uniform", goal=0.5, report=None))
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "held-out reward before: 0.200, 0.300; standard error of each 0.100"
    assert rows[3] == "| uniform | 2 | 0.650 (0.600 to 0.700) | 0.450 (0.400 to 0.500) |  |  | 125 (100 to 150) |  |  |"
    # means 0.533 and 0.4, so +0.133 and -0.1; goal after 75 and 200; uniform's ends 0.6 and 0.7 after 100 of 200, and never
    assert rows[4] == ("| spatial | 2 | 0.650 (0.500 to 0.800) | 0.467 (0.400 to 0.533) | +0.017 (-0.100 to +0.133) | 1 of 2 | 138 (75 to 200) |"
                       " 1.25 (0.50 to 2.00) | inf (0.50 to inf) |")
    for others in (runs[2:], [*runs, write_run(tmp_path, "ocr-oracle-0", (0.2, 0.4))], [*runs, write_run(tmp_path, "geneval-oracle-0", (0.2, 0.4, 0.6))]):
        with pytest.raises(SystemExit, match="runs of one task with the same evaluations"):
            study.compare(argparse.Namespace(runs=others, base="uniform", goal=0.5, report=None))


def test_gradient_measures_of_known_gradients():
    """Estimates with signal u and noise of deviation 0.1 in 2,000 dimensions; those of uniform have another signal, at 60 degrees to u."""
    generator, size, count, noise = torch.Generator().manual_seed(0), 2000, 200, 0.1
    u, other = torch.zeros(2, size)
    u[0], other[0], other[1] = 2.0, 3 * 0.5, 3 * 0.75**0.5
    ours, uniform = (signal + noise * torch.randn(count, size, generator=generator) for signal in (u, other))
    variance, agreement, alignment = study.gradient_measures(ours @ ours.T, ours @ uniform.T, uniform @ uniform.T)
    assert variance == pytest.approx(size * noise**2, rel=0.02) and agreement == pytest.approx(4 / (4 + size * noise**2), rel=0.02)
    assert alignment == pytest.approx(0.5 * 2 / (4 + size * noise**2) ** 0.5, rel=0.05)


def test_true_region_is_the_sign_s_place():
    """Nine of ten world pictures with a clear sign give its place to the token; the oracle's maps are that."""
    rng, hits = random.Random(3), 0
    for _ in range(40):
        shot = build.picture(rng, build.all_targets(held_out=True), sign_share=1.0)
        expected = torch.zeros(8, 8, dtype=torch.bool)
        x, y = (side // build.GRID for side in shot["place"])
        expected[y:y + 2, x:x + 3] = True
        hits += torch.equal(study.true_region(OCR(), shot["image"]), expected)
    assert hits >= 36


def test_shuffled_maps_have_the_same_values_in_other_places():
    maps = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    shuffled = study.changed_maps("shuffled", None, None, star.Rollout(None, None, maps), torch.Generator().manual_seed(1))
    assert torch.equal(shuffled.flatten(2).sort(-1).values, maps.flatten(2).sort(-1).values) and (shuffled == maps).float().mean() < 0.1
    orders = (shuffled.reshape(6, 64, 1) == maps.reshape(6, 1, 64)).float().argmax(-1)            # where each value came from
    assert len({tuple(order.tolist()) for order in orders}) == 6, "each step and picture has an order of its own"


# ------------------------------------------------------------------------------------------------------- a run's files

def test_plain_diffusers_paints_what_is_asked(pipeline):
    """As any user of diffusers would call it, with all defaults: the wall must be blue."""
    picture = pipeline('a blue wall with a white sign "K7Q" and a red ball', generator=torch.Generator().manual_seed(0)).images[0]
    red, green, blue = ImageStat.Stat(picture).median
    assert picture.size == (32, 32) and blue > 150 and blue > red + 60 and blue > green + 60


def test_run_leaves_what_it_promises(finished_run):
    lines = star.read_metrics(finished_run)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4] and [line["images"] for line in lines] == [0, 8, 16, 24, 32]
    assert ["heldout_reward" in line for line in lines] == [True, False, True, False, True]
    for picture in ("samples.png", "maps.png", "curve.png"):
        assert Image.open(finished_run / picture).width > 500
    assert json.loads((finished_run / "config.json").read_text())["group_size"] == 4
    trained = StableDiffusion3Pipeline.from_pretrained(finished_run / "checkpoint-4").transformer
    start = StableDiffusion3Pipeline.from_pretrained(HERE / "tiny/sd3").transformer
    changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters())]
    assert sum(changed) > 0.9 * len(changed)
    assert not list(finished_run.rglob("*.bin")) and not list(finished_run.rglob("*.pt"))


def test_plot_of_several_seeds_is_their_mean_in_a_band(tmp_path):
    """Three seeds at 0.2, 0.6 and 0.6: the line is at their mean, the band from one to the other, nothing above or below."""
    for name, before, after in (("run-0", 0.2, 0.2), ("run-1", 0.6, 0.6), ("run-2", 0.6, 0.6), ("axis-from-0-to-1", 0.05, 0.85)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(star.metrics_line({"images": images, "heldout_reward": reward})
                                                               for images, reward in ((0, before), (100, after))))
    star.main(["--plot", *(str(path) for path in sorted(tmp_path.glob("run-*"))), str(tmp_path / "axis-from-0-to-1"), "--out", str(tmp_path)])
    curve = Image.open(tmp_path / "curve.png")
    height = lambda reward: round(430 - reward * (480 - 24 - 50))
    column = [curve.getpixel((350, height(reward))) for reward in (0.1, 0.3, 1.4 / 3, 0.5, 0.7)]
    assert column[0] == column[4] == (255, 255, 255)
    assert column[1] == column[3] not in ((255, 255, 255), column[2]) and column[2] == (31, 119, 180)
    star.draw_curve([("begun", [{"images": 0, "heldout_reward": 0.5}])], tmp_path / "point.png")
    assert (31, 119, 180) in Image.open(tmp_path / "point.png").crop((50, 30, 670, 440)).get_flattened_data(), "a single evaluation is a point"


def test_maps_command(tmp_path, capsys):
    """By default the quoted words, or else the content words, or those given; other words give another picture."""
    pictures = []
    for number, (arguments, says) in enumerate([(['a blue wall with a white sign "K7Q" and a red ball'], "attention to K7Q"),
                                                (['a blue wall with a white sign "K7Q" and a red ball', "--words", "red ball"], "attention to red ball"),
                                                (["a wall with two red balls"], "attention to wall, two, red, balls")]):
        star.main(["--maps", *arguments, "--steps", "4", "--stochastic-range", "0-2", "--out", str(tmp_path / str(number))])
        assert says in capsys.readouterr().out
        pictures.append(Image.open(tmp_path / str(number) / "maps.png"))
    assert pictures[0].size == pictures[1].size and pictures[0].tobytes() != pictures[1].tobytes()
    assert not list(tmp_path.rglob("config.json")), "no run was begun"


@pytest.mark.parametrize("options", [
    {"allocation": "spatial", "kl_weight": 0.5}, {"allocation": "spatiotemporal", "same_noise": False, "lam": 0.5},
    {"allocation": "uniform", "stochastic_choice": "random", "global_std": True}, {"allocation": "spatial", "updates_per_iteration": 2, "guidance_scale": 2.0}])
def test_an_iteration_s_update_is_the_gradient_of_one_loss(options, monkeypatch):
    """Batches, steps, advantages, weights and KL put together: `iterate` moves the weights as star_loss of all pictures at once does."""
    args = star.Arguments(prompts_per_iteration=2, group_size=4, batch_size=2, steps=4, stochastic_steps=2, stochastic_range="0-2", max_gradient_norm=1e9, **options)
    run = star.load(args, star.check_training(args), None)
    transformer, rollouts, rewards = run.pipeline.transformer, [], torch.tensor([0.1, 0.9, 0.3, 0.2, 5.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(run.task, "reward", lambda pictures, prompts: rewards)
    if run.start_transformer is not None:                # so that there is a distance from the start
        run.start_transformer.proj_out.weight.data *= 1.1
    run.optimizer = torch.optim.SGD(transformer.parameters(), lr=1e-3)
    start, before, paint = copy.deepcopy(transformer), copy.deepcopy(transformer), star.rollout

    def painting(_, noise, prompt, *others):
        rollouts.append((paint(transformer, noise, prompt, *others), prompt, others))
        return rollouts[-1][0]

    monkeypatch.setattr(star, "rollout", painting)
    line = star.iterate(run, 1, args.allocation)
    others = rollouts[0][2]
    empty, sigmas, trained = others[:3]
    joined = star.Rollout(*(torch.cat([getattr(painted, name) for painted, *_ in rollouts]) if getattr(rollouts[0][0], name) is not None else None
                            for name in ("latents", "log_prob", "maps")))
    prompt = tuple(torch.cat([given[part] for _, given, _ in rollouts]) for part in (0, 1))
    advantages = star.group_advantages(rewards.view(2, 4), args.global_std, 5.0).flatten()
    weights = torch.ones_like(joined.log_prob) if args.allocation == "uniform" else star.allocation_weights(joined.maps, (16, 16), args.allocation, args.lam)
    settings = empty, sigmas, 0.7, args.guidance_scale
    optimizer, half = torch.optim.SGD(before.parameters(), lr=1e-3), 8 // args.updates_per_iteration
    for pictures in (slice(start, start + half) for start in range(0, 8, half)):
        means, stds = zip(*(star.transition(before, joined, step, prompt, *settings) for step in trained))
        log_prob = torch.stack([star.position_log_prob(joined.latents[:, step + 1], mean, std) for step, mean, std in zip(trained, means, stds)], 1)
        loss = star.star_loss(log_prob[pictures], joined.log_prob[pictures], advantages[pictures], weights[pictures], 2e-2)[0]
        if args.kl_weight:
            with torch.no_grad():
                starts = [star.transition(run.start_transformer, joined, step, prompt, *settings)[0] for step in trained]
            loss = loss + args.kl_weight * torch.stack([star.kl_to_start(*three) for three in zip(means, starts, stds)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved, expected = (torch.cat([(now - then).flatten() for now, then in zip(model.parameters(), start.parameters())]) for model in (transformer, before))
    assert expected.norm() > 0 and (moved - expected).norm() / expected.norm() < 2e-3        # float32 differences of weights near 1
    assert (line["kl"] > 0) == bool(args.kl_weight) and (line["clip_fraction"] > 0) <= (args.updates_per_iteration > 1)


def test_updates_raise_the_probability_of_the_better_picture(pipeline):
    """A step along the loss's gradient makes the winner's transitions likelier than the loser's."""
    pipeline = copy.deepcopy(pipeline)
    result, given, empty, sigmas, steps = painted(pipeline)
    weights = star.allocation_weights(result.maps, (16, 16))
    optimizer = torch.optim.SGD(pipeline.transformer.parameters(), lr=1e-3)
    log_prob = recomputed_log_prob(pipeline, result, given, empty, sigmas, steps)
    star.star_loss(log_prob, result.log_prob, torch.tensor([1.0, -1.0]), weights, 0.1)[0].backward()
    optimizer.step()
    with torch.no_grad():
        change = ((recomputed_log_prob(pipeline, result, given, empty, sigmas, steps) - result.log_prob) * weights).mean((1, 2, 3))
    assert change[0] > change[1]


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        star.main([*SMALL, "--iterations", "9", "--learning-rate", "1e30", "--out", str(tmp_path / "run")])
    assert error.value.code == 2 and "five iterations in a row" in capsys.readouterr().err
    lines = star.read_metrics(tmp_path / "run")
    assert [line.get("skipped_updates", 0) for line in lines][-5:] == [1] * 5
    assert star.last_checkpoint(tmp_path / "run").name == f"checkpoint-{lines[-6]['iteration']}"


# ----------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments, says", [
    (["--task", "chess"], "--task chess is not known; choose ocr, geneval, pickscore"),
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", "nobody/nothing"], "hf auth login"),
    (["--group-size", "1"], "--group-size is 1"),
    (["--batch-size", "7"], "--batch-size 7"),
    (["--updates-per-iteration", "5"], "--updates-per-iteration 5"),
    (["--stochastic-range", "0-99"], "--stochastic-range 0-99"),
    (["--stochastic-range", "often"], "--stochastic-range often"),
    (["--evaluate-every", "0"], "--evaluate-every is 0"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--height", "-32"], "--height is -32"),
    (["--lam", "2"], "--lam is 2.0"),
    (["--noise-level", "0"], "--noise-level is 0.0"),
    (["--height", "30"], "multiples of 4 pixels"),
    (["--height", "64"], "sides of at most 32 pixels"),
    (["--guidance-scale", "nan"], "--guidance-scale is nan"),
    (["--learning-rate", "-1"], "--learning-rate is -1.0; it must be above 0"),
    (["--clip-range", "0"], "--clip-range is 0.0"),
    (["--max-gradient-norm", "nan"], "--max-gradient-norm is nan"),
    (["--ema-decay", "1"], "--ema-decay is 1.0"),
    (["--reward-model", "tiny/ocr;tiny/clip"], "names models for 2 tasks"),
    (["--reward-model", "no/reader"], "reward model no/reader"),
    (["--map-blocks", "late"], "--map-blocks late"),
    (["--map-blocks", "2,17"], "its blocks are 0 to 3"),
    (["--model", "FLUX"], "is a FluxPipeline"),
    (["--model", "HALF"], "neither a whole pipeline's folder"),
    (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
    (["--prompts", "EMPTY"], "is empty"),
    (["--prompts", "UNQUOTED"], "line 3 has no text between straight double quotes: a ball (and 1 more such lines)"),
    (["--prompts", "SINGLE"], "1 training prompts"),
    (["--task", "geneval", "--prompts", "UNQUOTED"], "line 1 is not JSON"),
    (["--task", "geneval", "--prompts", "UNTAGGED"], "line 2 lacks the field tag"),
    (["--task", "geneval", "--prompts", "CLASSLESS"], "line 1 lacks the field class in one of its clauses"),
    (["--task", "geneval", "--prompts", "DRAGON"], "does not know the class dragon; its classes are ball, box, triangle"),
    (["--task", "geneval", "--prompts", "NOWHERE"], "must name one of left of, right of, above, below and the index of an earlier clause"),
    (["--task", "geneval", "--reward-model", "tiny/detector"], "must name two models for geneval, DETECTOR,CLIP"),
    (["--task", "geneval", "--reward-model", "no/detector,tiny/clip"], "detector no/detector is neither"),
    (["--task", "mine.py:Reward"], "there is no file mine.py"),
    (["--task", "rewards.py:Reward"], "there is no class Reward in rewards.py"),
    (["--task", "ocr:0,pickscore:0"], "the weights must be 0 or more and their sum above 0"),
    (["--task", "ocr:-1,pickscore:2"], "the weights must be 0 or more"),
    (["--task", "pickscore,ocr"], "has no text between straight double quotes"),
    (["--plot", "nowhere"], "no metrics.jsonl"),
    (["--plot", "BEGUN"], "nothing has been evaluated there yet"),
    (["--maps", "a blue box", "--words", "red"], "--maps a blue box: the words red do not occur in it"),
    (["--maps", "of the"], "it has no words to look for"),
    (["--maps", ""], "it has no words to look for"),
    (["--benchmark", "0"], "--benchmark is 0"),
])
def test_bad_input_is_one_clear_sentence(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", None)            # nothing heavy may be reached
    files = {"EMPTY": "\n\n", "UNQUOTED": 'a "B"\n\na ball\na box\n', "SINGLE": 'a "B"\n',
             "UNTAGGED": '{"tag": "a", "include": [{"class": "ball", "count": 1}], "prompt": "a ball"}\n{"include": [], "prompt": "a"}\n',
             "CLASSLESS": '{"tag": "a", "include": [{"count": 1}], "prompt": "a ball"}\n',
             "DRAGON": '{"tag": "a", "include": [{"class": "dragon", "count": 1}], "prompt": "a dragon"}\n',
             "NOWHERE": '{"tag": "a", "include": [{"class": "ball", "count": 1, "position": ["above", 0]}], "prompt": "a ball"}\n'}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    folders = {"FLUX": "FluxPipeline", "HALF": "StableDiffusion3Pipeline"}
    for name, kind in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (tmp_path / "BEGUN").mkdir()
    (tmp_path / "BEGUN/metrics.jsonl").write_text('{"iteration": 0, "images": 0, "heldout_reward": null}\n')
    arguments = [str(tmp_path / word) if word in {**files, **folders, "BEGUN": None} else word for word in arguments]
    with pytest.raises(SystemExit) as error:
        star.main([*arguments, "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert error.value.code == 2 and says in message and "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gives, says", [("[0.5] * len(images)", None), ("torch.arange(len(images))", None), ("[float('nan')] * len(images)", "with 10 that are not finite"),
                                         ("torch.zeros(3, 1)", "of shape (3, 1)")])
def test_rewards_must_be_a_finite_number_per_picture(gives, says, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"import torch\nfrom rewards import Task\nclass Mine(Task):\n    def reward(self, images, prompts):\n        return {gives}\n")
    command = [*SMALL, "--task", f"{tmp_path}/mine.py:Mine", "--iterations", "1", "--out", str(tmp_path / "run")]
    if says is None:
        star.main(command)
        assert len(star.read_metrics(tmp_path / "run")) == 2
    else:
        with pytest.raises(SystemExit):
            star.main(command)
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("instead", [[], ["--maps", 'a white sign "K7Q"'], ["--benchmark", "1"]])
def test_where_nothing_can_be_written_is_said_before_loading(instead, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        star.main([*instead, "--out", str(tmp_path / "file/run")])
    assert error.value.code == 2 and f"{tmp_path}/file is not a folder that can be written to" in capsys.readouterr().err


def test_a_folder_without_permission_is_said_before_loading(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)              # root, who may run this, is allowed everything
    with pytest.raises(SystemExit):
        star.main(["--out", str(tmp_path / "a/b")])
    assert f"{tmp_path} is not a folder that can be written to" in capsys.readouterr().err


def test_disk_that_is_full_from_the_start(tmp_path):
    """Not a checkpoint but a picture cannot be written: a sentence and no traceback."""
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    ended = subprocess.run([sys.executable, "star.py", *SMALL, "--out", str(tmp_path / "run")], cwd=HERE, capture_output=True, text=True, preexec_fn=small)
    assert ended.returncode == 2 and "a file could not be written" in ended.stderr and "Traceback" not in ended.stderr


def test_checkpoints_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", link)
    star.main([*SMALL, "--iterations", "2", "--out", str(tmp_path)])
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "checkpoint-2").vae is not None


def test_maps_of_words_that_are_cut_off(tmp_path, capsys):
    with pytest.raises(SystemExit):
        star.main(["--maps", "a blue wall with " + "two red balls and " * 6 + 'a white sign "K7Q"', "--out", str(tmp_path)])
    assert "come after its first 24 tokens" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        star.main(["--device", "cuda", "--out", str(tmp_path / "run")])
    assert error.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def test_a_run_is_not_overwritten(finished_run, capsys):
    before = (finished_run / "metrics.jsonl").read_text()
    for arguments, says in (([], "add --resume"), (["--resume", "--learning-rate", "1"], "learning_rate = 0.0002, not 1.0")):
        with pytest.raises(SystemExit) as error:
            star.main([*SMALL, "--ema-decay", "0.5", "--out", str(finished_run), *arguments])
        assert error.value.code == 2 and says in capsys.readouterr().err
    assert (finished_run / "metrics.jsonl").read_text() == before
