"""The module that shows answers as Markdown, in a browser, under the pages' own Content-Security-Policy."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from playwright.sync_api import ConsoleMessage, Dialog, Page, Request, expect

from tests.support.browser import browser_page
from tests.support.processes import listening
from web.pages import CONTENT_SECURITY_POLICY, static_file, vendor_file

ROOT = Path(__file__).parent.parent
XSS = json.loads((ROOT / "tests" / "xss.json").read_text())

# Answers with every construct; each with what is likely to go wrong while it is half there.
DOCUMENTS = {
    "headings": "# One\n\nTwo\n===\n\ntext\n---\n\n#### Four **bold**\n\n###### Six\n\n#hashtag\n",
    "paragraphs": "Fi"
    "rst line\nsecond line  \nthird\\\nfourth *and **both** of* it, __strong__ _em_ ~~gone~~ `co*de*`.\n\nNext.\n",
    "tight lists": "Look:\n- one\n- two **bold**\n  - inner\n  - inner two\n    1. deep\n- three\n\n"
    "1. a\n2. b\n10. c\n\n3) x\n4) y\n",
    "loose lists": "- one\n\n- two\n\n  more of two\n\n      code of two\n- three\n\n1. a\n\n"
    "   ```js\n   let x = 1;\n   ```\n\n2. b\n",
    "loose in the end": "- one\n- two\n- three\n\n  late\n- four\n\n\n\npara\n",
    "tasks": "- [ ] todo\n- [x] done `x`\n- [X] done too\n  - [ ] inner\n\n* [ ] loose\n\n* [x] loose too\n",
    "list, then text": "- a\n- b\nlazy\n\ntext\n\n* c\n+ d\n\n1. e\n\n2\n\n2. f\n- - -\n- g\n",
    "table": "Rows:\n\n"
    "| a | b | c |\n|:--|:-:|--:|\n| 1 | **2** | `3` |\n| x \\| y | <br>z |\n| 7 | 8 | 9 | 10 |\n\nafter\n",
    "tables that are none": "| a | b |\n\n|---|\n\na | b\n-|-x\n\npara\na | b\n--|--\n1 | 2\nrow\n\n"
    "| a |\n|---|\n> quote\n",
    "code": "```python\ndef f():\n    return '`'\n\n\n``\n~~~\n```\n\n~~~\nplain\n```\n~~~\n\n"
    "    indented\n\n    more\n\n````md\n```\n````\nend\n",
    "empty code": "```\n```\n\n```sh\n\n```\n\ntext\n",
    "quotes": "> one\n> two\nlazy\n>\n> > inner\n>\n> - list\n> - list two\n>\n> ```c\n> int x;\n> ```\n\npara\n",
    "rules": "a\n\n---\n\n***\n___\nb\n",
    "links": '[a](https://e.org "t") <https://e.org/?a=1&b=2> www.e.org me@e.org [b]( <https://e.org/a b> ) ![i](https://e.org/i.png)'
    " [![c](https://e.org/c.png)](https://e.org) [**d** `e`](https://e.org/d_(e)) [no](/here) ftp://e.org/f\n",
    "definitions": '[one]: https://e.org/1 "One"\n[two]: <https://e.org/2>\n\n[One] and [x][two] and [three].\n',
    "entities": "&l"
    "t;b&gt; &amp;lt; &#60; &#x3C; &copy; &nbsp; &nosuch; AT&T &#0; `&lt;` \\&lt; [&quot;](https://e.org/?a&amp;b)\n",
    "html": "<div class='x'>\n*not*\n</div>\n\n<b>bold</b> <!-- no --> a<br>b\n\n<!-- c\n\nd -->\n\n"
    "<script>\nx\n\ny</script>\n\nend\n",
    "math": "$x^2$ costs $5 and $10, \\(a_1 * b * c\\) *x $a*b$ y*\n\n$$\nx = 1\n- y\n$$\n\n"
    "So:\n\\[\n\\frac{a}{b}\n\\]\nand $$z$$ too\n",
    "math that is none": "$$\nopen\n\nnext $ a$ $a $ \\$x\\$ $`c`$ \\(open\n\n- $$\n  y\n  $$\n- $$ open\n",
    "unclosed": "**bold *em `code [link](https://e.org\n\n- **a\n- `b\n\n> **c\n",
    "right to left": "مرحبا بالعالم\n\n- عنصر\n- item\n\n> שלום `code`\n",
    "carriage returns": "one\r\ntwo\r\n\r\n- a\r\n- b\r\rend\r\n",
    "odd": "*\n**\n\n-\n\n1.\n\n>\n\n#\n\n|\n|-\n\n[\n\n`\n\n\\\n\n&\n\n"
    + "> " * 30
    + "deep\n\n"
    + "[" * 50
    + "*a **b " * 20
    + "\n",
}
# Where the definition stands below what refers to it, which is known only at the end.
LATE = "[one] is\n\n- [x][one]\n\n[one]: https://e.org/1\n\nlast\n"

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Markdown</title>
<link rel="stylesheet" href="/static/css/theme.css"><link rel="stylesheet" href="/static/css/markdown.css">
<body><div id="one"></div><div id="two"></div></body></html>"""

