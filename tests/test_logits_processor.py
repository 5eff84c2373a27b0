"""DoLa inside transformers' `generate` against plain loops that read `output_hidden_states=True` and hook nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LogitsProcessorList,
    OPTConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from janus.dola.logits_processor import DoLaLogitsProcessor
from tolerance import assert_close, float32_error, terms_of

TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 97}
LLAMA = LlamaConfig(**TINY, num_hidden_layers=6, eos_token_id=None, pad_token_id=0)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top-k, top-p, temperature": {"do_sample": True, "top_k": 9, "top_p": 0.8, "temperature": 0.7},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 4},
    "sampled beams": {"num_beams": 3, "do_sample": True},
}


def make_model(config, seed: int = 0) -> Any:
    """A random model whose layers disagree enough for the contrast to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model(LLAMA)


@pytest.fixture(scope="module")
def smollm2(smollm2):
    model, tokenizer = smollm2
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 2
    texts = [
        "The capital of France is",
        "Water boils at",
        "Once upon a time, in a village by the sea,",
        "def add(a, b):",
    ]
    return model, [tokenizer(text)["input_ids"] for text in texts]


def left_pad(prompts: list[list[int]], pad: int = 2) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def random_prompts(rows: int, length: int = 7) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, 97, (rows, length), generator=generator)
    return left_pad([row[i % 4 :].tolist() for i, row in enumerate(ids)], pad=0)


def plain_log_p_hat(model, h_N: Tensor, h_j: Tensor, *, norm: bool = True, alpha: float = 0.1, scores=None) -> Tensor:
    """The formula of the paper, written out, on states `[..., width]`: `[..., vocab]`."""
    log_qN = model.lm_head(h_N).float().log_softmax(-1) if scores is None else scores.log_softmax(-1)
    log_qj = model.lm_head(model.model.norm(h_j) if norm else h_j).float().log_softmax(-1)
    plausible = log_qN >= math.log(alpha) + log_qN.max(-1, keepdim=True).values
    return torch.where(plausible, log_qN - log_qj, -math.inf).log_softmax(-1)


@torch.no_grad()
def plain_states(model, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """`hidden_states` of one forward pass without a cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states


@torch.no_grad()
def largest_logit(model, hidden: tuple[Tensor, ...]) -> float:
    """Over all layers, through the model's norm."""
    return max(float(model.lm_head(h).abs().max()) for h in (hidden[-1], *map(model.model.norm, hidden[1:-1])))


@torch.no_grad()
def plain_greedy(model, input_ids: Tensor, attention_mask: Tensor, steps: int, layer: int, norm: bool) -> Tensor:
    """Greedy DoLa as a loop of its own, with the model's cache."""
    ids, mask, cache, new = input_ids, attention_mask, None, input_ids
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = model(
            new, attention_mask=mask, position_ids=positions, past_key_values=cache, output_hidden_states=True
        )
        cache = output.past_key_values
        h_N, h_j = (output.hidden_states[i][:, -1] for i in (-1, layer))
        new = plain_log_p_hat(model, h_N, h_j, norm=norm).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


def plain_beam_search(model, input_ids: Tensor, attention_mask: Tensor, steps: int, beams: int, layer: int) -> Tensor:
    """Beam search over log p_hat without a cache and without an end token: the best of `beams` for each prompt."""
    best = []
    for ids, mask in zip(input_ids, attention_mask, strict=True):
        ids, mask, total = ids[None], mask[None], torch.zeros(1, 1)
        for _ in range(steps):
            hidden = plain_states(model, ids, mask)
            totals = total + plain_log_p_hat(model, hidden[-1][:, -1], hidden[layer][:, -1])
            total, index = totals.flatten().topk(min(beams, int((totals > -math.inf).sum())))
            rows, tokens = index // totals.shape[1], index % totals.shape[1]
            ids, total = torch.cat([ids[rows], tokens[:, None]], 1), total[:, None]
            mask = torch.cat([mask[rows], torch.ones_like(tokens)[:, None]], 1)
        best.append(ids[0])
    return torch.stack(best)


def generate(model, inputs: dict[str, Tensor], dola: DoLaLogitsProcessor, **kwargs):
    with dola:
        return model.generate(**inputs, logits_processor=LogitsProcessorList([dola]), **kwargs)


def count_hooks(*models: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layer", [1, 3, 5])
@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_tokens_equal_a_plain_loop(llama, rows, layer, norm):
    inputs = random_prompts(rows)
    tokens = generate(llama, inputs, DoLaLogitsProcessor(llama, layer=layer, norm=norm), max_new_tokens=12)
    assert torch.equal(tokens, plain_greedy(llama, **inputs, steps=12, layer=layer, norm=norm))
    assert not torch.equal(tokens, llama.generate(**inputs, max_new_tokens=12))


@pytest.mark.parametrize("rows", [1, 3])
def test_beam_search_equals_a_plain_one(llama, rows):
    inputs = random_prompts(rows)
    tokens = generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), max_new_tokens=8, num_beams=4)
    assert torch.equal(tokens, plain_beam_search(llama, **inputs, steps=8, beams=4, layer=4))


