"""The tasks: what is asked for, which words of the prompt matter, and how good an image is.

First comes what tasks and star.py share: errors, files, and models that move to the device. Then
the tasks, which `star.py` uses through these names only. README shows how to write one.

    prompts, heldout_prompts     lists of strings
    core_spans(prompt)           the (start, end) characters of the words that the reward is about
    load(device)                 loads the models that the reward needs. Those that are attributes
                                 are moved to the device while images are scored
    reward(images, prompts)      one number per PIL image: a list, an array or a tensor
    report(images, prompts)      further numbers to log, a dict; follows a reward of these images
    scale                        a reward is divided by this where it is mixed with others
    monitors                     other tasks whose rewards are logged, but not trained

Constructors take (prompts, heldout_prompts, model, full_size): two files and the names of models,
None for the task's own, and whether a full-size model is trained. They raise UserError.
"""

import functools
import importlib.util
import itertools
import json
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from PIL import Image

TINY = Path(__file__).parent / "tiny"
PARTIAL = ".partial-"  # names of folders in which something is being written


# ------------------------------------------------------------------------------ Errors and loading
class UserError(Exception):
    """A mistake of the user or a file that fails: star.py ends with this one sentence."""


def require(condition, sentence):
    if not condition:
        raise UserError(sentence)


@contextmanager
def naming(subject, weights=False):
    """The one place that turns errors of files and libraries into a sentence about `subject`."""
    subject = f"{subject} (only weights in safetensors format are read)" if weights else subject
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds
        text = str(error).strip().split("\n")[0] or "failed"
        raise UserError(f"{subject}: {text} ({type(error).__name__})") from error


def write(path, save, *content):
    """save(path, *content) to a temporary place, then move it: a kill leaves the old or the new."""
    with naming(f"{path} cannot be written"):
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as side:
            partial = Path(side, path.name)
            save(partial, *content)
            if path.is_dir():
                path.rename(Path(side, "old"))
            partial.replace(path)


@contextmanager
def replaced(weights, values):
    """Other values in place of these weights within the block."""
    own = [weight.data for weight in weights]
    for weight, value in zip(weights, values):
        weight.data = value
    try:
        yield
    finally:
        for weight, value in zip(weights, own):
            weight.data = value


def on_device(device, *modules):
    """Frozen modules on the device within the block. Nothing has to be copied back."""
    weights = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    return replaced(weights, [weight.data.to(device) for weight in weights])


def load_config(kind, name):
    """The configuration of a model of class `kind`. UserError if `name` holds another model."""
    config = load_part(transformers.AutoConfig, name)
    wanted = getattr(kind, "config_class", type(config)).model_type
    require(config.model_type == wanted, f"reward model {name} is not a {wanted} model")
    return config


