"""Layer searches: the lines of a validation set, and what is said of bad ones."""

import pytest

from conftest import write_lines
from janus.dola.layer_search.examples import read_examples

GOOD = {
    "image": {"prompt": "a", "image": "0.png"},
    "answers": {"question": "a", "answer": "b"},
    "tower": {"image": "0.png", "caption": "a"},
}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("image", {"prompt": " "}, "prompt: expected a string that is not blank, found ' '"),
        ("image", {"image": "none.png"}, "none.png: file not found"),
        ("image", {"image": "image.jsonl"}, "image.jsonl: not an image"),
        ("image", {"image": 3}, "image: expected an image file, found 3"),
        ("answers", {"question": "<image_placeholder>\nWhat?"}, "question: holds <image_placeholder>"),
        ("answers", {"answer": None}, "answer: expected a string that is not blank, found None"),
        ("answers", {"choices": ["c", "d"]}, "choices: expected the answer and at least one other text"),
        ("answers", {"choices": "b"}, "choices: expected a list of such strings, found 'b'"),
        ("answers", {"choices": ["b", "c"]}, "choices must stand in every line or in none"),
        ("tower", {"candidates": ["a"]}, "candidates: expected the caption and at least one other text"),
    ],
)
def test_a_bad_line_is_named_with_its_field(drawings, tmp_path, task, change, message):
    for name in ("0.png", "image.jsonl"):
        (tmp_path / name).write_bytes((drawings / name).read_bytes())
    data = write_lines(tmp_path / "bad.jsonl", [GOOD[task], GOOD[task] | change])
    with pytest.raises(ValueError) as error:
        read_examples(data, task)
    assert str(error.value).startswith(f"{data}: line 2: ") and message in str(error.value)
    assert "\n" not in str(error.value)