def test_beam_scores_are_log_probabilities_of_p_hat(llama):
    inputs = random_prompts(2)
    output = generate(
        llama,
        inputs,
        DoLaLogitsProcessor(llama, layer=4),
        max_new_tokens=6,
        num_beams=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    hidden = plain_states(llama, output.sequences, mask)
    log_p = plain_log_p_hat(llama, hidden[-1][:, -7:-1], hidden[4][:, -7:-1])
    chosen = log_p.gather(-1, output.sequences[:, -6:, None])[..., 0]
    assert_close(output.sequences_scores, chosen.mean(1), terms_of(llama), largest_logit(llama, hidden))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("off", [{"use_dola": False}, {"layer": 6}, {"use_dola": False, "candidate_layers": [2, 4]}])
def test_switched_off_it_is_the_models_own_generate(llama, mode, off):
    inputs = random_prompts(3)
    torch.manual_seed(1)
    own = llama.generate(**inputs, max_new_tokens=10, **MODES[mode])
    torch.manual_seed(1)
    assert torch.equal(
        generate(llama, inputs, DoLaLogitsProcessor(llama, **off), max_new_tokens=10, **MODES[mode]), own
    )


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_and_keeps_to_plausible_tokens(llama, mode):
    inputs = random_prompts(3)
    torch.manual_seed(1)
    tokens = generate(llama, inputs, DoLaLogitsProcessor(llama, layer=3, alpha=0.2), max_new_tokens=10, **MODES[mode])
    if "repetition_penalty" in MODES[mode]:
        return
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
    hidden = plain_states(llama, tokens, mask)
    log_qN = llama.lm_head(hidden[-1][:, -11:-1]).log_softmax(-1)
    chosen = log_qN.gather(-1, tokens[:, -10:, None])[..., 0]
    error = float32_error(terms_of(llama), largest_logit(llama, hidden))
    assert (chosen >= math.log(0.2) + log_qN.amax(-1) - error).all()


def test_penalties_come_before_the_contrast_and_warpers_after(llama):
    ids = torch.arange(1, 15).reshape(2, 7)  # no padding, which some releases penalise and others do not
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    output = generate(
        llama,
        inputs,
        DoLaLogitsProcessor(llama, layer=4, alpha=0.05),
        max_new_tokens=5,
        do_sample=True,
        repetition_penalty=1.5,
        temperature=0.6,
        top_k=5,
        top_p=0.9,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for step, scores in enumerate(output.scores):
        ids = output.sequences[:, : 7 + step]
        hidden = plain_states(
            llama, ids, torch.cat([inputs["attention_mask"], torch.ones(2, step, dtype=torch.long)], 1)
        )
        h_N, h_j = hidden[-1][:, -1], hidden[4][:, -1]
        penalised = RepetitionPenaltyLogitsProcessor(1.5)(ids, llama.lm_head(h_N))
        expected: Any = plain_log_p_hat(llama, h_N, h_j, alpha=0.05, scores=penalised)
        for warper in (TemperatureLogitsWarper(0.6), TopKLogitsWarper(5), TopPLogitsWarper(0.9)):
            expected = warper(ids, expected)
        assert_close(scores, expected, terms_of(llama), largest_logit(llama, hidden) / 0.6)


def test_early_exit_takes_per_row_the_layer_furthest_from_the_last(llama):
    inputs, candidates = random_prompts(4), [1, 2, 3]
    output = generate(
        llama,
        inputs,
        DoLaLogitsProcessor(llama, candidate_layers=[3, 2, 1, 2, 9]),
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
    )
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 6, dtype=torch.long)], 1)
    hidden = plain_states(llama, output.sequences, mask)
    chosen_layers = set()
    for step, scores in enumerate(output.scores):
        p = llama.lm_head(hidden[-1][:, 6 + step]).softmax(-1).double()
        divergence = []
        for layer in candidates:
            q = llama.lm_head(llama.model.norm(hidden[layer][:, 6 + step])).softmax(-1).double()
            m = (p + q) / 2
            divergence.append((p * (p / m).log() + q * (q / m).log()).sum(-1))
        for row, best in enumerate(torch.stack(divergence).argmax(0).tolist()):
            chosen_layers.add(candidates[best])
            h_N, h_j = (hidden[i][row, 6 + step] for i in (-1, candidates[best]))
            expected = plain_log_p_hat(llama, h_N, h_j)
            assert_close(scores[row], expected, terms_of(llama), largest_logit(llama, hidden))
    assert len(chosen_layers) > 1


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"use_cache": False}])
@pytest.mark.parametrize("beams", [1, 3])
def test_cache_and_chunked_prefill_change_nothing(llama, how, beams):
    inputs, settings = random_prompts(3), {"max_new_tokens": 8, "num_beams": beams}
    expected = generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), **settings)
    assert torch.equal(generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), **settings, **how), expected)


