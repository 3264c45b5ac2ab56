"""What must be true of STAR, checked on closed forms and on the trained miniature.

The tests with numbers hold the nine facts that the method promises.
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
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network

import diffusers
import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import rewards
import star
from rewards import OCR, Detection, GenEval, UserError, make_task, quoted_span, scores
from star import AttentionAllocator, allocation_weights, position_log_prob, sde_step, star_loss

sys.path.insert(0, str(Path(__file__).parent / "tiny"))
import build  # the world that the miniatures were trained on

os.chdir(Path(__file__).parent)  # names such as tiny/sd3 start here
PROMPTS = ['a blue wall with a white sign "K7Q" and a red ball', 'a green wall, a pink sign "2FX"']
SPANS, SIZE = [quoted_span(prompt) for prompt in PROMPTS], (16, 16)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def rows(table):
    """The cells of a table whose columns are separated by bars."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().split("\n")]


def cases(table):
    """Runs a test with each row of a table, whose first row has the names of its arguments."""
    names, *cells = rows(table)
    return pytest.mark.parametrize(names, cells)


def change(file, **fields):
    """Other values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


def gradient(model):
    return flat(weight.grad for weight in model.parameters())


def difference(ours, theirs):
    """|ours - theirs| / |theirs|"""
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="session")
def pipe():
    return diffusers.StableDiffusion3Pipeline.from_pretrained("tiny/sd3")


class Scene:
    """Two prompts, noise for two images, and a policy of six steps."""

    stochastic = (1, 2, 4)

    def __init__(self, pipe, guidance_scale=1.0):
        pipe.scheduler.set_timesteps(6)
        self.noise = torch.randn(2, 8, 16, 16, generator=torch.manual_seed(0))
        self.prompt, empty = (star.encode(pipe, texts, build.TOKENS) for texts in (PROMPTS, [""]))
        spans = [SPANS[0], [(2, 7)]]  # K7Q and green: both signs are at the same place
        self.core = star.core_tokens_of(pipe, PROMPTS, spans, build.TOKENS)
        self.sigmas, self.transformer = pipe.scheduler.sigmas.tolist(), pipe.transformer
        self.policy = star.Policy(self.transformer, self.sigmas, 0.7, guidance_scale, empty)

    def velocity(self, k=2):
        return self.policy.velocity(self.noise, k, self.prompt)

    def rollout(self, recorded=stochastic):
        inputs = self.policy, self.noise, self.prompt, self.stochastic, torch.manual_seed(1)
        return star.rollout(*inputs, recorded, self.core)

    def log_prob(self, samples):
        return log_prob(self.policy, samples.latents, self.stochastic, self.prompt)[0]

    @torch.no_grad()
    def map(self, latents, k, core, blocks=None):
        allocator = AttentionAllocator(self.transformer, core, blocks)
        self.policy.velocity(latents, k, self.prompt, allocator)
        return allocator.map()


def log_prob(policy, latents, steps, prompt):
    """The log-probabilities [B, S, H, W] of a rollout, computed anew, and mean / std per step."""
    log_probs, means = [], []
    for k in steps:
        mean, std = policy.distribution(latents[:, k], k, prompt)
        log_probs.append(position_log_prob(latents[:, k + 1], mean, std))
        means.append(mean / std)
    return torch.stack(log_probs, 1), torch.stack(means, 1)


def code_block(file, language, holds):
    """The one code block of this language that holds this text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", Path(file).read_text(), re.DOTALL)
    (block,) = (block for block in blocks if holds in block)
    return block


