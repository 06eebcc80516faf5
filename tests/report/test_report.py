import re
import xml.etree.ElementTree as ET

from implicit_bench.report import plots, tables
from implicit_bench.report.plots import Bar

COLUMNS, ROWS = ["model", "ms"], [["deq", "10.5"], ["skip_deq", "9"]]


def test_text_aligns_words_left_and_numbers_right():
    assert tables.text(COLUMNS, ROWS) == " model       ms\n deq       10.5\n skip_deq     9"


def test_markdown():
    assert tables.markdown(COLUMNS, ROWS) == "| model | ms |\n| --- | --- |\n| deq | 10.5 |\n| skip_deq | 9 |\n"


def test_speedup_bars_are_the_same_bytes_for_the_same_numbers(tmp_path):
    bars = [Bar("R1 neural_ode / cdeq, train", 2.4, 2.3, 2.5), Bar("R4 cdeq / skip_cdeq, train", 0.9, 0.8, 1.1)]
    for name in ("a.svg", "b.svg"):
        plots.ratio_bars([tmp_path / name], plots.WIDE, bars, "digits")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = ET.tostring(ET.parse(tmp_path / "a.svg").getroot(), encoding="unicode")
    assert "dc:date" not in text
    plots.ratio_bars([tmp_path / "c.svg"], plots.WIDE, [bars[0]._replace(value=2.45), bars[1]], "digits")
    assert (tmp_path / "c.svg").read_bytes() != (tmp_path / "a.svg").read_bytes()


def test_a_bar_of_solves_that_did_not_converge_is_starred_and_in_no_verdicts_colour(tmp_path):
    bars = [Bar("R1", 2.4, 2.3, 2.5), Bar("R4", 0.9, 0.8, 0.95)]
    for name, shown in (("fine.svg", bars), ("stuck.svg", [bar._replace(stuck=True) for bar in bars])):
        plots.ratio_bars([tmp_path / name], plots.WIDE, shown, "digits")
    fine, stuck = ((tmp_path / name).read_text("utf-8") for name in ("fine.svg", "stuck.svg"))
    for colour in ("#4c72b0", "#c44e52"):
        assert colour in fine
        assert colour not in stuck
    assert "<!-- R1* -->" in stuck
    assert "* not converged" in stuck
    assert "*" not in "".join(re.findall("<!-- (.*) -->", fine))


def test_speedup_bars_have_what_the_paper_has_beside_them(tmp_path):
    bars = [Bar("R1", 1.5, 1.4, 1.6, "2.14–36.55×"), Bar("R6", 0.7, 0.6, 0.8, "0.95×"), Bar("R2", 2.0, 1.9, 2.1)]
    assert [bar.published for bar in bars] == [[2.14, 36.55], [0.95], []]
    for name, shown in (("with.svg", bars), ("without.svg", [bar._replace(paper="") for bar in bars])):
        plots.ratio_bars([tmp_path / name], plots.WIDE, shown, "digits")
    text, bare = ((tmp_path / name).read_text("utf-8") for name in ("with.svg", "without.svg"))
    assert re.findall(r'id="(published-\d)"', text) == ["published-0", "published-1"]
    assert "what the paper has" in text
    assert not re.search("published|what the paper has", bare)
    marks = [re.findall(r'<use [^>]*x="([\d.]+)"', group) for group in text.split('id="published-')[1:]]
    edge = float(re.search(r'width="([\d.]+)pt"', text)[1])
    assert float(marks[0][0]) < float(marks[0][1]) < edge
    assert float(marks[1][0]) < float(marks[0][0])
