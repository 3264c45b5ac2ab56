"""Experiments with star.py on the miniature. tiny/RESULTS.md reports them.

`maps` needs no experiment. It shows where a Stable Diffusion 3 model looks for words of your own
prompt (--model stabilityai/stable-diffusion-3.5-medium for a real one):

    python tiny/study.py maps 'a white wall with a red ball' --words 'red ball' --save maps.png

`train` makes the runs that `compare` and `plot` read, `sweep` makes and compares all of them.
`python tiny/study.py COMMAND --help` describes a command and its options.
"""

import argparse
import bisect
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import build
import diffusers
import torch
import transformers
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageStat
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import star
from rewards import (
    NUMBERS,
    OCR,
    RELATIONS,
    GenEval,
    Task,
    UserError,
    content_word_spans,
    naming,
    plural,
    quoted_span,
    relations,
    require,
    scores,
)


def load_trainer(*options, task=None):
    """star.Trainer on the CPU, with these options of star.py and maybe another task."""
    args, own_task = star.parse_arguments(["--device", "cpu", "--no-bfloat16", *options])
    return star.Trainer(args, task or own_task)


# ------------------------------------------------------------------------------------------ Charts
COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2".split()


def draw_lines(path, lines, across, up):
    """Draw {name: {x: values}}: the mean at each x, and a band from the least to the most."""
    values = [value for points in lines.values() for at_x in points.values() for value in at_x]
    unit = 10 ** math.floor(math.log10(max(values) - min(values) + 1e-3)) / 2
    low, high = math.floor(min(values) / unit), math.floor(max(values) / unit) + 1
    xs = sorted({x for points in lines.values() for x in points})
    image = Image.new("RGB", (1800, 980), "white")  # twice the final size, which smooths the lines
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(36)

    def place(x, y):
        right, down = (x - xs[0]) / (xs[-1] - xs[0] or 1), (high - y / unit) / (high - low)
        return 140 + 1180 * right, 70 + 790 * down

    def track(points, choose):
        return [place(x, choose(points[x])) for x in sorted(points)]

    draw.text((140, 8), up, "black", font)
    draw.text((730, 926), across, "black", font, anchor="mt")
    for y in (unit * n for n in range(low, high + 1, math.ceil((high - low) / 8))):
        draw.line([place(xs[0], y), place(xs[-1], y)], "#dddddd", 2)
        draw.text((120, place(0, y)[1]), f"{y:.6g}", "black", font, anchor="rm")
    for x in xs[:: math.ceil(len(xs) / 11)]:
        draw.text((place(x, 0)[0], 876), f"{x}", "black", font, anchor="mt")
    coloured = list(zip(lines.items(), itertools.cycle(COLOURS)))
    for (_, points), colour in coloured:
        draw.polygon(track(points, min) + track(points, max)[::-1], colour + "28")
    for row, ((name, points), colour) in enumerate(coloured):
        draw.line(track(points, statistics.mean), colour, 6, joint="curve")
        draw.text((1350, 60 + 48 * row), name, colour, font)
    star.write(path, image.reduce(2).save)


# ------------------------------------------------------------------------- Where does a model look?
class Words(Task):
    """A task without a reward whose core words are the ones you choose, in any prompt."""

    def __init__(self, words=None):
        self.words = words

    def core_spans(self, prompt):
        if not self.words:
            return quoted_span(prompt) or content_word_spans(prompt)
        whole_words = rf"(?<!\w){re.escape(self.words)}(?!\w)"
        return [match.span() for match in re.finditer(whole_words, prompt, re.IGNORECASE)]


def draw_maps(trainer, prompts):
    """maps.png: per prompt and step, the map in red over the image that the model predicts."""
    steps, tiles = trainer.args.steps, []
    batches = trainer.generate(prompts, steps, recorded=range(steps))
    rows = [row for batch in batches for row in zip(batch.latents, batch.maps)]
    sigmas = trainer.policy(steps).sigmas
    for prompt, (latents, maps) in zip(prompts, rows):
        for k in range(steps):
            velocity = (latents[k + 1] - latents[k]) / (sigmas[k + 1] - sigmas[k])  # no noise here
            (image,) = star.decode(trainer.pipe, (latents[k] - sigmas[k] * velocity)[None])
            red = (200 * maps[k] / maps[k].max().clamp_min(1e-8)).byte().cpu().numpy()
            image = image.convert("L").convert("RGB")
            image.paste((230, 30, 30), mask=Image.fromarray(red).resize(image.size, Image.NEAREST))
            tiles.append(star.tile(image, f"sigma {sigmas[k]:.2f} {'' if k else prompt}"))
        tiles.append(star.tile(*star.decode(trainer.pipe, latents[-1:]), "finished"))
    return make_image_grid(tiles, rows=len(prompts), cols=steps + 1)


