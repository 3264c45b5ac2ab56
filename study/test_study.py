"""What must be true of the study, of TRANSPLANT.md and of what only the miniature has."""

import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import diffusers
import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent.parent))
import allocations
import build
import costs

import star
import test_star
from rewards import OCR, UserError, evenly_spaced, make_task, scores
from test_star import clauses, code_block, record_softmax, world

same_random_numbers = test_star.same_random_numbers  # a fixture of all tests


@pytest.mark.parametrize("kind", ["double", "single", "Qwen-Image", "Qwen-Image with padding"])
def test_4_map_of_flux_and_qwen_image(kind, monkeypatch):
    """Against softmax(Q K^T) of the Q and K that enter attention. The output stays the same."""
    B, C, L, h, w = 2, 4, 5, 3, 4
    sizes = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2, in_channels=4 * C)
    sizes |= dict(joint_attention_dim=32, axes_dims_rope=(4, 6, 6))
    inputs = dict(hidden_states=torch.randn(B, h * w, 4 * C), timestep=torch.tensor([0.9, 0.4]))
    inputs |= dict(encoder_hidden_states=torch.randn(B, L, 32))
    if "Qwen" in kind:
        model = diffusers.QwenImageTransformer2DModel(**sizes, out_channels=C)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) if "padding" in kind else None
        inputs |= dict(img_shapes=[[(1, h, w)]] * B, encoder_hidden_states_mask=mask)
    else:
        model = diffusers.FluxTransformer2DModel(
            **sizes, num_single_layers=2, pooled_projection_dim=16
        )
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(B, h, w, "cpu", torch.float32)
        inputs |= dict(pooled_projections=torch.randn(B, 16), txt_ids=torch.zeros(L, 3))
        inputs |= dict(img_ids=ids)
    for name, weight in model.named_parameters():
        if ".attn.norm" in name:  # 1 at first, so that all norms would be equal
            torch.nn.init.uniform_(weight, 0.5, 2)
    core = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]).bool()
    exec(code_block("study/TRANSPLANT.md", "python", "FluxAllocator"), names := {})
    allocator = names["FluxAllocator"](model, core, range(2))
    if kind == "single":
        allocator.attentions = [block.attn for block in model.single_transformer_blocks]
    found = record_softmax(monkeypatch)
    with torch.no_grad():
        plain = model(**inputs).sample
        monkeypatch.undo()
        with allocator:
            assert torch.equal(model(**inputs).sample, plain)
    chosen = found[-2:] if kind == "single" else found[:2]
    expected = test_star.core_share([softmax[:, :, L:, :L] for softmax in chosen], core)
    assert_close(allocator.map(), expected, atol=1e-5, rtol=0)
    assert expected.std(1).min() > 1e-2 and len(allocator.recorded) == 2


def test_flux_latents_are_packed_as_in_the_pipeline():
    B, C, h, w = 2, 4, 3, 4
    latents, mean = torch.randn(2, B, C, 2 * h, 2 * w)
    output, packed_mean = (
        diffusers.FluxPipeline._pack_latents(x, *x.shape) for x in (latents, mean)
    )
    names = dict(F=F, latents=latents, output=output, h=h, w=w)
    exec(code_block("study/TRANSPLANT.md", "python", "pixel_unshuffle"), names)
    assert torch.equal(names["packed"], output) and torch.equal(names["velocity"], latents)
    log_prob = star.position_log_prob(output.mT, packed_mean.mT, torch.full((B, 1, 1), 0.3))
    expected = F.avg_pool2d(star.position_log_prob(latents, mean, 0.3), 2)
    assert_close(log_prob, expected.flatten(1))


def test_statistics_by_hand():
    values, truth = torch.tensor([0.9, 0.2, 0.2, 0.1]), torch.tensor([1, 1, 0, 0]).bool()
    assert allocations.area_under_roc(values, truth) == (1 + 1 + 0.5 + 1) / 4
    run = {"images": [0, 200, 300, 400], "reward": [0.5, 0.7, 0.7, 0.6], "kl all": [0, 2, 3, 5]}
    for goal, images in {0.6: 100, 0.5: 0, 0.7: 200, 0.71: None}.items():
        assert allocations.first([run], "reward", goal, "images") == [pytest.approx(images)]
    assert allocations.first([run], "kl all", 4, "reward") == [pytest.approx(0.65)]
    assert allocations.area(run) == pytest.approx((120 + 70 + 65) / 400)
    values = [4.0, 1, math.inf, 2.5, 7, 3.25]
    draws = sorted(map(statistics.median, itertools.product(values, repeat=6)))
    assert allocations.interval(values) == (draws[1166], draws[45489])  # 2.5% and 97.5% of 6**6
    pairs = [2, 1, None, 3], [1, 2, 1, None]  # two of four pairs have both numbers
    assert allocations.cell(*pairs) == "+0.000 [-1.000, +1.000] 1/2"
    assert allocations.cell(*pairs, ratio=True) == "1.25 [0.50, 2.00] 1/2"


