"""How should a trained model be called? Rewards at several guidance scales and numbers of steps.

    python study/calls.py --task ocr tiny/sd3 runs/ocr-spatiotemporal-0/pipeline

calls each model with plain diffusers, for the held-out prompts of the task, from three noises.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import star  # isort: skip  (the first, since it silences the libraries)
import torch
from diffusers import StableDiffusion3Pipeline

from rewards import make_task

CALLS = [(1.0, 10), (3.0, 10), (3.0, 28), (7.0, 28)]  # guidance scale, steps


def generate(pipeline, prompts, guidance_scale, steps, seed):
    """One image per prompt."""
    generator = torch.Generator().manual_seed(seed)
    side = pipeline.default_sample_size
    channels = pipeline.transformer.config.in_channels
    noise = torch.randn(len(prompts), channels, side, side, generator=generator)
    output = pipeline(
        prompts,
        latents=noise,
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        max_sequence_length=20,
    )
    return output.images


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="ocr", help="ocr, geneval or pickscore")
    parser.add_argument("--seeds", type=int, default=3, help="how many noises, seeded 0, 1, ...")
    parser.add_argument("models", nargs="+", help="folders of pipelines")
    args = parser.parse_args()
    task = make_task(star.parse_arguments(["--task", args.task, "--evaluation-prompts", "96"]))
    task.prepare()
    prompts = task.heldout_prompts
    for model in args.models:
        pipeline = StableDiffusion3Pipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        for guidance_scale, steps in CALLS:
            means = []
            strict = []
            for seed in range(args.seeds):
                images = generate(pipeline, prompts, guidance_scale, steps, seed)
                means.append(task.scores(images, prompts, "cpu").mean().item())
                for name, value in task.report(images, prompts).items():
                    if name.startswith("strict GenEval"):
                        strict.append(value)
            said = f"{model}, guidance {guidance_scale:g}, {steps} steps: "
            said += f"{statistics.mean(means):.3f} ({min(means):.3f} to {max(means):.3f})"
            if strict:
                said += f", strict {statistics.mean(strict):.3f}"
            print(said, flush=True)


if __name__ == "__main__":
    main()
