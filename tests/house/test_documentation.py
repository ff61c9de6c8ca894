"""What is written beside the code: links that lead somewhere, and configurations whose own instructions work."""

import re
import subprocess

import pytest

from fedspallm_appfl.settings.reading import load_config
from fedspallm_appfl.validation.rules import check
from helpers.command_line import parse
from helpers.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
ABSOLUTE = re.compile(r"(?<![\w.~*-])/(?:work|root|tmp)\b")
COMMAND = re.compile(r"^(?:Launch|Override)?\s*(?:mpiexec -n \d+ )?(fedspallm .+)$", re.MULTILINE)


def repository():
    """Files that are in the repository, or will be with the next commit."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def links(text):
    """Relative targets of the links of a Markdown text, without anchors."""
    targets = ("".join(groups) for groups in LINK.findall(CODE.sub("", text)))
    return [target.split("#")[0] for target in targets if not re.match(r"#|[a-z]+:", target)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](b.md) and ![c](d/e.png 'title')", ["b.md", "d/e.png"]),
        ("[a](b.md#part) [c](#here) [d](https://x.org/y) [e](mailto:a@b.c)", ["b.md"]),
        ('[a]\n\n[a]: b.md\n<img src="c.svg" width="3">', ["b.md", "c.svg"]),
        ("`[a](no.md)`\n```\n[b](no.md)\n```\n[`c`](d.md)", ["d.md"]),
    ],
)
def test_links_are_found(text, expected):
    assert links(text) == expected


def test_every_relative_link_leads_to_a_file():
    assert [
        f"{file.relative_to(ROOT)}: {target}"
        for file in repository()
        if file.suffix == ".md"
        for target in links(file.read_text("utf-8"))
        if not (file.parent / target).exists()
    ] == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    found = []
    for file in repository():
        content = file.read_bytes()
        if b"\0" not in content and ROOT / "examples" / "demo" / "text" not in file.parents:
            lines = content.decode("utf-8").splitlines()
            found += [
                f"{file.relative_to(ROOT)}:{n}: {line}" for n, line in enumerate(lines, 1) if ABSOLUTE.search(line)
            ]
    assert found == []


def header(config):
    """The comment that a configuration begins with; lines that end in a backslash are joined."""
    comment = re.match(r"(?:#.*\n)*", config.read_text("utf-8"))[0]
    return re.sub(r"\\\n\s*", "", re.sub(r"^# ?", "", comment, flags=re.MULTILINE))


def commands(config):
    return COMMAND.findall(header(config))


configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)


@configs
def test_a_configuration_has_no_problem(config):
    loaded, problems = load_config(config)
    assert problems + check(loaded) == []


@configs
def test_a_configuration_begins_with_purpose_hardware_tests_launch_and_override(config):
    purpose, *rest = header(config).splitlines()
    assert len(purpose.split()) > 3
    assert not purpose.startswith(("Hardware", "Launch", "Override"))
    assert [
        word for word in ("Hardware", "Tested", "Launch", "Override") if not any(line.startswith(word) for line in rest)
    ] == []


@configs
def test_the_commands_of_a_configuration_work(config, monkeypatch):
    assert len(commands(config)) >= 2
    overridden = 0
    for command in commands(config):
        args = parse(command, monkeypatch)
        assert ROOT / args.config == config
        loaded, problems = load_config(config, args.overrides)
        assert problems + check(loaded) == []
        overridden += bool(args.overrides)
    assert overridden


def test_the_commands_of_the_page_of_the_run_directory_parse(monkeypatch):
    page = (ROOT / "docs" / "run_directory.md").read_text("utf-8")
    found = re.findall(r"^    (?:mpiexec -n \d+ )?(fedspallm .+)$", page, re.MULTILINE)
    assert {parse(command, monkeypatch).command for command in found} >= {"watch", "report", "compare", "resume", "run"}
