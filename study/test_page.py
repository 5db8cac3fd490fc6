"""Tests of the page in a real browser, headless Chromium: that it shows what `route`, `predict` and `aggregate` return.

Oracle: the plain model, one forward pass for each token with a `route` of the test's own. Probabilities on the page
have four digits, so that they are right to within half of the last one, and float32's rounding.

Where Debian's packages chromium and chromium-driver, or Selenium, are missing, what needs a browser is skipped.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import page
import pytest
import torch
from example import PAGE, PICTURE, PROMPT, ROSTERS, start_browser
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import roe
from cache import SharedCache
from load import load
from model import Config, OLMoE, top_k

torch.set_num_threads(1)

STUDY = Path(__file__).parent
FOUR_DIGITS = {"rtol": 0, "atol": 0.5e-4 + 1e-6}
HOSTILE = [  # as many as are kept of each prediction, so that all of them are on the page
    "</script><script>document.title='ran'</script>",
    "<img src=x onerror=document.title='ran'>",
    "\"'><svg/onload=document.title='ran'>&lt;b&gt;",
    "<!--<script>{DATA}${document.title='ran'}",
    "\u202eright\u2028to\0left",
]


def run(*arguments, **options):
    command = [sys.executable, STUDY / "page.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("selenium.webdriver", reason='Selenium is not installed: pip install -e ".[page]"')
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Debian's packages chromium and chromium-driver are not installed")
    browser = start_browser()
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser):
    """A function that opens a page on a screen of this kind; at the end nothing must have been logged."""

    def open_page(file, width=1200, scheme="light", media="screen"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(file.as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []


def select(browser, css):
    return browser.find_elements("css selector", css)


def text(browser, css):
    return browser.find_element("css selector", css).text


def press(browser, key, css=None):
    """Presses a key where the focus is, or in this element."""
    from selenium.webdriver import ActionChains, Keys

    if css:
        browser.find_element("css selector", css).send_keys(getattr(Keys, key))
    else:  # not sent to an element: a button that has just been disabled keeps the focus for a moment, and takes none
        ActionChains(browser).send_keys(getattr(Keys, key)).perform()


@pytest.fixture(scope="module")
def truth():
    """The example by the plain model: ids, and for each token logits [n, V] and every layer's logits and experts."""
    model, tokenizer = load(device="cpu", dtype="float32", fast=False)
    config, tau = model.config, roe.temperatures(model.config)
    tokens = tokenizer.encode(PROMPT).ids
    written = list(roe.generate(model, tokens, ROSTERS, max_new_tokens=60))
    shape = ROSTERS, config.num_hidden_layers, config.num_experts
    cache, found = SharedCache(config, 200), []
    for end in range(len(tokens), len(tokens) + len(written)):
        noise = roe.gumbel(0, end - 1, *shape)
        noise[0] = 0
        chosen = []

        def route(layer, logits):
            if tau[layer] == 0:
                weights, indices = top_k(logits, config.num_experts_per_tok)
            else:
                noisy = tau[layer] * noise[:, None, layer]
                weights, indices = roe.stochastic_route(logits, noisy, config.num_experts_per_tok)
            chosen.append((logits[:, 0], indices[:, 0].tolist()))
            return weights, indices

        text = torch.tensor([tokens + written])
        with torch.inference_mode():
            if cache.length < end - 1:
                model.hidden(text[:, cache.length : end - 1], cache)
            logits = model(text[:, end - 1 : end], cache, route)[:, 0]
        found.append((logits, chosen))
    return tokenizer, written, found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    result = run("--prompt", PROMPT, "--rosters", ROSTERS, "--output", file)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return file


def data_of(file):
    return json.loads(re.search('id="data">(.*?)</script>', file.read_text("utf-8"), re.DOTALL)[1])


# ---- What is written ------------------------------------------------------------------------------------------------


def test_size_and_needs(made):
    """At most 400 KB for 60 tokens with 8 rosters; no other file, and no address but the paper's and those of names."""
    content = made.read_text("utf-8")
    assert len(data_of(made)["tokens"]) == 60 and made.stat().st_size <= 400_000
    addresses = set(re.findall(r"https?://[\w./]*", content))
    assert addresses == {"https://arxiv.org/abs/2509.17238", "http://www.w3.org/"}
    assert not re.search(r"<link (?!rel=\"icon\" href=\"data:,\")|@import|url\(| src=", content)


