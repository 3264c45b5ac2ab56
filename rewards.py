"""The tasks: what is asked for, which words of the prompt matter, and how good a picture is.

`star.py` uses a task through these names and nothing else; README shows how to write one in a dozen lines:
    prompts, heldout_prompts     lists of strings
    model_names                  folders or hub names of the models it needs, to be checked before anything heavy is loaded
    core_spans(prompt)           the (start, end) characters of the words that the reward is about
    load(device)                 brings in what is heavy
    reward(images, prompts)      one number per PIL picture, a tensor [len(images)]
    report(images, prompts)      further numbers to print, a dict
    scale                        what a reward is divided by where it is mixed with others
Constructors take (prompts, heldout_prompts, model), paths or names that may be None, and raise ValueError with one sentence.
"""
import importlib.util
import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, CLIPModel, Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

TINY = Path(__file__).parent / "tiny"


def read_lines(file) -> list[tuple[int, str]]:
    """(line number, text) of every line of a file that is not blank. Raises ValueError, one sentence, for an unusable file."""
    if not Path(file).is_file():
        raise ValueError(f"prompt file {file} does not exist; give a text file with one prompt per line.")
    lines = [(number, line.strip()) for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"prompt file {file} is empty; it needs one prompt per line.")
    return lines


def read_prompts(file) -> list[tuple[int, str]]:
    """(line number, prompt) of every line that is not blank; of a .jsonl file, the field `prompt`."""
    lines = read_lines(file)
    return [(number, read_record(file, number, line)["prompt"]) for number, line in lines] if str(file).endswith(".jsonl") else lines


