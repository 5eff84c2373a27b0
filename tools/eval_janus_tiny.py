"""Measures janus-tiny on drawn scenes, baseline against DoLa: `python -m tools.eval_janus_tiny`.

Images are judged by `tools.scenes.judge`: a prompt is met exactly when the nearest scene of the whole grammar is the
prompt's own, and met clean when the image is also no further from it than `tools.scenes.CLEAN`. All rows of a table
paint the same prompts from the same noise. Intervals are Wilson's, at 95%.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from generation_inference import (
    Decoding,
    Sampling,
    default_sampling,
    format_image_prompt,
    sample_image_tokens,
    tokens_to_images,
)
from inference import answer_batch
from janus.dola.loading import load_pretrained_model
from janus.dola.pictures import contact_sheet, stack
from janus.dola.rerank import build_text_bank
from janus.dola.text_encoder import load_text_encoder
from janus.models import MultiModalityCausalLM, VLChatProcessor
from tools import scenes
from tools.scenes import Scene

LAYERS, ALPHAS, GUIDANCE = (2, 4, 6, 7), (0.1, 0.5), (1.0, 3.0, 5.0)
GRAMMAR = {"one object": scenes.one_object_scenes(), "two objects": scenes.two_object_scenes()}
SPLITS = {
    f"{kind}, {name}": [scene for scene in of_kind if scenes.is_held_out(scene) == held_out]
    for kind, of_kind in GRAMMAR.items()
    for name, held_out in (("seen", False), ("held out", True))
}

Rate = tuple[int, int]  # (successes, trials)


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a rate, both ends in [0, 1]."""
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def percent(rate: Rate) -> str:
    low, high = wilson(*rate)
    return f"{100 * rate[0] / rate[1]:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sample_scenes(scenes_of_kind: list[Scene], count: int, seed: int) -> list[Scene]:
    """`count` scenes in random order; a shorter list is gone through again."""
    order = np.random.default_rng(seed).permutation(len(scenes_of_kind))
    return [scenes_of_kind[order[k % len(scenes_of_kind)]] for k in range(count)]


def count_read(images: Sequence[np.ndarray], wanted: Sequence[Scene]) -> Rate:
    right = sum(scenes.judge(image)[0] == scene for image, scene in zip(images, wanted, strict=True))
    return right, len(wanted)


