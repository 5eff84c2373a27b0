"""What all layers and alphas cost beside one baseline evaluation of the same examples, alternating in one process.

    python -m tools.make_validation_sets
    python -m benchmarks.layer_search_cost [--data build/validation] [--factor expert_factor.csv]

The baseline reads the same batches through the same code, but collects no hidden states and reads the last layer alone.
"images, codes given" leaves out the VQ encoder, which both sides run alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.factor import read_questions
from benchmarks.smollm2 import load_smollm2
from dola_runtime import compute_logprobs_from_hidden
from generation_inference import default_sampling, format_question
from janus.dola.cli import add_model_arguments, positive, run_command
from janus.dola.layer_search import tasks
from janus.dola.layer_search.__main__ import encode_prompts
from janus.dola.layer_search.examples import Example, read_examples
from janus.dola.layer_search.metrics import ALPHAS, measure
from janus.dola.layer_search.tasks import Task, answers_task, continuation_task, image_task
from janus.dola.loading import load_pretrained_model
from janus.dola.scoring import score_tokens, slice_places


@contextmanager
def last_layer_alone(decoder: nn.Module) -> Iterator[None]:
    """Let a decoder that is asked for all hidden states collect and give the last one only."""

    def ask(_module, args, kwargs):
        return args, kwargs | {"output_hidden_states": False}

    def give(_module, _args, output):
        output.hidden_states = (output.last_hidden_state,)
        return output

    hooks = decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(give)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_last_state(llama, pick: Callable[[Tensor], Tensor], inputs_embeds: Tensor, **placed: Tensor) -> Tensor:
    return pick(llama(inputs_embeds=inputs_embeds, use_cache=False, **placed).last_hidden_state)[None]


@torch.inference_mode()
def evaluate_baseline(task: Task, decoder: nn.Module, examples: list[Example]) -> None:
    with last_layer_alone(decoder), patch.object(tasks, "read_states", read_last_state):
        for forced, _, phi, logits_per_place in task.read(examples):
            for some in slice_places(len(forced.targets), 1, logits_per_place):
                score_tokens(compute_logprobs_from_hidden(forced.hidden[-1, some], None, phi), forced.targets[some])


@contextmanager
def remembered_codes(model) -> Iterator[None]:
    """Encode each batch of images once."""
    seen, encode = {}, model.gen_vision_model.encode

    def look_up(pixels):
        key = pixels.cpu().numpy().tobytes()
        if key not in seen:
            seen[key] = encode(pixels)
        return seen[key]

    with patch.object(model.gen_vision_model, "encode", look_up):
        yield


def report(name: str, task: Task, decoder: nn.Module, examples: list[Example], batch_size: int, rounds: int) -> None:
    """Print the median over rounds of (time of all layers and alphas) / (time of the baseline)."""
    layers = range(1, task.num_layers)
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    ways: list[Callable[[list[Example]], object]] = [
        lambda batch: evaluate_baseline(task, decoder, batch),
        lambda batch: measure(task, batch, layers, ALPHAS),
    ]
    times = []
    for _ in range(rounds + 1):  # the first warms up
        spent = [0.0, 0.0]
        for batch in batches:
            for way, run in enumerate(ways):
                started = time.perf_counter()
                run(batch)
                spent[way] += time.perf_counter() - started
        times.append(spent)
    ratios = [search / baseline for baseline, search in times[1:]]
    base = statistics.median(baseline for baseline, _ in times[1:])
    print(
        f"{name}: {len(examples)} examples, {len(layers)} layers x {len(ALPHAS)} alphas: "
        f"{statistics.median(ratios):.2f} times the baseline's {base:.2f} s "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, default=Path("build/validation"), help="(default: %(default)s)")
    parser.add_argument("--factor", type=Path, help="FACTOR's expert set, for SmolLM2 (default: leave it out)")
    parser.add_argument("--examples", type=positive, default=64, help="of each set (default: %(default)s)")
    parser.add_argument("--factor_examples", type=positive, default=8, help="of FACTOR (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device, args.quantize, args.offload)
    decoder = model.language_model.model

    images = read_examples(args.data / "image.jsonl", "image")[: args.examples]
    painting = image_task(
        model, processor, default_sampling(model)["cfg_weight"], partial(encode_prompts, processor, model.device)
    )
    report("images", painting, decoder, images, 16, args.rounds)
    with remembered_codes(model):
        report("images, codes given", painting, decoder, images, 16, args.rounds)
    questions = read_examples(args.data / "answers.jsonl", "answers")[: args.examples]
    report(
        "answers",
        answers_task(model, processor, partial(format_question, processor)),
        decoder,
        questions,
        16,
        args.rounds,
    )

    if args.factor:
        smollm2, tokenizer = load_smollm2()
        factor = [
            {"question": prefix, "answer": texts[0], "choices": texts} for prefix, texts in read_questions(args.factor)
        ]
        task = continuation_task(smollm2, tokenizer)
        report("SmolLM2, FACTOR", task, smollm2.model, factor[: args.factor_examples], 1, args.rounds)


if __name__ == "__main__":
    run_command(main)
