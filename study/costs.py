"""What training costs: memory, time and floating-point operations (FLOP).

    python study/costs.py memory --low-memory                        # needs no GPU
    python study/costs.py benchmark --model stabilityai/stable-diffusion-3.5-medium

`python study/costs.py COMMAND --help` describes a command.
"""

import functools
import inspect
import os
import re
import sys
import time
import weakref
from argparse import ArgumentParser, Namespace
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import build

import star
from rewards import UserError, naming, replaced, require, silence_libraries

ALLOCATIONS, GIB = ("uniform", "spatial"), 2**30

# ------------------------------------------------------------------- Stable Diffusion's real shapes
MEDIUM = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
LARGE = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
DUAL = dict(dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
SHAPES = {
    "sd3.5-medium": MEDIUM | DUAL | dict(pos_embed_max_size=384),
    "sd3-medium": MEDIUM | dict(pos_embed_max_size=192),
    "sd3.5-large": LARGE | dict(qk_norm="rms_norm", pos_embed_max_size=192),
}
VAE = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
VAE |= dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16)
VAE |= dict(scaling_factor=1.5305, shift_factor=0.0609)
VAE |= dict(use_quant_conv=False, use_post_quant_conv=False)
T5 = dict(d_model=4096, d_ff=10240, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")


def make_clip(width, layers, activation):
    config = dict(hidden_size=width, intermediate_size=4 * width, projection_dim=width)
    config |= dict(num_attention_heads=width // 64, num_hidden_layers=layers, hidden_act=activation)
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))


def make_pipeline(shapes, t5, bfloat16):
    """A pipeline with random weights: float32, but for the text encoders maybe bfloat16."""
    parts = dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    parts["transformer"] = diffusers.SD3Transformer2DModel(**SHAPES[shapes])
    parts["vae"] = diffusers.AutoencoderKL(**VAE)
    clip = parts["tokenizer"] = parts["tokenizer_2"] = build.clip_tokenizer()
    clip.model_max_length = 77
    parts["tokenizer_3"] = build.t5_tokenizer() if t5 else None
    torch.set_default_dtype(torch.bfloat16 if bfloat16 else torch.float32)
    parts["text_encoder"] = make_clip(768, 12, "quick_gelu")
    parts["text_encoder_2"] = make_clip(1280, 32, "gelu")
    config = transformers.T5Config(**T5)
    parts["text_encoder_3"] = transformers.T5EncoderModel(config).eval() if t5 else None
    torch.set_default_dtype(torch.float32)
    return diffusers.StableDiffusion3Pipeline(**parts)


def full_size(args):
    """Save a pipeline of SD3.5 Medium's shapes with random weights: 16 GB, or 6 with --no-t5."""
    with naming(f"--save {args.save}"):
        args.save.mkdir(parents=True, exist_ok=True)
        require(not any(args.save.iterdir()), f"--save {args.save} is not empty; name a new folder")
        torch.set_default_dtype(torch.bfloat16)  # until make_pipeline sets float32 again
        make_pipeline("sd3.5-medium", args.t5, bfloat16=True).save_pretrained(args.save)


# ------------------------------------------------------------------------------------------ Memory
def tensors_of(*modules):
    modules = filter(None, modules)
    return [each for module in modules for each in (*module.parameters(), *module.buffers())]


