"""What training costs: time and memory.

    python tiny/measure.py benchmark --model stabilityai/stable-diffusion-3.5-medium

times `uniform` and `spatial` on your machine with any options of star.py. `python tiny/measure.py
COMMAND --help` describes a command and its options. This is a tool for Linux.
"""

import argparse
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import build
import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import star
from rewards import UserError, naming, require

ROOT, GIB = Path(__file__).parent.parent, 2**30


def in_turn(repeats):
    """`uniform` and `spatial` in turn, each as often first as second, with the repeat's number."""
    for repeat in range(repeats):
        order = ("uniform", "spatial") if repeat % 2 == 0 else ("spatial", "uniform")
        yield from ((repeat, allocation) for allocation in order)


def spread(values):
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def print_rows(rows):
    """Print {name: {allocation: values}} with the ratio of each pair of values."""
    columns = ("median (least to most)", "uniform", "spatial", "spatial / uniform")
    print(f"{columns[0]:<32}" + "".join(f"{title:>32}" for title in columns[1:]))
    for name, values in rows.items():
        pairs = zip(values["spatial"], values["uniform"])
        cells = values["uniform"], values["spatial"], [ours / theirs for ours, theirs in pairs]
        print(f"{name:<32}" + "".join(f"{spread(cell):>32}" for cell in cells))


# --------------------------------------------------------------------------------------- Benchmark
def matrix_speed(device, dtype):
    """Floating-point operations per second of one large matrix product, the best of six."""
    size, cuda = (8192, True) if device == "cuda" else (2048, False)
    matrix, seconds = torch.randn(size, size, device=device, dtype=dtype), []
    for _ in range(6):
        begin = time.perf_counter()
        matrix @ matrix
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def forward_flops(trainer):
    """Floating-point operations of one forward pass for one image, twice that with guidance."""
    args = trainer.args
    policy = trainer.policy(trainer.transformer, args.steps, args.noise_level)
    latents = torch.zeros(1, *trainer.shape, device=args.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), trainer.autocast:
        policy.velocity(latents, 0, trainer.empty_prompt)
    return counter.get_total_flops()


def needed_flops(trainer, forward):
    """Floating-point operations that the method needs in an iteration, by phase."""
    args = trainer.args
    passes = 4 if trainer.reference else 3  # a backward pass takes twice as long as a forward pass
    images = args.prompts_per_iteration * args.group_size
    steps = dict(rollout=args.steps, update=passes * args.stochastic_steps)
    return {phase: images * count * forward for phase, count in steps.items()}


def benchmark(args):
    """Time whole iterations of uniform and spatial in turn.

    The first iteration of each warms up and does not count. FLOP utilisation is the number of
    floating-point operations that the method needs, divided by the time and by the speed of one
    large matrix product in the same precision. If F is the number of a forward pass, an image needs
    T F for its rollout and 3 S F for its update, or 4 S F with a KL penalty. What gradient
    checkpointing computes again does not count. All options of star.py may be added.
    """
    import resource  # Unix only

    if args.save:
        require(args.save.parent.is_dir(), f"--save {args.save}: there is no such folder")
    settings, task = star.parse_arguments(args.more)
    trainer, cuda = star.Trainer(settings, task), settings.device == "cuda"
    lines = {"uniform": [], "spatial": []}
    for iteration, (repeat, allocation) in enumerate(tqdm(list(in_turn(args.repeats + 1)))):
        settings.allocation = allocation
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        line = trainer.iterate(iteration)
        line["peak"] = torch.cuda.max_memory_allocated() / GIB if cuda else 0
        if repeat > 0:
            lines[allocation].append(line)
    forward = forward_flops(trainer)
    speed = matrix_speed(settings.device, torch.bfloat16 if settings.bfloat16 else torch.float32)
    needed = needed_flops(trainer, forward)
    images = settings.prompts_per_iteration * settings.group_size

    def numbers(line):
        total = sum(line["seconds"].values())
        phases = {f"{phase}, seconds": seconds for phase, seconds in line["seconds"].items()}
        phases |= {"iteration, seconds": total, "images per second": images / total}
        for phase, flops in needed.items():
            phases[f"{phase}, FLOP utilisation"] = flops / line["seconds"][phase] / speed
        return phases | ({"peak GPU memory, GiB": line["peak"]} if cuda else {})

    table = {name: list(map(numbers, measured)) for name, measured in lines.items()}
    rows = {}
    for title in table["uniform"][0]:
        rows[title] = {name: [each[title] for each in measured] for name, measured in table.items()}
    device = torch.cuda.get_device_name() if cuda else "cpu"
    pixels = trainer.shape[1] * trainer.pipe.vae_scale_factor
    main_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{settings.model} on {device}: {images} images of {pixels} pixels per iteration")
    print(f"forward pass {forward / 1e9:.1f} GFLOP, matrix product {speed / 1e12:.2f} TFLOP/s")
    print(f"{main_memory:.2f} GiB of main memory at the peak of the process")
    print_rows(rows)
    if args.save:
        report = dict(device=device, torch=torch.__version__, arguments=asdict(settings))
        report |= dict(forward_flop=forward, product_flop_per_second=speed, rows=rows)
        star.write(args.save, Path.write_text, json.dumps(report, indent=1))


