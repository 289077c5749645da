"""The chat page in headless Chromium, over an engine that does as it is told."""

import json
import re
import shutil

import pytest

from experiments.serve import page

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import (  # noqa: E402
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
FLAGS += ("--no-first-run", "--no-proxy-server", "--disable-dev-shm-usage")


class Page:
    """A browser at the page of a server."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def open(self):
        self.driver.get(self.server.url)
        return self

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def js(self, words, *values):
        return self.driver.execute_script(words, *values)

    def say(self, text):
        box = self.one("#text")
        for i, line in enumerate(text.split("\n")):
            if i:
                box.send_keys(Keys.SHIFT, Keys.ENTER)
            box.send_keys(line)
        box.send_keys(Keys.ENTER)

    def texts(self, role="assistant"):
        shown = "[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return self.js(f"return {shown}", f"article.{role} .text")

    def button(self, name):
        return next(b for b in self.all("button") if b.text == name and b.is_displayed())

    @property
    def idle(self):
        return self.one("#send").is_displayed()

    def kept(self):
        return json.loads(self.js("return localStorage.getItem('thimble.conversations')"))


@pytest.fixture
def until(until):
    """f(condition): returns when it holds. What the page replaces meanwhile is looked for again."""

    def wait(condition):
        def holds():
            try:
                return condition()
            except (StaleElementReferenceException, NoSuchElementException):
                return False

        until(holds)

    return wait


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


@pytest.fixture
def opened(driver, serve, until):
    """A page of a server of this test's own: a port is an origin, so nothing is left by others."""
    driver.set_window_size(1200, 900)
    driver.get_log("browser")
    found = Page(driver, serve()).open()
    until(lambda: found.one("#model").text)
    yield found
    wrong = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
    expected = ("status of 4", "status of 5", "ERR_CONNECTION")  # a refusal is told on the page
    assert not [line for line in wrong if not any(e in line["message"] for e in expected)]


def test_an_answer_comes_in_and_says_who_proposed_it(opened, until):
    opened.say("hello bye")
    until(lambda: opened.idle and opened.texts() == ["HELLO BYE "])
    assert opened.texts("user") == ["hello bye"]
    spans = opened.all("article.assistant .text span")
    colours = [(p.get_attribute("class"), p.get_property("textContent")) for p in spans]
    own, draft = [[text for kind, text in colours if kind == k] for k in ("own", "draft")]
    assert own == ["H", "O", "E"] and draft == ["ELL", " BY", " "]
    assert [kind for kind, _ in colours] == ["own", "draft"] * 3
    live = opened.one("#live").text.replace("\n", " ")
    assert "11 tokens" in live and "8 proposed by the draft" in live
    assert "3.33 tokens a pass (tau)" in live and "13.33 tokens/s" in live
    assert "4.00 GB/s streamed" in live
    assert opened.one("#model").text == "tiny: 3 of 12 layers resident, 0.93 GiB stream a pass"
    opened.one("#show-tokens").click()
    until(lambda: not opened.all("article.assistant .text span"))
    assert opened.texts() == ["HELLO BYE "]


def test_text_streams_and_can_be_stopped(opened, until):
    gate, stats = opened.server.engine.gate, opened.server.scheduler.stats
    opened.say("slow")
    until(lambda: stats()["running"] == 1)
    assert not opened.idle
    for n in (1, 5, 9):
        gate.release()
        until(lambda n=n: opened.texts() == [("SLOW " * 3)[:n]])
    opened.one("#stop").click()
    until(lambda: opened.idle and "stopped" in opened.one("article.assistant .tools").text)
    running = opened.server.scheduler._running
    heard = lambda: all(r.ticket.cancelled for r in running)  # before a further round begins
    until(heard)
    gate.release()
    until(lambda: stats()["finished"]["cancelled"] == 1)
    assert opened.texts() == [("SLOW " * 3)[:9]]
    opened.say("slow")
    until(lambda: stats()["running"] == 1)
    opened.one("#text").send_keys(Keys.ESCAPE)
    until(heard)
    gate.release()
    until(lambda: opened.idle and stats()["finished"]["cancelled"] == 2)
    opened.say("then bye")
    until(lambda: opened.texts()[-1] == "THEN BYE ")


def test_conversations_stay_after_a_reload_and_can_be_deleted(opened, until):
    opened.say("first bye")
    until(lambda: opened.idle and len(opened.texts()) == 1)
    opened.button("New conversation").click()
    assert opened.texts() == []
    opened.say("second\nline bye")
    until(lambda: opened.idle and opened.texts() == ["SECOND\nLINE BYE "])
    opened.driver.refresh()
    until(lambda: opened.texts() == ["SECOND\nLINE BYE "])
    assert opened.texts("user") == ["second\nline bye"]
    names = [b.text.replace("\n", " ") for b in opened.all("#list li button:first-child")]
    assert names == ["second line bye", "first bye"]
    opened.button("first bye").click()
    until(lambda: opened.texts() == ["FIRST BYE "])
    opened.say("third bye")  # what was said before is sent along
    until(lambda: opened.idle and len(opened.texts()) == 2)
    current = next(c for c in opened.kept() if c["messages"][0]["content"] == "first bye")
    said = [(m["role"], m["content"]) for m in current["messages"]]
    assert said == [("user", "first bye"), ("assistant", "FIRST BYE "),
                    ("user", "third bye"), ("assistant", "THIRD BYE ")]  # fmt: skip
    prompt = "user: first bye\nassistant: FIRST BYE \nuser: third bye\nassistant:"
    assert opened.server.scheduler.stats()["prompt_tokens"] == len(prompt) + sum(
        len(f"user: {text}\nassistant:") for text in ("first bye", "second\nline bye")
    )
    opened.one("#list li [aria-label='Delete first bye']").click()
    until(lambda: opened.texts() == ["SECOND\nLINE BYE "])
    assert len(opened.kept()) == 1


def test_two_tabs_have_the_same_conversations(opened, until):
    first = opened.driver.current_window_handle
    opened.say("one bye")
    until(lambda: opened.idle and opened.texts() == ["ONE BYE "])
    opened.driver.switch_to.new_window("tab")
    try:
        opened.open().say("two bye")
        until(lambda: opened.idle and opened.texts() == ["ONE BYE ", "TWO BYE "])
        opened.driver.close()
    finally:
        opened.driver.switch_to.window(first)
    until(lambda: opened.texts() == ["ONE BYE ", "TWO BYE "])
    opened.say("three bye")
    until(lambda: opened.idle and len(opened.texts()) == 3)
    assert [len(c["messages"]) for c in opened.kept()] == [6]


def test_a_message_can_be_edited(opened, until):
    for text in ("one bye", "two bye"):
        opened.say(text)
        until(lambda t=text: opened.idle and opened.texts()[-1:] == [f"{t.upper()} "])
    opened.all("article.user button")[0].click()
    assert opened.one("#text").get_property("value") == "one bye" and opened.texts() == []
    opened.one("#text").send_keys(" and again", Keys.ENTER)
    until(lambda: opened.idle and opened.texts() == ["ONE BYE AND AGAIN "])


def test_errors_are_told_and_can_be_tried_again(opened, until):
    opened.say("broken bye bye bye")
    until(lambda: opened.idle and opened.all("[role=alert]"))
    assert "the model computes NaN" in opened.one("[role=alert]").text
    opened.say("x" * 2100)
    until(lambda: opened.idle and "2000 of a conversation" in opened.one("[role=alert]").text)
    opened.button("New conversation").click()
    opened.server.scheduler.queue = -1  # room for none
    opened.say("full bye")
    until(lambda: opened.idle and "(again in " in opened.one("[role=alert]").text)
    opened.server.scheduler.queue = 64
    opened.button("Try again").click()
    until(lambda: opened.idle and opened.texts() == ["FULL BYE "])
    assert not opened.all("[role=alert]")
    opened.server.server.should_exit = True
    opened.server.thread.join(30)
    opened.say("gone bye")
    until(lambda: opened.all("[role=alert]"))
    assert "The server cannot be reached." in opened.one("[role=alert]").text


def test_a_key_and_the_settings_are_sent(driver, serve, until):
    server = serve(api_key="sesame")
    found = Page(driver, server).open()
    until(lambda: "API key is missing" in found.one("#model").text)
    found.one("#key").send_keys("sesame", Keys.TAB)
    until(lambda: found.one("#model").text.startswith("tiny: "))
    for box, value in (("#system", "be kind"), ("#temperature", "0.5"), ("#most", "3")):
        found.one(box).send_keys(value, Keys.TAB)
    driver.refresh()
    until(lambda: found.one("#model").text.startswith("tiny: "))
    found.say("hello")
    until(lambda: found.idle and found.texts() == ["HEL"])
    assert "cut at the most tokens" in found.one("article.assistant .tools").text
    assert server.engine.samplers[0][0].temperature == 0.5
    stats = server.scheduler.stats()
    assert stats["prompt_tokens"] == len("system: be kind\nuser: hello\nassistant:")


MARKDOWN = """\
# a **b**

c *d* `e<f>` [g](https://example.com/) [h](javascript:alert(1))

- i
- **j**

3. k

```
l <b> *m*
```

> n

| o | p |
|---|---|
| q | *r* |

<img src=x onerror=alert(1)> <script>alert(2)</script> bye"""
HTML = (
    "<h4>A <strong>B</strong></h4>"
    '<p>C <em>D</em> <code>E&lt;F&gt;</code> <a href="https://example.com/" target="_blank"'
    ' rel="noopener noreferrer">G</a> [H](JAVASCRIPT:ALERT(1))</p>'
    '<ul><li>I</li><li><strong>J</strong></li></ul><ol start="3"><li>K</li></ol>'
    "<pre><code>L &lt;B&gt; *M*</code></pre><blockquote>N\n</blockquote>"
    "<table><tr><th>O</th><th>P</th></tr><tr><td>Q</td><td><em>R</em></td></tr></table>"
    "<p>&lt;IMG SRC=X ONERROR=ALERT(1)&gt; &lt;SCRIPT&gt;ALERT(2)&lt;/SCRIPT&gt; BYE</p>"
)


def test_markdown_becomes_nodes_and_never_html(opened, until):
    """An answer is what was said, in capitals. Links need small letters: they are said by hand."""
    opened.js("window.alert = () => { window.alerted = true; }")
    shown = """
      const made = markdown(arguments[0], arguments[1] ? painter(arguments[1]) : plain);
      const box = document.createElement("div");
      box.append(...made);
      return box.innerHTML;
    """
    text = MARKDOWN.upper().replace("HTTPS://EXAMPLE.COM", "https://example.com")
    assert opened.js(shown, text, None) == HTML
    whole = opened.js(shown, text, [[c, i % 3 == 0] for i, c in enumerate(text)])
    spans = '<span class="{}" title="[^"]*">([^<]*)</span>'
    assert re.sub(spans.format("(?:own|draft)"), r"\1", whole) == HTML
    for drafted in (True, False):  # one part: one span for each piece of text
        painted = opened.js(shown, text, [[text, drafted]])
        assert re.sub(spans.format("draft" if drafted else "own"), r"\1", painted) == HTML
    for cut in range(len(text)):  # whatever has come so far is shown
        assert isinstance(opened.js(shown, text[:cut], None), str)
    opened.say("<img src=x onerror=alert(1)> **b** bye")
    until(lambda: opened.idle and opened.texts() == ["<IMG SRC=X ONERROR=ALERT(1)> B BYE "])
    assert not opened.all("article img") and opened.all("article.assistant strong")
    assert not opened.js("return window.alerted")


def test_the_policy_forbids_what_the_page_does_not_do(opened):
    _, headers, text = opened.server.ask("GET", "/")
    policy = headers["content-security-policy"]
    assert policy == page.load()[1] and "default-src 'none'" in policy and "unsafe" not in policy
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "").replace(
        "https?:", ""
    ).replace("https://…", "")
    loaded = opened.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert loaded and all(name.startswith((opened.server.url, "data:")) for name in loaded)
    refused = opened.js(
        "try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return e.name; } return 'done';"
    )
    assert refused == "TypeError"
    opened.driver.get_log("browser")  # which names that refusal


