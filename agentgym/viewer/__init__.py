"""Reading episodes: as text, and in a pager for a terminal."""
