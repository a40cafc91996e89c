"""Text games and text worlds."""
