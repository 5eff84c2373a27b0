"""Decoding several tokens per pass: are they the same tokens, in how many passes, and where were the passes spent.

python -m benchmarks.windows [--pictures 25] [--figure docs/windows.png]

Pictures of janus-tiny's prompts, one at a time and so many for each guidance and decoding, as one token per pass and as
windows make them, in float32, and for window 16 in bfloat16. The time of windows is in `benchmarks.decode_speed`.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation_inference import Decoding, format_image_prompt, sample_image_tokens
from janus.dola.cli import JANUS_TINY, CommandParser, positive, run_command
from janus.dola.loading import load_pretrained_model
from tools.scenes import one_object_scenes

GUIDANCES, WINDOWS, MAPPED = (1.0, 2.0, 5.0), (4, 8, 16, 32), 16
LAYERS = {"baseline": (), "layer 6": (6,), "early exit 2, 4, 6, 7": (2, 4, 6, 7)}
Found = dict[int, dict[str, Any]]


def sample_picture(model, processor, decoding: Decoding, number: int, window: int) -> tuple[Tensor, list[int]]:
    """The tokens `[T]` of one picture, and how many of them each pass made final."""
    scenes = one_object_scenes()
    prompt = format_image_prompt(processor, scenes[number * 37 % len(scenes)].caption)
    made: list[int] = []
    tokens = sample_image_tokens(
        model, processor, [prompt], decoding, parallel_size=1, seeds=[number], window=window, on_step=made.append
    )
    return tokens[0, 0], made


def passes_by_place(made: list[int]) -> Tensor:
    """The share of a pass that each token took, `[T]`."""
    return torch.cat([torch.full((n,), 1 / n) for n in made])


def compare(model, processor, decoding: Decoding, numbers: range, windows: Sequence[int]) -> Found:
    """By window: pictures, and the share of tokens, equal to those of window 1; tokens per pass; passes by place."""
    found: Found = {window: {"pictures": 0, "tokens": 0.0, "passes": 0, "by place": 0.0} for window in windows}
    length = 0
    for number in numbers:
        expected, _ = sample_picture(model, processor, decoding, number, 1)
        length = len(expected)
        for window, of_window in found.items():
            tokens, made = sample_picture(model, processor, decoding, number, window)
            of_window["pictures"] += int(torch.equal(tokens, expected))
            of_window["tokens"] += float((tokens == expected).float().mean()) / len(numbers)
            of_window["passes"] += len(made)
            of_window["by place"] += passes_by_place(made) / len(numbers)
    for of_window in found.values():
        of_window["per pass"] = len(numbers) * length / of_window["passes"]
    return found


def draw(found: dict[tuple[str, float], Found], path: Path) -> None:
    """Tokens per pass over the window; passes per token over the places of a picture at window `MAPPED`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    axes = parts[0].subplots()
    for name, line in zip(LAYERS, ("-", "--", ":"), strict=True):
        for guidance, colour in zip(GUIDANCES, ("tab:blue", "tab:green", "tab:red"), strict=True):
            per_pass = [1.0, *(found[name, guidance][window]["per pass"] for window in WINDOWS)]
            label = f"{name}, guidance {guidance:g}"
            axes.plot((1, *WINDOWS), per_pass, line, color=colour, marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks((1, *WINDOWS), labels=[str(window) for window in (1, *WINDOWS)])
    axes.set(xlabel="window", ylabel="tokens per pass", ylim=(0.8, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    rows = ("baseline", "layer 6")
    maps: Any = parts[1].subplots(len(rows), len(GUIDANCES), sharex=True, sharey=True)
    shown: Any = None
    for (row, name), (column, guidance) in product(enumerate(rows), enumerate(GUIDANCES)):
        passes = found[name, guidance][MAPPED]["by place"]
        side = round(len(passes) ** 0.5)
        shown = maps[row, column].imshow(passes.view(side, side), vmin=0, vmax=1, cmap="viridis")
        maps[row, column].set_title(f"{name}, guidance {guidance:g}", fontsize=9)
        maps[row, column].set(xticks=[], yticks=[])
    parts[1].colorbar(shown, ax=maps, shrink=0.7, label=f"passes per token, window {MAPPED}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = CommandParser(description="Decoding several tokens per pass: the same tokens, in how many passes.")
    parser.add_argument("--pictures", type=positive, default=25, help="of each kind (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=Path("docs/windows.png"), help="(default: %(default)s)")
    args = parser.parse_args()
    n, found = args.pictures, {}
    for dtype, windows in (("bfloat16", (MAPPED,)), ("float32", WINDOWS)):
        _, processor, model = load_pretrained_model(JANUS_TINY, dtype, "cpu")
        print(f"\n{dtype}: tokens per pass (pictures equal to window 1's, of {n})\n")
        print("| decoding | guidance | " + " | ".join(f"window {window}" for window in windows) + " |")
        print("|---" * (2 + len(windows)) + "|")
        found = {}
        for place, (name, guidance) in enumerate(product(LAYERS, GUIDANCES)):
            decoding = Decoding(LAYERS[name], cfg_weight=guidance)
            of_decoding = found[name, guidance] = compare(
                model, processor, decoding, range(n * place, n * place + n), windows
            )
            cells = [f"{x['per pass']:.1f} ({x['pictures']})" for x in of_decoding.values()]
            print(f"| {name} | {guidance:g} | " + " | ".join(cells) + " |", flush=True)
        print()
        for window in windows:
            pictures, tokens = (sum(x[window][key] for x in found.values()) for key in ("pictures", "tokens"))
            share = f"{100 * tokens / len(found):.1f}% of their tokens"
            print(f"window {window}: {pictures} of {n * len(found)} pictures are equal, {share}")
    draw(found, args.figure)


if __name__ == "__main__":
    run_command(main)
