"""Broken checkpoints, generated from a seed: each must load and work, or end in one line and exit code 2.

python -m benchmarks.hostile_checkpoints [--cases 1200] [--seed 0]

A case copies a small checkpoint, changes one thing in one of its files, and in a process of its own loads it and uses
it (an image, a token of an answer; for a text encoder a bank of texts). Anything else than the two good ends is
printed: a traceback, a second line on the terminal, a number that is not finite, a killed or a hanging process, and
code of the checkpoint that ran. POSIX only, for it forks.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import SiglipConfig, SiglipModel

from benchmarks.decode_speed import as_transformers
from generation_inference import format_image_prompt, generate_with_dola_static
from inference import format_question
from janus.dola.checkpoint_files import CheckpointError
from janus.dola.cli import CommandParser, positive, run_command
from janus.dola.loading import load_pretrained_model
from janus.dola.rerank import build_text_bank, siglip_temperature
from janus.dola.text_encoder import load_text_encoder

TINY = Path(__file__).parents[1] / "tests" / "goldens" / "janus-upstream-tiny"
SECONDS, MEMORY = 60, 6 << 30
"""What a case may take before it counts as hanging, or as out of memory."""

# --- the checkpoints -------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    directory: Path
    use: Callable[[Path, random.Random], None]


def make_subjects(root: Path) -> dict[str, Subject]:
    """Both formats, whole and in shards, safetensors and pickled, and a SigLIP: a few megabytes each."""
    torch.manual_seed(0)
    names = [f"{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map", "processor_config")]
    for name in ("original", "pickled", "transformers", "siglip"):
        (root / name).mkdir()
        for file in [*names, "preprocessor_config.json", "config.json"]:
            shutil.copy(TINY / file, root / name)
        (root / name / "generation_config.json").write_text('{"guidance_scale": 2.0, "eos_token_id": 1}')

    shutil.copy(TINY / "model.safetensors", root / "original")

    weights = load_file(TINY / "model.safetensors")
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(weights))}
    for shard in set(weight_map.values()):
        torch.save({name: weights[name] for name in weights if weight_map[name] == shard}, root / "pickled" / shard)
    (root / "pickled" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    _, processor, model = load_pretrained_model(TINY, "float32", "cpu")
    as_transformers(model, processor).save_pretrained(root / "transformers", max_shard_size="2MB")
    image_processor = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings = {"num_image_tokens": processor.num_image_tokens, "image_processor": image_processor}
    (root / "transformers" / "processor_config.json").write_text(json.dumps(settings))
    (root / "transformers" / "preprocessor_config.json").unlink()

    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {"vocab_size": 384, "max_position_embeddings": 16, "projection_size": 32}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 362}
    vision = {"image_size": 32, "patch_size": 8}
    config = SiglipConfig(text_config=width | text | ids, vision_config=width | vision)
    SiglipModel(config).save_pretrained(root / "siglip")
    for name in ("processor_config", "preprocessor_config", "generation_config", "special_tokens_map"):
        (root / "siglip" / f"{name}.json").unlink()
    return {
        name: Subject(root / name, use_text_encoder if name == "siglip" else use_janus)
        for name in ("original", "pickled", "transformers", "siglip")
    }


def check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise RuntimeError(f"garbage: {name} is not finite")


@torch.inference_mode()
def use_janus(directory: Path, rng: random.Random) -> None:
    """An image of one prompt and the logits of an answer's first token."""
    dtype = rng.choice(["float32", "float32", "bfloat16"])
    _, processor, model = load_pretrained_model(directory, dtype, "cpu")
    prompt = format_image_prompt(processor, "a red circle")
    images, tokens = generate_with_dola_static(model, processor, prompt, parallel_size=1, seed=0, return_tokens=True)
    side, codes = processor.image_processor.image_size, model.gen_embed.num_embeddings
    if images[0].size != (side, side) or not 0 <= tokens.min() <= tokens.max() < codes:
        raise RuntimeError(
            f"garbage: an image of {images[0].size}, tokens of {codes} in {tokens.min()}..{tokens.max()}"
        )
    shape = [1, model.gen_embed.embedding_dim, *[int(tokens.shape[1] ** 0.5)] * 2]
    check_finite("an image", model.gen_vision_model.decode_code(tokens, shape=shape))
    question = format_question(processor, "What is in this image?")
    batch = processor(prompt=question, images=[Image.open(TINY / "sample.png")]).to("cpu", model.dtype)
    embeds = model.prepare_inputs_embeds(**vars(batch))
    check_finite("an answer", model.language_model(inputs_embeds=embeds, attention_mask=batch.attention_mask).logits)


