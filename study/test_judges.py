"""What the judges say: GenEval's rules by hand, and models on pictures of known content."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards
from rewards import OCR, Detection, GenEval
from test_star import build, core_words, task_of, world


@pytest.fixture(scope="session")
def judges():
    return {name: task_of(name) for name in ["ocr", "geneval", "pickscore"]}


def clause(name, count=1, color=None, position=None):
    """A clause of the benchmark's metadata."""
    made = {"class": name, "count": count}
    if color is not None:
        made["color"] = color
    if position is not None:
        made["position"] = position
    return made


@pytest.mark.parametrize(
    "prompt, include, words",
    [
        ("a red wall with two red balls", [clause("ball", 2)], ["two", "balls"]),
        ("a red wall, an orange box", [clause("box", 1, "orange")], ["orange", "box"]),
        (
            "a ball left of a box",
            [clause("box"), clause("ball", position=["left of", 0])],
            ["ball", "left of", "box"],
        ),
        (
            "two persons and a wine glass",
            [clause("person", 2), clause("wine glass")],
            ["two", "persons", "wine glass"],
        ),
        (
            "four people, three buses",
            [clause("person", 4), clause("bus", 3)],
            ["four", "people", "three", "buses"],
        ),
        (
            "four benchs, three knifes",
            [clause("bench", 4), clause("knife", 3)],
            ["four", "benchs", "three", "knifes"],
        ),
    ],
)
def test_core_words_of_geneval(prompt, include, words):
    """Objects, numbers, colours and places, also in the benchmark's own plurals."""
    task = GenEval()
    task.read({"prompt": prompt, "tag": "", "include": include})
    assert core_words(task, prompt) == words


def test_reader_reads_the_world(judges):
    """Signs as they are, none where there is none. Training and held-out texts are disjoint."""
    task = judges["ocr"]
    signs, prompts = world(200, opacity=1.0, sign_share=1.0)
    bare, _ = world(100, sign_share=0.0)
    assert task.checked_reward(signs, prompts).mean() >= 0.99
    assert task.checked_reward(bare, prompts[:100]).mean() <= 0.1
    training = {core_words(task, prompt)[0] for prompt in task.prompts}
    assert not training & {core_words(task, prompt)[0] for prompt in task.heldout_prompts}


def counting_florence(folder):
    """Florence-2's classes, with weights that write the numbers from 0 to 39, one per position."""
    words = "<s> <pad> </s> <unk> <image> What is the text in image ?".split()
    words += [str(number) for number in range(40)]
    vocabulary = {word: i for i, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    pixels = transformers.CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5
    )
    transformers.Florence2Processor(pixels, tokenizer).save_pretrained(folder)
    config = transformers.Florence2Config(
        text_config={"vocab_size": len(words), "d_model": 64, "decoder_start_token_id": 2},
        vision_config={"embed_dim": [32] * 4, "projection_dim": 64},
        image_token_id=4,
    )
    model = transformers.Florence2ForConditionalGeneration(config)
    decoder = model.model.language_model.decoder
    for layer in decoder.layers:  # what comes out is the position that went in
        for name, weight in layer.named_parameters():
            if "layer_norm" not in name:
                torch.nn.init.zeros_(weight)
    torch.nn.init.zeros_(decoder.embed_tokens.weight)
    positions = torch.nn.init.normal_(decoder.embed_positions.weight)[2:].detach()
    head = torch.zeros(len(words), 64)
    head[-40:] = F.layer_norm(positions[:40], (64,))
    head[2] = F.layer_norm(positions[40], (64,))  # the end
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False
    model.half().save_pretrained(folder)


def test_reader_of_real_images(tmp_path):
    """It is told what to do, reads to the end, and is float32 although its file is not."""
    counting_florence(tmp_path)
    task = OCR()
    task.models = [str(tmp_path)]
    task.prepare()
    assert task.reader.dtype == torch.float32
    images = [Image.new("RGB", (90, 70))] * 3
    asked = task.processor(images=images[0], text="<OCR>").input_ids[0]
    told = task.processor.tokenizer.decode(asked, skip_special_tokens=True)
    assert told == "What is the text in the image ?"
    numbers = " ".join(str(number) for number in range(40))
    assert task.transcribe(images, batch_size=2) == [numbers] * 3
    prompts = ['a sign "38 39"', 'a sign "shut"', f'a sign "{numbers}"']
    assert task.reward(images, prompts) == [1, 0, 1]


