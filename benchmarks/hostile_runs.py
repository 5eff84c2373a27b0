"""Hostile prompts, flags, logs and images, generated from a seed: a run must come out right or end in one line.

python -m benchmarks.hostile_runs [--cases 1000] [--seed 0]

A case takes a directory in which a run of `run_batch_prompts.py` has finished, stopped half-way or not begun, changes
one to three things in it, in the prompts or in the flags, and runs the command there in a process of its own. Good are
exit code 0 with the right images (those of an undisturbed run where prompts and flags are its own, else images that
open and whose manifest fits) and one line with exit code 2; and in both cases no other file may have changed. Anything
else is printed. POSIX only, for it forks.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from tqdm import tqdm

import run_batch_prompts
from janus.dola.cli import CommandParser, positive, run_command

TINY = Path(__file__).parents[1] / "tests" / "goldens" / "janus-upstream-tiny"
PROMPTS = ["a red circle", "画一只在草地上的狗。", "a dog", "CON", "a dog"]
BASE = ["--model", str(TINY), "--prompt_json", "prompt.json", "--outdir", "out"]
RUNS = {
    "plain": ["--parallel_size", "2", "--batch_size", "4"],
    "png": ["--parallel_size", "1", "--batch_size", "2", "--format", "png", "--no_dola", "--dtype", "bfloat16"],
    "ab": ["--parallel_size", "1", "--batch_size", "3", "--ab"],
}
STRANGERS = {"notes.txt": "mine", "holiday.jpg": "mine", "deep/x.janus-tmp": "mine", "../precious.jpg": "precious"}
SECONDS, MEMORY = 60, 6 << 30
"""What a case may take before it counts as hanging, or as out of memory."""

# --- what is changed -------------------------------------------------------------------------------------------------

VALUES = [None, True, False, "", " ", "x", "\ud800", "../precious.jpg", "/etc/passwd", "a\0b", [], {}, [None], {"": 0}]
VALUES += [0, -1, 1, 2, 3, 0.5, -0.0, 1e-320, 1e39, 2**31, 2**63, 10**12, 10**400, [[0, 1]], [[0, 10**30], [2, 1]]]
RAW = ["NaN", "-Infinity", "1e999", "[" * 200_000, '{"a":' * 900 + "1" + "}" * 900, "1" * 5000, "'x'", ""]
TEXTS = [
    "",
    " \n",
    "\0",
    "../../x",
    "~",
    "x" * 1000,
    "狗" * 300,
    "e\u0301",
    "\u202e\u2028",
    "😀",
    "<image_placeholder>",
]
TEXTS += ["<begin_of_image>", "<|User|>: hi", "NUL.txt", "a/b\\c", ".", "-", "\x1b[31m", "%s{0}", "\ud83d", "a dog"]
NUMBERS = ["nan", "inf", "-inf", "1e39", "1e-320", "1e6", "-1", "0", "-0.0", "", "x", "0x1", "1_0", "٣", "²", "9" * 30]
NUMBERS += ["9" * 5000, "1", "2", "0.5", "1.0", "1e400", "  1", "1;2"]
FLAGS = {
    "--parallel_size": [*NUMBERS, "1000000000000"],
    "--batch_size": [*NUMBERS, "1000000000000"],
    "--max_prompts": NUMBERS,
    "--seed": NUMBERS,
    "--cfg_weight": NUMBERS,
    "--temperature": NUMBERS,
    "--alpha": NUMBERS,
    "--gamma": NUMBERS,
    "--layer": [*NUMBERS, "6", "7"],
    "--layer_ratio": NUMBERS,
    "--candidate_layers": [*NUMBERS, "1,2", "2,,4", ",", "2,2", "1,x", "99", "-1,3"],
    "--cfg_order": ["guide_first", "contrast_first", "x", ""],
    "--format": ["png", "jpg", "gif", "../x"],
    "--dtype": ["float16", "bfloat16", "float64", "x", "", "torch.float32"],
    "--quantize": ["int8", "int4", "int2", ""],
    "--device": ["cuda", "cuda:99", "cpu:1", "mps", "xla", "meta", "x", "", "cuda:-1"],
    "--model": ["", ".", "out", "prompt.json", "/dev/null", "no/such/model", "x" * 300, "a\nb", "caf\udce9", "../.."],
    "--outdir": [
        "",
        ".",
        "prompt.json",
        "prompt.json/x",
        "/dev/null",
        "x" * 300,
        "/proc/1/x",
        "new/er",
        "caf\udce9",
        "out/",
    ],
    "--prompt_json": ["", ".", "/dev/null", "none", "out/manifest.jsonl", "out/run.json", "x" * 5000, "caf\udce9"],
    "--config": ["prompt.json", "none", "out/run.json", "/dev/zero", "switches.json"],
    "--domain": ["x", ""],
    "--best_of": NUMBERS,
    "--scorer": ["caption", "tower", "caption,layer=2", "vqa,layer=99", "os:getcwd", "os:x", "x:y", "a b:c", ":", ""],
    "--layout": ["geneval", "geneval2", "dpg", "t2i_compbench", "x"],
    "--window": NUMBERS,
    "--shard": ["0/1", "1/1", "auto", "x", "", "-1/2"],
    "--keep_all": [None],
    "--ab": [None],
    "--no_dola": [None],
    "--overwrite": [None],
    "--unknown": [None],
}
SWITCHES = {"alpha_gen": 0.2, "fixed_layer_gen": 3, "use_dola_lm_static": True, "domains": {"x": {"alpha_gen": 0.3}}}


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    length = rng.choice([1, 2, 20, 200])
    kind = rng.randrange(4)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[start + length :]
    if kind == 2:
        return content[:start] + rng.randbytes(length) + content[start:]
    return content[:start] + content[start : start + length] + content[start:]


def change_value(content: Any, rng: random.Random) -> str:
    """JSON with one value, anywhere in it, dropped or replaced."""
    holder: Any = {"": content}
    parent, key = holder, ""
    while isinstance(parent[key], dict | list) and parent[key] and (key == "" or rng.random() < 0.8):
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    kind, mark = rng.random(), "\0here\0"
    if kind < 0.15 and key != "":
        del parent[key]
        return json.dumps(holder[""])
    old, parent[key] = parent[key], mark
    texts = TEXTS if isinstance(old, str) and rng.random() < 0.5 else VALUES
    raw = rng.choice(RAW) if kind < 0.3 else json.dumps(rng.choice([*texts, [old], str(old)]))
    return json.dumps(holder[""]).replace(json.dumps(mark), raw)


def replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in a file's place: (what)."""
    kind = rng.choice(["gone", "empty", "directory", "pipe", "link out", "dangling link", "device", "garbage"])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind.endswith(("link", "link out")):
        path.symlink_to("nowhere" if kind == "dangling link" else path.absolute().parents[-2] / "nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "gone":
        path.write_bytes(rng.randbytes(300) if kind == "garbage" else b"")
    return kind


def change_log(path: Path, rng: random.Random) -> str:
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if not lines:
        return replace_file(path, rng)
    i, kind = rng.randrange(len(lines)), rng.choice(["drop", "twice", "swap", "torn", "value", "value", "value"])
    if kind == "drop":
        del lines[i]
    elif kind == "twice":
        lines.insert(i, lines[i])
    elif kind == "swap":
        lines[i], lines[0] = lines[0], lines[i]
    elif kind == "torn":
        lines[i:] = [lines[i][: rng.randrange(len(lines[i]))]]
    else:
        try:
            lines[i] = change_value(json.loads(lines[i]), rng).encode() + b"\n"
        except ValueError:
            return "unchanged"
    path.write_bytes(b"".join(lines))
    return f"line {i} {kind}"


def spoil(flags: list[str], rng: random.Random) -> tuple[str, str]:
    """Change one thing in the current directory or the flags: (family, what)."""
    family = rng.choice(
        ["prompts", "prompts", "flags", "flags", "log", "log", "run.json", "run.json", "image", "config"]
    )
    if family == "flags":
        flag = rng.choice(sorted(FLAGS))
        value = rng.choice(FLAGS[flag])
        flags += [flag] if value is None else [flag, value]
        return family, f"{flag} {value!r:.60}"
    if family == "image":
        files = sorted(p for p in Path("out").glob("**/*") if p.suffix in (".jpg", ".png") and p.name != "holiday.jpg")
        path = rng.choice(files or [Path("out/0002_a_dog_p0.jpg")])
        if path.is_file() and rng.random() < 0.5:
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])
            return family, f"{path} cut"
        return family, f"{path} {replace_file(path, rng)}"
    if family == "config":
        Path("switches.json").write_text(change_value(SWITCHES, rng))
        flags += ["--config", "switches.json", *rng.choice([[], ["--domain", "x"]])]
        return family, "value"
    path = Path({"prompts": "prompt.json", "log": "out/manifest.jsonl", "run.json": "out/run.json"}[family])
    kind = rng.choice(["bytes", "value", "value", "file"])
    if kind == "file" or not path.is_file():
        return family, replace_file(path, rng)
    if kind == "bytes":
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return family, kind
    if family == "log":
        return family, change_log(path, rng)
    try:
        path.write_text(change_value(json.loads(path.read_bytes()), rng))
    except (ValueError, RecursionError):
        return family, "unchanged"
    return family, kind


