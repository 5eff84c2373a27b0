"""Layer searches: what every task reads, against separate evaluations of one layer and alpha in float64."""

import csv
import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import DATA, write_lines
from generation_inference import format_image_prompt, format_question
from janus.dola.cli import JANUS_TINY
from janus.dola.layer_search import tasks
from janus.dola.layer_search.__main__ import encode_prompts
from janus.dola.layer_search.examples import read_examples
from janus.dola.layer_search.metrics import measure, metric_names
from janus.dola.layer_search.tasks import (
    Task,
    answers_task,
    bounded_passes,
    continuation_task,
    image_task,
    tower_task,
)
from janus.dola.loading import load_pretrained_model
from janus.dola.rerank import build_text_bank, pooled_features
from janus.dola.text_encoder import load_text_encoder
from tolerance import assert_close, float32_error, terms_of

FACTOR = DATA / "expert_factor.csv"
ALPHAS = (0.0, 0.1, 0.5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["golden", "golden without norm", "janus-tiny"])
def janus(request):
    """(model, processor, directory of the text encoder or None, whether contrast layers are normed)."""
    if request.param != "janus-tiny":
        golden = request.getfixturevalue("golden")
        return golden.model, golden.processor, None, request.param == "golden"
    if not JANUS_TINY.is_dir():
        pytest.skip("janus/checkpoints/janus-tiny is not there: python -m tools.train_janus_tiny")
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    return model, processor, JANUS_TINY / "siglip", True


# --- a separate evaluation of one layer and alpha --------------------------------------------------------------------


Tokens = list[tuple[float, int]]
"""(p_hat, rank) of each true token."""


def plain_tokens(
    logits_N: Tensor, logits_j: Tensor | None, targets: list[int], alpha: float, error: float
) -> tuple[Tokens, Tokens]:
    """The worst and the best that true tokens can have where every F and log q_N may be off by `error`.

    From logits `[T, vocab]` in float64, written out; without logits_j, of q_N.
    """
    worst, best = [], []
    for t, true in enumerate(targets):
        log_qN = logits_N[t].double().log_softmax(-1)
        F = log_qN if logits_j is None else log_qN - logits_j[t].double().log_softmax(-1)
        margin = log_qN - log_qN.max() - (math.log(alpha) if alpha > 0 else -math.inf)
        surely, perhaps = margin >= error, margin >= -error

        def rank(scores: Tensor, rivals: Tensor, shift: float, true: int = true) -> int:
            above = rivals & (scores > scores[true] + shift)
            above[true] = False
            return 1 + int(above.sum())

        def p_hat(rivals: Tensor, shift: float, true: int = true, F: Tensor = F) -> float:
            rivals = rivals.clone()
            rivals[true] = False
            return float(1 / (1 + (F[rivals] - F[true] + shift).exp().sum()))

        if surely[true]:
            worst.append((p_hat(perhaps, 2 * error), rank(F, perhaps, -2 * error)))
        else:
            worst.append((0.0, rank(log_qN, torch.ones_like(perhaps), -2 * error)))
        if perhaps[true]:
            best.append((p_hat(surely, -2 * error), rank(F, surely, 2 * error)))
        else:
            best.append((0.0, rank(log_qN, torch.ones_like(surely), 2 * error)))
    return worst, best


def plain_metrics(truth: Tokens, *others: Tokens) -> dict[str, float]:
    metrics = {
        "prob": np.mean([p for p, _ in truth]),
        "rank": np.mean([rank for _, rank in truth]),
        "top1": np.mean([rank == 1 and p > 0 for p, rank in truth]),
        "kept": np.mean([p > 0 for p, _ in truth]),
        "exact": float(all(rank == 1 for _, rank in truth)),
    }
    if others:
        sums = [sum(math.log(p) if p > 0 else -1000.0 for p, _ in tokens) for tokens in (truth, *others)]
        metrics["accuracy"] = float(sums[0] > max(sums[1:]))
    return metrics


def assert_within(values: np.ndarray, names: list[str], texts: list[tuple[Tokens, Tokens]]) -> None:
    """`values` `[metrics]` lie where float32 may put them, by the worst and the best of each text, truth first."""
    worst, best = zip(*texts, strict=True)
    worst, best = plain_metrics(worst[0], *best[1:]), plain_metrics(best[0], *worst[1:])
    for name in worst:
        low, high = sorted((worst[name], best[name]))
        rounding = float32_error(1, high)
        assert low - rounding <= values[names.index(name)] <= high + rounding, name


Evaluation = Callable[[int | None, float], list[tuple[Tokens, Tokens]]]
"""Of one layer and alpha: the worst and the best of the truth, then of each rival."""


