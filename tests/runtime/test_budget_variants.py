"""The promise of one number holds with variants: their dense parts and planes are in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fine_tunes import fine_tune
from moestro.config import PackOptions, VariantOptions
from moestro.store.locate import locate_source
from moestro.store.pack import pack
from moestro.variants.add import add_variant
from packing import pack_raw

LEAST = """
import json, re, sys
from moestro import LLM, SamplingParams
from moestro.errors import BudgetError
store, sequences, more = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = {"context": 256, "max_sequences": sequences}
def named(error):
    return int(re.findall(r"\\((\\d+) bytes\\)", str(error))[0])
try:
    LLM(store, memory="1MiB", **options)
except BudgetError as error:
    least = named(error)
with LLM(store, memory=least, **options) as llm:
    try:
        llm.generate([1], variant="one")
    except BudgetError as error:
        least = named(error)
prompts = [[(7 * i + 31 * n) % 4000 for i in range(236)] for n in range(2 * sequences)]
names = [("", "one", "two")[n % 3] for n in range(2 * sequences)]
with LLM(store, memory=least + more, **options) as llm:
    llm.generate(prompts, SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True), variant=names)
    llm.generate(prompts[0], variant="one")
    llm.generate(prompts[0], variant="two")
    stats = llm.stats()
    print(json.dumps([stats.peak_rss_bytes, stats.process_floor_bytes, stats.memory_bytes, stats.evictions]))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first layers of the built-in model, and two fine-tunes of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    source, base = locate_source("tiny-qwen3moe-28m"), folder / "base"
    AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=3, dtype="auto").save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, base / name)
    return [base, *(fine_tune(base, folder / f"tuned-{seed}", seed=seed) for seed in (1, 2))]


@pytest.fixture(scope="module", params=["raw", "quantised"])
def store(request: pytest.FixtureRequest, checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, *tuned = checkpoints
    folder = tmp_path_factory.mktemp(request.param) / "store"
    if request.param == "raw":
        made = pack_raw(base, folder)
    else:
        made = pack(base, folder, options=PackOptions(calibration=False))
    for name, one in zip(("one", "two"), tuned, strict=True):
        add_variant(
            made, name, str(one), base=str(base), options=VariantOptions(bits=4, salient=0.02, calibration=False)
        )
    return folder


@pytest.mark.parametrize(("sequences", "more"), [(6, 0), (4, 64 << 20)])
def test_peak_memory_stays_within_floor_plus_budget(store: Path, sequences: int, more: int) -> None:
    """With the least that a variant takes, and with all experts in memory and room beside them."""
    command = [sys.executable, "-c", LEAST, str(store), str(sequences), str(more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, floor, memory, evictions = json.loads(done.stdout)
    assert evictions > 0 or more
    assert peak <= floor + memory, f"{(peak - floor) / 2**20:.2f} MiB used of {memory / 2**20:.2f}"