# ---------------------------------------------------------------------------------------- Overhead
def peak_memory(allocation):
    """MiB of main memory that star.py takes for one iteration of the miniature."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "star.py", "--device", "cpu", "--no-bfloat16"]
        command += ["--allocation", allocation, "--out", folder + "/run"]
        command += ["--iterations", "1", "--evaluation-prompts", "8"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=ROOT, **quiet)
        _, status, used = os.wait4(process.pid, 0)
    require(status == 0, f"failed: {' '.join(command)}")
    return used.ru_maxrss / 1024


def overhead(args):
    """Measure CPU time and peak memory of spatial against uniform.

    The CPU seconds of one thread for whole iterations of the miniature are steadier than the clock
    where other programs run.
    """
    torch.set_num_threads(1)
    memory = {"uniform": [], "spatial": []}
    seconds = {"uniform": [], "spatial": []}
    for _, allocation in in_turn(args.repeats):  # first: a child starts with its parent's peak
        memory[allocation].append(peak_memory(allocation))
    settings, task = star.parse_arguments(["--device", "cpu", "--no-bfloat16"])
    trainer = star.Trainer(settings, task)
    trainer.iterate(0)  # warms up
    for repeat, allocation in in_turn(args.repeats):
        settings.allocation = allocation
        begin = time.process_time()
        trainer.iterate(1 + repeat)
        seconds[allocation].append(time.process_time() - begin)
    print_rows({"iteration, CPU seconds": seconds, "peak memory, MiB": memory})


# ---------------------------------------------------------------------- Stable Diffusion 3.5 Medium
# Its published shapes. The vocabularies are those of CLIP and T5, the tokenizers the miniature's.
# fmt: off
TRANSFORMER = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
    attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
    caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)
VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
    sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609,
    use_quant_conv=False, use_post_quant_conv=False,
)
T5 = dict(
    d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
    feed_forward_proj="gated-gelu", dropout_rate=0.0,
)
# fmt: on


def make_clip(width, layers, heads, activation):
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return transformers.CLIPTextModelWithProjection(config)


def make_part(name):
    """A heavy part of a pipeline of SD3.5 Medium's shapes, with random weights."""
    if name == "transformer":
        return diffusers.SD3Transformer2DModel(**TRANSFORMER)
    if name == "vae":
        return diffusers.AutoencoderKL(**VAE)
    if name == "text_encoder":
        return make_clip(768, 12, 12, "quick_gelu")
    if name == "text_encoder_2":
        return make_clip(1280, 32, 20, "gelu")
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


PARTS = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]


def full_size(args):
    """Save a pipeline of SD3.5 Medium's shapes with random weights.

    It is for measuring, not for looking at. The weights are bfloat16: 16 GB on the disk, or 6 GB
    with --no-t5.
    """
    torch.manual_seed(0)
    tokenizer = build.clip_tokenizer()
    tokenizer.model_max_length = 77
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    small = dict(scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer)
    small["tokenizer_3"] = None if args.no_t5 else build.t5_tokenizer()
    with naming(f"--save {args.save}"):
        pipe = diffusers.StableDiffusion3Pipeline(**small, **dict.fromkeys(PARTS))
        pipe.save_pretrained(args.save)
        index = json.loads((args.save / "model_index.json").read_text())
        torch.set_default_dtype(torch.bfloat16)
        for name in PARTS[: 4 if args.no_t5 else 5]:  # one at a time, for they fill the memory
            part = make_part(name)
            part.save_pretrained(args.save / name)
            library = "transformers" if name.startswith("text") else "diffusers"
            index[name] = [library, type(part).__name__]
            del part
        torch.set_default_dtype(torch.float32)
        (args.save / "model_index.json").write_text(json.dumps(index, indent=1))


