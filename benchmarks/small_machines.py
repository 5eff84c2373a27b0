"""What 8 and 4 bits cost and save: the tables of docs/small_machines.md (Linux).

python -m benchmarks.small_machines path/to/expert_factor.csv

tiny: prompts met, answers right and equal tokens of janus-tiny; smollm2: FACTOR and perplexity of SmolLM2-135M,
passage: its perplexity on a text that the tests carry; sizes:
the bytes of Janus-Pro's weights, computed; loading: the peak of loading 1B's shapes, of random weights in bfloat16
(4 GiB in a temporary directory), and of what follows. What docs/small_machines.json has already is not measured again.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.decode_memory import memory
from benchmarks.decode_speed import random_janus
from benchmarks.factor import TEXTS, is_right, read_questions
from benchmarks.smollm2 import load_smollm2
from dola_runtime import compute_logprobs_from_hidden
from generation_inference import Decoding, default_sampling, format_image_prompt, sample_image_tokens, tokens_to_images
from janus.dola.cli import JANUS_TINY, CommandParser, run_command
from janus.dola.files import read_json_file
from janus.dola.loading import load_pretrained_model
from janus.dola.painting import prompt_seed
from janus.dola.quantize import quantize_blocks
from janus.dola.scoring import teacher_force
from janus.models import VLChatProcessor
from tools import scenes
from tools.eval_janus_tiny import markdown, percent, question_rates
from tools.make_validation_sets import prompts_to_paint

KINDS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "int4": ("float32", "int4"),
}
"""dtype and quantize of each row."""

PASSAGE = Path(__file__).parent.parent / "tests/passage.txt"
LAYER, QUESTIONS, PROMPTS_PER_BATCH = 6, 120, 60
STORED = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes of a weight of the LLaMA's blocks; all else is bfloat16."""

# --- bytes -----------------------------------------------------------------------------------------------------------


