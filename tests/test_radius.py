"""benchmarks/radius.py: what its tables say of the rows, and that it goes on where it was."""

import json
import pathlib

import numpy as np
import pytest
import radius

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _row(variant, accuracies):
    cell = {"network": "mlp", "rate": 0.02, "labels": "clean"}
    return {"variant": variant, **cell, "accuracy": {f"{rho:g}": ends for rho, ends in accuracies.items()}}


def _cells(table):
    return [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]


def test_tables_of_radii():
    sam = {0.05: [91.0, 92.0], 0.2: [93.0, 95.0], 0.4: [80.0, 15.0]}
    rows = [_row("plain", {0: [90.0, 90.0]}), _row("sam", sam)]
    (row,) = radius.summarize(rows)
    assert row["gains"] == {0.05: 1.5, 0.2: 4.0, 0.4: -42.5}
    assert row["collapses from"] == 0.4
    ends = ["0 of 1", "1 of 1", "+1.5 (+1.5)"]
    assert _cells(radius.starts([row])) == ["sam", "0.05", "0 of 1", "", "", "", *ends]
    assert _cells(radius.advice([row])) == ["sam", "0.2; to 0.2", "", "", "", "0.4 (mlp)"]
    other = {**row, "gains": {0.05: -1.5, 0.2: -0.5, 0.4: 3.1}}
    assert radius.safe_of([row, other]) == [0.05, 0.2]
    assert radius.best_of([row, other]) == 0.2
    bad = {**row, "gains": {0.05: -2.5, 0.2: 2.9, 0.4: 3.1}}
    assert radius.safe_of([row, bad]) == []
    assert "0.2; none safe" in radius.advice([row, bad])
    # Where every radius hurts, plain training is the best.
    hurts = {**row, "gains": {0.05: -0.5, 0.2: -1.2}}
    assert [radius.near([hurts], rho) for rho in (0.05, 0.2)] == [1, 0]


def test_the_text_is_cut_into_bytes_and_those_that_follow():
    data = radius.load_text(0, 0.0)
    for tokens, following in ((data.images, data.labels), (data.test_images, data.test_labels)):
        np.testing.assert_array_equal(tokens[:, 1:], following[:, :-1])
        assert tokens.max() < 128
    assert len(data.images) == radius.digits.NUM_TRAIN
    seen = {bytes(row) for row in np.asarray(data.images, np.uint8)}
    # A few lines of the documentation repeat themselves.
    assert sum(bytes(row) in seen for row in np.asarray(data.test_images, np.uint8)) < 10


def test_the_start_is_measured():
    for arm in radius.ARMS.values():
        assert arm.start in arm.radii
        assert list(arm.radii) == sorted(arm.radii)


def test_it_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    trained = []

    class Trainer:
        def __init__(self, recipe, seeds, epochs, warm_up):
            del epochs
            self.recipe, self.seeds, self.warm_up = recipe, seeds, warm_up

        def train(self, case, runs):
            trained.append((self.warm_up, len(runs)))
            return [{"accuracy": 90.0 + 5 * bool(case)} for _ in runs]

    monkeypatch.setattr(radius, "Trainer", Trainer)
    options = ["--networks", "mlp", "--output", str(tmp_path), "--variants", "sam"]
    radius.main(options)
    assert trained == [(0.0, 2 * 2 * 2), (0.0, 6 * 2 * 2 * 2)]
    report = radius.main([*options, "sam, warm-up"])
    assert trained[2:] == [(0.3, 6 * 2 * 2 * 2)]
    assert len(report) == 8
    assert "sam, warm-up" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "radius.json").read_text())["rows"]) == 3 * 4
    assert radius.main([*options, "--tables"]) == report
    with pytest.raises(SystemExit):
        radius.main([*options, "--seeds", "3"])
    assert "was measured with other seeds" in capsys.readouterr().err


def test_the_page_on_tuning_has_the_tables():
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    kept = json.loads((ROOT / "benchmarks" / "results" / "radius.json").read_text(encoding="utf-8"))
    report = radius.summarize(kept["rows"])
    for table in (radius.advice(report), radius.starts(report)):
        assert table in page, f"docs/tuning.md has no\n\n{table}\n"


@pytest.mark.full
def test_a_short_form(tmp_path):
    report = radius.main(
        ["--quick", "--networks", "mlp", "--variants", "layerwise", "--output", str(tmp_path)]
    )
    assert {row["variant"] for row in report} == {"layerwise"}
    assert all(row["plain"] > 20 for row in report)