def record_softmax(monkeypatch):
    """A list that fills with the softmax of Q K^T over all keys, whenever attention is computed."""
    found, fused = [], F.scaled_dot_product_attention

    def in_full(query, key, value, attn_mask=None, **options):
        hidden = 0 if attn_mask is None else torch.zeros(()).where(attn_mask, -math.inf)
        found.append((query @ key.mT / math.sqrt(query.shape[-1]) + hidden).softmax(-1))
        return fused(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", in_full)
    return found


def core_share(probabilities, core):
    """Of [blocks, B, heads, image tokens, L]: the map [B, image tokens] of the core tokens."""
    return (torch.stack(probabilities) * core[:, None, None]).sum(-1).mean((0, 2))


# --------------------------------------------------------------------------------- The nine points
@pytest.mark.parametrize("allocation, dims", [("spatial", (2, 3)), ("spatiotemporal", (1, 2, 3))])
def test_1_weights_have_mean_one(allocation, dims):
    """Also in half precision. 1 without core words; a map with NaN must stay visible."""
    maps = torch.rand(3, 4, 8, 8) ** 4
    maps *= torch.logspace(-6, 0, 3)[:, None, None, None]
    patches = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for lam in (0.0, 0.3, 1.0):
        weights = allocation_weights(maps, SIZE, allocation, lam)
        assert_close(weights, 1 - lam + lam * patches / maps.mean(dims, keepdim=True))
        half = allocation_weights(maps.bfloat16(), SIZE, allocation, lam)
        assert weights.min() >= 0
        for each in (weights, half):
            assert (each.mean(dims) - 1).abs().max() < 1e-5
    maps[0], maps[1, 2, 3, 4] = 0, math.nan
    without, broken, whole = allocation_weights(maps, SIZE, allocation, lam)
    assert (without == 1).all() and broken[2].isnan().any() and torch.equal(whole, weights[2])


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_2_uniform_is_flow_grpo(pipe, guidance):
    """Both sides of the transplant's diff as they stand. The old one is Flow-GRPO's objective: one
    scalar ratio per image and step, and no gradient through the unconditional half. With lam = 0
    the gradient is the same, else it is star.py's."""
    scene = Scene(pipeline := copy.deepcopy(pipe), guidance)
    empty = [each.expand_as(like) for each, like in zip(scene.policy.empty_prompt, scene.prompt)]
    both = [torch.cat(each) for each in zip(empty, scene.prompt)]
    scheduler, transformer, latents = pipeline.scheduler, scene.transformer, scene.noise
    prompts, spans, advantages, clip_range = PROMPTS, SPANS, torch.tensor([0.8, -1.3]), 1e-4
    H, W, patch_size, max_sequence_length, scene.stochastic = 16, 16, 2, 20, range(3)
    timesteps = scheduler.timesteps[:3, None].expand(3, 2)

    def predict(transformer, latents, timestep):
        inputs = torch.cat([latents] * 2), *both, torch.cat([timestep] * 2)
        unconditional, conditional = transformer(*inputs, return_dict=False)[0].chunk(2)
        unconditional = unconditional.detach()
        return unconditional + guidance * (conditional - unconditional)

    def sde_step_with_logprob(scheduler, velocity, timestep, latents, prev_sample=None):
        """flow_grpo's interface: a log-probability per image, and a std without sqrt(-dt)."""
        s, k = scene.sigmas, scheduler.index_for_timestep(timestep[0])
        mean, std = sde_step(latents, velocity, s[k], s[k + 1], s[1], 0.7)
        sample = mean + std * torch.randn(latents.shape) if prev_sample is None else prev_sample
        log_prob = Normal(mean, std).log_prob(sample).mean((1, 2, 3))
        return sample, log_prob, mean, torch.full((2, 1, 1, 1), std / math.sqrt(s[k] - s[k + 1]))

    given = vars(star) | locals()
    diff = code_block("study/TRANSPLANT.md", "diff", "sde_step_with_logprob").split("\n")

    def run(other_side, lam=1.0):
        """The gradient of a side of the diff, and the names that it has defined."""
        names = given | dict(trajectory=[latents], log_probs=[])
        names["allocation_weights"] = lambda *inputs: allocation_weights(*inputs, lam=lam)
        lines = "\n".join(line[2:] for line in diff if line[:1] != other_side)
        sampling, training = lines.split("# training")
        torch.manual_seed(5)
        transformer.zero_grad()
        with torch.no_grad():
            exec(sampling, names)
        exec(training, names)
        return gradient(transformer), names

    old, _ = run("+")
    assert difference(run("-", lam=0.0)[0], old) < 1e-5
    new, names = run("-")
    assert F.cosine_similarity(new, old, dim=0) < 0.95  # allocation makes a difference
    tensors = (torch.stack(names[x], 1) for x in ("trajectory", "log_probs", "maps"))
    samples = star.Rollout(scene.prompt, range(3), *tensors)
    transformer.zero_grad()
    log_prob, weights = scene.log_prob(samples), allocation_weights(samples.maps, SIZE, lam=1.0)
    star_loss(log_prob, samples.log_prob, advantages, weights, 1e-2)[0].backward()
    assert difference(new, 3 * gradient(transformer)) < 1e-5  # the sum over three steps


def test_3_the_hook_changes_nothing(pipe):
    """Outputs and gradients are equal to the last bit. No hook is left behind, not even after an
    error or where an allocator is entered twice, and a second use starts anew."""
    scene = Scene(pipe)
    allocator = AttentionAllocator(scene.transformer, scene.core, range(4))

    def results():
        scene.transformer.zero_grad()
        with torch.no_grad():
            sampled = scene.velocity()
        trained = scene.velocity()
        trained.square().mean().backward()
        return sampled, trained, gradient(scene.transformer)

    plain = results()
    for _ in range(2):
        with allocator:
            assert all(map(torch.equal, plain, results()))
        assert len(allocator.recorded) == 8 and not allocator.map().requires_grad
    with pytest.raises(ZeroDivisionError), allocator, allocator:
        raise ZeroDivisionError
    for core in (scene.core[:1].repeat(3, 1), scene.core[:, :30]):
        sentence = rf"\[{len(core)}, {core.shape[1]}\], but there are 2 images and 40 text tokens"
        with pytest.raises(ValueError, match=sentence):
            scene.map(scene.noise, 0, core)
    assert not any(module._forward_pre_hooks for module in scene.transformer.modules())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("blocks", [None, [0, 2], "SD3 Medium"])  # 0 has dual attention
def test_4_map_is_the_brute_force_map(pipe, blocks, guidance_scale, monkeypatch):
    """Against the full softmax of Q K^T over [image; text] of the blocks' own Q and K."""
    scene = Scene(pipe, guidance_scale)
    if blocks == "SD3 Medium":
        options = dict(pipe.transformer.config) | dict(qk_norm=None, dual_attention_layers=())
        scene.transformer = scene.policy.transformer = diffusers.SD3Transformer2DModel.from_config(
            options
        )
        scene.transformer.transformer_blocks[1].attn.to_q.weight.data *= 50  # else maps are even
        blocks = [1]
    found = record_softmax(monkeypatch)
    scene.velocity()  # the first four are of the conditional half; dual attention is 64 x 64
    joint = [softmax[:, :, :64, 64:] for softmax in found if softmax.shape[-1] == 64 + 40][:4]
    expected = core_share([joint[block] for block in blocks or [3]], scene.core)
    monkeypatch.undo()
    found = scene.map(scene.noise, 2, scene.core, blocks)
    assert_close(found, expected)
    assert found.std() > 1e-3


def test_4_maps_of_a_compiled_block(pipe):
    """With guards on hooks, also if the block was called before and with later allocators."""
    plain, compiled = Scene(pipe), Scene(copy.deepcopy(pipe))
    compiled.transformer.transformer_blocks[3].compile(backend="aot_eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        with torch.no_grad():
            compiled.velocity()
        for core in (plain.core, ~plain.core):
            plain.core = compiled.core = core
            ours, theirs = compiled.rollout(), plain.rollout()
            assert_close(ours.maps, theirs.maps)
            assert_close(ours.latents, theirs.latents, atol=1e-3, rtol=1e-3)
        assert_close(compiled.log_prob(ours), ours.log_prob, atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_4_rollout_keeps_the_map_of_each_step(pipe):
    """Of the stochastic steps, or of those that are asked for."""
    scene, steps = Scene(pipe, guidance_scale=3.0), range(6)
    for recorded, samples in ((scene.stochastic, scene.rollout()), (steps, scene.rollout(steps))):
        for k, maps in zip(recorded, samples.maps.unbind(1), strict=True):
            assert torch.equal(maps.flatten(1), scene.map(samples.latents[:, k], k, scene.core))


def test_5_log_prob_and_kl_are_those_of_the_normal_distribution():
    """The mean over positions is Flow-GRPO's log_prob. std may be one value per image."""
    sample, mean = torch.randn(2, 3, 8, 4, 4)
    for std in (0.37, torch.tensor([0.2, 0.37, 1.5]).view(3, 1, 1, 1)):
        ours, expected = position_log_prob(sample, mean, std), Normal(mean, std)
        assert_close(ours, expected.log_prob(sample).mean(1))
        assert_close(ours.mean((1, 2)), expected.log_prob(sample).mean((1, 2, 3)))
        kl = kl_divergence(expected, Normal(sample, std)).mean(1)
        assert_close(star.kl_to_reference(mean, sample, std), kl)


def test_6_sde_keeps_the_marginals():
    """Gaussian data N(m, d^2): the velocity is known, and both samplers must end in N(m, d^2)."""
    m, d, ends = 0.6, 0.5, []
    sigmas = torch.linspace(1, 0, 401).tolist()
    start = torch.randn(20_000, 1, 1, 1)
    for level in (0.0, 0.7):
        x = start
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):
            variance = (1 - sigma) ** 2 * d**2 + sigma**2
            slope = (sigma - (1 - sigma) * d**2) / variance  # E[noise - data | x] is linear in x
            v, noise = -m + slope * (x - (1 - sigma) * m), torch.randn(x.shape)
            mean, std = sde_step(x, v, sigma, sigma_next, sigmas[1], level)
            x = mean + std * noise
        ends.append(x)
        # within four standard errors, and the error of steps that are not small enough
        assert x.mean().item() == pytest.approx(m, abs=0.014 + 0.002)
        assert x.var().item() == pytest.approx(d**2, abs=0.01 + 0.004)
    assert (ends[0] - ends[1]).abs().mean() > 0.1  # the stochastic sampler is one


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_6_without_noise_the_rollout_is_that_of_diffusers(pipe, guidance_scale):
    """The same Euler steps, the same guidance, and the same decoded images."""
    scene = Scene(pipe, guidance_scale)
    options = dict(guidance_scale=guidance_scale, num_inference_steps=6, max_sequence_length=20)
    samples = star.rollout(scene.policy, scene.noise, scene.prompt, (), None, (), None)
    images = star.decode(pipe, samples.latents[:, -1])
    theirs = pipe(PROMPTS, latents=scene.noise, **options).images
    for image, expected in zip(images, theirs):
        assert abs(numpy.int16(image) - numpy.int16(expected)).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_7_first_ratio_is_one(pipe, guidance_scale):
    """Exactly in float32, within 1e-3 in bfloat16."""
    scene = Scene(pipe, guidance_scale)
    samples = scene.rollout()
    assert torch.equal(scene.log_prob(samples), samples.log_prob)
    with torch.autocast("cpu", torch.bfloat16):
        half = scene.rollout()
        log_ratio = scene.log_prob(half) - half.log_prob
    assert (log_ratio.exp() - 1).abs().max() < 1e-3
    assert not torch.equal(half.latents, samples.latents)


@pytest.mark.parametrize("global_std", [False, True])
def test_8_advantages(global_std):
    """Mean 0 in each group, and 0 where all rewards are equal, also if their mean is rounded."""
    rewards = torch.rand(5, 6)
    rewards[2] = 0.6
    advantages = star.group_advantages(rewards, global_std)
    assert advantages.mean(1).abs().max() < 1e-5 and (advantages[2] == 0).all()
    std = (rewards if global_std else rewards[0]).std(unbiased=False)
    assert_close(advantages[0], (rewards[0] - rewards[0].mean()) / (std + 1e-4))
    assert_close(star.group_advantages(rewards, global_std, 0.5), advantages.clamp(-0.5, 0.5))
    same = torch.tensor([[22, 23, 25]]), torch.tensor([[22.0, 23, 25]])
    assert torch.equal(*(star.group_advantages(each, global_std) for each in same))


# -------------------------------------------------------------------------------------------- Runs
SMALL = """--iterations 3 --prompts-per-iteration 2 --group-size 4 --batch-size 4 --steps 4
    --stochastic-range 0-2 --stochastic-steps 2 --evaluate-every 2 --evaluation-prompts 2
    --evaluation-steps 4 --save-every 1 --ema-decay 0.5 --out""".split()
FILES = "metrics.jsonl samples-0.png samples-2.png samples-3.png checkpoint pipeline"
FOREIGN = """checkpoint-20/model checkpoint.safetensors pipeline/notes/mine.txt checkpoint.partial
    .partial-1/model pipeline.old/model .partial""".split()


def write_foreign(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def run(folder, *options):
    star.main([*SMALL, str(folder), *options])


def metrics(folder):
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def checkpoint(folder):
    files = star.checkpoints(folder)[-1].glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_resumes_as(whole, folder, *options, foreign=()):
    """Resumed, it has the metrics, weights, EMA and optimizer state of `whole`; no more files."""
    run(folder, *options, *["--resume"] * len(star.checkpoints(folder)))
    assert metrics(folder) == metrics(whole)
    assert_close(checkpoint(folder), checkpoint(whole), atol=0, rtol=0)
    assert len(list((folder / "checkpoint").iterdir())) == 1
    names = {Path(name).parts[0] for name in foreign}
    assert {path.name for path in folder.iterdir()} == names.union(FILES.split())
    assert all((folder / name).read_text() == name for name in foreign)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def test_a_run_leaves_what_it_promises(finished, pipe):
    """Metrics, images, and a pipeline for plain diffusers with the average of the weights at the
    best evaluation: of equal ones the last."""
    assert {path.name for path in finished.iterdir()} == set(FILES.split())
    lines, changed = metrics(finished), []
    assert [line["images"] for line in lines] == [0, 8, 16, 24]
    assert [line.get("heldout_reward") for line in lines] == [0.5, None, 1, 1]
    assert all(Image.open(path).width > 300 for path in finished.glob("*.png"))
    suffixes = {path.suffix for path in finished.rglob("*.*")}
    assert suffixes == {".json", ".jsonl", ".png", ".safetensors"}
    trained = diffusers.StableDiffusion3Pipeline.from_pretrained(finished / "pipeline").transformer
    tensors, start = checkpoint(finished), dict(pipe.transformer.named_parameters())
    for i, (name, weight) in enumerate(trained.named_parameters()):
        assert torch.equal(weight, tensors[f"ema.{i}"])
        changed += [not torch.equal(weight, each[name]) for each in (start, tensors)]
    assert sum(changed) > 0.9 * len(changed)  # the average is neither the start nor the end


def test_a_run_that_collapses_keeps_its_best_pipeline(pipe, tmp_path):
    run(tmp_path, "--learning-rate", "1e-2")
    assert [line.get("heldout_reward") for line in metrics(tmp_path)] == [0.5, None, 0, 0]
    kept = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline").transformer
    assert_close(dict(kept.named_parameters()), dict(pipe.transformer.named_parameters()))


def run_and_kill(folder, function, text, call, when):
    """Kill -9 the process at the n-th call of a function whose last argument has this text."""
    owner, name = function.split("-")
    owner, calls = eval(owner), []
    original = getattr(owner, name)

    def deadly(*args, **options):
        calls.append(text in str(args[-1]))
        last = sum(calls) == int(call)
        result = None if last and when == "before" else original(*args, **options)
        if last and when == "within":
            os.truncate(args[1], 99)
        return os.kill(os.getpid(), signal.SIGKILL) if last else result

    setattr(owner, name, deadly)
    run(folder)


def start_process(function, *args):
    """A process that is forked from one which has only imported this file: that is fast."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_star"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


@cases("""
    function            | text       | call | when
    star-rollout        |            | 1 | before
    star-rollout        |            | 4 | before
    star-rollout        |            | 7 | after
    rewards.OCR-reward  |            | 4 | before
    star-star_loss      |            | 7 | after
    star-save_file      | checkpoint | 1 | within
    star-save_file      | checkpoint | 12 | before
    star-save_file      | checkpoint | 19 | within
    Path-write_text     | "images"   | 5 | after
    Path-write_text     | .safetens  | 2 | before
    Path-replace        | checkpoint | 1 | before
    Path-replace        | checkpoint | 1 | after
    Path-replace        | checkpoint | 3 | before
    Path-replace        | checkpoint | 3 | after
    star.shutil-rmtree  | checkpoint/1 | 1 | before
    star.shutil-rmtree  | checkpoint/2 | 1 | before
    Path-write_text     | "images"   | 4 | after
    Path-replace        | pipeline   | 1 | before
    Path-replace        | pipeline   | 1 | after
    Path-replace        | pipeline   | 5 | before
    Path-replace        | pipeline/model_index | 1 | before
""")
def test_9_killed_and_resumed_is_the_same(finished, function, text, call, when, tmp_path):
    """kill -9 of a real process. Files that only look like star.py's own stay untouched."""
    foreign = [name for name in FOREIGN if "notes" not in name]
    write_foreign(tmp_path, foreign)
    process = start_process(run_and_kill, tmp_path, function, text, call, when)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if (text, call) == ("pipeline", "5"):  # half of its files are new: it must not load
        assert not (tmp_path / "pipeline/model_index.json").exists()
    if star.checkpoints(tmp_path):
        write_foreign(tmp_path, foreign := FOREIGN)
    assert_resumes_as(finished, tmp_path, foreign=foreign)


def test_9_signals_end_with_a_sentence(finished, tmp_path):
    """Ctrl-C or SIGTERM, and more of them while the first one is handled. star.py was started from
    another folder, and goes on from this one."""
    command = [sys.executable, os.path.abspath("star.py"), *SMALL, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/")
    while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.01)
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(each)
        time.sleep(0.01)
    said = process.communicate()[1]
    assert process.returncode in (1, -signal.SIGTERM) and len(metrics(tmp_path)) < 4
    assert "Traceback" not in said and (said := said.splitlines()[-1])
    assert said.startswith(f"star.py: interrupted; --resume goes on from {tmp_path}/checkpoint, ")
    assert_resumes_as(finished, tmp_path)


def test_9_two_processes_in_one_folder(tmp_path):
    """Started with other settings, the one that comes second ends. Resumed twice, each may end with
    a sentence. In both cases the run is one of a single process, here with Adafactor."""
    whole, folder, adafactor = tmp_path / "whole", tmp_path / "run", ["--optimizer", "adafactor"]
    run(whole, *adafactor)
    others = [*adafactor, "--ema-decay", "0"], adafactor
    processes = [start_process(run, folder, *options) for options in others]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 1]
    first = others[processes[0].exitcode]
    run(tmp_path / "again", *first)
    assert metrics(folder) == metrics(tmp_path / "again")
    run(folder := tmp_path / "resumed", *adafactor, "--iterations", "2")
    processes = [start_process(run, folder, *adafactor, "--resume") for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode in (0, 1)
    assert_resumes_as(whole, folder, *adafactor)


def test_9_full_disk(finished, tmp_path, monkeypatch):
    """The second checkpoint cannot be written: one sentence, and the run goes on from the first."""
    first, second = (tmp_path / "checkpoint" / name for name in "12")
    save, (limit, most) = star.Trainer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_to_full_disk(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000 if first.exists() else limit, most))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))

    sentence = f"^star.py: {second} cannot be written: .+; --resume goes on from {first.parent}, "
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=sentence):
        patch.setattr(star.Trainer, "save", save_to_full_disk)
        run(tmp_path)
    assert_resumes_as(finished, tmp_path)