# --- a case ----------------------------------------------------------------------------------------------------------


def start(flags: list[str], output: Path) -> int:
    """The command in a process of its own, its terminal in a file; returns the status that it ended with."""
    pid = os.fork()
    if pid == 0:
        run(flags, output)
    return os.waitpid(pid, 0)[1]


def run(flags: list[str], output: Path) -> NoReturn:
    code = 1
    try:
        signal.alarm(SECONDS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.argv = ["run_batch_prompts.py", *BASE, *flags]
        run_command(run_batch_prompts.main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        os._exit(code)


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def comparable(files: dict[str, bytes]) -> dict[str, Any]:
    """Files but for spaces in run.json, and for hashes in the manifest, which only painting again could check."""
    run, log = files.get("run.json", b"0"), files.get("manifest.jsonl", b"")
    return files | {"run.json": json.loads(run), "manifest.jsonl": re.sub(rb"[0-9a-f]{64}", b"", log)}


def what_is_wrong(expected: dict[str, bytes] | None) -> str:
    """What is wrong in the output directory of a run that ended well, whose files should be these."""
    outdir = Path("out")
    if expected is not None:
        there, expected = comparable(contents(outdir)), comparable(expected)
        wrong = [name for name in expected if there.get(name) != expected[name]]
        linked = [name for name in wrong if (outdir / name).is_symlink()]
        return f"{wrong[0]} is not as it should be" if wrong and wrong != linked else ""
    lines = [json.loads(line) for line in (outdir / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    record = json.loads((outdir / "run.json").read_text(encoding="utf-8"))
    per_prompt = record["settings"]["parallel_size"] * len(record["settings"]["variants"])
    if [line["prompt"] for line in lines] != [prompt for prompt in record["inputs"] for _ in range(per_prompt)]:
        return "the manifest does not fit the prompts"
    for line in lines:
        for key in {"file", "sheet"} & line.keys():
            Image.open(outdir / line[key]).load()
    return ""


def outcome_of(status: int, terminal: str, expected: dict[str, bytes] | None, ran_elsewhere: bool) -> str:
    """ "right", "one line", or what else a run ended in."""
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) == signal.SIGALRM else f"killed by signal {os.WTERMSIG(status)}"
    said = [line for line in re.split("[\r\n]+", terminal) if line and "%|" not in line]  # but for progress bars
    if any((Path("out") / name).read_text() != content for name, content in STRANGERS.items()):
        return "a stranger's file changed"
    if os.WEXITSTATUS(status) == 2:
        return "one line" if len(said) == 1 and said[0].startswith("error: ") else "not one line"
    if os.WEXITSTATUS(status) != 0 or said:
        return f"exit code {os.WEXITSTATUS(status)}"
    try:
        return ("" if ran_elsewhere else what_is_wrong(expected)) or "right"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    parser = CommandParser(description="Run generated hostile cases of run_batch_prompts.py.")
    parser.add_argument("--cases", type=positive, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    parser.add_argument("--only", type=int, help="this case alone, with its terminal (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        finished: dict[str, dict[str, bytes]] = {}
        for name, flags in RUNS.items():
            (root / name).mkdir()
            os.chdir(root / name)
            Path("prompt.json").write_text(json.dumps({"prompts": PROMPTS}))
            if start(flags, root / "terminal") != 0:
                raise RuntimeError((root / "terminal").read_text())
            finished[name] = contents(Path("out"))
            for stranger, content in STRANGERS.items():
                (Path("out") / stranger).parent.mkdir(exist_ok=True)
                (Path("out") / stranger).write_text(content)
        for number in tqdm(range(args.cases) if args.only is None else [args.only], unit="case"):
            rng = random.Random(f"{args.seed} {number}")
            name = rng.choice(sorted(RUNS))
            shutil.rmtree(root / "case", ignore_errors=True)
            shutil.copytree(root / name, root / "case")
            os.chdir(root / "case")
            state = rng.choice(["finished", "half-way", "not begun"])
            if state != "finished":
                lines = finished[name]["manifest.jsonl"].splitlines(keepends=True)
                kept = rng.randrange(1, len(lines)) if state == "half-way" else 0
                names = {json.loads(line)["file"] for line in lines[:kept]}
                for file in finished[name].keys() - names - {"run.json"} if kept else finished[name]:
                    (Path("out") / file).unlink()
                if kept:
                    Path("out/manifest.jsonl").write_bytes(b"".join(lines[:kept]))
            flags = [*RUNS[name], *rng.choice([[], [], ["--overwrite"]])]
            done = [spoil(flags, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
            own = flags in (RUNS[name], [*RUNS[name], "--overwrite"]) and not {"prompts"} & {
                family for family, _ in done
            }
            status = start(flags, root / "terminal")
            terminal = (root / "terminal").read_text(errors="replace")
            outcome = outcome_of(status, terminal, finished[name] if own else None, "--outdir" in flags)
            outcomes[done[0][0] if len(done) == 1 else "several", outcome] += 1
            if outcome not in ("right", "one line") or args.only is not None:
                what = "; ".join(f"{family}: {how}" for family, how in done)
                tqdm.write(f"case {number}: {name}, {state}, {what}\n  {outcome}: {terminal[-1500:].strip()}")
        os.chdir("/")
    for family in sorted({family for family, _ in outcomes}):
        counts = {outcome: count for (of, outcome), count in sorted(outcomes.items()) if of == family}
        print(f"{family:>10}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    good = sum(count for (_, outcome), count in outcomes.items() if outcome in ("right", "one line"))
    print(f"{sum(outcomes.values())} cases, {sum(outcomes.values()) - good} ended otherwise than right or in one line")


if __name__ == "__main__":
    run_command(main)