def read_record(file, number: int, line: str, fields=("prompt",)) -> dict:
    """A line of JSON that must be an object with these fields."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError(f"{file}, line {number} is not JSON; lines such as those of GenEval's evaluation_metadata.jsonl are expected.")
    for name in fields:
        if not isinstance(record, dict) or not record.get(name):
            raise ValueError(f"{file}, line {number} lacks the field {name}.")
    return record


class Task:
    """What most tasks share: prompts from two files, of which every word that is not a function word is core."""
    own_prompts = "pickscore"        # tiny/prompts/<this>.txt and tiny/prompts/<this>_heldout.txt are used where no files are given
    own_models = ()
    scale = 1.0

    def __init__(self, prompts: str = None, heldout_prompts: str = None, model: str = None):
        self.files = [prompts or self.own_file(""), heldout_prompts or self.own_file("_heldout")]
        self.prompts, self.heldout_prompts = ([prompt for _, prompt in read_prompts(file)] for file in self.files)
        self.model_names = str(model).split(",") if model else [str(TINY / name) for name in self.own_models]

    def own_file(self, ending: str) -> str:
        return str(TINY / "prompts" / f"{self.own_prompts}{ending}.txt")

    def core_spans(self, prompt: str) -> list[tuple[int, int]]:
        return content_word_spans(prompt)

    def load(self, device):
        pass

    def report(self, images: list, prompts: list[str]) -> dict[str, float]:
        return {}


def content_word_spans(prompt: str) -> list[tuple[int, int]]:
    """The (start, end) of every word of the prompt that is not a function word."""
    return [match.span() for match in re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*", prompt) if match.group().lower() not in FUNCTION_WORDS]


FUNCTION_WORDS = set("""a an the this that these those some any each every no of in on at by for from to into onto with without within over under
    between through and or but nor so as than if while is are was were be been being has have had it its he she they them his her their i you we
    which who whose what where when there here very not""".split())


# ------------------------------------------------------------------------------------------------------------------- OCR

def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of single-character insertions, deletions and substitutions."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def text_reward(read: str, target: str) -> float:
    """Flow-GRPO's OCR reward (arXiv 2505.05470, section 4): 1 - min(edit distance, len) / len, in [0, 1].

    Case and spaces do not count. A target that is contained in what was read counts as written without a fault.
    """
    read, target = ("".join(text.lower().split()) for text in (read, target))
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def quoted_span(prompt: str) -> list[tuple[int, int]]:
    """The (start, end) of the first text between straight double quotes, without them; an empty list if there is none."""
    found = re.search(r'"([^"]*[^"\s][^"]*)"', prompt)
    return [found.span(1)] if found else []


class OCR(Task):
    """Write the text that stands between straight double quotes in the prompt. `model`: an image-to-text reader."""

    own_prompts = "ocr"
    own_models = ("ocr",)

    def __init__(self, prompts: str = None, heldout_prompts: str = None, model: str = None):
        super().__init__(prompts, heldout_prompts, model)
        for file in self.files:          # a prompt that asks for no text has no reward
            without = [(number, prompt) for number, prompt in read_prompts(file) if not self.core_spans(prompt)]
            if without:
                raise ValueError(f"{file}, line {without[0][0]} has no text between straight double quotes: {without[0][1]}"
                                 + (f" (and {len(without) - 1} more such lines)" if len(without) > 1 else ""))

    def core_spans(self, prompt: str) -> list[tuple[int, int]]:
        return quoted_span(prompt)

    def load(self, device):
        self.processor = AutoProcessor.from_pretrained(self.model_names[0])
        self.reader = AutoModelForImageTextToText.from_pretrained(self.model_names[0]).to(device).eval()

    @torch.inference_mode()
    def read(self, images: list, batch_size: int = 32) -> list[str]:
        """What the reader sees on each PIL picture. Florence-2 wants to be told what to do, TrOCR can only read."""
        told = {"text": "<OCR>"} if self.reader.config.model_type == "florence2" else {}
        texts = []
        for start in range(0, len(images), batch_size):
            batch = images[start:start + batch_size]
            inputs = self.processor(images=batch, **{key: [value] * len(batch) for key, value in told.items()}, return_tensors="pt").to(self.reader.device)
            texts += self.processor.batch_decode(self.reader.generate(**inputs), skip_special_tokens=True)
        return texts

    def reward(self, images: list, prompts: list[str]) -> torch.Tensor:
        """One reward in [0, 1] per picture, shape [len(images)]; see `text_reward`."""
        targets = [prompt[slice(*self.core_spans(prompt)[0])] for prompt in prompts]
        return torch.tensor([text_reward(read, target) for read, target in zip(self.read(images), targets)])


# --------------------------------------------------------------------------------------------------------------- GenEval

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ["left of", "right of", "above", "below"]
COLOUR_PROMPTS = ["a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object"]
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "mouse": "mice", "box": "boxes"}
COCO = [name.replace("_", " ") for name in """person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter
    bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite
    baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli
    carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote computer_keyboard cell_phone
    microwave oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush""".split()]      # as the benchmark spells them
CONFIDENCE, COUNTING_CONFIDENCE, MOST_OBJECTS, POSITION_MARGIN = 0.3, 0.9, 16, 0.1        # the benchmark's


@dataclass
class Detection:
    """One object that the detector found."""
    confidence: float
    box: tuple                   # (left, top, right, bottom) in pixels
    mask: torch.Tensor = None    # bool [height, width]


def relations(box, other) -> set[str]:
    """The benchmark's relations of `box` to `other`, from their centres' offset.

    Along each axis the offset is shortened by a tenth of the summed box sizes, then divided by the length of the whole
    offset; a relation holds where the result exceeds 0.5.
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [box[i + 2] - box[i] + other[i + 2] - other[i] for i in (0, 1)]
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    x, y = ((max(abs(o) - POSITION_MARGIN * size, 0) * (1 if o > 0 else -1) / length if length else 0) for o, size in zip(offset, sizes))
    return {name for name, value in zip(RELATIONS, (-x, x, -y, y)) if value > 0.5}


