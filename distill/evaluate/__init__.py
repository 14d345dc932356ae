"""Frozen-feature evaluations; every one takes an Encoder or the features it produced."""
