"""What only a CUDA device can show; run with `pytest -m gpu tests/gpu`."""
