"""Learn, store and serve one-bit weight masks over a shared backbone."""