# What the tests use in the page. Frames come when they are asked for, so that a test takes no longer than its work.
HARNESS = """async () => {
  const { MarkdownView, ready } = await import("/static/js/markdown/view.js");
  await ready;
  let frames = [];
  window.requestAnimationFrame = (frame) => frames.push(frame);
  window.cancelAnimationFrame = () => (frames = []);
  const view = (id, options) => {
    document.getElementById(id).replaceWith(Object.assign(document.createElement("div"), { id }));
    return new MarkdownView(document.getElementById(id), options);
  };
  const frame = () => frames.splice(0).forEach((each) => each());
  const whole = (text) => {
    const made = view("one");
    made.set(text);
    return made;
  };
  const append = (made, chunks) => {
    for (const chunk of chunks) {
      made.append(chunk);
      frame();
    }
  };
  Object.assign(window, { view, whole, append, frame, one: () => document.getElementById("one").innerHTML,
    two: () => document.getElementById("two").innerHTML });
}"""


@dataclass
class Site:
    """A page with the module, and what it asked for and said."""

    page: Page
    url: str
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def html(self, text: str) -> str:
        return self.page.evaluate("(text) => (whole(text), one())", text)

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = Flask(__name__, static_folder=None)
    app.add_url_rule("/static/<path:filename>", view_func=static_file)
    app.add_url_rule("/vendor/<package>/<path:name>", view_func=vendor_file)
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    app.add_url_rule("/", view_func=lambda: Response(PAGE, mimetype="text/html", headers=headers))
    app.add_url_rule("/favicon.ico", "icon", lambda: Response(status=204))
    with listening(app) as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browser_page() as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield page


