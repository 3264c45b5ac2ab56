"""What must be true of the counts of study/costs.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import star  # isort: skip  (the first, since it silences the libraries)
import costs
import diffusers
import pytest
import torch

import test_star

same_random_numbers = test_star.same_random_numbers  # a fixture of all tests
GIB = 2**30

SMALL = "--prompts-per-iteration 1 --group-size 4 --batch-size 2 --evaluation-prompts 2"
SMALL += " --steps 2 --stochastic-steps 1 --last-stochastic-step 1 --no-bfloat16"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(star, "DEVICE", "cpu")


def fake_counts(options):
    """(the arguments of star.py, LiveBytes, Trainer, Rollouts) of a fake run of the miniature."""
    trained = diffusers.StableDiffusion3Pipeline.from_pretrained("tiny/sd3")

    def make():
        """The same without weights."""
        parts = dict(trained.components)
        for name, kind in star.PARTS.items():
            config = parts[name].config
            if name.startswith("text_encoder"):
                parts[name] = kind(config)
            else:
                parts[name] = kind.from_config(config)
        return diffusers.StableDiffusion3Pipeline(**parts)

    args = star.parse_arguments(f"{SMALL} {options}".split())
    return args, *costs.count_fake_iteration(args, make)


def test_live_bytes_by_hand():
    with costs.LiveBytes() as live:
        layer = torch.nn.Linear(9, 10)  # 100 numbers of 4 bytes
        live.phase = "work"
        large = torch.zeros(1000)
        view = large[:10]
        other = torch.zeros(500)
        del large
        assert live.total == 4 * (100 + 1000 + 500)  # the view keeps all of it
        del view
        assert live.total == 4 * (100 + 500)
        live.place(costs.tensors_of(layer), on_device=False)
        assert live.total == 4 * 500
        with live.visit(layer, device="cpu"):
            assert live.total == 4 * (500 + 100)
            with live.visit(layer, device="cpu"):  # it is there already
                pass
            assert live.total == 4 * (500 + 100)
        torch.zeros(1)  # does not lower the peak
        assert live.total == 4 * 500
        assert len(other) == 500  # alive until here
    assert live.peaks["work"] == 4 * (100 + 1000 + 500)


@pytest.mark.parametrize(
    "options",
    [
        "--kl-weight 1 --ema-decay 0.5",
        "--optimizer adafactor --gradient-checkpointing",
        "--updates-per-iteration 2 --allocation uniform --guidance-scale 2",
    ],
)
def test_memory_of_a_fake_run_is_that_of_a_real_run(options):
    """At every phase's peak. The fake run has the shapes, but no weights."""
    args, fake, _, _ = fake_counts(options)
    real = costs.LiveBytes()
    with real:
        costs.count_iteration(args, real)
    assert fake.peaks == pytest.approx(real.peaks, rel=0.001)
    assert min(fake.peaks.values()) > 0


def test_what_is_on_the_gpu_by_hand():
    """Frozen models and the EMA are there only where they are used."""
    _, live, trainer, _ = fake_counts("--kl-weight 1 --ema-decay 0.5 --group-size 2 --batch-size 1")
    pipe = trainer.pipe
    weights = costs.size_of(list(trainer.transformer.parameters()))
    always = costs.size_of(costs.tensors_of(pipe.transformer, pipe.vae)) + 2 * weights  # Adam's
    text = costs.size_of(costs.text_tensors(pipe))
    ema = costs.size_of(costs.tensors_of(trainer.ema))
    reference = costs.size_of(costs.tensors_of(trainer.reference))
    expected = {
        "encode": always + text,
        "reference": always + reference,
        "optimizer": always + weights,  # their gradients
        "evaluation, encode": always + text,
        "evaluation": always + ema,
    }
    for phase, size in expected.items():
        assert size < live.peaks[phase] / GIB < size + text, phase