@torch.inference_mode()
def use_text_encoder(directory: Path, rng: random.Random) -> None:
    """Two texts' embeddings, and the temperature."""
    siglip, tokenizer = load_text_encoder(directory)
    check_finite("a text", build_text_bank(siglip, tokenizer, ["a red circle", "a blue star"]))
    check_finite("the temperature", torch.tensor(siglip_temperature(siglip)))


# --- what is done to them --------------------------------------------------------------------------------------------

SCALARS = [None, True, False, "", "x", "\ud800", "../config.json", "/etc/passwd", [], {}, [None], {"": None}]
NUMBERS = [0, -1, 1, 2, 3, 7, 63, 65, 0.5, -0.0, 1e-320, 1e39, -1e300, 2**31, 2**32 - 1, 2**63, 10**12, 10**400]
RAW = ["NaN", "Infinity", "-Infinity", "[" * 200_000, '{"a":' * 2_000 + "1" + "}" * 2_000, "1" * 5_000]


def change_json(path: Path, rng: random.Random) -> str:
    """Change one value or some bytes of a JSON file; returns what was done."""
    text = path.read_text(encoding="utf-8")
    kind = rng.choice(["value"] * 16 + ["drop"] * 4 + ["bytes"] * 4 + ["file"])
    if kind == "bytes":
        return change_bytes(path, rng, range(len(text.encode())))
    if kind == "file":
        return replace_file(path, rng)
    content = json.loads(text)
    parent: Any = {"": content}
    key: Any = ""
    where = ""
    while isinstance(parent[key], dict | list) and parent[key] and (key == "" or rng.random() < 0.9):
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        where += f".{key}"
    if kind == "drop" and key != "":
        del parent[key]
        path.write_text(json.dumps(content))
        return f"{where} dropped"
    value, mark = parent[key], "\0here\0"
    if rng.random() < 0.15:
        raw = rng.choice(RAW)
    else:
        near = [value + 1, value - 1, value * 2, value // 2, -value, value + 0.5] if type(value) is int else []
        raw = json.dumps(rng.choice([*SCALARS, *NUMBERS, *near, *near, str(value), [value]]))
    parent[key] = mark
    text = json.dumps(content if key != "" else mark)
    path.write_text(text.replace(json.dumps(mark), raw))
    return f"{where} = {raw[:40]}"


def change_bytes(path: Path, rng: random.Random, where: range) -> str:
    """Cut off, repeat, or flip bytes of a file within `where`."""
    content, kind = bytearray(path.read_bytes()), rng.choice(["cut", "repeat", "flip", "flip"])
    start = rng.choice(where) if where else 0
    if kind == "cut":
        del content[start:]
    elif kind == "repeat":
        part = content[start : start + rng.choice([1, 2, 50, 1000])]
        content[start:start] = part
    elif content:
        content[start] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{kind} at byte {start}"


def replace_file(path: Path, rng: random.Random) -> str:
    kind = rng.choice(["missing", "directory", "pipe", "empty", "not UTF-8", "a list", "a dangling link"])
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    elif kind != "missing":
        path.write_bytes({"empty": b"", "not UTF-8": b'{"a": "\xff"}', "a list": b"[1, 2]"}[kind])
    return kind


class Mark:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def change_weights(path: Path, rng: random.Random) -> str:
    """Change a file of weights; returns what was done."""
    pickled = path.suffix == ".bin"
    kind = rng.choice(["header"] * 3 + ["cut", "repeat", "file", "shard"] + ["tensor"] * 6 + ["pickle"] * pickled)
    content = path.read_bytes()
    if kind == "header":
        return change_bytes(path, rng, rng.choice(headers(path)))
    if kind in ("cut", "repeat"):
        start, end = rng.randrange(len(content)), len(content)
        path.write_bytes(content[:start] if kind == "cut" else content + content[start:end])
        return f"{kind} at byte {start}"
    if kind == "file":
        return replace_file(path, rng)
    if kind == "shard":
        index = next(path.parent.glob("*.index.json"), None)
        if index is None:
            (path.parent / "pytorch_model.bin").write_bytes(content)
            return "beside a .bin that is none"
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map |= {"copy": f"copy{path.suffix}"}
        shutil.copy(path, path.parent / f"copy{path.suffix}")
        index.write_text(json.dumps({"weight_map": weight_map}))
        return "a shard twice"
    if kind == "pickle":
        return change_archive(path, rng)
    weights = torch.load(path, weights_only=True) if pickled else load_file(path)
    name = rng.choice(sorted(weights))
    what = change_tensor(weights, name, rng)
    if pickled:
        torch.save(weights, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return f"{name} {what}"


def headers(path: Path) -> list[range]:
    """Where a weight file says what it holds, as opposed to the numbers themselves."""
    if path.suffix == ".safetensors":
        length = int.from_bytes(path.read_bytes()[:8], "little")
        return [range(8), range(8, 8 + length)]
    with zipfile.ZipFile(path) as file:
        pickled = next(entry for entry in file.infolist() if entry.filename.endswith("data.pkl"))
        start = pickled.header_offset
        return [
            range(start, start + 64),
            range(start, start + pickled.file_size),
            range(file.start_dir, path.stat().st_size),
        ]


def change_archive(path: Path, rng: random.Random) -> str:
    kind = rng.choice(["compressed", "code in it", "old format", "a number for a tensor", "a list", "expanded"])
    weights: Any = torch.load(path, weights_only=True)
    if kind == "compressed":
        with zipfile.ZipFile(path) as file:
            entries = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, entry in entries.items():
                file.writestr(name, entry)
        return kind
    if kind == "code in it":
        weights["mark"] = Mark(path.with_name("mark"))
    elif kind == "a number for a tensor":
        weights[next(iter(weights))] = 3.0
    elif kind == "a list":
        weights = list(weights)
    elif kind == "expanded":
        name = max(weights, key=lambda name: weights[name].numel())
        weights[name] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(weights, path, _use_new_zipfile_serialization=kind != "old format")
    return kind


def change_tensor(weights: dict[str, Any], name: str, rng: random.Random) -> str:
    tensor = weights[name]
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8]
    kind = rng.choice(["dropped", "renamed", "added", "dtype", "dtype", "nan", "inf", "huge", "reshaped", "cut"])
    if kind == "dropped":
        del weights[name]
    elif kind == "renamed":
        weights[name[:-1]] = weights.pop(name)
    elif kind == "added":
        weights["x"] = tensor.clone()
    elif kind == "dtype":
        dtype = rng.choice(dtypes)
        weights[name] = tensor.to(dtype)
        return f"as {dtype}"
    elif kind == "reshaped":
        weights[name] = rng.choice(
            [tensor.flatten(), tensor[None], tensor.T if tensor.ndim == 2 else tensor[..., None]]
        )
    elif kind == "cut":
        weights[name] = tensor.flatten()[: rng.randrange(1 + tensor.numel())]
    else:
        value = {"nan": float("nan"), "inf": rng.choice([-1, 1]) * float("inf"), "huge": 1e300}[kind]
        tensor = tensor.to(torch.float64) if kind == "huge" else tensor.to(torch.float32)
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
        weights[name] = tensor
    return kind


def add_code(directory: Path) -> str:
    """A module of the checkpoint's own that leaves a mark, named wherever transformers would look for one."""
    source = f"open({str(directory / 'mark')!r}, 'w')\nclass Code:\n    pass\n"
    (directory / "code.py").write_text(source)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    for path in directory.glob("*config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["auto_map"] = {name: "code.Code" for name in names} | {"AutoTokenizer": ["code.Code", "code.Code"]}
        path.write_text(json.dumps(content))
    return "code named in every auto_map"


def spoil(directory: Path, rng: random.Random) -> tuple[str, str]:
    """Change one thing in the directory: (family, what was done)."""
    if rng.random() < 0.02:
        return "code", add_code(directory)
    weights = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin"))
    if rng.random() < 0.35:
        path = rng.choice(weights)
        return f"weights {path.suffix}", f"{path.name}: {change_weights(path, rng)}"
    path = rng.choice(sorted(directory.glob("*.json")))
    return path.name, f"{path.name}: {change_json(path, rng)}"


# --- cases -----------------------------------------------------------------------------------------------------------


def run_use(subject: Subject, directory: Path, rng: random.Random) -> None:
    try:
        subject.use(directory, rng)
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:  # which a command would show as one line too, but not of the checkpoint
        raise RuntimeError(f"{type(error).__name__} past loading: {error}") from error


def child(subject: Subject, directory: Path, output: Path, rng: random.Random) -> NoReturn:
    """The case itself, under a command's rules, its terminal in a file. Does not return."""
    signal.alarm(SECONDS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if os.path.exists("/proc") else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    terminal = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", buffering=1, closefd=False),
        os.fdopen(2, "w", buffering=1, closefd=False),
    )
    code = 1
    try:
        run_command(lambda: run_use(subject, directory, rng))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def run_case(subjects: dict[str, Subject], seed: int, number: int, root: Path) -> tuple[str, str, str, str]:
    """(family, what was done, outcome, the terminal): the outcome is "works", "one line", or what else it was."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(sorted(subjects))
    directory, output = root / "case", root / "output"
    shutil.copytree(subjects[name].directory, directory)
    family, what = spoil(directory, rng)
    output.write_text("")
    pid = os.fork()
    if pid == 0:
        child(subjects[name], directory, output, rng)
    status = os.waitpid(pid, 0)[1]
    terminal = output.read_text(errors="replace")
    marked = (directory / "mark").exists()
    shutil.rmtree(directory)
    if marked:
        outcome = "code ran"
    elif os.WIFSIGNALED(status):
        outcome = "hangs" if os.WTERMSIG(status) == signal.SIGALRM else f"killed by signal {os.WTERMSIG(status)}"
    elif os.WEXITSTATUS(status) == 2 and terminal.startswith("error: ") and terminal.count("\n") == 1:
        outcome = "one line"
    elif os.WEXITSTATUS(status) == 0:
        outcome = "works" if not terminal else "works, but prints"
    else:
        outcome = f"exit {os.WEXITSTATUS(status)}"
    return family, f"{name}/{what}", outcome, terminal


def main() -> None:
    parser = CommandParser(description="Load and use generated broken checkpoints.")
    parser.add_argument("--cases", type=positive, default=1200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[tuple[str, str]] = Counter()
    offenders = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        subjects = make_subjects(root)
        for subject in subjects.values():
            subject.use(subject.directory, random.Random(0))
        for number in tqdm(range(args.cases), desc="cases", unit="case"):
            family, what, outcome, terminal = run_case(subjects, args.seed, number, root)
            outcomes[family, outcome] += 1
            if outcome not in ("works", "one line"):
                offenders += 1
                tqdm.write(
                    f"case {number}: {what}\n  {outcome}: {' / '.join(terminal.strip().splitlines()[-3:])[:500]}"
                )
    for family in sorted({family for family, _ in outcomes}):
        counts = {outcome: n for (f, outcome), n in sorted(outcomes.items()) if f == family}
        print(f"{family:32} {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}")
    total = Counter(outcome for _, outcome in outcomes.elements())
    print(
        f"{args.cases} cases: {total['works']} work, {total['one line']} end in one line, {offenders} in anything else"
    )
    raise SystemExit(1 if offenders else 0)


if __name__ == "__main__":
    run_command(main)
