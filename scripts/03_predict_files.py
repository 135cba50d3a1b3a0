"""Predict images: `nnslim predict` with its options, or with a configuration of tucker-cnn and files.

Examples: ./run.sh scripts/03_predict_files.py -i ct.nii.gz -o out --task total_fast
          ./run.sh scripts/03_predict_files.py -i IMAGES -o OUT -m MODEL -c tucker-balanced
          ./run.sh scripts/03_predict_files.py configs/predict_config.yml ct_1.nii.gz ct_2.nii.gz --workers 2
"""

from __future__ import annotations

from pathlib import Path

from tucker_cnn import nnslim, read_config, run

from nnslim.errors import InputError
from nnslim.files import temporary_folder

_ENDINGS = (".nii.gz", ".nii")
_SUBJECT_FILES = ("ct", "mri")  # in a folder of the subject's name


def subject_of(path: Path) -> str:
    """Return the name of a file's subject: `s1_0000.nii.gz` and `s1/ct.nii.gz` are of s1."""
    ending = next((end for end in _ENDINGS if path.name.endswith(end)), None)
    if ending is None or not path.is_file():
        raise InputError(f"{path}: expected an image that is there and ends with {' or '.join(_ENDINGS)}")
    name = path.name.removesuffix(ending).removesuffix("_0000")
    return path.absolute().parent.name if name in _SUBJECT_FILES else name


def predict_files(given: list[str]) -> None:
    """Run TotalSegmentator under the context for each file; what follows the files are options of `nnslim predict`."""
    content = read_config(given[0], "out_root", "out_id")
    count = next((place for place, word in enumerate(given) if word.startswith("-")), len(given))
    files, options = [Path(word) for word in given[1:count]], given[count:]
    if not files:
        raise InputError(f"no files to predict after {given[0]}")
    subjects: dict[str, Path] = {}
    for path in files:
        if (other := subjects.setdefault(subject_of(path), path)) != path:
            raise InputError(f"{other} and {path} are both subject '{subject_of(path)}'; rename one")
    if "--device" not in options:
        import torch

        options += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    task = "total_fast" if content.get("fast_model", False) else "total"
    slim = ["-c", given[0]] if content.get("tucker_config") else []
    output = Path(content["out_root"]) / str(content["out_id"])
    with temporary_folder() as folder:
        for subject, path in subjects.items():
            (folder / f"{subject}{'.nii.gz' if path.name.endswith('.gz') else '.nii'}").symlink_to(path.absolute())
        nnslim("predict", "-i", folder, "-o", output, "--task", task, *slim, *options)


if __name__ == "__main__":
    run("predict", predict_files)