def test_gradient_checkpointing_decodes_one_image_at_a_time():
    """So a batch of four needs less than two images at once."""

    def decoding(options):
        _, live, _, _ = fake_counts(options)
        return live.peaks["decode"]

    of_one = decoding("--batch-size 1")
    more_for_two = decoding("--batch-size 2") - of_one
    assert decoding("--batch-size 4 --gradient-checkpointing") - of_one < more_for_two
    assert decoding("--batch-size 4") - of_one > 2 * more_for_two


def test_images_that_are_not_counted_are_added():
    """With two updates all eight images are counted, with one only four."""
    options = "--group-size 8 --kl-weight 1 --evaluation-prompts 2"
    all_counted = costs.add_other_images(*fake_counts(f"{options} --updates-per-iteration 2"))
    half_counted = costs.add_other_images(*fake_counts(options))
    assert half_counted == pytest.approx(all_counted, rel=0.003)


def test_images_of_an_evaluation_that_are_not_counted_are_added():
    """Against the rollouts of a real evaluation of 6 prompts in 5 steps, of which a batch of two
    prompts and one step are counted."""
    options = "--evaluation-prompts 6 --evaluation-steps 5"
    args, live, trainer, batches = fake_counts(options)
    peaks = costs.add_other_images(args, live, trainer, batches)
    real = star.Trainer(args, costs.NoReward())

    def kept(prompts, steps):
        noise = torch.zeros(prompts, *real.shape)
        policy = real.policy(real.transformer, steps)
        rollouts = real.rollouts(policy, noise, costs.NoReward.prompts * prompts)
        return costs.size_of([vars(rollout) for rollout in rollouts])

    added = peaks["evaluation"] - live.peaks["evaluation"] / GIB
    assert added == pytest.approx(kept(6, 5) - kept(2, 1))


def test_what_allocation_adds_to_an_iteration(monkeypatch):
    """In 2 of 8 blocks, at 3 of 10 steps, for the half with the prompt. A trained step takes one
    forward pass for each half and a backward pass, which is as long as two, for one."""
    shapes = dict(costs.TRANSFORMERS["sd3.5-medium"])
    shapes["num_layers"] = 8
    monkeypatch.setitem(costs.TRANSFORMERS, "eight blocks", shapes)
    image = 32 * 32  # tokens
    text = 77 + 128
    width = 24 * 64
    projections = 2 * (2 * image + text) * width**2
    attention = 4 * image * (image + text) * width
    uniform = costs.iteration_flops("eight blocks", "uniform")
    spatial = costs.iteration_flops("eight blocks", "spatial")
    added = spatial["rollout"] - uniform["rollout"]
    assert added * 1e12 == pytest.approx(2 * 3 * (projections + attention))
    assert added < 0.01 * uniform["rollout"]
    step = uniform["rollout"] / 10
    for flops in [uniform, spatial]:
        assert flops["reference"] == pytest.approx(3 * step, rel=0.001)
        assert flops["update"] == pytest.approx(3 * step * (2 + 2) / 2, rel=0.01)


def test_tables_of_times_by_hand(capsys):
    """The first round is left out, and the order turns."""
    measured = []

    def costs_of(way):
        measured.append(way)
        return {"seconds": len(measured)}

    rows = costs.in_turn(costs_of, ["a", "b"], repeats=3)
    assert measured == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert rows == {"seconds": {"a": [4, 5, 8], "b": [3, 6, 7]}}
    costs.print_rows(rows)
    ratios = "b / a 0.8750 (0.7500 to 1.2000)"
    assert capsys.readouterr().out == f"seconds: a 5, b 6; {ratios}\n"


@pytest.mark.parametrize(
    "command, said",
    [
        ("full-size --save study", "--save study is not empty"),
        ("against-flow-grpo --flow-grpo study", "study is no clone of yifan123/flow_grpo"),
    ],
)
def test_wrong_folders_end_with_a_sentence(command, said):
    with pytest.raises(SystemExit, match=said):
        costs.main(command.split())
