"""What README.md, study/TRANSPLANT.md and docstrings show: their code, and other trainers."""

import copy
import math
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Normal
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent.parent))
import star
from star import AttentionAllocator, allocation_weights, position_log_prob, sde_step, star_loss
from test_star import PROMPTS, SIZE, SPANS, Scene, build, code_block, difference, gradient, pipe

assert pipe  # a fixture


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_change_to_flow_grpo(pipe, guidance):
    """Both sides of the transplant's diff as they stand. The old one is Flow-GRPO's objective: one
    scalar ratio per image and step, and no gradient through the unconditional half. With lam = 0
    the gradient is the same, else it is star.py's."""
    pipeline = copy.deepcopy(pipe)
    scene = Scene(pipeline, guidance)
    scene.steps = range(3)
    sigmas = scene.policy.sigmas
    scheduler = pipeline.scheduler
    advantages = torch.tensor([0.8, -1.3])
    context, pooled = scene.prompt
    empty_context, empty_pooled = scene.policy.empty_prompt
    both_contexts = torch.cat([empty_context.expand_as(context), context])
    both_pooled = torch.cat([empty_pooled.expand_as(pooled), pooled])

    def predict(transformer, latents, timestep):
        latents = torch.cat([latents] * 2)
        timestep = torch.cat([timestep] * 2)
        output = transformer(latents, both_contexts, both_pooled, timestep, return_dict=False)
        unconditional, conditional = output[0].chunk(2)
        unconditional = unconditional.detach()
        return unconditional + guidance * (conditional - unconditional)

    def sde_step_with_logprob(scheduler, velocity, timestep, latents, prev_sample=None):
        """flow_grpo's interface: a log-probability per image, and a std without sqrt(-dt)."""
        k = scheduler.index_for_timestep(timestep[0])
        mean, std = sde_step(latents, velocity, sigmas[k], sigmas[k + 1], sigmas[1], 0.7)
        sample = prev_sample
        if sample is None:
            sample = mean + std * torch.randn(latents.shape)
        log_prob = Normal(mean, std).log_prob(sample).mean((1, 2, 3))
        std_dev_t = torch.full((2, 1, 1, 1), std / math.sqrt(sigmas[k] - sigmas[k + 1]))
        return sample, log_prob, mean, std_dev_t

    diff = code_block("study/TRANSPLANT.md", "diff", "sde_step_with_logprob").split("\n")

    def run(other_side, lam):
        """The gradient of a side of the diff, and the names that it has defined."""

        def weights_of(maps, size):
            return allocation_weights(maps, size, lam=lam)

        names = {
            "torch": torch,
            "predict": predict,
            "sde_step_with_logprob": sde_step_with_logprob,
            "core_tokens_of": star.core_tokens_of,
            "AttentionAllocator": AttentionAllocator,
            "allocation_weights": weights_of,
            "position_log_prob": position_log_prob,
            "star_loss": star_loss,
            "pipeline": pipeline,
            "transformer": scene.transformer,
            "scheduler": scheduler,
            "timesteps": scheduler.timesteps[:3, None].expand(3, 2),
            "prompts": PROMPTS,
            "spans": SPANS,
            "max_sequence_length": build.TOKENS,
            "latents": scene.noise,
            "trajectory": [scene.noise],
            "log_probs": [],
            "advantages": advantages,
            "clip_range": 1e-4,
            "H": 16,
            "W": 16,
            "patch_size": 2,
        }
        lines = "\n".join(line[2:] for line in diff if line[:1] != other_side)
        sampling, training = lines.split("# training")
        torch.manual_seed(5)
        scene.transformer.zero_grad()
        with torch.no_grad():
            exec(sampling, names)
        exec(training, names)
        return gradient(scene.transformer), names

    old, _ = run("+", lam=1.0)
    same, _ = run("-", lam=0.0)
    assert difference(same, old) < 1e-5
    new, names = run("-", lam=1.0)
    assert F.cosine_similarity(new, old, dim=0) < 0.95  # allocation makes a difference

    samples = scene.rollout(recorded=[])
    samples.latents = names["trajectory"]
    weights = allocation_weights(torch.stack(names["maps"], dim=1), SIZE, lam=1.0)
    scene.transformer.zero_grad()
    log_prob = scene.log_prob(samples)
    old_log_prob = torch.stack(names["log_probs"], dim=1)
    loss, _, _ = star_loss(log_prob, old_log_prob, advantages, weights, 1e-2)
    loss.backward()
    assert difference(new, 3 * gradient(scene.transformer)) < 1e-5  # the sum over three steps


