"""Measures what janus-tiny reads, baseline against DoLa against fusion: `python -m tools.eval_understanding`.

Every row answers the same questions on the same drawings. Fusion gets the words that a kind of question may be answered
with as candidates for the tower; a relation ("What is above the red circle?") gets the colours, since every answer to
it begins with "a". Kinds whose words the tower never learned alone (background, size, count) are left out. Intervals
are Wilson's, at 95%.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dola_runtime import DEFAULT_ALPHA
from inference import answer, answer_with_dola, answer_with_dola_static, answer_with_switches, is_right
from janus.dola.cli import JANUS_TINY
from janus.dola.loading import load_pretrained_model
from janus.dola.rerank import (
    build_text_bank,
    find_text_encoder,
    rerank_with_dola_siglip,
    rerank_with_dola_static_siglip,
    siglip_temperature,
    tower_depth,
    vision_layer,
)
from janus.dola.switches import DoLaSwitches
from tools import scenes
from tools.eval_janus_tiny import GRAMMAR, SPLITS, Rate, markdown, percent, sample_scenes
from tools.scenes import Scene

CANDIDATES = {"colour": tuple(scenes.COLOURS), "shape": scenes.SHAPES, "relation": tuple(scenes.COLOURS)}
LAMBDAS = (0.0, 0.3, 0.7, 1.0)


def take_picture(scene: Scene, rng: np.random.Generator, noise: float) -> Image.Image:
    """A drawing with Gaussian noise of so many grey levels on every pixel and channel."""
    drawing = scenes.draw(scene, rng)
    grain = rng.spawn(1)[0].normal(0, noise, drawing.shape)  # its own stream: the scenes drawn do not depend on it
    return Image.fromarray((drawing + grain).clip(0, 255).round().astype(np.uint8))


def sample_questions(count: int, noise: float) -> list[dict[str, Any]]:
    """`count` questions of each split on fresh drawings, of the kinds that have candidates."""
    asked = []
    for split, in_split in SPLITS.items():
        rng = np.random.default_rng(4)
        for scene in sample_scenes(in_split, count, seed=4):
            about = [(kind, q, a) for kind, q, a in scenes.questions(scene) if kind in CANDIDATES]
            kind, question, expected = about[rng.integers(len(about))]
            image = take_picture(scene, rng, noise)
            asked.append({"split": split, "kind": kind, "image": image, "question": question, "expected": expected})
    return asked


def question_rows(model, processor, siglip, tokenizer, switches: DoLaSwitches) -> dict[str, Callable[..., Any]]:
    """The ways to answer, by the name of their row."""
    banks = {kind: build_text_bank(siglip, tokenizer, words) for kind, words in CANDIDATES.items()}
    num_layers = len(model.language_model.model.layers)

    def fused(**changes) -> Callable[..., Any]:
        miss = changes.pop("miss", None)
        changed = replace(switches, **changes)

        def answer_question(kind: str, image: Image.Image, question: str) -> Any:
            vision = {
                "candidates": CANDIDATES[kind],
                "text_bank": banks[kind],
                "tau": siglip_temperature(siglip),
                "miss": miss,
            }
            return answer_with_switches(model, processor, image, question, changed, **vision, max_new_tokens=20)

        return answer_question

    def plain(function: Callable, **options) -> Callable[..., Any]:
        return lambda kind, *asked: function(model, processor, *asked, max_new_tokens=20, **options)

    rows = {
        "baseline": plain(answer),
        "DoLa": plain(answer_with_dola_static, layer=switches.fixed_layer_llm, alpha=switches.alpha_L),
        "early exit": plain(answer_with_dola, candidate_layers=range(1, num_layers), alpha=switches.alpha_L),
    }
    rows |= {f"fused, lambda {weight:g}": fused(lambda_mm=weight) for weight in LAMBDAS}
    usual = f"fused, lambda {switches.lambda_mm:g}"
    rows[f"{usual}, miss 0"] = fused(miss=0.0)
    rows[f"{usual}, miss -inf"] = fused(miss=-math.inf)
    rows[f"{usual}, no DoLa in the tower"] = fused(use_dola_siglip_static=False)
    rows[f"{usual}, no DoLa on lm_head"] = fused(use_dola_lm_static=False)
    return rows


def tower_table(
    model, processor, siglip, tokenizer, switches: DoLaSwitches, count: int, noise: float
) -> dict[str, dict[str, Rate]]:
    """What the tower ranks first: row -> split -> how often it is true of the drawing."""
    tower, tau = model.vision_model.vision_tower, siglip_temperature(siglip)
    depth = tower_depth(tower)
    rates: dict[str, dict[str, Rate]] = {}
    for split in SPLITS:
        rng, shown = np.random.default_rng(3), sample_scenes(SPLITS[split], count, seed=3)
        images = processor.image_processor([take_picture(scene, rng, noise) for scene in shown])
        captions = [scene.caption for scene in GRAMMAR[split.split(",")[0]]]
        groups = {
            "captions": (captions, [{scene.caption} for scene in shown]),
            "colours": (list(scenes.COLOURS), [{colour for colour, _ in scene.objects} for scene in shown]),
            "shapes": (list(scenes.SHAPES), [{shape for _, shape in scene.objects} for scene in shown]),
        }
        for group, (texts, true) in groups.items():
            bank = build_text_bank(siglip, tokenizer, texts)
            ranked = {"baseline": rerank_with_dola_static_siglip(tower, images, bank, depth, tau=tau)}
            for layer in range(1, depth):
                ranked[f"DoLa layer {layer}"] = rerank_with_dola_static_siglip(tower, images, bank, layer, tau=tau)
            for alpha in (0.3, 0.5, 0.8):
                p_hat = rerank_with_dola_static_siglip(tower, images, bank, vision_layer(tower, switches), alpha, tau)
                ranked[f"DoLa layer {vision_layer(tower, switches)}, alpha {alpha}"] = p_hat
            ranked["early exit"], _ = rerank_with_dola_siglip(
                tower, images, bank, tau=tau, candidate_layers=range(1, depth)
            )
            for row, p_hat in ranked.items():
                right = sum(texts[k] in words for k, words in zip(p_hat.argmax(-1).tolist(), true, strict=True))
                rates.setdefault(f"{group}, {row}", {})[split] = (right, count)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(JANUS_TINY))
    parser.add_argument("--config", help="switches that hold the layers and alphas (default: 0.8 of the depth, 0.1)")
    parser.add_argument("--count", type=int, default=120, help="drawings, and questions, per split")
    parser.add_argument("--noise", type=float, default=0.0, help="grey levels (0 to 255) of noise on the drawings")
    parser.add_argument("--json", type=Path, help="where to write the counts behind the tables")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model, "float32", "cpu")
    siglip, tokenizer = find_text_encoder(args.model, None)
    switches = DoLaSwitches.from_json(args.config) if args.config else DoLaSwitches(alpha_V=DEFAULT_ALPHA)
    found = {
        "tower": tower_table(model, processor, siglip, tokenizer, switches, args.count, args.noise),
        "questions": {},
        "changed": {},
    }

    asked = sample_questions(args.count, args.noise)
    given: dict[str, list[str]] = {}
    for name, answer_question in tqdm(
        question_rows(model, processor, siglip, tokenizer, switches).items(), desc="questions"
    ):
        given[name] = [answer_question(q["kind"], q["image"], q["question"]) for q in asked]
        rates: dict[str, Rate] = {}
        for q, text in zip(asked, given[name], strict=True):
            for column in (q["split"], q["kind"]):
                right, trials = rates.get(column, (0, 0))
                rates[column] = (right + is_right(text, q["expected"]), trials + 1)
        found["questions"][name] = rates
        found["changed"][name] = sum(a != b for a, b in zip(given[name], given["baseline"], strict=True))
    assert given["fused, lambda 0"] == given["DoLa"]

    tower = [[row, *map(percent, rates.values())] for row, rates in found["tower"].items()]
    columns = [column for column in (*SPLITS, *CANDIDATES) if column in found["questions"]["baseline"]]
    questions = [
        [row, *(percent(rates[column]) for column in columns), str(found["changed"][row])]
        for row, rates in found["questions"].items()
    ]
    used = {
        "fixed_layer_vit": vision_layer(model.vision_model.vision_tower, switches),
        "tau": round(siglip_temperature(siglip), 4),
    }
    used |= {name: value for name, value in asdict(switches).items() if value is not None}
    if args.json:
        args.json.write_text(json.dumps(found | {"used": used}, indent=1) + "\n", encoding="utf-8")
    print(f"With {json.dumps(used)}; {args.count} drawings a split, noise of {args.noise:g}, the same in every row.\n")
    print("Tower: share of drawings of which the text ranked first is true, %\n")
    print(markdown(["", *SPLITS], tower), "\n")
    print("Questions: share answered word for word (greedy), %; and how many answers are others than the baseline's\n")
    print(markdown(["", *columns, "others"], questions))


if __name__ == "__main__":
    main()
