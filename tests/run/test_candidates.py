"""What commands do with files, without the command line around it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from vss.core.errors import VssError
from vss.run import candidates

SETTINGS: dict[str, Any] = {"split": "test", "dataset": None, "data_root": None, "size": None}


@pytest.mark.parametrize("name", ["max_drop", "max_fnr_increase", "max_ap_drop"])
def test_a_limit_without_a_baseline_is_refused_before_anything_is_read(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    limits = dict.fromkeys(("max_drop", "max_fnr_increase", "max_ap_drop")) | {name: 0.0}
    with pytest.raises(VssError, match=rf"^{flag} 0 is a limit against a baseline, .* add --baseline FILE"):
        candidates.evaluate(Path("absent.safetensors"), None, **SETTINGS, limits=limits)
    with pytest.raises(VssError, match=rf"{flag} is nan"):
        candidates.evaluate(
            Path("absent.safetensors"), Path("b.safetensors"), **SETTINGS, limits=limits | {name: math.nan}
        )


def test_without_limits_the_file_is_what_is_missing() -> None:
    with pytest.raises(VssError, match=r"absent\.safetensors does not exist"):
        candidates.evaluate(Path("absent.safetensors"), None, **SETTINGS, limits={})