def to_pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 [64, 64, 3] each -> [n, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def reconstruct(model: MultiModalityCausalLM, processor: VLChatProcessor, images: Sequence[np.ndarray]) -> list:
    codes = model.gen_vision_model.encode(to_pixels(images))[2][2].view(len(images), -1)
    return [np.asarray(image) for image in tokens_to_images(model, codes)]


@torch.inference_mode()
def paint(
    model: MultiModalityCausalLM, processor: VLChatProcessor, wanted: Sequence[Scene], decoding: Decoding
) -> list[np.ndarray]:
    """One image per scene's caption, uint8 [64, 64, 3]; the k-th takes the noise of seed k."""
    prompts = [format_image_prompt(processor, scene.caption) for scene in wanted]
    tokens = sample_image_tokens(model, processor, prompts, decoding, parallel_size=1, seeds=list(range(len(wanted))))[
        :, 0
    ]
    return [np.asarray(image) for image in tokens_to_images(model, tokens)]


def variants(sampling: Sampling) -> dict[str, Decoding]:
    rows = {"baseline": Decoding(**sampling)}
    for alpha in ALPHAS:
        rows[f"APC only, alpha {alpha}"] = Decoding(alpha=alpha, gamma=0.0, **sampling)
    for alpha in ALPHAS:
        for layer in LAYERS:
            rows[f"DoLa layer {layer}, alpha {alpha}"] = Decoding((layer,), alpha, **sampling)
        rows[f"early exit {LAYERS}, alpha {alpha}"] = Decoding(LAYERS, alpha, **sampling)
    return rows


def answers(
    model: MultiModalityCausalLM, processor: VLChatProcessor, asked: Sequence[tuple[np.ndarray, str]], layer: int | None
) -> list[str]:
    """Greedy answers to (image, question) pairs; with DoLa where a layer is given."""
    questions = [(Image.fromarray(image), question) for image, question in asked]
    dola = None if layer is None else {"layer": layer}
    return [a.text.strip() for a in answer_batch(model, processor, questions, dola=dola, max_new_tokens=20)]


def question_rates(
    model: MultiModalityCausalLM, processor: VLChatProcessor, count: int, layer: int | None
) -> dict[str, dict[str, Rate]]:
    """Split -> kind of question -> rate, each kind and "all"; `count` questions a split."""
    rates: dict[str, dict[str, Rate]] = {}
    for split, in_split in SPLITS.items():
        rng = np.random.default_rng(2)
        asked = []
        for scene in sample_scenes(in_split, count, seed=2):
            about = scenes.questions(scene)
            asked.append((scenes.draw(scene, rng), *about[rng.integers(len(about))]))
        given = answers(model, processor, [(image, question) for image, _, question, _ in asked], layer)
        right = {}
        for (_, kind, _, expected), answer in zip(asked, given, strict=True):
            for name in (kind, "all"):
                hits, trials = right.get(name, (0, 0))
                right[name] = (hits + (answer == expected), trials + 1)
        rates[split] = right
    return rates


@torch.inference_mode()
def tower_rates(directory: Path, model: MultiModalityCausalLM, count: int) -> dict[str, Rate]:
    """Split -> how often the caption nearest to an image, among all captions of its kind, is its own."""
    siglip, tokenizer = load_text_encoder(directory / "siglip")
    tower, rates = model.vision_model.vision_tower, {}
    for kind, of_kind in GRAMMAR.items():
        captions = [scene.caption for scene in of_kind]
        bank = build_text_bank(siglip, tokenizer, captions)
        bank = torch.nn.functional.normalize(bank, dim=-1)
        for split in (name for name in SPLITS if name.startswith(kind)):
            rng = np.random.default_rng(3)
            shown = sample_scenes(SPLITS[split], count, seed=3)
            features = tower(to_pixels([scenes.draw(scene, rng) for scene in shown])).pooler_output
            best = (features @ bank.T).argmax(-1).tolist()
            right = sum(captions[k] == scene.caption for k, scene in zip(best, shown, strict=True))
            rates[split] = (right, count)
    return rates


def grid(model: MultiModalityCausalLM, processor: VLChatProcessor, layer: int, path: Path) -> None:
    """A dozen prompts, six of each kind, the last two of them held out; baseline, APC only and DoLa as it samples."""
    wanted = [
        scene
        for split, count in zip(SPLITS, (4, 2, 4, 2), strict=True)
        for scene in sample_scenes(SPLITS[split], count, 5)
    ]
    sampling = default_sampling(model)
    baseline = Decoding(**sampling)
    decodings = {
        "baseline": baseline,
        "APC only": Decoding(gamma=0.0, **sampling),
        f"DoLa layer {layer}": Decoding((layer,), **sampling),
    }
    enlarged = {
        name: [
            Image.fromarray(image).resize((2 * scenes.SIDE, 2 * scenes.SIDE), Image.Resampling.NEAREST)
            for image in paint(model, processor, wanted, decoding)
        ]
        for name, decoding in decodings.items()
    }
    used = f"guidance {baseline.cfg_weight:g} · temperature {baseline.temperature:g} · alpha {baseline.alpha:g}"
    sheets = []
    for kind, six in zip(GRAMMAR, (slice(0, 6), slice(6, 12)), strict=True):
        title = f"janus-tiny, {kind}; the last two captions were held out of training"
        rows = {name: images[six] for name, images in enlarged.items()}
        captions = [scene.caption for scene in wanted[six]]
        sheets.append(contact_sheet(title, f"{used} · each column from the same noise", rows, None, captions))
    path.parent.mkdir(parents=True, exist_ok=True)
    stack(sheets).save(path)


def judge_rates(
    model: MultiModalityCausalLM, processor: VLChatProcessor, count: int
) -> tuple[dict[str, dict[str, Rate]], float]:
    """How often the judge reads a drawing, and its VQ reconstruction, as what was drawn.

    Beside it, the distance that 99% of the reconstructions keep to the nearest drawing, in grey levels.
    """
    rates: dict[str, dict[str, Rate]] = {"real drawings": {}, "VQ reconstructions": {}}
    distances = []
    for split, in_split in SPLITS.items():
        rng, wanted = np.random.default_rng(1), sample_scenes(in_split, count, seed=1)
        drawings = [scenes.draw(scene, rng) for scene in wanted]
        rates["real drawings"][split] = count_read(drawings, wanted)
        reconstructed = reconstruct(model, processor, drawings)
        rates["VQ reconstructions"][split] = count_read(reconstructed, wanted)
        distances += [scenes.judge(image)[1] for image in reconstructed]
    return rates, float(np.percentile(distances, 99))


class Painted(NamedTuple):
    """Split -> how often a prompt is met, met clean, and met as near as asked; the mean distance to a drawing."""

    met: dict[str, Rate]
    clean: dict[str, Rate]
    near: dict[str, Rate]
    distance: float

    @property
    def row(self) -> list[str]:
        """The cells of a table: prompts met by split, clean by split, and the distance."""
        return [*cells(self.met), cells(self.clean)[-1], f"{self.distance:.1f}"]


def painting_rates(
    model: MultiModalityCausalLM, processor: VLChatProcessor, decoding: Decoding, count: int, near: float
) -> Painted:
    met, clean, nearer, distances = {}, {}, {}, []
    for split, in_split in SPLITS.items():
        wanted = sample_scenes(in_split, count, seed=0)
        read = [scenes.judge(image) for image in paint(model, processor, wanted, decoding)]
        of_met = [distance for (scene, distance), other in zip(read, wanted, strict=True) if scene == other]
        met[split] = (len(of_met), count)
        clean[split], nearer[split] = ((sum(d <= below for d in of_met), count) for below in (scenes.CLEAN, near))
        distances += [distance for _, distance in read]
    return Painted(met, clean, nearer, float(np.mean(distances)))


def cells(rates: dict[str, Rate]) -> list[str]:
    """The rate of each split, and of all of them together."""
    return [percent(rates[split]) for split in SPLITS] + [
        percent((sum(rate[0] for rate in rates.values()), sum(rate[1] for rate in rates.values())))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("janus/checkpoints/janus-tiny"))
    parser.add_argument("--count", type=int, default=120, help="prompts of a split in each row of the DoLa table")
    parser.add_argument("--json", type=Path, help="where to write the counts behind the tables")
    parser.add_argument("--grid", type=Path, help="where to write a labelled sheet of a dozen prompts")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model, dtype="float32", device="cpu")
    own, many = default_sampling(model), 2 * args.count
    header = ["", *SPLITS, "together"]

    judged, near = judge_rates(model, processor, many)
    print(f"Judge: share of {many} drawings per split read as drawn, %\n")
    print(markdown(header, [[name, *cells(rates)] for name, rates in judged.items()]), "\n")

    tower = tower_rates(args.model, model, many)
    print(f"Tower: top-1 over all captions of the kind, {many} drawings per split, %\n")
    print(markdown(header, [["top-1", *cells(tower)]]), "\n")

    asked = {}
    for layer in tqdm([None, *LAYERS], desc="questions"):
        name = "baseline" if layer is None else f"DoLa layer {layer}, alpha 0.1"
        asked[name] = question_rates(model, processor, many, layer)
    print(f"Questions: share of {many} per split answered word for word (greedy), %\n")
    rows = [[name, *cells({split: rates["all"] for split, rates in of.items()})] for name, of in asked.items()]
    print(markdown(header, rows), "\n")

    at_own = painting_rates(model, processor, Decoding(**own), many, near)
    print(f"Images of the baseline at the checkpoint's own guidance, {own['cfg_weight']:g}, and temperature,")
    print(f"{own['temperature']:g}, {many} prompts per split, %. Clean is a distance of at most {scenes.CLEAN};")
    print(f"99% of the reconstructions above keep {near:.1f}; the mean distance is {at_own.distance:.1f}.\n")
    of = {"met": at_own.met, "met clean": at_own.clean, f"met within {near:.1f}": at_own.near}
    rows = [[name, *cells(rates)] for name, rates in of.items()]
    print(markdown(header, rows), "\n")

    painted, rows = {}, []
    sampled: list[Sampling] = [{**own, "cfg_weight": w} for w in GUIDANCE]
    jobs = [(s["cfg_weight"], name, decoding) for s in sampled for name, decoding in variants(s).items()]
    for w, name, decoding in tqdm(jobs, desc="images"):
        of_job = painting_rates(model, processor, decoding, args.count, near)
        painted[f"cfg {w:g}, {name}"] = of_job._asdict()
        rows.append([f"{w:g}", name, *of_job.row])
    print(
        f"Images at the checkpoint's own temperature: {args.count} prompts per split met exactly, met clean of all, %,"
    )
    print("and the mean distance to the nearest drawing\n")
    print(markdown(["cfg", *header, "met clean", "distance"], rows))

    if args.json:
        found = {
            "judge": judged,
            "tower": tower,
            "questions": asked,
            "at its own settings": {**own, "near": near, **at_own._asdict()},
            "images": painted,
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.grid:
        grid(model, processor, LAYERS[-1], args.grid)


if __name__ == "__main__":
    main()
