"""The measurements that README.md reports, each with one command, on the miniature.

    python tiny/study.py maps                      does the attention find the sign? area under the ROC curve
    python tiny/study.py objects --pictures 64     does the attention to "blue box" find the box that is painted?
    python tiny/study.py compare runs/ocr-*        pictures that `spatial` needs to reach what `uniform` ends with
    python tiny/study.py overhead                  time and memory of `spatial` relative to `uniform`
    python tiny/study.py guidance                  held-out reward of the untrained miniature at several guidance scales
    python tiny/study.py memory                    what training at SD3.5 Medium's shapes keeps in memory
    python tiny/study.py full_size --save FOLDER   a pipeline of SD3.5 Medium's shapes with random weights, to measure with
"""
import argparse
import json
import math
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
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from rewards import OCR, GenEval
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel


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


@torch.no_grad()
def objects(args):
    """Does the map of "blue box" lie on the box that is painted? Against the detector's mask on the finished picture, per step."""
    pipeline, task = StableDiffusion3Pipeline.from_pretrained(args.model), GenEval()
    task.load("cpu")
    words = "blue box"
    prompts = [f"a {wall} wall with two red balls and a {words}" for wall in ("green", "white", "black", "pink", "yellow", "brown", "purple", "white")]
    prompts = (prompts * args.pictures)[:args.pictures]
    core = torch.stack([star.core_token_mask(p, [(p.index(words), p.index(words) + len(words))], pipeline.tokenizer, pipeline.tokenizer_3, build.TOKENS)
                        for p in prompts])
    sigmas, generator = star.schedule(pipeline, 10), torch.Generator().manual_seed(0)
    painted = star.rollout(pipeline.transformer, torch.randn(len(prompts), 8, 16, 16, generator=generator), star.encode(pipeline, prompts, build.TOKENS),
                           star.encode(pipeline, [""], build.TOKENS), sigmas, (), generator, guidance_scale=args.guidance_scale, core_tokens=core,
                           map_steps=range(10), map_blocks=star.default_map_blocks(pipeline.transformer.config.num_layers))
    found = [one.get("box", []) for one in task.detect(star.decode(pipeline.vae, painted.latents[:, -1]))]
    scores = [[] for _ in range(10)]
    for maps, boxes in zip(painted.maps, found):
        if len(boxes) == 1:                       # where there are several, which one is meant is unknown
            truth = torch.nn.functional.avg_pool2d(boxes[0].mask[None].float(), build.GRID)[0] > 0.5
            for step in range(10):
                scores[step].append(area_under_roc(maps[step], truth))
    print(f"guidance {args.guidance_scale}: pictures with one box: {len(scores[0])} of {len(prompts)}; area under the ROC curve of \"{words}\" per step: "
          + " ".join(f"{statistics.mean(values):.2f}" for values in scores))


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
    rows, task = [], Path(args.runs[0]).name.split("-")[0]
    for seed in sorted({int(Path(run).name.rsplit("-", 1)[1]) for run in args.runs}):
        uniform, spatial = (star.read_metrics(Path(args.runs[0]).parent / f"{task}-{allocation}-{seed}") for allocation in ("uniform", "spatial"))
        goals = args.goal, heldout(uniform)[-1]
        early, late = ([images_to_reach(lines, goal) for lines in (uniform, spatial)] for goal in goals)
        rows.append({"seed": seed, "start": heldout(uniform)[0], "end, uniform": heldout(uniform)[-1], "end, spatial": heldout(spatial)[-1],
                     "mean over the run, uniform": statistics.mean(heldout(uniform)), "mean over the run, spatial": statistics.mean(heldout(spatial)),
                     "pictures to the goal, uniform": early[0], "pictures to the goal, spatial": early[1], "ratio at the goal": early[1] / early[0],
                     "pictures to uniform's end, uniform": late[0], "pictures to uniform's end, spatial": late[1], "ratio at uniform's end": late[1] / late[0]})
    for key in rows[0]:
        print(f"{key:<36}" + "".join(f"{row[key]:>8.0f}" if key == "seed" or key.startswith("pictures") else f"{row[key]:>8.3f}" for row in rows))
    for key in ("ratio at the goal", "ratio at uniform's end"):
        ratios = [row[key] for row in rows]
        print(f"{key}: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    gains = [row["mean over the run, spatial"] - row["mean over the run, uniform"] for row in rows]
    print(f"spatial's gain in the mean over the run: median {statistics.median(gains):+.3f}, from {min(gains):+.3f} to {max(gains):+.3f}")


def overhead(args):
    """CPU seconds of one thread for whole iterations in turn (steadier than the clock where other programs run), and peak memory of whole runs."""
    torch.set_num_threads(1)
    settings = star.parse_arguments(["--model", args.model])[0]
    run = star.load(settings, star.check(settings), None)
    seconds, memory = {"uniform": [], "spatial": []}, {"uniform": [], "spatial": []}
    star.iterate(run, 0, "uniform")                                            # the first warms up
    for repeat in range(args.repeats):
        for allocation in seconds if repeat % 2 == 0 else reversed(seconds):
            start = time.process_time()
            star.iterate(run, 1 + repeat, allocation)
            seconds[allocation].append(time.process_time() - start)
    for repeat in range(args.repeats):
        for allocation in memory if repeat % 2 == 0 else reversed(memory):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(HERE.parent / "star.py"), "--allocation", allocation, "--iterations", "1", "--evaluation-prompts", "8", "--out", folder + "/run"]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                memory[allocation].append(os.wait4(process.pid, 0)[2].ru_maxrss / 1024)
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
    run = star.load(settings, star.check(settings), None)
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
    parser.add_argument("what", choices=("maps", "objects", "compare", "overhead", "guidance", "memory", "full_size"))
    parser.add_argument("runs", nargs="*", help="for compare: folders of runs, named <task>-<allocation>-<seed>")
    parser.add_argument("--task", default="ocr", help="for guidance")
    parser.add_argument("--goal", type=float, default=0.8, help="for compare: the held-out reward to be reached")
    parser.add_argument("--model", default=str(HERE / "sd3"))
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--save", help="for guidance: folder for sample pictures; for full_size: the pipeline's folder")
    parser.add_argument("--no-t5", action="store_true", help="for full_size: without the third text encoder")
    args = parser.parse_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