def test_comparison_by_hand(tmp_path, capsys):
    """Straight lines: with half of the KL for the same reward there is twice the reward at a KL."""
    file, made = tmp_path / "runs.jsonl", dict(task="ocr", options="--task ocr", images=[0, 24])
    for (kind, kl), seed in itertools.product(
        {"spatial": 2, "uniform": 4}.items(), range(100, 104)
    ):
        run = dict(kind=kind, rate=4e-4, seed=seed, reward=[0, 0.8 if seed % 2 else 0.4])
        run |= {"kl all": [0, kl], "change all": [0, 3 * kl]}
        file.open("a").write(json.dumps(made | run) + "\n")
    assert allocations.distance_unit(file, "ocr") == 4
    allocations.train("spatial,uniform", "4e-4", runs=file, more=["--task", "ocr"])  # nothing to do
    allocations.compare("ocr", allocations.TUNING_SEEDS, runs=file)
    rows = [line[2:-2].split(" | ")[1:] for line in capsys.readouterr().out.splitlines() if line]
    ends = "0.600 (0.400 to 0.800)"
    assert rows[2] == [ends] + [f"{x}, 4 runs" for x in (0.3, 0.15, 0.3, 0.6)]
    more, twice = "+0.150 [+0.100, +0.200] 4/4", "+0.300 [+0.200, +0.400] 4/4"
    assert rows[3] == [ends, "+0.000 [+0.000, +0.000] 0/4", more, twice, "none gets there"]
    half = "0.50 [0.50, 0.50] "  # seeds 100 and 102 never have the reward 0.6
    assert rows[7] == [half + "4/4", half + "4/4", half + "2/2", half + "4/4"]
    file.open("a").write(json.dumps(made | run | dict(rate=8e-4, options="--task ocr --steps 20")))
    with pytest.raises(UserError, match="needs those of one set of options"):
        allocations.compare("ocr", allocations.TUNING_SEEDS, runs=file)


def test_tables_of_results_are_those_of_the_runs(capsys):
    for task in allocations.STUDY:
        allocations.compare(task, allocations.FRESH_SEEDS, runs=Path("study/runs.jsonl"))

    def tables(text):
        for block in text.split("\n\n"):
            rows = [line[2:-2].split(" | ") for line in block.strip().splitlines()]
            if re.match("distance for|reward; D", rows[0][0].partition(", ")[2] if rows else ""):
                yield rows[0][0], {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}

    made = dict(tables(capsys.readouterr().out))
    shown = dict(tables(Path("study/RESULTS.md").read_text()))
    assert len(made) == 6 and len(shown) == 4
    for title, rows in shown.items():
        for name, row in rows.items():
            assert len(row) >= 5 and row.items() <= made[title][name].items()