def test_maps_of_a_compiled_block(pipe):
    """With guards on hooks, also if the block was called before and with later allocators."""
    plain = Scene(pipe)
    compiled = Scene(copy.deepcopy(pipe))
    compiled.transformer.transformer_blocks[3].compile(backend="aot_eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        with torch.no_grad():
            compiled.velocity()
        for core in [plain.core, ~plain.core]:
            plain.core = core
            compiled.core = core
            ours = compiled.rollout()
            theirs = plain.rollout()
            assert_close(ours.maps, theirs.maps)
            assert_close(ours.latents, theirs.latents, atol=1e-3, rtol=1e-3)
    torch._dynamo.reset()


def test_parts_take_video():
    """[B, C, F, H, W] gives what an image gives that has the frames one below the other."""
    latents, velocity, noise = torch.randn(3, 2, 4, 3, 8, 8)
    maps = torch.rand(2, 2, 3, 4, 4)

    def results(latents, velocity, noise, maps, size):
        mean, std = sde_step(latents, velocity, 0.7, 0.6, 0.9, 0.7)
        log_prob = position_log_prob(mean + std * noise, mean, std)
        weights = allocation_weights(maps, size, "spatiotemporal")
        loss, _, _ = star_loss(0.9 * log_prob, log_prob, torch.eye(2)[0], weights[:, 0], 0.05)
        return mean.flatten(), log_prob.flatten(), weights.flatten(), loss

    video = results(latents, velocity, noise, maps, size=(3, 8, 8))
    below = [tensor.flatten(-3, -2) for tensor in [latents, velocity, noise, maps]]
    assert_close(video, results(*below, size=(24, 8)))


def test_the_pipeline_call_in_the_readme(pipe):
    """The image is what it is without the allocator; maps are those of the latents of each step."""
    names = {}
    torch.manual_seed(3)
    exec(code_block("README.md", "python", "AttentionAllocator"), names)
    states = []

    def keep(pipeline, k, timestep, values):
        states.append(values["latents"])
        return {}

    torch.manual_seed(3)
    plain = pipe(
        names["prompt"],
        num_inference_steps=10,
        guidance_scale=3.0,
        max_sequence_length=build.TOKENS,
        callback_on_step_end=keep,
    )
    assert names["image"].tobytes() == plain.images[0].tobytes()
    assert len(names["maps"]) == 10
    scene = Scene(pipe)  # without guidance, which leaves the conditional half
    pipe.scheduler.set_timesteps(10)
    scene.policy.sigmas = pipe.scheduler.sigmas.tolist()
    scene.prompt = star.encode(pipe, [names["prompt"]], 20)
    for k in [1, 5, 9]:
        assert_close(names["maps"][k], scene.map(states[k - 1], k, names["core_tokens"]))


def test_the_call_of_the_result_in_the_readme(tmp_path, monkeypatch):
    """The miniature before training stands for the result. It paints what the prompt asks for."""
    folder = tmp_path / "runs/ocr-spatiotemporal-0/pipeline"
    shutil.copytree("tiny/sd3", folder)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    exec(code_block(Path(__file__).parent.parent / "README.md", "python", "image.save"), {})
    red, green, blue = numpy.median(Image.open("sign.png"), (0, 1))
    assert blue > 60 + max(red, green)  # the prompt asks for a blue wall
