"""Draws held-out scenes as inputs of the layer search: `python -m tools.make_validation_sets`.

Writes `image.jsonl`, `answers.jsonl` and `tower.jsonl`, each line with the field `kind`, and the drawings in `images/`;
and `prompts.jsonl` to paint, scenes of both kinds that janus-tiny was trained on and that it was not (`kind`, `seen`).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tools import scenes

PROMPTS = {("one object", "seen"): 71, ("one object", "held out"): 29, ("two objects", "seen"): 70,
           ("two objects", "held out"): 70}  # fmt: skip
"""How many to paint of each kind; the 29 are all that there are."""

ONE, TWO = (
    [scene for scene in of_kind if scenes.is_held_out(scene)]
    for of_kind in (scenes.one_object_scenes(), scenes.two_object_scenes())
)


def prompts_to_paint() -> list[dict[str, str]]:
    rng, lines = np.random.default_rng(1), []
    drawn = {"one object": scenes.one_object_scenes(), "two objects": scenes.two_object_scenes()}
    for (kind, name), count in PROMPTS.items():
        split = [scene.caption for scene in drawn[kind] if scenes.is_held_out(scene) == (name == "held out")]
        lines += [{"prompt": text, "kind": kind, "seen": name} for text in rng.permutation(split)[:count].tolist()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outdir", type=Path, default=Path("build/validation"), help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=300, help="drawings, every third of one object (default: 300)")
    args = parser.parse_args()
    (args.outdir / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    around = range(-scenes.JITTER, scenes.JITTER + 1)
    two, one = (
        rng.permutation([(k, dx, dy) for k in range(len(of_kind)) for dx in around for dy in around]).tolist()
        for of_kind in (TWO, ONE)
    )
    lines: dict[str, list[dict[str, str]]] = {"image": [], "answers": [], "tower": [], "prompts": prompts_to_paint()}
    for i in range(args.count):  # no drawing twice
        k, dx, dy = (one if i % 3 == 0 else two).pop()
        scene = (ONE if i % 3 == 0 else TWO)[k]
        file, objects = f"images/{i:04d}.png", "one object" if scene.size else "two objects"
        Image.fromarray(scenes.render(scene, dx, dy)).save(args.outdir / file)
        asked = scenes.questions(scene)
        about, question, answer = asked[rng.integers(len(asked))]
        lines["image"].append({"prompt": scene.caption, "image": file, "kind": objects})
        lines["answers"].append({"question": question, "answer": answer, "image": file, "kind": about})
        lines["tower"].append({"image": file, "caption": scene.caption, "kind": objects})
    for task, entries in lines.items():
        (args.outdir / f"{task}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    print(f"{args.count} drawings: {args.outdir}")


if __name__ == "__main__":
    main()