def judge(found: dict[str, list[Detection]], metadata: dict, colours_of) -> tuple[bool, float]:
    """GenEval's verdict on one picture (Ghosh et al. 2023), and a graded one that rewards every step towards it.

    Strict: every `include` clause finds at least `count` objects of its class; the `count` most confident of them have the
    colour, if one is asked for, and stand in the `position` to all objects of the earlier clause, if one is asked for;
    no `exclude` clause finds `count` objects or more.

    Graded, as Flow-GRPO describes its reward (arXiv 2505.05470, section 4): the mean of these credits over all clauses
        count      max(0, 1 - |found - asked| / asked)
        colour     share of the asked objects that have the colour, where enough are found, else 0
        position   1 where the relation holds, else 0
    so a picture with the right objects in wrong colours or places still earns the credit of their number.

    Args: found, per class, the most confident first; metadata, a line of the benchmark's file; colours_of(detections,
        class) -> list of colour names.  Returns: (correct, credit in [0, 1]).
    """
    credits, groups, correct = [], [], True
    for clause in metadata["include"]:
        count, name = clause["count"], clause["class"]
        objects = found.get(name, [])
        credits.append(max(0.0, 1 - abs(len(objects) - count) / count))
        objects = objects[:count]
        enough = matched = len(objects) == count
        if "color" in clause:
            right = colours_of(objects, name).count(clause["color"]) if enough else 0
            credits.append(right / count)
            matched = matched and right == count
        if "position" in clause:
            relation, target = clause["position"]
            placed = enough and groups[target] is not None and all(relation in relations(a.box, b.box) for a in objects for b in groups[target])
            credits.append(float(placed))
            matched = matched and placed
        groups.append(objects if matched else None)
        correct = correct and matched
    for clause in metadata.get("exclude", []):
        correct = correct and len(found.get(clause["class"], [])) < clause["count"]
    return correct, sum(credits) / len(credits)


def plural(name: str) -> str:
    head, _, last = name.rpartition(" ")
    return f"{head} {PLURALS.get(last, last + ('es' if last.endswith(('s', 'sh', 'ch', 'x')) else 's'))}".strip()


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def geneval_prompts(labels: list[str], count: int, seed: int = 0, settings=("a photo of {}",)) -> list[dict]:
    """Up to `count` different prompts from the benchmark's six templates over a detector's labels, in its own format."""
    rng, made = random.Random(seed), {}
    for _ in range(20 * count):
        a, b = rng.sample(labels, 2)
        colour, other = rng.sample(COLOURS, 2)
        number, relation = rng.choice(list(NUMBERS)), rng.choice(RELATIONS)
        tag, include, words = rng.choice([
            ("single_object", [{"class": a, "count": 1}], with_article(a)),
            ("two_object", [{"class": a, "count": 1}, {"class": b, "count": 1}], f"{with_article(a)} and {with_article(b)}"),
            ("counting", [{"class": a, "count": number}], f"{NUMBERS[number]} {plural(a)}"),
            ("colors", [{"class": a, "count": 1, "color": colour}], with_article(f"{colour} {a}")),
            ("position", [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}], f"{with_article(a)} {relation} {with_article(b)}"),
            ("color_attr", [{"class": a, "count": 1, "color": colour}, {"class": b, "count": 1, "color": other}],
             f"{with_article(f'{colour} {a}')} and {with_article(f'{other} {b}')}")])
        record = {"tag": tag, "include": include, "prompt": rng.choice(settings).format(words)}
        if tag == "counting":
            record["exclude"] = [{"class": a, "count": number + 1}]
        made.setdefault(record["prompt"], record)
        if len(made) == count:
            break
    records = list(made.values())
    rng.shuffle(records)             # the few single objects came first
    return records


class Segmenter(Mask2FormerPreTrainedModel):
    """Mask2FormerForUniversalSegmentation without its training loss, which would need one more package (SciPy).

    It loads the same checkpoints and returns what the image processor's post_process_instance_segmentation needs.
    """
    _keys_to_ignore_on_load_unexpected = ["criterion"]

    def __init__(self, config):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values):
        output = self.model(pixel_values=pixel_values)
        return SimpleNamespace(class_queries_logits=self.class_predictor(output.transformer_decoder_last_hidden_state),
                               masks_queries_logits=output.masks_queries_logits[-1])


