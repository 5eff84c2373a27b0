"""The page in a real Chromium and through gradio_client, served by the command itself."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from generation_inference import image_geometry, tokens_to_images
from janus.dola.painting import prompt_seed

pytest.importorskip("gradio", minversion="6", reason="the page needs Gradio: pip install -e '.[web]'")
gradio_client = pytest.importorskip("gradio_client")

from demo import inputs  # noqa: E402
from demo.paint import partial_pictures  # noqa: E402

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXAMPLE = ROOT / "demo" / "examples" / "star_above_diamond.png"
PROMPT = "a red star on a gray background"
SOON = 60_000
"""Milliseconds within which something must come, however slow the machine is."""


# --- the server ------------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """The command at work. Its working directory and its home were empty, `temporary` is all it may write to."""

    process: subprocess.Popen
    url: str
    folder: Path

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def finished_runs(self) -> list[bool]:
        """Of each run that began, in their order, whether it ended with all of its files."""
        runs = sorted(self.temporary.glob("janus-page-*/painted/*"), key=lambda path: path.stat().st_ctime)
        return [(run / "painted.zip").is_file() for run in runs]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    for name in ("tmp", "home", "work"):
        (folder / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"TMPDIR": f"{folder / 'tmp'}", "HOME": f"{folder / 'home'}", "NO_PROXY": "127.0.0.1,localhost"}
    process = subprocess.Popen(
        [sys.executable, f"{ROOT / 'demo' / 'app.py'}", "--port", f"{port}", "--device", "cpu"],
        cwd=folder / "work",
        env=os.environ | places | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=(folder / "log").open("w"),
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("the page: "), line
    yield Server(process, line.removeprefix("the page: ").strip(), folder)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def client(server: Server):
    return gradio_client.Client(server.url, verbose=False)


def paint(client, **changes: Any):
    values = {"prompt": PROMPT, "seed": 3, "guidance": 1.5, "temperature": 1, "images": 1, "scorer": "none"}
    return client.predict(**values | {"decodings": ["baseline"]} | changes, api_name="/paint")


# --- gradio_client ---------------------------------------------------------------------------------------------------


def test_the_client_gets_the_bytes_that_the_command_writes(client, tmp_path):
    prompt = "it's a red star; $HOME on a gray background"
    decodings = ["baseline", "layer=6,alpha=0.1", "exit=2,4,6,alpha=0.2,gamma=0.5"]
    files, command, settings = paint(
        client, prompt=prompt, seed=7, guidance=3, images=2, scorer="caption", decodings=decodings
    )
    words = shlex.split(command)
    assert words[:2] == ["python", "run_batch_prompts.py"] and words[-2] == "--outdir"
    words[:2], words[-1] = [sys.executable, f"{ROOT / 'run_batch_prompts.py'}"], f"{tmp_path / 'out'}"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path, env=env)
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["settings"] == settings["settings"]
    made = [
        next((tmp_path / "out" / variant).glob(f"*_p{image}.png"))
        for variant in written["settings"]["variants"]
        for image in range(2)
    ]
    got = [Path(file).read_bytes() for file in files]
    assert got == [file.read_bytes() for file in made]
    assert len(set(got)) == 6
    assert Image.open(BytesIO(got[0])).info["parameters"].count(f"{prompt_seed(7, prompt)}")


def test_the_client_asks_and_gets_both_answers_and_the_ranking(client):
    picture, question = gradio_client.handle_file(EXAMPLE), "What is above the blue diamond?"
    candidates = "a blue star\na yellow star"
    baseline, dola, ranking = client.predict(picture, question, "layer=6", 32, candidates, 0.7, api_name="/ask")
    assert (baseline, dola, ranking["fused"]) == ("a yellow star",) * 3
    assert [row[0] for row in ranking["rows"]] == ["a yellow star", "a blue star"]
    for column in (1, 2):
        assert sum(row[column] for row in ranking["rows"]) == pytest.approx(1)


@pytest.mark.parametrize(("head", "text", "answer"), [("a painting", PROMPT, ""), ("an answer", "What?", "a star")])
def test_the_client_gets_the_curve_and_every_layers_say(client, head, text, answer):
    picture = gradio_client.handle_file(EXAMPLE)
    found = client.predict(head, text, answer, picture, 2, api_name="/layers")
    curve, lens = found["curve"], found["lens"]
    assert list(curve["dola"]) == ["0.02", "0.05", "0.1", "0.2", "0.5"] == list(curve["apc_only"])
    assert all(len(row) == 7 and all(0 <= p <= 1 for p in row) for row in curve["dola"].values())
    assert len(lens["rows"]) == 8 and lens["places"] == (64 if head == "a painting" else 3)
    for row in lens["rows"]:
        probabilities = [p for _, _, p in row]
        assert len(row) == 5 and probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1.0001


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"prompt": " "}, "prompt: write something"),
        ({"prompt": "x" * 501}, "prompt: at most 500 characters, got 501"),
        ({"prompt": "<image_placeholder>"}, "prompt: holds what is no text"),
        ({"seed": -1}, "Value -1 is less than minimum value 0"),
        ({"images": 9}, "Value 9 is greater than maximum value 8"),
        ({"temperature": 0}, "temperature must be in"),
        ({"decodings": ["layer=99"]}, "layer must be in 1..8, got 99"),
        ({"decodings": ["baseline"] * 5}, "decodings: expected 1 to 4"),
        ({"decodings": ["--outdir=x"]}, "decodings: '--outdir=x' is none"),
        ({"decodings": "baseline"}, "decodings: expected 1 to 4"),
        ({"scorer": "os:system"}, "Value: os:system is not in the list of choices"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(client, changes, line):
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        paint(client, **changes)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_cancelled_job_stops_its_work(server, client):
    before = len(server.finished_runs())
    values = {"prompt": PROMPT, "images": 8, "decodings": ["baseline", "layer=6"]}
    job = client.submit(**values, api_name="/paint")
    deadline = time.monotonic() + SOON / 1000
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.cancel()
    paint(client)
    assert server.finished_runs()[before:] == [False, True]


# --- what a visitor may not ------------------------------------------------------------------------------------------


def get(url: str, body: Any = None) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def test_no_file_of_the_server_can_be_read(server, client):
    hostname, module, weights = (
        "/etc/hostname",
        ROOT / "demo" / "page.py",
        ROOT / "janus/checkpoints/janus-tiny/config.json",
    )
    for path in (hostname, module, weights, f"{server.temporary}/../work", f"{ROOT}/README.md"):
        for form in (f"{path}", f"file://{path}", f"..{path}", f"//{path}", f"{path}".replace("/", "%2F")):
            for route in ("gradio_api/file=", "file=", "static/", "assets/", "theme.css/../", "gradio_api/stream/"):
                status, content = get(f"{server.url}{route}{form}")
                assert status >= 400 or b"<html" in content[:600].lower(), (route, form)
    for picture in (
        {"path": hostname},
        {"path": f"{EXAMPLE}"},
        {"path": hostname, "url": f"{server.url}gradio_api/file={hostname}"},
        {"path": "http://127.0.0.1:1/x.png"},
        {"path": "https://example.org/x.png"},
        {"path": "x", "url": "data:image/png;base64,AAAA"},
    ):
        picture = picture | {"meta": {"_type": "gradio.FileData"}}
        body = {"data": [picture, "What?", "dola", 8, "", 0.7]}
        status, content = get(f"{server.url}gradio_api/call/ask", body)
        _, told = get(f"{server.url}gradio_api/call/ask/{json.loads(content)['event_id']}")
        assert b"event: error" in told and b"event: complete" not in told, (picture, told)


def test_an_upload_is_bounded(server):
    bounds, boundary = f"{server.url}gradio_api/upload", "b"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'.encode()
    body = head + bytes(21_000_000) + f"\r\n--{boundary}--\r\n".encode()
    request = Request(bounds, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    with pytest.raises(HTTPError) as error:
        urlopen(request, timeout=60)
    assert error.value.code == 413


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "spec"),
    [
        (("off", "6", 0.1, 1), None),
        (("baseline", "x", None, None), "baseline"),
        (("APC only", "", 0.5, 1), "apc,alpha=0.5"),
        (("one layer", " 6 ", 0.1, 1), "layer=6,alpha=0.1"),
        (("early exit", "2, 4 6", 0.1, 0.5), "exit=2,4,6,alpha=0.1,gamma=0.5"),
    ],
)
def test_a_row_is_written_as_the_command_takes_it(row, spec):
    assert inputs.write_spec(*row) == spec


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (("one layer", "2,4", 0.1, 1), "one layer: expected one number, got '2,4'"),
        (("one layer", "6;rm", 0.1, 1), "one layer: expected one number, got '6;rm'"),
        (("early exit", "2", 0.1, 1), "early exit: expected at least two numbers"),
        (("APC only", "", 1.5, 1), "alpha must be in"),
        (("one layer", "6", None, 1), "alpha must be in"),
        (("one layer", "6", 0.1, "1"), "gamma must be in"),
        (("module:f", "", 0, 0), "decodings: expected one of"),
    ],
)
def test_a_row_that_is_no_decoding_is_one_line(row, line):
    with pytest.raises(ValueError, match=line):
        inputs.write_spec(*row)


def test_pictures_are_bounded_and_only_pictures(tmp_path):
    Image.new("1", (4001, 4000)).save(tmp_path / "large.png")
    Image.new("1", (4000, 10)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes(EXAMPLE.read_bytes()[:300])
    (tmp_path / "page.png").write_text("<svg onload='alert(1)'>")
    (tmp_path / "drawing.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, line in (
        ("large", "at most 16,000,000 pixels, got 4001 x 4000"),
        ("thin", "too long and thin"),
        ("cut", "not an image"),
        ("page", "not an image"),
        ("drawing", "not an image"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            inputs.check_picture(tmp_path / f"{name}.png")
        assert f"{tmp_path}" not in str(error.value)
    assert inputs.check_picture(EXAMPLE) == EXAMPLE


# --- partial pictures ------------------------------------------------------------------------------------------------


def test_a_partial_picture_is_what_is_drawn_and_nothing_beyond(golden):
    side, patch = 4, image_geometry(golden.model, golden.processor)[1]
    tokens = torch.arange(2 * side * side).view(2, -1) % len(golden.model.gen_embed.weight)
    whole, part = partial_pictures(golden.model, tokens, torch.tensor([side * side, side + 2]))
    assert whole.convert("RGB").tobytes() == tokens_to_images(golden.model, tokens)[0].tobytes()
    assert np.asarray(whole)[..., 3].min() == 255
    shown = np.asarray(part)[::patch, ::patch, 3]
    assert shown.flatten().tolist() == [255] * (side + 2) + [0] * (side * side - side - 2)
    assert set(np.unique(np.asarray(part)[..., 3])) == {0, 255}


# --- the page in a browser -------------------------------------------------------------------------------------------


class Visit:
    """A page of the server in a window of its own, and where its requests went."""

    def __init__(self, browser, url: str, width: int = 1440, **options: Any):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page, self.hosts, self.problems = context.new_page(), set(), []
        self.page.set_default_timeout(SOON)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("pageerror", lambda error: self.problems.append(f"{error}"))
        self.page.goto(url)
        self.page.wait_for_selector("#paint")

    def open(self, tab: str) -> Any:
        self.page.get_by_role("tab", name=tab).click()
        return self.page.locator("[role=tabpanel]:visible")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def pictures(self, kind: str) -> list[str]:
        found = self.page.locator(f'#pictures img[src^="data:image/{kind}"]')
        return [found.nth(i).get_attribute("src") for i in range(found.count())]

    def wait_until(self, expression: str) -> None:
        self.page.wait_for_function(expression)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[web]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, server: Server) -> Iterator[Visit]:
    visit = Visit(browser, server.url)
    yield visit
    visit.page.context.close()
    assert visit.hosts == {urlsplit(server.url).netloc}
    assert not visit.problems


def fill_number(visit: Visit, name: str, value: int) -> None:
    visit.page.get_by_label(name, exact=True).first.fill(f"{value}")


def test_an_a_b_grows_token_by_token_then_stands_side_by_side_under_a_slider(visit):
    visit.page.get_by_label("Prompt").first.fill("a green square above a pink circle on a white background")
    fill_number(visit, "Guidance", 4)
    visit.page.get_by_label("Best by").click()
    visit.page.get_by_role("option", name="vqa").click()
    started = time.monotonic()
    visit.page.click("#paint")
    visit.page.wait_for_selector('#pictures img[src^="data:image/webp"]')
    print(f"first partial picture after {time.monotonic() - started:.2f} s")
    assert not visit.page.locator("#slider").is_visible()
    assert "% drawn" in visit.text("#paint-status")
    visit.page.wait_for_selector("#slider img")
    finished = visit.pictures("png")
    assert len(set(finished)) == 4  # two pictures of two decodings
    assert visit.page.locator("#pictures h3").all_inner_texts() == ["baseline", "layer 6 · α 0.1"]
    assert visit.page.locator("#pictures figure.best").count() == 2  # of each decoding one
    assert all(0 <= float(score) <= 1 for score in visit.page.locator("figcaption span").all_inner_texts())
    assert visit.page.locator("#slider img").count() == 2 and visit.page.locator("#where img").is_visible()
    visit.page.get_by_role("button", name="Command and settings").click()
    assert "run_batch_prompts.py '--prompt=a green square" in visit.page.locator(".cm-content").first.inner_text()
    with visit.page.expect_download() as download:
        visit.page.click("#download")
    assert Path(download.value.path()).read_bytes()[:2] == b"PK"


def test_a_painted_picture_can_be_asked_about_and_looked_into(visit):
    fill_number(visit, "Pictures", 1)
    visit.page.click("#paint")
    visit.page.wait_for_selector("#slider img")
    visit.page.get_by_role("button", name="Ask about the right one").click()
    visit.page.get_by_label("Question").locator("visible=true").fill("How many objects are there?")
    visit.page.click("#ask")
    visit.wait_until("document.querySelector('#dola')?.innerText.includes('two')")
    visit.open("Paint")
    visit.page.get_by_role("button", name="Look inside the right one").click()
    visit.page.click("#read")
    visit.page.wait_for_selector("#lens .place table")
    assert visit.page.locator("#lens tbody tr").count() == 8 and visit.page.locator("#curve polyline").count() == 5
    before = visit.page.locator("#lens").inner_html()
    visit.page.locator("#place input[type=range]").focus()
    visit.page.keyboard.press("ArrowRight")
    visit.wait_until("document.querySelector('#lens').innerText.includes('token 2 of 64')")
    assert visit.page.locator("#lens").inner_html() != before


def test_stop_stops_the_work(visit, server, client):
    before = len(server.finished_runs())
    fill_number(visit, "Pictures", 8)
    visit.page.click("#paint")
    visit.page.wait_for_selector('#pictures img[src^="data:image/webp"]')
    visit.page.click("#stop-painting")
    visit.wait_until("document.querySelector('#paint-status').innerText === 'Stopped'")
    paint(client)
    assert server.finished_runs()[before:] == [False, True]
    assert not visit.page.locator("#slider").is_visible()


def test_who_leaves_stops_the_work_too(browser, server, client):
    before, visit = len(server.finished_runs()), Visit(browser, server.url)
    fill_number(visit, "Pictures", 8)
    visit.page.click("#paint")
    visit.page.wait_for_selector('#pictures img[src^="data:image/webp"]')
    visit.page.context.close()
    paint(client)
    assert server.finished_runs()[before:] == [False, True]


def test_a_question_is_answered_twice_and_the_next_one_follows_it(visit):
    tab = visit.open("Ask")
    tab.get_by_text("What is above the blue diamond?").first.click()
    visit.wait_until("document.querySelectorAll('[role=tabpanel] .image-container img').length > 0")
    visit.page.click("#ask")
    for side in ("baseline", "dola"):
        visit.wait_until(f"document.querySelector('#{side}').innerText.includes('a yellow star')")
    tab.get_by_label("Question").fill("How many objects are there?")
    visit.page.keyboard.press("Enter")
    for side in ("baseline", "dola"):
        visit.wait_until(f"document.querySelector('#{side}').innerText.includes('two')")
        assert "a yellow star" in visit.text(f"#{side}")


def test_a_hostile_upload_is_one_line_in_the_page(visit, tmp_path):
    (tmp_path / "x.png").write_text("#!/bin/sh\nrm -rf /\n")
    tab = visit.open("Ask")
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "x.png")
    tab.get_by_label("Question").fill("What is in the image?")
    visit.page.wait_for_timeout(1000)
    visit.page.click("#ask")
    toast = visit.page.locator(".toast-body").first
    toast.wait_for()
    assert "picture: not an image (PNG, JPEG, WEBP, BMP, GIF)" in toast.inner_text()


def test_what_a_visitor_writes_is_shown_as_text(visit):
    fill_number(visit, "Pictures", 1)
    hostile = "<img src=x onerror='window.hit=1'>${window.hit=1}{{window.hit=1}}</script><script>window.hit=1</script>"
    visit.page.get_by_label("Prompt").first.fill(hostile)
    visit.page.click("#paint")
    visit.page.wait_for_selector("#slider img")
    assert visit.page.evaluate("window.hit") is None
    assert visit.page.locator("#pictures img").first.get_attribute("alt").startswith(hostile)


def test_two_visitors_at_once_are_both_served(browser, server, visit):
    other = Visit(browser, server.url)
    for one in (visit, other):
        fill_number(one, "Pictures", 1)
    for one in (visit, other):
        one.page.click("#paint")
    for one in (visit, other):
        one.page.wait_for_selector("#slider img")
        assert len(set(one.pictures("png"))) == 2
    assert visit.pictures("png") == other.pictures("png")
    other.page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, server, scheme):
    visit = Visit(browser, server.url, width=390, color_scheme=scheme, has_touch=True)
    width = "document.documentElement.scrollWidth"
    for tab, button, shown in (
        ("Paint", "#paint", "#slider img"),
        ("Layers", "#read", "#lens table"),
        ("Ask", "#ask", "#ranking table"),
    ):
        panel = visit.open(tab)
        assert visit.page.evaluate(width) == 390, tab
        if tab == "Paint":
            panel.get_by_role("button", name="Two more").click()
        else:
            panel.locator(".gallery-item").first.click()
            visit.wait_until("document.querySelectorAll('[role=tabpanel] .image-container img').length > 0")
        if tab == "Ask":
            panel.get_by_role("button", name="Candidates").click()
            panel.get_by_label("What the picture may show").fill(
                "a yellow star above a blue diamond\na blue star\na red cross"
            )
        visit.page.click(button)
        visit.page.wait_for_selector(shown)
        assert visit.page.evaluate(width) == 390, tab
    ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.removeprefix("rgb(").rstrip(")").split(","))) < 200) == (scheme == "dark")
    visit.page.context.close()


NAME_OF_FOCUS = """(() => {
  const it = document.activeElement
  return it.id || it.ariaLabel || it.closest('label')?.innerText || it.innerText
})()"""


def test_everything_is_reached_by_the_keyboard(visit):
    fill_number(visit, "Pictures", 1)
    visit.page.get_by_role("tab", name="Paint").focus()
    reached = []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        reached.append(visit.page.evaluate(NAME_OF_FOCUS))
        if reached[-1] == "paint":
            break
    assert reached[-1] == "paint", reached
    for name in ("Prompt", "First decoding", "Seed"):
        assert any(name in text for text in reached), reached
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#slider img")


# --- the end ---------------------------------------------------------------------------------------------------------


def test_the_server_wrote_in_its_temporary_folder_alone_and_takes_that_along(server):
    assert list(server.temporary.iterdir()) != []
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert [path for name in ("tmp", "home", "work") for path in (server.folder / name).rglob("*")] == []


@pytest.mark.parametrize(
    ("blocked", "options", "line"),
    [
        ("no_such_module", ["--port", "70000"], "error: --port: expected 1 to 65535, got 70000\n"),
        ("gradio", [], "error: the page needs Gradio: pip install 'janus-dola[web]'\n"),
    ],
)
def test_what_the_command_lacks_is_one_line(blocked, options, line):
    app = f"{ROOT / 'demo' / 'app.py'}"
    run = f"import runpy, sys; sys.modules[{blocked!r}] = None; runpy.run_path({app!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run, *options], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, line)
