"""How a run lives: checkpoints, signals, broken steps, the log, the optimizer."""