def test_readers_without_a_limit_of_their_own_read_to_the_end(judges, tmp_path):
    """generate() would stop after 20 tokens. tiny/ocr has a limit, and keeps it."""
    shutil.copytree("tiny/ocr", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "generation_config.json"
    limit = json.loads(file.read_text())["max_length"]
    kept = judges["ocr"].reader.generation_config
    assert (kept.max_length, kept.max_new_tokens) == (limit, None)
    file.write_text("{}")
    task = OCR()
    task.models = [str(tmp_path)]
    task.prepare()
    settings = task.reader.generation_config
    assert (settings.max_length, settings.max_new_tokens) == (None, 1024)


HERE = (0, 0, 10, 10)
RELATIONS = [
    (HERE, (30, 0, 40, 10), {"left of"}),  # (30 - 2) / 30
    ((30, 0, 40, 10), HERE, {"right of"}),
    (HERE, (0, 30, 10, 40), {"above"}),
    ((0, 30, 10, 40), HERE, {"below"}),
    ((30, 30, 40, 40), HERE, {"right of", "below"}),  # 28 / 42.4 = 0.66 along both
    ((20, 12, 30, 22), HERE, {"right of"}),  # 18 / 23.3 = 0.77 and 10 / 23.3 = 0.43
    ((1, 0, 11, 10), HERE, set()),  # nearer than the margin of 2
    ((0, 0, 40, 40), (10, 0, 50, 40), set()),  # the margin is 8: (10 - 8) / 10 = 0.2
    (HERE, HERE, set()),
    ((0.5, 4, 5.5, 4), (0, 0, 0, 0), {"below"}),  # (3 - 0.5) / 5 = 0.5 is not more than 0.5
]


@pytest.mark.parametrize("box, other, expected", RELATIONS)
def test_relations_by_hand(box, other, expected):
    assert rewards.relations(box, other) == expected


def detection(confidence, left, colour=None):
    """An object of 10 x 10 pixels. Its colour stands in place of its mask."""
    return Detection(confidence, (left, 0, left + 10, 10), colour)


def colours_of(detections, name):
    return [one.mask for one in detections]


RED_DOG = detection(0.9, 0, "red")
GREEN_DOG = detection(0.6, 100, "green")
CAT = detection(0.8, 50, "blue")
LEFT_CAT = detection(0.7, -50, "blue")
RIGHT_CAT = detection(0.7, 90, "blue")
BOTH_DOGS = [RED_DOG, GREEN_DOG]

DOG = clause("dog")
LEFT_DOG = clause("dog", position=["left of", 0])
RED = clause("dog", 1, "red")
GREEN = clause("dog", 1, "green")
TWO_RED = clause("dog", 2, "red")
THREE = clause("dog", 3)
A_CAT = clause("cat")
TWO_CATS = clause("cat", 2)
RED_CAT = clause("cat", 1, "red")
BLUE_CAT = clause("cat", 1, "blue")


@pytest.mark.parametrize(
    "include, dogs, cats, correct, credit",
    [
        ([DOG], [RED_DOG], [], True, 1),  # one dog
        ([DOG], [], [CAT], False, 0),  # a cat is no dog
        ([DOG], BOTH_DOGS, [], True, 0),  # more is no fault
        ([DOG, A_CAT], [RED_DOG], [CAT], True, 1),  # two objects
        ([DOG, A_CAT], [RED_DOG], [], False, 1 / 2),  # one of two
        ([THREE], [RED_DOG] * 3, [], True, 1),  # three
        ([THREE], [RED_DOG] * 2, [], False, 2 / 3),  # two of three
        ([THREE], [RED_DOG] * 7, [], True, 0),  # no negative credit
        ([RED], [RED_DOG], [], True, 1),  # colour
        ([RED], [], [], False, 0),  # no dog to be red
        ([GREEN], BOTH_DOGS, [], False, 0),  # the surest one is judged
        ([TWO_RED], BOTH_DOGS, [], False, 3 / 4),  # one of two is red
        ([GREEN, BLUE_CAT], [RED_DOG], [CAT], False, 3 / 4),  # a wrong colour
        ([A_CAT, LEFT_DOG], [RED_DOG], [CAT], True, 1),  # left of
        ([A_CAT, LEFT_DOG], [GREEN_DOG], [CAT], False, 2 / 3),  # right of
        ([A_CAT, LEFT_DOG], [RED_DOG], [], False, 1 / 3),  # left of nothing
        ([A_CAT, LEFT_DOG], [], [CAT], False, 1 / 3),  # nothing left of
        ([RED_CAT, LEFT_DOG], [RED_DOG], [CAT], False, 2 / 4),  # of a wrong cat
        ([TWO_CATS, LEFT_DOG], [RED_DOG], [CAT, LEFT_CAT], False, 2 / 3),  # of one
        ([TWO_CATS, LEFT_DOG], [RED_DOG], [CAT, RIGHT_CAT], True, 1),  # of both
    ],
)
def test_geneval_by_hand(include, dogs, cats, correct, credit):
    """Verdicts that follow from the benchmark's published rules."""
    found = {"dog": dogs, "cat": cats}
    verdict = rewards.judge(found, {"include": include}, colours_of)
    assert verdict == (correct, pytest.approx(credit))


@pytest.mark.parametrize(
    "dogs, cats, correct",
    [
        pytest.param([RED_DOG] * 3, [], True, id="three"),
        pytest.param([RED_DOG] * 4, [], False, id="four are too many"),
        pytest.param([RED_DOG] * 3, [CAT], False, id="no cat was allowed"),
    ],
)
def test_geneval_excludes(dogs, cats, correct):
    metadata = {"include": [THREE], "exclude": [clause("dog", 4), A_CAT]}
    found = {"dog": dogs, "cat": cats}
    assert rewards.judge(found, metadata, colours_of)[0] == correct


def draw_objects(objects, relation=None):
    """A picture of the miniature's world with (shape, colour) objects on a red wall."""
    image = Image.new("RGB", (32, 32), build.COLOURS["red"])
    places = build.quarters(random.Random(0), len(objects), relation)
    for (shape, colour), (x, y) in zip(objects, places):
        build.draw_object(image, shape, colour, 16 * x + 3, 16 * y + 3)
    return image


def test_geneval_of_world_images():
    """Images that show what is asked for score 1; the same images under other prompts do not."""
    task = task_of("geneval")
    asked = {
        "a": ("colors", [clause("ball", 1, "blue")]),
        "b": ("counting", [clause("ball", 2)]),
        "c": ("position", [clause("box"), clause("ball", position=["left of", 0])]),
    }
    for prompt, (tag, include) in asked.items():
        task.read({"prompt": prompt, "tag": tag, "include": include})
    images = [
        draw_objects([("ball", "blue")]),
        draw_objects([("ball", "white"), ("ball", "white")]),
        draw_objects([("ball", "blue"), ("box", "green")], "left of"),
    ]
    score = "strict GenEval without single_object, two_object, color_attr"
    names = ["strict colors", "strict counting", "strict position", score]
    assert task.reward(images, "abc") == [1, 1, 1]
    assert task.report(images, "abc") == dict.fromkeys(names, 1)
    assert task.reward(images, "bca") == pytest.approx([1 / 2, 0, 1])
    assert task.report(images, "bca")[score] == pytest.approx(1 / 3)


def test_geneval_counts_only_what_it_is_sure_of(monkeypatch):
    """A ball of confidence 0.85 counts for position, but not for counting."""
    task = GenEval()
    task.read({"prompt": "b", "tag": "counting", "include": [clause("ball")]})
    task.read({"prompt": "c", "tag": "position", "include": [clause("ball")]})
    monkeypatch.setattr(task, "detect", lambda images: [{"ball": [detection(0.85, 0)]}])
    assert task.reward([None], "b") == [0]
    assert task.reward([None], "c") == [1]


def test_a_coco_detector_gets_the_benchmark_s_size_and_names(judges, tmp_path):
    config = transformers.AutoConfig.from_pretrained("tiny/detector")
    config.id2label = {i: f"label {i}" for i in range(80)}
    rewards.segmenter_class()(config).save_pretrained(tmp_path)
    shutil.copy("tiny/detector/preprocessor_config.json", tmp_path)
    task = GenEval()
    task.models = [str(tmp_path), "tiny/clip"]
    task.prepare()
    assert task.labels[63:66] == ["laptop", "computer mouse", "tv remote"]

    def size(task, width):
        image = Image.new("RGB", (width, 30))
        return task.detector_processor(images=image, return_tensors="pt").pixel_values.shape[-2:]

    tiny_task = judges["geneval"]
    assert size(task, 40) == (800, 1088)  # padded to multiples of 32
    assert size(task, 400) == (128, 1344)
    assert size(tiny_task, 40) == (32, 32)


def test_pickscore_prefers_the_right_caption_and_the_clean_image(judges):
    task = judges["pickscore"]
    images, captions = world(200)
    rng = random.Random(1)
    degraded = [build.degraded(rng, image) for image in images]
    right = task.reward(images, captions)
    assert (right > task.reward(images, captions[1:] + captions[:1])).sum() >= 190
    assert (right > task.reward(degraded, captions)).sum() >= 180
