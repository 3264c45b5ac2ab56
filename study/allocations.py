"""Which allocation learns faster? Experiments on the miniature; study/RESULTS.md reports them.

    python study/allocations.py maps 'a white wall with a red ball' --words 'red ball'

shows where a Stable Diffusion 3 model looks for words of your own prompt. COMMAND --help describes
the others. Options of star.py, such as --task geneval or --model NAME, may follow those of maps,
map-quality and problem.
"""

import argparse
import json
import math
import multiprocessing
import random
import re
import shutil
import statistics
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tiny"))
import star  # isort: skip  (the first, since it silences the libraries)
import build
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageStat
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from rewards import (
    NUMBERS,
    OCR,
    GenEval,
    Task,
    content_word_spans,
    make_task,
    plural,
    quoted_span,
)

HERE = Path(__file__).parent

# ------------------------------------------------------------------------------- What is compared
# Kinds of allocation: --allocation and --lam. `shuffled` has the values of the maps in random
# places, `oracle` the true region of each finished image. They are controls.
KINDS = {
    "uniform": ("uniform", 1.0),
    "spatial": ("spatial", 1.0),
    "spatial0.5": ("spatial", 0.5),
    "spatiotemporal": ("spatiotemporal", 1.0),
    "spatiotemporal0.5": ("spatiotemporal", 0.5),
    "shuffled": ("spatial", 1.0),
    "oracle": ("spatial", 1.0),
}
STAR = "spatiotemporal0.5"  # the default of star.py
NAMES = {"uniform": "Flow-GRPO", STAR: "STAR"}  # the other kinds have no other name

TASKS = {
    "writing": "ocr",
    "objects": "geneval",
    "preference": "pickscore",
    "brightness": f"{HERE}/allocations.py:Brightness",
}
LOCATED_TASKS = ["writing", "objects"]  # the others are about the whole picture

# Training runs: images of an update, number of updates, and rewards that a run may reach.
EXPERIMENTS = {
    "writing-8": {
        "task": "writing",
        "images": 8,
        "updates": 80,
        "goals": [0.7, 0.8, 0.9],
    },
    "writing-24": {
        "task": "writing",
        "images": 24,
        "updates": 60,
        "goals": [0.7, 0.8, 0.9],
    },
    "objects-24": {
        "task": "objects",
        "images": 24,
        "updates": 60,
        "goals": [0.55, 0.65, 0.75],
    },
    "preference-8": {
        "task": "preference",
        "images": 8,
        "updates": 80,
        "goals": [15, 17, 19],
    },
    "preference-24": {
        "task": "preference",
        "images": 24,
        "updates": 60,
        "goals": [16, 18, 20],
    },
    "brightness-24": {
        "task": "brightness",
        "images": 24,
        "updates": 60,
        "goals": [0.5, 0.52, 0.54],
    },
}
RATES = [1e-4, 2e-4, 4e-4]
FRESH_SEEDS = list(range(30, 40))

# First-order gains: a task and how many objects its prompts may ask for, if that matters.
SUBJECTS = {
    "writing": ("writing", None),
    "objects": ("objects", None),
    "preference": ("preference", None),
    "brightness": ("brightness", None),
    "one object": ("objects", [1]),
    "two objects": ("objects", [2]),
    "three or four objects": ("objects", [3, 4]),
}

EVALUATION_PROMPTS = 48
GAIN_IMAGES = 24
WORK = Path("runs/study")  # for what is not finished
GAINS = "gains.jsonl"  # the files of results
RUNS = "learning.jsonl"
STEPS = "steps.jsonl"
FIGURE = HERE / "figures/results.png"


def task_options(task, images):
    """Options of star.py for a task of TASKS with this many images an update."""
    return [
        f"--task={TASKS[task]}",
        f"--prompts-per-iteration={images // 8}",
        "--group-size=8",
        f"--batch-size={images}",
        f"--evaluation-prompts={EVALUATION_PROMPTS}",
        "--ema-decay=0",
        "--monitor=",
        "--no-bfloat16",
    ]


def kind_options(kind):
    allocation, lam = KINDS[kind]
    return [f"--allocation={allocation}", f"--lam={lam}"]


def load_trainer(options):
    """star.Trainer on the CPU with these options of star.py."""
    star.DEVICE = "cpu"
    args = star.parse_arguments(options)
    return star.Trainer(args, make_task(args))


