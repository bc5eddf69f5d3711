"""Other people's systems, one file each: python -m baselines.decision_diffuser."""
