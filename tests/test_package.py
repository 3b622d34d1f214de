"""What `pip install trivium` puts on a machine: the packages, the configs, the sample."""

import subprocess
import sys
import zipfile

import pytest
from commands import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the back end that pyproject.toml names, without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return next(out.glob("trivium-*.whl"))


def test_the_wheel_carries_configs_and_sample(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    committed = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "configs").rglob("*.yaml")}
    assert {f"trainer/{name}" for name in committed} <= names
    assert {"data_prep/sample/sample.warc.gz", "data_prep/sample/LICENSES.md"} <= names
    assert not [n for n in names if n.startswith("tests/")]


def test_an_installed_wheel_finds_its_configs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from trainer.compose import config_directory; print(config_directory())"
    env = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(tmp_path / "trainer" / "configs"), found.stderr


def test_the_command_without_arguments_does_not_import_torch():
    code = "import sys; from trainer.cli import dispatch; dispatch([]); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
