"""The report's page, read back: its figures are those of the input, and nothing in it comes from elsewhere."""

from __future__ import annotations

import base64
import copy
import gzip
import importlib.util
import json
import math
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from html_tree import numbers, parse, rows

from nnslim.benchmark.timing_figures import QualityPoint, quality_figure, stage_figure
from nnslim.benchmark.timings import COLUMNS, Benchmark, read_benchmark
from nnslim.compression.config import tucker
from nnslim.compression.record import SlimRecord
from nnslim.errors import InputError
from nnslim.evaluation.agreement import Agreement, CaseAgreement, ClassAgreement
from nnslim.evaluation.classes import LabelClass
from nnslim.evaluation.compare import CaseScores, Scores
from nnslim.evaluation.scores import ClassScores, Evaluation, ScoreTable, read_scores, write_csv, write_summary
from nnslim.methods.base import Decision
from nnslim.report.page import quality_view, render_report, viewer_view
from nnslim.report.page_data import FileFact, ReportData, Viewer, best_pair, time_points
from nnslim.report.page_figures import inline_svg, layer_figure, recovery_figure, strips_figure
from nnslim.report.viewer import Scene, embed, find_niivue, label_box
from nnslim.tables import write_table

EVIL = "<b>&\"'</script><!--"
SCRIPT = "(function(a){})(globalThis);/* Niivue */"
CONTENT = {
    "nnslim": "0.1.0",
    "source": "nnUNetTrainer__nnUNetPlans__3d_fullres",
    "dataset": "Dataset004_Hippocampus",
    "configuration": "3d_fullres",
    "checkpoint": "checkpoint_final.pth",
    "folds": ["0", "1"],
    "config": tucker(rank_factor=0.3).model_dump(mode="json"),
    "input_shape": [1, 1, 40, 56, 40],
    "dense": {"parameters": 3000, "macs": 4_000_000_000, "macs_fvcore": 4_100_000_000},
    "slim": {"parameters": 1000, "macs": 1_000_000_000, "macs_fvcore": 1_100_000_000},
    "layers": [
        vars(Decision("stem.conv", "dense", (32, 1, 3, 3, 3), None, 10**8, 10**8, 896, 896, "first layer")),
        vars(
            Decision(
                "body.conv", "tucker", (32, 32, 3, 3, 3), (8, 16), 39 * 10**8, 9 * 10**8, 27680, 2272, error=0.1234
            )
        ),
        vars(Decision("spare", "dense", (3, 9, 1, 1, 1), None, 0, 0, 30, 30, "not reached by the forward pass")),
    ],
    "recovery": [
        {
            "steps": 20,
            "estimated_drop_before": 0.04,
            "estimated_drop_after": 0.01,
            "history": [[10, 0.02], [20, 0.01]],
            "stopped": "steps",
        }
    ]
    * 2,
    "stored": {
        "precision": "half",
        "weight_bytes": 1_900_000,
        "source_weight_bytes": 3_000_000,
        "source_checkpoint_bytes": 8_000_000,
        "folds": 1,
        "agreement": {"tiles": 4, "mean_dice": 0.999, "classes": {"one": {"dice": 0.999, "worst_dice": 0.99}}},
    },
    "speed": {"dense_ms": 800.0, "slim_ms": 200.0, "backend": "eager"},
}


def case(name, labelled=True, dice_slim=0.88, **dice):
    labels = (0.9, dice_slim) if labelled else ()
    classes = {key: ClassAgreement(value, 100, 110, 0.01, *labels) for key, value in dice.items()}
    return CaseAgreement(name, classes, labelled)


def record(**changes):
    content = copy.deepcopy(CONTENT) | changes
    return SlimRecord.from_dict(content)


def agreed(**options):
    cases = [case("a", one=0.9, two=0.99, **options), case("b", one=0.7, two=0.95, **options)]
    return Agreement(("one", "two"), [*cases, case("c", one=0.8, two=math.nan, **options)])


def data(**changes):
    basic = ReportData(
        "small",
        record(),
        "2026-01-01 12:00 UTC",
        "a folder",
        files=[FileFact("f", 8_000_000, "ab" * 32, 1_500_000, "half", True)],
    )
    return replace(basic, **changes)


def row(name, backend, ms, counts, **more):
    timed = {"time_median_ms": ms, "time_q1_ms": ms - 1, "time_q3_ms": ms + 1, "eval_passes": 5, "status": "done"}
    sizes = {"macs": counts["macs"] * 2, "parameters": counts["parameters"], "batch_size": 2}
    return {"name": name, "backend": backend, "precision": "f32", "threads": 2, **timed, **sizes, **more}