def test_a_static_cache_is_decoded_without_compiling_where_transformers_would(llama, monkeypatch):
    monkeypatch.setattr(llama, "get_compiled_call", lambda *_: pytest.fail("compiled"))
    compile_everywhere = CompileConfig()
    compile_everywhere._compile_all_devices = True  # type: ignore[reportAttributeAccessIssue]
    inputs = random_prompts(2)
    static = {"cache_implementation": "static", "compile_config": compile_everywhere}
    tokens = generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), max_new_tokens=8, **static)
    assert torch.equal(tokens, generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), max_new_tokens=8))
    assert llama.generation_config.disable_compile is None


def test_embeddings_instead_of_ids_give_the_same_tokens(llama):
    inputs = random_prompts(2)
    expected = generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), max_new_tokens=8)
    embedded = {
        "inputs_embeds": llama.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    tokens = generate(llama, embedded, DoLaLogitsProcessor(llama, layer=4), max_new_tokens=8)
    assert torch.equal(tokens, expected[:, 7:])


class Breaking(BaseStreamer):
    """Raises at the second token."""

    def __init__(self):
        self.left = 2

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_no_hook_is_left_behind(llama):
    other, inputs = make_model(LLAMA, seed=1), random_prompts(1)
    plain_states(llama, **{"ids": inputs["input_ids"], "mask": inputs["attention_mask"]})  # transformers hooks its own
    plain_states(other, **{"ids": inputs["input_ids"], "mask": inputs["attention_mask"]})
    before = count_hooks(llama, other)
    expected = [generate(m, inputs, DoLaLogitsProcessor(m, layer=4), max_new_tokens=6) for m in (llama, other)]
    with pytest.raises(KeyboardInterrupt):
        generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), max_new_tokens=6, streamer=Breaking())
    assert count_hooks(llama, other) == before
    with DoLaLogitsProcessor(llama, layer=4) as one, DoLaLogitsProcessor(other, layer=4) as two:
        for _ in range(2):
            assert torch.equal(llama.generate(**inputs, max_new_tokens=6, logits_processor=[one]), expected[0])
            assert torch.equal(other.generate(**inputs, max_new_tokens=6, logits_processor=[two]), expected[1])
        with pytest.raises(KeyboardInterrupt):
            llama.generate(**inputs, max_new_tokens=6, logits_processor=[one], streamer=Breaking())
        assert torch.equal(llama.generate(**inputs, max_new_tokens=6, logits_processor=[one]), expected[0])
    assert count_hooks(llama, other) == before
    assert one._states == {} and llama.generation_config.disable_compile is None


def test_a_long_prompt_leaves_one_position_in_the_hook(llama):
    with DoLaLogitsProcessor(llama, layer=4) as dola, torch.no_grad():
        llama(torch.ones(2, 500, dtype=torch.long))
        assert dola._states[4].untyped_storage().nbytes() == 2 * 32 * 4