def text_tensors(pipe):
    return tensors_of(pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; `peaks` has the largest sum of each phase."""

    def __init__(self):
        super().__init__()
        self.bytes, self.total, self.phase, self.peaks = {}, 0, "load", {}  # bytes by storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_iter(result) if isinstance(each, torch.Tensor)]
        self.place([each for each in tensors if each.untyped_storage()._cdata not in self.bytes])
        self.peaks[self.phase] = max(self.total, self.peaks.get(self.phase, 0))
        return result

    def place(self, tensors, on_device=True):
        """The tensors are on the device, or they wait on the CPU and do not count."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = storage._cdata, storage.nbytes() if on_device else 0
            if key not in self.bytes:  # until the storage is freed, then another may have the key
                weakref.finalize(storage, self.remove, key).atexit = False
            self.total += size - self.bytes.get(key, 0)
            self.bytes[key] = size

    def remove(self, key):
        self.total -= self.bytes.pop(key)


def count_iteration(settings, task, pipe, live):
    """One iteration of star.py, not the first, while `live` counts: its Trainer and Rollouts."""

    @contextmanager
    def present(tensors, weights=()):
        """What waits on the CPU is on the device within the block, in place of these weights."""
        live.place(tensors)
        with replaced(weights, tensors):
            yield
        live.place(tensors, on_device=not settings.offload)

    def counted(function):
        def call(*args):
            live.phase = function.__name__
            result = function(*args)
            live.phase = "update"
            return result

        return call

    task.load, task.monitors = lambda device: None, []
    task.reward = lambda images, prompts: [0.0] * len(images)
    pipe.image_processor.postprocess = lambda images: [None] * len(images)
    changed = {each.__name__: counted(each) for each in (star.encode, star.rollout, star.decode)}
    changed["load_pipeline"] = lambda *_, **options: pipe
    changed["on_device"] = lambda device, *modules: present(tensors_of(*modules))
    changed["replaced"] = lambda weights, values: present(values, weights)
    with patch.multiple(star, **changed):
        live.place(tensors_of(pipe.transformer, pipe.vae))
        trainer = star.Trainer(replace(settings, kl_weight=0.0), task)
        trainer.args, dtype = settings, torch.bfloat16 if settings.bfloat16 else torch.float32
        if settings.kl_weight > 0:  # what star.py reads from the file of the model
            trainer.reference = [weight.data.to(dtype, copy=True) for weight in trainer.weights]
        for each in (trainer.reference, trainer.ema, text_tensors(pipe)):
            live.place(each or [], on_device=not settings.offload)
        trainer.optimizer.param_groups[0]["fused"] = settings.optimizer == "adamw"  # as on a GPU
        for weight in trainer.weights:
            weight.grad = torch.zeros_like(weight)
        trainer.optimizer.step()  # creates the state, which is there from the second iteration on
        trainer.optimizer.zero_grad()
        trainer.optimizer.register_step_pre_hook(lambda *_: setattr(live, "phase", "optimizer"))
        trainer.optimizer.register_step_post_hook(lambda *_: setattr(live, "phase", "update"))
        live.peaks = dict.fromkeys(("encode", "rollout", "decode", "update", "optimizer"), 0)
        prompts, batches = trainer.sample(1)
        trainer.score(prompts, batches)
        trainer.update(1, batches, torch.ones(len(prompts) * settings.group_size))
    return trainer, batches


def float_layer_norm(x, *args):
    """As autocast does it on a GPU. On a CPU it would stay in bfloat16, which takes less memory."""
    return torch.layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, *args)


def count_fake_iteration(settings, task, make):
    """The same for the pipeline of make(), all of fake tensors, which have no content."""
    live = LiveBytes()
    answers = dict(item=lambda _: 1, __bool__=lambda _: True, __index__=lambda _: 0)
    answers["tolist"] = lambda sigmas: [1 - k / len(sigmas) for k in range(len(sigmas))]
    content = patch.multiple(FakeTensor, **answers)
    norm = patch.object(F, "layer_norm", float_layer_norm)
    move = patch.object(torch.nn.Module, "to", lambda module, *_: module)
    with FakeTensorMode(allow_non_fake_inputs=True), live, content, norm, move:
        return live, *count_iteration(settings, task, make(), live)