def maps(args):
    """Show where a model looks for words of your prompt, in one image.

    There is one column per denoising step, from noise to image. It shows the image that the model
    predicts at this step, in grey, and how much each position attends to the words, in red: full
    red is the largest value of the step. `star.py --allocation spatial` trains with these maps.
    Without --words the words are the quoted text or, if there is none, all but function words.

    The model may be any folder or hub name of the Stable Diffusion 3 family. Options that you leave
    out are as in training: 512 pixels, guidance 4.5 and 256 T5 tokens for a full-size model.
    """
    task = Words(args.words)
    spans = task.core_spans(args.prompt)
    found = ", ".join(args.prompt[start:end] for start, end in spans)
    require(spans, f"the prompt has no words {args.words or 'to look for'}: {args.prompt}")
    options = ["--stochastic-range", "0-0", "--stochastic-steps", "1"]  # allows any --steps
    for name in "model seed steps guidance_scale height max_sequence_length device".split():
        if getattr(args, name) is not None:
            options += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    settings, _ = star.parse_arguments(options + ["--no-t5"] * args.no_t5)
    settings = replace(settings, kl_weight=0.0, ema_decay=0.0)  # no copies of the weights
    trainer = star.Trainer(settings, task)
    _, _, core = trainer.encode_prompts([args.prompt])
    require(core.any(), f"the words {found} lie beyond the token limit; shorten the prompt")
    star.write(args.save, draw_maps(trainer, [args.prompt]).save)
    print(f"{args.save} shows the attention to: {found}")


# ----------------------------------------------------------------------------- Kinds of allocation
class Brightness(Task):
    """Make images bright, a reward about the whole image: `--task tiny/study.py:Brightness`."""

    def reward(self, images, prompts):
        return [sum(ImageStat.Stat(image).mean) / 3 / 255 for image in images]


KINDS = ["uniform", "spatial", "spatiotemporal", "lam0.5", "shuffled", "oracle"]
LOCATED = ("ocr", "geneval")  # tasks whose true region is known


def short_name(task):
    """A task's name in those of folders: tiny/study.py:Brightness is brightness."""
    return re.sub(r"[^\w.]+", "-", task.rpartition(".py:")[2].lower())


def tokens_of(mask):
    """The image tokens [8, 8] of which a mask [32, 32] covers a quarter or more."""
    return torch.nn.functional.avg_pool2d(mask[None].float(), build.GRID)[0] >= 0.25


def true_region(task, image):
    """Which tokens show what the reward is about, judged by the image alone: bool [8, 8].

    GenEval: the masks of the detected objects. Other tasks: the places that look like a sign. There
    most pixels are shades of one colour of signs, many of them light, and the wall has another.
    """
    if isinstance(task, GenEval):
        found = task.detect([image])[0]
        masks = [one.mask for objects in found.values() for one in objects]
        return tokens_of(sum(masks, torch.zeros(build.SIZE, build.SIZE)) > 0)
    pixels = (build.to_tensor([image])[0] / 2 + 0.5) * 255
    wall = pixels.flatten(1).median(1).values
    region, (width, height) = torch.zeros(8, 8, dtype=torch.bool), build.SIGN
    for (x, y), name in itertools.product(build.PLACES, build.SIGN_COLOURS):
        colour = torch.tensor(build.COLOURS[name]).float()
        inside = pixels[:, y : y + height, x : x + width].flatten(1)
        shade = (colour @ inside / (colour @ colour)).clamp(0, 1)  # 0 is black
        near = (inside - shade * colour[:, None]).norm(dim=0) < 45
        light = near & (shade > 0.6)
        other = (colour - wall).norm() > 60
        if other and near.float().mean() > 0.75 and light.float().mean() > 0.4:
            region[y // 4 : (y + height) // 4, x // 4 : (x + width) // 4] = True
    return region


def changed_maps(kind, task, pipe, samples):
    """The maps that a kind of allocation uses instead of those of the samples, [B, S, 8, 8].

    shuffled: the same values in random places. oracle: the true region of each finished image.
    """
    if kind == "uniform":
        return torch.ones_like(samples.log_prob)
    if kind == "shuffled":
        values = samples.maps.flatten(2)
        order = torch.rand(values.shape).argsort(-1).to(values.device)
        return values.gather(-1, order).view_as(samples.maps)
    if kind == "oracle":
        images = star.decode(pipe, samples.latents[:, -1])
        regions = torch.stack([true_region(task, image) for image in images])
        return regions.to(samples.maps)[:, None].expand_as(samples.maps)
    return samples.maps


class KindTrainer(star.Trainer):
    """star.py's trainer with a kind of allocation from this file."""

    kind = "spatial"

    def allocation(self, samples):
        maps = changed_maps(self.kind, self.task, self.pipe, samples)
        return super().allocation(replace(samples, maps=maps))


def train_kind(task, kind, seed, more=()):
    """star.main for one run of this kind of allocation, in runs/TASK-KIND-SEED by default."""
    strength = re.fullmatch(r"lam([\d.]+)", kind)
    known = strength or kind in KINDS
    require(known, f"--kind {kind} is not known; `study.py train --help` lists the kinds")
    located = kind != "oracle" or task in LOCATED
    require(located, f"--kind oracle is for --task {' or '.join(LOCATED)}, not for {task}")
    torch.manual_seed(seed)  # of the shuffled maps
    KindTrainer.kind, star.Trainer = kind, KindTrainer
    allocation = kind if kind in ("uniform", "spatiotemporal") else "spatial"
    options = ["--task", task, "--seed", f"{seed}", "--allocation", allocation]
    options += ["--lam", strength[1] if strength else "1"]
    options += ["--out", f"runs/{short_name(task)}-{kind}-{seed}"]
    star.main([*options, *more])


def train(args):
    """Train with one kind of allocation.

    The run goes to the folder runs/TASK-KIND-SEED, unless you add --out.

    uniform, spatial, spatiotemporal and lam0.5 (or another strength) are what star.py offers.
    shuffled uses the values of the maps in random places. oracle uses the true region of each
    finished image. Options that are not listed here are passed on to star.py, such as
    --learning-rate 1e-4.
    """
    train_kind(args.task, args.kind, args.seed, args.more)


# ----------------------------------------------------------------------------------- Comparing runs
def evaluations(folder):
    """The lines of a run's metrics.jsonl that have a held-out reward."""
    with naming(f"run {folder}"):
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "heldout_reward" in line]


