"""The tasks: what is asked for, which words of the prompt matter, and how good an image is.

First come errors, files and models, for star.py too. Tasks, of which README has one, have

    prompts, heldout_prompts     lists of strings
    core_spans(prompt)           the (start, end) characters of the words that the reward is about
    load(device)                 loads its models; attributes move to the device when they score
    reward(images, prompts)      one number per PIL image: a list, an array or a tensor
    report(images, prompts)      further numbers to log, a dict; follows a reward of these images
    scale                        a reward is divided by this where it is mixed with others
    monitors                     other tasks whose rewards are logged, but not trained

Constructors take two prompt files and models (None: the task's own), and if images are full-size.
"""

import functools
import importlib.util
import json
import math
import os.path
import re
import sys
import tempfile
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

TINY, PARTIALS = Path(__file__).parent / "tiny", ".star-partial-*"  # of what is being written
MODEL = os.path.relpath(TINY / "sd3")  # the miniature, named from the current folder


# ------------------------------------------------------------------------------ Errors and loading
class UserError(Exception):
    """A mistake of the user or a file that fails: star.py ends with this one sentence."""


def require(condition, sentence):
    if not condition:
        raise UserError(sentence)


def silence_libraries():
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@contextmanager
def naming(subject, kinds=Exception):
    """The one place that turns errors of files and libraries into a sentence about `subject`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except kinds as error:  # the libraries raise many
        text = f"{error} is missing" if isinstance(error, KeyError) else str(error) or "it fails"
        raise UserError(f"{subject}: {one_line(text)} ({type(error).__name__})") from error


def one_line(value):
    return " ".join(str(value)[:1000].split())[:300]


def write(path, save, *content, new=False):
    """save(path, *content) to a temporary place, then move it: a kill leaves the old or the new.
    A folder that is there keeps files that are not ours; with `new` none may be there."""
    with naming(f"{path} cannot be written"):
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIALS[:-1], dir=path.parent) as side:
            partial = Path(side, path.name)
            save(partial, *content)
            if not (partial.is_dir() and path.is_dir()):
                return partial.replace(path)
            require(not new, f"{path} exists: another process writes to this folder")
            *files, index = sorted(partial.rglob("*.*"), key=lambda file: -len(file.parts))
            (path / index.name).unlink(missing_ok=True)  # a kill must leave nothing that loads
            for file in (*files, index):
                place = path / file.relative_to(partial)
                place.parent.mkdir(exist_ok=True)
                file.replace(place)


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


def load_judge(kind, name, device):
    """A frozen reward model, in float32 on a CPU, where float16 is slow."""
    dtype = torch.float32 if device == "cpu" else "auto"
    model = load_model(kind, name, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval().requires_grad_(False)


def load_model(kind, name, subfolder="", **options):
    """A model of class `kind`, all of whose weights come from the file and are finite."""
    where = f"{kind.__name__} {name} {subfolder}".strip()
    options |= dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    with naming(f"{where} (only weights in safetensors format are read)"):
        # the libraries only warn of weights that do not fit, and make random ones
        model, found = kind.from_pretrained(name, subfolder=subfolder, **options)
        weights, trained = model.state_dict().items(), dict(model.named_parameters())
        wrong = [name for name in found["missing_keys"] if name in trained]  # buffers are computed
        wrong += [*found["unexpected_keys"], *(name for name, *_ in found["mismatched_keys"])]
        wrong += [name for name, weight in weights if not weight.isfinite().all()]
    # poolers are never used, and some files have buffers
    wrong = [name for name in wrong if not re.search("pooler|position_i|attn_mask|inv_freq", name)]
    fault = f"{len(wrong)} of its weights are missing, unknown, of another shape or not finite"
    require(not wrong, f"{where}: {fault}: {', '.join(wrong[:3])}")
    return model


def load_part(kind, name, **options):
    with naming(f"reward model {name}"):
        part = kind.from_pretrained(name, trust_remote_code=False, **options)
    check_tokenizers(f"reward model {name}", math.inf, getattr(part, "tokenizer", None))
    return part


def check_tokenizers(name, limit, *tokenizers):
    """UserError for one without words or a limit, which the libraries make if files are missing."""
    for each in filter(None, tokenizers):
        words = len(each) - len(each.all_special_tokens)
        require(words > 9 and each.model_max_length <= limit, f"{name}: a tokenizer lacks files")


def networks(*tasks):
    """The models that tasks hold as attributes."""
    parts = [part for task in tasks for part in getattr(task, "tasks", [task])]
    return [x for part in parts for x in vars(part).values() if isinstance(x, torch.nn.Module)]


def exits(task):
    return naming(f"task {type(task).__name__} ends the program", SystemExit)


def load(task, device, home):
    """Load a task's models and try them: some may not fit together. Then they wait at home."""
    known = type(task) in TASKS.values()  # an exception of the user's own class keeps its traceback
    with exits(task), naming(f"reward models {task.models}") if known else nullcontext():
        task.load(device)
        if known:
            scores(task, [Image.new("RGB", (64, 64), "white")], task.prompts[:1])
    for network in networks(task):
        network.to(home)


