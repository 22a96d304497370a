"""Several processes: one run that hangs, dies and is continued ends where one process ends undisturbed."""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cifar_resnet
import multi_host
import numpy as np
import pytest
import quick

LIMIT = 240.0  # Seconds that a run may take on the slowest machine; then it is killed.


def start(*arguments):
    """Runs the example as a user does; kills it and all that it has started when time is up."""
    process = subprocess.Popen(
        [sys.executable, multi_host.__file__, "--quick", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=quick.environment(),
        start_new_session=True,
    )
    begin = time.monotonic()
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the run was killed after {LIMIT:g} s, it had printed: {output}")
    return process.returncode, output, time.monotonic() - begin


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    directory = ["--output", str(tmp_path_factory.mktemp("run"))]
    return {
        "hung": start(*directory, "--hang-at", "4", "--timeout", "6"),
        "dead": start(*directory, "--die-at", "10"),
        "continued": start(*directory, "--check"),
        "directory": directory[1],
    }


@pytest.mark.full
def test_a_process_that_hangs_ends_the_run(story):
    status, output, seconds = story["hung"]
    assert status == 1, output
    assert "process 1 hangs: no step for 6 s, after step 4 of 14" in output
    assert "Run the same command again" in output
    assert seconds < LIMIT


@pytest.mark.full
def test_a_process_that_dies_ends_the_run(story):
    status, output, _ = story["dead"]
    assert status == 1, output
    assert "process 1 died with exit status 13, after step 10 of 14" in output
    assert "continues after step 3\n" in output


@pytest.mark.full
def test_the_continued_run_is_the_undisturbed_run_of_one_process(story):
    status, output, _ = story["continued"]
    assert status == 0, output
    assert "continues after step 9\n" in output
    assert "(equal to 1e-06)" in output
    rows = [line.split() for line in output.splitlines() if line[:1].isdigit() and "%" in line]
    assert [row[:3] for row in rows] == [["2", "2", "14"], ["1", "1", "14"]]
    assert rows[0][3:] == rows[1][3:]
    assert "\nsmoke test, not a result\n" in output
    with np.load(Path(story["directory"]) / "quick" / "params.npz") as params:
        assert {params[name].dtype for name in params.files} == {np.dtype("float32")}


def test_another_run_in_the_same_directory_is_refused(tmp_path):
    options = multi_host.parse(["--output", str(tmp_path)])
    multi_host.prepare(options)
    multi_host.prepare(options)
    with pytest.raises(SystemExit, match=r"other settings \(rho 0.05 -> 0.1\)\. Add --fresh"):
        multi_host.prepare(multi_host.parse(["--output", str(tmp_path), "--rho", "0.1"]))
    multi_host.prepare(multi_host.parse(["--output", str(tmp_path), "--rho", "0.1", "--fresh"]))


@pytest.mark.parametrize("program", [multi_host, cifar_resnet])
def test_fresh_deletes_a_run_and_nothing_else(program, tmp_path):
    options = argparse.Namespace(**dict.fromkeys(program.SETTINGS, 1), output=tmp_path, fresh=True)
    prepare = functools.partial(multi_host.prepare, options, program.SETTINGS, program.FILES)
    prepare()  # Into an empty folder.
    run = {
        multi_host: ["checkpoints/3/arrays", "params.npz", "result.json"],
        cifar_resnet: ["sgd-seed100/metrics.jsonl", "sam-seed100/checkpoints/1/state", "cifar_resnet.png"],
    }[program]
    thesis = tmp_path / "thesis.txt"
    for path in (*(tmp_path / name for name in run), thesis):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json", "thesis.txt"]


@pytest.mark.parametrize("settings", [None, '{"editor.fontSize": 12}', "[1]", "{"])
@pytest.mark.parametrize("program", [multi_host, cifar_resnet])
def test_a_folder_without_a_run_is_left_alone(program, settings, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "params.npz").write_text("of another program")
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
    before = {path: path.is_file() and path.read_text() for path in tmp_path.iterdir()}
    options = argparse.Namespace(**dict.fromkeys(program.SETTINGS, 1), output=tmp_path, fresh=True)
    with pytest.raises(SystemExit, match=r"holds no run of this program; nothing was deleted\."):
        multi_host.prepare(options, program.SETTINGS, program.FILES)
    if settings is not None:
        options.fresh = False
        with pytest.raises(SystemExit, match=r"settings\.json is not of this program\."):
            multi_host.prepare(options, program.SETTINGS, program.FILES)
    assert {path: path.is_file() and path.read_text() for path in tmp_path.iterdir()} == before


def test_a_difference_is_told(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "params.npz", w=np.array([1.0, value]))
    assert multi_host.compare(tmp_path / "a", tmp_path / "b") == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--process-id", "0"], "--process-id needs --coordinator"),
        (["--cluster", "--check"], "--check needs all processes on this machine"),
        (["--batch-size", "33"], "--batch-size 33 must be a multiple of 2 processes"),
        (["--cluster", "--fresh"], "--fresh needs all processes on this machine"),
        (["--num-shards", "3"], "--batch-size 64 must be a multiple of 3 shards"),
        (["--coordinator", "here:1", "--process-id", "2"], "--process-id must be from 0 to 1, got 2"),
        (["--num-processes", "0"], "argument --num-processes: must be an integer >= 1, got '0'"),
        (["--rho", "-1"], "argument --rho: must be a number >= 0, got '-1'"),
        (["--timeout", "0"], "argument --timeout: must be a number > 0, got '0'"),
        (["--output", "/dev/null/x"], "argument --output: cannot make the folder '/dev/null/x'"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        multi_host.parse(arguments)
    assert words in capsys.readouterr().err
