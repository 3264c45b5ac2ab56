"""What training costs: memory, time and floating-point operations (FLOP).

    python study/costs.py memory --batch-size 1 --optimizer adafactor        # needs no GPU
    python study/costs.py benchmark --model stabilityai/stable-diffusion-3.5-medium

`python study/costs.py COMMAND --help` describes a command.
"""

import argparse
import copy
import dataclasses
import functools
import re
import sys
import textwrap
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tiny"))
import star  # isort: skip  (the first, since it silences the libraries)
import build
import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from rewards import Task

ALLOCATIONS = ["uniform", "spatial"]
GIB = 2**30

# ------------------------------------------------------------------- Stable Diffusion's real shapes
TRANSFORMERS = {
    "sd3.5-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    "sd3-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "sd3.5-large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5 = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


def make_clip(width, layers, activation):
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_attention_heads=width // 64,
        num_hidden_layers=layers,
        hidden_act=activation,
    )
    return transformers.CLIPTextModelWithProjection(config)


def make_pipeline(shapes, t5, bfloat16):
    """A pipeline with random weights in float32. bfloat16 is for the text encoders only."""
    transformer = diffusers.SD3Transformer2DModel(**TRANSFORMERS[shapes])
    vae = diffusers.AutoencoderKL(**VAE)
    tokenizer = build.clip_tokenizer()
    tokenizer.model_max_length = 77
    tokenizer_3 = None
    text_encoder_3 = None
    if bfloat16:
        torch.set_default_dtype(torch.bfloat16)
    text_encoder = make_clip(768, 12, "quick_gelu")
    text_encoder_2 = make_clip(1280, 32, "gelu")
    if t5:
        tokenizer_3 = build.t5_tokenizer()
        text_encoder_3 = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    torch.set_default_dtype(torch.float32)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def full_size(options):
    """Save a pipeline of SD3.5 Medium's shapes with random weights: 16 GB, or 6 with --no-t5."""
    options.save.mkdir(parents=True, exist_ok=True)
    if any(options.save.iterdir()):
        sys.exit(f"--save {options.save} is not empty: name a new folder")
    pipe = make_pipeline("sd3.5-medium", options.t5, bfloat16=True)
    pipe.to(torch.bfloat16).save_pretrained(options.save)


# ------------------------------------------------------------------------------------------ Memory
def tensors_of(*modules):
    """The parameters and buffers of modules, of which some may be None."""
    tensors = []
    for module in modules:
        if module is not None:
            tensors += module.parameters()
            tensors += module.buffers()
    return tensors


def text_tensors(pipe):
    return tensors_of(pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)


def size_of(nested):
    """The size in GiB of all tensors in nested lists and dictionaries. Views count once."""
    sizes = {}
    for value in tree_iter(nested):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values()) / GIB


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; `peaks` has the largest sum of each phase."""

    def __init__(self):
        super().__init__()
        self.bytes = {}  # of each storage
        self.total = 0
        self.phase = "load"
        self.peaks = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                if value.untyped_storage()._cdata not in self.bytes:
                    self.place([value], on_device=True)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.total)
        return result

    def place(self, tensors, on_device):
        """The tensors are on the device, or they wait in main memory and do not count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.bytes:
                # When the storage is freed, another one may get its key.
                weakref.finalize(storage, self.remove, key).atexit = False
                self.bytes[key] = 0
            self.total -= self.bytes[key]
            self.bytes[key] = storage.nbytes() if on_device else 0
            self.total += self.bytes[key]

    def remove(self, key):
        self.total -= self.bytes.pop(key)

    def in_phase(self, name, function):
        """The function, during which it is this phase."""

        def call(*inputs):
            before = self.phase
            self.phase = name
            result = function(*inputs)
            self.phase = before
            return result

        return call

    @contextmanager
    def visit(self, *modules, device):
        """In place of diffusers' offload_models: what waits is on the device within the block."""
        waiting = []
        for tensor in tensors_of(*modules):
            if self.bytes.get(tensor.untyped_storage()._cdata, 0) == 0:
                waiting.append(tensor)
        self.place(waiting, on_device=True)
        yield
        self.place(waiting, on_device=False)