class GenEval(Task):
    """Paint the objects that the prompt asks for: which, how many, in which colours and places (Ghosh et al. 2023).

    `prompts`: files in the benchmark's format, evaluation_metadata.jsonl; without any, a detector other than the
    miniature gets prompts made from its labels. `model`: detector and colour classifier, names separated by a comma.
    """

    own_prompts = "geneval"
    own_models = ("detector", "clip")

    def __init__(self, prompts: str = None, heldout_prompts: str = None, model: str = None):
        self.model_names = str(model).split(",") if model else [str(TINY / name) for name in self.own_models]
        if len(self.model_names) != 2:
            raise ValueError(f"--reward-model {model} must name two models for geneval, DETECTOR,CLIP.")
        try:
            labels = AutoConfig.from_pretrained(self.model_names[0]).id2label
        except Exception as error:      # the hub's client raises many kinds
            raise ValueError(f"detector {self.model_names[0]} is neither a model's folder nor a hub model that can be reached ({type(error).__name__}).")
        self.labels = COCO if len(labels) == len(COCO) else list(labels.values())        # COCO detectors differ in spelling, not in order
        made = geneval_prompts(self.labels, 2200) if model else []
        self.files = [prompts or self.own_file("", model), heldout_prompts or self.own_file("_heldout", model)]
        train, heldout = (self.read(file) if file else part for file, part in zip(self.files, (made[:-200], made[-200:])))
        self.prompts, self.heldout_prompts = ([record["prompt"] for record in records] for records in (train, heldout))
        self.metadata = {record["prompt"]: record for record in train + heldout}

    def own_file(self, ending, model):
        return None if model else str(TINY / "prompts" / f"geneval{ending}.jsonl")

    def read(self, file) -> list[dict]:
        """The records of a file in the benchmark's format. Raises ValueError with the line's number and the field."""
        records = []
        for number, line in read_lines(file):
            where = f"{file}, line {number}"
            record = read_record(file, number, line, ("tag", "include", "prompt"))
            for position, clause in enumerate(record["include"] + record.get("exclude", [])):
                for name in ("class", "count"):
                    if name not in clause:
                        raise ValueError(f"{where} lacks the field {name} in one of its clauses.")
                if clause["class"] not in self.labels:
                    raise ValueError(f"{where}: the detector does not know the class {clause['class']}; its classes are {', '.join(self.labels)}.")
                if clause.get("color", "red") not in COLOURS:
                    raise ValueError(f"{where}: the colour {clause['color']} is not one of {', '.join(COLOURS)}.")
                relation, target = clause.get("position", ("above", -1))
                if relation not in RELATIONS or target >= position:
                    raise ValueError(f"{where}: the position {clause['position']} must name one of {', '.join(RELATIONS)} and the index of an earlier clause.")
            records.append(record)
        return records

    def core_spans(self, prompt: str) -> list[tuple[int, int]]:
        """The object, colour, number and position words of the prompt's metadata."""
        words = set()
        for clause in self.metadata[prompt]["include"]:
            words |= {clause["class"], plural(clause["class"]), clause.get("color"), NUMBERS.get(clause["count"]), clause.get("position", [None])[0]}
        pattern = "|".join(re.escape(word) for word in sorted(words - {None}, key=len, reverse=True))
        return [match.span() for match in re.finditer(rf"\b({pattern})\b", prompt)]

    def load(self, device):
        self.detector_processor = AutoImageProcessor.from_pretrained(self.model_names[0])
        self.detector = Segmenter.from_pretrained(self.model_names[0]).to(device).eval()
        self.clip_processor = AutoProcessor.from_pretrained(self.model_names[1])
        self.clip = CLIPModel.from_pretrained(self.model_names[1]).to(device).eval()

    @torch.inference_mode()
    def detect(self, images: list, batch_size: int = 16) -> list[dict[str, list[Detection]]]:
        """Per picture and class, at most 16 objects of more than 0.3 confidence, the most confident first."""
        results = []
        for start in range(0, len(images), batch_size):
            batch = images[start:start + batch_size]
            pixels = self.detector_processor(images=batch, return_tensors="pt").pixel_values.to(self.detector.device)
            processed = self.detector_processor.post_process_instance_segmentation(
                self.detector(pixels), threshold=CONFIDENCE, target_sizes=[image.size[::-1] for image in batch], return_binary_maps=True)
            for one in processed:
                found = {}
                for mask, segment in zip(one["segmentation"], one["segments_info"]):
                    rows, columns = (mask > 0).cpu().nonzero(as_tuple=True)
                    box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
                    found.setdefault(self.labels[segment["label_id"]], []).append(Detection(segment["score"], box, mask.cpu() > 0))
                results.append({name: sorted(objects, key=lambda o: -o.confidence)[:MOST_OBJECTS] for name, objects in found.items()})
        return results

    @torch.inference_mode()
    def colours(self, image, objects: list[Detection], name: str) -> list[str]:
        """The colour of each object, cut out by its mask on grey: the nearest of the benchmark's colour prompts by CLIP."""
        cut = [Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(o.mask.numpy())).crop(o.box) for o in objects]
        return [COLOURS[index] for index in (self.clip_images(cut) @ self.colour_prompts(name).T).argmax(-1).tolist()]

    def colour_prompts(self, name: str) -> torch.Tensor:
        """Per colour, the mean of the three official prompts' directions, [10, D]."""
        texts = [prompt.format(colour=colour, name=name) for colour in COLOURS for prompt in COLOUR_PROMPTS]
        inputs = self.clip_processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        return unit(unit(self.clip.get_text_features(**inputs)).view(len(COLOURS), 3, -1).mean(1))

    def clip_images(self, images: list) -> torch.Tensor:
        return unit(self.clip.get_image_features(**self.clip_processor(images=images, return_tensors="pt").to(self.clip.device)))

    def verdicts(self, images: list, prompts: list[str]) -> list[tuple[bool, float]]:
        """`judge` of each picture; counting trusts only objects of more than 0.9 confidence."""
        verdicts = []
        for image, prompt, found in zip(images, prompts, self.detect(images)):
            metadata = self.metadata[prompt]
            least = COUNTING_CONFIDENCE if metadata["tag"] == "counting" else CONFIDENCE
            found = {name: [o for o in objects if o.confidence > least] for name, objects in found.items()}
            verdicts.append(judge(found, metadata, lambda objects, name: self.colours(image, objects, name)))
        return verdicts

    def reward(self, images: list, prompts: list[str]) -> torch.Tensor:
        """The graded verdict of each picture, in [0, 1]; see `judge`."""
        return torch.tensor([credit for _, credit in self.verdicts(images, prompts)])

    def report(self, images: list, prompts: list[str]) -> dict[str, float]:
        """The benchmark's own score: per category the share of strictly correct pictures, and the mean over categories."""
        strict = {}
        for prompt, (correct, _) in zip(prompts, self.verdicts(images, prompts)):
            strict.setdefault(self.metadata[prompt]["tag"], []).append(correct)
        shares = {f"strict {tag}": sum(values) / len(values) for tag, values in sorted(strict.items())}
        return shares | {"strict GenEval": sum(shares.values()) / len(shares)}