@pytest.fixture
def site(browser: Page, url: str) -> Iterator[Site]:
    """A fresh document. Nothing may be said on the console, and nothing asked of others, by the end."""
    site = Site(browser, url)

    def note(request: Request) -> None:
        site.requests.append(request.url.removeprefix(url))

    def hear(message: ConsoleMessage) -> None:
        site.said.append(message.text)

    browser.on("request", note)
    browser.on("console", hear)
    browser.goto(url)
    browser.evaluate(HARNESS)
    yield site
    browser.remove_listener("request", note)
    browser.remove_listener("console", hear)
    assert site.said == []
    assert not [each for each in site.requests if "://" in each]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# One\n\n##### Five", '<h3 dir="auto">One</h3><h6 dir="auto">Five</h6>'),
        (
            "a *b* **c** ~~d~~ `e`",
            '<p dir="auto">a <em>b</em> <strong>c</strong> <del>d</del> <code dir="ltr">e</code></p>',
        ),
        ("a  \nb\\\nc\nd", '<p dir="auto">a<br>b<br>c\nd</p>'),
        ("---", '<hr dir="auto">'),
        ("> a\n> > b", '<blockquote dir="auto"><p>a</p><blockquote><p>b</p></blockquote></blockquote>'),
        ("- a\n  - b", '<ul dir="auto" class=""><li><p>a</p><ul class=""><li><p>b</p></li></ul></li></ul>'),
        ("3. a\n4. b", '<ol dir="auto" start="3" class=""><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("- a\n\n- b", '<ul dir="auto" class="loose"><li><p>a</p></li><li><p>b</p></li></ul>'),
        (
            "- [x] a",
            '<ul dir="auto" class=""><li class="task">'
            '<input type="checkbox" disabled="" checked="" aria-label="Done"><p>a</p></li></ul>',
        ),
        (
            "|a|b|\n|-|-:|\n|1|2|",
            '<div class="table" role="region" aria-label="Table" tabindex="0" dir="auto"><table><thead><tr>'
            '<th class="" scope="col">a</th><th class="to-right" scope="col">b</th></tr></thead>'
            '<tbody><tr><td class="">1</td><td class="to-right">2</td></tr></tbody></table></div>',
        ),
        (
            "```\na <b>\n```",
            '<div class="code" dir="ltr"><div><span></span><button type="button" class="quiet" aria-label="Copy code">'
            'Copy</button></div><pre tabindex="0"><code>a &lt;b&gt;</code></pre></div>',
        ),
        (
            "&lt; &amp;lt; &copy; &#60; `&lt;` &nosuch;",
            '<p dir="auto">&lt; &amp;lt; © &lt; <code dir="ltr">&amp;lt;</code> &amp;nosuch;</p>',
        ),
        ("<b>x</b> a<br/>b", '<p dir="auto">&lt;b&gt;x&lt;/b&gt; a<br>b</p>'),
        ("<div>\n*x*\n</div>", '<p class="html" dir="auto">&lt;div&gt;\n*x*\n&lt;/div&gt;</p>'),
        ("[a](/b) [c](ftp://d)", '<p dir="auto"><span>a</span> <span>c</span></p>'),
        ("$5 and $10, $a$1", '<p dir="auto">$5 and $10, $a$1</p>'),
    ],
)
def test_construct(site: Site, text: str, html: str) -> None:
    assert site.html(text) == html


@pytest.mark.parametrize(
    ("text", "href", "words"),
    [
        ("[a](https://e.org/?x=1&amp;y=2)", "https://e.org/?x=1&y=2", "a"),
        ("<https://e.org/?x=1&y=2>", "https://e.org/?x=1&y=2", "https://e.org/?x=1&y=2"),
        ("www.e.org", "http://www.e.org/", "www.e.org"),
        ("me@e.org", "mailto:me@e.org", "me@e.org"),
        ("![picture](https://e.org/p.png)", "https://e.org/p.png", "picture"),
        ("![](https://e.org/p.png)", "https://e.org/p.png", "https://e.org/p.png"),
        ("[a]\n\n[a]: https://e.org/a", "https://e.org/a", "a"),
        ("[![a](https://e.org/i)](https://e.org/l)", "https://e.org/l", "a"),
    ],
)
def test_link(site: Site, text: str, href: str, words: str) -> None:
    site.html(text)
    (link,) = site.page.locator("#one a").all()
    attributes = {name: link.get_attribute(name) for name in ("href", "target", "rel")}
    assert attributes == {"href": href, "target": "_blank", "rel": "noopener noreferrer nofollow"}
    assert link.text_content() == words


def chunkings(text: str, rng: random.Random) -> Iterator[list[str]]:
    yield list(text)
    for longest in (3, 8, 30):
        chunks, at = [], 0
        while at < len(text):
            size = rng.randint(1, longest)
            chunks.append(text[at : at + size])
            at += size
        yield chunks


