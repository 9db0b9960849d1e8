"""The plan as a value: look-up, mistakes in the file, saving, printing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precscope.errors import PlanError, RunDirectoryError
from precscope.plans import Cast, LayerPrecision, PrecisionPlan, Reason, casts
from precscope.sites import Role, Site

NAMES = ["", "embed", "blocks", "blocks.0", "blocks.0.fc1", "blocks.0.fc2", "blocks.1", "blocks.1.fc1", "head"]


def full_plan() -> PrecisionPlan:
    """A plan with something in every field."""
    overflow = Reason(
        code="overflow",
        text="not fp16: attention logits reach 1.1e5, fp16 ends at 65504",
        site=Site("blocks.0.fc1", Role.OUTPUT),
        numbers={"amax": 1.1e5},
    )
    return PrecisionPlan(
        default="bf16",
        modules={
            "blocks.*.fc1": LayerPrecision("fp32", reasons=(overflow, "kept by hand"), evidence={"flushed": 0.25}),
            "head": LayerPrecision("fp16", policy="cast", params="fp32", evidence={"amax": math.inf, "low": -math.inf}),
        },
        loss_scale={"initial": 1024.0, "interval": [3, 12], "floor": 8.0, "growth_interval": 500, "lo_site": "head"},
        optimizer={"state": "fp32", "eps": 1e-8, "warnings": ["eps 1e-8 is 0 in fp16"]},
        phases=[
            {"from_step": 0, "precision": "plan"},
            {"from_step": 100, "precision": "float32"},
            {"from_step": 150, "plan": {"default": "fp16"}},
        ],
        confirmed={"passed": True, "batches": 4},
        made_from={"run": "runs/a", "steps": [0, 10, 11]},
    )


# Look-up


def test_look_up_takes_the_exact_name_then_the_pattern_then_the_parent_then_the_default():
    plan = PrecisionPlan(default="bf16", modules={"blocks.0": "fp16", "blocks.?.fc1": "fp32", "blocks.1.fc1": "tf32"})
    assert plan["blocks.1.fc1"].compute == "tf32"  # exact, though the pattern matches too
    assert plan["blocks.0.fc1"].compute == "fp32"  # pattern, though the parent has an entry
    assert plan["blocks.0.fc2"].compute == "fp16"  # parent
    assert plan["blocks.0.attn.q.proj"].compute == "fp16"  # a parent further up
    assert plan["blocks.0.fc1.inner"].compute == "fp32"  # what the pattern says of the parent
    assert plan["blocks.10"].compute == "bf16"  # "blocks.1" is no parent of "blocks.10"
    assert plan[""].compute == "bf16"
    assert [plan.source(n) for n in ("blocks.0.fc1", "blocks.0.fc2", "head")] == ["blocks.?.fc1", "blocks.0", None]


def test_the_root_is_everybodys_parent():
    assert PrecisionPlan(default="bf16", modules={"": "fp16"})["a.b"].compute == "fp16"


def test_the_root_has_an_entry_like_any_module(tmp_path):
    plan = PrecisionPlan(default="bf16", modules={"": LayerPrecision("fp32", reasons=("sums",)), "*": "fp16"})
    assert plan.source("") == ""  # exactly its name, though the pattern matches it too
    assert plan[""].compute == "fp32"
    assert plan["head"].compute == "fp16"
    assert plan.sources(["", "head"]) == {"": "", "head": "*"}
    plan.check(["", "head"])
    PrecisionPlan(modules={"": "fp16"}).check([])
    assert PrecisionPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert "(root)   fp32       sums" in str(plan).splitlines()
    assert ">(root)</td>" in plan._repr_html_()
    assert str(plan.diff(plan.replace(modules={"": "tf32", "*": "fp16"}))) == "(root): fp32 -> tf32"


def test_two_matching_patterns_are_an_error_naming_both_and_the_module():
    plan = PrecisionPlan(modules={"blocks.*": "fp16", "*.fc1": "fp32"})
    assert plan["blocks.0.fc2"].compute == "fp16"
    with pytest.raises(PlanError, match=r"'blocks.0.fc1' matches two patterns of the plan, 'blocks.\*' and '\*.fc1'"):
        plan["blocks.0.fc1"]
    assert plan["blocks.0.fc1.inner"].compute == "fp16"  # one pattern matches it, so no parent is asked
    with pytest.raises(PlanError, match="two patterns"):
        plan.check(NAMES)


def test_an_exact_name_that_looks_like_a_pattern_is_found():
    plan = PrecisionPlan(modules={"table[0]": "fp16"})
    assert plan["table[0]"].compute == "fp16"
    plan.check(["table[0]"])


_NAME = st.lists(st.sampled_from("ab0"), min_size=1, max_size=4).map(".".join)
_KEY = st.lists(st.sampled_from(["a", "b", "0", "*", "?"]), max_size=3).map(".".join)


@given(modules=st.dictionaries(_KEY, st.sampled_from(["fp32", "fp16", "bf16"]), max_size=4), names=st.sets(_NAME))
def test_look_up_is_total_or_an_error_and_many_agree_with_one(modules, names):
    plan = PrecisionPlan(default="tf32", modules=modules)
    for name in names:
        try:
            one = plan[name]
        except PlanError as error:
            assert "two patterns" in str(error)
            with pytest.raises(PlanError):
                plan.resolve(names)
            return
        key = plan.source(name)
        assert one is (plan.default if key is None else plan.modules[key])
    assert plan.resolve(names) == {name: plan[name] for name in names}


def test_look_up_of_ten_thousand_modules_is_quick():
    names = [f"blocks.{i}.{part}" for i in range(2000) for part in ("attn.qkv", "attn.out", "fc1", "fc2", "norm")]
    plan = PrecisionPlan(modules={**dict.fromkeys(names[::2], "fp16"), "*.norm": "fp32"})
    plan = plan.replace(modules={k: v for k, v in plan.modules.items() if not k.endswith("norm") or "*" in k})
    start = time.perf_counter()
    plan.check(names)
    assert plan.counts(names)["fp16"] == 4000
    assert time.perf_counter() - start < 2


def test_check_names_what_the_model_lacks_with_the_nearest_names():
    PrecisionPlan(modules={"blocks.0.fc1": "fp16", "blocks.*.fc2": "fp16", "": "fp32"}).check(NAMES)
    with pytest.raises(PlanError, match=r"another model: no module 'blocks.0.fc3' \(did you mean .*blocks.0.fc1"):
        PrecisionPlan(modules={"blocks.0.fc3": "fp16"}).check(NAMES)
    with pytest.raises(PlanError, match=r"pattern 'layers.\*' matches no module"):
        PrecisionPlan(modules={"layers.*": "fp16"}).check(NAMES)
    with pytest.raises(PlanError, match="and 7 more"):
        PrecisionPlan(modules={f"zzz{i}": "fp16" for i in range(10)}).check(NAMES)


def test_a_pattern_that_matches_only_the_root_matches_no_module_of_a_flat_model():
    PrecisionPlan(modules={"*": "fp16"}).check(["", "head"])


# Values and their mistakes


def test_defaults_follow_the_policy():
    assert LayerPrecision("bf16").params == "fp32"
    assert LayerPrecision("bf16", policy="cast").params == "bf16"
    assert LayerPrecision("bfloat16", policy="cast", params="float32").precision == ("bf16", "cast", "fp32")
    assert LayerPrecision("e4m3", policy="cast").params == "fp32"
    assert LayerPrecision("fp32", policy="cast").precision == LayerPrecision("fp32").precision
    assert PrecisionPlan.uniform("fp16", policy="cast").default.params == "fp16"
    assert PrecisionPlan.uniform("fp16", params="bf16")["anything"].precision == ("fp16", "autocast", "bf16")


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (LayerPrecision, {"compute": "fp61"}, "compute: got 'fp61'; allowed: 'fp32', 'tf32', 'bf16', 'fp16', 'e4m3'"),
        (LayerPrecision, {"compute": "fp64"}, "compute: got 'fp64'; allowed"),
        (LayerPrecision, {"params": "e4m3"}, "params: got 'e4m3'; allowed: 'fp32', 'bf16' or 'fp16'"),
        (LayerPrecision, {"policy": "amp"}, "policy: got 'amp'; allowed: 'autocast' or 'cast'"),
        (LayerPrecision, {"polcy": "cast"}, "polcy: unknown field (did you mean policy?); known fields: compute"),
        (LayerPrecision, {"evidence": {"a": object()}}, "evidence: object values cannot be written as JSON"),
        (LayerPrecision, {"reasons": ({"code": "x"},)}, "reasons[0].text: missing"),
        (PrecisionPlan, {"modules": {"a.b": {"compute": "fp61"}}}, "modules['a.b'].compute: got 'fp61'; allowed"),
        (PrecisionPlan, {"modules": {"a": {"compue": "fp16"}}}, "modules['a'].compue: unknown field (did you mean"),
        (PrecisionPlan, {"modules": ["a"]}, "modules: got ['a']; input should be a valid dictionary"),
        (PrecisionPlan, {"modles": {}}, "modles: unknown field (did you mean modules?); known fields: schema, default"),
        (PrecisionPlan, {"loss_scale": {"inital": 8.0}}, "loss_scale.inital: unknown field (did you mean initial?)"),
        (PrecisionPlan, {"loss_scale": {"initial": "8"}}, "loss_scale.initial: got '8'"),
        (PrecisionPlan, {"loss_scale": {"interval": [1]}}, "loss_scale.interval: got [1]"),
        (PrecisionPlan, {"phases": [{"from_step": 1}]}, "phases[0].precision: a phase has either precision or plan"),
        (PrecisionPlan, {"phases": [{"from_step": -1, "precision": "fp16"}]}, "phases[0].from_step: got -1"),
        (PrecisionPlan, {"phases": [{"from_step": 5, "precision": "fp16"}] * 2}, "must rise from phase to"),
        (PrecisionPlan, {"schema": 3}, "schema: got 3; allowed: 1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_names_the_field_and_what_is_allowed(cls, fields, message):
    with pytest.raises(PlanError) as caught:
        cls(**fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_frozen():
    plan = full_plan()
    with pytest.raises(ValueError, match="frozen"):
        plan.default = LayerPrecision("fp16")
    with pytest.raises(ValueError, match="frozen"):
        plan["head"].compute = "fp32"
    changed = plan.replace(default="fp32")
    assert (plan.default.compute, changed.default.compute) == ("bf16", "fp32")
    assert changed.modules == plan.modules
    with pytest.raises(PlanError, match="default.compute: got 'fp7'"):
        plan.replace(default="fp7")


def test_numpy_values_become_plain_ones():
    layer = LayerPrecision(
        "fp16",
        reasons=(Reason(code="cost", text="t", numbers={"ms": np.float32(0.5), "n": np.int64(3)}),),
        evidence={"shares": (np.float64(0.1), np.int32(2)), "ok": np.bool_(True)},
    )
    assert layer.evidence == {"shares": [0.1, 2], "ok": True}
    assert layer.reasons[0].numbers == {"ms": 0.5, "n": 3.0}


# Files


def test_save_and_load_give_an_equal_plan(tmp_path):
    plan = full_plan()
    path = plan.save(tmp_path / "deep" / "er" / "plan.json")
    assert PrecisionPlan.load(path) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
    data = json.loads(path.read_text(), parse_constant=pytest.fail)  # inf and NaN are not JSON
    assert data["schema"] == 1
    assert list(data) == [
        "schema", "default", "modules", "loss_scale", "optimizer", "phases", "confirmed", "made_from"
    ]  # fmt: skip
    assert data["modules"]["head"]["evidence"]["amax"] == "Infinity"
    assert plan != plan.replace(default="fp16")


@pytest.mark.parametrize("nan", [math.nan, float("nan"), -math.nan, np.float32("nan"), np.float64("nan")])
def test_nan_is_written_as_text_and_the_plan_read_back_is_equal(nan):
    plan = PrecisionPlan(
        modules={"a": LayerPrecision("fp16", reasons=(Reason(code="c", text="t", numbers={"ms": nan}),))},
        loss_scale={"initial": nan, "interval": [nan, 3.0]},
        optimizer={"eps": [nan, 1.0]},
        confirmed={"loss": nan},
        made_from={"predicted_ms": {"plan": nan, "fp32": (nan, math.inf)}},
        phases=[{"from_step": 3, "plan": {"made_from": {"x": nan}}}],
    )
    data = json.loads(plan.to_json(), parse_constant=pytest.fail)
    assert data["made_from"] == {"predicted_ms": {"plan": "NaN", "fp32": ["NaN", "Infinity"]}}
    again = PrecisionPlan.from_json(plan.to_json())
    assert again == plan
    assert math.isnan(again.made_from["predicted_ms"]["plan"])
    assert not plan.diff(again)
    assert again != plan.replace(made_from={"predicted_ms": {"plan": 1.0, "fp32": [nan, math.inf]}})


def test_a_plan_written_by_hand_may_be_short():
    plan = PrecisionPlan.from_json('{"schema": 1, "default": "bf16", "modules": {"head": "fp32"}}')
    assert plan == PrecisionPlan(default=LayerPrecision("bf16"), modules={"head": LayerPrecision("fp32")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "default": "bf16",}', r"not JSON: .* line 1, column 3"),
        ("[1]", 'not a plan: a plan is a JSON object with "schema": 1'),
        ('{"default": "bf16"}', "not a plan"),
        ('{"schema": 9, "new": 1}', r"schema 9 is newer than this precscope reads \(1\): upgrade"),
        ('{"schema": 0}', "schema: got 0; allowed: 1"),
        ('{"schema": true}', "schema: got True; allowed: 1"),
        ('{"schema": 1, "modules": {"a": "fp16", "a": "fp32"}}', "'a' is there twice"),
        ('{"schema": 1, "modules": {"a": {"compute": "fp17"}}}', r"modules\['a'\].compute: got 'fp17'"),
        ('{"schema": 1, "default": {"compute": 16}}', "default.compute: got 16; allowed"),
    ],
)
def test_bad_files_are_one_line_with_the_path(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        PrecisionPlan.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_binary_and_directory_files(tmp_path):
    with pytest.raises(PlanError, match="no such file; `precscope recommend RUN` writes a plan"):
        PrecisionPlan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot be read"):
        PrecisionPlan.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x80\x81\xff")
    with pytest.raises(PlanError, match="the file is not text"):
        PrecisionPlan.load(tmp_path / "binary")


def test_what_cannot_be_written_is_an_error_and_the_old_plan_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot write the plan to .*file/plan.json"):
        full_plan().save(tmp_path / "file" / "plan.json")
    path = full_plan().save(tmp_path / "plan.json")
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(RunDirectoryError, match="No space left on device; give another path"):
        PrecisionPlan.uniform("fp16").save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "plan.json"]


# Comparing, phases, printing


def test_diff_says_what_changes_and_is_empty_for_plans_that_run_alike():
    plan = full_plan()
    other = plan.replace(
        modules={**plan.modules, "head": LayerPrecision("bf16"), "embed": LayerPrecision("bf16", reasons=("why not",))},
        loss_scale={},
    )
    lines = str(plan.diff(other)).splitlines()
    assert lines[0] == "head: fp16 cast -> bf16"
    assert lines[1].startswith("loss_scale: initial 1024, interval [3, 12]")
    assert len(lines) == 2  # embed had the default bf16 before
    assert not plan.diff(plan)
    assert str(plan.diff(plan)) == "no difference"
    by_name = PrecisionPlan.uniform("fp16").diff(PrecisionPlan(modules={"b*": "fp16"}), names=NAMES)
    assert [d.where for d in by_name] == ["default", "", "embed", "head"]
    assert "blocks.*.fc1: fp32 -> no entry" in str(plan.diff(plan.replace(modules={})))


def test_phases_give_the_plan_of_a_step():
    plan = full_plan()
    assert plan.at_step(0) == plan.replace(phases=())
    assert plan.at_step(99).modules == plan.modules
    assert plan.at_step(100).default.compute == "fp32"
    assert plan.at_step(149).modules == {}
    assert plan.at_step(10**6).default.compute == "fp16"


def test_status_is_a_word():
    assert full_plan().status == "confirmed"
    assert full_plan().replace(confirmed=None).status == "predicted"
    assert full_plan().replace(confirmed={"passed": False}).status == "predicted"


def test_printing_fits_80_columns_and_collapses_siblings():
    reason = Reason(code="cost", text="fp16: fastest allowed (fp32 3.2, fp16 1.1 ms per step) " * 5)
    long = "encoder.very.deep.and.long.name.of.a.module.that.never.ends.fc1"
    plan = full_plan().replace(
        modules={
            **{f"blocks.{i}.fc1": LayerPrecision("fp16", reasons=(reason,)) for i in (2, 0, 1, 5)},
            "blocks.3.fc1": LayerPrecision("fp32", reasons=("kept by hand",)),
            long: LayerPrecision("e4m3"),
            "": LayerPrecision("bf16"),
        },
    )
    text = str(plan)
    assert max(map(len, text.splitlines())) <= 80
    first = " ".join(text.split())
    assert first.startswith("precision plan (confirmed); default: bf16; entries: fp16 4, fp32 1, e4m3 1, bf16 1")
    for part in ("blocks.{0-2,5}.fc1", "blocks.3.fc1", "kept by hand", "(root)", "from step 100: fp32", "initial 1024"):
        assert part in text
    assert "precision plan (predicted); default: fp32; entries: none" in str(PrecisionPlan())


def test_html_escapes_names():
    plan = PrecisionPlan(modules={"</script><img onerror=x>": LayerPrecision("fp16", reasons=("a < b",))})
    text = plan._repr_html_()
    assert "&lt;/script&gt;&lt;img" in text
    assert "a &lt; b" in text
    assert "<img" not in text


def test_casts_are_the_edges_whose_ends_differ():
    plan = PrecisionPlan(default="bf16", modules={"norm": "fp32", "head": "tf32"})
    edges = [("embed", "blocks"), ("blocks", "norm"), ("norm", "head"), ("norm", "embed")]
    assert casts(plan, edges) == [Cast("blocks", "norm", "bf16", "fp32"), Cast("norm", "embed", "fp32", "bf16")]
    assert casts(plan, []) == []


def test_plans_need_no_torch():
    code = "import sys, precscope.plans as p; p.PrecisionPlan.uniform('fp16'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
