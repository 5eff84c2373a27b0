"""Trains janus-tiny from nothing on drawn scenes: `python -m tools.train_janus_tiny`.

Four stages, each resumable and budgeted in steps: `vq` (the image codes), `tower` (SigLIP, contrastively, with its
text encoder), `decoder` (what paints the codes, with the codes fixed), `llama` (text-to-image and questions, jointly).
Then the checkpoint is written in the original Janus format. Every batch is a function of (seed, stage, step), so a
resumed run sees what an uninterrupted one sees.

`--start_from CHECKPOINT` takes codes, tower, text encoder and all first weights from an earlier janus-tiny: only
`decoder` and `llama` run. `--only decoder` and `--only llama` run one of them, in processes side by side.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

from generation_inference import format_image_prompt, render_chat
from janus.dola.scorers import VQA_QUESTION
from janus.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from janus.utils.conversation import EOS, SYSTEM_PROMPT
from tools import scenes
from tools.scenes import Scene

LOG = logging.getLogger("janus-tiny")
SEED = 0
PATCH = 8
CODES, CODE_DIM = 1024, 8
TEXT_TOKENS = 20  # what the text encoder reads
BOS, PAD = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL_FIRST = [BOS, EOS]
SPECIAL_LAST = [PAD, "<image_placeholder>", "<patch_placeholder>", "<begin_of_image>", "<end_of_image>"]
ROLES = ["<|User|>", "<|Assistant|>"]
CFG_WEIGHT, TEMPERATURE = 1.25, 0.25  # of seven pairs tried, one that meets every prompt, and nearly all of them clean


def janus_config(vocab_size: int) -> MultiModalityConfig:
    """The sizes of every part, in the words of the original format."""
    width, tower_width = 256, 128
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    sections = {
        "vision": {
            "image_size": scenes.SIDE,
            "model_name": "siglip_janus_tiny",
            "select_feature": "same",
            "select_layer": -1,
            "width": tower_width,
            "layers": 6,
            "heads": 4,
            "mlp_ratio": 4.0,
            "patch_size": PATCH,
        },
        "aligner": mlp | {"input_dim": tower_width},
        "gen_vision": {
            "image_token_size": CODES,
            "n_embed": CODE_DIM,
            "ch": 64,
            "ch_mult": [1, 1, 2, 2],
            "num_res_blocks": 1,
            "z_channels": 64,
        },
        "gen_aligner": mlp | {"input_dim": CODE_DIM},
        "gen_head": {"image_token_embed": width, "image_token_size": CODES, "n_embed": width},
    }
    classes = {"vision": "CLIPVisionTower", "gen_vision": "VQ-16", "gen_head": "vision_head"}
    return MultiModalityConfig(
        language_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=4,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
        ),
        **{
            f"{name}_config": {"cls": classes.get(name, "MlpProjector"), "model_type": name, "params": params}
            for name, params in sections.items()
        },
    )


def rng_at(stage: str, step: int) -> np.random.Generator:
    return np.random.default_rng([SEED, sum(stage.encode()), step])


def seen(of_kind: list[Scene]) -> list[Scene]:
    return [scene for scene in of_kind if not scenes.is_held_out(scene)]


ONE, TWO = seen(scenes.one_object_scenes()), seen(scenes.two_object_scenes())


def sample_scenes(rng: np.random.Generator, count: int, share_of_one: float = 0.4) -> list[Scene]:
    """`count` seen scenes, a share of them with one object."""
    kinds = [ONE if pick < share_of_one else TWO for pick in rng.random(count)]
    return [kind[rng.integers(len(kind))] for kind in kinds]


def pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 [64, 64, 3] each -> float32 [batch, 3, 64, 64] in [-1, 1], as both the VQ model and the tower read them."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(
    stage: str, model: nn.Module, loss_at: Callable[[int], Tensor], steps: int, lr: Callable[[float], float], work: Path
) -> None:
    """Runs AdamW to `steps`, from the last checkpoint in `work` if there is one.

    `lr` maps progress in [0, 1) to a rate. Matrices decay, and vectors (norms, biases) do not. The gradient is clipped
    to norm 1.
    """
    path = work / f"{stage}.pt"
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98))
    start, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
        LOG.info("%s: resumed at step %d of %d", stage, start, steps)
    began, losses = time.monotonic() - spent, []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr(step / steps)
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0 or done == steps:
            seconds = time.monotonic() - began
            LOG.info("%s: step %d/%d loss %.4f after %.0f s", stage, done, steps, np.mean(losses), seconds)
            losses.clear()
            if done % 250 == 0 or done == steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"step": done, "seconds": seconds}, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)


# --- the VQ model


class VQ(nn.Module):
    """The Janus VQ model with an l2-normalised codebook, and how long each code has lain idle."""

    idle: Tensor

    def __init__(self, config: MultiModalityConfig):
        super().__init__()
        self.vq = JanusVQVAE(config.vq).train()
        self.register_buffer("idle", torch.zeros(CODES, dtype=torch.long))

    def codebook(self) -> Tensor:
        return normalize(self.vq.quantize.embedding.weight, dim=-1)

    def latents(self, x: Tensor) -> Tensor:
        """[batch, 3, 64, 64] -> unit vectors [batch, 8, 8, CODE_DIM]."""
        return normalize(self.vq.quant_conv(self.vq.encoder(x)).float().permute(0, 2, 3, 1), dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        """[batch, 3, 64, 64] -> codes [batch, 64]."""
        return nearest(self.latents(x), self.codebook()).flatten(1)

    def decode(self, z: Tensor) -> Tensor:
        """[batch, 8, 8, CODE_DIM] -> [batch, 3, 64, 64]."""
        return self.vq.decoder(self.vq.post_quant_conv(z.permute(0, 3, 1, 2)))


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    return (z @ codebook.T).argmax(-1)


def drawn(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 64, 64] and the mask [count, 1, 64, 64] of their pixels off the background."""
    batch = sample_scenes(rng, count)
    x = pixels([scenes.draw(scene, rng) for scene in batch])
    return x, off_background(x, [scene.background for scene in batch])


