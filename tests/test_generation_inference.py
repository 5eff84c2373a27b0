from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generation_inference
from generation_inference import (
    Decoding,
    EagerBackbone,
    draw,
    generate,
    generate_with_dola,
    generate_with_dola_static,
    sample_image_tokens,
)
from janus.dola import static_backbone
from janus.dola.static_backbone import StaticBackbone


@pytest.fixture(params=["static", "eager"])
def backbone(request, monkeypatch):
    """Every test that asks for it runs on both backbones."""
    chosen = {"static": StaticBackbone, "eager": EagerBackbone}[request.param]
    monkeypatch.setattr(generation_inference, "pick_backbone", lambda _: chosen)
    return request.param


# --- a second implementation: float64 numpy, no cache, no hooks, no code shared with the first ------------------------


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def jsd(log_p, log_q):
    log_m = np.logaddexp(log_p, log_q) - np.log(2)
    return 0.5 * ((np.exp(log_p) * (log_p - log_m)).sum(-1) + (np.exp(log_q) * (log_q - log_m)).sum(-1))


def contrast(log_qN, log_qj, alpha):
    kept = log_qN >= np.log(max(alpha, 1e-300)) + log_qN.max(-1, keepdims=True)
    return np.where(kept, log_qN - log_qj, -np.inf)


@torch.no_grad()
def plain_dola(model, processor, prompt, candidates, alpha, cfg_weight, temperature, parallel_size, seed, order):
    """Tokens `[parallel_size, T]` and the layer chosen at each, `[parallel_size, T]`."""
    ids = torch.tensor([processor.tokenizer.encode(prompt)] * (2 * parallel_size))
    ids[1::2, 1:-1] = processor.pad_id
    embeds = model.language_model.get_input_embeddings()(ids)
    generator = torch.Generator().manual_seed(seed)
    tokens, layers = [], []
    for _ in range(16):
        hidden = model.language_model.model(
            inputs_embeds=embeds, output_hidden_states=True, use_cache=False
        ).hidden_states
        norm = model.language_model.model.norm
        states = [hidden[-1][:, -1]] + [norm(hidden[j][:, -1]) for j in candidates]
        logits = np.stack([model.gen_head(s).double().numpy() for s in states])

        def guide(x):
            return x[..., 1::2, :] + cfg_weight * (x[..., 0::2, :] - x[..., 1::2, :])

        log_q = log_softmax(guide(logits) if order == "guide_first" else logits)
        choice = np.stack([jsd(log_q[0], q) for q in log_q[1:]]).argmax(0)
        log_qj = np.stack([log_q[1 + c, row] for row, c in enumerate(choice)])
        F = contrast(log_q[0], log_qj, alpha)
        if order == "contrast_first":
            both = np.isfinite(F[0::2]) & np.isfinite(F[1::2])
            with np.errstate(invalid="ignore"):
                guided = np.where(both, guide(F), -np.inf)
            F = np.where(both.any(-1, keepdims=True), guided, F[0::2])
            choice = choice[0::2]
        p_hat = np.exp(log_softmax(F / temperature))
        noise = torch.empty(p_hat.shape).exponential_(generator=generator).double().numpy()
        token = torch.tensor((p_hat / noise).argmax(-1))
        tokens.append(token)
        layers.append([candidates[c] for c in choice])
        inputs = model.prepare_gen_img_embeds(token.repeat_interleave(2))
        embeds = torch.cat([embeds, inputs[:, None]], dim=1)
    return torch.stack(tokens, dim=1), np.array(layers).T