@torch.no_grad()
def plain_image(model, processor, example: dict, cfg_weight: float, norm: bool = True) -> Evaluation:
    pixels = torch.from_numpy(np.array(Image.open(example["image"]))).permute(2, 0, 1)[None].float() / 127.5 - 1
    codes = model.gen_vision_model.encode(pixels)[2][2]
    ids = torch.tensor(processor.tokenizer.encode(format_image_prompt(processor, example["prompt"])))
    blank = torch.full_like(ids, processor.pad_id)
    blank[0], blank[-1] = ids[0], ids[-1]
    llama, passes = model.language_model.model, []
    ln_out = llama.norm if norm else nn.Identity()
    for row in (ids, blank):
        embeds = torch.cat([model.get_input_embeddings()(row), model.prepare_gen_img_embeds(codes[:-1])])[None]
        passes.append(llama(inputs_embeds=embeds, output_hidden_states=True).hidden_states)

    @torch.no_grad()
    def evaluate(layer: int | None, alpha: float) -> list:
        states = [[h[-1]] + ([] if layer is None else [ln_out(h[layer])]) for h in passes]
        cond, uncond = (model.gen_head(torch.cat(h)[:, len(ids) - 1 :]) for h in states)
        guided = uncond + cfg_weight * (cond - uncond)
        largest = (cfg_weight + abs(1 - cfg_weight)) * float(torch.stack([cond, uncond]).abs().max())
        error = float32_error(terms_of(model.gen_aligner, model.language_model, model.gen_head), largest)
        return [plain_tokens(guided[0], guided[1] if layer else None, codes.tolist(), alpha, error)]

    return evaluate


@torch.no_grad()
def plain_answers(lm, prefix: Tensor, continuations: list[Tensor], norm: bool = True) -> Evaluation:
    """`prefix` is embeddings `[P, width]`; the truth comes first."""
    passes, ln_out = [], lm.model.norm if norm else nn.Identity()
    for ids in continuations:
        embeds = torch.cat([prefix, lm.get_input_embeddings()(ids)])[None]
        passes.append(lm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states)

    @torch.no_grad()
    def evaluate(layer: int | None, alpha: float) -> list:
        found = []
        for ids, states in zip(continuations, passes, strict=True):
            h = [states[-1]] + ([] if layer is None else [ln_out(states[layer])])
            logits = lm.lm_head(torch.cat(h)[:, len(prefix) - 1 : -1])
            error = float32_error(terms_of(lm), float(logits.abs().max()))
            found.append(plain_tokens(logits[0], logits[1] if layer else None, ids.tolist(), alpha, error))
        return found

    return evaluate


def decodings(num_layers: int) -> list[tuple[int, int | None, float]]:
    """(column, layer, alpha): the baseline, then every layer at every alpha."""
    return [(0, None, 0.0), *((1 + layer, layer, alpha) for layer in range(1, num_layers) for alpha in ALPHAS)]


def assert_every_pair(values: np.ndarray, names: list[str], num_layers: int, evaluate: Evaluation) -> None:
    """`values` `[metrics, alphas, 2 + layers]` of one example."""
    for column, layer, alpha in decodings(num_layers):
        assert_within(values[:, ALPHAS.index(alpha), column], names, evaluate(layer, alpha))


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_image_every_pair_equals_an_evaluation_of_that_pair_alone(janus, drawings):
    model, processor, _, norm = janus
    examples = read_examples(drawings / "image.jsonl", "image")[1:4]  # two lengths: the batch is padded
    task = image_task(model, processor, 3.0, partial(encode_prompts, processor, CPU), norm)
    values = measure(task, examples, range(1, task.num_layers), ALPHAS)
    for example, found in zip(examples, values, strict=True):
        plain = plain_image(model, processor, example, 3.0, norm)
        assert_every_pair(found, metric_names(examples), task.num_layers, plain)


def test_answers_every_pair_equals_an_evaluation_of_that_pair_alone(janus, drawings):
    model, processor, _, norm = janus
    examples = read_examples(drawings / "answers.jsonl", "answers")[1:4]
    task = answers_task(model, processor, partial(format_question, processor), norm)
    values = measure(task, examples, range(1, task.num_layers), ALPHAS)
    pro = len(processor.tokenizer.encode("<|User|>", add_special_tokens=False)) == 1
    roles = ("<|User|>", "<|Assistant|>") if pro else ("User", "Assistant")
    for example, found in zip(examples, values, strict=True):
        conversation = [
            {"role": roles[0], "content": "<image_placeholder>\n" + example["question"]},
            {"role": roles[1], "content": ""},
        ]
        picture: Image.Image = Image.open(example["image"])
        batch = processor(conversations=conversation, images=[picture])
        with torch.no_grad():
            prefix = model.prepare_inputs_embeds(**vars(batch))[0]
        texts = [example["answer"], *(text for text in example["choices"] if text != example["answer"])]
        encoded = [processor.tokenizer.encode(" " + text, add_special_tokens=False) for text in texts]
        continuations = [torch.tensor([*ids, processor.tokenizer.eos_token_id]) for ids in encoded]
        plain = plain_answers(model.language_model, prefix, continuations, norm)
        assert_every_pair(found, metric_names(examples), task.num_layers, plain)


