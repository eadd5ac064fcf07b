"""These tests are collected where there is a GPU and Triton compiles for it; see pytest.ini beside this file."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
