"""Speeds of encoders, on documents of the lengths that are asked for."""

import numpy as np

from modernenc.evaluation import cells
from modernenc.evaluation.cells import Request
from modernenc.evaluation.models import find_models
from modernenc.reporting import scores
from modernenc.suites import efficiency
from support.encoders import write_encoder


def test_lengths_are_fixed_or_spread_around_their_half():
    assert efficiency.lengths_of(512, "fixed", 4_096) == [512] * 8
    drawn = efficiency.lengths_of(512, "variable", 512_000)
    assert abs(np.mean(drawn) - 256) < 8 and abs(np.std(drawn) - 64) < 8 and max(drawn) <= 512
    assert abs(sum(drawn) - 512_000) < 20_000


def test_speeds_are_measured_where_the_model_can_read(tmp_path, capsys):
    models = find_models([f"small={write_encoder(tmp_path / 'encoder')}"], tmp_path)
    request = Request("efficiency", models, tmp_path, (), "efficiency", ["lengths=[32,64,128]", "tokens=512", "turns=3"])
    made, notes = efficiency.make_cells(request)
    assert notes == ["small reads 64 tokens: 128 are left out"]
    assert [cell.task for cell in made] == ["32 fixed", "32 variable", "64 fixed", "64 variable"]
    (tmp_path / "cells").mkdir()
    cells.run(made, tmp_path, lambda result, left: None)
    results = [result for cell in made if (result := cells.read(cell, tmp_path))]
    assert all(len(result.found.predictions["tokens_per_s"]) == 3 and result.scores["tokens_per_s"] > 0 for result in results)
    scores.show("efficiency", results)
    assert "efficiency: tokens a second ± half of the 95 % interval over the turns" in capsys.readouterr().out
