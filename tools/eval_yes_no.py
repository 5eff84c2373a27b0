"""POPE and its like: yes-or-no questions on images, with and without DoLa, and how often each decoding says yes.

    python -m tools.eval_yes_no coco_pope_random.json coco_pope_adversarial.json --images val2014 --model MODEL
    python -m tools.eval_yes_no

A file holds JSON lines {"question_id", "image", "text", "label": "yes" or "no"}. Without one, the tool draws a balanced
set of its own in POPE's three forms. Into --outdir go the answers, for each file and decoding: `.jsonl` as POPE's
evaluation takes them, `.tsv` as VLMEvalKit's does.
"""

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import manual_seed
from tqdm import tqdm

from inference import answer_batch, dola_keywords
from janus.dola.cli import CommandParser, add_model_arguments, positive, run_command
from janus.dola.files import load_image, parse_json, read_text, write_whole
from janus.dola.fusion import TowerPrior
from janus.dola.loading import load_pretrained_model
from janus.dola.rerank import build_text_bank, find_text_encoder, siglip_temperature
from janus.dola.switches import DoLaSwitches
from tools import scenes
from tools.eval_janus_tiny import markdown, percent
from tools.eval_understanding import take_picture

ASKED = re.compile(r"is there an? (.+?)(?: in the im\w+)?\?", re.IGNORECASE)
CAPTION = "What is in the image?"
FUSION = "fusion, greedy"
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}


class YesNo(NamedTuple):
    """A line of a POPE file."""

    question_id: Any
    image: str
    text: str
    label: str

    @property
    def thing(self) -> str | None:
        """What is asked for in "Is there a ... in the image?"; None for another question."""
        found = ASKED.search(self.text)
        return found[1] if found else None


def read_pope(path: Path) -> list[YesNo]:
    """Raises ValueError naming the file and the line."""
    questions = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        entry = parse_json(line, where := f"{path}: line {number}")
        if not isinstance(entry, dict) or not {"image", "text", "label"} <= entry.keys():
            raise ValueError(f'{where}: expected {{"question_id", "image", "text", "label"}}, found {entry!r}')
        label = f"{entry['label']}".lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: 'label' must be yes or no, found {entry['label']!r}")
        questions.append(YesNo(entry.get("question_id", number), f"{entry['image']}", f"{entry['text']}", label))
    if not questions:
        raise ValueError(f"{path}: no questions")
    return questions


# --- a set of drawings -----------------------------------------------------------------------------------------------


def draw_set(folder: Path, count: int, noise: float) -> list[Path]:
    """`count` drawings of two objects and POPE's three files on them: as many questions with no as with yes.

    Two objects of each drawing are asked for, and two that are not in it: at random, the most frequent in the set, or
    those that are most often beside its own. Some objects are drawn far more often than others.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    things = [(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES]
    weight = 1.0 / (1.0 + rng.permutation(len(things)))
    drawn = [
        scenes.Scene(
            tuple(things[k] for k in rng.choice(len(things), 2, replace=False, p=weight / weight.sum())),
            background=str(rng.choice(list(scenes.BACKGROUNDS))),
            relation=str(rng.choice(list(scenes.RELATIONS))),
        )
        for _ in range(count)
    ]
    often = Counter(thing for scene in drawn for thing in scene.objects)
    beside = Counter(pair for scene in drawn for pair in permutations(scene.objects, 2))
    lines: dict[str, list[str]] = {"random": [], "popular": [], "adversarial": []}
    for i, scene in enumerate(drawn):
        take_picture(scene, rng, noise).save(folder / "images" / f"{i:04d}.png")
        absent = [things[k] for k in rng.permutation(len(things)) if things[k] not in scene.objects]
        ranks = {
            "random": lambda thing: 0,
            "popular": lambda thing: -often[thing],
            "adversarial": lambda thing, own=scene.objects: -sum(beside[thing, other] for other in own),
        }
        for cut, rank in ranks.items():
            for thing, label in (
                *((t, "yes") for t in scene.objects),
                *((t, "no") for t in sorted(absent, key=rank)[:2]),
            ):
                text = f"Is there a {' '.join(thing)} in the image?"
                entry = {"question_id": len(lines[cut]) + 1, "image": f"{i:04d}.png", "text": text, "label": label}
                lines[cut].append(json.dumps(entry) + "\n")
    paths = {cut: folder / f"drawings_pope_{cut}.json" for cut in lines}
    for cut, path in paths.items():
        path.write_text("".join(lines[cut]), encoding="utf-8")
    return list(paths.values())


# --- answers ---------------------------------------------------------------------------------------------------------


def says(text: str) -> str:
    """What POPE's evaluation reads in an answer: no where its first sentence has the word no or not, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def says_caption(text: str, thing: str) -> str:
    return "yes" if re.search(rf"\b{re.escape(thing)}\b", text) else "no"


def decodings(switches: DoLaSwitches) -> dict[str, dict[str, Any]]:
    """Row -> what `answer_batch` takes."""
    dola = dola_keywords(switches)
    return {
        "baseline, sampled": SAMPLING,
        "APC only, sampled": SAMPLING | {"dola": dola | {"gamma": 0.0}},
        "DoLa, sampled": SAMPLING | {"dola": dola},
        "greedy": {},
        "DoLa, greedy": {"dola": dola},
        FUSION: {"dola": dola},
    }