@torch.no_grad()
def scores(task, images, prompts, device=None):
    """The rewards of a task as float32 [B] on the CPU. Its models move to the device, if given."""
    with exits(task), on_device(device, *networks(task)) if device else nullcontext():
        values, name = task.reward(images, prompts), type(task).__name__
    wanted = f"the reward of {name} must be one finite number for each of {len(images)} images"
    with naming(wrong := f"{wanted}, not {one_line(values)}"):
        rewards = torch.as_tensor(values, dtype=torch.float32, device="cpu")
        require(rewards.shape == (len(images),) and rewards.isfinite().all(), wrong)
    return rewards


def evaluate(task, images, prompts, device):
    """(rewards, report) of images; the report includes what monitors say."""
    with exits(task), on_device(device, *networks(task)), torch.no_grad():
        rewards, found = scores(task, images, prompts), task.report(images, prompts)
    with naming(f"{type(task).__name__}.report must be a dict of numbers, not {one_line(found)}"):
        report = {name: float(value) for name, value in found.items()}
    for monitor in task.monitors:
        report[type(monitor).__name__] = scores(monitor, images, prompts, device).mean().item()
    return rewards, report


def core_spans(task, prompts):
    """The (start, end) characters of the core words of each prompt."""
    spans, wanted = [], f"core_spans of {type(task).__name__} must return (start, end) pairs"
    for prompt in prompts:
        found = task.core_spans(prompt)
        with naming(wrong := f"{wanted} inside of the prompt, not {one_line(found)}: {prompt}"):
            spans.append([(start, end) for start, end in found])
            require(all(0 <= start < end <= len(prompt) for start, end in spans[-1]), wrong)
    return spans