def test_bounds():
    lines = {name: len((STUDY / name).read_text("utf-8").splitlines()) for name in ("page.py", "page.html")}
    assert lines["page.py"] <= 200 and lines["page.html"] <= 250


def test_data_are_those_of_roe(made, truth):
    tokenizer, written, found = truth
    tokens = data_of(made)["tokens"]
    assert [token["ids"][token["chosen"]] for token in tokens] == written
    for token, (logits, chosen) in zip(tokens, found, strict=True):
        assert token["experts"] == [indices for _, indices in chosen]
        probs = logits.softmax(-1)[:, token["ids"]]
        torch.testing.assert_close(torch.tensor(token["probs"]), probs, rtol=1e-4, atol=1e-7)
        for m in range(1, ROSTERS + 1):
            assert roe.aggregate(logits[:m]).argmax() in token["ids"]
    assert "".join(token["text"] for token in tokens).replace("↵", "") == tokenizer.decode(written)


def test_example_is_current():
    """The page in this folder is what the template makes of its data, and shows all that there is to see."""
    data, content = data_of(PAGE), PAGE.read_text("utf-8")
    about = re.search("Sections are those of the paper. (.*?)</p>", content)[1]
    assert page.fill(data, about) == content and data["prompt"] == PROMPT
    assert PAGE.stat().st_size <= 400_000 and PICTURE.stat().st_size <= 150_000
    kinds = {kind for token in data["tokens"] for rows in token["kinds"][-1] for kind in rows}
    assert kinds == {"clean", "input"}  # in the last layer, which has no noise
    assert any("noise" in row for token in data["tokens"] for rows in token["kinds"] for row in rows)


def test_kinds():
    """By hand: row 0 chooses 0 and 1; in row 1 noise brings 3; in row 2 the router itself prefers 2."""
    logits = torch.tensor([[4.0, 3, 2, 1], [4.0, 3, 2, 1], [4.0, 2, 3, 1]])
    chosen = torch.tensor([[0, 1], [3, 0], [2, 0]])
    kinds = [["clean", "clean"], ["noise", "clean"], ["input", "clean"]]
    assert page.kinds_of(logits, chosen) == kinds
    assert page.kinds_of(logits[:1], chosen) == kinds[:2] + [["noise", "clean"]]  # one row becomes n here


def test_names():
    assert page.name("\n        x = y") == "↵␣×8x␣=␣y"
    assert page.name("") == "▯" and page.name("\u202e\t\0") == "\\u202e⇥\\x00"
    assert page.visible("a\n b\r") == "a↵\n b\\r"


def test_refusals(tmp_path):
    """One line on standard error that says what to do, exit status 2, and no page."""
    for arguments, said in {
        ("--rosters", "4"): "--prompt",
        ("--prompt", ""): "at least 1",
        ("--prompt", "x", "--rosters", "0"): "from 1 to 1024",
        ("--prompt", "x", "--tau", "-1"): "from 0 to 100",
        ("--prompt", "x", "--skip", "2"): "needs a number as --tau, not a tau.json",
        ("--prompt", "x", "--model", tmp_path / "none"): "there is no directory",
        ("--prompt", "x", "--chat"): "no chat template",
        ("--prompt", "x", "--output", tmp_path): "give --output a file",
        ("--prompt", "x", "--output", tmp_path / "none" / "page.html"): "give --output a file",
        ("--prompt", "x " * 600): "context",
    }.items():
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and said in result.stderr, (arguments, result.stderr)
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("page.py: error: ")
    assert not list(tmp_path.iterdir())


# ---- In the browser -------------------------------------------------------------------------------------------------


def test_opens_alone(opened, made):
    """Without an error on the console, which `opened` sees to, and without asking for anything."""
    browser = opened(made)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert len(select(browser, ".token")) == 60
    chosen = browser.find_element("css selector", "[aria-selected=true]")
    assert "overrules" in chosen.get_attribute("class")  # the first of them is shown, if there is one


