"""Calibrated weights of 4 bits cost the real model clearly less than weights that are rounded to nearest.

The reference is float32, with weights as dequantized from the model's Q4_1 file: they lie on a grid of groups of 32, so
that groups of 64, two grids each, are compared. The text of the calibration is another part than the one that is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drivetrain.calibration import QuantizeOptions, quantize_model
from drivetrain.config import load_settings
from drivetrain.evaluation import Comparison, compare_quantizers
from support.perplexity import text_of_topics

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1800)]

CALIBRATION_TOKENS, TOKENS = 2048, 1024


def settings_of(model: Path, **quantizer: Any) -> Any:
    options = {"allow_lossy": True, **quantizer} if quantizer else "none"
    return load_settings(None, {"model": str(model), "precision": "fp32", "quantizer": options})


@pytest.fixture(scope="module")
def found(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("calibrated")
    text, other = folder / "text.txt", folder / "other.txt"
    text.write_text(text_of_topics()[:40_000], encoding="utf-8")
    other.write_text(text_of_topics()[40_000:], encoding="utf-8")
    packed = []
    for name in ("gptq", "awq"):
        options = QuantizeOptions(folder / name, other, CALIBRATION_TOKENS)
        packed.append(str(quantize_model(settings_of(smollm2, name=name, group=64), options)))
    nearest = settings_of(smollm2, name="int4", group=64, rules={"lm_head": "none"}).parts["quantizer"]
    return compare_quantizers(settings_of(smollm2), [nearest], text, packed=packed, num_tokens=TOKENS)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_calibrated_weights_lose_less_than_half_of_what_rounding_loses(found: Comparison, name: str) -> None:
    rows = {row.name: row for row in found.rows}
    nearest, calibrated = rows["int4:group=64,rules.lm_head=none"], rows[name]
    assert calibrated.num_bytes < 1.06 * nearest.num_bytes  # scales and minima of float32 beside those of float16
    assert found.change(calibrated) < 0.5 * found.change(nearest)
    assert calibrated.kl_divergence < 0.6 * nearest.kl_divergence
    assert calibrated.top1_agreement > nearest.top1_agreement
