import xml.etree.ElementTree as ET

from implicit_bench.report import plots, tables

COLUMNS, ROWS = ["model", "ms"], [["deq", "10.5"], ["skip_deq", "9"]]


def test_text_aligns_words_left_and_numbers_right():
    assert tables.text(COLUMNS, ROWS) == " model       ms\n deq       10.5\n skip_deq     9"


def test_markdown():
    assert tables.markdown(COLUMNS, ROWS) == "| model | ms |\n| --- | --- |\n| deq | 10.5 |\n| skip_deq | 9 |\n"


def test_speedup_bars_are_the_same_bytes_for_the_same_numbers(tmp_path):
    bars = [("R1 neural_ode / cdeq, train", 2.4, 2.3, 2.5), ("R4 cdeq / skip_cdeq, train", 0.9, 0.8, 1.1)]
    for name in ("a.svg", "b.svg"):
        plots.ratio_bars([tmp_path / name], plots.WIDE, bars, "digits")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = ET.tostring(ET.parse(tmp_path / "a.svg").getroot(), encoding="unicode")
    assert "dc:date" not in text
    plots.ratio_bars([tmp_path / "c.svg"], plots.WIDE, [(bars[0][0], 2.5, 2.3, 2.6), bars[1]], "digits")
    assert (tmp_path / "c.svg").read_bytes() != (tmp_path / "a.svg").read_bytes()
