"""Scripts that import from where things were still run, with a warning that says where they are now."""

import importlib
import subprocess
import sys

import pytest

from nnslim import former

PUBLIC = {
    "nnslim.hosts.nnunet.folder_job": ("PredictSettings", "predict_folder"),
    "nnslim.hosts.nnunet.folder": ("ModelFolder", "read_model_folder", "build_network"),
    "nnslim.hosts.nnunet.shipped": ("shipped_model",),
    "nnslim.hosts.nnunet.write": ("compress_folder",),
    "nnslim.hosts.nnunet.agree": ("agreement_of_folders", "write_agreement"),
    "nnslim.methods.embedded.daeformer": ("DAEFormer", "form_named"),
    "nnslim.surgery.reached": ("reached_parameters",),
    "nnslim.cost": ("measure_cost",),
    "nnslim.operations": ("count_operations",),
    "nnslim.spec": ("SlimSpec", "apply_spec"),
    "nnslim.work.config": ("SlimConfig", "load_config"),
    "nnslim.work.folder.run": ("FolderSettings",),
    "nnslim.work.folder.engines": ("Crew",),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_former_module_warns_and_gives_the_very_objects(name):
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=rf"{name} is a former name; import from {former.MODULES[name][0]}"):
        module = importlib.import_module(name)
    for public in PUBLIC[name]:
        home = importlib.import_module(former.MODULES[name][0])
        assert getattr(module, public) is getattr(home, former.NAMES.get(public, public))
    with pytest.raises(ImportError):
        exec(f"from {name} import nothing_of_that_name")


def test_every_row_leads_to_a_module_and_is_tested():
    for name, homes in former.MODULES.items():
        assert all(importlib.util.find_spec(home) for home in homes), name
        assert not homes or homes == ("nnslim.architectures",) or name in PUBLIC


def test_package_of_predictions_gives_its_names():
    from nnslim.hosts.nnunet.predict import PredictSettings, load_predictor, predict_folder

    assert {PredictSettings.__module__, load_predictor.__module__, predict_folder.__module__} == {
        f"nnslim.hosts.nnunet.predict.{name}" for name in ("predict_settings", "load", "directory")
    }


def test_importing_nnslim_imports_no_former_module():
    code = "import sys, nnslim; print([name for name in sys.modules if name.startswith('nnslim.')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['nnslim.former', 'nnslim._version']"