@pytest.mark.parametrize("i", [0, 4, 21, 59])
def test_click(opened, made, truth, i):
    """The experts that `route` chose, what brought them, and the predictions that `predict` made."""
    tokenizer, written, found = truth
    logits, chosen = found[i]
    browser = opened(made)
    select(browser, ".token")[i].click()
    assert text(browser, "#where").startswith(f"token {i + 1} of 60: ")
    table = browser.execute_script("""
        return [...document.querySelectorAll("#way tr")].slice(1).map((row) => [...row.querySelectorAll(".grid")].map(
            (grid) => [...grid.children].map((expert) => expert.className)))""")
    clean_layers = sum(len(indices) == 1 for _, indices in chosen)
    for r, shown in enumerate(table):
        shown = shown if r == 0 else table[0][:clean_layers] + shown
        for classes, (routed, indices) in zip(shown, chosen, strict=True):
            row = indices[r] if len(indices) > 1 else indices[0]
            assert [e for e, kind in enumerate(classes) if kind] == sorted(row)
            by_itself = routed[r if len(routed) > 1 else 0].topk(2).indices.tolist()
            for e in row:
                kind = "clean" if e in indices[0] else "input" if e in by_itself else "noise"
                assert classes[e] == kind
    guesses = [guess.text.split() for guess in select(browser, ".guess")]
    best = logits.softmax(-1).topk(3)
    names = [page.name(tokenizer.decode([e])) for e in best.indices.flatten().tolist()]
    assert [name for name, _ in guesses] == names
    shown = torch.tensor([float(p) for _, p in guesses]).view(ROSTERS, 3)
    torch.testing.assert_close(shown, best.values, **FOUR_DIGITS)
    last = chosen[-1][1]
    for m in range(ROSTERS, 0, -1):  # the sentence on the layer without noise follows the slider
        others = ", ".join(str(r) for r, row in enumerate(last[:m]) if set(row) != set(last[0]))
        said = f"rows that choose other experts than row 0 here, because their input differs: {others}."
        said = said if others else "here all rows still choose the same experts."
        assert text(browser, "#inputs") == f"Layer 5's router gets no noise; {said}"
        press(browser, "ARROW_LEFT", "#m")


def test_slider(opened, made, truth):
    """For every m: the average is `aggregate` of the first m rows, and so is what it would have chosen."""
    tokenizer, written, found = truth
    browser = opened(made)
    everywhere = [roe.aggregate(torch.stack([logits[:m] for logits, _ in found], 1)) for m in range(1, ROSTERS + 1)]
    slider = browser.find_element("id", "m")
    assert slider.accessible_name.startswith("rosters averaged")
    for m in range(ROSTERS, 0, -1):
        assert text(browser, "#count") == f"{m} of {ROSTERS}"
        log_probs = everywhere[m - 1]
        choices, first = log_probs.argmax(-1).tolist(), [logits.argmax(-1).tolist() for logits, _ in found]
        seen = browser.execute_script("""
            return [...document.querySelectorAll(".token")].map((token) => [token.dataset.other, token.dataset.count,
                token.classList.contains("overrules"), token.style.getPropertyValue("--doubts")])""")
        for i, (other, count, overrules, doubts) in enumerate(seen):
            agree = sum(choice == written[i] for choice in first[i][:m])
            assert other == ("" if choices[i] == written[i] else page.name(tokenizer.decode([choices[i]])))
            assert count == ("" if agree == m else str(agree))
            assert float(doubts) == pytest.approx(1 - agree / m)
            assert overrules == (choices[i] != first[i][0])
        overruled = sum(choice != rows[0] for choice, rows in zip(choices, first))
        others = sum(choice != token for choice, token in zip(choices, written))
        rows = "row 0 alone" if m == 1 else f"the first {m} rows"
        assert text(browser, "#summary") == (
            f"The average of {rows} overrules the clean path at {overruled} of 60 positions. "
            f"At {others} of 60 positions it would have put another token than the one shown."
        )
        assert text(browser, "#average > b") == f"average of {rows}"
        assert f"1 → {m}" in text(browser, "#way tr") and f"{m} → 1" in text(browser, "#way tr")
        total = log_probs.gather(-1, torch.tensor(written)[:, None]).sum().item()
        shown = float(text(browser, "figure:last-child figcaption b"))
        assert shown == pytest.approx(total, abs=0.005 + 1e-4)
        for i in (4, 21, 38):
            browser.execute_script("document.getElementById(`token${arguments[0]}`).click()", i)
            probs = log_probs[i].exp()
            names = {page.name(tokenizer.decode([e])): probs[e] for e in data_of(made)["tokens"][i]["ids"]}
            lines = [line.text.split() for line in select(browser, ".candidate")]
            torch.testing.assert_close(
                torch.tensor([float(p) for _, p in lines]),
                torch.stack([names[name] for name, _ in lines]),
                **FOUR_DIGITS,
            )
            assert text(browser, "b.candidate .name") == page.name(tokenizer.decode([choices[i]]))
            assert ("overrules" in text(browser, "#average p")) == (choices[i] != first[i][0])
            assert float(text(browser, "figcaption b")) == pytest.approx(probs[written[i]].item(), abs=0.5e-4 + 1e-6)
            assert len(select(browser, "#way tr.out")) == ROSTERS - m
        press(browser, "ARROW_LEFT", "#m")