@pytest.mark.parametrize(
    ("layer", "alpha", "cfg_weight", "temperature", "order"),
    [
        (1, 0.1, 5.0, 1.0, "guide_first"),
        (4, 0.0, 3.0, 0.7, "guide_first"),
        (5, 0.3, 1.0, 1.3, "guide_first"),
        (3, 1.0, 5.0, 1.0, "guide_first"),
        (4, 0.1, 5.0, 1.0, "contrast_first"),
        (2, 0.5, 2.0, 0.8, "contrast_first"),
    ],
)
def test_dola_static_gives_the_tokens_of_a_plain_float64_implementation(
    golden, backbone, layer, alpha, cfg_weight, temperature, order
):
    model, processor, prompt = golden.model, golden.processor, golden.facts["sft"][0]
    expected, _ = plain_dola(model, processor, prompt, [layer], alpha, cfg_weight, temperature, 3, 11, order)
    _, tokens = generate_with_dola_static(
        model,
        processor,
        prompt,
        layer=layer,
        alpha=alpha,
        cfg_order=order,
        temperature=temperature,
        parallel_size=3,
        cfg_weight=cfg_weight,
        seed=11,
        return_tokens=True,
    )
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("order", ["guide_first", "contrast_first"])
def test_early_exit_gives_the_tokens_and_layers_of_a_plain_float64_implementation(golden, backbone, order):
    model, processor, prompt = golden.model, golden.processor, golden.facts["sft"][1]
    expected, layers = plain_dola(model, processor, prompt, [1, 3, 5], 0.1, 3.0, 1.0, 3, 5, order)
    trace = []
    _, tokens = generate_with_dola(
        model,
        processor,
        prompt,
        candidate_layers=(5, 3, 1, 3, 99, 0),
        cfg_order=order,
        cfg_weight=3.0,
        parallel_size=3,
        seed=5,
        return_tokens=True,
        trace=trace,
    )
    assert torch.equal(tokens, expected)
    assert np.array([step["layer"] for step in trace]).T.tolist() == layers.tolist()
    assert len(set(layers.flatten().tolist())) > 1  # or the choice would not be tested


# --- off means off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg_weight", "temperature", "size"), [(5.0, 1.0, 3), (1.0, 0.5, 1), (0.0, 1.7, 3)])
@pytest.mark.parametrize("off", [{"use_dola": False}, {"layer": 6}])
def test_off_gives_the_tokens_of_the_reference_loop(
    golden, backbone, tmp_path, monkeypatch, cfg_weight, temperature, size, off
):
    monkeypatch.chdir(tmp_path)
    model, processor, prompt = golden.model, golden.processor, golden.facts["sft"][3]
    torch.manual_seed(9)
    reference = generate(model, processor, prompt, temperature, size, cfg_weight)
    how = {"temperature": temperature, "parallel_size": size, "cfg_weight": cfg_weight, "return_tokens": True}
    _, tokens = generate_with_dola_static(model, processor, prompt, seed=9, **how, **off)
    assert torch.equal(tokens, reference.long()) and tokens.dtype == torch.int64
    torch.manual_seed(9)  # without a seed of its own, the noise is that of torch's global generator
    _, tokens = generate_with_dola_static(model, processor, prompt, **how, **off)
    assert torch.equal(tokens, reference.long())


@given(st.integers(0, 10**6), st.integers(1, 400))
def test_the_draw_is_torchs_multinomial(seed, vocab):
    probs = torch.softmax(3 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed)), -1)
    expected = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    noise = torch.empty_like(probs).exponential_(generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(probs, noise), expected)


def test_images_come_as_pil_images_of_the_checkpoints_own_size(golden):
    images = generate_with_dola_static(golden.model, golden.processor, golden.facts["sft"][0], parallel_size=2, seed=0)
    assert [image.size for image in images] == [(64, 64)] * 2


# --- batches ---------------------------------------------------------------------------------------------------------