# --------------------------------------------------------------------- Loss, iteration, allocation
def test_loss_by_hand():
    """Positions inside the clip range and beyond each end, for either sign of the advantage."""
    ratios = torch.tensor([[1.0, 1.5], [1.0, 0.5], [0.5, 1.5], [1.5, 0.9]])
    weights = torch.tensor([[0.5, 1.5], [2.0, 0.1], [1.0, 1.0], [1.0, 0.0]], requires_grad=True)
    advantages, new = torch.tensor([2.0, -1.0, 1.0, -1.0]), ratios.log().requires_grad_()
    loss, found, clipped = star_loss(new, 0 * new, advantages, weights, 0.2)
    least = torch.tensor([[2.0, 1.2 * 2], [-1, 0.8 * -1], [0.5, 1.2], [1.5 * -1, 0.9 * -1]])
    assert_close(loss, -(weights * least).mean())
    assert_close(found, ratios)
    loss.backward()
    assert weights.grad is None  # no gradient may flow through the weights
    beyond = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 0]]).bool()
    assert torch.equal(clipped, beyond)
    assert_close(new.grad * 8, -(weights * least).masked_fill(beyond, 0))


def test_star_loss_refuses_what_would_broadcast():
    """Log-probabilities, old ones, advantages and weights of other shapes than it expects."""
    for shapes in """388 388 31 388, 388 388 3 3388, 388 388 3 318, 3188 388 3 388, 388 188 3 388,
            388 388 1 388, 388 388 2 388""".split(","):
        inputs = [torch.zeros(*map(int, shape)) for shape in shapes.split()]
        with pytest.raises(ValueError, match="must have equal shapes|advantages must be"):
            star_loss(*inputs, 0.1)


