"""The image of a site: what its Dockerfile copies is there, and what starts in it, with a stand-in for the endpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.paths import DEMO, ROOT

DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "containers" / "Dockerfile").read_text("utf-8"))
BIN = Path(sys.executable).parent


def test_what_is_copied_is_in_the_build_context():
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in context)
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )?(\S+) ", DOCKERFILE, re.MULTILINE)
    [template] = re.findall(r"examples/\S+\.j2", DOCKERFILE)
    for name in {*copied, template, "README.md", "LICENSE"} - {"."}:
        assert (ROOT / name).exists() and {name, *map(str, Path(name).parents)} & context, name


def test_the_image_ends_as_a_user_without_rights():
    assert re.findall(r"^USER (.*)", DOCKERFILE, re.MULTILINE) == re.findall(r"useradd --uid (\d+)", DOCKERFILE)


def test_the_page_names_files_and_folders_of_the_image():
    """Its commands need Docker, so they are read and not run."""
    page = (ROOT / "docs" / "globus.md").read_text("utf-8")
    [commands] = [block for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S) if "docker" in block]
    assert (ROOT / re.search(r"--file (\S+)", commands)[1]).is_file()
    kept = {*json.loads(re.search(r"^VOLUME (.*)", DOCKERFILE, re.M)[1]), "/site"}
    assert set(re.findall(r"--volume \"?[^: ]+:([\w./]+)", commands)) == kept


@pytest.fixture
def image(tmp_path):
    """Folders as in the image, made by its own line; programs are those of this environment, but nothing is started."""
    opt, site = tmp_path / "opt" / "fedspallm", tmp_path / "site"
    (opt / "bin").mkdir(parents=True)
    site.mkdir()
    [line] = re.findall(r"^RUN (sed .*)", DOCKERFILE, re.MULTILINE)
    line = line.replace("/opt/fedspallm", str(opt)).replace("/site/site.yaml", f"{site}/site.yaml")
    subprocess.run(["sh", "-c", line], cwd=ROOT, check=True, timeout=60)
    (opt / "bin" / "endpoint.sh").write_bytes((ROOT / "containers" / "endpoint.sh").read_bytes())
    stand_in = f'#!/bin/sh\n[ "$1" = start ] && echo "started $*" || exec {BIN}/globus-compute-endpoint "$@"\n'
    (opt / "bin" / "globus-compute-endpoint").write_text(stand_in)
    for file in (opt / "bin").iterdir():
        file.chmod(0o755)
    text = {"model": str(DEMO / "model"), "clients": {"a": {"text": str(DEMO / "text" / "austen" / "calib.txt")}}}
    (site / "site.yaml").write_text(yaml.safe_dump(text))
    return opt, site


def start(opt, site, home):
    paths = {"PATH": f"{opt}/bin:{BIN}:{os.environ['PATH']}", "HOME": str(home), "FEDSPALLM_SITE": f"{site}/site.yaml"}
    command = [opt / "bin" / "endpoint.sh", "--debug"]
    return subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_container_configures_its_endpoint_once_and_starts_it(image, tmp_path):
    opt, site = image
    first = start(opt, site, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "Created profile" in first.stdout and first.stdout.endswith("started start fedspallm --debug\n")
    template = (tmp_path / ".globus_compute" / "fedspallm" / "user_config_template.yaml.j2").read_text("utf-8")
    assert f". {opt}/bin/activate\n" in template and f"FEDSPALLM_SITE={site}/site.yaml\n" in template
    assert "~" not in template.partition("engine:")[2]
    again = start(opt, site, tmp_path)
    assert again.returncode == 0 and "Created profile" not in again.stdout
    (site / "site.yaml").write_text("clients: {a: {text: nothing.txt}}")
    refused = start(opt, site, tmp_path)
    assert refused.returncode == 2 and "started" not in refused.stdout
