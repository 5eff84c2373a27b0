"""What the code leans on inside transformers, tried on a plain LLaMA and a plain SigLIP.

Needs the root files and `janus/dola` alone, so that `tools/try_transformers.sh` can run it on releases for which
`janus/models` is not made.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from dola_runtime import compute_logprobs_from_hidden, contrast_with_apc_from_logprobs
from generation_inference import Decoding, EagerBackbone, choose_token, draw, pick_backbone, sample_image_tokens
from janus.dola import static_backbone
from janus.dola.logits_processor import DoLaLogitsProcessor
from janus.dola.rerank import build_text_bank, pooled_features
from janus.dola.scoring import score_continuations
from janus.dola.static_backbone import StaticBackbone
from janus.dola.text_encoder import load_text_encoder
from tolerance import assert_close, float32_error, terms_of

CODES, STEPS = 40, 16
PROMPTS = ["a long prompt of many letters", "short"]


def randomise(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    """Random weights, two query heads to each key head, attending by transformers' default."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return randomise(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def janus(llama) -> tuple[Any, Any]:
    """(model, processor) with the attributes of Janus that painting asks for, 16 codes an image."""
    generator = torch.Generator().manual_seed(1)
    gen_embed = torch.nn.Embedding(CODES, 32, _weight=0.3 * torch.randn((CODES, 32), generator=generator))
    gen_head = torch.nn.Linear(32, CODES)
    gen_head.weight.data = torch.randn((CODES, 32), generator=generator)
    model = SimpleNamespace(
        language_model=llama,
        gen_head=gen_head,
        gen_embed=gen_embed,
        prepare_gen_img_embeds=gen_embed,
        gen_vision_model=SimpleNamespace(decoder=SimpleNamespace(num_resolutions=2)),
    )
    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(encode=lambda text: [1, *(3 + ord(c) % 50 for c in text), 2]),
        pad_id=0,
        image_processor=SimpleNamespace(image_size=8),
    )
    return model, processor


@torch.no_grad()
def paint_uncached(janus, prompt: str, seed: int, decoding: Decoding) -> torch.Tensor:
    """Tokens `[2, STEPS]` of one prompt, each from a forward pass of all that came before."""
    model, processor = janus
    llama = model.language_model.model
    ids = torch.tensor([processor.tokenizer.encode(prompt)] * 4)
    ids[1::2, 1:-1] = processor.pad_id
    embeds, generator = model.language_model.get_input_embeddings()(ids), torch.Generator().manual_seed(seed)
    tokens = []
    for _ in range(STEPS):
        hidden = llama(inputs_embeds=embeds, output_hidden_states=True, use_cache=False).hidden_states
        states = [hidden[-1], *(llama.norm(hidden[layer]) for layer in decoding.layers)]
        probs = choose_token(model.gen_head(torch.stack([h[:, -1] for h in states])), decoding).probs
        tokens.append(draw(probs, torch.empty(probs.shape).exponential_(generator=generator)))
        embeds = torch.cat([embeds, model.gen_embed(tokens[-1].repeat_interleave(2))[:, None]], dim=1)
    return torch.stack(tokens, dim=1)


def test_the_static_backbone_serves_from_the_release_on_whose_layers_take_its_cache(llama):
    served = Version(transformers.__version__) >= Version("4.56")
    assert StaticBackbone.serves(llama.model) == served
    assert pick_backbone(llama.model) is (StaticBackbone if served else EagerBackbone)


