"""The tasks: what is asked for, which words of the prompt matter, and how good an image is.

`Task` says what a task is. `OCR`, `GenEval` and `PickScore` are those of Flow-GRPO (arXiv
2505.05470, section 4). `make_task` finds what --task names. README shows a task of your own.
"""

import functools
import json
import math
import re
import runpy
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from diffusers.training_utils import offload_models
from PIL import Image

TINY = Path(__file__).parent / "tiny"


class Task:
    """A task needs a `reward`. All else has a default, which a class of your own may replace.

    prompts, heldout_prompts  lists of strings, for training and for evaluation. The options
                              --prompts and --heldout-prompts replace them.
    prompt_files              used where there are none, from tiny/prompts
    scale                     a reward is divided by this where it is mixed with others
    tiny_models, real_models  names of the models that score images of the miniature, or real ones.
                              make_task puts those that are to be used into self.models, for `load`.
    monitors                  other tasks, whose rewards are logged, but not trained
    """

    prompts = None
    heldout_prompts = None
    prompt_files = ("pickscore.txt", "pickscore_heldout.txt")
    scale = 1.0
    tiny_models = ()
    real_models = ()
    monitors = ()

    def reward(self, images, prompts):
        """One number per PIL image: a list, an array or a tensor.

        In training, one call gets all images of an iteration, and those of a prompt are neighbours.
        In evaluation each prompt has one image.
        """

    def core_spans(self, prompt):
        """The (start, end) characters of the words that the reward is about."""
        return content_word_spans(prompt)

    def load(self):
        """Load models, as attributes. They wait in main memory, and move to the GPU to score."""

    def report(self, images, prompts):
        """Further numbers to log, a dict. It is called right after `reward` of the same images."""
        return {}

    def read(self, record):
        """Take what the task needs from a record of a prompt file. ValueError if it is missing."""

    def networks(self):
        """All models among the attributes."""
        return [value for value in vars(self).values() if isinstance(value, torch.nn.Module)]

    def prepare(self):
        """Load the models of this task and of its monitors."""
        for task in [self, *self.monitors]:
            task.load()
            for network in task.networks():
                network.eval().requires_grad_(False)

    @torch.no_grad()
    def checked_reward(self, images, prompts):
        """The reward as float32 [B] on the CPU. It gets copies of images, which it may change."""
        values = self.reward([image.copy() for image in images], prompts)
        try:
            rewards = torch.as_tensor(values, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            rewards = torch.tensor(math.nan)  # which fails the check below
        if rewards.shape != (len(images),) or not rewards.isfinite().all():
            sys.exit(
                f"the reward of {type(self).__name__} must be one finite number for each of "
                f"{len(images)} images, not {str(values)[:200]}"
            )
        return rewards

    def scores(self, images, prompts, device):
        """The checked reward, with the models on this device."""
        with offload_models(*self.networks(), device=device):
            return self.checked_reward(images, prompts)

    def full_report(self, images, prompts, device):
        """The report, and the mean reward of each monitor."""
        report = self.report(images, prompts)
        for monitor in self.monitors:
            scores = monitor.scores(images, prompts, device)
            report[type(monitor).__name__] = scores.mean().item()
        return report


FUNCTION_WORDS = """a an the this that these those some any each every no of in on at by for from to
    into onto with without within over under between through and or but nor so as than if while is
    are was were be been being has have had it its he she they them his her their i you we which who
    whose what where when there here very not""".split()


def content_word_spans(prompt):
    """The (start, end) of every word of the prompt that is not a function word."""
    spans = []
    # Letters and digits, with apostrophes and hyphens between them.
    for word in re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*", prompt):
        if word.group().lower() not in FUNCTION_WORDS:
            spans.append(word.span())
    return spans


def load_checked_model(kind, name, subfolder="", dtype=torch.float32):
    """A model of class `kind`, all of whose weights come from safetensors files and are finite."""
    where = f"{kind.__name__} {name} {subfolder}"
    try:
        # The libraries only warn of weights that do not fit, and draw random ones.
        model, found = kind.from_pretrained(
            name,
            subfolder=subfolder,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the libraries raise many kinds
        sys.exit(f"{where} cannot be loaded; it needs safetensors without a variant: {error}")
    parameters = dict(model.named_parameters())  # the others are buffers, which are computed
    wrong = [weight for weight in found["missing_keys"] if weight in parameters]
    wrong += found["unexpected_keys"]
    wrong += [weight[0] for weight in found["mismatched_keys"]]
    wrong += [weight for weight, value in model.state_dict().items() if not value.isfinite().all()]
    # We never use poolers, and some files hold buffers, too.
    unused = "pooler|position_i|attn_mask|inv_freq"
    wrong = [weight for weight in wrong if not re.search(unused, weight)]
    if wrong:
        sys.exit(
            f"{where}: {len(wrong)} of its weights are missing, unknown, of another shape or not "
            f"finite: {', '.join(wrong[:3])}"
        )
    return model.to(dtype)  # the loader may keep the dtype of the file


def load_processor(name):
    """What prepares a model's inputs."""
    return transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)


# ---------------------------------------------------------------------------------------------- OCR
STRAIGHT = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")


def characters(text):
    """The text without case, spaces and typographic variants: one form of quotes, accents, …"""
    text = unicodedata.normalize("NFKC", text.translate(STRAIGHT))
    return "".join(text.casefold().split())


def edit_distance(a, b):
    """Levenshtein distance: the least number of insertions, deletions and substitutions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous = row
        row = [i]
        for j, y in enumerate(b, start=1):
            deleted_or_inserted = min(previous[j], row[j - 1]) + 1
            replaced = previous[j - 1] + (x != y)
            row.append(min(deleted_or_inserted, replaced))
    return row[-1]


def text_reward(read, target):
    """Flow-GRPO's OCR reward: 1 - min(distance, len) / len. Case and spaces do not count. A text
    that contains the target is correct. Unlike theirs, ours also ignores typographic variants: a
    reader may write one for the other (curly quotes, accents apart from their letter, wide
    letters)."""
    read = characters(read)
    target = characters(target)
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def quoted_span(prompt):
    """[(start, end)] of the first text between straight double quotes, which is more than blanks.
    12" opens no quotation."""
    for match in re.finditer(r'(?<!\d)"([^"]*)"', prompt):
        if match[1].strip():
            return [match.span(1)]
    return []


class OCR(Task):
    """Write the first text between straight double quotes in the prompt. The model reads text."""

    prompt_files = ("ocr.txt", "ocr_heldout.txt")
    tiny_models = (str(TINY / "ocr"),)
    real_models = ("florence-community/Florence-2-large",)

    def read(self, record):
        if not quoted_span(record["prompt"]):
            raise ValueError("it has no text between straight double quotes")

    def core_spans(self, prompt):
        return quoted_span(prompt)

    def load(self):
        (name,) = self.models
        self.reader = load_checked_model(transformers.AutoModelForImageTextToText, name)
        self.processor = load_processor(name)
        self.is_florence = self.reader.config.model_type == "florence2"
        settings = self.reader.generation_config
        if self.is_florence:  # as documented; without the third it can write one word for ever
            settings.update(max_new_tokens=1024, num_beams=3, no_repeat_ngram_size=3)
        elif settings.max_length is None and settings.max_new_tokens is None:
            settings.max_new_tokens = 1024  # transformers would stop after 20

    @torch.inference_mode()
    def transcribe(self, images, batch_size=32):
        texts = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            text = None
            if self.is_florence:  # it must be told what to do
                text = ["<OCR>"] * len(batch)
            inputs = self.processor(images=batch, text=text, return_tensors="pt")
            tokens = self.reader.generate(**inputs.to(self.reader.device, self.reader.dtype))
            texts += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def reward(self, images, prompts):
        rewards = []
        for text, prompt in zip(self.transcribe(images), prompts):
            start, end = quoted_span(prompt)[0]
            rewards.append(text_reward(text, prompt[start:end]))
        return rewards


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
PLURALS = {
    "person": "people",
    "knife": "knives",
    "sheep": "sheep",
    "skis": "skis",
    "scissors": "scissors",
    "mouse": "mice",
    "box": "boxes",
}
COCO = (TINY / "coco.txt").read_text().splitlines()  # as the benchmark spells them
# The benchmark's thresholds.
CONFIDENCE = 0.3
COUNTING_CONFIDENCE = 0.9
MOST_OBJECTS = 16
POSITION_MARGIN = 0.1


@dataclass
class Detection:
    """An object that was found in an image."""

    confidence: float
    box: tuple  # (left, top, right, bottom) in pixels
    mask: torch.Tensor = None  # bool [height, width]


def relations(box, other):
    """The benchmark's relations of `box` to `other`, from their centres' offset, as a set.
    Along each axis the offset is shortened by a tenth of the two boxes' summed width (or height),
    then divided by the length of the whole offset. A relation holds where this exceeds 0.5."""
    left, top, right, bottom = box
    other_left, other_top, other_right, other_bottom = other
    x = (left + right - other_left - other_right) / 2
    y = (top + bottom - other_top - other_bottom) / 2
    width = right - left + other_right - other_left
    height = bottom - top + other_bottom - other_top
    length = math.hypot(x, y) or 1
    found = set()
    if (abs(x) - POSITION_MARGIN * width) / length > 0.5:
        found.add("right of" if x > 0 else "left of")
    if (abs(y) - POSITION_MARGIN * height) / length > 0.5:
        found.add("below" if y > 0 else "above")
    return found


def judge(found, metadata, colours_of):
    """GenEval's verdict on one image (Ghosh et al. 2023), and a graded one in [0, 1]. Returns both:
    (correct, credit).

    Strict: every `include` clause finds at least `count` objects of its class. The `count` most
    confident of them have the colour, if one is asked for, and stand in the `position` to all
    objects of the earlier clause, if one is asked for. No `exclude` clause finds `count` objects.

    Graded, after Flow-GRPO (arXiv 2505.05470, section 4): the mean of all credits of all clauses

        count      max(0, 1 - |found - asked| / asked)
        colour     share of the asked objects that have the colour, 0 where too few are found
        position   1 where the relation holds and the earlier clause is as asked, else 0

    The reward server of flow_grpo has no floor at 0, gives nothing for a colour or position clause
    with more objects than asked, and counts a wrong relation twice.

    found: detections per class, the most confident first. metadata: a line of the benchmark.
    colours_of(objects, name) names the colour of each object."""
    credits = []
    groups = []  # the objects of each clause, [] if they are not as asked
    for clause in metadata["include"]:
        count = clause["count"]
        objects = found.get(clause["class"], [])
        credits.append(max(0.0, 1 - abs(len(objects) - count) / count))
        objects = objects[:count]
        enough = len(objects) == count
        matched = enough
        if "color" in clause:
            right = 0
            if enough:
                right = colours_of(objects, clause["class"]).count(clause["color"])
            credits.append(right / count)
            matched = right == count
        if "position" in clause:
            relation, target = clause["position"]
            placed = enough and all_stand(objects, relation, groups[target])
            credits.append(float(placed))
            matched = matched and placed
        groups.append(objects if matched else [])
    correct = all(groups)
    for clause in metadata.get("exclude", []):
        if len(found.get(clause["class"], [])) >= clause["count"]:
            correct = False
    return correct, sum(credits) / len(credits)


def all_stand(objects, relation, others):
    """Do all objects stand in this relation to all others, of which there are some?"""
    for one in objects:
        for other in others:
            if relation not in relations(one.box, other.box):
                return False
    return len(others) > 0


def plural(name):
    """The plural of a class, of which the last word changes."""
    head, _, last = name.rpartition(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        last += "es"
    else:
        last += "s"
    return f"{head} {last}".strip()


def segmenter_class():
    """Mask2Former. Importing it takes most of a second. It asks for SciPy, which only its training
    loss needs: we answer that all is there."""
    from transformers.models.mask2former import modeling_mask2former as module

    module.requires_backends = lambda *needed: None
    return module.Mask2FormerForUniversalSegmentation


class GenEval(Task):
    """Show the objects of the prompt in number, colour and place (Ghosh et al. 2023). Prompt files
    are like the benchmark's evaluation_metadata.jsonl. The models are a detector and a CLIP."""

    prompt_files = ("geneval.jsonl", "geneval_heldout.jsonl")
    tiny_models = (str(TINY / "detector"), str(TINY / "clip"))
    real_models = (
        "facebook/mask2former-swin-small-coco-instance",
        "openai/clip-vit-large-patch14",
    )

    def __init__(self):
        self.metadata = {}  # of each prompt, its record in the benchmark's format

    def read(self, record):
        if "tag" not in record or "include" not in record:
            raise ValueError("it lacks the fields tag and include of GenEval's metadata")
        self.metadata[record["prompt"]] = record

    def core_spans(self, prompt):
        """The object, colour, number and position words of the prompt's metadata."""
        words = set()
        for clause in self.metadata[prompt]["include"]:
            name = clause["class"]
            benchmark_plural = name + ("es" if name[-1] == "s" else "s")
            words |= {name, plural(name), benchmark_plural}
            # The default, name, is among the words already.
            words.add(NUMBERS.get(clause["count"], name))
            words.add(clause.get("color", name))
            words.add(clause.get("position", [name])[0])
        longest_first = sorted(words, key=len, reverse=True)
        pattern = "|".join(re.escape(word) for word in longest_first)
        return [match.span() for match in re.finditer(rf"\b({pattern})\b", prompt)]

    def load(self):
        detector, clip = self.models
        self.detector = load_checked_model(segmenter_class(), detector)
        self.clip = load_checked_model(transformers.CLIPModel, clip)
        self.clip_processor = load_processor(clip)
        self.labels = list(self.detector.config.id2label.values())
        size = {}
        if len(self.labels) == len(COCO):
            self.labels = COCO  # they differ in spelling only
            size = {"size": {"shortest_edge": 800, "longest_edge": 1333}}  # the benchmark's
        self.detector_processor = transformers.AutoImageProcessor.from_pretrained(
            detector, trust_remote_code=False, **size
        )

    @torch.inference_mode()
    def detect(self, images):
        """Per image and class, at most 16 objects of more than 0.3 confidence, best first."""
        results = []
        batch_size = 4 if self.labels is COCO else 16  # the real detector sees 800 pixels
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = self.detector_processor(images=batch, return_tensors="pt").pixel_values
            output = self.detector(pixels.to(self.detector.device, self.detector.dtype))
            segmentations = self.detector_processor.post_process_instance_segmentation(
                output,
                threshold=CONFIDENCE,
                return_binary_maps=True,
                target_sizes=[(image.height, image.width) for image in batch],
            )
            results += [self.objects_of(each) for each in segmentations]
        return results

    def objects_of(self, segmentation):
        """The detections of one image, per class."""
        found = {}
        segments = list(zip(segmentation["segmentation"], segmentation["segments_info"]))
        segments.sort(key=lambda segment: segment[1]["score"], reverse=True)
        for mask, info in segments:
            objects = found.setdefault(self.labels[info["label_id"]], [])
            if len(objects) < MOST_OBJECTS:
                mask = mask.cpu() > 0
                box = Image.fromarray(mask.numpy()).getbbox()
                objects.append(Detection(info["score"], box, mask))
        return found

    @torch.inference_mode()
    def colours(self, image, objects, name):
        """The colour of each object, cut out on grey: the nearest of the colour prompts by CLIP."""
        grey = Image.new("RGB", image.size, "#999")
        cut = []
        for one in objects:
            mask = Image.fromarray(one.mask.numpy())
            cut.append(Image.composite(image, grey, mask).crop(one.box))
        pixels = self.clip_processor(images=cut, return_tensors="pt").to(self.clip.device)
        similarity = unit(self.clip.get_image_features(**pixels)) @ self.colour_prompts(name).T
        return [COLOURS[index] for index in similarity.argmax(-1).tolist()]

    def colour_prompts(self, name):
        """Per colour, the mean of the three official prompts' directions, [10, D]."""
        texts = []
        for colour in COLOURS:
            texts += [text.format(colour=colour, name=name) for text in COLOUR_PROMPTS]
        inputs = self.clip_processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        features = unit(self.clip.get_text_features(**inputs.to(self.clip.device)))
        return unit(features.view(len(COLOURS), len(COLOUR_PROMPTS), -1).mean(1))

    def reward(self, images, prompts):
        """The graded verdicts. Counting trusts only objects of more than 0.9 confidence."""
        self.verdicts = []
        for image, prompt, found in zip(images, prompts, self.detect(images)):
            metadata = self.metadata[prompt]
            least = COUNTING_CONFIDENCE if metadata["tag"] == "counting" else CONFIDENCE
            for name, objects in found.items():
                found[name] = [one for one in objects if one.confidence > least]
            colours_of = functools.partial(self.colours, image)
            self.verdicts.append(judge(found, metadata, colours_of))
        return [credit for _, credit in self.verdicts]

    def report(self, images, prompts):
        """The benchmark's score: per category the share of correct images, and their mean."""
        correct_by_tag = {}
        for prompt, (correct, _) in zip(prompts, self.verdicts):
            tag = self.metadata[prompt]["tag"]
            correct_by_tag.setdefault(tag, []).append(correct)
        report = {}
        for tag, verdicts in sorted(correct_by_tag.items()):
            report[f"strict {tag}"] = sum(verdicts) / len(verdicts)
        score = sum(report.values()) / len(report)
        missing = [tag for tag in CATEGORIES if tag not in correct_by_tag]
        name = "strict GenEval"
        if missing:
            name += " without " + ", ".join(missing)
        report[name] = score
        return report


def unit(features):
    """Unit vectors [N, D] of features, a tensor or the object in which CLIP returns it."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


# ---------------------------------------------------------------------------------------- PickScore
class PickScore(Task):
    """Please people: a CLIP trained on which of two images people prefer (Kirstain et al. 2023).
    The reward is its logit scale times the cosine of image and prompt, about 20 to 24 for the real
    model. The models are this CLIP and one whose processor is used."""

    tiny_models = (str(TINY / "clip"), str(TINY / "clip"))
    real_models = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    scale = 26.0  # as in Flow-GRPO, so that mixed rewards are of one size

    def load(self):
        clip, processor = self.models
        self.clip = load_checked_model(transformers.CLIPModel, clip)
        self.processor = load_processor(processor)

    @torch.inference_mode()
    def reward(self, images, prompts, batch_size=32):
        rewards = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            inputs = self.processor(
                images=images[part],
                text=prompts[part],
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self.clip.device)
            image_features = unit(self.clip.get_image_features(inputs.pixel_values))
            text_features = unit(
                self.clip.get_text_features(inputs.input_ids, inputs.attention_mask)
            )
            cosines = (image_features * text_features).sum(-1)
            rewards.append(self.clip.logit_scale.exp() * cosines)
        return torch.cat(rewards)


# --------------------------------------------------------------------------------- Mixing, choosing
class Mixture(Task):
    """Several rewards for the same prompts: the weighted mean of reward / scale."""

    def __init__(self, tasks, weights):
        self.tasks = tasks
        self.weights = [weight / sum(weights) for weight in weights]

    def core_spans(self, prompt):
        spans = []
        for task in self.tasks:
            spans += task.core_spans(prompt)
        return spans

    def load(self):
        for task in self.tasks:
            task.load()

    def networks(self):
        networks = []
        for task in self.tasks:
            networks += task.networks()
        return networks

    def reward(self, images, prompts):
        total = 0.0
        self.means = {}
        for task, weight in zip(self.tasks, self.weights):
            rewards = task.checked_reward(images, prompts)
            total = total + weight * rewards / task.scale
            self.means[type(task).__name__] = rewards.mean().item()
        return total

    def report(self, images, prompts):
        return self.means


def read_records(file):
    """The records of a prompt file: one prompt a line (.txt), or JSON lines with a prompt each."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"prompt file {file} cannot be read: {error}")
    records = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        where = f"{file}, line {number}"
        record = {"prompt": line}
        if line[0] in "{[":
            try:
                record = json.loads(line)
                record["prompt"] = record["prompt"].strip()
            except (ValueError, TypeError, KeyError, AttributeError):
                sys.exit(f"{where} must be a JSON object with a prompt, not {line[:200]}")
        elif Path(file).suffix != ".txt" or re.search(r'\t|""|\\"', line):
            sys.exit(
                f"{where} is no plain prompt of a .txt file: {line[:200]}. A prompt file has one "
                "prompt per line, no header, no columns (.txt), or JSON lines with a prompt each"
            )
        record["where"] = where
        records.append(record)
    if not records:
        sys.exit(f"prompt file {file} is empty; it needs one prompt per line")
    return records


def task_class(name):
    """The class behind `ocr`, `geneval`, `pickscore` or FILE.py:CLASS."""
    known = {"ocr": OCR, "geneval": GenEval, "pickscore": PickScore}
    if name in known:
        return known[name]
    file, _, wanted = name.rpartition(":")
    if not file.endswith(".py"):
        sys.exit(f"task {name} is not known; choose ocr, geneval, pickscore or FILE.py:CLASS")
    if not Path(file).is_file():
        sys.exit(f"task {name}: there is no file {file}")
    sys.path.append(str(Path(file).resolve().parent))  # where its helper modules are
    found = runpy.run_path(file).get(wanted)
    if not isinstance(found, type) or not issubclass(found, Task):
        sys.exit(f"task {name}: {wanted} must be a subclass of rewards.Task in {file}")
    return found


def read_prompts(file, own, default):
    """The records of an option's file, else of a task's own prompts, else of a default file."""
    if file is None and own is not None:
        return [{"prompt": prompt, "where": "the prompts of the first task"} for prompt in own]
    return read_records(file or default)


def make_task(args):
    """The task of --task, maybe "ocr:0.7,mine.py:Logo:0.3". All have the first's prompts."""
    tasks = []
    weights = []
    for part in args.task.split(","):
        # NAME or NAME:WEIGHT; a name may have a colon.
        name, weight = re.fullmatch(r"(.*?)(?::([\d.]+))?", part).groups()
        tasks.append(task_class(name)())
        weights.append(float(weight or 1))
    monitors = [task_class(name)() for name in args.monitor.split(",") if name]
    first = tasks[0]
    for task in tasks + monitors:
        task.models = task.real_models if args.full_size else task.tiny_models
    if args.reward_model:
        if len(args.reward_model) != len(first.models):
            sys.exit(f"--reward-model: {type(first).__name__} takes {len(first.models)}")
        first.models = args.reward_model
    prefix = f"{TINY}/prompts/real_" if args.full_size else f"{TINY}/prompts/"
    training = read_prompts(args.prompts, first.prompts, prefix + first.prompt_files[0])
    heldout = read_prompts(
        args.heldout_prompts, first.heldout_prompts, prefix + first.prompt_files[1]
    )
    for task in tasks + monitors:
        for record in training + heldout:
            try:
                task.read(record)
            except ValueError as error:
                sys.exit(
                    f"{type(task).__name__} cannot use {record['where']}: {error}: "
                    f"{record['prompt'][:200]}. Give --prompts and --heldout-prompts that it can"
                )
    task = first if len(tasks) == 1 else Mixture(tasks, weights)
    task.monitors = monitors
    task.prompts = [record["prompt"] for record in training]
    # From all parts of the file, which may be sorted by kind.
    count = min(args.evaluation_prompts, len(heldout))
    task.heldout_prompts = [heldout[i * len(heldout) // count]["prompt"] for i in range(count)]
    if len(task.prompts) < args.prompts_per_iteration:
        sys.exit(
            f"there are {len(task.prompts)} training prompts, fewer than --prompts-per-iteration, "
            f"which is {args.prompts_per_iteration}"
        )
    return task