def unit(features) -> torch.Tensor:
    """CLIP's features as directions [N, D]. Transformers returns them bare or, since version 5, in an output object."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


# ------------------------------------------------------------------------------------------------------------- PickScore

class PickScore(Task):
    """Please people: PickScore (Kirstain et al. 2023) is a CLIP trained on which of two pictures people prefer for a prompt.

    The reward is its logit scale times the cosine of picture and prompt, about 20 to 24 for the real model. `model`: the
    CLIP model, then after a comma the name that its processor is taken from where that is another one.
    """
    own_models = ("clip",)
    scale = 26.0        # as in Flow-GRPO, so that mixed rewards are of one size

    def load(self, device):
        self.processor = AutoProcessor.from_pretrained(self.model_names[-1])
        self.clip = CLIPModel.from_pretrained(self.model_names[0]).to(device).eval()

    @torch.inference_mode()
    def reward(self, images: list, prompts: list[str], batch_size: int = 32) -> torch.Tensor:
        """Logit scale times cosine of each picture with its prompt, [len(images)]."""
        scores = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            inputs = self.processor(images=images[part], text=prompts[part], padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
            pictures, texts = unit(self.clip.get_image_features(inputs.pixel_values)), unit(self.clip.get_text_features(inputs.input_ids, inputs.attention_mask))
            scores.append((self.clip.logit_scale.exp() * (pictures * texts).sum(-1)).cpu())
        return torch.cat(scores)


# --------------------------------------------------------------------------------------------------- choosing and mixing

TASKS = {"ocr": OCR, "geneval": GenEval, "pickscore": PickScore}


class Mixture(Task):
    """Several rewards for the same prompts: the mean of reward / scale, by the given weights. All core words count."""

    def __init__(self, tasks: list, weights: list[float]):
        self.tasks, self.weights = tasks, [weight / sum(weights) for weight in weights]
        self.prompts, self.heldout_prompts = tasks[0].prompts, tasks[0].heldout_prompts
        self.model_names = [name for task in tasks for name in task.model_names]

    def core_spans(self, prompt):
        return [span for task in self.tasks for span in task.core_spans(prompt)]

    def load(self, device):
        for task in self.tasks:
            task.load(device)

    def reward(self, images, prompts):
        return sum(weight * task.reward(images, prompts) / task.scale for weight, task in zip(self.weights, self.tasks))

    def report(self, images, prompts):
        return {type(task).__name__: task.reward(images, prompts).mean().item() for task in self.tasks}


def task_class(name: str):
    """The class behind `ocr`, `geneval`, `pickscore` or FILE.py:CLASS. Raises ValueError with one sentence."""
    if name in TASKS:
        return TASKS[name]
    file, separator, wanted = name.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise ValueError(f"--task {name} is not known; choose {', '.join(TASKS)}, your own FILE.py:CLASS, or a mixture such as ocr:0.7,pickscore:0.3.")
    if not Path(file).is_file():
        raise ValueError(f"--task {name}: there is no file {file}.")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, wanted):
        raise ValueError(f"--task {name}: there is no class {wanted} in {file}.")
    return getattr(module, wanted)


def parts_of(description: str) -> list[tuple[str, float]]:
    """--task as (name, weight) pairs: `ocr` is [("ocr", 1)], `ocr:0.7,pickscore:0.3` has two."""
    parts = []
    for part in description.split(","):
        name, _, weight = part.rpartition(":")
        number = re.fullmatch(r"-?\d+(\.\d*)?", weight)
        parts.append((name, float(weight)) if number else (part, 1.0))
    return parts


def make_task(description: str, prompts: str = None, heldout_prompts: str = None, models: list = ()):
    """The task that --task describes; several names share the prompts of the first. Raises ValueError, one sentence.

    `models`: one entry per name, None for the task's own.
    """
    parts = parts_of(description)
    if min(weight for _, weight in parts) < 0 or sum(weight for _, weight in parts) <= 0:
        raise ValueError(f"--task {description}: the weights must be 0 or more and their sum above 0.")
    if len(models) > len(parts):
        raise ValueError(f"--reward-model names models for {len(models)} tasks, separated by semicolons, but --task {description} has {len(parts)}.")
    tasks = []
    for (name, _), model in itertools.zip_longest(parts, models):
        tasks.append(task_class(name)(prompts, heldout_prompts, model))
        prompts, heldout_prompts = tasks[0].files
    if len(tasks) == 1:
        return tasks[0]
    if any(task.prompts != tasks[0].prompts for task in tasks):
        raise ValueError(f"--task {description}: give --prompts and --heldout-prompts that all of them can read.")
    return Mixture(tasks, [weight for _, weight in parts])
