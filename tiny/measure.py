"""What training costs: time and memory.

    python tiny/measure.py benchmark --model stabilityai/stable-diffusion-3.5-medium

times `uniform` and `spatial` on your machine with any options of star.py. `python tiny/measure.py
COMMAND --help` describes a command and its options. This is a tool for Linux.
"""

import argparse
import ast
import copy
import functools
import inspect
import itertools
import json
import statistics
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import build
import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
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
    """Print {row: {column: values}} with the ratios to the first column's values."""
    first, *others = next(iter(rows.values()))
    titles = [first, *others, *(f"{other} / {first}" for other in others)]
    print(f"{'median (least to most)':<32}" + "".join(f"{title:>30}" for title in titles))
    for name, columns in rows.items():
        cells = list(columns.values())
        for other in others:
            cells.append([a / b for a, b in zip(columns[other], columns[first])])
        print(f"{name:<32}" + "".join(f"{spread(cell):>30}" for cell in cells))


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
    policy = trainer.policy(args.steps)
    latents = torch.zeros(1, *trainer.shape, device=args.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), trainer.autocast:
        policy.velocity(latents, 0, trainer.empty_prompt)
    return counter.get_total_flops()


def needed_flops(trainer, forward):
    """Floating-point operations that the method needs in an iteration, by phase."""
    args = trainer.args
    halves = 1 if args.guidance_scale == 1 else 2
    # a backward pass takes twice as long as a forward pass, and only one half has one
    passes = halves + 2 + (halves if trainer.reference else 0)
    images = args.prompts_per_iteration * args.group_size
    steps = dict(rollout=args.steps * halves, update=passes * args.stochastic_steps)
    return {phase: images * count * forward / halves for phase, count in steps.items()}


