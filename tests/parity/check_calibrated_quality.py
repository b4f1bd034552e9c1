"""What calibrated weights cost the real model, and that it is clearly less than rounding to nearest at the same bits.

The reference is float32, with weights as dequantized from the model's Q4_1 file: they lie on a grid of groups of 32,
with minima of any value. These formats hold zero points, whole steps, so that rounding to nearest does not find the old
grid again; it is done here by `awq` without factors, cuts and sweeps: the same form, the same bits. The output layer is
full in all of them. The text of the calibration is another part than the one that is read.

It quantizes the model four times, which takes some ten minutes of two quiet cores: run it by its name, with pytest.
With `-s` it prints the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drivetrain.calibration import QuantizeOptions, quantize_model
from drivetrain.config import load_settings
from drivetrain.evaluation import Comparison, compare_quantizers
from support.perplexity import text_of_topics

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(3600)]

TOKENS = 2048

PACKED: dict[str, tuple[int, dict[str, Any]]] = {
    "nearest": (512, {"name": "awq", "group": 32, "steps": 1, "clip": False, "sweeps": 0}),
    "gptq": (4096, {"name": "gptq", "group": 32}),
    "awq": (4096, {"name": "awq", "group": 32}),
    "w8a8": (2048, {"name": "w8a8"}),
}
"""Folder -> tokens of the calibration, and the quantizer."""


def settings_of(model: Path, **quantizer: Any) -> Any:
    options = {"allow_lossy": True, **quantizer} if quantizer else "none"
    return load_settings(None, {"model": str(model), "precision": "fp32", "quantizer": options})


@pytest.fixture(scope="module")
def found(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("calibrated")
    text, other = folder / "text.txt", folder / "other.txt"
    half = len(text_of_topics()) // 2
    text.write_text(text_of_topics()[:half], encoding="utf-8")
    other.write_text(text_of_topics()[half:], encoding="utf-8")
    packed = []
    for name, (tokens, quantizer) in PACKED.items():
        options = QuantizeOptions(folder / name, other, tokens)
        packed.append(str(quantize_model(settings_of(smollm2, **quantizer), options)))
    found = compare_quantizers(settings_of(smollm2), [], text, packed=packed, num_tokens=TOKENS)
    for row in found.rows:
        print(
            f"{row.name}: perplexity {row.perplexity:.4f}, {found.change(row):+.2%}; KL {row.kl_divergence:.4f}; "
            f"top-1 {row.top1_agreement:.2%}; {row.num_bytes / 2**20:.1f} MiB"
        )
    return found


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_four_bits_stay_within_six_percent_and_clearly_below_rounding(found: Comparison, name: str) -> None:
    rows = {row.name: row for row in found.rows}
    nearest, calibrated = rows["nearest"], rows[name]
    assert calibrated.num_bytes == pytest.approx(nearest.num_bytes, rel=0.01)
    assert found.change(calibrated) < 0.06
    assert found.change(calibrated) < 0.6 * found.change(nearest)
    assert calibrated.kl_divergence < 0.6 * nearest.kl_divergence
    assert calibrated.top1_agreement > nearest.top1_agreement


def test_smoothed_integer_products_stay_within_two_percent(found: Comparison) -> None:
    """One scale for each token: without smoothing it is 3 to 4%."""
    assert found.change(next(row for row in found.rows if row.name == "w8a8")) < 0.02
