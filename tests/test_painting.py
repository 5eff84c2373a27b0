import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run_batch_prompts
from conftest import GOLDEN
from generation_inference import Decoding, Record, format_image_prompt, sample_image_tokens
from janus.dola import painting
from janus.dola.cli import run_command
from janus.dola.painting import describe_variants, is_run_file, prompt_seed, variant_folders
from janus.dola.pictures import read_settings
from tolerance import assert_close, terms_of

PROMPTS = ["a red circle", "画一只狗。"]
SPECS = ["baseline", "apc", "layer=4", "layer=2,alpha=0.5,gamma=0.5", "exit=1,3,5", "layer=4,norm=off"]
NAMES = ["baseline", "apc", "layer4", "layer2_alpha0.5_gamma0.5", "exit1-3-5", "layer4_normoff"]


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_batch_prompts.py", "--model", str(GOLDEN), *map(str, arguments)])
        run_command(run_batch_prompts.main)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Six variants of two prompts, traced."""
    outdir = tmp_path_factory.mktemp("compared")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    run(*prompts, "--compare", *SPECS, "--parallel-size", 2, "--cfg-weight", 3, "--trace", "--outdir", outdir)
    return outdir


# --- variants side by side -------------------------------------------------------------------------------------------


def test_every_variant_has_its_folder_its_manifest_lines_and_a_labelled_row(compared, golden):
    entries = lines(compared / "manifest.jsonl")
    assert [e["variant"] for e in entries] == [name for _ in PROMPTS for name in NAMES for _ in range(2)]
    assert all(e["file"].startswith(f"{e['variant']}/") and (compared / e["file"]).is_file() for e in entries)
    sheet = Image.open(compared / entries[0]["sheet"])
    assert sheet.height > len(NAMES) * 128 and Image.open(compared / "contact_sheet.png").height >= sheet.height
    decodings = [
        Decoding(cfg_weight=3.0),
        Decoding(gamma=0.0, cfg_weight=3.0),
        Decoding((4,), cfg_weight=3.0),
        Decoding((2,), 0.5, 0.5, cfg_weight=3.0),
        Decoding((1, 3, 5), cfg_weight=3.0),
        Decoding((4,), norm=False, cfg_weight=3.0),
    ]
    text = format_image_prompt(golden.processor, PROMPTS[1])
    for i, decoding in enumerate(decodings):  # each is what the library gives, from the same noise
        (tokens,) = sample_image_tokens(
            golden.model, golden.processor, [text], decoding, parallel_size=2, seeds=[prompt_seed(0, PROMPTS[1])]
        )
        hashes = [run_batch_prompts.image_hash(row.numpy()) for row in tokens]
        assert [e["tokens_sha256"] for e in entries[12 + 2 * i :][:2]] == hashes
    assert len({e["tokens_sha256"] for e in entries[12:]}) > 8


def test_labels_say_what_differs_and_the_title_what_is_shared():
    decoding = {"layers": [6], "alpha": 0.1, "gamma": 1.0, "norm": True, "cfg_order": "guide_first", "cfg_weight": 2.0,
                "temperature": 1.0}  # fmt: skip
    variants = {
        "a": decoding,
        "b": decoding | {"layers": []},
        "c": decoding | {"layers": [], "gamma": 0.0, "alpha": 0.5},
        "d": decoding | {"layers": [2, 4], "gamma": -0.5, "norm": False},
        "e": decoding | {"cfg_order": "contrast_first"},
    }
    labels, shared = describe_variants(variants)
    assert list(labels.values()) == [
        "layer 6 · α 0.1",
        "baseline",
        "APC only · α 0.5",
        "exit 2, 4 · α 0.1 · γ -0.5 · no norm",
        "layer 6 · α 0.1 · contrast first",
    ]
    assert shared == "cfg 2 · T 1"
    labels, shared = describe_variants({"a": decoding, "b": decoding | {"cfg_weight": 5.0}})
    assert list(labels.values()) == ["layer 6 · α 0.1 · cfg 2", "layer 6 · α 0.1 · cfg 5"] and shared == "T 1"


def test_ab_is_the_comparison_of_baseline_and_dola(tmp_path):
    for outdir, how in ((tmp_path / "ab", ["--ab"]), (tmp_path / "compare", ["--compare", "baseline", "dola"])):
        run("--prompt", "a dog", "--outdir", outdir, "--parallel_size", 1, *how)
    files = sorted(p.relative_to(tmp_path / "ab") for p in (tmp_path / "ab").rglob("*") if p.is_file())
    assert len(files) == 6
    assert all((tmp_path / "ab" / f).read_bytes() == (tmp_path / "compare" / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", ["../apc", "a/b", "", ".", "-x", "/x"])
def test_a_variants_name_that_leads_elsewhere_makes_no_folder(name):
    settings = {"variants": {"baseline": {}, name: {}}, "parallel_size": 1, "format": "jpg", "trace": True}
    assert variant_folders(settings) == []
    assert not is_run_file(settings, ["a dog"], f"{name}/0000_a_dog_p0.jpg")
    good = settings | {"variants": {"baseline": {}, "apc": {}}}
    assert is_run_file(good, ["a dog"], "apc/0000_a_dog_p0.jpg")
    assert is_run_file(good, ["a dog"], "apc/0000_a_dog_p0_trace.jsonl")
    assert not is_run_file(good | {"trace": False}, ["a dog"], "apc/0000_a_dog_p0_trace.jsonl")
    assert not is_run_file(good, ["a dog"], "apc/0000_a_cat_p0.jpg")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--compare", "layer=99"], "layer must be in 1..6, got 99"),
        (["--compare", "alpha=2"], "alpha must be in [0, 1], got 2.0"),
        (["--compare", "baseline", "cfg=-1"], "cfg_weight must be in"),
        (["--compare", "gamma=1e9"], "gamma must be in"),
        (["--compare", "baseline", "baseline"], "variant 'baseline' is given twice"),
        (["--compare", "lyaer=2"], "'lyaer' is none of"),
        (["--compare", "apc", "--ab"], "not allowed with argument"),
        (["--apc_only", "--gamma", "1"], "not allowed with argument"),
        (["--prompt", " "], "--prompt: the prompt is blank"),
        (["--prompt_jso", "x.json"], "unrecognized arguments: --prompt_jso"),
        (["--prompt", "a", "--prompt_json", "x.json"], "not allowed with argument"),
        (["--show", "none.png"], "none.png: file not found"),
        (["--again", str(GOLDEN / "sample.png")], "sample.png: holds no settings of a painted image"),
    ],
)
def test_what_cannot_be_painted_ends_in_one_line_and_writes_nothing(tmp_path, capsys, arguments, cause):
    with pytest.raises(SystemExit) as stop:
        run(*arguments, "--outdir", tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and cause in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- what DoLa did ---------------------------------------------------------------------------------------------------


def test_tracing_leaves_the_tokens_as_they_are(compared, tmp_path):
    run("--prompt", PROMPTS[0], "--compare", *SPECS, "--parallel_size", 2, "--cfg_weight", 3, "--outdir", tmp_path)
    plain, traced = lines(tmp_path / "manifest.jsonl"), lines(compared / "manifest.jsonl")[:12]
    for one, other in zip(plain, traced, strict=True):
        assert one["tokens_sha256"] == other["tokens_sha256"]
        assert one.get("argmax_changed") == other["argmax_changed"] or one["variant"] == "baseline"


def test_the_manifest_counts_what_the_trace_tells(compared):
    for entry in lines(compared / "manifest.jsonl"):
        trace = lines(compared / entry["trace"])
        assert [step["token"] for step in trace] == list(range(16))
        assert entry["argmax_changed"] == pytest.approx(np.mean([step["argmax_changed"] for step in trace]), abs=1e-4)
        drawn = np.array([step["drawn"] for step in trace])
        assert run_batch_prompts.image_hash(drawn) == entry["tokens_sha256"]
        if entry["variant"] == "baseline":
            assert not any(step["argmax_changed"] or step["draw_changed"] for step in trace)
        if entry["variant"] == "exit1-3-5":
            chosen = [step["layer"] for step in trace]
            assert entry["layers_chosen"] == {str(layer): chosen.count(layer) for layer in (1, 3, 5)}
        else:
            assert "layers_chosen" not in entry
        assert (compared / entry["where"]).is_file()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@torch.no_grad()
@pytest.mark.parametrize("order", ["guide_first", "contrast_first"])
def test_a_record_equals_a_plain_float64_reading_of_the_same_tokens(golden, order):
    """Given the tokens, every step is computed again without cache, hooks or shared code."""
    model, processor, alpha, w, temperature = golden.model, golden.processor, 0.2, 2.0, 0.8
    decoding = Decoding((2, 5), alpha, temperature=temperature, cfg_weight=w, cfg_order=order)
    record = Record(2, 16, top_k=4)
    prompt = golden.facts["sft"][0]
    (tokens,) = sample_image_tokens(model, processor, [prompt], decoding, parallel_size=2, seeds=[3], record=record)
    generator, steps = torch.Generator().manual_seed(3), record.steps()
    ids = torch.tensor([processor.tokenizer.encode(prompt)] * 4)
    ids[1::2, 1:-1] = processor.pad_id
    embeds = model.language_model.get_input_embeddings()(ids)
    terms = terms_of(model.gen_aligner, model.language_model, model.gen_head)
    for i, step in enumerate(steps):
        noise = torch.empty(2, 128).exponential_(generator=generator).double().numpy()
        hidden = model.language_model.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        norm = model.language_model.model.norm
        heads = [hidden[-1][:, -1], *(norm(hidden[j][:, -1]) for j in (2, 5))]
        logits = np.stack([model.gen_head(h).double().numpy() for h in heads])
        guided = logits[:, 1::2] + w * (logits[:, 0::2] - logits[:, 1::2])
        log_q = log_softmax(guided if order == "guide_first" else logits)
        log_m = np.logaddexp(log_q[0], log_q[1:]) - np.log(2)
        jsd = [(np.exp(x) * (x - log_m)).sum(-1) for x in (log_q[0], log_q[1:])]
        choice = (jsd[0] + jsd[1]).argmax(0)
        F = log_q[0] - np.take_along_axis(log_q[1:], choice[None, :, None], 0)[0]
        F[log_q[0] < np.log(alpha) + log_q[0].max(-1, keepdims=True)] = -np.inf
        if order == "contrast_first":
            kept = np.isfinite(F[0::2]) & np.isfinite(F[1::2])
            with np.errstate(invalid="ignore"):
                both = np.where(kept, F[1::2] + w * (F[0::2] - F[1::2]), -np.inf)
            F, choice = np.where(kept.any(-1, keepdims=True), both, F[0::2]), choice[0::2]
        p_hat, q_N = np.exp(log_softmax(F / temperature)), np.exp(log_softmax(guided[0]))
        size = (w + abs(1 - w)) * np.abs(logits).max() / temperature
        assert step["layer"] == [(2, 5)[c] for c in choice]
        assert step["argmax_changed"] == (p_hat.argmax(-1) != q_N.argmax(-1)).tolist()
        unchanged = np.exp(log_softmax(guided[0] / temperature)) / noise
        assert step["draw_changed"] == (unchanged.argmax(-1) != tokens[:, i].numpy()).tolist()
        for row in range(2):
            m = (p_hat[row] + q_N[row]) / 2
            with np.errstate(divide="ignore", invalid="ignore"):
                kl = [np.where(p > 0, p * np.log(p / m), 0).sum() for p in (p_hat[row], q_N[row])]
            assert_close(step["jsd"][row], sum(kl) / 2, terms, size)
            for name, p in (("q_N", q_N[row]), ("p_hat", p_hat[row])):
                best = np.sort(p)[::-1][:4]
                assert_close([x for _, x in step[name][row]], best, terms, size)
                assert_close([p[t] for t, _ in step[name][row]], best, terms, size)
        inputs = model.prepare_gen_img_embeds(tokens[:, i].repeat_interleave(2))
        embeds = torch.cat([embeds, inputs[:, None]], dim=1)


# --- images explain themselves ---------------------------------------------------------------------------------------


def test_an_image_tells_its_settings_and_is_painted_again_bit_for_bit(compared, tmp_path, capsys):
    for entry in (e for e in lines(compared / "manifest.jsonl") if e["image"] == 1 and e["index"] == 1):
        file = compared / entry["file"]
        capsys.readouterr()
        run("--show", file)
        shown = json.loads(capsys.readouterr().out)
        assert shown == read_settings(file) and shown["tokens_sha256"] == entry["tokens_sha256"]
        assert (shown["prompt"], shown["variant"], shown["seed"]) == (PROMPTS[1], entry["variant"], entry["seed"])
        run("--again", file, "--outdir", tmp_path / entry["variant"])
        assert "the same tokens" in capsys.readouterr().out
        assert (tmp_path / entry["variant"] / file.name).read_bytes() == file.read_bytes()


def test_in_bfloat16_an_image_is_painted_again_with_the_batch_it_came_from(tmp_path, capsys):
    words = [word for i in range(6) for word in ("--prompt", f"prompt {i} " * (1 + i % 3))]
    how = ["--dtype", "bfloat16", "--parallel_size", 3, "--batch_size", 6, "--outdir", tmp_path / "out"]
    run(*words, *how)
    entries = lines(tmp_path / "out" / "manifest.jsonl")
    for entry in entries[7::4]:
        run("--again", tmp_path / "out" / entry["file"], "--outdir", tmp_path / "again")
    assert capsys.readouterr().out.count("the same tokens") == len(entries[7::4])


def test_painting_again_never_overwrites(compared, capsys):
    file = compared / lines(compared / "manifest.jsonl")[0]["file"]
    before = file.read_bytes()
    with pytest.raises(SystemExit) as stop:
        run("--again", file, "--outdir", file.parent)
    assert stop.value.code == 2 and "exists: choose another --outdir" in capsys.readouterr().err
    assert file.read_bytes() == before


# --- the best of several ---------------------------------------------------------------------------------------------


def brightness(images, prompts) -> list[float]:
    return [float(np.asarray(image, dtype=float).mean()) for image in images]


SCORER = ("--scorer", f"{__name__}:brightness")


def paint_best(outdir: Path, *options: object) -> list[dict]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    run(*prompts, "--ab", "--cfg-weight", 3, "--format", "png", "--outdir", outdir, *options)
    return lines(outdir / "manifest.jsonl")


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """Four images of each prompt and variant, none of them chosen."""
    outdir = tmp_path_factory.mktemp("four")
    paint_best(outdir, "--parallel_size", 4)
    return outdir


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    outdir = tmp_path_factory.mktemp("best")
    paint_best(outdir, "--best_of", 4, *SCORER)
    return outdir


def test_best_of_keeps_the_image_that_scores_highest_and_tells_all_scores(four, best):
    of_all, entries = lines(four / "manifest.jsonl"), lines(best / "manifest.jsonl")
    assert [e["tokens_sha256"] for e in entries] == [e["tokens_sha256"] for e in of_all]
    for start in range(0, len(entries), 4):
        samples = entries[start : start + 4]
        pictures = [Image.open(four / e["file"]) for e in of_all[start : start + 4]]
        assert [e["score"] for e in samples] == pytest.approx(brightness(pictures, None), rel=5e-6)
        chosen = max(range(4), key=lambda i: samples[i]["score"])
        assert [e["best"] for e in samples] == [i == chosen for i in range(4)]
        assert ["file" in e for e in samples] == [i == chosen for i in range(4)]
        kept = Image.open(best / samples[chosen]["file"])
        assert (np.asarray(kept) == np.asarray(pictures[chosen])).all()
    files = {str(p.relative_to(best)) for p in best.glob("*/*.png")}
    assert files == {e["file"] for e in entries if e["best"]}
    assert Image.open(best / entries[0]["sheet"]).width < Image.open(four / of_all[0]["sheet"]).width


def test_keep_all_keeps_the_others_and_marks_the_best_on_the_sheets(four, best, tmp_path):
    entries = paint_best(tmp_path, "--best_of", 4, *SCORER, "--keep_all")
    assert [e["score"] for e in entries] == [e["score"] for e in lines(best / "manifest.jsonl")]
    assert all((tmp_path / e["file"]).is_file() for e in entries)
    framed, plain = (np.asarray(Image.open(folder / entries[0]["sheet"])) for folder in (tmp_path, four))
    green = (framed == (50, 205, 50)).all(-1)
    assert framed.shape == plain.shape and green.any() and not (plain == (50, 205, 50)).all(-1).any()


def test_best_of_resumes_and_repairs_to_the_same_bytes(best, tmp_path, monkeypatch, capsys):
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def dies(*_):
        raise KeyboardInterrupt

    options = ["--best_of", 4, *SCORER, "--batch_size", 4]
    paint_best(tmp_path / "whole", *options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(painting.PaintingRun, "write_sheets", dies)
        paint_best(tmp_path / "parts", *options)
    entries = paint_best(tmp_path / "parts", *options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    kept = [e for e in entries if e["best"]]
    (tmp_path / "parts" / kept[1]["file"]).unlink()
    paint_best(tmp_path / "parts", *options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")

    log = tmp_path / "parts" / "manifest.jsonl"
    log.write_text(log.read_text().replace('"best": false', '"best": true', 1))
    with pytest.raises(SystemExit) as stopped:
        paint_best(tmp_path / "parts", *options)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and str(log) in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorer", "vqa"], "--scorer needs --best_of"),
        (["--keep_all"], "--keep_all needs --best_of"),
        (["--best_of", 2, "--parallel_size", 2], "not allowed with"),
        (["--best_of", 2, "--scorer", "nobody"], "expected caption, vqa, tower, or module:function"),
        (["--best_of", 2, "--scorer", "tower"], "has no siglip/ text encoder"),
        (["--best_of", 2, "--scorer", f"{__name__}:lines"], f"scorer '{__name__}:lines'"),
    ],
)
def test_what_best_of_cannot_do_is_one_line(tmp_path, capsys, options, message):
    with pytest.raises((SystemExit, TypeError)) as stopped:
        paint_best(tmp_path, *options)
    assert getattr(stopped.value, "code", 2) == 2 and message in capsys.readouterr().err.splitlines()[-1]