def benchmark(args):
    """Time whole iterations of uniform and spatial in turn.

    The first iteration of each warms up and does not count. FLOP utilisation is the number of
    floating-point operations that the method needs, divided by the time and by the speed of one
    large matrix product in the same precision. If F is the number of a forward pass, an image needs
    T F for its rollout and 3 S F for its update (2 S F with guidance, whose unconditional half has
    no gradient), and S F more with a KL penalty. What gradient checkpointing computes again does
    not count. All options of star.py may be added.
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
def iteration_flops(shapes, allocation, checkpointing=False):
    """Floating-point operations of an iteration for one image of 512 pixels with guidance 4.5."""
    tokens, flops = 77 + star.FULL_SIZE["max_sequence_length"], {}

    @contextmanager
    def counted(phase):
        with FlopCounterMode(display=False) as counter:
            yield
        flops[phase] = counter.get_total_flops() / 1e12

    with torch.device("meta"):
        prompt, latents = (
            (torch.zeros(1, tokens, 4096), torch.zeros(1, 2048)),
            torch.zeros(1, 16, 64, 64),
        )
        core = torch.zeros(1, tokens, dtype=torch.bool) if allocation == "spatial" else None
        sigmas = [1 - k / 10 for k in range(11)]
        policy = star.Policy(make_part("transformer", shapes), sigmas, 0.7, 4.5, prompt)
        if checkpointing:
            policy.transformer.enable_gradient_checkpointing()
        with counted("rollout"):
            star.rollout(policy, latents, prompt, range(3), core_tokens=core)
        with counted("reference"), torch.no_grad():
            for k in range(3):
                policy.step(latents, k, prompt)
        with counted("update"):
            for k in range(3):
                policy.step(latents, k, prompt)[1].sum().backward()
    return flops | {"iteration": sum(flops.values())}


def overhead(args):
    """Measure what spatial costs against uniform.

    First the CPU seconds of one thread for whole iterations of the miniature. They are steadier
    than the clock where other programs run. Then the floating-point operations of an iteration at
    the real shapes per image, 10 steps of which 3 are trained, with a KL penalty. Uniform and
    spatial do the same in the update.
    """
    torch.set_num_threads(1)
    settings, task = star.parse_arguments(["--device", "cpu", "--no-bfloat16"])
    trainer, seconds = star.Trainer(settings, task), {"uniform": [], "spatial": []}
    trainer.iterate(0)  # warms up
    for repeat, settings.allocation in in_turn(args.repeats):
        begin = time.process_time()
        trainer.iterate(1 + repeat)
        seconds[settings.allocation].append(time.process_time() - begin)
    rows = {"miniature, CPU seconds": seconds}
    for shapes in SHAPES:
        flops = {name: iteration_flops(shapes, name) for name in seconds}
        for phase in flops["uniform"]:
            rows[f"{shapes}, {phase}, TFLOP"] = {name: [flops[name][phase]] for name in flops}
    again = iteration_flops("sd3.5-medium", "spatial", checkpointing=True)["update"]
    print(f"sd3.5-medium, update with gradient checkpointing: {again:.1f} TFLOP")
    print_rows(rows)


# ------------------------------------------------------------------------------- Against flow_grpo
def flow_grpo_functions(folder):
    """pipeline_with_logprob and compute_log_prob of a clone of github.com/yifan123/flow_grpo.

    Its training script imports much that we do not need, so the second is taken out of it.
    """
    sys.path.append(str(folder))
    with naming(f"--flow-grpo {folder}"):
        from flow_grpo.diffusers_patch import sd3_pipeline_with_logprob as theirs

        script = ast.parse((folder / "scripts/train_sd3.py").read_text())
        wanted = [each for each in script.body if getattr(each, "name", "") == "compute_log_prob"]
        scope = dict(vars(theirs))
        exec(compile(ast.Module(wanted, []), "train_sd3.py", "exec"), scope)
    return theirs.pipeline_with_logprob, scope["compute_log_prob"]


def against_flow_grpo(args):
    """Compare gradients and times with flow_grpo's own functions, in one process.

    First the gradient of one rollout of the miniature, uniform against theirs. Then CPU seconds per
    image of one thread, in turn: 10 steps of which 3 are trained, guidance 4.5, and one backward
    pass per step. Sampling includes decoding. First for the miniature, then for a transformer like
    that of SD3.5 Medium, but of width 384, with the miniature's text and VAE.
    """
    theirs = flow_grpo_functions(args.flow_grpo)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = star.load_pipeline(ROOT / "tiny/sd3")
    pipe.set_progress_bar_config(disable=True)
    for guidance in (1.0, 1.5, 4.5):
        side, gradients = Side("uniform", theirs, pipe, 24, guidance), []
        side.sample()
        for side.way in ("flow_grpo", "uniform"):
            pipe.transformer.zero_grad()
            side.update()
            parameters = pipe.transformer.parameters()
            gradients.append(torch.cat([each.grad.double().flatten() for each in parameters]))
        norms = [gradient.norm().item() for gradient in gradients]
        cosine = F.cosine_similarity(*gradients, dim=0).item()
        print(f"guidance {guidance}: cosine {cosine:.6f}, norm / theirs {norms[1] / norms[0]:.6f}")
    narrow = TRANSFORMER | SHAPES["sd3.5-medium"] | dict(pipe.transformer.config)
    narrow |= dict(num_layers=24, dual_attention_layers=tuple(range(13)), num_attention_heads=6)
    narrow |= dict(attention_head_dim=64, caption_projection_dim=384)
    narrow = diffusers.SD3Transformer2DModel.from_config(narrow)
    for name, transformer, batch in (("miniature", pipe.transformer, 24), ("narrow", narrow, 2)):
        pipe.transformer, rows = transformer, {}
        for repeat in range(-1, args.repeats):  # the first warms up
            for way in WAYS[:: 1 if repeat % 2 else -1]:
                side = Side(way, theirs, pipe, batch, 4.5)
                for phase in ("sample", "update"):
                    begin = time.process_time()
                    getattr(side, phase)()
                    seconds = (time.process_time() - begin) / batch
                    columns = rows.setdefault(f"{name}, {phase}", {each: [] for each in WAYS})
                    columns[way] += [seconds] * (repeat >= 0)
        print_rows(rows)


WAYS = ["flow_grpo", "uniform", "spatial"]


class Side:
    """Sampling and update of flow_grpo or of one allocation of star.py."""

    def __init__(self, way, theirs, pipe, batch, guidance):
        self.way, self.theirs, self.pipe, self.guidance = way, theirs, pipe, guidance
        pipe.scheduler.set_timesteps(10)
        prompts = ['a blue wall with a white sign "K7Q"'] * batch
        self.prompt, empty = star.encode(pipe, prompts, 20), star.encode(pipe, [""], 20)
        pairs = list(zip(empty, self.prompt))
        self.both = [torch.cat([each.expand_as(one), one]) for each, one in pairs]
        self.core = torch.zeros(self.prompt[0].shape[:2], dtype=torch.bool)
        self.core[:, 6:9] = True
        self.noise, self.advantages = torch.randn(batch, 8, 16, 16), torch.linspace(-1, 1, batch)
        sigmas = pipe.scheduler.sigmas.tolist()
        self.policy = star.Policy(pipe.transformer, sigmas, 0.7, guidance, empty)

    def sample(self):
        if self.way == "flow_grpo":
            names = ("prompt_embeds", "pooled_prompt_embeds")
            options = dict(zip(names, self.prompt))
            for name, each in zip(names, self.both):
                options[f"negative_{name}"] = each.chunk(2)[0]
            options |= dict(num_inference_steps=10, guidance_scale=self.guidance)
            _, latents, log_probs = self.theirs[0](self.pipe, **options, latents=self.noise)
            self.latents, self.log_probs = torch.stack(latents, 1), torch.stack(log_probs, 1)
            return
        core = self.core if self.way == "spatial" else None
        samples = star.rollout(self.policy, self.noise, self.prompt, range(3), None, core)
        self.latents, self.log_probs, self.maps = samples.latents, samples.log_prob, samples.maps
        star.decode(self.pipe, samples.latents[:, -1])

    def update(self):
        for k in range(3):
            self.flow_grpo_loss(k).backward() if self.way == "flow_grpo" else self.loss(
                k
            ).backward()

    def flow_grpo_loss(self, k):
        sample = dict(latents=self.latents[:, :-1], next_latents=self.latents[:, 1:])
        sample["timesteps"] = self.pipe.scheduler.timesteps.expand(len(self.latents), -1)
        settings = SimpleNamespace(
            train=SimpleNamespace(cfg=self.guidance != 1),
            sample=SimpleNamespace(guidance_scale=self.guidance, noise_level=0.7),
        )
        prompt = self.both if self.guidance != 1 else self.prompt
        inputs = self.pipe.transformer, self.pipe, sample, k, *prompt, settings
        log_prob, old = self.theirs[1](*inputs)[1], self.log_probs[:, k]
        ratio = torch.exp(log_prob - (old if old.dim() == 1 else log_prob.detach()))
        free, bounded = (-self.advantages * each for each in (ratio, ratio.clamp(0.98, 1.02)))
        return torch.maximum(free, bounded).mean()

    def loss(self, k):
        _, mean, std = self.policy.step(self.latents[:, k], k, self.prompt)
        new = star.position_log_prob(self.latents[:, k + 1], mean, std)
        weights = torch.ones_like(new)
        if self.way == "spatial":
            weights = star.allocation_weights(self.maps, (16, 16))[:, k]
        return star.star_loss(new, self.log_probs[:, k], self.advantages, weights, 0.02)[0]


# ------------------------------------------------------------------- Stable Diffusion's real shapes
# As published. The vocabularies are those of CLIP and T5, the tokenizers the miniature's.
# fmt: off
SHAPES = {
    "sd3.5-medium": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm", pos_embed_max_size=384,
    ),
    "sd3-medium": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192,
    ),
    "sd3.5-large": dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
        qk_norm="rms_norm", pos_embed_max_size=192,
    ),
}
TRANSFORMER = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
    joint_attention_dim=4096, pooled_projection_dim=2048,
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


def make_part(name, shapes="sd3.5-medium"):
    """A heavy part of a full-size pipeline, with random weights."""
    if name == "transformer":
        return diffusers.SD3Transformer2DModel(**TRANSFORMER | SHAPES[shapes])
    if name == "vae":
        return diffusers.AutoencoderKL(**VAE)
    if name == "text_encoder":
        return make_clip(768, 12, 12, "quick_gelu")
    if name == "text_encoder_2":
        return make_clip(1280, 32, 20, "gelu")
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


PARTS = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]


def small_parts(t5):
    """The parts of a full-size pipeline that have no weights."""
    tokenizer = build.clip_tokenizer()
    tokenizer.model_max_length = 77
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    small = dict(scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer)
    return small | dict(tokenizer_3=build.t5_tokenizer() if t5 else None)


def full_size(args):
    """Save a pipeline of SD3.5 Medium's shapes with random weights.

    It is for measuring, not for looking at. The weights are bfloat16: 16 GB on the disk, or 6 GB
    with --no-t5.
    """
    torch.manual_seed(0)
    small = small_parts(not args.no_t5)
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
def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and remembers the peak of each phase.

    Tensors that wait on the CPU (`park`) do not count. What is alive at a peak is copied whenever
    the peak has grown by 0.2%: {serial number of a storage: bytes}.
    """

    def __init__(self):
        super().__init__()
        self.serial, self.bytes, self.parked, self.owners = {}, {}, {}, {}
        self.total, self.phase, self.peaks, self.copies = 0, "load", {}, {}
        self.count = itertools.count()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(None, result)
        return result

    def add(self, owner, tensors):
        """Count these tensors. `owner` is the name by which they are listed."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata  # another storage may have it when this one is gone
                if key not in self.serial:
                    self.serial[key] = next(self.count)
                    self.bytes[self.serial[key]] = storage.nbytes()
                    self.total += storage.nbytes()
                    weakref.finalize(storage, self.remove, key).atexit = False
                if owner:
                    self.owners[self.serial[key]] = owner

    def remove(self, key):
        """The storage is freed."""
        self.note_peak()
        number = self.serial.pop(key)
        self.total -= self.bytes.pop(number, 0)
        self.parked.pop(number, None)

    def note_peak(self):
        """Called before memory is freed, which is when it is at its highest."""
        if self.total > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.total
            copied = sum(self.copies.get(self.phase, {}).values())
            if self.total > 1.002 * copied:
                self.copies[self.phase] = dict(self.bytes)

    def park(self, tensors):
        """The tensors move to the CPU."""
        self.note_peak()
        for tensor in tensors:
            number = self.serial[tensor.untyped_storage()._cdata]
            self.parked[number] = self.bytes.pop(number)
            self.total -= self.parked[number]

    def unpark(self, tensors):
        """The tensors move to the device."""
        for tensor in tensors:
            number = self.serial[tensor.untyped_storage()._cdata]
            self.bytes[number] = self.parked.pop(number)
            self.total += self.bytes[number]

    def owned(self, bytes):
        """Sizes in GiB by owner."""
        sizes = defaultdict(float)
        for number, size in bytes.items():
            sizes[self.owners.get(number, "activations and temporary tensors")] += size / GIB
        return sizes

    def start(self, phase):
        self.note_peak()
        self.phase = phase

    @contextmanager
    def during(self, phase):
        before = self.phase
        self.start("load" if before == "load" else phase)
        yield
        self.start(before)


def to_dtype(module, *args):
    """Module.to for fake tensors, which are on no device."""
    dtypes = [each for each in args if isinstance(each, torch.dtype)]
    for tensor in tensors_of(module):
        if dtypes and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[0])
    return module


def copy_fake(tensor, memo):
    """copy.deepcopy of a fake tensor, which would copy the mode, too."""
    copied = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


def float_layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """As autocast does it on a GPU. On a CPU it would stay in bfloat16, which takes less memory."""
    if torch.is_autocast_enabled("cpu"):
        x, weight, bias = (each if each is None else each.float() for each in (x, weight, bias))
    return torch.layer_norm(x, shape, weight, bias, eps)


def count_iteration(settings, task, pipe, live):
    """One iteration of star.py, not the first, on this pipeline while `live` counts."""
    originals = {name: getattr(star, name) for name in ("encode", "rollout", "decode")}
    offloaded = settings.offload

    @contextmanager
    def present(tensors):
        """Tensors that wait on the CPU are on the device within the block."""
        if offloaded:
            live.unpark(tensors)
        yield
        if offloaded:
            live.park(tensors)

    class Trainer(star.Trainer):
        def policy(self, *args):
            with unset_fake_temporarily():  # the sigmas are real numbers
                return super().policy(*args)

        @contextmanager
        def with_weights(self, values):
            with present(values), star.replaced(self.weights, values):
                yield

    def on_device(device, *modules):
        return present([tensor for module in modules for tensor in tensors_of(module)])

    def load_transformer(name, dtype):
        return copy.deepcopy(pipe.transformer).to(dtype)

    def counted(name):
        def call(*args):
            with live.during(name):
                result = originals[name](*args)
            if name == "rollout":
                live.add("rollouts", list(vars(result).values()))
            return result

        return call

    def step(optimizer, args, kwargs):
        live.add("gradients", [weight.grad for weight in trainer.transformer.parameters()])
        live.start("optimizer")

    task.load, task.monitors = lambda device: None, []
    task.reward = lambda images, prompts: list(map(float, range(len(images))))
    pipe.image_processor.postprocess = list
    replaced = {name: counted(name) for name in originals}
    replaced |= dict(on_device=on_device, load_transformer=load_transformer)
    with patch.multiple(star, load_pipeline=lambda *a, **k: pipe, **replaced):
        encoders = [tensor for each in star.text_encoders(pipe) for tensor in tensors_of(each)]
        live.add("text encoders", encoders)
        if offloaded:
            live.park(encoders)
        trainer = Trainer(settings, task)
        live.add("VAE", tensors_of(pipe.vae))
        live.add("weights", trainer.weights)
        live.add("position table", list(trainer.transformer.buffers()))
        for name in ("reference", "average"):
            if tensors := getattr(trainer, name):
                live.add(name, tensors)
                if offloaded:
                    live.park(tensors)
        for group in trainer.optimizer.param_groups:
            group["fused"] = settings.optimizer == "adamw"  # as on a GPU
        for weight in trainer.transformer.parameters():
            weight.grad = torch.zeros_like(weight)
        trainer.optimizer.step()  # creates the state, which is there from the second iteration on
        trainer.optimizer.zero_grad()
        live.add("optimizer's state", [list(s.values()) for s in trainer.optimizer.state.values()])
        live.sizes = live.owned(live.bytes | live.parked)
        live.saved = [tensor.nbytes for tensor in trainer.tensors().values()]
        trainer.optimizer.register_step_pre_hook(step)
        zero_grad = trainer.optimizer.zero_grad
        trainer.optimizer.zero_grad = lambda: (zero_grad(), live.start("update"))
        live.start("update")
        trainer.iterate(1)


def count_fake_iteration(settings, task, make, small):
    """The same for parts make(name) and `small` ones without weights, all of fake tensors."""
    live, parts = LiveBytes(), small | {"text_encoder_3": None}
    text = torch.bfloat16 if settings.bfloat16 else torch.float32
    answers = {  # of tensors that have no content
        "item": lambda tensor: 1,
        "__bool__": lambda tensor: True,
        "__index__": lambda tensor: 0,
        "__deepcopy__": copy_fake,
    }
    replaced = [
        patch.multiple(FakeTensor, **answers),
        patch.object(torch.nn.Module, "to", to_dtype),
        patch.object(F, "layer_norm", float_layer_norm),
    ]
    with FakeTensorMode(), live, replaced[0], replaced[1], replaced[2]:
        for name in PARTS[: 5 if settings.t5 else 4]:
            torch.set_default_dtype(text if name.startswith("text") else torch.float32)
            parts[name] = make(name)
        torch.set_default_dtype(torch.float32)
        count_iteration(settings, task, diffusers.StableDiffusion3Pipeline(**parts), live)
    return live


def memory(args):
    """The peak memory of each phase of an iteration of star.py, without a GPU.

    star.py's own code runs with the real shapes and with fake tensors, which have a shape but no
    content. We count the bytes of all tensors that are alive. Not counted are the models of the
    reward, what CUDA itself takes (about half a GiB), the working space of its kernels, and gaps
    between tensors. All options of star.py may be added.
    """
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            for name in ("transformer", "vae"):
                make_part(name, args.shapes).save_config(Path(folder, name))
        options = ["--model", folder, "--device", "cpu", "--bfloat16"]
        settings, task = star.parse_arguments([*options, *args.more])
    images = settings.prompts_per_iteration * settings.group_size
    counted = min(images, 2 * settings.batch_size * settings.updates_per_iteration)
    fewer = replace(settings, prompts_per_iteration=1, group_size=counted)
    make = functools.partial(make_part, shapes=args.shapes)
    live = count_fake_iteration(fewer, task, make, small_parts(settings.t5))
    print(
        f"{args.shapes}, {settings.height} pixels, {images} images, batches of"
        f" {settings.batch_size}, {settings.optimizer}"
    )
    print_peaks(live, images / counted - 1)
    print_main_memory(live)


def print_main_memory(live):
    """Print what waits in main memory, and what a run leaves on the disk, in GiB."""
    sizes, saved, owned = live.owned(live.parked), live.saved, live.sizes
    parts = [sum(saved[i : i + star.PART]) / GIB for i in range(0, len(saved), star.PART)]
    sizes["largest part of a checkpoint"] = max(parts)
    mapped = sizes.pop("reference", 0)
    loading = owned["weights"] + owned["position table"] + owned["text encoders"]
    listed = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
    print(f"main memory{sum(sizes.values()):6.2f} GiB: {listed}; while loading {loading:.2f}")
    print(f"{'':<10}{mapped:7.2f} GiB more for the reference if its file has another dtype")
    pipeline = loading + owned["VAE"]
    twice = "twice while it is replaced"
    print(f"disk      {sum(parts):7.2f} GiB: a checkpoint ({twice}); pipeline {pipeline:.2f}")


def print_peaks(live, more=0.0):
    """Print the peak of each phase in GiB, and what it consists of.

    `more` is how many times as many rollouts there are besides, which all wait for the update.
    """
    for phase in ("encode", "rollout", "decode", "update", "optimizer"):
        peak = live.peaks[phase]
        sizes = live.owned(live.copies[phase])
        extra = more * sizes["rollouts"]
        sizes["rollouts"] += extra
        largest = sorted(sizes.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {size:.2f}" for name, size in largest if size > 0.005)
        print(f"{phase:<10}{peak / GIB + extra:7.2f} GiB: {parts}")


# -------------------------------------------------------------------------------------------- Main
def make_parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (benchmark, overhead, against_flow_grpo, memory, full_size):
        name, about = function.__name__.replace("_", "-"), inspect.getdoc(function)
        options = dict(help=about.split("\n")[0], description=about, formatter_class=raw)
        command = commands.add_parser(name, allow_abbrev=False, **options)
        command.set_defaults(function=function)
        if function in (benchmark, overhead, against_flow_grpo):
            about = "measured iterations of each (default: 5)"
            command.add_argument("--repeats", type=int, default=5, help=about)
        if function is against_flow_grpo:
            about = "folder of a clone"
            command.add_argument("--flow-grpo", type=Path, required=True, help=about)
        if function is memory:
            about = "whose shapes (default: sd3.5-medium)"
            command.add_argument("--shapes", choices=SHAPES, default="sd3.5-medium", help=about)
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
    if args.more and args.function not in (benchmark, memory):
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
