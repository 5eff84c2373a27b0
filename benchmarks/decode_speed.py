"""Images per second: the reference loop, transformers' own Janus, and this project's batches, on the same weights.

Then the time of sampling several tokens per pass, by the images decoded together. Ratios are medians, least and most
over the rounds, in which all ways alternate. Beside other jobs measure with OMP_NUM_THREADS=1 (`pick_clock`).

python -m benchmarks.decode_speed [--model DIR | --random 1b|7b] [--prompts 16] [--parallel_size 4] [--json FILE]
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration, StaticCache
from transformers.models.janus.configuration_janus import JanusVisionConfig

from dola_runtime import pick_contrast_layers
from generation_inference import (
    Decoding,
    format_image_prompt,
    generate,
    image_geometry,
    num_image_tokens,
    sample_image_tokens,
    tokens_to_images,
)
from janus.dola.checkpoint_files import restore_tables, translate
from janus.dola.cli import JANUS_TINY, CommandParser, add_model_arguments, positive, run_command
from janus.dola.loading import load_pretrained_model, resolve_device, resolve_dtype
from janus.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from janus.models.checkpoint import TRANSFORMERS_FORMAT

SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32},
}

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")

CFG_WEIGHT = 3.0
WINDOWS, WINDOWS_CFG_WEIGHT = (1, 4, 16), 1.5


def random_janus(size: str, dtype: torch.dtype, device: torch.device) -> MultiModalityCausalLM:
    """Random weights at the exact sizes of Janus-Pro-1B or -7B."""
    width = SIZES[size]["hidden_size"]
    config = MultiModalityConfig(
        language_config={**SIZES[size], "vocab_size": 102400, "max_position_embeddings": 16384},
        vision_config={"params": {"model_name": "siglip_large_patch16_384", "image_size": 384}},
        aligner_config={"params": {"n_embed": width}},
        gen_aligner_config={"params": {"n_embed": width}},
        gen_head_config={"params": {"n_embed": width, "image_token_embed": width}},
    )
    with torch.device("meta"):
        model: Any = MultiModalityCausalLM(config)
    model.to(dtype).to_empty(device=device)
    restore_tables(model, device)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name and name.endswith("weight") else parameter.data.normal_(0, 0.02)
    return model.eval()


def as_transformers(model: MultiModalityCausalLM, processor: VLChatProcessor) -> JanusForConditionalGeneration:
    """The same weights in transformers' own Janus."""
    config, (size, patch) = model.config, image_geometry(model, processor)
    siglip, vq = config.siglip, config.vq
    theirs = JanusConfig(
        text_config=config.language_config.to_dict(),
        vision_config=JanusVisionConfig(
            hidden_size=siglip.hidden_size,
            num_hidden_layers=siglip.num_hidden_layers,
            num_attention_heads=siglip.num_attention_heads,
            image_size=siglip.image_size,
            patch_size=siglip.patch_size,
            mlp_ratio=siglip.intermediate_size / siglip.hidden_size,
            projection_dim=config.aligner.projection_dim,
            num_image_tokens=(size // patch) ** 2,
        ).to_dict(),
        vq_config={
            **vq.to_dict(),
            "num_patches": size // patch,
            "projection_dim": config.gen_head.projection_dim,
            "image_token_embed_dim": config.gen_head.image_token_embed_dim,
        },
        image_token_id=processor.image_id,
    )
    state = {}
    for name, tensor in model.state_dict().items():
        stored = [s for rule in TRANSFORMERS_FORMAT if (s := translate(name, rule.own, rule.stored)) is not None]
        if stored and ".head." not in name:  # transformers' Janus has no pooling head
            state[stored[-1]] = tensor
    with torch.device("meta"):
        converted = JanusForConditionalGeneration(theirs)
    converted.load_state_dict(state, assign=True)
    llama = converted.model.language_model
    llama.rotary_emb = type(llama.rotary_emb)(config=llama.config).to(model.device)
    generation: Any = converted.generation_config
    generation.bos_token_id, generation.pad_token_id = processor.tokenizer.bos_token_id, processor.pad_id
    generation.generation_kwargs = {"boi_token_id": processor.image_start_id}
    return converted.eval()


def run_transformers(theirs, processor, prompts: list[str], parallel_size: int) -> None:
    batch = processor.batchify([(prompt, []) for prompt in prompts]).to(theirs.device)
    length = batch.input_ids.shape[1] + theirs.model.vision_model.config.num_image_tokens
    tokens = theirs.generate(
        past_key_values=StaticCache(theirs.config.text_config, length),  # what 5.17 fails to make for itself
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        generation_mode="image",
        do_sample=True,
        top_k=0,
        guidance_scale=CFG_WEIGHT,
        num_return_sequences=parallel_size,
    )
    with torch.inference_mode():
        decoded = theirs.decode_image_tokens(tokens).float()
    for pixels in ((decoded + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).cpu().numpy():
        Image.fromarray(pixels).save("image.jpg")


def run_ours(model, processor, prompts: list[str], decoding: Decoding, parallel_size: int) -> None:
    seeds = list(range(len(prompts)))
    tokens = sample_image_tokens(model, processor, prompts, decoding, parallel_size=parallel_size, seeds=seeds)
    for image in tokens_to_images(model, tokens.flatten(0, 1)):
        image.save("image.jpg")


def pick_clock(device: torch.device) -> Callable[[], float]:
    """Wall clock; on one thread of the CPU the process's own seconds, which other jobs do not lengthen."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def measure(ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds of each way in each round, the ways alternating; on CUDA also its peak memory in bytes."""
    measured: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
    clock = pick_clock(device)
    for i in range(-1, rounds):  # the first round warms up
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            started = clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                measured[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            if i >= 0:
                measured[name]["seconds"].append(clock() - started)
    return measured


def ratio(of: dict[str, Any], over: dict[str, Any]) -> list[float]:
    """How many times less time one way takes than another: median, least and most over the rounds."""
    ratios = [slow / fast for slow, fast in zip(over["seconds"], of["seconds"], strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def in_words(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def pixel_difference(model, other, prompts: list[str], processor) -> dict[str, float]:
    """Of the same tokens' pixels by two models, out of 255: the largest and the mean difference."""
    decoding = Decoding(cfg_weight=CFG_WEIGHT)
    seeds = list(range(len(prompts)))
    tokens = sample_image_tokens(model, processor, prompts, decoding, parallel_size=1, seeds=seeds).flatten(0, 1)
    pixels = (np.stack([np.asarray(i, int) for i in tokens_to_images(m, tokens)]) for m in (model, other))
    difference = abs(next(pixels) - next(pixels))
    return {"largest": difference.max(), "mean": difference.mean()}


def compare_windows(model, processor, prompts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Sampling alone of one picture at a time, of a prompt's four, and of four of each prompt, by window."""
    device, decoding, found = model.gen_embed.weight.device, Decoding(cfg_weight=WINDOWS_CFG_WEIGHT), []
    for together, parallel_size, at_a_time in ((1, 1, 1), (4, 4, 1), (4 * len(prompts), 4, len(prompts))):
        tokens: dict[int, list[Tensor]] = {}
        passes = dict.fromkeys(WINDOWS, 0)

        def sample(window: int, parallel_size=parallel_size, at_a_time=at_a_time, tokens=tokens, passes=passes) -> None:
            made: list[int] = []
            tokens[window] = [
                sample_image_tokens(
                    model,
                    processor,
                    prompts[start : start + at_a_time],
                    decoding,
                    parallel_size=parallel_size,
                    seeds=list(range(start, start + at_a_time)),
                    window=window,
                    on_step=made.append,
                )
                for start in range(0, len(prompts), at_a_time)
            ]
            passes[window] = len(made)

        measured = measure({str(window): lambda w=window: sample(w) for window in WINDOWS}, rounds, device)
        for window in WINDOWS[1:]:
            found.append(
                {
                    "images": together,
                    "window": window,
                    "times_as_fast": ratio(measured[str(window)], measured["1"]),
                    "tokens_per_pass": passes[1] / passes[window],
                    "equal": all(map(torch.equal, tokens[window], tokens[1])),
                }
            )
    return found


def hardware_rates(device: torch.device) -> dict[str, float]:
    """Measured copy bandwidth in bytes/s and bf16 matmul rate in FLOP/s."""
    on_cuda = device.type == "cuda"

    def seconds(work: Callable[[], object], repeats: int = 20 if on_cuda else 3) -> float:
        work()
        if on_cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        if on_cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / repeats

    size, width = (1 << 30, 8192) if on_cuda else (1 << 26, 512)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    return {
        "bytes_per_s": 2 * source.nbytes / seconds(lambda: target.copy_(source)),
        "flops": 2 * width**3 / seconds(lambda: a @ a),
    }


def floor_seconds(model, rows: int, window: int, length: float, rates: dict[str, float]) -> float:
    """The least time of a pass over `window` positions of `rows` sequences, `length` positions in.

    Bytes of weights and cache that it reads over the bandwidth, or its FLOPs over the matmul rate.
    """
    llama = model.language_model.config
    weights = [*model.language_model.model.layers.parameters(), *model.gen_head.parameters()]
    heads = llama.num_key_value_heads * (llama.hidden_size // llama.num_attention_heads)
    cache = 2 * len(model.language_model.model.layers) * rows * length * heads * weights[0].element_size()
    bytes_read = sum(w.nbytes for w in weights) + cache
    flops = 2 * rows * window * sum(w.numel() for w in weights)
    return max(bytes_read / rates["bytes_per_s"], flops / rates["flops"])


IN_ONE_BATCH = "transformers' own, one batch"


def ways_to_paint(model, processor, prompts: list[str], parallel_size: int) -> dict[str, Callable[[], None]]:
    """Name -> painting `parallel_size` images of each prompt, pixels and files included."""
    theirs, depth = as_transformers(model, processor), len(model.language_model.model.layers)
    decodings = {
        "ours, DoLa off": Decoding(cfg_weight=CFG_WEIGHT),
        "ours, DoLa static": Decoding(pick_contrast_layers(depth), cfg_weight=CFG_WEIGHT),
        "ours, early exit of 4": Decoding(tuple(range(depth - 4, depth)), cfg_weight=CFG_WEIGHT),
    }

    def reference() -> None:
        for prompt in prompts:
            generate(model, processor, prompt, parallel_size=parallel_size, cfg_weight=CFG_WEIGHT)

    def transformers_by_prompt() -> None:
        for prompt in prompts:
            run_transformers(theirs, processor, [prompt], parallel_size)

    return {
        "reference loop, by prompt": reference,
        "transformers' own, by prompt": transformers_by_prompt,
        IN_ONE_BATCH: lambda: run_transformers(theirs, processor, prompts, parallel_size),
        **{name: lambda d=d: run_ours(model, processor, prompts, d, parallel_size) for name, d in decodings.items()},
    }


def main() -> None:
    parser = CommandParser(description="Images per second: the reference loop, transformers' own Janus, and ours.")
    add_model_arguments(parser)
    parser.add_argument("--random", choices=SIZES, help="random weights at a published size instead of --model")
    parser.add_argument("--prompts", type=positive, default=16, help="prompts in a batch (default: %(default)s)")
    parser.add_argument("--parallel_size", type=positive, default=4, help="images per prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds, medians taken (default: %(default)s)")
    parser.add_argument("--json", help="file to write the tables to as JSON (default: none)")
    args = parser.parse_args()
    if args.quantize or args.offload:
        parser.error("--quantize and --offload: the other ways that are measured here have neither")
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    if args.random:
        processor = VLChatProcessor.from_pretrained(JANUS_TINY)
        processor.image_processor.image_size = 384
        model = random_janus(args.random, dtype, device)
    else:
        _, processor, model = load_pretrained_model(args.model, dtype, device)
    texts = [f"a {size} {colour} star on a white background" for colour in COLOURS for size in ("small", "large")]
    prompts = [format_image_prompt(processor, texts[i % len(texts)]) for i in range(args.prompts)]
    name = str(dtype).removeprefix("torch.")
    painting = ways_to_paint(model, processor, prompts, args.parallel_size)
    ways = {f"{way}, {name}": paint for way, paint in painting.items()}
    half = None
    if device.type == "cpu" and dtype == torch.float32 and not args.random:
        half = load_pretrained_model(args.model, torch.bfloat16, device)[2]
        painting = ways_to_paint(half, processor, prompts, args.parallel_size)
        ways |= {f"{way}, bfloat16": paint for way, paint in painting.items() if "by prompt" not in way}
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        measured = measure(ways, args.rounds, device)
    images, steps = args.prompts * args.parallel_size, num_image_tokens(model, processor)
    rates = hardware_rates(device) if device.type == "cuda" else None
    print(f"{images} images of {steps} tokens on {device.type}, {torch.get_num_threads()} threads\n")
    theirs = f"over transformers' batch, {name}"
    columns = ["", "images/s", "over the reference", theirs, "of its own dtype", "ms per step"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for way, m in measured.items():
        batches = args.prompts if "by prompt" in way else 1
        seconds = statistics.median(m["seconds"])
        m |= {
            "images_per_s": images / seconds,
            "over_reference": ratio(m, measured[f"reference loop, by prompt, {name}"]),
            "over_transformers": ratio(m, measured[f"{IN_ONE_BATCH}, {name}"]),
            "over_transformers_of_its_dtype": ratio(m, measured[f"{IN_ONE_BATCH}, {way.rpartition(', ')[2]}"]),
            "ms_per_step": 1e3 * seconds / steps / batches,
        }
        ratios = " | ".join(in_words(value) for key, value in m.items() if key.startswith("over_"))
        print(f"| {way} | {m['images_per_s']:.2f} | {ratios} | {m['ms_per_step']:.1f} |")
    if rates:
        length = max(len(processor.tokenizer.encode(p)) for p in prompts) + steps / 2
        least = floor_seconds(model, 2 * images, 1, length, rates)
        for way, m in measured.items():
            if "by prompt" not in way:
                m["step_over_floor"] = m["ms_per_step"] / 1e3 / least
                peak = m["peak_bytes"] / 2**30
                print(f"{way}: step time {m['step_over_floor']:.2f} times its floor, peak {peak:.2f} GiB")
    if half is not None:
        difference = pixel_difference(model, half, prompts, processor)
        words = f"at most {difference['largest']}, on average {difference['mean']:.2f} of 255"
        print(f"\nPixels of the same tokens, bfloat16 from float32: {words}")
    windows = compare_windows(model, processor, prompts, args.rounds)
    print(f"\nSampling alone, DoLa off, guidance {WINDOWS_CFG_WEIGHT}:\n")
    columns = ["images at a time", "window", "dtype", "times as fast as window 1", "tokens per pass", "tokens"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in windows:
        words = f"{in_words(row['times_as_fast'])} | {row['tokens_per_pass']:.1f}"
        print(f"| {row['images']} | {row['window']} | {name} | {words} | {'equal' if row['equal'] else 'not equal'} |")
    if args.json:
        facts = {"images": images, "steps": steps, "dtype": name, "device": device.type, "rates": rates}
        Path(args.json).write_text(json.dumps({**facts, "ways": measured, "windows": windows}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
