"""What of a README is run, and how its run ends."""

import pytest

from tools.run_readme import Command, read_commands, run_all

TEXT = """
```bash
pip install ray
paint --prompt "a #1 star" \\
    --layer 6  # DoLa
paint --model large  # needs a GPU and a download
# a remark
python -m pytest -q
```
```json
{"not": "run"}
```
```bash
# needs a checkout of the original
cp a b
cp c d
```
```python
print(1)
```
"""


def test_commands_are_taken_one_by_one_in_order_without_their_comments():
    bash = [command.text for command in read_commands([TEXT]) if command.language == "bash"]
    paint = 'paint --prompt "a #1 star" --layer 6'
    assert bash == ["pip install ray", paint, "paint --model large", "python -m pytest -q", "cp a b", "cp c d"]
    assert read_commands([TEXT])[-1] == Command("python", "print(1)\n")


def test_only_what_is_marked_or_done_before_is_skipped():
    before, original = "done before, by .ci/run", "needs a checkout of the original"
    skipped = [command.skipped for command in read_commands([TEXT])]
    assert skipped == [before, None, "needs a GPU and a download", before, original, original, None]


def test_a_block_that_both_texts_have_runs_once():
    assert read_commands([TEXT, TEXT + "```bash\nls\n```\n"]) == [*read_commands([TEXT]), Command("bash", "ls")]


@pytest.mark.parametrize(("language", "text"), [("bash", "echo seen; false | cat"), ("python", "print('seen'); 1 / 0")])
def test_the_first_failure_ends_the_run_with_its_output(tmp_path, capfd, language, text):
    commands = [Command("bash", "touch before"), Command(language, text), Command("bash", "touch after")]
    assert run_all(commands, tmp_path) == 1
    assert "seen\n" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_a_page_must_answer_and_is_stopped_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.run_readme.PAGE", "python page.py")
    (tmp_path / "page.py").write_text(
        "import http.server, os, pathlib\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n"
        "pathlib.Path('pid').write_text(f'{os.getpid()}')\n"
        "print(f'http://127.0.0.1:{server.server_port}', flush=True)\n"
        "server.serve_forever()\n"
    )
    page, is_up = Command("bash", "python page.py"), Command("bash", "kill -0 $(cat pid)")
    assert run_all([page, is_up], tmp_path) == 0
    assert run_all([is_up], tmp_path) == 1
    (tmp_path / "page.py").write_text("print('no model')")
    assert run_all([page], tmp_path) == 1
