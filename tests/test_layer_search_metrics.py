"""Layer searches: intervals, buckets, the best layer, and the step that decided."""

import numpy as np

from janus.dola.intervals import bootstrap
from janus.dola.layer_search.examples import read_examples
from janus.dola.layer_search.metrics import buckets, find_decision, metric_names, search
from janus.dola.layer_search.tasks import tower_task
from janus.dola.text_encoder import load_text_encoder


def test_buckets_are_thirds_of_the_layers_without_the_last():
    assert buckets(30) == [(1, 10), (11, 20), (21, 29)]
    assert buckets(24) == [(1, 8), (9, 16), (17, 23)]
    assert buckets(8) == [(1, 3), (4, 5), (6, 7)]
    assert buckets(2) == [(1, 1)]


def test_the_interval_is_that_of_resampled_means():
    differences = np.random.default_rng(0).normal(0.3, 1.0, (400, 3))
    low, high = bootstrap(differences).T
    assert np.allclose(low, differences.mean(0) - 1.96 * differences.std(0) / 20, atol=0.02)
    assert np.allclose(high, differences.mean(0) + 1.96 * differences.std(0) / 20, atol=0.02)
    assert (bootstrap(np.full((5, 1), 0.25)) == 0.25).all()
    assert (bootstrap(differences) == bootstrap(differences)).all()


def test_the_decision_shown_is_the_step_that_moved_the_example(golden, drawings, text_encoder):
    siglip, tokenizer = load_text_encoder(text_encoder)
    examples = read_examples(drawings / "tower.jsonl", "tower")
    vit = golden.model.vision_model.vision_tower
    task = tower_task(vit, golden.processor.image_processor, siglip, tokenizer, examples)
    values = search(task, examples, [2], (0.1,))
    top1 = values[:, metric_names(examples).index("top1"), 0]
    flipped = [i for i in range(len(examples)) if top1[i, 0] != top1[i, 2]]
    assert flipped, "the random tower must change some example, or this proves nothing"
    for i in flipped:
        better = bool(top1[i, 2] > top1[i, 0])
        decision = find_decision(task, examples[i], 2, 0.1, better)
        assert examples[i]["candidates"][decision.token] == examples[i]["caption"]
        q_N, p_hat = (decision.top[name] for name in ("q_N", "p_hat"))
        assert (p_hat[0][0] == decision.token) == better and (q_N[0][0] == decision.token) != better