def bench(**changes):
    dense, slim = CONTENT["dense"], CONTENT["slim"]
    timed = [
        row("dense", "stock", 1000.0, dense, speedup_stock=1.0),
        row("dense", "openvino: cpu", 500.0, dense, speedup_stock=2.0),
        row("mine", "stock", 400.0, slim, speedup_stock=2.5),
        row("mine", "openvino: cpu", 100.0, slim, speedup_stock=10.0),
        {"name": "broken", "backend": "eager", "precision": "f32", "reason": "out of memory", "status": "failed"},
    ]
    stages = {"dense, stock f32": {"read": 0.1, "forward": 1.5}, "mine, openvino f32": {"read": 0.1, "forward": 0.3}}
    return replace(Benchmark("bench", timed, stages, {"python": 0.02}), **changes)


def scene(name="a", role="Worst case", shape=(10, 12, 14), labels=True):
    image = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    dense = np.zeros(shape, np.int32)
    dense[3:6, 3:6, 3:6] = 1
    slim = dense.copy()
    slim[4:6, 4, 4:6] = 2  # another class
    slim[3, 3, 3] = 0  # dense only
    slim[6, 4, 4] = 1  # slim only
    maps = {"dense": dense, "slim": slim} | ({"label": dense} if labels else {})
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (10, 20, 30)
    return Scene(name, role, image, maps, affine, {"one": 0.9, "two": math.nan})


def tile(page, key):
    """Return what a headline figure says: value, the one before, the change, and the numbers of its note."""
    found = page.one("li", id=f"tile-{key}")
    parts = {name: " ".join(one.text for one in found.all("span", class_=name)) for name in ("before", "change")}
    return {"value": found.one("p", class_="big").text, **parts, "note": numbers(found.one("p", class_="note").text)}


def told(page, key):
    """Return the numbers that a paragraph tells."""
    return numbers(page.one("p", id=key).text)


# --- the page says what its input says -------------------------------------------------------------------------------


def test_layer_table_equals_the_record():
    page = parse(render_report(data()))
    found = rows(page.one("table", id="layer-table"))
    assert [line["layer"] for line in found] == ["stem.conv", "body.conv", "spare"]
    assert found[1] == {
        "layer": "body.conv",
        "action": "tucker",
        "kernel": "32×32×3×3×3",
        "rank out": "8",
        "rank in": "16",
        "MACs before, G": "3.900",
        "MACs after, G": "0.900",
        "parameters before": "27,680",
        "parameters after": "2,272",
        "error": "0.1234",
        "why dense": "",
    }
    assert (found[0]["rank out"], found[0]["error"], found[0]["why dense"]) == ("–", "–", "first layer")
    shown = [text.text for text in page.one("svg", id="layer-figure").all("text")]
    assert "stem.conv" in shown and "body.conv" in shown and "spare" not in shown  # what is not run has no bar
    assert "3.900 → 0.900" in shown and "0.100" in shown


def test_layer_figure_has_two_bars_per_layer():
    assert layer_figure([]) is None
    (axes,) = layer_figure(record().decisions).axes
    before, after = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert before == pytest.approx([0.1, 3.9]) and after == pytest.approx([0.1, 0.9])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["stem.conv", "body.conv"]
    assert axes.yaxis_inverted()  # the first on top


def test_headline_figures_equal_the_record():
    page = parse(render_report(data(record=replace(record(), agreement=agreed()))))
    assert tile(page, "parameters") == {"value": "1,000", "before": "dense 3,000", "change": "3.00x fewer", "note": []}
    macs = {"value": "1.00 G", "before": "dense 4.00 G", "change": "4.00x fewer", "note": [4.1, 1.1]}
    assert tile(page, "macs") == macs and "40x56x40" in page.one("li", id="tile-macs").one("h2").text
    # A file that is larger than the dense weights by its optimiser's state is no reason to say "more".
    size = {"value": "1.50 MB", "before": "dense 3.00 MB", "change": "2.00x less", "note": [8.0]}
    assert tile(page, "size") == size and "half precision" in page.one("li", id="tile-size").text
    assert "optimiser's state" in page.one("li", id="tile-size").text
    assert tile(page, "time") == {"value": "200 ms", "before": "dense 800 ms", "change": "4.00x less", "note": []}
    assert "eager" in page.one("li", id="tile-time").text
    # one: (0.9 + 0.7 + 0.8) / 3; two: (0.99 + 0.95) / 2
    mean = f"{(0.8 + 0.97) / 2:.4f}"
    assert tile(page, "agreement") == {"value": mean, "before": "", "change": "", "note": [3, 0.7]}
    assert "one in b" in page.one("li", id="tile-agreement").text
    assert tile(page, "accuracy") == {
        "value": "0.8800",
        "before": "dense 0.9000",
        "change": "",
        "note": [0.02, 3, 0.01],  # drop, labelled cases, estimate
    }
    assert not page.all("li", class_="gap")
    assert told(page, "summary") == [1, 3, 4, 4, float(mean)]  # layers, MACs, time, Dice


