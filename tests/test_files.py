"""Files and folders that everything uses."""

from __future__ import annotations

import subprocess
import sys

from helpers import ROOT

NOBODY = """
import os, pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
os.environ.pop("HOME", None)
"""


def test_import_needs_no_home():
    """A container may run as a user without HOME and without an entry in the list of users."""
    code = NOBODY + "import nnslim, nnslim.cli, nnslim.running.engine, nnslim.compression.cache"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
