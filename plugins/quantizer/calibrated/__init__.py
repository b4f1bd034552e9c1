"""How weights are rounded by what their inputs are: GPTQ, AWQ and SmoothQuant."""
