"""Decodings compared on painted directories: the sums, the command, and results of benchmarks read back."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from painted_run import VARIANTS, make_painted
from PIL import Image

from generation_inference import Decoding
from janus.dola.cli import run_command
from janus.dola.compare import __main__ as command
from janus.dola.compare.report import tables
from janus.dola.compare.results import read_results
from janus.dola.compare.summary import agreement, compare, judge_choices, sampled_alike
from janus.dola.prompt_files import Prompt

PROMPTS = [Prompt(f"prompt {i}", {"kind": "odd" if i % 2 else "even"}) for i in range(24)]


def fields(**decodings: Decoding) -> dict[str, dict]:
    return {name: vars(decoding) for name, decoding in decodings.items()}


def scored(count: int = 60, **gains: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, count)
    return np.stack([base + gain + rng.normal(0, 0.05, count) for gain in gains.values()], axis=1)


# --- the sums --------------------------------------------------------------------------------------------------------


def test_a_row_is_the_mean_and_the_paired_difference_with_prompts_better_and_worse():
    variants = fields(baseline=Decoding(), apc=Decoding(gamma=0.0), layer2=Decoding((2,)), layer4=Decoding((4,), 0.5))
    scores = scored(baseline=0, apc=0.1, layer2=0.5, layer4=-0.2)
    (group,) = compare(variants, scores)
    rows = {row["variant"]: row for row in group["rows"]}
    assert group["prompts"] == 60 and list(rows) == list(variants)
    for i, name in enumerate(variants):
        assert rows[name]["mean"] == pytest.approx(scores[:, i].mean())
    difference = scores[:, 2] - scores[:, 0]
    assert rows["layer2"]["over_baseline"][0] == pytest.approx(difference.mean())
    assert (rows["layer2"]["wins"], rows["layer2"]["losses"]) == ((difference > 0).sum(), (difference < 0).sum())
    assert rows["layer2"]["over_apc_only"][0] == pytest.approx((scores[:, 2] - scores[:, 1]).mean())
    assert rows["layer4"]["over_apc_only"] is None, "there is no mask of alpha 0.5"
    assert rows["baseline"]["over_baseline"] is None and rows["apc"]["over_apc_only"] is None
    assert group["held_out"]["chosen"] == ["layer2", "layer2"] and group["held_out"]["better"]


def test_each_guidance_and_temperature_has_a_baseline_of_its_own():
    variants = fields(
        a=Decoding(cfg_weight=1.0),
        b=Decoding((2,), cfg_weight=1.0),
        c=Decoding(cfg_weight=3.0),
        d=Decoding((2,), cfg_weight=3.0),
    )
    assert list(sampled_alike(variants).values()) == [["a", "b"], ["c", "d"]]
    one, three = compare(variants, scored(a=0, b=0.5, c=10, d=9.5))
    assert one["rows"][1]["over_baseline"][0] == pytest.approx(0.5, abs=0.05)
    assert three["rows"][1]["over_baseline"][0] == pytest.approx(-0.5, abs=0.05)
    assert one["held_out"] is None, "without the mask no contrast is judged"


def test_a_prompt_without_a_score_under_some_variant_counts_nowhere():
    scores = scored(baseline=0, layer2=1)
    scores[3, 1] = np.nan
    (group,) = compare(fields(baseline=Decoding(), layer2=Decoding((2,))), scores)
    assert group["prompts"] == 59 and group["rows"][0]["mean"] == pytest.approx(np.delete(scores[:, 0], 3).mean())
    with pytest.raises(ValueError, match="no prompt is scored under every variant"):
        compare(fields(baseline=Decoding(), layer2=Decoding((2,))), np.full((5, 2), np.nan))


def test_a_column_splits_the_prompts():
    variants, columns = fields(baseline=Decoding(), layer2=Decoding((2,))), ["x"] * 20 + ["y"] * 40
    scores = scored(baseline=0, layer2=0)
    scores[:20, 1] += 1
    (group,) = compare(variants, scores, columns)
    assert {value: part["prompts"] for value, part in group["by"].items()} == {"x": 20, "y": 40}
    x, y = (part["rows"][1]["over_baseline"] for part in group["by"].values())
    assert x[1] > 0.9 and abs(y[0]) < 0.05


def test_without_apc_only_the_table_says_what_to_paint():
    (group,) = compare(fields(baseline=Decoding(), layer2=Decoding((2,))), scored(baseline=0, layer2=0))
    text = tables({"scorers": {"s": [group]}}, {"baseline": "b", "layer2": "l"})
    assert "| APC only | not painted: add apc to --compare |" in text


def test_agreement_is_the_share_of_pairs_ranked_alike():
    truth = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    scores = np.array([[3.0, 2.0, 4.0], [0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
    found = agreement(scores, truth)  # right, wrong; tie, right; none to tell apart
    assert found is not None and found[0] == pytest.approx(2.5 / 4) and found[1] <= found[0] <= found[2]
    assert agreement(scores[2:], truth[2:]) is None
    tells_apart, tells_nothing = np.array([[1.0, 0.0, 0.0]]), np.ones((1, 3))
    truth = np.vstack([tells_apart] * 9 + [tells_nothing] * 20)
    found = agreement(np.vstack([truth[:8], scores[:1], truth[9:]]), truth)  # wrong in one of eighteen pairs
    assert found is not None and found[2] == 1.0


def test_choices_are_judged_by_the_referee():
    truth = np.array([[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    by = {"good": truth * 2 + 1, "bad": -truth, "referee": truth}
    rows = {row["chooser"]: row for row in judge_choices(fields(baseline=Decoding()), by, "referee")["baseline"]}
    assert {name: row["mean"] for name, row in rows.items()} == {
        "the first": 0.25,
        "good": 0.75,
        "bad": 0,
        "referee": 0.75,
    }
    assert (
        rows["good"]["over_first"][0] == 0.5 and rows["good"]["agreement"][0] == 1 and rows["bad"]["agreement"][0] == 0
    )


# --- the command -----------------------------------------------------------------------------------------------------

calls: list[int] = []


def brightness(images, prompts) -> list[float]:
    calls.append(len(images))
    return [float(np.asarray(image, dtype=float).mean()) for image in images]


def darkness(images, prompts) -> list[float]:
    return [-score for score in brightness(images, prompts)]


BRIGHTNESS, DARKNESS = f"{__name__}:brightness", f"{__name__}:darkness"


def run_compare(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, options)])
    run_command(command.main)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_painted_directory_is_scored_once_and_compared(tmp_path, monkeypatch, capsys):
    painted = make_painted(tmp_path, PROMPTS, parallel_size=2)
    options = [tmp_path, "--scorer", BRIGHTNESS, "--by", "kind", "--referee", DARKNESS]
    run_compare(monkeypatch, *options)
    out = tmp_path / "compare"
    found = json.loads((out / "compare.json").read_text())
    (group,) = found["scorers"][BRIGHTNESS]
    for row in group["rows"]:
        assert row["mean"] == pytest.approx(
            np.mean([p.mean() for (_, v, _), p in painted.items() if v == row["variant"]]), rel=1e-5
        )
    assert group["by"].keys() == {"odd", "even"} and group["held_out"]["chosen"] == ["layer2", "layer2"]
    assert found["choices"]["apc"][1]["over_first"][0] < 0, "the brightest are what the referee likes least"
    text = (out / "compare.md").read_text()
    assert text in capsys.readouterr().out and "kind odd (12 prompts)" in text and "Choosing the best of 2" in text
    assert Image.open(out / "compare.png").width > 400
    gains = {i: painted[i, "layer2", 0].mean() + painted[i, "layer2", 1].mean()
             - painted[i, "baseline", 0].mean() - painted[i, "baseline", 1].mean() for i in range(24)}  # fmt: skip
    assert max(gains.values()) > 0 > min(gains.values())
    assert Image.open(out / "extremes.png").height > 4 * 300

    whole, before = contents(out), len(calls)
    run_compare(monkeypatch, *options)
    assert contents(out) == whole and len(calls) == before, "nothing is scored again"
    log = out / "scores.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:16]))
    run_compare(monkeypatch, *options)
    assert contents(out) == whole and len(calls) == before + 2 * 8


def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch, capsys):
    def refused(*options: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_compare(monkeypatch, *options)
        said = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and len(said[-1]) < 400
        return said[-1]

    whole, half = tmp_path / "whole", tmp_path / "half"
    make_painted(whole, PROMPTS[:3])
    make_painted(half, PROMPTS[:3], finish=False)
    assert "1 of 3 prompts are not painted yet" in refused(half)
    assert "file not found" in refused(tmp_path / "nothing")
    assert "expected caption, vqa, tower, or module:function" in refused(whole, "--scorer", "clip")
    assert "has a column 'colour'" in refused(whole, "--scorer", BRIGHTNESS, "--by", "colour")
    assert "needs several images" in refused(whole, "--scorer", BRIGHTNESS, "--referee", DARKNESS)
    assert "expected VARIANT=FILE" in refused(whole, "--results", "x")
    assert "no variant 'x'" in refused(whole, "--results", "x=y")
    run_file = whole / "run.json"
    run = json.loads(run_file.read_text())
    for change in (
        {"variants": []},
        {"variants": {"baseline": {}}},
        {"variants": {"../x": run["settings"]["variants"]["apc"], "apc": run["settings"]["variants"]["apc"]}},
        {"parallel_size": 0},
        {"parallel_size": True},
        {"scorer": "caption"},
        {"format": "exe"},
    ):
        run_file.write_text(json.dumps(run | {"settings": run["settings"] | change}))
        assert str(run_file) in refused(whole, "--scorer", BRIGHTNESS)
    run_file.write_text(json.dumps(run | {"log": "answers.jsonl"}))
    assert "describes no painting run" in refused(whole)
    run_file.write_text(json.dumps(run))
    run_compare(monkeypatch, whole, "--scorer", BRIGHTNESS)
    assert "holds a run with other settings (scorers)" in refused(whole, "--scorer", DARKNESS)


# --- results of benchmarks -------------------------------------------------------------------------------------------


def test_genevals_results_are_read_by_folder_and_number(tmp_path):
    rest = {"tag": "counting", "reason": "", "prompt": "p", "metadata": "{}", "details": "{}"}
    lines = [
        {"filename": f"/x/geneval/apc/{i:05d}/samples/{n:04d}.png", "correct": (i + n) % 3 == 0} | rest
        for i in range(3)
        for n in range(2)
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines[::-1])) + "\n")
    assert read_results(tmp_path / "results.jsonl", ["a", "b", "c"], 2).tolist() == [[1, 0], [0, 0], [0, 1]]


def test_geneval2s_lists_are_means_of_the_first_image(tmp_path):
    (tmp_path / "r.json").write_text("[[1, 0.5], [0, 0, 1]]")
    scores = read_results(tmp_path / "r.json", ["a", "b"], 2)
    assert scores[:, 0] == pytest.approx([0.75, 1 / 3]) and np.isnan(scores[:, 1]).all()


def test_t2i_compbenchs_answers_are_read_by_question(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([{"question_id": i, "answer": f"{i / 10}"} for i in (3, 0, 1)]))
    scores = read_results(tmp_path / "r.json", ["a", "b"], 2)
    assert scores[0].tolist() == [0, 0.1] and scores[1, 1] == 0.3 and np.isnan(scores[1, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no results"),
        ("[]", "no results"),
        ('{"filename": "x.png", "correct": true}', "entry 0: expected {"),
        ('{"filename": "00000/samples/0000.png", "correct": 1}', "entry 0: expected {"),
        ('{"filename": "00009/samples/0000.png", "correct": true}', "prompt 9, image 0"),
        ("[[1], [2], [3]]", "prompt 2, image 0"),
        ("[[1], []]", "score nan"),
        ("[[1], 2]", "entry 0: expected {"),
        ('[{"question_id": "x", "answer": "1"}]', "entry 0: expected {"),
        ("nothing", "line 1: not JSON"),
    ],
)
def test_other_files_are_refused_by_their_entry(tmp_path, text, message):
    (tmp_path / "r").write_text(text)
    with pytest.raises(ValueError, match="^" + str(tmp_path / "r")) as error:
        read_results(tmp_path / "r", ["a", "b"], 2)
    assert message in str(error.value)


def test_results_stand_beside_the_scorers(tmp_path, monkeypatch):
    make_painted(tmp_path, PROMPTS)
    options: list[object] = []
    for k, name in enumerate(VARIANTS):
        (tmp_path / f"{name}.json").write_text(json.dumps([[k] for _ in PROMPTS]))
        options += ["--results", f"{name}={tmp_path / name}.json"]
    run_compare(monkeypatch, tmp_path, *options)
    found = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert [row["mean"] for row in found["scorers"]["results"][0]["rows"]] == [0, 1, 2]