class Counts(NamedTuple):
    """How often yes and no were said to questions whose label is yes, and to those whose label is no."""

    yes_yes: int
    yes_no: int
    no_yes: int
    no_no: int

    def cells(self) -> list[str]:
        """Accuracy with its interval, precision, recall, F1 of yes, and the share of yes, in %."""
        tp, fp, fn, tn = self
        ratios = [
            (tp, tp + fp),
            (tp, tp + fn),
            (2 * tp, 2 * tp + fp + fn),
            (tp + fp, sum(self)),
        ]
        return [percent((tp + tn, sum(self))), *(f"{100 * a / b:.1f}" if b else "-" for a, b in ratios)]


def count(said: Sequence[str], questions: Sequence[YesNo]) -> Counts:
    pairs = Counter((given, question.label) for given, question in zip(said, questions, strict=True))
    return Counts(*(pairs[given, label] for given in ("yes", "no") for label in ("yes", "no")))


def write_answers(path: Path, questions: Sequence[YesNo], texts: Sequence[str], category: str) -> None:
    """`path` with .jsonl and .tsv behind it."""
    lines = "".join(
        json.dumps({"question_id": q.question_id, "question": q.text, "answer": text}, ensure_ascii=False) + "\n"
        for q, text in zip(questions, texts, strict=True)
    )
    write_whole(path.with_name(f"{path.name}.jsonl"), lambda file: file.write_text(lines, encoding="utf-8"))

    def write_table(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table, delimiter="\t", lineterminator="\n")
            writer.writerow(["index", "image_path", "question", "answer", "category", "prediction"])
            for i, (q, text) in enumerate(zip(questions, texts, strict=True)):
                writer.writerow([i, q.image, q.text, q.label.capitalize(), category, text])

    write_whole(path.with_name(f"{path.name}.tsv"), write_table)


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="POPE's files (default: a set of drawings)")
    add("--images", type=Path, help="the folder of the images (default: images/ beside the first file)")
    add("--outdir", type=Path, default=Path("outputs/yes_no"), help="where answers go (default: %(default)s)")
    add("--config", help="switches that hold the layers and alphas (default: 0.8 of the depth, 0.1)")
    add("--text_encoder", help="SiglipModel for fusion: directory or hub id (default: siglip/ in --model)")
    add("--by_caption", action="store_true", help="ask for a caption, and read yes where it names the thing asked for")
    add("--count", type=positive, default=200, help="drawings of the tool's own set (default: %(default)s)")
    add("--noise", type=float, default=0.0, help="grey levels of noise on the drawings (default: %(default)s)")
    add("--batch_size", type=positive, default=16, help="questions decoded together (default: %(default)s)")
    add("--max_new_tokens", type=positive, default=20, help="longest answer (default: %(default)s)")
    add_model_arguments(parser)
    args = parser.parse_args()
    files = args.files or draw_set(args.outdir, args.count, args.noise)
    images = args.images or files[0].parent / "images"
    asked = {path: read_pope(path) for path in files}
    switches = DoLaSwitches.from_json(args.config) if args.config else DoLaSwitches()
    for path, question in ((path, question) for path, questions in asked.items() for question in questions):
        load_image(images / question.image)
        if args.by_caption and question.thing is None:
            raise ValueError(f'{path}: question {question.question_id}: expected "Is there a ... in the image?"')
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device, args.quantize, args.offload)
    rows = decodings(switches)
    things = sorted({question.thing for questions in asked.values() for question in questions if question.thing})
    bank, tau = None, 1.0
    if things and (args.text_encoder or (Path(args.model) / "siglip").is_dir()):
        siglip, tokenizer = find_text_encoder(args.model, args.text_encoder)
        bank, tau = build_text_bank(siglip, tokenizer, things), siglip_temperature(siglip)
    else:
        del rows[FUSION]
    args.outdir.mkdir(parents=True, exist_ok=True)
    once = list(dict.fromkeys((q.image, CAPTION if args.by_caption else q.text) for qs in asked.values() for q in qs))
    table: dict[Path, list[list[str]]] = {path: [] for path in asked}
    for row, options in rows.items():
        told: dict[tuple[str, str], str] = {}
        for start in tqdm(range(0, len(once), args.batch_size), desc=row):
            some = once[start : start + args.batch_size]
            prior = TowerPrior(switches, [things] * len(some), [bank] * len(some), tau) if row == FUSION else None
            manual_seed(start)
            answers = answer_batch(
                model,
                processor,
                [([images / image], text) for image, text in some],
                prior=prior,
                max_new_tokens=args.max_new_tokens,
                **options,
            )
            told |= {key: answer.text.strip() for key, answer in zip(some, answers, strict=True)}
        for path, questions in asked.items():
            if args.by_caption:
                texts = [says_caption(told[q.image, CAPTION], q.thing or "") for q in questions]
            else:
                texts = [told[q.image, q.text] for q in questions]
            name = f"{path.stem}_{re.sub('[^a-z]+', '_', row.lower())}"
            write_answers(args.outdir / name, questions, texts, path.stem)
            table[path].append([path.stem, row, *count([says(text) for text in texts], questions).cells()])
    header = ["questions", "decoding", "accuracy", "precision", "recall", "F1", "share of yes"]
    print(markdown(header, [line for lines in table.values() for line in lines]))


if __name__ == "__main__":
    run_command(main)
