"""What runs elsewhere, as far as it can be checked here: hosted workflows, and the site with every link of it."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_workflows_fit_their_schema():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert WORKFLOWS and done.returncode == 0, done.stdout


def test_the_workflows_call_what_contributors_call_on_every_python():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
    tried = {}
    for job in jobs.values():
        for step in job["steps"]:
            script = re.search(r"\.ci/\w+", step.get("run", ""))
            if script:
                assert (ROOT / script[0]).is_file()
                tried[script[0]] = job["strategy"]["matrix"]["python"]
    assert tried.keys() == {".ci/run", ".ci/oldest"}, "the newest and the oldest transformers"
    assert {version for versions in tried.values() for version in versions} == {"3.10", "3.11", "3.12", "3.13"}
    floor = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[1]
    assert min(tried[".ci/oldest"], key=lambda version: int(version.partition(".")[2])) == floor


class Page(HTMLParser):
    """The places of a page, and where its links lead."""

    def __init__(self, path):
        super().__init__()
        self.places, self.links = set(), []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_built_and_every_link_of_it_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    guides = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"}
    assert guides <= {path.parent.name for path in pages} and (site / "index.html") in pages
    for path, page in pages.items():
        if path.name == "404.html":  # shown at any address, so its links begin at the root
            continue
        for link in page.links:
            parts = urlsplit(link)
            repository = re.match(r"https://github\.com/modeling-memory/modeling-memory/(?:blob|tree)/main/(.*)", link)
            if repository:
                assert (ROOT / unquote(repository[1].partition("#")[0])).exists(), f"{path}: {link}"
            if parts.scheme or link.startswith("//"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].places, f"{path}: {link}"


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium of the system")
def test_a_reader_searches_the_site(site, pytestconfig):
    import functools
    import http.server
    import threading

    from playwright.sync_api import expect, sync_playwright

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        outside = []
        view.on("request", lambda request: outside.append(request.url) if "127.0.0.1" not in request.url else None)
        view.goto(f"http://127.0.0.1:{server.server_port}/")
        expect(view.locator("h1")).to_contain_text("Documentation")
        view.locator("input.md-search__input").fill("teacher-forced")
        expect(view.locator(".md-search-result__item").first).to_be_visible(timeout=30_000)
        if pytestconfig.getoption("basetemp"):  # where a caller wants to look at it
            view.screenshot(path=f"{pytestconfig.getoption('basetemp')}.png")
        assert not outside, "nobody else is told what is read"
        browser.close()
        server.shutdown()
