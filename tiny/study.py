"""The measurements that README.md reports, each with one command, on the miniature.

    python tiny/study.py maps                      does the attention find the sign? area under the ROC curve
    python tiny/study.py compare runs/ocr-*        pictures that `spatial` needs to reach what `uniform` ends with
    python tiny/study.py overhead                  time and memory of `spatial` relative to `uniform`
    python tiny/study.py guidance                  held-out reward of the untrained miniature at several guidance scales
"""
import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import star                      # first: it quiets the libraries' remarks about packages that nothing here needs
import build
import torch
from diffusers import StableDiffusion3Pipeline
from rewards import OCR


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
    core = torch.stack([star.core_token_mask(p, OCR.core_spans(None, p), pipeline.tokenizer, pipeline.tokenizer_3, build.TOKENS) for p in prompts])
    given = star.encode(pipeline, prompts, build.TOKENS)
    pipeline.scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    count = transformer.config.num_layers
    choices = {f"block {block}": [block] for block in range(count)} | {f"blocks {count // 2} to {count - 1}": list(range(count // 2, count)), "all": list(range(count))}
    print("step        " + "  ".join(f"{step:>5}" for step in range(10)))
    print("sigma       " + "  ".join(f"{sigma:5.2f}" for sigma in pipeline.scheduler.sigmas.tolist()[:10]))
    noise = torch.randn(clean.shape, generator=generator)
    for name, blocks in choices.items():
        row = []
        for sigma in pipeline.scheduler.sigmas.tolist()[:10]:
            with star.AttentionAllocator(transformer, core, blocks) as allocator:
                star.predict_velocity(transformer, (1 - sigma) * clean + sigma * noise, sigma, given, 1.0, None)
            found = allocator.map().view(-1, 8, 8)
            row.append(statistics.mean(area_under_roc(m, t) for m, t in zip(found, truth)))
        print(f"{name:<12}" + "  ".join(f"{value:5.3f}" for value in row), flush=True)


def images_to_reach(lines, goal):
    """Pictures seen when the held-out reward first reaches `goal`, linear between evaluations; inf if it never does."""
    points = [(line["images"], line["heldout_reward"]) for line in lines if "heldout_reward" in line]
    for (images, reward), (next_images, next_reward) in zip(points, points[1:]):
        if next_reward >= goal:
            return images + (next_images - images) * max(0.0, goal - reward) / (next_reward - reward)
    return float("inf")


def compare(args):
    runs = {Path(run).name: star.read_metrics(Path(run)) for run in args.runs}
    final = lambda lines: [line["heldout_reward"] for line in lines if "heldout_reward" in line][-1]
    ratios = []
    print("seed  start  uniform's end  spatial's end  pictures to uniform's end: uniform  spatial  ratio")
    for seed in sorted({int(name.rsplit("-", 1)[1]) for name in runs}):
        uniform, spatial = (runs[f"ocr-{allocation}-{seed}"] for allocation in ("uniform", "spatial"))
        goal = final(uniform)
        needed = images_to_reach(uniform, goal), images_to_reach(spatial, goal)
        ratios.append(needed[1] / needed[0])
        print(f"{seed:>4}  {uniform[0]['heldout_reward']:.3f}  {goal:>13.3f}  {final(spatial):>13.3f}  {needed[0]:>34.0f}  {needed[1]:>7.0f}  {ratios[-1]:.2f}")
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


def overhead(args):
    seconds, memory = {"uniform": [], "spatial": []}, {"uniform": [], "spatial": []}
    for repeat in range(args.repeats):
        for allocation in seconds if repeat % 2 == 0 else reversed(seconds):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(HERE.parent / "star.py"), "--allocation", allocation, "--iterations", "4", "--evaluation-prompts", "8",
                           "--save-every", "99", "--out", folder + "/run"]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                memory[allocation].append(os.wait4(process.pid, 0)[2].ru_maxrss / 1024)
                lines = star.read_metrics(Path(folder) / "run")[2:]               # the first iteration warms up
                seconds[allocation].append(statistics.mean(sum(line["seconds"].values()) for line in lines))
    for name, unit, values in (("seconds per iteration", "s", seconds), ("peak memory", "MiB", memory)):
        ratios = [b / a for a, b in zip(values["uniform"], values["spatial"])]
        print(f"{name}: uniform {statistics.median(values['uniform']):.2f} {unit}, spatial {statistics.median(values['spatial']):.2f} {unit}, "
              f"ratio median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


@torch.no_grad()
def guidance(args):
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.model)
    task = OCR()
    task.load("cpu")
    pipeline.scheduler.set_timesteps(args.steps)
    prompts = task.heldout_prompts[:args.pictures]
    for scale in (1.0, 1.5, 2.0, 3.0, 4.5, 7.0):
        settings = star.Arguments(guidance_scale=scale)
        rewards, pictures = star.evaluate(pipeline, task, prompts, pipeline.scheduler.sigmas.tolist(), (8, 16, 16), settings)
        print(f"guidance {scale}: {rewards.mean():.3f} +- {rewards.std() / len(rewards) ** 0.5:.3f}", flush=True)
        if args.save:
            star.draw_table([[(picture, f"{reward:.2f}\n{textwrap.fill(prompt, 22)}") for picture, reward, prompt in zip(pictures[:8], rewards, prompts)]],
                            Path(args.save) / f"guidance_{scale}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("maps", "compare", "overhead", "guidance"))
    parser.add_argument("runs", nargs="*", help="for compare: folders of runs, named <task>-<allocation>-<seed>")
    parser.add_argument("--model", default=str(HERE / "sd3"))
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", help="for guidance: folder for sample pictures")
    args = parser.parse_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