PHASES = [
    "encode",
    "rollout",
    "reference",
    "decode",
    "update",
    "optimizer",
    "evaluation, encode",
    "evaluation",
]


class NoReward(Task):
    """A task for which no models are loaded."""

    prompts = ["a prompt"]


def encode_as_many(count):
    """star.encode of `count` prompts, of which it returns as many as it is given."""
    star_encode = star.encode

    def encode(pipe, prompts, max_sequence_length):
        context, pooled = star_encode(pipe, NoReward.prompts * count, max_sequence_length)
        return context[: len(prompts)], pooled[: len(prompts)]

    return encode


def count_iteration(args, live):
    """Count the peaks of an evaluation of star.py and of the iteration after it, not the first.

    For the peaks two batches of each update and one step of the evaluation suffice. Returns the
    Trainer and the Rollouts of the iteration.
    """
    images = args.prompts_per_iteration * args.group_size
    few = copy.copy(args)
    few.prompts_per_iteration = 1
    few.group_size = min(images, 2 * args.batch_size * args.updates_per_iteration)
    few.evaluation_steps = 1
    with patch.object(star, "offload_models", live.visit):
        trainer = star.Trainer(few, NoReward())
        pipe = trainer.pipe
        live.place(tensors_of(pipe.transformer, pipe.vae), on_device=True)
        live.place(text_tensors(pipe), on_device=False)
        live.place(tensors_of(trainer.ema, trainer.reference), on_device=False)
        begin_second_iteration(trainer)
        trainer.add_reference_means = live.in_phase("reference", trainer.add_reference_means)
        trainer.optimizer.step = live.in_phase("optimizer", trainer.optimizer.step)
        pipe.image_processor.postprocess = lambda images: [None] * len(images)
        live.peaks.clear()

        live.phase = "evaluation"
        encode = live.in_phase("evaluation, encode", encode_as_many(args.evaluation_prompts))
        with patch.object(star, "encode", encode):
            trainer.generate(NoReward.prompts * min(args.batch_size, args.evaluation_prompts))
        live.phase = "rollout"
        encode = live.in_phase("encode", encode_as_many(args.prompts_per_iteration))
        with patch.object(star, "encode", encode):
            prompts, batches = trainer.sample(1)
        live.phase = "decode"
        trainer.images_of(batches)
        live.phase = "update"
        trainer.update(batches, torch.ones(len(prompts)))
    return trainer, batches


def begin_second_iteration(trainer):
    """Give the optimizer its form on a GPU, and the state that it has after the first iteration."""
    if trainer.args.optimizer == "adamw":
        group = trainer.optimizer.param_groups[0]
        if group["fused"] is not None:
            group["fused"] = True  # star.py asks for it if there is a GPU
        elif group["foreach"] is None:
            group["foreach"] = True  # torch's default there: roots of all second moments at once
    for weight in trainer.transformer.parameters():
        weight.grad = torch.zeros_like(weight)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def float_layer_norm(x, *args):
    """As autocast does it on a GPU. On a CPU it would stay in bfloat16, which takes less memory."""
    if torch.is_autocast_enabled("cpu"):
        x = x.float()
    return torch.layer_norm(x, *args)


def falling(tensor):
    """Numbers from 1 to almost 0, like the sigmas of a schedule."""
    return [1 - k / len(tensor) for k in range(len(tensor))]


def copy_of_fake(tensor, memo):
    """A copy within the same FakeTensorMode, which copy.deepcopy would copy, too."""
    copied = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied)
    return copied


