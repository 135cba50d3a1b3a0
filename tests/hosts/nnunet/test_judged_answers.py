"""Slim models are judged by the answer that their user takes: mirrored, plain, or the mirrored one in one pass."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import load_stock

from nnslim.context import NNSlimContext
from nnslim.errors import ConfigError
from nnslim.files import read_json
from nnslim.hosts.nnunet.judge.agree_models import load_pair, takes_mirrored
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings

_METHODS = [{"method": "tucker", "rank_factor": 0.5, "rank_min": 2}]
_CONTENT = {"methods": _METHODS, "run": {"guard": False}, "recovery": {"steps": 4, "every": 4}}

_CONTEXT = _CONTENT | {"cache": {"read": False, "write": False}}


@pytest.fixture
def compress(command, case_folder, tmp_path):
    """Compress a model with images; return the folder, its nnslim.json and what was printed."""

    def run(model, *options, expect=0, **recovery):
        config, out = tmp_path / "config.yml", tmp_path / "slim"
        config.write_text(json.dumps(_CONTENT | {"recovery": _CONTENT["recovery"] | recovery}))
        _, said, err = command(
            "compress", "-m", model, "-o", out, "-c", config, "-i", case_folder, *options, expect=expect
        )
        return (out, read_json(out / "nnslim.json"), said) if expect == 0 else err

    return run


@pytest.fixture
def never_mirrored(make_model):
    path = make_model() / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(path, weights_only=False) | {"inference_allowed_mirroring_axes": None}, path)
    return path.parents[1]


@pytest.mark.parametrize(
    ("options", "judged", "shown"),
    [((), "mirrored", "(mirrored answers)"), (("--disable_tta",), "plain", "(plain answers)")],
)
def test_mirrored_answers_are_judged_unless_plain_ones_are_asked_for(
    compress, command, make_model, case_folder, options, judged, shown
):
    model = make_model()
    slim, record, said = compress(model, *options)
    assert [fold["judged"] for fold in record["recovery"]] == [judged] and shown in said
    assert record["config"]["calibration"]["mirrored"] is (judged == "mirrored")
    agree = ("agree", "-m", slim, "--dense", model, "-i", case_folder)
    assert ("slim against dense, mirrored:" in command(*agree, expect=0)[1]) is (judged == "mirrored")
    assert read_json(slim / "nnslim.json")["agreement"]["mirrored"] is (judged == "mirrored")
    assert "slim against dense: " in command(*agree, "--disable_tta", expect=0)[1]
    command("report", "-m", slim, "-o", slim.parent / "page", expect=0)
    page = next((slim.parent / "page").rglob("*.html")) if (slim.parent / "page").is_dir() else slim.parent / "page"
    assert shown in page.read_text()


def test_a_model_that_is_never_mirrored_is_judged_by_its_plain_answer(compress, never_mirrored):
    assert compress(never_mirrored)[1]["recovery"][0]["judged"] == "plain"


@pytest.mark.parametrize(("use_mirroring", "judged"), [(True, "mirrored"), (False, "plain")])
def test_the_context_judges_what_the_predictor_does(make_model, case_folder, tmp_path, use_mirroring, judged):
    model = make_model()
    content = _CONTENT | {"cache": {"folder": str(tmp_path / "cache")}}
    for _ in range(2):  # compressed, then recalled
        with NNSlimContext(content, images=case_folder) as slim:
            load_stock(model, use_mirroring=use_mirroring)
        assert [fold["judged"] for fold in slim.report.to_dict()["models"][0]["recovery"]] == [judged]
    assert slim.report.models[0].from_cache


def test_one_pass_is_what_stock_nnunet_and_the_context_then_do(compress, make_model, stock_logits, case_folder):
    model = make_model()
    slim, record, said = compress(model, target="mirrored")
    assert record["recovery"][0]["judged"] == "one pass" and "(one pass against mirrored answers)" in said
    once, asked = (stock_logits(slim, (0,), use_mirroring=each) for each in (False, True))
    assert torch.equal(once, asked)
    assert not torch.equal(*(stock_logits(model, (0,), use_mirroring=each) for each in (False, True)))
    config = _CONTENT | {"recovery": {"steps": 4, "every": 4, "target": "mirrored"}, "cache": {"write": False}}
    with NNSlimContext(config | {"cache": {"read": False, "write": False}}, images=case_folder):
        assert load_stock(model, use_mirroring=True).allowed_mirroring_axes is None


def test_distill_makes_one_pass_of_a_slim_model(compress, command, make_model, stock_logits, case_folder, tmp_path):
    model = make_model()
    slim, _, _ = compress(model, "--disable_tta")
    assert not takes_mirrored(slim)
    arguments = ("--teacher", model, "-i", case_folder, "-o", tmp_path / "once", "--steps", 2, "--target", "mirrored")
    command("distill", "-m", slim, *arguments, expect=0)
    once, asked = (stock_logits(tmp_path / "once", (0,), use_mirroring=each) for each in (False, True))
    assert torch.equal(once, asked)
    assert read_json(tmp_path / "once" / "nnslim.json")["recovery"][0]["judged"] == "one pass"
    assert takes_mirrored(tmp_path / "once")  # compared with the dense model's mirrored answer, whatever came before


def test_the_context_learns_the_mirrored_answer_of_a_predictor_that_does_not_mirror(make_model, case_folder):
    config = _CONTEXT | {"recovery": {"steps": 2, "target": "mirrored"}}
    with NNSlimContext(config, images=case_folder) as slim:
        load_stock(make_model(), use_mirroring=False)
    assert slim.report.models[0].slimmed.recovery[0]["judged"] == "one pass"


def test_an_ensemble_is_judged_plain_where_plain_answers_are_asked_for(compress, make_model):
    _, record, _ = compress(make_model(folds=(0, 1)), "--disable_tta", target="ensemble")
    assert record["recovery"][0]["judged"] == "plain" and record["folds"] == ["0"]


def test_one_slim_fold_learns_what_all_folds_answer(compress, command, make_model, stock_logits, case_folder, tmp_path):
    model, far = make_model(folds=(0, 1)), []
    wanted = stock_logits(model, (0, 1), use_mirroring=True).softmax(0)
    for steps in (1, 40):
        slim, record, said = compress(
            model, target="ensemble", teacher="live", steps=steps, every=40, learning_rate=3e-3
        )
        assert sorted(path.name for path in slim.glob("fold_*")) == ["fold_0"] and record["folds"] == ["0"]
        assert record["ensemble"] == ["0", "1"] and "(one pass against mirrored answers)" in said
        once, asked = (stock_logits(slim, (0,), use_mirroring=each) for each in (False, True))
        assert torch.equal(once, asked)
        far.append(float((once.softmax(0) - wanted).square().mean()))
        large, small = load_pair(model, slim, PredictSettings(device="cpu"))
        assert (len(large.list_of_parameters), len(small.list_of_parameters)) == (2, 1)
        shutil.move(slim, tmp_path / f"steps{steps}")
    assert far[1] < far[0]
    both, _, _ = compress(model)  # two slim folds, of which distillation makes one
    out = tmp_path / "joined"
    arguments = ("--teacher", model, "-i", case_folder, "-o", out, "--steps", 2, "--target", "ensemble")
    assert "fold 0: 2 steps" in command("distill", "-m", both, *arguments, expect=0)[1]
    assert sorted(path.name for path in out.glob("fold_*")) == ["fold_0"]
    assert read_json(out / "nnslim.json")["ensemble"] == ["0", "1"]


def test_the_context_makes_one_fold_of_an_ensemble(make_model, case_folder):
    model = make_model(folds=(0, 1))
    config = _CONTEXT | {"recovery": {"steps": 2, "target": "ensemble"}}
    with NNSlimContext(config, images=case_folder) as slim:
        predictor = load_stock(model, folds=(0, 1), use_mirroring=True)
    assert len(predictor.list_of_parameters) == 1 and predictor.allowed_mirroring_axes is None
    assert slim.report.models[0].slimmed.recovery[0]["judged"] == "one pass"


def test_an_ensemble_needs_several_folds(compress, command, make_model, case_folder, tmp_path):
    model = make_model()
    assert "there is only one" in compress(model, target="ensemble", expect=2)
    slim, _, _ = compress(model)
    arguments = ("--teacher", model, "-i", case_folder, "-o", tmp_path / "no", "--steps", 2, "--target", "ensemble")
    assert "the teacher has only one" in command("distill", "-m", slim, *arguments, expect=2)[2]
    assert not (tmp_path / "no").exists()


def test_one_pass_that_cannot_be_learned_is_refused(compress, command, never_mirrored, tmp_path):
    assert "never mirrored" in compress(never_mirrored, target="mirrored", expect=2)
    assert "give recovery.steps" in compress(never_mirrored, target="mirrored", steps=0, expect=2)
    assert "does not go with calibration.mirrored" in compress(
        never_mirrored, "--disable_tta", target="mirrored", expect=2
    )
    given = ("-m", never_mirrored, "-o", tmp_path / "other", "-c", tmp_path / "config.yml")
    assert "is learned from images" in command("compress", *given, expect=2)[2]
    assert not (tmp_path / "slim").exists() and not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match=r"one of|Input should be 'same', 'mirrored' or 'ensemble'"):
        NNSlimContext({"methods": _METHODS, "recovery": {"target": "both"}})