def read_results(folder, name):
    """The finished results in a file of JSON lines; none if there is no file."""
    file = Path(folder, name)
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def add_result(folder, name, result):
    """Add a line. Numbers keep five digits."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, list):
            return [short(each) for each in value]
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        return value

    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, name), "a") as file:
        file.write(json.dumps(short(result)) + "\n")


def is_finished(results, about):
    """Is there a result with these values?"""
    for result in results:
        if about.items() <= result.items():
            return True
    return False


def run_jobs(function, jobs, title):
    """Call function(*job) for each job, one at a time per core. Yields (job, what it returned)."""
    if not jobs:
        return
    pool = ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    futures = {pool.submit(function, *job): job for job in jobs}
    try:
        for future in tqdm(as_completed(futures), title, len(jobs)):
            yield futures[future], future.result()
    finally:  # after an error or Ctrl-C, too
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------- Kinds of allocation
class Brightness(Task):
    """A reward about the whole image: `--task study/allocations.py:Brightness`."""

    def reward(self, images, prompts):
        values = []
        for image in images:
            red, green, blue = ImageStat.Stat(image).mean
            values.append((red + green + blue) / 3 / 255)
        return values


def true_regions(task, images):
    """Which tokens show what the reward is about: bool [B, 8, 8]; None if it is the whole image."""
    if isinstance(task, GenEval):
        regions = []
        for found in task.detect(images):
            masks = [one.mask for objects in found.values() for one in objects]
            regions.append(tokens_of(masks))
        return torch.stack(regions)
    if isinstance(task, OCR):
        return torch.stack([sign_region(image) for image in images])
    return None


def tokens_of(masks):
    """The image tokens [8, 8] of which masks [32, 32] together cover a quarter or more."""
    together = torch.zeros(build.SIZE, build.SIZE, dtype=torch.bool)
    for mask in masks:
        together |= mask
    covered = avg_pool2d(together[None].float(), build.GRID)[0]
    return covered >= 0.25


def sign_region(image):
    """The tokens of the places that show a sign."""
    pixels = (build.to_tensor([image])[0] / 2 + 0.5) * 255
    wall = pixels.flatten(1).median(dim=1).values
    region = torch.zeros(8, 8, dtype=torch.bool)
    width, height = build.SIGN
    for x, y in build.PLACES:
        inside = pixels[:, y : y + height, x : x + width].flatten(1)
        if is_sign(inside, wall):
            rows = slice(y // build.GRID, (y + height) // build.GRID)
            columns = slice(x // build.GRID, (x + width) // build.GRID)
            region[rows, columns] = True
    return region


def is_sign(pixels, wall):
    """Are most pixels [3, N] shades of a colour of signs, many of them light, unlike the wall?"""
    for name in build.SIGN_COLOURS:
        colour = torch.tensor(build.COLOURS[name]).float()
        shade = (colour @ pixels) / (colour @ colour)
        shade = shade.clamp(0, 1)  # 0 is black
        near = (pixels - shade * colour[:, None]).norm(dim=0) < 45
        light = near & (shade > 0.6)
        differs = (colour - wall).norm() > 60
        if differs and near.float().mean() > 0.75 and light.float().mean() > 0.4:
            return True
    return False


def maps_of_kind(kind, batch, task, images):
    """The maps [B, S, 8, 8] that a kind of allocation uses, of a rollout and its images."""
    maps = torch.stack(batch.maps, dim=1)
    if kind == "shuffled":
        values = maps.flatten(2)
        order = torch.rand(values.shape).argsort(-1)
        return values.gather(-1, order).view_as(maps)
    if kind == "oracle":
        regions = true_regions(task, images).float()
        return regions[:, None].expand_as(maps)
    return maps


def watch(trainer, prompts, recorded_steps=()):
    """Deterministic rollouts of one image per prompt, in batches."""
    generator = torch.Generator().manual_seed(trainer.args.seed)
    noise = torch.randn(len(prompts), *trainer.shape, generator=generator)
    policy = trainer.training_policy
    return trainer.rollouts(policy, noise, prompts, recorded_steps=recorded_steps)


def watch_maps(trainer, prompts):
    """Per prompt the latents [T + 1, C, H, W] of one image, and the maps [T, H/2, W/2]."""
    samples = []
    for batch in watch(trainer, prompts, range(trainer.args.steps)):
        latents = torch.stack(batch.latents, dim=1)
        maps = torch.stack(batch.maps, dim=1)
        samples += zip(latents, maps)
    return samples


# ------------------------------------------------------------------------------- First-order gain
# How much does one update raise the reward, to first order? Flow-GRPO's estimate of the gradient
# is unbiased. So the expected rise is its expected inner product with the update, if the images
# behind the two are independent. An update is an estimate of a kind's gradient as AdamW would
# normalise it. The gain is the rise with a kind, divided by that with Flow-GRPO, for updates of
# equal length. It needs no training, but is about the starting weights only.
EPSILON = 1e-8  # AdamW's; the gradients of the miniature are small enough for it to matter
MEASURED_KINDS = ["uniform", "spatial", "spatiotemporal", "shuffled", "oracle"]
MIXED_KINDS = {"spatial0.5": "spatial", "spatiotemporal0.5": "spatiotemporal"}


def estimate(trainer, index, kinds):
    """Estimate the gradient from the images of one iteration, with each of some MEASURED_KINDS.

    Returns the gradients per kind, [S, parameters], whose sum over S is what training uses; the
    steps; and the share of the picture that the reward is about, in images that show it.
    """
    args = trainer.args
    torch.manual_seed(index)  # of the shuffled maps
    prompts, (batch,) = trainer.sample(index)
    images = trainer.images_of([batch])
    values = trainer.task.scores(images, prompts, star.DEVICE)
    advantages = star.group_advantages(values.view(-1, args.group_size), args.global_std)
    advantages = advantages.clamp(-5, 5).flatten()

    weights = {}
    for kind in kinds:
        allocation, lam = KINDS[kind]
        if kind == "uniform":
            allocation, lam = "spatial", 0.0  # w = 1
        maps = maps_of_kind(kind, batch, trainer.task, images)
        weights[kind] = star.allocation_weights(maps, trainer.shape[1:], allocation, lam)

    parameters = list(trainer.transformer.parameters())
    gradients = defaultdict(list)
    for j, k in enumerate(batch.steps):
        mean, std = trainer.training_policy.distribution(batch.latents[k], k, batch.prompt)
        log_prob = star.position_log_prob(batch.latents[k + 1], mean, std)
        old = log_prob.detach()
        for kind in kinds:
            loss, _, _ = star.star_loss(log_prob, old, advantages, weights[kind][:, j], 1.0)
            loss = loss / len(batch.steps)
            pieces = torch.autograd.grad(
                loss, parameters, retain_graph=True, materialize_grads=True
            )
            gradients[kind].append(torch.cat([piece.flatten() for piece in pieces]))
    return {
        "gradients": {kind: torch.stack(vectors) for kind, vectors in gradients.items()},
        "steps": list(batch.steps),
        "share": share_of_picture(trainer.task, images),
    }


def share_of_picture(task, images):
    """The mean share of the true region, in images that have one; None if none has."""
    regions = true_regions(task, images)
    if regions is None:
        return 1.0
    shares = regions.float().mean(dim=(1, 2))
    shares = shares[shares > 0]
    return shares.mean().item() if len(shares) > 0 else None


def of_kind(kind, gradients):
    """The gradient of a kind from those of MEASURED_KINDS. With lam = 0.5 the weights are the mean
    of two others, and so is the gradient."""
    if kind in MIXED_KINDS:
        return (gradients["uniform"] + gradients[MIXED_KINDS[kind]]) / 2
    return gradients[kind]


def all_and_without_each(values):
    """Sums over the first dimension, [N, ...] -> [1 + N, ...]: of all, and without each."""
    total = values.sum(dim=0, keepdim=True)
    return torch.cat([total, total - values])


def expected_rise(raw, estimates):
    """What first-order gain is made of, summed over some parameters.

        update[j] = estimates[j] / (root mean square over j of estimates + epsilon)
        rise      = mean over i != j of  <raw[i], update[j]>
        length^2  = mean over j of       |update[j]|^2

    raw, estimates [N, parameters]: Flow-GRPO's and a kind's, of the same images. Returns rise and
    squared length, [1 + N] each: with all N estimates, and without each of them.
    """
    raw = raw.double()
    estimates = estimates.double()
    N = len(raw)
    count = torch.tensor([N] + [N - 1] * N)
    mean_square = all_and_without_each(estimates.square()) / count[:, None]
    mean_square = mean_square.clamp(min=0)  # else rounding could make it negative
    scale = mean_square.sqrt() + EPSILON
    all_pairs = all_and_without_each(raw) * all_and_without_each(estimates)
    equal_pairs = all_and_without_each(raw * estimates)
    rise = ((all_pairs - equal_pairs) / scale).sum(dim=1) / (count * (count - 1))
    squared_length = (mean_square / scale.square()).sum(dim=1)
    return torch.stack([rise, squared_length])


def relative_gain(ours, theirs):
    """(gain, its standard error) from a kind's and Flow-GRPO's `expected_rise`.

    The error is the jackknife's: how much the gain varies when an estimate is left out.
    """
    rise, squared_length = ours
    per_length = rise / squared_length.sqrt()
    rise, squared_length = theirs
    per_length_of_flow_grpo = rise / squared_length.sqrt()
    gains = per_length / per_length_of_flow_grpo
    without_each = gains[1:]
    N = len(without_each)
    error = math.sqrt((N - 1) * without_each.var(unbiased=False))
    return gains[0].item(), error


def measure_gains(estimates, block=4_000):
    """{kind: {"all" or a step: [gain, error]}} from what `estimate` returned."""
    size = estimates[0]["gradients"]["uniform"].shape[1]
    measured = list(estimates[0]["gradients"])
    totals = {}  # of `expected_rise`, of each step and kind
    for start in range(0, size, block):
        part = slice(start, start + block)
        for step in ["all", 0, 1, 2, 3]:
            gradients = {}
            for kind in measured:
                gradients[kind] = vectors_of_step(estimates, kind, step, part)
            if len(gradients["uniform"]) < 3:
                continue  # too few for an error
            for kind in measured + list(MIXED_KINDS):
                rise = expected_rise(gradients["uniform"], of_kind(kind, gradients))
                totals[step, kind] = totals.get((step, kind), 0) + rise
    gains = defaultdict(dict)
    for (step, kind), total in totals.items():
        gain, error = relative_gain(total, totals[step, "uniform"])
        gains[kind][str(step)] = [gain, error]
    return dict(gains)


def vectors_of_step(estimates, kind, step, part):
    """[N, part of the parameters] of a step, from the estimates that have it, or of all steps."""
    vectors = []
    for each in estimates:
        gradients = each["gradients"][kind][:, part]
        if step == "all":
            vectors.append(gradients.sum(dim=0))
        elif step in each["steps"]:
            vectors.append(gradients[each["steps"].index(step)])
    if not vectors:
        return torch.zeros(0, 0)
    return torch.stack(vectors)


def subject_trainer(subject):
    """A trainer whose training prompts are those of a subject."""
    task, counts = SUBJECTS[subject]
    options = task_options(task, GAIN_IMAGES) + ["--allocation=spatial", "--seed=1000"]
    trainer = load_trainer(options)
    if counts is not None:
        prompts = []
        for prompt in trainer.task.prompts:
            clauses = trainer.task.metadata[prompt]["include"]
            if sum(clause["count"] for clause in clauses) in counts:
                prompts.append(prompt)
        trainer.task.prompts = prompts
    return trainer


def save_estimates(subject, indices, folder):
    """Make some estimates, each in a file. What was made before an interruption is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(MEASURED_KINDS)
    if SUBJECTS[subject][0] not in LOCATED_TASKS:
        kinds.remove("oracle")
    trainer = subject_trainer(subject)
    for index in indices:
        file = folder / f"{index:05}.safetensors"
        if not file.exists():
            partial = file.with_suffix(".partial")
            write_estimate(estimate(trainer, index, kinds), partial)
            partial.rename(file)


