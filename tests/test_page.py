"""The page, clicked in the system's chromium, and called as its API is."""

import html
import re
import shutil

import gradio
import gradio_client
import pytest
from fastapi import FastAPI

from modeling_memory.serving.page import EXAMPLE, page, remember
from modeling_memory.store import memory_store
from modeling_memory.store.quoting import write_back
from tests.test_serving import serving
from training.remember import load_memory_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address():
    app = gradio.mount_gradio_app(FastAPI(), page(*load_memory_model("starter-tiny")), path="/")
    with serving(app) as local:
        yield local


def test_a_visitor_remembers_quotes_and_asks(address, tmp_path, monkeypatch):
    client = gradio_client.Client(address, verbose=False)
    with pytest.raises(Exception, match="Nothing is remembered yet"):
        client.predict(api_name="/write_back")
    with pytest.raises(Exception, match="There is no text"):
        client.predict(" ", api_name="/remember")
    text = EXAMPLE + " The cost was £5."  # a character of two tokens
    costs, chunks, *_ = client.predict(text, api_name="/remember")
    positions = re.search(r"positions that the decoder reads \| (\d+) \| (\d+)", costs)
    assert int(positions[1]) > int(positions[2]) == chunks.count("<tr>") - 1
    assert client.predict(api_name="/quote")[0].startswith(EXAMPLE)
    written, lost = client.predict(api_name="/write_back")
    assert re.sub("<mark.*?</mark>|<[^>]+>", "", written).startswith(EXAMPLE) and "tokens came back" in lost
    reply, used = client.predict("The sign", "a text to go on with", api_name="/ask")
    assert reply and used == f"Read from {positions[2]} of {positions[2]} chunks."
    other = gradio_client.Client(address, verbose=False)  # another visitor has another document
    text = "<b>Él</b> 漢字 wrote: qqxzj!"
    other.predict(text, api_name="/remember")
    written, lost = other.predict(api_name="/write_back")
    assert html.escape(text) in written and "<mark" not in written and "Nothing was lost" in lost

    def misread(*given):
        tokens = write_back(*given)
        tokens[-1, 0] = load_memory_model("starter-tiny")[1].tokenizer("?").input_ids[-1]
        return tokens

    monkeypatch.setattr(memory_store, "write_back", misread)
    written, lost = other.predict(api_name="/write_back")
    assert "<b>" not in written and "<mark" in written and "1 of 4 chunks lost something" in lost
    assert client.predict(api_name="/quote")[0].startswith(EXAMPLE)
    (tmp_path / "a.txt").write_text("A letter came.")
    assert client.predict(gradio_client.handle_file(tmp_path / "a.txt"), api_name="/upload") == "A letter came."


def test_a_new_document_takes_the_place_of_the_one_before():
    from modeling_memory.serving import Engine

    engine = Engine(*load_memory_model("starter-tiny"))
    first = remember(engine, EXAMPLE, None)
    second = remember(engine, "A letter came.", first)
    assert not first["folder"].exists() and second["store"].text_ids == ["document"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium of the system")
def test_the_page_is_clicked_in_a_browser(address, pytestconfig):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1100, "height": 1300})
        view.goto(address)
        view.locator("#document textarea").fill(EXAMPLE + " Él wrote.")
        view.click("#remember")
        expect(view.locator("#chunks tr")).not_to_have_count(0, timeout=30_000)
        expect(view.locator("#costs")).to_contain_text("positions saved")
        view.click("#back")
        expect(view.locator("#written")).to_contain_text("The sign was newly painted", timeout=30_000)
        expect(view.locator("#lost")).to_contain_text("tokens came back")
        view.click("#quote")
        expect(view.locator("#answer textarea")).to_have_value(re.compile("cleanly sanded"), timeout=30_000)
        view.wait_for_timeout(1000)  # the frame that says that something is written goes
        if pytestconfig.getoption("basetemp"):  # where a caller wants to look at it
            view.screenshot(path=f"{pytestconfig.getoption('basetemp')}.png", full_page=True)
        view.locator("#prompt textarea").fill("The sign")
        view.click("#ask")
        expect(view.locator("#answer textarea")).not_to_have_value(re.compile("cleanly sanded"), timeout=30_000)
        expect(view.locator("#used")).to_contain_text("chunks", timeout=30_000)
        browser.close()
