"""The tasks: what is asked for, which words of the prompt matter, and how good a picture is.

A task has three parts and `star.py` uses nothing else of it:
    prompts, heldout_prompts     lists of strings
    core_spans(prompt)           the character spans of the words that the reward is about
    reward(images, prompts)      one number in [0, 1] per picture
The constructor only reads and checks prompts; `load(device)` brings in what is heavy.
"""
import re
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

TINY = Path(__file__).parent / "tiny"


def read_prompts(path: str) -> list[str]:
    """The lines of a prompt file, one prompt each; blank lines are left out. Raises ValueError for an unusable file."""
    if not Path(path).is_file():
        raise ValueError(f"prompt file {path} does not exist; give a text file with one prompt per line.")
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} is empty; it needs one prompt per line.")
    return prompts


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
        files = prompts or TINY / "prompts/ocr.txt", heldout_prompts or TINY / "prompts/ocr_heldout.txt"
        self.prompts, self.heldout_prompts = (read_prompts(file) for file in files)
        self.model_name = model or TINY / "ocr"
        for file, lines in zip(files, (self.prompts, self.heldout_prompts)):
            for number, prompt in enumerate(lines, 1):
                if not self.core_spans(prompt):
                    raise ValueError(f'{file}, prompt {number} has no text between straight double quotes: {prompt}')

    def core_spans(self, prompt: str) -> list[tuple[int, int]]:
        """The (start, end) of the first quoted text, without its quotes; an empty list if there is none."""
        found = re.search(r'"([^"]*[^"\s][^"]*)"', prompt)
        return [found.span(1)] if found else []

    def load(self, device):
        self.processor = AutoProcessor.from_pretrained(self.model_name)
        self.reader = AutoModelForImageTextToText.from_pretrained(self.model_name).to(device).eval()

    @torch.inference_mode()
    def read(self, images: list) -> list[str]:
        """What the reader sees on each PIL picture."""
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.reader.device)
        return self.processor.batch_decode(self.reader.generate(pixel_values=pixels), skip_special_tokens=True)

    def reward(self, images: list, prompts: list[str]) -> torch.Tensor:
        """One reward in [0, 1] per picture, shape [len(images)]; see `text_reward`."""
        targets = [prompt[slice(*self.core_spans(prompt)[0])] for prompt in prompts]
        return torch.tensor([text_reward(read, target) for read, target in zip(self.read(images), targets)])


TASKS = {"ocr": OCR}
