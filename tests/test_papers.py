"""Tables: which words a row has, what the papers published, and what a file of one's own may say."""

import pytest

from implicit_bench import config, papers
from implicit_bench.bench import claims
from implicit_bench.config import UsageError, config_dir
from implicit_bench.schema import files


def said(*words, search=()):
    return papers.rows(["gpu=cpu", *words], search)[1]


def test_a_row_has_the_tables_words_then_its_own_then_the_command_lines():
    rows = said("table=cdeq_cifar10_small", "rows=[cdeq,neural_ode]", "stop.max_steps=7")
    assert [*rows] == ["cdeq", "neural_ode"]
    assert rows["cdeq"] == ["experiment=cdeq_cifar10_small", "recipe.batch=16", "model=cdeq", "gpu=cpu",
                            "stop.max_steps=7"]  # fmt: skip


def test_what_the_command_line_says_takes_the_place_of_the_tables():
    (row,) = said("table=homo_ode", "rows=[deq]", "experiment=homo_mnist", "recipe.batch=64").values()
    assert [w for w in row if w.startswith(("experiment=", "recipe.batch="))] == [
        "experiment=homo_mnist", "recipe.batch=64"]  # fmt: skip


def test_the_papers_batch_is_kept_where_there_is_a_gpu():
    (row,) = papers.rows(["gpu=cuda", "table=cdeq_cifar10_small", "rows=[deq]"])[1].values()
    assert not any(word.startswith("recipe.batch") for word in row)


def test_rows_that_a_table_leaves_out_are_there_when_they_are_asked_for():
    paper = [*said("table=cdeq_cifar10_small")]
    assert paper == ["deq", "skip_deq", "skip_reg_deq", "cdeq", "skip_cdeq", "skip_reg_cdeq", "neural_ode", "explicit"]
    assert [*said("table=cdeq_cifar10_small", "rows=[all]")] == [
        *paper, "neural_ode dopri5", "cdeq f_zero", "neural_ode f_zero"]  # fmt: skip
    assert [*said("table=cdeq_cifar10_small", "rows=[neural_ode f_zero]")] == ["neural_ode f_zero"]


@pytest.mark.parametrize("name", [name for name in files("table") if papers.table(name).kind == "cells"])
def test_every_row_of_a_table_composes(name):
    """Those that are to be asked for, too."""
    config.compose_all("train", [*papers.table(name).jobs(["all"], [], cpu=True).values()])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["table=cdeq_cifar"], "no table 'cdeq_cifar'; nearest: cdeq_cifar10_small"),
     (["table=cdeq_mnist", "rows=[cdq]"], "table=cdeq_mnist has no row 'cdq'; nearest: cdeq"),
     (["table=cdeq_mnist", "model=deq"], "table=cdeq_mnist says model=cdeq for its row cdeq; choose among its rows "
      "with rows=cdeq,cdeq jacobian or leave table= out"),
     (["table=cdeq_mnist", "seed=0,1"], "'seed=0,1' lists values, but a table has its rows already; give one value, or "
      "leave table=cdeq_mnist out"),
     (["rows=[deq]"], "rows= chooses among the rows of a table; add table=cdeq_cifar10_small or the like")],
)  # fmt: skip
def test_a_mistake_is_a_sentence(words, sentence):
    with pytest.raises(UsageError) as mistake:
        said(*words)
    assert str(mistake.value) == sentence


def test_a_table_of_ones_own_inherits_and_adds_a_row(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table/mine.yaml").write_text(
        "inherits: cdeq_mnist\nrows:\n  broyden: {words: [model=deq]}\n  cdeq: {published: {train_min: 1.0}}\n"
    )
    found = papers.table("mine", (str(tmp_path),))
    given = papers.table("cdeq_mnist")
    assert [*found.rows] == [*given.rows, "broyden"]
    assert found.words == given.words
    assert found.rows["cdeq"].words == given.rows["cdeq"].words
    assert found.rows["cdeq"].published == {"train_min": 1.0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("row: {}\n", "no key 'row'; nearest: rows"), ("rows:\n  a: {word: [model=deq]}\n", "row a has no key 'word'"),
     ("rows:\n  a: model=deq\n", "row a has no key 'model=deq'"), ("inherits: mine\n", "in a circle, mine → mine"),
     ("a: [\n", "is no YAML of keys and values"), ("seeds: [0, 1]\n", "write {sound: [0, 1]}"),
     ("rows:\n  a: {published: {test_acc: high}}\n", "test_acc='high' is neither a number nor [mean, sd]"),
     ("words: model=deq\n", "words: 'model=deq' is no list"), ("words: [seed=3]\n", "words has seed=3, but"),
     ("kind: bars\nlines: [{of: cdeq_mnist, row: cdeq}]\n", "a line lacks measure, ratio, table, bar")],
)  # fmt: skip
def test_a_table_that_says_something_else_is_refused(tmp_path, text, sentence):
    (tmp_path / "table").mkdir()
    (tmp_path / "table/mine.yaml").write_text(text)
    with pytest.raises(UsageError) as mistake:
        papers.table("mine", (str(tmp_path),))
    assert sentence in str(mistake.value)


def published(id, table):
    of = papers.table(table)
    return [v for c in claims.CLAIMS if c.id == id and (v := c.published(of))]


def test_the_papers_ratios_are_those_of_its_cells():
    """papers/cdeq.md 5, worked out there from the same tables by hand."""
    small, large, imagenet = claims.PAPERS
    assert published("R1", small) == pytest.approx([2.135], abs=5e-4)
    assert published("R1", large) == pytest.approx([4.102], abs=5e-4)
    assert published("R1", imagenet) == []
    assert published("R2", small) == pytest.approx([4.751], abs=5e-4)
    assert published("R2", large) == pytest.approx([6.183], abs=5e-4)
    for id, tables, values in (
        ("R3", claims.PAPERS, [0.89, 1.83, 4.93, 5.91, 2.22, 4.22]),
        ("R4", claims.PAPERS, [0.93, 1.11, 1.84, 1.95, 1.55, 1.95]),
        ("R5", claims.PAPERS, [2.07, 1.78, 1.84, 0.68, 0.50, 0.42, 1.30, 1.17, 1.12]),
        ("R6", [small, large], [1.52, 1.34, 1.34, 0.95, 0.92, 0.90]),
        ("R7", ["cdeq_mnist"], [3.04, 4.01, 3.8, 3.8]),
        ("R9", claims.PAPERS, [1.16, 2.05, 1.52]),
    ):
        assert [v for t in tables for v in published(id, t)] == pytest.approx(values, abs=5.1e-3), id
    assert claims.CLAIMS[0].paper(None) == "2.14–4.10×"
    assert claims.CLAIMS[0].paper(papers.table(small)) == "2.14×"


def test_every_claim_of_a_table_has_both_its_rows():
    for name in files("table"):
        of = papers.table(name)
        for claim in claims.asked(of):
            if claim.id in of.claims:
                assert {claim.slower, claim.faster} <= of.rows.keys(), (name, claim)


def test_tables_are_in_configs():
    assert {path.parent for path in files("table").values()} == {config_dir() / "table"}