def trainer_of(options):
    return star.Trainer(*star.parse_arguments(options.split()))


OPTIONS = """--kl-weight 0.5 --max-gradient-norm 0.1
    --allocation spatiotemporal --no-same-noise --lam 0.5 --ema-decay 0.5
    --allocation uniform --global-std --noise-level 0.5
    --updates-per-iteration 2 --guidance-scale 2 --ema-decay 0.38"""


@pytest.mark.parametrize("options", OPTIONS.split("\n"))
def test_an_iteration_is_the_gradient_of_one_loss(options, monkeypatch):
    """`iterate` moves the weights as one star_loss over all images and trained steps does. A first
    ratio is 1 even if the rollout rounds otherwise, as compiled code does."""
    sizes = """--prompts-per-iteration 2 --group-size 4 --batch-size 2 --max-gradient-norm 1e9
        --steps 4 --stochastic-steps 2 --stochastic-range 1-2 --advantage-clip 1 --ema-decay 0 """
    trainer, steps, scored = trainer_of(sizes + options), range(1, 3), []
    args, model = trainer.args, trainer.transformer
    twin, start = copy.deepcopy(model), flat(model.parameters())
    rewards, rounding = torch.arange(8.0) ** 2, 0.03 if args.global_std else 0.0
    if trainer.reference:
        rewards = torch.tensor(
            [3.0, 3, 3, 3, 1, 2, 3, 2]
        )  # six teach nothing, also not by their KL
        for weight in trainer.reference:  # so that there is a distance
            weight *= 1.1
    trainer.optimizer, optimizer = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin))
    _, batches = sampled = trainer.sample(3)
    for batch in batches:
        assert batch.steps == steps
        batch.log_prob += rounding
    monkeypatch.setattr(trainer, "sample", {3: sampled}.get)
    monkeypatch.setattr(trainer.task, "reward", lambda _, texts: scored.extend(texts) or rewards)
    line = trainer.iterate(3)
    latents, old = (torch.cat([getattr(x, n) for x in batches]) for n in ("latents", "log_prob"))
    prompt = star.encode(trainer.pipe, scored, args.max_sequence_length)
    weights = torch.ones_like(old)
    if args.allocation != "uniform":
        maps = torch.cat([batch.maps for batch in batches])
        weights = allocation_weights(maps, SIZE, args.allocation, args.lam)
    advantages = star.group_advantages(rewards.view(2, 4), args.global_std, 1.0).flatten()
    settings = dict(noise_level=args.noise_level, guidance_scale=args.guidance_scale)
    policy = replace(trainer.policy(args.steps), transformer=twin, **settings)
    others = copy.deepcopy(twin)
    assert (latents[:4, 0] == latents[0, 0]).all() == args.same_noise
    average, done = start, 2 * args.updates_per_iteration
    for n, i in enumerate(torch.arange(8).chunk(args.updates_per_iteration), done):
        new, means = log_prob(policy, latents, steps, prompt)
        before = new.detach() if n == done else old
        loss = star_loss(new[i], before[i], advantages[i], weights[i], 2e-2)[0]
        if trainer.reference:
            for weight, value in zip(others.parameters(), trainer.reference):
                weight.data = value
            reference = replace(policy, transformer=others)
            kl = log_prob(reference, latents, steps, prompt)[1].detach() - means
            kl = kl.square().mean((1, 2, 3, 4)) / 2  # of each image
            assert line["kl"] == pytest.approx(kl[4:].mean().item(), rel=1e-3)
            loss = loss + args.kl_weight * (kl * (advantages != 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), args.max_gradient_norm)
        optimizer.step()
        decay = min(args.ema_decay, (1 + n) / (10 + n))  # 0.25 or, limited, 0.357 and 0.38
        average = decay * average + (1 - decay) * flat(twin.parameters())
    expected = flat(twin.parameters()) - start
    assert difference(flat(model.parameters()) - start, expected) < 1e-4
    ratio = pytest.approx(math.exp(-rounding), rel=1e-4 * rounding, abs=0)  # where one can see it
    assert (line["ratio_mean"] == ratio) == (args.updates_per_iteration == 1)
    assert line["clip_fraction"] == 0 or args.updates_per_iteration == 2
    if trainer.ema:
        assert difference(flat(trainer.ema) - start, average - start) < 2e-3
    model.proj_out.bias.data += math.inf
    with pytest.raises(UserError, match="gradient is not finite; use a lower --learning-rate"):
        trainer.iterate(3)
    monkeypatch.undo()  # evaluation samples from the average, if there is one
    monkeypatch.setattr(star, "decode", lambda pipe, latents: [latents.isfinite().all()])
    assert trainer.generate(PROMPTS) == [bool(trainer.ema)]