def write_estimate(made, file):
    about = {"steps": made["steps"], "share": made["share"]}
    save_file(made["gradients"], file, metadata={"about": json.dumps(about)})


def read_estimate(file):
    """What `estimate` returned. Its gradients stay on the disk until they are needed."""
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["about"])
    return about | {"gradients": load_file(file)}


def gain(subjects, count, results):
    """Measure the first-order gain of each kind of allocation, from estimates of the gradient.

    A finished gain becomes a line of gains.jsonl and is not measured again. Estimates that were
    made before an interruption are kept.
    """
    for subject in subjects:
        about = {"subject": subject, "estimates": count}
        if is_finished(read_results(results, GAINS), about):
            continue
        folder = WORK / f"gain {subject}"
        jobs = []
        for start in range(1, count + 1, 5):
            indices = range(start, min(start + 5, count + 1))
            jobs.append((subject, indices, folder))
        for _ in run_jobs(save_estimates, jobs, f"estimates: {subject}"):
            pass
        files = [folder / f"{index:05}.safetensors" for index in range(1, count + 1)]
        estimates = [read_estimate(file) for file in files]
        shares = [each["share"] for each in estimates if each["share"] is not None]
        result = about | {
            "share": statistics.mean(shares),
            "gains": measure_gains(estimates),
        }
        add_result(results, GAINS, result)
        shutil.rmtree(folder)  # 12 GB


# ----------------------------------------------------------------------------------- Training runs
class KindTrainer(star.Trainer):
    """star.py's trainer with a kind of allocation from this file. It measures its distance."""

    kind = "uniform"

    def __init__(self, args, task):
        super().__init__(args, task)  # the weights are the starting ones, also with --resume
        self.start = watch(self, task.heldout_prompts)
        self.start_means, _ = self.gaussians()
        self.start_images = self.images_of(self.start)
        self.start_regions = true_regions(task, self.start_images)
        self.task_report = task.report
        task.report = self.report  # star.py logs what it returns

    def sample(self, iteration):
        prompts, batches = super().sample(iteration)
        torch.manual_seed(self.args.seed * 1_000_003 + iteration)  # of the shuffled maps
        if self.kind in ["shuffled", "oracle"]:
            for batch in batches:
                images = self.images_of([batch])
                maps = maps_of_kind(self.kind, batch, self.task, images)
                batch.maps = list(maps.unbind(dim=1))
        return prompts, batches

    @torch.no_grad()
    def gaussians(self):
        """The policy at each step that may be trained, on the way of `start`: means and stds."""
        means, stds = [], []
        for k in range(self.args.last_stochastic_step + 1):
            parts = []
            for batch in self.start:
                mean, std = self.training_policy.distribution(batch.latents[k], k, batch.prompt)
                parts.append(mean)
            means.append(torch.cat(parts))
            stds.append(std)
        return means, stds

    def report(self, images, prompts):
        """Also the distance from the starting policy. On its own way to each image that is the KL,
        mean over steps, channels, positions and prompts. Of images it is the mean absolute
        difference, of 1. Both also inside and outside of what the reward is about, in the first or
        the new image."""
        report = self.task_report(images, prompts)
        means, stds = self.gaussians()
        kl = 0.0
        for mean, start_mean, std in zip(means, self.start_means, stds):
            kl = kl + star.kl_to_reference(mean, start_mean, std) / len(means)
        kl = avg_pool2d(kl, 2)  # [B, 8, 8]
        old = build.to_tensor(self.start_images)  # in [-1, 1]
        new = build.to_tensor(images)
        change = avg_pool2d((new - old).abs().mean(dim=1) / 2, build.GRID)
        regions = {"all": torch.ones_like(kl, dtype=torch.bool)}
        if self.start_regions is not None:
            inside = self.start_regions | true_regions(self.task, images)
            regions["inside"] = inside
            regions["outside"] = ~inside
        for where, region in regions.items():
            report[f"kl {where}"] = kl[region].mean().item()
            report[f"change {where}"] = change[region].mean().item()
        return report


def run_folder(about):
    name = "{experiment}-{kind}-{rate:g}-{seed}".format_map(about)
    return WORK / name


def train_kind(about, updates, folder):
    """Make or continue a run of star.py, which prints to FOLDER.log. about: see `make_run`."""
    experiment = EXPERIMENTS[about["experiment"]]
    options = task_options(experiment["task"], experiment["images"])
    options += kind_options(about["kind"])
    options += [
        f"--learning-rate={about['rate']}",
        f"--seed={about['seed']}",
        f"--iterations={updates}",
        f"--evaluate-every={max(1, experiment['updates'] // 10)}",
        f"--out={folder}",
    ]
    if star.checkpoints(folder):
        options.append("--resume")
    else:
        shutil.rmtree(folder, ignore_errors=True)  # it died before its first checkpoint
    folder.parent.mkdir(parents=True, exist_ok=True)
    star.DEVICE = "cpu"
    KindTrainer.kind = about["kind"]
    plain_trainer = star.Trainer
    star.Trainer = KindTrainer
    with open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        star.main(options)
    star.Trainer = plain_trainer


