"""benchmarks/radius.py: what its tables say of the rows, and that it goes on where it was."""

import json

import pytest
import radius


def _rows(variant, accuracies, labels="clean"):
    cell = {"network": "mlp", "rate": 0.02, "labels": labels}
    return [{"variant": variant, "rho": rho, **cell, "accuracy": ends} for rho, ends in accuracies.items()]


def test_tables_of_radii():
    sam = {0.05: [91.0, 92.0], 0.2: [93.0, 95.0], 0.4: [80.0, 15.0]}
    rows = [*_rows("plain", {0.0: [90.0, 90.0]}), *_rows("sam", sam)]
    (row,) = radius.summarize(rows)
    assert row["gains"] == {0.05: 1.5, 0.2: 4.0, 0.4: -42.5}
    assert (row["best"], row["start loses"], row["collapses from"]) == (0.2, 2.5, 0.4)
    line = radius.starts([row]).splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "sam",
        "0.05",
        "0 of 1",
        "2.5 (mlp, 0.02, clean)",
        "0.2 to 0.2",
        "0.05, 0.2",
    ]
    # Where every radius hurts, plain training is the best, and what the start costs is what it loses to it.
    rows = [*_rows("plain", {0.0: [90.0]}), *_rows("sam", {0.05: [89.5], 0.2: [85.0]})]
    assert radius.summarize(rows)[0]["start loses"] == 0.5


def test_the_start_is_measured():
    for arm in radius.ARMS.values():
        assert arm.start in arm.radii
        assert list(arm.radii) == sorted(arm.radii)


def test_it_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    trained = []

    class Trainer:
        def __init__(self, network, seeds, epochs, warm_up):
            del epochs
            self.recipe, self.seeds = radius.defaults.RECIPES[network], seeds
            self.network, self.warm_up = network, warm_up

        def train(self, case, runs):
            trained.append((self.network, self.warm_up, len(runs)))
            return [{"accuracy": 90.0 + 5 * bool(case)} for _ in runs]

    monkeypatch.setattr(radius, "Trainer", Trainer)
    options = ["--networks", "mlp", "--output", str(tmp_path), "--variants", "sam"]
    radius.main(options)
    assert trained == [("mlp", 0.0, 2 * 2 * 2), ("mlp", 0.0, 6 * 2 * 2 * 2)]
    report = radius.main([*options, "sam, warm-up"])
    assert trained[2:] == [("mlp", 0.3, 6 * 2 * 2 * 2)]
    assert len(report) == 8
    assert "sam, warm-up" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "radius.json").read_text())["rows"]) == 4 + 2 * 24
    assert radius.main([*options, "--tables"]) == report
    with pytest.raises(SystemExit):
        radius.main([*options, "--seeds", "3"])
    assert "was measured with other seeds" in capsys.readouterr().err


@pytest.mark.full
def test_a_short_form(tmp_path):
    report = radius.main(
        ["--quick", "--networks", "mlp", "--variants", "layerwise", "--output", str(tmp_path)]
    )
    assert {row["variant"] for row in report} == {"layerwise"}
    assert all(row["plain"] > 20 for row in report)