def test_equal_rewards_teach_nothing(pipe, tmp_path, monkeypatch, capsys):
    """No image is trained on its KL alone; the run goes on, also from its checkpoint. Of equal
    evaluations the last is the best."""
    monkeypatch.setattr(OCR, "reward", lambda self, images, prompts: [0.5] * len(images))
    options = ["--kl-weight", "1", "--monitor", "", "--iterations"]
    run(tmp_path, *options, "1")
    run(tmp_path, *options, "2", "--resume")
    assert "(best: 16 images)" in capsys.readouterr().out
    start = dict(pipe.transformer.named_parameters())
    start |= {f"ema.{i}": weight for i, weight in enumerate(start.values())}
    assert_close(checkpoint(tmp_path), start, atol=0, rtol=0)
    assert [line.get("gradient_norm") for line in metrics(tmp_path)] == [None, 0, 0]


def test_models_that_move_come_back_as_they_were(judges):
    """Nothing is copied back, also after an error. Copies in float16 stand for those on a GPU."""
    models = rewards.networks(rewards.Mixture([judges["ocr"], judges["pickscore"]], [1, 1]))
    assert models == [judges["ocr"].reader, judges["pickscore"].clip]
    tensors = [tensor for each in models for tensor in each.parameters()]
    places = [tensor.data_ptr() for tensor in tensors]
    halves = [tensor.half() for tensor in tensors]
    with pytest.raises(ZeroDivisionError), rewards.replaced(tensors, halves):
        assert [each.data_ptr() for each in tensors] == [each.data_ptr() for each in halves]
        raise ZeroDivisionError
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_what_changes_with_the_iteration():
    """Every window of --stochastic-range comes up, and no other; noise and prompts are new."""
    sizes = "--prompts-per-iteration 1 --group-size 2 --batch-size 2 --steps 4 --stochastic-steps 2"
    trainers = trainer_of(sizes), trainer_of(sizes + " --seed 1")
    samples = [trainer.sample(iteration) for trainer in trainers for iteration in range(12)]
    windows = {(*batch.steps,) for _, (batch,) in samples}
    assert windows == {(0, 1), (1, 2), (2, 3)}
    assert len({batch.latents[0, 0].sum().item() for _, (batch,) in samples}) == 24
    assert len({prompts[0] for prompts, _ in samples}) > 20


def test_parts_work_alone_in_another_file(pipe, monkeypatch):
    """The source of a part, pasted below three imports, does what it does in star.py."""

    def results():
        samples, advantages = Scene(pipe).rollout(), star.group_advantages(torch.eye(2))[0]
        weights, old = star.allocation_weights(samples.maps, SIZE), samples.log_prob
        loss, _, _ = star.star_loss(0.9 * old, old, advantages, weights, 0.1)
        return samples.latents, samples.maps, old, weights, loss

    plain = results()
    for part in """core_tokens_of AttentionAllocator allocation_weights sde_step position_log_prob
            group_advantages star_loss""".split():
        exec(inspect.getsource(getattr(star, part)), alone := dict(math=math, torch=torch, F=F))
        monkeypatch.setattr(star, part, alone[part])
    assert all(map(torch.equal, plain, results()))


def test_parts_take_video():
    """[B, C, F, H, W] gives what an image gives that has the frames one below the other."""
    x, v, noise = torch.randn(3, 2, 4, 3, 8, 8)
    maps, advantages, results = torch.rand(2, 2, 3, 4, 4), torch.eye(2)[0], []
    for lay, size in ((torch.clone, (3, 8, 8)), (lambda x: x.flatten(-3, -2), (24, 8))):
        mean, std = sde_step(lay(x), lay(v), 0.7, 0.6, 0.9, 0.7)
        sample = mean + std * lay(noise)
        log_prob, new = position_log_prob(sample, mean, std), sample[:, :2] / 9
        weights = allocation_weights(lay(maps), size, "spatiotemporal")
        loss, _, _ = star_loss(new, mean[:, :2] / 9, advantages, weights, 0.05)
        results.append([each.flatten() for each in (sample, log_prob, weights, loss)])
    assert_close(*results)


# -------------------------------------------------------------------------- Full size, small memory
def test_defaults_follow_the_model(tmp_path):
    shutil.copytree("tiny/sd3", tmp_path, dirs_exist_ok=True)
    change(tmp_path / "transformer/config.json", sample_size=128, pos_embed_max_size=192)
    change(tmp_path / "vae/config.json", block_out_channels=[128, 256, 512, 512])
    command = ["--model", str(tmp_path)]
    full, written = star.parse_arguments(command)
    assert full == star.Arguments(model=str(tmp_path), **star.FULL_SIZE)
    small, _ = star.parse_arguments([*command, "--low-memory", "--batch-size", "2"])
    assert (small.batch_size, small.optimizer) == (2, "adafactor")
    people, preferred = star.parse_arguments([*command, "--task", "pickscore"])
    assert people.kl_weight == full.kl_weight / 4 and '"' not in "".join(preferred.prompts)
    for task, most, heldout in ((written, 500, 1), (preferred, 1000, 200)):
        texts, others = set(task.prompts), set(task.heldout_prompts)
        assert len(texts) >= most and len(others) >= heldout and not texts & others
    for task in star.MINIATURE:
        own = star.Arguments(task=task, **star.MINIATURE[task])
        assert star.parse_arguments(["--task", task])[0] == own
    # Flow-GRPO's weights divide by 2 s^2, ours by 2 std^2: equal on the mean over trained steps
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(full.steps)
    first, last = map(int, full.stochastic_range.split("-"))
    intervals = -scheduler.sigmas.diff()[first : last + 1]
    mean = intervals.unfold(0, full.stochastic_steps, 1).mean().item()
    assert full.kl_weight == pytest.approx(0.04 * mean, rel=0.01)