DECODINGS = [
    Decoding(),
    Decoding((4,)),
    Decoding((2, 5)),
    Decoding((4,), cfg_order="contrast_first"),
    Decoding(gamma=0.0),
    Decoding((4,), gamma=0.5, norm=False),
]


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_an_image_is_the_same_in_any_batch(golden, backbone, decoding):
    model, processor, prompts = golden.model, golden.processor, golden.facts["sft"]
    together = sample_image_tokens(model, processor, prompts, decoding, parallel_size=3, seeds=[4, 5, 6, 7])
    for i, prompt in enumerate(prompts):
        alone = sample_image_tokens(model, processor, [prompt], decoding, parallel_size=3, seeds=[4 + i])
        assert torch.equal(together[i], alone[0])
    some = sample_image_tokens(
        model, processor, prompts, decoding, parallel_size=3, seeds=[4, 5, 6, 7], samples=slice(1, 3)
    )
    assert torch.equal(together[:, 1:], some)


def test_bfloat16_runs_and_off_stays_close_to_the_reference_loop(golden, tmp_path, monkeypatch):
    from janus.models import MultiModalityCausalLM

    monkeypatch.chdir(tmp_path)
    model = MultiModalityCausalLM(golden.model.config)
    model.load_state_dict(golden.model.state_dict())
    model = model.bfloat16().eval()
    torch.manual_seed(0)
    reference = generate(model, golden.processor, golden.facts["sft"][0], parallel_size=8)
    _, tokens = generate_with_dola_static(
        model, golden.processor, golden.facts["sft"][0], parallel_size=8, seed=0, use_dola=False, return_tokens=True
    )
    assert (tokens[:, 0] == reference[:, 0]).float().mean() >= 0.75  # rounding of the head's logits, nothing else
    _, dola = generate_with_dola(
        model,
        golden.processor,
        golden.facts["sft"][0],
        candidate_layers=(2, 4),
        parallel_size=8,
        seed=0,
        return_tokens=True,
    )
    assert ((dola >= 0) & (dola < 128)).all()


def one_graph(step, space):
    """What capture returns on CUDA, played on the CPU: whatever is no tensor stays as it was at the capture."""
    backbone = step.args[2]
    baked = {name: value for name, value in vars(backbone).items() if not isinstance(value, torch.Tensor)}

    def replay():
        now = dict(vars(backbone))
        vars(backbone).update(baked)
        result = step()
        vars(backbone).update(now)
        return result

    return replay


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_the_graphed_step_gives_the_same_tokens_across_its_buckets(golden, monkeypatch, decoding):
    model, processor, prompts = golden.model, golden.processor, golden.facts["sft"]
    how = {"parallel_size": 2, "seeds": [1, 2, 3, 4]}
    expected = sample_image_tokens(model, processor, prompts, decoding, **how)
    monkeypatch.setattr(static_backbone, "uses_graphs", lambda device: True)
    monkeypatch.setattr(static_backbone, "capture", one_graph)
    monkeypatch.setattr(static_backbone, "GRAPH_BUCKET", 8)  # several captures within the 16 tokens
    assert torch.equal(sample_image_tokens(model, processor, prompts, decoding, **how), expected)
    alone = sample_image_tokens(model, processor, prompts[:1], decoding, parallel_size=2, seeds=[1])
    assert torch.equal(alone[0], expected[0])


def test_a_failing_step_leaves_the_models_attention_as_it_was(golden):
    llama = golden.model.language_model.model

    def fail(layer, arguments):
        if arguments[0].shape[1] == 3:  # a step, not the prefill
            raise RuntimeError("out of memory")

    hook = llama.layers[2].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            sample_image_tokens(golden.model, golden.processor, golden.facts["sft"][:1], Decoding(), window=3)
    finally:
        hook.remove()
    assert llama.config._attn_implementation == "sdpa"


# --- trace -----------------------------------------------------------------------------------------------------------