def tensors_within(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a parameter consists of, scales among them."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_within(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
        state = getattr(value, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (x for x in vars(part).values() if isinstance(x, Tensor)) if part else ()


def num_bytes(model: nn.Module) -> int:
    parameters = (parameter for parameter in model.parameters() if not parameter.is_meta)
    return sum(tensor.nbytes for parameter in parameters for tensor in tensors_within(parameter))


def computed_bytes(model: nn.Module, kind: str) -> dict[str, float]:
    """Bytes by part: linear layers of the LLaMA's blocks, the rest of the LLaMA, tower, VQ, heads and aligners.

    In int8 each output has a scale of 4 bytes and a zero point of one; in NF4 each block of 64 weights has a scale of
    one byte, each 256 of these one of 4, and each layer two tables of 16 and 256 numbers and an offset, of 4 bytes.
    """
    sizes: dict[str, float] = dict.fromkeys(("blocks", "rest of the LLaMA", "tower", "VQ", "heads and aligners"), 0.0)
    part_of = {"language_model": "rest of the LLaMA", "vision_model": "tower", "gen_vision_model": "VQ"}
    for name, parameter in model.named_parameters():
        if name.startswith("language_model.model.layers.") and parameter.dim() == 2:
            blocks = -(-parameter.numel() // 64)
            scales = {"bfloat16": 0, "int8": 5 * len(parameter), "int4": blocks + 4 * -(-blocks // 256) + 4 * 273}
            sizes["blocks"] += STORED[kind] * parameter.numel() + scales[kind]
        else:
            sizes[part_of.get(name.partition(".")[0], "heads and aligners")] += 2 * parameter.numel()
    return sizes


# --- janus-tiny ------------------------------------------------------------------------------------------------------


def paint(model, processor, texts: list[str], decoding: Decoding) -> Tensor:
    """One image of each prompt: its tokens `[prompts, T]`."""
    prompts = [format_image_prompt(processor, text) for text in texts]
    return torch.cat(
        [
            sample_image_tokens(
                model, processor, prompts[k : k + PROMPTS_PER_BATCH], decoding, parallel_size=1,
                seeds=[prompt_seed(0, text) for text in texts[k : k + PROMPTS_PER_BATCH]],
            )[:, 0]
            for k in range(0, len(prompts), PROMPTS_PER_BATCH)
        ]
    )  # fmt: skip


def measure_tiny() -> dict[str, Any]:
    texts = [line["prompt"] for line in prompts_to_paint()]
    found: dict[str, Any] = {}
    reference: dict[str, Tensor] = {}
    for kind, (dtype, quantize) in KINDS.items():
        _, processor, model = load_pretrained_model(JANUS_TINY, dtype, "cpu", quantize)
        row: dict[str, Any] = {}
        for name, layers in (("baseline", ()), ("DoLa", (LAYER,))):
            tokens = paint(model, processor, texts, Decoding(layers, **default_sampling(model)))
            met = sum(scenes.prompt_met(tokens_to_images(model, tokens), texts))
            equal = (tokens == reference.setdefault(name, tokens)).float().mean().item()
            row[name] = {"met": (int(met), len(texts)), "equal": equal}
        rates = [of["all"] for of in question_rates(model, processor, QUESTIONS, None).values()]
        row["answers"] = [sum(x) for x in zip(*rates, strict=True)]
        found[kind] = row | {"bytes": num_bytes(model)}
        print(f"janus-tiny, {kind}: {json.dumps(found[kind])}", flush=True)
    return found


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------


def load_smollm2_as(kind: str):
    dtype, quantize = KINDS[kind]
    model, tokenizer = load_smollm2()
    model.to(getattr(torch, dtype))
    if quantize:
        quantize_blocks(model.model, quantize)
    return model, tokenizer


@torch.no_grad()
def measure_passage(kind: str) -> float:
    """Perplexity of the passage, each token but the first from all before it."""
    model, tokenizer = load_smollm2_as(kind)
    ids = torch.tensor(tokenizer(PASSAGE.read_text(encoding="utf-8"))["input_ids"])
    perplexity = math.exp(cross_entropy(model(ids[None, :-1]).logits[0].float(), ids[1:]).item())
    print(f"SmolLM2, {kind}: perplexity {perplexity:.2f} over {len(ids) - 1} tokens", flush=True)
    return perplexity


@torch.no_grad()
def measure_smollm2(factor: Path, kind: str) -> dict[str, Any]:
    """FACTOR, periods closed up, by the sum of log-probabilities; perplexity of the true completions."""
    model, tokenizer = load_smollm2_as(kind)
    sums, of_true = [], []
    for prefix, completions in read_questions(factor):
        ids = [torch.tensor(tokenizer(" " + TEXTS["period closed up"](text))["input_ids"]) for text in completions]
        forced = teacher_force(model, torch.tensor(tokenizer(prefix)["input_ids"]), ids)
        log_q = compute_logprobs_from_hidden(forced.hidden[-1], None, model.lm_head)
        log_p = log_q.gather(-1, forced.targets[:, None])[:, 0]
        sums.append(torch.stack([log_p[at].sum() for at in forced.places]))
        of_true.append(log_p[forced.places[0]])
    right = is_right(torch.stack(sums))
    found = {
        "factor": (int(right.sum()), len(right)),
        "perplexity": math.exp(-torch.cat(of_true).mean().item()),
        "bytes": num_bytes(model),
    }
    print(f"SmolLM2, {kind}: {json.dumps(found)}", flush=True)
    return found


# --- Janus-Pro -------------------------------------------------------------------------------------------------------


def compute_sizes() -> dict[str, Any]:
    found = {}
    for size in ("1b", "7b"):
        model = random_janus(size, torch.bfloat16, torch.device("meta"))
        found[size] = {kind: computed_bytes(model, kind) for kind in STORED}
    return found


def load_and_use(directory: str, kind: str, offload: str = "") -> None:
    """In a process of its own: print what loading took, and what painting's and then reading's end took, as JSON."""
    _, quantize = KINDS[kind]
    load_pretrained_model(JANUS_TINY, "bfloat16", "cpu", quantize)  # code and libraries
    before = memory("VmRSS")
    _, model = load_pretrained_model(directory, "bfloat16", "cpu", quantize, bool(offload))[1:]
    found = {"loading": memory("VmHWM") - before, "loaded": memory("VmRSS") - before, "bytes": num_bytes(model)}
    tokens_to_images(model, torch.zeros((1, 576), dtype=torch.long))
    found["painted"] = memory("VmRSS") - before
    with torch.inference_mode():
        model.vision_model(torch.zeros((1, 3, 384, 384), dtype=torch.bfloat16))
    found |= {"read": memory("VmRSS") - before, "peak": memory("VmHWM") - before}
    print(json.dumps(found))


def measure_loading() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        processor = VLChatProcessor.from_pretrained(JANUS_TINY)
        processor.image_processor.image_size, processor.num_image_tokens = 384, 576
        processor.save_pretrained(directory)
        random_janus("1b", torch.bfloat16, torch.device("cpu")).save_pretrained(directory)
        for kind in STORED:
            for offload in (False, True):
                code = "import sys; from benchmarks.small_machines import load_and_use; load_and_use(*sys.argv[1:])"
                command = [sys.executable, "-c", code, directory, kind, *["offload"] * offload]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[f"{kind}{', offload' * offload}"] = json.loads(done.stdout.splitlines()[-1])
                print(f"1B, {kind}{', offload' * offload}: {done.stdout.splitlines()[-1]}", flush=True)
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def report(found: dict[str, Any]) -> Iterator[str]:
    """The tables of what was measured, each under a line that says what it is."""
    if tiny := found.get("tiny"):
        header = ["janus-tiny", "MB of weights", "baseline: prompts met, %", "equal tokens, %"]
        header += [f"layer {LAYER}: prompts met, %", "equal tokens, %", "answers right, %"]
        rows = []
        for kind, row in tiny.items():
            painted = [
                cell for of in (row["baseline"], row["DoLa"]) for cell in (percent(of["met"]), share(of["equal"]))
            ]
            rows.append([kind, f"{row['bytes'] / 1e6:.1f}", *painted, percent(row["answers"])])
        yield markdown(header, rows)
    if rows := [(kind, found[f"smollm2 {kind}"]) for kind in KINDS if f"smollm2 {kind}" in found]:
        header = ["SmolLM2-135M", "MB of weights", "FACTOR, %", "perplexity: its true completions", "the passage"]
        table = []
        for kind, row in rows:
            perplexities = [f"{x:.2f}" for x in (row["perplexity"], found[f"passage {kind}"])]
            table.append([kind, f"{row['bytes'] / 1e6:.0f}", percent(row["factor"]), *perplexities])
        yield markdown(header, table)
    if sizes := found.get("sizes"):
        header = ["GiB, computed", *next(iter(sizes["1b"].values())), "together"]
        yield markdown(
            header,
            [
                [f"Janus-Pro-{size.upper()}, {kind}", *map(gib, parts.values()), gib(sum(parts.values()))]
                for size, kinds in sizes.items()
                for kind, parts in kinds.items()
            ],
        )
    if loading := found.get("loading"):
        columns = {
            "bytes": "weights",
            "loading": "peak of loading",
            "painted": "after painting",
            "read": "after reading",
        }
        yield markdown(
            ["1B's shapes on the CPU, GiB", *columns.values(), "peak of all"],
            [[name, *(gib(row[key]) for key in (*columns, "peak"))] for name, row in loading.items()],
        )


def share(x: float) -> str:
    return f"{100 * x:.1f}"


def main() -> None:
    parts: dict[str, Callable[[], Any]] = {
        "tiny": measure_tiny,
        "sizes": compute_sizes,
        "loading": measure_loading,
        **{f"smollm2 {kind}": lambda kind=kind: measure_smollm2(args.factor, kind) for kind in KINDS},
        **{f"passage {kind}": lambda kind=kind: measure_passage(kind) for kind in KINDS},
    }
    parser = CommandParser(description="What 8 and 4 bits cost and save.")
    parser.add_argument("factor", type=Path, help="FACTOR's expert set as CSV")
    args = parser.parse_args()
    page = Path("docs/small_machines.json")
    found = read_json_file(page) if page.exists() else {}
    for part, measure in parts.items():
        if part not in found:
            found[part] = measure()
            page.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(report(found)))


if __name__ == "__main__":
    run_command(main)
