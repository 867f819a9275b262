"""The page of ``--report``: one file that refers to nothing outside, every part there, labelled and readable."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser

import onnx
import pytest
import reports
from ffn_graphs import transformer
from ffnfold.cli.page import Report, page, render

SECTIONS = ["outputs", "blocks", "front", "latency", "roofline", "size", "placement", "exact", "plan", "machine"]


class Elements(HTMLParser):
    """Every element with its attributes, and the texts inside elements of some kinds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self._inside[-3:]):
            self.texts.setdefault(tag, []).append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def full():
    return render(reports.full())


def test_every_part_has_its_section_in_order(full):
    assert [each["id"] for each in Elements(full).of("section")] == SECTIONS


@pytest.mark.parametrize(("part", "sections"), [
    ({}, []),
    ({"drift": reports.drift()}, ["outputs", "blocks"]),
    ({"drift": {**reports.drift(), "blocks": []}}, ["outputs"]),
    ({"timing": reports.timing()}, ["latency", "roofline", "placement", "machine"]),
    ({"plan": "- fold-bias\n"}, ["plan"]),
    ({"bytes": {"a.onnx": 1}}, ["size"]),
])
def test_what_there_is_not_is_left_out(part, sections):
    assert [each["id"] for each in Elements(render(Report("title", **part))).of("section")] == sections


