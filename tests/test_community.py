"""What a host of repositories reads: forms for issues, how to cite. Their pages are checked in test_documents.py."""

import tomllib

import pytest
import yaml
from documents import ROOT, parsed

import mlx_mtp

KINDS = {"markdown", "input", "textarea", "checkboxes"}


@pytest.mark.parametrize("name", ["benchmark", "bug"])
def test_forms_hold_what_a_host_asks_of_them(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert {field["type"] for field in form["body"]} <= KINDS and len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_benchmark_form_asks_for_a_report_that_there_is() -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "benchmark.yml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("mlx-mtp bench"))
    assert parsed(line.split()[1:])["as_markdown"].name == "report.md"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (mlx_mtp.__version__, project["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert "urls" not in project  # there is no address yet