def test_distance_from_the_start(tmp_path, monkeypatch):
    """At first there is none. Then each KL is that of the policies, each change of the images."""
    monkeypatch.setattr(star, "Trainer", star.Trainer)  # make_run replaces it
    options = "--task ocr --iterations 1 --evaluation-prompts 8 --monitor= --ema-decay 0".split()
    options += f"--learning-rate 1e-3 --evaluate-every 1 --out {tmp_path / 'run'}".split()
    trainers, init = [], allocations.KindTrainer.__init__
    both = lambda self, *given: (trainers.append(self), init(self, *given))[0]  # noqa: E731
    monkeypatch.setattr(allocations.KindTrainer, "__init__", both)
    run = allocations.make_run(tmp_path / "run", dict(seed=3, kind="spatial"), options)
    (trainer,), names = trainers, ("all", "inside", "outside")
    assert all(run[f"{what} {where}"][0] == 0 for what in ("kl", "change") for where in names)
    assert run["seed"] == 3 and run["images"] == [0, 24] and len(run["reward"]) == 2
    prompts = evenly_spaced(trainer.task.heldout_prompts, 8)
    start, noise = star.load_pipeline("tiny/sd3").transformer, torch.Generator().manual_seed(0)
    latents = torch.randn(8, *trainer.shape, generator=noise)
    *prompt, core = trainer.encode_prompts(prompts)
    policy, old, kl = trainer.policy(10), trainer.policy(10), []
    old.transformer = start
    for k in range(4):
        with torch.no_grad():
            (mean, std), (old_mean, _) = (p.distribution(latents, k, prompt) for p in (policy, old))
            dt = old.sigmas[k + 1] - old.sigmas[k]
            latents = latents + dt * old.velocity(latents, k, prompt)
        kl.append(((mean - old_mean) ** 2 / (2 * std**2)).mean())
    assert run["kl all"][1] == pytest.approx(statistics.mean(map(float, kl)), rel=1e-3)
    images = [trainer.start_images, trainer.generate(prompts)]
    first, second = (torch.tensor(numpy.stack(each)) / 255 for each in images)
    change = (first - second).abs().mean(-1)
    assert run["change all"][1] == pytest.approx(change.mean().item(), rel=1e-4)
    regions = [allocations.true_regions(trainer.task, each) for each in images]
    inside = (regions[0] | regions[1]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert run["change inside"][1] == pytest.approx(change[inside].mean().item(), rel=1e-4)
    assert run["change outside"][1] == pytest.approx(change[~inside].mean().item(), rel=1e-4)
    share = inside.float().mean().item()
    parts = share * run["kl inside"][1] + (1 - share) * run["kl outside"][1]
    assert 0.01 < share < 0.5 and run["kl all"][1] == pytest.approx(parts, rel=1e-3)


def test_gradient_measures_of_known_gradients():
    """A signal of length 2, with noise of deviation 0.1 in 2,000 dimensions."""
    estimates = 0.1 * torch.randn(200, 2000)
    estimates[:, 0] += 2
    variance = 2000 * 0.1**2
    measures = allocations.gradient_measures(estimates @ estimates.T)
    assert measures == pytest.approx((variance, 4 / (4 + variance)), rel=0.03)


def test_shuffled_maps_have_the_same_values_in_other_places():
    maps = torch.arange(64.0).expand(6, 64).reshape(3, 2, 8, 8)
    samples = star.Rollout(None, None, None, None, maps)
    changed = allocations.changed_maps("shuffled", None, None, samples).reshape(6, 64)
    assert torch.equal(changed.sort().values, maps.view(6, 64))
    assert len(changed.unique(dim=0)) == 6  # each map has its own order


def test_words_of_a_prompt_by_their_kind():
    prompt = "a red wall with two boxes left of a red ball"
    ball = {"class": "ball", "count": 1, "color": "red"}
    boxes = {"class": "box", "count": 2, "position": ["left of", 0]}
    found = allocations.words_by_kind(prompt, [ball, boxes])  # the colour is not that of the wall
    both = [(26, 33)], {"ball", "box"}
    assert found == dict(
        object=([(40, 44)], {"ball"}), colour=([(36, 39)], {"ball"}), relation=both
    )
    found = allocations.words_by_kind("two boxes", [{"class": "box", "count": 2}])
    assert found == dict(object=([(4, 9)], {"box"}), number=([(0, 3)], {"box"}))


def test_true_region_is_the_place_of_the_sign():
    hits, (shots, images, _) = 0, world(40, sign_share=1.0)
    for shot, found in zip(shots, allocations.true_regions(OCR(), images)):
        truth, (x, y) = torch.zeros(8, 8).bool(), shot["place"]
        truth[y // 4 : y // 4 + 2, x // 4 : x // 4 + 3] = True
        hits += torch.equal(found, truth)
    assert hits >= 36


def test_live_bytes_by_hand():
    with costs.LiveBytes() as live:
        layer = torch.nn.Linear(9, 10)  # 100 numbers of 4 bytes
        live.phase = "work"
        large = torch.zeros(1000)
        view, other = large[:10], torch.zeros(500)
        del large
        assert live.total == 4 * (100 + 1000 + 500)  # the view keeps all of it
        del view
        live.place(costs.tensors_of(layer), on_device=False)
        assert live.total == 4 * 500
        live.place(costs.tensors_of(layer), on_device=True)
        assert live.total == 4 * (500 + 100) and len(other) == 500
    assert live.peaks["work"] == 4 * (100 + 1000 + 500)


@pytest.mark.parametrize(
    "options", ["--kl-weight 1 --ema-decay 0.5", "--kl-weight 1 --offload", "--optimizer adafactor"]
)
def test_memory_of_a_fake_run_is_that_of_a_real_run(options):
    """At every phase's peak. The fake run has the shapes, but no weights."""
    options += " --prompts-per-iteration 1 --group-size 4 --batch-size 2 --steps 2"
    options += " --stochastic-steps 1 --stochastic-range 0-1 --no-bfloat16 --device cpu"
    settings, task = star.parse_arguments(options.split())
    pipe, real = star.load_pipeline("tiny/sd3"), costs.LiveBytes()

    def make():
        parts = dict(pipe.components)
        for name, part in parts.items():
            if name in ("transformer", "vae"):
                parts[name] = part.from_config(part.config)
            elif name.startswith("text_encoder"):
                parts[name] = type(part)(part.config)
        return diffusers.StableDiffusion3Pipeline(**parts)

    fake, *_ = costs.count_fake_iteration(settings, task, make)
    with real:
        costs.count_iteration(settings, task, pipe, real)
    phases = ("encode", "rollout", "decode", "update", "optimizer")
    assert [fake.peaks[phase] for phase in phases] == pytest.approx(
        [real.peaks[phase] for phase in phases], rel=0.02
    )


def test_what_allocation_adds_to_an_iteration(monkeypatch):
    """In 2 of 8 blocks, at 3 of 10 steps, for the half with the prompt. A trained step takes one
    forward pass for each half and a backward pass, which is as long as two, for one."""
    eight = costs.SHAPES["sd3.5-medium"] | dict(num_layers=8)
    monkeypatch.setitem(costs.SHAPES, "eight blocks", eight)
    image, text, width = 32 * 32, 77 + 128, 24 * 64
    projections = 2 * (2 * image + text) * width**2
    attention = 4 * image * (image + text) * width
    both = [costs.iteration_flops("eight blocks", name) for name in ("uniform", "spatial")]
    uniform, spatial = (flops.pop("rollout") * 1e12 for flops in both)
    assert spatial - uniform == pytest.approx(2 * 3 * (projections + attention))
    assert spatial < 1.01 * uniform
    for flops in both:
        assert flops["update"] * 1e12 == pytest.approx(uniform * 3 * (2 + 2) / (10 * 2), rel=0.01)
        assert flops["reference"] * 1e12 == pytest.approx(uniform * 3 / 10, rel=0.001)


def test_geneval_makes_prompts_from_labels():
    records = build.geneval_prompts(["person", "wine glass", "bus", "apple", "knife"], 500)
    made = {record.pop("prompt").removeprefix("a photo of "): record for record in records}
    tags = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert {record["tag"] for record in records} == tags and len(made) == len(records) > 300
    buses = dict(tag="counting", include=clauses("3 bus"), exclude=clauses("4 bus"))
    assert made["three buses"] == buses
    left = dict(tag="position", include=clauses("1 person, 1 apple left of 0"))
    assert made["an apple left of a person"] == left
    assert {"two people", "four wine glasses", "two knives"} <= made.keys()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_signs_are_counted_by_their_colours(count):
    """Faded and misspelt signs count, objects and walls of the same colours do not."""
    signs = make_task("signs")
    shots, images, prompts = world(200, sign_share=min(count, 1), mistakes=(0.5, 0.5))
    for shot in shots if count == 2 else []:
        free = [place for place in build.PLACES if place[0] != shot["place"][0]]
        colour = re.search(r"(\w+) sign", shot["caption"])[1]
        build.draw_sign(shot["image"], colour, "KLX", *free[0], 1.0)
    right = scores(signs, images, prompts) == count
    assert right.sum() >= 190
    black = Image.new("RGB", (32, 32), build.COLOURS["black"])
    build.draw_object(black, "box", "white", 5, 1)
    assert signs.reward([black], ['a black wall with a white sign "KLX"']) == [0]


def test_detector_and_colours_of_the_world():
    """Classes and counts at both of the benchmark's confidences, masks, and CLIP's colours."""
    (shots, images, _), geneval = world(120), make_task("geneval")
    geneval.load("cpu")
    agree, overlaps, right = [], [], []
    for shot, image, found in zip(shots, images, geneval.detect(images)):
        confidences = [[one.confidence for one in ones] for ones in found.values()]
        assert confidences == [sorted(each, reverse=True) for each in confidences]
        for least in (0.3, 0.9):
            sure = [name for name in found for one in found[name] if one.confidence > least]
            agree.append(sorted(sure) == sorted(name for name, *_ in shot["objects"]))
        for name, colour, *place in shot["objects"]:
            truth, best = numpy.array(build.shape_mask(name, *place)) > 0, 0
            for one in found.get(name, []):
                mask = one.mask.numpy()
                best = max(best, overlap := (truth & mask).sum() / (truth | mask).sum())
                if overlap > 0.3 and len(right) < 120:
                    right.append(geneval.colours(image, [one], name) == [colour])
            overlaps.append(best)
    assert numpy.mean(agree) >= 0.9 and sum(right) >= 114
    assert numpy.mean(overlaps) > 0.5  # masks of 2-pixel squares
    shots, _, _ = world(200, mistakes=(1.0, 1.0))
    shots = [shot for shot in shots if "faded objects" in shot["mistakes"]]
    seen = [found.values() for found in geneval.detect([shot["image"] for shot in shots])]
    faded = sum(len(ones) for found in seen for ones in found)
    assert faded < 0.1 * sum(len(shot["objects"]) for shot in shots) > 1
