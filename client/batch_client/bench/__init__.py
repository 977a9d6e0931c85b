"""How quick a model can be on this machine, what limits a run, and the settings that are best."""