def count_fake_iteration(args, make):
    """The same with the pipeline of make() and fake tensors, which have shapes, but no content.
    Returns the LiveBytes, too."""
    live = LiveBytes()

    def load_part(args, name, compact):
        """The transformer, or a copy of it as the reference."""
        if not compact:
            return pipe.transformer
        reference = copy.deepcopy(pipe.transformer)
        if args.bfloat16:
            for tensor in tensors_of(reference):
                tensor.data = tensor.data.bfloat16()
        return reference

    loaders = {"load_pipeline": lambda args, transformer: pipe, "load_part": load_part}
    content = {
        "item": lambda tensor: 1,
        "__bool__": lambda tensor: True,
        "__index__": lambda tensor: 0,
        "tolist": falling,
        "__deepcopy__": copy_of_fake,
    }
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        live,
        patch.multiple(FakeTensor, **content),
        patch.object(F, "layer_norm", float_layer_norm),
        patch.object(torch.nn.Module, "to", lambda module, device: module),
    ):
        pipe = make()
        with patch.multiple(star, **loaders):
            trainer, batches = count_iteration(args, live)
    return live, trainer, batches


def add_other_images(args, live, trainer, batches):
    """{phase: peak in GiB}, with what is kept of the rollouts and steps that were not counted."""
    images = args.prompts_per_iteration * args.group_size
    counted = trainer.args.group_size
    kept = size_of([vars(batch) for batch in batches]) / counted  # of an image
    latents = size_of(batches[0].latents[1]) / args.batch_size  # the first share their noise
    prompt = size_of([batch.prompt for batch in batches]) / counted
    # An evaluation keeps the latents of each step and, without steps that are trained, no more.
    in_evaluation = args.evaluation_prompts * (prompt + latents * (args.evaluation_steps + 1))
    first_batch = min(args.batch_size, args.evaluation_prompts)
    counted_there = first_batch * (prompt + latents * (trainer.args.evaluation_steps + 1))
    peaks = {}
    for phase in PHASES:
        if phase not in live.peaks:
            continue  # without a KL penalty there is no reference
        peaks[phase] = live.peaks[phase] / GIB
        if phase == "evaluation":
            peaks[phase] += in_evaluation - counted_there
        elif "encode" not in phase:  # while prompts are encoded there are no rollouts
            peaks[phase] += kept * (images - counted)
    return peaks


def waiting_and_saved(trainer):
    """{row of the table: GiB} of main memory and files."""
    pipe = trainer.pipe
    transformer = size_of(tensors_of(pipe.transformer))
    text = size_of(text_tensors(pipe))
    vae = size_of(tensors_of(pipe.vae))
    ema = size_of(tensors_of(trainer.ema))
    reference = size_of(tensors_of(trainer.reference))
    optimizer = size_of(trainer.optimizer.state_dict()["state"])
    waiting = text + ema + reference
    copied = 0
    if trainer.ema:  # its update copies all weights to main memory
        copied = size_of(list(trainer.transformer.parameters()))
    return {
        "main memory while loading": transformer + text + vae,
        "main memory in training": waiting + copied,
        # A file is copied to main memory as a whole. The EMA is there anyway.
        "main memory at a checkpoint": waiting + max(transformer, optimizer),
        "disk, a checkpoint": transformer + ema + optimizer,
        "disk, the trained pipeline": transformer + text + vae,
    }


def memory(options):
    """Count the peak memory of each phase of an iteration of star.py, without a GPU.

    star.py runs with the real shapes and with tensors that have no content, and we count their
    bytes. Not counted are the models of the reward, what CUDA itself takes (about half a GiB), the
    working space of kernels, and gaps between tensors. Options of star.py but --model may follow.
    """
    config = {"sample_size": 64}
    with patch.object(star.SD3Transformer2DModel, "load_config", lambda *_, **__: config):
        args = star.parse_arguments(["--bfloat16", *options.more])
    make = functools.partial(make_pipeline, options.shapes, args.t5, args.bfloat16)
    live, trainer, batches = count_fake_iteration(args, make)
    rows = add_other_images(args, live, trainer, batches)
    rows |= waiting_and_saved(trainer)
    images = args.prompts_per_iteration * args.group_size
    print(f"{options.shapes}, {args.height} pixels, {images} images, GiB:")
    for name, size in rows.items():
        print(f"{size:8.2f}  {name}")


