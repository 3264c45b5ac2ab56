"""Which allocation learns faster? Experiments on the miniature; study/RESULTS.md reports them.

    python study/allocations.py maps 'a white wall with a red ball' --words 'red ball'

shows where a Stable Diffusion 3 model looks for words of your own prompt. COMMAND --help describes
the others. Options that it does not list go to star.py, such as --task geneval or --model NAME.
"""

import argparse
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
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageStat
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tiny"))
import build

import rewards
import star
from rewards import OCR, GenEval, Task, UserError, naming, require, scores

NAMES = {"uniform": "Flow-GRPO", "spatiotemporal0.5": "STAR"}  # the other kinds have no other name
KINDS = "uniform,spatial,spatial0.5,spatiotemporal,spatiotemporal0.5"
CONTROLS, RATES = ",shuffled,oracle", "4e-4,8e-4"
TUNING_SEEDS, FRESH_SEEDS = "100,101,102,103", "20,21,22,23,24,25,26,27,28,29"
RUNS = Path("runs/study.jsonl")
STUDY = {  # the options of star.py for each task of the comparison
    "ocr": "--iterations=20 --evaluate-every=4 --ema-decay=0 --monitor=",
    "pickscore": "--iterations=10 --evaluate-every=2",
    "geneval": "--iterations=20 --evaluate-every=4 --monitor=",
}
rewards.silence_libraries()  # also in the processes of `train`
COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf".split()


def load_trainer(more):
    """star.Trainer on the CPU in float32 with these options of star.py."""
    return star.Trainer(*star.parse_arguments(["--device=cpu", "--no-bfloat16", *more]))


def draw_lines(path, lines, across, up):
    """Draw {name: {x: values}}: the mean at each x, and a band from min to max."""
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
    for row, (name, points) in enumerate(lines.items()):
        colour = COLOURS[row % len(COLOURS)]
        draw.polygon(track(points, min) + track(points, max)[::-1], colour + "28")
        draw.line(track(points, statistics.mean), colour, 6, joint="curve")
        draw.text((1350, 60 + 48 * row), NAMES.get(name, name), colour, font)
    rewards.write(path, image.reduce(2).save)