def test_without_t5_in_bfloat16_with_little_memory(tmp_path, capsys):
    """The weights are float32 although the file's are not, since a learning rate of 1e-5 would be
    lost. T5's part of the context is zeros without core tokens. T5 is not saved, and not needed."""
    shutil.copytree("tiny/sd3", tmp_path / "half")
    file = tmp_path / "half/transformer/diffusion_pytorch_model.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    half["pos_embed.pos_embed"] = half["pos_embed.pos_embed"].float()  # as diffusers writes it
    save_file(half, file, {"format": "pt"})
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("\n".join([*PROMPTS, "a wall " * 30 + '"K7Q"']))
    options = "--no-t5 --low-memory --bfloat16 --kl-weight 0.1 --guidance-scale 2 --iterations 1"
    options += f" --group-size 2 --evaluation-prompts 1 --prompts {prompts} --model {tmp_path}/half"
    run(out, *options.split())
    assert "1 of 3 prompts have no core words within the token limit:" in capsys.readouterr().out
    line = metrics(out)[1]
    assert abs(line["ratio_mean"] - 1) < 1e-3
    assert 0 <= line["kl"] < 1e-3  # the reference is the start, up to the rounding of its copy
    assert {weight.dtype for weight in checkpoint(out).values()} == {torch.float32}
    without = dict(text_encoder_3=None, tokenizer_3=None)
    saved = diffusers.StableDiffusion3Pipeline.from_pretrained(out / "pipeline", **without)
    clip, t5 = star.encode(saved, PROMPTS, 20)[0].split(20, dim=1)
    assert clip.any() and not t5.any()
    core = star.core_tokens_of(saved, PROMPTS, SPANS, 20)
    assert core.sum(1).tolist() == [3, 3] and not core[:, 20:].any()
    run(tmp_path / "other", *options.replace("half", "run/pipeline").split())


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_adafactor_steps_are_as_long_as_the_learning_rate(size):
    """As AdamW's: where gradients are equal, of any size, a step moves each weight by the learning
    rate, besides its decay. And a row of smaller gradients moves as far as the others."""
    trainer = trainer_of("--optimizer adafactor --learning-rate 1e-3 --weight-decay 0.5")
    weights = list(trainer.transformer.parameters())
    starts = copy.deepcopy(weights)
    for weight in weights:
        weight.grad = torch.full_like(weight, size)
        if weight.dim() > 1:
            weight.grad[0] /= 4
    trainer.optimizer.step()
    for weight, start in zip(weights, starts):
        length = 1e-3 * start.square().mean().sqrt().clamp_min(1)  # of large weights, relative
        assert_close(start - weight, length + 0.5e-3 * start, atol=2e-6, rtol=1e-3)


# -------------------------------------------------------------------------------------- Core words
@pytest.fixture(scope="session")
def judges():
    tasks = {name: make_task(name) for name in (*rewards.TASKS, "signs")}
    for task in tasks.values():
        task.load("cpu")
    return tasks


def test_core_tokens_are_the_words_in_both_tokenizers(pipe):
    """Where CLIP's start and end tokens leave no room for K7Q, T5 still sees the K."""
    prompts = [PROMPTS[0], "a wall " * 7 + 'with a sign "K7Q"', "a wall " * 20 + '"K7Q"']
    core = star.core_tokens_of(pipe, prompts, map(quoted_span, prompts), 20).view(3, 2, 20)
    assert core[1:].sum(-1).tolist() == [[0, 1], [0, 0]]
    for tokenizer, words in zip((pipe.tokenizer, pipe.tokenizer_3), core[0]):
        ids = tokenizer(prompts[0], padding="max_length", max_length=20)["input_ids"]
        assert tokenizer.decode(torch.tensor(ids)[words]).replace(" ", "").upper() == "K7Q"


def clauses(text):
    """ "1 cat, 2 red dog left of 0" as clauses of the benchmark's metadata."""
    made, colours = [], "|".join(rewards.COLOURS)
    pattern = rf"(\d) (?:({colours}) )?(.+?)(?: (\w+ of) (\d))?(?:, |$)"
    for count, colour, name, relation, index in re.findall(pattern, text):
        made.append({"class": name, "count": int(count)})
        if colour:
            made[-1]["color"] = colour
        if relation:
            made[-1]["position"] = [relation, int(index)]
    return made


@cases("""
    name | prompt | words | include
    ocr | a sign "Hello World" and a sign "two" | Hello World |
    ocr | a label "" next to a sign "HELLO"     | HELLO       |
    ocr | a sign " " and "A"                    | A           |
    ocr | no quotes, empty "" quotes, one "     |             |
    ocr | a 12" x 8" board with "TEN 12" on it  | TEN 12      |
    pickscore | A sign "K7Q" and two well-known balls | sign, K7Q, two, well-known, balls |
    geneval | a red wall with two red balls | two, balls         | 2 ball
    geneval | a red wall, an orange box     | orange, box        | 1 orange box
    geneval | a ball left of a box          | ball, left of, box | 1 box, 1 ball left of 0
    geneval | two persons and a wine glass  | two, persons, wine glass   | 2 person, 1 wine glass
    geneval | four people, three buses      | four, people, three, buses | 4 person, 3 bus
    geneval | four benchs, three knifes     | four, benchs, three, knifes | 4 bench, 3 knife
    geneval | two knives, a brown carrot    | two, knives, brown, carrot | 2 knife, 1 brown carrot
""")
def test_core_words(judges, name, prompt, words, include, monkeypatch):
    """The quoted text; all but function words; objects, also in the benchmark's own plurals."""
    metadata = {prompt: dict(include=clauses(include))}
    monkeypatch.setattr(judges[name], "metadata", metadata, raising=False)
    found = [prompt[slice(*span)] for span in judges[name].core_spans(prompt)]
    assert ", ".join(found) == words


# ----------------------------------------------------------------------------------------- Rewards
def world(count, **settings):
    """Pictures of the world that the miniatures know, their images and their captions."""
    rng, texts = random.Random(123), build.all_targets(True)
    shots = [build.picture(rng, texts, **settings) for _ in range(count)]
    return shots, [shot["image"] for shot in shots], [shot["caption"] for shot in shots]


@cases("""
    target      | outcomes
    K7Q         | K7Q = 1; k 7 q = 1; xxK7Qxx = 1; = 0; K7 = 2/3; K77 = 2/3; 7KQ = 1/3
    K7Q         | completely different = 0
    kitten      | sitting = 1/2
    hello world | Hello Wrld = 9/10
""")
def test_text_reward(target, outcomes):
    for outcome in outcomes.split("; "):
        read, reward = outcome.split("=")
        assert rewards.text_reward(read, target) == pytest.approx(eval(reward))


def test_reader_reads_the_world(judges):
    """Signs as they are, none where there is none. Training and held-out texts are disjoint."""
    task, (_, signs, prompts) = judges["ocr"], world(200, opacity=1.0, sign_share=1.0)
    _, bare, _ = world(100, sign_share=0.0)
    assert scores(task, signs, prompts).mean() >= 0.99
    assert scores(task, bare, prompts[:100]).mean() <= 0.1
    split = map(" ".join, (task.prompts, task.heldout_prompts))
    texts = [set(re.findall('"(.+?)"', part)) for part in split]
    assert not texts[0] & texts[1]


def test_reader_of_real_images(tmp_path):
    """Florence-2's classes, with weights that write the numbers from 0 to 39, one per position."""
    words = "<s> <pad> </s> <unk> <image> What is the text in image ?".split()
    words += map(str, range(40))
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), words))
    special["extra_special_tokens"] = {"image_token": "<image>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    size = dict(height=64, width=64)
    pixels = transformers.CLIPImageProcessorPil(size=size, do_center_crop=False, image_seq_length=5)
    text = dict(vocab_size=len(words), d_model=64, decoder_start_token_id=2)
    vision = dict(embed_dim=[32] * 4, projection_dim=64)
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=4)
    model = transformers.Florence2ForConditionalGeneration(config)
    model.half().save_pretrained(tmp_path)
    transformers.Florence2Processor(pixels, tokenizer).save_pretrained(tmp_path)
    task, images = OCR(model=tmp_path), [Image.new("RGB", (90, 70))] * 3
    task.load("cpu")
    assert task.reader.dtype == torch.float32  # the file's float16 is slow on a CPU
    asked = task.processor(images=images[0], text="<OCR>").input_ids[0]
    assert tokenizer.decode(asked, skip_special_tokens=True) == "What is the text in the image ?"
    decoder = task.reader.model.language_model.decoder
    for layer in decoder.layers:  # what comes out is the position that went in
        for name, weight in layer.named_parameters():
            weight.zero_() if "layer_norm" not in name else None
    decoder.embed_tokens.weight.data = torch.zeros(len(words), 64)
    positions = decoder.embed_positions.weight.data.normal_()[2:]
    rows = F.layer_norm(positions[:40], (64,))
    head = torch.zeros(len(words), 64)
    head[len(words) - 40 :] = rows
    head[2] = F.layer_norm(positions[40], (64,))  # the end
    task.reader.lm_head.weight = torch.nn.Parameter(head)
    read = " ".join(map(str, range(40)))
    assert task.transcribe(images, batch_size=2) == [read] * 3
    prompts = ['a sign "38 39"', 'a sign "shut"', f'a sign "{read}"']
    assert task.reward(images, prompts) == [1, 0, 1]