def make_run(about):
    """Train with an experiment, a kind, a rate and a seed. Returns them, and a list per number."""
    folder = run_folder(about)
    train_kind(about, EXPERIMENTS[about["experiment"]]["updates"], folder)
    run = defaultdict(list)
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "heldout_reward" in line:
            run["images"].append(line["images"])
            run["reward"].append(line["heldout_reward"])
            for name, value in line["report"].items():
                run[name].append(value)
    return about | run


def train(plan, results):
    """Train with each of some kinds at each rate with each seed, one run per core.

    A finished run becomes a line of learning.jsonl and is not made again. An interrupted one goes
    on. plan: lines of an experiment, kinds, rates and seeds, which are made in this order.
    """
    finished = read_results(results, RUNS)
    jobs = []
    for experiment, kinds, rates, seeds in plan:
        task = EXPERIMENTS[experiment]["task"]
        for seed in seeds:
            for rate in rates:
                for kind in kinds:
                    if kind == "oracle" and task not in LOCATED_TASKS:
                        sys.exit(f"there is no oracle for {task}: its region is the whole picture")
                    about = {"experiment": experiment, "kind": kind, "rate": rate, "seed": seed}
                    if not is_finished(finished, about) and (about,) not in jobs:
                        jobs.append((about,))
    for (about,), run in run_jobs(make_run, jobs, "runs"):
        add_result(results, RUNS, run)
        shutil.rmtree(run_folder(about))  # hundreds of runs would fill the disk


# ------------------------------------------------------------------------------- Length of a step
# Is the gain gone at large rates because a long step leaves its tangent? Directions are normalised
# estimates of the gradient, all of one length. Length 1 changes the weights by 1e-4 on average (the
# root mean square), as AdamW's first update does at a rate of 1e-4.
LENGTHS = [1, 2, 4, 8]
UNIT = 1e-4
SINGLE_DIRECTIONS = 8
STEP_PROMPTS = 96
NOISES = 4  # images per held-out prompt


def steps(experiment, kinds, count, results):
    """Measure what one update does to the reward, by its length and the kind of its direction.

    It starts from a checkpoint of a run of each kind, after a fifth of its updates at 2e-4.
    """
    finished = read_results(results, STEPS)
    jobs = []
    for checkpoint_kind in kinds:
        about = {"experiment": experiment, "checkpoint": checkpoint_kind, "estimates": count}
        missing = []
        for direction_kind in kinds:
            if not is_finished(finished, about | {"direction": direction_kind}):
                missing.append(direction_kind)
        if missing:
            jobs.append((about, missing))
    for _, found in run_jobs(measure_steps, jobs, "lengths of a step"):
        for result in found:
            add_result(results, STEPS, result)