# -------------------------------------------------------------------------------------------- Time
def time_iteration(trainer, clock, allocation):
    """What an iteration with this allocation takes: {row of the table: value}."""
    on_gpu = star.DEVICE == "cuda"
    seconds = {}

    def timed(name, function):
        def call(*inputs):
            begin = clock()
            result = function(*inputs)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name] = clock() - begin
            return result

        return call

    def update_by_all(batches, advantages):
        """Images without an advantage, of which there may be many, would take no time."""
        return update(batches, torch.linspace(-1, 1, len(advantages)).to(advantages))

    update = trainer.update
    trainer.args.allocation = allocation
    trainer.optimizer.param_groups[0]["lr"] = 0.0  # so that each iteration has the same model
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    phases = {"sample": timed("sample", trainer.sample), "update": timed("update", update_by_all)}
    with patch.multiple(trainer, **phases):
        timed("iteration", trainer.iterate)(1)
    rows = {
        "sample, seconds": seconds["sample"],
        "score, seconds": seconds["iteration"] - seconds["sample"] - seconds["update"],
        "update, seconds": seconds["update"],
        "iteration, seconds": seconds["iteration"],
    }
    if on_gpu:
        rows["peak GPU memory, GiB"] = torch.cuda.max_memory_allocated() / GIB
    return rows


def in_turn(costs, ways, repeats):
    """{row: {way: [value of each repeat]}} of costs(way), each way as often first as last."""
    rows = {}
    for repeat in range(repeats + 1):
        order = list(ways)
        if repeat % 2 == 1:
            order.reverse()
        for way in order:
            measured = costs(way)
            if repeat == 0:
                continue  # this one warms up
            for row, value in measured.items():
                columns = rows.setdefault(row, {each: [] for each in ways})
                columns[way].append(value)
    return rows


def print_rows(rows):
    """Print medians, and the ratios to the first column: median (min to max)."""
    for row, columns in rows.items():
        parts = [f"{way} {median(values):.4g}" for way, values in columns.items()]
        line = f"{row}: " + ", ".join(parts)
        first, *others = columns
        for way in others:
            ratios = [a / b for a, b in zip(columns[way], columns[first])]
            line += f"; {way} / {first} {median(ratios):.4f}"
            line += f" ({min(ratios):.4f} to {max(ratios):.4f})"
        print(line)


def flops_of(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / 1e12


def iteration_flops(shapes, allocation, checkpointing=False):
    """TFLOP of an iteration by phase, for one image of 512 pixels with guidance 4.5."""
    tokens = 77 + star.PRESETS["full size"]["max_sequence_length"]
    steps = range(3)
    recorded = [] if allocation == "uniform" else steps
    with torch.device("meta"):
        prompt = (torch.zeros(1, tokens, 4096), torch.zeros(1, 2048))
        latents = torch.zeros(1, 16, 64, 64)
        core = torch.zeros(1, tokens, dtype=torch.bool)
        transformer = diffusers.SD3Transformer2DModel(**TRANSFORMERS[shapes])
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        policy = star.Policy(
            transformer=transformer,
            sigmas=[1 - k / 10 for k in range(11)],
            noise_level=0.7,
            guidance_scale=4.5,
            empty_prompt=prompt,
        )

        def trained_step():
            mean, _ = policy.distribution(latents, 0, prompt)
            mean.sum().backward()

        rollout = flops_of(star.rollout, policy, latents, prompt, steps, None, recorded, core)
        with torch.no_grad():
            reference = len(steps) * flops_of(policy.distribution, latents, 0, prompt)
        update = len(steps) * flops_of(trained_step)
    return {
        "rollout": rollout,
        "reference": reference,
        "update": update,
        "iteration": rollout + reference + update,
    }


def overhead(options):
    """Measure what spatial costs against uniform.

    First the CPU seconds of one thread for iterations of the miniature. Then the operations for one
    image at the real shapes: 10 steps of which 3 are trained, guidance 4.5 and a KL penalty.
    """
    torch.set_num_threads(1)
    args = star.parse_arguments([])
    trainer = star.Trainer(args, star.make_task(args))
    costs = functools.partial(time_iteration, trainer, time.process_time)
    rows = in_turn(costs, ALLOCATIONS, options.repeats)
    for shapes in TRANSFORMERS:
        for checkpointing in [False, True]:
            title = shapes
            if checkpointing:
                title += ", gradient checkpointing"
            for allocation in ALLOCATIONS:
                flops = iteration_flops(shapes, allocation, checkpointing)
                for phase, amount in flops.items():
                    columns = rows.setdefault(f"{title}, {phase}, TFLOP", {})
                    columns[allocation] = [amount]
    print_rows(rows)


def matrix_speed(dtype):
    """TFLOP/s of a large matrix product on this machine."""
    side = 8192 if star.DEVICE == "cuda" else 2048
    matrix = torch.randn(side, side, device=star.DEVICE, dtype=dtype)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix})
    return 2e-12 * side**3 / timer.blocked_autorange().median