def memory(args):
    """Count the peak memory of each phase of an iteration of star.py, without a GPU.

    star.py runs with the real shapes and with tensors that have no content, and we count their
    bytes. Not counted are the models of the reward, what CUDA itself takes (about half a GiB), the
    working space of kernels, and gaps between tensors. Options of star.py but --model may follow.
    """
    words = SimpleNamespace(tokenizer=build.clip_tokenizer(), tokenizer_3=build.t5_tokenizer())
    with patch.object(star, "open_pipeline", lambda _: (words, True, range(16, 1025, 16), ())):
        settings, task = star.parse_arguments(["--bfloat16", *args.more, "--device", "cpu"])
    # two batches show the peaks; of the other images we only add what is kept for the update
    images = settings.prompts_per_iteration * settings.group_size
    few = min(images, 2 * settings.batch_size * settings.updates_per_iteration)
    fewer = replace(settings, prompts_per_iteration=1, group_size=few, compile=False)
    make = functools.partial(make_pipeline, args.shapes, settings.t5, settings.bfloat16)
    live, trainer, batches = count_fake_iteration(fewer, task, make)

    def size(tensors):
        storages = [x.untyped_storage() for x in tree_iter(tensors) if isinstance(x, torch.Tensor)]
        return sum({each._cdata: each.nbytes() for each in storages}.values()) / GIB

    others = size([list(vars(batch).values()) for batch in batches]) * (images - few) / few
    pipe, saved = trainer.pipe, list(trainer.tensors().values())
    files = [size(saved[i : i + 100]) for i in range(0, len(saved), 100)]  # as Trainer.save
    text, ema = size(text_tensors(pipe)), size(trainer.ema)
    loaded = size(tensors_of(pipe.transformer)) + text
    rows = {phase: peak / GIB + others * (phase != "encode") for phase, peak in live.peaks.items()}
    rows["main memory while loading"] = loaded
    rows["main memory in training"] = max(files) + (text + ema if settings.offload else 0)
    rows["disk, a checkpoint"] = sum(files)
    rows["disk, the trained pipeline"] = loaded + size(tensors_of(pipe.vae))
    lines = [f"{amount:8.2f}  {name}" for name, amount in rows.items()]
    print(f"{args.shapes}, {settings.height} pixels, {images} images, GiB:", *lines, sep="\n")


# -------------------------------------------------------------------------------------------- Time
def time_iteration(trainer, clock, allocation):
    """What an iteration with this allocation takes: {row of the table: value}."""
    trainer.args.allocation, noted, cuda = allocation, {}, trainer.args.device == "cuda"

    def timed(method):
        def call(*args):
            begin = clock()
            result = method(*args)
            if cuda:
                torch.cuda.synchronize()
                noted["peak GPU memory, GiB"] = torch.cuda.max_memory_allocated() / GIB
            noted[f"{method.__name__}, seconds"] = clock() - begin
            return result

        return call

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    phases = {name: timed(getattr(trainer, name)) for name in ("sample", "score", "update")}
    with patch.multiple(trainer, **phases):
        timed(trainer.iterate)(1)
    return noted


def in_turn(costs, ways, repeats):
    """{row: {way: [value of each repeat]}} of costs(way), each way as often first as last."""
    rows = {}
    for repeat in range(repeats + 1):
        for way in ways[:: -1 if repeat % 2 else 1]:
            for row, value in costs(way).items():
                columns = rows.setdefault(row, {each: [] for each in ways})
                columns[way] += [value] * (repeat > 0)  # the first warms up
    return rows


def print_rows(rows):
    """Print medians, and the ratios to the first column: median (min to max)."""
    for row, columns in rows.items():
        first, *others = columns
        line = ", ".join(f"{way} {median(columns[way]):.4g}" for way in columns)
        for way in others:
            ratios = sorted(a / b for a, b in zip(columns[way], columns[first]))
            line += f"; {way} / {first} {median(ratios):.4f} ({ratios[0]:.4f} to {ratios[-1]:.4f})"
        print(f"{row}: {line}")