# `before` must not differ either: what was settled while the text came was settled rightly.
STREAM = """([text, chunkings, exactly]) => {
  whole(text);
  const expected = one();
  const wrong = [];
  for (const chunks of chunkings) {
    const made = view("two");
    append(made, chunks);
    const before = two();
    made.end();
    if (two() !== expected) wrong.push([two(), expected, chunks]);
    else if (exactly && before !== expected) wrong.push([before, expected, chunks]);
    else if (made.text !== text) wrong.push(made.text);
  }
  return wrong;
}"""
# What only the end decides: a formula that is never closed.
DECIDED_LATE = {"math that is none"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_streamed_is_the_same_as_whole(site: Site, name: str) -> None:
    text = DOCUMENTS[name] + "\n\nEnd.\n"
    all_chunkings = list(chunkings(text, random.Random(name)))
    assert site.evaluate(STREAM, [text, all_chunkings, name not in DECIDED_LATE]) == []


def test_long_answers_streamed_are_the_same_as_whole(site: Site) -> None:
    rng = random.Random(20)
    for _ in range(12):
        names = rng.choices([*DOCUMENTS], k=8)
        text = rng.choice(["\n", "\n\n"]).join(DOCUMENTS[name] for name in names) + LATE
        some = [chunks for chunks in chunkings(text, rng)][1:]
        assert site.evaluate(STREAM, [text, some, False]) == [], names


def test_late_definition(site: Site) -> None:
    assert site.evaluate(STREAM, [LATE, list(chunkings(LATE, random.Random(1))), False]) == []
    assert site.page.locator("#two a").count() == 2


# What an answer may consist of. KaTeX's own elements are within `.katex`, and hold no links.
ELEMENTS = (
    "p h3 h4 h5 h6 ul ol li input blockquote div table thead tbody tr th td pre code span button hr br a em strong del"
)
FORBIDDEN = """(allowed) => [...document.querySelectorAll("#one *, #two *")].flatMap((node) => {
  const wrong = [];
  const formula = node.closest(".katex, .katex-error");
  const tag = node.localName;
  if (formula ? /^(a|img|image|script|iframe|object|embed|style|foreignobject)$/.test(tag) : !allowed.includes(tag)) {
    wrong.push(tag);
  }
  for (const { name, value } of node.attributes) {
    const bad = ["src", "srcdoc", "action", "formaction", "xlink:href", "id"];
    if (name.startsWith("on") || bad.includes(name)) wrong.push(name);
    if (!formula && name === "style") wrong.push(name);
    if (name === "href" && !/^(https?:\\/\\/|mailto:)/.test(value)) wrong.push(value);
  }
  return wrong.length ? [[wrong, node.outerHTML]] : [];
})"""


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_nothing_runs_and_nothing_is_loaded(site: Site, streamed: bool) -> None:
    dialogs: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    site.page.once("dialog", dismiss)
    assert len(XSS) >= 60
    site.evaluate(f"window.forbidden = {FORBIDDEN}; undefined")
    found = site.evaluate(
        """async ([texts, streamed, allowed]) => {
          const found = [];
          for (const text of texts) {
            if (streamed) {
              const made = view("two");
              for (const character of text) {
                append(made, [character]);
                found.push(...forbidden(allowed).map((each) => [text, each]));
              }
              made.end();
            } else whole(text);
            found.push(...forbidden(allowed).map((each) => [text, each]));
          }
          // Together, so that formulas and colours are there as well.
          whole(texts.join("\\n\\n"));
          return found;
        }""",
        [XSS, streamed, ELEMENTS.split()],
    )
    assert found == []
    site.page.wait_for_selector("#one .katex")
    site.page.wait_for_selector("#one .hljs-tag")
    site.page.wait_for_timeout(300)  # for whatever else may come
    assert site.evaluate(FORBIDDEN, ELEMENTS.split()) == []
    assert site.evaluate("window.__xss") is None
    assert dialogs == []
    assert site.page.url == site.url
    assert not [each for each in site.requests if each and not each.startswith(("static/", "vendor/", "favicon"))]


def test_nodes_stay_while_the_text_grows(site: Site) -> None:
    text = "\n\n".join(DOCUMENTS[name] for name in ("paragraphs", "tight lists", "table", "code", "quotes")) + "\n\nEnd"
    changed = site.evaluate(
        """(text) => {
          const made = view("two");
          const root = document.getElementById("two");
          const before = new Map();
          const gone = [];
          for (let end = 0; end < text.length; end += 1) {
            append(made, [text[end]]);
            // All but the last block: what has been read stays what it is.
            for (const [node, html] of before) if (!node.isConnected || node.outerHTML !== html) gone.push(html);
            before.clear();
            for (const node of [...root.children].slice(0, -2)) {
              before.set(node, node.outerHTML);
              for (const each of node.querySelectorAll("*")) before.set(each, each.outerHTML);
            }
          }
          return gone;
        }""",
        text,
    )
    assert changed == []


@pytest.mark.parametrize(
    ("text", "selector", "more"),
    [
        ("```\nlet x = 1;\n", "code", "let y;\nlet z;\n"),
        ("- one\n- two\n", "li:first-child", "- three\n\n- four **b**\n- five"),
        ("| a |\n|---|\n| 1 |\n", "tbody > tr:first-child", "| 2 |\n| **3** |\n"),
        ("> one **two**\n>\n", "strong", "> - three\n> - four\n\nfive"),
        ("A **bold** `word", "code", "s` and [more](https://e.org)"),
        ("Some **bold wor", "strong", "ds** that go on"),
    ],
)
def test_a_node_and_its_selection_stay(site: Site, text: str, selector: str, more: str) -> None:
    site.evaluate(
        """([text, selector]) => {
          window.made = view("two");
          append(made, text);
          window.node = document.querySelector(`#two ${selector}`);
          getSelection().selectAllChildren(node);
          window.selected = getSelection().toString();
        }""",
        [text, selector],
    )
    assert site.evaluate("selected.length > 0")
    site.evaluate("(more) => { append(made, more); made.end(); }", more)
    assert site.evaluate("node.isConnected && getSelection().toString().startsWith(selected)")


def test_frames(site: Site) -> None:
    """Many appends make one rendering; a hidden page, which gets no frames, is rendered all the same."""
    counts = site.evaluate(
        """async () => {
          let changes = 0;
          const made = view("two", { changed: () => (changes += 1) });
          for (const word of "so many words".split(" ")) made.append(word);
          const before = changes;
          frame();
          const after = changes;
          made.append(" later");
          await new Promise((resolve) => setTimeout(resolve, 400));
          const later = [changes, two()];
          made.append(" never");
          made.close();
          frame();
          await new Promise((resolve) => setTimeout(resolve, 400));
          made.end();
          return [before, after, ...later, changes, made.text];
        }"""
    )
    assert counts == [0, 1, 2, '<p dir="auto">somanywords later</p>', 2, "somanywords later never"]


def test_loaded_when_needed(site: Site) -> None:
    site.html(
        "Text, `code`, ```\nno language\n```\n\n```nosuchlanguage\nx\n```\n\n"
        "```text\nx\n```\n\n    indented\n\n$5 and $10"
    )
    site.evaluate("append((window.made = view('two')), ['```py\\nx = 1\\n'])")
    site.page.wait_for_timeout(400)
    assert not [each for each in site.requests if "katex" in each or "highlight/" in each]
    site.evaluate("append(made, ['```\\n\\n'])")
    site.page.wait_for_selector("#two .hljs-number")
    assert [each for each in site.requests if "highlight/" in each] == [
        "vendor/highlight/core.min.js",
        "vendor/highlight/languages/python.min.js",
    ]
    assert site.page.inner_text("#two code") == "x = 1"
    site.html("$x$")
    site.page.wait_for_selector("#one .katex")
    assert {each.split("/")[-1] for each in site.requests if "katex" in each and "fonts" not in each} == {
        "katex.min.css",
        "katex.min.js",
    }


def test_code_that_goes_on_after_it_was_coloured(site: Site) -> None:
    site.evaluate("append((window.made = view('two')), ['~~~py\\nx = 1\\n```\\n'])")  # which does not close it
    site.page.wait_for_selector("#two .hljs-number")
    site.evaluate("append(made, ['y = 2\\n'])")
    assert site.page.locator("#two code").inner_html() == "x = 1\n```\ny = 2"
    site.evaluate("made.end()")
    site.page.wait_for_selector("#two .hljs-number")
    site.html("```py\n" + "x = 1\n" * 9000 + "```")
    site.page.wait_for_timeout(300)
    assert site.page.locator("#one .hljs-number").count() == 0


def test_math(site: Site) -> None:
    text = (
        "$x^2$ \\(y\\) *a $b*c$ d*\n\n$$\nz\n$$\n\nSo:\n\\[\n\\frac{1}{2}\n\\]\nthen "
        "$\\nosuch$ and $$w$$ $\\pmb{x}$ $\\fcolorbox{red}{blue}{x}$"
    )
    site.html(text)
    expect(site.page.locator("#one .katex")).to_have_count(8)
    assert site.page.locator("#one .katex-display").count() == 3
    assert site.page.locator("#one math").count() == 8
    assert site.page.locator("#one em").count() == 1
    assert "$\\nosuch$" in site.page.inner_text("#one")


def test_without_marked(browser: Page, url: str) -> None:
    warnings: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        warnings.append(message.text)

    browser.route("**/marked.esm.js", lambda route: route.abort())
    browser.on("console", hear)
    browser.goto(url)
    browser.evaluate(HARNESS)
    browser.evaluate("(whole('**a**\\n\\n<b>'), append(view('two'), ['# a', '\\nb']))")
    assert browser.evaluate("[one(), two()]") == [
        '<div class="plain">**a**\n\n&lt;b&gt;</div>',
        '<div class="plain"># a\nb</div>',
    ]
    assert any("plain text" in each for each in warnings)
    browser.remove_listener("console", hear)
    browser.unroute("**/marked.esm.js")


def test_copy_button(site: Site) -> None:
    site.html("```py\na = 1\nb = 2\n```")
    site.page.get_by_role("button", name="Copy code").click()
    site.page.wait_for_selector("#one button:text('Copied')")
    assert site.evaluate("navigator.clipboard.readText()") == "a = 1\nb = 2"
    assert site.page.locator("[aria-live=polite]").text_content() == "Copied"
    # As on a page that came by http from another host.
    site.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    site.page.wait_for_selector("#one button:text('Copy')")
    site.page.get_by_role("button", name="Copy code").click()
    site.page.wait_for_selector("#one button:text('Copied')")


def test_direction(site: Site) -> None:
    site.html("שלום\n\nhello\n\n- عنصر\n- item\n\n`x` مرحبا\n\n```\nשלום\n```\n")
    directions = site.evaluate(
        "[...document.querySelectorAll('#one > *')].map((node) => getComputedStyle(node).direction)"
    )
    assert directions == ["rtl", "ltr", "rtl", "rtl", "ltr"]


def test_narrow_page(site: Site) -> None:
    """Nothing makes the page itself scroll to the side."""
    site.page.set_viewport_size({"width": 360, "height": 640})
    wide = "x" * 400
    site.html(
        f"# {wide}\n\n{wide} `{wide}`\n\n- {wide}\n\n```py\n{wide}\n```\n\n"
        f"|{wide}|{wide}|\n|-|-|\n|a|b|\n\n> {wide}\n\n$$\n{wide}\n$$\n\n<{wide}>"
    )
    site.page.wait_for_selector("#one .katex")
    assert site.evaluate("document.documentElement.scrollWidth") <= 360
    site.page.set_viewport_size({"width": 1100, "height": 760})