def test_arrow_keys(opened, made):
    browser = opened(made)
    place = lambda: int(re.search(r"token (\d+) of 60", text(browser, "#where"))[1])
    start = place()
    press(browser, "ARROW_RIGHT")  # wherever the focus is
    press(browser, "ARROW_RIGHT")
    assert place() == start + 2
    press(browser, "ARROW_LEFT", "#text")
    assert place() == start + 1
    active = browser.find_element("id", "text").get_attribute("aria-activedescendant")
    assert active == f"token{start}" and browser.find_element("id", active).get_attribute("aria-selected") == "true"
    press(browser, "ARROW_LEFT", "#m")  # the slider's own
    assert place() == start + 1 and text(browser, "#count") == "7 of 8"
    browser.find_element("id", "previous").click()
    assert place() == start
    for _ in range(start + 2):
        press(browser, "ARROW_LEFT")
    assert place() == 1
    enabled = lambda: [browser.find_element("id", name).is_enabled() for name in ("previous", "next")]
    assert enabled() == [False, True]  # there is nothing before the first
    press(browser, "ARROW_RIGHT")
    assert enabled() == [True, True]
    reached = set()
    for _ in range(8):
        reached.add(browser.switch_to.active_element.get_attribute("id"))
        press(browser, "TAB")
    assert {"previous", "next", "m", "text"} <= reached


def test_names_for_screen_readers(opened, made):
    browser = opened(made)
    token = select(browser, ".token")[4]
    assert (token.aria_role, select(browser, "#text")[0].aria_role) == ("option", "listbox")
    assert token.accessible_name == "␣list, preferred by 5 of 8, overrules"
    grids = [grid.accessible_name for grid in select(browser, ".grid[role=img]")]
    assert len(grids) == 1 + 5 * ROSTERS
    assert all(re.fullmatch(r"row \d, layer \d: expert \d+ \(\w+\), expert \d+ \(\w+\)", name) for name in grids)
    assert [button.accessible_name for button in select(browser, "button")] == ["previous token", "next token"]


def test_phone(opened, made):
    """Nothing is wider than the screen but the table of experts, which scrolls in its place."""
    browser = opened(made, width=360)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    wide = browser.execute_script("""
        return [...document.querySelectorAll("body *:not(#way *)")].filter(
            (element) => element.getBoundingClientRect().right > 361).map((element) => element.outerHTML)""")
    assert wide == []
    way = browser.execute_script(
        "const way = document.getElementById('way'); return [way.scrollWidth, way.clientWidth]"
    )
    assert way[0] > way[1]
    assert select(browser, "#sideways")[0].is_displayed()
    assert not select(opened(made), "#sideways")[0].is_displayed()