@pytest.mark.parametrize("own_candidates", [False, True])
def test_tower_every_pair_equals_an_evaluation_of_that_pair_alone(janus, drawings, text_encoder, own_candidates):
    model, processor, directory, norm = janus
    siglip, tokenizer = load_text_encoder(directory or text_encoder)
    examples = read_examples(drawings / "tower.jsonl", "tower")
    if own_candidates:
        examples = [e | {"candidates": sorted({e["caption"], *e["candidates"][i:]})} for i, e in enumerate(examples)]
    vit = model.vision_model.vision_tower
    task = tower_task(vit, processor.image_processor, siglip, tokenizer, examples, norm)
    values = measure(task, examples, range(1, task.num_layers), ALPHAS)
    for example, found in zip(examples, values, strict=True):
        pixels = processor.image_processor([Image.open(str(example["image"]))])
        texts = normalize(build_text_bank(siglip, tokenizer, example["candidates"]).detach(), dim=-1)
        true = example["candidates"].index(example["caption"])

        def plain(layer: int | None, alpha: float, pixels=pixels, texts=texts, true=true) -> list:
            z = normalize(pooled_features(vit, pixels, [layer or task.num_layers, task.num_layers], norm), dim=-1)
            scale = siglip.logit_scale.exp().detach()
            logits = scale * z @ texts.T
            error = float32_error(terms_of(vit, siglip.text_model), float(scale))
            return [plain_tokens(logits[1], logits[0] if layer else None, [true], alpha, error)]

        assert_every_pair(found, metric_names(examples), task.num_layers, plain)


@pytest.mark.skipif(not FACTOR.is_file(), reason=f"{FACTOR} is not there: set JANUS_DOLA_DATA")
def test_factor_on_smollm2_every_pair_equals_an_evaluation_of_that_pair_alone(smollm2):
    model, tokenizer = smollm2
    with FACTOR.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: len(row["turncated_prefixes"] + row["completion"]))[:2]
    examples = [
        {
            "question": row["turncated_prefixes"].rstrip(),
            "answer": row["completion"],
            "choices": [row["completion"], *(row[f"contradiction_{i}"] for i in range(3))],
        }
        for row in rows
    ]
    layers, alphas = [8, 24], (0.0, 0.1)
    values = measure(continuation_task(model, tokenizer), examples, layers, alphas)
    for example, found in zip(examples, values, strict=True):
        with torch.no_grad():
            prefix = model.get_input_embeddings()(torch.tensor(tokenizer(example["question"])["input_ids"]))
        continuations = [torch.tensor(tokenizer(f" {text}")["input_ids"]) for text in example["choices"]]
        plain = plain_answers(model, prefix, continuations)
        for column, layer, alpha in [(0, None, 0.0), *((2 + i, j, a) for i, j in enumerate(layers) for a in alphas)]:
            assert_within(found[:, alphas.index(alpha), column], metric_names(examples), plain(layer, alpha))


def test_apc_only_is_q_N_renormalised_on_what_alpha_keeps(golden, drawings):
    examples = read_examples(drawings / "image.jsonl", "image")[:2]
    task = image_task(golden.model, golden.processor, 3.0, partial(encode_prompts, golden.processor, CPU))
    values = measure(task, examples, [3], ALPHAS)
    reading = next(iter(task.read(examples[:1])))
    with torch.no_grad():
        logits = reading.phi(reading.forced.hidden[-1])
    uniform = torch.zeros_like(logits)
    for a, alpha in enumerate(ALPHAS):
        error = float32_error(terms_of(golden.model.gen_head), 5 * float(logits.abs().max()))
        expected = plain_tokens(logits, uniform, reading.forced.targets.tolist(), alpha, error)
        assert_within(values[0, :, a, 1], metric_names(examples), [expected])


