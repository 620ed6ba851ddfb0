"""Pages say what the code says, and lead where they say they do."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from cli.running import MODEL, run
from moestro.cli.docs import options_page
from moestro.store.locate import locate_source

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGE = ROOT / "docs" / "options.md"
_CONSOLE = re.compile(r"^```console\n\$ moestro (.+)\n(error: (?:.+\n)+)```$", re.MULTILINE)
TROUBLES = _CONSOLE.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == options_page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), target


def _anchors(page: Path) -> list[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.fixture(scope="module")
def troubled(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's commands are about."""
    folder = tmp_path_factory.mktemp("troubles")
    (folder / "model.gguf").touch()
    (folder / "empty-folder").mkdir()
    (folder / "my-store").symlink_to(store)
    shutil.copytree(store, folder / "damaged-store")
    os.truncate(folder / "damaged-store" / "experts.planes", 1000)
    quantised = json.loads((locate_source(MODEL) / "config.json").read_text())
    configs = {
        "dense-model": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 128},
        "new-model": {"model_type": "brand_new_moe", "auto_map": {"AutoConfig": "configuration.New"}},
        "awq-model": quantised | {"quantization_config": {"quant_method": "awq"}},
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def test_the_page_of_troubles_has_commands() -> None:
    assert len(TROUBLES) >= 20


@pytest.mark.parametrize(("command", "message"), TROUBLES, ids=[command for command, _ in TROUBLES])
def test_what_the_page_of_troubles_quotes_is_what_is_said(
    troubled: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    """Numbers may differ, and the folder of the built-in model."""
    monkeypatch.chdir(troubled)
    result = run(*command.split(), env={"MOESTRO_CACHE": str(troubled / "cache")})
    assert result.exit_code == 2
    said = result.stderr.replace(f"{locate_source(MODEL).parent}/", "")
    assert _plain(said) == _plain(message)


def _plain(text: str) -> str:
    return re.sub(r"[0-9a-f]{16}|[0-9]+(\.[0-9]+)?", "N", " ".join(text.split()))
