"""README.md and its translation say the same, and what they point at is there."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janus.dola.question_files import read_questions
from janus.dola.switches import DoLaSwitches
from tools import scenes
from tools.run_readme import READMES, ROOT, read_commands

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
EXAMPLES = ROOT / "examples"


def prose(text: str) -> str:
    return FENCED.sub("", text)


def sections(text: str) -> list[str]:
    return re.split(r"^#+ ", prose(text), flags=re.MULTILINE)


def numbers(text: str) -> Counter[str]:
    """All figures, with their signs."""
    return Counter(re.findall(r"[-+]?\d+(?:[.,]\d+)*%?", text))


def links(text: str) -> list[str]:
    """Targets in order; of those within the page only that they are there, and of the other language nothing."""
    targets = ["#" if target.startswith("#") else target for target in LINK.findall(prose(text))]
    return [target for target in targets if target not in READMES]


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them in addresses."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in HEADING.findall(prose(text))}


def test_both_have_the_same_headings_and_code_blocks_in_order():
    levels = [[level for level, _ in HEADING.findall(prose(text))] for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    assert FENCED.findall(ENGLISH) == FENCED.findall(CHINESE)


def test_each_section_has_the_same_figures_in_both():
    for english, chinese in zip(sections(ENGLISH), sections(CHINESE), strict=True):
        assert numbers(english) == numbers(chinese), english.splitlines()[0]


def test_both_have_the_same_lines_so_that_a_figure_stands_at_the_same_place():
    empty = [[not line for line in text.splitlines()] for text in (ENGLISH, CHINESE)]
    assert empty[0] == empty[1]


def test_both_link_to_the_same_pages_and_pictures_and_to_each_other():
    assert links(ENGLISH) == links(CHINESE)
    assert READMES[1] in LINK.findall(ENGLISH) and READMES[0] in LINK.findall(CHINESE)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=READMES)
def test_the_contents_name_every_section_below_them(text):
    contents = next(section for section in sections(text) if section.count("](#") > 1)
    below = prose(text).split(contents)[1]
    named = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", contents)
    assert [title for title, _ in named] == [title for _, title in HEADING.findall(below)]
    assert {anchor for _, anchor in named} == anchors(below)


@pytest.mark.parametrize("page", [*READMES, *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))])
def test_a_page_links_to_files_and_headings_that_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in LINK.findall(prose(text)):
        file, _, anchor = target.partition("#")
        if not file.startswith("http"):
            path = (ROOT / page).parent / file if file else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_page_of_docs_is_reached_from_the_readme():
    reached: set[Path] = set()
    new = {ROOT / "README.md"}
    while new:
        reached |= new
        linked = [(page.parent, link) for page in new for link in LINK.findall(page.read_text(encoding="utf-8"))]
        found = {(folder / link.partition("#")[0]).resolve() for folder, link in linked}
        new = {page for page in found if page.suffix == ".md" and page.is_file()} - reached
    assert set(ROOT.glob("docs/*.md")) <= reached


def test_the_files_that_commands_read_are_there():
    commands = [command.text for command in read_commands([ENGLISH])]
    named = {name for text in commands for name in re.findall(r"\b(?:examples|demo|janus)/[\w/.-]+", text)}
    assert len(named) >= 8 and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_ci_installs_by_the_lines_of_the_readme():
    commands = [part for command in read_commands([ENGLISH]) for part in command.text.split(" && ")]
    installs = {command for command in commands if command.startswith("pip install")}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("--quiet ", "")
    others = {install for install in installs if install not in ci}
    assert others == {"pip install -e '.[web]'", "pip install torchao bitsandbytes"}  # pinned in requirements-dev.txt
    assert ci.index("python -m pytest -q\n") < ci.index("python -m tools.run_readme\n")


# --- the examples ----------------------------------------------------------------------------------------------------


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def drawn() -> dict[str, scenes.Scene]:
    """What each picture of examples/ shows, read from its pixels."""
    return {path.name: scenes.judge(np.asarray(Image.open(path)))[0] for path in EXAMPLES.glob("*.png")}


def test_captions_and_prompts_of_the_examples_are_those_of_their_pictures(drawn):
    assert {line["image"]: line["caption"] for line in read_lines("tower.jsonl")} == {
        name: scene.caption for name, scene in drawn.items()
    }
    assert {line["image"]: line["prompt"] for line in read_lines("image.jsonl")} == {
        name: scene.caption for name, scene in drawn.items()
    }


def test_answers_of_the_examples_are_true_of_their_pictures(drawn):
    asked = [(line["image"], line["question"], line["answer"]) for line in read_lines("answers.jsonl")]
    asked += [(q.images[0], q.turns[-1], q.expected) for q in read_questions(EXAMPLES / "questions.json") if q.expected]
    assert len(asked) >= 8
    for image, question, answer in asked:
        assert (question, answer) in [of_scene[1:] for of_scene in scenes.questions(drawn[image])]


def test_the_example_switches_name_every_switch(tmp_path):
    switches = DoLaSwitches.from_json(EXAMPLES / "switches.json", "shapes")
    switches.to_json(tmp_path / "all.json")
    read = [json.loads(path.read_text()) for path in (EXAMPLES / "switches.json", tmp_path / "all.json")]
    assert list(read[0]) == [*read[1], "domains"]
