import copy
import json
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, SiglipVisionModel

from conftest import GOLDEN
from janus.dola import rerank
from janus.dola.cli import run_command
from janus.dola.files import load_image
from janus.dola.rerank import (
    build_probs_from_rep,
    build_text_bank,
    pooled_features,
    rerank_with_dola_siglip,
    rerank_with_dola_static_siglip,
    siglip_temperature,
    tower_depth,
)
from janus.dola.switches import DoLaSwitches
from janus.models import MultiModalityConfig
from janus.models.modeling import SiglipTower
from tolerance import assert_close, float32_error, terms_of


class FeatureTower:
    """timm's two methods over "images" `[batch, layers, width]` that are the features themselves."""

    def __init__(self, depth: int):
        self.blocks, self.norm = [None] * depth, nn.Identity()

    def get_intermediate_layers(self, x, n, reshape=False, return_prefix_tokens=False, norm=False):
        return [x[:, i, None] for i in range(len(self.blocks)) if i in n]

    def forward_head(self, x, pre_logits=False):
        return x[:, 0]


class TimmStandIn(nn.Module):
    """timm's VisionTransformer in its calling conventions: outputs in the order of the blocks, prefix tokens split off
    and paired only where there are any, a classifier behind `pre_logits`."""

    def __init__(self, depth: int, num_prefix_tokens: int, width: int = 16):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, num_prefix_tokens, width))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 32, 0.0, norm_first=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def embed(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    def get_intermediate_layers(self, x, n, reshape=False, return_prefix_tokens=False, norm=False, attn_mask=None):
        x, outputs = self.embed(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in n:
                outputs.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        outputs = [y[:, self.num_prefix_tokens :] for y in outputs]
        return list(zip(outputs, prefix, strict=True)) if return_prefix_tokens and self.num_prefix_tokens else outputs

    def forward_head(self, x, pre_logits=False):
        x = x[:, 0] if self.num_prefix_tokens else x.mean(1)
        return x if pre_logits else self.head(x)


def siglip(depth: int = 3) -> Any:
    """A SiglipModel of random weights."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 362}
    text = {"num_hidden_layers": 2, "vocab_size": 384, "max_position_embeddings": 16, "projection_size": 32}
    vision = {"num_hidden_layers": depth, "image_size": 32, "patch_size": 8}
    return SiglipModel(SiglipConfig(text_config=width | ids | text, vision_config=width | vision)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "tokenizer.json"), pad_token="<｜▁pad▁｜>")


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [2, 3, 4])
def test_the_towers_features_are_the_goldens(golden, layer: int):
    tower, goldens = golden.model.vision_model.vision_tower, golden.tensors
    images = goldens["und.pixel_values"][0]
    (normed,) = tower.get_intermediate_layers(images, n=[layer - 1], norm=True)
    assert_close(normed, goldens[f"vit.layer{layer}.normed"], terms_of(tower))
    (pooled,) = pooled_features(tower, images, [layer])
    assert_close(pooled, goldens[f"vit.layer{layer}.pooled"], terms_of(tower))


def test_layers_come_in_the_order_asked_for_from_one_pass(golden):
    tower, goldens = golden.model.vision_model.vision_tower, golden.tensors
    images, passes = goldens["und.pixel_values"][0], []
    hook = tower.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    pooled = pooled_features(tower, images, [4, 2, 3, 2])
    hook.remove()
    assert len(passes) == 1
    for row, layer in zip(pooled, [4, 2, 3, 2], strict=True):
        assert_close(row, goldens[f"vit.layer{layer}.pooled"], terms_of(tower))


def test_transformers_siglip_is_read_on_its_own_path_at_every_layer():
    model, images = siglip(3), torch.randn(2, 3, 32, 32)
    pooled = pooled_features(model, images, [1, 2, 3])
    with torch.no_grad():
        embeds = model(input_ids=torch.zeros(1, 16, dtype=torch.long), pixel_values=images).image_embeds
    assert_close(nn.functional.normalize(pooled[-1], dim=-1), embeds, terms_of(model.vision_model))
    for layer in (1, 2, 3):
        shallow = SiglipVisionModel(model.config.vision_config)
        shallow.load_state_dict(model.vision_model.state_dict())
        shallow.encoder.layers = shallow.encoder.layers[:layer]
        with torch.no_grad():
            assert_close(pooled[layer - 1], shallow.eval()(images).pooler_output, terms_of(shallow))
    assert torch.equal(pooled, pooled_features(model.vision_model, images, [1, 2, 3]))
    assert tower_depth(model) == tower_depth(model.vision_model) == 3


@pytest.mark.parametrize("num_prefix_tokens", [0, 2])
def test_a_timm_vision_transformer_is_read_with_its_prefix_tokens_and_before_its_classifier(num_prefix_tokens: int):
    torch.manual_seed(0)
    vit, images = TimmStandIn(4, num_prefix_tokens).eval(), torch.randn(2, 3, 32, 32)
    pooled = pooled_features(vit, images, [4, 1])
    with torch.no_grad():
        for row, layer in zip(pooled, [4, 1], strict=True):
            x = vit.norm(vit.blocks[:layer](vit.embed(images)))
            assert_close(row, x[:, 0] if num_prefix_tokens else x.mean(1), terms_of(vit))


class Hollow(type):
    """A class whose every attribute is its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def hollow_class(name: str) -> Hollow:
    if name.startswith("__"):
        raise AttributeError(name)
    return Hollow(name, (nn.Module,), {})


class HollowTorchvision(MetaPathFinder, Loader):
    """Finds a torchvision of nothing but hollow classes: timm imports it, its VisionTransformer needs none."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = hollow_class
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture(scope="module")
def timm_transformer():
    """timm's own VisionTransformer, without torchvision."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    known = set(sys.modules)
    sys.meta_path.append(finder := HollowTorchvision())
    try:
        return import_module("timm.models.vision_transformer").VisionTransformer
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision" and name not in known]:
            del sys.modules[name]


@pytest.mark.parametrize(("global_pool", "class_token"), [("map", False), ("token", True), ("avg", True)])
def test_timms_own_vision_transformer_is_read_on_its_own_path_at_every_layer(
    timm_transformer, global_pool, class_token
):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
    vit = timm_transformer(**sizes, global_pool=global_pool, class_token=class_token).eval()
    images = torch.randn(2, 3, 32, 32)
    pooled = pooled_features(vit, images, [4, 2, 1])
    assert tower_depth(vit) == 4
    for row, layer in zip(pooled, [4, 2, 1], strict=True):
        shallow = copy.deepcopy(vit)
        shallow.blocks = shallow.blocks[:layer]
        with torch.no_grad():
            assert_close(row, shallow.forward_head(shallow.forward_features(images), pre_logits=True), terms_of(vit))


# --- texts -----------------------------------------------------------------------------------------------------------


def test_the_text_bank_is_siglips_reading_of_the_fully_padded_text(tokenizer):
    model, texts = siglip(), ["a red circle", "blue"]
    bank = build_text_bank(model, tokenizer, texts)
    for row, text in zip(bank, texts, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (16 - len(ids))])
        with torch.no_grad():
            assert_close(row, model.get_text_features(ids).pooler_output[0], terms_of(model.text_model))


def test_the_published_text_encoder_of_the_towers_size_fits_it_part_by_part():
    """google/siglip-large-patch16-384 beside the tower of the Janus family, without weights."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"vocab_size": 32_000, "max_position_embeddings": 64, "projection_size": 1024}
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    with torch.device("meta"):
        tower = SiglipTower(MultiModalityConfig().siglip)
        siglip = SiglipModel(
            SiglipConfig(text_config=sizes | text | ids, vision_config=sizes | {"image_size": 384, "patch_size": 16})
        )
        images, padded = torch.empty(2, 3, 384, 384), torch.zeros(5, 64, dtype=torch.long)
        bank = siglip.text_model(padded).pooler_output
        p_hat = rerank_with_dola_static_siglip(tower, images, bank, 20)
    assert p_hat.shape == (2, 5) and tower_depth(tower) == tower_depth(siglip) == 24
    own, published = ({k: v.shape for k, v in part.state_dict().items()} for part in (tower, siglip.vision_model))
    assert own == published


def test_tau_is_the_inverse_of_siglips_logit_scale(tokenizer):
    model, images = siglip(), torch.randn(2, 3, 32, 32)
    model.logit_scale.data.fill_(2.5)
    model.logit_bias.data.fill_(-7.0)
    texts = ["a red circle", "a blue star", "x"]
    ids = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=images).logits_per_image.softmax(-1)
    q = build_probs_from_rep(
        pooled_features(model, images, [3])[0], build_text_bank(model, tokenizer, texts), tau=float(np.exp(-2.5))
    )
    assert_close(q, expected, terms_of(model), size=float(np.exp(2.5)))


# --- p_hat -----------------------------------------------------------------------------------------------------------


def reference_q(z: np.ndarray, bank: np.ndarray, tau: float, normalize: bool) -> np.ndarray:
    """softmax(<z, t> / tau) in float64."""
    z, bank = z.astype(np.float64), bank.astype(np.float64)
    if normalize:
        z = z / np.linalg.norm(z, axis=-1, keepdims=True)
        bank = bank / np.linalg.norm(bank, axis=-1, keepdims=True)
    s = z @ bank.T / tau
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_p_hat(q_N: np.ndarray, q_j: np.ndarray, alpha: float) -> np.ndarray:
    ratio = np.where(q_N >= alpha * q_N.max(-1, keepdims=True), q_N / q_j, 0.0)
    return ratio / ratio.sum(-1, keepdims=True)


def reference_jsd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    m = (p + q) / 2
    return ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2


def largest_logit(features: np.ndarray, bank: np.ndarray, tau: float, normalize: bool) -> float:
    """What `<z, t> / tau` can be, by Cauchy and Schwarz."""
    return 1 / tau if normalize else np.linalg.norm(features, axis=-1).max() * np.linalg.norm(bank, axis=-1).max() / tau


@st.composite
def problems(draw):
    """(features [batch, layers, width], text bank [C, width])"""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, depth, width, candidates = (draw(st.integers(a, b)) for a, b in ((1, 4), (2, 6), (2, 8), (1, 7)))
    return rng.normal(size=(batch, depth, width)).astype("f4"), rng.normal(size=(candidates, width)).astype("f4")


@given(problems(), st.data(), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.05, 0.3, 1.0]), st.booleans())
def test_p_hat_is_the_formula_in_float64(problem, data, alpha: float, tau: float, normalize: bool):
    features, bank = problem
    depth = features.shape[1]
    layer = data.draw(st.integers(1, depth - 1))
    q = [reference_q(features[:, i], bank, tau, normalize) for i in range(depth)]
    width, size = bank.shape[1], largest_logit(features, bank, tau, normalize)
    log_qN = np.log(np.maximum(q[-1], 1e-300))
    margin = log_qN - log_qN.max(-1, keepdims=True) - np.log(max(alpha, 1e-300))
    near_threshold = np.abs(margin) < float32_error(width, size)
    tower, images, texts = FeatureTower(depth), torch.from_numpy(features), torch.from_numpy(bank)
    p_hat = rerank_with_dola_static_siglip(tower, images, texts, layer, alpha, tau, normalize)
    if not near_threshold.any() and min(x.min() for x in q) > 1e-30:
        assert_close(p_hat, reference_p_hat(q[-1], q[layer - 1], alpha), width, size)
    bypass = rerank_with_dola_static_siglip(tower, images, texts, depth, alpha, tau, normalize)
    assert_close(bypass, q[-1], width, size)
    assert_close(build_probs_from_rep(images, texts, tau, normalize)[:, -1], q[-1], width, size)


@given(problems(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.1, 1.0]))
def test_early_exit_contrasts_each_image_with_its_most_different_candidate(problem, alpha: float, tau: float):
    features, bank = problem
    depth = features.shape[1]
    tower, images, texts = FeatureTower(depth), torch.from_numpy(features), torch.from_numpy(bank)
    p_hat, chosen = rerank_with_dola_siglip(tower, images, texts, alpha, tau, candidate_layers=range(1, depth + 3))
    q = [reference_q(features[:, i], bank, tau, True) for i in range(depth)]
    jsd = np.stack([reference_jsd(q[-1], q_j) for q_j in q[:-1]])
    assert chosen.dtype == torch.int64 and chosen.min() >= 1 and chosen.max() < depth
    for i, layer in enumerate(chosen.tolist()):
        assert jsd[layer - 1, i] >= jsd[:, i].max() - float32_error(bank.shape[1], 1 / tau)
        static = rerank_with_dola_static_siglip(tower, images[i, None], texts, layer, alpha, tau)
        assert_close(p_hat[i], static[0], bank.shape[1], 1 / tau)


def test_normalised_features_forget_their_length_and_raw_ones_do_not():
    z, bank = torch.randn(3, 8), torch.randn(4, 8)
    assert_close(build_probs_from_rep(5 * z, 7 * bank), build_probs_from_rep(z, bank), terms=8)
    apart = build_probs_from_rep(5 * z, bank, normalize=False) - build_probs_from_rep(z, bank)
    assert apart.abs().max() > float32_error(8, size=5 * float(z.norm(dim=-1).max() * bank.norm(dim=-1).max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_tiny_temperatures_leave_no_row_empty(dtype: torch.dtype):
    features, bank = torch.randn(4, 3, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    p_hat = rerank_with_dola_static_siglip(FeatureTower(3), features, bank, 1, 1.0, tau=1e-4)
    assert p_hat.dtype == torch.float32
    assert_close(p_hat.sum(-1), torch.ones(4), terms=6)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 0}, r"layer must be in 1\.\.3, got 0"),
        ({"layer": 4}, r"layer must be in 1\.\.3, got 4"),
        ({"text_bank": torch.randn(2, 5)}, r"width 5, the image features have width 8"),
        ({"text_bank": torch.randn(0, 8)}, "no candidates"),
        ({"tau": 0.0}, r"tau must be positive and finite, got 0\.0"),
        ({"tau": float("nan")}, "tau"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1\.5"),
        ({"alpha": -0.1}, "alpha"),
    ],
)
def test_values_out_of_range_are_named(change: dict, message: str):
    usual = {"images": torch.randn(2, 3, 8), "text_bank": torch.randn(2, 8), "layer": 2}
    with pytest.raises(ValueError, match=message) as static:
        rerank_with_dola_static_siglip(FeatureTower(3), **usual | change)
    assert "\n" not in str(static.value)
    if "layer" not in change:
        del usual["layer"]
        with pytest.raises(ValueError, match=message):
            rerank_with_dola_siglip(FeatureTower(3), **usual | change, candidate_layers=[1, 2])


def test_candidate_layers_that_are_all_outside_the_tower_are_refused():
    with pytest.raises(ValueError, match=r"\[18, 20, 22\] hold no layer in 1\.\.2"):
        rerank_with_dola_siglip(FeatureTower(3), torch.randn(2, 3, 8), torch.randn(2, 8), candidate_layers=[18, 20, 22])


def test_a_tower_without_pooling_head_says_so():
    model = siglip()
    model.config.vision_config.vision_use_head = False
    vision = SiglipVisionModel(model.config.vision_config)
    with pytest.raises(ValueError, match="no pooling head"):
        pooled_features(vision, torch.randn(1, 3, 32, 32), [1])


@pytest.mark.parametrize(("texts", "message"), [([], "no candidates"), (["a cat", " "], r"candidate ' ' has no token")])
def test_candidates_need_a_token(tokenizer, texts: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        build_text_bank(siglip(), tokenizer, texts)


def test_a_file_that_is_no_image_is_named(tmp_path: Path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((GOLDEN / "sample.png").read_bytes()[:3000])
    for name, message in (("text.png", "not an image"), ("cut.png", "not an image"), ("none.png", "file not found")):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            load_image(tmp_path / name)


# --- the command -----------------------------------------------------------------------------------------------------

TEXTS = ["a red circle", "blue", "Opera House"]


@pytest.fixture(scope="module")
def text_encoder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    siglip().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(monkeypatch, text_encoder: Path, *options: object) -> None:
    usual = ["--model", GOLDEN, "--device", "cpu", "--dtype", "float32", "--text_encoder", text_encoder]
    monkeypatch.setattr(sys, "argv", ["rerank_with_dola", *map(str, [*usual, *options])])
    run_command(rerank.main)


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ([], 3),
        (["--layer", 1, "--alpha", 0], 1),
        (["--no_dola"], 4),
        (["--candidate_layers", "1,2"], None),
        (["--config", "s.json"], 2),
        (["--config", "s.json", "--domain", "off"], 4),
        (["--config", "s.json", "--domain", "off", "--layer", 1], 1),
    ],
)
def test_the_command_ranks_as_the_functions_do(
    golden, monkeypatch, capsys, tmp_path, tokenizer, text_encoder, options: list, layer: int | None
):
    monkeypatch.chdir(tmp_path)
    base = DoLaSwitches(fixed_layer_vit=2, alpha_V=0.1)
    base.to_json("s.json", {"off": DoLaSwitches(use_dola_siglip_static=False)})
    other = load_image(GOLDEN / "sample.png").rotate(90)
    other.save("turned.png")
    options = [*options, "--images", GOLDEN / "sample.png", "turned.png", "--json", "out.json"]
    run(monkeypatch, text_encoder, *options, "--candidates", *TEXTS)
    model = siglip()
    images = golden.processor.image_processor([load_image(GOLDEN / "sample.png"), other])
    bank, tower = build_text_bank(model, tokenizer, TEXTS), golden.model.vision_model.vision_tower
    alpha = 0.0 if "--alpha" in options else 0.1
    if layer is None:
        p_hat, layers = rerank_with_dola_siglip(tower, images, bank, alpha, siglip_temperature(model), [1, 2])
    else:
        p_hat = rerank_with_dola_static_siglip(tower, images, bank, layer, alpha, siglip_temperature(model))
        layers = torch.full((2,), layer)
    written = json.loads(Path("out.json").read_text())
    assert [entry["layer"] for entry in written] == layers.tolist()
    for entry, row in zip(written, p_hat, strict=True):
        found = {line["candidate"]: line["p_hat"] for line in entry["ranking"]}
        assert_close([found[text] for text in TEXTS], row, terms_of(tower), size=1 / siglip_temperature(model))
        assert [line["p_hat"] for line in entry["ranking"]] == sorted(found.values(), reverse=True)
    table = capsys.readouterr().out.splitlines()
    best = TEXTS[p_hat[0].argmax()]
    assert "sample.png" in table[0] and table[1].split(maxsplit=2) == ["1", f"{p_hat[0].max():.4f}", best]
    assert "turned.png" in table[4] and len(table) == 8


def test_candidates_may_come_from_a_file(monkeypatch, capsys, tmp_path, text_encoder):
    (tmp_path / "texts.txt").write_text("a red circle\nblue\n")
    run(monkeypatch, text_encoder, "--images", GOLDEN / "sample.png", "--candidates", f"@{tmp_path / 'texts.txt'}")
    assert {line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()[1:]} == {"a red circle", "blue"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--images": __file__}, f"{__file__}: not an image"),
        ({"--images": "none.png"}, "none.png: file not found"),
        ({"--layer": 9}, "layer must be in 1..4, got 9"),
        ({"--layer": 0}, "layer must be in 1..4, got 0"),
        ({"--tau": 0}, "tau must be positive and finite, got 0.0"),
        ({"--alpha": 7}, "alpha_V must be in [0, 1], got 7.0"),
        ({"--candidates": " "}, "candidate ' ' has no token"),
        ({"--candidate_layers": "18,20"}, "candidate_layers [18, 20] hold no layer in 1..3"),
        ({"--candidate_layers": "x"}, "expected layers like 22,24,26,28, got 'x'"),
        ({"--config": "none.json"}, "none.json: file not found"),
        ({"--domain": "a"}, "--domain needs --config"),
        ({"--text_encoder": "no/such/directory"}, "no/such/directory: no such directory"),
    ],
)
def test_what_cannot_be_ranked_ends_in_one_line(monkeypatch, capsys, text_encoder, change: dict, message: str):
    options = {"--images": GOLDEN / "sample.png", "--candidates": "blue"} | change
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, text_encoder, *(word for option in options.items() for word in option))
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