def images_to_reach(lines, goal):
    """Images seen when the held-out reward first reaches `goal`, linear between evaluations.

    inf if it never does.
    """
    points = [(x["images"], x["heldout_reward"]) for x in lines if "heldout_reward" in x]
    if points[0][1] >= goal:
        return points[0][0]
    for (images, reward), (next_images, next_reward) in itertools.pairwise(points):
        if next_reward >= goal:  # and reward < goal
            return images + (next_images - images) * (goal - reward) / (next_reward - reward)
    return math.inf


def area(lines):
    """The mean held-out reward over the images of a run, linear between evaluations."""
    points = [(line["images"], line["heldout_reward"]) for line in lines]
    pieces = ((d - b) * (a + c) / 2 for (b, a), (d, c) in itertools.pairwise(points))
    return sum(pieces) / (points[-1][0] - points[0][0])


def ratio(ours, theirs):
    return ours / theirs if 0 < theirs < math.inf else math.nan


def spread(values, form):
    """The median of some values and, in brackets, the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


@functools.cache
def middles(n):
    """Draw n of n sorted values with replacement: how often are the i-th and j-th in the middle?

    {(i, j): number of draws}, n**n draws in all. The median is the mean of the two.
    """
    counts = Counter()
    for drawn in itertools.combinations_with_replacement(range(n), n):
        orders = math.factorial(n)
        for same in Counter(drawn).values():
            orders //= math.factorial(same)
        counts[drawn[(n - 1) // 2], drawn[n // 2]] += orders
    return counts


def interval(values):
    """A 95% interval of the median by bootstrap over seeds, from all possible draws."""
    values, n = sorted(values), len(values)
    medians = sorted(((values[i] + values[j]) / 2, count) for (i, j), count in middles(n).items())
    share = [drawn / n**n for drawn in itertools.accumulate(count for _, count in medians)]
    return tuple(medians[bisect.bisect_left(share, level)][0] for level in (0.025, 0.975))


def estimated(values, form):
    """The median and its interval, or a dash if a run never reached the goal."""
    if any(map(math.isnan, values)):
        return "-"
    low, high = interval(values)
    return f"{statistics.median(values):{form}} [{low:{form}}, {high:{form}}]"


def sign_test(differences):
    """Probability that so many of the differences, or more, have the same sign by chance."""
    differences = [each for each in differences if each != 0]
    count, ahead = len(differences), sum(each > 0 for each in differences)
    tail = sum(math.comb(count, k) for k in range(max(ahead, count - ahead), count + 1))
    return min(1.0, 2 * tail / 2**count)


def read_runs(args):
    """{kind: {seed: evaluations}} of runs that can be compared, the base first."""
    runs, tasks, schedules, base = {args.base: {}}, set(), set(), args.base
    for folder in args.runs:
        with naming(f"run {folder} (TASK-KIND-SEED), --report {args.report}"):
            task, kind, seed = Path(folder).resolve().name.rsplit("-", 2)
            rate = json.loads(Path(folder, "config.json").read_text())["learning_rate"]
            lines = evaluations(folder)
            for line in lines if args.report else ():
                line["heldout_reward"] = line["report"][args.report]
        seeds = runs.setdefault(kind, {})
        require(int(seed) not in seeds, f"two runs are of {kind} with seed {seed}")
        seeds[int(seed)] = lines
        lines[0]["learning_rate"] = rate
        tasks.add(task)
        schedules.add(tuple(line["images"] for line in lines))
    wanted = f"need runs of one task with the same evaluations, some of them {base}; these are of"
    good = len(tasks) == len(schedules) == 1 and runs[base]
    require(good, f"{wanted} {', '.join(sorted(tasks))}: {', '.join(runs)}")
    return runs


def compare(args):
    """Compare kinds of allocation seed by seed, in a Markdown table.

    The others are compared with the kind --base. The runs must differ in nothing but kind, learning
    rate and seed. In round brackets are the least and the most of the seeds, in square ones a 95%
    interval of the median (bootstrap). p is the sign test's. Equal is neither better nor sooner.
    """
    runs, base, goal, reward = read_runs(args), args.base, args.goal, "heldout_reward"
    first, name = [lines[0] for lines in runs[base].values()], args.report or "held-out reward"
    print(f"{name} before: {spread([line[reward] for line in first], '.3f')}")
    print(
        f"| allocation | learning rate | seeds | {name} at the end | mean over the run | against"
        f" {base} | better on | p | images to {goal:.3g} | against {base} | sooner on |\n"
        + "| --- " * 11
        + "|"
    )
    for kind, seeds in runs.items():
        rows = []
        for seed in sorted(seeds.keys() & runs[base].keys()):
            ours, theirs = seeds[seed], runs[base][seed]
            reach, base_reach = images_to_reach(ours, goal), images_to_reach(theirs, goal)
            gain = round(area(ours) - area(theirs), 9)  # equal but for rounding is equal
            rows.append((ours[-1][reward], area(ours), gain, reach, ratio(reach, base_reach)))
        require(rows, f"no run of {kind} has the seed of a run of {base}")
        ends, areas, gains, reaches, ratios = zip(*rows)
        ahead = f"{sum(gain > 0 for gain in gains)} of {len(rows)} | {sign_test(gains):.2g}"
        against = f"{estimated(gains, '+.3f')} | {ahead}" if kind != base else " | | "
        sooner = f"{sum(each < 1 for each in ratios)} of {len(rows)}"
        sooner = f"{estimated(ratios, '.2f')} | {sooner}" if kind != base else " | "
        rates = ", ".join(sorted({f"{lines[0]['learning_rate']:g}" for lines in seeds.values()}))
        print(
            f"| {kind} | {rates} | {len(rows)} | {spread(ends, '.3f')} | {spread(areas, '.3f')} |"
            f" {against} | {spread(reaches, '.0f')} | {sooner} |"
        )


def plot(args):
    """Draw the held-out reward of runs in one chart.

    The horizontal axis is the images seen in training. Runs that differ only in the seed share a
    line, their mean, and a band from the least to the most of them.
    """
    lines = defaultdict(lambda: defaultdict(list))
    for folder in args.runs:
        points = lines[re.sub(r"-\d+$", "", Path(folder).resolve().name)]
        for line in evaluations(folder):
            points[line["images"]].append(line["heldout_reward"])
    draw_lines(args.save, lines, "images seen in training", "held-out reward, mean of the seeds")


# --------------------------------------------------------------------------------- The whole study
TUNING_SEEDS, FINAL_SEEDS = range(100, 104), range(10, 20)


def make_run(folder, task, kind, seed, options):
    """Make a run, or continue one that was interrupted. What it prints goes to FOLDER.log."""
    if not (done := folder / "done").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        begun = (folder / "config.json").exists()
        options = [*options, "--out", f"{folder}"] + ["--resume"] * begun
        with open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
            train_kind(task, kind, seed, options)
        (folder / "checkpoint.safetensors").unlink()  # hundreds of runs would fill the disk
        shutil.rmtree(folder / "pipeline")
        done.touch()


def sweep(args):
    """Compare kinds of allocation, each at its own best learning rate.

    Each kind is run at each learning rate with the seeds 100 to 103, and evaluated after every
    fourth iteration. The best rate is that of the highest mean reward over the run. At this rate
    each kind is run with the seeds 10 to 19, which are compared. One thread a run. If it is
    interrupted, the same command goes on. Options that are not listed here are passed on to
    star.py.
    """
    name = short_name(args.task)
    with naming(f"--rates {args.rates}"):
        rates = [float(rate) for rate in args.rates.split(",")]
    kinds = [kind for kind in args.kinds.split(",") if kind != "oracle" or args.task in LOCATED]

    def folder(kind, rate, seed):
        return args.folder / f"{rate:g}" / f"{name}-{kind}-{seed}"

    def make_all(runs, *options):
        jobs = []
        for kind, rate, seed in runs:
            more = ["--learning-rate", f"{rate:g}", *options, *args.more]
            jobs.append((folder(kind, rate, seed), args.task, kind, seed, more))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
            list(tqdm(pool.map(make_run, *zip(*jobs)), "runs", len(jobs)))

    make_all(itertools.product(kinds, rates, TUNING_SEEDS), "--evaluate-every", "4")
    best = {}
    print("mean reward over the run\n| allocation |" + "".join(f" {rate:g} |" for rate in rates))
    print("| --- " * (1 + len(rates)) + "|")
    for kind in kinds:
        areas = {
            rate: [area(evaluations(folder(kind, rate, seed))) for seed in TUNING_SEEDS]
            for rate in rates
        }
        best[kind] = max(rates, key=lambda rate: statistics.mean(areas[rate]))
        print(f"| {kind} |" + "".join(f" {spread(each, '.3f')} |" for each in areas.values()))
    final = [(kind, best[kind], seed) for kind in kinds for seed in FINAL_SEEDS]
    make_all(final, "--evaluate-every", f"{args.evaluate_every}")
    args.runs = [folder(*run) for run in final]
    compare(args)


# ------------------------------------------------------------------------------ Quality of the maps
def area_under_roc(scores, truth):
    """Probability that a random position inside the region scores higher than one outside it.

    Ties count half.
    """
    inside, outside = scores[truth][:, None], scores[~truth]
    return ((inside > outside) + 0.5 * (inside == outside)).mean().item()


@torch.no_grad()
def sign_quality(args):
    """The area under the ROC curve of the maps of a sign's text: {blocks: {step: [area]}}.

    The images show signs in known places and are noised to the level of each step, so that the
    transformer sees what it would see in a rollout.
    """
    trainer, rng = load_trainer("--model", args.model, task=Words()), random.Random(7)
    transformer, vae = trainer.transformer, trainer.pipe.vae
    texts = build.all_targets(held_out=True)
    shots = [build.picture(rng, texts, sign_share=1.0) for _ in range(args.images)]
    truth = torch.zeros(len(shots), 8, 8, dtype=torch.bool)
    for region, shot in zip(truth, shots):
        x, y = (side // build.GRID for side in shot["place"])
        region[y : y + 2, x : x + 3] = True
    pixels = build.to_tensor([shot["image"] for shot in shots])
    clean = vae.encode(pixels).latent_dist.mean
    clean = (clean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.manual_seed(0)
    noise = torch.randn(clean.shape)
    context, pooled, core = trainer.encode_prompts([shot["caption"] for shot in shots])
    policy = trainer.policy(trainer.args.steps)
    every = list(range(len(transformer.transformer_blocks)))
    choices = {f"block {block}": [block] for block in every}
    choices |= {"last half": every[len(every) // 2 :], "all blocks": every}
    lines = defaultdict(dict)
    for k, sigma in enumerate(policy.sigmas[:-1]):
        with star.AttentionAllocator(transformer, core, every) as allocator:
            policy.velocity((1 - sigma) * clean + sigma * noise, k, (context, pooled))
        recorded = torch.stack(allocator.recorded).unflatten(-1, (8, 8))
        for name, blocks in choices.items():
            lines[name][k] = [statistics.mean(map(area_under_roc, recorded[blocks].mean(0), truth))]
    return lines


def words_by_kind(prompt, clauses):
    """The words of a GenEval prompt, and the classes that they are about: {kind: (span, classes)}.

    Of several objects the first one counts.
    """
    first, last = clauses[0], clauses[-1]
    classes = {kind: {first["class"]} for kind in ("object", "colour", "number")}
    words = {
        "object": first["class"] if first["count"] == 1 else plural(first["class"]),
        "colour": first.get("color"),
        "number": NUMBERS.get(first["count"]),
        "relation": last.get("position", [None])[0],
    }
    found = {}
    for kind, word in words.items():
        if word:
            start = prompt.rindex(word)  # the wall before it may have the same colour
            about = classes.get(kind, {first["class"], last["class"]})
            found[kind] = [(start, start + len(word))], about
    return found


def object_quality(args):
    """The same for the words of GenEval's prompts, by their kind, in images of the model.

    Only images that are right count. The truth is what the detector finds of the classes that the
    words are about.
    """
    trainer = load_trainer("--task", "geneval", "--model", args.model)
    task, lines, steps = trainer.task, defaultdict(dict), trainer.args.steps
    words = {}
    for prompt in task.prompts:
        clauses = task.metadata[prompt]["include"]
        everything = task.core_spans(prompt), {clause["class"] for clause in clauses}
        words[prompt] = words_by_kind(prompt, clauses) | {"all core words": everything}
    for kind in ("object", "colour", "number", "relation", "all core words"):
        prompts = [prompt for prompt in task.prompts if kind in words[prompt]][: args.images]
        task.core_spans = {prompt: words[prompt][kind][0] for prompt in prompts}.get
        areas, rolled = [], list(trainer.generate(prompts, steps, recorded=range(steps)))
        maps = torch.cat([samples.maps for samples in rolled])
        latents = torch.cat([samples.latents[:, -1] for samples in rolled])
        images = star.decode(trainer.pipe, latents)
        verdicts = task.verdicts(images, prompts)
        for row, (prompt, found) in enumerate(zip(prompts, task.detect(images))):
            masks = [one.mask for name in words[prompt][kind][1] for one in found.get(name, [])]
            if verdicts[row][0] and (truth := tokens_of(sum(masks) > 0)).any():
                areas.append([area_under_roc(each, truth) for each in maps[row]])
        print(f"{kind}: {len(areas)} of {len(prompts)} images are right")
        for k, values in enumerate(zip(*areas)):
            lines[kind][k] = [statistics.mean(values)]
    return lines


def map_quality(args):
    """Measure how well the maps find what the words mean.

    The measure is the area under the ROC curve: 0.5 is chance, 1 is perfect. The table has one
    column per denoising step. The words are a sign's text or, with --objects, the objects, colours,
    numbers and relations of GenEval's prompts, --images prompts of each kind.
    """
    lines = object_quality(args) if args.objects else sign_quality(args)
    for name, points in lines.items():
        areas = "".join(f"{area:7.3f}" for (area,) in points.values())
        print(f"{name:<16}{areas}")
    up = "area under the ROC curve, 0.5 is chance"
    draw_lines(args.save, lines, "denoising step", up)


# --------------------------------------------------------------------------------- The method's aim
def overlay(image, strength, colour):
    """The image in grey below a colour that is as strong as `strength` [h, w] in [0, 1]."""
    mask = Image.fromarray((200 * strength).byte().numpy()).resize(image.size, Image.NEAREST)
    image = image.convert("L").convert("RGB")
    image.paste(colour, mask=mask)
    return image


def problem(args):
    """Draw two rollouts, and where their advantages are applied."""
    trainer = load_trainer()
    torch.manual_seed(args.seed)
    prompts = [trainer.task.heldout_prompts[args.seed]] * 16
    noise = torch.randn(1, *trainer.shape).expand(len(prompts), -1, -1, -1)
    context, pooled, core = trainer.encode_prompts(prompts)
    policy = trainer.policy(trainer.args.steps)
    steps = (1, 2, 3)
    samples = star.rollout(policy, noise, (context, pooled), steps, None, steps, core)
    images = star.decode(trainer.pipe, samples.latents[:, -1])
    rewards = scores(trainer.task, images, prompts)
    advantages = star.group_advantages(rewards[None])[0]
    weights, tiles = star.allocation_weights(samples.maps, (8, 8))[:, 1], []
    for i, colour in (rewards.argmax(), "#285ae6"), (rewards.argmin(), "#e61e1e"):
        image, advantage, weight = images[i], advantages[i], weights[i]
        allocated = advantage * weight
        even, uneven = torch.full_like(weight, 0.4), weight / weight.max()
        for shown, caption in (
            (image, f"reward {rewards[i]:.2f}, advantage {advantage:+.1f}"),
            (overlay(image, even, colour), f"Flow-GRPO: {advantage:+.1f} everywhere"),
            (
                overlay(image, uneven, colour),
                f"STAR: from {allocated.min():+.1f} to {allocated.max():+.1f}",
            ),
        ):
            tiles.append(star.tile(shown, caption, side=208).crop((0, 0, 220, 236)))
    star.write(args.save, make_image_grid(tiles, rows=2, cols=3).save)
    print(prompts[0])


# ----------------------------------------------------------------------------- Signal in a gradient
def estimate(trainer, kinds, steps):
    """Estimate the gradient from the images of one iteration: {(kind, step): vector}."""
    args, task = trainer.args, trainer.task
    K, G = args.prompts_per_iteration, args.group_size
    chosen = torch.randperm(len(task.prompts))[:K]
    group = torch.arange(K).repeat_interleave(G)
    prompts = [task.prompts[i] for i in chosen]
    context, pooled, core = trainer.encode_prompts(prompts)
    policy = trainer.policy(args.steps)
    noise = torch.randn(K, *trainer.shape)[group]
    batches, images = [], []
    for index in torch.arange(K * G).split(args.batch_size):
        prompt, words = (context[group[index]], pooled[group[index]]), core[group[index]]
        samples = star.rollout(policy, noise[index], prompt, steps, None, steps, words)
        batches.append((samples, prompt, index))
        images += star.decode(trainer.pipe, samples.latents[:, -1])
    rewards = scores(task, images, [prompts[i] for i in group]).view(K, G)
    advantages = star.group_advantages(rewards, args.global_std, args.advantage_clip).flatten()
    estimates = defaultdict(float)
    for samples, prompt, index in batches:
        maps = [changed_maps(kind, task, trainer.pipe, samples) for kind in kinds]
        weights = [star.allocation_weights(each, trainer.shape[1:]) for each in maps]
        for j, k in enumerate(steps):
            mean, std = policy.distribution(samples.latents[:, k], k, prompt)
            new = star.position_log_prob(samples.latents[:, k + 1], mean, std)
            for kind, each in zip(kinds, weights):
                old, weight = samples.log_prob[:, j], each[:, j]
                loss, _, _ = star.star_loss(new, old, advantages[index], weight, args.clip_range)
                pieces = torch.autograd.grad(
                    loss, trainer.weights, None, True, materialize_grads=True
                )
                estimates[kind, k] += torch.cat([piece.flatten() for piece in pieces])
    return estimates


def gradient_measures(own, across, uniform):
    """(variance, agreement, alignment), see `gradients`, from products [N, N] of N estimates.

    own: with each other, across: with those of `uniform`, uniform: of those with each other.
    Alignment is NaN unless the signal of `uniform` is above zero.
    """

    def different(products):  # the mean over pairs of different estimates
        count = len(products) * (len(products) - 1)
        return ((products.sum() - products.trace()) / count).item()

    square, length = own.diagonal().mean().item(), own.diagonal().sqrt().mean().item()
    signal = different(uniform)
    alignment = different(across) / length / signal**0.5 if signal > 0 else math.nan
    return square - different(own), different(own) / square, alignment


def with_errors(*products):
    """`gradient_measures` with their jackknife errors: [(value, error), ...]."""
    count, left_out = len(products[0]), []
    for i in range(count):
        rest = torch.arange(count) != i
        left_out.append(gradient_measures(*(each[rest][:, rest] for each in products)))
    errors = ((count - 1) * torch.tensor(left_out).var(0, unbiased=False)).sqrt()
    return list(zip(gradient_measures(*products), errors.tolist()))


def gradients(args):
    """Measure how much signal there is in an estimate of the gradient.

    There is one number per step and kind of allocation. An estimate is the gradient from the images
    of one iteration at the starting weights.

        variance   E |estimate - signal|^2, where the signal is the expected estimate
        agreement  mean cosine of two estimates, 1 / (1 + variance / |signal|^2)
        alignment  mean cosine of an estimate with the gradient of the expected reward, which is the
                   signal of `uniform`

    Only products of different estimates count, so that noise does not pass for signal. Errors are
    the jackknife's standard errors over the estimates, which tend to be too large.
    """
    require(args.repeats > 2, f"--repeats is {args.repeats}; standard errors need 3 or more")
    trainer, steps, estimates = load_trainer("--task", args.task), range(6), []
    kinds = ["uniform", "shuffled", "spatial"]
    kinds += ["oracle"] * isinstance(trainer.task, OCR | GenEval)
    for repeat in tqdm(range(args.repeats), "estimates"):
        torch.manual_seed(10_000 + repeat)
        estimates.append(estimate(trainer, kinds, steps))
    lines = defaultdict(dict)
    print(" " * 22 + "step" + "".join(f"{k:>18}" for k in steps))
    for kind in kinds:
        columns = []
        for k in steps:
            ours, uniform = (torch.stack([e[x, k] for e in estimates]) for x in (kind, "uniform"))
            columns.append(with_errors(ours @ ours.T, ours @ uniform.T, uniform @ uniform.T))
            value, error = columns[-1][1]
            lines[kind][k] = [value - error, value + error]
        for name, row in zip(("variance", "agreement", "alignment"), zip(*columns)):
            form = "{:10.2g} +- {:<5.1g}" if name == "variance" else "{:10.3f} +- {:<5.3f}"
            print(f"{kind:<10} {name:<15}" + "".join(form.format(*column) for column in row))
    up = f"agreement of {args.repeats} estimates, {args.task}; band: standard error"
    draw_lines(args.save, lines, "denoising step", up)


def tricks(args):
    """Measure the held-out reward at several guidance scales, and with more contrast."""
    options = ["--task", args.task, "--model", args.model, "--evaluation-steps", str(args.steps)]
    trainer = load_trainer(*options)
    prompts = rewards.evenly_spaced(trainer.task.heldout_prompts, args.images)

    def show(name, metrics, rewards):
        error = rewards.std() / len(rewards) ** 0.5
        report = ", ".join(f"{key} {value:.2f}" for key, value in metrics["report"].items())
        print(f"{name}: {metrics['heldout_reward']:.3f} +- {error:.3f} {report}", flush=True)

    for scale in (1.0, 1.5, 2.0, 3.0, 4.5):
        trainer.args.guidance_scale = scale
        show(f"guidance {scale}", *trainer.evaluate(prompts)[::2])
    trainer.args.guidance_scale, decode = 1.0, star.decode
    for factor in (1.5, 2.0, 3.0):

        def brighter(pipe, latents, factor=factor):
            return [ImageEnhance.Contrast(image).enhance(factor) for image in decode(pipe, latents)]

        star.decode = brighter
        show(f"contrast {factor}", *trainer.evaluate(prompts)[::2])
    star.decode = decode


GROUP = rf"(an?|two|three|four) (?:({'|'.join(build.COLOURS)}) )?(ball|box|triangle)(?:e?s)?\b"


def faults_of(prompt, read, signs, found, colours_of):
    """What a picture shows otherwise than its prompt says: a set of names.

    read: the text that the reader found. signs: the number of signs. found: per shape, the objects
    that the detector found. colours_of(objects, shape) -> list of colours.
    """
    faults, sign = set(), re.search(r'"(.+)"', prompt)
    if sign and sign[1] not in read:
        shorter = "missing letters" if read else "no legible sign"
        faults.add(shorter if len(read) < len(sign[1]) else "wrong letters")
    if signs > 1:
        faults.add("sign painted twice")
    numbers = {"a": 1, "an": 1} | {word: number for number, word in NUMBERS.items()}
    asked = [(numbers[n], colour, shape) for n, colour, shape in re.findall(GROUP, prompt)]
    surplus = {shape: len(objects) for shape, objects in found.items()}
    for count, colour, shape in asked:
        objects = found.get(shape, [])
        surplus[shape] = surplus.get(shape, 0) - count
        painted = colours_of(objects[:count], shape) if colour and objects else []
        if any(each != colour for each in painted):
            faults.add("wrong colour")
    missing, extra = (sum(max(0, s * n) for n in surplus.values()) for s in (-1, 1))
    if missing and extra:
        faults.add("wrong shape")
    elif missing or extra:
        faults.add("objects missing" if missing else "objects extra")
    relation = re.search(" (" + "|".join(RELATIONS) + ") ", prompt)
    if relation and not missing:
        (_, _, a), (_, _, b) = asked
        pairs = itertools.product(found[a], found[b])
        if not all(relation[1] in relations(one.box, other.box) for one, other in pairs):
            faults.add("wrong place")
    return faults


def faults(args):
    """Count what is wrong with the pictures of a model, one picture for each training prompt."""
    trainer = load_trainer("--task", args.task, "--model", args.model)
    reader, counter, detector = OCR(), build.Signs(), GenEval()
    reader.load("cpu")
    detector.load("cpu")
    prompts = (trainer.task.prompts * 10)[: args.images]
    batches, counts = trainer.generate(prompts, trainer.args.steps), defaultdict(int)
    images = [one for batch in batches for one in star.decode(trainer.pipe, batch.latents[:, -1])]
    parts = (reader.transcribe(images), counter.reward(images, prompts), detector.detect(images))
    for image, prompt, *seen in zip(images, prompts, *parts):
        found = faults_of(prompt, *seen, functools.partial(detector.colours, image))
        for name in found or ["none"]:
            counts[name] += 1
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{name:<20}{count / len(images):6.1%}")


# -------------------------------------------------------------------------------------------- Main
OPTIONS = {  # name: (default, help)
    "words": (None, "words of the prompt to look for"),
    "model": (str(Path(__file__).parent / "sd3"), "folder or hub name of the pipeline"),
    "task": ("ocr", "a task of star.py"),
    "kind": ("spatial", "kind of allocation, see above"),
    "seed": (0, "seed of prompts and noise"),
    "steps": (10, "denoising steps"),
    "guidance-scale": (None, "classifier-free guidance; 1 is none"),
    "height": (None, "height and width in pixels"),
    "no-t5": (False, "do without the third and largest text encoder"),
    "max-sequence-length": (None, "T5 tokens per prompt"),
    "device": (None, "cpu or cuda"),
    "goal": (0.8, "held-out reward to be reached"),
    "base": ("uniform", "kind of allocation that the others are compared with"),
    "report": (None, "compare another number of the metrics, such as 'strict GenEval'"),
    "folder": (Path("runs/study"), "where the runs are"),
    "kinds": (",".join(KINDS), "kinds of allocation, separated by commas"),
    "rates": ("2e-4,4e-4,8e-4,1.6e-3", "learning rates, separated by commas"),
    "evaluate-every": (1, "iterations from one evaluation to the next, seeds 10 to 19"),
    "objects": (False, "measure the words of GenEval's prompts instead of a sign's text"),
    "images": (96, "number of images"),
    "repeats": (5, "number of estimates"),
    "save": (None, "image to write"),
}
COMMANDS = {
    maps: "words model seed steps guidance-scale height no-t5 max-sequence-length device save",
    train: "task kind seed",
    compare: "goal base report",
    sweep: "task kinds rates evaluate-every folder goal base report",
    plot: "save",
    map_quality: "objects images model save",
    problem: "seed save",
    gradients: "task repeats save",
    tricks: "task images model steps",
    faults: "task images model",
}


def make_parser():
    """One command per experiment, with its own options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, options in COMMANDS.items():
        name, about = function.__name__.replace("_", "-"), inspect.getdoc(function)
        command = commands.add_parser(
            name, help=about.split("\n")[0], description=about, formatter_class=raw
        )
        if function is maps:
            command.add_argument("prompt", help="the prompt, in quotation marks")
        if function in (compare, plot):
            command.add_argument("runs", nargs="+", metavar="RUN", help="folder TASK-KIND-SEED")
        for option in options.split():
            default, about = OPTIONS[option]
            kind = dict(type=str if default is None else type(default))
            kind = dict(action="store_true") if default is False else kind
            about += " (default: %(default)s)"
            command.add_argument(f"--{option}", default=default, help=about, **kind)
        command.set_defaults(function=function, save=f"{name}.png")
    return parser


def main(argv=None):
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    parser = make_parser()
    args, more = parser.parse_known_args(argv)
    args.more = [each for each in more if each != "--"]
    if args.more and args.function not in (train, sweep):
        parser.error(f"unrecognized arguments: {' '.join(args.more)}")
    try:
        args.save = Path(args.save)
        require(args.save.parent.is_dir(), f"--save {args.save}: there is no such folder")
        args.function(args)
    except UserError as error:
        sys.exit(f"study.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("study.py: out of GPU memory; try --no-t5 or a smaller --height")


if __name__ == "__main__":
    main()
