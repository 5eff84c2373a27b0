"""The validation set of a layer search: lines of JSON with the images that they name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from janus.dola.files import load_image, parse_json, read_text

Example = dict[str, Any]
"""A line of the input: the fields of its task, image paths resolved, and `domain` where there are domains."""

IMAGE_TAG = "<image_placeholder>"
FIELDS = {
    "image": {"prompt": "text", "image": "image"},
    "answers": {"question": "text", "answer": "text", "image": "image?", "choices": "texts?"},
    "tower": {"image": "image", "caption": "text", "candidates": "texts?"},
}


def read_examples(path: Path, task: str, domain_field: str | None = None) -> list[Example]:
    """The examples of a JSONL file for a task of `FIELDS`; images are looked for from the file's own directory.

    Raises ValueError naming the file, the line and the field.
    """
    text = read_text(path).strip()
    if not text:
        raise ValueError(f"{path}: no examples")
    examples: list[Example] = []
    for number, line in enumerate(text.split("\n"), start=1):
        content = parse_json(line, f"{path}: line {number}")
        try:
            examples.append(_read_example(content, task, domain_field, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        for optional in ("choices", "candidates"):
            if (optional in examples[0]) != (optional in examples[-1]):
                raise ValueError(f"{path}: line {number}: {optional} must stand in every line or in none")
    if task == "tower" and "candidates" not in examples[0]:
        captions = list(dict.fromkeys(example["caption"] for example in examples))
        examples = [example | {"candidates": captions} for example in examples]
    return examples


def _read_example(content: Any, task: str, domain_field: str | None, directory: Path) -> Example:
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    example = {}
    for field, kind in FIELDS[task].items():
        if field not in content and kind.endswith("?"):
            continue
        example[field] = _read_field(content, field, kind.removesuffix("?"), directory)
    if domain_field is not None:
        example["domain"] = _read_field(content, domain_field, "text", directory)
    for field, own in (("choices", "answer"), ("candidates", "caption")):
        if field in example and (own not in example or example[own] not in example[field] or len(example[field]) < 2):
            raise ValueError(f"{field}: expected the {own} and at least one other text, found {example[field]!r}")
    return example


def _read_field(content: dict[str, Any], field: str, kind: str, directory: Path) -> Any:
    if field not in content:
        raise ValueError(f"{field}: missing")
    value = content[field]
    texts = value if kind == "texts" else [value]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        expected = {"text": "a string that is not blank", "texts": "a list of such strings", "image": "an image file"}
        raise ValueError(f"{field}: expected {expected[kind]}, found {value!r}")
    if kind == "texts":
        return list(dict.fromkeys(texts))
    if kind == "image":
        path = directory / texts[0]
        try:
            load_image(path)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        return path
    if kind == "text" and IMAGE_TAG in value:
        raise ValueError(f"{field}: holds {IMAGE_TAG}, which stands for an image; the line's own is placed for it")
    return texts[0]


def rivals(example: Example) -> list[str]:
    """The false ones among an example's choices."""
    return [text for text in example.get("choices", ()) if text != example["answer"]]


def texts_of(examples: Sequence[Example]) -> list[str]:
    """Every text that a tokenizer reads of the examples, once."""
    texts: dict[str, None] = {}
    for example in examples:
        for field in ("prompt", "question", "answer", "choices", "candidates"):
            value = example.get(field, [])
            texts |= dict.fromkeys([value] if isinstance(value, str) else value)
    return list(texts)