def draw_row(title, tiles, side=150):
    """[(image, caption)] beside each other below a title."""
    row = Image.new("RGB", (len(tiles) * (side + 6), side + 54), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(14)
    draw.text((3, 2), title, "black", font)
    for i, (image, caption) in enumerate(tiles):
        smooth = Image.LANCZOS if image.width > side else Image.NEAREST
        row.paste(image.resize((side, side), smooth), (3 + i * (side + 6), 24))
        draw.text((3 + i * (side + 6), side + 27), caption, "black", font)
    return row


def overlay(image, strength, colour):
    """The image in grey below a colour that is as strong as `strength` [h, w] in [0, 1]."""
    mask = Image.fromarray((200 * strength).byte().cpu().numpy())
    grey, colour = image.convert("L").convert("RGB"), Image.new("RGB", image.size, colour)
    return Image.composite(colour, grey, mask.resize(image.size, Image.NEAREST))


def watch(trainer, prompts):
    """A deterministic rollout of one image per prompt, with the map of each step."""
    generator, steps = torch.Generator().manual_seed(trainer.args.seed), range(trainer.args.steps)
    noise = torch.randn(len(prompts), *trainer.shape, generator=generator).to(trainer.args.device)
    *prompt, core = trainer.encode_prompts(prompts)
    with trainer.autocast:
        return star.rollout(trainer.policy(len(steps)), noise, prompt, (), None, steps, core)


def maps(prompts, words=None, save=Path("maps.png"), more=()):
    """Show where a model looks for --words of your prompts, in one image.

    Five denoising steps have a column each: the image that the model predicts there, in grey, and
    the attention to the words, in red. Without --words: the quoted text or all content words."""
    options = ["--stochastic-range=0-0", "--stochastic-steps=1", "--kl-weight=0", "--ema-decay=0"]
    task, rows, whole = Task(), [], re.compile(rf"(?<!\w){re.escape(words or '')}(?!\w)", re.I)
    task.core_spans = lambda prompt: [match.span() for match in whole.finditer(prompt)]
    if not words:
        task.core_spans = lambda p: rewards.quoted_span(p) or rewards.content_word_spans(p)
    trainer = star.Trainer(star.parse_arguments([*options, *more])[0], task)
    samples, sigmas = watch(trainer, prompts), trainer.policy(trainer.args.steps).sigmas
    for prompt, x, each in zip(prompts, samples.latents, samples.maps):
        require(each.any(), f"the words are not in the prompt or beyond the token limit: {prompt}")
        tiles = []
        for k in rewards.evenly_spaced(range(len(each)), 5):
            velocity = (x[k + 1] - x[k]) / (sigmas[k + 1] - sigmas[k])
            (image,) = star.decode(trainer.pipe, (x[k] - sigmas[k] * velocity)[None])
            shown = overlay(image, each[k] / each[k].max(), "#e61e1e")
            tiles.append((shown, f"step {k}, sigma {sigmas[k]:.2f}"))
        tiles.append((*star.decode(trainer.pipe, x[-1:]), "finished"))
        rows.append(draw_row(prompt, tiles))
    rewards.write(save, make_image_grid(rows, rows=len(rows), cols=1).save)
    print(f"{save} shows the attention to {words or 'the quoted text or the content words'}")


# ----------------------------------------------------------------------------- Kinds of allocation
class Brightness(Task):
    """A reward about the whole image: `--task study/allocations.py:Brightness`."""

    def reward(self, images, prompts):
        return [sum(ImageStat.Stat(image).mean) / 3 / 255 for image in images]


def tokens_of(masks):
    """The image tokens [8, 8] of which masks [32, 32] together cover a quarter or more."""
    together = sum(masks, torch.zeros(build.SIZE, build.SIZE)) > 0
    return torch.nn.functional.avg_pool2d(together[None].float(), build.GRID)[0] >= 0.25


def true_regions(task, images):
    """Which tokens show what the reward is about: bool [B, 8, 8]; None if it is the whole image."""
    if isinstance(task, GenEval):
        found = [sum(each.values(), []) for each in task.detect(images)]
        return torch.stack([tokens_of([one.mask for one in each]) for each in found])
    return torch.stack([*map(sign_region, images)]) if isinstance(task, OCR) else None


def sign_region(image):
    """Where most pixels are shades of one colour of signs, many are light, and the wall differs."""
    pixels = (build.to_tensor([image])[0] / 2 + 0.5) * 255
    wall = pixels.flatten(1).median(1).values
    region, (width, height) = torch.zeros(8, 8, dtype=torch.bool), build.SIGN
    for (x, y), name in itertools.product(build.PLACES, build.SIGN_COLOURS):
        colour = torch.tensor(build.COLOURS[name]).float()
        inside = pixels[:, y : y + height, x : x + width].flatten(1)
        shade = (colour @ inside / (colour @ colour)).clamp(0, 1)  # 0 is black
        near = (inside - shade * colour[:, None]).norm(dim=0) < 45
        light, other = near & (shade > 0.6), (colour - wall).norm() > 60
        if other and near.float().mean() > 0.75 and light.float().mean() > 0.4:
            region[y // 4 : (y + height) // 4, x // 4 : (x + width) // 4] = True
    return region


def changed_maps(kind, task, pipe, samples):
    """The maps [B, S, 8, 8] of a kind of allocation, see `train`, from those of the samples."""
    if kind == "uniform":
        return torch.ones_like(samples.log_prob)
    if kind == "shuffled":
        values = samples.maps.flatten(2)
        order = torch.rand(values.shape).argsort(-1).to(values.device)
        return values.gather(-1, order).view_as(samples.maps)
    if kind == "oracle":
        regions = true_regions(task, star.decode(pipe, samples.latents[:, -1]))
        return regions.to(samples.maps)[:, None].expand_as(samples.maps)
    return samples.maps


class KindTrainer(star.Trainer):
    """star.py's trainer with a kind of allocation from this file. It measures its distance."""

    def __init__(self, args, task):
        super().__init__(args, task)  # the weights are the starting ones, also with --resume
        prompts = rewards.evenly_spaced(task.heldout_prompts, args.evaluation_prompts)
        self.start, self.start_images = watch(self, prompts), self.generate(prompts)
        self.start_means, self.start_regions = self.means(), true_regions(task, self.start_images)

    @torch.no_grad()
    def means(self):
        """(mean, std) of the policy at each step that may be trained, on the way of `start`."""
        policy, start = self.policy(self.args.steps), self.start
        first, last = map(int, self.args.stochastic_range.split("-"))
        with self.with_weights(self.ema) if self.ema else nullcontext(), self.autocast:
            steps = range(first, last + 1)
            return [policy.distribution(start.latents[:, k], k, start.prompt) for k in steps]

    def evaluate(self, prompts):
        """Also the distance from the starting policy: on its own way to each image the KL, mean
        over steps, channels, positions and prompts; of images the mean absolute difference, of 1.
        Both also inside and outside of what the reward is about, in the first or the new image."""
        metrics, images, values = super().evaluate(prompts)
        pairs, pool = zip(self.means(), self.start_means), torch.nn.functional.avg_pool2d
        kl = sum(star.kl_to_reference(mean, start, std) for (mean, std), (start, _) in pairs)
        old, new = map(build.to_tensor, (self.start_images, images))  # in [-1, 1]
        both = {"kl": pool(kl / len(self.start_means), 2), "change": (new - old).abs().mean(1) / 2}
        both["change"] = pool(both["change"], build.GRID)
        metrics["distance"] = distance = {"map": both["change"].mean(0).tolist()}
        regions = dict(all=torch.ones(8, 8, dtype=torch.bool).expand_as(both["kl"]))
        if self.start_regions is not None:
            inside = true_regions(self.task, images) | self.start_regions
            regions |= dict(inside=inside, outside=~inside)
        for (name, each), (where, region) in itertools.product(both.items(), regions.items()):
            distance[f"{name} {where}"] = each[region].mean().item()
        return metrics, images, values

    def allocation(self, samples):
        maps = changed_maps(self.kind, self.task, self.pipe, samples)
        return super().allocation(replace(samples, maps=maps))


def run_options(kind, more, **fixed):
    """Options of star.py for a run: the kind's, `fixed` and `more`, which must not contradict."""
    require(kind in (KINDS + CONTROLS).split(","), f"kind {kind} is not one of {KINDS}{CONTROLS}")
    name, half = kind.removesuffix("0.5"), kind.endswith("0.5")
    fixed["allocation"] = name if name in ("uniform", "spatiotemporal") else "spatial"
    fixed["lam"] = 0.5 if half else 1.0
    options = [f"--{name.replace('_', '-')}={value}" for name, value in fixed.items()]
    settings, task = star.parse_arguments([*options, *more])
    wrong = [name for name, value in fixed.items() if getattr(settings, name) != value]
    require(not wrong, f"the options must not set {', '.join(wrong)} of a run of {kind}")
    located = kind != "oracle" or isinstance(task, OCR | GenEval)
    require(located, f"oracle is for --task ocr or geneval, not for {settings.task}")
    return [*options, *more]


def make_run(folder, about, options):
    """Make or continue a run, which prints to FOLDER.log: `about` it, and a list per number."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = options + ["--resume"] * len(star.checkpoints(folder))
    torch.manual_seed(about["seed"])  # of the shuffled maps
    KindTrainer.kind, star.Trainer = about["kind"], KindTrainer
    with open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        star.main(options)
    run = defaultdict(list, about)
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "heldout_reward" in line:
            run["map"] = line["distance"].pop("map")  # only the last
            numbers = dict(images=line["images"], reward=line["heldout_reward"])
            for name, value in (numbers | line["distance"] | line["report"]).items():
                run[name].append(value)
    return json.loads(json.dumps(run), parse_float=lambda text: float(f"{float(text):.5g}"))


def train(kinds=KINDS, rates=RATES, seeds=TUNING_SEEDS, runs=RUNS, more=()):
    """Train each of --kinds at each of --rates with each of --seeds, one run per core.

    shuffled has the maps' values in random places, oracle the true region of each finished image.
    A finished run becomes a line of the file --runs and is not made again."""
    with naming(f"--rates {rates} or --seeds {seeds}"):
        rates, seeds = [*map(float, rates.split(","))], [*map(int, seeds.split(","))]
    task, jobs, finished = star.parse_arguments(more)[0].task, [], read_runs(runs)
    for kind, rate, seed in itertools.product(kinds.split(","), rates, seeds):
        about = dict(task=task, kind=kind, rate=rate, seed=seed, options=" ".join(more))
        name = f"{task.rpartition('.py:')[2]}-{kind}-{rate:g}-{seed}".lower()
        folder = Path("runs/study", re.sub(r"[^\w.]+", "-", name))
        fixed = dict(out=f"{folder}", seed=seed, learning_rate=rate)
        if not any(about.items() <= run.items() for run in finished):
            jobs.append((folder, about, run_options(kind, more, **fixed)))
    runs.parent.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(None, spawn, torch.set_num_threads, (1,)) as pool:  # one per core
        folders = {pool.submit(make_run, *job): job[0] for job in jobs}
        for done in tqdm(as_completed(folders), "runs", len(jobs), disable=not jobs):
            with open(runs, "a") as file:
                file.write(json.dumps(done.result()) + "\n")
            shutil.rmtree(folders[done])  # hundreds of runs would fill the disk


def all_(seeds=FRESH_SEEDS, runs=Path("study/runs.jsonl"), figures=Path("study/figures")):
    """Make the runs of study/RESULTS.md that are not in the file --runs, its tables and figures."""
    ranks, rows = defaultdict(list), []
    for task, options in STUDY.items():
        more = ["--task", task, *options.split()]
        train(KINDS, RATES, TUNING_SEEDS, runs, more)
        for which in dict.fromkeys((TUNING_SEEDS, seeds)):
            table = table_of(runs, task, which)
            means = {key: statistics.mean(map(area, each.values())) for key, each in table.items()}
            if which == TUNING_SEEDS:
                best = dict(sorted(means, key=means.get))  # of a kind's rates the last one stays
                for kind, rate in means:
                    if kind in ("spatial", *NAMES) or rate == best[kind]:
                        train(kind, f"{rate}", seeds, runs, more)
            for place, kind in enumerate(sorted(best, key=lambda kind: -means[kind, best[kind]])):
                ranks[kind, which].append(place + 1)
                mean = f"mean over the run {means[kind, best[kind]]:.3f}"
                print(f"{task}, seeds {which}: {kind} at {best[kind]:g}, {mean}")
        compare(task, seeds, runs=runs)
        draw_distance(table, distance_unit(runs, task), figures / task / "distance.png")
        rows.append(draw_changes(task, {kind: table[kind, 8e-4] for kind in NAMES}))
    for (kind, which), places in ranks.items():
        print(f"{kind}, seeds {which}: mean rank {statistics.mean(places):.2f}")
    rewards.write(figures / "changes.png", make_image_grid(rows, rows=len(rows), cols=1).save)


# ----------------------------------------------------------------------------------- Comparing runs
def read_runs(file):
    """The finished runs in a file, see `make_run`; none if there is no file."""
    with naming(f"--runs {file}"):
        return [*map(json.loads, file.read_text().splitlines())] if file.exists() else []


def table_of(file, task, seeds):
    """{(kind, rate): {seed: run}} of the finished runs of a task with some seeds."""
    table, schedules = defaultdict(dict), set()
    for run in read_runs(file):
        if run["task"] == task and f"{run['seed']}" in seeds.split(","):
            table[run["kind"], run["rate"]][run["seed"]] = run
            schedules.add((run["options"], *run["images"]))
    found = f"{[each[0] for each in schedules]}; {file} needs those of one set of options"
    require(len(schedules) == 1, f"runs of {task} with seeds {seeds}: {found}")
    return dict(sorted(table.items(), key=lambda each: (each[0][0] != "uniform", each[0])))


def distance_unit(file, task):
    """D: the median final KL of Flow-GRPO's runs at 4e-4 with the seeds 100 to 103."""
    runs = table_of(file, task, TUNING_SEEDS).get(("uniform", 4e-4))
    require(runs, f"{file} has no run of uniform at 4e-4 with {task} and seeds {TUNING_SEEDS}")
    return statistics.median(run["kl all"][-1] for run in runs.values())


def first(runs, along, goal, number):
    """`number` of each run where `along` first reaches a goal, linear in between; else None."""
    found = []
    for run in runs:
        points = [*zip(run[along], run[number])]
        found.append(points[0][1] if points[0][0] >= goal else None)
        for (x, y), (next_x, next_y) in itertools.pairwise(points):
            if found[-1] is None and next_x >= goal:  # and x < goal
                found[-1] = y + (next_y - y) * (goal - x) / (next_x - x)
    return found


def area(run, score="reward"):
    """The mean of a held-out score over the images of a run, linear between evaluations."""
    points = [*zip(run["images"], run[score])]
    pieces = ((d - b) * (a + c) / 2 for (b, a), (d, c) in itertools.pairwise(points))
    return sum(pieces) / (points[-1][0] - points[0][0])


def interval(values, draws=10_000):
    """A 95 % interval of the median by bootstrap over seeds."""
    rng, n = random.Random(0), len(values)
    medians = sorted(statistics.median(rng.choices(values, k=n)) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40 - 1]


def cell(ours, theirs=None, ratio=False):
    """The median of paired differences or ratios, its interval, and how many are more than 0 or
    less than 1, without pairs of which one did not get there. Alone: the median and how many."""
    pairs = [pair for pair in zip(ours, theirs or ours) if None not in pair]
    if not (pairs and theirs):
        alone = [number for number, _ in pairs]
        return f"{statistics.median(alone):.3g}, {len(alone)} runs" if alone else "none gets there"
    changes = [(a + 1e-12) / (b + 1e-12) if ratio else a - b for a, b in pairs]
    better = sum(change < 1 if ratio else change > 0 for change in changes)
    numbers = statistics.median(changes), *interval(changes)
    median, low, high = (f"{number:.2f}" if ratio else f"{number:+.3f}" for number in numbers)
    return f"{median} [{low}, {high}] {better}/{len(pairs)}"


def compare(task="ocr", seeds=FRESH_SEEDS, base=0.0, score="reward", runs=RUNS):
    """Compare kinds of allocation with Flow-GRPO (uniform), seed by seed, in two Markdown tables.

    The first is of rewards, also at KL D/4, D/2 and D, the median final KL of Flow-GRPO at 4e-4.
    The second is of distances at Flow-GRPO's median rewards there. Flow-GRPO's rows hold medians,
    others the median of paired differences or ratios to Flow-GRPO at the same rate or at --base,
    its 95 % interval, and on how many seeds it is better, of those where both get there. --score
    takes another number: 'strict GenEval'."""
    table, D, lines = table_of(runs, task, seeds), distance_unit(runs, task), ([], [])
    for (kind, rate), of_kind in table.items():
        flow_grpo = table.get(("uniform", base or rate), {})
        seeds = sorted(of_kind.keys() & flow_grpo.keys())
        lost = f"{runs} has no {score} of {kind}, or no run of uniform at {base or rate}"
        require(seeds and score in of_kind[seeds[0]], lost)
        sides = [[runs[seed] for seed in seeds] for runs in (of_kind, flow_grpo)]
        sides = sides[:1] if of_kind is flow_grpo else sides
        ends, row, goals = [run[score][-1] for run in sides[0]], {}, {}
        row["end"] = f"{statistics.median(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})"
        row["mean over the run"] = cell(*([area(run, score) for run in side] for side in sides))
        for at, distance in {"D/4": D / 4, "D/2": D / 2, "D": D}.items():
            found = [first(side, "kl all", distance, score) for side in sides]
            row[f"at {at}"] = cell(*found)
            reached = [reward for reward in found[-1] if reward is not None]
            goals[f"kl all, {at}"] = statistics.median(reached or [math.inf])
        name = f"{NAMES.get(kind, kind)}, {rate:g}"
        lines[0].append({f"{task}, {score}; D = {D:.2g}": name} | row)
        parts = ("kl inside", "kl outside", "change all", "change inside", "change outside")
        goals |= {f"{part}, D/2": goals["kl all, D/2"] for part in parts if part in sides[0][0]}
        for what, goal in goals.items():
            found = (first(side, score, goal, what.split(",")[0]) for side in sides)
            goals[what] = cell(*found, ratio=True)
        lines[1].append({f"{task}, distance for {score}": name} | goals)
    for rows in lines:
        print(f"\n| {' | '.join(rows[0])} |\n{'| --- ' * len(rows[0])}|")
        print(*(f"| {' | '.join(row.values())} |" for row in rows), sep="\n")


def draw_distance(table, D, path):
    """Draw held-out reward against KL of the kinds in NAMES, as far as all runs of a line go."""
    lines, step = defaultdict(dict), float(f"{D / 12:.0e}")
    for ((kind, rate), runs), n in itertools.product(table.items(), range(24)):
        values = first(runs.values(), "kl all", n * step, "reward")
        if kind in NAMES and None not in values:
            lines[f"{NAMES[kind]}, {rate:g}"][round(n * step * 1e4, 3)] = values
    draw_lines(path, lines, "KL from the starting policy, 1e-4", "held-out reward")


def draw_changes(task, table):
    """Draw the mean absolute change of each position, at the end, for {kind: {seed: run}}."""
    maps = [torch.tensor([run["map"] for run in runs.values()]).mean(0) for runs in table.values()]
    top, tiles = torch.stack(maps).max(), []
    for kind, each in zip(table, maps):
        image = overlay(Image.new("RGB", (8, 8), "white"), each / top, "#e61e1e")
        tiles.append((image, f"{NAMES.get(kind, kind)}: {each.min():.3f} to {each.max():.3f}"))
    return draw_row(task, tiles, side=208)


# ------------------------------------------------------------------------------ Quality of the maps
def area_under_roc(scores, truth):
    """Probability that a position inside the region scores higher than one outside; ties half."""
    inside, outside = scores[truth][:, None], scores[~truth]
    return ((inside > outside) + 0.5 * (inside == outside)).mean().item()


@torch.no_grad()
def sign_quality(trainer, images):
    """{blocks: {step: [area]}} of a sign's text, in pictures noised to the level of each step."""
    rng, texts, vae = random.Random(7), build.all_targets(held_out=True), trainer.pipe.vae
    shots = [build.picture(rng, texts, sign_share=1.0) for _ in range(images)]
    truth = torch.zeros(len(shots), 8, 8, dtype=torch.bool)
    for region, shot in zip(truth, shots):
        x, y = (side // build.GRID for side in shot["place"])
        region[y : y + 2, x : x + 3] = True
    clean = vae.encode(build.to_tensor([shot["image"] for shot in shots])).latent_dist.mean
    clean = (clean - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.manual_seed(0))
    *prompt, core = trainer.encode_prompts([shot["caption"] for shot in shots])
    policy, lines = trainer.policy(trainer.args.steps), defaultdict(dict)
    every = list(range(len(trainer.transformer.transformer_blocks)))
    names = [f"block {block}" for block in every] + ["all blocks"]
    for k, sigma in enumerate(policy.sigmas[:-1]):
        with star.AttentionAllocator(trainer.transformer, core, every) as allocator:
            policy.velocity((1 - sigma) * clean + sigma * noise, k, prompt)
        for name, maps in zip(names, [*allocator.recorded, allocator.map()]):
            areas = map(area_under_roc, maps.unflatten(-1, (8, 8)), truth)
            lines[name][k] = [statistics.mean(areas)]
    return lines


def words_by_kind(prompt, clauses):
    """{kind of word: (spans, classes that they are about)} of a GenEval prompt's first object."""
    first, last, found = clauses[0], clauses[-1], {}
    name, count = first["class"], first["count"]
    words = dict(object=name if count == 1 else rewards.plural(name), colour=first.get("color"))
    words |= dict(number=rewards.NUMBERS.get(count), relation=last.get("position", [None])[0])
    for kind, word in words.items():
        if word:
            start = prompt.rindex(word)  # the wall before it may have the same colour
            about = {name, last["class"]} if kind == "relation" else {name}
            found[kind] = [(start, start + len(word))], about
    return found


def object_quality(trainer, images):
    """{kind of word: {step: [area]}}, where the detector sees it, in right images of the model."""
    task, lines, words = trainer.task, defaultdict(dict), {}
    for prompt in task.prompts:
        clauses = task.metadata[prompt]["include"]
        everything = task.core_spans(prompt), {clause["class"] for clause in clauses}
        words[prompt] = words_by_kind(prompt, clauses) | {"all core words": everything}
    for kind in ("object", "colour", "number", "relation", "all core words"):
        prompts = [prompt for prompt in task.prompts if kind in words[prompt]][:images]
        task.core_spans = {prompt: words[prompt][kind][0] for prompt in prompts}.get
        areas, samples = [], watch(trainer, prompts)
        shown = star.decode(trainer.pipe, samples.latents[:, -1])
        task.reward(shown, prompts)
        verdicts, detected = task.verdicts, task.detect(shown)
        for prompt, (right, _), found, image_maps in zip(prompts, verdicts, detected, samples.maps):
            classes = words[prompt][kind][1]
            truth = tokens_of([one.mask for name in classes for one in found.get(name, [])])
            if right and truth.any():
                areas.append([area_under_roc(each, truth) for each in image_maps])
        print(f"{kind}: {len(areas)} of {len(prompts)} images are right")
        for k, values in enumerate(zip(*areas)):
            lines[kind][k] = [statistics.mean(values)]
    return lines


def map_quality(images=96, save=Path("map-quality.png"), more=()):
    """Measure how well the maps find what the words mean, at each denoising step.

    The words are a sign's text or, with --task geneval, words of --images prompts by their kind."""
    trainer = load_trainer(more)
    quality = object_quality if isinstance(trainer.task, GenEval) else sign_quality
    lines = quality(trainer, images)
    for name, points in lines.items():
        print(f"{name:<16}" + "".join(f"{area:7.3f}" for (area,) in points.values()))
    require(lines, "no image is right; use more --images")
    draw_lines(save, lines, "denoising step", "area under the ROC curve, 0.5 is chance")


# ----------------------------------------------------------------------------- Signal in a gradient
def sample_groups(trainer, prompts, steps):
    """Samples of G images per prompt, embedded prompts, images, rewards [K * G], advantages."""
    args, G = trainer.args, trainer.args.group_size
    *embedded, core = (each.repeat_interleave(G, 0) for each in trainer.encode_prompts(prompts))
    noise = torch.randn(len(prompts), *trainer.shape).repeat_interleave(G, 0)
    policy = trainer.policy(args.steps)
    samples = star.rollout(policy, noise, embedded, steps, None, steps, core)
    images = star.decode(trainer.pipe, samples.latents[:, -1])
    values = scores(trainer.task, images, [each for each in prompts for _ in range(G)])
    advantages = star.group_advantages(values.view(-1, G), args.global_std, args.advantage_clip)
    return samples, embedded, images, values, advantages.flatten()


def estimate(trainer, kinds, steps):
    """Estimate the gradient from the images of one iteration: {(kind, step): vector}."""
    args, task, estimates = trainer.args, trainer.task, {}
    order = torch.randperm(len(task.prompts))[: args.prompts_per_iteration]
    prompts = [task.prompts[i] for i in order]
    samples, embedded, _, _, advantages = sample_groups(trainer, prompts, steps)
    maps = [changed_maps(kind, task, trainer.pipe, samples) for kind in kinds]
    weights = [star.allocation_weights(each, trainer.shape[1:], "spatial", 1.0) for each in maps]
    policy, options = trainer.policy(args.steps), dict(retain_graph=True, materialize_grads=True)
    for j, k in enumerate(steps):
        mean, std = policy.distribution(samples.latents[:, k], k, embedded)
        new = star.position_log_prob(samples.latents[:, k + 1], mean, std)
        for kind, each in zip(kinds, weights):
            data = samples.log_prob[:, j], advantages, each[:, j]
            loss, _, _ = star.star_loss(new, *data, args.clip_range)
            pieces = torch.autograd.grad(loss, trainer.weights, **options)
            estimates[kind, k] = torch.cat([piece.flatten() for piece in pieces])
    return estimates


def gradient_measures(products):
    """(variance, agreement), see `gradients`, from the products [N, N] of N estimates."""
    square, pairs = products.diagonal().mean().item(), len(products) * (len(products) - 1)
    signal = ((products.sum() - products.trace()) / pairs).item()  # of different estimates
    return square - signal, signal / square


def gradients(repeats=40, save=Path("gradients.png"), more=()):
    """Measure how much signal is in an estimate of the gradient from the images of one iteration.

    variance is E |estimate - signal|^2, where the signal is the expected estimate. agreement is the
    mean cosine of two estimates, 1 / (1 + variance / |signal|^2), with the jackknife's errors."""
    require(repeats > 2, f"--repeats is {repeats}; standard errors need 3 or more")
    trainer, steps, estimates, lines = load_trainer(more), range(6), [], defaultdict(dict)
    kinds = ["uniform", "spatial", "shuffled"]
    kinds += ["oracle"] * isinstance(trainer.task, OCR | GenEval)
    for repeat in tqdm(range(repeats), "estimates"):
        torch.manual_seed(10_000 + repeat)
        estimates.append(estimate(trainer, kinds, steps))
    for kind, k in itertools.product(kinds, steps):
        vectors = torch.stack([each[kind, k] for each in estimates])
        products, others = vectors @ vectors.T, 1 - torch.eye(repeats)
        variance, agreement = gradient_measures(products)
        left_out = [gradient_measures(products[rest][:, rest])[1] for rest in others.bool()]
        error = math.sqrt((repeats - 1) * statistics.pvariance(left_out))
        lines[kind][k] = [agreement - error, agreement + error]
        numbers = f"agreement {agreement:.3f} +- {error:.3f}, variance {variance:.2g}"
        print(f"{NAMES.get(kind, kind)}, step {k}: {numbers}")
    draw_lines(save, lines, "denoising step", f"agreement of {repeats} estimates, standard error")


def problem(save=Path("problem.png"), more=()):
    """Draw the best and the worst of 16 rollouts, and where their advantages are applied."""
    trainer = load_trainer(["--group-size=16", "--batch-size=48", *more])
    seed, prompts, rows = trainer.args.seed, trainer.task.heldout_prompts, []
    torch.manual_seed(seed)
    prompt = prompts[seed % len(prompts)]
    samples, _, images, values, advantages = sample_groups(trainer, [prompt], (1, 2, 3))
    weights = trainer.allocation(samples)[:, 2]  # of step 3
    for i, colour in (values.argmax(), "#285ae6"), (values.argmin(), "#e61e1e"):
        image, A, w, top = images[i], advantages[i], weights[i], weights[i].max()
        tiles = [
            (image, f"reward {values[i]:.2f}, A = {A:+.1f}"),
            (overlay(image, torch.full_like(w, 0.4), colour), f"Flow-GRPO: {A:+.1f} everywhere"),
            (overlay(image, w / top, "#f09010"), f"w: mean 1, {w.min():.1f} to {top:.1f}"),
            (overlay(image, w / top, colour), f"STAR: w A, {w.min() * A:+.1f} to {top * A:+.1f}"),
        ]
        rows.append(draw_row("" if rows else prompt, tiles, side=208))
    rewards.write(save, make_image_grid(rows, rows=2, cols=1).save)


COMMANDS = [maps, train, all_, compare, map_quality, gradients, problem]


def main(argv=None):
    """Each of COMMANDS is a command; its parameters with a default are options."""
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in COMMANDS:
        name, about = function.__name__.strip("_").replace("_", "-"), inspect.getdoc(function)
        command = commands.add_parser(name, help=about.split("\n")[0], description=about, **style)
        command.set_defaults(function=function)
        for name, parameter in inspect.signature(function).parameters.items():
            option, default = "--" + name.replace("_", "-"), parameter.default
            if default is parameter.empty:
                command.add_argument(name, nargs="+")
            elif name != "more":
                kind, shown = str if default is None else type(default), "default: %(default)s"
                command.add_argument(option, type=kind, default=default, help=shown)
    args, more = parser.parse_known_args(argv)
    options = vars(args) | ({} if args.function in (all_, compare) else {"more": more})
    if more and "more" not in options:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        for name, value in options.items():
            good = type(value) is not int or value > 0
            require(good, f"--{name.replace('_', '-')} is {value}; use 1 or more")
        folder = options.get("save", Path()).parent
        require(folder.is_dir(), f"--save: there is no folder {folder}")
        options.pop("function")(**options)
    except UserError as error:
        sys.exit(f"allocations.py: {error}")


if __name__ == "__main__":
    main()
