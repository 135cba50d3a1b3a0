"""`nnslim doctor`: what this machine has, and what follows from it for nnslim."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from nnslim._version import __version__
from nnslim.commands.common import tell
from nnslim.errors import HostError
from nnslim.running.machine import cpu_flags, cpu_name, has_fast_bfloat16, heap_can_be_kept, machine_threads

_PACKAGES = (
    ("nnunetv2", "the host"),
    ("torch", "runs the networks"),
    ("TotalSegmentator", "optional host; pip install nnslim[ts]"),
    ("tensorly", "tensor methods"),
    ("monai", "metrics and UNETR"),
    ("openvino", "optional, faster CPU inference; pip install nnslim[openvino]"),
    ("ray", "optional, clusters; pip install nnslim[ray]"),
)


def doctor() -> None:
    """Explain this machine: versions, what is compatible, which CPU and GPU features there are, where files go.

    Example: nnslim doctor
    """
    from nnslim.compression.config import presets
    from nnslim.methods.base import methods

    problems: list[str] = []
    sections = {
        "versions": _versions(problems),
        "hosts": _hosts(problems),
        "processor": _processor(),
        "gpu": _gpu(),
        "backends": _backends(),
        "folders": _folders(),
        "methods and presets": [f"methods: {', '.join(sorted(methods()))}", f"presets: {', '.join(presets())}"],
    }
    blocks = ("\n  ".join([title, *lines]) for title, lines in sections.items())
    tell(*blocks, *([f"PROBLEM: {problem}" for problem in problems] or ["all good"]), failed=bool(problems))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(problems: list[str]) -> list[str]:
    lines = [f"nnslim {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{package} {_version(package) or 'not installed'} ({purpose})" for package, purpose in _PACKAGES]
    torch_version = _version("torch") or ""
    if torch_version.startswith("2.9."):
        problems.append(f"torch {torch_version}: 3D convolutions are up to 4 times slower in 2.9; install another one")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        problems.append(f"Python {platform.python_version()}: nnslim is made for 3.10 to 3.13")
    return lines


def _hosts(problems: list[str]) -> list[str]:
    from nnslim.hosts.nnunet.model.compatibility import nnunet_version, predictor_class

    try:
        cls = predictor_class()
    except HostError as error:
        problems.append(str(error))
        return ["nnU-Net: not usable, see below"]
    lines = [f"nnU-Net {nnunet_version()}: all patched methods have the signatures that nnslim knows"]
    patched = [name for name, value in vars(cls).items() if hasattr(value, "__nnslim_original__")]
    lines.append(f"patches active now: {', '.join(patched) if patched else 'none'}")
    if _version("TotalSegmentator"):
        from nnslim.hosts.totalseg.task_weights import weights_folder

        try:
            folder = weights_folder()
        except HostError as error:
            return [*lines, str(error)]
        models = sorted(path.name for path in folder.glob("Dataset*")) if folder.is_dir() else []
        lines.append(f"TotalSegmentator weights in {folder}: {', '.join(models) or 'none; see scripts/00_setup_ts.py'}")
    return lines


def _processor() -> list[str]:
    import torch

    flags = cpu_flags()
    wide = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags]
    threads = machine_threads()
    lines = [
        f"{cpu_name()}, {threads} core(s) for this process, torch uses {torch.get_num_threads()} thread(s)",
        f"features: {', '.join(wide) or 'none of avx2, avx512, vnni, bf16, amx'}",
    ]
    cap = os.environ.get("nnUNet_def_n_proc", "8")
    if int(cap) < threads:
        lines.append(f"nnU-Net caps torch at {cap} threads; nnUNet_def_n_proc={threads} lets it use all cores")
    if not has_fast_bfloat16():
        lines.append("bf16 and fp16 have no fast path on this processor")
    if "avx512_vnni" in flags or "avx_vnni" in flags:
        lines.append("int8 has a fast path (VNNI)")
    return lines


def _gpu() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["none that torch can use; everything runs on the CPU"]
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{one.name}, {one.total_memory / 2**30:.0f} GiB, capability {one.major}.{one.minor}" for one in devices]


def _backends() -> list[str]:
    import torch

    from nnslim.running import native
    from nnslim.running.engine import candidates

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = native.kernels()
    if found is not None:
        kernels = found.path.name.partition(".")[0].replace("+", ", ")
    elif os.environ.get("NNSLIM_NATIVE") == "0":
        kernels = "switched off by NNSLIM_NATIVE=0"
    else:
        kernels = (
            "none for this processor, some layers are several times slower; install a C compiler, then nnslim again"
        )
    return [
        f"auto compares {', '.join(candidates(device))} on {device.type}",
        f"native kernels: {kernels}",
        f"heap {'is kept between tiles' if heap_can_be_kept() else 'is left alone (set by a variable, or not glibc)'}",
    ]


def _folders() -> list[str]:
    from nnslim.compression.cache import cache_folder
    from nnslim.compression.config import SlimConfig

    folder = cache_folder(SlimConfig())
    files = list(folder.glob("*.pt")) if folder.is_dir() else []
    size = sum(file.stat().st_size for file in files) / 1e6
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer")
    return [
        f"cache {folder}: {len(files)} compressed model(s), {size:.0f} MB; it can be deleted at any time",
        *(f"{name}: {os.environ.get(name, 'not set')}" for name in names),
    ]
