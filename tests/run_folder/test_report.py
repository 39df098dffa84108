"""The report of a run: whole in one file, whatever the run has reached, with the texts of others shown as text."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from modernenc.config import Run
from modernenc.data.blocks import Corpus
from modernenc.reporting.page import write
from modernenc.run_folder.create import create
from modernenc.run_folder.tables import Table
from modernenc.train import main


@pytest.fixture
def begun(small_run) -> Run:
    """A run whose folder exists, but which took no step."""
    run = small_run()
    return create(run, "", corpus_files=Corpus.of(run.data).small_files())


def test_a_report_is_one_file_with_all_numbers_and_plots(small_run):
    run = small_run()
    main(run)
    page = write(run).read_text()
    assert len(re.findall('<img alt="[a-z ]+" src="data:image/png;base64,', page)) == page.count("<img") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    final = Table(Path(run.run_dir) / "validation.csv").read()[-1]
    assert f"<td>{float(final['loss']):.3f}</td><td>{float(final['accuracy']):.1%}</td></tr>" in page
    assert all(f"<h3>{source}</h3>" in page for source in Corpus.of(run.data).sources) and "<mark" in page
    assert (Path(run.run_dir) / "curriculum.png").is_file()


def test_a_run_without_a_step_has_a_report(begun):
    page = write(begun).read_text()
    for note in ("No step of masked LM was recorded yet.", "No validation yet.", "No checkpoint yet."):
        assert note in page


def test_a_report_shows_the_texts_of_others_as_text(begun):
    recipe, phase, comment = '<i>any</i> & "more"', "<b>stable</b>", "# <script>alert(1)</script>"
    folder = Path(begun.run_dir)
    with (folder / "config.yaml").open("a") as file:
        file.write(comment)
    score = {"source": "code", "seq_len": 64, "mask_ratio": 0.15, "loss": 5, "accuracy": 0.1, "targets": 10}
    Table(folder / "validation.csv").append({"step": 1, "tokens_seen": 100, "phase": phase, **score})
    page = write(replace(begun, recipe=recipe)).read_text()
    for text in (recipe, phase, comment):
        assert text not in page and text in html.unescape(page)
