from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janus.dola.pictures import contact_sheet, font, layer_map, read_settings, save_image, tile, where_map, wrap


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("prompt", ["a red star", "画一只狗。\n{\n second line", "😀" * 50])
def test_settings_travel_inside_the_file_and_the_pixels_stay(tmp_path, name, prompt):
    settings = {"prompt": prompt, "seed": 2**62, "decoding": {"layers": [6], "alpha": 0.1}}
    save_image(picture(), tmp_path / name, settings)
    assert read_settings(tmp_path / name) == settings
    if name.endswith("png"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), np.asarray(picture()))
        assert Image.open(tmp_path / name).info["parameters"].startswith(prompt)  # what image tools show


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_without_settings_and_what_is_no_image_are_named(tmp_path, suffix):
    plain, text = tmp_path / f"plain.{suffix}", tmp_path / f"text.{suffix}"
    save_image(picture(), plain)
    text.write_text("no image")
    with pytest.raises(ValueError, match=rf"plain\.{suffix}: holds no settings of a painted image"):
        read_settings(plain)
    with pytest.raises(ValueError, match=rf"text\.{suffix}: not an image"):
        read_settings(text)
    with pytest.raises(ValueError, match="file not found"):
        read_settings(tmp_path / "none.png")


def test_a_sheet_has_a_labelled_row_for_each_variant_and_every_image_in_it():
    rows = {"baseline": [picture(0), picture(1)], "exit 22, 24, 26, 28 · α 0.1": [picture(2), picture(3)]}
    sheet = np.asarray(contact_sheet("a title " * 50, "cfg 5 · seed 0", rows, cell=64))
    found = [
        any(
            np.array_equal(sheet[y : y + 64, x : x + 64], np.asarray(image))
            for y in range(sheet.shape[0] - 63)
            for x in range(100, sheet.shape[1] - 63)
        )
        for image in (images[i] for images in rows.values() for i in range(2))
    ]
    assert all(found)


def test_the_text_of_a_column_stands_above_its_image_and_within_its_width():
    rows = {"baseline": [picture(0, 128), picture(1, 128)], "APC only": [picture(2, 128), picture(3, 128)]}
    texts = ["a red star", "a green triangle above a pink triangle on a white background"]
    plain = np.asarray(contact_sheet("title", "subtitle", rows, cell=None))
    sheet = np.asarray(contact_sheet("title", "subtitle", rows, cell=None, columns=texts))
    added, left = len(sheet) - len(plain), sheet.shape[1] - 2 * 132
    assert added > 0 and np.array_equal(sheet[41 + added :], plain[41:])
    heads = np.any(sheet[41 : 41 + added] < 128, axis=-1)
    assert not heads[:, :left].any() and not heads[:, left + 124 : left + 132].any()
    rows_used = [np.flatnonzero(heads[:, x : x + 132].any(1)) for x in (left, left + 132)]
    assert 0 < len(rows_used[0]) < len(rows_used[1]) and min(rows_used[0]) > added - 17
    with pytest.raises(ValueError):
        contact_sheet("title", "subtitle", rows, columns=texts[:1])


def test_wrapped_text_keeps_its_words_in_order_and_fits_where_its_words_do():
    text = "a green triangle above a pneumonoultramicroscopic triangle"
    lines = wrap(text, 90, 12)
    assert " ".join(lines) == text and len(lines) > 3
    assert [line for line in lines if font(12).getlength(line) > 90] == ["pneumonoultramicroscopic"]


def test_a_map_shows_the_divergence_of_each_token_and_frames_the_redrawn_ones():
    jsd, changed = np.zeros((24, 24)), np.zeros((24, 24), dtype=bool)
    jsd[3, 5], changed[7, 2] = 0.5, True
    both = np.asarray(where_map(picture(), jsd, changed, 0.5))
    grid = both[:, -24 * 14 :]
    cells = grid.reshape(24, 14, 24, 14, 3).transpose(0, 2, 1, 3, 4)
    assert both.shape == (24 * 14, 2 * 24 * 14 + 4, 3)
    brightest = np.unravel_index(cells[:, :, 7, 7].sum(-1).argmax(), (24, 24))
    framed = (cells[:, :, 0, 0] == (255, 0, 0)).all(-1)
    assert brightest == (3, 5) and framed.tolist() == changed.tolist()
    assert np.array_equal(np.asarray(where_map(picture(), 0 * jsd, changed, 0.0))[:, -24 * 14 :][7, 7], grid[7, 7])


def test_a_layer_map_gives_each_layer_a_colour_of_its_own():
    layers = np.array([[22, 28], [28, 22]])
    grid = np.asarray(layer_map(layers))
    corners = grid[2 :: len(grid) // 2, 2 :: len(grid) // 2]
    assert (corners[0, 0] == corners[1, 1]).all() and (corners[0, 1] == corners[1, 0]).all()
    assert (corners[0, 0] != corners[0, 1]).any()


def test_tiles_make_a_grid_about_as_wide_as_high(tmp_path):
    paths: list[Path] = []
    for i in range(7):
        paths.append(tmp_path / f"{i}.png")
        save_image(picture(i), paths[-1])
    whole = tile(paths)
    assert whole.size == (3 * 64, 3 * 64)
    assert np.array_equal(np.asarray(whole)[64:128, :64], np.asarray(picture(3)))
