"""Q-YOLOP in Flax: panoptic driving perception, trained in four stages, run in integers."""