def test_headline_time_is_of_the_fastest_row_with_a_dense_one_beside_it():
    pair = best_pair([bench()], record())
    assert (pair.slim["time_median_ms"], pair.dense["time_median_ms"], pair.stock["time_median_ms"]) == (100, 500, 1000)
    page = parse(render_report(data(benchmarks=[bench()])))
    # float32 on two threads, five passes; stock nnU-Net takes 1 s, which is ten times as long
    shown = {"value": "100 ms", "before": "dense 500 ms", "change": "5.00x less", "note": [32, 2, 5, 1, 10]}
    assert tile(page, "time") == shown and "openvino" in page.one("li", id="tile-time").text
    lonely = bench(rows=[one for one in bench().rows if one["backend"] != "stock" or one["name"] != "mine"][:2])
    assert best_pair([lonely], record()) is None  # no slim row at all


def test_method_names_only_the_settings_that_differ():
    page = parse(render_report(data()))
    facts = page.one("section", id="done").all("dl")[0]
    assert [one.text for one in facts.all("dt")] == ["rank_factor"]
    assert [one.text for one in facts.all("dd")] == ["0.3"]
    assert told(page, "data") == []  # no images
    (half,) = page.one("section", id="done").all("p", class_="later")
    assert numbers(half.text) == [4, 0.999] and "half precision" in half.text  # tiles, Dice
    assert json.loads(page.one("section", id="done").one("pre").text) == CONTENT["config"]


def test_page_tells_no_folders_of_the_machine():
    config = copy.deepcopy(CONTENT["config"])
    config["calibration"]["images"] = "/home/someone/secret/imagesTr"
    config["methods"][0]["settings"]["plan"] = "/home/someone/plan.csv"
    text = render_report(data(record=record(config=config)))
    assert "someone" not in text and ".../imagesTr" in text and ".../plan.csv" in text


def test_images_and_recovery_are_told():
    config = copy.deepcopy(CONTENT["config"])
    config["calibration"] |= {"images": "/data/imagesTr", "count": 16, "seed": 3}
    page = parse(render_report(data(record=record(config=config))))
    assert told(page, "data") == [16, 3, 0, 20, 0.04, 0.01, 1, 20, 0.04, 0.01]  # images, seed; fold, steps, drops
    names = [text.text for text in page.one("svg", id="recovery-figure").all("text")]
    assert {"fold 0", "fold 1", "steps"} < set(names)


def test_layers_that_went_back_to_dense_are_told():
    speed = {**CONTENT["speed"], "where": "a CPU", "planned_ms": 300.0, "put_back": ["a", "b"]}
    page = parse(render_report(data(record=record(speed=speed))))
    assert told(page, "speed") == [200, 800, 300, 2] and "a CPU" in page.one("p", id="speed").text


def test_copy_in_half_precision_has_no_layers_to_show():
    page = parse(render_report(data(record=record(layers=[], slim=CONTENT["dense"], recovery=[], config={}))))
    assert told(page, "summary") == [] and "half" in page.one("p", id="summary").text
    assert not page.all("svg", id="layer-figure")
    assert rows(page.one("table", id="layer-table")) == []


def test_reasons_for_dense_layers_are_counted_with_their_share():
    reasons = page_tables(data(), "done")[0]
    assert reasons == [
        {"reason": "first layer", "layers": "1", "share of the dense MACs": "2.5%"},
        {"reason": "not reached by the forward pass", "layers": "1", "share of the dense MACs": "0.0%"},
    ]


def page_tables(what, section):
    return [rows(table) for table in parse(render_report(what)).one("section", id=section).all("table")]