def test_readers_without_a_limit_of_their_own_read_to_the_end(judges, tmp_path):
    """generate() would stop after 20 tokens. tiny/ocr has a limit, and keeps it."""
    shutil.copytree("tiny/ocr", tmp_path, dirs_exist_ok=True)
    file, task = tmp_path / "generation_config.json", OCR(model=tmp_path)
    limit = json.loads(file.read_text())["max_length"]
    file.write_text("{}")
    task.load("cpu")
    for each, limits in ((judges["ocr"], (limit, None)), (task, (None, 1024))):
        found = each.reader.generation_config
        assert (found.max_length, found.max_new_tokens) == limits


def test_prompt_files(tmp_path):
    """As Flow-GRPO's are: a byte order mark and blank lines do not count."""
    lines = ['A stamp, with "Alex’s Library" in bold letters', 'A bus that reads "Line 7", \u2028']
    file = tmp_path / "mine.json.d/prompts.txt"
    file.parent.mkdir()
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8-sig")
    assert OCR(file).prompts == [line.strip() for line in lines]
    # evaluation prompts come from all parts of a file
    assert rewards.evenly_spaced("aaaabbbbccdd", 6) == list("aabbcd")
    assert rewards.evenly_spaced("abc", 9) == list("abc")


@cases("""
    box         | other      | expected        | why
    0 0 10 10   | 30 0 40 10 | left of         | (30 - 2) / 30
    30 0 40 10  | 0 0 10 10  | right of        |
    0 0 10 10   | 0 30 10 40 | above           |
    0 30 10 40  | 0 0 10 10  | below           |
    30 30 40 40 | 0 0 10 10  | right of, below | 28 / 42.4 = 0.66 along both
    20 12 30 22 | 0 0 10 10  | right of        | 18 / 23.3 = 0.77 and 10 / 23.3 = 0.43
    1 0 11 10   | 0 0 10 10  |                 | nearer than the margin of 2
    0 0 40 40   | 10 0 50 40 |                 | 10 apart, the margin is 8: (10 - 8) / 10 = 0.2
    0 0 10 10   | 0 0 10 10  |                 |
    0.5 4 5.5 4 | 0 0 0 0    | below           | (3 - 0.5) / 5 = 0.5 is not more than 0.5
""")
def test_relations_by_hand(box, other, expected, why):
    found = rewards.relations(*(list(map(float, each.split())) for each in (box, other)))
    assert ", ".join(sorted(found, key=rewards.RELATIONS.index)) == expected


OBJECTS = """
    D | dog  | 0.9 | 0   | red
    G | dog  | 0.6 | 100 | green
    C | cat  | 0.8 | 50  | blue
    L | cat  | 0.7 | -50 | blue
    R | cat  | 0.7 | 90  | blue
    b | ball | 1.0 | 0   |
    r | box  | 1.0 | 20  | red
    w | box  | 1.0 | 20  | white
"""


def detected(letters):
    """Per class, those of OBJECTS that have these letters. The mask stands for the colour."""
    objects, found = {letter: rest for letter, *rest in rows(OBJECTS)}, defaultdict(list)
    for name, confidence, left, colour in map(objects.get, letters):
        box = (int(left), 0, int(left) + 10, 10)
        found[name].append(Detection(float(confidence), box, colour))
    return found


def colours_of(detections, name):
    return [one.mask for one in detections]


@cases("""
    include                    | exclude | outcomes            | why
    1 dog                      |       | D yes 1, C no 0, DG yes 0 | more is no fault
    1 dog, 1 cat               |       | DC yes 1, D no 1/2   | two objects
    3 dog                      | 4 dog | DDD yes 1, DD no 2/3, DDDD no 2/3 | counting
    3 dog                      |       | DDDDDDD yes 0        | a credit is never negative
    1 dog                      | 1 cat | DC no 1              | exclude another class
    1 red dog                  |       | D yes 1, C no 0, DG yes 1/2 | colour
    1 green dog                |       | D no 1/2, DG no 0    | the most confident one is judged
    2 red dog                  |       | DG no 3/4            | one of two is red
    1 red dog, 1 blue cat      |       | DC yes 1, D no 1/2   | colour attribution
    1 green dog, 1 blue cat    |       | DC no 3/4            | one wrong colour
    1 cat, 1 dog left of 0     |       | DC yes 1, D no 1/3, C no 1/3 | to a clause by its index
    1 cat, 1 dog right of 0    |       | DC no 2/3, GC yes 1  | the other side
    1 red cat, 1 dog left of 0 |       | DC no 2/4            | beside what is not as asked
    2 cat, 1 dog left of 0     |       | DCL no 2/3, DCR yes 1 | left of all of them
""")
def test_geneval_by_hand(include, exclude, outcomes, why):
    """Verdicts that follow from the benchmark's published rules."""
    metadata = dict(include=clauses(include), exclude=clauses(exclude))
    for letters, correct, credit in map(str.split, outcomes.split(", ")):
        verdict = rewards.judge(detected(letters), metadata, colours_of)
        assert verdict == (correct == "yes", pytest.approx(eval(credit)))


def test_geneval_of_world_images(judges, monkeypatch):
    """Images that show what is asked for score 1; the same images under other prompts do not."""
    rng, images, task = random.Random(0), [], judges["geneval"]
    for prompt, tag, include, shown, relation in rows("""
            a | colors   | 1 blue ball             | 1 blue ball              |
            b | counting | 2 ball                  | 2 white ball             |
            c | position | 1 box, 1 ball left of 0 | 1 blue ball, 1 green box | left of"""):
        task.metadata[prompt] = dict(tag=tag, include=clauses(include))
        images.append(Image.new("RGB", (32, 32), build.COLOURS["red"]))
        objects = [each for each in clauses(shown) for _ in range(each["count"])]
        for each, (x, y) in zip(objects, build.quarters(rng, len(objects), relation)):
            place = 16 * x + 3, 16 * y + 3
            build.draw_object(images[-1], each["class"], each["color"], *place)
    names = ["strict colors", "strict counting", "strict position"]
    names.append("strict GenEval without single_object, two_object, color_attr")
    assert task.reward(images, "abc") == [1, 1, 1]
    assert task.report(images, "abc") == dict.fromkeys(names, 1)
    assert task.reward(images, "bca") == pytest.approx([1 / 2, 0, 1])
    assert task.report(images, "bca")[names[-1]] == pytest.approx(1 / 3)
    calls, found = [], {"ball": [Detection(0.85, (0, 0, 9, 9))]}  # sure, but not for counting
    monkeypatch.setattr(task, "detect", lambda images: calls.append(1) or [dict(found)])
    assert task.reward([None], "b") == [0] and task.reward([None], "c") == [1 / 3]
    mixture, images = rewards.Mixture([task, Fixed([1.0])], [1, 1]), [None]
    scores(mixture, images, "c"), mixture.report(images, "c"), task.report(images, "c")
    assert len(calls) == 3  # a report detects nothing anew


