"""A right adapter passes in every number format, and wrong ones fail: what `contracts/agreement.py` is for."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import formats

Found = dict[tuple[str, str], tuple[str | None, str | None]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    from mixfuse.train.model.embedded_base import build

    base = tmp_path_factory.mktemp("formats") / "base"
    build(base, tiny=True)
    rows = formats.faults(formats.Model(base, None), std=0.3, layer=1)
    return {(format_, name): (first, later) for format_, name, first, later in rows}


@pytest.mark.parametrize("format_", formats.FORMATS)
def test_the_right_adapter_passes(found: Found, format_: str):
    assert found[format_, "right"] == (None, None)


@pytest.mark.parametrize("format_", formats.FORMATS)
@pytest.mark.parametrize("adapter", formats.WRONG)
def test_a_wrong_one_fails_where_the_format_was_measured(found: Found, format_: str, adapter: str):
    assert found[format_, adapter][1]


@pytest.mark.parametrize("format_", formats.FORMATS)
@pytest.mark.parametrize("adapter", ["experts dropped", "alpha doubled"])
def test_dropped_and_doubled_parts_fail_against_float32_alone(found: Found, format_: str, adapter: str):
    assert found[format_, adapter][0]