def measure_steps(about, direction_kinds):
    """The results for all directions from one checkpoint."""
    experiment = EXPERIMENTS[about["experiment"]]
    kind = about["checkpoint"]
    folder = WORK / f"steps-{about['experiment']}-{kind}"
    run = {"experiment": about["experiment"], "kind": kind, "rate": 2e-4, "seed": 100}
    train_kind(run, experiment["updates"] // 5, folder)

    options = task_options(experiment["task"], experiment["images"])
    options += ["--allocation=spatial", f"--evaluation-prompts={STEP_PROMPTS}", "--seed=2000"]
    trainer = load_trainer(options)
    trainer.load(star.checkpoints(folder)[-1])
    before = heldout_rewards(trainer)
    results = []
    for direction_kind in direction_kinds:
        rises = []  # of each direction and length
        for direction in directions(trainer, direction_kind, about["estimates"]):
            of_direction = []
            for length in LENGTHS:
                after = rewards_after(trainer, length * UNIT * direction)
                of_direction.append(after - before)
            rises.append(torch.stack(of_direction))
        averaged = rises[0]  # [lengths, prompts]
        single = torch.stack(rises[1:]).mean(dim=2).T  # [lengths, directions]
        result = about | {
            "direction": direction_kind,
            "before": before.mean().item(),
            "averaged": means_and_errors(averaged),
            "single": means_and_errors(single),
        }
        results.append(result)
    return results


def directions(trainer, kind, count):
    """Directions of mean square 1: of the average of `count` estimates, and of some alone."""
    needed = ["uniform"]
    if kind != "uniform":
        needed.append(MIXED_KINDS.get(kind, kind))
    vectors = []
    for index in range(1, count + 1):
        gradients = estimate(trainer, index, needed)["gradients"]
        vectors.append(of_kind(kind, gradients).sum(dim=0))
    vectors = torch.stack(vectors)
    scale = vectors.square().mean(dim=0).sqrt() + EPSILON
    updates = vectors / scale
    average = updates.mean(dim=0, keepdim=True)
    chosen = torch.cat([average, updates[:SINGLE_DIRECTIONS]])
    return chosen / chosen.square().mean(dim=1, keepdim=True).sqrt()


def heldout_rewards(trainer):
    """The mean reward of each held-out prompt, over images from several noises."""
    prompts = trainer.task.heldout_prompts
    total = 0.0
    seed = trainer.args.seed  # of the estimates
    for noise_seed in range(NOISES):
        trainer.args.seed = noise_seed
        images = trainer.generate(prompts)
        total = total + trainer.task.scores(images, prompts, star.DEVICE)
    trainer.args.seed = seed
    return total / NOISES


@torch.no_grad()
def rewards_after(trainer, step):
    """The same, after a step against the gradient of the loss. The weights stay as they are."""
    parameters = list(trainer.transformer.parameters())
    weights = parameters_to_vector(parameters)
    vector_to_parameters(weights - step, parameters)
    values = heldout_rewards(trainer)
    vector_to_parameters(weights, parameters)
    return values


def means_and_errors(values):
    """[[mean, standard error]] of each row."""
    means = values.mean(dim=1)
    errors = values.std(dim=1) / math.sqrt(values.shape[1])
    return torch.stack([means, errors], dim=1).tolist()


# ---------------------------------------------------------------------------------------- Comparing
def reached(run, along, goal, number):
    """`number` where `along` first reaches a goal, linear between evaluations; None if never."""
    values = run[along]
    numbers = run[number]
    if values[0] >= goal:
        return numbers[0]
    for i in range(1, len(values)):
        if values[i] >= goal:
            share = (goal - values[i - 1]) / (values[i] - values[i - 1])
            return numbers[i - 1] + share * (numbers[i] - numbers[i - 1])
    return None


def mean_over_run(run):
    """The mean held-out reward over the images of a run, linear between evaluations."""
    images = run["images"]
    rewards = run["reward"]
    total = 0.0
    for i in range(1, len(images)):
        total += (images[i] - images[i - 1]) * (rewards[i] + rewards[i - 1]) / 2
    return total / (images[-1] - images[0])


def difference(ours, theirs):
    return ours - theirs


def ratio(ours, theirs):
    return ours / theirs


def inverse_ratio(ours, theirs):
    return theirs / ours


def interval(ours, theirs, statistic, draws=10_000):
    """A 95 % interval of a statistic of two means, by bootstrap over pairs of runs."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(ours), (draws, len(ours)), generator=generator)
    values = statistic(ours[chosen].mean(dim=1), theirs[chosen].mean(dim=1))
    values = values.sort().values
    return values[draws // 40].item(), values[-draws // 40 - 1].item()


def cell(ours, theirs, statistic):
    """A statistic of the means of paired runs, its interval, and on how many pairs it is above 0
    (a difference) or 1 (a ratio). Pairs of which one did not get there (None) are left out."""
    pairs = []
    for pair in zip(ours, theirs):
        if None not in pair:
            pairs.append(pair)
    if not pairs:
        return "none gets there"
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    middle = statistic(ours.mean(), theirs.mean()).item()
    low, high = interval(ours, theirs, statistic)
    values = statistic(ours, theirs)  # of each pair
    if statistic is difference:
        above = (values > 0).sum().item()
        return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}] {above}/{len(pairs)}"
    above = (values > 1).sum().item()
    return f"{middle:.2f} [{low:.2f}, {high:.2f}] {above}/{len(pairs)}"


def mean_cell(values):
    """The mean, and of how many runs if some did not get there."""
    found = [value for value in values if value is not None]
    if not found:
        return "none gets there"
    text = f"{statistics.mean(found):.3g}"
    if len(found) < len(values):
        text += f" ({len(found)} of {len(values)})"
    return text


def print_table(header, rows):
    print()
    for cells in [header, ["---"] * len(header)] + rows:
        print("| " + " | ".join(cells) + " |")


def name_of(kind):
    return NAMES.get(kind, kind)


def compare(experiments, seeds, results):
    """Print the tables of the gains, of the runs with some seeds, and of the lengths of a step.

    Flow-GRPO's rows hold means over seeds. The others hold what is paired with Flow-GRPO at the
    same rate: the difference, or the ratio, of two means, its 95 % interval, and on how many seeds
    it is above 0, or 1. Updates: Flow-GRPO's divided by the kind's, to compare with the gain.
    """
    print_gains(read_results(results, GAINS))
    for experiment in experiments:
        table = runs_of(read_results(results, RUNS), experiment, seeds)
        if table:
            print_runs(experiment, table)
    print_steps(read_results(results, STEPS))


def print_gains(results):
    """Two tables of first-order gains with their standard errors: in all, and per step."""
    kinds = list(KINDS)
    rows = []
    rows_of_steps = []
    for result in results:
        row = [result["subject"], str(result["estimates"]), f"{result['share']:.2f}"]
        for kind in kinds:
            row.append(gain_cell(result, kind, "all"))
        rows.append(row)
        for kind in kinds:
            if kind in result["gains"] and kind != "uniform":
                row = [f"{result['subject']}, {name_of(kind)}"]
                for step in range(4):
                    row.append(gain_cell(result, kind, str(step)))
                rows_of_steps.append(row)
    if rows:
        names = [name_of(kind) for kind in kinds]
        print_table(["first-order gain", "estimates", "share of the picture"] + names, rows)
        steps = [f"step {step}" for step in range(4)]
        print_table(["first-order gain of one step"] + steps, rows_of_steps)


def gain_cell(result, kind, step):
    if step not in result["gains"].get(kind, {}):
        return ""
    gain, error = result["gains"][kind][step]
    return f"{gain:.2f} ({error:.2f})"


def runs_of(runs, experiment, seeds):
    """{(rate, kind): {seed: run}} of an experiment, sorted."""
    table = {}
    for rate in RATES:
        for kind in KINDS:
            found = {}
            for run in runs:
                about = (run["experiment"], run["kind"], run["rate"])
                if about == (experiment, kind, rate) and run["seed"] in seeds:
                    found[run["seed"]] = run
            if found:
                table[rate, kind] = found
    return table


def print_runs(experiment, table):
    """Two tables of runs: of rewards, and of distances."""
    goals = EXPERIMENTS[experiment]["goals"]
    half_kl = {}  # of Flow-GRPO at the end, per rate
    for (rate, kind), runs in table.items():
        if kind == "uniform":
            half_kl[rate] = statistics.mean(run["kl all"][-1] for run in runs.values()) / 2

    def updates_to(goal, run):
        images = reached(run, "reward", goal, "images")
        if images is None:
            return None
        return images / EXPERIMENTS[experiment]["images"]

    def last_reward(run):
        return run["reward"][-1]

    def reward_at_kl(run):
        return reached(run, "kl all", half_kl[run["rate"]], "reward")

    def distance_at_goal(name, run):
        return reached(run, "reward", goals[1], name)

    columns = {"mean over the run": (mean_over_run, difference)}
    for goal in goals:
        columns[f"updates to {goal}"] = (partial(updates_to, goal), inverse_ratio)
    columns["last reward"] = (last_reward, difference)
    columns["reward at half of Flow-GRPO's last KL"] = (reward_at_kl, difference)
    print_comparison(experiment, table, columns)

    names = ["kl all", "change all"]
    if EXPERIMENTS[experiment]["task"] in LOCATED_TASKS:
        names += ["kl inside", "kl outside", "change inside", "change outside"]
    columns = {}
    for name in names:
        columns[name] = (partial(distance_at_goal, name), ratio)
    print_comparison(f"{experiment}, for reward {goals[1]}", table, columns)


def print_comparison(title, table, columns):
    """columns: {name: (number of a run, how to compare its means)}."""
    rows = []
    for (rate, kind), runs in table.items():
        flow_grpo = table.get((rate, "uniform"), {})
        seeds = sorted(runs.keys() & flow_grpo.keys())
        if not seeds:
            continue
        row = [f"{name_of(kind)}, {rate:g}", str(len(seeds))]
        for number, statistic in columns.values():
            ours = [number(runs[seed]) for seed in seeds]
            theirs = [number(flow_grpo[seed]) for seed in seeds]
            if kind == "uniform":
                row.append(mean_cell(theirs))
            else:
                row.append(cell(ours, theirs, statistic))
        rows.append(row)
    print_table([title, "seeds"] + list(columns), rows)


def print_steps(results):
    """A table of how the reward rises with the length of a step."""
    rows = []
    for result in results:
        for which in ["averaged", "single"]:
            from_checkpoint = f"from {name_of(result['checkpoint'])}, {result['before']:.3f}"
            row = [from_checkpoint, name_of(result["direction"]), which]
            for rise, error in result[which]:
                row.append(f"{rise:+.4f} ({error:.4f})")
            rows.append(row)
    if rows:
        lengths = [f"length {length}" for length in LENGTHS]
        print_table(["checkpoint, its reward", "direction", "estimate"] + lengths, rows)


# ------------------------------------------------------------------------------------------ Figures
BLUE, RED, GREEN = "#1f77b4", "#d62728", "#2ca02c"
COLOURS = [BLUE, RED, GREEN, "#9467bd", "#ff7f0e", "#17becf"]


class Chart:
    """A panel with two axes, drawn at twice its size, which smooths its lines."""

    def __init__(self, x_range, y_range, across, up, legend_width=0):
        self.x_range = x_range
        self.y_range = y_range
        self.left, self.right = 150, 1320
        self.top, self.bottom = 70, 860
        self.picture = Image.new("RGB", (1380 + legend_width, 980), "white")
        self.draw = ImageDraw.Draw(self.picture, "RGBA")
        self.font = ImageFont.load_default(36)
        for y in ticks(*y_range):
            self.line([(x_range[0], y), (x_range[1], y)], "#dddddd", width=2)
            _, down = self.place(0, y)
            self.draw.text((self.left - 20, down), f"{y:g}", "black", self.font, anchor="rm")
        for x in ticks(*x_range):
            right, _ = self.place(x, 0)
            self.draw.text((right, self.bottom + 16), f"{x:g}", "black", self.font, anchor="mt")
        middle = (self.left + self.right) / 2
        self.draw.text((self.left, 8), up, "black", self.font)
        self.draw.text((middle, 926), across, "black", self.font, anchor="mt")

    def place(self, x, y):
        """The pixel of a point."""
        left, right = self.x_range
        low, high = self.y_range
        across = (x - left) / (right - left)
        up = (y - low) / (high - low)
        return (
            self.left + across * (self.right - self.left),
            self.bottom - up * (self.bottom - self.top),
        )

    def line(self, points, colour, width=6):
        pixels = [self.place(x, y) for x, y in points]
        self.draw.line(pixels, colour, width, joint="curve")

    def band(self, lower, upper, colour):
        """The space between two lines."""
        pixels = [self.place(x, y) for x, y in lower + upper[::-1]]
        self.draw.polygon(pixels, colour + "28")

    def point(self, x, y, error, colour):
        """A point with an error bar."""
        self.line([(x, y - error), (x, y + error)], colour, width=5)
        right, down = self.place(x, y)
        self.draw.ellipse((right - 12, down - 12, right + 12, down + 12), colour)

    def write(self, x, y, text, colour="black", anchor="lm"):
        right, down = self.place(x, y)
        self.draw.text((right, down), text, colour, self.font, anchor=anchor)

    def legend(self, colours, right, down):
        """Names in their colours, from this pixel on."""
        for name, colour in colours.items():
            self.draw.text((right, down), name, colour, self.font)
            down += 48

    def image(self):
        return self.picture.reduce(2)


def ticks(low, high):
    """Round numbers between two numbers, at most eight."""
    size = 10 ** math.floor(math.log10((high - low) / 8))
    for step in [size, 2 * size, 5 * size, 10 * size]:
        if (high - low) / step <= 7:
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def figure(kind, seeds, results, save):
    """Draw README's figure: gain against share of the picture, and reward of writing."""
    gains = read_results(results, GAINS)
    table = runs_of(read_results(results, RUNS), "writing-8", seeds)
    panels = []
    if gains:
        panels.append(draw_gains(gains, kind))
    if (2e-4, kind) in table and (2e-4, "uniform") in table:
        panels.append(draw_rewards(table[2e-4, "uniform"], table[2e-4, kind]))
    if not panels:
        sys.exit(f"{results} has neither gains nor runs of writing-8 at 2e-4 with these seeds")
    make_image_grid(panels, rows=1, cols=len(panels)).save(save)


def draw_gains(results, kind):
    """First-order gain against the share of the picture, with own maps and with the oracle."""
    # The groups of objects are shown, not all objects together.
    results = [result for result in results if result["subject"] != "objects"]
    lowest, highest = gain_range(results, [kind, "oracle"])
    chart = Chart(
        x_range=(0, 1.1),
        y_range=(lowest - 0.2, highest + 0.2),
        across="share of the picture that the reward is about",
        up="first-order gain, and its standard error",
    )
    chart.line([(0, 1), (1.1, 1)], BLUE, width=4)
    names = {"Flow-GRPO": BLUE, "STAR": RED, "true region instead of maps": GREEN}
    chart.legend(names, right=800, down=90)
    for result in results:
        share = result["share"]
        if result["subject"] == "brightness":
            share += 0.03  # beside preference, which has the same
        for which, colour in [("oracle", GREEN), (kind, RED)]:
            if which in result["gains"]:
                gain, error = result["gains"][which]["all"]
                chart.point(share, gain, error, colour)
        low, high = gain_range([result], [kind, "oracle"])
        if result["subject"] == "brightness":
            chart.write(share, low - 0.03, result["subject"], anchor="mt")
        elif share == 1:
            chart.write(share - 0.03, (low + high) / 2, result["subject"], anchor="rm")
        else:
            chart.write(share, high + 0.03, result["subject"], anchor="lb")
    return chart.image()


def gain_range(results, kinds):
    """The ends of the error bars."""
    ends = []
    for result in results:
        for kind in kinds:
            if kind in result["gains"]:
                gain, error = result["gains"][kind]["all"]
                ends += [gain - error, gain + error]
    return min(ends), max(ends)


def draw_rewards(flow_grpo, star_runs):
    """Held-out reward of writing against images: means over seeds, bands from min to max."""
    lines = {BLUE: reward_lines(flow_grpo), RED: reward_lines(star_runs)}
    lowest = min(min(values) for values in lines[BLUE].values())
    chart = Chart(
        x_range=(0, max(lines[BLUE])),
        y_range=(lowest - 0.1, 1),
        across="images",
        up="held-out reward of writing, learning rate 2e-4",
    )
    for colour, rewards in lines.items():
        lower = [(images, min(values)) for images, values in rewards.items()]
        upper = [(images, max(values)) for images, values in rewards.items()]
        means = [(images, statistics.mean(values)) for images, values in rewards.items()]
        chart.band(lower, upper, colour)
        chart.line(means, colour)
    chart.legend({"Flow-GRPO": BLUE, "STAR": RED}, right=1000, down=700)
    return chart.image()


def reward_lines(runs):
    """{images: the rewards of all runs}."""
    lines = defaultdict(list)
    for run in runs.values():
        for images, reward in zip(run["images"], run["reward"]):
            lines[images].append(reward)
    return lines


def draw_row(title, tiles, side=150):
    """[(image, caption)] beside each other below a title."""
    row = Image.new("RGB", (len(tiles) * (side + 6), side + 54), "white")
    draw = ImageDraw.Draw(row)
    font = ImageFont.load_default(14)
    draw.text((3, 2), title, "black", font)
    left = 3
    for image, caption in tiles:
        smooth = Image.NEAREST
        if image.width > side:
            smooth = Image.LANCZOS
        row.paste(image.resize((side, side), smooth), (left, 24))
        draw.text((left, side + 27), caption, "black", font)
        left += side + 6
    return row


def overlay(image, strength, colour):
    """The image in grey below a colour that is as strong as `strength` [h, w] in [0, 1]."""
    mask = Image.fromarray((200 * strength).byte().cpu().numpy())
    mask = mask.resize(image.size, Image.NEAREST)
    grey = image.convert("L").convert("RGB")
    paint = Image.new("RGB", image.size, colour)
    return Image.composite(paint, grey, mask)


def problem(save, options):
    """Draw the best and the worst of 16 rollouts, and where their advantages are applied."""
    trainer = load_trainer(
        ["--no-bfloat16", "--monitor="]
        + ["--group-size=16", "--batch-size=16", "--prompts-per-iteration=1"]
        + options
    )
    args = trainer.args
    prompts = trainer.task.heldout_prompts
    prompt = prompts[args.seed % len(prompts)]
    torch.manual_seed(args.seed)
    noise = torch.randn(1, *trainer.shape).repeat_interleave(16, dim=0)
    steps = range(1, 4)
    policy = trainer.training_policy
    (batch,) = trainer.rollouts(policy, noise, [prompt], steps, recorded_steps=steps)
    images = trainer.images_of([batch])
    values = trainer.task.scores(images, [prompt] * 16, star.DEVICE)
    advantages = star.group_advantages(values[None]).flatten()
    allocated = star.allocation_weights(
        torch.stack(batch.maps, dim=1), trainer.shape[1:], args.allocation, args.lam
    )
    weights = allocated[:, -1]  # of the last of these steps
    rows = []
    title = prompt
    for i, colour in [(values.argmax(), "#285ae6"), (values.argmin(), "#e61e1e")]:
        A = advantages[i]
        w = weights[i]
        relative = w / w.max()
        everywhere = torch.full_like(w, 0.4)
        low = f"{w.min() * A:+.1f}"
        high = f"{w.max() * A:+.1f}"
        tiles = [
            (images[i], f"reward {values[i]:.2f}, A = {A:+.1f}"),
            (overlay(images[i], everywhere, colour), f"Flow-GRPO: {A:+.1f} everywhere"),
            (overlay(images[i], relative, "#f09010"), f"w: mean 1, {w.min():.1f} to {w.max():.1f}"),
            (overlay(images[i], relative, colour), f"STAR: w A, {low} to {high}"),
        ]
        rows.append(draw_row(title, tiles, side=208))
        title = ""
    make_image_grid(rows, rows=len(rows), cols=1).save(save)


# --------------------------------------------------------------------------- Maps and their quality
class Words(Task):
    """No reward, only the words that maps are about: given ones, quoted ones, or content words."""

    def __init__(self, words):
        self.words = words

    def core_spans(self, prompt):
        if self.words is None:
            return quoted_span(prompt) or content_word_spans(prompt)
        pattern = rf"(?<!\w){re.escape(self.words)}(?!\w)"
        return [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]


def maps(prompts, words, save, options):
    """Show where a model looks for --words of your prompts, in one image.

    Five denoising steps have a column each: the image that the model predicts there, in grey, and
    the attention to the words, in red. Without --words: the quoted text or all content words.
    """
    args = star.parse_arguments(["--kl-weight=0", "--ema-decay=0"] + options)
    trainer = star.Trainer(args, Words(words))
    sigmas = trainer.training_policy.sigmas
    rows = []
    for prompt, (x, of_steps) in zip(prompts, watch_maps(trainer, prompts)):
        if not of_steps.any():
            sys.exit(f"the words are not in the prompt or beyond the token limit: {prompt}")
        tiles = []
        steps = range(len(of_steps))
        for k in steps[:: max(1, len(steps) // 5)][:5]:
            velocity = (x[k + 1] - x[k]) / (sigmas[k + 1] - sigmas[k])
            predicted = x[k] - sigmas[k] * velocity
            (image,) = star.decode(trainer.pipe, predicted[None])
            strength = of_steps[k] / of_steps[k].max()
            shown = overlay(image, strength, "#e61e1e")
            tiles.append((shown, f"step {k}, sigma {sigmas[k]:.2f}"))
        (finished,) = star.decode(trainer.pipe, x[-1:])
        tiles.append((finished, "finished"))
        rows.append(draw_row(prompt, tiles))
    make_image_grid(rows, rows=len(rows), cols=1).save(save)
    print(f"{save} shows the attention to {words or 'the quoted text or the content words'}")


def map_quality(images, save, options):
    """Measure how well the maps find what the words mean, at each denoising step.

    The words are a sign's text or, with --task geneval, words of --images prompts by their kind.
    """
    trainer = load_trainer(["--no-bfloat16", "--monitor="] + options)
    if isinstance(trainer.task, GenEval):
        areas = object_quality(trainer, images)
    else:
        areas = sign_quality(trainer, images)
    for name, of_steps in areas.items():
        numbers = [f"{area:7.3f}" for area in of_steps]
        print(f"{name:<16}" + "".join(numbers))
    chart = Chart(
        x_range=(0, trainer.args.steps - 1),
        y_range=(0.3, 1),
        across="denoising step",
        up="area under the ROC curve, 0.5 is chance",
        legend_width=360,
    )
    colours = dict(zip(areas, COLOURS))
    for name, of_steps in areas.items():
        chart.line(list(enumerate(of_steps)), colours[name])
    chart.legend(colours, right=1350, down=60)
    chart.image().save(save)


def area_under_roc(scores, truth):
    """Probability that a position inside the region scores higher than one outside; ties half."""
    inside = scores[truth][:, None]
    outside = scores[~truth]
    wins = (inside > outside) + 0.5 * (inside == outside)
    return wins.mean().item()


@torch.no_grad()
def sign_quality(trainer, count):
    """{block: area of each step} of a sign's text, in pictures noised to the level of the step."""
    rng = random.Random(7)
    texts = build.all_targets(held_out=True)
    shots = [build.picture(rng, texts, sign_share=1.0) for _ in range(count)]
    captions = [shot["caption"] for shot in shots]
    clean = latents_of(trainer.pipe.vae, [shot["image"] for shot in shots])
    noise = torch.randn(clean.shape, generator=torch.manual_seed(0))
    prompt = star.encode(trainer.pipe, captions, trainer.args.max_sequence_length)
    core = trainer.core_tokens(captions)
    policy = trainer.training_policy
    blocks = range(len(trainer.transformer.transformer_blocks))
    areas = defaultdict(list)
    for k in range(trainer.args.steps):
        sigma = policy.sigmas[k]
        recorder = star.AttentionAllocator(trainer.transformer, core, blocks)
        policy.velocity((1 - sigma) * clean + sigma * noise, k, prompt, recorder)
        for block in blocks:
            areas[f"block {block}"].append(mean_area(recorder.recorded[block], shots))
        areas["all blocks"].append(mean_area(recorder.map(), shots))
    return areas


def latents_of(vae, images):
    encoded = vae.encode(build.to_tensor(images)).latent_dist.mean
    return (encoded - vae.config.shift_factor) * vae.config.scaling_factor


def mean_area(maps, shots):
    """The mean area under the ROC curve of maps [B, 64] of pictures whose sign's place is known."""
    areas = []
    for each, shot in zip(maps.unflatten(-1, (8, 8)), shots):
        areas.append(area_under_roc(each, place_of_sign(shot)))
    return statistics.mean(areas)


def place_of_sign(shot):
    """The tokens [8, 8] of the writing in a picture of the miniature's world."""
    x, y = shot["place"]
    column, row = x // build.GRID, y // build.GRID
    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[row : row + 2, column : column + 3] = True
    return truth


def words_by_kind(prompt, clauses):
    """{kind of word: (spans, classes that they are about)} of a GenEval prompt's first object."""
    first, last = clauses[0], clauses[-1]
    name = first["class"]
    words = {"object": name}
    if first["count"] > 1:
        words["object"] = plural(name)
        words["number"] = NUMBERS[first["count"]]
    if "color" in first:
        words["colour"] = first["color"]
    if "position" in last:
        words["relation"] = last["position"][0]
    found = {}
    for kind, word in words.items():
        start = prompt.rindex(word)  # the wall before it may have the same colour
        about = {name}
        if kind == "relation":
            about = {name, last["class"]}
        found[kind] = ([(start, start + len(word))], about)
    return found


def object_quality(trainer, count):
    """{kind of word: area of each step}, where the detector sees it, in right images of the model.

    The first `count` prompts that have such a word are used.
    """
    task = trainer.task
    words = {}
    for prompt in task.prompts:
        clauses = task.metadata[prompt]["include"]
        words[prompt] = words_by_kind(prompt, clauses)
        classes = {clause["class"] for clause in clauses}
        words[prompt]["all core words"] = (task.core_spans(prompt), classes)
    areas = {}
    for kind in ["object", "colour", "number", "relation", "all core words"]:
        chosen = {}
        for prompt in task.prompts:
            if kind in words[prompt] and len(chosen) < count:
                chosen[prompt] = words[prompt][kind]
        found = areas_of_words(trainer, chosen)
        print(f"{kind}: {len(found)} of {len(chosen)} images are right")
        if len(found) > 0:
            areas[kind] = torch.tensor(found).mean(dim=0).tolist()
    return areas


def areas_of_words(trainer, words):
    """The area of each step, of each right image. words: {prompt: (spans, classes)}."""
    task = trainer.task
    prompts = list(words)
    task.core_spans = lambda prompt: words[prompt][0]
    samples = watch_maps(trainer, prompts)
    images = []
    for latents, _ in samples:
        images += star.decode(trainer.pipe, latents[-1:])
    task.reward(images, prompts)
    verdicts = task.verdicts
    areas = []
    for i, found in enumerate(task.detect(images)):
        right, _ = verdicts[i]
        _, classes = words[prompts[i]]
        masks = [one.mask for name in classes for one in found.get(name, [])]
        truth = tokens_of(masks)
        if right and truth.any():
            _, of_steps = samples[i]
            areas.append([area_under_roc(each, truth) for each in of_steps])
    return areas


# ------------------------------------------------------------------------------------ The commands
def everything(kind, count, results, save):
    """Make what study/RESULTS.md reports and is not there yet: gains, runs, steps, figure.

    What is most useful comes first. After an interruption the same command goes on.
    """
    both = ["uniform", kind]
    controls = [each for each in KINDS if each not in both]
    gain(list(SUBJECTS), count, results)
    plan = [
        ("writing-8", both, [2e-4], FRESH_SEEDS),
        ("writing-8", both, [1e-4, 4e-4], FRESH_SEEDS),
        ("writing-8", controls, [2e-4], FRESH_SEEDS),
        ("objects-24", both, [2e-4], FRESH_SEEDS),
        ("preference-24", both, [2e-4], FRESH_SEEDS),
        ("brightness-24", both, [2e-4], FRESH_SEEDS),
    ]
    train(plan, results)
    steps("writing-8", both, 40, results)
    plan = [
        ("objects-24", both, RATES, FRESH_SEEDS),
        ("preference-24", both, RATES, FRESH_SEEDS),
        ("preference-8", both, RATES, FRESH_SEEDS),
        ("writing-24", both, RATES, FRESH_SEEDS),
        ("brightness-24", both, RATES, FRESH_SEEDS),
    ]
    train(plan, results)
    compare(list(EXPERIMENTS), FRESH_SEEDS, results)
    figure(kind, FRESH_SEEDS, results, save)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name, function):
        return commands.add_parser(
            name,
            help=function.__doc__.split("\n")[0],
            description=function.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,  # the options of star.py are not ours
        )

    command = add_command("maps", maps)
    command.add_argument("prompts", nargs="+")
    command.add_argument("--words", help="words of the prompts")
    command.add_argument("--save", type=Path, default="maps.png", help="picture to write")

    command = add_command("map-quality", map_quality)
    command.add_argument("--images", type=int, default=96, help="how many are made")
    command.add_argument("--save", type=Path, default="map-quality.png", help="picture to write")

    command = add_command("problem", problem)
    command.add_argument("--save", type=Path, default="problem.png", help="picture to write")

    command = add_command("gain", gain)
    command.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    command.add_argument("--estimates", type=int, default=80, help="for each subject")
    add_results_option(command)

    command = add_command("train", train)
    command.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=["writing-8"])
    command.add_argument("--kinds", nargs="+", choices=KINDS, default=["uniform", STAR])
    command.add_argument("--rates", nargs="+", type=float, default=RATES)
    add_seeds_option(command)
    add_results_option(command)

    command = add_command("steps", steps)
    command.add_argument("--experiment", choices=EXPERIMENTS, default="writing-8")
    command.add_argument("--kinds", nargs="+", choices=KINDS, default=["uniform", STAR])
    command.add_argument("--estimates", type=int, default=40, help="for each checkpoint and kind")
    add_results_option(command)

    command = add_command("compare", compare)
    command.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    add_seeds_option(command)
    add_results_option(command)

    command = add_command("figure", figure)
    add_kind_option(command)
    add_seeds_option(command)
    add_results_option(command)
    command.add_argument("--save", type=Path, default=FIGURE, help="picture to write")

    command = add_command("all", everything)
    add_kind_option(command)
    command.add_argument("--estimates", type=int, default=80, help="for each first-order gain")
    add_results_option(command)
    command.add_argument("--save", type=Path, default=FIGURE, help="picture to write")
    return parser


def add_seeds_option(command):
    command.add_argument("--seeds", nargs="+", type=int, default=FRESH_SEEDS, help="of the runs")


def add_results_option(command):
    text = "folder of gains.jsonl, learning.jsonl, steps.jsonl"
    command.add_argument("--results", type=Path, default=HERE, help=text)


def add_kind_option(command):
    command.add_argument("--kind", choices=KINDS, default=STAR, help="beside Flow-GRPO")


def main(argv=None):
    parser = make_parser()
    args, options = parser.parse_known_args(argv)
    if options and args.command not in ["maps", "map-quality", "problem"]:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if "save" in args and not args.save.parent.is_dir():
        sys.exit(f"--save: there is no folder {args.save.parent}")
    if "estimates" in args and args.estimates < 3:
        sys.exit("--estimates must be 3 or more: standard errors need them")

    if args.command == "maps":
        maps(args.prompts, args.words, args.save, options)
    elif args.command == "map-quality":
        map_quality(args.images, args.save, options)
    elif args.command == "problem":
        problem(args.save, options)
    elif args.command == "gain":
        gain(args.subjects, args.estimates, args.results)
        print_gains(read_results(args.results, GAINS))
    elif args.command == "train":
        plan = []
        for experiment in args.experiments:
            plan.append((experiment, args.kinds, args.rates, args.seeds))
        train(plan, args.results)
    elif args.command == "steps":
        steps(args.experiment, args.kinds, args.estimates, args.results)
        print_steps(read_results(args.results, STEPS))
    elif args.command == "compare":
        compare(args.experiments, args.seeds, args.results)
    elif args.command == "figure":
        figure(args.kind, args.seeds, args.results, args.save)
    elif args.command == "all":
        everything(args.kind, args.estimates, args.results, args.save)


if __name__ == "__main__":
    main()
