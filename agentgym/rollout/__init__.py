"""The rollout engine and its pools of environments."""