def test_it_is_usable_on_a_phone_and_by_keyboard(opened, until):
    opened.driver.set_window_size(500, 844)  # Chromium has no narrower window; see the width below
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
        width=360, height=740, deviceScaleFactor=2, mobile=True))  # fmt: skip
    try:
        opened.open()
        until(lambda: opened.one("#model").text)
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        opened.say(f"{'w' * 300} bye")
        until(lambda: opened.idle and opened.texts())
        assert opened.js(wide) == 0
        for small in [b for b in opened.all("button, #text") if b.is_displayed()]:
            assert small.size["height"] >= 32
        menu, side = opened.one("#drawer"), opened.one("#side")
        assert not side.is_displayed() and menu.get_attribute("aria-expanded") == "false"
        menu.send_keys(Keys.ENTER)
        assert side.is_displayed() and menu.get_attribute("aria-expanded") == "true"
        menu.send_keys(Keys.ESCAPE)
        assert not side.is_displayed() and opened.driver.switch_to.active_element == menu
    finally:
        opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name_and_colours_can_be_chosen(opened, until):
    names = opened.js("""
      return [...document.querySelectorAll("button, input, textarea, nav, section, [role]")]
        .map((e) => [e.id || e.outerHTML.slice(0, 60),
          e.getAttribute("aria-label") || (e.labels && e.labels[0]?.textContent) || e.textContent
          || e.getAttribute("role")]);
    """)
    assert names and not [name for name, label in names if not (label or "").strip()]
    ground = lambda: opened.js("return getComputedStyle(document.body).backgroundColor")
    seen = {}
    for _ in range(3):
        opened.one("#theme").click()
        seen[opened.one("#theme").text] = ground()
    assert set(seen) == {"Auto", "Light", "Dark"} and seen["Light"] != seen["Dark"]
    opened.one("#theme").click()
    opened.driver.refresh()
    until(lambda: opened.one("#theme").text == "Light" and ground() == seen["Light"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_can_be_read_on_their_ground(opened, theme):
    """Contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3), by the formula there."""
    colours = opened.js("""
      document.documentElement.dataset.theme = arguments[0];
      const probe = document.createElement("span");
      document.body.append(probe);
      const out = {};
      for (const name of ["ground", "panel", "ink", "quiet", "accent", "draft", "own", "wrong"]) {
        probe.style.color = `var(--${name})`;
        out[name] = getComputedStyle(probe).color.match(/\\d+/g).slice(0, 3).map(Number);
      }
      return out;
    """, theme)  # fmt: skip

    def light(rgb):
        linear = [c / 3294.6 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    pairs = [("ink", ground) for ground in ("ground", "panel", "draft", "own")]
    pairs += [("quiet", "ground"), ("quiet", "panel"), ("accent", "ground"), ("wrong", "ground")]
    for words, ground in pairs:
        low, high = sorted(light(colours[name]) for name in (words, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (theme, words, ground)
