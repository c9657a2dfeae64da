"""What a person does in the studio, in a real browser: write, look, drag, step, export."""

import json

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


def write(page, prompt="def read(path):\n", *, rule="hazard:0.6", tokens=24):
    page.fill("#prompt", prompt)
    page.select_option("#effort", "")
    page.fill("#rule", rule)
    page.fill("#count", str(tokens))
    page.click("#go")
    expect(page.locator(".side h2")).to_have_text("shipped: an answer", timeout=60_000)


def loops_of(page):
    return [int(n or 0) for n in page.locator(".lw-t").evaluate_all("nodes => nodes.map(n => n.dataset.n)")]


def test_tokens_are_tinted_by_loops(page):
    write(page)
    loops = loops_of(page)
    assert len([n for n in loops if n]) == 24
    assert len(set(loops)) > 1
    shades = page.locator(".lw-t").evaluate_all("nodes => nodes.map(n => getComputedStyle(n).backgroundColor)")
    by_loops = {n: {shade for m, shade in zip(loops, shades, strict=True) if m == n} for n in set(loops) if n}
    for n, seen in by_loops.items():
        assert len(seen - {shade for m, other in by_loops.items() if m != n for shade in other}) >= 1
    label = page.locator(".lw-t").last.get_attribute("aria-label")
    assert label.endswith(f"{loops[-1]} of 4 loops")


def test_the_threshold_tints_anew_and_goes_back(page):
    write(page)
    before = loops_of(page)
    page.locator(".threshold input").evaluate(
        "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }", 0
    )
    assert {n for n in loops_of(page) if n} == {1}
    page.click(".threshold button")
    assert loops_of(page) == before


def test_the_line_in_the_exit_curves_can_be_dragged(page):
    write(page)
    page.click('[data-view="exits"]')
    line = page.locator("#plot .shapelayer path").first
    line.wait_for(state="attached")
    box = line.bounding_box()
    before = loops_of(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y + 140, steps=6)
    page.mouse.up()
    expect(page.locator(".threshold output")).not_to_have_text("as recorded")
    assert sum(loops_of(page)) < sum(before)


def test_the_lens_shows_what_each_loop_says(page):
    write(page)
    expect(page.locator("#plot .heatmaplayer image, #plot .heatmaplayer .hm").first).to_be_attached()
    words = page.locator("#plot .heatmap-label text").all_inner_texts()
    assert len(words) > 40
    for mode in ("entropy", "KL to final", "probability"):
        page.click(f"#choices >> text={mode}")
        expect(page.locator("#choices [aria-pressed=true]")).to_have_text(mode)
    expect(page.locator("#caption")).to_contain_text("Logit lens")


def test_a_token_is_chosen_with_the_keyboard(page):
    write(page)
    page.locator(".lw-t").first.focus()
    page.keyboard.press("End")
    expect(page.locator("#inspector .note")).to_contain_text("of 4 loops")
    assert page.locator("#inspector tbody tr").count() == 4
    page.keyboard.press("ArrowLeft")
    chosen = page.locator(".lw-t[aria-selected=true]")
    expect(chosen).to_have_count(1)
    page.keyboard.press("Escape")
    expect(chosen).to_have_count(0)


@pytest.mark.parametrize("view", ["path", "quality"])
def test_other_views_draw(page, view):
    write(page)
    page.click(f'[data-view="{view}"]')
    expect(page.locator("#plot .scatterlayer .trace").first).to_be_attached()
    if view == "path":
        page.click("#choices >> text=space")
        expect(page.locator("#plot .gl-container canvas").first).to_be_attached()
    else:
        for unit in ("FLOPs", "measured time", "KV bytes"):
            page.click(f"#choices >> text={unit}")
            expect(page.locator("#choices [aria-pressed=true]")).to_have_text(unit)


def test_two_efforts_stand_side_by_side(page):
    page.click("#beside")
    page.locator(".side").nth(1).locator("select").nth(1).select_option("none")
    page.fill("#prompt", "import ")
    page.select_option("#effort", "max")
    page.fill("#count", "12")
    page.click("#go")
    for side, most in ((0, 4), (1, 1)):
        heading = page.locator(".side").nth(side).locator("h2")
        expect(heading).to_have_text("shipped: an answer", timeout=60_000)
        tinted = page.locator(".side").nth(side).locator(".lw-t:not(.given)")
        assert set(tinted.evaluate_all("nodes => nodes.map(n => n.dataset.n)")) == {str(most)}


def test_a_maze_is_stepped_through(page):
    page.click('[data-room="grid"]')
    expect(page.locator("#board > div")).to_have_count(25)
    expect(page.locator("#board .on")).to_have_count(0)
    for tick in (2, 3, 4):
        page.click("#step")
        expect(page.locator("#tick-note")).to_have_text(f"tick {tick} of 4")
        expect(page.locator("#board .on")).to_have_count(tick - 1)
    expect(page.locator("#board-note")).to_contain_text("Every cell is right")
    page.select_option("#overlay", "attention")
    expect(page.locator("#board .looked")).to_have_count(25)


def test_a_run_is_drawn(page):
    page.click('[data-room="run"]')
    expect(page.locator("#panels .plot .scatterlayer .trace")).to_have_count(2)


def test_exports_work_offline(page, browser, tmp_path):
    write(page)
    with page.expect_download() as download:
        page.click("#png")
    picture = tmp_path / "lens.png"
    download.value.save_as(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as download:
        page.click("#html")
    saved = tmp_path / "page.html"
    download.value.save_as(saved)
    offline = browser.new_context(offline=True).new_page()
    offline.goto(saved.as_uri())
    assert offline.locator(".t").count() == len(loops_of(page))
    offline.close()


def test_a_link_restores_the_selection(page):
    write(page)
    page.click('[data-view="quality"]')
    page.locator(".lw-t").nth(9).click()
    page.locator(".threshold input").evaluate(
        "(slider) => { slider.value = 90; slider.dispatchEvent(new Event('input')); }"
    )
    before = loops_of(page)
    page.reload()
    expect(page.locator(".lw-t[aria-selected=true]")).to_have_attribute("data-index", "9")
    expect(page.locator('[data-view="quality"]')).to_have_attribute("aria-selected", "true")
    assert loops_of(page) == before


def test_a_mistake_is_said_in_one_line(page):
    page.fill("#prompt", "a")
    page.select_option("#effort", "")
    page.fill("#rule", "hazzard:0.5")
    page.click("#go")
    expect(page.locator("#message")).to_contain_text("hazard")


def test_the_text_of_a_model_is_never_markup(page):
    page.fill("#prompt", "<img src=x onerror=alert(1)><script>alert(2)</script>")
    page.fill("#count", "4")
    page.click("#go")
    expect(page.locator(".side h2")).to_have_text("shipped: an answer", timeout=60_000)
    assert page.locator(".lw-strip img, .lw-strip script").count() == 0
    assert "<img src=x" in page.locator(".lw-strip").inner_text()


def test_json_of_a_trace_stays_small(page, address):
    key = next(
        each["key"]
        for each in json.loads(page.request.get(f"{address}api/library").text())["traces"]
        if each["title"] == "a large trace"
    )
    assert len(page.request.get(f"{address}api/traces/{key}").body()) < 3_000_000