def load_model(kind, name, device):
    """A frozen model of class `kind`, in float32 on a CPU, where float16 is slow."""
    load_config(kind, name)
    dtype = torch.float32 if device == "cpu" else "auto"
    model = load_part(kind, name, use_safetensors=True, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def load_part(kind, name, **options):
    with naming(f"reward model {name}", weights=True):
        return kind.from_pretrained(name, trust_remote_code=False, **options)


def networks(*tasks):
    """The models that tasks hold as attributes."""
    parts = [part for task in tasks for part in getattr(task, "tasks", [task])]
    values = [value for part in parts for value in vars(part).values()]
    return [value for value in values if isinstance(value, torch.nn.Module)]


def remembered(method):
    """method(self, images, prompts) with its last result: a report follows a reward."""

    @functools.wraps(method)
    def call(self, images, prompts):
        last = getattr(self, "last", None)
        if not last or last[0] is not images or last[1] != prompts:
            last = self.last = images, prompts, method(self, images, prompts)
        return last[2]

    return call


@torch.no_grad()
def scores(task, images, prompts):
    """The rewards of a task as float32 [B] on the CPU."""
    rewards = torch.as_tensor(task.reward(images, prompts), dtype=torch.float32, device="cpu")
    good = rewards.shape == (len(images),) and rewards.isfinite().all()
    wanted = f"must be one finite number for each of {len(images)} images"
    require(good, f"the reward of {type(task).__name__} {wanted}, not {rewards}")
    return rewards


# ----------------------------------------------------------------------------------- Prompts, tasks
def read_lines(file):
    """("FILE, line NUMBER", text) of every line of a file that is not blank."""
    with naming(f"prompt file {file}"):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    lines = [(f"{file}, line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    require(lines, f"prompt file {file} is empty; it needs one prompt per line")
    return lines


def read_records(file):
    """("FILE, line NUMBER", object) of every line of a JSON lines file with prompts."""
    for where, line in read_lines(file):
        with naming(where):
            record = json.loads(line)
        prompt = record.get("prompt") if isinstance(record, dict) else None
        require(prompt and isinstance(prompt, str), f"{where}: the field prompt must be a text")
        yield where, record


def read_prompts(file):
    """("FILE, line NUMBER", prompt) of a file of prompts or, if it ends in .jsonl, of records."""
    if str(file).endswith(".jsonl"):
        return [(where, record["prompt"]) for where, record in read_records(file)]
    return read_lines(file)


def evenly_spaced(prompts, count):
    """At most `count` prompts from all parts of a file, which may be sorted by kind."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


class Task:
    """What tasks share: prompts from two files; all words but function words are core."""

    own_prompts = "pickscore.txt", "pickscore_heldout.txt"  # in tiny/prompts; real_* at full size
    own_models, real_models = (), ()  # that score the miniature's images, and a real model's
    scale = 1.0
    monitors = ()

    def __init__(self, prompts=None, heldout_prompts=None, model=None, full_size=False):
        own = [str(TINY / "prompts" / ("real_" * full_size + name)) for name in self.own_prompts]
        self.files = [prompts or own[0], heldout_prompts or own[1]]
        self.prompts, self.heldout_prompts = map(self.read, self.files)
        self.models = self.choose_models(model, full_size)

    def choose_models(self, model, full_size):
        own = self.real_models if full_size else [str(TINY / name) for name in self.own_models]
        return str(model).split(",") if model else own

    def read(self, file):
        return [prompt for _, prompt in read_prompts(file)]

    def core_spans(self, prompt):
        return content_word_spans(prompt)

    def load(self, device):
        pass

    def report(self, images, prompts):
        return {}


def content_word_spans(prompt):
    """The (start, end) of every word of the prompt that is not a function word."""
    words = re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*", prompt)
    return [word.span() for word in words if word.group().lower() not in FUNCTION_WORDS]


FUNCTION_WORDS = """a an the this that these those some any each every no of in on at by for from to
    into onto with without within over under between through and or but nor so as than if while is
    are was were be been being has have had it its he she they them his her their i you we which who
    whose what where when there here very not""".split()


# ---------------------------------------------------------------------------------------------- OCR
def edit_distance(a, b):
    """Levenshtein distance: the least number of insertions, deletions and substitutions."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def text_reward(read, target):
    """Flow-GRPO's OCR reward (arXiv 2505.05470, section 4): 1 - min(distance, len) / len.

    Case and spaces do not count. A text that contains the target is correct.
    """
    read, target = ("".join(text.lower().split()) for text in (read, target))
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def quoted_span(prompt):
    """The (start, end) of the first text between straight double quotes, in a list; [] if none."""
    # A quotation mark after a digit opens nothing: it means inches.
    quoted = [match for match in re.finditer(r'(?<!\d)"([^"]*)"', prompt) if match[1].strip()]
    return [match.span(1) for match in quoted[:1]]


class OCR(Task):
    """Write the first text between straight double quotes in the prompt. `model` reads text."""

    own_prompts = "ocr.txt", "ocr_heldout.txt"
    own_models, real_models = ("ocr",), ("florence-community/Florence-2-large",)

    def read(self, file):
        lines = read_prompts(file)
        for where, prompt in lines:
            missing = f"{where} has no text between straight double quotes: {prompt}"
            require(self.core_spans(prompt), missing)
        return [prompt for _, prompt in lines]

    def core_spans(self, prompt):
        return quoted_span(prompt)

    def load(self, device):
        self.processor = load_part(transformers.AutoProcessor, self.models[0])
        self.reader = load_model(transformers.AutoModelForImageTextToText, self.models[0], device)
        self.florence = self.reader.config.model_type == "florence2"  # it must be told what to do
        settings = self.reader.generation_config
        if self.florence:  # as documented; without the third it can write one word for ever
            settings.update(max_new_tokens=1024, num_beams=3, no_repeat_ngram_size=3)
        elif settings.max_length is None and settings.max_new_tokens is None:
            settings.max_new_tokens = 1024  # transformers would stop after 20

    @torch.inference_mode()
    def transcribe(self, images, batch_size=32):
        reader, texts = self.reader, []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            instruction = dict(text=["<OCR>"] * len(batch)) if self.florence else {}
            inputs = self.processor(images=batch, **instruction, return_tensors="pt")
            tokens = reader.generate(**inputs.to(reader.device, reader.dtype))
            texts += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def reward(self, images, prompts):
        targets = [prompt[slice(*self.core_spans(prompt)[0])] for prompt in prompts]
        return [text_reward(*pair) for pair in zip(self.transcribe(images), targets)]


# ------------------------------------------------------------------------------------------ GenEval
COLOURS = "red orange yellow green blue purple pink brown black white".split()
CATEGORIES = "single_object two_object counting colors position color_attr".split()
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ["left of", "right of", "above", "below"]
COLOUR_PROMPTS = [
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
]
PLURALS = dict(person="people", knife="knives", sheep="sheep", skis="skis", scissors="scissors")
PLURALS |= dict(mouse="mice", box="boxes")
COCO = """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant
    stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack
    umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat
    baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl
    banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant
    bed dining_table toilet tv laptop computer_mouse tv_remote computer_keyboard cell_phone
    microwave oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier
    toothbrush""".split()
COCO = [name.replace("_", " ") for name in COCO]  # as the benchmark spells them
CONFIDENCE, COUNTING_CONFIDENCE, MOST_OBJECTS, POSITION_MARGIN = 0.3, 0.9, 16, 0.1  # as published


class Detection(NamedTuple):
    """One object that the detector found."""

    confidence: float
    box: tuple  # (left, top, right, bottom) in pixels
    mask: torch.Tensor = None  # bool [height, width]


def relations(box, other):
    """The benchmark's relations of `box` to `other`, from their centres' offset, as a set.

    Along each axis the offset is shortened by a tenth of the summed box sizes, then divided by the
    length of the whole offset. A relation holds where the result exceeds 0.5.
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5 or 1
    found = set()
    for i, (negative, positive) in enumerate([RELATIONS[:2], RELATIONS[2:]]):
        sizes = box[i + 2] - box[i] + other[i + 2] - other[i]
        if (abs(offset[i]) - POSITION_MARGIN * sizes) / length > 0.5:
            found.add(positive if offset[i] > 0 else negative)
    return found


def judge(found, metadata, colours_of):
    """GenEval's verdict on one image (Ghosh et al. 2023), and a graded one: (correct, credit).

    Strict: every `include` clause finds at least `count` objects of its class. The `count` most
    confident of them have the colour, if one is asked for, and stand in the `position` to all
    objects of the earlier clause, if one is asked for. No `exclude` clause finds `count` objects.

    Graded, after Flow-GRPO (arXiv 2505.05470, section 4): the mean of these credits over clauses

        count      max(0, 1 - |found - asked| / asked)
        colour     share of the asked objects that have the colour, 0 where too few are found
        position   1 where the relation holds, else 0

    found: per class, the most confident first. metadata: a line of the benchmark's file.
    colours_of(detections, class) -> list of colour names.
    """
    credits, groups = [], []  # groups: the objects of each clause, [] if they are not as asked
    for clause in metadata["include"]:
        count, name = clause["count"], clause["class"]
        objects = found.get(name, [])
        credits.append(max(0.0, 1 - abs(len(objects) - count) / count))
        objects = objects[:count]
        enough = matched = len(objects) == count
        if "color" in clause:
            right = colours_of(objects, name).count(clause["color"]) if enough else 0
            credits.append(right / count)
            matched = right == count
        if "position" in clause:
            relation, target = clause["position"]
            pairs = [(one.box, other.box) for one in objects for other in groups[target]]
            placed = enough and pairs != [] and all(relation in relations(*pair) for pair in pairs)
            credits.append(float(placed))
            matched = matched and placed
        groups.append(objects if matched else [])
    correct = all(groups)
    for clause in metadata.get("exclude", []):
        correct = correct and len(found.get(clause["class"], [])) < clause["count"]
    return correct, sum(credits) / len(credits)


def plural(name):
    head, _, last = name.rpartition(" ")
    regular = last + ("es" if last.endswith(("s", "sh", "ch", "x")) else "s")
    return f"{head} {PLURALS.get(last, regular)}".strip()


def segmenter_class():
    """Mask2FormerForUniversalSegmentation; only its training loss needs SciPy."""
    # Importing this module takes most of a second, which only GenEval should cost.
    from transformers.models.mask2former import modeling_mask2former as module

    module.requires_backends = lambda *needed: None
    return module.Mask2FormerForUniversalSegmentation


class GenEval(Task):
    """Show the objects of the prompt in number, colour and place (Ghosh et al. 2023).

    Prompt files are like the benchmark's evaluation_metadata.jsonl. `model` is DETECTOR,CLIP.
    """

    own_prompts = "geneval.jsonl", "geneval_heldout.jsonl"
    own_models = ("detector", "clip")
    real_models = ("facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14")

    def __init__(self, prompts=None, heldout_prompts=None, model=None, full_size=False):
        models = self.choose_models(model, full_size)
        require(len(models) == 2, f"--reward-model {model}: geneval needs DETECTOR,CLIP")
        labels = list(load_config(segmenter_class(), models[0]).id2label.values())
        self.coco = len(labels) == len(COCO)  # COCO detectors differ in spelling, not in order
        self.labels = COCO if self.coco else labels
        self.metadata = {}  # of each prompt, its record in the benchmark's format
        super().__init__(prompts, heldout_prompts, ",".join(models), self.coco)

    def read(self, file):
        prompts = []
        for where, record in read_records(file):
            include, exclude = record.get("include"), record.get("exclude", [])
            lists = isinstance(include, list) and include and isinstance(exclude, list)
            require(lists, f"{where}: include and exclude must be lists of clauses")
            require(isinstance(record.get("tag"), str), f"{where}: the field tag must be a text")
            for number, clause in enumerate(include + exclude):
                require(isinstance(clause, dict), f"{where}: clause {clause} must be an object")
                self.check(where, clause, number)
            self.metadata[record["prompt"]] = record
            prompts.append(record["prompt"])
        return prompts

    def check(self, where, clause, number):
        """UserError if a field of a clause is not as the benchmark has it."""
        count, colour = clause.get("count"), clause.get("color", "red")
        whole = type(count) is int and count >= 1
        require(whole, f"{where}: count {count} must be a whole number of 1 or more")
        for value, known in ((clause.get("class"), self.labels), (colour, COLOURS)):
            require(value in known, f"{where}: {value} is not one of {', '.join(known)}")
        position = json.dumps(clause.get("position"))  # as text, where true and 1.0 are not 1
        possible = [json.dumps([relation, i]) for relation in RELATIONS for i in range(number)]
        wanted = f"[one of {', '.join(RELATIONS)}; index of an earlier clause]"
        good = "position" not in clause or position in possible
        require(good, f"{where}: position {position} must be {wanted}")

    def core_spans(self, prompt):
        """The object, colour, number and position words of the prompt's metadata."""
        words = set()
        for clause in self.metadata[prompt]["include"]:
            name = clause["class"]
            benchmark_plural = name + ("es" if name[-1] == "s" else "s")
            words |= {name, plural(name), benchmark_plural, NUMBERS.get(clause["count"])}
            words |= {clause.get("color"), clause.get("position", [None])[0]}
        words = sorted(words - {None}, key=len, reverse=True)
        pattern = "|".join(map(re.escape, words))
        return [match.span() for match in re.finditer(rf"\b({pattern})\b", prompt)]

    def load(self, device):
        detector, clip = self.models
        # the size to which the benchmark scales images
        size = dict(size=dict(shortest_edge=800, longest_edge=1333)) if self.coco else {}
        self.detector_processor = load_part(transformers.AutoImageProcessor, detector, **size)
        self.detector = load_model(segmenter_class(), detector, device)
        self.clip_processor = load_part(transformers.AutoProcessor, clip)
        self.clip = load_model(transformers.CLIPModel, clip, device)

    @torch.inference_mode()
    def detect(self, images):
        """Per image and class, at most 16 objects of more than 0.3 confidence, best first."""
        results, batch_size = [], 4 if self.coco else 16  # the real detector sees 800 pixels
        processor = self.detector_processor
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = processor(images=batch, return_tensors="pt").pixel_values
            output = self.detector(pixels.to(self.detector.device, self.detector.dtype))
            sizes = [image.size[::-1] for image in batch]
            options = dict(threshold=CONFIDENCE, return_binary_maps=True, target_sizes=sizes)
            for one in processor.post_process_instance_segmentation(output, **options):
                found, pairs = {}, zip(one["segmentation"], one["segments_info"])
                for mask, segment in sorted(pairs, key=lambda pair: -pair[1]["score"]):
                    objects = found.setdefault(self.labels[segment["label_id"]], [])
                    if len(objects) < MOST_OBJECTS:
                        mask = mask.cpu() > 0
                        box = Image.fromarray(mask.numpy()).getbbox()
                        objects.append(Detection(segment["score"], box, mask))
                results.append(found)
        return results

    @torch.inference_mode()
    def colours(self, image, objects, name):
        """The colour of each object, cut out on grey: the nearest of the colour prompts by CLIP."""
        grey, cut = Image.new("RGB", image.size, "#999"), []
        for one in objects:
            mask = Image.fromarray(one.mask.numpy())
            cut.append(Image.composite(image, grey, mask).crop(one.box))
        pixels = self.clip_processor(images=cut, return_tensors="pt").to(self.clip.device)
        similarity = unit(self.clip.get_image_features(**pixels)) @ self.colour_prompts(name).T
        return [COLOURS[index] for index in similarity.argmax(-1).tolist()]

    def colour_prompts(self, name):
        """Per colour, the mean of the three official prompts' directions, [10, D]."""
        texts = [text.format(colour=c, name=name) for c in COLOURS for text in COLOUR_PROMPTS]
        inputs = self.clip_processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        features = unit(self.clip.get_text_features(**inputs.to(self.clip.device)))
        return unit(features.view(len(COLOURS), 3, -1).mean(1))

    @remembered
    def verdicts(self, images, prompts):
        """`judge` of each image. Counting trusts only objects of more than 0.9 confidence."""
        verdicts = []
        for image, prompt, found in zip(images, prompts, self.detect(images)):
            metadata = self.metadata[prompt]
            least = COUNTING_CONFIDENCE if metadata["tag"] == "counting" else CONFIDENCE
            for name, objects in found.items():
                found[name] = [one for one in objects if one.confidence > least]
            verdicts.append(judge(found, metadata, functools.partial(self.colours, image)))
        return verdicts

    def reward(self, images, prompts):
        """The graded verdict of each image, in [0, 1]; see `judge`."""
        return [credit for _, credit in self.verdicts(images, prompts)]

    def report(self, images, prompts):
        """The benchmark's score: per category the share of correct images, and their mean."""
        strict = {}
        for prompt, (correct, _) in zip(prompts, self.verdicts(images, prompts)):
            strict.setdefault(self.metadata[prompt]["tag"], []).append(correct)
        shares = {f"strict {tag}": sum(each) / len(each) for tag, each in sorted(strict.items())}
        missing = ", ".join(tag for tag in CATEGORIES if tag not in strict)
        name = f"strict GenEval without {missing}" if missing else "strict GenEval"
        return shares | {name: sum(shares.values()) / len(shares)}


def unit(features):
    """Directions [N, D] of features, a tensor or the object in which CLIP returns them."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


# ---------------------------------------------------------------------------------------- PickScore
class PickScore(Task):
    """Please people: a CLIP trained on which of two images people prefer (Kirstain et al. 2023).

    The reward is its logit scale times the cosine of image and prompt, about 20 to 24 for the real
    model. `model`: the CLIP model, then after a comma the name of its processor if that is another.
    """

    own_models = ("clip",)
    real_models = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    scale = 26.0  # as in Flow-GRPO, so that mixed rewards are of one size

    def load(self, device):
        self.processor = load_part(transformers.AutoProcessor, self.models[-1])
        self.clip = load_model(transformers.CLIPModel, self.models[0], device)

    @torch.inference_mode()
    def reward(self, images, prompts, batch_size=32):
        rewards, clip = [], self.clip
        options = dict(padding=True, truncation=True, return_tensors="pt")
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            inputs = self.processor(images=images[part], text=prompts[part], **options)
            inputs = inputs.to(clip.device)
            images_of = unit(clip.get_image_features(inputs.pixel_values))
            texts_of = unit(clip.get_text_features(inputs.input_ids, inputs.attention_mask))
            rewards.append(clip.logit_scale.exp() * (images_of * texts_of).sum(-1))
        return torch.cat(rewards)


# ------------------------------------------------------------------------------ Choosing and mixing
TASKS = {"ocr": OCR, "geneval": GenEval, "pickscore": PickScore}


class Mixture(Task):
    """Several rewards for the same prompts: the weighted mean of reward / scale."""

    def __init__(self, tasks, weights):
        self.tasks, self.weights = tasks, [weight / sum(weights) for weight in weights]
        self.prompts, self.heldout_prompts = tasks[0].prompts, tasks[0].heldout_prompts

    def core_spans(self, prompt):
        return [span for task in self.tasks for span in task.core_spans(prompt)]

    def load(self, device):
        for task in self.tasks:
            task.load(device)

    @remembered
    def parts(self, images, prompts):
        return [scores(task, images, prompts) for task in self.tasks]

    def reward(self, images, prompts):
        parts = zip(self.weights, self.tasks, self.parts(images, prompts))
        return sum(weight * part / task.scale for weight, task, part in parts)

    def report(self, images, prompts):
        parts = zip(self.tasks, self.parts(images, prompts))
        return {type(task).__name__: part.mean() for task, part in parts}


def task_class(name):
    """The class behind `ocr`, `geneval`, `pickscore` or FILE.py:CLASS."""
    if name in TASKS:
        return TASKS[name]
    if name == "signs":
        name = f"{TINY / 'build.py'}:Signs"
    file, _, wanted = name.rpartition(":")
    choices = "ocr, geneval, pickscore, FILE.py:CLASS or a mix such as ocr:0.7,pickscore:0.3"
    require(file.endswith(".py"), f"task {name} is not known; choose {choices}")
    require(Path(file).is_file(), f"task {name}: there is no file {file}")
    sys.path.append(str(Path(file).resolve().parent))  # its helper modules
    spec = importlib.util.spec_from_file_location(f"task_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look
    spec.loader.exec_module(module)
    task = getattr(module, wanted, None)
    good = isinstance(task, type) and issubclass(task, Task) and hasattr(task, "reward")
    require(good, f"task {name}: {wanted} must be a subclass of rewards.Task with a reward")
    return task


def make_task(text, prompts=None, heldout_prompts=None, models=None, full_size=False, monitors=""):
    """The task that --task describes. Several share the prompts of the first.

    `models`: names separated by semicolons, one entry per task; empty for the task's own.
    `monitors`: names of tasks separated by commas.
    """
    # The part "ocr:0.7" has the name ocr and the weight 0.7.
    parts = [re.fullmatch(r"(?s)(.*?)(?::(-?\d+\.?\d*))?", part) for part in text.split(",")]
    names, weights = [part[1] for part in parts], [float(part[2] or 1) for part in parts]
    models = models.split(";") if models else []
    good = min(weights) >= 0 and sum(weights) > 0
    require(good, f"--task {text}: weights must be 0 or more and their sum above 0")
    fit = f"--reward-model is for {len(models)} tasks, but --task {text} has {len(names)}"
    require(len(models) <= len(names), fit)
    tasks = []
    for name, model in itertools.zip_longest(names, models):
        tasks.append(task_class(name)(prompts, heldout_prompts, model, full_size))
        prompts, heldout_prompts = tasks[0].files
    same = all(task.prompts == tasks[0].prompts for task in tasks)
    require(same, f"--task {text}: give --prompts and --heldout-prompts that all can read")
    task = Mixture(tasks, weights) if len(tasks) > 1 else tasks[0]
    watched = filter(None, monitors.split(","))
    task.monitors = [task_class(name)(*tasks[0].files, full_size=full_size) for name in watched]
    return task
