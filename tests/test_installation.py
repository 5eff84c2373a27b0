"""What a wheel brings along, and that its commands work where no checkout is."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from janus.dola import __version__
from janus.dola.console import SCRIPTS

ROOT = Path(__file__).parents[1]
RUN = "import sys; from janus.dola.console import main; sys.argv = sys.argv[1:]; main()"

RUN_EACH = """
import sys
from janus.dola.console import main
for name in sys.argv[1:]:
    sys.argv = [name, "--no_such_option"]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A wheel of the checkout, unpacked as pip would."""
    pytest.importorskip("setuptools", minversion="77")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    for name in ("janus", "examples", "demo"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_a_wheel_holds_the_whole_package_and_no_module_of_a_name_that_others_have(installed):
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"dola_runtime.py", "generation_inference.py", "janus"}
    ours = {path.relative_to(ROOT) for path in ROOT.glob("janus/**/*") if path.is_file()}
    wanted = {path for path in ours if "__pycache__" not in path.parts}
    assert wanted <= {path.relative_to(installed) for path in installed.glob("janus/**/*")}


def test_the_version_stands_in_one_place_and_the_citation_follows(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in metadata.read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_an_installed_command_paints_the_example_prompts_in_an_empty_directory(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    options = ["--max_prompts", "2", "--parallel_size", "1", "--device", "cpu", "--outdir", "painted"]
    command = [sys.executable, "-c", RUN, "janus-paint", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "painted").glob("*.jpg"))) == 2


def test_every_installed_command_is_there_and_says_what_it_lacks_in_one_line(installed, tmp_path, monkeypatch):
    entry_points = next(installed.glob("*.dist-info")) / "entry_points.txt"
    commands = sorted(SCRIPTS)
    assert entry_points.read_text().split("\n")[1 : 1 + len(commands)] == [
        f"{name} = janus.dola.console:main" for name in commands
    ]
    monkeypatch.setenv("PYTHONPATH", str(installed))
    done = subprocess.run([sys.executable, "-c", RUN_EACH, *commands], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["2"] * len(commands)
    assert done.stderr.count("\n") == done.stderr.count("error: ") == len(commands), done.stderr
