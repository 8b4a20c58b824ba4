"""What the embedded base is pre-trained on, and with: simulated windows, their statistics, a reader, an optimizer."""
