"""The tasks: what is asked for, which words of the prompt matter, and how good a picture is.

A task has three parts and `star.py` uses nothing else of it:
    prompts, heldout_prompts     lists of strings
    core_spans(prompt)           the character spans of the words that the reward is about
    reward(images, prompts)      one number in [0, 1] per picture
The constructor only reads and checks prompts; `load(device)` brings in what is heavy.
"""
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

TINY = Path(__file__).parent / "tiny"


def read_lines(path: str) -> list[tuple[int, str]]:
    """(line number, text) of every line of a file that is not blank. Raises ValueError for an unusable file."""
    if not Path(path).is_file():
        raise ValueError(f"prompt file {path} does not exist; give a text file with one prompt per line.")
    lines = [(number, line.strip()) for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"prompt file {path} is empty; it needs one prompt per line.")
    return lines


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


class OCR:
    """Write the text that stands between straight double quotes in the prompt."""

    def __init__(self, prompts: str = None, heldout_prompts: str = None, model: str = None):
        """Paths of the two prompt files and the folder or hub name of the reader; the miniature's own by default."""
        self.prompts = self.with_text(prompts or TINY / "prompts/ocr.txt")
        self.heldout_prompts = self.with_text(heldout_prompts or TINY / "prompts/ocr_heldout.txt")
        self.model_name = model or TINY / "ocr"

    def with_text(self, file) -> list[str]:
        """The prompts of a file, all of which must quote a text to write: a prompt without one has no reward."""
        lines = read_lines(file)
        without = [(number, line) for number, line in lines if not self.core_spans(line)]
        if without:
            raise ValueError(f"{file}, line {without[0][0]} has no text between straight double quotes: {without[0][1]}"
                             + (f" (and {len(without) - 1} more such lines)" if len(without) > 1 else ""))
        return [line for _, line in lines]

    def core_spans(self, prompt: str) -> list[tuple[int, int]]:
        """The (start, end) of the first quoted text, without its quotes; an empty list if there is none."""
        found = re.search(r'"([^"]*[^"\s][^"]*)"', prompt)
        return [found.span(1)] if found else []

    def load(self, device):
        self.processor = AutoProcessor.from_pretrained(self.model_name)
        self.reader = AutoModelForImageTextToText.from_pretrained(self.model_name).to(device).eval()

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


class Segmenter(Mask2FormerPreTrainedModel):
    """Mask2FormerForUniversalSegmentation without its training loss, which would need one more package (SciPy).

    It loads the same checkpoints and returns what the image processor's post_process_instance_segmentation needs.
    """

    def __init__(self, config):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values):
        output = self.model(pixel_values=pixel_values)
        return SimpleNamespace(class_queries_logits=self.class_predictor(output.transformer_decoder_last_hidden_state),
                               masks_queries_logits=output.masks_queries_logits[-1])


TASKS = {"ocr": OCR}
