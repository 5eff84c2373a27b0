"""DoLa on a SigLIP tower: candidate texts of an image, ranked by contrasting the last layer with an earlier one.

`python -m janus.dola.rerank --images a.png --candidates "a red circle" "a blue star"` prints the ranking.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize

from dola_runtime import (
    DEFAULT_ALPHA,
    check_layer,
    compute_logprobs_from_hidden,
    contrast_layers,
    pick_static_layer_index,
    probs_from_scores,
    sanitize_candidate_layers,
)
from janus.dola.cli import CommandParser, add_dola_arguments, add_model_arguments, run_command
from janus.dola.files import load_image, write_whole
from janus.dola.inputs import pixel_values
from janus.dola.switches import DoLaSwitches
from janus.dola.text_encoder import find_text_encoder

IMAGES_PER_BATCH, TEXTS_PER_BATCH = 32, 256

# --- features and texts ----------------------------------------------------------------------------------------------


def tower_depth(vit) -> int:
    """How many layers a Janus tower, a timm VisionTransformer, a SiglipVisionModel or a SiglipModel has."""
    blocks = getattr(vit, "blocks", None)
    return getattr(vit, "vision_model", vit).config.num_hidden_layers if blocks is None else len(blocks)


@torch.no_grad()
def pooled_features(vit, images: Tensor, layers: Iterable[int], norm: bool = True) -> Tensor:
    """Features of pixel values `[batch, 3, H, W]` at the given layers: `[layers, batch, width]`, in one forward pass.

    Layers count from 1; each is read on the last one's path, final norm and then pooling head. `norm=False` leaves the
    norm out before the last layer. Raises ValueError for a layer outside the tower, and for a tower without a pooling
    head.
    """
    layers, depth = list(layers), tower_depth(vit)
    if outside := [layer for layer in layers if not 1 <= layer <= depth]:
        raise ValueError(f"the tower's layers are 1..{depth}, got {outside}")
    wanted = sorted(set(layers))  # timm answers in the order of the blocks
    if hasattr(vit, "get_intermediate_layers"):
        outputs = vit.get_intermediate_layers(images, n=[layer - 1 for layer in wanted], return_prefix_tokens=True)
        # timm pairs an output with its prefix tokens only where there are any
        states = [out if isinstance(out, Tensor) else torch.cat([out[1], out[0]], dim=1) for out in outputs]
        ln_out = vit.norm if hasattr(vit, "norm") else vit.post_layernorm
        pool = partial(vit.forward_head, pre_logits=True)
    else:
        tower = getattr(vit, "vision_model", vit)
        if not hasattr(tower, "head"):
            raise ValueError(f"this {type(vit).__name__} has no pooling head (vision_use_head is false)")
        h, outputs = tower.embeddings(images), []  # block by block: 4.57 has no output_hidden_states for this tower
        for block in tower.encoder.layers[: wanted[-1]]:
            h = block(h, None)
            outputs.append(h := h[0] if isinstance(h, tuple) else h)  # a tuple before transformers 4.54
        states, ln_out, pool = [outputs[layer - 1] for layer in wanted], tower.post_layernorm, tower.head
    pooled = [pool(ln_out(h) if norm or layer == depth else h) for layer, h in zip(wanted, states, strict=True)]
    return torch.stack([pooled[wanted.index(layer)] for layer in layers])


def siglip_temperature(siglip) -> float:
    """The temperature a SigLIP was trained with, `exp(-logit_scale)`."""
    return siglip.logit_scale.neg().exp().item()


@torch.no_grad()
def build_text_bank(siglip, tokenizer, texts: Sequence[str]) -> Tensor:
    """Embeddings `[texts, width]` by a SiglipModel, which reads texts padded to its full length, and unmasked.

    Raises ValueError for no texts, and for a text without a token.
    """
    if not texts:
        raise ValueError("no candidates given")
    for text in texts:
        if not tokenizer.encode(text.strip(), add_special_tokens=False):
            raise ValueError(f"candidate {text!r} has no token")
    length = siglip.config.text_config.max_position_embeddings
    batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    chunks = batch["input_ids"].to(siglip.device).split(TEXTS_PER_BATCH)
    return torch.cat([siglip.text_model(ids).pooler_output for ids in chunks])


# --- from features to p_hat ------------------------------------------------------------------------------------------


def _candidate_logprobs(z: Tensor, text_bank: Tensor, tau: float, normalize: bool) -> Tensor:
    if not 0.0 < tau < float("inf"):
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if not len(text_bank):
        raise ValueError("text_bank holds no candidates")
    if z.shape[-1] != text_bank.shape[-1]:
        raise ValueError(f"text_bank has width {text_bank.shape[-1]}, the image features have width {z.shape[-1]}")
    z, t = z.float(), text_bank.to(z.device).float()
    if normalize:
        z, t = l2_normalize(z, dim=-1), l2_normalize(t, dim=-1)
    return compute_logprobs_from_hidden(z, None, lambda z: z @ t.T / tau)


def build_probs_from_rep(z: Tensor, text_bank: Tensor, tau: float = 1.0, normalize: bool = True) -> Tensor:
    """`q(c) = softmax(<z, t_c> / tau)`: features `[..., width]` and texts `[C, width]` to `[..., C]`, float32.

    z and text_bank are L2-normalised unless `normalize=False`. `tau = exp(-logit_scale)` is the temperature that a
    SigLIP was trained with; its logit_bias adds the same to every candidate and drops out. Raises ValueError for a tau
    that is not positive, no candidates, and widths that differ.
    """
    return _candidate_logprobs(z, text_bank, tau, normalize).exp()


def rerank_with_dola_static_siglip(
    vit,
    images: Tensor,
    text_bank: Tensor,
    layer: int,
    alpha: float = DEFAULT_ALPHA,
    tau: float = 1.0,
    normalize: bool = True,
    gamma: float = 1.0,
    norm: bool = True,
) -> Tensor:
    """p_hat `[batch, C]` of pixel values `[batch, 3, H, W]` over texts `[C, width]`, against a fixed earlier layer.

    `layer` is in 1..N; N is the bypass, q_N itself. `vit` is a Janus tower, a timm VisionTransformer, or transformers'
    SiglipModel or SiglipVisionModel. `gamma` is the contrast's weight (0 is APC only), `norm=False` reads the layer
    without the final norm. Raises ValueError for a layer outside the tower, an alpha outside [0, 1], and as
    `build_probs_from_rep`. Source: plan 6, section 1.1.
    """
    depth = tower_depth(vit)
    check_layer(layer, depth)
    features = pooled_features(vit, images, [layer, depth], norm)
    log_qj, log_qN = _candidate_logprobs(features, text_bank, tau, normalize)
    if layer == depth:
        return log_qN.exp()
    return probs_from_scores(contrast_layers(log_qN, log_qj[None], alpha, gamma)[0])


def rerank_with_dola_siglip(
    vit,
    images: Tensor,
    text_bank: Tensor,
    alpha: float = DEFAULT_ALPHA,
    tau: float = 1.0,
    candidate_layers: Sequence[int] = (18, 20, 22),
    normalize: bool = True,
    gamma: float = 1.0,
    norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Early exit: p_hat `[batch, C]`, and the layer (counted from 1) each image was contrasted with, `[batch]` int64.

    Per image it is the candidate layer whose q differs most from q_N. Candidates outside 1..N-1 are dropped; raises
    ValueError where none is left, and as `rerank_with_dola_static_siglip`.
    """
    depth = tower_depth(vit)
    layers = sanitize_candidate_layers(candidate_layers, depth)
    features = pooled_features(vit, images, [*layers, depth], norm)
    log_q = _candidate_logprobs(features, text_bank, tau, normalize)
    scores, _, choice = contrast_layers(log_q[-1], log_q[:-1], alpha, gamma)
    choice = torch.zeros_like(scores[:, 0], dtype=torch.long) if choice is None else choice
    return probs_from_scores(scores), torch.tensor(layers, device=choice.device)[choice]