def test_it_refers_to_nothing_outside_itself(full):
    elements = Elements(full)
    for tag, attributes in elements.found:
        assert tag not in ("img", "iframe", "object", "embed", "audio", "video", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "@import" not in full
    assert "url(" not in full.replace("url(#", "")
    policy = next(each["content"] for each in elements.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_names_are_text_and_nothing_else(full):
    elements = Elements(full)
    assert len(elements.of("script")) == 1
    assert "alert(" not in "".join(elements.texts["script"])
    assert full.count("&lt;script&gt;alert") > 3
    assert "mathdefault" not in full


@pytest.mark.parametrize("kind", ["real", "synthetic"])
def test_what_was_measured_is_labelled(kind):
    text = render(reports.full(kind))
    measured = [each for each in SECTIONS if each not in ("size", "plan", "machine")]
    assert text.count(f'<span class="badge {kind}">{kind} inputs</span>') == len(measured)
    assert f'badge {"synthetic" if kind == "real" else "real"}"' not in text


def test_ids_are_unique_and_every_reference_leads_to_one(full):
    elements = Elements(full)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in elements.found:
        for name in ("href", "aria-labelledby"):
            target = (attributes.get(name) or "").lstrip("#")
            assert not target or target.startswith("data:") or target in ids, target


def test_charts_have_titles_and_tables_captions_and_headings(full):
    elements = Elements(full)
    charts = [each for each in elements.of("svg") if each.get("class") == "chart"]
    assert len(charts) == 8  # outputs, blocks, front, latency twice, roofline, size, placement
    assert all(each["role"] == "img" and each["aria-labelledby"] for each in charts)
    assert len(elements.texts["title"]) == len(charts) + 1
    assert len(elements.of("caption")) == len(elements.of("table"))
    assert all(each.get("scope") in ("col", "row") for each in elements.of("th"))
    assert elements.of("html") == [{"lang": "en"}]
    assert len(elements.of("h1")) == 1


def test_charts_take_their_colours_from_the_page(full):
    drawn = full[full.index("<main"):full.index("</main>")]
    assert drawn.count("var(--series-0)") > 5
    assert "var(--ink)" in drawn
    assert "#0" not in drawn.replace('href="#', "").replace("url(#", "")  # no colour of its own


def test_the_same_report_gives_the_same_text(full):
    assert render(reports.full()) == full


def test_numbers_are_in_the_tables(full):
    cells = [each["data-value"] for each in Elements(full).of("td") if "data-value" in each]
    assert {"0.02", "0.5", "34.0", "1.9", "MatMulInteger"} <= set(cells)
    assert "it is inside the subgraph main/If" in full


def test_without_the_libraries_the_rest_is_written(cli, folder, model, feeds, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "pip install 'ffnfold[report]'" in page.missing_library()
    outcome = cli("verify", model, model, "--data", feeds, "--report", "told", "--json")
    assert outcome.code == 0
    assert "report.html was not written" in outcome.err
    assert {path.name for path in (folder / "told").iterdir()} == {"report.json"}


def test_verify_writes_its_page(cli, folder, model, feeds):
    cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn")
    outcome = cli("verify", model, "out.onnx", "--data", feeds, "--per-block", "--max-drift", "rel_l2=1e-9", "--report", "told",
                  "--json")
    assert outcome.code == 1
    assert json.loads((folder / "told" / "report.json").read_text()) == outcome.json
    text = (folder / "told" / "report.html").read_text()
    assert [each["id"] for each in Elements(text).of("section")] == ["outputs", "blocks"]
    assert "a limit was missed" in text
    assert "rel_l2 of &#39;y&#39; is" in text


def test_a_model_whose_only_output_is_a_sequence(cli, folder):
    proto = transformer(2, activation="gelu").model()
    proto.graph.node.append(onnx.helper.make_node("SequenceConstruct", [proto.graph.output[0].name], ["states"]))
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_sequence_value_info("states", onnx.TensorProto.FLOAT, None))
    onnx.save(proto, folder / "states.onnx")
    optimized = cli("optimize", "states.onnx", "-o", "out.onnx", "-p", "quantize-ffn", "--synthetic", "--report", "told",
                    "--json")
    assert (optimized.code, optimized.json["drift"]["outputs"]) == (0, {})
    assert "no output could be compared" in (folder / "told" / "report.html").read_text()
    verified = cli("verify", "states.onnx", "out.onnx", "--synthetic", "--per-block", "--report", "verified")
    assert verified.code == 0
    assert "block 1" in verified.out


def test_bench_writes_its_page(cli, folder, model):
    outcome = cli("bench", model, model, "--shape", "x=1x4,8x8", "--seconds", "0", "--report", "told", "--json")
    assert json.loads((folder / "told" / "report.json").read_text()) == outcome.json
    details = json.loads((folder / "told" / "details.json").read_text())
    assert [len(times) for times in details["times_ms"]] == [outcome.json["machine"]["rounds"]] * 4
    sections = [each["id"] for each in Elements((folder / "told" / "report.html").read_text()).of("section")]
    assert sections == ["latency", "size", "placement", "machine"]


def test_optimize_writes_its_page(cli, folder, model, feeds):
    outcome = cli("optimize", model, "-o", "out.onnx", "--data", feeds, "--report", "told", "--json")
    assert outcome.code == 0
    assert {path.name for path in (folder / "told").iterdir()} == {"report.html", "report.json", "report.md", "plan.yaml",
                                                                  "details.json"}
    assert json.loads((folder / "told" / "report.json").read_text()) == outcome.json
    details = json.loads((folder / "told" / "details.json").read_text())
    assert [each["block"] for each in details["drift"]["blocks"]] == [0, 1, 2]
    assert details["drift"]["outputs"] == outcome.json["drift"]["outputs"]
    assert [row["model"] for row in details["timing"]["models"]] == [str(model), "out.onnx"]
    sections = [each["id"] for each in Elements((folder / "told" / "report.html").read_text()).of("section")]
    assert sections == ["outputs", "blocks", "latency", "size", "placement", "exact", "plan", "machine"]


@pytest.mark.parametrize("command", [["verify", "model.onnx", "model.onnx", "--data", "feeds"],
                                     ["bench", "model.onnx", "--shape", "x=1x4x8"]])
def test_a_place_that_cannot_be_written_to_is_said_first(refused, model, feeds, command):
    assert "the report cannot be written" in refused(*command, "--report", "model.onnx")
