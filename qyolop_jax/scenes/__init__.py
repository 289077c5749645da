"""Driving scenes, drawn with exact labels."""
