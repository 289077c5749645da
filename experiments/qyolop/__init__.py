"""Panoptic driving perception in eight bits: `python -m experiments.qyolop`."""