def off_background(x: Tensor, backgrounds: list[str]) -> Tensor:
    behind = torch.tensor([scenes.BACKGROUNDS[name] for name in backgrounds]).view(-1, 1, 1, 1) / 127.5 - 1
    return ((x - behind).abs() > 1e-3).any(1, keepdim=True)


def patches_off_background(off: Tensor) -> Tensor:
    """bool [batch, 1, 64, 64] -> bool [batch, 8, 8]."""
    return nn.functional.max_pool2d(off.float(), PATCH)[:, 0].bool()


@torch.no_grad()
def codebook_by_kmeans(model: VQ, rng: np.random.Generator) -> Tensor:
    """Spherical k-means over encoder outputs, three foreground patches to one of background: [CODES, CODE_DIM]."""
    foreground, background = [], []
    for _ in range(48):
        x, off = drawn(rng, 16)
        z, on_object = model.latents(x), patches_off_background(off)
        foreground.append(z[on_object])
        background.append(z[~on_object])
    points = torch.cat(foreground)
    plain = torch.cat(background)
    points = torch.cat([points, plain[rng.permutation(len(plain))[: len(points) // 3]]])
    centres = points[rng.permutation(len(points))[:CODES]]
    for _ in range(20):
        assigned = nearest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        empty = (sums == 0).all(-1)
        sums[empty] = points[rng.permutation(len(points))[: int(empty.sum())]]
        centres = normalize(sums, dim=-1)
    return centres


def painting_error(y: Tensor, x: Tensor, off: Tensor) -> Tensor:
    """How far y lies from x `[batch, 3, 64, 64]`, where a pixel off the background counts four times: a scalar."""
    weight = 1 + 3 * off.float()
    error = y - x
    return (weight / weight.mean() * (error.abs() + error.pow(2))).mean()


def train_vq(config: MultiModalityConfig, work: Path, steps: int) -> VQ:
    torch.manual_seed(SEED)
    model = VQ(config).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    quantised_from, revive_until = int(0.33 * steps), int(0.85 * steps)

    def loss_at(step: int) -> Tensor:
        rng = rng_at("vq", step)
        x, off = drawn(rng, 16)
        if step == quantised_from:
            model.vq.quantize.embedding.weight.data.copy_(codebook_by_kmeans(model, rng))
        with torch.autocast("cpu", torch.bfloat16):
            z = model.latents(x.contiguous(memory_format=torch.channels_last))
            codebook_loss = torch.zeros(())
            if step < quantised_from:
                quantised = z
            else:
                codebook = model.codebook()
                codes = nearest(z.detach(), codebook.detach())
                chosen = codebook[codes]
                to_code = (chosen - z.detach()).pow(2).sum(-1).mean()
                to_encoder = (chosen.detach() - z).pow(2).sum(-1).mean()
                codebook_loss = to_code + 0.25 * to_encoder
                quantised = z + (chosen - z).detach()
                used = one_hot(codes.flatten(), CODES).any(0)
                model.idle.add_(1)[used] = 0
                if step < revive_until and step % 20 == 0:
                    revive(model, z.detach()[patches_off_background(off)], rng)
            y = model.decode(quantised).float()
        return painting_error(y, x, off) + codebook_loss

    def lr(progress: float) -> float:
        return 1e-3 * min(1.0, progress * steps / 100) * min(1.0, (1.02 - progress) / (1 - 0.33))

    fit("vq", model, loss_at, steps, lr, work)
    return model.eval()


def revive(model: VQ, candidates: Tensor, rng: np.random.Generator) -> None:
    """Moves codes that nothing chose for 100 steps onto encoder outputs [n, CODE_DIM] of foreground patches."""
    dead = (model.idle > 100).nonzero()[:, 0][: len(candidates)]
    model.vq.quantize.embedding.weight.data[dead] = candidates[rng.permutation(len(candidates))[: len(dead)]]
    model.idle[dead] = 0


class Bank(NamedTuple):
    """Drawings as (scene, shift), their codes [drawings, 64], and how often each is sampled [drawings]."""

    drawings: list[tuple[Scene, tuple[int, int]]]
    codes: Tensor
    weights: np.ndarray

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.choice(len(self.drawings), count, p=self.weights)


@torch.no_grad()
def encode_drawings(vq: VQ, path: Path) -> Bank:
    """Every seen one-object scene in every shift, every seen two-object scene unshifted and in two; codes in `path`.

    To be sampled so that 35% show one object, and half of either kind are not shifted.
    """
    rng = rng_at("codes", 0)
    around = range(-scenes.JITTER, scenes.JITTER + 1)
    shifts = [(dx, dy) for dx in around for dy in around]
    drawings = [(scene, shift) for scene in ONE for shift in shifts]
    shifts.remove((0, 0))
    for scene in TWO:
        drawings += [(scene, (0, 0)), *((scene, shifts[k]) for k in rng.permutation(len(shifts))[:2])]
    of = [(scene.caption, shift) for scene, shift in drawings]
    if not path.exists() or torch.load(path, weights_only=True)["of"] != of:
        codes = []
        for start in range(0, len(drawings), 64):
            x = pixels([scenes.render(scene, *shift) for scene, shift in drawings[start : start + 64]])
            with torch.autocast("cpu", torch.bfloat16):
                codes.append(vq.encode(x.contiguous(memory_format=torch.channels_last)).short())
        torch.save({"of": of, "codes": torch.cat(codes)}, path)
        LOG.info("encoded %d drawings", len(drawings))
    group = np.array([2 * (scene.size is None) + (shift != (0, 0)) for scene, shift in drawings])
    weights = (np.array([0.35, 0.35, 0.65, 0.65]) / 2 / np.bincount(group))[group]
    return Bank(drawings, torch.load(path, weights_only=True)["codes"].long(), weights)


def draw_oblong(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """What no caption names: a rectangle, far from a square, in any of the colours on any background, anywhere."""
    width, height = rng.uniform(0.15, 0.9, 2) * scenes.SIDE
    if abs(np.log(width / height)) < 0.15:
        return draw_oblong(rng)
    x, y = rng.uniform(0, 1, 2) * (scenes.SIDE - np.array([width, height]))
    covered = Image.new("L", (scenes.SIDE * scenes.SUPERSAMPLING, scenes.SIDE * scenes.SUPERSAMPLING))
    corners = np.array([x, y, x + width, y + height]) * scenes.SUPERSAMPLING - 0.5
    ImageDraw.Draw(covered).rectangle(tuple(corners.tolist()), fill=255)
    mask = np.asarray(covered.reduce(scenes.SUPERSAMPLING), dtype=np.float32)[..., None] / 255
    colour, background = rng.choice(list(scenes.COLOURS)), str(rng.choice(list(scenes.BACKGROUNDS)))
    grey = scenes.BACKGROUNDS[background]
    return (grey + mask * (np.array(scenes.COLOURS[colour]) - grey)).round().astype(np.uint8), background


def train_decoder(vq: VQ, bank: Bank, work: Path, steps: int) -> VQ:
    """Crisper pictures of the same codes: encoder and codebook stay as they are, and edges count beside colours.

    A quarter of the pictures are oblongs, so that codes come in company that no caption brings together.
    """
    for part in (vq.vq.encoder, vq.vq.quant_conv, vq.vq.quantize):
        part.requires_grad_(False)
    vq.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    codebook = vq.codebook().detach()

    def loss_at(step: int) -> Tensor:
        rng = rng_at("decoder", step)
        picks = bank.sample(rng, 12)
        drawings = [bank.drawings[k] for k in picks]
        oblongs, behind = zip(*(draw_oblong(rng) for _ in range(4)), strict=True)
        x = pixels([scenes.render(scene, *shift) for scene, shift in drawings] + list(oblongs))
        side = scenes.SIDE // PATCH
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                stray = vq.encode(x[len(picks) :].contiguous(memory_format=torch.channels_last))
            codes = torch.cat([bank.codes[picks], stray])
            y = vq.decode(codebook[codes].unflatten(1, (side, side))).float()
        edges = sum(torch.diff(y - x, dim=dim).abs().mean() for dim in (2, 3))
        return painting_error(y, x, off_background(x, [*(scene.background for scene, _ in drawings), *behind])) + edges

    def lr(progress: float) -> float:
        return 5e-4 * min(1.0, progress * steps / 100) * (1.01 - progress)

    fit("decoder", vq, loss_at, steps, lr, work)
    return vq.eval()


# --- the tokenizer


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE whose merges make every word of the scenes, the questions and the system prompt one token."""
    tokenizer = Tokenizer(models.BPE())
    pieces = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(piece), "isolated") for piece in pieces]
        + [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    every = scenes.one_object_scenes() + scenes.two_object_scenes()[::5]
    asked = [f"\n{question}\n\n: {answer}" for scene in every for _, question, answer in scenes.questions(scene)]
    words = [*scenes.COLOURS, *scenes.SHAPES, *scenes.BACKGROUNDS, *scenes.SIZES]
    corpus = asked + 50 * [*words, "a", SYSTEM_PROMPT]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=50,
        special_tokens=SPECIAL_FIRST,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL_LAST)
    tokenizer.add_tokens(ROLES)
    return tokenizer


# --- the tower and its text encoder


def near_misses(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """Seen scenes that differ from `scene` in one respect, of those that are hardest to tell: hard negatives."""

    def other(names: Iterable[str], than: str) -> str:
        return str(rng.choice([name for name in names if name != than]))

    changed = [
        replace(scene, objects=(*scene.objects[:k], (colour, other(scenes.SHAPES, shape)), *scene.objects[k + 1 :]))
        for k, (colour, shape) in enumerate(scene.objects)
    ]
    if scene.size:
        changed.append(replace(scene, size=other(scenes.SIZES, scene.size)))
    else:
        (colour_a, shape_a), (colour_b, shape_b) = scene.objects
        changed.append(replace(scene, objects=((colour_a, shape_b), (colour_b, shape_a))))
        changed.append(replace(scene, objects=scene.objects[::-1]))
        changed.append(replace(scene, relation=other(scenes.RELATIONS, str(scene.relation))))
    return [miss for miss in seen(changed) if miss != scene and len(set(miss.objects)) == len(scene.objects)]


THINGS = [f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]
PARTS = [
    [*scenes.COLOURS],
    [*scenes.SHAPES],
    [f"a {thing}" for thing in THINGS],
    [f"a {name} background" for name in scenes.BACKGROUNDS],
]


def parts_of(scene: Scene) -> set[str]:
    """The texts of `PARTS` that are true of a scene."""
    words = {word for colour_and_shape in scene.objects for word in colour_and_shape}
    objects = {f"a {colour} {shape}" for colour, shape in scene.objects}
    return words | objects | {f"a {scene.background} background"}


def soft_cross_entropy(logits: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy [rows, candidates] against a target spread evenly over each row's true candidates."""
    return cross_entropy(logits, true.float() / true.sum(-1, keepdim=True))


def train_tower(config: MultiModalityConfig, work: Path, steps: int, tokenizer: Tokenizer) -> SiglipModel:
    torch.manual_seed(SEED)
    vision = config.siglip
    text = SiglipTextConfig(
        vocab_size=config.language_config.vocab_size,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=vision.num_attention_heads,
        hidden_act="gelu",
        max_position_embeddings=TEXT_TOKENS,
        projection_size=vision.hidden_size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())).train()
    model.logit_scale.data.fill_(np.log(20.0))
    tokenizer.enable_padding(length=TEXT_TOKENS, pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    tokenizer.enable_truncation(TEXT_TOKENS)

    def embed(texts: list[str]) -> Tensor:
        ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
        return normalize(model.text_model(ids).pooler_output.float(), dim=-1)

    def loss_at(step: int) -> Tensor:
        rng = rng_at("tower", step)
        batch = sample_scenes(rng, 64, share_of_one=0.3)
        x = pixels([scenes.draw(scene, rng) for scene in batch])
        x = x + torch.from_numpy(rng.normal(0, 0.1, x.shape) * rng.random((len(batch), 1, 1, 1))).float()
        own = [scene.caption for scene in batch]
        captions = list(dict.fromkeys(own + [miss.caption for scene in batch for miss in near_misses(scene, rng)]))
        true_parts = [parts_of(scene) for scene in batch]
        with torch.autocast("cpu", torch.bfloat16):
            images = normalize(model.vision_model(x).pooler_output.float(), dim=-1)
            texts = embed(captions + [text for group in PARTS for text in group])
        scores = model.logit_scale.exp().clamp(max=100) * images @ texts.T
        whole, *parts = scores.split([len(captions), *map(len, PARTS)], dim=1)
        true = torch.tensor([[caption == candidate for candidate in captions] for caption in own])
        shown = true.any(0)
        loss = soft_cross_entropy(whole, true) + soft_cross_entropy(whole[:, shown].T, true[:, shown].T)
        for group, part in zip(PARTS, parts, strict=True):
            true = torch.tensor([[text in true_of_scene for text in group] for true_of_scene in true_parts])
            loss = loss + 0.25 * soft_cross_entropy(part, true)
        return loss

    def lr(progress: float) -> float:
        return 1e-3 * min(1.0, progress * steps / 100) * (1.01 - progress)

    fit("tower", model, loss_at, steps, lr, work)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return model.eval()


# --- the language model, on text-to-image and on questions


def write_processor(tokenizer: Tokenizer, directory: Path) -> VLChatProcessor:
    """Writes the tokenizer and processor files of the original format, and reads them back."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
        },
        "special_tokens_map.json": {
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "additional_special_tokens": SPECIAL_LAST[1:],
        },
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": "<image_placeholder>",
            "add_special_token": False,
            "ignore_id": -100,
            "mask_prompt": True,
            "num_image_tokens": (scenes.SIDE // PATCH) ** 2,
            "sft_format": "deepseek",
        },
        "preprocessor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_processor_type": "VLMImageProcessor",
            "image_size": scenes.SIDE,
            "min_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "background_color": [127, 127, 127],
            "do_normalize": True,
            "rescale_factor": 1 / 255,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    return VLChatProcessor.from_pretrained(directory)


def render_question(processor: VLChatProcessor, question: str, answer: str) -> tuple[str, str]:
    """A conversation about one image, up to where its question begins, and from there on."""
    head = f"{processor.image_tag}\n"
    before, after = render_chat(processor, [head + question, answer], processor.system_prompt).split(head)
    return before + head, after


def yes_or_no(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Two more of `scenes.questions`: is an object there, and is a caption true; every other answer is no."""
    own = [*map(" ".join, scene.objects)]
    alike = [a for a in THINGS if a not in own and any(set(a.split()) & set(b.split()) for b in own)]
    absent = rng.choice(alike if rng.random() < 0.5 else [a for a in THINGS if a not in own])
    thing = rng.choice([rng.choice(own), absent])
    misses = [miss.caption for miss in near_misses(scene, rng)]
    caption = rng.choice([scene.caption, rng.choice(misses or [scene.caption])])
    asked = [
        (f"Is there a {thing} in the image?", thing in own),
        (VQA_QUESTION.format(caption), caption == scene.caption),
    ]
    return [("yes or no", question, "yes" if true else "no") for question, true in asked]


class Turns(NamedTuple):
    """Token ids `[batch, T]` of questions and answers in a row, and how they follow the P tokens before them.

    `mask` is bool `[batch, 1, P + T, P + T]`, `position_ids` `[batch, P + T]`: each turn stands right behind the P
    tokens and sees them and itself, so that no answer can be read off another one.
    """

    ids: Tensor
    mask: Tensor
    position_ids: Tensor


def pack_turns(processor: VLChatProcessor, asked: list[list[tuple[str, str, str]]], before: int) -> Turns:
    """Rows of (kind, question, answer) as `scenes.questions` gives them, each behind `before` tokens."""
    ids, turn_of, positions = [], [], []
    for row in asked:
        texts = [render_question(processor, question, answer)[1] for _, question, answer in row]
        turns = [processor.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        ids.append(torch.tensor([token for turn in turns for token in turn]))
        turn_of.append(torch.tensor([0] * before + [k for k, turn in enumerate(turns, 1) for _ in turn]))
        positions.append(torch.cat([torch.arange(before), *(before + torch.arange(len(turn)) for turn in turns)]))
    turn = pad_sequence(turn_of, batch_first=True, padding_value=-1)
    sees = (turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None])
    return Turns(
        ids=pad_sequence(ids, batch_first=True, padding_value=processor.pad_id),
        mask=sees.tril()[:, None],
        position_ids=pad_sequence(positions, batch_first=True),
    )


def answer_labels(ids: Tensor, processor: VLChatProcessor) -> Tensor:
    """Labels [batch, T]: what follows each "<|Assistant|>:" up to its eos, and -100 elsewhere."""
    vocabulary = processor.tokenizer.get_vocab()
    assistant, eos = vocabulary[ROLES[1]], vocabulary[EOS]
    labels = torch.full_like(ids, -100)
    for row, label in zip(ids.tolist(), labels, strict=True):
        for turn in (i for i, token in enumerate(row) if token == assistant):
            end = row.index(eos, turn)
            label[turn + 2 : end + 1] = torch.tensor(row[turn + 2 : end + 1])
    return labels


def untrained(config: MultiModalityConfig, vq: VQ, siglip: SiglipModel) -> MultiModalityCausalLM:
    """A Janus around a trained VQ model and tower, with the codebook as the first embedding of image tokens."""
    torch.manual_seed(SEED)
    model = MultiModalityCausalLM(config)
    model.vision_model.vision_tower.load_state_dict(siglip.vision_model.state_dict())
    model.gen_vision_model.load_state_dict(vq.vq.state_dict())
    model.gen_vision_model.quantize.embedding.weight.data.copy_(vq.codebook())
    model.gen_embed.weight.data.copy_(vq.codebook())
    return model


def misdrawn(codes: Tensor, codebook: Tensor, rng: np.random.Generator) -> Tensor:
    """Codes [batch, T] as sampling errs: up to a tenth of a row's are another drawing's, or codes near the true one."""
    wrong = rng.random(codes.shape) < 0.1 * rng.random((len(codes), 1))
    near = (codebook[codes] @ codebook.T).topk(9, dim=-1).indices[..., 1:]
    near = near.take_along_dim(torch.from_numpy(rng.integers(0, 8, (*codes.shape, 1))), -1)[..., 0]
    other = torch.where(torch.from_numpy(rng.random(codes.shape) < 0.5), near, codes.roll(1, dims=0))
    return torch.where(torch.from_numpy(wrong), other, codes)


def train_llama(
    model: MultiModalityCausalLM, work: Path, steps: int, peak: float, bank: Bank, processor: VLChatProcessor
) -> MultiModalityCausalLM:
    """`peak`: the highest rate of learning."""
    model.train()
    for part in (model.vision_model, model.gen_vision_model):
        part.eval().requires_grad_(False)
    codebook = model.gen_vision_model.quantize.embedding.weight
    backbone, pad = model.language_model.model, processor.pad_id
    before_question, _ = render_question(processor, "What?", "")

    def prompt_ids(scene: Scene) -> list[int]:
        return processor.tokenizer.encode(format_image_prompt(processor, scene.caption))

    def painting_loss(rng: np.random.Generator) -> Tensor:
        """Text to image: 32 prompts, a tenth of them blanked as guidance blanks them."""
        picks = bank.sample(rng, 32)
        prompts = [prompt_ids(bank.drawings[k][0]) for k in picks]
        longest, codes = max(map(len, prompts)), bank.codes[picks]
        ids = torch.full((len(prompts), longest + codes.shape[1] - 1), pad)
        painted = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            blank = [prompt[0], *[pad] * (len(prompt) - 2), prompt[-1]]
            ids[row, : len(prompt)] = torch.tensor(blank if rng.random() < 0.1 else prompt)
            painted[row, len(prompt) : len(prompt) + codes.shape[1] - 1] = True
        embeds = model.get_input_embeddings()(ids)
        shown = misdrawn(codes[:, :-1], codebook, rng)
        embeds[painted] = model.prepare_gen_img_embeds(shown).flatten(0, 1).to(embeds.dtype)
        predicting = painted | painted.roll(-1, dims=1)
        hidden = backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state[predicting]
        return cross_entropy(model.gen_head(hidden).float(), codes.flatten())

    def answering_loss(rng: np.random.Generator) -> Tensor:
        """Questions about images: 10 images, each with every question about it."""
        batch = sample_scenes(rng, 10, share_of_one=0.2)
        images = [Image.fromarray(scenes.draw(scene, rng)) for scene in batch]
        head = processor.batchify([(before_question, [image]) for image in images])
        asked = [scenes.questions(scene) + yes_or_no(scene, rng) + yes_or_no(scene, rng) for scene in batch]
        turns = pack_turns(processor, asked, head.input_ids.shape[1])
        embeds = model.prepare_inputs_embeds(**vars(head))
        embeds = torch.cat([embeds, model.get_input_embeddings()(turns.ids).to(embeds.dtype)], dim=1)
        hidden = backbone(
            inputs_embeds=embeds, attention_mask=turns.mask, position_ids=turns.position_ids, use_cache=False
        ).last_hidden_state[:, -turns.ids.shape[1] : -1]
        labels = answer_labels(turns.ids, processor)[:, 1:]
        asked_for = labels != -100
        return cross_entropy(model.language_model.lm_head(hidden[asked_for]).float(), labels[asked_for])

    def loss_at(step: int) -> Tensor:
        rng = rng_at("llama", step)
        with torch.autocast("cpu", torch.bfloat16):
            return painting_loss(rng) + answering_loss(rng)

    def lr(progress: float) -> float:
        return peak * min(1.0, progress * steps / 150) * (1.005 - progress)

    fit("llama", model, loss_at, steps, lr, work)
    return model.eval()


# --- the checkpoint


def export(model: MultiModalityCausalLM, siglip: SiglipModel, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the bfloat16 checkpoint in the original format, and the SiglipModel beside it."""
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, guidance_scale=CFG_WEIGHT, temperature=TEMPERATURE, do_sample=True
    )
    model.bfloat16().save_pretrained(out)
    write_processor(tokenizer, out)
    siglip.bfloat16().save_pretrained(out / "siglip")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, model_max_length=TEXT_TOKENS, model_input_names=["input_ids"]
    ).save_pretrained(out / "siglip")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    LOG.info("export: %s, %.1f MB", out, size / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/janus-tiny"), help="checkpoints and log of the stages")
    parser.add_argument("--vq-steps", type=int, default=2400)
    parser.add_argument("--tower-steps", type=int, default=2400)
    parser.add_argument("--decoder-steps", type=int, default=2400)
    parser.add_argument("--llama-steps", type=int, default=4000)
    parser.add_argument("--start_from", type=Path, help="an earlier janus-tiny, whose weights are gone on from")
    parser.add_argument("--only", choices=["decoder", "llama"], help="run this stage, write no checkpoint")
    parser.add_argument("--out", type=Path, default=Path("janus/checkpoints/janus-tiny"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.work / "log.txt")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    tokenizer = build_tokenizer()
    processor = write_processor(tokenizer, args.work / "processor")
    if args.start_from:
        model = MultiModalityCausalLM.from_pretrained(args.start_from, dtype=torch.float32)
        siglip = SiglipModel.from_pretrained(args.start_from / "siglip").float()
        vq = VQ(janus_config(model.config.language_config.vocab_size))
        vq.vq.load_state_dict(model.gen_vision_model.state_dict())
    else:
        config = janus_config(-(-tokenizer.get_vocab_size() // 64) * 64)
        vq = train_vq(config, args.work, args.vq_steps)
        siglip = train_tower(config, args.work, args.tower_steps, tokenizer)
        model = untrained(config, vq, siglip)
    bank = encode_drawings(vq.eval(), args.work / "codes.pt")
    if args.only != "decoder":
        train_llama(model, args.work, args.llama_steps, 5e-4 if args.start_from else 1.5e-3, bank, processor)
    if args.only != "llama":
        vq = train_decoder(vq, bank, args.work, args.decoder_steps)
    if args.only is None:
        model.gen_vision_model.decoder.load_state_dict(vq.vq.decoder.state_dict())
        model.gen_vision_model.post_quant_conv.load_state_dict(vq.vq.post_quant_conv.state_dict())
        export(model, siglip, tokenizer, args.out)


if __name__ == "__main__":
    main()