def benchmark(options):
    """Time iterations of uniform and spatial in turn on this machine.

    FLOP utilisation is what the method needs, by the time and the speed of a large matrix product:
    for an image T forward passes to sample, S more with a KL penalty, and the work of 3 S to update
    (2 S with guidance, whose unconditional half has no gradient). Options of star.py may follow.
    """
    args = star.parse_arguments(options.more)
    trainer = star.Trainer(args, star.make_task(args))
    costs = functools.partial(time_iteration, trainer, time.perf_counter)
    rows = in_turn(costs, ALLOCATIONS, options.repeats)

    latents = torch.zeros(1, *trainer.shape, device=star.DEVICE)
    velocity = trainer.training_policy.velocity
    with torch.no_grad(), trainer.autocast:
        forward = flops_of(velocity, latents, 0, trainer.empty_prompt)
    speed = matrix_speed(torch.bfloat16 if args.bfloat16 else torch.float32)
    images = args.prompts_per_iteration * args.group_size
    sampled = args.steps
    if trainer.reference:
        sampled += args.stochastic_steps
    updated = args.stochastic_steps * (3 if args.guidance_scale == 1 else 2)
    amounts = {  # by the seconds
        "images per second": ("iteration", images),
        "sample, FLOP utilisation": ("sample", images * sampled * forward / speed),
        "update, FLOP utilisation": ("update", images * updated * forward / speed),
    }
    for title, (phase, amount) in amounts.items():
        rows[title] = {}
        for way, seconds in rows[f"{phase}, seconds"].items():
            rows[title][way] = [amount / each for each in seconds]
    print(f"{images} images; forward pass {forward:.3g} TFLOP, matrix product {speed:.3g} TFLOP/s")
    print_rows(rows)


