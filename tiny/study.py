"""The measurements that README.md reports, each with one command, on the miniature.

    python tiny/study.py problem --save FILE       the method in one picture
    python tiny/study.py maps --save FILE          does the attention find the sign? area under the ROC curve
    python tiny/study.py objects --pictures 64     does the attention to "blue box" find the box that is painted?
    python tiny/study.py train --kind oracle       a run whose map is another one: shuffled, oracle, lam0.5, ... (see README)
    python tiny/study.py compare runs/ocr-*        what each kind of allocation gains over uniform, seed by seed
    python tiny/study.py gradients --save FILE     how much signal each kind leaves in the gradient
    python tiny/study.py overhead                  time and memory of `spatial` relative to `uniform`
    python tiny/study.py guidance                  held-out reward of the untrained miniature at several guidance scales
    python tiny/study.py memory                    what training at SD3.5 Medium's shapes keeps in memory
    python tiny/study.py full_size --save FOLDER   a pipeline of SD3.5 Medium's shapes with random weights, to measure with
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import star                      # first: it quiets the libraries' remarks about packages that nothing here needs
import build
import torch
from PIL import ImageStat
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from rewards import OCR, GenEval, Task, quoted_span
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel


@torch.no_grad()
def problem(args):
    """One picture that says what the method is for: two rollouts of a prompt, and where their advantages are applied."""
    settings = star.parse_arguments(["--model", args.model])[0]
    run, generator, steps = star.load(settings, star.check_training(settings), None), torch.Generator().manual_seed(args.seed), (1, 2, 3)
    prompt, count = run.task.heldout_prompts[args.seed], 16
    core = star.core_tokens_of(run.pipeline, [prompt], [run.task.core_spans(prompt)], settings.max_sequence_length)
    given = tuple(each.expand(count, *each.shape[1:]) for each in star.encode(run.pipeline, [prompt], settings.max_sequence_length))
    noise = torch.randn(1, *run.shape, generator=generator).expand(count, -1, -1, -1)
    painted = star.rollout(run.pipeline.transformer, noise, given, run.empty_prompt, star.schedule(run.pipeline, 10), steps, generator, core_tokens=core.expand(count, -1),
                           map_steps=steps, map_blocks=run.blocks)
    pictures = star.decode(run.pipeline.vae, painted.latents[:, -1])
    rewards = run.task.reward(pictures, [prompt] * count)
    advantages, weights = star.group_advantages(rewards[None])[0], star.allocation_weights(painted.maps, (8, 8))[:, 1]
    rows = []
    for one in (rewards.argmax(), rewards.argmin()):
        colour = (40, 90, 230) if advantages[one] > 0 else (230, 30, 30)
        shown = f"reward {rewards[one]:.2f}, advantage {advantages[one]:+.1f}"
        rows.append([(pictures[one], shown), (star.overlay(pictures[one], torch.full((8, 8), 0.4), colour), f"Flow-GRPO: {advantages[one]:+.1f} everywhere"),
                     (star.overlay(pictures[one], weights[one] / weights.max(), colour),
                      f"STAR: from {advantages[one] * weights[one].min():+.1f} to {advantages[one] * weights[one].max():+.1f}")])
    print(prompt)
    star.draw_table(rows, args.save, side=208)


def area_under_roc(scores, truth):
    """Probability that a random position of the region scores higher than one outside it; ties count half."""
    inside, outside = scores[truth], scores[~truth]
    return ((inside[:, None] > outside).float() + 0.5 * (inside[:, None] == outside).float()).mean().item()


@torch.no_grad()
def maps(args):
    """World pictures with a known sign, noised to each level of the schedule: the transformer sees what it sees in a rollout."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.model)
    transformer, vae = pipeline.transformer, pipeline.vae
    rng, texts = random.Random(7), build.all_targets(held_out=True)
    shots = [build.picture(rng, texts, sign_share=1.0) for _ in range(args.pictures)]
    clean = vae.encode(build.to_tensor([shot["image"] for shot in shots])).latent_dist.mean
    clean = (clean - vae.config.shift_factor) * vae.config.scaling_factor
    prompts = [shot["caption"] for shot in shots]
    truth = torch.zeros(len(shots), 8, 8, dtype=torch.bool)
    for region, shot in zip(truth, shots):
        x, y = (side // build.GRID for side in shot["place"])
        region[y:y + 2, x:x + 3] = True
    core = star.core_tokens_of(pipeline, prompts, map(quoted_span, prompts), build.TOKENS)
    given = star.encode(pipeline, prompts, build.TOKENS)
    pipeline.scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    count = transformer.config.num_layers
    choices = {f"block {block}": [block] for block in range(count)} | {f"blocks {count // 2} to {count - 1}": list(range(count // 2, count)), "all": list(range(count))}
    print("step            " + "  ".join(f"{step:>5}" for step in range(10)))
    print("sigma           " + "  ".join(f"{sigma:5.2f}" for sigma in pipeline.scheduler.sigmas.tolist()[:10]))
    noise, lines = torch.randn(clean.shape, generator=generator), []
    for name, blocks in choices.items():
        row = []
        for sigma in pipeline.scheduler.sigmas.tolist()[:10]:
            with star.AttentionAllocator(transformer, core, blocks) as allocator:
                star.predict_velocity(transformer, (1 - sigma) * clean + sigma * noise, sigma, given, 1.0, None)
            found = allocator.map().view(-1, 8, 8)
            row.append(statistics.mean(area_under_roc(m, t) for m, t in zip(found, truth)))
        print(f"{name:<16}" + "  ".join(f"{value:5.3f}" for value in row), flush=True)
        lines.append((name, {step: [value] for step, value in enumerate(row)}, 3))
    if args.save:
        star.draw_lines(lines, args.save, "denoising step", "area under the ROC curve", "0.5 is chance; attention to\nthe quoted text, 8 x 8 tokens")


@torch.no_grad()
def objects(args):
    """Does the map of "blue box" lie on the box that is painted? Against the detector's mask on the finished picture, per step.

    Paints until as many pictures as asked for show one box, which is blue: where there are several, which one is meant is unknown.
    """
    pipeline, task, words = StableDiffusion3Pipeline.from_pretrained(args.model), GenEval(), "blue box"
    task.load("cpu")
    prompts = [f"a {wall} wall with two red balls and a {words}" for wall in ("green", "white", "black", "pink", "yellow", "brown", "purple", "orange")] * 8
    core = star.core_tokens_of(pipeline, prompts, [[(p.index(words), p.index(words) + len(words))] for p in prompts], build.TOKENS)
    given, empty = star.encode(pipeline, prompts, build.TOKENS), star.encode(pipeline, [""], build.TOKENS)
    sigmas, generator, scores, seen = star.schedule(pipeline, 10), torch.Generator().manual_seed(0), [], 0
    while len(scores) < args.pictures:
        painted = star.rollout(pipeline.transformer, torch.randn(len(prompts), 8, 16, 16, generator=generator), given, empty, sigmas, (), generator,
                               guidance_scale=args.guidance_scale, core_tokens=core, map_steps=range(10),
                               map_blocks=star.default_map_blocks(pipeline.transformer.config.num_layers))
        pictures = star.decode(pipeline.vae, painted.latents[:, -1])
        for maps, picture, found in zip(painted.maps, pictures, task.detect(pictures)):
            seen, boxes = seen + 1, found.get("box", [])
            if len(boxes) == 1 and tokens_of(boxes[0].mask).any() and task.colours(picture, boxes, "box") == ["blue"] and len(scores) < args.pictures:
                scores.append([area_under_roc(one, tokens_of(boxes[0].mask)) for one in maps])
    print(f"{len(scores)} of {seen} pictures show one box, a blue one; area under the ROC curve of \"{words}\" per step: "
          + " ".join(f"{statistics.mean(values):.2f}" for values in zip(*scores)))


class Brightness(Task):
    """A reward about the whole picture, where allocation has nothing to offer: `--task tiny/study.py:Brightness`."""

    def reward(self, images, prompts):
        return torch.tensor([sum(ImageStat.Stat(image).mean) / 3 / 255 for image in images])


class BrightnessByText(Brightness):
    """The same with the sign's text for core words: the allocation is narrow and has nothing to do with the reward."""
    own_prompts = "ocr"

    def core_spans(self, prompt):
        return quoted_span(prompt)


def tokens_of(mask):
    """The image tokens [8, 8] of which a mask [32, 32] covers a quarter or more."""
    return torch.nn.functional.avg_pool2d(mask[None].float(), build.GRID)[0] >= 0.25


def true_region(task, picture):
    """Where on a picture the things are that the reward is about, by the picture alone: bool [8, 8], a value per image token.

    OCR: the places that look like a sign, mostly one light colour that the wall has not, the rest its shades towards
    black. Other tasks: the detector's masks.
    """
    if isinstance(task, GenEval):
        masks = [one.mask for objects in task.detect([picture])[0].values() for one in objects]
        return tokens_of(torch.stack([torch.zeros(build.SIZE, build.SIZE, dtype=torch.bool), *masks]).any(0))
    pixels = (build.to_tensor([picture])[0] / 2 + 0.5) * 255
    wall, region = pixels.flatten(1).median(1).values, torch.zeros(8, 8, dtype=torch.bool)
    width, height = build.SIGN
    for x, y in build.PLACES:
        inside = pixels[:, y:y + height, x:x + width].flatten(1)
        for name in build.SIGN_COLOURS:
            colour = torch.tensor(build.COLOURS[name], dtype=torch.float)
            if (colour - wall).norm() > 60:
                share = (colour @ inside / (colour @ colour)).clamp(0, 1)                     # how far from black
                near = (inside - share * colour[:, None]).norm(dim=0) < 45
                if near.float().mean() > 0.75 and (near & (share > 0.6)).float().mean() > 0.4:
                    region[y // 4:(y + height) // 4, x // 4:(x + width) // 4] = True
    return region


def changed_maps(kind, task, pipeline, painted, generator):
    """The maps [B, S, 8, 8] of a rollout as another allocation would have them: the same values in random places, or the true regions."""
    if kind == "shuffled":
        order = torch.rand(painted.maps.flatten(2).shape, generator=generator).argsort(-1)
        return painted.maps.flatten(2).gather(-1, order).view_as(painted.maps)
    if kind == "oracle":
        regions = torch.stack([true_region(task, picture) for picture in star.decode(pipeline.vae, painted.latents[:, -1])])
        return regions[:, None].expand_as(painted.maps).float()
    return painted.maps


def train(args):
    """A run of star.py in runs/<task>-<kind>-<seed> whose maps are exchanged after each rollout."""
    if not re.fullmatch(r"uniform|spatial|spatiotemporal|shuffled|oracle|lam[\d.]+", args.kind):
        sys.exit(f"--kind {args.kind} is not known; choose uniform, spatial, spatiotemporal, shuffled, oracle, or lam with a number such as lam0.5.")
    if args.kind == "oracle" and args.task not in ("ocr", "geneval"):
        sys.exit(f"--task {args.task} has no oracle: which region its reward is about is not known.")
    generator, rollout, load = torch.Generator().manual_seed(args.seed), star.rollout, star.load

    def loading(*given):
        run = load(*given)

        def exchanging(*arguments, **settings):
            painted = rollout(*arguments, **settings)
            if painted.maps is not None:
                painted.maps = changed_maps(args.kind, run.task, run.pipeline, painted, generator)
            return painted
        star.rollout = exchanging
        return run

    star.load = loading
    allocation = args.kind if args.kind in ("uniform", "spatiotemporal") else "spatial"
    strength = ["--lam", args.kind.removeprefix("lam")] if args.kind.startswith("lam") else []
    name = args.task.rpartition(":")[2].lower()
    star.main(["--task", args.task, "--allocation", allocation, *strength, "--seed", str(args.seed), "--out", f"runs/{name}-{args.kind}-{args.seed}"])


def gradients(args):
    """How much signal is in one estimate of the gradient (96 pictures, starting weights), per trained step and kind of allocation.

    variance: E|estimate - signal|^2, signal being the expected estimate.
    agreement: mean cosine of two independent estimates, which is |signal|^2 / E|estimate|^2 = 1 / (1 + variance / |signal|^2).
    alignment: mean cosine of one estimate with the true gradient of the expected reward, the mean of many `uniform` ones.
    Only products of different estimates count, so that noise does not pass for signal; alignment is NaN where the signal of
    `uniform` cannot be told from nothing. The standard errors are the jackknife's over the estimates, which errs upwards.
    """
    if args.repeats < 3:
        sys.exit(f"--repeats is {args.repeats}; errors of products of different estimates take 3 or more.")
    settings = star.parse_arguments(["--task", args.task, "--model", args.model])[0]
    run, steps = star.load(settings, star.check_training(settings), None), range(6)
    kinds = ("uniform", "shuffled", "spatial") + (("oracle",) if isinstance(run.task, (OCR, GenEval)) else ())
    parameters, sigmas, estimates = list(run.pipeline.transformer.parameters()), star.schedule(run.pipeline, settings.steps), {}
    K, G = settings.prompts_per_iteration, settings.group_size
    group = torch.arange(K).repeat_interleave(G)
    for repeat in range(args.repeats):
        generator = torch.Generator().manual_seed(10_000 + repeat)
        prompts = [run.task.prompts[i] for i in torch.randperm(len(run.task.prompts), generator=generator)[:K]]
        context, pooled = star.encode(run.pipeline, prompts, settings.max_sequence_length)
        core = star.core_tokens_of(run.pipeline, prompts, map(run.task.core_spans, prompts), settings.max_sequence_length)
        noise, parts = torch.randn(K, *run.shape, generator=generator)[group], [slice(i, i + settings.batch_size) for i in range(0, K * G, settings.batch_size)]
        given = [(context[group[part]], pooled[group[part]]) for part in parts]
        rollouts = [star.rollout(run.pipeline.transformer, noise[part], prompt, run.empty_prompt, sigmas, steps, generator, settings.noise_level,
                                 settings.guidance_scale, core[group[part]], map_steps=steps, map_blocks=run.blocks) for part, prompt in zip(parts, given)]
        pictures = [picture for painted in rollouts for picture in star.decode(run.pipeline.vae, painted.latents[:, -1])]
        advantages = star.group_advantages(run.task.reward(pictures, [prompts[k] for k in group]).view(K, G), settings.global_std, settings.advantage_clip).flatten()
        for part, painted, prompt in zip(parts, rollouts, given):
            weights = {kind: torch.ones_like(painted.log_prob) if kind == "uniform" else
                       star.allocation_weights(changed_maps(kind, run.task, run.pipeline, painted, generator), run.shape[1:]) for kind in kinds}
            for step in steps:
                mean, std = star.transition(run.pipeline.transformer, painted, step, prompt, run.empty_prompt, sigmas, settings.noise_level, settings.guidance_scale)
                log_prob = star.position_log_prob(painted.latents[:, step + 1], mean, std)[:, None]
                for kind in kinds:
                    loss = star.star_loss(log_prob, painted.log_prob[:, step:step + 1], advantages[part], weights[kind][:, step:step + 1], settings.clip_range)[0]
                    pieces = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
                    kept = estimates.setdefault((kind, step), [])
                    kept += [0] * (repeat + 1 - len(kept))
                    kept[repeat] = kept[repeat] + torch.cat([piece.flatten() for piece in pieces])
        print(f"\r{repeat + 1} of {args.repeats}", end="", file=sys.stderr)

    # Everything wanted is in the products of the estimates with each other and with those of uniform, [repeats, repeats].
    own = {key: torch.stack(kept) @ torch.stack(kept).T for key, kept in estimates.items()}
    across = {(kind, step): torch.stack(kept) @ torch.stack(estimates["uniform", step]).T for (kind, step), kept in estimates.items()}
    names, found = ("variance", "agreement", "alignment"), {}
    for kind, step in own:
        products = own[kind, step], across[kind, step], own["uniform", step]
        rest = [[i for i in range(args.repeats) if i != left_out] for left_out in range(args.repeats)]
        without = torch.tensor([gradient_measures(*(one[few][:, few] for one in products)) for few in rest])
        found[kind, step] = list(zip(gradient_measures(*products), ((args.repeats - 1) * without.var(0, unbiased=False)).sqrt().tolist()))
    print("\n" + " " * 22 + "step" + "".join(f"{step:>18}" for step in steps))
    for kind, (number, name) in itertools.product(kinds, enumerate(names)):
        form = "{:10.2g} +- {:<5.1g}" if name == "variance" else "{:10.3f} +- {:<5.3f}"
        print(f"{kind:<10} {name:<15}" + "".join(form.format(*found[kind, step][number]) for step in steps))
    if args.save:
        lines = [(kind, {step: [value - error, value + error] for step in steps for value, error in found[kind, step][1:2]}, 3) for kind in kinds]
        star.draw_lines(lines, args.save, "denoising step", "agreement: the share of signal in one estimate of the gradient",
                        f"{settings.task}, {args.repeats} estimates of 96\npictures; band: standard error")


def gradient_measures(own, across, uniform):
    """(variance, agreement, alignment), as `gradients` has them, from the products [N, N] of N estimates with each other, of them with
    those of `uniform`, and of the latter with each other. Alignment is NaN where uniform's signal cannot be told from nothing."""
    different = lambda products: ((products.sum() - products.trace()) / (len(products) * (len(products) - 1))).item()      # the mean of different estimates' products
    square, length, signal = own.diagonal().mean().item(), own.diagonal().sqrt().mean().item(), different(uniform)
    return square - different(own), different(own) / square, different(across) / length / signal**0.5 if signal > 0 else math.nan


def images_to_reach(lines, goal):
    """Pictures seen when the held-out reward first reaches `goal`, linear between evaluations; inf if it never does."""
    points = [(line["images"], line["heldout_reward"]) for line in lines if "heldout_reward" in line]
    if points[0][1] >= goal:
        return points[0][0]
    for (images, reward), (next_images, next_reward) in zip(points, points[1:]):
        if next_reward >= goal:                                            # and `reward` is less
            return images + (next_images - images) * (goal - reward) / (next_reward - reward)
    return math.inf


def compare(args):
    """Each kind of allocation against one of them, seed by seed, from runs in folders <task>-<kind>-<seed> that differ in nothing else; a table in Markdown.

    Median over the seeds, in brackets the least and the most. A difference exceeds the spread if it has one sign on all seeds.
    """
    heldout = lambda lines: [line["heldout_reward"] for line in lines if "heldout_reward" in line]
    runs, tasks, evaluations = {args.base: {}}, set(), set()
    for name in args.runs:
        task, kind, seed = Path(name).name.rsplit("-", 2)
        runs.setdefault(kind, {})[int(seed)] = lines = star.read_metrics(Path(name))
        for line in lines if args.report else ():
            if "report" in line:
                line["heldout_reward"] = line["report"][args.report]
        tasks.add(task)
        evaluations.add(tuple(line["images"] for line in lines if "heldout_reward" in line))
    if len(tasks) != 1 or len(evaluations) != 1 or not runs[args.base]:
        sys.exit(f"runs of one task with the same evaluations can be compared, some of them {args.base}; these are of {', '.join(sorted(tasks))}"
                 f" with {len(evaluations)} lists of evaluations, {len(runs[args.base])} of them {args.base}.")
    start, error = ([lines[0][key] for lines in runs[args.base].values()] for key in ("heldout_reward", "heldout_reward_standard_error"))
    print(f"{args.report or 'held-out reward'} before: {', '.join(f'{value:.3f}' for value in start)}" + ("" if args.report else f"; standard error of each {statistics.mean(error):.3f}"))
    ratio = lambda ours, theirs: ours / theirs if theirs and theirs < math.inf else math.nan             # neither 0 pictures nor never tell how much faster
    spread = lambda values, form: "-" if any(map(math.isnan, values)) else f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
    print(f"| allocation | seeds | {args.report or 'held-out reward'} at the end | mean over the run | against {args.base}, seed by seed | better on | pictures to {args.goal:.3g} | against {args.base} | pictures to {args.base}'s end, against {args.base} |")
    print("| --- " * 9 + "|")
    for kind, seeds in runs.items():
        pairs = [(lines, runs[args.base][seed]) for seed, lines in sorted(seeds.items()) if seed in runs[args.base]]
        gains = [statistics.mean(heldout(ours)) - statistics.mean(heldout(theirs)) for ours, theirs in pairs]
        reach = [images_to_reach(ours, args.goal) for ours, _ in pairs]
        sooner = [ratio(value, images_to_reach(theirs, args.goal)) for value, (_, theirs) in zip(reach, pairs)]
        end = [ratio(images_to_reach(ours, heldout(theirs)[-1]), images_to_reach(theirs, heldout(theirs)[-1])) for ours, theirs in pairs]
        columns = [len(pairs), spread([heldout(ours)[-1] for ours, _ in pairs], '.3f'), spread([statistics.mean(heldout(ours)) for ours, _ in pairs], '.3f'),
                   spread(gains, '+.3f'), f"{sum(gain > 0 for gain in gains)} of {len(gains)}", spread(reach, '.0f'), spread(sooner, '.2f'), spread(end, '.2f')]
        print(f"| {kind} | " + " | ".join("" if kind == args.base and number in (3, 4, 6, 7) else str(column) for number, column in enumerate(columns)) + " |")


def overhead(args):
    """CPU seconds of one thread for whole iterations in turn (steadier than the clock where other programs run), and peak memory of whole runs."""
    torch.set_num_threads(1)
    seconds, memory = {"uniform": [], "spatial": []}, {"uniform": [], "spatial": []}
    for repeat in range(args.repeats):          # first: a process counts the memory of the one that started it, which is small as yet
        for allocation in memory if repeat % 2 == 0 else reversed(memory):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(HERE.parent / "star.py"), "--allocation", allocation, "--iterations", "1", "--evaluation-prompts", "8", "--out", folder + "/run"]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                _, status, used = os.wait4(process.pid, 0)
                if status:
                    sys.exit(f"{' '.join(command)} failed")
                memory[allocation].append(used.ru_maxrss / 1024)
    settings = star.parse_arguments(["--model", args.model])[0]
    run = star.load(settings, star.check_training(settings), None)
    star.iterate(run, 0, "uniform")                                            # the first warms up
    for repeat in range(args.repeats):
        for allocation in seconds if repeat % 2 == 0 else reversed(seconds):
            start = time.process_time()
            star.iterate(run, 1 + repeat, allocation)
            seconds[allocation].append(time.process_time() - start)
    for name, unit, values in (("iteration", "CPU s", seconds), ("peak memory", "MiB", memory)):
        ratios = [b / a for a, b in zip(values["uniform"], values["spatial"])]
        print(f"{name}: uniform {statistics.median(values['uniform']):.2f} {unit}, spatial {statistics.median(values['spatial']):.2f} {unit}, "
              f"ratio median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


# Stable Diffusion 3.5 Medium's published configuration. CLIP's and T5's vocabularies stay, the tokenizers are the miniature's.
TRANSFORMER = dict(sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
                   caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384,
                   dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
VAE = dict(in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, sample_size=1024, scaling_factor=1.5305,
           shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768, hidden_act="quick_gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, hidden_act="gelu")
T5_XXL = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128, feed_forward_proj="gated-gelu", dropout_rate=0.0)


def full_size_parts():
    """Functions that make each heavy part of a pipeline of SD3.5 Medium's shapes, with random weights."""
    clip = lambda sizes: CLIPTextModelWithProjection(CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    return {"transformer": lambda: SD3Transformer2DModel(**TRANSFORMER), "vae": lambda: AutoencoderKL(**VAE), "text_encoder": lambda: clip(CLIP_L),
            "text_encoder_2": lambda: clip(CLIP_G), "text_encoder_3": lambda: T5EncoderModel(T5Config(**T5_XXL))}


def full_size(args):
    """Save a pipeline of SD3.5 Medium's shapes with random weights in bfloat16: for measuring, not for looking at (30 GB of disk)."""
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = build.clip_tokenizer(), build.t5_tokenizer()
    clip_tokenizer.model_max_length = 77
    parts, without = full_size_parts(), ("text_encoder_3",) if args.no_t5 else ()
    small = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "tokenizer": clip_tokenizer, "tokenizer_2": clip_tokenizer,
             "tokenizer_3": None if args.no_t5 else t5_tokenizer}
    pipeline = StableDiffusion3Pipeline(**small, **{name: None for name in parts})
    pipeline.save_pretrained(args.save)
    index = json.loads((Path(args.save) / "model_index.json").read_text())
    torch.set_default_dtype(torch.bfloat16)
    for name, make in parts.items():                       # one after the other: all at once would not fit into 24 GiB
        if name not in without:
            part = make()
            part.save_pretrained(Path(args.save) / name)
            index[name] = ["transformers" if name.startswith("text") else "diffusers", type(part).__name__]
            del part
    (Path(args.save) / "model_index.json").write_text(json.dumps(index, indent=1))


def saved_bytes(layers, dual, checkpointing, height=512, tokens=77 + 256):
    """What autograd keeps for the backward pass of one picture, weights aside, in a transformer of SD3.5 Medium's width under bfloat16 autocast."""
    transformer = SD3Transformer2DModel(**TRANSFORMER | dict(num_layers=layers, dual_attention_layers=tuple(range(dual)))).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    shapes = {tuple(parameter.shape) for parameter in transformer.parameters()} | {tuple(parameter.T.shape) for parameter in transformer.parameters() if parameter.dim() == 2}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:          # nor autocast's copies of weights
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = transformer(torch.randn(1, 16, height // 8, height // 8), torch.randn(1, tokens, 4096), torch.randn(1, 2048), torch.tensor([500.0]))
    del output
    return sum(kept.values())


def memory(args):
    """Every gigabyte of full-parameter training at SD3.5 Medium's shapes: counted from the shapes, activations measured block by block."""
    gib, settings = 2**30, star.Arguments(**star.FULL_SIZE, **star.FULL_SIZE_TASK["ocr"])
    with torch.device("meta"):
        parts = {name: make() for name, make in full_size_parts().items()}
    count = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    shapes = [tuple(parameter.shape) for parameter in parts["transformer"].parameters()]
    weights, images = count["transformer"], settings.prompts_per_iteration * settings.group_size
    plain, dual = saved_bytes(3, 1, False) - saved_bytes(2, 1, False), saved_bytes(3, 2, False) - saved_bytes(2, 1, False)
    rest = saved_bytes(2, 1, False) - dual                 # the last block, which drops the text, and what surrounds the blocks
    whole = 13 * dual + 10 * plain + rest
    border = saved_bytes(3, 1, True) - saved_bytes(2, 1, True)
    checkpointed = 24 * border + dual
    latents = 16 * 64 * 64 * 4
    rows = [("transformer, float32", 4 * weights), ("gradients, float32", 4 * weights), ("AdamW's state, float32", 8 * weights),
            ("Adafactor's state, instead", sum(4 * (sum(shape) if len(shape) == 2 else math.prod(shape)) for shape in shapes)),
            ("bfloat16 copies of the weights, during a rollout", 2 * weights), ("starting weights, bfloat16, while they are asked", 2 * weights),
            ("average of the weights (on the CPU)", 4 * weights), ("VAE, float32", 4 * count["vae"]),
            ("two CLIP text encoders, bfloat16, while they encode", 2 * (count["text_encoder"] + count["text_encoder_2"])),
            ("T5-XXL, bfloat16, while it encodes", 2 * count["text_encoder_3"]),
            (f"rollouts: latents of {images} pictures, {settings.steps + 1} states", images * (settings.steps + 1) * latents),
            (f"rollouts: log-probabilities and maps, {settings.stochastic_steps} steps", images * settings.stochastic_steps * (64 * 64 + 32 * 32) * 4),
            ("activations of one picture, both guidance halves", 2 * whole), ("the same with gradient checkpointing", 2 * checkpointed)]
    print(f"{weights / 1e9:.3f} billion parameters in the transformer; " + ", ".join(f"{name} {number / 1e9:.3f}" for name, number in list(count.items())[1:]))
    for name, size in rows:
        print(f"{name:<66}{size / gib:8.2f} GiB")


@torch.no_grad()
def guidance(args):
    settings = star.parse_arguments(["--model", args.model, "--task", args.task, "--evaluation-steps", str(args.steps)])[0]
    run = star.load(settings, star.check_training(settings), None)
    prompts = run.task.heldout_prompts[:args.pictures]
    encoded = star.encode(run.pipeline, prompts, settings.max_sequence_length)
    for scale in (1.0, 1.5, 2.0, 3.0, 4.5, 7.0):
        settings.guidance_scale = scale
        rewards, pictures = star.evaluate(run, prompts, encoded)
        report = ", ".join(f"{name} {value:.2f}" for name, value in run.task.report(pictures, prompts).items())
        print(f"guidance {scale}: {rewards.mean():.3f} +- {rewards.std() / len(rewards) ** 0.5:.3f} {report}", flush=True)
        if args.save:
            star.draw_table([[(picture, f"{reward:.2f}\n{textwrap.fill(prompt, 22)}") for picture, reward, prompt in zip(pictures[:8], rewards, prompts)]],
                            Path(args.save) / f"guidance_{scale}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("problem", "maps", "objects", "train", "compare", "gradients", "overhead", "guidance", "memory", "full_size"))
    parser.add_argument("runs", nargs="*", help="for compare: folders of runs, named <task>-<allocation>-<seed>")
    parser.add_argument("--task", default="ocr", help="for guidance, train and gradients")
    parser.add_argument("--kind", default="spatial", help="for train: uniform, spatial, spatiotemporal, lam0.5 (or another strength), shuffled, oracle")
    parser.add_argument("--seed", type=int, default=0, help="for train")
    parser.add_argument("--goal", type=float, default=0.8, help="for compare: the held-out reward to be reached")
    parser.add_argument("--report", help="for compare: one of the task's other figures instead of its reward, such as 'strict GenEval'")
    parser.add_argument("--base", default="uniform", help="for compare: the kind that the others are compared with")
    parser.add_argument("--model", default=str(HERE / "sd3"))
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--save", help="problem, maps and gradients: the PNG to draw; guidance: a folder for samples; full_size: the pipeline's folder")
    parser.add_argument("--no-t5", action="store_true", help="for full_size: without the third text encoder")
    args = parser.parse_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
