"""What GitHub reads: workflows, templates and the citation say the same as the Makefile and the packages."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import grating_core

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
MANIFESTS = [
    ROOT / "pyproject.toml",
    ROOT / "kernels/pyproject.toml",
    *sorted(ROOT.glob("integrations/*/pyproject.toml")),
]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path):
    return read(path)["jobs"].values()


def steps(path):
    return [step for job in jobs(path) for step in job.get("steps", [])]


def project(manifest):
    return tomllib.loads(manifest.read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_runs_here_and_may_do_no_more_than_it_needs(path):
    commands = "\n".join(step.get("run", "") for step in steps(path))
    called = {target for targets in re.findall(r"\bmake ([\w -]+)", commands) for target in targets.split()}
    assert called
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert called <= set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]
    for job in jobs(path):
        assert "write" not in str(job.get("permissions")) or job["environment"]
        assert "uses" in job or job["timeout-minutes"]
    for step in steps(path):
        assert "uses" not in step or re.fullmatch(r"\./.*|[\w./-]+@(v\d+|release/v\d+)", step["uses"])
        assert "secrets." not in str(step)


def test_every_python_that_is_promised_is_tested():
    (matrix,) = (job["strategy"]["matrix"] for job in jobs(GITHUB / "workflows/tests.yml") if "strategy" in job)
    promised = [f"Programming Language :: Python :: {version}" for version in matrix["python"]]
    for manifest in MANIFESTS:
        named = [one for one in project(manifest)["classifiers"] if re.search(r":: 3\.\d+$", one)]
        assert named == promised, manifest
        assert project(manifest)["requires-python"] == f">={matrix['python'][0]}"


def test_a_release_publishes_every_distribution():
    publish = read(GITHUB / "workflows/release.yml")["jobs"]["publish"]
    published = publish["strategy"]["matrix"]["distribution"]
    assert published[0] == "grating-core"
    assert sorted(published) == sorted(project(manifest)["name"] for manifest in MANIFESTS)


@pytest.mark.parametrize("path", sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.stem)
def test_a_template_asks_something(path):
    template = read(path)
    if path.stem == "config":
        assert template == {"blank_issues_enabled": False}
        return
    asked = [field for field in template["body"] if field["type"] == "textarea"]
    assert len({field["id"] for field in asked}) == len(asked) >= 2
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_the_citation_is_of_this_version_and_names_both_papers():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == grating_core.__version__
    assert citation["license"] == project(MANIFESTS[0])["license"]
    assert citation["abstract"] == project(MANIFESTS[0])["description"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for reference in citation["references"]:
        assert reference["authors"]
        assert reference["title"] in " ".join(readme.split())
        assert reference["url"] in readme
