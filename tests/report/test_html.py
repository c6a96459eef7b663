from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from corral.report.write import write_report
from tests.report.conftest import (
    ENVIRONMENT,
    PARTS,
    MakeRun,
    card,
    completions,
    contract,
    fill,
    ledger,
    lineage,
    metrics,
    promote_model,
    write,
    write_lines,
)

PAYLOAD = """<script>alert(1)</script><img src=x onerror="alert(2)">'"><svg onload=alert(3)> {{ 7*7 }} </style>&amp;"""
VOID = {"meta", "img", "source", "br", "hr", "link"}


class Page(HTMLParser):
    """Elements with attributes, text outside style, and `<data>` figures of a page; refuses tags left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self.data: list[tuple[float, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.style += data
            return
        self.text += data
        if self._open[-1:] == ["data"]:
            self.data.append((float(self.elements[-1][1]["value"] or "nan"), data))

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text("utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a whole run."""
    return page_of(fill(tmp_path_factory.mktemp("whole") / "quickstart", tuple(PARTS)))


# Keys that give the files their shape, and texts that have a fixed set of values.
SHAPE = """
    variants metrics info mean low high se n comparisons a b metric difference p p_holm mde better seed baseline signatures
    unpaired only_a only_b level primary cautions conditions
    sources rows fates sides reasons count examples stages name outputs fingerprint started finished
    status model packages checks passed seconds id variant prompt role content reference answer cores memory_bytes cpu corral
"""


def poisoned(value: Any) -> Any:
    """Every text and every key in a JSON value with the payload behind it, but the keys that give it its shape."""
    if isinstance(value, dict):
        return {
            key if key in SHAPE.split() else key + PAYLOAD: inner if key == "better" else poisoned(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return value + PAYLOAD if isinstance(value, str) else value


def test_identical_variants_are_called_the_same_and_a_vote_shows_what_it_saved(make_run: MakeRun) -> None:
    run = make_run()
    value = json.loads(card().to_json())
    same = {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "p_holm": 1.0, "mde": None}
    value["comparisons"] = [comparison | same for comparison in value["comparisons"]]
    value["variants"]["tuned"]["info"] |= {"answers": 4, "candidates": 20, "cancelled": 5}
    write(run / "evaluate" / "scorecard.json", value)
    words = page_of(run).words
    in_the_verdict = 1
    assert words.count("the same in every row") == len(value["comparisons"]) + in_the_verdict
    assert "could see 0" not in words
    assert "25%" in words
    assert "candidates that a vote did not need" in words


def test_nothing_that_came_from_the_run_becomes_markup(make_run: MakeRun) -> None:
    run = make_run("nothing else", name="run <img src=x onerror=alert(4)>")
    name = json.dumps(PAYLOAD)
    (run / "recipe.toml").write_text(
        f"name = {name}\nseed = {name}\n[model]\nbase = {name}\n[[data.sources]]\nname = {name}\n"
        f"[[train]]\nobjective = {name}\nlora.rank = {name}\n{name} = {name}\n"
    )
    files = {
        "environment.json": ENVIRONMENT,
        "lineage.json": lineage(),
        "prepare/ledger.json": ledger(),
        "evaluate/scorecard.json": json.loads(card().to_json()),
    }
    for file, value in files.items():
        write(run / file, poisoned(value))
    write_lines(run / "evaluate" / "completions.jsonl", [poisoned(line) for line in completions()])
    write_lines(run / "train-1-<b>" / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    write(run / "merge" / "model" / "contract.json", poisoned(contract()))  # as runs of older versions have it
    write(run / "merge" / "model" / "config.json", {})
    write(run / "train-2-x" / "metrics.jsonl", "{}\nnot json <img src=x onerror=alert(5)>\n")

    page = page_of(run)

    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "iframe", "object", "embed", "link", "base", "form", "b!"}
    )
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
    # It is all there to be read, in every part of the page.
    sections = {attributes["id"] for tag, attributes in page.elements if tag == "section"}
    assert sections == {"what", "data", "training", "scores", "answers", "contract", "provenance"}
    assert page.text.count("<script>alert(1)</script>") > 40
    assert "{{ 7*7 }}" in page.text
    assert "corral chat '" in page.words
    assert "onerror=alert(4)" in page.words


def test_the_page_refers_to_nothing_outside_itself(page: Page) -> None:
    references = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster")
    ]
    assert len(references) > 10
    assert all(r.startswith("data:image/png;base64,") or re.fullmatch(r"#[a-z]+", r) for r in references)
    assert not re.search(r"url\(|@import|https?:", page.style)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {r[1:] for r in references if r.startswith("#")} <= ids


