"""What a plan predicts of a run, held against the run; and machines that are too small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtool import container, estimate, heap, pipeline, preflight, prepare, probe, recipe
from qtool.checkpoint import open_checkpoint
from qtool.errors import InputError, PlanError
from qtool.outputs import make_plan
from qtool.plan import Plan
from tests import tiny
from tests.test_pipeline import SMALL, Silent


def planned(model: Path, out: Path, method: str = "gptq", **settings: Any) -> tuple[Any, Plan]:
    made = recipe.override(recipe.preset(method), {key: value for key, value in SMALL.items() if "scheme" not in key}
                           | {key.replace("__", "."): value for key, value in settings.items()})
    checkpoint = open_checkpoint(str(model))
    return checkpoint, make_plan(checkpoint, made, out, "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("preflight") / "model", "llama", hidden_size=256, intermediate_size=512,
                     num_hidden_layers=2, head_dim=64)


@pytest.mark.parametrize("method, settings", [
    ("rtn", {}), ("rtn", {"shard_gb": 2e-4}), ("gptq-fast", {"kv_cache": "fp8"}),
    ("nf4", {"scheme__double_quant": True}), ("fp8", {}), ("q4_k_m", {}), ("mxfp4", {}),
    ("aqlm", {"steps__aqlm__rounds": 1}), ("lloyd4", {})])
def test_the_files_are_as_large_as_predicted(method: str, settings: dict[str, Any], model: Path,
                                             tmp_path: Path) -> None:
    checkpoint, plan = planned(model, tmp_path / "out", method, **settings)
    predicted = container.files(plan, checkpoint.name)
    pipeline.run(checkpoint, plan, Silent())
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()
               if path.suffix in (".safetensors", ".gguf")}
    assert predicted == written and sum(written.values()) >= plan.weight_bytes


@pytest.mark.parametrize("spill", [False, True])
def test_temporary_files_are_as_large_as_predicted(spill: bool, model: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """At any save of the stream: what is in the folder beside the output itself, and what unnamed files take."""
    checkpoint, plan = planned(model, tmp_path / "out", memory_budget_gb=1e-9 if spill else 1)
    assert (plan.temporary["spilled"] > 0) == spill and (plan.memory["stream"] == 0) == spill
    unnamed: list[int] = []
    real = probe.Stream.save
    most = [0]

    def save(self: Any, index: int) -> None:
        real(self, index)
        stores = [store for store in (*self.stores, *self._kept.values()) if store.spilled]
        unnamed[:] = [store._file.seek(0, 2) for store in stores]
        named = sum(path.stat().st_size for path in self.folder.glob("stream-*.bin"))
        most[0] = max(most[0], named + sum(unnamed))

    monkeypatch.setattr(probe.Stream, "save", save)
    pipeline.run(checkpoint, plan, Silent())
    assert 0.5 * plan.temporary["peak"] < most[0] <= plan.temporary["peak"]


@pytest.mark.parametrize("method, settings", [("gptq", {}), ("rtn", {}), ("awq", {}), ("q4_k_m", {})])
def test_a_probe_leaves_nothing_and_tells_its_blocks(method: str, settings: dict[str, Any], model: Path,
                                                     tmp_path: Path) -> None:
    checkpoint, plan = planned(model, tmp_path / "out", method, **settings)
    said: list[str] = []
    found = probe.predicted(checkpoint, plan, said.append)
    assert list(tmp_path.iterdir()) == [] and "solving block 1" in said
    assert [one["block"] for one in found["probe"]["blocks"]] == [0, 1]
    timed = sum(one["seconds"] for one in found["probe"]["blocks"])
    assert found["seconds"] > timed > 0 and found["peak_memory"] > 50e6
    assert json.dumps(found)


def test_a_probe_scales_by_the_work_of_the_blocks(model: Path, tmp_path: Path) -> None:
    _, plan = planned(model, tmp_path / "out")
    known = {"blocks": [{"block": 0, "seconds": 8.0}], "before": 1.0, "outside": 0.5, "disk_rate": 1e12,
             "hash_rate": 1e12}
    assert probe._total(plan, known) == pytest.approx(1.0 + 0.5 + 2 * 8.0, rel=1e-3)
    known["blocks"].append({"block": 1, "seconds": 2.0})
    assert probe._total(plan, known) == pytest.approx(1.0 + 0.5 + 8.0 + 2.0, rel=1e-3)


def small_machine(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    monkeypatch.setattr(preflight, "machine", lambda _: {"memory": 1 << 40, "gpu_memory": None, "disk": 1 << 50,
                                                         **sizes})


def test_a_remedy_helps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each remedy alone makes the plan fit, and none is told where none does."""
    checkpoint, plan = planned(model, tmp_path / "out", "gptq", calibration__samples=4096,
                               calibration__sequence_length=256, calibration__batch_tokens=65536)
    small_machine(monkeypatch, memory=plan.peak_memory - plan.memory["stream"] // 2)
    short, = prepare.dry_run(checkpoint, plan)["too_small"]
    assert short["what"] == "memory" and short["needed"] == plan.peak_memory and short["remedies"]
    for remedy in short["remedies"]:
        changes = dict(recipe.parse_setting(word) for word in remedy.split("--set ") if word.strip())
        again = make_plan(checkpoint, recipe.override(plan.recipe, changes), tmp_path / "out", "cpu")
        assert again.peak_memory - again.memory["runtime"] + plan.memory["runtime"] <= short["available"]
    assert any("memory_budget_gb" in remedy for remedy in short["remedies"])
    small_machine(monkeypatch, memory=1 << 20)
    remedies = preflight.shortfalls(plan)[0]["remedies"]
    assert "a data-free method such as rtn" in remedies and not any("--set" in one for one in remedies)


def test_a_small_disk_is_refused_by_run_and_plan(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, plan = planned(model, tmp_path / "out", "gptq", calibration__samples=512)
    small_machine(monkeypatch, disk=plan.disk_bytes - 1)
    short, = preflight.shortfalls(plan)
    assert short["remedies"] == ["--set calibration.samples=256", "choose an --out on another disk"]
    with pytest.raises(PlanError, match=r"too small: the run needs .* of disk in .* calibration.samples=256; or"):
        pipeline.run(checkpoint, plan, Silent())
    assert list(tmp_path.iterdir()) == []


def test_memory_counts_what_the_c_library_keeps_of_freed_tensors(model: Path, tmp_path: Path) -> None:
    """Never more than was there to be freed, nor than its threshold."""
    needs = {samples: planned(model, tmp_path / "out", calibration__samples=samples)[1].memory for samples in (4, 4096)}
    for memory in needs.values():
        freed = memory["peak"] - memory["runtime"] - memory["stream"] - memory["kept"]
        assert memory["kept"] == min(freed, heap.TRIMMED_FROM) > memory["forward"]


def test_a_run_is_refused_only_for_memory_that_never_was(model: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = planned(model, tmp_path / "out")
    small_machine(monkeypatch, memory=plan.peak_memory - 1)
    preflight.refuse(plan)
    assert "memory is short" in preflight.notes(plan)[0]
    monkeypatch.setattr(estimate, "meminfo", lambda: {"MemTotal": plan.peak_memory - 1, "SwapTotal": 0})
    with pytest.raises(PlanError, match="too small"):
        preflight.refuse(plan)


def test_planning_for_a_gpu_that_is_not_here(model: Path, tmp_path: Path) -> None:
    """Its memory is estimated, its time is not known; the run is refused."""
    checkpoint, _ = planned(model, tmp_path / "out")
    plan = make_plan(checkpoint, recipe.preset("gptq"), tmp_path / "out", "cuda:7")
    told = prepare.dry_run(checkpoint, plan)
    assert told["gpu_memory"] > 4 * 512**2 and told["seconds"] is None and told["temporary"]["parts"] == 0
    assert told["samples"] == 512 and told["peak_memory"] < told["gpu_memory"] + 4e9
    with pytest.raises(InputError, match="cuda:7 is not there"):
        pipeline.run(checkpoint, plan, Silent())


def test_the_limit_of_a_container_counts_without_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("memory.max", "1000000"), ("memory.current", "900000"),
                       ("memory.stat", "anon 200000\ninactive_file 600000\nactive_file 100000")):
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(preflight, "CGROUPS", ((str(tmp_path), "memory.max", "memory.current"),))
    monkeypatch.setattr(estimate, "resident", lambda: 5)
    assert preflight.available_memory() == 5 + 800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (preflight.available_memory() or 0) > 10_000_000