def luminance(colour):
    """WCAG's relative luminance of r, g, b from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def parse(colour):
    """rgb(...) or color(srgb ... / alpha) as r, g, b, alpha from 0 to 1."""
    numbers = [float(number) for number in re.findall(r"[\d.e-]+", colour.replace("srgb", ""))]
    scale = 255 if colour.startswith("rgb") else 1
    return [*(number / scale for number in numbers[:3]), numbers[3] if len(numbers) > 3 else 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, made, scheme):
    """All text has WCAG's 4.5 to 1 against what is behind it."""
    browser = opened(made, scheme=scheme)
    page_colour = parse(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (luminance(page_colour) < 0.1) == (scheme == "dark")
    pairs = browser.execute_script("""
        const texts = document.querySelectorAll("p, b, a, th, td, .name, .token, .candidate, #prompt, figcaption");
        return [...texts].flatMap((element) => [null, "::before", "::after"].map((pseudo) =>
            [getComputedStyle(element, pseudo).color, pseudo ? "rgba(0, 0, 0, 0)"
                : getComputedStyle(element).backgroundColor]))""")
    for ink, behind in {tuple(pair) for pair in pairs}:
        *over, alpha = parse(behind)
        behind = [alpha * o + (1 - alpha) * p for o, p in zip(over, page_colour)]
        high, low = sorted([luminance(parse(ink)), luminance(behind)], reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, behind)


def test_print(opened, made):
    """The chosen token's way, its average and its curves, and nothing to operate."""
    browser = opened(made, scheme="dark", media="print")
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert luminance(parse(background)[:3]) == pytest.approx(1)  # paper is white
    select(browser, ".token")[21].click()
    assert not any(element.is_displayed() for element in select(browser, "button, input, .screen"))
    assert text(browser, "#which") in text(browser, "#where")
    assert all(element.is_displayed() for element in select(browser, "#way, #average, #curves"))
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 4


@pytest.mark.parametrize("arguments", [["--rosters", 1], ["--rosters", 3, "--tau", 0], ["--rosters", 2, "--skip", 0]])
def test_corners(opened, tmp_path, arguments):
    """One roster; no noise at all; noise in the first and the last layer."""
    tau = [] if "--skip" not in arguments else ["--tau", 0.3]
    assert (
        run("--prompt", PROMPT, "--max-new-tokens", 3, "--output", tmp_path / "page.html", *arguments, *tau).returncode
        == 0
    )
    browser = opened(tmp_path / "page.html")
    rows = select(browser, "#way tr")
    assert len(rows) == 1 + arguments[1]
    grids = len(select(browser, "#way .grid"))
    assert grids == (12 if "--skip" in arguments else 6)
    assert ("no router has noise" in text(browser, "body")) == ("--skip" not in arguments)
    assert not re.search(r"\b1 (rows|rosters|positions|tokens)\b", text(browser, "body"))


def test_hostile_model(opened, tmp_path):
    """A model of another shape whose tokens, like the prompt, are markup: all of it is shown, none of it runs."""
    torch.manual_seed(0)
    config = Config(len(HOSTILE), 64, 48, 4, 4, 4, 64, 8, 128)
    save_file(OLMoE(config).state_dict(), tmp_path / "model.safetensors")
    raw = {name: getattr(config, name) for name in config.__dataclass_fields__ if name not in ("tau", "eos_token_id")}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "olmoe"}))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(HOSTILE)}, unk_token=HOSTILE[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = tmp_path / "<b>model<"
    model.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).rename(model / name)
    file = tmp_path / "page.html"
    options = ["--rosters", 6, "--tau", 2, "--max-new-tokens", 40, "--seed", 1, "--output", file]
    prompt = "|".join(HOSTILE)
    result = run("--prompt", "-", "--model", model, *options, input=prompt)
    assert (result.returncode, result.stderr) == (0, "")
    browser = opened(file)
    assert browser.title == "Rosters of experts, token by token"
    written = {names for token in data_of(file)["tokens"] for names in token["names"]}
    assert written == {page.name(token) for token in HOSTILE}
    shown = set()
    for _ in range(40):
        shown |= {element.get_attribute("textContent") for element in select(browser, ".candidate .name")}
        press(browser, "ARROW_RIGHT")
    assert shown == written
    assert select(browser, "#prompt")[0].get_attribute("textContent") == page.visible(prompt)
    assert "<b>model<" in text(browser, "body")
    assert len(select(browser, "script")) == 2 and not select(browser, "img, b b, [onload], [onerror]")
    assert (
        len(select(browser, "#way tr:last-child .grid")) == 3 and len(select(browser, "#way tr:last-child i")) == 3 * 64
    )
    assert browser.title == "Rosters of experts, token by token"
