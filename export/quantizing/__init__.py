"""The parts of quantization: plan, calibration, Q/DQ, accuracy budget, other people's quantizers."""
