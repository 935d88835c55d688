"""What tests of runtimes that may be missing need."""

from __future__ import annotations

import pytest

from vss.deploy import BACKENDS

needs_openvino = pytest.mark.skipif(BACKENDS["openvino"].unavailable() is not None, reason="needs openvino")