# --- the command -----------------------------------------------------------------------------------------------------


def vision_layer(vit, switches: DoLaSwitches) -> int:
    """The layer `rerank_with_dola_static_siglip` takes: fixed_layer_vit, else 0.8 of the depth; off, the bypass."""
    depth = tower_depth(vit)
    if not switches.use_dola_siglip_static:
        return depth
    return switches.fixed_layer_vit or pick_static_layer_index(depth)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m janus.dola.rerank",
        description="Rank candidate texts on images with Janus's SigLIP tower, with DoLa unless --no_dola.",
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument_group("input and output").add_argument
    add("--images", nargs="+", required=True, metavar="FILE", help="image files")
    add("--candidates", nargs="+", required=True, metavar="TEXT", help="texts to rank, or @FILE with one per line")
    add("--text_encoder", help="SiglipModel that embeds the texts: directory or hub id (default: siglip/ in --model)")
    add("--json", type=Path, metavar="FILE", help="write the ranking there too (default: terminal only)")
    add("--tau", type=float, help="temperature, above 0 (default: the text encoder's exp(-logit_scale))")
    add("--no_dola", action="store_true", help="rank by the last layer alone (default: DoLa)")
    add_model_arguments(parser)
    add_dola_arguments(parser, "0.8 of the depth", DoLaSwitches.alpha_V)
    return parser


