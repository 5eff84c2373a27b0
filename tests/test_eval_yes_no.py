import csv
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from conftest import GOLDEN
from janus.dola.cli import run_command
from tools import eval_yes_no
from tools.eval_yes_no import Counts, YesNo, count, draw_set, read_pope, says, says_caption


def run(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_yes_no", *map(str, options)])
    run_command(eval_yes_no.main)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes, there is a dog.", "yes"),
        ("No, there is none.", "no"),
        ("There is not a dog", "no"),
        ("no", "no"),
        ("Nothing of the kind", "yes"),
        ("Yes. There is no cat.", "yes"),
        ("", "yes"),
    ],
)
def test_an_answer_is_read_as_popes_evaluation_reads_it(text: str, read: str):
    assert says(text) == read


def test_a_caption_says_yes_where_it_names_the_thing():
    assert says_caption("a red star left of a blue cross", "blue cross") == "yes"
    assert says_caption("a red star left of a blue cross", "red cross") == "no"
    assert says_caption("a blue crossing", "blue cross") == "no"


def test_the_figures_are_those_of_their_definitions():
    labels = ["yes"] * 4 + ["no"] * 6
    said = ["yes", "yes", "yes", "no", "yes", "no", "no", "no", "no", "no"]
    counts = count(said, [YesNo(i, "", "", label) for i, label in enumerate(labels)])
    assert counts == Counts(yes_yes=3, yes_no=1, no_yes=1, no_no=5)
    accuracy, *others = counts.cells()
    assert accuracy.startswith("80.0 [") and others == ["75.0", "75.0", "75.0", "40.0"]
    assert Counts(0, 0, 2, 2).cells()[1:] == ["-", "0.0", "0.0", "0.0"]


def test_the_drawn_set_is_balanced_and_its_negatives_are_cut_as_popes(tmp_path):
    files = draw_set(tmp_path, 30, 0.0)
    read = {path.stem.removeprefix("drawings_pope_"): read_pope(path) for path in files}
    assert list(read) == ["random", "popular", "adversarial"]
    shown: dict[str, set] = {}
    for q in read["random"]:
        if q.label == "yes":
            shown.setdefault(q.image, set()).add(q.thing)
    often = Counter(thing for things in shown.values() for thing in things)
    for cut, questions in read.items():
        assert Counter(q.label for q in questions) == {"yes": 60, "no": 60}
        assert len({(q.image, q.thing) for q in questions}) == 120
        assert all((q.thing in shown[q.image]) == (q.label == "yes") for q in questions), cut
    for image, things in shown.items():
        rest = sorted((n for thing, n in often.items() if thing not in things), reverse=True)
        asked = [q.thing for q in read["popular"] if q.image == image and q.label == "no"]
        assert sorted((often[thing] for thing in asked), reverse=True) == rest[:2]
        beside = Counter(thing for other in shown.values() if other & things for thing in other - things)
        most = sorted((sum(len(o & things) for o in shown.values() if t in o) for t in beside), reverse=True)
        asked = [q.thing for q in read["adversarial"] if q.image == image and q.label == "no"]
        found = [sum(len(o & things) for o in shown.values() if t in o) for t in asked]
        assert found == [*most, 0, 0][:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2: expected"),
        ('{"image": "a.png", "text": "?"}', "line 2: expected"),
        ('{"image": "a.png", "text": "?", "label": "maybe"}', "line 2: 'label' must be yes or no, found 'maybe'"),
        ("{", "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, message: str):
    path = tmp_path / "pope.json"
    path.write_text('{"image": "a.png", "text": "?", "label": "Yes"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"pope\.json: ") as error:
        read_pope(path)
    assert message in str(error.value)


def test_popes_files_are_answered_in_both_forms(monkeypatch, capsys, tmp_path):
    Image.open(GOLDEN / "sample.png").save(tmp_path / "sample.png")
    lines = [
        {"question_id": 7 + i, "image": "sample.png", "text": f"Is there a {thing} in the image?", "label": label}
        for i, (thing, label) in enumerate((("dog", "yes"), ("cat", "no")))
    ]
    (tmp_path / "pope.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(monkeypatch, tmp_path / "pope.json", "--images", tmp_path, "--outdir", tmp_path / "out", "--max_new_tokens", 3,
        "--model", GOLDEN, "--device", "cpu", "--dtype", "float32")  # fmt: skip
    table = capsys.readouterr().out.splitlines()
    rows = ["baseline, sampled", "APC only, sampled", "DoLa, sampled", "greedy", "DoLa, greedy"]
    assert [line.split(" | ")[1] for line in table[2:]] == rows  # without a text encoder there is no fusion
    for row in ("baseline_sampled", "apc_only_sampled", "dola_sampled", "greedy", "dola_greedy"):
        given = [json.loads(line) for line in (tmp_path / "out" / f"pope_{row}.jsonl").read_text().splitlines()]
        assert [line["question_id"] for line in given] == [7, 8] and given[0]["question"] == lines[0]["text"]
        with (tmp_path / "out" / f"pope_{row}.tsv").open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        assert [line["answer"] for line in table] == ["Yes", "No"] and [line["index"] for line in table] == ["0", "1"]
        assert [line["prediction"] for line in table] == [line["answer"] for line in given]


def test_janus_tinys_captions_are_right_about_its_own_drawings(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--by_caption", "--count", 3, "--outdir", tmp_path, "--device", "cpu", "--dtype", "float32")
    table = capsys.readouterr().out.splitlines()[2:]
    assert len(table) == 3 * 6
    assert all(line.split(" | ")[2].startswith("100.0") and line.split(" | ")[6] == "50.0 |" for line in table)


def test_janus_tiny_answers_yes_or_no_better_than_chance(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--count", 12, "--outdir", tmp_path, "--device", "cpu", "--dtype", "float32")
    greedy = [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines() if " | greedy | " in line]
    lower_ends = [float(accuracy.partition("[")[2].partition(",")[0]) for accuracy in greedy]
    assert len(lower_ends) == 3 and min(lower_ends) > 50


def test_a_missing_image_ends_the_command_in_one_line(monkeypatch, capsys, tmp_path):
    path: Path = tmp_path / "pope.json"
    path.write_text('{"image": "a.png", "text": "?", "label": "yes"}\n')
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, path, "--outdir", tmp_path / "out")
    assert end.value.code == 2 and "a.png: file not found" in capsys.readouterr().err.splitlines()[-1]
