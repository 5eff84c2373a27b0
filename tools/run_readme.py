"""Runs the commands of README.md and README.zh-CN.md: `python -m tools.run_readme`.

Each fenced bash command and Python block runs once, in the order of the text, from the root of a fresh copy of the
checkout and without the model hub. Not run is what a comment `# needs ...` marks, behind a command or on a line of its
own for the rest of its block, and what `.ci/run` has done before: `pip install` and the tests. The page must answer
HTTP, and stays up for what follows. Ends at the first failure, with its output and exit code 1.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"(?<!\S)# (needs .+)")
DONE_BEFORE = re.compile(r"\bpip install\b|^python -m pytest\b")
PAGE = "python demo/app.py"
PAGE_SECONDS = 120
"""How long a page may take to answer."""


class Command(NamedTuple):
    """A bash command on one line, or a Python block; `skipped` says why it is not run."""

    language: str
    text: str
    skipped: str | None = None


def read_commands(texts: Sequence[str]) -> list[Command]:
    """The commands of Markdown texts; a block that stands in several counts once."""
    blocks = dict.fromkeys(block for text in texts for block in BLOCK.findall(text))
    return [command for language, block in blocks for command in split_block(language, block)]


def split_block(language: str, block: str) -> Iterator[Command]:
    if language == "python":
        mark = MARK.search(block)
        yield Command(language, block, mark and mark[1])
        return
    marked = None
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        mark = MARK.search(line)
        if line.startswith("#"):
            marked = mark[1] if mark else marked
        elif line.strip():
            code = re.sub(r"\s+# .*", "", line)
            before = "done before, by .ci/run" if DONE_BEFORE.search(code) else None
            yield Command(language, code, marked or (mark and mark[1]) or before)


def copy_checkout(folder: Path) -> None:
    """The files that git knows or would add, as they are on the disk."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def words_of(command: Command) -> list[str]:
    if command.language == "python":
        return [sys.executable, "-c", command.text]
    return ["bash", "-euo", "pipefail", "-c", command.text]


def run(command: Command, folder: Path) -> str | None:
    """Run to the end; the output of a failure, else None."""
    done = subprocess.run(
        words_of(command), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return f"{done.stdout}exit code {done.returncode}" if done.returncode else None


def serve(command: Command, folder: Path, until: ExitStack) -> str | None:
    """Start a page, to be stopped when `until` closes; its output if it does not answer, else None."""
    log = folder / "page.log"
    with log.open("w") as out:
        page = subprocess.Popen(
            ["bash", "-c", f"exec {command.text}"], cwd=folder, env=environment(), stdout=out, stderr=out
        )
    until.callback(page.wait)
    until.callback(page.terminate)
    end = time.monotonic() + PAGE_SECONDS
    while page.poll() is None and time.monotonic() < end:
        if address := re.search(r"http://\S+", log.read_text()):
            with urlopen(address[0], timeout=PAGE_SECONDS) as answer:
                return None if answer.status == 200 else f"{address[0]}: HTTP {answer.status}"
        time.sleep(0.2)
    return f"{log.read_text()}no answer"


def environment() -> dict[str, str]:
    """This interpreter as `python`, and no hub."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}


def run_all(commands: Sequence[Command], folder: Path) -> int:
    """Run commands in order, each with its seconds and outcome; the exit code."""
    with ExitStack() as until:
        for command in commands:
            print(f"$ {command.text}" if command.language == "bash" else command.text.rstrip(), flush=True)
            if command.skipped:
                print(f"  skipped: {command.skipped}", flush=True)
                continue
            start = time.monotonic()
            failure = serve(command, folder, until) if command.text.startswith(PAGE) else run(command, folder)
            print(f"  {'FAILED' if failure else 'ok'}, {time.monotonic() - start:.1f} s", flush=True)
            if failure:
                print(failure)
                return 1
    return 0


def main() -> int:
    commands = read_commands([(ROOT / name).read_text(encoding="utf-8") for name in READMES])
    with TemporaryDirectory(prefix="readme-") as folder:
        copy_checkout(Path(folder))
        return run_all(commands, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
