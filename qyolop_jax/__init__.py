"""Q-YOLOP in Flax: panoptic driving perception, trained in four stages, run in integers."""


class QyolopError(ValueError):
    """The base of this package's errors; their messages are for users."""