def test_class_table_joins_agreement_and_scores(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("case,label,name,dice,nsd,hd95\na,1,1,0.5,0.75,2\nb,1,1,0.7,nan,4\na,3,new,nan,nan,nan\n")
    (tmp_path / "summary.json").write_text(json.dumps({"nnslim": {"tolerance_mm": 1.5}}))
    scores = read_scores(path, "slim", {"1": "one", "2": "two"})
    (found,) = page_tables(data(record=replace(record(), agreement=agreed()), scores=[scores]), "classes")
    assert [line["class"] for line in found] == ["one", "two", "new"]
    first = found[0]
    assert (first["Dice, slim against dense"], first["worst case"]) == ("0.8000", "b (0.7000)")
    assert (first["volume"], first["drop"], first["estimated drop"]) == ("+10.00 %", "0.0200", "0.0100")
    assert (first["slim: Dice"], first["slim: NSD at 1.5 mm"], first["slim: HD95, mm"]) == ("0.6000", "0.7500", "3")
    assert (found[1]["slim: Dice"], found[2]["slim: Dice"], found[2]["drop"]) == ("–", "–", "–")
    page = parse(render_report(data(record=replace(record(), agreement=agreed()))))
    assert page.one("tr", class_="lowest").one("th").text == "one"
    (note,) = page.one("section", id="classes").all("p", class_="class-note")
    assert numbers(note.text) == [3, 0.885, 0.8, 0.7]  # cases, mean; lowest class; worst case
    dots = [one.text for one in page.one("svg", id="class-figure").all("title")]
    assert dots == ["a: 0.9000", "b: 0.7000", "c: 0.8000", "a: 0.9900", "b: 0.9500"]  # class two is not in case c


def test_benchmark_table_and_stages_equal_the_benchmark():
    timings, stages = page_tables(data(benchmarks=[bench()]), "time")
    remarks = ["its dense network"] * 2 + ["this model"] * 2 + ["failed: out of memory"]
    assert [line["remark"] for line in timings] == remarks
    assert (timings[3]["run by"], timings[3]["median, ms"], timings[3]["quartiles, ms"]) == (
        "openvino f32",
        "100",
        "99 to 101",
    )
    assert timings[3]["against stock nnU-Net"] == "10.00x"
    assert stages == [
        {"pipeline": "dense, stock f32", "read, s": "0.100", "forward, s": "1.500", "all, s": "1.600"},
        {"pipeline": "mine, openvino f32", "read, s": "0.100", "forward, s": "0.300", "all, s": "0.400"},
    ]
    shown = {
        text.text for text in parse(render_report(data(benchmarks=[bench()]))).one("svg", id="stages-1").all("text")
    }
    assert {"dense, stock f32", "mine, openvino f32", "read", "forward", "1.6 s", "0.4 s"} < shown


def test_what_was_not_measured_is_said_with_the_command():
    bare = data(record=record(speed=None, recovery=[]), files=[])
    page = parse(render_report(bare))
    gaps = " ".join(one.text for one in page.one("section", id="gaps").all("code"))
    for command in ("nnslim agree", "nnslim evaluate", "nnslim benchmark", "nnslim report --dense DENSE -i IMAGES"):
        assert command in gaps
    missing = {one.attributes["id"] for one in page.all("li", class_="gap")}
    assert missing == {"tile-time", "tile-agreement", "tile-accuracy"}
    assert told(page, "speed") == []
    for section in ("time", "classes"):
        assert len(page.one("section", id=section).all("p", class_="missing")) == 1
    full = data(
        record=replace(record(), agreement=agreed()),
        benchmarks=[bench()],
        scores=[nsd_scores()],
        scenes=[scene()],
    )
    assert not parse(render_report(full)).all("section", id="gaps")


def nsd_scores():
    return ScoreTable("slim", {"one": ClassScores(0.8, 0.9, 1.0, 3)}, 3)


def test_estimated_drop_is_called_an_estimate():
    page = parse(render_report(data(record=replace(record(), agreement=agreed(labelled=False)))))
    assert tile(page, "estimate")["value"] == "0.0100" and not page.all("li", id="tile-accuracy")


def test_models_that_are_compared_get_a_pareto_figure():
    mine = replace(record(), agreement=agreed())
    worse = replace(mine, slim=replace(mine.slim, macs=2 * 10**9), agreement=Agreement(("one",), [case("a", one=0.5)]))
    page = parse(render_report(data(record=mine, others={"other": worse})))
    (table,) = page.one("section", id="pareto").all("table")
    found = rows(table)
    assert [(line["network"], line["GMAC per patch"], line["Dice"]) for line in found] == [
        ("dense", "4", "0.9000"),
        ("small", "1", "0.8800"),
        ("other", "2", "0.8800"),
    ]
    assert [line["beaten in both by another"] for line in found] == ["no", "no", "yes"]
    marks = {text.text for text in page.one("svg", id="models").all("text")}
    assert {"1", "2", "3", "dense", "slim", "GMAC per patch", "Dice"} < marks
    with pytest.raises(InputError, match="two models are named small"):
        render_report(data(others={"small": mine}))


def test_times_of_a_benchmark_are_drawn_against_the_dice_of_the_model_that_a_row_is_of():
    page = parse(render_report(data(record=replace(record(), agreement=agreed()), benchmarks=[bench()])))
    found = rows(page.one("section", id="pareto").one("table"))
    assert [(line["network"], line["run by"], line["ms per patch"], line["Dice"]) for line in found] == [
        ("dense", "stock f32", "500", "0.9000"),  # batches of two
        ("dense", "openvino f32", "250", "0.9000"),
        ("mine", "stock f32", "200", "0.8800"),
        ("mine", "openvino f32", "50", "0.8800"),
    ]


def test_row_of_one_of_two_models_of_one_structure_is_told_by_its_name():
    mine = replace(record(), agreement=agreed())
    twin = replace(mine, agreement=Agreement(("one",), [case("a", one=0.5, dice_slim=0.4)]))
    points = {}
    for name in ("small", "twin", "mine"):
        timed = bench(rows=[row(name, "stock", 100.0, CONTENT["slim"])])
        (point,) = time_points([timed], {"small": mine, "twin": twin})
        points[name] = point.quality
    assert points["small"] == pytest.approx(0.88) and points["twin"] == pytest.approx(0.4)
    assert math.isnan(points["mine"])  # it may be either


# --- nothing breaks out, nothing is loaded ----------------------------------------------------------------------------


def evil_data():
    content = json.loads(json.dumps(CONTENT).replace("body.conv", "LAYER").replace("first layer", "REASON"))
    content = json.loads(json.dumps(content).replace("LAYER", json.dumps(EVIL)[1:-1]).replace("REASON", EVIL[:4]))
    content |= {"dataset": EVIL, "source": EVIL}
    content["config"]["calibration"]["images"] = f"/data/{EVIL.replace('/', '')}"
    agreement = Agreement((EVIL,), [case(EVIL, **{EVIL: 0.5}), case("b", **{EVIL: 0.6})], {EVIL: EVIL})
    measured = bench(name=EVIL, rows=[{**one, "name": EVIL, "reason": EVIL} for one in bench().rows])
    measured = replace(measured, profiles={EVIL: {EVIL: 1.0}}, starts={EVIL: 1.0})
    return data(
        model=EVIL,
        folder=EVIL,
        record=replace(SlimRecord.from_dict(content), agreement=agreement),
        files=[FileFact(EVIL, 1, EVIL)],
        benchmarks=[measured, bench()],
        scores=[replace(nsd_scores(), name=EVIL, classes={EVIL: nsd_scores().classes["one"]})],
        others={"x": replace(record(), agreement=agreed())},
        scenes=[replace(scene(EVIL, EVIL), note=EVIL, dice={EVIL: 0.5})],
        viewer=Viewer(SCRIPT, {1: EVIL, 2: "two"}),
    )


def test_names_from_outside_are_text_and_nothing_else():
    plain = parse(render_report(replace(evil_data(), model="m")))
    page = parse(render_report(evil_data()))
    assert not page.all("b")
    assert len(page.all("script")) == len(plain.all("script")) == 4
    assert page.one("h1").text == f"{EVIL}: report of the slim model"
    assert rows(page.one("table", id="layer-table"))[1]["layer"] == EVIL
    assert rows(page.one("table", id="class-table"))[0]["worst case"] == f"{EVIL} (0.5000)"
    (cases,) = [json.loads(one.content[0]) for one in page.all("script", id="viewer-data")]
    assert cases["cases"][0]["case"] == EVIL and cases["cases"][0]["labels"]["labels"][1] == EVIL
    assert page.all("img")[0].attributes["alt"].count(EVIL) == 1


@pytest.mark.parametrize("viewer", [False, True])
def test_page_refers_to_nothing_outside_and_forbids_it(viewer):
    made = evil_data() if viewer else data()
    text = render_report(made)
    page = parse(text)
    for tag in ("a", "link", "img", "script", "iframe", "object", "source", "audio", "video", "use", "image"):
        for node in page.all(tag):
            for key in ("src", "href", "srcset", "data", "xlink:href"):
                value = node.attributes.get(key)
                assert value is None or value.startswith(("#", "data:")), (tag, key, value)
    for style in page.all("style"):
        assert "url(" not in style.content[0] and "@import" not in style.content[0]
    policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    allowed = {"'none'", "'unsafe-inline'", "data:", "blob:"}
    assert all(set(sources) <= allowed for sources in rules.values())
    assert {link.attributes["href"][1:] for link in page.all("a")} <= {
        node.attributes.get("id") for tag in ("section", "main") for node in page.all(tag)
    }


def test_page_can_be_used_without_seeing_it():
    page = parse(render_report(evil_data()))
    assert page.one("html").attributes["lang"] == "en"
    assert all(image.attributes["alt"] for image in page.all("img"))
    for figure in page.all("svg"):
        assert figure.attributes.get("aria-hidden") == "true" or figure.attributes.get("aria-label")
    for region in page.all("div", class_="scroll"):
        assert region.attributes["tabindex"] == "0" and region.attributes["aria-label"]
    labelled = {id(one) for label in page.all("label") for tag in ("input", "select") for one in label.all(tag)}
    assert labelled == {id(one) for tag in ("input", "select") for one in page.all(tag)}


def test_same_input_gives_the_same_bytes():
    assert render_report(evil_data()) == render_report(evil_data())


# --- figures ----------------------------------------------------------------------------------------------------------


def test_scatter_joins_what_nothing_beats():
    points = [
        QualityPoint("a", "x", 1, 0.5, True),
        QualityPoint("b", "y", 10, 0.9),
        QualityPoint("c", "x", 20, 0.8),
        QualityPoint("d", "x", math.nan, 1),
    ]
    view = quality_view(points, "ms")
    assert [(point.mark, point.name) for point in view["points"]] == [("1", "a"), ("2", "b"), ("3", "c")]
    assert view["best"] == ["1", "2"] and quality_view(points[:1], "ms") is None
    (axes,) = view["figure"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["_front"].get_xydata().tolist() == [[1, 0.5], [10, 0.9]]
    assert lines["y"].get_xydata().tolist() == [[10, 0.9]]
    hollow, filled = lines["_x"], lines["x"]
    assert (filled.get_xydata().tolist(), hollow.get_xydata().tolist()) == ([[20, 0.8]], [[1, 0.5]])
    assert hollow.get_color() == filled.get_color() != lines["y"].get_color()
    assert axes.get_xscale() == "log" and [text.get_text() for text in axes.texts] == ["1", "2", "3"]


@pytest.mark.parametrize(("costs", "least"), [((99.0, 101.0), 2), ((10.0, 1000.0), 3), ((0.5, 3.0), 3)])
def test_logarithmic_axis_has_round_ticks(costs, least):
    figure = quality_figure([QualityPoint("n", "s", cost, 0.5) for cost in costs], "ms")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    ticks = [text.get_text() for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert len(ticks) >= least and all(f"{float(tick):g}" == tick for tick in ticks)


def test_recovery_line_starts_at_the_fit_and_marks_what_was_kept():
    (axes,) = recovery_figure(CONTENT["recovery"], ["0", "1"]).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
    assert [line.get_label() for line in lines] == ["fold 0", "fold 1"]
    assert lines[1].get_xydata().tolist() == [[0, 0.04], [10, 0.02], [20, 0.01]]
    tips = [dot.get_gid() for dot in axes.lines if dot.get_gid()]
    assert tips[3:] == [
        "tip:fold 1, step 0: 0.0400",
        "tip:fold 1, step 10: 0.0200",
        "tip:fold 1, step 20: 0.0100, kept",
    ]
    assert recovery_figure([{"steps": 0, "estimated_drop_before": 0.1, "history": []}], []) is None


def test_stage_bars_lie_end_to_end():
    (axes,) = stage_figure({"a": {"read": 1.0, "forward": 3.0}, "b": {"forward": 1.0, "write": 1.0}}).axes
    bars = {bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers}
    assert bars == {"read": [(0, 1), (0, 0)], "forward": [(1, 3), (0, 1)], "write": [(4, 0), (1, 1)]}
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == 3
    assert stage_figure({}) is None


def test_strips_show_every_known_case():
    values = np.array([[0.9, np.nan], [1.0, np.nan], [0.8, np.nan]])
    (axes,) = strips_figure(values, ["one", "two"], ["a", "b", "c"]).axes
    assert [dot.get_xydata()[0].tolist() for dot in axes.lines] == [[0.9, 0], [1.0, 0], [0.8, 0]]
    (median,) = axes.collections
    assert median.get_segments()[0][:, 0].tolist() == [0.9, 0.9]
    many = strips_figure(np.full((600, 2), 0.5), ["one", "two"], ["c"] * 600)
    assert sum(len(dots.get_offsets()) for dots in many.axes[0].collections if len(dots.get_offsets()) > 1) == 1200
    svg = inline_svg(many, "many", "")
    assert "data:image/png" in svg and len(svg) < 100_000
    assert strips_figure(values[:, 1:], ["two"], ["a", "b", "c"]) is None


def test_figures_have_ids_of_their_own_and_follow_the_colour_scheme():
    page = parse(render_report(evil_data()))
    ids = re.findall(r' id="([^"]+)"', render_report(evil_data()))
    assert len(ids) == len(set(ids))
    figures = page.all("svg")
    assert len(figures) > 4 and all(figure.attributes["viewbox"] for figure in figures)
    for tag in ("use", "path", "text"):
        styles = [one.attributes.get("style") or "" for figure in figures for one in figure.all(tag)]
        assert not any("#000000" in style or "font-family" in style for style in styles)
    assert "var(--s0)" in render_report(evil_data())


# --- volumes for the viewer -------------------------------------------------------------------------------------------


def unpack(text):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def test_embedded_volumes_are_the_scene():
    shown = scene()
    packed = embed(shown, {1: "one"}, 10**6)
    assert [one["name"] for one in packed["maps"]] == ["dense", "slim", "label", "differences"]
    volumes = {one["name"]: unpack(one["data"]) for one in packed["maps"]}
    for name, labels in shown.maps.items():
        assert np.array_equal(volumes[name].dataobj, labels)
        assert np.array_equal(volumes[name].affine, shown.affine)
    differences = np.asarray(volumes["differences"].dataobj)
    assert (differences[3, 3, 3], differences[6, 4, 4], differences[5, 4, 4]) == (1, 2, 3)
    assert int((differences > 0).sum()) == int(shown.different.sum()) == 6
    image = unpack(packed["image"]).get_fdata()
    low, high = np.percentile(shown.image, (0.5, 99.5))
    assert np.abs(image - np.clip(shown.image, low, high)).max() <= (high - low) / 255 / 2 * 1.01
    assert packed["labels"]["labels"] == ["", "one", "2"] and packed["labels"]["A"] == [0, 255, 255]
    assert packed["centre"] == list(shown.centre) == [4, 4, 4]
    assert packed["note"] == ""


def test_large_volumes_are_cropped_and_keep_their_place():
    shown = scene(shape=(60, 60, 60))
    whole = embed(shown, {}, 10**7)
    size = sum(len(one["data"]) for one in whole["maps"]) + len(whole["image"])
    packed = embed(shown, {}, size - 1)
    assert "cropped around the labels to 22x14x11 voxels" in packed["note"]
    box = label_box(list(shown.maps.values()), shown.spacing)
    assert box == (slice(0, 22), slice(0, 14), slice(0, 11))  # 15 mm around voxels 3..6, 3..5, 3..5
    volume = unpack(packed["maps"][1]["data"])
    assert np.array_equal(volume.dataobj, shown.maps["slim"][box])
    with pytest.raises(InputError, match=r"case a: the volumes take .* MB in the page, cropped .* --viewer-mb"):
        embed(shown, {}, 1000)


def test_crop_moves_the_origin():
    shown = scene(shape=(60, 60, 60))
    moved = replace(shown, maps={name: np.roll(labels, 30, (0, 1, 2)) for name, labels in shown.maps.items()})
    packed = embed(moved, {}, 100_000)
    box = label_box(list(moved.maps.values()), moved.spacing)
    corner = [side.start for side in box]
    assert corner == [33 - 15, 33 - 8, 33 - 5]
    affine = unpack(packed["maps"][0]["data"]).affine
    assert np.allclose(affine[:3, 3], nib.affines.apply_affine(moved.affine, corner))
    assert packed["centre"] == [c - start for c, start in zip(moved.centre, corner, strict=True)]


def test_viewer_leaves_out_what_is_too_large_and_says_so():
    small = scene("small", shape=(10, 10, 10))
    size = len(json.dumps(embed(small, {}, 10**7)))
    large = scene("large", shape=(10, 10, 10))
    large.maps["dense"][:] = np.random.default_rng(1).integers(0, 200, (10, 10, 10))
    view = viewer_view([large, small], Viewer(SCRIPT, {}, size))
    assert [one["case"] for one in view["cases"]] == ["small"]
    assert len(view["notes"]) == 1 and view["notes"][0].startswith("Left out: case large: the volumes take")
    with pytest.raises(InputError, match="--viewer-mb"):
        viewer_view([large], Viewer(SCRIPT, {}, 10))


def test_niivue_absent_or_wrong_is_explained(tmp_path, monkeypatch):
    wrong = tmp_path / "jquery.js"
    wrong.write_text("window.$ = 1")
    with pytest.raises(InputError, match=r"jquery.js is not NiiVue's niivue.umd.js"):
        find_niivue(wrong)
    with pytest.raises(InputError, match="cannot be read as a script"):
        find_niivue(tmp_path / "none.js")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'nnslim\[report\]'.*--niivue"):
        find_niivue()


def test_niivue_cannot_end_its_script_element(tmp_path):
    path = tmp_path / "niivue.umd.js"
    path.write_text('(function(){globalThis})("</script>");var Niivue')
    assert "</script" not in find_niivue(path)


# --- input that is something else -------------------------------------------------------------------------------------


def test_record_of_something_else_is_refused():
    with pytest.raises(InputError, match=r"nnslim\.json lacks input_shape, dense, slim, layers"):
        SlimRecord.from_dict({"nnslim": "0.1.0", "finetune": {}})
    for key, value in (("layers", [{"layer": "x"}]), ("dense", {"parameters": 1}), ("speed", {"dense_ms": 1})):
        with pytest.raises(InputError, match=r"x\.json is not what nnslim writes"):
            SlimRecord.from_dict(CONTENT | {key: value}, "x.json")


def test_decision_survives_json():
    for values in CONTENT["layers"]:
        decision = Decision.from_dict(json.loads(json.dumps(values)))
        assert vars(decision) == {**values, "shape": tuple(values["shape"])}


def test_scores_of_something_else_are_refused(tmp_path):
    path = tmp_path / "m.csv"
    for text, message in (
        ("a,b\n1,2\n", "is not a table of nnslim evaluate"),
        ("case,label,dice\n", "is not a table of nnslim evaluate"),
        ("case,label,dice\na,1,high\n", "line 2: could not convert"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_scores(path, "slim")
    with pytest.raises(InputError, match="cannot be read"):
        read_scores(tmp_path / "none.csv", "slim")


def test_scores_are_those_that_evaluate_writes(tmp_path):
    names = (LabelClass("one", (1,), "1"), LabelClass("two", (2,), "2"))
    found = Evaluation(names, tolerance=2.5)
    for name, counts in (("a", (10, 20, 5)), ("b", (10, 10, 10)), ("c", (0, 5, 0))):
        scores = {"1": Scores(*counts, 100, nsd=0.5, hd95=3.0 if counts[0] else math.nan)}
        found.cases.append(CaseScores(name, tmp_path, tmp_path, 100, scores))
    write_csv(tmp_path / "m.csv", found)
    write_summary(tmp_path / "summary.json", found)
    table = read_scores(tmp_path / "m.csv", "slim")
    assert (table.cases, table.tolerance, list(table.classes)) == (3, 2.5, ["one", "two"])
    assert table.classes["one"].dice == pytest.approx((2 * 5 / 30 + 1 + 0) / 3, abs=1e-5)
    assert (table.classes["one"].nsd, table.classes["one"].hd95, table.classes["one"].cases) == (0.5, 3.0, 3)
    assert math.isnan(table.classes["two"].dice) and table.classes["two"].cases == 0
    for metric in ("dice", "nsd", "hd95"):
        assert table.mean(metric) == pytest.approx(found.mean(metric), abs=1e-5)


def test_benchmark_is_read_from_folder_and_table(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "benchmark.json").write_text(json.dumps({"rows": bench().rows, "stages": bench().profiles}))
    found = read_benchmark(folder)
    assert (found.name, found.rows, found.profiles) == ("run", bench().rows, bench().profiles)
    write_table(bench().rows, folder / "grid.csv", COLUMNS)
    table = read_benchmark(folder / "grid.csv")
    assert best_pair([table], record()).slim["time_median_ms"] == "100.0"  # numbers of a CSV are text
    page = parse(render_report(data(benchmarks=[table])))
    assert (tile(page, "time")["value"], tile(page, "time")["change"]) == ("100 ms", "5.00x less")
    for text in ("[]", "{}", "no json"):
        (folder / "benchmark.json").write_text(text)
        with pytest.raises(InputError, match=re.escape("benchmark.json is not what nnslim benchmark writes")):
            read_benchmark(folder)


def test_cases_are_ordered_by_their_mean():
    assert [one.name for one in agreed().ordered()] == ["c", "b", "a"]
    nothing = Agreement(("one",), [case("x", one=math.nan), case("y", one=0.5)])
    assert [one.name for one in nothing.ordered()] == ["y"]
