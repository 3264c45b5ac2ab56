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
import time
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
    print("step            " + "  ".join(f"{step:>5}" for step in range(10)))
    print("sigma           " + "  ".join(f"{sigma:5.2f}" for sigma in pipeline.scheduler.sigmas.tolist()[:10]))
    noise = torch.randn(clean.shape, generator=generator)
    for name, blocks in choices.items():
        row = []
        for sigma in pipeline.scheduler.sigmas.tolist()[:10]:
            with star.AttentionAllocator(transformer, core, blocks) as allocator:
                star.predict_velocity(transformer, (1 - sigma) * clean + sigma * noise, sigma, given, 1.0, None)
            found = allocator.map().view(-1, 8, 8)
            row.append(statistics.mean(area_under_roc(m, t) for m, t in zip(found, truth)))
        print(f"{name:<16}" + "  ".join(f"{value:5.3f}" for value in row), flush=True)


def images_to_reach(lines, goal):
    """Pictures seen when the held-out reward first reaches `goal`, linear between evaluations; inf if it never does."""
    points = [(line["images"], line["heldout_reward"]) for line in lines if "heldout_reward" in line]
    for (images, reward), (next_images, next_reward) in zip(points, points[1:]):
        if next_reward >= goal:
            return images + (next_images - images) * max(0.0, goal - reward) / (next_reward - reward)
    return float("inf")


def compare(args):
    """Seed by seed, from the held-out rewards of uniform and spatial runs that differ in nothing else."""
    heldout = lambda lines: [line["heldout_reward"] for line in lines if "heldout_reward" in line]
    rows = []
    for seed in sorted({int(Path(run).name.rsplit("-", 1)[1]) for run in args.runs}):
        uniform, spatial = (star.read_metrics(Path(args.runs[0]).parent / f"ocr-{allocation}-{seed}") for allocation in ("uniform", "spatial"))
        needed = {goal: [images_to_reach(lines, goal) for lines in (uniform, spatial)] for goal in (0.8, heldout(uniform)[-1])}
        early, late = needed.values()
        rows.append({"seed": seed, "start": heldout(uniform)[0], "end, uniform": heldout(uniform)[-1], "end, spatial": heldout(spatial)[-1],
                     "mean over the run, uniform": statistics.mean(heldout(uniform)), "mean over the run, spatial": statistics.mean(heldout(spatial)),
                     "pictures to 0.80, uniform": early[0], "pictures to 0.80, spatial": early[1], "ratio at 0.80": early[1] / early[0],
                     "pictures to uniform's end, uniform": late[0], "pictures to uniform's end, spatial": late[1], "ratio at uniform's end": late[1] / late[0]})
    for key in rows[0]:
        print(f"{key:<36}" + "".join(f"{row[key]:>8.0f}" if row[key] > 10 or key == "seed" else f"{row[key]:>8.3f}" for row in rows))
    for key in ("ratio at 0.80", "ratio at uniform's end"):
        ratios = [row[key] for row in rows]
        print(f"{key}: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    gains = [row["mean over the run, spatial"] - row["mean over the run, uniform"] for row in rows]
    print(f"spatial's gain in the mean over the run: median {statistics.median(gains):+.3f}, from {min(gains):+.3f} to {max(gains):+.3f}")


def overhead(args):
    """CPU seconds of one thread for a rollout and its update (steadier than the clock where other programs run), and peak memory of whole runs."""
    torch.set_num_threads(1)
    settings, generator = star.Arguments(), torch.Generator().manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.model)
    transformer, count = pipeline.transformer, settings.batch_size
    prompts = OCR().prompts[:count]
    core = star.core_tokens_of(pipeline, OCR(), prompts, settings.max_sequence_length)
    with torch.no_grad():
        given = star.encode(pipeline, prompts, settings.max_sequence_length)
    pipeline.scheduler.set_timesteps(settings.steps)
    sigmas, trained = pipeline.scheduler.sigmas.tolist(), list(range(2, 2 + settings.stochastic_steps))
    blocks = star.default_map_blocks(transformer.config.num_layers)
    noise, advantages = torch.randn(count, 8, 16, 16, generator=generator), torch.randn(count, generator=generator)

    def rollout_and_update(allocation):
        start = time.process_time()
        maps = {} if allocation == "uniform" else {"core_tokens": core, "map_steps": trained, "map_blocks": blocks}
        painted = star.rollout(transformer, noise, given, None, sigmas, trained, generator, **maps)
        weights = torch.ones_like(painted.log_prob) if allocation == "uniform" else star.allocation_weights(painted.maps, (16, 16))
        for j, step in enumerate(trained):
            velocity = star.predict_velocity(transformer, painted.latents[:, step], sigmas[step], given, 1.0, None)
            _, mean, std = star.sde_step(painted.latents[:, step], velocity, sigmas[step], sigmas[step + 1], sigmas[1], 0.7, 0.0)
            log_prob = star.position_log_prob(painted.latents[:, step + 1], mean, std)[:, None]
            star.star_loss(log_prob, painted.log_prob[:, j:j + 1], advantages, weights[:, j:j + 1], 0.02)[0].backward()
        return time.process_time() - start

    seconds, memory = {"uniform": [], "spatial": []}, {"uniform": [], "spatial": []}
    rollout_and_update("uniform")                                              # the first warms up
    for repeat in range(3 * args.repeats):
        for allocation in seconds if repeat % 2 == 0 else reversed(seconds):
            seconds[allocation].append(rollout_and_update(allocation))
    for repeat in range(args.repeats):
        for allocation in memory if repeat % 2 == 0 else reversed(memory):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(HERE.parent / "star.py"), "--allocation", allocation, "--iterations", "1", "--evaluation-prompts", "8", "--out", folder + "/run"]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                memory[allocation].append(os.wait4(process.pid, 0)[2].ru_maxrss / 1024)
    for name, unit, values in (("rollout and update", "s", seconds), ("peak memory", "MiB", memory)):
        ratios = [b / a for a, b in zip(values["uniform"], values["spatial"])]
        print(f"{name}: uniform {statistics.median(values['uniform']):.2f} {unit}, spatial {statistics.median(values['spatial']):.2f} {unit}, "
              f"ratio median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


@torch.no_grad()
def guidance(args):
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.model)
    task = OCR()
    task.load("cpu")
    prompts = task.heldout_prompts[:args.pictures]
    encoded, empty = (star.encode(pipeline, texts, build.TOKENS) for texts in (prompts, [""]))
    for scale in (1.0, 1.5, 2.0, 3.0, 4.5, 7.0):
        settings = star.Arguments(guidance_scale=scale, evaluation_steps=args.steps)
        rewards, pictures = star.evaluate(pipeline, task, prompts, encoded, empty, (8, 16, 16), settings)
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
