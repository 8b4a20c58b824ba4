"""Pre-training of the embedded base model: simulated windows, their statistics, the model that learns them, Muon."""