def test_the_trace_tells_per_step_what_dola_did(golden):
    trace = []
    _, tokens = generate_with_dola_static(
        golden.model, golden.processor, golden.facts["sft"][0], layer=4, parallel_size=2, seed=1, trace=trace,
        return_tokens=True,
    )  # fmt: skip
    assert len(trace) == tokens.shape[1]
    for i, step in enumerate(trace):
        assert step["layer"] == [4, 4]
        for row in range(2):
            best_N, best_hat = step["q_N"][row][0][0], step["p_hat"][row][0][0]
            assert step["argmax_changed"][row] == (best_N != best_hat)
            for distribution in ("q_N", "q_j", "p_hat"):
                probabilities = [p for _, p in step[distribution][row]]
                assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
            kept = {t for t, p in step["p_hat"][row] if p > 0}
            assert tokens[row, i].item() in kept or len(kept) == 5
    assert any(any(step["argmax_changed"]) for step in trace)


# --- any object with the attributes ----------------------------------------------------------------------------------


class StandInLlama(torch.nn.Module):
    """A causal model that is not transformers': running mean over what was seen, with a cache of its own kind."""

    def __init__(self, width=16, depth=3):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, inputs_embeds, use_cache, past_key_values, output_hidden_states=False):
        total, count = past_key_values or (0, 0)
        sums = total + inputs_embeds.cumsum(1)
        counts = count + torch.arange(1, inputs_embeds.shape[1] + 1)[None, :, None]
        states = [sums / counts]
        for layer in self.layers:
            states.append(states[-1] + torch.tanh(layer(states[-1])))
        states[-1] = self.norm(states[-1])
        return SimpleNamespace(
            last_hidden_state=states[-1],
            past_key_values=(sums[:, -1:], counts[:, -1:]),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def stand_in():
    torch.manual_seed(0)
    embed, gen_embed = torch.nn.Embedding(30, 16), torch.nn.Embedding(20, 16)
    model = SimpleNamespace(
        language_model=SimpleNamespace(model=StandInLlama(), get_input_embeddings=lambda: embed),
        gen_head=torch.nn.Linear(16, 20),
        gen_embed=gen_embed,
        prepare_gen_img_embeds=gen_embed,
        gen_vision_model=SimpleNamespace(
            decoder=SimpleNamespace(num_resolutions=3),
            decode_code=lambda codes, shape: torch.zeros(shape[0], 3, 4 * shape[2], 4 * shape[3]),
        ),
    )
    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(encode=lambda text, **_: [1, *(2 + ord(c) % 20 for c in text), 3]),
        pad_id=0,
        image_processor=SimpleNamespace(image_size=8),
    )
    return model, processor


def test_the_eager_loop_serves_any_object_with_the_attributes():
    model, processor = stand_in()
    assert generation_inference.pick_backbone(model.language_model.model) is EagerBackbone
    how = {"parallel_size": 2, "seed": 3, "return_tokens": True}
    images, tokens = generate_with_dola_static(model, processor, "abc", layer=2, **how)
    assert tokens.shape == (2, 4) and [image.size for image in images] == [(8, 8)] * 2
    _, off = generate_with_dola_static(model, processor, "abc", layer=3, **how)
    torch.manual_seed(3)
    assert torch.equal(generate(model, processor, "abc", parallel_size=2).long(), off)
    _, early = generate_with_dola(model, processor, "abc", candidate_layers=(1, 2), **how)
    assert early.shape == (2, 4)


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 0}, r"layer must be in 1\.\.6"),
        ({"layer": 7}, r"layer must be in 1\.\.6"),
        ({"layer_ratio": 1.5}, "layer_ratio"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.5}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"cfg_weight": -1.0}, "cfg_weight"),
        ({"cfg_weight": float("inf")}, "cfg_weight"),
        ({"cfg_order": "both"}, "cfg_order"),
    ],
)
def test_values_out_of_range_are_value_errors_that_name_them(golden, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_with_dola_static(golden.model, golden.processor, golden.facts["sft"][0], **arguments)


def test_candidates_that_leave_no_layer_are_a_value_error(golden):
    with pytest.raises(ValueError, match=r"\(22, 24, 26, 28\)|\[22, 24, 26, 28\]"):
        generate_with_dola(golden.model, golden.processor, golden.facts["sft"][0])