def test_a_coco_detector_gets_the_benchmark_s_size_and_names(judges, tmp_path):
    config = transformers.AutoConfig.from_pretrained("tiny/detector")
    config.id2label = {i: f"label {i}" for i in range(80)}
    rewards.segmenter_class()(config).save_pretrained(tmp_path)
    shutil.copy("tiny/detector/preprocessor_config.json", tmp_path)
    task = GenEval(model=f"{tmp_path},tiny/clip")
    task.load("cpu")
    processors = task.detector_processor, judges["geneval"].detector_processor
    images = Image.new("RGB", (40, 30)), Image.new("RGB", (400, 30))
    inputs = [each(images=image, return_tensors="pt") for each in processors for image in images]
    shapes = [each.pixel_values.shape[-2:] for each in inputs]
    assert shapes == [(800, 1088), (128, 1344), (32, 32), (32, 32)]  # padded to multiples of 32
    assert task.labels[63:66] == ["laptop", "computer mouse", "tv remote"]
    assert len(task.heldout_prompts) == 200 and len(task.prompts) > 1500


def test_pickscore_prefers_the_right_caption_and_the_clean_image(judges):
    reward, (_, images, captions) = judges["pickscore"].reward, world(200)
    worse, right = map(build.degraded, [random.Random(1)] * 200, images), reward(images, captions)
    assert (right > reward(images, captions[1:] + captions[:1])).sum() >= 190
    assert (right > reward(list(worse), captions)).sum() >= 180


def test_an_evaluation_is_that_of_diffusers_and_monitors_are_only_logged():
    options = "--task pickscore --evaluation-steps 4 --seed 5 --batch-size 3 --group-size 3"
    trainer = trainer_of(options + " --monitor signs,study/allocations.py:Brightness")
    prompts = trainer.task.heldout_prompts[:4]
    metrics, images, values = trainer.evaluate(prompts)
    signs, brightness = (scores(task, images, prompts) for task in trainer.task.monitors)
    assert metrics["report"] == {"Signs": signs.mean(), "Brightness": brightness.mean()}
    assert torch.equal(values, scores(trainer.task, images, prompts))
    options = dict(num_inference_steps=4, guidance_scale=1, max_sequence_length=20)
    options["latents"] = torch.randn(4, 8, 16, 16, generator=torch.manual_seed(5))
    for image, expected in zip(images, trainer.pipe(prompts, **options).images, strict=True):
        assert abs(numpy.int16(image) - numpy.int16(expected)).max() <= 1


class Fixed(rewards.Task):
    prompts = heldout_prompts = PROMPTS

    def __init__(self, values):
        self.values = values

    def reward(self, images, prompts):
        assert not torch.is_grad_enabled()
        return self.values


def test_rewards_are_one_finite_number_per_image():
    """Lists, arrays and tensors, alone and in a mixture. No other values pass."""
    tensor = torch.tensor([0.5, 1.0], requires_grad=True)
    good = [Fixed(values) for values in ([0.5, 1], tensor.detach().numpy(), tensor)]
    for task in (*good, rewards.Mixture(good, [1, 2, 3])):
        assert torch.equal(scores(task, PROMPTS, PROMPTS), tensor)
    wrong = [0.5, math.nan], [math.inf, 1], [0.5], torch.zeros(2, 1), 0.5, None, {"a": 1}, "ab"
    wrong += ["0", "1"], (x for x in good), [torch.zeros(2)] * 2, ([0.5, 1], {}), torch.eye(300)
    for values in wrong:
        for task in (Fixed(values), rewards.Mixture([good[0], Fixed(values)], [1, 2])):
            sentence = r"Fixed must be one finite number for each of 2 images, not .{1,700}\Z"
            with pytest.raises(UserError, match=sentence):
                scores(task, PROMPTS, PROMPTS)


def test_a_mixture_is_the_weighted_mean(judges):
    """Of rewards divided by their scales. The core words are those of all tasks."""
    task, (_, images, prompts) = make_task("ocr:0.7,pickscore:0.1"), world(6, sign_share=1.0)
    task.load("cpu")
    ocr, pickscore = (scores(judges[name], images, prompts) for name in ("ocr", "pickscore"))
    assert_close(scores(task, images, prompts), (0.7 * ocr + 0.1 * pickscore / 26) / 0.8)
    spans = quoted_span(prompts[0]) + rewards.content_word_spans(prompts[0])
    assert task.core_spans(prompts[0]) == spans


OWN = """
import dataclasses, helper_of_mine

@dataclasses.dataclass
class Settings:
    factor: float = helper_of_mine.FACTOR

class FailsInLoad(LogoReward):
    load = lambda self, device: {}["mine"]

class FailsInReward(LogoReward):
    reward = lambda self, images, prompts: {}["mine"]
"""


def test_the_task_in_the_readme(tmp_path):
    """As it stands; also beside a dataclass, with a helper module. Errors stay what they are."""
    readme = code_block("README.md", "python", "class LogoReward")
    (tmp_path / "mine.py").write_text("from __future__ import annotations\n" + readme + OWN)
    (tmp_path / "helper_of_mine.py").write_text("FACTOR = 0.25")
    options = ["--iterations", "1", "--evaluation-prompts", "8", "--task"]
    for name in ("FailsInLoad", "FailsInReward"):
        with pytest.raises(KeyError, match="mine"):
            run(tmp_path / name, *options, f"{tmp_path}/mine.py:{name}")
    run(tmp_path / "run", *options, f"{tmp_path}/mine.py:LogoReward")
    before, after = metrics(tmp_path / "run")
    assert 0 < before["heldout_reward"] < 1 and after["weight_peak"] > 1


# ----------------------------------------------------------------------------------- README, study
def test_the_pipeline_call_in_the_readme(pipe):
    """The image is what it is without the allocator; maps are those of the latents of each step."""
    names, states, options = {}, [], dict(num_inference_steps=10, guidance_scale=3.0)
    torch.manual_seed(3)
    exec(code_block("README.md", "python", "AttentionAllocator"), names)
    torch.manual_seed(3)
    options["callback_on_step_end"] = lambda *step: states.append(step[3]["latents"]) or {}
    image = pipe(names["prompt"], max_sequence_length=build.TOKENS, **options).images[0]
    assert names["image"].tobytes() == image.tobytes() and len(names["maps"]) == 10
    scene = Scene(pipe)  # without guidance, which leaves the conditional half
    pipe.scheduler.set_timesteps(10)
    scene.policy.sigmas = pipe.scheduler.sigmas.tolist()
    scene.prompt = star.encode(pipe, [names["prompt"]], 20)
    for k in (1, 5, 9):
        found = scene.map(states[k - 1], k, names["core_tokens"])
        assert_close(names["maps"][k], found)
    red, green, blue = numpy.median(image, (0, 1))
    assert blue > 60 + max(red, green)  # the prompt asks for a blue wall
