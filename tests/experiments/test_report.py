"""The report: one page that needs no other file, and says what the records say."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from experiments.__main__ import main
from experiments.errors import RunError
from experiments.record import CONTROLS, VARIANTS
from experiments.showing import figures, kept, lengths, norms, sections, table
from experiments.showing import report as reports
from experiments.showing.grid import Table
from experiments.showing.page import DARK
from experiments.showing.report import report
from experiments.showing.results import RECORDS
from tests.support.records import record, save_trace

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """A parsed page; refuses tags that do not nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self._open:
            self.texts.append((self._open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def trace(count: int = 3) -> dict:
    """A trace in which structures decay from 1 to 0 in two steps, but the first is released."""
    ks = tuple(range(count))
    decay = {"step": 0, "kind": "decay", "group": "g", "structures": ks, "norms": (1.0,) * count}
    release = {"step": 1, "kind": "release", "group": "g", "structures": (0,), "norms": (0.5,)}
    norms = [(1, {"g": dict.fromkeys(ks, 0.5)}), (2, {"g": dict.fromkeys(ks, 0.0) | {0: 1.0}})]
    return {"events": [decay | {"wave": 0}, release | {"wave": 0}], "trace": norms}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two experiments: one with all variants, three seeds and traces, one with a single run."""
    folder, located = tmp_path_factory.mktemp("runs"), []
    for i, variant in enumerate(VARIANTS + CONTROLS):
        for seed in range(3):
            released = (
                [[4, "first", 2], [9, "second", seed]] if variant in figures.RELEASING else []
            )
            run_record = record(
                variant,
                seed,
                accuracy__final=80.0 + i + seed,
                releases=released,
                latency__dense=4.0,
                latency__pruned=2.0 + i,
                loading=0.125,
                device="machine",
                threads=3,
            )
            path = folder / f"{variant}-seed{seed}" / "record.json"
            if variant in ("sp", "sr"):
                save_trace(path, run_record, trace())
            located.append((path, run_record))
    single = record(
        "base",
        0,
        config={"name": "single"},
        config_hash="f",
        data="digits",
        accuracy__dense=None,
        channels={f"layer{n}": [16, 8] for n in range(40)},
    )
    located.append((folder / "single" / "record.json", single))
    return located


@pytest.fixture(scope="module")
def content(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "made" / "report.html"
    assert report(runs, out) == out
    return out.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_its_ids_are_its_own(content):
    page = Page(content)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 50
    targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', content)
    assert {a or b for a, b in targets} <= set(ids)
    labels = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert set(labels) <= set(ids)


def test_nothing_outside_of_the_page_is_loaded(content):
    page = Page(content)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "image"})
    assert "@import" not in content
    assert set(re.findall(r"url\(([^#])", content)) == set()
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            target = attributes.get(key)
            assert target is None or target.startswith("#") or tag == "a", (tag, target)
    # The one address is the paper's, and only a link.
    assert set(re.findall(r"\w+://[^\"<\s]+", content)) == {"https://arxiv.org/abs/2406.03879"}


def test_every_figure_has_a_caption_and_says_what_it_shows(content):
    page = Page(content)
    figures, pictures = page.all("figure"), page.all("svg")
    # Overview: differences, and one per data set. First: accuracy, two norms, two of releases,
    # latency, channels.
    assert len(figures) == len(pictures) == len(page.all("figcaption")) == 1 + 2 + 7 + 3
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 40
        assert "viewbox" in picture
    assert len({p["aria-label"] for p in pictures}) == len(pictures)
    assert sum(f.get("class") == "wide" for f in figures) == 2  # the differences, and forty layers
    titles = page.words("b")
    for title in (
        "What it is worth.",
        "Accuracy against MACs, CIFAR-10.",
        "Accuracy against MACs, digits.",
        "Accuracy around removal.",
        "Norms of decaying structures, +SP, seed 0.",
        "Norms of decaying structures, +SR, seed 0.",
        "Releases over time.",
        "Releases per layer.",
        "Channels per layer.",
        "Latency, dense and pruned.",
    ):
        assert title in titles, title


def test_tables_have_heads_and_scroll_within_themselves(content):
    page = Page(content)
    heads = page.all("th")
    assert {h.get("scope") for h in heads} == {"col", "row"}
    tables = len(page.all("table"))
    assert tables == 1 + 2 * 4
    scrolling = re.findall(
        r'<div class="scroll" tabindex="0" role="region"[^>]*>\s*<(\w+)', content
    )
    assert scrolling.count("table") == tables
    assert scrolling.count("svg") == 2


def test_the_page_has_the_table_and_the_links_of_every_experiment(content, runs):
    page = Page(content)
    cells = set(page.words("td", "th"))
    for _, members in sections.sections([r for _, r in runs]):
        for line in table.markdown(members).splitlines():
            if line.startswith("| ") and not line.startswith("| --"):
                assert {c.strip() for c in line.split("|")} - {""} <= cells
    links = [a["href"] for a in page.all("a")]
    ids = [a["id"] for a in page.all("section")]
    assert ids == ["overview", "s1", "s2"]
    assert {f"#{s}" for s in ids} <= set(links)
    named = sections.short_names(sections.sections([r for _, r in runs]))
    assert [w for w in page.words("a") if w in named] == list(named)
    # All variants are explained, and named as in the table.
    assert set(sections.NAMES.values()) <= set(page.words("dt"))


def test_decays_over_several_numbers_of_steps_come_first_at_a_glance(runs, tmp_path):
    stage = {"prune": {"epochs": 1, "learning_rate": 0.002}}
    budgets = [
        record(
            variant,
            seed,
            config={"stages": stage, "smooth": {"steps": steps // 20}},
            steps__total=steps,
            accuracy__final=70.0 + gain + seed,
        )
        for variant, gain in (("base", 0.0), ("sp", 0.25), ("sr", 1.5))
        for seed in (0, 1)
        for steps in (100, 400)
    ]
    content = report(runs, tmp_path / "report.html", budgets).read_text(encoding="utf-8")
    (said,) = [p["aria-label"] for p in Page(content).all("svg") if "Differences of" in str(p)]
    first, second = said.removeprefix("Differences of final accuracy, in points. ").split("; ")[:2]
    assert "100 to 400 steps at 0.002, +SP minus base: +0.25 [" in first
    assert "100 to 400 steps at 0.002, +SR minus base: +1.50 [" in second


def test_the_kept_records_are_shown_with_those_over_several_numbers_of_steps(
    tmp_path, monkeypatch, capsys
):
    given = []
    monkeypatch.setattr(reports, "report", lambda runs, out, budgets: given.append(list(budgets)))
    (one,) = RECORDS.glob("depgraph-digits.jsonl")
    for shown in (RECORDS, one):
        assert main(["report", str(shown), "--out", str(tmp_path)]) == 0
    whole, alone = given
    assert lengths.answers(whole) == lengths.answers(kept.read([lengths.BUDGETS])) != {}
    assert alone == []


def test_speed_is_given_with_batch_threads_and_device(content):
    page = Page(content)
    cells = page.words("td")
    assert "4.00 ± 0.00" in cells
    assert "6.00 ± 0.00" in cells  # of the last control
    assert "0.67 ± 0.00" in cells
    assert "12.5 ± 0.0" in cells
    assert sum("batch 128, 3 CPU threads, machine" in text for _, text in page.texts) == 2


def test_what_figures_show_is_said_in_numbers(content):
    labels = " ".join(html.unescape(a["aria-label"]) for a in Page(content).all("svg"))
    assert "made-up, +SR: 83.00 ± 1.00% at 25.0 ± 0.0% of MACs" in labels
    assert "Final, %: base 81.00 ± 1.00; +SP 82.00 ± 1.00; +SR 83.00 ± 1.00" in labels
    assert "In all, per run: +SR 3.0 ± 1.0" in labels
    assert "first: +SR 2.0" in labels
    assert "2 decayed to zero, 1 released" in labels
    assert "All layers together: dense 58; base 28" in labels


def test_a_single_run_without_releases_or_traces_has_the_rest(tmp_path):
    run_record = record("base", 0)
    out = report([(tmp_path / "record.json", run_record)], tmp_path / "r.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert len(page.all("figure")) == 4
    assert not any("Releases" in t or "Norms" in t for t in page.words("b"))
    assert "1 run." in " ".join(page.words("p"))


def test_kept_records_and_norms_make_the_same_figures(runs, content, tmp_path):
    folder = tmp_path / "kept"
    (first, members), (_, single) = sections.sections([r for _, r in runs])
    assert "made-up" in first
    kept.keep(members + single, folder)
    norms.keep_norms(runs[:-1], folder / "made-up-norms.json")
    out = report(kept.located([folder]), tmp_path / "kept.html")
    assert out.read_text(encoding="utf-8") == content


def test_the_same_records_make_the_same_bytes(runs, content, tmp_path):
    assert report(runs, tmp_path / "again.html").read_text(encoding="utf-8") == content


def test_text_of_records_is_escaped(tmp_path):
    evil = '<script>alert("1")</script> & $x$ ${links} | `'
    run_record = record(
        "sr",
        0,
        data=evil,
        model=evil,
        device=evil,
        versions={evil: evil},
        channels={evil: [4, 2]},
        releases=[[1, evil, 2]],
    )
    out = report([(tmp_path / "record.json", run_record)], tmp_path / "r.html")
    text = out.read_text(encoding="utf-8")
    assert "<script" not in text
    assert not Page(text).all("script")
    assert html.escape('<script>alert("1")</script> & $x$ ${links}') in text


def test_records_of_one_name_but_two_configurations_are_refused(tmp_path):
    records = [record("base", 0), record("base", 1, config_hash="other")]
    out = tmp_path / "r.html"
    with pytest.raises(RunError, match="different configurations"):
        report([(tmp_path / "record.json", m) for m in records], out)
    assert not out.exists()


def test_every_colour_of_a_figure_has_one_for_dark_pages(content):
    used = set(re.findall(r"var\(--c-([0-9a-f]{6})\)", content))
    defined = re.findall(r"--c-([0-9a-f]{6}): (#[0-9a-f]{6});", content)
    assert used <= {name for name, _ in defined}
    assert defined == [(c[1:], c) for c in DARK] + [(c[1:], d) for c, d in DARK.items()]
    assert set(figures.COLOURS.values()) | set(figures.KINDS.values()) <= set(DARK)
    # Nothing in a figure is drawn in a colour that stays when the page turns dark.
    pictures = "".join(re.findall(r"<svg.*?</svg>", content, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", pictures)) == set()
    assert "currentColor" in pictures


def test_a_table_is_written_as_markdown_and_as_html():
    shown = Table(["name", "count", "a|b"], [["one", "+1.0", "x"], ["two", "-", "3"]], "Of <9>%")
    assert shown.markdown().split("\n") == [
        "Of <9>%",
        "",
        "| name | count | a\\|b |",
        "| ---- | ----- | ---- |",
        "| one  | +1.0  | x    |",
        "| two  | -     | 3    |",
    ]
    markup = shown.html()
    assert '<p class="quiet">Of &lt;9&gt;%</p>' in markup
    assert '<th scope="col">name</th><th scope="col" class="n">count</th>' in markup
    assert '<th scope="col">a|b</th>' in markup
    assert '<tr><th scope="row">two</th><td class="n">-</td><td>3</td></tr>' in markup
    Page(markup)


def test_a_page_says_of_a_section_what_its_markdown_says(runs):
    """From the same data, none of it read back."""
    for title, members in sections.sections([r for _, r in runs]):
        said = table.compared(title, members)
        text, markup = said.markdown(), said.html()
        for line in [said.table.caption, *said.contrasts, said.caution or ""]:
            assert line in text
            assert html.escape(line) in markup
        Page(markup)


MEASURE = """
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const sizes = {};
  for (const width of [1400, 400, 360]) {
    frame.style.width = width + "px";
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(d => d.open = true);
    const size = e => e.getBoundingClientRect();
    const shown = e => size(e).width > 100 && size(e).height > 20;
    sizes[width] = {
      inner: frame.contentWindow.innerWidth,
      scroll: root.scrollWidth,
      tables: [...page.querySelectorAll("table")].filter(shown).length,
      pictures: [...page.querySelectorAll("figure svg")].filter(shown).length,
      texts: [...page.querySelectorAll("figure svg text")].length,
      widest: Math.max(...[...page.querySelectorAll("figure:not(.wide) svg")]
        .map(e => size(e).right)),
      cut: [...page.querySelectorAll("figure svg")].filter(svg =>
        [...svg.querySelectorAll("text")].some(t =>
          size(t).right > size(svg).right + 2 || size(t).left < size(svg).left - 2)).length,
    };
  }
  document.getElementById("sizes").textContent = JSON.stringify(sizes);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser_the_page_never_scrolls_sideways(content, tmp_path):
    # In a frame, because a browser's window cannot be as narrow as a phone.
    inside = html.escape(content)
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><pre id="sizes"></pre>'
        + MEASURE.replace("<script>", f'<iframe srcdoc="{inside}"></iframe><script>', 1),
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1500,1000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            wrapper.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (measured,) = re.findall(r'<pre id="sizes">(.*?)</pre>', done.stdout)
    page = Page(content)
    for width, sizes in json.loads(html.unescape(measured)).items():
        assert sizes["inner"] == int(width)
        assert sizes["scroll"] <= sizes["inner"], sizes
        assert sizes["widest"] <= sizes["inner"], sizes
        assert sizes["tables"] == len(page.all("table"))
        assert sizes["pictures"] == len(page.all("svg"))
        assert sizes["texts"] > 100
        assert sizes["cut"] == 0, sizes