# ----------------------------------------------------------------------------------- Prompts, tasks
def read_records(file):
    """("FILE, line NUMBER", record with a prompt) of every line that is not blank. A line is a
    prompt or, if the file is named or begins like JSON, an object."""
    require(os.path.isfile(file), f"prompt file {file} does not exist, or cannot be read twice")
    with naming(f"prompt file {file}"):
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    lines = [(f"{file}, line {n}", line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    require(lines, f"prompt file {file} is empty; it needs one prompt per line")
    is_json = Path(file).suffix.lower()[:5] == ".json" or lines[0][1].startswith(("{", "["))
    for where, line in lines:
        with naming(wrong := f"{where} must be a JSON object with a prompt, not {one_line(line)}"):
            record = json.loads(line) if is_json else {"prompt": line}
            require(record["prompt"].strip(), wrong)
        yield where, record


def evenly_spaced(prompts, count):
    """At most `count` prompts from all parts of a file, which may be sorted by kind."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


class Task:
    """What tasks share: prompts from two files; all words but function words are core."""

    own_prompts = "pickscore.txt", "pickscore_heldout.txt"  # in tiny/prompts; real_* at full size
    own_models, real_models = (), ()  # that score the miniature's images, and a real model's
    scale, monitors = 1.0, ()

    def __init__(self, prompts=None, heldout_prompts=None, model=None, full_size=False):
        own = self.real_models if full_size else [str(TINY / name) for name in self.own_models]
        self.models = str(model).split(",") if model else own
        numbers = sorted({len(own), max(len(own), len(self.real_models))})
        takes = f"{type(self).__name__} takes {numbers} models; semicolons separate those of tasks"
        require(len(self.models) in numbers, f"--reward-model {model}: {takes}")
        kind = "real_" * self.for_real_images(full_size)
        own = [str(TINY / "prompts" / (kind + name)) for name in self.own_prompts]
        self.files = [prompts or own[0], heldout_prompts or own[1]]
        self.prompts, self.heldout_prompts = map(self.read, self.files)

    def for_real_images(self, full_size):
        return full_size

    def read(self, file):
        return [record["prompt"] for _, record in read_records(file)]

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
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def text_reward(read, target):
    """Flow-GRPO's OCR reward (arXiv 2505.05470, section 4): 1 - min(distance, len) / len.
    Case and spaces do not count. A text that contains the target is correct."""
    read, target = ("".join(text.lower().split()) for text in (read, target))
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def quoted_span(prompt):
    """[(start, end)] of the first text between straight double quotes; 12" opens no quotation."""
    quoted = [match for match in re.finditer(r'(?<!\d)"([^"]*)"', prompt) if match[1].strip()]
    return [match.span(1) for match in quoted[:1]]


class OCR(Task):
    """Write the first text between straight double quotes in the prompt. `model` reads text."""

    own_prompts = "ocr.txt", "ocr_heldout.txt"
    own_models, real_models = ("ocr",), ("florence-community/Florence-2-large",)

    def read(self, file):
        for where, record in read_records(file):
            missing = f"{where} has no text between straight double quotes: {record['prompt']}"
            require(quoted_span(record["prompt"]), missing)
        return super().read(file)

    core_spans = staticmethod(quoted_span)

    def load(self, device):
        self.processor = load_part(transformers.AutoProcessor, self.models[0])
        self.reader = load_judge(transformers.AutoModelForImageTextToText, self.models[0], device)
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
COLOUR_PROMPTS = "a photo of a {colour} {name}", "a photo of a {colour}-colored {name}"
COLOUR_PROMPTS += ("a photo of a {colour} object",)
PLURALS = dict(person="people", knife="knives", sheep="sheep", skis="skis", scissors="scissors")
PLURALS |= dict(mouse="mice", box="boxes")
COCO = (TINY / "coco.txt").read_text().splitlines()  # as the benchmark spells them
CONFIDENCE, COUNTING_CONFIDENCE, MOST_OBJECTS, POSITION_MARGIN = 0.3, 0.9, 16, 0.1  # as published


# an object that was found: box is (left, top, right, bottom) in pixels, mask bool [height, width]
Detection = namedtuple("Detection", "confidence box mask", defaults=[None])


def relations(box, other):
    """The benchmark's relations of `box` to `other`, from their centres' offset, as a set.
    Along each axis the offset is shortened by a tenth of the summed box sizes, then divided by the
    length of the whole offset. A relation holds where the result exceeds 0.5."""
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
    found: detections per class, the most confident first. metadata: a line of the benchmark."""
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
    """Mask2Former. Importing it takes most of a second; only its training loss needs SciPy."""
    from transformers.models.mask2former import modeling_mask2former as module

    module.requires_backends = lambda *needed: None
    return module.Mask2FormerForUniversalSegmentation


class GenEval(Task):
    """Show the objects of the prompt in number, colour and place (Ghosh et al. 2023).
    Prompt files are like the benchmark's evaluation_metadata.jsonl. Models: DETECTOR,CLIP."""

    own_prompts = "geneval.jsonl", "geneval_heldout.jsonl"
    own_models = ("detector", "clip")
    real_models = ("facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14")

    def for_real_images(self, full_size):
        labels = list(load_part(transformers.AutoConfig, self.models[0]).id2label.values())
        self.labels = COCO if len(labels) == len(COCO) else labels  # they differ in spelling only
        self.metadata = {}  # of each prompt, its record in the benchmark's format
        return self.labels is COCO

    def read(self, file):
        known = {"tag", "include", "exclude", "prompt"}
        for where, record in read_records(file):
            wanted = f"{where}: geneval needs a tag, and lists of clauses: include, maybe exclude"
            with naming(wrong := f"{wanted}, not {one_line(record)}"):
                include, exclude = record["include"], record.get("exclude", [])
                good = record.keys() <= known and isinstance(record["tag"], str) and include
                require(good, wrong)
                for number, clause in enumerate(include + exclude):
                    self.check(where, clause, number, number >= len(include))
            same = self.metadata.setdefault(record["prompt"], record) == record
            require(same, f"{where}: another record has this prompt, but asks for something else")
        return super().read(file)

    def check(self, where, clause, number, excluded):
        """UserError if a clause is not as the benchmark has it."""
        known = {"class": self.labels, "count": range(1, MOST_OBJECTS + 1)}
        if not excluded:
            places = [[relation, i] for relation in RELATIONS for i in range(number)]
            known |= {"color": COLOURS, "position": places}
        for field in {"class": None, "count": None} | clause:
            require(field in known, f"{where}: a clause has no field {field} here")
            value, values = clause.get(field), known[field]
            good = repr(value) in map(repr, values)  # True and 1.0 are not 1
            require(good, f"{where}: {field} {value!r} must be one of {one_line([*values])}")

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
        size = dict(size=dict(shortest_edge=800, longest_edge=1333)) if self.labels is COCO else {}
        self.detector_processor = load_part(transformers.AutoImageProcessor, detector, **size)
        self.detector = load_judge(segmenter_class(), detector, device)
        self.clip_processor = load_part(transformers.AutoProcessor, clip)
        self.clip = load_judge(transformers.CLIPModel, clip, device)

    @torch.inference_mode()
    def detect(self, images):
        """Per image and class, at most 16 objects of more than 0.3 confidence, best first."""
        results, processor = [], self.detector_processor
        batch_size = 4 if self.labels is COCO else 16  # the real detector sees 800 pixels
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

    def reward(self, images, prompts):
        """The graded verdicts. Counting trusts only objects of more than 0.9 confidence."""
        self.verdicts = []
        for image, prompt, found in zip(images, prompts, self.detect(images)):
            metadata = self.metadata[prompt]
            least = COUNTING_CONFIDENCE if metadata["tag"] == "counting" else CONFIDENCE
            for name, objects in found.items():
                found[name] = [one for one in objects if one.confidence > least]
            self.verdicts.append(judge(found, metadata, functools.partial(self.colours, image)))
        return [credit for _, credit in self.verdicts]

    def report(self, images, prompts):
        """The benchmark's score: per category the share of correct images, and their mean."""
        strict = {}
        for prompt, (correct, _) in zip(prompts, self.verdicts):
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
    model. Models: CLIP,PROCESSOR, the second only if it is another."""

    own_models = ("clip",)
    real_models = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    scale = 26.0  # as in Flow-GRPO, so that mixed rewards are of one size

    def load(self, device):
        self.processor = load_part(transformers.AutoProcessor, self.models[-1])
        self.clip = load_judge(transformers.CLIPModel, self.models[0], device)

    @torch.inference_mode()
    def reward(self, images, prompts, batch_size=32):
        rewards, clip = [], self.clip
        options = dict(padding=True, truncation=True, return_tensors="pt")
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            inputs = self.processor(images=images[part], text=prompts[part], **options)
            inputs.to(clip.device)
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
            load(task, device, device)

    def reward(self, images, prompts):
        self.parts = [scores(task, images, prompts) for task in self.tasks]
        return sum(w * x / task.scale for w, x, task in zip(self.weights, self.parts, self.tasks))

    def report(self, images, prompts):
        return {type(task).__name__: part.mean() for task, part in zip(self.tasks, self.parts)}


def task_class(name):
    """The class behind `ocr`, `geneval`, `pickscore` or FILE.py:CLASS."""
    if name in TASKS:
        return TASKS[name]
    name = f"{TINY / 'build.py'}:Signs" if name == "signs" else name
    file, _, wanted = name.rpartition(":")
    choices = "ocr, geneval, pickscore, FILE.py:CLASS or a mix such as ocr:0.7,pickscore:0.3"
    require(file.endswith(".py"), f"task {name} is not known; choose {choices}")
    require(os.path.isfile(file), f"task {name}: there is no file {file}")
    sys.path.append(str(Path(file).resolve().parent))  # its helper modules
    spec = importlib.util.spec_from_file_location(f"task_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look
    with naming(f"task {name} ends the program", SystemExit):
        spec.loader.exec_module(module)
    task = getattr(module, wanted, None)
    good = isinstance(task, type) and issubclass(task, Task) and hasattr(task, "reward")
    require(good, f"task {name}: {wanted} must be a subclass of rewards.Task with a reward")
    return task


def make_task(text, prompts=None, heldout_prompts=None, models=None, full_size=False, monitors=""):
    """The task that --task describes, maybe "ocr:0.7,signs:0.3". All have the first's prompts."""
    parts = [re.fullmatch(r"(?s)(.*?)(?::(-?\d+\.?\d*))?", part) for part in text.split(",")]
    names, weights = [part[1] for part in parts], [float(part[2] or 1) for part in parts]
    models = models.split(";") if models else []
    good = min(weights) >= 0 and sum(weights) > 0
    require(good, f"--task {text}: weights must be 0 or more and their sum above 0")
    fit = f"--reward-model is for {len(models)} tasks, but --task {text} has {len(names)}"
    require(len(models) <= len(names), fit)
    tasks = []
    for name, model in zip(names, models + [None] * len(names)):
        tasks.append(task_class(name)(prompts, heldout_prompts, model, full_size))
        prompts, heldout_prompts = tasks[0].files
    same = all(task.prompts == tasks[0].prompts for task in tasks)
    require(same, f"--task {text}: give --prompts and --heldout-prompts that all can read")
    task = Mixture(tasks, weights) if len(tasks) > 1 else tasks[0]
    watched = filter(None, monitors.split(","))
    task.monitors = [task_class(name)(*tasks[0].files, full_size=full_size) for name in watched]
    return task
