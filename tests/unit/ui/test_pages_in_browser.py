"""The reports in a headless Chromium: quiet, narrow, dark, printed, and spectra by mouse, keyboard and touch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_samples import EVIL, STAGES, events, finished_metrics, healing_metrics, manifest, spectra

from emloc_ray.runs.batch.state import BatchState, TaskState
from emloc_ray.ui import page as report
from emloc_ray.ui.batch_page import render_batch
from emloc_ray.ui.timeline import StageRun

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 700}
FIRST = "model.layers.0.self_attn.q_proj"
# Luminance by WCAG 2, of the text of every element that has some against the nearest background that is no transparent one.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const over = (colours) => { canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
    v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    const back = over(layers), fore = over([...layers, getComputedStyle(element).color]);
    const [a, b] = [light(back), light(fore)].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), element.tagName + ' ' + element.className + ' ' + element.textContent.slice(0, 30)]);
  }
  return found; }"""
WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
OPEN = "() => [...document.querySelectorAll('[popover]')].filter(p => p.matches(':popover-open')).map(p => p.id)"
Open = Callable[..., Any]


def run_page() -> str:
    metrics = finished_metrics()
    metrics["planned_memory"] = {"finetune": 2**31, "inference": 5 * 2**28}
    metrics["healing"] = healing_metrics()
    made = manifest(*STAGES[:3], "heal", *STAGES[3:])
    return report.render("run", made, metrics, events(), spectra())


def killed_page() -> str:
    return report.render("killed", manifest(*STAGES[:2]), finished_metrics(), events())


def batch_page() -> str:
    tasks = (TaskState("first", "done"), TaskState(EVIL.replace("\ud800", ""), "failed", "data", reason=EVIL * 3))
    return render_batch("sweep", BatchState(0.0, tasks), {"first": (StageRun("data", 0.0, 9.0),)})


PAGES = {"run": run_page, "killed": killed_page, "batch": batch_page}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=root)
        yield made
        made.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; nothing may be asked of a network nor be said on the console until the test's end."""
    said: list[str] = []
    contexts = []

    def opened(html: str, viewport: dict[str, int] = DESKTOP, **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        file = tmp_path / "report.html"
        file.write_bytes(html.encode(errors="replace"))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def test_tables_need_no_scrolling_on_a_small_screen(show: Open) -> None:
    metrics = finished_metrics()
    for usage in metrics["stages"].values():
        usage |= {"peak_above_imports_bytes": 2**28, "peak_gpu_bytes": 2**29}
    metrics |= {"planned_memory": dict.fromkeys([*STAGES, "inference"], 2**31), "planned_imports_bytes": 2**28}
    page = show(report.render("run", manifest(*STAGES), metrics), {"width": 1000, "height": 900})
    tables = page.evaluate("() => [...document.querySelectorAll('.scroll')].map(s => [s.scrollWidth, s.clientWidth])")
    assert [(whole, seen) for whole, seen in tables if whole > seen] == []


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_phone_and_are_readable(show: Open, kind: str, scheme: str) -> None:
    page = show(PAGES[kind](), PHONE, color_scheme=scheme)
    assert page.evaluate(WIDE) <= 0
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert [(ratio, what) for ratio, what in contrasts if ratio < 4.5] == []
    back = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 200) == (scheme == "dark")


def test_a_click_shows_the_spectrum_of_a_layer(show: Open) -> None:
    page = show(run_page())
    cell, spectrum = page.locator(f'[popovertarget="spectrum-{FIRST}"]'), page.locator(f'[id="spectrum-{FIRST}"]')
    assert not spectrum.is_visible()
    cell.click()
    assert spectrum.is_visible()
    assert "rank 21" in spectrum.inner_text()
    box = spectrum.locator("svg").bounding_box()
    assert box["width"] > 100
    assert box["height"] > 100
    page.locator("h1").click()
    assert page.evaluate(OPEN) == []


def test_the_keyboard_shows_one_spectrum_after_another(show: Open) -> None:
    page = show(run_page())
    page.locator(f'[popovertarget="spectrum-{FIRST}"]').focus()
    page.keyboard.press("Enter")
    assert page.evaluate(OPEN) == [f"spectrum-{FIRST}"]
    page.keyboard.press("Escape")
    assert page.evaluate(OPEN) == []
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.evaluate(OPEN) == ["spectrum-model.layers.0.self_attn.k_proj"]


def test_a_tap_shows_the_spectrum_within_a_phone(show: Open) -> None:
    page = show(run_page(), PHONE, has_touch=True, is_mobile=True)
    page.locator(f'[popovertarget="spectrum-{FIRST}"]').tap()
    box = page.locator(f'[id="spectrum-{FIRST}"]').bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]
    assert box["y"] + box["height"] <= PHONE["height"]


@pytest.mark.parametrize("kind", PAGES)
def test_on_paper_all_is_shown_and_light(show: Open, kind: str) -> None:
    page = show(PAGES[kind](), color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [(ratio, what) for ratio, what in page.evaluate(CONTRASTS) if ratio < 4.5] == []
    shown = page.locator("details").evaluate_all("found => found.map(d => d.lastElementChild.checkVisibility())")
    assert all(shown)
    assert page.locator("[popover]").evaluate_all("found => found.some(p => p.checkVisibility())") is False
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_batch_leads_to_its_tasks_pages(show: Open, tmp_path: Path) -> None:
    link = show(batch_page()).get_by_role("link", name="first")
    assert link.evaluate("a => a.href") == (tmp_path / "tasks" / "first" / "report.html").as_uri()


def test_hostile_text_stays_text(show: Open) -> None:
    metrics, odd = finished_metrics(), f'x.0.{EVIL}"'
    metrics["emulator"]["layers"] = {odd: {"rank": 1, "relative_error": 0.1}}
    html = report.render(EVIL, manifest(*STAGES), metrics, events(), {odd: [(1, 0.5), (2, 0.25)]})
    page = show(html)
    assert page.locator("script").count() == 0
    page.locator("[popovertarget]").click()
    assert "alert(" in page.locator(".spectrum:popover-open").inner_text()
