"""What star.py says to bad input: one sentence, before anything is lost or trained in vain."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards
import star
from test_star import PROMPTS, cases, change, clauses, finished, rows, run

assert finished  # a fixture

EARLY = """
    --task chess; --monitor signs,chess | task chess is not known; choose ocr, geneval, pickscore
    --task mine.py:Reward; --task LONG.py:Reward | there is no file
    --task rewards.py:Gone; --task rewards.py:require; --task IN/mine.py:NoReward | be a subclass
    --task IN/exits.py:Reward | exits.py:Reward ends the program: 0 (SystemExit)
    --task ocr:0,pickscore:0; --task ocr:-1,pickscore:2 | weights must be 0 or more and their sum
    --task pickscore,ocr | has no text between straight double quotes
    --task ocr,geneval | ocr.txt, line 1: geneval needs a tag, and lists of
    --task IN/mine.py:Pair; --task IN/mine.py:Gone; --task IN/mine.py:Number | must return (start
    --task IN/mine.py:Beyond; --task IN/mine.py:Backwards | (start, end) pairs inside of the prompt
    --task IN/mine.py:Unheld | training and 0 held-out prompts: too few
    --model no/such/folder; --model nobody/nothing; --model LONG | hf auth login
    --group-size 1 | --group-size is 1; use a number from 2 to 1000000
    --batch-size 7 | 8 images (--prompts-per-iteration x --group-size), not a multiple of 7
    --updates-per-iteration 5 | not a multiple of 20
    --stochastic-range 0-4; --stochastic-range 9-12 | must lie within --steps 4
    --stochastic-range 2-2 | and hold --stochastic-steps 2
    --stochastic-range often | --stochastic-range often must be FIRST-LAST
    --height 30 | --height is 30; this model takes multiples of 4 up to 32
    --reward-model tiny/ocr;tiny/clip | is for 2 tasks
    --task ocr,pickscore --reward-model tiny/ocr,no/model | OCR takes [1] models; semi
    --out IN/full | holds a run: use --resume or another --out
    --model IN/odd; --model IN/empty | --model
    --task signs --reward-model tiny/ocr; --reward-model tiny/ocr, | models
    --task pickscore --reward-model tiny/clip,tiny/clip,tiny/clip | PickScore takes [1, 2] models
    --prompts nowhere.txt; --prompts tiny; --prompts IN/pipe | does not exist, or cannot be read
    --prompts LONG | does not exist, or cannot be read twice
    --prompts /dev/fd/0; --heldout-prompts /dev/null | does not exist, or cannot be read twice
    --heldout-prompts IN/latin.txt | prompt file
    --prompts IN/empty.txt | empty.txt is empty; it needs one prompt per line
    --prompts IN/unquoted.txt | line 3 has no text between straight double quotes: a ball
    --prompts IN/broken.JSONL; --prompts IN/list.json | line 1 must be a JSON object with a prompt
    --prompts-per-iteration 9999 --batch-size 9999 | held-out prompts: too few
    --task geneval --prompts IN/unquoted.txt | line 1
    --task geneval --prompts IN/two.jsonl | line 2: another record has this prompt
    --task geneval --reward-model tiny/detector | GenEval takes [2] models; semi
    --task geneval --reward-model no/detector,tiny/clip | reward model no/detector
    --task geneval --reward-model tiny/clip,tiny/clip | must be one of ['LABEL_0', 'LABEL_1']
    --prompts IN/long.txt | 2 of 3 prompts have no core words within the token limit; change them
    --resume; --out IN/lost --resume; --out IN/dangling --resume | no checkpoint: use another --out
    --out IN/run; --out IN/lost | holds a run: use --resume or another --out
    --out IN/run --resume --lam 1 | was run with other settings: {'lam': 0.5}
    --out IN/run --resume --prompts IN/other.txt | other settings: {'checksum of prompts
    --out IN/run --resume --model IN/similar | other settings: {'checksum of prompts
    --out IN/damaged --resume | damaged/checkpoint/3: Expecting value
    --out IN/old --resume | old/checkpoint/3: 'settings' is missing (KeyError)
    --out IN/empty.txt/run; --out LONG | --out
"""
LATE = """
    --out IN/run --resume | run/checkpoint/3/0.safetensors is damaged
    --out IN/part --resume | checkpoint/3: [Errno 2] No such file or directory
    --out IN/flipped --resume | flipped/checkpoint/3/200.safetensors is damaged
    --out IN/edited --resume | edited/checkpoint/3/run.json is damaged
    --model IN/black | images are not finite: lower --learning-rate or mend --model
    --reward-model tiny/clip | AutoModelForImageTextToText tiny/clip
    --reward-model IN/cut; --reward-model IN/unsafe; --model IN/unsafe | (only weights in safetens
    --task pickscore --reward-model tiny/ocr | CLIPModel tiny/ocr
    --task pickscore --reward-model tiny/clip,IN/wordless | a tokenizer lacks files
    --task pickscore --reward-model IN/wordless | a tokenizer lacks files
    --task pickscore --reward-model tiny/clip,tiny/ocr | reward models ['tiny/clip'
    --task pickscore --reward-model tiny/clip,IN/larger | reward models ['tiny/clip'
    --reward-model IN/illiterate | illiterate
    --task IN/mine.py:Leaves | task Leaves ends the program: 0 (SystemExit)
    --task IN/mine.py:Silent; --task IN/mine.py:Wordy | .report must be a dict of numbers, not
"""
RANGES = """noise-level inf, noise-level 0, learning-rate inf, learning-rate nan, learning-rate -1,
    guidance-scale nan, max-gradient-norm nan, clip-range 0, advantage-clip 0, kl-weight -1,
    ema-decay 1, lam 2, seed 20250131120000, iterations 0, evaluate-every 0, save-every -1,
    batch-size 0, evaluation-prompts -5, max-sequence-length 0, height 64, height -32, height 0"""
BROKEN = """
    count    | [0, 17, true, 2.0, "2", null]   | count VALUE must be one of [1, 2, 3,
    class    | ["dragon", null, ["ball"]]      | class VALUE must be one of ['ball',
    color    | ["mauve", 5]                    | color VALUE must be one of ['red', 'orange',
    position | [["near", 0], ["above", 1], ["above", -1]] | must be one of [['left of', 0],
    position | ["above", ["above", true], ["above"]] | must be one of [['left of', 0],
    colour   | ["red"]                         | a clause has no field colour here
    include  | [[], null, {}, "ball", [3]]     | geneval needs a tag, and lists of clauses
    exclude  | [{}, null, "ball"]              | geneval needs a tag, and lists of clauses
    exclude  | [[{"class": "ball"}]]           | count None must be one of
    exclude  | [[{"class": "ball", "count": 2, "color": "red"}]] | a clause has no field color here
    excludes | [[]]                            | geneval needs a tag, and lists of clauses
    tag      | [null, 5]                       | geneval needs a tag, and lists of clauses
    prompt   | ["", " ", null, 5]              | must be a JSON object with a prompt
"""
EARLY = [[each, says] for many, says in rows(EARLY) for each in many.split("; ")]
EARLY += [[f"--{each.strip()}", f"--{each.split()[0]} is "] for each in RANGES.split(",")]
BROKEN = [[f, v, said] for f, values, said in rows(BROKEN) for v in json.loads(values)]
BROKEN = [[field, value, said.replace("VALUE", repr(value))] for field, value, said in BROKEN]
EARLY += [[f"--task geneval --prompts IN/{i}.jsonl", says] for i, (_, _, says) in enumerate(BROKEN)]
LATE = [[each, says] for many, says in rows(LATE) for each in many.split("; ")]
LATE += [["--device cuda", "reward models"]] * (not torch.cuda.is_available())
MINE = """
import rewards
class NoReward(rewards.Task): pass
class Own(rewards.Task):
    reward = lambda self, images, prompts: [0.5 * i for i in range(len(images))]
class Pair(Own): core_spans = lambda self, prompt: (0, 3)
class Gone(Own): core_spans = lambda self, prompt: None
class Number(Own): core_spans = lambda self, prompt: [3]
class Beyond(Own): core_spans = lambda self, prompt: [(0, 999)]
class Backwards(Own): core_spans = lambda self, prompt: [(3, 0)]
class Leaves(Own): load = lambda self, device: exit(0)
class Silent(Own): report = lambda self, images, prompts: None
class Wordy(Own): report = lambda self, images, prompts: {"style": "fine"}
class Unheld(Own):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.heldout_prompts = []
"""


@pytest.fixture(scope="session")
def inputs(finished, tmp_path_factory):
    """A folder of files with mistakes in them."""
    folder, far = tmp_path_factory.mktemp("inputs"), "a wall " * 30 + 'with a sign "K7Q"'
    ball = dict(tag="a", prompt="a ball", include=clauses("1 ball"))
    texts = {
        "mine.py": MINE,
        "exits.py": "import sys\nsys.exit(0)",
        "empty.txt": "\n \n",
        "latin.txt": 'a café "B"',
        "unquoted.txt": 'a "B"\n\na ball\na box\n',
        "long.txt": f"{far}\n{far} here\n{PROMPTS[0]}",
        "other.txt": "\n".join(PROMPTS),
        "broken.JSONL": 'a sign "K7Q"',
        "list.json": '[\n"a ball"\n]',
        "two.jsonl": json.dumps(ball) + "\n" + json.dumps(ball | dict(include=clauses("2 ball"))),
        "lost/metrics.jsonl": "",
        "dangling/metrics.jsonl": "",
        "full/pipeline/mine": "",
        "empty/model_index.json": "[]",
        "damaged/checkpoint/3/run.json": "",
        "old/checkpoint/3/run.json": "{}",
    }
    for i, (field, value, _) in enumerate(BROKEN):
        record = dict(tag="a", prompt="a ball", include=clauses("1 ball, 1 ball"), exclude=[])
        part = record if field in record or field == "excludes" else record["include"][1]
        part[field] = value
        texts[f"{i}.jsonl"] = json.dumps(record)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="latin-1")
    os.mkfifo(folder / "pipe")
    (folder / "dangling/checkpoint").symlink_to("nowhere")
    for name in ("run", "part", "flipped", "edited"):
        shutil.copytree(finished, folder / name)
    (folder / "run/checkpoint/3/0.safetensors").write_text("not tensors")
    (folder / "part/checkpoint/3/200.safetensors").unlink()
    with open(folder / "flipped/checkpoint/3/200.safetensors", "r+b") as file:
        file.seek(-999, 2)
        file.write(bytes(255 - byte for byte in file.read(1)))
    text = folder / "edited/checkpoint/3/run.json"
    text.write_text(text.read_text().replace('"images": 8', '"images": 9'))
    copies = "clip wordless, clip larger, ocr illiterate, ocr cut, ocr unsafe, sd3 unsafe"
    for source, name in map(str.split, f"{copies}, sd3 similar, sd3 odd, sd3 black".split(",")):
        shutil.copytree(f"tiny/{source}", folder / name, dirs_exist_ok=True)
    for name in ("wordless", "illiterate"):
        (folder / name / "tokenizer.json").unlink()
    file = folder / "larger/processor_config.json"
    file.write_text(file.read_text().replace("32", "48"))
    change(folder / "similar/vae/config.json", scaling_factor=0.9)
    change(folder / "odd/vae/config.json", block_out_channels=None)
    change(folder / "black/vae/config.json", scaling_factor=0.0)
    os.truncate(folder / "cut/model.safetensors", 99)
    for part in (".", "transformer", "text_encoder"):
        for file in (folder / "unsafe" / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".bin"))
    return folder


def says(text):
    """A context in which star.py ends with one sentence that has this text."""
    return pytest.raises(SystemExit, match=rf"^star.py: .*{re.escape(text)}.*\Z")


@pytest.mark.parametrize("arguments, said", EARLY + LATE)
def test_bad_input_is_one_sentence(arguments, said, inputs, tmp_path, monkeypatch):
    """Before anything is loaded, if that is possible, and without files that stay behind."""
    early, out = [arguments, said] in EARLY, tmp_path / "run"
    if early:
        monkeypatch.setattr(star, "Trainer", None)
    with says(said):
        run(out, *arguments.replace("IN", str(inputs)).replace("LONG", "x" * 300).split())
    assert not out.exists() or not early and not list(out.rglob("*.png"))
    assert (inputs / "run/checkpoint/3/0.safetensors").read_text() == "not tensors"


FAULTS = dict(  # of the tensors of a file
    less=lambda tensors, name: tensors.pop(name),
    more=lambda tensors, name: tensors.update(extra=tensors[name].clone()),
    prefix=lambda tensors, name: tensors.update(module=tensors.pop(name)),
    shape=lambda tensors, name: tensors.update({name: torch.zeros(3, 3, 3)}),
    nan=lambda tensors, name: tensors[name].view(-1)[-1:].fill_(math.nan),
    infinite=lambda tensors, name: tensors[name].view(-1)[:1].fill_(math.inf),
)


@pytest.mark.parametrize("fault", FAULTS)
@cases("""
    task      | source   | part                                | weight
    ocr       | sd3      | transformer/diffusion_pytorch_model | proj_out.bias
    ocr       | sd3      | vae/diffusion_pytorch_model         | decoder.conv_in.weight
    ocr       | sd3      | text_encoder/model                  | text_projection.weight
    ocr       | sd3      | text_encoder_3/model                | encoder.final_layer_norm.weight
    ocr       | ocr      | model                           | decoder.model.decoder.layers.0.fc1.bias
    pickscore | clip     | model                               | logit_scale
    geneval   | detector | model                               | class_predictor.weight
""")
def test_weights_that_do_not_fit(task, source, part, weight, fault, tmp_path):
    """The libraries would replace missing ones by random numbers, with no more than a warning."""
    folder = shutil.copytree(f"tiny/{source}", tmp_path / source)
    file = folder / f"{part}.safetensors"
    FAULTS[fault](tensors := load_file(file), weight)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    option = "--model" if source == "sd3" else "--reward-model"
    models = f"{folder},tiny/clip" if source == "detector" else f"{folder}"
    name = "extra" if fault == "more" else weight
    with says(f"weights are missing, unknown, of another shape or not finite: {name}"):
        run(tmp_path / "run", "--task", task, option, models)


@cases("""
    file        | fields                                          | said
    model_index | {"scheduler": ["diffusers", "DDIMScheduler"]}   | its scheduler is DDIMScheduler
    model_index | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]} | its scheduler is UniP
    model_index | {"transformer": ["diffusers", "FluxTransformer2DModel"]} | its transformer is Flu
    model_index | {"tokenizer": ["transformers", "BertTokenizer"]} | but must be CLIPTokenizer
    model_index | {"vae": ["diffusers", "AutoencoderTiny"]}       | but must be AutoencoderKL
    model_index | {"vae": null}                                   | its vae is None
    model_index | {"text_encoder_2": [null, null]}                | its text_encoder_2 is None
    model_index | {"text_encoder_3": [null, null], "tokenizer_3": [null, null]} | use --no-t5
    scheduler/scheduler_config | {"use_dynamic_shifting": true}   | --model
    scheduler/scheduler_config | {"shift": 0}                     | sigmas do not fall from 1: [nan
    scheduler/scheduler_config | {"shift": null}                  | --model
    scheduler/scheduler_config | {"invert_sigmas": true}          | sigmas do not fall from 1: [0.
    vae/config                 | {"shift_factor": null}           | parts do not fit together
    tokenizer/tokenizer_config | {"model_max_length": 77}         | parts do not fit together
    tokenizer/tokenizer_config | {"model_max_length": 1e30}       | a tokenizer lacks files
    tokenizer/tokenizer        | GONE                             | a tokenizer lacks files
    tokenizer_3/tokenizer      | GONE                             | a tokenizer lacks files
    tokenizer                  | GONE                             | --model
    text_encoder/model         | GONE                             | sd3 text_encoder (only weights
    transformer/config         | {"pooled_projection_dim": 9}     | of another shape
    text_encoder/config        | {"num_hidden_layers": 1}         | unknown
""")
def test_models_that_cannot_be_trained(file, fields, said, tmp_path):
    folder = shutil.copytree("tiny/sd3", tmp_path / "sd3")
    if fields == "GONE":
        for path in folder.glob(f"{file}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        change(folder / f"{file}.json", **json.loads(fields))
    with says(said):
        run(tmp_path / "run", "--model", str(folder))
    assert not list(tmp_path.glob("run/*.*"))


def test_files_in_the_way_stay(tmp_path):
    """A file in place of a folder and a folder in place of a file; the run goes on without them."""
    run(tmp_path, "--iterations", "1")
    shutil.rmtree(tmp_path / "pipeline")
    (tmp_path / "pipeline").write_text("mine")
    with says("/pipeline cannot be written"):
        run(tmp_path, "--resume")
    (tmp_path / "pipeline").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl/mine").mkdir(parents=True)
    with says("/metrics.jsonl cannot be written"):
        run(tmp_path, "--resume")
    assert (tmp_path / "metrics.jsonl/mine").exists() and (tmp_path / "pipeline").is_dir()


def test_a_run_that_diverges_ends(tmp_path):
    with says(
        "images are not finite: lower --learning-rate or mend --model; --resume goes on from"
    ):
        run(tmp_path, "--weight-decay", "1000000", "--iterations", "9")


def test_core_spans_may_be_an_iterator():
    task = rewards.Task()
    task.core_spans = lambda prompt: iter([(0, 3)])
    assert rewards.core_spans(task, PROMPTS) == [[(0, 3)], [(0, 3)]]
