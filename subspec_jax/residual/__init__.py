"""What a 16-bit weight has and its low-bit substitute lacks: coded, stored, put together."""
