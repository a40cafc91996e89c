"""Reading episodes."""
