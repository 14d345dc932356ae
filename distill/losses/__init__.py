"""Objectives and targets: pure functions of tensors."""