def flops_of(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / 1e12


def iteration_flops(shapes, allocation, checkpointing=False):
    """TFLOP of an iteration by phase, for one image of 512 pixels with guidance 4.5."""
    tokens, steps = 77 + star.FULL_SIZE["max_sequence_length"], range(3)
    recorded = steps if allocation == "spatial" else ()
    with torch.device("meta"):
        prompt = (torch.zeros(1, tokens, 4096), torch.zeros(1, 2048))
        latents, core = torch.zeros(1, 16, 64, 64), torch.zeros(1, tokens, dtype=torch.bool)
        transformer = diffusers.SD3Transformer2DModel(**SHAPES[shapes])
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        policy = star.Policy(transformer, [1 - k / 10 for k in range(11)], 0.7, 4.5, prompt)
        step, inputs = (latents, 0, prompt), (steps, None, recorded, core)
        flops = {"rollout": flops_of(star.rollout, policy, latents, prompt, *inputs)}
        flops["reference"] = 3 * flops_of(torch.no_grad()(policy.distribution), *step)
        flops["update"] = 3 * flops_of(lambda: policy.distribution(*step)[0].sum().backward())
    return flops | {"iteration": sum(flops.values())}


def overhead(args):
    """Measure what spatial costs against uniform.

    First the CPU seconds of one thread for iterations of the miniature. Then the operations for one
    image at the real shapes: 10 steps of which 3 are trained, guidance 4.5 and a KL penalty.
    """
    torch.set_num_threads(1)
    trainer = star.Trainer(*star.parse_arguments(["--device", "cpu", "--no-bfloat16"]))
    costs = functools.partial(time_iteration, trainer, time.process_time)
    rows = in_turn(costs, ALLOCATIONS, args.repeats)
    for shapes in SHAPES:
        for again in (False, True):
            flops = {way: iteration_flops(shapes, way, again) for way in ALLOCATIONS}
            for phase in flops["uniform"]:
                title = f"{shapes}{', gradient checkpointing' * again}, {phase}, TFLOP"
                rows[title] = {way: [flops[way][phase]] for way in flops}
    print_rows(rows)


def benchmark(args):
    """Time iterations of uniform and spatial in turn on this machine.

    FLOP utilisation is what the method needs, by the time and the speed of a large matrix product:
    for an image T forward passes to sample, S more with a KL penalty, and the work of 3 S to update
    (2 S with guidance, whose unconditional half has no gradient). Options of star.py may follow.
    """
    trainer = star.Trainer(*star.parse_arguments(args.more))
    settings, cuda = trainer.args, trainer.args.device == "cuda"
    costs = functools.partial(time_iteration, trainer, time.perf_counter)
    rows = in_turn(costs, ALLOCATIONS, args.repeats)
    latents = torch.zeros(1, *trainer.shape, device=settings.device)
    velocity = trainer.policy(settings.steps).velocity
    with torch.no_grad(), trainer.autocast:
        forward = flops_of(velocity, latents, 0, trainer.empty_prompt)
    side, dtype = 8192 if cuda else 2048, torch.bfloat16 if settings.bfloat16 else torch.float32
    matrix = torch.randn(side, side, device=settings.device, dtype=dtype)
    speed = 2e-12 * side**3 / Timer("x @ x", globals={"x": matrix}).blocked_autorange().median
    images, S = settings.prompts_per_iteration * settings.group_size, settings.stochastic_steps
    sampled, unit = settings.steps + (S if trainer.reference else 0), images * forward / speed
    updated = S * (3 if settings.guidance_scale == 1 else 2)
    amounts = dict(iterate=images, sample=unit * sampled, update=unit * updated)
    for phase, amount in amounts.items():
        title = "images per second" if phase == "iterate" else f"{phase}, FLOP utilisation"
        columns = rows[f"{phase}, seconds"].items()
        rows[title] = {way: [amount / each for each in seconds] for way, seconds in columns}
    print(f"{images} images; forward pass {forward:.3g}, matrix product {speed:.3g} TFLOP/s")
    print_rows(rows)


# ------------------------------------------------------------------------------- Against flow_grpo
def flow_grpo(folder, trainer):
    """star.rollout and trainer.update by the functions of a clone of yifan123/flow_grpo."""
    sys.path.insert(0, str(folder))
    with naming(f"--flow-grpo {folder}"):
        from flow_grpo.diffusers_patch import sd3_pipeline_with_logprob as module

        script = (folder / "scripts/train_sd3.py").read_text()  # it imports much else
        [function] = re.findall(r"^def compute_log_prob.*?(?=^def )", script, re.M | re.S)
        exec(function, vars(module))
    pipe, args = trainer.pipe, trainer.args

    def rollout(policy, noise, prompt, steps, *_):
        options = dict(num_inference_steps=args.steps, guidance_scale=args.guidance_scale)
        for name, one, empty in zip(("prompt", "pooled_prompt"), prompt, policy.empty_prompt):
            options |= {f"{name}_embeds": one, f"negative_{name}_embeds": empty.expand_as(one)}
        trainer.images, x, log_prob = module.pipeline_with_logprob(pipe, latents=noise, **options)
        return star.Rollout(prompt, steps, torch.stack(x, 1), torch.stack(log_prob, 1), None)

    def update(iteration, batches, advantages):
        """The gradient of a rollout's first update: all ratios are 1, and nothing is clipped."""
        [batch], prompt = batches, batches[0].prompt
        config = Namespace(sample=args, train=Namespace(cfg=args.guidance_scale != 1))
        if config.train.cfg:
            pairs = zip(trainer.empty_prompt, prompt)
            prompt = [torch.cat([empty.expand_as(one), one]) for empty, one in pairs]
        sample = dict(latents=batch.latents[:, :-1], next_latents=batch.latents[:, 1:])
        sample["timesteps"] = pipe.scheduler.timesteps.expand(len(advantages), -1)
        for k in batch.steps:
            inputs = pipe.transformer, pipe, sample, k, *prompt, config
            log_prob = module.compute_log_prob(*inputs)[1]
            loss = -(advantages * torch.exp(log_prob - log_prob.detach())).mean()
            (loss / len(batch.steps)).backward()
        return {}

    return rollout, update


def against_flow_grpo(args):
    """Compare gradients and times with flow_grpo's own functions, on the miniature.

    First the gradient of one rollout, uniform against theirs. Then CPU seconds of one thread, in
    turn: 24 images, 10 steps of which 3 are trained, guidance 4.5. They decode while they sample.
    """
    torch.set_num_threads(1)
    text = "--device cpu --no-bfloat16 --allocation uniform --ema-decay 0 --max-gradient-norm 1e9"
    trainer = star.Trainer(*star.parse_arguments(text.split()))
    trainer.optimizer = Namespace(step=lambda: None, zero_grad=lambda: None)
    trainer.pipe.set_progress_bar_config(disable=True)
    rollout, update = flow_grpo(args.flow_grpo, trainer)
    for guidance in (1.0, 1.5, 4.5):
        trainer.args.guidance_scale, gradients = guidance, []
        _, batches = trainer.sample(1)
        for method in (update, trainer.update):
            trainer.transformer.zero_grad()
            method(1, batches, torch.linspace(-1, 1, 24))
            gradients.append(torch.cat([each.grad.double().flatten() for each in trainer.weights]))
        cosine = F.cosine_similarity(*gradients, dim=0)
        ratio = gradients[1].norm() / gradients[0].norm()
        print(f"guidance {guidance}: cosine {cosine:.6f}, norm / theirs {ratio:.6f}")

    def costs(way):
        if way in ALLOCATIONS:
            return time_iteration(trainer, time.process_time, way)
        theirs = patch.multiple(star, rollout=rollout, decode=lambda *_: trainer.images)
        with theirs, patch.object(trainer, "update", update):
            return time_iteration(trainer, time.process_time, "uniform")

    print_rows(in_turn(costs, ("flow_grpo", *ALLOCATIONS), args.repeats))


# -------------------------------------------------------------------------------------------- Main
def main(argv=None):
    silence_libraries()
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (memory, overhead, benchmark, against_flow_grpo, full_size):
        name, about = function.__name__.replace("_", "-"), inspect.getdoc(function)
        command = commands.add_parser(name, help=about.split("\n")[0], description=about)
        command.set_defaults(function=function)
        if function in (overhead, benchmark, against_flow_grpo):
            command.add_argument("--repeats", type=int, default=5, help="default: 5")
    commands.choices["memory"].add_argument("--shapes", choices=SHAPES, default="sd3.5-medium")
    commands.choices["against-flow-grpo"].add_argument("--flow-grpo", type=Path, required=True)
    commands.choices["full-size"].add_argument("--save", type=Path, required=True)
    commands.choices["full-size"].add_argument("--no-t5", dest="t5", action="store_false")
    args, args.more = parser.parse_known_args(argv)
    if args.more and args.function not in (memory, benchmark):
        parser.error(f"unrecognized arguments: {' '.join(args.more)}")
    try:
        require(getattr(args, "repeats", 1) > 0, "--repeats must be 1 or more")
        args.function(args)
    except (UserError, torch.OutOfMemoryError) as error:
        sys.exit(f"costs.py: {error}")


if __name__ == "__main__":
    main()