def main() -> None:
    from janus.dola.loading import load_pretrained_model  # here, so that the rest runs beside the original code too

    parser = build_parser()
    args = parser.parse_args()
    if args.domain is not None and args.config is None:
        parser.error("--domain needs --config")
    switches = DoLaSwitches.from_json(args.config, args.domain) if args.config else DoLaSwitches()
    given = {"alpha_V": args.alpha, "gamma_V": args.gamma}
    switches = replace(switches, **{name: value for name, value in given.items() if value is not None})
    pictures = [load_image(path) for path in args.images]
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device, args.quantize, args.offload)
    siglip, tokenizer = find_text_encoder(args.model, args.text_encoder)
    tau = siglip_temperature(siglip) if args.tau is None else args.tau
    bank = build_text_bank(siglip, tokenizer, args.candidates)

    tower, ranked = model.vision_model.vision_tower, []
    layer, contrast = vision_layer(tower, switches), {"gamma": switches.gamma_V, "norm": not args.no_norm}
    if args.no_dola:
        layer = tower_depth(tower)
    elif args.layer is not None:
        layer = args.layer
    elif args.layer_ratio is not None:
        layer = pick_static_layer_index(tower_depth(tower), args.layer_ratio)
    weight: Any = model.language_model.get_input_embeddings().weight
    for start in range(0, len(pictures), IMAGES_PER_BATCH):
        images = pixel_values(processor.image_processor, pictures[start : start + IMAGES_PER_BATCH]).to(weight)
        if args.candidate_layers is None:
            p_hat = rerank_with_dola_static_siglip(tower, images, bank, layer, switches.alpha_V, tau, **contrast)
            layers = [layer] * len(images)
        else:
            p_hat, chosen = rerank_with_dola_siglip(
                tower, images, bank, switches.alpha_V, tau, args.candidate_layers, **contrast
            )
            layers = chosen.tolist()
        for path, row, layer in zip(args.images[start:], p_hat.tolist(), layers, strict=False):
            ranking = sorted(zip(row, args.candidates, strict=True), key=lambda pair: -pair[0])
            ranked.append(
                {"image": path, "layer": layer, "ranking": [{"candidate": c, "p_hat": p} for p, c in ranking]}
            )

    for entry in ranked:
        print(f"{entry['image']}  (layer {entry['layer']} of {tower_depth(tower)}, tau {tau:.4g})")
        for rank, row in enumerate(entry["ranking"], start=1):
            print(f"{rank:4}  {row['p_hat']:.4f}  {row['candidate']}")
    if args.json:
        text = json.dumps(ranked, indent=1, ensure_ascii=False) + "\n"
        write_whole(args.json, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    run_command(main)
