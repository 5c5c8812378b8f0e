"""A right adapter passes in every number format, and wrong ones fail: what `contracts/agreement.py` is for."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import formats

pytestmark = pytest.mark.slow
Found = dict[tuple[str, str], formats.Judged]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    from mixfuse.train.model.embedded_base import build

    base = tmp_path_factory.mktemp("formats") / "base"
    build(base, tiny=True)
    rows = formats.faults(formats.Model(base, None), std=0.3, layer=1)
    return {(judged.format_, judged.adapter): judged for judged in rows}


@pytest.mark.parametrize("format_", formats.FORMATS)
def test_the_right_adapter_passes(found: Found, format_: str):
    right = found[format_, "right"]
    assert (right.reference, right.measured) == (None, None)
    assert right.found.rest is not None, "no text stands behind several beginnings"


@pytest.mark.parametrize("format_", formats.FORMATS)
@pytest.mark.parametrize("adapter", formats.WRONG)
def test_a_wrong_one_fails_where_the_format_was_measured(found: Found, format_: str, adapter: str):
    assert found[format_, adapter].measured


@pytest.mark.parametrize("format_", formats.FORMATS)
@pytest.mark.parametrize("adapter", ["experts dropped", "alpha doubled"])
def test_dropped_and_doubled_parts_fail_against_float32_alone(found: Found, format_: str, adapter: str):
    assert found[format_, adapter].reference


@pytest.mark.parametrize("format_", [name for name in formats.FORMATS if name != "bfloat16 int4"])
@pytest.mark.parametrize("adapter", ["another revision", "a layer's experts swapped"])
def test_other_weights_of_one_size_fail_against_float32_alone(found: Found, format_: str, adapter: str):
    assert found[format_, adapter].reference