def test_half_precision_gives_finite_normalised_scores():
    model, inputs = make_model(LLAMA).bfloat16(), random_prompts(3)
    output = generate(
        model,
        inputs,
        DoLaLogitsProcessor(model, candidate_layers=[2, 4]),
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for scores in output.scores:
        assert scores.dtype == torch.float32 and not scores.isnan().any()
        assert_close(scores.exp().sum(-1), torch.ones(3), terms=97)


def test_scores_that_no_forward_pass_belongs_to_are_refused(llama):
    other, inputs = make_model(LLAMA, seed=1), random_prompts(2)
    outside = DoLaLogitsProcessor(llama, layer=4)
    with pytest.raises(RuntimeError, match="inside its context"):
        llama.generate(**inputs, max_new_tokens=2, logits_processor=[outside])
    with outside, pytest.raises(RuntimeError, match="own model"):
        other.generate(**inputs, max_new_tokens=2, logits_processor=[outside])
    with pytest.raises(RuntimeError, match="guidance_scale"):
        generate(llama, inputs, DoLaLogitsProcessor(llama, layer=4), max_new_tokens=4, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 0}, "layer must be in 1..6, got 0"),
        ({"layer": 7}, "layer must be in 1..6, got 7"),
        ({"candidate_layers": [6, 9]}, r"no layer in 1..5"),
        ({"candidate_layers": [2], "layer": 3}, "not both"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"layer_ratio": -1.0}, "layer_ratio must be in"),
    ],
)
def test_arguments_out_of_range_are_named(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        DoLaLogitsProcessor(llama, **arguments)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=None, pad_token_id=0),
        OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=6, num_attention_heads=4, pad_token_id=0,
                  word_embed_proj_dim=32),
        Gemma2Config(**TINY, num_hidden_layers=6, num_key_value_heads=2, head_dim=8, pad_token_id=0),
    ],
    ids=["GPT-2", "OPT", "Gemma 2"],
)  # fmt: skip
def test_other_decoders_are_read_through_their_own_norm_head_and_soft_cap(config):
    model, ids = make_model(config), torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    with DoLaLogitsProcessor(model, layer=4) as dola, torch.no_grad():
        output = model(ids)
        scores = dola(ids, output.logits[:, -1].float())
    with torch.no_grad():
        h_j = model(ids, output_hidden_states=True).hidden_states[4][:, -1]
        norms = ("norm", "ln_f", "final_layer_norm")
        norm = next(module for name, module in model.get_decoder().named_children() if name in norms)
        logits = model.get_output_embeddings()(norm(h_j))
    cap = getattr(config, "final_logit_softcapping", None)
    log_qN, log_qj = (x.log_softmax(-1) for x in (output.logits[:, -1], cap * (logits / cap).tanh() if cap else logits))
    plausible = log_qN >= math.log(0.1) + log_qN.amax(-1, keepdim=True)
    expected = torch.where(plausible, log_qN - log_qj, -math.inf).log_softmax(-1)
    assert_close(scores, expected, terms_of(model), float(torch.stack([log_qN, log_qj]).abs().max()))


def test_models_that_cannot_be_read_so_are_refused_by_name():
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, vocab_size=50))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not a decoder-only model"):
        DoLaLogitsProcessor(t5)


@pytest.mark.parametrize(("layer", "norm"), [(8, True), (24, False)])
def test_64_greedy_tokens_of_smollm2_are_the_argmax_of_a_pass_without_hooks(smollm2, layer, norm):
    model, prompts = smollm2
    inputs = left_pad(prompts)
    tokens = generate(model, inputs, DoLaLogitsProcessor(model, layer=layer, norm=norm), max_new_tokens=64)
    new = tokens[:, -64:]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    hidden = plain_states(model, tokens, mask)
    with torch.no_grad():
        log_p = plain_log_p_hat(model, hidden[-1][:, -65:-1], hidden[layer][:, -65:-1], norm=norm)
    assert torch.equal(log_p.argmax(-1), new)


@pytest.mark.parametrize("norm", [True, False])
def test_64_greedy_tokens_of_smollm2_equal_a_plain_loop(smollm2, norm):
    model, prompts = smollm2
    inputs = left_pad(prompts)
    tokens = generate(model, inputs, DoLaLogitsProcessor(model, layer=16, norm=norm), max_new_tokens=64)
    assert torch.equal(tokens, plain_greedy(model, **inputs, steps=64, layer=16, norm=norm))


def test_beam_search_of_smollm2_equals_a_plain_one(smollm2):
    model, prompts = smollm2
    inputs = left_pad(prompts[:2])
    tokens = generate(model, inputs, DoLaLogitsProcessor(model, layer=16), max_new_tokens=12, num_beams=4)
    assert torch.equal(tokens, plain_beam_search(model, **inputs, steps=12, beams=4, layer=16))


@pytest.mark.parametrize("mode", MODES)
def test_switched_off_smollm2_is_its_own_generate(smollm2, mode):
    model, prompts = smollm2
    inputs = left_pad(prompts)
    torch.manual_seed(1)
    own = model.generate(**inputs, max_new_tokens=10, **MODES[mode])
    torch.manual_seed(1)
    off = DoLaLogitsProcessor(model, use_dola=False)
    assert torch.equal(generate(model, inputs, off, max_new_tokens=10, **MODES[mode]), own)
