"""What the benchmark of windows counts."""

import pytest

from benchmarks.windows import compare, passes_by_place
from generation_inference import Decoding


def test_each_token_takes_its_share_of_the_pass_that_made_it_final():
    assert passes_by_place([1, 2, 4]).tolist() == [1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_pictures_tokens_and_passes_are_counted_by_window(golden):
    of_window = compare(golden.model, golden.processor, Decoding((4,)), range(3), (1, 4))
    for window, found in of_window.items():
        assert found["pictures"] == 3 and found["tokens"] == pytest.approx(1)
        assert found["per pass"] == pytest.approx(3 * 16 / found["passes"])
        assert float(found["by place"].sum()) == pytest.approx(found["passes"] / 3)
        assert (found["passes"] < 3 * 16) == (window > 1)
