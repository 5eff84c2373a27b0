import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.truthfulqa import (
    ALPHA,
    EARLY_EXITS,
    GAMMAS,
    LAYERS,
    READOUTS,
    Question,
    build_tree,
    compare,
    contrast_names,
    judge,
    read_questions,
    run_tree,
    score_tree,
)
from janus.dola.scoring import fill_dropped, score_forced, teacher_force

ANSWERS = [[5, 6, 7, 8], [5, 6, 9], [5], [11, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=30, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_answers_that_begin_alike_share_their_tokens():
    tree = build_tree(ANSWERS)
    assert len(tree.tokens) == 4 + 1 + 6
    assert [[tree.tokens[k].item() for k in path] for path in tree.paths] == ANSWERS
    for path in tree.paths:
        assert [tree.parents[k].item() for k in path] == [-1, *path[:-1]]


def test_one_pass_over_the_tree_scores_every_answer_as_it_would_be_alone(model):
    shared, asked, unasked = torch.arange(20, 29), torch.tensor([1, 2, 3, 4]), torch.tensor([1])
    tree, log_unigram = build_tree(ANSWERS), torch.randn(40).log_softmax(-1)
    with torch.no_grad():
        cache = model(shared[None], use_cache=True).past_key_values
    run_tree(model, cache, [asked], tree)  # leaves the cache as it was
    with_question, without = run_tree(model, cache, [asked, unasked], tree)
    scores = score_tree(model, tree, with_question, without, log_unigram)
    found = {name: torch.tensor(rows) for name, rows in scores.items()}
    forced = teacher_force(model, torch.cat([shared, asked]), [torch.tensor(ids) for ids in ANSWERS])
    names = contrast_names()

    def close(name: str, row: int, answer: int, expected: float) -> None:
        assert found[name][row, answer].item() == pytest.approx(expected, abs=2e-3), (name, names[row], answer)

    for readout, norm in READOUTS.items():
        scored = score_forced(model, forced, layers=LAYERS, alphas=(0.0, ALPHA), norm=norm, overlap=True)
        for answer, scores in enumerate(scored):
            kept = scores.apc_only.log_p[1] > -torch.inf
            close("log_qN", 0, answer, scores.baseline.log_p.sum().item())
            close("apc", 0, answer, fill_dropped(scores.apc_only.log_p[1]).sum().item())
            close("kept", 0, answer, kept.sum().item())
            rows = [
                (names.index((f"layer {layer}", readout)), scores.static.log_p[:, i]) for i, layer in enumerate(LAYERS)
            ]
            rows += [
                (names.index((f"early exit {c[0]}-{c[-1]}", readout)), scores.early_exit(c).log_p) for c in EARLY_EXITS
            ]
            for row, log_p in rows:
                close("p_hat", row, answer, log_p[0].sum().item())
                close("p_hat_apc", row, answer, fill_dropped(log_p[1]).sum().item())


def test_the_papers_score_and_the_controls_are_their_definitions(model):
    shared, asked, unasked = torch.arange(20, 29), torch.tensor([1, 2, 3, 4]), torch.tensor([1])
    tree, log_unigram = build_tree(ANSWERS), torch.randn(40).log_softmax(-1)
    with torch.no_grad():
        cache = model(shared[None], use_cache=True).past_key_values
        with_question, without = run_tree(model, cache, [asked, unasked], tree)
        found = score_tree(model, tree, with_question, without, log_unigram)
        for answer, ids in enumerate(ANSWERS):
            texts = [torch.cat([shared, prompt, torch.tensor(ids)]) for prompt in (asked, unasked)]
            hidden = [model.model(text[None], output_hidden_states=True).hidden_states for text in texts]
            target, at = torch.tensor(ids), [slice(len(text) - len(ids) - 1, -1) for text in texts]

            def log_q(layer: int, readout: str, given: int) -> torch.Tensor:
                h = hidden[given][layer][0, at[given]]  # noqa: B023
                h = model.model.norm(h) if readout == "normed" and layer < 30 else h
                return model.lm_head(h).log_softmax(-1)

            log_qN, rows = log_q(30, "normed", 0), []
            true = torch.arange(len(ids)), target
            for contrast, readout in contrast_names():
                if contrast.startswith("early exit"):
                    continue
                if contrast.startswith("layer"):
                    layer = int(contrast.removeprefix("layer ").removesuffix(", no question"))
                    rows.append(log_q(layer, readout, int(contrast.endswith("no question"))))
                else:
                    rows.append(log_unigram.expand(len(ids), -1))
            kept = log_qN >= np.log(ALPHA) + log_qN.amax(-1, keepdim=True)
            for row, log_qj in enumerate(rows):
                ratio = (log_qN - log_qj)[true]
                expected = {
                    "log_q": log_qj[true],
                    "p_hat": (log_qN - log_qj).log_softmax(-1)[true],
                    "ratio_apc": torch.where(kept[true], ratio, -1000.0),
                }
                for name, values in expected.items():
                    assert found[name][row][answer] == pytest.approx(values.sum().item(), abs=2e-3), (name, row)
            for i, readout in enumerate(READOUTS):
                for k, gamma in enumerate(GAMMAS):
                    p_hat = (log_qN - gamma * log_q(28, readout, 0)).log_softmax(-1)[true].sum().item()
                    assert found["gammas"][i * len(GAMMAS) + k][answer] == pytest.approx(p_hat, abs=2e-3)


def test_the_metrics_are_the_papers_and_a_tie_is_not_above():
    question = Question("?", ("a.", "b.", "c.", "d."), num_true=2, best=1)
    scores = np.log([[0.2, 0.4, 0.3, 0.1], [0.5, 0.1, 0.2, 0.2], [0.3, 0.3, 0.3, 0.1]])
    expected = [[1.0, 0.6, 0.5], [0.0, 0.6, 0.5], [0.0, 0.6, 0.0]]
    assert judge(question, scores) == pytest.approx(np.array(expected))
    assert judge(question, scores - 5000) == pytest.approx(np.array(expected))


def test_a_difference_is_paired_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    judged = rng.random((200, 2, 3))
    judged[:, 1] = judged[:, 0] + 0.1  # always 10 points more, however the questions differ
    same, more = compare(judged, judged[:, :1])
    for metric in ("MC1", "MC2", "MC3"):
        assert same[metric]["difference"] == 0 and same[metric]["interval"] == [0, 0]
        assert more[metric]["difference"] == 10 and more[metric]["interval"] == [10, 10]
    low, high = compare(judged[:, :1], np.zeros((200, 1, 3)))[0]["MC1"]["interval"]
    mean, spread = 100 * judged[:, 0, 0].mean(), 100 * judged[:, 0, 0].std() / 200**0.5
    assert (low, high) == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=0.3)


def test_answers_are_closed_with_one_period_and_the_best_is_found_among_the_true(tmp_path: Path):
    with (tmp_path / "q.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        writer.writerow([" What? ", "Two ", "One.; Two; ; Two", "Three;Four."])
    assert read_questions(tmp_path / "q.csv") == [Question("What?", ("One.", "Two.", "Three.", "Four."), 2, 1)]
