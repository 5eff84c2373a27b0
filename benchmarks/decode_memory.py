"""Peak host memory of decoding over weights plus KV cache plus one batch of logits, on the CPU (Linux).

python -m benchmarks.decode_memory [--images 16]
"""

from pathlib import Path

import torch

from generation_inference import Decoding, format_image_prompt, sample_image_tokens
from janus.dola.cli import JANUS_TINY, CommandParser, positive, run_command
from janus.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor

WIDTH, LAYERS, SIDE, PATCH = 1024, 8, 224, 16
TOKENS = (SIDE // PATCH) ** 2


def memory(key: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    parser = CommandParser(description="Peak host memory of decoding over weights, KV cache and logits.")
    parser.add_argument("--images", type=positive, default=16, help="images of one prompt (default: %(default)s)")
    args = parser.parse_args()
    processor = VLChatProcessor.from_pretrained(JANUS_TINY)
    tiny = MultiModalityCausalLM.from_pretrained(JANUS_TINY, dtype=torch.float32)
    prompt = format_image_prompt(processor, "a large red circle on a white background")
    sample_image_tokens(tiny, processor, [prompt], Decoding((6,)), parallel_size=1, seeds=[0])  # code and libraries
    del tiny
    before = memory("VmRSS")
    mlp = {"params": {"n_embed": WIDTH, "image_token_embed": WIDTH}}
    config = MultiModalityConfig(
        language_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2816,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 16,
            "vocab_size": 32000,
        },
        aligner_config=mlp,
        gen_aligner_config=mlp,
        gen_head_config=mlp,
    )
    model = MultiModalityCausalLM(config).eval()
    weights = sum(p.nbytes for p in model.parameters())
    rows, length = 2 * args.images, len(processor.tokenizer.encode(prompt)) + TOKENS
    cache = 2 * LAYERS * rows * length * WIDTH * 4
    logits = 2 * rows * model.gen_embed.weight.shape[0] * 4  # the last and one contrast layer
    processor.image_processor.image_size = SIDE
    sample_image_tokens(model, processor, [prompt], Decoding((6,)), parallel_size=args.images, seeds=[0])
    peak = memory("VmHWM") - before
    parts = {"weights": weights, "KV cache": cache, "one batch of logits": logits, "peak": peak}
    print(", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in parts.items()))
    print(f"peak over the sum: {peak / (weights + cache + logits):.3f}")


if __name__ == "__main__":
    run_command(main)
