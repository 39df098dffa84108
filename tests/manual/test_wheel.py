"""The package as a user installs it: a wheel in an environment of its own, away from the checkout."""

import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.commands import ROOT


def run(*arguments: object, cwd: Path) -> str:
    """Run a command in isolation from this process's paths, and return what it printed."""
    words = [str(argument) for argument in arguments]
    result = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has the wheel, and the libraries of this one, but not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    run(sys.executable, *build, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    own = Path(run(folder / "env/bin/python", "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    # The folders of this environment come after the new one's own. Their .pth files (of an editable install) are not read.
    borrowed = {*site.getsitepackages(), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    (own / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    (wheel,) = folder.glob("modernenc-*.whl")
    install = ["-m", "pip", "--python", folder / "env/bin/python", "install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, *install, cwd=folder)
    return folder / "env/bin/python"


@pytest.mark.slow
def test_the_wheel_prepares_text_plans_and_trains_away_from_the_checkout(python, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = run(python, "-c", "import modernenc, data_prep; print(modernenc.__file__, data_prep.__file__)", cwd=tmp_path)
    assert str(ROOT) not in found and found.count(str(python.parent.parent)) == 2
    assert "recipe: adapt, base, bioclinical, demo" in run(python, "-m", "modernenc.train", "--help", cwd=tmp_path)
    assert "5,516,800 parameters" in run(python, "-m", "modernenc.plan", "+recipe=demo", cwd=tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for number in range(300):
        (text / f"{number}.txt").write_text(
            " ".join(f"the word {word} of text {number}" for word in range(number, number + 60))
        )
    run(
        python, "-m", "data_prep", "+corpus=text", "input=text", "out=data/text", "sources.text.licence=CC0-1.0",
        "tokenizer.vocab_size=400", "tokenizer.train_mb=1", "block_tokens=256", "buckets=1", "workers=1", cwd=tmp_path,
    )  # fmt: skip
    run(
        python, "-m", "modernenc.train", "+recipe=own", "data.root=data/text", "run_dir=run", "data.workers=0",
        "backbone.hidden_size=32", "backbone.intermediate_size=48", "backbone.num_hidden_layers=2",
        "backbone.num_attention_heads=2", "phases.stable.tokens=20_000", "phases.stable.ramp.tokens=8_000",
        "phases.stable.warmup_tokens=4_000", "phases.extend.tokens=4_000", "phases.decay.tokens=4_000",
        "validation.tokens_per_source=1024", cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "run" / "checkpoints" / "end-of-decay.ckpt").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