# ------------------------------------------------------------------------------------------ Memory
def saved_bytes(layers, dual, checkpointing=False, pixels=512, tokens=77 + 256):
    """Bytes that autograd keeps of one image for the backward pass, without weights.

    The transformer has SD3.5 Medium's width and `layers` blocks, of which `dual` have two
    attentions. The forward pass runs under bfloat16 autocast.
    """
    shapes = dict(num_layers=layers, dual_attention_layers=tuple(range(dual)))
    transformer = diffusers.SD3Transformer2DModel(**TRANSFORMER | shapes).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    weights, shapes, kept = set(), set(), {}
    for weight in transformer.parameters():
        weights.add(weight.untyped_storage().data_ptr())
        shapes |= {tuple(weight.shape), tuple(weight.shape[::-1])}

    def pack(tensor):
        storage = tensor.untyped_storage()
        copy_of_weight = tuple(tensor.shape) in shapes  # autocast makes them
        if storage.data_ptr() not in weights and not copy_of_weight:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    side = pixels // 8
    inputs = torch.randn(1, 16, side, side), torch.randn(1, tokens, 4096), torch.randn(1, 2048)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), hooks:
        output = transformer(*inputs, torch.tensor([500.0]))
    del output
    return sum(kept.values())


def activation_bytes():
    """What autograd keeps of one image at full depth: without and with gradient checkpointing."""
    two, three = saved_bytes(2, 1), saved_bytes(3, 1)
    dual, single = saved_bytes(3, 2) - two, three - two
    rest = two - dual  # the last block, which drops the text, and what surrounds the blocks
    border = saved_bytes(3, 1, True) - saved_bytes(2, 1, True)
    return 13 * dual + 10 * single + rest, 24 * border + dual


def memory(args):
    """Add up the memory of training at SD3.5 Medium's shapes.

    Weights are counted from the shapes. Activations are measured block by block.
    """
    with torch.device("meta"):
        parts = {name: make_part(name) for name in PARTS}
    counts = {
        name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()
    }
    factored = 0  # Adafactor keeps a row and a column of each matrix
    for weight in parts["transformer"].parameters():
        factored += sum(weight.shape) if weight.dim() == 2 else math.prod(weight.shape)
    settings, weights = star.Arguments(**star.FULL_SIZE), counts["transformer"]
    images = settings.prompts_per_iteration * settings.group_size
    kept, checkpointed = activation_bytes()
    clips = counts["text_encoder"] + counts["text_encoder_2"]
    rollouts = images * (settings.steps + 1) * 16 * 64 * 64
    maps = images * settings.stochastic_steps * (64 * 64 + 32 * 32)
    rows = {
        "transformer, float32": 4 * weights,
        "gradients, float32": 4 * weights,
        "AdamW's state, float32": 8 * weights,
        "Adafactor's state instead": 4 * factored,
        "reference for the KL, bfloat16, on the GPU while it is used": 2 * weights,
        "average of the weights, float32, on the GPU while it is evaluated": 4 * weights,
        "VAE, float32": 4 * counts["vae"],
        "two CLIP text encoders, bfloat16, while they encode": 2 * clips,
        "T5-XXL, bfloat16, while it encodes": 2 * counts["text_encoder_3"],
        f"latents of {images} rollouts": 4 * rollouts,
        f"log-probabilities and maps of {images} rollouts": 4 * maps,
        "activations of one image, both halves of guidance": 2 * kept,
        "the same with gradient checkpointing": 2 * checkpointed,
    }
    print("billion parameters: " + ", ".join(f"{n} {c / 1e9:.3f}" for n, c in counts.items()))
    for name, size in rows.items():
        print(f"{name:<66}{size / GIB:8.2f} GiB")


# -------------------------------------------------------------------------------------------- Main
def make_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (benchmark, overhead, memory, full_size):
        name, about = function.__name__.replace("_", "-"), inspect.getdoc(function)
        options = dict(help=about.split("\n")[0], description=about, formatter_class=raw)
        command = commands.add_parser(name, allow_abbrev=False, **options)
        command.set_defaults(function=function)
        if function in (benchmark, overhead):
            about = "measured iterations of each (default: 5)"
            command.add_argument("--repeats", type=int, default=5, help=about)
        if function is benchmark:
            command.add_argument("--save", type=Path, help="JSON file to write")
        if function is full_size:
            command.add_argument("--save", type=Path, required=True, help="folder to write")
            command.add_argument("--no-t5", action="store_true", help="without the T5 encoder")
    return parser


def main(argv=None):
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    parser = make_parser()
    args, more = parser.parse_known_args(argv)
    args.more = [each for each in more if each != "--"]
    if args.more and args.function is not benchmark:
        parser.error(f"unrecognized arguments: {' '.join(args.more)}")
    try:
        require(getattr(args, "repeats", 1) > 0, "--repeats must be 1 or more")
        args.function(args)
    except UserError as error:
        sys.exit(f"measure.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("measure.py: out of GPU memory; try --low-memory or a smaller --batch-size")


if __name__ == "__main__":
    main()