def test_the_content_policy_allows_this_stylesheet_and_embedded_pictures_only(page: Page) -> None:
    (policy,) = (
        a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert [tag for tag, _ in page.elements].count("style") == 1


def test_every_score_and_difference_of_the_scorecard_is_shown(page: Page) -> None:
    shown = {value for value, _ in page.data}
    for variant in card().variants.values():
        for metric in variant.metrics.values():
            assert {metric.mean, metric.low, metric.high, metric.n} <= shown
    for comparison in card().comparisons:
        assert {comparison.difference, comparison.low, comparison.high, comparison.p_holm, comparison.n} <= shown


def test_shown_figures_are_the_exact_ones_rounded(page: Page) -> None:
    assert len(page.data) > 60
    for exact, text in page.data:
        if text == "< 0.001":
            assert exact < 0.001
            continue
        digits = text.replace("−", "-").replace(",", "").replace("+", "")
        after = len(digits.split("e")[0].partition(".")[2])
        scale = 10 ** int(digits.split("e")[1]) if "e" in digits else 1
        assert abs(float(digits) - exact) <= 0.5000001 * scale * 10**-after, (exact, text)


def test_all_counts_of_the_ledger_are_shown(page: Page) -> None:
    shown = {value for value, _ in page.data}
    value = ledger()
    for source in value["sources"].values():
        assert {float(source["rows"]), *map(float, source["fates"].values())} - {0.0} <= shown
        assert {float(reason["count"]) for reason in source["reasons"].values()} <= shown
    train = sum(source["sides"]["train"] for source in value["sources"].values())
    assert f"{train:,} to train on" in page.words


def test_the_training_is_described(page: Page) -> None:
    last = metrics()[-1]
    for words in (
        "asset:smollm2-135m-instruct",
        "asset:wikibooks-recipes and house recipes",
        f"sft, LoRA of rank 16, 60 steps of 8 examples, {last['tokens']:,} tokens",
        f"{last['tokens'] / last['seconds']:,.0f} tokens/s, 1.55\N{NO-BREAK SPACE}GB at the peak",
        "torch",
        "2.13.0",
        "optimizer.lr",
        "every check of the contract passed",
    ):
        assert " ".join(words.split()) in page.words
    assert 'schedule = "cosine"' in page.text


def test_hashes_of_every_output_are_shown_in_full(page: Page) -> None:
    stages = [stage for stage in lineage()["stages"] if stage["name"] != "report"]
    digests = [digest for stage in stages for digest in stage["outputs"].values()]
    assert len(digests) == 3
    assert all(digest in page.text for digest in [*digests, lineage()["model"]["identity"]])


def test_checks_with_unknown_keys_are_shown(make_run: MakeRun) -> None:
    run = make_run("nothing else")
    checks = [{"name": "speed", "passed": True, "gain": 1.25, "limits": {"low": 1.0, "by": ["x", 2]}, "why": None}]
    promote_model(run, {"checks": checks})
    page = page_of(run)
    assert "low 1, by x, 2" in page.words
    assert 1.25 in {value for value, _ in page.data}


def test_an_answer_keeps_its_line_breaks_and_shows_how_it_ended(make_run: MakeRun) -> None:
    run = make_run("nothing else")
    prompt = [{"role": "user", "content": "List them."}]
    line = {"id": "1", "variant": "base", "prompt": prompt, "reference": None}
    write_lines(
        run / "evaluate" / "completions.jsonl",
        [
            line | {"answer": "one\n\n  two", "finish": "length", "tokens": 160},
            line | {"variant": "tuned", "answer": "", "finish": "stop", "tokens": 0},
        ],
    )
    page = page_of(run)
    assert "one\n\n  two" in page.text
    assert "cut off at 160 tokens" in page.words
    assert "said nothing" in page.words


def test_each_exported_form_is_shown_with_its_contract(make_run: MakeRun) -> None:
    run = make_run()
    checks = [{"name": "as served", "passed": True, "detail": "loss 1.9 against 1.8"}]
    write(run / "export" / "model-q8_0.contract.json", {"form": "gguf q8_0", "passed": True, "checks": checks})
    bad = [{"name": "weights", "passed": False, "detail": "differ by 7"}]
    write(run / "export" / "openvino-int4" / "contract.json", {"form": "openvino int4", "passed": False, "checks": bad})
    page = page_of(run)
    assert "gguf q8_0: ✓ passed" in page.words
    assert "openvino int4: ✗ failed" in page.words
    assert "differ by 7" in page.words
