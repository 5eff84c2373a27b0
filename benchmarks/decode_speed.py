"""Images per second: the reference loop, transformers' own Janus, and this project's batches, on the same weights.

python -m benchmarks.decode_speed [--model DIR | --random 1b|7b] [--prompts 16] [--parallel_size 4] [--json FILE]
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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


def run_transformers(theirs, model, processor, prompts: list[str], parallel_size: int, cfg_weight: float) -> None:
    batch = processor.batchify([(prompt, []) for prompt in prompts]).to(model.device)
    length = batch.input_ids.shape[1] + theirs.model.vision_model.config.num_image_tokens
    tokens = theirs.generate(
        past_key_values=StaticCache(theirs.config.text_config, length),  # what 5.17 fails to make for itself
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        generation_mode="image",
        do_sample=True,
        top_k=0,
        guidance_scale=cfg_weight,
        num_return_sequences=parallel_size,
    )
    for image in tokens_to_images(model, tokens):
        image.save("image.jpg")


def run_ours(model, processor, prompts: list[str], decoding: Decoding, parallel_size: int) -> None:
    seeds = list(range(len(prompts)))
    tokens = sample_image_tokens(model, processor, prompts, decoding, parallel_size=parallel_size, seeds=seeds)
    for image in tokens_to_images(model, tokens.flatten(0, 1)):
        image.save("image.jpg")


def measure(ways: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds of each way, the ways alternating; on CUDA also its peak memory in bytes."""
    measured: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
    for i in range(-1, rounds):  # the first round warms up
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
                measured[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
            if i >= 0:
                measured[name]["seconds"].append(time.perf_counter() - started)
    return {name: {**m, "seconds": statistics.median(m["seconds"])} for name, m in measured.items()}


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


def main() -> None:
    parser = CommandParser(description="Images per second: the reference loop, transformers' own Janus, and ours.")
    add_model_arguments(parser)
    parser.add_argument("--random", choices=SIZES, help="random weights at a published size instead of --model")
    parser.add_argument("--prompts", type=positive, default=16, help="prompts in a batch (default: %(default)s)")
    parser.add_argument("--parallel_size", type=positive, default=4, help="images per prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds, medians taken (default: %(default)s)")
    parser.add_argument("--json", help="file to write the table to as JSON (default: none)")
    args = parser.parse_args()
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
    theirs = as_transformers(model, processor)
    depth = len(model.language_model.model.layers)
    decodings = {
        "ours, DoLa off": Decoding(cfg_weight=3.0),
        "ours, DoLa static": Decoding(pick_contrast_layers(len(model.language_model.model.layers)), cfg_weight=3.0),
        "ours, early exit of 4": Decoding(tuple(range(depth - 4, depth)), cfg_weight=3.0),
    }
    n = args.parallel_size

    def reference() -> None:
        for prompt in prompts:
            generate(model, processor, prompt, parallel_size=n, cfg_weight=3.0)

    def transformers_each() -> None:
        for prompt in prompts:
            run_transformers(theirs, model, processor, [prompt], n, 3.0)

    ways: dict[str, Callable[[], None]] = {
        "reference loop, by prompt": reference,
        "transformers' generate, by prompt": transformers_each,
        "transformers' generate, one batch": lambda: run_transformers(theirs, model, processor, prompts, n, 3.0),
        **{name: lambda d=d: run_ours(model, processor, prompts, d, n) for name, d in decodings.items()},
    }
    if device.type == "cpu" and dtype == torch.float32 and not args.random:
        half = load_pretrained_model(args.model, torch.bfloat16, device)[2]
        ways["ours, DoLa static, in bfloat16"] = lambda: run_ours(
            half, processor, prompts, decodings["ours, DoLa static"], n
        )
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        measured = measure(ways, args.rounds, device)
        os.chdir(here)
    images, steps = args.prompts * n, num_image_tokens(model, processor)
    base = measured["reference loop, by prompt"]["seconds"]
    rates = hardware_rates(device) if device.type == "cuda" else None
    print(f"{images} images of {steps} tokens, {str(dtype).removeprefix('torch.')} on {device.type}\n")
    print("| | images/s | over the reference | ms per step and batch | peak GiB |\n|---|---|---|---|---|")
    for name, m in measured.items():
        batches = args.prompts if "by prompt" in name else 1
        m |= {
            "images_per_s": images / m["seconds"],
            "speedup": base / m["seconds"],
            "ms_per_step": 1e3 * m["seconds"] / steps / batches,
        }
        peak = f"{m['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in m else "not measured"
        print(f"| {name} | {m['images_per_s']:.2f} | {m['speedup']:.2f} | {m['ms_per_step']:.1f} | {peak} |")
        if rates and batches == 1:
            length = max(len(processor.tokenizer.encode(p)) for p in prompts) + steps / 2
            least = floor_seconds(model, 2 * images, 1, length, rates)
            m["step_over_floor"] = m["ms_per_step"] / 1e3 / least
    for name, m in measured.items():
        if "step_over_floor" in m:
            print(f"{name}: step time {m['step_over_floor']:.2f} times its floor")
    if args.json:
        facts = {"images": images, "steps": steps, "dtype": str(dtype), "device": device.type, "rates": rates}
        Path(args.json).write_text(json.dumps({**facts, "ways": measured}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
