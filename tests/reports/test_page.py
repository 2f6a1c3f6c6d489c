import io
import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from rigl_optax.reports import page
from rigl_optax.training import checkpoints, costs, loading, loop, metrics, setup, tasks
from rigl_optax.training import config as config_lib

CURVES = ("loss", "accuracy", "churn", "coverage", "dead-inputs", "dead-outputs")


def train(config, workdir):
    loop.train(config, workdir, Console(file=io.StringIO(), width=120))


def claim(workdir, config):
    """Makes the workdir of a run that has just started."""
    checkpoints.claim(workdir, config)
    loading.write_facts(workdir, tasks.find(config).facts)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, small):
    """Of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    train(small, folder)
    return folder


@pytest.fixture(scope="module")
def text(workdir):
    """Its page."""
    return page.render(workdir)


def figures(text):
    return re.findall(r'<figure id="([\w-]+)"><svg', text)


def test_a_finished_run_has_all_charts_and_tables(text):
    assert figures(text) == [*CURVES, "mask", "pixels"]
    assert "rigl: 80 % sparse lenet on digits" in text
    assert "step 60 of 60, finished" in text
    assert "layers/0/kernel" in text and "fewer than two dimensions" in text
    assert text.count("training FLOPs</text>") == len(CURVES)
    assert text.count("training step</text>") == len(CURVES)
    assert "Now: the checkpoint of step 60." in text


def test_nothing_is_loaded_from_anywhere_and_no_id_is_there_twice(text):
    assert "<script" not in text and "<link" not in text and "@import" not in text
    targets = re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert targets and all(t.startswith(("#", "data:image/png")) for t in targets)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert {t.removeprefix("#") for t in targets if t.startswith("#")} <= set(ids)


def test_the_page_of_one_run_is_always_the_same(workdir, text):
    assert page.render(workdir) == text


def test_a_run_that_has_only_just_started(tmp_path, small):
    claim(tmp_path, small)
    text = page.render(tmp_path)
    assert figures(text) == ["mask", "pixels"]
    assert "step 0 of 60, not finished" in text and "No checkpoint yet." in text
    assert "No loss is recorded yet." in text
    record = {"step": 1, "kind": "rewiring", "churn": 0.3, "coverage": 0.2, "training_flops": 9.0}
    (tmp_path / metrics.FILE).write_text(json.dumps(record) + '\n{"step": 10, "ki')
    assert figures(page.render(tmp_path)) == ["churn", "coverage", "mask", "pixels"]


@pytest.mark.parametrize("method", ["dense", "static"])
def test_a_run_without_rewirings(tmp_path, small, method):
    train(config_lib.changed(small, {"method.name": method, "steps": 20}), tmp_path)
    text = page.render(tmp_path)
    assert figures(text)[:2] == ["loss", "accuracy"]
    assert "No rewiring is recorded." in text
    assert ("% sparse" in text) == (method == "static")


def test_a_run_that_diverged(tmp_path, small):
    claim(tmp_path, small)
    records = [
        {"step": 10 * i, "kind": "train", "loss": loss, "accuracy": 0.1, "training_flops": i}
        for i, loss in enumerate([2.5, 1e10, 1e30], start=1)
    ]
    (tmp_path / metrics.FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert "loss" in figures(page.render(tmp_path))


def test_all_text_is_escaped(tmp_path, small):
    evil = "</text><script>alert(1)</script>$x$"
    claim(tmp_path, small)
    record = {"step": 1, "kind": "rewiring", f"dead_inputs/{evil}": 1.0, "training_flops": 1.0}
    (tmp_path / metrics.FILE).write_text(json.dumps(record) + "\n")
    layer = {"path": evil, "shape": [2], "dense_because": evil, "active": 1, "sparsity": 0.5}
    layer |= {"active_at_end": 1, "flops_share": None}
    explained = {"weights": 2, "active": 1, "active_at_end": 1, "layers": [layer]}
    explained |= {"inference_ratio": None, "training_ratio": 0.5}
    text = json.dumps({**explained, "warnings": [evil]})
    (tmp_path / loop.EXPLANATION_FILE).write_text(text)
    text = page.render(tmp_path)
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)") >= 4


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the config of a run"):
        page.write(tmp_path, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def browse(file, profile, *arguments):
    """What Chromium prints about a page: its document, and its log."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium is installed")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--enable-logging=stderr"
    )
    return subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={profile}", *arguments, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def complaints(log):
    """Lines of the console of the page; the browser's own (no D-Bus, ...) are not among them."""
    return [line for line in log.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
def test_a_browser_shows_all_charts_and_has_nothing_to_complain_about(workdir, tmp_path):
    page.write(workdir, tmp_path / "report.html")
    shown = browse(tmp_path / "report.html", tmp_path / "profile", "--dump-dom")
    assert complaints(shown.stderr) == []
    assert figures(shown.stdout) == [*CURVES, "mask", "pixels"]
    for text in ("Loss", "accuracy (%)", "training FLOPs", "dead inputs (units)"):
        assert f">{text}</text>" in shown.stdout
    picture = tmp_path / "page.png"
    browse(
        tmp_path / "report.html",
        tmp_path / "profile2",
        f"--screenshot={picture}",
        "--window-size=1100,4600",
    )
    assert picture.stat().st_size > 100_000  # a blank page of this size has 24 kB

    # The same browser does complain about a page that has something wrong with it.
    broken = tmp_path / "broken.html"
    text = (tmp_path / "report.html").read_text()
    broken.write_text(text.replace("</body>", "<img src='https://example.invalid/x.png'></body>"))
    assert complaints(browse(broken, tmp_path / "profile3", "--dump-dom").stderr)


def test_the_page_of_a_run_that_prunes_tells_of_its_end(small):
    config = config_lib.changed(
        small,
        {"method.name": "gmp", "method.distribution": {"name": "uniform"}, "method.sparsity": 0.5},
    )
    report = costs.explain(setup.prepare(config))
    explained = report.to_dict()
    facts = page._facts([], explained, {})
    assert (
        f"{report.active_at_end:,}</b>of {report.weights:,} weights active when training" in facts
    )
    table = page._layers(explained, [])
    assert "active at the end" in table and "0.5000" in table