# ------------------------------------------------------------------------------- Against flow_grpo
class FlowGRPO:
    """star.py's rollout, decode and update, by the functions of a clone of yifan123/flow_grpo."""

    def __init__(self, folder, trainer):
        script = folder / "scripts/train_sd3.py"
        if not script.exists():
            sys.exit(f"--flow-grpo {folder} is no clone of yifan123/flow_grpo")
        sys.path.insert(0, str(folder))
        from flow_grpo.diffusers_patch import sd3_pipeline_with_logprob as module

        # The script cannot be imported without much else. We take a function and the loss of it.
        text = script.read_text()
        function = re.search(r"^def compute_log_prob.*?(?=^def )", text, re.M | re.S)
        loss = re.search(r"^ +ratio = .*?^ +policy_loss = .*?$", text, re.M | re.S)
        exec(function[0], vars(module))
        self.module = module
        self.loss = textwrap.dedent(loss[0])
        self.trainer = trainer

    def rollout(self, policy, noise, prompt, steps, *_):
        context, pooled = prompt
        empty_context, empty_pooled = policy.empty_prompt
        self.images, latents, log_probs = self.module.pipeline_with_logprob(
            self.trainer.pipe,
            latents=noise,
            num_inference_steps=self.trainer.args.steps,
            guidance_scale=policy.guidance_scale,
            prompt_embeds=context,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=empty_context.expand_as(context),
            negative_pooled_prompt_embeds=empty_pooled.expand_as(pooled),
        )
        return star.Rollout(
            prompt=prompt,
            steps=steps,
            latents=latents,
            log_probs=[log_probs[k] for k in steps],
            maps=[],
            reference_means=[],
        )

    def decode(self, pipe, latents):
        return self.images

    def config(self):
        """Their settings, of which these are read."""
        args = self.trainer.args
        return argparse.Namespace(
            sample=argparse.Namespace(
                guidance_scale=args.guidance_scale, noise_level=args.noise_level
            ),
            train=argparse.Namespace(cfg=args.guidance_scale != 1, clip_range=args.clip_range),
        )

    def log_prob(self, batch, k):
        """How likely is step k of a rollout, by the present weights? [B]"""
        pipe = self.trainer.pipe
        context, pooled = batch.prompt
        if self.trainer.args.guidance_scale != 1:
            empty_context, empty_pooled = self.trainer.empty_prompt
            context = torch.cat([empty_context.expand_as(context), context])
            pooled = torch.cat([empty_pooled.expand_as(pooled), pooled])
        sample = {
            "latents": torch.stack(batch.latents[:-1], dim=1),
            "next_latents": torch.stack(batch.latents[1:], dim=1),
            "timesteps": pipe.scheduler.timesteps.expand(len(batch.latents[0]), -1),
        }
        _, log_prob, _, _ = self.module.compute_log_prob(
            pipe.transformer, pipe, sample, k, context, pooled, self.config()
        )
        return log_prob

    def add_gradient(self, batch, advantages):
        """Add the gradient of their loss. Returns the ratios [S, B]."""
        ratios = []
        for j, k in enumerate(batch.steps):
            names = {
                "torch": torch,
                "config": self.config(),
                "sample": {"log_probs": torch.stack(batch.log_probs, dim=1)},
                "j": j,
                "advantages": advantages,
                "log_prob": self.log_prob(batch, k),
            }
            exec(self.loss, names)
            (names["policy_loss"] / len(batch.steps)).backward()
            ratios.append(names["ratio"].detach())
        return torch.stack(ratios)

    def update(self, batches, advantages):
        """One update with one batch."""
        self.add_gradient(batches[0], advantages)
        torch.nn.utils.clip_grad_norm_(self.trainer.transformer.parameters(), max_norm=1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return {}


def gradient_of(model):
    return torch.cat([weight.grad.double().flatten() for weight in model.parameters()])


def compare_last_update(trainer, theirs, updates):
    """Compare the gradients of the last of these updates of a rollout. Returns a sentence."""
    args = trainer.args
    model = trainer.transformer
    args.updates_per_iteration = updates
    args.batch_size = args.prompts_per_iteration * args.group_size // updates
    prompts, batches = trainer.sample(1)
    advantages = torch.linspace(-1, 1, len(prompts))
    with torch.no_grad():  # by the weights that sampled
        last = batches[-1]
        log_probs = [theirs.log_prob(last, k) for k in last.steps]
        last = dataclasses.replace(last, log_probs=log_probs)

    moments = []

    def note(*_):
        weights = copy.deepcopy(model.state_dict())
        moments.append((weights, gradient_of(model)))

    hook = trainer.optimizer.register_step_pre_hook(note)
    trainer.update(batches, advantages)
    hook.remove()
    weights, ours = moments[-1]
    model.load_state_dict(weights)  # those of the last gradient
    ratios = theirs.add_gradient(last, advantages[-args.batch_size :])
    gradient = gradient_of(model)
    trainer.optimizer.zero_grad()
    cosine = F.cosine_similarity(ours, gradient, dim=0)
    norms = ours.norm() / gradient.norm()
    outside = (ratios - 1).abs() > args.clip_range
    return (
        f"update {updates} of {updates}: cosine {cosine:.6f}, norm / theirs {norms:.6f}, ratios "
        f"{ratios.min():.4f} to {ratios.max():.4f}, {outside.float().mean():.0%} out of clip range"
    )


def against_flow_grpo(options):
    """Compare gradients and times with flow_grpo's own functions, on the miniature.

    First the gradient of uniform against theirs, in the first update of a rollout and in the second
    of two, before which the ratios have moved. Then CPU seconds of one thread, in turn: 24 images,
    10 steps of which 3 are trained, guidance 4.5. They decode while they sample.
    """
    torch.set_num_threads(1)
    settings = "--allocation uniform --ema-decay 0 --clip-range 1e-4"  # their clip range
    args = star.parse_arguments(settings.split())
    trainer = star.Trainer(args, star.make_task(args))
    trainer.pipe.set_progress_bar_config(disable=True)
    theirs = FlowGRPO(options.flow_grpo, trainer)
    start = copy.deepcopy(trainer.transformer.state_dict())
    for guidance in [1.0, 1.5, 4.5]:
        args.guidance_scale = guidance
        trainer.training_policy.guidance_scale = guidance
        for updates in [1, 2]:
            trainer.transformer.load_state_dict(start)
            print(f"guidance {guidance}, {compare_last_update(trainer, theirs, updates)}")

    args.updates_per_iteration = 1
    args.batch_size = 24

    def costs(way):
        if way != "flow_grpo":
            return time_iteration(trainer, time.process_time, way)
        with (
            patch.multiple(star, rollout=theirs.rollout, decode=theirs.decode),
            patch.object(trainer, "update", theirs.update),
        ):
            return time_iteration(trainer, time.process_time, "uniform")

    print_rows(in_turn(costs, ["flow_grpo", *ALLOCATIONS], options.repeats))


# -------------------------------------------------------------------------------------------- Main
def main(argv=None):
    parser = argparse.ArgumentParser(description="What training costs.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "memory", help="count memory, without a GPU", description=memory.__doc__
    )
    command.set_defaults(function=memory)
    command.add_argument("--shapes", choices=TRANSFORMERS, default="sd3.5-medium")

    command = commands.add_parser(
        "overhead", help="what allocation adds", description=overhead.__doc__
    )
    command.set_defaults(function=overhead)
    command.add_argument("--repeats", type=star.positive, default=5, help="default: 5")

    command = commands.add_parser(
        "benchmark", help="time iterations on this machine", description=benchmark.__doc__
    )
    command.set_defaults(function=benchmark)
    command.add_argument("--repeats", type=star.positive, default=5, help="default: 5")

    command = commands.add_parser(
        "against-flow-grpo",
        help="compare with flow_grpo's functions",
        description=against_flow_grpo.__doc__,
    )
    command.set_defaults(function=against_flow_grpo)
    command.add_argument("--flow-grpo", type=Path, required=True, help="folder of a clone")
    command.add_argument("--repeats", type=star.positive, default=5, help="default: 5")

    command = commands.add_parser(
        "full-size", help="save a pipeline to benchmark", description=full_size.__doc__
    )
    command.set_defaults(function=full_size)
    command.add_argument("--save", type=Path, required=True, help="a new folder")
    command.add_argument("--no-t5", dest="t5", action="store_false", help="without T5")

    options, options.more = parser.parse_known_args(argv)
    if options.more and options.function not in [memory, benchmark]:
        parser.error(f"unrecognized arguments: {' '.join(options.more)}")
    if options.function is not benchmark:
        star.DEVICE = "cpu"  # also where there is a GPU
    options.function(options)


if __name__ == "__main__":
    main()