@pytest.mark.parametrize("attention", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", [(), (3,), (1, 2, 3)])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "padded"])
def test_either_backbone_paints_what_passes_without_a_cache_paint(janus, monkeypatch, prompts, layers, attention):
    if attention == "cuda":  # a step attends by sdpa with a mask that is added, in buckets of positions
        monkeypatch.setattr(static_backbone, "attending_by", lambda *_: nullcontext())
        monkeypatch.setattr(static_backbone, "uses_graphs", lambda device: True)
        monkeypatch.setattr(StaticBackbone, "_replay", lambda self, step, inputs: step(*inputs))
        monkeypatch.setattr(static_backbone, "GRAPH_BUCKET", 8)
    (model, processor), decoding = janus, Decoding(layers, cfg_weight=3.0)
    seeds = range(7, 7 + len(prompts))
    expected = torch.stack([paint_uncached(janus, *job, decoding) for job in zip(prompts, seeds, strict=True)])
    for pick in (pick_backbone, lambda _: EagerBackbone):
        monkeypatch.setattr("generation_inference.pick_backbone", pick)
        tokens = sample_image_tokens(model, processor, prompts, decoding, parallel_size=2, seeds=list(seeds))
        assert torch.equal(tokens, expected)


def test_a_step_on_the_cpu_attends_without_the_fused_kernel(janus, monkeypatch):
    model, processor = janus
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(query, *args, **kwargs):
        calls.append(query.shape[2])
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    sample_image_tokens(model, processor, PROMPTS[:1], Decoding(), parallel_size=1, seeds=[0])
    assert len(calls) >= 4 and (min(calls) > 1) == StaticBackbone.serves(model.language_model.model)
    assert model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("by", ["ids", "embeddings"])
def test_generate_with_the_processor_says_what_the_formula_says(llama, by):
    ids = torch.tensor([[1, 5, 9, 23, 4]])
    embeds = llama.get_input_embeddings()(ids).detach()
    inputs = (
        {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)} if by == "embeddings" else {"inputs": ids}
    )
    before = llama.generation_config.to_dict()
    with DoLaLogitsProcessor(llama, layer=2, alpha=0.2) as dola:
        said = llama.generate(**inputs, max_new_tokens=12, do_sample=False, logits_processor=[dola])[0, -12:]
        beams = llama.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=3, logits_processor=[dola])
    after = llama.generation_config.to_dict()
    assert {**before, "disable_compile": after.get("disable_compile")} == after and not after.get("disable_compile")
    assert beams.shape[1] >= 5
    expected = []
    for _ in range(12):
        with torch.no_grad():
            hidden = llama(inputs_embeds=embeds, output_hidden_states=True, use_cache=False).hidden_states
            h = torch.stack([hidden[-1][:, -1], llama.model.norm(hidden[2][:, -1])])
            log_qN, log_qj = compute_logprobs_from_hidden(h, None, llama.lm_head)
        token = contrast_with_apc_from_logprobs(log_qN, log_qj, 0.2).argmax(-1)
        expected.append(token.item())
        embeds = torch.cat([embeds, llama.get_input_embeddings()(token).detach()[:, None]], dim=1)
    assert said.tolist() == expected


def test_scored_continuations_have_the_models_own_log_probabilities(llama):
    prefix, continuation = torch.tensor([1, 7, 30]), torch.tensor([11, 2, 41])
    (scores,) = score_continuations(llama, prefix, [continuation], layers=[2], alphas=[0.0])
    with torch.no_grad():
        logits = llama(torch.cat([prefix, continuation])[None]).logits[0, 2:-1]
    expected = logits.log_softmax(-1).gather(-1, continuation[:, None])[:, 0]
    assert_close(scores.baseline.log_p, expected, terms_of(llama), float(logits.abs().max()))


# --- SigLIP ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip_directory(tmp_path_factory):
    """A random SiglipModel and a tokenizer of words, as this transformers saves them."""
    directory = tmp_path_factory.mktemp("siglip")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"vocab_size": 10, "max_position_embeddings": 6, "projection_size": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = SiglipConfig(text_config=shape | text, vision_config=shape | {"image_size": 8, "patch_size": 4})
    randomise(SiglipModel(config)).save_pretrained(directory)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "red", "blue", "dot"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(directory)
    return directory


def test_a_saved_text_encoder_loads_and_embeds_as_siglip_does(siglip_directory):
    siglip, tokenizer = load_text_encoder(siglip_directory)
    bank = build_text_bank(siglip, tokenizer, ["a red dot", "blue"])
    with torch.no_grad():
        expected = siglip.text_model(torch.tensor([[3, 4, 6, 0, 0, 0], [5, 0, 0, 0, 0, 0]])).pooler_output
    assert_close(bank, expected, terms_of(siglip.text_model))


def test_the_last_layers_features_are_what_siglip_itself_pools(siglip_directory):
    siglip, _ = load_text_encoder(siglip_directory)
    images = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    features = pooled_features(siglip, images, [1, 3])
    with torch.no_grad():
        assert_close(features[1], siglip.vision_model(images).pooler_output, terms_of(siglip.vision_model))
    error = float32_error(terms_of(siglip.vision_model), float(features.abs().max()))
    assert (features[0] - features[1]).abs().max() > error