@torch.inference_mode()
def test_the_true_codes_are_those_of_float32_in_a_model_of_any_dtype(golden, drawings):
    examples = read_examples(drawings / "image.jsonl", "image")
    model = deepcopy(golden.model).bfloat16()
    task = image_task(model, golden.processor, 3.0, partial(encode_prompts, golden.processor, CPU))
    found = next(iter(task.read(examples))).forced.targets.view(len(examples), -1)
    pictures = [np.array(Image.open(example["image"])) for example in examples]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    codes, rounded = (
        vq.encode(pixels.to(dtype))[2][2].view_as(found)
        for vq, dtype in ((deepcopy(model.gen_vision_model).float(), torch.float32),
                          (model.gen_vision_model, torch.bfloat16))
    )  # fmt: skip
    assert torch.equal(found, codes) and not torch.equal(found, rounded)


def test_an_answer_without_choices_or_image_is_read_after_its_question(golden, tmp_path):
    data = write_lines(tmp_path / "q.jsonl", [{"question": "Which colour?", "answer": "red"}] * 3)
    examples = read_examples(data, "answers")
    task = answers_task(golden.model, golden.processor, partial(format_question, golden.processor))
    values = measure(task, examples, [2, 5], (0.1,))
    assert values.shape == (3, 6, 1, 4) and np.isfinite(values).all()


# --- memory ----------------------------------------------------------------------------------------------------------


def of_golden(golden, name: str) -> Task:
    if name == "image":
        return image_task(golden.model, golden.processor, 3.0, partial(encode_prompts, golden.processor, CPU))
    return answers_task(golden.model, golden.processor, partial(format_question, golden.processor))


@pytest.mark.parametrize(("name", "makes_states"), [("image", "read_states"), ("answers", "teacher_force_batch")])
def test_a_batch_beyond_the_bound_is_read_in_passes_that_do_not_outlive_their_scores(
    golden, drawings, monkeypatch, name: str, makes_states: str
):
    examples = read_examples(drawings / f"{name}.jsonl", name)
    task, layers = of_golden(golden, name), [2, 4]
    together = measure(task, examples, layers, ALPHAS)
    make, passes = getattr(tasks, makes_states), []

    def watched(*args, **kwargs):
        assert all(states.expired() for states in passes), "the states of an earlier pass are still in memory"
        made = make(*args, **kwargs)
        hidden = made if isinstance(made, Tensor) else made.hidden
        passes.append(StorageWeakRef(hidden.untyped_storage()))
        return made

    monkeypatch.setattr(tasks, makes_states, watched)
    measure(task, examples, layers, ALPHAS)
    assert len(passes) == 1, "what is within the bound is read in one pass"
    passes.clear()
    monkeypatch.setattr(
        tasks, "bounded_passes", lambda lengths, _: (slice(i, i + 2) for i in range(0, len(lengths), 2))
    )
    apart = measure(task, examples, layers, ALPHAS)
    assert len(passes) == len(examples) / 2
    assert_close(apart, together, terms_of(golden.model.language_model), size=float(np.abs(together).max()))


@torch.inference_mode()
def test_the_states_of_painting_are_in_memory_once(golden, drawings):
    blocks, outputs = golden.model.language_model.model.layers, []

    def count(_block, _args, output: Tensor) -> None:
        outputs.append(StorageWeakRef(output.untyped_storage()))
        assert sum(not states.expired() for states in outputs) <= 2, "a block's output outlives the block after it"

    hooks = [block.register_forward_hook(count) for block in blocks]
    try:
        next(iter(of_golden(golden, "image").read(read_examples(drawings / "image.jsonl", "image"))))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(outputs) == len(blocks)


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made within have at a time."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.live = {place: held for place, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


def test_the_memory_of_a_search_is_that_of_one_pass_whatever_the_batch(drawings, monkeypatch):
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    task = image_task(model, processor, 3.0, partial(encode_prompts, processor, CPU))
    examples = read_examples(drawings / "image.jsonl", "image")[:2]
    with torch.inference_mode():
        monkeypatch.setattr(tasks, "STATES_BYTES", next(iter(task.read(examples))).forced.hidden.nbytes * 3 // 2)
    peaks = []
    for batch in (examples, examples * 8):
        with LiveBytes() as memory:
            measure(task, batch, [2, 4], ALPHAS)
        peaks.append(memory.peak)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([[3, 3], [3, 3], [3, 3]], [2, 1]),  # 12 positions fit
        ([[5], [1], [1], [9]], [2, 1, 1]),  # padded to the longest of a pass
        ([[40], [2]], [1, 1]),
    ],
)
def test_passes_are_cut_by_their_padded_size(monkeypatch, lengths: list, passes: list[int]):
    monkeypatch.setattr(tasks, "STATES_BYTES", 120)
    cut = list(bounded_passes(lengths, bytes_per_position=10))
    assert [len(lengths[some]) for some in cut] == passes
    assert [example for some in cut for example in lengths[some]] == lengths
